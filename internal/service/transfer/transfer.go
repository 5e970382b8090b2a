// Package transfer is the transfer service: it picks the use case for a pair of
// endpoints and gives it a lease, so that what it makes survives until it is
// referenced, and is collected if the transfer fails. Image records are made
// here, last.
package transfer

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/registry"
	core "github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
)

// Puller is service/pull.
type Puller interface {
	Pull(ctx context.Context, rec view.Records, remote registry.Remote, want core.ImageStore, progress func(core.Progress)) (ocispec.Descriptor, error)
}

// Pusher is service/push.
type Pusher interface {
	Push(ctx context.Context, rec view.Records, remote registry.Remote, tag string, img image.Image, only []ocispec.Platform, progress func(core.Progress)) error
}

// Archiver is service/archive.
type Archiver interface {
	Import(ctx context.Context, rec view.Records, in core.Import, progress func(core.Progress)) (ocispec.Descriptor, error)
	Export(ctx context.Context, rec view.Records, imgs []image.Image, out core.Export, progress func(core.Progress)) error
}

// Unpacker is service/unpack.
type Unpacker interface {
	Image(ctx context.Context, rec view.Records, target ocispec.Descriptor, u core.Unpack, progress func(core.Progress)) error
}

// Deps is what the service is made of. All but Log must be set.
type Deps struct {
	Records    view.RecordSource
	Registries registry.Opener
	Puller     Puller
	Pusher     Pusher
	Archiver   Archiver
	Unpacker   Unpacker
	Log        *slog.Logger
}

// LeaseTime is how long a transfer's lease lasts if the daemon does not live
// to delete it (contract 6.3.11).
const LeaseTime = 24 * time.Hour

// Service makes transfer services of views. It is safe for concurrent use.
type Service struct {
	d    Deps
	life string
}

// New makes a service.
func New(d Deps) *Service {
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{d, newLife()}
}

// In returns the transfer service of a namespace. Under a view's own lease no
// other is made.
func (s *Service) In(rec view.Records) core.Service { return &inView{s, s.d, rec} }

type inView struct {
	s   *Service
	d   Deps
	rec view.Records
}

// Transfer implements core/transfer.Service for the pairs of contract 6.3.1.
func (v *inView) Transfer(ctx context.Context, src, dst core.Endpoint, opts core.Options) error {
	if src == nil || dst == nil {
		return fmt.Errorf("transfer: source and destination are required: %w", errdefs.ErrInvalidArgument)
	}
	var mu sync.Mutex
	progress := func(p core.Progress) {
		if opts.Progress != nil {
			mu.Lock()
			defer mu.Unlock()
			opts.Progress(p)
		}
	}
	do, err := v.pair(src, dst)
	if err != nil {
		return err
	}
	return do(ctx, progress)
}

type action func(ctx context.Context, progress func(core.Progress)) error

func (v *inView) pair(src, dst core.Endpoint) (action, error) {
	switch s := src.(type) {
	case core.Registry:
		if d, ok := dst.(core.ImageStore); ok {
			return func(ctx context.Context, p func(core.Progress)) error { return v.pull(ctx, s, d, p) }, nil
		}
	case core.ImageStore:
		switch d := dst.(type) {
		case core.Registry:
			return func(ctx context.Context, p func(core.Progress)) error { return v.push(ctx, s, d, p) }, nil
		case core.ImageStore:
			return func(ctx context.Context, p func(core.Progress)) error { return v.tag(ctx, s, d, p) }, nil
		case core.Export:
			return func(ctx context.Context, p func(core.Progress)) error { return v.export(ctx, s, d, p) }, nil
		}
	case core.Import:
		switch d := dst.(type) {
		case core.ImageStore:
			return func(ctx context.Context, p func(core.Progress)) error { return v.load(ctx, s, d, p) }, nil
		case core.Export:
			return func(ctx context.Context, _ func(core.Progress)) error { return Echo(ctx, s, d) }, nil
		}
	}
	return nil, fmt.Errorf("transfer from %s to %s: %w", src.TypeURL(), dst.TypeURL(), errdefs.ErrNotImplemented)
}

