package cripod

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/idmap"
	"github.com/gantryd/gantry/internal/lib/nspin"
	"github.com/gantryd/gantry/oci"
)

// Image is what a pause container runs.
type Image struct {
	Name        string // as configured
	ID          string // digest of its configuration
	ChainID     string // parent of its snapshot
	Snapshotter string
	Config      ocispec.ImageConfig
}

// SpecInput is what the specification of a pod's own container is made of.
type SpecInput struct {
	Meta    cristate.PodMeta
	Runtime cristate.Runtime
	// Image is nil for a pod without a process, of whose specification only
	// the sysctls are used.
	Image *Image
	// UserNSPath is that of the pinned user namespace, "" for the host's.
	UserNSPath string
	// Dir holds hostname, hosts and resolv.conf; Shm is /dev/shm, or "".
	Dir, Shm   string
	MountLabel string
}

// ControllerDeps is what the controllers of this package work with.
type ControllerDeps struct {
	Views     view.Source
	Namespace namespace.ID
	Config    cristate.RuntimeConfig
	Dirs      Dirs
	Images    Images
	// Spec makes the specification.
	Spec func(ctx context.Context, in SpecInput) (*specs.Spec, error)
	Log  *slog.Logger
}

// specURL is the type of a specification (contract 1.2.10).
const specURL = "types.containerd.io/opencontainers/runtime-spec/1/Spec"

func modes(cfg *runtime.PodSandboxConfig) *runtime.NamespaceOption {
	return cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

// metaOf is the pod that a controller is to make: from the CRI's extension, or
// from what another client gave as options.
func metaOf(s sandbox.Sandbox, opts sandbox.CreateOptions) (cristate.PodMeta, error) {
	if ext, ok := s.Extensions[cristate.ExtensionMetadata]; ok {
		return cristate.DecodePod(ext)
	}
	cfg := &runtime.PodSandboxConfig{}
	if !opts.Options.IsZero() {
		if err := proto.Unmarshal(opts.Options.Value, cfg); err != nil {
			return cristate.PodMeta{}, fmt.Errorf("options of sandbox %s are no pod's configuration: %v: %w", s.ID, err, errdefs.ErrInvalidArgument)
		}
	}
	if cfg.Metadata == nil {
		cfg.Metadata = &runtime.PodSandboxMetadata{Name: s.ID}
	}
	return cristate.PodMeta{ID: s.ID, Name: cristate.PodName(cfg.Metadata), Config: cfg, NetNSPath: opts.NetNSPath}, nil
}

// spec makes the specification, and its stored form.
func (d ControllerDeps) spec(ctx context.Context, meta cristate.PodMeta, image *Image, mountLabel string) (*specs.Spec, typed.Any, error) {
	_, rt, err := d.Config.Handler(meta.RuntimeHandler)
	if err != nil {
		return nil, typed.Any{}, err
	}
	in := SpecInput{Meta: meta, Runtime: rt, Image: image, Dir: d.Dirs.Of(meta.ID), MountLabel: mountLabel}
	if modes(meta.Config).GetIpc() != runtime.NamespaceMode_NODE {
		in.Shm = d.Dirs.Shm(meta.ID)
	}
	if path := d.Dirs.ns(meta.ID, nspin.User); nspin.Pinned(path) {
		in.UserNSPath = path
	}
	spec, err := d.Spec(ctx, in)
	if err != nil {
		return nil, typed.Any{}, err
	}
	b, err := json.Marshal(spec)
	if err != nil {
		return nil, typed.Any{}, fmt.Errorf("encode specification of pod sandbox %s: %w", meta.ID, err)
	}
	return spec, typed.Any{URL: specURL, Value: b}, nil
}

// life is what a controller remembers of an instance beside what is stored.
type life struct {
	started bool
	ended   chan struct{} // closed when exit is set, or gone
	exit    sandbox.Exit
	gone    bool // shut down without having ended
}

// PodSandbox is the controller "podsandbox": a pod is held together by a pause
// container, whose record, snapshot and task have the pod's id (contract
// 5.6.7). What it knows is in the stores; so it goes on after a restart.
type PodSandbox struct {
	d ControllerDeps

	mu  sync.Mutex // guards all; nothing is done under it
	all map[string]*life
}

// NewPodSandbox makes the controller.
func NewPodSandbox(d ControllerDeps) *PodSandbox {
	return &PodSandbox{d: d, all: map[string]*life{}}
}

var _ sandbox.Controller = (*PodSandbox)(nil)

// Limits of the controllers.
const (
	makeLimit = 3 * time.Minute
	endLimit  = time.Minute
)

// view opens the stores, and gives a call its limit.
func (c *PodSandbox) view(ctx context.Context, limit time.Duration) (view.View, context.Context, context.CancelFunc, error) {
	v, err := c.d.Views.In(c.d.Namespace, "")
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	return v, ctx, cancel, nil
}

// Create makes the container; the record first, which keeps the snapshot.
func (c *PodSandbox) Create(ctx context.Context, s sandbox.Sandbox, opts sandbox.CreateOptions) (err error) {
	v, ctx, cancel, err := c.view(ctx, makeLimit)
	if err != nil {
		return err
	}
	defer cancel()
	if err := s.Check(); err != nil {
		return err
	}
	meta, err := metaOf(s, opts)
	if err != nil {
		return err
	}
	image, err := c.d.Images.EnsureSandboxImage(ctx, meta.RuntimeHandler, meta.Config)
	if err != nil {
		return fmt.Errorf("pause image: %w", err)
	}
	spec, value, err := c.d.spec(ctx, meta, &image, opts.Annotations[annotationMountLabel])
	if err != nil {
		return err
	}
	ext, err := cristate.EncodePod(meta)
	if err != nil {
		return err
	}
	snapshots, err := v.Snapshots(image.Snapshotter)
	if err != nil {
		return err
	}
	id := container.ID(s.ID)
	// Those of the pod are how cAdvisor knows whose network it counts here.
	labels := maps.Clone(meta.Config.GetLabels())
	maps.DeleteFunc(labels, func(k, v string) bool { return k == "" || len(k)+len(v) > ident.MaxLabel })
	labels = oci.ContainerLabels(image.Config, labels)
	labels[cristate.LabelKind] = cristate.KindSandbox
	if _, err := v.Containers().Create(ctx, container.Container{ID: id, Labels: labels, Image: image.Name, Runtime: s.Runtime,
		Spec: value, Snapshotter: image.Snapshotter, SnapshotKey: s.ID, SandboxID: s.ID, Extensions: map[string]typed.Any{cristate.ExtensionPod: ext}}); err != nil {
		return err
	}
	c.mu.Lock()
	c.all[s.ID] = &life{ended: make(chan struct{})}
	c.mu.Unlock()
	if _, err := snapshots.Prepare(ctx, s.ID, image.ChainID, idMapLabels(spec)); err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
		defer cancel()
		if uerr := c.Shutdown(ctx, s.ID); uerr != nil {
			c.d.Log.Warn("take back a pause container", "pod", s.ID, "err", uerr)
		}
		return err
	}
	return nil
}

