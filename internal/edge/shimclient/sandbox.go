package shimclient

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/sandboxrpc"
	"github.com/gantryd/gantry/internal/lib/undo"
)

// SandboxPluginID is the directory below state and root that the sandboxes'
// bundles and work directories are in (contract 5.6.6).
const SandboxPluginID = "io.containerd.sandbox.controller.v1.shim"

// pod is a sandbox that a shim runs, or ran: a shim's death ends it, and it is
// there until it is shut down.
type pod struct {
	m      *Manager
	key    key
	bundle bundle

	gate   chan struct{} // held, as its one token, by what makes or removes it
	ready  chan struct{} // closed when creation or recovery has ended
	exited chan struct{} // closed when exit is known
	gone   chan struct{} // closed when it is out of the table

	// mu guards what follows, and is held while the exit is handed to the bus,
	// which does not wait.
	mu      sync.Mutex
	phase   phase
	link    *link // nil if its shim has died or does not answer
	created time.Time
	started bool
	exit    sandbox.Exit
	watched bool
}

func (m *Manager) newPod(k key, p phase) *pod {
	return &pod{m: m, key: k, phase: p, gate: make(chan struct{}, 1), ready: make(chan struct{}), exited: make(chan struct{}), gone: make(chan struct{}),
		bundle: bundle{
			path: filepath.Join(m.opt.State, SandboxPluginID, string(k.ns), string(k.id)),
			work: filepath.Join(m.opt.Root, SandboxPluginID, string(k.ns), string(k.id)),
		}}
}

func (p *pod) whose() key    { return p.key }
func (p *pod) where() bundle { return p.bundle }

func (p *pod) purge(ctx context.Context, l *link) error {
	err := l.callSandbox(ctx, p.key, "ShutdownSandbox", bound{p.m.limit.Cleanup, "timeout shim.cleanup"}, &sandboxapi.ShutdownSandboxRequest{SandboxID: string(p.key.id)}, &sandboxapi.ShutdownSandboxResponse{})
	if errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err) {
		return nil
	}
	return err
}

func (p *pod) getPhase() phase {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.phase
}

func (p *pod) getLink() *link {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.link
}

// settle ends creation or recovery.
func (p *pod) settle(to phase) {
	p.mu.Lock()
	p.phase = to
	p.mu.Unlock()
	if !closed(p.ready) {
		close(p.ready)
	}
}

func (p *pod) enter(ctx context.Context) error {
	select {
	case p.gate <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("sandbox %s: another operation on it is under way: %w", p.key, ctx.Err())
	}
}

func (p *pod) leave() { <-p.gate }

// call makes a call to the sandbox's shim.
func (p *pod) call(ctx context.Context, method string, b bound, req, resp proto.Message) error {
	l := p.getLink()
	err := errShimDead
	if l != nil {
		err = l.callSandbox(ctx, p.key, method, b, req, resp)
	}
	if errors.Is(err, errShimDead) {
		// Not found would mean that there is nothing to shut down.
		return fmt.Errorf("sandbox %s: %s: its shim has died or cannot be reached: %w", p.key, verb(method), errdefs.ErrUnavailable)
	}
	return err
}

func (p *pod) id() string { return string(p.key.id) }

func (p *pod) callBound() bound {
	return bound{p.m.limit.Call, "the daemon's limit for a shim call"}
}

func (p *pod) publish(topic string, e event.Payload) {
	err := p.m.opt.Events.Publish(context.Background(), event.Envelope{Timestamp: time.Now().UTC(), Namespace: p.key.ns, Topic: topic, Event: e})
	if err != nil {
		p.m.log.Error("publish event", "topic", topic, "namespace", p.key.ns, "id", p.key.id, "error", err)
	}
}

// end records how it ended, and tells it; the first to know wins. It is told
// before that is noted: twice does less harm than never.
func (p *pod) end(x sandbox.Exit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if closed(p.exited) {
		return
	}
	if x.At.IsZero() {
		x.At = time.Now().UTC()
	}
	p.exit = x
	p.publish(event.TopicSandboxExit, event.SandboxExit{SandboxID: p.id(), ExitStatus: x.Status, ExitedAt: x.At})
	if err := p.bundle.remember("", note{Status: x.Status, At: x.At.UnixNano(), Delivered: true}); err != nil {
		p.m.log.Debug("note delivered exit", "namespace", p.key.ns, "id", p.key.id, "error", err)
	}
	close(p.exited)
}

