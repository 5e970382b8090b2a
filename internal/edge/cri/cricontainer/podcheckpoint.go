package cricontainer

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/attempt"
	"github.com/gantryd/gantry/internal/lib/mountx"
	"github.com/gantryd/gantry/internal/lib/tarstream"
	"github.com/gantryd/gantry/internal/lib/undo"
)

const (
	// shmFile is the pod's /dev/shm, beside the archives of its containers.
	shmFile = "shm.tar"
	// pausedFile in a container's directory says that a checkpoint paused it.
	pausedFile = "paused"
	// restoreDir in a container's directory is what it is started from, once;
	// fromFile there names the checkpoint.
	restoreDir = "restore"
	fromFile   = "from"
	// maxDump bounds the documents of an archive.
	maxDump = 4 << 20
)

// CheckpointPod writes a checkpoint of containers of a pod, which run, to a
// directory that is empty. All of them are paused before the first is captured,
// and run again when it returns, also when time is up; nothing is left after an
// error, which names the stage. ErrNotFound; ErrInvalidArgument (no containers,
// one twice, one of another pod); ErrFailedPrecondition (one does not run).
func (s *Service) CheckpointPod(ctx context.Context, podID string, ids []string, to *os.Root, p cristate.PodCheckpoint) (err error) {
	all, err := s.selected(podID, ids)
	if err != nil {
		return err
	}
	for _, c := range all {
		unlock, err := s.Containers.Lock(ctx, c.ID())
		if err != nil {
			return err
		}
		defer unlock()
	}
	for _, c := range all {
		if st := c.Status().State(); st != runtime.ContainerState_CONTAINER_RUNNING {
			return fmt.Errorf("container %s is %s: %w", c.ID(), st, errdefs.ErrFailedPrecondition)
		}
	}
	var made undo.Stack
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
		defer cancel()
		err = errors.Join(err, made.Run(clean))
	}()
	write := func(name string, fn func(*os.File) error) error {
		f, err := to.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		made.Push("remove "+name, func(context.Context) error { return to.Remove(name) })
		return errors.Join(fn(f), f.Close())
	}
	p.Containers = map[string]string{}
	err = s.paused(ctx, all, func() error {
		for i, c := range all {
			name := fmt.Sprintf("container-%d.tar", i)
			if err := write(name, func(f *os.File) error { return s.capture(ctx, c, f) }); err != nil {
				return fmt.Errorf("capture container %s: %w", c.ID(), err)
			}
			p.Containers[c.Meta().Config.GetMetadata().GetName()] = name
		}
		if shm := s.PodShm(podID); isDir(shm) {
			err := write(shmFile, func(f *os.File) error {
				return errors.Join(tarstream.Diff(ctx, f, "", shm, tarstream.DiffOptions{}), f.Sync())
			})
			if err != nil {
				return fmt.Errorf("capture /dev/shm: %w", err)
			}
		}
		return nil
	})
	if err == nil {
		err = p.Write(to)
	}
	if err == nil {
		made.Keep()
	}
	return err
}

func isDir(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.IsDir()
}

// selected finds containers of a pod, in the order in which they are locked.
func (s *Service) selected(podID string, ids []string) ([]*cristate.Container, error) {
	if len(ids) == 0 {
		return nil, fmt.Errorf("no containers are named: %w", errdefs.ErrInvalidArgument)
	}
	var all []*cristate.Container
	for _, id := range ids {
		c, err := s.Containers.Get(id)
		switch {
		case err != nil:
			return nil, err
		case c.Meta().SandboxID != podID:
			return nil, fmt.Errorf("container %s is in another pod: %w", c.ID(), errdefs.ErrInvalidArgument)
		case slices.ContainsFunc(all, func(o *cristate.Container) bool {
			return o == c || o.Meta().Config.GetMetadata().GetName() == c.Meta().Config.GetMetadata().GetName()
		}):
			return nil, fmt.Errorf("container %s, or another of its name, is named twice: %w", c.ID(), errdefs.ErrInvalidArgument)
		}
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *cristate.Container) int { return cmp.Compare(a.ID(), b.ID()) })
	return all, nil
}

