package walkdiff

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/diff/difftest"
	"github.com/gantryd/gantry/internal/engine/memory"
)

// An image whose layers umoci made is what umoci made it of.
//
// contract: 3.3.2
func TestUmociLayers(t *testing.T) {
	if _, err := exec.LookPath("umoci"); err != nil || os.Geteuid() != 0 {
		t.Skip("needs umoci and root")
	}
	base := t.TempDir()
	script(t, base, `umoci init --layout img; umoci new --image img:x; umoci unpack --image img:x b1
		cd b1/rootfs; mkdir -p d/sub e tofile; echo 1 >d/f; echo 2 >d/sub/g; echo 3 >gone; ln d/f hard; ln -s d/f sym; echo 4 >tofile/x; chmod 1777 e
		cd ../..; umoci repack --image img:x b1; rm -rf b1; umoci unpack --image img:x b2
		cd b2/rootfs; rm gone; rm -r d/sub tofile; echo f >tofile; echo 5 >d/new; mkfifo e/p; chown 7:8 d/f; chmod 4711 d/f; touch -d @1600000000 d/new e/p tofile
		cd ../..; umoci repack --image img:x b2`)
	read := func(d ocispec.Descriptor, into any) []byte {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(base, "img/blobs/sha256", d.Digest.Encoded()))
		if err != nil {
			t.Fatal(err)
		}
		if into != nil {
			if err := json.Unmarshal(b, into); err != nil {
				t.Fatal(err)
			}
		}
		return b
	}
	index, err := os.ReadFile(filepath.Join(base, "img/index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var i ocispec.Index
	var m ocispec.Manifest
	var c ocispec.Image
	if err := json.Unmarshal(index, &i); err != nil {
		t.Fatal(err)
	}
	read(i.Manifests[0], &m)
	read(m.Config, &c)
	if len(m.Layers) != 2 {
		t.Fatalf("%d layers", len(m.Layers))
	}
	store, root := memory.NewContent(), t.TempDir()
	e := New(store, Options{VerifyBlobs: true})
	for n, l := range m.Layers {
		applied, err := e.Apply(t.Context(), difftest.Put(t, store, l.MediaType, read(l, nil)), difftest.Bind(root), diff.ApplyOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if applied.Digest != c.RootFS.DiffIDs[n] {
			t.Errorf("layer %d: diff id %s, the image says %s", n, applied.Digest, c.RootFS.DiffIDs[n])
		}
	}
	same(t, "umoci", tree(t, root), tree(t, filepath.Join(base, "b2/rootfs")))
}
