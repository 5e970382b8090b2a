// Package snapshotrpc is containerd.services.snapshots.v1 on both sides. The
// client is also what a proxy plugin is: the daemon's end of a snapshotter in
// another process (contract 1.3.31, 3.2.9).
package snapshotrpc

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// batch is how many snapshots a message of List has (contract 1.2.13).
const batch = 100

// Server answers for the snapshotters of a view.Source.
type Server struct {
	snapshotsapi.UnimplementedSnapshotsServer
	src view.Source
}

// NewServer makes a server.
func NewServer(src view.Source) *Server { return &Server{src: src} }

func (s *Server) store(ctx context.Context, name string) (snapshot.Store, error) {
	v, err := wire.View(ctx, s.src)
	if err != nil {
		return nil, err
	}
	if name == "" {
		return nil, fmt.Errorf("snapshotter not loaded: %s: %w", name, errdefs.ErrInvalidArgument)
	}
	return v.Snapshots(name)
}

// Prepare makes an active snapshot.
func (s *Server) Prepare(ctx context.Context, r *snapshotsapi.PrepareSnapshotRequest) (*snapshotsapi.PrepareSnapshotResponse, error) {
	st, err := s.store(ctx, r.Snapshotter)
	if err != nil {
		return nil, err
	}
	m, err := st.Prepare(ctx, r.Key, r.Parent, r.Labels)
	return &snapshotsapi.PrepareSnapshotResponse{Mounts: wire.MountsToProto(m)}, err
}

// View makes a view.
func (s *Server) View(ctx context.Context, r *snapshotsapi.ViewSnapshotRequest) (*snapshotsapi.ViewSnapshotResponse, error) {
	st, err := s.store(ctx, r.Snapshotter)
	if err != nil {
		return nil, err
	}
	m, err := st.View(ctx, r.Key, r.Parent, r.Labels)
	return &snapshotsapi.ViewSnapshotResponse{Mounts: wire.MountsToProto(m)}, err
}

// Mounts returns the mounts of an active snapshot or a view.
func (s *Server) Mounts(ctx context.Context, r *snapshotsapi.MountsRequest) (*snapshotsapi.MountsResponse, error) {
	st, err := s.store(ctx, r.Snapshotter)
	if err != nil {
		return nil, err
	}
	m, err := st.Mounts(ctx, r.Key)
	return &snapshotsapi.MountsResponse{Mounts: wire.MountsToProto(m)}, err
}

// Commit makes a committed snapshot of an active one.
func (s *Server) Commit(ctx context.Context, r *snapshotsapi.CommitSnapshotRequest) (*emptypb.Empty, error) {
	st, err := s.store(ctx, r.Snapshotter)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, st.Commit(ctx, r.Name, r.Key, snapshot.CommitOptions{Labels: r.Labels, Parent: r.Parent})
}

// Remove drops a snapshot.
func (s *Server) Remove(ctx context.Context, r *snapshotsapi.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	st, err := s.store(ctx, r.Snapshotter)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, st.Remove(ctx, r.Key)
}

// Stat describes a snapshot.
func (s *Server) Stat(ctx context.Context, r *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	st, err := s.store(ctx, r.Snapshotter)
	if err != nil {
		return nil, err
	}
	i, err := st.Stat(ctx, r.Key)
	return &snapshotsapi.StatSnapshotResponse{Info: toProto(i)}, err
}

// Update changes labels.
func (s *Server) Update(ctx context.Context, r *snapshotsapi.UpdateSnapshotRequest) (*snapshotsapi.UpdateSnapshotResponse, error) {
	st, err := s.store(ctx, r.Snapshotter)
	if err != nil {
		return nil, err
	}
	if r.Info == nil {
		return nil, wire.Missing("info")
	}
	i, err := st.Update(ctx, fromProto(r.Info), r.UpdateMask.GetPaths()...)
	return &snapshotsapi.UpdateSnapshotResponse{Info: toProto(i)}, err
}

