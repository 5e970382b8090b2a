// Package criimage is the images of the CRI: it pulls them, with credentials
// that reach only the host they are for, keeps an index of all images of the
// namespace k8s.io, whoever made them, and answers the kubelet's ImageService.
// An image is identified by the digest of its configuration and has up to three
// records: one named by that digest, one by the tag, one by the digest of what
// was pulled (contract 7.2, 13.24). An image is in the index only if everything
// is here that a container needs of it.
package criimage

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/keymutex"
)

// Unpacker is service/unpack: it unpacks a stored image that somebody brought
// here without doing so.
type Unpacker interface {
	Image(ctx context.Context, rec view.Records, target ocispec.Descriptor, u transfer.Unpack, progress func(transfer.Progress)) error
}

// Deps is what a Service is made of. Source, Events and Unpacker must be set.
type Deps struct {
	Source   view.Source
	Events   event.Bus
	Unpacker Unpacker
	Config   cristate.ImagesConfig
	Runtime  cristate.RuntimeConfig
	// Roots are the directories of snapshotters by name, for ImageFsInfo.
	Roots map[string]string
	// HostsDir is a directory of this service's own, which need not exist. The
	// deprecated tables of registries are written there as hosts.toml files.
	HostsDir string
	Metrics  prometheus.Registerer // may be nil
	Log      *slog.Logger
}

// Service is the images. It implements the CRI's ImageService and is safe for
// concurrent use.
type Service struct {
	runtime.UnimplementedImageServiceServer
	d       Deps
	view    view.View
	auths   []hostAuth // of the configuration
	hostDir string
	targets []target // platforms that images may be here for, the usual one first

	names  keymutex.Map // an image record's name: index and store are compared one at a time
	pulls  keymutex.Map // a sandbox image and its runtime handler: one pull for all
	index  index
	usage  *sampler
	counts counters

	patience  time.Duration // with snapshotters that hang, when Run ends
	ready     chan struct{}
	readyOnce sync.Once
}

// target is what a runtime handler's images are unpacked for, and into what.
type target struct {
	platform    ocispec.Platform
	match       platforms.MatchComparer
	snapshotter string
}

// New makes the service. It writes to HostsDir and starts nothing.
// ErrInvalidArgument, naming the key, for what cannot be understood.
func New(d Deps) (*Service, error) {
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	d.Config.Snapshotter = cmp.Or(d.Config.Snapshotter, "overlayfs")
	s := &Service{d: d, index: newIndex(), counts: newCounters(d.Metrics), patience: 5 * time.Second, ready: make(chan struct{})}
	var err error
	if s.view, err = d.Source.In(cristate.Namespace, ""); err != nil {
		return nil, fmt.Errorf("images of the CRI: %w", err)
	}
	s.targets = []target{newTarget(platforms.DefaultSpec(), d.Config.Snapshotter)}
	for _, h := range slices.Sorted(maps.Keys(d.Config.RuntimePlatforms)) {
		t, err := s.platformOf(h)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(s.targets, func(o target) bool { return platforms.Format(o.platform) == platforms.Format(t.platform) }) {
			s.targets = append(s.targets, t)
		}
	}
	if s.auths, err = configured(d.Config.Registry); err != nil {
		return nil, err
	}
	if s.hostDir, err = writeHosts(d.Config.Registry, d.HostsDir); err != nil {
		return nil, err
	}
	s.usage = newSampler(s.view, d.Log)
	return s, nil
}

func newTarget(p ocispec.Platform, snapshotter string) target {
	p = platforms.Normalize(p)
	return target{p, platforms.Only(p), snapshotter}
}

// platformOf is the target of a runtime handler that has an entry in runtime_platforms.
func (s *Service) platformOf(handler string) (target, error) {
	rp, p := s.d.Config.RuntimePlatforms[handler], platforms.DefaultSpec()
	if rp.Platform != "" {
		var err error
		if p, err = platforms.Parse(rp.Platform); err != nil {
			return target{}, fmt.Errorf("runtime_platforms.%s.platform: %v: %w", handler, err, errdefs.ErrInvalidArgument)
		}
	}
	return newTarget(p, cmp.Or(rp.Snapshotter, s.d.Config.Snapshotter)), nil
}

