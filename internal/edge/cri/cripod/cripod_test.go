package cripod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/metrics/metricstest"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/lib/attempt"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

// The whole life, by both controllers.
//
// contract: 7.1.5, 7.1.6, 7.1.7, 7.1.8, 7.3.29, 13.25, 13.26, 5.6.7
// promise: P55
func TestLife(t *testing.T) {
	for _, sandboxer := range sandboxers {
		t.Run(sandboxer, func(t *testing.T) {
			w := inMemory(t)
			s := w.up(nil)
			events := s.Notify.Events.Subscribe()
			defer events.Close()
			ctx := t.Context()
			id := must[string](t)(s.Run(ctx, config(1), handler(sandboxer)))
			if again := must[string](t)(s.Run(ctx, config(1), handler(sandboxer))); again != id {
				t.Errorf("the same pod is %s and %s", id, again)
			}
			p := must[*cristate.Pod](t)(s.Pods.Get(id))
			m, st := p.Meta(), p.Status()
			if st.State != cristate.PodReady || m.IP != "10.9.8.7" || len(m.AdditionalIPs) != 1 || st.Sandboxer != sandboxer {
				t.Errorf("%+v %+v", m, st)
			}
			if a := p.Answer(); a.State != runtime.PodSandboxState_SANDBOX_READY || a.Network.Ip != "10.9.8.7" || a.Labels["a"] != "b" {
				t.Errorf("%v", a)
			}
			v := must[view.View](t)(w.src.In(cristate.Namespace, ""))
			record := must[sandbox.Sandbox](t)(v.Sandboxes().Get(ctx, id))
			stored, err := cristate.DecodePod(record.Extensions["metadata"])
			if err != nil || stored.IP != m.IP || len(record.Extensions) != 1 || record.Sandboxer != sandboxer {
				t.Errorf("record %+v %v", record, err)
			}
			if l := must2(v.Leases().List(ctx, "id=="+id)); len(l) != 1 {
				t.Errorf("leases %v", l)
			}
			if !nspin.Pinned(m.NetNSPath) || st.Namespaces["network"] != m.NetNSPath || st.Namespaces["pid"] != "" || st.Namespaces["user"] != "" {
				t.Errorf("namespaces %v", st.Namespaces)
			}
			tasks := must2(v.Tasks().List(ctx))
			if pauseless := sandboxer == cristate.SandboxerPauseless; pauseless {
				if len(tasks) != 0 || w.images.asked.Load() != 0 || st.Pid != 0 {
					t.Errorf("tasks %v, %d images, pid %d", tasks, w.images.asked.Load(), st.Pid)
				}
			} else if len(tasks) != 1 || tasks[0].ID != id || st.Pid != tasks[0].Pid || st.Namespaces["ipc"] == "" {
				t.Errorf("tasks %v of %v", tasks, st)
			} else if c := must[container.Container](t)(v.Containers().Get(ctx, container.ID(id))); c.Extensions[cristate.ExtensionPod].IsZero() || c.Labels[cristate.LabelKind] != cristate.KindSandbox || c.Labels["a"] != "b" {
				t.Errorf("container %+v", c)
			}
			for name, want := range map[string]string{FileHostname: "inside\n", FileResolv: "search x.y y\nnameserver 10.0.0.1\noptions ndots:5\n"} {
				if b := must[[]byte](t)(os.ReadFile(filepath.Join(w.dirs.Of(id), name))); string(b) != want {
					t.Errorf("%s is %q", name, b)
				}
			}
			if sfs := (unix.Statfs_t{}); unix.Statfs(w.dirs.Shm(id), &sfs) != nil || sfs.Type != unix.TMPFS_MAGIC || sfs.Blocks*uint64(sfs.Bsize) != shmSize {
				t.Errorf("shm %+v", sfs)
			}
			info := must[map[string]string](t)(s.Info(ctx, id[:10]))
			if !strings.Contains(info["info"], `"runtimeType":"io.containerd.runc.v2"`) || !strings.Contains(info["info"], `"processStatus":"running"`) ||
				(st.Pid != 0) != strings.Contains(info["info"], `"snapshotKey":"`+id+`"`) || len(info["image"]) != 0 {
				t.Errorf("info %v", info)
			}

			check(t, s.Stop(ctx, id))
			check(t, s.Stop(ctx, id))
			if st := p.Status(); st.State != cristate.PodNotReady || st.ExitedAt.IsZero() {
				t.Errorf("stopped: %+v", st)
			}
			if nspin.Pinned(m.NetNSPath) || len(must2(os.ReadDir(w.net.dir))) != 0 {
				t.Error("the network is still there")
			}
			check(t, s.Remove(ctx, id))
			check(t, s.Remove(ctx, id))
			check(t, s.Stop(ctx, id))
			check(t, s.Stop(ctx, "nobody"))
			w.clean()
			if c := w.containers.told; !slices.Equal(c, []string{"stop " + id, "stop " + id, "stop " + id, "stop " + id, "remove " + id, "remove " + id}) {
				t.Errorf("containers were told %v", c)
			}
			for _, kind := range []runtime.ContainerEventType{runtime.ContainerEventType_CONTAINER_CREATED_EVENT, runtime.ContainerEventType_CONTAINER_STARTED_EVENT,
				runtime.ContainerEventType_CONTAINER_STOPPED_EVENT, runtime.ContainerEventType_CONTAINER_DELETED_EVENT} {
				if e, err := events.Next(ctx); err != nil || e.ContainerEventType != kind || e.ContainerId != id {
					t.Errorf("event %v, want %s: %v", e, kind, err)
				}
			}
			measured := metricstest.Read(t, w.registry)
			for _, name := range []string{"create_network_seconds", "runtime_create_seconds io.containerd.runc.v2", "delete_network_seconds", "runtime_stop_seconds io.containerd.runc.v2"} {
				if measured["containerd_cri_sandbox_"+name] == 0 {
					t.Errorf("%s is not measured: %v", name, measured)
				}
			}
		})
	}
}

