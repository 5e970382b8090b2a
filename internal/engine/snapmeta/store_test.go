package snapmeta

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/snapshot"
)

func openStore(t *testing.T, opts Options) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), opts)
	must(t, err)
	t.Cleanup(func() {
		must(t, s.Cleanup(context.Background()))
		for _, p := range s.Check(context.Background()) {
			t.Errorf("check: %s", p)
		}
		must(t, s.Close())
	})
	return s
}

// files is a Build of n files.
func files(n int) Build {
	return func(_ context.Context, dir string, _ Record) (bool, error) {
		for i := range n {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte("data"), 0o600); err != nil {
				return false, err
			}
		}
		return true, nil
	}
}

// A commit asks for a sync of the whole file system only if it has many files
// and nobody synced them, and commits of the moment share one. If the sync
// fails, nothing is committed.
//
// promise: P3
func TestCommitSyncs(t *testing.T) {
	s := openStore(t, Options{})
	ctx := t.Context()
	syncs := 0
	boom := errors.New("boom")
	var fail error
	s.all.do = func() error {
		syncs++
		return fail
	}
	prepare := func(key string, n int) {
		t.Helper()
		_, err := s.Make(ctx, snapshot.KindActive, key, "", nil, files(n))
		must(t, err)
	}
	for _, c := range []struct {
		key  string
		n    int
		opts snapshot.CommitOptions
		want int
	}{
		{"few", syncOneByOne - 1, snapshot.CommitOptions{}, 0},
		{"many", syncOneByOne, snapshot.CommitOptions{}, 1},
		{"synced", syncOneByOne, snapshot.CommitOptions{Synced: true}, 0},
	} {
		prepare(c.key, c.n)
		syncs = 0
		must(t, s.Commit(ctx, c.key+"!", c.key, c.opts))
		if syncs != c.want {
			t.Errorf("%s: %d syncs of the file system, expected %d", c.key, syncs, c.want)
		}
	}

	prepare("lost", syncOneByOne)
	fail = boom
	if err := s.Commit(ctx, "lost!", "lost", snapshot.CommitOptions{}); !errors.Is(err, boom) {
		t.Errorf("commit without a sync: %v", err)
	}
	if i, err := s.Stat(ctx, "lost"); err != nil || i.Kind != snapshot.KindActive {
		t.Errorf("after that it is %+v (%v)", i, err)
	}
	// Prepare copies durably too.
	if _, err := s.Make(ctx, snapshot.KindActive, "copied", "", nil, files(syncOneByOne)); !errors.Is(err, boom) {
		t.Errorf("a copy without a sync: %v", err)
	}
	if _, err := s.Stat(ctx, "copied"); !errdefs.IsNotFound(err) {
		t.Errorf("after that it is there (%v)", err)
	}
	fail = nil

	const n = 8
	for i := range n {
		prepare(fmt.Sprint("c", i), syncOneByOne)
	}
	syncs = 0
	enter, leave := make(chan struct{}), make(chan struct{})
	s.all.do = func() error {
		if syncs++; syncs == 1 {
			close(enter)
			<-leave
		}
		return nil
	}
	var wg sync.WaitGroup
	commit := func(i int) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := s.Commit(ctx, fmt.Sprint("C", i), fmt.Sprint("c", i), snapshot.CommitOptions{}); err != nil {
				t.Error(err)
			}
		}()
	}
	commit(0)
	<-enter
	for i := 1; i < n; i++ {
		commit(i)
	}
	close(leave)
	wg.Wait()
	if syncs < 2 || syncs > n {
		t.Errorf("%d commits took %d syncs", n, syncs)
	}
}

// A build that fails leaves nothing, and its ID is not used again.
func TestBuildFails(t *testing.T) {
	s := openStore(t, Options{})
	boom := errors.New("boom")
	var dir string
	_, err := s.Make(t.Context(), snapshot.KindActive, "a", "", nil, func(ctx context.Context, d string, plan Record) (bool, error) {
		dir = d
		_, err := files(3)(ctx, d, plan)
		return false, errors.Join(err, boom)
	})
	if !errors.Is(err, boom) {
		t.Errorf("failed build: %v", err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left (%v)", dir, err)
	}
	r, err := s.Make(t.Context(), snapshot.KindActive, "a", "", nil, files(1))
	must(t, err)
	if s.Dir(r.ID) == dir {
		t.Errorf("%s is used again", dir)
	}
}

// The parent that a build looked at is the one that the record names.
func TestParentReplaced(t *testing.T) {
	s := openStore(t, Options{})
	ctx := t.Context()
	parent := func() {
		_, err := s.Make(ctx, snapshot.KindActive, "p", "", nil, files(1))
		must(t, err)
		must(t, s.Commit(ctx, "P", "p", snapshot.CommitOptions{}))
	}
	parent()
	_, err := s.Make(ctx, snapshot.KindActive, "a", "P", nil, func(context.Context, string, Record) (bool, error) {
		must(t, s.Remove(ctx, "P"))
		parent()
		return false, nil
	})
	if !errdefs.IsNotFound(err) {
		t.Errorf("snapshot on a parent that was replaced: %v", err)
	}
	// The same of an active snapshot while it is committed.
	_, err = s.Make(ctx, snapshot.KindActive, "a", "P", nil, files(syncOneByOne))
	must(t, err)
	s.all.do = func() error {
		must(t, s.Remove(ctx, "a"))
		_, err := s.Make(ctx, snapshot.KindActive, "a", "P", nil, nil)
		return err
	}
	if err := s.Commit(ctx, "A", "a", snapshot.CommitOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("commit of a snapshot that was replaced: %v", err)
	}
	must(t, s.Remove(ctx, "a"))
}

func TestLabelWithoutKey(t *testing.T) {
	s := openStore(t, Options{})
	bad := map[string]string{"": "x"}
	if _, err := s.Make(t.Context(), snapshot.KindActive, "a", "", bad, files(0)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("prepare: %v", err)
	}
	_, err := s.Make(t.Context(), snapshot.KindActive, "a", "", nil, files(0))
	must(t, err)
	if err := s.Commit(t.Context(), "A", "a", snapshot.CommitOptions{Labels: bad}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("commit: %v", err)
	}
	if _, err := s.Update(t.Context(), snapshot.Info{Name: "a", Labels: bad}, "labels"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("update: %v", err)
	}
}

// Several cleanups at once, as the collector's and a removal's, do not take
// each other's work for an error.
func TestCleanupsAtOnce(t *testing.T) {
	s := openStore(t, Options{})
	for round := range 8 {
		for i := range 4 {
			dir := filepath.Join(s.dir.Name(), fmt.Sprintf("%s%d-%d", trashPrefix, round, i))
			for sub := range 50 {
				must(t, os.MkdirAll(filepath.Join(dir, fmt.Sprint(sub), "fs"), 0o700))
			}
		}
		errs := make(chan error)
		for range 4 {
			go func() { errs <- s.Cleanup(context.Background()) }()
		}
		for range 4 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		if left, err := os.ReadDir(s.dir.Name()); err != nil || len(left) > 0 {
			t.Fatalf("round %d: %d directories are left: %v", round, len(left), err)
		}
	}
}
