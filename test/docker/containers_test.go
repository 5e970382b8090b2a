//go:build linux

package docker

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// What people do with containers.
func TestContainers(t *testing.T) { // contract: 14.3
	stores(t, func(t *testing.T, h *host) {
		events, err := os.Create(h.dir + "/events")
		if err != nil {
			t.Fatal(err)
		}
		defer events.Close()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		listen := h.command(ctx, "events", "--format", "{{.Type}} {{.Action}} {{.Actor.Attributes.name}}")
		listen.Stdout = events
		if err := listen.Start(); err != nil {
			t.Fatal(err)
		}
		t.Run("run", func(t *testing.T) { h.t = t; runs(h) })
		t.Run("life", func(t *testing.T) { h.t = t; life(h) })
		t.Run("ends", func(t *testing.T) { h.t = t; ends(h) })
		h.t = t
		seen := ""
		h.eventually("the last event", func() bool {
			b, _ := os.ReadFile(events.Name())
			seen = string(b)
			return strings.Contains(seen, "container destroy health\n")
		})
		cancel()
		listen.Wait()
		for _, e := range []string{"create", "start", "die", "pause", "unpause", "exec_die", "destroy"} {
			h.has("events", seen, "container "+e+" main\n")
		}
		h.has("events", seen, "container oom oom\n")
		h.has("events", seen, "container health_status: healthy health\n")
	})
}

func runs(h *host) {
	h.eq("run", h.run(h.image), "hello from yes\ngreetings")
	for code, command := range map[int][]string{7: {"sh", "-c", "exit 7"}, 127: {"/nonexistent"}, 126: {"/etc/passwd"}} {
		for _, init := range []string{"--init=true", "--init=false"} {
			if out, got := h.try(append([]string{"run", "--rm", "--network", "none", init, h.image}, command...)...); got != code {
				h.t.Errorf("%s %q: %d, not %d: %s", init, command, got, code, out)
			}
		}
	}
	if out, code := h.tryWith(strings.Repeat("x", 3<<20), "run", "-i", "--rm", "--network", "none", h.image, "sh", "-c", "cat | tee /tmp/x | wc -c; cat /tmp/x | wc -c >&2"); code != 0 || strings.Count(out, "3145728") != 2 {
		h.t.Errorf("3 MiB of input: %d, %q", code, out)
	}
	dir := h.dir + "/volume"
	if err := os.Mkdir(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/in", []byte("from the host"), 0o600); err != nil {
		h.t.Fatal(err)
	}
	h.docker("volume", "create", "named")
	for _, c := range []struct {
		args    string
		command []string
		want    string
	}{
		{"--user user", []string{"id"}, "uid=1000(user) gid=1000(user) groups=1000(user),2000(extra)"},
		{"--user 7:8 --group-add 9", []string{"id", "-G"}, "8 9"},
		{"--read-only --tmpfs /tmp", []string{"sh", "-c", "exec 2>&1; echo x >/x || echo y >/tmp/y && cat /tmp/y"}, "sh: can't create /x: Read-only file system\ny"},
		{"--memory 64m", limit("memory/memory.limit_in_bytes", "memory.max"), "67108864"},
		{"--pids-limit 33", limit("pids/pids.max", "pids.max"), "33"},
		{"--init", []string{"cat", "/proc/1/comm"}, "docker-init"},
		{"-v " + dir + ":/v", []string{"sh", "-c", "cat /v/in; echo out >/v/out"}, "from the host"},
		{"-v named:/v", []string{"sh", "-c", "echo kept >/v/x"}, ""},
		{"-v named:/v:ro", []string{"sh", "-c", "exec 2>&1; cat /v/x; echo no >/v/x || true"}, "kept\nsh: can't create /v/x: Read-only file system"},
		{"-h name", []string{"hostname"}, "name"},
		{"--sysctl net.ipv4.ip_forward=1", []string{"cat", "/proc/sys/net/ipv4/ip_forward"}, "1"},
		{"--ulimit nofile=1000:1000", []string{"sh", "-c", "ulimit -n"}, "1000"},
		{"--cap-drop ALL", []string{"sh", "-c", "grep CapEff /proc/self/status | cut -f 2"}, "0000000000000000"},
		{"--device /dev/null:/dev/other", []string{"sh", "-c", "test -c /dev/other && echo it is"}, "it is"},
		{"--shm-size 10m", []string{"sh", "-c", "df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2"}, "10240"},
		{"-e A=B -w /tmp", []string{"sh", "-c", "echo $A; pwd"}, "B\n/tmp"},
		{"-t", []string{"tty"}, "/dev/pts/0"},
	} {
		got := h.run(append(append(strings.Fields(c.args), h.image), c.command...)...)
		h.eq(c.args, strings.ReplaceAll(got, "\r", ""), c.want)
	}
	if b, err := os.ReadFile(dir + "/out"); err != nil || string(b) != "out\n" {
		h.t.Errorf("what a container has written: %q, %v", b, err)
	}
	// -it, with a terminal of its own.
	script := exec.Command("script", "-qec", strings.Join(h.command(context.Background(), "run", "-it", "--rm", "--network", "none", h.image, "sh", "-c", "'tty; read x; echo got $x'").Args, " "), "/dev/null")
	script.Stdin = strings.NewReader("typed\n")
	if out, err := script.CombinedOutput(); err != nil || !strings.Contains(string(out), "/dev/pts/0") || !strings.Contains(string(out), "got typed") {
		h.t.Errorf("run -it: %v: %s", err, out)
	}
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			if out, code := h.try("run", "--rm", "--network", "none", h.image); code != 0 {
				h.t.Errorf("side by side: %d: %s", code, out)
			}
		})
	}
	wg.Wait()
}

