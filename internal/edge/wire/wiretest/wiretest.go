// Package wiretest puts a gRPC connection under a test: a server and a client
// on a socket of their own, with the interceptors that the daemon uses.
package wiretest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
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
)

// Serve starts a server with the services that register adds, and returns a
// client's connection to it. Both end with the test.
func Serve(t testing.TB, register func(*grpc.Server)) *grpc.ClientConn {
	t.Helper()
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sock := filepath.Join(dir, "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	// Stop waits for the handlers, which may still put things away.
	srv := grpc.NewServer(append(wire.ServerOptions(slog.New(slog.DiscardHandler), 0, 0, nil), grpc.WaitForHandlers(true))...)
	register(srv)
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(l) // returns when Stop is called
	}()
	conn, err := grpc.NewClient("unix://"+sock, wire.DialOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		srv.Stop()
		<-done
	})
	return conn
}

// Source is a view.Source of single stores, the same in every namespace, for
// tests of one noun. Nouns that are not set are nil.
type Source struct {
	ContentStore    content.Store
	ImageStore      image.Store
	SnapshotStores  map[string]snapshot.Store
	ContainerStore  container.Store
	SandboxStore    sandbox.Store
	LeaseStore      lease.Store
	DiffService     diff.Service
	TaskStore       task.Store
	TransferService transfer.Service
	StreamManager   stream.Manager
}

// In returns the same stores for every namespace.
func (s Source) In(ns namespace.ID, under lease.ID) (view.View, error) {
	if ns != "" {
		if err := namespace.Check(ns); err != nil {
			return nil, err
		}
	}
	return fixed{s, ns, under}, nil
}

type fixed struct {
	s     Source
	ns    namespace.ID
	under lease.ID
}

func (v fixed) Namespace() namespace.ID     { return v.ns }
func (v fixed) Lease() lease.ID             { return v.under }
func (v fixed) Content() content.Store      { return v.s.ContentStore }
func (v fixed) Images() image.Store         { return v.s.ImageStore }
func (v fixed) Containers() container.Store { return v.s.ContainerStore }
func (v fixed) Sandboxes() sandbox.Store    { return v.s.SandboxStore }
func (v fixed) Leases() lease.Store         { return v.s.LeaseStore }
func (v fixed) Diff() diff.Service          { return v.s.DiffService }
func (v fixed) Tasks() task.Store           { return v.s.TaskStore }
func (v fixed) Transfer() transfer.Service  { return v.s.TransferService }
func (v fixed) Streams() stream.Manager     { return v.s.StreamManager }
func (v fixed) Snapshots(name string) (snapshot.Store, error) {
	if st := v.s.SnapshotStores[name]; st != nil {
		return st, nil
	}
	return nil, fmt.Errorf("snapshotter not loaded: %s: %w", name, errdefs.ErrInvalidArgument)
}

// Context is the context of a test with the headers of namespace "test".
func Context(t testing.TB) context.Context { return wire.Outgoing(t.Context(), "test", "") }
