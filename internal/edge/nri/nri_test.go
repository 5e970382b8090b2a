package nri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/net/multiplex"
	"github.com/containerd/nri/pkg/stub"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/prometheus/client_golang/prometheus"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/metrics/metricstest"
)

// world is a Host with pods and containers that are only imagined.
type world struct {
	*Host
	metrics  *prometheus.Registry
	t        *testing.T
	mu       sync.Mutex
	specs    map[string]*specs.Spec
	adjusted map[string]*runtime.LinuxContainerResources
	evicted  []string
}

// limit is that of plugins that exceed it; all others have time.
const limit = time.Second

func short(c *Config) { c.RequestTimeout = limit }

func newWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{metrics: prometheus.NewRegistry(), t: t, specs: map[string]*specs.Spec{}, adjusted: map[string]*runtime.LinuxContainerResources{}}
	cfg := DefaultConfig()
	cfg.SocketPath, cfg.PluginPath, cfg.PluginConfigPath, cfg.RequestTimeout = dir+"/nri.sock", dir+"/plugins", dir+"/conf", 20*time.Second
	if change != nil {
		change(&cfg)
	}
	w.Host = New(Deps{Config: cfg, Pods: cristate.NewPods(), Containers: cristate.NewContainers(), Version: "1", Metrics: w.metrics, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Spec: func(_ context.Context, id string) (*specs.Spec, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if s := w.specs[id]; s != nil {
				return s, nil
			}
			return nil, errdefs.ErrNotFound
		},
		Adjust: func(_ context.Context, id string, r *runtime.LinuxContainerResources) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.specs[id] == nil {
				return fmt.Errorf("adjust %s: %w", id, errdefs.ErrNotFound)
			}
			w.adjusted[id] = r
			return nil
		},
		Evict: func(_ context.Context, id string) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.evicted = append(w.evicted, id)
			return nil
		},
		CDI: func(s *specs.Spec, names []string) error {
			s.Annotations["cdi"], s.Process.Env = strings.Join(names, " "), append(s.Process.Env, "D=device")
			return nil
		}})
	t.Cleanup(w.Close)
	return w
}

func (w *world) pod(id string, annotations map[string]string) *cristate.Pod {
	return cristate.NewPod(cristate.PodMeta{ID: id, Name: id, IP: "10.0.0.1", Config: &runtime.PodSandboxConfig{Annotations: annotations,
		Metadata: &runtime.PodSandboxMetadata{Name: "name-" + id, Namespace: "default", Uid: "uid-" + id}}}, cristate.PodStatus{State: cristate.PodReady})
}

func (w *world) container(id, pod string) (*cristate.Container, *specs.Spec) {
	c := cristate.NewContainer(cristate.ContainerMeta{ID: id, Name: id, SandboxID: pod, Config: &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "app"}}},
		cristate.Status{CreatedAt: 1}, w.t.TempDir())
	return c, &specs.Spec{Process: &specs.Process{Args: []string{"sh"}, Env: []string{"A=1", "B=2"}, Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 5, Soft: 5}}},
		Annotations: map[string]string{"was": "there"}, Mounts: []specs.Mount{{Destination: "/proc", Type: "proc"}}, Linux: &specs.Linux{}}
}

// known adds a container that is there already.
func (w *world) known(id, pod string) *cristate.Container {
	w.t.Helper()
	c, spec := w.container(id, pod)
	w.mu.Lock()
	w.specs[id] = spec
	w.mu.Unlock()
	if err := w.Containers.Add(c); err != nil {
		w.t.Fatal(err)
	}
	return c
}

// fake is a plugin. Hooks that are not set answer nothing.
type fake struct {
	mu      sync.Mutex
	diary   []string
	pods    []*api.PodSandbox
	ctrs    []*api.Container
	synced  chan struct{}
	config  string
	at      func(ctx context.Context, hook, id string) error
	create  func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate)
	updates []*api.ContainerUpdate // what it answers to updates and stops
	check   func(*api.ValidateContainerAdjustmentRequest) error
}

func (f *fake) note(ctx context.Context, hook, id string) error {
	f.mu.Lock()
	f.diary = append(f.diary, hook+" "+id)
	at := f.at
	f.mu.Unlock()
	if at != nil {
		return at(ctx, hook, id)
	}
	return nil
}

func (f *fake) told(what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.diary, what)
}

