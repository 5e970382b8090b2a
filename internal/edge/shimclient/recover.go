package shimclient

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/service/reconcile"
)

// scan is what an earlier daemon left.
type scan struct {
	tasks []*entry
	pods  []*pod
	junk  []string // directories of nobody
}

// Scan reads the names of the bundles that are there, which is all that has
// to be done before calls are served: they wait for the recovery of the
// container that they are about, and of no other. It contacts nobody.
func (m *Manager) Scan() error {
	found := &scan{}
	for _, dir := range []string{m.state, m.root} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return fmt.Errorf("scan bundles: %w", err)
		}
		spaces, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("scan bundles: %w", err)
		}
		for _, space := range spaces {
			ns := namespace.ID(space.Name())
			if !space.IsDir() || namespace.Check(ns) != nil {
				continue
			}
			ids, err := os.ReadDir(filepath.Join(dir, space.Name()))
			if err != nil {
				return fmt.Errorf("scan bundles: %w", err)
			}
			for _, d := range ids {
				m.classify(found, dir, ns, d)
			}
		}
	}
	pods, junk, err := m.scanPods()
	if err != nil {
		return err
	}
	found.junk = append(found.junk, junk...)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range pods {
		if m.pods[p.key] == nil { // not made while the names were read
			m.pods[p.key] = p
			found.pods = append(found.pods, p)
		}
	}
	// A task that was made while the names were read is nobody's remains.
	found.tasks = slices.DeleteFunc(found.tasks, func(t *entry) bool { return m.tasks[t.key] != nil })
	for _, t := range found.tasks {
		m.tasks[t.key] = t
	}
	m.found = found
	return nil
}

func (m *Manager) classify(found *scan, dir string, ns namespace.ID, d os.DirEntry) {
	if !d.IsDir() {
		return
	}
	path := filepath.Join(dir, string(ns), d.Name())
	id := container.ID(d.Name())
	f := reconcile.Facts{Deleted: d.Name()[0] == '.', Bundle: dir == m.state}
	if !f.Deleted && container.Check(id) != nil {
		m.log.Warn("not a container's directory, left alone", "path", path)
		return
	}
	if !f.Bundle {
		_, err := os.Lstat(m.bundle(key{ns, id}).path)
		f.Bundle = err == nil
	}
	switch {
	case reconcile.Decide(f) == reconcile.Sweep:
		found.junk = append(found.junk, path)
	case dir == m.state:
		found.tasks = append(found.tasks, newEntry(m, key{ns, id}, phaseRecovering))
	}
}

// Recover puts the tasks that Scan found together with their shims, all at
// once, and returns when each is adopted, buried or removed, or ctx is over.
// It is safe to serve calls meanwhile. It scans if Scan was not called.
func (m *Manager) Recover(ctx context.Context) error {
	m.mu.Lock()
	found := m.found
	m.mu.Unlock()
	if found == nil {
		if err := m.Scan(); err != nil {
			return err
		}
		m.mu.Lock()
		found = m.found
		m.mu.Unlock()
	}
	// Shim delete commands are processes: not all at once on a host that
	// comes back with a thousand dead bundles. Living shims do not wait for them.
	starts := make(chan struct{}, 16)
	var wg sync.WaitGroup
	for _, t := range found.tasks {
		wg.Add(1)
		if !m.spawn(func() {
			defer wg.Done()
			t.recover(m.ctx, starts)
		}) {
			wg.Done()
		}
	}
	for _, p := range found.pods {
		wg.Add(1)
		if !m.spawn(func() {
			defer wg.Done()
			p.recover(m.ctx, starts)
		}) {
			wg.Done()
		}
	}
	for _, path := range found.junk {
		if err := sweep(path); err != nil {
			m.log.Warn("sweep", "path", path, "error", err)
		}
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("recover tasks: %w", ctx.Err())
	}
}

