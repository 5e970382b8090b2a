//go:build linux

// Package stdio connects a process in a container with where its client wants
// its input from and its output to: FIFOs, files, logging programs, or nothing.
// The shim holds both ends of every FIFO that it writes, so clients come and go
// without the process noticing; copying costs no memory while nothing flows.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/reaper"
)

const bufferSize = 32 << 10

// Opener opens the streams of processes. It may be used concurrently.
type Opener struct {
	reaper *reaper.Reaper
	log    *slog.Logger
	pool   sync.Pool // of *[bufferSize]byte

	// Times that tests shorten.
	readyTimeout time.Duration // a logging program has to be ready within it
	exitGrace    time.Duration // it may end by itself on end of file within it
	termTimeout  time.Duration // after SIGTERM it is killed after this
}

// NewOpener returns an Opener. Logging programs are children of this process,
// so their exits are collected by r.
func NewOpener(r *reaper.Reaper, log *slog.Logger) *Opener {
	return &Opener{
		reaper: r, log: log,
		pool:         sync.Pool{New: func() any { return new([bufferSize]byte) }},
		readyTimeout: 30 * time.Second,
		exitGrace:    500 * time.Millisecond,
		termTimeout:  12 * time.Second,
	}
}

// Config says where the streams of a process lead. A stream is "" for nothing,
// the path of a FIFO or file, or a URI (contract 5.5): fifo://, file://,
// binary://, binary-v2://.
type Config struct {
	// ID and Namespace are told to logging programs.
	ID, Namespace string
	// Terminal merges both outputs; Stderr is ignored.
	Terminal              bool
	Stdin, Stdout, Stderr string
	// UID and GID own the pipes.
	UID, GID int
}

// IO is the streams of one process. Its methods may be called concurrently.
type IO struct {
	o        *Opener
	terminal bool

	in        *os.File // what the client writes
	out, err  output   // what the client reads; the same file if the paths are
	loggers   []*logger
	child     [3]*os.File // the process's ends
	ours      [3]*os.File // our ends of its pipes
	copying   sync.WaitGroup
	moved     atomic.Int64
	closeOnce sync.Once
	closeErr  error

	mu            sync.Mutex // guards the rest
	keepIn        *os.File   // a writer, so that input does not end when a client leaves
	console       *os.File
	peer          *os.File // the process's side, so that the console does not hang up
	width, height uint16
	closed        bool
}

// Open opens everything that can fail: nothing of it is left behind after an
// error. A logging program is started and ready when it returns.
func (o *Opener) Open(ctx context.Context, c Config) (_ *IO, err error) {
	s := &IO{o: o, terminal: c.Terminal}
	defer func() {
		if err != nil {
			s.closeFiles()
			s.stopLoggers()
		}
	}()
	if c.Stdin != "" {
		if err := s.openStdin(c.Stdin); err != nil {
			return nil, fmt.Errorf("stdin %s: %w", c.Stdin, err)
		}
		if !c.Terminal {
			if s.child[0], s.ours[0], err = pipe(c); err != nil {
				return nil, err
			}
		}
	}
	if s.out, err = s.openSink(ctx, c, 1, c.Stdout); err != nil {
		return nil, fmt.Errorf("stdout %s: %w", c.Stdout, err)
	}
	switch {
	case c.Terminal:
	case c.Stderr != "" && c.Stderr == c.Stdout && !isBinary(c.Stdout):
		s.err = s.out
		if l, ok := s.out.(*logStream); ok {
			s.err = l.l.stream("stderr")
		}
		if s.ours[2], s.child[2], err = pipe(c); err != nil {
			return nil, err
		}
	case isBinary(c.Stdout) && (c.Stderr == "" || c.Stderr == c.Stdout):
		// The logging program takes both (see openSink).
	default:
		if s.err, err = s.openSink(ctx, c, 2, c.Stderr); err != nil {
			return nil, fmt.Errorf("stderr %s: %w", c.Stderr, err)
		}
	}
	return s, nil
}

func isBinary(uri string) bool {
	return strings.HasPrefix(uri, "binary://") || strings.HasPrefix(uri, "binary-v2://")
}

// pipe returns a pipe whose ends belong to the configured user.
func pipe(c Config) (r, w *os.File, err error) {
	if r, w, err = os.Pipe(); err != nil {
		return nil, nil, err
	}
	if c.UID != 0 || c.GID != 0 {
		if err := r.Chown(c.UID, c.GID); err != nil {
			r.Close()
			w.Close()
			return nil, nil, err
		}
	}
	return r, w, nil
}

func (s *IO) openStdin(uri string) (err error) {
	scheme, path, err := split(uri)
	if err != nil {
		return err
	}
	if scheme != "fifo" {
		return fmt.Errorf("input cannot come from %s: %w", scheme, errdefs.ErrInvalidArgument)
	}
	info, err := os.Stat(path)
	if err != nil {
		return notFound(err)
	}
	if s.in, err = os.OpenFile(path, unix.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return err
	}
	if info.Mode()&os.ModeNamedPipe == 0 {
		return nil
	}
	s.keepIn, err = os.OpenFile(path, unix.O_WRONLY|unix.O_NONBLOCK, 0)
	return err
}