// target is what a runtime handler wants; "" is the default one's.
// ErrInvalidArgument for one that is not configured.
func (s *Service) target(handler string) (target, error) {
	if handler == "" {
		if handler = s.d.Runtime.Containerd.DefaultRuntimeName; handler == "" {
			return s.targets[0], nil
		}
	}
	_, known := s.d.Config.RuntimePlatforms[handler]
	name, rt, err := s.d.Runtime.Handler(handler)
	if err != nil && !known {
		return target{}, fmt.Errorf("%v: %w", err, errdefs.ErrInvalidArgument)
	}
	t := s.targets[0]
	t.snapshotter = cmp.Or(rt.Snapshotter, t.snapshotter)
	if !known {
		return t, nil
	}
	own, err := s.platformOf(cmp.Or(name, handler))
	if s.d.Config.RuntimePlatforms[handler].Snapshotter == "" {
		own.snapshotter = t.snapshotter
	}
	return own, err
}

// Snapshotter is the name of a runtime handler's snapshotter (contract 7.2.6).
func (s *Service) Snapshotter(handler string) (string, error) {
	t, err := s.target(handler)
	return t.snapshotter, err
}

// Image is what a container needs to know of its image.
type Image struct {
	// ID is the digest of the configuration (contract 13.24).
	ID                    string
	RepoTags, RepoDigests []string
	// Target is what a name of the image points at; Manifest and ConfigDesc are
	// those for the platform of the runtime handler.
	Target, Manifest, ConfigDesc ocispec.Descriptor
	// ChainID names the snapshot of all layers, "" if there are none.
	ChainID string
	// Snapshotter is the runtime handler's.
	Snapshotter string
	Platform    ocispec.Platform
	Spec        ocispec.Image
	// Size is that of all blobs, compressed, in bytes.
	Size   int64
	Pinned bool
}

// Names are those shown beside a container.
func (i Image) Names() cristate.ImageNames {
	n := cristate.ImageNames{ID: i.ID}
	if len(i.RepoTags) > 0 {
		n.Tag = i.RepoTags[0]
	}
	if len(i.RepoDigests) > 0 {
		n.Digest = i.RepoDigests[0]
	}
	return n
}

// Names finds an image's names by its id, without any I/O, for
// cristate.Notifier; those of an image that is not here are "".
func (s *Service) Names(id string) cristate.ImageNames {
	e, ok := s.index.get(id)
	if !ok {
		return cristate.ImageNames{}
	}
	tags, digests := e.split()
	return Image{ID: e.id, RepoTags: tags, RepoDigests: digests}.Names()
}

// Resolve finds an image by a name, an id, or the beginning of an id, for a
// runtime handler. ErrNotFound; ErrInvalidArgument if several ids begin so or
// the handler is not configured. The image need not be unpacked for the
// handler: see EnsureUnpacked.
func (s *Service) Resolve(ctx context.Context, ref, handler string) (Image, error) {
	t, err := s.target(handler)
	if err != nil {
		return Image{}, fmt.Errorf("image %.256q: %w", ref, err)
	}
	e, err := s.index.find(ref)
	if err != nil {
		return Image{}, err
	}
	f := e.facts
	if !t.match.Match(f.platform) {
		if f, err = s.inspect(ctx, f.target, "", []target{t}); err != nil {
			return Image{}, fmt.Errorf("image %.256q for runtime handler %q: %w", ref, handler, err)
		}
	}
	spec, err := manifest.ReadConfig(ctx, s.view.Content(), f.config)
	if err != nil {
		return Image{}, fmt.Errorf("image %.256q: %w", ref, err)
	}
	tags, digests := e.split()
	return Image{ID: f.config.Digest.String(), RepoTags: tags, RepoDigests: digests, Target: f.target, Manifest: f.manifest, ConfigDesc: f.config,
		ChainID: f.chainID, Snapshotter: t.snapshotter, Platform: f.platform, Spec: spec, Size: f.size, Pinned: e.pinned()}, nil
}