// paused calls fn while containers, whose locks the caller has, are paused. They
// run again when it returns, whatever happened.
func (s *Service) paused(ctx context.Context, all []*cristate.Container, fn func() error) (err error) {
	n := 0
	defer func() {
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.Limits.Kill)
		defer cancel()
		for _, c := range all[:n] {
			err = errors.Join(err, s.resume(back, c.ID()))
		}
	}()
	for _, c := range all {
		n++ // also one of which it is not known whether it worked
		if err := os.WriteFile(filepath.Join(s.dir(c.ID()), pausedFile), nil, 0o600); err != nil {
			return err
		}
		if err := s.tasks().Pause(ctx, container.ID(c.ID())); err != nil {
			return fmt.Errorf("pause container %s: %w", c.ID(), err)
		}
	}
	s.Faults.Pass("cri.container.paused")
	return fn()
}

// resume lets a container that was paused go on, as often as it takes.
func (s *Service) resume(ctx context.Context, id string) error {
	for {
		err := s.tasks().Resume(ctx, container.ID(id))
		if err != nil {
			// It was not paused, or is gone.
			if p, gerr := s.tasks().Get(ctx, container.ID(id), ""); errdefs.IsNotFound(gerr) || gerr == nil && p.Status != task.StatusPaused && p.Status != task.StatusPausing {
				err = nil
			}
		}
		if err == nil {
			return os.RemoveAll(filepath.Join(s.dir(id), pausedFile))
		}
		if sleep(ctx, 100*time.Millisecond) != nil {
			return fmt.Errorf("resume container %s: %w", id, err)
		}
	}
}

// thaw lets the containers go on that the last daemon was killed in a checkpoint
// of. It ends with that or with ctx.
func (s *Service) thaw(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, c := range s.Containers.List() {
		mark := filepath.Join(s.dir(c.ID()), pausedFile)
		if _, err := os.Lstat(mark); err != nil {
			continue
		}
		wg.Go(func() {
			unlock, err := s.Containers.Lock(ctx, c.ID())
			if err != nil {
				return
			}
			defer unlock()
			if _, err := os.Lstat(mark); err != nil {
				return
			}
			if err := errors.Join(s.resume(ctx, c.ID()), os.RemoveAll(filepath.Join(s.dir(c.ID()), workDir))); err != nil {
				s.Log.Error("resume after a checkpoint that was broken off", "container", c.ID(), "error", err)
			}
		})
	}
}

// origin is the archive that a container is made of.
type origin struct {
	from       *os.Root
	archive    string
	checkpoint string // its id

	config checkpointConfig
	spec   *specs.Spec
}

