package memory

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/typed"
)

// Streams keeps the open streams of all namespaces, also of none: streams are
// opened without one as well (contract 15, 1.2.1). It is what the daemon uses;
// a stream lives as long as the connection it came with. It is safe for
// concurrent use.
type Streams struct {
	mu   sync.Mutex
	open map[streamKey]stream.Stream
}

type streamKey struct {
	ns namespace.ID
	id string
}

// NewStreams makes an empty registry of streams.
func NewStreams() *Streams { return &Streams{open: map[streamKey]stream.Stream{}} }

// In returns the streams of a namespace, which may be "".
func (s *Streams) In(ns namespace.ID) stream.Manager { return &streamsIn{s, ns} }

// Len is the number of streams that are registered, of all namespaces.
func (s *Streams) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

type streamsIn struct {
	s  *Streams
	ns namespace.ID
}

// Get implements stream.Manager.
func (m *streamsIn) Get(_ context.Context, id string) (stream.Stream, error) {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	if st, ok := m.s.open[streamKey{m.ns, id}]; ok {
		return st, nil
	}
	return nil, fmt.Errorf("stream %.100q: %w", id, errdefs.ErrNotFound)
}

// Register implements stream.Manager.
func (m *streamsIn) Register(_ context.Context, id string, st stream.Stream) (func(), error) {
	if id == "" || len(id) > stream.MaxID {
		return nil, fmt.Errorf("stream: an id of %d bytes: %w", len(id), errdefs.ErrInvalidArgument)
	}
	key := streamKey{m.ns, id}
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	if _, taken := m.s.open[key]; taken {
		return nil, fmt.Errorf("stream %.100q: %w", id, errdefs.ErrAlreadyExists)
	}
	m.s.open[key] = st
	return sync.OnceFunc(func() {
		m.s.mu.Lock()
		defer m.s.mu.Unlock()
		delete(m.s.open, key)
	}), nil
}

// StreamPair makes two ends of a stream, for tests and for clients in the same process.
func StreamPair() (a, b stream.Stream) {
	ab, ba := make(chan typed.Any), make(chan typed.Any)
	aDone, bDone := make(chan struct{}), make(chan struct{})
	return &pipeEnd{in: ba, out: ab, mine: aDone, theirs: bDone, once: new(sync.Once)},
		&pipeEnd{in: ab, out: ba, mine: bDone, theirs: aDone, once: new(sync.Once)}
}

type pipeEnd struct {
	in, out      chan typed.Any
	mine, theirs chan struct{} // closed when the end is
	once         *sync.Once
}

func (p *pipeEnd) Send(v typed.Any) error {
	select {
	case <-p.mine:
		return io.ErrClosedPipe
	case <-p.theirs:
		return io.ErrClosedPipe
	default:
	}
	select {
	case p.out <- cloneAny(v):
		return nil
	case <-p.mine:
		return io.ErrClosedPipe
	case <-p.theirs:
		return io.ErrClosedPipe
	}
}

func (p *pipeEnd) Receive() (typed.Any, error) {
	select {
	case v := <-p.in:
		return v, nil
	case <-p.theirs:
		return typed.Any{}, io.EOF
	case <-p.mine:
		return typed.Any{}, io.ErrClosedPipe
	}
}

func (p *pipeEnd) Close() error {
	p.once.Do(func() { close(p.mine) })
	return nil
}