func (f *fake) Configure(_ context.Context, config, _, _ string) (api.EventMask, error) {
	f.config = config
	return 0, nil
}
func (f *fake) Synchronize(ctx context.Context, p []*api.PodSandbox, c []*api.Container) ([]*api.ContainerUpdate, error) {
	if err := f.note(ctx, "sync", ""); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.pods, f.ctrs = p, c
	f.mu.Unlock()
	close(f.synced)
	return nil, nil
}
func (f *fake) RunPodSandbox(ctx context.Context, p *api.PodSandbox) error {
	return f.note(ctx, "run", p.Id)
}
func (f *fake) StopPodSandbox(ctx context.Context, p *api.PodSandbox) error {
	return f.note(ctx, "stop", p.Id)
}
func (f *fake) RemovePodSandbox(ctx context.Context, p *api.PodSandbox) error {
	return f.note(ctx, "remove", p.Id)
}
func (f *fake) UpdatePodSandbox(ctx context.Context, p *api.PodSandbox, _, _ *api.LinuxResources) error {
	return f.note(ctx, "update", p.Id)
}
func (f *fake) PostUpdatePodSandbox(ctx context.Context, p *api.PodSandbox) error {
	return f.note(ctx, "updated", p.Id)
}
func (f *fake) CreateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	err := f.note(ctx, "create", c.Id)
	f.mu.Lock()
	create := f.create
	f.mu.Unlock()
	if err != nil || create == nil {
		return nil, nil, err
	}
	a, u := create(c)
	return a, u, nil
}
func (f *fake) PostCreateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return f.note(ctx, "created", c.Id)
}
func (f *fake) StartContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return f.note(ctx, "start", c.Id)
}
func (f *fake) PostStartContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return f.note(ctx, "started", c.Id)
}
func (f *fake) UpdateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container, _ *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	return f.updates, f.note(ctx, "update", c.Id)
}
func (f *fake) PostUpdateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return f.note(ctx, "updated", c.Id)
}
func (f *fake) StopContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return f.updates, f.note(ctx, "stop", c.Id)
}
func (f *fake) RemoveContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	return f.note(ctx, "remove", c.Id)
}

// checker is a plugin that validates as well.
type checker struct{ *fake }

func (c checker) ValidateContainerAdjustment(_ context.Context, r *api.ValidateContainerAdjustmentRequest) error {
	return c.check(r)
}

// connect connects a plugin and waits until it takes part.
func (w *world) connect(name string, f *fake, opts ...stub.Option) stub.Stub {
	w.t.Helper()
	s := w.dial(name, f, opts...)
	eventually(w.t, name+" takes part", func() bool {
		select {
		case <-f.synced:
			return slices.Contains(w.Names(), name)
		default:
			return false
		}
	})
	return s
}

