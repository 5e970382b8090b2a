//go:build linux

package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// wantCode checks an error's class.
func wantCode(t *testing.T, what string, err error, want ...codes.Code) {
	t.Helper()
	if !slices.Contains(want, status.Code(err)) {
		t.Errorf("%s: %v, want one of %v", what, err, want)
	}
}

func startOf(c *critest.Container) error {
	_, err := c.RT.StartContainer(critest.Context(c.T), &runtime.StartContainerRequest{ContainerId: c.ID})
	return err
}

// isState checks a container's state.
func isState(t *testing.T, c *critest.Container, want runtime.ContainerState) *runtime.ContainerStatus {
	t.Helper()
	st := c.Status()
	if st.State != want {
		t.Errorf("container %s is %s, want %s: %v", c.Config.Metadata.Name, st.State, want, st)
	}
	return st
}

// hostPid is the first process of a container, on the host.
func hostPid(t *testing.T, c *critest.Container) int {
	t.Helper()
	pid, ok := describe(t, c)["pid"].(float64)
	if !ok || pid < 2 {
		t.Fatalf("pid %v", pid)
	}
	return int(pid)
}

func describe(t *testing.T, c *critest.Container) map[string]any {
	t.Helper()
	r, err := c.RT.ContainerStatus(critest.Context(t), &runtime.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info map[string]any
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		t.Fatal(err, r.Info)
	}
	return info
}

// logHas waits for a text in a container's log.
func logHas(t *testing.T, c *critest.Container, text string) {
	t.Helper()
	critest.Eventually(t, fmt.Sprintf("%q in the log", text), func() bool { return strings.Contains(c.Log(), text) })
}

// From its creation to its removal a container has each state in its turn, and
// what does not fit a state is refused without an effect.
//
// contract: 7.1.11, 7.1.12, 7.1.13, 7.1.14, 7.1.15, 5.3.1, 5.3.2, 5.3.4
func TestContainerLife(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		begin := time.Now().UnixNano()
		c := p.Create("echo started; sleep 1000", func(c *runtime.ContainerConfig) {
			c.Labels, c.Annotations = map[string]string{"l": "1"}, map[string]string{"a": "2"}
			c.Mounts = []*runtime.Mount{{ContainerPath: "/logs", HostPath: p.Dir + "/logs", Readonly: true}}
		})
		st := isState(t, c, runtime.ContainerState_CONTAINER_CREATED)
		if st.CreatedAt < begin || st.StartedAt != 0 || st.FinishedAt != 0 || st.Labels["l"] != "1" || st.Annotations["a"] != "2" || len(st.Mounts) != 1 || st.LogPath != c.LogFile() {
			t.Errorf("created: %v", st)
		}
		img, err := p.Images.ImageStatus(critest.Context(t), &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: p.Busybox}})
		if err != nil || !slices.Contains(img.GetImage().GetRepoDigests(), st.ImageRef) || st.ImageId != img.GetImage().GetId() {
			t.Errorf("image %s %s of %v: %v", st.ImageRef, st.ImageId, img, err)
		}
		_, err = c.RT.ReopenContainerLog(critest.Context(t), &runtime.ReopenContainerLogRequest{ContainerId: c.ID})
		wantCode(t, "reopen the log of one that was not started", err, codes.FailedPrecondition)
		if err := startOf(c); err != nil {
			t.Fatal(err)
		}
		st = isState(t, c, runtime.ContainerState_CONTAINER_RUNNING)
		if st.StartedAt < st.CreatedAt || st.FinishedAt != 0 {
			t.Errorf("running: %v", st)
		}
		pid := hostPid(t, c)
		wantCode(t, "start it again", startOf(c), codes.FailedPrecondition)
		isState(t, c, runtime.ContainerState_CONTAINER_RUNNING)
		logHas(t, c, "started\n")
		c.Stop(0)
		st = isState(t, c, runtime.ContainerState_CONTAINER_EXITED)
		if st.FinishedAt < st.StartedAt || st.ExitCode != 137 || st.Reason != "Error" {
			t.Errorf("stopped: %v", st)
		}
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is still there: %v", pid, err)
		}
		c.Stop(0)
		c.Stop(10)
		wantCode(t, "start one that has ended", startOf(c), codes.FailedPrecondition)
		c.Remove()
		c.Remove()
		c.Stop(10)
		_, err = c.RT.ContainerStatus(critest.Context(t), &runtime.ContainerStatusRequest{ContainerId: c.ID})
		wantCode(t, "status of a removed one", err, codes.NotFound)
		wantCode(t, "start a removed one", startOf(c), codes.NotFound)

		// Removal ends what runs, and what never ran goes as well.
		c = p.Run("sleep 1000")
		pid = hostPid(t, c)
		c.Remove()
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is still there: %v", pid, err)
		}
		c = p.Create("sleep 1000")
		c.Stop(10)
		isState(t, c, runtime.ContainerState_CONTAINER_CREATED)
		c.Remove()
	})
}

