//go:build linux

package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/internal/lib/reaper"
)

// drivers runs a test with libcontainer in process and with every OCI runtime
// that is installed.
func drivers(t *testing.T, fn func(t *testing.T, d *daemon, opts *options.Options)) {
	t.Helper()
	for _, name := range []string{"", "runc", "crun"} {
		t.Run("driver="+name, func(t *testing.T) {
			d := newDaemon(t)
			if name != "" {
				if _, err := exec.LookPath(name); err != nil {
					t.Skip(err)
				}
			}
			if name == "crun" && hybrid() {
				// It refuses such a host: hide one of them from it.
				name = d.dir + "/crun"
				if err := os.WriteFile(name, []byte("#!/bin/sh\nexec unshare -m --propagation slave sh -c 'umount /sys/fs/cgroup/unified && mount -t tmpfs t /sys/fs/cgroup/unified && exec crun \"$@\"' crun \"$@\"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			fn(t, d, &options.Options{BinaryName: name})
		})
	}
}

// hybrid says whether the host has cgroups of both versions.
func hybrid() bool {
	_, err := os.Stat("/sys/fs/cgroup/unified")
	return err == nil
}

func (k *task) with(o *options.Options) *task {
	o.Root = k.opts.Root
	k.opts = o
	return k
}

// The main path: every event once and in order, the exit code, and nothing left.
// contract: 1.4.1, 1.4.2, 1.6.7, 1.6.8, 5.2.3, 5.3.1, 5.3.2, 5.3.4, 13.1, 13.17, 13.45
func TestLifecycle(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sh", "-c", "echo out; echo err >&2; cat; exit 7").with(opts).fifos().start()
		pid := k.create()
		if st := k.state(""); st.Status != tasktypes.Status_CREATED || st.Pid != pid || st.Bundle != k.bundle || st.Stdout != k.stdout {
			t.Errorf("created: %v", st)
		}
		if b, err := os.ReadFile(k.bundle + "/init.pid"); err != nil || string(b) != fmt.Sprint(pid) {
			t.Errorf("init.pid: %q %v", b, err)
		}
		k.must("Start", &taskapi.StartRequest{ID: k.id}, &taskapi.StartResponse{})
		k.out.await(t, "out\n")
		k.errs.await(t, "err\n")
		if st := k.state(""); st.Status != tasktypes.Status_RUNNING {
			t.Errorf("running: %v", st)
		}
		if err := k.call("Start", &taskapi.StartRequest{ID: k.id}, nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("second start: %v", err)
		}
		if err := k.call("Delete", &taskapi.DeleteRequest{ID: k.id}, &taskapi.DeleteResponse{}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("delete of a running container: %v", err)
		}
		if _, err := k.tryCreate(); !errdefs.IsAlreadyExists(err) {
			t.Errorf("second create: %v", err)
		}
		in, err := os.OpenFile(k.stdin, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(in, "from stdin\n")
		in.Close()
		k.out.await(t, "from stdin\n")
		// A client that left is not the end of the input: CloseIO is.
		if st := k.state(""); st.Status != tasktypes.Status_RUNNING {
			t.Errorf("after the client left: %v", st)
		}
		k.must("CloseIO", &taskapi.CloseIORequest{ID: k.id, Stdin: true}, nil)
		w := k.wait("")
		if w.ExitStatus != 7 || w.ExitedAt == nil {
			t.Errorf("wait: %v", w)
		}
		if st := k.state(""); st.Status != tasktypes.Status_STOPPED || st.Pid != pid || st.ExitStatus != 7 {
			t.Errorf("stopped: %v", st)
		}
		if err := k.call("Kill", &taskapi.KillRequest{ID: k.id, Signal: 9}, nil); !errdefs.IsNotFound(err) {
			t.Errorf("kill of a stopped container: %v", err)
		}
		k.must("Kill", &taskapi.KillRequest{ID: k.id, Signal: 9, All: true}, nil)
		if del := k.delete(""); del.Pid != pid || del.ExitStatus != 7 || !del.ExitedAt.AsTime().Equal(w.ExitedAt.AsTime()) {
			t.Errorf("delete: %v", del)
		}
		if err := k.call("State", &taskapi.StateRequest{ID: k.id}, &taskapi.StateResponse{}); !errdefs.IsNotFound(err) {
			t.Errorf("state of a deleted container: %v", err)
		}
		k.finish()
		want := []string{"/tasks/create", "/tasks/start", "/tasks/exit c1 7", "/tasks/delete"}
		if diff := cmp.Diff(want, d.topics("c1")); diff != "" {
			t.Error(diff)
		}
	})
}

// The older of the two services is the same.
// contract: 1.4.3
func TestTaskV2(t *testing.T) {
	k := newDaemon(t).newTask("c1", "sleep", "100")
	k.service = "containerd.task.v2.Task"
	k.run()
	k.exec("e1", nil, "sh", "-c", "exit 3")
	if w := k.wait("e1"); w.ExitStatus != 3 {
		t.Errorf("exec: %v", w)
	}
	k.kill("", unix.SIGKILL)
	if w := k.wait(""); w.ExitStatus != 137 {
		t.Errorf("killed: %v", w)
	}
	k.delete("")
	k.finish()
}

// contract: 1.6.8, 5.3.2, 5.3.3, 5.3.4, 13.17, 13.39
func TestExec(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sleep", "100").with(opts).run()
		out := read(t, fifo(t, k.bundle+"/eout"))
		pid := k.exec("e1", &taskapi.ExecProcessRequest{Stdout: k.bundle + "/eout"}, "sh", "-c", "echo from exec; exit 5")
		if w := k.wait("e1"); w.ExitStatus != 5 {
			t.Errorf("exec: %v", w)
		}
		out.await(t, "from exec\n")
		if st := k.state("e1"); st.Status != tasktypes.Status_STOPPED || st.Pid != pid || st.ExitStatus != 5 || st.ExecID != "e1" {
			t.Errorf("state: %v", st)
		}
		if del := k.delete("e1"); del.Pid != pid || del.ExitStatus != 5 {
			t.Errorf("delete: %v", del)
		}
		if err := k.call("Wait", &taskapi.WaitRequest{ID: k.id, ExecID: "e1"}, &taskapi.WaitResponse{}); !errdefs.IsNotFound(err) {
			t.Errorf("wait for a deleted exec: %v", err)
		}
		// Signals reach the process they are for.
		e2 := k.exec("e2", nil, "sleep", "100")
		if err := k.call("Delete", &taskapi.DeleteRequest{ID: k.id, ExecID: "e2"}, nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("delete of a running exec: %v", err)
		}
		var pids taskapi.PidsResponse
		k.must("Pids", &taskapi.PidsRequest{ID: k.id}, &pids)
		found := false
		for _, p := range pids.Processes {
			var info options.ProcessDetails
			if p.Pid == e2 && p.Info.GetTypeUrl() == "containerd.runc.v1.ProcessDetails" && proto.Unmarshal(p.Info.Value, &info) == nil {
				found = info.ExecID == "e2"
			}
		}
		if !found || len(pids.Processes) != 2 {
			t.Errorf("pids: %v", pids.Processes)
		}
		k.kill("e2", unix.SIGTERM)
		if w := k.wait("e2"); w.ExitStatus != 143 {
			t.Errorf("terminated exec: %v", w)
		}
		// What runs when the first process dies exits before it.
		k.exec("e3", nil, "sleep", "100")
		k.exec("e4", nil, "sleep", "100")
		k.kill("", unix.SIGKILL)
		k.wait("")
		k.delete("")
		k.finish()
		got := d.topics("c1")
		tail := got[len(got)-4:]
		if tail[2] != "/tasks/exit c1 137" || tail[3] != "/tasks/delete" ||
			!slices.Contains(tail, "/tasks/exit e3 137") || !slices.Contains(tail, "/tasks/exit e4 137") {
			t.Errorf("the exits of the others do not come first: %q", got)
		}
		want := []string{"/tasks/create", "/tasks/start", "/tasks/exec-added e1", "/tasks/exec-started e1", "/tasks/exit e1 5",
			"/tasks/exec-added e2", "/tasks/exec-started e2", "/tasks/exit e2 143"}
		if diff := cmp.Diff(want, got[:len(want)]); diff != "" {
			t.Error(diff)
		}
	})
}

