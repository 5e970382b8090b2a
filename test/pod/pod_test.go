//go:build linux

// Package pod runs the command line's part for Kubernetes against a node with
// real pods, as people at a terminal do.
package pod

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// binDir has gantryd and the shim, program is gantry.
var binDir, program string

// suite builds the command line first.
type suite struct{ m *testing.M }

func (s suite) Run() int {
	program = filepath.Join(binDir, "gantry")
	if _, err := os.Stat(program); err != nil {
		dir, err := os.MkdirTemp("", "gantry-cli")
		if err != nil {
			fmt.Println(err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "gantry")
		build := exec.Command("go", "build", "-o", program, "./cmd/gantry")
		build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Printf("%v: %v\n%s", build, err, out)
			return 1
		}
	}
	return s.m.Run()
}

func TestMain(m *testing.M) { os.Exit(critest.Main(suite{m}, "../..", &binDir)) }

// cli is the command line on a node.
type cli struct {
	*critest.Node
	t testing.TB
}

func (c cli) command(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(critest.Context(c.t), program, args...)
	cmd.Env = append(os.Environ(), "GANTRY_ADDRESS="+c.Address(), "GANTRY_NAMESPACE=", "CONTAINERD_NAMESPACE=", "TERM=xterm")
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// run returns what a command prints on both streams, and its exit code.
func (c cli) run(stdin string, args ...string) (out, errs string, code int) {
	c.t.Helper()
	cmd := c.command(args...)
	var o, e bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatalf("%v: %v", cmd, err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// ok returns what a command prints that must succeed in silence.
func (c cli) ok(args ...string) string {
	c.t.Helper()
	out, errs, code := c.run("", args...)
	if code != 0 || errs != "" {
		c.t.Fatalf("gantry %q: exit %d: %s%s", args, code, out, errs)
	}
	return out
}

// says checks what a mistake is told with.
func (c cli) says(code int, pattern string, args ...string) {
	c.t.Helper()
	out, errs, got := c.run("", args...)
	if got != code || !regexp.MustCompile("(?s)"+pattern).MatchString(errs) {
		c.t.Errorf("gantry %q: exit %d: %s%s\nwant exit %d and %s", args, got, out, errs, code, pattern)
	}
}

func want(t testing.TB, what, out string, patterns ...string) {
	t.Helper()
	for _, p := range patterns {
		if !regexp.MustCompile("(?m)" + p).MatchString(out) {
			t.Errorf("%s: no %s in\n%s", what, p, out)
		}
	}
}

// named gives a pod a name that a person would type.
func named(namespace, name string) func(*runtime.PodSandboxConfig) {
	return func(c *runtime.PodSandboxConfig) {
		c.Metadata.Namespace, c.Metadata.Name = namespace, name
		c.Labels["app"] = name
	}
}

func as(name string) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) { c.Metadata.Name, c.LogPath = name, name+"/0.log" }
}

// contract: 14.1
// promise: P52
func TestPods(t *testing.T) {
	n := critest.Run(t, binDir, "")
	c := cli{n, t}
	want(t, "an empty list", c.ok("pod", "ls"), `^NAMESPACE +NAME +STATE +READY +AGE +IP +HANDLER +ID$`)
	if out := c.ok("pod", "ls", "-o", "json"); out != "[]\n" {
		t.Errorf("no pods: %q", out)
	}
	web := n.Pod(t, "", named("default", "web-7d9c5b8f4"))
	main := web.Run("echo out; echo err >&2; echo begun; trap 'exit 3' TERM; while :; do sleep 0.1; done", as("main"))
	side := web.Run("exit 0", as("sidecar"))
	side.Wait()
	dns := n.Pod(t, "pauseless", named("kube-system", "dns"))
	cat := dns.Run("while read line; do echo got $line; done; exit 7", as("cat"), func(c *runtime.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })

	t.Run("ls", func(t *testing.T) {
		c := cli{n, t}
		out := c.ok("pod", "ls")
		want(t, "list", out, `^default +web-7d9c5b8f4 +ready +1/2 +\d+s +10\.88\.\d+\.\d+ +\(default\) +`+web.ID[:12]+`$`, `^kube-system +dns +ready +1/1 +\d+s +10\.88\.\d+\.\d+ +pauseless +`+dns.ID[:12]+`$`)
		var rows []struct {
			ID, Namespace, Name, State string
			IPs                        []string
			Running                    int
			Containers                 []struct{ Name, State, Image string }
		}
		if err := json.Unmarshal([]byte(c.ok("pod", "ls", "-o", "json")), &rows); err != nil {
			t.Fatal(err)
		}
		if len(rows) != 2 || rows[0].ID != web.ID || len(rows[0].IPs) != 2 || rows[0].Running != 1 || len(rows[0].Containers) != 2 || rows[0].Containers[1].State != "exited" || rows[0].Containers[0].Image != n.Busybox {
			t.Errorf("%+v", rows)
		}
		for _, args := range [][]string{{"-n", "kube-system"}, {"-l", "app=dns"}, {"dns"}, {"kube-system/dns"}, {dns.ID[:8]}} {
			if got := c.ok(append([]string{"pod", "ls", "-q"}, args...)...); got != dns.ID+"\n" {
				t.Errorf("%q: %q", args, got)
			}
		}
		// Of those that are named, only what the flags ask for.
		for _, args := range [][]string{{"--state", "stopped"}, {"--state", "stopped", "dns"}, {"-l", "app=dns", "web-7d9c5b8f4"}} {
			if got := c.ok(append([]string{"pod", "ls", "-q"}, args...)...); got != "" {
				t.Errorf("%q: %s", args, got)
			}
		}
		var ids []string
		if err := json.Unmarshal([]byte(c.ok("pod", "ls", "-A", "-n", "kube-system", "-q", "-o", "json")), &ids); err != nil || len(ids) != 2 {
			t.Errorf("%v %q", err, ids)
		}
		want(t, "help", c.ok("pod", "ls", "--help"), `-n, --namespace namespace +namespace of Kubernetes, such as kube-system \(all\)$`)
	})
	t.Run("inspect", func(t *testing.T) {
		c := cli{n, t}
		var list []struct {
			Status struct{ ID, State string }
			Info   struct {
				Info struct{ RuntimeType string }
			}
			Containers []struct {
				Status struct {
					Metadata struct{ Name string }
					LogPath  string
				}
				Info struct {
					Info struct{ SandboxID string }
				}
			}
		}
		if err := json.Unmarshal([]byte(c.ok("pod", "inspect", "web-7d9c5b8f4")), &list); err != nil {
			t.Fatal(err)
		}
		if len(list) != 1 || list[0].Status.ID != web.ID || list[0].Status.State != "SANDBOX_READY" || list[0].Info.Info.RuntimeType == "" || len(list[0].Containers) != 2 {
			t.Fatalf("%+v", list)
		}
		if m := list[0].Containers[0]; m.Status.Metadata.Name != "main" || m.Status.LogPath != main.LogFile() || m.Info.Info.SandboxID != web.ID {
			t.Errorf("%+v", m)
		}
	})
	t.Run("exec", func(t *testing.T) {
		c := cli{n, t}
		out, errs, code := c.run("ignored", "pod", "exec", "web-7d9c5b8f4", "-c", "main", "--", "/bin/sh", "-c", "echo o; echo e >&2; cat; exit 5")
		if out != "o\n" || errs != "e\n" || code != 5 {
			t.Errorf("%q %q %d", out, errs, code)
		}
		big := strings.Repeat("0123456789abcdef", 64<<10)
		if out, errs, code := c.run(big, "pod", "exec", "-i", "dns", "--", "/bin/cat"); out != big || errs != "" || code != 0 {
			t.Errorf("%d of %d bytes, %q, exit %d", len(out), len(big), errs, code)
		}
		c.says(127, `^gantry: exec in container `+cat.ID[:12]+`: .*no such file`, "pod", "exec", "dns", "--", "/bin/absent")
		c.says(126, `: exec: "/bin": is a directory`, "pod", "exec", "dns", "--", "/bin")
		screen := c.terminal(80, 24, "stty size; tty; exit 4\n", 4, "pod", "exec", "-it", "dns", "--", "/bin/sh")
		want(t, "a terminal", screen, `24 80`, `/dev/pts/`)
	})
	t.Run("attach", func(t *testing.T) {
		c := cli{n, t}
		cmd := c.command("pod", "attach", "dns")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		var out lockedBuffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		io.WriteString(in, "hello\n")
		critest.Eventually(t, "the answer", func() bool { return strings.Contains(out.String(), "got hello\n") })
		in.Close()
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 7 {
			t.Errorf("%v: %s", err, out.String())
		}
		cat.Wait()
	})
	t.Run("logs", func(t *testing.T) {
		c := cli{n, t}
		critest.Eventually(t, "the first lines", func() bool { return strings.Contains(main.Log(), "begun") })
		out, errs, code := c.run("", "pod", "logs", "web-7d9c5b8f4", "-c", "main")
		if out != "out\nbegun\n" || errs != "err\n" || code != 0 {
			t.Errorf("%q %q %d", out, errs, code)
		}
		// What the kubelet has put aside comes first.
		log := cat.LogFile()
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		fmt.Fprintln(w, "2026-01-02T15:04:05.000000001Z stdout F oldest")
		w.Close()
		for name, data := range map[string][]byte{log + ".20260102-150405.gz": z.Bytes(), log + ".20260103-150405": []byte("2026-01-03T15:04:05.000000001Z stdout F older\n"), log + ".unrelated": []byte("x\n")} {
			if err := os.WriteFile(name, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := c.ok("pod", "logs", "dns"); got != "oldest\nolder\ngot hello\n" {
			t.Errorf("%q", got)
		}
		if got := c.ok("pod", "logs", "--tail", "2", "dns"); got != "older\ngot hello\n" {
			t.Errorf("%q", got)
		}
		if got := c.ok("pod", "logs", "--since", "1h", "dns"); got != "got hello\n" {
			t.Errorf("%q", got)
		}
		// The same through the namespace of containers, though its task is gone.
		if got := c.ok("-n", "k8s.io", "logs", "kube-system/dns/cat"); got != "oldest\nolder\ngot hello\n" {
			t.Errorf("%q", got)
		}
	})
	t.Run("follow", func(t *testing.T) {
		c := cli{n, t}
		loop := dns.Run("i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done", as("loop"))
		cmd := c.command("pod", "logs", "-f", "-c", "loop", "dns")
		var out lockedBuffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		critest.Eventually(t, "a line", func() bool { return strings.Contains(out.String(), "line 3\n") })
		if err := os.Rename(loop.LogFile(), loop.LogFile()+".20260102-150405"); err != nil {
			t.Fatal(err)
		}
		if _, err := n.RT.ReopenContainerLog(critest.Context(t), &runtime.ReopenContainerLogRequest{ContainerId: loop.ID}); err != nil {
			t.Fatal(err)
		}
		before := strings.Count(out.String(), "\n")
		critest.Eventually(t, "lines of the new file", func() bool { return strings.Count(out.String(), "\n") > before+5 })
		loop.Stop(0)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, out.String())
		}
		for i, line := range strings.Split(strings.TrimSpace(out.String()), "\n") {
			if line != fmt.Sprintf("line %d", i+1) {
				t.Fatalf("line %d is %q", i+1, line)
			}
		}
	})
	t.Run("port-forward", func(t *testing.T) {
		c := cli{n, t}
		dns.Run("while :; do echo hello from the pod | nc -l -p 8000; done", as("server"))
		cmd := c.command("pod", "port-forward", "dns", ":8000", ":8001")
		var out, errs lockedBuffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var to [][]string
		critest.Eventually(t, "the addresses", func() bool {
			to = regexp.MustCompile(`(?m)^(127\.0\.0\.1:\d+) -> kube-system/dns:800\d$`).FindAllStringSubmatch(out.String(), -1)
			return len(to) == 2
		})
		ask := func(address string) string {
			conn, err := net.DialTimeout("tcp", address, 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			b, _ := io.ReadAll(io.LimitReader(conn, 1<<10))
			return string(b)
		}
		for range 2 {
			critest.Eventually(t, "the server's greeting", func() bool { return ask(to[0][1]) == "hello from the pod\n" })
		}
		ask(to[1][1])
		critest.Eventually(t, "a word about the closed port", func() bool {
			return strings.Contains(errs.String(), "port 8001 of pod kube-system/dns: ")
		})
		cmd.Process.Signal(syscall.SIGINT)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, errs.String())
		}
		cmd = c.command("pod", "port-forward", "-o", "json", "dns", ":8000")
		line, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var row struct {
			Address, Pod string
			Port         int
		}
		if err := json.NewDecoder(line).Decode(&row); err != nil || row.Pod != "kube-system/dns" || row.Port != 8000 || !strings.HasPrefix(row.Address, "127.0.0.1:") {
			t.Errorf("%v %+v", err, row)
		}
		cmd.Process.Signal(syscall.SIGINT)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	t.Run("stats", func(t *testing.T) {
		c := cli{n, t}
		want(t, "stats", c.ok("pod", "stats", "--no-stream", "--containers"), `^NAMESPACE +NAME +CPU +MEMORY +PIDS`, `^default +web-7d9c5b8f4 +\d+\.\d% +\d`, `^default +  main +\d+\.\d% +\d`)
		var rows []struct {
			Name   string
			Memory uint64 `json:"memory_working_set"`
		}
		if err := json.Unmarshal([]byte(c.ok("pod", "stats", "--no-stream", "-o", "json", "web-7d9c5b8f4")), &rows); err != nil || len(rows) != 1 || rows[0].Memory == 0 {
			t.Errorf("%v %+v", err, rows)
		}
		// What uses the host's network has none to count.
		host := n.Pod(t, "pauseless", named("kube-system", "proxy"), critest.HostNetwork)
		host.Run("sleep 1000", as("main"))
		out := c.ok("pod", "stats", "--no-stream", "-o", "json", "proxy")
		if !strings.Contains(out, `"processes": `) || strings.Contains(out, "received_bytes") {
			t.Error(out)
		}
		want(t, "stats of containers", c.ok("-n", "k8s.io", "stats", "--no-stream"), `^ID +POD AND CONTAINER +CPU`, `^`+main.ID[:12]+` +default/web-7d9c5b8f4/main +\d`, `^`+web.ID[:12]+` +default/web-7d9c5b8f4 \(pause\) +\d`)
	})
	t.Run("the same in containers and images", func(t *testing.T) {
		c := cli{n, t}
		out := c.ok("-n", "k8s.io", "ps")
		want(t, "ps", out, `^ID +POD AND CONTAINER +IMAGE`, `^`+main.ID[:12]+` +default/web-7d9c5b8f4/main `)
		if strings.Contains(out, "pause") || strings.Contains(out, "sidecar") {
			t.Error(out)
		}
		want(t, "ps -a", c.ok("-n", "k8s.io", "ps", "-a"), `^`+web.ID[:12]+` +default/web-7d9c5b8f4 \(pause\) `, ` default/web-7d9c5b8f4/sidecar +`+regexp.QuoteMeta(n.Busybox)+` .* exited \(0\) `)
		if got := c.ok("-n", "k8s.io", "exec", "default/web-7d9c5b8f4/main", "/bin/echo", "hi"); got != "hi\n" {
			t.Error(got)
		}
		want(t, "inspect", c.ok("-n", "k8s.io", "inspect", main.ID[:12]), `"log": "`+main.LogFile()+`"`, `"namespace": "k8s.io"`)
		images := c.ok("-n", "k8s.io", "images", "-q")
		if strings.Count(images, "\n") != 2 || !strings.Contains(images, n.Busybox+"\n") || !strings.Contains(images, n.Pause+"\n") {
			t.Error("not every image once: " + images)
		}
		if all := c.ok("-n", "k8s.io", "images", "-q", "-a"); strings.Count(all, "\n") != 6 || !strings.Contains(all, "@sha256:") {
			t.Error("not every record: " + all)
		}
		c.says(125, `hint: it is in namespace k8s.io`, "logs", main.ID[:12])
		c.says(125, `hint: it is in namespace k8s.io`, "inspect", n.Busybox)
		c.says(125, `hint: list all containers with: gantry -n k8s.io ps -a`, "-n", "k8s.io", "stop", "something-else")
		c.says(125, `hint: did you mean default/web-7d9c5b8f4/main\?`, "-n", "k8s.io", "logs", "default/web-7d9c5b8f4")
		c.says(125, `hint: did you mean default/web-7d9c5b8f4/sidecar\?`, "-n", "k8s.io", "logs", "default/web-7d9c5b8f4/sidecat")
		c.says(125, `hint: stop it first \(gantry -n k8s.io stop `+main.ID[:12]+`\)`, "-n", "k8s.io", "rm", "default/web-7d9c5b8f4/main")
		c.says(125, `it is not running.*hint: it is of a pod, see: gantry pod ls default/web-7d9c5b8f4`, "-n", "k8s.io", "exec", "default/web-7d9c5b8f4/sidecar", "ls")
	})
	t.Run("mistakes", func(t *testing.T) {
		c := cli{n, t}
		c.says(125, `pod "web-7d9c5b8f5": not found\nhint: did you mean web-7d9c5b8f4\?`, "pod", "logs", "web-7d9c5b8f5")
		c.says(125, `did you mean web-7d9c5b8f4\?`, "pod", "inspect", "web")
		c.says(125, `hint: list all pods with: gantry pod ls`, "pod", "stop", "something-else")
		c.says(125, `hint: it is in namespace kube-system: say kube-system/dns`, "pod", "ls", "-n", "default", "dns")
		c.says(125, `several containers.*hint: choose one with -c: main, sidecar`, "pod", "logs", "web-7d9c5b8f4")
		c.says(125, `container "x".*hint: it has: main, sidecar`, "pod", "logs", "-c", "x", "web-7d9c5b8f4")
		c.says(125, `it is not running, but exited.*hint: see why: gantry pod logs -c sidecar default/web-7d9c5b8f4`, "pod", "exec", "web-7d9c5b8f4", "-c", "sidecar", "--", "ls")
		c.says(125, `it is not running`, "pod", "attach", "web-7d9c5b8f4", "-c", "sidecar")
		c.says(125, `no command is given.*hint: for example: gantry pod exec -it dns -- sh`, "pod", "exec", "dns")
		c.says(2, `unknown shorthand flag.*hint: flags of the command go behind --`, "pod", "exec", "dns", "ls", "-l")
		want(t, "an empty list", c.terminal(120, 24, "", 0, "ps"), `hint: namespace k8s.io has some: gantry -n k8s.io ps, or gantry ps -A`)
		want(t, "an empty list", c.terminal(120, 24, "", 0, "images"), `hint: namespace k8s.io has some: gantry -n k8s.io images, or gantry images -A`)
		c.says(125, `port "http".*hint: use LOCAL:REMOTE`, "pod", "port-forward", "dns", "http")
		c.says(125, `it is ready.*hint: stop it first \(gantry pod stop default/web-7d9c5b8f4\), or use rm --force`, "pod", "rm", "web-7d9c5b8f4")
		c.says(125, `standard input is not a terminal`, "pod", "exec", "-it", "dns", "--", "sh")
		c.says(2, `hint: see: gantry pod logs --help`, "pod", "logs")
		c.says(2, `unknown command "lst"`, "pod", "lst")
	})
	t.Run("widths", func(t *testing.T) {
		c := cli{n, t}
		long := "payments-7d9c5b8f4-of-a-team-that-has-a-long-name"
		n.Pod(t, "pauseless", named("default", long))
		want(t, "nothing is cut", c.terminal(80, 24, "", 0, "pod", "ls", "--no-trunc"), `^default +`+long+` .* [0-9a-f]{64}\r?$`)
		want(t, "nothing is cut", c.terminal(80, 24, "", 0, "-n", "k8s.io", "ps", "--no-trunc"), `^`+main.ID+` +default/web-7d9c5b8f4/main +\S+/busybox:1 .*; done +running `)
		for _, width := range []int{80, 200} {
			for _, args := range [][]string{{"pod", "ls"}, {"pod", "stats", "--no-stream"}, {"pod", "stats", "--no-stream", "--containers"}, {"-n", "k8s.io", "ps", "-a"}, {"-n", "k8s.io", "stats", "--no-stream"}, {"-n", "k8s.io", "images"}} {
				screen := c.terminal(width, 24, "", 0, args...)
				t.Logf("%d cells: gantry %s\n%s", width, strings.Join(args, " "), screen)
				for line := range strings.Lines(screen) {
					if l := len([]rune(strings.TrimRight(line, "\r\n"))); l > width {
						t.Errorf("%q at %d: a line has %d cells", args, width, l)
					}
				}
			}
		}
	})
	t.Run("complete", func(t *testing.T) {
		c := cli{n, t}
		for args, want := range map[string]string{"pod logs ": "dns\nweb-7d9c5b8f4\n:4\n", "pod exec web-7d9c5b8f4 -c ": "main\nsidecar\n:4\n", "pod rm dns ": "dns\nweb-7d9c5b8f4\n:4\n", "pod logs kube-system/": "default/web-7d9c5b8f4\nkube-system/dns\n:4\n", "pod ls -n ": "default\nkube-system\n:4\n"} {
			if out, _, _ := c.run("", append([]string{"__complete"}, strings.Split(args, " ")...)...); out != want {
				t.Errorf("%q: %q", args, out)
			}
		}
	})
	t.Run("stop and rm", func(t *testing.T) {
		c := cli{n, t}
		if out := c.ok("pod", "stop", "web-7d9c5b8f4"); out != "default/web-7d9c5b8f4\n" {
			t.Error(out)
		}
		if st := main.Status(); st.State != runtime.ContainerState_CONTAINER_EXITED {
			t.Error(st.State)
		}
		want(t, "list", c.ok("pod", "ls"), `^default +web-7d9c5b8f4 +stopped +0/2 `)
		want(t, "its pause container", c.ok("-n", "k8s.io", "ps", "-a"), `^`+web.ID[:12]+` +default/web-7d9c5b8f4 \(pause\) .* exited `)
		c.says(125, `it is stopped.*hint: list those that are ready`, "pod", "port-forward", "web-7d9c5b8f4", ":80")
		if out := c.ok("pod", "rm", "-o", "json", "web-7d9c5b8f4"); out != "[\n  \"default/web-7d9c5b8f4\"\n]\n" {
			t.Error(out)
		}
		c.ok("pod", "rm", "-f", "kube-system/dns", "absent")
		if out := c.ok("pod", "ls", "-q"); out != "" {
			t.Error(out)
		}
	})
}

// contract: 14.1
func TestNoKubernetes(t *testing.T) {
	n, err := critest.NewNode(binDir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	n.CRI = false
	if err := n.Daemon.Configure(4, ""); err != nil {
		t.Fatal(err)
	}
	if err := n.Daemon.Start(); err != nil {
		t.Fatal(err)
	}
	c := cli{n, t}
	c.says(125, `does not serve Kubernetes.*hint: its configuration disables io\.containerd\.grpc\.v1\.cri`, "pod", "ls")
	if err := n.Stop(); err != nil {
		t.Fatal(err)
	}
	c.says(125, `hint: is gantryd running\?`, "pod", "ls")
}

// lockedBuffer is written by a command while a test reads it.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// terminal runs a command on a terminal of a size, types, and returns what the
// screen got.
func (c cli) terminal(width, height int, typed string, code int, args ...string) string {
	c.t.Helper()
	pty, path, err := console.NewPty()
	if err != nil {
		c.t.Fatal(err)
	}
	defer pty.Close()
	if err := pty.Resize(console.WinSize{Width: uint16(width), Height: uint16(height)}); err != nil {
		c.t.Fatal(err)
	}
	tty, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	cmd := c.command(args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = cmd.Start()
	tty.Close()
	if err != nil {
		c.t.Fatal(err)
	}
	screen := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(pty, 1<<20)) // EIO is a terminal's end
		screen <- string(b)
	}()
	io.WriteString(pty, typed)
	cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != code {
		c.t.Errorf("gantry %q on a terminal: exit %d, want %d", args, got, code)
	}
	return <-screen
}
