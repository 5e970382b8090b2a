// Package cricontainer is the life of containers in pods: how they are made,
// started, stopped, changed, checkpointed and removed, and how they are found
// again by a daemon that starts.
//
// It promises that a container is made once, however often its creation is
// repeated; that what a failed or interrupted creation left goes away; that no
// exit code is lost; and that a container whose shim, mount or plugin hangs
// delays no other.
package cricontainer

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/criimage"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/attempt"
	"github.com/gantryd/gantry/internal/lib/fault"
)

// Images is criimage.
type Images interface {
	// Resolve finds an image by id or reference. ErrNotFound.
	Resolve(ctx context.Context, ref, handler string) (criimage.Image, error)
	// EnsureUnpacked makes its snapshot if another client brought it here.
	EnsureUnpacked(ctx context.Context, leased view.Records, img criimage.Image) error
}

// NRI is told of the life of containers and may change what is made (contract
// 7.3.23). An error of a hook that comes before a step ends the operation; the
// others cannot fail.
type NRI interface {
	// CreateContainer may change the specification.
	CreateContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container, spec *specs.Spec) error
	PostCreateContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container)
	StartContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) error
	PostStartContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container)
	// UpdateContainer may change the resources.
	UpdateContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container, res *runtime.LinuxContainerResources) (*runtime.LinuxContainerResources, error)
	PostUpdateContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container)
	StopContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) error
	// ContainerExited is StopContainer for one that has ended by itself. It does
	// not wait.
	ContainerExited(pod *cristate.Pod, c *cristate.Container)
	RemoveContainer(ctx context.Context, pod *cristate.Pod, c *cristate.Container) error
}

// Endpoint is a shim that runs already, for the tasks of a pod that it keeps
// (contract 5.2.10).
type Endpoint struct {
	Address string
	Version uint32
}

// Deps is what the Service works with. All of it outlives the Service.
type Deps struct {
	Views      view.Source
	Events     event.Bus
	Pods       *cristate.Index[*cristate.Pod]
	Containers *cristate.Index[*cristate.Container]
	Notifier   *cristate.Notifier // nil tells nobody
	Images     Images
	NRI        NRI // nil if there is none
	Config     cristate.RuntimeConfig
	// Host are the facts of the host and of a runtime handler, now.
	Host func(ctx context.Context, rt cristate.Runtime) crispec.Host
	// Base is a handler's base_runtime_spec, nil if it has none; nil is none at all.
	Base func(rt cristate.Runtime) *specs.Spec
	// CDI changes a specification for devices named vendor/class=name; nil
	// refuses them.
	CDI func(s *specs.Spec, devices []string) error
	// PodDir and PodShm are where a pod's files and its /dev/shm are.
	PodDir, PodShm func(podID string) string
	// Endpoint is the shim of a pod whose controller has one; nil if none has.
	Endpoint func(ctx context.Context, podID string) (Endpoint, error)
	// WritesLogs says whether the shim of a runtime keeps logs by itself, in
	// Kubernetes' form; nil is yes. For one that does not, the Service copies.
	WritesLogs func(ctx context.Context, rt container.Runtime) bool
	// Root and State are the CRI's directories (contract 7.3.29).
	Root, State string
	Limits      Limits
	// Faults are cri.container.snapshot, .record, .status, .complete, .paused,
	// .task-created, .task-started, .stopped, .task-deleted, .record-deleted.
	Faults *fault.Points
	Log    *slog.Logger
}

// Limits bound what the Service waits for; zero is the default.
type Limits struct {
	Create time.Duration // the whole creation; 4 min
	Start  time.Duration // a task's creation and start; 2 min
	Kill   time.Duration // from the first SIGKILL to the end; 1 min
	Remove time.Duration // of what belongs to a container; 1 min
	Linger time.Duration // that a creation goes on without its caller; 10 s
}

func (l Limits) withDefaults() Limits {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&l.Create, 4*time.Minute)
	set(&l.Start, 2*time.Minute)
	set(&l.Kill, time.Minute)
	set(&l.Remove, time.Minute)
	set(&l.Linger, 10*time.Second)
	return l
}

// Service runs containers. It is safe for concurrent use; operations on one
// container follow each other. Ids may be shortened as the index allows.
type Service struct {
	Deps
	view     view.View
	creating *attempt.Group[string]
	starts   sync.WaitGroup                        // starts under way; each has its limit
	user     atomic.Pointer[runtime.ContainerUser] // of the last container

	sub   event.Subscription
	found []*cristate.Container // by Recover, for Run to look at
	half  []container.Container // records of creations that were interrupted

	mu        sync.Mutex // guards what follows; never held over I/O
	copies    map[string]*copier
	starting  map[string]chan struct{} // closed when a start under way is over
	signalled map[string]struct{}      // that got their stop signal (contract 7.1.13)
	cut       map[string]*cutStart     // found by Recover, and not stored as started
}

// New makes a Service. Recover, then Run, make it live.
func New(d Deps) (*Service, error) {
	d.Limits = d.Limits.withDefaults()
	v, err := d.Views.In(cristate.Namespace, "")
	if err != nil {
		return nil, fmt.Errorf("containers of the CRI: %w", err)
	}
	s := &Service{Deps: d, view: v, copies: map[string]*copier{}, starting: map[string]chan struct{}{}, signalled: map[string]struct{}{}, cut: map[string]*cutStart{}}
	s.creating = attempt.New(d.Limits.Create, d.Limits.Linger, s.discard)
	return s, nil
}

// dir is where a container's status, volumes and checkpoints are (contract
// 7.3.29), stateDir where its FIFOs are.
func (s *Service) dir(id string) string      { return filepath.Join(s.Root, "containers", id) }
func (s *Service) stateDir(id string) string { return filepath.Join(s.State, "containers", id) }

func (s *Service) tasks() task.Store { return restoring{s.view.Tasks(), s.dir, s.Log} }

// pod is a container's pod, nil if it is gone.
func (s *Service) pod(c *cristate.Container) *cristate.Pod {
	p, err := s.Pods.Get(c.PodID())
	if err != nil {
		return nil
	}
	return p
}

func (s *Service) notify(kind runtime.ContainerEventType, c *cristate.Container) {
	s.Notifier.Notify(kind, c.ID(), c.PodID())
}
