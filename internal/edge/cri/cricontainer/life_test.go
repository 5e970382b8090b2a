package cricontainer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// contract: 7.1.11, 7.1.12, 7.1.13, 7.1.14, 7.1.15, 7.3.29, 1.5.21, 1.5.22, 13.26
func TestLife(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{User: "app", StopSignal: "SIGUSR1", Labels: map[string]string{"from": "image", "io.cri-containerd.kind": "sandbox", "containerd.io/x": "y"}}, nil)
	c := app("a")
	c.Labels = map[string]string{"l": "v"}
	id := n.create(c)
	if len(id) != 64 {
		t.Errorf("id %q", id)
	}
	rec, err := n.src.ContainerStore.Get(t.Context(), container.ID(id))
	if err != nil {
		t.Fatal(err)
	}
	if l := rec.Labels; l["l"] != "v" || l["from"] != "image" || l[cristate.LabelKind] != cristate.KindContainer || l["containerd.io/x"] != "" {
		t.Errorf("labels %v", l)
	}
	if rec.SandboxID != n.podID || rec.SnapshotKey != id || rec.Snapshotter != "native" {
		t.Errorf("record %+v", rec)
	}
	m, err := cristate.DecodeContainer(rec.Extensions["io.cri-containerd.container.metadata"])
	if err != nil || m.Name != "a_pod_ns_uid_0" || m.ImageRef != "sha256:config" || m.LogPath != n.dir+"/logs/a/0.log" || m.StopSignal != "SIGUSR1" {
		t.Errorf("%+v %v", m, err)
	}
	if st, err := cristate.ReadStatus(filepath.Join(n.dir, "root/containers", id)); err != nil || st.CreatedAt == 0 || st.StartedAt != 0 {
		t.Errorf("%+v %v", st, err)
	}
	u := n.get(id).Answer(cristate.ImageNames{}).User.GetLinux()
	if u.GetUid() != 1000 || u.GetGid() != 1001 || !slices.Equal(u.GetSupplementalGroups(), []int64{1001, 2000}) {
		t.Errorf("user %v", u)
	}
	for _, m := range n.spec(id).Mounts {
		if m.Destination == "/dev/shm" && !strings.HasPrefix(m.Source, n.dir+"/state") {
			t.Errorf("shm %+v", m)
		}
	}
	if err := n.s.ReopenLog(t.Context(), id); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("reopen the log of a created container: %v", err)
	}
	if err := n.s.Start(t.Context(), id[:12]); err != nil {
		t.Fatal(err)
	}
	if st := n.get(id).Status(); st.State() != runtime.ContainerState_CONTAINER_RUNNING || st.Pid == 0 {
		t.Errorf("%+v", st)
	}
	p, err := n.tasks.Get(t.Context(), container.ID(id), "")
	if want := "file://" + n.dir + "/logs/a/0.log?format=cri&max-line=16384"; err != nil || p.IO.Stdout != want || p.IO.Stderr != want || p.IO.Stdin != "" {
		t.Errorf("%+v %v", p.IO, err)
	}
	if err := n.s.Start(t.Context(), id); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	info, err := n.s.Info(t.Context(), id)
	var told map[string]any
	if err != nil || json.Unmarshal([]byte(info["info"]), &told) != nil || told["sandboxID"] != n.podID || told["snapshotKey"] != id || told["runtimeSpec"] == nil {
		t.Errorf("info %v %v", info, err)
	}
	if err := n.s.Stop(t.Context(), id, time.Minute); err != nil {
		t.Fatal(err)
	}
	if st := n.get(id).Status(); st.State() != runtime.ContainerState_CONTAINER_EXITED || st.ExitCode != 128+int32(unix.SIGUSR1) || st.Reason != cristate.ReasonError {
		t.Errorf("%+v", st)
	}
	if got := n.tasks.sent(); len(got) != 1 {
		t.Errorf("signals %v", got)
	}
	if err := n.s.Stop(t.Context(), id, time.Minute); err != nil {
		t.Error(err)
	}
	if err := n.s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
	if k := n.kinds(); !slices.Equal(k, []string{"CREATED", "STARTED", "STOPPED", "DELETED"}) {
		t.Errorf("events %v", k)
	}
	for _, err := range []error{n.s.Stop(t.Context(), id, 0), n.s.Remove(t.Context(), id), n.s.Remove(t.Context(), "unknown")} {
		if err != nil {
			t.Error(err)
		}
	}
	if err := n.s.Start(t.Context(), id); !errdefs.IsNotFound(err) {
		t.Errorf("start of a removed one: %v", err)
	}
}

