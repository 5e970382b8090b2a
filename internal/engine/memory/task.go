package memory

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/lib/filter"
)

// Tasks is a task.Store whose processes are imagined. One whose first argument
// is "exit" ends as soon as it is started, with the status that the second one
// says; any other runs until a signal ends it or End is called.
type Tasks struct {
	ns         namespace.ID
	containers container.Store
	events     event.Publisher

	mu    sync.Mutex // guards all below, and orders events
	tasks map[container.ID]*fakeTask
	pids  uint32
}

type fakeTask struct {
	procs  map[task.ExecID]*fakeProc // "" is the first process
	paused bool
}

type fakeProc struct {
	pid    uint32
	status task.Status
	io     task.IO
	exits  bool // by itself
	exit   task.Exit
	done   chan struct{}
}

// NewTasks makes a store without tasks. runtimes starting with
// "io.containerd.runc." are installed, others are not.
func NewTasks(ns namespace.ID, containers container.Store, events event.Publisher) *Tasks {
	return &Tasks{ns: ns, containers: containers, events: events, tasks: map[container.ID]*fakeTask{}, pids: 1000}
}

func (s *Tasks) publish(ctx context.Context, topic string, p event.Payload) {
	// The only error is a malformed envelope, and these are not.
	_ = s.events.Publish(context.WithoutCancel(ctx), event.Envelope{Timestamp: time.Now().UTC(), Namespace: s.ns, Topic: topic, Event: p})
}

// find returns a process. The caller holds mu.
func (s *Tasks) find(id container.ID, exec task.ExecID) (*fakeTask, *fakeProc, error) {
	t := s.tasks[id]
	if t == nil {
		return nil, nil, fmt.Errorf("task %s/%s: %w", s.ns, id, errdefs.ErrNotFound)
	}
	p := t.procs[exec]
	if p == nil {
		return nil, nil, fmt.Errorf("exec %q of task %s/%s: %w", exec, s.ns, id, errdefs.ErrNotFound)
	}
	return t, p, nil
}

// program reads what a process is to do.
func program(args []string) (status uint32, exits bool) {
	if len(args) < 2 || args[0] != "exit" {
		return 0, false
	}
	n, err := strconv.ParseUint(args[1], 10, 8)
	return uint32(n), err == nil
}

func (s *Tasks) proc(args []string, io task.IO) *fakeProc {
	s.pids++
	status, exits := program(args)
	return &fakeProc{pid: s.pids, status: task.StatusCreated, io: io, exits: exits, exit: task.Exit{Status: status}, done: make(chan struct{})}
}

