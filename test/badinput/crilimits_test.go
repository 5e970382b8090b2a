package badinput

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/testimage"
)

// bounded puts the daemon, from its next start, into a memory cgroup of 256 MiB
// and returns what reads its highest use of memory that is its own.
func (k *kube) bounded(t *testing.T) {
	t.Helper()
	group, limit := "/sys/fs/cgroup/memory/"+k.Mark+"-limit", "memory.limit_in_bytes"
	if cgroup2() {
		group, limit = "/sys/fs/cgroup/"+k.Mark+"-limit", "memory.max"
	}
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Rmdir(group); err != nil {
			t.Errorf("the daemon's memory cgroup: %v", err)
		}
	})
	if err := os.WriteFile(filepath.Join(group, limit), []byte(strconv.Itoa(256<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	// The daemon alone: shims that it starts later would be in it as well, and
	// moving a process does not move what it has.
	if err := os.WriteFile(group+"/cgroup.procs", []byte(strconv.Itoa(k.Pid())), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // before the group goes
		if !cgroup2() {
			_ = os.WriteFile("/sys/fs/cgroup/memory/cgroup.procs", []byte(strconv.Itoa(k.Pid())), 0o600)
		} else {
			_ = os.WriteFile("/sys/fs/cgroup/cgroup.procs", []byte(strconv.Itoa(k.Pid())), 0o600)
		}
		procs, _ := os.ReadFile(group + "/cgroup.procs")
		for _, pid := range strings.Fields(string(procs)) {
			_ = os.WriteFile(filepath.Dir(group)+"/cgroup.procs", []byte(pid), 0o600)
		}
	})
}

// proc reads a number out of the daemon's status, in KiB.
func (k *kube) proc(t testing.TB, field string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", k.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.Atoi(strings.Fields(v)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s", field)
	return 0
}

// A command that prints 10 GB, and an image whose users are a line without an
// end, or millions: the daemon, which has 256 MiB, lives and keeps what it is
// allowed to (class C4).
//
// contract: 7.1.18
func TestMoreThanFits(t *testing.T) {
	k := startKube(t, "")
	p := k.Pod(t, "pauseless", critest.HostNetwork)
	users := map[string]string{}
	for name, body := range map[string][]byte{"line": bytes.Repeat([]byte("x"), 96<<20), "lines": bytes.Repeat([]byte("user:x:7:7::/:/bin/sh\n"), 4<<20)} {
		users[name] = k.Put(t, "users-"+name, ocispec.ImageConfig{}, testimage.File{Name: "etc", Dir: true, Mode: 0o755}, testimage.File{Name: "etc/passwd", Body: body}, testimage.File{Name: "etc/group", Body: body})
	}
	debug.FreeOSMemory() // the test's own
	c := p.Run("sleep 100000")
	k.bounded(t)
	before := k.d.inventory()

	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute) // machines are slow
	defer cancel()
	r, err := k.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"/bin/sh", "-c", "dd if=/dev/zero bs=1M count=10240 2>/dev/null; echo done >&2"}, Timeout: 230})
	if err != nil {
		t.Errorf("10 GB of output: %v", err)
	} else if r.ExitCode != 0 || len(r.Stdout) > 16<<20 || len(r.Stdout) < 1<<20 || string(r.Stderr) != "done\n" {
		t.Errorf("10 GB of output: exit %d, %d bytes of stdout, stderr %.100q", r.ExitCode, len(r.Stdout), r.Stderr)
	}
	t.Logf("10 GB of output in %v, at most %d MiB", time.Since(begin), k.proc(t, "VmHWM")/1024)
	for name, ref := range users {
		for _, user := range []string{"nobody-has-this", "user"} {
			made, err := p.TryCreate("true", func(c *ctrConfig) { c.Image.Image, c.Linux.SecurityContext.RunAsUsername = ref, user })
			if err != nil {
				rejected(t, "users of "+name, err, nil, codes.InvalidArgument, codes.NotFound, codes.OutOfRange, codes.ResourceExhausted)
				continue
			}
			if user == "nobody-has-this" || name == "line" {
				t.Errorf("users of %s: there is %s", name, user)
			}
			made.Remove()
		}
	}
	if rss := k.proc(t, "VmHWM"); rss > 256<<10 {
		t.Errorf("the daemon had %d KiB", rss)
	}
	k.unchanged(t, before)
}

