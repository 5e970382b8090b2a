//go:build linux

package cri

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// ownGroup gives a pod a parent cgroup of its own, as a kubelet does, which is
// removed after the pod.
func ownGroup(t *testing.T, n *critest.Node) func(*runtime.PodSandboxConfig) {
	parent := "/" + n.Mark + "/pod-" + strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))
	t.Cleanup(func() {
		for _, pattern := range []string{"/sys/fs/cgroup/*" + parent, "/sys/fs/cgroup" + parent} {
			dirs, _ := filepath.Glob(pattern)
			for _, d := range dirs {
				var fs unix.Statfs_t
				if unix.Statfs(d, &fs) == nil && fs.Type == unix.TMPFS_MAGIC {
					continue // crun's, in what critest.Main shows it
				}
				if err := os.Remove(d); err != nil {
					t.Errorf("cgroup of a removed pod: %v", err)
				}
			}
		}
	})
	return func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent = parent }
}

// load is a container that burns CPU, holds 32 MiB, which dd cannot get rid of,
// and has written 8 MiB.
const load = "dd if=/dev/zero of=/filler bs=1M count=8 2>/dev/null; dd if=/dev/zero bs=33M count=1 2>/dev/null | { read -n 1 a; echo loaded; while :; do :; done; }"

func statsOf(t *testing.T, c *critest.Container) *runtime.ContainerStats {
	t.Helper()
	r, err := c.RT.ContainerStats(critest.Context(t), &runtime.ContainerStatsRequest{ContainerId: c.ID})
	if err != nil {
		t.Fatal(err)
	}
	return r.Stats
}

// patiently waits up to a minute: layers are measured every ten seconds, and
// less often where that takes long.
func patiently(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(critest.Slow(time.Minute)); !cond(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in time", what)
		}
	}
}

