package cricontainer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/cri/criimage"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/attempt"
	"github.com/gantryd/gantry/internal/lib/undo"
	"github.com/gantryd/gantry/oci"
)

// The types of values that are JSON.
const (
	specURL      = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
	resourcesURL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
)

// Create makes a container in a ready pod and returns its id (contract 7.1.11).
// A call that repeats another, by pod, name and attempt, joins it while it is
// under way and gets its container afterwards, until that is started; so a
// client that gave up may simply ask again (promise P5). podConfig may be nil.
// ErrNotFound (pod, image, user), ErrInvalidArgument, ErrFailedPrecondition
// (pod not ready, what the host cannot), ErrAlreadyExists (the name belongs to a
// container that was started).
func (s *Service) Create(ctx context.Context, podID string, config *runtime.ContainerConfig, podConfig *runtime.PodSandboxConfig) (string, error) {
	pod, err := s.Pods.Get(podID)
	if err != nil {
		return "", fmt.Errorf("create container: %w", err)
	}
	name, err := s.check(pod, config)
	if err != nil {
		return "", err
	}
	// The request is the caller's to change after its call has returned.
	config = proto.CloneOf(config)
	own := false
	id, err := s.creating.Do(ctx, name, func(ctx context.Context, stage *attempt.Stage) (string, error) {
		own = true
		if id, err := s.made(ctx, stage, name, pod, config); id != "" || err != nil {
			return id, err
		}
		return s.create(ctx, stage, name, pod, config, nil)
	})
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", name, err)
	}
	if c, err := s.Containers.Get(id); !own && err == nil && c.Status().State() == runtime.ContainerState_CONTAINER_CREATED && !sameRequest(c.Meta().Config, config) {
		return s.Create(ctx, podID, config, podConfig) // as one who comes when the other has his
	}
	return id, nil
}

// check returns the name that a container gets, or what is wrong with it.
func (s *Service) check(pod *cristate.Pod, config *runtime.ContainerConfig) (string, error) {
	if config.GetMetadata().GetName() == "" || config.GetImage().GetImage() == "" {
		return "", fmt.Errorf("create container in pod %s: it needs a name and an image: %w", pod.ID(), errdefs.ErrInvalidArgument)
	}
	name := cristate.ContainerName(config.Metadata, pod.Meta().Config.GetMetadata())
	err := checkMounts(config.GetMounts())
	if err == nil {
		_, err = logPath(pod.Meta().Config, config)
	}
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", name, err)
	}
	return name, nil
}

// Stages are the creations under way, by name.
func (s *Service) Stages() map[string]string { return s.creating.Stages() }

// made finds the container that an earlier attempt made.
func (s *Service) made(ctx context.Context, stage *attempt.Stage, name string, pod *cristate.Pod, config *runtime.ContainerConfig) (string, error) {
	c, ok := s.Containers.ByName(name)
	if !ok {
		return "", nil
	}
	stage.Enter("wait for what is done with container %s", c.ID())
	unlock, err := s.Containers.Lock(ctx, c.ID())
	if err != nil {
		return "", err
	}
	st := c.Status().State()
	unlock()
	if now, ok := s.Containers.ByName(name); !ok || now != c {
		return "", nil // it was being removed
	}
	if st != runtime.ContainerState_CONTAINER_CREATED {
		return "", fmt.Errorf("container %s has that name and is %s: %w", c.ID(), st, errdefs.ErrAlreadyExists)
	}
	if sameRequest(c.Meta().Config, config) {
		return c.ID(), nil
	}
	stage.Enter("remove container %s, which was wanted differently and never started", c.ID())
	return "", s.Remove(ctx, c.ID())
}

// sameRequest compares what was asked for. The kubelet chooses a new file for
// the termination message at every try: where mounts come from does not count.
func sameRequest(a, b *runtime.ContainerConfig) bool {
	strip := func(c *runtime.ContainerConfig) *runtime.ContainerConfig {
		c = proto.CloneOf(c)
		for _, m := range c.GetMounts() {
			m.HostPath = ""
		}
		return c
	}
	return proto.Equal(strip(a), strip(b))
}

