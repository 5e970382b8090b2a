package walkdiff

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/internal/lib/mountx"
	"github.com/gantryd/gantry/internal/lib/tarstream"
)

// abortTimeout bounds the clean-up of an ingest after the caller has gone.
const abortTimeout = 10 * time.Second

// Compare implements diff.Comparer (contract 1.3.12, 3.3.3).
func (e *Engine) Compare(ctx context.Context, lower, upper []mount.Mount, opts diff.CompareOptions) (ocispec.Descriptor, error) {
	opts.MediaType = cmp.Or(opts.MediaType, ocispec.MediaTypeImageLayerGzip)
	if opts.Ref == "" {
		opts.Ref = "walkdiff-" + rand.Text()
	}
	if opts.SourceDateEpoch == nil {
		opts.SourceDateEpoch = e.opts.SourceDateEpoch
	}
	d, err := e.compare(ctx, lower, upper, opts)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("compare into %s: %w", opts.Ref, err)
	}
	return d, nil
}

func compressionFor(mediaType string) (tarstream.Compression, error) {
	switch mediaType {
	case ocispec.MediaTypeImageLayer, dockerLayer:
		return tarstream.Plain, nil
	case ocispec.MediaTypeImageLayerGzip, dockerLayer + ".gzip":
		return tarstream.Gzip, nil
	case ocispec.MediaTypeImageLayerZstd, dockerLayer + ".zstd":
		return tarstream.Zstd, nil
	}
	return 0, fmt.Errorf("media type %q: %w", mediaType, errdefs.ErrNotImplemented)
}

func (e *Engine) compare(ctx context.Context, lower, upper []mount.Mount, opts diff.CompareOptions) (_ ocispec.Descriptor, err error) {
	var none ocispec.Descriptor
	compression, err := compressionFor(opts.MediaType)
	if err != nil {
		return none, err
	}
	if err := check(upper); err != nil {
		return none, fmt.Errorf("upper: %w", err)
	}
	if len(lower) > 0 {
		if err := check(lower); err != nil {
			return none, fmt.Errorf("lower: %w", err)
		}
	}
	w, err := e.store.Writer(ctx, opts.Ref, content.WriterOptions{})
	if err != nil {
		return none, err
	}
	defer func() {
		w.Close()
		if err != nil {
			// What is there is no use to anyone: the next try may differ.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
			defer cancel()
			_ = e.store.Abort(ctx, opts.Ref)
		}
	}()
	if st, err := w.Status(); err != nil {
		return none, err
	} else if st.Offset > 0 {
		if err := w.Truncate(0); err != nil {
			return none, err
		}
	}

	blob := &counter{w: w, hash: digest.Canonical.Digester()}
	buffered := bufio.NewWriterSize(blob, 1<<20)
	packed, err := tarstream.NewCompressor(buffered, compression)
	if err != nil {
		return none, err
	}
	diffID := digest.Canonical.Digester()
	if err := e.write(ctx, io.MultiWriter(packed, diffID.Hash()), lower, upper, tarstream.DiffOptions{Epoch: opts.SourceDateEpoch}); err != nil {
		return none, err
	}
	if err := packed.Close(); err != nil {
		return none, err
	}
	if err := buffered.Flush(); err != nil {
		return none, err
	}
	labels := maps.Clone(opts.Labels)
	desc := ocispec.Descriptor{MediaType: opts.MediaType, Digest: blob.hash.Digest(), Size: blob.n}
	if compression != tarstream.Plain {
		if labels == nil {
			labels = make(map[string]string)
		}
		labels[diff.LabelUncompressed] = diffID.Digest().String()
	}
	err = w.Commit(ctx, desc.Size, desc.Digest, labels)
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return none, err
	}
	if err != nil {
		// The same layer is there already, perhaps from elsewhere and without the labels.
		if err := e.label(ctx, desc.Digest, labels); err != nil {
			return none, err
		}
	}
	return desc, nil
}

func (e *Engine) label(ctx context.Context, dgst digest.Digest, labels map[string]string) error {
	if len(labels) == 0 {
		return nil
	}
	var fields []string
	for k := range labels {
		fields = append(fields, "labels."+k)
	}
	slices.Sort(fields)
	_, err := e.store.Update(ctx, content.Info{Digest: dgst, Labels: labels}, fields...)
	return err
}

type counter struct {
	w    io.Writer
	hash digest.Digester
	n    int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.hash.Hash().Write(p[:n])
	c.n += int64(n)
	return n, err
}

// write archives the difference, by the cheapest way there is.
func (e *Engine) write(ctx context.Context, w io.Writer, lower, upper []mount.Mount, opts tarstream.DiffOptions) error {
	if o, ok := pair(lower, upper); ok {
		opts.UserXattr = o.userXattr
		err := tarstream.DiffUpper(ctx, w, o.upper, opts)
		if !errdefs.IsNotImplemented(err) {
			return err
		}
		// Redirects and the like: only the kernel knows what is where.
	}
	return e.readable(ctx, lower, func(low string) error {
		return e.readable(ctx, upper, func(up string) error {
			return tarstream.Diff(ctx, w, low, up, opts)
		})
	})
}

// pair reports whether upper is an overlay directly on top of exactly what
// lower shows: its upper directory is the difference then.
func pair(lower, upper []mount.Mount) (overlayDirs, bool) {
	if len(upper) != 1 || upper[0].Type != "overlay" || upper[0].Target != "" || len(lower) != 1 || lower[0].Target != "" {
		return overlayDirs{}, false
	}
	up, ok := parseOverlay(upper[0].Options)
	if !ok || up.upper == "" || mapped(upper[0]) || mapped(lower[0]) {
		return up, false
	}
	if isPlainBind(lower[0]) {
		return up, slices.Equal(up.lowers, []string{lower[0].Source})
	}
	if lower[0].Type != "overlay" {
		return up, false
	}
	low, ok := parseOverlay(lower[0].Options)
	if !ok {
		return up, false
	}
	below := low.lowers
	if low.upper != "" {
		below = append([]string{low.upper}, below...)
	}
	return up, slices.Equal(up.lowers, below)
}

func mapped(m mount.Mount) bool {
	return slices.ContainsFunc(m.Options, func(o string) bool {
		return strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap=")
	})
}

// readable calls fn with a directory that shows the mounts, or "" for none.
func (e *Engine) readable(ctx context.Context, mounts []mount.Mount, fn func(root string) error) error {
	if len(mounts) == 0 {
		return fn("")
	}
	if len(mounts) == 1 && mounts[0].Target == "" && isPlainBind(mounts[0]) {
		return fn(mounts[0].Source)
	}
	return mountx.WithTemp(ctx, e.opts.TempDir, mountx.ReadOnly(mounts), fn)
}
