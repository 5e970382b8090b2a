package manifest

import (
	"maps"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// contract: 1.5.2
func TestLabels(t *testing.T) {
	d := func(mt, s string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mt, Digest: digest.Digest(s)}
	}
	got := Labels([]ocispec.Descriptor{d(ocispec.MediaTypeImageConfig, "c"), d(ocispec.MediaTypeImageLayerZstd, "l0"), d("application/x", "x0"),
		d(DockerForeignGzip, "l1"), d(ocispec.MediaTypeImageManifest, "m0"), d(DockerIndex, "m1"), d("application/y", "x1")})
	want := map[string]string{LabelRef + ".config": "c", LabelRef + ".l.0": "l0", LabelRef + ".l.1": "l1", LabelRef + ".m.0": "m0", LabelRef + ".m.1": "m1",
		LabelRef + ".0": "x0", LabelRef + ".1": "x1"}
	if !maps.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}

// contract: 6.1.12
func TestRefKey(t *testing.T) {
	unknown := &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	for want, d := range map[string]ocispec.Descriptor{
		"manifest-x":    {MediaType: ocispec.MediaTypeImageManifest, Digest: "x"},
		"index-x":       {MediaType: DockerIndex, Digest: "x"},
		"layer-x":       {MediaType: DockerLayerGzip, Digest: "x"},
		"config-x":      {MediaType: DockerConfig, Digest: "x"},
		"attestation-x": {MediaType: ocispec.MediaTypeImageManifest, Digest: "x", Platform: unknown},
		"unknown-x":     {MediaType: "a/b", Digest: "x"},
	} {
		if got := RefKey(d); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// Whatever the bytes, a document is taken as one thing at most.
//
// promise: C6
func FuzzParse(f *testing.F) {
	for _, s := range []string{`{}`, `null`, `{"manifests":null,"layers":null}`, `{"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[{"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":1,"mediaType":"a/b"}]}`,
		`{"config":{"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":1,"mediaType":"a/b"},"layers":[]}`,
		`{"Manifests":[],"layers":[]}`, `{"config":{},"manifests":[]}`, `{"layers":[{"size":-1}]}`, `[]`, `{"manifests":[],"manifests":null}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, errI := ParseIndex(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex}, b)
		_, errM := ParseManifest(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest}, b)
		if errI == nil && errM == nil {
			t.Errorf("both an index and a manifest: %s", b)
		}
		for _, err := range []error{errI, errM} {
			if err != nil && !errdefs.IsInvalidArgument(err) {
				t.Errorf("class of %v", err)
			}
		}
	})
}
