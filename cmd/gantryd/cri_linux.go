package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"github.com/prometheus/client_golang/prometheus"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/daemon/lifecycle"
	"github.com/gantryd/gantry/internal/edge/cni"
	"github.com/gantryd/gantry/internal/edge/cri/cricontainer"
	"github.com/gantryd/gantry/internal/edge/cri/criimage"
	"github.com/gantryd/gantry/internal/edge/cri/cripod"
	"github.com/gantryd/gantry/internal/edge/cri/criserver"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/cri/cristats"
	"github.com/gantryd/gantry/internal/edge/cri/cristream"
	"github.com/gantryd/gantry/internal/edge/shimclient"
	"github.com/gantryd/gantry/internal/engine/native"
	"github.com/gantryd/gantry/internal/engine/overlay"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/plugin"
)

// The types of Kubernetes' components (contract 2.2).
const (
	typeCRI                  = "io.containerd.cri.v1"
	typePodSandboxController = "io.containerd.podsandbox.controller.v1"
)

// criDeps is what Kubernetes' part stands on.
type criDeps struct {
	root, state  string
	views        view.Source
	bus          event.Bus
	manager      *shimclient.Manager
	unpacker     criimage.Unpacker
	roots        map[string]string // of snapshotters
	controllers  *sandboxers
	ready        func() error
	deprecations map[string]string
	metrics      prometheus.Registerer
	faults       *fault.Points
}

// cri is Kubernetes' part of the daemon.
type cri struct {
	server     *criserver.Server
	tcp        bool // it is served over TCP as well
	network    *cni.Network
	networks   string // directory of configurations
	components []lifecycle.Component
}

// sandboxers are the controllers of pods by name (contract 1.3.30, 7.3.25).
// Those that only Kubernetes has are in its namespace alone.
type sandboxers struct {
	shim func(namespace.ID) (sandbox.Controller, error)
	own  map[string]sandbox.Controller
}

// Controller implements sandbox.Controllers.
func (s *sandboxers) Controller(ns namespace.ID, name string) (sandbox.Controller, error) {
	if name == "" {
		return nil, fmt.Errorf("sandboxer is required: %w", errdefs.ErrInvalidArgument)
	}
	if name == cristate.SandboxerShim {
		return s.shim(ns)
	}
	if err := namespace.Check(ns); err != nil {
		return nil, err
	}
	if c := s.own[name]; c != nil && ns == cristate.Namespace {
		return c, nil
	}
	return nil, fmt.Errorf("sandboxer %q in namespace %s: %w", name, ns, errdefs.ErrNotFound)
}

