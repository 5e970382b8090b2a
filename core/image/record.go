package image

import (
	"fmt"
	"maps"
	"strings"

	// Digests are checked with these.
	_ "crypto/sha256"
	_ "crypto/sha512"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/internal/lib/fields"
)

// Check returns ErrInvalidArgument unless the image has what Create asks for.
func (i Image) Check() error {
	if i.Name == "" {
		return fmt.Errorf("image name must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := i.Target.Digest.Validate(); err != nil {
		return fmt.Errorf("image %q: target digest %q: %v: %w", i.Name, i.Target.Digest, err, errdefs.ErrInvalidArgument)
	}
	if i.Target.Size <= 0 {
		return fmt.Errorf("image %q: target size %d must be greater than zero: %w", i.Name, i.Target.Size, errdefs.ErrInvalidArgument)
	}
	if i.Target.MediaType == "" {
		return fmt.Errorf("image %q: target media type must not be empty: %w", i.Name, errdefs.ErrInvalidArgument)
	}
	if err := ident.CheckLabels(i.Labels); err != nil {
		return fmt.Errorf("image %q: %w", i.Name, err)
	}
	for k := range i.Target.Annotations {
		if k == "" {
			return fmt.Errorf("image %q: annotation key must not be empty: %w", i.Name, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Field looks up name, target.digest, target.mediatype, labels.<key> and
// annotations.<key> for filters (contract 1.2.8).
func (i Image) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "name":
		return i.Name, len(path) == 1 && i.Name != ""
	case "target":
		if len(path) == 2 && path[1] == "digest" {
			return i.Target.Digest.String(), i.Target.Digest != ""
		}
		if len(path) == 2 && path[1] == "mediatype" {
			return i.Target.MediaType, i.Target.MediaType != ""
		}
	case "labels":
		v, ok := i.Labels[strings.Join(path[1:], ".")]
		return v, ok
	case "annotations":
		v, ok := i.Target.Annotations[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Merge returns i with the fields of update that paths name, as Store.Update
// promises. The times are i's. Neither i nor update is changed.
func (i Image) Merge(update Image, paths ...string) (Image, error) {
	if len(paths) == 0 {
		paths = []string{"labels", "target"}
	}
	for _, p := range paths {
		if p == "target" {
			i.Target = Stored(update.Target)
			continue
		}
		var ok bool
		if i.Labels, ok = fields.Map(i.Labels, update.Labels, p, "labels"); ok {
			continue
		}
		if i.Target.Annotations, ok = fields.Map(i.Target.Annotations, update.Target.Annotations, p, "annotations"); !ok {
			return Image{}, fields.Unknown(p)
		}
	}
	return i, nil
}

// Stored returns the part of a target that records keep: digest, media type,
// size and annotations.
func Stored(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Annotations: maps.Clone(d.Annotations)}
}