// discard removes a container that nobody waited for.
func (s *Service) discard(id string) {
	ctx, cancel := context.WithTimeout(context.Background(), s.Limits.Remove)
	defer cancel()
	if err := s.Remove(ctx, id); err != nil {
		s.Log.Warn("remove a container whose creator went away", "container", id, "error", err)
	}
}

// create makes a container. Its record comes first, without the metadata that
// says that it is complete: whatever an interrupted creation left is named by
// it, and kept from collection until the next start of the daemon removes both.
// from is nil, or the archive that it is made of.
func (s *Service) create(ctx context.Context, stage *attempt.Stage, name string, pod *cristate.Pod, config *runtime.ContainerConfig, from *origin) (_ string, err error) {
	if st := pod.Status().State; st != cristate.PodReady {
		return "", fmt.Errorf("pod %s is not ready: %w", pod.ID(), errdefs.ErrFailedPrecondition)
	}
	pm := pod.Meta()
	id := cristate.NewID()
	var back undo.Stack
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.Limits.Remove)
		defer cancel()
		err = errors.Join(err, back.Run(clean))
	}()

	stage.Enter("find image %.200s", config.Image.Image)
	img, err := s.Images.Resolve(ctx, config.Image.Image, pm.RuntimeHandler)
	if err != nil {
		return "", err
	}
	stage.Enter("store the record")
	box, err := s.view.Sandboxes().Get(ctx, pm.ID)
	if err != nil {
		return "", err
	}
	labels := map[string]string{}
	for k, v := range config.GetLabels() {
		labels[k] = v
	}
	labels[cristate.LabelKind] = cristate.KindContainer
	rec := container.Container{ID: container.ID(id), Labels: oci.ContainerLabels(img.Spec.Config, labels), Image: img.ID, Runtime: box.Runtime,
		Snapshotter: img.Snapshotter, SnapshotKey: id, SandboxID: pm.ID}
	back.Push("remove what was made", func(ctx context.Context) error { return s.removeParts(ctx, id, img.Snapshotter, pm.ID) })
	if rec, err = s.view.Containers().Create(ctx, rec); err != nil {
		return "", err
	}
	s.Faults.Pass("cri.container.record")
	for _, dir := range []string{s.dir(id), s.stateDir(id)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", err
		}
	}

	stage.Enter("prepare the snapshot")
	snapshots, err := s.view.Snapshots(img.Snapshotter)
	if err != nil {
		return "", err
	}
	owner, err := idLabels(pm.Config)
	if err != nil {
		return "", err
	}
	rootfs, err := snapshots.Prepare(ctx, id, img.ChainID, owner)
	if errdefs.IsNotFound(err) {
		stage.Enter("unpack image %s, which another client brought", img.ID)
		if err := s.unpack(ctx, img, pm.ID); err != nil {
			return "", err
		}
		rootfs, err = snapshots.Prepare(ctx, id, img.ChainID, owner)
	}
	if err != nil {
		return "", err
	}
	s.Faults.Pass("cri.container.snapshot")

	mounts, err := s.mounts(ctx, stage, id, pod, config)
	if err != nil {
		return "", err
	}
	var volumes []crispec.Mount
	var user specs.User
	stage.Enter("read users and volumes of the image from snapshotter %s", img.Snapshotter)
	err = s.withRootfs(ctx, rootfs, func(root string) error {
		if user, err = crispec.ResolveUser(crispec.ContainerIdentity(config, img.Spec.Config.User), users(root)); err != nil {
			return err
		}
		volumes, err = s.volumes(ctx, root, id, config, img.Spec.Config)
		return err
	})
	if err != nil {
		return "", err
	}
	stage.Enter("make the specification")
	log, err := logPath(pm.Config, config)
	if err != nil {
		return "", err
	}
	meta := cristate.ContainerMeta{ID: id, Name: name, SandboxID: pm.ID, Config: config, ImageRef: img.ID, LogPath: log, StopSignal: img.Spec.Config.StopSignal}
	if from != nil {
		stage.Enter("unpack %s of the checkpoint", from.archive)
		if err := s.unpackArchive(ctx, from, meta, rootfs, volumes); err != nil {
			return "", err
		}
	}
	spec, err := s.spec(ctx, &meta, pod, img, user, mounts, volumes)
	if err != nil {
		return "", err
	}
	st := cristate.Status{CreatedAt: time.Now().UnixNano(), Resources: crispec.Resources(spec)}
	c := cristate.NewContainer(meta, st, s.dir(id))
	c.SetFacts(s.facts(spec, img.Snapshotter, id))
	if s.NRI != nil {
		stage.Enter("ask the NRI plugins")
		// Plugins that were asked hear that it came to nothing.
		back.Push("tell the NRI plugins", func(ctx context.Context) error { return s.NRI.RemoveContainer(ctx, pod, c) })
		if err := s.NRI.CreateContainer(ctx, pod, c, spec); err != nil {
			return "", err
		}
		c.SetFacts(s.facts(spec, img.Snapshotter, id))
	}

	if from != nil {
		if err := compatible(from.spec, spec); err != nil {
			return "", err
		}
	}
	stage.Enter("store the container")
	if err := c.Change(func(st *cristate.Status) error { st.Resources = crispec.Resources(spec); return nil }); err != nil {
		return "", err
	}
	s.Faults.Pass("cri.container.status")
	if rec.Spec, err = encode(specURL, spec); err != nil {
		return "", err
	}
	ext, err := cristate.EncodeContainer(meta)
	if err != nil {
		return "", err
	}
	rec.Extensions = map[string]typed.Any{cristate.ExtensionContainer: ext}
	if _, err := s.view.Containers().Update(ctx, rec, "spec", "extensions"); err != nil {
		return "", err
	}
	s.Faults.Pass("cri.container.complete")
	if err := s.Containers.Add(c); err != nil {
		return "", err
	}
	back.Push("forget it", func(context.Context) error { s.Containers.Remove(id); return nil })
	// A Stop of the pod that did not see the container was seen by it.
	if st := pod.Status().State; st != cristate.PodReady {
		return "", fmt.Errorf("pod %s is not ready any more: %w", pm.ID, errdefs.ErrFailedPrecondition)
	}
	back.Keep()
	s.notify(runtime.ContainerEventType_CONTAINER_CREATED_EVENT, c)
	if s.NRI != nil {
		s.NRI.PostCreateContainer(ctx, pod, c)
	}
	return id, nil
}

