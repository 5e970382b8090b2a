//go:build linux

package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// atOnce calls fn n times, some at a time.
func atOnce(some, n int, fn func(i int)) {
	turns := make(chan struct{}, some)
	var wg sync.WaitGroup
	for i := range n {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			fn(i)
		})
	}
	wg.Wait()
}

// Commands that leave processes behind, and commands that run out of time, come
// and go; in the end there is nothing more than before.
//
// promise: P17
// contract: 13.27
func TestExecSoak(t *testing.T) {
	const execs = 200
	n := critest.Run(t, binDir, "")
	n.Pull(t, n.Busybox)
	p := n.Pod(t, "runc")
	c := p.Run("trap : CHLD; while :; do wait; usleep 20000; done")
	ctx, cancel := context.WithTimeout(context.Background(), critest.Slow(2*time.Minute))
	defer cancel()
	exec := func(i int) {
		if i%5 == 4 {
			began := time.Now()
			_, err := n.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: c.ID, Timeout: 1,
				Cmd: []string{"/bin/sh", "-c", "(setsid sleep 4321 &); sleep 4321 & sleep 4321"}})
			if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "context deadline exceeded") {
				t.Errorf("%d: %v", i, err)
			}
			if took := time.Since(began); took > critest.Slow(6*time.Second) {
				t.Errorf("%d: %s after a timeout of 1 s", i, took)
			}
			return
		}
		// What it leaves has its output, and ends soon.
		r, err := n.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: c.ID, Timeout: 60,
			Cmd: []string{"/bin/sh", "-c", fmt.Sprintf("(usleep 10000; echo late) & usleep 50000 >/dev/null 2>&1 & echo %d; exit %d", i, i%7)}})
		if err != nil || int(r.ExitCode) != i%7 || !strings.HasPrefix(string(r.Stdout), fmt.Sprintf("%d\n", i)) && !strings.HasPrefix(string(r.Stdout), "late\n") {
			t.Errorf("%d: %v, %v", i, r, err)
		}
	}
	exec(0) // what is made at the first time and kept
	shim := shimPid(t, n, p.ID)
	daemon, own := files(n.Pid()), files(shim)
	atOnce(16, execs, exec)
	if t.Failed() {
		return
	}
	critest.Eventually(t, "all that the commands started is gone", func() bool {
		// The container's own pause is there most of the time.
		return len(slices.DeleteFunc(inContainer(t, n, c), func(pid string) bool {
			args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			return string(args) == "usleep\x0020000\x00"
		})) == 1
	})
	critest.Eventually(t, "their directories are gone", func() bool {
		left, err := filepath.Glob(n.Dir + "/state/io.containerd.grpc.v1.cri/*/" + c.ID + "_*")
		return err == nil && len(left) == 0
	})
	var now, nowOwn int
	for deadline := time.Now().Add(critest.Slow(10 * time.Second)); ; time.Sleep(100 * time.Millisecond) {
		// The rest is connections, which come and go.
		if now, nowOwn = files(n.Pid()), files(shim); now <= daemon+8 && nowOwn <= own+4 {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("the daemon has %d files, before %d; the shim %d, before %d", now, daemon, nowOwn, own)
			break
		}
	}
}

func shimPid(t *testing.T, n *critest.Node, id string) int {
	t.Helper()
	for pid, args := range n.Processes() {
		if strings.Contains(args, "containerd-shim") && strings.Contains(args, id) {
			return pid
		}
	}
	t.Fatalf("no shim of %s", id)
	return 0
}

// files counts a process's open files.
func files(pid int) int {
	all, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(all)
}

// inContainer are the processes in a container's cgroup or one below, zombies too.
func inContainer(t *testing.T, n *critest.Node, c *critest.Container) (pids []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), n.Mark+"/"+c.ID) {
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	return pids
}

// Containers that run out of memory at once say so, and those that are killed
// from outside do not.
//
// promise: P18
func TestOutOfMemorySoak(t *testing.T) {
	const each = 50
	n := critest.Run(t, binDir, "")
	n.Pull(t, n.Busybox)
	p := n.Pod(t, "pauseless")
	limited := func(c *runtime.ContainerConfig) {
		c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 16 << 20, MemorySwapLimitInBytes: 16 << 20}
	}
	atOnce(4, 2*each, func(i int) {
		script, reason := "exec tail /dev/zero", "OOMKilled"
		if i%2 == 1 {
			script, reason = "exec sleep 1000", "Error"
		}
		// What ends the test is for its own goroutine.
		ctx, cancel := context.WithTimeout(context.Background(), critest.Slow(time.Minute))
		defer cancel()
		r, err := n.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.ID, Config: p.ContainerConfig(script, limited), SandboxConfig: p.Config})
		if err == nil {
			_, err = n.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: r.ContainerId})
		}
		if err != nil {
			t.Errorf("%d: %v", i, err)
			return
		}
		if i%2 == 1 {
			for _, pid := range inContainer(t, n, &critest.Container{Pod: p, ID: r.ContainerId}) {
				var number int
				if _, err := fmt.Sscan(pid, &number); err == nil {
					_ = syscall.Kill(number, syscall.SIGKILL)
				}
			}
		}
		var st *runtime.ContainerStatus
		for st.GetState() != runtime.ContainerState_CONTAINER_EXITED {
			s, err := n.RT.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: r.ContainerId})
			if err != nil {
				t.Errorf("%d: %v", i, err)
				return
			}
			st = s.Status
			time.Sleep(5 * time.Millisecond)
		}
		if st.ExitCode != 137 || st.Reason != reason {
			t.Errorf("%d: exit %d, %s, want %s", i, st.ExitCode, st.Reason, reason)
		}
		if _, err := n.RT.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: r.ContainerId}); err != nil {
			t.Errorf("%d: %v", i, err)
		}
	})
}