// watch learns when it ends. It is called again without effect.
func (p *pod) watch() {
	p.mu.Lock()
	began := p.watched
	p.watched = true
	p.mu.Unlock()
	if began {
		return
	}
	p.m.spawn(func() {
		ctx := p.m.ctx
		for !closed(p.exited) {
			var r sandboxapi.WaitSandboxResponse
			err := p.call(ctx, "WaitSandbox", bound{}, &sandboxapi.WaitSandboxRequest{SandboxID: p.id()}, &r)
			if err == nil {
				p.end(sandbox.Exit{Status: r.ExitStatus, At: wire.TimeFromProto(r.ExitedAt)})
				return
			}
			if l := p.getLink(); ctx.Err() != nil || closed(p.gone) || l == nil || closed(l.dead) || errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err) {
				return // the burial or the shutdown tells how it ended
			}
			p.m.log.Warn("wait for sandbox", "namespace", p.key.ns, "id", p.key.id, "error", err)
			pause(ctx, time.Second)
		}
	})
}

// bury cleans up after a shim that died. The sandbox has ended then.
func (p *pod) bury(ctx context.Context) {
	if p.enter(ctx) != nil {
		return // the daemon is stopping; it buries after its next start
	}
	defer p.leave()
	if p.getPhase() == phaseGone {
		return
	}
	p.buryLocked(ctx)
}

func (p *pod) buryLocked(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	if shim := p.bundle.shim(); shim != "" {
		if _, err := p.m.deleteShim(ctx, p.key, p.bundle, shim); err != nil {
			p.m.log.Warn("clean up after dead shim", "namespace", p.key.ns, "id", p.key.id, "error", err)
		}
	}
	p.letGo(ctx)
	p.end(sandbox.Exit{Status: statusUnknownExit})
}

// letGo takes the sandbox off its shim, which is stopped if it lives.
func (p *pod) letGo(ctx context.Context) {
	p.mu.Lock()
	l := p.link
	p.link = nil
	p.mu.Unlock()
	if l == nil || !l.leave(p) {
		return
	}
	if closed(l.dead) {
		removeSocket(l.addr.Address)
		l.close()
	} else {
		l.stop(ctx, p.key)
	}
}

// forget takes the sandbox out of the table.
func (p *pod) forget() {
	p.settle(phaseGone)
	p.m.mu.Lock()
	if p.m.pods[p.key] == p {
		delete(p.m.pods, p.key)
	}
	p.m.mu.Unlock()
	close(p.gone)
}

// sandboxes is the controller "shim" of one namespace.
type sandboxes struct {
	m  *Manager
	ns namespace.ID
}

// Sandboxes opens the sandboxes of a namespace that shims run by their Sandbox
// API: the controller "shim" (contract 5.6.6). ErrInvalidArgument for a bad
// name. A sandbox that has no record in the store when the daemon starts is
// shut down.
func (m *Manager) Sandboxes(ns namespace.ID) (sandbox.Controller, error) {
	if err := namespace.Check(ns); err != nil {
		return nil, err
	}
	return &sandboxes{m, ns}, nil
}

func (c *sandboxes) get(ctx context.Context, id string) (*pod, error) {
	k := key{c.ns, container.ID(id)}
	c.m.mu.Lock()
	p := c.m.pods[k]
	c.m.mu.Unlock()
	missing := fmt.Errorf("sandbox %s: %w", k, errdefs.ErrNotFound)
	if p == nil || p.getPhase() == phaseCreating {
		return nil, missing
	}
	wait, cancel := context.WithTimeout(ctx, c.m.limit.Load+c.m.limit.Cleanup)
	defer cancel()
	select {
	case <-p.ready:
	case <-wait.Done():
		return nil, fmt.Errorf("sandbox %s: the daemon is still recovering it: %w", k, wait.Err())
	}
	if p.getPhase() == phaseGone {
		return nil, missing
	}
	return p, nil
}

