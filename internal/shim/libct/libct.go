//go:build linux

// Package libct makes containers with runc's library in this process: no
// runtime has to be installed and none is started. The first process of a
// container is this program itself, started again (see reexec). State is kept
// where and how runc keeps it, so that runc can look at the containers, and a
// later process can clean up after one that died.
package libct

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/userns"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // lets the library set device rules
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/reaper"
	"github.com/gantryd/gantry/internal/shim/driver"
	"github.com/gantryd/gantry/internal/shim/execgroup"
)

const (
	consoleTimeout = 10 * time.Second
	killTimeout    = 10 * time.Second
)

// LogTo sends the library's own messages to w. Called once, before any
// container is made.
func LogTo(w io.Writer, debug bool) {
	logrus.SetOutput(w)
	logrus.SetLevel(logrus.WarnLevel)
	if debug {
		logrus.SetLevel(logrus.DebugLevel)
	}
}

type libct struct {
	root    string
	log     *slog.Logger
	memlock *configs.Rlimit
}

// New returns a driver that keeps the state of its containers below root.
// Their processes inherit limits.
func New(root string, limits Limits, log *slog.Logger) driver.Driver {
	return &libct{root: root, log: log, memlock: limits.memlock}
}

type container struct {
	c   *libcontainer.Container
	dir string
	log *slog.Logger
	// execs is a handle of the container that no exec uses, once there is one. A
	// handle does one thing at a time, and an exec may take as long as its file
	// system takes to answer.
	execs atomic.Pointer[libcontainer.Container]

	memlock *configs.Rlimit
	execgroup.Groups
}

// cgroup is where the container's execs have theirs.
func (c *container) cgroup() (dir, controller string) {
	state, err := c.c.State()
	switch {
	case err != nil:
		return "", ""
	case cgroups.IsCgroup2UnifiedMode():
		return state.CgroupPaths[""], ""
	}
	return state.CgroupPaths[execgroup.Freezer], execgroup.Freezer
}

func (d *libct) Create(ctx context.Context, req driver.Create) (_ driver.Container, _ driver.Started, err error) {
	var none driver.Started
	config, err := convert(req)
	if err != nil {
		return nil, none, err
	}
	lc, err := libcontainer.Create(d.root, req.ID, config)
	if errors.Is(err, libcontainer.ErrExist) && d.removeDead(req.ID) {
		lc, err = libcontainer.Create(d.root, req.ID, config)
	}
	if err != nil {
		switch {
		case errors.Is(err, libcontainer.ErrExist):
			err = fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
		case errors.Is(err, libcontainer.ErrInvalidID):
			err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		return nil, none, err
	}
	c := &container{c: lc, dir: filepath.Join(d.root, req.ID), log: d.log, memlock: d.memlock}
	defer func() {
		if err != nil {
			if derr := lc.Destroy(); derr != nil {
				d.log.Warn("remove what is left of a container that could not be created", "id", req.ID, "error", derr)
			}
			// Destroy leaves the directory behind if the cgroup is stuck.
			_ = os.RemoveAll(c.dir)
		}
	}()
	p, err := newProcess(req.Spec.Process)
	if err != nil {
		return nil, none, err
	}
	p.Init = true
	keepMemlock(p, d.memlock)
	start := lc.Start
	if req.Restore != "" {
		if err := needCriu(); err != nil {
			return nil, none, err
		}
		start = func(p *libcontainer.Process) error {
			return lc.Restore(p, &libcontainer.CriuOpts{ImagesDirectory: req.Restore, WorkDirectory: req.WorkPath,
				TcpEstablished: true, ExternalUnixConnections: true, FileLocks: true, EmptyNs: unix.CLONE_NEWNET})
		}
	}
	started, err := c.run(ctx, p, req.Stdio, start, c.killAll)
	if err != nil {
		return nil, none, err
	}
	dir, controller := c.cgroup()
	c.Find = func() (string, string) { return dir, controller }
	return c, started, nil
}

// removeDead removes what is left of a container whose shim was killed, and
// with it its processes, so that its id is free. One that lives, or that is
// being made, is somebody's: it stays.
func (d *libct) removeDead(id string) bool {
	old, err := libcontainer.Load(d.root, id)
	if err != nil {
		return false
	}
	if status, err := old.Status(); err != nil || status != libcontainer.Stopped {
		return false
	}
	if err := old.Destroy(); err != nil {
		d.log.Warn("remove what is left of a dead container", "id", id, "error", err)
		return false
	}
	return true
}

// run starts a process with its streams. Nothing is left of the process when
// it returns an error.
func (c *container) run(ctx context.Context, p *libcontainer.Process, stdio driver.Stdio, start func(*libcontainer.Process) error, kill func()) (s driver.Started, err error) {
	var socket *os.File
	if stdio.Terminal {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return s, os.NewSyscallError("socketpair", err)
		}
		socket = os.NewFile(uintptr(fds[0]), "console socket")
		defer socket.Close()
		p.ConsoleSocket = os.NewFile(uintptr(fds[1]), "console socket")
		defer p.ConsoleSocket.Close()
	} else {
		// An interface that holds a nil file is not nil.
		if stdio.In != nil {
			p.Stdin = stdio.In
		}
		if stdio.Out != nil {
			p.Stdout = stdio.Out
		}
		if stdio.Err != nil {
			p.Stderr = stdio.Err
		}
	}
	if err := bounded(ctx, func() error { return start(p) }, kill); err != nil {
		return s, err
	}
	if s.Pid, err = p.Pid(); err != nil {
		return s, err
	}
	if socket != nil {
		if s.Console, err = driver.ReceiveConsole(socket, consoleTimeout); err != nil {
			_ = p.Signal(unix.SIGKILL)
			_, _ = p.Wait()
			return s, err
		}
	}
	return s, nil
}