// RestorePod makes the containers of a pod that is being made, one for each
// configuration, from a checkpoint that has all of them. They are not started:
// that is when their processes are restored. What it made when it fails, the
// pod's removal removes. ErrInvalidArgument (malformed), ErrFailedPrecondition
// (a configuration is not of what was captured).
func (s *Service) RestorePod(ctx context.Context, stage *attempt.Stage, pod *cristate.Pod, from *os.Root, p cristate.PodCheckpoint, configs []*runtime.ContainerConfig) error {
	if shm := s.PodShm(pod.ID()); isDir(shm) {
		stage.Enter("restore /dev/shm")
		f, size, err := cristate.OpenRegular(from, shmFile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := extract(ctx, shm, f, size); err != nil {
			return fmt.Errorf("%s: %w", shmFile, err)
		}
	}
	for _, config := range configs {
		name, err := s.check(pod, config)
		if err != nil {
			return err
		}
		from := &origin{from: from, archive: p.Containers[config.Metadata.Name], checkpoint: p.ID}
		if _, err := s.create(ctx, stage, name, pod, proto.CloneOf(config), from); err != nil {
			return fmt.Errorf("container %s: %w", name, err)
		}
	}
	return nil
}

// Restored finds the containers that RestorePod made of a checkpoint.
// ErrAlreadyExists if the pod has others, or some were started.
func (s *Service) Restored(podID, checkpoint string, configs []*runtime.ContainerConfig) ([]*runtime.RestoredContainer, error) {
	var out []*runtime.RestoredContainer
	for _, c := range s.Containers.Where(cristate.InPod(podID)) {
		m := c.Meta()
		from, err := os.ReadFile(filepath.Join(s.dir(m.ID), restoreDir, fromFile))
		same := slices.ContainsFunc(configs, func(want *runtime.ContainerConfig) bool { return sameRequest(want, m.Config) })
		if err != nil || string(from) != checkpoint || !same || c.Status().State() != runtime.ContainerState_CONTAINER_CREATED {
			return nil, fmt.Errorf("pod %s has container %s, which was not made so, or was started: %w", podID, m.ID, errdefs.ErrAlreadyExists)
		}
		out = append(out, &runtime.RestoredContainer{Name: m.Config.GetMetadata().GetName(), ContainerId: m.ID})
	}
	if len(out) != len(configs) {
		return nil, fmt.Errorf("pod %s has %d containers of the checkpoint's %d: %w", podID, len(out), len(configs), errdefs.ErrAlreadyExists)
	}
	return out, nil
}

// extract unpacks a tar of so many bytes onto a directory.
func extract(ctx context.Context, dir string, from io.Reader, size int64) error {
	_, err := tarstream.Apply(ctx, dir, from, tarstream.ApplyOptions{Limits: tarstream.Limits{Bytes: size}})
	return err
}

// unpackArchive reads a container's archive, of which nothing is believed: the changes
// of its root file system and the contents of its volumes are applied, and
// criu's files are laid ready for its start.
func (s *Service) unpackArchive(ctx context.Context, o *origin, meta cristate.ContainerMeta, rootfs []mount.Mount, volumes []crispec.Mount) error {
	f, size, err := cristate.OpenRegular(o.from, o.archive)
	if err != nil {
		return err
	}
	defer f.Close()
	dir := filepath.Join(s.dir(meta.ID), restoreDir)
	if err := os.MkdirAll(filepath.Join(dir, entryImages), 0o700); err != nil {
		return err
	}
	into, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer into.Close()
	seen := map[string]bool{}
	t := tar.NewReader(timed{ctx, f})
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return badArchive(ctx, o, "", err)
		}
		if size -= h.Size; h.Typeflag != tar.TypeReg || size < 0 || seen[h.Name] {
			return badArchive(ctx, o, h.Name, errors.New("it is there twice, is no file, or is longer than the archive"))
		}
		seen[h.Name] = true
		switch base, isImage := strings.CutPrefix(h.Name, entryImages+"/"); {
		case h.Name == entryConfig:
			err = document(t, h.Size, &o.config)
		case h.Name == entrySpec:
			err = document(t, h.Size, &o.spec)
		case h.Name == entryRootfs:
			err = mountx.WithTemp(ctx, s.tmpDir(), rootfs, func(root string) error { return extract(ctx, root, t, h.Size) })
		case strings.HasPrefix(h.Name, entryVolume):
			err = restoreVolume(ctx, h, t, volumes)
		case isImage && fs.ValidPath(h.Name) && base == path.Base(h.Name) && len(base) <= 255:
			seen[entryImages] = true
			err = copyImage(into, h, t)
		case slices.Contains(append(criuFiles, entryStatus, entryLog), h.Name): // for people
		default:
			err = errors.New("there is no such entry in an archive of a container")
		}
		if err != nil {
			return badArchive(ctx, o, h.Name, err)
		}
	}
	for _, name := range []string{entryConfig, entrySpec, entryRootfs, entryImages} {
		if !seen[name] {
			return badArchive(ctx, o, name, errors.New("it is missing"))
		}
	}
	if o.config.Name != meta.Config.GetMetadata().GetName() || o.spec == nil || o.spec.Process == nil {
		return badArchive(ctx, o, entryConfig, fmt.Errorf("it is of container %.80q, or without a process", o.config.Name))
	}
	if o.config.RootfsImageRef != meta.ImageRef {
		return fmt.Errorf("its image is %s, that of the checkpoint is %.100q: %w", meta.ImageRef, o.config.RootfsImageRef, errdefs.ErrFailedPrecondition)
	}
	return os.WriteFile(filepath.Join(dir, fromFile), []byte(o.checkpoint), 0o600)
}

