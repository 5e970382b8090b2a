//go:build linux

package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/test/critest"
)

// contract: 7.1.1, 7.1.2, 7.1.3
func TestRuntimeInfo(t *testing.T) {
	n := node(t)
	v, err := n.RT.Version(critest.Context(t), &runtime.VersionRequest{})
	if err != nil || v.RuntimeName != "containerd" || v.RuntimeApiVersion != "v1" || v.Version != "0.1.0" || v.RuntimeVersion == "" {
		t.Errorf("%v %v", v, err)
	}
	var st *runtime.StatusResponse
	critest.Eventually(t, "network", func() bool {
		st, err = n.RT.Status(critest.Context(t), &runtime.StatusRequest{Verbose: true})
		return err == nil && st.Status.Conditions[1].Status
	})
	for i, name := range []string{"RuntimeReady", "NetworkReady", "ContainerdHasNoDeprecationWarnings"} {
		if c := st.Status.Conditions[i]; c.Type != name || !c.Status {
			t.Errorf("%v", c)
		}
	}
	var names []string
	for _, h := range st.RuntimeHandlers {
		names = append(names, h.Name)
	}
	if strings.Join(names, ",") != ",crun,pauseless,runc" || !st.RuntimeHandlers[0].Features.RecursiveReadOnlyMounts || !st.Features.SupplementalGroupsPolicy || !st.Features.UserNamespacesHostNetwork || !st.Features.MountOptions {
		t.Errorf("handlers %q: %v", names, st)
	}
	for _, key := range []string{"config", "golang", "cniconfig", "lastCNILoadStatus"} {
		if st.Info[key] == "" {
			t.Errorf("no %s in %v", key, st.Info)
		}
	}
	var config struct {
		StateDir   string
		Containerd struct {
			Runtimes map[string]struct{ RuntimeType string }
		}
	}
	if err := json.Unmarshal([]byte(st.Info["config"]), &config); err != nil || filepath.Dir(config.StateDir) != n.Dir+"/state" || config.Containerd.Runtimes["crun"].RuntimeType != "io.containerd.runc.v2" {
		t.Errorf("config %s: %v", st.Info["config"], err)
	}
	if !strings.Contains(st.Info["cniconfig"], n.Bridge) || st.Info["lastCNILoadStatus"] != "OK" {
		t.Errorf("%s %s", st.Info["cniconfig"], st.Info["lastCNILoadStatus"])
	}
	if r, err := n.RT.Status(critest.Context(t), &runtime.StatusRequest{}); err != nil || len(r.Info) != 0 {
		t.Errorf("not verbose: %v %v", r, err)
	}
	c, err := n.RT.RuntimeConfig(critest.Context(t), &runtime.RuntimeConfigRequest{})
	if err != nil || c.Linux.CgroupDriver != runtime.CgroupDriver_CGROUPFS {
		t.Errorf("%v %v", c, err)
	}
}

// contract: 7.1.5, 7.1.11, 7.1.12, 7.1.15
func TestHello(t *testing.T) {
	n := node(t)
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			p := n.Pod(t, handler)
			if out := p.Output("echo hello $HOSTNAME; hostname"); out != "hello\nhost-of-pod\n" && out != "hello host-of-pod\nhost-of-pod\n" {
				t.Errorf("%q", out)
			}
		})
	}
}

