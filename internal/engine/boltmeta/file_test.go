package boltmeta

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/image/imagetest"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/engine/overlay"
	"github.com/gantryd/gantry/internal/service/gc"
)

// dump prints every bucket, sequence and value of a bolt file.
func dump(t *testing.T, path string) string {
	t.Helper()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var out strings.Builder
	var walk func(b *bolt.Bucket, indent string) error
	walk = func(b *bolt.Bucket, indent string) error {
		return b.ForEach(func(k, v []byte) error {
			if v != nil {
				fmt.Fprintf(&out, "%s%q = %q\n", indent, k, v)
				return nil
			}
			s := b.Bucket(k)
			fmt.Fprintf(&out, "%s%q/ %d\n", indent, k, s.Sequence())
			return walk(s, indent+"  ")
		})
	}
	if err := db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(k []byte, b *bolt.Bucket) error {
			fmt.Fprintf(&out, "%q/ %d\n", k, b.Sequence())
			return walk(b, "  ")
		})
	}); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// recorded unpacks the root directory of a containerd 2.4 and returns its path.
func recorded(t *testing.T) string {
	t.Helper()
	f, err := os.Open("../testdata/containerd-2.4-root.tgz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return filepath.Join(dir, "root")
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, filepath.Clean("/"+h.Name))
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, 0o755)
		case tar.TypeReg:
			var data []byte
			if data, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(path, data, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

const (
	fixtureManifest = "sha256:9c5f62413dd0ecbba6c4d76d5935c248cdcdd7c15017170ec6c24497eefd6f5d"
	fixtureTop      = "sha256:f957df36e1bdbe564a2b59cf1ea0ec66cfbad4014d5ba320d392f73989a862d1"
)

// contract: 4.4.1, 4.4.3, 4.1.6, 3.1.3, 1.5.13
func TestRecordedRoot(t *testing.T) {
	root := recorded(t)
	path := filepath.Join(root, "io.containerd.metadata.v1.bolt/meta.db")
	before := dump(t, path)
	blobs, err := blobdir.Open(filepath.Join(root, "io.containerd.content.v1.content"), blobdir.Options{})
	if err != nil {
		t.Fatal(err)
	}
	opts := Options{Content: blobs, Snapshotters: map[string]snapshot.Store{"native": memory.NewSnapshots()}, OpenTimeout: time.Second}
	snaps, err := overlay.Open(filepath.Join(root, "io.containerd.snapshotter.v1.overlayfs"), overlay.Config{}, slog.New(slog.DiscardHandler))
	if err == nil {
		defer snaps.Close()
		opts.Snapshotters["overlayfs"] = snaps
	} else {
		t.Logf("without its snapshots: %v", err)
	}
	db, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	v := must(db.In("default", ""))(t)
	img := must(v.Images().Get(ctx, "example.test/fixture:1"))(t)
	if img.Target.Digest != fixtureManifest || img.Target.Size != 652 || img.Labels["team"] != "blue" ||
		img.Target.Annotations["org.opencontainers.image.ref.name"] != "example.test/fixture:1" || img.CreatedAt.Year() != 2026 {
		t.Errorf("image %+v", img)
	}
	n := 0
	if err := v.Content().Walk(ctx, func(i content.Info) error {
		r, err := v.Content().Open(ctx, i.Digest)
		if err != nil {
			return err
		}
		defer r.Close()
		if n++; r.Size() != i.Size {
			t.Errorf("%s has %d bytes, %d recorded", i.Digest, r.Size(), i.Size)
		}
		return nil
	}); err != nil || n != 5 {
		t.Errorf("%d blobs, %v", n, err)
	}
	c := must(v.Containers().Get(ctx, "box"))(t)
	if c.Runtime.Name != "io.containerd.runc.v2" || c.Runtime.Options.URL != "containerd.runc.v1.Options" || c.Snapshotter != "overlayfs" || c.SnapshotKey != "box" ||
		c.Spec.URL != "types.containerd.io/opencontainers/runtime-spec/1/Spec" || !bytes.HasPrefix(c.Spec.Value, []byte(`{"ociVersion"`)) || c.Labels["app"] != "demo" {
		t.Errorf("container %+v", c)
	}
	if l := must(v.Leases().List(ctx))(t); len(l) != 1 || l[0].ID != "keep" || l[0].Labels[lease.LabelExpire] != "2026-11-22T22:05:37Z" {
		t.Errorf("leases %+v", l)
	}
	if st := must(v.Content().Status(ctx, "part"))(t); st.Offset != 4 || st.Total != 100 {
		t.Errorf("ingest %+v", st)
	}
	if ns := must(db.Namespaces().Get(ctx, "second"))(t); ns.Labels["containerd.io/defaults/snapshotter"] != "native" {
		t.Errorf("namespace %+v", ns)
	}
	if snaps != nil {
		sn := must(v.Snapshots("overlayfs"))(t)
		if got := names(t, sn); strings.Count(got, " ") != 4 {
			t.Errorf("snapshots %q", got)
		}
		if i := must(sn.Stat(ctx, "scratch"))(t); i.Parent != fixtureTop || i.Kind != snapshot.KindActive {
			t.Errorf("snapshot %+v", i)
		}
		if m := must(sn.Mounts(ctx, "box"))(t); len(m) != 1 || m[0].Type != "overlay" {
			t.Errorf("mounts %+v", m)
		}
		for _, p := range db.Check(ctx) {
			t.Errorf("check: %s", p)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if after := dump(t, path); after != before {
		t.Errorf("opening and reading changed the file from:\n%s\nto:\n%s", before, after)
	}

	// What is written looks like what containerd writes: the same record again
	// gives the same bytes, but for the times.
	opts.Clock = func() time.Time { return c.CreatedAt }
	if db, err = Open(path, opts); err != nil {
		t.Fatal(err)
	}
	v = must(db.In("default", ""))(t)
	if err := v.Containers().Delete(ctx, "box"); err != nil {
		t.Fatal(err)
	}
	must(v.Containers().Create(ctx, c))(t)
	if err := v.Images().Delete(ctx, img.Name, image.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	must(v.Images().Create(ctx, img))(t)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	after := dump(t, path)
	b, a := strings.Split(before, "\n"), strings.Split(after, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] && !strings.Contains(b[i], `"updatedat"`) {
			t.Errorf("line %d was %s, is %s", i, b[i], a[i])
		}
	}
	if len(a) != len(b) {
		t.Errorf("%d lines, then %d", len(b), len(a))
	}

	opts.Clock = func() time.Time { return c.CreatedAt }
	if db, err = Open(path, opts); err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	// A collection finds nothing to delete but, when its day has come, the lease.
	if freed, err := gc.New(db, gc.Defaults(), nil).Collect(ctx); err != nil || freed.Blobs+freed.Snapshots+freed.Ingests > 0 || freed.Records > 1 {
		t.Errorf("collected %+v, %v", freed, err)
	}
}

// contract: 4.4.2
func TestMigrate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meta.db")
	old, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	bucket := func(tx *bolt.Tx, names ...string) *bolt.Bucket {
		b, err := tx.CreateBucketIfNotExists([]byte(names[0]))
		for _, n := range names[1:] {
			if err == nil {
				b, err = b.CreateBucketIfNotExists([]byte(n))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if err := old.Update(func(tx *bolt.Tx) error {
		stamp, _ := time.Unix(1e9, 0).UTC().MarshalBinary()
		for key, parent := range map[string]string{"p": "", "c": "p", "lost": "gone"} {
			b := bucket(tx, "v1", "n", "snapshots", "native", key)
			b.Put([]byte("name"), []byte("n/1/"+key))
			b.Put([]byte("createdat"), stamp)
			b.Put([]byte("updatedat"), stamp)
			if parent != "" {
				b.Put([]byte("parent"), []byte(parent))
			}
		}
		bucket(tx, "v1", "n", "content", "ingest").Put([]byte("some ref"), []byte("n/7/some ref"))
		sb := bucket(tx, "n", "sandboxes", "pod")
		sb.Put([]byte("createdat"), stamp)
		bucket(tx, "n", "sandboxes", "pod", "labels").Put([]byte("k"), []byte("v"))
		return bucket(tx, "v1").Put([]byte("version"), []byte{0})
	}); err != nil {
		t.Fatal(err)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	o := Options{Snapshotters: map[string]snapshot.Store{"native": memory.NewSnapshots()}}
	db, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	v := must(db.In("n", ""))(t)
	is(t, "remove a parent", must(v.Snapshots("native"))(t).Remove(t.Context(), "p"), errdefs.ErrFailedPrecondition)
	if sb := must(v.Sandboxes().Get(t.Context(), "pod"))(t); sb.Labels["k"] != "v" || sb.CreatedAt.Unix() != 1e9 {
		t.Errorf("sandbox %+v", sb)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	got := dump(t, path)
	for _, want := range []string{`"version" = "\b"`, `"some ref"/ 0`, `"ref" = "n/7/some ref"`, `"children"/ 0`} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in:\n%s", want, got)
		}
	}
	if strings.Contains(got, `"ingest"/`) || strings.HasPrefix(got, `"n"/`) {
		t.Errorf("the old buckets are still there:\n%s", got)
	}

	// A newer version is accepted and left alone.
	newer, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := newer.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte("v1")).Put([]byte("version"), []byte{18}) }); err != nil {
		t.Fatal(err)
	}
	if err := newer.Close(); err != nil {
		t.Fatal(err)
	}
	before := dump(t, path)
	if db, err = Open(path, o); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if dump(t, path) != before {
		t.Error("a newer schema was written to")
	}
}

// contract: 4.4.4, 13.41
func TestLocked(t *testing.T) {
	f := newFixture(t)
	began := time.Now()
	_, err := Open(f.path, Options{OpenTimeout: 100 * time.Millisecond})
	is(t, "open twice", err, errdefs.ErrUnavailable)
	if err != nil && !strings.Contains(err.Error(), f.path) {
		t.Errorf("message %q does not name the file", err)
	}
	if d := time.Since(began); d < 90*time.Millisecond || d > 5*time.Second {
		t.Errorf("waited %v", d)
	}
	// Another process is named.
	path := filepath.Join(t.TempDir(), "meta.db")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	flock, err := exec.LookPath("flock")
	if err != nil {
		t.Skip("flock, the command, is not installed")
	}
	cmd := exec.Command(flock, path, "sh", "-c", "echo locked; read x")
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	if _, err := io.ReadFull(out, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	_, err = Open(path, Options{OpenTimeout: 50 * time.Millisecond})
	is(t, "open what another process has", err, errdefs.ErrUnavailable)
	if err != nil && !strings.Contains(err.Error(), "process ") {
		t.Errorf("message %q does not name the process", err)
	}
	// It is waited for.
	done := make(chan error, 1)
	go func() {
		db, err := Open(path, Options{OpenTimeout: 20 * time.Second})
		if err == nil {
			err = db.Close()
		}
		done <- err
	}()
	in.Close()
	if err := <-done; err != nil {
		t.Errorf("open when it is free: %v", err)
	}
}

// fill makes a bit of everything.
func fill(t *testing.T, f *fixture) {
	t.Helper()
	ctx := t.Context()
	v := f.in("n")
	for i := range 60 {
		must(v.Containers().Create(ctx, container.Container{ID: container.ID(fmt.Sprintf("c%d", i)), Runtime: container.Runtime{Name: "r"},
			Spec: typed.Any{URL: "spec", Value: bytes.Repeat([]byte("spec"), 600)}, Labels: map[string]string{"a": "b"}}))(t)
		must(v.Images().Create(ctx, image.Image{Name: fmt.Sprintf("image-%d", i), Target: imagetest.Target("x")}))(t)
	}
	put(t, v.Content(), "blob", nil)
	must(f.snapshots(v).Prepare(ctx, "k", "", nil))(t)
	must(v.Leases().Create(ctx, lease.Lease{ID: "l"}))(t)
	must(v.Sandboxes().Create(ctx, sandbox.Sandbox{ID: "s"}))(t)
}

// TestDamage cuts the file off and flips bits in it. Opening it either says
// what is wrong, and touches nothing, or works; nothing panics.
//
// contract: 4.4.4
func TestDamage(t *testing.T) {
	f := newFixture(t)
	fill(t, f)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(f.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.open() // for the fixture's own cleanup
	path := filepath.Join(t.TempDir(), "meta.db")
	// The part in use; bolt grows the file by much more.
	used := 0
	if err := checkPagesOf(whole, func(high int) { used = high }); err != nil {
		t.Fatal(err)
	}
	whole = whole[:used]
	try := func(what string, data []byte) (opened bool) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		o := f.opts
		o.NoSync = true
		db, err := Open(path, o)
		if err != nil {
			if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), path) {
				t.Errorf("%s: %v", what, err)
			}
			if now, _ := os.ReadFile(path); !bytes.Equal(now, data) {
				t.Errorf("%s: a damaged file was written to", what)
			}
			return false
		}
		// What could be opened can be used: errors, not panics.
		v, err := db.In("n", "")
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		ctx := t.Context()
		db.Check(ctx)
		v.Images().List(ctx)
		v.Containers().Walk(ctx, func(container.Container) error { return nil })
		v.Images().Create(ctx, image.Image{Name: "new", Target: imagetest.Target("x")})
		v.Leases().Delete(ctx, "l", false)
		if err := db.Close(); err != nil {
			t.Errorf("%s: close: %v", what, err)
		}
		return true
	}
	if !try("whole", whole) {
		t.Error("the whole file does not open")
	}
	refused := 0
	for size := 1; size < used; size += used/40 + 1 {
		if try(fmt.Sprintf("cut off at %d", size), whole[:size]) {
			t.Errorf("opens though cut off at %d of %d", size, used)
		}
		refused++
	}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		data := bytes.Clone(whole)
		for range 1 + r.IntN(8) {
			switch at := r.IntN(used); r.IntN(3) {
			case 0:
				data[at] ^= 1 << r.IntN(8)
			case 1:
				clear(data[at:min(at+64, used)])
			default: // page headers are what everything depends on
				at = at / 4096 * 4096
				data[at+r.IntN(64)] ^= 0xff
			}
		}
		if !try(fmt.Sprintf("damage %d", i), data) {
			refused++
		}
	}
	if refused < 100 {
		t.Errorf("only %d damaged files were refused", refused)
	}
}