// contract: 13.26, 7.1.13, 7.1.14
func TestUnknownContainer(t *testing.T) {
	n := node(t)
	for _, id := range []string{"unknown", strings.Repeat("0", 64)} {
		c := &critest.Container{Pod: &critest.Pod{Node: n, T: t}, ID: id}
		c.Stop(1)
		c.Remove()
		wantCode(t, "start", startOf(c), codes.NotFound)
		_, err := n.RT.ReopenContainerLog(critest.Context(t), &runtime.ReopenContainerLogRequest{ContainerId: id})
		wantCode(t, "reopen", err, codes.NotFound)
	}
}

// contract: 7.1.12, 7.1.15, 5.3.3
func TestContainerExits(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		for _, tc := range []struct {
			script, reason string
			code           int32
		}{{"true", "Completed", 0}, {"exit 7", "Error", 7}, {"sh -c 'kill -TERM $$'; exit $?", "Error", 143}, {"exit 255", "Error", 255}} {
			if st := p.Run(tc.script).Wait(); st.ExitCode != tc.code || st.Reason != tc.reason || st.FinishedAt < st.StartedAt || st.StartedAt == 0 {
				t.Errorf("%s: %v", tc.script, st)
			}
		}
		killed := p.Run("sleep 1000")
		if err := syscall.Kill(hostPid(t, killed), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if st := killed.Wait(); st.ExitCode != 137 || st.Reason != "Error" {
			t.Errorf("killed from outside: %v", st)
		}
		for name, change := range map[string]func(*runtime.ContainerConfig){
			"no such program": func(c *runtime.ContainerConfig) { c.Command = []string{"/no/such/program"} },
			"not executable":  func(c *runtime.ContainerConfig) { c.Command = []string{"/etc/passwd"} },
		} {
			c := p.Create("", change)
			err := startOf(c)
			if err == nil {
				t.Errorf("%s: started", name)
			}
			st := isState(t, c, runtime.ContainerState_CONTAINER_EXITED)
			if st.ExitCode != 128 || st.Reason != "StartError" || st.Message == "" || st.FinishedAt == 0 || !strings.Contains(fmt.Sprint(err), c.Config.Command[0]) && !strings.Contains(fmt.Sprint(err), "ermission denied") {
				t.Errorf("%s: %v, %v", name, st, err)
			}
			wantCode(t, "start it again", startOf(c), codes.FailedPrecondition)
			c.Remove()
		}
	})
}

// contract: 7.1.11
func TestCreateRefused(t *testing.T) {
	n := node(t)
	p := n.Pod(t, "pauseless")
	refused(t, p, "an unknown image", image(n.Registry.Host()+"/nothing:1"), codes.NotFound)
	refused(t, p, "a log outside", func(c *runtime.ContainerConfig) { c.LogPath = "../other/c.log" }, codes.InvalidArgument)
	refused(t, p, "no name", func(c *runtime.ContainerConfig) { c.Metadata.Name = "" }, codes.InvalidArgument)
	created := p.Create("true")
	p.Stop()
	refused(t, p, "a stopped pod", func(*runtime.ContainerConfig) {}, codes.FailedPrecondition)
	wantCode(t, "start in a stopped pod", startOf(created), codes.FailedPrecondition)
	_, err := n.RT.CreateContainer(critest.Context(t), &runtime.CreateContainerRequest{PodSandboxId: "unknown", Config: p.ContainerConfig("true"), SandboxConfig: p.Config})
	wantCode(t, "an unknown pod", err, codes.NotFound)
}

