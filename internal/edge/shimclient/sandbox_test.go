package shimclient

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/sandbox/sandboxtest"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/engine/memory"
)

const runc = "io.containerd.runc.v2"

// podHost is a host with our own shim and a store of sandbox records.
func podHost(t *testing.T) *host {
	t.Helper()
	h := ownHost(t)
	h.rec.sandboxes = memory.NewSandboxes()
	h.start()
	return h
}

func (h *host) pods() sandbox.Controller {
	h.t.Helper()
	c, err := h.m.Sandboxes("test")
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

// pod makes and starts a recorded sandbox.
func (h *host) pod(id string) sandbox.Instance {
	h.t.Helper()
	s := sandbox.Sandbox{ID: id, Sandboxer: "shim", Runtime: container.Runtime{Name: runc}}
	if _, err := h.rec.sandboxes.Create(h.t.Context(), s); err != nil {
		h.t.Fatal(err)
	}
	if err := h.pods().Create(h.t.Context(), s, sandbox.CreateOptions{}); err != nil {
		h.t.Fatal(err)
	}
	i, err := h.pods().Start(h.t.Context(), id)
	if err != nil {
		h.t.Fatal(err)
	}
	return i
}

func (h *host) noPods() {
	h.t.Helper()
	for _, dir := range []string{h.opt.State, h.opt.Root} {
		left, err := filepath.Glob(filepath.Join(dir, SandboxPluginID, "*", "*"))
		if err != nil || len(left) > 0 {
			h.t.Errorf("left behind: %q %v", left, err)
		}
	}
	until(h.t, "the end of all shims", func() bool { return len(h.shims()) == 0 })
	h.clean()
}

// told collects the events of sandboxes.
func (h *host) told() func() []string {
	h.t.Helper()
	sub, err := h.bus.Subscribe(h.t.Context(), `topic~="^/sandboxes/"`)
	if err != nil {
		h.t.Fatal(err)
	}
	var mu sync.Mutex
	var got []string
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			e, err := sub.Next(context.Background())
			if err != nil {
				return
			}
			line := e.Topic
			if x, ok := e.Event.(event.SandboxExit); ok {
				line += fmt.Sprintf(" %s %d", x.SandboxID, x.ExitStatus)
			}
			mu.Lock()
			got = append(got, line)
			mu.Unlock()
		}
	}()
	h.t.Cleanup(func() { sub.Close(); <-done })
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return append([]string(nil), got...)
	}
}

