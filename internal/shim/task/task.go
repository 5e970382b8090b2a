//go:build linux

// Package task is the shim's service: containers and the processes in them,
// from Create to Delete, with one event for every step.
//
// Order is kept as follows. A container's first process is watched from its
// creation, every other one from its start, and the reaper keeps a process that
// exited early as a zombie until then. So an exit can only be published after
// the start, and the exit of the first process waits for those of the others
// (contract 1.6.8).
package task

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
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
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantryd/gantry/internal/lib/mountx"
	"github.com/gantryd/gantry/internal/lib/reaper"
	"github.com/gantryd/gantry/internal/shim/cgroup"
	"github.com/gantryd/gantry/internal/shim/driver"
	"github.com/gantryd/gantry/internal/shim/stdio"
)

const (
	createTimeout = 2 * time.Minute
	callTimeout   = time.Minute
	// execsBeforeInit bounds how long the exit of the first process is held
	// back for the others'.
	execsBeforeInit = 10 * time.Second
	// Output of an exited process is copied until nothing came for drainIdle,
	// and for drainLimit at most.
	drainIdle  = 2 * time.Second
	drainLimit = 10 * time.Second
	// The end of a process is told when its output is where the client reads,
	// unless others hold it open: some clients stop to read at once.
	toldIdle    = 100 * time.Millisecond
	toldLimit   = 300 * time.Millisecond
	killTimeout = 10 * time.Second
	maxSpec     = 32 << 20
)

// Publisher takes events; it must not wait.
type Publisher interface {
	Publish(topic string, event proto.Message)
	// Retry sends at once what waits for the daemon to come back.
	Retry()
}

// Config is what the service stands on.
type Config struct {
	Namespace string
	// Version is told to the daemon that connects.
	Version string
	Reaper  *reaper.Reaper
	Events  Publisher
	Streams *stdio.Opener
	// Driver chooses how containers with these options are made.
	Driver func(*options.Options) (driver.Driver, error)
	// Shutdown is called, at most once, when the daemon asks an empty shim to
	// end. It must not wait.
	Shutdown func()
	// Needed says whether the shim has to stay although it has no containers;
	// nil is no.
	Needed func() bool
	Log    *slog.Logger
}

// Service is the Task service. Its methods are safe for concurrent use; none of
// them waits for another container than its own.
type Service struct {
	Config
	shutdown sync.Once

	mu         sync.Mutex // guards all that follows, in containers and processes too; nothing waits under it
	containers map[string]*container
}

// New returns a service without containers.
func New(c Config) *Service {
	return &Service{Config: c, containers: map[string]*container{}}
}

type container struct {
	id, bundle string
	op         chan struct{} // held by the one call that changes the container
	ready      bool          // Create is done
	born       chan struct{} // closed when Create has ended, one way or the other

	driver     driver.Driver
	create     driver.Create
	made       driver.Container
	mounted    bool
	privatePid bool

	group  *cgroup.Group
	oom    *cgroup.OOMWatch
	paused bool
	init   *process
	execs  map[string]*process

	initExit *reaper.Exit // it has exited, but that is not published yet
	killing  bool         // the others are being killed
}

type process struct {
	c        *container
	id       string // empty for the first
	spec     *specs.Process
	streams  stdio.Config
	io       *stdio.IO
	pid      int
	status   tasktypes.Status
	starting bool
	pending  *reaper.Exit // it exited while it was being started
	exit     reaper.Exit
	done     chan struct{} // closed when it has stopped

	closeIn       bool // before it had any
	width, height uint16
	abort         context.CancelCauseFunc // ends its start, while that is under way
	killed        bool                    // abort was called
}

// name is what messages call it.
func (p *process) name() string {
	if p.id == "" {
		return "container " + p.c.id
	}
	return "process " + p.id + " of container " + p.c.id
}

// Count returns how many containers there are.
func (s *Service) Count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.containers)
}

// Unused says whether nothing is left for which the shim has to stay.
func (s *Service) Unused() bool {
	return s.Count() == 0 && (s.Needed == nil || !s.Needed())
}

