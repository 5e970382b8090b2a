package shimclient

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// phase is where in its life a task is.
type phase uint8

const (
	phaseCreating   phase = iota // not visible yet
	phaseRecovering              // calls wait
	phaseLive
	phaseGone // its shim died or it was deleted
)

// statusUnknownExit is the exit status of a process whose own nobody knows
// (contract 5.4.3).
const statusUnknownExit = 255

// entry is one task.
type entry struct {
	m      *Manager
	key    key
	bundle bundle

	// gate is held, as its one token, while the task is created, recovered,
	// deleted or buried.
	gate    chan struct{}
	ready   chan struct{} // closed when creation or recovery has ended
	listens chan struct{} // closed when a recovery waits for what the shim has to tell
	exited  chan struct{} // closed when exit is known
	told    chan struct{} // closed when the exit was published
	deleted chan struct{} // closed when the deletion was published
	gone    chan struct{} // closed when the task is out of the table
	dropped time.Time     // when it was; guarded by Manager.mu
	// recovered: the task is of an earlier life of the daemon.
	recovered bool

	// mu guards what follows and keeps events of this task in order: it is
	// held while they are handed to the bus, which does not wait, and while
	// their note is written. Only this task's calls need it.
	mu        sync.Mutex
	phase     phase
	link      *link
	pid       uint32
	exit      task.Exit
	announced bool // its creation was published
	notes     map[string]note
	removed   map[string]bool // execs that are deleted and whose exit the shim has still to tell
	readyOnce sync.Once
}

func newEntry(m *Manager, k key, p phase) *entry {
	return &entry{
		m: m, key: k, bundle: m.bundle(k), phase: p,
		gate: make(chan struct{}, 1), ready: make(chan struct{}), listens: make(chan struct{}), exited: make(chan struct{}),
		told: make(chan struct{}), deleted: make(chan struct{}), gone: make(chan struct{}),
		notes: map[string]note{}, removed: map[string]bool{}, recovered: p == phaseRecovering,
	}
}

func (t *entry) whose() key    { return t.key }
func (t *entry) where() bundle { return t.bundle }

func (t *entry) purge(ctx context.Context, l *link) error {
	_, err := l.purge(ctx, t.key)
	return err
}

func (t *entry) getPhase() phase {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.phase
}

func (t *entry) getLink() *link {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.link
}

func (t *entry) settle(p phase) {
	t.mu.Lock()
	t.phase = p
	t.mu.Unlock()
	t.readyOnce.Do(func() { close(t.ready) })
}

// await waits for a recovery to end.
func (t *entry) await(ctx context.Context, limit time.Duration) error {
	if t.getPhase() != phaseRecovering {
		return nil
	}
	ctx2, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case <-t.ready:
		return nil
	case <-ctx2.Done():
		if ctx.Err() != nil {
			return fmt.Errorf("task %s: the daemon is still recovering it, and the caller's own time is up: %w", t.key, ctx.Err())
		}
		return fmt.Errorf("task %s: the daemon is still recovering it after %s: %w", t.key, limit, context.DeadlineExceeded)
	}
}

// enter takes the gate.
func (t *entry) enter(ctx context.Context) error {
	select {
	case t.gate <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("task %s: another operation on it is under way: %w", t.key, ctx.Err())
	}
}

func (t *entry) exitGate() { <-t.gate }

// call makes a call to the task's shim.
func (t *entry) call(ctx context.Context, method string, b bound, req, resp proto.Message) error {
	l := t.getLink()
	if l == nil {
		return notFound(t.key)
	}
	return l.call(ctx, t.key, method, b, req, resp)
}

func closed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// setExit records how the first process ended. The first to know wins.
func (t *entry) setExit(x task.Exit) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.setExitLocked(x)
}

func (t *entry) setExitLocked(x task.Exit) {
	if closed(t.exited) {
		return
	}
	x.ID = string(t.key.id)
	x.Pid = cmp.Or(x.Pid, t.pid)
	if x.At.IsZero() {
		x.At = time.Now().UTC()
	}
	t.exit = x
	close(t.exited)
}

func (t *entry) getExit() task.Exit {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.exit
}

// publish hands an event of this task to the bus. What was published already
// is dropped, and a deletion is preceded by its exit, so that whoever listens
// sees each once and in order, whether they come from the shim, from a shim
// that repeats what it does not know to have arrived, or from the daemon in a
// dead shim's place (contract 1.6.8, 13.17, 13.18).
// heard says that it comes from the shim, which will not repeat it.
func (t *entry) publish(ctx context.Context, e event.Envelope, heard bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	pid, ends := t.ends(e)
	if ends && heard && t.pid != 0 && pid != 0 && pid != t.pid {
		t.m.log.Debug("the end of an earlier task of this name", "namespace", t.key.ns, "id", t.key.id, "topic", e.Topic, "pid", pid)
		return nil
	}
	switch p := e.Event.(type) {
	case event.TaskCreate:
		t.announced = true
	case event.TaskExit:
		return t.publishExit(ctx, e, p, heard)
	case event.TaskDelete:
		if !ends {
			break // an exec's
		}
		if closed(t.deleted) {
			return nil
		}
		x := event.TaskExit{ContainerID: p.ContainerID, ID: p.ContainerID, Pid: p.Pid, ExitStatus: p.ExitStatus, ExitedAt: p.ExitedAt}
		if err := t.publishExit(ctx, event.Envelope{Namespace: e.Namespace, Topic: event.TopicTaskExit, Event: x}, x, false); err != nil {
			return err
		}
		if err := t.hand(ctx, e); err != nil {
			return err
		}
		close(t.deleted)
		return nil
	}
	return t.m.opt.Events.Publish(ctx, e)
}