// Create implements sandbox.Controller.
func (c *sandboxes) Create(ctx context.Context, s sandbox.Sandbox, opts sandbox.CreateOptions) error {
	if err := s.Check(); err != nil {
		return err
	}
	m, k := c.m, key{c.ns, container.ID(s.ID)}
	m.mu.Lock()
	if m.closed || m.pods[k] != nil {
		stopping := m.closed
		m.mu.Unlock()
		if stopping {
			return fmt.Errorf("create sandbox %s: the daemon is stopping: %w", k, errdefs.ErrUnavailable)
		}
		return fmt.Errorf("create sandbox %s: %w", k, errdefs.ErrAlreadyExists)
	}
	p := m.newPod(k, phaseCreating)
	p.gate <- struct{}{}
	defer p.leave()
	m.pods[k] = p
	m.mu.Unlock()
	if err := p.create(ctx, s, opts); err != nil {
		return fmt.Errorf("create sandbox %s: %w", k, err)
	}
	p.publish(event.TopicSandboxCreate, event.SandboxCreate{SandboxID: s.ID})
	return nil
}

func (p *pod) create(ctx context.Context, s sandbox.Sandbox, opts sandbox.CreateOptions) (err error) {
	m := p.m
	var back undo.Stack
	defer func() {
		if err == nil {
			return
		}
		if uerr := back.Run(context.WithoutCancel(ctx)); uerr != nil {
			m.log.Error("undo create", "namespace", p.key.ns, "sandbox", p.key.id, "error", uerr)
		}
		p.forget()
	}()
	ctx, cancel := context.WithTimeout(ctx, m.limit.Create)
	defer cancel()
	config := s.Spec.Value
	if len(config) == 0 {
		config = []byte("{}")
	}
	if !json.Valid(config) {
		return fmt.Errorf("the spec is not JSON: %w", errdefs.ErrInvalidArgument)
	}
	shim, err := m.resolve(s.Runtime.Name)
	if err != nil {
		return err
	}
	made, err := p.bundle.make(config, ociSpec{})
	if made {
		back.Push("remove bundle", func(context.Context) error { return p.bundle.remove() })
	}
	if err != nil {
		return err
	}
	m.opt.Faults.Pass("sandbox.bundled")
	l, err := m.startLink(ctx, p, shim, s.Runtime.Options, &back)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.link, p.created = l, time.Now().UTC()
	p.mu.Unlock()
	back.Push("stop shim", func(ctx context.Context) error {
		err := p.purge(ctx, l)
		p.letGo(ctx)
		return err
	})
	if err = l.probe(ctx, p.key); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsNotImplemented(err) {
		return err
	}
	err = p.call(ctx, "CreateSandbox", bound{m.limit.Create, "the daemon's limit for sandbox creation"}, &sandboxapi.CreateSandboxRequest{
		SandboxID: s.ID, BundlePath: p.bundle.path, Rootfs: wire.MountsToProto(opts.Rootfs), Options: wire.AnyToProto(opts.Options),
		NetnsPath: opts.NetNSPath, Annotations: opts.Annotations,
	}, &sandboxapi.CreateSandboxResponse{})
	if err != nil {
		return err
	}
	m.opt.Faults.Pass("sandbox.created")
	if err = os.Remove(p.bundle.file(fileCreating)); err != nil {
		return err
	}
	back.Keep()
	p.settle(phaseLive)
	if closed(l.dead) {
		m.spawn(func() { p.bury(m.ctx) })
	}
	return nil
}

