package cripod

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// gone is nil for what is not there.
func gone(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// locked calls fn for a pod that is known while no other operation on it is
// under way. One that is not known is no error (contract 13.26).
func (s *Service) locked(ctx context.Context, id string, fn func(context.Context, *cristate.Pod) error) error {
	p, err := s.Pods.Get(id)
	if err != nil {
		return gone(err)
	}
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	unlock, err := s.Pods.Lock(ctx, p.ID())
	if err != nil {
		return err
	}
	defer unlock()
	if now, err := s.Pods.Get(p.ID()); err != nil || now != p {
		return nil // it was removed meanwhile
	}
	return fn(ctx, p)
}

// Stop stops a pod and its containers, and takes its network away (contract
// 7.1.6). It may be repeated, and must be when it fails: the error names the
// stage and its cause. A pod that is not known is no error.
func (s *Service) Stop(ctx context.Context, id string) error {
	err := s.locked(ctx, id, s.stop)
	if err != nil {
		return fmt.Errorf("stop pod sandbox %s: %w", id, err)
	}
	return nil
}

func (s *Service) stop(ctx context.Context, p *cristate.Pod) error {
	m, st := p.Meta(), p.Status()
	if err := s.Containers.StopAll(ctx, m.ID); err != nil {
		return fmt.Errorf("stop its containers: %w", err)
	}
	ctrl, err := s.controller(st.Sandboxer)
	if err != nil {
		return err
	}
	_, rt, _ := s.Config.Handler(m.RuntimeHandler) // one that is not configured any more has no name
	begin := time.Now()
	if err := took(s.timers.stop, begin, ctrl.Stop(ctx, m.ID, stopGrace), rt.Type); err != nil {
		return fmt.Errorf("stop the sandbox: %w", err)
	}
	s.ended(p, sandbox.Exit{At: time.Now()})
	if st.State == cristate.PodReady {
		// One may have been started since; from now on none is.
		if err := s.Containers.StopAll(ctx, m.ID); err != nil {
			return fmt.Errorf("stop its containers: %w", err)
		}
	}
	if s.NRI != nil && !s.isHalf(m.ID) {
		if err := s.NRI.StopPodSandbox(ctx, p); err != nil {
			s.Log.Warn("NRI: stop of a pod", "pod", m.ID, "err", err)
		}
	}
	if err := s.disconnect(ctx, m); err != nil {
		return err
	}
	p.Change(func(_ *cristate.PodMeta, st *cristate.PodStatus) { st.Disconnected = m.NetNSPath != "" })
	return nil
}

// stopGrace is what a sandbox's own process gets before it is killed.
const stopGrace = 10 * time.Second

// disconnect takes the network away, then the namespaces, and /dev/shm.
func (s *Service) disconnect(ctx context.Context, m cristate.PodMeta) error {
	s.Faults.Pass("pod before teardown")
	if m.NetNSPath != "" {
		begin := time.Now()
		if err := took(s.timers.disconnect, begin, s.Network.Teardown(ctx, m.ID)); err != nil {
			return fmt.Errorf("take its network away: %w", err)
		}
	}
	s.Faults.Pass("pod after teardown")
	if err := s.Dirs.unpin(m); err != nil {
		return fmt.Errorf("remove its namespaces: %w", err)
	}
	return s.Dirs.unmount(m.ID)
}

// ended notes, once, that a pod is not ready any more, and tells it.
func (s *Service) ended(p *cristate.Pod, exit sandbox.Exit) {
	id, was := "", cristate.PodNotReady
	p.Change(func(m *cristate.PodMeta, st *cristate.PodStatus) {
		id, was = m.ID, st.State
		if was != cristate.PodNotReady {
			st.State, st.Pid, st.ExitedAt, st.Exit = cristate.PodNotReady, 0, exit.At, exit.Status
		}
	})
	if was == cristate.PodReady {
		s.Notify.Notify(runtime.ContainerEventType_CONTAINER_STOPPED_EVENT, id, id)
	}
	s.mu.Lock()
	delete(s.unknown, id)
	s.mu.Unlock()
}

// Remove removes a pod, its containers and all there is of them, by force
// (contract 7.1.7). It may be repeated. A pod that is not known is no error.
func (s *Service) Remove(ctx context.Context, id string) error {
	err := s.locked(ctx, id, s.remove)
	if err != nil {
		return fmt.Errorf("remove pod sandbox %s: %w", id, err)
	}
	return nil
}

func (s *Service) remove(ctx context.Context, p *cristate.Pod) error {
	if s.isHalf(p.ID()) {
		return s.takeBack(ctx, p)
	}
	if err := s.stop(ctx, p); err != nil {
		return err
	}
	if err := s.Containers.RemoveAll(ctx, p.ID()); err != nil { // NRI is told of them first
		return fmt.Errorf("remove its containers: %w", err)
	}
	s.tellRemoved(ctx, p)
	if err := s.takeBack(ctx, p); err != nil {
		return err
	}
	s.Notify.Notify(runtime.ContainerEventType_CONTAINER_DELETED_EVENT, p.ID(), p.ID())
	return nil
}

// tellRemoved tells NRI; what it says does not keep the pod.
func (s *Service) tellRemoved(ctx context.Context, p *cristate.Pod) {
	if s.NRI == nil {
		return
	}
	if err := s.NRI.RemovePodSandbox(ctx, p); err != nil {
		s.Log.Warn("NRI: removal of a pod", "pod", p.ID(), "err", err)
	}
}

// takeBack removes whatever there is of a pod, complete or not: what is found
// by means of something else before that, the record last. It can be called
// again after an error or a crash.
func (s *Service) takeBack(ctx context.Context, p *cristate.Pod) error {
	m := p.Meta()
	ctrl, err := s.controller(p.Status().Sandboxer)
	if err != nil {
		return err
	}
	v, err := s.Views.In(cristate.Namespace, "")
	if err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		// Those of a checkpoint are there before the pod is complete.
		{"remove its containers", func() error { return s.Containers.RemoveAll(ctx, m.ID) }},
		{"shut the sandbox down", func() error { return gone(ctrl.Shutdown(ctx, m.ID)) }},
		{"disconnect it", func() error { return s.disconnect(ctx, m) }},
		{"remove its directories", func() error { return s.Dirs.remove(m.ID) }},
		{"end its lease", func() error { return gone(v.Leases().Delete(ctx, lease.ID(m.ID), false)) }},
		{"remove its record", func() error { return gone(v.Sandboxes().Delete(ctx, m.ID)) }},
	} {
		s.Faults.Pass("pod before " + step.name)
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		s.Faults.Pass("pod after " + step.name)
	}
	if s.Labels != nil && m.ProcessLabel != "" {
		s.Labels.Release(m.ProcessLabel)
	}
	s.mu.Lock()
	delete(s.half, m.ID)
	delete(s.unknown, m.ID)
	s.mu.Unlock()
	s.Pods.Remove(m.ID)
	return nil
}

