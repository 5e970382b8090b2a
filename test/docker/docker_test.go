//go:build linux

// Package docker runs the daemon of Docker on a gantryd, and its command line on
// that, where GANTRY_DOCKER names a directory with both: dockerd and docker, of
// any release since 20.10, and docker-init. Each test is done with Docker's own
// image store and, in releases that have it, with the one of containerd, where
// images, snapshots and builds are Gantry's too.
package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/test/daemontest"
	"github.com/gantryd/gantry/test/testimage"
)

var binDir string

func TestMain(m *testing.M) {
	if os.Getenv("GANTRY_DOCKER") == "" {
		os.Exit(m.Run())
	}
	os.Exit(daemontest.Main(m, "../..", &binDir))
}

// host is a gantryd with a dockerd, whose files are in a directory of the daemon's.
type host struct {
	*daemontest.Daemon
	t     *testing.T
	bin   string // where dockerd and docker are
	dir   string // of dockerd's files
	store bool   // images are in Gantry
	image string // busybox, pulled
	reg   *testimage.Registry
	cmd   *exec.Cmd // the running dockerd
	log   *os.File

	// managed is where dockerd finds a containerd to run, if it is not to use
	// the daemon, which is stopped then.
	managed string
}

// programs is the directory with Docker.
func programs(t *testing.T) string {
	t.Helper()
	bin := os.Getenv("GANTRY_DOCKER")
	if bin == "" {
		t.Skip("GANTRY_DOCKER is not set to a directory with dockerd and docker")
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// stores runs a test with each image store that this Docker has.
func stores(t *testing.T, test func(*testing.T, *host)) {
	bin := programs(t)
	for _, store := range []bool{false, true} {
		t.Run(map[bool]string{false: "store of Docker", true: "store of containerd"}[store], func(t *testing.T) {
			test(t, newHost(t, bin, store))
		})
	}
}

// newDaemon starts a gantryd, and a registry that has an image.
func newDaemon(t *testing.T, bin string) *host {
	t.Helper()
	img, err := testimage.New(ocispec.ImageConfig{Env: []string{"PATH=/bin", "FROM_IMAGE=yes"}, Cmd: []string{"/bin/sh", "-c", "echo hello from $FROM_IMAGE; cat greeting"}, WorkingDir: "/data"},
		testimage.Layer{Files: testimage.BusyboxFiles(t), Compression: "gzip"},
		testimage.Layer{Files: []testimage.File{{Name: "data", Dir: true}, {Name: "data/greeting", Body: []byte("greetings\n")}}, Compression: "gzip"})
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, bin: bin, reg: testimage.Serve(t)}
	h.image = h.reg.Put("busybox", "latest", img)
	h.Daemon = daemontest.New(t, binDir+"/gantryd", 4, "")
	h.Env = []string{"PATH=" + binDir + ":" + os.Getenv("PATH")}
	h.dir = h.Dir + "/docker"
	if err = os.Mkdir(h.dir, 0o755); err == nil {
		h.log, err = os.Create(h.dir + "/log")
	}
	if err == nil {
		err = h.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	return h
}

func newHost(t *testing.T, bin string, store bool) *host {
	t.Helper()
	h := newDaemon(t, bin)
	h.store = store
	config, err := json.Marshal(map[string]any{"live-restore": true, "features": map[string]bool{"containerd-snapshotter": store}})
	if err == nil {
		err = os.WriteFile(h.dir+"/daemon.json", config, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/etc/docker/key.json"); errors.Is(err, os.ErrNotExist) {
		t.Cleanup(func() { os.Remove("/etc/docker/key.json") }) // release 20.10 has it there
	}
	h.startDocker()
	if driver := h.docker("info", "-f", "{{.DriverStatus}}"); strings.Contains(driver, "io.containerd.snapshotter.v1") != store {
		t.Skipf("this Docker has not this store: %s", driver)
	}
	h.docker("pull", "-q", h.image)
	return h
}

func (h *host) startDocker() {
	h.t.Helper()
	path, containerd := h.bin+":"+os.Getenv("PATH"), "--containerd="+h.Address()
	if h.managed != "" {
		path, containerd = h.managed+":"+path, "--containerd="
	}
	h.cmd = exec.Command(h.bin+"/dockerd", containerd, "--data-root", h.dir+"/root", "--exec-root", h.dir+"/exec", "--pidfile", h.dir+"/pid", "--config-file", h.dir+"/daemon.json",
		"--host", "unix://"+h.dir+"/sock", "--cgroup-parent", "/"+h.Mark,
		"--iptables=false", "--ip6tables=false", "--bridge=none", "--userland-proxy=false")
	h.cmd.Env = append(os.Environ(), "PATH="+path)
	h.cmd.Stdout, h.cmd.Stderr = h.log, h.log
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := h.cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.eventually("an answer of dockerd", func() bool { _, code := h.try("version"); return code == 0 })
}

func (h *host) stopDocker(signal os.Signal) {
	if h.cmd == nil {
		return
	}
	h.cmd.Process.Signal(signal)
	killer := time.AfterFunc(daemontest.Slow(time.Minute), func() { h.cmd.Process.Kill() })
	h.cmd.Wait()
	if !killer.Stop() {
		h.t.Errorf("dockerd did not end after %v", signal)
	}
	h.cmd = nil
}

// command is a docker with arguments.
func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, h.bin+"/docker", append([]string{"--host", "unix://" + h.dir + "/sock"}, args...)...)
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+h.dir+"/config", "BUILDX_BUILDER=", "HOME="+h.dir)
	return cmd
}

