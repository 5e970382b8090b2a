// Package graph is what garbage collection sees of the metadata: objects,
// their labels, and what each holds by its nature. What labels mean is the
// collector's business; which objects there are is the metadata's.
package graph

import (
	"context"
	"fmt"

	"github.com/gantryd/gantry/core/namespace"
)

// Kind is the noun of an object.
type Kind uint8

// The kinds.
const (
	KindContent Kind = iota + 1
	KindSnapshot
	KindImage
	KindContainer
	KindSandbox
	KindLease
	KindIngest
)

func (k Kind) String() string {
	names := [...]string{"unknown", "content", "snapshot", "image", "container", "sandbox", "lease", "ingest"}
	if int(k) < len(names) {
		return names[k]
	}
	return names[0]
}

// Node names an object. Snapshotter is set for snapshots only.
type Node struct {
	Kind        Kind
	Namespace   namespace.ID
	Snapshotter string
	ID          string
}

func (n Node) String() string {
	if n.Snapshotter != "" {
		return fmt.Sprintf("%s %s/%s/%s", n.Kind, n.Namespace, n.Snapshotter, n.ID)
	}
	return fmt.Sprintf("%s %s/%s", n.Kind, n.Namespace, n.ID)
}

// Object is a node of the graph. Labels are those that begin with
// LabelPrefix. Holds are the nodes that it keeps by its nature: an image its
// target, a snapshot its parent, a container its snapshot, a lease its
// resources. They need not exist.
type Object struct {
	Node
	Labels map[string]string
	Holds  []Node
	// Live is an ingest that has not expired or is being written.
	Live bool
}

// LabelPrefix is how labels begin that collection looks at (contract 1.5).
const LabelPrefix = "containerd.io/gc."

// Freed counts what a collection removed.
type Freed struct {
	// Records were removed from the metadata.
	Records int
	// Blobs and Snapshots were removed from the stores behind it; Ingests were dropped there.
	Blobs, Snapshots, Ingests int
	// Bytes is the size of the blobs.
	Bytes int64
}

// Store is metadata that can be collected.
type Store interface {
	// Objects calls fn for every object, all as of one moment.
	Objects(ctx context.Context, fn func(Object) error) error
	// Sweep calls plan with every object and deletes the records that it
	// returns, in one transaction: nothing changes in between. Containers and
	// sandboxes are never deleted. plan may be called more than once.
	Sweep(ctx context.Context, plan func([]Object) []Node) (Freed, error)
	// Reclaim deletes what no record names from the stores that changed since
	// the last time. No lock that a request needs is held meanwhile. A store
	// that fails stays due; its error is returned after the others are done.
	Reclaim(ctx context.Context) (Freed, error)
}
