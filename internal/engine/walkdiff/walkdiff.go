// Package walkdiff applies layers to mounts and makes layers of the difference
// of two mounts. What Apply answers was computed over every byte of the tar
// stream while it was unpacked, including what follows the archive's end.
// Overlay and bind mounts are worked on where their files are, others through
// a mount that is gone when the call returns.
package walkdiff

import (
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/internal/lib/tarstream"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options of an Engine. The zero value is usable.
type Options struct {
	// TempDir is where file systems are mounted, the system's temporary
	// directory if empty.
	TempDir string
	// Processors turn media types that are not known here into ones that are,
	// the first that accepts one is taken (contract 3.3.6). They come before
	// what is built in.
	Processors []Processor
	// GzipHelper is the command line of a program that inflates, see
	// tarstream.GzipHelper; nil for Go's own.
	GzipHelper []string
	// VerifyBlobs hashes compressed blobs while they are read and compares
	// with the descriptor, for content stores that may be wrong. The hash of
	// what is not compressed is compared always.
	VerifyBlobs bool
	// Limits of what a layer may contain.
	Limits tarstream.Limits
	// UserNS leaves out device nodes, as is needed in a user namespace.
	UserNS bool
	// SourceDateEpoch is used where a comparison does not bring its own
	// (contract 6.5.5); see EpochFromEnv.
	SourceDateEpoch *time.Time
	// Report, if not nil, is told what of a layer was left out. It may be
	// called from several goroutines at once.
	Report func(layer ocispec.Descriptor, entry, what string)
}

// Engine implements diff.Service on a content store. It is safe for concurrent
// use.
type Engine struct {
	store content.Store
	opts  Options
}

var _ diff.Service = (*Engine)(nil)

// New makes an Engine that reads and writes blobs in store.
func New(store content.Store, opts Options) *Engine { return &Engine{store, opts} }

// Media types of layers besides the OCI ones.
const (
	dockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	dockerForeignLayer = "application/vnd.docker.image.rootfs.foreign.diff.tar"
)

// packing is what a media type says of the stream.
type packing uint8

const (
	unknown packing = iota // not a layer, or needs a processor
	plain                  // a tar stream
	sniffed                // a tar stream, or one that is compressed
)

func packingOf(mediaType string) packing {
	switch mediaType {
	case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerNonDistributable: //nolint:staticcheck // foreign layers exist
		return plain
	case dockerLayer, dockerForeignLayer:
		return sniffed // docker's name says nothing
	}
	base, _, _ := strings.Cut(mediaType, "+")
	switch strings.TrimPrefix(mediaType, base) {
	case "+gzip", "+zstd":
		if base == ocispec.MediaTypeImageLayer || base == ocispec.MediaTypeImageLayerNonDistributable { //nolint:staticcheck // as above
			return sniffed
		}
	}
	for _, suffix := range []string{".gzip", ".zstd", "+zstd", "+gzip"} {
		if b, ok := strings.CutSuffix(mediaType, suffix); ok && (b == dockerLayer || b == dockerForeignLayer) {
			return sniffed
		}
	}
	return unknown
}

// EpochFromEnv reads SOURCE_DATE_EPOCH, a number of seconds since 1970; nil if
// it is not set.
func EpochFromEnv(getenv func(string) string) (*time.Time, error) {
	v := getenv("SOURCE_DATE_EPOCH")
	if v == "" {
		return nil, nil
	}
	var sec int64
	if n, err := fmt.Sscanf(v+"\n", "%d\n", &sec); n != 1 || err != nil {
		return nil, fmt.Errorf("SOURCE_DATE_EPOCH=%q is not a number of seconds: %w", v, errdefs.ErrInvalidArgument)
	}
	t := time.Unix(sec, 0).UTC()
	return &t, nil
}

// Chain tries services in their order until one does not answer
// ErrNotImplemented (contract 3.3.1).
type Chain []diff.Service

var _ diff.Service = Chain(nil)
