// Package keymutex is a mutex for each of many names, taken with a deadline.
// It holds memory only for names that are locked.
package keymutex

import (
	"context"
	"sync"
)

// Map is a set of mutexes by name. The zero Map is ready.
type Map struct {
	mu   sync.Mutex
	held map[string]*entry
}

type entry struct {
	token chan struct{} // holds one value while free
	users int           // holder and waiters, guarded by Map.mu
}

// Lock waits for the name and returns what frees it again. If ctx ends first
// its cause is returned and nothing is held.
func (m *Map) Lock(ctx context.Context, name string) (unlock func(), err error) {
	m.mu.Lock()
	if m.held == nil {
		m.held = map[string]*entry{}
	}
	e := m.held[name]
	if e == nil {
		e = &entry{token: make(chan struct{}, 1)}
		e.token <- struct{}{}
		m.held[name] = e
	}
	e.users++
	m.mu.Unlock()
	select {
	case <-e.token:
		return sync.OnceFunc(func() {
			e.token <- struct{}{}
			m.leave(name, e)
		}), nil
	case <-ctx.Done():
		m.leave(name, e)
		return nil, context.Cause(ctx)
	}
}

func (m *Map) leave(name string, e *entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.users--; e.users == 0 {
		delete(m.held, name)
	}
}