// loop is a command that prints up and obeys SIGTERM with status 3.
var loop = []string{"sh", "-c", `trap "echo down; exit 3" TERM; echo up; while :; do sleep 0.1; done`}

func life(h *host) {
	h.start("main", append([]string{h.image}, loop...)...)
	h.eventually("its output", func() bool { return h.docker("logs", "main") == "up" })
	h.has("ps", h.docker("ps", "--format", "{{.Names}} {{.Status}}"), "main Up")
	h.eq("exec", h.docker("exec", "-u", "1000", "-w", "/tmp", "-e", "A=B", "main", "sh", "-c", "id -u; pwd; echo $A"), "1000\n/tmp\nB")
	for code, command := range map[int]string{9: "exit 9", 137: "kill -9 $$", 0: ":"} {
		if out, got := h.try("exec", "main", "sh", "-c", command); got != code {
			h.t.Errorf("exec %s: %d: %s", command, got, out)
		}
	}
	if out, code := h.try("exec", "main", "nonexistent"); code != 126 && code != 127 || !strings.Contains(out, "not found") {
		h.t.Errorf("exec: %d: %s", code, out)
	}
	if out, code := h.tryWith("typed", "exec", "-i", "main", "cat"); code != 0 || out != "typed" {
		h.t.Errorf("exec -i: %d: %s", code, out)
	}
	h.has("exec -t", h.docker("exec", "-t", "main", "tty"), "/dev/pts/")
	h.docker("exec", "-d", "main", "sleep", "1234")
	h.eventually("an exec of its own", func() bool { return strings.Contains(h.docker("top", "main"), "sleep 1234") })
	h.has("stats", h.docker("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}", "main"), "iB /")

	h.docker("pause", "main")
	h.eq("paused", h.state("main", "{{.State.Status}}"), "paused")
	if out, code := h.try("exec", "main", "true"); code == 0 || !strings.Contains(out, "paused") {
		h.t.Errorf("exec while paused: %d: %s", code, out)
	}
	h.docker("unpause", "main")
	h.eq("unpaused", h.state("main", "{{.State.Status}}"), "running")
	h.docker("update", "--memory", "100m", "--memory-swap", "200m", "--pids-limit", "50", "main")
	h.eq("memory", h.docker(append([]string{"exec", "main"}, limit("memory/memory.limit_in_bytes", "memory.max")...)...), "104857600")
	h.eq("pids", h.docker(append([]string{"exec", "main"}, limit("pids/pids.max", "pids.max")...)...), "50")

	h.docker("exec", "main", "sh", "-c", "echo written >/data/new")
	h.has("diff", h.docker("diff", "main"), "A /data/new")
	h.docker("cp", "main:/data/new", h.dir+"/copy")
	h.docker("cp", h.dir+"/copy", "main:/data/back")
	h.eq("cp", h.docker("exec", "main", "cat", "/data/back"), "written")
	h.docker("commit", "main", "committed")
	h.eq("commit", h.run("committed", "cat", "/data/new"), "written")
	out, err := exec.Command("sh", "-c", strings.Join(h.command(context.Background(), "export", "main").Args, " ")+" | tar -xO data/new").CombinedOutput()
	if err != nil || string(out) != "written\n" {
		h.t.Errorf("export: %v: %s", err, out)
	}

	waited := make(chan string)
	go func() {
		out, _ := h.try("wait", "main")
		waited <- out
	}()
	h.docker("stop", "main")
	h.eq("wait", <-waited, "3")
	h.eq("logs", h.docker("logs", "main"), "up\ndown")
	h.eq("stopped", h.state("main", "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}"), "exited 3 false")
	h.docker("start", "main")
	h.eventually("its output again", func() bool { return strings.Count(h.docker("logs", "main"), "up") == 2 })
	h.docker("kill", "-s", "KILL", "main")
	h.becomes("main", "{{.State.Status}} {{.State.ExitCode}}", "exited 137")
	h.docker("restart", "main")
	h.eventually("its output once more", func() bool { return strings.Count(h.docker("logs", "main"), "up") == 3 })

	h.docker("run", "--rm", "--network", "container:main", "--pid", "container:main", h.image, "sh", "-c", "grep -q trap /proc/1/cmdline")
	h.docker("rm", "-f", "main")
}

