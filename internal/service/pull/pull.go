// Package pull brings an image from a registry into a namespace: its
// documents, its layers, their snapshots and its record. It promises that
// concurrent pulls fetch each blob once, that nothing unverified gets a name,
// that every object is referenced before its parent could be collected, and
// that a failed pull says which object failed at which host and leaves no record.
package pull

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/lib/keymutex"
)

// Options is how to pull.
type Options struct {
	// Downloads is how many blobs are fetched at a time, by all pulls together (3).
	Downloads int
	// Locked is how long to wait for an ingest that another client of the
	// store has open, without any progress of it (60 s).
	Locked time.Duration
	Log    *slog.Logger
}

// Unpacker is service/unpack's method.
type Unpacker interface {
	Unpack(ctx context.Context, rec view.Records, m ocispec.Manifest, snapshotter string,
		ready func(ctx context.Context, layer int) error, progress func(transfer.Progress)) error
}

// Service pulls. It is safe for concurrent use.
type Service struct {
	unpacker  Unpacker
	opts      Options
	downloads *semaphore.Weighted
	blobs     keymutex.Map // by namespace and digest
}

// New makes a service.
func New(unpacker Unpacker, opts Options) *Service {
	if opts.Downloads <= 0 {
		opts.Downloads = 3
	}
	if opts.Locked <= 0 {
		opts.Locked = time.Minute
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{unpacker: unpacker, opts: opts, downloads: semaphore.NewWeighted(int64(opts.Downloads))}
}

// Pull fetches what remote points at into rec, as far as want says, and
// unpacks it. It returns the descriptor that the image's record is to have;
// making the record is the caller's. rec must be leased: nothing else keeps
// the blobs until the record is there. progress may be called from one
// goroutine at a time. Errors have the class of the registry's (see
// registry.Remote), or ErrInvalidArgument for malformed or ambiguous
// documents, ErrFailedPrecondition for bytes that are not those of their
// digest, ErrNotFound if no platform matches, ErrNotImplemented for schema 1.
func (s *Service) Pull(ctx context.Context, rec view.Records, remote registry.Remote, want transfer.ImageStore, progress func(transfer.Progress)) (ocispec.Descriptor, error) {
	root, err := remote.Resolve(ctx)
	if err != nil {
		return root, err
	}
	if manifest.IsSchema1(root.MediaType) {
		_, err := manifest.Children(ctx, nil, root)
		return root, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	j := &job{s: s, rec: rec, remote: remote, want: want, seen: map[visit]bool{}}
	var mu sync.Mutex
	j.progress = func(p transfer.Progress) {
		mu.Lock()
		defer mu.Unlock()
		progress(p)
	}
	j.match = platforms.All
	if len(want.Platforms) > 0 {
		j.match = platforms.Any(want.Platforms...)
		j.order = platforms.Ordered(want.Platforms...)
	} else {
		j.order = platforms.Default()
	}
	j.progress(transfer.Progress{Event: "fetching image content", Name: want.Name, Desc: &root})
	if err := j.tree(ctx, root, "", true, 0); err != nil {
		return root, err
	}
	if len(j.images) == 0 && len(j.others) == 0 {
		return root, fmt.Errorf("nothing in %s matches the platforms asked for: %w", root.Digest, errdefs.ErrNotFound)
	}
	return root, j.layers(ctx)
}

// job is one pull.
type job struct {
	s        *Service
	rec      view.Records
	remote   registry.Remote
	want     transfer.ImageStore
	match    platforms.Matcher
	order    platforms.MatchComparer
	progress func(transfer.Progress)

	mu     sync.Mutex
	seen   map[visit]bool // what of the tree has been begun
	count  int            // of the images' layers
	images []*imageOf
	others []ocispec.Descriptor // blobs that are neither
}

// visit is a document as tree sees it: a few small indexes that name each other
// many times are more paths than can be walked.
type visit struct {
	digest   digest.Digest
	media    string
	platform string // of a manifest: the config may not have one
	full     bool
}

// maxLayers is how many layers all images of one pull may have.
const maxLayers = 4 * manifest.MaxChildren

// first reports whether a document has not been met yet.
func (j *job) first(desc ocispec.Descriptor, full bool) bool {
	v := visit{digest: desc.Digest, media: desc.MediaType, full: full}
	if desc.Platform != nil && manifest.IsManifest(desc.MediaType) {
		v.platform = platforms.FormatAll(*desc.Platform)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.seen[v] {
		return false
	}
	j.seen[v] = true
	return true
}

// imageOf is a manifest whose documents are here and whose layers are wanted.
type imageOf struct {
	desc     ocispec.Descriptor
	manifest ocispec.Manifest
	platform *ocispec.Platform // the config's, or the descriptor's; nil if neither says
	fetching *fetching
}

// tree fetches a document, labels it with its children, and goes on with those
// that are wanted. full is false where only metadata is wanted.
func (j *job) tree(ctx context.Context, desc ocispec.Descriptor, parent string, full bool, depth int) error {
	if depth > manifest.MaxDepth {
		return fmt.Errorf("index %s: nested more than %d deep: %w", desc.Digest, manifest.MaxDepth, errdefs.ErrInvalidArgument)
	}
	if !j.first(desc, full) {
		return nil // if that fails, so does the whole
	}
	switch {
	case manifest.IsIndex(desc.MediaType):
		if err := j.document(ctx, desc, parent, manifest.MaxManifest); err != nil {
			return err
		}
		children, err := manifest.Children(ctx, j.rec.Content(), desc)
		if err != nil {
			return err
		}
		if err := j.label(ctx, desc, children); err != nil {
			return err
		}
		wanted, rest, err := j.choose(desc, children)
		if err != nil && full {
			return err
		}
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(j.s.opts.Downloads)
		for _, c := range wanted {
			g.Go(func() error { return j.tree(gctx, c, manifest.RefKey(desc), full, depth+1) })
		}
		if j.want.AllMetadata {
			for _, c := range rest {
				g.Go(func() error { return j.tree(gctx, c, manifest.RefKey(desc), false, depth+1) })
			}
		}
		return g.Wait()
	case manifest.IsManifest(desc.MediaType):
		return j.manifest(ctx, desc, parent, full)
	case manifest.IsSchema1(desc.MediaType):
		_, err := manifest.Children(ctx, nil, desc)
		return err
	}
	// An artifact, or something from an index that nobody here knows: content
	// like any other.
	if !full {
		return nil
	}
	j.mu.Lock()
	j.others = append(j.others, desc)
	j.mu.Unlock()
	return j.fetch(ctx, desc, parent)
}

// choose splits an index's children by platform and limit.
func (j *job) choose(idx ocispec.Descriptor, children []ocispec.Descriptor) (wanted, rest []ocispec.Descriptor, err error) {
	var has []string
	for _, c := range children {
		if c.Platform == nil || j.match.Match(*c.Platform) {
			wanted = append(wanted, c)
		} else {
			rest = append(rest, c)
			has = append(has, platforms.FormatAll(*c.Platform))
		}
	}
	if len(wanted) == 0 && len(children) > 0 {
		var asked []string
		for _, p := range j.want.Platforms {
			asked = append(asked, platforms.FormatAll(p))
		}
		if len(has) > 32 {
			has = append(has[:32], "...")
		}
		return nil, rest, fmt.Errorf("index %s: no image for platform %v, there are %v: %w", idx.Digest, asked, has, errdefs.ErrNotFound)
	}
	if n := int(j.want.ManifestLimit); n > 0 && len(wanted) > n {
		sort.SliceStable(wanted, func(a, b int) bool {
			if wanted[a].Platform == nil || wanted[b].Platform == nil {
				return wanted[a].Platform != nil
			}
			return j.order.Less(*wanted[a].Platform, *wanted[b].Platform)
		})
		rest = append(rest, wanted[n:]...)
		wanted = wanted[:n]
	}
	return wanted, rest, nil
}

func (j *job) manifest(ctx context.Context, desc ocispec.Descriptor, parent string, full bool) error {
	if err := j.document(ctx, desc, parent, manifest.MaxManifest); err != nil {
		return err
	}
	m, err := manifest.ReadManifest(ctx, j.rec.Content(), desc)
	if err != nil {
		return err
	}
	if err := j.label(ctx, desc, append([]ocispec.Descriptor{m.Config}, m.Layers...)); err != nil {
		return err
	}
	if err := j.document(ctx, m.Config, manifest.RefKey(desc), manifest.MaxConfig); err != nil {
		return err
	}
	if !full {
		return nil
	}
	img := &imageOf{desc: desc, manifest: m, platform: desc.Platform}
	if manifest.IsConfig(m.Config.MediaType) {
		config, err := manifest.ReadConfig(ctx, j.rec.Content(), m.Config)
		if err != nil {
			return err
		}
		if config.OS != "" || config.Architecture != "" {
			p := platforms.Normalize(config.Platform)
			img.platform = &p
		}
	}
	img.fetching = newFetching(j, img)
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.count += len(m.Layers); j.count > maxLayers {
		return fmt.Errorf("manifest %s: its layers and those of the images beside it are more than %d: %w", desc.Digest, maxLayers, errdefs.ErrInvalidArgument)
	}
	j.images = append(j.images, img)
	return nil
}

// layers fetches what is wanted of all manifests, and unpacks meanwhile.
func (j *job) layers(ctx context.Context) error {
	plan, err := j.unpacks()
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, img := range j.images {
		todo := plan[img]
		if len(todo) == 0 {
			// Not to be unpacked: all layers.
			g.Go(func() error { return img.fetching.all(gctx) })
			continue
		}
		m := img.manifest
		if j.want.Describe {
			m.Layers = described(m.Layers, j.want.Name, img.desc)
		}
		g.Go(func() error {
			for _, snapshotter := range todo {
				if err := j.s.unpacker.Unpack(gctx, j.rec, m, snapshotter, img.fetching.ready, j.progress); err != nil {
					return err
				}
			}
			return img.fetching.wait(gctx)
		})
	}
	err = g.Wait() // which ends gctx
	for _, img := range j.images {
		img.fetching.running.Wait()
	}
	return err
}

// described are the layers of a manifest with the annotations that remote
// snapshotters know an image by. The list of layers is as long as a label may be.
func described(layers []ocispec.Descriptor, name string, desc ocispec.Descriptor) []ocispec.Descriptor {
	const prefix, list = snapshot.LabelPrefix + "cri.", snapshot.LabelPrefix + "cri.image-layers"
	out := slices.Clone(layers)
	for i, l := range layers {
		following := l.Digest.String()
		for _, next := range layers[i+1:] {
			if len(list)+len(following)+1+len(next.Digest) > 4096 {
				break
			}
			following += "," + next.Digest.String()
		}
		a := map[string]string{}
		maps.Copy(a, l.Annotations)
		a[prefix+"image-ref"], a[prefix+"manifest-digest"], a[prefix+"layer-digest"], a[list] = name, desc.Digest.String(), l.Digest.String(), following
		out[i].Annotations = a
	}
	return out
}

// unpacks says which manifest goes into which snapshotters. A platform that
// cannot be found is ErrNotFound.
func (j *job) unpacks() (map[*imageOf][]string, error) {
	plan := map[*imageOf][]string{}
	for _, u := range j.want.Unpacks {
		p := platforms.DefaultSpec()
		if u.Platform != nil {
			p = platforms.Normalize(*u.Platform)
		}
		order := platforms.Only(p)
		var best *imageOf
		for _, img := range j.images {
			if img.platform == nil || !order.Match(*img.platform) {
				continue
			}
			if best == nil || order.Less(*img.platform, *best.platform) {
				best = img
			}
		}
		if best == nil && len(j.images) == 0 && len(j.others) > 0 {
			return nil, fmt.Errorf("unpack %s: it is a %.100q, neither an image nor an index: %w", j.others[0].Digest, j.others[0].MediaType, errdefs.ErrInvalidArgument)
		}
		if best == nil {
			var has []string
			for _, img := range j.images {
				if img.platform != nil {
					has = append(has, platforms.FormatAll(*img.platform))
				}
			}
			slices.Sort(has)
			return nil, fmt.Errorf("unpack for platform %s: the image has only %v: %w", platforms.FormatAll(p), has, errdefs.ErrNotFound)
		}
		plan[best] = append(plan[best], u.Snapshotter)
	}
	return plan, nil
}
