package cripod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cni"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/lib/attempt"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/mountx"
)

// fakeNet keeps what was added in files, as an IPAM plug-in does.
type fakeNet struct {
	dir string

	mu       sync.Mutex
	setup    error
	teardown error
	adopted  []string
}

func (n *fakeNet) Setup(_ context.Context, p cni.Pod) (cni.Result, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, err := os.Stat(p.NetNS); err != nil {
		return cni.Result{}, err
	}
	if err := os.WriteFile(filepath.Join(n.dir, p.ID), nil, 0o600); err != nil {
		return cni.Result{}, err
	}
	return cni.Result{IP: "10.9.8.7", AdditionalIPs: []string{"fd00::7"}, Raw: json.RawMessage(`{"x":1}`)}, n.setup
}

func (n *fakeNet) Teardown(_ context.Context, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.teardown != nil {
		return n.teardown
	}
	if err := os.Remove(filepath.Join(n.dir, id)); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (n *fakeNet) Adopt(_ context.Context, p cni.Pod) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.adopted = append(n.adopted, p.ID)
	return nil
}

func (n *fakeNet) Reclaim(keep func(string) bool) {
	entries, _ := os.ReadDir(n.dir)
	for _, e := range entries {
		if !keep(e.Name()) {
			os.Remove(filepath.Join(n.dir, e.Name()))
		}
	}
}

func (n *fakeNet) fail(setup, teardown error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.setup, n.teardown = setup, teardown
}

// fakeImages has the pause image.
type fakeImages struct {
	snapshotter string
	asked       atomic.Int32
}

func (i *fakeImages) EnsureSandboxImage(context.Context, string, *runtime.PodSandboxConfig) (Image, error) {
	i.asked.Add(1)
	return Image{Name: "pause:1", Snapshotter: i.snapshotter}, nil
}

// fakeContainers notes what is asked.
type fakeContainers struct {
	mu   sync.Mutex
	told []string
	err  error
}

func (c *fakeContainers) tell(what, id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told = append(c.told, what+" "+id)
	return c.err
}
func (c *fakeContainers) StopAll(_ context.Context, id string) error   { return c.tell("stop", id) }
func (c *fakeContainers) RemoveAll(_ context.Context, id string) error { return c.tell("remove", id) }

// controllers are those of the tests; a broken one fails where it is told to.
type controllers map[string]sandbox.Controller

func (c controllers) Controller(_ namespace.ID, name string) (sandbox.Controller, error) {
	if x, ok := c[name]; ok {
		return x, nil
	}
	return nil, fmt.Errorf("sandboxer %q: %w", name, errdefs.ErrNotFound)
}

type broken struct {
	sandbox.Controller
	create, start, status error
}

func (b *broken) Create(ctx context.Context, s sandbox.Sandbox, o sandbox.CreateOptions) error {
	if err := b.Controller.Create(ctx, s, o); err != nil {
		return err
	}
	return b.create
}

func (b *broken) Start(ctx context.Context, id string) (sandbox.Instance, error) {
	x, err := b.Controller.Start(ctx, id)
	return x, errors.Join(err, b.start)
}

func (b *broken) Status(ctx context.Context, id string, verbose bool) (sandbox.Status, error) {
	if b.status != nil {
		return sandbox.Status{}, b.status
	}
	return b.Controller.Status(ctx, id, verbose)
}

// nri notes what is asked, and refuses.
type nri struct {
	told   []string
	refuse error
}

func (n *nri) RunPodSandbox(context.Context, *cristate.Pod) error {
	n.told = append(n.told, "run")
	return n.refuse
}
func (n *nri) StopPodSandbox(context.Context, *cristate.Pod) error {
	n.told = append(n.told, "stop")
	return nil
}
func (n *nri) RemovePodSandbox(context.Context, *cristate.Pod) error {
	n.told = append(n.told, "remove")
	return nil
}
func (n *nri) UpdatePodSandbox(context.Context, *cristate.Pod, *runtime.LinuxContainerResources, *runtime.LinuxContainerResources) error {
	n.told = append(n.told, "update")
	return n.refuse
}
func (n *nri) PostUpdatePodSandbox(context.Context, *cristate.Pod) error {
	n.told = append(n.told, "updated")
	return nil
}

// world is a node; up starts a daemon on it.
type world struct {
	t          testing.TB
	dirs       Dirs
	src        view.Source
	tasks      *memory.Tasks
	net        *fakeNet
	images     *fakeImages
	containers *fakeContainers
	nri        *nri
	broken     map[string]*broken
	registry   *prometheus.Registry // of the service that was made last
}

