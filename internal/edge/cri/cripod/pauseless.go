package cripod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/atomicfile"
	"github.com/gantryd/gantry/internal/lib/keymutex"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

// Pauseless is the controller "pauseless": a pod is held together by pinned
// namespaces alone, with no process and no image (promise P55). One that asks
// for a shared PID namespace is given a pause container by PodSandbox, because
// a PID namespace lives as long as its first process.
type Pauseless struct {
	d     ControllerDeps
	pause sandbox.Controller

	ops keymutex.Map
	mu  sync.Mutex
	all map[string]chan struct{} // closed when the instance has ended or is gone
}

// NewPauseless makes the controller; pause is for pods that cannot do without.
func NewPauseless(d ControllerDeps, pause sandbox.Controller) *Pauseless {
	return &Pauseless{d: d, pause: pause, all: map[string]chan struct{}{}}
}

var _ sandbox.Controller = (*Pauseless)(nil)

// instance is the file of an instance. A pod that was started before the last
// reboot has no namespaces any more: Boot tells.
type instance struct {
	Meta      cristate.PodMeta
	CreatedAt time.Time
	ExitedAt  time.Time
	Started   bool
	Boot      string
	Spec      typed.Any
}

func (c *Pauseless) path(id string) string {
	return filepath.Join(c.d.Dirs.StateOf(id), "pauseless.json")
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// load reads an instance's file. ErrNotFound.
func (c *Pauseless) load(id string) (instance, error) {
	var x instance
	if strings.ContainsRune(id, '/') || id == "" || id == "." || id == ".." {
		return x, fmt.Errorf("sandbox id %q: %w", id, errdefs.ErrNotFound)
	}
	b, err := os.ReadFile(c.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return x, fmt.Errorf("pod sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	if err == nil {
		err = json.Unmarshal(b, &x)
	}
	if err != nil {
		return x, fmt.Errorf("state of pod sandbox %s: %w", id, err)
	}
	return x, nil
}

func (c *Pauseless) store(x instance) error {
	b, err := json.Marshal(x)
	if err != nil {
		return err
	}
	return atomicfile.Write(c.path(x.Meta.ID), b, 0o600)
}

// ready says whether an instance runs, as the kernel knows it.
func (c *Pauseless) ready(x instance) bool {
	if boot, err := bootID(); err != nil || boot != x.Boot || !x.Started || !x.ExitedAt.IsZero() {
		return false
	}
	paths := map[nspin.Kind]string{}
	c.d.Dirs.own(x.Meta, paths)
	if x.Meta.NetNSPath != "" {
		paths[nspin.Net] = x.Meta.NetNSPath
	}
	for _, p := range paths {
		if !nspin.Pinned(p) {
			return false
		}
	}
	return true
}

// which returns whose the instance is: PodSandbox's, or its own, then x is set.
func (c *Pauseless) which(ctx context.Context, id string) (pause sandbox.Controller, x instance, err error) {
	x, err = c.load(id)
	if errdefs.IsNotFound(err) {
		if _, perr := c.pause.Status(ctx, id, false); perr == nil || !errdefs.IsNotFound(perr) {
			return c.pause, x, nil
		}
	}
	return nil, x, err
}

// Create pins the namespaces, those that are not there yet, and sets them up.
func (c *Pauseless) Create(ctx context.Context, s sandbox.Sandbox, opts sandbox.CreateOptions) (err error) {
	if err := s.Check(); err != nil {
		return err
	}
	meta, err := metaOf(s, opts)
	if err != nil {
		return err
	}
	if modes(meta.Config).GetPid() == runtime.NamespaceMode_POD && s.Extensions[cristate.ExtensionMetadata].URL != "" {
		return c.pause.Create(ctx, s, opts)
	}
	unlock, err := c.ops.Lock(ctx, s.ID)
	if err != nil {
		return err
	}
	defer unlock()
	if _, _, err := c.which(ctx, s.ID); !errdefs.IsNotFound(err) {
		if err == nil {
			err = fmt.Errorf("pod sandbox %s: %w", s.ID, errdefs.ErrAlreadyExists)
		}
		return err
	}
	if err := os.MkdirAll(c.d.Dirs.ns(s.ID, ""), 0o711); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.unpin(meta))
		}
	}()
	paths, missing := map[nspin.Kind]string{}, map[nspin.Kind]string{}
	c.d.Dirs.own(meta, paths)
	for kind, path := range paths {
		if !nspin.Pinned(path) {
			missing[kind] = path
		}
	}
	if len(missing) > 0 {
		if err := nspin.Make(nspin.Spec{Paths: missing}); err != nil {
			return err
		}
	}
	spec, value, err := c.d.spec(ctx, meta, nil, "")
	if err != nil {
		return err
	}
	if meta.NetNSPath != "" {
		paths[nspin.Net] = meta.NetNSPath
	}
	var sysctls map[string]string
	if spec.Linux != nil {
		sysctls = spec.Linux.Sysctl
	}
	if err := setUp(meta, paths, sysctls); err != nil {
		return err
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	if err := c.store(instance{Meta: meta, CreatedAt: time.Now(), Boot: boot, Spec: value}); err != nil {
		return err
	}
	c.mu.Lock()
	c.all[s.ID] = make(chan struct{})
	c.mu.Unlock()
	return nil
}

