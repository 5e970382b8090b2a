//go:build linux

package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// What only a host with cgroup v2 or AppArmor shows; test/vm has one.

func needsUnified(t *testing.T) {
	t.Helper()
	if !cgroup2() {
		t.Skip("cgroup v2 is needed; make vm runs this in a guest")
	}
}

// The default profile confines: what its rules deny is denied also to who has
// all capabilities for it.
//
// contract: 7.3.5, 10.6
func TestAppArmorConfines(t *testing.T) {
	if b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || !strings.HasPrefix(string(b), "Y") {
		t.Skip("AppArmor is needed; make vm runs this in a guest")
	}
	const name = "cri-containerd.apparmor.d (enforce)\n"
	profile := func(kind runtime.SecurityProfile_ProfileType, ref string) func(*runtime.ContainerConfig) {
		return secure(func(s *runtime.LinuxContainerSecurityContext) {
			s.Apparmor = &runtime.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
		})
	}
	admin := secure(func(s *runtime.LinuxContainerSecurityContext) {
		s.Capabilities = &runtime.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
		s.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
	})
	const script = "cat /proc/self/attr/current; mount -t tmpfs none /mnt 2>/dev/null && echo mounted; true"
	mnt := func(c *runtime.ContainerConfig) {
		c.Command[2] = "mkdir -p /mnt; " + c.Command[2]
	}
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		if out := p.Output(script, admin, mnt); out != name {
			t.Errorf("by default: %q", out)
		}
		if out := p.Output(script, profile(runtime.SecurityProfile_Unconfined, ""), admin, mnt); out != "unconfined\nmounted\n" {
			t.Errorf("unconfined: %q", out)
		}
		if out := p.Output(script, profile(runtime.SecurityProfile_Localhost, "cri-containerd.apparmor.d"), admin, mnt); out != name {
			t.Errorf("by name: %q", out)
		}
		refused(t, p, "unknown profile", profile(runtime.SecurityProfile_Localhost, "no-such-profile"), codes.NotFound)
		c := p.Run("sleep 1000")
		if out := c.Exec("cat /proc/self/attr/current"); out != name {
			t.Errorf("exec: %q", out)
		}
		// The shim, which is not confined, can end it.
		c.Stop(0)
	})
}

// Limits that only v2 has, by their files, and pressure in the statistics.
//
// contract: 7.3.13, 7.1.20, 9.2.1
func TestUnifiedLimits(t *testing.T) {
	needsUnified(t)
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run("while :; do :; done", resources(&runtime.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 20000, CpuShares: 512, MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 80 << 20,
			Unified: map[string]string{"memory.low": "8388608", "pids.max": "77"}}))
		dir := cgroupDir(t, c, "")
		check := func(limits map[string]string) {
			t.Helper()
			inside := c.Exec("cd /sys/fs/cgroup; grep . memory.max memory.swap.max memory.low pids.max cpu.max")
			for file, want := range limits {
				b, err := os.ReadFile(filepath.Join(dir, file))
				if got := strings.TrimSpace(string(b)); err != nil || got != want {
					t.Errorf("%s is %q, want %q: %v", file, got, want, err)
				}
				if !strings.Contains(inside, file+":"+want+"\n") {
					t.Errorf("inside, %s is not %q: %s", file, want, inside)
				}
			}
		}
		check(map[string]string{"memory.max": "67108864", "memory.swap.max": "16777216", "memory.low": "8388608", "pids.max": "77", "cpu.max": "20000 100000"})
		if _, err := c.RT.UpdateContainerResources(critest.Context(t), &runtime.UpdateContainerResourcesRequest{ContainerId: c.ID, Linux: &runtime.LinuxContainerResources{
			MemoryLimitInBytes: 96 << 20, MemorySwapLimitInBytes: 104 << 20, Unified: map[string]string{"memory.low": "4194304"}}}); err != nil {
			t.Errorf("update: %v", err)
		}
		check(map[string]string{"memory.max": "100663296", "memory.swap.max": "8388608", "memory.low": "4194304", "pids.max": "77", "cpu.max": "20000 100000"})
		// Without a group's end for lack of memory, the shell outlives its child.
		g := p.Run(eatMemory+"; exit 0", resources(&runtime.LinuxContainerResources{MemoryLimitInBytes: 32 << 20, Unified: map[string]string{"memory.oom.group": "1"}}))
		if st := g.Wait(); st.Reason != "OOMKilled" || st.ExitCode != 137 {
			t.Errorf("out of memory as a group: %v", st)
		}
		critest.Eventually(t, "pressure of a throttled container", func() bool {
			r, err := c.RT.ContainerStats(critest.Context(t), &runtime.ContainerStatsRequest{ContainerId: c.ID})
			if err != nil {
				t.Fatal(err)
			}
			s := r.Stats
			if s.Memory.GetWorkingSetBytes().GetValue() == 0 || s.Cpu.GetUsageNanoCores() == nil || s.Memory.GetPsi() == nil || s.Io.GetPsi() == nil {
				t.Fatalf("statistics: %v", s)
			}
			return s.Cpu.GetPsi().GetSome().GetTotal() > 0
		})
		pod, err := c.RT.PodSandboxStats(critest.Context(t), &runtime.PodSandboxStatsRequest{PodSandboxId: p.ID})
		if err != nil || pod.Stats.Linux.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || pod.Stats.Linux.GetProcess().GetProcessCount().GetValue() == 0 {
			t.Errorf("%v %v", pod, err)
		}
	})
}

