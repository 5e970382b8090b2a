package cricontainer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/shimclient"
	"github.com/gantryd/gantry/internal/edge/wire/eventttrpc"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if shimUsed {
		if dir, err := shim(); err == nil {
			os.RemoveAll(dir)
		}
	}
	os.Exit(code)
}

// shimUsed says that there is something to remove at the end.
var shimUsed bool

// shim builds the project's shim, once.
var shim = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "gshim")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-tags", "seccomp", "-o", dir+"/containerd-shim-runc-v2", "github.com/gantryd/gantry/cmd/containerd-shim-runc-v2").CombinedOutput()
	if err != nil {
		return dir, fmt.Errorf("%w: %s", err, out)
	}
	return dir, nil
})

type recordSource struct{ wiretest.Source }

func (s recordSource) In(ns namespace.ID, under lease.ID) (view.Records, error) {
	return s.Source.In(ns, under)
}

// realNode is a node whose containers are processes.
type realNode struct {
	*node
	cgroup string
	stop   func()
	opt    shimclient.Options
}

func newReal(t *testing.T) *realNode {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and busybox")
	}
	n := newNode(t, ocispec.ImageConfig{Env: []string{"PATH=/bin"}}, func(root string) {
		b, err := os.ReadFile(busybox)
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{"bin", "proc", "dev", "sys", "tmp"} {
			if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(root+"/bin/busybox", b, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"sh", "sleep", "cat", "echo", "true", "yes", "head"} {
			if err := os.Symlink("busybox", root+"/bin/"+name); err != nil {
				t.Fatal(err)
			}
		}
	})
	shimUsed = true
	dir, err := shim()
	if err != nil {
		t.Fatal("build the shim: ", err)
	}
	short, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(short); err != nil {
			t.Error(err)
		}
	})
	r := &realNode{node: n, cgroup: "/gantry-" + filepath.Base(short) + "-cri"}
	r.opt = shimclient.Options{State: short + "/state", Root: short + "/root", Records: recordSource{n.src}, Events: n.bus, TTRPCAddress: short + "/e.ttrpc", GRPCAddress: short + "/e",
		SocketDir: short + "/s", SelfPath: "/bin/false", Version: "test", ShimDirs: []string{dir}, Logger: slog.New(slog.NewTextHandler(n.log, nil))}
	for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
		n.write(filepath.Join(n.dir, "root/sandboxes", n.podID, f), "")
	}
	if err := os.MkdirAll(filepath.Join(n.dir, "state/sandboxes", n.podID, "shm"), 0o755); err != nil {
		t.Fatal(err)
	}
	r.serve()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := r.s.RemoveAll(ctx, n.podID); err != nil {
			t.Error(err)
		}
		r.stop()
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} { // the pod's, which cripod would remove
			dirs, _ := filepath.Glob(root + r.cgroup)
			for _, dir := range dirs {
				if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Error(err)
				}
			}
		}
	})
	return r
}

// serve starts a daemon's part: a manager of shims, and the service on it.
func (r *realNode) serve() {
	t := r.t
	t.Helper()
	m, err := shimclient.New(r.opt)
	if err != nil {
		t.Fatal(err)
	}
	srv, err := eventttrpc.NewServer(m, r.opt.Logger)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(r.opt.TTRPCAddress)
	l, err := net.Listen("unix", r.opt.TTRPCAddress)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		srv.Serve(context.Background(), l) // until Close
	}()
	r.stop = sync.OnceFunc(func() {
		srv.Close()
		<-served
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := m.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	if r.src.TaskStore, err = m.In(cristate.Namespace); err != nil {
		t.Fatal(err)
	}
	if err := m.Scan(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = m.Recover(context.WithoutCancel(t.Context())) }()
	r.boot()
	r.pod.Change(func(m *cristate.PodMeta, st *cristate.PodStatus) {
		m.Config.Linux.CgroupParent = r.cgroup
		m.Config.Linux.SecurityContext.NamespaceOptions = &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Ipc: runtime.NamespaceMode_NODE}
		st.Namespaces = nil
	})
}

