package crispec

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/oci"
)

// clampOOM keeps a score from going below the daemon's own where it cannot, or
// shall not (contract 7.3.13).
func clampOOM(adj int, cfg cristate.RuntimeConfig, h Host) int {
	if (cfg.RestrictOOMScoreAdj || !h.OOMScoreLowerable) && adj < h.OOMScoreAdj {
		return h.OOMScoreAdj
	}
	return adj
}

// OOMScore is the adjustment that a container gets when adj is asked for: no
// lower than the daemon's own where that cannot, or shall not, be. One that no
// process can have stays so.
func OOMScore(adj int64, cfg cristate.RuntimeConfig, h Host) int {
	return clampOOM(int(max(min(adj, 1001), -1001)), cfg, h)
}

// limits are the resources of the request and the classes that annotations name.
func (in ContainerInput) limits() (oci.Option, error) {
	res := in.Config.GetLinux().GetResources()
	if err := checkResources(res, in.Host); err != nil {
		return nil, err
	}
	name, own, pod := in.Config.GetMetadata().GetName(), in.Config.GetAnnotations(), in.Pod.GetAnnotations()
	var blockIO *specs.LinuxBlockIO
	var rdt *specs.LinuxIntelRdt
	if class := classOf("blockio", name, own, pod); class != "" {
		switch {
		case in.Host.BlockIO != nil:
			var err error
			if blockIO, err = in.Host.BlockIO(class); err != nil {
				return nil, fmt.Errorf("block I/O class %q: %w", short(class), err)
			}
		case !in.RuntimeConfig.Containerd.IgnoreBlockIONotEnabledErrors:
			return nil, fmt.Errorf("block I/O class %q: no classes are set up on this host: %w", short(class), errdefs.ErrFailedPrecondition)
		default:
			in.Log.Warn("block I/O class is ignored: no classes are set up on this host", "class", short(class))
		}
	}
	if class := classOf("rdt", name, own, pod); class != "" {
		switch {
		case !rdtClass.MatchString(class):
			return nil, fmt.Errorf("RDT class %q: %w", short(class), errdefs.ErrInvalidArgument)
		case in.Host.RDT:
			rdt = &specs.LinuxIntelRdt{ClosID: class}
		case !in.RuntimeConfig.Containerd.IgnoreRdtNotEnabledErrors:
			return nil, fmt.Errorf("RDT class %q: no classes are set up on this host: %w", class, errdefs.ErrFailedPrecondition)
		default:
			in.Log.Warn("RDT class is ignored: no classes are set up on this host", "class", class)
		}
	}
	return oci.WithSpec(func(s *specs.Spec) error {
		if blockIO != nil {
			s.Linux.Resources.BlockIO = blockIO
		}
		if rdt != nil {
			s.Linux.IntelRdt = rdt
		}
		return apply(s.Linux.Resources, res, in.RuntimeConfig, in.Host, in.Log)
	}), nil
}

// rdtClass is the name of a directory.
var rdtClass = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// classOf finds the class that a container's annotation names, or the pod's for
// the container, or the pod's for all. kind is blockio or rdt.
func classOf(kind, name string, own, pod map[string]string) string {
	if c, ok := own["io.kubernetes.cri."+kind+"-class"]; ok {
		return c
	}
	prefix := kind + ".resources.beta.kubernetes.io/"
	if c, ok := pod[prefix+"container."+name]; ok {
		return c
	}
	return pod[prefix+"pod"]
}

var (
	cpuList  = regexp.MustCompile(`^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$`)
	pageSize = regexp.MustCompile(`^[0-9]+[KMGT]?B$`)
	// A key is the name of a file in the cgroup's directory.
	unifiedKey = regexp.MustCompile(`^[a-z][a-z0-9_]*(\.[a-zA-Z0-9_]+)+$`)
)