// What containers and pods use is what they were made to use.
//
// contract: 7.1.20, 13.28
func TestStats(t *testing.T) {
	n := node(t)
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			p := n.Pod(t, handler, ownGroup(t, n))
			idle := p.Run("sleep 1000", func(c *runtime.ContainerConfig) { c.Labels = map[string]string{"kind": "idle"} })
			for range 5 { // from the first moment on
				if st := statsOf(t, idle); st.Cpu.GetUsageNanoCores().GetValue() == 0 || st.Cpu.UsageCoreNanoSeconds.GetValue() == 0 || st.Memory.GetWorkingSetBytes().GetValue() == 0 {
					t.Errorf("an idle container: %v", st)
				}
			}
			busy := p.Run(load, func(c *runtime.ContainerConfig) {
				c.Labels = map[string]string{"kind": "busy"}
				c.Annotations = map[string]string{"a": "b"}
				c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 256 << 20}
			})
			done := p.Run("true")
			done.Wait()
			critest.Eventually(t, "the load", func() bool { return strings.Contains(busy.Log(), "loaded") })
			var st *runtime.ContainerStats
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("the last numbers: %v", st)
				}
			})
			patiently(t, "the numbers of the load", func() bool {
				st = statsOf(t, busy)
				return st.Cpu.GetUsageNanoCores().GetValue() > 50e6 && st.WritableLayer.GetUsedBytes().GetValue() >= 8<<20
			})
			m := st.Memory
			if st.Attributes.Id != busy.ID || st.Attributes.Metadata.Name != busy.Config.Metadata.Name || st.Attributes.Labels["kind"] != "busy" || st.Attributes.Annotations["a"] != "b" {
				t.Errorf("%v", st.Attributes)
			}
			if c := st.Cpu; c.UsageNanoCores.Value > uint64(goruntime.NumCPU())*1.5e9 || c.UsageCoreNanoSeconds.Value < 50e6 || time.Since(time.Unix(0, c.Timestamp)) > time.Minute {
				t.Errorf("%v", c)
			}
			if m.RssBytes.GetValue() < 32<<20 || m.WorkingSetBytes.Value < 32<<20 || m.UsageBytes.Value < m.WorkingSetBytes.Value || m.UsageBytes.Value > 256<<20 ||
				m.AvailableBytes.GetValue() == 0 || m.AvailableBytes.Value > 224<<20 || m.PageFaults.GetValue() < 300 { // huge pages make few
				t.Errorf("%v", m)
			}
			if w := st.WritableLayer; w.InodesUsed.GetValue() == 0 || !strings.HasPrefix(w.FsId.GetMountpoint(), n.Dir) || w.UsedBytes.Value > 64<<20 {
				t.Errorf("%v", w)
			}
			if st := statsOf(t, done); st.Attributes.Id != done.ID || st.Cpu != nil || st.Memory != nil {
				t.Errorf("a container that has ended: %v", st)
			}
			for i, tt := range []struct {
				f    *runtime.ContainerStatsFilter
				want []string
			}{
				{&runtime.ContainerStatsFilter{PodSandboxId: p.ID}, []string{idle.ID, busy.ID, done.ID}},
				{&runtime.ContainerStatsFilter{PodSandboxId: p.ID, LabelSelector: map[string]string{"kind": "busy"}}, []string{busy.ID}},
				{&runtime.ContainerStatsFilter{Id: idle.ID[:20]}, []string{idle.ID}},
				{&runtime.ContainerStatsFilter{Id: strings.Repeat("f", 64)}, nil},
			} {
				l, err := n.RT.ListContainerStats(critest.Context(t), &runtime.ListContainerStatsRequest{Filter: tt.f})
				if err != nil {
					t.Fatal(err)
				}
				s, err := n.RT.StreamContainerStats(critest.Context(t), &runtime.StreamContainerStatsRequest{Filter: tt.f})
				var streamed []*runtime.ContainerStats
				for _, r := range received(t, s, err) {
					streamed = append(streamed, r.ContainerStats...)
				}
				for _, all := range [][]*runtime.ContainerStats{l.Stats, streamed} {
					var got []string
					for _, s := range all {
						got = append(got, s.Attributes.Id)
					}
					slices.Sort(got)
					slices.Sort(tt.want)
					if !slices.Equal(got, tt.want) {
						t.Errorf("filter %d: %v, want %v", i, got, tt.want)
					}
				}
			}

			// The pod: all of that, and its network.
			v4, _ := ipsOf(p)
			p.Run("mkdir /www; head -c 1000000 /dev/zero > /www/index.html; exec httpd -f -p [::]:80 -h /www")
			critest.Eventually(t, "a megabyte of traffic", func() bool { body, err := get(v4 + ":80"); return err == nil && len(body) > 50_000 })
			ps, err := n.RT.PodSandboxStats(critest.Context(t), &runtime.PodSandboxStatsRequest{PodSandboxId: p.ID})
			if err != nil {
				t.Fatal(err)
			}
			l := ps.Stats.Linux
			if ps.Stats.Attributes.Id != p.ID || ps.Stats.Attributes.Metadata.Uid != p.Config.Metadata.Uid || ps.Stats.Attributes.Labels["name"] != p.Config.Metadata.Name || len(l.Containers) != 3 {
				t.Errorf("%v", ps)
			}
			if l.Cpu.GetUsageNanoCores().GetValue() == 0 || l.Cpu.UsageCoreNanoSeconds.Value < st.Cpu.UsageCoreNanoSeconds.Value || l.Memory.GetWorkingSetBytes().GetValue() < 32<<20 {
				t.Errorf("%v %v", l.Cpu, l.Memory)
			}
			if d := l.Network.GetDefaultInterface(); d.GetName() != "eth0" || d.TxBytes.GetValue() < 50_000 || d.RxBytes.GetValue() < 500 || d.RxErrors == nil || d.TxErrors == nil {
				t.Errorf("%v", l.Network)
			}
			if k := l.Process.GetProcessCount().GetValue(); k < 3 || k > 10 {
				t.Errorf("%d processes", k)
			}
			lp, err := n.RT.ListPodSandboxStats(critest.Context(t), &runtime.ListPodSandboxStatsRequest{Filter: &runtime.PodSandboxStatsFilter{LabelSelector: p.Config.Labels}})
			if err != nil || len(lp.Stats) != 1 || lp.Stats[0].Attributes.Id != p.ID {
				t.Errorf("%v %v", lp, err)
			}
			sp, err := n.RT.StreamPodSandboxStats(critest.Context(t), &runtime.StreamPodSandboxStatsRequest{Filter: &runtime.PodSandboxStatsFilter{Id: p.ID[:20]}})
			if all := received(t, sp, err); len(all) != 1 || len(all[0].PodSandboxStats) != 1 || all[0].PodSandboxStats[0].Attributes.Id != p.ID {
				t.Errorf("%v", all)
			}
		})
	}
}

