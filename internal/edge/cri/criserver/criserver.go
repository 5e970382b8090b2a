// Package criserver is the kubelet's side of the CRI: it checks requests, calls
// cripod, cricontainer, criimage, cristream and cristats, and answers in the
// API's messages. It keeps nothing of its own but the readiness that it tells.
package criserver

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"net"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cni"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/cri/cristream"
)

// Pods is cripod.
type Pods interface {
	Run(ctx context.Context, config *runtime.PodSandboxConfig, handler string) (id string, err error)
	Stop(ctx context.Context, id string) error
	Remove(ctx context.Context, id string) error
	UpdateResources(ctx context.Context, id string, overhead, resources *runtime.LinuxContainerResources) error
	Checkpoint(ctx context.Context, id, dir string, containers []string) error
	Restore(ctx context.Context, dir string, config *runtime.PodSandboxConfig, handler string, containers []*runtime.ContainerConfig) (id string, restored []*runtime.RestoredContainer, err error)
	// Info is what a verbose status tells, as JSON.
	Info(ctx context.Context, id string) (map[string]string, error)
}

// Containers is cricontainer.
type Containers interface {
	Create(ctx context.Context, podID string, config *runtime.ContainerConfig, pod *runtime.PodSandboxConfig) (id string, err error)
	Start(ctx context.Context, id string) error
	Stop(ctx context.Context, id string, grace time.Duration) error
	Remove(ctx context.Context, id string) error
	UpdateResources(ctx context.Context, id string, linux *runtime.LinuxContainerResources, annotations map[string]string) error
	ReopenLog(ctx context.Context, id string) error
	Checkpoint(ctx context.Context, id, location string, timeout time.Duration) error
	Info(ctx context.Context, id string) (map[string]string, error)
}

// Execs is cristream.Service.
type Execs interface {
	ExecSync(ctx context.Context, id string, command []string, timeout time.Duration) (cristream.Result, error)
}

// Streams is cristream.Server.
type Streams interface {
	Exec(context.Context, *runtime.ExecRequest) (*runtime.ExecResponse, error)
	Attach(context.Context, *runtime.AttachRequest) (*runtime.AttachResponse, error)
	PortForward(context.Context, *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error)
}

// Stats is cristats.
type Stats interface {
	ContainerStats(ctx context.Context, id string) (*runtime.ContainerStats, error)
	ListContainerStats(ctx context.Context, filter *runtime.ContainerStatsFilter) ([]*runtime.ContainerStats, error)
	PodSandboxStats(ctx context.Context, id string) (*runtime.PodSandboxStats, error)
	ListPodSandboxStats(ctx context.Context, filter *runtime.PodSandboxStatsFilter) ([]*runtime.PodSandboxStats, error)
	MetricDescriptors() []*runtime.MetricDescriptor
	PodSandboxMetrics(ctx context.Context) ([]*runtime.PodSandboxMetrics, error)
}

// Network is cni.Network.
type Network interface {
	// Status is nil if pods of the handler can get a network.
	Status(ctx context.Context, handler string) error
	// Info tells what is loaded, by handler.
	Info() map[string]cni.Info
	UpdatePodCIDR(ctx context.Context, cidrs string) error
}

// Images is criimage; its answers are those of the image service.
type Images interface {
	runtime.ImageServiceServer
	Names(imageID string) cristate.ImageNames
}

// Features says what a runtime handler can do (contract 13.30).
type Features struct {
	RecursiveReadOnly, UserNamespaces bool
}

// Deps is what the server is made of. All must be set but Ready, Deprecations and Config.
type Deps struct {
	Notifier   *cristate.Notifier
	Pods       Pods
	Containers Containers
	Images     Images
	Execs      Execs
	Streams    Streams
	Stats      Stats
	Network    Network
	Runtime    cristate.RuntimeConfig
	// Features of a handler; asked at each Status, so it has to be quick.
	Features func(ctx context.Context, handler string, r cristate.Runtime) Features
	// Opened is nil when requests may be served; else an ErrUnavailable (contract 7.1.24).
	Opened func() error
	// Ready is nil if what pods need works; else it names what fails.
	Ready func() error
	// Deprecations are the warnings that are shown, by id.
	Deprecations map[string]string
	// Config is shown in verbose answers.
	Config any
	// Driver is the cgroup driver that containers are made with.
	Driver  runtime.CgroupDriver
	Version string
	Metrics prometheus.Registerer // may be nil
	Log     *slog.Logger
}

