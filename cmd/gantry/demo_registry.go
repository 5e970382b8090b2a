package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobImage is a generated image: its blobs by digest.
type blobImage struct {
	target ocispec.Descriptor
	layers []ocispec.Descriptor
	blobs  map[digest.Digest][]byte
}

func (b *blobImage) add(mediaType string, body []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	b.blobs[d.Digest] = body
	return d
}

// demoFile is an entry of a layer; a body of nil is a directory.
type demoFile struct {
	name string
	mode int64
	body []byte
}

// demoImage makes an image of this program and little else: layers in gzip and
// zstd, the last of which deletes a file of the first.
func demoImage(self string) (*blobImage, error) {
	f, err := os.Open(self)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if !isStatic(f) {
		return nil, &hinted{fmt.Errorf("%s needs libraries, so it cannot run in an image that has none", self), "build it with: make (or CGO_ENABLED=0 go build ./cmd/gantry)"}
	}
	bin, err := io.ReadAll(io.LimitReader(f, 1<<30))
	if err != nil {
		return nil, err
	}
	img := &blobImage{blobs: map[digest.Digest][]byte{}}
	var diffs []digest.Digest
	for _, l := range []struct {
		zstd  bool
		files []demoFile
	}{
		{false, []demoFile{{"bin/", 0o755, nil}, {"bin/gantry", 0o755, bin}, {"etc/", 0o755, nil},
			{"etc/passwd", 0o644, []byte("root:x:0:0:root:/:/bin/gantry\n")}, {"etc/group", 0o644, []byte("root:x:0:\n")},
			{"proc/", 0o755, nil}, {"sys/", 0o755, nil}, {"dev/", 0o755, nil}, {"tmp/", 0o1777, nil},
			{"data/", 0o755, nil}, {"data/secret", 0o600, []byte("only in the first layer\n")}}},
		{true, []demoFile{{"data/", 0o755, nil}, {"data/greeting", 0o644, []byte("Hello from a container that Gantry runs.\n")}, {"data/copy", 0o644, bin[:len(bin)/4]}}},
		{false, []demoFile{{"data/", 0o755, nil}, {"data/.wh.secret", 0o644, []byte{}}}},
	} {
		plain, err := demoTar(l.files)
		if err != nil {
			return nil, err
		}
		diffs = append(diffs, digest.FromBytes(plain))
		var packed bytes.Buffer
		var w io.WriteCloser
		mediaType := ocispec.MediaTypeImageLayerGzip
		if l.zstd {
			mediaType = ocispec.MediaTypeImageLayerZstd
			if w, err = zstd.NewWriter(&packed); err != nil {
				return nil, err
			}
		} else if w, err = gzip.NewWriterLevel(&packed, gzip.BestSpeed); err != nil {
			return nil, err
		}
		_, err = w.Write(plain)
		if err = errors.Join(err, w.Close()); err != nil {
			return nil, err
		}
		img.layers = append(img.layers, img.add(mediaType, packed.Bytes()))
	}
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   ocispec.ImageConfig{Entrypoint: []string{"/bin/gantry", "demo-work"}, Env: []string{"PATH=/bin", "DEMO=works"}, WorkingDir: "/data"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: diffs},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: img.add(ocispec.MediaTypeImageConfig, config), Layers: img.layers})
	img.target = img.add(ocispec.MediaTypeImageManifest, manifest)
	return img, err
}

func demoTar(files []demoFile) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.body)), Typeflag: tar.TypeReg}
		if f.body == nil {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.body); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return buf.Bytes(), err
}

// demoRegistry serves one image over HTTP on loopback, as much as a pull needs.
type demoRegistry struct {
	img    *blobImage
	host   string
	server *http.Server
	ended  chan error
}

func serveDemoRegistry(img *blobImage) (*demoRegistry, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("serve a registry: %w", err)
	}
	r := &demoRegistry{img: img, host: l.Addr().String(), ended: make(chan error, 1)}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second}
	go func() { r.ended <- r.server.Serve(l) }()
	return r, nil
}

// Close ends the registry.
func (r *demoRegistry) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := r.server.Shutdown(ctx); err != nil {
		r.server.Close()
	}
	if err := <-r.ended; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// pace is how fast the registry sends: as a fast line would, so that there is
// something to be seen. Bytes a pause.
const (
	paceBytes = 256 << 10
	pacePause = 10 * time.Millisecond
)

// ServeHTTP implements the reading half of the distribution specification.
func (r *demoRegistry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	parts := strings.Split(strings.TrimPrefix(q.URL.Path, "/v2/"), "/")
	if q.URL.Path == "/v2/" {
		return
	}
	d := digest.Digest(parts[len(parts)-1])
	if d == "latest" {
		d = r.img.target.Digest
	}
	body, ok := r.img.blobs[d]
	if !ok || len(parts) < 3 || q.Method != http.MethodGet && q.Method != http.MethodHead {
		http.NotFound(w, q)
		return
	}
	mediaType := "application/octet-stream"
	if parts[len(parts)-2] == "manifests" {
		mediaType = r.img.target.MediaType
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if q.Method == http.MethodHead {
		return
	}
	for len(body) > 0 {
		n := min(len(body), paceBytes)
		if _, err := w.Write(body[:n]); err != nil {
			return
		}
		if body = body[n:]; len(body) == 0 {
			return
		}
		select {
		case <-q.Context().Done():
			return
		case <-time.After(pacePause):
		}
	}
}
