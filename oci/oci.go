// Package oci makes OCI runtime specifications from an image's configuration,
// options and facts about the host. It is pure: it opens no file and asks no
// kernel, so the same input gives the same specification anywhere. What an
// image says is not trusted: it never becomes an annotation, hook, mount,
// device, capability or sysctl, and its user string cannot turn into root.
package oci

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"path"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantryd/gantry/core/ident"
)

// specVersion is the version that specifications claim. All that is used in
// them is in it, and runtimes of the last years accept it.
const specVersion = "1.1.0"

// HostFacts is what has to be known of the host. The zero value is an ordinary
// host of this program's architecture with cgroup version 1.
type HostFacts struct {
	Arch     string // GOARCH, "" is this program's
	Kernel   [2]int // major and minor, zero is "new enough for everything"
	CgroupV2 bool
	// Controllers are the cgroup controllers that can be used, nil is unknown
	// and thus no reason to refuse a limit.
	Controllers []string
	// SystemdCgroup asks for cgroup paths in systemd's form slice:prefix:name.
	SystemdCgroup bool
	// Capabilities are those of the daemon, nil is all.
	Capabilities []string
	// Devices are the host's, for privileged containers and for options that
	// name one.
	Devices   []specs.LinuxDevice
	NoSeccomp bool // kernel or runtime cannot filter system calls
	// UserNS says that the daemon itself runs in a user namespace.
	UserNS bool
	// AppArmor is the loaded default profile, "" is none.
	AppArmor string
	// Hosts and ResolvConf are the host's files for containers in the host's
	// network, "" is none.
	Hosts, ResolvConf string
}

func (f HostFacts) arch() string {
	if f.Arch == "" {
		return runtime.GOARCH
	}
	return f.Arch
}

func (f HostFacts) kernelAtLeast(v [2]int) bool {
	return f.Kernel == [2]int{} || f.Kernel[0] > v[0] || f.Kernel[0] == v[0] && f.Kernel[1] >= v[1]
}

// Option changes what Generate makes. Options may come in any order; of two
// that set the same value the later one wins.
type Option func(*request) error

// request collects the options.
type request struct {
	facts HostFacts
	img   ocispec.ImageConfig
	spec  *specs.Spec

	args, entrypoint       []string
	hasArgs, hasEntrypoint bool
	env                    []string
	cwd                    string
	user                   string
	hasUser                bool
	resolved               *specs.User
	passwd, group          io.Reader
	moreGroups             []uint32
	capAdd, capDrop        []string
	privileged             bool
	mounts                 []specs.Mount
	hostNetwork            bool
	cgroupMount            bool
	devices                []deviceRequest
	seccomp                *specs.LinuxSeccomp
	hasSeccomp             bool
	terminal               bool
	based                  bool // spec began as the administrator's
	without                []string
	defaultSeccomp         bool
	last                   []func(*specs.Spec) error
}

type deviceRequest struct {
	device specs.LinuxDevice
	access string
}

// Generate makes the specification of container id in namespace ns from an
// image's configuration. Errors are ErrInvalidArgument for what cannot be,
// ErrNotFound for a user or group that the image does not have, and
// ErrFailedPrecondition for what this host does not have. Contract 10.4, 10.5,
// 8.3.5.
func Generate(facts HostFacts, id, ns string, img ocispec.ImageConfig, opts ...Option) (*specs.Spec, error) {
	if err := ident.Check("container", id); err != nil {
		return nil, fmt.Errorf("generate specification: %w", err)
	}
	if err := ident.Check("namespace", ns); err != nil {
		return nil, fmt.Errorf("generate specification of %s: %w", id, err)
	}
	r := &request{facts: facts, img: img, spec: base(facts, id, ns)}
	for _, o := range opts {
		if err := o(r); err != nil {
			return nil, fmt.Errorf("generate specification of %s: %w", id, err)
		}
	}
	for _, step := range []func() error{r.process, r.identity, r.security, r.filesystem, r.hostDevices, r.limits} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("generate specification of %s: %w", id, err)
		}
	}
	for _, f := range r.last {
		if err := f(r.spec); err != nil {
			return nil, fmt.Errorf("generate specification of %s: %w", id, err)
		}
	}
	return r.spec, nil
}