func ends(h *host) {
	h.start("deaf", h.image, "sh", "-c", `trap "" TERM; echo up; while :; do sleep 0.1; done`)
	h.eventually("its trap", func() bool { return h.docker("logs", "deaf") == "up" })
	h.docker("stop", "-t", "1", "deaf")
	h.eq("stop", h.state("deaf", "{{.State.ExitCode}}"), "137")

	if out, code := h.try("run", "--name", "oom", "--network", "none", "--memory", "16m", "--memory-swap", "16m", h.image, "sh", "-c", `x=$(head -c 100000000 /dev/zero | tr "\0" x); echo ${#x}`); code != 137 {
		h.t.Errorf("out of memory: %d: %s", code, out)
	}
	h.becomes("oom", "{{.State.OOMKilled}}", "true")

	h.start("again", "--restart", "on-failure:2", h.image, "sh", "-c", "echo x; exit 1")
	h.becomes("again", "{{.RestartCount}} {{.State.Status}}", "2 exited")
	h.eq("restarts", h.docker("logs", "again"), "x\nx\nx")

	h.start("health", "--health-cmd", "test -f /ok", "--health-interval", "200ms", "--health-retries", "1", h.image, "sleep", "1000")
	h.becomes("health", "{{.State.Health.Status}}", "unhealthy")
	h.docker("exec", "health", "touch", "/ok")
	h.becomes("health", "{{.State.Health.Status}}", "healthy")

	h.docker("rm", "-f", "deaf", "oom", "again", "health")
}

