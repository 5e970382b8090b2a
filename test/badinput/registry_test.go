package badinput

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/internal/edge/wire/transferrpc"
	"github.com/gantryd/gantry/test/testimage"
)

// liar is a registry that means harm: what it answers to a manifest's name or a
// blob's digest is up to the test.
type liar struct {
	*httptest.Server
	mu        sync.Mutex
	manifests map[string]answer // by tag or digest
	blobs     map[digest.Digest]answer
	// before may answer a request itself, and says so.
	before func(w http.ResponseWriter, q *http.Request) bool
}

// answer is a body with its media type, of which less may be sent than was said.
type answer struct {
	mediaType string
	body      []byte
	claim     int // Content-Length, if not the body's own
	digest    digest.Digest
}

func newLiar(t testing.TB, img *testimage.Image) *liar {
	l := &liar{manifests: map[string]answer{}, blobs: map[digest.Digest]answer{}}
	l.Server = httptest.NewServer(l)
	t.Cleanup(l.Close)
	if img != nil {
		for d, b := range img.Blobs {
			l.blobs[d] = answer{body: b}
		}
		target := answer{mediaType: img.Target.MediaType, body: img.Blobs[img.Target.Digest]}
		l.manifests["latest"], l.manifests[img.Target.Digest.String()] = target, target
	}
	return l
}

func (l *liar) host() string { return strings.TrimPrefix(l.URL, "http://") }
func (l *liar) ref() string  { return l.host() + "/lies/and/more:latest" }

// manifest serves a body as what "latest" is, and under its digest.
func (l *liar) manifest(mediaType string, body []byte) digest.Digest {
	d := digest.FromBytes(body)
	l.manifests["latest"], l.manifests[d.String()] = answer{mediaType: mediaType, body: body}, answer{mediaType: mediaType, body: body}
	return d
}

func (l *liar) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if l.before != nil && l.before(w, q) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var a answer
	var ok bool
	if _, name, found := strings.Cut(q.URL.Path, "/manifests/"); found {
		a, ok = l.manifests[name]
	} else if _, name, found := strings.Cut(q.URL.Path, "/blobs/"); found {
		a, ok = l.blobs[digest.Digest(name)]
		a.mediaType = "application/octet-stream"
	}
	if !ok {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		io.WriteString(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such thing"}]}`)
		return
	}
	d := a.digest
	if d == "" {
		d = digest.FromBytes(a.body)
	}
	if strings.Contains(q.URL.Path, "/manifests/") {
		w.Header().Set("Docker-Content-Digest", d.String())
	}
	w.Header().Set("Content-Type", a.mediaType)
	w.Header().Set("Content-Length", strconv.Itoa(max(a.claim, len(a.body))))
	if q.Method == http.MethodHead {
		return
	}
	w.Write(a.body)
	if a.claim > len(a.body) { // hang up in the middle
		panic(http.ErrAbortHandler)
	}
}

// pull moves an image from a registry into the store and unpacks it.
func (d *daemon) pull(ref, snapshotter string, opts registry.Options, only ...ocispec.Platform) error {
	ctx, cancel := context.WithTimeout(d.t.Context(), 90*time.Second)
	defer cancel()
	return d.transfers().Transfer(ctx, transfer.Registry{Reference: ref, Options: opts},
		transfer.ImageStore{Name: "example.org/bad:latest", Platforms: only, Unpacks: []transfer.Unpack{{Snapshotter: snapshotter}}}, transfer.Options{})
}

// small is an image of one gzip layer, small enough for a test to make many.
func small(t testing.TB) *testimage.Image {
	t.Helper()
	img, err := testimage.New(ocispec.ImageConfig{Cmd: []string{"/x"}}, testimage.Layer{Files: []testimage.File{{Name: "file", Body: bytes.Repeat([]byte("some text\n"), 5000)}}, Compression: "gzip"})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// withLayer is an image of one layer of any bytes and media type.
func withLayer(t testing.TB, mediaType string, layer []byte, diffID digest.Digest) *testimage.Image {
	t.Helper()
	img := &testimage.Image{Blobs: map[digest.Digest][]byte{}}
	config, err := json.Marshal(ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}}})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: img.Add(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{img.Add(mediaType, layer)}})
	if err != nil {
		t.Fatal(err)
	}
	img.Target = img.Add(ocispec.MediaTypeImageManifest, manifest)
	return img
}

