package cripod

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/sandbox/sandboxtest"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/boltmeta"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/engine/native"
	"github.com/gantryd/gantry/internal/lib/fault"
)

// contract: 1.3.30, 5.6.7
func TestControllers(t *testing.T) {
	for _, sandboxer := range sandboxers {
		t.Run(sandboxer, func(t *testing.T) {
			sandboxtest.RunController(t, sandboxtest.ControllerOptions{Runtime: container.Runtime{Name: "io.containerd.runc.v2"}, Open: func(t *testing.T) sandbox.Controller {
				w := inMemory(t)
				w.up(nil)
				return w.broken[sandboxer].Controller
			}})
		})
	}
}

// onDisk gives the node stores that outlive a process; tasks do not.
func onDisk(t testing.TB, dir string) (w *world, closeStores func()) {
	w = newWorld(t, dir)
	blobs, err := blobdir.Open(filepath.Join(dir, "content"), blobdir.Options{})
	check(t, err)
	snapshots, err := native.Open(filepath.Join(dir, "native"), native.Config{}, nil)
	check(t, err)
	bus := memory.NewBus()
	db, err := boltmeta.Open(filepath.Join(dir, "meta.db"), boltmeta.Options{Content: blobs, Snapshotters: map[string]snapshot.Store{"native": snapshots}, Events: bus, OpenTimeout: 10 * time.Second})
	check(t, err)
	records, err := db.In(cristate.Namespace, "")
	check(t, err)
	w.tasks = memory.NewTasks(cristate.Namespace, records.Containers(), bus)
	w.src = view.Join(db, func(view.Records) view.Services { return view.Services{Tasks: w.tasks} })
	return w, func() {
		if p := db.Check(context.Background()); len(p) != 0 {
			t.Errorf("the store is not consistent: %v", p)
		}
		check(t, errors.Join(db.Close(), snapshots.Close()))
	}
}

// victim is the environment of the process that dies.
const victim = "CRIPOD_VICTIM"

// TestVictim runs a pod, and removes it, in a process that dies on the way.
func TestVictim(t *testing.T) {
	dir, rest, ok := strings.Cut(os.Getenv(victim), "|")
	if !ok {
		t.Skip("is started by TestKill")
	}
	sandboxer, point, _ := strings.Cut(rest, "|")
	w, _ := onDisk(t, dir)
	points, err := fault.Parse(point+":1", fault.Kill)
	check(t, err)
	s := w.up(points)
	id := must[string](t)(s.Run(t.Context(), config(1), handler(sandboxer)))
	check(t, s.Remove(t.Context(), id))
	t.Fatalf("%s was never passed", point)
}

// After a kill at any point nothing is left of a pod that was being made, one
// that is complete is found as it is, and the name can be used.
//
// contract: 7.3.30
// promise: P5
func TestKill(t *testing.T) {
	var points []string
	for _, s := range steps {
		points = append(points, "pod after "+s)
	}
	points = append(points, "pod before write the record", "pod before teardown", "pod after teardown")
	for _, s := range []string{"shut the sandbox down", "disconnect it", "remove its directories", "end its lease"} {
		points = append(points, "pod after "+s)
	}
	for _, sandboxer := range sandboxers {
		for _, point := range points {
			t.Run(sandboxer+" "+point, func(t *testing.T) {
				dir, err := os.MkdirTemp("", "g")
				check(t, err)
				t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestVictim$")
				cmd.Env = append(os.Environ(), victim+"="+dir+"|"+sandboxer+"|"+point)
				out, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
					t.Fatalf("%v: %s", err, out)
				}
				w, closeStores := onDisk(t, dir)
				defer closeStores()
				s := w.up(nil)
				check(t, s.Recover(ctx))
				all := s.Pods.List()
				switch {
				case !complete(point) && len(all) != 0:
					t.Errorf("there is %+v", all[0].Meta())
				case point == "pod after complete the record":
					if len(all) != 1 || (all[0].Status().State == cristate.PodReady) != (sandboxer == cristate.SandboxerPauseless) || all[0].Meta().IP == "" {
						t.Errorf("complete pods: %v", all)
					}
					check(t, s.Remove(ctx, all[0].ID()))
				case len(all) == 1: // its removal was under way
					if a := all[0].Item(); a.State != runtime.PodSandboxState_SANDBOX_NOTREADY {
						t.Errorf("%v", a)
					}
					check(t, s.Stop(ctx, all[0].ID()))
					check(t, s.Remove(ctx, all[0].ID()))
				}
				w.clean()
				id := must[string](t)(s.Run(ctx, config(1), handler(sandboxer)))
				check(t, s.Remove(ctx, id))
				w.clean()
			})
		}
	}
}

// complete says whether the pod's record was complete at the point.
func complete(point string) bool {
	for _, s := range steps[:len(steps)-1] {
		if point == "pod after "+s {
			return false
		}
	}
	return point != "pod before write the record"
}
