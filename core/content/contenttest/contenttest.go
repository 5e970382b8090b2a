// Package contenttest is the conformance suite of content.Store: whatever
// passes it can stand wherever the daemon or a client wants one.
package contenttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/content"
)

// Options say what a store cannot do. The zero value is a store that can all.
type Options struct {
	// NoLabels is a store that keeps no labels: Update is ErrNotImplemented.
	NoLabels bool
	// Remote is a store whose readers ask for each range by the digest, so
	// that they find nothing once the blob is deleted.
	Remote bool
}

// Run tests stores that open makes: each is used by one test and is empty.
func Run(t *testing.T, open func(t *testing.T) content.Store, o Options) {
	for _, c := range []struct {
		name string
		test func(*suite)
	}{
		{"commit and read", (*suite).commitAndRead},
		{"empty blob", (*suite).emptyBlob},
		{"large blob", (*suite).largeBlob},
		{"read ranges", (*suite).readRanges},
		{"sha512", (*suite).sha512},
		{"resume", (*suite).resume},
		{"resume with another algorithm", (*suite).resumeOther},
		{"one writer a ref", (*suite).locked},
		{"truncate", (*suite).truncate},
		{"wrong size and digest", (*suite).mismatch},
		{"commit what exists", (*suite).commitExisting},
		{"expect what exists", (*suite).expectExisting},
		{"writer after the end", (*suite).closedWriter},
		{"missing", (*suite).missing},
		{"malformed", (*suite).malformed},
		{"walk", (*suite).walk},
		{"walk ends", (*suite).walkEnds},
		{"update", (*suite).update},
		{"delete", (*suite).delete},
		{"reader outlives delete", (*suite).readDeleted},
		{"statuses", (*suite).statuses},
		{"abort", (*suite).abort},
		{"concurrent commits of one blob", (*suite).sameBlob},
		{"concurrent commits of many blobs", (*suite).manyBlobs},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.test(&suite{T: t, ctx: t.Context(), s: open(t), Options: o})
		})
	}
}

type suite struct {
	*testing.T
	Options
	ctx context.Context
	s   content.Store
}

func (t *suite) must(err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// want fails unless is accepts err, naming the class wanted.
func (t *suite) want(err error, is func(error) bool, class string) {
	t.Helper()
	if !is(err) {
		t.Fatalf("got error %v, want %s", err, class)
	}
}

func (t *suite) notFound(err error) { t.Helper(); t.want(err, errdefs.IsNotFound, "not found") }
func (t *suite) invalid(err error) {
	t.Helper()
	t.want(err, errdefs.IsInvalidArgument, "invalid argument")
}
func (t *suite) exists(err error) { t.Helper(); t.want(err, errdefs.IsAlreadyExists, "already exists") }
func (t *suite) precondition(err error) {
	t.Helper()
	t.want(err, errdefs.IsFailedPrecondition, "failed precondition")
}
func (t *suite) unavailable(err error) {
	t.Helper()
	t.want(err, errdefs.IsUnavailable, "unavailable")
}

func (t *suite) writer(ref string, o content.WriterOptions) content.Writer {
	t.Helper()
	w, err := t.s.Writer(t.ctx, ref, o)
	t.must(err)
	t.Cleanup(func() { w.Close() })
	return w
}

func (t *suite) write(w content.Writer, data []byte) {
	t.Helper()
	n, err := w.Write(data)
	if err != nil || n != len(data) {
		t.Fatalf("Write of %d bytes: %d, %v", len(data), n, err)
	}
}

// put makes a blob.
func (t *suite) put(data []byte, labels map[string]string) digest.Digest {
	t.Helper()
	dgst := digest.FromBytes(data)
	w := t.writer("put-"+dgst.String(), content.WriterOptions{Total: int64(len(data)), Expected: dgst})
	t.write(w, data)
	t.must(w.Commit(t.ctx, int64(len(data)), dgst, labels))
	return dgst
}

// has fails unless the blob is there with exactly these bytes.
func (t *suite) has(dgst digest.Digest, data []byte) {
	t.Helper()
	info, err := t.s.Info(t.ctx, dgst)
	t.must(err)
	if info.Digest != dgst || info.Size != int64(len(data)) {
		t.Fatalf("Info of %s is %+v, want size %d", dgst, info, len(data))
	}
	r, err := t.s.Open(t.ctx, dgst)
	t.must(err)
	defer r.Close()
	if r.Size() != int64(len(data)) {
		t.Fatalf("Size is %d, want %d", r.Size(), len(data))
	}
	got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()+1))
	t.must(err)
	if !bytes.Equal(got, data) {
		t.Fatalf("%s has other bytes: %d of them, want %d", dgst, len(got), len(data))
	}
}

