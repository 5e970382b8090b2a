//go:build linux

package cri

import (
	"encoding/json"
	"slices"
	"syscall"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// listed waits until the daemon answers, and returns its pods.
func listed(t *testing.T, n *critest.Node) (pods []*runtime.PodSandbox) {
	t.Helper()
	critest.Eventually(t, "an answer", func() bool {
		l, err := n.RT.ListPodSandbox(critest.Context(t), &runtime.ListPodSandboxRequest{})
		pods = l.GetItems()
		return err == nil
	})
	return pods
}

// A daemon that is killed finds its pods again, in the state that the kernel
// has them in.
//
// contract: 7.3.30, 5.6.7
func TestPodsAfterKill(t *testing.T) {
	n := critest.Run(t, binDir, "")
	kept, pauseless, dead := n.Pod(t, "runc"), n.Pod(t, "pauseless"), n.Pod(t, "runc")
	running := pauseless.Run("sleep 1000")
	ips := map[string]string{}
	for _, p := range []*critest.Pod{kept, pauseless, dead} {
		ips[p.ID] = p.Status().Status.Network.Ip
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(dead.Status().Info["info"]), &info); err != nil || info.Pid < 2 {
		t.Fatal(err, info)
	}
	n.Kill()
	if err := syscall.Kill(info.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	if l := listed(t, n); len(l) != 3 {
		t.Errorf("%v", l)
	}
	for p, want := range map[*critest.Pod]runtime.PodSandboxState{kept: runtime.PodSandboxState_SANDBOX_READY, pauseless: runtime.PodSandboxState_SANDBOX_READY, dead: runtime.PodSandboxState_SANDBOX_NOTREADY} {
		if st := p.Status().Status; st.State != want || st.Network.Ip != ips[p.ID] || st.Network.Ip == "" {
			t.Errorf("%s, want %s: %v", st.State, want, st)
		}
	}
	if st := running.Status(); st.State != runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%v", st)
	}
	for _, p := range []*critest.Pod{kept, pauseless} {
		if out := p.Output("echo hello"); out != "hello\n" {
			t.Errorf("%q", out)
		}
	}
}

// A kill at any step of making or removing a pod leaves nothing of it after the
// next start, and its name is free.
//
// contract: 7.3.30
// promise: P5, P22
func TestPodKilledOnTheWay(t *testing.T) {
	n := critest.Run(t, binDir, "")
	neighbour := n.Pod(t, "runc")
	addresses := n.Addresses()
	for _, step := range []string{"write the record", "make directories", "make namespaces", "set up the network", "create the sandbox", "start the sandbox",
		"shut the sandbox down", "teardown", "end its lease"} {
		for _, handler := range []string{"runc", "pauseless"} {
			t.Run(step+" "+handler, func(t *testing.T) {
				n.Kill()
				if err := n.Start("GANTRY_FAULT=pod after " + step + ":1"); err != nil {
					t.Fatal(err)
				}
				listed(t, n)
				c := n.PodConfig(t)
				r, err := n.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: handler})
				if err == nil {
					_, err = n.RT.RemovePodSandbox(critest.Context(t), &runtime.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId})
				}
				if err == nil {
					t.Fatal("it was not killed")
				}
				n.Kill()
				if err := n.Start(); err != nil {
					t.Fatal(err)
				}
				for _, p := range listed(t, n) {
					if p.Id == neighbour.ID {
						continue
					}
					// It is being taken away; on a busy machine clients are told before it is gone.
					if p.State != runtime.PodSandboxState_SANDBOX_NOTREADY || r != nil && p.Id != r.PodSandboxId {
						t.Errorf("there is %v", p)
					}
					if r == nil {
						critest.Eventually(t, "what was half made is gone", func() bool {
							return !slices.ContainsFunc(listed(t, n), func(l *runtime.PodSandbox) bool { return l.Id == p.Id })
						})
						continue
					}
					// Its removal had begun: the kubelet asks again.
					if _, err := n.RT.RemovePodSandbox(critest.Context(t), &runtime.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
						t.Error(err)
					}
				}
				if now := n.Addresses(); !slices.Equal(now, addresses) {
					t.Errorf("addresses %v, before %v", now, addresses)
				}
				again, err := n.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: handler})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := n.RT.RemovePodSandbox(critest.Context(t), &runtime.RemovePodSandboxRequest{PodSandboxId: again.PodSandboxId}); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
