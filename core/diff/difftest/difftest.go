// Package difftest is the conformance suite of diff.Service: what its comments
// say is asked of every implementation, in process and over the wire.
package difftest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/mount"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Env is what the suite works on: a service and the content store that it
// reads and writes.
type Env struct {
	Service diff.Service
	Content content.Store
}

// Run asks everything of what open returns, which is opened once a test.
func Run(t *testing.T, open func(t *testing.T) Env) {
	for _, c := range []struct {
		name string
		fn   func(*testing.T, Env)
	}{
		{"apply", applyPacked},
		{"round trip", roundTrip},
		{"epoch", epoch},
		{"labels", labels},
		{"hostile", hostile},
		{"damaged", damaged},
		{"not possible", impossible},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, open(t)) })
	}
}

// Bind is a mount of a directory as it is.
func Bind(dir string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "rw"}}}
}

// Put stores a blob and describes it.
func Put(t testing.TB, store content.Store, mediaType string, data []byte) ocispec.Descriptor {
	t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	ctx := t.Context()
	w, err := store.Writer(ctx, "put-"+desc.Digest.Encoded(), content.WriterOptions{Total: desc.Size, Expected: desc.Digest})
	if errdefs.IsAlreadyExists(err) {
		return desc
	}
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(ctx, desc.Size, desc.Digest, nil); err != nil && !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	return desc
}