// Containers live on when the daemons do not, and what became of them is known
// afterwards.
func TestDaemonsEnd(t *testing.T) { // contract: 5.4.4, 14.3
	stores(t, func(t *testing.T, h *host) {
		counter := []string{h.image, "sh", "-c", `trap "exit 4" TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done`}
		h.start("counter", counter...)
		h.start("always", append([]string{"--restart", "always"}, counter...)...)
		h.start("short", h.image, "sh", "-c", "while ! test -f /tmp/go; do sleep 0.1; done; exit 5")
		pid := h.state("counter", "{{.State.Pid}}")
		lives := func() {
			t.Helper()
			h.eq("counter", h.state("counter", "{{.State.Pid}} {{.State.Status}}"), pid+" running")
			before := h.docker("logs", "--tail", "1", "counter")
			h.eventually("more output", func() bool { return h.docker("logs", "--tail", "1", "counter") != before })
			h.eventually("an exec", func() bool { out, _ := h.try("exec", "counter", "echo", "here"); return out == "here" })
			h.eq("run", h.run(h.image), "hello from yes\ngreetings")
		}
		restart := func() {
			t.Helper()
			if err := h.Daemon.Start(); err != nil {
				t.Fatal(err)
			}
		}
		// whileAway has a container end while a daemon is not there.
		whileAway := func(name string, stop, start func()) {
			t.Helper()
			dir := h.dir + "/go-" + name
			h.start(name, "-v", dir+":/go", h.image, "sh", "-c", "while ! test -f /go/x; do sleep 0.1; done; exit 6")
			child := h.state(name, "{{.State.Pid}}")
			stop()
			if err := os.WriteFile(dir+"/x", nil, 0o600); err != nil {
				t.Fatal(err)
			}
			h.eventually("its end", func() bool {
				b, err := os.ReadFile("/proc/" + child + "/stat")
				return err != nil || strings.Contains(string(b), ") Z ")
			})
			start()
			h.becomes(name, "{{.State.Status}} {{.State.ExitCode}}", "exited 6")
		}

		// gantryd.
		h.Kill()
		if out, code := h.try("exec", "counter", "true"); code == 0 {
			t.Errorf("an exec without gantryd: %s", out)
		}
		h.eq("short", h.state("short", "{{.State.Status}}"), "running")
		restart()
		lives()
		h.docker("exec", "short", "touch", "/tmp/go")
		h.becomes("short", "{{.State.Status}} {{.State.ExitCode}}", "exited 5")
		h.docker("kill", "always")
		h.becomes("always", "{{.State.Status}}", "exited")
		h.docker("start", "always")
		whileAway("one", h.Kill, restart)

		// dockerd, with live-restore.
		for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			whileAway("two-"+signal.String(), func() { h.stopDocker(signal) }, h.startDocker)
			lives()
		}
		// Both.
		whileAway("three", func() { h.stopDocker(syscall.SIGKILL); h.Kill() }, func() { restart(); h.startDocker() })
		lives()

		// A shim.
		h.docker("stop", "counter")
		h.eq("counter", h.state("counter", "{{.State.Status}} {{.State.ExitCode}}"), "exited 4")
		h.docker("start", "counter")
		id := h.state("counter", "{{.Id}}")
		for pid, args := range h.Processes() {
			if strings.Contains(args, "containerd-shim") && strings.Contains(args, id) {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		h.becomes("counter", "{{.State.Status}}", "exited")
		h.docker("start", "counter")
		h.eq("exec", h.docker("exec", "counter", "echo", "here"), "here")
	})
}

// A dockerd that runs gantryd itself, as its containerd, with the configuration
// that it writes.
func TestManaged(t *testing.T) { // contract: 8.2.6, 13.12, 14.3
	if _, err := os.Stat("/run/containerd/containerd.sock"); err == nil {
		t.Skip("the host has a containerd, which dockerd would take")
	}
	stores(t, func(t *testing.T, h *host) {
		h.stopDocker(syscall.SIGTERM)
		if err := h.Stop(); err != nil {
			t.Fatal(err)
		}
		bin := h.Dir + "/bin"
		if err := os.Mkdir(bin, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, target := range map[string]string{"containerd": "gantryd", "containerd-shim-runc-v2": "containerd-shim-runc-v2"} {
			if err := os.Symlink(binDir+"/"+target, bin+"/"+name); err != nil {
				t.Fatal(err)
			}
		}
		h.managed = bin
		h.startDocker()
		h.docker("pull", "-q", h.image)
		h.eq("run", h.run(h.image), "hello from yes\ngreetings")
		h.start("main", append([]string{h.image}, loop...)...)
		for pid, args := range h.Processes() {
			if strings.HasPrefix(args, "containerd --config ") || strings.HasPrefix(args, bin+"/containerd --config ") {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		h.eventually("a new gantryd", func() bool { out, _ := h.try("exec", "main", "echo", "here"); return out == "here" })
		h.docker("stop", "main")
		h.eq("stopped", h.state("main", "{{.State.Status}} {{.State.ExitCode}}"), "exited 3")
		h.docker("rm", "main")
	})
}
