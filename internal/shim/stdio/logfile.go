//go:build linux

package stdio

import (
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
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
// shim and nothing costs memory while no output comes.
//
// When the file would exceed a size it becomes PATH.1, PATH.1 becomes PATH.2,
// and so on; the oldest goes.
type logFile struct {
	path  string
	max   int64 // size at which it is rotated, in bytes; 0 is never
	files int   // that are kept, with the current one
	pool  *sync.Pool
	log   *slog.Logger

	mu   sync.Mutex // guards the rest
	f    *os.File
	size int64
	open int // streams
	bad  bool
}

// recordText is the most text of one record, in bytes.
const recordText = 16 << 10

// logFormat reads the query of a file:// address. ok is false if the plain
// bytes are wanted.
func logFormat(uri string) (maxSize int64, maxFiles int, ok bool, err error) {
	u, err := url.Parse(uri)
	if err != nil {
		return 0, 0, false, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	q := u.Query()
	switch f := q.Get("format"); f {
	case "":
		return 0, 0, false, nil
	case "cri":
	default:
		return 0, 0, false, fmt.Errorf("unknown log format %q: %w", f, errdefs.ErrInvalidArgument)
	}
	maxFiles = 1
	if s := q.Get("max-size"); s != "" {
		if maxSize, err = strconv.ParseInt(s, 10, 64); err != nil || maxSize < 0 {
			return 0, 0, false, fmt.Errorf("max-size %q is no number of bytes: %w", s, errdefs.ErrInvalidArgument)
		}
	}
	if s := q.Get("max-files"); s != "" {
		if maxFiles, err = strconv.Atoi(s); err != nil || maxFiles < 1 || maxFiles > 1000 {
			return 0, 0, false, fmt.Errorf("max-files %q is no number from 1 to 1000: %w", s, errdefs.ErrInvalidArgument)
		}
	}
	return maxSize, maxFiles, true, nil
}

func (o *Opener) openLog(path string, maxSize int64, maxFiles int) (*logFile, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, err
	}
	l := &logFile{path: path, max: maxSize, files: maxFiles, pool: &o.pool, log: o.log}
	return l, l.reopen()
}

// reopen opens the current file. l.mu is held, or nobody else has l.
func (l *logFile) reopen() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size = f, info.Size()
	return nil
}

// stream returns the output for one stream, "stdout" or "stderr".
func (l *logFile) stream(name string) *logStream {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open++
	return &logStream{l: l, name: name}
}

// logStream writes the records of one stream.
type logStream struct {
	l    *logFile
	name string
	once sync.Once
}

func (s *logStream) Name() string { return s.l.path }

// Close closes the file when both streams are closed.
func (s *logStream) Close() error {
	s.once.Do(func() {
		s.l.mu.Lock()
		defer s.l.mu.Unlock()
		if s.l.open--; s.l.open == 0 && s.l.f != nil {
			s.l.f.Close()
			s.l.f = nil
		}
	})
	return nil
}

// Write never fails: a process must not block, and its later output must not
// be lost, because a disk is full for a while. What cannot be written is
// dropped in whole records, and the shim's log says so once.
func (s *logStream) Write(p []byte) (int, error) {
	buf := s.l.pool.Get().(*[bufferSize]byte)
	defer s.l.pool.Put(buf)
	b := buf[:0]
	var stamp [64]byte
	head := append(time.Now().UTC().AppendFormat(stamp[:0], time.RFC3339Nano), ' ')
	head = append(append(head, s.name...), ' ')
	for rest := p; len(rest) > 0; {
		text, tag, skip := rest, "P ", 0
		for i, c := range rest[:min(len(rest), recordText+1)] {
			if c == '\n' {
				text, tag, skip = rest[:i], "F ", 1
				break
			}
		}
		if len(text) > recordText {
			text = text[:recordText]
		}
		if len(b)+len(head)+len(tag)+len(text)+1 > bufferSize {
			s.l.append(b)
			b = buf[:0]
		}
		b = append(append(append(append(b, head...), tag...), text...), '\n')
		rest = rest[len(text)+skip:]
	}
	s.l.append(b)
	return len(p), nil
}

// append writes whole records to the file, after rotating it if need be.
func (l *logFile) append(b []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(b) == 0 || l.open == 0 {
		return
	}
	err := l.write(b)
	if err != nil && !l.bad {
		l.log.Warn("output of a process is lost", "to", l.path, "error", err)
	}
	l.bad = err != nil
}

func (l *logFile) write(b []byte) error {
	if l.f == nil { // a rotation went wrong half-way
		if err := l.reopen(); err != nil {
			return err
		}
	}
	if l.max > 0 && l.size > 0 && l.size+int64(len(b)) > l.max {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	n, err := l.f.Write(b)
	if err != nil {
		// Half a record would spoil the next one.
		if terr := l.f.Truncate(l.size); terr != nil {
			l.size += int64(n)
		}
		return err
	}
	l.size += int64(n)
	return nil
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
	return l.reopen()
}
