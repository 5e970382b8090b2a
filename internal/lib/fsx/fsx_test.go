package fsx

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
)

// Both trees must answer alike, or what is tested on Mem is not what runs.
func TestTreesAgree(t *testing.T) {
	for name, f := range map[string]FS{"dir": Dir(t.TempDir()), "mem": NewMem()} {
		t.Run(name, func(t *testing.T) {
			want := func(err error, class error) {
				t.Helper()
				if !errors.Is(err, class) {
					t.Fatalf("got %v, want %v", err, class)
				}
			}
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			read := func(name, text string) {
				t.Helper()
				if got, err := ReadFile(f, name, 100); err != nil || string(got) != text {
					t.Fatalf("%s is %q, %v", name, got, err)
				}
			}
			must(MkdirAll(f, "a/b/c", 0o755))
			must(MkdirAll(f, "a/b/c", 0o755))
			want(f.Mkdir("a", 0o755), fs.ErrExist)
			want(f.Mkdir("x/y", 0o755), fs.ErrNotExist)
			want(f.SyncDir("x"), fs.ErrNotExist)
			must(WriteFile(f, "a/one", []byte("longer text"), 0o644))
			must(WriteFile(f, "a/one", []byte("text"), 0o644))
			read("a/one", "text")
			_, err := ReadFile(f, "a/one", 3)
			want(err, syscall.EFBIG)
			_, err = ReadFile(f, "a/none", 3)
			want(err, fs.ErrNotExist)
			_, err = f.OpenFile("a/one", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
			want(err, fs.ErrExist)
			_, err = f.OpenFile("a/one/two", os.O_RDONLY, 0)
			want(err, syscall.ENOTDIR)
			_, err = f.OpenFile("a", os.O_RDWR, 0)
			want(err, syscall.EISDIR)
			_, err = f.ReadDir("a/one")
			want(err, syscall.ENOTDIR)
			want(f.Remove("a"), syscall.ENOTEMPTY)
			want(f.Remove("none"), fs.ErrNotExist)
			want(f.Rename("none", "some"), fs.ErrNotExist)

			must(f.Rename("a/one", "a/b/two"))
			must(WriteFile(f, "a/b/three", []byte("3"), 0o644))
			must(f.Rename("a/b/three", "a/b/two")) // replaces
			read("a/b/two", "3")
			entries, err := f.ReadDir("a/b")
			must(err)
			var names []string
			for _, e := range entries {
				names = append(names, fmt.Sprint(e.Name(), e.IsDir()))
			}
			if got := strings.Join(names, " "); got != "ctrue twofalse" {
				t.Fatalf("entries: %s", got)
			}

			w, err := f.OpenFile("a/b/two", os.O_RDWR, 0)
			must(err)
			_, err = w.WriteAt([]byte("end"), 5)
			must(err)
			read("a/b/two", "3\x00\x00\x00\x00end")
			must(w.Truncate(2))
			must(w.Truncate(4))
			read("a/b/two", "3\x00\x00\x00")
			p := make([]byte, 10)
			if n, err := w.ReadAt(p, 1); n != 3 || err != io.EOF {
				t.Fatalf("ReadAt over the end: %d, %v", n, err)
			}
			if _, err := w.ReadAt(p, -1); err == nil || err == io.EOF {
				t.Fatalf("ReadAt before the start: %v", err)
			}
			must(w.Chmod(0o444))
			fi, err := w.Stat()
			must(err)
			if fi.Mode() != 0o444 || fi.Size() != 4 || fi.IsDir() || Links(fi) != 1 {
				t.Fatalf("Stat: %v, %d links", fi, Links(fi))
			}
			must(f.Remove("a/b/two"))
			if n, err := w.ReadAt(p, 0); n != 4 || err != io.EOF { // an open file lives on
				t.Fatalf("ReadAt of a removed file: %d, %v", n, err)
			}
			must(w.Sync())
			must(w.Close())
			want(w.Close(), fs.ErrClosed)
			if _, err := w.ReadAt(p, 0); !errors.Is(err, fs.ErrClosed) {
				t.Fatalf("ReadAt of a closed file: %v", err)
			}
			must(RemoveAll(f, "a"))
			must(RemoveAll(f, "a"))
			_, err = f.Stat("a")
			want(err, fs.ErrNotExist)
			must(f.SyncDir("."))
		})
	}
}

// What Mem lets survive is what the tests of engines stand on.
func TestPowerCut(t *testing.T) {
	m := NewMem()
	write := func(name, text string, sync bool) {
		t.Helper()
		w, err := m.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
		if err == nil {
			_, err = w.WriteAt([]byte(text), 0)
		}
		if err == nil && sync {
			err = w.Sync()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write("synced, named", "11", true)
	write("named", "22", false)
	if err := m.SyncDir("."); err != nil {
		t.Fatal(err)
	}
	write("synced", "33", true)
	write("nothing", "44", false)
	for keep, want := range map[Keep]string{
		KeepNothing: "named= synced, named=11 ",
		KeepNames:   "named= nothing= synced=33 synced, named=11 ",
		KeepData:    "named=22 synced, named=11 ",
		KeepAll:     "named=22 nothing=44 synced=33 synced, named=11 ",
	} {
		r := m.Restart(keep, 0)
		entries, err := r.ReadDir(".")
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, e := range entries {
			data, err := ReadFile(r, e.Name(), 10)
			if err != nil {
				t.Fatal(err)
			}
			got += e.Name() + "=" + string(data) + " "
		}
		if got != want {
			t.Errorf("keep %d: %q, want %q", keep, got, want)
		}
	}

	m.CutBefore(2)
	if err := m.Mkdir("d", 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Mkdir("e", 0o755); !errors.Is(err, ErrCut) {
			t.Fatalf("after the cut: %v", err)
		}
	}
	if _, err := m.Stat("d"); !errors.Is(err, ErrCut) {
		t.Fatalf("Stat after the cut: %v", err)
	}
}

// A sync that failed once makes liars of those after it.
func TestFailedSyncLosesPages(t *testing.T) {
	m := NewMem()
	w, err := m.OpenFile("f", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	m.FailAt(2, syscall.EIO)
	if _, err := w.WriteAt([]byte("lost"), 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("Sync: %v", err)
	}
	if err := errors.Join(w.Sync(), m.SyncDir(".")); err != nil {
		t.Fatal(err)
	}
	for _, keep := range []Keep{KeepNothing, KeepAll} {
		if data, err := ReadFile(m.Restart(keep, 0), "f", 10); err != nil || len(data) != 0 {
			t.Fatalf("keep %d: %q, %v", keep, data, err)
		}
	}
	if err := w.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteAt([]byte("anew"), 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Sync(); err != nil {
		t.Fatal(err)
	}
	if data, err := ReadFile(m.Restart(KeepNothing, 0), "f", 10); err != nil || string(data) != "anew" {
		t.Fatalf("written anew: %q, %v", data, err)
	}
}
