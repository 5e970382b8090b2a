package criserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cni"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/cri/cristream"
	"github.com/gantryd/gantry/internal/edge/metrics/metricstest"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
)

// world is all that a server calls; it notes the calls.
type world struct {
	runtime.UnimplementedImageServiceServer
	calls   []string
	network error
	ready   error
	err     error // of all calls
	stats   []*runtime.ContainerStats
}

func (w *world) call(format string, args ...any) error {
	w.calls = append(w.calls, fmt.Sprintf(format, args...))
	return w.err
}

func (w *world) Run(_ context.Context, c *runtime.PodSandboxConfig, handler string) (string, error) {
	return "new", w.call("run %s %s", c.Metadata.Name, handler)
}
func (w *world) Stop(_ context.Context, id string) error   { return w.call("stop pod %s", id) }
func (w *world) Remove(_ context.Context, id string) error { return w.call("remove pod %s", id) }
func (w *world) UpdateResources(_ context.Context, id string, _, _ *runtime.LinuxContainerResources) error {
	return w.call("update pod %s", id)
}
func (w *world) Info(_ context.Context, id string) (map[string]string, error) {
	return map[string]string{"info": id}, nil
}
func (w *world) Names(id string) cristate.ImageNames {
	return cristate.ImageNames{ID: id, Digest: "example.com/i@" + id, Tag: "example.com/i:1"}
}
func (w *world) Status(context.Context, string) error { return w.network }
func (w *world) UpdatePodCIDR(_ context.Context, cidr string) error {
	return w.call("cidr %s", cidr)
}

// containers are the world's where names would meet.
type containers struct{ *world }

func (c containers) Create(_ context.Context, pod string, config *runtime.ContainerConfig, _ *runtime.PodSandboxConfig) (string, error) {
	return "new", c.call("create %s in %s", config.Metadata.Name, pod)
}
func (c containers) Start(_ context.Context, id string) error { return c.call("start %s", id) }
func (c containers) Stop(_ context.Context, id string, grace time.Duration) error {
	return c.call("stop %s %v", id, grace)
}
func (c containers) Remove(_ context.Context, id string) error { return c.call("remove %s", id) }
func (c containers) UpdateResources(_ context.Context, id string, _ *runtime.LinuxContainerResources, _ map[string]string) error {
	return c.call("update %s", id)
}
func (c containers) ReopenLog(_ context.Context, id string) error { return c.call("reopen %s", id) }
func (c containers) Checkpoint(_ context.Context, id, location string, timeout time.Duration) error {
	return c.call("checkpoint %s %s %v", id, location, timeout)
}
func (c containers) ExecSync(_ context.Context, id string, command []string, timeout time.Duration) (cristream.Result, error) {
	return cristream.Result{Stdout: []byte("out"), ExitCode: 3}, c.call("exec %s %q %v", id, command, timeout)
}
func (c containers) Exec(_ context.Context, r *runtime.ExecRequest) (*runtime.ExecResponse, error) {
	return &runtime.ExecResponse{Url: "exec/" + r.ContainerId}, nil
}
func (c containers) Attach(_ context.Context, r *runtime.AttachRequest) (*runtime.AttachResponse, error) {
	return &runtime.AttachResponse{Url: "attach/" + r.ContainerId}, nil
}
func (c containers) PortForward(_ context.Context, r *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	return &runtime.PortForwardResponse{Url: "forward/" + r.PodSandboxId}, nil
}
func (c containers) Info(ctx context.Context, id string) (map[string]string, error) {
	return c.world.Info(ctx, id)
}

// network is the world's network.
type network struct{ *world }

func (n network) Info() map[string]cni.Info {
	return map[string]cni.Info{"default": {LoadStatus: "OK"}, "crun": {LoadStatus: "bad"}}
}

// stats are the world's statistics.
type stats struct{ *world }

func (s stats) ContainerStats(_ context.Context, id string) (*runtime.ContainerStats, error) {
	return &runtime.ContainerStats{Attributes: &runtime.ContainerAttributes{Id: id}}, nil
}
func (s stats) ListContainerStats(context.Context, *runtime.ContainerStatsFilter) ([]*runtime.ContainerStats, error) {
	return s.stats, nil
}
func (s stats) PodSandboxStats(_ context.Context, id string) (*runtime.PodSandboxStats, error) {
	return &runtime.PodSandboxStats{Attributes: &runtime.PodSandboxAttributes{Id: id}}, nil
}
func (s stats) ListPodSandboxStats(context.Context, *runtime.PodSandboxStatsFilter) ([]*runtime.PodSandboxStats, error) {
	var all []*runtime.PodSandboxStats
	for _, c := range s.stats {
		all = append(all, &runtime.PodSandboxStats{Attributes: &runtime.PodSandboxAttributes{Id: c.Attributes.Id, Labels: c.Attributes.Labels}})
	}
	return all, nil
}
func (s stats) MetricDescriptors() []*runtime.MetricDescriptor {
	return []*runtime.MetricDescriptor{{Name: "m"}}
}
func (s stats) PodSandboxMetrics(context.Context) ([]*runtime.PodSandboxMetrics, error) {
	var all []*runtime.PodSandboxMetrics
	for _, c := range s.stats {
		all = append(all, &runtime.PodSandboxMetrics{PodSandboxId: c.Attributes.Id, Metrics: []*runtime.Metric{{Name: c.Attributes.Labels["text"]}}})
	}
	return all, nil
}