// A pod that shares a PID namespace needs a process to hold it.
//
// promise: P55
func TestSharedPID(t *testing.T) {
	w := inMemory(t)
	s := w.up(nil)
	cfg := config(1)
	cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_POD
	id := must[string](t)(s.Run(t.Context(), cfg, cristate.SandboxerPauseless))
	st := must[*cristate.Pod](t)(s.Pods.Get(id)).Status()
	if st.Pid == 0 || !strings.HasSuffix(st.Namespaces["pid"], "/ns/pid") || st.Sandboxer != cristate.SandboxerPauseless || w.images.asked.Load() != 1 {
		t.Errorf("%+v", st)
	}
	again := w.up(nil)
	check(t, again.Recover(t.Context()))
	if now := must[*cristate.Pod](t)(again.Pods.Get(id)).Status(); now.State != cristate.PodReady || now.Pid != st.Pid {
		t.Errorf("%+v", now)
	}
	check(t, again.Remove(t.Context(), id))
	w.clean()
}

// The namespaces that a pod without a process has are set up as a runtime
// would, inside of the pod's user namespace if it has one.
//
// promise: P55
func TestPinned(t *testing.T) {
	for _, users := range []bool{false, true} {
		w := inMemory(t)
		s := w.up(nil)
		cfg := config(1)
		cfg.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "81", "kernel.shm_rmid_forced": "1"}
		if users {
			one := []*runtime.IDMapping{{HostId: 200000, Length: 65536}}
			cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: one, Gids: one}
		}
		id := must[string](t)(s.Run(t.Context(), cfg, cristate.SandboxerPauseless))
		ns := must[*cristate.Pod](t)(s.Pods.Get(id)).Status().Namespaces
		var name, port, shm string
		check(t, nspin.Enter(map[nspin.Kind]string{nspin.Net: ns["network"], nspin.UTS: ns["uts"], nspin.IPC: ns["ipc"]}, func() error {
			var u unix.Utsname
			err := unix.Uname(&u)
			name = unix.ByteSliceToString(u.Nodename[:])
			b1, err1 := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
			b2, err2 := os.ReadFile("/proc/sys/kernel/shm_rmid_forced")
			port, shm = strings.TrimSpace(string(b1)), strings.TrimSpace(string(b2))
			return errors.Join(err, err1, err2)
		}))
		if name != "inside" || port != "81" || shm != "1" {
			t.Errorf("host name %q, first port %q, shm_rmid_forced %q", name, port, shm)
		}
		if users != (ns["user"] != "") {
			t.Errorf("namespaces %v", ns)
		}
		for _, kind := range []string{"network", "uts", "ipc"} {
			if got := owner(t, ns[kind]); users != (got == inode(t, ns["user"])) {
				t.Errorf("users %v: %s belongs to %d, the pod's is %d", users, kind, got, inode(t, ns["user"]))
			}
		}
		check(t, s.Remove(t.Context(), id))
		w.clean()
	}
	host, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	check(t, err)
	w := inMemory(t)
	s := w.up(nil)
	for i, key := range []string{"kernel.core_pattern", "net/../kernel/core_pattern", "vm.swappiness"} {
		cfg := config(i)
		cfg.Linux.Sysctls = map[string]string{key: "1"}
		if _, err := s.Run(t.Context(), cfg, cristate.SandboxerPauseless); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), key) {
			t.Errorf("%s: %v", key, err)
		}
	}
	w.clean()
	if now := must2(os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")); string(now) != string(host) {
		t.Errorf("the host has %s, had %s", now, host)
	}
}