// List sends the snapshots that match, a hundred a message.
func (s *Server) List(r *snapshotsapi.ListSnapshotsRequest, out snapshotsapi.Snapshots_ListServer) error {
	st, err := s.store(out.Context(), r.Snapshotter)
	if err != nil {
		return err
	}
	var full []*snapshotsapi.Info
	send := func() error {
		m := &snapshotsapi.ListSnapshotsResponse{Info: full}
		full = nil
		return out.Send(m)
	}
	err = st.Walk(out.Context(), func(i snapshot.Info) error {
		if full = append(full, toProto(i)); len(full) < batch {
			return nil
		}
		return send()
	}, r.Filters...)
	if err != nil || len(full) == 0 {
		return err
	}
	return send()
}

// Usage measures a snapshot.
func (s *Server) Usage(ctx context.Context, r *snapshotsapi.UsageRequest) (*snapshotsapi.UsageResponse, error) {
	st, err := s.store(ctx, r.Snapshotter)
	if err != nil {
		return nil, err
	}
	u, err := st.Usage(ctx, r.Key)
	return &snapshotsapi.UsageResponse{Size: u.Size, Inodes: u.Inodes}, err
}

// Cleanup reclaims what removed snapshots left; ErrNotImplemented if the
// snapshotter is no snapshot.Cleaner.
func (s *Server) Cleanup(ctx context.Context, r *snapshotsapi.CleanupRequest) (*emptypb.Empty, error) {
	st, err := s.store(ctx, r.Snapshotter)
	if err != nil {
		return nil, err
	}
	c, ok := st.(snapshot.Cleaner)
	if !ok {
		return nil, fmt.Errorf("snapshotter %s does not clean up: %w", r.Snapshotter, errdefs.ErrNotImplemented)
	}
	return &emptypb.Empty{}, c.Cleanup(ctx)
}

// Client is a snapshotter behind a connection: a snapshot.Store and a
// snapshot.Cleaner. It is safe for concurrent use.
type Client struct {
	api         snapshotsapi.SnapshotsClient
	ns          namespace.ID
	under       lease.ID
	snapshotter string
}

// NewClient returns a snapshotter behind conn. Without a namespace it is a
// proxy plugin's, whose keys begin with the namespace of each request
// (contract 3.1.3): those are sent along.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID, under lease.ID, snapshotter string) *Client {
	return &Client{snapshotsapi.NewSnapshotsClient(conn), ns, under, snapshotter}
}

// outgoing adds the headers. key may be "".
func (c *Client) outgoing(ctx context.Context, key string) context.Context {
	ns := c.ns
	if ns == "" {
		ns = keyNamespace(key)
	}
	return wire.Outgoing(ctx, ns, c.under)
}

// keyNamespace is the namespace in "<namespace>/<number>/<key>", or the default one.
func keyNamespace(key string) namespace.ID {
	ns, rest, ok := strings.Cut(key, "/")
	if !ok {
		return namespace.Default
	}
	number, _, ok := strings.Cut(rest, "/")
	if _, err := strconv.ParseUint(number, 10, 64); !ok || err != nil || namespace.Check(namespace.ID(ns)) != nil {
		return namespace.Default
	}
	return namespace.ID(ns)
}

// Prepare is snapshot.Store's.
func (c *Client) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	r, err := c.api.Prepare(c.outgoing(ctx, key), &snapshotsapi.PrepareSnapshotRequest{Snapshotter: c.snapshotter, Key: key, Parent: parent, Labels: labels})
	return wire.MountsFromProto(r.GetMounts()), err
}

// View is snapshot.Store's.
func (c *Client) View(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	r, err := c.api.View(c.outgoing(ctx, key), &snapshotsapi.ViewSnapshotRequest{Snapshotter: c.snapshotter, Key: key, Parent: parent, Labels: labels})
	return wire.MountsFromProto(r.GetMounts()), err
}

// Mounts is snapshot.Store's.
func (c *Client) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	r, err := c.api.Mounts(c.outgoing(ctx, key), &snapshotsapi.MountsRequest{Snapshotter: c.snapshotter, Key: key})
	return wire.MountsFromProto(r.GetMounts()), err
}

