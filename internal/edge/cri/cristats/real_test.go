package cristats

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

const cgroupRoot = "/sys/fs/cgroup"

// realGroup makes a control group in all hierarchies and returns its directories.
func realGroup(t testing.TB, name string) []string {
	t.Helper()
	var dirs []string
	if _, err := os.Stat(cgroupRoot + "/cgroup.controllers"); err == nil {
		dirs = []string{filepath.Join(cgroupRoot, name)}
	} else {
		for _, c := range []string{"cpu", "cpuacct", "memory", "blkio", "pids"} {
			if _, err := os.Stat(filepath.Join(cgroupRoot, c, "cgroup.procs")); err == nil {
				dirs = append(dirs, filepath.Join(cgroupRoot, c, name))
			}
		}
	}
	if len(dirs) == 0 {
		t.Skip("no control groups on this host")
	}
	for _, d := range dirs {
		if above := filepath.Dir(d); len(dirs) == 1 && above != cgroupRoot {
			_ = os.WriteFile(above+"/cgroup.subtree_control", []byte("+cpu +memory +io +pids"), 0)
		}
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Skipf("a control group cannot be made: %v", err)
		}
		t.Cleanup(func() {
			for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
				if err := os.Remove(d); err == nil || time.Now().After(deadline) {
					return
				}
			}
		})
	}
	return dirs
}

// start runs a shell command whose process is in the groups from the first.
func start(t testing.TB, dirs []string, script string) uint32 {
	t.Helper()
	var join strings.Builder
	for _, d := range dirs {
		fmt.Fprintf(&join, "echo $$ > %s/cgroup.procs || exit 9\n", d)
	}
	cmd := exec.Command("/bin/sh", "-c", join.String()+"echo ready\n"+script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	ready := make([]byte, 6)
	if n, err := out.Read(ready); err != nil || string(ready[:n]) != "ready\n" {
		t.Skipf("a process cannot be put into a control group: %q %v", ready[:n], err)
	}
	return uint32(cmd.Process.Pid)
}

// TestRealGroup measures a busy process in a control group of the kernel.
//
// contract: 7.1.20, 13.28, 9.2.1
func TestRealGroup(t *testing.T) {
	s := New(Options{Pods: cristate.NewPods(), Containers: cristate.NewContainers()})
	h := &host{Service: s, t: t}
	name := "gantry-cristats-" + strconv.Itoa(os.Getpid())
	parents := realGroup(t, name)
	id := cristate.NewID()
	dirs := realGroup(t, name+"/"+id)
	if len(parents) != len(dirs) {
		t.Skip("not all hierarchies can be used")
	}
	pid := start(t, dirs, "while :; do :; done")
	h.pod("p1", "/"+name, "", 0)
	c := h.container(id, "p1", pid)
	now := time.Now().UnixNano()
	if err := c.Change(func(st *cristate.Status) error { st.StartedAt = now; return nil }); err != nil {
		t.Fatal(err)
	}
	first, err := s.ContainerStats(t.Context(), id)
	if err != nil || first.GetCpu().GetUsageNanoCores().GetValue() == 0 {
		g, now, gerr := s.ofContainer(h.entry(id), c)
		t.Fatalf("%v %v: %v %v %v", first, err, g, now, gerr) // present from the first answer on
	}
	var st *runtime.ContainerStats
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if st, err = s.ContainerStats(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if st.Cpu.UsageCoreNanoSeconds.Value > first.Cpu.UsageCoreNanoSeconds.GetValue()+3e8 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no CPU usage: %v", st.Cpu)
		}
	}
	if n := st.Cpu.UsageNanoCores.Value; n < 1e7 || n > 2e9 {
		t.Errorf("%d nanocores for a busy loop", n)
	}
	// The kernel counts faults late.
	if st.Memory.GetUsageBytes().GetValue() == 0 || st.Memory.PageFaults == nil {
		t.Errorf("%v", st.Memory)
	}
	pod, err := s.PodSandboxStats(t.Context(), "p1")
	if err != nil || pod.Linux.Cpu.GetUsageCoreNanoSeconds().GetValue() < st.Cpu.UsageCoreNanoSeconds.Value || pod.Linux.Process.ProcessCount.GetValue() != 1 {
		t.Errorf("%v %v", pod, err)
	}
	all, err := s.PodSandboxMetrics(t.Context())
	if err != nil || len(all) != 1 || len(all[0].ContainerMetrics) != 1 {
		t.Fatal(all, err)
	}
	given := map[string]uint64{}
	for _, m := range all[0].ContainerMetrics[0].Metrics {
		given[strings.TrimPrefix(m.Name, "container_")] = m.Value.Value
	}
	if given["processes"] != 1 || given["threads"] != 1 || given["file_descriptors"] < 2 || given["ulimits_soft"] == 0 || given["memory_usage_bytes"] == 0 || given["spec_cpu_shares"] == 0 {
		t.Errorf("%v", given)
	}
}