func notFound(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// split takes a stream's address apart. A path without scheme is a FIFO's.
func split(uri string) (scheme, path string, err error) {
	if !strings.Contains(uri, "://") {
		return "fifo", uri, nil
	}
	u, err := url.Parse(uri)
	if err != nil {
		return "", "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	switch u.Scheme {
	case "fifo", "file", "binary", "binary-v2":
	default:
		return "", "", fmt.Errorf("unknown scheme %q: %w", u.Scheme, errdefs.ErrInvalidArgument)
	}
	path = u.Path
	if u.Host != "" || !filepath.IsAbs(path) {
		return "", "", fmt.Errorf("%s needs an absolute path: %w", u.Scheme, errdefs.ErrInvalidArgument)
	}
	return u.Scheme, path, nil
}

// openSink opens where one output goes, and the pipe in between if the process
// has no terminal. A logging program reads its pipes itself, without copying.
func (s *IO) openSink(ctx context.Context, c Config, n int, uri string) (sink output, err error) {
	if uri == "" {
		return nil, nil
	}
	scheme, path, err := split(uri)
	if err != nil {
		return nil, err
	}
	switch scheme {
	case "binary", "binary-v2":
		return s.openLogger(ctx, c, n, uri)
	case "file":
		opts, lines, err := logFormat(uri)
		if err != nil {
			return nil, err
		}
		if lines {
			l, err := s.o.openLog(path, opts)
			if err != nil {
				return nil, err
			}
			sink = l.stream([]string{1: "stdout", 2: "stderr"}[n])
			break
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if sink, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644); err != nil {
			return nil, err
		}
	default:
		info, err := os.Stat(path)
		if err != nil {
			return nil, notFound(err)
		}
		flags := os.O_WRONLY | os.O_APPEND
		if info.Mode()&os.ModeNamedPipe != 0 {
			// Both ends: it never blocks for want of a reader, and what was
			// written stays while clients come and go (contract 13.19).
			flags = unix.O_RDWR | unix.O_NONBLOCK
		}
		if sink, err = os.OpenFile(path, flags, 0); err != nil {
			return nil, err
		}
	}
	if !c.Terminal {
		if s.ours[n], s.child[n], err = pipe(c); err != nil {
			sink.Close()
			return nil, err
		}
	}
	return sink, nil
}

func (s *IO) openLogger(ctx context.Context, c Config, n int, uri string) (output, error) {
	var read, write [2]*os.File
	for i := range read {
		var err error
		if read[i], write[i], err = pipe(c); err != nil {
			closeAll(read[:]...)
			closeAll(write[:]...)
			return nil, err
		}
	}
	l, err := s.o.startLogger(ctx, c, uri, read[0], read[1])
	closeAll(read[:]...)
	if err != nil {
		closeAll(write[:]...)
		return nil, err
	}
	s.loggers = append(s.loggers, l)
	if c.Terminal {
		write[1].Close()
		return write[0], nil
	}
	if n == 2 {
		write[0].Close()
		s.child[2] = write[1]
		return nil, nil
	}
	s.child[1] = write[0]
	if c.Stderr == "" || c.Stderr == uri {
		s.child[2] = write[1]
	} else {
		write[1].Close()
	}
	return nil, nil
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// Child returns the files that the process gets as its standard streams; nil
// stands for /dev/null. A process with a terminal gets none.
func (s *IO) Child() (in, out, err *os.File) { return s.child[0], s.child[1], s.child[2] }

// Started begins to copy. It is called once, when the process has its streams;
// console is the master of its terminal, if it has one, and is owned by s then.
func (s *IO) Started(console *os.File) error {
	closeAll(s.child[:]...)
	s.child = [3]*os.File{}
	if !s.terminal {
		if s.in != nil {
			go s.copyIn(s.ours[0])
		}
		ends := [2]*atomic.Int32{new(atomic.Int32), new(atomic.Int32)}
		if s.err == s.out {
			ends[1] = ends[0]
		}
		for i := range ends {
			if s.ours[i+1] != nil {
				ends[i].Add(1)
			}
		}
		s.copyOut(s.out, s.ours[1], ends[0])
		s.copyOut(s.err, s.ours[2], ends[1])
		return nil
	}
	if console == nil {
		return fmt.Errorf("process got no terminal: %w", errdefs.ErrInternal)
	}
	s.mu.Lock()
	s.console = console
	width, height := s.width, s.height
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, console.Fd(), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno == 0 {
		s.peer = os.NewFile(peer, "console peer")
	}
	s.mu.Unlock()
	// Fd made it blocking; the copying needs the poller.
	fd, err := unix.FcntlInt(console.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return os.NewSyscallError("fcntl", err)
	}
	s.ours[1] = os.NewFile(uintptr(fd), "console")
	if width != 0 || height != 0 {
		if err := s.Resize(width, height); err != nil {
			return err
		}
	}
	if s.in != nil {
		go s.copyIn(s.ours[1])
	}
	left := new(atomic.Int32)
	left.Add(1)
	s.copyOut(s.out, s.ours[1], left)
	return nil
}

func (s *IO) copyIn(dst *os.File) {
	_ = s.copy(dst, s.in)
	if !s.terminal {
		dst.Close()
	}
	s.in.Close()
}

// copyOut copies until the process and all that inherited its stream have
// closed it. The last one of left that ends closes dst: clients wait for the
// end of the output before they delete the process.
func (s *IO) copyOut(dst output, src *os.File, left *atomic.Int32) {
	if src == nil {
		return
	}
	s.copying.Add(1)
	go func() {
		defer s.copying.Done()
		if dst == nil {
			_ = s.copy(nil, src) // a terminal that nobody looks at
			return
		}
		if err := s.copy(dst, src); err != nil {
			s.o.log.Debug("output of a process is lost", "to", dst.Name(), "error", err)
			// The process must not block because its client's disk is full.
			_ = s.copy(nil, src)
		}
		if left.Add(-1) == 0 {
			dst.Close()
		}
	}()
}

// copy moves bytes until the source ends. It holds a buffer only while there
// is something to move.
func (s *IO) copy(dst io.Writer, src *os.File) error {
	conn, err := src.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var buf *[bufferSize]byte
		var n int
		var rerr error
		err := conn.Read(func(fd uintptr) bool {
			buf = s.o.pool.Get().(*[bufferSize]byte)
			for {
				n, rerr = unix.Read(int(fd), buf[:])
				if !errors.Is(rerr, unix.EINTR) {
					break
				}
			}
			if errors.Is(rerr, unix.EAGAIN) {
				s.o.pool.Put(buf)
				buf = nil
				return false
			}
			return true
		})
		if err == nil && rerr == nil && n > 0 && dst != nil {
			_, err = dst.Write(buf[:n])
		}
		if buf != nil {
			s.o.pool.Put(buf)
		}
		switch {
		case err != nil:
			return err
		case errors.Is(rerr, unix.EIO): // the other side of a terminal is closed
			return nil
		case rerr != nil:
			return rerr
		case n <= 0:
			return nil
		}
		s.moved.Add(int64(n))
	}
}

// CloseStdin ends the process's input as soon as no client has it open any
// more and all that was written is read.
func (s *IO) CloseStdin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keepIn != nil {
		s.keepIn.Close()
		s.keepIn = nil
	}
}

