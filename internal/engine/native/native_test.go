package native

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/snapshot/snapshottest"
)

func open(t *testing.T, root string) *Store {
	t.Helper()
	s, err := Open(root, Config{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer s.Close()
		if err := s.Cleanup(context.Background()); err != nil {
			t.Error(err)
		}
		for _, p := range s.Check(context.Background()) {
			t.Errorf("check: %s", p)
		}
	})
	return s
}

// contract: 3.1.1, 3.1.6, 3.2.2, 1.3.31
func TestConformance(t *testing.T) {
	real := os.Geteuid() == 0 && runtime.GOOS == "linux"
	snapshottest.Run(t, func(t *testing.T) snapshot.Store { return open(t, t.TempDir()) },
		snapshottest.Options{RealMounts: real, Usage: real})
}

// contract: 3.2.2
func TestMounts(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("these are Linux's mounts")
	}
	root := t.TempDir()
	s := open(t, root)
	if _, err := s.Prepare(t.Context(), "a", "", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), "A", "a", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ key, parent, mode, dir string }{
		{"v", "A", "ro", "1"}, {"b", "A", "rw", "3"}, {"n", "", "rw", "4"}, {"e", "", "ro", "5"},
	} {
		prepare := s.Prepare
		if c.mode == "ro" {
			prepare = s.View
		}
		m, err := prepare(t.Context(), c.key, c.parent, nil)
		if err != nil {
			t.Fatal(err)
		}
		want := filepath.Join(root, "snapshots", c.dir)
		if len(m) != 1 || m[0].Type != "bind" || m[0].Source != want || !slices.Equal(m[0].Options, []string{"rbind", c.mode}) {
			t.Errorf("mounts of %s are %v, expected %s of %s", c.key, m, c.mode, want)
		}
	}
}

// contract: 3.2.2
func TestRootPath(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(filepath.Join(dir, "unused"), Config{RootPath: filepath.Join(dir, "used")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := os.Stat(filepath.Join(dir, "used", "metadata.db")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "unused")); err == nil {
		t.Error("the plugin's own directory was made")
	}
}