// address is where the sandbox's tasks are served (contract 5.2.6).
func (p *pod) address() (string, uint32) {
	l := p.getLink()
	if l == nil {
		return "", 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.addr.Protocol + "+" + l.addr.Address, uint32(l.version)
}

// Start implements sandbox.Controller.
func (c *sandboxes) Start(ctx context.Context, id string) (sandbox.Instance, error) {
	p, err := c.get(ctx, id)
	if err != nil {
		return sandbox.Instance{}, err
	}
	if err := p.enter(ctx); err != nil {
		return sandbox.Instance{}, err
	}
	defer p.leave()
	p.mu.Lock()
	before := p.started || closed(p.exited)
	p.mu.Unlock()
	if before {
		return sandbox.Instance{}, fmt.Errorf("start sandbox %s: it was started before, or has ended: %w", p.key, errdefs.ErrFailedPrecondition)
	}
	var r sandboxapi.StartSandboxResponse
	err = p.call(ctx, "StartSandbox", bound{c.m.limit.Create, "the daemon's limit for sandbox creation"}, &sandboxapi.StartSandboxRequest{SandboxID: id}, &r)
	if err != nil {
		return sandbox.Instance{}, err
	}
	p.mu.Lock()
	p.started = true
	if r.CreatedAt != nil {
		p.created = wire.TimeFromProto(r.CreatedAt)
	}
	created := p.created
	p.mu.Unlock()
	p.publish(event.TopicSandboxStart, event.SandboxStart{SandboxID: id})
	p.watch()
	addr, version := p.address()
	return sandbox.Instance{ID: id, Pid: r.Pid, CreatedAt: created, Address: addr, Version: version, Spec: wire.AnyFromProto(r.Spec)}, nil
}

// Platform implements sandbox.Controller.
func (c *sandboxes) Platform(ctx context.Context, id string) (ocispec.Platform, error) {
	p, err := c.get(ctx, id)
	if err != nil {
		return ocispec.Platform{}, err
	}
	var r sandboxapi.PlatformResponse
	err = p.call(ctx, "Platform", p.callBound(), &sandboxapi.PlatformRequest{SandboxID: id}, &r)
	return wire.PlatformFromProto(r.Platform), err
}

// Stop implements sandbox.Controller.
func (c *sandboxes) Stop(ctx context.Context, id string, timeout time.Duration) error {
	p, err := c.get(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return p.stop(ctx, max(timeout, 0))
}

func (p *pod) stop(ctx context.Context, timeout time.Duration) error {
	if closed(p.exited) {
		return nil
	}
	timeout = min(timeout, time.Duration(math.MaxInt32)*time.Second)
	secs := uint32((timeout + time.Second - 1) / time.Second)
	b := bound{timeout + p.m.limit.Call, "the time to stop, and the daemon's limit for a shim call"}
	err := p.call(ctx, "StopSandbox", b, &sandboxapi.StopSandboxRequest{SandboxID: p.id(), TimeoutSecs: secs}, &sandboxapi.StopSandboxResponse{})
	switch {
	case err == nil:
		p.watch()
		if p.awaitEnd(ctx) {
			return nil
		}
		p.end(sandbox.Exit{}) // the shim says that it stopped, and not how
		return nil
	case errdefs.IsNotFound(err):
		p.end(sandbox.Exit{Status: statusUnknownExit})
		return nil
	case ctx.Err() == nil && errdefs.IsDeadlineExceeded(err):
		// By force.
		if l := p.getLink(); l != nil && l.kill() && p.awaitEnd(ctx) {
			return nil
		}
	case errdefs.IsUnavailable(err) && p.awaitEnd(ctx):
		return nil // of a shim that died
	}
	return err
}

// awaitEnd waits a little for news of the end.
func (p *pod) awaitEnd(ctx context.Context) bool {
	select {
	case <-p.exited:
		return true
	case <-time.After(p.m.limit.Cleanup):
	case <-ctx.Done():
	}
	return closed(p.exited)
}

// Wait implements sandbox.Controller.
func (c *sandboxes) Wait(ctx context.Context, id string) (sandbox.Exit, error) {
	p, err := c.get(ctx, id)
	if err != nil {
		return sandbox.Exit{}, err
	}
	select {
	case <-p.exited:
		return p.exit, nil
	case <-p.gone:
		return sandbox.Exit{}, fmt.Errorf("sandbox %s: %w", p.key, errdefs.ErrNotFound)
	case <-ctx.Done():
		return sandbox.Exit{}, fmt.Errorf("sandbox %s: wait: %w", p.key, ctx.Err())
	}
}

// Status implements sandbox.Controller.
func (c *sandboxes) Status(ctx context.Context, id string, verbose bool) (sandbox.Status, error) {
	p, err := c.get(ctx, id)
	if err != nil {
		return sandbox.Status{}, err
	}
	var r sandboxapi.SandboxStatusResponse
	err = p.call(ctx, "SandboxStatus", bound{c.m.limit.State, "timeout task.state"}, &sandboxapi.SandboxStatusRequest{SandboxID: id, Verbose: verbose}, &r)
	p.mu.Lock()
	st := sandbox.Status{ID: id, Pid: r.Pid, State: cmp.Or(r.State, sandbox.StateNotReady), Info: r.Info, CreatedAt: wire.TimeFromProto(r.CreatedAt),
		ExitedAt: wire.TimeFromProto(r.ExitedAt), Extra: wire.AnyFromProto(r.Extra)}
	if st.CreatedAt.IsZero() {
		st.CreatedAt = p.created
	}
	ended := closed(p.exited)
	if ended {
		st.State, st.ExitedAt = sandbox.StateNotReady, p.exit.At
	}
	l := p.link
	p.mu.Unlock()
	if err != nil && !ended && (l == nil || !closed(l.dead)) {
		return sandbox.Status{}, err
	}
	st.Address, st.Version = p.address()
	return st, nil
}

// Shutdown implements sandbox.Controller.
func (c *sandboxes) Shutdown(ctx context.Context, id string) error {
	p, err := c.get(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.enter(ctx); err != nil {
		return err
	}
	defer p.leave()
	if p.getPhase() == phaseGone {
		return nil
	}
	return p.shutdown(ctx)
}

// shutdown is Shutdown for one who holds the gate. It goes on without the
// caller: half a sandbox is worse than none, and each step has its limit.
func (p *pod) shutdown(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	if l := p.getLink(); l != nil && !closed(l.dead) {
		if err := p.stop(ctx, 0); err != nil {
			p.m.log.Warn("stop sandbox", "namespace", p.key.ns, "id", p.key.id, "error", err)
		}
		if err := p.purge(ctx, l); err != nil && !closed(l.dead) {
			p.m.log.Warn("shut down sandbox", "namespace", p.key.ns, "id", p.key.id, "error", err)
			l.kill()
		}
	}
	p.m.opt.Faults.Pass("sandbox.stopped")
	p.letGo(ctx)
	p.end(sandbox.Exit{Status: statusUnknownExit})
	if err := p.bundle.remove(); err != nil {
		return fmt.Errorf("shut down sandbox %s: %w", p.key, err)
	}
	p.forget()
	return nil
}

// Metrics implements sandbox.Controller.
func (c *sandboxes) Metrics(ctx context.Context, id string) (task.Metric, error) {
	p, err := c.get(ctx, id)
	if err != nil {
		return task.Metric{}, err
	}
	var r sandboxapi.SandboxMetricsResponse
	err = p.call(ctx, "SandboxMetrics", bound{c.m.limit.Stats, "timeout metrics.shimstats"}, &sandboxapi.SandboxMetricsRequest{SandboxID: id}, &r)
	if err == nil && r.Metrics == nil {
		err = fmt.Errorf("sandbox %s: its shim keeps no metrics: %w", p.key, errdefs.ErrNotImplemented)
	}
	return task.Metric{ID: cmp.Or(r.Metrics.GetID(), id), At: wire.TimeFromProto(r.Metrics.GetTimestamp()), Data: wire.AnyFromProto(r.Metrics.GetData())}, err
}

// Update implements sandbox.Controller.
func (c *sandboxes) Update(ctx context.Context, s sandbox.Sandbox, fields ...string) error {
	p, err := c.get(ctx, s.ID)
	if err != nil {
		return err
	}
	return p.call(ctx, "UpdateSandbox", p.callBound(), &sandboxapi.UpdateSandboxRequest{SandboxID: s.ID, Sandbox: sandboxrpc.ToProto(s), Fields: fields}, &sandboxapi.UpdateSandboxResponse{})
}

// scanPods finds the sandboxes that an earlier daemon left, and what is junk.
func (m *Manager) scanPods() (found []*pod, junk []string, err error) {
	for _, top := range []string{m.opt.State, m.opt.Root} {
		dir := filepath.Join(top, SandboxPluginID)
		names, err := fs.Glob(os.DirFS(dir), "*/*")
		if err != nil {
			return nil, nil, fmt.Errorf("scan sandboxes: %w", err)
		}
		for _, rel := range names {
			path, name, ns := filepath.Join(dir, rel), filepath.Base(rel), namespace.ID(filepath.Dir(rel))
			switch {
			case namespace.Check(ns) != nil:
			case name[0] == '.':
				junk = append(junk, path)
			case ident.Check("sandbox id", name) != nil:
				m.log.Warn("not a sandbox's directory, left alone", "path", path)
			default:
				p := m.newPod(key{ns, container.ID(name)}, phaseRecovering)
				if top == m.opt.State {
					found = append(found, p)
				} else if _, err := os.Lstat(p.bundle.path); errors.Is(err, os.ErrNotExist) {
					junk = append(junk, path)
				}
			}
		}
	}
	return found, junk, nil
}

// recover finds out what became of a sandbox while no daemon was there.
func (p *pod) recover(ctx context.Context, starts chan struct{}) {
	if p.enter(ctx) != nil {
		return
	}
	defer p.leave()
	p.mu.Lock()
	if n := p.bundle.recall()[""]; n.Delivered {
		p.exit = sandbox.Exit{Status: n.Status, At: time.Unix(0, n.At).UTC()}
		close(p.exited)
	}
	if info, err := os.Stat(p.bundle.file(fileConfig)); err == nil {
		p.created = info.ModTime().UTC()
	}
	p.mu.Unlock()
	slot := func() bool {
		select {
		case starts <- struct{}{}:
			return true
		case <-ctx.Done():
			return false
		}
	}
	if p.bundle.has(fileCreating) { // nobody was told that it exists
		if !slot() {
			return
		}
		defer func() { <-starts }()
		p.m.endStray(ctx, p, p.bundle.shim())
		if err := p.bundle.remove(); err != nil {
			p.m.log.Error("remove bundle of a sandbox", "namespace", p.key.ns, "id", p.key.id, "error", err)
		}
		p.forget()
		return
	}
	alive, err := p.adopt(ctx)
	if err != nil {
		p.m.log.Warn("recover sandbox", "namespace", p.key.ns, "id", p.key.id, "error", err)
		p.m.spawn(p.again)
		p.settle(phaseLive)
		return
	}
	if !alive {
		if !slot() {
			return
		}
		defer func() { <-starts }()
	}
	p.decide(ctx, alive)
}

// decide acts on what was found out. The caller holds the gate.
func (p *pod) decide(ctx context.Context, alive bool) {
	if !alive {
		p.buryLocked(ctx)
	}
	if p.unrecorded(ctx) {
		p.m.log.Info("recover sandbox: nobody has a record of it", "namespace", p.key.ns, "id", p.key.id)
		err := p.shutdown(ctx)
		if err == nil {
			return
		}
		p.m.log.Error("recover sandbox", "error", err)
	}
	p.settle(phaseLive)
}

// adopt connects to the sandbox's shim and learns its state. It returns false
// if there is no shim any more, or none that knows it, and an error if that
// cannot be told.
func (p *pod) adopt(ctx context.Context) (alive bool, err error) {
	e, ok, err := p.bundle.endpoint()
	if !ok || err != nil {
		return false, nil
	}
	l := p.getLink()
	if l == nil {
		if l, err = p.m.join(ctx, e, p, false, 0); err != nil {
			if nobodyListens(err) {
				removeSocket(e.Address)
				return false, nil
			}
			return false, err
		}
		p.mu.Lock()
		p.link = l
		p.mu.Unlock()
		if logs, err := p.m.openLog(p.key, p.bundle); err == nil {
			l.keepLog(logs)
		}
	}
	if err := l.probe(ctx, p.key); err != nil {
		p.m.log.Debug("recover sandbox: ask the shim who it is", "namespace", p.key.ns, "id", p.key.id, "error", err)
	}
	var r sandboxapi.SandboxStatusResponse
	err = l.callSandbox(ctx, p.key, "SandboxStatus", bound{p.m.limit.Load, "timeout shim.load"}, &sandboxapi.SandboxStatusRequest{SandboxID: p.id()}, &r)
	switch {
	case errdefs.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, err
	}
	p.mu.Lock()
	if r.CreatedAt != nil {
		p.created = wire.TimeFromProto(r.CreatedAt)
	}
	p.started = r.State == sandbox.StateReady || r.ExitedAt != nil
	watch := p.started
	p.mu.Unlock()
	if watch {
		p.watch()
	}
	return true, nil
}

// again adopts a sandbox whose shim does not answer, when it does.
func (p *pod) again() {
	ctx := p.m.ctx
	for wait := time.Second; ; wait = min(2*wait, 30*time.Second) {
		pause(ctx, wait)
		if ctx.Err() != nil || closed(p.gone) || p.enter(ctx) != nil {
			return
		}
		var err error
		if p.getPhase() != phaseGone {
			var alive bool
			if alive, err = p.adopt(ctx); err == nil {
				p.decide(ctx, alive)
			}
		}
		p.leave()
		if err == nil {
			return
		}
	}
}

// unrecorded says whether the store is sure not to know the sandbox.
func (p *pod) unrecorded(ctx context.Context) bool {
	rec, err := p.m.opt.Records.In(p.key.ns, "")
	if err != nil || rec.Sandboxes() == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, p.m.limit.Load)
	defer cancel()
	_, err = rec.Sandboxes().Get(ctx, p.id())
	return errdefs.IsNotFound(err)
}