// A kubelet that repeats a creation gets the container that it asked for, and
// never one too many.
//
// contract: 7.1.11
// promise: P5
func TestCreateIdempotent(t *testing.T) {
	n := node(t)
	p := n.Pod(t, "runc")
	n.Pull(t, n.Busybox)
	config := p.ContainerConfig("true")
	create := func(ctx context.Context) (string, error) {
		r, err := n.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.ID, Config: config, SandboxConfig: p.Config})
		return r.GetContainerId(), err
	}
	mine := func() (ids []string) {
		l, err := n.RT.ListContainers(critest.Context(t), &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{PodSandboxId: p.ID}})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range l.Containers {
			ids = append(ids, c.Id)
		}
		return ids
	}
	var ids [8]string
	var errs [8]error
	var all sync.WaitGroup
	for i := range ids {
		all.Go(func() { ids[i], errs[i] = create(critest.Context(t)) })
	}
	all.Wait()
	if err := errors.Join(errs[:]...); err != nil || len(slices.Compact(ids[:])) != 1 || !slices.Equal(mine(), ids[:1]) {
		t.Fatalf("%q, listed %q: %v", ids, mine(), err)
	}
	c := &critest.Container{Pod: p, ID: ids[0], Config: config}
	if err := startOf(c); err != nil {
		t.Fatal(err)
	}
	_, err := create(critest.Context(t))
	wantCode(t, "one that was started", err, codes.AlreadyExists)

	// The next attempt is another container beside it.
	config.Metadata.Attempt = 1
	second, err := create(critest.Context(t))
	if err != nil || second == c.ID || len(mine()) != 2 {
		t.Errorf("%s beside %s: %v", second, c.ID, err)
	}

	// Whoever gives up somewhere on the way is as well off when asking again.
	for i := range 20 {
		config.Metadata.Attempt = uint32(2 + i)
		ctx, cancel := context.WithTimeout(critest.Context(t), critest.Slow(time.Duration(i)*time.Millisecond))
		_, _ = create(ctx)
		cancel()
		id, err := create(critest.Context(t))
		if err != nil {
			t.Errorf("after %d ms: %v", i, err)
		}
		again, err := create(critest.Context(t))
		if err != nil || again != id {
			t.Errorf("after %d ms: %s, then %s, %v", i, id, again, err)
		}
	}
	if got := len(mine()); got != 22 {
		t.Errorf("%d containers, want 22", got)
	}
}