// get returns the record, and what is remembered, if anything is.
func (c *PodSandbox) get(ctx context.Context, v view.View, id string) (container.Container, *life, error) {
	r, err := v.Containers().Get(ctx, container.ID(id))
	if err == nil && r.Labels[cristate.LabelKind] != cristate.KindSandbox {
		err = fmt.Errorf("container %s is no pod sandbox: %w", id, errdefs.ErrNotFound)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return r, c.all[id], err
}

// Start starts the pause container.
func (c *PodSandbox) Start(ctx context.Context, id string) (sandbox.Instance, error) {
	v, ctx, cancel, err := c.view(ctx, makeLimit)
	if err != nil {
		return sandbox.Instance{}, err
	}
	defer cancel()
	r, l, err := c.get(ctx, v, id)
	if err != nil {
		return sandbox.Instance{}, err
	}
	c.mu.Lock()
	again := l == nil || l.started
	if !again {
		l.started = true
	}
	c.mu.Unlock()
	if again {
		return sandbox.Instance{}, fmt.Errorf("pod sandbox %s was started before: %w", id, errdefs.ErrFailedPrecondition)
	}
	pid, err := c.start(ctx, v.Tasks(), r)
	if err != nil {
		c.finish(l, sandbox.Exit{Status: cristate.ExitStartError, At: time.Now()})
		return sandbox.Instance{}, err
	}
	meta, err := cristate.DecodePod(r.Extensions[cristate.ExtensionPod])
	if err != nil {
		return sandbox.Instance{}, err
	}
	inst := sandbox.Instance{ID: id, Pid: pid, CreatedAt: r.CreatedAt, Spec: r.Spec}
	if meta.ProcessLabel != "" {
		inst.Labels = map[string]string{labelSELinux: meta.ProcessLabel}
	}
	return inst, nil
}

func (c *PodSandbox) start(ctx context.Context, tasks task.Store, r container.Container) (uint32, error) {
	pid, err := tasks.Create(ctx, r.ID, task.CreateOptions{})
	if err != nil {
		return 0, err
	}
	if _, err = tasks.Start(ctx, r.ID, ""); err == nil {
		return pid, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
	defer cancel()
	if _, _, kerr := c.kill(ctx, tasks, r.ID); kerr != nil {
		c.d.Log.Warn("kill a pause container that did not start", "pod", r.ID, "err", kerr)
	}
	return 0, err
}

// finish remembers how an instance ended, once.
func (c *PodSandbox) finish(l *life, exit sandbox.Exit) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-l.ended:
	default:
		l.exit = exit
		close(l.ended)
	}
}

