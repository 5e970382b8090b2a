// Package transfer moves images between the places they can be: a registry,
// the image store, an archive (contract 1.3.41, 6.3).
package transfer

import (
	"context"
	"io"

	"github.com/gantryd/gantry/core/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Endpoint is where a transfer starts or ends: Registry, ImageStore, Import or Export.
type Endpoint interface {
	// TypeURL is the endpoint's name on the wire (contract 6.3.2).
	TypeURL() string
}

// Registry is an image at a registry.
type Registry struct {
	Reference string
	Options   registry.Options
}

// ImageStore is an image, or what shall become one or several.
type ImageStore struct {
	Name   string
	Labels map[string]string
	// Platforms to take of an index; all if empty.
	Platforms []ocispec.Platform
	// AllMetadata fetches the manifests and configs of all platforms.
	AllMetadata bool
	// ManifestLimit is how many manifests of an index to take, 0 for all that match.
	ManifestLimit uint32
	// References are further names to give.
	References []Reference
	// Unpacks says what to unpack and where; nothing if empty.
	Unpacks []Unpack
	// Describe tells snapshotters of each layer the image's name, its manifest
	// and the layers from this one on (contract 1.5.16). It is not on the wire.
	Describe bool
}

// Reference is a further name of an image (contract 6.3.8).
type Reference struct {
	Name            string
	IsPrefix        bool
	AllowOverwrite  bool
	AddDigest       bool
	SkipNamedDigest bool
}

// Unpack is a platform's layers into a snapshotter; the host's platform and
// the default snapshotter if empty.
type Unpack struct {
	Platform    *ocispec.Platform
	Snapshotter string
}

// Import is an archive to read.
type Import struct {
	Reader        io.Reader
	MediaType     string // OCI image layout tar if ""
	ForceCompress bool
}

// Export is an archive to write. The writer is closed when the transfer succeeds.
type Export struct {
	Writer                    io.WriteCloser
	MediaType                 string
	Platforms                 []ocispec.Platform
	AllPlatforms              bool
	SkipCompatibilityManifest bool
	SkipNonDistributable      bool
}

func (Registry) TypeURL() string   { return "containerd.types.transfer.OCIRegistry" }
func (ImageStore) TypeURL() string { return "containerd.types.transfer.ImageStore" }
func (Import) TypeURL() string     { return "containerd.types.transfer.ImageImportStream" }
func (Export) TypeURL() string     { return "containerd.types.transfer.ImageExportStream" }

// Progress is one step of a transfer (contract 6.3.7: the texts of Event are
// what clients look for). Progress and Total count bytes.
type Progress struct {
	Event    string              `json:"event"`
	Name     string              `json:"name,omitempty"`
	Parents  []string            `json:"parents,omitempty"`
	Progress int64               `json:"progress,omitempty"`
	Total    int64               `json:"total,omitempty"`
	Desc     *ocispec.Descriptor `json:"desc,omitempty"`
}

// Options says more about a transfer.
type Options struct {
	// Progress, if not nil, is called from one goroutine at a time and must return quickly.
	Progress func(Progress)
}

// Service transfers within one namespace. It is safe for concurrent use.
type Service interface {
	// Transfer moves from src to dst. ErrNotImplemented, naming both type URLs,
	// for a pair that makes no sense. What it creates is leased until it is
	// referenced, and collected if the transfer fails.
	Transfer(ctx context.Context, src, dst Endpoint, opts Options) error
}
