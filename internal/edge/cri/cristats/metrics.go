package cristats

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// MetricDescriptors describes the families of PodSandboxMetrics, with the
// names and labels that cAdvisor's have (contract 7.1.21, 9.2.1).
func (s *Service) MetricDescriptors() []*runtime.MetricDescriptor {
	base := []string{"pod", "namespace", "container", "id", "image"}
	var all []*runtime.MetricDescriptor
	add := func(extra []string, namesAndHelp ...string) {
		for i := 0; i < len(namesAndHelp); i += 2 {
			all = append(all, &runtime.MetricDescriptor{Name: "container_" + namesAndHelp[i], Help: namesAndHelp[i+1], LabelKeys: slices.Concat(base, extra)})
		}
	}
	add(nil,
		"cpu_user_seconds_total", "CPU time spent in user mode, in seconds.",
		"cpu_system_seconds_total", "CPU time spent in the kernel, in seconds.",
		"cpu_usage_seconds_total", "CPU time spent, in seconds.",
		"cpu_cfs_periods_total", "Periods in which the CPU limit was enforced.",
		"cpu_cfs_throttled_periods_total", "Periods in which the CPU limit was reached.",
		"cpu_cfs_throttled_seconds_total", "Time for which the CPU limit held the container up, in seconds.",
		"memory_cache", "Page cache, in bytes.",
		"memory_rss", "Anonymous memory, in bytes.",
		"memory_kernel_usage", "Memory of the kernel, in bytes.",
		"memory_mapped_file", "Files mapped into memory, in bytes.",
		"memory_swap", "Swap in use, in bytes.",
		"memory_failcnt", "How often the memory limit was reached.",
		"memory_usage_bytes", "Memory in use, page cache included, in bytes.",
		"memory_max_usage_bytes", "The most memory that was ever in use, in bytes.",
		"memory_working_set_bytes", "Memory in use without page cache that was not used lately, in bytes.",
		"memory_total_active_file_bytes", "Page cache that was used lately, in bytes.",
		"memory_total_inactive_file_bytes", "Page cache that was not used lately, in bytes.",
		"oom_events_total", "Processes killed for lack of memory.")
	add([]string{"failure_type", "scope"}, "memory_failures_total", "Page faults.")
	add([]string{"device"},
		"fs_inodes_free", "Free inodes of the file system.",
		"fs_inodes_total", "Inodes of the file system.",
		"fs_limit_bytes", "Size of the file system, in bytes.",
		"fs_usage_bytes", "Size of the writable layer, in bytes.",
		"fs_reads_bytes_total", "Bytes read.",
		"fs_reads_total", "Reads completed.",
		"fs_writes_bytes_total", "Bytes written.",
		"fs_writes_total", "Writes completed.")
	add([]string{"device", "major", "minor", "operation"}, "blkio_device_usage_total", "Bytes transferred, by device and operation.")
	add([]string{"interface"},
		"network_receive_bytes_total", "Bytes received.",
		"network_receive_packets_total", "Packets received.",
		"network_receive_packets_dropped_total", "Packets dropped while receiving.",
		"network_receive_errors_total", "Errors while receiving.",
		"network_transmit_bytes_total", "Bytes sent.",
		"network_transmit_packets_total", "Packets sent.",
		"network_transmit_packets_dropped_total", "Packets dropped while sending.",
		"network_transmit_errors_total", "Errors while sending.")
	add(nil,
		"processes", "Processes.",
		"file_descriptors", "Open files.",
		"sockets", "Open sockets.",
		"threads_max", "Threads allowed; 0 is no limit.",
		"threads", "Threads.",
		"last_seen", "When the container was last seen, in seconds since 1970.",
		"start_time_seconds", "When the container started, in seconds since 1970.",
		"spec_cpu_period", "Period of the CPU limit, in microseconds.",
		"spec_cpu_shares", "CPU shares.",
		"spec_memory_limit_bytes", "Memory limit, in bytes; 0 is none.",
		"spec_memory_reservation_limit_bytes", "Memory reservation, in bytes; 0 is none.",
		"spec_memory_swap_limit_bytes", "Limit of memory and swap together, in bytes; 0 is none.")
	add([]string{"ulimit"}, "ulimits_soft", "Soft limits of the first process; all ones is no limit.")
	return all
}

// series collects the metrics of one container or pod.
type series struct {
	labels []string // the values of the labels that all have
	out    []*runtime.Metric
}

