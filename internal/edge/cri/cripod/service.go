// Package cripod is the life of pods, as the CRI orders it: made, stopped,
// updated, removed and found again. The record of a pod is written first and
// removed last, and says whether the pod is complete; so whatever a pod has -
// namespaces, an address, mounts, a lease, directories, a process - can be
// found from a record, and nothing is left behind by an operation that is
// broken off, however it is. The controllers "podsandbox", a pod held together
// by a pause container, and "pauseless", one held together by pinned
// namespaces alone, are here too.
package cripod

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cni"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/metrics"
	"github.com/gantryd/gantry/internal/lib/attempt"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

// Network is cni.Network.
type Network interface {
	Setup(ctx context.Context, p cni.Pod) (cni.Result, error)
	Teardown(ctx context.Context, id string) error
	Adopt(ctx context.Context, p cni.Pod) error
	Reclaim(keep func(id string) bool)
}

// Containers are the containers of pods.
type Containers interface {
	// StopAll stops those of a pod, without grace.
	StopAll(ctx context.Context, podID string) error
	// RemoveAll removes them.
	RemoveAll(ctx context.Context, podID string) error
	// CheckpointPod, RestorePod and Restored are cricontainer's.
	CheckpointPod(ctx context.Context, podID string, ids []string, to *os.Root, p cristate.PodCheckpoint) error
	RestorePod(ctx context.Context, st *attempt.Stage, pod *cristate.Pod, from *os.Root, p cristate.PodCheckpoint, configs []*runtime.ContainerConfig) error
	Restored(podID, checkpoint string, configs []*runtime.ContainerConfig) ([]*runtime.RestoredContainer, error)
}

// Images finds, and pulls if need be, what a runtime handler's pause
// containers run.
type Images interface {
	EnsureSandboxImage(ctx context.Context, handler string, cfg *runtime.PodSandboxConfig) (Image, error)
}

// NRI is asked by plug-ins of the node. An error of Run refuses the pod.
type NRI interface {
	RunPodSandbox(ctx context.Context, p *cristate.Pod) error
	StopPodSandbox(ctx context.Context, p *cristate.Pod) error
	RemovePodSandbox(ctx context.Context, p *cristate.Pod) error
	UpdatePodSandbox(ctx context.Context, p *cristate.Pod, overhead, resources *runtime.LinuxContainerResources) error
	PostUpdatePodSandbox(ctx context.Context, p *cristate.Pod) error
}

// Labels are those of SELinux.
type Labels interface {
	// Make chooses a pod's labels; both may be "". vm says that its runtime runs
	// virtual machines.
	Make(cfg *runtime.PodSandboxConfig, vm bool) (process, mount string, err error)
	// Reserve keeps a label that is in use from being chosen again, until Release.
	Reserve(process string)
	Release(process string)
}

// Deps is what a Service works with. NRI and Labels may be nil.
type Deps struct {
	Views       view.Source
	Controllers sandbox.Controllers
	Pods        *cristate.Index[*cristate.Pod]
	Config      cristate.RuntimeConfig
	Dirs        Dirs
	Network     Network
	Images      Images
	Containers  Containers
	NRI         NRI
	Labels      Labels
	Notify      *cristate.Notifier
	Metrics     prometheus.Registerer // may be nil
	Log         *slog.Logger
	Faults      *fault.Points
}

// Dirs are where the files of pods are (contract 7.3.29).
type Dirs struct {
	// Root and State are the CRI's own: <root>/io.containerd.grpc.v1.cri.
	Root, State string
	// NetNS holds the network namespaces.
	NetNS string
}

// Of is the directory of a pod's files: hostname, hosts, resolv.conf.
func (d Dirs) Of(id string) string { return filepath.Join(d.Root, "sandboxes", id) }

// StateOf is the directory of a pod's files that do not: shm, and what its
// controller keeps.
func (d Dirs) StateOf(id string) string { return filepath.Join(d.State, "sandboxes", id) }

// Shm is where a pod's /dev/shm is mounted.
func (d Dirs) Shm(id string) string { return filepath.Join(d.StateOf(id), "shm") }

