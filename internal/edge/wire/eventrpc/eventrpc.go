// Package eventrpc is containerd.services.events.v1 on both sides, and the
// wire form of events, which shims speak as well. Subscribe sends its headers
// at once, so that a client knows when nothing can be missed any more.
package eventrpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// Server answers for a bus (contract 1.3.13 to 1.3.15).
type Server struct {
	eventsapi.UnimplementedEventsServer
	bus     event.Bus
	forward event.Publisher
}

// NewServer makes a server. Events that are forwarded, which is what shims do,
// go to forward; all else is the bus's.
func NewServer(bus event.Bus, forward event.Publisher) *Server {
	return &Server{bus: bus, forward: forward}
}

// Publish takes an event of the request's namespace.
func (s *Server) Publish(ctx context.Context, r *eventsapi.PublishRequest) (*emptypb.Empty, error) {
	ns, err := wire.Namespace(ctx)
	if err != nil {
		return nil, err
	}
	payload, err := PayloadFromProto(r.Event)
	if err != nil {
		return nil, fmt.Errorf("publish %s: %w", r.Topic, err)
	}
	return &emptypb.Empty{}, s.bus.Publish(ctx, event.Envelope{Namespace: ns, Topic: r.Topic, Event: payload})
}

// Forward takes an event with its own time and namespace.
func (s *Server) Forward(ctx context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	e, err := EnvelopeFromProto(r.Envelope)
	if err != nil {
		return nil, fmt.Errorf("forward: %w", err)
	}
	return &emptypb.Empty{}, s.forward.Publish(ctx, e)
}

// Subscribe sends events of all namespaces until the client leaves.
func (s *Server) Subscribe(r *eventsapi.SubscribeRequest, out eventsapi.Events_SubscribeServer) error {
	sub, err := s.bus.Subscribe(out.Context(), r.Filters...)
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := out.SendHeader(nil); err != nil {
		return err
	}
	for {
		e, err := sub.Next(out.Context())
		if err != nil {
			return err
		}
		m, err := EnvelopeToProto(e)
		if err != nil {
			return err
		}
		if err := out.Send(m); err != nil {
			return err
		}
	}
}

// Client is a bus at the other end of a connection.
type Client struct{ api eventsapi.EventsClient }

// NewClient makes a client. It does not own the connection.
func NewClient(conn grpc.ClientConnInterface) *Client {
	return &Client{eventsapi.NewEventsClient(conn)}
}

// Publish implements event.Publisher: an envelope that has a time is forwarded.
func (c *Client) Publish(ctx context.Context, e event.Envelope) error {
	if err := e.Check(); err != nil {
		return err
	}
	m, err := EnvelopeToProto(e)
	if err != nil {
		return err
	}
	if e.Timestamp.IsZero() {
		_, err = c.api.Publish(wire.Outgoing(ctx, e.Namespace, ""), &eventsapi.PublishRequest{Topic: m.Topic, Event: m.Event})
	} else {
		_, err = c.api.Forward(ctx, &eventsapi.ForwardRequest{Envelope: m})
	}
	return err
}

// Subscribe implements event.Bus. It returns when the server has subscribed.
func (c *Client) Subscribe(ctx context.Context, filters ...string) (event.Subscription, error) {
	sctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	stream, err := c.api.Subscribe(sctx, &eventsapi.SubscribeRequest{Filters: filters})
	if err == nil {
		var headers metadata.MD
		if headers, err = stream.Header(); err == nil && headers == nil {
			_, err = stream.Recv() // ended before it began: a bad filter
		}
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	s := &subscription{cancel: cancel, items: make(chan item, 64), done: sctx.Done()}
	s.wg.Add(1)
	go s.read(stream)
	return s, nil
}

type item struct {
	e   event.Envelope
	err error
}

// subscription reads ahead, so that Next can be left by its context without
// losing an event.
type subscription struct {
	cancel context.CancelFunc
	items  chan item
	done   <-chan struct{}
	wg     sync.WaitGroup
}

func (s *subscription) read(stream grpc.ServerStreamingClient[types.Envelope]) {
	defer s.wg.Done()
	defer close(s.items)
	for {
		var it item
		m, err := stream.Recv()
		if err == nil {
			it.e, it.err = EnvelopeFromProto(m)
		} else {
			it.err = err
		}
		select {
		case s.items <- it:
		case <-s.done:
			return
		}
		if err != nil {
			return
		}
	}
}

func (s *subscription) Next(ctx context.Context) (event.Envelope, error) {
	select {
	case it, ok := <-s.items:
		switch {
		case !ok, errors.Is(it.err, io.EOF):
			return event.Envelope{}, fmt.Errorf("the subscription is closed: %w", errdefs.ErrUnavailable)
		default:
			return it.e, it.err
		}
	case <-ctx.Done():
		return event.Envelope{}, ctx.Err()
	}
}

func (s *subscription) Close() error {
	s.cancel()
	s.wg.Wait()
	return nil
}