func newWorld(t testing.TB, dir string) *world {
	if os.Getuid() != 0 {
		t.Skip("making namespaces takes root")
	}
	w := &world{t: t, dirs: Dirs{Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"), NetNS: filepath.Join(dir, "netns")},
		net: &fakeNet{dir: filepath.Join(dir, "ipam")}, images: &fakeImages{snapshotter: "native"}, containers: &fakeContainers{}, nri: &nri{}, broken: map[string]*broken{}}
	if err := os.MkdirAll(w.net.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mountx.UnmountRecursive(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return w
}

// inMemory gives the node stores.
func inMemory(t testing.TB) *world {
	w := newWorld(t, t.TempDir())
	containers := memory.NewContainers()
	w.tasks = memory.NewTasks(cristate.Namespace, containers, memory.NewBus())
	w.src = wiretest.Source{ContainerStore: containers, SandboxStore: memory.NewSandboxes(), LeaseStore: memory.NewLeases(), TaskStore: w.tasks,
		SnapshotStores: map[string]snapshot.Store{"native": memory.NewSnapshots()}}
	return w
}

func specOf(_ context.Context, in SpecInput) (*specs.Spec, error) {
	s := &specs.Spec{Linux: &specs.Linux{Sysctl: in.Meta.Config.GetLinux().GetSysctls()}}
	if in.Image != nil {
		s.Process = &specs.Process{Args: []string{"/pause"}}
	}
	return s, nil
}

// up starts a daemon, with its limits shortened.
func (w *world) up(points *fault.Points) *Service {
	cfg := cristate.DefaultRuntimeConfig()
	for _, name := range []string{cristate.SandboxerPauseless, untrusted} {
		rt := cfg.Containerd.Runtimes["runc"]
		rt.Sandboxer = cristate.SandboxerPauseless
		cfg.Containerd.Runtimes[name] = rt
	}
	log := slog.New(slog.NewTextHandler(w.t.Output(), nil))
	cd := ControllerDeps{Views: w.src, Namespace: cristate.Namespace, Config: cfg, Dirs: w.dirs, Images: w.images, Spec: specOf, Log: log}
	pause := NewPodSandbox(cd)
	all := controllers{}
	for name, c := range map[string]sandbox.Controller{cristate.SandboxerPodSandbox: pause, cristate.SandboxerPauseless: NewPauseless(cd, pause)} {
		w.broken[name] = &broken{Controller: c}
		all[name] = w.broken[name]
	}
	pods := cristate.NewPods()
	w.registry = prometheus.NewRegistry()
	s := New(Deps{Views: w.src, Controllers: all, Pods: pods, Config: cfg, Dirs: w.dirs, Network: w.net, Images: w.images, Containers: w.containers, NRI: w.nri,
		Notify: &cristate.Notifier{Pods: pods, Containers: cristate.NewContainers(), Events: cristate.NewEvents()}, Metrics: w.registry, Log: log, Faults: points})
	s.group = attempt.New(runLimit, time.Millisecond, s.discard)
	w.t.Cleanup(func() {
		if err := s.Close(context.Background()); err != nil {
			w.t.Error(err)
		}
	})
	return s
}

// config is a pod's; the number tells pods apart.
func config(n int) *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: fmt.Sprint("pod", n), Namespace: "ns", Uid: fmt.Sprint("uid", n)}, Hostname: "inside",
		Labels: map[string]string{"a": "b"}, DnsConfig: &runtime.DNSConfig{Servers: []string{"10.0.0.1"}, Searches: []string{"x.y", "y"}, Options: []string{"ndots:5"}},
		Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}}}}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// left is all there is of pods on the node.
func (w *world) left() (out []string) {
	ctx := context.Background()
	v := must[view.View](w.t)(w.src.In(cristate.Namespace, ""))
	for _, r := range must[[]sandbox.Sandbox](w.t)(v.Sandboxes().List(ctx)) {
		out = append(out, "record "+r.ID)
	}
	leases, err := v.Leases().List(ctx)
	check(w.t, err)
	for _, l := range leases {
		out = append(out, "lease "+string(l.ID))
	}
	check(w.t, v.Containers().Walk(ctx, func(c container.Container) error {
		out = append(out, "container "+string(c.ID))
		return nil
	}))
	snapshots := must[snapshot.Store](w.t)(v.Snapshots("native"))
	check(w.t, snapshots.Walk(ctx, func(i snapshot.Info) error {
		out = append(out, "snapshot "+i.Name)
		return nil
	}))
	for _, p := range must2(w.tasks.List(ctx)) {
		out = append(out, "task "+p.ID)
	}
	for _, dir := range []string{filepath.Join(w.dirs.Root, "sandboxes"), filepath.Join(w.dirs.State, "sandboxes"), w.dirs.NetNS, w.net.dir} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			w.t.Fatal(err)
		}
		for _, e := range entries {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	check(w.t, err)
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, filepath.Dir(w.dirs.Root)) {
			out = append(out, "mount "+strings.TrimSpace(line))
		}
	}
	return out
}

func must2[T any](v T, _ error) T { return v }

// clean fails unless nothing is left of any pod.
func (w *world) clean() {
	w.t.Helper()
	if left := w.left(); len(left) != 0 {
		w.t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// until waits for a condition.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

var sandboxers = []string{cristate.SandboxerPodSandbox, cristate.SandboxerPauseless}

// handler is the runtime handler with a sandboxer.
func handler(sandboxer string) string {
	if sandboxer == cristate.SandboxerPauseless {
		return cristate.SandboxerPauseless
	}
	return ""
}

func (w *world) told(what string) bool { return slices.Contains(w.nri.told, what) }