func (s *Service) find(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[id]
	if c == nil || !c.ready {
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

func (s *Service) findProcess(id, execID string) (*process, error) {
	c, err := s.find(id)
	if err != nil {
		return nil, err
	}
	if execID == "" {
		return c.init, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := c.execs[execID]
	if p == nil {
		return nil, fmt.Errorf("process %q of container %s: %w", execID, id, errdefs.ErrNotFound)
	}
	return p, nil
}

// settled is findProcess after a Create of the container that is under way. A
// daemon that was killed in it comes back to take away what it asked for, and
// must not be told that there is nothing.
func (s *Service) settled(ctx context.Context, id, execID string) (*process, error) {
	s.mu.Lock()
	c := s.containers[id]
	s.mu.Unlock()
	if c != nil {
		select {
		case <-c.born:
		case <-ctx.Done():
			return nil, fmt.Errorf("container %s is being created: %w", id, context.Cause(ctx))
		}
	}
	return s.findProcess(id, execID)
}

// lock makes the caller the only one that changes c.
func (c *container) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case c.op <- struct{}{}:
		return func() { <-c.op }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("container %s is busy: %w", c.id, context.Cause(ctx))
	}
}

func validID(kind, id string) error {
	if id == "" || len(id) > 255 || id == "." || id == ".." || strings.ContainsAny(id, "/\x00") {
		return fmt.Errorf("%s id %q: %w", kind, id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// lasting is for calls that must not stop halfway because the daemon has died
// during them: the next one finds them done. The caller's deadline counts.
func lasting(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if d, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(d))
	}
	return context.WithTimeout(context.WithoutCancel(ctx), limit)
}

// Create mounts the root file system and makes the container, its first
// process waiting. Nothing is left after an error.
func (s *Service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (_ *taskapi.CreateTaskResponse, err error) {
	defer wrap(&err, "create container %s", r.ID)
	ctx, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	if err := validID("container", r.ID); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(r.Bundle) {
		return nil, fmt.Errorf("bundle %q is no absolute path: %w", r.Bundle, errdefs.ErrInvalidArgument)
	}
	opts, err := Options(r.Options)
	if err != nil {
		return nil, err
	}
	spec, err := ReadSpec(r.Bundle)
	if err != nil {
		return nil, err
	}
	if spec.Process == nil {
		return nil, fmt.Errorf("spec has no process: %w", errdefs.ErrInvalidArgument)
	}
	// Who asks for a terminal has to read one.
	spec.Process.Terminal = r.Terminal
	c := &container{
		id: r.ID, bundle: r.Bundle, op: make(chan struct{}, 1), born: make(chan struct{}), execs: map[string]*process{},
		privatePid: privatePid(spec),
		create: driver.Create{
			ID: r.ID, Bundle: r.Bundle, Spec: spec, Restore: r.Checkpoint, WorkPath: opts.CriuWorkPath,
			NoPivotRoot: opts.NoPivotRoot, NoNewKeyring: opts.NoNewKeyring, SystemdCgroup: opts.SystemdCgroup,
		},
	}
	p := &process{c: c, status: tasktypes.Status_CREATED, done: make(chan struct{}), streams: stdio.Config{
		ID: r.ID, Namespace: s.Namespace, Terminal: r.Terminal, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr,
		UID: int(opts.IoUid), GID: int(opts.IoGid),
	}}
	c.init = p
	if c.driver, err = s.Driver(opts); err != nil {
		return nil, err
	}

	s.mu.Lock()
	if s.containers[r.ID] != nil {
		s.mu.Unlock()
		return nil, errdefs.ErrAlreadyExists
	}
	s.containers[r.ID] = c
	s.mu.Unlock()
	defer func() {
		if err != nil {
			s.mu.Lock()
			delete(s.containers, r.ID)
			s.mu.Unlock()
		}
		close(c.born)
	}()

	if err := SaveOptions(r.Bundle, opts); err != nil {
		return nil, err
	}
	release := s.Reaper.Hold()
	defer release()
	if len(r.Rootfs) > 0 {
		if err := mountRootfs(r); err != nil {
			return nil, err
		}
		c.mounted = true
		defer func() {
			if err != nil {
				if uerr := unmountRootfs(r.Bundle); uerr != nil {
					s.Log.Error("unmount after a create that did not work", "id", r.ID, "error", uerr)
				}
			}
		}()
	}
	if p.io, err = s.Streams.Open(ctx, p.streams); err != nil {
		return nil, err
	}
	if r.Checkpoint == "" {
		if err = s.make(ctx, c); err != nil {
			p.io.Close()
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c.ready = true
	s.Events.Publish("/tasks/create", &events.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Checkpoint: r.Checkpoint, Pid: uint32(p.pid),
		IO: &events.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	s.watch(p)
	return &taskapi.CreateTaskResponse{Pid: uint32(p.pid)}, nil
}

// make creates the container with its first process. The caller holds the
// reaper.
func (s *Service) make(ctx context.Context, c *container) error {
	in, out, errf := c.init.io.Child()
	c.create.Stdio = driver.Stdio{In: in, Out: out, Err: errf, Terminal: c.init.streams.Terminal}
	made, started, err := c.driver.Create(ctx, c.create)
	if err != nil {
		return err
	}
	if started.Pid <= 1 {
		return fmt.Errorf("the runtime says that the process is %d: %w", started.Pid, errdefs.ErrInternal)
	}
	c.create.Stdio = driver.Stdio{}
	c.create.Spec = nil // large, and not needed again
	if err := c.init.io.Started(started.Console); err != nil {
		_ = reaper.Kill(started.Pid, unix.SIGKILL)
		_ = waitPid(started.Pid)
		_ = made.Delete(ctx)
		return err
	}
	if err := os.WriteFile(filepath.Join(c.bundle, "init.pid"), []byte(strconv.Itoa(started.Pid)), 0o600); err != nil {
		s.Log.Warn("write init.pid", "id", c.id, "error", err)
	}
	group, err := cgroup.Load(started.Pid)
	if err != nil {
		s.Log.Warn("the container's cgroup is not known: no statistics, no out-of-memory events", "id", c.id, "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c.made, c.group, c.init.pid = made, group, started.Pid
	return nil
}

// waitPid reaps a process that is about to die and that nobody watches.
func waitPid(pid int) error {
	deadline := time.Now().Add(killTimeout)
	for time.Now().Before(deadline) {
		got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
		if got == pid || err != nil && !errors.Is(err, unix.EINTR) {
			return nil
		}
		time.Sleep(2 * time.Millisecond)
	}
	return fmt.Errorf("process %d survives a kill: %w", pid, errdefs.ErrUnavailable)
}

func privatePid(spec *specs.Spec) bool {
	if spec.Linux == nil {
		return false
	}
	for _, n := range spec.Linux.Namespaces {
		if n.Type == specs.PIDNamespace {
			return n.Path == ""
		}
	}
	return false
}

func mountRootfs(r *taskapi.CreateTaskRequest) error {
	rootfs := filepath.Join(r.Bundle, "rootfs")
	if err := os.Mkdir(rootfs, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	mounts := make([]mountx.Mount, len(r.Rootfs))
	for i, m := range r.Rootfs {
		if m == nil {
			return fmt.Errorf("mount %d is empty: %w", i, errdefs.ErrInvalidArgument)
		}
		mounts[i] = mountx.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
	}
	return mountx.All(mounts, rootfs)
}

// unmountRootfs takes off what is mounted at a bundle's root file system.
// What somebody still uses is detached.
func unmountRootfs(bundle string) error {
	rootfs := filepath.Join(bundle, "rootfs")
	err := mountx.UnmountRecursive(rootfs, 0)
	if err != nil {
		err = mountx.UnmountRecursive(rootfs, unix.MNT_DETACH)
	}
	return err
}

// watch has the exit of p delivered.
func (s *Service) watch(p *process) {
	if p.pid > 0 {
		s.Reaper.Watch(p.pid, func(e reaper.Exit) { s.exited(p, e) })
	}
}

// exited runs on the reaper's goroutine.
func (s *Service) exited(p *process, e reaper.Exit) {
	s.mu.Lock()
	oom := p.c.oom
	s.mu.Unlock()
	if oom != nil {
		oom.Check() // the cause comes before the effect
	}
	go func() {
		p.io.Exited()
		p.io.Drain(toldIdle, toldLimit)
		s.mu.Lock()
		defer s.mu.Unlock()
		if p.starting {
			p.pending = &e
			return
		}
		s.settle(p, e)
	}()
}

// settle publishes an exit, or keeps that of the first process until it is its
// turn. The caller holds mu.
func (s *Service) settle(p *process, e reaper.Exit) {
	c := p.c
	if p != c.init {
		s.stopped(p, e)
		s.settleInit(c)
		return
	}
	c.initExit = &e
	if !c.privatePid && c.group != nil {
		// Nobody else ends the rest: the kernel does it for a container with
		// process ids of its own only.
		c.killing = true
		go func() {
			if err := c.group.SignalAll(unix.SIGKILL); err != nil {
				s.Log.Warn("kill what the first process left", "id", c.id, "error", err)
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			c.killing = false
			s.settleInit(c)
		}()
	}
	s.settleInit(c)
	if c.initExit != nil {
		time.AfterFunc(execsBeforeInit, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if c.initExit != nil {
				s.Log.Warn("the first process is gone, others are not", "id", c.id)
				s.stopped(c.init, *c.initExit)
				c.initExit = nil
			}
		})
	}
}

// settleInit publishes the exit of the first process if nothing is in its way.
func (s *Service) settleInit(c *container) {
	if c.initExit == nil || c.killing {
		return
	}
	for _, p := range c.execs {
		if p.starting || p.status == tasktypes.Status_RUNNING {
			return
		}
	}
	s.stopped(c.init, *c.initExit)
	c.initExit = nil
}

func (s *Service) stopped(p *process, e reaper.Exit) {
	p.status = tasktypes.Status_STOPPED
	p.exit = e
	id := cmp.Or(p.id, p.c.id)
	s.Events.Publish("/tasks/exit", &events.TaskExit{
		ContainerID: p.c.id, ID: id, Pid: uint32(p.pid), ExitStatus: e.Status, ExitedAt: timestamppb.New(e.At),
	})
	close(p.done)
}

// Start runs a created process.
func (s *Service) Start(ctx context.Context, r *taskapi.StartRequest) (_ *taskapi.StartResponse, err error) {
	p, err := s.findProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	defer wrap(&err, "start %s", p.name())
	ctx, cancel := lasting(ctx, createTimeout)
	defer cancel()
	if p.id != "" {
		return s.startExec(ctx, p)
	}
	c := p.c
	unlock, err := c.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := s.begin(p); err != nil {
		return nil, err
	}
	release := s.Reaper.Hold()
	defer release()
	restored := c.made == nil
	if restored {
		if err = s.make(ctx, c); err == nil {
			s.watch(p)
		}
	}
	var oom *cgroup.OOMWatch
	if err == nil && c.group != nil && c.oom == nil {
		var oerr error
		if oom, oerr = c.group.WatchOOM(func() { s.Events.Publish("/tasks/oom", &events.TaskOOM{ContainerID: c.id}) }); oerr != nil {
			s.Log.Info("no out-of-memory events", "id", c.id, "error", oerr)
		}
	}
	if oom != nil {
		s.mu.Lock()
		c.oom = oom
		s.mu.Unlock()
	}
	if err == nil && !restored {
		err = c.made.Start(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.starting = false
	if err == nil {
		p.status = tasktypes.Status_RUNNING
		s.Events.Publish("/tasks/start", &events.TaskStart{ContainerID: c.id, Pid: uint32(p.pid)})
	}
	if p.pending != nil {
		e := *p.pending
		p.pending = nil
		s.settle(p, e)
	}
	if err != nil {
		return nil, err
	}
	return &taskapi.StartResponse{Pid: uint32(p.pid)}, nil
}

// begin marks a created process as being started.
func (s *Service) begin(p *process) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case p.starting:
		return fmt.Errorf("it is being started: %w", errdefs.ErrFailedPrecondition)
	case p.status != tasktypes.Status_CREATED:
		return fmt.Errorf("it is %s: %w", state(p.status), errdefs.ErrFailedPrecondition)
	}
	if p.id != "" {
		if err := p.c.canExec(); err != nil {
			return err
		}
	}
	p.starting = true
	return nil
}

// canExec says why no process can be added. The caller holds mu.
func (c *container) canExec() error {
	switch {
	case c.paused:
		return fmt.Errorf("the container is paused: %w", errdefs.ErrFailedPrecondition)
	case c.init.status == tasktypes.Status_STOPPED || c.initExit != nil:
		return fmt.Errorf("the container is stopped: %w", errdefs.ErrFailedPrecondition)
	case c.made == nil:
		return fmt.Errorf("the container is not restored yet: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

func state(st tasktypes.Status) string { return strings.ToLower(st.String()) }

func (s *Service) startExec(ctx context.Context, p *process) (*taskapi.StartResponse, error) {
	if err := s.begin(p); err != nil {
		return nil, err
	}
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	s.mu.Lock()
	p.abort = abort
	s.mu.Unlock()
	release := s.Reaper.Hold()
	defer release()
	streams, err := s.Streams.Open(ctx, p.streams)
	var started driver.Started
	if err == nil {
		in, out, errf := streams.Child()
		started, err = p.c.made.Exec(ctx, p.id, p.spec, driver.Stdio{In: in, Out: out, Err: errf, Terminal: p.streams.Terminal})
		if err == nil {
			if err = streams.Started(started.Console); err != nil {
				_ = reaper.Kill(started.Pid, unix.SIGKILL)
				_ = waitPid(started.Pid)
			}
		}
		if err != nil {
			streams.Close()
		}
	}
	s.mu.Lock()
	p.starting = false
	p.spec, p.abort = nil, nil
	if err != nil {
		// It never was; whoever waits for it is told at once.
		p.status = tasktypes.Status_STOPPED
		p.exit = reaper.Exit{Status: 255, At: time.Now().UTC()}
		close(p.done)
		s.settleInit(p.c)
		s.mu.Unlock()
		return nil, err
	}
	p.io, p.pid, p.status = streams, started.Pid, tasktypes.Status_RUNNING
	closeIn, width, height, killed := p.closeIn, p.width, p.height, p.killed
	s.Events.Publish("/tasks/exec-started", &events.TaskExecStarted{ContainerID: p.c.id, ExecID: p.id, Pid: uint32(p.pid)})
	s.mu.Unlock()
	if closeIn {
		streams.CloseStdin()
	}
	if width != 0 || height != 0 {
		if err := streams.Resize(width, height); err != nil {
			s.Log.Debug("resize terminal", "id", p.c.id, "exec", p.id, "error", err)
		}
	}
	s.watch(p)
	if killed { // too late for the start
		_, err := s.Kill(context.WithoutCancel(ctx), &taskapi.KillRequest{ID: p.c.id, ExecID: p.id, Signal: uint32(unix.SIGKILL), All: true})
		if err != nil && !errdefs.IsNotFound(err) {
			s.Log.Warn("kill what was killed in its start", "id", p.c.id, "exec", p.id, "error", err)
		}
	}
	return &taskapi.StartResponse{Pid: uint32(started.Pid)}, nil
}

// Exec adds a process that Start will run.
func (s *Service) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (_ *emptyResponse, err error) {
	c, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	defer wrap(&err, "exec %s in container %s", r.ExecID, r.ID)
	if err = validID("process", r.ExecID); err != nil {
		return nil, err
	}
	var spec specs.Process
	if err = unmarshalJSON(r.Spec, "Process", &spec); err != nil {
		return nil, err
	}
	if err = driver.CheckProcess(&spec); err != nil {
		return nil, err
	}
	spec.Terminal = r.Terminal
	p := &process{
		c: c, id: r.ExecID, spec: &spec, status: tasktypes.Status_CREATED, done: make(chan struct{}),
		streams: stdio.Config{
			ID: r.ID, Namespace: s.Namespace, Terminal: r.Terminal, Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr,
			UID: c.init.streams.UID, GID: c.init.streams.GID,
		},
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err = c.canExec(); err != nil {
		return nil, err
	}
	if c.execs[r.ExecID] != nil {
		err = errdefs.ErrAlreadyExists
		return nil, err
	}
	c.execs[r.ExecID] = p
	s.Events.Publish("/tasks/exec-added", &events.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
	return empty(), nil
}

// Delete removes a stopped process, or a container whose first process has
// stopped or was never started, with its cgroup and mounts.
func (s *Service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (_ *taskapi.DeleteResponse, err error) {
	p, err := s.settled(ctx, r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	defer wrap(&err, "delete %s", p.name())
	ctx, cancel := lasting(ctx, callTimeout)
	defer cancel()
	if p.id != "" {
		return s.deleteExec(p)
	}
	c := p.c
	unlock, err := c.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := s.find(r.ID); err != nil {
		return nil, err // another Delete was faster
	}
	s.mu.Lock()
	status, pid := p.status, p.pid
	s.mu.Unlock()
	switch {
	case status == tasktypes.Status_CREATED && pid > 0:
		if err := s.Reaper.Signal(pid, unix.SIGKILL); err != nil && !errors.Is(err, reaper.ErrGone) {
			return nil, err
		}
		if err := wait(ctx, p); err != nil {
			return nil, err
		}
	case status == tasktypes.Status_CREATED, status == tasktypes.Status_STOPPED:
	default:
		return nil, fmt.Errorf("it is %s: %w", state(status), errdefs.ErrFailedPrecondition)
	}
	if c.made != nil {
		p.drain(s.Log)
		release := s.Reaper.Hold()
		err = c.made.Delete(ctx)
		release()
		if err != nil {
			return nil, err
		}
	}
	if c.mounted {
		if err := unmountRootfs(c.bundle); err != nil {
			return nil, err
		}
		c.mounted = false
	}
	if c.oom != nil {
		c.oom.Close()
	}
	if err := p.io.Close(); err != nil {
		s.Log.Warn("close the streams", "id", c.id, "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range c.execs {
		if e.io != nil {
			go e.io.Close() // its logging program may take twelve seconds
		}
	}
	delete(s.containers, c.id)
	if p.exit.At.IsZero() {
		// A checkpoint that was never restored; whoever waits for it is told now.
		p.status, p.exit = tasktypes.Status_STOPPED, reaper.Exit{Status: 255, At: time.Now().UTC()}
		close(p.done)
	}
	s.Events.Publish("/tasks/delete", &events.TaskDelete{
		ContainerID: c.id, Pid: uint32(p.pid), ExitStatus: p.exit.Status, ExitedAt: timestamppb.New(p.exit.At),
	})
	return p.deleted(), nil
}

func (p *process) deleted() *taskapi.DeleteResponse {
	return &taskapi.DeleteResponse{Pid: uint32(p.pid), ExitStatus: p.exit.Status, ExitedAt: timestamppb.New(p.exit.At)}
}

func (p *process) drain(log *slog.Logger) {
	if !p.io.Drain(drainIdle, drainLimit) {
		log.Warn("output of a deleted process is not read", "id", p.c.id, "exec", p.id)
	}
}

func (s *Service) deleteExec(p *process) (*taskapi.DeleteResponse, error) {
	s.mu.Lock()
	if p.starting || p.status == tasktypes.Status_RUNNING {
		s.mu.Unlock()
		return nil, fmt.Errorf("it is running: %w", errdefs.ErrFailedPrecondition)
	}
	if p.c.execs[p.id] != p {
		s.mu.Unlock()
		return nil, errdefs.ErrNotFound
	}
	delete(p.c.execs, p.id)
	if p.status == tasktypes.Status_CREATED {
		p.status = tasktypes.Status_STOPPED
		close(p.done)
	}
	s.mu.Unlock()
	if p.io != nil {
		p.drain(s.Log)
		if err := p.io.Close(); err != nil {
			s.Log.Warn("close the streams", "id", p.c.id, "exec", p.id, "error", err)
		}
	}
	if execs, ok := p.c.made.(driver.ExecSignaller); ok {
		execs.ForgetExec(p.id)
	}
	if p.exit.At.IsZero() {
		p.exit.At = time.Now().UTC()
	}
	return p.deleted(), nil
}

func wait(ctx context.Context, p *process) error {
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for %s (pid %d): %w", p.name(), p.pid, context.Cause(ctx))
	}
}

// wrap gives an error what was attempted, and a class if it has none.
func wrap(err *error, format string, args ...any) {
	if *err != nil {
		*err = driver.Classify(fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), *err))
	}
}

// ReadSpec reads the OCI spec of a bundle, of 32 MiB at most.
func ReadSpec(bundle string) (*specs.Spec, error) {
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return nil, err
	}
	defer f.Close()
	var spec specs.Spec
	limit := &io.LimitedReader{R: f, N: maxSpec + 1}
	if err := json.NewDecoder(limit).Decode(&spec); err != nil {
		if limit.N <= 0 {
			return nil, fmt.Errorf("%s is larger than %d bytes: %w", f.Name(), maxSpec, errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("%s: %w: %w", f.Name(), err, errdefs.ErrInvalidArgument)
	}
	return &spec, nil
}

// unmarshalJSON reads a value that containerd's clients send as JSON in an
// Any: the type URL ends in the Go name of the type.
func unmarshalJSON(a *anypb.Any, name string, v any) error {
	if a == nil {
		return fmt.Errorf("no %s is given: %w", name, errdefs.ErrInvalidArgument)
	}
	if url := a.TypeUrl; url[strings.LastIndexAny(url, "/.")+1:] != name {
		return fmt.Errorf("got %q, want a %s: %w", url, name, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(a.Value, v); err != nil {
		return fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return nil
}
