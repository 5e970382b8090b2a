package boltmeta

import (
	"testing"

	bolt "go.etcd.io/bbolt"
)

// A probe is a real commit, and nothing that anybody sees or that makes
// collection run.
// promise: P34
func TestProbe(t *testing.T) {
	b := newFixture(t)
	last := func() (id int) {
		if err := b.bolt.View(func(tx *bolt.Tx) error { id = tx.ID(); return nil }); err != nil {
			t.Fatal(err)
		}
		return id
	}
	noted := 0
	fn := func(bool) { noted++ }
	b.observer.Store(&fn)
	before := last()
	if err := b.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := last(); after != before+1 || noted != 0 {
		t.Errorf("transaction %d after %d, %d changes noted", after, before, noted)
	}
}