// Resize sets the size of the terminal, in characters. Without a terminal it
// does nothing; before the process is started it is remembered.
func (s *IO) Resize(width, height uint16) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.width, s.height = width, height
	if s.console == nil || s.closed {
		return nil
	}
	err := unix.IoctlSetWinsize(int(s.console.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width})
	return os.NewSyscallError("ioctl TIOCSWINSZ", err)
}

// Exited is called when the process is gone, so that its terminal ends.
func (s *IO) Exited() {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeAll(s.peer)
	s.peer = nil
}

// Drain waits until all output of an exited process has been copied. It gives
// up when nothing has moved for idle or when limit is over, and says whether
// everything was copied.
func (s *IO) Drain(idle, limit time.Duration) bool {
	done := make(chan struct{})
	go func() { s.copying.Wait(); close(done) }()
	deadline := time.After(limit)
	moved := s.moved.Load()
	for {
		select {
		case <-done:
			return true
		case <-deadline:
			return false
		case <-time.After(idle):
			now := s.moved.Load()
			if now == moved {
				return false
			}
			moved = now
		}
	}
}

// Close closes all streams and ends the logging programs: they see the end of
// their input, then SIGTERM, and after twelve seconds SIGKILL.
func (s *IO) Close() error {
	s.closeOnce.Do(func() {
		s.closeFiles()
		s.closeErr = s.stopLoggers()
	})
	return s.closeErr
}

func (s *IO) closeFiles() {
	s.mu.Lock()
	s.closed = true
	closeAll(s.keepIn, s.console, s.peer)
	s.keepIn, s.peer = nil, nil
	s.mu.Unlock()
	closeAll(s.child[:]...)
	closeAll(s.ours[:]...)
	closeAll(s.in)
	for _, sink := range []output{s.out, s.err} {
		if sink != nil {
			sink.Close() // a second time does nothing
		}
	}
}

func (s *IO) stopLoggers() error {
	var errs []error
	for _, l := range s.loggers {
		errs = append(errs, l.stop())
	}
	s.loggers = nil
	return errors.Join(errs...)
}

var _ io.Closer = (*IO)(nil)