// Without process ids of its own, nobody but the shim ends the others.
// contract: 1.6.8, 5.3.3
func TestSharedPidNamespace(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sh", "-c", "sleep 1000 & exec sleep 1001").with(opts)
		k.spec.Linux.Namespaces = slices.DeleteFunc(k.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
		k.run()
		child := 0
		eventually(t, "the child", func() bool {
			var pids taskapi.PidsResponse
			k.must("Pids", &taskapi.PidsRequest{ID: k.id}, &pids)
			for _, p := range pids.Processes {
				if p.Pid != k.state("").Pid {
					child = int(p.Pid)
				}
			}
			return child != 0
		})
		k.exec("e1", nil, "sleep", "100")
		k.kill("", unix.SIGTERM)
		k.wait("")
		eventually(t, "the end of the child", func() bool { return !alive(child) })
		k.delete("")
		k.finish()
		got := d.topics("c1")
		if diff := cmp.Diff([]string{"/tasks/exit e1 137", "/tasks/exit c1 143", "/tasks/delete"}, got[len(got)-3:]); diff != "" {
			t.Error(diff)
		}
	})
}

// A process may be gone before Start has returned.
// contract: 1.6.8, 5.3.3
func TestInstantExits(t *testing.T) {
	d := newDaemon(t)
	anchor := d.newTask("anchor", "sleep", "1000").run()
	for i := range 100 {
		id := fmt.Sprint("e", i)
		anchor.exec(id, nil, "sh", "-c", fmt.Sprint("exit ", i))
		if w := anchor.wait(id); w.ExitStatus != uint32(i) {
			t.Fatalf("exec %d: %v", i, w)
		}
		anchor.delete(id)
	}
	for i := range 20 {
		k := d.newTask(fmt.Sprint("c", i), "true")
		k.spec.Annotations = map[string]string{"io.containerd.runc.v2.group": "anchor"}
		k.run()
		if w := k.wait(""); w.ExitStatus != 0 {
			t.Fatalf("container %d: %v", i, w)
		}
		k.delete("")
		d.await(k.id, "/tasks/delete")
		if diff := cmp.Diff([]string{"/tasks/create", "/tasks/start", "/tasks/exit " + k.id + " 0", "/tasks/delete"}, d.topics(k.id)); diff != "" {
			t.Fatal(diff)
		}
	}
	anchor.kill("", unix.SIGKILL)
	anchor.wait("")
	anchor.delete("")
	anchor.finish()
	started := map[string]bool{}
	for _, l := range d.topics("anchor") {
		if id, ok := strings.CutPrefix(l, "/tasks/exec-started "); ok {
			started[id] = true
		} else if f := strings.Fields(l); f[0] == "/tasks/exit" && f[1] != "anchor" && !started[f[1]] {
			t.Errorf("%s exited before it was started", f[1])
		}
	}
	if len(started) != 100 {
		t.Errorf("%d were started", len(started))
	}
}

