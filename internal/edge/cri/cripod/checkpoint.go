package cripod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/attempt"
)

// checkpointLimit bounds a checkpoint whose caller has no deadline.
const checkpointLimit = 10 * time.Minute

// Checkpoint writes a checkpoint of containers of a pod, which have to run, to
// an empty directory. They are paused together meanwhile and run in the end,
// whatever comes of it; nothing is left in the directory after an error, which
// names the stage. ErrUnimplemented if enable_criu is off, or for a pod with a
// user namespace of its own: the ids of its files would be another's. ErrNotFound;
// ErrInvalidArgument; ErrFailedPrecondition if something does not run.
func (s *Service) Checkpoint(ctx context.Context, id, dir string, containers []string) error {
	p, err := s.Pods.Get(id)
	if err == nil {
		id = p.ID()
		err = s.checkpoint(ctx, p, dir, containers)
	}
	if err != nil {
		return fmt.Errorf("checkpoint pod sandbox %s: %w", id, err)
	}
	return nil
}

func (s *Service) checkpoint(ctx context.Context, p *cristate.Pod, dir string, containers []string) error {
	m := p.Meta()
	switch {
	case !s.Config.EnableCRIU:
		return fmt.Errorf("enable_criu is off: %w", errdefs.ErrNotImplemented)
	case modes(m.Config).GetUsernsOptions() != nil && modes(m.Config).GetUsernsOptions().GetMode() == runtime.NamespaceMode_POD:
		return fmt.Errorf("it has a user namespace of its own: %w", errdefs.ErrNotImplemented)
	case p.Status().State != cristate.PodReady:
		return fmt.Errorf("it is not ready: %w", errdefs.ErrFailedPrecondition)
	}
	_, rt, err := s.Config.Handler(m.RuntimeHandler)
	if err != nil {
		return err
	}
	to, err := openDir(dir)
	if err != nil {
		return err
	}
	defer to.Close()
	f, err := to.Open(".")
	if err != nil {
		return err
	}
	_, err = f.Readdirnames(1)
	if f.Close(); !errors.Is(err, io.EOF) {
		return errors.Join(fmt.Errorf("directory %.200q is not empty: %w", dir, errdefs.ErrInvalidArgument), err)
	}
	ctx, cancel := context.WithTimeout(ctx, checkpointLimit)
	defer cancel()
	c := cristate.PodCheckpoint{Pod: m.Config, CreatedAt: time.Now()}
	c.Runtime, c.Binary = cristate.RuntimeOf(rt)
	return s.Containers.CheckpointPod(ctx, m.ID, containers, to, c)
}

// openDir opens a directory of a client. ErrInvalidArgument if it is none.
func openDir(path string) (*os.Root, error) {
	if !filepath.IsAbs(path) || len(path) >= unix.PathMax {
		return nil, fmt.Errorf("path %.200q is not absolute, or too long: %w", path, errdefs.ErrInvalidArgument)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", err, errdefs.ErrInvalidArgument)
	}
	return root, nil
}

// Restore makes a pod as Run does, and its containers from a checkpoint, which
// are started as any other. A call that repeats another gets its pod, as long as
// none of its containers was started. Nothing is left after an error, also when
// the caller's time is up. ErrUnimplemented if enable_criu is off; ErrNotFound
// (handler, image); ErrInvalidArgument (malformed, or other containers than in
// the checkpoint); ErrFailedPrecondition (not compatible with the checkpoint);
// ErrAlreadyExists (the name is that of another pod).
func (s *Service) Restore(ctx context.Context, dir string, cfg *runtime.PodSandboxConfig, handler string, configs []*runtime.ContainerConfig) (string, []*runtime.RestoredContainer, error) {
	id, all, err := s.restore(ctx, dir, cfg, handler, configs)
	if err != nil {
		return "", nil, fmt.Errorf("restore pod sandbox %.200s from %.200s: %w", cfg.GetMetadata().GetName(), dir, err)
	}
	return id, all, nil
}

func (s *Service) restore(ctx context.Context, dir string, cfg *runtime.PodSandboxConfig, handler string, configs []*runtime.ContainerConfig) (string, []*runtime.RestoredContainer, error) {
	if !s.Config.EnableCRIU {
		return "", nil, fmt.Errorf("enable_criu is off: %w", errdefs.ErrNotImplemented)
	}
	from, err := openDir(dir)
	if err != nil {
		return "", nil, err
	}
	defer from.Close()
	c, err := cristate.ReadPodCheckpoint(from)
	if err != nil {
		return "", nil, err
	}
	_, rt, err := s.Handler(cfg, handler)
	if err != nil {
		return "", nil, err
	}
	if name, binary := cristate.RuntimeOf(rt); name != c.Runtime || binary != c.Binary {
		return "", nil, fmt.Errorf("the checkpoint was made by %.80q %.80q, runtime handler %q is %q %q: %w", c.Runtime, c.Binary, handler, name, binary, errdefs.ErrFailedPrecondition)
	}
	wanted := map[string]bool{}
	for _, config := range configs {
		name := config.GetMetadata().GetName()
		if c.Containers[name] == "" || wanted[name] {
			return "", nil, fmt.Errorf("container %.80q is named twice, or not in the checkpoint: %w", name, errdefs.ErrInvalidArgument)
		}
		wanted[name] = true
	}
	if len(wanted) != len(c.Containers) {
		return "", nil, fmt.Errorf("%d containers are named, the checkpoint has %d: %w", len(wanted), len(c.Containers), errdefs.ErrInvalidArgument)
	}
	id, err := s.bring(ctx, cfg, handler, func(ctx context.Context, st *attempt.Stage, p *cristate.Pod) error {
		return s.Containers.RestorePod(ctx, st, p, from, c, configs)
	})
	if err != nil {
		return "", nil, err
	}
	all, err := s.Containers.Restored(id, c.ID, configs)
	return id, all, err
}
