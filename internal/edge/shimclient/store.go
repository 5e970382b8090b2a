package shimclient

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/lib/filter"
	"github.com/gantryd/gantry/internal/lib/undo"
)

// containerOf returns whose event a payload is.
func containerOf(p event.Payload) (container.ID, bool) {
	switch p := p.(type) {
	case event.TaskCreate:
		return container.ID(p.ContainerID), true
	case event.TaskStart:
		return container.ID(p.ContainerID), true
	case event.TaskExit:
		return container.ID(p.ContainerID), true
	case event.TaskDelete:
		return container.ID(p.ContainerID), true
	case event.TaskOOM:
		return container.ID(p.ContainerID), true
	case event.TaskExecAdded:
		return container.ID(p.ContainerID), true
	case event.TaskExecStarted:
		return container.ID(p.ContainerID), true
	case event.TaskPaused:
		return container.ID(p.ContainerID), true
	case event.TaskResumed:
		return container.ID(p.ContainerID), true
	case event.TaskCheckpointed:
		return container.ID(p.ContainerID), true
	}
	return "", false
}

// store is the task.Store of one namespace.
type store struct {
	m   *Manager
	ns  namespace.ID
	rec view.Records
}

func (s *store) key(id container.ID) key { return key{ns: s.ns, id: id} }

func (s *store) get(ctx context.Context, id container.ID) (*entry, error) {
	return s.m.lookup(ctx, s.key(id))
}

func (s *store) callBound() bound { return bound{s.m.limit.Call, "the daemon's limit for a shim call"} }

// Create implements task.Store.
func (s *store) Create(ctx context.Context, id container.ID, opts task.CreateOptions) (pid uint32, err error) {
	if err := container.Check(id); err != nil {
		return 0, err
	}
	c, err := s.rec.Containers().Get(ctx, id)
	if err != nil {
		return 0, fmt.Errorf("create task %s: %w", s.key(id), err)
	}
	for try := 1; ; try++ {
		pid, err := s.tryCreate(ctx, c, opts)
		// The shim of a group may have been about to leave, for want of
		// containers, when this one came: then another one is started, or
		// has been at the same address for somebody else.
		if (errors.Is(err, errShimDead) || errors.Is(err, errShimLost)) && opts.APIAddress == "" && try < 3 && ctx.Err() == nil {
			continue
		}
		return pid, err
	}
}

func (s *store) tryCreate(ctx context.Context, c container.Container, opts task.CreateOptions) (uint32, error) {
	t, err := s.m.reserve(ctx, s.key(c.ID))
	if err != nil {
		return 0, fmt.Errorf("create: %w", err)
	}
	if err := t.enter(ctx); err != nil {
		return 0, err
	}
	defer t.exitGate()
	pid, err := s.create(ctx, t, c, opts)
	if err != nil {
		return 0, fmt.Errorf("create task %s: %w", t.key, err)
	}
	return pid, nil
}

