package memory

import (
	"cmp"
	"context"
	_ "crypto/sha256" // the digests a blob may be named by
	_ "crypto/sha512"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/internal/lib/fields"
	"github.com/gantryd/gantry/internal/lib/filter"
)

// Content is a content.Store in memory, with labels.
type Content struct {
	mu      sync.Mutex // guards both maps and what they hold
	blobs   map[digest.Digest]*blob
	ingests map[string]*ingest
}

type blob struct {
	info content.Info
	data []byte // never changed
}

type ingest struct {
	status content.Status
	data   []byte
	hash   hash.Hash // sha256 of data
	since  time.Time // when a writer took it, zero if none has it
}

// NewContent returns an empty store.
func NewContent() *Content {
	return &Content{blobs: map[digest.Digest]*blob{}, ingests: map[string]*ingest{}}
}

// find returns a blob, ErrNotFound or ErrInvalidArgument. c.mu is held.
func (c *Content) find(dgst digest.Digest) (*blob, error) {
	if err := checkDigest(dgst); err != nil {
		return nil, err
	}
	if b := c.blobs[dgst]; b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("content %s: %w", dgst, errdefs.ErrNotFound)
}

func checkDigest(dgst digest.Digest) error {
	if err := dgst.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", dgst, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func copyInfo(i content.Info) content.Info {
	i.Labels = maps.Clone(i.Labels)
	return i
}

// Info implements content.Store.
func (c *Content) Info(_ context.Context, dgst digest.Digest) (content.Info, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := c.find(dgst)
	if err != nil {
		return content.Info{}, err
	}
	return copyInfo(b.info), nil
}

// Walk implements content.Store: over the blobs there are when it begins.
func (c *Content) Walk(ctx context.Context, fn func(content.Info) error, filters ...string) error {
	match, err := filter.Parse(filters...)
	if err != nil {
		return err
	}
	c.mu.Lock()
	var infos []content.Info
	for _, b := range c.blobs {
		if match.Match(b.info) {
			infos = append(infos, copyInfo(b.info))
		}
	}
	c.mu.Unlock()
	slices.SortFunc(infos, func(a, b content.Info) int { return cmp.Compare(a.Digest, b.Digest) })
	for _, i := range infos {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("walk content: %w", err)
		}
		if err := fn(i); err != nil {
			return err
		}
	}
	return nil
}

// Update implements content.Store.
func (c *Content) Update(_ context.Context, info content.Info, paths ...string) (content.Info, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := c.find(info.Digest)
	if err != nil {
		return content.Info{}, err
	}
	labels, err := fields.Labels(b.info.Labels, info.Labels, paths)
	if err == nil {
		err = ident.CheckLabels(labels)
	}
	if err != nil {
		return content.Info{}, fmt.Errorf("update content %s: %w", info.Digest, err)
	}
	b.info.Labels = labels
	b.info.UpdatedAt = time.Now().UTC()
	return copyInfo(b.info), nil
}

// Delete implements content.Store.
func (c *Content) Delete(_ context.Context, dgst digest.Digest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, err := c.find(dgst); err != nil {
		return err
	}
	delete(c.blobs, dgst)
	return nil
}

// Open implements content.Store.
func (c *Content) Open(_ context.Context, dgst digest.Digest) (content.ReaderAt, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := c.find(dgst)
	if err != nil {
		return nil, err
	}
	return blobReader(b.data), nil
}

type blobReader []byte

