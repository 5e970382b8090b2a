package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/shimclient"
)

// The kubelet uses the cgroup driver that it is told: the default handler's if
// that says one, else that of the next, else systemd's where it runs.
//
// contract: 7.1.3
func TestCgroupDriver(t *testing.T) {
	const runc, systemd, cgroupfs = "io.containerd.runc.v2", runtime.CgroupDriver_SYSTEMD, runtime.CgroupDriver_CGROUPFS
	with := func(on bool) cristate.Runtime {
		return cristate.Runtime{Type: runc, Options: map[string]any{"SystemdCgroup": on}}
	}
	kata, mute := cristate.Runtime{Type: "io.containerd.kata.v2", Options: map[string]any{"SystemdCgroup": true}}, cristate.Runtime{Type: runc}
	for name, tt := range map[string]struct {
		all      map[string]cristate.Runtime
		standard string
		with     runtime.CgroupDriver // where systemd runs
		without  runtime.CgroupDriver
	}{
		"built in":         {nil, "runc", cgroupfs, cgroupfs},
		"systemd":          {map[string]cristate.Runtime{"runc": with(true)}, "runc", systemd, systemd},
		"default first":    {map[string]cristate.Runtime{"a": with(true), "runc": with(false)}, "runc", cgroupfs, cgroupfs},
		"default is mute":  {map[string]cristate.Runtime{"crun": mute, "runc": with(true)}, "crun", systemd, systemd},
		"next by name":     {map[string]cristate.Runtime{"z": mute, "b": with(true), "runc": with(false)}, "z", systemd, systemd},
		"others' options":  {map[string]cristate.Runtime{"kata": kata, "runc": with(false)}, "kata", cgroupfs, cgroupfs},
		"nobody says any":  {map[string]cristate.Runtime{"kata": kata, "crun": mute}, "kata", systemd, cgroupfs},
		"only with binary": {map[string]cristate.Runtime{"crun": {Type: runc, Options: map[string]any{"BinaryName": "crun"}}}, "crun", cgroupfs, cgroupfs},
	} {
		c := cristate.DefaultRuntimeConfig()
		if c.Containerd.DefaultRuntimeName = tt.standard; tt.all != nil {
			c.Containerd.Runtimes = tt.all
		}
		if got := cgroupDriver(c, t.TempDir()); got != tt.with {
			t.Errorf("%s, with systemd: %s", name, got)
		}
		if got := cgroupDriver(c, "/no/such/directory"); got != tt.without {
			t.Errorf("%s, without systemd: %s", name, got)
		}
	}
}

