// Package namespace is the partition of all records: two clients in different
// namespaces do not see each other's images, containers or content.
package namespace

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/ident"
)

// ID names a namespace.
type ID string

// Default is the namespace of clients that do not choose one.
const Default ID = "default"

// Check returns ErrInvalidArgument unless id follows contract 1.2.2. "version"
// is refused as well: it would collide with the schema's version key.
func Check(id ID) error {
	if id == "version" {
		return fmt.Errorf("namespace %q: the name is reserved: %w", id, errdefs.ErrInvalidArgument)
	}
	return ident.Check("namespace", string(id))
}

// Namespace is a name with labels.
type Namespace struct {
	ID     ID                `json:"name"`
	Labels map[string]string `json:"labels,omitempty"`
}

// Store keeps the namespaces' labels. It is safe for concurrent use.
type Store interface {
	// Get returns a namespace. One that nobody created has no labels; that is
	// not an error (contract 1.2.3). A malformed id is ErrInvalidArgument.
	Get(ctx context.Context, id ID) (Namespace, error)
	// List returns all namespaces that were created, by a call or implicitly
	// by a write, in the order of their names.
	List(ctx context.Context) ([]Namespace, error)
	// Create makes one, or returns ErrAlreadyExists.
	Create(ctx context.Context, ns Namespace) (Namespace, error)
	// Update replaces all labels if no field path is given or "labels" is one,
	// else sets or (with an empty value) deletes the "labels.<key>" named
	// (1.3.28). ErrNotFound if it does not exist; other paths are ErrInvalidArgument.
	Update(ctx context.Context, ns Namespace, fields ...string) (Namespace, error)
	// Delete removes an empty namespace. ErrFailedPrecondition names what is
	// still in it (images, blobs, containers, snapshots); ErrNotFound if absent.
	Delete(ctx context.Context, id ID) error
}
