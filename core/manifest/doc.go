// Package manifest reads the documents that an image is made of: indexes,
// manifests and configs. It promises that a document is read with a limit,
// that its bytes are those of its digest, and that it is what its media type
// says it is: a document that could be taken for both an index and a manifest
// is refused.
package manifest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/content"
)

// Media types of Docker's image format, version 2 schema 2, and of schema 1,
// which is only known to be refused.
const (
	DockerIndex         = "application/vnd.docker.distribution.manifest.list.v2+json"
	DockerManifest      = "application/vnd.docker.distribution.manifest.v2+json"
	DockerConfig        = "application/vnd.docker.container.image.v1+json"
	DockerLayer         = "application/vnd.docker.image.rootfs.diff.tar"
	DockerLayerGzip     = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	DockerLayerZstd     = "application/vnd.docker.image.rootfs.diff.tar.zstd"
	DockerForeign       = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	DockerForeignGzip   = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	DockerSchema1       = "application/vnd.docker.distribution.manifest.v1+json"
	DockerSchema1Signed = "application/vnd.docker.distribution.manifest.v1+prettyjws"
)

// Limits, in bytes and in number of children of one document.
const (
	MaxManifest = 4 << 20
	MaxConfig   = 16 << 20
	MaxChildren = 4096
	// MaxDepth is how deep indexes may nest.
	MaxDepth = 5
)

// LabelRef is the prefix of labels that keep children alive (contract 1.5.2).
const LabelRef = "containerd.io/gc.ref.content"

// LabelSnapshot and a snapshotter's name, on a config, keeps the snapshot
// alive that the image was unpacked to (contract 1.5.3).
const LabelSnapshot = "containerd.io/gc.ref.snapshot."

// IsIndex reports whether the media type is an index's.
func IsIndex(mt string) bool { return mt == ocispec.MediaTypeImageIndex || mt == DockerIndex }

// IsManifest reports whether the media type is an image manifest's.
func IsManifest(mt string) bool { return mt == ocispec.MediaTypeImageManifest || mt == DockerManifest }

// IsSchema1 reports whether the media type is the one that is not supported any more.
func IsSchema1(mt string) bool { return mt == DockerSchema1 || mt == DockerSchema1Signed }

// IsConfig reports whether the media type is an image config's.
func IsConfig(mt string) bool { return mt == ocispec.MediaTypeImageConfig || mt == DockerConfig }

// IsLayer reports whether the media type is a layer's, in any compression.
func IsLayer(mt string) bool {
	return strings.HasPrefix(mt, "application/vnd.oci.image.layer.") || strings.HasPrefix(mt, "application/vnd.docker.image.rootfs.")
}

// IsNonDistributable reports whether registries may not have the layer.
func IsNonDistributable(mt string) bool {
	return strings.Contains(mt, ".nondistributable.") || strings.Contains(mt, ".rootfs.foreign.")
}

// Opener is where documents are read from.
type Opener interface {
	Open(ctx context.Context, dgst digest.Digest) (content.ReaderAt, error)
}

// Read returns a document of at most limit bytes. ErrNotFound;
// ErrInvalidArgument if it is larger or its digest is malformed; ErrDataLoss
// if the bytes are not those of the digest.
func Read(ctx context.Context, store Opener, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("read %s: digest: %v: %w", kind(desc.MediaType), err, errdefs.ErrInvalidArgument)
	}
	r, err := store.Open(ctx, desc.Digest)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", kind(desc.MediaType), err)
	}
	defer r.Close()
	if r.Size() > limit {
		return nil, fmt.Errorf("read %s %s: %d bytes, at most %d are allowed: %w", kind(desc.MediaType), desc.Digest, r.Size(), limit, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, r.Size())
	if _, err := r.ReadAt(b, 0); err != nil && err != io.EOF {
		return nil, fmt.Errorf("read %s %s: %w", kind(desc.MediaType), desc.Digest, err)
	}
	if d := desc.Digest.Algorithm().FromBytes(b); d != desc.Digest {
		return nil, fmt.Errorf("read %s %s: the stored bytes have digest %s: %w", kind(desc.MediaType), desc.Digest, d, errdefs.ErrDataLoss)
	}
	return b, nil
}

func kind(mt string) string {
	switch {
	case IsIndex(mt):
		return "index"
	case IsManifest(mt):
		return "manifest"
	case IsConfig(mt):
		return "config"
	}
	return "blob"
}

// probe is what tells documents apart.
type probe struct {
	MediaType string          `json:"mediaType"`
	Manifests json.RawMessage `json:"manifests"`
	Layers    json.RawMessage `json:"layers"`
	Config    json.RawMessage `json:"config"`
	FSLayers  json.RawMessage `json:"fsLayers"`
}

