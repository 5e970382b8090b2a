package cricontainer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/attempt"
	"github.com/gantryd/gantry/internal/lib/mountx"
)

// checkMounts returns ErrInvalidArgument for mounts that make no sense on any
// host. Nothing is looked at.
func checkMounts(mounts []*runtime.Mount) error {
	for _, m := range mounts {
		bad := ""
		switch {
		case m == nil:
			bad = "it is empty"
		case m.ContainerPath == "" || strings.ContainsRune(m.ContainerPath+m.HostPath+m.ImageSubPath, 0):
			bad = "it needs a container path, and paths without zero bytes"
		case m.GetImage().GetImage() != "" && m.HostPath != "":
			bad = "it has a host path and an image"
		case m.GetImage().GetImage() == "" && m.HostPath == "":
			bad = "it has neither a host path nor an image"
		case m.ImageSubPath != "" && (m.GetImage().GetImage() == "" || !filepath.IsLocal(m.ImageSubPath)):
			bad = "its image sub-path has no image or leads out of it"
		case m.RecursiveReadOnly && (!m.Readonly || m.Propagation != runtime.MountPropagation_PROPAGATION_PRIVATE):
			bad = "recursive read-only needs read-only and private propagation"
		case runtime.MountPropagation_name[int32(m.Propagation)] == "":
			bad = "unknown propagation " + strconv.Itoa(int(m.Propagation))
		}
		if bad != "" {
			return fmt.Errorf("mount at %.200q: %s: %w", m.GetContainerPath(), bad, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// mounts finds the sources of mounts, and makes those that are missing as
// directories (contract 7.3.10). Any of them may be on a server that does not
// answer: the stage says which.
func (s *Service) mounts(ctx context.Context, stage *attempt.Stage, id string, pod *cristate.Pod, config *runtime.ContainerConfig) ([]crispec.Mount, error) {
	var out []crispec.Mount
	for i, m := range config.GetMounts() {
		stage.Enter("mount %.200s", m.ContainerPath)
		var src string
		var err error
		if m.GetImage().GetImage() != "" {
			src, err = s.mountImage(ctx, stage, id, i, pod, m)
		} else {
			stage.Enter("look at %.200s for mount %.200s", m.HostPath, m.ContainerPath)
			src, err = hostSource(m)
		}
		if err != nil {
			return nil, fmt.Errorf("mount at %.200s: %w", m.ContainerPath, err)
		}
		out = append(out, crispec.Mount{Mount: m, Source: src})
	}
	return out, nil
}

func hostSource(m *runtime.Mount) (string, error) {
	if !filepath.IsAbs(m.HostPath) {
		return "", fmt.Errorf("host path %.200q is not absolute: %w", m.HostPath, errdefs.ErrInvalidArgument)
	}
	if _, err := os.Stat(m.HostPath); errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(m.HostPath, 0o755); err != nil {
			return "", fmt.Errorf("make host path: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
	} else if err != nil {
		return "", fmt.Errorf("host path: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	src, err := filepath.EvalSymlinks(m.HostPath)
	if err != nil {
		return "", fmt.Errorf("host path: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return src, checkPropagation(src, m.Propagation)
}

// checkPropagation returns ErrFailedPrecondition if what is mounted at src does
// not propagate as is wanted.
func checkPropagation(src string, want runtime.MountPropagation) error {
	if want == runtime.MountPropagation_PROPAGATION_PRIVATE {
		return nil
	}
	over, err := mountinfo.GetMounts(mountinfo.ParentsFilter(src))
	if err != nil {
		return fmt.Errorf("mounts of the host: %w", err)
	}
	var at *mountinfo.Info // the last one of the deepest is on top
	for _, m := range over {
		if at == nil || len(m.Mountpoint) >= len(at.Mountpoint) {
			at = m
		}
	}
	if at == nil {
		return fmt.Errorf("%s is on no mount: %w", src, errdefs.ErrFailedPrecondition)
	}
	tags := strings.Fields(at.Optional)
	has := func(prefix string) bool {
		return slices.ContainsFunc(tags, func(t string) bool { return strings.HasPrefix(t, prefix) })
	}
	if has("shared:") || want == runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER && has("master:") {
		return nil
	}
	kind := map[runtime.MountPropagation]string{runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL: "a shared",
		runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER: "a shared or slave"}[want]
	return fmt.Errorf("%s is on mount %s, which is not %s one: %w", src, at.Mountpoint, kind, errdefs.ErrFailedPrecondition)
}

// Image volumes (contract 7.3.11) are mounted below stateDir, each under its
// number and snapshotter, from views that the pod's lease keeps.
const imagesDir = "images"

func imageKey(id string, n int) string { return id + "-image-" + strconv.Itoa(n) }

// mountImage mounts an image for reading and returns the path of its root, or
// of the directory below it that was asked for.
func (s *Service) mountImage(ctx context.Context, stage *attempt.Stage, id string, n int, pod *cristate.Pod, m *runtime.Mount) (_ string, err error) {
	stage.Enter("find image %.200s for mount %.200s", m.Image.Image, m.ContainerPath)
	img, err := s.Images.Resolve(ctx, m.Image.Image, pod.Meta().RuntimeHandler)
	if err != nil {
		return "", err
	}
	v, err := s.Views.In(cristate.Namespace, lease.ID(pod.ID()))
	if err != nil {
		return "", err
	}
	store, err := v.Snapshots(img.Snapshotter)
	if err != nil {
		return "", err
	}
	stage.Enter("mount image %.200s", m.Image.Image)
	dir := filepath.Join(s.stateDir(id), imagesDir, strconv.Itoa(n)+"."+img.Snapshotter)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	labels, err := idLabels(pod.Meta().Config)
	if err != nil {
		return "", err
	}
	mounts, err := store.View(ctx, imageKey(id, n), img.ChainID, labels)
	if errdefs.IsNotFound(err) {
		if err = s.Images.EnsureUnpacked(ctx, v, img); err == nil {
			mounts, err = store.View(ctx, imageKey(id, n), img.ChainID, labels)
		}
	}
	if err != nil {
		return "", fmt.Errorf("image %s: %w", m.Image.Image, err)
	}
	if err := mountx.All(mountx.ReadOnly(mounts), dir); err != nil {
		return "", fmt.Errorf("image %s: %w", m.Image.Image, err)
	}
	sub := filepath.Clean(m.ImageSubPath)
	f, err := openBelow(dir, sub, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return "", fmt.Errorf("directory %.200q of image %s: %w", sub, m.Image.Image, err)
	}
	defer f.Close()
	// The path without links: those in the image mean the image's own root.
	return os.Readlink("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
}

// openBelow opens a path in a tree that may be hostile, with the tree's root as
// the root of all links.
func openBelow(root, name string, flags uint64) (*os.File, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	name = cmp.Or(strings.TrimPrefix(filepath.Clean("/"+name), "/"), ".")
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	case err != nil:
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join(root, name)), nil
}

// unmountImages takes away what mountImage made for a container.
func (s *Service) unmountImages(ctx context.Context, id, podID string) error {
	dir := filepath.Join(s.stateDir(id), imagesDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := mountx.UnmountRecursive(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount image volumes: %w", err)
	}
	for _, e := range entries {
		n, snapshotter, _ := strings.Cut(e.Name(), ".")
		number, err := strconv.Atoi(n)
		if err != nil {
			return fmt.Errorf("image volumes: %s is none of them: %w", e.Name(), errdefs.ErrInternal)
		}
		store, err := s.view.Snapshots(snapshotter)
		if err == nil {
			err = store.Remove(ctx, imageKey(id, number))
		}
		if err != nil && !errdefs.IsNotFound(err) {
			s.Log.Warn("remove the snapshot of an image volume: collection will do it after the pod", "container", id, "pod", podID, "error", err)
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}

// idLabels ask a snapshotter for files that belong to the pod's user namespace
// (contract 10.8).
func idLabels(pod *runtime.PodSandboxConfig) (map[string]string, error) {
	uids, gids, err := crispec.UserNamespace(pod.GetLinux().GetSecurityContext().GetNamespaceOptions())
	if err != nil || uids == nil {
		return nil, err
	}
	text := func(maps []specs.LinuxIDMapping) string {
		var parts []string
		for _, m := range maps {
			parts = append(parts, fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Size))
		}
		return strings.Join(parts, ",")
	}
	return map[string]string{snapshot.LabelUIDMapping: text(uids), snapshot.LabelGIDMapping: text(gids)}, nil
}

// withRootfs shows a snapshot's files to fn, read only.
func (s *Service) withRootfs(ctx context.Context, mounts []mount.Mount, fn func(root string) error) error {
	return mountx.WithTemp(ctx, s.tmpDir(), mountx.ReadOnly(mounts), fn)
}

func (s *Service) tmpDir() string { return filepath.Join(s.State, "tmpmounts") }