func layerOf(t testing.TB, img *testimage.Image) ocispec.Descriptor {
	t.Helper()
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Blobs[img.Target.Digest], &m); err != nil || len(m.Layers) == 0 {
		t.Fatalf("no layer: %v", err)
	}
	return m.Layers[0]
}

func configOf(t testing.TB, img *testimage.Image) ocispec.Descriptor {
	t.Helper()
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Blobs[img.Target.Digest], &m); err != nil {
		t.Fatal(err)
	}
	return m.Config
}

func zip(b []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(b)
	w.Close()
	return buf.Bytes()
}

// A reference that is none is refused before anything is contacted.
//
// contract: 1.3.41
// promise: P36
func TestBadReferences(t *testing.T) {
	d := start(t)
	before := d.inventory()
	for _, ref := range []string{"", "/", "a b", "127.0.0.1:1/", "127.0.0.1:1/UPPER:x", "127.0.0.1:1/x:tag:tag", "127.0.0.1:1/x@sha256:12", "127.0.0.1:1/x@md5:d41d8cd98f00b204e9800998ecf8427e",
		"127.0.0.1:1/../x:y", "http://127.0.0.1:1/x:y", "127.0.0.1:99999/x:y", "127.0.0.1:1/x:" + strings.Repeat("t", 200), "127.0.0.1:1/" + strings.Repeat("x/", 200) + "x:y", "127.0.0.1:1/x:y\n", "127.0.0.1:1/x?y=z:w"} {
		t.Run(fmt.Sprintf("%.40q", ref), func(t *testing.T) {
			refused(t, d.pull(ref, "overlayfs", registry.Options{}), nil, errdefs.ErrInvalidArgument)
		})
	}
	d.unchanged(before)
}

