package boltmeta

import (
	"context"
	"fmt"
	"maps"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
)

type images struct{ *records }

// kept returns what reading a record back will give.
func kept(i image.Image) image.Image {
	i.Labels = nonEmpty(i.Labels)
	i.Target = image.Stored(i.Target)
	i.Target.Annotations = nonEmpty(i.Target.Annotations)
	return i
}

func readImage(name string, b *bolt.Bucket) (image.Image, error) {
	i := image.Image{Name: name, Labels: readMap(b, kLabels), CreatedAt: readTime(b, kCreated), UpdatedAt: readTime(b, kUpdated)}
	i.Target.Annotations = readMap(b, kAnnotations)
	if t := b.Bucket([]byte(kTarget)); t != nil {
		i.Target.Digest = digest.Digest(readString(t, kDigest))
		i.Target.MediaType = readString(t, kMediaType)
		i.Target.Size = readVarint(t.Get([]byte(kSize)))
	}
	return i, nil
}

func (s *images) write(t *txn, i image.Image) error {
	b, err := s.make(t, kImages, i.Name)
	if err != nil {
		return err
	}
	if err := t.putTimes(b, i.CreatedAt, i.UpdatedAt); err != nil {
		return err
	}
	if err := t.putMap(b, kLabels, i.Labels); err != nil {
		return err
	}
	if err := t.putMap(b, kAnnotations, i.Target.Annotations); err != nil {
		return err
	}
	target, err := t.sub(b, kTarget)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		key   string
		value []byte
	}{{kDigest, []byte(i.Target.Digest)}, {kMediaType, []byte(i.Target.MediaType)}, {kSize, varint(i.Target.Size)}} {
		if err := t.put(target, f.key, f.value); err != nil {
			return err
		}
	}
	return nil
}

func (s *images) Get(_ context.Context, name string) (i image.Image, err error) {
	err = s.db.view(func(t *txn) error {
		b := s.find(t, kImages, name)
		if b == nil {
			return notFound("image", name)
		}
		i, err = readImage(name, b)
		return err
	})
	return i, err
}

func (s *images) List(_ context.Context, filters ...string) (all []image.Image, err error) {
	err = scan(s.records, readImage, image.Image.Field, func(i image.Image) error {
		all = append(all, i)
		return nil
	}, filters, kImages)
	return all, err
}

func (s *images) Create(ctx context.Context, i image.Image) (image.Image, error) {
	if err := i.Check(); err != nil {
		return image.Image{}, err
	}
	i = kept(i)
	if i.CreatedAt.IsZero() {
		i.CreatedAt = s.db.now()
	}
	i.CreatedAt = i.CreatedAt.UTC()
	i.UpdatedAt = i.CreatedAt
	var there bool
	err := s.db.update(ctx, func(t *txn) error {
		if err := s.leaseExists(t); err != nil {
			return err
		}
		there = s.find(t, kImages, i.Name) != nil
		// An image is a root: only one that expires has use for a lease
		// (contract 1.3.17, 4.2.4).
		if _, expires := i.Labels[lease.LabelExpire]; expires {
			if err := s.hold(t, kImages, i.Name); err != nil {
				return err
			}
		}
		if there {
			return nil
		}
		return s.write(t, i)
	})
	if err == nil && there {
		err = exists("image", i.Name)
	}
	if err != nil {
		return image.Image{}, err
	}
	return i, s.db.publish(ctx, s.ns, event.TopicImageCreate, event.ImageCreate{Name: i.Name, Labels: i.Labels})
}

func (s *images) Update(ctx context.Context, i image.Image, paths ...string) (out image.Image, err error) {
	if i.Name == "" {
		return image.Image{}, fmt.Errorf("image name must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	err = s.db.update(ctx, func(t *txn) error {
		b := s.find(t, kImages, i.Name)
		if b == nil {
			return notFound("image", i.Name)
		}
		cur, err := readImage(i.Name, b)
		if err != nil {
			return err
		}
		if out, err = cur.Merge(i, paths...); err != nil {
			return fmt.Errorf("update image %q: %w", i.Name, err)
		}
		if err := out.Check(); err != nil {
			return err
		}
		if out.UpdatedAt = i.UpdatedAt.UTC(); i.UpdatedAt.IsZero() {
			out.UpdatedAt = s.db.after(cur.UpdatedAt)
		}
		out = kept(out)
		t.deleted = out.Target.Digest != cur.Target.Digest || !maps.Equal(out.Labels, cur.Labels)
		return s.write(t, out)
	})
	if err != nil {
		return image.Image{}, err
	}
	return out, s.db.publish(ctx, s.ns, event.TopicImageUpdate, event.ImageUpdate{Name: out.Name, Labels: out.Labels})
}

func (s *images) Delete(ctx context.Context, name string, opts image.DeleteOptions) error {
	err := s.db.update(ctx, func(t *txn) error {
		b := s.find(t, kImages, name)
		if b == nil {
			return notFound("image", name)
		}
		if opts.Target != nil {
			cur, err := readImage(name, b)
			if err != nil {
				return err
			}
			if cur.Target.Digest != opts.Target.Digest {
				return fmt.Errorf("image %q points at %s, not at %s: %w", name, cur.Target.Digest, opts.Target.Digest, errdefs.ErrNotFound)
			}
		}
		t.deleted = true
		return t.remove(s.find(t, kImages), name)
	})
	if err != nil {
		return err
	}
	return s.db.publish(ctx, s.ns, event.TopicImageDelete, event.ImageDelete{Name: name})
}
