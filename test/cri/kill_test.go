//go:build linux

package cri

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/test/critest"
)

// number reads a variable of the environment.
func number(t *testing.T, name string, usual uint64) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return usual
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// churn is several kubelets, each with a pod that it makes and removes again and
// again, under a daemon that is killed.
type churn struct {
	*critest.Node
	t *testing.T
	// up is held by who may not meet a daemon that is down: calls read, the
	// killer writes between a kill and the next start.
	up   sync.RWMutex
	life atomic.Int64 // counts the daemon's lives

	mu    sync.Mutex
	ready map[string]bool // pods of which a worker was told, and which it has not begun to stop
	over  bool
}

// errAgain is the end of a call that a kill interrupted.
var errAgain = errors.New("killed on the way")

// call makes one call of a worker. An error of one that a kill could have
// interrupted is errAgain, any other fails the test and is returned.
func (c *churn) call(what string, fn func(context.Context) error) error {
	c.up.RLock()
	life := c.life.Load()
	ctx, cancel := context.WithTimeout(context.Background(), critest.Slow(40*time.Second))
	err := fn(ctx)
	cancel()
	c.up.RUnlock()
	if err == nil {
		return nil
	}
	if code := status.Code(err); code == codes.Unavailable || code == codes.Canceled {
		// The killer is on its way to say so, if it was one.
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if c.life.Load() != life {
				return errAgain
			}
		}
	}
	c.t.Errorf("%s: %v", what, err)
	return fmt.Errorf("%s: %w", what, err)
}

// until repeats a call until no kill interrupts it.
func (c *churn) until(what string, fn func(context.Context) error) error {
	for {
		if err := c.call(what, fn); err != errAgain {
			return err
		}
	}
}

// numbered is a script that prints numbered lines, and a last one without an end.
func numbered(lines int, pause string, then string) string {
	return fmt.Sprintf(`i=0; while [ $i -lt %d ]; do i=$((i+1)); echo line $i; %s done; printf last; %s`, lines, pause, then)
}

// checkLog compares a log with what numbered prints.
func checkLog(t *testing.T, who, log string, lines int) {
	t.Helper()
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "line %d\n", i+1)
	}
	want.WriteString("last")
	if strings.TrimSuffix(log, "\n") != want.String() {
		t.Errorf("%s: the log has %d bytes of %d, its end is %q", who, len(log), want.Len(), log[max(0, len(log)-60):])
	}
}

