package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/userns"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/daemon/config"
	"github.com/gantryd/gantry/internal/daemon/lifecycle"
	"github.com/gantryd/gantry/internal/edge/debughttp"
	"github.com/gantryd/gantry/internal/edge/registry"
	"github.com/gantryd/gantry/internal/edge/shimclient"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/boltmeta"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/engine/walkdiff"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/plugin"
	"github.com/gantryd/gantry/internal/lib/tarstream"
	"github.com/gantryd/gantry/internal/service/archive"
	"github.com/gantryd/gantry/internal/service/autoremove"
	"github.com/gantryd/gantry/internal/service/canary"
	"github.com/gantryd/gantry/internal/service/gc"
	"github.com/gantryd/gantry/internal/service/pull"
	"github.com/gantryd/gantry/internal/service/push"
	"github.com/gantryd/gantry/internal/service/transfer"
	"github.com/gantryd/gantry/internal/service/unpack"
)

// The types of component that the contract has names for (contract 2.2).
const (
	typeContent     = "io.containerd.content.v1"
	typeSnapshotter = "io.containerd.snapshotter.v1"
	typeDiffer      = "io.containerd.differ.v1"
	typeEvent       = "io.containerd.event.v1"
	typeMetadata    = "io.containerd.metadata.v1"
	typeGC          = "io.containerd.gc.v1"
	typeLease       = "io.containerd.lease.v1"
	typeSandbox     = "io.containerd.sandbox.store.v1"
	typeSandboxer   = "io.containerd.sandbox.controller.v1"
	typeShim        = "io.containerd.shim.v1"
	typeRuntime     = "io.containerd.runtime.v2"
	typeService     = "io.containerd.service.v1"
	typeStreaming   = "io.containerd.streaming.v1"
	typeTransfer    = "io.containerd.transfer.v1"
	typeInternal    = "io.containerd.internal.v1"
	typeWarning     = "io.containerd.warning.v1"
	typeGRPC        = "io.containerd.grpc.v1"
	typeServer      = "io.containerd.server.v1"
)

// program is the daemon, built and not yet running.
type program struct {
	host       *plugin.Host
	components []lifecycle.Component
}

