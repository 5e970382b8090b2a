// Package idmap maps user and group ids between a user namespace and the host,
// as the labels of snapshots and the options of mounts write it:
// "container:host:size", several joined by commas. What is parsed is sound: no
// range is empty, leaves the ids there are, or overlaps another on either side.
package idmap

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// maxRanges is how many ranges the kernel takes.
const maxRanges = 340

// Range maps Size ids: Container to Host, Container+1 to Host+1 and so on.
type Range struct {
	Container uint32
	Host      uint32
	Size      uint32
}

// Map is a set of ranges that do not overlap.
type Map []Range

// Parse reads a map. Anything but a sound one is ErrInvalidArgument.
func Parse(s string) (Map, error) {
	parts := strings.Split(s, ",")
	if len(parts) > maxRanges {
		return nil, fmt.Errorf("id mapping of %d ranges, %d are possible: %w", len(parts), maxRanges, errdefs.ErrInvalidArgument)
	}
	m := make(Map, 0, len(parts))
	for _, part := range parts {
		f := strings.Split(part, ":")
		if len(f) != 3 {
			return nil, fmt.Errorf("id mapping %q: %q is not container:host:size: %w", s, part, errdefs.ErrInvalidArgument)
		}
		var n [3]uint32
		for i := range f {
			v, err := strconv.ParseUint(f[i], 10, 32)
			if err != nil {
				return nil, fmt.Errorf("id mapping %q: %q is no id: %w", s, f[i], errdefs.ErrInvalidArgument)
			}
			n[i] = uint32(v)
		}
		m = append(m, Range{Container: n[0], Host: n[1], Size: n[2]})
	}
	if err := m.Check(); err != nil {
		return nil, fmt.Errorf("id mapping %q: %w", s, err)
	}
	return m, nil
}

// Check returns ErrInvalidArgument unless the map is sound. The id 4294967295
// means "unchanged" to the kernel and cannot be mapped.
func (m Map) Check() error {
	if len(m) == 0 {
		return fmt.Errorf("no range: %w", errdefs.ErrInvalidArgument)
	}
	for i, r := range m {
		if r.Size == 0 {
			return fmt.Errorf("range %s is empty: %w", r, errdefs.ErrInvalidArgument)
		}
		if over(r.Container, r.Size) || over(r.Host, r.Size) {
			return fmt.Errorf("range %s goes beyond the last id: %w", r, errdefs.ErrInvalidArgument)
		}
		for _, o := range m[:i] {
			if overlap(r.Container, r.Size, o.Container, o.Size) || overlap(r.Host, r.Size, o.Host, o.Size) {
				return fmt.Errorf("ranges %s and %s overlap: %w", o, r, errdefs.ErrInvalidArgument)
			}
		}
	}
	return nil
}

func over(first, size uint32) bool { return uint64(first)+uint64(size) > math.MaxUint32 }

func overlap(a, as, b, bs uint32) bool {
	return uint64(a) < uint64(b)+uint64(bs) && uint64(b) < uint64(a)+uint64(as)
}

func (r Range) String() string {
	return fmt.Sprintf("%d:%d:%d", r.Container, r.Host, r.Size)
}

// String is the form that Parse reads.
func (m Map) String() string {
	parts := make([]string, len(m))
	for i, r := range m {
		parts[i] = r.String()
	}
	return strings.Join(parts, ",")
}

// ToHost returns the id on the host of one in the container, and whether it
// has one.
func (m Map) ToHost(id uint32) (uint32, bool) {
	for _, r := range m {
		if id >= r.Container && id-r.Container < r.Size {
			return r.Host + (id - r.Container), true
		}
	}
	return 0, false
}

// ToContainer is the way back.
func (m Map) ToContainer(id uint32) (uint32, bool) {
	for _, r := range m {
		if id >= r.Host && id-r.Host < r.Size {
			return r.Container + (id - r.Host), true
		}
	}
	return 0, false
}
