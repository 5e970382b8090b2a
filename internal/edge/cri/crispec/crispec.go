// Package crispec makes the OCI runtime specifications of pods' sandboxes and
// of containers from what the CRI is asked for, what is configured, and facts
// of the host. It touches neither disk nor kernel (but for Labels, which asks
// SELinux): the same input makes the same specification anywhere.
//
// What an image says is not trusted: it sets arguments, environment, working
// directory and, where the request names none, the user; never an annotation,
// hook, mount, device, sysctl or capability. What cannot be honoured is an
// error, or a warning where the contract wants it to be ignored.
package crispec

import (
	"cmp"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/oci"
)

// Host is what has to be known of the host, of the daemon's place on it, and
// of the runtime handler.
type Host struct {
	// HostFacts: its Devices are those of privileged containers, its AppArmor
	// is the default profile that is loaded, "" if the host has no AppArmor or
	// it is disabled; Hosts and ResolvConf are not used.
	oci.HostFacts
	// AllDevices is asked for Devices when a privileged container needs them:
	// some hosts have thousands. nil if Devices has them.
	AllDevices func() ([]specs.LinuxDevice, error)
	// AppArmorMissing is why the default profile could not be loaded: who needs
	// it is refused.
	AppArmorMissing error
	// Hostname is the host's.
	Hostname string
	// AppArmorLoaded tells whether a profile is loaded; nil knows of none to miss.
	AppArmorLoaded func(profile string) bool
	// SELinux says that labels are used.
	SELinux bool
	// Swap and HugeTLB say that cgroups can limit swap and huge pages.
	Swap, HugeTLB bool
	// OOMScoreAdj is the daemon's own; below it no process of its can be put
	// unless OOMScoreLowerable.
	OOMScoreAdj       int
	OOMScoreLowerable bool
	// RecursiveReadOnly, IDMapMounts and UserNamespaces are possible for kernel
	// and runtime handler together.
	RecursiveReadOnly, IDMapMounts, UserNamespaces bool
	// BlockIO are the parameters of a class, nil if classes are not set up.
	BlockIO func(class string) (*specs.LinuxBlockIO, error)
	// RDT says that classes of cache and memory bandwidth are set up.
	RDT bool
}

// SandboxInput is what the specification of a pod's pause container is made of.
type SandboxInput struct {
	ID            string
	Config        *runtime.PodSandboxConfig
	Runtime       cristate.Runtime
	RuntimeConfig cristate.RuntimeConfig
	Host          Host
	Image         ocispec.ImageConfig
	ImageName     string
	// User is resolved by ResolveUser.
	User specs.User
	// NetNSPath is joined, "" makes one; it means nothing in the host's network.
	NetNSPath string
	// UserNSPath is that which owns the network namespace, "" makes one if the
	// pod asks for it.
	UserNSPath               string
	ProcessLabel, MountLabel string
	// Seccomp is the parsed profile if the configuration names one of the host's.
	Seccomp *specs.LinuxSeccomp
	// Dir holds the pod's hosts, hostname and resolv.conf; Shm is what is mounted
	// at /dev/shm, "" is shm in Dir.
	Dir, Shm string
	// Log gets warnings of what is ignored; nil is nobody.
	Log *slog.Logger
}

// Device is a device of the host at its path in the container, and how it may
// be used: letters of rwm.
type Device struct {
	specs.LinuxDevice
	Access string
}

// Mount is a mount of the request with its source made and found.
type Mount struct {
	*runtime.Mount
	// Source is the path on the host without links; of an image volume, where
	// the image is mounted. "" is HostPath.
	Source string
}

