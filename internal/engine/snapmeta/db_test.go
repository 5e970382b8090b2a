package snapmeta

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/snapshot"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openDB(t *testing.T) *DB {
	t.Helper()
	d, err := OpenDB(filepath.Join(t.TempDir(), dbName))
	must(t, err)
	t.Cleanup(func() {
		must(t, d.View(func(tx *Tx) error {
			for _, p := range tx.check() {
				t.Errorf("check: %s", p)
			}
			return nil
		}))
		d.Close()
	})
	return d
}

// dump prints a bucket with all below it.
func dump(b *bolt.Bucket, indent string, out *strings.Builder) error {
	return b.ForEach(func(k, v []byte) error {
		if v != nil {
			fmt.Fprintf(out, "%s%s = %s\n", indent, k, hex.EncodeToString(v))
			return nil
		}
		fmt.Fprintf(out, "%s%s/ %d\n", indent, k, b.Bucket(k).Sequence())
		return dump(b.Bucket(k), indent+"  ", out)
	})
}

// The bytes in the file, as containerd writes them.
//
// contract: 3.1.2
func TestLayout(t *testing.T) {
	d := openDB(t)
	// The record of testdata/containerd-2.4-root.tgz, made again.
	created := mustTime(t, "010000000ee2940cb127d2f657ffff")
	must(t, d.Update(t.Context(), func(tx *Tx) error {
		if _, err := tx.Create(1, snapshot.KindActive, "extract", "", nil); err != nil {
			return err
		}
		r, err := tx.Commit("default/2/sha256:b9", "extract", snapshot.Usage{Inodes: 6, Size: 20480},
			snapshot.CommitOptions{Labels: map[string]string{"containerd.io/snapshot.ref": "sha256:b9"}}, false)
		if err != nil {
			return err
		}
		r.CreatedAt, r.UpdatedAt = created, created
		if err := tx.put(r); err != nil {
			return err
		}
		c, err := tx.Create(300, snapshot.KindActive, "default/7/box", "default/2/sha256:b9", nil)
		if err != nil {
			return err
		}
		c.CreatedAt, c.UpdatedAt = created, created
		return tx.put(c)
	}))
	const want = `parents/ 0
  ` + "\x01\x00\xac\x02" + ` = 64656661756c742f372f626f78
snapshots/ 300
  default/2/sha256:b9/ 0
    createdat = 010000000ee2940cb127d2f657ffff
    id = 01
    inodes = 0c
    kind = 03
    labels/ 0
      containerd.io/snapshot.ref = 7368613235363a6239
    size = 80c002
    updatedat = 010000000ee2940cb127d2f657ffff
  default/7/box/ 0
    createdat = 010000000ee2940cb127d2f657ffff
    id = ac02
    kind = 02
    parent = 64656661756c742f322f7368613235363a6239
    updatedat = 010000000ee2940cb127d2f657ffff
`
	var got strings.Builder
	must(t, d.bolt.View(func(b *bolt.Tx) error { return dump(b.Bucket([]byte("v1")), "", &got) }))
	if got.String() != want {
		t.Errorf("the file has\n%s\nexpected\n%s", got.String(), want)
	}
}

func mustTime(t *testing.T, s string) (at time.Time) {
	t.Helper()
	b, err := hex.DecodeString(s)
	must(t, err)
	must(t, at.UnmarshalBinary(b))
	return at
}

func create(key string, id uint64) func(*Tx) error {
	return func(tx *Tx) error {
		_, err := tx.Create(id, snapshot.KindActive, key, "", nil)
		return err
	}
}

// Writers that arrive together share a commit.
func TestGroupCommit(t *testing.T) {
	d := openDB(t)
	// The first one holds the turn until all others wait.
	const n = 50
	started, others := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		if err := d.Update(context.Background(), func(tx *Tx) error {
			close(started)
			<-others
			return create("first", 1)(tx)
		}); err != nil {
			t.Error(err)
		}
	}()
	<-started
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := d.Update(context.Background(), create(fmt.Sprint("k", i), uint64(i+2))); err != nil {
				t.Error(err)
			}
		}()
	}
	for waiting := 0; waiting < n; {
		d.mu.Lock()
		waiting = len(d.waiting)
		d.mu.Unlock()
	}
	tx0 := txid(t, d)
	close(others)
	wg.Wait()
	if commits := txid(t, d) - tx0; commits != 2 {
		t.Errorf("%d writers took %d commits, expected 2", n+1, commits)
	}
}

func txid(t *testing.T, d *DB) int {
	t.Helper()
	var id int
	must(t, d.bolt.View(func(b *bolt.Tx) error { id = b.ID(); return nil }))
	return id
}

