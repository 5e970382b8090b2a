package boltmeta

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// txn is a transaction and what was done in it. All changes go through its
// methods, which is how a commit knows whether there is anything to commit and
// whether a call that failed left something to undo.
type txn struct {
	probe   bool // it is to be committed though it changes nothing
	tx      *bolt.Tx
	changed bool
	deleted bool // something may have become collectable
}

// maxBatch bounds the calls of one transaction.
const maxBatch = 256

// committer lets writers share transactions, and so the two syncs that each
// costs. There is no goroutine: of the callers that wait, the first one leads,
// takes along all that have queued up, and hands the lead on.
type committer struct {
	mu    sync.Mutex // guards what follows
	queue []*call
	led   bool
	last  int // calls in the last transaction
}

// patience is how long a leader waits for those who were served by the
// transaction before: writers that come again at once. It is a fraction of
// what a sync takes, and a writer on its own does not wait.
const patience = 200 * time.Microsecond

// gather waits until as many callers have queued up as there seem to be. g.mu
// is held, but not while it waits.
func (g *committer) gather() {
	want := min(g.last+len(g.queue)-1, maxBatch)
	if g.last <= 1 && len(g.queue) == 1 {
		return
	}
	for end := time.Now().Add(patience); len(g.queue) < want && time.Now().Before(end); {
		g.mu.Unlock()
		runtime.Gosched()
		g.mu.Lock()
	}
}

// call is one update that waits for its transaction.
type call struct {
	fn   func(*txn) error
	err  error
	wake chan bool // true: lead; false: done. Buffered, at most one of each is sent.
	lead bool      // guarded by committer.mu: true was sent
	// what it did
	changed, deleted bool
}

