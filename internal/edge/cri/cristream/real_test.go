//go:build linux

package cristream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/websocket"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

var errNoContainer = fmt.Errorf("container: %w", errdefs.ErrNotFound)

const forever = "while true; do sleep 86399; done"

// contract: 7.1.18, 13.27
// promise: P17, C4
func TestExecSync(t *testing.T) {
	r := newRig(t)
	r.run("c1", false, false, forever)
	ctx := t.Context()
	t.Run("result", func(t *testing.T) {
		res, err := r.s.ExecSync(ctx, "c1", []string{"sh", "-c", "echo out $MARK; echo err >&2; exit 7"}, 10*time.Second)
		if err != nil || string(res.Stdout) != "out of-the-spec\n" || string(res.Stderr) != "err\n" || res.ExitCode != 7 {
			t.Errorf("%q %q %d %v", res.Stdout, res.Stderr, res.ExitCode, err)
		}
	})
	t.Run("bad", func(t *testing.T) {
		if _, err := r.s.ExecSync(ctx, "c1", nil, 0); !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}
		if _, err := r.s.ExecSync(ctx, "c1", []string{"true"}, -1); !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}
		if _, err := r.s.ExecSync(ctx, "none", []string{"true"}, 0); !errdefs.IsNotFound(err) {
			t.Error(err)
		}
		if _, err := r.s.ExecSync(ctx, "c1", []string{"/no/such/program"}, 0); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
			t.Error(err)
		}
	})
	t.Run("cap", func(t *testing.T) {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		const much = 256 << 20 // twice what the growth may be; test/badinput has 10 GB
		res, err := r.s.ExecSync(ctx, "c1", []string{"sh", "-c", fmt.Sprintf("head -c %d /dev/zero; echo end >&2", much)}, 2*time.Minute)
		runtime.ReadMemStats(&after)
		if err != nil || len(res.Stdout) != MaxOutput || string(res.Stderr) != "end\n" {
			t.Errorf("%d bytes, %q, %v", len(res.Stdout), res.Stderr, err)
		}
		if grown := int64(after.Sys) - int64(before.Sys); grown > 8*MaxOutput {
			t.Errorf("memory has grown by %d bytes", grown)
		}
	})
	t.Run("timeout", func(t *testing.T) {
		// One in the background, one in a session of its own, and one that has
		// lost its parent as well.
		script := "sleep 7001 & setsid sleep 7002 & (setsid sh -c '(sleep 7003; true) & sleep 7004' &) ; echo begun; echo bad >&2; sleep 7005"
		const timeout = time.Second
		began := time.Now()
		res, err := r.s.ExecSync(ctx, "c1", []string{"sh", "-c", script}, timeout)
		took := time.Since(began)
		if !errors.Is(err, context.DeadlineExceeded) || !errdefs.IsDeadlineExceeded(err) || !strings.Contains(err.Error(), "context deadline exceeded") || !strings.Contains(err.Error(), "begun") {
			t.Error(err)
		}
		if string(res.Stdout) != "begun\n" || string(res.Stderr) != "bad\n" {
			t.Errorf("%q %q", res.Stdout, res.Stderr)
		}
		if took < timeout || took > timeout+100*time.Millisecond && !slow() {
			t.Errorf("it took %v", took)
		}
		until(t, "all of the command has ended", func() bool { return processes("sleep 700") == 0 })
		if n := processes("sleep 86399"); n == 0 {
			t.Error("the container's own process was killed")
		}
	})
	t.Run("cancel", func(t *testing.T) {
		ctx, cancel := context.WithCancel(ctx)
		go func() {
			for processes("sleep 7101") == 0 && ctx.Err() == nil {
				time.Sleep(5 * time.Millisecond)
			}
			cancel()
		}()
		if _, err := r.s.ExecSync(ctx, "c1", []string{"sleep", "7101"}, time.Minute); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		until(t, "it has ended", func() bool { return processes("sleep 7101") == 0 })
	})
	t.Run("held open", func(t *testing.T) {
		// The command has ended, what it left in the background has its output.
		_, err := r.s.ExecSync(ctx, "c1", []string{"sh", "-c", "setsid sleep 7201 & echo x"}, time.Second)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		until(t, "it has ended", func() bool { return processes("sleep 7201") == 0 })
		s := r.service(r.v.Tasks(), 200*time.Millisecond)
		res, err := s.ExecSync(ctx, "c1", []string{"sh", "-c", "sleep 7202 & echo x"}, 10*time.Second)
		if err == nil || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "held open") || string(res.Stdout) != "x\n" {
			t.Errorf("%q %v", res.Stdout, err)
		}
	})
	t.Run("many", func(t *testing.T) {
		fds := countFDs(t)
		for i := range 20 {
			if _, err := r.s.ExecSync(ctx, "c1", []string{"sh", "-c", "sleep 7301 & exec true"}, 300*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(i, err)
			}
		}
		until(t, "all have ended", func() bool { return processes("sleep 7301") == 0 })
		until(t, "all FIFOs are closed", func() bool { return countFDs(t) <= fds })
		until(t, "only the cgroup in which sleep 7202 runs on is left", func() bool {
			if _, err := r.s.ExecSync(ctx, "c1", []string{"true"}, 10*time.Second); err != nil {
				t.Fatal(err)
			}
			var left []string
			for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
				some, _ := filepath.Glob(filepath.Join(dir, r.d.Mark, "c1", "exec-*"))
				left = append(left, some...)
			}
			return len(left) == 1
		})
	})
}

