// Package shimclient runs tasks in shims: it starts them, speaks ttrpc or gRPC
// to them, passes their events on, and puts daemon and shims together again
// after either has died alone.
//
// It promises that no call waits for ever, that a shim which does not answer
// delays calls for its own containers only, that a Create which fails leaves
// nothing behind, and that each exit is published once.
package shimclient

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/lib/fault"
)

// PluginID is the directory below state and root that bundles and work
// directories are in (contract 5.1.1).
const PluginID = "io.containerd.runtime.v2.task"

// Timeouts bound the calls to shims (contract 2.3.10). Zero is the default.
type Timeouts struct {
	Start    time.Duration // the shim's start command; 30 s
	Load     time.Duration // connecting, and the first answer; 5 s
	Create   time.Duration // the task's creation, mounts included; 2 min
	Call     time.Duration // any call without a limit of its own; 30 s
	State    time.Duration // one task's state in a list; 2 s
	Stats    time.Duration // one task's metrics; 2 s
	Cleanup  time.Duration // the shim's delete command; 5 s
	Shutdown time.Duration // a shim's orderly end; 3 s
	// Grace is how long an event that the shim ought to send is awaited
	// before the daemon publishes it in the shim's place; 500 ms.
	Grace time.Duration
}

func (t Timeouts) defaults() Timeouts {
	set := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	set(&t.Start, 30*time.Second)
	set(&t.Load, 5*time.Second)
	set(&t.Create, 2*time.Minute)
	set(&t.Call, 30*time.Second)
	set(&t.State, 2*time.Second)
	set(&t.Stats, 2*time.Second)
	set(&t.Cleanup, 5*time.Second)
	set(&t.Shutdown, 3*time.Second)
	set(&t.Grace, 500*time.Millisecond)
	return t
}

// Options say where things are. All fields but the first four may be empty.
type Options struct {
	// State and Root are the daemon's directories; bundles and work
	// directories are in <State>/PluginID and <Root>/PluginID.
	State, Root string
	// Records are the containers, sandboxes and snapshots of all namespaces.
	Records view.RecordSource
	// Events takes what happens.
	Events event.Publisher

	// TTRPCAddress and GRPCAddress are the daemon's own sockets, for shims to
	// call; SelfPath is its binary, for those that publish by a command.
	TTRPCAddress, GRPCAddress, SelfPath string
	// SocketDir is where shims put their sockets; they choose if it is empty
	// (contract 5.2.7).
	SocketDir string
	// Version is the daemon's, told to shims.
	Version string
	// Env is added to the environment of shims; later entries win (contract 5.2.2).
	Env []string
	// ShimDirs are searched for shims in this order, before PATH (contract 5.1.2).
	ShimDirs []string
	// Debug starts shims with -debug.
	Debug    bool
	Timeouts Timeouts
	// Faults are the points of a test of crashes: task.bundled, .shim-started,
	// .shim-recorded, .created, .acknowledged, .started, .exec-added,
	// .exit-published, .deleted, .told and .stopped; nil for none.
	Faults *fault.Points
	Logger *slog.Logger
}

// key names a container on the whole host.
type key struct {
	ns namespace.ID
	id container.ID
}

func (k key) String() string { return string(k.ns) + "/" + string(k.id) }

// Manager runs the tasks of all namespaces. It is safe for concurrent use.
type Manager struct {
	opt     Options
	limit   Timeouts
	log     *slog.Logger
	state   string // of bundles
	root    string // of work directories
	started time.Time
	ctx     context.Context
	cancel  context.CancelFunc
	work    sync.WaitGroup // every goroutine that outlives a call

	mu     sync.Mutex // guards what follows; never held over I/O or a call
	closed bool
	tasks  map[key]*entry
	pods   map[key]*pod
	past   map[key]*entry // deleted not long ago: late events of theirs are dropped
	links  map[string]*link
	found  *scan
	old    map[binaryID]bool // shims that do not know the bootstrap parameters
}

