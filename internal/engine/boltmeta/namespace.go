package boltmeta

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/internal/lib/fields"
)

type namespaces struct{ db *DB }

// Namespaces returns the store of the namespaces themselves.
func (db *DB) Namespaces() namespace.Store { return &namespaces{db} }

func (s *namespaces) Get(_ context.Context, id namespace.ID) (namespace.Namespace, error) {
	n := namespace.Namespace{ID: id}
	if err := namespace.Check(id); err != nil {
		return namespace.Namespace{}, err
	}
	err := s.db.view(func(t *txn) error {
		if b := t.find(string(id)); b != nil {
			n.Labels = readMap(b, kLabels)
		}
		return nil
	})
	return n, err
}

func (s *namespaces) List(context.Context) (all []namespace.Namespace, err error) {
	err = s.db.view(func(t *txn) error {
		all = nil
		for _, id := range t.namespaces() {
			all = append(all, namespace.Namespace{ID: id, Labels: readMap(t.find(string(id)), kLabels)})
		}
		return nil
	})
	return all, err
}

func (s *namespaces) Create(ctx context.Context, n namespace.Namespace) (namespace.Namespace, error) {
	if err := namespace.Check(n.ID); err != nil {
		return namespace.Namespace{}, err
	}
	if err := ident.CheckLabels(n.Labels); err != nil {
		return namespace.Namespace{}, fmt.Errorf("namespace %s: %w", n.ID, err)
	}
	n.Labels = nonEmpty(n.Labels)
	err := s.db.update(ctx, func(t *txn) error {
		if t.find(string(n.ID)) != nil {
			return exists("namespace", string(n.ID))
		}
		b, err := t.make(string(n.ID))
		if err != nil {
			return err
		}
		return t.putMap(b, kLabels, n.Labels)
	})
	if err != nil {
		return namespace.Namespace{}, err
	}
	return n, s.db.publish(ctx, n.ID, event.TopicNamespaceCreate, event.NamespaceCreate{Name: string(n.ID), Labels: n.Labels})
}

func (s *namespaces) Update(ctx context.Context, n namespace.Namespace, paths ...string) (out namespace.Namespace, err error) {
	if err := namespace.Check(n.ID); err != nil {
		return namespace.Namespace{}, err
	}
	err = s.db.update(ctx, func(t *txn) error {
		b := t.find(string(n.ID))
		if b == nil {
			return notFound("namespace", string(n.ID))
		}
		labels, err := fields.Labels(readMap(b, kLabels), n.Labels, paths)
		if err == nil {
			err = ident.CheckLabels(labels)
		}
		if err != nil {
			return fmt.Errorf("update namespace %s: %w", n.ID, err)
		}
		out = namespace.Namespace{ID: n.ID, Labels: nonEmpty(labels)}
		return t.putMap(b, kLabels, out.Labels)
	})
	if err != nil {
		return namespace.Namespace{}, err
	}
	return out, s.db.publish(ctx, n.ID, event.TopicNamespaceUpdate, event.NamespaceUpdate{Name: string(n.ID), Labels: out.Labels})
}

func (s *namespaces) Delete(ctx context.Context, id namespace.ID) error {
	if err := namespace.Check(id); err != nil {
		return err
	}
	err := s.db.update(ctx, func(t *txn) error {
		b := t.find(string(id))
		if b == nil {
			return notFound("namespace", string(id))
		}
		if in := inUse(b); len(in) > 0 {
			return fmt.Errorf("namespace %s still has %s: %w", id, strings.Join(in, ", "), errdefs.ErrFailedPrecondition)
		}
		t.deleted = true
		return t.remove(t.find(), string(id))
	})
	if err != nil {
		return err
	}
	s.db.due("") // its ingests
	return s.db.publish(ctx, id, event.TopicNamespaceDelete, event.NamespaceDelete{Name: string(id)})
}

// inUse says what is in the namespace with bucket b. Leases and sandboxes do
// not count (contract 1.3.28).
func inUse(b *bolt.Bucket) []string {
	var in []string
	filled := func(b *bolt.Bucket, path ...string) bool {
		for _, p := range path {
			if b = b.Bucket([]byte(p)); b == nil {
				return false
			}
		}
		k, _ := b.Cursor().First()
		return k != nil
	}
	if filled(b, kImages) {
		in = append(in, "images")
	}
	if filled(b, kContent, kBlob) {
		in = append(in, "blobs")
	}
	if filled(b, kContainers) {
		in = append(in, "containers")
	}
	if all := b.Bucket([]byte(kSnapshots)); all != nil {
		for _, sn := range bucketNames(all) {
			if filled(all, sn) {
				in = append(in, "snapshots of "+sn)
			}
		}
	}
	return in
}
