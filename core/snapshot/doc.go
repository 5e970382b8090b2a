// Package snapshot is a tree of file system states: committed ones that never
// change and may have children, active ones that are being written, and views.
package snapshot

import (
	"context"
	"fmt"
	"time"

	"github.com/gantryd/gantry/core/mount"
)

// Kind is what can be done with a snapshot. The values are containerd's, on
// disk and on the wire (contract 3.1.1).
type Kind uint8

// The kinds.
const (
	KindUnknown   Kind = 0
	KindView      Kind = 1
	KindActive    Kind = 2
	KindCommitted Kind = 3
)

func (k Kind) String() string {
	switch k {
	case KindView:
		return "View"
	case KindActive:
		return "Active"
	case KindCommitted:
		return "Committed"
	}
	return "Unknown"
}

// MarshalText makes JSON show the name.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads the name.
func (k *Kind) UnmarshalText(b []byte) error {
	for _, c := range []Kind{KindUnknown, KindView, KindActive, KindCommitted} {
		if c.String() == string(b) {
			*k = c
			return nil
		}
	}
	return fmt.Errorf("unknown kind of snapshot %q", b)
}

// Labels that snapshotters understand (contract 1.5.15, 1.5.16). Only labels
// with LabelPrefix, and LabelRef, reach a snapshotter from its clients.
const (
	LabelPrefix        = "containerd.io/snapshot/"
	LabelRef           = "containerd.io/snapshot.ref"
	LabelUIDMapping    = "containerd.io/snapshot/uidmapping"
	LabelGIDMapping    = "containerd.io/snapshot/gidmapping"
	LabelDiffID        = "containerd.io/snapshot/diff-id"
	LabelParentChainID = "containerd.io/snapshot/parent-chain-id"
)

// Info describes a snapshot. Name is its key while it is active or a view.
type Info struct {
	Name      string            `json:"name"`
	Parent    string            `json:"parent,omitempty"`
	Kind      Kind              `json:"kind"`
	CreatedAt time.Time         `json:"created_at"`
	UpdatedAt time.Time         `json:"updated_at"`
	Labels    map[string]string `json:"labels,omitempty"`
}

// Usage is the disk space of a snapshot itself, without its parents.
type Usage struct {
	Inodes int64 `json:"inodes"`
	Size   int64 `json:"size"` // bytes
}

// CommitOptions says more about a commit.
type CommitOptions struct {
	Labels map[string]string
	// Parent rebases: the active snapshot was prepared on nothing and is
	// committed on top of Parent (contract 3.1.5). ErrNotImplemented where the
	// snapshotter cannot; ErrInvalidArgument if the snapshot has another parent.
	Parent string
	// Synced says that the caller has made the files durable, names included.
	// It is not sent over the wire: there the snapshotter makes sure itself.
	Synced bool
}

// Store keeps the snapshots of one snapshotter. It is safe for concurrent use.
type Store interface {
	// Stat describes a snapshot or returns ErrNotFound.
	Stat(ctx context.Context, key string) (Info, error)
	// Update changes labels: the fields named (labels, labels.<key>), or all
	// labels if none is. ErrNotFound; other fields are ErrInvalidArgument.
	Update(ctx context.Context, info Info, fields ...string) (Info, error)
	// Usage measures a snapshot without its parents, or returns ErrNotFound.
	Usage(ctx context.Context, key string) (Usage, error)
	// Mounts returns what mounts an active snapshot or a view; ErrNotFound,
	// and ErrFailedPrecondition for a committed one.
	Mounts(ctx context.Context, key string) ([]mount.Mount, error)
	// Prepare makes a writable snapshot on top of parent, or on nothing if
	// parent is "". If key exists it returns ErrAlreadyExists and changes
	// nothing. ErrNotFound if the parent is missing, ErrInvalidArgument if it
	// is not committed. With LabelRef a remote snapshotter may answer
	// ErrAlreadyExists to say that the target is there (contract 3.1.4).
	Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error)
	// View is Prepare for reading.
	View(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error)
	// Commit turns the active snapshot key into the committed snapshot name.
	// ErrNotFound; ErrAlreadyExists if name exists; ErrFailedPrecondition if key is not active.
	// The data is durable before the name is visible.
	Commit(ctx context.Context, name, key string, opts CommitOptions) error
	// Remove drops a snapshot: ErrNotFound, or ErrFailedPrecondition if it has children.
	Remove(ctx context.Context, key string) error
	// Walk calls fn for each snapshot that matches one of the filters (fields
	// kind, name, parent, labels), all if there are none. fn's error ends the
	// walk and is returned. fn may call the store.
	Walk(ctx context.Context, fn func(Info) error, filters ...string) error
}

// Cleaner is a Store that reclaims what removed snapshots left on disk.
type Cleaner interface {
	// Cleanup returns when nothing removed is left, or the first error.
	Cleanup(ctx context.Context) error
}
