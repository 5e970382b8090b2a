// Package tarstream turns layer archives into directories and back. Whatever
// an archive says, nothing outside the directory it is applied to is read,
// made, changed or removed: paths are resolved by the kernel below the
// directory's descriptor, links are never followed out of it, and what an
// entry claims of its own size is bounded before it is believed. Memory does
// not grow with the length of an archive.
//
// Streams are told by their first bytes: tar as it is, gzip of one or many
// members, or zstd with or without skippable frames.
package tarstream

import (
	"cmp"
	"strings"
	"time"
)

// Whiteouts says what a deletion recorded in an archive becomes.
type Whiteouts uint8

// The forms.
const (
	// Remove deletes what the whiteout hides. What the same archive brought
	// itself stays, whatever the order of entries.
	Remove Whiteouts = iota
	// Overlay makes what overlayfs understands: character devices 0:0 and
	// opaque directories.
	Overlay
)

// Limits bound what an archive may ask for. A zero field is its default.
type Limits struct {
	// Entries is how many members an archive may have, 8 million by default.
	Entries int64
	// Path is the longest name or link target in bytes, 4096 by default.
	Path int
	// Xattrs is the sum of names and values of an entry's extended
	// attributes in bytes, 1 MiB by default.
	Xattrs int
	// Holes is how many bytes that are not in the archive its sparse files
	// may claim together, 64 GiB by default.
	Holes int64
	// Bytes is how much file data may be written, unlimited by default: the
	// disk and its quota are the limit then.
	Bytes int64
}

func (l Limits) withDefaults() Limits {
	l.Entries = cmp.Or(l.Entries, 8<<20)
	l.Path = cmp.Or(l.Path, 4096)
	l.Xattrs = cmp.Or(l.Xattrs, 1<<20)
	l.Holes = cmp.Or(l.Holes, 64<<30)
	return l
}

// ApplyOptions says how to apply an archive.
type ApplyOptions struct {
	Whiteouts Whiteouts
	// UserXattr takes user.overlay.opaque for opaque directories instead of
	// trusted.overlay.opaque, as overlay's userxattr option does.
	UserXattr bool
	// Lowers are the directories below the target in an overlay, the topmost
	// first. Parent directories that the archive does not mention are made as
	// they are there, links there are followed as in the overlay.
	Lowers []string
	// SkipDevices leaves out device nodes, which cannot be made in a user
	// namespace.
	SkipDevices bool
	Limits      Limits
	// Report, if not nil, is told of what was left out. It may be called from
	// several goroutines at once and must return quickly.
	Report func(entry, what string)
}

// Stats says what was applied.
type Stats struct {
	Entries int64 // members of the archive
	Bytes   int64 // file data, without holes
}

const (
	whPrefix = ".wh."
	whMeta   = ".wh..wh."
	whOpaque = ".wh..wh..opq"

	paxXattr = "SCHILY.xattr."
)

// private reports whether an extended attribute belongs to overlayfs itself.
// An image that could set one would choose what overlay shows.
func private(name string) bool {
	return strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.")
}

// clampTime keeps t within what every file system and utimensat can take.
func clampTime(t time.Time) time.Time {
	if t.IsZero() || t.Unix() < -1<<31 || t.Unix() > 1<<34 {
		return time.Unix(0, 0)
	}
	return t
}

// DiffOptions says how to archive a difference.
type DiffOptions struct {
	// Epoch, if not nil, is the latest time that a member may carry.
	// Whiteouts carry 1970 always.
	Epoch *time.Time
	// UserXattr is as in ApplyOptions.
	UserXattr bool
}
