package blobdir

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/content/contenttest"
	"github.com/gantryd/gantry/internal/lib/fsx"
)

// checked makes the test fail if the store is not clean at its end.
func checked(t testing.TB, s *Store) *Store {
	t.Helper()
	t.Cleanup(func() {
		problems, err := s.Check(context.WithoutCancel(t.Context()))
		if err != nil {
			t.Errorf("check: %v", err)
		}
		for _, p := range problems {
			t.Errorf("check: %s", p)
		}
	})
	return s
}

func open(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return checked(t, s)
}

// contract: 4.1.1, 4.1.2, 4.1.3, 4.1.4, 4.1.11, 1.2.8
func TestConformance(t *testing.T) {
	contenttest.Run(t, func(t *testing.T) content.Store {
		return open(t, t.TempDir(), Options{})
	}, contenttest.Options{NoLabels: true})
}

func TestConformanceNoSync(t *testing.T) {
	contenttest.Run(t, func(t *testing.T) content.Store {
		return open(t, t.TempDir(), Options{NoSync: true})
	}, contenttest.Options{NoLabels: true})
}

func TestConformanceInMemory(t *testing.T) {
	contenttest.Run(t, func(t *testing.T) content.Store {
		s, err := OpenFS(fsx.NewMem(), Options{})
		if err != nil {
			t.Fatal(err)
		}
		return checked(t, s)
	}, contenttest.Options{NoLabels: true})
}

