//go:build linux

package reaper

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// run starts a reaper that ends with the test.
func run(t *testing.T) *Reaper {
	t.Helper()
	r := New()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

func start(t *testing.T, script string) int {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

func wait(t *testing.T, ch <-chan Exit) Exit {
	t.Helper()
	select {
	case e := <-ch:
		return e
	case <-time.After(10 * time.Second):
		t.Fatal("no exit")
		panic("unreachable")
	}
}

// contract: 5.3.3
func TestStatus(t *testing.T) {
	r := run(t)
	for script, want := range map[string]uint32{"exit 0": 0, "exit 7": 7, "kill -9 $$": 137, "kill -TERM $$": 143} {
		release := r.Hold()
		pid := start(t, script)
		ch := make(chan Exit, 1)
		r.Watch(pid, func(e Exit) { ch <- e })
		release()
		if e := wait(t, ch); e.Status != want || e.Pid != pid || e.At.IsZero() {
			t.Errorf("%s: %+v", script, e)
		}
		if err := r.Signal(pid, unix.SIGTERM); !errors.Is(err, ErrGone) {
			t.Errorf("signal after the exit: %v", err)
		}
	}
}

// A process that is gone before it is watched is still reported.
// contract: 5.3.3
func TestEarlyExit(t *testing.T) {
	r := run(t)
	release := r.Hold()
	defer release()
	pid := start(t, "exit 3")
	for !strings.Contains(readStat(pid), ") Z") {
		time.Sleep(time.Millisecond)
	}
	r.wake()
	ch := make(chan Exit, 1)
	r.Watch(pid, func(e Exit) { ch <- e })
	if e := wait(t, ch); e.Status != 3 {
		t.Errorf("%+v", e)
	}
}

func readStat(pid int) string {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return string(b)
}

// Children of others are not stolen, orphans are reaped.
// contract: 5.2.11
func TestHoldAndOrphans(t *testing.T) {
	r := run(t)
	if err := Subreaper(); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	release := r.Hold()
	out, err := exec.Command("/bin/sh", "-c", "sleep 0.05 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatalf("waiting for a child of our own: %v", err)
	}
	release()
	orphan := strings.TrimSpace(string(out))
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := os.Stat("/proc/" + orphan); err != nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the orphan was not reaped")
		}
		time.Sleep(5 * time.Millisecond)
	}
}
