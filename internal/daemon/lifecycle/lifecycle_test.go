package lifecycle

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// helper is set for a child that this test binary starts of itself.
const helper = "GANTRY_LIFECYCLE_HELPER"

func TestMain(m *testing.M) {
	switch os.Getenv(helper) {
	case "":
		os.Exit(m.Run())
	case "signals":
		helperSignals()
	case "lock":
		if _, err := LockRoot(os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("locked")
		_, _ = io.Copy(io.Discard, os.Stdin)
	case "oom":
		want, _ := strconv.Atoi(os.Args[1])
		fmt.Println(SetOOMScore(OOMScoreFile, want))
	case "cgroup":
		if err := JoinCgroup(CgroupMount, os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		data, _ := os.ReadFile("/proc/self/cgroup")
		fmt.Print(string(data))
	}
	os.Exit(0)
}

func child(t *testing.T, mode string, args ...string) (*exec.Cmd, *bufio.Scanner, io.WriteCloser) {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), helper+"="+mode)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() {
		kill.Stop()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	sc := bufio.NewScanner(out)
	sc.Buffer(nil, 1<<20)
	return cmd, sc, in
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// journal records what happens in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(s string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, s)
}

func (j *journal) component(name string) Component {
	return Component{
		Name:  name,
		Start: func(context.Context) error { j.add("start " + name); return nil },
		Run:   func(ctx context.Context) error { <-ctx.Done(); j.add("end " + name); return ctx.Err() },
		Stop:  func(context.Context) error { j.add("stop " + name); return nil },
	}
}

func TestOrder(t *testing.T) {
	var j journal
	ctx, cancel := context.WithCancel(context.Background())
	err := Run(ctx, quiet(), func() { j.add("ready"); cancel() }, j.component("a"), j.component("b"), Component{Name: "empty"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"start a", "start b", "ready", "end b", "stop b", "end a", "stop a"}
	if d := cmp.Diff(want, j.lines); d != "" {
		t.Error(d)
	}
}

func TestFirstErrorStopsAll(t *testing.T) {
	var j journal
	boom := errors.New("boom")
	bad := Component{Name: "bad", Run: func(context.Context) error { return boom }}
	err := Run(context.Background(), quiet(), nil, j.component("a"), bad, j.component("c"))
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "run bad: boom") {
		t.Errorf("error %v", err)
	}
	if n := len(j.lines); n < 3 || j.lines[n-1] != "stop a" {
		t.Errorf("journal %v", j.lines)
	}

	j.lines = nil
	bad = Component{Name: "bad", Start: func(context.Context) error { return boom }, Stop: func(context.Context) error { j.add("stop bad"); return nil }}
	err = Run(context.Background(), quiet(), func() { j.add("ready") }, j.component("a"), bad, j.component("c"))
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "start bad: boom") {
		t.Errorf("error %v", err)
	}
	if d := cmp.Diff([]string{"start a", "end a", "stop a"}, j.lines); d != "" {
		t.Error(d)
	}
}

// A component that hangs is named and left behind; the others still stop.
func TestStuck(t *testing.T) {
	var j journal
	release := make(chan struct{})
	defer close(release)
	hang := func(name string) Component {
		return Component{Name: name, Timeout: 20 * time.Millisecond, Run: func(context.Context) error { <-release; return nil }}
	}
	hangStop := Component{Name: "h2", Timeout: 20 * time.Millisecond, Stop: func(context.Context) error { <-release; return nil }}
	ctx, cancel := context.WithCancel(context.Background())
	err := Run(ctx, quiet(), cancel, j.component("a"), hang("h1"), hangStop, j.component("b"))
	if !errors.Is(err, ErrStuck) || !strings.Contains(err.Error(), "stop h1: did not stop in time (20ms)") || !strings.Contains(err.Error(), "stop h2") {
		t.Errorf("error %v", err)
	}
	if n := len(j.lines); n == 0 || j.lines[n-1] != "stop a" {
		t.Errorf("journal %v", j.lines)
	}
}

// A start that takes long is interrupted by the end and is no failure.
func TestInterruptedStart(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	slow := Component{Name: "slow", Start: func(ctx context.Context) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	}}
	if err := Run(ctx, quiet(), func() { t.Error("ready") }, slow); err != nil {
		t.Error(err)
	}
}

func helperSignals() {
	log := slog.New(slog.NewTextHandler(os.Stdout, nil))
	s := &Signals{Log: log, Temp: os.Args[1]}
	s.Catch(Policy())
	ctx, cancel := context.WithCancel(context.Background())
	go s.Run(ctx, cancel)
	fmt.Println("caught")
	<-ctx.Done()
	fmt.Println("orderly end")
}

