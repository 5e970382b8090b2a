//go:build linux

package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

func resources(r *runtime.LinuxContainerResources) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) { c.Linux.Resources = r }
}

func cgroup2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// hasController says whether cgroups here can limit something.
func hasController(t *testing.T, name string) bool {
	t.Helper()
	if cgroup2() {
		b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(strings.Fields(string(b)), name)
	}
	_, err := os.Stat("/sys/fs/cgroup/" + name)
	return err == nil
}

// oomScore is the adjustment of a process.
func oomScore(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
	if err != nil {
		t.Fatal(err)
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return score
}

// cgroupDir is where the kernel says a container is.
func cgroupDir(t *testing.T, c *critest.Container, controller string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", containerPid(t, c)))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if cgroup2() && f[0] == "0" {
			return filepath.Join("/sys/fs/cgroup", f[2])
		}
		if slices.Contains(strings.Split(f[1], ","), controller) {
			return filepath.Join("/sys/fs/cgroup", controller, f[2])
		}
	}
	t.Fatalf("no %s in %s", controller, b)
	return ""
}

// limits are files of a container's cgroup, of either version.
func limits(t *testing.T, c *critest.Container) map[string]string {
	t.Helper()
	files := map[string][2]string{"quota": {"cpu", "cpu.cfs_quota_us"}, "period": {"cpu", "cpu.cfs_period_us"}, "shares": {"cpu", "cpu.shares"}, "cpus": {"cpuset", "cpuset.cpus"},
		"memory": {"memory", "memory.limit_in_bytes"}, "swap": {"memory", "memory.memsw.limit_in_bytes"}}
	if cgroup2() {
		files = map[string][2]string{"quota": {"cpu", "cpu.max"}, "cpus": {"cpuset", "cpuset.cpus"}, "memory": {"memory", "memory.max"}, "swap": {"memory", "memory.swap.max"}}
	}
	out := map[string]string{}
	for key, f := range files {
		b, err := os.ReadFile(filepath.Join(cgroupDir(t, c, f[0]), f[1]))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		out[key] = strings.TrimSpace(string(b))
	}
	if cgroup2() {
		out["quota"], out["period"], _ = strings.Cut(out["quota"], " ")
		if out["shares"] = ""; out["swap"] == "0" { // is counted apart from memory there
			out["swap"] = out["memory"]
		}
	}
	return out
}

// checkLimits compares limits as version 1 has them; what the host cannot limit
// is not there.
func checkLimits(t *testing.T, what string, c *critest.Container, want map[string]string) {
	t.Helper()
	got := limits(t, c)
	for key, w := range want {
		if g, ok := got[key]; ok && g != "" && g != w {
			t.Errorf("%s: %s is %s, want %s", what, key, g, w)
		}
	}
	if got["memory"] == "" || got["quota"] == "" {
		t.Errorf("%s: no limits in %v", what, got)
	}
}

