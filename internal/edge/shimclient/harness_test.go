package shimclient

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire/eventttrpc"
	"github.com/gantryd/gantry/internal/engine/memory"
)

// records are containers in a map, the same in every namespace.
type records struct {
	view.Records
	container.Store
	mu        sync.Mutex
	all       map[container.ID]container.Container
	snapshots map[string]snapshot.Store
	sandboxes sandbox.Store // nil: not known
	fail      error
}

func (r *records) In(ns namespace.ID, _ lease.ID) (view.Records, error) {
	return r, namespace.Check(ns)
}
func (r *records) Namespace() namespace.ID     { return "test" }
func (r *records) Containers() container.Store { return r }
func (r *records) Sandboxes() sandbox.Store    { return r.sandboxes }
func (r *records) Snapshots(name string) (snapshot.Store, error) {
	if s := r.snapshots[name]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("snapshotter not loaded: %s: %w", name, errdefs.ErrInvalidArgument)
}

func (r *records) Get(_ context.Context, id container.ID) (container.Container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return container.Container{}, r.fail
	}
	c, ok := r.all[id]
	if !ok {
		return c, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

func (r *records) put(c container.Container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all[c.ID] = c
}

func (r *records) drop(id container.ID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.all, id)
}

// host is a place in which managers live one after another.
type host struct {
	t       *testing.T
	dir     string
	rec     *records
	bus     *memory.Bus
	opt     Options
	m       *Manager
	store   task.Store
	log     *logBuffer
	stopSrv func()
}

// logBuffer collects a manager's log.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newHost(t *testing.T, shimDirs ...string) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	h := &host{t: t, dir: dir, rec: &records{all: map[container.ID]container.Container{}}, bus: memory.NewBus(), log: &logBuffer{}}
	h.opt = Options{
		State: filepath.Join(dir, "state"), Root: filepath.Join(dir, "root"), Records: h.rec, Events: h.bus,
		TTRPCAddress: filepath.Join(dir, "e.sock.ttrpc"), GRPCAddress: filepath.Join(dir, "e.sock"), SelfPath: "/bin/false",
		Version: "test", ShimDirs: shimDirs,
		Logger: slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("manager's log:\n%s", h.log)
		}
		if s := h.log.String(); strings.Contains(s, "remove bundle") {
			t.Errorf("a bundle could not be removed")
		}
	})
	return h
}

// start makes a manager and serves its event socket.
func (h *host) start() {
	h.t.Helper()
	m, err := New(h.opt)
	if err != nil {
		h.t.Fatal(err)
	}
	h.m = m
	srv, err := eventttrpc.NewServer(m, h.opt.Logger)
	if err != nil {
		h.t.Fatal(err)
	}
	os.Remove(h.opt.TTRPCAddress)
	l, err := net.Listen("unix", h.opt.TTRPCAddress)
	if err != nil {
		h.t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		srv.Serve(context.Background(), l) // until Close
	}()
	var once sync.Once
	h.stopSrv = func() { once.Do(func() { srv.Close(); <-served }) }
	if h.store, err = m.In("test"); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { h.stop() })
}

// stop ends the manager the way a daemon that dies does: shims go on.
func (h *host) stop() {
	h.t.Helper()
	h.stopSrv()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := h.m.Close(ctx); err != nil {
		h.t.Error(err)
	}
}

func (h *host) recover() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 30*time.Second)
	defer cancel()
	if err := h.m.Recover(ctx); err != nil {
		h.t.Fatal(err)
	}
}

// clean fails the test if a bundle, work directory, mount or cgroup is left.
func (h *host) clean() {
	h.t.Helper()
	for _, dir := range []string{h.opt.State, h.opt.Root} {
		found, err := filepath.Glob(filepath.Join(dir, PluginID, "*", "*"))
		if err != nil {
			h.t.Fatal(err)
		}
		hidden, _ := filepath.Glob(filepath.Join(dir, PluginID, "*", ".*")) // pattern is good
		if left := append(found, hidden...); len(left) > 0 {
			h.t.Errorf("left behind: %q", left)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		h.t.Fatal(err)
	}
	if strings.Contains(string(mounts), h.dir+"/") {
		h.t.Errorf("mounts left below %s", h.dir)
	}
	if pids := h.shims(); len(pids) > 0 {
		h.t.Errorf("shims left: %v", pids)
	}
}

// shims are the processes that were told this host's address.
func (h *host) shims() []int {
	var out []int
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline") // pattern is good
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err != nil || !strings.Contains(string(b), h.opt.GRPCAddress) {
			continue
		}
		var pid int
		fmt.Sscanf(p, "/proc/%d/", &pid)
		if pid != os.Getpid() && !dead(pid) {
			out = append(out, pid)
		}
	}
	return out
}

func dead(pid int) bool {
	s := doing(pid)
	return s == "gone" || strings.HasPrefix(s, "dead")
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("timeout: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// collect subscribes to the tasks' events.
func (h *host) collect() *collector {
	h.t.Helper()
	sub, err := h.bus.Subscribe(h.t.Context(), `topic~="^/tasks/"`)
	if err != nil {
		h.t.Fatal(err)
	}
	c := &collector{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			e, err := sub.Next(context.Background())
			if err != nil {
				return // closed
			}
			c.mu.Lock()
			c.got = append(c.got, e)
			c.mu.Unlock()
		}
	}()
	h.t.Cleanup(func() { sub.Close(); <-done })
	return c
}

type collector struct {
	mu  sync.Mutex
	got []event.Envelope
}

// of lists the exits and deletions of a container, as "exit ID STATUS" and
// "delete STATUS".
func (c *collector) of(id string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, e := range c.got {
		switch p := e.Event.(type) {
		case event.TaskExit:
			if p.ContainerID == id {
				out = append(out, fmt.Sprintf("exit %s %d", p.ID, p.ExitStatus))
			}
		case event.TaskDelete:
			if p.ContainerID == id {
				out = append(out, fmt.Sprintf("delete %d", p.ExitStatus))
			}
		}
	}
	return out
}

func jsonAny(t *testing.T, url string, v any) typed.Any {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return typed.Any{URL: url, Value: b}
}
