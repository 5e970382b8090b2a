// Package namespacerpc is containerd.services.namespaces.v1 on both sides.
package namespacerpc

import (
	"context"

	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// Server answers from a store (contract 1.3.28). It needs no namespace header.
type Server struct {
	namespacesapi.UnimplementedNamespacesServer
	store namespace.Store
}

// NewServer makes a server.
func NewServer(store namespace.Store) *Server { return &Server{store: store} }

// Get implements the RPC.
func (s *Server) Get(ctx context.Context, r *namespacesapi.GetNamespaceRequest) (*namespacesapi.GetNamespaceResponse, error) {
	ns, err := s.store.Get(ctx, namespace.ID(r.Name))
	return &namespacesapi.GetNamespaceResponse{Namespace: toProto(ns)}, err
}

// List implements the RPC. Its filter is ignored (contract 1.2.8).
func (s *Server) List(ctx context.Context, r *namespacesapi.ListNamespacesRequest) (*namespacesapi.ListNamespacesResponse, error) {
	all, err := s.store.List(ctx)
	return &namespacesapi.ListNamespacesResponse{Namespaces: wire.Each(all, toProto)}, err
}

// Create implements the RPC.
func (s *Server) Create(ctx context.Context, r *namespacesapi.CreateNamespaceRequest) (*namespacesapi.CreateNamespaceResponse, error) {
	if r.Namespace == nil {
		return nil, wire.Missing("namespace")
	}
	ns, err := s.store.Create(ctx, fromProto(r.Namespace))
	return &namespacesapi.CreateNamespaceResponse{Namespace: toProto(ns)}, err
}

// Update implements the RPC.
func (s *Server) Update(ctx context.Context, r *namespacesapi.UpdateNamespaceRequest) (*namespacesapi.UpdateNamespaceResponse, error) {
	if r.Namespace == nil {
		return nil, wire.Missing("namespace")
	}
	ns, err := s.store.Update(ctx, fromProto(r.Namespace), r.UpdateMask.GetPaths()...)
	return &namespacesapi.UpdateNamespaceResponse{Namespace: toProto(ns)}, err
}

// Delete implements the RPC.
func (s *Server) Delete(ctx context.Context, r *namespacesapi.DeleteNamespaceRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, s.store.Delete(ctx, namespace.ID(r.Name))
}

type client struct {
	api namespacesapi.NamespacesClient
}

// NewClient makes the store at the other end of a connection, which it does not own.
func NewClient(conn grpc.ClientConnInterface) namespace.Store {
	return &client{namespacesapi.NewNamespacesClient(conn)}
}

func (c *client) Get(ctx context.Context, id namespace.ID) (namespace.Namespace, error) {
	r, err := c.api.Get(ctx, &namespacesapi.GetNamespaceRequest{Name: string(id)})
	return fromProto(r.GetNamespace()), err
}

func (c *client) List(ctx context.Context) ([]namespace.Namespace, error) {
	r, err := c.api.List(ctx, &namespacesapi.ListNamespacesRequest{})
	return wire.Each(r.GetNamespaces(), fromProto), err
}

func (c *client) Create(ctx context.Context, ns namespace.Namespace) (namespace.Namespace, error) {
	r, err := c.api.Create(ctx, &namespacesapi.CreateNamespaceRequest{Namespace: toProto(ns)})
	return fromProto(r.GetNamespace()), err
}

func (c *client) Update(ctx context.Context, ns namespace.Namespace, fields ...string) (namespace.Namespace, error) {
	r, err := c.api.Update(ctx, &namespacesapi.UpdateNamespaceRequest{Namespace: toProto(ns), UpdateMask: wire.Mask(fields)})
	return fromProto(r.GetNamespace()), err
}

func (c *client) Delete(ctx context.Context, id namespace.ID) error {
	_, err := c.api.Delete(ctx, &namespacesapi.DeleteNamespaceRequest{Name: string(id)})
	return err
}

func toProto(ns namespace.Namespace) *namespacesapi.Namespace {
	return &namespacesapi.Namespace{Name: string(ns.ID), Labels: ns.Labels}
}

func fromProto(ns *namespacesapi.Namespace) namespace.Namespace {
	return namespace.Namespace{ID: namespace.ID(ns.GetName()), Labels: ns.GetLabels()}
}
