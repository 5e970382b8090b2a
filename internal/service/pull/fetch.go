package pull

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/core/transfer"
)

// fetching is the download of one manifest's layers. It begins with the first
// layer that is needed and goes on to the last, so layers that are unpacked
// already are not fetched (contract 6.4.3).
type fetching struct {
	j    *job
	img  *imageOf
	done []chan struct{}
	errs []error

	mu      sync.Mutex
	from    int // layers from here on have been started
	running sync.WaitGroup
}

func newFetching(j *job, img *imageOf) *fetching {
	n := len(img.manifest.Layers)
	f := &fetching{j: j, img: img, done: make([]chan struct{}, n), errs: make([]error, n), from: n}
	for i := range f.done {
		f.done[i] = make(chan struct{})
	}
	return f
}

// start begins the download of layer i and all after it. They end with ctx.
func (f *fetching) start(ctx context.Context, i int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i >= f.from {
		return
	}
	first, last := i, f.from
	f.from = i
	// Each waits for one of the downloads' places in its turn: the lower
	// layers come first, because they are unpacked first.
	turn := make(chan struct{})
	close(turn)
	for k := first; k < last; k++ {
		mine, next := turn, make(chan struct{})
		turn = next
		f.running.Go(func() {
			defer close(f.done[k])
			pass := sync.OnceFunc(func() { close(next) })
			defer pass()
			select {
			case <-mine:
			case <-ctx.Done():
				f.errs[k] = context.Cause(ctx)
				return
			}
			f.errs[k] = f.j.fetchIn(ctx, f.img.manifest.Layers[k], manifest.RefKey(f.img.desc), pass)
		})
	}
}