// setUp gives new namespaces the pod's host name and sysctls, as a runtime does
// for a pause container. Only sysctls of the namespaces at hand are written.
func setUp(meta cristate.PodMeta, paths map[nspin.Kind]string, sysctls map[string]string) error {
	for key := range sysctls {
		if kind := sysctlOf(key); paths[kind] == "" {
			return fmt.Errorf("sysctl %q: the pod has no %s namespace of its own that it could be set in: %w", key, kind, errdefs.ErrInvalidArgument)
		}
	}
	if len(paths) == 0 {
		return nil
	}
	hostname, err := Hostname(meta.Config)
	if err != nil {
		return err
	}
	return nspin.Enter(paths, func() error {
		if _, ok := paths[nspin.UTS]; ok {
			if err := unix.Sethostname([]byte(hostname)); err != nil {
				return fmt.Errorf("set host name %q: %w", hostname, err)
			}
		}
		var late []string
		for key, value := range sysctls {
			if sysctlOf(key) == nspin.IPC {
				late = append(late, key)
			} else if err := writeSysctl(key, value); err != nil {
				return err
			}
		}
		if len(late) == 0 {
			return nil
		}
		// Those of IPC obey the root of the namespace's users alone. The thread is
		// thrown away, so it becomes that one; the others of the process do not.
		if uid := rootOf(modes(meta.Config).GetUsernsOptions().GetUids()); uid != 0 {
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
				return fmt.Errorf("become user %d: %w", uid, errno)
			}
		}
		for _, key := range late {
			if err := writeSysctl(key, sysctls[key]); err != nil {
				return err
			}
		}
		return nil
	})
}

// writeSysctl sets a sysctl of the calling thread's namespaces: it is those of
// the thread that opens the file.
func writeSysctl(key, value string) error {
	if !strings.Contains(key, "/") {
		key = strings.ReplaceAll(key, ".", "/")
	}
	if err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0); err != nil {
		return fmt.Errorf("sysctl %s=%s: %w", key, value, err)
	}
	return nil
}

// sysctlOf is the kind of namespace that a sysctl belongs to, "host" for none.
func sysctlOf(key string) nspin.Kind {
	key = strings.ReplaceAll(key, "/", ".")
	switch {
	case strings.Contains(key, ".."):
	case strings.HasPrefix(key, "net."):
		return nspin.Net
	case strings.HasPrefix(key, "fs.mqueue."), key == "kernel.sem", strings.HasPrefix(key, "kernel.shm"), strings.HasPrefix(key, "kernel.msg"):
		return nspin.IPC
	case key == "kernel.domainname", key == "kernel.hostname":
		return nspin.UTS
	}
	return "host"
}

// unpin removes what Create pinned; the network is its caller's.
func (c *Pauseless) unpin(meta cristate.PodMeta) error {
	paths := map[nspin.Kind]string{}
	c.d.Dirs.own(meta, paths)
	var errs []error
	for _, path := range paths {
		errs = append(errs, nspin.Remove(path))
	}
	return errors.Join(errs...)
}

