// Package eventttrpc takes the events that shims send: the service
// containerd.services.events.ttrpc.v1.Events on a ttrpc socket of which only
// processes of the daemon's own user can be clients.
package eventttrpc

import (
	"context"
	"log/slog"
	"runtime/debug"

	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/eventrpc"
)

// NewServer makes a ttrpc server that publishes to out what is forwarded to it
// (contract 1.1.2, 1.4.1). An event is answered after it was published, so the
// order in which a shim sends is the order of publishing. The caller serves
// and closes it. It takes connections of its own user only.
func NewServer(out event.Publisher, log *slog.Logger) (*ttrpc.Server, error) {
	srv, err := ttrpc.NewServer(
		ttrpc.WithServerHandshaker(ttrpc.UnixSocketRequireSameUser()),
		ttrpc.WithUnaryServerInterceptor(func(ctx context.Context, in ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, next ttrpc.Method) (resp any, err error) {
			defer func() {
				if r := recover(); r != nil {
					log.Error("request panicked", "method", info.FullMethod, "panic", r, "stack", string(debug.Stack()))
					resp, err = nil, status.Errorf(codes.Internal, "%s: broken invariant, see the daemon's log", info.FullMethod)
				}
				err = errgrpc.ToGRPC(err)
			}()
			return next(ctx, in)
		}),
	)
	if err != nil {
		return nil, err
	}
	eventsapi.RegisterTTRPCEventsService(srv, forwarder{out})
	return srv, nil
}

type forwarder struct{ out event.Publisher }

// Forward publishes an envelope as it is: namespace and time are the shim's
// (contract 13.45).
func (f forwarder) Forward(ctx context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	if r.Envelope == nil {
		return nil, wire.Missing("envelope")
	}
	e, err := eventrpc.EnvelopeFromProto(r.Envelope)
	if err != nil {
		return nil, err
	}
	if err := f.out.Publish(ctx, e); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}
