package cristats

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// host is a Service on a fake /sys/fs/cgroup and /proc.
type host struct {
	*Service
	t            testing.TB
	cgroup, proc string
	dir          string
}

func newHost(t testing.TB, change func(*Options)) *host {
	t.Helper()
	dir := t.TempDir()
	h := &host{t: t, dir: dir, cgroup: filepath.Join(dir, "cgroup"), proc: filepath.Join(dir, "proc")}
	o := Options{Pods: cristate.NewPods(), Containers: cristate.NewContainers(), Cgroup: h.cgroup, Proc: h.proc, Root: func(string) string { return dir }}
	if change != nil {
		change(&o)
	}
	h.Service = New(o)
	h.write("cgroup/memory.unused", "")
	return h
}

func (h *host) write(name, text string) {
	h.t.Helper()
	path := filepath.Join(h.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// pod adds a ready pod.
func (h *host) pod(id, parent, netns string, pid uint32) *cristate.Pod {
	h.t.Helper()
	cfg := &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: "name-" + id, Namespace: "ns", Uid: id}, Labels: map[string]string{"app": id},
		Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: parent}}
	p := cristate.NewPod(cristate.PodMeta{ID: id, Name: id, Config: cfg, NetNSPath: netns}, cristate.PodStatus{State: cristate.PodReady, Pid: pid, CreatedAt: time.Now().Add(-10 * time.Second)})
	if err := h.o.Pods.Add(p); err != nil {
		h.t.Fatal(err)
	}
	return p
}

// container adds a container that has run for ten seconds.
func (h *host) container(id, pod string, pid uint32) *cristate.Container {
	h.t.Helper()
	cfg := &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "name-" + id}, Labels: map[string]string{"app": id}, Annotations: map[string]string{"a": "b"},
		Image: &runtime.ImageSpec{Image: "sha256:1", UserSpecifiedImage: "busybox"}}
	began := time.Now().Add(-10 * time.Second).UnixNano()
	c := cristate.NewContainer(cristate.ContainerMeta{ID: id, Name: id, SandboxID: pod, Config: cfg}, cristate.Status{Pid: pid, CreatedAt: began, StartedAt: began}, h.t.TempDir())
	c.SetFacts(cristate.Facts{Snapshotter: "overlayfs", SnapshotKey: id})
	if err := h.o.Containers.Add(c); err != nil {
		h.t.Fatal(err)
	}
	return c
}

const pressure = "some avg10=1.50 avg60=2.00 avg300=3.25 total=4000\nfull avg10=0.00 avg60=0.10 avg300=0.00 total=7\n"

// unifiedGroup fills a group of version 2.
func (h *host) unified(group string) {
	h.write("cgroup/cgroup.controllers", "cpu io memory pids\n")
	for name, text := range map[string]string{
		"cpu.stat": "usage_usec 5000000\nuser_usec 3000000\nsystem_usec 2000000\nnr_periods 10\nnr_throttled 4\nthrottled_usec 9000000\n",
		"cpu.max":  "20000 100000\n", "cpu.weight": "39\n", "cpu.pressure": pressure, "memory.pressure": pressure, "io.pressure": pressure,
		"memory.current": "1000\n", "memory.max": "5000\n", "memory.peak": "1500\n", "memory.low": "0\n",
		"memory.swap.current": "70\n", "memory.swap.max": "100\n",
		"memory.stat":   "anon 400\nfile 500\nkernel 90\nkernel_stack 1\nfile_mapped 33\ninactive_file 300\nactive_file 200\npgfault 11\npgmajfault 12\n",
		"memory.events": "low 0\nhigh 0\nmax 6\noom 1\noom_kill 2\n",
		"io.stat":       "8:0 rbytes=100 wbytes=200 rios=3 wios=4 dbytes=5 dios=6\n254:1\n", "pids.current": "8\n", "pids.max": "max\n",
	} {
		h.write("cgroup/"+group+"/"+name, text)
	}
}

