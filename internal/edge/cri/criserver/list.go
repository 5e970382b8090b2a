package criserver

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

const (
	// fits is how much a classic list may hold: a message has 16 MiB at most.
	// What is over are the oldest, left out rather than failing the node (promise P23).
	fits = 15 << 20
	// fitsOutput is how much of a command's output an answer holds, in bytes: the
	// kubelet takes messages of 16 MiB.
	fitsOutput = 16<<20 - 1024
	// chunk is about how much one message of a stream holds, in bytes.
	chunk = 1 << 20
)

// fit cuts items, the newest first, to what an answer can hold.
func fit[T proto.Message](s *Server, what string, items []T) []T {
	total := 0
	for i, m := range items {
		if total += size(m); total > fits {
			s.d.Log.Warn("a list is cut: it does not fit into one message, use the streaming call", "list", what, "left out", len(items)-i)
			return items[:i]
		}
	}
	return items
}

// fitOutput cuts what a command printed to what an answer can hold: what is
// over of the one stream may be used by the other.
func (s *Server) fitOutput(r *runtime.ExecSyncResponse) *runtime.ExecSyncResponse {
	out, errs := len(r.Stdout), len(r.Stderr)
	if out+errs > fitsOutput {
		errs = min(errs, max(fitsOutput/2, fitsOutput-out))
		out = min(out, fitsOutput-errs)
		s.d.Log.Warn("the output of a command is cut: it does not fit into one message", "left out", len(r.Stdout)-out+len(r.Stderr)-errs)
		r.Stdout, r.Stderr = r.Stdout[:out], r.Stderr[:errs]
	}
	return r
}