// base is what no option and no image has touched yet.
func base(facts HostFacts, id, ns string) *specs.Spec {
	namespaces := []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
		{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace}}
	if facts.CgroupV2 {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	cgroups := "/" + ns + "/" + id
	if facts.SystemdCgroup {
		cgroups = "system.slice:" + ns + ":" + id
	}
	return &specs.Spec{
		Version: specVersion,
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Cwd:             "/",
			NoNewPrivileges: true,
			Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1024, Soft: 1024}},
		},
		Linux: &specs.Linux{
			CgroupsPath: cgroups,
			Namespaces:  namespaces,
			MaskedPaths: []string{"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
				"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
			Resources:     &specs.LinuxResources{},
		},
	}
}

// process decides on arguments, environment and working directory.
func (r *request) process() error {
	p := r.spec.Process
	entry, cmd := r.img.Entrypoint, r.img.Cmd
	if len(entry) == 1 && entry[0] == "" {
		entry = nil // how a Dockerfile takes that of its base away
	}
	if r.hasEntrypoint {
		entry, cmd = r.entrypoint, nil // the image's arguments belong to its own entry point
	}
	if r.hasArgs {
		cmd = r.args
	}
	p.Args = slices.Concat(entry, cmd)
	if len(p.Args) == 0 {
		return fmt.Errorf("neither the image nor the request says what to run: %w", errdefs.ErrInvalidArgument)
	}
	if p.Args[0] == "" {
		return fmt.Errorf("the command is an empty string: %w", errdefs.ErrInvalidArgument)
	}
	for _, a := range p.Args {
		if strings.ContainsRune(a, 0) {
			return fmt.Errorf("argument %q holds NUL: %w", shorten(a), errdefs.ErrInvalidArgument)
		}
	}
	env := MergeEnv([]string{defaultPath}, withValue(p.Env))
	if r.terminal {
		env = append(env, "TERM=xterm")
	}
	p.Env = MergeEnv(MergeEnv(env, withValue(r.img.Env)), r.env)
	if err := checkEnv(p.Env); err != nil {
		return err
	}
	cwd := cmp.Or(r.cwd, r.img.WorkingDir, p.Cwd)
	p.Cwd = path.Join("/", cwd)
	if strings.ContainsFunc(cwd, unicode.IsControl) || leakedDir.MatchString(p.Cwd) {
		return fmt.Errorf("working directory %q is not allowed: %w", shorten(cwd), errdefs.ErrInvalidArgument)
	}
	p.Terminal = r.terminal
	return nil
}

// leakedDir matches folders of open files: a working directory there could be
// one of the host's (CVE-2024-21626).
var leakedDir = regexp.MustCompile(`^/(proc/[^/]+(/task/[^/]+)?/(fd|cwd|root|fdinfo|map_files)|dev/fd)(/|$)`)

// withValue leaves out what has no value: an image has nothing to remove.
func withValue(env []string) []string {
	var out []string
	for _, kv := range env {
		if strings.Contains(kv, "=") {
			out = append(out, kv)
		}
	}
	return out
}

// identity decides on user and groups.
func (r *request) identity() error {
	if r.resolved != nil {
		r.spec.Process.User = *r.resolved
	} else {
		name := r.img.User
		if r.hasUser {
			name = r.user
		}
		u, err := ResolveUser(r.passwd, r.group, name)
		if err != nil {
			return err
		}
		r.spec.Process.User = u
	}
	// The primary group is always among the additional ones: without it a
	// process could drop the group that a file denies rights to.
	gids := slices.Clone(r.spec.Process.User.AdditionalGids)
	for _, g := range append([]uint32{r.spec.Process.User.GID}, r.moreGroups...) {
		if !slices.Contains(gids, g) {
			gids = append(gids, g)
		}
	}
	r.spec.Process.User.AdditionalGids = gids
	return nil
}

// security decides on capabilities, the system call filter and labels.
func (r *request) security() error {
	from := defaultCapabilities
	if own := r.spec.Process.Capabilities; r.based && own != nil {
		from = own.Bounding
	}
	if r.privileged {
		from = capabilities
	}
	caps, err := selectCapabilities(from, r.capAdd, r.capDrop, r.facts.Capabilities)
	if err != nil {
		return err
	}
	// Inheritable and ambient stay empty: a program without file
	// capabilities that is not root's gets none.
	r.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: slices.Clone(caps), Permitted: slices.Clone(caps)}
	l := r.spec.Linux
	if r.privileged {
		l.MaskedPaths, l.ReadonlyPaths = nil, nil
		r.spec.Process.NoNewPrivileges = false
	}
	switch {
	case r.hasSeccomp:
		l.Seccomp = r.seccomp
	case !r.privileged && (!r.based || r.defaultSeccomp):
		l.Seccomp = DefaultSeccomp(r.facts, caps)
	}
	if r.spec.Process.ApparmorProfile == "" && !r.privileged {
		r.spec.Process.ApparmorProfile = r.facts.AppArmor
	}
	return nil
}