// legacy fills a group of version 1.
func (h *host) legacy(group string) {
	for name, text := range map[string]string{
		"cpu:cpu.stat": "nr_periods 10\nnr_throttled 4\nthrottled_time 9000000000\n", "cpu:cpu.cfs_period_us": "100000\n", "cpu:cpu.shares": "1024\n",
		"cpuacct:cpuacct.usage": "5000000000\n", "cpuacct:cpuacct.usage_user": "3000000000\n", "cpuacct:cpuacct.usage_sys": "2000000000\n",
		"memory:memory.usage_in_bytes": "1000\n", "memory:memory.limit_in_bytes": "5000\n", "memory:memory.max_usage_in_bytes": "1500\n",
		"memory:memory.memsw.usage_in_bytes": "1070\n", "memory:memory.memsw.limit_in_bytes": "5100\n", "memory:memory.failcnt": "6\n",
		"memory:memory.soft_limit_in_bytes": "9223372036854771712\n", "memory:memory.kmem.usage_in_bytes": "90\n",
		"memory:memory.stat": "cache 1\nrss 1\npgfault 9\npgmajfault 10\ntotal_cache 500\ntotal_rss 400\ntotal_mapped_file 33\ntotal_inactive_file 300\n" +
			"total_active_file 200\ntotal_pgfault 11\ntotal_pgmajfault 12\n",
		"memory:memory.oom_control":                       "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
		"blkio:blkio.throttle.io_service_bytes_recursive": "8:0 Read 100\n8:0 Write 200\n8:0 Discard 5\n8:0 Total 305\nTotal 305\n",
		"blkio:blkio.throttle.io_serviced_recursive":      "8:0 Read 3\n8:0 Write 4\n8:0 Discard 6\n8:0 Total 13\nTotal 13\n",
		"pids:pids.current":                               "8\n", "pids:pids.max": "max\n",
	} {
		controller, file, _ := strings.Cut(name, ":")
		h.write("cgroup/"+controller+"/"+group+"/"+file, text)
	}
}

// process puts a process with open files into a group.
func (h *host) process(pid uint32, group string, unified bool) {
	dir := fmt.Sprintf("proc/%d/", pid)
	text := "5:cpu,cpuacct:/" + group + "\n4:memory:/" + group + "\n3:blkio:/" + group + "\n2:pids:/" + group + "\n1:name=systemd:/\n0::/\n"
	procs := "cgroup/pids/" + group + "/cgroup.procs"
	if unified {
		text, procs = "0::/"+group+"\n", "cgroup/"+group+"/cgroup.procs"
	} else {
		h.write("cgroup/cpu/x", "") // mounted together, but under each name
		h.write("cgroup/cpuacct/x", "")
	}
	h.write(dir+"cgroup", text)
	h.write(procs, strconv.Itoa(int(pid))+"\n")
	h.write(dir+"limits", "Limit                     Soft Limit           Hard Limit           Units     \n"+
		"Max cpu time              unlimited            unlimited            seconds   \nMax open files            1024                 4096                 files     \n")
	h.write(dir+"fd/0", "")
	for i, target := range []string{"socket:[1]", "/dev/null", "socket:[22222]"} {
		if err := os.Symlink(target, filepath.Join(h.dir, dir+"fd", strconv.Itoa(i+1))); err != nil && !errors.Is(err, os.ErrExist) {
			h.t.Fatal(err)
		}
	}
	h.write("proc/partitions", "major minor  #blocks  name\n\n   8        0  1000 sda\n")
}

func each(t *testing.T, fn func(t *testing.T, h *host, fill func(group string), unified bool)) {
	t.Run("unified", func(t *testing.T) { h := newHost(t, nil); fn(t, h, h.unified, true) })
	t.Run("legacy", func(t *testing.T) { h := newHost(t, nil); fn(t, h, h.legacy, false) })
}

// TestContainer reads every number of a container in both versions.
//
// contract: 7.1.20, 7.3.16
func TestContainer(t *testing.T) {
	each(t, func(t *testing.T, h *host, fill func(string), unified bool) {
		fill("kubepods/pod1/c1")
		h.process(101, "kubepods/pod1/c1", unified)
		h.container("c1", "p1", 101)
		st, err := h.ContainerStats(t.Context(), "c1")
		if err != nil {
			t.Fatal(err)
		}
		if a := st.Attributes; a.Id != "c1" || a.Metadata.Name != "name-c1" || a.Labels["app"] != "c1" || a.Annotations["a"] != "b" {
			t.Errorf("%v", a)
		}
		if st.Cpu.Timestamp == 0 || st.Cpu.UsageCoreNanoSeconds.Value != 5e9 {
			t.Errorf("%v", st.Cpu)
		}
		// Five seconds of CPU in the ten since the start.
		if n := st.Cpu.UsageNanoCores.GetValue(); n < 49e7 || n > 50e7 {
			t.Errorf("%d nanocores", n)
		}
		m := st.Memory
		if m.Timestamp == 0 || m.UsageBytes.Value != 1000 || m.WorkingSetBytes.Value != 700 || m.AvailableBytes.Value != 4300 || m.RssBytes.Value != 400 || m.PageFaults.Value != 11 || m.MajorPageFaults.Value != 12 {
			t.Errorf("%v", m)
		}
		if st.Swap.SwapUsageBytes.Value != 70 || st.Swap.SwapAvailableBytes.Value != 30 {
			t.Errorf("%v", st.Swap)
		}
		if !unified {
			if st.Cpu.Psi != nil || m.Psi != nil || st.Io != nil {
				t.Error("pressure without version 2")
			}
			return
		}
		for _, p := range []*runtime.PsiStats{st.Cpu.Psi, m.Psi, st.Io.GetPsi()} {
			if p.GetSome().GetTotal() != 4_000_000 || p.Some.Avg10 != 1.5 || p.Some.Avg300 != 3.25 || p.Full.Total != 7000 || p.Full.Avg60 != 0.1 {
				t.Errorf("%v", p)
			}
		}
	})
}

