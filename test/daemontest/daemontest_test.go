package daemontest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// script prepares a daemon that is a shell script.
func script(t *testing.T, body string) *Daemon {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "daemon")
	if err := os.WriteFile(bin, []byte("#!/bin/sh\n"+body), 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := Prepare(bin, 4, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Kill()
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func mentions(t *testing.T, err error, words ...string) {
	t.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("no %q in the error: %v", w, err)
		}
	}
}

// A daemon that does not live, or does not end as it should, is an error.
func TestEnds(t *testing.T) {
	d := script(t, "echo said; exit 3")
	mentions(t, d.Start(), "before it listened", "exit status 3")
	mentions(t, d.Stop(), "by itself", "exit status 3")
	if err := d.Stop(); err != nil {
		t.Errorf("stopped twice: %v", err)
	}
	if got := d.Log(5); got != "said\n" {
		t.Errorf("the log is %q", got)
	}

	d = script(t, "exit 0")
	mentions(t, d.Start(), "before it listened", "exit status 0")
	if end, ended := d.Ended(time.Minute); !ended || end != nil {
		t.Errorf("ended %v, %v", ended, end)
	}
	if err := d.Stop(); err != nil {
		t.Errorf("stopped after its end was noticed: %v", err)
	}

	d = script(t, "trap 'exit 4' TERM; echo ready; while :; do sleep 0.02; done")
	if err := d.Spawn(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); d.Log(100) == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the script does not run")
		}
	}
	if end, ended := d.Ended(0); ended {
		t.Fatalf("ended: %v", end)
	}
	if d.Pid() == 0 {
		t.Error("no pid")
	}
	mentions(t, d.Stop(), "SIGTERM", "exit status 4")
}

// All that a daemon can leave is listed, and swept; files that are mounted
// over are not removed.
func TestLeftovers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts and cgroups need root")
	}
	d := script(t, "")
	t.Cleanup(d.Sweep)
	if left := d.Leftovers(); len(left) > 0 {
		t.Fatalf("at first: %q", left)
	}
	named := exec.Command("sh", "-c", "while :; do sleep 0.02; done", d.Dir+"/x")
	marked := exec.Command("sh", "-c", "while :; do sleep 0.02; done", d.Mark)
	for _, c := range []*exec.Cmd{named, marked} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer c.Wait()
		defer c.Process.Kill()
	}
	for _, dir := range []string{"/mnt", "/state/io.containerd.runtime.v2.task/ns/box"} {
		if err := os.MkdirAll(d.Dir+dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mount("none", d.Dir+"/mnt", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	group := "/sys/fs/cgroup/"
	if _, err := os.Stat(group + "cgroup.controllers"); err != nil {
		group += "pids/"
	}
	group += d.Mark + "/box"
	if err := os.MkdirAll(group, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(); err == nil || !strings.Contains(err.Error(), "/mnt") {
		t.Errorf("removed below a mount: %v", err)
	}
	left := d.Leftovers()
	want := []string{"bundle ", "cgroup " + group, "mount ", "process ", "process "}
	if len(left) != len(want) {
		t.Fatalf("left are %q", left)
	}
	for i, w := range want {
		if !strings.HasPrefix(left[i], w) {
			t.Errorf("left is %q, want %q", left[i], w)
		}
	}
	d.Sweep()
	named.Wait()
	marked.Wait()
	for _, l := range d.Leftovers() {
		if !strings.HasPrefix(l, "bundle ") { // which is a file
			t.Errorf("after a sweep: %s", l)
		}
	}
	if _, err := os.Stat(filepath.Dir(group)); err == nil {
		t.Errorf("%s exists after a sweep", filepath.Dir(group))
	}
}
