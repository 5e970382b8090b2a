//go:build linux

package stdio

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// output is where the bytes of one stream go.
type output interface {
	Write(p []byte) (int, error)
	Name() string
	Close() error
}

// logFile keeps the lines of two streams in one file, as Kubernetes has them:
//
//	2026-01-02T15:04:05.000000006Z stdout F a whole line
//	2026-01-02T15:04:05.000000007Z stderr P what was written of a line so far
//
// The text of a stream's records, with a newline after each F, is to the byte
// what the process wrote. Nothing is held back, so nothing is lost with the
// shim and nothing costs memory while no output comes. What had to be dropped,
// because a disk was full or the process wrote faster than it may, is counted
// in a record of its own at the place where it is missing.
//
// When the file would exceed a size it becomes PATH.1, PATH.1 becomes PATH.2,
// and so on; the oldest goes. Somebody else may rotate it as well: when the
// path names another file, that one is written from the next record on. While
// it names none, the renamed file is, so that no byte is in neither.
type logFile struct {
	path string
	logOptions
	pool *sync.Pool
	log  *slog.Logger

	mu       sync.Mutex // guards the rest, and the streams
	f        *os.File
	dev, ino uint64 // f's
	size     int64
	open     []*logStream
	bad      bool // the last attempt went wrong, which was logged
	retry    *time.Timer
	credit   float64 // bytes that may be written now
	credited time.Time
	dry      bool // all of it was used
}

// logOptions are the query of a file:// address whose format is "cri".
type logOptions struct {
	max   int64 // size at which it is rotated, in bytes; 0 is never
	files int   // that are kept, with the current one
	line  int   // most text of one record, in bytes; what comes in one read if it is smaller
	rate  int64 // bytes of the file a second, measured over a second; 0 is any number
}

const (
	// Annotation tells in the answer to -info which log formats the shim writes
	// by itself, and FormatCRI is the only one.
	Annotation = "io.gantry.shim.log"
	FormatCRI  = "cri"

	// recordText is the most text of one record, in bytes, if nothing is said.
	recordText = 16 << 10
	// retryAfter is how soon the record about dropped bytes is tried again.
	retryAfter = time.Second
)

// logFormat reads the query of a file:// address. ok is false if the plain
// bytes are wanted.
func logFormat(uri string) (o logOptions, ok bool, err error) {
	u, err := url.Parse(uri)
	if err != nil {
		return o, false, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	q := u.Query()
	switch f := q.Get("format"); f {
	case "":
		return o, false, nil
	case FormatCRI:
	default:
		return o, false, fmt.Errorf("unknown log format %q: %w", f, errdefs.ErrInvalidArgument)
	}
	number := func(name string, otherwise, low, high int64) int64 {
		s := q.Get(name)
		if s == "" {
			return otherwise
		}
		n, perr := strconv.ParseInt(s, 10, 64)
		if perr != nil || n < low || n > high {
			err = fmt.Errorf("%s %q is no number from %d to %d: %w", name, s, low, high, errdefs.ErrInvalidArgument)
		}
		return n
	}
	o.max = number("max-size", 0, 0, 1<<62)
	o.files = int(number("max-files", 1, 1, 1000))
	o.line = int(number("max-line", recordText, -1<<30, 1<<30))
	o.rate = number("max-rate", 0, 0, 1<<40)
	if o.line <= 0 { // as the kubelet's setting has it
		o.line = 1 << 30
	}
	return o, true, err
}

func (o *Opener) openLog(path string, opts logOptions) (*logFile, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, err
	}
	l := &logFile{path: path, logOptions: opts, pool: &o.pool, log: o.log, credit: float64(opts.rate), credited: time.Now()}
	return l, l.reopen(os.O_CREATE)
}

