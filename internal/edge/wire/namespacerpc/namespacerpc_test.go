package namespacerpc

import (
	"testing"

	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/namespace/namespacetest"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
)

func over(t *testing.T, st namespace.Store) namespace.Store {
	conn := wiretest.Serve(t, func(s *grpc.Server) {
		namespacesapi.RegisterNamespacesServer(s, NewServer(st))
	})
	return NewClient(conn)
}

// contract: 1.3.28, 1.2.3
func TestStore(t *testing.T) {
	t.Run("gRPC", func(t *testing.T) {
		namespacetest.Run(t, func(t *testing.T) namespace.Store { return over(t, memory.NewNamespaces()) })
	})
	t.Run("gRPC twice", func(t *testing.T) {
		namespacetest.Run(t, func(t *testing.T) namespace.Store { return over(t, over(t, memory.NewNamespaces())) })
	})
}