// New makes a Manager without tasks. Scan and Recover add those that an
// earlier daemon left.
func New(opt Options) (*Manager, error) {
	if opt.State == "" || opt.Root == "" || opt.Records == nil || opt.Events == nil {
		return nil, fmt.Errorf("task manager: state, root, records and events are required: %w", errdefs.ErrInvalidArgument)
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	m := &Manager{
		opt: opt, limit: opt.Timeouts.defaults(), log: opt.Logger,
		state: filepath.Join(opt.State, PluginID), root: filepath.Join(opt.Root, PluginID),
		started: time.Now(), tasks: map[key]*entry{}, pods: map[key]*pod{}, past: map[key]*entry{}, links: map[string]*link{}, old: map[binaryID]bool{},
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m, nil
}

// In opens the tasks of a namespace. ErrInvalidArgument for a bad name.
func (m *Manager) In(ns namespace.ID) (task.Store, error) {
	rec, err := m.opt.Records.In(ns, "")
	if err != nil {
		return nil, err
	}
	if err := namespace.Check(ns); err != nil {
		return nil, err
	}
	return &store{m: m, ns: ns, rec: rec}, nil
}

// Close lets go of all shims, which keep running (contract 5.4.4), and waits
// for the manager's own work to end, but not longer than ctx.
func (m *Manager) Close(ctx context.Context) error {
	m.mu.Lock()
	m.closed = true
	links := slices.Collect(maps.Values(m.links))
	m.mu.Unlock()
	m.cancel()
	for _, l := range links {
		l.close()
	}
	done := make(chan struct{})
	go func() { m.work.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("close task manager: work still under way: %w", ctx.Err())
	}
}

// spawn runs f, unless the manager has been closed, and says whether it does.
func (m *Manager) spawn(f func()) bool {
	if !m.begin() {
		return false
	}
	go func() {
		defer m.work.Done()
		f()
	}()
	return true
}

// begin counts a piece of work for which Close waits; work.Done ends it. It
// returns false if the manager has been closed.
func (m *Manager) begin() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.work.Add(1)
	return true
}

// reserve enters a new task into the table, or returns ErrAlreadyExists. A
// task of that name whose shim has died is awaited: it is on its way out. So
// is one that is being recovered: it may be what an interrupted create left.
func (m *Manager) reserve(ctx context.Context, k key) (*entry, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*m.limit.Cleanup)
	defer cancel()
	for {
		m.mu.Lock()
		if m.closed {
			m.mu.Unlock()
			return nil, fmt.Errorf("task %s: the daemon is stopping: %w", k, errdefs.ErrUnavailable)
		}
		old := m.tasks[k]
		if old == nil {
			t := newEntry(m, k, phaseCreating)
			m.tasks[k] = t
			m.mu.Unlock()
			return t, nil
		}
		m.mu.Unlock()
		settled, why := old.gone, "it is still being cleaned up after"
		switch old.getPhase() {
		case phaseRecovering:
			settled, why = old.ready, "the daemon is still recovering it"
		case phaseGone:
		default:
			if l := old.getLink(); l == nil || !closed(l.dead) {
				return nil, fmt.Errorf("task %s: %w", k, errdefs.ErrAlreadyExists)
			}
		}
		select {
		case <-settled:
		case <-ctx.Done():
			return nil, fmt.Errorf("task %s: %s: %w", k, why, errdefs.ErrAlreadyExists)
		}
	}
}

// drop takes a task out of the table and remembers it for late events.
func (m *Manager) drop(t *entry, remember bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.tasks[t.key] == t {
		delete(m.tasks, t.key)
	}
	if !remember {
		return
	}
	now := time.Now()
	t.dropped = now
	for k, old := range m.past {
		if now.Sub(old.dropped) > time.Minute {
			delete(m.past, k)
		}
	}
	m.past[t.key] = t
}

// find returns the entry whose events these are, or nil.
func (m *Manager) find(k key) *entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t := m.tasks[k]; t != nil {
		return t
	}
	return m.past[k]
}

// lookup returns a task that exists, waiting for its recovery if that is still
// under way.
func (m *Manager) lookup(ctx context.Context, k key) (*entry, error) {
	m.mu.Lock()
	t := m.tasks[k]
	m.mu.Unlock()
	if t == nil {
		return nil, notFound(k)
	}
	if err := t.await(ctx, m.limit.Load+m.limit.Cleanup); err != nil {
		return nil, err
	}
	if p := t.getPhase(); p == phaseCreating || p == phaseGone {
		return nil, notFound(k)
	}
	return t, nil
}

func notFound(k key) error {
	return fmt.Errorf("task %s: %w", k, errdefs.ErrNotFound)
}