// TestUnlimited: without a limit there is no available memory, without an
// accounting of swap no swap.
//
// contract: 7.1.20, 7.3.16
func TestUnlimited(t *testing.T) {
	h := newHost(t, nil)
	h.unified("c1")
	h.process(101, "c1", true)
	h.write("cgroup/c1/memory.max", "max\n")
	for _, f := range []string{"memory.swap.current", "io.pressure"} {
		if err := os.Remove(filepath.Join(h.cgroup, "c1", f)); err != nil {
			t.Fatal(err)
		}
	}
	h.container("c1", "p1", 101)
	st, err := h.ContainerStats(t.Context(), "c1")
	if err != nil || st.Memory.AvailableBytes != nil || st.Swap != nil || st.Io != nil || st.Memory.UsageBytes.GetValue() != 1000 {
		t.Errorf("%v %v", st, err)
	}
}

// TestPod measures a pod in its own group, with its containers, processes and
// network.
//
// contract: 7.1.20
func TestPod(t *testing.T) {
	each(t, func(t *testing.T, h *host, fill func(string), unified bool) {
		fill("kubepods.slice/kubepods-pod1.slice")
		fill("kubepods.slice/kubepods-pod1.slice/c1")
		h.process(101, "kubepods.slice/kubepods-pod1.slice/c1", unified)
		h.process(100, "kubepods.slice/kubepods-pod1.slice", unified)
		h.write("proc/100/net/dev", "Inter-| head\n face |bytes\n    lo: 9 9 9 9 0 0 0 0 9 9 9 9 0 0 0 0\n  net1: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n  eth0:11 12 13 14 0 0 0 0 15 16 17 18 0 0 0 0\n")
		h.write("netns", "")
		h.write("proc/100/ns/x", "")
		if err := os.Link(filepath.Join(h.dir, "netns"), filepath.Join(h.proc, "100/ns/net")); err != nil {
			t.Fatal(err)
		}
		h.pod("p1", "kubepods-pod1.slice", filepath.Join(h.dir, "netns"), 100)
		h.container("c1", "p1", 101)
		exited := h.container("c2", "p1", 102)
		if err := exited.Change(func(st *cristate.Status) error { st.FinishedAt = 1; return nil }); err != nil {
			t.Fatal(err)
		}
		st, err := h.PodSandboxStats(t.Context(), "p1")
		if err != nil {
			t.Fatal(err)
		}
		if a := st.Attributes; a.Id != "p1" || a.Metadata.Name != "name-p1" || a.Labels["app"] != "p1" {
			t.Errorf("%v", a)
		}
		l := st.Linux
		if l.Cpu.UsageCoreNanoSeconds.Value != 5e9 || l.Cpu.UsageNanoCores.GetValue() == 0 || l.Memory.WorkingSetBytes.Value != 700 || (l.Io != nil) != unified {
			t.Errorf("%v", l)
		}
		if l.Process.ProcessCount.GetValue() != 2 {
			t.Errorf("%v", l.Process)
		}
		if len(l.Containers) != 1 || l.Containers[0].Attributes.Id != "c1" || l.Containers[0].Cpu == nil {
			t.Errorf("%v", l.Containers)
		}
		n := l.Network
		if d := n.DefaultInterface; n.Timestamp == 0 || d.Name != "eth0" || d.RxBytes.Value != 11 || d.RxErrors.Value != 13 || d.TxBytes.Value != 15 || d.TxErrors.Value != 17 {
			t.Errorf("%v", d)
		}
		if len(n.Interfaces) != 1 || n.Interfaces[0].Name != "net1" {
			t.Errorf("%v", n.Interfaces)
		}
	})
}