// k8s is the node's namespace of Kubernetes, as any other client sees it.
func k8s(t *testing.T, n *critest.Node) view.View {
	t.Helper()
	c, err := client.Dial(n.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	v, err := c.In("k8s.io", "")
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// podInfo is what a verbose status tells.
type podInfo struct {
	Pid                uint32
	ProcessStatus      string
	NetNamespaceClosed bool
	RuntimeHandler     string
	RuntimeType        string
	Sandboxer          string
	Config             *runtime.PodSandboxConfig
	RuntimeSpec        json.RawMessage
	CNIResult          json.RawMessage
	SandboxMetadata    struct{ ID, Name, NetNSPath string }
}

func infoOf(t *testing.T, p *critest.Pod) podInfo {
	t.Helper()
	var info podInfo
	text := p.Status().Info["info"]
	if err := json.Unmarshal([]byte(text), &info); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return info
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

// A pod from its beginning to its end, as the status, the records, the files
// and the kernel show it.
//
// contract: 7.1.5, 7.1.6, 7.1.7, 7.1.8, 7.1.9, 7.3.29, 13.25, 13.26
func TestPodLifeCycle(t *testing.T) {
	n := node(t)
	v := k8s(t, n)
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			ctx := critest.Context(t)
			before := time.Now().UnixNano()
			p := n.Pod(t, handler, func(c *runtime.PodSandboxConfig) {
				c.Annotations = map[string]string{"a": "b"}
				c.Metadata.Attempt = 3
			})
			st := p.Status()
			s := st.Status
			if s.Id != p.ID || s.State != runtime.PodSandboxState_SANDBOX_READY || s.CreatedAt < before || s.CreatedAt > time.Now().UnixNano() || s.RuntimeHandler != handler ||
				s.Metadata.Name != p.Config.Metadata.Name || s.Metadata.Uid != p.Config.Metadata.Uid || s.Metadata.Namespace != "default" || s.Metadata.Attempt != 3 ||
				s.Labels["name"] != p.Config.Metadata.Name || s.Annotations["a"] != "b" || s.Network.Ip == "" || len(s.Network.AdditionalIps) != 1 ||
				s.Linux.Namespaces.Options.Pid != runtime.NamespaceMode_CONTAINER || st.Timestamp != 0 || len(st.ContainersStatuses) != 0 {
				t.Errorf("%v", st)
			}
			info := infoOf(t, p)
			if info.SandboxMetadata.ID != p.ID || info.RuntimeType != "io.containerd.runc.v2" || info.RuntimeHandler != handler || info.ProcessStatus != "running" || info.NetNamespaceClosed ||
				info.Config.GetMetadata().GetName() != p.Config.Metadata.Name || !strings.Contains(string(info.CNIResult), s.Network.Ip) {
				t.Errorf("%s", st.Info["info"])
			}
			if want := fmt.Sprintf("%s_default_%s_3", p.Config.Metadata.Name, p.Config.Metadata.Uid); info.SandboxMetadata.Name != want {
				t.Errorf("reserved name %q, want %q", info.SandboxMetadata.Name, want)
			}

			// What others see of it.
			leases, err := v.Leases().List(ctx, "id=="+p.ID)
			if err != nil || len(leases) != 1 {
				t.Errorf("leases %v: %v", leases, err)
			}
			rec, err := v.Sandboxes().Get(ctx, p.ID)
			if err != nil {
				t.Fatal(err)
			}
			meta := rec.Extensions["metadata"]
			if rec.Labels["io.cri-containerd.kind"] != "sandbox" || meta.URL != "github.com/containerd/cri/pkg/store/sandbox/Metadata" || !strings.Contains(string(meta.Value), `"Version":"v1"`) || !strings.Contains(string(meta.Value), p.ID) {
				t.Errorf("%v", rec)
			}
			root, state := n.Dir+"/root/io.containerd.grpc.v1.cri/sandboxes/"+p.ID, n.Dir+"/state/io.containerd.grpc.v1.cri/sandboxes/"+p.ID
			for _, file := range []string{root + "/hostname", root + "/hosts", root + "/resolv.conf", state, info.SandboxMetadata.NetNSPath} {
				if !exists(file) {
					t.Errorf("no %s", file)
				}
			}
			c := p.Run("sleep 1000")
			if got := p.Status().ContainersStatuses; len(got) != 1 || got[0].Id != c.ID || got[0].State != runtime.ContainerState_CONTAINER_RUNNING {
				t.Errorf("%v", got)
			}
			crec, err := v.Containers().Get(ctx, container.ID(c.ID))
			if err != nil || string(crec.SandboxID) != p.ID || crec.Extensions["io.cri-containerd.container.metadata"].URL != "github.com/containerd/cri/pkg/store/container/Metadata" {
				t.Errorf("%v %v", crec, err)
			}
			var status struct {
				Version  string
				Pid      int
				ExitCode int
			}
			if b, err := os.ReadFile(n.Dir + "/root/io.containerd.grpc.v1.cri/containers/" + c.ID + "/status"); err != nil || json.Unmarshal(b, &status) != nil || status.Version != "v1" || !exists(fmt.Sprintf("/proc/%d", status.Pid)) {
				t.Errorf("status file: %s %v", b, err)
			}

			// The end, twice, and its containers with it.
			for range 2 {
				begin := time.Now()
				p.Stop()
				if d := time.Since(begin); d > critest.Slow(10*time.Second) {
					t.Errorf("stop took %v: containers have no grace", d)
				}
				if s := p.Status().Status; s.State != runtime.PodSandboxState_SANDBOX_NOTREADY || s.Network.Ip != "" || len(s.Network.AdditionalIps) != 0 {
					t.Errorf("%v", s)
				}
			}
			if cs := c.Status(); cs.State != runtime.ContainerState_CONTAINER_EXITED || cs.ExitCode != 137 {
				t.Errorf("%v", cs)
			}
			if info := infoOf(t, p); !info.NetNamespaceClosed || info.Pid != 0 {
				t.Errorf("%+v", info)
			}
			if exists(info.SandboxMetadata.NetNSPath) || slices.Contains(n.Addresses(), s.Network.Ip) {
				t.Error("its network is there still")
			}
			if _, err := p.TryCreate("true"); err == nil {
				t.Error("a container was made in a stopped pod")
			}
			p.Remove()
			p.Remove()
			if _, err := n.RT.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.ID}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
				t.Errorf("%v", err)
			}
			if _, err := n.RT.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.ID}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
				t.Errorf("%v", err)
			}
			if _, err := v.Sandboxes().Get(ctx, p.ID); !errdefs.IsNotFound(err) {
				t.Errorf("record: %v", err)
			}
			if leases, err := v.Leases().List(ctx, "id=="+p.ID); err != nil || len(leases) != 0 {
				t.Errorf("leases %v: %v", leases, err)
			}
			if exists(root) || exists(state) {
				t.Error("its directories are there still")
			}
		})
	}
}

