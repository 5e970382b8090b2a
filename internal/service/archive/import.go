// Package archive reads and writes images as tar archives: the OCI image
// layout, and what docker save makes (contract 6.5.1, 6.5.2). It promises that
// an archive can neither use memory beyond small limits, nor name anything
// outside the content store, nor put a blob under a digest that is not its own.
package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"path"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
)

// Annotations of an index's manifests that name images (contract 1.5.20).
const (
	AnnotationName = "io.containerd.image.name"
	AnnotationRef  = ocispec.AnnotationRefName
)

// Limits of an archive. The documents at its top are read into memory.
const (
	maxEntries  = 100_000
	maxDocument = manifest.MaxManifest
	maxWindow   = 128 << 20 // of zstd, in bytes
)

// Service imports and exports. It is safe for concurrent use.
type Service struct{ log *slog.Logger }

// New makes a service; log may be nil.
func New(log *slog.Logger) *Service {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Service{log}
}

// Import reads an archive into the content store, of which rec must hold a
// lease. It returns the index of the images, which is stored as well;
// labels keep all that it refers to. ErrInvalidArgument names what is wrong
// with the archive; ErrFailedPrecondition a blob whose bytes are not those of
// its name.
func (s *Service) Import(ctx context.Context, rec view.Records, in transfer.Import, progress func(transfer.Progress)) (ocispec.Descriptor, error) {
	switch in.MediaType {
	case "", "application/vnd.oci.image.layout.v1+tar", "application/vnd.oci.image.layout.header.v1+json", "application/x-tar", "application/octet-stream":
	default:
		return ocispec.Descriptor{}, fmt.Errorf("import: media type %.100q: %w", in.MediaType, errdefs.ErrNotImplemented)
	}
	m := &importing{rec: rec, store: rec.Content(), compress: in.ForceCompress, files: map[string]file{}, documents: map[string][]byte{}, labelled: map[string]bool{}, progress: progress, log: s.log}
	idx, err := m.run(ctx, in.Reader)
	if err != nil {
		return idx, fmt.Errorf("import: %w", err)
	}
	return idx, nil
}

// file is an entry of the archive that became a blob, or a link to one.
type file struct {
	desc ocispec.Descriptor
	link string
}

type importing struct {
	rec       view.Records
	store     content.Store
	compress  bool
	files     map[string]file
	documents map[string][]byte // oci-layout, index.json, manifest.json
	entries   int
	labelled  map[string]bool // documents that label has begun with, by RefKey
	progress  func(transfer.Progress)
	log       *slog.Logger
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func (m *importing) run(ctx context.Context, r io.Reader) (ocispec.Descriptor, error) {
	plain, done, err := decompress(r)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer done()
	if err := m.read(ctx, tar.NewReader(plain)); err != nil {
		return ocispec.Descriptor{}, err
	}
	// What follows the archive's end is padding; reading it lets the sender finish.
	_, _ = io.Copy(io.Discard, io.LimitReader(plain, 1<<20))
	var idx ocispec.Descriptor
	switch {
	case m.documents[ocispec.ImageIndexFile] != nil:
		idx, err = m.layout(ctx)
	case m.documents["manifest.json"] != nil:
		idx, err = m.docker(ctx)
	default:
		return idx, invalid("the archive has neither index.json nor manifest.json, so it holds no images")
	}
	if err != nil {
		return idx, err
	}
	found := 0
	if err := m.label(ctx, idx, &found, 0); err != nil {
		return idx, err
	}
	if found == 0 {
		return idx, invalid("the archive holds no image")
	}
	return idx, nil
}

// decompress undoes what the archive as a whole may be compressed with.
func decompress(r io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("read the archive: %w", err)
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, nil, invalid("gzip: %v", err)
		}
		return z, func() {}, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, invalid("zstd: %v", err)
		}
		return z, z.Close, nil
	}
	return b, func() {}, nil
}