// metricFamilies are those of cAdvisor that a kubelet wants, with the labels that
// they have beyond those of all.
func metricFamilies() map[string][]string {
	families := map[string][]string{}
	for extra, names := range map[string]string{
		"": `cpu_user_seconds_total cpu_system_seconds_total cpu_usage_seconds_total cpu_cfs_periods_total cpu_cfs_throttled_periods_total cpu_cfs_throttled_seconds_total
 memory_cache memory_rss memory_kernel_usage memory_mapped_file memory_swap memory_failcnt memory_usage_bytes memory_max_usage_bytes memory_working_set_bytes memory_total_active_file_bytes memory_total_inactive_file_bytes
 oom_events_total processes file_descriptors sockets threads_max threads last_seen start_time_seconds spec_cpu_period spec_cpu_shares spec_memory_limit_bytes spec_memory_reservation_limit_bytes spec_memory_swap_limit_bytes`,
		"failure_type scope":           "memory_failures_total",
		"device":                       "fs_inodes_free fs_inodes_total fs_limit_bytes fs_usage_bytes fs_reads_bytes_total fs_reads_total fs_writes_bytes_total fs_writes_total",
		"device major minor operation": "blkio_device_usage_total",
		"interface": `network_receive_bytes_total network_receive_packets_total network_receive_packets_dropped_total network_receive_errors_total
 network_transmit_bytes_total network_transmit_packets_total network_transmit_packets_dropped_total network_transmit_errors_total`,
		"ulimit": "ulimits_soft",
	} {
		for _, name := range strings.Fields(names) {
			families["container_"+name] = append([]string{"pod", "namespace", "container", "id", "image"}, strings.Fields(extra)...)
		}
	}
	return families
}

