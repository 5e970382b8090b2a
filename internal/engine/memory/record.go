package memory

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/lib/fields"
	"github.com/gantryd/gantry/internal/lib/filter"
)

// table is a map of records under a lock. Records are values that nobody
// changes once they are in: every change stores a new one.
type table[R any] struct {
	noun string
	mu   sync.RWMutex // guards rows
	rows map[string]R
}

func newTable[R any](noun string) table[R] { return table[R]{noun: noun, rows: map[string]R{}} }

func (t *table[R]) get(id string) (R, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	r, ok := t.rows[id]
	if !ok {
		return r, fmt.Errorf("%s %q: %w", t.noun, id, errdefs.ErrNotFound)
	}
	return r, nil
}

func (t *table[R]) create(id string, r R) (R, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.rows[id]; ok {
		return r, fmt.Errorf("%s %q: %w", t.noun, id, errdefs.ErrAlreadyExists)
	}
	t.rows[id] = r
	return r, nil
}

func (t *table[R]) update(id string, change func(R) (R, error)) (R, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.rows[id]
	if !ok {
		return r, fmt.Errorf("%s %q: %w", t.noun, id, errdefs.ErrNotFound)
	}
	r, err := change(r)
	if err == nil {
		t.rows[id] = r
	}
	return r, err
}

func (t *table[R]) remove(id string, check func(R) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.rows[id]
	if !ok {
		return fmt.Errorf("%s %q: %w", t.noun, id, errdefs.ErrNotFound)
	}
	if check != nil {
		if err := check(r); err != nil {
			return err
		}
	}
	delete(t.rows, id)
	return nil
}