// ExtensionResources is what UpdateResources leaves in a record (contract 7.1.10).
const ExtensionResources = "io.containerd.cri.v1/UpdatedResources"

// updated is the extension's value.
type updated struct {
	Overhead  *runtime.LinuxContainerResources
	Resources *runtime.LinuxContainerResources
}

// UpdateResources changes what a pod as a whole may use: NRI is asked, the
// record is written, the controller is told (contract 7.1.10). ErrNotFound;
// ErrFailedPrecondition if the pod is not ready.
func (s *Service) UpdateResources(ctx context.Context, id string, overhead, resources *runtime.LinuxContainerResources) error {
	p, err := s.Pods.Get(id)
	if err == nil {
		err = s.locked(ctx, p.ID(), func(ctx context.Context, p *cristate.Pod) error {
			return s.update(ctx, p, updated{overhead, resources})
		})
	}
	if err != nil {
		return fmt.Errorf("update resources of pod sandbox %s: %w", id, err)
	}
	return nil
}

func (s *Service) update(ctx context.Context, p *cristate.Pod, u updated) error {
	st := p.Status()
	if st.State != cristate.PodReady {
		return fmt.Errorf("it is not ready: %w", errdefs.ErrFailedPrecondition)
	}
	if s.NRI != nil {
		if err := s.NRI.UpdatePodSandbox(ctx, p, u.Overhead, u.Resources); err != nil {
			return fmt.Errorf("NRI: %w", err)
		}
	}
	v, err := s.Views.In(cristate.Namespace, "")
	if err != nil {
		return err
	}
	record, err := v.Sandboxes().Get(ctx, p.ID())
	if err != nil {
		return err
	}
	value, err := json.Marshal(u)
	if err != nil {
		return fmt.Errorf("encode resources: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if record.Extensions == nil {
		record.Extensions = map[string]typed.Any{}
	}
	record.Extensions[ExtensionResources] = typed.Any{URL: ExtensionResources, Value: value}
	field := "extensions." + ExtensionResources
	if record, err = v.Sandboxes().Update(ctx, record, field); err != nil {
		return err
	}
	ctrl, err := s.controller(st.Sandboxer)
	if err != nil {
		return err
	}
	if err := ctrl.Update(ctx, record, field); err != nil && !errdefs.IsNotImplemented(err) {
		return err
	}
	p.Change(func(_ *cristate.PodMeta, st *cristate.PodStatus) { st.Overhead, st.Resources = u.Overhead, u.Resources })
	if s.NRI != nil {
		if err := s.NRI.PostUpdatePodSandbox(ctx, p); err != nil {
			s.Log.Warn("NRI: update of a pod", "pod", p.ID(), "err", err)
		}
	}
	return nil
}
