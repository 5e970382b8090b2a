//go:build linux

package cri

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// ward is a node with a pod that is well, whose calls are timed, and one that is not.
type ward struct {
	*critest.Node
	t      *testing.T
	well   *critest.Pod
	box    *critest.Container
	normal time.Duration // the slowest call of a round when nothing is sick
}

func newWard(t *testing.T, n *critest.Node) *ward {
	t.Helper()
	w := &ward{Node: n, t: t}
	n.Pull(t, n.Busybox)
	w.well = n.Pod(t, "runc")
	w.box = w.well.Run("sleep 1000")
	for range 3 {
		w.round(func(what string, took time.Duration) { w.normal = max(w.normal, took) })
	}
	return w
}

// others does a round of calls that have nothing to do with what is sick, and
// fails for those that do not take their usual time. The machine does other
// things at the same time: what this sees is a call that waits.
func (w *ward) others() {
	w.t.Helper()
	w.round(func(what string, took time.Duration) {
		if limit := 4*w.normal + critest.Slow(time.Second); took > limit {
			w.t.Errorf("%s of others takes %s, %s at most when all are well", what, took, w.normal)
		}
	})
}

func (w *ward) round(note func(string, time.Duration)) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), critest.Slow(30*time.Second))
	defer cancel()
	timed := func(what string, fn func() error) {
		w.t.Helper()
		began := time.Now()
		if err := fn(); err != nil {
			w.t.Errorf("%s of others: %v", what, err)
		}
		note(what, time.Since(began))
	}
	timed("Status", func() error { _, err := w.RT.Status(ctx, &runtime.StatusRequest{Verbose: true}); return err })
	timed("ListPodSandbox", func() error { _, err := w.RT.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{}); return err })
	timed("ListContainers", func() error { _, err := w.RT.ListContainers(ctx, &runtime.ListContainersRequest{}); return err })
	timed("ListContainerStats", func() error {
		_, err := w.RT.ListContainerStats(ctx, &runtime.ListContainerStatsRequest{})
		return err
	})
	timed("ListPodSandboxStats", func() error {
		_, err := w.RT.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{})
		return err
	})
	timed("PodSandboxStatus", func() error {
		_, err := w.RT.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: w.well.ID})
		return err
	})
	timed("ContainerStatus", func() error {
		_, err := w.RT.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: w.box.ID})
		return err
	})
	timed("ContainerStats", func() error {
		_, err := w.RT.ContainerStats(ctx, &runtime.ContainerStatsRequest{ContainerId: w.box.ID})
		return err
	})
	timed("ExecSync", func() error {
		_, err := w.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: w.box.ID, Cmd: []string{"/bin/true"}, Timeout: 20})
		return err
	})
	c := w.well.ContainerConfig("sleep 1000")
	var id string
	timed("CreateContainer", func() error {
		r, err := w.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: w.well.ID, Config: c, SandboxConfig: w.well.Config})
		id = r.GetContainerId()
		return err
	})
	timed("StartContainer", func() error {
		_, err := w.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id})
		return err
	})
	timed("StopContainer", func() error {
		_, err := w.RT.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: id})
		return err
	})
	timed("RemoveContainer", func() error {
		_, err := w.RT.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id})
		return err
	})
	timed("RunPodSandbox", func() error {
		r, err := w.RT.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: w.PodConfig(w.t), RuntimeHandler: "runc"})
		id = r.GetPodSandboxId()
		return err
	})
	timed("RemovePodSandbox", func() error {
		_, err := w.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
		return err
	})
}

// sick makes a call that cannot succeed and has less than a second. It has to fail then,
// and the error has to have these words.
func (w *ward) sick(what string, fn func(context.Context) error, words ...string) {
	w.t.Helper()
	limit := critest.Slow(800 * time.Millisecond)
	missing := ""
	for range critest.Slow(int64(3)) { // on a busy machine the client's own clock may win, which knows no words
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		began := time.Now()
		err := fn(ctx)
		cancel()
		if took := time.Since(began); took > limit+critest.Slow(5*time.Second) {
			w.t.Errorf("%s of the sick one takes %s with a deadline of %s", what, took, limit)
		}
		// After a start the recovery may have asked the shim before, and waited: then its state is unknown.
		unknown := status.Code(err) == codes.FailedPrecondition && strings.Contains(err.Error(), "CONTAINER_UNKNOWN")
		if code := status.Code(err); code != codes.DeadlineExceeded && !unknown {
			w.t.Errorf("%s of the sick one: %v, %s", what, err, code)
			return
		}
		missing = ""
		for _, word := range words {
			if !strings.Contains(err.Error(), word) {
				missing = fmt.Sprintf("%q: %v", word, err)
			}
		}
		if missing == "" {
			return
		}
	}
	w.t.Errorf("%s of the sick one does not name %s", what, missing)
}

