package autoremove

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/engine/memory"
)

// world is one namespace, "ns", made of fakes.
type world struct {
	view.View  // what the service must not use
	containers container.Store
	snapshots  snapshot.Store
	tasks      *memory.Tasks
	bus        *memory.Bus
	logs       string
}

func (w *world) In(namespace.ID, lease.ID) (view.View, error) { return w, nil }
func (w *world) Containers() container.Store                  { return w.containers }
func (w *world) Tasks() task.Store                            { return w.tasks }
func (w *world) Snapshots(string) (snapshot.Store, error)     { return w.snapshots, nil }
func (w *world) List(context.Context) ([]namespace.Namespace, error) {
	return []namespace.Namespace{{ID: "ns"}}, nil
}

// start makes and starts a container with everything that belongs to it.
func (w *world) start(t *testing.T, id container.ID, labels, notes map[string]string) {
	t.Helper()
	ctx := t.Context()
	if _, err := w.snapshots.Prepare(ctx, string(id), "", nil); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(w.logs, "ns", string(id)), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := w.containers.Create(ctx, container.Container{ID: id, Labels: labels, Extensions: container.Notes(notes), Runtime: container.Runtime{Name: "io.containerd.runc.v2"},
		Snapshotter: "s", SnapshotKey: string(id), Spec: typed.Any{URL: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte(`{"process":{"args":["sleep"],"cwd":"/"}}`)}}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.tasks.Create(ctx, id, task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.tasks.Start(ctx, id, ""); err != nil {
		t.Fatal(err)
	}
}

// gone says whether nothing of a container is left; all says whether all is.
func (w *world) state(t *testing.T, id container.ID) (gone, all bool) {
	t.Helper()
	_, cerr := w.containers.Get(t.Context(), id)
	_, serr := w.snapshots.Stat(t.Context(), string(id))
	_, terr := w.tasks.Get(t.Context(), id, "")
	_, lerr := os.Stat(filepath.Join(w.logs, "ns", string(id)))
	gone = errdefs.IsNotFound(cerr) && errdefs.IsNotFound(serr) && errdefs.IsNotFound(terr) && os.IsNotExist(lerr)
	return gone, cerr == nil && serr == nil && terr == nil && lerr == nil
}

// A container with the note goes when it ends, with all that is its own, whether
// the service was there then or not. Others and those that run stay,
// also one that has a label of that name: that may come from its image.
func TestAutoremove(t *testing.T) {
	bus, containers := memory.NewBus(), memory.NewContainers()
	w := &world{containers: containers, snapshots: memory.NewSnapshots(), tasks: memory.NewTasks("ns", containers, bus), bus: bus, logs: t.TempDir()}
	rm := map[string]string{Note: "true"}
	w.start(t, "before", nil, rm)
	w.start(t, "other", rm, nil)
	w.start(t, "after", nil, rm)
	w.start(t, "runs", nil, rm)
	kill := func(id container.ID) {
		t.Helper()
		if err := w.tasks.Kill(t.Context(), id, "", 9, true); err != nil {
			t.Fatal(err)
		}
		if _, err := w.tasks.Wait(t.Context(), id, ""); err != nil {
			t.Fatal(err)
		}
	}
	until := func(id container.ID) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			if gone, _ := w.state(t, id); gone {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s is still there", id)
			}
		}
	}
	kill("before")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- New(w, w, bus, w.logs, slog.New(slog.DiscardHandler)).Run(ctx) }()
	until("before")
	kill("other")
	kill("after")
	until("after")
	for _, id := range []container.ID{"other", "runs"} {
		if _, all := w.state(t, id); !all {
			t.Errorf("something of %s is gone", id)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
