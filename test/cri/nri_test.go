//go:build linux

package cri

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// mine is the annotation of pods that a test's plugins act on: the node has
// other tests' pods as well.
const mine = "test/nri"

// plugin is an NRI plugin in the test's process, connected as any other is.
type plugin struct {
	stub.Stub
	mu     sync.Mutex
	diary  []string
	ready  chan struct{}
	pods   []*api.PodSandbox
	hook   func(ctx context.Context, hook string) error // for pods that are mine
	create func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate)
}

func (p *plugin) note(ctx context.Context, hook string, pod *api.PodSandbox) error {
	if pod.GetAnnotations()[mine] == "" {
		return nil
	}
	p.mu.Lock()
	p.diary = append(p.diary, hook)
	act := p.hook
	p.mu.Unlock()
	if act == nil {
		return nil
	}
	return act(ctx, hook)
}

func (p *plugin) set(hook func(context.Context, string) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hook = hook
}

func (p *plugin) told() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.diary)
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, _ []*api.Container) ([]*api.ContainerUpdate, error) {
	p.pods = pods
	close(p.ready)
	return nil, nil
}
func (p *plugin) RunPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.note(ctx, "RunPodSandbox", pod)
}
func (p *plugin) StopPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.note(ctx, "StopPodSandbox", pod)
}
func (p *plugin) RemovePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.note(ctx, "RemovePodSandbox", pod)
}
func (p *plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if err := p.note(ctx, "CreateContainer", pod); err != nil || p.create == nil || pod.GetAnnotations()[mine] == "" {
		return nil, nil, err
	}
	a, u := p.create(c)
	return a, u, nil
}
func (p *plugin) PostCreateContainer(ctx context.Context, pod *api.PodSandbox, _ *api.Container) error {
	return p.note(ctx, "PostCreateContainer", pod)
}
func (p *plugin) StartContainer(ctx context.Context, pod *api.PodSandbox, _ *api.Container) error {
	return p.note(ctx, "StartContainer", pod)
}
func (p *plugin) PostStartContainer(ctx context.Context, pod *api.PodSandbox, _ *api.Container) error {
	return p.note(ctx, "PostStartContainer", pod)
}
func (p *plugin) UpdateContainer(ctx context.Context, pod *api.PodSandbox, _ *api.Container, _ *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	return nil, p.note(ctx, "UpdateContainer", pod)
}
func (p *plugin) PostUpdateContainer(ctx context.Context, pod *api.PodSandbox, _ *api.Container) error {
	return p.note(ctx, "PostUpdateContainer", pod)
}
func (p *plugin) StopContainer(ctx context.Context, pod *api.PodSandbox, _ *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, p.note(ctx, "StopContainer", pod)
}
func (p *plugin) RemoveContainer(ctx context.Context, pod *api.PodSandbox, _ *api.Container) error {
	return p.note(ctx, "RemoveContainer", pod)
}

// connect connects a plugin to a node's socket and waits until it takes part.
func connect(t *testing.T, n *critest.Node, name string, p *plugin) *plugin {
	t.Helper()
	p.ready = make(chan struct{})
	var conn net.Conn
	critest.Eventually(t, "the socket of NRI", func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", n.Dir+"/nri.sock")
		return err == nil
	})
	index, base, _ := strings.Cut(name, "-")
	var err error
	if p.Stub, err = stub.New(p, stub.WithPluginIdx(index), stub.WithPluginName(base), stub.WithConnection(conn), stub.WithOnClose(func() {})); err == nil {
		err = p.Start(context.Background())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	select {
	case <-p.ready:
	case <-time.After(critest.Slow(20 * time.Second)):
		t.Fatalf("plugin %s was not synchronized", name)
	}
	return p
}

// noticed makes a pod one that the test's plugins act on.
func noticed(c *runtime.PodSandboxConfig) {
	critest.HostNetwork(c)
	c.Annotations = map[string]string{mine: "yes"}
}

