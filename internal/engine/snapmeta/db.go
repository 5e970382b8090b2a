package snapmeta

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// lockWait is how long Open waits for another process to let go of the file.
const lockWait = 2 * time.Second

// DB is a metadata.db. It is safe for concurrent use.
type DB struct {
	bolt *bolt.DB

	mu      sync.Mutex // guards waiting
	waiting []*update
	turn    chan struct{} // holds one token while somebody commits
}

// update is one change that waits for the next commit.
type update struct {
	fn   func(*Tx) error
	done chan error
}

// OpenDB opens the database at path or makes an empty one. Nothing is written
// to one that exists. ErrUnavailable if another process has it open.
func OpenDB(path string) (*DB, error) {
	b, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockWait, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, fmt.Errorf("open %s: another process has had it locked for %s: %w", path, lockWait, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return &DB{bolt: b, turn: make(chan struct{}, 1)}, nil
}

// Close ends the database after the transactions that run.
func (d *DB) Close() error { return d.bolt.Close() }

// View runs fn on a consistent state. It waits for no writer. fn must not
// open another transaction.
func (d *DB) View(fn func(*Tx) error) error {
	return d.bolt.View(func(b *bolt.Tx) error { return fn(newTx(b)) })
}

// Update runs fn and makes its changes durable, all or none, before it
// returns. Callers that arrive while another one syncs are committed together
// with a single sync. fn may run more than once and must only use its Tx: no
// I/O, no waiting. A context that ends while fn has not been started yet
// withdraws it; later it no longer matters.
func (d *DB) Update(ctx context.Context, fn func(*Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	u := &update{fn: fn, done: make(chan error, 1)}
	d.mu.Lock()
	d.waiting = append(d.waiting, u)
	d.mu.Unlock()
	select {
	case err := <-u.done:
		return err
	case <-ctx.Done():
		if d.withdraw(u) {
			return ctx.Err()
		}
		return <-u.done
	case d.turn <- struct{}{}:
	}
	// Either u still waits and is part of this batch, or the batch before
	// this one has answered it.
	defer func() { <-d.turn }()
	d.mu.Lock()
	batch := d.waiting
	d.waiting = nil
	d.mu.Unlock()
	d.commit(batch)
	return <-u.done
}

func (d *DB) withdraw(u *update) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, w := range d.waiting {
		if w == u {
			d.waiting = append(d.waiting[:i:i], d.waiting[i+1:]...)
			return true
		}
	}
	return false
}

// commit answers every update of a batch. One that fails before it changed
// anything just gets its error. One that fails half way takes the transaction
// with it: the others are tried again without it, and it alone.
func (d *DB) commit(batch []*update) {
	for len(batch) > 0 {
		errs := make([]error, len(batch))
		broken := -1
		err := d.bolt.Update(func(b *bolt.Tx) error {
			tx := newTx(b)
			for i, u := range batch {
				tx.dirty = false
				if errs[i] = u.fn(tx); errs[i] != nil && tx.dirty {
					broken = i
					return errs[i]
				}
			}
			return nil
		})
		if broken < 0 {
			for i, u := range batch {
				if err != nil {
					errs[i] = fmt.Errorf("commit to %s: %w", d.bolt.Path(), err)
				}
				u.done <- errs[i]
			}
			return
		}
		u := batch[broken]
		batch = append(batch[:broken:broken], batch[broken+1:]...)
		if len(batch) == 0 {
			u.done <- err
			return
		}
		u.done <- d.bolt.Update(func(b *bolt.Tx) error { return u.fn(newTx(b)) })
	}
}