// filesystem decides on mounts.
func (r *request) filesystem() error {
	mounts := defaultMounts(r.facts)
	if r.based {
		mounts = slices.Clone(r.spec.Mounts)
	}
	mounts = slices.DeleteFunc(mounts, func(m specs.Mount) bool { return slices.Contains(r.without, path.Clean(m.Destination)) })
	if (r.cgroupMount || r.privileged) && !slices.ContainsFunc(mounts, func(m specs.Mount) bool { return m.Type == "cgroup" }) {
		mounts = append(mounts, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup",
			Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}})
	}
	for i, m := range mounts {
		if m.Type != "sysfs" && m.Type != "cgroup" {
			continue
		}
		if m.Type == "sysfs" && r.hostNetwork && r.facts.UserNS {
			// That of a network which the user namespace does not own cannot be
			// mounted anew.
			mounts[i].Type, mounts[i].Source = "bind", "/sys"
			mounts[i].Options = append([]string{"rbind"}, m.Options...)
		}
		if j := slices.Index(mounts[i].Options, "ro"); r.privileged && j >= 0 {
			mounts[i].Options = slices.Clone(mounts[i].Options)
			mounts[i].Options[j] = "rw"
		}
	}
	user := slices.Clone(r.mounts)
	if r.hostNetwork {
		for _, f := range [][2]string{{"/etc/hosts", r.facts.Hosts}, {"/etc/resolv.conf", r.facts.ResolvConf}} {
			own := slices.ContainsFunc(user, func(m specs.Mount) bool { return path.Clean(m.Destination) == f[0] })
			if f[1] != "" && !own {
				user = append(user, specs.Mount{Destination: f[0], Type: "bind", Source: f[1], Options: []string{"rbind", "ro"}})
			}
		}
	}
	var err error
	r.spec.Mounts, err = placeMounts(mounts, user)
	return err
}

// defaultDevices are the character devices that every container has: null,
// random, full, tty, zero, urandom, console, the terminals of its own devpts
// and ptmx. A minor of -1 is any.
var defaultDevices = [][2]int64{{1, 3}, {1, 8}, {1, 7}, {5, 0}, {1, 5}, {1, 9}, {5, 1}, {136, -1}, {5, 2}}

// hostDevices decides on device nodes and the rules about them.
func (r *request) hostDevices() error {
	l := r.spec.Linux
	switch {
	case r.based && len(l.Resources.Devices) > 0 && !r.privileged:
	case r.facts.UserNS:
		// Nodes cannot be made and rules not set; the runtime binds the host's.
	case r.privileged:
		l.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	default:
		l.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
		for _, d := range defaultDevices {
			rule := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &d[0], Access: "rwm"}
			if d[1] >= 0 {
				rule.Minor = &d[1]
			}
			l.Resources.Devices = append(l.Resources.Devices, rule)
		}
	}
	if r.privileged {
		l.Devices = slices.Clone(r.facts.Devices)
	}
	for _, d := range r.devices {
		if i := slices.IndexFunc(l.Devices, func(h specs.LinuxDevice) bool { return h.Path == d.device.Path }); i >= 0 {
			l.Devices[i] = d.device
		} else {
			l.Devices = append(l.Devices, d.device)
		}
		if !r.facts.UserNS && !r.privileged {
			l.Resources.Devices = append(l.Resources.Devices,
				specs.LinuxDeviceCgroup{Allow: true, Type: d.device.Type, Major: &d.device.Major, Minor: &d.device.Minor, Access: d.access})
		}
	}
	return nil
}