// ContainerInput is what the specification of a container is made of.
type ContainerInput struct {
	ID     string
	Config *runtime.ContainerConfig
	PodID  string
	Pod    *runtime.PodSandboxConfig
	// Namespaces are those of the pod that there are: cristate.PodStatus.Namespaces.
	Namespaces map[string]string
	// TargetPid is the process whose PID namespace is joined in mode TARGET.
	TargetPid     uint32
	Image         ocispec.ImageConfig
	ImageName     string
	User          specs.User // resolved by ResolveUser
	Runtime       cristate.Runtime
	RuntimeConfig cristate.RuntimeConfig
	Host          Host
	// Base is the runtime's base_runtime_spec, nil if it has none. It is not changed.
	Base *specs.Spec
	// Mounts are those of the request; Volumes those of the image, which give
	// way to them.
	Mounts, Volumes []Mount
	// PodDir holds the pod's hosts, hostname and resolv.conf; PodShm is what is
	// mounted at /dev/shm, "" is shm in PodDir.
	PodDir, PodShm           string
	ProcessLabel, MountLabel string
	Devices                  []Device
	// Seccomp is the parsed profile if the configuration names one of the host's;
	// see SeccompRef.
	Seccomp *specs.LinuxSeccomp
	// CDI changes the specification for devices named vendor/class=name.
	CDI func(s *specs.Spec, devices []string) error
	// Log gets warnings of what is ignored; nil is nobody.
	Log *slog.Logger
}

// defaultSandboxOOM lets the pause process outlive what runs in its pod.
const defaultSandboxOOM = -998

// pauseShares is the CPU weight of a process that sleeps.
const pauseShares = 2

func nop() *slog.Logger { return slog.New(slog.DiscardHandler) }

// Sandbox makes the specification of a pod's pause container, which knows no
// base_runtime_spec: that is for containers. ErrInvalidArgument for what cannot
// be, ErrFailedPrecondition for what this host does not have. Contract 7.3.2,
// 7.3.3, 7.3.18, 7.3.28.
func Sandbox(in SandboxInput) (*specs.Spec, error) {
	in.Log = cmp.Or(in.Log, nop())
	linux := in.Config.GetLinux()
	sc := linux.GetSecurityContext()
	ns, err := namespacesOf(sc.GetNamespaceOptions(), in.Host)
	if err != nil {
		return nil, fmt.Errorf("specification of pod sandbox %s: %w", in.ID, err)
	}
	opts := base(nil)
	add := func(o ...oci.Option) { opts = append(opts, o...) }
	add(oci.WithReadonlyRoot(), oci.WithResolvedUser(in.User), oci.WithSELinux(in.ProcessLabel, in.MountLabel))
	if sc.GetPrivileged() {
		if sc.GetSelinuxOptions() == nil {
			add(oci.WithSELinux("", in.MountLabel))
		}
		add(oci.WithSpec(func(s *specs.Spec) error { // a virtual machine may have no other
			writable(s, func(kind string) bool { return kind == "sysfs" })
			return nil
		}))
	}
	if ns.network == runtime.NamespaceMode_NODE {
		add(oci.WithHostNamespace(specs.NetworkNamespace), oci.WithHostNamespace(specs.UTSNamespace))
	} else {
		add(oci.WithNamespace(specs.NetworkNamespace, in.NetNSPath))
		if in.Config.GetHostname() != "" {
			add(oci.WithHostname(in.Config.GetHostname()))
		}
	}
	if ns.pid == runtime.NamespaceMode_NODE {
		add(oci.WithHostNamespace(specs.PIDNamespace))
	}
	shm := cmp.Or(in.Shm, path.Join(in.Dir, "shm"))
	if ns.ipc == runtime.NamespaceMode_NODE {
		add(oci.WithHostNamespace(specs.IPCNamespace))
		shm = devShm
	}
	if ns.user {
		add(oci.WithIDMappings(ns.uids, ns.gids), oci.WithNamespace(specs.UserNamespace, in.UserNSPath))
	}
	opts = append(opts, ns.mounts(in.Host)...)
	flags := []string{"rbind", "ro", "nosuid", "nodev", "noexec"} // in a user namespace none of them may be taken away
	add(oci.WithoutMounts(devShm), oci.WithMounts(
		specs.Mount{Destination: devShm, Type: "bind", Source: shm, Options: flags},
		specs.Mount{Destination: resolvConf, Type: "bind", Source: path.Join(in.Dir, "resolv.conf"), Options: flags})) // kata reads it
	sysctls, err := Sysctls(in.Config, in.RuntimeConfig, in.Host)
	if err != nil {
		return nil, fmt.Errorf("specification of pod sandbox %s: %w", in.ID, err)
	}
	for k, v := range sysctls {
		add(oci.WithSysctl(k, v))
	}
	cgroup, err := cgroupPath(linux.GetCgroupParent(), in.ID, in.Runtime, in.Host)
	if err != nil {
		return nil, fmt.Errorf("specification of pod sandbox %s: %w", in.ID, err)
	}
	seccomp, err := seccompOf(profiles{sc.GetSeccomp(), sc.GetSeccompProfilePath(), sc.GetPrivileged(), false}, in.RuntimeConfig, in.Host, in.Seccomp)
	if err != nil {
		return nil, fmt.Errorf("specification of pod sandbox %s: %w", in.ID, err)
	}
	// A pause process without a profile runs unconfined, as it always has.
	if sc.GetApparmor() != nil {
		profile, err := appArmorOf(profiles{sc.GetApparmor(), "", sc.GetPrivileged(), false}, in.Host)
		if err != nil {
			return nil, fmt.Errorf("specification of pod sandbox %s: %w", in.ID, err)
		}
		add(oci.WithAppArmor(profile))
	}
	add(seccomp...)
	if in.Host.Controllers == nil || slices.Contains(in.Host.Controllers, "cpu") {
		add(oci.WithCPUShares(pauseShares))
	}
	add(oci.WithCgroupsPath(cgroup), oci.WithOOMScoreAdj(clampOOM(defaultSandboxOOM, in.RuntimeConfig, in.Host)),
		oci.WithAnnotations(sandboxAnnotations(in)))
	return generate(in.Host, in.ID, in.Image, opts)
}

