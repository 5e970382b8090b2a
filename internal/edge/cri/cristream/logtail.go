//go:build linux

package cristream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
)

// How often a log is looked at: soon after something was read or typed, then
// less and less often.
const (
	lookSoon = 2 * time.Millisecond
	lookLate = 50 * time.Millisecond
	// settle is how long after the end of a container its last output may come.
	settle = 100 * time.Millisecond
	// rotations is how many numbered files are looked through for the one that
	// was read last.
	rotations = 16
)

// logTail reads a file in Kubernetes' log format from its present end on, in
// which a shim writes records (see internal/shim/stdio/logfile.go):
//
//	2026-01-02T15:04:05.000000006Z stdout F a whole line
//	2026-01-02T15:04:05.000000007Z stderr P a part of one
//
// It goes on in the next file when this one has been renamed or removed.
type logTail struct {
	path string
	f    *os.File // nil while there is none
	at   int64    // offset in f
	buf  [32 << 10]byte

	head []byte // what is known of the beginning of a record
	to   io.Writer
	full bool // the record ends its line
}

// maxHead is longer than the beginning of any record. A line without one is
// passed over.
const maxHead = 64

// openLog opens the log at its end; path may be "" or name a file that is
// still to come.
func openLog(path string) (*logTail, error) {
	l := &logTail{path: path}
	if path == "" {
		return l, nil
	}
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("follow its log: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("follow its log: %w", err)
	}
	if !info.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("follow its log: %s is not a file", path)
	}
	l.f, l.at = f, info.Size()
	return l, nil
}

func (l *logTail) close() {
	if l.f != nil {
		l.f.Close()
	}
}

// follow copies until ctx ends, a writer fails, or, a moment after gone was
// closed, there is no more. A token in wake says that output is expected.
func (l *logTail) follow(ctx context.Context, gone, wake <-chan struct{}, stdout, stderr io.Writer) error {
	pause := lookSoon
	stale := false // the file has been replaced; it was read to its end before
	var over time.Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		n, err := l.read(stdout, stderr)
		if err != nil {
			return err
		}
		switch {
		case n > 0:
			pause, stale = lookSoon, false
			over = time.Time{}
		case l.path != "":
			next, err := l.next(stale)
			if err != nil {
				return err
			}
			stale = next
		}
		if n == 0 && gone == nil {
			if over.IsZero() {
				over = time.Now().Add(settle)
			}
			if time.Now().After(over) {
				return nil
			}
		}
		if n == len(l.buf) {
			if err := ctx.Err(); err != nil {
				return err
			}
			continue
		}
		timer.Reset(pause)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-gone:
			gone, pause = nil, lookSoon
		case <-wake:
			pause = lookSoon
		case <-timer.C:
			pause = min(pause*3/2, lookLate)
		}
	}
}

// read passes one piece of the file on and returns its length.
func (l *logTail) read(stdout, stderr io.Writer) (int, error) {
	if l.f == nil {
		return 0, nil
	}
	n, err := l.f.ReadAt(l.buf[:], l.at)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("read its log: %w", err)
	}
	if n == 0 {
		info, err := l.f.Stat()
		if err != nil {
			return 0, fmt.Errorf("read its log: %w", err)
		}
		if info.Size() < l.at { // it was cut: from its beginning again
			l.at, l.head, l.to = 0, l.head[:0], nil
		}
		return 0, nil
	}
	l.at += int64(n)
	return n, l.pass(l.buf[:n], stdout, stderr)
}

// pass takes records apart, wherever b begins and ends.
func (l *logTail) pass(b []byte, stdout, stderr io.Writer) error {
	for len(b) > 0 {
		if l.to == nil {
			i := bytes.IndexByte(b, '\n')
			room := b[:min(len(b), maxHead-len(l.head))]
			l.head = append(l.head, room...)
			used, to, full, ok := parseHead(l.head, stdout, stderr)
			switch {
			case ok:
				b = b[len(room)-(len(l.head)-used):]
				l.to, l.full = to, full
			case i >= 0 && i < len(room): // a line that is no record
				b, l.head = b[i+1:], l.head[:0]
				continue
			case len(l.head) < maxHead:
				return nil
			default:
				b = b[len(room):]
				l.to, l.full = io.Discard, false
			}
			l.head = l.head[:0]
		}
		text, rest, whole := bytes.Cut(b, []byte{'\n'})
		if len(text) > 0 {
			if _, err := l.to.Write(text); err != nil {
				return err
			}
		}
		if whole {
			if l.full {
				if _, err := l.to.Write([]byte{'\n'}); err != nil {
					return err
				}
			}
			l.to = nil
		}
		b = rest
	}
	return nil
}

// parseHead reads "TIME STREAM TAG " at the beginning of b.
func parseHead(b []byte, stdout, stderr io.Writer) (used int, to io.Writer, full, ok bool) {
	stamp, rest, _ := bytes.Cut(b, []byte{' '})
	stream, rest, _ := bytes.Cut(rest, []byte{' '})
	tag, _, ok := bytes.Cut(rest, []byte{' '})
	if !ok || bytes.IndexByte(b[:len(stamp)+len(stream)+len(tag)+2], '\n') >= 0 {
		return 0, nil, false, false
	}
	switch string(stream) {
	case "stdout":
		to = stdout
	case "stderr":
		to = stderr
	default:
		return 0, nil, false, false
	}
	// A tag may have more than the one letter, after a colon.
	kind, _, _ := bytes.Cut(tag, []byte{':'})
	return len(stamp) + len(stream) + len(tag) + 3, to, string(kind) != "P", true
}

// next goes on to the file that has taken the place of this one. It is called
// at its end; what was written in between is read first, so the change needs a
// second call, with stale as the first has returned it.
func (l *logTail) next(stale bool) (bool, error) {
	now, err := os.Stat(l.path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("follow its log: %w", err)
	}
	path := l.path
	if l.f != nil {
		cur, err := l.f.Stat()
		if err != nil {
			return false, fmt.Errorf("follow its log: %w", err)
		}
		if os.SameFile(now, cur) {
			return false, nil
		}
		if !stale {
			return true, nil
		}
		// It may be some numbers behind.
		for n := 2; n < rotations; n++ {
			if old, err := os.Stat(l.path + "." + strconv.Itoa(n)); err == nil && os.SameFile(old, cur) {
				path = l.path + "." + strconv.Itoa(n-1)
				break
			}
		}
	}
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return stale, nil // it moves on just now
	}
	if err != nil {
		return false, fmt.Errorf("follow its log: %w", err)
	}
	l.close()
	l.f, l.at, l.head, l.to = f, 0, l.head[:0], nil
	return false, nil
}
