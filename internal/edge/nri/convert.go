package nri

import (
	"net/netip"
	"slices"

	"github.com/containerd/nri/pkg/api"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// podOf is a pod as plugins see it.
func podOf(p *cristate.Pod) *api.PodSandbox {
	m, st := p.Meta(), p.Status()
	meta := m.Config.GetMetadata()
	lin := m.Config.GetLinux()
	out := &api.PodSandbox{Id: m.ID, Name: meta.GetName(), Uid: meta.GetUid(), Namespace: meta.GetNamespace(), Labels: m.Config.GetLabels(), Annotations: m.Config.GetAnnotations(),
		RuntimeHandler: m.RuntimeHandler, Pid: st.Pid, Linux: &api.LinuxPodSandbox{CgroupParent: lin.GetCgroupParent(), PodOverhead: resourcesIn(lin.GetOverhead()), PodResources: resourcesIn(lin.GetResources())}}
	if st.Overhead != nil {
		out.Linux.PodOverhead = resourcesIn(st.Overhead)
	}
	if st.Resources != nil {
		out.Linux.PodResources = resourcesIn(st.Resources)
	}
	for _, ip := range append([]string{m.IP}, m.AdditionalIPs...) {
		if _, err := netip.ParseAddr(ip); err == nil {
			out.Ips = append(out.Ips, ip)
		}
	}
	for kind, path := range st.Namespaces {
		out.Linux.Namespaces = append(out.Linux.Namespaces, &api.LinuxNamespace{Type: kind, Path: path})
	}
	slices.SortFunc(out.Linux.Namespaces, func(a, b *api.LinuxNamespace) int { return compare(a.Type, b.Type) })
	return out
}

func compare(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

var states = map[runtime.ContainerState]api.ContainerState{
	runtime.ContainerState_CONTAINER_CREATED: api.ContainerState_CONTAINER_CREATED,
	runtime.ContainerState_CONTAINER_RUNNING: api.ContainerState_CONTAINER_RUNNING,
	runtime.ContainerState_CONTAINER_EXITED:  api.ContainerState_CONTAINER_STOPPED,
	runtime.ContainerState_CONTAINER_UNKNOWN: api.ContainerState_CONTAINER_UNKNOWN,
}

// containerOf is a container as plugins see it; spec is nil if it is not known.
func containerOf(c *cristate.Container, spec *specs.Spec) *api.Container {
	m, st := c.Meta(), c.Status()
	out := &api.Container{Id: m.ID, PodSandboxId: m.SandboxID, Name: m.Config.GetMetadata().GetName(), State: states[st.State()], Labels: m.Config.GetLabels(), Pid: st.Pid,
		CreatedAt: st.CreatedAt, StartedAt: st.StartedAt, FinishedAt: st.FinishedAt, ExitCode: st.ExitCode, StatusReason: st.Reason, StatusMessage: st.Message,
		Image: &api.Image{Name: m.Config.GetImage().GetUserSpecifiedImage(), ConfigDigest: m.ImageRef}, Linux: &api.LinuxContainer{SeccompProfile: seccompOf(m.Config)}}
	if out.Image.Name == "" {
		out.Image.Name = m.Config.GetImage().GetImage()
	}
	if names, err := crispec.CDIDevices(m.Config); err == nil {
		for _, name := range names {
			out.CDIDevices = append(out.CDIDevices, &api.CDIDevice{Name: name})
		}
	}
	if spec == nil {
		out.Annotations = m.Config.GetAnnotations()
		return out
	}
	out.Annotations, out.Mounts, out.Hooks = map[string]string{}, api.FromOCIMounts(spec.Mounts), api.FromOCIHooks(spec.Hooks)
	for k, v := range spec.Annotations {
		out.Annotations[k] = v
	}
	if p := spec.Process; p != nil {
		out.Args, out.Env = slices.Clone(p.Args), slices.Clone(p.Env)
		out.User = &api.User{Uid: p.User.UID, Gid: p.User.GID, AdditionalGids: p.User.AdditionalGids}
		for _, l := range p.Rlimits {
			out.Rlimits = append(out.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
		}
		out.Linux.OomScoreAdj = api.Int(p.OOMScoreAdj)
		out.Linux.IoPriority, out.Linux.Scheduler = api.FromOCILinuxIOPriority(p.IOPriority), api.FromOCILinuxScheduler(p.Scheduler)
	}
	if l := spec.Linux; l != nil {
		out.Linux.Namespaces, out.Linux.Devices = api.FromOCILinuxNamespaces(l.Namespaces), api.FromOCILinuxDevices(l.Devices)
		out.Linux.Resources, out.Linux.CgroupsPath = api.FromOCILinuxResources(l.Resources, spec.Annotations), l.CgroupsPath
		if l.Seccomp != nil {
			out.Linux.SeccompPolicy = api.FromOCILinuxSeccomp(l.Seccomp)
		}
		out.Linux.Sysctl, out.Linux.NetDevices = map[string]string{}, map[string]*api.LinuxNetDevice{}
		for k, v := range l.Sysctl {
			out.Linux.Sysctl[k] = v
		}
		for k, v := range l.NetDevices {
			out.Linux.NetDevices[k] = api.FromOCILinuxNetDevice(v)
		}
		if r := l.IntelRdt; r != nil {
			out.Linux.Rdt = &api.LinuxRdt{ClosId: api.String(r.ClosID), Schemata: api.RepeatedString(r.Schemata), EnableMonitoring: api.Bool(r.EnableMonitoring)}
		}
	}
	return out
}

// seccompOf is the profile that was asked for: validators look at it.
func seccompOf(c *runtime.ContainerConfig) *api.SecurityProfile {
	p := c.GetLinux().GetSecurityContext().GetSeccomp()
	if p == nil {
		return nil
	}
	kind := map[runtime.SecurityProfile_ProfileType]api.SecurityProfile_ProfileType{
		runtime.SecurityProfile_RuntimeDefault: api.SecurityProfile_RUNTIME_DEFAULT,
		runtime.SecurityProfile_Unconfined:     api.SecurityProfile_UNCONFINED,
		runtime.SecurityProfile_Localhost:      api.SecurityProfile_LOCALHOST,
	}[p.GetProfileType()]
	return &api.SecurityProfile{ProfileType: kind, LocalhostRef: p.GetLocalhostRef()}
}

// resourcesIn are resources of the CRI, in which 0 is what is not set.
func resourcesIn(r *runtime.LinuxContainerResources) *api.LinuxResources {
	if r == nil {
		return nil
	}
	out := &api.LinuxResources{Memory: &api.LinuxMemory{}, Cpu: &api.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()}, Unified: map[string]string{}}
	if v := r.GetCpuPeriod(); v > 0 {
		out.Cpu.Period = api.UInt64(uint64(v))
	}
	if v := r.GetCpuQuota(); v != 0 {
		out.Cpu.Quota = api.Int64(v)
	}
	if v := r.GetCpuShares(); v > 0 {
		out.Cpu.Shares = api.UInt64(uint64(v))
	}
	if v := r.GetMemoryLimitInBytes(); v != 0 {
		out.Memory.Limit = api.Int64(v)
	}
	if v := r.GetMemorySwapLimitInBytes(); v != 0 {
		out.Memory.Swap = api.Int64(v)
	}
	for _, l := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, &api.HugepageLimit{PageSize: l.GetPageSize(), Limit: l.GetLimit()})
	}
	for k, v := range r.GetUnified() {
		out.Unified[k] = v
	}
	return out
}

