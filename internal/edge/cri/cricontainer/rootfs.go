package cricontainer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/oci"
)

// Limits of what is copied out of an image for its volumes (class C4).
const (
	maxVolumeFiles = 200_000
	maxVolumeDepth = 256
)

// volumes makes the directories of an image's volumes that no mount of the
// request covers, with what the image has there.
func (s *Service) volumes(ctx context.Context, root, id string, config *runtime.ContainerConfig, img ocispec.ImageConfig) ([]crispec.Mount, error) {
	if s.Config.IgnoreImageDefinedVolumes {
		return nil, nil
	}
	var out []crispec.Mount
	for _, at := range oci.ImageVolumes(img) {
		if slices.ContainsFunc(config.GetMounts(), func(m *runtime.Mount) bool { return path.Clean("/"+m.ContainerPath) == at }) {
			continue
		}
		dir := filepath.Join(s.dir(id), "volumes", rand.Text())
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		if err := copyVolume(ctx, root, at, dir); err != nil {
			return nil, fmt.Errorf("volume %.200s of the image: %w", at, err)
		}
		out = append(out, crispec.Mount{Mount: &runtime.Mount{ContainerPath: at, HostPath: dir, SelinuxRelabel: true}, Source: dir})
	}
	return out, nil
}

// copyVolume copies the directory at a path of an image into dir. Links in the
// path mean the image's root; those in the directory are copied, not followed
// (class C1). What is no directory is an empty volume.
func copyVolume(ctx context.Context, root, at, dir string) error {
	f, err := openBelow(root, at, unix.O_RDONLY|unix.O_DIRECTORY)
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	from, err := os.OpenRoot("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer to.Close()
	c := volumeCopy{ctx: ctx, from: from, to: to}
	info, err := from.Stat(".")
	if err != nil {
		return err
	}
	if err := c.dir(".", 0); err != nil {
		return err
	}
	return c.attributes(".", info)
}

type volumeCopy struct {
	ctx      context.Context
	from, to *os.Root
	files    int
}

func (c *volumeCopy) dir(name string, depth int) error {
	if depth > maxVolumeDepth {
		return fmt.Errorf("%.200s is more than %d directories deep: %w", name, maxVolumeDepth, errdefs.ErrOutOfRange)
	}
	d, err := c.from.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		entries, err := d.ReadDir(256)
		for _, e := range entries {
			if err := c.entry(path.Join(name, e.Name()), depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (c *volumeCopy) entry(name string, depth int) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	if c.files++; c.files > maxVolumeFiles {
		return fmt.Errorf("it has more than %d files: %w", maxVolumeFiles, errdefs.ErrOutOfRange)
	}
	info, err := c.from.Lstat(name)
	if err != nil {
		return err
	}
	switch info.Mode().Type() {
	case 0:
		err = c.file(name)
	case os.ModeDir:
		if err = c.to.Mkdir(name, 0o700); err == nil {
			err = c.dir(name, depth+1)
		}
	case os.ModeSymlink:
		var target string
		if target, err = c.from.Readlink(name); err == nil {
			err = c.to.Symlink(target, name)
		}
	default:
		return nil // devices, sockets and FIFOs are no data
	}
	if err != nil {
		return err
	}
	return c.attributes(name, info)
}

func (c *volumeCopy) file(name string) (err error) {
	in, err := c.from.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := c.to.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// capability keeps a program's file capabilities. It goes after the owner, whose
// change takes it away.
func (c *volumeCopy) capability(name string) error {
	in, err := c.from.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	var value [64]byte
	n, err := unix.Fgetxattr(int(in.Fd()), "security.capability", value[:])
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return err
	}
	out, err := c.to.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	return unix.Fsetxattr(int(out.Fd()), "security.capability", value[:n], 0)
}

// attributes sets owner, mode and times, the owner first: it takes special bits away.
func (c *volumeCopy) attributes(name string, info os.FileInfo) error {
	st, ok := sysStat(info)
	if !ok {
		return nil
	}
	if err := c.to.Lchown(name, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if info.Mode()&os.ModeSymlink != 0 {
		return nil
	}
	if err := c.to.Chmod(name, info.Mode()&(os.ModePerm|os.ModeSetuid|os.ModeSetgid|os.ModeSticky)); err != nil {
		return err
	}
	if info.Mode().IsRegular() {
		if err := c.capability(name); err != nil {
			return err
		}
	}
	return c.to.Chtimes(name, info.ModTime(), info.ModTime())
}

// users opens the image's lists of users and groups.
func users(root string) crispec.Files {
	return func(name string) (io.ReadCloser, error) {
		f, err := openBelow(root, name, unix.O_RDONLY|unix.O_NONBLOCK)
		if errors.Is(err, unix.ENOTDIR) {
			return nil, fs.ErrNotExist
		}
		if err != nil {
			return nil, err
		}
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			f.Close()
			return nil, fmt.Errorf("it is not a file: %w", errdefs.ErrInvalidArgument)
		}
		return f, nil
	}
}

func sysStat(info os.FileInfo) (*syscall.Stat_t, bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	return st, ok
}
