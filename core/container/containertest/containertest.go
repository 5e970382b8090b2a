// Package containertest checks that a container.Store keeps what its interface
// promises. Every implementation passes it: memory, metadata, wire client.
package containertest

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
	"github.com/gantryd/gantry/core/typed"
)

func full(id container.ID) container.Container {
	return container.Container{
		ID: id, Labels: map[string]string{"a": "1", "b.c/d": "2"}, Image: "img:1",
		Runtime:     container.Runtime{Name: "io.containerd.runc.v2", Options: typed.Any{URL: "containerd.runc.v1.Options", Value: []byte{1, 2}}},
		Spec:        typed.Any{URL: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte(`{"ociVersion":"1.0"}`)},
		Snapshotter: "overlayfs", SnapshotKey: "key", SandboxID: "pod",
		Extensions: map[string]typed.Any{"e": {URL: "u", Value: []byte("v")}},
	}
}

// same compares all but the times.
func same(a, b container.Container) bool {
	a.CreatedAt, a.UpdatedAt, b.CreatedAt, b.UpdatedAt = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	norm := func(c *container.Container) {
		if len(c.Labels) == 0 {
			c.Labels = nil
		}
		if len(c.Extensions) == 0 {
			c.Extensions = nil
		}
		for _, v := range []*typed.Any{&c.Spec, &c.Runtime.Options} {
			if len(v.Value) == 0 {
				v.Value = nil
			}
		}
	}
	norm(&a)
	norm(&b)
	return reflect.DeepEqual(a, b)
}