// ready returns when layer i is complete.
func (f *fetching) ready(ctx context.Context, i int) error {
	f.start(ctx, i)
	select {
	case <-f.done[i]:
		return f.errs[i]
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// all fetches every layer.
func (f *fetching) all(ctx context.Context) error {
	f.start(ctx, 0)
	return f.wait(ctx)
}

// wait returns when all layers that were started are complete, or with the
// first error.
func (f *fetching) wait(ctx context.Context) error {
	f.mu.Lock()
	from := f.from
	f.mu.Unlock()
	for i := from; i < len(f.done); i++ {
		select {
		case <-f.done[i]:
			if f.errs[i] != nil {
				return f.errs[i]
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// document fetches something that is read in memory later.
func (j *job) document(ctx context.Context, desc ocispec.Descriptor, parent string, limit int64) error {
	if desc.Size > limit {
		return fmt.Errorf("fetch %s: %d bytes, at most %d are allowed: %w", manifest.RefKey(desc), desc.Size, limit, errdefs.ErrInvalidArgument)
	}
	return j.fetch(ctx, desc, parent)
}

func (j *job) fetch(ctx context.Context, desc ocispec.Descriptor, parent string) error {
	return j.fetchIn(ctx, desc, parent, func() {})
}

// fetchIn fetches one blob in its turn; pass lets the next one go ahead.
func (j *job) fetchIn(ctx context.Context, desc ocispec.Descriptor, parent string, pass func()) error {
	if err := desc.Digest.Validate(); err != nil || desc.Size < 0 {
		return fmt.Errorf("fetch %.100q, %d bytes: %v: %w", desc.Digest, desc.Size, err, errdefs.ErrInvalidArgument)
	}
	p := transfer.Progress{Event: "waiting", Name: manifest.RefKey(desc), Total: desc.Size, Desc: &desc}
	if parent != "" {
		p.Parents = []string{parent}
	}
	j.progress(p)
	existed := false
	// One pull fetches, the others find the blob when their turn comes; the
	// next tries again if it failed.
	unlock, err := j.s.blobs.Lock(ctx, string(j.rec.Namespace())+" "+desc.Digest.String())
	if err == nil {
		defer unlock()
		existed, err = j.blob(ctx, desc, p, pass)
	}
	if err != nil {
		return fmt.Errorf("fetch %s: %w", manifest.RefKey(desc), err)
	}
	p.Event, p.Progress = "complete", desc.Size
	if existed {
		p.Event = "already exists"
	}
	j.progress(p)
	return nil
}

// blob opens the ingest and fills it. A blob that is there already is leased
// by opening it.
func (j *job) blob(ctx context.Context, desc ocispec.Descriptor, p transfer.Progress, pass func()) (existed bool, err error) {
	w, err := j.open(ctx, desc)
	if errdefs.IsAlreadyExists(err) {
		return true, j.source(ctx, desc)
	}
	if err != nil {
		return false, err
	}
	defer w.Close()
	if err := j.s.downloads.Acquire(ctx, 1); err != nil {
		return false, context.Cause(ctx)
	}
	defer j.s.downloads.Release(1)
	pass()
	labels := j.sourceLabel(nil)
	resumed := false
	for {
		st, err := w.Status()
		if err != nil {
			return false, err
		}
		if st.Offset > desc.Size {
			if err := w.Truncate(0); err != nil {
				return false, err
			}
			st.Offset = 0
		}
		resumed = st.Offset > 0
		p.Event, p.Progress = "downloading", st.Offset
		j.progress(p)
		if err := j.copy(ctx, w, desc, st.Offset, p); err != nil {
			// If the pull has been given up, that is the error, of any class, and
			// says nothing of this blob: the next who wants it goes on from here.
			if ctx.Err() == nil && errdefs.IsFailedPrecondition(err) {
				j.abort(ctx, w, desc)
			}
			return false, err
		}
		err = w.Commit(ctx, desc.Size, desc.Digest, labels)
		switch {
		case err == nil:
			return false, nil
		case ctx.Err() != nil:
			return false, err
		case errdefs.IsAlreadyExists(err):
			return true, j.source(ctx, desc)
		case errdefs.IsFailedPrecondition(err) && resumed:
			// What an earlier pull left was not the beginning of this blob.
			j.s.opts.Log.Warn("unfinished download does not match, starting anew", "digest", desc.Digest, "offset", st.Offset)
			if terr := w.Truncate(0); terr != nil {
				return false, terr
			}
			continue
		case errdefs.IsFailedPrecondition(err):
			// Nothing of it can be used again.
			j.abort(ctx, w, desc)
			host, repo := j.remote.Source()
			return false, fmt.Errorf("what %s/%s sent is not %s: %w", host, repo, desc.Digest, err)
		}
		return false, err
	}
}

func (j *job) abort(ctx context.Context, w content.Writer, desc ocispec.Descriptor) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	_ = w.Close()
	if err := j.rec.Content().Abort(ctx, manifest.RefKey(desc)); err != nil && !errdefs.IsNotFound(err) {
		j.s.opts.Log.Warn("ingest of a failed download is left to garbage collection", "ref", manifest.RefKey(desc), "err", err)
	}
}

// open waits, within bounds, for an ingest that another client has open.
func (j *job) open(ctx context.Context, desc ocispec.Descriptor) (content.Writer, error) {
	ref := manifest.RefKey(desc)
	var offset int64 = -1
	var since time.Time
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		w, err := j.rec.Content().Writer(ctx, ref, content.WriterOptions{Total: desc.Size, Expected: desc.Digest})
		if err == nil || !errdefs.IsUnavailable(err) {
			return w, err
		}
		if st, serr := j.rec.Content().Status(ctx, ref); serr == nil && st.Offset != offset {
			offset, since = st.Offset, time.Now()
		} else if since.IsZero() {
			since = time.Now()
		}
		if time.Since(since) > j.s.opts.Locked {
			return nil, fmt.Errorf("another client has the ingest %s open and did not go on for %s (at byte %d): %w", ref, j.s.opts.Locked, offset, err)
		}
		t := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, context.Cause(ctx)
		}
	}
}

// copy moves the bytes from offset on.
func (j *job) copy(ctx context.Context, w content.Writer, desc ocispec.Descriptor, offset int64, p transfer.Progress) error {
	if offset == desc.Size {
		return nil
	}
	r, err := j.remote.Fetch(ctx, desc, offset)
	if err != nil {
		return err
	}
	defer r.Close()
	buf := make([]byte, 64<<10)
	told := time.Now()
	for n := offset; n < desc.Size; {
		k, err := r.Read(buf[:min(int64(len(buf)), desc.Size-n)])
		if k > 0 {
			if _, werr := w.Write(buf[:k]); werr != nil {
				return fmt.Errorf("write byte %d of %d: %w", n, desc.Size, werr)
			}
			n += int64(k)
			if time.Since(told) > 100*time.Millisecond {
				told = time.Now()
				p.Progress = n
				j.progress(p)
			}
		}
		if err != nil && n < desc.Size {
			if errors.Is(err, io.EOF) {
				return fmt.Errorf("the registry sent %d bytes of %d: %w", n, desc.Size, errdefs.ErrFailedPrecondition)
			}
			return err
		}
	}
	return nil
}

// sourceLabel is where a blob comes from, added to what its label says already
// (contract 1.5.11).
func (j *job) sourceLabel(old map[string]string) map[string]string {
	host, repo := j.remote.Source()
	key := registry.LabelSource + host
	var repos []string
	for r := range strings.SplitSeq(old[key], ",") {
		if r != "" {
			repos = append(repos, r)
		}
	}
	if !slices.Contains(repos, repo) {
		repos = append(repos, repo)
	}
	// A label has its limit; the latest repositories tell most.
	value := strings.Join(repos, ",")
	for len(key)+len(value) > 4096 && len(repos) > 1 {
		repos = repos[1:]
		value = strings.Join(repos, ",")
	}
	return map[string]string{key: value}
}

func (j *job) source(ctx context.Context, desc ocispec.Descriptor) error {
	info, err := j.rec.Content().Info(ctx, desc.Digest)
	if err != nil {
		return err
	}
	if info.Size != desc.Size {
		return fmt.Errorf("%d bytes, but the descriptor says %d: %w", info.Size, desc.Size, errdefs.ErrFailedPrecondition)
	}
	return j.update(ctx, info, j.sourceLabel(info.Labels))
}

// label puts the references to children on a document, unless they are there.
func (j *job) label(ctx context.Context, desc ocispec.Descriptor, children []ocispec.Descriptor) error {
	info, err := j.rec.Content().Info(ctx, desc.Digest)
	if err != nil {
		return fmt.Errorf("label %s: %w", desc.Digest, err)
	}
	if err := j.update(ctx, info, manifest.Labels(children)); err != nil {
		return fmt.Errorf("label %s: %w", desc.Digest, err)
	}
	return nil
}

func (j *job) update(ctx context.Context, info content.Info, labels map[string]string) error {
	var fields []string
	for k, v := range labels {
		if info.Labels[k] != v {
			fields = append(fields, "labels."+k)
		}
	}
	if len(fields) == 0 {
		return nil
	}
	slices.Sort(fields)
	_, err := j.rec.Content().Update(ctx, content.Info{Digest: info.Digest, Labels: labels}, fields...)
	return err
}
