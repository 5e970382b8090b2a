//go:build linux

package cri

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// eachPod calls f for 0 to n-1, four at a time as a kubelet may, and returns how
// long all of it took.
func eachPod(t *testing.T, n int, f func(i int) error) time.Duration {
	t.Helper()
	begin := time.Now()
	jobs := make(chan int)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range jobs {
				if err := f(i); err != nil {
					t.Errorf("pod %d: %v", i, err)
				}
			}
		})
	}
	for i := range n {
		jobs <- i
	}
	close(jobs)
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return time.Since(begin)
}

// Many pods, with pause containers and without, come up, are listed and scraped,
// survive a crash of the daemon, which listens at once whatever there is to
// recover, and go without a trace. GANTRY_PODS=200 makes as many.
//
// contract: 7.1.9, 7.1.15, 7.1.20, 7.1.21
// promise: P12, P24, P55
func TestManyPods(t *testing.T) {
	pods := 40
	if s := os.Getenv("GANTRY_PODS"); s != "" {
		var err error
		if pods, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	n := critest.Run(t, binDir, "")
	n.Pull(t, n.Busybox)
	ctx, cancel := context.WithTimeout(context.Background(), critest.Slow(10*time.Minute))
	t.Cleanup(cancel)

	t.Cleanup(func() { // before the node looks for what is left
		for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			dirs, _ := filepath.Glob(pattern + n.Mark + "/*")
			for _, dir := range dirs {
				os.Remove(dir)
			}
		}
	})
	ids := make([]string, pods)
	took := eachPod(t, pods, func(i int) error {
		// Each has a cgroup of its own, as kubelets make them.
		c := n.PodConfig(t, critest.HostNetwork)
		c.Linux.CgroupParent += "/" + c.Metadata.Name
		r, err := n.RT.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: []string{"runc", "pauseless"}[i%2]})
		if err != nil {
			return err
		}
		ids[i] = r.PodSandboxId
		p := &critest.Pod{Node: n, T: t, ID: r.PodSandboxId, Config: c}
		ctr, err := n.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.ID, Config: p.ContainerConfig("exec sleep 1000"), SandboxConfig: c})
		if err == nil {
			_, err = n.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: ctr.ContainerId})
		}
		return err
	})
	t.Logf("%d pods with a container each are up after %v", pods, took)

	// listed returns how many pods are ready and how many containers run.
	listed := func() (ready, running int, err error) {
		ps, err := n.RT.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
		if err != nil {
			return 0, 0, err
		}
		cs, err := n.RT.ListContainers(ctx, &runtime.ListContainersRequest{})
		if err != nil {
			return 0, 0, err
		}
		for _, p := range ps.Items {
			if p.State == runtime.PodSandboxState_SANDBOX_READY {
				ready++
			}
		}
		for _, c := range cs.Containers {
			if c.State == runtime.ContainerState_CONTAINER_RUNNING {
				running++
			}
		}
		return ready, running, nil
	}
	if ready, running, err := listed(); err != nil || ready != pods || running != pods {
		t.Fatalf("%d pods are ready and %d containers run: %v", ready, running, err)
	}

	scrape := func() {
		t.Helper()
		begin := time.Now()
		ps, err := n.RT.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{})
		if err != nil || len(ps.Stats) != pods {
			t.Fatalf("statistics of %d pods: %v", len(ps.GetStats()), err)
		}
		for _, s := range ps.Stats {
			if s.Linux.GetMemory().GetWorkingSetBytes().GetValue() == 0 || s.Linux.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || len(s.Linux.GetContainers()) != 1 {
				t.Fatalf("statistics of pod %s: %v %v, %d containers", s.Attributes.Id, s.Linux.GetMemory(), s.Linux.GetCpu(), len(s.Linux.GetContainers()))
			}
		}
		cs, err := n.RT.ListContainerStats(ctx, &runtime.ListContainerStatsRequest{})
		if err != nil || len(cs.Stats) != pods {
			t.Fatalf("statistics of %d containers: %v", len(cs.GetStats()), err)
		}
		stats := time.Since(begin)
		begin = time.Now()
		ms, err := n.RT.ListPodSandboxMetrics(ctx, &runtime.ListPodSandboxMetricsRequest{})
		if err != nil || len(ms.PodMetrics) != pods {
			t.Fatalf("metrics of %d pods: %v", len(ms.GetPodMetrics()), err)
		}
		for _, m := range ms.PodMetrics {
			// A pod of the host's network has none of its own.
			if len(m.ContainerMetrics) != 1 || len(m.ContainerMetrics[0].Metrics) < 40 {
				t.Fatalf("pod %s has metrics of %d containers", m.PodSandboxId, len(m.ContainerMetrics))
			}
		}
		t.Logf("statistics took %v, metrics %v", stats, time.Since(begin))
	}
	scrape()

	// A machine that is busy with other tests may delay one start.
	var quickest time.Duration
	for range 3 {
		n.Kill()
		begin := time.Now()
		if err := n.Spawn(); err != nil {
			t.Fatal(err)
		}
		if err := n.Listening(); err != nil {
			t.Fatal(err)
		}
		listening := time.Since(begin)
		if err := n.Connect(); err != nil {
			t.Fatal(err)
		}
		critest.Eventually(t, "the pods of before", func() bool {
			ready, running, err := listed()
			if err != nil && status.Code(err) != codes.Unavailable && status.Code(err) != codes.Unknown {
				t.Fatal(err)
			}
			return err == nil && ready == pods && running == pods
		})
		t.Logf("kill -9: the socket answers after %v, the pods are listed after %v", listening, time.Since(begin))
		if quickest == 0 || listening < quickest {
			quickest = listening
		}
		if quickest < critest.Slow(500*time.Millisecond) {
			break
		}
	}
	if quickest >= critest.Slow(500*time.Millisecond) {
		t.Errorf("the socket answers %v after kill -9", quickest)
	}
	scrape()

	took = eachPod(t, pods, func(i int) error {
		if _, err := n.RT.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: ids[i]}); err != nil {
			return err
		}
		_, err := n.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: ids[i]})
		return err
	})
	t.Logf("all are removed after %v", took)
	ps, err := n.RT.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil || len(ps.Items) != 0 {
		t.Errorf("after all was removed: %v %v", ps, err)
	}
}
