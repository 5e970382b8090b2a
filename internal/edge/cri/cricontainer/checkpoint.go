package cricontainer

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/mountx"
	"github.com/gantryd/gantry/internal/lib/tarstream"
)

// The entries of a checkpoint's archive (contract 7.1.23); tools that read
// checkpoints know them by these names.
const (
	entryConfig = "config.dump"
	entrySpec   = "spec.dump"
	entryStatus = "status.dump"
	entryLog    = "container.log"
	entryRootfs = "rootfs-diff.tar"
	entryVolume = "volumes/"   // and the path of a volume of the image, escaped
	entryImages = "checkpoint" // criu's files
)

// workDir is where, in a container's directory, a checkpoint is made.
const workDir = "checkpoint"

// timed is a reader that ends with ctx.
type timed struct {
	ctx context.Context
	io.Reader
}

func (t timed) Read(b []byte) (int, error) {
	if err := t.ctx.Err(); err != nil {
		return 0, err
	}
	return t.Reader.Read(b)
}

// criuFiles are criu's own log and statistics, which are on top of the archive.
var criuFiles = []string{"dump.log", "stats-dump"}

// checkpointLimit bounds a checkpoint whose request has no timeout.
const checkpointLimit = 10 * time.Minute

// checkpointConfig describes the container in the archive.
type checkpointConfig struct {
	ID             string    `json:"id"`
	Name           string    `json:"name"`
	RootfsImage    string    `json:"rootfsImage,omitempty"`
	RootfsImageRef string    `json:"rootfsImageRef,omitempty"`
	Runtime        string    `json:"runtime,omitempty"`
	CreatedTime    time.Time `json:"createdTime"`
	Checkpointed   time.Time `json:"checkpointedTime"`
	RestoredTime   time.Time `json:"restoredTime"`
	Restored       bool      `json:"restored"`
}

// Checkpoint writes the state of a running container, which goes on running,
// as a tar archive to location. ErrNotFound; ErrUnimplemented if enable_criu is
// off; ErrInvalidArgument for a location that is not absolute;
// ErrFailedPrecondition if the container does not run.
func (s *Service) Checkpoint(ctx context.Context, id, location string, timeout time.Duration) (err error) {
	c, err := s.Containers.Get(id)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	id = c.ID()
	defer func() {
		if err != nil {
			err = fmt.Errorf("checkpoint container %s: %w", id, err)
		}
	}()
	if !s.Config.EnableCRIU {
		return fmt.Errorf("enable_criu is off: %w", errdefs.ErrNotImplemented)
	}
	if !filepath.IsAbs(location) {
		return fmt.Errorf("location %.200q is not absolute: %w", location, errdefs.ErrInvalidArgument)
	}
	if timeout <= 0 {
		timeout = checkpointLimit
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	unlock, err := s.Containers.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if st := c.Status().State(); st != runtime.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("it is %s: %w", st, errdefs.ErrFailedPrecondition)
	}
	next := location + ".new"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("location: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if err = errors.Join(s.capture(ctx, c, f), f.Close()); err == nil {
		err = os.Rename(next, location)
	}
	if err != nil {
		return errors.Join(err, os.Remove(next))
	}
	return nil
}

// capture writes the archive of a container, whose lock the caller has, for good.
func (s *Service) capture(ctx context.Context, c *cristate.Container, to *os.File) (err error) {
	rec, err := s.view.Containers().Get(ctx, container.ID(c.ID()))
	if err != nil {
		return err
	}
	work := filepath.Join(s.dir(c.ID()), workDir)
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	images := filepath.Join(work, entryImages)
	if err := os.MkdirAll(images, 0o700); err != nil {
		return err
	}
	opts, err := proto.Marshal(&options.CheckpointOptions{ImagePath: images, WorkPath: work})
	if err != nil {
		return err
	}
	if _, err := s.tasks().Checkpoint(ctx, rec.ID, "", typed.Any{URL: "containerd.runc.v1.CheckpointOptions", Value: opts}); err != nil {
		return err
	}
	if err := s.archive(ctx, to, c, rec, work); err != nil {
		return err
	}
	return to.Sync()
}

// volumeEntry is the name of what is kept of a volume.
func volumeEntry(at string) string { return entryVolume + url.PathEscape(at) }

