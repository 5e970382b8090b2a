package cripod

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cni"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/attempt"
	"github.com/gantryd/gantry/internal/lib/idmap"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

// extensionIncomplete marks the record of a pod that is being made: one that is
// found at start is taken away again.
const extensionIncomplete = "io.gantry.cri.incomplete"

// Run makes and starts a pod and returns its id (contract 7.1.5). A call for a
// name that is being made joins that attempt; a pod that has the name already
// is the answer, also one that has ended. A handler of "" is the default one.
// Nothing is left when it fails; if that is not possible now it is tried until
// it is, and the pod is listed as not ready in the meantime. An error names the
// stage. ErrInvalidArgument, ErrNotFound (handler), ErrAlreadyExists (the name
// is that of a pod with another handler).
func (s *Service) Run(ctx context.Context, cfg *runtime.PodSandboxConfig, handler string) (string, error) {
	return s.bring(ctx, cfg, handler, nil)
}

// fill puts containers into a pod that is being made.
type fill func(ctx context.Context, st *attempt.Stage, p *cristate.Pod) error

// bring is Run, and fills the pod unless with is nil. Then its caller's end is
// the attempt's, and it returns when all is taken back.
func (s *Service) bring(ctx context.Context, cfg *runtime.PodSandboxConfig, handler string, with fill) (string, error) {
	if m := cfg.GetMetadata(); m.GetName() == "" || m.GetNamespace() == "" || m.GetUid() == "" {
		return "", fmt.Errorf("run pod sandbox: its configuration must have metadata with name, namespace and uid: %w", errdefs.ErrInvalidArgument)
	}
	name := cristate.PodName(cfg.Metadata)
	handler, rt, err := s.Handler(cfg, handler)
	if err != nil {
		return "", fmt.Errorf("run pod sandbox %s: %w", name, err)
	}
	caller := ctx
	if with != nil {
		ctx = context.WithoutCancel(ctx)
	}
	id, err := s.group.Do(ctx, name, func(ctx context.Context, st *attempt.Stage) (string, error) {
		if with != nil {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(caller, runLimit)
			defer cancel()
		}
		id, err := s.run(ctx, cfg, name, handler, rt, st, with)
		if err != nil {
			return "", fmt.Errorf("%s: %w", st, err)
		}
		return id, nil
	})
	if err == nil { // the attempt may have been that of another request
		err = s.runBy(id, handler)
	}
	if err != nil {
		return "", fmt.Errorf("run pod sandbox %s: %w", name, err)
	}
	return id, nil
}

// runBy is an error if a pod is known and has another runtime handler.
func (s *Service) runBy(id, handler string) error {
	p, err := s.Pods.Get(id)
	if err != nil {
		return nil
	}
	if has := p.Meta().RuntimeHandler; has != handler {
		return fmt.Errorf("pod %s has this name and the runtime handler %q, not %q: %w", id, has, handler, errdefs.ErrAlreadyExists)
	}
	return nil
}

// discard takes away a pod that was made for a caller who cancelled.
func (s *Service) discard(id string) {
	ctx, cancel := context.WithTimeout(context.Background(), undoLimit)
	defer cancel()
	if err := s.Remove(ctx, id); err != nil {
		s.Log.Warn("remove a pod that nobody waited for", "pod", id, "err", err)
	}
}

// taken answers for a name that is known already: the id of a pod that has it,
// or "" after what was left of one that did not come up is gone.
func (s *Service) taken(ctx context.Context, name, handler string) (string, error) {
	p, ok := s.Pods.ByName(name)
	if !ok {
		return "", nil
	}
	m := p.Meta()
	if s.isHalf(m.ID) {
		return "", s.Remove(ctx, m.ID)
	}
	return m.ID, s.runBy(m.ID, handler)
}

// making is a pod on its way.
type making struct {
	*Service
	pod        *cristate.Pod
	rt         cristate.Runtime
	ctrl       sandbox.Controller
	view       view.View
	record     sandbox.Sandbox
	mountLabel string
	asked      bool      // NRI
	began      time.Time // the sandbox
}

