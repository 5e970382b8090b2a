// Package leaserpc is containerd.services.leases.v1 on both sides.
package leaserpc

import (
	"context"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// Server answers from views (contract 1.3.23 to 1.3.25).
type Server struct {
	leasesapi.UnimplementedLeasesServer
	views view.Source
}

// NewServer makes a server.
func NewServer(views view.Source) *Server { return &Server{views: views} }

func (s *Server) store(ctx context.Context) (lease.Store, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	return v.Leases(), nil
}

// Create implements the RPC.
func (s *Server) Create(ctx context.Context, r *leasesapi.CreateRequest) (*leasesapi.CreateResponse, error) {
	st, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	l, err := st.Create(ctx, lease.Lease{ID: lease.ID(r.ID), Labels: r.Labels})
	return &leasesapi.CreateResponse{Lease: toProto(l)}, err
}

// Delete implements the RPC.
func (s *Server) Delete(ctx context.Context, r *leasesapi.DeleteRequest) (*emptypb.Empty, error) {
	st, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, st.Delete(ctx, lease.ID(r.ID), r.Sync)
}

// List implements the RPC.
func (s *Server) List(ctx context.Context, r *leasesapi.ListRequest) (*leasesapi.ListResponse, error) {
	st, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	leases, err := st.List(ctx, r.Filters...)
	return &leasesapi.ListResponse{Leases: wire.Each(leases, toProto)}, err
}

// AddResource implements the RPC.
func (s *Server) AddResource(ctx context.Context, r *leasesapi.AddResourceRequest) (*emptypb.Empty, error) {
	st, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	if r.Resource == nil {
		return nil, wire.Missing("resource")
	}
	return &emptypb.Empty{}, st.AddResource(ctx, lease.ID(r.ID), resourceFromProto(r.Resource))
}

// DeleteResource implements the RPC.
func (s *Server) DeleteResource(ctx context.Context, r *leasesapi.DeleteResourceRequest) (*emptypb.Empty, error) {
	st, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	if r.Resource == nil {
		return nil, wire.Missing("resource")
	}
	return &emptypb.Empty{}, st.RemoveResource(ctx, lease.ID(r.ID), resourceFromProto(r.Resource))
}

// ListResources implements the RPC.
func (s *Server) ListResources(ctx context.Context, r *leasesapi.ListResourcesRequest) (*leasesapi.ListResourcesResponse, error) {
	st, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	resources, err := st.Resources(ctx, lease.ID(r.ID))
	return &leasesapi.ListResourcesResponse{Resources: wire.Each(resources, resourceToProto)}, err
}

type client struct {
	api leasesapi.LeasesClient
	ns  namespace.ID
}

// NewClient makes the store of a namespace at the other end of a connection,
// which it does not own. Leases are not made under leases.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID) lease.Store {
	return &client{leasesapi.NewLeasesClient(conn), ns}
}

func (c *client) out(ctx context.Context) context.Context { return wire.Outgoing(ctx, c.ns, "") }

func (c *client) Create(ctx context.Context, l lease.Lease) (lease.Lease, error) {
	r, err := c.api.Create(c.out(ctx), &leasesapi.CreateRequest{ID: string(l.ID), Labels: l.Labels})
	return fromProto(r.GetLease()), err
}

func (c *client) Delete(ctx context.Context, id lease.ID, sync bool) error {
	_, err := c.api.Delete(c.out(ctx), &leasesapi.DeleteRequest{ID: string(id), Sync: sync})
	return err
}

func (c *client) List(ctx context.Context, filters ...string) ([]lease.Lease, error) {
	r, err := c.api.List(c.out(ctx), &leasesapi.ListRequest{Filters: filters})
	return wire.Each(r.GetLeases(), fromProto), err
}

func (c *client) AddResource(ctx context.Context, id lease.ID, r lease.Resource) error {
	_, err := c.api.AddResource(c.out(ctx), &leasesapi.AddResourceRequest{ID: string(id), Resource: resourceToProto(r)})
	return err
}

func (c *client) RemoveResource(ctx context.Context, id lease.ID, r lease.Resource) error {
	_, err := c.api.DeleteResource(c.out(ctx), &leasesapi.DeleteResourceRequest{ID: string(id), Resource: resourceToProto(r)})
	return err
}

func (c *client) Resources(ctx context.Context, id lease.ID) ([]lease.Resource, error) {
	r, err := c.api.ListResources(c.out(ctx), &leasesapi.ListResourcesRequest{ID: string(id)})
	return wire.Each(r.GetResources(), resourceFromProto), err
}

func toProto(l lease.Lease) *leasesapi.Lease {
	return &leasesapi.Lease{ID: string(l.ID), CreatedAt: wire.TimeToProto(l.CreatedAt), Labels: l.Labels}
}

func fromProto(l *leasesapi.Lease) lease.Lease {
	return lease.Lease{ID: lease.ID(l.GetID()), CreatedAt: wire.TimeFromProto(l.GetCreatedAt()), Labels: l.GetLabels()}
}

func resourceToProto(r lease.Resource) *leasesapi.Resource {
	return &leasesapi.Resource{ID: r.ID, Type: r.Type}
}

func resourceFromProto(r *leasesapi.Resource) lease.Resource {
	return lease.Resource{ID: r.GetID(), Type: r.GetType()}
}