// assemble builds the daemon in dependency order: what needs something is
// below it, and takes it as an argument.
func assemble(ctx context.Context, cfg *config.Config, deprecations map[string]string, log *slog.Logger) (_ *program, err error) {
	warn := func(w config.Warning) { log.Warn(w.String()) }
	faults, err := fault.Parse(os.Getenv("GANTRY_FAULT"), fault.Kill)
	if err != nil {
		return nil, fmt.Errorf("GANTRY_FAULT: %w", err)
	}
	host := plugin.NewHost(plugin.Options{Root: cfg.Root, State: cfg.State, GRPCAddress: cfg.Address(), TTRPCAddress: cfg.TTRPCAddress(),
		Disabled: cfg.DisabledPlugins, Required: cfg.RequiredPlugins, Config: cfg.Decoder(warn), Log: log})
	defer func() {
		if err != nil {
			err = errors.Join(err, host.Close())
		}
	}()
	platform := plugin.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}

	// What keeps bytes.
	blobs, err := plugin.Open(ctx, host, plugin.New(typeContent, "content", struct{}{}, func(_ context.Context, env *plugin.Env, _ struct{}) (*blobdir.Store, error) {
		env.Export("root", env.Root)
		return blobdir.Open(env.Root, blobdir.Options{Logger: env.Log, Faults: faults})
	}))
	if err != nil {
		return nil, err
	}
	snapshotters := map[string]snapshot.Store{}
	for _, open := range builtinSnapshotters() {
		name, store, err := open(ctx, host, platform, faults)
		switch {
		case err == nil:
			snapshotters[name] = store
		case errors.Is(err, plugin.ErrDisabled):
		default:
			// Kept in the host's table, where clients read it.
			log.Warn("snapshotter is not available", "snapshotter", name, "error", err)
		}
	}

	// Events and records.
	bus, err := plugin.Open(ctx, host, plugin.New(typeEvent, "exchange", struct{}{}, func(context.Context, *plugin.Env, struct{}) (*memory.Bus, error) {
		return memory.NewBus(), nil
	}))
	if err != nil {
		return nil, err
	}
	meta := plugin.New(typeMetadata, "bolt", boltDefaults(), func(_ context.Context, env *plugin.Env, c boltConfig) (*boltmeta.DB, error) {
		path := filepath.Join(env.Root, "meta.db")
		env.Export("path", path)
		env.Export("policy", c.SharingPolicy)
		return boltmeta.Open(path, boltmeta.Options{Content: blobs, Snapshotters: snapshotters, Events: bus, SharingPolicy: c.SharingPolicy,
			NoSync: c.NoSync, OpenTimeout: boltTimeout(cfg), Faults: faults, Logger: env.Log})
	})
	meta.Requires = []string{typeContent, typeEvent, typeSnapshotter}
	db, err := plugin.Open(ctx, host, meta)
	if err != nil {
		return nil, err
	}
	scheduler := plugin.New(typeGC, "scheduler", gcDefaults(), func(_ context.Context, env *plugin.Env, c gcConfig) (*gc.Collector, error) {
		env.Export("PauseThreshold", fmt.Sprint(c.PauseThreshold))
		env.Export("DeletionThreshold", fmt.Sprint(c.DeletionThreshold))
		env.Export("MutationThreshold", fmt.Sprint(c.MutationThreshold))
		env.Export("ScheduleDelay", c.ScheduleDelay.String())
		return gc.New(db, gc.Config{PauseThreshold: c.PauseThreshold, DeletionThreshold: c.DeletionThreshold, MutationThreshold: c.MutationThreshold,
			ScheduleDelay: c.ScheduleDelay, StartupDelay: c.StartupDelay}, env.Log), nil
	})
	scheduler.Requires = []string{typeMetadata}
	collector, err := plugin.Open(ctx, host, scheduler)
	if err != nil {
		return nil, err
	}
	records := gc.SyncDelete(db, collector)

	// Layers.
	tmp := filepath.Join(cfg.Root, "tmpmounts")
	walking := plugin.New(typeDiffer, "walking", struct{}{}, func(_ context.Context, env *plugin.Env, _ struct{}) (func(content.Store) diff.Service, error) {
		return walkdiffs(cfg, tmp, env.Log)
	})
	walking.Requires, walking.Platforms = []string{typeMetadata}, []plugin.Platform{platform}
	walk, err := plugin.Open(ctx, host, walking)
	if err != nil {
		return nil, err
	}
	differs := plugin.New(typeService, "diff-service", diffDefaults(), func(_ context.Context, env *plugin.Env, c diffConfig) (func(view.Records) diff.Service, error) {
		for _, name := range c.Default {
			if name != "walking" {
				env.Log.Warn("differ is not available", "differ", name)
			}
		}
		return func(rec view.Records) diff.Service {
			chain := walkdiff.Chain{walk(rec.Content())}
			if c.SyncFS {
				return syncing{chain}
			}
			return chain
		}, nil
	})
	differs.Requires = []string{typeDiffer}
	differ, err := plugin.Open(ctx, host, differs)
	if err != nil {
		return nil, err
	}

	// Tasks.
	libexec, err := plugin.Open(ctx, host, plugin.New(typeInternal, "opt", optDefaults(), func(_ context.Context, env *plugin.Env, c optConfig) (string, error) {
		env.Export("path", c.Path)
		return c.Path, nil
	}))
	if err != nil && !errors.Is(err, plugin.ErrDisabled) {
		return nil, err
	}
	shims := plugin.New(typeShim, "manager", shimConfig{}, func(_ context.Context, env *plugin.Env, c shimConfig) (*shimclient.Manager, error) {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		return shimclient.New(shimclient.Options{State: cfg.State, Root: cfg.Root, Records: records, Events: bus,
			TTRPCAddress: cfg.TTRPCAddress(), GRPCAddress: cfg.Address(), SelfPath: self, SocketDir: c.SocketDir, Version: version, Env: c.Env,
			ShimDirs: shimDirs(self, libexec), Debug: cfg.Debug.Level == "debug" || cfg.Debug.Level == "trace", Timeouts: shimTimeouts(cfg), Faults: faults, Logger: env.Log})
	})
	shims.Requires = []string{typeEvent, typeMetadata}
	// The servers stop before it is closed, see components.
	shims.Close = func(m *shimclient.Manager) error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		return m.Close(ctx)
	}
	manager, err := plugin.Open(ctx, host, shims)
	if err != nil {
		return nil, err
	}
	tasks := plugin.New(typeRuntime, "task", taskConfig{}, func(_ context.Context, env *plugin.Env, c taskConfig) (*shimclient.Manager, error) {
		if err := publishPlatforms(env, c.Platforms, platform); err != nil {
			return nil, err
		}
		env.Export("log-uri-schemes", "fifo,binary,binary-v2,file")
		return manager, manager.Scan()
	})
	tasks.Requires, tasks.Close = []string{typeShim}, func(*shimclient.Manager) error { return nil }
	if _, err := plugin.Open(ctx, host, tasks); err != nil {
		return nil, err
	}

	// Images from and to everywhere.
	streams, err := plugin.Open(ctx, host, plugin.New(typeStreaming, "manager", struct{}{}, func(context.Context, *plugin.Env, struct{}) (*memory.Streams, error) {
		return memory.NewStreams(), nil
	}))
	if err != nil {
		return nil, err
	}
	unpacker := unpack.New(func(rec view.Records) diff.Applier { return differ(rec) }, unpack.Options{Snapshotter: defaultSnapshotter, Log: log})
	local := plugin.New(typeTransfer, "local", transferDefaults(), func(_ context.Context, env *plugin.Env, c transferConfig) (*transfer.Service, error) {
		remotes := registry.New(registry.Config{ConfigPath: c.ConfigPath, UserAgent: "containerd/" + version, Log: env.Log})
		return transfer.New(transfer.Deps{Records: records, Registries: remotes,
			Puller:   pull.New(unpacker, pull.Options{Downloads: c.MaxConcurrentDownloads, Log: env.Log}),
			Pusher:   push.New(push.Options{Uploads: c.MaxConcurrentUploadedLayers, Log: env.Log}),
			Archiver: archive.New(env.Log), Unpacker: unpacker, Log: env.Log}), nil
	})
	local.Requires = []string{typeMetadata, typeDiffer, typeSnapshotter}
	transfers, err := plugin.Open(ctx, host, local)
	if err != nil {
		return nil, err
	}

	views := view.Join(records, func(rec view.Records) view.Services {
		store, err := manager.In(rec.Namespace())
		if err != nil {
			panic(fmt.Sprintf("a namespace that the records accept is refused by the tasks: %v", err))
		}
		return view.Services{Diff: differ(rec), Tasks: store, Transfer: transfers.In(rec), Streams: streams.In(rec.Namespace())}
	})

	parts := checks(db.Probe, snapshotters, manager, tmp)
	if faults != nil {
		parts = nil // a test that counts what the daemon does is not to count these
	}
	watch := canary.New(parts, 0, 0, log)
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(debughttp.Readiness(watch.Results))
	controllers := &sandboxers{shim: manager.Sandboxes, own: map[string]sandbox.Controller{}}
	kube, err := openCRI(ctx, host, criDeps{root: cfg.Root, state: cfg.State, views: views, bus: bus, manager: manager, unpacker: unpacker,
		roots: snapshotterRoots(host), controllers: controllers, deprecations: deprecations, metrics: metrics, faults: faults,
		ready: func() error { return watch.Err("network") }}, log) // which is told apart (contract 7.1.2)
	switch {
	case err == nil:
	case errors.Is(err, plugin.ErrDisabled): // by the name of any of its parts (contract 13.43)
		kube = nil
	case slices.ContainsFunc(cfg.RequiredPlugins, func(uri string) bool { return strings.Contains(uri, ".cri") }):
		return nil, err
	default: // all others of the host go on (contract 2.1.4)
		log.Error("Kubernetes' services are not available", "error", err)
		kube = nil
	}
	if kube != nil {
		watch.Add(canary.Check{Name: "network", Run: kube.checkNetwork})
	}

	id, err := serverUUID(filepath.Join(cfg.Root, typeGRPC+".introspection"))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(listNames(ctx, host), listServers(ctx, host)); err != nil {
		return nil, err
	}
	if err := host.CheckRequired(); err != nil {
		return nil, err
	}
	servers, warnings, err := cfg.Servers()
	if err != nil {
		return nil, err
	}
	rest, err := cfg.Rest()
	if err != nil {
		return nil, err
	}
	for _, w := range append(warnings, rest...) {
		warn(w)
	}
	api := api{views: views, namespaces: db.Namespaces(), bus: bus, streams: streams, manager: manager, host: host, uuid: id, controllers: controllers, kube: kube, log: log}
	components := []lifecycle.Component{
		api.ttrpc(servers.TTRPC),
		api.grpc(servers.GRPC),
		api.tcp(servers.TCP),
		{Name: "task recovery", Run: func(ctx context.Context) error {
			if err := manager.Recover(ctx); err != nil && ctx.Err() == nil {
				log.Error("recover tasks", "error", err)
			}
			<-ctx.Done()
			return nil
		}},
		{Name: "interrupted transfers", Run: func(ctx context.Context) error { return transfers.Run(ctx, db.Namespaces()) }},
		{Name: "removal of ended containers", Run: autoremove.New(views, db.Namespaces(), bus, filepath.Join(cfg.Root, "io.gantry.logs"), log).Run},
		{Name: "garbage collection", Run: collector.Run},
		{Name: "readiness", Run: watch.Run, Stop: func(ctx context.Context) error { return buryCanaries(ctx, snapshotters) }},
		debugHTTP("metrics server", servers.Metrics.Address, func() (net.Listener, error) { return net.Listen("tcp", servers.Metrics.Address) }, watch, metrics),
		debugHTTP("debug server", servers.Debug.Address, func() (net.Listener, error) {
			return listenUnix(servers.Debug.Address, servers.Debug.UID, servers.Debug.GID)
		}, watch, metrics),
	}
	// The last stops first. Pods hear of events to their end; whoever else does
	// would otherwise keep the servers from ending.
	components = append(components, lifecycle.Component{Name: "events", Stop: func(context.Context) error { return bus.Close() }})
	if kube != nil {
		components = append(components, kube.components...)
	}
	return &program{host: host, components: components}, nil
}

