package container

import (
	"fmt"
	"maps"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/lib/fields"
)

// Check returns ErrInvalidArgument unless the record has what Create asks for.
func (c Container) Check() error {
	if err := Check(c.ID); err != nil {
		return err
	}
	if c.Runtime.Name == "" {
		return fmt.Errorf("container %s: runtime name must not be empty: %w", c.ID, errdefs.ErrInvalidArgument)
	}
	if c.SnapshotKey != "" && c.Snapshotter == "" {
		return fmt.Errorf("container %s: snapshot key %q needs a snapshotter: %w", c.ID, c.SnapshotKey, errdefs.ErrInvalidArgument)
	}
	if err := ident.CheckLabels(c.Labels); err != nil {
		return fmt.Errorf("container %s: %w", c.ID, err)
	}
	if _, ok := c.Extensions[""]; ok {
		return fmt.Errorf("container %s: extension name must not be empty: %w", c.ID, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Field looks up id, runtime.name, image and labels.<key> for filters
// (contract 1.2.8).
func (c Container) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "id":
		return string(c.ID), len(path) == 1 && c.ID != ""
	case "runtime":
		return c.Runtime.Name, len(path) == 2 && path[1] == "name" && c.Runtime.Name != ""
	case "image":
		return c.Image, len(path) == 1 && c.Image != ""
	case "labels":
		v, ok := c.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Merge returns c with the fields of update that paths name, as Store.Update
// promises. The times are c's. Neither c nor update is changed.
func (c Container) Merge(update Container, paths ...string) (Container, error) {
	if len(paths) == 0 {
		if update.Snapshotter != c.Snapshotter {
			return Container{}, fmt.Errorf("container %s: snapshotter cannot be changed from %q to %q: %w", c.ID, c.Snapshotter, update.Snapshotter, errdefs.ErrInvalidArgument)
		}
		if update.Runtime.Name != c.Runtime.Name {
			return Container{}, fmt.Errorf("container %s: runtime cannot be changed from %q to %q: %w", c.ID, c.Runtime.Name, update.Runtime.Name, errdefs.ErrInvalidArgument)
		}
		paths = []string{"labels", "extensions", "spec", "image", "snapshotkey"}
	}
	for _, p := range paths {
		var ok bool
		if c.Labels, ok = fields.Map(c.Labels, update.Labels, p, "labels"); ok {
			continue
		}
		if c.Extensions, ok = MergeExtensions(c.Extensions, update.Extensions, p); ok {
			continue
		}
		switch p {
		case "spec":
			c.Spec = update.Spec
		case "image":
			c.Image = update.Image
		case "snapshotkey":
			c.SnapshotKey = update.SnapshotKey
		default:
			return Container{}, fields.Unknown(p)
		}
	}
	return c, nil
}

// MergeExtensions applies one path of a mask, "extensions" or
// "extensions.<name>", and returns whether the path is one of these. An
// extension whose new value is absent is deleted.
func MergeExtensions(current, update map[string]typed.Any, path string) (map[string]typed.Any, bool) {
	if path == "extensions" {
		return maps.Clone(update), true
	}
	name, ok := strings.CutPrefix(path, "extensions.")
	if !ok || name == "" {
		return current, false
	}
	out := maps.Clone(current)
	if out == nil {
		out = map[string]typed.Any{}
	}
	if v, ok := update[name]; ok && !v.IsZero() {
		out[name] = v
	} else {
		delete(out, name)
	}
	return out, true
}