// goroutines counts the daemon's. It asks for a dump.
func (w *ward) goroutines() int {
	w.t.Helper()
	path := fmt.Sprintf("%s/gantry.%d.stacks.log", os.TempDir(), w.Pid())
	_ = os.Remove(path)
	defer os.Remove(path)
	if err := syscall.Kill(w.Pid(), syscall.SIGUSR1); err != nil {
		w.t.Fatal(err)
	}
	var dump []byte
	before := 0
	critest.Eventually(w.t, "a dump of all goroutines", func() bool {
		dump, _ = os.ReadFile(path)
		whole := len(dump) > 0 && len(dump) == before
		before = len(dump)
		return whole
	})
	return bytes.Count(dump, []byte("\ngoroutine ")) + 1
}

// steady fails if a call that is repeated leaves goroutines behind each time.
// What a call takes back behind its answer has limits of its own.
func (w *ward) steady(what string, fn func()) {
	w.t.Helper()
	const tries = 4
	fn()
	before := w.goroutines()
	for range tries {
		fn()
	}
	var after int
	for deadline := time.Now().Add(critest.Slow(20 * time.Second)); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if after = w.goroutines(); after < before+tries {
			return
		}
	}
	w.t.Errorf("%s: %d goroutines, after %d more tries %d", what, before, tries, after)
}

// shimOf is the process of a pod's shim.
func (w *ward) shimOf(id string) int {
	w.t.Helper()
	for pid, args := range w.Processes() {
		if strings.Contains(args, "containerd-shim") && strings.Contains(args, id) {
			return pid
		}
	}
	w.t.Fatalf("no shim of %s", id)
	return 0
}

// A shim that is stopped takes only its own pod's calls along, also over a
// restart of the daemon, and all is well when it goes on.
//
// promise: P1, P12
// contract: 7.3.30
func TestStoppedShim(t *testing.T) {
	n := critest.Run(t, binDir, "")
	w := newWard(t, n)
	sick := n.Pod(t, "runc")
	box := sick.Run("trap 'exit 9' TERM; while :; do usleep 10000; done")
	shim := w.shimOf(sick.ID)
	if err := syscall.Kill(shim, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	awake := sync.OnceFunc(func() { _ = syscall.Kill(shim, syscall.SIGCONT) })
	t.Cleanup(awake)
	calls := func() {
		t.Helper()
		w.sick("exec", func(ctx context.Context) error {
			_, err := n.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: box.ID, Cmd: []string{"/bin/true"}, Timeout: 30})
			return err
		}, box.ID)
		w.sick("stop", func(ctx context.Context) error {
			_, err := n.RT.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: box.ID, Timeout: 30})
			return err
		}, box.ID)
		w.sick("stop pod", func(ctx context.Context) error {
			_, err := n.RT.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: sick.ID})
			return err
		}, sick.ID, box.ID)
		w.sick("remove", func(ctx context.Context) error {
			_, err := n.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: sick.ID})
			return err
		}, sick.ID)
	}
	calls()
	w.others()
	w.steady("calls to a stopped shim", calls)
	// What is known without it is told.
	if st := box.Status(); st.State != runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%v", st)
	}

	n.Kill()
	began := time.Now()
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	if l := listed(t, n); len(l) != 2 {
		t.Errorf("%v", l)
	}
	if took := time.Since(began); took > critest.Slow(3*time.Second) { // half a second on a machine of its own
		t.Errorf("the first answer after %s", took)
	}
	w.others()
	w.sick("exec", func(ctx context.Context) error {
		_, err := n.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: box.ID, Cmd: []string{"/bin/true"}, Timeout: 30})
		return err
	}, box.ID)

	awake()
	critest.Eventually(t, "the pod is ready again", func() bool { return sick.Status().Status.State == runtime.PodSandboxState_SANDBOX_READY })
	critest.Eventually(t, "the pod can be stopped", func() bool {
		_, err := n.RT.StopContainer(critest.Context(t), &runtime.StopContainerRequest{ContainerId: box.ID, Timeout: 30})
		return err == nil
	})
	if st := box.Wait(); st.ExitCode != 9 && st.ExitCode != 137 { // the signals of the calls before may have come first
		t.Errorf("%v", st)
	}
	sick.Remove()
	w.others()
}

