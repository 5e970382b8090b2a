package archive

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
)

// Export writes images as an OCI image layout which docker load can read as
// well. The same images give the same bytes. It does not close the writer.
// ErrNotFound names content that is missing.
func (s *Service) Export(ctx context.Context, rec view.Records, imgs []image.Image, out transfer.Export, progress func(transfer.Progress)) error {
	switch out.MediaType {
	case "", "application/vnd.oci.image.layout.v1+tar", "application/x-tar", "application/octet-stream":
	default:
		return fmt.Errorf("export: media type %.100q: %w", out.MediaType, errdefs.ErrNotImplemented)
	}
	e := &exporting{rec: rec, out: out, blobs: map[digest.Digest]ocispec.Descriptor{}, progress: progress, match: platforms.All}
	if len(out.Platforms) > 0 && !out.AllPlatforms {
		e.match = platforms.Any(out.Platforms...)
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, img := range imgs {
		n := len(e.manifests)
		if err := e.collect(ctx, img.Target, img.Name, 0); err != nil {
			return fmt.Errorf("export %s: %w", img.Name, err)
		}
		if len(e.manifests) == n && e.plain == 0 {
			return fmt.Errorf("export %s: no image for the platforms asked for is in the store: %w", img.Name, errdefs.ErrNotFound)
		}
		d := img.Target
		d.Annotations = map[string]string{}
		for k, v := range img.Target.Annotations {
			d.Annotations[k] = v
		}
		d.Annotations[AnnotationName] = img.Name
		d.Annotations[AnnotationRef] = refName(img.Name)
		idx.Manifests = append(idx.Manifests, d)
	}
	return e.write(ctx, idx)
}

// refName is what the OCI layout calls an image: its tag, or all of its name
// where there is none.
func refName(name string) string {
	if named, err := reference.ParseNormalizedNamed(name); err == nil {
		if t, ok := named.(reference.Tagged); ok {
			return t.Tag()
		}
	}
	return name
}

type exporting struct {
	rec       view.Records
	out       transfer.Export
	match     platforms.Matcher
	blobs     map[digest.Digest]ocispec.Descriptor
	manifests []exported
	plain     int // blobs that are no images
	progress  func(transfer.Progress)
}

// exported is a manifest for docker's manifest.json.
type exported struct {
	name     string
	manifest ocispec.Manifest
	platform *ocispec.Platform
}

func (e *exporting) collect(ctx context.Context, desc ocispec.Descriptor, name string, depth int) error {
	if depth > manifest.MaxDepth {
		return fmt.Errorf("index %s: nested more than %d deep: %w", desc.Digest, manifest.MaxDepth, errdefs.ErrInvalidArgument)
	}
	switch {
	case manifest.IsIndex(desc.MediaType):
		children, err := manifest.Children(ctx, e.rec.Content(), desc)
		if err != nil {
			return err
		}
		e.blobs[desc.Digest] = desc
		for _, c := range children {
			if c.Platform != nil && !e.match.Match(*c.Platform) {
				continue
			}
			// Without a choice, what the store has of an index is what is exported.
			if _, err := e.rec.Content().Info(ctx, c.Digest); errdefs.IsNotFound(err) && !e.out.AllPlatforms && len(e.out.Platforms) == 0 {
				continue
			}
			if err := e.collect(ctx, c, name, depth+1); err != nil {
				return err
			}
		}
		return nil
	case manifest.IsManifest(desc.MediaType):
		m, err := manifest.ReadManifest(ctx, e.rec.Content(), desc)
		if err != nil {
			return err
		}
		all := append([]ocispec.Descriptor{m.Config}, m.Layers...)
		for i, c := range all {
			if manifest.IsNonDistributable(c.MediaType) && e.out.SkipNonDistributable {
				continue
			}
			if _, err := e.rec.Content().Info(ctx, c.Digest); err != nil {
				if errdefs.IsNotFound(err) && i > 0 && depth > 0 && !e.out.AllPlatforms && len(e.out.Platforms) == 0 {
					// Only the metadata of this platform was pulled.
					return nil
				}
				return fmt.Errorf("%s: %w", manifest.RefKey(c), err)
			}
		}
		e.blobs[desc.Digest] = desc
		for _, c := range all {
			if manifest.IsNonDistributable(c.MediaType) && e.out.SkipNonDistributable {
				continue
			}
			e.blobs[c.Digest] = c
		}
		e.manifests = append(e.manifests, exported{name, m, desc.Platform})
		return nil
	}
	e.blobs[desc.Digest] = desc
	e.plain++
	return nil
}

func (e *exporting) write(ctx context.Context, idx ocispec.Index) error {
	tw := tar.NewWriter(e.out.Writer)
	if err := document(tw, ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}); err != nil {
		return err
	}
	algorithms := map[string]bool{}
	order := slices.Sorted(maps.Keys(e.blobs))
	for _, d := range order {
		algorithms[d.Algorithm().String()] = true
	}
	dirs := []string{ocispec.ImageBlobsDir + "/"}
	for _, a := range slices.Sorted(maps.Keys(algorithms)) {
		dirs = append(dirs, ocispec.ImageBlobsDir+"/"+a+"/")
	}
	for _, d := range dirs {
		if err := tw.WriteHeader(&tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
	}
	for _, d := range order {
		if err := e.blob(ctx, tw, e.blobs[d]); err != nil {
			return fmt.Errorf("export %s: %w", d, err)
		}
	}
	if err := document(tw, ocispec.ImageIndexFile, idx); err != nil {
		return err
	}
	if !e.out.SkipCompatibilityManifest {
		entries, err := e.docker(ctx)
		if err != nil {
			return err
		}
		if len(entries) > 0 {
			if err := document(tw, "manifest.json", entries); err != nil {
				return err
			}
		}
	}
	return tw.Close()
}

func document(tw *tar.Writer, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o444, Size: int64(len(b)), ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	_, err = tw.Write(b)
	return err
}

// blob writes one, and verifies it on the way out: an archive with a wrong
// blob must not look complete.
func (e *exporting) blob(ctx context.Context, tw *tar.Writer, desc ocispec.Descriptor) error {
	r, err := e.rec.Content().Open(ctx, desc.Digest)
	if err != nil {
		return err
	}
	defer r.Close()
	name := path.Join(ocispec.ImageBlobsDir, desc.Digest.Algorithm().String(), desc.Digest.Encoded())
	if err := tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o444, Size: r.Size(), ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	v := desc.Digest.Verifier()
	in := io.TeeReader(io.NewSectionReader(r, 0, r.Size()), v)
	buf := make([]byte, 128<<10)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := in.Read(buf)
		if n > 0 {
			if _, werr := tw.Write(buf[:n]); werr != nil {
				return werr
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if !v.Verified() {
		return fmt.Errorf("the stored bytes have another digest: %w", errdefs.ErrDataLoss)
	}
	e.progress(transfer.Progress{Event: "complete", Name: manifest.RefKey(desc), Progress: desc.Size, Total: desc.Size, Desc: &desc})
	return nil
}

// docker is manifest.json: one entry a name, the host's platform of an index.
func (e *exporting) docker(ctx context.Context) ([]dockerEntry, error) {
	order := platforms.Default()
	if len(e.out.Platforms) > 0 {
		order = platforms.Ordered(e.out.Platforms...)
	}
	best := map[string]exported{}
	var names []string
	for _, x := range e.manifests {
		if !manifest.IsConfig(x.manifest.Config.MediaType) || (x.platform != nil && x.platform.OS == "unknown") {
			continue
		}
		old, ok := best[x.name]
		if !ok {
			names = append(names, x.name)
		}
		if !ok || x.platform != nil && old.platform != nil && order.Less(*x.platform, *old.platform) {
			best[x.name] = x
		}
	}
	file := func(d ocispec.Descriptor) string {
		return path.Join(ocispec.ImageBlobsDir, d.Digest.Algorithm().String(), d.Digest.Encoded())
	}
	byConfig := map[digest.Digest]int{}
	var entries []dockerEntry
	for _, name := range names {
		m := best[name].manifest
		i, ok := byConfig[m.Config.Digest]
		if !ok {
			entry := dockerEntry{Config: file(m.Config), RepoTags: []string{}}
			for _, l := range m.Layers {
				if _, written := e.blobs[l.Digest]; !written {
					continue
				}
				entry.Layers = append(entry.Layers, file(l))
			}
			i = len(entries)
			byConfig[m.Config.Digest] = i
			entries = append(entries, entry)
		}
		if named, err := reference.ParseNormalizedNamed(name); err == nil && !strings.Contains(name, "@") {
			if _, tagged := named.(reference.Tagged); tagged {
				entries[i].RepoTags = append(entries[i].RepoTags, reference.FamiliarString(named))
			}
		}
	}
	return entries, ctx.Err()
}