// add appends a metric if it has a value. The time 0 says: now.
func (s *series) add(name string, v value, extra ...string) {
	if !v.ok {
		return
	}
	kind := runtime.MetricType_GAUGE
	if strings.HasSuffix(name, "_total") || name == "memory_failcnt" {
		kind = runtime.MetricType_COUNTER
	}
	if name == "fs_inodes_total" {
		kind = runtime.MetricType_GAUGE
	}
	labels := s.labels
	if len(extra) > 0 {
		labels = slices.Concat(labels, extra)
	}
	s.out = append(s.out, &runtime.Metric{Name: "container_" + name, MetricType: kind, LabelValues: labels, Value: v.of()})
}

// PodSandboxMetrics gives the metrics of the ready pods: those of the network
// by pod, the others by running container. Ten requests a second are
// answered; ErrResourceExhausted if many more come (contract 7.1.21).
func (s *Service) PodSandboxMetrics(ctx context.Context) ([]*runtime.PodSandboxMetrics, error) {
	if err := s.limit.wait(ctx); err != nil {
		return nil, err
	}
	by := s.running()
	ready := s.ready()
	var members []*cristate.Container
	names := map[string][]string{}
	for _, p := range ready {
		members = append(members, by[p.ID()]...)
		m := p.Meta().Config.GetMetadata()
		names[p.ID()] = []string{m.GetName(), m.GetNamespace()}
	}
	devices := s.devices()
	all := look(s, members)
	metrics, err := gather(ctx, readers, patience, all, seen[*cristate.Container].flag, func(it seen[*cristate.Container]) *runtime.ContainerMetrics {
		m := it.of.Meta()
		image := m.Config.GetImage()
		labels := slices.Concat(names[m.SandboxID], []string{m.Config.GetMetadata().GetName(), m.ID, cmp.Or(image.GetUserSpecifiedImage(), image.GetImage())})
		return s.containerMetrics(it.entry, it.of, labels, devices)
	})
	if err != nil {
		return nil, err
	}
	own := map[string][]*runtime.ContainerMetrics{}
	for i, c := range members {
		if metrics[i] != nil {
			own[c.Meta().SandboxID] = append(own[c.Meta().SandboxID], metrics[i])
		}
	}
	pods := look(s, ready)
	answers, err := gather(ctx, readers, patience, pods, seen[*cristate.Pod].flag, func(it seen[*cristate.Pod]) *runtime.PodSandboxMetrics {
		id := it.of.ID()
		net := series{labels: slices.Concat(names[id], []string{"", id, ""})}
		for _, i := range s.interfaces(it.of, by[id]) {
			net.add("network_receive_bytes_total", some(i.rxBytes), i.name)
			net.add("network_receive_packets_total", some(i.rxPackets), i.name)
			net.add("network_receive_packets_dropped_total", some(i.rxDropped), i.name)
			net.add("network_receive_errors_total", some(i.rxErrors), i.name)
			net.add("network_transmit_bytes_total", some(i.txBytes), i.name)
			net.add("network_transmit_packets_total", some(i.txPackets), i.name)
			net.add("network_transmit_packets_dropped_total", some(i.txDropped), i.name)
			net.add("network_transmit_errors_total", some(i.txErrors), i.name)
		}
		return &runtime.PodSandboxMetrics{PodSandboxId: id, Metrics: net.out, ContainerMetrics: own[id]}
	})
	for i, a := range answers {
		if a == nil {
			answers[i] = &runtime.PodSandboxMetrics{PodSandboxId: ready[i].ID(), ContainerMetrics: own[ready[i].ID()]}
		}
	}
	return answers, err
}

