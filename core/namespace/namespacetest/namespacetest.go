// Package namespacetest checks that a namespace.Store keeps what its interface
// promises, but for what takes other stores: implicit creation, and Delete of
// one that is in use. Every implementation passes it: memory, metadata, wire client.
package namespacetest

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/namespace"
)

// Run runs the suite; open returns a new empty store each time.
func Run(t *testing.T, open func(t *testing.T) namespace.Store) {
	t.Run("create and get", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		if got, err := s.Get(ctx, "nobody-made-it"); err != nil || got.ID != "nobody-made-it" || len(got.Labels) != 0 {
			t.Errorf("get of one that nobody made: %+v, %v", got, err)
		}
		if l, err := s.List(ctx); err != nil || len(l) != 0 {
			t.Errorf("list of nothing: %v, %v", l, err)
		}
		for _, id := range []namespace.ID{"c", "a", "b"} {
			made, err := s.Create(ctx, namespace.Namespace{ID: id, Labels: map[string]string{"of": string(id), "gone": ""}})
			if err != nil || made.ID != id || !maps.Equal(made.Labels, map[string]string{"of": string(id)}) {
				t.Fatalf("create: %+v, %v", made, err)
			}
		}
		l, err := s.List(ctx)
		if err != nil || len(l) != 3 || l[0].ID != "a" || l[1].ID != "b" || l[2].ID != "c" || l[1].Labels["of"] != "b" {
			t.Errorf("list: %+v, %v", l, err)
		}
		if got, err := s.Get(ctx, "b"); err != nil || !maps.Equal(got.Labels, map[string]string{"of": "b"}) {
			t.Errorf("get: %+v, %v", got, err)
		}
		_, err = s.Create(ctx, namespace.Namespace{ID: "a"})
		is(t, "create again", err, errdefs.ErrAlreadyExists)
	})
	t.Run("invalid", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		for _, id := range []namespace.ID{"", "a/b", "-a", "a..b", "ü", namespace.ID(strings.Repeat("a", ident.MaxLength+1))} {
			_, err := s.Create(ctx, namespace.Namespace{ID: id})
			is(t, "create "+string(id), err, errdefs.ErrInvalidArgument)
			_, err = s.Get(ctx, id)
			is(t, "get "+string(id), err, errdefs.ErrInvalidArgument)
		}
		_, err := s.Create(ctx, namespace.Namespace{ID: "version"})
		is(t, "create version", err, errdefs.ErrInvalidArgument)
		_, err = s.Create(ctx, namespace.Namespace{ID: "a", Labels: map[string]string{"k": strings.Repeat("v", ident.MaxLabel)}})
		is(t, "long label", err, errdefs.ErrInvalidArgument)
		if l, err := s.List(ctx); err != nil || len(l) != 0 {
			t.Errorf("after refused creates: %v, %v", l, err)
		}
	})
	t.Run("update", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		if _, err := s.Create(ctx, namespace.Namespace{ID: "a", Labels: map[string]string{"a": "1", "b.c/d": "2"}}); err != nil {
			t.Fatal(err)
		}
		step := func(labels, want map[string]string, paths ...string) {
			t.Helper()
			out, err := s.Update(ctx, namespace.Namespace{ID: "a", Labels: labels}, paths...)
			if err != nil {
				t.Fatalf("update %q: %v", paths, err)
			}
			got, err := s.Get(ctx, "a")
			if err != nil || got.ID != "a" || out.ID != "a" || !maps.Equal(got.Labels, want) || !maps.Equal(out.Labels, want) {
				t.Errorf("update %q: out %v, got %v, %v; want %v", paths, out, got, err, want)
			}
		}
		step(map[string]string{"a": "9", "z": "9"}, map[string]string{"a": "9", "b.c/d": "2"}, "labels.a")
		step(map[string]string{"b.c/d": ""}, map[string]string{"a": "9"}, "labels.b.c/d")
		step(map[string]string{"x": "1"}, map[string]string{"x": "1"}, "labels")
		step(map[string]string{"y": "1", "w": ""}, map[string]string{"y": "1"})
		step(nil, nil)
		_, err := s.Update(ctx, namespace.Namespace{ID: "a"}, "name")
		is(t, "update name", err, errdefs.ErrInvalidArgument)
		_, err = s.Update(ctx, namespace.Namespace{ID: "a", Labels: map[string]string{"k": strings.Repeat("v", ident.MaxLabel)}})
		is(t, "long label", err, errdefs.ErrInvalidArgument)
		_, err = s.Update(ctx, namespace.Namespace{ID: "none"})
		is(t, "update missing", err, errdefs.ErrNotFound)
	})
	t.Run("delete", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		is(t, "delete missing", s.Delete(ctx, "a"), errdefs.ErrNotFound)
		if _, err := s.Create(ctx, namespace.Namespace{ID: "a", Labels: map[string]string{"a": "1"}}); err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Get(ctx, "a"); err != nil || len(got.Labels) != 0 {
			t.Errorf("get deleted: %+v, %v", got, err)
		}
		if l, err := s.List(ctx); err != nil || len(l) != 0 {
			t.Errorf("list: %v, %v", l, err)
		}
	})
}

func is(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}
