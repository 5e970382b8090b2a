package nri

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// rdtClass is the name of a directory.
var rdtClass = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// adjust changes a specification as plugins wish (contract 1.4.12). What they
// wish for is applied as a whole or, with an error, not to be used.
func (h *Host) adjust(spec *specs.Spec, a *api.ContainerAdjustment) error {
	if a == nil {
		return nil
	}
	for _, m := range a.GetMounts() {
		if at := api.ClearRemovalMarker(m.GetDestination()); !path.IsAbs(at) {
			return fmt.Errorf("mount at %.200q: it must be absolute: %w", at, errdefs.ErrInvalidArgument)
		}
	}
	for _, d := range a.GetLinux().GetDevices() {
		if at := api.ClearRemovalMarker(d.GetPath()); !path.IsAbs(at) {
			return fmt.Errorf("device %.200q: it must be absolute: %w", at, errdefs.ErrInvalidArgument)
		}
	}
	if spec.Process == nil {
		spec.Process = &specs.Process{}
	}
	if spec.Linux == nil {
		spec.Linux = &specs.Linux{}
	}
	if spec.Linux.Resources == nil {
		spec.Linux.Resources = &specs.LinuxResources{}
	}
	inject := h.CDI
	if inject == nil {
		inject = func(_ *specs.Spec, names []string) error {
			return fmt.Errorf("CDI devices %q: CDI is disabled: %w", names, errdefs.ErrFailedPrecondition)
		}
	}
	g := generate.SpecGenerator(&document{spec}, generate.WithCDIDeviceInjector(inject),
		generate.WithBlockIOResolver(func(class string) (*specs.LinuxBlockIO, error) {
			return nil, fmt.Errorf("block I/O class %.200q: no classes are set up on this host: %w", class, errdefs.ErrFailedPrecondition)
		}),
		generate.WithRdtResolver(func(class string) (*specs.LinuxIntelRdt, error) {
			if !rdtClass.MatchString(class) {
				return nil, fmt.Errorf("RDT class %.200q: %w", class, errdefs.ErrInvalidArgument)
			}
			return &specs.LinuxIntelRdt{ClosID: class}, nil
		}))
	counted := spec.Linux.Resources.Memory != nil && spec.Linux.Resources.Memory.Swap != nil
	if err := g.Adjust(a); err != nil {
		return err
	}
	if m := spec.Linux.Resources.Memory; m != nil && !counted {
		m.Swap = nil // the library sets it with the limit, also where swap is not counted
	}
	memory(spec, a.GetLinux().GetResources().GetMemory())
	if e := a.GetLinux().GetSeccompPolicy().GetDefaultErrno(); e != nil {
		errno := uint(e.GetValue())
		spec.Linux.Seccomp.DefaultErrnoRet = &errno
	}
	// The last of a kind counts: runtimes refuse two.
	limits := map[string]int{}
	var once []specs.POSIXRlimit
	for _, l := range spec.Process.Rlimits {
		if i, ok := limits[l.Type]; ok {
			once[i] = l
			continue
		}
		limits[l.Type] = len(once)
		once = append(once, l)
	}
	spec.Process.Rlimits = once
	return nil
}

// memory sets what the library leaves out.
func memory(spec *specs.Spec, m *api.LinuxMemory) {
	if m == nil {
		return
	}
	if m.GetReservation() == nil && m.GetSwap() == nil && m.GetSwappiness() == nil && m.GetDisableOomKiller() == nil && m.GetKernel() == nil && m.GetKernelTcp() == nil {
		return
	}
	to := (&document{spec}).memory()
	set := func(to **int64, v *api.OptionalInt64) {
		if p := v.Get(); p != nil {
			*to = p
		}
	}
	set(&to.Reservation, m.GetReservation())
	set(&to.Swap, m.GetSwap())
	set(&to.KernelTCP, m.GetKernelTcp())
	if p := m.GetSwappiness().Get(); p != nil {
		to.Swappiness = p
	}
	if p := m.GetDisableOomKiller().Get(); p != nil {
		to.DisableOOMKiller = p
	}
}

// document is a specification as the library changes it. Process, Linux and
// Linux.Resources are there.
type document struct{ s *specs.Spec }

var _ generate.UnderlyingGenerator = (*document)(nil)

func (d *document) Spec() *specs.Spec { return d.s }

func put[V any](m *map[string]V, key string, v V) {
	if *m == nil {
		*m = map[string]V{}
	}
	(*m)[key] = v
}

func (d *document) cpu() *specs.LinuxCPU {
	if d.s.Linux.Resources.CPU == nil {
		d.s.Linux.Resources.CPU = &specs.LinuxCPU{}
	}
	return d.s.Linux.Resources.CPU
}

func (d *document) memory() *specs.LinuxMemory {
	if d.s.Linux.Resources.Memory == nil {
		d.s.Linux.Resources.Memory = &specs.LinuxMemory{}
	}
	return d.s.Linux.Resources.Memory
}

func (d *document) hooks() *specs.Hooks {
	if d.s.Hooks == nil {
		d.s.Hooks = &specs.Hooks{}
	}
	return d.s.Hooks
}