// ends says whether an event is the end of the task, and the process id in it.
// A shim that is also others' can tell the end of a task that was taken back,
// which nobody was told of, when there is another one of its name: the process
// ids tell them apart.
func (t *entry) ends(e event.Envelope) (pid uint32, yes bool) {
	switch p := e.Event.(type) {
	case event.TaskExit:
		return p.Pid, p.ID == string(t.key.id)
	case event.TaskDelete:
		return p.Pid, p.ID == "" || p.ID == string(t.key.id)
	}
	return 0, false
}

// hand gives the end of a process to the bus. While the clients of a daemon
// that was away are coming back, they are to hear of it as well.
func (t *entry) hand(ctx context.Context, e event.Envelope) error {
	if r, ok := t.m.opt.Events.(event.Retainer); ok && t.recovered {
		if rest := returnTime - time.Since(t.m.started); rest > 0 {
			return r.PublishFor(ctx, e, rest)
		}
	}
	return t.m.opt.Events.Publish(ctx, e)
}

// returnTime is how long clients have after a start of the daemon to
// subscribe again without missing how the processes ended that ran meanwhile.
const returnTime = 10 * time.Second

// publishExit publishes first and notes that it has afterwards: a daemon that
// is killed in between tells the exit again after its next start, which does
// less harm than never having told it.
func (t *entry) publishExit(ctx context.Context, e event.Envelope, p event.TaskExit, heard bool) error {
	exec := p.ID
	if exec == string(t.key.id) {
		exec = ""
	}
	if n := t.notes[exec]; n.Delivered && (exec == "" || n.Pid == p.Pid) {
		if heard && !n.heard {
			n.heard = true
			t.notes[exec] = n
			if t.removed[exec] {
				t.forgetLocked(exec)
			}
		}
		return nil
	}
	if err := t.hand(ctx, e); err != nil {
		return err
	}
	t.m.opt.Faults.Pass("task.exit-published")
	n := note{Pid: p.Pid, Status: p.ExitStatus, At: p.ExitedAt.UnixNano(), Delivered: true, heard: heard}
	t.notes[exec] = n
	if exec == "" {
		t.setExitLocked(task.Exit{Pid: p.Pid, Status: p.ExitStatus, At: p.ExitedAt})
		close(t.told)
	}
	if heard && t.removed[exec] {
		t.forgetLocked(exec)
	} else if err := t.bundle.remember(exec, n); err != nil {
		// The bundle is going away, or the disk is full: after a restart the
		// exit would be told again.
		t.m.log.Debug("note delivered exit", "namespace", t.key.ns, "id", t.key.id, "exec", exec, "error", err)
	}
	return nil
}

// expectExec notes that an exec exists whose exit is to be delivered. What is
// remembered of an earlier one of the same name stays, for its late events;
// the process ids tell them apart.
func (t *entry) expectExec(exec string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.removed, exec)
	return t.bundle.remember(exec, note{})
}

// forgetExec drops what is remembered of a deleted exec's exit. If the shim has
// still to tell of it, to this daemon or to the next, it is needed until then.
func (t *entry) forgetExec(exec string, started bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if started && !t.notes[exec].heard {
		t.removed[exec] = true
		return
	}
	t.forgetLocked(exec)
}

func (t *entry) forgetLocked(exec string) {
	delete(t.notes, exec)
	delete(t.removed, exec)
	if err := t.bundle.forget(exec); err != nil {
		t.m.log.Debug("forget exec", "namespace", t.key.ns, "id", t.key.id, "exec", exec, "error", err)
	}
}

// tell publishes the exit of the first process in the shim's place.
func (t *entry) tell(ctx context.Context) {
	x := t.getExit()
	p := event.TaskExit{ContainerID: x.ID, ID: x.ID, Pid: x.Pid, ExitStatus: x.Status, ExitedAt: x.At}
	t.publishOwn(ctx, event.TopicTaskExit, p)
}

func (t *entry) publishOwn(ctx context.Context, topic string, p event.Payload) {
	err := t.publish(ctx, event.Envelope{Timestamp: time.Now().UTC(), Namespace: t.key.ns, Topic: topic, Event: p}, false)
	if err != nil {
		t.m.log.Error("publish event", "topic", topic, "namespace", t.key.ns, "id", t.key.id, "error", err)
	}
}

