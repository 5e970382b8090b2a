// Package taskrpc is containerd.services.tasks.v1 on both sides.
package taskrpc

import (
	"cmp"
	"context"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// Server answers from views (contract 1.3.33 to 1.3.40).
type Server struct {
	tasksapi.UnimplementedTasksServer
	views view.Source
}

// NewServer makes a server.
func NewServer(views view.Source) *Server { return &Server{views: views} }

func (s *Server) tasks(ctx context.Context) (task.Store, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	return v.Tasks(), nil
}

// Create implements the RPC.
func (s *Server) Create(ctx context.Context, r *tasksapi.CreateTaskRequest) (*tasksapi.CreateTaskResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	opts := task.CreateOptions{
		Rootfs:      wire.MountsFromProto(r.Rootfs),
		IO:          task.IO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
		Options:     wire.AnyFromProto(r.Options),
		RuntimePath: r.RuntimePath, APIAddress: r.TaskApiAddress, APIVersion: r.TaskApiVersion,
	}
	if r.Checkpoint != nil {
		d := wire.DescFromProto(r.Checkpoint)
		opts.Checkpoint = &d
	}
	pid, err := ts.Create(ctx, container.ID(r.ContainerID), opts)
	return &tasksapi.CreateTaskResponse{ContainerID: r.ContainerID, Pid: pid}, err
}

// Start implements the RPC.
func (s *Server) Start(ctx context.Context, r *tasksapi.StartRequest) (*tasksapi.StartResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	pid, err := ts.Start(ctx, container.ID(r.ContainerID), task.ExecID(r.ExecID))
	return &tasksapi.StartResponse{Pid: pid}, err
}

// Delete implements the RPC.
func (s *Server) Delete(ctx context.Context, r *tasksapi.DeleteTaskRequest) (*tasksapi.DeleteResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	x, err := ts.Delete(ctx, container.ID(r.ContainerID))
	return deleted(x), err
}

// DeleteProcess implements the RPC.
func (s *Server) DeleteProcess(ctx context.Context, r *tasksapi.DeleteProcessRequest) (*tasksapi.DeleteResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	x, err := ts.DeleteExec(ctx, container.ID(r.ContainerID), task.ExecID(r.ExecID))
	return deleted(x), err
}

func deleted(x task.Exit) *tasksapi.DeleteResponse {
	return &tasksapi.DeleteResponse{ID: x.ID, Pid: x.Pid, ExitStatus: x.Status, ExitedAt: wire.TimeToProto(x.At)}
}

// Get implements the RPC.
func (s *Server) Get(ctx context.Context, r *tasksapi.GetRequest) (*tasksapi.GetResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	p, err := ts.Get(ctx, container.ID(r.ContainerID), task.ExecID(r.ExecID))
	return &tasksapi.GetResponse{Process: toProto(p)}, err
}

// List implements the RPC. The filter is ignored (contract 1.2.8).
func (s *Server) List(ctx context.Context, _ *tasksapi.ListTasksRequest) (*tasksapi.ListTasksResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	l, err := ts.List(ctx)
	return &tasksapi.ListTasksResponse{Tasks: wire.Each(l, toProto)}, err
}

// Kill implements the RPC.
func (s *Server) Kill(ctx context.Context, r *tasksapi.KillRequest) (*emptypb.Empty, error) {
	return s.do(ctx, func(ts task.Store) error {
		return ts.Kill(ctx, container.ID(r.ContainerID), task.ExecID(r.ExecID), r.Signal, r.All)
	})
}

// do is for the RPCs that answer with nothing.
func (s *Server) do(ctx context.Context, f func(task.Store) error) (*emptypb.Empty, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, f(ts)
}

// Exec implements the RPC.
func (s *Server) Exec(ctx context.Context, r *tasksapi.ExecProcessRequest) (*emptypb.Empty, error) {
	return s.do(ctx, func(ts task.Store) error {
		return ts.Exec(ctx, container.ID(r.ContainerID), task.ExecID(r.ExecID), task.ExecOptions{
			IO:   task.IO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
			Spec: wire.AnyFromProto(r.Spec),
		})
	})
}

// ResizePty implements the RPC.
func (s *Server) ResizePty(ctx context.Context, r *tasksapi.ResizePtyRequest) (*emptypb.Empty, error) {
	return s.do(ctx, func(ts task.Store) error {
		return ts.Resize(ctx, container.ID(r.ContainerID), task.ExecID(r.ExecID), r.Width, r.Height)
	})
}

// CloseIO implements the RPC. Only stdin can be closed; a request that does
// not ask for it does nothing to a process that exists (contract 13.39).
func (s *Server) CloseIO(ctx context.Context, r *tasksapi.CloseIORequest) (*emptypb.Empty, error) {
	return s.do(ctx, func(ts task.Store) error {
		if !r.Stdin {
			_, err := ts.Get(ctx, container.ID(r.ContainerID), task.ExecID(r.ExecID))
			return err
		}
		return ts.CloseStdin(ctx, container.ID(r.ContainerID), task.ExecID(r.ExecID))
	})
}

// Pause implements the RPC.
func (s *Server) Pause(ctx context.Context, r *tasksapi.PauseTaskRequest) (*emptypb.Empty, error) {
	return s.do(ctx, func(ts task.Store) error { return ts.Pause(ctx, container.ID(r.ContainerID)) })
}

// Resume implements the RPC.
func (s *Server) Resume(ctx context.Context, r *tasksapi.ResumeTaskRequest) (*emptypb.Empty, error) {
	return s.do(ctx, func(ts task.Store) error { return ts.Resume(ctx, container.ID(r.ContainerID)) })
}

// ListPids implements the RPC.
func (s *Server) ListPids(ctx context.Context, r *tasksapi.ListPidsRequest) (*tasksapi.ListPidsResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	l, err := ts.Pids(ctx, container.ID(r.ContainerID))
	return &tasksapi.ListPidsResponse{Processes: wire.Each(l, func(p task.ProcessInfo) *tasktypes.ProcessInfo {
		return &tasktypes.ProcessInfo{Pid: p.Pid, Info: wire.AnyToProto(p.Info)}
	})}, err
}

// Checkpoint implements the RPC.
func (s *Server) Checkpoint(ctx context.Context, r *tasksapi.CheckpointTaskRequest) (*tasksapi.CheckpointTaskResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	ds, err := ts.Checkpoint(ctx, container.ID(r.ContainerID), r.ParentCheckpoint, wire.AnyFromProto(r.Options))
	return &tasksapi.CheckpointTaskResponse{Descriptors: wire.Each(ds, wire.DescToProto)}, err
}

// Update implements the RPC.
func (s *Server) Update(ctx context.Context, r *tasksapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	return s.do(ctx, func(ts task.Store) error {
		return ts.Update(ctx, container.ID(r.ContainerID), wire.AnyFromProto(r.Resources), r.Annotations)
	})
}

// Metrics implements the RPC.
func (s *Server) Metrics(ctx context.Context, r *tasksapi.MetricsRequest) (*tasksapi.MetricsResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	l, err := ts.Metrics(ctx, r.Filters...)
	return &tasksapi.MetricsResponse{Metrics: wire.Each(l, wire.MetricToProto)}, err
}

// Wait implements the RPC.
func (s *Server) Wait(ctx context.Context, r *tasksapi.WaitRequest) (*tasksapi.WaitResponse, error) {
	ts, err := s.tasks(ctx)
	if err != nil {
		return nil, err
	}
	x, err := ts.Wait(ctx, container.ID(r.ContainerID), task.ExecID(r.ExecID))
	return &tasksapi.WaitResponse{ExitStatus: x.Status, ExitedAt: wire.TimeToProto(x.At)}, err
}

func toProto(p task.Process) *tasktypes.Process {
	return &tasktypes.Process{
		ContainerID: string(p.ContainerID), ID: p.ID, Pid: p.Pid, Status: tasktypes.Status(p.Status),
		Stdin: p.IO.Stdin, Stdout: p.IO.Stdout, Stderr: p.IO.Stderr, Terminal: p.IO.Terminal,
		ExitStatus: p.ExitStatus, ExitedAt: wire.TimeToProto(p.ExitedAt),
	}
}

// fromProto fills in the container for daemons that leave it out.
func fromProto(p *tasktypes.Process, id container.ID) task.Process {
	out := task.Process{
		ContainerID: container.ID(p.GetContainerID()), ID: p.GetID(), Pid: p.GetPid(), Status: task.Status(p.GetStatus()),
		IO:         task.IO{Stdin: p.GetStdin(), Stdout: p.GetStdout(), Stderr: p.GetStderr(), Terminal: p.GetTerminal()},
		ExitStatus: p.GetExitStatus(), ExitedAt: wire.TimeFromProto(p.GetExitedAt()),
	}
	out.ContainerID = cmp.Or(out.ContainerID, id)
	return out
}

// client is a task.Store at the other end of a connection.
type client struct {
	c     tasksapi.TasksClient
	ns    namespace.ID
	under lease.ID
}

// NewClient makes a store of the tasks of ns. Headers are added to each
// request; errors arrive as core errors by the connection's interceptors.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID, under lease.ID) task.Store {
	return &client{c: tasksapi.NewTasksClient(conn), ns: ns, under: under}
}

