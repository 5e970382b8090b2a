package nri

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/adaptation/builtin"
	"github.com/containerd/nri/pkg/api"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// subject is what plugins are asked about.
type subject struct {
	event     api.Event
	pod       *api.PodSandbox
	container *api.Container // nil for a pod
}

func (s subject) String() string { return s.event.PrettyName() }

// ask asks one plugin. One that does not answer is left out, unless it is
// required: then its name is in the error, as it is in that of a refusal.
func (h *Host) ask(ctx context.Context, p *plug, s subject, fn func(context.Context) error) (skipped bool, err error) {
	limit := h.Config.RequestTimeout
	name := s.container.GetName()
	if p.isSlow() && !h.needs(ctx, p, s.pod, name) {
		limit /= 10
	}
	err = p.call(ctx, s.String(), limit, fn)
	var none noAnswer
	switch {
	case err == nil:
		return false, nil
	case !errors.As(err, &none):
		return false, fmt.Errorf("NRI plugin %s: %s: %w", p.name(), s, err)
	case h.needs(ctx, p, s.pod, name):
		return false, fmt.Errorf("NRI plugin %s, which is required: %s: %w", p.name(), s, err)
	}
	h.Log.Warn("NRI plugin is left out of a call", "plugin", p.name(), "call", s.String(), "pod", s.pod.GetId(), "container", s.container.GetId(), "reason", err)
	return true, nil
}

// tell asks the plugins that subscribed to an event, in their order, until one
// refuses; what has happened already all of them are told. Old plugins know one
// call for all.
func (h *Host) tell(ctx context.Context, all []*plug, s subject, fn func(context.Context, api.PluginService) error) error {
	may := s.event == api.Event_RUN_POD_SANDBOX || s.event == api.Event_UPDATE_POD_SANDBOX || s.event == api.Event_START_CONTAINER
	var errs []error
	for _, p := range all {
		if !p.events.IsSet(s.event) {
			continue
		}
		_, err := h.ask(ctx, p, s, func(ctx context.Context) error {
			err := fn(ctx, p.client)
			if err != nil && s.event != api.Event_UPDATE_POD_SANDBOX && p.unimplemented(err) {
				_, err = p.client.StateChange(ctx, &api.StateChangeEvent{Event: s.event, Pod: s.pod, Container: s.container})
			}
			return err
		})
		if err != nil && may {
			return err
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// late is tell for what has happened and cannot be taken back: errors are logged.
func (h *Host) late(ctx context.Context, s subject, fn func(context.Context, api.PluginService) error) {
	if err := h.tell(ctx, h.plugins(), s, fn); err != nil {
		h.Log.Warn("NRI", "pod", s.pod.GetId(), "container", s.container.GetId(), "error", err)
	}
}

// RunPodSandbox asks about a pod that is about to be complete; an error refuses it.
func (h *Host) RunPodSandbox(ctx context.Context, pod *cristate.Pod) error {
	id := pod.ID()
	all := h.enter(id, func() bool { _, err := h.Pods.Get(id); return err == nil })
	p := podOf(pod)
	err := h.tell(ctx, all, subject{event: api.Event_RUN_POD_SANDBOX, pod: p}, func(ctx context.Context, c api.PluginService) error {
		_, err := c.RunPodSandbox(ctx, &api.RunPodSandboxRequest{Pod: p})
		return err
	})
	if err != nil {
		h.leave(id)
	}
	return err
}

// StopPodSandbox tells that a pod has stopped, once however often it is called.
func (h *Host) StopPodSandbox(ctx context.Context, pod *cristate.Pod) error {
	unlock, err := h.ends.Lock(ctx, pod.ID())
	if err != nil {
		return err
	}
	defer unlock()
	return h.stopPod(ctx, pod)
}

func (h *Host) stopPod(ctx context.Context, pod *cristate.Pod) error {
	return h.once(ctx, pod.ID(), func() error {
		p := podOf(pod)
		return h.tell(ctx, h.plugins(), subject{event: api.Event_STOP_POD_SANDBOX, pod: p}, func(ctx context.Context, c api.PluginService) error {
			_, err := c.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: p})
			return err
		})
	})
}

// RemovePodSandbox tells that a pod is being removed, or was not completed; who
// has not heard that it stopped is told that first.
func (h *Host) RemovePodSandbox(ctx context.Context, pod *cristate.Pod) error {
	h.leave(pod.ID())
	unlock, err := h.ends.Lock(ctx, pod.ID())
	if err != nil {
		return err
	}
	defer unlock()
	defer h.forget(pod.ID())
	err = h.stopPod(ctx, pod)
	p := podOf(pod)
	return errors.Join(err, h.tell(ctx, h.plugins(), subject{event: api.Event_REMOVE_POD_SANDBOX, pod: p}, func(ctx context.Context, c api.PluginService) error {
		_, err := c.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: p})
		return err
	}))
}