// contract: 7.1.10
func TestPodResources(t *testing.T) {
	n := node(t)
	v := k8s(t, n)
	update := func(id string) error {
		_, err := n.RT.UpdatePodSandboxResources(critest.Context(t), &runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: id,
			Overhead: &runtime.LinuxContainerResources{CpuShares: 77}, Resources: &runtime.LinuxContainerResources{MemoryLimitInBytes: 123 << 20}})
		return err
	}
	for _, handler := range n.Handlers {
		p := n.Pod(t, handler)
		if err := update(p.ID); err != nil {
			t.Errorf("%s: %v", handler, err)
		}
		rec, err := v.Sandboxes().Get(critest.Context(t), p.ID)
		var got struct {
			Overhead, Resources *runtime.LinuxContainerResources
		}
		if err != nil || json.Unmarshal(rec.Extensions["io.containerd.cri.v1/UpdatedResources"].Value, &got) != nil || got.Overhead.GetCpuShares() != 77 || got.Resources.GetMemoryLimitInBytes() != 123<<20 {
			t.Errorf("%s: %v %v", handler, rec, err)
		}
		p.Stop()
		if err := update(p.ID); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
			t.Errorf("%s: a stopped pod: %v", handler, err)
		}
	}
	if err := update("ffff0000"); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("%v", err)
	}
}