// openCRI builds the kubelet's services; plugin.ErrDisabled if one of their
// parts is disabled.
func openCRI(ctx context.Context, host *plugin.Host, d criDeps, log *slog.Logger) (_ *cri, err error) {
	var ready func()
	serverConfig, err := plugin.Open(ctx, host, plugin.New(typeGRPC, "cri", cristate.DefaultServerConfig(), func(_ context.Context, env *plugin.Env, c cristate.ServerConfig) (cristate.ServerConfig, error) {
		ready = env.RegisterReadiness()
		return c, nil
	}))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ready() // nobody is to wait for it
		}
	}()
	config, err := plugin.Open(ctx, host, plugin.New(typeCRI, "runtime", cristate.DefaultRuntimeConfig(), func(_ context.Context, _ *plugin.Env, c cristate.RuntimeConfig) (cristate.RuntimeConfig, error) {
		return c, checkRuntimes(c)
	}))
	if err != nil {
		return nil, err
	}
	root, state := filepath.Join(d.root, cristate.PluginID), filepath.Join(d.state, cristate.PluginID)
	images, err := plugin.Open(ctx, host, plugin.New(typeCRI, "images", imagesConfig(cristate.DefaultImagesConfig()), func(_ context.Context, env *plugin.Env, c imagesConfig) (*criimage.Service, error) {
		if absent := c.absent(slices.Sorted(maps.Keys(d.roots))...); len(absent) > 0 {
			return nil, errors.Join(absent...)
		}
		return criimage.New(criimage.Deps{Source: d.views, Events: d.bus, Unpacker: d.unpacker, Config: cristate.ImagesConfig(c), Runtime: config, Roots: d.roots,
			HostsDir: filepath.Join(state, "hosts"), Metrics: d.metrics, Log: env.Log})
	}))
	if err != nil {
		return nil, err
	}

	handlers := map[string]cni.HandlerConfig{}
	for name, rt := range config.Containerd.Runtimes {
		if rt.CNIConfDir != "" {
			handlers[name] = cni.HandlerConfig{ConfDir: rt.CNIConfDir, MaxConfNum: rt.CNIMaxConfNum}
		}
	}
	bins := config.CNI.BinDirs
	if config.CNI.BinDir != "" {
		bins = []string{config.CNI.BinDir}
	}
	network, err := cni.Open(cni.Options{Dir: filepath.Join(d.root, "io.gantry.cni"), PerRuntime: handlers, Log: log, Faults: d.faults, Metrics: d.metrics, Config: cni.Config{
		BinDirs: bins, ConfDir: config.CNI.ConfDir, MaxConfNum: config.CNI.MaxConfNum, SetupSerially: config.CNI.SetupSerially, ConfTemplate: config.CNI.ConfTemplate,
		IPPref: config.CNI.IPPref, UseInternalLoopback: config.CNI.UseInternalLoopback}})
	if err != nil {
		return nil, err
	}

	look := &criHost{config: config, ask: d.manager.Info, attributes: mountAttributes(), log: log, runtimes: map[string]answer{}}
	bases, err := baseSpecs(config)
	if err != nil {
		return nil, err
	}
	pods, containers := cristate.NewPods(), cristate.NewContainers()
	notifier := &cristate.Notifier{Pods: pods, Containers: containers, Names: images.Names, Events: cristate.NewEvents()}
	dirs := cripod.Dirs{Root: root, State: state, NetNS: cni.NetNSDir}
	if config.NetNSMountsUnderStateDir {
		dirs.NetNS = filepath.Join(d.state, "netns")
	}

	var containerService *cricontainer.Service
	plugins, askPods, askContainers, err := openNRI(ctx, host, config, d.metrics, pods, containers, func() *cricontainer.Service { return containerService })
	if err != nil {
		return nil, err
	}
	containerService, err = cricontainer.New(cricontainer.Deps{NRI: askContainers, Views: d.views, Events: d.bus, Pods: pods, Containers: containers, Notifier: notifier,
		Images: images, Config: config, WritesLogs: look.writesLogs,
		Base:   func(rt cristate.Runtime) *specs.Spec { return bases[rt.BaseRuntimeSpec] },
		CDI:    cdiDevices(config),
		PodDir: dirs.Of, PodShm: dirs.Shm, Host: look.facts,
		Root: root, State: state, Faults: d.faults, Log: log})
	if err != nil {
		return nil, err
	}
	podImages := podImages{images}
	controllerDeps := cripod.ControllerDeps{Views: d.views, Namespace: cristate.Namespace, Config: config, Dirs: dirs, Images: podImages, Log: log,
		Spec: func(ctx context.Context, in cripod.SpecInput) (*specs.Spec, error) {
			return pauseSpec(ctx, config, look, in, log)
		}}
	pause := cripod.NewPodSandbox(controllerDeps)
	d.controllers.own[cristate.SandboxerPodSandbox] = pause
	d.controllers.own[cristate.SandboxerPauseless] = cripod.NewPauseless(controllerDeps, pause)
	for _, id := range []string{cristate.SandboxerPodSandbox, cristate.SandboxerPauseless} {
		if _, err := plugin.Open(ctx, host, plugin.New(typePodSandboxController, id, struct{}{}, func(context.Context, *plugin.Env, struct{}) (struct{}, error) { return struct{}{}, nil })); err != nil {
			return nil, err
		}
	}
	podService := cripod.New(cripod.Deps{NRI: askPods, Views: d.views, Controllers: d.controllers, Pods: pods, Config: config, Dirs: dirs, Network: network, Images: podImages,
		Containers: containerService, Labels: podLabels(config), Notify: notifier, Metrics: d.metrics, Log: log, Faults: d.faults})

	period, retention, err := cristats.Periods(config)
	if err != nil {
		return nil, err
	}
	stats := cristats.New(cristats.Options{Pods: pods, Containers: containers, Period: period, Retention: retention, Log: log,
		Root: func(name string) string { return d.roots[name] },
		Usage: func(ctx context.Context, snapshotter, key string) (snapshot.Usage, error) {
			v, err := d.views.In(cristate.Namespace, "")
			if err != nil {
				return snapshot.Usage{}, err
			}
			s, err := v.Snapshots(snapshotter)
			if err != nil {
				return snapshot.Usage{}, err
			}
			return s.Usage(ctx, key)
		}})
	streams, server, err := openStreams(ctx, d, config, serverConfig, pods, containers, containerService, filepath.Join(state, "execs"), log)
	if err != nil {
		return nil, err
	}

	var opened atomic.Bool
	c := &cri{tcp: !serverConfig.DisableTCPService, network: network, networks: config.CNI.ConfDir, server: criserver.New(criserver.Deps{Notifier: notifier, Pods: podService, Containers: containerService, Images: images, Execs: streams, Streams: server,
		Stats: stats, Network: network, Runtime: config, Ready: d.ready, Deprecations: d.deprecations, Driver: cgroupDriver(config, "/run/systemd/system"), Version: version, Metrics: d.metrics, Log: log,
		Config: struct { // for scripts, in containerd's names
			cristate.RuntimeConfig
			ContainerdRootDir string `json:"containerdRootDir"`
			RootDir           string `json:"rootDir"`
			StateDir          string `json:"stateDir"`
		}{config, d.root, root, state},
		Features: func(ctx context.Context, _ string, rt cristate.Runtime) criserver.Features {
			return look.features(ctx, rt)
		},
		Opened: func() error {
			if !opened.Load() {
				return fmt.Errorf("server is not initialized yet: %w", errdefs.ErrUnavailable)
			}
			return nil
		}})}
	c.components = []lifecycle.Component{
		{Name: "pod networks", Run: network.Run},
		{Name: "images of pods", Run: images.Run},
		{Name: "streams of pods", Run: server.Run, Stop: streams.Close},
		{Name: "statistics of pods", Run: stats.Run},
		{Name: "pods", Run: func(ctx context.Context) error {
			sub, err := d.bus.Subscribe(ctx, "namespace=="+string(cristate.Namespace)+",topic=="+event.TopicTaskExit, "namespace=="+string(cristate.Namespace)+",topic=="+event.TopicSandboxExit)
			if err != nil {
				return fmt.Errorf("watch the ends of pods: %w", err)
			}
			defer sub.Close()
			// Images first: the names that statuses show are theirs.
			select {
			case <-images.Ready():
			case <-ctx.Done():
				return nil
			}
			// Containers before pods: a pod that was being restored is taken away with its own.
			if err := containerService.Recover(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("recover containers: %w", err)
			}
			if err := podService.Recover(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("recover pods: %w", err)
			}
			if plugins != nil {
				plugins.Start(ctx)
				defer plugins.Close()
			}
			opened.Store(true)
			ready()
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() { watchPods(ctx, sub, podService) })
			wg.Go(func() { _ = podService.Serve(ctx) })
			return containerService.Run(ctx)
		}, Stop: func(ctx context.Context) error {
			return errors.Join(containerService.Close(ctx), podService.Close(ctx))
		}},
	}
	return c, nil
}

