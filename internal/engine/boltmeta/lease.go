package boltmeta

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/lease"
)

type leases struct{ *records }

func readLease(id string, b *bolt.Bucket) (lease.Lease, error) {
	return lease.Lease{ID: lease.ID(id), Labels: readMap(b, kLabels), CreatedAt: readTime(b, kCreated)}, nil
}

func (s *leases) Create(ctx context.Context, l lease.Lease) (lease.Lease, error) {
	if l.ID == "" {
		l.ID = lease.Generate(s.db.now())
	}
	if err := l.Check(); err != nil {
		return lease.Lease{}, err
	}
	l.Labels = nonEmpty(l.Labels)
	l.CreatedAt = s.db.now()
	err := s.db.update(ctx, func(t *txn) error {
		if s.find(t, kLeases, string(l.ID)) != nil {
			return exists("lease", string(l.ID))
		}
		b, err := s.make(t, kLeases, string(l.ID))
		if err != nil {
			return err
		}
		if err := t.putTime(b, kCreated, l.CreatedAt); err != nil {
			return err
		}
		return t.putMap(b, kLabels, l.Labels)
	})
	if err != nil {
		return lease.Lease{}, err
	}
	return l, nil
}

func (s *leases) Delete(ctx context.Context, id lease.ID, _ bool) error {
	return s.db.update(ctx, func(t *txn) error {
		if s.find(t, kLeases, string(id)) == nil {
			return notFound("lease", string(id))
		}
		t.deleted = true
		return t.remove(s.find(t, kLeases), string(id))
	})
}

func (s *leases) List(_ context.Context, filters ...string) (all []lease.Lease, err error) {
	err = scan(s.records, readLease, lease.Lease.Field, func(l lease.Lease) error {
		all = append(all, l)
		return nil
	}, filters, kLeases)
	return all, err
}

// resourcePath is where a resource stands in a lease's bucket.
func (s *leases) resourcePath(r lease.Resource) ([]string, error) {
	if err := r.Check(); err != nil {
		return nil, err
	}
	if sn, ok := strings.CutPrefix(r.Type, lease.SnapshotPrefix); ok {
		if _, ok := s.db.o.Snapshotters[sn]; !ok {
			return nil, fmt.Errorf("lease resource %q: snapshotter not loaded: %s: %w", r.Type, sn, errdefs.ErrInvalidArgument)
		}
		return []string{kSnapshots, sn, r.ID}, nil
	}
	return []string{r.Type, r.ID}, nil
}

func (s *leases) AddResource(ctx context.Context, id lease.ID, r lease.Resource) error {
	return s.change(ctx, id, r, (*records).hold, false)
}

func (s *leases) RemoveResource(ctx context.Context, id lease.ID, r lease.Resource) error {
	return s.change(ctx, id, r, (*records).release, true)
}

func (s *leases) change(ctx context.Context, id lease.ID, r lease.Resource, do func(*records, *txn, ...string) error, deletes bool) error {
	path, err := s.resourcePath(r)
	if err != nil {
		return err
	}
	if id == "" {
		return notFound("lease", "")
	}
	under := &records{s.db, s.ns, id}
	return s.db.update(ctx, func(t *txn) error {
		if err := under.leaseExists(t); err != nil {
			return err
		}
		t.deleted = deletes
		return do(under, t, path...)
	})
}

func (s *leases) Resources(_ context.Context, id lease.ID) (all []lease.Resource, err error) {
	err = s.db.view(func(t *txn) error {
		b := s.find(t, kLeases, string(id))
		if b == nil {
			return notFound("lease", string(id))
		}
		all = nil
		return eachResource(b, func(r lease.Resource) error {
			all = append(all, r)
			return nil
		})
	})
	return all, err
}

// eachResource calls fn for what the lease with bucket b holds.
func eachResource(b *bolt.Bucket, fn func(lease.Resource) error) error {
	keys := func(b *bolt.Bucket, kind string) error {
		return b.ForEach(func(k, v []byte) error {
			if v == nil {
				return nil
			}
			return fn(lease.Resource{Type: kind, ID: string(k)})
		})
	}
	return b.ForEachBucket(func(name []byte) error {
		s := b.Bucket(name)
		switch kind := string(name); kind {
		case kLabels:
			return nil
		case kSnapshots:
			return s.ForEachBucket(func(sn []byte) error {
				return keys(s.Bucket(sn), lease.SnapshotPrefix+string(sn))
			})
		default:
			return keys(s, kind)
		}
	})
}