// owner is the inode of the user namespace that a namespace belongs to.
func owner(t *testing.T, path string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	check(t, err)
	user := os.NewFile(uintptr(fd), "user")
	defer user.Close()
	var st unix.Stat_t
	check(t, unix.Fstat(fd, &st))
	return st.Ino
}

func inode(t *testing.T, path string) uint64 {
	var st unix.Stat_t
	if path != "" {
		check(t, unix.Stat(path, &st))
	}
	return st.Ino
}

// Whatever fails, nothing is left and the next attempt succeeds.
//
// promise: P5
func TestFailures(t *testing.T) {
	boom := errors.New("boom")
	for _, sandboxer := range sandboxers {
		for name, fail := range map[string]func(*world, error){
			"network": func(w *world, err error) { w.net.fail(err, nil) },
			"create":  func(w *world, err error) { w.broken[sandboxer].create = err },
			"start":   func(w *world, err error) { w.broken[sandboxer].start = err },
			"NRI":     func(w *world, err error) { w.nri.refuse = err },
		} {
			t.Run(sandboxer+" "+name, func(t *testing.T) {
				w := inMemory(t)
				s := w.up(nil)
				fail(w, boom)
				if _, err := s.Run(t.Context(), config(1), handler(sandboxer)); !errors.Is(err, boom) || !strings.Contains(err.Error(), "pod1_ns_uid1_0") || !strings.Contains(err.Error(), name) {
					t.Errorf("%v", err)
				}
				w.clean()
				fail(w, nil)
				id := must[string](t)(s.Run(t.Context(), config(1), handler(sandboxer)))
				check(t, s.Remove(t.Context(), id))
				w.clean()
			})
		}
	}
}

// steps are the points of a pod's creation, in order.
var steps = []string{"write the record", "make a lease", "make directories", "make namespaces", "set up the network", "get the pause image", "create the sandbox",
	"start the sandbox", "ask NRI", "complete the record"}

