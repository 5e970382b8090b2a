package cristate

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// eventsKept is how many events wait for the first subscriber, and how far
	// one may fall behind.
	eventsKept = 10_000
	// eventsFor is how long they wait while nobody is subscribed (contract 7.1.22).
	eventsFor = 5 * time.Minute
)

// Events hands what happens to pods and containers to all subscribers. None of
// them can hold up another or the publisher. It is safe for concurrent use.
type Events struct {
	now func() time.Time

	mu      sync.Mutex
	early   []kept // while nobody is subscribed
	subs    map[*Subscription]struct{}
	dropped uint64
}

// kept is an event, as a message: it holds statuses of all containers of a pod,
// and most nodes have nobody who ever asks for it.
type kept struct {
	at time.Time
	e  []byte
}

// NewEvents makes Events without subscribers.
func NewEvents() *Events {
	return &Events{now: time.Now, subs: map[*Subscription]struct{}{}}
}

// Publish hands out an event, which nobody may change afterwards. It never waits.
func (x *Events) Publish(e *runtime.ContainerEventResponse) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.subs) == 0 {
		x.expire()
		if len(x.early) >= eventsKept {
			x.early[0] = kept{}
			x.early, x.dropped = x.early[1:], x.dropped+1
		}
		if b, err := proto.Marshal(e); err == nil {
			x.early = append(x.early, kept{x.now(), b})
		} else {
			x.dropped++
		}
		return
	}
	for s := range x.subs {
		select {
		case s.events <- e:
		default:
			// It has a hole now: better to end it than to go on as if nothing were missing.
			x.dropped++
			delete(x.subs, s)
			close(s.events)
		}
	}
}

func (x *Events) expire() {
	n := 0
	for n < len(x.early) && x.now().Sub(x.early[n].at) > eventsFor {
		n++
	}
	clear(x.early[:n])
	x.early, x.dropped = x.early[n:], x.dropped+uint64(n)
}

// Dropped is how many events some subscriber did not get.
func (x *Events) Dropped() uint64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.expire()
	return x.dropped
}

// Subscription receives events in the order they were published.
type Subscription struct {
	x      *Events
	early  []kept // come first; Next's own
	events chan *runtime.ContainerEventResponse
}

// Subscribe begins with what waited for the first subscriber. Close must be called.
func (x *Events) Subscribe() *Subscription {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.expire()
	s := &Subscription{x: x, early: x.early, events: make(chan *runtime.ContainerEventResponse, eventsKept)}
	x.early = nil
	x.subs[s] = struct{}{}
	return s
}

// Next waits for an event. ErrResourceExhausted if the subscriber was too slow
// and has missed some; ctx's error. It is called by one goroutine.
func (s *Subscription) Next(ctx context.Context) (*runtime.ContainerEventResponse, error) {
	if len(s.early) > 0 {
		var e runtime.ContainerEventResponse
		err := proto.Unmarshal(s.early[0].e, &e)
		s.early = s.early[1:]
		return &e, err
	}
	select {
	case e, ok := <-s.events:
		if !ok {
			return nil, fmt.Errorf("container events: more than %d are waiting, later ones were dropped: %w", eventsKept, errdefs.ErrResourceExhausted)
		}
		return e, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.x.mu.Lock()
	defer s.x.mu.Unlock()
	delete(s.x.subs, s)
}