// Limits are read where the kernel obeys them, when a container is made, and
// after updates of made and of running ones.
//
// contract: 7.3.13, 7.3.15, 7.3.16, 7.1.16
func TestResources(t *testing.T) {
	first := &runtime.LinuxContainerResources{CpuShares: 512, CpuQuota: 50000, CpuPeriod: 100000, CpusetCpus: "0", CpusetMems: "0", MemoryLimitInBytes: 64 << 20, OomScoreAdj: 500,
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 0}}}
	want := map[string]string{"shares": "512", "quota": "50000", "period": "100000", "cpus": "0", "memory": "67108864", "swap": "67108864"}
	second := &runtime.LinuxContainerResources{CpuShares: 256, CpuQuota: 20000, CpuPeriod: 50000, MemoryLimitInBytes: 128 << 20, MemorySwapLimitInBytes: 128 << 20}
	updated := map[string]string{"shares": "256", "quota": "20000", "period": "50000", "cpus": "0", "memory": "134217728", "swap": "134217728"}
	n := node(t)
	update := func(c *critest.Container, r *runtime.LinuxContainerResources) error {
		_, err := n.RT.UpdateContainerResources(critest.Context(t), &runtime.UpdateContainerResourcesRequest{ContainerId: c.ID, Linux: r})
		return err
	}
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run("cat /proc/self/oom_score_adj; sleep 600", resources(first))
		checkLimits(t, "made", c, want)
		critest.Eventually(t, "output", func() bool { return c.Log() != "" })
		if out := c.Log(); out != "500\n" {
			t.Errorf("OOM score adjustment %q", out)
		}
		if l := c.Status().Resources.GetLinux(); l.GetCpuShares() != 512 || l.GetMemoryLimitInBytes() != 64<<20 || l.GetOomScoreAdj() != 500 {
			t.Errorf("the status says %v", l)
		}
		if dir := cgroupDir(t, c, "memory"); !strings.HasSuffix(dir, "/"+n.Mark+"/"+c.ID) {
			t.Errorf("the cgroup is %s", dir)
		}
		if err := update(c, second); err != nil {
			t.Errorf("update: %v", err)
		}
		checkLimits(t, "updated", c, updated)
		if l := c.Status().Resources.GetLinux(); l.GetCpuShares() != 256 || l.GetMemoryLimitInBytes() != 128<<20 || l.GetCpusetCpus() != "0" {
			t.Errorf("after the update the status says %v", l)
		}
		// A refused update changes nothing.
		for what, r := range map[string]*runtime.LinuxContainerResources{
			"negative": {CpuShares: -5}, "swap below memory": {MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 1 << 20}, "no list": {CpusetCpus: "0-x"}, "no resources": nil,
		} {
			if err := update(c, r); status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s: %v", what, err)
			}
		}
		if err := update(c, &runtime.LinuxContainerResources{CpuShares: 333, CpusetCpus: "4000"}); err == nil {
			t.Error("processors that are not there were accepted")
		}
		checkLimits(t, "after refused updates", c, updated)

		d := p.Create("sleep 600", resources(first))
		if err := update(d, second); err != nil {
			t.Errorf("update what is not started: %v", err)
		}
		if _, err := n.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: d.ID}); err != nil {
			t.Fatal(err)
		}
		checkLimits(t, "updated before the start", d, updated)
		d.Stop(0)
		if err := update(d, second); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("update what has ended: %v", err)
		}
		unified := resources(&runtime.LinuxContainerResources{Unified: map[string]string{"pids.max": "99"}})
		if !cgroup2() {
			refused(t, p, "unified resources without version 2", unified, codes.FailedPrecondition)
			return
		}
		e := p.Run("sleep 600", unified)
		if b, err := os.ReadFile(cgroupDir(t, e, "pids") + "/pids.max"); err != nil || string(b) != "99\n" {
			t.Errorf("pids.max %q %v", b, err)
		}
		refused(t, p, "a path as unified resource", resources(&runtime.LinuxContainerResources{Unified: map[string]string{"../cgroup.procs": "0"}}), codes.InvalidArgument)
	})
}

// clamped is the score of a container that asks for less than the daemon has.
func clamped(t *testing.T, n *critest.Node, handler string) int {
	t.Helper()
	score := oomScore(t, n.Pid())
	if handler == "crun" && score == 0 { // which it does not set
		return 1 // the shim's
	}
	return score
}

// A score that this host refuses is that of the daemon instead.
//
// contract: 7.3.13
func TestOOMScore(t *testing.T) {
	n := node(t)
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		want := -500
		if ownCaps(t)&(1<<24) == 0 { // CAP_SYS_RESOURCE
			want = clamped(t, n, handlerOf(p))
		}
		if out := p.Output("cat /proc/self/oom_score_adj", resources(&runtime.LinuxContainerResources{OomScoreAdj: -500})); out != fmt.Sprintln(want) {
			t.Errorf("%q, want %d", out, want)
		}
		c := p.Create("cat /proc/self/oom_score_adj")
		if _, err := n.RT.UpdateContainerResources(critest.Context(t), &runtime.UpdateContainerResourcesRequest{ContainerId: c.ID, Linux: &runtime.LinuxContainerResources{OomScoreAdj: -500}}); err != nil {
			t.Fatal(err)
		}
		if _, err := n.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: c.ID}); err != nil {
			t.Fatal(err)
		}
		if c.Wait(); c.Log() != fmt.Sprintln(want) {
			t.Errorf("updated: %q, want %d", c.Log(), want)
		}
		refused(t, p, "no score", resources(&runtime.LinuxContainerResources{OomScoreAdj: 1 << 40}), codes.InvalidArgument)
	})
}