// harness is a server with clients.
type harness struct {
	*world
	d    Deps
	open atomic.Bool
	conn *grpc.ClientConn
	rt   runtime.RuntimeServiceClient
	ctx  context.Context
}

func serve(t *testing.T, change ...func(*Deps)) *harness {
	t.Helper()
	h := &harness{world: &world{}}
	pods, all := cristate.NewPods(), cristate.NewContainers()
	h.d = Deps{Notifier: &cristate.Notifier{Pods: pods, Containers: all, Names: h.Names, Events: cristate.NewEvents()},
		Pods: h.world, Containers: containers{h.world}, Images: h.world, Execs: containers{h.world}, Streams: containers{h.world}, Stats: stats{h.world}, Network: network{h.world},
		Runtime: cristate.DefaultRuntimeConfig(),
		Features: func(_ context.Context, handler string, _ cristate.Runtime) Features {
			return Features{handler == "runc", false}
		},
		Opened: func() error {
			if h.open.Load() {
				return nil
			}
			return fmt.Errorf("server is not initialized yet: %w", errdefs.ErrUnavailable)
		},
		Ready: func() error { return h.ready }, Driver: runtime.CgroupDriver_SYSTEMD, Version: "v9", Config: map[string]int{"x": 1}, Log: slog.New(slog.DiscardHandler)}
	for _, f := range change {
		f(&h.d)
	}
	h.open.Store(true)
	s := New(h.d)
	h.conn = wiretest.Serve(t, func(g *grpc.Server) { s.Register(g) })
	h.rt = runtime.NewRuntimeServiceClient(h.conn)
	var cancel func()
	h.ctx, cancel = context.WithTimeout(context.Background(), 5*time.Minute) // with the race detector lists of P23 take a minute on a busy machine
	t.Cleanup(cancel)
	return h
}

func (h *harness) pod(t testing.TB, id string, state cristate.PodState, at int64, labels map[string]string) {
	t.Helper()
	err := h.d.Notifier.Pods.Add(cristate.NewPod(cristate.PodMeta{ID: id, Name: "pod-" + id, Config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: id}, Labels: labels}},
		cristate.PodStatus{State: state, CreatedAt: time.Unix(0, at)}))
	if err != nil {
		t.Fatal(err)
	}
}

func (h *harness) container(t testing.TB, id, pod string, st cristate.Status, labels map[string]string) {
	t.Helper()
	err := h.d.Notifier.Containers.Add(cristate.NewContainer(cristate.ContainerMeta{ID: id, Name: "container-" + id, SandboxID: pod, ImageRef: "sha256:i",
		Config: &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: id}, Image: &runtime.ImageSpec{Image: "i"}, Labels: labels}}, st, ""))
	if err != nil {
		t.Fatal(err)
	}
}

// Before pods and containers are known again, no call of either service is
// answered as if there were none.
//
// contract: 7.1.24
func TestNotInitialised(t *testing.T) {
	h := serve(t)
	h.open.Store(false)
	n := 0
	for _, d := range []grpc.ServiceDesc{runtime.RuntimeService_ServiceDesc, runtime.ImageService_ServiceDesc} {
		for _, m := range d.Methods {
			n++
			if err := h.conn.Invoke(h.ctx, "/"+d.ServiceName+"/"+m.MethodName, &emptypb.Empty{}, &emptypb.Empty{}); !errdefs.IsUnavailable(err) {
				t.Errorf("%s: %v", m.MethodName, err)
			}
		}
		for _, s := range d.Streams {
			n++
			st, err := h.conn.NewStream(h.ctx, &s, "/"+d.ServiceName+"/"+s.StreamName)
			if err == nil {
				if err = st.SendMsg(&emptypb.Empty{}); err == nil {
					err = st.RecvMsg(&emptypb.Empty{})
				}
			}
			if !errdefs.IsUnavailable(err) {
				t.Errorf("%s: %v", s.StreamName, err)
			}
		}
	}
	if n < 38 {
		t.Errorf("only %d calls", n)
	}
	// A client that knows nothing of our interceptors sees the code.
	if code := status.Code(h.plain(t)); code != codes.Unavailable {
		t.Errorf("code %v", code)
	}
	h.open.Store(true)
	if _, err := h.rt.Version(h.ctx, &runtime.VersionRequest{}); err != nil {
		t.Error(err)
	}
}

