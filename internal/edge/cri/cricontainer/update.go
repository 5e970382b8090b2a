package cricontainer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// UpdateResources changes the limits of a container that was created or runs:
// in its specification, in the kernel, and in its status (contract 7.1.16).
// What res does not name stays. If the kernel refuses, nothing has changed.
// ErrNotFound; ErrInvalidArgument; ErrFailedPrecondition in another state.
func (s *Service) UpdateResources(ctx context.Context, id string, res *runtime.LinuxContainerResources, annotations map[string]string) (err error) {
	c, err := s.Containers.Get(id)
	if err != nil {
		return fmt.Errorf("update resources: %w", err)
	}
	id = c.ID()
	defer func() {
		if err != nil {
			err = fmt.Errorf("update resources of container %s: %w", id, err)
		}
	}()
	if res == nil {
		return fmt.Errorf("none are given: %w", errdefs.ErrInvalidArgument)
	}
	unlock, err := s.Containers.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	st := c.Status()
	state := st.State()
	if st.Removing || state != runtime.ContainerState_CONTAINER_CREATED && state != runtime.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("it is %s: %w", state, errdefs.ErrFailedPrecondition)
	}
	pod := s.pod(c)
	if pod == nil {
		return fmt.Errorf("its pod is gone: %w", errdefs.ErrFailedPrecondition)
	}
	if s.NRI != nil {
		if res, err = s.NRI.UpdateContainer(ctx, pod, c, res); err != nil {
			return err
		}
	}
	if err := s.apply(ctx, pod, c, res, annotations); err != nil {
		return err
	}
	if s.NRI != nil {
		s.NRI.PostUpdateContainer(ctx, pod, c)
	}
	return nil
}

// Adjust is UpdateResources for NRI's own wishes, which it is not asked about
// again; a container that is not there or has ended is ErrNotFound.
func (s *Service) Adjust(ctx context.Context, id string, res *runtime.LinuxContainerResources) error {
	c, err := s.Containers.Get(id)
	if err != nil {
		return fmt.Errorf("adjust: %w", err)
	}
	unlock, err := s.Containers.Lock(ctx, c.ID())
	if err != nil {
		return fmt.Errorf("adjust: %w", err)
	}
	defer unlock()
	pod := s.pod(c)
	if pod == nil || c.Status().FinishedAt != 0 {
		return fmt.Errorf("adjust container %s: it has ended: %w", c.ID(), errdefs.ErrNotFound)
	}
	if err := s.apply(ctx, pod, c, res, nil); err != nil {
		return fmt.Errorf("adjust container %s: %w", c.ID(), err)
	}
	return nil
}

// apply stores and sets other resources. The caller holds the container's lock.
func (s *Service) apply(ctx context.Context, pod *cristate.Pod, c *cristate.Container, res *runtime.LinuxContainerResources, annotations map[string]string) error {
	rec, err := s.view.Containers().Get(ctx, container.ID(c.ID()))
	if err != nil {
		return err
	}
	old := rec.Spec
	was, err := decodeSpec(rec)
	if err != nil {
		return err
	}
	_, handler, err := s.Config.Handler(pod.Meta().RuntimeHandler)
	if err != nil {
		return err
	}
	host := s.Host(ctx, handler)
	now, err := crispec.Update(was, res, s.Config, host, s.Log)
	if err != nil {
		return err
	}
	created := c.Status().StartedAt == 0
	if asked := res.GetOomScoreAdj(); created && asked != 0 && now.Process != nil {
		adj := crispec.OOMScore(asked, s.Config, host)
		now.Process.OOMScoreAdj = &adj // of a process that runs it is its own affair
	}
	if rec.Spec, err = encode(specURL, now); err != nil {
		return err
	}
	if rec, err = s.view.Containers().Update(ctx, rec, "spec"); err != nil {
		return err
	}
	if !created {
		// A runtime that fails may have set some of it.
		if err = s.set(ctx, rec.ID, now, annotations); err != nil && was.Linux != nil && was.Linux.Resources != nil {
			back, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
			defer cancel()
			if berr := s.set(back, rec.ID, was, nil); berr != nil {
				s.Log.Warn("set the former resources again", "container", rec.ID, "error", berr)
			}
		}
	}
	if err == nil {
		err = c.Change(func(st *cristate.Status) error { st.Resources = crispec.Resources(now); return nil })
	}
	if err == nil {
		return nil
	}
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	rec.Spec = old
	_, uerr := s.view.Containers().Update(back, rec, "spec")
	return errors.Join(err, uerr)
}

// set tells the kernel. A container that ends meanwhile needs no limits.
func (s *Service) set(ctx context.Context, id container.ID, spec *specs.Spec, annotations map[string]string) error {
	value, err := encode(resourcesURL, spec.Linux.Resources)
	if err != nil {
		return err
	}
	if err := s.tasks().Update(ctx, id, value, annotations); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// info is what a verbose status tells (contract 7.1.15).
type info struct {
	SandboxID      string                   `json:"sandboxID"`
	Pid            uint32                   `json:"pid"`
	Removing       bool                     `json:"removing"`
	SnapshotKey    string                   `json:"snapshotKey"`
	Snapshotter    string                   `json:"snapshotter"`
	RuntimeType    string                   `json:"runtimeType"`
	RuntimeOptions *typed.Any               `json:"runtimeOptions"`
	Config         *runtime.ContainerConfig `json:"config"`
	RuntimeSpec    *specs.Spec              `json:"runtimeSpec"`
}

// Info is what a verbose status tells of a container, as JSON under "info".
// ErrNotFound.
func (s *Service) Info(ctx context.Context, id string) (map[string]string, error) {
	c, err := s.Containers.Get(id)
	if err != nil {
		return nil, err
	}
	m, st, f := c.Meta(), c.Status(), c.Facts()
	rec, err := s.view.Containers().Get(ctx, container.ID(m.ID))
	if err != nil {
		return nil, err
	}
	out := info{SandboxID: m.SandboxID, Pid: st.Pid, Removing: st.Removing, SnapshotKey: f.SnapshotKey, Snapshotter: f.Snapshotter, RuntimeType: rec.Runtime.Name, Config: m.Config}
	if !rec.Runtime.Options.IsZero() {
		out.RuntimeOptions = &rec.Runtime.Options
	}
	if full, err := cristate.DecodeContainer(rec.Extensions[cristate.ExtensionContainer]); err == nil {
		out.Config = full.Config // of one that has ended, less is in memory
	}
	if out.RuntimeSpec, err = decodeSpec(rec); err != nil {
		return nil, err
	}
	b, err := json.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("describe container %s: %w", m.ID, err)
	}
	return map[string]string{"info": string(b)}, nil
}

// Spec is a container's specification, for what runs beside its first process.
// ErrNotFound.
func (s *Service) Spec(ctx context.Context, id string) (*specs.Spec, error) {
	c, err := s.Containers.Get(id)
	if err != nil {
		return nil, err
	}
	rec, err := s.view.Containers().Get(ctx, container.ID(c.ID()))
	if err != nil {
		return nil, err
	}
	return decodeSpec(rec)
}
