package sandboxrpc

import (
	"context"
	"fmt"
	"math"
	"time"

	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// ControllerServer answers from controllers (contract 1.3.30).
type ControllerServer struct {
	sandboxapi.UnimplementedControllerServer
	views       view.Source
	controllers sandbox.Controllers
}

// NewControllerServer makes a server. The views are asked for the record of a
// sandbox that a request does not bring.
func NewControllerServer(views view.Source, controllers sandbox.Controllers) *ControllerServer {
	return &ControllerServer{views: views, controllers: controllers}
}

func (s *ControllerServer) open(ctx context.Context, sandboxer, id string) (sandbox.Controller, error) {
	ns, err := wire.Namespace(ctx)
	if err != nil {
		return nil, err
	}
	if sandboxer == "" {
		return nil, wire.Missing("sandboxer")
	}
	if id == "" {
		return nil, wire.Missing("sandbox_id")
	}
	return s.controllers.Controller(ns, sandboxer)
}

// record is what a request says of its sandbox.
func record(id string, sb *types.Sandbox) (sandbox.Sandbox, error) {
	r := FromProto(sb)
	if r.ID != "" && r.ID != id {
		return r, fmt.Errorf("sandbox_id is %q, and the sandbox's own %q: %w", id, r.ID, errdefs.ErrInvalidArgument)
	}
	r.ID = id
	return r, nil
}

// Create implements the RPC.
func (s *ControllerServer) Create(ctx context.Context, r *sandboxapi.ControllerCreateRequest) (*sandboxapi.ControllerCreateResponse, error) {
	c, err := s.open(ctx, r.Sandboxer, r.SandboxID)
	if err != nil {
		return nil, err
	}
	sb, err := record(r.SandboxID, r.Sandbox)
	if err == nil && r.Sandbox == nil { // from before containerd 2.0
		var v view.View
		if v, err = wire.View(ctx, s.views); err == nil {
			sb, err = v.Sandboxes().Get(ctx, r.SandboxID)
		}
	}
	if err != nil {
		return nil, err
	}
	err = c.Create(ctx, sb, sandbox.CreateOptions{Rootfs: wire.MountsFromProto(r.Rootfs), Options: wire.AnyFromProto(r.Options), NetNSPath: r.NetnsPath, Annotations: r.Annotations})
	return &sandboxapi.ControllerCreateResponse{SandboxID: r.SandboxID}, err
}

// Start implements the RPC.
func (s *ControllerServer) Start(ctx context.Context, r *sandboxapi.ControllerStartRequest) (*sandboxapi.ControllerStartResponse, error) {
	c, err := s.open(ctx, r.Sandboxer, r.SandboxID)
	if err != nil {
		return nil, err
	}
	i, err := c.Start(ctx, r.SandboxID)
	return &sandboxapi.ControllerStartResponse{SandboxID: i.ID, Pid: i.Pid, CreatedAt: wire.TimeToProto(i.CreatedAt), Labels: i.Labels,
		Address: i.Address, Version: i.Version, Spec: wire.AnyToProto(i.Spec)}, err
}

// Platform implements the RPC.
func (s *ControllerServer) Platform(ctx context.Context, r *sandboxapi.ControllerPlatformRequest) (*sandboxapi.ControllerPlatformResponse, error) {
	c, err := s.open(ctx, r.Sandboxer, r.SandboxID)
	if err != nil {
		return nil, err
	}
	p, err := c.Platform(ctx, r.SandboxID)
	return &sandboxapi.ControllerPlatformResponse{Platform: wire.PlatformToProto(p)}, err
}

// Stop implements the RPC.
func (s *ControllerServer) Stop(ctx context.Context, r *sandboxapi.ControllerStopRequest) (*sandboxapi.ControllerStopResponse, error) {
	c, err := s.open(ctx, r.Sandboxer, r.SandboxID)
	if err != nil {
		return nil, err
	}
	return &sandboxapi.ControllerStopResponse{}, c.Stop(ctx, r.SandboxID, time.Duration(r.TimeoutSecs)*time.Second)
}

// Wait implements the RPC.
func (s *ControllerServer) Wait(ctx context.Context, r *sandboxapi.ControllerWaitRequest) (*sandboxapi.ControllerWaitResponse, error) {
	c, err := s.open(ctx, r.Sandboxer, r.SandboxID)
	if err != nil {
		return nil, err
	}
	x, err := c.Wait(ctx, r.SandboxID)
	return &sandboxapi.ControllerWaitResponse{ExitStatus: x.Status, ExitedAt: wire.TimeToProto(x.At)}, err
}

// Status implements the RPC.
func (s *ControllerServer) Status(ctx context.Context, r *sandboxapi.ControllerStatusRequest) (*sandboxapi.ControllerStatusResponse, error) {
	c, err := s.open(ctx, r.Sandboxer, r.SandboxID)
	if err != nil {
		return nil, err
	}
	st, err := c.Status(ctx, r.SandboxID, r.Verbose)
	return &sandboxapi.ControllerStatusResponse{SandboxID: st.ID, Pid: st.Pid, State: st.State, Info: st.Info, CreatedAt: wire.TimeToProto(st.CreatedAt),
		ExitedAt: wire.TimeToProto(st.ExitedAt), Extra: wire.AnyToProto(st.Extra), Address: st.Address, Version: st.Version}, err
}

// Shutdown implements the RPC.
func (s *ControllerServer) Shutdown(ctx context.Context, r *sandboxapi.ControllerShutdownRequest) (*sandboxapi.ControllerShutdownResponse, error) {
	c, err := s.open(ctx, r.Sandboxer, r.SandboxID)
	if err != nil {
		return nil, err
	}
	return &sandboxapi.ControllerShutdownResponse{}, c.Shutdown(ctx, r.SandboxID)
}

// Metrics implements the RPC.
func (s *ControllerServer) Metrics(ctx context.Context, r *sandboxapi.ControllerMetricsRequest) (*sandboxapi.ControllerMetricsResponse, error) {
	c, err := s.open(ctx, r.Sandboxer, r.SandboxID)
	if err != nil {
		return nil, err
	}
	m, err := c.Metrics(ctx, r.SandboxID)
	return &sandboxapi.ControllerMetricsResponse{Metrics: wire.MetricToProto(m)}, err
}

// Update implements the RPC.
func (s *ControllerServer) Update(ctx context.Context, r *sandboxapi.ControllerUpdateRequest) (*sandboxapi.ControllerUpdateResponse, error) {
	c, err := s.open(ctx, r.Sandboxer, r.SandboxID)
	if err != nil {
		return nil, err
	}
	if r.Sandbox == nil {
		return nil, wire.Missing("sandbox")
	}
	sb, err := record(r.SandboxID, r.Sandbox)
	if err != nil {
		return nil, err
	}
	return &sandboxapi.ControllerUpdateResponse{}, c.Update(ctx, sb, r.Fields...)
}

type controllerClient struct {
	api       sandboxapi.ControllerClient
	ns        namespace.ID
	sandboxer string
}

// NewControllerClient makes the controller of that name, in a namespace, at the
// other end of a connection, which it does not own.
func NewControllerClient(conn grpc.ClientConnInterface, ns namespace.ID, sandboxer string) sandbox.Controller {
	return &controllerClient{sandboxapi.NewControllerClient(conn), ns, sandboxer}
}

func (c *controllerClient) out(ctx context.Context) context.Context {
	return wire.Outgoing(ctx, c.ns, "")
}

func (c *controllerClient) Create(ctx context.Context, s sandbox.Sandbox, opts sandbox.CreateOptions) error {
	_, err := c.api.Create(c.out(ctx), &sandboxapi.ControllerCreateRequest{SandboxID: s.ID, Sandboxer: c.sandboxer, Sandbox: ToProto(s),
		Rootfs: wire.MountsToProto(opts.Rootfs), Options: wire.AnyToProto(opts.Options), NetnsPath: opts.NetNSPath, Annotations: opts.Annotations})
	return err
}

func (c *controllerClient) Start(ctx context.Context, id string) (sandbox.Instance, error) {
	r, err := c.api.Start(c.out(ctx), &sandboxapi.ControllerStartRequest{SandboxID: id, Sandboxer: c.sandboxer})
	if err != nil {
		return sandbox.Instance{}, err
	}
	return sandbox.Instance{ID: r.SandboxID, Pid: r.Pid, CreatedAt: wire.TimeFromProto(r.CreatedAt), Labels: r.Labels, Address: r.Address, Version: r.Version, Spec: wire.AnyFromProto(r.Spec)}, nil
}

func (c *controllerClient) Platform(ctx context.Context, id string) (ocispec.Platform, error) {
	r, err := c.api.Platform(c.out(ctx), &sandboxapi.ControllerPlatformRequest{SandboxID: id, Sandboxer: c.sandboxer})
	return wire.PlatformFromProto(r.GetPlatform()), err
}

func (c *controllerClient) Stop(ctx context.Context, id string, timeout time.Duration) error {
	// Not less time than it was given, and what does not fit is for ever.
	secs := max(timeout, 0) / time.Second
	if timeout > secs*time.Second {
		secs++
	}
	secs = min(secs, math.MaxUint32)
	_, err := c.api.Stop(c.out(ctx), &sandboxapi.ControllerStopRequest{SandboxID: id, Sandboxer: c.sandboxer, TimeoutSecs: uint32(secs)})
	return err
}

func (c *controllerClient) Wait(ctx context.Context, id string) (sandbox.Exit, error) {
	r, err := c.api.Wait(c.out(ctx), &sandboxapi.ControllerWaitRequest{SandboxID: id, Sandboxer: c.sandboxer})
	return sandbox.Exit{Status: r.GetExitStatus(), At: wire.TimeFromProto(r.GetExitedAt())}, err
}

func (c *controllerClient) Status(ctx context.Context, id string, verbose bool) (sandbox.Status, error) {
	r, err := c.api.Status(c.out(ctx), &sandboxapi.ControllerStatusRequest{SandboxID: id, Sandboxer: c.sandboxer, Verbose: verbose})
	if err != nil {
		return sandbox.Status{}, err
	}
	return sandbox.Status{ID: r.SandboxID, Pid: r.Pid, State: r.State, Info: r.Info, CreatedAt: wire.TimeFromProto(r.CreatedAt), ExitedAt: wire.TimeFromProto(r.ExitedAt),
		Extra: wire.AnyFromProto(r.Extra), Address: r.Address, Version: r.Version}, nil
}

func (c *controllerClient) Shutdown(ctx context.Context, id string) error {
	_, err := c.api.Shutdown(c.out(ctx), &sandboxapi.ControllerShutdownRequest{SandboxID: id, Sandboxer: c.sandboxer})
	return err
}

func (c *controllerClient) Metrics(ctx context.Context, id string) (task.Metric, error) {
	r, err := c.api.Metrics(c.out(ctx), &sandboxapi.ControllerMetricsRequest{SandboxID: id, Sandboxer: c.sandboxer})
	return wire.MetricFromProto(r.GetMetrics()), err
}

func (c *controllerClient) Update(ctx context.Context, s sandbox.Sandbox, fields ...string) error {
	_, err := c.api.Update(c.out(ctx), &sandboxapi.ControllerUpdateRequest{SandboxID: s.ID, Sandboxer: c.sandboxer, Sandbox: ToProto(s), Fields: fields})
	return err
}