// contract: 7.1.11
func TestImageConfig(t *testing.T) {
	n := node(t)
	const show = `echo "$0|$*|$PWD|$A|$B"`
	ref := n.Put(t, "config", ocispec.ImageConfig{Entrypoint: []string{"/bin/sh", "-c", show}, Cmd: []string{"image", "cmd"}, WorkingDir: "/made/by/image", Env: []string{"PATH=/bin", "A=image", "B=image"}})
	bare := n.Put(t, "config-bare", ocispec.ImageConfig{})
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		for _, tc := range []struct {
			name   string
			change func(*runtime.ContainerConfig)
			want   string
		}{
			{"image", func(*runtime.ContainerConfig) {}, "image|cmd|/made/by/image|image|image\n"},
			{"args", func(c *runtime.ContainerConfig) { c.Args = []string{"own", "two", "args"} }, "own|two args|/made/by/image|image|image\n"},
			{"command", func(c *runtime.ContainerConfig) { c.Command = []string{"/bin/sh", "-c", show} }, "/bin/sh||/made/by/image|image|image\n"},
			{"both", func(c *runtime.ContainerConfig) {
				c.Command, c.Args = []string{"/bin/sh", "-c"}, []string{show, "x", "y"}
			}, "x|y|/made/by/image|image|image\n"},
			{"directory", func(c *runtime.ContainerConfig) { c.WorkingDir = "/made/by/pod" }, "image|cmd|/made/by/pod|image|image\n"},
			{"environment", func(c *runtime.ContainerConfig) {
				c.Envs = []*runtime.KeyValue{{Key: "B", Value: []byte("a=b c")}, {Key: "A"}}
			}, "image|cmd|/made/by/image||a=b c\n"},
		} {
			out := p.Output("", func(c *runtime.ContainerConfig) { c.Command = nil; c.Image.Image = ref; tc.change(c) })
			if strings.Replace(out, "sh|", "/bin/sh|", 1) != tc.want && out != tc.want {
				t.Errorf("%s: %q, want %q", tc.name, out, tc.want)
			}
		}
		refused(t, p, "nothing to run", func(c *runtime.ContainerConfig) { c.Command = nil; c.Image.Image = bare }, codes.InvalidArgument)
	})
}

// The signal is the container's, or the image's, or SIGTERM.
//
// contract: 7.1.13, 7.3.19, 7.1.15
func TestStopSignal(t *testing.T) {
	n := node(t)
	usr1 := n.Put(t, "stop-usr1", ocispec.ImageConfig{StopSignal: "SIGUSR1"})
	short := n.Put(t, "stop-short", ocispec.ImageConfig{StopSignal: "USR1"})
	number := n.Put(t, "stop-number", ocispec.ImageConfig{StopSignal: "10"})
	rt := n.Put(t, "stop-rt", ocispec.ImageConfig{StopSignal: "SIGRTMIN+3"})
	senseless := n.Put(t, "stop-senseless", ocispec.ImageConfig{StopSignal: "SIGNONSENSE"})
	const script = `for s in 1 3 10 12 15 37; do trap "exit $s" $s; done; echo ready; while :; do sleep 0.05; done`
	for _, tc := range []struct {
		name, ref string
		own       runtime.Signal
		code      int32
		signal    runtime.Signal
	}{
		{"none", n.Busybox, 0, 15, runtime.Signal_SIGNAL_SIGTERM},
		{"image", usr1, 0, 10, runtime.Signal_SIGNAL_SIGUSR1},
		{"image, short", short, 0, 10, runtime.Signal_SIGNAL_SIGUSR1},
		{"image, a number", number, 0, 10, runtime.Signal_SIGNAL_SIGUSR1},
		{"image, real time", rt, 0, 37, runtime.Signal_SIGNAL_SIGRTMINPLUS3},
		{"image, senseless", senseless, 0, 15, runtime.Signal_SIGNAL_SIGTERM},
		{"own", n.Busybox, runtime.Signal_SIGNAL_SIGHUP, 1, runtime.Signal_SIGNAL_SIGHUP},
		{"own over image", usr1, runtime.Signal_SIGNAL_SIGUSR2, 12, runtime.Signal_SIGNAL_SIGUSR2},
		{"own, real time", usr1, runtime.Signal_SIGNAL_SIGRTMINPLUS3, 37, runtime.Signal_SIGNAL_SIGRTMINPLUS3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			c := n.Pod(t, "pauseless", critest.HostNetwork).Run(script, image(tc.ref), func(c *runtime.ContainerConfig) { c.StopSignal = tc.own })
			logHas(t, c, "ready\n")
			if st := c.Status(); st.StopSignal != tc.signal {
				t.Errorf("stop signal %s, want %s", st.StopSignal, tc.signal)
			}
			c.Stop(30)
			if st := c.Status(); st.State != runtime.ContainerState_CONTAINER_EXITED || st.ExitCode != tc.code || st.Reason != "Error" {
				t.Errorf("%v, want exit %d", st, tc.code)
			}
		})
	}
}