// contract: 7.1.14
func TestRemoveRunning(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	a := n.run(app("a"))
	n.create(app("b"))
	if err := n.s.StopAll(t.Context(), n.podID); err != nil {
		t.Error(err)
	}
	if st := n.get(a).Status(); st.ExitCode != 137 {
		t.Errorf("%+v", st)
	}
	n.run(app("c"))
	if err := n.s.RemoveAll(t.Context(), n.podID); err != nil {
		t.Error(err)
	}
	n.nothingLeft()
}

// A refused creation says why, and leaves nothing.
// contract: 7.1.11, 7.3.9, 7.3.10
func TestRefused(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, func(root string) {
		if err := os.Symlink("/etc/passwd", root+"/link"); err != nil {
			t.Fatal(err)
		}
	})
	id := func(v int64) *runtime.Int64Value { return &runtime.Int64Value{Value: v} }
	for what, c := range map[string]struct {
		change func(*runtime.ContainerConfig)
		is     func(error) bool
	}{
		"no name":        {func(c *runtime.ContainerConfig) { c.Metadata.Name = "" }, errdefs.IsInvalidArgument},
		"no image":       {func(c *runtime.ContainerConfig) { c.Image = nil }, errdefs.IsInvalidArgument},
		"missing image":  {func(c *runtime.ContainerConfig) { c.Image.Image = "missing" }, errdefs.IsNotFound},
		"log above":      {func(c *runtime.ContainerConfig) { c.LogPath = "../x" }, errdefs.IsInvalidArgument},
		"absolute log":   {func(c *runtime.ContainerConfig) { c.LogPath = "/etc/cron.d/x" }, errdefs.IsInvalidArgument},
		"log is the dir": {func(c *runtime.ContainerConfig) { c.LogPath = "a/.." }, errdefs.IsInvalidArgument},
		"uid too large": {func(c *runtime.ContainerConfig) {
			c.Linux.SecurityContext = &runtime.LinuxContainerSecurityContext{RunAsUser: id(1 << 31)}
		}, errdefs.IsOutOfRange},
		"group alone": {func(c *runtime.ContainerConfig) {
			c.Linux.SecurityContext = &runtime.LinuxContainerSecurityContext{RunAsGroup: id(5)}
		}, errdefs.IsInvalidArgument},
		"unknown user": {func(c *runtime.ContainerConfig) {
			c.Linux.SecurityContext = &runtime.LinuxContainerSecurityContext{RunAsUsername: "nobody"}
		}, errdefs.IsNotFound},
		"mount of nothing": {func(c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{{ContainerPath: "/x"}} }, errdefs.IsInvalidArgument},
		"mount nowhere":    {func(c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{{HostPath: "/tmp"}} }, errdefs.IsInvalidArgument},
		"nil mount":        {func(c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{nil} }, errdefs.IsInvalidArgument},
		"relative source":  {func(c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{{ContainerPath: "/x", HostPath: "tmp"}} }, errdefs.IsInvalidArgument},
		"rro without ro": {func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{ContainerPath: "/x", HostPath: n.dir, RecursiveReadOnly: true}}
		}, errdefs.IsInvalidArgument},
		"rro not possible": {func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{ContainerPath: "/x", HostPath: n.dir, RecursiveReadOnly: true, Readonly: true}}
		}, errdefs.IsFailedPrecondition},
		"two sources": {func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{ContainerPath: "/x", HostPath: n.dir, Image: &runtime.ImageSpec{Image: "i"}}}
		}, errdefs.IsInvalidArgument},
		"sub-path leads out": {func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{ContainerPath: "/x", ImageSubPath: "../..", Image: &runtime.ImageSpec{Image: "i"}}}
		}, errdefs.IsInvalidArgument},
		"sub-path missing": {func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{ContainerPath: "/x", ImageSubPath: "none", Image: &runtime.ImageSpec{Image: "i"}}}
		}, errdefs.IsNotFound},
		"sub-path a file": {func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{ContainerPath: "/x", ImageSubPath: "link", Image: &runtime.ImageSpec{Image: "i"}}}
		}, errdefs.IsInvalidArgument},
		"device missing":   {func(c *runtime.ContainerConfig) { c.Devices = []*runtime.Device{{HostPath: "/dev/none-such"}} }, errdefs.IsNotFound},
		"device is a file": {func(c *runtime.ContainerConfig) { c.Devices = []*runtime.Device{{HostPath: "/proc/self/exe"}} }, errdefs.IsInvalidArgument},
		"CDI is off":       {func(c *runtime.ContainerConfig) { c.CDIDevices = []*runtime.CDIDevice{{Name: "v.com/c=x"}} }, errdefs.IsFailedPrecondition},
		"seccomp missing": {func(c *runtime.ContainerConfig) {
			c.Linux.SecurityContext = &runtime.LinuxContainerSecurityContext{Seccomp: &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: n.dir + "/none"}}
		}, errdefs.IsNotFound},
	} {
		t.Run(what, func(t *testing.T) {
			config := app("a")
			c.change(config)
			_, err := n.s.Create(t.Context(), n.podID, config, nil)
			if !c.is(err) {
				t.Errorf("%v", err)
			}
			n.nothingLeft()
		})
	}
	if _, err := n.s.Create(t.Context(), "unknown", app("a"), nil); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	n.pod.Change(func(_ *cristate.PodMeta, st *cristate.PodStatus) { st.State = cristate.PodNotReady })
	if _, err := n.s.Create(t.Context(), n.podID, app("a"), nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	n.nothingLeft()
}