func (w *world) dial(name string, f *fake, opts ...stub.Option) stub.Stub {
	w.t.Helper()
	f.synced = make(chan struct{})
	index, base, _ := strings.Cut(name, "-")
	var plugin any = f
	if f.check != nil {
		plugin = checker{f}
	}
	var conn net.Conn
	eventually(w.t, "socket", func() bool {
		var err error
		conn, err = net.Dial("unix", w.Config.SocketPath)
		return err == nil
	})
	s, err := stub.New(plugin, append([]stub.Option{stub.WithPluginIdx(index), stub.WithPluginName(base), stub.WithConnection(conn), stub.WithOnClose(func() {})}, opts...)...)
	if err == nil {
		err = s.Start(w.t.Context())
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(s.Stop)
	return s
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

// set changes what the plugin does.
func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// sleep is a hook that takes longer than it may, until the test ends.
func sleep(t *testing.T, hooks ...string) func(context.Context, string, string) error {
	return func(_ context.Context, hook, _ string) error {
		if slices.Contains(hooks, hook) {
			<-t.Context().Done()
		}
		return nil
	}
}

// contract: 1.4.8, 1.4.9, 1.4.10, 1.4.14, 7.3.23
func TestLife(t *testing.T) {
	w := newWorld(t, nil)
	w.Start(t.Context())
	p := w.pod("p", nil)
	if err := w.Pods.Add(p); err != nil {
		t.Fatal(err)
	}
	w.known("before", "p")
	f := &fake{}
	s := w.connect("10-diary", f)
	if len(f.pods) != 1 || f.pods[0].Name != "name-p" || f.pods[0].Ips[0] != "10.0.0.1" || len(f.ctrs) != 1 || f.ctrs[0].Id != "before" || f.ctrs[0].Args[0] != "sh" {
		t.Errorf("synchronized with %v %v", f.pods, f.ctrs)
	}
	ctx := t.Context()
	c, spec := w.container("c", "p")
	none := &runtime.LinuxContainerResources{}
	if err := errors.Join(w.RunPodSandbox(ctx, p), w.CreateContainer(ctx, p, c, spec)); err != nil {
		t.Fatal(err)
	}
	w.PostCreateContainer(ctx, p, c)
	if err := w.StartContainer(ctx, p, c); err != nil {
		t.Fatal(err)
	}
	w.PostStartContainer(ctx, p, c)
	if r, err := w.UpdateContainer(ctx, p, c, &runtime.LinuxContainerResources{CpuShares: 7}); err != nil || r.CpuShares != 7 {
		t.Errorf("%v %v", r, err)
	}
	w.PostUpdateContainer(ctx, p, c)
	if err := errors.Join(w.StopContainer(ctx, p, c), w.RemoveContainer(ctx, p, c), w.UpdatePodSandbox(ctx, p, none, none), w.PostUpdatePodSandbox(ctx, p), w.StopPodSandbox(ctx, p), w.RemovePodSandbox(ctx, p)); err != nil {
		t.Fatal(err)
	}
	want := "sync |run p|create c|created c|start c|started c|update c|updated c|stop c|remove c|update p|updated p|stop p|remove p"
	if got := strings.Join(f.diary, "|"); got != want {
		t.Errorf("%s", got)
	}
	failed, err := s.UpdateContainers([]*api.ContainerUpdate{
		{ContainerId: "before", Linux: &api.LinuxContainerUpdate{Resources: &api.LinuxResources{Cpu: &api.LinuxCPU{Shares: api.UInt64(uint64(99)), Cpus: "0"}, Memory: &api.LinuxMemory{Limit: api.Int64(int64(1 << 20))}}}},
		{ContainerId: "gone", IgnoreFailure: true}})
	if err != nil || len(failed) != 1 || failed[0].ContainerId != "gone" {
		t.Errorf("%v %v", failed, err)
	}
	if r := w.adjusted["before"]; r.GetCpuShares() != 99 || r.GetCpusetCpus() != "0" || r.GetMemoryLimitInBytes() != 1<<20 {
		t.Errorf("%v", r)
	}
	if m := metricstest.Read(t, w.metrics); m["containerd_nri_plugin_invocations_total  Synchronize 10-diary success"] != 1 || m["containerd_nri_plugin_latency_seconds StopContainer 10-diary"] == 0 || m["containerd_nri_active_plugins_total"] != 1 {
		t.Errorf("%v", m)
	}
}

// contract: 1.4.12
func TestAdjustments(t *testing.T) {
	w := newWorld(t, nil)
	w.Start(t.Context())
	w.known("other", "p")
	first := &fake{create: func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
		a := &api.ContainerAdjustment{}
		a.AddAnnotation("new", "value")
		a.RemoveAnnotation("was")
		a.AddMount(&api.Mount{Source: "/tmp", Destination: "/host", Type: "bind", Options: []string{"bind", "ro"}})
		a.AddEnv("A", "changed")
		a.AddEnv("C", "3")
		a.RemoveEnv("B")
		a.SetArgs([]string{"other", "args"})
		a.AddRlimit("RLIMIT_NOFILE", 10, 9)
		a.AddHooks(&api.Hooks{CreateRuntime: []*api.Hook{{Path: "/bin/true"}}})
		a.AddCDIDevice(&api.CDIDevice{Name: "v/c=d"})
		a.AddDevice(&api.LinuxDevice{Path: "/dev/x", Type: "c", Major: 1, Minor: 3})
		a.SetLinuxCPUShares(123)
		a.SetLinuxMemoryLimit(1 << 24)
		a.SetLinuxPidLimits(77)
		a.AddLinuxUnified("memory.high", "1")
		a.SetLinuxCgroupsPath("/some/where")
		oom := 5
		a.SetLinuxOomScoreAdj(&oom)
		a.SetLinuxIOPriority(&api.LinuxIOPriority{Class: api.IOPrioClass_IOPRIO_CLASS_BE, Priority: 3})
		a.SetLinuxSeccompPolicy(&api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW"})
		a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "ipc", Path: "/proc/1/ns/ipc"})
		a.SetLinuxSysctl("net.x", "1")
		a.SetLinuxScheduler(&api.LinuxScheduler{Policy: api.LinuxSchedulerPolicy_SCHED_BATCH, Nice: 4})
		a.SetLinuxRDTClosID("gold")
		u := &api.ContainerUpdate{ContainerId: "other"}
		u.SetLinuxCPUShares(55)
		return a, []*api.ContainerUpdate{u}
	}}
	var seen *api.Container
	second := &fake{create: func(c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) { seen = c; return nil, nil }}
	w.connect("20-second", second)
	w.connect("10-first", first)
	c, s := w.container("c", "p")
	if err := w.CreateContainer(t.Context(), w.pod("p", nil), c, s); err != nil {
		t.Fatal(err)
	}
	if seen.GetAnnotations()["new"] != "value" {
		t.Errorf("the second plugin sees %v", seen)
	}
	if w.adjusted["other"].GetCpuShares() != 55 {
		t.Errorf("%v", w.adjusted)
	}
	l := s.Linux
	for what, ok := range map[string]bool{
		"annotations": s.Annotations["new"] == "value" && s.Annotations["was"] == "", "mounts": len(s.Mounts) == 2 && s.Mounts[0].Destination == "/host" || s.Mounts[1].Destination == "/host",
		"env": slices.Equal(slices.Sorted(slices.Values(s.Process.Env)), []string{"A=changed", "C=3", "D=device"}), "args": slices.Equal(s.Process.Args, []string{"other", "args"}),
		"rlimits": len(s.Process.Rlimits) == 1 && s.Process.Rlimits[0].Hard == 10, "hooks": len(s.Hooks.CreateRuntime) == 1, "CDI": s.Annotations["cdi"] == "v/c=d",
		"devices": len(l.Devices) == 1 && len(l.Resources.Devices) == 1, "cpu": *l.Resources.CPU.Shares == 123, "memory": *l.Resources.Memory.Limit == 1<<24 && l.Resources.Memory.Swap == nil,
		"pids": *l.Resources.Pids.Limit == 77, "unified": l.Resources.Unified["memory.high"] == "1", "cgroup": l.CgroupsPath == "/some/where", "oom": *s.Process.OOMScoreAdj == 5,
		"ioprio": s.Process.IOPriority.Priority == 3, "seccomp": l.Seccomp.DefaultAction == specs.ActAllow, "namespaces": l.Namespaces[0].Path == "/proc/1/ns/ipc",
		"sysctl": l.Sysctl["net.x"] == "1", "scheduler": s.Process.Scheduler.Nice == 4, "rdt": l.IntelRdt.ClosID == "gold",
	} {
		if !ok {
			t.Errorf("%s: %+v %+v", what, s, s.Process)
		}
	}
	// A field belongs to the first who sets it.
	second.set(func() {
		second.create = func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			a := &api.ContainerAdjustment{}
			a.AddEnv("C", "mine")
			return a, nil
		}
	})
	c, s = w.container("d", "p")
	if err := w.CreateContainer(t.Context(), w.pod("p", nil), c, s); err == nil || !strings.Contains(err.Error(), "10-first") || !strings.Contains(err.Error(), "20-second") {
		t.Errorf("conflict: %v", err)
	}
}

