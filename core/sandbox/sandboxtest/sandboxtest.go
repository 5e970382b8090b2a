// Package sandboxtest checks that a sandbox.Store keeps what its interface
// promises. Every implementation passes it: memory, metadata, wire client.
package sandboxtest

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/typed"
)

func full(id string) sandbox.Sandbox {
	return sandbox.Sandbox{
		ID: id, Sandboxer: "shim", Labels: map[string]string{"a": "1", "b.c/d": "2"},
		Runtime:    container.Runtime{Name: "io.containerd.runc.v2", Options: typed.Any{URL: "o", Value: []byte{1}}},
		Spec:       typed.Any{URL: "s", Value: []byte(`{}`)},
		Extensions: map[string]typed.Any{"e": {URL: "u", Value: []byte("v")}},
	}
}

func same(a, b sandbox.Sandbox) bool {
	a.CreatedAt, a.UpdatedAt, b.CreatedAt, b.UpdatedAt = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	return reflect.DeepEqual(a, b)
}

// Run runs the suite; open returns a new empty store each time.
func Run(t *testing.T, open func(t *testing.T) sandbox.Store) {
	t.Run("create and get", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		in := full("pod")
		made, err := s.Create(ctx, in)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Get(ctx, "pod")
		if err != nil {
			t.Fatal(err)
		}
		if !same(made, in) || !same(got, in) {
			t.Errorf("made %+v, got %+v, want %+v", made, got, in)
		}
		if time.Since(made.CreatedAt).Abs() > time.Minute || !got.CreatedAt.Equal(made.CreatedAt) || !made.UpdatedAt.Equal(made.CreatedAt) {
			t.Errorf("times: made %v %v, got %v", made.CreatedAt, made.UpdatedAt, got.CreatedAt)
		}
		_, err = s.Create(ctx, in)
		is(t, "create again", err, errdefs.ErrAlreadyExists)
		_, err = s.Get(ctx, "none")
		is(t, "get missing", err, errdefs.ErrNotFound)
	})
	t.Run("invalid", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		for name, change := range map[string]func(*sandbox.Sandbox){
			"no id":      func(s *sandbox.Sandbox) { s.ID = "" },
			"bad id":     func(s *sandbox.Sandbox) { s.ID = "a b" },
			"long label": func(s *sandbox.Sandbox) { s.Labels = map[string]string{"k": strings.Repeat("v", ident.MaxLabel)} },
		} {
			sb := full("pod")
			change(&sb)
			_, err := s.Create(ctx, sb)
			is(t, "create with "+name, err, errdefs.ErrInvalidArgument)
		}
	})
	t.Run("list", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		for _, id := range []string{"c", "a", "b"} {
			sb := full(id)
			sb.Labels = map[string]string{"of": id}
			sb.Runtime.Name = "r-" + id
			if _, err := s.Create(ctx, sb); err != nil {
				t.Fatal(err)
			}
		}
		for filter, want := range map[string]string{"": "[a b c]", "id==b": "[b]", "runtime.name==r-c": "[c]", "labels.of!=a": "[b c]", "labels.none": "[]"} {
			var fs []string
			if filter != "" {
				fs = []string{filter}
			}
			l, err := s.List(ctx, fs...)
			ids := []string{}
			for _, sb := range l {
				ids = append(ids, sb.ID)
			}
			if got := fmt.Sprint(ids); err != nil || got != want {
				t.Errorf("list %q: %s, %v; want %s", filter, got, err, want)
			}
		}
		_, err := s.List(ctx, "id==")
		is(t, "bad filter", err, errdefs.ErrInvalidArgument)
	})
	t.Run("update", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		made, err := s.Create(ctx, full("pod"))
		if err != nil {
			t.Fatal(err)
		}
		want := made
		step := func(change sandbox.Sandbox, paths ...string) {
			t.Helper()
			change.ID = "pod"
			out, err := s.Update(ctx, change, paths...)
			if err != nil {
				t.Fatalf("update %q: %v", paths, err)
			}
			got, err := s.Get(ctx, "pod")
			if err != nil {
				t.Fatal(err)
			}
			if !same(out, want) || !same(got, want) {
				t.Errorf("update %q: out %+v, got %+v, want %+v", paths, out, got, want)
			}
			if !got.UpdatedAt.After(made.UpdatedAt) || !got.CreatedAt.Equal(made.CreatedAt) {
				t.Errorf("update %q: times %v, %v", paths, got.CreatedAt, got.UpdatedAt)
			}
		}
		want.Labels = map[string]string{"a": "9", "b.c/d": "2"}
		step(sandbox.Sandbox{Labels: map[string]string{"a": "9", "z": "9"}}, "labels.a")
		want.Labels = map[string]string{"n": "1"}
		step(sandbox.Sandbox{Labels: map[string]string{"n": "1"}}, "labels")
		want.Extensions = maps.Clone(want.Extensions)
		want.Extensions["f"] = typed.Any{URL: "w", Value: []byte("x")}
		step(sandbox.Sandbox{Extensions: map[string]typed.Any{"f": want.Extensions["f"]}}, "extensions.f")
		want.Spec = typed.Any{URL: "s2", Value: []byte("2")}
		want.Runtime = container.Runtime{Name: "r2", Options: typed.Any{URL: "o2", Value: []byte("3")}}
		step(sandbox.Sandbox{Spec: want.Spec, Runtime: want.Runtime}, "spec", "runtime")
		all := full("pod")
		want.Labels, want.Extensions, want.Spec, want.Runtime = all.Labels, all.Extensions, all.Spec, all.Runtime
		step(all)
		for _, path := range []string{"id", "sandboxer", "nonsense"} {
			_, err := s.Update(ctx, all, path)
			is(t, "update "+path, err, errdefs.ErrInvalidArgument)
		}
		_, err = s.Update(ctx, full("none"))
		is(t, "update missing", err, errdefs.ErrNotFound)
	})
	t.Run("delete", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		is(t, "delete missing", s.Delete(ctx, "pod"), errdefs.ErrNotFound)
		if _, err := s.Create(ctx, full("pod")); err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(ctx, "pod"); err != nil {
			t.Error(err)
		}
		_, err := s.Get(ctx, "pod")
		is(t, "get deleted", err, errdefs.ErrNotFound)
	})
}

func is(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}
