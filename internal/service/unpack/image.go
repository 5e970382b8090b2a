package unpack

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
)

// Image unpacks what of a stored image or index fits a platform best, the
// host's if nil. All content must be there. ErrNotFound lists what platforms
// there are.
func (s *Service) Image(ctx context.Context, rec view.Records, target ocispec.Descriptor, u transfer.Unpack, progress func(transfer.Progress)) error {
	p := platforms.DefaultSpec()
	if u.Platform != nil {
		p = platforms.Normalize(*u.Platform)
	}
	order := platforms.Only(p)
	var best *ocispec.Manifest
	var bestPlatform ocispec.Platform
	var has []string
	seen := map[string]bool{} // an index may name another as often as it likes
	var visit func(desc ocispec.Descriptor, depth int) error
	visit = func(desc ocispec.Descriptor, depth int) error {
		switch {
		case depth > manifest.MaxDepth:
			return fmt.Errorf("index %s: nested more than %d deep: %w", desc.Digest, manifest.MaxDepth, errdefs.ErrInvalidArgument)
		case manifest.IsIndex(desc.MediaType):
			children, err := manifest.Children(ctx, rec.Content(), desc)
			if err != nil {
				return err
			}
			for _, c := range children {
				if seen[manifest.RefKey(c)] {
					continue
				}
				seen[manifest.RefKey(c)] = true
				if err := visit(c, depth+1); err != nil && !(errdefs.IsNotFound(err) && c.Digest != target.Digest) {
					return err
				}
			}
		case manifest.IsManifest(desc.MediaType):
			m, err := manifest.ReadManifest(ctx, rec.Content(), desc)
			if err != nil || !manifest.IsConfig(m.Config.MediaType) {
				return err
			}
			config, err := manifest.ReadConfig(ctx, rec.Content(), m.Config)
			if err != nil {
				return err
			}
			got := platforms.Normalize(config.Platform)
			if !order.Match(got) {
				has = append(has, platforms.FormatAll(got))
			} else if best == nil || order.Less(got, bestPlatform) {
				best, bestPlatform = &m, got
			}
		}
		return nil
	}
	if err := visit(target, 0); err != nil {
		return fmt.Errorf("unpack %s: %w", target.Digest, err)
	}
	if best == nil {
		slices.Sort(has)
		return fmt.Errorf("unpack %s for platform %s: the image has only %v: %w", target.Digest, platforms.FormatAll(p), has, errdefs.ErrNotFound)
	}
	there := func(context.Context, int) error { return nil }
	return s.Unpack(ctx, rec, *best, u.Snapshotter, there, progress)
}
