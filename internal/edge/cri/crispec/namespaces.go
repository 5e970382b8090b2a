package crispec

import (
	"fmt"
	"math"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/oci"
)

// namespaces are checked options.
type namespaces struct {
	network, pid, ipc runtime.NamespaceMode
	user              bool
	uids, gids        []specs.LinuxIDMapping
}

// namespacesOf checks options (contract 7.3.2, 7.3.3).
func namespacesOf(o *runtime.NamespaceOption, h Host) (namespaces, error) {
	ns := namespaces{network: o.GetNetwork(), pid: o.GetPid(), ipc: o.GetIpc()}
	for _, n := range []struct {
		name string
		mode runtime.NamespaceMode
		most runtime.NamespaceMode
	}{{"network", ns.network, runtime.NamespaceMode_NODE}, {"ipc", ns.ipc, runtime.NamespaceMode_NODE}, {"pid", ns.pid, runtime.NamespaceMode_TARGET}} {
		if n.mode < 0 || n.mode > n.most {
			return ns, fmt.Errorf("%s namespace of mode %s: %w", n.name, n.mode, errdefs.ErrInvalidArgument)
		}
	}
	var err error
	ns.uids, ns.gids, err = UserNamespace(o)
	ns.user = ns.uids != nil
	if err == nil && ns.user && !h.UserNamespaces {
		err = fmt.Errorf("user namespace: kernel or runtime handler cannot give one to a pod: %w", errdefs.ErrFailedPrecondition)
	}
	return ns, err
}

// UserNamespace are the mappings of the user namespace that is asked for, nil
// if there is none. ErrInvalidArgument unless mode POD comes with exactly one
// mapping of users and one of groups, and mode NODE with none.
func UserNamespace(o *runtime.NamespaceOption) (uids, gids []specs.LinuxIDMapping, err error) {
	u := o.GetUsernsOptions()
	if u == nil {
		return nil, nil, nil
	}
	switch u.GetMode() {
	case runtime.NamespaceMode_NODE:
		if len(u.GetUids())+len(u.GetGids()) > 0 {
			return nil, nil, fmt.Errorf("user namespace of mode NODE with mappings: %w", errdefs.ErrInvalidArgument)
		}
		return nil, nil, nil
	case runtime.NamespaceMode_POD:
	default:
		return nil, nil, fmt.Errorf("user namespace of mode %s: %w", u.GetMode(), errdefs.ErrInvalidArgument)
	}
	if len(u.GetUids()) != 1 || len(u.GetGids()) != 1 {
		return nil, nil, fmt.Errorf("user namespace with %d mappings of users and %d of groups: want one of each: %w",
			len(u.GetUids()), len(u.GetGids()), errdefs.ErrInvalidArgument)
	}
	if uids, err = mappings(u.GetUids()); err == nil {
		gids, err = mappings(u.GetGids())
	}
	return uids, gids, err
}

func mappings(in []*runtime.IDMapping) ([]specs.LinuxIDMapping, error) {
	var out []specs.LinuxIDMapping
	for _, m := range in {
		l := m.GetLength()
		if l == 0 || m.GetHostId() > math.MaxUint32-l || m.GetContainerId() > math.MaxUint32-l {
			return nil, fmt.Errorf("id mapping of %d to %d, length %d: %w", m.GetContainerId(), m.GetHostId(), l, errdefs.ErrInvalidArgument)
		}
		out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: l})
	}
	return out, nil
}

// mounts adapts the kernel's file systems to the namespaces.
func (ns namespaces) mounts(h Host) []oci.Option {
	if !ns.user {
		return nil
	}
	const tty = 5
	g := ns.gids[0]
	mapped := g.ContainerID <= tty && tty < g.ContainerID+g.Size
	return []oci.Option{oci.WithSpec(func(s *specs.Spec) error {
		for i := range s.Mounts {
			switch m := &s.Mounts[i]; {
			case m.Type == "devpts" && !mapped:
				m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "gid=5" })
			case m.Type == "sysfs" && ns.network == runtime.NamespaceMode_NODE:
				// The sysfs of a network that the user namespace does not own
				// cannot be mounted anew. With it come the file systems below it,
				// which a plain ro leaves writable.
				m.Type, m.Source, m.Options = "bind", "/sys", append([]string{"rbind"}, m.Options...)
				if i := slices.Index(m.Options, "ro"); i >= 0 && h.RecursiveReadOnly {
					m.Options[i] = "rro"
				}
			}
		}
		return nil
	})}
}