// However often it is asked for, the stop signal comes once; who does not heed
// it is killed when the shortest of the periods is over.
//
// contract: 7.1.13, 13.26
func TestStopGrace(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run(`trap "echo asked" TERM; echo ready; while :; do sleep 0.05; done`)
		logHas(t, c, "ready\n")
		begin := time.Now()
		var all sync.WaitGroup
		for _, grace := range []int64{50, 40, 1, 50} {
			all.Go(func() { c.Stop(grace) })
		}
		all.Wait()
		took := time.Since(begin)
		if st := c.Status(); st.State != runtime.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 || st.Reason != "Error" {
			t.Errorf("%v", st)
		}
		if took < time.Second || took > 15*time.Second {
			t.Errorf("it took %v", took)
		}
		if out := c.Log(); out != "ready\nasked\n" {
			t.Errorf("%q", out)
		}
	})
}

// A client that goes away while it waits changes nothing for the next.
//
// contract: 7.1.13
func TestStopGivenUp(t *testing.T) {
	c := node(t).Pod(t, "pauseless").Run(`trap "echo asked" TERM; echo ready; while :; do sleep 0.05; done`)
	logHas(t, c, "ready\n")
	ctx, cancel := context.WithTimeout(critest.Context(t), 500*time.Millisecond)
	defer cancel()
	_, err := c.RT.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: c.ID, Timeout: 50})
	wantCode(t, "stop", err, codes.DeadlineExceeded)
	isState(t, c, runtime.ContainerState_CONTAINER_RUNNING)
	c.Stop(1)
	isState(t, c, runtime.ContainerState_CONTAINER_EXITED)
	if out := c.Log(); out != "ready\nasked\n" {
		t.Errorf("%q", out)
	}
}

// contract: 7.1.15
func TestListContainers(t *testing.T) {
	n := node(t)
	label := func(v string) func(*runtime.ContainerConfig) {
		return func(c *runtime.ContainerConfig) { c.Labels = map[string]string{"test": t.Name(), "which": v} }
	}
	p, q := n.Pod(t, "runc"), n.Pod(t, "pauseless")
	created, running, ended := p.Create("true", label("1")), p.Run("sleep 1000", label("2")), q.Run("true", label("1"))
	ended.Wait()
	st := func(s runtime.ContainerState) *runtime.ContainerStateValue {
		return &runtime.ContainerStateValue{State: s}
	}
	for name, tc := range map[string]struct {
		f    *runtime.ContainerFilter
		want []*critest.Container
	}{
		"label":                {&runtime.ContainerFilter{LabelSelector: map[string]string{"test": t.Name()}}, []*critest.Container{ended, running, created}},
		"labels":               {&runtime.ContainerFilter{LabelSelector: map[string]string{"test": t.Name(), "which": "1"}}, []*critest.Container{ended, created}},
		"no such label":        {&runtime.ContainerFilter{LabelSelector: map[string]string{"test": "other"}}, nil},
		"pod":                  {&runtime.ContainerFilter{PodSandboxId: p.ID}, []*critest.Container{running, created}},
		"beginning of a pod":   {&runtime.ContainerFilter{PodSandboxId: q.ID[:20]}, []*critest.Container{ended}},
		"unknown pod":          {&runtime.ContainerFilter{PodSandboxId: "unknown"}, nil},
		"id":                   {&runtime.ContainerFilter{Id: created.ID}, []*critest.Container{created}},
		"beginning of an id":   {&runtime.ContainerFilter{Id: running.ID[:20]}, []*critest.Container{running}},
		"id and another pod":   {&runtime.ContainerFilter{Id: created.ID, PodSandboxId: q.ID}, nil},
		"state created":        {&runtime.ContainerFilter{PodSandboxId: p.ID, State: st(runtime.ContainerState_CONTAINER_CREATED)}, []*critest.Container{created}},
		"state running":        {&runtime.ContainerFilter{PodSandboxId: p.ID, State: st(runtime.ContainerState_CONTAINER_RUNNING)}, []*critest.Container{running}},
		"state exited":         {&runtime.ContainerFilter{PodSandboxId: q.ID, State: st(runtime.ContainerState_CONTAINER_EXITED)}, []*critest.Container{ended}},
		"state of another":     {&runtime.ContainerFilter{Id: ended.ID, State: st(runtime.ContainerState_CONTAINER_RUNNING)}, nil},
		"pod, state and label": {&runtime.ContainerFilter{PodSandboxId: p.ID, State: st(runtime.ContainerState_CONTAINER_RUNNING), LabelSelector: map[string]string{"which": "2"}}, []*critest.Container{running}},
	} {
		l, err := n.RT.ListContainers(critest.Context(t), &runtime.ListContainersRequest{Filter: tc.f})
		if err != nil {
			t.Fatal(err)
		}
		var want, got, streamed []string
		for _, c := range tc.want {
			want = append(want, c.ID)
		}
		for _, c := range l.Containers {
			got = append(got, c.Id)
		}
		s, err := n.RT.StreamContainers(critest.Context(t), &runtime.StreamContainersRequest{Filter: tc.f})
		if err != nil {
			t.Fatal(err)
		}
		for {
			r, err := s.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range r.Containers {
				streamed = append(streamed, c.Id)
			}
		}
		if !slices.Equal(got, want) || !slices.Equal(streamed, want) {
			t.Errorf("%s: %q, streamed %q, want %q", name, got, streamed, want)
		}
	}
	l, err := n.RT.ListContainers(critest.Context(t), &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{Id: running.ID}})
	if err != nil || len(l.Containers) != 1 {
		t.Fatal(l, err)
	}
	c := l.Containers[0]
	if c.Metadata.Name != running.Config.Metadata.Name || c.PodSandboxId != p.ID || c.Image.Image != n.Busybox || c.ImageId == "" || c.ImageRef == "" || c.CreatedAt == 0 || c.Labels["which"] != "2" {
		t.Errorf("%v", c)
	}
}