// eatMemory needs more than 32 MiB.
const eatMemory = "dd if=/dev/zero of=/dev/null bs=200M count=1 2>/dev/null"

// The reason of an end is OOMKilled if and only if the kernel killed something
// for lack of memory (promise P18): the first process, one below it, or one that
// was executed; not if somebody else killed it, and not for its neighbours.
//
// contract: 7.1.14
// promise: P18
func TestOOMKilled(t *testing.T) {
	limit := resources(&runtime.LinuxContainerResources{MemoryLimitInBytes: 32 << 20})
	check := func(t *testing.T, what string, c *critest.Container, reason string, code int32) {
		t.Helper()
		if st := c.Wait(); st.Reason != reason || st.ExitCode != code {
			t.Errorf("%s: reason %s, exit code %d, want %s, %d", what, st.Reason, st.ExitCode, reason, code)
		}
	}
	body := func(t *testing.T, p *critest.Pod) {
		neighbour := p.Run("sleep 600", limit)
		for range 3 {
			check(t, "first process", p.Run("exec "+eatMemory, limit), "OOMKilled", 137)
		}
		check(t, "child", p.Run(eatMemory+"; exit 3", limit), "OOMKilled", 3)
		check(t, "child, and all is well", p.Run(eatMemory+"; exit 0", limit), "Completed", 0)
		c := p.Run("sleep 600 & wait $!; exit 4", limit)
		r, err := c.RT.ExecSync(critest.Context(t), &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"/bin/sh", "-c", "exec " + eatMemory}, Timeout: 30})
		if err != nil || r.ExitCode != 137 {
			t.Errorf("exec: %v %v", r, err)
		}
		if st := c.Status(); st.State != runtime.ContainerState_CONTAINER_RUNNING {
			t.Errorf("after the end of an exec the container is %v", st)
		}
		c.Stop(0)
		check(t, "exec", c, "OOMKilled", 137)
		for range 2 {
			k := p.Run("sleep 600", limit)
			if err := syscall.Kill(containerPid(t, k), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			check(t, "killed by somebody", k, "Error", 137)
		}
		check(t, "failed", p.Run("exit 5", limit), "Error", 5)
		if st := neighbour.Status(); st.State != runtime.ContainerState_CONTAINER_RUNNING {
			t.Errorf("the neighbour: %v", st)
		}
		neighbour.Stop(0)
		check(t, "neighbour", neighbour, "Error", 137)
	}
	eachHandler(t, body)
	// The limit holds in a user namespace as well (CVE-2025-47291).
	t.Run("user namespace", func(t *testing.T) { eachUserNS(t, body) })
}

// What runtimes and other tools are told of pods and containers.
//
// contract: 7.3.28, 7.3.1
func TestAnnotations(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Create("true", func(c *runtime.ContainerConfig) {
			c.Annotations = map[string]string{"container.example/x": "1", "other.example/x": "2", "io.kubernetes.cri.container-type": "sandbox"}
		})
		a := specOf(t, c).Annotations
		want := map[string]string{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": p.ID, "io.kubernetes.cri.sandbox-name": p.Config.Metadata.Name,
			"io.kubernetes.cri.sandbox-namespace": "default", "io.kubernetes.cri.sandbox-uid": p.Config.Metadata.Uid, "io.kubernetes.cri.container-name": c.Config.Metadata.Name,
			"io.kubernetes.cri.image-name": p.Busybox, "container.example/x": "1", "other.example/x": ""}
		if handlerOf(p) != "runc" {
			want["container.example/x"] = ""
		}
		for k, v := range want {
			if a[k] != v {
				t.Errorf("%s is %q, want %q", k, a[k], v)
			}
		}
	})
}
