package transfer_test

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/snapshot"
	core "github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
	edge "github.com/gantryd/gantry/internal/edge/registry"
	"github.com/gantryd/gantry/internal/edge/registry/registrytest"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/boltmeta"
	"github.com/gantryd/gantry/internal/engine/native"
	"github.com/gantryd/gantry/internal/engine/walkdiff"
	"github.com/gantryd/gantry/internal/service/archive"
	"github.com/gantryd/gantry/internal/service/pull"
	"github.com/gantryd/gantry/internal/service/push"
	"github.com/gantryd/gantry/internal/service/transfer"
	"github.com/gantryd/gantry/internal/service/unpack"
)

// The real engines: an image comes from Debian's registry onto disk, five times
// at once and into two namespaces; its files are there, no lease and no ingest
// is left, and the store is consistent.
//
// contract: 6.3.11, 6.4.1
// promise: P2
func TestRealEngines(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("native snapshots of layers need root")
	}
	dir := t.TempDir()
	blobs, err := blobdir.Open(filepath.Join(dir, "content"), blobdir.Options{})
	if err != nil {
		t.Fatal(err)
	}
	snaps, err := native.Open(filepath.Join(dir, "native"), native.Config{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { snaps.Close() })
	db, err := boltmeta.Open(filepath.Join(dir, "meta.db"), boltmeta.Options{Content: blobs, Snapshotters: map[string]snapshot.Store{"native": snaps}, OpenTimeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	client := edge.New(edge.Config{})
	t.Cleanup(func() { client.Close() })
	un := unpack.New(func(rec view.Records) diff.Applier { return walkdiff.New(rec.Content(), walkdiff.Options{}) }, unpack.Options{Snapshotter: "native"})
	service := transfer.New(transfer.Deps{Records: db, Registries: client, Unpacker: un, Pusher: push.New(push.Options{}), Archiver: archive.New(nil),
		Puller: pull.New(un, pull.Options{})})

	img := registrytest.Build("amd64", 100_000, registrytest.Gzip, registrytest.Zstd, registrytest.None)
	src := registrytest.New(t)
	src.AddImage("app", "1", img)
	seed := newWorld(t, edge.Config{})
	name := src.Host() + "/app:1"
	if err := seed.pull(name, core.ImageStore{}); err != nil {
		t.Fatal(err)
	}
	remote := registrytest.Debian(t, false) + "/app:1"
	if err := seed.transfer(core.ImageStore{Name: name}, core.Registry{Reference: remote}, core.Options{}); err != nil {
		t.Fatal(err)
	}

	unpacks := []core.Unpack{{Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}, Snapshotter: "native"}}
	one, err := db.In("one", "")
	if err != nil {
		t.Fatal(err)
	}
	two, err := db.In("two", "")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 5 {
		rec := one
		if i == 4 {
			rec = two
		}
		wg.Go(func() {
			if err := service.In(rec).Transfer(t.Context(), core.Registry{Reference: remote}, core.ImageStore{Name: remote, Unpacks: unpacks}, core.Options{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	chain := identity.ChainIDs(img.DiffIDs)
	for _, rec := range []view.Records{one, two} {
		sn, err := rec.Snapshots("native")
		if err != nil {
			t.Fatal(err)
		}
		key := "look"
		mounts, err := sn.View(t.Context(), key, chain[2].String(), nil)
		if err != nil || len(mounts) != 1 {
			t.Fatal(mounts, err)
		}
		for _, f := range []string{"file0", "file1", "file2"} {
			if st, err := os.Stat(filepath.Join(mounts[0].Source, f)); err != nil || st.Size() != 100_000 {
				t.Errorf("%s: %v, %v", f, st, err)
			}
		}
		if err := sn.Remove(t.Context(), key); err != nil {
			t.Error(err)
		}
		if l, err := rec.Leases().List(t.Context()); err != nil || len(l) != 0 {
			t.Errorf("leases %v, %v", l, err)
		}
		if s, err := rec.Content().Statuses(t.Context()); err != nil || len(s) != 0 {
			t.Errorf("ingests %v, %v", s, err)
		}
	}
	var out buffer
	if err := service.In(one).Transfer(t.Context(), core.ImageStore{Name: remote}, core.Export{Writer: &out}, core.Options{}); err != nil {
		t.Fatal(err)
	}
	three, err := db.In("three", "")
	if err != nil {
		t.Fatal(err)
	}
	store := core.ImageStore{References: []core.Reference{{Name: "x", IsPrefix: true, AllowOverwrite: true}}, Unpacks: unpacks}
	if err := service.In(three).Transfer(t.Context(), core.Import{Reader: bytes.NewReader(out.Bytes())}, store, core.Options{}); err != nil {
		t.Fatal(err)
	}
	if got, err := three.Images().Get(t.Context(), remote); err != nil || got.Target.Digest != img.Target.Digest {
		t.Errorf("imported %+v, %v", got, err)
	}
	if p := db.Check(t.Context()); len(p) != 0 {
		t.Errorf("the store is not consistent: %v", p)
	}
}
