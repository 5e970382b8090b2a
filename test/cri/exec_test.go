//go:build linux

package cri

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// execSync executes a script. A timeout of more than some seconds is not what a
// test is about.
func execSync(c *critest.Container, timeout int64, script string) (*runtime.ExecSyncResponse, error) {
	if timeout > 5 {
		timeout = critest.Slow(timeout)
	}
	return c.RT.ExecSync(critest.Context(c.T), &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"/bin/sh", "-c", script}, Timeout: timeout})
}

// running counts the processes on the host with a text in their arguments.
func running(text string) (n int) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(bytes.ReplaceAll(b, []byte{0}, []byte{' '}), []byte(text)) {
			n++
		}
	}
	return n
}

// contract: 7.1.18
func TestExecSync(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run("sleep 1000", func(c *runtime.ContainerConfig) {
			c.WorkingDir, c.Envs = "/tmp", []*runtime.KeyValue{{Key: "MARK", Value: []byte("of the container")}}
		})
		for _, tc := range []struct {
			script, out, err string
			code             int32
		}{
			{"echo out; echo err >&2", "out\n", "err\n", 0},
			{"exit 3", "", "", 3},
			{"kill -9 $$", "", "", 137},
			{`printf "$MARK in $PWD, no input: "; cat`, "of the container in /tmp, no input: ", "", 0},
			{"test -t 0 || test -t 1 || echo no terminal", "no terminal\n", "", 0},
		} {
			r, err := execSync(c, 30, tc.script)
			if err != nil || string(r.Stdout) != tc.out || string(r.Stderr) != tc.err || r.ExitCode != tc.code {
				t.Errorf("%s: %v %v", tc.script, r, err)
			}
		}
		// No timeout is none.
		if r, err := execSync(c, 0, "sleep 0.3; echo done"); err != nil || string(r.Stdout) != "done\n" {
			t.Errorf("%v %v", r, err)
		}
		for what, cmd := range map[string][]string{"no such program": {"/no/such/program"}, "nothing": nil, "an empty name": {""}} {
			if r, err := c.RT.ExecSync(critest.Context(t), &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: cmd, Timeout: 10}); err == nil {
				t.Errorf("%s: %v", what, r)
			}
		}
		var all sync.WaitGroup
		for i := range 16 {
			all.Go(func() {
				if r, err := execSync(c, 50, fmt.Sprintf("echo %d; exit %[1]d", i)); err != nil || string(r.Stdout) != fmt.Sprintln(i) || r.ExitCode != int32(i) {
					t.Errorf("%d: %v %v", i, r, err)
				}
			})
		}
		all.Wait()
		c.Stop(0)
		_, err := execSync(c, 10, "true")
		wantCode(t, "in one that has ended", err, codes.FailedPrecondition)
		_, err = execSync(p.Create("true"), 10, "true")
		wantCode(t, "in one that was not started", err, codes.FailedPrecondition)
		c.Remove()
		_, err = execSync(c, 10, "true")
		wantCode(t, "in an unknown one", err, codes.NotFound)
	})
}

// At the timeout all is dead that the command has started, in whatever session
// or group it is, and the answer comes at once, in the words that probes know.
//
// contract: 13.27, 7.1.18
// promise: P17
func TestExecSyncTimeout(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run("sleep 1000")
		mark := fmt.Sprintf("3%09d", time.Now().UnixNano()%1e9)
		script := ""
		if cgroup2() || !strings.HasSuffix(t.Name(), "/crun") { // it puts an exec into a group of its own with version 2 only
			script = "(setsid sleep MARK </dev/null >/dev/null 2>&1 &); "
		}
		script = strings.ReplaceAll(script+`sleep MARK & setsid sleep MARK & (setsid sh -c "sleep MARK & sleep MARK" &) ; nohup sleep MARK >/dev/null 2>&1 </dev/null & trap "" TERM INT HUP; echo partial; sleep MARK`, "MARK", mark)
		begin := time.Now()
		r, err := execSync(c, 1, script)
		took := time.Since(begin)
		if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "context deadline exceeded") {
			t.Errorf("%v %v", r, err)
		}
		if took < time.Second || took > critest.Slow(6*time.Second) {
			t.Errorf("it took %v", took)
		}
		critest.Eventually(t, "the end of all that it started", func() bool { return running("sleep "+mark) == 0 })
		if d := time.Since(begin); d > critest.Slow(8*time.Second) {
			t.Errorf("all was dead after %v", d)
		}
		isState(t, c, runtime.ContainerState_CONTAINER_RUNNING)

		// So it is when the kubelet gives up.
		ctx, cancel := context.WithTimeout(critest.Context(t), 500*time.Millisecond)
		defer cancel()
		_, err = c.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"/bin/sh", "-c", script}})
		wantCode(t, "given up", err, codes.DeadlineExceeded)
		critest.Eventually(t, "the end of all that it started", func() bool { return running("sleep "+mark) == 0 })
		if out := c.Exec("echo alive"); out != "alive\n" {
			t.Errorf("%q", out)
		}
	})
}

// contract: 7.1.18
func TestExecSyncOutput(t *testing.T) {
	c := node(t).Pod(t, "pauseless").Run("sleep 1000")
	const most = 16<<20 - 1024 // with the rest of the message, it is what a kubelet takes
	r, err := execSync(c, 50, "head -c 20000000 /dev/zero; echo end >&2; exit 4")
	if err != nil || len(r.Stdout)+len(r.Stderr) != most || string(r.Stderr) != "end\n" || r.ExitCode != 4 {
		t.Errorf("%d, %q, %d: %v", len(r.GetStdout()), r.GetStderr(), r.GetExitCode(), err)
	}
	r, err = execSync(c, 50, "head -c 100000000 /dev/zero | tee /dev/stderr")
	if err != nil || len(r.Stdout) != most/2 || len(r.Stderr) != most/2 {
		t.Errorf("%d, %d: %v", len(r.GetStdout()), len(r.GetStderr()), err)
	}
}

// What a command leaves running may hold its output open: that is waited for,
// or for as long as is configured.
//
// contract: 7.1.18
func TestExecSyncDrain(t *testing.T) {
	c := node(t).Pod(t, "pauseless").Run("sleep 1000")
	begin := time.Now()
	if r, err := execSync(c, 30, "(sleep 1; echo late) & echo early"); err != nil || string(r.Stdout) != "early\nlate\n" || time.Since(begin) < time.Second {
		t.Errorf("after %v: %v %v", time.Since(begin), r, err)
	}
	if r, err := execSync(c, 30, "sleep 1000 >/dev/null 2>&1 & echo early"); err != nil || string(r.Stdout) != "early\n" {
		t.Errorf("after %v: %v %v", time.Since(begin), r, err)
	}
	begin = time.Now()
	_, err := execSync(c, 1, "sleep 1000 & echo early")
	wantCode(t, "held open for ever", err, codes.DeadlineExceeded)
	if d := time.Since(begin); d > critest.Slow(15*time.Second) {
		t.Errorf("it took %v", d)
	}

	n := critest.Run(t, binDir, "drain_exec_sync_io_timeout = '500ms'")
	c = n.Pod(t, "pauseless").Run("sleep 1000")
	begin = time.Now()
	_, err = execSync(c, 50, "sleep 1000 & echo early")
	if d := time.Since(begin); err == nil || status.Code(err) == codes.DeadlineExceeded || d < 500*time.Millisecond {
		t.Errorf("after %v: %v", d, err)
	}
}
