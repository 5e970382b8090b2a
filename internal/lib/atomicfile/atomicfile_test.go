package atomicfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/gantryd/gantry/internal/lib/fsx"
)

// After a power cut before any operation there is the old file or the new one,
// and the new one for sure once Write had returned.
func TestPowerCut(t *testing.T) {
	for k, done := 1, false; !done; k++ {
		m := fsx.NewMem()
		if err := fsx.MkdirAll(m, "dir", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := WriteFS(m, "dir/file", []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		m.CutBefore(k)
		err := WriteFS(m, "dir/file", []byte("the new one"), 0o600)
		done = err == nil
		for keep := fsx.KeepNothing; keep <= fsx.KeepSome; keep++ {
			for seed := range uint64(6) {
				r := m.Restart(keep, seed)
				got, rerr := fsx.ReadFile(r, "dir/file", 100)
				if rerr != nil || string(got) != "the new one" && (done || string(got) != "old") {
					t.Errorf("cut before operation %d, keep %d: %q, %v", k, keep, got, rerr)
				}
				if err := WriteFS(r, "dir/file", []byte("later"), 0o600); err != nil {
					t.Errorf("cut before operation %d, keep %d: the next Write: %v", k, keep, err)
				}
			}
		}
	}
}

func TestErrors(t *testing.T) {
	for k, failed := 1, true; failed; k++ {
		m := fsx.NewMem()
		if err := WriteFS(m, "file", []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		m.FailAt(k, syscall.ENOSPC)
		err := WriteFS(m, "file", []byte("new"), 0o600)
		failed = m.Ops() >= k
		if failed != errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("failure of operation %d: %v", k, err)
		}
		got, rerr := fsx.ReadFile(m, "file", 100)
		if rerr != nil || len(got) != 3 {
			t.Fatalf("failure of operation %d: %q, %v", k, got, rerr)
		}
		if entries, err := m.ReadDir("."); err != nil || len(entries) != 1 {
			t.Fatalf("failure of operation %d leaves %v, %v", k, entries, err)
		}
	}
}

func TestWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for i, perm := range []os.FileMode{0o644, 0o600, 0o666} {
		if err := Write(path, fmt.Append(nil, i), perm); err != nil {
			t.Fatal(err)
		}
		fi, err := os.Stat(path)
		if err != nil || fi.Mode() != perm {
			t.Fatalf("mode is %v, want %v: %v", fi.Mode(), perm, err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != fmt.Sprint(i) {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if err := Write(filepath.Join(path, "below a file"), nil, 0o644); !errors.Is(err, syscall.ENOTDIR) {
		t.Fatalf("%v", err)
	}
}