// Who waits for the end of a process finds all that it printed, and closes its
// streams at once, as Debian's ctr does. What others hold open delays nobody
// for long.
// promise: P20
func TestOutputBeforeEnd(t *testing.T) {
	d := newDaemon(t)
	k := d.newTask("c", "sleep", "1000").run()
	path := fifo(t, k.bundle+"/own")
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const much = 60000 // a FIFO holds it
	buf := make([]byte, 2*much)
	for i := range 100 {
		id := fmt.Sprint("e", i)
		k.exec(id, &taskapi.ExecProcessRequest{Stdout: path}, "head", "-c", fmt.Sprint(much), "/dev/zero")
		k.wait(id)
		if n, err := unix.Read(fd, buf); n != much {
			t.Fatalf("%d bytes, %v after the end of %s", n, err, id)
		}
		k.delete(id)
	}
	began := time.Now()
	k.exec("held", &taskapi.ExecProcessRequest{Stdout: path}, "sh", "-c", "sleep 1000 &")
	k.wait("held")
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("told after %v", took)
	}
	k.kill("", unix.SIGKILL)
	k.wait("")
	k.delete("")
	k.finish()
}

// contract: 5.3.5
func TestTerminal(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sh", "-c", "stty size; read x; stty size; echo got $x; echo err >&2; exit 4").with(opts)
		k.terminal, k.spec.Process.Terminal = true, true
		k.stdin, k.stdout = fifo(t, k.bundle+"/in"), fifo(t, k.bundle+"/out")
		k.out = read(t, k.stdout)
		k.start()
		k.create()
		k.must("ResizePty", &taskapi.ResizePtyRequest{ID: k.id, Width: 91, Height: 17}, nil)
		k.must("Start", &taskapi.StartRequest{ID: k.id}, &taskapi.StartResponse{})
		k.out.await(t, "17 91")
		k.must("ResizePty", &taskapi.ResizePtyRequest{ID: k.id, Width: 80, Height: 25}, nil)
		in, err := os.OpenFile(k.stdin, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(in, "line\n")
		in.Close()
		k.out.await(t, "25 80")
		k.out.await(t, "got line")
		k.out.await(t, "err")
		if w := k.wait(""); w.ExitStatus != 4 {
			t.Errorf("wait: %v", w)
		}
		k.delete("")

		// A process with a terminal in a container without.
		k2 := d.newTask("c2", "sleep", "100").with(&options.Options{BinaryName: opts.BinaryName})
		k2.spec.Annotations = map[string]string{"io.containerd.runc.v2.group": "c1"}
		k2.run()
		out := read(t, fifo(t, k2.bundle+"/eout"))
		k2.exec("e1", &taskapi.ExecProcessRequest{Stdout: k2.bundle + "/eout", Terminal: true}, "sh", "-c", "test -t 0 && test -t 1 && echo is a tty; sleep 0.1")
		out.await(t, "is a tty")
		if w := k2.wait("e1"); w.ExitStatus != 0 {
			t.Errorf("exec: %v", w)
		}
		k2.delete("e1")
		k2.kill("", unix.SIGKILL)
		k2.wait("")
		k2.delete("")
		k2.finish()
	})
}

