// Package sandboxrpc is containerd.services.sandbox.v1 on both sides: the store
// of records, and the controllers that run what they describe.
package sandboxrpc

import (
	"context"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// Server answers from views (contract 1.3.29).
type Server struct {
	sandboxapi.UnimplementedStoreServer
	views view.Source
}

// NewServer makes a server.
func NewServer(views view.Source) *Server { return &Server{views: views} }

// Create implements the RPC.
func (s *Server) Create(ctx context.Context, r *sandboxapi.StoreCreateRequest) (*sandboxapi.StoreCreateResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	if r.Sandbox == nil {
		return nil, wire.Missing("sandbox")
	}
	sb, err := v.Sandboxes().Create(ctx, FromProto(r.Sandbox))
	return &sandboxapi.StoreCreateResponse{Sandbox: ToProto(sb)}, err
}

// Update implements the RPC.
func (s *Server) Update(ctx context.Context, r *sandboxapi.StoreUpdateRequest) (*sandboxapi.StoreUpdateResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	if r.Sandbox == nil {
		return nil, wire.Missing("sandbox")
	}
	sb, err := v.Sandboxes().Update(ctx, FromProto(r.Sandbox), r.Fields...)
	return &sandboxapi.StoreUpdateResponse{Sandbox: ToProto(sb)}, err
}

// Delete implements the RPC.
func (s *Server) Delete(ctx context.Context, r *sandboxapi.StoreDeleteRequest) (*sandboxapi.StoreDeleteResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	return &sandboxapi.StoreDeleteResponse{}, v.Sandboxes().Delete(ctx, r.SandboxID)
}

// List implements the RPC.
func (s *Server) List(ctx context.Context, r *sandboxapi.StoreListRequest) (*sandboxapi.StoreListResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	all, err := v.Sandboxes().List(ctx, r.Filters...)
	return &sandboxapi.StoreListResponse{List: wire.Each(all, ToProto)}, err
}

// Get implements the RPC.
func (s *Server) Get(ctx context.Context, r *sandboxapi.StoreGetRequest) (*sandboxapi.StoreGetResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	sb, err := v.Sandboxes().Get(ctx, r.SandboxID)
	return &sandboxapi.StoreGetResponse{Sandbox: ToProto(sb)}, err
}

type client struct {
	api   sandboxapi.StoreClient
	ns    namespace.ID
	under lease.ID
}

// NewClient makes the store of a namespace at the other end of a connection,
// which it does not own.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID, under lease.ID) sandbox.Store {
	return &client{sandboxapi.NewStoreClient(conn), ns, under}
}

func (c *client) out(ctx context.Context) context.Context { return wire.Outgoing(ctx, c.ns, c.under) }

func (c *client) Get(ctx context.Context, id string) (sandbox.Sandbox, error) {
	r, err := c.api.Get(c.out(ctx), &sandboxapi.StoreGetRequest{SandboxID: id})
	return FromProto(r.GetSandbox()), err
}

func (c *client) List(ctx context.Context, filters ...string) ([]sandbox.Sandbox, error) {
	r, err := c.api.List(c.out(ctx), &sandboxapi.StoreListRequest{Filters: filters})
	return wire.Each(r.GetList(), FromProto), err
}

func (c *client) Create(ctx context.Context, sb sandbox.Sandbox) (sandbox.Sandbox, error) {
	r, err := c.api.Create(c.out(ctx), &sandboxapi.StoreCreateRequest{Sandbox: ToProto(sb)})
	return FromProto(r.GetSandbox()), err
}

func (c *client) Update(ctx context.Context, sb sandbox.Sandbox, fields ...string) (sandbox.Sandbox, error) {
	r, err := c.api.Update(c.out(ctx), &sandboxapi.StoreUpdateRequest{Sandbox: ToProto(sb), Fields: fields})
	return FromProto(r.GetSandbox()), err
}

func (c *client) Delete(ctx context.Context, id string) error {
	_, err := c.api.Delete(c.out(ctx), &sandboxapi.StoreDeleteRequest{SandboxID: id})
	return err
}

// ToProto makes the message of a record.
func ToProto(s sandbox.Sandbox) *types.Sandbox {
	return &types.Sandbox{SandboxID: s.ID, Sandboxer: s.Sandboxer, Labels: s.Labels,
		Runtime: &types.Sandbox_Runtime{Name: s.Runtime.Name, Options: wire.AnyToProto(s.Runtime.Options)},
		Spec:    wire.AnyToProto(s.Spec), Extensions: wire.AnysToProto(s.Extensions),
		CreatedAt: wire.TimeToProto(s.CreatedAt), UpdatedAt: wire.TimeToProto(s.UpdatedAt)}
}

// FromProto makes the record of a message, which may be nil.
func FromProto(s *types.Sandbox) sandbox.Sandbox {
	return sandbox.Sandbox{ID: s.GetSandboxID(), Sandboxer: s.GetSandboxer(), Labels: s.GetLabels(),
		Runtime: container.Runtime{Name: s.GetRuntime().GetName(), Options: wire.AnyFromProto(s.GetRuntime().GetOptions())},
		Spec:    wire.AnyFromProto(s.GetSpec()), Extensions: wire.AnysFromProto(s.GetExtensions()),
		CreatedAt: wire.TimeFromProto(s.GetCreatedAt()), UpdatedAt: wire.TimeFromProto(s.GetUpdatedAt())}
}