// try is what a docker prints, errors too, and its exit code.
func (h *host) try(args ...string) (string, int) {
	return h.tryWith("", args...)
}

func (h *host) tryWith(input string, args ...string) (string, int) {
	ctx, cancel := context.WithTimeout(context.Background(), daemontest.Slow(2*time.Minute))
	defer cancel()
	cmd := h.command(ctx, args...)
	if input != "" {
		cmd.Stdin = strings.NewReader(input)
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Sprintf("%s: no end in two minutes", out), -1
	case err != nil && !errors.As(err, &exit):
		return err.Error(), -1
	}
	return strings.TrimSpace(string(out)), cmd.ProcessState.ExitCode()
}

// docker is what a docker prints that must succeed.
func (h *host) docker(args ...string) string {
	h.t.Helper()
	out, code := h.try(args...)
	if code != 0 {
		h.t.Fatalf("docker %q: %d: %s", args, code, out)
	}
	return out
}

// run is what a container without a network prints; the image and the command
// are the last arguments.
func (h *host) run(args ...string) string {
	h.t.Helper()
	return h.docker(append([]string{"run", "--rm", "--network", "none"}, args...)...)
}

// start runs a container in the background.
func (h *host) start(name string, args ...string) {
	h.t.Helper()
	h.docker(append([]string{"run", "-d", "--name", name, "--network", "none"}, args...)...)
}

// state is a part of what inspect tells of a container.
func (h *host) state(name, field string) string {
	out, _ := h.try("inspect", "-f", field, name)
	return out
}

// becomes waits for a state.
func (h *host) becomes(name, field, want string) {
	h.t.Helper()
	h.eventually(fmt.Sprintf("%s of %s: %s (now: %s)", field, name, want, h.state(name, field)), func() bool { return h.state(name, field) == want })
}

func (h *host) eventually(what string, cond func() bool) {
	h.t.Helper()
	deadline := time.Now().Add(daemontest.Slow(30 * time.Second))
	for !cond() {
		if time.Now().After(deadline) {
			h.t.Fatalf("not in 30 s: %s", what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (h *host) eq(what, got, want string) {
	h.t.Helper()
	if got != want {
		h.t.Errorf("%s: %q, not %q", what, got, want)
	}
}

func (h *host) has(what, got, want string) {
	h.t.Helper()
	if !strings.Contains(got, want) {
		h.t.Errorf("%s: no %q in %q", what, want, got)
	}
}

// close removes the containers through Docker, and complains of what is left of them.
func (h *host) close() {
	if h.cmd != nil && (h.Pid() != 0 || h.managed != "") {
		if ids := strings.Fields(h.docker("ps", "-aq")); len(ids) > 0 {
			h.docker(append([]string{"rm", "-f", "-v"}, ids...)...)
		}
		h.eventually("the end of the shims", func() bool {
			for _, args := range h.Processes() {
				if strings.Contains(args, "containerd-shim") {
					return false
				}
			}
			return true
		})
	}
	h.stopDocker(syscall.SIGTERM)
	if h.t.Failed() {
		b, _ := os.ReadFile(h.log.Name())
		h.t.Logf("the end of dockerd's log:\n%s", b[max(0, len(b)-8<<10):])
	}
	h.log.Close()
	// What a dockerd leaves that was killed once: its directory as a mount, and
	// the host's network.
	mounts, _ := filepath.Glob(h.dir + "/exec/netns/*")
	for _, m := range append(mounts, h.dir+"/root") {
		syscall.Unmount(m, syscall.MNT_DETACH)
	}
	for _, l := range h.Leftovers() {
		if !strings.HasPrefix(l, "cgroup ") || !strings.HasSuffix(l, "/buildkit") { // Docker's, of all builds
			h.t.Errorf("left: %s", l)
		}
	}
}

// bare says that there are no files of a snapshot but of the one with which
// gantryd tries what it offers.
func (h *host) bare() bool {
	snapshots, err := os.ReadDir(h.Dir + "/root/io.containerd.snapshotter.v1.overlayfs/snapshots")
	return err == nil && len(snapshots) <= 1
}

// limit is a limit of the container's cgroup, of either version.
func limit(v1, v2 string) []string {
	return []string{"sh", "-c", fmt.Sprintf("cat /sys/fs/cgroup/%s 2>/dev/null || cat /sys/fs/cgroup/%s", v1, v2)}
}
