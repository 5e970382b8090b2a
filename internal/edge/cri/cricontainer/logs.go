package cricontainer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// The files of a container's streams, in stateDir.
const (
	fifoStdin  = "stdin"
	fifoStdout = "stdout"
	fifoStderr = "stderr"
	ownLog     = "output" // for Attach, when no log is wanted
	ownLogSize = 1 << 20  // bytes, twice
)

// logPath is where a container's log is kept, "" if it is not (contract
// 7.3.20). It stays below the pod's log directory: ErrInvalidArgument.
func logPath(pod *runtime.PodSandboxConfig, config *runtime.ContainerConfig) (string, error) {
	dir, name := pod.GetLogDirectory(), config.GetLogPath()
	if dir == "" || name == "" {
		return "", nil
	}
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("log directory %q is not absolute: %w", dir, errdefs.ErrInvalidArgument)
	}
	if !filepath.IsLocal(name) || filepath.Clean(name) == "." || len(name) > unix.PathMax || strings.ContainsRune(name, 0) {
		return "", fmt.Errorf("log path %.80q is not below the log directory: %w", name, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(dir, name), nil
}

// openLog opens a container's log, and makes it if need be. No link below the
// pod's log directory is followed.
func openLog(pod *cristate.Pod, c *cristate.Container) (*os.File, error) {
	dir := pod.Meta().Config.GetLogDirectory()
	name, err := filepath.Rel(dir, c.Meta().LogPath)
	if err != nil || !filepath.IsLocal(name) {
		return nil, fmt.Errorf("log %s is not below %s: %w", c.Meta().LogPath, dir, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("log directory: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("log directory: %w", err)
	}
	defer root.Close()
	if parent := filepath.Dir(name); parent != "." {
		if err := root.MkdirAll(parent, 0o755); err != nil {
			return nil, fmt.Errorf("log directory: %w", err)
		}
	}
	at, err := root.Open(".")
	if err != nil {
		return nil, fmt.Errorf("log directory: %w", err)
	}
	defer at.Close()
	fd, err := unix.Openat2(int(at.Fd()), name, &unix.OpenHow{Flags: unix.O_WRONLY | unix.O_APPEND | unix.O_CREAT | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Mode: 0o640, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return nil, fmt.Errorf("open log %s: %w", c.Meta().LogPath, err)
	}
	f := os.NewFile(uintptr(fd), c.Meta().LogPath)
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("log %s is not a file: %w", c.Meta().LogPath, errdefs.ErrInvalidArgument)
	}
	return f, nil
}

// Streams are the files through which a container's first process is reached.
type Streams struct {
	// Stdin is a FIFO, "" if the container has no standard input.
	Stdin string
	// Log has what it prints, in Kubernetes' form. It may be renamed at any time.
	Log string
}

// Streams returns the files that Attach works with. ErrNotFound.
func (s *Service) Streams(id string) (Streams, error) {
	c, err := s.Containers.Get(id)
	if err != nil {
		return Streams{}, err
	}
	m := c.Meta()
	out := Streams{Log: m.LogPath}
	if out.Log == "" {
		out.Log = filepath.Join(s.stateDir(m.ID), ownLog)
	}
	if m.Config.GetStdin() {
		paths, _ := s.fifos(m.ID)
		out.Stdin = paths[fifoStdin]
	}
	return out, nil
}

// openIO makes what a container's streams need, and says where they go. The
// shim writes the log: nothing passes through the daemon, and nothing is lost
// with it (promise P20). A shim that cannot gets FIFOs that are copied.
func (s *Service) openIO(ctx context.Context, pod *cristate.Pod, c *cristate.Container, rt container.Runtime) (task.IO, error) {
	m, dir := c.Meta(), s.stateDir(c.ID())
	io := task.IO{Terminal: m.Config.GetTty()}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return io, fmt.Errorf("streams: %w", err)
	}
	if m.LogPath != "" {
		f, err := openLog(pod, c)
		if err != nil {
			return io, err
		}
		f.Close()
	}
	if m.Config.GetStdin() {
		io.Stdin = filepath.Join(dir, fifoStdin)
		if err := mkfifo(io.Stdin); err != nil {
			return io, err
		}
	}
	if s.WritesLogs != nil && !s.WritesLogs(ctx, rt) {
		io.Stdout = filepath.Join(dir, fifoStdout)
		if !io.Terminal {
			io.Stderr = filepath.Join(dir, fifoStderr)
		}
		return io, s.startCopy(pod, c)
	}
	q := url.Values{"format": {"cri"}, "max-line": {strconv.Itoa(s.Config.MaxContainerLogLineSize)}}
	for key, n := range map[string]int64{"max-size": s.Config.MaxContainerLogSize, "max-files": int64(s.Config.MaxContainerLogFiles), "max-rate": s.Config.MaxContainerLogRate} {
		if n > 0 {
			q.Set(key, strconv.FormatInt(n, 10))
		}
	}
	path := m.LogPath
	if path == "" {
		path = filepath.Join(dir, ownLog)
		q.Set("max-size", strconv.Itoa(ownLogSize))
		q.Set("max-files", "2")
	}
	io.Stdout = (&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String()
	if !io.Terminal {
		io.Stderr = io.Stdout
	}
	return io, nil
}

func mkfifo(path string) error {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make FIFO %s: %w", path, err)
	}
	return nil
}

// ReopenLog makes a container's log anew after it was renamed; whoever writes
// it finds that the path names another file (contract 7.1.17). ErrNotFound;
// ErrFailedPrecondition if the container does not run.
func (s *Service) ReopenLog(ctx context.Context, id string) error {
	c, err := s.Containers.Get(id)
	if err != nil {
		return fmt.Errorf("reopen log: %w", err)
	}
	unlock, err := s.Containers.Lock(ctx, c.ID())
	if err != nil {
		return fmt.Errorf("reopen log: %w", err)
	}
	defer unlock()
	if st := c.Status().State(); st != runtime.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("reopen log of container %s: it is %s: %w", c.ID(), st, errdefs.ErrFailedPrecondition)
	}
	if c.Meta().LogPath == "" {
		return nil
	}
	pod := s.pod(c)
	if pod == nil {
		return fmt.Errorf("reopen log of container %s: its pod is gone: %w", c.ID(), errdefs.ErrFailedPrecondition)
	}
	f, err := openLog(pod, c)
	if err != nil {
		return fmt.Errorf("reopen log of container %s: %w", c.ID(), err)
	}
	s.mu.Lock()
	cp := s.copies[c.ID()]
	s.mu.Unlock()
	if cp != nil {
		cp.log.replace(f)
		return nil
	}
	return f.Close()
}

// copier writes the log of a container whose shim does not.
type copier struct {
	log   *criLog
	ends  []*os.File // the reading ends
	hold  []*os.File // writing ends, which keep the others from ending before the process is there
	stdin *os.File   // both ends of the input, one of hold
	done  sync.WaitGroup
	close sync.Once
}

// fifos are the paths of a container's streams by name: ours, or those that
// containerd has made if the container is of its time. left says that there are some.
func (s *Service) fifos(id string) (paths map[string]string, left bool) {
	dir := s.stateDir(id)
	paths = map[string]string{fifoStdin: filepath.Join(dir, fifoStdin), fifoStdout: filepath.Join(dir, fifoStdout), fifoStderr: filepath.Join(dir, fifoStderr)}
	if _, err := os.Lstat(paths[fifoStdout]); err == nil {
		return paths, true
	}
	dirs, err := filepath.Glob(filepath.Join(dir, "io", "*"))
	if err != nil {
		return paths, false // an id is no pattern
	}
	for _, d := range dirs {
		at := func(name string) string { return filepath.Join(d, id+"-"+name) }
		if _, err := os.Lstat(at(fifoStdout)); err != nil {
			continue
		}
		for name := range paths {
			paths[name] = at(name)
		}
		return paths, true
	}
	return paths, false
}

// startCopy copies a container's FIFOs into its log, from where the last
// copier stopped: what it had not read is in the FIFOs still.
func (s *Service) startCopy(pod *cristate.Pod, c *cristate.Container) (err error) {
	m, dir := c.Meta(), s.stateDir(c.ID())
	cp := &copier{}
	defer func() {
		if err != nil {
			cp.end()
		}
	}()
	l := &criLog{max: s.Config.MaxContainerLogLineSize}
	if m.LogPath != "" {
		if l.f, err = openLog(pod, c); err != nil {
			return err
		}
	} else {
		if l.f, err = os.OpenFile(filepath.Join(dir, ownLog), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600); err != nil {
			return err
		}
		l.limit = ownLogSize
	}
	cp.log = l
	paths, _ := s.fifos(c.ID())
	names := []string{fifoStdout, fifoStderr}
	if m.Config.GetTty() {
		names = names[:1]
	}
	for _, name := range names {
		path := paths[name]
		if err = mkfifo(path); err != nil {
			return err
		}
		// The reader first: it does not wait for a writer, the other way round would.
		for _, flag := range []int{unix.O_RDONLY, unix.O_WRONLY} {
			f, oerr := os.OpenFile(path, flag|unix.O_NONBLOCK, 0)
			if oerr != nil {
				return oerr
			}
			if flag == unix.O_RDONLY {
				cp.ends = append(cp.ends, f)
			} else {
				cp.hold = append(cp.hold, f)
			}
		}
	}
	if m.Config.GetStdin() {
		// A client that goes away does not end the container's input.
		f, oerr := os.OpenFile(paths[fifoStdin], unix.O_RDWR|unix.O_NONBLOCK, 0)
		if oerr != nil {
			return oerr
		}
		cp.hold, cp.stdin = append(cp.hold, f), f
	}
	for i, f := range cp.ends {
		cp.done.Go(func() { l.copy(names[i], f) })
	}
	s.mu.Lock()
	old := s.copies[c.ID()]
	s.copies[c.ID()] = cp
	s.mu.Unlock()
	if old != nil {
		old.end()
	}
	return nil
}

// EndInput lets go of a container's input, so that it ends with its last writer.
func (s *Service) EndInput(id container.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cp := s.copies[string(id)]; cp != nil && cp.stdin != nil {
		cp.stdin.Close()
	}
}

// drain bounds how long the output of an ended container is read that some
// other process may still write.
const drain = 2 * time.Second

// stopCopy copies what is left of a container's output and ends.
func (s *Service) stopCopy(ctx context.Context, id string) {
	s.mu.Lock()
	cp := s.copies[id]
	delete(s.copies, id)
	s.mu.Unlock()
	if cp == nil {
		return
	}
	for _, f := range cp.hold {
		f.Close()
	}
	read := make(chan struct{})
	go func() { cp.done.Wait(); close(read) }()
	wait := time.NewTimer(drain)
	defer wait.Stop()
	select {
	case <-read:
	case <-wait.C:
	case <-ctx.Done():
	}
	cp.end()
}

// end lets go of everything; what was not read stays in the FIFOs for as long
// as the shim has them open.
func (cp *copier) end() {
	cp.close.Do(func() {
		for _, f := range append(cp.hold, cp.ends...) {
			f.Close()
		}
		cp.done.Wait()
		if cp.log != nil {
			cp.log.replace(nil)
		}
	})
}

// criLog writes records as Kubernetes has them:
//
//	2026-01-02T15:04:05.000000006Z stdout F a whole line
//	2026-01-02T15:04:05.000000007Z stderr P a line so far
//
// Nothing is held back, so that nothing is lost with the daemon.
type criLog struct {
	max   int   // most text of a record in bytes, -1 is no limit
	limit int64 // size at which the file is begun anew, 0 is never

	mu   sync.Mutex // guards the file
	f    *os.File
	size int64
}

func (l *criLog) replace(f *os.File) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f != nil {
		l.f.Close()
	}
	l.f, l.size = f, 0
}

