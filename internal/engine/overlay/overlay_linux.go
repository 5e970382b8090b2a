package overlay

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/engine/snapmeta"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/host"
	"github.com/gantryd/gantry/internal/lib/idmap"
	"github.com/gantryd/gantry/internal/lib/mountx"
)

const (
	// Name is the plugin's.
	Name = "overlayfs"
	// LabelUpperDir shows the directory of a snapshot's own files if the
	// configuration asks for it (contract 1.5.16).
	LabelUpperDir = "containerd.io/snapshot/overlay.upperdir"

	dataDir = "fs"
	workDir = "work"
)

// Config is the snapshotter's part of the configuration file.
type Config struct {
	// RootPath is where the snapshots are, instead of the plugin's own directory.
	RootPath string `toml:"root_path" json:"root_path"`
	// UpperdirLabel adds LabelUpperDir to what clients see.
	UpperdirLabel bool `toml:"upperdir_label" json:"upperdir_label"`
	// SyncRemove deletes directories within Remove instead of in Cleanup.
	SyncRemove bool `toml:"sync_remove" json:"sync_remove"`
	// SlowChown copies a layer with other owners where ids cannot be mapped.
	SlowChown bool `toml:"slow_chown" json:"slow_chown"`
	// MountOptions are added to every overlay.
	MountOptions []string `toml:"mount_options" json:"mount_options"`
}

// Store is a snapshot.Store and a snapshot.Cleaner. It is safe for concurrent use.
type Store struct {
	*snapmeta.Store
	cfg     Config
	options []string // of every overlay
	remap   bool     // layers can be mounted with mapped ids
	userns  bool
}

// Option changes how a Store is opened.
type Option func(*snapmeta.Options, *facts)

// WithFault passes the points of a test of crashes: snapshot-made, -filled,
// -recorded, -synced, -committed, -unrecorded, -trashed, and cleanup.
func WithFault(p *fault.Points) Option {
	return func(o *snapmeta.Options, _ *facts) { o.Fault = p }
}

// WithoutRemap behaves as on a kernel that cannot map the ids of layers.
func WithoutRemap() Option {
	return func(_ *snapmeta.Options, f *facts) { f.noRemap = true }
}

// Open opens the snapshotter at root, or at the configured root_path. It tries
// what the kernel and the file system can do, and changes nothing else of a
// root that exists. A *host.Lacks if overlays are not possible there,
// ErrUnavailable if another process has the root open.
func Open(root string, cfg Config, log *slog.Logger, opts ...Option) (*Store, error) {
	if cfg.RootPath != "" {
		root = cfg.RootPath
	}
	s := &Store{cfg: cfg, userns: userns.RunningInUserNS()}
	// In a user namespace white-outs cannot be put into a bare directory.
	meta := snapmeta.Options{Data: dataDir, Rebase: !s.userns, SyncRemove: cfg.SyncRemove, Log: log}
	if cfg.UpperdirLabel {
		meta.Show = func(r snapmeta.Record, info *snapshot.Info) {
			if info.Labels = maps.Clone(info.Labels); info.Labels == nil {
				info.Labels = map[string]string{}
			}
			info.Labels[LabelUpperDir] = s.Data(r.ID)
		}
	}
	test := facts{userns: s.userns}
	for _, o := range opts {
		o(&meta, &test)
	}
	var err error
	if s.Store, err = snapmeta.Open(root, meta); err != nil {
		return nil, fmt.Errorf("overlayfs: %w", err)
	}
	// From here on the root is ours alone.
	f, err := probe(s.Root(), s.userns)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("overlayfs at %s: %w", root, err)
	}
	s.remap = f.remap && !test.noRemap
	s.options = slices.Clone(cfg.MountOptions)
	if f.userxattr && !given(s.options, "userxattr") {
		s.options = append(s.options, "userxattr")
	}
	if f.index && !given(s.options, "index") {
		s.options = append(s.options, "index=off")
	}
	return s, nil
}

func given(options []string, name string) bool {
	return slices.ContainsFunc(options, func(o string) bool {
		return o == name || strings.HasPrefix(o, name+"=")
	})
}