// checkNetwork is nil on a host that has no pod networks at all: there the
// kubelet is told so, and nobody else misses them.
func (c *cri) checkNetwork(ctx context.Context) error {
	for _, kind := range []string{"*.conflist", "*.conf", "*.json"} {
		if files, err := filepath.Glob(filepath.Join(c.networks, kind)); err != nil || len(files) > 0 {
			return c.network.Status(ctx, "")
		}
	}
	return nil
}

// checkRuntimes refuses a table of handlers that cannot work.
func checkRuntimes(c cristate.RuntimeConfig) error {
	if _, _, err := c.Handler(""); err != nil {
		return fmt.Errorf("default_runtime_name: %w", err)
	}
	for name, rt := range c.Containerd.Runtimes {
		if _, err := rt.Record(); err != nil {
			return fmt.Errorf("runtimes.%s: %w", name, err)
		}
	}
	return nil
}

// imagesConfig is the block of the images, which knows the snapshotters.
type imagesConfig cristate.ImagesConfig

// Ineffective implements config.Reporter.
func (c *imagesConfig) Ineffective(report func(why string, key ...string)) {
	(*cristate.ImagesConfig)(c).Ineffective(report)
	c.unknown([]string{native.Name, overlay.Name}, func(why string, key ...string) { report(why+"; pods cannot be run", key...) })
}

// absent are the snapshotters that the block names and that are not loaded.
func (c *imagesConfig) absent(loaded ...string) (all []error) {
	c.unknown(loaded, func(why string, key ...string) {
		all = append(all, fmt.Errorf("%s: %s: %w", strings.Join(key, "."), why, errdefs.ErrNotFound))
	})
	return all
}

// unknown reports the keys that name a snapshotter which is not among those given.
func (c *imagesConfig) unknown(names []string, report func(why string, key ...string)) {
	one := func(name string, key ...string) {
		if name != "" && !slices.Contains(names, name) {
			report(fmt.Sprintf("there is no snapshotter %q (there are %s)", name, strings.Join(names, ", ")), key...)
		}
	}
	one(c.Snapshotter, "snapshotter")
	for _, handler := range slices.Sorted(maps.Keys(c.RuntimePlatforms)) {
		one(c.RuntimePlatforms[handler].Snapshotter, "runtime_platforms", handler, "snapshotter")
	}
}