// Clients come and go; what is written meanwhile waits in the FIFO.
// contract: 5.3.5, 13.19
func TestReattach(t *testing.T) {
	k := newDaemon(t).newTask("c1", "cat")
	k.stdin, k.stdout = fifo(t, k.bundle+"/in"), fifo(t, k.bundle+"/out")
	k.run() // nobody has opened any of them
	for i := range 3 {
		line := fmt.Sprintf("visit %d\n", i)
		in, err := os.OpenFile(k.stdin, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(in, line)
		in.Close()
		// No writer but the shim: opening to read does not block.
		out, err := os.OpenFile(k.stdout, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		_ = out.SetReadDeadline(time.Now().Add(20 * time.Second))
		buf := make([]byte, 100)
		n, err := out.Read(buf)
		if err != nil || string(buf[:n]) != line {
			t.Errorf("visit %d: %q, %v", i, buf[:n], err)
		}
		out.Close()
	}
	k.must("CloseIO", &taskapi.CloseIORequest{ID: k.id}, nil) // not stdin: nothing
	if st := k.state(""); st.Status != tasktypes.Status_RUNNING {
		t.Errorf("%v", st)
	}
	k.must("CloseIO", &taskapi.CloseIORequest{ID: k.id, Stdin: true}, nil)
	if w := k.wait(""); w.ExitStatus != 0 {
		t.Errorf("%v", w)
	}
	k.delete("")
	k.finish()
}

// Output that nobody reads holds neither the container nor Delete.
// contract: 5.3.4
func TestUnreadOutput(t *testing.T) {
	k := newDaemon(t).newTask("c1", "sh", "-c", "dd if=/bin/busybox bs=200k count=1")
	k.stdout = fifo(t, k.bundle+"/out")
	k.run()
	eventually(t, "a blocked writer", func() bool {
		n := 0
		f, err := os.OpenFile(k.stdout, os.O_RDWR|unix.O_NONBLOCK, 0)
		if err != nil {
			return false
		}
		defer f.Close()
		n, _ = unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ)
		return n >= 60000
	})
	k.kill("", unix.SIGKILL)
	if w := k.wait(""); w.ExitStatus != 137 {
		t.Errorf("%v", w)
	}
	start := time.Now()
	k.delete("")
	if d := time.Since(start); d > 15*time.Second {
		t.Errorf("delete took %v", d)
	}
	k.finish()
}

// contract: 1.6.7
func TestPauseResume(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sh", "-c", "while read x; do echo $x; done").with(opts).fifos().run()
		in, err := os.OpenFile(k.stdin, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if err := k.call("Resume", &taskapi.ResumeRequest{ID: k.id}, nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("resume of a running container: %v", err)
		}
		k.must("Pause", &taskapi.PauseRequest{ID: k.id}, nil)
		if st := k.state(""); st.Status != tasktypes.Status_PAUSED {
			t.Errorf("%v", st)
		}
		if err := k.call("Pause", &taskapi.PauseRequest{ID: k.id}, nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("second pause: %v", err)
		}
		if err := k.call("Exec", &taskapi.ExecProcessRequest{ID: k.id, ExecID: "e", Spec: asJSON(t, "Process", k.spec.Process)}, nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("exec in a paused container: %v", err)
		}
		fmt.Fprintln(in, "thawed")
		k.must("Resume", &taskapi.ResumeRequest{ID: k.id}, nil)
		k.out.await(t, "thawed")
		// What is frozen with it is paused too, and its end is no other's thaw.
		k.exec("e", nil, "sleep", "100")
		k.must("Pause", &taskapi.PauseRequest{ID: k.id}, nil)
		if st := k.state("e"); st.Status != tasktypes.Status_PAUSED {
			t.Errorf("exec: %v", st)
		}
		k.kill("e", unix.SIGKILL)
		if st := k.state(""); st.Status != tasktypes.Status_PAUSED {
			t.Errorf("after the kill of an exec: %v", st)
		}
		k.must("Resume", &taskapi.ResumeRequest{ID: k.id}, nil)
		if w := k.wait("e"); w.ExitStatus != 137 {
			t.Errorf("exec: %v", w)
		}
		// A frozen container can be killed.
		k.must("Pause", &taskapi.PauseRequest{ID: k.id}, nil)
		k.kill("", unix.SIGKILL)
		if w := k.wait(""); w.ExitStatus != 137 {
			t.Errorf("%v", w)
		}
		k.delete("")
		k.finish()
		// So can all of one.
		all := d.newTask("c2", "sh", "-c", "sleep 100 & sleep 100").with(&options.Options{BinaryName: opts.BinaryName}).run()
		all.must("Pause", &taskapi.PauseRequest{ID: all.id}, nil)
		all.must("Kill", &taskapi.KillRequest{ID: all.id, Signal: uint32(unix.SIGKILL), All: true}, nil)
		if w := all.wait(""); w.ExitStatus != 137 {
			t.Errorf("%v", w)
		}
		all.delete("")
		all.finish()
		want := []string{"/tasks/create", "/tasks/start", "/tasks/paused", "/tasks/resumed", "/tasks/exec-added e", "/tasks/exec-started e",
			"/tasks/paused", "/tasks/resumed", "/tasks/paused", "/tasks/exit c1 137", "/tasks/delete"}
		got := slices.DeleteFunc(d.topics("c1"), func(line string) bool { return line == "/tasks/exit e 137" }) // at once with cgroup v2
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

func cgroupFile(t *testing.T, k *task, v1name, v2name string) string {
	t.Helper()
	for _, p := range []string{"/sys/fs/cgroup/memory" + k.spec.Linux.CgroupsPath + "/" + v1name, "/sys/fs/cgroup/pids" + k.spec.Linux.CgroupsPath + "/" + v1name,
		"/sys/fs/cgroup" + k.spec.Linux.CgroupsPath + "/" + v2name} {
		if b, err := os.ReadFile(p); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	t.Fatalf("no %s", v1name)
	return ""
}

// contract: 5.3.6, 5.3.7, 13.23
func TestUpdateAndStats(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sleep", "100").with(opts)
		limit := int64(64 << 20)
		pids := int64(50)
		k.spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}, Pids: &specs.LinuxPids{Limit: &pids}}
		k.run()
		more := int64(96 << 20)
		k.must("Update", &taskapi.UpdateTaskRequest{ID: k.id, Resources: asJSON(t, "LinuxResources", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &more}})}, nil)
		if got := cgroupFile(t, k, "memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(more) {
			t.Errorf("memory limit %s", got)
		}
		if got := cgroupFile(t, k, "pids.max", "pids.max"); opts.BinaryName == "" && got != "50" {
			t.Errorf("a limit that was not named became %s", got)
		}
		// Processes can still be added.
		k.exec("e1", nil, "true")
		k.wait("e1")
		var s taskapi.StatsResponse
		k.must("Stats", &taskapi.StatsRequest{ID: k.id}, &s)
		switch s.Stats.TypeUrl {
		case "io.containerd.cgroups.v1.Metrics":
			var m v1.Metrics
			if err := proto.Unmarshal(s.Stats.Value, &m); err != nil || m.Memory.GetUsage().GetLimit() != uint64(more) || m.Pids.GetCurrent() == 0 || m.CPU == nil {
				t.Errorf("%v %v", &m, err)
			}
		case "io.containerd.cgroups.v2.Metrics":
			var m v2.Metrics
			if err := proto.Unmarshal(s.Stats.Value, &m); err != nil || m.Memory.GetUsageLimit() != uint64(more) || m.Pids.GetCurrent() == 0 {
				t.Errorf("%v %v", &m, err)
			}
		default:
			t.Errorf("type %s", s.Stats.TypeUrl)
		}
		for name, r := range map[string]*anypb.Any{"nothing": nil, "another type": asJSON(t, "Process", 1), "no JSON": {TypeUrl: "LinuxResources", Value: []byte("{")}} {
			if err := k.call("Update", &taskapi.UpdateTaskRequest{ID: k.id, Resources: r}, nil); !errdefs.IsInvalidArgument(err) {
				t.Errorf("update with %s: %v", name, err)
			}
		}
		k.kill("", unix.SIGKILL)
		k.wait("")
		k.delete("")
		k.finish()
	})
}

