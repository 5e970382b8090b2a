package criimage

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/snapshot"
	core "github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	edge "github.com/gantryd/gantry/internal/edge/registry"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/boltmeta"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/engine/native"
	"github.com/gantryd/gantry/internal/engine/walkdiff"
	"github.com/gantryd/gantry/internal/service/archive"
	"github.com/gantryd/gantry/internal/service/gc"
	"github.com/gantryd/gantry/internal/service/pull"
	"github.com/gantryd/gantry/internal/service/push"
	"github.com/gantryd/gantry/internal/service/transfer"
	"github.com/gantryd/gantry/internal/service/unpack"
)

// house is what a daemon has around the service: real stores in a directory.
type house struct {
	t    *testing.T
	deps Deps
	view view.View // of another client
	db   *boltmeta.DB
	// metrics are those of the service that was opened last.
	metrics *prometheus.Registry
}

func newHouse(t *testing.T) *house {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("native snapshots of layers need root")
	}
	dir := t.TempDir()
	blobs, err := blobdir.Open(filepath.Join(dir, "content"), blobdir.Options{})
	if err != nil {
		t.Fatal(err)
	}
	stores, roots := map[string]snapshot.Store{}, map[string]string{}
	for _, name := range []string{"native", "second"} {
		roots[name] = filepath.Join(dir, name)
		s, err := native.Open(roots[name], native.Config{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		stores[name] = s
	}
	bus := memory.NewBus()
	db, err := boltmeta.Open(filepath.Join(dir, "meta.db"), boltmeta.Options{Content: blobs, Snapshotters: stores, Events: bus, OpenTimeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p := db.Check(context.Background()); len(p) != 0 {
			t.Errorf("the store is not consistent: %v", p)
		}
		db.Close()
	})
	collector := gc.New(db, gc.Defaults(), nil)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = collector.Run(ctx) }()
	t.Cleanup(func() { stop(); <-ended })
	records := gc.SyncDelete(db, collector)
	client := edge.New(edge.Config{BackOff: time.Millisecond})
	t.Cleanup(func() { client.Close() })
	un := unpack.New(func(rec view.Records) diff.Applier { return walkdiff.New(rec.Content(), walkdiff.Options{}) }, unpack.Options{Snapshotter: "native"})
	service := transfer.New(transfer.Deps{Records: records, Registries: client, Unpacker: un, Pusher: push.New(push.Options{}), Archiver: archive.New(nil),
		Puller: pull.New(un, pull.Options{})})
	src := view.Join(records, func(r view.Records) view.Services { return view.Services{Transfer: service.In(r)} })
	v, err := src.In(cristate.Namespace, "")
	if err != nil {
		t.Fatal(err)
	}
	config := cristate.DefaultImagesConfig()
	config.Snapshotter, config.Registry.ConfigPath = "native", filepath.Join(dir, "certs.d")
	run := cristate.DefaultRuntimeConfig()
	run.Containerd.Runtimes["kata"] = cristate.Runtime{Type: "io.containerd.kata.v2", Snapshotter: "second", DisablePauseImagePull: true}
	return &house{t: t, view: v, db: db, deps: Deps{Source: src, Events: bus, Unpacker: un, Config: config, Runtime: run, Roots: roots,
		HostsDir: filepath.Join(dir, "hosts")}}
}

// open makes the service and fills its index.
func (h *house) open() *Service {
	h.t.Helper()
	h.metrics = prometheus.NewRegistry()
	h.deps.Metrics = h.metrics
	s, err := New(h.deps)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := s.Recover(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
	return s
}

// run opens the service and lets it follow events until the test ends.
func (h *house) run() *Service {
	h.t.Helper()
	s := h.open()
	ctx, stop := context.WithCancel(h.t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = s.Run(ctx) }()
	h.t.Cleanup(func() { stop(); <-ended })
	return s
}

// foreign pulls as other clients do: one record, no labels.
func (h *house) foreign(ref string, unpacks ...core.Unpack) {
	h.t.Helper()
	if err := h.view.Transfer().Transfer(h.t.Context(), core.Registry{Reference: ref}, core.ImageStore{Name: ref, Unpacks: unpacks}, core.Options{}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) records() map[string]map[string]string {
	h.t.Helper()
	all, err := h.view.Images().List(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	out := map[string]map[string]string{}
	for _, i := range all {
		out[i.Name] = i.Labels
	}
	return out
}

// eventually waits for a condition that an event brings about.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(10 * time.Second)
	for !is() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

func pullOf(t *testing.T, s *Service, ref string, auth *runtime.AuthConfig) string {
	t.Helper()
	r, err := s.PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}, Auth: auth})
	if err != nil {
		t.Fatal(err)
	}
	return r.ImageRef
}

func status(t *testing.T, s *Service, spec *runtime.ImageSpec, verbose bool) *runtime.ImageStatusResponse {
	t.Helper()
	r, err := s.ImageStatus(t.Context(), &runtime.ImageStatusRequest{Image: spec, Verbose: verbose})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func remove(t *testing.T, s *Service, ref string) {
	t.Helper()
	if _, err := s.RemoveImage(t.Context(), &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: ref}}); err != nil {
		t.Fatal(err)
	}
}