func (c *client) ctx(ctx context.Context) context.Context { return wire.Outgoing(ctx, c.ns, c.under) }

func (c *client) Create(ctx context.Context, id container.ID, o task.CreateOptions) (uint32, error) {
	r := &tasksapi.CreateTaskRequest{
		ContainerID: string(id), Rootfs: wire.MountsToProto(o.Rootfs),
		Stdin: o.IO.Stdin, Stdout: o.IO.Stdout, Stderr: o.IO.Stderr, Terminal: o.IO.Terminal,
		Options: wire.AnyToProto(o.Options), RuntimePath: o.RuntimePath,
		TaskApiAddress: o.APIAddress, TaskApiVersion: o.APIVersion,
	}
	if o.Checkpoint != nil {
		r.Checkpoint = wire.DescToProto(*o.Checkpoint)
	}
	resp, err := c.c.Create(c.ctx(ctx), r)
	return resp.GetPid(), err
}

func (c *client) Start(ctx context.Context, id container.ID, exec task.ExecID) (uint32, error) {
	resp, err := c.c.Start(c.ctx(ctx), &tasksapi.StartRequest{ContainerID: string(id), ExecID: string(exec)})
	return resp.GetPid(), err
}

func (c *client) Delete(ctx context.Context, id container.ID) (task.Exit, error) {
	resp, err := c.c.Delete(c.ctx(ctx), &tasksapi.DeleteTaskRequest{ContainerID: string(id)})
	return exit(resp, string(id)), err
}