// Create implements task.Store.
func (s *Tasks) Create(ctx context.Context, id container.ID, opts task.CreateOptions) (uint32, error) {
	if err := container.Check(id); err != nil {
		return 0, err
	}
	c, err := s.containers.Get(ctx, id)
	if err != nil {
		return 0, fmt.Errorf("create task %s/%s: %w", s.ns, id, err)
	}
	var spec struct {
		Process *struct{ Args []string }
	}
	if err := json.Unmarshal(c.Spec.Value, &spec); err != nil || spec.Process == nil {
		return 0, fmt.Errorf("create task %s/%s: container has no usable spec: %w", s.ns, id, errdefs.ErrInvalidArgument)
	}
	if !strings.HasPrefix(c.Runtime.Name, "io.containerd.runc.") {
		return 0, fmt.Errorf("create task %s/%s: runtime %q binary not installed: %w", s.ns, id, c.Runtime.Name, errdefs.ErrNotFound)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tasks[id] != nil {
		return 0, fmt.Errorf("task %s/%s: %w", s.ns, id, errdefs.ErrAlreadyExists)
	}
	p := s.proc(spec.Process.Args, opts.IO)
	s.tasks[id] = &fakeTask{procs: map[task.ExecID]*fakeProc{"": p}}
	s.publish(ctx, event.TopicTaskCreate, event.TaskCreate{ContainerID: string(id), Rootfs: opts.Rootfs, Pid: p.pid,
		IO: event.TaskIO{Stdin: opts.IO.Stdin, Stdout: opts.IO.Stdout, Stderr: opts.IO.Stderr, Terminal: opts.IO.Terminal}})
	return p.pid, nil
}

// Start implements task.Store.
func (s *Tasks) Start(ctx context.Context, id container.ID, exec task.ExecID) (uint32, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, p, err := s.find(id, exec)
	if err != nil {
		return 0, err
	}
	if p.status != task.StatusCreated {
		return 0, fmt.Errorf("start task %s/%s: process is %s: %w", s.ns, id, p.status, errdefs.ErrFailedPrecondition)
	}
	p.status = task.StatusRunning
	if exec == "" {
		s.publish(ctx, event.TopicTaskStart, event.TaskStart{ContainerID: string(id), Pid: p.pid})
	} else {
		s.publish(ctx, event.TopicTaskExecStarted, event.TaskExecStarted{ContainerID: string(id), ExecID: string(exec), Pid: p.pid})
	}
	if p.exits {
		s.end(ctx, id, exec, p.exit.Status)
	}
	return p.pid, nil
}

// end ends a process, and with the first one all execs. The caller holds mu.
func (s *Tasks) end(ctx context.Context, id container.ID, exec task.ExecID, status uint32) {
	t := s.tasks[id]
	if exec == "" {
		for e, p := range t.procs {
			if e != "" && p.status == task.StatusRunning {
				s.end(ctx, id, e, 137)
			}
		}
		t.paused = false
	}
	p := t.procs[exec]
	name := string(exec)
	if exec == "" {
		name = string(id)
	}
	p.status = task.StatusStopped
	p.exit = task.Exit{ID: name, Pid: p.pid, Status: status, At: time.Now().UTC()}
	s.publish(ctx, event.TopicTaskExit, event.TaskExit{ContainerID: string(id), ID: name, Pid: p.pid, ExitStatus: status, ExitedAt: p.exit.At})
	close(p.done)
}

// End ends a running process, as if by itself. ErrNotFound if it does not run.
func (s *Tasks) End(id container.ID, exec task.ExecID, status uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, p, err := s.find(id, exec)
	if err != nil {
		return err
	}
	if p.status != task.StatusRunning {
		return fmt.Errorf("task %s/%s: process is %s: %w", s.ns, id, p.status, errdefs.ErrNotFound)
	}
	s.end(context.Background(), id, exec, status)
	return nil
}

// Delete implements task.Store.
func (s *Tasks) Delete(ctx context.Context, id container.ID) (task.Exit, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, p, err := s.find(id, "")
	if err != nil {
		return task.Exit{}, err
	}
	switch p.status {
	case task.StatusRunning:
		return task.Exit{}, fmt.Errorf("delete task %s/%s: process is running: %w", s.ns, id, errdefs.ErrFailedPrecondition)
	case task.StatusCreated:
		s.end(ctx, id, "", 137)
	}
	delete(s.tasks, id)
	s.publish(ctx, event.TopicTaskDelete, event.TaskDelete{ContainerID: string(id), Pid: p.pid, ExitStatus: p.exit.Status, ExitedAt: p.exit.At})
	return p.exit, nil
}

// DeleteExec implements task.Store.
func (s *Tasks) DeleteExec(ctx context.Context, id container.ID, exec task.ExecID) (task.Exit, error) {
	if err := task.Check(exec); err != nil {
		return task.Exit{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t, p, err := s.find(id, exec)
	if err != nil {
		return task.Exit{}, err
	}
	if p.status == task.StatusRunning {
		return task.Exit{}, fmt.Errorf("delete exec %q of task %s/%s: process is running: %w", exec, s.ns, id, errdefs.ErrFailedPrecondition)
	}
	delete(t.procs, exec)
	x := p.exit
	x.ID, x.Pid = string(exec), p.pid
	return x, nil
}

func (s *Tasks) process(id container.ID, exec task.ExecID, t *fakeTask, p *fakeProc) task.Process {
	out := task.Process{ContainerID: id, ID: string(id), Pid: p.pid, Status: p.status, IO: p.io, ExitedAt: p.exit.At}
	if exec != "" {
		out.ID = string(exec)
	}
	if p.status == task.StatusStopped {
		out.ExitStatus = p.exit.Status
	}
	if p.status == task.StatusRunning && t.paused {
		out.Status = task.StatusPaused
	}
	return out
}

// Get implements task.Store.
func (s *Tasks) Get(_ context.Context, id container.ID, exec task.ExecID) (task.Process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, p, err := s.find(id, exec)
	if err != nil {
		return task.Process{}, err
	}
	return s.process(id, exec, t, p), nil
}

// List implements task.Store.
func (s *Tasks) List(context.Context) ([]task.Process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]task.Process, 0, len(s.tasks))
	for id, t := range s.tasks {
		out = append(out, s.process(id, "", t, t.procs[""]))
	}
	slices.SortFunc(out, func(a, b task.Process) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// Kill implements task.Store: any signal but 0 ends a process.
func (s *Tasks) Kill(ctx context.Context, id container.ID, exec task.ExecID, signal uint32, all bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, p, err := s.find(id, exec)
	if err != nil {
		return err
	}
	switch {
	case p.status == task.StatusStopped && all && exec == "":
		return nil
	case p.status == task.StatusStopped:
		return fmt.Errorf("kill task %s/%s: process already finished: %w", s.ns, id, errdefs.ErrNotFound)
	case p.status == task.StatusCreated && exec != "":
		return fmt.Errorf("kill exec %q of task %s/%s: process not started: %w", exec, s.ns, id, errdefs.ErrFailedPrecondition)
	case signal != 0:
		s.end(ctx, id, exec, 128+signal)
	}
	return nil
}

// Exec implements task.Store.
func (s *Tasks) Exec(ctx context.Context, id container.ID, exec task.ExecID, opts task.ExecOptions) error {
	if err := task.Check(exec); err != nil {
		return err
	}
	var spec struct{ Args []string }
	if err := json.Unmarshal(opts.Spec.Value, &spec); err != nil {
		return fmt.Errorf("exec %q in task %s/%s: no usable process spec: %w", exec, s.ns, id, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t, first, err := s.find(id, "")
	if err != nil {
		return err
	}
	if t.procs[exec] != nil {
		return fmt.Errorf("exec %q in task %s/%s: %w", exec, s.ns, id, errdefs.ErrAlreadyExists)
	}
	if first.status != task.StatusRunning {
		return fmt.Errorf("exec %q in task %s/%s: task is %s: %w", exec, s.ns, id, first.status, errdefs.ErrFailedPrecondition)
	}
	t.procs[exec] = s.proc(spec.Args, opts.IO)
	s.publish(ctx, event.TopicTaskExecAdded, event.TaskExecAdded{ContainerID: string(id), ExecID: string(exec)})
	return nil
}

// Resize implements task.Store; imagined terminals have any size.
func (s *Tasks) Resize(_ context.Context, id container.ID, exec task.ExecID, _, _ uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _, err := s.find(id, exec)
	return err
}

// CloseStdin implements task.Store.
func (s *Tasks) CloseStdin(_ context.Context, id container.ID, exec task.ExecID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _, err := s.find(id, exec)
	return err
}

func (s *Tasks) setPaused(ctx context.Context, id container.ID, paused bool, topic string, e event.Payload) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, p, err := s.find(id, "")
	if err != nil {
		return err
	}
	if p.status != task.StatusRunning || t.paused == paused {
		return fmt.Errorf("task %s/%s is %s: %w", s.ns, id, s.process(id, "", t, p).Status, errdefs.ErrFailedPrecondition)
	}
	t.paused = paused
	s.publish(ctx, topic, e)
	return nil
}

// Pause implements task.Store.
func (s *Tasks) Pause(ctx context.Context, id container.ID) error {
	return s.setPaused(ctx, id, true, event.TopicTaskPaused, event.TaskPaused{ContainerID: string(id)})
}

// Resume implements task.Store.
func (s *Tasks) Resume(ctx context.Context, id container.ID) error {
	return s.setPaused(ctx, id, false, event.TopicTaskResumed, event.TaskResumed{ContainerID: string(id)})
}

// Pids implements task.Store. An exec is told by containerd.runc.v1.ProcessDetails.
func (s *Tasks) Pids(_ context.Context, id container.ID) ([]task.ProcessInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, _, err := s.find(id, "")
	if err != nil {
		return nil, err
	}
	var out []task.ProcessInfo
	for exec, p := range t.procs {
		if p.status != task.StatusRunning && !(exec == "" && p.status == task.StatusCreated) {
			continue
		}
		info := task.ProcessInfo{Pid: p.pid}
		if exec != "" {
			// Field 1, a string: an exec id is at most 76 bytes long.
			info.Info = typed.Any{URL: "containerd.runc.v1.ProcessDetails", Value: append([]byte{10, byte(len(exec))}, exec...)}
		}
		out = append(out, info)
	}
	slices.SortFunc(out, func(a, b task.ProcessInfo) int { return int(a.Pid) - int(b.Pid) })
	return out, nil
}

// Update implements task.Store.
func (s *Tasks) Update(_ context.Context, id container.ID, resources typed.Any, _ map[string]string) error {
	if resources.IsZero() {
		return fmt.Errorf("update task %s/%s: no resources: %w", s.ns, id, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _, err := s.find(id, "")
	return err
}

// Metrics implements task.Store; the statistics are all zero.
func (s *Tasks) Metrics(_ context.Context, filters ...string) ([]task.Metric, error) {
	f, err := filter.Parse(filters...)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []task.Metric
	for id := range s.tasks {
		if f.Match(filter.Func(func(path []string) (string, bool) {
			switch strings.Join(path, ".") {
			case "id":
				return string(id), true
			case "namespace":
				return string(s.ns), true
			}
			return "", false
		})) {
			out = append(out, task.Metric{ID: string(id), At: time.Now().UTC(), Data: typed.Any{URL: "io.containerd.cgroups.v2.Metrics"}})
		}
	}
	return out, nil
}

// Wait implements task.Store.
func (s *Tasks) Wait(ctx context.Context, id container.ID, exec task.ExecID) (task.Exit, error) {
	s.mu.Lock()
	_, p, err := s.find(id, exec)
	s.mu.Unlock()
	if err != nil {
		return task.Exit{}, err
	}
	select {
	case <-p.done:
		s.mu.Lock()
		defer s.mu.Unlock()
		return p.exit, nil
	case <-ctx.Done():
		return task.Exit{}, fmt.Errorf("wait for task %s/%s: %w", s.ns, id, ctx.Err())
	}
}

// Checkpoint implements task.Store by refusing.
func (s *Tasks) Checkpoint(_ context.Context, id container.ID, _ string, _ typed.Any) ([]ocispec.Descriptor, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, _, err := s.find(id, ""); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("checkpoint task %s/%s: an imagined process has no state: %w", s.ns, id, errdefs.ErrNotImplemented)
}