// once tells the stop of a pod or a container, unless it was told. The caller
// holds the lock of its end.
func (h *Host) once(ctx context.Context, id string, tell func() error) error {
	h.mu.Lock()
	told := h.ended[id]
	h.mu.Unlock()
	if told {
		return nil
	}
	err := tell()
	if ctx.Err() == nil {
		h.mu.Lock()
		h.ended[id] = true
		h.mu.Unlock()
	}
	return err
}

func (h *Host) forget(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.ended, id)
}

// UpdatePodSandbox asks about other resources of a pod; an error refuses them
// (contract 7.1.10).
func (h *Host) UpdatePodSandbox(ctx context.Context, pod *cristate.Pod, overhead, resources *runtime.LinuxContainerResources) error {
	p := podOf(pod)
	return h.tell(ctx, h.plugins(), subject{event: api.Event_UPDATE_POD_SANDBOX, pod: p}, func(ctx context.Context, c api.PluginService) error {
		_, err := c.UpdatePodSandbox(ctx, &api.UpdatePodSandboxRequest{Pod: p, OverheadLinuxResources: resourcesIn(overhead), LinuxResources: resourcesIn(resources)})
		return err
	})
}

// PostUpdatePodSandbox tells that it was done.
func (h *Host) PostUpdatePodSandbox(ctx context.Context, pod *cristate.Pod) error {
	p := podOf(pod)
	return h.tell(ctx, h.plugins(), subject{event: api.Event_POST_UPDATE_POD_SANDBOX, pod: p}, func(ctx context.Context, c api.PluginService) error {
		_, err := c.PostUpdatePodSandbox(ctx, &api.PostUpdatePodSandboxRequest{Pod: p})
		return err
	})
}

// about makes the messages for a container, nil if there is nobody to send them to.
func (h *Host) about(ctx context.Context, event api.Event, pod *cristate.Pod, c *cristate.Container) (subject, bool) {
	for _, p := range h.plugins() {
		if p.events.IsSet(event) {
			return subject{event: event, pod: podOf(pod), container: h.container(ctx, c)}, true
		}
	}
	return subject{}, false
}

// PostCreateContainer tells that a container is there.
func (h *Host) PostCreateContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) {
	h.leave(c.ID())
	if s, any := h.about(ctx, api.Event_POST_CREATE_CONTAINER, pod, c); any {
		h.late(ctx, s, func(ctx context.Context, p api.PluginService) error {
			_, err := p.PostCreateContainer(ctx, &api.PostCreateContainerRequest{Pod: s.pod, Container: s.container})
			return err
		})
	}
}

// StartContainer asks about a container that is about to start; an error refuses it.
func (h *Host) StartContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) error {
	s, any := h.about(ctx, api.Event_START_CONTAINER, pod, c)
	if !any {
		return nil
	}
	return h.tell(ctx, h.plugins(), s, func(ctx context.Context, p api.PluginService) error {
		_, err := p.StartContainer(ctx, &api.StartContainerRequest{Pod: s.pod, Container: s.container})
		return err
	})
}

// PostStartContainer tells that it runs.
func (h *Host) PostStartContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) {
	if s, any := h.about(ctx, api.Event_POST_START_CONTAINER, pod, c); any {
		h.late(ctx, s, func(ctx context.Context, p api.PluginService) error {
			_, err := p.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: s.pod, Container: s.container})
			return err
		})
	}
}

// PostUpdateContainer tells that its resources are others.
func (h *Host) PostUpdateContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) {
	if s, any := h.about(ctx, api.Event_POST_UPDATE_CONTAINER, pod, c); any {
		h.late(ctx, s, func(ctx context.Context, p api.PluginService) error {
			_, err := p.PostUpdateContainer(ctx, &api.PostUpdateContainerRequest{Pod: s.pod, Container: s.container})
			return err
		})
	}
}