// What succeeds is measured under containerd's names, with the runtime where
// containerd tells it.
//
// contract: 9.1.8
func TestTimers(t *testing.T) {
	registry := prometheus.NewRegistry()
	h := serve(t, func(d *Deps) { d.Metrics = registry })
	h.pod(t, "p1", cristate.PodReady, 1, nil)
	h.container(t, "c1", "p1", cristate.Status{CreatedAt: 1, StartedAt: 2}, nil)
	second := func(_ any, err error) error { return err }
	read := func(s interface{ CloseSend() error }, err error, recv func() error) error {
		if err != nil {
			return err
		}
		for err = recv(); err == nil; err = recv() {
		}
		if err == io.EOF {
			return nil
		}
		return err
	}
	pods, perr := h.rt.StreamPodSandboxes(h.ctx, &runtime.StreamPodSandboxesRequest{})
	all, cerr := h.rt.StreamContainers(h.ctx, &runtime.StreamContainersRequest{})
	config := &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "n"}, Image: &runtime.ImageSpec{Image: "i"}}
	for name, err := range map[string]error{
		"sandbox_list": second(h.rt.ListPodSandbox(h.ctx, &runtime.ListPodSandboxRequest{})), "container_list": second(h.rt.ListContainers(h.ctx, &runtime.ListContainersRequest{})),
		"stream_sandbox_list":   read(pods, perr, func() error { return second(pods.Recv()) }),
		"stream_container_list": read(all, cerr, func() error { return second(all.Recv()) }),
		"container_create":      second(h.rt.CreateContainer(h.ctx, &runtime.CreateContainerRequest{PodSandboxId: "p1", Config: config})),
		"container_start":       second(h.rt.StartContainer(h.ctx, &runtime.StartContainerRequest{ContainerId: "c1"})),
		"container_stop":        second(h.rt.StopContainer(h.ctx, &runtime.StopContainerRequest{ContainerId: "c1"})),
		"container_remove":      second(h.rt.RemoveContainer(h.ctx, &runtime.RemoveContainerRequest{ContainerId: "c1"})),
		"container_checkpoint":  second(h.rt.CheckpointContainer(h.ctx, &runtime.CheckpointContainerRequest{ContainerId: "c1", Location: "/x"})),
		"sandbox_remove":        second(h.rt.RemovePodSandbox(h.ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: "p1"})),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		key := "containerd_cri_" + name + "_seconds"
		if !strings.HasSuffix(name, "_list") {
			key += " io.containerd.runc.v2"
		}
		if m := metricstest.Read(t, registry); m[key] != 1 {
			t.Errorf("%s is not measured once: %v", name, m)
		}
	}
	if _, ok := metricstest.Read(t, registry)["containerd_cri_container_events_dropped_total"]; !ok {
		t.Error("events that are dropped are not counted")
	}
	h.err = errors.New("it fails")
	if _, err := h.rt.StartContainer(h.ctx, &runtime.StartContainerRequest{ContainerId: "c1"}); err == nil {
		t.Error("no error")
	}
	if n := metricstest.Read(t, registry)["containerd_cri_container_start_seconds io.containerd.runc.v2"]; n != 1 {
		t.Errorf("a start that failed was measured: %v", n)
	}
}

