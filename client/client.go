// Package client is the Go client of Gantry: everything that one namespace can
// see, over the socket of a daemon or in process, and what people do with it:
// pull an image, make a container of it, run it, read what it prints.
//
// The same code works against containerd, whose API this is.
package client

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/containerrpc"
	"github.com/gantryd/gantry/internal/edge/wire/contentrpc"
	"github.com/gantryd/gantry/internal/edge/wire/diffrpc"
	"github.com/gantryd/gantry/internal/edge/wire/eventrpc"
	"github.com/gantryd/gantry/internal/edge/wire/imagerpc"
	"github.com/gantryd/gantry/internal/edge/wire/introspectionrpc"
	"github.com/gantryd/gantry/internal/edge/wire/leaserpc"
	"github.com/gantryd/gantry/internal/edge/wire/namespacerpc"
	"github.com/gantryd/gantry/internal/edge/wire/sandboxrpc"
	"github.com/gantryd/gantry/internal/edge/wire/snapshotrpc"
	"github.com/gantryd/gantry/internal/edge/wire/streamrpc"
	"github.com/gantryd/gantry/internal/edge/wire/taskrpc"
	"github.com/gantryd/gantry/internal/edge/wire/transferrpc"
	"github.com/gantryd/gantry/internal/edge/wire/versionrpc"
)

// DefaultAddress is the socket of a gantryd that was started without flags.
const DefaultAddress = "/run/gantry/gantry.sock"

// Client is a connection to a daemon. It is safe for concurrent use. It
// implements view.Source.
type Client struct {
	address string
	conn    *grpc.ClientConn
}

// Dial makes a client of the daemon at a socket's path, with or without
// "unix://". It does not wait for the daemon: Serving does.
func Dial(address string) (*Client, error) {
	address = strings.TrimPrefix(address, "unix://")
	conn, err := grpc.NewClient("unix://"+address, wire.DialOptions()...)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", address, err)
	}
	return &Client{address: address, conn: conn}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Conn is the connection, for services that are no noun of ours, such as the CRI.
func (c *Client) Conn() grpc.ClientConnInterface { return c.conn }

// Address is the path of the socket.
func (c *Client) Address() string { return c.address }

// Serving returns nil once the daemon answers that it is ready, or an
// ErrUnavailable that says why not when ctx is done or nobody listens.
func (c *Client) Serving(ctx context.Context) error {
	for {
		r, err := healthpb.NewHealthClient(c.conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(waits(ctx)))
		switch {
		case err != nil:
			return fmt.Errorf("connect to the daemon at %s: %w", c.address, err)
		case r.Status == healthpb.HealthCheckResponse_SERVING:
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the daemon at %s is %s: %w", c.address, r.Status, errdefs.ErrUnavailable)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// waits says whether ctx has a deadline: only then may a call wait for a
// daemon that is not there yet.
func waits(ctx context.Context) bool {
	_, ok := ctx.Deadline()
	return ok
}

// Version asks for the daemon's version.
func (c *Client) Version(ctx context.Context) (version, revision string, err error) {
	return versionrpc.Get(ctx, c.conn)
}

// Namespaces are those of the daemon.
func (c *Client) Namespaces() namespace.Store { return namespacerpc.NewClient(c.conn) }

// Events are those of all namespaces.
func (c *Client) Events() event.Bus { return eventrpc.NewClient(c.conn) }

// Introspection tells what the daemon is made of.
func (c *Client) Introspection() *introspectionrpc.Client { return introspectionrpc.NewClient(c.conn) }

// In implements view.Source.
func (c *Client) In(ns namespace.ID, under lease.ID) (view.View, error) {
	if err := namespace.Check(ns); err != nil {
		return nil, err
	}
	return remote{c.conn, ns, under}, nil
}

// remote is a view at the other end of a connection.
type remote struct {
	conn  *grpc.ClientConn
	ns    namespace.ID
	under lease.ID
}

func (r remote) Namespace() namespace.ID     { return r.ns }
func (r remote) Lease() lease.ID             { return r.under }
func (r remote) Content() content.Store      { return contentrpc.NewClient(r.conn, r.ns, r.under) }
func (r remote) Images() image.Store         { return imagerpc.NewClient(r.conn, r.ns, r.under) }
func (r remote) Containers() container.Store { return containerrpc.NewClient(r.conn, r.ns, r.under) }
func (r remote) Sandboxes() sandbox.Store    { return sandboxrpc.NewClient(r.conn, r.ns, r.under) }
func (r remote) Leases() lease.Store         { return leaserpc.NewClient(r.conn, r.ns) }
func (r remote) Diff() diff.Service          { return diffrpc.NewClient(r.conn, r.ns, r.under) }
func (r remote) Tasks() task.Store           { return taskrpc.NewClient(r.conn, r.ns, r.under) }
func (r remote) Transfer() transfer.Service  { return transferrpc.NewClient(r.conn, r.ns, r.under) }
func (r remote) Streams() stream.Manager     { return streamrpc.NewClient(r.conn, r.ns, r.under) }

func (r remote) Snapshots(name string) (snapshot.Store, error) {
	if name == "" {
		return nil, fmt.Errorf("snapshotter not loaded: %q: %w", name, errdefs.ErrInvalidArgument)
	}
	return snapshotrpc.NewClient(r.conn, r.ns, r.under, name), nil
}