// unpack unpacks an image under a pod's lease.
func (s *Service) unpack(ctx context.Context, img criimage.Image, podID string) error {
	leased, err := s.Views.In(cristate.Namespace, lease.ID(podID))
	if err != nil {
		return err
	}
	return s.Images.EnsureUnpacked(ctx, leased, img)
}

// facts reads who the first process is.
func (s *Service) facts(spec *specs.Spec, snapshotter, key string) cristate.Facts {
	f := cristate.Facts{Snapshotter: snapshotter, SnapshotKey: key}
	if p := spec.Process; p != nil {
		f.User = s.userOf(p.User)
	}
	return f
}

// userOf is a user as clients are told. Many containers have the same one.
func (s *Service) userOf(user specs.User) *runtime.ContainerUser {
	u := &runtime.LinuxContainerUser{Uid: int64(user.UID), Gid: int64(user.GID)}
	for _, g := range user.AdditionalGids {
		u.SupplementalGroups = append(u.SupplementalGroups, int64(g))
	}
	slices.Sort(u.SupplementalGroups)
	out := &runtime.ContainerUser{Linux: u}
	if last := s.user.Load(); proto.Equal(last, out) {
		return last
	}
	s.user.Store(out)
	return out
}

func encode(url string, v any) (typed.Any, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return typed.Any{}, fmt.Errorf("encode %s: %v: %w", url, err, errdefs.ErrInvalidArgument)
	}
	return typed.Any{URL: url, Value: b}, nil
}

// decodeSpec reads a record's specification.
func decodeSpec(rec container.Container) (*specs.Spec, error) {
	var spec specs.Spec
	if err := json.Unmarshal(rec.Spec.Value, &spec); err != nil || rec.Spec.IsZero() {
		return nil, fmt.Errorf("container %s has no usable specification: %w", rec.ID, errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	return &spec, nil
}

// removeDirs removes a container's directories, and what is mounted there.
func (s *Service) removeDirs(id string) error {
	return errors.Join(os.RemoveAll(s.stateDir(id)), os.RemoveAll(s.dir(id)))
}