func (c *client) DeleteExec(ctx context.Context, id container.ID, exec task.ExecID) (task.Exit, error) {
	resp, err := c.c.DeleteProcess(c.ctx(ctx), &tasksapi.DeleteProcessRequest{ContainerID: string(id), ExecID: string(exec)})
	return exit(resp, string(exec)), err
}

func exit(r *tasksapi.DeleteResponse, id string) task.Exit {
	if r == nil {
		return task.Exit{}
	}
	return task.Exit{ID: id, Pid: r.Pid, Status: r.ExitStatus, At: wire.TimeFromProto(r.ExitedAt)}
}

func (c *client) Get(ctx context.Context, id container.ID, exec task.ExecID) (task.Process, error) {
	resp, err := c.c.Get(c.ctx(ctx), &tasksapi.GetRequest{ContainerID: string(id), ExecID: string(exec)})
	if err != nil {
		return task.Process{}, err
	}
	return fromProto(resp.Process, id), nil
}

func (c *client) List(ctx context.Context) ([]task.Process, error) {
	resp, err := c.c.List(c.ctx(ctx), &tasksapi.ListTasksRequest{})
	// The container's id is the first process's, which is what lists are of.
	return wire.Each(resp.GetTasks(), func(p *tasktypes.Process) task.Process { return fromProto(p, container.ID(p.GetID())) }), err
}