// Start notes that the pod is there.
func (c *Pauseless) Start(ctx context.Context, id string) (sandbox.Instance, error) {
	unlock, err := c.ops.Lock(ctx, id)
	if err != nil {
		return sandbox.Instance{}, err
	}
	defer unlock()
	pause, x, err := c.which(ctx, id)
	if pause != nil {
		return pause.Start(ctx, id)
	}
	if err == nil && x.Started {
		err = fmt.Errorf("pod sandbox %s was started before: %w", id, errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		x.Started = true
		err = c.store(x)
	}
	if err != nil {
		return sandbox.Instance{}, err
	}
	return sandbox.Instance{ID: id, CreatedAt: x.CreatedAt, Spec: x.Spec}, nil
}

// Platform is the host's.
func (c *Pauseless) Platform(ctx context.Context, id string) (ocispec.Platform, error) {
	_, err := c.Status(ctx, id, false)
	return platforms.DefaultSpec(), err
}

// Stop lets go of the namespaces.
func (c *Pauseless) Stop(ctx context.Context, id string, timeout time.Duration) error {
	unlock, err := c.ops.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	pause, x, err := c.which(ctx, id)
	if pause != nil {
		return pause.Stop(ctx, id, timeout)
	}
	if err != nil {
		return gone(err)
	}
	return c.stop(x)
}

func (c *Pauseless) stop(x instance) error {
	if x.ExitedAt.IsZero() {
		x.Started, x.ExitedAt = true, time.Now()
		if err := c.store(x); err != nil {
			return err
		}
	}
	c.end(x.Meta.ID)
	return c.unpin(x.Meta)
}

// end wakes those who wait.
func (c *Pauseless) end(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ch := c.all[id]; ch != nil {
		close(ch)
		delete(c.all, id)
	}
}

// Wait waits for Stop: nothing else ends a pod without a process.
func (c *Pauseless) Wait(ctx context.Context, id string) (sandbox.Exit, error) {
	for {
		c.mu.Lock()
		ch := c.all[id]
		if ch == nil {
			ch = make(chan struct{})
			c.all[id] = ch
		}
		c.mu.Unlock()
		// Looked at after the channel is there: no end is missed.
		pause, x, err := c.which(ctx, id)
		switch {
		case pause != nil:
			c.end(id)
			return pause.Wait(ctx, id)
		case err != nil:
			c.end(id)
			return sandbox.Exit{}, err
		case !x.ExitedAt.IsZero(), x.Started && !c.ready(x):
			c.end(id)
			return sandbox.Exit{At: x.ExitedAt}, nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return sandbox.Exit{}, fmt.Errorf("wait for pod sandbox %s: %w", id, ctx.Err())
		}
	}
}

// Status is what the file and the kernel say.
func (c *Pauseless) Status(ctx context.Context, id string, verbose bool) (sandbox.Status, error) {
	pause, x, err := c.which(ctx, id)
	if pause != nil {
		return pause.Status(ctx, id, verbose)
	}
	if err != nil {
		return sandbox.Status{}, err
	}
	st := sandbox.Status{ID: id, State: sandbox.StateNotReady, CreatedAt: x.CreatedAt, ExitedAt: x.ExitedAt}
	if c.ready(x) {
		st.State = sandbox.StateReady
	}
	if verbose {
		st.Info = map[string]string{"pauseless": "true"}
	}
	return st, nil
}

// Shutdown removes the namespaces and the file.
func (c *Pauseless) Shutdown(ctx context.Context, id string) error {
	unlock, err := c.ops.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	pause, x, err := c.which(ctx, id)
	if pause != nil {
		return pause.Shutdown(ctx, id)
	}
	if err != nil {
		return gone(err)
	}
	if err := c.unpin(x.Meta); err != nil {
		return err
	}
	if err := os.Remove(c.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// The directories are the CRI's if it keeps more in them.
	for _, dir := range []string{c.d.Dirs.ns(id, ""), c.d.Dirs.StateOf(id)} {
		_ = os.Remove(dir)
	}
	c.end(id)
	return nil
}

// Metrics are kept by no one: the pod's cgroup has them.
func (c *Pauseless) Metrics(ctx context.Context, id string) (task.Metric, error) {
	pause, _, err := c.which(ctx, id)
	if pause != nil {
		return pause.Metrics(ctx, id)
	}
	if err == nil {
		err = fmt.Errorf("metrics of pod sandbox %s without a process: %w", id, errdefs.ErrNotImplemented)
	}
	return task.Metric{}, err
}

// Update has nothing to do: the cgroup that bounds a pod is the kubelet's.
func (c *Pauseless) Update(ctx context.Context, s sandbox.Sandbox, _ ...string) error {
	_, err := c.Status(ctx, s.ID, false)
	return err
}