// checkResources refuses what no kernel takes.
func checkResources(r *runtime.LinuxContainerResources, h Host) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), errdefs.ErrInvalidArgument)
	}
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	switch {
	case r.GetCpuPeriod() < 0 || r.GetCpuShares() < 0 || r.GetCpuQuota() < -1:
		return bad("CPU period %d, quota %d, shares %d: negative", r.GetCpuPeriod(), r.GetCpuQuota(), r.GetCpuShares())
	case limit < -1 || swap < -1:
		return bad("memory limit %d, with swap %d: negative", limit, swap)
	case swap > 0 && limit > swap:
		return bad("limit of memory and swap together, %d, is below the limit of memory, %d", swap, limit)
	}
	for _, s := range []string{r.GetCpusetCpus(), r.GetCpusetMems()} {
		if s != "" && !cpuList.MatchString(s) {
			return bad("CPU set %q: want a list such as 0-2,4", short(s))
		}
	}
	for _, l := range r.GetHugepageLimits() {
		if !pageSize.MatchString(l.GetPageSize()) {
			return bad("huge pages of size %q", short(l.GetPageSize()))
		}
	}
	for k := range r.GetUnified() {
		if !unifiedKey.MatchString(k) {
			return bad("unified resource %q is no cgroup file", short(k))
		}
	}
	if len(r.GetUnified()) > 0 && !h.CgroupV2 {
		return fmt.Errorf("unified resources need cgroup version 2: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// apply sets what r names and leaves the rest (contract 7.3.13, 7.3.15, 7.3.16).
func apply(to *specs.LinuxResources, r *runtime.LinuxContainerResources, cfg cristate.RuntimeConfig, h Host, log *slog.Logger) error {
	if r == nil {
		return nil
	}
	cpu := to.CPU
	if cpu == nil {
		cpu = &specs.LinuxCPU{}
	}
	set := func(v int64, into **uint64) {
		if v != 0 {
			u := uint64(v)
			*into = &u
		}
	}
	set(r.GetCpuPeriod(), &cpu.Period)
	set(r.GetCpuShares(), &cpu.Shares)
	if q := r.GetCpuQuota(); q != 0 {
		cpu.Quota = &q
	}
	if c := r.GetCpusetCpus(); c != "" {
		cpu.Cpus = c
	}
	if m := r.GetCpusetMems(); m != "" {
		cpu.Mems = m
	}
	if *cpu != (specs.LinuxCPU{}) {
		to.CPU = cpu
	}
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	if limit != 0 || swap != 0 {
		memory := to.Memory
		if memory == nil {
			memory = &specs.LinuxMemory{}
		}
		if limit != 0 {
			memory.Limit = &limit
		}
		switch {
		case !h.Swap:
			if swap != 0 && swap != limit {
				log.Warn("limit of swap is ignored: this host's cgroups do not count it", "memory_swap_limit_in_bytes", swap)
			}
		case swap != 0:
			memory.Swap = &swap
		default: // no swap at all, unless it is asked for
			memory.Swap = &limit
		}
		if *memory != (specs.LinuxMemory{}) {
			to.Memory = memory
		}
	}
	if limits := r.GetHugepageLimits(); len(limits) > 0 && !cfg.DisableHugetlbController {
		switch {
		case h.HugeTLB:
			to.HugepageLimits = nil
			for _, l := range limits {
				to.HugepageLimits = append(to.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: l.GetPageSize(), Limit: l.GetLimit()})
			}
		case !cfg.TolerateMissingHugetlbController:
			return fmt.Errorf("huge page limits: this host has no hugetlb cgroup controller: %w", errdefs.ErrFailedPrecondition)
		default:
			log.Warn("huge page limits are ignored: this host has no hugetlb cgroup controller")
		}
	}
	if u := r.GetUnified(); len(u) > 0 {
		if to.Unified = maps.Clone(to.Unified); to.Unified == nil {
			to.Unified = map[string]string{}
		}
		maps.Copy(to.Unified, u)
	}
	return nil
}

// Update returns a copy of a specification with other resources: what r names
// is set, the rest stays (contract 7.1.16). The errors are those of Container.
func Update(s *specs.Spec, r *runtime.LinuxContainerResources, cfg cristate.RuntimeConfig, h Host, log *slog.Logger) (*specs.Spec, error) {
	if log == nil {
		log = nop()
	}
	if err := checkResources(r, h); err != nil {
		return nil, fmt.Errorf("update resources: %w", err)
	}
	out, err := clone(s)
	if err != nil {
		return nil, fmt.Errorf("update resources: %w", err)
	}
	if out.Linux == nil {
		out.Linux = &specs.Linux{}
	}
	if out.Linux.Resources == nil {
		out.Linux.Resources = &specs.LinuxResources{}
	}
	if err := apply(out.Linux.Resources, r, cfg, h, log); err != nil {
		return nil, fmt.Errorf("update resources: %w", err)
	}
	return out, nil
}

func clone(s *specs.Spec) (*specs.Spec, error) {
	data, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode specification: %w", err)
	}
	var out specs.Spec
	if err := json.Unmarshal(data, &out); err != nil {
		return nil, fmt.Errorf("decode specification: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	return &out, nil
}

// Resources are those of a specification as a container's status shows them.
func Resources(s *specs.Spec) *runtime.ContainerResources {
	l := &runtime.LinuxContainerResources{}
	if s.Process != nil && s.Process.OOMScoreAdj != nil {
		l.OomScoreAdj = int64(*s.Process.OOMScoreAdj)
	}
	var r specs.LinuxResources
	if s.Linux != nil && s.Linux.Resources != nil {
		r = *s.Linux.Resources
	}
	if c := r.CPU; c != nil {
		l.CpuPeriod, l.CpuQuota, l.CpuShares = value[int64](c.Period), value[int64](c.Quota), value[int64](c.Shares)
		l.CpusetCpus, l.CpusetMems = c.Cpus, c.Mems
	}
	if m := r.Memory; m != nil {
		l.MemoryLimitInBytes, l.MemorySwapLimitInBytes = value[int64](m.Limit), value[int64](m.Swap)
	}
	for _, h := range r.HugepageLimits {
		l.HugepageLimits = append(l.HugepageLimits, &runtime.HugepageLimit{PageSize: h.Pagesize, Limit: h.Limit})
	}
	l.Unified = maps.Clone(r.Unified)
	return &runtime.ContainerResources{Linux: l}
}

func value[T, F int64 | uint64](p *F) T {
	if p == nil {
		return 0
	}
	return T(*p)
}

// cdiPrefix is that of annotations that name devices.
const cdiPrefix = "cdi.k8s.io/"

// CDIDevices are the devices that a container's configuration names, in its
// field and in its annotations, each once (contract 7.3.12). ErrInvalidArgument
// for a name that is not vendor/class=name.
func CDIDevices(c *runtime.ContainerConfig) ([]string, error) {
	var names []string
	for _, d := range c.GetCDIDevices() {
		names = append(names, d.GetName())
	}
	for _, k := range sortedKeys(c.GetAnnotations()) {
		if strings.HasPrefix(k, cdiPrefix) {
			names = append(names, strings.Split(c.GetAnnotations()[k], ",")...)
		}
	}
	var out []string
	seen := map[string]bool{}
	for _, n := range names {
		if !isCDIDevice(n) {
			return nil, fmt.Errorf("CDI device %q: want vendor/class=name: %w", short(n), errdefs.ErrInvalidArgument)
		}
		if !seen[n] {
			seen[n] = true
			out = append(out, n)
		}
	}
	return out, nil
}

func (in ContainerInput) cdi() ([]oci.Option, error) {
	devices, err := CDIDevices(in.Config)
	if err != nil || len(devices) == 0 {
		return nil, err
	}
	if !in.RuntimeConfig.EnableCDI {
		in.Log.Warn("CDI devices are ignored: enable_cdi is false", "devices", devices)
		return nil, nil
	}
	if in.CDI == nil {
		return nil, fmt.Errorf("CDI devices %q: this daemon has no CDI: %w", devices, errdefs.ErrFailedPrecondition)
	}
	return []oci.Option{oci.WithSpec(func(s *specs.Spec) error { return in.CDI(s, devices) })}, nil
}
