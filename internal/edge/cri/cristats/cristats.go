// Package cristats measures containers and pods for the CRI: CPU, memory,
// swap, pressure, input and output, processes, network and writable layer. All
// comes from the kernel and from the snapshotters; no shim is asked. One sick
// container - a group that does not answer, a layer that cannot be measured -
// is answered without numbers and never delays or fails the others.
package cristats

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

const (
	// patience is how long one group may take before the others go on without
	// it: much longer than on a host that is merely very busy.
	patience = time.Second
	// readers is how many groups are read at the same time for one request.
	readers = 4
	// layerLimit is how long the measurement of a layer may take.
	layerLimit = time.Minute
)

// Options say what is measured and how often. Pods and Containers are required.
type Options struct {
	Pods       *cristate.Index[*cristate.Pod]
	Containers *cristate.Index[*cristate.Container]
	// Usage measures a writable layer, in a goroutine of the sampler. Nil: there
	// are no layers.
	Usage func(ctx context.Context, snapshotter, key string) (snapshot.Usage, error)
	// Root is the directory in which a snapshotter keeps its layers, "" if that
	// is not known; nil is the same.
	Root func(snapshotter string) string
	// Period is the time between two samples of CPU usage (default 1 s); one
	// older than Retention (2 min) is not used. See Periods.
	Period, Retention time.Duration
	// LayerPeriod is the time between two measurements of a layer (10 s); it is
	// longer for one that takes long, and for a container that does not run.
	LayerPeriod time.Duration
	// Cgroup and Proc are where the kernel shows control groups and processes:
	// /sys/fs/cgroup and /proc.
	Cgroup, Proc string
	Log          *slog.Logger
}

// Periods reads stats_collect_period and stats_retention_period; "" is the
// default. ErrInvalidArgument names the key.
func Periods(c cristate.RuntimeConfig) (period, retention time.Duration, err error) {
	if period, err = duration("stats_collect_period", c.StatsCollectPeriod, time.Second); err != nil {
		return 0, 0, err
	}
	if retention, err = duration("stats_retention_period", c.StatsRetentionPeriod, 2*time.Minute); err != nil {
		return 0, 0, err
	}
	if retention < period {
		return 0, 0, fmt.Errorf("stats_retention_period %v is shorter than stats_collect_period %v: %w", retention, period, errdefs.ErrInvalidArgument)
	}
	return period, retention, nil
}

func duration(key, text string, otherwise time.Duration) (time.Duration, error) {
	if text == "" {
		return otherwise, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%s %q is no duration: %w", key, text, errdefs.ErrInvalidArgument)
	}
	if d == 0 {
		return otherwise, nil
	}
	return d, nil
}

// Service answers the requests for statistics. It is safe for concurrent use.
type Service struct {
	o       Options
	tree    tree
	limit   limiter
	readers sync.Pool // of *reader

	mu      sync.Mutex // guards the map
	entries map[string]*entry
}

// New makes a Service. It answers without Run too; the CPU usage is then an
// average between requests, or since the start.
func New(o Options) *Service {
	def := func(d *time.Duration, otherwise time.Duration) {
		if *d <= 0 {
			*d = otherwise
		}
	}
	def(&o.Period, time.Second)
	def(&o.Retention, 2*time.Minute)
	def(&o.LayerPeriod, 10*time.Second)
	if o.Cgroup == "" {
		o.Cgroup = "/sys/fs/cgroup"
	}
	if o.Proc == "" {
		o.Proc = "/proc"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Service{o: o, tree: tree{filepath.Clean(o.Cgroup), filepath.Clean(o.Proc)}, entries: map[string]*entry{}}
	s.readers.New = func() any { return &reader{} }
	return s
}

// ContainerStats measures a container. ErrNotFound. One that does not run has
// no more than its attributes and its writable layer.
func (s *Service) ContainerStats(ctx context.Context, id string) (*runtime.ContainerStats, error) {
	c, err := s.o.Containers.Get(id)
	if err != nil {
		return nil, err
	}
	all, err := s.containers(ctx, []*cristate.Container{c})
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// ListContainerStats measures the containers that match the filter; an id may
// be the beginning of one, an unknown one matches nothing.
func (s *Service) ListContainerStats(ctx context.Context, f *runtime.ContainerStatsFilter) ([]*runtime.ContainerStats, error) {
	id, pod := f.GetId(), f.GetPodSandboxId()
	if id != "" {
		c, err := s.o.Containers.Get(id)
		if err != nil {
			return nil, unlessNotFound(err)
		}
		id = c.ID()
	}
	if pod != "" {
		p, err := s.o.Pods.Get(pod)
		if err != nil {
			return nil, unlessNotFound(err)
		}
		pod = p.ID()
	}
	var match []*cristate.Container
	for _, c := range s.o.Containers.List() {
		m := c.Meta()
		if (id == "" || m.ID == id) && (pod == "" || m.SandboxID == pod) && has(m.Config.GetLabels(), f.GetLabelSelector()) {
			match = append(match, c)
		}
	}
	return s.containers(ctx, match)
}

// PodSandboxStats measures a pod and its running containers. ErrNotFound, and
// ErrUnavailable if the pod is not ready.
func (s *Service) PodSandboxStats(ctx context.Context, id string) (*runtime.PodSandboxStats, error) {
	p, err := s.o.Pods.Get(id)
	if err != nil {
		return nil, err
	}
	if p.Status().State != cristate.PodReady {
		return nil, fmt.Errorf("statistics of pod sandbox %s: it is not ready: %w", p.ID(), errdefs.ErrUnavailable)
	}
	all, err := s.pods(ctx, []*cristate.Pod{p})
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// ListPodSandboxStats measures the ready pods that match the filter.
func (s *Service) ListPodSandboxStats(ctx context.Context, f *runtime.PodSandboxStatsFilter) ([]*runtime.PodSandboxStats, error) {
	id := f.GetId()
	if id != "" {
		p, err := s.o.Pods.Get(id)
		if err != nil {
			return nil, unlessNotFound(err)
		}
		id = p.ID()
	}
	var match []*cristate.Pod
	for _, p := range s.ready() {
		if m := p.Meta(); (id == "" || m.ID == id) && has(m.Config.GetLabels(), f.GetLabelSelector()) {
			match = append(match, p)
		}
	}
	return s.pods(ctx, match)
}

// ready are the pods that can be measured.
func (s *Service) ready() []*cristate.Pod {
	var ready []*cristate.Pod
	for _, p := range s.o.Pods.List() {
		if p.Status().State == cristate.PodReady {
			ready = append(ready, p)
		}
	}
	return ready
}

// running are the running containers by pod.
func (s *Service) running() map[string][]*cristate.Container {
	by := map[string][]*cristate.Container{}
	for _, c := range s.o.Containers.List() {
		if isRunning(c.Status()) {
			pod := c.Meta().SandboxID
			by[pod] = append(by[pod], c)
		}
	}
	return by
}

func isRunning(st cristate.Status) bool {
	return st.Pid != 0 && st.State() == runtime.ContainerState_CONTAINER_RUNNING
}

func unlessNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// has says whether labels fulfil a selector.
func has(labels, selector map[string]string) bool {
	for k, want := range selector {
		if got, ok := labels[k]; !ok || got != want {
			return false
		}
	}
	return true
}