func (t *suite) hasNot(dgst digest.Digest) {
	t.Helper()
	_, err := t.s.Info(t.ctx, dgst)
	t.notFound(err)
	_, err = t.s.Open(t.ctx, dgst)
	t.notFound(err)
}

func (t *suite) offset(ref string, want int64) {
	t.Helper()
	st, err := t.s.Status(t.ctx, ref)
	t.must(err)
	if st.Ref != ref || st.Offset != want {
		t.Fatalf("Status of %s is %+v, want offset %d", ref, st, want)
	}
}

func (t *suite) noIngest(ref string) {
	t.Helper()
	_, err := t.s.Status(t.ctx, ref)
	t.notFound(err)
	all, err := t.s.Statuses(t.ctx)
	t.must(err)
	for _, st := range all {
		if st.Ref == ref {
			t.Fatalf("ingest %s is still listed", ref)
		}
	}
}

func random(n int) []byte {
	src := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	p := make([]byte, n)
	src.Read(p)
	return p
}

func (t *suite) commitAndRead() {
	begin := time.Now().Add(-2 * time.Second) // file systems have coarse clocks
	data := []byte("hello, blob")
	dgst := digest.FromBytes(data)
	w := t.writer("a/ref:with@all+sorts of.things", content.WriterOptions{Total: 11})
	st, err := w.Status()
	t.must(err)
	if st.Offset != 0 || st.Total != 11 || st.Ref != "a/ref:with@all+sorts of.things" || st.StartedAt.Before(begin) || st.UpdatedAt.Before(begin) {
		t.Fatalf("new ingest has status %+v", st)
	}
	t.write(w, data[:5])
	if got := w.Digest(); got != "" && got != digest.FromBytes(data[:5]) {
		t.Fatalf("digest after five bytes is %s", got)
	}
	t.write(w, data[5:])
	t.offset(st.Ref, 11)
	t.hasNot(dgst)
	labels := map[string]string{"a": "1", "b.c/d": "2"}
	t.must(w.Commit(t.ctx, 0, "", labels))
	t.must(w.Close())
	t.noIngest(st.Ref)
	t.has(dgst, data)
	info, err := t.s.Info(t.ctx, dgst)
	t.must(err)
	if info.CreatedAt.Before(begin) || info.UpdatedAt.Before(begin) || info.CreatedAt.After(time.Now().Add(2*time.Second)) {
		t.Fatalf("times of the blob are %s and %s", info.CreatedAt, info.UpdatedAt)
	}
	if !t.NoLabels && (len(info.Labels) != 2 || info.Labels["a"] != "1" || info.Labels["b.c/d"] != "2") {
		t.Fatalf("labels are %v", info.Labels)
	}
}

func (t *suite) emptyBlob() {
	w := t.writer("empty", content.WriterOptions{})
	t.must(w.Commit(t.ctx, 0, digest.FromBytes(nil), nil))
	t.has(digest.FromBytes(nil), nil)
}