// Platform is the host's.
func (c *PodSandbox) Platform(ctx context.Context, id string) (ocispec.Platform, error) {
	_, err := c.Status(ctx, id, false)
	return platforms.DefaultSpec(), err
}

// kill ends a task and removes it. was is unset if there was none.
func (c *PodSandbox) kill(ctx context.Context, tasks task.Store, id container.ID) (exit task.Exit, was bool, err error) {
	p, err := tasks.Get(ctx, id, "")
	if err != nil {
		return task.Exit{}, false, gone(err)
	}
	if p.Status != task.StatusStopped && p.Status != task.StatusCreated {
		// It has nothing to tidy up.
		if err := tasks.Kill(ctx, id, "", uint32(unix.SIGKILL), true); gone(err) != nil {
			return task.Exit{}, true, fmt.Errorf("kill: %w", err)
		}
		if _, err := tasks.Wait(ctx, id, ""); gone(err) != nil {
			return task.Exit{}, true, fmt.Errorf("wait for its end: %w", err)
		}
	}
	exit, err = tasks.Delete(ctx, id)
	if errdefs.IsNotFound(err) {
		return task.Exit{Status: p.ExitStatus, At: p.ExitedAt}, true, nil
	}
	return exit, true, err
}

// Stop kills the pause container.
func (c *PodSandbox) Stop(ctx context.Context, id string, _ time.Duration) error {
	v, ctx, cancel, err := c.view(ctx, endLimit)
	if err != nil {
		return err
	}
	defer cancel()
	_, l, err := c.get(ctx, v, id)
	if err != nil {
		return gone(err)
	}
	exit, was, err := c.kill(ctx, v.Tasks(), container.ID(id))
	if err != nil {
		return fmt.Errorf("stop pause container %s: %w", id, err)
	}
	if !was {
		exit = task.Exit{Status: cristate.ExitUnknown, At: time.Now()}
	}
	if l == nil {
		l = c.remember(id)
	}
	c.finish(l, sandbox.Exit{Status: exit.Status, At: exit.At})
	return nil
}

// remember makes a life of an instance that was started before a restart.
func (c *PodSandbox) remember(id string) *life {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all[id] == nil {
		c.all[id] = &life{started: true, ended: make(chan struct{})}
	}
	return c.all[id]
}