// Clients that go away at any step of the way to a stream, a thousand times,
// leave no goroutine, file, thread or process.
//
// contract: 7.1.19, 7.1.20, 7.1.21
func TestAbortedStreams(t *testing.T) {
	k := startKube(t, "")
	p := k.Pod(t, "pauseless", critest.HostNetwork)
	c := p.Run("cat", func(c *ctrConfig) { c.Stdin = true })
	ctx := critest.Context(t)
	grant := map[string]func() (string, error){
		"exec": func() (string, error) {
			r, err := k.RT.Exec(ctx, &runtime.ExecRequest{ContainerId: c.ID, Cmd: []string{"/bin/cat"}, Stdin: true, Stdout: true})
			return r.GetUrl(), err
		},
		"attach": func() (string, error) {
			r, err := k.RT.Attach(ctx, &runtime.AttachRequest{ContainerId: c.ID, Stdin: true, Stdout: true})
			return r.GetUrl(), err
		},
		"portforward": func() (string, error) {
			r, err := k.RT.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: p.ID, Port: []int32{1}})
			return r.GetUrl(), err
		},
	}
	abort := func(kind string, step int) {
		t.Helper()
		raw, err := grant[kind]()
		if err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("tcp", u.Host)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		head := "POST " + u.Path + " HTTP/1.1\r\nHost: " + u.Host + "\r\n"
		spdy := head + "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nX-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n"
		ws := strings.Replace(head, "POST", "GET", 1) + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
		send := func(s string, answered bool) {
			if _, err := conn.Write([]byte(s)); err != nil {
				t.Fatal(err)
			}
			if !answered {
				return
			}
			r, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatalf("%s, step %d: %v", kind, step, err)
			}
			r.Body.Close()
			if r.StatusCode != http.StatusSwitchingProtocols && kind != "portforward" {
				t.Fatalf("%s, step %d: %s", kind, step, r.Status)
			}
		}
		switch step {
		case 0: // nothing is said
		case 1:
			send(head[:10], false)
		case 2:
			send(head+"Upgra", false)
		case 3:
			send(spdy, false)
		case 4:
			send(spdy, true)
		case 5:
			send(spdy, true)
			_, _ = conn.Write([]byte("\x80\x03\x00\x01\xff\xff\xff\xffgarbage"))
		case 6:
			send(ws, true)
		case 7:
			send(ws, true)
			_, _ = conn.Write([]byte("\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
		case 8: // half a frame of input
			send(ws, true)
			_, _ = conn.Write([]byte("\x82\x85\x00\x00\x00\x00\x00ab"))
		}
	}
	const steps = 9
	count := func() (fds, goroutines int) {
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", k.Pid()))
		if err != nil {
			t.Fatal(err)
		}
		return len(files), k.goroutines(t)
	}
	round := func() {
		for kind := range grant {
			for step := range steps {
				abort(kind, step)
			}
		}
	}
	round() // what is made once and kept
	var fds, goroutines int
	critest.Eventually(t, "rest before", func() bool {
		f, g := count()
		same := f == fds && g == goroutines
		fds, goroutines = f, g
		return same
	})
	begin := time.Now()
	for range 1000/(steps*3) + 1 {
		round()
	}
	t.Logf("%d aborted streams in %v", (1000/(steps*3)+1)*steps*3, time.Since(begin))
	var f, g int
	for deadline := time.Now().Add(40 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		if f, g = count(); f <= fds+4 && g <= goroutines+8 {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("the daemon had %d files and %d goroutines, it has %d and %d", fds, goroutines, f, g)
			break
		}
	}
	if out := c.Exec("ps | grep -c '[/]bin/cat$' || true"); strings.TrimSpace(out) != "0" {
		t.Errorf("processes of aborted execs: %s", out)
	}
	if out := c.Exec("echo alive"); out != "alive\n" {
		t.Errorf("exec afterwards: %q", out)
	}
}

// goroutines asks the daemon for its stacks and counts them.
func (k *kube) goroutines(t testing.TB) int {
	t.Helper()
	file := filepath.Join(os.TempDir(), fmt.Sprintf("gantry.%d.stacks.log", k.Pid()))
	_ = os.Remove(file)
	t.Cleanup(func() { os.Remove(file) })
	if err := syscall.Kill(k.Pid(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	n := 0
	critest.Eventually(t, "the stacks", func() bool {
		b, err := os.ReadFile(file)
		now := bytes.Count(b, []byte("\n\ngoroutine "))
		done := err == nil && now > 0 && now == n
		n = now
		return done
	})
	return n
}
