// Package lease keeps objects alive that nothing else refers to yet: whatever
// is created under a lease survives garbage collection until the lease ends.
package lease

import (
	"context"
	"time"
)

// ID names a lease. Its grammar is free but for being non-empty.
type ID string

// LabelExpire (RFC 3339) is when a lease ends by itself; LabelFlat makes
// collection ignore the references of leased objects (contract 1.5.8, 1.5.9).
const (
	LabelExpire = "containerd.io/gc.expire"
	LabelFlat   = "containerd.io/gc.flat"
)

// Types of resource a lease can hold. A snapshot's is SnapshotPrefix and the
// name of the snapshotter (contract 1.3.25).
const (
	TypeContent    = "content"
	TypeIngest     = "ingests"
	TypeImage      = "images"
	TypeStream     = "streams"
	TypeMount      = "mounts"
	SnapshotPrefix = "snapshots/"
)

// Lease is a name, when it began, and labels.
type Lease struct {
	ID        ID                `json:"id"`
	CreatedAt time.Time         `json:"created_at"`
	Labels    map[string]string `json:"labels,omitempty"`
}

// Resource is one object that a lease holds.
type Resource struct {
	ID   string `json:"id"`
	Type string `json:"type"`
}

// Store keeps the leases of one namespace. It is safe for concurrent use.
type Store interface {
	// Create makes a lease; an empty ID gets a generated one, CreatedAt is
	// assigned. ErrAlreadyExists; ErrInvalidArgument for oversized labels.
	Create(ctx context.Context, l Lease) (Lease, error)
	// Delete ends a lease: ErrNotFound if absent. What it alone kept alive is
	// collected later, or before returning if sync is set and the store was
	// wrapped by the collector (contract 1.3.24).
	Delete(ctx context.Context, id ID, sync bool) error
	// List returns the leases that match one of the filters (fields id,
	// labels), all if there are none. A bad filter is ErrInvalidArgument.
	List(ctx context.Context, filters ...string) ([]Lease, error)
	// AddResource makes the lease hold r, which need not exist yet. Doing so
	// twice is not an error. ErrNotFound for the lease, ErrNotImplemented for an unknown type.
	AddResource(ctx context.Context, id ID, r Resource) error
	// RemoveResource lets go of r; that it was not held is not an error.
	RemoveResource(ctx context.Context, id ID, r Resource) error
	// Resources returns what the lease holds. ErrNotFound for the lease.
	Resources(ctx context.Context, id ID) ([]Resource, error)
}