// What was never there is stopped and removed; what is asked about it is not found.
//
// contract: 13.26, 7.1.6, 7.1.7, 7.1.13, 7.1.14
func TestUnknownIDs(t *testing.T) {
	n := node(t)
	ctx := critest.Context(t)
	const id = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
	if _, err := n.RT.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Error(err)
	}
	if _, err := n.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Error(err)
	}
	if _, err := n.RT.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
	if _, err := n.RT.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
	if l, err := n.RT.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{Id: id}}); err != nil || len(l.Items) != 0 {
		t.Errorf("%v %v", l, err)
	}
	if l, err := n.RT.ListContainers(ctx, &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{PodSandboxId: id}}); err != nil || len(l.Containers) != 0 {
		t.Errorf("%v %v", l, err)
	}
	if _, err := n.RT.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: id}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Error(err)
	}
	if _, err := n.RT.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Error(err)
	}
}

// Several attempts at a pod are several pods; lists find each by the beginning
// of its id, its state and its labels, and have the newest first. A stream has
// the same.
//
// contract: 7.1.9, 7.1.15, 13.26
// promise: P23
func TestPodFilters(t *testing.T) {
	n := node(t)
	ctx := critest.Context(t)
	mine := map[string]string{"test": t.Name()}
	var pods []*critest.Pod
	for i := range 3 {
		pods = append(pods, n.Pod(t, "pauseless", critest.HostNetwork, func(c *runtime.PodSandboxConfig) {
			c.Labels = map[string]string{"test": t.Name(), "n": strconv.Itoa(i % 2)}
			c.Metadata.Name, c.Metadata.Uid, c.Metadata.Attempt = "same", "same", uint32(i)
		}))
	}
	pods[1].Stop()
	ready, notReady := &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY}, &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_NOTREADY}
	for i, tt := range []struct {
		f    *runtime.PodSandboxFilter
		want []int
	}{
		{&runtime.PodSandboxFilter{LabelSelector: mine}, []int{2, 1, 0}},
		{&runtime.PodSandboxFilter{LabelSelector: mine, State: ready}, []int{2, 0}},
		{&runtime.PodSandboxFilter{LabelSelector: mine, State: notReady}, []int{1}},
		{&runtime.PodSandboxFilter{LabelSelector: map[string]string{"test": t.Name(), "n": "0"}}, []int{2, 0}},
		{&runtime.PodSandboxFilter{Id: pods[0].ID[:20]}, []int{0}},
		{&runtime.PodSandboxFilter{Id: pods[1].ID, State: ready}, nil},
		{&runtime.PodSandboxFilter{LabelSelector: map[string]string{"test": "other"}}, nil},
	} {
		var want []string
		for _, i := range tt.want {
			want = append(want, pods[i].ID)
		}
		l, err := n.RT.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{Filter: tt.f})
		if err != nil {
			t.Fatal(err)
		}
		var got, streamed []string
		for _, p := range l.Items {
			got = append(got, p.Id)
		}
		s, err := n.RT.StreamPodSandboxes(ctx, &runtime.StreamPodSandboxesRequest{Filter: tt.f})
		for _, r := range received(t, s, err) {
			for _, p := range r.PodSandboxes {
				streamed = append(streamed, p.Id)
			}
		}
		if !slices.Equal(got, want) || !slices.Equal(streamed, want) {
			t.Errorf("filter %d: %v and %v, want %v", i, got, streamed, want)
		}
	}
	c := pods[0].Run("sleep 1000", func(c *runtime.ContainerConfig) { c.Labels = map[string]string{"x": "y"} })
	done := pods[0].Run("true")
	done.Wait()
	for i, tt := range []struct {
		f    *runtime.ContainerFilter
		want []string
	}{
		{&runtime.ContainerFilter{PodSandboxId: pods[0].ID[:20]}, []string{done.ID, c.ID}},
		{&runtime.ContainerFilter{PodSandboxId: pods[0].ID, LabelSelector: map[string]string{"x": "y"}}, []string{c.ID}},
		{&runtime.ContainerFilter{PodSandboxId: pods[0].ID, State: &runtime.ContainerStateValue{State: runtime.ContainerState_CONTAINER_EXITED}}, []string{done.ID}},
		{&runtime.ContainerFilter{Id: c.ID[:20]}, []string{c.ID}},
		{&runtime.ContainerFilter{PodSandboxId: pods[2].ID}, nil},
	} {
		l, err := n.RT.ListContainers(ctx, &runtime.ListContainersRequest{Filter: tt.f})
		if err != nil {
			t.Fatal(err)
		}
		var got, streamed []string
		for _, c := range l.Containers {
			got = append(got, c.Id)
		}
		s, err := n.RT.StreamContainers(ctx, &runtime.StreamContainersRequest{Filter: tt.f})
		for _, r := range received(t, s, err) {
			for _, c := range r.Containers {
				streamed = append(streamed, c.Id)
			}
		}
		if !slices.Equal(got, tt.want) || !slices.Equal(streamed, tt.want) {
			t.Errorf("container filter %d: %v and %v, want %v", i, got, streamed, tt.want)
		}
	}
}