// watch learns when the first process ends, and publishes the exit if the
// shim does not: it may be one that containerd started, whose events go
// elsewhere, or have given up while no daemon was there.
func (t *entry) watch() {
	ctx := t.m.ctx
	for {
		var r taskapi.WaitResponse
		err := t.call(ctx, "Wait", bound{}, &taskapi.WaitRequest{ID: string(t.key.id)}, &r)
		if err == nil {
			t.setExit(task.Exit{Status: r.ExitStatus, At: wire.TimeFromProto(r.ExitedAt)})
			select {
			case <-t.told:
				return
			case <-t.gone:
			case <-ctx.Done():
				return
			case <-time.After(t.m.limit.Grace):
			}
			t.tell(ctx)
			return
		}
		if ctx.Err() != nil || errors.Is(err, errShimDead) || errdefs.IsNotFound(err) || closed(t.gone) {
			return
		}
		t.m.log.Warn("wait for task", "namespace", t.key.ns, "id", t.key.id, "error", err)
		pause(ctx, time.Second)
	}
}

// wait returns how the first process ended.
func (t *entry) wait(ctx context.Context) (task.Exit, error) {
	select {
	case <-t.exited:
		return t.getExit(), nil
	default:
	}
	select {
	case <-t.exited:
		return t.getExit(), nil
	case <-t.gone:
		if closed(t.exited) {
			return t.getExit(), nil
		}
		return task.Exit{}, notFound(t.key)
	case <-ctx.Done():
		return task.Exit{}, fmt.Errorf("task %s: wait: %w", t.key, ctx.Err())
	}
}

// bury cleans up after a shim that died: by the shim's own delete command,
// which ends what is left of the container, then exit and deletion are
// published if they were not yet (contract 5.4.3).
func (t *entry) bury(ctx context.Context) {
	if t.enter(ctx) != nil {
		return // the daemon is stopping; it buries after its next start
	}
	defer t.exitGate()
	t.buryLocked(ctx)
}

// buryLocked is bury for one who holds the gate.
func (t *entry) buryLocked(ctx context.Context) {
	if t.getPhase() == phaseGone {
		return
	}
	ctx = context.WithoutCancel(ctx)
	x := task.Exit{Status: statusUnknownExit}
	if shim := t.bundle.shim(); shim != "" {
		got, err := t.m.deleteShim(ctx, t.key, t.bundle, shim)
		if err != nil {
			t.m.log.Warn("clean up after dead shim", "namespace", t.key.ns, "id", t.key.id, "error", err)
		} else {
			x = got
		}
	}
	t.setExit(x)
	t.finish(ctx)
}

// finish is the end of every task: its exit and deletion are published, its
// bundle goes, and it leaves the table. The caller holds the gate; the exit is known.
func (t *entry) finish(ctx context.Context) {
	x := t.getExit()
	t.publishOwn(ctx, event.TopicTaskDelete, event.TaskDelete{ContainerID: x.ID, Pid: x.Pid, ExitStatus: x.Status, ExitedAt: x.At})
	t.m.opt.Faults.Pass("task.told")
	t.clear(ctx, true)
}

// clear takes the task off its shim, removes the bundle and the entry.
func (t *entry) clear(ctx context.Context, remember bool) {
	l := t.getLink()
	if l != nil && l.leave(t) {
		if closed(l.dead) {
			removeSocket(l.addr.Address)
			l.close()
		} else {
			l.stop(ctx, t.key)
		}
	}
	t.m.opt.Faults.Pass("task.stopped")
	if err := t.bundle.remove(); err != nil {
		// What is left is renamed or is found at the next start.
		t.m.log.Error("remove bundle", "namespace", t.key.ns, "id", t.key.id, "error", err)
	}
	t.settle(phaseGone)
	t.m.drop(t, remember)
	close(t.gone)
}

// Publish takes an event that a shim sent. It implements event.Publisher, to
// be put in front of the bus wherever shims' events come in.
func (m *Manager) Publish(ctx context.Context, e event.Envelope) error {
	if err := e.Check(); err != nil {
		return err
	}
	id, ok := containerOf(e.Event)
	if !ok {
		return m.opt.Events.Publish(ctx, e)
	}
	if !m.begin() {
		return fmt.Errorf("publish %s: the daemon is stopping: %w", e.Topic, errdefs.ErrUnavailable) // the shim keeps it
	}
	defer m.work.Done()
	t := m.find(key{ns: e.Namespace, id: id})
	if t == nil {
		return m.opt.Events.Publish(ctx, e)
	}
	if t.getPhase() == phaseRecovering {
		select {
		case <-t.ready:
		case <-t.listens:
		case <-time.After(m.limit.Load): // then it is told as it comes
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if _, ends := t.ends(e); ends && t.getPhase() == phaseCreating {
		// Whose end it is shows when the shim has said which process it made.
		select {
		case <-t.ready:
		case <-time.After(m.limit.Load):
			return fmt.Errorf("publish %s: task %s is being created: %w", e.Topic, t.key, errdefs.ErrUnavailable) // the shim keeps it
		case <-m.ctx.Done():
			return fmt.Errorf("publish %s: the daemon is stopping: %w", e.Topic, errdefs.ErrUnavailable)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return t.publish(ctx, e, true)
}

func empty() *emptypb.Empty { return &emptypb.Empty{} }