// snapshotterRoots are the directories that snapshotters use, by name.
func snapshotterRoots(host *plugin.Host) map[string]string {
	roots := map[string]string{}
	for _, row := range host.Plugins() {
		if row.Type == typeSnapshotter {
			roots[row.ID] = row.Exports["root"]
		}
	}
	return roots
}

// boltTimeout bounds the wait for another process that has the metadata open.
// containerd's default waits for ever; here a start that cannot succeed ends.
func boltTimeout(cfg *config.Config) time.Duration {
	if d := cfg.Timeouts["io.containerd.timeout.bolt.open"]; d > 0 {
		return d
	}
	return 10 * time.Second
}

func shimTimeouts(cfg *config.Config) shimclient.Timeouts {
	t := func(name string) time.Duration { return cfg.Timeouts["io.containerd.timeout."+name] }
	return shimclient.Timeouts{Load: t("shim.load"), State: t("task.state"), Stats: t("metrics.shimstats"), Cleanup: t("shim.cleanup"), Shutdown: t("shim.shutdown")}
}

// shimDirs are searched for shims before PATH: libexec of this installation,
// the daemon's own folder, and the opt directory (contract 5.1.2, 5.1.3).
func shimDirs(self, opt string) []string {
	bin := filepath.Dir(self)
	dirs := []string{filepath.Join(filepath.Dir(bin), "libexec", "gantry"), bin}
	if opt != "" {
		dirs = append(dirs, filepath.Join(opt, "bin"))
	}
	return dirs
}

