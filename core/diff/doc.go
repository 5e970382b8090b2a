// Package diff turns layers into files and files into layers.
package diff

import (
	"context"
	"time"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/typed"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LabelUncompressed on a compressed layer's blob is the digest of its tar
// stream, the diff id (contract 1.5.10).
const LabelUncompressed = "containerd.io/uncompressed"

// ApplyOptions says how to apply.
type ApplyOptions struct {
	// Payloads are the stream processors' arguments, by media type (contract 3.3.6).
	Payloads map[string]typed.Any
	// Sync makes the written files durable before Apply returns. Whoever then
	// commits the snapshot decides whether that is needed twice.
	Sync bool
	// Progress, if not nil, is told the number of compressed bytes read so
	// far. It must return quickly.
	Progress func(read int64)
}

// Applier applies a layer blob to a mounted file system.
type Applier interface {
	// Apply reads desc from the content store and unpacks it onto mounts. The
	// answer describes the tar stream: its digest is the diff id. Errors:
	// ErrNotFound (no such blob), ErrNotImplemented (media type or mounts that
	// this differ does not handle), ErrInvalidArgument (hostile or malformed
	// tar, naming the entry), ErrFailedPrecondition or ErrDataLoss (truncated or corrupt stream).
	Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ApplyOptions) (ocispec.Descriptor, error)
}

// CompareOptions says what to make.
type CompareOptions struct {
	// MediaType of the layer, OCI tar+gzip if "".
	MediaType string
	// Ref names the ingest, generated if "".
	Ref string
	// Labels of the blob.
	Labels map[string]string
	// SourceDateEpoch, if not nil, is the latest time that any entry may carry.
	SourceDateEpoch *time.Time
}

// Comparer makes a layer of the difference of two file systems.
type Comparer interface {
	// Compare writes what turns lower into upper as a blob and describes it.
	// ErrNotImplemented for a media type or mounts it does not handle.
	Compare(ctx context.Context, lower, upper []mount.Mount, opts CompareOptions) (ocispec.Descriptor, error)
}

// Service is both.
type Service interface {
	Applier
	Comparer
}