// Each end is told once, however often it is reported, a removal after it; and
// a change of a container that is gone keeps nobody.
//
// contract: 1.4.10, 7.3.23
func TestEnds(t *testing.T) {
	w := newWorld(t, nil)
	old := w.known("old", "p")
	if err := old.Mark(func(st *cristate.Status) error { st.StartedAt, st.FinishedAt = 1, 2; return nil }); err != nil {
		t.Fatal(err)
	}
	w.Start(t.Context())
	f := &fake{updates: []*api.ContainerUpdate{{ContainerId: "gone", Linux: &api.LinuxContainerUpdate{}}},
		create: func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			return nil, []*api.ContainerUpdate{{ContainerId: "gone", Linux: &api.LinuxContainerUpdate{}}}
		}}
	w.connect("10-diary", f)
	p, ctx := w.pod("p", nil), t.Context()
	exits, stopped, removed := w.known("exits", "p"), w.known("stopped", "p"), w.known("removed", "p")
	c, spec := w.container("refused", "p")
	w.ContainerExited(p, exits)
	eventually(t, "the exit is told", func() bool { return f.told("stop exits") })
	for range 2 {
		for _, c := range []*cristate.Container{exits, stopped, old} {
			if err := w.StopContainer(ctx, p, c); err != nil {
				t.Error(err)
			}
		}
		if err := w.StopPodSandbox(ctx, p); err != nil {
			t.Error(err)
		}
	}
	if err := errors.Join(w.CreateContainer(ctx, p, c, spec), w.RemoveContainer(ctx, p, c), w.RemoveContainer(ctx, p, exits), w.RemoveContainer(ctx, p, removed),
		w.RemovePodSandbox(ctx, p), w.RemovePodSandbox(ctx, w.pod("q", nil))); err != nil {
		t.Error(err)
	}
	want := "sync |stop exits|stop stopped|stop p|create refused|stop refused|remove refused|remove exits|stop removed|remove removed|remove p|stop q|remove q"
	if got := strings.Join(f.diary, "|"); got != want {
		t.Errorf("%s", got)
	}
	if len(w.ended) != 2 { // what is there still
		t.Errorf("%v", w.ended)
	}
	// A plugin that is asleep holds the end, and its removal waits for it.
	f.set(func() {
		f.at = func(_ context.Context, hook, _ string) error {
			if hook == "stop" {
				time.Sleep(50 * time.Millisecond)
			}
			return nil
		}
	})
	last := w.known("last", "p")
	w.ContainerExited(p, last)
	eventually(t, "the exit is told", func() bool { return f.told("stop last") })
	if err := last.Mark(func(st *cristate.Status) error { st.Removing = true; return nil }); err != nil {
		t.Fatal(err)
	}
	w.ContainerExited(p, last) // late
	if err := w.RemoveContainer(ctx, p, last); err != nil || f.diary[len(f.diary)-2] != "stop last" || f.diary[len(f.diary)-1] != "remove last" {
		t.Errorf("%v %q", err, f.diary)
	}
}