func (m *importing) read(ctx context.Context, tr *tar.Reader) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		if err == io.EOF {
			if m.entries == 0 {
				return invalid("the archive is empty")
			}
			return nil
		}
		if err != nil {
			return invalid("tar after entry %d: %w", m.entries, err)
		}
		if m.entries++; m.entries > maxEntries {
			return invalid("more than %d entries", maxEntries)
		}
		name := path.Clean(h.Name)
		if path.IsAbs(name) || name == ".." || strings.HasPrefix(name, "../") {
			return invalid("entry %.200q points outside of the archive", h.Name)
		}
		switch h.Typeflag {
		case tar.TypeDir, tar.TypeXGlobalHeader:
		case tar.TypeReg, tar.TypeGNUSparse:
			if err := m.file(ctx, name, h.Size, tr); err != nil {
				return fmt.Errorf("entry %.200q: %w", h.Name, err)
			}
		case tar.TypeSymlink:
			m.files[name] = file{link: path.Join(path.Dir(name), h.Linkname)}
		case tar.TypeLink:
			m.files[name] = file{link: path.Clean(h.Linkname)}
		default:
			return invalid("entry %.200q is neither a file nor a link", h.Name)
		}
	}
}

func (m *importing) file(ctx context.Context, name string, size int64, r io.Reader) error {
	switch name {
	case ocispec.ImageLayoutFile, ocispec.ImageIndexFile, "manifest.json":
		if size > maxDocument {
			return invalid("%d bytes, at most %d are allowed", size, maxDocument)
		}
		b := make([]byte, size)
		if _, err := io.ReadFull(r, b); err != nil {
			return invalid("%w", err)
		}
		m.documents[name] = b
		return nil
	case "repositories", "VERSION":
		return nil
	}
	var want digest.Digest
	if rest, ok := strings.CutPrefix(name, ocispec.ImageBlobsDir+"/"); ok {
		alg, hex, _ := strings.Cut(rest, "/")
		want = digest.NewDigestFromEncoded(digest.Algorithm(alg), hex)
		if err := want.Validate(); err != nil {
			return invalid("not the name of a blob: %v", err)
		}
	} else if base := path.Base(name); base == "VERSION" || base == "json" {
		return nil // docker's own, from before there was content addressing
	}
	desc, err := ingest(ctx, m.store, want, size, r, nil)
	if err != nil {
		return err
	}
	m.files[name] = file{desc: desc}
	m.progress(transfer.Progress{Event: "complete", Name: "blob-" + desc.Digest.String(), Progress: size, Total: size, Desc: &desc})
	return nil
}

// ingest stores size bytes of r. want may be "".
func ingest(ctx context.Context, store content.Store, want digest.Digest, size int64, r io.Reader, labels map[string]string) (ocispec.Descriptor, error) {
	ref := fmt.Sprintf("import-%d-%08x", time.Now().UnixNano(), rand.Uint32())
	w, err := store.Writer(ctx, ref, content.WriterOptions{Total: max(size, 0), Expected: want})
	if errdefs.IsAlreadyExists(err) {
		// Still the archive's bytes must be what their name says.
		v := want.Verifier()
		if _, err := io.Copy(v, r); err != nil {
			return ocispec.Descriptor{}, invalid("%w", err)
		}
		if !v.Verified() {
			return ocispec.Descriptor{}, fmt.Errorf("the bytes are not those of %s: %w", want, errdefs.ErrFailedPrecondition)
		}
		return ocispec.Descriptor{Digest: want, Size: size}, nil
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	abort := func(err error) (ocispec.Descriptor, error) {
		actx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_ = w.Close()
		_ = store.Abort(actx, ref)
		return ocispec.Descriptor{}, err
	}
	st, err := w.Status()
	if err != nil {
		return abort(err)
	}
	d := digest.Canonical.Digester()
	if want != "" {
		d = want.Algorithm().Digester()
	}
	to := io.MultiWriter(w, d.Hash())
	if st.Offset > 0 {
		// The ref is new, so the bytes are those of a blob that another
		// namespace shares. The archive's must be the same.
		to = d.Hash()
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{r}, make([]byte, 128<<10))
	if err == nil && size >= 0 && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		if ctx.Err() != nil {
			return abort(context.Cause(ctx))
		}
		return abort(fmt.Errorf("after %d bytes: %w", n, err))
	}
	if want == "" {
		want = d.Digest()
	}
	if d.Digest() != want {
		return abort(fmt.Errorf("the bytes are not those of %s: %w", want, errdefs.ErrFailedPrecondition))
	}
	if err := w.Commit(ctx, n, want, labels); err != nil && !errdefs.IsAlreadyExists(err) {
		return abort(err)
	}
	return ocispec.Descriptor{Digest: want, Size: n}, nil
}

// store keeps a document that is made here.
func storeDocument(ctx context.Context, store content.Store, mediaType string, b []byte) (ocispec.Descriptor, error) {
	desc, err := ingest(ctx, store, digest.FromBytes(b), int64(len(b)), bytes.NewReader(b), nil)
	desc.MediaType = mediaType
	return desc, err
}

