package native

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/snapshot/snapshottest"
	"github.com/gantryd/gantry/internal/lib/mountx"
)

// formatted mounts a fresh file system for the time of the test.
func formatted(t *testing.T, mkfs string, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs."+mkfs, "-q", image).CombinedOutput(); err != nil {
		t.Skipf("mkfs.%s: %v: %s", mkfs, err, out)
	}
	place := t.TempDir()
	if err := (mountx.Mount{Type: mkfs, Source: image, Options: []string{"loop"}}).Mount(place); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		if err := mountx.UnmountAll(place, 0); err != nil {
			t.Error(err)
		}
	})
	return place
}

// Where blocks can be shared, a copy has none of its own.
//
// contract: 3.2.2
func TestReflink(t *testing.T) {
	for _, mkfs := range []string{"xfs", "btrfs"} {
		t.Run(mkfs, func(t *testing.T) {
			root := formatted(t, mkfs, 512<<20)
			s := open(t, filepath.Join(root, "store"))
			if _, err := s.Prepare(t.Context(), "a", "", nil); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(s.Dir(1), "big"), bytes.Repeat([]byte("x"), 32<<20), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := s.Commit(t.Context(), "A", "a", snapshot.CommitOptions{}); err != nil {
				t.Fatal(err)
			}
			free := func() int64 {
				d, err := os.Open(root)
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				var st unix.Statfs_t
				if err := unix.Syncfs(int(d.Fd())); err != nil {
					t.Fatal(err)
				}
				if err := unix.Fstatfs(int(d.Fd()), &st); err != nil {
					t.Fatal(err)
				}
				return int64(st.Bfree) * st.Bsize
			}
			before := free()
			if _, err := s.Prepare(t.Context(), "b", "A", nil); err != nil {
				t.Fatal(err)
			}
			if took := before - free(); took > 4<<20 {
				t.Errorf("a copy of 32 MiB took %d bytes", took)
			}
		})
	}
	t.Run("suite on xfs", func(t *testing.T) {
		root := formatted(t, "xfs", 512<<20)
		snapshottest.Run(t, func(t *testing.T) snapshot.Store {
			dir, err := os.MkdirTemp(root, "s")
			if err != nil {
				t.Fatal(err)
			}
			return open(t, dir)
		}, snapshottest.Options{RealMounts: true, Usage: true})
	})
}