// namespaces of a container: what the pod has is joined, what it does not have
// is the host's.
func (in ContainerInput) namespaces() ([]oci.Option, error) {
	sc := in.Config.GetLinux().GetSecurityContext()
	own := sc.GetNamespaceOptions()
	ns, err := namespacesOf(own, in.Host)
	if err != nil {
		return nil, err
	}
	pod, err := namespacesOf(in.Pod.GetLinux().GetSecurityContext().GetNamespaceOptions(), in.Host)
	if err != nil {
		return nil, err
	}
	if own.GetUsernsOptions() != nil && (!slices.Equal(ns.uids, pod.uids) || !slices.Equal(ns.gids, pod.gids)) {
		return nil, fmt.Errorf("the user namespace differs from the pod's: %w", errdefs.ErrInvalidArgument)
	}
	var opts []oci.Option
	join := func(kind specs.LinuxNamespaceType, name string) {
		if p := in.Namespaces[name]; p != "" {
			opts = append(opts, oci.WithNamespace(kind, p))
		} else {
			opts = append(opts, oci.WithHostNamespace(kind))
		}
	}
	need := func(asked runtime.NamespaceMode, name string) error {
		if asked != runtime.NamespaceMode_NODE && in.Namespaces[name] == "" {
			return fmt.Errorf("pod %s has no %s namespace to join: %w", in.PodID, name, errdefs.ErrFailedPrecondition)
		}
		return nil
	}
	// It is the pod's options that decide on these two: all of its containers share them.
	for _, n := range []struct {
		kind specs.LinuxNamespaceType
		name string
		mode runtime.NamespaceMode
	}{{specs.NetworkNamespace, "network", pod.network}, {specs.IPCNamespace, "ipc", pod.ipc}} {
		if err := need(n.mode, n.name); err != nil {
			return nil, err
		}
		join(n.kind, n.name)
	}
	join(specs.UTSNamespace, "uts")
	switch ns.pid {
	case runtime.NamespaceMode_CONTAINER:
		opts = append(opts, oci.WithNamespace(specs.PIDNamespace, ""))
	case runtime.NamespaceMode_NODE:
		if pod.pid != runtime.NamespaceMode_NODE {
			return nil, fmt.Errorf("the host's process namespace in a pod that does not have it: %w", errdefs.ErrInvalidArgument)
		}
		opts = append(opts, oci.WithHostNamespace(specs.PIDNamespace))
	case runtime.NamespaceMode_TARGET:
		if in.TargetPid == 0 {
			return nil, fmt.Errorf("target container %q has no process: %w", short(own.GetTargetId()), errdefs.ErrFailedPrecondition)
		}
		opts = append(opts, oci.WithNamespace(specs.PIDNamespace, fmt.Sprintf("/proc/%d/ns/pid", in.TargetPid)))
	default:
		if err := need(pod.pid, "pid"); err != nil {
			return nil, err
		}
		join(specs.PIDNamespace, "pid")
	}
	if pod.user {
		if err := need(runtime.NamespaceMode_POD, "user"); err != nil {
			return nil, err
		}
		opts = append(opts, oci.WithIDMappings(pod.uids, pod.gids), oci.WithNamespace(specs.UserNamespace, in.Namespaces["user"]))
	}
	if sc.GetPrivileged() || !in.Host.CgroupV2 {
		opts = append(opts, oci.WithHostNamespace(specs.CgroupNamespace))
	} else {
		opts = append(opts, oci.WithNamespace(specs.CgroupNamespace, ""))
	}
	return append(opts, pod.mounts(in.Host)...), nil
}

// Sysctls are the kernel parameters of a pod's namespaces: those of the request
// and those that are set by default (contract 7.3.18). ErrInvalidArgument for
// one that is not the pod's own, because it has no namespace or is in the host's.
func Sysctls(c *runtime.PodSandboxConfig, cfg cristate.RuntimeConfig, h Host) (map[string]string, error) {
	ns, err := namespacesOf(c.GetLinux().GetSecurityContext().GetNamespaceOptions(), h)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	if ns.network != runtime.NamespaceMode_NODE {
		if cfg.EnableUnprivilegedPorts {
			out["net.ipv4.ip_unprivileged_port_start"] = "0"
		}
		// In a user namespace not all of the groups exist.
		if cfg.EnableUnprivilegedICMP && !ns.user && !h.UserNS {
			out["net.ipv4.ping_group_range"] = "0 2147483647"
		}
	}
	for k, v := range c.GetLinux().GetSysctls() {
		key, err := oci.CheckSysctl(k, v)
		if err != nil {
			return nil, err
		}
		host := ""
		switch {
		case strings.HasPrefix(key, "net.") && ns.network == runtime.NamespaceMode_NODE:
			host = "network"
		case key == "kernel.domainname" && ns.network == runtime.NamespaceMode_NODE:
			host = "UTS"
		case key != "kernel.domainname" && !strings.HasPrefix(key, "net.") && ns.ipc == runtime.NamespaceMode_NODE:
			host = "IPC"
		}
		if host != "" {
			return nil, fmt.Errorf("sysctl %s: the pod is in the host's %s namespace: %w", key, host, errdefs.ErrInvalidArgument)
		}
		out[key] = v
	}
	return out, nil
}

// cgroupPath is the cgroup of a sandbox or container. Whether a runtime that is
// not runc leaves it to systemd is in a configuration of its own: the form of
// the parent, which the kubelet chose, tells.
func cgroupPath(parent, id string, rt cristate.Runtime, h Host) (string, error) {
	return CgroupPath(parent, id, h.SystemdCgroup || !rt.Runc() && strings.HasSuffix(parent, ".slice"))
}

// CgroupPath is the cgroup of a sandbox or container below its pod's, in the
// form of the driver: a path, or slice:cri-containerd:id for systemd. Without a
// parent it is below the namespace's, or in system.slice. ErrInvalidArgument if
// the parent is not of the driver's form.
func CgroupPath(parent, id string, systemd bool) (string, error) {
	if strings.ContainsAny(parent, ":\x00\n") {
		return "", fmt.Errorf("cgroup parent %q: %w", short(parent), errdefs.ErrInvalidArgument)
	}
	if !systemd {
		if parent == "" {
			parent = string(cristate.Namespace)
		}
		return path.Join("/", parent, id), nil
	}
	slice := path.Base(path.Join("/", parent))
	if parent == "" {
		slice = "system.slice"
	}
	if !strings.HasSuffix(slice, ".slice") {
		return "", fmt.Errorf("cgroup parent %q is no slice, but the runtime uses systemd's cgroups: the kubelet's cgroup driver differs: %w", short(parent), errdefs.ErrInvalidArgument)
	}
	return slice + ":cri-containerd:" + id, nil
}
