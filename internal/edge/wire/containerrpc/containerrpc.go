// Package containerrpc is containerd.services.containers.v1 on both sides.
package containerrpc

import (
	"context"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// Server answers from views (contract 1.3.1 to 1.3.5).
type Server struct {
	containersapi.UnimplementedContainersServer
	views view.Source
}

// NewServer makes a server.
func NewServer(views view.Source) *Server { return &Server{views: views} }

// Get implements the RPC.
func (s *Server) Get(ctx context.Context, r *containersapi.GetContainerRequest) (*containersapi.GetContainerResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	c, err := v.Containers().Get(ctx, container.ID(r.ID))
	return &containersapi.GetContainerResponse{Container: toProto(c)}, err
}

// List implements the RPC.
func (s *Server) List(ctx context.Context, r *containersapi.ListContainersRequest) (*containersapi.ListContainersResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	resp := &containersapi.ListContainersResponse{}
	err = v.Containers().Walk(ctx, func(c container.Container) error {
		resp.Containers = append(resp.Containers, toProto(c))
		return nil
	}, r.Filters...)
	return resp, err
}

// ListStream implements the RPC: one container a message (contract 1.2.13).
func (s *Server) ListStream(r *containersapi.ListContainersRequest, out containersapi.Containers_ListStreamServer) error {
	v, err := wire.View(out.Context(), s.views)
	if err != nil {
		return err
	}
	return v.Containers().Walk(out.Context(), func(c container.Container) error {
		return out.Send(&containersapi.ListContainerMessage{Container: toProto(c)})
	}, r.Filters...)
}

// Create implements the RPC.
func (s *Server) Create(ctx context.Context, r *containersapi.CreateContainerRequest) (*containersapi.CreateContainerResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	if r.Container == nil {
		return nil, wire.Missing("container")
	}
	c, err := v.Containers().Create(ctx, fromProto(r.Container))
	return &containersapi.CreateContainerResponse{Container: toProto(c)}, err
}

// Update implements the RPC.
func (s *Server) Update(ctx context.Context, r *containersapi.UpdateContainerRequest) (*containersapi.UpdateContainerResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	if r.Container == nil {
		return nil, wire.Missing("container")
	}
	c, err := v.Containers().Update(ctx, fromProto(r.Container), r.UpdateMask.GetPaths()...)
	return &containersapi.UpdateContainerResponse{Container: toProto(c)}, err
}

// Delete implements the RPC.
func (s *Server) Delete(ctx context.Context, r *containersapi.DeleteContainerRequest) (*emptypb.Empty, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, v.Containers().Delete(ctx, container.ID(r.ID))
}

type client struct {
	api   containersapi.ContainersClient
	ns    namespace.ID
	under lease.ID
}

// NewClient makes the store of a namespace at the other end of a connection,
// which it does not own.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID, under lease.ID) container.Store {
	return &client{containersapi.NewContainersClient(conn), ns, under}
}

func (c *client) out(ctx context.Context) context.Context { return wire.Outgoing(ctx, c.ns, c.under) }

func (c *client) Get(ctx context.Context, id container.ID) (container.Container, error) {
	r, err := c.api.Get(c.out(ctx), &containersapi.GetContainerRequest{ID: string(id)})
	return fromProto(r.GetContainer()), err
}

func (c *client) Walk(ctx context.Context, fn func(container.Container) error, filters ...string) error {
	ctx, cancel := context.WithCancel(c.out(ctx))
	defer cancel()
	stream, err := c.api.ListStream(ctx, &containersapi.ListContainersRequest{Filters: filters})
	if err != nil {
		return err
	}
	return wire.Receive(stream, func(m *containersapi.ListContainerMessage) error { return fn(fromProto(m.Container)) })
}

func (c *client) Create(ctx context.Context, ctr container.Container) (container.Container, error) {
	r, err := c.api.Create(c.out(ctx), &containersapi.CreateContainerRequest{Container: toProto(ctr)})
	return fromProto(r.GetContainer()), err
}

func (c *client) Update(ctx context.Context, ctr container.Container, fields ...string) (container.Container, error) {
	r, err := c.api.Update(c.out(ctx), &containersapi.UpdateContainerRequest{Container: toProto(ctr), UpdateMask: wire.Mask(fields)})
	return fromProto(r.GetContainer()), err
}

func (c *client) Delete(ctx context.Context, id container.ID) error {
	_, err := c.api.Delete(c.out(ctx), &containersapi.DeleteContainerRequest{ID: string(id)})
	return err
}

func toProto(c container.Container) *containersapi.Container {
	return &containersapi.Container{ID: string(c.ID), Labels: c.Labels, Image: c.Image,
		Runtime:     &containersapi.Container_Runtime{Name: c.Runtime.Name, Options: wire.AnyToProto(c.Runtime.Options)},
		Spec:        wire.AnyToProto(c.Spec),
		Snapshotter: c.Snapshotter, SnapshotKey: c.SnapshotKey, Sandbox: c.SandboxID, Extensions: wire.AnysToProto(c.Extensions),
		CreatedAt: wire.TimeToProto(c.CreatedAt), UpdatedAt: wire.TimeToProto(c.UpdatedAt)}
}

func fromProto(c *containersapi.Container) container.Container {
	return container.Container{ID: container.ID(c.GetID()), Labels: c.GetLabels(), Image: c.GetImage(),
		Runtime:     container.Runtime{Name: c.GetRuntime().GetName(), Options: wire.AnyFromProto(c.GetRuntime().GetOptions())},
		Spec:        wire.AnyFromProto(c.GetSpec()),
		Snapshotter: c.GetSnapshotter(), SnapshotKey: c.GetSnapshotKey(), SandboxID: c.GetSandbox(), Extensions: wire.AnysFromProto(c.GetExtensions()),
		CreatedAt: wire.TimeFromProto(c.GetCreatedAt()), UpdatedAt: wire.TimeFromProto(c.GetUpdatedAt())}
}