// What has happened is told to all, also when one of them answers with an error
// or a required one does not answer.
//
// contract: 1.4.10
// promise: P41
func TestAllHear(t *testing.T) {
	w := newWorld(t, short)
	w.Start(t.Context())
	first, second := &fake{}, &fake{}
	w.connect("10-first", first)
	w.connect("20-second", second)
	p, ctx := w.pod("p", nil), t.Context()
	for id, at := range map[string]func(context.Context, string, string) error{
		"error": func(context.Context, string, string) error { return errors.New("no, thank you") },
		"sleep": sleep(t, "created", "started", "updated", "stop", "remove"),
	} {
		if id == "sleep" {
			for _, plug := range w.plugins() {
				plug.policy = &api.FailurePolicy{FailRequest: true}
			}
		}
		first.set(func() { first.at = at })
		c := w.known(id, "p")
		w.PostCreateContainer(ctx, p, c)
		w.PostStartContainer(ctx, p, c)
		w.PostUpdateContainer(ctx, p, c)
		q := w.pod("pod-"+id, nil)
		for _, err := range []error{w.StopContainer(ctx, p, c), w.RemoveContainer(ctx, p, c), w.PostUpdatePodSandbox(ctx, q), w.StopPodSandbox(ctx, q), w.RemovePodSandbox(ctx, q)} {
			if err == nil || !strings.Contains(err.Error(), "10-first") {
				t.Errorf("%s: %v", id, err)
			}
		}
		for _, what := range []string{"created ", "started ", "updated ", "stop ", "remove ", "updated pod-", "stop pod-", "remove pod-"} {
			if !second.told(what + id) {
				t.Errorf("the second plugin was not told %q", what+id)
			}
		}
		first.set(func() { first.at = nil })
	}
}

