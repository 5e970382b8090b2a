// Package registrytest serves registries on loopback to tests: one in process,
// which records requests and misbehaves as it is told, and Debian's
// docker-registry. It also builds small images.
package registrytest

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Request is what the server saw.
type Request struct {
	Method string
	Path   string
	Query  string
	Header http.Header
}

// Registry is an in-process registry.
type Registry struct {
	*httptest.Server
	// Hook, if set, sees each request first and reports whether it answered it.
	Hook func(w http.ResponseWriter, r *http.Request) bool

	mu        sync.Mutex
	blobs     map[digest.Digest][]byte
	manifests map[string]stored // by repository:tag or repository@digest
	requests  []Request
}

type stored struct {
	mediaType string
	body      []byte
}

// New serves a registry until the test ends.
func New(t testing.TB) *Registry { return serve(t, httptest.NewServer) }

// NewTLS serves a registry with a certificate of its own.
func NewTLS(t testing.TB) *Registry { return serve(t, httptest.NewTLSServer) }

func serve(t testing.TB, start func(http.Handler) *httptest.Server) *Registry {
	r := &Registry{blobs: map[digest.Digest][]byte{}, manifests: map[string]stored{}}
	r.Server = start(http.HandlerFunc(r.handle))
	r.Config.ErrorLog = nil
	t.Cleanup(func() {
		r.CloseClientConnections()
		r.Close()
	})
	return r
}

// Host is the registry's address, host:port.
func (r *Registry) Host() string { return r.Listener.Addr().String() }

// Requests returns those seen so far.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Request(nil), r.requests...)
}

// Count returns how many requests of a method had a path with this in it.
func (r *Registry) Count(method, part string) int {
	n := 0
	for _, q := range r.Requests() {
		if q.Method == method && strings.Contains(q.Path, part) {
			n++
		}
	}
	return n
}

// AddBlob stores a blob and returns its digest.
func (r *Registry) AddBlob(b []byte) digest.Digest {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := digest.FromBytes(b)
	r.blobs[d] = b
	return d
}

// SetBlob stores bytes under a digest that may not be theirs.
func (r *Registry) SetBlob(d digest.Digest, b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blobs[d] = b
}

// AddManifest stores a manifest under its digest and a tag.
func (r *Registry) AddManifest(repo, tag, mediaType string, b []byte) ocispec.Descriptor {
	d := digest.FromBytes(b)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manifests[repo+":"+tag] = stored{mediaType, b}
	r.manifests[repo+"@"+d.String()] = stored{mediaType, b}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
}

// Manifest returns what a repository has under a tag or digest.
func (r *Registry) Manifest(repo, ref string) (mediaType string, body []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, ok := r.manifests[repo+":"+ref]
	if !ok {
		s = r.manifests[repo+"@"+ref]
	}
	return s.mediaType, s.body
}

// AddImage stores all of an image.
func (r *Registry) AddImage(repo, tag string, img *Image) ocispec.Descriptor {
	for _, b := range img.Blobs {
		r.AddBlob(b)
	}
	for _, m := range img.Manifests {
		r.AddManifest(repo, "", m.mediaType, m.body)
	}
	return r.AddManifest(repo, tag, img.Target.MediaType, img.Top)
}

func (r *Registry) handle(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock()
	r.requests = append(r.requests, Request{q.Method, q.URL.Path, q.URL.RawQuery, q.Header.Clone()})
	r.mu.Unlock()
	if r.Hook != nil && r.Hook(w, q) {
		return
	}
	r.Serve(w, q)
}

// Serve answers as a registry should.
func (r *Registry) Serve(w http.ResponseWriter, q *http.Request) {
	p, ok := strings.CutPrefix(q.URL.Path, "/v2/")
	if !ok {
		http.NotFound(w, q)
		return
	}
	if repo, ref, ok := cut(p, "/manifests/"); ok {
		r.serveManifest(w, q, repo, ref)
		return
	}
	if repo, rest, ok := cut(p, "/blobs/uploads/"); ok {
		r.upload(w, q, repo, rest)
		return
	}
	if _, ref, ok := cut(p, "/blobs/"); ok {
		r.mu.Lock()
		b, found := r.blobs[digest.Digest(ref)]
		r.mu.Unlock()
		if !found {
			fail(w, http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown to registry")
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, q, "", time.Time{}, bytes.NewReader(b))
		return
	}
	w.WriteHeader(http.StatusOK)
}

func cut(s, sep string) (string, string, bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return "", "", false
	}
	return s[:i], s[i+len(sep):], true
}

