package boltmeta

import (
	"context"
	"strconv"
	"strings"
	"sync"

	"github.com/gantryd/gantry/core/namespace"
)

// pins are the names in one backend that operations under way rely on, though
// no record may name them yet: what is pinned is not reclaimed. Pinning waits
// only for the deletion of that very name.
type pins struct {
	mu sync.Mutex // guards m
	m  map[string]*pin
}

// pin is either held by count operations or, if gone is not nil, being deleted.
type pin struct {
	count int
	gone  chan struct{}
}

// hold pins name until release is called.
func (p *pins) hold(ctx context.Context, name string) (release func(), err error) {
	for {
		p.mu.Lock()
		if p.m == nil {
			p.m = map[string]*pin{}
		}
		e := p.m[name]
		if e == nil {
			e = &pin{}
			p.m[name] = e
		}
		if e.gone == nil {
			e.count++
			p.mu.Unlock()
			return func() { p.unpin(name, e) }, nil
		}
		p.mu.Unlock()
		select {
		case <-e.gone:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (p *pins) unpin(name string, e *pin) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.count--; e.count == 0 {
		delete(p.m, name)
	}
}

// claim begins the deletion of name, unless it is pinned. done ends it.
func (p *pins) claim(name string) (done func(), ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.m == nil {
		p.m = map[string]*pin{}
	}
	if p.m[name] != nil {
		return nil, false
	}
	e := &pin{gone: make(chan struct{})}
	p.m[name] = e
	return func() {
		p.mu.Lock()
		delete(p.m, name)
		p.mu.Unlock()
		close(e.gone)
	}, true
}

// held returns the names that are pinned.
func (p *pins) held() map[string]bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make(map[string]bool, len(p.m))
	for name := range p.m {
		out[name] = true
	}
	return out
}

// sequences hands out the numbers in the backends' keys. They are kept in the
// buckets' sequences as containerd does, but written together with the record
// that uses them: a number may be handed out again after a crash, and who gets
// it has to expect a leftover under the same key.
type sequences struct {
	mu   sync.Mutex // guards next
	next map[seqKey]uint64
	// saved are the numbers that were in the file when it was opened: a higher
	// one on a leftover was handed out and never written.
	saved map[seqKey]uint64
}

type seqKey struct {
	ns          namespace.ID
	snapshotter string
}

func (s *sequences) take(k seqKey) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next[k]++
	return s.next[k]
}

// loadSequences reads the numbers from the file.
func (db *DB) loadSequences() error {
	db.seqs.next, db.seqs.saved = map[seqKey]uint64{}, map[seqKey]uint64{}
	return db.view(func(t *txn) error {
		for _, ns := range t.namespaces() {
			all := t.find(string(ns), kSnapshots)
			if all == nil {
				continue
			}
			for _, sn := range bucketNames(all) {
				k := seqKey{ns, sn}
				db.seqs.next[k] = all.Bucket([]byte(sn)).Sequence()
				db.seqs.saved[k] = db.seqs.next[k]
			}
		}
		return nil
	})
}

// current returns the last number that was handed out.
func (s *sequences) current(k seqKey) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.next[k]
}

// splitBackend takes a backend key apart: "<ns>/<seq>/<key>".
func splitBackend(backend string) (ns namespace.ID, seq uint64, key string, ok bool) {
	a, rest, ok1 := strings.Cut(backend, "/")
	b, key, ok2 := strings.Cut(rest, "/")
	seq, err := strconv.ParseUint(b, 10, 64)
	return namespace.ID(a), seq, key, ok1 && ok2 && err == nil
}