// reopen opens the file that the path names, or makes one with O_CREATE. The
// one that was open stays if that is not possible. l.mu is held, or nobody else
// has l.
func (l *logFile) reopen(create int) error {
	// A pod's directory may be writable for its user: no link leads elsewhere,
	// and no FIFO holds up the container.
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|create|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err = unix.Fstat(int(f.Fd()), &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fmt.Errorf("no regular file: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		f.Close()
		return &os.PathError{Op: "open log", Path: l.path, Err: err}
	}
	if l.f != nil {
		l.f.Close()
	}
	l.f, l.dev, l.ino, l.size = f, st.Dev, st.Ino, st.Size
	return nil
}

// follow makes sure that the open file is the one to write to.
func (l *logFile) follow() (err error) {
	if l.f == nil { // a rotation went wrong half-way
		return l.reopen(os.O_CREATE)
	}
	for range 10 {
		var st unix.Stat_t
		err = unix.Lstat(l.path, &st)
		if err == nil && (st.Dev != l.dev || st.Ino != l.ino) {
			if err = l.reopen(0); errors.Is(err, os.ErrNotExist) {
				continue // renamed again meanwhile
			}
			return err
		}
		if err == nil {
			l.size = st.Size
			return nil
		}
		// Renamed, and the next one is not there yet. It is not made here: who
		// renamed it may still rename it back, over what was made.
		if ferr := unix.Fstat(int(l.f.Fd()), &st); ferr == nil && st.Nlink > 0 {
			l.size = st.Size
			return nil
		}
		if err = os.MkdirAll(filepath.Dir(l.path), 0o750); err != nil {
			return err
		}
		return l.reopen(os.O_CREATE)
	}
	return err
}

// stream returns the output for one stream, "stdout" or "stderr".
func (l *logFile) stream(name string) *logStream {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := &logStream{l: l, name: name}
	l.open = append(l.open, s)
	return s
}

// logStream writes the records of one stream. l.mu guards what changes.
type logStream struct {
	l    *logFile
	name string

	partial bool  // the last record in the file was the beginning of a line
	lost    int64 // bytes of the process that are missing, and not yet told so
	cause   string
}

func (s *logStream) Name() string { return s.l.path }

// Close closes the file when both streams are closed.
func (s *logStream) Close() error {
	l := s.l
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.open, s)
	if i < 0 {
		return nil
	}
	if s.lost > 0 {
		s.append(nil, 0, false)
	}
	if s.lost > 0 {
		l.log.Warn("output of a process was lost", "to", l.path, "stream", s.name, "bytes", s.lost, "cause", s.cause)
	}
	if l.open = slices.Delete(l.open, i, i+1); len(l.open) == 0 {
		if l.retry != nil {
			l.retry.Stop()
		}
		if l.f != nil {
			l.f.Close()
			l.f = nil
		}
	}
	return nil
}

// Write never fails: a process must not block, and its later output must not
// be lost, because a disk is full for a while. What cannot be written is
// dropped in whole records, and counted.
func (s *logStream) Write(p []byte) (int, error) {
	l := s.l
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Contains(l.open, s) {
		return len(p), nil
	}
	buf := l.pool.Get().(*[bufferSize]byte)
	defer l.pool.Put(buf)
	b, told, partial := buf[:0], int64(0), false
	flush := func() {
		if len(b) > 0 {
			s.append(b, told, partial)
		}
		b, told = buf[:0], 0
	}
	var stamp [64]byte
	now := time.Now()
	head := s.head(stamp[:0], now)
	for rest := p; len(rest) > 0; {
		text, tag, skip := rest, "P ", 0
		seen := rest[:min(len(rest), l.line+1)]
		if i := bytes.IndexByte(seen, '\n'); i >= 0 {
			text, tag, skip = rest[:i], "F ", 1
		}
		if len(text) > l.line {
			text = text[:l.line]
		}
		rest = rest[len(text)+skip:]
		size := len(head) + len(tag) + len(text) + 1
		if !l.allowed(now, size) {
			flush()
			s.drop(int64(len(text)+skip), "faster than "+strconv.FormatInt(l.rate, 10)+" bytes a second")
			continue
		}
		if len(b)+size > bufferSize {
			flush()
		}
		b = append(append(append(append(b, head...), tag...), text...), '\n')
		told, partial = told+int64(len(text)+skip), skip == 0
	}
	flush()
	return len(p), nil
}

