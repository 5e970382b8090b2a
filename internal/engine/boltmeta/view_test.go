package boltmeta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/image/imagetest"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/service/gc"
)

// collect is a full collection now.
func (f *fixture) collect() gc.Stats {
	f.t.Helper()
	s, err := gc.New(f.DB, gc.Defaults(), nil).Collect(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

// put stores a blob.
func put(t *testing.T, s content.Store, data string, labels map[string]string) digest.Digest {
	t.Helper()
	dgst := digest.FromString(data)
	w, err := s.Writer(t.Context(), "put-"+data, content.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := io.WriteString(w, data); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(t.Context(), int64(len(data)), dgst, labels); err != nil {
		t.Fatal(err)
	}
	return dgst
}

func blobs(t *testing.T, s content.Store) (out []string) {
	t.Helper()
	if err := s.Walk(t.Context(), func(i content.Info) error {
		out = append(out, i.Digest.String())
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func names(t *testing.T, s snapshot.Store) string {
	t.Helper()
	out := []string{}
	if err := s.Walk(t.Context(), func(i snapshot.Info) error {
		out = append(out, i.Name)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (f *fixture) lease(ns namespace.ID, id lease.ID) view.Records {
	f.t.Helper()
	must(f.in(ns).Leases().Create(f.t.Context(), lease.Lease{ID: id}))(f.t)
	return f.in(ns, id)
}

func held(t *testing.T, v view.Records, id lease.ID) string {
	t.Helper()
	var out []string
	for _, r := range must(v.Leases().Resources(t.Context(), id))(t) {
		out = append(out, r.Type+":"+r.ID)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// contract: 1.2.2, 1.2.3
func TestNamespaceIsImplicit(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	for _, bad := range []namespace.ID{"", "a/b", "version"} {
		_, err := f.In(bad, "")
		is(t, "namespace "+string(bad), err, errdefs.ErrInvalidArgument)
	}
	writes := map[namespace.ID]func(v view.Records) error{
		"image": func(v view.Records) error {
			_, err := v.Images().Create(ctx, image.Image{Name: "x", Target: imagetest.Target("x")})
			return err
		},
		"container": func(v view.Records) error {
			_, err := v.Containers().Create(ctx, container.Container{ID: "x", Runtime: container.Runtime{Name: "r"}})
			return err
		},
		"sandbox": func(v view.Records) error { _, err := v.Sandboxes().Create(ctx, sandbox.Sandbox{ID: "x"}); return err },
		"lease":   func(v view.Records) error { _, err := v.Leases().Create(ctx, lease.Lease{ID: "x"}); return err },
		"ingest": func(v view.Records) error {
			w, err := v.Content().Writer(ctx, "x", content.WriterOptions{})
			if err != nil {
				return err
			}
			return w.Close()
		},
		"snapshot": func(v view.Records) error { _, err := f.snapshots(v).Prepare(ctx, "x", "", nil); return err },
	}
	for ns, write := range writes {
		v := f.in(ns)
		must(v.Images().List(ctx))(t) // reading does not create
		if l := must(f.Namespaces().List(ctx))(t); slices.ContainsFunc(l, func(n namespace.Namespace) bool { return n.ID == ns }) {
			t.Errorf("%s exists before a write", ns)
		}
		if err := write(v); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for _, n := range must(f.Namespaces().List(ctx))(t) {
		got = append(got, string(n.ID))
	}
	if want := slices.Sorted(func(yield func(string) bool) {
		for ns := range writes {
			if !yield(string(ns)) {
				return
			}
		}
	}); !slices.Equal(got, want) {
		t.Errorf("namespaces %v, want %v", got, want)
	}
}

// contract: 1.3.28
func TestDeleteNamespaceInUse(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	v := f.in("n")
	must(v.Images().Create(ctx, image.Image{Name: "x", Target: imagetest.Target("x")}))(t)
	dgst := put(t, v.Content(), "blob", nil)
	must(v.Containers().Create(ctx, container.Container{ID: "x", Runtime: container.Runtime{Name: "r"}}))(t)
	must(f.snapshots(v).Prepare(ctx, "x", "", nil))(t)
	must(v.Leases().Create(ctx, lease.Lease{ID: "l"}))(t)
	must(v.Sandboxes().Create(ctx, sandbox.Sandbox{ID: "s"}))(t)
	for _, c := range []struct {
		in  string
		del func() error
	}{
		{"images, blobs, containers, snapshots of native", func() error { return v.Images().Delete(ctx, "x", image.DeleteOptions{}) }},
		{"has blobs, containers, snapshots of native", func() error { return v.Content().Delete(ctx, dgst) }},
		{"has containers, snapshots of native", func() error { return v.Containers().Delete(ctx, "x") }},
		{"has snapshots of native", func() error { return f.snapshots(v).Remove(ctx, "x") }},
	} {
		err := f.Namespaces().Delete(ctx, "n")
		is(t, "delete with "+c.in, err, errdefs.ErrFailedPrecondition)
		if err != nil && !strings.Contains(err.Error(), c.in) {
			t.Errorf("message %q does not name %s", err, c.in)
		}
		if err := c.del(); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Namespaces().Delete(ctx, "n"); err != nil {
		t.Errorf("delete with a lease and a sandbox: %v", err)
	}
}

// contract: 1.2.12, 1.6.1, 1.6.2, 1.6.3, 1.6.4, 1.6.5, 13.5
func TestEvents(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	v := f.in("n")
	step := func(what string, want ...string) {
		t.Helper()
		if got := f.events.take(); !slices.Equal(got, want) {
			t.Errorf("%s: events %q, want %q", what, got, want)
		}
	}
	must(f.Namespaces().Create(ctx, namespace.Namespace{ID: "n"}))(t)
	must(f.Namespaces().Update(ctx, namespace.Namespace{ID: "n"}))(t)
	step("namespace", "n /namespaces/create", "n /namespaces/update")
	img := image.Image{Name: "x", Target: imagetest.Target("x")}
	must(v.Images().Create(ctx, img))(t)
	_, err := v.Images().Create(ctx, img)
	is(t, "create again", err, errdefs.ErrAlreadyExists)
	must(v.Images().Update(ctx, img))(t)
	if err := v.Images().Delete(ctx, "x", image.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	is(t, "delete again", v.Images().Delete(ctx, "x", image.DeleteOptions{}), errdefs.ErrNotFound)
	step("image", "n /images/create", "n /images/update", "n /images/delete")
	c := container.Container{ID: "x", Runtime: container.Runtime{Name: "r"}}
	must(v.Containers().Create(ctx, c))(t)
	must(v.Containers().Update(ctx, c))(t)
	if err := v.Containers().Delete(ctx, "x"); err != nil {
		t.Fatal(err)
	}
	step("container", "n /containers/create", "n /containers/update", "n /containers/delete")
	dgst := put(t, v.Content(), "blob", nil)
	if err := v.Content().Delete(ctx, dgst); err != nil {
		t.Fatal(err)
	}
	step("content", "n /content/create", "n /content/delete")
	sn := f.snapshots(v)
	must(sn.Prepare(ctx, "a", "", nil))(t)
	if err := sn.Commit(ctx, "A", "a", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	must(sn.View(ctx, "v", "A", nil))(t)
	if err := sn.Remove(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	step("snapshot", "n /snapshot/prepare", "n /snapshot/commit", "n /snapshot/remove")
	if err := sn.Remove(ctx, "A"); err != nil {
		t.Fatal(err)
	}
	step("snapshot", "n /snapshot/remove")
	// What collection removes is told of as well, in its namespace.
	put(t, v.Content(), "garbage", nil)
	must(sn.Prepare(ctx, "g", "", nil))(t)
	must(v.Images().Create(ctx, image.Image{Name: "old", Target: imagetest.Target("x"), Labels: map[string]string{lease.LabelExpire: "2001-01-01T00:00:00Z"}}))(t)
	f.events.take()
	f.collect()
	got := f.events.take()
	slices.Sort(got)
	if want := []string{"n /content/delete", "n /images/delete", "n /snapshot/remove"}; !slices.Equal(got, want) {
		t.Errorf("collection: events %q, want %q", got, want)
	}
	if err := f.Namespaces().Delete(ctx, "n"); err != nil {
		t.Fatal(err)
	}
	step("namespace", "n /namespaces/delete")
}

// contract: 1.2.4, 13.14, 1.3.17
func TestLease(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	plain, v := f.in("n"), f.lease("n", "l")
	sn := f.snapshots(v)

	dgst := put(t, v.Content(), "blob", nil)
	must(sn.Prepare(ctx, "a", "", nil))(t)
	want := "content:" + dgst.String() + " snapshots/native:a"
	if got := held(t, v, "l"); got != want {
		t.Errorf("held %q, want %q", got, want)
	}
	if err := sn.Commit(ctx, "A", "a", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	must(sn.View(ctx, "v", "A", nil))(t)
	must(v.Images().Create(ctx, image.Image{Name: "root", Target: imagetest.Target("x")}))(t)
	must(v.Images().Create(ctx, image.Image{Name: "expires", Target: imagetest.Target("x"), Labels: map[string]string{lease.LabelExpire: "2001-01-01T00:00:00Z"}}))(t)
	w := must(v.Content().Writer(ctx, "open", content.WriterOptions{}))(t)
	defer w.Close()
	want = "content:" + dgst.String() + " images:expires ingests:open snapshots/native:A snapshots/native:v"
	if got := held(t, v, "l"); got != want {
		t.Errorf("held %q, want %q", got, want)
	}

	// What exists is held as well, and the answer stays AlreadyExists.
	two := f.lease("n", "two")
	_, err := two.Content().Writer(ctx, "again", content.WriterOptions{Expected: dgst})
	is(t, "expect what exists", err, errdefs.ErrAlreadyExists)
	_, err = f.snapshots(two).Prepare(ctx, "A", "", nil)
	is(t, "prepare what exists", err, errdefs.ErrAlreadyExists)
	_, err = f.snapshots(two).View(ctx, "v", "A", nil)
	is(t, "view what exists", err, errdefs.ErrAlreadyExists)
	_, err = two.Images().Create(ctx, image.Image{Name: "expires", Target: imagetest.Target("x"), Labels: map[string]string{lease.LabelExpire: "2001-01-01T00:00:00Z"}})
	is(t, "create what exists", err, errdefs.ErrAlreadyExists)
	if got, want := held(t, two, "two"), "content:"+dgst.String()+" images:expires snapshots/native:A snapshots/native:v"; got != want {
		t.Errorf("held %q, want %q", got, want)
	}
	w2 := must(two.Content().Writer(ctx, "bytes", content.WriterOptions{}))(t)
	io.WriteString(w2, "blob")
	is(t, "commit what exists", w2.Commit(ctx, 0, dgst, nil), errdefs.ErrAlreadyExists)

	// A lease that ended is ErrNotFound for all that would be created under it.
	if err := plain.Leases().Delete(ctx, "two", false); err != nil {
		t.Fatal(err)
	}
	sn2 := f.snapshots(two)
	must(f.snapshots(plain).Prepare(ctx, "b", "A", nil))(t)
	for what, do := range map[string]func() error{
		"image create": func() error {
			_, err := two.Images().Create(ctx, image.Image{Name: "n", Target: imagetest.Target("x")})
			return err
		},
		"image create of what exists": func() error {
			_, err := two.Images().Create(ctx, image.Image{Name: "root", Target: imagetest.Target("x")})
			return err
		},
		"writer": func() error { _, err := two.Content().Writer(ctx, "n", content.WriterOptions{}); return err },
		"writer of existing": func() error {
			_, err := two.Content().Writer(ctx, "n", content.WriterOptions{Expected: dgst})
			return err
		},
		"prepare": func() error { _, err := sn2.Prepare(ctx, "n", "", nil); return err },
		"prepare of existing": func() error {
			_, err := sn2.Prepare(ctx, "b", "A", nil)
			return err
		},
		"view":   func() error { _, err := sn2.View(ctx, "n", "A", nil); return err },
		"commit": func() error { return sn2.Commit(ctx, "B", "b", snapshot.CommitOptions{}) },
	} {
		is(t, what+" under a lease that ended", do(), errdefs.ErrNotFound)
	}
	if _, err := f.snapshots(plain).Stat(ctx, "b"); err != nil {
		t.Errorf("a refused commit changed the snapshot: %v", err)
	}
	// Everything else works under it.
	must(sn2.Stat(ctx, "b"))(t)
	must(two.Content().Info(ctx, dgst))(t)
	must(two.Images().Update(ctx, image.Image{Name: "root", Labels: map[string]string{"a": "b"}}, "labels"))(t)
	must(two.Containers().Create(ctx, container.Container{ID: "cc", Runtime: container.Runtime{Name: "r"}}))(t)
	for what, err := range map[string]error{
		"image delete":     two.Images().Delete(ctx, "root", image.DeleteOptions{}),
		"container delete": two.Containers().Delete(ctx, "cc"),
		"content delete":   two.Content().Delete(ctx, dgst),
	} {
		if err != nil {
			t.Errorf("%s under a lease that ended: %v", what, err)
		}
	}

	// What it held is collected, the rest is not.
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := plain.Leases().Delete(ctx, "l", false); err != nil {
		t.Fatal(err)
	}
	must(plain.Containers().Create(ctx, container.Container{ID: "c", Runtime: container.Runtime{Name: "r"}, Snapshotter: "native", SnapshotKey: "b"}))(t)
	f.collect()
	if got := names(t, f.snapshots(plain)); got != "A b" {
		t.Errorf("snapshots %q, want the container's and its parent", got)
	}
	if got := blobs(t, plain.Content()); len(got) != 0 {
		t.Errorf("blobs %q", got)
	}
	if got := blobs(t, f.opts.Content); len(got) != 0 {
		t.Errorf("blobs in the backend %q", got)
	}
}

// contract: 4.1.7, 4.1.9, 1.5.12, 13.6
func TestSharing(t *testing.T) {
	for _, policy := range []string{"", SharingShared, SharingIsolated} {
		t.Run("policy "+policy, func(t *testing.T) {
			f := newFixture(t, func(o *Options) { o.SharingPolicy = policy })
			ctx := t.Context()
			a, b := f.in("a").Content(), f.in("b").Content()
			dgst := put(t, a, "data", map[string]string{"l": "a", "containerd.io/gc.root": "1"})
			_, err := b.Open(ctx, dgst)
			is(t, "open in another namespace", err, errdefs.ErrNotFound)
			_, err = b.Info(ctx, dgst)
			is(t, "info in another namespace", err, errdefs.ErrNotFound)

			complete := func(w content.Writer) bool {
				st := must(w.Status())(t)
				return st.Offset == 4 && st.Total == 4
			}
			w := must(b.Writer(ctx, "w", content.WriterOptions{Expected: dgst, Total: 4}))(t)
			if complete(w) != (policy != SharingIsolated) {
				t.Errorf("status %+v", must(w.Status())(t))
			}
			if policy == SharingIsolated {
				if err := w.Commit(ctx, 4, dgst, nil); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("commit without bytes: %v", err)
				}
				w.Close()
				must(f.Namespaces().Update(ctx, namespace.Namespace{ID: "a", Labels: map[string]string{labelShareable: "true"}}))(t)
				w = must(b.Writer(ctx, "w", content.WriterOptions{Expected: dgst}))(t)
				if !complete(w) {
					t.Errorf("status of a shareable namespace's blob %+v", must(w.Status())(t))
				}
			}
			if st := must(b.Status(ctx, "w"))(t); st.Offset != 4 || st.Ref != "w" {
				t.Errorf("status %+v", st)
			}
			// While b only intends to have it, a loses it: it must stay.
			if err := a.Delete(ctx, dgst); err != nil {
				t.Fatal(err)
			}
			f.collect()
			is(t, "another digest", w.Commit(ctx, 0, digest.FromString("x"), nil), errdefs.ErrFailedPrecondition)
			is(t, "another size", w.Commit(ctx, 5, "", nil), errdefs.ErrFailedPrecondition)
			if err := w.Commit(ctx, 4, dgst, map[string]string{"l": "b"}); err != nil {
				t.Fatal(err)
			}
			if i := must(b.Info(ctx, dgst))(t); !maps.Equal(i.Labels, map[string]string{"l": "b"}) || i.Size != 4 {
				t.Errorf("info %+v", i)
			}
			r := must(b.Open(ctx, dgst))(t)
			defer r.Close()
			if got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size())); err != nil || string(got) != "data" {
				t.Errorf("read %q, %v", got, err)
			}
			_, err = b.Status(ctx, "w")
			is(t, "status after the commit", err, errdefs.ErrNotFound)
		})
	}
	t.Run("bytes after all", func(t *testing.T) {
		f := newFixture(t)
		ctx := t.Context()
		dgst := put(t, f.in("a").Content(), "data", nil)
		b := f.in("b").Content()
		w := must(b.Writer(ctx, "w", content.WriterOptions{Expected: dgst}))(t)
		if _, err := io.WriteString(w, "x"); err == nil {
			t.Error("wrote beyond the end")
		}
		if err := w.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if st := must(w.Status())(t); st.Offset != 0 {
			t.Errorf("status %+v", st)
		}
		if _, err := io.WriteString(w, "data"); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(ctx, 4, dgst, nil); err != nil {
			t.Fatal(err)
		}
	})
}

// contract: 4.1.8
func TestIngestExpiry(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	plain, leased := f.in("n").Content(), f.lease("n", "l").Content()
	for _, ref := range []string{"old", "open"} {
		w := must(plain.Writer(ctx, ref, content.WriterOptions{}))(t)
		io.WriteString(w, ref)
		if ref == "open" {
			defer w.Close()
		} else {
			w.Close()
		}
	}
	w := must(leased.Writer(ctx, "leased", content.WriterOptions{}))(t)
	w.Close()
	refs := func() string {
		var out []string
		for _, st := range must(plain.Statuses(ctx))(t) {
			out = append(out, st.Ref)
		}
		return strings.Join(out, " ")
	}
	f.clock.advance(23 * time.Hour)
	f.collect()
	if got := refs(); got != "leased old open" {
		t.Errorf("a day later less an hour: %q", got)
	}
	f.clock.advance(2 * time.Hour)
	f.collect()
	if got := refs(); got != "leased open" {
		t.Errorf("a day later: %q", got)
	}
	if got := must(f.opts.Content.Statuses(ctx))(t); len(got) != 2 {
		t.Errorf("in the backend: %v", got)
	}
	if err := f.in("n").Leases().Delete(ctx, "l", false); err != nil {
		t.Fatal(err)
	}
	f.collect()
	if got := refs(); got != "open" {
		t.Errorf("without the lease: %q", got)
	}
	// Opening an ingest again extends it.
	w = must(plain.Writer(ctx, "kept", content.WriterOptions{}))(t)
	w.Close()
	f.clock.advance(23 * time.Hour)
	w = must(plain.Writer(ctx, "kept", content.WriterOptions{}))(t)
	w.Close()
	f.clock.advance(2 * time.Hour)
	f.collect()
	if got := refs(); got != "kept open" {
		t.Errorf("after opening it again: %q", got)
	}
}

// contract: 3.1.3, 1.5.16
func TestSnapshotBackend(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	back := f.opts.Snapshotters["native"]
	a, b := f.snapshots(f.in("a")), f.snapshots(f.in("b"))
	labels := map[string]string{"mine": "1", "containerd.io/gc.root": "x", "containerd.io/snapshot/x": "2", "containerd.io/snapshotx": "3"}
	must(a.Prepare(ctx, "k", "", labels))(t)
	must(b.Prepare(ctx, "k", "", nil))(t)
	for _, c := range []struct {
		key    string
		labels map[string]string
	}{{"a/1/k", map[string]string{"containerd.io/snapshot/x": "2"}}, {"b/1/k", nil}} {
		i := must(back.Stat(ctx, c.key))(t)
		if !maps.Equal(i.Labels, c.labels) {
			t.Errorf("%s in the backend: %v", c.key, i.Labels)
		}
	}
	if i := must(a.Stat(ctx, "k"))(t); !maps.Equal(i.Labels, labels) || i.Kind != snapshot.KindActive || i.Name != "k" {
		t.Errorf("stat %+v", i)
	}
	must(a.Update(ctx, snapshot.Info{Name: "k", Labels: map[string]string{"containerd.io/snapshot/x": "9", "mine": "8"}}, "labels.containerd.io/snapshot/x", "labels.mine"))(t)
	if i := must(back.Stat(ctx, "a/1/k"))(t); !maps.Equal(i.Labels, map[string]string{"containerd.io/snapshot/x": "9"}) {
		t.Errorf("in the backend after an update: %v", i.Labels)
	}
	if err := a.Commit(ctx, "K", "k", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	must(a.Prepare(ctx, "c", "K", nil))(t)
	if i := must(back.Stat(ctx, "a/3/c"))(t); i.Parent != "a/2/K" {
		t.Errorf("parent in the backend %q", i.Parent)
	}
	_, err := b.Prepare(ctx, "c", "K", nil)
	is(t, "parent in another namespace", err, errdefs.ErrNotFound)
	_, err = f.in("a").Snapshots("none")
	is(t, "unknown snapshotter", err, errdefs.ErrInvalidArgument)
	if !strings.Contains(err.Error(), "snapshotter not loaded: none") {
		t.Errorf("message %q", err)
	}
	// Removing takes the name at once and the data with the next collection.
	if err := a.Remove(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	must(back.Stat(ctx, "a/3/c"))(t)
	f.reopen()
	f.collect()
	if got := names(t, back); got != "" {
		t.Errorf("left in the backend: %q", got)
	}
	must(f.snapshots(f.in("a")).Prepare(ctx, "n", "", nil))(t)
	if _, err := back.Stat(ctx, "a/4/n"); err != nil {
		t.Errorf("numbers do not go on after a restart: %v, %q", err, names(t, back))
	}
}

// remote is a snapshotter that has some layers already.
type remote struct {
	snapshot.Store
	has map[string]bool
}

func (r *remote) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	target := labels[snapshot.LabelRef]
	if !r.has[target] {
		return r.Store.Prepare(ctx, key, parent, labels)
	}
	if _, err := r.Store.Prepare(ctx, key, parent, labels); err != nil {
		return nil, err
	}
	if err := r.Store.Commit(ctx, key+"-remote", key, snapshot.CommitOptions{Labels: labels}); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("target %s: %w", target, errdefs.ErrAlreadyExists)
}

// contract: 3.1.4, 13.9, 1.5.15
func TestRemoteSnapshotter(t *testing.T) {
	r := &remote{memory.NewSnapshots(), map[string]bool{"sha256:one": true, "sha256:two": true}}
	f := newFixture(t, func(o *Options) { o.Snapshotters["native"] = r })
	ctx := t.Context()
	v := f.lease("n", "l")
	sn := f.snapshots(v)
	prepare := func(key, parent, target string) error {
		_, err := sn.Prepare(ctx, key, parent, map[string]string{snapshot.LabelRef: target, "own": "1"})
		return err
	}
	is(t, "first layer", prepare("x1", "", "sha256:one"), errdefs.ErrAlreadyExists)
	if i := must(sn.Stat(ctx, "sha256:one"))(t); i.Kind != snapshot.KindCommitted || i.Parent != "" || i.Labels["own"] != "1" {
		t.Errorf("stat %+v", i)
	}
	_, err := sn.Stat(ctx, "x1")
	is(t, "the key", err, errdefs.ErrNotFound)
	is(t, "second layer", prepare("x2", "sha256:one", "sha256:two"), errdefs.ErrAlreadyExists)
	if i := must(sn.Stat(ctx, "sha256:two"))(t); i.Parent != "sha256:one" {
		t.Errorf("stat %+v", i)
	}
	// A third one it has not: the client unpacks.
	if err := prepare("x3", "sha256:two", "sha256:three"); err != nil {
		t.Fatal(err)
	}
	if err := sn.Commit(ctx, "sha256:three", "x3", snapshot.CommitOptions{Labels: map[string]string{snapshot.LabelRef: "sha256:three"}}); err != nil {
		t.Fatal(err)
	}
	// What is known is answered without the backend.
	r.has = nil
	is(t, "again", prepare("x4", "", "sha256:one"), errdefs.ErrAlreadyExists)
	is(t, "again what was unpacked", prepare("x5", "sha256:two", "sha256:three"), errdefs.ErrAlreadyExists)
	if got, want := held(t, v, "l"), "snapshots/native:sha256:one snapshots/native:sha256:three snapshots/native:sha256:two"; got != want {
		t.Errorf("held %q, want %q", got, want)
	}
	f.collect()
	if got := names(t, sn); got != "sha256:one sha256:three sha256:two" {
		t.Errorf("after a collection: %q", got)
	}
}

// contract: 3.1.5, 13.10
func TestRebase(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	sn := f.snapshots(f.in("n"))
	for _, k := range []string{"1", "2", "3"} { // in parallel, on nothing
		must(sn.Prepare(ctx, "p"+k, "", nil))(t)
	}
	parent := ""
	for _, k := range []string{"1", "2", "3"} {
		if err := sn.Commit(ctx, "c"+k, "p"+k, snapshot.CommitOptions{Parent: parent, Labels: map[string]string{"containerd.io/gc.root": "1"}}); err != nil {
			t.Fatal(err)
		}
		parent = "c" + k
	}
	if i := must(sn.Stat(ctx, "c3"))(t); i.Parent != "c2" {
		t.Errorf("stat %+v", i)
	}
	is(t, "remove a parent", sn.Remove(ctx, "c1"), errdefs.ErrFailedPrecondition)
	must(sn.Prepare(ctx, "x", "c1", nil))(t)
	is(t, "rebase what has a parent", sn.Commit(ctx, "X", "x", snapshot.CommitOptions{Parent: "c2"}), errdefs.ErrInvalidArgument)
	must(sn.Prepare(ctx, "y", "", nil))(t)
	is(t, "rebase on nothing", sn.Commit(ctx, "Y", "y", snapshot.CommitOptions{Parent: "none"}), errdefs.ErrNotFound)
	if err := sn.Commit(ctx, "X", "x", snapshot.CommitOptions{Parent: "c1"}); err != nil {
		t.Errorf("commit that names its own parent: %v", err)
	}
}

// contract: 1.2.8
func TestFilters(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	v := f.in("n")
	dgst := put(t, v.Content(), "four", map[string]string{"x.y/z": "1"})
	put(t, v.Content(), "other", nil)
	for filter, want := range map[string]int{"digest==" + dgst.String(): 1, "size==4": 1, `labels."x.y/z"==1`: 1, "labels.none": 0, "size!=4": 1, "digest~=/^sha256:/": 2} {
		n := 0
		if err := v.Content().Walk(ctx, func(content.Info) error { n++; return nil }, filter); err != nil || n != want {
			t.Errorf("content %s: %d, %v; want %d", filter, n, err, want)
		}
	}
	for _, ref := range []string{"one", "two"} {
		must(v.Content().Writer(ctx, ref, content.WriterOptions{}))(t).Close()
	}
	if l := must(v.Content().Statuses(ctx, "ref~=^o"))(t); len(l) != 1 || l[0].Ref != "one" {
		t.Errorf("ingests: %v", l)
	}
	sn := f.snapshots(v)
	must(sn.Prepare(ctx, "a", "", nil))(t)
	if err := sn.Commit(ctx, "A", "a", snapshot.CommitOptions{Labels: map[string]string{"l": "1"}}); err != nil {
		t.Fatal(err)
	}
	must(sn.View(ctx, "v", "A", nil))(t)
	must(sn.Prepare(ctx, "b", "A", nil))(t)
	for filter, want := range map[string]string{"kind==committed": "A", "kind==active": "b", "kind==view": "v", "name==A": "A", "parent==A": "b v", "labels.l==1": "A"} {
		var got []string
		if err := sn.Walk(ctx, func(i snapshot.Info) error { got = append(got, i.Name); return nil }, filter); err != nil || strings.Join(got, " ") != want {
			t.Errorf("snapshots %s: %q, %v; want %q", filter, got, err, want)
		}
	}
	bad := "name=="
	for what, err := range map[string]error{
		"content":   v.Content().Walk(ctx, func(content.Info) error { return nil }, bad),
		"snapshots": sn.Walk(ctx, func(snapshot.Info) error { return nil }, bad),
		"ingests":   func() error { _, err := v.Content().Statuses(ctx, bad); return err }(),
	} {
		is(t, what, err, errdefs.ErrInvalidArgument)
	}
}

// sick is a backend that fails, or does not answer until its deadline.
type sick struct {
	snapshot.Store
	removes int
	err     error
}

func (s *sick) Remove(context.Context, string) error { s.removes++; return s.err }

// contract: 4.3.2, 4.3.3
// promise: P10
func TestSickBackendHarmsOnlyItself(t *testing.T) {
	s := &sick{Store: memory.NewSnapshots(), err: fmt.Errorf("remove: %w", context.DeadlineExceeded)}
	f := newFixture(t, func(o *Options) { o.Snapshotters["other"] = s })
	ctx := t.Context()
	v := f.in("n")
	bad := must(v.Snapshots("other"))(t)
	for _, k := range []string{"a", "b", "c"} {
		must(bad.Prepare(ctx, k, "", nil))(t)
	}
	must(f.snapshots(v).Prepare(ctx, "a", "", nil))(t)
	put(t, v.Content(), "blob", nil)
	c := gc.New(f.DB, gc.Defaults(), nil)
	_, err := c.Collect(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "snapshots of other") {
		t.Errorf("collect: %v", err)
	}
	if n := names(t, f.opts.Snapshotters["native"]) + strings.Join(blobs(t, f.opts.Content), ""); n != "" {
		t.Errorf("the other backends kept %q", n)
	}
	if s.removes != 1 {
		t.Errorf("%d deletions were tried, want 1", s.removes)
	}
	// It is left alone for a while, then tried again.
	must(f.snapshots(v).Prepare(ctx, "a", "", nil))(t)
	if _, err := c.Collect(ctx); err != nil || s.removes != 1 {
		t.Errorf("next collection: %v, %d deletions tried", err, s.removes)
	}
	f.clock.advance(sickTime + time.Second)
	s.err = nil
	if _, err := c.Collect(ctx); err != nil || s.removes != 4 {
		t.Errorf("later: %v, %d deletions tried", err, s.removes)
	}
	// What nobody changed is not walked.
	s.removes = 0
	if _, err := c.Collect(ctx); err != nil || s.removes != 0 {
		t.Errorf("after that: %v, %d deletions tried", err, s.removes)
	}
}

// slow is a backend whose deletions wait.
type slow struct {
	snapshot.Store
	in, out chan struct{}
}

func (s *slow) Remove(ctx context.Context, key string) error {
	s.in <- struct{}{}
	<-s.out
	return s.Store.Remove(ctx, key)
}

// promise: P10
func TestReclaimBlocksNobody(t *testing.T) {
	s := &slow{memory.NewSnapshots(), make(chan struct{}), make(chan struct{})}
	f := newFixture(t, func(o *Options) { o.Snapshotters["native"] = s })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	v := f.in("n")
	sn := f.snapshots(v)
	must(sn.Prepare(ctx, "gone", "", nil))(t)
	done := make(chan error, 1)
	go func() {
		_, err := gc.New(f.DB, gc.Defaults(), nil).Collect(context.Background())
		done <- err
	}()
	<-s.in // it is deleting
	must(sn.Prepare(ctx, "gone", "", nil))(t)
	must(sn.View(ctx, "v", "", nil))(t)
	if err := sn.Commit(ctx, "c", "gone", snapshot.CommitOptions{}); err != nil {
		t.Error(err)
	}
	must(v.Images().Create(ctx, image.Image{Name: "x", Target: imagetest.Target("x")}))(t)
	put(t, v.Content(), "blob", nil)
	if got := names(t, sn); got != "c v" {
		t.Errorf("snapshots %q", got)
	}
	close(s.out)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := names(t, sn); got != "c v" {
		t.Errorf("snapshots after it: %q", got)
	}
}

// hooked calls after behind each successful Commit.
type hooked struct {
	snapshot.Store
	after func()
}

func (h *hooked) Commit(ctx context.Context, name, key string, o snapshot.CommitOptions) error {
	err := h.Store.Commit(ctx, name, key, o)
	if err == nil && h.after != nil {
		h.after()
	}
	return err
}

// TestLeaseEndsWithinCommit: the backend has committed, the records cannot.
//
// contract: 1.2.4
func TestLeaseEndsWithinCommit(t *testing.T) {
	h := &hooked{Store: memory.NewSnapshots()}
	f := newFixture(t, func(o *Options) { o.Snapshotters["native"] = h })
	ctx := t.Context()
	sn := f.snapshots(f.lease("n", "l"))
	must(sn.Prepare(ctx, "k", "", nil))(t)
	h.after = func() {
		if err := f.in("n").Leases().Delete(ctx, "l", false); err != nil {
			t.Error(err)
		}
	}
	is(t, "commit", sn.Commit(ctx, "K", "k", snapshot.CommitOptions{}), errdefs.ErrNotFound)
	if got := names(t, sn) + names(t, h.Store); got != "" {
		t.Errorf("left: %q", got)
	}
	f.fsck() // no record without data
}

// TestAdoptWhileReclaiming: a snapshot that the backend made by itself is
// adopted between the moment a collection listed it and its deletion.
//
// contract: 3.1.4
// promise: P9
func TestAdoptWhileReclaiming(t *testing.T) {
	r := &removing{remote: remote{memory.NewSnapshots(), map[string]bool{"sha256:one": true}}}
	f := newFixture(t, func(o *Options) { o.Snapshotters["native"] = r })
	ctx := t.Context()
	sn := f.snapshots(f.lease("n", "l"))
	must(sn.Prepare(ctx, "other", "", nil))(t)
	// These are in the backend, and no record names them.
	must(r.Prepare(ctx, "n/70/x", "", nil))(t)
	if _, err := r.Prepare(ctx, "n/77/x", "", map[string]string{snapshot.LabelRef: "sha256:one"}); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	r.removes = func() {
		r.removes = nil
		_, err := sn.Prepare(ctx, "k", "", map[string]string{snapshot.LabelRef: "sha256:one"})
		is(t, "prepare", err, errdefs.ErrAlreadyExists)
	}
	f.collect()
	if i := must(sn.Stat(ctx, "sha256:one"))(t); i.Kind != snapshot.KindCommitted {
		t.Errorf("stat %+v", i)
	}
	f.due("native")
	f.collect()
	must(sn.Stat(ctx, "sha256:one"))(t)
	// Once nobody names it, it goes.
	if err := sn.Remove(ctx, "sha256:one"); err != nil {
		t.Fatal(err)
	}
	f.collect()
	if got := names(t, r.Store); strings.Count(got, " ") != 0 {
		t.Errorf("in the backend: %q", got)
	}
}

// removing calls removes before a Remove.
type removing struct {
	remote
	removes func()
}

func (r *removing) Remove(ctx context.Context, key string) error {
	if r.removes != nil {
		r.removes()
	}
	return r.remote.Remove(ctx, key)
}
