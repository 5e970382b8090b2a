// Package diffrpc is containerd.services.diff.v1 on both sides.
package diffrpc

import (
	"context"
	"fmt"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// Server answers from views (contract 1.3.11, 1.3.12).
type Server struct {
	diffapi.UnimplementedDiffServer
	views view.Source
}

// NewServer makes a server.
func NewServer(views view.Source) *Server { return &Server{views: views} }

// Apply implements the RPC.
func (s *Server) Apply(ctx context.Context, r *diffapi.ApplyRequest) (*diffapi.ApplyResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	if r.Diff == nil {
		return nil, wire.Missing("diff")
	}
	applied, err := v.Diff().Apply(ctx, wire.DescFromProto(r.Diff), wire.MountsFromProto(r.Mounts), diff.ApplyOptions{
		Payloads: wire.AnysFromProto(r.Payloads), Sync: r.SyncFs,
	})
	return &diffapi.ApplyResponse{Applied: wire.DescToProto(applied)}, err
}

// Diff implements the RPC.
func (s *Server) Diff(ctx context.Context, r *diffapi.DiffRequest) (*diffapi.DiffResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	opts := diff.CompareOptions{MediaType: r.MediaType, Ref: r.Ref, Labels: r.Labels}
	if r.SourceDateEpoch != nil {
		if err := r.SourceDateEpoch.CheckValid(); err != nil {
			return nil, fmt.Errorf("source_date_epoch: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		epoch := r.SourceDateEpoch.AsTime()
		opts.SourceDateEpoch = &epoch
	}
	d, err := v.Diff().Compare(ctx, wire.MountsFromProto(r.Left), wire.MountsFromProto(r.Right), opts)
	return &diffapi.DiffResponse{Diff: wire.DescToProto(d)}, err
}

type client struct {
	api   diffapi.DiffClient
	ns    namespace.ID
	under lease.ID
}

// NewClient makes the service of a namespace at the other end of a connection,
// which it does not own. Progress of an Apply is not reported: the wire has no
// place for it.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID, under lease.ID) diff.Service {
	return &client{diffapi.NewDiffClient(conn), ns, under}
}

func (c *client) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts diff.ApplyOptions) (ocispec.Descriptor, error) {
	r, err := c.api.Apply(wire.Outgoing(ctx, c.ns, c.under), &diffapi.ApplyRequest{
		Diff: wire.DescToProto(desc), Mounts: wire.MountsToProto(mounts), Payloads: wire.AnysToProto(opts.Payloads), SyncFs: opts.Sync,
	})
	return wire.DescFromProto(r.GetApplied()), err
}

func (c *client) Compare(ctx context.Context, lower, upper []mount.Mount, opts diff.CompareOptions) (ocispec.Descriptor, error) {
	req := &diffapi.DiffRequest{
		Left: wire.MountsToProto(lower), Right: wire.MountsToProto(upper), MediaType: opts.MediaType, Ref: opts.Ref, Labels: opts.Labels,
	}
	if opts.SourceDateEpoch != nil {
		// Not wire.TimeToProto: the zero time would be no limit.
		req.SourceDateEpoch = timestamppb.New(*opts.SourceDateEpoch)
	}
	r, err := c.api.Diff(wire.Outgoing(ctx, c.ns, c.under), req)
	return wire.DescFromProto(r.GetDiff()), err
}