// What a kubelet repeats, because an answer was lost, gets the first answer.
//
// contract: 7.1.5
// promise: P5
func TestRunPodAgain(t *testing.T) {
	n := node(t)
	p := n.Pod(t, "runc")
	run := func(c *runtime.PodSandboxConfig, handler string) (string, error) {
		r, err := n.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: handler})
		return r.GetPodSandboxId(), err
	}
	if id, err := run(p.Config, "runc"); err != nil || id != p.ID {
		t.Errorf("again: %s %v", id, err)
	}
	if _, err := run(p.Config, "pauseless"); !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
		t.Errorf("with another handler: %v", err)
	}
	// Many at once make one.
	c := n.PodConfig(t)
	ids := make([]string, 8)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			var err error
			if ids[i], err = run(c, "runc"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if same := slices.Compact(ids); len(same) != 1 {
		t.Errorf("%d pods", len(same))
	}
	(&critest.Pod{Node: n, T: t, ID: ids[0], Config: c}).Remove()
	if id, err := run(c, "runc"); err != nil || id == ids[0] {
		t.Errorf("after its removal: %s %v", id, err)
	} else {
		(&critest.Pod{Node: n, T: t, ID: id, Config: c}).Remove()
	}
	if _, err := run(n.PodConfig(t), "none"); err == nil || !strings.Contains(err.Error(), `"none"`) {
		t.Errorf("unknown handler: %v", err)
	}
}

// A client that goes away leaves nothing behind, however far the pod was, and
// whoever asks again gets a pod.
//
// contract: 7.1.5
// promise: P5
func TestRunPodCancelled(t *testing.T) {
	n := node(t)
	c := n.PodConfig(t)
	for i := range 12 {
		ctx, cancel := context.WithTimeout(critest.Context(t), critest.Slow(time.Duration(i*i)*time.Millisecond))
		_, _ = n.RT.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: "pauseless"})
		cancel()
		begin := time.Now()
		r, err := n.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: "pauseless"})
		if err != nil {
			t.Fatalf("retry %d: %v", i, err)
		}
		if d := time.Since(begin); d > critest.Slow(10*time.Second) {
			t.Errorf("retry %d took %v", i, d)
		}
		l, err := n.RT.ListPodSandbox(critest.Context(t), &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{LabelSelector: c.Labels}})
		if err != nil || len(l.Items) != 1 || l.Items[0].Id != r.PodSandboxId {
			t.Errorf("%v %v", l, err)
		}
		(&critest.Pod{Node: n, T: t, ID: r.PodSandboxId, Config: c}).Remove()
	}
}