// A creation that joins one that is wanted differently gets its own container.
// promise: P5
func TestCreateJoinsAnother(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	n.snaps.gate = func(context.Context) error { once.Do(func() { close(entered); <-release }); return nil }
	moved := app("a")
	moved.Command = []string{"other"}
	var first, second string
	var wg sync.WaitGroup
	wg.Go(func() { first, _ = n.s.Create(t.Context(), n.podID, app("a"), nil) })
	<-entered
	calls := make(chan struct{})
	wg.Go(func() {
		close(calls)
		second, _ = n.s.Create(t.Context(), n.podID, moved, nil)
	})
	<-calls
	go close(release)
	wg.Wait()
	if first == second || first == "" || second == "" || n.spec(second).Process.Args[0] != "other" {
		t.Errorf("%q and %q", first, second)
	}
	if err := n.s.Remove(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// A repeated creation joins the one under way, whose caller may be gone.
// promise: P5
func TestCreateAgain(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	entered, release := make(chan struct{}), make(chan struct{})
	n.snaps.gate = func(context.Context) error { close(entered); <-release; return nil }
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() { _, err := n.s.Create(ctx, n.podID, app("a"), nil); gone <- err }()
	<-entered
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "prepare the snapshot") {
		t.Errorf("%v", err)
	}
	late, stop := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer stop()
	if _, err := n.s.Create(late, n.podID, app("a"), nil); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "prepare the snapshot") {
		t.Errorf("%v", err)
	}
	go close(release)
	id := n.create(app("a"))
	n.snaps.gate = nil
	if again := n.create(app("a")); again != id {
		t.Errorf("%s, then %s", id, again)
	}
	moved := app("a")
	moved.Command = []string{"other"}
	other := n.create(moved)
	if other == id {
		t.Error("another request got the same container")
	}
	if _, err := n.s.Containers.Get(id); !errdefs.IsNotFound(err) {
		t.Errorf("the one before it is there: %v", err)
	}
	if err := n.s.Start(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if _, err := n.s.Create(t.Context(), n.podID, moved, nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the name of a running container: %v", err)
	}
	if err := n.s.Remove(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// Nothing stays of a creation that everybody gave up.
// promise: P5
func TestCreateAbandoned(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	n.limits.Linger = time.Millisecond
	n.boot()
	entered := make(chan struct{})
	n.snaps.gate = func(ctx context.Context) error { close(entered); <-ctx.Done(); return context.Cause(ctx) }
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-entered; cancel() }()
	if _, err := n.s.Create(ctx, n.podID, app("a"), nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	n.until("the attempt is over", func() bool { return len(n.s.Stages()) == 0 })
	n.nothingLeft()
	n.snaps.gate = nil
	n.create(app("a"))
}

// contract: 7.1.12
func TestStartError(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	n.tasks.create = func(context.Context, container.ID, task.CreateOptions) error {
		return errors.New("no such file: /bin/x")
	}
	id := n.create(app("a"))
	if err := n.s.Start(t.Context(), id); err == nil || !strings.Contains(err.Error(), "/bin/x") {
		t.Errorf("%v", err)
	}
	a := n.get(id).Answer(cristate.ImageNames{})
	if a.State != runtime.ContainerState_CONTAINER_EXITED || a.ExitCode != 128 || a.Reason != "StartError" || !strings.Contains(a.Message, "/bin/x") {
		t.Errorf("%+v", a)
	}
	if all, _ := n.tasks.List(t.Context()); len(all) != 0 {
		t.Errorf("tasks %v", all)
	}
	if err := n.s.Start(t.Context(), id); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start again: %v", err)
	}
	if err := n.s.Remove(t.Context(), id); err != nil {
		t.Error(err)
	}
	n.nothingLeft()
}

// contract: 7.1.15
// promise: P18
func TestReasons(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	for i, c := range []struct {
		code   uint32
		oom    bool
		reason string
	}{{0, false, "Completed"}, {3, false, "Error"}, {137, false, "Error"}, {137, true, "OOMKilled"}, {1, true, "OOMKilled"}, {0, true, "Completed"}} {
		id := n.run(app(fmt.Sprint("c", i)))
		if c.oom {
			if err := n.bus.Publish(t.Context(), event.Envelope{Timestamp: time.Now(), Namespace: cristate.Namespace, Topic: event.TopicTaskOOM, Event: event.TaskOOM{ContainerID: id}}); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.tasks.End(container.ID(id), "", c.code); err != nil {
			t.Fatal(err)
		}
		if st := n.ended(id); st.ExitCode != int32(c.code) || st.Reason != c.reason || st.Pid != 0 || st.FinishedAt < st.StartedAt {
			t.Errorf("%+v: %+v", c, st)
		}
	}
	// The news of memory that ran out may come late, and then counts; not when it is of another time.
	id := n.run(app("late"))
	if err := n.tasks.End(container.ID(id), "", 137); err != nil {
		t.Fatal(err)
	}
	st := n.ended(id)
	for _, late := range []struct {
		by   time.Duration
		want string
	}{{time.Hour, "Error"}, {0, "OOMKilled"}} {
		n.s.outOfMemory(n.get(id), cristate.Time(st.FinishedAt).Add(late.by))
		if got := n.get(id).Status().Reason; got != late.want {
			t.Errorf("%s later: %s", late.by, got)
		}
	}
	// A process that ends at once is no start error, and its code is kept.
	id = n.run(app("quick", "exit", "7"))
	if st := n.ended(id); st.ExitCode != 7 || st.StartedAt == 0 || st.Reason != "Error" {
		t.Errorf("%+v", st)
	}
	if all, _ := n.tasks.List(t.Context()); len(all) != 0 {
		t.Errorf("tasks are left: %v", all)
	}
}

// contract: 7.1.13, 7.3.19
func TestStopSignal(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{StopSignal: "SIGRTMIN+3"}, nil)
	for want, signal := range map[uint32]runtime.Signal{37: 0, uint32(unix.SIGUSR2): runtime.Signal_SIGNAL_SIGUSR2} {
		n.tasks.hook(func() { n.tasks.signals = nil })
		c := app("a")
		c.StopSignal = signal
		id := n.run(c)
		if err := n.s.Stop(t.Context(), id, time.Minute); err != nil {
			t.Fatal(err)
		}
		if got := n.tasks.sent(); !slices.Equal(got, []uint32{want}) {
			t.Errorf("sent %v, want %d", got, want)
		}
		if err := n.s.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	for text, want := range map[string]unix.Signal{"": 15, "KILL": 9, "sigint": 2, "28": 28, "RTMAX-1": 63, "SIGRTMIN": 34, "SIGRTMINPLUS2": 36, "RTMAXMINUS3": 61} {
		if got, err := parseSignal(text); err != nil || got != want {
			t.Errorf("%q: %d %v", text, got, err)
		}
	}
	for _, text := range []string{"0", "65", "-1", "SIGX", "RTMIN+31", "RTMIN3", "9 "} {
		if got, err := parseSignal(text); err == nil {
			t.Errorf("%q: %d", text, got)
		}
	}
}

// A process that ignores its stop signal gets it once, and is killed after the
// grace; a Stop with less grace need not wait for one with more.
// contract: 7.1.13
func TestStopDeaf(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	c := app("a")
	id := n.run(c)
	tries := 0
	deaf := func(_ context.Context, _ container.ID, sig uint32) error {
		if sig != 9 {
			return errdefs.ErrNotFound // as far as this test goes: it is not delivered
		}
		if tries++; tries < 4 {
			return errdefs.ErrUnavailable.WithMessage("ttrpc: closed")
		}
		return nil
	}
	n.tasks.hook(func() { n.tasks.kill = deaf })
	patient := make(chan error, 1)
	go func() { patient <- n.s.Stop(t.Context(), id, time.Hour) }()
	n.until("the signal is sent", func() bool { return len(n.tasks.sent()) == 1 })
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := n.s.Stop(short, id, time.Hour); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := n.s.Stop(t.Context(), id, 10*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if err := <-patient; err != nil {
		t.Error(err)
	}
	if got := n.tasks.sent(); !slices.Equal(got, []uint32{15, 9, 9, 9, 9}) {
		t.Errorf("signals %v", got)
	}
	if st := n.ended(id); st.ExitCode != 137 {
		t.Errorf("%+v", st)
	}
}

// A shim that does not answer harms its own container only, and not for ever.
// contract: 7.1.13
func TestHungShim(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	n.limits.Kill = 300 * time.Millisecond
	n.boot()
	sick, well := n.run(app("sick")), n.run(app("well"))
	hang := func(ctx context.Context, id container.ID) error {
		if id == container.ID(sick) {
			<-ctx.Done()
			return fmt.Errorf("shim of %s: %w", id, ctx.Err())
		}
		return nil
	}
	n.tasks.hook(func() {
		n.tasks.get = hang
		n.tasks.kill = func(ctx context.Context, id container.ID, _ uint32) error { return hang(ctx, id) }
	})
	result := make(chan error, 1)
	go func() { result <- n.s.Stop(t.Context(), sick, 0) }()
	if err := n.s.Stop(t.Context(), well, 0); err != nil {
		t.Error(err)
	}
	if err := <-result; !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "SIGKILL") {
		t.Errorf("%v", err)
	}
	n.tasks.hook(func() { n.tasks.get, n.tasks.kill = nil, nil })
	if err := n.s.Remove(t.Context(), sick); err != nil {
		t.Errorf("after the shim has come back: %v", err)
	}
}

// contract: 7.1.16
func TestUpdateResources(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	id := n.run(app("a"))
	res := &runtime.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 << 20}
	if err := n.s.UpdateResources(t.Context(), id, res, nil); err != nil {
		t.Fatal(err)
	}
	spec := n.spec(id)
	if r := spec.Linux.Resources; *r.CPU.Shares != 512 || *r.Memory.Limit != 64<<20 {
		t.Errorf("%+v", r)
	}
	if r := n.get(id).Answer(cristate.ImageNames{}).Resources.GetLinux(); r.GetCpuShares() != 512 || r.GetMemoryLimitInBytes() != 64<<20 {
		t.Errorf("status %+v", r)
	}
	if err := n.s.UpdateResources(t.Context(), id, nil, nil); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if err := n.s.Stop(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	if err := n.s.UpdateResources(t.Context(), id, res, nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}

// plugin is an NRI plugin that keeps a diary.
type plugin struct {
	mu     sync.Mutex
	diary  []string
	exits  []string // of containers
	refuse string   // the hook that says no
}

func (p *plugin) note(what string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.diary = append(p.diary, what)
	if what == p.refuse {
		return errdefs.ErrPermissionDenied.WithMessage("plugin x says no")
	}
	return nil
}

func (p *plugin) CreateContainer(_ context.Context, _ *cristate.Pod, _ *cristate.Container, s *specs.Spec) error {
	s.Process.Env = append(s.Process.Env, "NRI=1")
	return p.note("create")
}
func (p *plugin) PostCreateContainer(context.Context, *cristate.Pod, *cristate.Container) {
	p.note("created")
}
func (p *plugin) StartContainer(context.Context, *cristate.Pod, *cristate.Container) error {
	return p.note("start")
}
func (p *plugin) PostStartContainer(context.Context, *cristate.Pod, *cristate.Container) {
	p.note("started")
}
func (p *plugin) UpdateContainer(_ context.Context, _ *cristate.Pod, _ *cristate.Container, r *runtime.LinuxContainerResources) (*runtime.LinuxContainerResources, error) {
	return &runtime.LinuxContainerResources{CpuShares: r.CpuShares * 2}, p.note("update")
}
func (p *plugin) PostUpdateContainer(context.Context, *cristate.Pod, *cristate.Container) {
	p.note("updated")
}
func (p *plugin) StopContainer(context.Context, *cristate.Pod, *cristate.Container) error {
	return p.note("stop")
}
func (p *plugin) ContainerExited(_ *cristate.Pod, c *cristate.Container) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.exits = append(p.exits, c.ID())
}
func (p *plugin) heard(t *testing.T, id string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		exits := slices.Clone(p.exits)
		p.mu.Unlock()
		if slices.Contains(exits, id) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the end of %s is not told, only %q", id, exits)
		}
	}
}
func (p *plugin) RemoveContainer(context.Context, *cristate.Pod, *cristate.Container) error {
	return p.note("remove")
}

// contract: 7.3.23
func TestNRI(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	p := &plugin{}
	n.change = func(d *Deps) { d.NRI = p }
	n.boot()
	id := n.run(app("a"))
	if env := n.spec(id).Process.Env; !slices.Contains(env, "NRI=1") {
		t.Errorf("%q", env)
	}
	if err := n.s.UpdateResources(t.Context(), id, &runtime.LinuxContainerResources{CpuShares: 100}, nil); err != nil {
		t.Fatal(err)
	}
	if got := *n.spec(id).Linux.Resources.CPU.Shares; got != 200 {
		t.Errorf("shares %d", got)
	}
	if err := n.s.Adjust(t.Context(), id, &runtime.LinuxContainerResources{CpuShares: 300}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.s.Stop(t.Context(), id, 0), n.s.Remove(t.Context(), id)); err != nil {
		t.Fatal(err)
	}
	if want := strings.Fields("create created start started update updated stop remove"); !slices.Equal(p.diary, want) {
		t.Errorf("%q", p.diary)
	}
	p.heard(t, id)
	p.refuse = "create"
	if _, err := n.s.Create(t.Context(), n.podID, app("b"), nil); !errdefs.IsPermissionDenied(err) {
		t.Error(err)
	}
	n.nothingLeft()
	p.refuse = "start"
	id = n.create(app("b"))
	if err := n.s.Start(t.Context(), id); !errdefs.IsPermissionDenied(err) {
		t.Error(err)
	}
	if st := n.get(id).Status(); st.Reason != cristate.ReasonStartError {
		t.Errorf("%+v", st)
	}
	p.heard(t, id)
}

// contract: 7.3.2
func TestTarget(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	id := n.run(app("a"))
	c := app("debug")
	ask := func(target string) (string, error) {
		c.Linux.SecurityContext = &runtime.LinuxContainerSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_TARGET, TargetId: target}}
		return n.s.Create(t.Context(), n.podID, c, nil)
	}
	debug, err := ask(id)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("/proc/%d/ns/pid", n.get(id).Status().Pid)
	if !slices.ContainsFunc(n.spec(debug).Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.PIDNamespace && ns.Path == want }) {
		t.Errorf("%+v", n.spec(debug).Linux.Namespaces)
	}
	if err := errors.Join(n.s.Remove(t.Context(), debug), n.s.Stop(t.Context(), id, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(id); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a target that has ended: %v", err)
	}
	if _, err := ask("unknown"); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown target: %v", err)
	}
}

