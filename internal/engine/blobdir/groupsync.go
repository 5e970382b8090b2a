package blobdir

import "sync"

// groupSync shares the syncs of a directory: who asks while one runs waits for
// the next, together with all others who do. So with many commits at a time
// there are two syncs for all of them, and none returns before a sync that
// began after it asked. The zero value with sync set is ready.
type groupSync struct {
	sync func(dir string) error

	mu   sync.Mutex // guards dirs
	dirs map[string]*syncQueue
}

type syncQueue struct {
	turn chan struct{} // has room for one: the sync that runs
	next *syncBatch    // guarded by groupSync.mu; nil if nobody waits to begin
}

type syncBatch struct {
	done chan struct{}
	err  error // set before done is closed
}

// Sync makes the names in dir durable that were there when it was called.
func (g *groupSync) Sync(dir string) error {
	g.mu.Lock()
	q := g.dirs[dir]
	if q == nil {
		if g.dirs == nil {
			g.dirs = make(map[string]*syncQueue)
		}
		q = &syncQueue{turn: make(chan struct{}, 1)}
		g.dirs[dir] = q
	}
	b := q.next
	leads := b == nil
	if leads {
		b = &syncBatch{done: make(chan struct{})}
		q.next = b
	}
	g.mu.Unlock()
	if !leads {
		<-b.done // as long as two syncs take
		return b.err
	}

	q.turn <- struct{}{}
	g.mu.Lock()
	q.next = nil // who comes from here on may be too late for this sync
	g.mu.Unlock()
	b.err = g.sync(dir)
	<-q.turn
	close(b.done)
	return b.err
}
