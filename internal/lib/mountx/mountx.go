// Package mountx performs mounts as values: the five fields that snapshotters
// hand to whoever needs a file system at a path. Every target is resolved under
// a root that the caller names and no link leads out of it; what one call
// mounted before it returned an error is unmounted again; a path that is not a
// mount point is a success for every function that unmounts.
package mountx

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Mount says what to mount where. The json form is the one containerd's
// clients and shims exchange (contract 3.4.1).
type Mount struct {
	// Type is the file system, or "bind"; "fuse.x" and "fuse3.x" run the
	// helpers mount.fuse and mount.fuse3 for the file system x.
	Type string `json:"type,omitempty"`
	// Source is a device, a directory, or whatever the type takes.
	Source string `json:"source,omitempty"`
	// Target is a path below the root given to Mount, or empty for the root.
	Target string `json:"target,omitempty"`
	// Options are fstab-like: flags, propagation, loop, uidmap=, gidmap= and
	// data of the file system. X-containerd.* and x-* options are ignored.
	Options []string `json:"options,omitempty"`
}

// IDMap is one range of a user or group mapping: Size ids from Container in
// the mapped view are the ids from Host on the file system's side.
type IDMap struct {
	Container, Host, Size int
}

// ParseIDMap reads "container:host:size[,container:host:size...]".
func ParseIDMap(s string) ([]IDMap, error) {
	var maps []IDMap
	for _, part := range strings.Split(s, ",") {
		f := strings.Split(part, ":")
		if len(f) != 3 {
			return nil, fmt.Errorf("id mapping %q: want container:host:size: %w", s, errdefs.ErrInvalidArgument)
		}
		var n [3]int
		for i := range f {
			v, err := strconv.ParseUint(f[i], 10, 32)
			if err != nil {
				return nil, fmt.Errorf("id mapping %q: %q is no id: %w", s, f[i], errdefs.ErrInvalidArgument)
			}
			n[i] = int(v)
		}
		if n[2] == 0 {
			return nil, fmt.Errorf("id mapping %q: size is zero: %w", s, errdefs.ErrInvalidArgument)
		}
		maps = append(maps, IDMap{Container: n[0], Host: n[1], Size: n[2]})
	}
	return maps, nil
}

// ReadOnly returns the mounts changed so that nothing can be written through
// them. An overlay loses its work directory and its upper directory becomes
// the topmost lower one. The argument is not changed.
func ReadOnly(mounts []Mount) []Mount {
	out := make([]Mount, len(mounts))
	for i, m := range mounts {
		if m.Type == "overlay" {
			m.Options = readOnlyOverlay(m.Options)
		} else {
			m.Options = append(without(m.Options, "rw", "ro"), "ro")
		}
		out[i] = m
	}
	return out
}

func readOnlyOverlay(options []string) []string {
	var upper string
	out := make([]string, 0, len(options))
	lower := -1
	for _, o := range options {
		switch name, value, _ := strings.Cut(o, "="); name {
		case "upperdir":
			upper = value
			continue
		case "workdir", "volatile", "rw":
			continue
		case "lowerdir":
			lower = len(out)
		}
		out = append(out, o)
	}
	if upper == "" {
		return out
	}
	if lower < 0 {
		return append(out, "lowerdir="+upper)
	}
	out[lower] = "lowerdir=" + upper + ":" + strings.TrimPrefix(out[lower], "lowerdir=")
	return out
}

func without(options []string, drop ...string) []string {
	out := make([]string, 0, len(options)+1)
next:
	for _, o := range options {
		for _, d := range drop {
			if o == d {
				continue next
			}
		}
		out = append(out, o)
	}
	return out
}
