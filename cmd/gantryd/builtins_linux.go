package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/daemon/config"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/nri"
	"github.com/gantryd/gantry/internal/engine/native"
	"github.com/gantryd/gantry/internal/engine/overlay"
	"github.com/gantryd/gantry/internal/engine/walkdiff"
	"github.com/gantryd/gantry/internal/lib/atomicfile"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/host"
	"github.com/gantryd/gantry/internal/lib/plugin"
	"github.com/gantryd/gantry/internal/service/gc"
)

// defaultSnapshotter is where images are unpacked when a client does not say.
const defaultSnapshotter = overlay.Name

// opener opens one snapshotter. Its name is returned also with an error.
type opener func(ctx context.Context, h *plugin.Host, p plugin.Platform, f *fault.Points) (string, snapshot.Store, error)

// builtinSnapshotters are those of this system.
func builtinSnapshotters() []opener {
	return []opener{
		func(ctx context.Context, h *plugin.Host, p plugin.Platform, f *fault.Points) (string, snapshot.Store, error) {
			spec := plugin.New(typeSnapshotter, overlay.Name, overlay.Config{}, func(_ context.Context, env *plugin.Env, c overlay.Config) (*overlay.Store, error) {
				env.Export("root", rootPath(c.RootPath, env.Root))
				s, err := overlay.Open(env.Root, c, env.Log, overlay.WithFault(f))
				if err == nil {
					env.Capability(s.Capabilities()...)
				}
				return s, skippable(err)
			})
			spec.Platforms = []plugin.Platform{p}
			s, err := plugin.Open(ctx, h, spec)
			return overlay.Name, s, err
		},
		func(ctx context.Context, h *plugin.Host, p plugin.Platform, f *fault.Points) (string, snapshot.Store, error) {
			spec := plugin.New(typeSnapshotter, native.Name, native.Config{}, func(_ context.Context, env *plugin.Env, c native.Config) (*native.Store, error) {
				env.Export("root", rootPath(c.RootPath, env.Root))
				s, err := native.Open(env.Root, c, env.Log, native.WithFault(f))
				return s, skippable(err)
			})
			spec.Platforms = []plugin.Platform{p}
			s, err := plugin.Open(ctx, h, spec)
			return native.Name, s, err
		},
	}
}

// skippable makes "not possible on this host" a reason to go on without.
func skippable(err error) error {
	var lacks *host.Lacks
	if errors.As(err, &lacks) {
		return plugin.Skip("%v", err)
	}
	return err
}

func rootPath(configured, own string) string {
	if configured != "" {
		return configured
	}
	return own
}

// The blocks of the configuration that the components above and in wire.go read.
type (
	boltConfig struct {
		SharingPolicy string `toml:"content_sharing_policy"`
		NoSync        bool   `toml:"no_sync"`
	}
	gcConfig struct {
		PauseThreshold    float64       `toml:"pause_threshold"`
		DeletionThreshold int           `toml:"deletion_threshold"`
		MutationThreshold int           `toml:"mutation_threshold"`
		ScheduleDelay     time.Duration `toml:"schedule_delay"`
		StartupDelay      time.Duration `toml:"startup_delay"`
	}
	diffConfig struct {
		Default []string `toml:"default"`
		SyncFS  bool     `toml:"sync_fs"`
	}
	optConfig struct {
		Path string `toml:"path"`
	}
	shimConfig struct {
		Env       []string `toml:"env"`
		SocketDir string   `toml:"socket_dir"`
	}
	taskConfig struct {
		Platforms []string `toml:"platforms"`
	}
	transferConfig struct {
		MaxConcurrentDownloads      int    `toml:"max_concurrent_downloads"`
		MaxConcurrentUploadedLayers int    `toml:"max_concurrent_uploaded_layers"`
		ConfigPath                  string `toml:"config_path"`
	}
)

func boltDefaults() boltConfig { return boltConfig{SharingPolicy: "shared"} }