// A container manages groups of its own where its handler allows it, and only
// below its own.
//
// contract: 7.3.14
func TestCgroupWritable(t *testing.T) {
	needsUnified(t)
	n := critest.Run(t, binDir, `
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.writable]
    runtime_type = 'io.containerd.runc.v2'
    sandboxer = 'pauseless'
    cgroup_writable = true
`)
	const script = "mkdir /sys/fs/cgroup/own && echo $$ > /sys/fs/cgroup/own/cgroup.procs && cat /proc/self/cgroup"
	if out := n.Pod(t, "writable").Output(script); out != "0::/own\n" {
		t.Errorf("%q", out)
	}
	c := n.Pod(t, "pauseless").Run(script)
	if st := c.Wait(); st.ExitCode == 0 {
		t.Errorf("without being allowed to: %s", c.Log())
	}
}

// An exec has a group of its own, which is killed as a whole when its caller
// gives up: what it has put into the background ends with it, also in another
// session.
//
// contract: 7.1.18
// promise: P17
func TestExecGroups(t *testing.T) {
	needsUnified(t)
	p := node(t).Pod(t, "pauseless")
	c := p.Run("sleep 1000")
	dir := cgroupDir(t, c, "")
	groups := func() []string {
		found, err := filepath.Glob(dir + "/exec-*")
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	mark := fmt.Sprintf("4%09d", time.Now().UnixNano()%1e9)
	ctx, giveUp := context.WithCancel(critest.Context(t))
	defer giveUp()
	done := make(chan error, 1)
	go func() {
		_, err := c.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"/bin/sh", "-c",
			strings.ReplaceAll("setsid sleep MARK & (setsid sh -c 'sleep MARK & sleep MARK' &); trap '' TERM; sleep MARK", "MARK", mark)}})
		done <- err
	}()
	critest.Eventually(t, "processes in the group of the exec", func() bool {
		found := groups()
		if len(found) != 1 {
			return false
		}
		b, err := os.ReadFile(found[0] + "/cgroup.procs")
		return err == nil && len(strings.Fields(string(b))) >= 4 && running("sleep "+mark) >= 4
	})
	giveUp()
	if err := <-done; status.Code(err) != codes.Canceled {
		t.Errorf("%v", err)
	}
	critest.Eventually(t, "the end of all that it started", func() bool { return running("sleep "+mark) == 0 })
	critest.Eventually(t, "the end of its group", func() bool { return len(groups()) == 0 })
	isState(t, c, runtime.ContainerState_CONTAINER_RUNNING)
}
