package transfer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	core "github.com/gantryd/gantry/core/transfer"
	edge "github.com/gantryd/gantry/internal/edge/registry"
	"github.com/gantryd/gantry/internal/edge/registry/registrytest"
)

func (w *world) pull(name string, store core.ImageStore) error {
	if store.Name == "" {
		store.Name = name
	}
	return w.transfer(core.Registry{Reference: name}, store, core.Options{})
}

// Twenty pulls of one image at a time fetch and unpack each layer once.
//
// contract: 6.3.12, 6.4.1
// promise: P2
func TestConcurrentPulls(t *testing.T) {
	reg := registrytest.New(t)
	img := registrytest.Build("amd64", 200_000, registrytest.Gzip, registrytest.Zstd, registrytest.Gzip, registrytest.None)
	reg.AddImage("app", "1", img)
	w := newWorld(t, edge.Config{})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			name := reg.Host() + "/app:1"
			if err := w.transfer(core.Registry{Reference: name}, core.ImageStore{Name: fmt.Sprintf("copy%d", i), Unpacks: unpackMemory()}, core.Options{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, l := range append(img.Layers, img.Config) {
		if n := reg.Count("GET", l.Digest.String()); n != 1 {
			t.Errorf("%s was fetched %d times", l.Digest, n)
		}
	}
	for _, l := range img.Layers {
		if n := w.applied.n[l.Digest]; n != 1 {
			t.Errorf("%s was unpacked %d times", l.Digest, n)
		}
	}
	w.clean(20)
}

// Layers are unpacked while later ones are still on their way.
//
// contract: 6.4.3
func TestOverlap(t *testing.T) {
	reg := registrytest.New(t)
	img := registrytest.Build("amd64", 10_000, registrytest.Gzip, registrytest.Gzip)
	reg.AddImage("app", "1", img)
	go1 := make(chan struct{})
	once := sync.OnceFunc(func() { close(go1) })
	defer once()
	reg.Hook = func(_ http.ResponseWriter, q *http.Request) bool {
		if strings.Contains(q.URL.Path, img.Layers[1].Digest.String()) {
			<-go1
		}
		return false
	}
	w := newWorld(t, edge.Config{})
	name := reg.Host() + "/app:1"
	err := w.transfer(core.Registry{Reference: name}, core.ImageStore{Name: name, Unpacks: unpackMemory()}, core.Options{Progress: func(p core.Progress) {
		if p.Event == "extracted" && p.Name == manifest.RefKey(img.Layers[0]) {
			once() // only now is the second layer sent
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	w.clean(1)
}

// contract: 1.5.2, 1.5.3, 1.5.11, 1.5.15, 6.4.1, 6.4.3, 6.3.11, 6.1.12
func TestPullLabelsAndSnapshots(t *testing.T) {
	reg := registrytest.New(t)
	amd, arm := registrytest.Build("amd64", 1000, registrytest.Gzip, registrytest.Zstd), registrytest.Build("arm64", 1000, registrytest.Gzip)
	idx := registrytest.Index(amd, arm)
	reg.AddImage("app", "1", idx)
	reg.AddImage("again", "1", amd)
	w := newWorld(t, edge.Config{})
	s := w.space("test")
	only := core.ImageStore{Platforms: []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}, Unpacks: unpackMemory()}
	if err := w.pull(reg.Host()+"/app:1", only); err != nil {
		t.Fatal(err)
	}
	labels := func(d digest.Digest) map[string]string {
		t.Helper()
		i, err := s.content.Info(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		return i.Labels
	}
	if l := labels(idx.Target.Digest); l["containerd.io/gc.ref.content.m.0"] != amd.Target.Digest.String() || l["containerd.io/gc.ref.content.m.1"] != arm.Target.Digest.String() {
		t.Errorf("index: %v", l)
	}
	l := labels(amd.Target.Digest)
	if l["containerd.io/gc.ref.content.config"] != amd.Config.Digest.String() || l["containerd.io/gc.ref.content.l.0"] != amd.Layers[0].Digest.String() ||
		l["containerd.io/gc.ref.content.l.1"] != amd.Layers[1].Digest.String() || l["containerd.io/distribution.source."+reg.Host()] != "app" {
		t.Errorf("manifest: %v", l)
	}
	chain := digest.FromString(amd.DiffIDs[0].String() + " " + amd.DiffIDs[1].String()).String()
	if got := labels(amd.Config.Digest)["containerd.io/gc.ref.snapshot.memory"]; got != chain {
		t.Errorf("config refers to snapshot %s, want %s", got, chain)
	}
	if _, err := s.content.Info(t.Context(), arm.Target.Digest); !errdefs.IsNotFound(err) {
		t.Errorf("the other platform's manifest: %v", err)
	}
	top, err := s.snaps.Stat(t.Context(), chain)
	if err != nil || top.Parent != amd.DiffIDs[0].String() || top.Kind != snapshot.KindCommitted ||
		top.Labels[snapshot.LabelRef] != chain || top.Labels[snapshot.LabelDiffID] != amd.DiffIDs[1].String() || top.Labels[snapshot.LabelParentChainID] != amd.DiffIDs[0].String() {
		t.Errorf("snapshot %+v, %v", top, err)
	}
	// A second pull of the same layers fetches none, and adds its repository.
	before := reg.Count("GET", "/blobs/")
	if err := w.pull(reg.Host()+"/again:1", core.ImageStore{}); err != nil {
		t.Fatal(err)
	}
	if n := reg.Count("GET", "/blobs/"); n != before {
		t.Errorf("%d blobs were fetched again", n-before)
	}
	if got := labels(amd.Layers[0].Digest)["containerd.io/distribution.source."+reg.Host()]; got != "app,again" {
		t.Errorf("source %q", got)
	}
	// Layers that are unpacked need not be fetched.
	for _, l := range amd.Layers {
		if err := s.content.Delete(t.Context(), l.Digest); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.pull(reg.Host()+"/app:1", only); err != nil {
		t.Fatal(err)
	}
	if n := reg.Count("GET", "/blobs/"); n != before {
		t.Error("layers were fetched though their snapshots exist")
	}
	// Metadata of all, content of one.
	w2 := newWorld(t, edge.Config{})
	only.AllMetadata, only.Unpacks = true, nil
	if err := w2.pull(reg.Host()+"/app:1", only); err != nil {
		t.Fatal(err)
	}
	for d, want := range map[digest.Digest]bool{arm.Target.Digest: true, arm.Config.Digest: true, arm.Layers[0].Digest: false, amd.Layers[0].Digest: true} {
		if _, err := w2.space("test").content.Info(t.Context(), d); (err == nil) != want {
			t.Errorf("%s: %v", d, err)
		}
	}
	// One manifest, all platforms wanted: the best for them.
	w3 := newWorld(t, edge.Config{})
	if err := w3.pull(reg.Host()+"/app:1", core.ImageStore{ManifestLimit: 1, Platforms: []ocispec.Platform{{OS: "linux", Architecture: "arm64"}, {OS: "linux", Architecture: "amd64"}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := w3.space("test").content.Info(t.Context(), amd.Target.Digest); !errdefs.IsNotFound(err) {
		t.Errorf("limit 1 took the second choice as well: %v", err)
	}
	w.clean(2)
	w2.clean(1)
}

// Bad images are refused with a reason and leave no image, lease or snapshot,
// and no ingest of what is bad. One of another blob, which the failure has cut
// short, is for the next pull, or for garbage collection.
//
// contract: 6.1.11, 6.4.1, 6.4.6
// promise: P36, C4, C6
func TestBadImages(t *testing.T) {
	amd := func() *registrytest.Image {
		return registrytest.Build("amd64", 5000, registrytest.Gzip, registrytest.Gzip)
	}
	change := func(edit func(m map[string]any)) []byte {
		m := map[string]any{}
		_ = json.Unmarshal(amd().Top, &m)
		edit(m)
		b, _ := json.Marshal(m)
		return b
	}
	layer := func(m map[string]any, i int) map[string]any { return m["layers"].([]any)[i].(map[string]any) }
	for _, c := range []struct {
		name  string
		mt    string
		top   []byte
		prep  func(reg *registrytest.Registry)
		class func(error) bool
		want  []string
		store core.ImageStore
	}{
		{name: "corrupt layer", prep: func(reg *registrytest.Registry) {
			b := slices.Clone(amd().Blobs[1])
			b[100]++
			reg.SetBlob(amd().Layers[1].Digest, b)
		}, class: errdefs.IsFailedPrecondition, want: []string{amd().Layers[1].Digest.String(), "is not"}},
		{name: "truncated layer", prep: func(reg *registrytest.Registry) {
			reg.SetBlob(amd().Layers[1].Digest, amd().Blobs[1][:100])
		}, class: errdefs.IsFailedPrecondition, want: []string{"100 bytes", amd().Layers[1].Digest.String()}},
		{name: "wrong size", top: change(func(m map[string]any) { layer(m, 0)["size"] = 17 }), class: errdefs.IsFailedPrecondition, want: []string{"the blob has 17"}},
		{name: "negative size", top: change(func(m map[string]any) { layer(m, 0)["size"] = -1 }), class: errdefs.IsInvalidArgument, want: []string{"size -1"}},
		{name: "bad digest", top: change(func(m map[string]any) { layer(m, 0)["digest"] = "sha256:../../x" }), class: errdefs.IsInvalidArgument, want: []string{"sha256:../../x"}},
		{name: "missing layer", top: change(func(m map[string]any) { layer(m, 0)["digest"] = digest.FromString("no").String() }), class: errdefs.IsNotFound, want: []string{digest.FromString("no").String(), "404"}},
		{name: "both manifest and index", top: change(func(m map[string]any) { m["manifests"] = []any{} }), class: errdefs.IsInvalidArgument, want: []string{"could be taken for one"}},
		{name: "index with layers", mt: ocispec.MediaTypeImageIndex, top: []byte(`{"schemaVersion":2,"manifests":[],"layers":[]}`), class: errdefs.IsInvalidArgument, want: []string{"could be taken for one"}},
		{name: "other media type inside", mt: manifest.DockerManifest, top: amd().Top, class: errdefs.IsInvalidArgument, want: []string{"announced as", "says that it is"}},
		{name: "schema 1", mt: manifest.DockerSchema1Signed, top: []byte(`{"schemaVersion":1,"fsLayers":[]}`), class: errdefs.IsNotImplemented, want: []string{"schema 1", "push the image anew"}},
		{name: "schema 1 in disguise", mt: manifest.DockerManifest, top: []byte(`{"schemaVersion":1,"fsLayers":[]}`), class: errdefs.IsInvalidArgument, want: []string{"schema 1"}},
		{name: "not JSON", top: []byte(`<html>`), class: errdefs.IsInvalidArgument, want: []string{"manifest sha256:"}},
		{name: "too many layers", top: []byte(`{"config":` + desc(amd().Config) + `,"layers":[` + strings.TrimSuffix(strings.Repeat(desc(amd().Layers[0])+",", 5000), ",") + `]}`), class: errdefs.IsInvalidArgument, want: []string{"5000 children"}},
		{name: "layers and diff ids differ", top: change(func(m map[string]any) { m["layers"] = m["layers"].([]any)[:1] }), class: errdefs.IsInvalidArgument, want: []string{"2 diff ids for 1 layers"}},
		{name: "layers exchanged", top: change(func(m map[string]any) { l := m["layers"].([]any); l[0], l[1] = l[1], l[0] }), class: errdefs.IsFailedPrecondition, want: []string{"the tar stream's digest is"}},
		{name: "huge config", top: change(func(m map[string]any) { m["config"].(map[string]any)["size"] = 1 << 40 }), class: errdefs.IsInvalidArgument, want: []string{"1099511627776 bytes, at most"}},
		{name: "no such platform", store: core.ImageStore{Unpacks: []core.Unpack{{Platform: &ocispec.Platform{OS: "plan9", Architecture: "mips"}, Snapshotter: "memory"}}}, class: errdefs.IsNotFound, want: []string{"plan9/mips", "linux/amd64"}},
		{name: "unknown snapshotter", store: core.ImageStore{Unpacks: []core.Unpack{{Snapshotter: "warp"}}}, class: errdefs.IsInvalidArgument, want: []string{"snapshotter not loaded: warp"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := registrytest.New(t)
			img := amd()
			reg.AddImage("app", "1", img)
			if c.top != nil {
				if c.mt == "" {
					c.mt = ocispec.MediaTypeImageManifest
				}
				reg.AddManifest("app", "1", c.mt, c.top)
			}
			if c.prep != nil {
				c.prep(reg)
			}
			if c.store.Unpacks == nil {
				c.store.Unpacks = unpackMemory()
			}
			w := newWorld(t, edge.Config{})
			err := w.pull(reg.Host()+"/app:1", c.store)
			wantError(t, err, c.class, append(c.want, "pull "+reg.Host()+"/app:1")...)
			w.clean(0)
			st, _ := w.space("test").content.Statuses(t.Context())
			for _, st := range st {
				if errdefs.IsFailedPrecondition(err) && strings.Contains(err.Error(), "fetch "+st.Ref) {
					t.Errorf("what is bad is left: %+v", st)
				}
			}
		})
	}
}

// Some small indexes that name each other many times are more paths than
// anybody can walk: each is looked at once. Many layers in many manifests are
// more than are remembered.
//
// promise: P36, C4
func TestIndexBombs(t *testing.T) {
	img := registrytest.Build("amd64", 1000, registrytest.Gzip)
	reg := registrytest.New(t)
	reg.AddImage("app", "plain", img)
	index := func(of ...ocispec.Descriptor) []byte {
		b, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: of})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	bomb := &registrytest.Image{Target: img.Target, Top: img.Top, Blobs: img.Blobs}
	var archived []byte
	for range manifest.MaxDepth {
		archived = layoutOf(bomb, nil) // one less: it has an index of its own
		b := index(slices.Repeat([]ocispec.Descriptor{bomb.Target}, 200)...)
		bomb = &registrytest.Image{Target: reg.AddManifest("app", "bomb", ocispec.MediaTypeImageIndex, b), Top: b, Blobs: append(slices.Clone(bomb.Blobs), bomb.Top)}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w := newWorld(t, edge.Config{})
	store := core.ImageStore{Name: "pulled", Platforms: []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}, Unpacks: unpackMemory()}
	if err := w.transferCtx(ctx, core.Registry{Reference: reg.Host() + "/app:bomb"}, store, core.Options{}); err != nil {
		t.Error("pull: ", err)
	}
	w.clean(1)
	w = newWorld(t, edge.Config{})
	if err := w.transferCtx(ctx, core.Import{Reader: bytes.NewReader(archived)}, core.ImageStore{Name: "imported", Unpacks: unpackMemory()}, core.Options{}); err != nil {
		t.Error("import: ", err)
	}
	w.clean(1)

	var many []ocispec.Descriptor
	for i := range 5 {
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: img.Config,
			Layers: slices.Repeat(img.Layers, manifest.MaxChildren-1), Annotations: map[string]string{"n": fmt.Sprint(i)}}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		d := reg.AddManifest("app", "", m.MediaType, b)
		d.Platform = img.Target.Platform
		many = append(many, d)
	}
	reg.AddManifest("app", "many", ocispec.MediaTypeImageIndex, index(many...))
	w = newWorld(t, edge.Config{})
	err := w.transferCtx(ctx, core.Registry{Reference: reg.Host() + "/app:many"}, store, core.Options{})
	wantError(t, err, errdefs.IsInvalidArgument, "more than 16384", "layers")
	w.clean(0)
}

// A download that is cut because another layer of the image is bad has done
// nothing wrong: the next pull goes on where it ended.
//
// contract: 6.1.3
func TestCutByAnother(t *testing.T) {
	reg := registrytest.New(t)
	img := registrytest.Build("amd64", 5000, registrytest.Gzip, registrytest.Gzip)
	good, other := img.Layers[0], img.Layers[1]
	reg.AddImage("app", "1", img)
	m := map[string]any{}
	_ = json.Unmarshal(img.Top, &m)
	l := m["layers"].([]any)
	l[0], l[1] = l[1], l[0] // so that the lower one is not what the config says
	b, _ := json.Marshal(m)
	reg.AddManifest("app", "bad", ocispec.MediaTypeImageManifest, b)
	w := newWorld(t, edge.Config{})
	const begun = 100
	var ranges []string
	reg.Hook = func(rw http.ResponseWriter, q *http.Request) bool {
		switch {
		case q.Method == http.MethodGet && strings.Contains(q.URL.Path, other.Digest.String()):
			// Not before the one that is to be cut has begun.
			for q.Context().Err() == nil {
				if st, err := w.space("test").content.Status(q.Context(), manifest.RefKey(good)); err == nil && st.Offset == begun {
					break
				}
				runtime.Gosched()
			}
		case q.Method == http.MethodGet && strings.Contains(q.URL.Path, good.Digest.String()):
			ranges = append(ranges, q.Header.Get("Range"))
			if len(ranges) == 1 {
				rw.Header().Set("Content-Length", fmt.Sprint(good.Size))
				rw.Write(img.Blobs[0][:begun])
				rw.(http.Flusher).Flush()
				<-q.Context().Done()
				return true
			}
		}
		return false
	}
	err := w.pull(reg.Host()+"/app:bad", core.ImageStore{Unpacks: unpackMemory()})
	wantError(t, err, errdefs.IsFailedPrecondition, "the tar stream's digest is")
	w.clean(0)
	if err := w.pull(reg.Host()+"/app:1", core.ImageStore{Unpacks: unpackMemory()}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"", fmt.Sprintf("bytes=%d-", begun)}; !slices.Equal(ranges, want) {
		t.Errorf("the layer was asked for with ranges %q, want %q", ranges, want)
	}
	w.clean(1)
}

func desc(d ocispec.Descriptor) string {
	b, _ := json.Marshal(d)
	return string(b)
}

// contract: 6.1.1
func TestBadReference(t *testing.T) {
	w := newWorld(t, edge.Config{})
	wantError(t, w.pull("not a reference", core.ImageStore{}), errdefs.IsInvalidArgument, `"not a reference"`)
	w.clean(0)
}

// An ingest that an earlier pull left is continued, or dropped if it is not the
// beginning of the blob. One that another client has open is waited for, not for ever.
//
// promise: P32, P7
func TestUnfinishedIngests(t *testing.T) {
	reg := registrytest.New(t)
	img := registrytest.Build("amd64", 100_000, registrytest.Gzip)
	reg.AddImage("app", "1", img)
	layer, blob := img.Layers[0], img.Blobs[0]
	for _, c := range []struct {
		name  string
		left  []byte
		first string // Range of the first request for the layer
		n     int
	}{
		{"continued", blob[:60_000], "bytes=60000-", 1},
		{"garbage", bytes.Repeat([]byte("x"), 60_000), "bytes=60000-", 2},
		{"too long", append(slices.Clone(blob), 1, 2, 3), "", 1},
		{"all there", blob, "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, edge.Config{})
			cs := w.space("test").content
			in, err := cs.Writer(t.Context(), manifest.RefKey(layer), content.WriterOptions{})
			if err != nil {
				t.Fatal(err)
			}
			_, _ = in.Write(c.left)
			in.Close()
			began := len(reg.Requests())
			if err := w.pull(reg.Host()+"/app:1", core.ImageStore{Unpacks: unpackMemory()}); err != nil {
				t.Fatal(err)
			}
			n, first := 0, ""
			for _, q := range reg.Requests()[began:] {
				if strings.Contains(q.Path, layer.Digest.String()) {
					if n == 0 {
						first = q.Header.Get("Range")
					}
					n++
				}
			}
			if n != c.n || first != c.first {
				t.Errorf("%d requests, the first with range %q", n, first)
			}
		})
	}
	w := newWorld(t, edge.Config{})
	in, err := w.space("test").content.Writer(t.Context(), manifest.RefKey(layer), content.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	wantError(t, w.pull(reg.Host()+"/app:1", core.ImageStore{}), errdefs.IsUnavailable, "another client has the ingest", "did not go on for 1s")
	if d := time.Since(began); d > 15*time.Second {
		t.Errorf("waited %s", d)
	}
	done := make(chan error, 1)
	go func() { done <- w.pull(reg.Host()+"/app:1", core.ImageStore{}) }()
	within(t, "the pull got to the layer", func() bool { l, _ := w.space("test").leases.List(t.Context()); return len(l) == 1 })
	_, _ = in.Write(blob)
	if err := in.Commit(t.Context(), layer.Size, layer.Digest, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("after the other client committed: %v", err)
	}
	w.clean(1)
}

// Cancelling a pull returns at once and leaves no record.
//
// promise: P7
func TestCancelPull(t *testing.T) {
	reg := registrytest.New(t)
	img := registrytest.Build("amd64", 1000, registrytest.Gzip, registrytest.Gzip)
	reg.AddImage("app", "1", img)
	reached := make(chan struct{}, 10)
	reg.Hook = func(_ http.ResponseWriter, q *http.Request) bool {
		if strings.Contains(q.URL.Path, img.Layers[1].Digest.String()) {
			reached <- struct{}{}
			<-q.Context().Done()
			return true
		}
		return false
	}
	w := newWorld(t, edge.Config{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- w.transferCtx(ctx, core.Registry{Reference: reg.Host() + "/app:1"}, core.ImageStore{Name: "x", Unpacks: unpackMemory()}, core.Options{})
	}()
	<-reached
	cancel()
	select {
	case err := <-done:
		wantError(t, err, errdefs.IsCanceled)
	case <-time.After(10 * time.Second):
		t.Fatal("cancel takes more than ten seconds")
	}
	w.clean(0)
}

// contract: 6.1.8
func TestPushPlatforms(t *testing.T) {
	src, dst := registrytest.New(t), registrytest.New(t)
	amd, arm := registrytest.Build("amd64", 1000, registrytest.Gzip), registrytest.Build("arm64", 1000, registrytest.Gzip)
	idx := registrytest.Index(amd, arm)
	src.AddImage("app", "1", idx)
	w := newWorld(t, edge.Config{})
	name := src.Host() + "/app:1"
	linuxAMD := []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}
	if err := w.pull(name, core.ImageStore{Platforms: linuxAMD}); err != nil {
		t.Fatal(err)
	}
	push := func(ps []ocispec.Platform) error {
		return w.transfer(core.ImageStore{Name: name, Platforms: ps}, core.Registry{Reference: dst.Host() + "/x:1"}, core.Options{})
	}
	wantError(t, push(nil), errdefs.IsNotFound, "linux/arm64", "pull all platforms")
	if err := push(linuxAMD); err != nil {
		t.Fatal(err)
	}
	if _, b := dst.Manifest("x", "1"); !bytes.Equal(b, amd.Top) {
		t.Errorf("the tag has %s", b)
	}
	if err := w.pull(name, core.ImageStore{}); err != nil {
		t.Fatal(err)
	}
	if err := push(nil); err != nil {
		t.Fatal(err)
	}
	if mt, b := dst.Manifest("x", "1"); !bytes.Equal(b, idx.Top) || mt != idx.Target.MediaType {
		t.Errorf("the tag has %s %s", mt, b)
	}
	wantError(t, w.transfer(core.ImageStore{Name: "nobody"}, core.Registry{Reference: "a/b"}, core.Options{}), errdefs.IsNotFound, "nobody")
	w.clean(1)
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	bin, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed (Debian package %s)", name, name)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Archives that skopeo wrote are imported, and skopeo reads what is exported.
//
// contract: 6.5.1, 6.5.2, 6.3.8, 1.5.20
func TestSkopeo(t *testing.T) {
	reg := registrytest.New(t)
	img := registrytest.Build("amd64", 50_000, registrytest.Gzip, registrytest.Gzip)
	reg.AddImage("app", "1", img)
	dir := t.TempDir()
	for _, form := range []string{"docker-archive", "oci-archive"} {
		file := filepath.Join(dir, form+".tar")
		arg := form + ":" + file + ":example.com/app:1"
		run(t, "skopeo", "copy", "--insecure-policy", "--src-tls-verify=false", "docker://"+reg.Host()+"/app:1", arg)
		plain, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, wrap := range []string{"plain", "gzip", "zstd"} {
			var b bytes.Buffer
			switch wrap {
			case "gzip":
				z := gzip.NewWriter(&b)
				_, _ = z.Write(plain)
				z.Close()
			case "zstd":
				z, _ := zstd.NewWriter(&b)
				_, _ = z.Write(plain)
				z.Close()
			default:
				b.Write(plain)
			}
			w := newWorld(t, edge.Config{})
			store := core.ImageStore{Unpacks: unpackMemory(), References: []core.Reference{{Name: "example.com/app", IsPrefix: true, AddDigest: true}}}
			if err := w.transfer(core.Import{Reader: &b, ForceCompress: wrap == "zstd"}, store, core.Options{}); err != nil {
				t.Fatalf("%s %s: %v", form, wrap, err)
			}
			w.clean(2)
			got, err := w.space("test").images.Get(t.Context(), "example.com/app:1")
			if err != nil {
				all, _ := w.space("test").images.List(t.Context())
				t.Fatalf("%s: %v, there are %v", form, err, all)
			}
			m, err := manifest.ReadManifest(t.Context(), w.space("test").content, got.Target)
			if err != nil || len(m.Layers) != 2 {
				t.Fatal(m, err)
			}
			config, err := manifest.ReadConfig(t.Context(), w.space("test").content, m.Config)
			if err != nil || !slices.Equal(config.RootFS.DiffIDs, img.DiffIDs) {
				t.Errorf("%s: diff ids %v, want %v, %v", form, config.RootFS.DiffIDs, img.DiffIDs, err)
			}
			if form == "docker-archive" {
				want := manifest.DockerLayer
				if wrap == "zstd" {
					want = manifest.DockerLayerGzip
				}
				if m.Layers[0].MediaType != want {
					t.Errorf("%s: layer is %s, want %s", form, m.Layers[0].MediaType, want)
				}
			}
			if wrap != "plain" {
				continue
			}
			out := &buffer{}
			if err := w.transfer(core.ImageStore{Name: "example.com/app:1"}, core.Export{Writer: out}, core.Options{}); err != nil {
				t.Fatal(err)
			}
			exported := filepath.Join(dir, form+"-exported.tar")
			if err := os.WriteFile(exported, out.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			as := "docker-archive:" + exported
			if form == "oci-archive" { // skopeo takes no Docker manifest from a layout
				as = "oci-archive:" + exported + ":1"
			}
			if s := run(t, "skopeo", "inspect", "--config", as); !strings.Contains(s, img.DiffIDs[1].String()) {
				t.Errorf("skopeo reads of %s: %s", as, s)
			}
		}
	}
}

type entry struct {
	name, link string
	body       []byte
	kind       byte
}

func tarOf(entries ...entry) []byte {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		if e.kind == 0 {
			e.kind = tar.TypeReg
		}
		_ = tw.WriteHeader(&tar.Header{Name: e.name, Linkname: e.link, Typeflag: e.kind, Size: int64(len(e.body)), Mode: 0o644})
		_, _ = tw.Write(e.body)
	}
	_ = tw.Close()
	return b.Bytes()
}

func layoutOf(img *registrytest.Image, annotations map[string]string, more ...entry) []byte {
	d := img.Target
	d.Annotations = annotations
	idx, _ := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{d}})
	es := []entry{{name: "oci-layout", body: []byte(`{"imageLayoutVersion":"1.0.0"}`)}, {name: "index.json", body: idx}}
	for _, b := range append([][]byte{img.Top}, img.Blobs...) {
		es = append(es, entry{name: "blobs/sha256/" + digest.FromBytes(b).Encoded(), body: b})
	}
	return tarOf(append(es, more...)...)
}

// contract: 6.5.1
// promise: C4, C6
func TestHostileArchives(t *testing.T) {
	img := registrytest.Build("amd64", 1000, registrytest.Gzip)
	layout := entry{name: "oci-layout", body: []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	many := make([]entry, 0, 100_100)
	for i := range 100_050 {
		many = append(many, entry{name: fmt.Sprint("d", i), kind: tar.TypeDir})
	}
	config := entry{name: "c.json", body: []byte(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["` + digest.FromString("x").String() + `"]}}`)}
	for _, c := range []struct {
		name string
		tar  []byte
		want string
	}{
		{"empty", nil, "empty"},
		{"not a tar", bytes.Repeat([]byte("abc"), 1000), "tar"},
		{"gzip of nothing", []byte{0x1f, 0x8b, 0, 0}, "gzip"},
		{"no index", tarOf(layout), "neither index.json nor manifest.json"},
		{"no layout version", tarOf(entry{name: "index.json", body: []byte(`{}`)}), "oci-layout"},
		{"other version", tarOf(entry{name: "oci-layout", body: []byte(`{"imageLayoutVersion":"9"}`)}, entry{name: "index.json", body: []byte(`{}`)}), "want 1.0.0"},
		{"parent", tarOf(layout, entry{name: "../x", body: []byte("x")}), "points outside"},
		{"absolute", tarOf(layout, entry{name: "/etc/x", body: []byte("x")}), "points outside"},
		{"device", tarOf(layout, entry{name: "dev", kind: tar.TypeChar}), "neither a file nor a link"},
		{"blob name", tarOf(layout, entry{name: "blobs/sha256/zz", body: []byte("x")}), "not the name of a blob"},
		{"blob bytes", tarOf(layout, entry{name: "blobs/sha256/" + digest.FromString("y").Encoded(), body: []byte("x")}), "blobs/sha256/"},
		{"huge index", tarOf(layout, entry{name: "index.json", body: make([]byte, 5<<20)}), "at most"},
		{"index is a manifest", tarOf(layout, entry{name: "index.json", body: img.Top}), "announced as"},
		{"missing manifest", layoutOf(&registrytest.Image{Target: img.Target}, nil), "is not in the archive"},
		{"missing layer", layoutOf(&registrytest.Image{Target: img.Target, Top: img.Top, Blobs: img.Blobs[1:]}, nil), "is not in the archive"},
		{"too many entries", tarOf(many...), "more than 100000 entries"},
		{"docker: link loop", tarOf(config, entry{name: "a", link: "b", kind: tar.TypeSymlink}, entry{name: "b", link: "a", kind: tar.TypeSymlink},
			entry{name: "manifest.json", body: []byte(`[{"Config":"c.json","Layers":["a"]}]`)}), "too many links"},
		{"docker: link outside", tarOf(config, entry{name: "a", link: "../../etc/passwd", kind: tar.TypeSymlink},
			entry{name: "manifest.json", body: []byte(`[{"Config":"c.json","Layers":["a"]}]`)}), "is not in the archive"},
		{"docker: wrong layer", tarOf(config, entry{name: "l.tar", body: []byte("not x")}, entry{name: "manifest.json", body: []byte(`[{"Config":"c.json","Layers":["l.tar"]}]`)}), "the config says"},
		{"docker: bad name", tarOf(entry{name: "c.json", body: []byte(`{}`)}, entry{name: "manifest.json", body: []byte(`[{"Config":"c.json","RepoTags":["../x"]}]`)}), "../x"},
		{"truncated", layoutOf(img, nil)[:2700], "entry"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, edge.Config{})
			err := w.transfer(core.Import{Reader: bytes.NewReader(c.tar)}, core.ImageStore{Name: "x"}, core.Options{})
			wantError(t, err, func(err error) bool {
				return errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err) || c.name == "truncated"
			}, "import", c.want)
			w.clean(0)
			if st, _ := w.space("test").content.Statuses(t.Context()); len(st) != 0 {
				t.Errorf("ingests are left: %v", st)
			}
		})
	}
}

// What an import is called (contract 6.3.8).
//
// contract: 6.3.8, 1.5.20, 6.5.1
func TestImportNames(t *testing.T) {
	img := registrytest.Build("amd64", 10, registrytest.Gzip)
	d := "@" + img.Target.Digest.String()
	for _, c := range []struct {
		annotations map[string]string
		store       core.ImageStore
		want        []string
	}{
		{map[string]string{"io.containerd.image.name": "a.com/b:1"}, core.ImageStore{References: []core.Reference{{Name: "p", IsPrefix: true, AllowOverwrite: true}}}, []string{"a.com/b:1"}},
		{map[string]string{"io.containerd.image.name": "a.com/b:1"}, core.ImageStore{References: []core.Reference{{Name: "p", IsPrefix: true}}}, nil},
		{map[string]string{"io.containerd.image.name": "a.com/b:1"}, core.ImageStore{References: []core.Reference{{Name: "a.com/b", IsPrefix: true, AddDigest: true}}}, []string{"a.com/b:1", "a.com/b" + d}},
		{map[string]string{"io.containerd.image.name": "a.com/b:1"}, core.ImageStore{References: []core.Reference{{Name: "a.com/b", IsPrefix: true, AddDigest: true, SkipNamedDigest: true}}}, []string{"a.com/b:1"}},
		{map[string]string{"io.containerd.image.name": "a.com/bb:1"}, core.ImageStore{References: []core.Reference{{Name: "a.com/b", IsPrefix: true}}}, nil},
		{map[string]string{"org.opencontainers.image.ref.name": "7"}, core.ImageStore{References: []core.Reference{{Name: "p", IsPrefix: true}}}, []string{"p:7"}},
		{map[string]string{"org.opencontainers.image.ref.name": "x/y:7"}, core.ImageStore{References: []core.Reference{{Name: "p", IsPrefix: true}}}, nil},
		{map[string]string{"org.opencontainers.image.ref.name": "x/y:7"}, core.ImageStore{References: []core.Reference{{Name: "p", IsPrefix: true, AllowOverwrite: true}}}, []string{"x/y:7"}},
		{nil, core.ImageStore{References: []core.Reference{{Name: "p", IsPrefix: true, AddDigest: true, SkipNamedDigest: true}}}, []string{"p" + d}},
		{nil, core.ImageStore{Name: "whole"}, []string{"whole"}},
	} {
		w := newWorld(t, edge.Config{})
		err := w.transfer(core.Import{Reader: bytes.NewReader(layoutOf(img, c.annotations))}, c.store, core.Options{})
		var got []string
		all, _ := w.space("test").images.List(t.Context())
		for _, i := range all {
			got = append(got, i.Name)
			for k := range i.Target.Annotations {
				if strings.HasPrefix(k, "io.containerd.import") {
					t.Errorf("%s has the annotation %s", i.Name, k)
				}
			}
		}
		if !slices.Equal(got, c.want) || (err == nil) != (len(c.want) > 0) {
			t.Errorf("%v, %+v: %v, want %v, %v", c.annotations, c.store.References, got, c.want, err)
		}
		if len(c.want) == 0 && !errdefs.IsNotFound(err) {
			t.Errorf("class of %v", err)
		}
	}
}

// contract: 6.5.2
func TestExportChoices(t *testing.T) {
	reg := registrytest.New(t)
	amd, arm := registrytest.Build("amd64", 1000, registrytest.Gzip), registrytest.Build("arm64", 1000, registrytest.Gzip)
	reg.AddImage("app", "1", registrytest.Index(amd, arm))
	w := newWorld(t, edge.Config{})
	name := reg.Host() + "/app:1"
	linuxAMD := []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}
	if err := w.pull(name, core.ImageStore{Platforms: linuxAMD}); err != nil {
		t.Fatal(err)
	}
	files := func(e core.Export) []string {
		t.Helper()
		b := &buffer{}
		e.Writer = b
		if err := w.transfer(core.ImageStore{Name: name}, e, core.Options{}); err != nil {
			t.Fatal(err)
		}
		var s []string
		tr := tar.NewReader(b)
		for {
			h, err := tr.Next()
			if err == io.EOF {
				return s
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.ModTime.Unix() != 0 {
				t.Errorf("%s has a time", h.Name)
			}
			s = append(s, h.Name)
		}
	}
	has := func(s []string, d digest.Digest) bool { return slices.Contains(s, "blobs/sha256/"+d.Encoded()) }
	got := files(core.Export{})
	if !has(got, amd.Layers[0].Digest) || has(got, arm.Target.Digest) || !slices.Contains(got, "manifest.json") || got[0] != "oci-layout" {
		t.Errorf("what is there: %v", got)
	}
	if got := files(core.Export{SkipCompatibilityManifest: true}); slices.Contains(got, "manifest.json") {
		t.Errorf("without manifest.json: %v", got)
	}
	err := w.transfer(core.ImageStore{Name: name}, core.Export{Writer: &buffer{}, AllPlatforms: true}, core.Options{})
	wantError(t, err, errdefs.IsNotFound, arm.Target.Digest.String())
	err = w.transfer(core.ImageStore{Name: name}, core.Export{Writer: &buffer{}, Platforms: []ocispec.Platform{{OS: "plan9", Architecture: "x"}}}, core.Options{})
	wantError(t, err, errdefs.IsNotFound, "no image for the platforms")
	if err := w.pull(name, core.ImageStore{}); err != nil {
		t.Fatal(err)
	}
	if got := files(core.Export{AllPlatforms: true}); !has(got, arm.Layers[0].Digest) {
		t.Errorf("all platforms: %v", got)
	}
	if got := files(core.Export{Platforms: linuxAMD}); has(got, arm.Target.Digest) {
		t.Errorf("one platform: %v", got)
	}
	if _, err := w.space("test").images.Create(t.Context(), image.Image{Name: name + "-b", Target: amd.Target}); err != nil {
		t.Fatal(err)
	}
	w.clean(2)
}

// remote is a snapshotter that has some layers without anybody unpacking them.
type remote struct {
	snapshot.Store
	has map[string]bool // by chain id
}

func (r *remote) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	ref := labels[snapshot.LabelRef]
	if !r.has[ref] {
		return r.Store.Prepare(ctx, key, parent, labels)
	}
	if _, err := r.Store.Prepare(ctx, key, parent, labels); err != nil {
		return nil, err
	}
	if err := r.Commit(ctx, ref, key, snapshot.CommitOptions{Labels: labels}); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("target snapshot %q: %w", ref, errdefs.ErrAlreadyExists)
}

// A remote snapshotter answers AlreadyExists for layers that it brings itself:
// they are neither fetched nor applied, those above them are.
//
// contract: 13.9, 1.5.15, 6.4.3
func TestRemoteSnapshotter(t *testing.T) {
	reg := registrytest.New(t)
	img := registrytest.Build("amd64", 1000, registrytest.Gzip, registrytest.Gzip, registrytest.Gzip)
	reg.AddImage("app", "1", img)
	chain := identity.ChainIDs(slices.Clone(img.DiffIDs))
	w := newWorld(t, edge.Config{})
	s := w.space("test")
	s.remote = &remote{s.snaps, map[string]bool{chain[0].String(): true, chain[1].String(): true}}
	if err := w.pull(reg.Host()+"/app:1", core.ImageStore{Unpacks: unpackMemory()}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []int{0, 0, 1} {
		if n := reg.Count("GET", img.Layers[i].Digest.String()); n != want {
			t.Errorf("layer %d was fetched %d times", i, n)
		}
		if n := w.applied.n[img.Layers[i].Digest]; n != want {
			t.Errorf("layer %d was applied %d times", i, n)
		}
		if info, err := s.snaps.Stat(t.Context(), chain[i].String()); err != nil || info.Labels[snapshot.LabelRef] != chain[i].String() {
			t.Errorf("snapshot of layer %d: %+v, %v", i, info, err)
		}
	}
	w.clean(1)
}