// A pod that stops while a container is made does not keep it.
// contract: 7.1.11
func TestPodStopsMeanwhile(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	n.snaps.gate = func(context.Context) error {
		n.pod.Change(func(_ *cristate.PodMeta, st *cristate.PodStatus) { st.State = cristate.PodNotReady })
		return nil
	}
	if _, err := n.s.Create(t.Context(), n.podID, app("a"), nil); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	n.nothingLeft()
}

// However far a creation is when its caller goes away, a retry succeeds and
// nothing is left.
// promise: P5
func TestCreateCancelledAnywhere(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{Volumes: map[string]struct{}{"/etc": {}}}, nil)
	n.limits.Linger = time.Microsecond
	n.boot()
	c := app("a")
	c.Mounts = []*runtime.Mount{{ContainerPath: "/img", Image: &runtime.ImageSpec{Image: "i"}}}
	for i := range 40 {
		ctx, cancel := context.WithCancel(t.Context())
		timer := time.AfterFunc(time.Duration(i)*500*time.Microsecond, cancel)
		_, _ = n.s.Create(ctx, n.podID, c, nil) // whether it was in time does not matter
		timer.Stop()
		cancel()
		id := n.create(c)
		if err := n.s.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		n.until("no attempt is under way", func() bool { return len(n.s.Stages()) == 0 })
		n.nothingLeft()
		if t.Failed() {
			t.Fatalf("cancelled in round %d", i)
		}
	}
}