// plain asks without interceptors.
func (h *harness) plain(t *testing.T) error {
	conn, err := grpc.NewClient(h.conn.Target(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = runtime.NewRuntimeServiceClient(conn).Version(h.ctx, &runtime.VersionRequest{})
	return err
}

// contract: 7.1.1, 7.1.2, 7.1.3
// promise: P34
func TestStatus(t *testing.T) {
	h := serve(t, func(d *Deps) {
		d.Deprecations = map[string]string{"io.containerd.deprecation/a": "text a", "io.containerd.deprecation/b": "text b"}
		d.Runtime.IgnoreDeprecationWarnings = []string{"io.containerd.deprecation/b"}
	})
	v, err := h.rt.Version(h.ctx, &runtime.VersionRequest{Version: "v1"})
	if err != nil || v.Version != "0.1.0" || v.RuntimeName != "containerd" || v.RuntimeVersion != "v9" || v.RuntimeApiVersion != "v1" {
		t.Errorf("%v %v", v, err)
	}
	condition := func(i int) string {
		t.Helper()
		st, err := h.rt.Status(h.ctx, &runtime.StatusRequest{})
		if err != nil || len(st.Status.Conditions) != 3 || len(st.Info) != 0 {
			t.Fatalf("%v %v", st, err)
		}
		c := st.Status.Conditions[i]
		return fmt.Sprintf("%s %v %s %s", c.Type, c.Status, c.Reason, c.Message)
	}
	for i, want := range []string{"RuntimeReady true  ", "NetworkReady true  ",
		`ContainerdHasNoDeprecationWarnings false ContainerdHasDeprecationWarnings {"io.containerd.deprecation/a":"text a"}`} {
		if got := condition(i); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	h.ready, h.network = errors.New("snapshotter overlayfs: read-only file system"), errors.New("cni plugin not initialized")
	for i, want := range []string{"RuntimeReady false RuntimeNotReady snapshotter overlayfs: read-only file system", "NetworkReady false NetworkPluginNotReady cni plugin not initialized"} {
		if got := condition(i); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	st, err := h.rt.Status(h.ctx, &runtime.StatusRequest{Verbose: true})
	if err != nil || st.Info["lastCNILoadStatus"] != "OK" || st.Info["lastCNILoadStatus.default"] != "OK" || st.Info["lastCNILoadStatus.crun"] != "bad" || st.Info["config"] != `{"x":1}` || !json.Valid([]byte(st.Info["golang"])) || st.Info["cniconfig"] == "" {
		t.Errorf("%v %v", st, err)
	}
	if len(st.RuntimeHandlers) != 2 || st.RuntimeHandlers[0].Name != "" || !st.RuntimeHandlers[0].Features.RecursiveReadOnlyMounts || st.RuntimeHandlers[1].Name != "runc" {
		t.Errorf("handlers %v", st.RuntimeHandlers)
	}
	c, err := h.rt.RuntimeConfig(h.ctx, &runtime.RuntimeConfigRequest{})
	if err != nil || c.Linux.CgroupDriver != runtime.CgroupDriver_SYSTEMD {
		t.Errorf("%v %v", c, err)
	}
}

// What is missing or cannot be is refused before anything is called.
func TestValidation(t *testing.T) {
	h := serve(t)
	h.pod(t, "p1", cristate.PodReady, 1, nil)
	h.pod(t, "p2", cristate.PodNotReady, 1, nil)
	h.container(t, "c1", "p1", cristate.Status{CreatedAt: 1, StartedAt: 2}, nil)
	h.container(t, "c2", "p1", cristate.Status{CreatedAt: 1, StartedAt: 2, FinishedAt: 3}, nil)
	pod := func(change func(*runtime.PodSandboxConfig)) error {
		c := &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: "n", Namespace: "ns", Uid: "u"}}
		change(c)
		_, err := h.rt.RunPodSandbox(h.ctx, &runtime.RunPodSandboxRequest{Config: c})
		return err
	}
	create := func(change func(*runtime.ContainerConfig)) error {
		c := &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "n"}, Image: &runtime.ImageSpec{Image: "i"}}
		change(c)
		_, err := h.rt.CreateContainer(h.ctx, &runtime.CreateContainerRequest{PodSandboxId: "p1", Config: c})
		return err
	}
	second := func(_ any, err error) error { return err }
	for name, tt := range map[string]struct {
		err  error
		want func(error) bool
	}{
		"no pod config":            {second(h.rt.RunPodSandbox(h.ctx, &runtime.RunPodSandboxRequest{})), errdefs.IsInvalidArgument},
		"no metadata":              {pod(func(c *runtime.PodSandboxConfig) { c.Metadata = nil }), errdefs.IsInvalidArgument},
		"no name":                  {pod(func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "" }), errdefs.IsInvalidArgument},
		"slash in name":            {pod(func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "../x" }), errdefs.IsInvalidArgument},
		"newline in uid":           {pod(func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = "a\nb" }), errdefs.IsInvalidArgument},
		"long namespace":           {pod(func(c *runtime.PodSandboxConfig) { c.Metadata.Namespace = strings.Repeat("n", 2000) }), errdefs.IsInvalidArgument},
		"big annotations":          {pod(func(c *runtime.PodSandboxConfig) { c.Annotations = map[string]string{"a": strings.Repeat("x", 2<<20)} }), errdefs.IsInvalidArgument},
		"unknown pod":              {second(h.rt.PodSandboxStatus(h.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: "zz"})), errdefs.IsNotFound},
		"empty pod":                {second(h.rt.PodSandboxStatus(h.ctx, &runtime.PodSandboxStatusRequest{})), errdefs.IsInvalidArgument},
		"ambiguous pod":            {second(h.rt.PodSandboxStatus(h.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: "p"})), errdefs.IsInvalidArgument},
		"update unknown":           {second(h.rt.UpdatePodSandboxResources(h.ctx, &runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: "zz"})), errdefs.IsNotFound},
		"create in unknown":        {second(h.rt.CreateContainer(h.ctx, &runtime.CreateContainerRequest{PodSandboxId: "zz"})), errdefs.IsNotFound},
		"no container config":      {second(h.rt.CreateContainer(h.ctx, &runtime.CreateContainerRequest{PodSandboxId: "p1"})), errdefs.IsInvalidArgument},
		"no metadata of container": {create(func(c *runtime.ContainerConfig) { c.Metadata = nil }), errdefs.IsInvalidArgument},
		"no container name":        {create(func(c *runtime.ContainerConfig) { c.Metadata.Name = "" }), errdefs.IsInvalidArgument},
		"no image":                 {create(func(c *runtime.ContainerConfig) { c.Image = nil }), errdefs.IsInvalidArgument},
		"zero in name":             {create(func(c *runtime.ContainerConfig) { c.Metadata.Name = "a\x00" }), errdefs.IsInvalidArgument},
		"env without name":         {create(func(c *runtime.ContainerConfig) { c.Envs = []*runtime.KeyValue{{Value: []byte("x")}} }), errdefs.IsInvalidArgument},
		"env with zero":            {create(func(c *runtime.ContainerConfig) { c.Envs = []*runtime.KeyValue{{Key: "a", Value: []byte("x\x00")}} }), errdefs.IsInvalidArgument},
		"big labels":               {create(func(c *runtime.ContainerConfig) { c.Labels = map[string]string{"a": strings.Repeat("x", 2<<20)} }), errdefs.IsInvalidArgument},
		"start unknown":            {second(h.rt.StartContainer(h.ctx, &runtime.StartContainerRequest{ContainerId: "zz"})), errdefs.IsNotFound},
		"status unknown":           {second(h.rt.ContainerStatus(h.ctx, &runtime.ContainerStatusRequest{ContainerId: "zz"})), errdefs.IsNotFound},
		"reopen unknown":           {second(h.rt.ReopenContainerLog(h.ctx, &runtime.ReopenContainerLogRequest{ContainerId: "zz"})), errdefs.IsNotFound},
		"update without":           {second(h.rt.UpdateContainerResources(h.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: "c1"})), errdefs.IsInvalidArgument},
		"update unknown c":         {second(h.rt.UpdateContainerResources(h.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: "zz"})), errdefs.IsNotFound},
		"checkpoint":               {second(h.rt.CheckpointContainer(h.ctx, &runtime.CheckpointContainerRequest{ContainerId: "c1"})), errdefs.IsInvalidArgument},
		"exec nothing":             {second(h.rt.ExecSync(h.ctx, &runtime.ExecSyncRequest{ContainerId: "c1"})), errdefs.IsInvalidArgument},
		"exec in ended":            {second(h.rt.ExecSync(h.ctx, &runtime.ExecSyncRequest{ContainerId: "c2", Cmd: []string{"x"}})), errdefs.IsFailedPrecondition},
		"attach to ended":          {second(h.rt.Attach(h.ctx, &runtime.AttachRequest{ContainerId: "c2", Stdout: true})), errdefs.IsFailedPrecondition},
		"stream exec":              {second(h.rt.Exec(h.ctx, &runtime.ExecRequest{ContainerId: "c1", Stdout: true})), errdefs.IsInvalidArgument},
		"forward to ended":         {second(h.rt.PortForward(h.ctx, &runtime.PortForwardRequest{PodSandboxId: "p2"})), errdefs.IsFailedPrecondition},
		"forward unknown":          {second(h.rt.PortForward(h.ctx, &runtime.PortForwardRequest{PodSandboxId: "zz"})), errdefs.IsNotFound},
		"stats unknown":            {second(h.rt.ContainerStats(h.ctx, &runtime.ContainerStatsRequest{ContainerId: "zz"})), errdefs.IsNotFound},
		"pod stats unknown":        {second(h.rt.PodSandboxStats(h.ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: "zz"})), errdefs.IsNotFound},
	} {
		if !tt.want(tt.err) {
			t.Errorf("%s: %v", name, tt.err)
		}
	}
	if len(h.calls) > 0 {
		t.Errorf("called: %q", h.calls)
	}
}

