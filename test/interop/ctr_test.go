package interop

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// ctr is Debian's ctr on a daemon.
type ctr struct {
	*daemon
	path string
}

func (c ctr) try(args ...string) (string, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.path, append([]string{"-a", c.Address()}, args...)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	return out.String(), errOut.String(), err
}

func (c ctr) run(args ...string) string {
	c.t.Helper()
	out, errOut, err := c.try(args...)
	if err != nil {
		c.t.Fatalf("ctr %s: %v\n%s%s", strings.Join(args, " "), err, out, errOut)
	}
	return out
}

func (c ctr) has(out string, wants ...string) {
	c.t.Helper()
	for _, w := range wants {
		if !strings.Contains(out, w) {
			c.t.Errorf("no %q in:\n%s", w, out)
		}
	}
}

// contract: 14.5, 8.1.1, 8.1.2, 8.1.4, 8.1.3, 8.1.5, 8.1.6, 8.1.7, 8.1.8, 8.1.9, 8.1.10, 13.36
func TestCtr(t *testing.T) {
	_, made, ref := served(t)
	d := newGantry(t)
	d.start()
	c := ctr{d, debian(t, "ctr")}

	c.has(c.run("version"), "Server:", "Version:")
	c.run("images", "pull", "--plain-http", ref)
	c.has(c.run("images", "ls"), ref, made.Target.Digest.String())
	c.has(c.run("images", "check"), "complete", "true")
	if out := c.run("run", "--rm", ref, "one"); out != "hello from yes\ngreetings from the second layer\n" {
		t.Errorf("run --rm printed %q", out)
	}
	_, errOut, err := c.try("run", "--rm", ref, "code", "/bin/sh", "-c", "exit 9")
	if ee, ok := err.(*exec.ExitError); !ok || ee.ExitCode() != 9 {
		t.Errorf("run of exit 9: %v %s", err, errOut)
	}

	// Events of all that follows.
	events := exec.Command(c.path, "-a", d.Address(), "events")
	var stream buffer
	events.Stdout = &stream
	if err := events.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { events.Process.Kill(); events.Wait() }()
	eventually(t, "events are subscribed to", func() bool {
		c.run("namespaces", "label", "default", "probe="+time.Now().Format("150405.000000000"))
		return strings.Contains(stream.String(), "/namespaces/update")
	})

	c.run("run", "-d", ref, "two", "/bin/sleep", "600")
	c.has(c.run("containers", "ls"), "two", ref, "io.containerd.runc.v2")
	c.has(c.run("containers", "info", "two"), `"ID": "two"`, "io.containerd.runc.v2", "/bin/sleep")
	c.has(c.run("containers", "label", "two", "k=v"), "k=v")
	c.has(c.run("containers", "ls", "labels.k==v"), "two")
	c.has(c.run("tasks", "ls"), "two", "RUNNING")
	if out := c.run("tasks", "exec", "--exec-id", "x", "two", "/bin/echo", "executed"); out != "executed\n" {
		t.Errorf("exec printed %q", out)
	}
	c.has(c.run("tasks", "ps", "two"), "PID")
	c.has(c.run("tasks", "metrics", "two"), "memory", "pids.current")
	c.run("tasks", "pause", "two")
	c.has(c.run("tasks", "ls"), "PAUSED")
	c.run("tasks", "resume", "two")
	c.run("tasks", "kill", "-s", "SIGKILL", "two")
	eventually(t, "the task is stopped", func() bool { return strings.Contains(c.run("tasks", "ls"), "STOPPED") })
	c.run("tasks", "rm", "two")
	c.run("containers", "rm", "two")
	eventually(t, "all events have come", func() bool { return strings.Contains(stream.String(), "/containers/delete") })
	rest := stream.String()
	for _, topic := range []string{"/snapshot/prepare", "/containers/create", "/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete", "/containers/delete"} {
		_, after, ok := strings.Cut(rest, topic)
		if !ok {
			t.Errorf("event %s is missing or out of order in:\n%s", topic, stream.String())
			break
		}
		rest = after
	}

	c.has(c.run("content", "ls"), made.Target.Digest.String(), "containerd.io/distribution.source")
	if out := c.run("content", "get", made.Target.Digest.String()); out != string(made.Blobs[made.Target.Digest]) {
		t.Errorf("content get printed %q", out)
	}
	c.has(c.run("snapshots", "tree"), "sha256:", "\\_")
	c.has(c.run("snapshots", "ls"), "Committed")
	c.has(c.run("plugins", "ls"), "io.containerd.snapshotter.v1", "overlayfs", "io.containerd.runtime.v2", "ok")
	c.run("leases", "create", "--id", "l1", "x=y")
	c.has(c.run("leases", "ls"), "l1", "x=y")
	c.run("leases", "rm", "l1")
	c.run("namespaces", "create", "other", "a=b")
	c.has(c.run("namespaces", "ls"), "default", "other", "a=b")
	c.run("namespaces", "rm", "other")

	tar := filepath.Join(d.Dir, "image.tar")
	c.run("images", "export", tar, ref)
	c.run("images", "rm", "--sync", ref)
	if out := c.run("content", "ls", "-q"); out != "" {
		t.Errorf("content after rm --sync:\n%s", out)
	}
	if out := c.run("snapshots", "ls"); strings.Contains(out, "Committed") {
		t.Errorf("snapshots after rm --sync:\n%s", out)
	}
	c.has(c.run("-n", "imported", "images", "import", tar), ref)
	c.has(c.run("-n", "imported", "images", "ls", "-q"), ref)
	if out := c.run("-n", "imported", "run", "--rm", ref, "three", "/bin/cat", "/data/link"); out != "greetings from the second layer\n" {
		t.Errorf("the imported image printed %q", out)
	}
	c.run("-n", "imported", "images", "rm", "--sync", ref)
	if left, err := os.ReadDir(d.Dir + "/root/io.containerd.content.v1.content/blobs/sha256"); err != nil || len(left) > 0 {
		t.Errorf("blobs left on disk: %v, %v", left, err)
	}
}