// layout takes the index of an OCI image layout as it is.
func (m *importing) layout(ctx context.Context) (ocispec.Descriptor, error) {
	var l ocispec.ImageLayout
	b := m.documents[ocispec.ImageLayoutFile]
	if b == nil {
		return ocispec.Descriptor{}, invalid("the archive has index.json but no %s", ocispec.ImageLayoutFile)
	}
	if err := json.Unmarshal(b, &l); err != nil || l.Version != ocispec.ImageLayoutVersion {
		return ocispec.Descriptor{}, invalid("%s: version %.32q (%v), want %s", ocispec.ImageLayoutFile, l.Version, err, ocispec.ImageLayoutVersion)
	}
	b = m.documents[ocispec.ImageIndexFile]
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if _, err := manifest.ParseIndex(desc, b); err != nil {
		return desc, err
	}
	return storeDocument(ctx, m.store, desc.MediaType, b)
}

// dockerEntry is one image of docker save's manifest.json.
type dockerEntry struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// docker makes manifests and an index of what docker save wrote.
func (m *importing) docker(ctx context.Context) (ocispec.Descriptor, error) {
	var entries []dockerEntry
	if err := json.Unmarshal(m.documents["manifest.json"], &entries); err != nil {
		return ocispec.Descriptor{}, invalid("manifest.json: %v", err)
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	made := map[string]ocispec.Descriptor{}
	for i, e := range entries {
		if len(e.Layers) > manifest.MaxChildren {
			return ocispec.Descriptor{}, invalid("manifest.json: image %d has %d layers", i, len(e.Layers))
		}
		config, err := m.resolve(e.Config)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("manifest.json: config of image %d: %w", i, err)
		}
		config.MediaType = manifest.DockerConfig
		img, err := manifest.ReadConfig(ctx, m.store, config)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if len(img.RootFS.DiffIDs) != len(e.Layers) {
			return ocispec.Descriptor{}, invalid("manifest.json: image %d has %d layers, its config %d diff ids", i, len(e.Layers), len(img.RootFS.DiffIDs))
		}
		doc := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: manifest.DockerManifest, Config: config}
		for k, name := range e.Layers {
			l, err := m.resolve(name)
			if err != nil {
				return ocispec.Descriptor{}, fmt.Errorf("manifest.json: layer %d of image %d: %w", k, i, err)
			}
			if l, err = m.layer(ctx, l, img.RootFS.DiffIDs[k], made); err != nil {
				return ocispec.Descriptor{}, fmt.Errorf("layer %.200q: %w", name, err)
			}
			doc.Layers = append(doc.Layers, l)
		}
		b, err := json.Marshal(doc)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		desc, err := storeDocument(ctx, m.store, manifest.DockerManifest, b)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		p := platforms.Normalize(img.Platform)
		if p.OS != "" || p.Architecture != "" {
			desc.Platform = &p
		}
		if len(e.RepoTags) == 0 {
			idx.Manifests = append(idx.Manifests, desc)
		}
		for _, tag := range e.RepoTags {
			named, err := reference.ParseNormalizedNamed(tag)
			if err != nil {
				return ocispec.Descriptor{}, invalid("manifest.json: image %d: name %.200q: %v", i, tag, err)
			}
			named = reference.TagNameOnly(named)
			d := desc
			d.Annotations = map[string]string{AnnotationName: named.String()}
			if t, ok := named.(reference.Tagged); ok {
				d.Annotations[AnnotationRef] = t.Tag()
			}
			idx.Manifests = append(idx.Manifests, d)
		}
	}
	b, err := json.Marshal(idx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return storeDocument(ctx, m.store, ocispec.MediaTypeImageIndex, b)
}

// resolve finds the blob that a name stands for, over at most 8 links.
func (m *importing) resolve(name string) (ocispec.Descriptor, error) {
	at := path.Clean(name)
	for range 8 {
		f, ok := m.files[at]
		if !ok {
			return ocispec.Descriptor{}, invalid("%.200q is not in the archive", name)
		}
		if f.link == "" {
			return f.desc, nil
		}
		at = f.link
	}
	return ocispec.Descriptor{}, invalid("%.200q: too many links", name)
}

