package main

import (
	"context"
	"errors"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/prometheus/client_golang/prometheus"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cricontainer"
	"github.com/gantryd/gantry/internal/edge/cri/cripod"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/nri"
	"github.com/gantryd/gantry/internal/lib/plugin"
)

const typeNRI = "io.containerd.nri.v1"

// openNRI builds the host of NRI's plugins, and shows it to pods and to
// containers; all are nil if it is disabled. The service of containers is made
// after it, and before anything is asked.
func openNRI(ctx context.Context, host *plugin.Host, config cristate.RuntimeConfig, metrics prometheus.Registerer, pods *cristate.Index[*cristate.Pod], containers *cristate.Index[*cristate.Container],
	service func() *cricontainer.Service) (*nri.Host, cripod.NRI, cricontainer.NRI, error) {
	h, err := plugin.Open(ctx, host, plugin.New(typeNRI, "nri", nri.DefaultConfig(), func(_ context.Context, env *plugin.Env, c nri.Config) (*nri.Host, error) {
		if c.Disable {
			return nil, plugin.Skip("its configuration disables it")
		}
		return nri.New(nri.Deps{Config: c, Pods: pods, Containers: containers, CDI: cdiDevices(config), Version: version, Metrics: metrics, Log: env.Log,
			Spec: func(ctx context.Context, id string) (*specs.Spec, error) { return service().Spec(ctx, id) },
			Adjust: func(ctx context.Context, id string, res *runtime.LinuxContainerResources) error {
				return service().Adjust(ctx, id, res)
			},
			Evict: func(ctx context.Context, id string) error { return service().Stop(ctx, id, 0) }}), nil
	}))
	if errors.Is(err, plugin.ErrDisabled) || errors.Is(err, plugin.ErrSkip) {
		return nil, nil, nil, nil
	}
	if err != nil {
		return nil, nil, nil, err
	}
	return h, h, h, nil
}
