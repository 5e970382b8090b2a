package cristate

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/internal/lib/keymutex"
)

// thing is a pod or a container.
type thing interface {
	key() (id, name string)
}

// Index finds things by id, by the beginning of an id, and by name, and keeps
// the operations on one of them apart. It is safe for concurrent use.
type Index[T thing] struct {
	kind string
	ops  keymutex.Map

	mu     sync.RWMutex // guards the maps; nothing is done under it
	byID   map[string]T
	byName map[string]T
}

func newIndex[T thing](kind string) *Index[T] {
	return &Index[T]{kind: kind, byID: map[string]T{}, byName: map[string]T{}}
}

// Add makes t known. ErrAlreadyExists if its id or its name is taken.
func (x *Index[T]) Add(t T) error {
	id, name := t.key()
	x.mu.Lock()
	defer x.mu.Unlock()
	if _, ok := x.byID[id]; ok {
		return fmt.Errorf("%s %s: %w", x.kind, id, errdefs.ErrAlreadyExists)
	}
	if old, ok := x.byName[name]; ok {
		oldID, _ := old.key()
		return fmt.Errorf("%s %q is %s: %w", x.kind, name, oldID, errdefs.ErrAlreadyExists)
	}
	x.byID[id], x.byName[name] = t, t
	return nil
}

// Get finds a thing by its id or by a beginning of it that no other has.
// ErrNotFound; ErrInvalidArgument if several ids begin so, or id is empty.
func (x *Index[T]) Get(id string) (T, error) {
	var zero T
	if id == "" {
		return zero, fmt.Errorf("%s id must not be empty: %w", x.kind, errdefs.ErrInvalidArgument)
	}
	x.mu.RLock()
	defer x.mu.RUnlock()
	if t, ok := x.byID[id]; ok {
		return t, nil
	}
	var found T
	n := 0
	for full, t := range x.byID {
		if strings.HasPrefix(full, id) {
			found, n = t, n+1
		}
	}
	switch n {
	case 0:
		return zero, fmt.Errorf("%s %q: %w", x.kind, shorten(id), errdefs.ErrNotFound)
	case 1:
		return found, nil
	}
	return zero, fmt.Errorf("%s %q: %d ids begin so: %w", x.kind, id, n, errdefs.ErrInvalidArgument)
}

// ByName finds a thing by its reserved name.
func (x *Index[T]) ByName(name string) (T, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	t, ok := x.byName[name]
	return t, ok
}

// List returns all, in the order of their ids.
func (x *Index[T]) List() []T { return x.Where(func(T) bool { return true }) }

// Where returns those that keep is true of, in the order of their ids.
func (x *Index[T]) Where(keep func(T) bool) []T {
	type item struct {
		id string
		t  T
	}
	x.mu.RLock()
	items := make([]item, 0, len(x.byID))
	for id, t := range x.byID {
		items = append(items, item{id, t})
	}
	x.mu.RUnlock()
	items = slices.DeleteFunc(items, func(i item) bool { return !keep(i.t) })
	// Asking each thing for its id would lock all of them many times.
	slices.SortFunc(items, func(a, b item) int { return cmp.Compare(a.id, b.id) })
	all := make([]T, len(items))
	for i := range items {
		all[i] = items[i].t
	}
	return all
}

// Remove forgets a thing and frees its name. An unknown id is no error.
func (x *Index[T]) Remove(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if t, ok := x.byID[id]; ok {
		_, name := t.key()
		delete(x.byID, id)
		delete(x.byName, name)
	}
}

// Lock keeps other operations on id away until unlock is called. It waits no
// longer than ctx; the error then names the thing.
func (x *Index[T]) Lock(ctx context.Context, id string) (unlock func(), err error) {
	unlock, err = x.ops.Lock(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("%s %s: wait for another operation on it: %w", x.kind, shorten(id), err)
	}
	return unlock, nil
}

// shorten keeps a hostile id from filling the log.
func shorten(id string) string {
	if len(id) > 80 {
		return id[:80] + "..."
	}
	return id
}