func (h *host) tells(told func() []string, want ...string) {
	h.t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !reflect.DeepEqual(told(), want) {
		if time.Now().After(deadline) {
			h.t.Fatalf("events %q, want %q", told(), want)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// contract: 1.3.30, 1.4.4, 5.6.6, 7.3.25
// promise: P55
func TestSandboxConformance(t *testing.T) {
	var hosts []*host
	sandboxtest.RunController(t, sandboxtest.ControllerOptions{Runtime: container.Runtime{Name: runc}, Open: func(t *testing.T) sandbox.Controller {
		h := podHost(t)
		// Before the host is stopped, and after what the suite has made is gone.
		t.Cleanup(h.noPods)
		hosts = append(hosts, h)
		return h.pods()
	}})
	if len(hosts) == 0 {
		t.Error("nothing was run")
	}
}

// A pod without a process holds its shim; its containers join it, and come and
// go without it.
// contract: 1.4.4, 5.2.10, 5.6.6
// promise: P55
func TestSandboxHoldsContainers(t *testing.T) {
	h := podHost(t)
	told := h.told()
	i := h.pod("p")
	if i.Address == "" || i.Version != 3 || i.Pid != 0 {
		t.Errorf("started %+v", i)
	}
	shims := h.shims()
	for _, how := range []task.CreateOptions{{}, {APIAddress: i.Address, APIVersion: i.Version}} {
		spec := h.spec("c", []string{"/bin/sleep", "1000"})
		h.rec.put(container.Container{ID: "c", SandboxID: "p", Runtime: container.Runtime{Name: runc}, Spec: jsonAny(t, urlSpec, spec)})
		if _, err := h.store.Create(t.Context(), "c", how); err != nil {
			t.Fatal(err)
		}
		if _, err := h.store.Start(t.Context(), "c", ""); err != nil {
			t.Fatal(err)
		}
		if now := h.shims(); !reflect.DeepEqual(now, shims) || len(now) != 1 {
			t.Errorf("shims %v, before %v", now, shims)
		}
		if how.APIAddress == "" {
			h.end("c")
			continue
		}
	}
	if st, err := h.pods().Status(t.Context(), "p", false); err != nil || st.State != sandbox.StateReady {
		t.Errorf("%+v %v", st, err)
	}
	// What is left in it ends with it.
	if err := h.pods().Stop(t.Context(), "p", 0); err != nil {
		t.Error(err)
	}
	if x, err := h.store.Wait(t.Context(), "c", ""); err != nil || x.Status != 137 {
		t.Errorf("%+v %v", x, err)
	}
	if _, err := h.store.Delete(t.Context(), "c"); err != nil {
		t.Error(err)
	}
	if err := h.pods().Shutdown(t.Context(), "p"); err != nil {
		t.Error(err)
	}
	h.tells(told, "/sandboxes/create", "/sandboxes/start", "/sandboxes/exit p 0")
	h.noPods()
}

// contract: 5.6.6, 5.4.4
func TestSandboxRecovery(t *testing.T) {
	h := podHost(t)
	told := h.told()
	before := h.pod("lives")
	h.pod("dies")
	h.pod("ended")
	h.pod("unknown")
	if err := h.pods().Stop(t.Context(), "ended", 0); err != nil {
		t.Fatal(err)
	}
	st, err := h.pods().Status(t.Context(), "ended", false)
	if err != nil {
		t.Fatal(err)
	}
	h.m.mu.Lock()
	victim := h.m.pods[key{"test", "dies"}].getLink().shimPid()
	h.m.mu.Unlock()
	h.stop()
	if err := unix.Kill(victim, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "the shim's death", func() bool { return dead(victim) })
	if err := h.rec.sandboxes.Delete(t.Context(), "unknown"); err != nil {
		t.Fatal(err)
	}
	// What a daemon leaves that dies in a create, and in a removal.
	half := filepath.Join(h.opt.State, SandboxPluginID, "test", "half")
	for _, dir := range []string{half, filepath.Join(h.opt.State, SandboxPluginID, "test", ".removed"), filepath.Join(h.opt.Root, SandboxPluginID, "test", "orphan")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(half, fileCreating), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h.start()
	h.recover()
	got := h.pods()
	for id, want := range map[string]string{"lives": sandbox.StateReady, "dies": sandbox.StateNotReady, "ended": sandbox.StateNotReady} {
		if st, err := got.Status(t.Context(), id, false); err != nil || st.State != want || time.Since(st.CreatedAt).Abs() > time.Minute {
			t.Errorf("%s: %+v %v", id, st, err)
		}
	}
	if s, err := got.Status(t.Context(), "lives", false); err != nil || s.Address != before.Address || s.Version != before.Version {
		t.Errorf("%+v, before %+v, %v", s, before, err)
	}
	if _, err := got.Start(t.Context(), "lives"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start again: %v", err)
	}
	if x, err := got.Wait(t.Context(), "dies"); err != nil || x.Status != 255 {
		t.Errorf("%+v %v", x, err)
	}
	if x, err := got.Wait(t.Context(), "ended"); err != nil || x.Status != 0 || !x.At.Equal(st.ExitedAt) {
		t.Errorf("%+v, want %v, %v", x, st.ExitedAt, err)
	}
	for _, id := range []string{"unknown", "half"} {
		if _, err := got.Status(t.Context(), id, false); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", id, err)
		}
	}
	exits := map[string]int{}
	until(t, "the exits", func() bool {
		clear(exits)
		for _, line := range told() {
			exits[line]++
		}
		return exits["/sandboxes/exit dies 255"] == 1 && exits["/sandboxes/exit unknown 0"] == 1
	})
	if exits["/sandboxes/exit ended 0"] != 1 || exits["/sandboxes/exit lives 0"] != 0 {
		t.Errorf("%v", exits)
	}
	if err := got.Stop(t.Context(), "lives", 0); err != nil {
		t.Error(err)
	}
	for _, id := range []string{"lives", "dies", "ended"} {
		if err := got.Shutdown(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	h.noPods()
}

// One shim that dies or hangs ends its own sandbox, in time, and no other.
// contract: 5.6.6
func TestSandboxShimIsSick(t *testing.T) {
	h := ownHost(t)
	h.rec.sandboxes = memory.NewSandboxes()
	h.opt.Timeouts = Timeouts{Call: 500 * time.Millisecond, State: 300 * time.Millisecond, Cleanup: time.Second, Shutdown: 300 * time.Millisecond}
	h.start()
	told := h.told()
	pids := map[string]int{}
	for _, id := range []string{"killed", "stopped", "well"} {
		h.pod(id)
		h.m.mu.Lock()
		pids[id] = h.m.pods[key{"test", container.ID(id)}].getLink().shimPid()
		h.m.mu.Unlock()
	}
	if err := unix.Kill(pids["killed"], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if x, err := h.pods().Wait(t.Context(), "killed"); err != nil || x.Status != 255 {
		t.Errorf("%+v %v", x, err)
	}
	if st, err := h.pods().Status(t.Context(), "killed", false); err != nil || st.State != sandbox.StateNotReady || st.ExitedAt.IsZero() {
		t.Errorf("%+v %v", st, err)
	}
	if err := unix.Kill(pids["stopped"], unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	until(t, "the shim to be stopped", func() bool { return strings.HasPrefix(doing(pids["stopped"]), "stopped") })
	if _, err := h.pods().Status(t.Context(), "stopped", false); !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("%v", err)
	}
	if st, err := h.pods().Status(t.Context(), "well", false); err != nil || st.State != sandbox.StateReady {
		t.Errorf("%+v %v", st, err)
	}
	if err := h.pods().Stop(t.Context(), "stopped", 0); err != nil {
		t.Errorf("stop by force: %v", err)
	}
	for _, id := range []string{"killed", "stopped", "well"} {
		if err := h.pods().Shutdown(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	until(t, "all exits", func() bool {
		n := 0
		for _, line := range told() {
			if line == "/sandboxes/exit killed 255" || line == "/sandboxes/exit stopped 255" || line == "/sandboxes/exit well 0" {
				n++
			}
		}
		return n == 3
	})
	h.noPods()
}

// A shim without the Sandbox API, a runtime that is not there, and a spec that
// is none leave nothing behind.
func TestSandboxCreateUndone(t *testing.T) {
	h := realHost(t)
	h.start()
	told := h.told()
	for name, c := range map[string]struct {
		s    sandbox.Sandbox
		want func(error) bool
	}{
		"shim of containerd 1.6": {sandbox.Sandbox{ID: "p", Runtime: container.Runtime{Name: runc}}, errdefs.IsNotImplemented},
		"no such runtime":        {sandbox.Sandbox{ID: "p", Runtime: container.Runtime{Name: "io.containerd.nosuch.v1"}}, errdefs.IsNotFound},
		"no runtime":             {sandbox.Sandbox{ID: "p"}, errdefs.IsInvalidArgument},
		"bad spec":               {sandbox.Sandbox{ID: "p", Runtime: container.Runtime{Name: runc}, Spec: typed.Any{URL: "x", Value: []byte("{")}}, errdefs.IsInvalidArgument},
	} {
		if err := h.pods().Create(t.Context(), c.s, sandbox.CreateOptions{}); !c.want(err) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := h.pods().Status(t.Context(), "p", false); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := told(); len(got) > 0 {
		t.Errorf("%q", got)
	}
	h.noPods()
}