// create does the steps of Create. It settles t, one way or the other.
func (s *store) create(ctx context.Context, t *entry, c container.Container, opts task.CreateOptions) (pid uint32, err error) {
	m := s.m
	var back undo.Stack
	defer func() {
		if err == nil {
			return
		}
		if uerr := back.Run(context.WithoutCancel(ctx)); uerr != nil {
			m.log.Error("undo create", "namespace", t.key.ns, "id", t.key.id, "error", uerr)
		}
		t.settle(phaseGone)
		m.drop(t, false)
		close(t.gone)
	}()

	spec, err := parseSpec(c.Spec.Value)
	if err != nil {
		return 0, err
	}
	restore, err := restorePath(opts.Checkpoint)
	if err != nil {
		return 0, err
	}
	rootfs, err := s.rootfs(ctx, c, opts.Rootfs)
	if err != nil {
		return 0, err
	}
	runtimeOptions := opts.Options
	if runtimeOptions.IsZero() {
		runtimeOptions = c.Runtime.Options
	}
	joined := m.shimToJoin(t.key, c, opts)
	shim := ""
	if joined == nil {
		name := c.Runtime.Name
		if opts.RuntimePath != "" {
			name = opts.RuntimePath
		}
		if shim, err = m.resolve(name); err != nil {
			return 0, err
		}
	}

	made, err := t.bundle.make(c.Spec.Value, spec)
	if made {
		back.Push("remove bundle", func(context.Context) error { return t.bundle.remove() })
	}
	if err != nil {
		return 0, err
	}
	m.opt.Faults.Pass("task.bundled")
	if c.SandboxID != "" {
		if err := t.bundle.write(fileSandbox, []byte(c.SandboxID)); err != nil {
			return 0, err
		}
	}

	var l *link
	if joined != nil {
		l, err = m.join(ctx, *joined, t, opts.APIAddress != "", 0)
		if err != nil {
			return 0, err
		}
		if err := t.bundle.record(*joined); err != nil {
			l.drop(t)
			return 0, err
		}
	} else if l, err = m.startLink(ctx, t, shim, runtimeOptions, &back); err != nil {
		return 0, err
	}
	t.mu.Lock()
	t.link = l
	t.mu.Unlock()
	var answer chan error // of the shim, nil before it was asked
	back.Push("stop shim", func(ctx context.Context) error { return t.abandon(ctx, answer, shim) })
	if err := l.probe(ctx, t.key); err != nil {
		return 0, err
	}

	// The shim cannot be told that the caller has gone. It goes on creating,
	// so its answer is awaited before what it made can be deleted.
	answer = make(chan error, 1)
	var r taskapi.CreateTaskResponse
	go func() {
		answer <- l.call(context.WithoutCancel(ctx), t.key, "Create", bound{m.limit.Create, "the daemon's limit for task creation"}, &taskapi.CreateTaskRequest{
			ID: string(t.key.id), Bundle: t.bundle.path, Rootfs: wire.MountsToProto(rootfs),
			Terminal: opts.IO.Terminal, Stdin: opts.IO.Stdin, Stdout: opts.IO.Stdout, Stderr: opts.IO.Stderr,
			Checkpoint: restore, Options: wire.AnyToProto(runtimeOptions),
		}, &r)
	}()
	began := time.Now()
	select {
	case err = <-answer:
		answer <- err // for abandon
		if err != nil {
			return 0, err
		}
	case <-ctx.Done():
		return 0, fmt.Errorf("no answer from %s after %s, and the caller's own time is up: %w", l.describe(), since(began), ctx.Err())
	}
	m.opt.Faults.Pass("task.created")
	if err := os.Remove(t.bundle.file(fileCreating)); err != nil {
		return 0, err
	}
	m.opt.Faults.Pass("task.acknowledged")
	back.Keep()
	t.mu.Lock()
	t.pid = r.Pid
	t.mu.Unlock()
	t.settle(phaseLive)
	m.spawn(t.watch)
	if closed(l.dead) {
		// It died between its answer and now, when nobody was there to be told.
		m.spawn(func() { t.bury(m.ctx) })
	}
	return r.Pid, nil
}

// startLink starts a shim and connects to it. A shim of a group may be on its
// way out when start names it; the second start makes a new one.
func (m *Manager) startLink(ctx context.Context, u user, shim string, runtimeOptions typed.Any, back *undo.Stack) (*link, error) {
	k, b := u.whose(), u.where()
	if err := b.write(fileShim, []byte(shim)); err != nil {
		return nil, err
	}
	logs, err := m.openLog(k, b)
	if err != nil {
		return nil, err
	}
	// Undone after the shim has ended: one that opens its log blocks until
	// somebody reads it.
	back.Push("close shim log", func(context.Context) error {
		logs.close()
		return nil
	})
	stray := true
	back.Push("end stray shim", func(ctx context.Context) error {
		if stray {
			m.endStray(ctx, u, shim)
		}
		return nil
	})
	for attempt := 0; ; attempt++ {
		e, err := m.startShim(ctx, k, b, shim, runtimeOptions)
		if err != nil {
			return nil, err
		}
		m.opt.Faults.Pass("task.shim-started")
		l, err := m.join(ctx, e, u, false, time.Second)
		if err != nil {
			if attempt == 0 && nobodyListens(err) && ctx.Err() == nil {
				continue
			}
			return nil, err
		}
		stray = false
		if err := b.record(e); err != nil {
			l.drop(u)
			stray = true
			return nil, err
		}
		m.opt.Faults.Pass("task.shim-recorded")
		l.keepLog(logs)
		return l, nil
	}
}