// RemoveContainer tells that a container is being removed, or was not
// completed; who has not heard that it stopped is told that first.
func (h *Host) RemoveContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) error {
	h.leave(c.ID())
	unlock, err := h.ends.Lock(ctx, c.ID())
	if err != nil {
		return err
	}
	defer unlock()
	defer h.forget(c.ID())
	err = h.stopContainer(ctx, pod, c)
	s, any := h.about(ctx, api.Event_REMOVE_CONTAINER, pod, c)
	if !any {
		return err
	}
	return errors.Join(err, h.tell(ctx, h.plugins(), s, func(ctx context.Context, p api.PluginService) error {
		_, err := p.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: s.pod, Container: s.container})
		return err
	}))
}

// outcome is what a merged call brought besides its answer.
type outcome struct {
	skipped map[string]bool // by name of the instance
	why     []error
	evict   []*api.ContainerEviction
}

// merged makes NRI's own merger of what these plugins answer, for one call: it
// tracks who owns which field, and refuses conflicts. One instance would hold a
// lock over all that it asks, so each call has its own.
func (h *Host) merged(ctx context.Context, all []*plug, s subject, out *outcome) (*adaptation.Adaptation, error) {
	out.skipped = map[string]bool{}
	opts := []adaptation.Option{adaptation.WithDisabledExternalConnections(), adaptation.WithPluginPath("/proc/self/fd/none")}
	if h.check != nil {
		opts = append(opts, adaptation.WithBuiltinPlugins(&builtin.BuiltinPlugin{Base: "default-validator", Index: "00", Handlers: builtin.BuiltinHandlers{
			ValidateContainerAdjustment: func(_ context.Context, req *api.ValidateContainerAdjustmentRequest) error {
				// Who did not answer was not there, as far as requirements go.
				seen := &api.ValidateContainerAdjustmentRequest{Pod: req.Pod, Container: req.Container, Adjust: req.Adjust, Update: req.Update, Owners: req.Owners}
				for _, p := range req.Plugins {
					if !out.skipped[p.Index+"-"+p.Name] {
						seen.Plugins = append(seen.Plugins, p)
					}
				}
				return h.validate(ctx, seen)
			}}}))
	}
	asked := false
	for _, p := range all {
		asked = asked || p.events.IsSet(s.event)
		opts = append(opts, adaptation.WithBuiltinPlugins(&builtin.BuiltinPlugin{Base: p.base, Index: p.index, Handlers: h.handlers(ctx, p, s, out)}))
	}
	if !asked && (s.event != api.Event_CREATE_CONTAINER || h.check == nil) {
		return nil, nil
	}
	a, err := adaptation.New("containerd", h.Version, func(ctx context.Context, sync adaptation.SyncCB) error {
		_, err := sync(ctx, nil, nil)
		return err
	}, func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil }, opts...)
	if err == nil {
		err = a.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("NRI: %w", err)
	}
	return a, nil
}