func (t *suite) largeBlob() {
	data := random(9<<20 + 77)
	w := t.writer("large", content.WriterOptions{Total: int64(len(data))})
	t.write(w, data[:3])
	t.write(w, data[3:]) // more than any one message may have
	if got := w.Digest(); got != "" && got != digest.FromBytes(data) {
		t.Fatalf("digest of all is %s", got)
	}
	t.must(w.Commit(t.ctx, int64(len(data)), digest.FromBytes(data), nil))
	t.has(digest.FromBytes(data), data)
}

func (t *suite) readRanges() {
	data := random(3<<20 + 1)
	r, err := t.s.Open(t.ctx, t.put(data, nil))
	t.must(err)
	size := int64(len(data))
	for _, c := range []struct {
		off    int64
		length int
	}{{0, 1}, {1, 1 << 20}, {1<<20 - 1, 2}, {5, 2<<20 + 11}, {size - 1, 1}, {0, len(data)}} {
		p := make([]byte, c.length)
		n, err := r.ReadAt(p, c.off)
		if n != c.length || err != nil && err != io.EOF {
			t.Fatalf("ReadAt(%d bytes, %d): %d, %v", c.length, c.off, n, err)
		}
		if !bytes.Equal(p, data[c.off:c.off+int64(c.length)]) {
			t.Fatalf("ReadAt(%d bytes, %d) has other bytes", c.length, c.off)
		}
	}
	p := make([]byte, 10)
	if n, err := r.ReadAt(p, size-3); n != 3 || err != io.EOF {
		t.Fatalf("ReadAt over the end: %d, %v", n, err)
	}
	for _, off := range []int64{size, size + 100} {
		if n, err := r.ReadAt(p, off); n != 0 || err != io.EOF {
			t.Fatalf("ReadAt(%d) of %d bytes: %d, %v", off, size, n, err)
		}
	}
	if _, err := r.ReadAt(p, -1); err == nil || err == io.EOF {
		t.Fatalf("ReadAt at a negative offset: %v", err)
	}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			p := make([]byte, 100_000)
			off := int64(i) * 700_000
			if _, err := r.ReadAt(p, off); err != nil || !bytes.Equal(p, data[off:off+100_000]) {
				t.Errorf("concurrent ReadAt(%d): %v", off, err)
			}
		})
	}
	wg.Wait()
	t.must(r.Close())
}

func (t *suite) sha512() {
	for i, early := range []bool{true, false} {
		data := fmt.Appendf(nil, "named by a longer digest %d", i)
		dgst := digest.SHA512.FromBytes(data)
		var o content.WriterOptions
		if early {
			o.Expected = dgst
		}
		w := t.writer("long", o)
		t.write(w, data)
		t.precondition(w.Commit(t.ctx, 0, digest.SHA512.FromString("another"), nil))
		t.must(w.Close())
		w = t.writer("long", o)
		t.must(w.Commit(t.ctx, int64(len(data)), dgst, nil))
		t.has(dgst, data)
		t.hasNot(digest.SHA256.FromBytes(data))
		_, err := t.s.Writer(t.ctx, "again", content.WriterOptions{Expected: dgst})
		t.exists(err)
	}
}

func (t *suite) resume() {
	data := random(2<<20 + 5)
	w := t.writer("r", content.WriterOptions{Total: int64(len(data))})
	t.write(w, data[:1<<20+3])
	before, err := w.Status()
	t.must(err)
	t.must(w.Close())
	t.must(w.Close())
	t.offset("r", 1<<20+3)

	w = t.writer("r", content.WriterOptions{})
	st, err := w.Status()
	t.must(err)
	if st.Offset != 1<<20+3 || st.Total != int64(len(data)) || !st.StartedAt.Equal(before.StartedAt) {
		t.Fatalf("resumed with %+v, was %+v", st, before)
	}
	if got := w.Digest(); got != "" && got != digest.FromBytes(data[:1<<20+3]) {
		t.Fatalf("digest of what was resumed is %s", got)
	}
	t.write(w, data[1<<20+3:])
	t.must(w.Commit(t.ctx, int64(len(data)), digest.FromBytes(data), nil))
	t.has(digest.FromBytes(data), data)
}

