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
			if len(f) != 4 || f[2] != "F" && f[2] != "P" || len(f[3]) > recordText {
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
		l, err := o.openLog(filepath.Join(dir, "log"), 4096, files)
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

// A disk that is full for a while costs what was written then, no more, and
// leaves no half record.
func TestLogSurvivesAWriteError(t *testing.T) {
	o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
	path := filepath.Join(t.TempDir(), "log")
	l, err := o.openLog(path, 0, 1)
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
	l.size = int64(len("x")) // whatever it believes, what follows is kept
	io.WriteString(w, "after\n")
	if got := join(t, path)["stdout"]; got != "before\nafter\n" {
		t.Errorf("%q", got)
	}
}

func TestLogAddressIsChecked(t *testing.T) {
	o := NewOpener(reaper.New(), slog.New(slog.DiscardHandler))
	for _, q := range []string{"format=xml", "format=cri&max-size=big", "format=cri&max-size=-1", "format=cri&max-files=0"} {
		if s, err := o.Open(t.Context(), Config{Stdout: "file://" + t.TempDir() + "/log?" + q}); err == nil {
			s.Close()
			t.Errorf("%s was taken", q)
		}
	}
}