// abandon ends a task whose creation did not succeed, and its shim if that is
// nobody else's. answer is what the shim says to the creation, or will say.
func (t *entry) abandon(ctx context.Context, answer chan error, shim string) error {
	l := t.getLink()
	var err error
	if answer != nil {
		cctx, cancel := context.WithTimeout(ctx, t.m.limit.Cleanup)
		select {
		case <-answer:
		case <-cctx.Done():
		}
		cancel()
		_, err = l.purge(ctx, t.key)
	}
	if l.leave(t) {
		if closed(l.dead) {
			l.close()
			removeSocket(l.addr.Address)
		} else {
			l.stop(ctx, t.key)
		}
	}
	var x task.Exit
	if err != nil && shim != "" {
		x, err = t.m.deleteShim(ctx, t.key, t.bundle, shim)
	}
	t.mu.Lock()
	announced := t.announced
	t.mu.Unlock()
	if announced {
		// Those who heard of the task have to hear that it is no more.
		x.Status = cmp.Or(x.Status, statusUnknownExit)
		t.setExit(x)
		x = t.getExit()
		t.publishOwn(ctx, event.TopicTaskDelete, event.TaskDelete{ContainerID: x.ID, Pid: x.Pid, ExitStatus: x.Status, ExitedAt: x.At})
	}
	return err
}

// endStray ends a shim that may have been started although its start failed,
// or was never heard to have succeeded.
func (m *Manager) endStray(ctx context.Context, u user, shim string) {
	k, b := u.whose(), u.where()
	if logs, err := m.openLog(k, b); err == nil {
		defer logs.close() // it may be blocked until somebody reads its log
	}
	for _, address := range m.guesses(k, b) {
		e := endpoint{Address: address}.normal()
		if _, _, err := splitAddress(e.Address); err != nil {
			continue
		}
		l, err := m.join(ctx, e, u, false, 0)
		if err != nil {
			removeSocket(address)
			continue
		}
		if l.probe(ctx, k) == nil {
			if err := u.purge(ctx, l); err != nil {
				m.log.Warn("end what a stray shim has made", "namespace", k.ns, "id", k.id, "error", err)
			}
		}
		if l.leave(u) {
			l.stop(ctx, k)
		}
	}
	if shim != "" {
		if _, err := m.deleteShim(ctx, k, b, shim); err != nil {
			m.log.Debug("clean up after failed start", "namespace", k.ns, "id", k.id, "error", err)
		}
	}
}

// rootfs is what the shim mounts: what the client says, or the container's
// snapshot (contract 15, 1.3.33).
func (s *store) rootfs(ctx context.Context, c container.Container, given []mount.Mount) ([]mount.Mount, error) {
	if len(given) > 0 || c.SnapshotKey == "" || c.Snapshotter == "" {
		return given, nil
	}
	sn, err := s.rec.Snapshots(c.Snapshotter)
	if err != nil {
		return nil, fmt.Errorf("root file system: %w", err)
	}
	mounts, err := sn.Mounts(ctx, c.SnapshotKey)
	if err != nil {
		return nil, fmt.Errorf("root file system: snapshot %q of %s: %w", c.SnapshotKey, c.Snapshotter, err)
	}
	return mounts, nil
}

// restorePath is the directory to restore from, "" for a fresh start.
func restorePath(d *ocispec.Descriptor) (string, error) {
	if d == nil {
		return "", nil
	}
	if p := d.Annotations["RestoreFromPath"]; filepath.IsAbs(p) {
		return p, nil
	}
	return "", fmt.Errorf("restore checkpoint %s: only one in a directory, named by the annotation RestoreFromPath, can be restored: %w", d.Digest, errdefs.ErrNotImplemented)
}