// What no container can have is refused, and so is what a plugin has no right to.
//
// contract: 1.4.12
// promise: P41
func TestLies(t *testing.T) {
	w := newWorld(t, nil)
	w.Start(t.Context())
	liar := &fake{}
	w.connect("10-liar", liar)
	for name, lie := range map[string]func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate){
		"mount": func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			return &api.ContainerAdjustment{Mounts: []*api.Mount{{Destination: "relative"}}}, nil
		},
		"namespace": func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			return &api.ContainerAdjustment{Linux: &api.LinuxContainerAdjustment{Namespaces: []*api.LinuxNamespace{{Type: "zoo"}}}}, nil
		},
		"class": func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			a := &api.ContainerAdjustment{}
			a.SetLinuxRDTClass("../..")
			return a, nil
		},
		"itself": func(c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			return nil, []*api.ContainerUpdate{{ContainerId: c.Id, Linux: &api.LinuxContainerUpdate{}}}
		},
	} {
		liar.set(func() { liar.create = lie })
		c, s := w.container("c", "p")
		if err := w.CreateContainer(t.Context(), w.pod("p", nil), c, s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A required plugin that is slow, dead or absent refuses creations by its name;
// those who tolerate it go on (contract 1.4.13).
//
// contract: 1.4.13
// promise: P41
func TestRequired(t *testing.T) {
	w := newWorld(t, func(c *Config) {
		short(c)
		c.DefaultValidator.Enable, c.DefaultValidator.RequiredPlugins, c.DefaultValidator.TolerateMissingAnnotation = true, []string{"guard"}, "tolerate"
	})
	w.Start(t.Context())
	create := func(annotations map[string]string) error {
		c, s := w.container("c", "p")
		return w.CreateContainer(t.Context(), w.pod("p", annotations), c, s)
	}
	refused := func(when, name string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", when, err)
		}
	}
	refused("absent", "guard", create(nil))
	if err := create(map[string]string{"tolerate": "true"}); err != nil {
		t.Errorf("tolerated: %v", err)
	}
	guard := &fake{}
	s := w.connect("10-guard", guard)
	if err := create(nil); err != nil {
		t.Errorf("present: %v", err)
	}
	refused("absent, by annotation", "extra", create(map[string]string{"required-plugins.noderesource.dev": "[extra]"}))
	refused("absent, by the old annotation", "extra", create(map[string]string{"required-plugins.nri.io/container.app": "[extra]"}))
	guard.set(func() { guard.at = sleep(t, "create", "run", "start") })
	refused("slow", "guard", create(nil))
	refused("slow at a pod", "guard", w.RunPodSandbox(t.Context(), w.pod("q", nil)))
	c := w.known("k", "p")
	refused("slow at a start", "guard", w.StartContainer(t.Context(), w.pod("p", nil), c))
	if err := w.StartContainer(t.Context(), w.pod("p", map[string]string{"tolerate": "true"}), c); err != nil {
		t.Errorf("slow and tolerated: %v", err)
	}
	if !slices.Contains(w.Names(), "10-guard") {
		t.Error("it was dropped")
	}
	guard.set(func() {
		guard.at = func(_ context.Context, hook, _ string) error {
			if hook == "create" {
				s.Stop()
			}
			return nil
		}
	})
	refused("dying", "guard", create(nil))
	eventually(t, "it is gone", func() bool { return len(w.Names()) == 0 })
	refused("dead", "guard", create(nil))
	w.connect("10-guard", &fake{})
	if err := create(nil); err != nil {
		t.Errorf("back: %v", err)
	}
}

// An optional plugin that sleeps at any hook is left out of it and kept; who
// waits behind it waits no longer than its limit.
//
// promise: P41
func TestSleeper(t *testing.T) {
	w := newWorld(t, short)
	w.Start(t.Context())
	sleeper, second := &fake{}, &fake{}
	w.connect("10-sleeper", sleeper)
	w.connect("20-second", second)
	sleeper.set(func() {
		sleeper.at = sleep(t, "run", "create", "created", "start", "started", "update", "updated", "stop", "remove")
	})
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			p := w.pod(fmt.Sprint("p", i), nil)
			if err := w.RunPodSandbox(t.Context(), p); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	// One limit for those who met it first, and a tenth of it for who came then.
	if took := time.Since(begin); took > 3*limit {
		t.Errorf("ten pods behind a sleeping plugin: %s", took)
	}
	p := w.pod("p", nil)
	c, spec := w.container("c", "p")
	if err := w.CreateContainer(t.Context(), p, c, spec); err != nil {
		t.Error(err)
	}
	w.PostCreateContainer(t.Context(), p, c)
	if err := w.StartContainer(t.Context(), p, c); err != nil {
		t.Error(err)
	}
	w.PostStartContainer(t.Context(), p, c)
	r, err := w.UpdateContainer(t.Context(), p, c, &runtime.LinuxContainerResources{CpuShares: 3})
	if err != nil || r.CpuShares != 3 {
		t.Errorf("%v %v", r, err)
	}
	w.PostUpdateContainer(t.Context(), p, c)
	if err := errors.Join(w.StopContainer(t.Context(), p, c), w.RemoveContainer(t.Context(), p, c), w.StopPodSandbox(t.Context(), p), w.RemovePodSandbox(t.Context(), p)); err != nil {
		t.Error(err)
	}
	for _, what := range []string{"run p9", "create c", "created c", "start c", "started c", "update c", "updated c", "stop c", "remove c", "stop p", "remove p"} {
		if !second.told(what) {
			t.Errorf("the other plugin was not told %q", what)
		}
	}
	if !slices.Equal(w.Names(), []string{"10-sleeper", "20-second"}) {
		t.Errorf("%q", w.Names())
	}
	// It wakes up and is asked again.
	sleeper.set(func() { sleeper.at = nil })
	eventually(t, "it is asked again", func() bool {
		if err := w.RunPodSandbox(t.Context(), w.pod("late", nil)); err != nil {
			t.Fatal(err)
		}
		return sleeper.told("run late")
	})
	late := 0.0
	for name, n := range metricstest.Read(t, w.metrics) {
		if strings.HasPrefix(name, "containerd_nri_plugin_invocations_total deadline_exceeded ") && strings.HasSuffix(name, " 10-sleeper error") {
			late += n
		}
	}
	if late < 10 {
		t.Errorf("%v calls without an answer in time", late)
	}
}

// A plugin that does not read its connection, does not register, or sleeps when
// it is synchronized keeps nobody.
//
// promise: P41
func TestStuck(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.RequestTimeout, c.RegistrationTimeout = limit, limit })
	w.Start(t.Context())
	eventually(t, "socket", func() bool { _, err := os.Stat(w.Config.SocketPath); return err == nil })
	mute, err := net.Dial("unix", w.Config.SocketPath)
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	asleep := &fake{}
	asleep.at = sleep(t, "sync")
	go w.dial("10-asleep", asleep)
	eventually(t, "it is being synchronized", func() bool { return asleep.told("sync ") })
	begin := time.Now()
	if err := w.RunPodSandbox(t.Context(), w.pod("p", nil)); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 2*limit {
		t.Errorf("a pod waited %s for the synchronisation", took)
	}
	eventually(t, "who does not synchronize is dropped", func() bool { return len(w.Names()) == 0 })
	if _, err := mute.Read(make([]byte, 1)); err == nil {
		t.Error("who does not register is kept")
	}
	w.connect("20-fine", &fake{})
}

// A plugin that joins while containers are made hears of each exactly once: by
// the synchronisation or by being asked.
//
// contract: 1.4.14
func TestJoin(t *testing.T) {
	w := newWorld(t, nil)
	w.Start(t.Context())
	w.connect("10-first", &fake{at: func(context.Context, string, string) error { time.Sleep(time.Millisecond); return nil }})
	p := w.pod("p", nil)
	var wg sync.WaitGroup
	late := &fake{}
	for i := range 40 {
		wg.Go(func() {
			c, spec := w.container(fmt.Sprint("c", i), "p")
			if err := w.CreateContainer(t.Context(), p, c, spec); err != nil {
				t.Error(err)
			}
			if err := w.Containers.Add(c); err != nil {
				t.Error(err)
			}
			w.PostCreateContainer(t.Context(), p, c)
		})
		if i == 20 {
			w.connect("20-late", late)
		}
	}
	wg.Wait()
	for i := range 40 {
		id := fmt.Sprint("c", i)
		seen := slices.ContainsFunc(late.ctrs, func(c *api.Container) bool { return c.Id == id })
		if asked := late.told("create " + id); seen == asked {
			t.Errorf("%s: synchronized %v, asked %v", id, seen, asked)
		}
	}
}

