package eventrpc

import (
	"errors"
	"testing"

	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/event/eventtest"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
)

func serve(t *testing.T, bus event.Bus) *Client {
	return NewClient(wiretest.Serve(t, func(s *grpc.Server) { eventsapi.RegisterEventsServer(s, NewServer(bus, bus)) }))
}

func memoryBus(t *testing.T) event.Bus {
	b := memory.NewBus()
	t.Cleanup(func() { b.Close() })
	return b
}

// contract: 1.3.13, 1.3.14, 1.3.15, 13.4
func TestBus(t *testing.T) {
	t.Run("memory", func(t *testing.T) { eventtest.Run(t, memoryBus) })
	t.Run("gRPC", func(t *testing.T) {
		eventtest.Run(t, func(t *testing.T) event.Bus { return serve(t, memoryBus(t)) })
	})
	t.Run("gRPC twice", func(t *testing.T) {
		eventtest.Run(t, func(t *testing.T) event.Bus { return serve(t, serve(t, memoryBus(t))) })
	})
}

// contract: 1.2.1, 1.3.13, 13.8
func TestAbsentFields(t *testing.T) {
	bus := memoryBus(t)
	conn := wiretest.Serve(t, func(s *grpc.Server) { eventsapi.RegisterEventsServer(s, NewServer(bus, bus)) })
	api := eventsapi.NewEventsClient(conn)
	ok := &anypb.Any{TypeUrl: "x.Y"}
	for name, tc := range map[string]struct {
		call func() error
		want error
	}{
		"publish nothing": {func() error { _, err := api.Publish(wiretest.Context(t), &eventsapi.PublishRequest{}); return err }, errdefs.ErrInvalidArgument},
		"publish no event": {func() error {
			_, err := api.Publish(wiretest.Context(t), &eventsapi.PublishRequest{Topic: "/a"})
			return err
		}, errdefs.ErrInvalidArgument},
		"publish no namespace": {func() error {
			_, err := api.Publish(t.Context(), &eventsapi.PublishRequest{Topic: "/a", Event: ok})
			return err
		}, errdefs.ErrFailedPrecondition},
		"forward nothing": {func() error { _, err := api.Forward(t.Context(), &eventsapi.ForwardRequest{}); return err }, errdefs.ErrInvalidArgument},
		"forward empty": {func() error {
			_, err := api.Forward(t.Context(), &eventsapi.ForwardRequest{Envelope: &types.Envelope{}})
			return err
		}, errdefs.ErrInvalidArgument},
		"forward no namespace": {func() error {
			_, err := api.Forward(t.Context(), &eventsapi.ForwardRequest{Envelope: &types.Envelope{Topic: "/a", Event: ok}})
			return err
		}, errdefs.ErrInvalidArgument},
	} {
		if err := tc.call(); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

// contract: 1.2.10, 13.1, 13.5
func TestTypeURLs(t *testing.T) {
	for _, p := range known {
		a, err := PayloadToProto(p)
		if err != nil {
			t.Fatal(err)
		}
		if want := string(message(p).ProtoReflect().Descriptor().FullName()); a.TypeUrl != want {
			t.Errorf("%T has type URL %q, its message is %q", p, a.TypeUrl, want)
		}
		a.TypeUrl = "type.googleapis.com/" + a.TypeUrl
		if got, err := PayloadFromProto(a); err != nil || got.TypeURL() != p.TypeURL() {
			t.Errorf("with the prefix, %T became %T, %v", p, got, err)
		}
	}
}
