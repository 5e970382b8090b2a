package boltmeta

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/lib/filter"
)

// records is one namespace, and the lease that is written under.
type records struct {
	db    *DB
	ns    namespace.ID
	lease lease.ID
}

var _ view.RecordSource = (*DB)(nil)

// In implements view.RecordSource. An unknown lease is ErrNotFound when
// something is to be created under it: an ingest, a blob, a snapshot, an
// image. Clients go on to read, update and delete with the header of a lease
// that has ended, so that is no error.
func (db *DB) In(ns namespace.ID, under lease.ID) (view.Records, error) {
	if err := namespace.Check(ns); err != nil {
		return nil, err
	}
	return &records{db, ns, under}, nil
}

func (r *records) Namespace() namespace.ID     { return r.ns }
func (r *records) Lease() lease.ID             { return r.lease }
func (r *records) Content() content.Store      { return &contents{r} }
func (r *records) Images() image.Store         { return &images{r} }
func (r *records) Containers() container.Store { return &containers{r} }
func (r *records) Sandboxes() sandbox.Store    { return &sandboxes{r} }
func (r *records) Leases() lease.Store         { return &leases{r} }

func (r *records) Snapshots(name string) (snapshot.Store, error) {
	backend, ok := r.db.o.Snapshotters[name]
	if !ok {
		return nil, fmt.Errorf("snapshotter not loaded: %s: %w", name, errdefs.ErrInvalidArgument)
	}
	return &snapshots{r, name, backend, r.db.keys[name]}, nil
}

// find and make are txn's, below the namespace. make creates the namespace
// too (contract 1.2.3).
func (r *records) find(t *txn, path ...string) *bolt.Bucket {
	return t.find(append([]string{string(r.ns)}, path...)...)
}

func (r *records) make(t *txn, path ...string) (*bolt.Bucket, error) {
	return t.make(append([]string{string(r.ns)}, path...)...)
}

// leaseExists returns ErrNotFound if the view is under a lease that is not there.
func (r *records) leaseExists(t *txn) error {
	if r.lease != "" && r.find(t, kLeases, string(r.lease)) == nil {
		return fmt.Errorf("lease %q: %w", r.lease, errdefs.ErrNotFound)
	}
	return nil
}

// hold makes the view's lease, if there is one, refer to the object at path.
func (r *records) hold(t *txn, path ...string) error {
	return r.leaseEntry(t, true, path...)
}

// release makes the view's lease let go of the object at path.
func (r *records) release(t *txn, path ...string) error {
	return r.leaseEntry(t, false, path...)
}

func (r *records) leaseEntry(t *txn, add bool, path ...string) error {
	if r.lease == "" {
		return nil
	}
	last := len(path) - 1
	at := append([]string{kLeases, string(r.lease)}, path[:last]...)
	if !add {
		if b := r.find(t, at...); b != nil {
			return t.drop(b, path[last])
		}
		return nil
	}
	if err := r.leaseExists(t); err != nil {
		return err
	}
	b, err := r.make(t, at...)
	if err != nil {
		return err
	}
	return t.put(b, path[last], nil)
}

// after returns the time of a change: now, and always later than the last one.
func (db *DB) after(last time.Time) time.Time {
	now := db.now()
	if !now.After(last) {
		now = last.Add(1)
	}
	return now
}

// scan reads the records below path, in the order of their names, and calls fn
// for those that match, outside of any transaction: fn may take its time.
func scan[R any](r *records, read func(name string, b *bolt.Bucket) (R, error), field func(R, []string) (string, bool), fn func(R) error, filters []string, path ...string) error {
	f, err := filter.Parse(filters...)
	if err != nil {
		return err
	}
	const batch = 100
	var next []byte
	for {
		var got []R
		last := true
		err := r.db.view(func(t *txn) error {
			b := r.find(t, path...)
			if b == nil {
				return nil
			}
			c := b.Cursor()
			k, v := c.First()
			if next != nil {
				if k, v = c.Seek(next); string(k) == string(next) {
					k, v = c.Next()
				}
			}
			for n := 0; k != nil; k, v = c.Next() {
				if n++; n > batch {
					last = false
					break
				}
				next = append(next[:0], k...)
				if v != nil {
					continue
				}
				rec, err := read(string(k), b.Bucket(k))
				if err != nil {
					return fmt.Errorf("%q: %w", k, err)
				}
				if len(filters) == 0 || f.Match(filter.Func(func(p []string) (string, bool) { return field(rec, p) })) {
					got = append(got, rec)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, rec := range got {
			if err := fn(rec); err != nil {
				return err
			}
		}
		if last {
			return nil
		}
	}
}

// notFound and exists are the errors of a noun and a name.
func notFound(noun, name string) error {
	return fmt.Errorf("%s %q: %w", noun, name, errdefs.ErrNotFound)
}

func exists(noun, name string) error {
	return fmt.Errorf("%s %q: %w", noun, name, errdefs.ErrAlreadyExists)
}