// shimLife runs, executes, kills and deletes with a runtime given by path.
func shimLife(t *testing.T, c ctr, runtime string) {
	ref, made := "example.org/busybox:latest", testArchive(t, c.Dir)
	c.run("images", "import", made)
	if out := c.run("run", "--rm", "--runtime", runtime, ref, "one"); out != "hello from yes\ngreetings from the second layer\n" {
		t.Errorf("run --rm printed %q", out)
	}
	_, errOut, err := c.try("run", "--rm", "--runtime", runtime, ref, "code", "/bin/sh", "-c", "exit 9")
	if ee, ok := err.(*exec.ExitError); !ok || ee.ExitCode() != 9 {
		t.Errorf("run of exit 9: %v %s", err, errOut)
	}
	c.run("run", "-d", "--runtime", runtime, ref, "two", "/bin/sleep", "600")
	if out := c.run("tasks", "exec", "--exec-id", "x", "two", "/bin/echo", "executed"); out != "executed\n" {
		t.Errorf("exec printed %q", out)
	}
	_, _, err = c.try("tasks", "exec", "--exec-id", "y", "two", "/bin/sh", "-c", "exit 3")
	if ee, ok := err.(*exec.ExitError); !ok || ee.ExitCode() != 3 {
		t.Errorf("exec of exit 3: %v", err)
	}
	c.run("tasks", "kill", "-s", "SIGKILL", "two")
	eventually(t, "the task is stopped", func() bool { return strings.Contains(c.run("tasks", "ls"), "STOPPED") })
	_, errOut, err = c.try("tasks", "rm", "two")
	if err != nil || !strings.Contains(errOut, "137") {
		t.Errorf("rm of the killed task: %v %q, want a warning of exit code 137", err, errOut)
	}
	c.run("containers", "rm", "two")
	c.run("images", "rm", "--sync", ref)
}

// contract: 5.2.4, 5.2.5, 1.4.3, 14.6, 5.4.5
func TestForeignShim(t *testing.T) {
	if _, err := exec.LookPath("runc"); err != nil {
		t.Skipf("Debian's shim needs runc: %v", err)
	}
	d := newGantry(t)
	d.start()
	shimLife(t, ctr{d, debian(t, "ctr")}, debian(t, "containerd-shim-runc-v2"))
}

// contract: 5.2.1, 5.2.2, 5.2.5, 8.3.1, 1.4.2
func TestShimUnderForeignDaemon(t *testing.T) {
	d := newDaemon(t, debian(t, "containerd"), 2)
	d.start()
	shimLife(t, ctr{d, debian(t, "ctr")}, filepath.Join(binDir, "containerd-shim-runc-v2"))
}