// A caller that goes away at any step leaves nothing; one that comes back gets
// the pod.
//
// promise: P5
func TestCancelled(t *testing.T) {
	for _, sandboxer := range sandboxers {
		for _, when := range []string{"before", "after"} {
			for _, step := range steps {
				t.Run(strings.Join([]string{sandboxer, when, step}, " "), func(t *testing.T) {
					w := inMemory(t)
					ctx, cancel := context.WithCancel(t.Context())
					returned := make(chan error, 1)
					points, err := fault.Parse("pod "+when+" "+step+":1", func(string) {
						cancel()
						returned <- <-returned // the caller is told at once, whatever the attempt does
					})
					check(t, err)
					s := w.up(points)
					go func() {
						_, err := s.Run(ctx, config(1), handler(sandboxer))
						returned <- err
					}()
					<-ctx.Done()
					var rerr error
					until(t, "the caller", func() bool {
						select {
						case rerr = <-returned:
							return true
						default:
							return false
						}
					})
					if !errors.Is(rerr, context.Canceled) || !strings.Contains(rerr.Error(), step) {
						t.Errorf("%v", rerr)
					}
					returned <- rerr
					until(t, "the attempt's end", func() bool { return len(s.Stages()) == 0 })
					w.clean()
					id := must[string](t)(s.Run(t.Context(), config(1), handler(sandboxer)))
					check(t, s.Remove(t.Context(), id))
					w.clean()
				})
			}
		}
	}
}

// starting is containers one of which is started when the others have been stopped.
type starting struct {
	*fakeContainers
	started bool
}

func (c *starting) StopAll(ctx context.Context, id string) error {
	c.started = !c.started
	return c.fakeContainers.StopAll(ctx, id)
}

// A container whose start is under way when its pod is stopped does not run on.
//
// contract: 7.1.6
func TestStopMeetsStart(t *testing.T) {
	w := inMemory(t)
	s := w.up(nil)
	c := &starting{fakeContainers: w.containers}
	s.Deps.Containers = c
	id := must[string](t)(s.Run(t.Context(), config(1), ""))
	check(t, s.Stop(t.Context(), id))
	if c.started {
		t.Error("it runs in a pod that was stopped")
	}
	check(t, s.Remove(t.Context(), id))
}

// silent is a shim that cannot be waited for.
type silent struct{ task.Store }

func (silent) Wait(context.Context, container.ID, task.ExecID) (task.Exit, error) {
	return task.Exit{}, errdefs.ErrUnavailable
}

// Who waits for a pod whose process cannot be waited for is told, to ask again.
//
// contract: 5.6.6
func TestWaitFails(t *testing.T) {
	w := inMemory(t)
	s := w.up(nil)
	id := must[string](t)(s.Run(t.Context(), config(1), ""))
	src := w.src.(wiretest.Source)
	src.TaskStore = silent{w.tasks}
	c := NewPodSandbox(ControllerDeps{Views: src, Namespace: cristate.Namespace})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := c.Wait(ctx, id); !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	check(t, s.Remove(t.Context(), id))
}

// A second call joins the first one.
//
// promise: P5
func TestJoins(t *testing.T) {
	w := inMemory(t)
	entered, release := make(chan struct{}), make(chan struct{})
	points, err := fault.Parse("pod after set up the network:1", func(string) { close(entered); <-release })
	check(t, err)
	s := w.up(points)
	s.group = attempt.New(runLimit, time.Hour, s.discard)
	ids := make(chan string, 2)
	run := func() {
		id, err := s.Run(context.Background(), config(1), "")
		if err != nil {
			t.Error(err)
		}
		ids <- id
	}
	go run()
	<-entered
	late, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := s.Run(late, config(1), ""); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "set up the network") {
		t.Errorf("%v", err)
	}
	// One that asks for another handler waits for it, and does not get it.
	refused := make(chan error, 1)
	go func() {
		_, err := s.Run(context.Background(), config(1), cristate.SandboxerPauseless)
		refused <- err
	}()
	// Another pod does not wait for it.
	other := must[string](t)(s.Run(t.Context(), config(2), ""))
	go run()
	close(release)
	if err := <-refused; !errdefs.IsAlreadyExists(err) {
		t.Errorf("%v", err)
	}
	if a, b := <-ids, <-ids; a != b || a == "" {
		t.Errorf("%s and %s", a, b)
	} else {
		check(t, s.Remove(t.Context(), a))
	}
	check(t, s.Remove(t.Context(), other))
	w.clean()
}

