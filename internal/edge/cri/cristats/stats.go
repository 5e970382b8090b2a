package cristats

import (
	"cmp"
	"context"
	"strconv"
	"sync/atomic"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

func (s *Service) reader() (r *reader, done func()) {
	r = s.readers.Get().(*reader)
	return r, func() { s.readers.Put(r) }
}

// read finds a thing's group and its CPU time.
func (s *Service) read(e *entry, key string, find func(*reader) (*group, error)) (*group, sample, error) {
	r, done := s.reader()
	defer done()
	g, err := e.locate(key, func() (*group, error) { return find(r) })
	if err != nil {
		return nil, sample{}, err
	}
	total, err := g.cpuTotal(r)
	if err != nil {
		e.lost(g)
		return nil, sample{}, err
	}
	return g, sample{time.Now(), total}, nil
}

// ofContainer finds a running container's group and its CPU time.
func (s *Service) ofContainer(e *entry, c *cristate.Container) (*group, sample, error) {
	pid := c.Status().Pid
	return s.read(e, strconv.FormatUint(uint64(pid), 10), func(r *reader) (*group, error) { return s.tree.ofProcess(r, pid, c.ID()) })
}

// ofPod finds a pod's group and its CPU time.
func (s *Service) ofPod(e *entry, p *cristate.Pod) (*group, sample, error) {
	parent := p.Meta().Config.GetLinux().GetCgroupParent()
	return s.read(e, parent, func(*reader) (*group, error) { return s.tree.ofParent(parent) })
}

// usage makes the messages of CPU, memory, swap and IO. The sample becomes
// one to compare the next with.
func (s *Service) usage(e *entry, g *group, now sample, started time.Time) (*runtime.CpuUsage, *runtime.MemoryUsage, *runtime.SwapUsage, *runtime.IoUsage) {
	r, done := s.reader()
	defer done()
	at := now.at.UnixNano()
	c := &runtime.CpuUsage{Timestamp: at, UsageCoreNanoSeconds: some(now.total).of(), UsageNanoCores: some(e.nanoCores(now, started, s.o.Period, s.o.Retention)).of()}
	e.record(now, s.o.Period, s.o.Retention)
	var io *runtime.IoUsage
	if g.unified {
		c.Psi = r.pressure(g.cpu, "cpu.pressure")
		if psi := r.pressure(g.blkio, "io.pressure"); psi != nil {
			io = &runtime.IoUsage{Timestamp: at, Psi: psi}
		}
	}
	m := g.readMemory(r, false)
	mem, swap := memoryUsage(m, at)
	return c, mem, swap, io
}

func memoryUsage(m memory, at int64) (*runtime.MemoryUsage, *runtime.SwapUsage) {
	var mem *runtime.MemoryUsage
	if m.usage.ok {
		mem = &runtime.MemoryUsage{Timestamp: at, UsageBytes: m.usage.of(), WorkingSetBytes: m.workingSet().of(), AvailableBytes: m.limit.less(m.workingSet()).of(),
			RssBytes: m.rss.of(), PageFaults: m.faults.of(), MajorPageFaults: m.majorFaults.of(), Psi: m.psi}
	}
	if !m.swap.ok {
		return mem, nil
	}
	return mem, &runtime.SwapUsage{Timestamp: at, SwapUsageBytes: m.swap.of(), SwapAvailableBytes: m.swapLimit.less(m.swap).of()}
}

// seen is a container or pod that is looked at for one answer.
type seen[T any] struct {
	*entry
	of T
}

func look[T interface{ ID() string }](s *Service, things []T) []seen[T] {
	all := make([]seen[T], len(things))
	for i, t := range things {
		all[i] = seen[T]{s.entry(t.ID()), t}
	}
	return all
}

// containers measures containers; one that does not answer has no numbers.
func (s *Service) containers(ctx context.Context, list []*cristate.Container) ([]*runtime.ContainerStats, error) {
	all := look(s, list)
	answers, err := gather(ctx, readers, patience, all, seen[*cristate.Container].flag, func(it seen[*cristate.Container]) *runtime.ContainerStats {
		out := s.frame(it.entry, it.of)
		if st := it.of.Status(); isRunning(st) {
			if g, now, err := s.ofContainer(it.entry, it.of); err == nil {
				out.Cpu, out.Memory, out.Swap, out.Io = s.usage(it.entry, g, now, time.Unix(0, st.StartedAt))
			}
		}
		return out
	})
	for i, a := range answers {
		if a == nil {
			answers[i] = s.frame(all[i].entry, list[i])
		}
	}
	return answers, err
}

// frame is what is known of a container without looking at it.
func (s *Service) frame(e *entry, c *cristate.Container) *runtime.ContainerStats {
	m := c.Meta()
	out := &runtime.ContainerStats{Attributes: &runtime.ContainerAttributes{Id: m.ID, Metadata: m.Config.GetMetadata(), Labels: m.Config.GetLabels(), Annotations: m.Config.GetAnnotations()}}
	e.mu.Lock()
	l := e.layer
	e.mu.Unlock()
	if !l.at.IsZero() {
		out.WritableLayer = Filesystem(s.root(c.Facts().Snapshotter), l.Size, l.Inodes, l.at)
	}
	return out
}

func (s *Service) root(snapshotter string) string {
	if s.o.Root == nil {
		return ""
	}
	return s.o.Root(snapshotter)
}

// Filesystem is the usage of a part of the file system that holds root.
func Filesystem(root string, size, inodes int64, at time.Time) *runtime.FilesystemUsage {
	return &runtime.FilesystemUsage{Timestamp: at.UnixNano(), FsId: &runtime.FilesystemIdentifier{Mountpoint: root},
		UsedBytes: some(uint64(max(0, size))).of(), InodesUsed: some(uint64(max(0, inodes))).of()}
}

// pods measures ready pods with their running containers.
func (s *Service) pods(ctx context.Context, list []*cristate.Pod) ([]*runtime.PodSandboxStats, error) {
	by := s.running()
	var members []*cristate.Container
	for _, p := range list {
		members = append(members, by[p.ID()]...)
	}
	measured, err := s.containers(ctx, members)
	if err != nil {
		return nil, err
	}
	own := make(map[string][]*runtime.ContainerStats, len(list))
	for i, c := range members {
		pod := c.Meta().SandboxID
		own[pod] = append(own[pod], measured[i])
	}
	all := look(s, list)
	answers, err := gather(ctx, readers, patience, all, func(it seen[*cristate.Pod]) *atomic.Int32 { return it.flag() }, func(it seen[*cristate.Pod]) *runtime.PodSandboxStats {
		p := it.of
		out := podFrame(p, own[p.ID()])
		at := time.Now().UnixNano()
		if g, now, err := s.ofPod(it.entry, p); err == nil {
			out.Linux.Cpu, out.Linux.Memory, _, out.Linux.Io = s.usage(it.entry, g, now, p.Status().CreatedAt)
		} else {
			out.Linux.Cpu, out.Linux.Memory = s.sum(it.entry, p, out.Linux.Containers)
		}
		out.Linux.Process = &runtime.ProcessUsage{Timestamp: at, ProcessCount: some(s.processes(p, by[p.ID()])).of()}
		if ifs := s.interfaces(p, by[p.ID()]); len(ifs) > 0 {
			out.Linux.Network = &runtime.NetworkUsage{Timestamp: at, DefaultInterface: ifs[0].usage()}
			for _, i := range ifs[1:] {
				out.Linux.Network.Interfaces = append(out.Linux.Network.Interfaces, i.usage())
			}
		}
		return out
	})
	for i, a := range answers {
		if a == nil {
			answers[i] = podFrame(list[i], own[list[i].ID()])
		}
	}
	return answers, err
}

// podFrame is what is known of a pod without looking at it.
func podFrame(p *cristate.Pod, containers []*runtime.ContainerStats) *runtime.PodSandboxStats {
	m := p.Meta()
	return &runtime.PodSandboxStats{
		Attributes: &runtime.PodSandboxAttributes{Id: m.ID, Metadata: m.Config.GetMetadata(), Labels: m.Config.GetLabels(), Annotations: m.Config.GetAnnotations()},
		Linux:      &runtime.LinuxPodSandboxStats{Containers: containers},
	}
}

// sum is the usage of a pod that has no group: that of its pause process and
// its containers.
func (s *Service) sum(e *entry, p *cristate.Pod, containers []*runtime.ContainerStats) (*runtime.CpuUsage, *runtime.MemoryUsage) {
	now := sample{at: time.Now()}
	var m memory
	add := func(to *value, n *runtime.UInt64Value) {
		if n != nil {
			*to = some(to.n + n.Value)
		}
	}
	var found bool
	for _, c := range containers {
		if c.Cpu != nil {
			found, now.total = true, now.total+c.Cpu.UsageCoreNanoSeconds.GetValue()
		}
		if c.Memory != nil {
			add(&m.usage, c.Memory.UsageBytes)
			add(&m.rss, c.Memory.RssBytes)
			add(&m.faults, c.Memory.PageFaults)
			add(&m.majorFaults, c.Memory.MajorPageFaults)
			m.inactiveFile.n += c.Memory.UsageBytes.GetValue() - c.Memory.WorkingSetBytes.GetValue()
		}
	}
	if pid := p.Status().Pid; pid != 0 {
		r, done := s.reader()
		defer done()
		if g, err := s.tree.ofProcess(r, pid, p.ID()); err == nil {
			if n, err := g.cpuTotal(r); err == nil {
				found, now.total = true, now.total+n
			}
			own := g.readMemory(r, false)
			for to, v := range map[*value]value{&m.usage: own.usage, &m.rss: own.rss, &m.faults: own.faults, &m.majorFaults: own.majorFaults} {
				add(to, v.of())
			}
			m.inactiveFile.n += min(own.inactiveFile.n, own.usage.n)
		}
	}
	if !found {
		return nil, nil
	}
	started := cmp.Or(p.Status().CreatedAt, now.at)
	c := &runtime.CpuUsage{Timestamp: now.at.UnixNano(), UsageCoreNanoSeconds: some(now.total).of(), UsageNanoCores: some(e.nanoCores(now, started, s.o.Period, s.o.Retention)).of()}
	e.record(now, s.o.Period, s.o.Retention)
	mem, _ := memoryUsage(m, now.at.UnixNano())
	return c, mem
}
