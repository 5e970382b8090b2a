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

// record is what images, containers and sandboxes have in common.
type record[R any] interface {
	Check() error
	Field(path []string) (string, bool)
	Merge(change R, paths ...string) (R, error)
}

// records are the methods that their stores have in common.
type records[ID ~string, R record[R]] struct {
	t     table[R]
	clone func(R) R
	id    func(R) ID
	// times are where a record has those of its creation and last change.
	times func(*R) (created, updated *time.Time)
}

// Get implements the store.
func (s *records[ID, R]) Get(_ context.Context, id ID) (R, error) {
	r, err := s.t.get(string(id))
	return s.clone(r), err
}

// List implements the store.
func (s *records[ID, R]) List(_ context.Context, filters ...string) ([]R, error) {
	l, err := s.t.list(R.Field, filters)
	for n := range l {
		l[n] = s.clone(l[n])
	}
	return l, err
}

// Walk implements the store.
func (s *records[ID, R]) Walk(ctx context.Context, fn func(R) error, filters ...string) error {
	l, err := s.List(ctx, filters...)
	if err != nil {
		return err
	}
	for _, r := range l {
		if err := fn(r); err != nil {
			return err
		}
	}
	return nil
}

// Create implements the store.
func (s *records[ID, R]) Create(_ context.Context, r R) (R, error) {
	return s.create(r, time.Now().UTC())
}

func (s *records[ID, R]) create(r R, at time.Time) (R, error) {
	if err := r.Check(); err != nil {
		var none R
		return none, err
	}
	r = s.clone(r)
	created, updated := s.times(&r)
	*created, *updated = at, at
	r, err := s.t.create(string(s.id(r)), r)
	return s.clone(r), err
}

// Update implements the store.
func (s *records[ID, R]) Update(_ context.Context, r R, paths ...string) (R, error) {
	return s.update(r, time.Time{}, paths)
}

// update changes a record at a time, or now.
func (s *records[ID, R]) update(r R, at time.Time, paths []string) (R, error) {
	r, err := s.t.update(string(s.id(r)), func(cur R) (R, error) {
		out, err := cur.Merge(r, paths...)
		if err != nil {
			return cur, err
		}
		_, last := s.times(&cur)
		_, updated := s.times(&out)
		if *updated = at; at.IsZero() {
			*updated = after(*last)
		}
		return s.clone(out), out.Check()
	})
	return s.clone(r), err
}

// Delete implements the store.
func (s *records[ID, R]) Delete(_ context.Context, id ID) error { return s.t.remove(string(id), nil) }

// Images is an image.Store. Delete with Sync waits for nothing: there is no collector.
type Images struct{ records[string, image.Image] }

// NewImages returns an empty store.
func NewImages() *Images {
	return &Images{records[string, image.Image]{newTable[image.Image]("image"), cloneImage,
		func(i image.Image) string { return i.Name }, func(i *image.Image) (created, updated *time.Time) { return &i.CreatedAt, &i.UpdatedAt }}}
}

func cloneImage(i image.Image) image.Image {
	i.Labels = labels(i.Labels)
	i.Target = image.Stored(i.Target)
	i.Target.Annotations = labels(i.Target.Annotations)
	return i
}

// Create implements image.Store.
func (s *Images) Create(_ context.Context, img image.Image) (image.Image, error) {
	at := img.CreatedAt
	if at.IsZero() {
		at = time.Now().UTC()
	}
	return s.create(img, at)
}

// Update implements image.Store.
func (s *Images) Update(_ context.Context, img image.Image, paths ...string) (image.Image, error) {
	if img.Name == "" {
		return image.Image{}, fmt.Errorf("image name must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	return s.update(img, img.UpdatedAt, paths)
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
type Containers struct {
	records[container.ID, container.Container]
}

// NewContainers returns an empty store.
func NewContainers() *Containers {
	return &Containers{records[container.ID, container.Container]{newTable[container.Container]("container"), cloneContainer,
		func(c container.Container) container.ID { return c.ID },
		func(c *container.Container) (created, updated *time.Time) { return &c.CreatedAt, &c.UpdatedAt }}}
}

func cloneContainer(c container.Container) container.Container {
	c.Labels = labels(c.Labels)
	c.Extensions = cloneAnys(c.Extensions)
	c.Spec = cloneAny(c.Spec)
	c.Runtime.Options = cloneAny(c.Runtime.Options)
	return c
}

// Sandboxes is a sandbox.Store.
type Sandboxes struct {
	records[string, sandbox.Sandbox]
}

// NewSandboxes returns an empty store.
func NewSandboxes() *Sandboxes {
	return &Sandboxes{records[string, sandbox.Sandbox]{newTable[sandbox.Sandbox]("sandbox"), cloneSandbox,
		func(b sandbox.Sandbox) string { return b.ID },
		func(b *sandbox.Sandbox) (created, updated *time.Time) { return &b.CreatedAt, &b.UpdatedAt }}}
}

func cloneSandbox(b sandbox.Sandbox) sandbox.Sandbox {
	b.Labels = labels(b.Labels)
	b.Extensions = cloneAnys(b.Extensions)
	b.Spec = cloneAny(b.Spec)
	b.Runtime.Options = cloneAny(b.Runtime.Options)
	return b
}

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