// contract: 1.6.7, 5.3.2
func TestOutOfMemory(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sh", "-c", "tail -c 200m /dev/zero").with(opts)
		k.spec.Mounts = append(k.spec.Mounts, specs.Mount{Destination: "/dev/zero", Type: "bind", Source: "/dev/zero", Options: []string{"bind"}})
		limit := int64(16 << 20)
		k.spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit, Swap: &limit},
			Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}
		k.run()
		if w := k.wait(""); w.ExitStatus != 137 {
			t.Errorf("%v", w)
		}
		k.delete("")
		k.finish()
		got := d.topics("c1")
		oom, exit := slices.Index(got, "/tasks/oom"), slices.Index(got, "/tasks/exit c1 137")
		if oom < 0 || exit < oom {
			t.Errorf("the cause does not come before the exit: %q", got)
		}
	})
}

// contract: 5.2.9, 13.22
func TestGrouping(t *testing.T) {
	for _, annotation := range []string{"io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"} {
		d := newDaemon(t)
		a := d.newTask("pod", "sleep", "100").run()
		b := d.newTask("app", "sleep", "100")
		b.spec.Annotations = map[string]string{annotation: "pod"}
		b.run()
		if a.shimPid != b.shimPid {
			t.Fatalf("%s: shims %d and %d", annotation, a.shimPid, b.shimPid)
		}
		addr, err := os.ReadFile(b.bundle + "/address")
		if first, _ := os.ReadFile(a.bundle + "/address"); err != nil || string(first) != string(addr) || !strings.HasPrefix(string(addr), "unix://"+d.sockets) {
			t.Errorf("addresses %q and %q: %v", first, addr, err)
		}
		a.kill("", unix.SIGKILL)
		a.wait("")
		a.delete("")
		// The bundle that the shim was started in goes away.
		if err := os.RemoveAll(a.bundle); err != nil {
			t.Error(err)
		}
		a.must("Shutdown", &taskapi.ShutdownRequest{ID: a.id}, nil)
		a.must("Shutdown", &taskapi.ShutdownRequest{ID: a.id, Now: true}, nil)
		if st := b.state(""); st.Status != tasktypes.Status_RUNNING {
			t.Errorf("the other container: %v", st)
		}
		c := d.newTask("late", "sh", "-c", "exit 9")
		c.spec.Annotations = map[string]string{annotation: "pod"}
		c.run()
		if w := c.wait(""); w.ExitStatus != 9 || c.shimPid != b.shimPid {
			t.Errorf("%v", w)
		}
		c.delete("")
		b.kill("", unix.SIGKILL)
		b.wait("")
		b.delete("")
		b.finish()
	}
}

