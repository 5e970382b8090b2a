package sandboxrpc

import (
	"errors"
	"fmt"
	"testing"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/sandbox/sandboxtest"
	"github.com/gantryd/gantry/internal/edge/wire"
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

// one is a table of one controller.
type one struct{ c sandbox.Controller }

func (o one) Controller(_ namespace.ID, sandboxer string) (sandbox.Controller, error) {
	if sandboxer != "one" {
		return nil, fmt.Errorf("sandboxer %q: %w", sandboxer, errdefs.ErrNotFound)
	}
	return o.c, nil
}

func serveController(t *testing.T, c sandbox.Controller) grpc.ClientConnInterface {
	return wiretest.Serve(t, func(s *grpc.Server) {
		sandboxapi.RegisterControllerServer(s, NewControllerServer(wiretest.Source{SandboxStore: memory.NewSandboxes()}, one{c}))
	})
}

func overController(t *testing.T, c sandbox.Controller) sandbox.Controller {
	return NewControllerClient(serveController(t, c), "test", "one")
}

// contract: 1.3.30, 7.3.25
func TestController(t *testing.T) {
	fresh := func() sandbox.Controller { return memory.NewSandboxController() }
	t.Run("gRPC", func(t *testing.T) {
		sandboxtest.RunController(t, sandboxtest.ControllerOptions{Open: func(t *testing.T) sandbox.Controller { return overController(t, fresh()) }})
	})
	t.Run("gRPC twice", func(t *testing.T) {
		sandboxtest.RunController(t, sandboxtest.ControllerOptions{Open: func(t *testing.T) sandbox.Controller {
			return overController(t, overController(t, fresh()))
		}})
	})
}

// What containerd leaves out of its answers is in ours, and a missing sandbox
// is told from a stopped one.
// contract: 1.3.30
func TestControllerAnswers(t *testing.T) {
	conn := serveController(t, memory.NewSandboxController())
	ctx := wire.Outgoing(t.Context(), "test", "")
	api := sandboxapi.NewControllerClient(conn)
	for sandboxer, want := range map[string]error{"": errdefs.ErrInvalidArgument, "none": errdefs.ErrNotFound} {
		for name, call := range map[string]func() error{
			"create": func() error {
				_, err := api.Create(ctx, &sandboxapi.ControllerCreateRequest{SandboxID: "x", Sandboxer: sandboxer})
				return err
			},
			"start": func() error {
				_, err := api.Start(ctx, &sandboxapi.ControllerStartRequest{SandboxID: "x", Sandboxer: sandboxer})
				return err
			},
			"stop": func() error {
				_, err := api.Stop(ctx, &sandboxapi.ControllerStopRequest{SandboxID: "x", Sandboxer: sandboxer})
				return err
			},
			"update": func() error {
				_, err := api.Update(ctx, &sandboxapi.ControllerUpdateRequest{SandboxID: "x", Sandboxer: sandboxer})
				return err
			},
		} {
			if err := call(); !errors.Is(err, want) {
				t.Errorf("%s with sandboxer %q: %v, want %v", name, sandboxer, err, want)
			}
		}
	}
	// One that is not in the store, and that the request does not bring.
	if _, err := api.Create(ctx, &sandboxapi.ControllerCreateRequest{SandboxID: "x", Sandboxer: "one"}); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	if _, err := api.Create(ctx, &sandboxapi.ControllerCreateRequest{SandboxID: "x", Sandboxer: "one", Sandbox: &types.Sandbox{SandboxID: "y"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	if _, err := api.Update(ctx, &sandboxapi.ControllerUpdateRequest{SandboxID: "x", Sandboxer: "one"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	if _, err := api.Create(ctx, &sandboxapi.ControllerCreateRequest{SandboxID: "x", Sandboxer: "one", Sandbox: &types.Sandbox{Spec: &anypb.Any{TypeUrl: "s", Value: []byte("1")}}}); err != nil {
		t.Fatal(err)
	}
	r, err := api.Start(ctx, &sandboxapi.ControllerStartRequest{SandboxID: "x", Sandboxer: "one"})
	if err != nil || r.Address == "" || r.Version != 3 || string(r.Spec.GetValue()) != "1" || r.CreatedAt == nil {
		t.Errorf("%v %v", r, err)
	}
	st, err := api.Status(ctx, &sandboxapi.ControllerStatusRequest{SandboxID: "x", Sandboxer: "one", Verbose: true})
	if err != nil || st.Address != r.Address || st.Version != 3 || st.State != sandbox.StateReady || len(st.Info) != 1 || st.Extra.GetTypeUrl() != "extra" || st.ExitedAt != nil {
		t.Errorf("%v %v", st, err)
	}
	m, err := api.Metrics(ctx, &sandboxapi.ControllerMetricsRequest{SandboxID: "x", Sandboxer: "one"})
	if err != nil || m.Metrics.GetID() != "x" || m.Metrics.GetData().GetTypeUrl() != "metric" {
		t.Errorf("%v %v", m, err)
	}
}