// layer finds out how a layer is compressed, and compresses it if that is
// wanted and it is not.
func (m *importing) layer(ctx context.Context, desc ocispec.Descriptor, diffID digest.Digest, made map[string]ocispec.Descriptor) (ocispec.Descriptor, error) {
	if d, ok := made[desc.Digest.String()]; ok {
		return d, nil
	}
	r, err := m.store.Open(ctx, desc.Digest)
	if err != nil {
		return desc, err
	}
	defer r.Close()
	var magic [4]byte
	if _, err := r.ReadAt(magic[:], 0); err != nil && err != io.EOF {
		return desc, err
	}
	key := desc.Digest.String()
	switch {
	case magic[0] == 0x1f && magic[1] == 0x8b:
		desc.MediaType = manifest.DockerLayerGzip
	case bytes.Equal(magic[:], []byte{0x28, 0xb5, 0x2f, 0xfd}):
		desc.MediaType = manifest.DockerLayerZstd
	default:
		desc.MediaType = manifest.DockerLayer
		if desc.Digest != diffID {
			return desc, invalid("its digest is %s, the config says %s", desc.Digest, diffID)
		}
		if m.compress {
			if desc, err = m.gzip(ctx, r, diffID); err != nil {
				return desc, err
			}
		}
	}
	made[key] = desc
	return desc, nil
}

func (m *importing) gzip(ctx context.Context, r content.ReaderAt, diffID digest.Digest) (ocispec.Descriptor, error) {
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		z := gzip.NewWriter(pw)
		_, err := io.Copy(z, io.NewSectionReader(r, 0, r.Size()))
		if err == nil {
			err = z.Close()
		}
		pw.CloseWithError(err)
	}()
	desc, err := ingest(ctx, m.store, "", -1, pr, map[string]string{diff.LabelUncompressed: diffID.String()})
	pr.CloseWithError(io.ErrClosedPipe)
	<-done
	desc.MediaType = manifest.DockerLayerGzip
	return desc, err
}

// label puts the references to children on all documents that are here. Of an
// index below the top, parts may be missing: whoever made the archive chose
// platforms. What a manifest refers to must be there. found counts manifests.
func (m *importing) label(ctx context.Context, desc ocispec.Descriptor, found *int, depth int) error {
	if depth > manifest.MaxDepth {
		return invalid("index %s: nested more than %d deep", desc.Digest, manifest.MaxDepth)
	}
	children, err := manifest.Children(ctx, m.store, desc)
	if err != nil {
		return err
	}
	if len(children) == 0 {
		return nil
	}
	if manifest.IsManifest(desc.MediaType) {
		*found++
	}
	for _, c := range children {
		info, err := m.store.Info(ctx, c.Digest)
		switch {
		case errdefs.IsNotFound(err) && (manifest.IsIndex(desc.MediaType) && depth > 0 || manifest.IsNonDistributable(c.MediaType)):
			continue
		case errdefs.IsNotFound(err):
			return invalid("%s is not in the archive, though %s refers to it", manifest.RefKey(c), manifest.RefKey(desc))
		case err != nil:
			return err
		case info.Size != c.Size:
			return invalid("%s has %d bytes, but %s says %d", manifest.RefKey(c), info.Size, manifest.RefKey(desc), c.Size)
		}
		if err := m.lease(ctx, c); err != nil {
			return err
		}
		// An index may name another as often as it likes: once is enough.
		if key := manifest.RefKey(c); !m.labelled[key] && (manifest.IsIndex(c.MediaType) || manifest.IsManifest(c.MediaType)) {
			m.labelled[key] = true
			if err := m.label(ctx, c, found, depth+1); err != nil {
				return err
			}
		}
	}
	labels := manifest.Labels(children)
	fields := make([]string, 0, len(labels))
	for k := range labels {
		fields = append(fields, "labels."+k)
	}
	_, err = m.store.Update(ctx, content.Info{Digest: desc.Digest, Labels: labels}, fields...)
	if err != nil {
		return fmt.Errorf("label %s: %w", manifest.RefKey(desc), err)
	}
	return nil
}

// lease makes the import's lease hold a blob, which may have been in the store
// before and not in the archive. Opening an ingest of it does.
func (m *importing) lease(ctx context.Context, c ocispec.Descriptor) error {
	w, err := m.store.Writer(ctx, "import-"+manifest.RefKey(c), content.WriterOptions{Total: c.Size, Expected: c.Digest})
	if err == nil {
		_ = w.Close()
		_ = m.store.Abort(ctx, "import-"+manifest.RefKey(c))
		return invalid("%s was removed during the import", manifest.RefKey(c))
	}
	if errdefs.IsAlreadyExists(err) || errdefs.IsUnavailable(err) {
		return nil
	}
	return err
}
