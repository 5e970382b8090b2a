package cricontainer

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/criimage"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/engine/native"
	"github.com/gantryd/gantry/internal/lib/fault"
)

// images has one image, by any name but "missing".
type images struct{ img criimage.Image }

func (i *images) Resolve(_ context.Context, ref, _ string) (criimage.Image, error) {
	if ref == "missing" {
		return criimage.Image{}, fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
	}
	return i.img, nil
}

func (i *images) EnsureUnpacked(context.Context, view.Records, criimage.Image) error { return nil }

// tasks are imagined ones whose calls can be changed.
type tasks struct {
	*memory.Tasks
	mu      sync.Mutex
	signals []uint32
	create  func(context.Context, container.ID, task.CreateOptions) error
	kill    func(context.Context, container.ID, uint32) error
	get     func(context.Context, container.ID) error
	started func() // a task runs, and its caller was not told yet

	checkpoint func(*options.CheckpointOptions) error
}

func (t *tasks) Checkpoint(_ context.Context, _ container.ID, _ string, a typed.Any) ([]ocispec.Descriptor, error) {
	var o options.CheckpointOptions
	if err := proto.Unmarshal(a.Value, &o); err != nil || a.URL != "containerd.runc.v1.CheckpointOptions" {
		return nil, errdefs.ErrInvalidArgument
	}
	return nil, t.checkpoint(&o)
}

func (t *tasks) hook(fn func()) { t.mu.Lock(); defer t.mu.Unlock(); fn() }

func (t *tasks) sent() []uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.signals)
}

func (t *tasks) Create(ctx context.Context, id container.ID, o task.CreateOptions) (uint32, error) {
	t.mu.Lock()
	fn := t.create
	t.mu.Unlock()
	if fn != nil {
		if err := fn(ctx, id, o); err != nil {
			return 0, err
		}
	}
	return t.Tasks.Create(ctx, id, o)
}

func (t *tasks) Start(ctx context.Context, id container.ID, exec task.ExecID) (uint32, error) {
	pid, err := t.Tasks.Start(ctx, id, exec)
	t.mu.Lock()
	fn := t.started
	t.mu.Unlock()
	if fn != nil {
		fn()
	}
	return pid, err
}

func (t *tasks) Kill(ctx context.Context, id container.ID, exec task.ExecID, sig uint32, all bool) error {
	t.mu.Lock()
	fn := t.kill
	t.signals = append(t.signals, sig)
	t.mu.Unlock()
	if fn != nil {
		if err := fn(ctx, id, sig); err != nil {
			return err
		}
	}
	return t.Tasks.Kill(ctx, id, exec, sig, all)
}

func (t *tasks) Get(ctx context.Context, id container.ID, exec task.ExecID) (task.Process, error) {
	t.mu.Lock()
	fn := t.get
	t.mu.Unlock()
	if fn != nil {
		if err := fn(ctx, id); err != nil {
			return task.Process{}, err
		}
	}
	return t.Tasks.Get(ctx, id, exec)
}

// slow is a snapshotter whose Prepare can be held up.
type slow struct {
	snapshot.Store
	gate func(context.Context) error
}

func (s *slow) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	if s.gate != nil {
		if err := s.gate(ctx); err != nil {
			return nil, err
		}
	}
	return s.Store.Prepare(ctx, key, parent, labels)
}

