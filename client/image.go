package client

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/view"
)

// ImageInfo is what an image says of itself for one platform.
type ImageInfo struct {
	Name       string               `json:"name"`
	Target     ocispec.Descriptor   `json:"target"`
	Manifest   ocispec.Descriptor   `json:"manifest"`
	ConfigDesc ocispec.Descriptor   `json:"config_descriptor"`
	Config     ocispec.Image        `json:"config"`
	Layers     []ocispec.Descriptor `json:"layers"`
	// ChainID names the snapshot of the unpacked layers.
	ChainID digest.Digest `json:"chain_id"`
}

// Size is that of all blobs of the platform, compressed, in bytes.
func (i ImageInfo) Size() int64 {
	n := i.Manifest.Size + i.ConfigDesc.Size
	for _, l := range i.Layers {
		n += l.Size
	}
	return n
}

// InspectImage reads what an image is for a platform; the host's if it is the
// zero value. ErrNotFound names what is missing: the image, the platform, or
// a blob.
func InspectImage(ctx context.Context, v view.View, name string, platform ocispec.Platform) (ImageInfo, error) {
	img, err := v.Images().Get(ctx, name)
	if err != nil {
		return ImageInfo{}, err
	}
	info := ImageInfo{Name: name, Target: img.Target}
	matcher := platforms.Default()
	if platform.OS != "" || platform.Architecture != "" {
		matcher = platforms.Only(platform)
	}
	if info.Manifest, err = selectManifest(ctx, v.Content(), img.Target, matcher, 0); err != nil {
		return ImageInfo{}, fmt.Errorf("image %s: %w", name, err)
	}
	m, err := manifest.ReadManifest(ctx, v.Content(), info.Manifest)
	if err != nil {
		return ImageInfo{}, fmt.Errorf("image %s: %w", name, err)
	}
	info.ConfigDesc, info.Layers = m.Config, m.Layers
	if info.Config, err = manifest.ReadConfig(ctx, v.Content(), m.Config); err != nil {
		return ImageInfo{}, fmt.Errorf("image %s: %w", name, err)
	}
	info.ChainID = identity.ChainID(info.Config.RootFS.DiffIDs)
	return info, nil
}

// selectManifest goes down an index to the best manifest that is there.
func selectManifest(ctx context.Context, store content.Store, desc ocispec.Descriptor, match platforms.MatchComparer, depth int) (ocispec.Descriptor, error) {
	switch {
	case manifest.IsManifest(desc.MediaType):
		return desc, nil
	case !manifest.IsIndex(desc.MediaType):
		return desc, fmt.Errorf("cannot run media type %q: %w", desc.MediaType, errdefs.ErrNotImplemented)
	}
	if depth > manifest.MaxDepth {
		return desc, fmt.Errorf("index %s: nested too deeply: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	children, err := manifest.Children(ctx, store, desc)
	if err != nil {
		return desc, err
	}
	var best *ocispec.Descriptor
	var have []string
	for i, m := range children {
		if m.Platform == nil {
			if best == nil && (manifest.IsIndex(m.MediaType) || len(children) == 1) {
				best = &children[i]
			}
			continue
		}
		have = append(have, platforms.Format(*m.Platform))
		if match.Match(*m.Platform) && (best == nil || best.Platform == nil || match.Less(*m.Platform, *best.Platform)) {
			best = &children[i]
		}
	}
	if best == nil {
		return desc, fmt.Errorf("no manifest for this platform; the image has %v: %w", have, errdefs.ErrNotFound)
	}
	return selectManifest(ctx, store, *best, match, depth+1)
}
