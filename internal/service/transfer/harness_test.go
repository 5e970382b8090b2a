package transfer_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/task"
	core "github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/registry"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/service/archive"
	"github.com/gantryd/gantry/internal/service/pull"
	"github.com/gantryd/gantry/internal/service/push"
	"github.com/gantryd/gantry/internal/service/transfer"
	"github.com/gantryd/gantry/internal/service/unpack"
)

// world is a daemon's worth of stores and services in memory.
type world struct {
	t       *testing.T
	client  *registry.Client
	service *transfer.Service
	applied *counter
	streams *memory.Streams

	mu     sync.Mutex
	spaces map[namespace.ID]*space
}

// space is one namespace.
type space struct {
	content *memory.Content
	images  *memory.Images
	leases  *memory.Leases
	snaps   *memory.Snapshots
	remote  snapshot.Store // if set, before snaps
}

func newWorld(t *testing.T, cfg registry.Config) *world {
	w := &world{t: t, spaces: map[namespace.ID]*space{}, applied: &counter{n: map[digest.Digest]int{}}, streams: memory.NewStreams()}
	if cfg.BackOff == 0 {
		cfg.BackOff = time.Millisecond
	}
	w.client = registry.New(cfg)
	t.Cleanup(func() { w.client.Close() })
	un := unpack.New(func(rec view.Records) diff.Applier { return applier{rec.Content(), w.applied} }, unpack.Options{Snapshotter: "memory"})
	w.service = transfer.New(transfer.Deps{
		Records: w, Registries: w.client, Unpacker: un, Pusher: push.New(push.Options{}), Archiver: archive.New(nil),
		Puller: pull.New(un, pull.Options{Locked: time.Second}),
	})
	return w
}

func (w *world) space(ns namespace.ID) *space {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.spaces[ns]
	if s == nil {
		s = &space{memory.NewContent(), memory.NewImages(), memory.NewLeases(), memory.NewSnapshots(), nil}
		w.spaces[ns] = s
	}
	return s
}

// In implements view.RecordSource.
func (w *world) In(ns namespace.ID, under lease.ID) (view.Records, error) {
	return &records{w, ns, under, w.space(ns)}, nil
}

func (w *world) transfer(src, dst core.Endpoint, opts core.Options) error {
	return w.transferCtx(w.t.Context(), src, dst, opts)
}

func (w *world) transferCtx(ctx context.Context, src, dst core.Endpoint, opts core.Options) error {
	rec, _ := w.In("test", "")
	return w.service.In(rec).Transfer(ctx, src, dst, opts)
}

// clean fails the test if something is left that nothing refers to: leases,
// active snapshots, and, if nothing is to be left at all, images.
func (w *world) clean(images int) {
	w.t.Helper()
	s := w.space("test")
	if l, _ := s.leases.List(w.t.Context()); len(l) != 0 {
		w.t.Errorf("%d leases are left", len(l))
	}
	_ = s.snaps.Walk(w.t.Context(), func(i snapshot.Info) error {
		if i.Kind != snapshot.KindCommitted {
			w.t.Errorf("snapshot %q is left", i.Name)
		}
		return nil
	})
	if l, _ := s.images.List(w.t.Context()); len(l) != images {
		w.t.Errorf("%d images, want %d", len(l), images)
	}
}

type records struct {
	w     *world
	ns    namespace.ID
	under lease.ID
	s     *space
}

func (r *records) Namespace() namespace.ID { return r.ns }
func (r *records) Lease() lease.ID         { return r.under }
func (r *records) Content() content.Store  { return r.s.content }
func (r *records) Images() image.Store     { return r.s.images }
func (r *records) Snapshots(name string) (snapshot.Store, error) {
	if name != "memory" {
		return nil, fmt.Errorf("snapshotter not loaded: %s: %w", name, errdefs.ErrInvalidArgument)
	}
	if r.s.remote != nil {
		return r.s.remote, nil
	}
	return r.s.snaps, nil
}
func (r *records) Containers() container.Store { return nil }
func (r *records) Sandboxes() sandbox.Store    { return nil }
func (r *records) Leases() lease.Store         { return r.s.leases }
func (r *records) Diff() diff.Service          { return nil }
func (r *records) Tasks() task.Store           { return nil }
func (r *records) Transfer() core.Service      { return r.w.service.In(r) }
func (r *records) Streams() stream.Manager     { return r.w.streams.In(r.ns) }

// views is the same as a view.Source.
type views struct{ w *world }

func (v views) In(ns namespace.ID, under lease.ID) (view.View, error) {
	return &records{v.w, ns, under, v.w.space(ns)}, nil
}

// applier hashes a layer's tar stream and writes it nowhere.
type applier struct {
	store content.Store
	count *counter
}

type counter struct {
	mu sync.Mutex
	n  map[digest.Digest]int
}

func (a applier) Apply(ctx context.Context, desc ocispec.Descriptor, _ []mount.Mount, opts diff.ApplyOptions) (ocispec.Descriptor, error) {
	a.count.mu.Lock()
	a.count.n[desc.Digest]++
	a.count.mu.Unlock()
	ra, err := a.store.Open(ctx, desc.Digest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer ra.Close()
	var r io.Reader = io.NewSectionReader(ra, 0, ra.Size())
	switch desc.MediaType {
	case ocispec.MediaTypeImageLayerGzip, "application/vnd.docker.image.rootfs.diff.tar.gzip":
		if r, err = gzip.NewReader(r); err != nil {
			return ocispec.Descriptor{}, err
		}
	case ocispec.MediaTypeImageLayerZstd:
		z, err := zstd.NewReader(r)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		defer z.Close()
		r = z
	}
	d := digest.Canonical.Digester()
	n, err := io.Copy(d.Hash(), r)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("apply %s: %w: %w", desc.Digest, err, errdefs.ErrDataLoss)
	}
	if opts.Progress != nil {
		opts.Progress(desc.Size)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: d.Digest(), Size: n}, nil
}

// buffer is an export's writer.
type buffer struct {
	bytes.Buffer
	closed bool
}

func (b *buffer) Close() error { b.closed = true; return nil }