// node is a host with one pod, on which services live one after another.
type node struct {
	t      *testing.T
	dir    string
	bus    *memory.Bus
	src    wiretest.Source
	tasks  *tasks
	snaps  *slow
	images *images
	log    *lockedBuffer
	podID  string
	config cristate.RuntimeConfig
	limits Limits
	change func(*Deps)

	s      *Service
	kill   func() // ends it as a crash does
	pod    *cristate.Pod
	events *cristate.Events
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}
func (l *lockedBuffer) String() string { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

// rootfs is the image: a file system below a directory, and its configuration.
func newNode(t *testing.T, config ocispec.ImageConfig, fill func(root string)) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the image is mounted")
	}
	n := &node{t: t, dir: t.TempDir(), bus: memory.NewBus(), log: &lockedBuffer{}, podID: cristate.NewID(), config: cristate.DefaultRuntimeConfig()}
	n.limits = Limits{Create: 20 * time.Second, Start: 20 * time.Second, Kill: 10 * time.Second, Remove: 20 * time.Second, Linger: time.Minute}
	store, err := native.Open(filepath.Join(n.dir, "native"), native.Config{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	n.snaps = &slow{Store: store}
	mounts, err := store.Prepare(t.Context(), "base", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	root := mounts[0].Source
	n.write(filepath.Join(root, "etc/passwd"), "root:x:0:0::/:/bin/sh\napp:x:1000:1001::/:/bin/sh\n")
	n.write(filepath.Join(root, "etc/group"), "root:x:0:\nextra:x:2000:app\n")
	if fill != nil {
		fill(root)
	}
	if err := store.Commit(t.Context(), "chain", "base", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	n.images = &images{criimage.Image{ID: "sha256:config", RepoTags: []string{"reg/app:1"}, ChainID: "chain", Snapshotter: "native", Spec: ocispec.Image{Config: config}}}
	containers := memory.NewContainers()
	n.tasks = &tasks{Tasks: memory.NewTasks(cristate.Namespace, containers, n.bus)}
	n.src = wiretest.Source{ContainerStore: containers, SandboxStore: memory.NewSandboxes(), LeaseStore: memory.NewLeases(), ContentStore: memory.NewContent(),
		SnapshotStores: map[string]snapshot.Store{"native": n.snaps}, TaskStore: n.tasks}
	if _, err := n.src.SandboxStore.Create(t.Context(), sandbox.Sandbox{ID: n.podID, Runtime: container.Runtime{Name: "io.containerd.runc.v2"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.src.LeaseStore.Create(t.Context(), lease.Lease{ID: lease.ID(n.podID)}); err != nil {
		t.Fatal(err)
	}
	n.boot()
	return n
}

func (n *node) write(path, text string) {
	n.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) podConfig() *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: "pod", Namespace: "ns", Uid: "uid"}, LogDirectory: filepath.Join(n.dir, "logs"),
		Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{Privileged: true}}}
}

// boot starts a service on what is stored, as a daemon that starts. The one
// before it is left as it is: killed.
func (n *node) boot() {
	n.t.Helper()
	if n.kill != nil {
		n.kill()
	}
	pods, all := cristate.NewPods(), cristate.NewContainers()
	n.pod = cristate.NewPod(cristate.PodMeta{ID: n.podID, Name: "pod_ns_uid_0", Config: n.podConfig()},
		cristate.PodStatus{State: cristate.PodReady, Namespaces: map[string]string{"network": "/ns/net", "ipc": "/ns/ipc", "uts": "/ns/uts", "pid": "/ns/pid"}})
	if err := pods.Add(n.pod); err != nil {
		n.t.Fatal(err)
	}
	n.events = cristate.NewEvents()
	d := Deps{
		Views: n.src, Events: n.bus, Pods: pods, Containers: all, Images: n.images, Config: n.config, Limits: n.limits,
		Notifier: &cristate.Notifier{Pods: pods, Containers: all, Events: n.events, Names: func(id string) cristate.ImageNames { return cristate.ImageNames{ID: id} }},
		Host:     func(context.Context, cristate.Runtime) crispec.Host { return crispec.Host{} },
		PodDir:   func(id string) string { return filepath.Join(n.dir, "root/sandboxes", id) }, PodShm: func(id string) string { return filepath.Join(n.dir, "state/sandboxes", id, "shm") },
		Root: filepath.Join(n.dir, "root"), State: filepath.Join(n.dir, "state"),
		Log: slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if n.change != nil {
		n.change(&d)
	}
	s, err := New(d)
	if err != nil {
		n.t.Fatal(err)
	}
	n.s = s
	if err := s.Recover(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	killed := false
	n.kill = func() { killed = true; s.sub.Close(); cancel() }
	n.t.Cleanup(func() {
		cancel()
		if killed {
			return // it may be stuck for ever where it was killed
		}
		select {
		case err := <-done:
			if err != nil {
				n.t.Error(err)
			}
		case <-time.After(30 * time.Second):
			n.t.Error("Run does not end")
		}
		if n.t.Failed() {
			n.t.Logf("log:\n%s", n.log)
		}
	})
}

// app is a container that runs until it is told to end.
func app(name string, args ...string) *runtime.ContainerConfig {
	if len(args) == 0 {
		args = []string{"sleep"}
	}
	return &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: name}, Image: &runtime.ImageSpec{Image: "reg/app:1"}, Command: args, LogPath: name + "/0.log",
		Linux: &runtime.LinuxContainerConfig{}}
}

func (n *node) create(c *runtime.ContainerConfig) string {
	n.t.Helper()
	id, err := n.s.Create(n.t.Context(), n.podID, c, n.podConfig())
	if err != nil {
		n.t.Fatal(err)
	}
	return id
}

func (n *node) run(c *runtime.ContainerConfig) string {
	n.t.Helper()
	id := n.create(c)
	if err := n.s.Start(n.t.Context(), id); err != nil {
		n.t.Fatal(err)
	}
	return id
}

func (n *node) get(id string) *cristate.Container {
	n.t.Helper()
	c, err := n.s.Containers.Get(id)
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

func (n *node) ended(id string) cristate.Status {
	n.t.Helper()
	c := n.get(id)
	select {
	case <-c.Gone():
	case <-time.After(20 * time.Second):
		n.t.Fatalf("container does not end: %+v", c.Status())
	}
	return c.Status()
}

func (n *node) until(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("not in time: %s", what)
		}
	}
}

// spec is what was stored of a container.
func (n *node) spec(id string) *specs.Spec {
	n.t.Helper()
	spec, err := n.s.Spec(n.t.Context(), id)
	if err != nil {
		n.t.Fatal(err)
	}
	return spec
}

// nothingLeft fails unless containers have left nothing: records, snapshots,
// directories, mounts, names, tasks.
func (n *node) nothingLeft() {
	n.t.Helper()
	if left := n.left(); len(left) > 0 {
		n.t.Errorf("left: %q", left)
	}
}

func (n *node) left() []string {
	var left []string
	add := func(err error) {
		if err != nil {
			left = append(left, err.Error())
		}
	}
	add(n.src.ContainerStore.Walk(n.t.Context(), func(c container.Container) error { left = append(left, "record "+string(c.ID)); return nil }))
	add(n.snaps.Walk(n.t.Context(), func(i snapshot.Info) error {
		if i.Name != "chain" {
			left = append(left, "snapshot "+i.Name)
		}
		return nil
	}))
	for _, dir := range []string{"root/containers", "state/containers", "state/tmpmounts"} {
		entries, _ := os.ReadDir(filepath.Join(n.dir, dir))
		for _, e := range entries {
			left = append(left, dir+"/"+e.Name())
		}
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	add(err)
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, n.dir+"/state") {
			left = append(left, "mount "+line)
		}
	}
	all, err := n.src.TaskStore.List(n.t.Context())
	add(err)
	for _, p := range all {
		left = append(left, "task "+p.ID)
	}
	for _, c := range n.s.Containers.List() {
		left = append(left, "index "+c.ID())
	}
	return left
}

func (n *node) kinds() []string {
	n.t.Helper()
	sub := n.events.Subscribe()
	defer sub.Close()
	var out []string
	for {
		e, err := sub.Next(n.t.Context())
		if err != nil {
			n.t.Fatal(err)
		}
		out = append(out, strings.TrimSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_EVENT"))
		if e.ContainerEventType == runtime.ContainerEventType_CONTAINER_DELETED_EVENT {
			return out
		}
	}
}

// crashAt makes a service stop for ever at a point, as if the daemon were
// killed there. The channel is closed when it is reached.
func crashAt(t *testing.T, point string) (*fault.Points, chan struct{}) {
	t.Helper()
	reached := make(chan struct{})
	p, err := fault.Parse(point+":1", func(string) { close(reached); select {} })
	if err != nil {
		t.Fatal(err)
	}
	return p, reached
}