// A plugin that adds to a container is seen by what runs in it, and hears of
// all that happens.
//
// contract: 1.4.8, 1.4.10, 1.4.12, 7.3.23
func TestNRIAdjust(t *testing.T) {
	n := node(t)
	before := n.Pod(t, "pauseless", noticed)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/file", []byte("from the plugin\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := connect(t, n, "10-adjuster", &plugin{create: func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		a := &api.ContainerAdjustment{}
		a.AddAnnotation("added", "by NRI")
		a.AddMount(&api.Mount{Source: dir, Destination: "/added", Type: "bind", Options: []string{"bind", "ro"}})
		a.AddEnv("ADDED", "variable")
		a.RemoveEnv("UNWANTED")
		a.AddDevice(&api.LinuxDevice{Path: "/dev/added", Type: "c", Major: 1, Minor: 5})
		a.AddRlimit("RLIMIT_NOFILE", 321, 321)
		a.SetLinuxMemoryLimit(64 << 20)
		return a, nil
	}})
	if !slices.ContainsFunc(p.pods, func(s *api.PodSandbox) bool { return s.Id == before.ID }) {
		t.Errorf("it was not told of pod %s", before.ID)
	}
	pod := n.Pod(t, "runc", noticed)
	c := pod.Run("sleep 1000", func(c *runtime.ContainerConfig) { c.Envs = []*runtime.KeyValue{{Key: "UNWANTED", Value: []byte("x")}} })
	if out := c.Exec("cat /added/file; echo $ADDED $UNWANTED; head -c 4 /dev/added | wc -c; ulimit -n"); out != "from the plugin\nvariable\n4\n321\n" {
		t.Errorf("%q", out)
	}
	r, err := n.RT.ContainerStatus(critest.Context(t), &runtime.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	if err != nil || !strings.Contains(r.Info["info"], `"added":"by NRI"`) || r.Status.Resources.Linux.MemoryLimitInBytes != 64<<20 {
		t.Errorf("%v %v", r, err)
	}
	if _, err := n.RT.UpdateContainerResources(critest.Context(t), &runtime.UpdateContainerResourcesRequest{ContainerId: c.ID, Linux: &runtime.LinuxContainerResources{CpuShares: 300}}); err != nil {
		t.Error(err)
	}
	c.Stop(0)
	c.Stop(0)
	c.Remove()
	pod.Remove()
	want := strings.Fields("RunPodSandbox CreateContainer PostCreateContainer StartContainer PostStartContainer UpdateContainer PostUpdateContainer StopContainer RemoveContainer StopPodSandbox RemovePodSandbox")
	if got := p.told(); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// A plugin hears of a container's end when it happens, once, whoever brought it
// about; what it gave to one that is gone already keeps nobody.
//
// contract: 1.4.10, 7.3.23
func TestNRIExit(t *testing.T) {
	n := node(t)
	var gone string
	p := connect(t, n, "10-watcher", &plugin{create: func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		if gone == "" {
			return nil, nil
		}
		u := &api.ContainerUpdate{ContainerId: gone}
		u.SetLinuxCPUShares(77)
		return nil, []*api.ContainerUpdate{u}
	}})
	pod := n.Pod(t, "pauseless", noticed)
	stops := func() (n int) {
		for _, hook := range p.told() {
			if hook == "StopContainer" {
				n++
			}
		}
		return n
	}
	c := pod.Run("true")
	critest.Eventually(t, "its end is told", func() bool { return stops() == 1 })
	gone = c.ID
	killed := pod.Run("sleep 1000")
	c.Stop(0)
	c.Remove()
	if got := p.told(); stops() != 1 || got[len(got)-1] != "RemoveContainer" {
		t.Errorf("%q", got)
	}
	killed.Remove()
	if got := p.told(); stops() != 2 || !slices.Equal(got[len(got)-2:], []string{"StopContainer", "RemoveContainer"}) {
		t.Errorf("%q", got)
	}
}

// A plugin changes containers that run: by itself, and when another is made.
//
// contract: 1.4.9, 7.3.23
func TestNRIUpdate(t *testing.T) {
	n := node(t)
	update := func(id string, shares uint64) *api.ContainerUpdate {
		u := &api.ContainerUpdate{ContainerId: id}
		u.SetLinuxCPUShares(shares)
		u.SetLinuxMemoryLimit(int64(shares) << 20)
		return u
	}
	var first *critest.Container
	p := connect(t, n, "10-updater", &plugin{create: func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		if first == nil {
			return nil, nil
		}
		return nil, []*api.ContainerUpdate{update(first.ID, 77)}
	}})
	pod := n.Pod(t, "pauseless", noticed)
	c := pod.Run("sleep 1000")
	shows := func(limit int64) {
		t.Helper()
		st := c.Status().Resources.Linux
		kernel := strings.TrimSpace(c.Exec("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; true"))
		if st.MemoryLimitInBytes != limit || kernel != fmt.Sprint(limit) {
			t.Errorf("status %v, kernel %s", st, kernel)
		}
	}
	failed, err := p.UpdateContainers([]*api.ContainerUpdate{update(c.ID, 55)})
	if err != nil || len(failed) > 0 {
		t.Errorf("%v %v", failed, err)
	}
	shows(55 << 20)
	if failed, err := p.UpdateContainers([]*api.ContainerUpdate{update("unknown", 55)}); err == nil {
		t.Errorf("a container that is not there was updated: %v", failed)
	}
	first = c
	pod.Create("true")
	shows(77 << 20)
}

