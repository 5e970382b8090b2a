package crispec

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/oci"
)

const (
	devShm      = "/dev/shm"
	etcHosts    = "/etc/hosts"
	etcHostname = "/etc/hostname"
	resolvConf  = "/etc/resolv.conf"
	cgroupDir   = "/sys/fs/cgroup"
)

// bindOptions that a request may add to a mount.
var bindOptions = strings.Fields("nosuid suid nodev dev noexec exec noatime atime nodiratime diratime relatime norelatime strictatime nostrictatime nosymfollow symfollow")

// mounts are those of the request, of the image's volumes, and the pod's files
// (contract 7.3.10, 7.3.11).
func (in ContainerInput) mounts() ([]oci.Option, error) {
	sc := in.Config.GetLinux().GetSecurityContext()
	pod, err := namespacesOf(in.Pod.GetLinux().GetSecurityContext().GetNamespaceOptions(), in.Host)
	if err != nil {
		return nil, err
	}
	taken := map[string]bool{}
	var mounts []specs.Mount
	propagation := ""
	for _, m := range in.Mounts {
		s, err := in.mount(m)
		if err != nil {
			return nil, fmt.Errorf("mount at %q: %w", short(m.GetContainerPath()), err)
		}
		if taken[s.Destination] { // the later one would hide it
			mounts = slices.DeleteFunc(mounts, func(was specs.Mount) bool { return was.Destination == s.Destination })
		}
		taken[s.Destination] = true
		mounts = append(mounts, s)
		switch {
		case m.GetPropagation() == runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			propagation = "rshared"
		case m.GetPropagation() == runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER && propagation == "":
			propagation = "rslave"
		}
	}
	for _, v := range in.Volumes {
		if taken[path.Join("/", v.GetContainerPath())] {
			continue
		}
		s, err := in.mount(v)
		if err != nil {
			return nil, fmt.Errorf("volume at %q: %w", short(v.GetContainerPath()), err)
		}
		taken[s.Destination] = true
		mounts = append(mounts, s)
	}
	mode := "rw"
	if sc.GetReadonlyRootfs() {
		mode = "ro"
	}
	for _, f := range []string{etcHostname, etcHosts, resolvConf} {
		if taken[f] {
			continue
		}
		m := specs.Mount{Destination: f, Type: "bind", Source: path.Join(in.PodDir, path.Base(f)), Options: []string{"rbind", "rprivate", mode}}
		if pod.user && in.Host.IDMapMounts { // else they are nobody's, and still readable
			m.UIDMappings, m.GIDMappings = pod.uids, pod.gids
		}
		mounts = append(mounts, m)
	}
	if !taken[devShm] {
		shm, flags := cmp.Or(in.PodShm, path.Join(in.PodDir, "shm")), []string{"rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"} // a bind mount does not keep those of its source
		if pod.ipc == runtime.NamespaceMode_NODE {
			shm, flags = devShm, flags[:3]
		}
		mounts = append(mounts, specs.Mount{Destination: devShm, Type: "bind", Source: shm, Options: flags})
	}
	opts := []oci.Option{oci.WithoutMounts(devShm), oci.WithCgroupMount(), oci.WithMounts(mounts...)}
	if propagation != "" {
		opts = append(opts, oci.WithSpec(func(s *specs.Spec) error { s.Linux.RootfsPropagation = propagation; return nil }))
	}
	return append(opts, oci.WithSpec(func(s *specs.Spec) error {
		writable(s, func(kind string) bool {
			return sc.GetPrivileged() && (kind == "sysfs" || kind == "cgroup") || kind == "cgroup" && in.Runtime.CgroupWritable && in.Host.CgroupV2
		})
		return nil
	})), nil
}

// writable turns the read-only ones of some kinds of mounts.
func writable(s *specs.Spec, which func(kind string) bool) {
	for i, m := range s.Mounts {
		if j := slices.Index(m.Options, "ro"); j >= 0 && which(m.Type) {
			s.Mounts[i].Options = slices.Clone(m.Options)
			s.Mounts[i].Options[j] = "rw"
		}
	}
}

// mount makes the bind mount of one of the request's.
func (in ContainerInput) mount(m Mount) (specs.Mount, error) {
	out := specs.Mount{Type: "bind", Source: m.Source}
	if out.Source == "" {
		out.Source = m.GetHostPath()
	}
	if !strings.HasPrefix(out.Source, "/") {
		return out, fmt.Errorf("source %q: want an absolute path: %w", short(out.Source), errdefs.ErrInvalidArgument)
	}
	if strings.ContainsRune(out.Source+m.GetContainerPath(), 0) {
		return out, fmt.Errorf("a path holds NUL: %w", errdefs.ErrInvalidArgument)
	}
	out.Destination = path.Join("/", m.GetContainerPath())
	if m.GetContainerPath() == "" || out.Destination == "/" {
		return out, fmt.Errorf("the root file system cannot be mounted over: %w", errdefs.ErrInvalidArgument)
	}
	propagation, ok := map[runtime.MountPropagation]string{
		runtime.MountPropagation_PROPAGATION_PRIVATE:           "rprivate",
		runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER: "rslave",
		runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL:     "rshared",
	}[m.GetPropagation()]
	if !ok {
		return out, fmt.Errorf("propagation %d: %w", m.GetPropagation(), errdefs.ErrInvalidArgument)
	}
	mode := "rw"
	switch {
	case m.GetRecursiveReadOnly():
		if !m.GetReadonly() {
			return out, fmt.Errorf("recursive_read_only without readonly: %w", errdefs.ErrInvalidArgument)
		}
		if propagation != "rprivate" {
			return out, fmt.Errorf("recursive_read_only with propagation %s: %w", m.GetPropagation(), errdefs.ErrInvalidArgument)
		}
		if !in.Host.RecursiveReadOnly {
			return out, fmt.Errorf("recursive_read_only: kernel or runtime handler cannot do it: %w", errdefs.ErrFailedPrecondition)
		}
		mode = "rro"
	case m.GetReadonly() || m.GetImage().GetImage() != "":
		mode = "ro"
	}
	out.Options = []string{"rbind", propagation, mode}
	for _, o := range m.GetMountOptions() {
		if !slices.Contains(bindOptions, o) {
			return out, fmt.Errorf("option %q is unknown: %w", short(o), errdefs.ErrInvalidArgument)
		}
		out.Options = append(out.Options, o)
	}
	if len(m.GetUidMappings())+len(m.GetGidMappings()) == 0 {
		return out, nil
	}
	if len(m.GetUidMappings()) == 0 || len(m.GetGidMappings()) == 0 {
		return out, fmt.Errorf("id mappings of users or of groups alone: %w", errdefs.ErrInvalidArgument)
	}
	if !in.Host.IDMapMounts {
		return out, fmt.Errorf("id-mapped mount: kernel or runtime handler cannot do it: %w", errdefs.ErrFailedPrecondition)
	}
	var err error
	if out.UIDMappings, err = mappings(m.GetUidMappings()); err == nil {
		out.GIDMappings, err = mappings(m.GetGidMappings())
	}
	return out, err
}
