// Package versionrpc is containerd.services.version.v1 on both sides.
package versionrpc

import (
	"context"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Server answers with a fixed version (contract 1.1.9). It needs no namespace.
type Server struct {
	versionapi.UnimplementedVersionServer
	version, revision string
}

// NewServer makes a server.
func NewServer(version, revision string) *Server {
	return &Server{version: version, revision: revision}
}

// Version implements the RPC.
func (s *Server) Version(context.Context, *emptypb.Empty) (*versionapi.VersionResponse, error) {
	return &versionapi.VersionResponse{Version: s.version, Revision: s.revision}, nil
}

// Get asks the daemon at the other end of conn.
func Get(ctx context.Context, conn grpc.ClientConnInterface) (version, revision string, err error) {
	r, err := versionapi.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return "", "", err
	}
	return r.Version, r.Revision, nil
}
