package containerrpc

import (
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/container/containertest"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
)

func over(t *testing.T, st container.Store) container.Store {
	conn := wiretest.Serve(t, func(s *grpc.Server) {
		containersapi.RegisterContainersServer(s, NewServer(wiretest.Source{ContainerStore: st}))
	})
	return NewClient(conn, "test", "")
}

// contract: 1.3.1, 1.3.2, 1.3.3, 1.3.4, 1.3.5, 1.2.13
func TestStore(t *testing.T) {
	t.Run("gRPC", func(t *testing.T) {
		containertest.Run(t, func(t *testing.T) container.Store { return over(t, memory.NewContainers()) })
	})
	t.Run("gRPC twice", func(t *testing.T) {
		containertest.Run(t, func(t *testing.T) container.Store { return over(t, over(t, memory.NewContainers())) })
	})
}