// A required plugin that is absent, slow or dead keeps containers from being
// made, by its name; pods that tolerate it go on.
//
// contract: 1.4.13
// promise: P41
func TestNRIRequired(t *testing.T) {
	n := critest.Run(t, binDir, `
[plugins.'io.containerd.nri.v1.nri'.default_validator]
  enable = true
  required_plugins = ['guard']
  tolerate_missing_plugins_annotation = 'tolerate'
`)
	pod := n.Pod(t, "pauseless", noticed)
	refused := func(when string) {
		t.Helper()
		if c, err := pod.TryCreate("true"); err == nil || !strings.Contains(err.Error(), "guard") {
			t.Errorf("%s: %v %v", when, c, err)
		}
	}
	refused("absent")
	n.Pod(t, "pauseless", noticed, func(c *runtime.PodSandboxConfig) { c.Annotations["tolerate"] = "true" }).Create("true")
	guard := connect(t, n, "10-guard", &plugin{})
	pod.Create("true")
	guard.set(func(ctx context.Context, hook string) error {
		if hook == "CreateContainer" {
			<-t.Context().Done()
		}
		return nil
	})
	refused("asleep")
	// Who does not wait so long learns what for, and the next try is not in its way.
	config := pod.ContainerConfig("true")
	hasty, cancel := context.WithTimeout(critest.Context(t), 1500*time.Millisecond)
	defer cancel()
	_, err := n.RT.CreateContainer(hasty, &runtime.CreateContainerRequest{PodSandboxId: pod.ID, Config: config, SandboxConfig: pod.Config})
	if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "ask the NRI plugins") {
		t.Errorf("a creation that did not wait: %v", err)
	}
	guard.set(nil)
	critest.Eventually(t, "the next try", func() bool {
		_, err = n.RT.CreateContainer(critest.Context(t), &runtime.CreateContainerRequest{PodSandboxId: pod.ID, Config: config, SandboxConfig: pod.Config})
		return err == nil || !strings.Contains(err.Error(), "guard") // it may join the one under way
	})
	if err != nil {
		t.Error(err)
	}
	pod.Create("true")
	guard.Stop()
	critest.Eventually(t, "the plugin's end is noticed", func() bool { return strings.Contains(n.Log(64<<10), "NRI plugin has gone") })
	refused("dead")
	// It comes back and is told what it has missed.
	again := connect(t, n, "10-guard", &plugin{})
	if !slices.ContainsFunc(again.pods, func(s *api.PodSandbox) bool { return s.Id == pod.ID }) {
		t.Error("it is not told of the pod")
	}
	pod.Create("true")
}

// A plugin that sleeps in each hook, or dies in one, delays its pods by its
// limit and others not at all; it is kept if it lives.
//
// promise: P41
func TestNRISick(t *testing.T) {
	n := node(t)
	awake := make(chan struct{})
	sick := connect(t, n, "10-sick", &plugin{hook: func(context.Context, string) error { <-awake; return nil }})
	healthy := connect(t, n, "20-healthy", &plugin{})
	begin := time.Now()
	pod := n.Pod(t, "pauseless", noticed)
	if took := time.Since(begin); took > critest.Slow(10*time.Second) {
		t.Errorf("a pod with a sleeping plugin took %s", took)
	}
	begin = time.Now()
	c := pod.Run("sleep 1000")
	if took := time.Since(begin); took > critest.Slow(10*time.Second) {
		t.Errorf("a container with a sleeping plugin took %s", took)
	}
	quickest := time.Hour // on a busy machine one may take as long
	for range 3 {
		begin := time.Now()
		n.Pod(t, "pauseless", critest.HostNetwork)
		quickest = min(quickest, time.Since(begin))
	}
	if quickest > critest.Slow(2*time.Second) {
		t.Errorf("other pods took %s and more", quickest)
	}
	c.Stop(0)
	c.Remove()
	pod.Remove()
	for _, hook := range []string{"RunPodSandbox", "CreateContainer", "PostCreateContainer", "StartContainer", "PostStartContainer", "StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"} {
		for name, p := range map[string]*plugin{"sick": sick, "healthy": healthy} {
			if !slices.Contains(p.told(), hook) {
				t.Errorf("%s was not asked at %s", name, hook)
			}
		}
	}
	close(awake)
	sick.set(func(_ context.Context, hook string) error {
		if hook == "CreateContainer" {
			sick.Stop() // in the middle of it
		}
		return nil
	})
	n.Pod(t, "runc", noticed).Run("true")
}