// Container makes the specification of a container. ErrInvalidArgument for what
// cannot be, ErrFailedPrecondition for what this host, its configuration or the
// pod does not have. Contract 7.3.2 to 7.3.15, 7.3.28.
func Container(in ContainerInput) (*specs.Spec, error) {
	in.Log = cmp.Or(in.Log, nop()).With("container", in.ID)
	s, err := in.spec()
	if err != nil {
		return nil, fmt.Errorf("specification of container %s: %w", in.ID, err)
	}
	return s, nil
}

func (in ContainerInput) spec() (*specs.Spec, error) {
	config, sc := in.Config, in.Config.GetLinux().GetSecurityContext()
	podSC := in.Pod.GetLinux().GetSecurityContext()
	privileged := sc.GetPrivileged()
	if privileged && !podSC.GetPrivileged() {
		return nil, fmt.Errorf("a privileged container needs a privileged pod: %w", errdefs.ErrInvalidArgument)
	}
	img := in.Image
	img.Env = append([]string{"HOSTNAME=" + cmp.Or(in.Pod.GetHostname(), in.Host.Hostname)}, img.Env...)
	opts := base(in.Base)
	add := func(o ...oci.Option) { opts = append(opts, o...) }
	add(in.process()...)
	ns, err := in.namespaces()
	if err != nil {
		return nil, err
	}
	security, err := in.security()
	if err != nil {
		return nil, err
	}
	opts = append(opts, security...)
	mounts, err := in.mounts()
	if err != nil {
		return nil, err
	}
	opts = append(opts, mounts...)
	opts = append(opts, ns...) // after the mounts, which they change
	devices, err := in.devices()
	if err != nil {
		return nil, err
	}
	opts = append(opts, devices...)
	cgroup, err := cgroupPath(in.Pod.GetLinux().GetCgroupParent(), in.ID, in.Runtime, in.Host)
	if err != nil {
		return nil, err
	}
	limits, err := in.limits()
	if err != nil {
		return nil, err
	}
	add(oci.WithCgroupsPath(cgroup), limits, oci.WithAnnotations(containerAnnotations(in)))
	if res := config.GetLinux().GetResources(); res != nil {
		adj := OOMScore(res.GetOomScoreAdj(), in.RuntimeConfig, in.Host)
		if asked := res.GetOomScoreAdj(); asked >= -1000 && asked < int64(adj) {
			in.Log.Warn("OOM score adjustment is below the daemon's own, which cannot be lowered", "asked", asked, "used", adj)
		}
		add(oci.WithOOMScoreAdj(adj))
	}
	cdi, err := in.cdi()
	if err != nil {
		return nil, err
	}
	opts = append(opts, cdi...) // last: it changes what is finished
	return generate(in.Host, in.ID, img, opts)
}

