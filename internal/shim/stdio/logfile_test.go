//go:build linux

package stdio

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/reaper"
)

// join puts the text of the records of all files together again, oldest first.
func join(t *testing.T, path string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for n := 1000; n >= 0; n-- {
		name := path
		if n > 0 {
			name = fmt.Sprintf("%s.%d", path, n)
		}
		b, err := os.ReadFile(name)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 0 && b[len(b)-1] != '\n' {
			t.Errorf("%s does not end with a whole record", name)
		}
		for line := range bytes.Lines(b) {
			f := strings.SplitN(strings.TrimSuffix(string(line), "\n"), " ", 4)
			if len(f) != 4 || f[2] != "F" && f[2] != "P" || len(f[3]) > bufferSize {
				t.Fatalf("%s: bad record %.80q", name, line)
			}
			if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
				t.Fatal(err)
			}
			out[f[1]] += f[3]
			if f[2] == "F" {
				out[f[1]] += "\n"
			}
		}
	}
	return out
}

// What a process writes is in the file to the byte, whatever its lines look
// like, over rotation, from both streams at once, and without a last newline.
//
// promise: P20, P21
func TestLogKeepsEveryByte(t *testing.T) {
	for _, c := range []struct {
		name string
		max  int64
	}{{"one file", 0}, {"rotated", 40 << 10}} {
		t.Run(c.name, func(t *testing.T) {
			o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
			path := filepath.Join(t.TempDir(), "a", "log")
			s, err := o.Open(t.Context(), logConfig(path, c.max, 1000))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			_, out, errf := s.Child()
			dup := func(f *os.File) *os.File {
				fd, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				return fd
			}
			writers := map[string]*os.File{"stdout": dup(out), "stderr": dup(errf)}
			if err := s.Started(nil); err != nil {
				t.Fatal(err)
			}
			want := map[string]*bytes.Buffer{"stdout": {}, "stderr": {}}
			var wg sync.WaitGroup
			for name, w := range writers {
				wg.Go(func() {
					defer w.Close()
					r := rand.New(rand.NewPCG(1, uint64(len(name))+uint64(name[3])))
					for i := range 400 {
						line := bytes.Repeat([]byte{byte('a' + i%26)}, []int{0, 1, 30, 4000, recordText, recordText + 1, 40000}[r.IntN(7)])
						if r.IntN(3) > 0 {
							line = append(line, '\n')
						}
						if i == 399 {
							line = []byte("without a newline")
						}
						want[name].Write(line)
						if _, err := w.Write(line); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			if !s.Drain(5*time.Second, 20*time.Second) {
				t.Fatal("output was not copied")
			}
			got := join(t, path)
			for name, w := range want {
				if got[name] != w.String() {
					t.Errorf("%s: %d bytes in, %d bytes out, or others", name, w.Len(), len(got[name]))
				}
			}
			_, err = os.Stat(path + ".1")
			if rotated := err == nil; rotated != (c.max > 0) {
				t.Errorf("rotated: %v", rotated)
			}
			for n := 0; c.max > 0 && n < 1000; n++ {
				info, err := os.Stat(fmt.Sprintf("%s.%d", path, n))
				if err == nil && info.Size() > c.max {
					t.Errorf("file %d has %d bytes", n, info.Size())
				}
			}
		})
	}
}

func logConfig(path string, maxSize int64, maxFiles int) Config {
	uri := fmt.Sprintf("file://%s?format=cri&max-size=%d&max-files=%d", path, maxSize, maxFiles)
	return Config{ID: "c", Namespace: "n", Stdout: uri, Stderr: uri}
}

// The files together never take more than they may.
//
// promise: P21
func TestLogIsBounded(t *testing.T) {
	for _, files := range []int{1, 3} {
		o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
		dir := t.TempDir()
		l, err := o.openLog(filepath.Join(dir, "log"), logOptions{max: 4096, files: files, line: recordText})
		if err != nil {
			t.Fatal(err)
		}
		w := l.stream("stdout")
		for i := range 2000 {
			fmt.Fprintf(w, "line %d\n", i)
		}
		w.Close()
		list, err := os.ReadDir(dir)
		if err != nil || len(list) != files {
			t.Fatalf("%d files, want %d: %v", len(list), files, err)
		}
		for _, e := range list {
			info, err := e.Info()
			if err != nil || info.Size() > 4096 || info.Mode().Perm()&0o007 != 0 {
				t.Errorf("%s: %v, %v", e.Name(), info, err)
			}
		}
		if got := join(t, l.path)["stdout"]; !strings.HasSuffix(got, "line 1998\nline 1999\n") {
			t.Errorf("the last lines are not there: %q", got[max(0, len(got)-40):])
		}
	}
}

var plain = logOptions{files: 1, line: recordText}

// A disk that is full for a while costs what was written then, no more, leaves
// no half record, and the log says how much is missing.
func TestLogSurvivesAWriteError(t *testing.T) {
	o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
	path := filepath.Join(t.TempDir(), "log")
	l, err := o.openLog(path, plain)
	if err != nil {
		t.Fatal(err)
	}
	w := l.stream("stdout")
	defer w.Close()
	io.WriteString(w, "before\n")
	good := l.f
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	l.f = full
	if n, err := io.WriteString(w, "lost\n"); n != 5 || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	l.f = good
	io.WriteString(w, "after\n")
	if got := join(t, path)["stdout"]; got != "before\n[gantry: 5 bytes dropped: no space left on device]\nafter\n" {
		t.Errorf("%q", got)
	}
}

func TestLogAddressIsChecked(t *testing.T) {
	o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
	for _, q := range []string{"format=xml", "format=cri&max-size=big", "format=cri&max-size=-1", "format=cri&max-files=0",
		"format=cri&max-rate=-1", "format=cri&max-line=x"} {
		if s, err := o.Open(t.Context(), Config{Stdout: "file://" + t.TempDir() + "/log?" + q}); err == nil {
			s.Close()
			t.Errorf("%s was taken", q)
		}
	}
}

// The kubelet renames the file, and then another one is made, by the daemon or
// again by the shim's side of the race: every byte is in one of them, in order.
//
// promise: P20
// contract: 7.3.17, 7.3.20, 13.29
func TestLogFollowsItsPath(t *testing.T) {
	for name, create := range map[string]func(path string) error{
		"made after a while": func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
			if err == nil {
				f.Close()
			}
			return err
		},
		"renamed into place": func(path string) error {
			if err := os.WriteFile(path+".next", nil, 0o640); err != nil {
				return err
			}
			return os.Rename(path+".next", path)
		},
		"put back": func(path string) error { return os.Rename(path+".1", path) },
	} {
		t.Run(name, func(t *testing.T) {
			o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
			path := filepath.Join(t.TempDir(), "log")
			l, err := o.openLog(path, plain)
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]*bytes.Buffer{"stdout": {}, "stderr": {}}
			done := make(chan struct{})
			var writers, storm sync.WaitGroup
			for name, text := range want {
				w := l.stream(name)
				writers.Go(func() {
					defer w.Close()
					for i := range 6_000 {
						text.Write(fmt.Appendf(nil, "%s %d\n", name, i)[:6+i%5])
						w.Write(fmt.Appendf(nil, "%s %d\n", name, i)[:6+i%5])
					}
				})
			}
			files := 0
			storm.Go(func() {
				for {
					select {
					case <-done:
						return
					default:
					}
					// The highest number is the oldest file, as join wants it.
					next := fmt.Sprintf("%s.%d", path, 1000-files)
					if name == "put back" {
						next = path + ".1"
					}
					if files++; files > 900 && name != "put back" {
						return
					}
					if err := os.Rename(path, next); err != nil {
						t.Error(err)
						return
					}
					if err := create(path); err != nil {
						t.Error(err)
						return
					}
				}
			})
			writers.Wait()
			close(done)
			storm.Wait()
			got := join(t, path)
			for name, w := range want {
				if got[name] != w.String() {
					t.Errorf("%s: %d bytes in, %d bytes out, or in another order, over %d files", name, w.Len(), len(got[name]), files)
				}
			}
			if files < 2 {
				t.Errorf("renamed %d times only", files)
			}
		})
	}
}

// A directory that was removed is made again; links and FIFOs are not followed
// and hold up nobody: the text stays in the file that is open.
//
// promise: P20
func TestLogPathIsHostile(t *testing.T) {
	o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
	dir := filepath.Join(t.TempDir(), "a")
	path := filepath.Join(dir, "log")
	l, err := o.openLog(path, plain)
	if err != nil {
		t.Fatal(err)
	}
	w := l.stream("stdout")
	defer w.Close()
	io.WriteString(w, "1\n")
	victim := filepath.Join(t.TempDir(), "victim")
	for i, swap := range []func() error{
		func() error { return os.Symlink(victim, path) },
		func() error { return unix.Mkfifo(path, 0o600) },
		func() error { return os.Mkdir(path, 0o700) },
	} {
		old := fmt.Sprintf("%s.%d", path, i)
		if err := os.Rename(path, old); err != nil {
			t.Fatal(err)
		}
		if err := swap(); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(w, "while %d\n", i)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(old, path); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(victim); err == nil {
		t.Error("a link was followed")
	}
	if got := join(t, path)["stdout"]; got != "1\nwhile 0\nwhile 1\nwhile 2\n" {
		t.Errorf("%q", got)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, "after\n")
	if got := join(t, path)["stdout"]; got != "after\n" {
		t.Errorf("%q", got)
	}
	for _, bad := range []func(string) error{func(p string) error { return os.Symlink(victim, p) }, func(p string) error { return unix.Mkfifo(p, 0o600) }} {
		p := filepath.Join(t.TempDir(), "log")
		if err := bad(p); err != nil {
			t.Fatal(err)
		}
		if l, err := o.openLog(p, plain); err == nil {
			l.f.Close()
			t.Error("it was opened")
		}
	}
}

// contract: 7.3.20, 13.29
func TestLogLines(t *testing.T) {
	long := strings.Repeat("x", 20_000)
	for _, c := range []struct{ query, in, want string }{
		{"", "a\n\nb\n", "F a|F |F b"},
		{"&max-line=3", "abc\nabcd\nabcdefgh", "F abc|P abc|F d|P abc|P def|P gh"},
		{"", long + "\n", "P " + long[:16384] + "|F " + long[16384:]},
		{"&max-line=-1", long + "\n", "F " + long},
		{"&max-line=0", long + "\n", "F " + long},
		{"&max-line=30000", long + long + "\n", "P " + (long + long)[:30000] + "|F " + (long + long)[30000:]},
	} {
		o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
		path := filepath.Join(t.TempDir(), "log")
		opts, ok, err := logFormat("file://" + path + "?format=cri" + c.query)
		if err != nil || !ok {
			t.Fatal(err)
		}
		l, err := o.openLog(path, opts)
		if err != nil {
			t.Fatal(err)
		}
		w := l.stream("stderr")
		io.WriteString(w, c.in)
		w.Close()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for line := range strings.Lines(string(b)) {
			_, rest, _ := strings.Cut(line, " stderr ")
			got = append(got, strings.TrimSuffix(rest, "\n"))
		}
		if g := strings.Join(got, "|"); g != c.want {
			t.Errorf("%s: %.300q", c.query, g)
		}
	}
}

// kept adds up what a log has of a stream's lines and what it says is missing.
func kept(t *testing.T, path, stream string) (lines []string, dropped int64) {
	t.Helper()
	for line := range strings.Lines(join(t, path)[stream]) {
		var n int64
		if c, _ := fmt.Sscanf(line, "[gantry: %d bytes dropped: ", &n); c == 1 {
			dropped += n
		} else {
			lines = append(lines, line)
		}
	}
	return lines, dropped
}

// A process that writes too fast is cut to its rate; the log says what is
// missing, to the byte, and also when nothing comes any more.
//
// promise: P20, P21
func TestLogRate(t *testing.T) {
	o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
	path := filepath.Join(t.TempDir(), "log")
	const rate = 50_000
	l, err := o.openLog(path, logOptions{files: 1, line: recordText, rate: rate})
	if err != nil {
		t.Fatal(err)
	}
	w := l.stream("stdout")
	defer w.Close()
	began, in := time.Now(), int64(0)
	for i := 0; time.Since(began) < 1500*time.Millisecond; i++ {
		n, _ := fmt.Fprintf(w, "line %d of a process that never stops\n", i)
		in += int64(n)
	}
	waitFor(t, "the record about what is missing", func() bool {
		lines, dropped := kept(t, path, "stdout")
		return int64(len(strings.Join(lines, "")))+dropped == in
	})
	info, err := os.Stat(path)
	if most := rate * (time.Since(began).Seconds() + 1.1); err != nil || float64(info.Size()) > most {
		t.Errorf("%d bytes in %v, %v", info.Size(), time.Since(began), err)
	}
	if info.Size() < rate {
		t.Errorf("%d bytes only", info.Size())
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no end of the wait for " + what)
		}
	}
}

// promise: P20, P21
func TestLogOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skip("mount tmpfs:", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
	path := filepath.Join(dir, "log")
	l, err := o.openLog(path, plain)
	if err != nil {
		t.Fatal(err)
	}
	w := l.stream("stdout")
	defer w.Close()
	in := int64(0)
	for i := range 20_000 {
		n, _ := fmt.Fprintf(w, "line %d that is too much for this disk\n", i)
		in += int64(n)
	}
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=10m"); err != nil {
		t.Fatal(err)
	}
	// Without another word from the process.
	waitFor(t, "the record about what is missing", func() bool {
		lines, dropped := kept(t, path, "stdout")
		return dropped > 0 && int64(len(strings.Join(lines, "")))+dropped == in
	})
}