// A plugin that joins while there is no other hears of what was being made.
//
// contract: 1.4.14
func TestFirstToJoin(t *testing.T) {
	w := newWorld(t, nil)
	w.Start(t.Context())
	p, q := w.pod("p", nil), w.pod("q", nil)
	c, spec := w.container("c", "p")
	d, spec2 := w.container("d", "p")
	if err := errors.Join(w.RunPodSandbox(t.Context(), p), w.RunPodSandbox(t.Context(), q), w.CreateContainer(t.Context(), p, c, spec), w.CreateContainer(t.Context(), p, d, spec2),
		w.RemovePodSandbox(t.Context(), q), w.RemoveContainer(t.Context(), p, d)); err != nil { // two come to nothing
		t.Fatal(err)
	}
	f := &fake{}
	w.dial("10-first", f)
	eventually(t, "it is admitted", func() bool { return len(w.Names()) == 1 })
	if err := errors.Join(w.Pods.Add(p), w.Containers.Add(c)); err != nil {
		t.Fatal(err)
	}
	w.PostCreateContainer(t.Context(), p, c)
	eventually(t, "it is synchronized", func() bool { return f.told("sync ") })
	<-f.synced
	if len(f.pods) != 1 || len(f.ctrs) != 1 || !f.told("created c") || f.told("create c") {
		t.Errorf("%d pods, %d containers, %q", len(f.pods), len(f.ctrs), f.diary)
	}
}

// Who is given little time has as long as everybody to notice that it is over:
// it is not taken for one that does not read its connection.
//
// promise: P41
func TestBriefly(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.RequestTimeout = 4 * time.Second })
	a, b := net.Pipe()
	defer b.Close()
	p := &plug{host: w.Host, identity: identity{"10", "brief", ""}, mux: multiplex.Multiplex(a), gone: make(chan struct{}), alarm: make(chan struct{})}
	err := p.direct(t.Context(), "RunPodSandbox", time.Millisecond, func(ctx context.Context) error {
		<-ctx.Done()
		time.Sleep(50 * time.Millisecond) // the machine is busy
		return ctx.Err()
	})
	if !errors.As(err, &noAnswer{}) {
		t.Errorf("%v", err)
	}
	select {
	case <-p.gone:
		t.Error("it was dropped:", p.why)
	default:
	}
}

// contract: 1.4.10
// promise: P41
func TestPages(t *testing.T) {
	w := newWorld(t, nil)
	w.Start(t.Context())
	big := strings.Repeat("x", 256<<10)
	for i := range 30 {
		if err := w.Pods.Add(w.pod(fmt.Sprint("p", i), map[string]string{"big": big})); err != nil {
			t.Fatal(err)
		}
		w.known(fmt.Sprint("c", i), fmt.Sprint("p", i))
	}
	f := &fake{}
	w.connect("10-reader", f)
	if len(f.pods) != 30 || len(f.ctrs) != 30 {
		t.Errorf("%d pods, %d containers", len(f.pods), len(f.ctrs))
	}
}