// round is one life of a worker's pod.
func (c *churn) round(w int, rnd *rand.Rand, handler string) error {
	cfg := &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Name: fmt.Sprintf("churn-%d", w), Namespace: "default", Uid: fmt.Sprintf("uid-%d", w)}, Hostname: "h", LogDirectory: fmt.Sprintf("%s/logs/churn-%d", c.Dir, w),
		PortMappings: []*runtime.PortMapping{{ContainerPort: 80, HostPort: int32(8000 + w)}},
		Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: "/" + c.Mark,
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}}},
	}
	pod := &critest.Pod{Node: c.Node, T: c.t, Config: cfg}
	if err := c.until("run pod", func(ctx context.Context) error {
		r, err := c.RT.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
		if err == nil {
			pod.ID = r.PodSandboxId
			c.mu.Lock()
			c.ready[pod.ID] = true
			c.mu.Unlock()
		}
		return err
	}); err != nil {
		return err
	}

	type box struct {
		*critest.Container
		code, lines int
		stop        bool
	}
	var boxes []*box
	for i, b := range []*box{
		{lines: 300, code: 1 + rnd.IntN(100)},            // ends at once
		{lines: 40, code: 1 + rnd.IntN(100)},             // prints for a while
		{lines: 10, code: 1 + rnd.IntN(100), stop: true}, // ends when it is told to
		{lines: rnd.IntN(3000), code: 1 + rnd.IntN(100)}, // prints much
	} {
		script := numbered(b.lines, "", fmt.Sprintf("exit %d", b.code))
		if i == 1 {
			script = numbered(b.lines, fmt.Sprintf("usleep %d;", rnd.IntN(12000)), fmt.Sprintf("exit %d", b.code))
		}
		if b.stop {
			script = fmt.Sprintf("trap 'exit %d' TERM; ", b.code) + numbered(b.lines, "", "while :; do usleep 10000; done")
		}
		b.Container = &critest.Container{Pod: pod, Config: pod.ContainerConfig(script, func(cc *runtime.ContainerConfig) {
			cc.Metadata.Name, cc.LogPath = fmt.Sprintf("c%d", i), fmt.Sprintf("c%d.log", i)
		})}
		_ = os.Remove(b.LogFile())
		if err := c.until("create container", func(ctx context.Context) error {
			r, err := c.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: pod.ID, Config: b.Config, SandboxConfig: cfg})
			b.ID = r.GetContainerId()
			return err
		}); err != nil {
			return err
		}
		// As the kubelet does after a call that came to nothing: it looks.
		for {
			err := c.call("start container", func(ctx context.Context) error {
				_, err := c.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: b.ID})
				return err
			})
			if err == nil {
				break
			}
			if err != errAgain {
				return err
			}
			st, err := c.status(b.ID)
			if err != nil {
				return err
			}
			if st.State != runtime.ContainerState_CONTAINER_CREATED {
				break
			}
		}
		boxes = append(boxes, b)
	}

	// A process executed in it is as good as before.
	running := boxes[2]
	if err := c.until("exec", func(ctx context.Context) error {
		r, err := c.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: running.ID, Cmd: []string{"/bin/sh", "-c", "echo out; exit 3"}, Timeout: 30})
		if err == nil && (string(r.Stdout) != "out\n" || r.ExitCode != 3) {
			err = fmt.Errorf("%d %q %q", r.ExitCode, r.Stdout, r.Stderr)
		}
		return err
	}); err != nil {
		return err
	}
	if err := c.until("stop container", func(ctx context.Context) error {
		_, err := c.RT.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: running.ID, Timeout: 30})
		return err
	}); err != nil {
		return err
	}
	for i, b := range boxes {
		who := fmt.Sprintf("worker %d, container %d (%s)", w, i, b.ID)
		var st *runtime.ContainerStatus
		for deadline := time.Now().Add(critest.Slow(30 * time.Second)); ; time.Sleep(5 * time.Millisecond) {
			var err error
			if st, err = c.status(b.ID); err != nil {
				return err
			}
			if st.State == runtime.ContainerState_CONTAINER_EXITED {
				break
			}
			if time.Now().After(deadline) {
				c.t.Errorf("%s is %s after a long time", who, st.State)
				return errors.New("it does not end")
			}
		}
		if int(st.ExitCode) != b.code {
			c.t.Errorf("%s: exit code %d, want %d: %v", who, st.ExitCode, b.code, st)
		}
		checkLog(c.t, who, b.Log(), b.lines)
	}
	if rnd.IntN(2) == 0 {
		if err := c.until("remove container", func(ctx context.Context) error {
			_, err := c.RT.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: boxes[0].ID})
			return err
		}); err != nil {
			return err
		}
	}
	c.mu.Lock()
	delete(c.ready, pod.ID)
	c.mu.Unlock()
	if rnd.IntN(2) == 0 {
		if err := c.until("stop pod", func(ctx context.Context) error {
			_, err := c.RT.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod.ID})
			return err
		}); err != nil {
			return err
		}
	}
	return c.until("remove pod", func(ctx context.Context) error {
		_, err := c.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: pod.ID})
		return err
	})
}

func (c *churn) status(id string) (st *runtime.ContainerStatus, err error) {
	err = c.until("container status", func(ctx context.Context) error {
		r, err := c.RT.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id})
		st = r.GetStatus()
		return err
	})
	return st, err
}