// A pod whose sandboxer needs no process has none, and no image is fetched for
// it; one that shares a PID namespace has a pause process.
//
// contract: 7.1.5, 1.3.30
// promise: P55
func TestPauseless(t *testing.T) {
	n := critest.Run(t, binDir, "")
	pause := func() int {
		i := 0
		for _, r := range n.Registry.Requests() {
			if strings.Contains(r, "/pause/") {
				i++
			}
		}
		return i
	}
	p := n.Pod(t, "pauseless")
	info := infoOf(t, p)
	if info.Pid != 0 || info.Sandboxer != "pauseless" {
		t.Errorf("%+v", info)
	}
	if procs := processesOf(t, n); len(procs) != 0 {
		t.Errorf("processes of a pod without any: %v", procs)
	}
	if pause() != 0 {
		t.Errorf("the pause image was asked for: %q", n.Registry.Requests())
	}
	a, b := p.Run("sleep 1000"), p.Run("sleep 1001")
	for _, ns := range []string{"net", "ipc", "uts"} {
		if x, y := a.Exec("readlink /proc/1/ns/"+ns), b.Exec("readlink /proc/1/ns/"+ns); x != y {
			t.Errorf("%s: %s and %s", ns, x, y)
		}
	}
	if x, y := a.Exec("readlink /proc/1/ns/pid"), b.Exec("readlink /proc/1/ns/pid"); x == y {
		t.Error("they share a PID namespace")
	}
	if pause() != 0 {
		t.Errorf("the pause image was asked for: %q", n.Registry.Requests())
	}
	shared := n.Pod(t, "pauseless", func(c *runtime.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_POD
	})
	if info := infoOf(t, shared); info.Pid == 0 || pause() == 0 {
		t.Errorf("%+v, %d requests", info, pause())
	}
	x, y := shared.Run("sleep 1002"), shared.Run("sleep 1003")
	if out := y.Exec("ps -o pid,args"); !strings.Contains(out, "1 /pause") && !strings.Contains(out, "1 pause") || !strings.Contains(out, "sleep 1002") {
		t.Errorf("%s", out)
	}
	if a, b := x.Exec("readlink /proc/self/ns/pid"), y.Exec("readlink /proc/self/ns/pid"); a != b {
		t.Errorf("%s and %s", a, b)
	}
}

