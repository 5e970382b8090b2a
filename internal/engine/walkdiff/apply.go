package walkdiff

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/internal/lib/mountx"
	"github.com/gantryd/gantry/internal/lib/tarstream"
)

// maxChain is how many processors one layer may need.
const maxChain = 16

// Apply implements diff.Applier (contract 1.3.11, 3.3.2).
func (e *Engine) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts diff.ApplyOptions) (ocispec.Descriptor, error) {
	applied, err := e.apply(ctx, desc, mounts, opts)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("apply %s: %w", desc.Digest, err)
	}
	return applied, nil
}

func (e *Engine) apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts diff.ApplyOptions) (_ ocispec.Descriptor, err error) {
	var none ocispec.Descriptor
	steps, last, err := e.chain(desc.MediaType)
	if err != nil {
		return none, err
	}
	if err := desc.Digest.Validate(); err != nil {
		return none, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	blob, err := e.store.Open(ctx, desc.Digest)
	if err != nil {
		return none, err
	}
	defer blob.Close()
	if desc.Size > 0 && blob.Size() != desc.Size {
		return none, fmt.Errorf("blob has %d bytes, its descriptor says %d: %w", blob.Size(), desc.Size, errdefs.ErrFailedPrecondition)
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	raw := &source{r: blob, progress: opts.Progress}
	var closers []io.Closer
	defer func() {
		cancel() // pumps and programs end
		for i := len(closers) - 1; i >= 0; i-- {
			closers[i].Close()
		}
	}()
	compressed := digest.Canonical.Digester()
	var tee io.Writer
	if e.opts.VerifyBlobs {
		compressed = desc.Digest.Algorithm().Digester()
		tee = compressed.Hash()
	}
	in := tarstream.NewPump(ctx, raw, tee)
	closers = append(closers, in)
	var stream io.Reader = in
	mediaType := desc.MediaType
	for _, p := range steps {
		next, _ := p.Accepts(mediaType)
		rc, err := p.Process(ctx, mediaType, stream, opts.Payloads[mediaType])
		if err != nil {
			return none, err
		}
		closers = append(closers, rc)
		stream, mediaType = rc, next
	}
	where := func(err error) error {
		if err == nil || ctx.Err() != nil || !errdefs.IsDataLoss(err) {
			return err
		}
		return fmt.Errorf("near byte %d of %d: %w", raw.offset(), blob.Size(), err)
	}
	if last == sniffed {
		rc, _, err := tarstream.NewDecompressor(ctx, stream, e.opts.GzipHelper)
		if err != nil {
			return none, where(err)
		}
		closers = append(closers, rc)
		stream = rc
	}
	diffID := digest.Canonical.Digester()
	out := tarstream.NewPump(ctx, stream, diffID.Hash())
	closers = append(closers, out)

	err = e.onto(ctx, mounts, opts.Sync, func(root string, ao tarstream.ApplyOptions) error {
		ao.Limits, ao.SkipDevices = e.opts.Limits, e.opts.UserNS
		if e.opts.Report != nil {
			ao.Report = func(entry, what string) { e.opts.Report(desc, entry, what) }
		}
		if _, err := tarstream.Apply(ctx, root, out, ao); err != nil {
			return err
		}
		return out.Finish()
	})
	if err != nil {
		return none, where(err)
	}
	if err := in.Finish(); err != nil {
		return none, where(err)
	}
	got := diffID.Digest()
	if e.opts.VerifyBlobs {
		if d := compressed.Digest(); d != desc.Digest {
			return none, fmt.Errorf("the blob's bytes are %s: %w", d, errdefs.ErrFailedPrecondition)
		}
	} else if len(steps) == 0 && last == plain && desc.Digest.Algorithm() == digest.Canonical && got != desc.Digest {
		return none, fmt.Errorf("the blob's bytes are %s: %w", got, errdefs.ErrFailedPrecondition)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: got, Size: out.Count()}, nil
}

// chain finds what turns a media type into a tar stream.
func (e *Engine) chain(mediaType string) ([]Processor, packing, error) {
	var steps []Processor
next:
	for range maxChain {
		for _, p := range e.opts.Processors {
			if returns, ok := p.Accepts(mediaType); ok && returns != mediaType {
				steps = append(steps, p)
				mediaType = returns
				continue next
			}
		}
		if k := packingOf(mediaType); k != unknown {
			return steps, k, nil
		}
		return nil, unknown, fmt.Errorf("media type %q is no layer and no stream processor takes it: %w", mediaType, errdefs.ErrNotImplemented)
	}
	return nil, unknown, fmt.Errorf("media type %q: stream processors lead in a circle: %w", mediaType, errdefs.ErrInvalidArgument)
}

// source reads a blob from its start to its end.
type source struct {
	r        content.ReaderAt
	at       atomic.Int64
	progress func(int64)
}

func (s *source) Read(p []byte) (int, error) {
	at := s.offset()
	n, err := s.r.ReadAt(p, at)
	if n > 0 {
		s.at.Store(at + int64(n))
		if s.progress != nil {
			s.progress(at + int64(n))
		}
	}
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		err = nil
		if n == 0 {
			err = io.EOF
		}
	}
	return n, err
}

func (s *source) offset() int64 { return s.at.Load() }

// onto calls fn with the directory that the mounts show for writing.
func (e *Engine) onto(ctx context.Context, mounts []mount.Mount, sync bool, fn func(root string, opts tarstream.ApplyOptions) error) error {
	run := func(root string, opts tarstream.ApplyOptions) error {
		if err := fn(root, opts); err != nil {
			return err
		}
		if sync {
			return syncFS(root)
		}
		return nil
	}
	if err := check(mounts); err != nil {
		return err
	}
	if len(mounts) == 1 && mounts[0].Target == "" {
		m := mounts[0]
		switch {
		case m.Type == "overlay":
			if o, ok := parseOverlay(m.Options); ok && o.upper != "" {
				return run(o.upper, tarstream.ApplyOptions{Whiteouts: tarstream.Overlay, UserXattr: o.userXattr, Lowers: o.lowers})
			}
		case isPlainBind(m):
			if isReadOnly(m) {
				return fmt.Errorf("mount %s is read-only: %w", m.Source, errdefs.ErrInvalidArgument)
			}
			opts := tarstream.ApplyOptions{}
			if e.isOverlayLayer(m.Source) {
				opts.Whiteouts = tarstream.Overlay
			}
			return run(m.Source, opts)
		}
	}
	return mountx.WithTemp(ctx, e.opts.TempDir, mounts, func(root string) error {
		return run(root, tarstream.ApplyOptions{})
	})
}

// check refuses lists of mounts that nothing can be done with.
func check(mounts []mount.Mount) error {
	if len(mounts) == 0 {
		return fmt.Errorf("no mounts: %w", errdefs.ErrInvalidArgument)
	}
	for i, m := range mounts {
		if m.Type == "" && !isPlainBind(m) {
			return fmt.Errorf("mount %d has no type: %w", i, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// isOverlayLayer reports whether dir is the directory of a parentless snapshot
// of overlayfs: containerd's layout is fs beside work. Such a layer may be
// committed on top of others (rebase, contract 6.4.2), so whiteouts have to be
// kept as overlay's; without a layer below them they hide nothing.
func (e *Engine) isOverlayLayer(dir string) bool {
	if e.opts.UserNS || filepath.Base(dir) != "fs" {
		return false
	}
	fi, err := os.Lstat(filepath.Join(filepath.Dir(dir), "work"))
	return err == nil && fi.IsDir()
}

func isPlainBind(m mount.Mount) bool {
	bind := m.Type == "bind"
	for _, o := range m.Options {
		switch o {
		case "bind", "rbind":
			bind = true
		case "rw", "ro":
		default:
			return false // a mapping of ids, perhaps
		}
	}
	return bind && filepath.IsAbs(m.Source)
}

func isReadOnly(m mount.Mount) bool { return slices.Contains(m.Options, "ro") }

// overlayDirs is what an overlay mount consists of.
type overlayDirs struct {
	upper     string
	lowers    []string // the topmost first
	userXattr bool
}

// parseOverlay understands the options of a plain overlay; false if there are
// others that change what files look like in the upper directory.
func parseOverlay(options []string) (o overlayDirs, ok bool) {
	for _, opt := range options {
		name, value, _ := strings.Cut(opt, "=")
		switch name {
		case "upperdir":
			if strings.Contains(value, `\`) {
				return o, false
			}
			o.upper = value
		case "lowerdir":
			if strings.Contains(value, `\`) || strings.Contains(value, "::") {
				return o, false // an escaped colon, or data-only layers
			}
			o.lowers = strings.Split(value, ":")
		case "userxattr":
			o.userXattr = true
		case "redirect_dir":
			if value == "on" {
				return o, false
			}
		case "metacopy":
			if value == "on" {
				return o, false
			}
		case "workdir", "index", "xino", "volatile", "rw", "ro", "nfs_export", "uuid":
		case "uidmap", "gidmap":
			// The lower layers are mapped; what is written to the upper one is
			// as the archive says, like every layer.
		default:
			if strings.HasPrefix(opt, "X-containerd.") || strings.HasPrefix(opt, "x-") {
				continue
			}
			return o, false
		}
	}
	for _, dir := range append([]string{o.upper}, o.lowers...) {
		if dir != "" && !filepath.IsAbs(dir) {
			return o, false
		}
	}
	return o, true
}

// Apply implements diff.Applier.
func (c Chain) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts diff.ApplyOptions) (ocispec.Descriptor, error) {
	return firstImplemented(c, func(s diff.Service) (ocispec.Descriptor, error) { return s.Apply(ctx, desc, mounts, opts) })
}

// Compare implements diff.Comparer.
func (c Chain) Compare(ctx context.Context, lower, upper []mount.Mount, opts diff.CompareOptions) (ocispec.Descriptor, error) {
	return firstImplemented(c, func(s diff.Service) (ocispec.Descriptor, error) { return s.Compare(ctx, lower, upper, opts) })
}

func firstImplemented(c Chain, call func(diff.Service) (ocispec.Descriptor, error)) (ocispec.Descriptor, error) {
	err := fmt.Errorf("no differ: %w", errdefs.ErrNotImplemented)
	for _, s := range c {
		var d ocispec.Descriptor
		if d, err = call(s); err == nil || !errdefs.IsNotImplemented(err) {
			return d, err
		}
	}
	return ocispec.Descriptor{}, err
}