// EnsureUnpacked makes sure that the snapshot of the image's layers is there.
// An image that another client fetched without unpacking it, or that was pulled
// for another snapshotter, is unpacked now. Until the lease of the view ends,
// what is made stays.
func (s *Service) EnsureUnpacked(ctx context.Context, leased view.Records, img Image) error {
	if img.ChainID == "" {
		return nil
	}
	store, err := leased.Snapshots(img.Snapshotter)
	if err != nil {
		return fmt.Errorf("image %s: %w", img.ID, err)
	}
	// A snapshot that the config has no label for is not the image's to keep.
	if _, err := store.Stat(ctx, img.ChainID); err == nil && s.unpacked(ctx, img.ConfigDesc.Digest, img.ChainID, img.Snapshotter) {
		return nil
	} else if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("image %s: %w", img.ID, err)
	}
	if err := s.d.Unpacker.Image(ctx, leased, img.Manifest, transfer.Unpack{Platform: &img.Platform, Snapshotter: img.Snapshotter}, func(transfer.Progress) {}); err != nil {
		return fmt.Errorf("image %s: %w", img.ID, err)
	}
	return nil
}

// SandboxImage is the name of the image of pods' pause containers (contract 7.3.26).
func (s *Service) SandboxImage() string {
	return cmp.Or(s.d.Config.PinnedImages["sandbox"], cristate.PauseImage)
}

// EnsureSandboxImage finds the image of pause containers and unpacks it for the
// runtime handler. If it is not here, it is pulled, unless the handler says
// disable_pause_image_pull: then ErrNotFound. Any number of pods that need it
// wait for one pull.
func (s *Service) EnsureSandboxImage(ctx context.Context, handler string) (Image, error) {
	name := s.SandboxImage()
	img, err := s.Resolve(ctx, name, handler)
	if err == nil && s.unpacked(ctx, img.ConfigDesc.Digest, img.ChainID, img.Snapshotter) {
		return img, nil
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return Image{}, fmt.Errorf("sandbox image: %w", err)
	}
	unlock, err := s.pulls.Lock(ctx, name+" "+handler)
	if err != nil {
		return Image{}, fmt.Errorf("sandbox image %s: wait for the pull under way: %w", name, err)
	}
	defer unlock()
	if img, err = s.Resolve(ctx, name, handler); err == nil {
		err = s.unpack(ctx, img)
	}
	if err == nil || !errdefs.IsNotFound(err) {
		return img, err
	}
	if _, rt, err := s.d.Runtime.Handler(handler); err == nil && rt.DisablePauseImagePull {
		return Image{}, fmt.Errorf("sandbox image %s is not here, and disable_pause_image_pull is set: %w", name, errdefs.ErrNotFound)
	}
	id, err := s.Pull(ctx, name, handler, nil)
	if err != nil {
		return Image{}, fmt.Errorf("sandbox image: %w", err)
	}
	return s.Resolve(ctx, id, handler)
}

// unpack is EnsureUnpacked with a lease of its own.
func (s *Service) unpack(ctx context.Context, img Image) error {
	if s.unpacked(ctx, img.ConfigDesc.Digest, img.ChainID, img.Snapshotter) {
		return nil
	}
	l, err := s.view.Leases().Create(ctx, lease.Lease{Labels: map[string]string{lease.LabelExpire: time.Now().Add(time.Hour).UTC().Format(time.RFC3339)}})
	if err != nil {
		return fmt.Errorf("unpack image %s: lease: %w", img.ID, err)
	}
	defer func() {
		rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := s.view.Leases().Delete(rest, l.ID, false); err != nil && !errdefs.IsNotFound(err) {
			s.d.Log.Warn("lease of an unpack is left to expire", "lease", l.ID, "err", err)
		}
	}()
	leased, err := s.d.Source.In(cristate.Namespace, l.ID)
	if err != nil {
		return fmt.Errorf("unpack image %s: %w", img.ID, err)
	}
	return s.EnsureUnpacked(ctx, leased, img)
}