// cgroupDriver is that of the default handler, or of the first other one that
// tells: a runc with options, or the built-in one, whose are the defaults. Else
// it is systemd's where that runs, which the directory is a sign of (contract 7.1.3).
func cgroupDriver(c cristate.RuntimeConfig, sign string) runtime.CgroupDriver {
	all := c.Containerd.Runtimes
	for _, name := range append([]string{c.Containerd.DefaultRuntimeName}, slices.Sorted(maps.Keys(all))...) {
		rt := all[name]
		switch {
		case !rt.Runc() || rt.Options == nil && name != "runc":
		case rt.SystemdCgroup():
			return runtime.CgroupDriver_SYSTEMD
		default:
			return runtime.CgroupDriver_CGROUPFS
		}
	}
	if info, err := os.Lstat(sign); err == nil && info.IsDir() {
		return runtime.CgroupDriver_SYSTEMD
	}
	return runtime.CgroupDriver_CGROUPFS
}

// baseSpecs reads the specifications that handlers begin with.
func baseSpecs(c cristate.RuntimeConfig) (map[string]*specs.Spec, error) {
	out := map[string]*specs.Spec{}
	for name, rt := range c.Containerd.Runtimes {
		if rt.BaseRuntimeSpec == "" {
			continue
		}
		data, err := os.ReadFile(rt.BaseRuntimeSpec)
		if err != nil {
			return nil, fmt.Errorf("runtimes.%s.base_runtime_spec: %w", name, err)
		}
		var s specs.Spec
		if err := json.Unmarshal(data, &s); err != nil {
			return nil, fmt.Errorf("runtimes.%s.base_runtime_spec: %s: %v: %w", name, rt.BaseRuntimeSpec, err, errdefs.ErrInvalidArgument)
		}
		out[rt.BaseRuntimeSpec] = &s
	}
	return out, nil
}

// pauseSpec is the specification of a pod's own container.
func pauseSpec(ctx context.Context, config cristate.RuntimeConfig, look *criHost, in cripod.SpecInput, log *slog.Logger) (*specs.Spec, error) {
	host := look.facts(ctx, in.Runtime)
	var err error
	if in.Image == nil {
		// Nothing is run: only what is set in the namespaces counts.
		sysctls, err := crispec.Sysctls(in.Meta.Config, config, host)
		return &specs.Spec{Version: specs.Version, Linux: &specs.Linux{Sysctl: sysctls}}, err
	}
	s := crispec.SandboxInput{ID: in.Meta.ID, Config: in.Meta.Config, Runtime: in.Runtime, RuntimeConfig: config, Host: host, NetNSPath: in.Meta.NetNSPath,
		UserNSPath: in.UserNSPath, ProcessLabel: in.Meta.ProcessLabel, MountLabel: in.MountLabel, Dir: in.Dir, Shm: in.Shm, Log: log}
	s.Image, s.ImageName = in.Image.Config, in.Image.Name
	if s.User, err = crispec.ResolveUser(crispec.SandboxIdentity(in.Meta.Config, s.Image.User), nil); err != nil {
		return nil, err
	}
	sc := in.Meta.Config.GetLinux().GetSecurityContext()
	ref, err := crispec.SeccompRef(sc.GetSeccomp(), sc.GetSeccompProfilePath(), sc.GetPrivileged(), config)
	if err != nil {
		return nil, err
	}
	if ref != "" {
		if s.Seccomp, err = cricontainer.ReadSeccomp(ref); err != nil {
			return nil, err
		}
	}
	return crispec.Sandbox(s)
}

// podLabels are SELinux's, nil where it is not used.
func podLabels(c cristate.RuntimeConfig) cripod.Labels {
	if !c.EnableSELinux || !selinux.GetEnabled() {
		return nil
	}
	selinux.CategoryRange = uint32(max(c.SELinuxCategoryRange, 1))
	return labels{}
}

type labels struct{}

func (labels) Make(cfg *runtime.PodSandboxConfig, vm bool) (process, mount string, err error) {
	return crispec.Labels(cfg.GetLinux().GetSecurityContext().GetSelinuxOptions(), "", vm)
}
func (labels) Reserve(process string) { selinux.ReserveLabel(process) }
func (labels) Release(process string) { selinux.ReleaseLabel(process) }

// podImages are the images as pods see them.
type podImages struct{ *criimage.Service }