// Commit is snapshot.Store's. A peer that does not know the field "parent"
// ignores it; its snapshot on nothing is removed again, and the error is
// ErrNotImplemented.
func (c *Client) Commit(ctx context.Context, name, key string, opts snapshot.CommitOptions) error {
	_, err := c.api.Commit(c.outgoing(ctx, key), &snapshotsapi.CommitSnapshotRequest{
		Snapshotter: c.snapshotter, Name: name, Key: key, Labels: opts.Labels, Parent: opts.Parent,
	})
	if err != nil || opts.Parent == "" {
		return err
	}
	i, err := c.Stat(ctx, name)
	if err != nil {
		return fmt.Errorf("commit %s on top of %s: see where it stands: %w", name, opts.Parent, err)
	}
	if i.Parent == opts.Parent {
		return nil
	}
	err = fmt.Errorf("commit %s on top of %s: snapshotter %s put it on %q: %w", name, opts.Parent, c.snapshotter, i.Parent, errdefs.ErrNotImplemented)
	return errors.Join(err, c.Remove(ctx, name))
}

// Remove is snapshot.Store's.
func (c *Client) Remove(ctx context.Context, key string) error {
	_, err := c.api.Remove(c.outgoing(ctx, key), &snapshotsapi.RemoveSnapshotRequest{Snapshotter: c.snapshotter, Key: key})
	return err
}

// Stat is snapshot.Store's.
func (c *Client) Stat(ctx context.Context, key string) (snapshot.Info, error) {
	r, err := c.api.Stat(c.outgoing(ctx, key), &snapshotsapi.StatSnapshotRequest{Snapshotter: c.snapshotter, Key: key})
	return fromProto(r.GetInfo()), err
}

// Update is snapshot.Store's.
func (c *Client) Update(ctx context.Context, info snapshot.Info, fields ...string) (snapshot.Info, error) {
	r, err := c.api.Update(c.outgoing(ctx, info.Name), &snapshotsapi.UpdateSnapshotRequest{Snapshotter: c.snapshotter, Info: toProto(info), UpdateMask: wire.Mask(fields)})
	return fromProto(r.GetInfo()), err
}

// Usage is snapshot.Store's.
func (c *Client) Usage(ctx context.Context, key string) (snapshot.Usage, error) {
	r, err := c.api.Usage(c.outgoing(ctx, key), &snapshotsapi.UsageRequest{Snapshotter: c.snapshotter, Key: key})
	return snapshot.Usage{Inodes: r.GetInodes(), Size: r.GetSize()}, err
}

// Walk is snapshot.Store's. fn runs while the answer still comes in.
func (c *Client) Walk(ctx context.Context, fn func(snapshot.Info) error, filters ...string) error {
	ctx, cancel := context.WithCancel(ctx) // ends the stream when fn ends the walk
	defer cancel()
	in, err := c.api.List(c.outgoing(ctx, ""), &snapshotsapi.ListSnapshotsRequest{Snapshotter: c.snapshotter, Filters: filters})
	if err != nil {
		return err
	}
	return wire.Receive(in, func(m *snapshotsapi.ListSnapshotsResponse) error {
		for _, i := range m.Info {
			if err := fn(fromProto(i)); err != nil {
				return err
			}
		}
		return nil
	})
}

// Cleanup is snapshot.Cleaner's; ErrNotImplemented if the peer does not clean up.
func (c *Client) Cleanup(ctx context.Context) error {
	_, err := c.api.Cleanup(c.outgoing(ctx, ""), &snapshotsapi.CleanupRequest{Snapshotter: c.snapshotter})
	return err
}

// The kinds have the same numbers on the wire.
func toProto(i snapshot.Info) *snapshotsapi.Info {
	return &snapshotsapi.Info{
		Name: i.Name, Parent: i.Parent, Kind: snapshotsapi.Kind(i.Kind),
		CreatedAt: wire.TimeToProto(i.CreatedAt), UpdatedAt: wire.TimeToProto(i.UpdatedAt), Labels: i.Labels,
	}
}

// fromProto takes nil for the zero Info.
func fromProto(i *snapshotsapi.Info) snapshot.Info {
	out := snapshot.Info{
		Name: i.GetName(), Parent: i.GetParent(),
		CreatedAt: wire.TimeFromProto(i.GetCreatedAt()), UpdatedAt: wire.TimeFromProto(i.GetUpdatedAt()), Labels: i.GetLabels(),
	}
	if k := i.GetKind(); k > 0 && k <= snapshotsapi.Kind(snapshot.KindCommitted) {
		out.Kind = snapshot.Kind(k)
	}
	return out
}