func (c *client) Kill(ctx context.Context, id container.ID, exec task.ExecID, signal uint32, all bool) error {
	_, err := c.c.Kill(c.ctx(ctx), &tasksapi.KillRequest{ContainerID: string(id), ExecID: string(exec), Signal: signal, All: all})
	return err
}

func (c *client) Exec(ctx context.Context, id container.ID, exec task.ExecID, o task.ExecOptions) error {
	_, err := c.c.Exec(c.ctx(ctx), &tasksapi.ExecProcessRequest{
		ContainerID: string(id), ExecID: string(exec), Spec: wire.AnyToProto(o.Spec),
		Stdin: o.IO.Stdin, Stdout: o.IO.Stdout, Stderr: o.IO.Stderr, Terminal: o.IO.Terminal,
	})
	return err
}

func (c *client) Resize(ctx context.Context, id container.ID, exec task.ExecID, width, height uint32) error {
	_, err := c.c.ResizePty(c.ctx(ctx), &tasksapi.ResizePtyRequest{ContainerID: string(id), ExecID: string(exec), Width: width, Height: height})
	return err
}

func (c *client) CloseStdin(ctx context.Context, id container.ID, exec task.ExecID) error {
	_, err := c.c.CloseIO(c.ctx(ctx), &tasksapi.CloseIORequest{ContainerID: string(id), ExecID: string(exec), Stdin: true})
	return err
}

func (c *client) Pause(ctx context.Context, id container.ID) error {
	_, err := c.c.Pause(c.ctx(ctx), &tasksapi.PauseTaskRequest{ContainerID: string(id)})
	return err
}

func (c *client) Resume(ctx context.Context, id container.ID) error {
	_, err := c.c.Resume(c.ctx(ctx), &tasksapi.ResumeTaskRequest{ContainerID: string(id)})
	return err
}

func (c *client) Pids(ctx context.Context, id container.ID) ([]task.ProcessInfo, error) {
	resp, err := c.c.ListPids(c.ctx(ctx), &tasksapi.ListPidsRequest{ContainerID: string(id)})
	return wire.Each(resp.GetProcesses(), func(p *tasktypes.ProcessInfo) task.ProcessInfo {
		return task.ProcessInfo{Pid: p.GetPid(), Info: wire.AnyFromProto(p.GetInfo())}
	}), err
}

func (c *client) Update(ctx context.Context, id container.ID, resources typed.Any, annotations map[string]string) error {
	_, err := c.c.Update(c.ctx(ctx), &tasksapi.UpdateTaskRequest{ContainerID: string(id), Resources: wire.AnyToProto(resources), Annotations: annotations})
	return err
}

func (c *client) Metrics(ctx context.Context, filters ...string) ([]task.Metric, error) {
	resp, err := c.c.Metrics(c.ctx(ctx), &tasksapi.MetricsRequest{Filters: filters})
	return wire.Each(resp.GetMetrics(), wire.MetricFromProto), err
}

func (c *client) Wait(ctx context.Context, id container.ID, exec task.ExecID) (task.Exit, error) {
	resp, err := c.c.Wait(c.ctx(ctx), &tasksapi.WaitRequest{ContainerID: string(id), ExecID: string(exec)})
	if err != nil {
		return task.Exit{}, err
	}
	x := task.Exit{ID: string(id), Status: resp.ExitStatus, At: wire.TimeFromProto(resp.ExitedAt)}
	if exec != "" {
		x.ID = string(exec)
	}
	return x, nil
}

func (c *client) Checkpoint(ctx context.Context, id container.ID, parent string, opts typed.Any) ([]ocispec.Descriptor, error) {
	resp, err := c.c.Checkpoint(c.ctx(ctx), &tasksapi.CheckpointTaskRequest{ContainerID: string(id), ParentCheckpoint: parent, Options: wire.AnyToProto(opts)})
	return wire.Each(resp.GetDescriptors(), wire.DescFromProto), err
}