// unpacked reports whether a config's label says so.
func (s *Service) unpacked(ctx context.Context, config digest.Digest, chainID, snapshotter string) bool {
	if chainID == "" {
		return true
	}
	info, err := s.view.Content().Info(ctx, config)
	return err == nil && info.Labels[manifest.LabelSnapshot+snapshotter] == chainID
}

// Recover fills the index from the store. Until it returns, images are
// missing from it; those that are incomplete stay out and are logged.
func (s *Service) Recover(ctx context.Context) error {
	all, err := s.view.Images().List(ctx)
	if err != nil {
		return fmt.Errorf("recover images: %w", err)
	}
	here := make(map[string]bool, len(all))
	for _, i := range all {
		here[i.Name] = true
	}
	for _, name := range s.index.all() {
		if !here[name] {
			_, _ = s.refresh(ctx, name) // it went, or came just now
		}
	}
	var wg sync.WaitGroup
	work := make(chan image.Image)
	for range 4 {
		wg.Go(func() {
			for i := range work {
				f, err := s.refresh(ctx, i.Name)
				if err == nil && !here[f.config.Digest.String()] {
					// A pull was interrupted between two records.
					err = s.record(ctx, f.config.Digest.String(), s.labels(i), f.target)
				}
				if err != nil && ctx.Err() == nil {
					s.d.Log.Warn("image is incomplete and will be pulled again when it is needed", "image", i.Name, "err", err)
				}
			}
		})
	}
	for _, i := range all {
		if ctx.Err() != nil {
			break
		}
		work <- i
	}
	close(work)
	wg.Wait()
	if ctx.Err() != nil {
		return fmt.Errorf("recover images: %w", ctx.Err())
	}
	s.readyOnce.Do(func() { close(s.ready) })
	return nil
}

// Ready is closed when the index has been filled for the first time. Until
// then, images seem to be missing that are not.
func (s *Service) Ready() <-chan struct{} { return s.ready }

// Run follows what other clients do to images, and measures snapshots, until
// ctx ends (contract 7.2.3, 7.2.5). It recovers first.
func (s *Service) Run(ctx context.Context) error {
	period := time.Duration(s.d.Config.StatsCollectPeriod) * time.Second
	if period <= 0 {
		period = 10 * time.Second
	}
	used := []string{s.d.Config.Snapshotter}
	for _, h := range slices.Concat(slices.Collect(maps.Keys(s.d.Runtime.Containerd.Runtimes)), slices.Collect(maps.Keys(s.d.Config.RuntimePlatforms))) {
		if name, err := s.Snapshotter(h); err == nil && !slices.Contains(used, name) {
			used = append(used, name)
		}
	}
	var wg sync.WaitGroup
	defer func() {
		measured := make(chan struct{})
		go func() { wg.Wait(); close(measured) }()
		select {
		case <-measured:
		case <-time.After(s.patience):
			// A file system that hangs cannot be left in any other way.
			s.d.Log.Warn("a snapshotter is still being measured", "after", s.patience)
		}
	}()
	for _, name := range used {
		wg.Go(func() { s.usage.run(ctx, name, period) })
	}
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, time.Minute) {
		err := s.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.d.Log.Warn("index of images is behind", "err", err, "again_in", pause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

func (s *Service) follow(ctx context.Context) error {
	sub, err := s.d.Events.Subscribe(ctx, `namespace==`+string(cristate.Namespace)+`,topic~="^/images/"`)
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := s.Recover(ctx); err != nil {
		return err
	}
	for {
		e, err := sub.Next(ctx)
		if err != nil {
			return err
		}
		if name, ok := e.Event.Field([]string{"name"}); ok {
			if _, err := s.refresh(ctx, name); err != nil && ctx.Err() == nil {
				s.d.Log.Info("image is not usable by pods", "image", name, "err", err)
			}
		}
	}
}