// writeTar archives a directory.
func writeTar(ctx context.Context, path, dir string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(tarstream.Diff(ctx, f, "", dir, tarstream.DiffOptions{}), f.Close())
}

// archive writes what a checkpoint consists of.
func (s *Service) archive(ctx context.Context, to io.Writer, c *cristate.Container, rec container.Container, work string) error {
	m := c.Meta()
	now := time.Now()
	t := tar.NewWriter(to)
	add := func(name string, size int64, from io.Reader) error {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: size, ModTime: now}); err != nil {
			return err
		}
		_, err := io.CopyN(t, timed{ctx, from}, size)
		return err
	}
	file := func(name, path string) error {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		return add(name, info.Size(), f)
	}
	spec, err := decodeSpec(rec)
	if err != nil {
		return err
	}
	config := checkpointConfig{ID: m.ID, Name: m.Config.GetMetadata().GetName(), RootfsImage: m.Config.GetImage().GetImage(), RootfsImageRef: m.ImageRef,
		Runtime: rec.Runtime.Name, CreatedTime: rec.CreatedAt, Checkpointed: now}
	for _, doc := range []struct {
		name string
		v    any
	}{{entryConfig, config}, {entrySpec, spec}, {entryStatus, c.Answer(cristate.ImageNames{ID: m.ImageRef})}} {
		path := filepath.Join(work, doc.name)
		b, err := json.Marshal(doc.v)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			return err
		}
		if err := file(doc.name, path); err != nil {
			return err
		}
	}
	for _, name := range criuFiles {
		if err := file(name, filepath.Join(work, name)); err != nil {
			return err
		}
	}
	err = filepath.WalkDir(filepath.Join(work, entryImages), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return file(filepath.Join(entryImages, d.Name()), path)
	})
	if err != nil {
		return err
	}
	if m.LogPath != "" {
		if err := file(entryLog, m.LogPath); err != nil {
			return err
		}
	}
	for _, m := range spec.Mounts {
		if filepath.Dir(m.Source) != filepath.Join(s.dir(string(rec.ID)), "volumes") {
			continue
		}
		path := filepath.Join(work, "volume.tar")
		if err := writeTar(ctx, path, m.Source); err != nil {
			return fmt.Errorf("volume %s of the image: %w", m.Destination, err)
		}
		if err := file(volumeEntry(m.Destination), path); err != nil {
			return err
		}
	}
	if err := s.rootfsDiff(ctx, rec, add); err != nil {
		return fmt.Errorf("changes of the root file system: %w", err)
	}
	return t.Close()
}

// rootfsDiff adds what the container has changed of its image, by way of a
// blob that a lease keeps meanwhile.
func (s *Service) rootfsDiff(ctx context.Context, rec container.Container, add func(string, int64, io.Reader) error) (err error) {
	l, err := s.view.Leases().Create(ctx, lease.Lease{ID: lease.ID("cri-checkpoint-" + string(rec.ID)),
		Labels: map[string]string{lease.LabelExpire: time.Now().Add(time.Hour).Format(time.RFC3339)}})
	if err != nil {
		return err
	}
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	defer func() { err = errors.Join(err, s.view.Leases().Delete(back, l.ID, false)) }()
	v, err := s.Views.In(cristate.Namespace, l.ID)
	if err != nil {
		return err
	}
	store, err := v.Snapshots(rec.Snapshotter)
	if err != nil {
		return err
	}
	info, err := store.Stat(ctx, rec.SnapshotKey)
	if err != nil {
		return err
	}
	upper, err := store.Mounts(ctx, rec.SnapshotKey)
	if err != nil {
		return err
	}
	key := rec.SnapshotKey + "-checkpoint"
	lower, err := store.View(ctx, key, info.Parent, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Remove(back, key)) }()
	desc, err := v.Diff().Compare(ctx, lower, mountx.ReadOnly(upper), diff.CompareOptions{MediaType: ocispec.MediaTypeImageLayer})
	if err != nil {
		return err
	}
	blob, err := v.Content().Open(ctx, desc.Digest)
	if err != nil {
		return err
	}
	defer blob.Close()
	return add(entryRootfs, blob.Size(), io.NewSectionReader(blob, 0, blob.Size()))
}
