package boltmeta

import (
	"context"
	"fmt"
	"maps"

	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/sandbox"
)

type sandboxes struct{ *records }

func readSandbox(id string, b *bolt.Bucket) (v sandbox.Sandbox, err error) {
	v = sandbox.Sandbox{ID: id, Sandboxer: readString(b, kSandboxer), Labels: readMap(b, kLabels), CreatedAt: readTime(b, kCreated), UpdatedAt: readTime(b, kUpdated)}
	if v.Runtime, err = readRuntime(b); err != nil {
		return v, err
	}
	if v.Spec, err = readAny(b, kSpec); err != nil {
		return v, err
	}
	v.Extensions, err = readAnys(b, kExtensions)
	return v, err
}

func (s *sandboxes) write(t *txn, v sandbox.Sandbox) error {
	b, err := s.make(t, kSandboxes, v.ID)
	if err != nil {
		return err
	}
	if err := t.putTimes(b, v.CreatedAt, v.UpdatedAt); err != nil {
		return err
	}
	if err := t.put(b, kSandboxer, []byte(v.Sandboxer)); err != nil {
		return err
	}
	if err := t.putAny(b, kSpec, v.Spec); err != nil {
		return err
	}
	if err := t.putRuntime(b, v.Runtime); err != nil {
		return err
	}
	if err := t.putAnys(b, kExtensions, v.Extensions); err != nil {
		return err
	}
	return t.putMap(b, kLabels, v.Labels)
}

func (s *sandboxes) Get(_ context.Context, id string) (v sandbox.Sandbox, err error) {
	err = s.db.view(func(t *txn) error {
		b := s.find(t, kSandboxes, id)
		if b == nil {
			return notFound("sandbox", id)
		}
		if v, err = readSandbox(id, b); err != nil {
			return fmt.Errorf("sandbox %q: %w", id, err)
		}
		return nil
	})
	return v, err
}

func (s *sandboxes) List(_ context.Context, filters ...string) (all []sandbox.Sandbox, err error) {
	err = scan(s.records, readSandbox, sandbox.Sandbox.Field, func(v sandbox.Sandbox) error {
		all = append(all, v)
		return nil
	}, filters, kSandboxes)
	return all, err
}

func (s *sandboxes) Create(ctx context.Context, v sandbox.Sandbox) (sandbox.Sandbox, error) {
	if err := v.Check(); err != nil {
		return sandbox.Sandbox{}, err
	}
	v.Labels, v.Extensions = nonEmpty(v.Labels), keptAnys(v.Extensions)
	v.CreatedAt = s.db.now()
	v.UpdatedAt = v.CreatedAt
	err := s.db.update(ctx, func(t *txn) error {
		if s.find(t, kSandboxes, v.ID) != nil {
			return exists("sandbox", v.ID)
		}
		return s.write(t, v)
	})
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	return v, nil
}

func (s *sandboxes) Update(ctx context.Context, v sandbox.Sandbox, paths ...string) (out sandbox.Sandbox, err error) {
	err = s.db.update(ctx, func(t *txn) error {
		b := s.find(t, kSandboxes, v.ID)
		if b == nil {
			return notFound("sandbox", v.ID)
		}
		cur, err := readSandbox(v.ID, b)
		if err != nil {
			return fmt.Errorf("sandbox %q: %w", v.ID, err)
		}
		if out, err = cur.Merge(v, paths...); err != nil {
			return fmt.Errorf("update sandbox %q: %w", v.ID, err)
		}
		if err := out.Check(); err != nil {
			return err
		}
		out.Labels, out.Extensions = nonEmpty(out.Labels), keptAnys(out.Extensions)
		out.UpdatedAt = s.db.after(cur.UpdatedAt)
		t.deleted = !maps.Equal(out.Labels, cur.Labels)
		return s.write(t, out)
	})
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	return out, nil
}

func (s *sandboxes) Delete(ctx context.Context, id string) error {
	return s.db.update(ctx, func(t *txn) error {
		if s.find(t, kSandboxes, id) == nil {
			return notFound("sandbox", id)
		}
		t.deleted = true
		return t.remove(s.find(t, kSandboxes), id)
	})
}