// What cannot be created leaves nothing behind, and says why.
// contract: 5.3.1
func TestBadContainers(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		d.newTask("anchor", "sleep", "100").run()
		cases := map[string]struct {
			change func(k *task)
			want   string
			is     func(error) bool
		}{
			"command":   {func(k *task) { k.spec.Process.Args = []string{"nope"} }, `executable file`, nil},
			"noprocess": {func(k *task) { k.spec.Process = nil }, "no process", errdefs.IsInvalidArgument},
			"noargs":    {func(k *task) { k.spec.Process.Args = nil }, "", nil},
			"cwd":       {func(k *task) { k.spec.Process.Cwd = "/bin/busybox" }, "", nil},
			"mount": {func(k *task) {
				k.spec.Mounts = append(k.spec.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/no/such/dir", Options: []string{"bind"}})
			}, "/no/such/dir", nil},
			"stdio":   {func(k *task) { k.stdout = k.bundle + "/missing" }, "missing", errdefs.IsNotFound},
			"scheme":  {func(k *task) { k.stdout = "http://x/y" }, "scheme", errdefs.IsInvalidArgument},
			"logger":  {func(k *task) { k.stdout = "binary:///no/such/logger" }, "logger", errdefs.IsNotFound},
			"runtime": {func(k *task) { k.opts.BinaryName = "no-such-runtime" }, "no-such-runtime", errdefs.IsNotFound},
		}
		for name, c := range cases {
			k := d.newTask("bad-"+name, "sleep", "100").with(&options.Options{BinaryName: opts.BinaryName})
			k.spec.Annotations = map[string]string{"io.containerd.runc.v2.group": "anchor"}
			c.change(k)
			k.start()
			_, err := k.tryCreate()
			if err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !c.is(err) {
				t.Errorf("%s: %v", name, err)
			}
			if err := k.call("State", &taskapi.StateRequest{ID: k.id}, &taskapi.StateResponse{}); !errdefs.IsNotFound(err) {
				t.Errorf("%s: state: %v", name, err)
			}
			if m, _ := mountinfo.Mounted(k.bundle + "/rootfs"); m {
				t.Errorf("%s: rootfs is mounted", name)
			}
			if left := cgroups(k.spec.Linux.CgroupsPath); len(left) != 0 {
				t.Errorf("%s: cgroups are left: %v", name, left)
			}
			if left, _ := filepath.Glob(k.opts.Root + "/*/" + k.id); len(left) != 0 {
				t.Errorf("%s: the runtime's state is left: %v", name, left)
			}
			if got := d.topics(k.id); len(got) != 0 {
				t.Errorf("%s: events %q", name, got)
			}
		}
	})
}

// contract: 13.39
func TestBadExecs(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sleep", "100").with(opts).run()
		good := asJSON(t, "Process", k.spec.Process)
		for name, r := range map[string]*taskapi.ExecProcessRequest{
			"no spec":      {ID: k.id, ExecID: "x"},
			"no arguments": {ID: k.id, ExecID: "x", Spec: asJSON(t, "Process", specs.Process{Cwd: "/"})},
			"no id":        {ID: k.id, Spec: good},
			"a path as id": {ID: k.id, ExecID: "../x", Spec: good},
			"no JSON":      {ID: k.id, ExecID: "x", Spec: &anypb.Any{TypeUrl: "Process", Value: []byte("x")}},
		} {
			if err := k.call("Exec", r, nil); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s: %v", name, err)
			}
		}
		p := *k.spec.Process
		p.Args = []string{"nope"}
		k.must("Exec", &taskapi.ExecProcessRequest{ID: k.id, ExecID: "x", Spec: asJSON(t, "Process", p)}, nil)
		if err := k.call("Exec", &taskapi.ExecProcessRequest{ID: k.id, ExecID: "x", Spec: good}, nil); !errdefs.IsAlreadyExists(err) {
			t.Errorf("the same id: %v", err)
		}
		if err := k.call("Kill", &taskapi.KillRequest{ID: k.id, ExecID: "x", Signal: 9}, nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("kill before the start: %v", err)
		}
		if err := k.call("Start", &taskapi.StartRequest{ID: k.id, ExecID: "x"}, nil); err == nil || !strings.Contains(err.Error(), "executable file") {
			t.Errorf("start: %v", err)
		}
		k.wait("x") // at once
		k.delete("x")
		if st := k.state(""); st.Status != tasktypes.Status_RUNNING {
			t.Errorf("the container: %v", st)
		}
		if err := k.call("Kill", &taskapi.KillRequest{ID: k.id, Signal: 99}, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("signal 99: %v", err)
		}
		k.must("Kill", &taskapi.KillRequest{ID: k.id, Signal: 9, All: true}, nil)
		if w := k.wait(""); w.ExitStatus != 137 {
			t.Errorf("%v", w)
		}
		if err := k.call("Exec", &taskapi.ExecProcessRequest{ID: k.id, ExecID: "y", Spec: good}, nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("exec in a stopped container: %v", err)
		}
		k.delete("")
		k.finish()
	})
}

