package client

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/lib/mountx"
	"github.com/gantryd/gantry/oci"
)

// Type URLs of the OCI runtime specification's JSON forms (contract 1.2.10).
const (
	SpecURL      = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
	ProcessURL   = "types.containerd.io/opencontainers/runtime-spec/1/Process"
	ResourcesURL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
)

// DefaultRuntime is the name of the runtime whose shim is Gantry's own.
const DefaultRuntime = "io.containerd.runc.v2"

// Encode makes the JSON form of an OCI document.
func Encode(url string, v any) (typed.Any, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return typed.Any{}, fmt.Errorf("encode %s: %w", url, err)
	}
	return typed.Any{URL: url, Value: b}, nil
}

// Spec reads a container's OCI specification.
func Spec(c container.Container) (*specs.Spec, error) {
	if c.Spec.IsZero() {
		return nil, fmt.Errorf("container %s has no spec: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	var s specs.Spec
	if err := json.Unmarshal(c.Spec.Value, &s); err != nil {
		return nil, fmt.Errorf("container %s: read its spec: %w", c.ID, err)
	}
	return &s, nil
}

// ContainerOptions say what to make a container of.
type ContainerOptions struct {
	ID          container.ID
	Image       string // its name in the image store; it must be unpacked
	Platform    ocispec.Platform
	Snapshotter string
	Runtime     container.Runtime // DefaultRuntime if it has no name
	Labels      map[string]string
	Extensions  map[string]typed.Any
	// User is as in an image's configuration, that of the image if "".
	User   string
	Groups []string // further groups, by name or number
	Facts  oci.HostFacts
	Spec   []oci.Option
	// TempDir is where the image is mounted for a moment, to look up users.
	TempDir string
}

// CreateContainer makes a snapshot of an image, the specification, and the
// record of a container. Nothing is left behind if it fails.
func CreateContainer(ctx context.Context, src view.Source, ns namespace.ID, o ContainerOptions) (_ container.Container, err error) {
	var none container.Container
	if err := container.Check(o.ID); err != nil {
		return none, err
	}
	plain, err := src.In(ns, "")
	if err != nil {
		return none, err
	}
	if _, err := plain.Containers().Get(ctx, o.ID); err == nil {
		return none, fmt.Errorf("container %s: %w", o.ID, errdefs.ErrAlreadyExists)
	} else if !errdefs.IsNotFound(err) {
		return none, err
	}
	info, err := InspectImage(ctx, plain, o.Image, o.Platform)
	if err != nil {
		return none, err
	}
	// Until the record refers to the snapshot, a lease keeps it.
	l, err := plain.Leases().Create(ctx, lease.Lease{Labels: map[string]string{lease.LabelExpire: time.Now().Add(time.Hour).UTC().Format(time.RFC3339)}})
	if err != nil {
		return none, err
	}
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	defer func() {
		if lerr := plain.Leases().Delete(clean, l.ID, false); lerr != nil && err == nil {
			err = lerr
		}
	}()
	v, err := src.In(ns, l.ID)
	if err != nil {
		return none, err
	}
	snapshots, err := v.Snapshots(o.Snapshotter)
	if err != nil {
		return none, err
	}
	key := string(o.ID)
	mounts, err := snapshots.Prepare(ctx, key, info.ChainID.String(), nil)
	if errdefs.IsAlreadyExists(err) {
		// Somebody makes a container of this name as well, or did not live to
		// end it. The record decides whose the name is, not the snapshot.
		key += "-" + rand.Text()[:8]
		mounts, err = snapshots.Prepare(ctx, key, info.ChainID.String(), nil)
	}
	if errdefs.IsNotFound(err) {
		return none, fmt.Errorf("image %s is not unpacked into snapshotter %s: %w", o.Image, o.Snapshotter, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return none, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, ignore(snapshots.Remove(clean, key), errdefs.ErrNotFound))
		}
	}()
	user, err := lookUser(ctx, o, info.Config.Config.User, mounts)
	if err != nil {
		return none, fmt.Errorf("image %s: %w", o.Image, err)
	}
	spec, err := oci.Generate(o.Facts, string(o.ID), string(ns), info.Config.Config, append([]oci.Option{oci.WithResolvedUser(user)}, o.Spec...)...)
	if err != nil {
		return none, err
	}
	c := container.Container{ID: o.ID, Image: o.Image, Runtime: o.Runtime, Snapshotter: o.Snapshotter, SnapshotKey: key,
		Labels: oci.ContainerLabels(info.Config.Config, o.Labels), Extensions: o.Extensions}
	c.Runtime.Name = cmp.Or(c.Runtime.Name, DefaultRuntime)
	if c.Spec, err = Encode(SpecURL, spec); err != nil {
		return none, err
	}
	return v.Containers().Create(ctx, c)
}

// DeleteContainer removes a container's record and its snapshot. Its task must
// be gone.
func DeleteContainer(ctx context.Context, v view.View, id container.ID) error {
	c, err := v.Containers().Get(ctx, id)
	if err != nil {
		return err
	}
	if c.SnapshotKey != "" {
		snapshots, err := v.Snapshots(c.Snapshotter)
		if err != nil {
			return err
		}
		if err := ignore(snapshots.Remove(ctx, c.SnapshotKey), errdefs.ErrNotFound); err != nil {
			return err
		}
	}
	return v.Containers().Delete(ctx, id)
}

func ignore(err, class error) error {
	if errors.Is(err, class) {
		return nil
	}
	return err
}

// maxUserFile is how much of an image's passwd and group files is read, in
// bytes: they come from the image.
const maxUserFile = 1 << 20

// lookUser resolves a user in the image, which is mounted for that.
func lookUser(ctx context.Context, o ContainerOptions, fromImage string, mounts []mount.Mount) (specs.User, error) {
	name := cmp.Or(o.User, fromImage, "0")
	var user specs.User
	err := mountx.WithTemp(ctx, o.TempDir, mountx.ReadOnly(mounts), func(root string) (err error) {
		user, err = ResolveUser(root, name, o.Groups...)
		return err
	})
	return user, err
}

// ResolveUser looks a user up in the file system at root, as "name", "uid",
// "name:group" and so on, with further groups. No link leads out of root.
func ResolveUser(root, name string, groups ...string) (specs.User, error) {
	passwd, err := openIn(root, "etc/passwd")
	if err != nil {
		return specs.User{}, err
	}
	defer passwd.Close()
	group, err := openIn(root, "etc/group")
	if err != nil {
		return specs.User{}, err
	}
	defer group.Close()
	user, err := oci.ResolveUser(passwd, group, name)
	if err != nil {
		return user, err
	}
	var opened []io.Closer
	gids, err := oci.ResolveGroups(func() (io.Reader, error) {
		f, err := openIn(root, "etc/group")
		if err == nil {
			opened = append(opened, f)
		}
		return f, err
	}, groups...)
	for _, f := range opened {
		f.Close()
	}
	user.AdditionalGids = append(user.AdditionalGids, gids...)
	return user, err
}

// openIn opens a file of an image for reading. Links are followed as if root
// were "/", so that none leads out of it. One that is missing is empty.
func openIn(root, name string) (io.ReadCloser, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return io.NopCloser(strings.NewReader("")), nil
	}
	if err != nil {
		return nil, fmt.Errorf("open %s of the image: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(root, name))
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%s of the image is not a file: %w", name, errdefs.ErrInvalidArgument)
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(f, maxUserFile), f}, nil
}