// Run runs the suite; open returns a new empty store each time.
func Run(t *testing.T, open func(t *testing.T) container.Store) {
	t.Run("create and get", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		in := full("box")
		made, err := s.Create(ctx, in)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Get(ctx, "box")
		if err != nil {
			t.Fatal(err)
		}
		if !same(made, in) || !same(got, in) {
			t.Errorf("made %+v, got %+v, want %+v", made, got, in)
		}
		if time.Since(made.CreatedAt).Abs() > time.Minute || !made.UpdatedAt.Equal(made.CreatedAt) || !got.CreatedAt.Equal(made.CreatedAt) {
			t.Errorf("times: made %v %v, got %v", made.CreatedAt, made.UpdatedAt, got.CreatedAt)
		}
		_, err = s.Create(ctx, in)
		is(t, "create again", err, errdefs.ErrAlreadyExists)
		_, err = s.Get(ctx, "none")
		is(t, "get missing", err, errdefs.ErrNotFound)
		bare := container.Container{ID: "bare", Runtime: container.Runtime{Name: "r"}}
		if _, err := s.Create(ctx, bare); err != nil {
			t.Fatalf("create without spec: %v", err)
		}
		if got, err := s.Get(ctx, "bare"); err != nil || !same(got, bare) || !got.Spec.IsZero() {
			t.Errorf("got %+v, %v", got, err)
		}
	})
	t.Run("invalid", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		for name, change := range map[string]func(*container.Container){
			"no id":          func(c *container.Container) { c.ID = "" },
			"bad id":         func(c *container.Container) { c.ID = "a/b" },
			"long id":        func(c *container.Container) { c.ID = container.ID(strings.Repeat("a", ident.MaxLength+1)) },
			"no runtime":     func(c *container.Container) { c.Runtime.Name = "" },
			"no snapshotter": func(c *container.Container) { c.Snapshotter = "" },
			"long label":     func(c *container.Container) { c.Labels = map[string]string{"k": strings.Repeat("v", ident.MaxLabel)} },
			"no extension":   func(c *container.Container) { c.Extensions = map[string]typed.Any{"": {URL: "u"}} },
		} {
			c := full("box")
			change(&c)
			_, err := s.Create(ctx, c)
			is(t, "create with "+name, err, errdefs.ErrInvalidArgument)
		}
	})
	t.Run("walk", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		const n = 250 // more than a batch
		for i := range n {
			c := container.Container{ID: container.ID(fmt.Sprintf("c%03d", i)), Runtime: container.Runtime{Name: fmt.Sprintf("r%d", i%2)}, Image: fmt.Sprintf("i%d", i%5), Labels: map[string]string{"x.y": fmt.Sprint(i % 10)}}
			if _, err := s.Create(ctx, c); err != nil {
				t.Fatal(err)
			}
		}
		for filter, want := range map[string]int{"": n, "id==c007": 1, "runtime.name==r1": n / 2, "image==i3": n / 5, `labels."x.y"==4`: n / 10, "image==i3,runtime.name==r1": n / 10, "labels.none": 0} {
			var fs []string
			if filter != "" {
				fs = []string{filter}
			}
			var last container.ID
			got := 0
			err := s.Walk(ctx, func(c container.Container) error {
				if c.ID <= last {
					t.Errorf("%s came after %s", c.ID, last)
				}
				last = c.ID
				got++
				if got == 1 {
					_, err := s.Get(ctx, c.ID) // fn may call the store
					return err
				}
				return nil
			}, fs...)
			if err != nil || got != want {
				t.Errorf("walk %q: %d, %v; want %d", filter, got, err, want)
			}
		}
		stop := errors.New("enough")
		calls := 0
		err := s.Walk(ctx, func(container.Container) error { calls++; return stop })
		if !errors.Is(err, stop) || calls != 1 {
			t.Errorf("walk that stops: %v after %d calls", err, calls)
		}
		is(t, "bad filter", s.Walk(ctx, func(container.Container) error { return nil }, "id=="), errdefs.ErrInvalidArgument)
	})
	t.Run("update", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		made, err := s.Create(ctx, full("box"))
		if err != nil {
			t.Fatal(err)
		}
		want := made
		step := func(change container.Container, paths ...string) {
			t.Helper()
			change.ID = "box"
			out, err := s.Update(ctx, change, paths...)
			if err != nil {
				t.Fatalf("update %q: %v", paths, err)
			}
			got, err := s.Get(ctx, "box")
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
		step(container.Container{Labels: map[string]string{"a": "9", "z": "9"}}, "labels.a")
		want.Labels = map[string]string{"a": "9"}
		step(container.Container{}, "labels.b.c/d")
		want.Labels = map[string]string{"n": "1"}
		step(container.Container{Labels: map[string]string{"n": "1"}}, "labels")
		want.Extensions = maps.Clone(want.Extensions)
		want.Extensions["f.g"] = typed.Any{URL: "w", Value: []byte("x")}
		step(container.Container{Extensions: map[string]typed.Any{"f.g": {URL: "w", Value: []byte("x")}}}, "extensions.f.g")
		want.Extensions = map[string]typed.Any{"h": {URL: "w"}}
		step(container.Container{Extensions: map[string]typed.Any{"h": {URL: "w"}}}, "extensions")
		want.Spec = typed.Any{URL: "s", Value: []byte("2")}
		want.Image = "img:2"
		step(container.Container{Spec: want.Spec, Image: "img:2", Labels: map[string]string{"not": "this"}}, "spec", "image")
		want.SnapshotKey = "other"
		step(container.Container{SnapshotKey: "other"}, "snapshotkey")
		all := full("box")
		all.SnapshotKey, all.Image, all.SandboxID = "k3", "img:3", "ignored"
		want.SnapshotKey, want.Image, want.Labels, want.Extensions, want.Spec = "k3", "img:3", all.Labels, all.Extensions, all.Spec
		step(all)

		for _, path := range []string{"snapshotter", "runtime", "runtime.name", "id", "created_at", "nonsense"} {
			_, err := s.Update(ctx, all, path)
			is(t, "update "+path, err, errdefs.ErrInvalidArgument)
		}
		changed := all
		changed.Snapshotter = "native"
		_, err = s.Update(ctx, changed)
		is(t, "change the snapshotter", err, errdefs.ErrInvalidArgument)
		changed = all
		changed.Runtime.Name = "other"
		_, err = s.Update(ctx, changed)
		is(t, "change the runtime", err, errdefs.ErrInvalidArgument)
		_, err = s.Update(ctx, container.Container{ID: "box", Labels: map[string]string{"k": strings.Repeat("v", ident.MaxLabel)}}, "labels")
		is(t, "long label", err, errdefs.ErrInvalidArgument)
		_, err = s.Update(ctx, full("none"))
		is(t, "update missing", err, errdefs.ErrNotFound)
	})
	t.Run("delete", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		is(t, "delete missing", s.Delete(ctx, "box"), errdefs.ErrNotFound)
		if _, err := s.Create(ctx, full("box")); err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(ctx, "box"); err != nil {
			t.Error(err)
		}
		_, err := s.Get(ctx, "box")
		is(t, "get deleted", err, errdefs.ErrNotFound)
	})
}

func is(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}
