// Package sandbox is the record of a pod, what several containers share, and
// the controllers that run what the record describes.
package sandbox

import (
	"context"
	"time"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/typed"
)

// Sandbox is the record.
type Sandbox struct {
	ID         string               `json:"id"`
	Sandboxer  string               `json:"sandboxer,omitempty"`
	Labels     map[string]string    `json:"labels,omitempty"`
	Runtime    container.Runtime    `json:"runtime"`
	Spec       typed.Any            `json:"spec"`
	Extensions map[string]typed.Any `json:"extensions,omitempty"`
	CreatedAt  time.Time            `json:"created_at"`
	UpdatedAt  time.Time            `json:"updated_at"`
}

// Store keeps the sandbox records of one namespace (contract 1.3.29). It is
// safe for concurrent use.
type Store interface {
	// Get returns a record or ErrNotFound.
	Get(ctx context.Context, id string) (Sandbox, error)
	// List returns the records that match one of the filters (fields id,
	// runtime.name, labels), all if there are none.
	List(ctx context.Context, filters ...string) ([]Sandbox, error)
	// Create makes a record: ErrAlreadyExists; ErrInvalidArgument for a bad id or labels.
	Create(ctx context.Context, s Sandbox) (Sandbox, error)
	// Update changes the fields named (labels, labels.<key>, extensions,
	// extensions.<key>, runtime, spec), or all of these if none is.
	Update(ctx context.Context, s Sandbox, fields ...string) (Sandbox, error)
	// Delete removes a record or returns ErrNotFound.
	Delete(ctx context.Context, id string) error
}
