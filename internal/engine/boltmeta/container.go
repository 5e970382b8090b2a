package boltmeta

import (
	"context"
	"fmt"
	"maps"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/typed"
)

type containers struct{ *records }

func readRuntime(b *bolt.Bucket) (r container.Runtime, err error) {
	if s := b.Bucket([]byte(kRuntime)); s != nil {
		r.Name = readString(s, kName)
		r.Options, err = readAny(s, kOptions)
	}
	return r, err
}

func (t *txn) putRuntime(b *bolt.Bucket, r container.Runtime) error {
	s, err := t.sub(b, kRuntime)
	if err != nil {
		return err
	}
	if err := t.put(s, kName, []byte(r.Name)); err != nil {
		return err
	}
	return t.putAny(s, kOptions, r.Options)
}

func readContainer(id string, b *bolt.Bucket) (c container.Container, err error) {
	c = container.Container{
		ID: container.ID(id), Labels: readMap(b, kLabels), Image: readString(b, kImage),
		Snapshotter: readString(b, kSnapshotter), SnapshotKey: readString(b, kSnapshotKey), SandboxID: readString(b, kSandboxID),
		CreatedAt: readTime(b, kCreated), UpdatedAt: readTime(b, kUpdated),
	}
	if c.Runtime, err = readRuntime(b); err != nil {
		return c, err
	}
	if c.Spec, err = readAny(b, kSpec); err != nil {
		return c, err
	}
	c.Extensions, err = readAnys(b, kExtensions)
	return c, err
}

func (s *containers) write(t *txn, c container.Container) error {
	b, err := s.make(t, kContainers, string(c.ID))
	if err != nil {
		return err
	}
	if err := t.putTimes(b, c.CreatedAt, c.UpdatedAt); err != nil {
		return err
	}
	for key, v := range map[string]string{kImage: c.Image, kSnapshotter: c.Snapshotter, kSnapshotKey: c.SnapshotKey, kSandboxID: c.SandboxID} {
		if err := t.put(b, key, []byte(v)); err != nil {
			return err
		}
	}
	if err := t.putAny(b, kSpec, c.Spec); err != nil {
		return err
	}
	if err := t.putRuntime(b, c.Runtime); err != nil {
		return err
	}
	if err := t.putAnys(b, kExtensions, c.Extensions); err != nil {
		return err
	}
	return t.putMap(b, kLabels, c.Labels)
}

// keptAnys returns what reading m back will give.
func keptAnys(m map[string]typed.Any) map[string]typed.Any {
	if len(m) == 0 {
		return nil
	}
	out := make(map[string]typed.Any, len(m))
	for k, v := range m {
		v.Value = slices.Clone(v.Value)
		out[k] = v
	}
	return out
}

func (s *containers) Get(_ context.Context, id container.ID) (c container.Container, err error) {
	err = s.db.view(func(t *txn) error {
		b := s.find(t, kContainers, string(id))
		if b == nil {
			return notFound("container", string(id))
		}
		if c, err = readContainer(string(id), b); err != nil {
			return fmt.Errorf("container %q: %w", id, err)
		}
		return nil
	})
	return c, err
}

func (s *containers) Walk(_ context.Context, fn func(container.Container) error, filters ...string) error {
	return scan(s.records, readContainer, container.Container.Field, fn, filters, kContainers)
}

func (s *containers) Create(ctx context.Context, c container.Container) (container.Container, error) {
	if err := c.Check(); err != nil {
		return container.Container{}, err
	}
	c.Labels, c.Extensions = nonEmpty(c.Labels), keptAnys(c.Extensions)
	c.CreatedAt = s.db.now()
	c.UpdatedAt = c.CreatedAt
	err := s.db.update(ctx, func(t *txn) error {
		if s.find(t, kContainers, string(c.ID)) != nil {
			return exists("container", string(c.ID))
		}
		return s.write(t, c)
	})
	if err != nil {
		return container.Container{}, err
	}
	return c, s.db.publish(ctx, s.ns, event.TopicContainerCreate, event.ContainerCreate{
		ID: string(c.ID), Image: c.Image, Runtime: event.ContainerRuntime{Name: c.Runtime.Name, Options: c.Runtime.Options},
	})
}

func (s *containers) Update(ctx context.Context, c container.Container, paths ...string) (out container.Container, err error) {
	err = s.db.update(ctx, func(t *txn) error {
		b := s.find(t, kContainers, string(c.ID))
		if b == nil {
			return notFound("container", string(c.ID))
		}
		cur, err := readContainer(string(c.ID), b)
		if err != nil {
			return fmt.Errorf("container %q: %w", c.ID, err)
		}
		if out, err = cur.Merge(c, paths...); err != nil {
			return fmt.Errorf("update container %q: %w", c.ID, err)
		}
		if err := out.Check(); err != nil {
			return err
		}
		out.Labels, out.Extensions = nonEmpty(out.Labels), keptAnys(out.Extensions)
		out.UpdatedAt = s.db.after(cur.UpdatedAt)
		t.deleted = out.SnapshotKey != cur.SnapshotKey || !maps.Equal(out.Labels, cur.Labels)
		return s.write(t, out)
	})
	if err != nil {
		return container.Container{}, err
	}
	return out, s.db.publish(ctx, s.ns, event.TopicContainerUpdate, event.ContainerUpdate{
		ID: string(out.ID), Image: out.Image, Labels: out.Labels, SnapshotKey: out.SnapshotKey,
	})
}

func (s *containers) Delete(ctx context.Context, id container.ID) error {
	err := s.db.update(ctx, func(t *txn) error {
		if s.find(t, kContainers, string(id)) == nil {
			return notFound("container", string(id))
		}
		t.deleted = true
		return t.remove(s.find(t, kContainers), string(id))
	})
	if err != nil {
		return err
	}
	return s.db.publish(ctx, s.ns, event.TopicContainerDelete, event.ContainerDelete{ID: string(id)})
}