func (t *suite) resumeOther() {
	data := []byte("begun without knowing the algorithm")
	w := t.writer("r", content.WriterOptions{})
	t.write(w, data[:10])
	t.must(w.Close())
	dgst := digest.SHA384.FromBytes(data)
	w = t.writer("r", content.WriterOptions{Expected: dgst})
	t.write(w, data[10:])
	t.must(w.Commit(t.ctx, 0, dgst, nil))
	t.has(dgst, data)
}

func (t *suite) locked() {
	w := t.writer("one", content.WriterOptions{})
	t.write(w, []byte("abc"))
	_, err := t.s.Writer(t.ctx, "one", content.WriterOptions{})
	t.unavailable(err)
	if msg := err.Error(); !strings.Contains(msg, "locked for") || !strings.Contains(msg, "one") {
		t.Fatalf("message is %q", msg)
	}
	t.unavailable(t.s.Abort(t.ctx, "one"))
	other := t.writer("two", content.WriterOptions{}) // another ref is free
	t.must(other.Close())
	t.must(w.Close())
	w = t.writer("one", content.WriterOptions{})
	t.write(w, []byte("def"))
	t.must(w.Commit(t.ctx, 6, digest.FromString("abcdef"), nil))
	t.must(t.writer("one", content.WriterOptions{}).Close())
	t.offset("one", 0)
}

func (t *suite) truncate() {
	w := t.writer("t", content.WriterOptions{})
	t.write(w, []byte("wrong"))
	err := w.Truncate(2)
	if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
		t.Fatalf("Truncate(2): %v", err)
	}
	t.must(w.Close())
	w = t.writer("t", content.WriterOptions{})
	t.must(w.Truncate(0))
	st, err := w.Status()
	t.must(err)
	if st.Offset != 0 {
		t.Fatalf("offset after Truncate is %d", st.Offset)
	}
	t.write(w, []byte("right"))
	t.must(w.Truncate(0))
	t.write(w, []byte("righter"))
	t.must(w.Commit(t.ctx, 7, digest.FromString("righter"), nil))
	t.has(digest.FromString("righter"), []byte("righter"))
}

func (t *suite) mismatch() {
	data := []byte("not what was expected")
	dgst := digest.FromBytes(data)
	for _, c := range []struct {
		size     int64
		expected digest.Digest
	}{{5, ""}, {5, dgst}, {22, dgst}, {0, digest.FromString("x")}, {21, digest.FromString("x")}, {-1, ""}} {
		w := t.writer("m", content.WriterOptions{})
		if st, err := w.Status(); err != nil || st.Offset == 0 {
			t.write(w, data)
		}
		t.precondition(w.Commit(t.ctx, c.size, c.expected, nil))
		t.must(w.Close())
		t.offset("m", 21)
		t.hasNot(dgst)
	}
	w := t.writer("m", content.WriterOptions{})
	t.must(w.Commit(t.ctx, 21, dgst, nil))
	t.has(dgst, data)
}

func (t *suite) commitExisting() {
	data := []byte("twice")
	w := t.writer("second", content.WriterOptions{})
	t.write(w, data)
	dgst := t.put(data, nil)
	t.exists(w.Commit(t.ctx, 5, dgst, nil))
	t.must(w.Close())
	t.noIngest("second")
	t.has(dgst, data)
}

func (t *suite) expectExisting() {
	data := []byte("there already")
	w := t.writer("other", content.WriterOptions{})
	t.write(w, data[:3])
	t.must(w.Close())
	dgst := t.put(data, nil)
	_, err := t.s.Writer(t.ctx, "other", content.WriterOptions{Expected: dgst})
	t.exists(err)
	t.noIngest("other")
	w = t.writer("other", content.WriterOptions{}) // the ref is free again
	t.must(w.Close())
}

