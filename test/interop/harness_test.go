package interop

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/gantryd/gantry/test/testimage"
)

// binDir has gantryd, its shim and the CLI: $GANTRY_BIN, or freshly built.
var binDir string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			fmt.Println("the tests of foreign clients need root: they run containers")
			return 1
		}
		binDir = os.Getenv("GANTRY_BIN")
		if binDir == "" {
			dir, err := os.MkdirTemp("", "gantry-bin")
			if err != nil {
				fmt.Println(err)
				return 1
			}
			defer os.RemoveAll(dir)
			binDir = dir
			build := exec.Command("go", "build", "-tags", "seccomp", "-o", dir+"/", "./cmd/...")
			build.Dir = "../.."
			if out, err := build.CombinedOutput(); err != nil {
				fmt.Printf("%v: %v\n%s", build, err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

// daemon is a running gantryd, or Debian's containerd.
type daemon struct {
	t       testing.TB
	bin     string
	dir     string
	address string
	cmd     *exec.Cmd
	log     *os.File
	env     []string
}

// newGantry prepares a gantryd with root, state and sockets of its own. What
// is left when the test ends is a failure.
func newGantry(t testing.TB) *daemon {
	return newDaemon(t, filepath.Join(binDir, "gantryd"), 4)
}

func newDaemon(t testing.TB, bin string, version int) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "gi")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, bin: bin, dir: dir, address: filepath.Join(dir, "s.sock")}
	config := fmt.Sprintf("version = %d\nroot = %q\nstate = %q\n", version, dir+"/root", dir+"/state")
	if version >= 4 {
		config += fmt.Sprintf("[plugins.'io.containerd.server.v1.grpc']\naddress = %q\n[plugins.'io.containerd.server.v1.ttrpc']\naddress = %q\n[plugins.'io.containerd.shim.v1.manager']\nsocket_dir = %q\n", d.address, d.address+".ttrpc", dir+"/shims")
	} else {
		config += fmt.Sprintf("disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = %q\n", d.address)
	}
	if err := os.WriteFile(dir+"/config.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if d.log, err = os.Create(dir + "/log"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.stop()
		left := d.leftovers()
		for _, l := range left {
			t.Errorf("left behind: %s", l)
		}
		if t.Failed() {
			if b, err := os.ReadFile(dir + "/log"); err == nil {
				if len(b) > 20000 {
					b = b[len(b)-20000:]
				}
				t.Logf("log of %s:\n%s", filepath.Base(bin), b)
			}
		}
		d.sweep()
		d.log.Close()
		os.RemoveAll(dir)
	})
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	d.cmd = exec.Command(d.bin, "--config", d.dir+"/config.toml")
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.Env = append(append(os.Environ(), "GOTRACEBACK=all"), d.env...)
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := containerd.New(d.address, containerd.WithTimeout(20*time.Second))
	if err == nil {
		defer c.Close()
		if ok, err2 := c.IsServing(ctx); ok {
			return
		} else {
			err = err2
		}
	}
	b, _ := os.ReadFile(d.dir + "/log")
	d.t.Fatalf("%s is not serving on %s: %v\n%s", d.bin, d.address, err, b)
}

// stop ends the daemon with SIGTERM, kill -9 if it does not obey in 15 s.
func (d *daemon) stop() {
	if d.cmd == nil {
		return
	}
	d.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.AfterFunc(15*time.Second, func() {
		d.t.Errorf("%s did not end within 15 s of SIGTERM", d.bin)
		d.cmd.Process.Kill()
	})
	d.cmd.Wait()
	timer.Stop()
	d.cmd = nil
}

func (d *daemon) kill() {
	d.cmd.Process.Kill()
	d.cmd.Wait()
	d.cmd = nil
}

// leftovers lists the shims, mounts and bundles that belong to this daemon.
func (d *daemon) leftovers() []string {
	var left []string
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for _, l := range strings.Split(string(mounts), "\n") {
		if strings.Contains(l, d.dir+"/") {
			left = append(left, "mount "+l)
		}
	}
	for pid, args := range d.processes() {
		left = append(left, fmt.Sprintf("process %d: %s", pid, args))
	}
	bundles, _ := filepath.Glob(d.dir + "/state/io.containerd.runtime.v2.task/*/*")
	for _, b := range bundles {
		left = append(left, "bundle "+b)
	}
	return left
}

// processes are those whose command line names this daemon's directory.
func (d *daemon) processes() map[int]string {
	out := map[int]string{}
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if err != nil || !bytes.Contains(b, []byte(d.dir+"/")) {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(e, "/proc/%d/cmdline", &pid); err == nil && pid != os.Getpid() {
			out[pid] = strings.ReplaceAll(string(b), "\x00", " ")
		}
	}
	return out
}

// sweep removes what a failed test left, so that the next one starts clean.
func (d *daemon) sweep() {
	for pid := range d.processes() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	for range 20 {
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		again := false
		for _, l := range strings.Split(string(mounts), "\n") {
			if f := strings.Fields(l); len(f) > 4 && strings.HasPrefix(f[4], d.dir+"/") {
				syscall.Unmount(f[4], syscall.MNT_DETACH)
				again = true
			}
		}
		if !again {
			break
		}
	}
}

// connect is containerd's v2 client on a daemon, in namespace "default".
func (d *daemon) connect() *containerd.Client {
	d.t.Helper()
	c, err := containerd.New(d.address, containerd.WithDefaultNamespace("default"), containerd.WithTimeout(20*time.Second))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { c.Close() })
	return c
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	t.Cleanup(cancel)
	return namespaces.WithNamespace(ctx, "default")
}

// served is a registry with busybox in it, and its reference.
func served(t testing.TB) (*testimage.Registry, *testimage.Image, string) {
	img := testimage.Busybox(t)
	reg := testimage.Serve(t)
	return reg, img, reg.Put("library/busybox", "latest", img)
}

// debian is the path of one of Debian's containerd programs; the test is
// skipped where they are not.
func debian(t testing.TB, name string) string {
	dir := os.Getenv("GANTRY_DEBIAN_CONTAINERD")
	if dir == "" {
		dir = "/opt/deb/usr/bin"
	}
	p := filepath.Join(dir, name)
	if _, err := os.Stat(p); err != nil {
		t.Skipf("Debian's %s is not there (scripts/deps test fetches it): %v", name, err)
	}
	return p
}

// eventually waits for a condition, at most 20 s.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("20 s have passed and still not: %s", what)
}

// testArchive writes busybox as an archive into dir, named
// example.org/busybox:latest.
func testArchive(t testing.TB, dir string) string {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "busybox.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := testimage.Busybox(t).Archive(f, "example.org/busybox:latest"); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}
