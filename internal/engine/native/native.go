// Package native keeps every snapshot as a whole copy of its parent, in
// snapshots/<id> on containerd's metastore (contract 3.2.2): slow and large,
// and possible on any file system. Copies share blocks where that can.
package native

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/engine/snapmeta"
	"github.com/gantryd/gantry/internal/lib/fault"
)

// Name is the plugin's.
const Name = "native"

// Config is the snapshotter's part of the configuration file.
type Config struct {
	// RootPath is where the snapshots are, instead of the plugin's own directory.
	RootPath string `toml:"root_path" json:"root_path"`
}

// Store is a snapshot.Store and a snapshot.Cleaner. It is safe for concurrent use.
type Store struct{ *snapmeta.Store }

// Option changes how a Store is opened.
type Option func(*snapmeta.Options)

// WithFault passes the points of a test of crashes; see snapmeta.Options.
func WithFault(p *fault.Points) Option { return func(o *snapmeta.Options) { o.Fault = p } }

// Open opens the snapshotter at root, or at the configured root_path, and
// changes nothing of one that exists. ErrUnavailable if another process has it open.
func Open(root string, cfg Config, log *slog.Logger, opts ...Option) (*Store, error) {
	if cfg.RootPath != "" {
		root = cfg.RootPath
	}
	meta := snapmeta.Options{BareViews: true, Log: log}
	for _, o := range opts {
		o(&meta)
	}
	s, err := snapmeta.Open(root, meta)
	if err != nil {
		return nil, fmt.Errorf("native: %w", err)
	}
	return &Store{s}, nil
}

// Prepare is snapshot.Store's. It copies the parent.
func (s *Store) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	r, err := s.Make(ctx, snapshot.KindActive, key, parent, labels, func(ctx context.Context, dir string, plan snapmeta.Record) (bool, error) {
		if len(plan.ParentIDs) == 0 {
			return false, os.Chmod(dir, 0o755)
		}
		if err := copyTree(ctx, dir, s.Dir(plan.ParentIDs[0])); err != nil {
			return false, fmt.Errorf("copy %s: %w", parent, err)
		}
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return s.mounts(r), nil
}

// View is snapshot.Store's. It copies nothing.
func (s *Store) View(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	var build snapmeta.Build
	if parent == "" {
		build = func(_ context.Context, dir string, _ snapmeta.Record) (bool, error) {
			return false, os.Chmod(dir, 0o755)
		}
	}
	r, err := s.Make(ctx, snapshot.KindView, key, parent, labels, build)
	if err != nil {
		return nil, err
	}
	return s.mounts(r), nil
}

// Mounts is snapshot.Store's.
func (s *Store) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	r, err := s.Get(key)
	if err != nil {
		return nil, err
	}
	if r.Kind == snapshot.KindCommitted {
		return nil, fmt.Errorf("mounts of snapshot %s: it is committed: %w", key, errdefs.ErrFailedPrecondition)
	}
	return s.mounts(r), nil
}

func (s *Store) mounts(r snapmeta.Record) []mount.Mount {
	source, mode := s.Dir(r.ID), "rw"
	if r.Kind == snapshot.KindView {
		mode = "ro"
		if len(r.ParentIDs) > 0 {
			source = s.Dir(r.ParentIDs[0])
		}
	}
	if runtime.GOOS == "freebsd" {
		return []mount.Mount{{Type: "nullfs", Source: source, Options: []string{mode}}}
	}
	return []mount.Mount{{Type: "bind", Source: source, Options: []string{"rbind", mode}}}
}
