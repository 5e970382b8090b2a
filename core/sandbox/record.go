package sandbox

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/internal/lib/fields"
)

// Check returns ErrInvalidArgument unless the record has what Create asks for.
func (s Sandbox) Check() error {
	if err := ident.Check("sandbox id", s.ID); err != nil {
		return err
	}
	if err := ident.CheckLabels(s.Labels); err != nil {
		return fmt.Errorf("sandbox %s: %w", s.ID, err)
	}
	if _, ok := s.Extensions[""]; ok {
		return fmt.Errorf("sandbox %s: extension name must not be empty: %w", s.ID, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Field looks up id, runtime.name and labels.<key> for filters (contract 1.2.8).
func (s Sandbox) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "id":
		return s.ID, len(path) == 1 && s.ID != ""
	case "runtime":
		return s.Runtime.Name, len(path) == 2 && path[1] == "name" && s.Runtime.Name != ""
	case "labels":
		v, ok := s.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Merge returns s with the fields of update that paths name, as Store.Update
// promises. The times are s's. Neither s nor update is changed.
func (s Sandbox) Merge(update Sandbox, paths ...string) (Sandbox, error) {
	if len(paths) == 0 {
		paths = []string{"labels", "extensions", "runtime", "spec"}
	}
	for _, p := range paths {
		var ok bool
		if s.Labels, ok = fields.Map(s.Labels, update.Labels, p, "labels"); ok {
			continue
		}
		if s.Extensions, ok = container.MergeExtensions(s.Extensions, update.Extensions, p); ok {
			continue
		}
		switch p {
		case "runtime":
			s.Runtime = update.Runtime
		case "spec":
			s.Spec = update.Spec
		default:
			return Sandbox{}, fields.Unknown(p)
		}
	}
	return s, nil
}
