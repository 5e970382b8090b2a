// Package view is everything that one namespace can see, as a value. Namespace
// and lease are read once, where bytes come in, and become a View; nothing
// behind it can forget them.
package view

import (
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/transfer"
)

// Records is the part of a View that is stored: what the metadata keeps. All
// of it is safe for concurrent use.
type Records interface {
	Namespace() namespace.ID
	// Lease is what this view writes under, or "".
	Lease() lease.ID
	Content() content.Store
	Images() image.Store
	// Snapshots returns a snapshotter's store; ErrInvalidArgument "snapshotter
	// not loaded: x" if there is no such snapshotter (contract 1.3.31).
	Snapshots(snapshotter string) (snapshot.Store, error)
	Containers() container.Store
	Sandboxes() sandbox.Store
	Leases() lease.Store
}

// RecordSource opens Records. Namespace grammar is checked: ErrInvalidArgument.
// Objects created through a leased view are referenced by the lease in the
// same transaction, also those that exist already; an unknown lease is
// ErrNotFound, at In or at the write (contract 1.2.4).
type RecordSource interface {
	In(ns namespace.ID, under lease.ID) (Records, error)
}

// View is everything that one namespace can see. A leased View writes under
// that lease.
type View interface {
	Records
	Diff() diff.Service
	Tasks() task.Store
	Transfer() transfer.Service
	Streams() stream.Manager
}

// Source opens Views; see RecordSource. under is "" for no lease.
type Source interface {
	In(ns namespace.ID, under lease.ID) (View, error)
}