// contract: 1.4.13
func TestValidators(t *testing.T) {
	w := newWorld(t, func(c *Config) {
		c.DefaultValidator.Enable, c.DefaultValidator.RejectOCIHookAdjustment = true, true
	})
	w.Start(t.Context())
	f := &fake{check: func(r *api.ValidateContainerAdjustmentRequest) error {
		if r.Adjust.Annotations["forbidden"] != "" {
			return errors.New("not here")
		}
		return nil
	}}
	w.connect("50-judge", f)
	for key, hooks := range map[string]*api.Hooks{"allowed": nil, "forbidden": nil, "hooked": {Prestart: []*api.Hook{{Path: "/bin/true"}}}} {
		f.set(func() {
			f.create = func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
				return &api.ContainerAdjustment{Annotations: map[string]string{key: "1"}, Hooks: hooks}, nil
			}
		})
		c, s := w.container("c", "p")
		if err := w.CreateContainer(t.Context(), w.pod("p", nil), c, s); (err == nil) != (key == "allowed") {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// The stub has no call for evictions; the wire has.
//
// contract: 1.4.9
func TestEvict(t *testing.T) {
	w := newWorld(t, nil)
	p := &plug{host: w.Host, registered: make(chan struct{})}
	req := &api.UpdateContainersRequest{Evict: []*api.ContainerEviction{{ContainerId: "c", Reason: "test"}}}
	if _, err := p.UpdateContainers(t.Context(), req); err == nil || len(w.evicted) > 0 {
		t.Errorf("before it registers: %v %q", err, w.evicted)
	}
	if _, err := p.RegisterPlugin(t.Context(), &api.RegisterPluginRequest{PluginName: "evictor", PluginIdx: "10"}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.RegisterPlugin(t.Context(), &api.RegisterPluginRequest{PluginName: "other", PluginIdx: "10"}); err == nil {
		t.Error("it registers twice")
	}
	if _, err := p.UpdateContainers(t.Context(), req); err != nil || !slices.Equal(w.evicted, []string{"c"}) {
		t.Errorf("%v %q", err, w.evicted)
	}
}

// contract: 1.4.13
func TestIneffective(t *testing.T) {
	c := DefaultConfig()
	var got []string
	report := func(_ string, key ...string) { got = append(got, strings.Join(key, ".")) }
	c.Ineffective(report)
	if len(got) > 0 {
		t.Errorf("%q", got)
	}
	c.DefaultValidator.RequiredPlugins, c.RequestTimeout = []string{"x"}, 0
	if c.Ineffective(report); !slices.Equal(got, []string{"default_validator.required_plugins", "plugin_request_timeout"}) {
		t.Errorf("%q", got)
	}
	if h := New(Deps{Config: c, Log: slog.New(slog.DiscardHandler)}); h.Config.RequestTimeout != 2*time.Second {
		t.Errorf("%s", h.Config.RequestTimeout)
	}
}

// contract: 1.4.8
func TestSocketInUse(t *testing.T) {
	var theirs net.Listener
	w := newWorld(t, func(c *Config) {
		var err error
		if theirs, err = net.Listen("unix", c.SocketPath); err != nil {
			t.Fatal(err)
		}
	})
	defer theirs.Close()
	w.Start(t.Context())
	w.Close()
	if c, err := net.Dial("unix", w.Config.SocketPath); err != nil {
		t.Errorf("the other daemon's socket is gone: %v", err)
	} else {
		c.Close()
	}
}

// An installed plugin is this test program.
//
// contract: 1.4.8
func TestInstalled(t *testing.T) {
	var dir string
	w := newWorld(t, func(c *Config) {
		dir = filepath.Dir(c.SocketPath)
		for _, d := range []string{c.PluginPath, c.PluginConfigPath} {
			if err := os.Mkdir(d, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		self, err := os.Executable()
		if err == nil {
			err = os.Symlink(self, c.PluginPath+"/30-installed")
		}
		if err = errors.Join(err, os.WriteFile(c.PluginConfigPath+"/installed.conf", []byte(dir+"/said"), 0o600), os.WriteFile(c.PluginPath+"/no-number", nil, 0o700)); err != nil {
			t.Fatal(err)
		}
	})
	w.Start(t.Context())
	if !slices.Equal(w.Names(), []string{"30-installed"}) {
		t.Fatalf("%q", w.Names())
	}
	if err := w.RunPodSandbox(t.Context(), w.pod("p", nil)); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(dir + "/said"); err != nil || string(b) != "p" {
		t.Errorf("%q %v", b, err)
	}
}

// A plugin that is stopped and so fills its connection is ended, and holds
// nobody longer than its limit; one that is installed is started again.
//
// promise: P41
func TestStopped(t *testing.T) {
	var dir string
	w := newWorld(t, func(c *Config) {
		dir = filepath.Dir(c.SocketPath)
		c.RequestTimeout = time.Second
		self, err := os.Executable()
		if err = errors.Join(err, os.Mkdir(c.PluginPath, 0o700), os.Symlink(self, c.PluginPath+"/30-installed"), os.Mkdir(c.PluginConfigPath, 0o700),
			os.WriteFile(c.PluginConfigPath+"/30-installed.conf", []byte(dir+"/said"), 0o600)); err != nil {
			t.Fatal(err)
		}
	})
	w.Start(t.Context())
	eventually(t, "the plugin takes part", func() bool { return len(w.Names()) == 1 })
	data, err := os.ReadFile(dir + "/said.pid")
	pid, perr := strconv.Atoi(string(data))
	if err = errors.Join(err, perr); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	big := w.pod("p", map[string]string{"big": strings.Repeat("x", 1<<20)})
	for limit := time.Now().Add(40 * time.Second); len(w.Names()) > 0; {
		begin := time.Now()
		if err := w.RunPodSandbox(t.Context(), big); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > 10*time.Second || time.Now().After(limit) {
			t.Fatalf("a call took %s", took)
		}
	}
	eventually(t, "the stopped process is gone", func() bool { return syscall.Kill(pid, 0) != nil })
}

// installed is what the program is when a Host starts it.
type installed struct{ path string }

func (i *installed) Configure(_ context.Context, config, _, _ string) (api.EventMask, error) {
	i.path = config
	return 0, os.WriteFile(config+".pid", fmt.Append(nil, os.Getpid()), 0o600)
}
func (i *installed) RunPodSandbox(_ context.Context, p *api.PodSandbox) error {
	return os.WriteFile(i.path, []byte(p.Id), 0o600)
}

func TestMain(m *testing.M) {
	if os.Getenv(api.PluginNameEnvVar) == "installed" {
		s, err := stub.New(&installed{})
		if err == nil {
			err = s.Run(context.Background())
		}
		if err != nil {
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}
