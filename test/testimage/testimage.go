// Package testimage makes container images out of nothing but busybox, and
// serves them from a registry on loopback, for tests and benchmarks.
package testimage

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is a manifest with all that it refers to.
type Image struct {
	Target  ocispec.Descriptor
	Blobs   map[digest.Digest][]byte // manifest, config and layers
	DiffIDs []digest.Digest
}

// File is an entry of a layer. A mode of 0 is 0644, or 0755 for a directory;
// Link makes a symbolic link; Whiteout deletes what lower layers have.
type File struct {
	Name     string
	Body     []byte
	Mode     int64
	Dir      bool
	Link     string
	Whiteout bool
}

// Layer is a list of files and how they are compressed: "gzip", "zstd" or "".
type Layer struct {
	Files       []File
	Compression string
}

// Busybox is an image of four layers: busybox with all its applets as links
// and users in gzip, files in zstd, a whiteout in gzip, an uncompressed one.
// The test is skipped where there is no static busybox.
func Busybox(t testing.TB) *Image {
	t.Helper()
	img, err := NewBusybox()
	if err != nil {
		t.Skipf("no image can be made: %v", err)
	}
	return img
}

// NewBusybox is Busybox outside of a test.
func NewBusybox() (*Image, error) {
	base, err := busyboxFiles()
	if err != nil {
		return nil, err
	}
	base = append(base, File{Name: "data", Dir: true}, File{Name: "data/gone", Body: []byte("deleted by a later layer\n")})
	return New(ocispec.ImageConfig{Env: []string{"PATH=/bin:/usr/bin", "FROM_IMAGE=yes"}, Cmd: []string{"/bin/sh", "-c", "echo hello from $FROM_IMAGE; cat /data/greeting"}, WorkingDir: "/data", StopSignal: "SIGTERM"},
		Layer{base, "gzip"},
		Layer{[]File{{Name: "data", Dir: true}, {Name: "data/greeting", Body: []byte("greetings from the second layer\n")}, {Name: "data/noise", Body: noise(1 << 20)}}, "zstd"},
		Layer{[]File{{Name: "data", Dir: true}, {Name: "data/gone", Whiteout: true}, {Name: "data/link", Link: "greeting"}}, "gzip"},
		Layer{[]File{{Name: "data/plain", Body: []byte("plain\n")}}, ""})
}

// BusyboxFiles are a root file system of busybox with all its applets as links
// and some users. The test is skipped where there is no static busybox.
func BusyboxFiles(t testing.TB) []File {
	t.Helper()
	files, err := busyboxFiles()
	if err != nil {
		t.Skip(err)
	}
	return files
}

func busyboxFiles() ([]File, error) {
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, fmt.Errorf("busybox-static is needed: %w", err)
	}
	base := []File{{Name: "bin", Dir: true}, {Name: "bin/busybox", Body: bin, Mode: 0o755}, {Name: "etc", Dir: true},
		{Name: "etc/passwd", Body: []byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n")},
		{Name: "etc/group", Body: []byte("root:x:0:\nuser:x:1000:\nextra:x:2000:user\n")},
		{Name: "root", Dir: true, Mode: 0o700}, {Name: "tmp", Dir: true, Mode: 0o1777}, {Name: "proc", Dir: true}, {Name: "sys", Dir: true}, {Name: "dev", Dir: true}}
	out, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list: %w", err)
	}
	for _, applet := range strings.Fields(string(out)) {
		if applet != "busybox" {
			base = append(base, File{Name: "bin/" + applet, Link: "busybox"})
		}
	}
	return base, nil
}

// noise is n bytes that do not compress, the same each time.
func noise(n int) []byte {
	b := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}