// The daemon ends and starts: pods are those that they were, with their
// addresses, and what ended meanwhile has its exit code.
//
// contract: 7.3.30, 7.3.29
// promise: P11
func TestRestart(t *testing.T) {
	n := critest.Run(t, binDir, "")
	type was struct {
		p             *critest.Pod
		run, end, old *critest.Container
		pod           *runtime.PodSandboxStatus
		first         *runtime.ContainerStatus
		pid, endPid   string
	}
	var all []*was
	for _, handler := range n.Handlers {
		w := &was{p: n.Pod(t, handler)}
		gate := n.Dir + "/gate-" + handler
		w.run = w.p.Run("sleep 1000")
		w.old = w.p.Run("exit 5")
		w.old.Wait()
		w.end = w.p.Run("while ! [ -e /gate/open ]; do sleep 0.05; done; exit 7", func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{HostPath: gate, ContainerPath: "/gate"}}
		})
		w.pod, w.first, w.pid, w.endPid = w.p.Status().Status, w.run.Status(), pidOf(t, w.run), pidOf(t, w.end)
		all = append(all, w)
	}
	stopped := n.Pod(t, "runc")
	stopped.Stop()
	for _, how := range []string{"stop", "kill"} {
		if how == "stop" {
			if err := n.Daemon.Stop(); err != nil {
				t.Fatal(err)
			}
			for i, w := range all {
				// What ends while nobody looks.
				if i%2 == 0 {
					if err := os.WriteFile(n.Dir+"/gate-"+w.pod.RuntimeHandler+"/open", nil, 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			for i, w := range all {
				if i%2 == 0 {
					critest.Eventually(t, "the end of a process", func() bool { return !exists("/proc/" + w.endPid) })
				}
			}
		} else {
			n.Kill()
		}
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		if l := listed(t, n); len(l) != len(all)+1 {
			t.Errorf("%s: %v", how, l)
		}
		for i, w := range all {
			now := w.p.Status().Status
			if now.State != runtime.PodSandboxState_SANDBOX_READY || now.Network.Ip != w.pod.Network.Ip || now.CreatedAt != w.pod.CreatedAt || now.RuntimeHandler != w.pod.RuntimeHandler ||
				now.Network.AdditionalIps[0].Ip != w.pod.Network.AdditionalIps[0].Ip {
				t.Errorf("%s: %v, was %v", how, now, w.pod)
			}
			if st := w.run.Status(); st.State != runtime.ContainerState_CONTAINER_RUNNING || st.StartedAt != w.first.StartedAt || pidOf(t, w.run) != w.pid {
				t.Errorf("%s: %v, was %v", how, st, w.first)
			}
			if st := w.old.Status(); st.State != runtime.ContainerState_CONTAINER_EXITED || st.ExitCode != 5 || st.Reason != "Error" {
				t.Errorf("%s: %v", how, st)
			}
			if i%2 == 0 {
				if st := w.end.Wait(); st.ExitCode != 7 || st.Reason != "Error" {
					t.Errorf("%s: %v", how, st)
				}
			} else if st := w.end.Status(); st.State != runtime.ContainerState_CONTAINER_RUNNING {
				t.Errorf("%s: %v", how, st)
			}
			if out := w.run.Exec("echo alive"); out != "alive\n" {
				t.Errorf("%s: %q", how, out)
			}
			if out := w.p.Output("echo new"); out != "new\n" {
				t.Errorf("%s: %q", how, out)
			}
		}
		if st := stopped.Status().Status; st.State != runtime.PodSandboxState_SANDBOX_NOTREADY || st.Network.Ip != "" {
			t.Errorf("%s: %v", how, st)
		}
	}
}

// Recovery does not keep clients waiting at the socket: they are told to come
// back, and that soon ends.
//
// contract: 7.1.24, 7.3.30
func TestQuickStart(t *testing.T) {
	n := critest.Run(t, binDir, "")
	for range 5 {
		n.Pod(t, "pauseless", critest.HostNetwork)
	}
	n.Kill()
	begin := time.Now()
	if err := n.Spawn(); err != nil {
		t.Fatal(err)
	}
	if err := n.Listening(); err != nil {
		t.Fatal(err)
	}
	listening := time.Since(begin)
	if err := n.Connect(); err != nil {
		t.Fatal(err)
	}
	for {
		l, err := n.RT.ListPodSandbox(critest.Context(t), &runtime.ListPodSandboxRequest{})
		if err == nil {
			if len(l.Items) != 5 {
				t.Errorf("the first answer has %d pods", len(l.Items))
			}
			break
		}
		if !errdefs.IsUnavailable(errgrpc.ToNative(err)) || time.Since(begin) > critest.Slow(20*time.Second) {
			t.Fatal(err)
		}
	}
	t.Logf("listens after %v, answers after %v", listening, time.Since(begin))
	if listening > critest.Slow(3*time.Second) { // 500 ms on an idle machine
		t.Errorf("it listens only after %v", listening)
	}
}

// processesOf are the processes in the cgroups of a node's pods.
func processesOf(t *testing.T, n *critest.Node) []string {
	t.Helper()
	var all []string
	for _, root := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		_ = filepath.WalkDir(filepath.Join(root, n.Mark), func(path string, _ os.DirEntry, err error) error {
			if err == nil && filepath.Base(path) == "cgroup.procs" {
				b, _ := os.ReadFile(path)
				all = append(all, strings.Fields(string(b))...)
			}
			return nil
		})
	}
	return all
}

// pidOf is a container's first process on the host.
func pidOf(t *testing.T, c *critest.Container) string {
	t.Helper()
	r, err := c.RT.ContainerStatus(critest.Context(t), &runtime.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.Pid == 0 {
		t.Fatalf("%v: %s", err, r.Info["info"])
	}
	return strconv.Itoa(info.Pid)
}

// received is all of a stream.
func received[R any](t *testing.T, s grpc.ServerStreamingClient[R], err error) (all []*R) {
	t.Helper()
	for err == nil {
		var m *R
		if m, err = s.Recv(); err == nil {
			all = append(all, m)
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return all
}