// walkdiffs makes differs, each for the content of one view.
func walkdiffs(cfg *config.Config, tmp string, log *slog.Logger) (func(content.Store) diff.Service, error) {
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return nil, err
	}
	epoch, err := walkdiff.EpochFromEnv(os.Getenv)
	if err != nil {
		return nil, err
	}
	opts := walkdiff.Options{TempDir: tmp, SourceDateEpoch: epoch, Processors: processors(cfg), GzipHelper: tarstream.GzipHelper(os.Getenv),
		UserNS: userns.RunningInUserNS(), Report: reportLeftOut(log)}
	return func(store content.Store) diff.Service { return walkdiff.New(store, opts) }, nil
}

// syncing makes every Apply durable by itself (contract 3.3.1).
type syncing struct{ diff.Service }

func (s syncing) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts diff.ApplyOptions) (ocispec.Descriptor, error) {
	opts.Sync = true
	return s.Service.Apply(ctx, desc, mounts, opts)
}

// listNames adds the rows that clients look for and that are no component
// here: the services are packages of the wire (contract 2.2.15, 2.2.16).
func listNames(ctx context.Context, host *plugin.Host) error {
	for _, name := range []struct{ typ, id string }{
		{typeLease, "manager"}, {typeSandbox, "local"}, {typeSandboxer, "shim"}, {typeWarning, "deprecations"},
		{typeService, "containers-service"}, {typeService, "content-service"}, {typeService, "images-service"}, {typeService, "introspection-service"},
		{typeService, "namespaces-service"}, {typeService, "snapshots-service"}, {typeService, "tasks-service"},
		{typeGRPC, "containers"}, {typeGRPC, "content"}, {typeGRPC, "diff"}, {typeGRPC, "events"}, {typeGRPC, "healthcheck"}, {typeGRPC, "images"},
		{typeGRPC, "introspection"}, {typeGRPC, "leases"}, {typeGRPC, "namespaces"}, {typeGRPC, "sandboxes"}, {typeGRPC, "snapshots"},
		{typeGRPC, "streaming"}, {typeGRPC, "tasks"}, {typeGRPC, "transfer"}, {typeGRPC, "version"},
	} {
		_, err := plugin.Open(ctx, host, plugin.New(name.typ, name.id, struct{}{}, func(context.Context, *plugin.Env, struct{}) (struct{}, error) { return struct{}{}, nil }))
		if err != nil && !errors.Is(err, plugin.ErrDisabled) {
			return err
		}
	}
	return nil
}

// listServers adds the rows of the servers, with the type of their block.
func listServers(ctx context.Context, host *plugin.Host) error {
	open := func(context.Context, *plugin.Env, config.ServerSocket) (struct{}, error) { return struct{}{}, nil }
	_, err := plugin.Open(ctx, host, plugin.New(typeServer, "grpc", config.ServerGRPC{}, func(context.Context, *plugin.Env, config.ServerGRPC) (struct{}, error) { return struct{}{}, nil }))
	_, err2 := plugin.Open(ctx, host, plugin.New(typeServer, "ttrpc", config.ServerSocket{}, open))
	if errors.Is(err, plugin.ErrDisabled) || errors.Is(err2, plugin.ErrDisabled) {
		return fmt.Errorf("the servers grpc and ttrpc cannot be disabled: an empty address turns one off")
	}
	return errors.Join(err, err2)
}
