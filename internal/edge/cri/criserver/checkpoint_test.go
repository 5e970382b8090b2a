package criserver

import (
	"context"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (w *world) Checkpoint(_ context.Context, id, dir string, containers []string) error {
	return w.call("checkpoint pod %s %s %q", id, dir, containers)
}

func (w *world) Restore(_ context.Context, dir string, c *runtime.PodSandboxConfig, handler string, containers []*runtime.ContainerConfig) (string, []*runtime.RestoredContainer, error) {
	return "new", []*runtime.RestoredContainer{{Name: containers[0].Metadata.Name, ContainerId: "x"}}, w.call("restore pod %s %s %s", dir, c.Metadata.Name, handler)
}

// Options are refused, and configurations looked at, before anything is done.
//
// contract: 7.1.23, 7.3.24
func TestPodCheckpoints(t *testing.T) {
	h := serve(t)
	options := map[string]string{"leave-running": "false"}
	if _, err := h.rt.CheckpointPod(h.ctx, &runtime.CheckpointPodRequest{PodSandboxId: "p", OutputPath: "/x", ContainerIds: []string{"a", "b"}}); err != nil {
		t.Error(err)
	}
	_, err := h.rt.CheckpointPod(h.ctx, &runtime.CheckpointPodRequest{PodSandboxId: "p", OutputPath: "/x", ContainerIds: []string{"a"}, Options: options})
	if !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	restore := func(change func(*runtime.RestorePodRequest)) (*runtime.RestorePodResponse, error) {
		r := &runtime.RestorePodRequest{CheckpointPath: "/x", RuntimeHandler: "runc", Config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: "n"}},
			ContainerConfigs: []*runtime.ContainerConfig{{Metadata: &runtime.ContainerMetadata{Name: "c"}, Image: &runtime.ImageSpec{Image: "i"}}}}
		change(r)
		return h.rt.RestorePod(h.ctx, r)
	}
	r, err := restore(func(*runtime.RestorePodRequest) {})
	if err != nil || r.PodSandboxId != "new" || len(r.RestoredContainers) != 1 || r.RestoredContainers[0].Name != "c" {
		t.Errorf("%v %v", r, err)
	}
	for name, change := range map[string]func(*runtime.RestorePodRequest){
		"options":       func(r *runtime.RestorePodRequest) { r.Options = options },
		"no pod":        func(r *runtime.RestorePodRequest) { r.Config = nil },
		"no containers": func(r *runtime.RestorePodRequest) { r.ContainerConfigs = nil },
		"no image":      func(r *runtime.RestorePodRequest) { r.ContainerConfigs[0].Image = nil },
		"no name":       func(r *runtime.RestorePodRequest) { r.ContainerConfigs[0].Metadata.Name = "" },
	} {
		if _, err := restore(change); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if want := []string{`checkpoint pod p /x ["a" "b"]`, "restore pod /x n runc"}; !slices.Equal(h.calls, want) {
		t.Errorf("%q", h.calls)
	}
}