// Every request, empty or for a container that does not exist, gets an answer.
// contract: 13.1
func TestEmptyRequests(t *testing.T) {
	k := newDaemon(t).newTask("c1", "sleep", "100").start()
	for method, reqs := range map[string][]proto.Message{
		"State":      {&taskapi.StateRequest{}, &taskapi.StateRequest{ID: "x"}},
		"Create":     {&taskapi.CreateTaskRequest{}, &taskapi.CreateTaskRequest{ID: "x"}, &taskapi.CreateTaskRequest{ID: "x", Bundle: "/nope"}, &taskapi.CreateTaskRequest{ID: "..", Bundle: k.bundle}, &taskapi.CreateTaskRequest{ID: "x", Bundle: k.bundle, Options: &anypb.Any{TypeUrl: "x.Y"}}},
		"Start":      {&taskapi.StartRequest{}, &taskapi.StartRequest{ID: "x"}},
		"Delete":     {&taskapi.DeleteRequest{}, &taskapi.DeleteRequest{ID: "x", ExecID: "y"}},
		"Pids":       {&taskapi.PidsRequest{}},
		"Pause":      {&taskapi.PauseRequest{}},
		"Resume":     {&taskapi.ResumeRequest{}},
		"Checkpoint": {&taskapi.CheckpointTaskRequest{}},
		"Kill":       {&taskapi.KillRequest{}, &taskapi.KillRequest{ID: "x", All: true}},
		"Exec":       {&taskapi.ExecProcessRequest{}, &taskapi.ExecProcessRequest{ID: "x", ExecID: "y"}},
		"ResizePty":  {&taskapi.ResizePtyRequest{}},
		"CloseIO":    {&taskapi.CloseIORequest{}},
		"Update":     {&taskapi.UpdateTaskRequest{}},
		"Wait":       {&taskapi.WaitRequest{}},
		"Stats":      {&taskapi.StatsRequest{}},
	} {
		for _, r := range reqs {
			err := k.call(method, r, nil)
			if !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s(%v): %v", method, r, err)
			}
		}
	}
	k.finish()
}

// contract: 5.3.8
func TestCheckpointWithoutCriu(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		if _, err := exec.LookPath("criu"); err == nil {
			t.Skip("criu is installed")
		}
		k := d.newTask("c1", "sleep", "100").with(opts).run()
		err := k.call("Checkpoint", &taskapi.CheckpointTaskRequest{ID: k.id, Path: k.bundle + "/image"}, nil)
		if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "criu") {
			t.Errorf("%v", err)
		}
		if st := k.state(""); st.Status != tasktypes.Status_RUNNING {
			t.Errorf("%v", st)
		}
		k.kill("", unix.SIGKILL)
		k.wait("")
		k.delete("")
		k.finish()
	})
}

// What waits for a container that could not be restored ends with it, and so
// does the shim.
// contract: 5.3.4, 5.3.8
func TestRestoreWithoutCriu(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sleep", "100").with(opts).start()
		var made taskapi.CreateTaskResponse
		k.must("Create", &taskapi.CreateTaskRequest{ID: k.id, Bundle: k.bundle, Rootfs: k.rootfs(), Options: any(t, k.opts), Checkpoint: t.TempDir()}, &made)
		waited := make(chan error, 1)
		go func() { waited <- k.call("Wait", &taskapi.WaitRequest{ID: k.id}, &taskapi.WaitResponse{}) }()
		if err := k.call("Start", &taskapi.StartRequest{ID: k.id}, &taskapi.StartResponse{}); err == nil || made.Pid != 0 {
			t.Errorf("process %d was restored from nothing: %v", made.Pid, err)
		}
		if del := k.delete(""); del.ExitStatus != 255 {
			t.Errorf("%v", del)
		}
		if err := <-waited; err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
		k.finish()
	})
}

// A container that was never started can be deleted, and one can be killed
// before its start.
// contract: 5.3.4
func TestDeleteCreated(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sleep", "100").with(opts).start()
		pid := k.create()
		if del := k.delete(""); del.Pid != pid || del.ExitStatus != 137 {
			t.Errorf("%v", del)
		}
		if diff := cmp.Diff([]string{"/tasks/create", "/tasks/exit c1 137", "/tasks/delete"}, wantTopics(d, "c1", 3)); diff != "" {
			t.Error(diff)
		}
		k.create()
		k.kill("", unix.SIGKILL)
		if w := k.wait(""); w.ExitStatus != 137 {
			t.Errorf("%v", w)
		}
		if err := k.call("Start", &taskapi.StartRequest{ID: k.id}, nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("start of a dead container: %v", err)
		}
		k.delete("")
		k.finish()
	})
}

func wantTopics(d *daemon, id string, n int) []string {
	eventually(d.t, "events", func() bool { return len(d.topics(id)) >= n })
	return d.topics(id)
}

// A daemon that was away gets everything when it is back.
// contract: 1.4.1, 1.6.8
func TestDaemonAway(t *testing.T) {
	d := newDaemonAway(t)
	stop := d.serve()
	k := d.newTask("c1", "sleep", "100").run()
	d.await("c1", "/tasks/start")
	stop()
	k.exec("e1", nil, "sh", "-c", "exit 2")
	k.wait("e1")
	k.kill("", unix.SIGKILL)
	k.wait("")
	if slices.Contains(d.topics("c1"), "/tasks/exit c1 137") {
		t.Fatal("the daemon is not away")
	}
	os.Remove(d.address)
	d.serve()
	d.await("c1", "/tasks/exit c1 137")
	k.delete("")
	k.finish()
	want := []string{"/tasks/create", "/tasks/start", "/tasks/exec-added e1", "/tasks/exec-started e1", "/tasks/exit e1 2", "/tasks/exit c1 137", "/tasks/delete"}
	// What the daemon took and could not confirm any more is told again.
	if diff := cmp.Diff(want, slices.Compact(d.topics("c1"))); diff != "" {
		t.Error(diff)
	}
}