func fail(w http.ResponseWriter, code int, name, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": name, "message": message}}})
}

// Fail answers with an error in the form of the distribution specification.
func Fail(w http.ResponseWriter, code int, name, message string) { fail(w, code, name, message) }

func (r *Registry) serveManifest(w http.ResponseWriter, q *http.Request, repo, ref string) {
	if q.Method == http.MethodPut {
		var b bytes.Buffer
		_, _ = io.Copy(&b, io.LimitReader(q.Body, 4<<20))
		var doc struct {
			Config    ocispec.Descriptor
			Layers    []ocispec.Descriptor
			Manifests []ocispec.Descriptor
		}
		_ = json.Unmarshal(b.Bytes(), &doc)
		r.mu.Lock()
		missing := false
		for _, d := range append(doc.Layers, doc.Config) {
			if _, ok := r.blobs[d.Digest]; d.Digest != "" && !ok {
				missing = true
			}
		}
		for _, d := range doc.Manifests {
			if _, ok := r.manifests[repo+"@"+d.Digest.String()]; !ok {
				missing = true
			}
		}
		r.mu.Unlock()
		if missing {
			fail(w, http.StatusBadRequest, "MANIFEST_BLOB_UNKNOWN", "a child is missing")
			return
		}
		tag := ref
		if strings.Contains(ref, ":") {
			tag = ""
		}
		d := r.AddManifest(repo, tag, q.Header.Get("Content-Type"), b.Bytes())
		w.Header().Set("Docker-Content-Digest", d.Digest.String())
		w.WriteHeader(http.StatusCreated)
		return
	}
	mt, b := r.Manifest(repo, ref)
	if b == nil {
		fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "manifest unknown")
		return
	}
	w.Header().Set("Content-Type", mt)
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(b).String())
	w.Header().Set("Content-Length", fmt.Sprint(len(b)))
	if q.Method != http.MethodHead {
		_, _ = w.Write(b)
	}
}

func (r *Registry) upload(w http.ResponseWriter, q *http.Request, repo, id string) {
	switch q.Method {
	case http.MethodPost:
		if m := digest.Digest(q.URL.Query().Get("mount")); m != "" {
			r.mu.Lock()
			_, ok := r.blobs[m]
			r.mu.Unlock()
			if ok {
				w.WriteHeader(http.StatusCreated)
				return
			}
		}
		w.Header().Set("Location", "/v2/"+repo+"/blobs/uploads/1?state=x")
		w.WriteHeader(http.StatusAccepted)
	case http.MethodPut:
		var b bytes.Buffer
		_, _ = io.Copy(&b, q.Body)
		d := digest.FromBytes(b.Bytes())
		if d.String() != q.URL.Query().Get("digest") || id == "" {
			fail(w, http.StatusBadRequest, "DIGEST_INVALID", "provided digest did not match uploaded content")
			return
		}
		r.AddBlob(b.Bytes())
		w.Header().Set("Docker-Content-Digest", d.String())
		w.WriteHeader(http.StatusCreated)
	}
}

// Image is an image in memory.
type Image struct {
	Target    ocispec.Descriptor
	Top       []byte // of Target
	Blobs     [][]byte
	Manifests []manifestBytes // below an index
	Layers    []ocispec.Descriptor
	DiffIDs   []digest.Digest
	Config    ocispec.Descriptor
}

type manifestBytes struct {
	mediaType string
	body      []byte
}

// Compression of a layer.
type Compression string

// The compressions.
const (
	None Compression = ""
	Gzip Compression = "+gzip"
	Zstd Compression = "+zstd"
)