// A network that cannot be taken away is not forgotten.
//
// contract: 7.1.6
// promise: P22
func TestTeardown(t *testing.T) {
	w := inMemory(t)
	s := w.up(nil)
	boom := errors.New("plugin x: boom")
	id := must[string](t)(s.Run(t.Context(), config(1), ""))
	w.net.fail(nil, boom)
	for range 2 {
		if err := s.Stop(t.Context(), id); !errors.Is(err, boom) {
			t.Errorf("%v", err)
		}
	}
	if err := s.Remove(t.Context(), id); !errors.Is(err, boom) {
		t.Errorf("%v", err)
	}
	w.net.fail(nil, nil)
	check(t, s.Stop(t.Context(), id))
	check(t, s.Remove(t.Context(), id))
	w.clean()

	// One that fails while a pod that did not come up is taken back: it is listed,
	// as not ready, until it is gone, and does not keep the name.
	w.net.fail(boom, boom)
	if _, err := s.Run(t.Context(), config(1), ""); !errors.Is(err, boom) || !strings.Contains(err.Error(), "take it back") {
		t.Errorf("%v", err)
	}
	all := s.Pods.List()
	if len(all) != 1 || all[0].Status().State != cristate.PodUnknown || all[0].Item().State != runtime.PodSandboxState_SANDBOX_NOTREADY {
		t.Fatalf("%v", all)
	}
	if _, err := s.Run(t.Context(), config(1), ""); !errors.Is(err, boom) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Serve(ctx) }()
	w.net.fail(nil, nil)
	until(t, "the rest to be taken away", func() bool { return len(s.Pods.List()) == 0 })
	w.clean()
	cancel()
	check(t, <-done)

	w.net.fail(boom, boom)
	if _, err := s.Run(t.Context(), config(1), ""); err == nil {
		t.Error("no error")
	}
	w.net.fail(nil, nil)
	id = must[string](t)(s.Run(t.Context(), config(1), "")) // without Serve
	check(t, s.Remove(t.Context(), id))
	w.clean()
}

// A restart finds pods as they are.
//
// contract: 7.3.30, 7.1.9, 5.6.7
func TestRecover(t *testing.T) {
	w := inMemory(t)
	s := w.up(nil)
	ctx := t.Context()
	var ids []string
	for i, h := range []string{"", cristate.SandboxerPauseless, "", cristate.SandboxerPauseless} {
		ids = append(ids, must[string](t)(s.Run(ctx, config(i), h)))
	}
	check(t, w.tasks.End(container.ID(ids[2]), "", 3))
	p := must[*cristate.Pod](t)(s.Pods.Get(ids[2]))
	until(t, "the end of the pause process", func() bool { return p.Status().State == cristate.PodNotReady })
	if st := p.Status(); st.Exit != 3 || st.Pid != 0 {
		t.Errorf("%+v", st)
	}
	check(t, nspin.Remove(w.dirs.ns(ids[3], nspin.UTS)))
	check(t, s.Close(ctx))
	check(t, os.MkdirAll(filepath.Join(w.dirs.State, "sandboxes", "orphan", "ns"), 0o700))

	s = w.up(nil)
	check(t, s.Recover(ctx))
	for i, want := range []cristate.PodState{cristate.PodReady, cristate.PodReady, cristate.PodNotReady, cristate.PodNotReady} {
		p := must[*cristate.Pod](t)(s.Pods.Get(ids[i]))
		if st := p.Status(); st.State != want || p.Meta().IP == "" || (want == cristate.PodReady) != (st.Namespaces["network"] != "") {
			t.Errorf("pod %d: %+v", i, st)
		}
	}
	for i, id := range ids { // also of those that have ended and were not stopped
		if !slices.Contains(w.net.adopted, id) {
			t.Errorf("the network of pod %d is not adopted", i)
		}
	}
	if id := must[string](t)(s.Run(ctx, config(0), "")); id != ids[0] {
		t.Errorf("pod 0 is %s now", id)
	}
	if _, err := s.Run(ctx, config(0), cristate.SandboxerPauseless); !errdefs.IsAlreadyExists(err) {
		t.Errorf("%v", err)
	}
	// What ends after the restart is noticed too.
	check(t, w.tasks.End(container.ID(ids[0]), "", 0))
	until(t, "the end of a pod", func() bool {
		return must[*cristate.Pod](t)(s.Pods.Get(ids[0])).Status().State == cristate.PodNotReady
	})
	check(t, s.Close(ctx))

	// A controller that does not answer holds up nothing, and is asked again.
	s = w.up(nil)
	w.broken[cristate.SandboxerPauseless].status = errdefs.ErrUnavailable
	check(t, s.Recover(ctx))
	p = must[*cristate.Pod](t)(s.Pods.Get(ids[1]))
	if st := p.Status(); st.State != cristate.PodUnknown {
		t.Errorf("%+v", st)
	}
	w.broken[cristate.SandboxerPauseless].status = nil
	serve, cancel := context.WithCancel(ctx)
	done := make(chan error)
	go func() { done <- s.Serve(serve) }()
	until(t, "the pod's state", func() bool { return p.Status().State == cristate.PodReady })
	cancel()
	check(t, <-done)
	for _, id := range ids {
		check(t, s.Remove(ctx, id))
	}
	w.clean()
}