// All families are described, and a container under load has numbers in them
// that fit the load.
//
// contract: 7.1.21, 9.2.1
func TestPodMetrics(t *testing.T) {
	n := node(t)
	families := metricFamilies()
	d, err := n.RT.ListMetricDescriptors(critest.Context(t), &runtime.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	described := map[string][]string{}
	for _, f := range d.Descriptors {
		described[f.Name] = f.LabelKeys
		if f.Help == "" || !slices.Equal(f.LabelKeys, families[f.Name]) {
			t.Errorf("%v, want labels %q", f, families[f.Name])
		}
	}
	if len(described) != 49 || len(families) != 49 || len(d.Descriptors) != 49 {
		t.Errorf("%d families of %d, %d times", len(described), len(families), len(d.Descriptors))
	}

	p := n.Pod(t, "runc", ownGroup(t, n))
	began := time.Now().Unix()
	c := p.Run("echo x > /written; sync; "+load, func(c *runtime.ContainerConfig) {
		c.Linux.Resources = &runtime.LinuxContainerResources{CpuPeriod: 50_000, CpuQuota: 20_000, CpuShares: 300, MemoryLimitInBytes: 200 << 20}
	})
	v4, _ := ipsOf(p)
	p.Run(serveText(80, "counted"))
	eventuallyGet(t, v4+":80", "counted")
	critest.Eventually(t, "the load", func() bool { return strings.Contains(c.Log(), "loaded") })
	mine := func() *runtime.PodSandboxMetrics {
		t.Helper()
		l, err := n.RT.ListPodSandboxMetrics(critest.Context(t), &runtime.ListPodSandboxMetricsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range l.PodMetrics {
			if m.PodSandboxId == p.ID {
				return m
			}
		}
		t.Fatalf("no metrics of the pod in %v", l)
		return nil
	}
	var pm *runtime.PodSandboxMetrics
	values := map[string]uint64{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last numbers: %v", values)
		}
	})
	patiently(t, "the numbers of the load", func() bool {
		pm = mine()
		for _, cm := range pm.ContainerMetrics {
			if cm.ContainerId == c.ID {
				for _, m := range cm.Metrics {
					values[strings.TrimPrefix(m.Name, "container_")] = m.Value.GetValue()
				}
			}
		}
		return values["cpu_usage_seconds_total"] >= 1 && values["fs_usage_bytes"] >= 8<<20 && values["cpu_cfs_throttled_periods_total"] > 0
	})
	if len(pm.ContainerMetrics) != 2 {
		t.Errorf("%d containers", len(pm.ContainerMetrics))
	}
	seen := map[string]bool{}
	check := func(what string, id, container, image string, all []*runtime.Metric) {
		for _, m := range all {
			seen[m.Name] = true
			keys := families[m.Name]
			if want := []string{p.Config.Metadata.Name, "default", container, id, image}; len(m.LabelValues) != len(keys) || !slices.Equal(m.LabelValues[:5], want) {
				t.Errorf("%s: %s has labels %q of %q, want %q", what, m.Name, m.LabelValues, keys, want)
			}
			counter := strings.HasSuffix(m.Name, "_total") && m.Name != "container_fs_inodes_total" || m.Name == "container_memory_failcnt"
			if counter != (m.MetricType == runtime.MetricType_COUNTER) || m.Value == nil {
				t.Errorf("%s: %v", what, m)
			}
		}
	}
	check("pod", p.ID, "", "", pm.Metrics)
	for _, cm := range pm.ContainerMetrics {
		if cm.ContainerId == c.ID {
			check("container", c.ID, c.Config.Metadata.Name, n.Busybox, cm.Metrics)
		}
	}
	for _, m := range pm.Metrics {
		if len(m.LabelValues) == 6 && m.LabelValues[5] == "eth0" {
			values[strings.TrimPrefix(m.Name, "container_")] = m.Value.GetValue()
		}
	}
	// Not every kernel accounts for swap, and for input and output of tmpfs.
	for name := range families {
		if !seen[name] && !strings.Contains(name, "_swap") && !strings.HasPrefix(name, "container_blkio_") && !strings.HasPrefix(name, "container_fs_reads") && !strings.HasPrefix(name, "container_fs_writes") {
			t.Errorf("no %s", name)
		}
	}
	for name, want := range map[string][2]uint64{
		"cpu_usage_seconds_total":       {1, uint64(critest.Slow(int64(60)))},
		"cpu_cfs_periods_total":         {1, 10_000},
		"spec_cpu_period":               {50_000, 50_000},
		"spec_cpu_shares":               {300, 300},
		"spec_memory_limit_bytes":       {200 << 20, 200 << 20},
		"memory_usage_bytes":            {32 << 20, 200 << 20},
		"memory_max_usage_bytes":        {32 << 20, 200 << 20},
		"memory_working_set_bytes":      {32 << 20, 200 << 20},
		"memory_rss":                    {32 << 20, 200 << 20},
		"memory_failures_total":         {0, 1 << 40},
		"oom_events_total":              {0, 0},
		"fs_usage_bytes":                {8 << 20, 64 << 20},
		"fs_limit_bytes":                {64 << 20, 1 << 60},
		"processes":                     {1, 5},
		"threads":                       {1, 5},
		"file_descriptors":              {3, 100},
		"sockets":                       {0, 10},
		"start_time_seconds":            {uint64(began - 1), uint64(time.Now().Unix())},
		"last_seen":                     {uint64(began), uint64(time.Now().Unix() + 1)},
		"network_receive_bytes_total":   {200, 1 << 30},
		"network_transmit_bytes_total":  {200, 1 << 30},
		"network_receive_packets_total": {3, 1 << 20},
		"network_receive_errors_total":  {0, 0},
		"ulimits_soft":                  {1, 1<<64 - 1},
	} {
		if got := values[name]; got < want[0] || got > want[1] {
			t.Errorf("%s is %d, want %d to %d", name, got, want[0], want[1])
		}
	}
	s, err := n.RT.StreamPodSandboxMetrics(critest.Context(t), &runtime.StreamPodSandboxMetricsRequest{})
	found := 0
	for _, r := range received(t, s, err) {
		for _, m := range r.PodSandboxMetrics {
			if m.PodSandboxId == p.ID {
				found++
			}
		}
	}
	if found != 1 {
		t.Errorf("%d times in the stream", found)
	}
}