func (i podImages) EnsureSandboxImage(ctx context.Context, handler string, _ *runtime.PodSandboxConfig) (cripod.Image, error) {
	img, err := i.Service.EnsureSandboxImage(ctx, handler)
	return cripod.Image{Name: i.SandboxImage(), ID: img.ID, ChainID: img.ChainID, Snapshotter: img.Snapshotter, Config: img.Spec.Config}, err
}

// openStreams builds exec, attach and port forward.
func openStreams(ctx context.Context, d criDeps, config cristate.RuntimeConfig, server cristate.ServerConfig, pods *cristate.Index[*cristate.Pod], containers *cristate.Index[*cristate.Container],
	service *cricontainer.Service, dir string, log *slog.Logger) (*cristream.Service, *cristream.Server, error) {
	v, err := d.views.In(cristate.Namespace, "")
	if err != nil {
		return nil, nil, err
	}
	drain, err := time.ParseDuration(config.DrainExecSyncIOTimeout)
	if err != nil && config.DrainExecSyncIOTimeout != "" {
		return nil, nil, fmt.Errorf("drain_exec_sync_io_timeout: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	s, err := cristream.Open(ctx, cristream.Deps{Tasks: v.Tasks(), Dir: dir, Drain: drain, Log: log,
		Container: func(ctx context.Context, id string) (cristream.Container, error) {
			c, err := containers.Get(id)
			if err != nil {
				return cristream.Container{}, err
			}
			rec, err := v.Containers().Get(ctx, container.ID(c.ID()))
			if err != nil {
				return cristream.Container{}, err
			}
			var spec specs.Spec
			if err := json.Unmarshal(rec.Spec.Value, &spec); err != nil {
				return cristream.Container{}, fmt.Errorf("specification of container %s: %v: %w", c.ID(), err, errdefs.ErrInternal)
			}
			m := c.Meta()
			out := cristream.Container{ID: rec.ID, Process: spec.Process, TTY: m.Config.GetTty(), Stdin: m.Config.GetStdin(), StdinOnce: m.Config.GetStdinOnce(), Gone: c.Gone()}
			if st := c.Status().State(); st != runtime.ContainerState_CONTAINER_RUNNING {
				out.Running = fmt.Errorf("container %s is not running, it is %s: %w", c.ID(), st, errdefs.ErrFailedPrecondition)
			}
			files, err := service.Streams(c.ID())
			if err != nil {
				return cristream.Container{}, err
			}
			out.StdinPath, out.LogPath, out.InputEnds = files.Stdin, files.Log, func() { service.EndInput(rec.ID) }
			return out, nil
		},
		Pod: func(_ context.Context, id string) (cristream.Pod, error) {
			p, err := pods.Get(id)
			if err != nil {
				return cristream.Pod{}, err
			}
			out := cristream.Pod{ID: p.ID(), NetNSPath: p.Meta().NetNSPath}
			if p.Status().State != cristate.PodReady {
				out.Ready = fmt.Errorf("pod sandbox %s is not ready: %w", p.ID(), errdefs.ErrFailedPrecondition)
			}
			return out, nil
		}})
	if err != nil {
		return nil, nil, err
	}
	x, err := cristream.Listen(s, server)
	return s, x, err
}

// watchPods tells the pods' service when a pod's own process has ended.
func watchPods(ctx context.Context, sub event.Subscription, pods *cripod.Service) {
	for {
		e, err := sub.Next(ctx)
		if err != nil {
			return
		}
		switch x := e.Event.(type) {
		case event.TaskExit:
			if x.ID == x.ContainerID { // a container that is no pod is not known to pods
				pods.OnExit(x.ID, sandbox.Exit{Status: x.ExitStatus, At: x.ExitedAt})
			}
		case event.SandboxExit:
			pods.OnExit(x.SandboxID, sandbox.Exit{Status: x.ExitStatus, At: x.ExitedAt})
		}
	}
}

// cdiDevices gives containers devices that are described by files of the host.
// The files are read at each use: they come and go, and are few.
func cdiDevices(c cristate.RuntimeConfig) func(*specs.Spec, []string) error {
	if !c.EnableCDI {
		return nil
	}
	return func(s *specs.Spec, names []string) error {
		cache, err := cdi.NewCache(cdi.WithSpecDirs(c.CDISpecDirs...), cdi.WithAutoRefresh(false))
		if err != nil {
			return fmt.Errorf("read CDI specs: %w", err)
		}
		if unknown, err := cache.InjectDevices(s, names...); err != nil {
			return fmt.Errorf("CDI devices %q: %v: %w", unknown, err, errdefs.ErrNotFound)
		}
		return nil
	}
}