// program is a container of its own processes that runs a script.
func program(name, script string) *runtime.ContainerConfig {
	c := app(name, "/bin/sh", "-c", script)
	c.Linux.SecurityContext = &runtime.LinuxContainerSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER, Ipc: runtime.NamespaceMode_NODE}}
	return c
}

// contract: 7.1.11, 7.1.12, 7.1.13, 7.1.14, 7.1.16, 7.1.17, 7.3.17, 7.3.20, 13.29
// promise: P20
func TestReal(t *testing.T) {
	r := newReal(t)
	start := time.Now()
	id := r.run(program("a", `echo out; echo err >&2; printf tail; exit 3`))
	if st := r.ended(id); st.ExitCode != 3 || st.Reason != "Error" {
		t.Errorf("%+v", st)
	}
	t.Log("created and ended after ", time.Since(start))
	// Whoever sees the exit finds everything in the log.
	if l := texts(t, r.dir+"/logs/a/0.log"); l["stdout"] != "out\ntail" || l["stderr"] != "err\n" {
		t.Errorf("%q", l)
	}
	c := program("b", `trap 'echo term; exit 9' TERM; while read x; do echo got $x; done; while :; do sleep 0.01; done`)
	c.Stdin = true
	id = r.run(c)
	log := r.dir + "/logs/b/0.log"
	st, err := r.s.Streams(id)
	if err != nil {
		t.Fatal(err)
	}
	in, err := os.OpenFile(st.Stdin, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	fmt.Fprintln(in, "first")
	r.until("input arrives", func() bool { return texts(t, log)["stdout"] == "got first\n" })
	if err := os.Rename(log, log+".1"); err != nil {
		t.Fatal(err)
	}
	if err := r.s.ReopenLog(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(in, "second")
	r.until("the new log is written", func() bool { return texts(t, log)["stdout"] == "got second\n" })
	if l := texts(t, log+".1"); l["stdout"] != "got first\n" {
		t.Errorf("%q", l)
	}
	if err := r.s.UpdateResources(t.Context(), id, &runtime.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 << 20}, nil); err != nil {
		t.Fatal(err)
	}
	pid := r.get(id).Status().Pid
	if got := limitOf(t, pid); got != "67108864" {
		t.Errorf("memory limit in the kernel is %s", got)
	}
	if err := r.s.Stop(t.Context(), id, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	if st := r.ended(id); st.ExitCode != 9 {
		t.Errorf("%+v", st)
	}
	if l := texts(t, log); !strings.HasSuffix(l["stdout"], "term\n") {
		t.Errorf("%q", l)
	}
	id = r.run(program("c", `trap '' TERM; echo deaf; sleep 1000`))
	r.until("it is deaf", func() bool { return texts(t, r.dir+"/logs/c/0.log")["stdout"] != "" })
	if err := r.s.Stop(t.Context(), id, time.Second/10); err != nil {
		t.Fatal(err)
	}
	if st := r.ended(id); st.ExitCode != 137 || st.Reason != "Error" {
		t.Errorf("%+v, log %q", st, texts(t, r.dir+"/logs/c/0.log"))
	}
	bad := app("bad", "/bin/none")
	bad.Linux = program("", "").Linux
	id = r.create(bad)
	if err := r.s.Start(t.Context(), id); err == nil {
		t.Error("a missing program was started")
	}
	if a := r.get(id).Answer(cristate.ImageNames{}); a.ExitCode != 128 || a.Reason != "StartError" || !strings.Contains(a.Message, "/bin/none") {
		t.Errorf("%+v", a)
	}
	if err := r.s.RemoveAll(t.Context(), r.podID); err != nil {
		t.Fatal(err)
	}
	r.nothingLeft()
}

// limitOf reads a process's memory limit of the first hierarchy that has one.
func limitOf(t *testing.T, pid uint32) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for _, path := range []string{"/sys/fs/cgroup/memory" + f[2] + "/memory.limit_in_bytes", "/sys/fs/cgroup" + f[2] + "/memory.max"} {
			if f[1] != "" && !slices.Contains(strings.Split(f[1], ","), "memory") {
				continue
			}
			if b, err := os.ReadFile(path); err == nil {
				return strings.TrimSpace(string(b))
			}
		}
	}
	return ""
}