// contract: 7.1.10
func TestUpdateResources(t *testing.T) {
	w := inMemory(t)
	s := w.up(nil)
	ctx := t.Context()
	id := must[string](t)(s.Run(ctx, config(1), ""))
	check(t, s.UpdateResources(ctx, id, &runtime.LinuxContainerResources{CpuShares: 7}, &runtime.LinuxContainerResources{MemoryLimitInBytes: 9}))
	if !w.told("update") || !w.told("updated") {
		t.Errorf("NRI: %v", w.nri.told)
	}
	again := w.up(nil)
	check(t, again.Recover(ctx))
	for _, s := range []*Service{s, again} {
		if st := must[*cristate.Pod](t)(s.Pods.Get(id)).Status(); st.Overhead.GetCpuShares() != 7 || st.Resources.GetMemoryLimitInBytes() != 9 {
			t.Errorf("%+v", st)
		}
	}
	check(t, s.Stop(ctx, id))
	if err := s.UpdateResources(ctx, id, nil, nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v", err)
	}
	if err := s.UpdateResources(ctx, "nobody", nil, nil); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	check(t, s.Remove(ctx, id))
}

// contract: 7.1.5
func TestHandler(t *testing.T) {
	s := inMemory(t).up(nil)
	cfg := config(1)
	cfg.Annotations = map[string]string{cristate.AnnotationUntrustedWorkload: "true"}
	if name, rt, err := s.Handler(cfg, ""); err != nil || name != untrusted || rt.Sandboxer != cristate.SandboxerPauseless {
		t.Errorf("%s %v %v", name, rt, err)
	}
	if _, _, err := s.Handler(cfg, "runc"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	cfg.Linux.SecurityContext.Privileged = true
	if _, err := s.Run(t.Context(), cfg, ""); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "access to the host") {
		t.Errorf("%v", err)
	}
	if _, err := s.Run(t.Context(), config(1), "none"); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	for _, cfg := range []*runtime.PodSandboxConfig{nil, {}, {Metadata: &runtime.PodSandboxMetadata{Name: "x"}}} {
		if _, err := s.Run(t.Context(), cfg, ""); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v", err)
		}
	}
	bad := config(2)
	bad.DnsConfig.Servers = []string{"1.1.1.1\noptions evil"}
	if _, err := s.Run(t.Context(), bad, ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	// In the host's namespaces there is nothing to pin, and nothing to connect.
	host := config(3)
	host.Linux.SecurityContext.NamespaceOptions = &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Ipc: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER}
	id := must[string](t)(s.Run(t.Context(), host, cristate.SandboxerPauseless))
	if p := must[*cristate.Pod](t)(s.Pods.Get(id)); p.Meta().NetNSPath != "" || p.Meta().IP != "" || len(p.Status().Namespaces) != 0 || p.Status().State != cristate.PodReady {
		t.Errorf("%+v %+v", p.Meta(), p.Status())
	}
	check(t, s.Remove(t.Context(), id))
}