// limits checks that what is asked for can be enforced.
func (r *request) limits() error {
	if r.facts.Controllers == nil {
		return nil
	}
	res := r.spec.Linux.Resources
	cpu := res.CPU
	if cpu == nil {
		cpu = &specs.LinuxCPU{}
	}
	for _, c := range []struct {
		name string
		used bool
	}{
		{"memory", res.Memory != nil},
		{"pids", res.Pids != nil},
		{"cpu", cpu.Quota != nil || cpu.Shares != nil},
		{"cpuset", cpu.Cpus != "" || cpu.Mems != ""},
	} {
		if c.used && !slices.Contains(r.facts.Controllers, c.name) {
			return fmt.Errorf("limit of %s: this host has no %s cgroup controller: %w", c.name, c.name, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// reservedLabels are prefixes of labels that steer a daemon or a client; an
// image has no say in them (contract 1.5.22, CVE-2026-53488).
var reservedLabels = []string{"containerd.io/", "io.containerd.", "io.cri-containerd", "nerdctl/", "io.gantry", "gantry.io/", "buildkit.",
	"com.docker/", "io.kubernetes."}

// StopSignalLabel keeps the image's stop signal with the container (contract
// 1.5.19).
const StopSignalLabel = "io.containerd.image.config.stop-signal"

var signalName = regexp.MustCompile(`^(SIG)?[A-Z][A-Z0-9+-]{1,15}$|^[0-9]{1,2}$`)

// ContainerLabels are the labels that a container gets from its image: those
// of the image without reserved prefixes, and its stop signal, SIGTERM if it
// names none or nonsense. Labels in own win over the image's and may be any.
// Image labels that are too long for a container are left out.
func ContainerLabels(img ocispec.ImageConfig, own map[string]string) map[string]string {
	labels := map[string]string{}
	for k, v := range img.Labels {
		reserved := slices.ContainsFunc(reservedLabels, func(p string) bool { return strings.HasPrefix(strings.ToLower(k), p) })
		if !reserved && k != "" && len(k)+len(v) <= ident.MaxLabel {
			labels[k] = v
		}
	}
	labels[StopSignalLabel] = "SIGTERM"
	if s := strings.ToUpper(img.StopSignal); signalName.MatchString(s) {
		labels[StopSignalLabel] = s
	}
	maps.Copy(labels, own)
	return labels
}

// ImageVolumes are the folders that the image wants volumes for: absolute,
// clean, inside the container, sorted, without the root and the kernel's file
// systems.
func ImageVolumes(img ocispec.ImageConfig) []string {
	var out []string
	for v := range img.Volumes {
		p := path.Join("/", v)
		kernel := slices.ContainsFunc([]string{"/proc", "/sys", "/dev"}, func(d string) bool { return p == d || strings.HasPrefix(p, d+"/") })
		if p != "/" && !kernel && !strings.ContainsFunc(p, unicode.IsControl) && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	slices.Sort(out)
	return out
}

// ParseDevice reads HOST[:CONTAINER[:ACCESS]], where access is of the letters
// r, w and m and rwm by default, and finds the device among the host's.
// ErrNotFound if the host does not have it, else ErrInvalidArgument.
func ParseDevice(facts HostFacts, s string) (dev specs.LinuxDevice, access string, err error) {
	bad := func(format string, args ...any) (specs.LinuxDevice, string, error) {
		return specs.LinuxDevice{}, "", fmt.Errorf("parse device %q: %w", shorten(s), fmt.Errorf(format, args...))
	}
	parts := strings.Split(s, ":")
	access = "rwm"
	if len(parts) > 3 {
		return bad("want HOST[:CONTAINER[:ACCESS]]: %w", errdefs.ErrInvalidArgument)
	}
	if len(parts) == 3 {
		access = parts[2]
	}
	for i, c := range access {
		if !strings.ContainsRune("rwm", c) || strings.ContainsRune(access[:i], c) {
			return bad("access %q: want letters of rwm: %w", access, errdefs.ErrInvalidArgument)
		}
	}
	if access == "" {
		return bad("access is empty: %w", errdefs.ErrInvalidArgument)
	}
	host := path.Clean(parts[0])
	i := slices.IndexFunc(facts.Devices, func(d specs.LinuxDevice) bool { return d.Path == host })
	if i < 0 {
		return bad("the host has no device %s: %w", host, errdefs.ErrNotFound)
	}
	dev = facts.Devices[i]
	if len(parts) > 1 {
		if !path.IsAbs(parts[1]) {
			return bad("container path %q is not absolute: %w", parts[1], errdefs.ErrInvalidArgument)
		}
		dev.Path = path.Clean(parts[1])
	}
	return dev, access, nil
}

// ParseCPUs reads a number of CPUs such as 1.5.
func ParseCPUs(s string) (float64, error) {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || strings.Trim(s, "0123456789.") != "" || f < minCPUs || f > maxCPUs {
		return 0, fmt.Errorf("cpus %q: want a number of at least %g: %w", shorten(s), minCPUs, errdefs.ErrInvalidArgument)
	}
	return f, nil
}