// resourcesOut is a copy of base with what a plugin wants. What the CRI has no
// word for is said.
func (h *Host) resourcesOut(id string, base *runtime.LinuxContainerResources, r *api.LinuxResources) *runtime.LinuxContainerResources {
	out := proto.CloneOf(base)
	if out == nil {
		out = &runtime.LinuxContainerResources{}
	}
	if c := r.GetCpu(); c != nil {
		if v := c.GetPeriod(); v != nil {
			out.CpuPeriod = int64(v.GetValue())
		}
		if v := c.GetQuota(); v != nil {
			out.CpuQuota = v.GetValue()
		}
		if v := c.GetShares(); v != nil {
			out.CpuShares = int64(v.GetValue())
		}
		if c.GetCpus() != "" {
			out.CpusetCpus = c.GetCpus()
		}
		if c.GetMems() != "" {
			out.CpusetMems = c.GetMems()
		}
	}
	if m := r.GetMemory(); m != nil {
		if v := m.GetLimit(); v != nil {
			out.MemoryLimitInBytes = v.GetValue()
		}
		if v := m.GetSwap(); v != nil {
			out.MemorySwapLimitInBytes = v.GetValue()
		}
	}
	if len(r.GetHugepageLimits()) > 0 {
		limits := map[string]uint64{}
		for _, l := range out.GetHugepageLimits() {
			limits[l.GetPageSize()] = l.GetLimit()
		}
		for _, l := range r.GetHugepageLimits() {
			limits[l.GetPageSize()] = l.GetLimit()
		}
		out.HugepageLimits = nil
		for size, limit := range limits {
			out.HugepageLimits = append(out.HugepageLimits, &runtime.HugepageLimit{PageSize: size, Limit: limit})
		}
	}
	for k, v := range r.GetUnified() {
		if out.Unified == nil {
			out.Unified = map[string]string{}
		}
		out.Unified[k] = v
	}
	m, c := r.GetMemory(), r.GetCpu()
	for what, set := range map[string]bool{"pids": r.GetPids() != nil, "blockio_class": r.GetBlockioClass() != nil, "rdt_class": r.GetRdtClass() != nil, "devices": len(r.GetDevices()) > 0,
		"memory.reservation": m.GetReservation() != nil, "memory.kernel": m.GetKernel() != nil || m.GetKernelTcp() != nil, "memory.swappiness": m.GetSwappiness() != nil,
		"memory.disable_oom_killer": m.GetDisableOomKiller() != nil, "cpu.realtime": c.GetRealtimePeriod() != nil || c.GetRealtimeRuntime() != nil} {
		if set {
			h.Log.Warn("NRI: a limit that a plugin wants cannot be changed in a container that is there", "container", id, "limit", what)
		}
	}
	return out
}