// TestPodWithoutParent: the pod is the sum of its pause process and containers.
func TestPodWithoutParent(t *testing.T) {
	h := newHost(t, nil)
	for pid, id := range map[uint32]string{100: "p1", 101: "c1", 102: "c2"} {
		h.unified("k8s.io/" + id)
		h.process(pid, "k8s.io/"+id, true)
	}
	h.pod("p1", "", "", 100)
	h.container("c1", "p1", 101)
	h.container("c2", "p1", 102)
	st, err := h.PodSandboxStats(t.Context(), "p1")
	if err != nil {
		t.Fatal(err)
	}
	l := st.Linux
	if l.Cpu.UsageCoreNanoSeconds.Value != 15e9 || l.Cpu.UsageNanoCores.Value == 0 || l.Memory.UsageBytes.Value != 3000 || l.Memory.WorkingSetBytes.Value != 2100 || l.Process.ProcessCount.Value != 3 || l.Network != nil {
		t.Errorf("%v", l)
	}
}

// TestFilters: ids (also the beginning of one), pod and labels; what is
// unknown matches nothing; pods that are not ready have no statistics.
//
// contract: 7.1.20
func TestFilters(t *testing.T) {
	h := newHost(t, nil)
	h.pod("pod1", "", "", 0)
	h.pod("pod2", "", "", 0)
	h.pod("pod3", "", "", 0).Change(func(_ *cristate.PodMeta, st *cristate.PodStatus) { st.State = cristate.PodNotReady })
	h.container("aaa", "pod1", 1)
	h.container("abb", "pod1", 2)
	h.container("ccc", "pod2", 3)
	for _, c := range []struct {
		f    *runtime.ContainerStatsFilter
		want string
	}{
		{nil, "aaa abb ccc"}, {&runtime.ContainerStatsFilter{}, "aaa abb ccc"}, {&runtime.ContainerStatsFilter{Id: "c"}, "ccc"}, {&runtime.ContainerStatsFilter{Id: "x"}, ""},
		{&runtime.ContainerStatsFilter{PodSandboxId: "pod1"}, "aaa abb"}, {&runtime.ContainerStatsFilter{PodSandboxId: "none"}, ""},
		{&runtime.ContainerStatsFilter{Id: "aaa", PodSandboxId: "pod2"}, ""}, {&runtime.ContainerStatsFilter{LabelSelector: map[string]string{"app": "abb"}}, "abb"},
		{&runtime.ContainerStatsFilter{LabelSelector: map[string]string{"app": "abb", "other": ""}}, ""},
	} {
		all, err := h.ListContainerStats(t.Context(), c.f)
		var ids []string
		for _, st := range all {
			ids = append(ids, st.Attributes.Id)
		}
		if got := strings.Join(ids, " "); err != nil || got != c.want {
			t.Errorf("%v: %q %v, want %q", c.f, got, err, c.want)
		}
	}
	if _, err := h.ListContainerStats(t.Context(), &runtime.ContainerStatsFilter{Id: "a"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	for _, c := range []struct {
		f    *runtime.PodSandboxStatsFilter
		want string
	}{
		{nil, "pod1 pod2"}, {&runtime.PodSandboxStatsFilter{Id: "pod2"}, "pod2"}, {&runtime.PodSandboxStatsFilter{Id: "pod3"}, ""}, {&runtime.PodSandboxStatsFilter{Id: "x"}, ""},
		{&runtime.PodSandboxStatsFilter{LabelSelector: map[string]string{"app": "pod1"}}, "pod1"},
	} {
		all, err := h.ListPodSandboxStats(t.Context(), c.f)
		var ids []string
		for _, st := range all {
			ids = append(ids, st.Attributes.Id)
		}
		if got := strings.Join(ids, " "); err != nil || got != c.want {
			t.Errorf("%v: %q %v, want %q", c.f, got, err, c.want)
		}
	}
	if _, err := h.ContainerStats(t.Context(), "none"); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	if _, err := h.PodSandboxStats(t.Context(), "pod3"); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
}

// TestNanoCores is the table of what CPU usage is computed from: it is never
// absent and never 0.
//
// contract: 13.28
func TestNanoCores(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration, total uint64) sample { return sample{now.Add(-d), total} }
	for _, c := range []struct {
		name       string
		prev, last sample
		total      uint64
		want       uint64
	}{
		{"no sample: since the start", sample{}, sample{}, 5e9, 5e8},
		{"one sample", sample{}, ago(2*time.Second, 4e9), 5e9, 5e8},
		{"one young sample is enough", sample{}, ago(500*time.Millisecond, 4e9), 5e9, 2e9},
		{"one sample too young to say anything", sample{}, ago(5*time.Millisecond, 5e9-1), 5e9, 5e8},
		{"the one before, if the last is young", ago(1500*time.Millisecond, 2e9), ago(500*time.Millisecond, 5e9), 5e9, 2e9},
		{"the last", ago(3*time.Second, 0), ago(2*time.Second, 3e9), 5e9, 1e9},
		{"older than the retention", sample{}, ago(5*time.Minute, 0), 5e9, 5e8},
		{"idle: since the start", ago(2*time.Second, 5e9), ago(time.Second, 5e9), 5e9, 5e8},
		{"another group", sample{}, ago(2*time.Second, 9e9), 5e9, 5e8},
		{"nothing at all", sample{}, sample{}, 0, 1},
	} {
		e := &entry{prev: c.prev, last: c.last}
		got := e.nanoCores(sample{now, c.total}, now.Add(-10*time.Second), time.Second, 2*time.Minute)
		if got < c.want-c.want/100 || got > c.want+c.want/100 {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// TestSampler takes samples, less often of what is idle, forgets what is gone,
// begins anew with a new process, and keeps the last layer.
//
// contract: 13.28, 7.1.20
// promise: P63
func TestSampler(t *testing.T) {
	h := newHost(t, func(o *Options) {
		o.Period = 10 * time.Millisecond
		o.Usage = func(_ context.Context, snapshotter, key string) (snapshot.Usage, error) {
			return snapshot.Usage{Size: 4096, Inodes: 3}, nil
		}
	})
	h.unified("c1")
	h.process(101, "c1", true)
	h.container("c1", "p1", 101)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	e := h.entry("c1")
	wait := func(what string, ok func() bool) {
		t.Helper()
		deadline := time.Now().Add(10 * time.Second)
		for {
			e.mu.Lock()
			good := ok()
			e.mu.Unlock()
			if good {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("never: %s", what)
			}
			time.Sleep(time.Millisecond)
		}
	}
	wait("idle", func() bool { return e.skip == maxSkip && !e.layer.at.IsZero() })
	h.write("cgroup/c1/cpu.stat", "usage_usec 95000000\n")
	wait("busy", func() bool { return e.skip == 1 && e.last.total == 95e9 })
	wait("idle again", func() bool { return e.skip > 1 })
	st, err := h.ContainerStats(t.Context(), "c1")
	if w := st.GetWritableLayer(); err != nil || w.GetUsedBytes().GetValue() != 4096 || w.GetInodesUsed().GetValue() != 3 || w.Timestamp == 0 || w.GetFsId().GetMountpoint() != h.dir {
		t.Errorf("%v %v", w, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	h.write("proc/201/cgroup", "0::/c2\n")
	h.write("cgroup/c2/cpu.stat", "usage_usec 1000\n")
	c, _ := h.o.Containers.Get("c1")
	if err := c.Change(func(st *cristate.Status) error { st.Pid = 201; return nil }); err != nil {
		t.Fatal(err)
	}
	if st, err = h.ContainerStats(t.Context(), "c1"); err != nil || st.Cpu.UsageCoreNanoSeconds.Value != 1e6 {
		t.Errorf("%v %v", st.Cpu, err)
	}
	h.o.Containers.Remove("c1")
	h.sweep()
	if len(h.entries) != 0 {
		t.Errorf("%v", h.entries)
	}
}

// TestSick: a group that does not answer and one that is gone cost the others
// nothing, and the second time not even a wait.
//
// contract: 7.1.20
func TestSick(t *testing.T) {
	h := newHost(t, nil)
	for i := range 20 {
		id := fmt.Sprintf("c%02d", i)
		h.unified(id)
		h.process(uint32(100+i), id, true)
		h.container(id, "p1", uint32(100+i))
	}
	h.pod("p1", "", "", 0)
	hang := filepath.Join(h.cgroup, "c03", "cpu.stat")
	if err := os.Remove(hang); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(hang, 0o600); err != nil {
		t.Fatal(err)
	}
	release := func() { // the open for reading ends when someone opens it for writing
		if f, err := os.OpenFile(hang, os.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
			f.Close()
		}
	}
	t.Cleanup(release)
	if err := os.RemoveAll(filepath.Join(h.cgroup, "c07")); err != nil {
		t.Fatal(err)
	}
	check := func(within time.Duration) {
		t.Helper()
		begin := time.Now()
		all, err := h.ListContainerStats(t.Context(), nil)
		if err != nil || len(all) != 20 {
			t.Fatal(len(all), err)
		}
		if d := time.Since(begin); d > within {
			t.Errorf("it took %v", d)
		}
		for _, st := range all {
			sick := st.Attributes.Id == "c03" || st.Attributes.Id == "c07"
			if (st.Cpu == nil) != sick || (st.Memory == nil) != sick {
				t.Errorf("%v", st)
			}
		}
	}
	check(3 * patience)
	check(patience / 2)
	if m, err := h.PodSandboxMetrics(t.Context()); err != nil || len(m) != 1 || len(m[0].ContainerMetrics) != 18 {
		t.Errorf("%v %v", m, err)
	}
	if st, err := h.PodSandboxStats(t.Context(), "p1"); err != nil || len(st.Linux.Containers) != 20 {
		t.Errorf("%v %v", st, err)
	}
	// It recovers.
	if err := os.Rename(hang, hang+".old"); err != nil {
		t.Fatal(err)
	}
	hang += ".old"
	h.write("cgroup/c03/cpu.stat", "usage_usec 1\n")
	release()
	for deadline := time.Now().Add(10 * time.Second); ; {
		st, err := h.ContainerStats(t.Context(), "c03")
		if err != nil {
			t.Fatal(err)
		}
		if st.Cpu != nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("it is still given up")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestSickLayer: a layer that is never measured keeps no other from it.
func TestSickLayer(t *testing.T) {
	var hung atomic.Int32
	h := newHost(t, func(o *Options) {
		o.Period = 10 * time.Millisecond
		o.Usage = func(ctx context.Context, _, key string) (snapshot.Usage, error) {
			if key == "a" {
				hung.Add(1)
				<-ctx.Done()
				return snapshot.Usage{}, ctx.Err()
			}
			if key == "b" {
				return snapshot.Usage{}, errors.New("broken")
			}
			return snapshot.Usage{Size: 1}, nil
		}
	})
	for i, id := range []string{"a", "b", "c"} {
		h.container(id, "p1", uint32(i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	for deadline := time.Now().Add(10 * time.Second); ; {
		st, err := h.ContainerStats(t.Context(), "c")
		if err != nil {
			t.Fatal(err)
		}
		if st.WritableLayer != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the layer was never measured")
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil || hung.Load() > 1 {
		t.Error(err, hung.Load())
	}
}

// families are those of the contract.
func families() []string {
	var all []string
	for _, group := range []string{
		"cpu_{user,system,usage}_seconds_total", "cpu_cfs_{periods,throttled_periods,throttled_seconds}_total",
		"memory_{cache,rss,kernel_usage,mapped_file,swap,failcnt,usage_bytes,max_usage_bytes,working_set_bytes,total_active_file_bytes,total_inactive_file_bytes,failures_total}",
		"oom_events_{total}", "fs_{inodes_free,inodes_total,limit_bytes,usage_bytes,reads_bytes_total,reads_total,writes_bytes_total,writes_total}",
		"blkio_device_usage_{total}", "network_receive_{bytes,packets,packets_dropped,errors}_total", "network_transmit_{bytes,packets,packets_dropped,errors}_total",
		"{processes,file_descriptors,sockets,threads_max,threads,ulimits_soft,last_seen,start_time_seconds}",
		"spec_{cpu_period,cpu_shares,memory_limit_bytes,memory_reservation_limit_bytes,memory_swap_limit_bytes}",
	} {
		before, rest, _ := strings.Cut(group, "{")
		names, after, _ := strings.Cut(rest, "}")
		for _, n := range strings.Split(names, ",") {
			all = append(all, "container_"+before+n+after)
		}
	}
	slices.Sort(all)
	return all
}

// TestMetrics: exactly the families of the contract are described, each of
// them is given, and with as many label values as it has labels.
//
// contract: 7.1.21, 9.2.1
func TestMetrics(t *testing.T) {
	each(t, func(t *testing.T, h *host, fill func(string), unified bool) {
		described := map[string][]string{}
		for _, d := range h.MetricDescriptors() {
			if d.Help == "" || !slices.Equal(d.LabelKeys[:5], []string{"pod", "namespace", "container", "id", "image"}) {
				t.Errorf("%v", d)
			}
			described[d.Name] = d.LabelKeys
		}
		if want := families(); !slices.Equal(slices.Sorted(maps.Keys(described)), want) || len(want) != 49 || len(h.MetricDescriptors()) != 49 {
			t.Errorf("%d families, want %v", len(described), want)
		}
		fill("pods/c1")
		h.process(100, "pods/p1", unified)
		h.process(101, "pods/c1", unified)
		h.write("netns", "")
		h.write("proc/100/ns/x", "")
		if err := os.Link(filepath.Join(h.dir, "netns"), filepath.Join(h.proc, "100/ns/net")); err != nil {
			t.Fatal(err)
		}
		h.write("proc/100/net/dev", "  eth0:11 12 13 14 0 0 0 0 15 16 17 18 0 0 0 0\n")
		h.pod("p1", "pods", filepath.Join(h.dir, "netns"), 100)
		h.pod("p2", "pods", "", 0).Change(func(_ *cristate.PodMeta, st *cristate.PodStatus) { st.State = cristate.PodNotReady })
		c := h.container("c1", "p1", 101)
		h.entry("c1").layer = layer{snapshot.Usage{Size: 77}, time.Unix(1, 0)}
		all, err := h.PodSandboxMetrics(t.Context())
		if err != nil || len(all) != 1 || all[0].PodSandboxId != "p1" || len(all[0].ContainerMetrics) != 1 || all[0].ContainerMetrics[0].ContainerId != "c1" {
			t.Fatal(all, err)
		}
		given := map[string]uint64{}
		seen := map[string]bool{}
		for _, m := range slices.Concat(all[0].Metrics, all[0].ContainerMetrics[0].Metrics) {
			if len(m.LabelValues) != len(described[m.Name]) {
				t.Errorf("%v: labels %v", m, described[m.Name])
				continue
			}
			want := []string{"name-p1", "ns", "name-c1", "c1", "busybox"}
			if strings.HasPrefix(m.Name, "container_network") {
				want = []string{"name-p1", "ns", "", "p1", "", "eth0"}
			}
			if !slices.Equal(m.LabelValues[:len(want)], want) {
				t.Errorf("%v", m)
			}
			series := m.Name + strings.Join(m.LabelValues, ",")
			if seen[series] {
				t.Errorf("%s twice", series)
			}
			seen[series] = true
			if (m.Timestamp != 0) != (m.Name == "container_fs_usage_bytes") {
				t.Errorf("%v", m)
			}
			given[m.Name+strings.Join(m.LabelValues[5:], ",")] = m.Value.GetValue()
			given[m.Name] = m.Value.GetValue()
			if counter := strings.HasSuffix(m.Name, "_total") && m.Name != "container_fs_inodes_total" || m.Name == "container_memory_failcnt"; counter != (m.MetricType == runtime.MetricType_COUNTER) {
				t.Errorf("%v", m)
			}
		}
		for name := range described {
			if _, ok := given[name]; !ok {
				t.Errorf("no %s", name)
			}
		}
		for name, want := range map[string]uint64{
			"cpu_usage_seconds_total": 5, "cpu_user_seconds_total": 3, "cpu_system_seconds_total": 2, "cpu_cfs_periods_total": 10, "cpu_cfs_throttled_periods_total": 4,
			"cpu_cfs_throttled_seconds_total": 9, "memory_cache": 500, "memory_rss": 400, "memory_kernel_usage": 90, "memory_mapped_file": 33, "memory_swap": 70, "memory_failcnt": 6,
			"memory_usage_bytes": 1000, "memory_max_usage_bytes": 1500, "memory_working_set_bytes": 700, "memory_total_active_file_bytes": 200, "memory_total_inactive_file_bytes": 300,
			"oom_events_total": 2, "fs_usage_bytes": 77, "fs_reads_bytes_total/dev/sda": 100, "fs_reads_total/dev/sda": 3, "fs_writes_bytes_total/dev/sda": 200, "fs_writes_total/dev/sda": 4,
			"blkio_device_usage_total/dev/sda,8,0,Discard": 5, "blkio_device_usage_total/dev/sda,8,0,Write": 200,
			"memory_failures_totalpgmajfault,hierarchy": 12, "network_receive_bytes_total": 11, "network_receive_packets_total": 12, "network_receive_errors_total": 13,
			"network_receive_packets_dropped_total": 14, "network_transmit_bytes_total": 15, "network_transmit_packets_total": 16, "network_transmit_errors_total": 17,
			"network_transmit_packets_dropped_total": 18, "processes": 1, "file_descriptors": 4, "sockets": 2, "threads": 8, "threads_max": 0,
			"ulimits_softRLIMIT_NOFILE": 1024, "ulimits_softRLIMIT_CPU": 1<<64 - 1, "start_time_seconds": uint64(c.Status().StartedAt / 1e9),
			"spec_cpu_period": 100000, "spec_memory_limit_bytes": 5000, "spec_memory_reservation_limit_bytes": 0, "spec_memory_swap_limit_bytes": 5100,
		} {
			if got, ok := given["container_"+name]; !ok || got != want {
				t.Errorf("%s: %d %t, want %d", name, got, ok, want)
			}
		}
		if n := given["container_spec_cpu_shares"]; n < 990 || n > 1030 {
			t.Errorf("%d shares", n)
		}
	})
}

// TestRate: ten requests at once, then ten a second; who would wait too long
// is told so.
//
// contract: 7.1.21
func TestRate(t *testing.T) {
	var l limiter
	begin := time.Now()
	for range burst {
		if err := l.wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(begin); d > perRequest {
		t.Errorf("the first waited %v", d)
	}
	if err := l.wait(t.Context()); err != nil || time.Since(begin) < perRequest*9/10 {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	var err error
	for range 3 * burst {
		if err = l.wait(gone); !errors.Is(err, context.Canceled) {
			break
		}
	}
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("%v", err)
	}
}

// TestGroups: names of pods' groups, and processes that are elsewhere.
func TestGroups(t *testing.T) {
	for name, want := range map[string]string{
		"kubepods.slice": "/kubepods.slice", "kubepods-burstable-pod1_2.slice": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
	} {
		if got := slicePath(name); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
	h := newHost(t, nil)
	h.unified("a/c1")
	h.write("outside/cpu.stat", "usage_usec 1\n")
	for _, parent := range []string{"", "/", "..", "../outside", "a/none"} {
		if g, err := h.tree.ofParent(parent); !errdefs.IsNotFound(err) {
			t.Errorf("%q: %v %v", parent, g, err)
		}
	}
	r := &reader{}
	for text, want := range map[string]string{"0::/a/c1\n": "/a/c1", "0::/a/c1/init.scope\n": "/a/c1", "0::/a/cri-c1.scope/b/c\n": "/a/cri-c1.scope", "0::/\n": "", "0::/../x\n": "", "": ""} {
		h.write("proc/1/cgroup", text)
		g, err := h.tree.ofProcess(r, 1, "c1")
		if want == "" {
			if !errdefs.IsNotFound(err) {
				t.Errorf("%q: %v %v", text, g, err)
			}
		} else if err != nil || g.cpu != h.cgroup+want {
			t.Errorf("%q: %v %v", text, g, err)
		}
	}
	// A controller below the names of all that are mounted with it.
	l := newHost(t, nil)
	l.write("cgroup/cpu,cpuacct/c1/cpuacct.usage", "5\n")
	l.write("proc/1/cgroup", "2:cpu,cpuacct:/c1\n")
	g, err := l.tree.ofProcess(r, 1, "c1")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := g.cpuTotal(r); err != nil || n != 5 {
		t.Errorf("%d %v", n, err)
	}
}

// TestPeriods reads the two keys of the configuration.
func TestPeriods(t *testing.T) {
	if p, r, err := Periods(cristate.RuntimeConfig{}); p != time.Second || r != 2*time.Minute || err != nil {
		t.Error(p, r, err)
	}
	if p, r, err := Periods(cristate.RuntimeConfig{StatsCollectPeriod: "5s", StatsRetentionPeriod: "1h"}); p != 5*time.Second || r != time.Hour || err != nil {
		t.Error(p, r, err)
	}
	for _, c := range []cristate.RuntimeConfig{{StatsCollectPeriod: "x"}, {StatsRetentionPeriod: "-1s"}, {StatsCollectPeriod: "5m"}} {
		if _, _, err := Periods(c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "stats_") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// FuzzParse: what a kernel file may hold never panics.
func FuzzParse(f *testing.F) {
	f.Add("eth0: 1 2\n:\nlo:::", "8:0 rbytes= x\n")
	f.Add(" a:b: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 99999999999999999999999\n", "some avg10=x total=\nfull")
	f.Fuzz(func(t *testing.T, net, other string) {
		parseInterfaces(net)
		proc := t.TempDir()
		dir := filepath.Join(proc, "1")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, n := range []string{"io.stat", "psi", "limits", "memory.stat", "memory.current", "cpu.stat", "cpu.max"} {
			if err := os.WriteFile(filepath.Join(dir, n), []byte(other), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		r, g := &reader{}, unifiedGroup(dir)
		g.readIO(r)
		g.readCPU(r)
		g.readMemory(r, true)
		r.pressure(dir, "psi")
		tree{dir, proc}.ulimits(r, 1)
	})
}
