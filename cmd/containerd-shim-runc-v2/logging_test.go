//go:build linux

package main_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// script writes a logging program.
func script(t *testing.T, k *task, body string) string {
	t.Helper()
	path := k.bundle + "/logger.sh"
	if err := os.WriteFile(path, []byte("#!/bin/bash\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func content(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

const talk = "echo to out; echo to err >&2"

// contract: 5.5.1, 5.5.4
func TestLogFile(t *testing.T) {
	d := newDaemon(t)
	for i, c := range []struct{ stdout, stderr, want string }{
		{"file://%s/deep/er/log", "file://%s/deep/er/log", "to err to out"},
		{"file://%s/deep/er/log", "", "to out"}, // containerd's shim panics
		{"", "file://%s/deep/er/log", "to err"},
	} {
		k := d.newTask(fmt.Sprint("c", i), "sh", "-c", talk)
		path := k.bundle + "/deep/er/log"
		if c.stdout != "" {
			k.stdout = fmt.Sprintf(c.stdout, k.bundle)
		}
		if c.stderr != "" {
			k.stderr = fmt.Sprintf(c.stderr, k.bundle)
		}
		k.run()
		k.wait("")
		k.delete("")
		lines := strings.Split(strings.TrimSpace(content(path)), "\n")
		if len(lines) == 2 && lines[0] > lines[1] {
			lines[0], lines[1] = lines[1], lines[0]
		}
		if got := strings.Join(lines, " "); got != c.want {
			t.Errorf("%q %q: %q", c.stdout, c.stderr, got)
		}
		// Appended to, not written anew.
		k.create()
		k.must("Start", &taskapi.StartRequest{ID: k.id}, &taskapi.StartResponse{})
		k.wait("")
		k.delete("")
		if got := strings.Count(content(path), "\n"); got != 2*len(lines) {
			t.Errorf("%d lines after a second run", got)
		}
		k.finish()
	}
	k := d.newTask("fifo", "sh", "-c", talk)
	path := fifo(t, k.bundle+"/out")
	out := read(t, path)
	k.stdout, k.stderr = "fifo://"+path, path
	k.run()
	k.wait("")
	out.await(t, "to out")
	out.await(t, "to err")
	k.delete("")
	k.finish()
}

// contract: 5.5.2, 5.5.3
func TestLogBinary(t *testing.T) {
	d := newDaemon(t)
	for _, scheme := range []string{"binary", "binary-v2"} {
		for _, terminal := range []bool{false, true} {
			k := d.newTask(fmt.Sprintf("%s-%v", scheme, terminal), "sh", "-c", talk)
			k.terminal, k.spec.Process.Terminal = terminal, terminal
			logger := script(t, k, `cd "$(dirname "$0")"
echo "$CONTAINER_NAMESPACE $CONTAINER_ID $*" > args
echo -n x >&5; exec 5>&-
cat <&4 > err & cat <&3 > out; wait; echo end >> args
`)
			k.stdout = scheme + "://" + logger + "?key=a%20value&other="
			k.stderr = k.stdout
			k.run()
			k.wait("")
			k.delete("")
			if got := content(k.bundle + "/args"); got != namespace+" "+k.id+" key a value other \nend\n" {
				t.Errorf("arguments %q", got)
			}
			out, errs := content(k.bundle+"/out"), content(k.bundle+"/err")
			if terminal {
				out, errs = strings.ReplaceAll(out, "\r", ""), "to err\n"
				if out != "to out\nto err\n" {
					t.Errorf("terminal: %q", out)
				}
				out = "to out\n"
			}
			if out != "to out\n" || errs != "to err\n" {
				t.Errorf("%s: out %q, err %q", k.id, out, errs)
			}
			k.finish()
		}
	}
}

// contract: 5.5.2, 5.5.3
func TestLogBinaryReadiness(t *testing.T) {
	d := newDaemon(t)
	k := d.newTask("c1", "sh", "-c", talk)
	// Closing is as good as writing for the older scheme only.
	logger := script(t, k, "exec 5>&-; cat <&3 > \"$0.out\"\n")
	k.stdout = "binary-v2://" + logger
	k.start()
	if _, err := k.tryCreate(); !errdefs.IsUnavailable(err) {
		t.Errorf("a program that is not ready: %v", err)
	}
	k.stdout = "binary://" + logger
	k.create()
	k.must("Start", &taskapi.StartRequest{ID: k.id}, &taskapi.StartResponse{})
	k.wait("")
	k.delete("")
	if got := content(logger + ".out"); got != "to out\n" {
		t.Errorf("out %q", got)
	}
	k.finish()

	// Logging programs outlive neither the end of their input nor SIGTERM.
	k = d.newTask("c2", "sleep", "1000")
	logger = script(t, k, "trap 'echo terminated > \"$0.out\"; exit' TERM\nexec 5>&-\nwhile :; do sleep 0.1; done\n")
	k.stdout = "binary://" + logger
	k.run()
	k.kill("", unix.SIGKILL)
	k.wait("")
	start := time.Now()
	k.delete("")
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("delete took %v", took)
	}
	if got := content(logger + ".out"); got != "terminated\n" {
		t.Errorf("out %q", got)
	}
	k.finish()
}

// The kubelet renames a container's log while it writes: what the container
// wrote is in the files together, in order, and its last words without a
// newline as well.
//
// contract: 7.3.17, 7.3.20, 13.29
// promise: P20
func TestLogRotatedByTheKubelet(t *testing.T) {
	d := newDaemon(t)
	k := d.newTask("c1", "sh", "-c", "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo; printf the-end")
	path := k.bundle + "/logs/0.log"
	k.stdout = "file://" + path + "?format=cri&max-line=16384"
	k.stderr = k.stdout
	k.run()
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		k.wait("")
	}()
	var files []string
	for running := true; running && len(files) < 500; {
		select {
		case <-exited:
			running = false
		case <-time.After(time.Millisecond):
		}
		next := fmt.Sprintf("%s.%d", path, len(files))
		if err := os.Rename(path, next); err != nil {
			t.Fatal(err)
		}
		files = append(files, next)
		if err := os.WriteFile(path, nil, 0o640); err != nil { // ReopenContainerLog
			t.Fatal(err)
		}
	}
	<-exited
	k.delete("")
	var got, want strings.Builder
	for _, f := range append(files, path) {
		for line := range strings.Lines(content(f)) {
			p := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
			if len(p) != 4 || p[1] != "stdout" || p[2] != "F" && p[2] != "P" || !strings.HasSuffix(line, "\n") {
				t.Fatalf("%s: bad record %q", f, line)
			}
			got.WriteString(p[3])
			if p[2] == "F" {
				got.WriteByte('\n')
			}
		}
	}
	for i := range 20000 {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	want.WriteString("\nthe-end")
	if got.String() != want.String() || len(files) < 2 {
		t.Errorf("%d bytes of %d, or others, over %d files", got.Len(), want.Len(), len(files)+1)
	}
}
