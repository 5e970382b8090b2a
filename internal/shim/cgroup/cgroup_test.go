//go:build linux

package cgroup

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// fake makes a cgroup of version 2 out of files.
func fake(t *testing.T, files map[string]string) (*Group, string) {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, "ns", "c1")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	g, err := loadUnified(root, "/ns/c1")
	if err != nil {
		t.Fatal(err)
	}
	return g, dir
}

// contract: 5.3.6, 13.23
func TestUnifiedMetrics(t *testing.T) {
	g, _ := fake(t, map[string]string{
		"cgroup.controllers": "cpu memory pids",
		"memory.current":     "1000\n", "memory.max": "2000\n", "memory.stat": "anon 700\nfile 300\n",
		"memory.events": "low 0\noom 1\noom_kill 1\n",
		"cpu.stat":      "usage_usec 5000\nuser_usec 3000\nsystem_usec 2000\n",
		"pids.current":  "3\n", "pids.max": "max\n",
	})
	a, err := g.Metrics()
	if err != nil || a.TypeUrl != "io.containerd.cgroups.v2.Metrics" {
		t.Fatal(a, err)
	}
	var m v2.Metrics
	if err := proto.Unmarshal(a.Value, &m); err != nil {
		t.Fatal(err)
	}
	if m.Memory.GetUsage() != 1000 || m.Memory.GetUsageLimit() != 2000 || m.CPU.GetUsageUsec() != 5000 || m.Pids.GetCurrent() != 3 || m.Memory.GetAnon() != 700 {
		t.Errorf("%v", &m)
	}
}

// contract: 5.3.2
func TestUnifiedOOM(t *testing.T) {
	g, dir := fake(t, map[string]string{"memory.events": "low 0\noom_kill 2\n"})
	kills := make(chan struct{}, 10)
	w, err := g.WatchOOM(func() { kills <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		if err := os.WriteFile(filepath.Join(dir, "memory.events"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("low 5\noom_kill 2\n") // something else changed
	write("low 5\noom_kill 3\n")
	select {
	case <-kills:
	case <-time.After(10 * time.Second):
		t.Fatal("not noticed")
	}
	write("low 5\noom_kill 4\n")
	w.Check() // at the latest now
	if len(kills) != 1 {
		t.Errorf("%d notices after Check", len(kills))
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	write("low 5\noom_kill 9\n")
	if len(kills) != 1 {
		t.Error("noticed after Close")
	}
	empty, _ := fake(t, nil)
	if _, err := empty.WatchOOM(func() {}); err == nil {
		t.Error("a group without memory controller can be watched")
	}
}

// The shim must never signal what is not a container.
func TestSignalAllIsCareful(t *testing.T) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	g, _ := fake(t, map[string]string{"cgroup.procs": strings.Fields(string(own))[0] + "\n"})
	if err := g.SignalAll(unix.SIGKILL); err == nil || !strings.Contains(err.Error(), "own") {
		t.Errorf("%v", err)
	}
	g, dir := fake(t, map[string]string{"cgroup.procs": "", "cgroup.kill": ""})
	if err := g.SignalAll(unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(dir + "/cgroup.kill"); string(b) != "1" {
		t.Errorf("cgroup.kill holds %q", b)
	}
}

// The group is found every time, however much others mount meanwhile.
// contract: 5.3.6
func TestLoadWhileMounting(t *testing.T) {
	if cgroups.Mode() == cgroups.Unified || os.Getuid() != 0 {
		t.Skip("needs cgroup v1 and root")
	}
	dir := filepath.Join(unifiedRoot, "memory", "gantry-cgroup-test-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		at := t.TempDir()
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := unix.Mount("tmpfs", at, "tmpfs", 0, ""); err != nil {
					t.Error(err)
					return
				}
				if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 200 {
		g, err := Load(cmd.Process.Pid)
		if err != nil {
			t.Error(err)
			break
		}
		if g.memory1 != dir {
			t.Errorf("memory group %s, want %s", g.memory1, dir)
			break
		}
		pids, err := g.Pids()
		if err != nil || !slices.Equal(pids, []int{cmd.Process.Pid}) {
			t.Errorf("processes %v, %v", pids, err)
			break
		}
	}
	close(stop)
	wg.Wait()
}