// Capabilities are what introspection says of the snapshotter: remap-ids if
// labels map ids, only-remap-ids if it does nothing else for user namespaces,
// rebase if Commit may name a parent.
func (s *Store) Capabilities() []string {
	var c []string
	if s.remap {
		c = append(c, "remap-ids")
	}
	if !s.cfg.SlowChown {
		c = append(c, "only-remap-ids")
	}
	if !s.userns {
		c = append(c, "rebase")
	}
	return c
}

// Prepare is snapshot.Store's.
func (s *Store) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	return s.make(ctx, snapshot.KindActive, key, parent, labels)
}

// View is snapshot.Store's.
func (s *Store) View(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	return s.make(ctx, snapshot.KindView, key, parent, labels)
}

// Update is snapshot.Store's.
func (s *Store) Update(ctx context.Context, info snapshot.Info, paths ...string) (snapshot.Info, error) {
	info.Labels = s.stored(info.Labels)
	return s.Store.Update(ctx, info, paths...)
}

// Commit is snapshot.Store's.
func (s *Store) Commit(ctx context.Context, name, key string, opts snapshot.CommitOptions) error {
	opts.Labels = s.stored(opts.Labels)
	return s.Store.Commit(ctx, name, key, opts)
}

// stored leaves out the label that is only shown: clients send back what they saw.
func (s *Store) stored(labels map[string]string) map[string]string {
	if _, ok := labels[LabelUpperDir]; !ok || !s.cfg.UpperdirLabel {
		return labels
	}
	labels = maps.Clone(labels)
	delete(labels, LabelUpperDir)
	return labels
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

func (s *Store) make(ctx context.Context, kind snapshot.Kind, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	labels = s.stored(labels)
	ids, err := mapping(labels)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, err)
	}
	if ids != nil && !s.remap && (!s.cfg.SlowChown || kind == snapshot.KindView && parent != "") {
		return nil, fmt.Errorf("snapshot %s: %w", key, &host.Lacks{
			Feature: "mapping the ids of layers",
			Help:    "Linux 5.19 and a file system with id mapped mounts, or slow_chown = true for snapshots that are written to",
		})
	}
	r, err := s.Make(ctx, kind, key, parent, labels, func(ctx context.Context, dir string, plan snapmeta.Record) (bool, error) {
		return s.build(ctx, dir, plan, ids)
	})
	if err != nil {
		return nil, err
	}
	return s.mounts(r), nil
}

// build makes fs and, to be written to, work. The root directory of a mounted
// overlay is that of its topmost layer, so it gets the parent's mode and owner.
func (s *Store) build(ctx context.Context, dir string, plan snapmeta.Record, ids *mappings) (copied bool, err error) {
	data, work := filepath.Join(dir, dataDir), filepath.Join(dir, workDir)
	uid, gid, mode := uint32(os.Geteuid()), uint32(os.Getegid()), uint32(0o755)
	if len(plan.ParentIDs) > 0 {
		var st unix.Stat_t
		parent := s.Data(plan.ParentIDs[0])
		if err := unix.Lstat(parent, &st); err != nil {
			return false, &os.PathError{Op: "stat", Path: parent, Err: err}
		}
		uid, gid, mode = st.Uid, st.Gid, st.Mode&0o7777
	}
	var shift bool
	switch {
	case ids == nil:
	case s.remap && len(plan.ParentIDs) == 0:
		// A bind mount maps the ids of this directory as well.
	default:
		// An overlay maps the ids of the lower layers only. The client may
		// have changed the owners of the parent already, where we cannot map.
		shift = !s.remap && len(plan.ParentIDs) > 0 && !ids.shifted(uid, gid)
		uid, gid = ids.toHost(uid, gid)
	}
	if err := mkdir(data, uid, gid, mode); err != nil {
		return false, err
	}
	if plan.Kind == snapshot.KindActive {
		if err := mkdir(work, uint32(os.Geteuid()), uint32(os.Getegid()), 0o711); err != nil {
			return false, err
		}
	}
	if !shift {
		return false, nil
	}
	m := s.overlay(data, work, plan.ParentIDs)
	place := filepath.Join(s.Root(), probeDir)
	if err := os.MkdirAll(place, 0o700); err != nil {
		return false, err
	}
	err = mountx.WithTemp(ctx, place, []mount.Mount{m}, func(root string) error {
		return chownTree(ctx, root, ids)
	})
	if err != nil {
		return false, fmt.Errorf("change owners: %w", err)
	}
	return true, nil
}

