// Package fields applies update masks (contract 1.2.6): a map field is
// replaced as a whole by its own name, and changed in one key by
// "<name>.<key>", where everything after the first dot is the key.
package fields

import (
	"fmt"
	"maps"
	"strings"

	"github.com/containerd/errdefs"
)

// Map applies one path of a mask to a map field called name: it returns the
// new map and whether the path was about this field. current is not changed. A
// key whose new value is "" or absent is deleted.
func Map(current, update map[string]string, path, name string) (map[string]string, bool) {
	if path == name {
		return compact(update), true
	}
	key, ok := strings.CutPrefix(path, name+".")
	if !ok || key == "" {
		return current, false
	}
	out := maps.Clone(current)
	if out == nil {
		out = map[string]string{}
	}
	if v := update[key]; v != "" {
		out[key] = v
	} else {
		delete(out, key)
	}
	return out, true
}

// Labels applies a mask that may name labels only. No paths replace all labels;
// any other path is ErrInvalidArgument.
func Labels(current, update map[string]string, paths []string) (map[string]string, error) {
	if len(paths) == 0 {
		paths = []string{"labels"}
	}
	for _, p := range paths {
		var ok bool
		if current, ok = Map(current, update, p, "labels"); !ok {
			return nil, Unknown(p)
		}
	}
	return current, nil
}

// Unknown is the error for a path that cannot be updated.
func Unknown(path string) error {
	return fmt.Errorf("cannot update field %q: %w", path, errdefs.ErrInvalidArgument)
}

// compact copies m without the keys set to "": setting a label to the empty
// string deletes it (contract 1.2.5).
func compact(m map[string]string) map[string]string {
	out := make(map[string]string, len(m))
	for k, v := range m {
		if v != "" {
			out[k] = v
		}
	}
	return out
}