func (s *Service) run(ctx context.Context, cfg *runtime.PodSandboxConfig, name, handler string, rt cristate.Runtime, st *attempt.Stage, with fill) (string, error) {
	st.Enter("look for an earlier attempt")
	if id, err := s.taken(ctx, name, handler); id != "" || err != nil {
		return id, err
	}
	st.Enter("prepare")
	v, err := s.Views.In(cristate.Namespace, "")
	if err != nil {
		return "", err
	}
	ctrl, err := s.controller(rt.Sandboxer)
	if err != nil {
		return "", err
	}
	meta := cristate.PodMeta{ID: cristate.NewID(), Name: name, Config: cfg, RuntimeHandler: handler}
	if modes(cfg).GetNetwork() != runtime.NamespaceMode_NODE {
		meta.NetNSPath = s.Dirs.netNS(meta.ID)
	}
	m := &making{Service: s, rt: rt, ctrl: ctrl, view: v, pod: cristate.NewPod(meta, cristate.PodStatus{Sandboxer: rt.Sandboxer, CreatedAt: time.Now()})}
	err = m.make(ctx, st, with)
	if err == nil {
		return meta.ID, nil
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w (%w)", err, cause)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if m.asked {
		s.tellRemoved(ctx, m.pod)
	}
	if uerr := s.takeBack(ctx, m.pod); uerr != nil {
		err = errors.Join(err, fmt.Errorf("take it back: %w", uerr))
		// The record is there still: somebody must see the pod, and remove it again.
		s.keepHalf(m.pod)
	}
	return "", err
}

// make does all of it. What it has done when it fails is for takeBack, which
// bears steps that were not done, or in part.
func (m *making) make(ctx context.Context, st *attempt.Stage, with fill) error {
	meta := m.pod.Meta()
	id, cfg := meta.ID, meta.Config
	if m.Labels != nil {
		process, mount, err := m.Labels.Make(cfg, m.rt.VM())
		if err != nil {
			return fmt.Errorf("choose an SELinux label: %w", err)
		}
		m.mountLabel = mount
		m.pod.Change(func(p *cristate.PodMeta, _ *cristate.PodStatus) { p.ProcessLabel = process })
	}
	steps := []struct {
		name string
		do   func(context.Context) error
	}{
		{"write the record", m.create},
		{"make a lease", func(ctx context.Context) error {
			_, err := m.view.Leases().Create(ctx, lease.Lease{ID: lease.ID(id), Labels: map[string]string{cristate.LabelKind: cristate.KindSandbox}})
			return err
		}},
		{"make directories", func(context.Context) error { return m.Dirs.make(id, cfg, m.mountLabel) }},
		{"make namespaces", func(context.Context) error { return m.namespaces() }},
		{"set up the network", m.network},
		{"get the pause image", m.image},
		{"create the sandbox", func(ctx context.Context) error {
			options, err := proto.Marshal(cfg)
			if err != nil {
				return fmt.Errorf("encode the configuration: %v: %w", err, errdefs.ErrInvalidArgument)
			}
			m.began = time.Now()
			return m.ctrl.Create(ctx, m.record, sandbox.CreateOptions{Options: typed.Any{URL: "runtime.v1.PodSandboxConfig", Value: options}, NetNSPath: meta.NetNSPath,
				Annotations: map[string]string{annotationMountLabel: m.mountLabel}})
		}},
		{"start the sandbox", m.start},
		{"ask NRI", func(ctx context.Context) error {
			if m.NRI == nil {
				return nil
			}
			m.asked = true
			return m.NRI.RunPodSandbox(ctx, m.pod)
		}},
		{"restore its containers", func(ctx context.Context) error {
			if with == nil {
				return nil
			}
			return with(ctx, st, m.pod)
		}},
		{"complete the record", m.complete},
	}
	for _, step := range steps {
		st.Enter("%s", step.name)
		m.Faults.Pass("pod before " + step.name)
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := step.do(ctx); err != nil {
			return err
		}
		m.Faults.Pass("pod after " + step.name)
	}
	m.Notify.Notify(runtime.ContainerEventType_CONTAINER_CREATED_EVENT, id, id)
	m.Notify.Notify(runtime.ContainerEventType_CONTAINER_STARTED_EVENT, id, id)
	m.watch(id)
	return nil
}

// annotationMountLabel hands the label of a pod's own files to its controller.
const annotationMountLabel = "io.gantry.cri.mount-label"

// create writes the record, which has the mark until all is done.
func (m *making) create(ctx context.Context) error {
	meta := m.pod.Meta()
	rt, err := m.rt.Record()
	if err != nil {
		return err
	}
	ext, err := cristate.EncodePod(meta)
	if err != nil {
		return err
	}
	m.record = sandbox.Sandbox{ID: meta.ID, Sandboxer: m.rt.Sandboxer, Runtime: rt, Labels: map[string]string{cristate.LabelKind: cristate.KindSandbox},
		Extensions: map[string]typed.Any{cristate.ExtensionMetadata: ext, extensionIncomplete: {URL: extensionIncomplete, Value: []byte("{}")}}}
	_, err = m.view.Sandboxes().Create(ctx, m.record)
	return err
}