// slow reports whether this machine does too much else to be measured.
func slow() bool {
	b, err := os.ReadFile("/proc/loadavg")
	var load float64
	if err == nil {
		fmt.Sscan(string(b), &load)
	}
	return load > float64(runtime.NumCPU())/2
}

func countFDs(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// Both protocols, with and without a terminal.
// contract: 7.1.19
func TestRemote(t *testing.T) {
	r := newRig(t)
	r.run("c1", false, false, forever)
	for name, over := range map[string]func(*testing.T, string, string) *peer{"SPDY": overSPDY, "WebSocket": overWebSocket} {
		t.Run(name, func(t *testing.T) {
			got, err := r.srv.Exec(t.Context(), &cri.ExecRequest{ContainerId: "c1", Cmd: []string{"sh", "-c", "cat; echo err >&2; exit 3"}, Stdin: true, Stdout: true, Stderr: true})
			if err != nil {
				t.Fatal(err)
			}
			p := over(t, got.Url, "ioe")
			if _, err := io.WriteString(p.stdin, "in\n"); err != nil {
				t.Fatal(err)
			}
			p.stdin.Close()
			expect(t, p.stdout, "in\n")
			expect(t, p.stderr, "err\n")
			expect(t, p.status, `"reason":"NonZeroExitCode"`, `"causes":[{"reason":"ExitCode","message":"3"}]`)
			p.close()

			got, err = r.srv.Exec(t.Context(), &cri.ExecRequest{ContainerId: "c1", Cmd: []string{"sh", "-c", `read x; while [ "$(stty size)" != "37 91" ]; do sleep 0.01; done; echo $TERM $x; stty size`}, Stdin: true, Stdout: true, Tty: true})
			if err != nil {
				t.Fatal(err)
			}
			p = over(t, got.Url, "iot")
			if _, err := io.WriteString(p.resize, `{"Width":91,"Height":37}`); err != nil {
				t.Fatal(err)
			}
			// The size is on another stream than the input: it may come later.
			io.WriteString(p.stdin, "typed\n")
			expect(t, p.stdout, "typed", "xterm typed", "37 91")
			expect(t, p.status, `"status":"Success"`)
		})
	}
	t.Run("refused", func(t *testing.T) {
		for _, q := range []*cri.ExecRequest{{ContainerId: "c1", Stdout: true}, {ContainerId: "c1", Cmd: []string{"x"}}, {ContainerId: "c1", Cmd: []string{"x"}, Tty: true, Stdout: true, Stderr: true}} {
			if _, err := r.srv.Exec(t.Context(), q); !errdefs.IsInvalidArgument(err) {
				t.Error(q, err)
			}
		}
		if _, err := r.srv.Attach(t.Context(), &cri.AttachRequest{ContainerId: "none", Stdout: true}); !errdefs.IsNotFound(err) {
			t.Error(err)
		}
		got, err := r.srv.Exec(t.Context(), &cri.ExecRequest{ContainerId: "c1", Cmd: []string{"true"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := dialSPDY(strings.Replace(got.Url, "/exec/", "/attach/", 1), "v4.channel.k8s.io"); err == nil || !strings.Contains(err.Error(), "404") {
			t.Error(err)
		}
		if _, _, err := dialSPDY(got.Url, "v4.channel.k8s.io"); err == nil || !strings.Contains(err.Error(), "404") {
			t.Error("a token was good for two: ", err)
		}
	})
}

// expect reads until all texts were there.
func expect(t *testing.T, r io.Reader, texts ...string) {
	t.Helper()
	done := make(chan string, 1)
	go func() {
		var all strings.Builder
		b := make([]byte, 4096)
		for {
			n, err := r.Read(b)
			all.Write(b[:n])
			missing := false
			for _, x := range texts {
				missing = missing || !strings.Contains(all.String(), x)
			}
			if err != nil || !missing {
				if missing {
					done <- all.String()
				}
				close(done)
				return
			}
		}
	}()
	select {
	case got, bad := <-done:
		if bad {
			t.Errorf("%q does not contain all of %q", got, texts)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("waited in vain for %q", texts)
	}
}

// contract: 7.1.19
func TestAttach(t *testing.T) {
	r := newRig(t)
	r.run("echo", false, false, "while read l; do echo out $l; echo err $l >&2; done; "+forever)
	r.run("once", false, true, "echo before; cat; echo after; sleep 0.2; exit 4")
	r.run("tty", true, false, "while read l; do echo $(stty size) $l; done")
	for name, over := range map[string]func(*testing.T, string, string) *peer{"SPDY": overSPDY, "WebSocket": overWebSocket} {
		t.Run(name, func(t *testing.T) {
			got, err := r.srv.Attach(t.Context(), &cri.AttachRequest{ContainerId: "echo", Stdin: true, Stdout: true, Stderr: true})
			if err != nil {
				t.Fatal(err)
			}
			p := over(t, got.Url, "ioe")
			io.WriteString(p.stdin, "one "+name+"\n")
			expect(t, p.stdout, "out one "+name+"\n")
			expect(t, p.stderr, "err one "+name+"\n")
			// The kubelet takes the file away; the shim goes on in a new one.
			c := r.containers["echo"]
			if err := os.Rename(c.LogPath, c.LogPath+".20260101-"+name); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(c.LogPath, nil, 0o640); err != nil { // ReopenContainerLog
				t.Fatal(err)
			}
			io.WriteString(p.stdin, "two\n")
			expect(t, p.stdout, "out two\n")
			p.stdin.Close()
			expect(t, p.status, `"status":"Success"`)

			got, err = r.srv.Attach(t.Context(), &cri.AttachRequest{ContainerId: "tty", Stdin: true, Stdout: true, Tty: true})
			if err != nil {
				t.Fatal(err)
			}
			p = over(t, got.Url, "iot")
			io.WriteString(p.resize, `{"Width":93,"Height":31}`)
			stop := make(chan struct{})
			go func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(50 * time.Millisecond):
						io.WriteString(p.stdin, "x\n")
					}
				}
			}()
			expect(t, p.stdout, "31 93 x\r\n")
			close(stop)
		})
	}
	// Sizes for a container without a terminal keep nothing back.
	sized, err := r.srv.Attach(t.Context(), &cri.AttachRequest{ContainerId: "echo", Stdin: true, Stdout: true, Tty: true})
	if err != nil {
		t.Fatal(err)
	}
	np := overWebSocket(t, sized.Url, "iot")
	for range 3 {
		io.WriteString(np.resize, `{"Width":93,"Height":31}`)
	}
	io.WriteString(np.stdin, "three\n")
	expect(t, np.stdout, "out three\n")
	// A server that ends is not the end of the input.
	short, err := Listen(r.s, cristate.DefaultServerConfig())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- short.Run(ctx) }()
	first, err := short.Attach(t.Context(), &cri.AttachRequest{ContainerId: "once", Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	fp := overSPDY(t, first.Url, "io")
	io.WriteString(fp.stdin, "earlier input\n")
	expect(t, fp.stdout, "earlier input\n")
	stop()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	// It takes the input once, and the end of it.
	got, err := r.srv.Attach(t.Context(), &cri.AttachRequest{ContainerId: "once", Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	p := overSPDY(t, got.Url, "io")
	io.WriteString(p.stdin, "input\n")
	p.stdin.Close()
	expect(t, p.stdout, "input\nafter\n")
	expect(t, p.status, `"status":"Success"`)
}

// contract: 7.1.18, 7.1.19
func TestRecovery(t *testing.T) {
	r := newRig(t)
	r.run("c1", false, false, forever)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	dead := &mute{Tasks: r.v.Tasks()}
	s := r.service(dead, 0)
	go s.ExecSync(ctx, "c1", []string{"sleep", "7401"}, 0)
	until(t, "it runs", func() bool { return processes("sleep 7401") > 0 })
	// As if this process had been killed: what it does from now on has no effect.
	dead.off.Store(true)
	old, err := os.ReadDir(s.d.Dir)
	if err != nil || len(old) != 1 {
		t.Fatal(old, err)
	}
	d := s.d
	d.Tasks = r.v.Tasks()
	next, err := Open(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "it has ended", func() bool { return processes("sleep 7401") == 0 })
	if err := next.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(d.Dir + "/" + old[0].Name()); !os.IsNotExist(err) {
		t.Error(err)
	}
}

// A client that is slow to read, and whose input nobody wants, gets all of the
// output and the status: the end of the connection does not overtake them.
//
// contract: 7.1.19
func TestUnreadInput(t *testing.T) {
	r := newRig(t)
	r.run("c1", false, false, forever)
	const size = 300_000
	got, err := r.srv.Exec(t.Context(), &cri.ExecRequest{ContainerId: "c1", Cmd: []string{"sh", "-c", fmt.Sprintf("while [ ! -e /tmp/go ]; do sleep 0.01; done; head -c %d /dev/zero; exit 3", size)}, Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", strings.TrimPrefix(r.srv.URL(), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.(*net.TCPConn).SetReadBuffer(32 << 10)
	config, err := websocket.NewConfig("ws"+strings.TrimPrefix(got.Url, "http"), "http://x")
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = []string{"v5.channel.k8s.io"}
	ws, err := websocket.NewClient(config, c)
	if err != nil {
		t.Fatal(err)
	}
	ws.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	for b := make([]byte, 64<<10); ; {
		if err := websocket.Message.Send(ws, b); err != nil {
			break
		}
	}
	if err := os.WriteFile(filepath.Join(r.d.Dir, "rootfs/tmp/go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, "the command has ended", func() bool {
		left, err := os.ReadDir(r.s.d.Dir)
		return err == nil && len(left) == 0
	})
	ws.SetReadDeadline(time.Now().Add(20 * time.Second))
	printed, status := 0, ""
	for {
		var b []byte
		if err = websocket.Message.Receive(ws, &b); err != nil {
			break
		}
		switch {
		case len(b) > 0 && b[0] == 1:
			printed += len(b) - 1
		case len(b) > 0 && b[0] == 3:
			status += string(b[1:])
		}
	}
	if printed != size || !strings.Contains(status, `"message":"3"`) || err != io.EOF {
		t.Errorf("%d bytes of %d, status %q, and then %v", printed, size, status, err)
	}
}
