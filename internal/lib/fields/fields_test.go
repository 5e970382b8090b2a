package fields

import (
	"errors"
	"maps"
	"testing"

	"github.com/containerd/errdefs"
)

// contract: 1.2.5, 1.2.6
func TestLabels(t *testing.T) {
	cur := map[string]string{"a": "1", "b.c/d": "2"}
	for _, tc := range []struct {
		name   string
		update map[string]string
		paths  []string
		want   map[string]string
	}{
		{"empty mask replaces", map[string]string{"x": "9"}, nil, map[string]string{"x": "9"}},
		{"labels replaces", map[string]string{"x": "9", "y": ""}, []string{"labels"}, map[string]string{"x": "9"}},
		{"one key", map[string]string{"a": "3", "x": "9"}, []string{"labels.a"}, map[string]string{"a": "3", "b.c/d": "2"}},
		{"key with dots", map[string]string{"b.c/d": "5"}, []string{"labels.b.c/d"}, map[string]string{"a": "1", "b.c/d": "5"}},
		{"empty value deletes", map[string]string{"a": ""}, []string{"labels.a"}, map[string]string{"b.c/d": "2"}},
		{"absent value deletes", nil, []string{"labels.a"}, map[string]string{"b.c/d": "2"}},
		{"two keys", map[string]string{"a": "", "n": "1"}, []string{"labels.a", "labels.n"}, map[string]string{"n": "1", "b.c/d": "2"}},
	} {
		got, err := Labels(cur, tc.update, tc.paths)
		if err != nil || !maps.Equal(got, tc.want) {
			t.Errorf("%s: got %v, %v; want %v", tc.name, got, err, tc.want)
		}
	}
	for _, path := range []string{"size", "label", "labels.", "labelsx.a"} {
		if _, err := Labels(cur, nil, []string{path}); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("path %q: %v, want ErrInvalidArgument", path, err)
		}
	}
	if len(cur) != 2 || cur["a"] != "1" {
		t.Errorf("the current map was changed: %v", cur)
	}
}