func (s *logStream) head(b []byte, now time.Time) []byte {
	return append(append(append(now.UTC().AppendFormat(b, time.RFC3339Nano), ' '), s.name...), ' ')
}

// allowed takes size bytes of what may be written now.
func (l *logFile) allowed(now time.Time, size int) bool {
	if l.rate == 0 {
		return true
	}
	l.credit = min(float64(l.rate), l.credit+now.Sub(l.credited).Seconds()*float64(l.rate))
	l.credited = now
	// Once it is used up, nothing is written for a while: whole passages with
	// one gap are worth more than single lines between gaps.
	if l.dry = l.credit <= 0 || l.dry && l.credit < float64(l.rate)/2; l.dry {
		return false
	}
	l.credit -= float64(size) // it may be more than there is, once
	return true
}

// drop counts bytes that are not written.
func (s *logStream) drop(n int64, cause string) {
	s.lost, s.cause = s.lost+n, cause
	if s.l.retry == nil {
		s.l.retry = time.AfterFunc(retryAfter, s.l.tell)
	}
}

// tell writes what is missing, also when the process is silent now.
func (l *logFile) tell() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.retry = nil
	for _, s := range l.open {
		if s.lost > 0 && l.allowed(time.Now(), 0) {
			s.append(nil, 0, false)
		} else if s.lost > 0 {
			s.drop(0, s.cause)
		}
	}
}

// append writes whole records with text bytes of the process, after one about
// what was dropped before them. partial is whether the last of them begins a
// line that goes on.
func (s *logStream) append(b []byte, text int64, partial bool) {
	l := s.l
	if s.lost > 0 {
		now := time.Now()
		var note []byte
		if s.partial {
			note = append(s.head(note, now), "F \n"...)
		}
		note = fmt.Appendf(s.head(note, now), "F [gantry: %d bytes dropped: %s]\n", s.lost, s.cause)
		l.credit -= float64(len(note))
		b = append(note, b...)
	}
	err := l.write(b)
	if err != nil {
		cause := err
		for e := cause; e != nil; e = errors.Unwrap(e) {
			cause = e // the path is not for the log's readers
		}
		s.drop(text, cause.Error())
	} else {
		s.partial, s.lost = partial, 0
	}
	if err != nil && !l.bad {
		l.log.Warn("output of a process is lost", "to", l.path, "error", err)
	}
	l.bad = err != nil
}

func (l *logFile) write(b []byte) error {
	if err := l.follow(); err != nil {
		if l.f == nil {
			return err
		}
		if !l.bad { // better in the old file than nowhere
			l.log.Warn("the log's path names another file, which cannot be opened", "path", l.path, "error", err)
		}
	}
	if l.max > 0 && l.size > 0 && l.size+int64(len(b)) > l.max {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	n, err := l.f.Write(b)
	l.size += int64(n)
	if err != nil && n > 0 {
		// Half a record would spoil the next one.
		if terr := l.f.Truncate(l.size - int64(n)); terr == nil {
			l.size -= int64(n)
		}
	}
	return err
}

// rotate renames the files and begins a new one.
func (l *logFile) rotate() error {
	name := func(n int) string { return l.path + "." + strconv.Itoa(n) }
	if l.files == 1 {
		if err := os.Remove(l.path); err != nil && !os.IsNotExist(err) {
			return err
		}
	} else {
		for n := l.files - 1; n >= 1; n-- {
			from := name(n - 1)
			if n == 1 {
				from = l.path
			}
			if err := os.Rename(from, name(n)); err != nil && !os.IsNotExist(err) {
				return err
			}
		}
	}
	l.f.Close()
	l.f = nil
	return l.reopen(os.O_CREATE)
}