// TestRealNetwork reads a pinned network namespace with nobody inside, and the
// same through a process; the daemon's threads stay where they are.
//
// contract: 7.1.20
func TestRealNetwork(t *testing.T) {
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	netns := filepath.Join(dir, "net")
	if err := os.WriteFile(netns, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	made := make(chan error)
	done, tid := make(chan struct{}), make(chan int, 1)
	var enter func()
	enter = func() {
		goruntime.LockOSThread()
		if unix.Gettid() == os.Getpid() { // the first thread never ends: it stays where it is
			go enter()
			<-done
			goruntime.UnlockOSThread()
			return
		}
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = exec.Command("ip", "link", "add", "eth0", "type", "bridge").Run()
		}
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", netns, "", unix.MS_BIND, "")
		}
		tid <- unix.Gettid()
		made <- err
		<-done // the thread ends with the goroutine
	}
	go enter()
	pid := uint32(<-tid)
	defer func() {
		close(done)
		for at := time.Now(); time.Since(at) < 10*time.Second; goruntime.Gosched() {
			if _, err := os.Stat("/proc/self/task/" + strconv.Itoa(int(pid))); err != nil {
				return
			}
		}
		t.Error("the thread in another network did not end")
	}()
	if err := <-made; err != nil {
		t.Skipf("a network namespace cannot be made: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(netns, unix.MNT_DETACH) })
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	s := New(Options{Pods: cristate.NewPods(), Containers: cristate.NewContainers()})
	h := &host{Service: s, t: t}
	h.pod("empty", "", netns, 0)
	h.pod("entered", "", netns, pid)
	h.pod("elsewhere", "", netns, uint32(os.Getpid())) // its process left
	h.pod("none", "", filepath.Join(dir, "gone"), 0)
	for range 20 {
		all, err := s.ListPodSandboxStats(t.Context(), nil)
		if err != nil || len(all) != 4 {
			t.Fatal(all, err)
		}
		for _, st := range all {
			name := st.Linux.Network.GetDefaultInterface().GetName()
			if want := map[bool]string{true: "", false: "eth0"}[st.Attributes.Id == "none"]; name != want || len(st.Linux.Network.GetInterfaces()) != 0 {
				t.Fatalf("%s: %q", st.Attributes.Id, name)
			}
		}
	}
	for _, task := range mustReadDir(t, "/proc/self/task") {
		link, err := os.Readlink("/proc/self/task/" + task + "/ns/net")
		if err == nil && link != before && task != strconv.Itoa(int(pid)) {
			t.Errorf("thread %s is in %s", task, link)
		}
	}
	if ifs, err := net.Interfaces(); err != nil || len(ifs) == 0 {
		t.Error(ifs, err)
	}
}

func mustReadDir(t *testing.T, dir string) []string {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// busyHost has pods with two containers each, in groups of the kernel.
func busyHost(b *testing.B, pods int) *host {
	b.Helper()
	s := New(Options{Pods: cristate.NewPods(), Containers: cristate.NewContainers(), Period: time.Second})
	h := &host{Service: s, t: b}
	root := "gantry-cristats-" + strconv.Itoa(os.Getpid())
	realGroup(b, root)
	for i := range pods {
		parent := fmt.Sprintf("%s/pod%03d", root, i)
		realGroup(b, parent)
		p := h.pod(fmt.Sprintf("p%03d", i), "/"+parent, "", 0)
		for j := range 2 {
			id := fmt.Sprintf("c%03d-%d", i, j)
			realGroup(b, parent+"/"+id)
			c := h.container(id, p.ID(), uint32(os.Getpid()))
			e := h.entry(id) // as if its process had been found there
			g, err := s.tree.ofParent("/" + parent + "/" + id)
			if err != nil {
				b.Fatal(err)
			}
			e.key, e.group = strconv.Itoa(int(c.Status().Pid)), g
		}
	}
	return h
}

// BenchmarkSample is one second of the sampler for 200 pods of two containers:
// in idle, most are not due; in busy, all 600 groups are read.
func BenchmarkSample(b *testing.B) {
	h := busyHost(b, 200)
	for name, due := range map[string]bool{"idle": false, "busy": true} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var before, after unix.Rusage
			_ = unix.Getrusage(unix.RUSAGE_SELF, &before)
			n := 0
			for b.Loop() {
				for _, e := range h.entries {
					if n++; due || n%maxSkip == 0 {
						e.due = time.Time{}
					}
				}
				h.sample(b.Context())
			}
			_ = unix.Getrusage(unix.RUSAGE_SELF, &after)
			cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
			b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op")
		})
	}
}

// BenchmarkList answers a request for all containers of 200 pods, and for the pods.
func BenchmarkList(b *testing.B) {
	h := busyHost(b, 200)
	b.Run("containers", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if all, err := h.ListContainerStats(b.Context(), nil); err != nil || len(all) != 400 {
				b.Fatal(len(all), err)
			}
		}
	})
	b.Run("pods", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if all, err := h.ListPodSandboxStats(b.Context(), nil); err != nil || len(all) != 200 {
				b.Fatal(len(all), err)
			}
		}
	})
}
