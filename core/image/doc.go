// Package image is a name for content: a mutable record that points at an
// immutable manifest or index.
package image

import (
	"context"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is a name, its target, and labels.
type Image struct {
	Name      string             `json:"name"`
	Labels    map[string]string  `json:"labels,omitempty"`
	Target    ocispec.Descriptor `json:"target"`
	CreatedAt time.Time          `json:"created_at"`
	UpdatedAt time.Time          `json:"updated_at"`
}

// DeleteOptions says how to delete.
type DeleteOptions struct {
	// Sync waits until what the image alone kept alive is gone. It takes a
	// store wrapped by the collector (contract 1.3.19).
	Sync bool
	// Target, if not nil, deletes only an image that points at its digest;
	// another target is ErrNotFound.
	Target *ocispec.Descriptor
}

// Store keeps the images of one namespace. It is safe for concurrent use.
type Store interface {
	// Get returns an image or ErrNotFound.
	Get(ctx context.Context, name string) (Image, error)
	// List returns the images that match one of the filters (fields name,
	// target.digest, target.mediatype, labels, annotations), in the order of
	// their names, all if there are no filters. A bad filter is ErrInvalidArgument.
	List(ctx context.Context, filters ...string) ([]Image, error)
	// Create makes a record: ErrAlreadyExists; ErrInvalidArgument if the name,
	// the target's digest, media type or size is missing or wrong. A CreatedAt
	// that is not zero is kept (source date epoch), else it is assigned.
	Create(ctx context.Context, img Image) (Image, error)
	// Update changes the fields named (labels, labels.<key>, target,
	// annotations, annotations.<key>), or target and labels if none is
	// (contract 1.3.18). ErrNotFound; unknown fields are ErrInvalidArgument. An
	// UpdatedAt that is not zero is kept (source date epoch).
	Update(ctx context.Context, img Image, fields ...string) (Image, error)
	// Delete removes a record or returns ErrNotFound.
	Delete(ctx context.Context, name string, opts DeleteOptions) error
}