// Layer is a tar stream with one file, and its blob.
func Layer(name string, content []byte, c Compression) (blob []byte, diffID digest.Digest) {
	var plain bytes.Buffer
	tw := tar.NewWriter(&plain)
	_ = tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(1, 0)})
	_, _ = tw.Write(content)
	_ = tw.Close()
	diffID = digest.FromBytes(plain.Bytes())
	var out bytes.Buffer
	switch c {
	case Gzip:
		z := gzip.NewWriter(&out)
		_, _ = z.Write(plain.Bytes())
		_ = z.Close()
	case Zstd:
		z, _ := zstd.NewWriter(&out)
		_, _ = z.Write(plain.Bytes())
		_ = z.Close()
	default:
		return plain.Bytes(), diffID
	}
	return out.Bytes(), diffID
}

// Build makes an image with one layer a compression, each with size bytes that
// hardly compress, for linux on the given architecture.
func Build(arch string, size int, layers ...Compression) *Image {
	img := &Image{}
	config := ocispec.Image{Platform: ocispec.Platform{Architecture: arch, OS: "linux"}, RootFS: ocispec.RootFS{Type: "layers"}}
	config.Config.Cmd = []string{"/bin/true"}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for i, c := range layers {
		body := make([]byte, size)
		x := uint64(i+1)*0x9e3779b97f4a7c15 + uint64(len(arch)*int(arch[0]))
		for k := range body {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
			body[k] = byte(x)
		}
		b, diffID := Layer(fmt.Sprintf("file%d", i), body, c)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
		img.Blobs = append(img.Blobs, b)
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer + string(c), Digest: digest.FromBytes(b), Size: int64(len(b))})
	}
	cb, _ := json.Marshal(config)
	img.Blobs = append(img.Blobs, cb)
	m.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(cb), Size: int64(len(cb))}
	img.Top, _ = json.Marshal(m)
	img.Target = ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(img.Top), Size: int64(len(img.Top)),
		Platform: &ocispec.Platform{OS: "linux", Architecture: arch}}
	img.Layers, img.DiffIDs, img.Config = m.Layers, config.RootFS.DiffIDs, m.Config
	return img
}

// Index makes an index of images.
func Index(images ...*Image) *Image {
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	out := &Image{}
	for _, img := range images {
		idx.Manifests = append(idx.Manifests, img.Target)
		out.Blobs = append(out.Blobs, img.Blobs...)
		out.Manifests = append(out.Manifests, manifestBytes{img.Target.MediaType, img.Top})
	}
	out.Top, _ = json.Marshal(idx)
	out.Target = ocispec.Descriptor{MediaType: idx.MediaType, Digest: digest.FromBytes(out.Top), Size: int64(len(out.Top))}
	return out
}

// User, Password are what Debian's registry with authentication wants.
const (
	User     = "tester"
	Password = "secret"
	htpasswd = User + ":$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
)

// Debian starts Debian's docker-registry, with basic authentication if auth is
// set, and returns its address. The test is skipped where it is not installed.
func Debian(t testing.TB, auth bool) string {
	t.Helper()
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed (Debian package docker-registry)")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	dir := t.TempDir()
	conf := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage:\n  filesystem: {rootdirectory: %q}\n  delete: {enabled: true}\nhttp: {addr: %q}\n", filepath.Join(dir, "data"), addr)
	if auth {
		if err := os.WriteFile(filepath.Join(dir, "htpasswd"), []byte(htpasswd), 0o600); err != nil {
			t.Fatal(err)
		}
		conf += fmt.Sprintf("auth:\n  htpasswd: {realm: test, path: %q}\n", filepath.Join(dir, "htpasswd"))
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yml"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "serve", filepath.Join(dir, "config.yml"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(20 * time.Second); ; {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			c.Close()
			return addr
		}
		if time.Now().After(deadline) {
			t.Fatalf("docker-registry does not listen on %s: %v\n%s", addr, err, log.String())
		}
		time.Sleep(20 * time.Millisecond)
	}
}