func (l *criLog) copy(stream string, from io.Reader) {
	buf := make([]byte, 32<<10)
	var out []byte
	for {
		n, err := from.Read(buf)
		if n > 0 {
			out = appendRecords(out[:0], time.Now(), stream, buf[:n], l.max)
			l.write(out)
		}
		if err != nil {
			return
		}
	}
}

// write never fails: a process must not block, nor its later output be lost,
// because a disk is full for a while.
func (l *criLog) write(b []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return
	}
	if l.limit > 0 && l.size+int64(len(b)) > l.limit {
		if l.f.Truncate(0) == nil {
			l.size = 0
		}
	}
	n, err := l.f.Write(b)
	if err != nil && n > 0 {
		// A cut record would make the next one unreadable.
		if end, serr := l.f.Seek(0, io.SeekEnd); serr == nil {
			_ = l.f.Truncate(end - int64(n))
		}
		n = 0
	}
	l.size += int64(n)
}

// appendRecords appends the records of text, none longer than max bytes.
func appendRecords(out []byte, at time.Time, stream string, text []byte, max int) []byte {
	for len(text) > 0 {
		line, tag, skip := text, "P", 0
		if i := bytes.IndexByte(text, '\n'); i >= 0 {
			line, tag, skip = text[:i], "F", 1
		}
		if max > 0 && len(line) > max {
			line, tag, skip = line[:max], "P", 0
		}
		out = at.UTC().AppendFormat(out, time.RFC3339Nano)
		out = append(append(append(append(out, ' '), stream...), ' '), tag...)
		out = append(append(append(out, ' '), line...), '\n')
		text = text[len(line)+skip:]
	}
	return out
}