// unpackSample unpacks a root directory that containerd 2.4 wrote and returns
// where its blobs are.
func unpackSample(t *testing.T) string {
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
	const prefix = "root/io.containerd.content.v1.content/"
	dir := t.TempDir()
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		name, ok := strings.CutPrefix(h.Name, prefix)
		if !ok || name == "" {
			continue
		}
		path := filepath.Join(dir, name)
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(path, h.FileInfo().Mode())
		} else {
			var data []byte
			if data, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(path, data, h.FileInfo().Mode())
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// contract: 4.1.1, 4.1.3
func TestDirectoryOfContainerd(t *testing.T) {
	dir := unpackSample(t)
	s, ctx := open(t, dir, Options{}), t.Context()
	var sizes []int64
	if err := s.Walk(ctx, func(i content.Info) error {
		sizes = append(sizes, i.Size)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if want := []int64{722, 250, 80, 652, 155}; !slices.Equal(sizes, want) {
		t.Fatalf("blobs have sizes %v, want %v", sizes, want)
	}
	st, err := s.Status(ctx, "default/1/part")
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%d %d %s %q", st.Offset, st.Total, st.StartedAt.Format(time.RFC3339Nano), st.Expected); got != `4 100 2026-11-21T22:05:37.883613713Z ""` {
		t.Fatalf("the unfinished ingest is %s", got)
	}
	w, err := s.Writer(ctx, "default/1/part", content.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rest := bytes.Repeat([]byte("x"), 96)
	if _, err := w.Write(rest); err != nil {
		t.Fatal(err)
	}
	dgst := digest.FromBytes(append([]byte("part"), rest...))
	if err := w.Commit(ctx, 100, dgst, nil); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(filepath.Join(dir, "blobs/sha256", dgst.Encoded()))
	if err != nil || fi.Mode() != 0o444 || fi.Size() != 100 {
		t.Fatalf("the blob's file: %v, %v", fi, err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "ingest")); err != nil || len(left) != 0 {
		t.Fatalf("left in ingest: %v, %v", left, err)
	}
}

// What we write must be what containerd reads.
//
// contract: 4.1.1
func TestLayout(t *testing.T) {
	dir := t.TempDir()
	s, ctx := open(t, dir, Options{}), t.Context()
	w, err := s.Writer(ctx, "default/1/part", content.WriterOptions{Total: 100})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("part")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// The name is the one that containerd gave to the same ref.
	const ingest = "ingest/f664b6003ddbec4d820119dc035ac3cf71112dd052b1be8f07646ea111ac847f"
	sample := unpackSample(t)
	for _, name := range []string{"ref", "data", "total", "startedat", "updatedat"} {
		got, err := os.ReadFile(filepath.Join(dir, ingest, name))
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join(sample, ingest, name))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "at") {
			if _, err := time.Parse("2006-01-02T15:04:05.999999999Z", string(got)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		} else if !bytes.Equal(got, want) {
			t.Errorf("%s is %q, containerd's is %q", name, got, want)
		}
	}
}

// contract: 4.1.3
// promise: P32
func TestGarbageInIngest(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	put := func(name, data string) {
		t.Helper()
		path := filepath.Join(dir, "ingest", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	name := func(ref string) string { return strings.TrimPrefix(ingestDir(ref), "ingest/") }
	for _, ref := range []string{"no data", "no ref", "other ref", "data is a directory", "ref is huge", "torn times"} {
		d := name(ref)
		put(d+"/ref", ref)
		put(d+"/data", "1234")
		put(d+"/startedat", "2026-11-21T22:05:37.883613713Z")
		put(d+"/updatedat", "2026-11-21T22:05:37.883613713Z")
	}
	for _, path := range []string{name("no data") + "/data", name("no ref") + "/ref", name("data is a directory") + "/data"} {
		if err := os.Remove(filepath.Join(dir, "ingest", path)); err != nil {
			t.Fatal(err)
		}
	}
	put(name("data is a directory")+"/data/x", "")
	put(name("other ref")+"/ref", "somebody else's")
	put(name("ref is huge")+"/ref", strings.Repeat("x", 1<<20))
	put(name("torn times")+"/startedat", "2026-11-2")
	put(name("torn times")+"/updatedat", "\x00\x00\x00")
	put(name("torn times")+"/total", "-7 or so")
	put(name("a file"), "not a directory")
	put("lost+found/something", "foreign")

	for _, opened := range []bool{false, true} { // found at the start, or later
		s := &Store{fs: fsx.Dir(dir), log: slog.New(slog.DiscardHandler), writers: map[string]*hold{}, unsettled: map[digest.Digest]*settling{}, algorithms: map[string]bool{}}
		if opened {
			var err error
			if s, err = Open(dir, Options{}); err != nil {
				t.Fatal(err)
			}
		}
		all, err := s.Statuses(ctx)
		if err != nil || len(all) != 1 || all[0].Ref != "torn times" || all[0].Offset != 4 || all[0].Total != 0 || all[0].StartedAt.IsZero() {
			t.Fatalf("statuses: %+v, %v", all, err)
		}
		if err := s.Abort(ctx, "no ref"); !errdefs.IsNotFound(err) {
			t.Fatalf("abort of garbage: %v", err)
		}
	}
	// The garbage whose name is an ingest's has gone, what is foreign is left.
	left, err := os.ReadDir(filepath.Join(dir, "ingest"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range left {
		names = append(names, e.Name())
	}
	if want := []string{name("a file"), name("torn times"), "lost+found"}; !slices.Equal(slices.Sorted(slices.Values(names)), slices.Sorted(slices.Values(want))) {
		t.Fatalf("left: %v", names)
	}

	// Every ref can be used, also with garbage in its place.
	put(name("no data")+"/ref", "no data")
	s, err := Open(dir, Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"no data", "no ref", "other ref", "a file", "torn times"} {
		w, err := s.Writer(ctx, ref, content.WriterOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(ref)); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(ctx, 0, "", nil); err != nil {
			t.Fatal(err)
		}
	}
	problems, err := s.Check(ctx)
	if err != nil || len(problems) != 1 || problems[0].Path != "ingest/lost+found" || problems[0].Damaged {
		t.Fatalf("check: %v, %v", problems, err)
	}
}

// promise: P32
func TestResumeAfterKill(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	dead := open(t, dir, Options{})
	w, err := dead.Writer(ctx, "layer", content.WriterOptions{Total: int64(len(data))})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data[:700_001]); err != nil {
		t.Fatal(err)
	}
	// The process is killed here: nothing is closed. Another one opens the store.
	s := open(t, dir, Options{})
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Writer(cancelled, "layer", content.WriterOptions{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("resume with a cancelled context: %v", err)
	}
	w2, err := s.Writer(ctx, "layer", content.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	st, err := w2.Status()
	if err != nil || st.Offset != 700_001 || st.Total != int64(len(data)) {
		t.Fatalf("resumed at %+v, %v", st, err)
	}
	if _, err := w2.Write(data[700_001:]); err != nil {
		t.Fatal(err)
	}
	if err := w2.Commit(ctx, int64(len(data)), digest.FromBytes(data), nil); err != nil {
		t.Fatal(err)
	}
}

// A crash may leave a blob's file in ingest/ under a second name.
func TestIngestLinkedToBlob(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	s := open(t, dir, Options{})
	l := newLedger()
	if err := l.commit(ctx, s, "r", []byte("the blob"), digest.SHA256); err != nil {
		t.Fatal(err)
	}
	w, err := s.Writer(ctx, "r", content.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, ingestDir("r"), "data")
	if err := os.Remove(data); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "blobs/sha256", digest.FromString("the blob").Encoded()), data); err != nil {
		t.Fatal(err)
	}
	if w, err = s.Writer(ctx, "r", content.WriterOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("something else")); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(ctx, 0, digest.FromString("something else"), nil); err != nil {
		t.Fatal(err)
	}
	if err := l.audit(ctx, s); err == nil || !strings.Contains(err.Error(), "was never written") {
		t.Fatalf("audit should know one blob and not the other: %v", err)
	}
}

// contract: 4.1.3
func TestChangedTotalStartsOver(t *testing.T) {
	s, ctx := open(t, t.TempDir(), Options{}), t.Context()
	for _, c := range []struct{ total, offset, want int64 }{{10, 0, 10}, {0, 3, 10}, {10, 3, 10}, {12, 0, 12}, {0, 3, 12}} {
		w, err := s.Writer(ctx, "r", content.WriterOptions{Total: c.total})
		if err != nil {
			t.Fatal(err)
		}
		st, err := w.Status()
		if err != nil || st.Offset != c.offset || st.Total != c.want {
			t.Fatalf("opened with total %d: %+v, %v", c.total, st, err)
		}
		if st.Offset == 0 {
			if _, err := w.Write([]byte("abc")); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A blob that was damaged by something else is found by Check.
//
// promise: P3
func TestCheckFindsDamage(t *testing.T) {
	dir, ctx := t.TempDir(), t.Context()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	l := newLedger()
	for _, text := range []string{"one", "two", "three"} {
		if err := l.commit(ctx, s, text, []byte(text), digest.SHA256); err != nil {
			t.Fatal(err)
		}
	}
	two := filepath.Join(dir, "blobs/sha256", digest.FromString("two").Encoded())
	if err := os.WriteFile(two, nil, 0o644); err != nil { // what a power cut does to a file nobody synced
		t.Fatal(err)
	}
	if err := os.Truncate(two, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "blobs/sha256/README"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	problems, err := s.Check(ctx)
	if err != nil || len(problems) != 2 {
		t.Fatalf("check: %v, %v", problems, err)
	}
	for _, p := range problems {
		if p.Damaged != strings.HasSuffix(two, p.Path) {
			t.Errorf("problem %s, damaged %v", p, p.Damaged)
		}
	}
	if err := s.Delete(ctx, digest.FromString("two")); err != nil {
		t.Fatal(err)
	}
	if err := l.commit(ctx, s, "two", []byte("two"), digest.SHA256); err != nil { // and can be fetched again
		t.Fatal(err)
	}
}

// Who asks for a sync while one runs shares the next one with all others.
func TestGroupSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var syncs atomic.Int32
		proceed := make(chan error)
		g := groupSync{sync: func(string) error {
			syncs.Add(1)
			return <-proceed
		}}
		const callers = 50
		results := make(chan error, callers+1)
		go func() { results <- g.Sync("d") }()
		synctest.Wait() // the first sync runs: who comes now is too late for it
		for range callers {
			go func() { results <- g.Sync("d") }()
		}
		synctest.Wait()
		proceed <- nil
		if err := <-results; err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(results) != 0 {
			t.Fatalf("%d callers returned before a sync that began after they asked", len(results))
		}
		proceed <- syscall.EIO
		for range callers {
			if err := <-results; !errors.Is(err, syscall.EIO) {
				t.Fatalf("result of the second sync: %v", err)
			}
		}
		if n := syncs.Load(); n != 2 {
			t.Fatalf("%d syncs for %d callers", n, callers+1)
		}
	})
}

// contract: 4.1.5
func TestVerity(t *testing.T) {
	s := open(t, t.TempDir(), Options{Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if s.verity == nil {
		t.Skip("fs-verity is not enabled on this file system")
	}
	l := newLedger()
	if err := l.commit(t.Context(), s, "r", []byte("sealed"), digest.SHA256); err != nil {
		t.Fatal(err)
	}
}

// Small blobs by four writers, as a pull of many manifests does it.
func BenchmarkSmallBlobs(b *testing.B) {
	for _, o := range []Options{{}, {NoSync: true}} {
		b.Run(fmt.Sprintf("nosync=%v", o.NoSync), func(b *testing.B) {
			s, err := Open(b.TempDir(), o)
			if err != nil {
				b.Fatal(err)
			}
			var n atomic.Int64
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					data := make([]byte, 4096)
					for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
						binary.BigEndian.PutUint64(data, uint64(i))
						w, err := s.Writer(b.Context(), fmt.Sprint("blob ", i), content.WriterOptions{Total: 4096})
						if err == nil {
							_, err = w.Write(data)
						}
						if err == nil {
							err = w.Commit(b.Context(), 4096, "", nil)
						}
						if err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "blobs/s")
		})
	}
}