// netNS is the path of a pod's network namespace. It follows from the id, so
// that a crash cannot leave one that nothing names.
func (d Dirs) netNS(id string) string {
	return filepath.Join(d.NetNS, fmt.Sprintf("cni-%s-%s-%s-%s-%s", id[:8], id[8:12], id[12:16], id[16:20], id[20:32]))
}

// ns is the path of another pinned namespace of a pod.
func (d Dirs) ns(id string, kind nspin.Kind) string {
	return filepath.Join(d.StateOf(id), "ns", string(kind))
}

// Limits of operations that come without a deadline of their own.
const (
	runLimit  = 4 * time.Minute // what the kubelet waits
	linger    = 10 * time.Second
	stopLimit = 2 * time.Minute
	undoLimit = time.Minute
	askLimit  = 10 * time.Second // for the state of a pod
)

// timers are the metrics of pods (contract 9.1.8).
type timers struct{ connect, disconnect, create, stop *prometheus.HistogramVec }

func newTimers(r prometheus.Registerer) timers {
	return timers{metrics.Timer(r, "sandbox_create_network", "time to connect a pod to its network"), metrics.Timer(r, "sandbox_delete_network", "time to disconnect a pod"),
		metrics.Timer(r, "sandbox_runtime_create", "time to make and start a pod's sandbox", "runtime"), metrics.Timer(r, "sandbox_runtime_stop", "time to stop a pod's sandbox", "runtime")}
}

// took notes what a step took that succeeded.
func took(t *prometheus.HistogramVec, begin time.Time, err error, labels ...string) error {
	if err == nil {
		t.WithLabelValues(labels...).Observe(time.Since(begin).Seconds())
	}
	return err
}

// Service runs pods. It is safe for concurrent use; operations on one pod are
// kept apart, those on different ones never wait for each other.
type Service struct {
	Deps
	timers timers

	group *attempt.Group[string]
	life  context.Context // of the goroutines that wait for pods to end
	end   context.CancelFunc
	wg    sync.WaitGroup
	kick  chan struct{} // wakes Serve

	mu      sync.Mutex
	half    map[string]*cristate.Pod // pods that are not complete and must go
	unknown map[string]*cristate.Pod // complete ones whose state could not be told
}

// New makes a Service without pods; Recover finds those there are.
func New(d Deps) *Service {
	s := &Service{Deps: d, timers: newTimers(d.Metrics), kick: make(chan struct{}, 1), half: map[string]*cristate.Pod{}, unknown: map[string]*cristate.Pod{}}
	s.life, s.end = context.WithCancel(context.Background())
	s.group = attempt.New(runLimit, linger, s.discard)
	return s
}

// Close ends what runs in the background. Pods go on.
func (s *Service) Close(ctx context.Context) error {
	err := s.group.Wait(ctx) // which may make more of them
	s.end()
	s.wg.Wait()
	return err
}

// Stages are the pods being made, by name, and how far they are.
func (s *Service) Stages() map[string]string { return s.group.Stages() }

// controller opens the controller of a sandboxer.
func (s *Service) controller(name string) (sandbox.Controller, error) {
	return s.Controllers.Controller(cristate.Namespace, name)
}

// Handler is the runtime handler a pod is run by: the one asked for, or the one
// that its annotation for workloads that are not trusted demands.
// ErrInvalidArgument, ErrNotFound.
func (s *Service) Handler(cfg *runtime.PodSandboxConfig, name string) (asked string, rt cristate.Runtime, err error) {
	if cfg.GetAnnotations()[cristate.AnnotationUntrustedWorkload] == "true" {
		sc := cfg.GetLinux().GetSecurityContext()
		ns := sc.GetNamespaceOptions()
		switch {
		case name != "" && name != untrusted:
			return "", cristate.Runtime{}, fmt.Errorf("a workload that is not trusted names the runtime handler %q: %w", name, errdefs.ErrInvalidArgument)
		case sc.GetPrivileged(), ns.GetNetwork() == runtime.NamespaceMode_NODE, ns.GetPid() == runtime.NamespaceMode_NODE, ns.GetIpc() == runtime.NamespaceMode_NODE:
			return "", cristate.Runtime{}, fmt.Errorf("a workload that is not trusted must not have access to the host: %w", errdefs.ErrInvalidArgument)
		}
		name = untrusted
	}
	_, rt, err = s.Config.Handler(name)
	return name, rt, err
}

const untrusted = "untrusted"