func gcDefaults() gcConfig {
	d := gc.Defaults()
	return gcConfig{d.PauseThreshold, d.DeletionThreshold, d.MutationThreshold, d.ScheduleDelay, d.StartupDelay}
}

func diffDefaults() diffConfig { return diffConfig{Default: []string{"walking"}} }

func optDefaults() optConfig { return optConfig{Path: "/opt/containerd"} }

func transferDefaults() transferConfig {
	return transferConfig{MaxConcurrentDownloads: 3, MaxConcurrentUploadedLayers: 3}
}

// components are the blocks that take effect, for `config check`.
func components() map[string]any {
	bolt, collect, diffs, opt, move := boltDefaults(), gcDefaults(), diffDefaults(), optDefaults(), transferDefaults()
	server, pods, images, adapt := cristate.DefaultServerConfig(), cristate.DefaultRuntimeConfig(), imagesConfig(cristate.DefaultImagesConfig()), nri.DefaultConfig()
	return map[string]any{
		plugin.URI(typeMetadata, "bolt"):          &bolt,
		plugin.URI(typeGC, "scheduler"):           &collect,
		plugin.URI(typeService, "diff-service"):   &diffs,
		plugin.URI(typeInternal, "opt"):           &opt,
		plugin.URI(typeShim, "manager"):           &shimConfig{},
		plugin.URI(typeRuntime, "task"):           &taskConfig{},
		plugin.URI(typeTransfer, "local"):         &move,
		plugin.URI(typeGRPC, "cri"):               &server,
		cristate.RuntimeURI:                       &pods,
		cristate.ImagesURI:                        &images,
		plugin.URI(typeNRI, "nri"):                &adapt,
		plugin.URI(typeSnapshotter, overlay.Name): &overlay.Config{},
		plugin.URI(typeSnapshotter, native.Name):  &native.Config{},
	}
}

// publishPlatforms shows what tasks can run: what is configured, else the host's.
func publishPlatforms(env *plugin.Env, configured []string, host plugin.Platform) error {
	if len(configured) == 0 {
		env.Platform(host)
	}
	for _, s := range configured {
		p, err := platforms.Parse(s)
		if err != nil {
			return fmt.Errorf("platform %q: %w", s, err)
		}
		env.Platform(plugin.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, OSVersion: p.OSVersion})
	}
	return nil
}

// processors are the stream processors of the configuration whose programs are
// there (contract 2.3.11, 3.3.6): the defaults name one that few hosts have.
func processors(cfg *config.Config) []walkdiff.Processor {
	var out []walkdiff.Processor
	for id, p := range cfg.StreamProcessors {
		out = append(out, &walkdiff.Command{ID: id, Accept: p.Accepts, Returns: p.Returns, Path: p.Path, Args: p.Args, Env: p.Env})
	}
	return out
}

// reportLeftOut logs what of a layer this host could not make.
func reportLeftOut(log *slog.Logger) func(ocispec.Descriptor, string, string) {
	return func(layer ocispec.Descriptor, entry, what string) {
		log.Warn("part of a layer was left out", "layer", layer.Digest, "entry", entry, "what", what)
	}
}

// serverUUID reads or makes the daemon's identity, which stays the same for
// the life of its root directory (contract 1.3.21).
func serverUUID(dir string) (string, error) {
	path := filepath.Join(dir, "uuid")
	b, err := os.ReadFile(path)
	if err == nil && len(b) >= 36 {
		return string(b[:36]), nil
	}
	if err != nil && !os.IsNotExist(err) {
		return "", fmt.Errorf("read the daemon's uuid: %w", err)
	}
	id, err := newUUID()
	if err != nil {
		return "", fmt.Errorf("make the daemon's uuid: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make the daemon's uuid: %w", err)
	}
	if err := atomicfile.Write(path, []byte(id), 0o600); err != nil {
		return "", fmt.Errorf("make the daemon's uuid: %w", err)
	}
	return id, nil
}