// differences compares what the daemon says with what the kernel and the files
// show, while nobody asks it for anything.
func (c *churn) differences() (bad []string) {
	ctx, cancel := context.WithTimeout(context.Background(), critest.Slow(10*time.Second))
	defer cancel()
	pods, err := c.RT.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return []string{err.Error()}
	}
	boxes, err := c.RT.ListContainers(ctx, &runtime.ListContainersRequest{})
	if err != nil {
		return []string{err.Error()}
	}
	say := func(format string, args ...any) { bad = append(bad, fmt.Sprintf(format, args...)) }
	known := map[string]bool{}
	netns := map[string]bool{}
	for _, p := range pods.Items {
		known[p.Id] = true
		netns[fmt.Sprintf("cni-%s-%s-%s-%s-%s", p.Id[:8], p.Id[8:12], p.Id[12:16], p.Id[16:20], p.Id[20:32])] = true
		c.mu.Lock()
		ready := c.ready[p.Id]
		c.mu.Unlock()
		if ready && p.State != runtime.PodSandboxState_SANDBOX_READY {
			say("pod %s is %s", p.Id, p.State)
		}
		if p.State != runtime.PodSandboxState_SANDBOX_READY {
			continue
		}
		st, err := c.RT.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.Id, Verbose: true})
		if err != nil {
			say("pod %s: %v", p.Id, err)
			continue
		}
		var info struct{ Pid int }
		if err := json.Unmarshal([]byte(st.Info["info"]), &info); err != nil {
			say("pod %s: %v", p.Id, err)
		}
		if (info.Pid == 0) != (p.RuntimeHandler == "pauseless") || info.Pid != 0 && !inCgroup(info.Pid, p.Id) {
			say("pod %s: pid %d", p.Id, info.Pid)
		}
		if !slices.Contains(c.Addresses(), st.Status.Network.GetIp()) {
			say("pod %s: address %v", p.Id, st.Status.Network)
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(c.Dir+"/state/netns/"+netName(p.Id), &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
			say("pod %s: network namespace: %v", p.Id, err)
		}
	}
	for _, b := range boxes.Containers {
		known[b.Id] = true
		if !known[b.PodSandboxId] {
			say("container %s of pod %s, which is not there", b.Id, b.PodSandboxId)
		}
		st, err := c.RT.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: b.Id, Verbose: true})
		if err != nil {
			say("container %s: %v", b.Id, err)
			continue
		}
		var info struct{ Pid int }
		if err := json.Unmarshal([]byte(st.Info["info"]), &info); err != nil {
			say("container %s: %v", b.Id, err)
		}
		if runs := info.Pid != 0 && inCgroup(info.Pid, b.Id); runs != (st.Status.State == runtime.ContainerState_CONTAINER_RUNNING) {
			say("container %s is %s, pid %d, runs: %v", b.Id, st.Status.State, info.Pid, runs)
		}
		if st.Status.State == runtime.ContainerState_CONTAINER_UNKNOWN {
			say("container %s is unknown", b.Id)
		}
	}
	for _, pattern := range []string{"/root/io.containerd.grpc.v1.cri/*/*", "/state/io.containerd.grpc.v1.cri/*/*", "/root/io.gantry.cni/*", "/state/io.containerd.runtime.v2.task/*/*", "/state/io.containerd.sandbox.controller.v1.shim/*/*"} {
		found, _ := filepath.Glob(c.Dir + pattern)
		for _, f := range found {
			if id := strings.TrimSuffix(filepath.Base(f), ".json"); !known[id] && len(id) == 64 {
				say("nobody's: %s", f)
			}
		}
	}
	found, _ := filepath.Glob(c.Dir + "/state/netns/*")
	for _, f := range found {
		if !netns[filepath.Base(f)] {
			say("nobody's: %s", f)
		}
	}
	for pid, args := range c.Processes() {
		if f := strings.Fields(args); !slices.ContainsFunc(f, func(s string) bool { return known[s] }) && len(f) > 0 && strings.Contains(f[0], "shim") {
			say("nobody's: process %d %s", pid, args)
		}
	}
	return bad
}

func netName(id string) string {
	return fmt.Sprintf("cni-%s-%s-%s-%s-%s", id[:8], id[8:12], id[12:16], id[16:20], id[20:32])
}