// Wait waits for the pause container's end.
func (c *PodSandbox) Wait(ctx context.Context, id string) (sandbox.Exit, error) {
	v, err := c.d.Views.In(c.d.Namespace, "")
	if err != nil {
		return sandbox.Exit{}, err
	}
	_, l, err := c.get(ctx, v, id)
	if err != nil {
		return sandbox.Exit{}, err
	}
	if l == nil {
		l = c.remember(id)
	}
	c.mu.Lock()
	started := l.started
	c.mu.Unlock()
	failed := make(chan error, 1)
	if started {
		wait, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() { // ends with wait, or with the task
			exit, err := v.Tasks().Wait(wait, container.ID(id), "")
			switch {
			case err == nil:
				c.finish(l, sandbox.Exit{Status: exit.Status, At: exit.At})
			case errdefs.IsNotFound(err): // its end was not seen, or Stop sees it
				c.finish(l, sandbox.Exit{Status: cristate.ExitUnknown, At: time.Now()})
			default:
				failed <- err
			}
		}()
	}
	select {
	case <-l.ended:
	case err := <-failed:
		return sandbox.Exit{}, fmt.Errorf("wait for pod sandbox %s: %w", id, err)
	case <-ctx.Done():
		return sandbox.Exit{}, fmt.Errorf("wait for pod sandbox %s: %w", id, ctx.Err())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.gone {
		return sandbox.Exit{}, fmt.Errorf("pod sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	return l.exit, nil
}

// Status asks for the task.
func (c *PodSandbox) Status(ctx context.Context, id string, verbose bool) (sandbox.Status, error) {
	v, ctx, cancel, err := c.view(ctx, askLimit)
	if err != nil {
		return sandbox.Status{}, err
	}
	defer cancel()
	r, l, err := c.get(ctx, v, id)
	if err != nil {
		return sandbox.Status{}, err
	}
	st := sandbox.Status{ID: id, State: sandbox.StateNotReady, CreatedAt: r.CreatedAt}
	p, err := v.Tasks().Get(ctx, r.ID, "")
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return sandbox.Status{}, err
	case p.Status == task.StatusUnknown:
		return sandbox.Status{}, fmt.Errorf("pod sandbox %s: its shim does not tell: %w", id, errdefs.ErrUnavailable)
	case p.Status == task.StatusStopped:
		st.ExitedAt = p.ExitedAt
	case p.Status != task.StatusCreated:
		st.State, st.Pid = sandbox.StateReady, p.Pid
	}
	if l != nil && st.ExitedAt.IsZero() {
		c.mu.Lock()
		st.ExitedAt = l.exit.At
		c.mu.Unlock()
	}
	if verbose {
		st.Info = map[string]string{"image": r.Image, "snapshotter": r.Snapshotter, "snapshotKey": r.SnapshotKey}
	}
	return st, nil
}

// Shutdown removes task, snapshot and container.
func (c *PodSandbox) Shutdown(ctx context.Context, id string) error {
	v, ctx, cancel, err := c.view(ctx, endLimit)
	if err != nil {
		return err
	}
	defer cancel()
	if err := c.Stop(ctx, id, 0); err != nil {
		return err
	}
	r, l, err := c.get(ctx, v, id)
	if err != nil {
		return gone(err)
	}
	if r.SnapshotKey != "" {
		snapshots, err := v.Snapshots(r.Snapshotter)
		if err != nil {
			return err
		}
		if err := gone(snapshots.Remove(ctx, r.SnapshotKey)); err != nil {
			return err
		}
	}
	if err := gone(v.Containers().Delete(ctx, r.ID)); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if l != nil && !l.started {
		l.gone = true
	}
	delete(c.all, id)
	return nil
}

// Metrics are those of the pause container.
func (c *PodSandbox) Metrics(ctx context.Context, id string) (task.Metric, error) {
	v, ctx, cancel, err := c.view(ctx, askLimit)
	if err != nil {
		return task.Metric{}, err
	}
	defer cancel()
	if _, _, err := c.get(ctx, v, id); err != nil {
		return task.Metric{}, err
	}
	all, err := v.Tasks().Metrics(ctx, "id=="+id)
	if err == nil && len(all) == 0 {
		err = fmt.Errorf("metrics of pod sandbox %s: it does not run: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return task.Metric{}, err
	}
	return all[0], nil
}

// Update has nothing to do: the cgroup that bounds a pod is the kubelet's.
func (c *PodSandbox) Update(ctx context.Context, s sandbox.Sandbox, _ ...string) error {
	_, err := c.Status(ctx, s.ID, false)
	return err
}

// idMapLabels has a snapshotter map the ids of the pause container's files for
// its user namespace, where it can.
func idMapLabels(spec *specs.Spec) map[string]string {
	if spec.Linux == nil || len(spec.Linux.UIDMappings) == 0 || len(spec.Linux.GIDMappings) == 0 {
		return nil
	}
	text := func(in []specs.LinuxIDMapping) string {
		var m idmap.Map
		for _, r := range in {
			m = append(m, idmap.Range{Container: r.ContainerID, Host: r.HostID, Size: r.Size})
		}
		return m.String()
	}
	return map[string]string{snapshot.LabelUIDMapping: text(spec.Linux.UIDMappings), snapshot.LabelGIDMapping: text(spec.Linux.GIDMappings)}
}