// shimToJoin returns the endpoint of a shim that runs already and is to have
// the container: the one that the request names, or its sandbox's if that
// speaks version 3 (contract 5.2.10). Nil: start one.
func (m *Manager) shimToJoin(k key, c container.Container, opts task.CreateOptions) *endpoint {
	if opts.APIAddress != "" {
		e := endpoint{Address: opts.APIAddress, Version: int(opts.APIVersion)}
		e.Version = cmp.Or(e.Version, 3)
		e = e.normal()
		return &e
	}
	if c.SandboxID == "" || c.SandboxID == string(c.ID) {
		return nil
	}
	pod := key{ns: k.ns, id: container.ID(c.SandboxID)}
	m.mu.Lock()
	t, p := m.tasks[pod], m.pods[pod]
	m.mu.Unlock()
	var l *link
	if t != nil {
		l = t.getLink()
	} else if p != nil {
		l = p.getLink()
	}
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.version < 3 || l.isDead || l.isOver {
		return nil
	}
	e := l.addr
	return &e
}

// Start implements task.Store.
func (s *store) Start(ctx context.Context, id container.ID, exec task.ExecID) (uint32, error) {
	t, err := s.get(ctx, id)
	if err != nil {
		return 0, err
	}
	var r taskapi.StartResponse
	if err := t.call(ctx, "Start", s.callBound(), &taskapi.StartRequest{ID: string(id), ExecID: string(exec)}, &r); err != nil {
		return 0, err
	}
	if exec == "" && r.Pid != 0 {
		t.mu.Lock()
		t.pid = r.Pid // one that is restored has none before
		t.mu.Unlock()
	}
	s.m.opt.Faults.Pass("task.started")
	return r.Pid, nil
}

// Delete implements task.Store.
func (s *store) Delete(ctx context.Context, id container.ID) (task.Exit, error) {
	t, err := s.get(ctx, id)
	if err != nil {
		return task.Exit{}, err
	}
	if err := t.enter(ctx); err != nil {
		return task.Exit{}, err
	}
	defer t.exitGate()
	if t.getPhase() != phaseLive {
		return task.Exit{}, notFound(t.key)
	}
	var r taskapi.DeleteResponse
	err = t.call(ctx, "Delete", s.callBound(), &taskapi.DeleteRequest{ID: string(id)}, &r)
	s.m.opt.Faults.Pass("task.deleted")
	switch {
	case err == nil:
		t.setExit(task.Exit{Pid: r.Pid, Status: r.ExitStatus, At: wire.TimeFromProto(r.ExitedAt)})
	case errors.Is(err, errShimDead):
		t.buryLocked(ctx)
		return t.getExit(), nil
	case errdefs.IsNotFound(err):
		// The shim forgot it: an earlier Delete was not heard to the end.
		if !closed(t.exited) {
			t.setExit(task.Exit{Status: statusUnknownExit})
		}
	default:
		return task.Exit{}, s.refused(ctx, t, "", err, task.StatusRunning, task.StatusPaused, task.StatusPausing)
	}
	select {
	case <-t.deleted: // by the shim, which told in the right order
	case <-time.After(s.m.limit.Grace):
	case <-ctx.Done():
	}
	t.finish(context.WithoutCancel(ctx))
	return t.getExit(), nil
}

// refused gives a shim's refusal its class: shims answer without one, so the
// process's state tells whether that is the reason.
func (s *store) refused(ctx context.Context, t *entry, exec task.ExecID, err error, because ...task.Status) error {
	if errdefs.IsDeadlineExceeded(err) || errdefs.IsCanceled(err) || errdefs.IsFailedPrecondition(err) ||
		errdefs.IsAlreadyExists(err) || errdefs.IsInvalidArgument(err) {
		return err
	}
	p, serr := t.state(ctx, exec, bound{s.m.limit.State, "timeout task.state"})
	if serr == nil && slices.Contains(because, p.Status) {
		return fmt.Errorf("%w: process is %s: %w", err, strings.ToLower(p.Status.String()), errdefs.ErrFailedPrecondition)
	}
	return err
}

