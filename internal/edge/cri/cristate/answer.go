package cristate

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ImageNames is how an image is shown beside a container.
type ImageNames struct {
	// ID is the digest of its configuration, Digest the reference with the
	// digest of its manifest, Tag the reference with a tag; the last two may be "".
	ID, Digest, Tag string
}

// Ref is a container's image_ref: with the manifest's digest if there is one
// (contract 13.24).
func (n ImageNames) Ref() string { return cmp.Or(n.Digest, n.ID) }

// Notifier makes events of what happens: with the status of the pod and of all
// its containers, so that the kubelet need not ask.
type Notifier struct {
	Pods       *Index[*Pod]
	Containers *Index[*Container]
	// Names finds an image's names by its id; what is not known is "".
	Names  func(imageID string) ImageNames
	Events *Events
}

// Notify publishes that kind happened to the container, or to the pod itself,
// whose id is given as the container's then. A nil Notifier does nothing.
func (n *Notifier) Notify(kind runtime.ContainerEventType, id, podID string) {
	if n == nil {
		return
	}
	e := &runtime.ContainerEventResponse{ContainerId: id, ContainerEventType: kind, CreatedAt: time.Now().UnixNano()}
	if p, err := n.Pods.Get(podID); err == nil {
		e.PodSandboxStatus = p.Answer()
	}
	e.ContainersStatuses = n.Statuses(podID)
	n.Events.Publish(e)
}

// Statuses are those of a pod's containers.
func (n *Notifier) Statuses(podID string) []*runtime.ContainerStatus {
	var all []*runtime.ContainerStatus
	for _, c := range n.Containers.Where(InPod(podID)) {
		all = append(all, c.Answer(n.Names(c.Meta().ImageRef)))
	}
	return all
}

// State is what clients see: a pod is ready, or it is not.
func (s PodState) State() runtime.PodSandboxState {
	if s == PodReady || s == PodRecovering {
		return runtime.PodSandboxState_SANDBOX_READY
	}
	return runtime.PodSandboxState_SANDBOX_NOTREADY
}

// Answer is the pod as PodSandboxStatus tells it (contract 7.1.8).
func (p *Pod) Answer() *runtime.PodSandboxStatus {
	m, st := p.Meta(), p.Status()
	out := &runtime.PodSandboxStatus{
		Id: m.ID, Metadata: m.Config.GetMetadata(), State: st.State.State(), CreatedAt: st.CreatedAt.UnixNano(), Network: &runtime.PodSandboxNetworkStatus{},
		Linux:  &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{Options: m.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()}},
		Labels: m.Config.GetLabels(), Annotations: m.Config.GetAnnotations(), RuntimeHandler: m.RuntimeHandler,
	}
	if st.Disconnected {
		return out
	}
	out.Network.Ip = m.IP
	for _, ip := range m.AdditionalIPs {
		out.Network.AdditionalIps = append(out.Network.AdditionalIps, &runtime.PodIP{Ip: ip})
	}
	return out
}

// Item is the pod as lists show it.
func (p *Pod) Item() *runtime.PodSandbox {
	p.mu.Lock() // not Status, which makes copies: all pods are asked, once a second
	defer p.mu.Unlock()
	m, st := &p.meta, &p.status
	return &runtime.PodSandbox{Id: m.ID, Metadata: m.Config.GetMetadata(), State: st.State.State(), CreatedAt: st.CreatedAt.UnixNano(),
		Labels: m.Config.GetLabels(), Annotations: m.Config.GetAnnotations(), RuntimeHandler: m.RuntimeHandler}
}

// Answer is the container as ContainerStatus tells it (contract 7.1.15).
func (c *Container) Answer(image ImageNames) *runtime.ContainerStatus {
	m, st, facts := c.Meta(), c.Status(), c.Facts()
	spec := &runtime.ImageSpec{Image: cmp.Or(image.Tag, m.Config.GetImage().GetImage()), UserSpecifiedImage: m.Config.GetImage().GetUserSpecifiedImage(),
		Annotations: m.Config.GetImage().GetAnnotations()}
	out := &runtime.ContainerStatus{
		Id: m.ID, Metadata: m.Config.GetMetadata(), State: st.State(), CreatedAt: st.CreatedAt, StartedAt: st.StartedAt, FinishedAt: st.FinishedAt, ExitCode: st.ExitCode,
		Image: spec, ImageRef: cmp.Or(image.Ref(), m.ImageRef), ImageId: m.ImageRef, Reason: st.Reason, Message: st.Message, Labels: m.Config.GetLabels(),
		Annotations: m.Config.GetAnnotations(), Mounts: m.Config.GetMounts(), LogPath: m.LogPath, Resources: st.Resources, User: facts.User,
	}
	if out.State == runtime.ContainerState_CONTAINER_UNKNOWN {
		out.Reason, out.ExitCode = cmp.Or(out.Reason, ReasonUnknown), ExitUnknown
	}
	if out.State == runtime.ContainerState_CONTAINER_EXITED && out.Reason == "" {
		out.Reason = ReasonError
		if out.ExitCode == 0 {
			out.Reason = ReasonCompleted
		}
	}
	out.StopSignal = signalOf(m)
	return out
}

// signalOf is the signal of a container's stop as an enumeration.
func signalOf(m ContainerMeta) runtime.Signal {
	if s := m.Config.GetStopSignal(); s != 0 {
		return s
	}
	name := strings.TrimPrefix(strings.ToUpper(m.StopSignal), "SIG")
	switch n, err := strconv.Atoi(name); {
	case err != nil:
	case n < rtMin:
		name = strings.TrimPrefix(unix.SignalName(unix.Signal(n)), "SIG")
	case n == rtMin:
		name = "RTMIN"
	case n <= rtMin+15:
		name = "RTMIN+" + strconv.Itoa(n-rtMin)
	case n < rtMax:
		name = "RTMAX-" + strconv.Itoa(rtMax-n)
	default:
		name = "RTMAX"
	}
	if s, ok := runtime.Signal_value["SIGNAL_SIG"+strings.NewReplacer("+", "PLUS", "-", "MINUS").Replace(name)]; ok {
		return runtime.Signal(s)
	}
	return runtime.Signal_SIGNAL_SIGTERM // which is what a stop sends then
}

// The real-time signals as programs see them.
const rtMin, rtMax = 34, 64

// Item is the container as lists show it.
func (c *Container) Item() *runtime.Container {
	m, st := c.Meta(), c.Status()
	return &runtime.Container{Id: m.ID, PodSandboxId: m.SandboxID, Metadata: m.Config.GetMetadata(), Image: m.Config.GetImage(), ImageRef: m.ImageRef, ImageId: m.ImageRef,
		State: st.State(), CreatedAt: st.CreatedAt, Labels: m.Config.GetLabels(), Annotations: m.Config.GetAnnotations()}
}

// Newest sorts what lists answer: the newest first, so that what does not fit
// is the oldest (promise P23).
func Newest[T interface{ GetCreatedAt() int64 }](items []T) {
	slices.SortStableFunc(items, func(a, b T) int { return cmp.Compare(b.GetCreatedAt(), a.GetCreatedAt()) })
}
