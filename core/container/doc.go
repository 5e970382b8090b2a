// Package container is the record from which a container is made: its OCI
// spec, runtime, snapshot and labels. The running thing is a task.
package container

import (
	"context"
	"time"

	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/typed"
)

// ID names a container within its namespace.
type ID string

// Check returns ErrInvalidArgument unless id follows contract 1.2.2.
func Check(id ID) error { return ident.Check("container id", string(id)) }

// Runtime says which shim runs the container, and the options for it, which
// are passed through untouched (contract 5.3.10).
type Runtime struct {
	Name    string    `json:"name"`
	Options typed.Any `json:"options"`
}

// Container is the record. Spec is the OCI runtime spec as JSON under its type
// URL; a record without one is legal, a task cannot be made from it.
type Container struct {
	ID          ID                   `json:"id"`
	Labels      map[string]string    `json:"labels,omitempty"`
	Image       string               `json:"image,omitempty"`
	Runtime     Runtime              `json:"runtime"`
	Spec        typed.Any            `json:"spec"`
	Snapshotter string               `json:"snapshotter,omitempty"`
	SnapshotKey string               `json:"snapshot_key,omitempty"`
	SandboxID   string               `json:"sandbox,omitempty"`
	Extensions  map[string]typed.Any `json:"extensions,omitempty"`
	CreatedAt   time.Time            `json:"created_at"`
	UpdatedAt   time.Time            `json:"updated_at"`
}

// Store keeps the container records of one namespace. It is safe for
// concurrent use.
type Store interface {
	// Get returns a record or ErrNotFound.
	Get(ctx context.Context, id ID) (Container, error)
	// Walk calls fn for each record that matches one of the filters (fields
	// id, runtime.name, image, labels), in the order of their ids, all if there
	// are none. fn's error ends the walk and is returned; a bad filter is ErrInvalidArgument.
	// fn may call the store.
	Walk(ctx context.Context, fn func(Container) error, filters ...string) error
	// Create makes a record: ErrAlreadyExists; ErrInvalidArgument for a bad
	// id, no runtime name, a snapshot key without snapshotter, oversized labels.
	Create(ctx context.Context, c Container) (Container, error)
	// Update changes the fields named (labels, labels.<key>, extensions,
	// extensions.<key>, spec, image, snapshotkey), or all of these if none is
	// (contract 1.3.4). ErrNotFound; another field, or a changed snapshotter or
	// runtime name, is ErrInvalidArgument.
	Update(ctx context.Context, c Container, fields ...string) (Container, error)
	// Delete removes a record or returns ErrNotFound. A task that still runs is
	// not looked at; the snapshot becomes collectable.
	Delete(ctx context.Context, id ID) error
}
