package diffrpc_test

import (
	"testing"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/diff/difftest"
	"github.com/gantryd/gantry/internal/edge/wire/diffrpc"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/engine/walkdiff"
)

func overWire(t *testing.T, s diff.Service) diff.Service {
	conn := wiretest.Serve(t, func(srv *grpc.Server) {
		diffapi.RegisterDiffServer(srv, diffrpc.NewServer(wiretest.Source{DiffService: s}))
	})
	return diffrpc.NewClient(conn, "test", "")
}

// contract: 1.3.11, 1.3.12, 1.5.10, 6.5.5
func TestConformance(t *testing.T) {
	for name, hops := range map[string]int{"over gRPC": 1, "over gRPC twice": 2} {
		t.Run(name, func(t *testing.T) {
			difftest.Run(t, func(t *testing.T) difftest.Env {
				store := memory.NewContent()
				var s diff.Service = walkdiff.New(store, walkdiff.Options{TempDir: t.TempDir()})
				for range hops {
					s = overWire(t, s)
				}
				return difftest.Env{Service: s, Content: store}
			})
		})
	}
}

// contract: 1.3.11, 1.3.12
func TestNilFields(t *testing.T) {
	conn := wiretest.Serve(t, func(srv *grpc.Server) {
		store := memory.NewContent()
		diffapi.RegisterDiffServer(srv, diffrpc.NewServer(wiretest.Source{DiffService: walkdiff.New(store, walkdiff.Options{})}))
	})
	api, ctx := diffapi.NewDiffClient(conn), wiretest.Context(t)
	for name, req := range map[string]*diffapi.ApplyRequest{
		"empty":      {},
		"no digest":  {Diff: &types.Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar"}, Mounts: []*types.Mount{{}}},
		"nil mounts": {Diff: &types.Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar"}, Mounts: []*types.Mount{nil, nil}},
	} {
		if _, err := api.Apply(ctx, req); !errdefs.IsInvalidArgument(err) {
			t.Errorf("apply, %s: %v", name, err)
		}
	}
	for name, req := range map[string]*diffapi.DiffRequest{
		"empty":     {},
		"bad epoch": {SourceDateEpoch: &timestamppb.Timestamp{Nanos: -1}},
		"nil mount": {Left: []*types.Mount{nil}, Right: []*types.Mount{nil}},
	} {
		if _, err := api.Diff(ctx, req); !errdefs.IsInvalidArgument(err) {
			t.Errorf("diff, %s: %v", name, err)
		}
	}
}