// contract: 7.1.15
func TestVerboseContainer(t *testing.T) {
	p := node(t).Pod(t, "runc")
	c := p.Run("sleep 1000")
	info := describe(t, c)
	for _, key := range []string{"sandboxID", "pid", "removing", "snapshotKey", "snapshotter", "runtimeType", "runtimeOptions", "config", "runtimeSpec"} {
		if _, ok := info[key]; !ok {
			t.Errorf("no %s in %v", key, info)
		}
	}
	if info["sandboxID"] != p.ID || info["snapshotKey"] != c.ID || info["runtimeType"] != "io.containerd.runc.v2" || info["removing"] != false || info["snapshotter"] == "" {
		t.Errorf("%v", info)
	}
	if err := syscall.Kill(hostPid(t, c), 0); err != nil {
		t.Errorf("%v of %v", err, info["pid"])
	}
	r, err := c.RT.ContainerStatus(critest.Context(t), &runtime.ContainerStatusRequest{ContainerId: c.ID[:20]})
	if err != nil || r.Status.Id != c.ID || len(r.Info) != 0 {
		t.Errorf("by the beginning of its id: %v %v", r, err)
	}
}

// Without criu, nothing is attempted.
//
// contract: 7.1.23
func TestCheckpointRefused(t *testing.T) {
	n := node(t)
	c := n.Pod(t, "pauseless").Run("sleep 1000")
	begin := time.Now()
	_, err := n.RT.CheckpointContainer(critest.Context(t), &runtime.CheckpointContainerRequest{ContainerId: c.ID, Location: n.Dir + "/checkpoint.tar", Timeout: 20})
	if err == nil || time.Since(begin) > 15*time.Second || !strings.Contains(err.Error(), "criu") {
		t.Errorf("%v", err)
	}
	isState(t, c, runtime.ContainerState_CONTAINER_RUNNING)
	if out := c.Exec("echo alive"); out != "alive\n" {
		t.Errorf("%q", out)
	}
}
