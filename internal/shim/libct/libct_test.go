//go:build linux

package libct

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantryd/gantry/internal/shim/driver"
)

func ptr[T any](v T) *T { return &v }

// Only what is named changes, and the running container's values are not
// touched before they are applied.
// contract: 5.3.7
func TestUpdate(t *testing.T) {
	before := cgroups.Resources{
		Memory: 100, MemorySwap: 200, CpuShares: 512, CpuQuota: 1000, CpuPeriod: 10000, CpusetCpus: "0-1", PidsLimit: ptr(int64(5)),
		BlkioWeight: 10, BlkioThrottleReadBpsDevice: []*cgroups.ThrottleDevice{{Rate: 1}},
	}
	for name, c := range map[string]struct {
		r    specs.LinuxResources
		want func(*cgroups.Resources)
	}{
		"nothing":         {specs.LinuxResources{}, func(*cgroups.Resources) {}},
		"memory":          {specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(300)), Swap: ptr(int64(400))}}, func(r *cgroups.Resources) { r.Memory, r.MemorySwap = 300, 400 }},
		"no memory limit": {specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1))}}, func(r *cgroups.Resources) { r.Memory, r.MemorySwap = -1, -1 }},
		"quota":           {specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(-1))}}, func(r *cgroups.Resources) { r.CpuQuota = -1 }},
		"cpus":            {specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "1"}}, func(r *cgroups.Resources) { r.CpusetCpus = "1" }},
		"pids":            {specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(9))}}, func(r *cgroups.Resources) { r.PidsLimit = ptr(int64(9)) }},
		"throttle": {specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{{Rate: 7}}}},
			func(r *cgroups.Resources) { r.BlkioThrottleReadBpsDevice = []*cgroups.ThrottleDevice{{Rate: 7}} }},
		"unified": {specs.LinuxResources{Unified: map[string]string{"memory.high": "1"}}, func(r *cgroups.Resources) { r.Unified = map[string]string{"memory.high": "1"} }},
	} {
		running := before
		config := configs.Config{Cgroups: &cgroups.Cgroup{Resources: &running}}
		shared := config.Cgroups
		if err := update(&config, &c.r); err != nil {
			t.Fatal(err)
		}
		want := before
		c.want(&want)
		want.SkipDevices = true
		if diff := cmp.Diff(&want, config.Cgroups.Resources); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if diff := cmp.Diff(&before, shared.Resources); diff != "" {
			t.Errorf("%s: the running container's: %s", name, diff)
		}
	}
}

// contract: 5.3.1
func TestNewProcess(t *testing.T) {
	for name, p := range map[string]*specs.Process{
		"none": nil, "no arguments": {Cwd: "/"}, "no directory": {Args: []string{"x"}}, "relative": {Args: []string{"x"}, Cwd: "a"},
		"limit": {Args: []string{"x"}, Cwd: "/", Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOPE"}}},
	} {
		if _, err := newProcess(p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p, err := newProcess(&specs.Process{
		Args: []string{"a"}, Cwd: "/", User: specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}}, ConsoleSize: &specs.Box{Width: 80, Height: 25},
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 10, Soft: 5}}, Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}},
	})
	if err != nil || p.UID != 1 || p.GID != 2 || p.AdditionalGroups[0] != 3 || p.ConsoleWidth != 80 || p.ConsoleHeight != 25 ||
		p.Rlimits[0] != (configs.Rlimit{Type: 7, Hard: 10, Soft: 5}) || p.Capabilities.Bounding[0] != "CAP_KILL" {
		t.Errorf("%+v %v", p, err)
	}
}

// Paths of a spec are relative to the bundle, wherever this process is.
func TestConvert(t *testing.T) {
	spec := &specs.Spec{Version: "1.0.2", Root: &specs.Root{Path: "rootfs"}, Linux: &specs.Linux{},
		Mounts: []specs.Mount{{Destination: "/a", Type: "bind", Source: "data", Options: []string{"bind"}}, {Destination: "/b", Type: "tmpfs", Source: "tmpfs"}}}
	config, err := convert(driver.Create{ID: "c1", Bundle: "/bundle", Spec: spec})
	if err != nil {
		t.Fatal(err)
	}
	if config.Rootfs != "/bundle/rootfs" || config.Mounts[0].Source != "/bundle/data" || config.Mounts[1].Source != "tmpfs" {
		t.Errorf("%s %s %s", config.Rootfs, config.Mounts[0].Source, config.Mounts[1].Source)
	}
	found := false
	for _, l := range config.Labels {
		found = found || l == "bundle=/bundle"
	}
	if !found {
		t.Errorf("labels %q", config.Labels)
	}
	if spec.Root.Path != "rootfs" || spec.Mounts[0].Source != "data" {
		t.Error("the spec was changed")
	}
	if _, err := convert(driver.Create{ID: "c1", Bundle: "/bundle", Spec: &specs.Spec{}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no root: %v", err)
	}
}

// What is started late is killed late; that libcontainer panics when there is
// nothing to kill yet does not matter.
func TestBounded(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	killed := make(chan struct{})
	calls := 0
	err := bounded(ctx, func() error { <-killed; return errors.New("signal: killed") }, func() {
		if calls++; calls < 3 {
			panic("no process yet")
		}
		close(killed)
	})
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "signal: killed") || calls != 3 {
		t.Errorf("%d kills: %v", calls, err)
	}
}

// What is born after a kill that came too early is killed all the same.
func TestBoundedBirth(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var lives atomic.Bool
	early := make(chan struct{})
	once := sync.OnceFunc(func() { close(early) })
	err := bounded(ctx, func() error { <-early; lives.Store(true); return nil }, func() {
		lives.Store(false)
		once()
	})
	if !errors.Is(err, context.Canceled) || lives.Load() {
		t.Errorf("it lives: %t, and the error is %v", lives.Load(), err)
	}
}

// The library lifts the shim's limit of locked memory; processes are given the
// one that there was, unless they ask for another.
func TestKeepMemlock(t *testing.T) {
	was := &configs.Rlimit{Type: 8, Hard: 20, Soft: 10}
	var p libcontainer.Process
	keepMemlock(&p, was)
	if len(p.Rlimits) != 1 || p.Rlimits[0] != *was {
		t.Errorf("%v", p.Rlimits)
	}
	p.Rlimits[0].Soft = 5
	keepMemlock(&p, was)
	if len(p.Rlimits) != 1 || p.Rlimits[0].Soft != 5 || was.Soft != 10 {
		t.Errorf("%v", p.Rlimits)
	}
	if l := Inherited().memlock; l == nil || l.Type != 8 {
		t.Errorf("%v", l)
	}
}
