package transfer_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/registry"
	core "github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/internal/edge/registry/registrytest"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/service/transfer"

	edge "github.com/gantryd/gantry/internal/edge/registry"
)

// leasesOf are a world's, by id.
func (w *world) leasesOf(ctx context.Context) []lease.ID {
	w.t.Helper()
	all, err := w.space("test").leases.List(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	var ids []lease.ID
	for _, l := range all {
		ids = append(ids, l.ID)
	}
	return ids
}

// plant makes leases as a daemon leaves them that died during transfers, and
// one of a client.
func (w *world) plant(ctx context.Context, pulled string) {
	w.t.Helper()
	for id, labels := range map[lease.ID]map[string]string{
		"push":   {"io.gantry.transfer.life": "earlier"},
		"pull":   {"io.gantry.transfer.life": "earlier", "io.gantry.transfer.source": pulled},
		"other":  {"io.gantry.transfer.life": "earlier", "io.gantry.transfer.source": "example.org/other"},
		"client": {"some": "label"},
	} {
		if _, err := w.space("test").leases.Create(ctx, lease.Lease{ID: id, Labels: labels}); err != nil {
			w.t.Fatal(err)
		}
	}
}

// TestInterrupted: what transfers of an earlier life held is let go at once,
// but for pulls, which may be repeated for some time.
//
// promise: P6
func TestInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, spaces: map[namespace.ID]*space{}}
		w.plant(t.Context(), "example.org/app")
		s := transfer.New(transfer.Deps{Records: w})
		spaces := memory.NewNamespaces()
		if _, err := spaces.Create(t.Context(), namespace.Namespace{ID: "test"}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- s.Run(ctx, spaces) }()
		time.Sleep(transfer.Keep - time.Second)
		synctest.Wait()
		if got, want := w.leasesOf(ctx), []lease.ID{"client", "other", "pull"}; !slices.Equal(got, want) {
			t.Errorf("before the time is up the leases are %v, want %v", got, want)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got, want := w.leasesOf(ctx), []lease.ID{"client"}; !slices.Equal(got, want) {
			t.Errorf("when the time is up the leases are %v, want %v", got, want)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		cancel()
		if err := s.Run(ctx, spaces); err != nil {
			t.Errorf("a daemon that stops: %v", err)
		}
	})
}

// TestPulledAgain: a pull that succeeds ends the leases that earlier lives of
// the daemon had for the same, and no other.
//
// promise: P6
func TestPulledAgain(t *testing.T) {
	w := newWorld(t, edge.Config{})
	src := registrytest.New(t)
	src.AddImage("app", "1", registrytest.Build("amd64", 1000, registrytest.Gzip))
	name := src.Host() + "/app:1"
	w.plant(t.Context(), name)
	if err := w.transfer(core.Registry{Reference: src.Host() + "/none:1", Options: registry.Options{}}, core.ImageStore{}, core.Options{}); err == nil {
		t.Fatal("an image that is not there was pulled")
	}
	if got := w.leasesOf(t.Context()); len(got) != 4 {
		t.Errorf("after a pull of something else the leases are %v", got)
	}
	if err := w.transfer(core.Registry{Reference: name}, core.ImageStore{Name: name, Unpacks: unpackMemory()}, core.Options{}); err != nil {
		t.Fatal(err)
	}
	if got, want := w.leasesOf(t.Context()), []lease.ID{"client", "other", "push"}; !slices.Equal(got, want) {
		t.Errorf("after the pull the leases are %v, want %v", got, want)
	}
}
