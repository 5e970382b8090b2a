// Package leasetest checks that a lease.Store keeps what its interface
// promises. Every implementation passes it: memory, metadata, wire client.
package leasetest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/lease"
)

// Snapshotter is the name of the snapshotter that the suite leases snapshots
// of: a store that knows its snapshotters has to know this one.
const Snapshotter = "native"

// Run runs the suite; open returns a new empty store each time.
func Run(t *testing.T, open func(t *testing.T) lease.Store) {
	t.Run("create", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		in := lease.Lease{ID: "a lease/with: odd ☃ name", Labels: map[string]string{"k": "v", "gone": ""}}
		made, err := s.Create(ctx, in)
		if err != nil {
			t.Fatal(err)
		}
		l, err := s.List(ctx)
		if err != nil || len(l) != 1 {
			t.Fatalf("list: %v, %v", l, err)
		}
		for _, got := range []lease.Lease{made, l[0]} {
			if got.ID != in.ID || !maps.Equal(got.Labels, map[string]string{"k": "v"}) || time.Since(got.CreatedAt).Abs() > time.Minute {
				t.Errorf("got %+v", got)
			}
		}
		if !l[0].CreatedAt.Equal(made.CreatedAt) {
			t.Errorf("created at %v, then %v", made.CreatedAt, l[0].CreatedAt)
		}
		_, err = s.Create(ctx, in)
		is(t, "create again", err, errdefs.ErrAlreadyExists)
		_, err = s.Create(ctx, lease.Lease{ID: "x", Labels: map[string]string{"k": strings.Repeat("v", ident.MaxLabel)}})
		is(t, "long label", err, errdefs.ErrInvalidArgument)
		one, err := s.Create(ctx, lease.Lease{})
		if err != nil {
			t.Fatal(err)
		}
		two, err := s.Create(ctx, lease.Lease{})
		if err != nil {
			t.Fatal(err)
		}
		if one.ID == "" || two.ID == "" || one.ID == two.ID {
			t.Errorf("generated ids %q and %q", one.ID, two.ID)
		}
	})
	t.Run("list", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		for _, id := range []lease.ID{"c", "a", "b"} {
			if _, err := s.Create(ctx, lease.Lease{ID: id, Labels: map[string]string{"of": string(id)}}); err != nil {
				t.Fatal(err)
			}
		}
		for filter, want := range map[string]string{"": "[a b c]", "id==b": "[b]", "labels.of!=a": "[b c]", "labels.none": "[]"} {
			var fs []string
			if filter != "" {
				fs = []string{filter}
			}
			l, err := s.List(ctx, fs...)
			ids := []string{}
			for _, x := range l {
				ids = append(ids, string(x.ID))
			}
			slices.Sort(ids)
			if got := fmt.Sprint(ids); err != nil || got != want {
				t.Errorf("list %q: %s, %v; want %s", filter, got, err, want)
			}
		}
		_, err := s.List(ctx, "id==")
		is(t, "bad filter", err, errdefs.ErrInvalidArgument)
	})
	t.Run("resources", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		if _, err := s.Create(ctx, lease.Lease{ID: "l"}); err != nil {
			t.Fatal(err)
		}
		want := []lease.Resource{
			{Type: lease.TypeContent, ID: digest.FromString("x").String()},
			{Type: lease.TypeIngest, ID: "some ref"},
			{Type: lease.TypeImage, ID: "docker.io/library/x:1"},
			{Type: lease.SnapshotPrefix + Snapshotter, ID: "key/1"},
			{Type: lease.SnapshotPrefix + Snapshotter, ID: "key/2"},
			{Type: lease.TypeStream, ID: "stream"},
			{Type: lease.TypeMount, ID: "mount"},
		}
		if r, err := s.Resources(ctx, "l"); err != nil || len(r) != 0 {
			t.Errorf("resources of a new lease: %v, %v", r, err)
		}
		for range 2 { // the second time changes nothing
			for _, r := range want {
				if err := s.AddResource(ctx, "l", r); err != nil {
					t.Fatalf("add %+v: %v", r, err)
				}
			}
		}
		sorted := func(r []lease.Resource) []lease.Resource {
			slices.SortFunc(r, func(a, b lease.Resource) int { return strings.Compare(a.Type+"\x00"+a.ID, b.Type+"\x00"+b.ID) })
			return r
		}
		sorted(want)
		got, err := s.Resources(ctx, "l")
		if err != nil || !slices.Equal(sorted(got), want) {
			t.Errorf("resources: %v, %v; want %v", got, err, want)
		}
		for len(want) > 0 {
			for range 2 { // not being held is not an error
				if err := s.RemoveResource(ctx, "l", want[0]); err != nil {
					t.Fatalf("remove %+v: %v", want[0], err)
				}
			}
			want = want[1:]
			got, err := s.Resources(ctx, "l")
			if err != nil || !slices.Equal(sorted(got), want) {
				t.Errorf("resources: %v, %v; want %v", got, err, want)
			}
		}
		bad := lease.Resource{Type: "bananas", ID: "x"}
		is(t, "add unknown type", s.AddResource(ctx, "l", bad), errdefs.ErrNotImplemented)
		is(t, "remove unknown type", s.RemoveResource(ctx, "l", bad), errdefs.ErrNotImplemented)
		is(t, "add snapshot of no snapshotter", s.AddResource(ctx, "l", lease.Resource{Type: "snapshots", ID: "x"}), errdefs.ErrInvalidArgument)
		is(t, "add content that is no digest", s.AddResource(ctx, "l", lease.Resource{Type: lease.TypeContent, ID: "x"}), errdefs.ErrInvalidArgument)
		is(t, "add without id", s.AddResource(ctx, "l", lease.Resource{Type: lease.TypeIngest}), errdefs.ErrInvalidArgument)
		good := lease.Resource{Type: lease.TypeIngest, ID: "x"}
		is(t, "add to missing", s.AddResource(ctx, "none", good), errdefs.ErrNotFound)
		is(t, "remove from missing", s.RemoveResource(ctx, "none", good), errdefs.ErrNotFound)
		_, err = s.Resources(ctx, "none")
		is(t, "resources of missing", err, errdefs.ErrNotFound)
	})
	t.Run("delete", func(t *testing.T) {
		s, ctx := open(t), t.Context()
		is(t, "delete missing", s.Delete(ctx, "l", false), errdefs.ErrNotFound)
		if _, err := s.Create(ctx, lease.Lease{ID: "l"}); err != nil {
			t.Fatal(err)
		}
		if err := s.AddResource(ctx, "l", lease.Resource{Type: lease.TypeIngest, ID: "x"}); err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(ctx, "l", false); err != nil {
			t.Error(err)
		}
		_, err := s.Resources(ctx, "l")
		is(t, "resources of deleted", err, errdefs.ErrNotFound)
		if _, err := s.Create(ctx, lease.Lease{ID: "l"}); err != nil {
			t.Fatal(err)
		}
		if r, err := s.Resources(ctx, "l"); err != nil || len(r) != 0 {
			t.Errorf("a new lease of an old name holds %v, %v", r, err)
		}
	})
}

func is(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}