func (t *suite) closedWriter() {
	w := t.writer("c", content.WriterOptions{})
	t.write(w, []byte("abc"))
	t.must(w.Commit(t.ctx, 0, "", nil))
	if _, err := w.Write([]byte("def")); err == nil {
		t.Fatal("Write after a commit succeeded")
	}
	if err := w.Commit(t.ctx, 0, "", nil); err == nil {
		t.Fatal("a second commit succeeded")
	}
	t.must(w.Close())
	t.must(w.Close())
	t.has(digest.FromString("abc"), []byte("abc"))

	w = t.writer("d", content.WriterOptions{})
	t.must(w.Close())
	if _, err := w.Write([]byte("x")); err == nil {
		t.Fatal("Write after Close succeeded")
	}
	t.offset("d", 0)
}

func (t *suite) missing() {
	dgst := digest.FromString("missing")
	t.hasNot(dgst)
	t.notFound(t.s.Delete(t.ctx, dgst))
	_, err := t.s.Update(t.ctx, content.Info{Digest: dgst, Labels: map[string]string{"a": "b"}})
	t.notFound(err)
	t.noIngest("missing")
	t.notFound(t.s.Abort(t.ctx, "missing"))
	if all, err := t.s.Statuses(t.ctx); err != nil || len(all) != 0 {
		t.Fatalf("statuses of an empty store: %v, %v", all, err)
	}
	t.must(t.s.Walk(t.ctx, func(i content.Info) error { return fmt.Errorf("unexpected %s", i.Digest) }))
}

func (t *suite) malformed() {
	_, err := t.s.Writer(t.ctx, "", content.WriterOptions{})
	t.invalid(err)
	for _, dgst := range []digest.Digest{"", "x", "sha256:", "sha256:ab", "sha256:../../../../etc/passwd", "md5:d41d8cd98f00b204e9800998ecf8427e", digest.Digest("sha256:" + strings.Repeat("A", 64))} {
		bad := func(err error) {
			t.Helper()
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
				t.Fatalf("digest %q: %v", dgst, err)
			}
		}
		_, err := t.s.Info(t.ctx, dgst)
		bad(err)
		_, err = t.s.Open(t.ctx, dgst)
		bad(err)
		bad(t.s.Delete(t.ctx, dgst))
		_, err = t.s.Update(t.ctx, content.Info{Digest: dgst})
		bad(err)
		if dgst != "" {
			_, err = t.s.Writer(t.ctx, "malformed", content.WriterOptions{Expected: dgst})
			t.invalid(err)
		}
	}
	t.invalid(t.s.Walk(t.ctx, func(content.Info) error { return nil }, "digest=="))
	_, err = t.s.Statuses(t.ctx, "ref~=(")
	t.invalid(err)
	if t.NoLabels {
		return
	}
	w := t.writer("labels", content.WriterOptions{})
	t.invalid(w.Commit(t.ctx, 0, "", map[string]string{"k": strings.Repeat("v", 4096)}))
}

func (t *suite) digests(filters ...string) []digest.Digest {
	t.Helper()
	var out []digest.Digest
	t.must(t.s.Walk(t.ctx, func(i content.Info) error {
		out = append(out, i.Digest)
		return nil
	}, filters...))
	return out
}

func (t *suite) walk() {
	var all []digest.Digest
	for i := range 120 { // more than one message holds
		all = append(all, t.put(fmt.Appendf(nil, "blob %d", i), map[string]string{"n": fmt.Sprint(i), "a.b/c": "x"}))
	}
	odd := t.put([]byte("odd one"), nil)
	same := func(got []digest.Digest, want ...digest.Digest) {
		t.Helper()
		want = slices.Sorted(slices.Values(want))
		if !slices.Equal(got, want) {
			t.Fatalf("walked over %d blobs %.200v, want %d: %.200v", len(got), got, len(want), want)
		}
	}
	same(t.digests(), append(slices.Clone(all), odd)...)
	same(t.digests("digest=="+all[7].String()), all[7])
	same(t.digests("digest=="+all[7].String(), "digest=="+odd.String()), all[7], odd)
	same(t.digests("size==6"), all[:10]...)
	same(t.digests("size==6,digest!="+all[0].String()), all[1:10]...)
	same(t.digests("size==1"))
	if t.NoLabels {
		same(t.digests("labels.n==3"))
		return
	}
	same(t.digests("labels.n==3"), all[3])
	same(t.digests(`labels."a.b/c"==x,labels.n~=^11.$`), all[110:120]...)
	same(t.digests("labels.n"), all...)
}

