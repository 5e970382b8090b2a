package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/test/testimage"
)

// binDir has gantry, gantryd and the shim: $GANTRY_BIN, or freshly built.
var binDir string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if binDir = os.Getenv("GANTRY_BIN"); binDir != "" || os.Geteuid() != 0 {
			return m.Run()
		}
		dir, err := os.MkdirTemp("", "gantry-bin")
		if err != nil {
			fmt.Println(err)
			return 1
		}
		defer os.RemoveAll(dir)
		binDir = dir
		for _, args := range [][]string{{"-tags", "seccomp", "../gantryd", "../containerd-shim-runc-v2"}, {"."}} {
			build := exec.Command("go", append([]string{"build", "-o", dir + "/"}, args...)...)
			if len(args) == 1 {
				build.Env = append(os.Environ(), "CGO_ENABLED=0")
			}
			if out, err := build.CombinedOutput(); err != nil {
				fmt.Printf("%v: %v\n%s", build, err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

// TestScripts runs the command line against real daemons, one a script. A
// script that leaves a container, process, mount, FIFO or log behind fails.
func TestScripts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("containers need root")
	}
	img := testimage.Busybox(t)
	archive := filepath.Join(t.TempDir(), "busybox.tar")
	f, err := os.Create(archive)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(img.Archive(f, "example.org/busybox:latest"), f.Close()); err != nil {
		t.Fatal(err)
	}
	reg := testimage.Serve(t)
	reg.Put("library/busybox", "latest", img)
	slow := testimage.Serve(t)
	body := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{}).Read(body)
	big, err := testimage.New(ocispec.ImageConfig{}, testimage.Layer{Files: []testimage.File{{Name: "big", Body: body}}, Compression: "gzip"})
	if err != nil {
		t.Fatal(err)
	}
	slow.Put("library/big", "latest", big)
	slow.Throttle = 200 * time.Millisecond
	private := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != "me" || p != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="private"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		reg.ServeHTTP(w, r)
	}))
	t.Cleanup(private.Close)

	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			dir, err := os.MkdirTemp("", "gs")
			if err != nil {
				return err
			}
			// Cgroups and the runtime's state are named after the namespace.
			d := &scriptDaemon{dir: dir, address: dir + "/s.sock", ns: filepath.Base(dir)}
			e.Values[daemonKey{}] = d
			e.Defer(func() {
				if err := d.end(); err != nil {
					e.T().Log(err)
					e.T().FailNow()
				}
			})
			for k, v := range map[string]string{
				"PATH": binDir + ":" + os.Getenv("PATH"), "GANTRY_ADDRESS": d.address, "DAEMON": dir, "ARCHIVE": archive, "IMAGE": "example.org/busybox:latest",
				"REGISTRY": reg.Host(), "SLOW": slow.Host(), "PRIVATE": strings.TrimPrefix(private.URL, "http://"), "TERM": "xterm", "GANTRY_NAMESPACE": d.ns, "NS": d.ns, "CONTAINERD_NAMESPACE": "", "CONTAINERD_ADDRESS": "",
			} {
				e.Setenv(k, v)
			}
			return d.start()
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"code": func(ts *testscript.TestScript, neg bool, args []string) {
				want, err := strconv.Atoi(args[0])
				ts.Check(err)
				got := 0
				err = ts.Exec(args[1], args[2:]...)
				var exit *exec.ExitError
				if errors.As(err, &exit) {
					got = exit.ExitCode()
				} else {
					ts.Check(err)
				}
				if (got == want) == neg {
					ts.Fatalf("exit code %d, want %d", got, want)
				}
			},
			// until REGEXP COMMAND... repeats a command until its output matches.
			"until": func(ts *testscript.TestScript, neg bool, args []string) {
				re, err := regexp.Compile("(?m)" + args[0])
				ts.Check(err)
				for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
					err := ts.Exec(args[1], args[2:]...)
					out := ts.ReadFile("stdout") + ts.ReadFile("stderr")
					if re.MatchString(out) != neg {
						return
					}
					if time.Now().After(deadline) {
						ts.Fatalf("20 s have passed, and still no match: %v", err)
					}
				}
			},
			// daemon stop|start|kill
			"daemon": func(ts *testscript.TestScript, _ bool, args []string) {
				d := ts.Value(daemonKey{}).(*scriptDaemon)
				switch args[0] {
				case "stop":
					ts.Check(d.stop(syscall.SIGTERM))
				case "kill":
					d.stop(syscall.SIGKILL)
				case "start":
					ts.Check(d.start())
				}
			},
			// empty DIRECTORY says that it has nothing, or is not there.
			"empty": func(ts *testscript.TestScript, neg bool, args []string) {
				list, err := os.ReadDir(ts.MkAbs(args[0]))
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					ts.Fatalf("%v", err)
				}
				if (len(list) == 0) == neg {
					ts.Fatalf("%s has %d entries: %v", args[0], len(list), list)
				}
			},
		},
	})
}