// The methods of generate.UnderlyingGenerator, named by what they do.

func (d *document) AddAnnotation(key, value string) { put(&d.s.Annotations, key, value) }
func (d *document) RemoveAnnotation(key string)     { delete(d.s.Annotations, key) }
func (d *document) AddDevice(v specs.LinuxDevice)   { d.s.Linux.Devices = append(d.s.Linux.Devices, v) }
func (d *document) AddPostStartHook(v specs.Hook) {
	d.hooks().Poststart = append(d.hooks().Poststart, v)
}
func (d *document) AddPostStopHook(v specs.Hook)         { d.hooks().Poststop = append(d.hooks().Poststop, v) }
func (d *document) AddLinuxResourcesUnified(k, v string) { put(&d.s.Linux.Resources.Unified, k, v) }
func (d *document) AddLinuxSysctl(k, v string)           { put(&d.s.Linux.Sysctl, k, v) }
func (d *document) RemoveLinuxSysctl(k string)           { delete(d.s.Linux.Sysctl, k) }
func (d *document) AddMount(m specs.Mount)               { d.s.Mounts = append(d.s.Mounts, m) }
func (d *document) ClearMounts()                         { d.s.Mounts = nil }
func (d *document) Mounts() []specs.Mount                { return d.s.Mounts }
func (d *document) ClearProcessEnv()                     { d.s.Process.Env = nil }
func (d *document) SetProcessArgs(args []string)         { d.s.Process.Args = args }
func (d *document) SetProcessOOMScoreAdj(adj int)        { d.s.Process.OOMScoreAdj = &adj }
func (d *document) SetLinuxCgroupsPath(p string)         { d.s.Linux.CgroupsPath = p }

func (d *document) SetLinuxResourcesCPUCpus(v string)           { d.cpu().Cpus = v }
func (d *document) SetLinuxResourcesCPUMems(v string)           { d.cpu().Mems = v }
func (d *document) SetLinuxResourcesCPUPeriod(v uint64)         { d.cpu().Period = &v }
func (d *document) SetLinuxResourcesCPUQuota(v int64)           { d.cpu().Quota = &v }
func (d *document) SetLinuxResourcesCPURealtimePeriod(v uint64) { d.cpu().RealtimePeriod = &v }
func (d *document) SetLinuxResourcesCPURealtimeRuntime(v int64) { d.cpu().RealtimeRuntime = &v }
func (d *document) SetLinuxResourcesCPUShares(v uint64)         { d.cpu().Shares = &v }
func (d *document) SetLinuxResourcesMemoryLimit(v int64)        { d.memory().Limit = &v }
func (d *document) SetLinuxResourcesMemorySwap(v int64)         { d.memory().Swap = &v }

func (d *document) AddPreStartHook(v specs.Hook) {
	h := d.hooks()
	h.Prestart = append(h.Prestart, v) //nolint:staticcheck // plugins may want it still
}

func (d *document) AddProcessEnv(name, value string) {
	d.s.Process.Env = slices.DeleteFunc(d.s.Process.Env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
	d.s.Process.Env = append(d.s.Process.Env, name+"="+value)
}

func (d *document) AddLinuxResourcesDevice(allow bool, kind string, major, minor *int64, access string) {
	d.s.Linux.Resources.Devices = append(d.s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Major: major, Minor: minor, Access: access})
}

func (d *document) AddLinuxResourcesHugepageLimit(size string, limit uint64) {
	r := d.s.Linux.Resources
	r.HugepageLimits = append(slices.DeleteFunc(r.HugepageLimits, func(l specs.LinuxHugepageLimit) bool { return l.Pagesize == size }), specs.LinuxHugepageLimit{Pagesize: size, Limit: limit})
}

func (d *document) RemoveDevice(at string) {
	d.s.Linux.Devices = slices.DeleteFunc(d.s.Linux.Devices, func(v specs.LinuxDevice) bool { return v.Path == at })
}

func (d *document) RemoveMount(at string) {
	d.s.Mounts = slices.DeleteFunc(d.s.Mounts, func(m specs.Mount) bool { return path.Clean(m.Destination) == path.Clean(at) })
}

func (d *document) AddOrReplaceLinuxNamespace(kind, at string) error {
	switch specs.LinuxNamespaceType(kind) {
	case specs.PIDNamespace, specs.NetworkNamespace, specs.MountNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.UserNamespace, specs.CgroupNamespace, specs.TimeNamespace:
	default:
		return fmt.Errorf("namespace of kind %.200q: %w", kind, errdefs.ErrInvalidArgument)
	}
	if err := d.RemoveLinuxNamespace(kind); err != nil {
		return err
	}
	d.s.Linux.Namespaces = append(d.s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(kind), Path: at})
	return nil
}

func (d *document) RemoveLinuxNamespace(kind string) error {
	d.s.Linux.Namespaces = slices.DeleteFunc(d.s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return string(n.Type) == kind })
	return nil
}

func (d *document) SetLinuxRootPropagation(p string) error {
	d.s.Linux.RootfsPropagation = p
	return nil
}