// handlers are a plugin as the merger sees it.
func (h *Host) handlers(ctx context.Context, p *plug, s subject, out *outcome) builtin.BuiltinHandlers {
	ask := func(fn func(context.Context) error) bool {
		skipped, err := h.ask(ctx, p, s, fn)
		if err != nil {
			out.why = append(out.why, err)
		}
		out.skipped[p.name()] = out.skipped[p.name()] || skipped
		return err == nil && !skipped
	}
	// The merger leaves out whose error it takes for a broken connection; its
	// own is told apart by out.why.
	refused := func() error {
		if len(out.why) > 0 {
			return fmt.Errorf("%v", out.why[len(out.why)-1])
		}
		return nil
	}
	return builtin.BuiltinHandlers{
		Configure: func(context.Context, *api.ConfigureRequest) (*api.ConfigureResponse, error) {
			return &api.ConfigureResponse{Events: int32(p.events)}, nil
		},
		CreateContainer: func(_ context.Context, req *api.CreateContainerRequest) (*api.CreateContainerResponse, error) {
			var r *api.CreateContainerResponse
			if !ask(func(ctx context.Context) (err error) { r, err = p.client.CreateContainer(ctx, req); return err }) {
				return nil, refused()
			}
			out.evict = append(out.evict, r.GetEvict()...)
			h.adjusted(p, s, r.GetAdjust(), len(r.GetUpdate()), len(r.GetEvict()))
			return r, nil
		},
		UpdateContainer: func(_ context.Context, req *api.UpdateContainerRequest) (*api.UpdateContainerResponse, error) {
			var r *api.UpdateContainerResponse
			if !ask(func(ctx context.Context) (err error) { r, err = p.client.UpdateContainer(ctx, req); return err }) {
				return nil, refused()
			}
			out.evict = append(out.evict, r.GetEvict()...)
			h.adjusted(p, s, nil, len(r.GetUpdate()), len(r.GetEvict()))
			return r, nil
		},
		StopContainer: func(_ context.Context, req *api.StopContainerRequest) (*api.StopContainerResponse, error) {
			var r *api.StopContainerResponse
			if !ask(func(ctx context.Context) (err error) { r, err = p.client.StopContainer(ctx, req); return err }) {
				return nil, nil // the others are told all the same
			}
			h.adjusted(p, s, nil, len(r.GetUpdate()), 0)
			return r, nil
		},
		ValidateContainerAdjustment: func(_ context.Context, req *api.ValidateContainerAdjustmentRequest) error {
			// A validator is there to refuse: one that does not answer refuses.
			var r *api.ValidateContainerAdjustmentResponse
			err := p.call(ctx, "ValidateContainerAdjustment", h.Config.RequestTimeout, func(ctx context.Context) (err error) {
				r, err = p.client.ValidateContainerAdjustment(ctx, req)
				return err
			})
			if err != nil {
				return fmt.Errorf("NRI plugin %s: validate the adjustments: %v", p.name(), err)
			}
			return r.ValidationResult(p.name())
		},
	}
}

// failed is the error of a merged call, with who did not answer.
func (o *outcome) failed(err error) error {
	if len(o.why) > 0 {
		return o.why[len(o.why)-1]
	}
	for name := range o.skipped {
		if o.skipped[name] {
			err = fmt.Errorf("%w (plugin %s did not answer)", err, name)
		}
	}
	return fmt.Errorf("NRI: %v: %w", err, errdefs.ErrFailedPrecondition)
}

// CreateContainer asks about a container that is to be made, and changes its
// specification as plugins wish (contract 1.4.12). An error refuses it, as does
// a required plugin that is not there, or a change that cannot be made.
func (h *Host) CreateContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container, spec *specs.Spec) (err error) {
	id := c.ID()
	all := h.enter(id, func() bool { _, err := h.Containers.Get(id); return err == nil })
	defer func() {
		if err != nil {
			h.leave(id)
		}
	}()
	if len(all) == 0 && h.check == nil {
		return nil
	}
	s := subject{event: api.Event_CREATE_CONTAINER, pod: podOf(pod), container: containerOf(c, spec)}
	var out outcome
	m, err := h.merged(ctx, all, s, &out)
	if m == nil || err != nil {
		return err
	}
	defer m.Stop()
	r, err := m.CreateContainer(ctx, &api.CreateContainerRequest{Pod: s.pod, Container: s.container})
	if err != nil {
		return out.failed(err)
	}
	// The library's answer does not tell which variables were removed, but the
	// request has become what the last plugin would have seen.
	left := map[string]bool{}
	for _, e := range s.container.GetEnv() {
		name, _, _ := strings.Cut(e, "=")
		left[name] = true
	}
	if spec.Process != nil {
		spec.Process.Env = slices.DeleteFunc(spec.Process.Env, func(e string) bool {
			name, _, _ := strings.Cut(e, "=")
			return !left[name]
		})
	}
	if err := h.adjust(spec, r.GetAdjust()); err != nil { // after that: devices bring variables too
		return fmt.Errorf("NRI: adjust container %s: %w", id, err)
	}
	if err := h.others(ctx, r.GetUpdate()); err != nil {
		return err
	}
	h.evict(ctx, out.evict)
	return nil
}