// recover finds out what became of one task and acts on it.
func (t *entry) recover(ctx context.Context, starts chan struct{}) {
	if t.enter(ctx) != nil {
		return
	}
	defer t.exitGate()
	t.mu.Lock()
	t.notes = t.bundle.recall()
	if t.notes[""].Delivered {
		n := t.notes[""]
		t.pid = n.Pid
		t.setExitLocked(task.Exit{Pid: n.Pid, Status: n.Status, At: time.Unix(0, n.At).UTC()})
		close(t.told)
	}
	t.mu.Unlock()
	facts := t.examine(ctx)
	action := reconcile.Decide(facts)
	t.m.log.Info("recover task", "namespace", t.key.ns, "id", t.key.id, "action", action.String())
	switch action {
	case reconcile.Bury, reconcile.Discard, reconcile.Evict:
		select {
		case starts <- struct{}{}:
			defer func() { <-starts }()
		case <-ctx.Done():
			return
		}
	}
	t.act(ctx, action)
}

// examine asks bundle, shim and store.
func (t *entry) examine(ctx context.Context) reconcile.Facts {
	f := reconcile.Facts{Bundle: true, Unfinished: t.bundle.has(fileCreating)}
	f.Shim, f.Task = t.examineShim(ctx)
	rec, err := t.m.opt.Records.In(t.key.ns, "")
	if err != nil {
		return f
	}
	answer := func(err error) reconcile.Known {
		switch {
		case err == nil:
			return reconcile.Yes
		case errdefs.IsNotFound(err):
			return reconcile.No
		}
		t.m.log.Warn("recover task: ask the store", "namespace", t.key.ns, "id", t.key.id, "error", err)
		return reconcile.Unsure
	}
	rctx, cancel := context.WithTimeout(ctx, t.m.limit.Load)
	defer cancel()
	_, err = rec.Containers().Get(rctx, t.key.id)
	f.Record = answer(err)
	f.Sandbox = reconcile.No
	if sandboxes := rec.Sandboxes(); sandboxes != nil {
		_, err = sandboxes.Get(rctx, string(t.key.id))
		f.Sandbox = answer(err)
	}
	return f
}

func (t *entry) examineShim(ctx context.Context) (reconcile.Shim, reconcile.Known) {
	m := t.m
	e, ok, err := t.bundle.endpoint()
	if err != nil {
		m.log.Warn("recover task", "namespace", t.key.ns, "id", t.key.id, "error", err)
	}
	if !ok || err != nil {
		return reconcile.ShimNone, reconcile.Unsure
	}
	l := t.getLink()
	if l == nil {
		// Without a binary of its own it joined somebody else's shim.
		l, err = m.join(ctx, e, t, t.bundle.shim() == "", 0)
		if err != nil {
			if nobodyListens(err) {
				removeSocket(e.Address)
				return reconcile.ShimDead, reconcile.Unsure
			}
			m.log.Warn("recover task", "namespace", t.key.ns, "id", t.key.id, "error", err)
			return reconcile.ShimSilent, reconcile.Unsure
		}
		t.mu.Lock()
		t.link = l
		t.mu.Unlock()
		if logs, err := m.openLog(t.key, t.bundle); err == nil {
			l.keepLog(logs)
		}
	}
	if err := l.probe(ctx, t.key); err != nil {
		if errors.Is(err, errShimDead) {
			return reconcile.ShimDead, reconcile.Unsure
		}
		m.log.Warn("recover task", "namespace", t.key.ns, "id", t.key.id, "error", err)
		return reconcile.ShimSilent, reconcile.Unsure
	}
	p, err := t.state(ctx, "", bound{m.limit.Load, "timeout shim.load"})
	switch {
	case err == nil:
		t.mu.Lock()
		t.pid = p.Pid
		if p.Status == task.StatusStopped {
			t.setExitLocked(task.Exit{Pid: p.Pid, Status: p.ExitStatus, At: p.ExitedAt})
		}
		t.mu.Unlock()
		return reconcile.ShimAlive, reconcile.Yes
	case errors.Is(err, errShimDead):
		return reconcile.ShimDead, reconcile.Unsure
	case errdefs.IsNotFound(err):
		return reconcile.ShimAlive, reconcile.No
	case errdefs.IsDeadlineExceeded(err):
		return reconcile.ShimSilent, reconcile.Unsure
	}
	return reconcile.ShimAlive, reconcile.Unsure
}

