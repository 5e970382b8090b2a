package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/term"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/view"
)

// What Kubernetes' part of a daemon notes on its containers (contract 1.5.21, 7.3.28).
const (
	noteKubernetes    = "io.cri-containerd.container.metadata"
	annotationKind    = "io.kubernetes.cri.container-type"
	annotationPod     = "io.kubernetes.cri.sandbox-name"
	annotationPodNS   = "io.kubernetes.cri.sandbox-namespace"
	annotationInPod   = "io.kubernetes.cri.container-name"
	annotationImage   = "io.kubernetes.cri.image-name"
	kubernetesSandbox = "sandbox"
)

// kubernetesName is what Kubernetes calls a container. A pause container is
// the pod itself and has no name of its own.
type kubernetesName struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	Container string `json:"container,omitempty"`
	Pause     bool   `json:"pause,omitempty"`
}

// String is what ps shows and find understands.
func (k *kubernetesName) String() string {
	switch {
	case k == nil:
		return ""
	case k.Pause:
		return printable(k.Namespace + "/" + k.Pod + " (pause)")
	}
	return printable(k.Namespace + "/" + k.Pod + "/" + k.Container)
}

// kubernetesOf reads the name from a specification, nil if it has none.
func kubernetesOf(spec *specs.Spec) *kubernetesName {
	n := spec.Annotations
	if n[annotationKind] == "" || n[annotationPod] == "" {
		return nil
	}
	return &kubernetesName{Namespace: n[annotationPodNS], Pod: n[annotationPod], Container: n[annotationInPod], Pause: n[annotationKind] == kubernetesSandbox}
}

// findKubernetes looks for NAMESPACE/POD/CONTAINER; of several attempts it
// takes the newest.
func findKubernetes(ctx context.Context, v view.View, ref string) (found container.Container, ok bool, err error) {
	if strings.Count(ref, "/") != 2 {
		return found, false, nil
	}
	err = v.Containers().Walk(ctx, func(c container.Container) error {
		if spec, err := client.Spec(c); err == nil {
			if k := kubernetesOf(spec); k != nil && !k.Pause && k.String() == ref && (!ok || c.CreatedAt.After(found.CreatedAt)) {
				found, ok = c, true
			}
		}
		return nil
	})
	return found, ok, err
}

// kubernetesLog is where the output of a pod's container is kept, also after
// its end, "" if it is none or keeps nothing.
func kubernetesLog(c container.Container) string {
	x, ok := c.Extensions[noteKubernetes]
	if !ok {
		return ""
	}
	var m struct{ Metadata struct{ LogPath string } }
	if json.Unmarshal(x.Value, &m) != nil || !filepath.IsAbs(m.Metadata.LogPath) {
		return ""
	}
	return m.Metadata.LogPath
}

// kubernetesEnds fills in how containers of pods have ended, and that pods have
// stopped: their tasks are gone then, and only the CRI knows. A daemon without it
// says nothing.
func (a *app) kubernetesEnds(ctx context.Context, rows []containerRow) error {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(podAsks)
	rt := runtime.NewRuntimeServiceClient(a.client.Conn())
	for i := range rows {
		r := &rows[i]
		if r.Kubernetes == nil || r.Status != "created" {
			continue
		}
		g.Go(func() error {
			if r.Kubernetes.Pause {
				answer, err := rt.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: string(r.ID)})
				if err == nil && answer.GetStatus().GetState() == runtime.PodSandboxState_SANDBOX_NOTREADY {
					r.Status = "exited"
				}
				return unlessAbsent(err)
			}
			answer, err := rt.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: string(r.ID)})
			if st := answer.GetStatus(); err == nil && st.GetState() == runtime.ContainerState_CONTAINER_EXITED {
				code, at := uint32(st.GetExitCode()), time.Unix(0, st.GetFinishedAt())
				r.Status, r.ExitCode, r.ExitedAt = "exited", &code, &at
			}
			return unlessAbsent(err)
		})
	}
	return g.Wait()
}

// unlessAbsent drops the error of a daemon that has no CRI, or whose CRI does not
// know what was asked about.
func unlessAbsent(err error) error {
	if errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err) || errdefs.IsUnavailable(err) {
		return nil
	}
	return err
}

// errFound ends a walk that has seen enough.
var errFound = errors.New("found")

// elsewhere tells somebody who looks at an empty list on a terminal which
// other namespaces have something to show: pods are in k8s.io, for example.
func (a *app) elsewhere(ctx context.Context, command string, has func(context.Context, view.View) bool) {
	if a.all || a.format == "json" || !term.IsTerminal(int(a.out.Fd())) {
		return
	}
	// The hint is worth a moment, not more.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	list, err := a.client.Namespaces().List(ctx)
	if err != nil {
		return
	}
	for _, ns := range list {
		if v, err := a.client.In(ns.ID, ""); string(ns.ID) != a.namespace && err == nil && has(ctx, v) {
			fmt.Fprintf(a.err, "hint: namespace %s has some: gantry -n %s %s, or gantry %s -A\n", ns.ID, ns.ID, command, command)
			return
		}
	}
}

func hasContainers(ctx context.Context, v view.View) bool {
	return errors.Is(v.Containers().Walk(ctx, func(container.Container) error { return errFound }), errFound)
}

func hasImages(ctx context.Context, v view.View) bool {
	list, err := v.Images().List(ctx)
	return err == nil && len(list) > 0
}
