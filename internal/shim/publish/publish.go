//go:build linux

// Package publish takes a shim's events to the daemon. They arrive in the order
// in which they were published; while the daemon is away they wait, so that
// nothing that happens meanwhile is lost.
package publish

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	queueSize   = 2048
	callTimeout = 5 * time.Second
	firstPause  = 50 * time.Millisecond
	lastPause   = 5 * time.Second
	// maxRefused is how often an event is offered to a daemon that answers,
	// but with an error.
	maxRefused = 5
)

// Publisher sends events of one namespace. It is safe for concurrent use.
type Publisher struct {
	address, namespace string
	log                *slog.Logger
	wake, retry        chan struct{}

	mu     sync.Mutex // guards the queue only
	queue  []*types.Envelope
	closed bool

	client *ttrpc.Client // used by Run only
}

// New returns a publisher for the daemon's ttrpc address. With an empty
// address events are dropped.
func New(address, namespace string, log *slog.Logger) *Publisher {
	return &Publisher{address: strings.TrimPrefix(address, "unix://"), namespace: namespace, log: log, wake: make(chan struct{}, 1), retry: make(chan struct{}, 1)}
}

// Publish queues an event; it never waits. When 2048 are waiting the oldest
// is dropped, which is logged.
func (p *Publisher) Publish(topic string, event proto.Message) {
	data, err := proto.Marshal(event)
	if err != nil {
		p.log.Error("marshal event", "topic", topic, "error", err)
		return
	}
	e := &types.Envelope{
		Timestamp: timestamppb.Now(),
		Namespace: p.namespace,
		Topic:     topic,
		// The bare name, without a host before it (contract 13.1).
		Event: &anypb.Any{TypeUrl: string(event.ProtoReflect().Descriptor().FullName()), Value: data},
	}
	p.mu.Lock()
	if len(p.queue) >= queueSize {
		p.log.Warn("event dropped: too many wait for the daemon", "topic", p.queue[0].Topic)
		p.queue = p.queue[1:]
	}
	p.queue = append(p.queue, e)
	p.mu.Unlock()
	p.kick()
}

// Retry ends the pause before the next attempt: there is a reason to believe
// that the daemon is back. It never waits.
func (p *Publisher) Retry() {
	select {
	case p.retry <- struct{}{}:
	default:
	}
}

func (p *Publisher) kick() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Run sends what is queued until the context ends, or until the queue is
// empty after Close.
func (p *Publisher) Run(ctx context.Context) error {
	defer p.disconnect()
	for {
		e, closed := p.head()
		if e == nil {
			if closed {
				return nil
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-p.wake:
			}
			continue
		}
		if err := p.deliver(ctx, e); err != nil {
			return err
		}
		p.pop(e)
	}
}

// Close lets Run return as soon as everything is sent.
func (p *Publisher) Close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.kick()
}

func (p *Publisher) head() (e *types.Envelope, closed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) == 0 {
		p.queue = nil // give the array back
		return nil, p.closed
	}
	return p.queue[0], p.closed
}

func (p *Publisher) pop(e *types.Envelope) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) > 0 && p.queue[0] == e { // it may have been dropped meanwhile
		p.queue[0] = nil
		p.queue = p.queue[1:]
	}
}

// deliver sends one event, as often as it takes. Its only error is the
// context's.
func (p *Publisher) deliver(ctx context.Context, e *types.Envelope) error {
	if p.address == "" {
		return nil
	}
	pause := firstPause
	for refused := 0; ; {
		err := p.send(ctx, e)
		if err == nil {
			return nil
		}
		if answered(err) {
			if refused++; refused >= maxRefused {
				p.log.Error("event refused by the daemon", "topic", e.Topic, "error", err)
				return nil
			}
		} else {
			p.disconnect()
		}
		p.log.Debug("event not delivered", "topic", e.Topic, "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
			pause = min(2*pause, lastPause)
		case <-p.retry:
			pause = firstPause
		}
	}
}

// answered tells an error that the daemon gave from one of the connection: only
// the former is a status, and not every status is an answer.
func answered(err error) bool {
	st, ok := status.FromError(err)
	if !ok {
		return false
	}
	switch st.Code() {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return false
	}
	return true
}

func (p *Publisher) send(ctx context.Context, e *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if p.client == nil {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", p.address)
		if err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
		p.client = ttrpc.NewClient(conn)
	}
	_, err := eventsapi.NewTTRPCEventsClient(p.client).Forward(ctx, &eventsapi.ForwardRequest{Envelope: e})
	return err
}

func (p *Publisher) disconnect() {
	if p.client != nil {
		p.client.Close()
		p.client = nil
	}
}
