package cripod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/attempt"
)

func (c *fakeContainers) CheckpointPod(_ context.Context, podID string, _ []string, to *os.Root, p cristate.PodCheckpoint) error {
	p.Containers = map[string]string{"a": "container-0.tar"}
	if err := c.tell("checkpoint", podID); err != nil {
		return err
	}
	return p.Write(to)
}

func (c *fakeContainers) RestorePod(_ context.Context, _ *attempt.Stage, pod *cristate.Pod, _ *os.Root, _ cristate.PodCheckpoint, _ []*runtime.ContainerConfig) error {
	return c.tell("restore", pod.ID())
}

// late is containers during whose restoration the caller goes away.
type late struct {
	*fakeContainers
	leave func()
}

func (l late) RestorePod(ctx context.Context, _ *attempt.Stage, pod *cristate.Pod, _ *os.Root, _ cristate.PodCheckpoint, _ []*runtime.ContainerConfig) error {
	l.leave()
	<-ctx.Done()
	return errors.Join(l.tell("restore", pod.ID()), ctx.Err())
}

func (c *fakeContainers) Restored(podID, _ string, _ []*runtime.ContainerConfig) ([]*runtime.RestoredContainer, error) {
	return []*runtime.RestoredContainer{{Name: "a", ContainerId: "of " + podID}}, nil
}

// A checkpoint goes to an empty directory, and is of a pod that is ready.
//
// contract: 7.1.23
func TestCheckpoint(t *testing.T) {
	w := inMemory(t)
	s := w.up(nil)
	dir := t.TempDir()
	id := must[string](t)(s.Run(t.Context(), config(1), handler(cristate.SandboxerPauseless)))
	for name, tt := range map[string]struct {
		id, dir string
		want    func(error) bool
	}{
		"unknown":   {"nobody", dir, errdefs.IsNotFound},
		"relative":  {id, "x", errdefs.IsInvalidArgument},
		"missing":   {id, dir + "/x", errdefs.IsInvalidArgument},
		"a file":    {id, "/etc/passwd", errdefs.IsInvalidArgument},
		"not empty": {id, filepath.Dir(dir), errdefs.IsInvalidArgument},
	} {
		if err := s.Checkpoint(t.Context(), tt.id, tt.dir, []string{"c"}); !tt.want(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	check(t, s.Checkpoint(t.Context(), id, dir, []string{"c"}))
	root := must[*os.Root](t)(os.OpenRoot(dir))
	defer root.Close()
	if p := must[cristate.PodCheckpoint](t)(cristate.ReadPodCheckpoint(root)); p.Pod.GetMetadata().GetName() != "pod1" || p.Runtime != "io.containerd.runc.v2" || p.CreatedAt.IsZero() {
		t.Errorf("%+v", p)
	}
	check(t, s.Stop(t.Context(), id))
	if err := s.Checkpoint(t.Context(), id, t.TempDir(), []string{"c"}); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	s.Config.EnableCRIU = false
	if err := s.Checkpoint(t.Context(), id, t.TempDir(), []string{"c"}); !errdefs.IsNotImplemented(err) {
		t.Error(err)
	}
	if _, _, err := s.Restore(t.Context(), dir, config(2), "", nil); !errdefs.IsNotImplemented(err) {
		t.Error(err)
	}
	check(t, s.Remove(t.Context(), id))
	w.clean()
}

// A pod is restored as often as it is asked for once, and nothing is left of one
// that fails, also when the caller's time is up.
//
// contract: 7.3.24
// promise: P5
func TestRestore(t *testing.T) {
	w := inMemory(t)
	s := w.up(nil)
	dir := t.TempDir()
	h := handler(cristate.SandboxerPauseless)
	root := must[*os.Root](t)(os.OpenRoot(dir))
	defer root.Close()
	check(t, cristate.PodCheckpoint{Runtime: "io.containerd.runc.v2", Containers: map[string]string{"a": "a.tar", "b": "b.tar"}}.Write(root))
	named := func(names ...string) (out []*runtime.ContainerConfig) {
		for _, n := range names {
			out = append(out, &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: n}})
		}
		return out
	}
	for name, tt := range map[string]struct {
		dir, handler string
		configs      []*runtime.ContainerConfig
		want         func(error) bool
	}{
		"relative":        {"x", h, named("a", "b"), errdefs.IsInvalidArgument},
		"no checkpoint":   {t.TempDir(), h, named("a", "b"), errdefs.IsInvalidArgument},
		"unknown handler": {dir, "nobody", named("a", "b"), errdefs.IsNotFound},
		"one is missing":  {dir, h, named("a"), errdefs.IsInvalidArgument},
		"one too many":    {dir, h, named("a", "b", "c"), errdefs.IsInvalidArgument},
		"twice":           {dir, h, named("a", "a"), errdefs.IsInvalidArgument},
	} {
		if _, _, err := s.Restore(t.Context(), tt.dir, config(1), tt.handler, tt.configs); !tt.want(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := s.Config.Containerd.Runtimes["runc"]
	other.Options = map[string]any{"BinaryName": "crun"}
	s.Config.Containerd.Runtimes["other"] = other
	if _, _, err := s.Restore(t.Context(), dir, config(1), "other", named("a", "b")); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	w.clean()

	id, all, err := s.Restore(t.Context(), dir, config(1), h, named("a", "b"))
	check(t, err)
	again, _, err := s.Restore(t.Context(), dir, config(1), h, named("a", "b"))
	check(t, err)
	if again != id || len(all) != 1 || all[0].ContainerId != "of "+id || !slices.Equal(w.containers.told, []string{"restore " + id}) {
		t.Errorf("%s and %s: %v %q", id, again, all, w.containers.told)
	}
	check(t, s.Remove(t.Context(), id))

	w.containers.told, w.containers.err = nil, errors.New("broken")
	_, _, err = s.Restore(t.Context(), dir, config(1), h, named("a", "b"))
	if err == nil || !strings.Contains(err.Error(), "restore its containers") || !strings.Contains(err.Error(), "broken") {
		t.Error(err)
	}
	w.containers.mu.Lock()
	w.containers.err = nil
	w.containers.mu.Unlock()
	for _, p := range s.Pods.List() { // it could not be taken back while all was broken
		check(t, s.Remove(t.Context(), p.ID()))
	}
	w.clean()

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.Deps.Containers = late{w.containers, cancel}
	w.containers.told = nil
	_, _, err = s.Restore(ctx, dir, config(1), h, named("a", "b"))
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "restore its containers") {
		t.Error(err)
	}
	if len(s.Pods.List()) > 0 || len(w.containers.told) != 2 || !strings.HasPrefix(w.containers.told[1], "remove ") {
		t.Errorf("when it returns there is %v, told %q", s.Pods.List(), w.containers.told)
	}
	w.clean()
}