func check(desc ocispec.Descriptor, b []byte) error {
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("%s %s: %s: %w", kind(desc.MediaType), desc.Digest, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	var p probe
	if err := json.Unmarshal(b, &p); err != nil {
		return refuse("%v", err)
	}
	if p.FSLayers != nil {
		return refuse("the image is in Docker's schema 1 format, which is not supported any more: push it anew with a current client")
	}
	if p.MediaType != "" && p.MediaType != desc.MediaType {
		return refuse("it was announced as %q but says that it is %.100q", desc.MediaType, p.MediaType)
	}
	if IsIndex(desc.MediaType) && (p.Layers != nil || p.Config != nil) {
		return refuse("it has layers or a config like a manifest, and could be taken for one")
	}
	if IsManifest(desc.MediaType) && p.Manifests != nil {
		return refuse("it has manifests like an index, and could be taken for one")
	}
	return nil
}

// ParseIndex reads the bytes of an index, which desc describes.
// ErrInvalidArgument says what is wrong with it.
func ParseIndex(desc ocispec.Descriptor, b []byte) (ocispec.Index, error) {
	var idx ocispec.Index
	if err := check(desc, b); err != nil {
		return idx, err
	}
	if err := json.Unmarshal(b, &idx); err != nil {
		return idx, fmt.Errorf("index %s: %v: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	return idx, checkChildren(desc, idx.Manifests)
}

// ParseManifest reads the bytes of an image manifest, which desc describes.
// ErrInvalidArgument says what is wrong with it.
func ParseManifest(desc ocispec.Descriptor, b []byte) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if err := check(desc, b); err != nil {
		return m, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("manifest %s: %v: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if err := checkChildren(desc, []ocispec.Descriptor{m.Config}); err != nil {
		return m, err
	}
	return m, checkChildren(desc, m.Layers)
}

func checkChildren(parent ocispec.Descriptor, children []ocispec.Descriptor) error {
	if len(children) > MaxChildren {
		return fmt.Errorf("%s %s: %d children, at most %d are allowed: %w", kind(parent.MediaType), parent.Digest, len(children), MaxChildren, errdefs.ErrInvalidArgument)
	}
	for i, c := range children {
		if err := c.Digest.Validate(); err != nil {
			return fmt.Errorf("%s %s: child %d: digest %.100q: %v: %w", kind(parent.MediaType), parent.Digest, i, c.Digest, err, errdefs.ErrInvalidArgument)
		}
		if c.Size < 0 {
			return fmt.Errorf("%s %s: child %s: size %d: %w", kind(parent.MediaType), parent.Digest, c.Digest, c.Size, errdefs.ErrInvalidArgument)
		}
		if c.MediaType == "" || len(c.MediaType) > 256 {
			return fmt.Errorf("%s %s: child %s: media type %.100q: %w", kind(parent.MediaType), parent.Digest, c.Digest, c.MediaType, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Children returns what a stored index or manifest refers to, in order: an
// index's manifests, a manifest's config and layers. Of anything else, none.
func Children(ctx context.Context, store Opener, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	switch {
	case IsIndex(desc.MediaType):
		b, err := Read(ctx, store, desc, MaxManifest)
		if err != nil {
			return nil, err
		}
		idx, err := ParseIndex(desc, b)
		return idx.Manifests, err
	case IsManifest(desc.MediaType):
		m, err := ReadManifest(ctx, store, desc)
		if err != nil {
			return nil, err
		}
		return append([]ocispec.Descriptor{m.Config}, m.Layers...), nil
	case IsSchema1(desc.MediaType):
		return nil, fmt.Errorf("manifest %s: Docker's schema 1 format is not supported any more: push the image anew with a current client: %w", desc.Digest, errdefs.ErrNotImplemented)
	}
	return nil, nil
}

// ReadManifest reads a stored image manifest.
func ReadManifest(ctx context.Context, store Opener, desc ocispec.Descriptor) (ocispec.Manifest, error) {
	b, err := Read(ctx, store, desc, MaxManifest)
	if err != nil {
		return ocispec.Manifest{}, err
	}
	return ParseManifest(desc, b)
}

// ReadConfig reads a stored image config.
func ReadConfig(ctx context.Context, store Opener, desc ocispec.Descriptor) (ocispec.Image, error) {
	var img ocispec.Image
	b, err := Read(ctx, store, desc, MaxConfig)
	if err != nil {
		return img, err
	}
	if err := json.Unmarshal(b, &img); err != nil {
		return img, fmt.Errorf("config %s: %v: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	return img, nil
}

// Labels are what keeps children alive, to be put on their parent's blob.
func Labels(children []ocispec.Descriptor) map[string]string {
	next := map[string]int{}
	labels := make(map[string]string, len(children))
	for _, c := range children {
		key := LabelRef + "."
		switch {
		case IsConfig(c.MediaType):
			key += "config"
		case IsIndex(c.MediaType), IsManifest(c.MediaType):
			key += "m."
		case IsLayer(c.MediaType):
			key += "l."
		}
		n := next[key]
		next[key]++
		if n > 0 || strings.HasSuffix(key, ".") {
			key = fmt.Sprintf("%s%d", key, n)
		}
		labels[key] = c.Digest.String()
	}
	return labels
}

// RefKey names an ingest of a blob, and its line in a progress display
// (contract 6.1.12).
func RefKey(desc ocispec.Descriptor) string {
	prefix := "unknown"
	switch {
	case IsIndex(desc.MediaType):
		prefix = "index"
	case IsManifest(desc.MediaType):
		prefix = "manifest"
		if p := desc.Platform; p != nil && p.OS == "unknown" && p.Architecture == "unknown" {
			prefix = "attestation"
		}
	case IsLayer(desc.MediaType):
		prefix = "layer"
	case IsConfig(desc.MediaType):
		prefix = "config"
	case desc.MediaType == "application/vnd.in-toto+json":
		prefix = "attestation"
	}
	return prefix + "-" + desc.Digest.String()
}