// Containers outlive the daemon's part; those that ended meanwhile are found.
// contract: 7.3.30
// promise: P18, P20
func TestRealRestart(t *testing.T) {
	r := newReal(t)
	alive, dying := r.run(program("alive", `trap 'echo bye; exit 4' TERM; echo one; while :; do sleep 0.01; done`)), r.run(program("dying", `while [ ! -e /tmp/go ]; do sleep 0.01; done; echo last; exit 6`))
	root := fmt.Sprintf("/proc/%d/root", r.get(dying).Status().Pid)
	pid := r.get(alive).Status().Pid
	r.until("both are there", func() bool { return texts(t, r.dir+"/logs/alive/0.log")["stdout"] != "" })
	r.kill()
	r.stop()
	if err := os.WriteFile(root+"/tmp/go", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	r.until("it has ended", func() bool { _, err := os.Stat(root + "/bin"); return errors.Is(err, os.ErrNotExist) })
	r.serve()
	if st := r.ended(dying); st.ExitCode != 6 || st.Reason != "Error" {
		t.Errorf("%+v", st)
	}
	if l := texts(t, r.dir+"/logs/dying/0.log"); l["stdout"] != "last\n" {
		t.Errorf("%q", l)
	}
	if st := r.get(alive).Status(); st.State() != runtime.ContainerState_CONTAINER_RUNNING || st.Pid != pid {
		t.Errorf("%+v", st)
	}
	if err := r.s.Stop(t.Context(), alive, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	if st := r.ended(alive); st.ExitCode != 4 {
		t.Errorf("%+v", st)
	}
	if l := texts(t, r.dir+"/logs/alive/0.log"); l["stdout"] != "one\nbye\n" {
		t.Errorf("%q", l)
	}
	if err := r.s.RemoveAll(t.Context(), r.podID); err != nil {
		t.Fatal(err)
	}
	r.nothingLeft()
}

// The kernel's kill is told from another's.
// promise: P18
func TestRealOOM(t *testing.T) {
	r := newReal(t)
	c := program("oom", `cat /proc/self/cgroup; x=a; while :; do x=$x$x; done`)
	c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 16 << 20, MemorySwapLimitInBytes: 16 << 20}
	if st := r.ended(r.run(c)); st.Reason != "OOMKilled" || st.ExitCode != 137 {
		t.Errorf("%+v", st)
	}
	c = program("killed", `sleep 1000`)
	c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}
	id := r.run(c)
	if err := unix.Kill(int(r.get(id).Status().Pid), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if st := r.ended(id); st.Reason != "Error" || st.ExitCode != 137 {
		t.Errorf("%+v", st)
	}
}

// contract: 7.1.23
func TestRealCheckpoint(t *testing.T) {
	r := newReal(t)
	id := r.run(program("a", `sleep 1000`))
	at := r.dir + "/checkpoint.tar"
	err := r.s.Checkpoint(t.Context(), id, at, time.Minute)
	if _, lerr := exec.LookPath("criu"); lerr != nil {
		if err == nil || !strings.Contains(err.Error(), "criu") {
			t.Errorf("without criu: %v", err)
		}
		if _, serr := os.Stat(at); !errors.Is(serr, os.ErrNotExist) {
			t.Errorf("an archive: %v", serr)
		}
		if st := r.get(id).Status(); st.State() != runtime.ContainerState_CONTAINER_RUNNING {
			t.Errorf("%+v", st)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if e := entries(t, at); e["config.dump"] == "" || e["spec.dump"] == "" || e["rootfs-diff.tar"] == "" || e["dump.log"] == "" {
		t.Errorf("%v", e)
	}
}