// badArchive says what is wrong with an archive; an error that has no class, as
// those of archive/tar, is of what the archive says.
func badArchive(ctx context.Context, o *origin, entry string, err error) error {
	var class *fs.PathError
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("%w (%w)", ctx.Err(), err)
	case errors.As(err, &class), errdefs.IsInvalidArgument(err), errdefs.IsDataLoss(err), errdefs.IsFailedPrecondition(err):
	default:
		err = fmt.Errorf("%v: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("archive %s of the checkpoint: entry %.200q: %w", o.archive, entry, err)
}

func document(from io.Reader, size int64, v any) error {
	if size > maxDump {
		return fmt.Errorf("it has %d bytes, at most %d are possible", size, maxDump)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(from, b); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func copyImage(into *os.Root, h *tar.Header, from io.Reader) error {
	f, err := into.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, from, h.Size)
	return errors.Join(err, f.Close())
}

// restoreVolume puts what was captured in the place of what the image has.
func restoreVolume(ctx context.Context, h *tar.Header, from io.Reader, volumes []crispec.Mount) error {
	i := slices.IndexFunc(volumes, func(v crispec.Mount) bool { return volumeEntry(v.GetContainerPath()) == h.Name })
	if i < 0 {
		return fmt.Errorf("the container has no such volume: %w", errdefs.ErrFailedPrecondition)
	}
	dir, err := os.OpenRoot(volumes[i].Source)
	if err != nil {
		return err
	}
	defer dir.Close()
	old, err := fs.ReadDir(dir.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range old {
		if err := dir.RemoveAll(e.Name()); err != nil {
			return err
		}
	}
	return extract(ctx, volumes[i].Source, from, h.Size)
}

// compatible is an error if a specification is not of the process that a
// checkpoint holds: what belongs to the process is in the checkpoint, and to
// ask for something else has no effect.
func compatible(captured, wanted *specs.Spec) error {
	describe := func(s *specs.Spec) []any {
		p, env := s.Process, slices.DeleteFunc(slices.Clone(s.Process.Env), func(e string) bool { return strings.HasPrefix(e, "HOSTNAME=") }) // is the pod's
		slices.Sort(env)
		l := s.Linux
		if l == nil {
			l = &specs.Linux{}
		}
		spaces := map[specs.LinuxNamespaceType]bool{}
		for _, ns := range l.Namespaces {
			spaces[ns.Type] = ns.Path != ""
		}
		return []any{"arguments", p.Args, "working directory", p.Cwd, "environment", env, "user", p.User, "terminal", p.Terminal, "capabilities", p.Capabilities,
			"no_new_privs", p.NoNewPrivileges, "AppArmor profile", p.ApparmorProfile, "SELinux label", p.SelinuxLabel, "seccomp profile", l.Seccomp,
			"namespaces", spaces, "user namespace", []any{l.UIDMappings, l.GIDMappings}}
	}
	a, b := describe(captured), describe(wanted)
	for i := 0; i < len(a); i += 2 {
		is, err := json.Marshal(a[i+1])
		if err != nil {
			return err
		}
		want, err := json.Marshal(b[i+1])
		if err != nil {
			return err
		}
		if !bytes.Equal(is, want) {
			return fmt.Errorf("its %s: %.200s is asked for, the checkpoint has %.200s: %w", a[i], want, is, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// restoring are the tasks of containers; those made of a checkpoint are started
// from it, once.
type restoring struct {
	task.Store
	dir func(id string) string
	log *slog.Logger
}

func (r restoring) Create(ctx context.Context, id container.ID, opts task.CreateOptions) (uint32, error) {
	images := filepath.Join(r.dir(string(id)), restoreDir, entryImages)
	switch _, err := os.Stat(images); {
	case err == nil:
		opts.Checkpoint = &ocispec.Descriptor{Annotations: map[string]string{"RestoreFromPath": images}}
	case !errors.Is(err, fs.ErrNotExist):
		return 0, err
	}
	return r.Store.Create(ctx, id, opts)
}

func (r restoring) Start(ctx context.Context, id container.ID, exec task.ExecID) (uint32, error) {
	pid, err := r.Store.Start(ctx, id, exec)
	if err == nil && exec == "" {
		if err := os.RemoveAll(filepath.Join(r.dir(string(id)), restoreDir)); err != nil {
			r.log.Warn("remove the checkpoint that a container was started from", "container", id, "error", err)
		}
	}
	return pid, err
}