// UpdateContainer asks about other resources of a container, and returns those
// that plugins want (contract 7.1.16). An error refuses the change.
func (h *Host) UpdateContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container, res *runtime.LinuxContainerResources) (*runtime.LinuxContainerResources, error) {
	s, any := h.about(ctx, api.Event_UPDATE_CONTAINER, pod, c)
	if !any {
		return res, nil
	}
	var out outcome
	m, err := h.merged(ctx, h.plugins(), s, &out)
	if m == nil || err != nil {
		return res, err
	}
	defer m.Stop()
	r, err := m.UpdateContainer(ctx, &api.UpdateContainerRequest{Pod: s.pod, Container: s.container, LinuxResources: resourcesIn(res)})
	if err != nil {
		return nil, out.failed(err)
	}
	var others []*api.ContainerUpdate
	for _, u := range r.GetUpdate() {
		switch {
		case u == nil:
		case u.GetContainerId() == c.ID():
			res = h.resourcesOut(c.ID(), res, u.GetLinux().GetResources())
		default:
			others = append(others, u)
		}
	}
	// This container is locked, and each of those is while it is changed: two
	// that wait for each other end here.
	few, cancel := context.WithTimeout(ctx, h.Config.RequestTimeout)
	defer cancel()
	if err := h.others(few, others); err != nil {
		return nil, err
	}
	h.spawn(func(ctx context.Context) { h.evict(ctx, out.evict) }) // it may need this container's lock
	return res, nil
}

// StopContainer tells, once, that a container has stopped; plugins may give to
// others what it had.
func (h *Host) StopContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) error {
	unlock, err := h.ends.Lock(ctx, c.ID())
	if err != nil {
		return err
	}
	defer unlock()
	return h.stopContainer(ctx, pod, c)
}

// ContainerExited is StopContainer for one that has ended by itself. It does
// not wait.
func (h *Host) ContainerExited(pod *cristate.Pod, c *cristate.Container) {
	h.spawn(func(ctx context.Context) {
		unlock, err := h.ends.Lock(ctx, c.ID())
		if err == nil {
			defer unlock()
			if c.Status().Removing {
				return // RemoveContainer tells it, or has done so
			}
			err = h.stopContainer(ctx, pod, c)
		}
		if err != nil {
			h.Log.Warn("NRI: end of a container", "container", c.ID(), "error", err)
		}
	})
}

// spawn runs what nobody waits for, until Close.
func (h *Host) spawn(fn func(context.Context)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	h.wg.Go(func() {
		ctx, cancel := context.WithTimeout(h.life, unasked)
		defer cancel()
		fn(ctx)
	})
}

func (h *Host) stopContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) error {
	return h.once(ctx, c.ID(), func() error {
		s, any := h.about(ctx, api.Event_STOP_CONTAINER, pod, c)
		if !any {
			return nil
		}
		var out outcome
		m, err := h.merged(ctx, h.plugins(), s, &out)
		if m == nil || err != nil {
			return err
		}
		defer m.Stop()
		r, err := m.StopContainer(ctx, &api.StopContainerRequest{Pod: s.pod, Container: s.container})
		if err != nil {
			return out.failed(err)
		}
		return errors.Join(append(out.why, h.others(ctx, r.GetUpdate()))...)
	})
}

// update changes containers as plugins wish and returns those that it cannot.
func (h *Host) update(ctx context.Context, all []*api.ContainerUpdate) (failed []*api.ContainerUpdate, err error) {
	for _, u := range all {
		res := h.resourcesOut(u.GetContainerId(), &runtime.LinuxContainerResources{}, u.GetLinux().GetResources())
		uerr := h.Adjust(ctx, u.GetContainerId(), res)
		if uerr == nil {
			continue
		}
		failed = append(failed, u)
		h.Log.Warn("NRI: change of a container", "container", u.GetContainerId(), "error", uerr)
		if !u.GetIgnoreFailure() {
			err = errors.Join(err, uerr)
		}
	}
	return failed, err
}

// others is update for what comes with an answer about another container. It is
// no error that one is gone: plugins hear of that when it has happened.
func (h *Host) others(ctx context.Context, all []*api.ContainerUpdate) error {
	var errs []error
	for _, u := range all {
		if _, err := h.update(ctx, []*api.ContainerUpdate{u}); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("NRI: change other containers: %w", err))
		}
	}
	return errors.Join(errs...)
}

// evictions bounds the stop of a container.
const evictions = time.Minute

// evict stops containers that plugins do not want any longer.
func (h *Host) evict(ctx context.Context, all []*api.ContainerEviction) {
	for _, e := range all {
		h.Log.Info("NRI: container is evicted", "container", e.GetContainerId(), "reason", e.GetReason())
		limited, cancel := context.WithTimeout(ctx, evictions)
		if err := h.Evict(limited, e.GetContainerId()); err != nil {
			h.Log.Warn("NRI: evict a container", "container", e.GetContainerId(), "error", err)
		}
		cancel()
	}
}