// New makes an image for the host's platform.
func New(config ocispec.ImageConfig, layers ...Layer) (*Image, error) {
	img := &Image{Blobs: map[digest.Digest][]byte{}}
	var descs []ocispec.Descriptor
	for _, l := range layers {
		plain := Tar(l.Files)
		img.DiffIDs = append(img.DiffIDs, digest.FromBytes(plain))
		var buf bytes.Buffer
		mediaType := ocispec.MediaTypeImageLayer
		var w io.WriteCloser
		switch l.Compression {
		case "gzip":
			enc, err := gzip.NewWriterLevel(&buf, gzip.BestSpeed) // with the race detector, better is ten times slower
			if err != nil {
				return nil, err
			}
			mediaType, w = ocispec.MediaTypeImageLayerGzip, enc
		case "zstd":
			enc, err := zstd.NewWriter(&buf)
			if err != nil {
				return nil, err
			}
			mediaType, w = ocispec.MediaTypeImageLayerZstd, enc
		default:
			buf.Write(plain)
		}
		if w != nil {
			if _, err := w.Write(plain); err != nil {
				return nil, err
			}
			if err := w.Close(); err != nil {
				return nil, err
			}
		}
		descs = append(descs, img.Add(mediaType, buf.Bytes()))
	}
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	cfg, err := json.Marshal(ocispec.Image{Created: &created, Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, Config: config,
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: img.DiffIDs}})
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: img.Add(ocispec.MediaTypeImageConfig, cfg), Layers: descs})
	if err != nil {
		return nil, err
	}
	img.Target = img.Add(ocispec.MediaTypeImageManifest, manifest)
	return img, nil
}

// Add puts a blob into the image.
func (img *Image) Add(mediaType string, b []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	img.Blobs[d.Digest] = bytes.Clone(b)
	return d
}

// Tar is the tar stream of files.
func Tar(files []File) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.Name, Mode: f.Mode, Size: int64(len(f.Body)), Typeflag: tar.TypeReg, ModTime: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
		switch {
		case f.Whiteout:
			h.Name = path.Join(path.Dir(f.Name), ".wh."+path.Base(f.Name))
		case f.Dir:
			h.Typeflag, h.Name = tar.TypeDir, f.Name+"/"
		case f.Link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.Link, 0o777
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if f.Dir {
				h.Mode = 0o755
			}
		}
		if err := w.WriteHeader(h); err != nil {
			panic(fmt.Sprintf("testimage: entry %q: %v", f.Name, err))
		}
		if _, err := w.Write(f.Body); err != nil {
			panic(fmt.Sprintf("testimage: entry %q: %v", f.Name, err))
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return buf.Bytes()
}

// Archive writes the image as a tar of an OCI image layout, under a name.
func (img *Image) Archive(w io.Writer, name string) error {
	target := img.Target
	target.Annotations = map[string]string{"io.containerd.image.name": name, ocispec.AnnotationRefName: name[strings.LastIndex(name, ":")+1:]}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{target}})
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	put := func(name string, b []byte) {
		if err == nil {
			err = tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b)), Typeflag: tar.TypeReg})
		}
		if err == nil {
			_, err = tw.Write(b)
		}
	}
	put("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	put("index.json", index)
	var digests []digest.Digest
	for d := range img.Blobs {
		digests = append(digests, d)
	}
	slices.Sort(digests)
	for _, d := range digests {
		put("blobs/sha256/"+d.Encoded(), img.Blobs[d])
	}
	if err != nil {
		return err
	}
	return tw.Close()
}

// Registry is an OCI registry on loopback that keeps everything in memory. It
// takes pushes as well. Its fields may be changed while no request is under way.
type Registry struct {
	*httptest.Server
	// Throttle, if not 0, is the pause after each 64 KiB of a blob.
	Throttle time.Duration

	mu       sync.Mutex
	blobs    map[digest.Digest][]byte
	uploads  map[string][]byte // what came of those that come in pieces
	types    map[digest.Digest]string
	tags     map[string]digest.Digest // repository:tag
	requests []string
}

// Serve starts a registry, which ends with the test.
func Serve(t testing.TB) *Registry {
	r := NewRegistry()
	t.Cleanup(r.Close)
	return r
}

// NewRegistry is Serve outside of a test.
func NewRegistry() *Registry {
	r := &Registry{blobs: map[digest.Digest][]byte{}, uploads: map[string][]byte{}, types: map[digest.Digest]string{}, tags: map[string]digest.Digest{}}
	r.Server = httptest.NewServer(r)
	return r
}

// Host is host:port, to begin a reference with.
func (r *Registry) Host() string { return strings.TrimPrefix(r.URL, "http://") }