func (t *suite) walkEnds() {
	for i := range 3 {
		t.put(fmt.Appendf(nil, "%d", i), nil)
	}
	stop, calls := errors.New("enough"), 0
	err := t.s.Walk(t.ctx, func(i content.Info) error {
		calls++
		if _, err := t.s.Info(t.ctx, i.Digest); err != nil { // the store can be used
			return err
		}
		if err := t.s.Delete(t.ctx, i.Digest); err != nil {
			return err
		}
		if calls == 2 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || calls != 2 {
		t.Fatalf("Walk returned %v after %d calls", err, calls)
	}
	if n := len(t.digests()); n != 1 {
		t.Fatalf("%d blobs are left", n)
	}
}

func (t *suite) update() {
	dgst := t.put([]byte("labelled"), map[string]string{"a": "1", "b.x/y": "2", "c": "3"})
	info := content.Info{Digest: dgst, Size: 99, Labels: map[string]string{"a": "one", "d": "4", "c": ""}}
	if t.NoLabels {
		_, err := t.s.Update(t.ctx, info)
		t.want(err, errdefs.IsNotImplemented, "not implemented")
		return
	}
	check := func(got content.Info, err error, want string) {
		t.Helper()
		t.must(err)
		stored, err := t.s.Info(t.ctx, dgst)
		t.must(err)
		for _, i := range []content.Info{got, stored} {
			if fmt.Sprint(i.Labels) != want || i.Size != 8 || i.Digest != dgst {
				t.Fatalf("got %+v, want labels %s", i, want)
			}
		}
		if stored.UpdatedAt.Before(stored.CreatedAt) {
			t.Fatalf("updated at %s, created at %s", stored.UpdatedAt, stored.CreatedAt)
		}
	}
	got, err := t.s.Update(t.ctx, info, "labels.a")
	check(got, err, "map[a:one b.x/y:2 c:3]")
	got, err = t.s.Update(t.ctx, info, "labels.b.x/y", "labels.d")
	check(got, err, "map[a:one c:3 d:4]")
	got, err = t.s.Update(t.ctx, info, "labels.c")
	check(got, err, "map[a:one d:4]")
	_, err = t.s.Update(t.ctx, info, "size")
	t.invalid(err)
	_, err = t.s.Update(t.ctx, info, "labels.a", "created_at")
	t.invalid(err)
	_, err = t.s.Update(t.ctx, content.Info{Digest: dgst, Labels: map[string]string{"k": strings.Repeat("v", 4096)}})
	t.invalid(err)
	info.Labels = map[string]string{"z": "26"}
	got, err = t.s.Update(t.ctx, info, "labels")
	check(got, err, "map[z:26]")
	info.Labels = map[string]string{"y": "25"}
	got, err = t.s.Update(t.ctx, info)
	check(got, err, "map[y:25]")
}

func (t *suite) delete() {
	data := []byte("short-lived")
	dgst := t.put(data, nil)
	t.must(t.s.Delete(t.ctx, dgst))
	t.hasNot(dgst)
	t.notFound(t.s.Delete(t.ctx, dgst))
	t.put(data, nil)
	t.has(dgst, data)
}

func (t *suite) readDeleted() {
	if t.Remote {
		t.Skip("the readers of this store ask for each range anew")
	}
	data := random(100_000)
	dgst := t.put(data, nil)
	r, err := t.s.Open(t.ctx, dgst)
	t.must(err)
	defer r.Close()
	t.must(t.s.Delete(t.ctx, dgst))
	got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	t.must(err)
	if !bytes.Equal(got, data) {
		t.Fatal("the reader of a deleted blob has other bytes")
	}
}

func (t *suite) statuses() {
	for i, ref := range []string{"layer-b", "layer-a", "config"} {
		w := t.writer(ref, content.WriterOptions{Total: 10})
		t.write(w, []byte("12345")[:i+1])
		if i < 2 {
			t.must(w.Close())
		} // the last one stays open
	}
	got := func(filters ...string) string {
		t.Helper()
		all, err := t.s.Statuses(t.ctx, filters...)
		t.must(err)
		var b strings.Builder
		for _, st := range all {
			if st.StartedAt.IsZero() || st.UpdatedAt.Before(st.StartedAt) {
				t.Fatalf("times of %s are %s and %s", st.Ref, st.StartedAt, st.UpdatedAt)
			}
			fmt.Fprintf(&b, "%s:%d/%d ", st.Ref, st.Offset, st.Total)
		}
		return b.String()
	}
	for _, c := range []struct{ filter, want string }{
		{"", "config:3/10 layer-a:2/10 layer-b:1/10 "},
		{"ref==config", "config:3/10 "},
		{"ref~=^layer-", "layer-a:2/10 layer-b:1/10 "},
		{"ref==none", ""},
	} {
		var filters []string
		if c.filter != "" {
			filters = []string{c.filter}
		}
		if s := got(filters...); s != c.want {
			t.Fatalf("statuses by %q are %q, want %q", c.filter, s, c.want)
		}
	}
}

func (t *suite) abort() {
	w := t.writer("a", content.WriterOptions{})
	t.write(w, []byte("dropped"))
	t.must(w.Close())
	t.must(t.s.Abort(t.ctx, "a"))
	t.noIngest("a")
	t.notFound(t.s.Abort(t.ctx, "a"))
	w = t.writer("a", content.WriterOptions{})
	if st, err := w.Status(); err != nil || st.Offset != 0 {
		t.Fatalf("status after an abort is %+v, %v", st, err)
	}
}

func (t *suite) sameBlob() {
	const writers = 6
	data := random(200_000)
	dgst := digest.FromBytes(data)
	var ws []content.Writer
	for i := range writers {
		w := t.writer(fmt.Sprintf("same-%d", i), content.WriterOptions{Total: int64(len(data))})
		t.write(w, data)
		ws = append(ws, w)
	}
	errs := make([]error, writers)
	var wg sync.WaitGroup
	for i, w := range ws {
		wg.Go(func() { errs[i] = w.Commit(t.ctx, int64(len(data)), dgst, nil) })
	}
	wg.Wait()
	made := 0
	for _, err := range errs {
		if err == nil {
			made++
		} else {
			t.exists(err)
		}
	}
	if made != 1 {
		t.Fatalf("%d of %d commits made the blob", made, writers)
	}
	t.has(dgst, data)
	for i := range writers {
		t.noIngest(fmt.Sprintf("same-%d", i))
	}
}

func (t *suite) manyBlobs() {
	const writers, each = 4, 12
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for j := range each {
				data := fmt.Appendf(nil, "blob %d of %d", j, i)
				w, err := t.s.Writer(t.ctx, fmt.Sprintf("many-%d", i), content.WriterOptions{Expected: digest.FromBytes(data)})
				if err == nil {
					_, err = w.Write(data)
				}
				if err == nil {
					err = w.Commit(t.ctx, int64(len(data)), digest.FromBytes(data), nil)
				}
				if err != nil {
					t.Errorf("blob %d of %d: %v", j, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
	for i := range writers {
		for j := range each {
			data := fmt.Appendf(nil, "blob %d of %d", j, i)
			t.has(digest.FromBytes(data), data)
		}
	}
}