// base begins with the administrator's specification, if there is one.
func base(s *specs.Spec) []oci.Option {
	if s == nil {
		// Without one, limits of resources are those of the daemon, and /run is
		// the image's.
		return []oci.Option{oci.WithoutMounts("/run"), oci.WithSpec(func(s *specs.Spec) error { s.Process.Rlimits = nil; return nil })}
	}
	return []oci.Option{oci.WithBase(s), oci.WithoutMounts("/run")}
}

func generate(h Host, id string, img ocispec.ImageConfig, opts []oci.Option) (*specs.Spec, error) {
	facts := h.HostFacts
	facts.AppArmor, facts.Hosts, facts.ResolvConf, facts.Devices = "", "", "", nil // decided here
	return oci.Generate(facts, id, string(cristate.Namespace), img, opts...)
}

// process is what is run, where, and as whom (contract 7.3.9).
func (in ContainerInput) process() []oci.Option {
	c := in.Config
	opts := []oci.Option{oci.WithResolvedUser(in.User)}
	if len(c.GetCommand()) > 0 {
		opts = append(opts, oci.WithEntrypoint(c.GetCommand()...))
	}
	if len(c.GetArgs()) > 0 {
		opts = append(opts, oci.WithArgs(c.GetArgs()...))
	}
	if c.GetWorkingDir() != "" {
		opts = append(opts, oci.WithCwd(c.GetWorkingDir()))
	}
	if c.GetTty() {
		opts = append(opts, oci.WithTerminal(0, 0))
	}
	for _, e := range c.GetEnvs() {
		opts = append(opts, oci.WithEnv(e.GetKey()+"="+string(e.GetValue())))
	}
	return opts
}

// devices are those of the request and, for privileged containers, the host's
// (contract 7.3.12).
func (in ContainerInput) devices() ([]oci.Option, error) {
	sc := in.Config.GetLinux().GetSecurityContext()
	var opts []oci.Option
	for _, d := range in.Devices {
		if strings.Trim(d.Access, "rwm") != "" || len(d.Access) > 3 {
			return nil, fmt.Errorf("device %q: access %q: want letters of rwm: %w", short(d.Path), short(d.Access), errdefs.ErrInvalidArgument)
		}
		if in.RuntimeConfig.DeviceOwnershipFromSecurityContext {
			own := func(v *runtime.Int64Value, into **uint32) {
				if v.GetValue() > 0 {
					id := uint32(v.GetValue()) // ResolveUser has checked it
					*into = &id
				}
			}
			own(sc.GetRunAsUser(), &d.UID)
			own(sc.GetRunAsGroup(), &d.GID)
		}
		opts = append(opts, oci.WithDevice(d.LinuxDevice, cmp.Or(d.Access, "rwm")))
	}
	if !sc.GetPrivileged() {
		return opts, nil
	}
	hosts := !in.Runtime.PrivilegedWithoutHostDevices
	if hosts && in.Host.AllDevices != nil {
		var err error
		if in.Host.Devices, err = in.Host.AllDevices(); err != nil {
			return nil, fmt.Errorf("devices of the host: %w", err)
		}
	}
	return append(opts, oci.WithSpec(func(s *specs.Spec) error {
		if hosts {
			for _, d := range in.Host.Devices {
				if !slices.ContainsFunc(s.Linux.Devices, func(o specs.LinuxDevice) bool { return o.Path == d.Path }) {
					s.Linux.Devices = append(s.Linux.Devices, d)
				}
			}
		}
		if (hosts || in.Runtime.PrivilegedWithoutHostDevicesAllDevicesAllowed) && !in.Host.UserNS {
			s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		}
		return nil
	})), nil
}
