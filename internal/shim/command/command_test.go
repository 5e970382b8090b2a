//go:build linux

package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/shim/driver"
)

// fake writes a runtime that is a shell script; $log is its log file.
func fake(t *testing.T, script string) (driver.Driver, string) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "runtime")
	if err := os.WriteFile(path, []byte("#!/bin/sh\nlog=$4\nshift 6\necho \"$@\" >> "+dir+"/calls\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return New(Config{Binary: path, Root: dir + "/root"}, slog.New(slog.DiscardHandler)), dir
}

func request(dir string) driver.Create {
	return driver.Create{ID: "c1", Bundle: dir, Spec: &specs.Spec{Process: &specs.Process{Args: []string{"x"}, Cwd: "/"}}}
}

// An error is what the runtime logged last, and what it made is deleted.
// contract: 5.3.1
func TestErrorFromLog(t *testing.T) {
	d, dir := fake(t, `test "$1" = create || exit 0
echo '{"level":"warning","msg":"never mind"}' >> $log
echo '{"level":"error","msg":"first"}' >> $log
echo '{"level":"error","msg":"it is broken"}' >> $log
exit 1
`)
	if err := os.WriteFile(dir+"/log.json", []byte(`{"level":"error","msg":"of an earlier call"}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := d.Create(context.Background(), request(dir))
	if err == nil || !strings.HasSuffix(err.Error(), "create: it is broken") {
		t.Errorf("%v", err)
	}
	if b, _ := os.ReadFile(dir + "/calls"); !strings.Contains(string(b), "delete --force c1") {
		t.Errorf("calls: %s", b)
	}
}

func TestErrors(t *testing.T) {
	for name, c := range map[string]struct {
		script string
		is     func(error) bool
	}{
		"no such container": {`echo '{"level":"error","msg":"container does not exist"}' >> $log; exit 1`, errdefs.IsNotFound},
		"exists":            {`echo '{"level":"error","msg":"container with id exists: already exists"}' >> $log; exit 1`, errdefs.IsAlreadyExists},
		"a bad pid":         {`test "$1" = create && for a; do test "$p" = --pid-file && echo -1 > "$a"; p=$a; done; exit 0`, errdefs.IsInternal},
		"no pid":            {`exit 0`, func(err error) bool { return errors.Is(err, os.ErrNotExist) }},
	} {
		d, dir := fake(t, c.script)
		if _, _, err := d.Create(context.Background(), request(dir)); !c.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	d := New(Config{Binary: "/no/such/runtime"}, slog.New(slog.DiscardHandler))
	if _, _, err := d.Create(context.Background(), request(t.TempDir())); !errdefs.IsNotFound(err) {
		t.Errorf("no runtime: %v", err)
	}
}

// A runtime that hangs, with a child that keeps its output open.
func TestDeadline(t *testing.T) {
	d, dir := fake(t, `test "$1" = delete && exit 0
sleep 60 & sleep 60`)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, _, err := d.Create(ctx, request(dir))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

// contract: 5.3.7
func TestUpdateOverStdin(t *testing.T) {
	d, dir := fake(t, `for a; do test "$p" = --pid-file && echo 4194303 > "$a"; p=$a; done
test "$1" = update && cat > `+"$(dirname $0)"+`/stdin; exit 0`)
	c, s, err := d.Create(context.Background(), request(dir))
	if err != nil || s.Pid != 4194303 {
		t.Fatal(s, err)
	}
	limit := int64(7)
	if err := c.Update(context.Background(), &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(dir + "/stdin"); string(b) != `{"memory":{"limit":7}}` {
		t.Errorf("%s", b)
	}
	if b, _ := os.ReadFile(dir + "/calls"); !strings.Contains(string(b), "update --resources - c1") {
		t.Errorf("%s", b)
	}
}

// All that an exec has started dies with it, also what has a session of its own
// and none of its streams, where the runtime can put it into a cgroup.
//
// promise: P17
func TestExecGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("containers are made by root")
	}
	for _, binary := range []string{"runc", "crun"} {
		t.Run(binary, func(t *testing.T) {
			if _, err := exec.LookPath(binary); err != nil {
				t.Skip(err)
			}
			if binary == "crun" && !cgroups.IsCgroup2UnifiedMode() {
				t.Skip("crun puts an exec into groups of all hierarchies of cgroup v1, or of none")
			}
			dir := t.TempDir()
			busybox, err := os.ReadFile("/bin/busybox")
			if err != nil {
				t.Skip(err)
			}
			if err := errors.Join(os.MkdirAll(dir+"/rootfs/bin", 0o755), os.MkdirAll(dir+"/rootfs/dev", 0o755), os.MkdirAll(dir+"/rootfs/proc", 0o755), os.WriteFile(dir+"/rootfs/bin/busybox", busybox, 0o755)); err != nil {
				t.Fatal(err)
			}
			mark := strconv.Itoa(1e9 + os.Getpid())
			sleeps := func() (n int) {
				files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
				for _, f := range files {
					if b, err := os.ReadFile(f); err == nil && bytes.HasSuffix(b, []byte("sleep\x00"+mark+"\x00")) {
						n++
					}
				}
				return n
			}
			process := func(args ...string) *specs.Process {
				return &specs.Process{Args: append([]string{"/bin/busybox"}, args...), Cwd: "/"}
			}
			spec := &specs.Spec{Version: "1.0.2", Process: process("sleep", "1000"), Root: &specs.Root{Path: "rootfs"}, Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
				Linux: &specs.Linux{CgroupsPath: "/gantry-execgroup-" + binary + mark, Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}}}}
			config, err := json.Marshal(spec)
			if err == nil {
				err = os.WriteFile(dir+"/config.json", config, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			rt, id := New(Config{Binary: binary, Root: dir + "/root"}, slog.New(slog.DiscardHandler)), "execgroup"+mark
			made, s, err := rt.Create(ctx, driver.Create{ID: id, Bundle: dir, Spec: spec})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if _, err := rt.Destroy(context.WithoutCancel(ctx), id); err != nil {
					t.Error(err)
				}
			}()
			if err := made.Start(ctx); err != nil {
				t.Fatal(err)
			}
			execs := made.(driver.ExecSignaller)
			if err := execs.SignalExec("none", unix.SIGKILL); !errdefs.IsNotFound(err) {
				t.Errorf("an exec that is not there: %v", err)
			}
			script := strings.ReplaceAll("(busybox setsid busybox sleep MARK </dev/null >/dev/null 2>&1 &); busybox sleep MARK", "MARK", mark)
			if _, err := made.Exec(ctx, "x", process("sh", "-c", "PATH=/bin; "+script), driver.Stdio{}); err != nil {
				t.Fatal(err)
			}
			for sleeps() < 2 && ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			if err := execs.SignalExec("x", unix.SIGKILL); err != nil {
				t.Error(err)
			}
			for sleeps() > 0 && ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			if n := sleeps(); n > 0 || unix.Kill(s.Pid, 0) != nil {
				t.Errorf("%d processes of the exec run on, or the container does not", n)
			}
			execs.ForgetExec("x")
			if left, _ := filepath.Glob("/sys/fs/cgroup/*" + spec.Linux.CgroupsPath + "/exec-x"); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}