// list returns the records that match, in the order of their ids.
func (t *table[R]) list(field func(R, []string) (string, bool), filters []string) ([]R, error) {
	f, err := filter.Parse(filters...)
	if err != nil {
		return nil, err
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	var out []R
	for _, id := range slices.Sorted(maps.Keys(t.rows)) {
		r := t.rows[id]
		if f.Match(filter.Func(func(p []string) (string, bool) { return field(r, p) })) {
			out = append(out, r)
		}
	}
	return out, nil
}

// labels copies m without the empty values, which mean absence (contract 1.2.5).
func labels(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	m = maps.Clone(m)
	maps.DeleteFunc(m, func(_, v string) bool { return v == "" })
	return m
}

func cloneAny(a typed.Any) typed.Any {
	a.Value = slices.Clone(a.Value)
	return a
}

func cloneAnys(m map[string]typed.Any) map[string]typed.Any {
	if len(m) == 0 {
		return nil
	}
	out := make(map[string]typed.Any, len(m))
	for k, v := range m {
		out[k] = cloneAny(v)
	}
	return out
}

// after returns now, or just after t where the clock has not moved on.
func after(t time.Time) time.Time {
	now := time.Now().UTC()
	if !now.After(t) {
		now = t.Add(1)
	}
	return now
}

// Images is an image.Store. Delete with Sync waits for nothing: there is no collector.
type Images struct{ t table[image.Image] }

// NewImages returns an empty store.
func NewImages() *Images { return &Images{newTable[image.Image]("image")} }

func cloneImage(i image.Image) image.Image {
	i.Labels = labels(i.Labels)
	i.Target = image.Stored(i.Target)
	i.Target.Annotations = labels(i.Target.Annotations)
	return i
}

// Get implements image.Store.
func (s *Images) Get(_ context.Context, name string) (image.Image, error) {
	i, err := s.t.get(name)
	return cloneImage(i), err
}

// List implements image.Store.
func (s *Images) List(_ context.Context, filters ...string) ([]image.Image, error) {
	l, err := s.t.list(image.Image.Field, filters)
	for n := range l {
		l[n] = cloneImage(l[n])
	}
	return l, err
}

// Create implements image.Store.
func (s *Images) Create(_ context.Context, img image.Image) (image.Image, error) {
	if err := img.Check(); err != nil {
		return image.Image{}, err
	}
	img = cloneImage(img)
	if img.CreatedAt.IsZero() {
		img.CreatedAt = time.Now().UTC()
	}
	img.UpdatedAt = img.CreatedAt
	img, err := s.t.create(img.Name, img)
	return cloneImage(img), err
}

// Update implements image.Store.
func (s *Images) Update(_ context.Context, img image.Image, paths ...string) (image.Image, error) {
	if img.Name == "" {
		return image.Image{}, fmt.Errorf("image name must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	img, err := s.t.update(img.Name, func(cur image.Image) (image.Image, error) {
		out, err := cur.Merge(img, paths...)
		if err != nil {
			return cur, err
		}
		if out.UpdatedAt = img.UpdatedAt; out.UpdatedAt.IsZero() {
			out.UpdatedAt = after(cur.UpdatedAt)
		}
		return cloneImage(out), out.Check()
	})
	return cloneImage(img), err
}

// Delete implements image.Store.
func (s *Images) Delete(_ context.Context, name string, opts image.DeleteOptions) error {
	return s.t.remove(name, func(i image.Image) error {
		if opts.Target != nil && opts.Target.Digest != i.Target.Digest {
			return fmt.Errorf("image %q points at %s, not at %s: %w", name, i.Target.Digest, opts.Target.Digest, errdefs.ErrNotFound)
		}
		return nil
	})
}

// Containers is a container.Store.
type Containers struct{ t table[container.Container] }

// NewContainers returns an empty store.
func NewContainers() *Containers {
	return &Containers{newTable[container.Container]("container")}
}

func cloneContainer(c container.Container) container.Container {
	c.Labels = labels(c.Labels)
	c.Extensions = cloneAnys(c.Extensions)
	c.Spec = cloneAny(c.Spec)
	c.Runtime.Options = cloneAny(c.Runtime.Options)
	return c
}

// Get implements container.Store.
func (s *Containers) Get(_ context.Context, id container.ID) (container.Container, error) {
	c, err := s.t.get(string(id))
	return cloneContainer(c), err
}

// Walk implements container.Store.
func (s *Containers) Walk(_ context.Context, fn func(container.Container) error, filters ...string) error {
	l, err := s.t.list(container.Container.Field, filters)
	if err != nil {
		return err
	}
	for _, c := range l {
		if err := fn(cloneContainer(c)); err != nil {
			return err
		}
	}
	return nil
}

// Create implements container.Store.
func (s *Containers) Create(_ context.Context, c container.Container) (container.Container, error) {
	if err := c.Check(); err != nil {
		return container.Container{}, err
	}
	c = cloneContainer(c)
	c.CreatedAt = time.Now().UTC()
	c.UpdatedAt = c.CreatedAt
	c, err := s.t.create(string(c.ID), c)
	return cloneContainer(c), err
}

// Update implements container.Store.
func (s *Containers) Update(_ context.Context, c container.Container, paths ...string) (container.Container, error) {
	c, err := s.t.update(string(c.ID), func(cur container.Container) (container.Container, error) {
		out, err := cur.Merge(c, paths...)
		if err != nil {
			return cur, err
		}
		out.UpdatedAt = after(cur.UpdatedAt)
		return cloneContainer(out), out.Check()
	})
	return cloneContainer(c), err
}

// Delete implements container.Store.
func (s *Containers) Delete(_ context.Context, id container.ID) error {
	return s.t.remove(string(id), nil)
}

// Sandboxes is a sandbox.Store.
type Sandboxes struct{ t table[sandbox.Sandbox] }

// NewSandboxes returns an empty store.
func NewSandboxes() *Sandboxes { return &Sandboxes{newTable[sandbox.Sandbox]("sandbox")} }

func cloneSandbox(b sandbox.Sandbox) sandbox.Sandbox {
	b.Labels = labels(b.Labels)
	b.Extensions = cloneAnys(b.Extensions)
	b.Spec = cloneAny(b.Spec)
	b.Runtime.Options = cloneAny(b.Runtime.Options)
	return b
}

// Get implements sandbox.Store.
func (s *Sandboxes) Get(_ context.Context, id string) (sandbox.Sandbox, error) {
	b, err := s.t.get(id)
	return cloneSandbox(b), err
}

// List implements sandbox.Store.
func (s *Sandboxes) List(_ context.Context, filters ...string) ([]sandbox.Sandbox, error) {
	l, err := s.t.list(sandbox.Sandbox.Field, filters)
	for n := range l {
		l[n] = cloneSandbox(l[n])
	}
	return l, err
}

// Create implements sandbox.Store.
func (s *Sandboxes) Create(_ context.Context, b sandbox.Sandbox) (sandbox.Sandbox, error) {
	if err := b.Check(); err != nil {
		return sandbox.Sandbox{}, err
	}
	b = cloneSandbox(b)
	b.CreatedAt = time.Now().UTC()
	b.UpdatedAt = b.CreatedAt
	b, err := s.t.create(b.ID, b)
	return cloneSandbox(b), err
}

// Update implements sandbox.Store.
func (s *Sandboxes) Update(_ context.Context, b sandbox.Sandbox, paths ...string) (sandbox.Sandbox, error) {
	b, err := s.t.update(b.ID, func(cur sandbox.Sandbox) (sandbox.Sandbox, error) {
		out, err := cur.Merge(b, paths...)
		if err != nil {
			return cur, err
		}
		out.UpdatedAt = after(cur.UpdatedAt)
		return cloneSandbox(out), out.Check()
	})
	return cloneSandbox(b), err
}

// Delete implements sandbox.Store.
func (s *Sandboxes) Delete(_ context.Context, id string) error { return s.t.remove(id, nil) }

// leased is a lease and what it holds.
type leased struct {
	lease.Lease
	held map[lease.Resource]bool
}

// Leases is a lease.Store. It holds names only: nothing is collected here.
type Leases struct{ t table[leased] }

// NewLeases returns an empty store.
func NewLeases() *Leases { return &Leases{newTable[leased]("lease")} }

// Create implements lease.Store.
func (s *Leases) Create(_ context.Context, l lease.Lease) (lease.Lease, error) {
	if l.ID == "" {
		l.ID = lease.Generate(time.Now())
	}
	if err := l.Check(); err != nil {
		return lease.Lease{}, err
	}
	l.Labels = labels(l.Labels)
	l.CreatedAt = time.Now().UTC()
	out, err := s.t.create(string(l.ID), leased{l, nil})
	out.Labels = labels(out.Labels)
	return out.Lease, err
}

// Delete implements lease.Store.
func (s *Leases) Delete(_ context.Context, id lease.ID, _ bool) error {
	return s.t.remove(string(id), nil)
}

// List implements lease.Store.
func (s *Leases) List(_ context.Context, filters ...string) ([]lease.Lease, error) {
	l, err := s.t.list(func(l leased, p []string) (string, bool) { return l.Field(p) }, filters)
	var out []lease.Lease
	for _, l := range l {
		l.Labels = labels(l.Labels)
		out = append(out, l.Lease)
	}
	return out, err
}

// AddResource implements lease.Store.
func (s *Leases) AddResource(_ context.Context, id lease.ID, r lease.Resource) error {
	return s.change(id, r, func(held map[lease.Resource]bool) { held[r] = true })
}

// RemoveResource implements lease.Store.
func (s *Leases) RemoveResource(_ context.Context, id lease.ID, r lease.Resource) error {
	return s.change(id, r, func(held map[lease.Resource]bool) { delete(held, r) })
}

func (s *Leases) change(id lease.ID, r lease.Resource, do func(map[lease.Resource]bool)) error {
	if err := r.Check(); err != nil {
		return err
	}
	_, err := s.t.update(string(id), func(l leased) (leased, error) {
		held := maps.Clone(l.held)
		if held == nil {
			held = map[lease.Resource]bool{}
		}
		do(held)
		l.held = held
		return l, nil
	})
	return err
}

// Resources implements lease.Store.
func (s *Leases) Resources(_ context.Context, id lease.ID) ([]lease.Resource, error) {
	l, err := s.t.get(string(id))
	return slices.SortedFunc(maps.Keys(l.held), func(a, b lease.Resource) int {
		return strings.Compare(a.Type+"\x00"+a.ID, b.Type+"\x00"+b.ID)
	}), err
}

// Namespaces is a namespace.Store.
type Namespaces struct {
	t table[namespace.Namespace]
	// holds says what is still in a namespace.
	holds []func(namespace.ID) []string
}

// NewNamespaces returns an empty store. Delete asks each of holds what is
// still in the namespace: names such as "images".
func NewNamespaces(holds ...func(namespace.ID) []string) *Namespaces {
	return &Namespaces{newTable[namespace.Namespace]("namespace"), holds}
}

func cloneNamespace(n namespace.Namespace) namespace.Namespace {
	n.Labels = labels(n.Labels)
	return n
}

// Get implements namespace.Store.
func (s *Namespaces) Get(_ context.Context, id namespace.ID) (namespace.Namespace, error) {
	if err := namespace.Check(id); err != nil {
		return namespace.Namespace{}, err
	}
	n, err := s.t.get(string(id))
	if err != nil {
		return namespace.Namespace{ID: id}, nil
	}
	return cloneNamespace(n), nil
}

// List implements namespace.Store.
func (s *Namespaces) List(context.Context) ([]namespace.Namespace, error) {
	l, err := s.t.list(func(namespace.Namespace, []string) (string, bool) { return "", false }, nil)
	for n := range l {
		l[n] = cloneNamespace(l[n])
	}
	return l, err
}

// Create implements namespace.Store.
func (s *Namespaces) Create(_ context.Context, n namespace.Namespace) (namespace.Namespace, error) {
	if err := namespace.Check(n.ID); err != nil {
		return namespace.Namespace{}, err
	}
	if err := ident.CheckLabels(n.Labels); err != nil {
		return namespace.Namespace{}, fmt.Errorf("namespace %s: %w", n.ID, err)
	}
	n, err := s.t.create(string(n.ID), cloneNamespace(n))
	return cloneNamespace(n), err
}

// Update implements namespace.Store.
func (s *Namespaces) Update(_ context.Context, n namespace.Namespace, paths ...string) (namespace.Namespace, error) {
	if err := namespace.Check(n.ID); err != nil {
		return namespace.Namespace{}, err
	}
	n, err := s.t.update(string(n.ID), func(cur namespace.Namespace) (namespace.Namespace, error) {
		l, err := fields.Labels(cur.Labels, n.Labels, paths)
		if err != nil {
			return cur, err
		}
		if err := ident.CheckLabels(l); err != nil {
			return cur, fmt.Errorf("namespace %s: %w", n.ID, err)
		}
		return namespace.Namespace{ID: n.ID, Labels: labels(l)}, nil
	})
	return cloneNamespace(n), err
}

// Delete implements namespace.Store.
func (s *Namespaces) Delete(_ context.Context, id namespace.ID) error {
	if err := namespace.Check(id); err != nil {
		return err
	}
	return s.t.remove(string(id), func(namespace.Namespace) error {
		var held []string
		for _, h := range s.holds {
			held = append(held, h(id)...)
		}
		if len(held) > 0 {
			return fmt.Errorf("delete namespace %s: it still has %s: %w", id, strings.Join(held, ", "), errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}
