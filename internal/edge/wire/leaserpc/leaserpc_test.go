package leaserpc

import (
	"testing"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/lease/leasetest"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
)

func over(t *testing.T, st lease.Store) lease.Store {
	conn := wiretest.Serve(t, func(s *grpc.Server) {
		leasesapi.RegisterLeasesServer(s, NewServer(wiretest.Source{LeaseStore: st}))
	})
	return NewClient(conn, "test")
}

// contract: 1.3.23, 1.3.25, 4.2.4
func TestStore(t *testing.T) {
	t.Run("gRPC", func(t *testing.T) {
		leasetest.Run(t, func(t *testing.T) lease.Store { return over(t, memory.NewLeases()) })
	})
	t.Run("gRPC twice", func(t *testing.T) {
		leasetest.Run(t, func(t *testing.T) lease.Store { return over(t, over(t, memory.NewLeases())) })
	})
}