// checkPagesOf checks an image of a file and tells how many bytes are in use.
func checkPagesOf(data []byte, used func(int)) error {
	c := pageChecker{f: bytes.NewReader(data), size: int64(len(data)), seen: map[uint64]bool{0: true, 1: true}}
	if err := c.meta(); err != nil {
		return err
	}
	used(int(int64(c.high) * c.pageSize))
	return c.tree(c.root, 0)
}

// TestGroupCommit: callers share transactions, and each gets its own answer.
func TestGroupCommit(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	bad := errors.New("bad")
	var runs atomic.Int64
	write := func(name string, fail error, before bool) error {
		return f.update(ctx, func(tx *txn) error {
			runs.Add(1)
			if fail != nil && before {
				return fail
			}
			b, err := tx.make("n", "test")
			if err != nil {
				return err
			}
			if err := tx.put(b, name, []byte(name)); err != nil {
				return err
			}
			if name == "panics" {
				panic("what bolt says of a bad page")
			}
			return fail
		})
	}
	// Hold the lead until all the others have queued up.
	entered, leave := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	var once sync.Once
	go func() {
		first <- f.update(ctx, func(*txn) error {
			once.Do(func() { close(entered); <-leave })
			return nil
		})
	}()
	<-entered
	stats := f.bolt.Stats()
	cases := []struct {
		name   string
		fail   error
		before bool
	}{{"a", nil, false}, {"b", bad, true}, {"c", bad, false}, {"d", nil, false}, {"panics", nil, false}, {"e", nil, false}}
	errs := make([]error, len(cases))
	var wg sync.WaitGroup
	for i, c := range cases {
		wg.Go(func() { errs[i] = write(c.name, c.fail, c.before) })
	}
	canceled, cancel := context.WithCancel(ctx)
	gaveUp := make(chan error, 1)
	go func() {
		gaveUp <- f.update(canceled, func(*txn) error { t.Error("ran though its caller left"); return nil })
	}()
	queued := func() int {
		f.commits.mu.Lock()
		defer f.commits.mu.Unlock()
		return len(f.commits.queue)
	}
	for queued() < len(cases)+1 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	is(t, "the one that left", <-gaveUp, context.Canceled)
	close(leave)
	wg.Wait()
	if err := <-first; err != nil {
		t.Error(err)
	}
	for i, c := range cases {
		switch {
		case c.name == "panics":
			is(t, c.name, errs[i], errdefs.ErrDataLoss)
		default:
			is(t, c.name, errs[i], c.fail)
		}
	}
	got := ""
	if err := f.view(func(tx *txn) error {
		return tx.find("n", "test").ForEach(func(k, _ []byte) error { got += string(k); return nil })
	}); err != nil {
		t.Fatal(err)
	}
	if got != "ade" {
		t.Errorf("written %q, want ade", got)
	}
	// One commit for all, two attempts more for the two that had to be undone.
	if now := f.bolt.Stats(); now.TxStats.GetWrite() == stats.TxStats.GetWrite() {
		t.Error("nothing was written")
	}
	if n := runs.Load(); n > 6+5+4 {
		t.Errorf("%d runs of 6 calls", n)
	}
}

// BenchmarkRecords creates records from four writers, with syncs.
func BenchmarkRecords(b *testing.B) {
	db, err := Open(filepath.Join(b.TempDir(), "meta.db"), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	v, err := db.In("n", "")
	if err != nil {
		b.Fatal(err)
	}
	spec := typed.Any{URL: "spec", Value: bytes.Repeat([]byte("x"), 3000)}
	var n atomic.Int64
	var wg sync.WaitGroup
	b.ResetTimer()
	for range 4 {
		wg.Go(func() {
			for {
				i := n.Add(1)
				if i > int64(b.N) {
					return
				}
				if _, err := v.Containers().Create(context.Background(), container.Container{ID: container.ID(fmt.Sprintf("c%d", i)), Runtime: container.Runtime{Name: "r"}, Spec: spec}); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
}
