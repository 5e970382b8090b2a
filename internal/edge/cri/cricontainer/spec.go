package cricontainer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/criimage"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// spec reads what a specification needs of the host and makes it. It sets
// meta's process label.
func (s *Service) spec(ctx context.Context, meta *cristate.ContainerMeta, pod *cristate.Pod, img criimage.Image, user specs.User, mounts, volumes []crispec.Mount) (*specs.Spec, error) {
	pm, config := pod.Meta(), meta.Config
	sc := config.GetLinux().GetSecurityContext()
	_, handler, err := s.Config.Handler(pm.RuntimeHandler)
	if err != nil {
		return nil, err
	}
	in := crispec.ContainerInput{
		ID: meta.ID, Config: config, PodID: pm.ID, Pod: pm.Config, Namespaces: pod.Status().Namespaces, Image: img.Spec.Config,
		ImageName: cmp.Or(config.GetImage().GetUserSpecifiedImage(), img.Names().Tag, config.GetImage().GetImage()), User: user, Runtime: handler, RuntimeConfig: s.Config,
		Host: s.Host(ctx, handler), Mounts: mounts, Volumes: volumes, PodDir: s.PodDir(pm.ID), CDI: s.CDI, Log: s.Log,
	}
	if s.Base != nil {
		in.Base = s.Base(handler)
	}
	if in.CDI == nil {
		in.CDI = func(_ *specs.Spec, devices []string) error {
			return fmt.Errorf("CDI devices %q: enable_cdi is off: %w", devices, errdefs.ErrFailedPrecondition)
		}
	}
	if in.TargetPid, err = s.target(config, pm.ID); err != nil {
		return nil, err
	}
	if in.Devices, err = devices(config.GetDevices()); err != nil {
		return nil, err
	}
	ref, err := crispec.SeccompRef(sc.GetSeccomp(), sc.GetSeccompProfilePath(), sc.GetPrivileged(), s.Config)
	if err == nil && ref != "" {
		in.Seccomp, err = ReadSeccomp(ref)
	}
	if err != nil {
		return nil, err
	}
	if in.Host.SELinux {
		if in.ProcessLabel, in.MountLabel, err = crispec.Labels(sc.GetSelinuxOptions(), pm.ProcessLabel, handler.VM()); err != nil {
			return nil, err
		}
		meta.ProcessLabel = in.ProcessLabel
		for _, m := range append(volumes, mounts...) {
			if !m.GetSelinuxRelabel() || in.MountLabel == "" {
				continue
			}
			if err := selinux.Chcon(m.Source, in.MountLabel, true); err != nil && !errors.Is(err, unix.ENOTSUP) {
				return nil, fmt.Errorf("relabel %s: %w", m.Source, err)
			}
		}
	}
	spec, err := crispec.Container(in)
	if err != nil {
		return nil, err
	}
	if shm := s.PodShm(pm.ID); shm != filepath.Join(in.PodDir, "shm") {
		// A file system in memory is not kept beside files that outlive a reboot.
		for i, m := range spec.Mounts {
			if m.Source == filepath.Join(in.PodDir, "shm") {
				spec.Mounts[i].Source = shm
			}
		}
	}
	return spec, nil
}

// target is the process whose namespace of processes is joined in mode TARGET.
func (s *Service) target(config *runtime.ContainerConfig, podID string) (uint32, error) {
	ns := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if ns.GetPid() != runtime.NamespaceMode_TARGET {
		return 0, nil
	}
	c, err := s.Containers.Get(ns.GetTargetId())
	if err != nil {
		return 0, fmt.Errorf("target of the PID namespace: %w", err)
	}
	if c.Meta().SandboxID != podID {
		return 0, fmt.Errorf("target %s of the PID namespace is in another pod: %w", c.ID(), errdefs.ErrInvalidArgument)
	}
	if st := c.Status(); st.State() == runtime.ContainerState_CONTAINER_RUNNING {
		return st.Pid, nil
	}
	return 0, fmt.Errorf("target %s of the PID namespace does not run: %w", c.ID(), errdefs.ErrFailedPrecondition)
}

// ReadSeccomp reads a profile of the host. ErrNotFound, ErrInvalidArgument.
func ReadSeccomp(path string) (*specs.LinuxSeccomp, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("seccomp profile: %w (%w)", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > crispec.MaxSeccomp {
		return nil, fmt.Errorf("seccomp profile %s is no file of at most %d bytes: %w", path, crispec.MaxSeccomp, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, info.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, fmt.Errorf("seccomp profile %s: %w", path, err)
	}
	p, err := crispec.ParseSeccomp(b)
	if err != nil {
		return nil, fmt.Errorf("seccomp profile %s: %w", path, err)
	}
	return p, nil
}

const maxDevices = 4096

// devices finds the host's devices of a request; a directory means all below it
// (contract 7.3.12).
func devices(list []*runtime.Device) ([]crispec.Device, error) {
	var out []crispec.Device
	for _, d := range list {
		at := cmp.Or(d.GetContainerPath(), d.GetHostPath())
		if !filepath.IsAbs(d.GetHostPath()) || !filepath.IsAbs(at) {
			return nil, fmt.Errorf("device %.200q at %.200q: paths must be absolute: %w", d.GetHostPath(), at, errdefs.ErrInvalidArgument)
		}
		path, err := filepath.EvalSymlinks(d.GetHostPath())
		if err != nil {
			return nil, fmt.Errorf("device %.200q: %w: %w", d.GetHostPath(), err, errdefs.ErrNotFound)
		}
		n := len(out)
		err = filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			dev, ok, err := device(p)
			if err != nil || !ok {
				return err
			}
			if len(out) == maxDevices {
				return fmt.Errorf("more than %d: %w", maxDevices, errdefs.ErrOutOfRange)
			}
			rel, err := filepath.Rel(path, p)
			if err != nil {
				return err
			}
			dev.Path = filepath.Join(at, rel)
			out = append(out, crispec.Device{LinuxDevice: dev, Access: d.GetPermissions()})
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("device %.200q: %w", d.GetHostPath(), err)
		}
		if len(out) == n {
			return nil, fmt.Errorf("device %.200q is not a device: %w", d.GetHostPath(), errdefs.ErrInvalidArgument)
		}
	}
	return out, nil
}

// device describes the device at path; ok is false if it is something else.
func device(path string) (dev specs.LinuxDevice, ok bool, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return dev, false, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		dev.Type = "b"
	case unix.S_IFCHR:
		dev.Type = "c"
	default:
		return dev, false, nil
	}
	mode := os.FileMode(st.Mode & 0o777)
	dev.Major, dev.Minor, dev.FileMode = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev)), &mode
	dev.UID, dev.GID = &st.Uid, &st.Gid
	return dev, true, nil
}
