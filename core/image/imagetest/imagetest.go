// Package imagetest checks that an image.Store keeps what its interface
// promises. Every implementation passes it: memory, metadata, wire client.
package imagetest

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/image"
)

// Target returns a descriptor that points at seed's digest.
func Target(seed string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(seed), Size: int64(len(seed) + 1)}
}

// Run runs the suite; open returns a new empty store each time.
func Run(t *testing.T, open func(t *testing.T) image.Store) {
	t.Run("create and get", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		in := image.Image{Name: "docker.io/library/x:1", Target: Target("x"), Labels: map[string]string{"a": "1", "b.c/d": "2", "gone": ""}}
		in.Target.Annotations = map[string]string{"n": "v"}
		before := time.Now()
		made, err := s.Create(ctx, in)
		if err != nil {
			t.Fatal(err)
		}
		if made.CreatedAt.Before(before.Add(-time.Minute)) || made.CreatedAt.After(time.Now().Add(time.Minute)) || !made.UpdatedAt.Equal(made.CreatedAt) {
			t.Errorf("times %v, %v were not assigned", made.CreatedAt, made.UpdatedAt)
		}
		got, err := s.Get(ctx, in.Name)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range []image.Image{made, got} {
			if i.Name != in.Name || i.Target.Digest != in.Target.Digest || i.Target.Size != in.Target.Size || i.Target.MediaType != in.Target.MediaType ||
				!maps.Equal(i.Target.Annotations, in.Target.Annotations) || !maps.Equal(i.Labels, map[string]string{"a": "1", "b.c/d": "2"}) {
				t.Errorf("got %+v, want %+v", i, in)
			}
		}
		if !got.CreatedAt.Equal(made.CreatedAt) {
			t.Errorf("created at %v, then %v", made.CreatedAt, got.CreatedAt)
		}
		_, err = s.Create(ctx, in)
		is(t, "create again", err, errdefs.ErrAlreadyExists)
		_, err = s.Get(ctx, "none")
		is(t, "get missing", err, errdefs.ErrNotFound)
	})
	t.Run("times given", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		epoch := time.Unix(1234567890, 0)
		if _, err := s.Create(ctx, image.Image{Name: "x", Target: Target("x"), CreatedAt: epoch}); err != nil {
			t.Fatal(err)
		}
		got, err := s.Get(ctx, "x")
		if err != nil || !got.CreatedAt.Equal(epoch) {
			t.Errorf("created at %v, %v; want %v", got.CreatedAt, err, epoch)
		}
		if _, err := s.Update(ctx, image.Image{Name: "x", Target: Target("y"), UpdatedAt: epoch.Add(time.Hour)}); err != nil {
			t.Fatal(err)
		}
		got, err = s.Get(ctx, "x")
		if err != nil || !got.UpdatedAt.Equal(epoch.Add(time.Hour)) || !got.CreatedAt.Equal(epoch) {
			t.Errorf("updated at %v, created at %v, %v", got.UpdatedAt, got.CreatedAt, err)
		}
	})
	t.Run("invalid", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		for name, change := range map[string]func(*image.Image){
			"no name":       func(i *image.Image) { i.Name = "" },
			"no digest":     func(i *image.Image) { i.Target.Digest = "" },
			"bad digest":    func(i *image.Image) { i.Target.Digest = "sha256:12" },
			"no size":       func(i *image.Image) { i.Target.Size = 0 },
			"negative size": func(i *image.Image) { i.Target.Size = -1 },
			"no media type": func(i *image.Image) { i.Target.MediaType = "" },
			"long label":    func(i *image.Image) { i.Labels = map[string]string{"k": strings.Repeat("v", ident.MaxLabel)} },
			"empty label":   func(i *image.Image) { i.Labels = map[string]string{"": "v"} },
		} {
			img := image.Image{Name: "x", Target: Target("x")}
			change(&img)
			_, err := s.Create(ctx, img)
			is(t, "create with "+name, err, errdefs.ErrInvalidArgument)
		}
		if l, err := s.List(ctx); err != nil || len(l) != 0 {
			t.Errorf("after refused creates: %v, %v", l, err)
		}
	})
	t.Run("list", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		for _, n := range []string{"c", "a", "b"} {
			img := image.Image{Name: n, Target: Target(n), Labels: map[string]string{"of": n, "x.y/z": "q"}}
			img.Target.Annotations = map[string]string{"note": n}
			if n == "b" {
				img.Target.MediaType = ocispec.MediaTypeImageIndex
			}
			if _, err := s.Create(ctx, img); err != nil {
				t.Fatal(err)
			}
		}
		for _, tc := range []struct {
			filters []string
			want    string
		}{
			{nil, "[a b c]"},
			{[]string{"name==b"}, "[b]"},
			{[]string{"name!=b"}, "[a c]"},
			{[]string{"name~=/^[ac]$/"}, "[a c]"},
			{[]string{"name==c", "name==a"}, "[a c]"},
			{[]string{"target.digest==" + Target("c").Digest.String()}, "[c]"},
			{[]string{"target.mediatype~=index"}, "[b]"},
			{[]string{"labels.of==a"}, "[a]"},
			{[]string{`labels."x.y/z"==q,name==a`}, "[a]"},
			{[]string{"annotations.note==c"}, "[c]"},
			{[]string{"labels.none"}, "[]"},
			{[]string{"color==red"}, "[]"},
		} {
			l, err := s.List(ctx, tc.filters...)
			names := []string{}
			for _, i := range l {
				names = append(names, i.Name)
			}
			if got := fmt.Sprint(names); err != nil || got != tc.want {
				t.Errorf("list %q: %s, %v; want %s", tc.filters, got, err, tc.want)
			}
		}
		_, err := s.List(ctx, "name==")
		is(t, "bad filter", err, errdefs.ErrInvalidArgument)
	})
	t.Run("update", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		img := image.Image{Name: "x", Target: Target("x"), Labels: map[string]string{"a": "1", "b.c": "2"}}
		img.Target.Annotations = map[string]string{"n": "1", "m": "2"}
		made, err := s.Create(ctx, img)
		if err != nil {
			t.Fatal(err)
		}
		change := image.Image{Name: "x", Target: Target("y"), Labels: map[string]string{"a": "9", "z": "9"}}
		change.Target.Annotations = map[string]string{"n": "9", "o": "9"}
		step := func(paths string, labels, annotations map[string]string, target string) {
			t.Helper()
			var f []string
			if paths != "" {
				f = strings.Split(paths, " ")
			}
			out, err := s.Update(ctx, change, f...)
			if err != nil {
				t.Fatalf("update %q: %v", paths, err)
			}
			got, err := s.Get(ctx, "x")
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range []image.Image{out, got} {
				if !maps.Equal(i.Labels, labels) || !maps.Equal(i.Target.Annotations, annotations) || i.Target.Digest != Target(target).Digest || !i.CreatedAt.Equal(made.CreatedAt) {
					t.Errorf("update %q: %+v", paths, i)
				}
			}
			if !got.UpdatedAt.After(made.UpdatedAt) {
				t.Errorf("update %q: updated at %v, was %v", paths, got.UpdatedAt, made.UpdatedAt)
			}
		}
		step("labels.a", map[string]string{"a": "9", "b.c": "2"}, map[string]string{"n": "1", "m": "2"}, "x")
		step("labels.b.c labels.z", map[string]string{"a": "9", "z": "9"}, map[string]string{"n": "1", "m": "2"}, "x")
		step("annotations.n", map[string]string{"a": "9", "z": "9"}, map[string]string{"n": "9", "m": "2"}, "x")
		step("annotations", map[string]string{"a": "9", "z": "9"}, map[string]string{"n": "9", "o": "9"}, "x")
		change.Labels = map[string]string{"only": "1"}
		step("labels", map[string]string{"only": "1"}, map[string]string{"n": "9", "o": "9"}, "x")
		change.Target.Annotations = map[string]string{"p": "1"}
		step("target", map[string]string{"only": "1"}, map[string]string{"p": "1"}, "y")
		change = image.Image{Name: "x", Target: Target("w"), Labels: map[string]string{"l": "1"}}
		step("", map[string]string{"l": "1"}, nil, "w")
		_, err = s.Update(ctx, change, "name")
		is(t, "update name", err, errdefs.ErrInvalidArgument)
		_, err = s.Update(ctx, change, "labels", "nonsense.x")
		is(t, "update nonsense", err, errdefs.ErrInvalidArgument)
		_, err = s.Update(ctx, image.Image{Name: "x"}, "target")
		is(t, "update to no target", err, errdefs.ErrInvalidArgument)
		_, err = s.Update(ctx, image.Image{Name: "none", Target: Target("x")})
		is(t, "update missing", err, errdefs.ErrNotFound)
		_, err = s.Update(ctx, image.Image{Name: "", Target: Target("x")})
		is(t, "update without name", err, errdefs.ErrInvalidArgument)
	})
	t.Run("delete", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		is(t, "delete missing", s.Delete(ctx, "x", image.DeleteOptions{}), errdefs.ErrNotFound)
		if _, err := s.Create(ctx, image.Image{Name: "x", Target: Target("x")}); err != nil {
			t.Fatal(err)
		}
		other, same := Target("y"), Target("x")
		is(t, "delete another target", s.Delete(ctx, "x", image.DeleteOptions{Target: &other}), errdefs.ErrNotFound)
		if _, err := s.Get(ctx, "x"); err != nil {
			t.Errorf("deleted all the same: %v", err)
		}
		if err := s.Delete(ctx, "x", image.DeleteOptions{Target: &same}); err != nil {
			t.Errorf("delete with its target: %v", err)
		}
		_, err := s.Get(ctx, "x")
		is(t, "get deleted", err, errdefs.ErrNotFound)
	})
	t.Run("concurrent create", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		var wg sync.WaitGroup
		errs := make([]error, 8)
		for i := range errs {
			wg.Go(func() { _, errs[i] = s.Create(ctx, image.Image{Name: "x", Target: Target("x")}) })
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else {
				is(t, "create by a loser", err, errdefs.ErrAlreadyExists)
			}
		}
		if won != 1 {
			t.Errorf("%d creates succeeded, want 1", won)
		}
	})
}

func is(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}
