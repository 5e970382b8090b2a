//go:build linux

// Package shim shows that Gantry's shim serves a containerd that knows nothing
// of Gantry: Debian's 1.6, driven by its own ctr.
package shim

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

const image = "docker.io/library/box:1"

// buffer collects output; it may be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

type host struct {
	t        *testing.T
	dir, bin string
	shim     string
	daemon   *exec.Cmd
	log      buffer
}

// debian starts Debian's containerd on private directories, with our shim
// first on its path.
func debian(t *testing.T) *host {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("containers need root")
	}
	bin := os.Getenv("GANTRY_DEBIAN_CONTAINERD")
	if bin == "" {
		bin = "/opt/deb/usr/bin"
	}
	for _, p := range []string{bin + "/containerd", bin + "/ctr", "/bin/busybox"} {
		if _, err := os.Stat(p); err != nil {
			t.Skip(err)
		}
	}
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, dir: dir, bin: bin, shim: dir + "/shim/containerd-shim-runc-v2"}
	t.Cleanup(h.cleanup)
	if out, err := exec.Command("go", "build", "-tags", "seccomp", "-o", h.shim, "../../cmd/containerd-shim-runc-v2").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	config := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.aufs\", "+
		"\"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.devmapper\"]\n[grpc]\n  address = %q\n",
		dir+"/root", dir+"/state", dir+"/sock")
	if err := os.WriteFile(dir+"/config.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	h.start()
	tarball := dir + "/image.tar"
	if err := writeImage(tarball); err != nil {
		t.Fatal(err)
	}
	h.ctr("images", "import", tarball)
	return h
}

func (h *host) start() {
	h.t.Helper()
	h.daemon = exec.Command(h.bin+"/containerd", "--config", h.dir+"/config.toml")
	h.daemon.Env = append(os.Environ(), "PATH="+filepath.Dir(h.shim)+":"+os.Getenv("PATH"))
	h.daemon.Stdout, h.daemon.Stderr = &h.log, &h.log
	if err := h.daemon.Start(); err != nil {
		h.t.Fatal(err)
	}
	eventually(h.t, "an answer of containerd", func() bool {
		_, err := h.try("version")
		return err == nil
	})
}

func (h *host) stop(sig os.Signal) {
	if h.daemon != nil {
		_ = h.daemon.Process.Signal(sig)
		_ = h.daemon.Wait()
		h.daemon = nil
	}
}

func (h *host) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.bin+"/ctr", append([]string{"-a", h.dir + "/sock", "-n", "gantry-debian-test"}, args...)...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (h *host) ctr(args ...string) string {
	h.t.Helper()
	out, err := h.try(args...)
	if err != nil {
		h.t.Fatalf("ctr %q: %v: %s", args, err, out)
	}
	return out
}

func (h *host) cleanup() {
	if h.t.Failed() {
		h.t.Logf("containerd: %s", h.log.String())
	}
	if h.daemon != nil {
		out, _ := h.try("tasks", "ls", "-q")
		for _, id := range strings.Fields(out) {
			_, _ = h.try("tasks", "rm", "-f", id)
		}
	}
	h.stop(unix.SIGTERM)
	m, _ := mountinfo.GetMounts(mountinfo.PrefixFilter(h.dir))
	for i := len(m) - 1; i >= 0; i-- {
		h.t.Errorf("%s is still mounted", m[i].Mountpoint)
		_ = unix.Unmount(m[i].Mountpoint, unix.MNT_DETACH)
	}
	for _, exe := range h.shims() {
		h.t.Errorf("a shim is left: %s", exe)
	}
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/gantry-debian-test")
	more, _ := filepath.Glob("/sys/fs/cgroup/gantry-debian-test")
	for _, d := range append(dirs, more...) {
		if err := os.Remove(d); err != nil {
			h.t.Errorf("cgroup is left: %v", err)
		}
	}
	os.RemoveAll(h.dir)
}

// shims returns the processes that run our shim.
func (h *host) shims() (pids []string) {
	procs, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, p := range procs {
		if exe, err := os.Readlink(p); err == nil && exe == h.shim {
			pids = append(pids, p)
		}
	}
	return pids
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// writeImage writes a docker archive of one layer with busybox in it.
func writeImage(path string) error {
	box, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "bin/", Mode: 0o755})
	_ = w.WriteHeader(&tar.Header{Name: "bin/busybox", Mode: 0o755, Size: int64(len(box))})
	if _, err := w.Write(box); err != nil {
		return err
	}
	for _, name := range []string{"sh", "sleep", "cat", "echo"} {
		_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox"})
	}
	if err := w.Close(); err != nil {
		return err
	}
	digest := func(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": []string{"sh"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer.Bytes())}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]any{map[string]any{"Config": digest(config) + ".json", "RepoTags": []string{image}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	out := tar.NewWriter(f)
	for _, e := range []struct {
		name string
		data []byte
	}{{digest(config) + ".json", config}, {"layer.tar", layer.Bytes()}, {"manifest.json", manifest}} {
		if err := out.WriteHeader(&tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.data))}); err != nil {
			return err
		}
		if _, err := out.Write(e.data); err != nil {
			return err
		}
	}
	return out.Close()
}