func (c *container) killAll() {
	pids, err := c.c.Processes()
	if err != nil {
		c.log.Warn("list processes of a container that does not start", "error", err)
	}
	for _, pid := range pids {
		_ = reaper.Kill(pid, unix.SIGKILL)
	}
}

// early calls kill when there may not be anything yet: libcontainer panics when
// it is asked about a first process that was not started.
func early(kill func()) {
	defer func() { _ = recover() }()
	kill()
}

// bounded runs fn, which takes no context. When the context ends first it
// kills what fn waits for, which makes it return; again and again, because
// what is to be killed may be about to be born.
func bounded(ctx context.Context, fn func() error, kill func()) error {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	deadline := time.After(killTimeout)
	for {
		early(kill)
		select {
		case err := <-done:
			if err == nil {
				early(kill) // what was there to kill may have been born since
				err = errors.New("it was started too late and killed")
			}
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-deadline:
			return fmt.Errorf("the runtime does not end: %w", context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *container) Start(ctx context.Context) error { return bounded(ctx, c.c.Exec, c.killAll) }

func (c *container) Exec(ctx context.Context, id string, spec *specs.Process, stdio driver.Stdio) (driver.Started, error) {
	p, err := newProcess(spec)
	if err != nil {
		return driver.Started{}, err
	}
	keepMemlock(p, c.memlock)
	kill := func() { _ = p.Signal(unix.SIGKILL) }
	if name, controller := c.Open(id); name != "" {
		p.SubCgroupPaths = map[string]string{controller: name}
		kill = func() { _ = c.SignalExec(id, unix.SIGKILL) } // p is in use by who starts it
	}
	own := c.execs.Swap(nil)
	s, err := c.run(ctx, p, stdio, func(p *libcontainer.Process) (err error) {
		if own == nil {
			if own, err = libcontainer.Load(filepath.Dir(c.dir), filepath.Base(c.dir)); err != nil {
				return err
			}
		}
		return own.Start(p)
	}, kill)
	if err != nil {
		c.ForgetExec(id) // and the handle, which may be in use for long
		return s, err
	}
	c.execs.Store(own)
	return s, nil
}

func (c *container) Pause(ctx context.Context) error {
	return class(bounded(ctx, c.c.Pause, nothing))
}

// nothing is what can be done for a call that only waits for the kernel.
func nothing() {}

func (c *container) Resume(ctx context.Context) error {
	return class(bounded(ctx, c.c.Resume, nothing))
}

func class(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, libcontainer.ErrNotRunning), errors.Is(err, libcontainer.ErrNotPaused), errors.Is(err, libcontainer.ErrRunning):
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

func (c *container) Update(ctx context.Context, r *specs.LinuxResources) error {
	config := c.c.Config()
	if err := update(&config, r); err != nil {
		return err
	}
	return class(bounded(ctx, func() error { return c.c.Set(config) }, nothing))
}

func needCriu() error {
	if _, err := exec.LookPath("criu"); err != nil {
		return fmt.Errorf("the program criu is not installed: %w: %w", err, errdefs.ErrNotImplemented)
	}
	return nil
}

func (c *container) Checkpoint(ctx context.Context, r driver.Checkpoint) error {
	if err := needCriu(); err != nil {
		return err
	}
	if err := os.MkdirAll(r.ImagePath, 0o700); err != nil {
		return err
	}
	mask := uint32(unix.CLONE_NEWNET)
	for _, ns := range r.EmptyNamespaces {
		if ns != string(specs.NetworkNamespace) {
			return fmt.Errorf("empty namespace %q: only network is possible: %w", ns, errdefs.ErrInvalidArgument)
		}
	}
	opts := &libcontainer.CriuOpts{
		ImagesDirectory: r.ImagePath, WorkDirectory: r.WorkPath, ParentImage: r.ParentPath,
		LeaveRunning: !r.Exit, TcpEstablished: r.OpenTCP, ExternalUnixConnections: r.ExternalUnixSockets,
		ShellJob: r.Shell, FileLocks: r.FileLocks, EmptyNs: mask, ManageCgroupsMode: r.CgroupsMode,
	}
	return bounded(ctx, func() error { return c.c.Checkpoint(opts) }, nothing)
}

func (c *container) Delete(ctx context.Context) error {
	if _, err := os.Lstat(c.dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return class(bounded(ctx, c.c.Destroy, nothing))
}

func (d *libct) Destroy(ctx context.Context, id string) (pid int, err error) {
	c, err := libcontainer.Load(d.root, id)
	if errors.Is(err, libcontainer.ErrNotExist) {
		// It died while being made: there is a directory at most.
		return 0, os.RemoveAll(filepath.Join(d.root, id))
	}
	if err != nil {
		return 0, err
	}
	if state, err := c.State(); err == nil && state.InitProcessPid > 0 {
		pid = state.InitProcessPid
	}
	if err := c.Signal(unix.SIGKILL); err != nil && !errors.Is(err, libcontainer.ErrNotRunning) {
		d.log.Warn("kill container", "id", id, "error", err)
	}
	deadline := time.Now().Add(killTimeout)
	for {
		status, err := c.Status()
		if err != nil {
			return pid, err
		}
		if status == libcontainer.Stopped {
			return pid, c.Destroy()
		}
		if status == libcontainer.Paused {
			_ = c.Resume()
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return pid, fmt.Errorf("container %s: process %d survives a kill: %w", id, pid, errdefs.ErrUnavailable)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// convert makes the library's configuration of a spec. Paths relative to the
// bundle are made absolute first: this process has no working directory that
// means anything.
func convert(req driver.Create) (*configs.Config, error) {
	spec := *req.Spec
	if spec.Root == nil {
		return nil, fmt.Errorf("spec has no root: %w", errdefs.ErrInvalidArgument)
	}
	root := *spec.Root
	if !filepath.IsAbs(root.Path) {
		root.Path = filepath.Join(req.Bundle, root.Path)
	}
	spec.Root = &root
	spec.Mounts = append([]specs.Mount(nil), spec.Mounts...)
	for i, m := range spec.Mounts {
		if m.Source != "" && !filepath.IsAbs(m.Source) && isBind(m) {
			spec.Mounts[i].Source = filepath.Join(req.Bundle, m.Source)
		}
	}
	rootless := os.Geteuid() != 0
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName:       req.ID,
		UseSystemdCgroup: req.SystemdCgroup,
		NoPivotRoot:      req.NoPivotRoot,
		NoNewKeyring:     req.NoNewKeyring,
		Spec:             &spec,
		RootlessEUID:     rootless,
		RootlessCgroups:  rootless || userns.RunningInUserNS(),
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	for i, l := range config.Labels {
		if strings.HasPrefix(l, "bundle=") {
			config.Labels[i] = "bundle=" + req.Bundle // hooks are told it
		}
	}
	return config, nil
}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}