// The shim dies; "delete" ends the container and leaves nothing.
// contract: 5.2.1, 5.4.3, 8.3.1
func TestDeleteAfterShimDied(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		for _, paused := range []bool{false, true} {
			k := d.newTask(fmt.Sprint("c", paused), "sleep", "100").with(opts).run()
			pid := int(k.state("").Pid)
			if paused {
				k.must("Pause", &taskapi.PauseRequest{ID: k.id}, nil)
			}
			_ = reaper.Kill(k.shimPid, unix.SIGKILL)
			eventually(t, "end of the shim", func() bool { return !alive(k.shimPid) })
			if !alive(pid) {
				t.Error("the container died with its shim")
			}
			out, err := k.command(nil, "-bundle", k.bundle, "delete").Output()
			if err != nil {
				t.Fatalf("delete: %v %s", err, err.(*exec.ExitError).Stderr)
			}
			var r taskapi.DeleteResponse
			if err := proto.Unmarshal(out, &r); err != nil || int(r.Pid) != pid || r.ExitStatus != 137 || time.Since(r.ExitedAt.AsTime()) > time.Minute {
				t.Errorf("%v %v", &r, err)
			}
			if alive(pid) {
				t.Error("the container is alive")
			}
			if left := cgroups(k.spec.Linux.CgroupsPath); len(left) != 0 {
				t.Errorf("cgroups are left: %v", left)
			}
			if left, _ := filepath.Glob(k.opts.Root + "/*/*"); len(left) != 0 {
				t.Errorf("the runtime's state is left: %v", left)
			}
			if left, _ := filepath.Glob(k.sockets + "/[0-9a-f]*"); len(left) != 0 {
				t.Errorf("sockets are left: %v", left)
			}
			// Once more, with nothing there.
			if out, err := k.command(nil, "-bundle", k.bundle, "delete").CombinedOutput(); err != nil {
				t.Errorf("second delete: %v %s", err, out)
			}
		}
	})
}

// What a killed shim and its dead container left does not keep their id.
func TestIDOfDeadContainer(t *testing.T) {
	d := newDaemon(t)
	old := d.newTask("c1", "sleep", "100").run()
	pid := int(old.state("").Pid)
	_ = reaper.Kill(old.shimPid, unix.SIGKILL)
	_ = reaper.Kill(pid, unix.SIGKILL)
	eventually(t, "end of shim and container", func() bool { return !alive(old.shimPid) && !alive(pid) })
	if err := unix.Unmount(old.bundle+"/rootfs", 0); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(old.bundle); err != nil {
		t.Fatal(err)
	}
	k := d.newTask("c1", "sleep", "100").run()
	k.kill("", unix.SIGKILL)
	k.wait("")
	k.delete("")
	k.finish()
}

// contract: 5.2.11
func TestShimProcess(t *testing.T) {
	k := newDaemon(t).newTask("c1", "sh", "-c", "sleep 1000 & sleep 1000 & wait")
	k.run()
	own, _ := os.ReadFile("/proc/self/oom_score_adj")
	n, _ := strconv.Atoi(strings.TrimSpace(string(own)))
	got, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", k.shimPid))
	if err != nil || strings.TrimSpace(string(got)) != fmt.Sprint(min(n+1, 1000)) {
		t.Errorf("oom_score_adj %q for a daemon with %d: %v", got, n, err)
	}
	// An orphan of the container's runtime is the shim's child.
	st, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", k.state("").Pid))
	if err != nil || strings.Fields(string(st)[strings.LastIndexByte(string(st), ')')+1:])[1] != fmt.Sprint(k.shimPid) {
		t.Errorf("parent of the first process: %s %v", st, err)
	}
	if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", k.shimPid)); err != nil || cwd != "/" {
		t.Errorf("the shim stands in %s: %v", cwd, err)
	}
	if info, err := os.Stat(k.sockets); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("socket directory: %v %v", info, err)
	}
	if b, err := os.ReadFile("/proc/net/unix"); err != nil || strings.Contains(string(b), "@"+k.dir) {
		t.Errorf("abstract sockets: %v", err)
	}
	k.kill("", unix.SIGKILL)
	k.wait("")
	k.delete("")
	k.finish()
}

// Hooks are told where the container is.
// contract: 5.3.1
func TestHooks(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sleep", "100").with(opts)
		hook := func(name string) []specs.Hook {
			return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > " + k.bundle + "/" + name}, Env: []string{"PATH=/bin"}}}
		}
		k.spec.Hooks = &specs.Hooks{CreateRuntime: hook("createRuntime"), Poststart: hook("poststart"), Poststop: hook("poststop")}
		k.run()
		pid := k.state("").Pid
		k.kill("", unix.SIGKILL)
		k.wait("")
		k.delete("")
		k.finish()
		for _, name := range []string{"createRuntime", "poststart", "poststop"} {
			var st specs.State
			b, err := os.ReadFile(k.bundle + "/" + name)
			if err == nil {
				err = json.Unmarshal(b, &st)
			}
			if err != nil || st.ID != "c1" || st.Bundle != k.bundle || name == "createRuntime" && st.Pid != int(pid) {
				t.Errorf("%s: %s %v", name, b, err)
			}
		}
	})
}
