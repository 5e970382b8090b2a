package boltmeta

import (
	"testing"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/service/gc"
)

// A commit that was broken off between its two halves is found, also if another
// one has written a higher number since: its record goes, all others stay.
// contract: 4.4.1
// promise: P3
func TestInterruptedCommit(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	v := must(f.In("n", ""))(t)
	sn := must(v.Snapshots("native"))(t)
	root := map[string]string{"containerd.io/gc.root": "x"}
	for _, key := range []string{"a-key", "b-key", "c-key"} {
		if _, err := sn.Prepare(ctx, key, "", root); err != nil {
			t.Fatal(err)
		}
	}
	// The first half of a's commit, as the backend has it after a crash.
	back := f.opts.Snapshotters["native"]
	var key string
	if err := back.Walk(ctx, func(i snapshot.Info) error {
		if _, _, name, ok := splitBackend(i.Name); ok && name == "a-key" {
			key = i.Name
		}
		return nil
	}); err != nil || key == "" {
		t.Fatal(key, err)
	}
	if err := back.Commit(ctx, "n/4/a", key, snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := sn.Commit(ctx, "b", "b-key", snapshot.CommitOptions{Labels: root}); err != nil {
		t.Fatal(err)
	}
	f.reopen()
	if _, err := gc.New(f.DB, gc.Defaults(), nil).Collect(ctx); err != nil {
		t.Fatal(err)
	}
	v = must(f.In("n", ""))(t)
	sn = must(v.Snapshots("native"))(t)
	if _, err := sn.Stat(ctx, "a-key"); !errdefs.IsNotFound(err) {
		t.Errorf("the record without data is there: %v", err)
	}
	for _, name := range []string{"b", "c-key"} {
		if _, err := sn.Stat(ctx, name); err != nil {
			t.Error(err)
		}
	}
}
