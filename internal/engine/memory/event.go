package memory

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/internal/lib/filter"
)

// Bus is an event.Bus. Every subscriber has a queue of its own without a
// bound (contract 1.3.15), so that a slow one delays nobody.
type Bus struct {
	mu     sync.RWMutex // guards what follows; held for appending to queues only
	subs   map[*subscription]struct{}
	kept   []kept
	closed bool
}

// kept is an event for those who subscribe before a time.
type kept struct {
	event.Envelope
	until time.Time
}

// NewBus makes a bus without subscribers.
func NewBus() *Bus { return &Bus{subs: map[*subscription]struct{}{}} }

// Publish implements event.Publisher.
func (b *Bus) Publish(ctx context.Context, e event.Envelope) error {
	if err := e.Check(); err != nil {
		return err
	}
	if e.Timestamp.IsZero() {
		e.Timestamp = time.Now().UTC()
	}
	b.mu.RLock()
	defer b.mu.RUnlock()
	b.push(e)
	return nil
}

// push hands e to all who listen. The caller holds mu.
func (b *Bus) push(e event.Envelope) {
	for s := range b.subs {
		if s.filter.Match(e) {
			s.push(e)
		}
	}
}

// PublishFor implements event.Retainer.
func (b *Bus) PublishFor(ctx context.Context, e event.Envelope, d time.Duration) error {
	if err := e.Check(); err != nil {
		return err
	}
	now := time.Now()
	if e.Timestamp.IsZero() {
		e.Timestamp = now.UTC()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forget(now)
	b.kept = append(b.kept, kept{e, now.Add(d)})
	b.push(e)
	return nil
}

// forget drops what was kept long enough. The caller holds mu.
func (b *Bus) forget(now time.Time) {
	b.kept = slices.DeleteFunc(b.kept, func(k kept) bool { return !now.Before(k.until) })
}

// Subscribe implements event.Bus.
func (b *Bus) Subscribe(ctx context.Context, filters ...string) (event.Subscription, error) {
	f, err := filter.Parse(filters...)
	if err != nil {
		return nil, fmt.Errorf("subscribe: %w", err)
	}
	s := &subscription{bus: b, filter: f, wake: make(chan struct{}, 1), done: make(chan struct{})}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, fmt.Errorf("subscribe: the event bus is closed: %w", errdefs.ErrUnavailable)
	}
	b.forget(time.Now())
	for _, k := range b.kept {
		if f.Match(k.Envelope) {
			s.push(k.Envelope)
		}
	}
	b.subs[s] = struct{}{}
	return s, nil
}

// Close ends all subscriptions.
func (b *Bus) Close() error {
	b.mu.Lock()
	b.closed = true
	subs := b.subs
	b.subs = map[*subscription]struct{}{}
	b.mu.Unlock()
	for s := range subs {
		s.end()
	}
	return nil
}

type subscription struct {
	bus    *Bus
	filter filter.Filter
	wake   chan struct{} // holds a token while the queue may have something
	once   sync.Once
	done   chan struct{}

	mu    sync.Mutex // guards queue
	queue []event.Envelope
}

func (s *subscription) push(e event.Envelope) {
	s.mu.Lock()
	s.queue = append(s.queue, e)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *subscription) pop() (event.Envelope, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return event.Envelope{}, false
	}
	e := s.queue[0]
	s.queue[0] = event.Envelope{}
	s.queue = s.queue[1:]
	return e, true
}

func (s *subscription) Next(ctx context.Context) (event.Envelope, error) {
	for {
		if e, ok := s.pop(); ok {
			return e, nil
		}
		select {
		case <-s.wake:
		case <-s.done:
			return event.Envelope{}, errClosed
		case <-ctx.Done():
			return event.Envelope{}, ctx.Err()
		}
	}
}

var errClosed = fmt.Errorf("the subscription is closed: %w", errdefs.ErrUnavailable)

func (s *subscription) end() { s.once.Do(func() { close(s.done) }) }

func (s *subscription) Close() error {
	s.bus.mu.Lock()
	delete(s.bus.subs, s)
	s.bus.mu.Unlock()
	s.end()
	return nil
}
