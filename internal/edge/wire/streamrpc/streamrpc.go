// Package streamrpc is containerd.services.streaming.v1 on both sides: a
// client opens a stream under an id, and names the id in another request,
// which then talks to the client over the stream (contract 1.3.32).
package streamrpc

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// The names of the first message and its acknowledgement.
const (
	typeInit = "containerd.services.streaming.v1.StreamInit"
	typeAck  = "google.protobuf.Empty"
)

// initTimeout is how long a client may take to say the stream's id.
const initTimeout = 30 * time.Second

// Managers gives the streams of each namespace, which may be "": clients open
// streams without one (contract 15, 1.2.1).
type Managers interface {
	In(ns namespace.ID) stream.Manager
}

// Server registers the streams that clients open.
type Server struct {
	streamingapi.UnimplementedStreamingServer
	streams Managers
}

// NewServer makes a server.
func NewServer(streams Managers) *Server { return &Server{streams: streams} }

// Stream implements the RPC. It returns when the stream is closed on this side,
// with nil, or when the client has gone.
func (s *Server) Stream(srv streamingapi.Streaming_StreamServer) error {
	ctx := srv.Context()
	ns, err := wire.OptionalNamespace(ctx)
	if err != nil {
		return err
	}
	id, err := first(ctx, srv)
	if err != nil {
		return err
	}
	st := &serverStream{srv: srv, done: make(chan struct{})}
	free, err := s.streams.In(ns).Register(ctx, id, st)
	if err != nil {
		return err
	}
	defer free()
	if err := srv.Send(&anypb.Any{TypeUrl: typeAck}); err != nil {
		return err
	}
	select {
	case <-st.done:
		return st.err
	case <-ctx.Done():
		return fmt.Errorf("stream %.100q: %w", id, ctx.Err())
	}
}

// first reads the id.
func first(ctx context.Context, srv streamingapi.Streaming_StreamServer) (string, error) {
	type answer struct {
		v   *anypb.Any
		err error
	}
	got := make(chan answer, 1)
	go func() { // ends with the request, when Stream returns
		v, err := srv.Recv()
		got <- answer{v, err}
	}()
	t := time.NewTimer(initTimeout)
	defer t.Stop()
	select {
	case a := <-got:
		if a.err == io.EOF {
			return "", fmt.Errorf("stream closed before its id was said: %w", errdefs.ErrInvalidArgument)
		}
		if a.err != nil {
			return "", a.err
		}
		v := wire.AnyFromProto(a.v)
		var init streamingapi.StreamInit
		if v.URL != typeInit || proto.Unmarshal(v.Value, &init) != nil {
			return "", fmt.Errorf("the first message on a stream must be a %s, not %.100q: %w", typeInit, v.URL, errdefs.ErrInvalidArgument)
		}
		return init.ID, nil
	case <-t.C:
		return "", fmt.Errorf("no stream id within %s: %w", initTimeout, errdefs.ErrInvalidArgument)
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// serverStream is the side that serves. Closing it ends the RPC.
type serverStream struct {
	srv  streamingapi.Streaming_StreamServer
	once sync.Once
	done chan struct{}
	err  error // set before done is closed

	mu sync.Mutex // keeps Send from running when the RPC returns
}

func (s *serverStream) Send(v typed.Any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.done:
		return io.ErrClosedPipe
	default:
	}
	return s.srv.Send(wire.AnyToProto(v))
}

func (s *serverStream) Receive() (typed.Any, error) {
	v, err := s.srv.Recv()
	if err != nil {
		return typed.Any{}, err
	}
	return wire.AnyFromProto(v), nil
}

func (s *serverStream) Close() error {
	s.Abort(nil)
	return nil
}

// Abort ends the RPC with an error. A Send that blocks, because the peer does
// not read, is not waited for: the end of the RPC ends it.
func (s *serverStream) Abort(err error) {
	s.once.Do(func() {
		s.err = err
		close(s.done)
	})
}

// Client opens streams at a server.
type Client struct {
	api   streamingapi.StreamingClient
	ns    namespace.ID
	under lease.ID
}

// NewClient makes a client.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID, under lease.ID) *Client {
	return &Client{streamingapi.NewStreamingClient(conn), ns, under}
}

// Create implements stream.Creator.
func (c *Client) Create(ctx context.Context, id string) (stream.Stream, error) {
	if c.ns != "" {
		ctx = wire.Outgoing(ctx, c.ns, c.under)
	}
	ctx, cancel := context.WithCancel(ctx)
	st, err := c.api.Stream(ctx)
	if err == nil {
		b, _ := proto.Marshal(&streamingapi.StreamInit{ID: id})
		if err = st.Send(&anypb.Any{TypeUrl: typeInit, Value: b}); err == nil || err == io.EOF {
			// After io.EOF the reason is in what is received.
			var v *anypb.Any
			if v, err = st.Recv(); err == nil && wire.AnyFromProto(v).URL != typeAck {
				err = fmt.Errorf("the server answers with a %.100q: %w", v.TypeUrl, errdefs.ErrUnknown)
			}
		}
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("open stream %.100q: %w", id, err)
	}
	return &clientStream{st, cancel}, nil
}

// Get implements stream.Manager: streams are with the server that their client
// opened them at, and cannot be taken from there.
func (c *Client) Get(_ context.Context, id string) (stream.Stream, error) {
	return nil, fmt.Errorf("take stream %.100q from another server: %w", id, errdefs.ErrNotImplemented)
}

// Register implements stream.Manager: it opens a stream at the server and
// passes on what comes from either side until one ends or free is called.
func (c *Client) Register(ctx context.Context, id string, s stream.Stream) (func(), error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	st, err := c.Create(ctx, id)
	if err != nil {
		cancel()
		return nil, err
	}
	end := sync.OnceFunc(func() {
		cancel()
		_ = s.Close()
	})
	go func() {
		defer end()
		pass(s, st)
	}()
	go func() {
		pass(st, s)
		_ = st.Close() // the other direction may go on
	}()
	return end, nil
}

func pass(to, from stream.Stream) {
	for {
		v, err := from.Receive()
		if err != nil {
			return
		}
		if to.Send(v) != nil {
			return
		}
	}
}

// clientStream is the side that opened it.
type clientStream struct {
	st     streamingapi.Streaming_StreamClient
	cancel context.CancelFunc
}

func (s *clientStream) Send(v typed.Any) error { return s.st.Send(wire.AnyToProto(v)) }

func (s *clientStream) Receive() (typed.Any, error) {
	v, err := s.st.Recv()
	if err != nil {
		s.cancel()
		return typed.Any{}, err
	}
	return wire.AnyFromProto(v), nil
}

// Close tells the server that nothing more will be sent. What it sends can
// still be received.
func (s *clientStream) Close() error { return s.st.CloseSend() }

// Abort ends both directions.
func (s *clientStream) Abort(error) { s.cancel() }