// What registries do that nobody wants: each pull ends, within its bound, in an
// error that names where it was and what the registry said or did.
//
// contract: 1.3.41, 10.12, 10.15
// promise: P7, P36
func TestBadRegistries(t *testing.T) {
	d := start(t)
	before := d.inventory()

	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.Addr().String()
	closed.Close()

	good := small(t)
	layer := layerOf(t, good)
	body := good.Blobs[layer.Digest]
	other := digest.FromString("something else")
	wrong := registry.Options{Credentials: func(context.Context, registry.AuthRequest) (registry.Credential, error) {
		return registry.Credential{Username: "me", Secret: "guess"}, nil
	}}
	basic := func(w http.ResponseWriter, q *http.Request) bool {
		w.Header().Set("WWW-Authenticate", `Basic realm="lies"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	bearer := func(l *liar, status int, token string) func(w http.ResponseWriter, q *http.Request) bool {
		return func(w http.ResponseWriter, q *http.Request) bool {
			if q.URL.Path == "/token" {
				w.WriteHeader(status)
				io.WriteString(w, token)
				return true
			}
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="lies",scope="repository:lies/and/more:pull"`, l.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
	}
	denied := []error{errdefs.ErrUnauthenticated, errdefs.ErrPermissionDenied}
	spoiled := []error{errdefs.ErrFailedPrecondition, errdefs.ErrInvalidArgument, errdefs.ErrDataLoss}
	index := func(platforms ...ocispec.Platform) []byte {
		idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
		for _, p := range platforms {
			idx.Manifests = append(idx.Manifests, ocispec.Descriptor{MediaType: good.Target.MediaType, Digest: good.Target.Digest, Size: good.Target.Size, Platform: &p})
		}
		b, err := json.Marshal(idx)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}

	for _, tc := range []struct {
		name    string
		prepare func(l *liar) (ref string) // ref "" is the registry's own
		opts    registry.Options
		only    []ocispec.Platform
		words   []string
		classes []error
	}{
		{"unreachable", func(*liar) string { return nobody + "/x/y:z" }, registry.Options{}, nil, []string{nobody, "connection refused"}, []error{errdefs.ErrUnavailable}},
		{"unauthorised, basic", func(l *liar) string { l.before = basic; return "" }, registry.Options{}, nil, []string{"401", "lies/and/more"}, denied},
		{"wrong password, basic", func(l *liar) string { l.before = basic; return "" }, wrong, nil, []string{"401", "lies/and/more"}, denied},
		{"unauthorised, bearer", func(l *liar) string { l.before = bearer(l, 401, "{}"); return "" }, registry.Options{}, nil, []string{"401", "/token"}, denied},
		{"wrong password, bearer", func(l *liar) string {
			l.before = bearer(l, 401, `{"errors":[{"code":"UNAUTHORIZED","message":"go away"}]}`)
			return ""
		}, wrong, nil, []string{"401", "/token"}, denied},
		{"a token that is not taken", func(l *liar) string { l.before = bearer(l, 200, `{"token":"abc"}`); return "" }, registry.Options{}, nil, []string{"401"}, denied},
		{"no token in the answer", func(l *liar) string { l.before = bearer(l, 200, `{}`); return "" }, registry.Options{}, nil, []string{"token"}, append(denied, errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition, errdefs.ErrUnavailable)},
		{"forbidden", func(l *liar) string {
			l.before = func(w http.ResponseWriter, q *http.Request) bool { w.WriteHeader(403); return true }
			return ""
		}, registry.Options{}, nil, []string{"403"}, []error{errdefs.ErrPermissionDenied}},
		{"out of order", func(l *liar) string {
			l.before = func(w http.ResponseWriter, q *http.Request) bool { w.WriteHeader(500); return true }
			return ""
		}, registry.Options{}, nil, []string{"500"}, []error{errdefs.ErrUnavailable}},
		{"unknown repository", func(l *liar) string { l.manifests = nil; return "" }, registry.Options{}, nil, []string{"404", "lies/and/more"}, []error{errdefs.ErrNotFound}},
		{"unknown tag", func(l *liar) string { return l.host() + "/lies/and/more:none" }, registry.Options{}, nil, []string{"404", "none"}, []error{errdefs.ErrNotFound}},
		{"unknown digest", func(l *liar) string { return l.host() + "/lies/and/more@" + other.String() }, registry.Options{}, nil, []string{other.String()}, []error{errdefs.ErrNotFound}},
		{"unknown layer", func(l *liar) string { delete(l.blobs, layer.Digest); return "" }, registry.Options{}, nil, []string{layer.Digest.String(), "404"}, []error{errdefs.ErrNotFound}},
		{"another manifest than the digest asked for", func(l *liar) string {
			l.manifests[other.String()] = answer{mediaType: good.Target.MediaType, body: good.Blobs[good.Target.Digest], digest: other}
			return l.host() + "/lies/and/more@" + other.String()
		}, registry.Options{}, nil, []string{other.String()}, spoiled},
		{"a digest in the header that is not the manifest's", func(l *liar) string {
			a := l.manifests["latest"]
			a.digest = other
			l.manifests["latest"], l.manifests[other.String()] = a, a
			return ""
		}, registry.Options{}, nil, []string{other.String()}, spoiled},
		{"a truncated layer", func(l *liar) string { l.blobs[layer.Digest] = answer{body: body[:len(body)/2]}; return "" }, registry.Options{}, nil, []string{layer.Digest.String()}, append(spoiled, errdefs.ErrUnavailable)},
		{"a layer that breaks off", func(l *liar) string {
			l.blobs[layer.Digest] = answer{body: body[:len(body)/2], claim: len(body)}
			return ""
		}, registry.Options{}, nil, []string{layer.Digest.String()}, append(spoiled, errdefs.ErrUnavailable)},
		{"a layer that goes on", func(l *liar) string {
			l.blobs[layer.Digest] = answer{body: append(bytes.Clone(body), body...)}
			return ""
		}, registry.Options{}, nil, []string{layer.Digest.String()}, spoiled},
		{"a layer with a wrong byte", func(l *liar) string {
			b := bytes.Clone(body)
			b[len(b)/2] ^= 1
			l.blobs[layer.Digest] = answer{body: b}
			return ""
		}, registry.Options{}, nil, []string{layer.Digest.String()}, spoiled},
		{"no image for this platform", func(l *liar) string {
			l.manifest(ocispec.MediaTypeImageIndex, index(ocispec.Platform{OS: "plan9", Architecture: "mips"}))
			return ""
		}, registry.Options{}, []ocispec.Platform{{OS: "linux", Architecture: runtime.GOARCH}}, []string{"plan9"}, []error{errdefs.ErrNotFound}},
		{"an image for another platform", func(l *liar) string {
			config := good.Blobs[configOf(t, good).Digest]
			img := &testimage.Image{Blobs: map[digest.Digest][]byte{}}
			c := img.Add(ocispec.MediaTypeImageConfig, bytes.Replace(config, []byte(`"os":"linux"`), []byte(`"os":"plan9"`), 1))
			b, _ := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: c, Layers: []ocispec.Descriptor{layer}})
			l.blobs[c.Digest] = answer{body: img.Blobs[c.Digest]}
			l.manifest(ocispec.MediaTypeImageManifest, b)
			return ""
		}, registry.Options{}, nil, []string{"plan9", "linux/" + runtime.GOARCH}, []error{errdefs.ErrNotFound}},
		{"an empty index", func(l *liar) string { l.manifest(ocispec.MediaTypeImageIndex, index()); return "" }, registry.Options{}, nil, nil, []error{errdefs.ErrNotFound, errdefs.ErrInvalidArgument}},
		{"a manifest that is an index too", func(l *liar) string {
			b := bytes.TrimSuffix(bytes.Clone(good.Blobs[good.Target.Digest]), []byte("}"))
			l.manifest(ocispec.MediaTypeImageManifest, append(b, []byte(`,"manifests":[]}`)...))
			return ""
		}, registry.Options{}, nil, nil, []error{errdefs.ErrInvalidArgument}},
		{"an index that is a manifest too", func(l *liar) string {
			b := bytes.TrimSuffix(index(ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}), []byte("}"))
			l.manifest(ocispec.MediaTypeImageIndex, append(b, []byte(`,"layers":[],"config":{}}`)...))
			return ""
		}, registry.Options{}, nil, nil, []error{errdefs.ErrInvalidArgument}},
		{"a manifest that claims to be an index", func(l *liar) string {
			l.manifest(ocispec.MediaTypeImageIndex, good.Blobs[good.Target.Digest])
			return ""
		}, registry.Options{}, nil, nil, []error{errdefs.ErrInvalidArgument, errdefs.ErrNotFound}},
		{"an oversized manifest", func(l *liar) string {
			b := bytes.TrimSuffix(bytes.Clone(good.Blobs[good.Target.Digest]), []byte("}"))
			l.manifest(ocispec.MediaTypeImageManifest, append(b, []byte(`,"annotations":{"x":"`+strings.Repeat("y", 9<<20)+`"}}`)...))
			return ""
		}, registry.Options{}, nil, nil, []error{errdefs.ErrInvalidArgument, errdefs.ErrResourceExhausted, errdefs.ErrFailedPrecondition}},
		{"a manifest that never ends", func(l *liar) string {
			l.before = func(w http.ResponseWriter, q *http.Request) bool {
				if !strings.Contains(q.URL.Path, "/manifests/") {
					return false
				}
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				if q.Method == http.MethodGet {
					for range 1000 { // 64 MiB, without a length
						if _, err := w.Write(bytes.Repeat([]byte(" "), 64<<10)); err != nil {
							return true
						}
					}
				}
				return true
			}
			return ""
		}, registry.Options{}, nil, nil, []error{errdefs.ErrInvalidArgument, errdefs.ErrResourceExhausted, errdefs.ErrFailedPrecondition, errdefs.ErrNotFound}},
		{"schema 1", func(l *liar) string {
			l.manifest("application/vnd.docker.distribution.manifest.v1+prettyjws", []byte(`{"schemaVersion":1,"name":"lies","fsLayers":[]}`))
			return ""
		}, registry.Options{}, nil, []string{"schema 1"}, []error{errdefs.ErrInvalidArgument, errdefs.ErrNotImplemented}},
		{"garbage as manifest", func(l *liar) string {
			l.manifest(ocispec.MediaTypeImageManifest, []byte("<html>please log in</html>"))
			return ""
		}, registry.Options{}, nil, nil, []error{errdefs.ErrInvalidArgument}},
		{"a web page as manifest", func(l *liar) string {
			l.manifest("text/html", []byte("<html>please log in</html>"))
			return ""
		}, registry.Options{}, nil, []string{"text/html"}, []error{errdefs.ErrInvalidArgument, errdefs.ErrNotImplemented}},
		{"null as manifest", func(l *liar) string { l.manifest(ocispec.MediaTypeImageManifest, []byte("null")); return "" }, registry.Options{}, nil, nil, []error{errdefs.ErrInvalidArgument}},
		{"a layer with a digest that is a path", func(l *liar) string {
			l.manifest(ocispec.MediaTypeImageManifest, []byte(strings.Replace(string(good.Blobs[good.Target.Digest]), layer.Digest.String(), "sha256:../../../../../canary/alive", 1)))
			return ""
		}, registry.Options{}, nil, nil, []error{errdefs.ErrInvalidArgument}},
		{"a layer of negative size", func(l *liar) string {
			l.manifest(ocispec.MediaTypeImageManifest, []byte(strings.Replace(string(good.Blobs[good.Target.Digest]), fmt.Sprintf(`"size":%d}]`, layer.Size), `"size":-5}]`, 1)))
			return ""
		}, registry.Options{}, nil, nil, spoiled},
		{"a config that is a web page", func(l *liar) string {
			img := &testimage.Image{Blobs: map[digest.Digest][]byte{}}
			c := img.Add(ocispec.MediaTypeImageConfig, []byte("<html>"))
			b, _ := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: c, Layers: []ocispec.Descriptor{layer}})
			l.blobs[c.Digest] = answer{body: []byte("<html>")}
			l.manifest(ocispec.MediaTypeImageManifest, b)
			return ""
		}, registry.Options{}, nil, nil, []error{errdefs.ErrInvalidArgument}},
		{"an endless chain of redirects", func(l *liar) string {
			l.before = func(w http.ResponseWriter, q *http.Request) bool {
				http.Redirect(w, q, q.URL.Path+"x", http.StatusTemporaryRedirect)
				return true
			}
			return ""
		}, registry.Options{}, nil, []string{"redirect"}, []error{errdefs.ErrUnavailable, errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLiar(t, good)
			ref := tc.prepare(l)
			if ref == "" {
				ref = l.ref()
			}
			began := time.Now()
			err := d.pull(ref, "overlayfs", tc.opts, tc.only...)
			refused(t, err, append(tc.words, strings.Split(ref, "/")[0]), tc.classes...)
			if time.Since(began) > 60*time.Second {
				t.Errorf("it took %s", time.Since(began))
			}
			if diff := d.difference(before); diff != "" {
				t.Errorf("left behind:\n%s", diff)
				before = d.inventory()
			}
		})
	}
	// The same image is fine when it comes from an honest registry.
	if err := d.pull(newLiar(t, good).ref(), "overlayfs", registry.Options{}); err != nil {
		t.Error(err)
	}
}