func (r blobReader) Size() int64  { return int64(len(r)) }
func (r blobReader) Close() error { return nil }
func (r blobReader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, &fs.PathError{Op: "read", Path: "blob", Err: fs.ErrInvalid}
	}
	if off >= int64(len(r)) {
		return 0, io.EOF
	}
	n := copy(p, r[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Status implements content.Store.
func (c *Content) Status(_ context.Context, ref string) (content.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if in := c.ingests[ref]; in != nil {
		return in.status, nil
	}
	return content.Status{}, fmt.Errorf("ingest %s: %w", ref, errdefs.ErrNotFound)
}

// Statuses implements content.Store.
func (c *Content) Statuses(_ context.Context, filters ...string) ([]content.Status, error) {
	match, err := filter.Parse(filters...)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []content.Status
	for _, ref := range slices.Sorted(maps.Keys(c.ingests)) {
		if st := c.ingests[ref].status; match.Match(st) {
			out = append(out, st)
		}
	}
	return out, nil
}

// Abort implements content.Store.
func (c *Content) Abort(_ context.Context, ref string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	in := c.ingests[ref]
	if in == nil {
		return fmt.Errorf("abort ingest %s: %w", ref, errdefs.ErrNotFound)
	}
	if err := in.free(); err != nil {
		return err
	}
	delete(c.ingests, ref)
	return nil
}

func (in *ingest) digest() digest.Digest { return digest.NewDigest(digest.Canonical, in.hash) }

func (in *ingest) free() error {
	if in.since.IsZero() {
		return nil
	}
	return fmt.Errorf("ref %s locked for %s: %w", in.status.Ref, time.Since(in.since).Round(time.Millisecond), errdefs.ErrUnavailable)
}

// Writer implements content.Store.
func (c *Content) Writer(_ context.Context, ref string, opts content.WriterOptions) (content.Writer, error) {
	if ref == "" {
		return nil, fmt.Errorf("open ingest: ref must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	in := c.ingests[ref]
	if in != nil {
		if err := in.free(); err != nil {
			return nil, err
		}
	}
	if opts.Expected != "" {
		_, err := c.find(opts.Expected)
		if err == nil {
			delete(c.ingests, ref)
			err = fmt.Errorf("content %s: %w", opts.Expected, errdefs.ErrAlreadyExists)
		}
		if !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("open ingest %s: %w", ref, err)
		}
	}
	now := time.Now().UTC()
	if in == nil {
		in = &ingest{status: content.Status{Ref: ref, StartedAt: now, UpdatedAt: now}, hash: digest.Canonical.Hash()}
		c.ingests[ref] = in
	}
	in.since = now
	in.status.Total = max(in.status.Total, opts.Total)
	in.status.Expected = opts.Expected
	return &ingestWriter{c: c, in: in}, nil
}

// ingestWriter is a content.Writer. Its ingest is guarded by c.mu.
type ingestWriter struct {
	c      *Content
	in     *ingest
	closed bool
}

func (w *ingestWriter) check(op string) error {
	if w.closed {
		return fmt.Errorf("%s ingest %s: the writer is closed: %w", op, w.in.status.Ref, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (w *ingestWriter) Write(p []byte) (int, error) {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	if err := w.check("write"); err != nil {
		return 0, err
	}
	w.in.data = append(w.in.data, p...)
	w.in.hash.Write(p)
	w.touch()
	return len(p), nil
}

func (w *ingestWriter) touch() {
	w.in.status.Offset = int64(len(w.in.data))
	w.in.status.UpdatedAt = time.Now().UTC()
}

func (w *ingestWriter) Digest() digest.Digest {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	return w.in.digest()
}

func (w *ingestWriter) Status() (content.Status, error) {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	return w.in.status, nil
}

func (w *ingestWriter) Truncate(size int64) error {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	if err := w.check("truncate"); err != nil {
		return err
	}
	if size != 0 {
		return fmt.Errorf("truncate ingest %s to %d: only to 0: %w", w.in.status.Ref, size, errdefs.ErrInvalidArgument)
	}
	w.in.data = nil
	w.in.hash.Reset()
	w.touch()
	return nil
}

func (w *ingestWriter) Close() error {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	if !w.closed {
		w.closed = true
		w.in.since = time.Time{}
	}
	return nil
}

func (w *ingestWriter) Commit(_ context.Context, size int64, expected digest.Digest, labels map[string]string) error {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	err := w.commit(size, expected, labels)
	if err == nil || errdefs.IsAlreadyExists(err) {
		w.closed = true
		delete(w.c.ingests, w.in.status.Ref)
	}
	if err != nil {
		return fmt.Errorf("commit ingest %s: %w", w.in.status.Ref, err)
	}
	return nil
}

func (w *ingestWriter) commit(size int64, expected digest.Digest, labels map[string]string) error {
	if w.closed {
		return w.check("commit")
	}
	expected = cmp.Or(expected, w.in.status.Expected)
	dgst := expected
	if dgst == "" {
		dgst = w.in.digest()
	}
	if err := checkDigest(dgst); err != nil {
		return err
	}
	if err := ident.CheckLabels(labels); err != nil {
		return err
	}
	if size != 0 && size != int64(len(w.in.data)) {
		return fmt.Errorf("%d bytes instead of %d: %w", len(w.in.data), size, errdefs.ErrFailedPrecondition)
	}
	got := w.in.digest()
	if alg := dgst.Algorithm(); alg != digest.Canonical {
		got = alg.FromBytes(w.in.data)
	}
	if got != dgst {
		return fmt.Errorf("digest is %s instead of %s: %w", got, dgst, errdefs.ErrFailedPrecondition)
	}
	if w.c.blobs[dgst] != nil {
		return fmt.Errorf("content %s: %w", dgst, errdefs.ErrAlreadyExists)
	}
	now := time.Now().UTC()
	w.c.blobs[dgst] = &blob{
		info: content.Info{Digest: dgst, Size: int64(len(w.in.data)), CreatedAt: now, UpdatedAt: now, Labels: maps.Clone(labels)},
		data: w.in.data,
	}
	return nil
}
