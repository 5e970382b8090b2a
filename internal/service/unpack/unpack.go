// Package unpack turns the layers of an image into snapshots. It promises that
// each layer is unpacked once, however many ask for it at the same time, that
// a snapshot gets its name only after the layer's digest has been verified,
// and that a failed layer leaves no snapshot.
package unpack

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/lib/keymutex"
)

// Options is how to unpack.
type Options struct {
	// Snapshotter is the one to use where a request names none.
	Snapshotter string
	// Cleanup is the time that removing the snapshot of a failed layer may take (30 s).
	Cleanup time.Duration
	Log     *slog.Logger
}

// Service unpacks. It is safe for concurrent use.
type Service struct {
	differ func(view.Records) diff.Applier
	opts   Options
	layers keymutex.Map // by namespace, snapshotter and chain id (contract 6.3.12)
}

// New makes a service. differ returns what applies layers from the content
// store of a view.
func New(differ func(view.Records) diff.Applier, opts Options) *Service {
	opts.Snapshotter = cmp.Or(opts.Snapshotter, "overlayfs")
	if opts.Cleanup <= 0 {
		opts.Cleanup = 30 * time.Second
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{differ: differ, opts: opts}
}

// Unpack makes a snapshot of each layer of the manifest m, whose config is in
// the content store, and labels the config with the last one (contract 1.5.3,
// 6.4). snapshotter may be "". ready is called before layer i is read and
// returns when its blob is complete; it is not called for layers whose
// snapshot is there already, nor for those that a remote snapshotter brings
// along. Errors: ErrInvalidArgument (layers and diff ids do not match, unknown
// snapshotter), ErrFailedPrecondition (a layer's tar stream has another digest
// than the config says), and those of ready, the snapshotter and the differ.
func (s *Service) Unpack(ctx context.Context, rec view.Records, m ocispec.Manifest, snapshotter string,
	ready func(ctx context.Context, layer int) error, progress func(transfer.Progress)) error {
	snapshotter = cmp.Or(snapshotter, s.opts.Snapshotter)
	sn, err := rec.Snapshots(snapshotter)
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	config, err := manifest.ReadConfig(ctx, rec.Content(), m.Config)
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	diffIDs := config.RootFS.DiffIDs
	if len(diffIDs) != len(m.Layers) {
		return fmt.Errorf("unpack: config %s has %d diff ids for %d layers: %w", m.Config.Digest, len(diffIDs), len(m.Layers), errdefs.ErrInvalidArgument)
	}
	for i, d := range diffIDs {
		if err := d.Validate(); err != nil {
			return fmt.Errorf("unpack: config %s: diff id %d: %v: %w", m.Config.Digest, i, err, errdefs.ErrInvalidArgument)
		}
	}
	chain := identity.ChainIDs(append([]digest.Digest(nil), diffIDs...))
	u := &unpacking{s: s, rec: rec, sn: sn, name: snapshotter, ready: ready, progress: progress, apply: s.differ(rec)}
	parent := ""
	for i, desc := range m.Layers {
		if err := u.layer(ctx, i, desc, diffIDs[i], chain[i].String(), parent); err != nil {
			return fmt.Errorf("unpack layer %d of %d, %s, into %s: %w", i+1, len(m.Layers), desc.Digest, snapshotter, err)
		}
		parent = chain[i].String()
	}
	if parent == "" {
		return nil
	}
	key := manifest.LabelSnapshot + snapshotter
	_, err = rec.Content().Update(ctx, content.Info{Digest: m.Config.Digest, Labels: map[string]string{key: parent}}, "labels."+key)
	if err != nil {
		return fmt.Errorf("unpack: label config %s: %w", m.Config.Digest, err)
	}
	return nil
}

// unpacking is one Unpack.
type unpacking struct {
	s        *Service
	rec      view.Records
	sn       snapshot.Store
	name     string
	ready    func(context.Context, int) error
	progress func(transfer.Progress)
	apply    diff.Applier
}

func (u *unpacking) layer(ctx context.Context, i int, desc ocispec.Descriptor, diffID digest.Digest, chainID, parent string) error {
	unlock, err := u.s.layers.Lock(ctx, strings.Join([]string{string(u.rec.Namespace()), u.name, chainID}, " "))
	if err != nil {
		return fmt.Errorf("wait for another unpack of it: %w", err)
	}
	defer unlock()
	if there, err := u.there(ctx, chainID); there || err != nil {
		return err
	}
	labels := inherited(desc.Annotations)
	labels[snapshot.LabelRef] = chainID
	labels[snapshot.LabelDiffID] = diffID.String()
	if parent != "" {
		labels[snapshot.LabelParentChainID] = parent
	}
	for attempt := 1; ; attempt++ {
		key := fmt.Sprintf("extract-%d-%s %s", time.Now().UnixNano(), random(), chainID)
		mounts, err := u.sn.Prepare(ctx, key, parent, labels)
		if errdefs.IsAlreadyExists(err) {
			// Not the key, which is new: a remote snapshotter has the layer.
			if there, err := u.there(ctx, chainID); there || err != nil {
				return err
			}
			if attempt < 3 {
				continue
			}
		}
		if err != nil {
			return fmt.Errorf("prepare snapshot %q: %w", key, err)
		}
		if err := u.ready(ctx, i); err != nil {
			u.drop(ctx, key)
			return err
		}
		name := manifest.RefKey(desc)
		u.progress(transfer.Progress{Event: "extracting", Name: name, Total: desc.Size, Desc: &desc})
		got, err := u.apply.Apply(ctx, desc, mounts, diff.ApplyOptions{Progress: func(n int64) {
			u.progress(transfer.Progress{Event: "extracting", Name: name, Progress: n, Total: desc.Size, Desc: &desc})
		}})
		if err == nil && got.Digest != diffID {
			err = fmt.Errorf("the tar stream's digest is %s, the config says %s: %w", got.Digest, diffID, errdefs.ErrFailedPrecondition)
		}
		if err != nil {
			u.drop(ctx, key)
			return err
		}
		commit := maps.Clone(labels)
		err = u.sn.Commit(ctx, chainID, key, snapshot.CommitOptions{Labels: commit})
		if err != nil {
			u.drop(ctx, key)
			if !errdefs.IsAlreadyExists(err) {
				return fmt.Errorf("commit snapshot %s: %w", chainID, err)
			}
			if _, err := u.there(ctx, chainID); err != nil {
				return err
			}
		}
		u.progress(transfer.Progress{Event: "extracted", Name: name, Progress: desc.Size, Total: desc.Size, Desc: &desc})
		return nil
	}
}

// there reports whether the snapshot exists, and if so makes the view's lease hold it.
func (u *unpacking) there(ctx context.Context, chainID string) (bool, error) {
	_, err := u.sn.Stat(ctx, chainID)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("stat snapshot %s: %w", chainID, err)
	}
	if id := u.rec.Lease(); id != "" {
		if err := u.rec.Leases().AddResource(ctx, id, lease.Resource{ID: chainID, Type: lease.SnapshotPrefix + u.name}); err != nil {
			return false, fmt.Errorf("lease snapshot %s: %w", chainID, err)
		}
		// It may have been collected before the lease held it.
		if _, err := u.sn.Stat(ctx, chainID); errdefs.IsNotFound(err) {
			return false, nil
		}
	}
	return true, nil
}

// drop removes a snapshot that shall not be. The request may have ended by
// now, so it gets time of its own.
func (u *unpacking) drop(ctx context.Context, key string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), u.s.opts.Cleanup)
	defer cancel()
	if err := u.sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		u.s.opts.Log.Warn("snapshot of a failed unpack is left to garbage collection", "snapshotter", u.name, "key", key, "err", err)
	}
}

// inherited picks the annotations of a layer that are meant for snapshotters.
// An image does not get to set those that change what the host does: they are
// for whoever pulls it.
func inherited(annotations map[string]string) map[string]string {
	labels := map[string]string{}
	for k, v := range annotations {
		if !strings.HasPrefix(k, snapshot.LabelPrefix) || len(k)+len(v) > 4096 {
			continue
		}
		switch strings.TrimPrefix(k, snapshot.LabelPrefix) {
		case "uidmapping", "gidmapping", "overlay.upperdir", "max-size", "diff-id", "parent-chain-id",
			"devmapper/fstype", "windows/rootfs.sizebytes":
		default:
			labels[k] = v
		}
	}
	return labels
}

func random() string {
	return fmt.Sprintf("%06x", rand.N(1<<24))
}