// Server serves runtime.v1 (contract 1.3.42, 7). It is safe for concurrent use.
type Server struct {
	runtime.UnimplementedRuntimeServiceServer
	d      Deps
	pods   *cristate.Index[*cristate.Pod]
	all    *cristate.Index[*cristate.Container]
	timers timers
}

// New makes a server.
func New(d Deps) *Server {
	return &Server{d: d, pods: d.Notifier.Pods, all: d.Notifier.Containers, timers: newTimers(d.Metrics, d.Notifier.Events)}
}

// Register adds both services to r.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	r = gate{r, s.d.Opened}
	runtime.RegisterRuntimeServiceServer(r, s)
	runtime.RegisterImageServiceServer(r, s.d.Images)
}

// gate lets requests in when opened allows it.
type gate struct {
	grpc.ServiceRegistrar
	opened func() error
}

func (g gate) RegisterService(desc *grpc.ServiceDesc, impl any) {
	gated := *desc
	gated.Methods, gated.Streams = slices.Clone(desc.Methods), slices.Clone(desc.Streams)
	for i, m := range desc.Methods {
		gated.Methods[i].Handler = func(srv any, ctx context.Context, dec func(any) error, in grpc.UnaryServerInterceptor) (any, error) {
			if err := g.opened(); err != nil {
				return nil, errgrpc.ToGRPC(err)
			}
			ctx, cancel := early(ctx)
			defer cancel()
			return m.Handler(srv, ctx, dec, in)
		}
	}
	for i, st := range desc.Streams {
		gated.Streams[i].Handler = func(srv any, out grpc.ServerStream) error {
			if err := g.opened(); err != nil {
				return err
			}
			return st.Handler(srv, out)
		}
	}
	g.ServiceRegistrar.RegisterService(&gated, impl)
}

// Version tells the API's and the program's version. The name is containerd's,
// because clients choose by it what they dare (contract 7).
func (s *Server) Version(context.Context, *runtime.VersionRequest) (*runtime.VersionResponse, error) {
	return &runtime.VersionResponse{Version: "0.1.0", RuntimeName: "containerd", RuntimeVersion: s.d.Version, RuntimeApiVersion: "v1"}, nil
}

// Status tells whether pods can be run (contract 7.1.2, promise P34).
func (s *Server) Status(ctx context.Context, r *runtime.StatusRequest) (*runtime.StatusResponse, error) {
	condition := func(kind, reason string, err error) *runtime.RuntimeCondition {
		if err == nil {
			return &runtime.RuntimeCondition{Type: kind, Status: true}
		}
		return &runtime.RuntimeCondition{Type: kind, Reason: reason, Message: err.Error()}
	}
	var ready error
	if s.d.Ready != nil {
		ready = s.d.Ready()
	}
	resp := &runtime.StatusResponse{
		Status: &runtime.RuntimeStatus{Conditions: []*runtime.RuntimeCondition{
			condition(runtime.RuntimeReady, "RuntimeNotReady", ready),
			condition(runtime.NetworkReady, "NetworkPluginNotReady", s.d.Network.Status(ctx, "")),
			s.deprecations(),
		}},
		Features: &runtime.RuntimeFeatures{SupplementalGroupsPolicy: true, UserNamespacesHostNetwork: true, MountOptions: true},
	}
	names := make([]string, 0, len(s.d.Runtime.Containerd.Runtimes)+1)
	for name := range s.d.Runtime.Containerd.Runtimes {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range append([]string{""}, names...) {
		if _, h, err := s.d.Runtime.Handler(name); err == nil {
			f := s.d.Features(ctx, cmp.Or(name, s.d.Runtime.Containerd.DefaultRuntimeName), h)
			resp.RuntimeHandlers = append(resp.RuntimeHandlers, &runtime.RuntimeHandler{Name: name,
				Features: &runtime.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: f.RecursiveReadOnly, UserNamespaces: f.UserNamespaces}})
		}
	}
	if !r.GetVerbose() {
		return resp, nil
	}
	resp.Info = map[string]string{"golang": asJSON(goruntime.Version()), "config": asJSON(s.d.Config)}
	for name, info := range s.d.Network.Info() {
		suffix := ""
		if name != "default" {
			suffix = "." + name
		}
		resp.Info["cniconfig"+suffix], resp.Info["lastCNILoadStatus"+suffix], resp.Info["lastCNILoadStatus."+name] = asJSON(info.Config), info.LoadStatus, info.LoadStatus
	}
	return resp, nil
}

func asJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return asJSON(err.Error())
	}
	return string(b)
}

func (s *Server) deprecations() *runtime.RuntimeCondition {
	shown := map[string]string{}
	for id, text := range s.d.Deprecations {
		if !slices.Contains(s.d.Runtime.IgnoreDeprecationWarnings, id) {
			shown[id] = text
		}
	}
	c := &runtime.RuntimeCondition{Type: "ContainerdHasNoDeprecationWarnings", Status: len(shown) == 0}
	if len(shown) > 0 {
		c.Reason, c.Message = "ContainerdHasDeprecationWarnings", asJSON(shown)
	}
	return c
}

// RuntimeConfig tells the cgroup driver (contract 7.1.3).
func (s *Server) RuntimeConfig(context.Context, *runtime.RuntimeConfigRequest) (*runtime.RuntimeConfigResponse, error) {
	return &runtime.RuntimeConfigResponse{Linux: &runtime.LinuxRuntimeConfiguration{CgroupDriver: s.d.Driver}}, nil
}

// UpdateRuntimeConfig takes the node's pod network (contract 7.1.4).
func (s *Server) UpdateRuntimeConfig(ctx context.Context, r *runtime.UpdateRuntimeConfigRequest) (*runtime.UpdateRuntimeConfigResponse, error) {
	cidr := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if cidr == "" {
		return &runtime.UpdateRuntimeConfigResponse{}, nil
	}
	return &runtime.UpdateRuntimeConfigResponse{}, s.d.Network.UpdatePodCIDR(ctx, cidr)
}

// RunPodSandbox makes a pod (contract 7.1.5).
func (s *Server) RunPodSandbox(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	if err := checkPod(r.GetConfig()); err != nil {
		return nil, err
	}
	id, err := s.d.Pods.Run(ctx, r.Config, r.GetRuntimeHandler())
	return &runtime.RunPodSandboxResponse{PodSandboxId: id}, err
}

// StopPodSandbox ends a pod; an unknown one is no error (contract 13.26).
func (s *Server) StopPodSandbox(ctx context.Context, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	return &runtime.StopPodSandboxResponse{}, ifKnown(s.pods, r.GetPodSandboxId(), func(p *cristate.Pod) error { return s.d.Pods.Stop(ctx, p.ID()) })
}

// RemovePodSandbox removes a pod; an unknown one is no error.
func (s *Server) RemovePodSandbox(ctx context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	begin := time.Now()
	return &runtime.RemovePodSandboxResponse{}, ifKnown(s.pods, r.GetPodSandboxId(), func(p *cristate.Pod) error {
		kind := s.runtimeOf(p.ID()) // while it is there
		return s.timers.done("sandbox_remove", begin, s.d.Pods.Remove(ctx, p.ID()), kind)
	})
}

type index[T any] interface{ Get(id string) (T, error) }

// on calls fn for the pod or container with an id or the beginning of one.
func on[T any](all index[T], id string, fn func(T) error) error {
	x, err := all.Get(id)
	if err != nil {
		return err
	}
	return fn(x)
}