// update runs fn in a write transaction and returns when that is durable. fn
// may run again if another call of the same transaction fails, so it has to
// set what it gives to its caller anew each time; what it returns is this
// caller's alone. fn checks before it changes, and does no I/O. ctx ends the
// wait for a turn, not a transaction under way.
func (db *DB) update(ctx context.Context, fn func(*txn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	g := &db.commits
	c := &call{fn: fn, wake: make(chan bool, 2)}
	g.mu.Lock()
	g.queue = append(g.queue, c)
	if g.led {
		g.mu.Unlock()
		lead := false
		select {
		case lead = <-c.wake:
		case <-ctx.Done():
			g.mu.Lock()
			if i := slices.Index(g.queue, c); i >= 0 && !c.lead {
				g.queue = slices.Delete(g.queue, i, i+1)
				g.mu.Unlock()
				return ctx.Err()
			}
			g.mu.Unlock()
			lead = <-c.wake
		}
		if !lead {
			return c.err
		}
		g.mu.Lock()
	}
	g.led = true
	g.gather()
	n := min(len(g.queue), maxBatch)
	g.last = n
	batch := slices.Clone(g.queue[:n])
	g.queue = slices.Delete(g.queue, 0, n)
	g.mu.Unlock()

	db.commit(slices.Clone(batch))

	for _, o := range batch {
		if o != c {
			o.wake <- false
		}
	}
	g.mu.Lock()
	if g.led = len(g.queue) > 0; g.led {
		g.queue[0].lead = true
		g.queue[0].wake <- true
	}
	g.mu.Unlock()
	return c.err
}

// Probe commits a transaction that changes nothing: what it takes to write
// works, if it returns nil.
func (db *DB) Probe(ctx context.Context) error {
	return db.update(ctx, func(t *txn) error { t.probe = true; return nil })
}

// commit runs the calls in as few transactions as their failures allow. A
// call that fails after it changed something has to be undone, so the others
// run again without it; one that fails before costs nothing.
func (db *DB) commit(batch []*call) {
	for len(batch) > 0 {
		bad, err := db.attempt(batch)
		if err != nil { // the transaction failed, not one call
			for _, c := range batch {
				if c.err == nil {
					c.err = err
				}
			}
			return
		}
		if bad < 0 {
			break
		}
		batch = slices.Delete(batch, bad, bad+1)
	}
	fn := db.observer.Load()
	if fn == nil {
		return
	}
	for _, c := range batch {
		if c.err == nil && c.changed {
			(*fn)(c.deleted)
		}
	}
}

// attempt runs the calls in one transaction. bad is the index of a call that
// failed and left changes: nothing was committed then.
func (db *DB) attempt(batch []*call) (bad int, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	at := -1
	tx, err := db.bolt.Begin(true)
	if err != nil {
		return -1, db.failure(err)
	}
	defer func() {
		if r := recover(); r != nil {
			bad, err = -1, fmt.Errorf("metadata %s: %w", db.path, damage(r))
			if at >= 0 { // that call met the damage; the others may be luckier
				batch[at].err = err
				bad, err = at, nil
			}
		}
		tx.Rollback() // after a commit it does nothing
	}()
	changed := false
	for i, c := range batch {
		at = i
		t := &txn{tx: tx}
		c.err = c.fn(t)
		c.changed, c.deleted = t.changed, t.deleted
		if c.err != nil && t.changed {
			return i, nil
		}
		changed = changed || t.changed || t.probe
	}
	at = -1
	if !changed {
		return -1, nil
	}
	db.o.Faults.Pass("meta.commit")
	if err := tx.Commit(); err != nil {
		return -1, db.failure(fmt.Errorf("commit: %w", err))
	}
	db.o.Faults.Pass("meta.committed")
	return -1, nil
}

// failure classes what keeps a transaction from beginning or from being kept.
func (db *DB) failure(err error) error {
	switch {
	case errors.Is(err, berrors.ErrDatabaseNotOpen):
		return fmt.Errorf("metadata %s is closed: %w", db.path, errdefs.ErrUnavailable)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("metadata %s: %w: %w", db.path, err, errdefs.ErrResourceExhausted)
	}
	return fmt.Errorf("metadata %s: %w", db.path, err)
}

// find returns the bucket at the path below v1, or nil.
func (t *txn) find(path ...string) *bolt.Bucket {
	b := t.tx.Bucket(keyVersion1)
	for _, p := range path {
		if b == nil {
			return nil
		}
		b = b.Bucket([]byte(p))
	}
	return b
}

// make returns the bucket at the path below v1, made where it is missing.
func (t *txn) make(path ...string) (*bolt.Bucket, error) {
	t.changed = true
	b, err := t.tx.CreateBucketIfNotExists(keyVersion1)
	if err != nil {
		return nil, err
	}
	for _, p := range path {
		if b, err = t.sub(b, p); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// sub returns the bucket name in b, made if it is missing.
func (t *txn) sub(b *bolt.Bucket, name string) (*bolt.Bucket, error) {
	t.changed = true
	s, err := b.CreateBucketIfNotExists([]byte(name))
	return s, keyError(name, err)
}

// put sets a value.
func (t *txn) put(b *bolt.Bucket, key string, value []byte) error {
	t.changed = true
	if value == nil {
		value = []byte{} // or the rest of this transaction would take it for a bucket
	}
	return keyError(key, b.Put([]byte(key), value))
}

// drop deletes a value, if it is there.
func (t *txn) drop(b *bolt.Bucket, key string) error {
	t.changed = true
	return b.Delete([]byte(key))
}

// remove deletes a bucket, if it is there.
func (t *txn) remove(b *bolt.Bucket, name string) error {
	t.changed = true
	if err := b.DeleteBucket([]byte(name)); err != nil && !errors.Is(err, berrors.ErrBucketNotFound) {
		return err
	}
	return nil
}

// keyError classes what bolt says of a key that a client chose.
func keyError(key string, err error) error {
	switch {
	case errors.Is(err, berrors.ErrKeyTooLarge):
		return fmt.Errorf("name %.32q... is too long: %w", key, errdefs.ErrInvalidArgument)
	case errors.Is(err, berrors.ErrKeyRequired), errors.Is(err, berrors.ErrBucketNameRequired):
		return fmt.Errorf("name must not be empty: %w", errdefs.ErrInvalidArgument)
	case errors.Is(err, berrors.ErrIncompatibleValue):
		return fmt.Errorf("name %q is reserved: %w", key, errdefs.ErrInvalidArgument)
	}
	return err
}