// What every pod needs is tried all the time, and what fails is named: to the
// kubelet and over HTTP, where the metrics are too.
//
// contract: 7.1.2, 7.2.7, 9.1.8
// promise: P34
func TestReadiness(t *testing.T) {
	t.Parallel() // it mostly waits
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	// Programs of its own, that can be taken away.
	bin := t.TempDir()
	for _, name := range []string{"gantryd", "containerd-shim-runc-v2"} {
		data, err := os.ReadFile(filepath.Join(binDir, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(bin, name), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	n := critest.Run(t, bin, fmt.Sprintf("[plugins.'io.containerd.server.v1.metrics']\naddress = %q\n", address))
	get := func(path string) (int, string) {
		c := http.Client{Timeout: critest.Slow(10 * time.Second)}
		r, err := c.Get("http://" + address + path)
		if err != nil {
			return 0, err.Error()
		}
		defer r.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		return r.StatusCode, string(b)
	}
	readyz := func() (int, string) { return get("/readyz") }
	var code int
	var text string
	critest.Eventually(t, "readiness", func() bool { code, text = readyz(); return code == http.StatusOK })
	for _, part := range []string{"store: ok", "shim: ok", "snapshotter overlayfs: ok", "network: ok"} {
		if !strings.Contains(text, part+"\n") {
			t.Errorf("no %q in %q", part, text)
		}
	}
	condition := func(i int) *runtime.RuntimeCondition {
		st, err := n.RT.Status(critest.Context(t), &runtime.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return st.Status.Conditions[i]
	}

	shim, layers := filepath.Join(bin, "containerd-shim-runc-v2"), n.Dir+"/root/io.containerd.snapshotter.v1.overlayfs"
	if err := os.Rename(shim, shim+".away"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(layers, layers, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	mounted := true
	t.Cleanup(func() {
		if mounted {
			_ = unix.Unmount(layers, unix.MNT_DETACH)
		}
	})
	if err := unix.Mount("", layers, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	write(t, n.CNI+"/10-test.conflist", "{")
	critest.Eventually(t, "what fails", func() bool {
		code, text = readyz()
		return code == http.StatusServiceUnavailable && !strings.Contains(text, "shim: ok") && !strings.Contains(text, "snapshotter overlayfs: ok") && !strings.Contains(text, "network: ok")
	})
	if _, metrics := get("/v1/metrics"); !strings.Contains(metrics, `gantry_ready{part="shim"} 0`) || !strings.Contains(metrics, `gantry_ready{part="store"} 1`) {
		t.Errorf("the metrics do not tell what fails: %s", metrics)
	}
	for _, want := range []string{"store: ok", "read-only file system", "containerd-shim-runc-v2", "10-test.conflist"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %q", want, text)
		}
	}
	if c := condition(0); c.Status || c.Reason != "RuntimeNotReady" || !strings.Contains(c.Message, "snapshotter overlayfs") || !strings.Contains(c.Message, "shim") || strings.Contains(c.Message, "10-test.conflist") {
		t.Errorf("%v", c)
	}
	if c := condition(1); c.Status || c.Reason != "NetworkPluginNotReady" || !strings.Contains(c.Message, "10-test.conflist") {
		t.Errorf("%v", c)
	}

	if err := os.Rename(shim+".away", shim); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(layers, 0); err != nil {
		t.Fatal(err)
	}
	mounted = false
	write(t, n.CNI+"/10-test.conflist", string(n.Conflist()))
	critest.Eventually(t, "readiness again", func() bool { code, text = readyz(); return code == http.StatusOK })
	if a, b := condition(0), condition(1); !a.Status || !b.Status || a.Message != "" {
		t.Errorf("%v %v", a, b)
	}
	pod := n.Pod(t, "runc")
	if out := pod.Output("echo works"); out != "works\n" {
		t.Errorf("%q", out)
	}
	pod.Remove()
	if _, err := n.RT.ListContainers(critest.Context(t), &runtime.ListContainersRequest{}); err != nil {
		t.Error(err)
	}
	_, metrics := get("/v1/metrics")
	for _, name := range []string{"sandbox_list", "stream_sandbox_list", "container_list", "stream_container_list", "sandbox_create_network", "sandbox_delete_network"} {
		if !strings.Contains(metrics, "\ncontainerd_cri_"+name+"_seconds_count ") {
			t.Errorf("no timer %s", name)
		}
	}
	for _, name := range []string{"sandbox_runtime_create", "sandbox_runtime_stop", "sandbox_remove", "container_create", "container_start"} {
		if !strings.Contains(metrics, "\ncontainerd_cri_"+name+"_seconds_count{runtime=\"io.containerd.runc.v2\"} ") {
			t.Errorf("no timer %s", name)
		}
	}
	for _, line := range []string{`network_plugin_operations_total_total{operation_type="set_up_pod"} 1`, `network_plugin_operations_duration_seconds_seconds_count{operation_type="tear_down_pod"} 1`,
		"container_events_dropped_total 0", `sandboxed_image_pulls_total{status="success"} `, "sandboxed_in_progress_image_pulls_total 0", "sandboxed_image_pulling_throughput_mibps_count "} {
		if !strings.Contains(metrics, "\ncontainerd_cri_"+line) {
			t.Errorf("no %s", line)
		}
	}
	if t.Failed() {
		t.Log(metrics)
	}
}