// DeleteExec implements task.Store.
func (s *store) DeleteExec(ctx context.Context, id container.ID, exec task.ExecID) (task.Exit, error) {
	if err := task.Check(exec); err != nil {
		return task.Exit{}, err
	}
	t, err := s.get(ctx, id)
	if err != nil {
		return task.Exit{}, err
	}
	var r taskapi.DeleteResponse
	err = t.call(ctx, "Delete", s.callBound(), &taskapi.DeleteRequest{ID: string(id), ExecID: string(exec)}, &r)
	if err != nil {
		return task.Exit{}, s.refused(ctx, t, exec, err, task.StatusRunning, task.StatusPaused)
	}
	t.forgetExec(string(exec), r.Pid != 0)
	return task.Exit{ID: string(exec), Pid: r.Pid, Status: r.ExitStatus, At: wire.TimeFromProto(r.ExitedAt)}, nil
}

// state asks the shim for a process's state.
func (t *entry) state(ctx context.Context, exec task.ExecID, b bound) (task.Process, error) {
	var r taskapi.StateResponse
	if err := t.call(ctx, "State", b, &taskapi.StateRequest{ID: string(t.key.id), ExecID: string(exec)}, &r); err != nil {
		return task.Process{}, err
	}
	p := task.Process{
		ContainerID: t.key.id, ID: string(t.key.id), Pid: r.Pid, Status: task.Status(r.Status),
		IO:         task.IO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
		ExitStatus: r.ExitStatus, ExitedAt: wire.TimeFromProto(r.ExitedAt),
	}
	if exec != "" {
		p.ID = string(exec)
	}
	return p, nil
}

// Get implements task.Store.
func (s *store) Get(ctx context.Context, id container.ID, exec task.ExecID) (task.Process, error) {
	t, err := s.get(ctx, id)
	if err != nil {
		return task.Process{}, err
	}
	return t.state(ctx, exec, bound{s.m.limit.State, "timeout task.state"})
}

// entries are the namespace's tasks in the order of their ids.
func (s *store) entries() []*entry {
	s.m.mu.Lock()
	var out []*entry
	for k, t := range s.m.tasks {
		if k.ns == s.ns {
			out = append(out, t)
		}
	}
	s.m.mu.Unlock()
	out = slices.DeleteFunc(out, func(t *entry) bool { p := t.getPhase(); return p == phaseCreating || p == phaseGone })
	slices.SortFunc(out, func(a, b *entry) int { return strings.Compare(string(a.key.id), string(b.key.id)) })
	return out
}

