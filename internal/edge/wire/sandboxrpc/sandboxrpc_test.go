package sandboxrpc

import (
	"testing"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/sandbox/sandboxtest"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
)

func over(t *testing.T, st sandbox.Store) sandbox.Store {
	conn := wiretest.Serve(t, func(s *grpc.Server) {
		sandboxapi.RegisterStoreServer(s, NewServer(wiretest.Source{SandboxStore: st}))
	})
	return NewClient(conn, "test", "")
}

// contract: 1.3.29
func TestStore(t *testing.T) {
	t.Run("gRPC", func(t *testing.T) {
		sandboxtest.Run(t, func(t *testing.T) sandbox.Store { return over(t, memory.NewSandboxes()) })
	})
	t.Run("gRPC twice", func(t *testing.T) {
		sandboxtest.Run(t, func(t *testing.T) sandbox.Store { return over(t, over(t, memory.NewSandboxes())) })
	})
}