// leased runs do with records under a lease. source is what is pulled, "" if
// it is no pull.
func (v *inView) leased(ctx context.Context, source string, do func(view.Records) error) error {
	if v.rec.Lease() != "" {
		return do(v.rec)
	}
	l, err := v.rec.Leases().Create(ctx, lease.Lease{Labels: leaseLabels(v.s.life, source)})
	if err != nil {
		return fmt.Errorf("lease for a transfer: %w", err)
	}
	// The request may have been cancelled; the lease goes all the same.
	defer func() {
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := v.rec.Leases().Delete(dctx, l.ID, false); err != nil && !errdefs.IsNotFound(err) {
			v.d.Log.Warn("lease of a transfer is left to expire", "lease", l.ID, "namespace", v.rec.Namespace(), "err", err)
		}
	}()
	rec, err := v.d.Records.In(v.rec.Namespace(), l.ID)
	if err != nil {
		return fmt.Errorf("lease for a transfer: %w", err)
	}
	if err := do(rec); err != nil {
		return err
	}
	if source != "" {
		// What an interrupted pull of the same had kept is the image's now.
		if err := v.s.release(ctx, v.rec, func(s string) bool { return s == source[:min(len(source), maxSource)] }); err != nil {
			v.d.Log.Warn("lease of an interrupted transfer is left to expire", "namespace", v.rec.Namespace(), "err", err)
		}
	}
	return nil
}

func (v *inView) pull(ctx context.Context, src core.Registry, dst core.ImageStore, progress func(core.Progress)) error {
	if dst.Name == "" && len(dst.References) == 0 {
		dst.Name = src.Reference
	}
	from := "OCI Registry (" + src.Reference + ")"
	remote, err := v.d.Registries.Open(src.Reference, src.Options)
	if err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	err = v.leased(ctx, src.Reference, func(rec view.Records) error {
		progress(core.Progress{Event: "Resolving from " + from})
		started := false
		desc, err := v.d.Puller.Pull(ctx, rec, remote, dst, func(p core.Progress) {
			if !started {
				started = true
				progress(core.Progress{Event: "Pulling from " + from})
			}
			progress(p)
		})
		if err != nil {
			return err
		}
		return save(ctx, rec, desc, dst, progress)
	})
	if err != nil {
		return fmt.Errorf("pull %s: %w", src.Reference, err)
	}
	progress(core.Progress{Event: "Completed pull from " + from})
	return nil
}