// network connects the pod, and puts what came of it into the record at hand.
func (m *making) network(ctx context.Context) error {
	meta := m.pod.Meta()
	if meta.NetNSPath == "" {
		return nil
	}
	begin := time.Now()
	res, err := m.Network.Setup(ctx, NetworkOf(meta))
	if took(m.timers.connect, begin, err) != nil {
		return err
	}
	meta, _ = m.pod.Change(func(p *cristate.PodMeta, _ *cristate.PodStatus) {
		p.IP, p.AdditionalIPs, p.CNIResult = res.IP, res.AdditionalIPs, res.Raw
	})
	m.record.Extensions[cristate.ExtensionMetadata], err = cristate.EncodePod(meta)
	return err
}

// NetworkOf is the pod as its network sees it.
func NetworkOf(meta cristate.PodMeta) cni.Pod {
	cfg := meta.Config
	p := cni.Pod{ID: meta.ID, Name: cfg.GetMetadata().GetName(), Namespace: cfg.GetMetadata().GetNamespace(), UID: cfg.GetMetadata().GetUid(), NetNS: meta.NetNSPath,
		Handler: meta.RuntimeHandler, Annotations: cfg.GetAnnotations(), CgroupParent: cfg.GetLinux().GetCgroupParent()}
	for _, m := range cfg.GetPortMappings() {
		p.Ports = append(p.Ports, cni.PortMapping{HostPort: m.GetHostPort(), ContainerPort: m.GetContainerPort(), Protocol: strings.ToLower(m.GetProtocol().String()), HostIP: m.GetHostIp()})
	}
	if d := cfg.GetDnsConfig(); d != nil {
		p.DNS = &cni.DNS{Servers: d.GetServers(), Searches: d.GetSearches(), Options: d.GetOptions()}
	}
	return p
}

// image gets what a shim's own sandbox may want to run. The controllers here
// get it themselves, if they need it.
func (m *making) image(ctx context.Context) error {
	if m.rt.Sandboxer != cristate.SandboxerShim || m.rt.DisablePauseImagePull {
		return nil
	}
	meta := m.pod.Meta()
	_, err := m.Images.EnsureSandboxImage(ctx, meta.RuntimeHandler, meta.Config)
	return err
}

func (m *making) start(ctx context.Context) error {
	meta := m.pod.Meta()
	inst, err := m.ctrl.Start(ctx, meta.ID)
	if took(m.timers.create, m.began, err, m.rt.Type) != nil {
		return err
	}
	m.record.Spec = inst.Spec
	m.pod.Change(func(p *cristate.PodMeta, st *cristate.PodStatus) {
		if l := inst.Labels[labelSELinux]; l != "" {
			p.ProcessLabel = l
		}
		st.State, st.Pid, st.Namespaces = cristate.PodReady, inst.Pid, m.Dirs.joined(*p, inst.Pid)
		if !inst.CreatedAt.IsZero() {
			st.CreatedAt = inst.CreatedAt
		}
	})
	return nil
}

// labelSELinux is where containerd's controllers tell the label of a pod's processes.
const labelSELinux = "selinux_label"

// complete takes the mark off the record: from now on the pod is there.
func (m *making) complete(ctx context.Context) error {
	ext, err := cristate.EncodePod(m.pod.Meta())
	if err != nil {
		return err
	}
	m.record.Extensions = map[string]typed.Any{cristate.ExtensionMetadata: ext}
	if _, err := m.view.Sandboxes().Update(ctx, m.record, "extensions", "spec"); err != nil {
		return err
	}
	return m.Pods.Add(m.pod)
}

// namespaces makes those that must be there before the pod's first process:
// that of users first, so that it owns the others (contract 7.1.5).
func (m *making) namespaces() error {
	meta := m.pod.Meta()
	spec := nspin.Spec{Paths: map[nspin.Kind]string{}}
	if meta.NetNSPath != "" {
		spec.Paths[nspin.Net] = meta.NetNSPath
	}
	users := modes(meta.Config).GetUsernsOptions()
	if users != nil && users.GetMode() == runtime.NamespaceMode_POD {
		spec.Paths[nspin.User] = m.Dirs.ns(meta.ID, nspin.User)
		spec.UIDs, spec.GIDs = mapping(users.GetUids()), mapping(users.GetGids())
	}
	// Without a process these are made now: those of a user namespace cannot be
	// made later, and a shim's sandbox may have none of its own.
	if m.rt.Sandboxer == cristate.SandboxerShim || m.rt.Sandboxer == cristate.SandboxerPauseless && spec.UIDs != nil {
		m.Dirs.own(meta, spec.Paths)
		spec.Hostname = meta.Config.GetHostname()
	}
	if len(spec.Paths) == 0 {
		return nil
	}
	return nspin.Make(spec)
}

func mapping(in []*runtime.IDMapping) idmap.Map {
	var out idmap.Map
	for _, m := range in {
		out = append(out, idmap.Range{Container: m.GetContainerId(), Host: m.GetHostId(), Size: m.GetLength()})
	}
	return out
}
