package cripod

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

// Info is what a verbose status tells, as JSON below "info": containerd's
// field names, which people's scripts read.
func (s *Service) Info(ctx context.Context, id string) (map[string]string, error) {
	p, err := s.Pods.Get(id)
	if err != nil {
		return nil, fmt.Errorf("info of pod sandbox: %w", err)
	}
	m, st := p.Meta(), p.Status()
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	v, err := s.Views.In(cristate.Namespace, "")
	if err != nil {
		return nil, err
	}
	record, err := v.Sandboxes().Get(ctx, m.ID)
	if err != nil {
		return nil, fmt.Errorf("info of pod sandbox %s: %w", m.ID, err)
	}
	type info struct {
		Pid                uint32                    `json:"pid"`
		Status             string                    `json:"processStatus"`
		NetNamespaceClosed bool                      `json:"netNamespaceClosed"`
		Image              string                    `json:"image"`
		SnapshotKey        string                    `json:"snapshotKey"`
		Snapshotter        string                    `json:"snapshotter"`
		RuntimeHandler     string                    `json:"runtimeHandler"`
		RuntimeType        string                    `json:"runtimeType"`
		Sandboxer          string                    `json:"sandboxer"`
		Namespaces         map[string]string         `json:"namespaces,omitempty"`
		Config             *runtime.PodSandboxConfig `json:"config"`
		Spec               json.RawMessage           `json:"runtimeSpec,omitempty"`
		CNIResult          json.RawMessage           `json:"cniResult,omitempty"`
		Metadata           cristate.PodMeta          `json:"sandboxMetadata"`
	}
	x := info{Pid: st.Pid, Status: "unknown", NetNamespaceClosed: m.NetNSPath != "" && !nspin.Pinned(m.NetNSPath), RuntimeHandler: m.RuntimeHandler, RuntimeType: record.Runtime.Name,
		Sandboxer: st.Sandboxer, Namespaces: st.Namespaces, Config: m.Config, CNIResult: m.CNIResult, Metadata: m}
	if json.Valid(record.Spec.Value) {
		x.Spec = record.Spec.Value
	}
	out := map[string]string{}
	if ctrl, err := s.controller(st.Sandboxer); err == nil {
		if now, err := ctrl.Status(ctx, m.ID, true); err == nil {
			if x.Status = "deleted"; now.State == sandbox.StateReady {
				x.Status = "running"
			}
			maps.Copy(out, now.Info)
			for name, field := range map[string]*string{"image": &x.Image, "snapshotKey": &x.SnapshotKey, "snapshotter": &x.Snapshotter} {
				*field = out[name]
				delete(out, name)
			}
		}
	}
	b, err := json.Marshal(x)
	if err != nil {
		return nil, fmt.Errorf("info of pod sandbox %s: %w", m.ID, err)
	}
	out["info"] = string(b)
	return out, nil
}