// inCgroup says whether a living process is in a container's cgroup.
func inCgroup(pid int, id string) bool {
	group, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !strings.Contains(string(group), id) {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, ok := strings.Cut(string(stat), ") ")
	return err == nil && ok && rest[0] != 'Z'
}

// recorded lists what the stores have of pods: leases, snapshots that can be
// written, containers, sandboxes.
func recorded(t *testing.T, n *critest.Node) (left []string) {
	t.Helper()
	c, err := client.Dial(n.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	v, err := c.In("k8s.io", "")
	if err != nil {
		t.Fatal(err)
	}
	ctx := critest.Context(t)
	list := func(kind string, err error) {
		if err != nil {
			t.Errorf("%s: %v", kind, err)
		}
	}
	leases, err := v.Leases().List(ctx)
	list("leases", err)
	for _, l := range leases {
		left = append(left, "lease "+string(l.ID))
	}
	boxes, err := v.Sandboxes().List(ctx)
	list("sandboxes", err)
	for _, b := range boxes {
		left = append(left, "sandbox "+b.ID)
	}
	list("containers", v.Containers().Walk(ctx, func(c container.Container) error {
		left = append(left, "container "+string(c.ID))
		return nil
	}))
	return append(left, active(ctx, t, v)...)
}

func active(ctx context.Context, t *testing.T, v view.View) (left []string) {
	store, err := v.Snapshots("overlayfs")
	if err == nil {
		err = store.Walk(ctx, func(i snapshot.Info) error {
			if i.Kind != snapshot.KindCommitted {
				left = append(left, "snapshot "+i.Name)
			}
			return nil
		})
	}
	if err != nil {
		t.Errorf("snapshots: %v", err)
	}
	return left
}

// The daemon is killed at random moments while pods come and go, and containers
// go on, end and print meanwhile. $GANTRY_KILLS is how often, $GANTRY_SEED
// repeats a run's choices.
//
// contract: 7.3.30, 13.25
// promise: P5, P6, P11, P20, P22
func TestKillDuringChurn(t *testing.T) {
	kills, seed := int(number(t, "GANTRY_KILLS", 100)), number(t, "GANTRY_SEED", uint64(time.Now().UnixNano()))
	t.Logf("GANTRY_SEED=%d GANTRY_KILLS=%d", seed, kills)
	n := critest.Run(t, binDir, "")
	n.Pull(t, n.Busybox)
	c := &churn{Node: n, t: t, ready: map[string]bool{}}
	rnd := rand.New(rand.NewPCG(seed, 0))

	// One that is there all the time, and never stops to print.
	kept := n.Pod(t, "runc")
	c.ready[kept.ID] = true
	chatter := kept.Run("trap 'echo end; exit 7' TERM; i=0; while :; do i=$((i+1)); echo $i; usleep 2000; done")
	pid := livePid(t, chatter)

	var workers sync.WaitGroup
	rounds := make([]int, 4)
	for w := range rounds {
		workers.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w+1)))
			handler := []string{"runc", "pauseless"}[w%2]
			for {
				c.mu.Lock()
				over := c.over
				c.mu.Unlock()
				if over || t.Failed() || c.round(w, rnd, handler) != nil {
					return
				}
				rounds[w]++
			}
		})
	}
	began, slowest := time.Now(), time.Duration(0)
	for i := range kills {
		// The moment is what the test is about. Some lives are long enough for
		// whole pods, so that all they do is met.
		time.Sleep(time.Duration(rnd.IntN([]int{200, 400, 400, 2500}[i%4])) * time.Millisecond)
		n.Kill()
		c.up.Lock()
		c.life.Add(1)
		time.Sleep(time.Duration(rnd.IntN(150)) * time.Millisecond)
		err := n.Start()
		if err == nil {
			opened := time.Now()
			listed(t, n)
			slowest = max(slowest, time.Since(opened))
		}
		if err == nil && rnd.IntN(2) == 0 {
			// Otherwise the workers meet a daemon that is not done with recovery.
			var bad []string
			for deadline := time.Now().Add(critest.Slow(20 * time.Second)); ; time.Sleep(10 * time.Millisecond) {
				if bad = c.differences(); len(bad) == 0 || time.Now().After(deadline) {
					break
				}
			}
			if len(bad) > 0 {
				t.Errorf("20 s after kill %d:\n%s", i, strings.Join(bad, "\n"))
			}
		}
		c.up.Unlock()
		if err != nil {
			t.Error(err)
		}
		if t.Failed() {
			break
		}
	}
	c.mu.Lock()
	c.over = true
	c.mu.Unlock()
	workers.Wait()
	t.Logf("%d kills in %s, lives of pods: %v, the first answer after at most %s", kills, time.Since(began).Round(time.Millisecond), rounds, slowest)
	if t.Failed() {
		t.Log(n.Log(1 << 20))
		return
	}
	if now := livePid(t, chatter); now != pid {
		t.Errorf("pid %d, before the kills %d", now, pid)
	}
	chatter.Stop(30)
	if st := chatter.Wait(); st.ExitCode != 7 {
		t.Errorf("%v", st)
	}
	next := 0
	for lines := bufio.NewScanner(strings.NewReader(chatter.Log())); lines.Scan(); {
		if next++; lines.Text() != strconv.Itoa(next) {
			if lines.Text() != "end" || lines.Scan() {
				t.Errorf("line %d is %q", next, lines.Text())
			}
			break
		}
	}
	if next < 100 {
		t.Errorf("only %d lines", next)
	}
	n.Clear(t)
	// What collection, and recovery after the last kill, still have in hand is gone
	// soon: a daemon that is stopped before leaves it to the next.
	var left []string
	for deadline := time.Now().Add(critest.Slow(20 * time.Second)); ; time.Sleep(50 * time.Millisecond) {
		if left = append(recorded(t, n), c.differences()...); len(left) == 0 || time.Now().After(deadline) {
			break
		}
	}
	if len(left) > 0 {
		t.Errorf("left, 20 s after the last pod:\n%s", strings.Join(left, "\n"))
	}
}

func livePid(t *testing.T, b *critest.Container) int {
	t.Helper()
	r, err := b.RT.ContainerStatus(critest.Context(t), &runtime.ContainerStatusRequest{ContainerId: b.ID, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.Pid < 2 || syscall.Kill(info.Pid, 0) != nil {
		t.Fatalf("pid %d: %v", info.Pid, err)
	}
	return info.Pid
}
