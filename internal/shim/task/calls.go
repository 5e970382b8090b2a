//go:build linux

package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantryd/gantry/internal/lib/reaper"
	"github.com/gantryd/gantry/internal/shim/driver"
)

type emptyResponse = emptypb.Empty

// errKilled is why a start ends in which its process was killed.
var errKilled = fmt.Errorf("it was killed while it was being started: %w", errdefs.ErrAborted)

func empty() *emptypb.Empty { return &emptypb.Empty{} }

// State describes a process.
func (s *Service) State(ctx context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	p, err := s.settled(ctx, r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	res := &taskapi.StateResponse{
		ID: r.ID, ExecID: p.id, Bundle: p.c.bundle, Pid: uint32(p.pid), Status: p.status,
		Stdin: p.streams.Stdin, Stdout: p.streams.Stdout, Stderr: p.streams.Stderr, Terminal: p.streams.Terminal,
		ExitStatus: p.exit.Status,
	}
	if p.id != "" {
		res.ID = p.id
	}
	if p.status == tasktypes.Status_RUNNING && p.c.paused {
		res.Status = tasktypes.Status_PAUSED
	}
	if !p.exit.At.IsZero() {
		res.ExitedAt = timestamppb.New(p.exit.At)
	}
	return res, nil
}

// Wait returns when the process has stopped, or with the caller's context.
func (s *Service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if err := wait(ctx, p); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &taskapi.WaitResponse{ExitStatus: p.exit.Status, ExitedAt: timestamppb.New(p.exit.At)}, nil
}

// Kill sends a signal to a process, or to all of the container.
func (s *Service) Kill(ctx context.Context, r *taskapi.KillRequest) (_ *emptyResponse, err error) {
	p, err := s.settled(ctx, r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	defer wrap(&err, "signal %d to %s", r.Signal, p.name())
	if r.Signal > 64 {
		return nil, fmt.Errorf("there is no such signal: %w", errdefs.ErrInvalidArgument)
	}
	sig := unix.Signal(r.Signal)
	s.mu.Lock()
	pid, status, paused, c := p.pid, p.status, p.c.paused, p.c
	made, group := c.made, c.group
	aborted := sig == unix.SIGKILL && p.abort != nil
	if aborted {
		// Its start may take as long as its file system takes to answer; the
		// driver knows how to end it.
		p.killed = true
		p.abort(errKilled)
	}
	s.mu.Unlock()
	if aborted {
		return empty(), nil
	}
	if r.All && p.id == "" && status == tasktypes.Status_STOPPED {
		return empty(), nil // contract 15, row 1.3.36
	}
	execs, _ := made.(driver.ExecSignaller)
	// One that is just being started is no other process's to kill: the runtime
	// would wait for it in vain.
	if r.All && p.id != "" && execs != nil && status != tasktypes.Status_CREATED {
		if err := execs.SignalExec(p.id, sig); !errdefs.IsNotFound(err) {
			return empty(), err
		}
	}
	// Where the cgroup is not known the first process stands for all: with it
	// a pid namespace ends.
	if r.All && p.id == "" && group != nil {
		if sig == unix.SIGKILL && paused {
			// The signals wait for the thaw, and then nothing runs any more; what
			// the group's own kill counts would never get less before it.
			if pids, perr := group.Pids(); perr == nil {
				for _, pid := range pids {
					_ = reaper.Kill(pid, sig)
				}
			}
			if err := s.thaw(ctx, c); err != nil {
				return nil, fmt.Errorf("resume it, so that it can die: %w", err)
			}
		}
		err = group.SignalAll(sig)
	} else {
		switch {
		case status == tasktypes.Status_STOPPED:
			return nil, fmt.Errorf("%w: %w", reaper.ErrGone, errdefs.ErrNotFound)
		case pid == 0:
			return nil, fmt.Errorf("it is not started: %w", errdefs.ErrFailedPrecondition)
		}
		err = s.Reaper.Signal(pid, sig)
		if errors.Is(err, reaper.ErrGone) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
	}
	if err != nil {
		return nil, err
	}
	if sig == unix.SIGKILL && paused && p.id == "" {
		// A frozen process dies only when it is thawed (cgroup v1). For an exec
		// that is when the container is resumed.
		if rerr := s.thaw(ctx, c); rerr != nil {
			s.Log.Warn("resume a killed container", "id", c.id, "error", rerr)
		}
	}
	return empty(), nil
}

func (s *Service) thaw(ctx context.Context, c *container) error {
	return s.change(ctx, c, func(ctx context.Context) error {
		s.mu.Lock()
		paused := c.paused
		s.mu.Unlock()
		if !paused {
			return nil
		}
		if err := c.made.Resume(ctx); err != nil {
			return err
		}
		s.mu.Lock()
		c.paused = false
		s.mu.Unlock()
		return nil
	})
}

// change runs fn as the only one that changes the container, and bounded.
func (s *Service) change(ctx context.Context, c *container, fn func(context.Context) error) error {
	return s.changeIn(ctx, callTimeout, c, fn)
}

func (s *Service) changeIn(ctx context.Context, limit time.Duration, c *container, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	unlock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	release := s.Reaper.Hold()
	defer release()
	return fn(ctx)
}

// running finds a container whose first process runs.
func (s *Service) running(id string) (*container, error) {
	c, err := s.find(id)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.init.status == tasktypes.Status_STOPPED || c.made == nil {
		return nil, fmt.Errorf("container %s is not running: %w", id, errdefs.ErrFailedPrecondition)
	}
	return c, nil
}

// Pause freezes a container.
func (s *Service) Pause(ctx context.Context, r *taskapi.PauseRequest) (_ *emptyResponse, err error) {
	defer wrap(&err, "pause container %s", r.ID)
	c, err := s.running(r.ID)
	if err != nil {
		return nil, err
	}
	err = s.change(ctx, c, func(ctx context.Context) error {
		s.mu.Lock()
		status, paused := c.init.status, c.paused
		s.mu.Unlock()
		if paused || status != tasktypes.Status_RUNNING {
			return fmt.Errorf("it is %s: %w", map[bool]string{true: "paused", false: state(status)}[paused], errdefs.ErrFailedPrecondition)
		}
		if err := c.made.Pause(ctx); err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		c.paused = true
		s.Events.Publish("/tasks/paused", &events.TaskPaused{ContainerID: r.ID})
		return nil
	})
	return empty(), err
}

// Resume thaws a paused container.
func (s *Service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (_ *emptyResponse, err error) {
	defer wrap(&err, "resume container %s", r.ID)
	c, err := s.running(r.ID)
	if err != nil {
		return nil, err
	}
	err = s.change(ctx, c, func(ctx context.Context) error {
		s.mu.Lock()
		paused := c.paused
		s.mu.Unlock()
		if !paused {
			return fmt.Errorf("it is not paused: %w", errdefs.ErrFailedPrecondition)
		}
		if err := c.made.Resume(ctx); err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		c.paused = false
		s.Events.Publish("/tasks/resumed", &events.TaskResumed{ContainerID: r.ID})
		return nil
	})
	return empty(), err
}

// Update changes limits of a container.
func (s *Service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (_ *emptyResponse, err error) {
	defer wrap(&err, "update container %s", r.ID)
	c, err := s.running(r.ID)
	if err != nil {
		return nil, err
	}
	var res specs.LinuxResources
	if err := unmarshalJSON(r.Resources, "LinuxResources", &res); err != nil {
		return nil, err
	}
	return empty(), s.change(ctx, c, func(ctx context.Context) error { return c.made.Update(ctx, &res) })
}

// Checkpoint writes a container to disk with criu.
func (s *Service) Checkpoint(ctx context.Context, r *taskapi.CheckpointTaskRequest) (_ *emptyResponse, err error) {
	defer wrap(&err, "checkpoint container %s", r.ID)
	c, err := s.running(r.ID)
	if err != nil {
		return nil, err
	}
	var o options.CheckpointOptions
	if a := r.Options; a != nil && a.TypeUrl != "" {
		if a.TypeUrl[strings.LastIndexByte(a.TypeUrl, '/')+1:] != "containerd.runc.v1.CheckpointOptions" {
			return nil, fmt.Errorf("options %q: %w", a.TypeUrl, errdefs.ErrInvalidArgument)
		}
		if err := proto.Unmarshal(a.Value, &o); err != nil {
			return nil, fmt.Errorf("options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	k := driver.Checkpoint{
		ImagePath: r.Path, WorkPath: o.WorkPath, ParentPath: o.ParentPath, Exit: o.Exit, OpenTCP: o.OpenTcp,
		ExternalUnixSockets: o.ExternalUnixSockets, Shell: o.Terminal, FileLocks: o.FileLocks,
		EmptyNamespaces: o.EmptyNamespaces, CgroupsMode: o.CgroupsMode,
	}
	if o.ImagePath != "" {
		k.ImagePath = o.ImagePath
	}
	if k.ImagePath == "" {
		return nil, fmt.Errorf("no directory for the image is given: %w", errdefs.ErrInvalidArgument)
	}
	err = s.changeIn(ctx, createTimeout, c, func(ctx context.Context) error { return c.made.Checkpoint(ctx, k) })
	if err != nil {
		return nil, err
	}
	s.Events.Publish("/tasks/checkpointed", &events.TaskCheckpointed{ContainerID: r.ID, Checkpoint: k.ImagePath})
	return empty(), nil
}

// Pids lists all processes of a container; those that Exec started are told by
// their id.
func (s *Service) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	c, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	group := c.group
	names := map[int]string{}
	for id, p := range c.execs {
		if p.status == tasktypes.Status_RUNNING {
			names[p.pid] = id
		}
	}
	init := 0
	if c.init.status != tasktypes.Status_STOPPED {
		init = c.init.pid
	}
	s.mu.Unlock()
	var pids []int
	if group != nil {
		if pids, err = group.Pids(); err != nil {
			return nil, fmt.Errorf("list processes of container %s: %w", r.ID, err)
		}
	} else if init != 0 {
		pids = []int{init}
	}
	res := &taskapi.PidsResponse{}
	for _, pid := range pids {
		info := &tasktypes.ProcessInfo{Pid: uint32(pid)}
		if id := names[pid]; id != "" {
			d := &options.ProcessDetails{ExecID: id}
			b, err := proto.Marshal(d)
			if err != nil {
				return nil, err
			}
			info.Info = &anypb.Any{TypeUrl: string(d.ProtoReflect().Descriptor().FullName()), Value: b}
		}
		res.Processes = append(res.Processes, info)
	}
	return res, nil
}

// Stats returns the metrics of the container's cgroup.
func (s *Service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	c, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	group := c.group
	s.mu.Unlock()
	if group == nil {
		return nil, fmt.Errorf("container %s has no cgroup: %w", r.ID, errdefs.ErrNotFound)
	}
	m, err := group.Metrics()
	if err != nil {
		return nil, fmt.Errorf("statistics of container %s: %w", r.ID, err)
	}
	return &taskapi.StatsResponse{Stats: m}, nil
}

// ResizePty sets the size of a process's terminal.
func (s *Service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptyResponse, error) {
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if r.Width > 0xffff || r.Height > 0xffff {
		return nil, fmt.Errorf("resize %s to %dx%d: %w", p.name(), r.Width, r.Height, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	p.width, p.height = uint16(r.Width), uint16(r.Height)
	streams := p.io
	s.mu.Unlock()
	if streams == nil {
		return empty(), nil // it gets its size with its start
	}
	if err := streams.Resize(uint16(r.Width), uint16(r.Height)); err != nil {
		return nil, fmt.Errorf("resize %s: %w", p.name(), err)
	}
	return empty(), nil
}

// CloseIO ends a process's input, and nothing else.
func (s *Service) CloseIO(ctx context.Context, r *taskapi.CloseIORequest) (*emptyResponse, error) {
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	if !r.Stdin {
		return empty(), nil
	}
	s.mu.Lock()
	p.closeIn = true
	streams := p.io
	s.mu.Unlock()
	if streams != nil {
		streams.CloseStdin()
	}
	return empty(), nil
}

// Connect tells who is here. It works for an unknown container too: the daemon
// asks before it has created one.
func (s *Service) Connect(ctx context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	// Who connects is a daemon, perhaps a new one, that wants to know what
	// happened while it was away.
	s.Events.Retry()
	res := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: s.Version}
	if c, err := s.find(r.ID); err == nil {
		s.mu.Lock()
		res.TaskPid = uint32(c.init.pid)
		s.mu.Unlock()
	}
	return res, nil
}

// Shutdown ends the shim, unless it still has containers: a pod's shim outlives
// each of them (contract 5.2.9, 13.22).
func (s *Service) Shutdown(ctx context.Context, r *taskapi.ShutdownRequest) (*emptyResponse, error) {
	if s.Unused() {
		s.shutdown.Do(s.Config.Shutdown)
	}
	return empty(), nil
}

// End asks the first processes of all containers to end, and kills what is
// left of them after grace. They are still to be deleted.
func (s *Service) End(ctx context.Context, grace time.Duration) error {
	s.mu.Lock()
	var all []*process
	for _, c := range s.containers {
		if c.ready && c.init.status != tasktypes.Status_STOPPED {
			all = append(all, c.init)
		}
	}
	s.mu.Unlock()
	signal := func(sig unix.Signal) (err error) {
		for _, p := range all {
			_, kerr := s.Kill(ctx, &taskapi.KillRequest{ID: p.c.id, Signal: uint32(sig), All: sig == unix.SIGKILL})
			if kerr != nil && !errdefs.IsNotFound(kerr) {
				err = errors.Join(err, kerr)
			}
		}
		return err
	}
	if len(all) > 0 && grace > 0 {
		_ = signal(unix.SIGTERM) // the kill says what is wrong
		soft, cancel := context.WithTimeout(ctx, grace)
		defer cancel()
		gone := true
		for _, p := range all {
			gone = gone && wait(soft, p) == nil
		}
		if gone {
			return nil
		}
	}
	kerr := signal(unix.SIGKILL)
	for _, p := range all {
		if err := wait(ctx, p); err != nil {
			return errors.Join(kerr, err)
		}
	}
	return nil
}

var _ taskapi.TTRPCTaskService = (*Service)(nil)
