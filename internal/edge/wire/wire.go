// Package wire is what all gRPC services of Gantry share: a request's headers
// become a view, core errors become statuses and back, and the small values
// that several messages carry are converted. The services themselves are in
// the folders below, server and client of a noun side by side in one package.
package wire

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
)

// The headers of a request (contract 1.2.1, 1.2.4, 13.45).
const (
	HeaderNamespace = "containerd-namespace"
	HeaderLease     = "containerd-lease"
	// HeaderNamespaceTTRPC is the namespace's on ttrpc connections.
	HeaderNamespaceTTRPC = "containerd-namespace-ttrpc"
)

// MaxMessage is the largest message in bytes that either side takes, unless
// the configuration says otherwise (contract 1.1.6).
const MaxMessage = 16 << 20

// Namespace reads the namespace of an incoming request. ErrFailedPrecondition
// if there is none, ErrInvalidArgument if it is malformed (contract 13.8).
func Namespace(ctx context.Context) (namespace.ID, error) {
	ns := namespace.ID(header(ctx, HeaderNamespace))
	if ns == "" {
		return "", fmt.Errorf("namespace is required: %w", errdefs.ErrFailedPrecondition)
	}
	if err := namespace.Check(ns); err != nil {
		return "", err
	}
	return ns, nil
}

// OptionalNamespace is Namespace for the calls that do without one
// (contract 15, 1.2.1): "" if there is none.
func OptionalNamespace(ctx context.Context) (namespace.ID, error) {
	if header(ctx, HeaderNamespace) == "" {
		return "", nil
	}
	return Namespace(ctx)
}

// Lease reads the lease of an incoming request, "" if there is none.
func Lease(ctx context.Context) lease.ID { return lease.ID(header(ctx, HeaderLease)) }

// View opens the view that an incoming request names in its headers.
func View(ctx context.Context, src view.Source) (view.View, error) {
	ns, err := Namespace(ctx)
	if err != nil {
		return nil, err
	}
	return src.In(ns, Lease(ctx))
}

func header(ctx context.Context, key string) string {
	if v := metadata.ValueFromIncomingContext(ctx, key); len(v) > 0 {
		return v[0]
	}
	return ""
}

// Outgoing adds the headers for a namespace and a lease to a request. The
// ttrpc form goes along, as clients of containerd send both.
func Outgoing(ctx context.Context, ns namespace.ID, under lease.ID) context.Context {
	kv := make([]string, 0, 6)
	if ns != "" {
		kv = append(kv, HeaderNamespace, string(ns), HeaderNamespaceTTRPC, string(ns))
	}
	if under != "" {
		kv = append(kv, HeaderLease, string(under))
	}
	return metadata.AppendToOutgoingContext(ctx, kv...)
}

// Readiness says whether requests may be served: nil, or an ErrUnavailable
// that names what is still being opened.
type Readiness func() error

// ServerOptions are those of every Gantry server: message limits in bytes (0
// for MaxMessage) and the interceptors, in this order: a panic becomes an
// Internal error and a logged stack; core errors become statuses; ready is
// asked before a request runs. ready may be nil.
func ServerOptions(log *slog.Logger, maxRecv, maxSend int, ready Readiness) []grpc.ServerOption {
	if maxRecv <= 0 {
		maxRecv = MaxMessage
	}
	if maxSend <= 0 {
		maxSend = MaxMessage
	}
	if ready == nil {
		ready = func() error { return nil }
	}
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxRecv),
		grpc.MaxSendMsgSize(maxSend),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
			defer func() {
				if r := recover(); r != nil {
					resp, err = nil, panicked(log, info.FullMethod, r)
				}
				err = toStatus(err)
			}()
			if err := ready(); err != nil {
				return nil, err
			}
			return handler(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
			defer func() {
				if r := recover(); r != nil {
					err = panicked(log, info.FullMethod, r)
				}
				err = toStatus(err)
			}()
			if err := ready(); err != nil {
				return err
			}
			return handler(srv, ss)
		}),
	}
}

// toStatus maps a core error to a status: its class and its text.
func toStatus(err error) error { return Once(errgrpc.ToGRPC(err)) }

// Once takes from a status the details that are the further errors it was made
// of, whose texts are in the message already and would be told again; details
// that carry a value of their own are kept (contract 1.2.9). Other errors stay
// as they are.
func Once(err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	p := s.Proto()
	p.Details = slices.DeleteFunc(p.Details, func(a *anypb.Any) bool { return a.MessageIs(&spb.Status{}) })
	return status.ErrorProto(p)
}

func panicked(log *slog.Logger, method string, r any) error {
	log.Error("request panicked", "method", method, "panic", r, "stack", string(debug.Stack()))
	return fmt.Errorf("%s: broken invariant, see the daemon's log: %w", method, errdefs.ErrInternal)
}

// DialOptions are those of every Gantry client: no TLS (the socket's mode
// guards it), the message limits, quick reconnection, and statuses become
// core errors, of streams too.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 3 * time.Second,
		}),
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return errgrpc.ToNative(invoke(ctx, method, req, reply, cc, opts...))
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			s, err := open(ctx, desc, cc, method, opts...)
			if err != nil {
				return nil, errgrpc.ToNative(err)
			}
			return nativeStream{s}, nil
		}),
	}
}

// nativeStream maps the errors of a stream, all but io.EOF, which is not one.
type nativeStream struct{ grpc.ClientStream }

func (s nativeStream) SendMsg(m any) error { return native(s.ClientStream.SendMsg(m)) }
func (s nativeStream) RecvMsg(m any) error { return native(s.ClientStream.RecvMsg(m)) }