// What is unknown is gone as asked, and what is known may be called by the
// beginning of its id.
//
// contract: 13.26, 7.1.6, 7.1.13
func TestUnknownAndShort(t *testing.T) {
	h := serve(t)
	h.pod(t, "p123", cristate.PodReady, 1, nil)
	h.container(t, "c123", "p123", cristate.Status{CreatedAt: 1, StartedAt: 2}, nil)
	for _, pod := range []string{"zz", "p1"} {
		if _, err := h.rt.StopPodSandbox(h.ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}
		if _, err := h.rt.RemovePodSandbox(h.ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}
	}
	for _, c := range []string{"zz", "c1"} {
		if _, err := h.rt.StopContainer(h.ctx, &runtime.StopContainerRequest{ContainerId: c, Timeout: -5}); err != nil {
			t.Error(err)
		}
		if _, err := h.rt.RemoveContainer(h.ctx, &runtime.RemoveContainerRequest{ContainerId: c}); err != nil {
			t.Error(err)
		}
	}
	if _, err := h.rt.StopContainer(h.ctx, &runtime.StopContainerRequest{ContainerId: "c123", Timeout: 1 << 62}); err != nil {
		t.Error(err)
	}
	if r, err := h.rt.ExecSync(h.ctx, &runtime.ExecSyncRequest{ContainerId: "c1", Cmd: []string{"x"}, Timeout: 1 << 62}); err != nil || r.ExitCode != 3 || string(r.Stdout) != "out" {
		t.Errorf("%v %v", r, err)
	}
	want := []string{"stop pod p123", "remove pod p123", "stop c123 0s", "remove c123", "stop c123 8760h0m0s", `exec c123 ["x"] 8760h0m0s`}
	if !slices.Equal(h.calls, want) {
		t.Errorf("%q", h.calls)
	}
	// An empty id is a mistake, not something that is gone.
	if _, err := h.rt.StopPodSandbox(h.ctx, &runtime.StopPodSandboxRequest{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	if r, err := h.rt.Exec(h.ctx, &runtime.ExecRequest{ContainerId: "c1", Cmd: []string{"x"}}); err != nil || r.Url != "exec/c123" {
		t.Errorf("%v %v", r, err)
	}
	if r, err := h.rt.PortForward(h.ctx, &runtime.PortForwardRequest{PodSandboxId: "p1"}); err != nil || r.Url != "forward/p123" {
		t.Errorf("%v %v", r, err)
	}
	st, err := h.rt.PodSandboxStatus(h.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: "p1", Verbose: true})
	if err != nil || st.Info["info"] != "p123" || len(st.ContainersStatuses) != 1 || st.Timestamp != 0 {
		t.Errorf("%v %v", st, err)
	}
	cs, err := h.rt.ContainerStatus(h.ctx, &runtime.ContainerStatusRequest{ContainerId: "c1", Verbose: true})
	if err != nil || cs.Info["info"] != "c123" || cs.Status.ImageRef != "example.com/i@sha256:i" || cs.Status.ImageId != "sha256:i" {
		t.Errorf("%v %v", cs, err)
	}
}

// contract: 7.1.9, 7.1.15, 13.26
func TestFilters(t *testing.T) {
	h := serve(t)
	h.pod(t, "aa1", cristate.PodReady, 3, map[string]string{"app": "x", "tier": "1"})
	h.pod(t, "aa2", cristate.PodNotReady, 2, map[string]string{"app": "x"})
	h.pod(t, "bb1", cristate.PodReady, 1, map[string]string{"app": ""})
	h.container(t, "c1", "aa1", cristate.Status{CreatedAt: 1, StartedAt: 1}, map[string]string{"l": "1"})
	h.container(t, "c2", "aa1", cristate.Status{CreatedAt: 2, StartedAt: 2, FinishedAt: 3}, map[string]string{"l": "1"})
	h.container(t, "d1", "bb1", cristate.Status{CreatedAt: 3}, nil)
	ready := &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY}
	for want, f := range map[string]*runtime.PodSandboxFilter{
		"[aa1 aa2 bb1]": nil,
		"[aa2]":         {Id: "aa2"},
		"[bb1]":         {Id: "b", State: ready},
		"[]":            {Id: "aa"}, // two begin so
		"[aa1 bb1]":     {State: ready},
		"[aa1]":         {LabelSelector: map[string]string{"app": "x", "tier": "1"}},
		"[bb1] ":        {LabelSelector: map[string]string{"app": ""}},
		"[] ":           {LabelSelector: map[string]string{"none": ""}},
		"[]  ":          {Id: "aa2", State: ready},
		"[]   ":         {Id: "zz"},
	} {
		r, err := h.rt.ListPodSandbox(h.ctx, &runtime.ListPodSandboxRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		ids := []string{}
		for _, p := range r.Items {
			ids = append(ids, p.Id)
		}
		if got := fmt.Sprint(ids); got != strings.TrimSpace(want) {
			t.Errorf("%v: %s, want %s", f, got, want)
		}
	}
	state := func(s runtime.ContainerState) *runtime.ContainerStateValue {
		return &runtime.ContainerStateValue{State: s}
	}
	for want, f := range map[string]*runtime.ContainerFilter{
		"[d1 c2 c1]": nil, // the newest first
		"[d1]":       {Id: "d"},
		"[c2 c1]":    {PodSandboxId: "aa1"},
		"[d1] ":      {PodSandboxId: "bb"},
		"[]":         {PodSandboxId: "zz"},
		"[] ":        {Id: "c"},
		"[c1]":       {State: state(runtime.ContainerState_CONTAINER_RUNNING)},
		"[c2]":       {State: state(runtime.ContainerState_CONTAINER_EXITED), LabelSelector: map[string]string{"l": "1"}},
		"[d1]  ":     {State: state(runtime.ContainerState_CONTAINER_CREATED)},
		"[]  ":       {Id: "c1", PodSandboxId: "bb1"},
	} {
		r, err := h.rt.ListContainers(h.ctx, &runtime.ListContainersRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		ids := []string{}
		for _, c := range r.Containers {
			ids = append(ids, c.Id)
		}
		if got := fmt.Sprint(ids); got != strings.TrimSpace(want) {
			t.Errorf("%v: %s, want %s", f, got, want)
		}
	}
}

// drain receives all of a stream; each message has to be of a modest size.
func drain[M interface{ *R }, R any](t *testing.T, s grpc.ServerStreamingClient[R], err error, ids func(M) []string) []string {
	t.Helper()
	var all []string
	for err == nil {
		var m *R
		if m, err = s.Recv(); err == nil {
			all = append(all, ids(m)...)
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return all
}

func unique(t *testing.T, what string, ids []string, want int) {
	t.Helper()
	if ids = slices.Compact(slices.Sorted(slices.Values(ids))); len(ids) != want {
		t.Errorf("%s: %d of %d", what, len(ids), want)
	}
}

// Fifty thousand that have ended do not make a list fail: it has the newest,
// and a stream has all.
//
// contract: 7.1.9, 7.1.15, 7.1.20, 7.1.21
// promise: P23
func TestLists(t *testing.T) {
	h := serve(t)
	const n, ended = 1_500, 50_000
	text := map[string]string{"text": strings.Repeat("x", 400)}
	for i := range ended {
		h.container(t, fmt.Sprintf("c%d", i), "p", cristate.Status{CreatedAt: int64(i + 1), StartedAt: 1, FinishedAt: 2}, text)
	}
	labels := map[string]string{"text": strings.Repeat("x", 15_000)}
	for i := range n {
		h.pod(t, fmt.Sprintf("p%d", i), cristate.PodNotReady, int64(i+1), labels)
		h.stats = append(h.stats, &runtime.ContainerStats{Attributes: &runtime.ContainerAttributes{Id: fmt.Sprintf("c%d", i), Labels: labels}})
	}
	cs, err := h.rt.ListContainers(h.ctx, &runtime.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(cs.Containers); got < ended/3 || got == ended || cs.Containers[0].Id != fmt.Sprintf("c%d", ended-1) || cs.Containers[got-1].Id != fmt.Sprintf("c%d", ended-got) {
		t.Errorf("%d containers, from %s to %s", got, cs.Containers[0].Id, cs.Containers[got-1].Id)
	}
	ps, err := h.rt.ListPodSandbox(h.ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(ps.Items); got < n/3 || got == n || ps.Items[0].Id != fmt.Sprintf("p%d", n-1) {
		t.Errorf("%d pods, from %s", got, ps.Items[0].Id)
	}
	if r, err := h.rt.ListContainerStats(h.ctx, &runtime.ListContainerStatsRequest{}); err != nil || len(r.Stats) < n/3 {
		t.Errorf("%d %v", len(r.GetStats()), err)
	}
	if r, err := h.rt.ListPodSandboxStats(h.ctx, &runtime.ListPodSandboxStatsRequest{}); err != nil || len(r.Stats) < n/3 {
		t.Errorf("%d %v", len(r.GetStats()), err)
	}
	if r, err := h.rt.ListPodSandboxMetrics(h.ctx, &runtime.ListPodSandboxMetricsRequest{}); err != nil || len(r.PodMetrics) < n/3 {
		t.Errorf("%d %v", len(r.GetPodMetrics()), err)
	}

	s1, err := h.rt.StreamContainers(h.ctx, &runtime.StreamContainersRequest{})
	unique(t, "containers", drain(t, s1, err, func(r *runtime.StreamContainersResponse) (ids []string) {
		if s := size(r); s > chunk+1<<16 {
			t.Errorf("a message of %d bytes", s)
		}
		for _, c := range r.Containers {
			ids = append(ids, c.Id)
		}
		return ids
	}), ended)
	s2, err := h.rt.StreamPodSandboxes(h.ctx, &runtime.StreamPodSandboxesRequest{})
	unique(t, "pods", drain(t, s2, err, func(r *runtime.StreamPodSandboxesResponse) (ids []string) {
		for _, p := range r.PodSandboxes {
			ids = append(ids, p.Id)
		}
		return ids
	}), n)
	s3, err := h.rt.StreamContainerStats(h.ctx, &runtime.StreamContainerStatsRequest{})
	unique(t, "container stats", drain(t, s3, err, func(r *runtime.StreamContainerStatsResponse) (ids []string) {
		for _, c := range r.ContainerStats {
			ids = append(ids, c.Attributes.Id)
		}
		return ids
	}), n)
	s4, err := h.rt.StreamPodSandboxStats(h.ctx, &runtime.StreamPodSandboxStatsRequest{})
	unique(t, "pod stats", drain(t, s4, err, func(r *runtime.StreamPodSandboxStatsResponse) (ids []string) {
		for _, c := range r.PodSandboxStats {
			ids = append(ids, c.Attributes.Id)
		}
		return ids
	}), n)
	s5, err := h.rt.StreamPodSandboxMetrics(h.ctx, &runtime.StreamPodSandboxMetricsRequest{})
	unique(t, "pod metrics", drain(t, s5, err, func(r *runtime.StreamPodSandboxMetricsResponse) (ids []string) {
		for _, c := range r.PodSandboxMetrics {
			ids = append(ids, c.PodSandboxId)
		}
		return ids
	}), n)
}

// A subscriber that never reads holds up nobody, and is told in the end that it
// has missed something.
//
// contract: 7.1.22
func TestEvents(t *testing.T) {
	h := serve(t)
	h.pod(t, "p", cristate.PodReady, 1, map[string]string{"text": strings.Repeat("x", 2000)})
	h.container(t, "c", "p", cristate.Status{CreatedAt: 1}, nil)
	h.d.Notifier.Notify(runtime.ContainerEventType_CONTAINER_CREATED_EVENT, "early", "p")
	subscribe := func() grpc.ServerStreamingClient[runtime.ContainerEventResponse] {
		t.Helper()
		s, err := h.rt.GetContainerEvents(h.ctx, &runtime.GetEventsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	reader := subscribe()
	if e, err := reader.Recv(); err != nil || e.ContainerId != "early" || e.PodSandboxStatus.Id != "p" || len(e.ContainersStatuses) != 1 || e.CreatedAt == 0 {
		t.Fatalf("%v %v", e, err)
	}
	sleeper, second := subscribe(), subscribe()
	// Both are subscribed when they get what is published.
	for _, s := range []grpc.ServerStreamingClient[runtime.ContainerEventResponse]{sleeper, second} {
		got := make(chan error, 1)
		go func() { _, err := s.Recv(); got <- err }()
		for done := false; !done; {
			h.d.Notifier.Notify(runtime.ContainerEventType_CONTAINER_STARTED_EVENT, "hello", "p")
			select {
			case err := <-got:
				if err != nil {
					t.Fatal(err)
				}
				done = true
			case <-time.After(time.Millisecond):
			}
		}
	}
	// More than the 10,000 that may wait, and than the connection holds, which is
	// up to 16 MiB when it has seen much.
	const rounds, each = 80, 500
	for i := 0; i < rounds && h.d.Notifier.Events.Dropped() == 0; i++ {
		for j := range each {
			h.d.Notifier.Notify(runtime.ContainerEventType_CONTAINER_STOPPED_EVENT, fmt.Sprintf("e%d-%d", i, j), "p")
		}
		for _, s := range []grpc.ServerStreamingClient[runtime.ContainerEventResponse]{reader, second} {
			for j := 0; j < each; {
				e, err := s.Recv()
				if err != nil {
					t.Fatal(err)
				}
				if e.ContainerId == "hello" {
					continue
				}
				if want := fmt.Sprintf("e%d-%d", i, j); e.ContainerId != want {
					t.Fatalf("%s, want %s", e.ContainerId, want)
				}
				j++
			}
		}
	}
	for {
		_, err := sleeper.Recv()
		if err == nil {
			continue
		}
		if !errdefs.IsResourceExhausted(err) {
			t.Errorf("%v", err)
		}
		break
	}
	if h.d.Notifier.Events.Dropped() == 0 {
		t.Error("nothing was counted as dropped")
	}
}

// contract: 7.1.4
func TestUpdateRuntimeConfig(t *testing.T) {
	h := serve(t)
	for _, cidr := range []string{"", "10.1.0.0/16,fd00::/64"} {
		if _, err := h.rt.UpdateRuntimeConfig(h.ctx, &runtime.UpdateRuntimeConfigRequest{RuntimeConfig: &runtime.RuntimeConfig{NetworkConfig: &runtime.NetworkConfig{PodCidr: cidr}}}); err != nil {
			t.Error(err)
		}
	}
	if !slices.Equal(h.calls, []string{"cidr 10.1.0.0/16,fd00::/64"}) {
		t.Errorf("%q", h.calls)
	}
}