type daemonKey struct{}

// scriptDaemon is a gantryd with everything below one directory.
type scriptDaemon struct {
	dir, address, ns string
	cmd              *exec.Cmd
}

func (d *scriptDaemon) start() error {
	config := fmt.Sprintf("version = 4\nroot = %q\nstate = %q\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n[plugins.'io.containerd.server.v1.grpc']\naddress = %q\n[plugins.'io.containerd.server.v1.ttrpc']\naddress = %q\n[plugins.'io.containerd.shim.v1.manager']\nsocket_dir = %q\n",
		d.dir+"/root", d.dir+"/state", d.address, d.address+".ttrpc", d.dir+"/shims")
	if err := os.WriteFile(d.dir+"/config.toml", []byte(config), 0o600); err != nil {
		return err
	}
	log, err := os.OpenFile(d.dir+"/log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	d.cmd = exec.Command(filepath.Join(binDir, "gantryd"), "--config", d.dir+"/config.toml")
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		return err
	}
	c, err := client.Dial(d.address)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := timeout(20 * time.Second)
	defer cancel()
	return c.Serving(ctx)
}

func (d *scriptDaemon) stop(sig syscall.Signal) error {
	if d.cmd == nil {
		return nil
	}
	d.cmd.Process.Signal(sig)
	timer := time.AfterFunc(15*time.Second, func() { d.cmd.Process.Kill() })
	err := d.cmd.Wait()
	timer.Stop()
	d.cmd = nil
	return err
}

// end stops the daemon and says what the script has left.
func (d *scriptDaemon) end() error {
	var left []string
	if d.cmd != nil {
		for _, args := range [][]string{{"ps", "-a", "-q", "-A"}, {"lease", "ls", "-A"}} {
			cmd := exec.Command(filepath.Join(binDir, "gantry"), append([]string{"--address", d.address, "--timeout", "30s", "-n", d.ns}, args...)...)
			out, err := cmd.Output()
			if err != nil {
				left = append(left, fmt.Sprintf("%v: %v", cmd, err))
			} else if args[0] == "ps" && len(out) > 0 || bytes.Count(out, []byte("\n")) > 1 {
				left = append(left, fmt.Sprintf("%v: %s", args, out))
				for id := range strings.FieldsSeq(string(out)) {
					for _, ns := range []string{d.ns, d.ns + "-2"} {
						exec.Command(filepath.Join(binDir, "gantry"), "--address", d.address, "--timeout", "30s", "-n", ns, "rm", "-f", id).Run()
					}
				}
			}
		}
	}
	if err := d.stop(syscall.SIGTERM); err != nil {
		left = append(left, fmt.Sprintf("stop the daemon: %v", err))
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], d.dir+"/") {
			left = append(left, "mount "+f[4])
			syscall.Unmount(f[4], syscall.MNT_DETACH)
		}
	}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range lines {
		b, err := os.ReadFile(p)
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if err == nil && pid != os.Getpid() && bytes.Contains(b, []byte(d.dir+"/")) {
			left = append(left, fmt.Sprintf("process %d %q", pid, b))
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	for _, pattern := range []string{"/fifo/*", "/root/io.gantry.logs/*/*", "/state/io.containerd.runtime.v2.task/*/*"} {
		some, _ := filepath.Glob(d.dir + pattern)
		left = append(left, some...)
	}
	// What the runtime keeps of a namespace is empty, but for a script's second one.
	for _, ns := range []string{d.ns, d.ns + "-2"} {
		os.Remove("/run/containerd/runc/" + ns)
		groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + ns)
		for _, g := range append(groups, "/sys/fs/cgroup/"+ns) {
			if err := os.Remove(g); err != nil && !errors.Is(err, os.ErrNotExist) {
				left = append(left, err.Error())
			}
		}
		if _, err := os.Stat("/run/containerd/runc/" + ns); err == nil {
			left = append(left, "/run/containerd/runc/"+ns)
		}
	}
	if len(left) > 0 {
		log, _ := os.ReadFile(d.dir + "/log")
		return fmt.Errorf("left behind:\n%s\nlog of the daemon:\n%s", strings.Join(left, "\n"), log[max(0, len(log)-8000):])
	}
	return os.RemoveAll(d.dir)
}