// List implements task.Store. All are asked at once.
func (s *store) List(ctx context.Context) ([]task.Process, error) {
	return gather(ctx, s.entries(), func(ctx context.Context, t *entry) (task.Process, bool) {
		began := time.Now()
		if t.await(ctx, s.m.limit.State) == nil {
			if p := t.getPhase(); p == phaseGone {
				return task.Process{}, false
			}
			p, err := t.state(ctx, "", bound{max(time.Millisecond, s.m.limit.State-time.Since(began)), "timeout task.state"})
			if err == nil {
				return p, true
			}
			if errdefs.IsNotFound(err) && !errors.Is(err, errShimDead) {
				return task.Process{}, false
			}
			s.m.log.Warn("list tasks", "error", err)
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		return task.Process{ContainerID: t.key.id, ID: string(t.key.id), Pid: t.pid, Status: task.StatusUnknown}, true
	})
}

// gather asks for all entries in parallel and keeps the order.
func gather[T any](ctx context.Context, entries []*entry, ask func(context.Context, *entry) (T, bool)) ([]T, error) {
	type answer struct {
		v  T
		ok bool
	}
	answers := make([]answer, len(entries))
	var wg sync.WaitGroup
	for i, t := range entries {
		wg.Go(func() { answers[i].v, answers[i].ok = ask(ctx, t) })
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("list tasks: %w", err)
	}
	out := make([]T, 0, len(entries))
	for _, a := range answers {
		if a.ok {
			out = append(out, a.v)
		}
	}
	return out, nil
}

// Kill implements task.Store.
func (s *store) Kill(ctx context.Context, id container.ID, exec task.ExecID, signal uint32, all bool) error {
	t, err := s.get(ctx, id)
	if err != nil {
		return err
	}
	err = t.call(ctx, "Kill", s.callBound(), &taskapi.KillRequest{ID: string(id), ExecID: string(exec), Signal: signal, All: all}, empty())
	if err == nil || errdefs.IsDeadlineExceeded(err) || errdefs.IsCanceled(err) || errors.Is(err, errShimDead) {
		return err
	}
	if p, serr := t.state(ctx, exec, bound{s.m.limit.State, "timeout task.state"}); serr == nil && p.Status == task.StatusStopped {
		if all && exec == "" {
			return nil // nobody is left, which is what was asked for (contract 15, 1.3.36)
		}
		if !errdefs.IsNotFound(err) {
			return fmt.Errorf("%w: process already finished: %w", err, errdefs.ErrNotFound)
		}
	}
	return err
}

// Exec implements task.Store.
func (s *store) Exec(ctx context.Context, id container.ID, exec task.ExecID, opts task.ExecOptions) error {
	if err := task.Check(exec); err != nil {
		return err
	}
	if opts.Spec.IsZero() || len(opts.Spec.Value) == 0 {
		return fmt.Errorf("exec %q in task %s: no process spec: %w", exec, s.key(id), errdefs.ErrInvalidArgument)
	}
	t, err := s.get(ctx, id)
	if err != nil {
		return err
	}
	known := t.bundle.has(noteName(string(exec)))
	if !known {
		if err := t.expectExec(string(exec)); err != nil {
			return fmt.Errorf("exec %q in task %s: %w", exec, t.key, err)
		}
	}
	err = t.call(ctx, "Exec", s.callBound(), &taskapi.ExecProcessRequest{
		ID: string(id), ExecID: string(exec), Terminal: opts.IO.Terminal,
		Stdin: opts.IO.Stdin, Stdout: opts.IO.Stdout, Stderr: opts.IO.Stderr, Spec: wire.AnyToProto(opts.Spec),
	}, empty())
	if err == nil {
		s.m.opt.Faults.Pass("task.exec-added")
		return nil
	}
	if !known && !errdefs.IsAlreadyExists(err) && !errdefs.IsDeadlineExceeded(err) {
		if ferr := t.bundle.forget(string(exec)); ferr != nil {
			s.m.log.Debug("forget exec", "namespace", s.ns, "id", id, "exec", exec, "error", ferr)
		}
	}
	return s.refused(ctx, t, "", err, task.StatusStopped)
}

// Resize implements task.Store.
func (s *store) Resize(ctx context.Context, id container.ID, exec task.ExecID, width, height uint32) error {
	t, err := s.get(ctx, id)
	if err != nil {
		return err
	}
	return t.call(ctx, "ResizePty", s.callBound(), &taskapi.ResizePtyRequest{ID: string(id), ExecID: string(exec), Width: width, Height: height}, empty())
}

// CloseStdin implements task.Store.
func (s *store) CloseStdin(ctx context.Context, id container.ID, exec task.ExecID) error {
	t, err := s.get(ctx, id)
	if err != nil {
		return err
	}
	return t.call(ctx, "CloseIO", s.callBound(), &taskapi.CloseIORequest{ID: string(id), ExecID: string(exec), Stdin: true}, empty())
}

// Pause implements task.Store.
func (s *store) Pause(ctx context.Context, id container.ID) error {
	t, err := s.get(ctx, id)
	if err != nil {
		return err
	}
	err = t.call(ctx, "Pause", s.callBound(), &taskapi.PauseRequest{ID: string(id)}, empty())
	if err != nil {
		return s.refused(ctx, t, "", err, task.StatusCreated, task.StatusStopped, task.StatusPaused)
	}
	return nil
}

// Resume implements task.Store.
func (s *store) Resume(ctx context.Context, id container.ID) error {
	t, err := s.get(ctx, id)
	if err != nil {
		return err
	}
	err = t.call(ctx, "Resume", s.callBound(), &taskapi.ResumeRequest{ID: string(id)}, empty())
	if err != nil {
		return s.refused(ctx, t, "", err, task.StatusCreated, task.StatusStopped, task.StatusRunning)
	}
	return nil
}

// Pids implements task.Store.
func (s *store) Pids(ctx context.Context, id container.ID) ([]task.ProcessInfo, error) {
	t, err := s.get(ctx, id)
	if err != nil {
		return nil, err
	}
	var r taskapi.PidsResponse
	if err := t.call(ctx, "Pids", s.callBound(), &taskapi.PidsRequest{ID: string(id)}, &r); err != nil {
		return nil, err
	}
	out := make([]task.ProcessInfo, 0, len(r.Processes))
	for _, p := range r.Processes {
		out = append(out, task.ProcessInfo{Pid: p.GetPid(), Info: wire.AnyFromProto(p.GetInfo())})
	}
	return out, nil
}

// Update implements task.Store.
func (s *store) Update(ctx context.Context, id container.ID, resources typed.Any, annotations map[string]string) error {
	if resources.IsZero() {
		return fmt.Errorf("update task %s: no resources: %w", s.key(id), errdefs.ErrInvalidArgument)
	}
	t, err := s.get(ctx, id)
	if err != nil {
		return err
	}
	return t.call(ctx, "Update", s.callBound(), &taskapi.UpdateTaskRequest{ID: string(id), Resources: wire.AnyToProto(resources), Annotations: annotations}, empty())
}

// Metrics implements task.Store.
func (s *store) Metrics(ctx context.Context, filters ...string) ([]task.Metric, error) {
	f, err := filter.Parse(filters...)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	entries := slices.DeleteFunc(s.entries(), func(t *entry) bool {
		return !f.Match(filter.Func(func(path []string) (string, bool) {
			if len(path) != 1 {
				return "", false
			}
			switch path[0] {
			case "id":
				return string(t.key.id), true
			case "namespace":
				return string(t.key.ns), true
			}
			return "", false
		}))
	})
	return gather(ctx, entries, func(ctx context.Context, t *entry) (task.Metric, bool) {
		if t.await(ctx, s.m.limit.Stats) != nil {
			return task.Metric{}, false
		}
		var r taskapi.StatsResponse
		err := t.call(ctx, "Stats", bound{s.m.limit.Stats, "timeout metrics.shimstats"}, &taskapi.StatsRequest{ID: string(t.key.id)}, &r)
		if err != nil {
			s.m.log.Warn("metrics", "error", err)
			return task.Metric{}, false
		}
		return task.Metric{ID: string(t.key.id), At: time.Now().UTC(), Data: wire.AnyFromProto(r.Stats)}, true
	})
}

// Wait implements task.Store.
func (s *store) Wait(ctx context.Context, id container.ID, exec task.ExecID) (task.Exit, error) {
	t, err := s.get(ctx, id)
	if err != nil {
		return task.Exit{}, err
	}
	if exec == "" {
		return t.wait(ctx)
	}
	var r taskapi.WaitResponse
	err = t.call(ctx, "Wait", bound{}, &taskapi.WaitRequest{ID: string(id), ExecID: string(exec)}, &r)
	if errors.Is(err, errShimDead) {
		// With the task, its execs have ended, of the same cause.
		x, err := t.wait(ctx)
		if err != nil {
			return task.Exit{}, err
		}
		return task.Exit{ID: string(exec), Status: x.Status, At: x.At}, nil
	}
	if err != nil {
		return task.Exit{}, err
	}
	return task.Exit{ID: string(exec), Status: r.ExitStatus, At: wire.TimeFromProto(r.ExitedAt)}, nil
}

// Checkpoint implements task.Store for checkpoints that stay in a directory.
func (s *store) Checkpoint(ctx context.Context, id container.ID, parent string, opts typed.Any) ([]ocispec.Descriptor, error) {
	t, err := s.get(ctx, id)
	if err != nil {
		return nil, err
	}
	var o options.CheckpointOptions
	if opts.URL == "containerd.runc.v1.CheckpointOptions" {
		if err := proto.Unmarshal(opts.Value, &o); err != nil {
			return nil, fmt.Errorf("checkpoint task %s: options: %w (%w)", t.key, err, errdefs.ErrInvalidArgument)
		}
	}
	if !filepath.IsAbs(o.ImagePath) || parent != "" {
		return nil, fmt.Errorf("checkpoint task %s: only into a directory, named by the option image_path: %w", t.key, errdefs.ErrNotImplemented)
	}
	return nil, t.call(ctx, "Checkpoint", bound{s.m.limit.Create, "the daemon's limit for checkpoints"},
		&taskapi.CheckpointTaskRequest{ID: string(id), Path: o.ImagePath, Options: wire.AnyToProto(opts)}, empty())
}
