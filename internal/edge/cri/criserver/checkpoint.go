package criserver

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// noOptions refuses the options of a checkpoint: no runtime handler has any.
func noOptions(options map[string]string) error {
	for k := range options {
		return fmt.Errorf("options: %.80q is not known: %w", k, errdefs.ErrInvalidArgument)
	}
	return nil
}

// CheckpointPod writes the state of a pod's containers.
func (s *Server) CheckpointPod(ctx context.Context, r *runtime.CheckpointPodRequest) (*runtime.CheckpointPodResponse, error) {
	if err := noOptions(r.GetOptions()); err != nil {
		return nil, err
	}
	return &runtime.CheckpointPodResponse{}, s.d.Pods.Checkpoint(ctx, r.GetPodSandboxId(), r.GetOutputPath(), r.GetContainerIds())
}

// RestorePod makes a pod and its containers of such a state.
func (s *Server) RestorePod(ctx context.Context, r *runtime.RestorePodRequest) (*runtime.RestorePodResponse, error) {
	if err := noOptions(r.GetOptions()); err != nil {
		return nil, err
	}
	if err := checkPod(r.GetConfig()); err != nil {
		return nil, err
	}
	if len(r.GetContainerConfigs()) == 0 {
		return nil, missing("container_configs")
	}
	for i, c := range r.ContainerConfigs {
		if err := checkContainer(c); err != nil {
			return nil, fmt.Errorf("container_configs[%d]: %w", i, err)
		}
	}
	id, all, err := s.d.Pods.Restore(ctx, r.GetCheckpointPath(), r.Config, r.GetRuntimeHandler(), r.ContainerConfigs)
	return &runtime.RestorePodResponse{PodSandboxId: id, RestoredContainers: all}, err
}