// Get reads a blob.
func Get(t testing.TB, store content.Store, dgst digest.Digest) []byte {
	t.Helper()
	r, err := store.Open(t.Context(), dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b := make([]byte, r.Size())
	if _, err := r.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return b
}

type member struct {
	name string // a trailing slash makes a directory
	link string
	body string
}

func layer(t testing.TB, members ...member) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Mode: 0o644, Size: int64(len(m.body)), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
		switch {
		case strings.HasSuffix(m.name, "/"):
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case m.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, m.link
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(m.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zip(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// list is the names and contents below a directory.
func list(t testing.TB, root string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		switch {
		case e.IsDir():
			out = append(out, rel+"/")
		case e.Type() == fs.ModeSymlink:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			out = append(out, rel+" -> "+target)
		default:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			out = append(out, fmt.Sprintf("%s = %s", rel, b))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func equal(t testing.TB, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func applyPacked(t *testing.T, env Env) {
	data := layer(t, member{name: "d/"}, member{name: "d/f", body: "x"}, member{name: "l", link: "d/f"})
	data = append(data, make([]byte, 4096)...) // what follows the end belongs to the stream
	packed := zip(t, data)
	want := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
	for _, c := range []struct {
		mediaType string
		blob      []byte
	}{
		{ocispec.MediaTypeImageLayer, data},
		{ocispec.MediaTypeImageLayerGzip, packed},
		{"application/vnd.oci.image.layer.nondistributable.v1.tar", data},
		{"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", packed},
		{"application/vnd.docker.image.rootfs.diff.tar", data},
		{"application/vnd.docker.image.rootfs.diff.tar.gzip", packed},
		{"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", packed},
	} {
		root := t.TempDir()
		got, err := env.Service.Apply(t.Context(), Put(t, env.Content, c.mediaType, c.blob), Bind(root), diff.ApplyOptions{Sync: c.mediaType == ocispec.MediaTypeImageLayer})
		if err != nil {
			t.Errorf("%s: %v", c.mediaType, err)
			continue
		}
		if got.Digest != want.Digest || got.Size != want.Size || got.MediaType != want.MediaType {
			t.Errorf("%s: got %+v, want %+v", c.mediaType, got, want)
		}
		equal(t, list(t, root), []string{"d/", "d/f = x", "l -> d/f"})
	}
}

func roundTrip(t *testing.T, env Env) {
	base := Put(t, env.Content, ocispec.MediaTypeImageLayer, layer(t,
		member{name: "same", body: "1"}, member{name: "changed", body: "2"}, member{name: "gone", body: "3"},
		member{name: "d/"}, member{name: "d/gone", body: "4"}, member{name: "d/same", body: "5"},
		member{name: "todir", body: "6"}, member{name: "tofile/"}, member{name: "tofile/x", body: "7"}))
	change := Put(t, env.Content, ocispec.MediaTypeImageLayer, layer(t,
		member{name: "changed", body: "new"}, member{name: ".wh.gone"}, member{name: "d/.wh.gone"},
		member{name: "d/new", body: "8"}, member{name: "todir/"}, member{name: "todir/in", body: "9"},
		member{name: "tofile", body: "10"}, member{name: "l", link: "/elsewhere"}))
	lower, upper := t.TempDir(), t.TempDir()
	applyTo := func(root string, descs ...ocispec.Descriptor) {
		t.Helper()
		for _, d := range descs {
			if _, err := env.Service.Apply(t.Context(), d, Bind(root), diff.ApplyOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	applyTo(lower, base)
	applyTo(upper, base, change)
	for _, mediaType := range []string{"", ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd} {
		made, err := env.Service.Compare(t.Context(), Bind(lower), Bind(upper), diff.CompareOptions{MediaType: mediaType, Ref: "ref" + mediaType})
		if err != nil {
			t.Fatal(err)
		}
		if want := mediaType; made.MediaType != want && (want != "" || made.MediaType != ocispec.MediaTypeImageLayerGzip) {
			t.Errorf("media type %q, asked for %q", made.MediaType, want)
		}
		again := t.TempDir()
		applyTo(again, base)
		applied, err := env.Service.Apply(t.Context(), made, Bind(again), diff.ApplyOptions{})
		if err != nil {
			t.Fatal(err)
		}
		equal(t, list(t, again), list(t, upper))
		info, err := env.Content.Info(t.Context(), made.Digest)
		if err != nil {
			t.Fatal(err)
		}
		label, compressed := info.Labels[diff.LabelUncompressed], made.MediaType != ocispec.MediaTypeImageLayer
		if info.Size != made.Size || compressed && label != applied.Digest.String() || !compressed && label != "" {
			t.Errorf("%+v has size %d and label %q, its diff id is %s", made, info.Size, label, applied.Digest)
		}
		if _, err := env.Content.Status(t.Context(), "ref"+mediaType); !errdefs.IsNotFound(err) {
			t.Errorf("the ingest is still there: %v", err)
		}
	}
	whole, err := env.Service.Compare(t.Context(), nil, Bind(upper), diff.CompareOptions{})
	if err != nil {
		t.Fatal(err)
	}
	again := t.TempDir()
	applyTo(again, whole)
	equal(t, list(t, again), list(t, upper))
}

func epoch(t *testing.T, env Env) {
	lower := t.TempDir()
	if err := os.WriteFile(filepath.Join(lower, "gone"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	at := time.Unix(1234567890, 0).UTC()
	old := at.Add(-time.Hour)
	var digests []digest.Digest
	for i := range 2 {
		upper := t.TempDir()
		for _, name := range []string{"new", "old"} {
			if err := os.WriteFile(filepath.Join(upper, name), []byte(name), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		now := time.Now().Add(time.Duration(i) * time.Hour)
		if err := errors.Join(os.Chtimes(filepath.Join(upper, "new"), now, now), os.Chtimes(filepath.Join(upper, "old"), old, old)); err != nil {
			t.Fatal(err)
		}
		d, err := env.Service.Compare(t.Context(), Bind(lower), Bind(upper), diff.CompareOptions{MediaType: ocispec.MediaTypeImageLayer, SourceDateEpoch: &at})
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, d.Digest)
	}
	if digests[0] != digests[1] {
		t.Errorf("made at different times they are %s and %s", digests[0], digests[1])
	}
	tr := tar.NewReader(bytes.NewReader(Get(t, env.Content, digests[0])))
	want := map[string]time.Time{".wh.gone": time.Unix(0, 0), "new": at, "old": old}
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if w, ok := want[h.Name]; !ok || !h.ModTime.Equal(w) {
			t.Errorf("%s is of %v, want %v", h.Name, h.ModTime, w)
		}
		delete(want, h.Name)
	}
	if len(want) > 0 {
		t.Errorf("not in the layer: %v", want)
	}
}

func labels(t *testing.T, env Env) {
	upper := t.TempDir()
	if err := os.WriteFile(filepath.Join(upper, "f"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var first ocispec.Descriptor
	for i, l := range []map[string]string{{"a": "1"}, {"b": "2"}} {
		d, err := env.Service.Compare(t.Context(), nil, Bind(upper), diff.CompareOptions{Labels: l})
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = d
		} else if d.Digest != first.Digest {
			t.Errorf("the same tree is %s and %s", first.Digest, d.Digest)
		}
	}
	info, err := env.Content.Info(t.Context(), first.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if info.Labels["a"] != "1" || info.Labels["b"] != "2" || info.Labels[diff.LabelUncompressed] == "" {
		t.Errorf("labels %v", info.Labels)
	}
}

func hostile(t *testing.T, env Env) {
	top := t.TempDir()
	root := filepath.Join(top, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []member{{name: "../evil", body: "x"}, {name: "a/../../evil", body: "x"}, {name: ".wh..."}} {
		desc := Put(t, env.Content, ocispec.MediaTypeImageLayerGzip, zip(t, layer(t, bad)))
		_, err := env.Service.Apply(t.Context(), desc, Bind(root), diff.ApplyOptions{})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), bad.name) {
			t.Errorf("%s: got %v, want an invalid argument that names it", bad.name, err)
		}
	}
	linked := Put(t, env.Content, ocispec.MediaTypeImageLayer, layer(t, member{name: "up", link: "../.."}, member{name: "up/evil", body: "x"}))
	if _, err := env.Service.Apply(t.Context(), linked, Bind(root), diff.ApplyOptions{}); err != nil {
		t.Error(err)
	}
	equal(t, list(t, top), []string{"root/", "root/evil = x", "root/up -> ../.."})
}

func damaged(t *testing.T, env Env) {
	var text strings.Builder
	for i := range 20_000 {
		fmt.Fprintln(&text, i*i)
	}
	whole := layer(t, member{name: "f", body: text.String()})
	blob := zip(t, whole)
	flipped := bytes.Clone(blob)
	flipped[len(flipped)-6] ^= 0x55 // its checksum
	for name, data := range map[string][]byte{
		"cut in the middle": blob[:len(blob)/2], "cut at the end": blob[:len(blob)-4], "cut in the header": blob[:5], "flipped": flipped,
		"short tar": zip(t, whole[:3000]),
	} {
		desc := Put(t, env.Content, ocispec.MediaTypeImageLayerGzip, data)
		_, err := env.Service.Apply(t.Context(), desc, Bind(t.TempDir()), diff.ApplyOptions{})
		if !errdefs.IsDataLoss(err) && !errdefs.IsFailedPrecondition(err) || !strings.Contains(fmt.Sprint(err), desc.Digest.String()) {
			t.Errorf("%s: got %v, want data loss that names the blob", name, err)
		}
	}
	desc := Put(t, env.Content, ocispec.MediaTypeImageLayerGzip, blob)
	desc.Size++
	if _, err := env.Service.Apply(t.Context(), desc, Bind(t.TempDir()), diff.ApplyOptions{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("wrong size: %v", err)
	}
}

func impossible(t *testing.T, env Env) {
	ctx, root := t.Context(), t.TempDir()
	blob := Put(t, env.Content, "application/x-unknown", layer(t))
	check := func(what string, err error, is func(error) bool) {
		t.Helper()
		if !is(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := env.Service.Apply(ctx, blob, Bind(root), diff.ApplyOptions{})
	check("unknown media type", err, errdefs.IsNotImplemented)
	_, err = env.Service.Apply(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("absent")}, Bind(root), diff.ApplyOptions{})
	check("no such blob", err, errdefs.IsNotFound)
	_, err = env.Service.Apply(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: "../x"}, Bind(root), diff.ApplyOptions{})
	check("no digest", err, errdefs.IsInvalidArgument)
	blob.MediaType = ocispec.MediaTypeImageLayer
	_, err = env.Service.Apply(ctx, blob, nil, diff.ApplyOptions{})
	check("no mounts", err, errdefs.IsInvalidArgument)
	_, err = env.Service.Compare(ctx, nil, Bind(root), diff.CompareOptions{MediaType: "application/x-unknown"})
	check("compare into an unknown media type", err, errdefs.IsNotImplemented)
	_, err = env.Service.Compare(ctx, nil, nil, diff.CompareOptions{})
	check("compare with nothing", err, errdefs.IsInvalidArgument)
	if _, err = env.Service.Compare(ctx, nil, Bind(filepath.Join(root, "absent")), diff.CompareOptions{Ref: "failed"}); err == nil {
		t.Error("compared with a directory that is not there")
	}
	if _, err := env.Content.Status(ctx, "failed"); !errdefs.IsNotFound(err) {
		t.Errorf("a failed comparison left its ingest: %v", err)
	}
}