// What a pull has begun to download goes with it, whatever ends it: another
// layer that is bad, or the client, who cancels or hangs up.
//
// contract: 6.3.11
func TestCutDownloads(t *testing.T) {
	d := start(t)
	before := d.inventory()
	file := func(name string) testimage.Layer {
		return testimage.Layer{Files: []testimage.File{{Name: name, Body: bytes.Repeat([]byte(name+" is some text\n"), 5000)}}, Compression: "gzip"}
	}
	img, err := testimage.New(ocispec.ImageConfig{}, file("lower"), file("upper"))
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Blobs[img.Target.Digest], &m); err != nil {
		t.Fatal(err)
	}
	lower, upper := m.Layers[0].Digest, m.Layers[1].Digest
	m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0]
	exchanged, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		bad  bool // an image whose other layer is bad
		end  func(conn *grpc.ClientConn, cancel func())
	}{
		{"another layer is bad", true, nil},
		{"the client cancels", false, func(_ *grpc.ClientConn, cancel func()) { cancel() }},
		{"the client hangs up", false, func(conn *grpc.ClientConn, _ func()) { conn.Close() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLiar(t, img)
			if tc.bad {
				l.manifest(ocispec.MediaTypeImageManifest, exchanged)
			}
			began := make(chan struct{}) // the lower layer's first bytes are in the store
			l.before = func(w http.ResponseWriter, q *http.Request) bool {
				switch {
				case strings.Contains(q.URL.Path, lower.String()):
					w.Header().Set("Content-Length", strconv.Itoa(len(img.Blobs[lower])))
					w.Write(img.Blobs[lower][:50])
					w.(http.Flusher).Flush()
					for q.Context().Err() == nil {
						st, err := d.content().Status(q.Context(), "layer-"+lower.String())
						if err == nil && st.Offset == 50 {
							close(began)
							<-q.Context().Done()
						}
					}
					return true
				case strings.Contains(q.URL.Path, upper.String()):
					select {
					case <-began:
					case <-q.Context().Done():
					}
				}
				return false
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			conn := d.dial()
			ended := make(chan error, 1)
			go func() {
				ended <- transferrpc.NewClient(conn, ns, "").Transfer(ctx, transfer.Registry{Reference: l.ref()}, transfer.ImageStore{Name: "example.org/bad:latest", Unpacks: []transfer.Unpack{{Snapshotter: "overlayfs"}}}, transfer.Options{})
			}()
			if tc.end != nil {
				select {
				case <-began:
				case err := <-ended:
					t.Fatalf("it ended by itself: %v", err)
				}
				tc.end(conn, cancel)
			}
			if err := <-ended; err == nil || ctx.Err() == context.DeadlineExceeded {
				t.Errorf("it ended with %v", err)
			}
			if diff := d.difference(before); diff != "" {
				t.Errorf("left behind:\n%s", diff)
				before = d.inventory()
			}
		})
	}
}