// containerMetrics measures a running container; nil if its group is gone.
func (s *Service) containerMetrics(e *entry, c *cristate.Container, labels []string, devices map[string]string) *runtime.ContainerMetrics {
	g, now, err := s.ofContainer(e, c)
	if err != nil {
		return nil
	}
	e.record(now, s.o.Period, s.o.Retention)
	r, done := s.reader()
	defer done()
	m := series{labels: labels}
	st := c.Status()
	const second = uint64(time.Second)
	seconds := func(v value) value { return value{v.n / second, v.ok} }
	orZero := func(v value) value { return some(v.n) } // no limit is 0
	m.add("last_seen", some(uint64(now.at.Unix())))
	m.add("start_time_seconds", some(uint64(st.StartedAt)/second))

	u := g.readCPU(r)
	m.add("cpu_usage_seconds_total", seconds(some(now.total)))
	m.add("cpu_user_seconds_total", seconds(u.user))
	m.add("cpu_system_seconds_total", seconds(u.system))
	m.add("cpu_cfs_periods_total", u.periods)
	m.add("cpu_cfs_throttled_periods_total", u.throttled)
	m.add("cpu_cfs_throttled_seconds_total", seconds(u.throttledTime))
	m.add("spec_cpu_period", u.period)
	asked := cmp.Or(st.Resources.GetLinux(), c.Meta().Config.GetLinux().GetResources())
	if n := asked.GetCpuShares(); n > 0 { // the kernel may keep a weight only
		u.shares = some(uint64(n))
	}
	m.add("spec_cpu_shares", u.shares)

	if mem := g.readMemory(r, true); mem.usage.ok {
		m.add("memory_usage_bytes", mem.usage)
		m.add("memory_max_usage_bytes", mem.peak)
		m.add("memory_working_set_bytes", mem.workingSet())
		m.add("memory_rss", mem.rss)
		m.add("memory_cache", mem.cache)
		m.add("memory_mapped_file", mem.mapped)
		m.add("memory_kernel_usage", mem.kernel)
		m.add("memory_swap", mem.swap)
		m.add("memory_failcnt", mem.failures)
		m.add("memory_total_active_file_bytes", mem.activeFile)
		m.add("memory_total_inactive_file_bytes", mem.inactiveFile)
		m.add("memory_failures_total", mem.ownFaults, "pgfault", "container")
		m.add("memory_failures_total", mem.ownMajor, "pgmajfault", "container")
		m.add("memory_failures_total", mem.faults, "pgfault", "hierarchy")
		m.add("memory_failures_total", mem.majorFaults, "pgmajfault", "hierarchy")
		m.add("oom_events_total", mem.kills)
		m.add("spec_memory_limit_bytes", orZero(mem.limit))
		m.add("spec_memory_reservation_limit_bytes", orZero(mem.low))
		m.add("spec_memory_swap_limit_bytes", orZero(mem.memswLimit))
	}

	for _, t := range g.readIO(r) {
		major, minor, _ := strings.Cut(t.device, ":")
		device := cmp.Or(devices[t.device], t.device)
		m.add("blkio_device_usage_total", some(t.bytes), device, major, minor, t.op)
		switch t.op {
		case "Read":
			m.add("fs_reads_bytes_total", some(t.bytes), device)
			m.add("fs_reads_total", some(t.count), device)
		case "Write":
			m.add("fs_writes_bytes_total", some(t.bytes), device)
			m.add("fs_writes_total", some(t.count), device)
		}
	}
	s.layerMetrics(&m, e, c, devices)

	pids := g.members(r)
	files, sockets := s.tree.descriptors(pids)
	m.add("processes", some(uint64(len(pids))))
	m.add("file_descriptors", some(files))
	m.add("sockets", some(sockets))
	m.add("threads", r.value(g.pids, "pids.current"))
	if limit := r.value(g.pids, "pids.max"); limit.ok {
		m.add("threads_max", orZero(limit.limited()))
	}
	for _, l := range s.tree.ulimits(r, st.Pid) {
		m.add("ulimits_soft", some(l.soft), l.name)
	}
	return &runtime.ContainerMetrics{ContainerId: c.ID(), Metrics: m.out}
}

// layerMetrics are those of the file system with the writable layer. The
// layer's size was measured before, at the time that it carries.
func (s *Service) layerMetrics(m *series, e *entry, c *cristate.Container, devices map[string]string) {
	root := s.root(c.Facts().Snapshotter)
	var fs unix.Statfs_t
	var st unix.Stat_t
	if root == "" || unix.Statfs(root, &fs) != nil || unix.Stat(root, &st) != nil {
		return
	}
	number := strconv.FormatUint(uint64(unix.Major(st.Dev)), 10) + ":" + strconv.FormatUint(uint64(unix.Minor(st.Dev)), 10)
	device := cmp.Or(devices[number], number)
	m.add("fs_inodes_free", some(fs.Ffree), device)
	m.add("fs_inodes_total", some(fs.Files), device)
	m.add("fs_limit_bytes", some(fs.Blocks*uint64(fs.Bsize)), device)
	e.mu.Lock()
	l := e.layer
	e.mu.Unlock()
	if !l.at.IsZero() {
		m.add("fs_usage_bytes", some(uint64(max(0, l.Size))), device)
		m.out[len(m.out)-1].Timestamp = l.at.UnixNano()
	}
}

// devices are the names of block devices by "major:minor".
func (s *Service) devices() map[string]string {
	r, done := s.reader()
	defer done()
	b, err := r.read(s.tree.proc + "/partitions")
	if err != nil {
		return nil
	}
	names := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 4 && f[0] != "major" {
			names[f[0]+":"+f[1]] = "/dev/" + f[3]
		}
	}
	return names
}
