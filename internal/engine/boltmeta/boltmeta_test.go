package boltmeta

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/container/containertest"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/content/contenttest"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/image/imagetest"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/lease/leasetest"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/namespace/namespacetest"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/sandbox/sandboxtest"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/snapshot/snapshottest"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/engine/native"
)

// events keeps what was published.
type events struct {
	mu  sync.Mutex // guards all
	all []event.Envelope
}

func (e *events) Publish(_ context.Context, v event.Envelope) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, v)
	return v.Check()
}

// take returns "<namespace> <topic>" of what was published since the last call.
func (e *events) take() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []string
	for _, v := range e.all {
		out = append(out, string(v.Namespace)+" "+v.Topic)
	}
	e.all = nil
	return out
}

// clock is a time that a test moves.
type clock struct {
	mu    sync.Mutex // guards ahead
	ahead time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.ahead)
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead += d
}

// fixture is a store on memory backends.
type fixture struct {
	*DB
	t      *testing.T
	path   string
	opts   Options
	events *events
	clock  *clock
}

func newFixture(t *testing.T, change ...func(*Options)) *fixture {
	t.Helper()
	f := &fixture{t: t, path: filepath.Join(t.TempDir(), "meta.db"), events: &events{}, clock: &clock{}}
	f.opts = Options{
		Content:      memory.NewContent(),
		Snapshotters: map[string]snapshot.Store{"native": memory.NewSnapshots(), "other": memory.NewSnapshots()},
		Events:       f.events,
		OpenTimeout:  time.Second,
		NoSync:       true,
		Logger:       slog.New(slog.DiscardHandler),
		Clock:        f.clock.now,
	}
	for _, c := range change {
		c(&f.opts)
	}
	f.open()
	t.Cleanup(func() {
		f.fsck()
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fixture) open() {
	f.t.Helper()
	db, err := Open(f.path, f.opts)
	if err != nil {
		f.t.Fatal(err)
	}
	f.DB = db
}

// reopen is a restart of the daemon.
func (f *fixture) reopen() {
	f.t.Helper()
	if err := f.Close(); err != nil {
		f.t.Fatal(err)
	}
	f.open()
}

func (f *fixture) fsck() {
	f.t.Helper()
	for _, p := range f.Check(context.Background()) {
		f.t.Errorf("check: %s", p)
	}
}

// in returns a namespace's view.
func (f *fixture) in(ns namespace.ID, under ...lease.ID) view.Records {
	f.t.Helper()
	var l lease.ID
	if len(under) > 0 {
		l = under[0]
	}
	v, err := f.In(ns, l)
	if err != nil {
		f.t.Fatal(err)
	}
	return v
}

func (f *fixture) snapshots(v view.Records) snapshot.Store {
	f.t.Helper()
	s, err := v.Snapshots("native")
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

func is(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// contract: 1.3.16, 1.3.17, 1.3.18, 1.3.19, 4.2.1, 4.2.2, 1.2.5, 1.2.6, 1.2.8, 1.2.11
func TestImages(t *testing.T) {
	imagetest.Run(t, func(t *testing.T) image.Store { return newFixture(t).in("default").Images() })
}

// contract: 1.3.1, 1.3.2, 1.3.3, 1.3.4, 1.3.5, 1.2.2
func TestContainers(t *testing.T) {
	containertest.Run(t, func(t *testing.T) container.Store { return newFixture(t).in("default").Containers() })
}

// contract: 1.3.29
func TestSandboxes(t *testing.T) {
	sandboxtest.Run(t, func(t *testing.T) sandbox.Store { return newFixture(t).in("default").Sandboxes() })
}

// contract: 1.3.23, 1.3.25, 4.2.4
func TestLeases(t *testing.T) {
	leasetest.Run(t, func(t *testing.T) lease.Store { return newFixture(t).in("default").Leases() })
}

// contract: 1.3.28
func TestNamespaces(t *testing.T) {
	namespacetest.Run(t, func(t *testing.T) namespace.Store { return newFixture(t).Namespaces() })
}

// contract: 4.1.6, 4.1.11, 1.3.6
func TestContent(t *testing.T) {
	for name, back := range map[string]func(t *testing.T) content.Store{
		"memory": func(*testing.T) content.Store { return memory.NewContent() },
		"blobdir": func(t *testing.T) content.Store {
			s, err := blobdir.Open(t.TempDir(), blobdir.Options{NoSync: true})
			if err != nil {
				t.Fatal(err)
			}
			return s
		},
	} {
		for _, policy := range []string{SharingShared, SharingIsolated} {
			t.Run(name+" "+policy, func(t *testing.T) {
				contenttest.Run(t, func(t *testing.T) content.Store {
					return newFixture(t, func(o *Options) { o.Content, o.SharingPolicy = back(t), policy }).in("default").Content()
				}, contenttest.Options{})
			})
		}
	}
	t.Run("leased", func(t *testing.T) {
		contenttest.Run(t, func(t *testing.T) content.Store {
			f := newFixture(t)
			must(f.in("default").Leases().Create(t.Context(), lease.Lease{ID: "l"}))(t)
			return f.in("default", "l").Content()
		}, contenttest.Options{})
	})
}

// contract: 3.1.3, 3.1.5, 3.1.8, 1.3.31
func TestSnapshots(t *testing.T) {
	t.Run("memory", func(t *testing.T) {
		snapshottest.Run(t, func(t *testing.T) snapshot.Store {
			f := newFixture(t)
			return f.snapshots(f.in("default"))
		}, snapshottest.Options{Rebase: true})
	})
	t.Run("native", func(t *testing.T) {
		real := os.Geteuid() == 0
		snapshottest.Run(t, func(t *testing.T) snapshot.Store {
			back, err := native.Open(t.TempDir(), native.Config{}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { back.Close() })
			f := newFixture(t, func(o *Options) { o.Snapshotters["native"] = back })
			return f.snapshots(f.in("default"))
		}, snapshottest.Options{RealMounts: real, Usage: real})
	})
}