// Layers that are what their digest says, and are bad: by nobody's mistake on
// the way, but made so. None gets at anything beside its snapshot.
//
// contract: 10.14, 10.12
// promise: P36
func TestBadLayers(t *testing.T) {
	d := start(t)
	before := d.inventory()
	plain := testimage.Tar([]testimage.File{{Name: "file", Body: bytes.Repeat([]byte("0123456789abcdef"), 10000)}})
	whole := zip(plain)
	crc := bytes.Clone(whole)
	crc[len(crc)-6] ^= 0xff
	length := bytes.Clone(whole)
	length[len(length)-1] ^= 0xff
	entries := func(hs ...*tar.Header) []byte {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		for _, h := range hs {
			if h.Mode == 0 {
				h.Mode = 0o755
			}
			if h.Typeflag == tar.TypeReg {
				h.Size = 4
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if h.Typeflag == tar.TypeReg {
				w.Write([]byte("dead"))
			}
		}
		w.Close()
		return buf.Bytes()
	}
	up := strings.Repeat("../", 12)
	cage := d.Dir + "/canary"
	// A snapshot's files are five folders below the daemon's directory.
	near := "../../../../../canary"
	for _, tc := range []struct {
		name  string
		layer []byte
		diff  []byte // whose digest the config has, layer if nil
		gzip  bool
		// may says that confining it to the snapshot is as good as refusing it.
		may bool
	}{
		{"gzip cut in the middle", whole[:len(whole)/2], plain, true, false},
		{"gzip with a wrong checksum", crc, plain, true, false},
		{"gzip with a wrong length", length, plain, true, false},
		{"gzip with rubbish behind", append(bytes.Clone(whole), "rubbish"...), plain, true, false},
		{"no gzip at all", plain, plain, true, true},
		{"empty", []byte{}, nil, true, true},
		{"tar cut in the middle", plain[:len(plain)/2], nil, false, false},
		{"random bytes", []byte(strings.Repeat("\x01\xfe rubbish", 500)), nil, false, false},
		{"another diff id", whole, []byte("another"), true, false},
		{"dots", entries(&tar.Header{Name: up + strings.TrimPrefix(cage, "/") + "/dead", Typeflag: tar.TypeReg}), nil, false, true},
		{"near dots", entries(&tar.Header{Name: near + "/dead", Typeflag: tar.TypeReg}), nil, false, true},
		{"dots inside", entries(&tar.Header{Name: "a/b", Typeflag: tar.TypeDir}, &tar.Header{Name: "a/b/" + up + near + "/alive", Typeflag: tar.TypeReg}), nil, false, true},
		{"absolute", entries(&tar.Header{Name: cage + "/alive", Typeflag: tar.TypeReg}), nil, false, true},
		{"absolute directory with a mode", entries(&tar.Header{Name: cage, Typeflag: tar.TypeDir, Mode: 0o777}), nil, false, true},
		{"through a link", entries(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: cage}, &tar.Header{Name: "l/alive", Typeflag: tar.TypeReg}), nil, false, true},
		{"through a relative link", entries(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: near}, &tar.Header{Name: "l/dead", Typeflag: tar.TypeReg}), nil, false, true},
		{"through two links", entries(&tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "../../.."}, &tar.Header{Name: "b", Typeflag: tar.TypeSymlink, Linkname: "a/../../canary"}, &tar.Header{Name: "b/alive", Typeflag: tar.TypeReg}), nil, false, true},
		{"over a link", entries(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: cage + "/alive"}, &tar.Header{Name: "l", Typeflag: tar.TypeReg}), nil, false, true},
		{"mode through a link", entries(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: cage}, &tar.Header{Name: "l", Typeflag: tar.TypeDir, Mode: 0o777}), nil, false, true},
		{"hard link to the outside", entries(&tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: cage + "/alive"}), nil, false, false},
		{"hard link by dots", entries(&tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: near + "/alive"}), nil, false, false},
		{"hard link through a link", entries(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: cage}, &tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "l/alive"}), nil, false, false},
		{"whiteout outside", entries(&tar.Header{Name: near + "/.wh.alive", Typeflag: tar.TypeReg}), nil, false, true},
		{"whiteout through a link", entries(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: cage}, &tar.Header{Name: "l/.wh.alive", Typeflag: tar.TypeReg}), nil, false, true},
		{"opaque through a link", entries(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: cage}, &tar.Header{Name: "l/.wh..wh..opq", Typeflag: tar.TypeReg}), nil, false, true},
		{"whiteout of dots", entries(&tar.Header{Name: "a/.wh...", Typeflag: tar.TypeReg}), nil, false, true},
		{"whiteout of a dot", entries(&tar.Header{Name: "a/.wh..", Typeflag: tar.TypeReg}), nil, false, true},
		{"whiteout of nothing", entries(&tar.Header{Name: "a/.wh.", Typeflag: tar.TypeReg}), nil, false, true},
		{"root as a file", entries(&tar.Header{Name: ".", Typeflag: tar.TypeReg}), nil, false, true},
		{"root as a link", entries(&tar.Header{Name: "./", Typeflag: tar.TypeSymlink, Linkname: cage}, &tar.Header{Name: "alive", Typeflag: tar.TypeReg}), nil, false, true},
	} {
		for _, snapshotter := range snapshotters {
			t.Run(tc.name+", "+snapshotter, func(t *testing.T) {
				diff, mediaType := tc.diff, ocispec.MediaTypeImageLayer
				if diff == nil {
					diff = tc.layer
				}
				if tc.gzip {
					mediaType = ocispec.MediaTypeImageLayerGzip
				}
				img := withLayer(t, mediaType, tc.layer, digest.FromBytes(diff))
				err := d.pull(newLiar(t, img).ref(), snapshotter, registry.Options{})
				if err != nil || !tc.may {
					refused(t, err, []string{digest.FromBytes(tc.layer).String()}, errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition, errdefs.ErrDataLoss, errdefs.ErrNotFound)
				}
				if err == nil {
					if err := d.images().Delete(d.timeout(), "example.org/bad:latest", image.DeleteOptions{Sync: true}); err != nil {
						t.Error(err)
					}
				}
				if diff := d.difference(before); diff != "" {
					t.Errorf("left behind:\n%s", diff)
					before = d.inventory()
				}
				d.canary(t)
			})
		}
	}
}