// Put makes an image available and returns its reference.
func (r *Registry) Put(repo, tag string, img *Image) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for d, b := range img.Blobs {
		r.blobs[d] = b
	}
	r.types[img.Target.Digest] = img.Target.MediaType
	r.tags[repo+":"+tag] = img.Target.Digest
	return r.Host() + "/" + repo + ":" + tag
}

// Requests returns "METHOD path" of all requests so far.
func (r *Registry) Requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.requests)
}

// ServeHTTP implements the part of the distribution specification that pull and push use.
func (r *Registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock()
	r.requests = append(r.requests, q.Method+" "+q.URL.Path)
	r.mu.Unlock()
	rest, ok := strings.CutPrefix(q.URL.Path, "/v2/")
	if !ok {
		http.NotFound(w, q)
		return
	}
	if rest == "" {
		w.Write([]byte("{}"))
		return
	}
	for _, kind := range []string{"/manifests/", "/blobs/uploads/", "/blobs/"} {
		if i := strings.Index(rest, kind); i > 0 {
			repo, name := rest[:i], rest[i+len(kind):]
			switch {
			case kind == "/blobs/uploads/":
				r.upload(w, q, repo, name)
			case q.Method == http.MethodPut:
				r.putManifest(w, q, repo, name)
			default:
				r.get(w, q, repo, name, kind == "/manifests/")
			}
			return
		}
	}
	http.NotFound(w, q)
}

func (r *Registry) get(w http.ResponseWriter, q *http.Request, repo, name string, manifest bool) {
	r.mu.Lock()
	d, tagged := r.tags[repo+":"+name]
	if !tagged || !manifest {
		d = digest.Digest(name)
	}
	body, ok := r.blobs[d]
	mediaType := r.types[d]
	r.mu.Unlock()
	if !ok || manifest && mediaType == "" {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"%s unknown"}]}`, name)
		return
	}
	if mediaType == "" {
		mediaType = "application/octet-stream"
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Docker-Content-Digest", d.String())
	if r.Throttle == 0 || manifest {
		http.ServeContent(w, q, "", time.Time{}, bytes.NewReader(body))
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if q.Method == http.MethodHead {
		return
	}
	for len(body) > 0 {
		n := min(len(body), 64<<10)
		if _, err := w.Write(body[:n]); err != nil {
			return
		}
		w.(http.Flusher).Flush()
		body = body[n:]
		select {
		case <-time.After(r.Throttle):
		case <-q.Context().Done():
			return
		}
	}
}

// upload takes a blob with one request, or in pieces as Docker's own client sends it.
func (r *Registry) upload(w http.ResponseWriter, q *http.Request, repo, name string) {
	if q.Method == http.MethodPost {
		w.Header().Set("Location", "/v2/"+repo+"/blobs/uploads/"+rand.Text())
		w.WriteHeader(http.StatusAccepted)
		return
	}
	b, err := io.ReadAll(io.LimitReader(q.Body, 1<<30))
	r.mu.Lock()
	defer r.mu.Unlock()
	b = append(r.uploads[name], b...)
	if q.Method == http.MethodPatch && err == nil {
		r.uploads[name] = b
		w.Header().Set("Location", q.URL.Path)
		w.Header().Set("Range", fmt.Sprintf("0-%d", max(0, len(b)-1)))
		w.WriteHeader(http.StatusAccepted)
		return
	}
	delete(r.uploads, name)
	d := digest.Digest(q.URL.Query().Get("digest"))
	if err != nil || d.Validate() != nil || digest.FromBytes(b) != d {
		http.Error(w, "digest does not match", http.StatusBadRequest)
		return
	}
	r.blobs[d] = b
	w.Header().Set("Docker-Content-Digest", d.String())
	w.WriteHeader(http.StatusCreated)
}

func (r *Registry) putManifest(w http.ResponseWriter, q *http.Request, repo, name string) {
	b, err := io.ReadAll(io.LimitReader(q.Body, 4<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	d := digest.FromBytes(b)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blobs[d] = b
	r.types[d] = q.Header.Get("Content-Type")
	if !strings.Contains(name, ":") {
		r.tags[repo+":"+name] = d
	}
	w.Header().Set("Docker-Content-Digest", d.String())
	w.WriteHeader(http.StatusCreated)
}