// The service manager hears that the daemon is ready when the kubelet's services
// are: what it starts after that meets none that is not initialized.
//
// contract: 2.1.5, 13.13
func TestReadyWithCRI(t *testing.T) {
	s := newServer(t, "")
	config, err := os.ReadFile(s.dir + "/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	// A plugin that never registers is waited for, before the services open.
	config = append(bytes.ReplaceAll(config, []byte("disable = true"), fmt.Appendf(nil,
		"disable_connections = true\nplugin_path = %q\nplugin_registration_timeout = '500ms'\nplugin_request_timeout = '500ms'", s.dir+"/nri")), '\n')
	if err = errors.Join(os.WriteFile(s.dir+"/config.toml", config, 0o600), os.Mkdir(s.dir+"/nri", 0o700), os.WriteFile(s.dir+"/nri/10-mute", []byte("#!/bin/sh\nexec sleep 1000\n"), 0o700)); err != nil {
		t.Fatal(err)
	}
	notifications, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notifications.Close()
	s.env = []string{"NOTIFY_SOCKET=" + s.dir + "/notify"}
	s.start()
	if err := notifications.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := notifications.Read(b); err != nil || string(b[:n]) != "READY=1" {
		t.Fatalf("%q %v", b[:n], err)
	}
	if _, err := runtime.NewRuntimeServiceClient(s.dial()).Status(t.Context(), &runtime.StatusRequest{}); err != nil {
		t.Errorf("it is not ready: %v", err)
	}
	if log := s.log.String(); !strings.Contains(log, "some NRI plugins have not joined in time") {
		t.Errorf("nothing was waited for: %s", log)
	}
}

// What is wrong with Kubernetes' part does not end the daemon, unless somebody
// requires it.
// contract: 2.1.4, 13.43
func TestBrokenCRI(t *testing.T) {
	const broken = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\nbase_runtime_spec = '/no/such/spec.json'\n"
	s := newServer(t, broken)
	s.start()
	if log := s.log.String(); !strings.Contains(log, "Kubernetes' services are not available") || !strings.Contains(log, "/no/such/spec.json") {
		t.Errorf("%s", log)
	}
	s.stop()
	// So it is with a snapshotter that only a proxy plugin would bring, and the file is told from in advance.
	s = newServer(t, "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'stargz'\n[plugins.'io.containerd.cri.v1.images'.runtime_platforms.kata]\nsnapshotter = 'erofs'\n")
	const absent = `there is no snapshotter "stargz" (there are native, overlayfs)`
	if out, err := s.command("config", "check").CombinedOutput(); err == nil || !strings.Contains(string(out), "config.toml:5:1: plugins.'io.containerd.cri.v1.images'.snapshotter has no effect: "+absent) ||
		!strings.Contains(string(out), "config.toml:7:1: plugins.'io.containerd.cri.v1.images'.runtime_platforms.kata.snapshotter has no effect: ") {
		t.Errorf("%v: %s", err, out)
	}
	s.start()
	if log := s.log.String(); !strings.Contains(log, "Kubernetes' services are not available") || !strings.Contains(log, "snapshotter: there is no snapshotter") || !strings.Contains(log, "runtime_platforms.kata.snapshotter") {
		t.Errorf("%s", log)
	}
	s.stop()
	s = newServer(t, "required_plugins = ['io.containerd.grpc.v1.cri']\n"+broken)
	if out, err := s.command().CombinedOutput(); err == nil || !strings.Contains(string(out), "/no/such/spec.json") {
		t.Errorf("%v: %s", err, out)
	}
}

// A runtime that does not tell what it is is not started at every status; one
// that was installed meanwhile is seen at once.
//
// contract: 10.10, 13.30
// promise: P1
func TestRuntimeThatHangs(t *testing.T) {
	calls, err := 0, error(context.DeadlineExceeded)
	h := &criHost{runtimes: map[string]answer{}, attributes: true, log: slog.New(slog.DiscardHandler), ask: func(context.Context, string, typed.Any) (shimclient.RuntimeInfo, error) {
		calls++
		return shimclient.RuntimeInfo{Features: typed.Any{Value: []byte(`{"mountOptions":["rro"]}`)}}, err
	}}
	for range 3 {
		if f := h.features(t.Context(), cristate.Runtime{Type: "io.hangs.v1"}); f.RecursiveReadOnly || calls != 1 {
			t.Errorf("%+v after %d calls", f, calls)
		}
	}
	err = errdefs.ErrNotFound
	for i := range 2 {
		if h.features(t.Context(), cristate.Runtime{Type: "io.absent.v1"}); calls != 2+i {
			t.Errorf("%d calls", calls)
		}
	}
	err = nil
	for range 2 {
		if f := h.features(t.Context(), cristate.Runtime{Type: "io.absent.v1"}); !f.RecursiveReadOnly || calls != 4 {
			t.Errorf("%+v after %d calls", f, calls)
		}
	}
	h.attributes = false // an old kernel: the runtime alone cannot
	if f := h.features(t.Context(), cristate.Runtime{Type: "io.absent.v1"}); f.RecursiveReadOnly {
		t.Errorf("without the kernel: %+v", f)
	}
}

// The parts of readiness are the same list at each start.
func TestChecksAreInOrder(t *testing.T) {
	var names []string
	for _, c := range checks(nil, map[string]snapshot.Store{"e": nil, "c": nil, "a": nil, "d": nil, "b": nil, "f": nil}, nil, "") {
		names = append(names, strings.TrimPrefix(c.Name, "snapshotter "))
	}
	if got := strings.Join(names, " "); got != "store shim a b c d e f" {
		t.Error(got)
	}
}