// act does what was decided. The caller holds the gate.
func (t *entry) act(ctx context.Context, action reconcile.Action) {
	m := t.m
	switch action {
	case reconcile.Adopt:
		t.catchUp(ctx)
		t.settle(phaseLive)
		m.spawn(t.watch)
		if l := t.getLink(); l != nil && closed(l.dead) {
			m.spawn(func() { t.bury(m.ctx) })
		}
	case reconcile.Await:
		// Calls reach the shim, and have their own deadlines.
		t.settle(phaseLive)
		m.spawn(t.awaitAnswer)
	case reconcile.Bury:
		t.buryLocked(ctx)
	case reconcile.Discard:
		shim := t.bundle.shim()
		m.endStray(ctx, t, shim)
		t.clear(ctx, false)
	case reconcile.Evict:
		t.evict(ctx)
	case reconcile.Leave:
		if l := t.getLink(); l != nil {
			l.drop(t)
		}
		t.settle(phaseGone)
		m.drop(t, false)
		close(t.gone)
	}
}

// awaitAnswer decides again when a silent shim answers.
func (t *entry) awaitAnswer() {
	ctx := t.m.ctx
	wait := time.Second
	for {
		pause(ctx, wait)
		if ctx.Err() != nil || closed(t.gone) || t.enter(ctx) != nil {
			return
		}
		if t.getPhase() == phaseGone {
			t.exitGate()
			return
		}
		action := reconcile.Decide(t.examine(ctx))
		if action != reconcile.Await {
			t.m.log.Info("recover task", "namespace", t.key.ns, "id", t.key.id, "action", action.String())
			t.act(ctx, action)
			t.exitGate()
			return
		}
		t.exitGate()
		wait = min(2*wait, 30*time.Second)
	}
}

// catchUp publishes the exits that happened while no daemon was there, those
// of execs first. A shim that repeats them later is not heard.
func (t *entry) catchUp(ctx context.Context) {
	t.mu.Lock()
	var pending []string
	for exec, n := range t.notes {
		if exec != "" && !n.Delivered {
			pending = append(pending, exec)
		}
	}
	t.mu.Unlock()
	for _, exec := range pending {
		p, err := t.state(ctx, task.ExecID(exec), bound{t.m.limit.State, "timeout task.state"})
		if err != nil || p.Status != task.StatusStopped || p.Pid == 0 {
			continue // it runs, was never started, or is gone
		}
		t.publishOwn(ctx, event.TopicTaskExit, event.TaskExit{ContainerID: string(t.key.id), ID: exec, Pid: p.Pid, ExitStatus: p.ExitStatus, ExitedAt: p.ExitedAt})
	}
	if closed(t.exited) && !closed(t.told) {
		t.tell(ctx)
	}
}

// evict ends a task that nobody knows, and its shim if that is nobody else's.
func (t *entry) evict(ctx context.Context) {
	m := t.m
	l := t.getLink()
	x, err := l.purge(ctx, t.key)
	if err != nil {
		m.log.Warn("evict task", "namespace", t.key.ns, "id", t.key.id, "error", err)
		t.buryLocked(ctx)
		return
	}
	if x != nil {
		t.setExit(*x)
	} else if t.bundle.has(fileCreating) && t.bundle.has(fileSandbox) {
		// Nobody was given it, and who makes pods tries again by itself. Its end is not made up: it
		// could be taken for that of the task that the caller makes when it tries again.
		t.clear(ctx, false)
		return
	}
	// The shim may still have to tell how the task ended: it was deleted just
	// before the last daemon died, and nobody else knows any more.
	grace := m.limit.Grace
	if !closed(t.exited) {
		grace *= 4
	}
	close(t.listens)
	select {
	case <-t.deleted:
	case <-time.After(grace):
	case <-ctx.Done():
	}
	t.setExit(task.Exit{Status: statusUnknownExit})
	t.finish(context.WithoutCancel(ctx))
}