// save makes the records that an image store endpoint asks for.
func save(ctx context.Context, rec view.Records, desc ocispec.Descriptor, want core.ImageStore, progress func(core.Progress)) error {
	all := names(desc, want)
	if len(all) == 0 {
		return fmt.Errorf("no name for image %s: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	target := desc
	if len(desc.Annotations) > 0 {
		target.Annotations = maps.Clone(desc.Annotations)
		delete(target.Annotations, refSource)
	}
	for _, name := range all {
		if err := record(ctx, rec, image.Image{Name: name, Labels: want.Labels, Target: target}); err != nil {
			return fmt.Errorf("save image %s: %w", name, err)
		}
		progress(core.Progress{Event: "saved", Name: name, Desc: &target})
	}
	return nil
}

// record creates or updates an image. Somebody else may do the other meanwhile.
func record(ctx context.Context, rec view.Records, img image.Image) error {
	for attempt := 1; ; attempt++ {
		_, err := rec.Images().Create(ctx, img)
		if !errdefs.IsAlreadyExists(err) {
			return err
		}
		fields := []string{"target"}
		for k := range img.Labels {
			fields = append(fields, "labels."+k)
		}
		_, err = rec.Images().Update(ctx, img, fields...)
		if !errdefs.IsNotFound(err) || attempt == 5 {
			return err
		}
	}
}

func (v *inView) push(ctx context.Context, src core.ImageStore, dst core.Registry, progress func(core.Progress)) error {
	to := "OCI Registry (" + dst.Reference + ")"
	img, err := v.lookup(ctx, src)
	if err != nil {
		return fmt.Errorf("push %s: %w", src.Name, err)
	}
	remote, err := v.d.Registries.Open(dst.Reference, dst.Options)
	if err != nil {
		return fmt.Errorf("push: %w", err)
	}
	tag, err := pushTag(dst.Reference, img.Target.Digest)
	if err != nil {
		return fmt.Errorf("push %s: %w", src.Name, err)
	}
	// The lease keeps the image's content while it is sent, also if the image
	// is removed meanwhile.
	err = v.leased(ctx, "", func(rec view.Records) error {
		if err := hold(ctx, rec, img); err != nil {
			return err
		}
		progress(core.Progress{Event: "Pushing to " + to})
		return v.d.Pusher.Push(ctx, rec, remote, tag, img, src.Platforms, progress)
	})
	if err != nil {
		return fmt.Errorf("push %s: %w", src.Name, err)
	}
	progress(core.Progress{Event: "Completed push to " + to})
	return nil
}

// pushTag is the tag of a reference; "" if it is one by digest, which must be the image's.
func pushTag(ref string, target digest.Digest) (string, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", fmt.Errorf("reference %.256q: %v: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	d, digested := named.(reference.Digested)
	if digested && d.Digest() != target {
		return "", fmt.Errorf("to %s: the image is %s: %w", ref, target, errdefs.ErrInvalidArgument)
	}
	if t, ok := named.(reference.Tagged); ok {
		return t.Tag(), nil
	}
	if digested {
		return "", nil
	}
	return "latest", nil
}

// hold makes the lease keep an image's content.
func hold(ctx context.Context, rec view.Records, img image.Image) error {
	return rec.Leases().AddResource(ctx, rec.Lease(), lease.Resource{ID: img.Target.Digest.String(), Type: lease.TypeContent})
}

func (v *inView) lookup(ctx context.Context, src core.ImageStore) (image.Image, error) {
	if src.Name == "" {
		return image.Image{}, fmt.Errorf("the image's name is required: %w", errdefs.ErrInvalidArgument)
	}
	return v.rec.Images().Get(ctx, src.Name)
}

func (v *inView) tag(ctx context.Context, src, dst core.ImageStore, progress func(core.Progress)) error {
	img, err := v.lookup(ctx, src)
	if err != nil {
		return fmt.Errorf("tag %s: %w", src.Name, err)
	}
	if err := save(ctx, v.rec, img.Target, dst, progress); err != nil {
		return fmt.Errorf("tag %s: %w", src.Name, err)
	}
	return nil
}

func (v *inView) export(ctx context.Context, src core.ImageStore, dst core.Export, progress func(core.Progress)) error {
	if dst.Writer == nil {
		return fmt.Errorf("export: no stream to write to: %w", errdefs.ErrInvalidArgument)
	}
	imgs, err := v.lookupAll(ctx, src)
	if err != nil {
		return fmt.Errorf("export %s: %w", src.Name, err)
	}
	progress(core.Progress{Event: "Exporting"})
	if len(dst.Platforms) == 0 {
		dst.Platforms = src.Platforms
	}
	err = v.leased(ctx, "", func(rec view.Records) error {
		for _, img := range imgs {
			if err := hold(ctx, rec, img); err != nil {
				return fmt.Errorf("export %s: %w", img.Name, err)
			}
		}
		return v.d.Archiver.Export(ctx, rec, imgs, dst, progress)
	})
	if err != nil {
		return err
	}
	if err := dst.Writer.Close(); err != nil {
		return fmt.Errorf("export %s: %w", src.Name, err)
	}
	progress(core.Progress{Event: "Completed export"})
	return nil
}

// lookupAll finds the images that an export names: one, and those of further
// references, which may be prefixes.
func (v *inView) lookupAll(ctx context.Context, src core.ImageStore) ([]image.Image, error) {
	var imgs []image.Image
	seen := map[string]bool{}
	add := func(img image.Image) {
		if !seen[img.Name] {
			seen[img.Name] = true
			imgs = append(imgs, img)
		}
	}
	refs := src.References
	if src.Name != "" {
		refs = append([]core.Reference{{Name: src.Name}}, refs...)
	}
	for _, r := range refs {
		if !r.IsPrefix {
			img, err := v.rec.Images().Get(ctx, r.Name)
			if err != nil {
				return nil, err
			}
			add(img)
			continue
		}
		all, err := v.rec.Images().List(ctx)
		if err != nil {
			return nil, err
		}
		for _, img := range all {
			if hasPrefix(img.Name, r.Name) {
				add(img)
			}
		}
	}
	if len(imgs) == 0 {
		return nil, fmt.Errorf("no image is named: %w", errdefs.ErrInvalidArgument)
	}
	return imgs, nil
}

// load imports an archive.
func (v *inView) load(ctx context.Context, src core.Import, dst core.ImageStore, progress func(core.Progress)) error {
	if src.Reader == nil {
		return fmt.Errorf("import: no stream to read from: %w", errdefs.ErrInvalidArgument)
	}
	progress(core.Progress{Event: "Importing"})
	err := v.leased(ctx, "", func(rec view.Records) error {
		idx, err := v.d.Archiver.Import(ctx, rec, src, progress)
		if err != nil {
			return err
		}
		children, err := manifest.Children(ctx, rec.Content(), idx)
		if err != nil {
			return fmt.Errorf("import: %w", err)
		}
		// Unpack before naming: an image with a name is ready to be used.
		if err := v.unpack(ctx, rec, children, dst.Unpacks, progress); err != nil {
			return fmt.Errorf("import: %w", err)
		}
		saved := 0
		for _, t := range append([]ocispec.Descriptor{idx}, imported(children)...) {
			if len(names(t, dst)) == 0 {
				continue
			}
			if err := save(ctx, rec, t, dst, progress); err != nil {
				return fmt.Errorf("import: %w", err)
			}
			saved++
		}
		if saved == 0 {
			return fmt.Errorf("import: the archive's images have no name that was asked for: %w", errdefs.ErrNotFound)
		}
		return nil
	})
	if err != nil {
		return err
	}
	progress(core.Progress{Event: "Completed import"})
	return nil
}

// unpack unpacks all images of an archive that have a part for the platforms
// asked for; none at all is ErrNotFound.
func (v *inView) unpack(ctx context.Context, rec view.Records, images []ocispec.Descriptor, unpacks []core.Unpack, progress func(core.Progress)) error {
	var missing error
	done := 0
	for _, c := range images {
		for _, u := range unpacks {
			err := v.d.Unpacker.Image(ctx, rec, c, u, progress)
			switch {
			case err == nil:
				done++
			case errdefs.IsNotFound(err):
				missing = err
				v.d.Log.Info("imported image is not unpacked", "digest", c.Digest, "err", err)
			default:
				return err
			}
		}
	}
	if done == 0 {
		return missing
	}
	return nil
}

// Echo copies an import's stream to an export's. It needs no namespace.
func Echo(ctx context.Context, src core.Import, dst core.Export) error {
	if src.Reader == nil || dst.Writer == nil {
		return fmt.Errorf("echo: both streams are required: %w", errdefs.ErrInvalidArgument)
	}
	if src.MediaType != "" && dst.MediaType != "" && src.MediaType != dst.MediaType {
		return fmt.Errorf("echo from %.100q to %.100q: %w", src.MediaType, dst.MediaType, errdefs.ErrNotImplemented)
	}
	if _, err := io.Copy(dst.Writer, &stoppable{ctx, src.Reader}); err != nil {
		return fmt.Errorf("echo: %w", err)
	}
	return dst.Writer.Close()
}

// stoppable is a Reader that ends with its context.
type stoppable struct {
	ctx context.Context
	r   io.Reader
}

func (s *stoppable) Read(b []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.r.Read(b)
}

// hasPrefix reports whether prefix ends where a part of the name ends.
func hasPrefix(name, prefix string) bool {
	rest, ok := strings.CutPrefix(name, prefix)
	return ok && prefix != "" && (rest == "" || strings.ContainsRune("/:@", rune(rest[0])))
}