// contract: 8.2.4
func TestSignals(t *testing.T) {
	temp := t.TempDir()
	cmd, out, _ := child(t, "signals", temp)
	pid := cmd.Process.Pid
	target := filepath.Join(temp, "victim")
	if err := os.WriteFile(target, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	// The name of the dump can be guessed: a planted link must not be followed.
	if err := os.Symlink(target, DumpFile(temp, pid)); err != nil {
		t.Fatal(err)
	}
	expect := func(part string) {
		t.Helper()
		for out.Scan() {
			if strings.Contains(out.Text(), part) {
				return
			}
		}
		t.Fatalf("the process ended before %q", part)
	}
	expect("caught")
	for _, step := range []struct {
		sig  syscall.Signal
		part string
	}{{syscall.SIGHUP, "no effect"}, {syscall.SIGPIPE, ""}, {syscall.SIGHUP, "no effect"}, {syscall.SIGUSR1, "stacks written"}, {syscall.SIGTERM, "orderly end"}} {
		if err := cmd.Process.Signal(step.sig); err != nil {
			t.Fatal(err)
		}
		if step.part != "" {
			expect(step.part)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	info, err := os.Lstat(DumpFile(temp, pid))
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != 0o600 {
		t.Fatalf("dump %v %v", info, err)
	}
	data, err := os.ReadFile(DumpFile(temp, pid))
	if err != nil || !strings.Contains(string(data), "goroutine ") || !strings.Contains(string(data), "helperSignals") {
		t.Errorf("dump %q %v", data, err)
	}
	if data, _ := os.ReadFile(target); string(data) != "precious" {
		t.Error("the dump was written through a link")
	}

	for _, sig := range []syscall.Signal{syscall.SIGINT} {
		cmd, out, _ := child(t, "signals", temp)
		if !out.Scan() {
			t.Fatal("no output")
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		for out.Scan() {
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", sig, err)
		}
	}
}

// contract: 2.3.2
func TestPrepare(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"TMPDIR", "TEMP", "TMP"} {
		t.Setenv(name, os.Getenv(name))
	}
	d := Dirs{Root: filepath.Join(dir, "a/root"), State: filepath.Join(dir, "state"), Temp: filepath.Join(dir, "tmp")}
	if err := os.MkdirAll(d.Root, 0o755); err != nil {
		t.Fatal(err)
	}
	old := unix.Umask(0o777)
	err := d.Prepare()
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{d.Root: 0o700, d.State: 0o711, d.Temp: 0o700} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v %v, want %v", path, info.Mode(), err, want)
		}
	}
	for _, name := range []string{"TMPDIR", "TEMP", "TMP"} {
		if os.Getenv(name) != d.Temp {
			t.Errorf("%s=%s", name, os.Getenv(name))
		}
	}
}

// A second daemon on the same root gets a clear error; a killed one leaves no
// stale lock.
func TestLockRoot(t *testing.T) {
	root := t.TempDir()
	cmd, out, _ := child(t, "lock", root)
	if !out.Scan() || out.Text() != "locked" {
		t.Fatalf("child: %s", out.Text())
	}
	_, err := LockRoot(root)
	want := fmt.Sprintf("lock root %s: it is in use by process %d", root, cmd.Process.Pid)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %s", err, want)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	l, err := LockRoot(root)
	if err != nil {
		t.Fatalf("after the owner was killed: %v", err)
	}
	if data, _ := os.ReadFile(filepath.Join(root, LockName)); strings.TrimSpace(string(data)) != strconv.Itoa(os.Getpid()) {
		t.Errorf("lock holds %q", data)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// contract: 2.3.8
func TestOOMScore(t *testing.T) {
	data, err := os.ReadFile(OOMScoreFile)
	if err != nil {
		t.Fatal(err)
	}
	now, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ set, want int }{{min(now+10, 1000), min(now+10, 1000)}, {0, now}, {5000, 1000}} {
		_, out, _ := child(t, "oom", strconv.Itoa(tc.set))
		if !out.Scan() || out.Text() != fmt.Sprintf("%d <nil>", tc.want) {
			t.Errorf("set %d: %q, want %d", tc.set, out.Text(), tc.want)
		}
	}
	// Lower than allowed: what was stays, or it works where the process may.
	_, out, _ := child(t, "oom", "-999")
	if !out.Scan() || out.Text() != "-999 <nil>" && out.Text() != fmt.Sprintf("%d <nil>", now) {
		t.Errorf("set -999: %q", out.Text())
	}
	if _, err := SetOOMScore(filepath.Join(t.TempDir(), "none"), 5); err == nil {
		t.Error("no error for a missing file")
	}
}

// contract: 2.3.9
func TestJoinCgroupFake(t *testing.T) {
	pid := strconv.Itoa(os.Getpid())
	file := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	read := func(path string) string {
		data, _ := os.ReadFile(path)
		return string(data)
	}
	v2 := t.TempDir()
	file(v2+"/cgroup.controllers", "cpu memory")
	file(v2+"/sys.slice/gantry/cgroup.procs", "")
	if err := JoinCgroup(v2, "../../sys.slice/gantry"); err != nil || read(v2+"/sys.slice/gantry/cgroup.procs") != pid {
		t.Errorf("v2: %v", err)
	}
	v1 := t.TempDir()
	for _, h := range []string{"cpu,cpuacct", "cpuset", "unified"} {
		file(v1+"/"+h+"/cgroup.procs", "")
		file(v1+"/"+h+"/g/cgroup.procs", "")
	}
	file(v1+"/cpuset/cpuset.cpus", "0-1\n")
	file(v1+"/cpuset/cpuset.mems", "0\n")
	file(v1+"/cpuset/g/cpuset.cpus", "\n")
	file(v1+"/cpuset/g/cpuset.mems", "\n")
	if err := os.Symlink("cpu,cpuacct", v1+"/cpu"); err != nil {
		t.Fatal(err)
	}
	if err := JoinCgroup(v1, "/g"); err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"cpu,cpuacct", "cpuset", "unified"} {
		if read(v1+"/"+h+"/g/cgroup.procs") != pid {
			t.Errorf("not in %s", h)
		}
	}
	if read(v1+"/cpuset/g/cpuset.cpus") != "0-1" {
		t.Error("the new cpuset has no CPU")
	}
	if err := JoinCgroup(v1, "/"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("root group: %v", err)
	}
	if err := JoinCgroup(t.TempDir(), "/g"); !errdefs.IsNotFound(err) {
		t.Errorf("no cgroups: %v", err)
	}
	if err := JoinCgroup("/nonexistent", ""); err != nil {
		t.Error(err)
	}
}

// contract: 2.3.9
func TestJoinCgroupReal(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make cgroups")
	}
	name := fmt.Sprintf("/gantry-lifecycle-test-%d", os.Getpid())
	t.Cleanup(func() {
		dirs, _ := filepath.Glob(CgroupMount + "/*" + name)
		for _, d := range append(dirs, CgroupMount+name) {
			for range 50 { // the kernel lets go of the dead child in its own time
				if err := unix.Rmdir(d); err == nil || errors.Is(err, unix.ENOENT) {
					break
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
	})
	cmd, out, _ := child(t, "cgroup", name)
	var lines []string
	for out.Scan() {
		lines = append(lines, out.Text())
	}
	if err := cmd.Wait(); err != nil {
		if strings.Contains(strings.Join(lines, " "), "read-only") {
			t.Skipf("cgroups cannot be written here: %v", lines)
		}
		t.Fatalf("%v: %v", err, lines)
	}
	in := 0
	for _, l := range lines {
		if strings.HasSuffix(l, ":"+name) {
			in++
		}
	}
	if in == 0 {
		t.Errorf("in no group of that name: %v", lines)
	}
}

// contract: 13.40
func TestCleanTempMounts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := filepath.Join(t.TempDir(), "tmp mounts")
	if err := CleanTempMounts(dir); err != nil {
		t.Fatalf("missing directory: %v", err)
	}
	for _, sub := range []string{"a", "b"} {
		p := filepath.Join(dir, sub)
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		for range 2 { // stacked
			if err := unix.Mount("tmpfs", p, "tmpfs", 0, "size=64k"); err != nil {
				t.Skipf("mount: %v", err)
			}
			t.Cleanup(func() { _ = unix.Unmount(p, unix.MNT_DETACH) })
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "keep/data"), 0o755); err != nil {
		t.Fatal(err)
	}
	err := CleanTempMounts(dir)
	if err == nil || !strings.Contains(err.Error(), "keep") {
		t.Errorf("a folder with data: %v, want it named", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "keep" {
		t.Errorf("left: %v %v", entries, err)
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	if strings.Contains(string(mounts), `tmp\040mounts`) {
		t.Error("still mounted")
	}
}
