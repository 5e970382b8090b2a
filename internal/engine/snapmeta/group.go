package snapmeta

import (
	"context"
	"sync"
)

// group lets many callers share one slow operation. Each one gets a run that
// began after it asked; runs do not overlap.
type group struct {
	do func() error

	mu      sync.Mutex // guards next and running
	next    *flight
	running bool
	owned   sync.WaitGroup
}

type flight struct {
	done chan struct{}
	err  error
}

// wait returns the result of a run that begins after the call, or the error of
// ctx as soon as that ends.
func (g *group) wait(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	f := g.join()
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// join returns a run that has not begun yet.
func (g *group) join() *flight {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.next == nil {
		g.next = &flight{done: make(chan struct{})}
	}
	if !g.running {
		g.running = true
		g.owned.Add(1)
		go g.fly()
	}
	return g.next
}

// fly runs flights until nobody waits for one.
func (g *group) fly() {
	defer g.owned.Done()
	for {
		g.mu.Lock()
		f := g.next
		g.next = nil
		g.running = f != nil
		g.mu.Unlock()
		if f == nil {
			return
		}
		f.err = g.do()
		close(f.done)
	}
}

// close returns when no run is left.
func (g *group) close() { g.owned.Wait() }
