//go:build linux

package cri

import (
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// contract: 7.1.1, 7.1.2, 7.1.3
func TestRuntimeInfo(t *testing.T) {
	n := node(t)
	v, err := n.RT.Version(critest.Context(t), &runtime.VersionRequest{})
	if err != nil || v.RuntimeName != "containerd" || v.RuntimeApiVersion != "v1" || v.Version != "0.1.0" || v.RuntimeVersion == "" {
		t.Errorf("%v %v", v, err)
	}
	var st *runtime.StatusResponse
	critest.Eventually(t, "network", func() bool {
		st, err = n.RT.Status(critest.Context(t), &runtime.StatusRequest{Verbose: true})
		return err == nil && st.Status.Conditions[1].Status
	})
	for i, name := range []string{"RuntimeReady", "NetworkReady", "ContainerdHasNoDeprecationWarnings"} {
		if c := st.Status.Conditions[i]; c.Type != name || !c.Status {
			t.Errorf("%v", c)
		}
	}
	var names []string
	for _, h := range st.RuntimeHandlers {
		names = append(names, h.Name)
	}
	if strings.Join(names, ",") != ",crun,pauseless,runc" || !st.RuntimeHandlers[0].Features.RecursiveReadOnlyMounts || !st.Features.SupplementalGroupsPolicy {
		t.Errorf("handlers %q: %v", names, st)
	}
	for _, key := range []string{"config", "golang", "cniconfig", "lastCNILoadStatus"} {
		if st.Info[key] == "" {
			t.Errorf("no %s in %v", key, st.Info)
		}
	}
	c, err := n.RT.RuntimeConfig(critest.Context(t), &runtime.RuntimeConfigRequest{})
	if err != nil || c.Linux.CgroupDriver != runtime.CgroupDriver_CGROUPFS {
		t.Errorf("%v %v", c, err)
	}
}

// contract: 7.1.5, 7.1.11, 7.1.12, 7.1.15
func TestHello(t *testing.T) {
	n := node(t)
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			p := n.Pod(t, handler)
			if out := p.Output("echo hello $HOSTNAME; hostname"); out != "hello\nhost-of-pod\n" && out != "hello host-of-pod\nhost-of-pod\n" {
				t.Errorf("%q", out)
			}
		})
	}
}