// Our shim under Debian's containerd: run, exec, kill, delete, the exit is
// reported, and a restart of the daemon changes nothing.
// contract: 1.4.3, 5.2.2, 5.2.4, 5.2.5, 5.4.5
func TestDebianContainerd(t *testing.T) {
	h := debian(t)

	out := h.ctr("run", "--rm", image, "hello", "sh", "-c", "echo hello from $0")
	if strings.TrimSpace(out) != "hello from sh" {
		t.Errorf("run: %q", out)
	}
	if out, err := h.try("run", "--rm", image, "code", "sh", "-c", "exit 42"); err == nil || err.(*exec.ExitError).ExitCode() != 42 {
		t.Errorf("exit code: %q %v", out, err)
	}
	if out, err := h.try("run", "--rm", image, "nope", "no-such-command"); err == nil || !strings.Contains(out, "executable file not found") {
		t.Errorf("unknown command: %q %v", out, err)
	}
	if n := len(h.shims()); n != 0 {
		t.Errorf("%d shims are left", n)
	}

	// Events from here on.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var events buffer
	watch := exec.CommandContext(ctx, h.bin+"/ctr", "-a", h.dir+"/sock", "-n", "gantry-debian-test", "events")
	watch.Stdout = &events
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	defer watch.Wait()
	defer cancel()
	eventually(t, "the first event", func() bool {
		h.ctr("namespaces", "label", "gantry-debian-test", "x=y")
		return strings.Contains(events.String(), "/namespaces/update")
	})

	h.ctr("run", "-d", image, "long", "sleep", "1000")
	if n := len(h.shims()); n != 1 {
		t.Fatalf("%d shims of ours", n)
	}
	out = h.ctr("tasks", "exec", "--exec-id", "e1", "long", "sh", "-c", "echo in $(hostname 2>/dev/null || echo box)")
	if !strings.HasPrefix(out, "in ") {
		t.Errorf("exec: %q", out)
	}
	if out, err := h.try("tasks", "exec", "--exec-id", "e2", "long", "sh", "-c", "exit 9"); err == nil || err.(*exec.ExitError).ExitCode() != 9 {
		t.Errorf("exec: %q %v", out, err)
	}
	if out := h.ctr("tasks", "ls"); !strings.Contains(out, "RUNNING") {
		t.Errorf("tasks: %s", out)
	}
	if out := h.ctr("tasks", "metrics", "long"); !strings.Contains(out, "memory") {
		t.Errorf("metrics: %s", out)
	}
	if out := h.ctr("tasks", "ps", "long"); len(strings.Split(strings.TrimSpace(out), "\n")) != 2 {
		t.Errorf("ps: %s", out)
	}
	h.ctr("tasks", "pause", "long")
	if out := h.ctr("tasks", "ls"); !strings.Contains(out, "PAUSED") {
		t.Errorf("tasks: %s", out)
	}
	h.ctr("tasks", "resume", "long")

	// The daemon is killed and comes back.
	before := h.ctr("tasks", "ls")
	cancel()
	h.stop(unix.SIGKILL)
	h.start()
	if after := h.ctr("tasks", "ls"); after != before {
		t.Errorf("before the restart: %safter: %s", before, after)
	}
	h.ctr("tasks", "kill", "-s", "SIGKILL", "long")
	eventually(t, "the end of the task", func() bool { return strings.Contains(h.ctr("tasks", "ls"), "STOPPED") })
	if out := h.ctr("tasks", "rm", "long"); !strings.Contains(out, "exit code 137") {
		t.Errorf("rm: %q", out)
	}
	h.ctr("containers", "rm", "long")
	eventually(t, "the end of the shim", func() bool { return len(h.shims()) == 0 })

	got := events.String()
	for _, topic := range []string{"/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/paused", "/tasks/resumed"} {
		if !strings.Contains(got, topic) {
			t.Errorf("no %s among %s", topic, got)
		}
	}

	// The shim is killed: the daemon notices and cleans up with our delete.
	h.ctr("run", "-d", image, "orphan", "sleep", "1000")
	var pid int
	if _, err := fmt.Sscanf(h.shims()[0], "/proc/%d/exe", &pid); err != nil {
		t.Fatal(err)
	}
	if p, err := os.FindProcess(pid); err != nil || pid <= 1 || p.Kill() != nil {
		t.Fatal(pid, err)
	}
	eventually(t, "the daemon's clean-up", func() bool { return !strings.Contains(h.ctr("tasks", "ls"), "RUNNING") })
	h.ctr("containers", "rm", "orphan")
}
