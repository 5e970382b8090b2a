package oci

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// WithBase begins with a specification of the administrator's instead of the
// default one; it must be the first option and is not changed. Its mounts,
// namespaces, limits, hooks, environment, capabilities, device rules, system
// call filter and read-only root stay unless options or image say otherwise.
func WithBase(s *specs.Spec) Option {
	return func(r *request) error {
		data, err := json.Marshal(s)
		if err != nil {
			return fmt.Errorf("base specification: %w", err)
		}
		copied := &specs.Spec{}
		if err := json.Unmarshal(data, copied); err != nil {
			return fmt.Errorf("base specification: %v: %w", err, errdefs.ErrInvalidArgument)
		}
		was := r.spec
		copied.Version = cmp.Or(copied.Version, was.Version)
		if copied.Process == nil {
			copied.Process = &specs.Process{}
		}
		if copied.Linux == nil {
			copied.Linux = &specs.Linux{Namespaces: was.Linux.Namespaces}
		}
		if copied.Linux.Resources == nil {
			copied.Linux.Resources = &specs.LinuxResources{}
		}
		if copied.Root != nil {
			was.Root.Readonly = copied.Root.Readonly
		}
		copied.Root, copied.Linux.CgroupsPath = was.Root, was.Linux.CgroupsPath
		r.spec, r.based = copied, true
		return nil
	}
}

// WithoutMounts leaves out the default mounts at some paths.
func WithoutMounts(paths ...string) Option {
	return func(r *request) error { r.without = append(r.without, paths...); return nil }
}

// WithArgs sets the arguments: they replace the image's command and follow the
// entry point.
func WithArgs(args ...string) Option {
	return func(r *request) error { r.args, r.hasArgs = args, true; return nil }
}

// WithEntrypoint replaces the image's entry point and drops its command. No
// arguments, or one that is empty, mean no entry point.
func WithEntrypoint(args ...string) Option {
	return func(r *request) error {
		if len(args) == 1 && args[0] == "" {
			args = nil
		}
		r.entrypoint, r.hasEntrypoint = args, true
		return nil
	}
}

// WithEnv changes the image's environment as MergeEnv does: "KEY=value" sets,
// "KEY" removes.
func WithEnv(env ...string) Option {
	return func(r *request) error { r.env = append(r.env, env...); return nil }
}

// WithCwd sets the working directory, an absolute path.
func WithCwd(dir string) Option {
	return func(r *request) error {
		if !path.IsAbs(dir) {
			return fmt.Errorf("working directory %q: want an absolute path: %w", shorten(dir), errdefs.ErrInvalidArgument)
		}
		r.cwd = dir
		return nil
	}
}

// WithUser sets the user, in the form of ResolveUser, instead of the image's.
func WithUser(user string) Option {
	return func(r *request) error { r.user, r.hasUser, r.resolved = user, true, nil; return nil }
}

// WithResolvedUser sets ids that somebody else resolved.
func WithResolvedUser(u specs.User) Option {
	return func(r *request) error { r.resolved = &u; return nil }
}

// WithUserDatabase gives the image's passwd and group files, either may be nil.
// They are read once.
func WithUserDatabase(passwd, group io.Reader) Option {
	return func(r *request) error { r.passwd, r.group = passwd, group; return nil }
}

// WithAdditionalGroups adds groups to those of the user; see ResolveGroups.
func WithAdditionalGroups(gids ...uint32) Option {
	return func(r *request) error { r.moreGroups = append(r.moreGroups, gids...); return nil }
}