// stream sends items in chunks; each is in exactly one. Nothing is sent for none.
func stream[T proto.Message](items []T, send func([]T) error) error {
	for len(items) > 0 {
		total, n := 0, 0
		for n < len(items) && (n == 0 || total+size(items[n]) <= chunk) {
			total += size(items[n])
			n++
		}
		if err := send(items[:n]); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

func matches(labels, selector map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// podItems answers a filter: an id may be the beginning of one; what nothing
// has is an empty list (contract 7.1.9).
func (s *Server) podItems(f *runtime.PodSandboxFilter) []*runtime.PodSandbox {
	all := s.pods.List()
	if id := f.GetId(); id != "" {
		p, err := s.pods.Get(id)
		if err != nil {
			return nil
		}
		all = []*cristate.Pod{p}
	}
	var items []*runtime.PodSandbox
	for _, p := range all {
		item := p.Item()
		if st := f.GetState(); st != nil && st.State != item.State || !matches(item.Labels, f.GetLabelSelector()) {
			continue
		}
		items = append(items, item)
	}
	cristate.Newest(items)
	return items
}

// ListPodSandbox lists pods, the newest first.
func (s *Server) ListPodSandbox(_ context.Context, r *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	defer s.timers.done("sandbox_list", time.Now(), nil)
	return &runtime.ListPodSandboxResponse{Items: fit(s, "pod sandboxes", s.podItems(r.GetFilter()))}, nil
}

// StreamPodSandboxes lists pods of any number.
func (s *Server) StreamPodSandboxes(r *runtime.StreamPodSandboxesRequest, out grpc.ServerStreamingServer[runtime.StreamPodSandboxesResponse]) error {
	return s.timers.done("stream_sandbox_list", time.Now(), stream(s.podItems(r.GetFilter()), func(items []*runtime.PodSandbox) error {
		return out.Send(&runtime.StreamPodSandboxesResponse{PodSandboxes: items})
	}))
}

func (s *Server) containerItems(f *runtime.ContainerFilter) []*runtime.Container {
	all := s.all.List()
	if id := f.GetId(); id != "" {
		c, err := s.all.Get(id)
		if err != nil {
			return nil
		}
		all = []*cristate.Container{c}
	}
	pod := f.GetPodSandboxId()
	if pod != "" {
		p, err := s.pods.Get(pod)
		if err != nil {
			return nil
		}
		pod = p.ID()
	}
	var items []*runtime.Container
	for _, c := range all {
		if st := f.GetState(); pod != "" && c.PodID() != pod || st != nil && st.State != c.Status().State() {
			continue
		}
		item := c.Item()
		if !matches(item.Labels, f.GetLabelSelector()) {
			continue
		}
		items = append(items, item)
	}
	cristate.Newest(items)
	return items
}

// ListContainers lists containers, the newest first.
func (s *Server) ListContainers(_ context.Context, r *runtime.ListContainersRequest) (*runtime.ListContainersResponse, error) {
	defer s.timers.done("container_list", time.Now(), nil)
	return &runtime.ListContainersResponse{Containers: fit(s, "containers", s.containerItems(r.GetFilter()))}, nil
}

// StreamContainers lists containers of any number.
func (s *Server) StreamContainers(r *runtime.StreamContainersRequest, out grpc.ServerStreamingServer[runtime.StreamContainersResponse]) error {
	return s.timers.done("stream_container_list", time.Now(), stream(s.containerItems(r.GetFilter()), func(items []*runtime.Container) error {
		return out.Send(&runtime.StreamContainersResponse{Containers: items})
	}))
}

// ContainerStats measures one container (contract 7.1.20).
func (s *Server) ContainerStats(ctx context.Context, r *runtime.ContainerStatsRequest) (*runtime.ContainerStatsResponse, error) {
	c, err := s.all.Get(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	st, err := s.d.Stats.ContainerStats(ctx, c.ID())
	return &runtime.ContainerStatsResponse{Stats: st}, err
}

// ListContainerStats measures containers.
func (s *Server) ListContainerStats(ctx context.Context, r *runtime.ListContainerStatsRequest) (*runtime.ListContainerStatsResponse, error) {
	all, err := s.d.Stats.ListContainerStats(ctx, r.GetFilter())
	return &runtime.ListContainerStatsResponse{Stats: fit(s, "container stats", all)}, err
}

// StreamContainerStats measures containers of any number.
func (s *Server) StreamContainerStats(r *runtime.StreamContainerStatsRequest, out grpc.ServerStreamingServer[runtime.StreamContainerStatsResponse]) error {
	all, err := s.d.Stats.ListContainerStats(out.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return stream(all, func(items []*runtime.ContainerStats) error {
		return out.Send(&runtime.StreamContainerStatsResponse{ContainerStats: items})
	})
}

// PodSandboxStats measures one pod.
func (s *Server) PodSandboxStats(ctx context.Context, r *runtime.PodSandboxStatsRequest) (*runtime.PodSandboxStatsResponse, error) {
	p, err := s.pods.Get(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	st, err := s.d.Stats.PodSandboxStats(ctx, p.ID())
	return &runtime.PodSandboxStatsResponse{Stats: st}, err
}

// ListPodSandboxStats measures pods.
func (s *Server) ListPodSandboxStats(ctx context.Context, r *runtime.ListPodSandboxStatsRequest) (*runtime.ListPodSandboxStatsResponse, error) {
	all, err := s.d.Stats.ListPodSandboxStats(ctx, r.GetFilter())
	return &runtime.ListPodSandboxStatsResponse{Stats: fit(s, "pod sandbox stats", all)}, err
}

// StreamPodSandboxStats measures pods of any number.
func (s *Server) StreamPodSandboxStats(r *runtime.StreamPodSandboxStatsRequest, out grpc.ServerStreamingServer[runtime.StreamPodSandboxStatsResponse]) error {
	all, err := s.d.Stats.ListPodSandboxStats(out.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return stream(all, func(items []*runtime.PodSandboxStats) error {
		return out.Send(&runtime.StreamPodSandboxStatsResponse{PodSandboxStats: items})
	})
}

// ListMetricDescriptors tells what the metrics mean (contract 7.1.21, 9.2.1).
func (s *Server) ListMetricDescriptors(context.Context, *runtime.ListMetricDescriptorsRequest) (*runtime.ListMetricDescriptorsResponse, error) {
	return &runtime.ListMetricDescriptorsResponse{Descriptors: s.d.Stats.MetricDescriptors()}, nil
}

// ListPodSandboxMetrics gives the metrics of all pods.
func (s *Server) ListPodSandboxMetrics(ctx context.Context, _ *runtime.ListPodSandboxMetricsRequest) (*runtime.ListPodSandboxMetricsResponse, error) {
	all, err := s.d.Stats.PodSandboxMetrics(ctx)
	return &runtime.ListPodSandboxMetricsResponse{PodMetrics: fit(s, "pod sandbox metrics", all)}, err
}

// StreamPodSandboxMetrics gives the metrics of pods of any number.
func (s *Server) StreamPodSandboxMetrics(_ *runtime.StreamPodSandboxMetricsRequest, out grpc.ServerStreamingServer[runtime.StreamPodSandboxMetricsResponse]) error {
	all, err := s.d.Stats.PodSandboxMetrics(out.Context())
	if err != nil {
		return err
	}
	return stream(all, func(items []*runtime.PodSandboxMetrics) error {
		return out.Send(&runtime.StreamPodSandboxMetricsResponse{PodSandboxMetrics: items})
	})
}