// ifKnown is on for what is done already where there is nothing.
func ifKnown[T any](all index[T], id string, fn func(T) error) error {
	x, err := all.Get(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return fn(x)
}

// timed does something with a container, which may be its end.
func (s *Server) timed(name string, c *cristate.Container, do func(id string) error) error {
	begin, kind := time.Now(), s.runtimeOf(c.PodID()) // while it is there
	return s.timers.done(name, begin, do(c.ID()), kind)
}

// PodSandboxStatus tells all about a pod (contract 7.1.8). As in containerd, the
// answer has no timestamp: to one that has, kubelets up to 1.37 with EventedPLEG
// forget which containers are the pod's own, and run its init containers forever.
func (s *Server) PodSandboxStatus(ctx context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	p, err := s.pods.Get(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	resp := &runtime.PodSandboxStatusResponse{Status: p.Answer(), ContainersStatuses: s.d.Notifier.Statuses(p.ID())}
	if r.GetVerbose() {
		if resp.Info, err = s.d.Pods.Info(ctx, p.ID()); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// UpdatePodSandboxResources changes what a pod may use (contract 7.1.10).
func (s *Server) UpdatePodSandboxResources(ctx context.Context, r *runtime.UpdatePodSandboxResourcesRequest) (*runtime.UpdatePodSandboxResourcesResponse, error) {
	return &runtime.UpdatePodSandboxResourcesResponse{}, on(s.pods, r.GetPodSandboxId(), func(p *cristate.Pod) error {
		return s.d.Pods.UpdateResources(ctx, p.ID(), r.GetOverhead(), r.GetResources())
	})
}

// CreateContainer makes a container in a pod (contract 7.1.11).
func (s *Server) CreateContainer(ctx context.Context, r *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
	p, err := s.pods.Get(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if err := checkContainer(r.GetConfig()); err != nil {
		return nil, err
	}
	begin := time.Now()
	id, err := s.d.Containers.Create(ctx, p.ID(), r.Config, r.GetSandboxConfig())
	return &runtime.CreateContainerResponse{ContainerId: id}, s.timers.done("container_create", begin, err, s.runtimeOf(p.ID()))
}

// StartContainer starts it (contract 7.1.12).
func (s *Server) StartContainer(ctx context.Context, r *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error) {
	return &runtime.StartContainerResponse{}, on(s.all, r.GetContainerId(), func(c *cristate.Container) error {
		return s.timed("container_start", c, func(id string) error { return s.d.Containers.Start(ctx, id) })
	})
}

// maxGrace bounds what a client may ask for: a longer one is as good as for ever.
const maxGrace = 365 * 24 * time.Hour

// StopContainer ends it; an unknown one is no error (contract 7.1.13).
func (s *Server) StopContainer(ctx context.Context, r *runtime.StopContainerRequest) (*runtime.StopContainerResponse, error) {
	grace := time.Duration(min(max(r.GetTimeout(), 0), int64(maxGrace/time.Second))) * time.Second
	return &runtime.StopContainerResponse{}, ifKnown(s.all, r.GetContainerId(), func(c *cristate.Container) error {
		return s.timed("container_stop", c, func(id string) error { return s.d.Containers.Stop(ctx, id, grace) })
	})
}

// RemoveContainer removes it; an unknown one is no error (contract 7.1.14).
func (s *Server) RemoveContainer(ctx context.Context, r *runtime.RemoveContainerRequest) (*runtime.RemoveContainerResponse, error) {
	return &runtime.RemoveContainerResponse{}, ifKnown(s.all, r.GetContainerId(), func(c *cristate.Container) error {
		return s.timed("container_remove", c, func(id string) error { return s.d.Containers.Remove(ctx, id) })
	})
}

// ContainerStatus tells all about a container (contract 7.1.15).
func (s *Server) ContainerStatus(ctx context.Context, r *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	c, err := s.all.Get(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &runtime.ContainerStatusResponse{Status: c.Answer(s.d.Images.Names(c.Meta().ImageRef))}
	if r.GetVerbose() {
		if resp.Info, err = s.d.Containers.Info(ctx, c.ID()); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// UpdateContainerResources changes limits (contract 7.1.16).
func (s *Server) UpdateContainerResources(ctx context.Context, r *runtime.UpdateContainerResourcesRequest) (*runtime.UpdateContainerResourcesResponse, error) {
	return &runtime.UpdateContainerResourcesResponse{}, on(s.all, r.GetContainerId(), func(c *cristate.Container) error {
		if r.GetLinux() == nil {
			return missing("linux")
		}
		return s.d.Containers.UpdateResources(ctx, c.ID(), r.Linux, r.GetAnnotations())
	})
}

// ReopenContainerLog goes on in a new file (contract 7.1.17).
func (s *Server) ReopenContainerLog(ctx context.Context, r *runtime.ReopenContainerLogRequest) (*runtime.ReopenContainerLogResponse, error) {
	return &runtime.ReopenContainerLogResponse{}, on(s.all, r.GetContainerId(), func(c *cristate.Container) error { return s.d.Containers.ReopenLog(ctx, c.ID()) })
}

// CheckpointContainer writes a container's state (contract 7.1.23).
func (s *Server) CheckpointContainer(ctx context.Context, r *runtime.CheckpointContainerRequest) (*runtime.CheckpointContainerResponse, error) {
	return &runtime.CheckpointContainerResponse{}, on(s.all, r.GetContainerId(), func(c *cristate.Container) error {
		if r.GetLocation() == "" {
			return missing("location")
		}
		return s.timed("container_checkpoint", c, func(id string) error {
			return s.d.Containers.Checkpoint(ctx, id, r.Location, time.Duration(max(r.GetTimeout(), 0))*time.Second)
		})
	})
}

// ExecSync runs a command to its end (contract 7.1.18).
func (s *Server) ExecSync(ctx context.Context, r *runtime.ExecSyncRequest) (*runtime.ExecSyncResponse, error) {
	c, err := s.running(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(r.GetCmd()) == 0 {
		return nil, missing("cmd")
	}
	timeout := min(time.Duration(max(r.GetTimeout(), 0)), maxGrace/time.Second) * time.Second
	res, err := s.d.Execs.ExecSync(ctx, c.ID(), r.Cmd, timeout)
	if err != nil {
		return nil, err
	}
	return s.fitOutput(&runtime.ExecSyncResponse{Stdout: res.Stdout, Stderr: res.Stderr, ExitCode: res.ExitCode}), nil
}

// running finds a container that runs.
func (s *Server) running(id string) (*cristate.Container, error) {
	c, err := s.all.Get(id)
	if err != nil {
		return nil, err
	}
	if st := c.Status().State(); st != runtime.ContainerState_CONTAINER_RUNNING {
		return nil, fmt.Errorf("container %s is not running, it is %s: %w", c.ID(), st, errdefs.ErrFailedPrecondition)
	}
	return c, nil
}

// Exec answers where to connect to (contract 7.1.19).
func (s *Server) Exec(ctx context.Context, r *runtime.ExecRequest) (*runtime.ExecResponse, error) {
	c, err := s.running(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(r.GetCmd()) == 0 {
		return nil, missing("cmd")
	}
	r.ContainerId = c.ID()
	return s.d.Streams.Exec(ctx, r)
}

// Attach answers where to connect to.
func (s *Server) Attach(ctx context.Context, r *runtime.AttachRequest) (*runtime.AttachResponse, error) {
	c, err := s.running(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	r.ContainerId = c.ID()
	return s.d.Streams.Attach(ctx, r)
}

// PortForward answers where to connect to.
func (s *Server) PortForward(ctx context.Context, r *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	p, err := s.pods.Get(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if p.Status().State != cristate.PodReady {
		return nil, fmt.Errorf("pod sandbox %s is not ready: %w", p.ID(), errdefs.ErrFailedPrecondition)
	}
	r.PodSandboxId = p.ID()
	return s.d.Streams.PortForward(ctx, r)
}

// GetContainerEvents sends events until the client goes (contract 7.1.22).
func (s *Server) GetContainerEvents(_ *runtime.GetEventsRequest, stream grpc.ServerStreamingServer[runtime.ContainerEventResponse]) error {
	sub := s.d.Notifier.Events.Subscribe()
	defer sub.Close()
	for {
		e, err := sub.Next(stream.Context())
		if err != nil {
			return err
		}
		if err := stream.Send(e); err != nil {
			return err
		}
	}
}

// Bounds of what a client may give as names; they end up in file names, host
// names, labels and logs.
const maxName = 1024

func missing(field string) error {
	return fmt.Errorf("%s is required: %w", field, errdefs.ErrInvalidArgument)
}

func checkNames(kind string, names map[string]string) error {
	for field, v := range names {
		if len(v) > maxName || strings.ContainsAny(v, "\x00\n/") {
			return fmt.Errorf("%s %s of %d bytes is too long or has a slash, a newline or a zero byte in it: %w", kind, field, len(v), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func checkPod(c *runtime.PodSandboxConfig) error {
	m := c.GetMetadata()
	switch {
	case c == nil:
		return missing("config")
	case m == nil:
		return missing("config.metadata")
	case m.Name == "":
		return missing("config.metadata.name")
	}
	if err := checkMaps(c.Labels, c.Annotations); err != nil {
		return err
	}
	if len(c.Hostname) > maxHostname || strings.ContainsFunc(c.Hostname, func(r rune) bool { return r <= ' ' || r == '/' || r == 0x7f }) {
		return fmt.Errorf("config.hostname %.80q has more than %d bytes, or a space, slash or control character in it: %w", c.Hostname, maxHostname, errdefs.ErrInvalidArgument)
	}
	if d := c.LogDirectory; d != "" && (!filepath.IsAbs(d) || len(d) > maxPath || strings.ContainsRune(d, 0)) {
		return fmt.Errorf("config.log_directory %.80q is no absolute path of at most %d bytes: %w", d, maxPath, errdefs.ErrInvalidArgument)
	}
	if p := c.GetLinux().GetCgroupParent(); len(p) > maxPath || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r == ':' }) || slices.Contains(strings.Split(p, "/"), "..") {
		return fmt.Errorf("config.linux.cgroup_parent %.80q: a cgroup parent has at most %d bytes, no colon, no control character and no \"..\" in it: %w", p, maxPath, errdefs.ErrInvalidArgument)
	}
	for i, p := range c.PortMappings {
		if err := checkPort(p); err != nil {
			return fmt.Errorf("config.port_mappings[%d]: %w", i, err)
		}
	}
	return checkNames("pod sandbox metadata", map[string]string{"name": m.Name, "namespace": m.Namespace, "uid": m.Uid})
}

// maxHostname is the kernel's limit.
const maxHostname = 64

// maxPath is what the kernel takes, and the zero byte after it.
const maxPath = 4095

func checkPort(p *runtime.PortMapping) error {
	_, known := runtime.Protocol_name[int32(p.GetProtocol())]
	ok := func(port int32) bool { return port >= 0 && port <= math.MaxUint16 }
	if p == nil || !known || !ok(p.ContainerPort) || !ok(p.HostPort) {
		return fmt.Errorf("port %d of the host to %d, protocol %s: %w", p.GetHostPort(), p.GetContainerPort(), p.GetProtocol(), errdefs.ErrInvalidArgument)
	}
	if p.HostIp != "" && net.ParseIP(p.HostIp) == nil {
		return fmt.Errorf("host_ip %.80q is no address: %w", p.HostIp, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkContainer(c *runtime.ContainerConfig) error {
	m := c.GetMetadata()
	switch {
	case c == nil:
		return missing("config")
	case m == nil:
		return missing("config.metadata")
	case m.Name == "":
		return missing("config.metadata.name")
	case c.GetImage().GetImage() == "":
		return missing("config.image.image")
	}
	if err := checkMaps(c.Labels, c.Annotations); err != nil {
		return err
	}
	for i, mount := range c.Mounts {
		if mount == nil {
			return missing(fmt.Sprintf("config.mounts[%d]", i))
		}
	}
	for i, d := range c.Devices {
		if d == nil {
			return missing(fmt.Sprintf("config.devices[%d]", i))
		}
	}
	for i, e := range c.Envs {
		if e == nil || e.Key == "" || strings.ContainsAny(e.Key, "=\x00") || bytes.IndexByte(e.Value, 0) >= 0 {
			return fmt.Errorf("config.envs[%d]: no name, or one with an equals sign or zero byte: %w", i, errdefs.ErrInvalidArgument)
		}
	}
	if _, known := runtime.Signal_name[int32(c.StopSignal)]; !known {
		return fmt.Errorf("config.stop_signal %d: there is no such signal: %w", c.StopSignal, errdefs.ErrInvalidArgument)
	}
	return checkNames("container metadata", map[string]string{"name": m.Name})
}

// checkMaps bounds labels and annotations together: Kubernetes allows 256 KiB
// of annotations, and lists have to fit into a message.
func checkMaps(maps ...map[string]string) error {
	n := 0
	for _, m := range maps {
		for k, v := range m {
			n += len(k) + len(v)
		}
	}
	if n > 1<<20 {
		return fmt.Errorf("labels and annotations have %d bytes, at most %d are possible: %w", n, 1<<20, errdefs.ErrInvalidArgument)
	}
	return nil
}

// size is what a message takes in a list that holds it.
func size(m proto.Message) int { return proto.Size(m) + 8 }