var hostname = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,62}[a-zA-Z0-9])?$`)

// WithHostname sets the host name, at most 64 bytes.
func WithHostname(name string) Option {
	return func(r *request) error {
		if !hostname.MatchString(name) {
			return fmt.Errorf("host name %q: want at most 64 letters, digits, dots and dashes: %w", shorten(name), errdefs.ErrInvalidArgument)
		}
		r.spec.Hostname = name
		return nil
	}
}

// WithTerminal gives the process a terminal of that size in characters, 0 by 0
// is unset, and TERM=xterm unless the environment has one.
func WithTerminal(width, height uint) Option {
	return func(r *request) error {
		r.terminal = true
		if width > 0 && height > 0 {
			r.spec.Process.ConsoleSize = &specs.Box{Width: width, Height: height}
		}
		return nil
	}
}

// WithMounts adds mounts; one for the target of a default mount replaces it, and
// a folder of the host has no default ones in it.
func WithMounts(mounts ...specs.Mount) Option {
	return func(r *request) error { r.mounts = append(r.mounts, mounts...); return nil }
}

// WithCgroupMount shows the container its cgroups, read-only.
func WithCgroupMount() Option {
	return func(r *request) error { r.cgroupMount = true; return nil }
}

// WithRootfs sets the path of the root file system, by default rootfs in the
// bundle.
func WithRootfs(path string) Option {
	return func(r *request) error { r.spec.Root.Path = path; return nil }
}

// WithReadonlyRoot makes the root file system read-only.
func WithReadonlyRoot() Option {
	return func(r *request) error { r.spec.Root.Readonly = true; return nil }
}

// WithCapabilities adds and drops capabilities: names with or without CAP_, in
// any case, or ALL.
func WithCapabilities(add, drop []string) Option {
	return func(r *request) error {
		r.capAdd, r.capDrop = append(r.capAdd, add...), append(r.capDrop, drop...)
		return nil
	}
}

// WithPrivileged gives all capabilities and host devices and takes the masks,
// the system call filter and no_new_privs away.
func WithPrivileged() Option {
	return func(r *request) error { r.privileged = true; return nil }
}

// WithNewPrivileges lets programs gain rights by set-user-id bits, which is
// off by default.
func WithNewPrivileges() Option {
	return WithSpec(func(s *specs.Spec) error { s.Process.NoNewPrivileges = false; return nil })
}

// WithSeccomp replaces the default system call filter; nil is none.
func WithSeccomp(profile *specs.LinuxSeccomp) Option {
	return func(r *request) error { r.seccomp, r.hasSeccomp = profile, true; return nil }
}

// WithDefaultSeccomp asks for the default filter also where WithBase has another.
func WithDefaultSeccomp() Option {
	return func(r *request) error { r.seccomp, r.hasSeccomp, r.defaultSeccomp = nil, false, true; return nil }
}

// WithAppArmor sets the profile.
func WithAppArmor(profile string) Option {
	return func(r *request) error { r.spec.Process.ApparmorProfile = profile; return nil }
}

// WithSELinux sets the labels of the process and of its mounts.
func WithSELinux(process, mount string) Option {
	return func(r *request) error {
		r.spec.Process.SelinuxLabel, r.spec.Linux.MountLabel = process, mount
		return nil
	}
}

// WithNamespace joins the namespace at path, or makes a new one if it is "".
func WithNamespace(kind specs.LinuxNamespaceType, path string) Option {
	return func(r *request) error {
		ns := specs.LinuxNamespace{Type: kind, Path: path}
		if i := slices.IndexFunc(r.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == kind }); i >= 0 {
			r.spec.Linux.Namespaces[i] = ns
			return nil
		}
		r.spec.Linux.Namespaces = append(r.spec.Linux.Namespaces, ns)
		return nil
	}
}

// WithHostNamespace shares a namespace of the host.
func WithHostNamespace(kind specs.LinuxNamespaceType) Option {
	return func(r *request) error {
		if kind == specs.MountNamespace {
			return fmt.Errorf("a container cannot share the host's mount namespace: %w", errdefs.ErrInvalidArgument)
		}
		r.spec.Linux.Namespaces = slices.DeleteFunc(r.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == kind })
		return nil
	}
}

// WithHostNetwork shares the host's network, with its hosts and resolv.conf
// files mounted read-only.
func WithHostNetwork() Option {
	return func(r *request) error {
		r.hostNetwork = true
		return WithHostNamespace(specs.NetworkNamespace)(r)
	}
}

// WithIDMappings puts the container into a user namespace of its own.
func WithIDMappings(uids, gids []specs.LinuxIDMapping) Option {
	return func(r *request) error {
		if len(uids) == 0 || len(gids) == 0 {
			return fmt.Errorf("a user namespace needs mappings of users and groups: %w", errdefs.ErrInvalidArgument)
		}
		r.spec.Linux.UIDMappings, r.spec.Linux.GIDMappings = slices.Clone(uids), slices.Clone(gids)
		return WithNamespace(specs.UserNamespace, "")(r)
	}
}

// WithCgroupsPath replaces the path /<namespace>/<id>.
func WithCgroupsPath(path string) Option {
	return func(r *request) error { r.spec.Linux.CgroupsPath = path; return nil }
}

const (
	minMemory = 512 << 10 // bytes
	minCPUs   = 0.01
	maxCPUs   = 1 << 20
	cpuPeriod = 100000 // microseconds that a quota refers to
)

// WithMemoryLimit bounds memory in bytes. swap is memory plus swap, -1 is
// unlimited, 0 leaves the kernel's default.
func WithMemoryLimit(limit, swap int64) Option {
	return func(r *request) error {
		if limit < minMemory {
			return fmt.Errorf("memory limit of %d bytes: the least is %d: %w", limit, minMemory, errdefs.ErrInvalidArgument)
		}
		if swap != 0 && swap != -1 && swap < limit {
			return fmt.Errorf("memory and swap limit of %d bytes is less than the memory limit of %d: %w", swap, limit, errdefs.ErrInvalidArgument)
		}
		m := &specs.LinuxMemory{Limit: &limit}
		if swap != 0 {
			m.Swap = &swap
		}
		r.spec.Linux.Resources.Memory = m
		return nil
	}
}

func (r *request) cpu() *specs.LinuxCPU {
	if r.spec.Linux.Resources.CPU == nil {
		r.spec.Linux.Resources.CPU = &specs.LinuxCPU{}
	}
	return r.spec.Linux.Resources.CPU
}

// WithCPUs bounds CPU time to that many CPUs, at least 0.01.
func WithCPUs(n float64) Option {
	return func(r *request) error {
		if math.IsNaN(n) || n < minCPUs || n > maxCPUs {
			return fmt.Errorf("limit of %g CPUs: want at least %g: %w", n, minCPUs, errdefs.ErrInvalidArgument)
		}
		quota, period := int64(math.Round(n*cpuPeriod)), uint64(cpuPeriod)
		c := r.cpu()
		c.Quota, c.Period = &quota, &period
		return nil
	}
}

// WithCPUShares sets the weight, 2 to 262144, 1024 is normal.
func WithCPUShares(n uint64) Option {
	return func(r *request) error {
		if n < 2 || n > 262144 {
			return fmt.Errorf("CPU shares of %d: want 2 to 262144: %w", n, errdefs.ErrInvalidArgument)
		}
		r.cpu().Shares = &n
		return nil
	}
}

var cpuList = regexp.MustCompile(`^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$`)

// WithCPUSet binds the container to CPUs and memory nodes, lists such as 0-2,4;
// "" leaves one alone.
func WithCPUSet(cpus, mems string) Option {
	return func(r *request) error {
		for _, s := range []string{cpus, mems} {
			if s != "" && !cpuList.MatchString(s) {
				return fmt.Errorf("CPU set %q: want a list such as 0-2,4: %w", shorten(s), errdefs.ErrInvalidArgument)
			}
		}
		c := r.cpu()
		c.Cpus, c.Mems = cpus, mems
		return nil
	}
}

// WithPidsLimit bounds the number of processes and threads, -1 is unlimited.
func WithPidsLimit(n int64) Option {
	return func(r *request) error {
		if n == 0 || n < -1 {
			return fmt.Errorf("limit of %d processes: want at least 1, or -1 for none: %w", n, errdefs.ErrInvalidArgument)
		}
		r.spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &n}
		return nil
	}
}

// WithDevice gives a device; see ParseDevice.
func WithDevice(dev specs.LinuxDevice, access string) Option {
	return func(r *request) error {
		if dev.Type == "" || !path.IsAbs(dev.Path) {
			return fmt.Errorf("device %q: want a type and an absolute path: %w", shorten(dev.Path), errdefs.ErrInvalidArgument)
		}
		r.devices = append(r.devices, deviceRequest{dev, access})
		return nil
	}
}

var rlimits = strings.Fields("AS CORE CPU DATA FSIZE LOCKS MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK")

// WithRlimit sets a limit such as RLIMIT_NOFILE; one that is there is replaced.
func WithRlimit(name string, soft, hard uint64) Option {
	return func(r *request) error {
		short := strings.TrimPrefix(strings.ToUpper(name), "RLIMIT_")
		if !slices.Contains(rlimits, short) || soft > hard {
			return fmt.Errorf("resource limit %s=%d:%d: want a known name and soft at most hard: %w", shorten(name), soft, hard, errdefs.ErrInvalidArgument)
		}
		l := specs.POSIXRlimit{Type: "RLIMIT_" + short, Soft: soft, Hard: hard}
		if i := slices.IndexFunc(r.spec.Process.Rlimits, func(h specs.POSIXRlimit) bool { return h.Type == l.Type }); i >= 0 {
			r.spec.Process.Rlimits[i] = l
			return nil
		}
		r.spec.Process.Rlimits = append(r.spec.Process.Rlimits, l)
		return nil
	}
}

var sysctlKey = regexp.MustCompile(`^[a-z0-9_]+([./][a-zA-Z0-9_*-]+)+$`)

// sysctls are those of the IPC and UTS namespaces; all of net have one.
var sysctls = []string{"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni",
	"kernel.shm_rmid_forced", "kernel.domainname"}

// WithSysctl sets a kernel parameter in the container's namespaces. Only those
// that have a namespace are allowed, and a value cannot smuggle in another.
func WithSysctl(key, value string) Option {
	return func(r *request) error {
		k, err := CheckSysctl(key, value)
		if err != nil {
			return err
		}
		if r.spec.Linux.Sysctl == nil {
			r.spec.Linux.Sysctl = map[string]string{}
		}
		r.spec.Linux.Sysctl[k] = value
		return nil
	}
}

// CheckSysctl returns the name of a parameter with dots, or ErrInvalidArgument
// for what WithSysctl does not allow.
func CheckSysctl(key, value string) (string, error) {
	k := strings.ReplaceAll(key, "/", ".")
	own := strings.HasPrefix(k, "net.") || strings.HasPrefix(k, "fs.mqueue.") || slices.Contains(sysctls, k)
	smuggles := strings.ContainsFunc(value, func(c rune) bool { return unicode.IsControl(c) && c != '\t' || c == '+' || c == '=' })
	if !sysctlKey.MatchString(key) || !own || smuggles {
		return "", fmt.Errorf("sysctl %s=%q: want a parameter of a namespace and a plain value: %w", shorten(key), shorten(value), errdefs.ErrInvalidArgument)
	}
	return k, nil
}

// WithOOMScoreAdj sets how soon the kernel kills the process, -1000 to 1000.
func WithOOMScoreAdj(adj int) Option {
	return func(r *request) error {
		if adj < -1000 || adj > 1000 {
			return fmt.Errorf("oom score adjustment %d: want -1000 to 1000: %w", adj, errdefs.ErrInvalidArgument)
		}
		r.spec.Process.OOMScoreAdj = &adj
		return nil
	}
}

// WithAnnotations adds annotations. They come from the request, never from an
// image.
func WithAnnotations(a map[string]string) Option {
	return func(r *request) error {
		for k, v := range a {
			if k == "" {
				return fmt.Errorf("an annotation has no name: %w", errdefs.ErrInvalidArgument)
			}
			if r.spec.Annotations == nil {
				r.spec.Annotations = map[string]string{}
			}
			r.spec.Annotations[k] = v
		}
		return nil
	}
}

// WithSpec changes the finished specification; it runs after all else.
func WithSpec(f func(*specs.Spec) error) Option {
	return func(r *request) error { r.last = append(r.last, f); return nil }
}
