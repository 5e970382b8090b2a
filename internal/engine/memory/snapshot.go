package memory

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/lib/fields"
	"github.com/gantryd/gantry/internal/lib/filter"
)

// Snapshots is a snapshot.Store and a snapshot.Cleaner. Its mounts are of the
// type "memory" and name snapshots; nobody can mount them, and nothing uses space.
type Snapshots struct {
	mu   sync.Mutex // guards all below
	all  map[string]*memSnapshot
	next int
}

type memSnapshot struct {
	snapshot.Info
	id int
}

// NewSnapshots makes an empty store.
func NewSnapshots() *Snapshots { return &Snapshots{all: map[string]*memSnapshot{}} }

func (s *Snapshots) get(key string) (*memSnapshot, error) {
	if key == "" {
		return nil, fmt.Errorf("snapshot without a key: %w", errdefs.ErrInvalidArgument)
	}
	m := s.all[key]
	if m == nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound)
	}
	return m, nil
}

func (s *Snapshots) parent(key string) error {
	if key == "" {
		return nil
	}
	p, err := s.get(key)
	if err != nil {
		return fmt.Errorf("parent: %w", err)
	}
	if p.Kind != snapshot.KindCommitted {
		return fmt.Errorf("parent %s is not committed: %w", key, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (m *memSnapshot) info() snapshot.Info {
	i := m.Info
	i.Labels = maps.Clone(i.Labels)
	return i
}

// Stat is snapshot.Store's.
func (s *Snapshots) Stat(_ context.Context, key string) (snapshot.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.get(key)
	if err != nil {
		return snapshot.Info{}, err
	}
	return m.info(), nil
}

// Update is snapshot.Store's.
func (s *Snapshots) Update(_ context.Context, info snapshot.Info, paths ...string) (snapshot.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.get(info.Name)
	if err != nil {
		return snapshot.Info{}, err
	}
	labels, err := fields.Labels(m.Labels, info.Labels, paths)
	if err != nil {
		return snapshot.Info{}, fmt.Errorf("snapshot %s: %w", info.Name, err)
	}
	m.Labels, m.UpdatedAt = labels, time.Now().UTC()
	return m.info(), nil
}

// Usage is snapshot.Store's; it is always zero.
func (s *Snapshots) Usage(_ context.Context, key string) (snapshot.Usage, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.get(key)
	return snapshot.Usage{}, err
}

// Mounts is snapshot.Store's.
func (s *Snapshots) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.get(key)
	if err != nil {
		return nil, err
	}
	if m.Kind == snapshot.KindCommitted {
		return nil, fmt.Errorf("mounts of snapshot %s: it is committed: %w", key, errdefs.ErrFailedPrecondition)
	}
	return m.mounts(), nil
}

func (m *memSnapshot) mounts() []mount.Mount {
	mode := "rw"
	if m.Kind == snapshot.KindView {
		mode = "ro"
	}
	return []mount.Mount{{Type: "memory", Source: strconv.Itoa(m.id), Options: []string{mode}}}
}

// Prepare is snapshot.Store's.
func (s *Snapshots) Prepare(_ context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	return s.make(snapshot.KindActive, key, parent, labels)
}

// View is snapshot.Store's.
func (s *Snapshots) View(_ context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	return s.make(snapshot.KindView, key, parent, labels)
}

func (s *Snapshots) make(kind snapshot.Kind, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch _, err := s.get(key); {
	case err == nil:
		return nil, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrAlreadyExists)
	case !errdefs.IsNotFound(err):
		return nil, err
	}
	if err := s.parent(parent); err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, err)
	}
	s.next++
	now := time.Now().UTC()
	m := &memSnapshot{id: s.next, Info: snapshot.Info{
		Name: key, Parent: parent, Kind: kind, CreatedAt: now, UpdatedAt: now, Labels: maps.Clone(labels),
	}}
	s.all[key] = m
	return m.mounts(), nil
}

// Commit is snapshot.Store's.
func (s *Snapshots) Commit(_ context.Context, name, key string, opts snapshot.CommitOptions) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.get(key)
	if err != nil {
		return fmt.Errorf("commit as %s: %w", name, err)
	}
	switch _, err := s.get(name); {
	case err == nil:
		return fmt.Errorf("commit %s as %s: %w", key, name, errdefs.ErrAlreadyExists)
	case !errdefs.IsNotFound(err):
		return fmt.Errorf("commit %s: %w", key, err)
	}
	if m.Kind != snapshot.KindActive {
		return fmt.Errorf("commit %s as %s: it is not active: %w", key, name, errdefs.ErrFailedPrecondition)
	}
	if opts.Parent != "" && opts.Parent != m.Parent {
		if m.Parent != "" {
			return fmt.Errorf("commit %s as %s: it stands on %s, not on %s: %w", key, name, m.Parent, opts.Parent, errdefs.ErrInvalidArgument)
		}
		if err := s.parent(opts.Parent); err != nil {
			return fmt.Errorf("commit %s as %s: %w", key, name, err)
		}
		m.Parent = opts.Parent
	}
	delete(s.all, key)
	m.Name, m.Kind, m.Labels = name, snapshot.KindCommitted, maps.Clone(opts.Labels)
	m.CreatedAt = time.Now().UTC()
	m.UpdatedAt = m.CreatedAt
	s.all[name] = m
	return nil
}

// Remove is snapshot.Store's.
func (s *Snapshots) Remove(_ context.Context, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.get(key); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	for _, m := range s.all {
		if m.Parent == key {
			return fmt.Errorf("remove: snapshot %s has children, one is %s: %w", key, m.Name, errdefs.ErrFailedPrecondition)
		}
	}
	delete(s.all, key)
	return nil
}

// Walk is snapshot.Store's, in the order of the keys.
func (s *Snapshots) Walk(ctx context.Context, fn func(snapshot.Info) error, filters ...string) error {
	f, err := filter.Parse(filters...)
	if err != nil {
		return err
	}
	s.mu.Lock()
	var found []snapshot.Info
	for _, key := range slices.Sorted(maps.Keys(s.all)) {
		if m := s.all[key]; f.Match(m.Info) {
			found = append(found, m.info())
		}
	}
	s.mu.Unlock()
	for _, info := range found {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

// Cleanup is snapshot.Cleaner's; there is never anything to do.
func (s *Snapshots) Cleanup(context.Context) error { return nil }