// mkdir makes a directory with an owner and exactly that mode.
func mkdir(path string, uid, gid, mode uint32) error {
	if err := os.Mkdir(path, os.FileMode(mode&0o777)); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Uid != uid || st.Gid != gid {
		if err := os.Lchown(path, int(uid), int(gid)); err != nil {
			return err
		}
	}
	if st.Mode&0o7777 == mode {
		return nil
	}
	if err := unix.Chmod(path, mode); err != nil {
		return &os.PathError{Op: "chmod", Path: path, Err: err}
	}
	return nil
}

func (s *Store) mounts(r snapmeta.Record) []mount.Mount {
	var mapped []string
	if s.remap {
		for _, l := range []struct{ option, label string }{{"uidmap=", snapshot.LabelUIDMapping}, {"gidmap=", snapshot.LabelGIDMapping}} {
			if v := r.Labels[l.label]; v != "" {
				mapped = append(mapped, l.option+v)
			}
		}
	}
	bind := func(id uint64, mode string) []mount.Mount {
		return []mount.Mount{{Type: "bind", Source: s.Data(id), Options: append([]string{mode, "rbind"}, mapped...)}}
	}
	view := r.Kind == snapshot.KindView
	switch {
	case view && len(r.ParentIDs) == 0:
		return bind(r.ID, "ro")
	case view && len(r.ParentIDs) == 1:
		return bind(r.ParentIDs[0], "ro")
	case len(r.ParentIDs) == 0:
		return bind(r.ID, "rw")
	}
	upper, work := "", ""
	if !view {
		upper, work = s.Data(r.ID), filepath.Join(s.Dir(r.ID), workDir)
	}
	m := s.overlay(upper, work, r.ParentIDs)
	m.Options = append(m.Options, mapped...)
	return []mount.Mount{m}
}

// overlay is the mount of an upper directory, if any, over lower ones.
func (s *Store) overlay(upper, work string, lower []uint64) mount.Mount {
	options := slices.Clone(s.options)
	if upper != "" {
		options = append(options, "workdir="+escape(work), "upperdir="+escape(upper))
	}
	dirs := make([]string, len(lower))
	for i, id := range lower {
		dirs[i] = escape(s.Data(id))
	}
	return mount.Mount{Type: "overlay", Source: "overlay", Options: append(options, "lowerdir="+strings.Join(dirs, ":"))}
}

// escape keeps the characters of a path from ending it in the options.
var escape = strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`).Replace

// mappings are those of the two labels.
type mappings struct{ uids, gids idmap.Map }

// mapping reads the labels of a snapshot for a user namespace, nil if it has none.
func mapping(labels map[string]string) (*mappings, error) {
	u, g := labels[snapshot.LabelUIDMapping], labels[snapshot.LabelGIDMapping]
	if u == "" && g == "" {
		return nil, nil
	}
	if u == "" || g == "" {
		return nil, fmt.Errorf("labels %s and %s belong together: %w", snapshot.LabelUIDMapping, snapshot.LabelGIDMapping, errdefs.ErrInvalidArgument)
	}
	var m mappings
	var err error
	if m.uids, err = idmap.Parse(u); err != nil {
		return nil, fmt.Errorf("label %s: %w", snapshot.LabelUIDMapping, err)
	}
	if m.gids, err = idmap.Parse(g); err != nil {
		return nil, fmt.Errorf("label %s: %w", snapshot.LabelGIDMapping, err)
	}
	return &m, nil
}

// toHost maps what has a mapping and leaves the rest.
func (m *mappings) toHost(uid, gid uint32) (uint32, uint32) {
	if id, ok := m.uids.ToHost(uid); ok {
		uid = id
	}
	if id, ok := m.gids.ToHost(gid); ok {
		gid = id
	}
	return uid, gid
}

// shifted tells that the owners are the container's root already.
func (m *mappings) shifted(uid, gid uint32) bool {
	u, g := m.toHost(0, 0)
	return u != 0 && uid == u && gid == g
}
