// Package push sends an image from a namespace to a registry: children before
// their parents, the tag last, so that a registry never shows half an image.
package push

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/lib/keymutex"
)

// Options is how to push.
type Options struct {
	// Uploads is how many blobs are sent at a time, by all pushes together (3).
	Uploads int
	Log     *slog.Logger
}

// Service pushes. It is safe for concurrent use.
type Service struct {
	opts    Options
	uploads *semaphore.Weighted
}

// New makes a service.
func New(opts Options) *Service {
	if opts.Uploads <= 0 {
		opts.Uploads = 3
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Service{opts: opts, uploads: semaphore.NewWeighted(int64(opts.Uploads))}
}

// Push sends img, or of an index what matches only, if that is not empty, and
// tags it with tag unless that is "". If one manifest of an index matches, it
// is pushed instead of the index, which would refer to what is not there.
// ErrNotFound names what is missing in the store. progress may be called from
// one goroutine at a time.
func (s *Service) Push(ctx context.Context, rec view.Records, remote registry.Remote, tag string, img image.Image, only []ocispec.Platform, progress func(transfer.Progress)) error {
	var mu sync.Mutex
	j := &job{s: s, rec: rec, remote: remote, tag: tag, match: platforms.All, sent: map[string]bool{}}
	j.progress = func(p transfer.Progress) {
		mu.Lock()
		defer mu.Unlock()
		progress(p)
	}
	root := img.Target
	if len(only) > 0 {
		j.match = platforms.Any(only...)
		var err error
		if root, err = j.narrow(ctx, root); err != nil {
			return err
		}
	}
	j.root = root.Digest.String()
	j.progress(transfer.Progress{Event: "pushing content", Name: img.Name, Desc: &root})
	if err := j.tree(ctx, root, "", 0); err != nil {
		return err
	}
	j.progress(transfer.Progress{Event: "pushed content", Name: img.Name, Desc: &root})
	return nil
}

type job struct {
	s        *Service
	rec      view.Records
	remote   registry.Remote
	tag      string
	root     string
	match    platforms.Matcher
	progress func(transfer.Progress)
	blobs    keymutex.Map

	mu   sync.Mutex
	sent map[string]bool
}

func (j *job) narrow(ctx context.Context, root ocispec.Descriptor) (ocispec.Descriptor, error) {
	if !manifest.IsIndex(root.MediaType) {
		return root, nil
	}
	children, err := manifest.Children(ctx, j.rec.Content(), root)
	if err != nil {
		return root, err
	}
	chosen := j.choose(children)
	switch len(chosen) {
	case 0:
		return root, fmt.Errorf("index %s: no image for the platforms asked for: %w", root.Digest, errdefs.ErrNotFound)
	case 1:
		return chosen[0], nil
	}
	return root, nil
}

func (j *job) choose(children []ocispec.Descriptor) []ocispec.Descriptor {
	var s []ocispec.Descriptor
	for _, c := range children {
		if c.Platform == nil || j.match.Match(*c.Platform) {
			s = append(s, c)
		}
	}
	return s
}

func (j *job) tree(ctx context.Context, desc ocispec.Descriptor, parent string, depth int) error {
	if depth > manifest.MaxDepth {
		return fmt.Errorf("index %s: nested more than %d deep: %w", desc.Digest, manifest.MaxDepth, errdefs.ErrInvalidArgument)
	}
	children, err := manifest.Children(ctx, j.rec.Content(), desc)
	if err != nil {
		if errdefs.IsNotFound(err) && desc.Platform != nil {
			return fmt.Errorf("the image's part for %s is not in the store, pull all platforms or push only those that are there: %w", platforms.FormatAll(*desc.Platform), err)
		}
		return err
	}
	if manifest.IsIndex(desc.MediaType) {
		children = j.choose(children)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * j.s.opts.Uploads)
	for _, c := range children {
		g.Go(func() error { return j.tree(gctx, c, manifest.RefKey(desc), depth+1) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return j.blob(ctx, desc, parent)
}

func (j *job) blob(ctx context.Context, desc ocispec.Descriptor, parent string) error {
	p := transfer.Progress{Event: "waiting", Name: manifest.RefKey(desc), Total: desc.Size, Desc: &desc}
	if parent != "" {
		p.Parents = []string{parent}
	}
	j.progress(p)
	// A layer that occurs twice is sent once.
	unlock, err := j.blobs.Lock(ctx, desc.Digest.String())
	if err != nil {
		return fmt.Errorf("push %s: %w", manifest.RefKey(desc), err)
	}
	defer unlock()
	j.mu.Lock()
	sent := j.sent[desc.Digest.String()]
	j.mu.Unlock()
	if sent {
		return nil
	}
	if err := j.s.uploads.Acquire(ctx, 1); err != nil {
		return fmt.Errorf("push %s: %w", manifest.RefKey(desc), context.Cause(ctx))
	}
	defer j.s.uploads.Release(1)
	r, err := j.rec.Content().Open(ctx, desc.Digest)
	if err != nil {
		if errdefs.IsNotFound(err) && manifest.IsNonDistributable(desc.MediaType) {
			return nil // whoever pulls gets it from the descriptor's URLs
		}
		return fmt.Errorf("push %s: %w", manifest.RefKey(desc), err)
	}
	defer r.Close()
	if r.Size() != desc.Size {
		return fmt.Errorf("push %s: %d bytes are stored, the descriptor says %d: %w", manifest.RefKey(desc), r.Size(), desc.Size, errdefs.ErrDataLoss)
	}
	told := time.Time{}
	opts := registry.PushOptions{From: j.from(ctx, desc), Progress: func(n int64) {
		if time.Since(told) < 100*time.Millisecond {
			return
		}
		told = time.Now()
		up := p
		up.Event, up.Progress = "uploading", n
		j.progress(up)
	}}
	if desc.Digest.String() == j.root {
		opts.Tag = j.tag
	}
	existed, err := j.remote.Push(ctx, desc, r, opts)
	if err != nil {
		return err
	}
	j.mu.Lock()
	j.sent[desc.Digest.String()] = true
	j.mu.Unlock()
	p.Event, p.Progress = "complete", desc.Size
	if existed {
		p.Event = "already exists"
	}
	j.progress(p)
	return nil
}

// from lists the repositories of the same registry that the blob came from.
func (j *job) from(ctx context.Context, desc ocispec.Descriptor) []string {
	info, err := j.rec.Content().Info(ctx, desc.Digest)
	if err != nil {
		return nil
	}
	host, _ := j.remote.Source()
	var s []string
	for r := range strings.SplitSeq(info.Labels[registry.LabelSource+host], ",") {
		if r != "" {
			s = append(s, r)
		}
	}
	return s
}