// A network plugin that never returns takes only its own pods along; they come
// up, or are removed, as soon as it does.
//
// promise: P1, P5, P22
func TestHangingNetworkPlugin(t *testing.T) {
	dir := t.TempDir()
	n := critest.Run(t, binDir, fmt.Sprintf(`
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.sick]
    runtime_type = 'io.containerd.runc.v2'
    sandboxer = 'pauseless'
    cni_conf_dir = %q
`, dir))
	for path, text := range map[string]string{
		n.Dir + "/cnibin/hangs": fmt.Sprintf(`#!/bin/sh
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}'; exit;;
esac
while [ -e %[1]s/$CNI_COMMAND ]; do sleep 0.05; done
[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"'$CNI_NETNS'"}],"ips":[{"address":"10.99.0.2/24","interface":0}]}'
`, dir),
		dir + "/10-sick.conflist": `{"cniVersion":"1.0.0","name":"sick","plugins":[{"type":"hangs"}]}`,
		dir + "/ADD":              "",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w := newWard(t, n)
	cfg := n.PodConfig(t)
	run := func(ctx context.Context) (string, error) {
		r, err := n.RT.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: cfg, RuntimeHandler: "sick"})
		return r.GetPodSandboxId(), err
	}
	// The handler's network is seen a moment after it was written.
	critest.Eventually(t, "the network", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), critest.Slow(time.Second))
		defer cancel()
		_, err := run(ctx)
		return status.Code(err) == codes.DeadlineExceeded
	})
	add := func() {
		t.Helper()
		w.sick("run pod", func(ctx context.Context) error { _, err := run(ctx); return err }, cfg.Metadata.Name, "set up the network")
	}
	add()
	w.others()
	w.steady("a plugin that does not add", add)
	if err := os.Remove(dir + "/ADD"); err != nil {
		t.Fatal(err)
	}
	id, err := run(critest.Context(t))
	if err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(dir+"/DEL", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	del := func() {
		t.Helper()
		w.sick("remove pod", func(ctx context.Context) error {
			_, err := n.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		}, id, "network")
	}
	del()
	w.others()
	w.steady("a plugin that does not delete", del)
	if err := os.Remove(dir + "/DEL"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.RT.RemovePodSandbox(critest.Context(t), &runtime.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Error(err)
	}
}

// hungMount is a FUSE file system whose server says that it is there, and
// nothing more until it goes away.
func hungMount(t *testing.T, dir string) (clear func()) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("/dev/fuse: %v", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("hung", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)); err != nil {
		unix.Close(fd)
		t.Skipf("mount FUSE: %v", err)
	}
	clear = sync.OnceFunc(func() {
		unix.Close(fd) // which ends the connection: who waits gets an error
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(clear)
	// The first request is FUSE_INIT: header of 40 bytes, then version and flags.
	in := make([]byte, 1<<17)
	c, err := unix.Read(fd, in)
	if err != nil || c < 48 || binary.LittleEndian.Uint32(in[4:]) != 26 {
		t.Fatalf("FUSE_INIT: %d bytes, %v", c, err)
	}
	out := make([]byte, 16+64)
	binary.LittleEndian.PutUint32(out, uint32(len(out)))
	copy(out[8:16], in[8:16]) // the request's number
	binary.LittleEndian.PutUint32(out[16:], 7)
	binary.LittleEndian.PutUint32(out[20:], 31)
	binary.LittleEndian.PutUint32(out[24:], 4096)  // read ahead
	binary.LittleEndian.PutUint32(out[36:], 1<<16) // write at most
	binary.LittleEndian.PutUint32(out[40:], 1)     // granularity of times
	if _, err := unix.Write(fd, out); err != nil {
		t.Fatal(err)
	}
	return clear
}

// A file system that hangs takes only the container along that is to have it.
//
// promise: P1, P5
func TestHungFileSystem(t *testing.T) {
	n := critest.Run(t, binDir, "")
	w := newWard(t, n)
	sick := n.Pod(t, "runc")
	dir := n.Dir + "/hung"
	clear := hungMount(t, dir)
	c := sick.ContainerConfig("sleep 1000", func(c *runtime.ContainerConfig) {
		c.Mounts = []*runtime.Mount{{ContainerPath: "/data", HostPath: dir + "/volume"}}
	})
	create := func(ctx context.Context) (string, error) {
		r, err := n.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: sick.ID, Config: c, SandboxConfig: sick.Config})
		return r.GetContainerId(), err
	}
	stuck := func() {
		t.Helper()
		w.sick("create container", func(ctx context.Context) error { _, err := create(ctx); return err }, c.Metadata.Name, dir)
	}
	stuck()
	w.others()
	w.steady("a mount that hangs", stuck)
	// Another container of the same pod does not know.
	if out := sick.Output("echo well"); out != "well\n" {
		t.Errorf("%q", out)
	}
	clear()
	id := ""
	critest.Eventually(t, "the container is made", func() bool {
		var err error
		id, err = create(critest.Context(t))
		return err == nil
	})
	if _, err := n.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
}

// A pod whose container cannot be made because of a file system that hangs can
// be removed when that is over, without anything else.
//
// promise: P1
func TestHungStart(t *testing.T) {
	n := critest.Run(t, binDir, "")
	w := newWard(t, n)
	sick := n.Pod(t, "runc")
	dir := n.Dir + "/hung"
	c := sick.Create("sleep 1000", func(c *runtime.ContainerConfig) {
		c.Mounts = []*runtime.Mount{{ContainerPath: "/data", HostPath: dir + "/volume"}}
	})
	clear := hungMount(t, dir)
	w.sick("start container", func(ctx context.Context) error {
		_, err := n.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: c.ID})
		return err
	}, c.ID)
	w.others()
	clear()
	critest.Eventually(t, "removal", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), critest.Slow(10*time.Second))
		defer cancel()
		_, err := n.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: sick.ID})
		return err == nil
	})
	w.others()
}
