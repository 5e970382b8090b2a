package boltmeta

import (
	"bufio"
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
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/engine/native"
	"github.com/gantryd/gantry/internal/service/gc"
)

// TestCrashBetweenHalves leaves what a crash between the backend's half and
// the metadata's half of each operation leaves, and restarts.
//
// contract: 3.1.8, 4.3.2
// promise: P9
func TestCrashBetweenHalves(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	back := f.opts.Snapshotters["native"]
	sn := f.snapshots(f.in("n"))
	root := snapshot.CommitOptions{Labels: map[string]string{"containerd.io/gc.root": "1"}}
	must(sn.Prepare(ctx, "base-key", "", nil))(t)
	if err := sn.Commit(ctx, "base", "base-key", root); err != nil {
		t.Fatal(err)
	}
	keep := map[string]string{"containerd.io/gc.root": "1"}
	must(sn.Prepare(ctx, "working", "base", keep))(t) // n/3/working
	must(sn.Prepare(ctx, "other", "base", keep))(t)   // n/4/other

	// Prepare: the backend has n/5/new, no record.
	must(back.Prepare(ctx, "n/5/new", "n/2/base", nil))(t)
	// Commit: the backend has made n/6/done of n/3/working; the record still says working.
	if err := back.Commit(ctx, "n/6/done", "n/3/working", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	// Remove: the record is gone, the data is not.
	if err := sn.Remove(ctx, "other"); err != nil {
		t.Fatal(err)
	}
	// Content: the blob is committed, its ingest has a record only; another
	// ingest is aborted in the records only.
	dgst := digest.FromString("data")
	v := f.in("n").Content()
	w := must(v.Writer(ctx, "committed", content.WriterOptions{}))(t)
	w.Close()
	bw := must(f.opts.Content.Writer(ctx, "n/1/committed", content.WriterOptions{}))(t)
	io.WriteString(bw, "data")
	if err := bw.Commit(ctx, 4, dgst, nil); err != nil {
		t.Fatal(err)
	}
	bw = must(f.opts.Content.Writer(ctx, "n/2/aborted", content.WriterOptions{}))(t)
	io.WriteString(bw, "half")
	bw.Close()

	f.reopen()
	sn, v = f.snapshots(f.in("n")), f.in("n").Content()
	// The same operations work again, past the leftovers.
	must(sn.Prepare(ctx, "new", "base", keep))(t)
	if i := must(sn.Stat(ctx, "new"))(t); i.Parent != "base" {
		t.Errorf("stat %+v", i)
	}
	is(t, "status of what was committed", func() error { _, err := v.Status(ctx, "committed"); return err }(), errdefs.ErrNotFound)
	must(v.Statuses(ctx))(t)
	f.collect()
	f.fsck()
	if got := names(t, sn); got != "base new" {
		t.Errorf("snapshots %q", got)
	}
	if got := strings.Count(names(t, back), " "); got != 1 {
		t.Errorf("in the backend %q", names(t, back))
	}
	if got := blobs(t, f.opts.Content); len(got) != 0 {
		t.Errorf("blobs in the backend %q", got)
	}
	if got := must(f.opts.Content.Statuses(ctx))(t); len(got) != 0 {
		t.Errorf("ingests in the backend %v", got)
	}
	if got := put(t, v, "data", nil); got != dgst {
		t.Error(got)
	}
}

// TestLostDataKeepsItsRecord: a snapshotter that comes up empty does not cost
// the records, and Check reports it.
func TestLostDataKeepsItsRecord(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	must(f.snapshots(f.in("n")).Prepare(ctx, "a", "", map[string]string{"containerd.io/gc.root": "1"}))(t)
	kept := f.opts.Snapshotters["native"]
	f.opts.Snapshotters = map[string]snapshot.Store{"native": memory.NewSnapshots()}
	f.reopen()
	f.collect()
	if p := f.Check(ctx); len(p) != 1 || !strings.Contains(p[0].String(), "n/native/a: its data n/1/a is missing") {
		t.Errorf("check: %v", p)
	}
	f.opts.Snapshotters["native"] = kept
	f.reopen()
	if got := names(t, f.snapshots(f.in("n"))); got != "a" {
		t.Errorf("snapshots %q", got)
	}
}

// TestCheck finds what is wrong.
func TestCheck(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	v := f.in("n")
	sn := f.snapshots(v)
	keep := map[string]string{"containerd.io/gc.root": "1"}
	gone := put(t, v.Content(), "gone", keep)
	size := put(t, v.Content(), "size", keep)
	for _, k := range []string{"p", "q"} {
		must(sn.Prepare(ctx, k+"-key", "", nil))(t)
		if err := sn.Commit(ctx, k, k+"-key", snapshot.CommitOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	must(sn.Prepare(ctx, "c", "p", nil))(t)
	must(v.Leases().Create(ctx, lease.Lease{ID: "l"}))(t)
	f.fsck()
	if err := f.opts.Content.Delete(ctx, gone); err != nil {
		t.Fatal(err)
	}
	if err := f.update(ctx, func(tx *txn) error {
		b := tx.find("n", kSnapshots, "native", "c")
		if err := tx.put(b, kParent, []byte("q")); err != nil {
			return err
		}
		if err := tx.put(tx.find("n", kContent, kBlob, size.String()), kSize, varint(7)); err != nil {
			return err
		}
		lb, err := tx.make("n", kLeases, "l", kContent)
		if err != nil {
			return err
		}
		return tx.put(lb, "not a digest", nil)
	}); err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(f.Check(ctx))
	for _, want := range []string{"content n/" + gone.String() + ": the blob is missing", "the record says 7 bytes, the blob has 4", `does not list it as a child`,
		`"c" is listed as a child and is none`, `its data is on top of`, `lease n/l: lease resource "content": digest "not a digest"`} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
	// Put it right for the fixture's own check.
	if err := f.update(ctx, func(tx *txn) error {
		tx.put(tx.find("n", kSnapshots, "native", "c"), kParent, []byte("p"))
		tx.put(tx.find("n", kContent, kBlob, size.String()), kSize, varint(4))
		return tx.drop(tx.find("n", kLeases, "l", kContent), "not a digest")
	}); err != nil {
		t.Fatal(err)
	}
	if err := v.Content().Delete(ctx, gone); err != nil {
		t.Fatal(err)
	}
}

// TestPullsAndCollections runs pulls under leases, prunes and collections at
// the same time. What a pull has made is there until its lease ends, and what
// its image leads to until the image is deleted.
//
// contract: 4.2.4, 4.2.5, 4.3.1
// promise: P9
func TestPullsAndCollections(t *testing.T) {
	blobStore, err := blobdir.Open(t.TempDir(), blobdir.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	f := newFixture(t, func(o *Options) { o.Content = blobStore })
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := gc.New(f.DB, gc.Defaults(), nil)
	stop := make(chan struct{})
	var collector, pullers sync.WaitGroup
	collector.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := c.Collect(ctx); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	// The same few layers in all pulls: they share, resurrect and race.
	pull := func(ns namespace.ID, r *rand.Rand, name string) error {
		l, err := f.in(ns).Leases().Create(ctx, lease.Lease{Labels: map[string]string{lease.LabelExpire: time.Now().Add(time.Hour).Format(time.RFC3339)}})
		if err != nil {
			return err
		}
		v, err := f.In(ns, l.ID)
		if err != nil {
			return err
		}
		store := func(data string, labels map[string]string) (digest.Digest, error) {
			dgst := digest.FromString(data)
			for {
				w, err := v.Content().Writer(ctx, "layer-"+dgst.String(), content.WriterOptions{Expected: dgst, Total: int64(len(data))})
				switch {
				case errdefs.IsAlreadyExists(err):
					_, err = v.Content().Update(ctx, content.Info{Digest: dgst, Labels: labels})
					return dgst, err
				case errdefs.IsUnavailable(err) && ctx.Err() == nil:
					time.Sleep(time.Millisecond)
					continue
				case err != nil:
					return "", fmt.Errorf("writer: %w", err)
				}
				defer w.Close()
				st, err := w.Status()
				if err != nil {
					return "", err
				}
				if st.Offset == 0 {
					if _, err := io.WriteString(w, data); err != nil {
						return "", err
					}
				}
				err = w.Commit(ctx, int64(len(data)), dgst, labels)
				if errdefs.IsAlreadyExists(err) {
					err = nil
				}
				return dgst, err
			}
		}
		manifest, labels, parent := name, map[string]string{}, ""
		sn, err := v.Snapshots("native")
		if err != nil {
			return err
		}
		for i := range 3 {
			layer := fmt.Sprintf("layer %d %d", i, r.IntN(3))
			dgst, err := store(layer, nil)
			if err != nil {
				return fmt.Errorf("layer: %w", err)
			}
			labels[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = dgst.String()
			chain := digest.FromString(parent + layer).String()
			key := fmt.Sprintf("extract-%d-%s", r.Uint64(), chain)
			_, err = sn.Prepare(ctx, key, parent, map[string]string{snapshot.LabelRef: chain})
			if err == nil {
				err = sn.Commit(ctx, chain, key, snapshot.CommitOptions{Labels: map[string]string{snapshot.LabelRef: chain}})
			}
			if err != nil && !errdefs.IsAlreadyExists(err) {
				return fmt.Errorf("snapshot on %q: %w", parent, err)
			}
			if _, err := sn.Stat(ctx, chain); err != nil {
				return fmt.Errorf("snapshot that exists: %w", err)
			}
			parent = chain
		}
		labels["containerd.io/gc.ref.snapshot.native"] = parent
		dgst, err := store(manifest, labels)
		if err != nil {
			return fmt.Errorf("manifest: %w", err)
		}
		img := image.Image{Name: name}
		img.Target.Digest, img.Target.Size, img.Target.MediaType = dgst, int64(len(manifest)), "m"
		if _, err := v.Images().Create(ctx, img); err != nil {
			return err
		}
		plain := f.in(ns)
		if err := plain.Leases().Delete(ctx, l.ID, false); err != nil {
			return err
		}
		// Run it.
		rw := "rw-" + name
		psn, err := plain.Snapshots("native")
		if err != nil {
			return err
		}
		if _, err := psn.Prepare(ctx, rw, parent, keepRoot); err != nil {
			return fmt.Errorf("run: %w", err)
		}
		if _, err := plain.Containers().Create(ctx, container.Container{ID: container.ID(name), Runtime: container.Runtime{Name: "r"}, Snapshotter: "native", SnapshotKey: rw}); err != nil {
			return err
		}
		for _, d := range append(mapValues(labels, "containerd.io/gc.ref.content"), dgst.String()) {
			ra, err := plain.Content().Open(ctx, digest.Digest(d))
			if err != nil {
				return fmt.Errorf("open: %w", err)
			}
			ra.Close()
		}
		if _, err := psn.Mounts(ctx, rw); err != nil {
			return fmt.Errorf("mounts: %w", err)
		}
		if err := plain.Images().Delete(ctx, name, image.DeleteOptions{}); err != nil {
			return err
		}
		if _, err := psn.Mounts(ctx, rw); err != nil {
			return fmt.Errorf("mounts without the image: %w", err)
		}
		if err := plain.Containers().Delete(ctx, container.ID(name)); err != nil {
			return err
		}
		return psn.Remove(ctx, rw)
	}
	var done atomic.Int64
	for p := range 4 {
		pullers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(p), 7))
			ns := namespace.ID(fmt.Sprintf("n%d", p%2))
			for i := range 25 {
				if err := pull(ns, r, fmt.Sprintf("image-%d-%d", p, i)); err != nil {
					t.Errorf("pull %d of %d: %v", i, p, err)
					return
				}
				done.Add(1)
			}
		})
	}
	pullers.Wait()
	close(stop)
	collector.Wait()
	if done.Load() != 100 {
		t.Errorf("%d pulls", done.Load())
	}
	f.collect()
	f.fsck()
	if n := len(blobs(t, blobStore)); n != 0 {
		t.Errorf("%d blobs left", n)
	}
	if got := names(t, f.opts.Snapshotters["native"]); got != "" {
		t.Errorf("snapshots left: %q", got)
	}
}

// keepRoot is the label of a snapshot between its Prepare and its container.
var keepRoot = map[string]string{"containerd.io/gc.root": "1"}

func mapValues(m map[string]string, prefix string) (out []string) {
	for k, v := range m {
		if strings.HasPrefix(k, prefix) {
			out = append(out, v)
		}
	}
	return out
}

// TestKill kills a process that writes, at random moments, and looks whether
// what it had been told is there.
func TestKill(t *testing.T) {
	if dir := os.Getenv("BOLTMETA_TEST_WRITE"); dir != "" {
		writeForever(dir)
	}
	dir := t.TempDir()
	acked := map[string]bool{}
	for round := range 6 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
		cmd.Env = append(os.Environ(), "BOLTMETA_TEST_WRITE="+dir, fmt.Sprintf("BOLTMETA_TEST_ROUND=%d", round))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 20 + rand.IntN(120); n > 0 && lines.Scan(); n-- {
			acked[lines.Text()] = true
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() { // what it had still said
			if strings.HasSuffix(lines.Text(), ".") {
				acked[lines.Text()] = true
			}
		}
		cmd.Wait()

		db, err := openReal(dir)
		if err != nil {
			t.Fatal(err)
		}
		ctx := t.Context()
		if _, err := gc.New(db.DB, gc.Defaults(), nil).Collect(ctx); err != nil {
			t.Error(err)
		}
		for _, p := range db.Check(ctx) {
			t.Errorf("round %d: check: %s", round, p)
		}
		v := must(db.In("n", ""))(t)
		sn := must(v.Snapshots("native"))(t)
		for line := range acked {
			if !strings.HasSuffix(line, ".") {
				continue
			}
			kind, name, _ := strings.Cut(strings.TrimSuffix(line, "."), " ")
			switch kind {
			case "container":
				_, err = v.Containers().Get(ctx, container.ID(name))
			case "content":
				var r content.ReaderAt
				if r, err = v.Content().Open(ctx, digest.FromString(name)); err == nil {
					r.Close()
				}
			case "snapshot":
				_, err = sn.Stat(ctx, name)
			}
			if err != nil {
				t.Errorf("round %d: lost %s: %v", round, line, err)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(acked) < 100 {
		t.Errorf("only %d writes", len(acked))
	}
}

func openReal(dir string) (*realDB, error) {
	blobStore, err := blobdir.Open(filepath.Join(dir, "content"), blobdir.Options{})
	if err != nil {
		return nil, err
	}
	sn, err := native.Open(filepath.Join(dir, "native"), native.Config{}, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	db, err := Open(filepath.Join(dir, "meta.db"), Options{Content: blobStore, Snapshotters: map[string]snapshot.Store{"native": sn}, OpenTimeout: 5 * time.Second})
	if err != nil {
		sn.Close()
		return nil, err
	}
	return &realDB{db, sn}, nil
}

// realDB closes its snapshotter as well.
type realDB struct {
	*DB
	sn *native.Store
}

func (r *realDB) Close() error { return errors.Join(r.DB.Close(), r.sn.Close()) }

// writeForever writes until it is killed, and says what was acknowledged.
func writeForever(dir string) {
	db, err := openReal(dir)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	ctx := context.Background()
	v, _ := db.In("n", "")
	sn, _ := v.Snapshots("native")
	run := os.Getenv("BOLTMETA_TEST_ROUND")
	var out sync.Mutex
	say := func(kind, name string, err error) {
		if err != nil {
			return
		}
		out.Lock()
		defer out.Unlock()
		fmt.Printf("%s %s.\n", kind, name)
	}
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Go(func() {
			for i := 0; ; i++ {
				name := fmt.Sprintf("r%s-w%d-%d", run, w, i)
				_, err := v.Containers().Create(ctx, container.Container{ID: container.ID(name), Runtime: container.Runtime{Name: "r"}})
				say("container", name, err)
				cw, err := v.Content().Writer(ctx, name, content.WriterOptions{})
				if err == nil {
					io.WriteString(cw, name)
					err = cw.Commit(ctx, 0, "", keepRoot)
					cw.Close()
				}
				say("content", name, err)
				_, err = sn.Prepare(ctx, name+"-key", "", keepRoot)
				if err == nil {
					err = sn.Commit(ctx, name, name+"-key", snapshot.CommitOptions{Labels: keepRoot})
				}
				say("snapshot", name, err)
			}
		})
	}
	wg.Wait()
}