// One update that fails half way spoils neither the others nor itself.
func TestGroupCommitErrors(t *testing.T) {
	d := openDB(t)
	boom := errors.New("boom")
	var runs atomic.Int32
	batch := []*update{
		{fn: create("a", 1), done: make(chan error, 1)},
		{fn: func(tx *Tx) error { _, err := tx.Get("nothing"); return err }, done: make(chan error, 1)},
		{fn: func(tx *Tx) error {
			runs.Add(1)
			if err := create("half", 2)(tx); err != nil {
				return err
			}
			return boom
		}, done: make(chan error, 1)},
		{fn: create("b", 3), done: make(chan error, 1)},
		{fn: create("a", 4), done: make(chan error, 1)},
	}
	d.commit(batch)
	for i, want := range []func(error) bool{
		func(err error) bool { return err == nil }, errdefs.IsNotFound,
		func(err error) bool { return errors.Is(err, boom) },
		func(err error) bool { return err == nil }, errdefs.IsAlreadyExists,
	} {
		if err := <-batch[i].done; !want(err) {
			t.Errorf("update %d: %v", i, err)
		}
	}
	must(t, d.View(func(tx *Tx) error {
		for key, want := range map[string]bool{"a": true, "b": true, "half": false} {
			if _, err := tx.Get(key); (err == nil) != want {
				t.Errorf("%s: %v", key, err)
			}
		}
		return nil
	}))
	if runs.Load() != 2 {
		t.Errorf("the failing update ran %d times", runs.Load())
	}
}

// A caller that gives up while it waits leaves nothing behind.
func TestUpdateWithdrawn(t *testing.T) {
	d := openDB(t)
	d.turn <- struct{}{} // somebody commits
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- d.Update(ctx, create("a", 1)) }()
	for waiting := 0; waiting < 1; {
		d.mu.Lock()
		waiting = len(d.waiting)
		d.mu.Unlock()
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("withdrawn update: %v", err)
	}
	<-d.turn
	must(t, d.Update(t.Context(), create("b", 2)))
	must(t, d.View(func(tx *Tx) error {
		if _, err := tx.Get("a"); !errdefs.IsNotFound(err) {
			t.Errorf("withdrawn update was made: %v", err)
		}
		return nil
	}))
	if err := d.Update(ctx, create("c", 3)); !errors.Is(err, context.Canceled) {
		t.Errorf("update with a context that is over: %v", err)
	}
}

// Records that nobody can have written come as errors, never as a panic.
func TestDamaged(t *testing.T) {
	d := openDB(t)
	must(t, d.Update(t.Context(), func(tx *Tx) error {
		for i, key := range []string{"a", "b"} {
			if err := create(key, uint64(i+1))(tx); err != nil {
				return err
			}
		}
		return nil
	}))
	for field, bad := range map[string][]string{
		"id": {"", "\x80", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"}, "kind": {"", "\x09", "\x01\x01"},
		"createdat": {"x"}, "updatedat": {"\x01"}, "inodes": {"\x80"}, "size": {""},
	} {
		for _, v := range bad {
			tx, err := d.bolt.Begin(true)
			must(t, err)
			w := newTx(tx)
			must(t, w.snapshots.Bucket([]byte("a")).Put([]byte(field), []byte(v)))
			if _, err := w.Get("a"); !errdefs.IsDataLoss(err) {
				t.Errorf("%s = %q: %v", field, v, err)
			}
			if len(w.check()) == 0 {
				t.Errorf("%s = %q: check finds nothing", field, v)
			}
			must(t, tx.Rollback())
		}
	}
	tx, err := d.bolt.Begin(true)
	must(t, err)
	defer tx.Rollback()
	w := newTx(tx)
	// Two that are each other's parent.
	must(t, w.snapshots.Bucket([]byte("a")).Put(keyParent, []byte("b")))
	must(t, w.snapshots.Bucket([]byte("b")).Put(keyParent, []byte("a")))
	if _, err := w.Get("a"); !errdefs.IsDataLoss(err) {
		t.Errorf("a circle: %v", err)
	}
	if _, err := w.Remove("a"); err != nil {
		t.Errorf("what lost its ancestors cannot be removed: %v", err)
	}
}

func TestNotADatabase(t *testing.T) {
	p := filepath.Join(t.TempDir(), "metadata.db")
	must(t, os.WriteFile(p, []byte(strings.Repeat("no database", 1000)), 0o600))
	if d, err := OpenDB(p); err == nil {
		d.Close()
		t.Error("it opened")
	}
}

// Callers share a run that begins after all of them asked.
func TestGroup(t *testing.T) {
	enter, leave := make(chan struct{}), make(chan error)
	g := group{do: func() error {
		enter <- struct{}{}
		return <-leave
	}}
	boom := errors.New("boom")
	first := g.join()
	<-enter
	second, third := g.join(), g.join()
	if second == first || second != third {
		t.Error("a run that had begun was shared, or one that had not was not")
	}
	// Who gives up does not stop the others.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that gave up: %v", err)
	}
	leave <- nil
	<-first.done
	<-enter
	leave <- boom
	<-second.done
	if first.err != nil || !errors.Is(second.err, boom) {
		t.Errorf("the runs returned %v and %v", first.err, second.err)
	}
	done := make(chan error)
	go func() { done <- g.wait(t.Context()) }()
	<-enter
	leave <- nil
	must(t, <-done)
	g.close()
}
