//go:build linux

package cristream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/task"
)

// mute is tasks whose changes have no effect when it is off.
type mute struct {
	Tasks
	off atomic.Bool
}

func (m *mute) Kill(ctx context.Context, id container.ID, exec task.ExecID, signal uint32, all bool) error {
	if m.off.Load() {
		return nil
	}
	return m.Tasks.Kill(ctx, id, exec, signal, all)
}

func (m *mute) DeleteExec(ctx context.Context, id container.ID, exec task.ExecID) (task.Exit, error) {
	if m.off.Load() {
		return task.Exit{}, nil
	}
	return m.Tasks.DeleteExec(ctx, id, exec)
}

// sick is tasks that answer a call only when its context ends, or refuse it.
type sick struct {
	mu      sync.Mutex
	hangs   map[string]bool // by name of the call
	refuses map[string]error
	calls   []string
}

func (s *sick) call(ctx context.Context, name string) error {
	s.mu.Lock()
	s.calls = append(s.calls, name)
	hang, err := s.hangs[name], s.refuses[name]
	s.mu.Unlock()
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	return err
}

func (s *sick) Exec(ctx context.Context, _ container.ID, _ task.ExecID, _ task.ExecOptions) error {
	return s.call(ctx, "exec")
}
func (s *sick) Start(ctx context.Context, _ container.ID, _ task.ExecID) (uint32, error) {
	return 0, s.call(ctx, "start")
}
func (s *sick) Wait(ctx context.Context, _ container.ID, _ task.ExecID) (task.Exit, error) {
	return task.Exit{}, s.call(ctx, "wait")
}
func (s *sick) Kill(ctx context.Context, _ container.ID, _ task.ExecID, _ uint32, _ bool) error {
	return s.call(ctx, "kill")
}
func (s *sick) DeleteExec(ctx context.Context, _ container.ID, _ task.ExecID) (task.Exit, error) {
	return task.Exit{}, s.call(ctx, "delete")
}
func (s *sick) Resize(ctx context.Context, _ container.ID, _ task.ExecID, _, _ uint32) error {
	return s.call(ctx, "resize")
}
func (s *sick) CloseStdin(ctx context.Context, _ container.ID, _ task.ExecID) error {
	return s.call(ctx, "close")
}

// A shim that does not answer costs the caller no more than its timeout, at
// whatever call it hangs, and what is left is removed when it answers again.
// contract: 7.1.18, 13.27
// promise: P17
func TestSickShim(t *testing.T) {
	for _, hang := range []string{"exec", "start", "wait", "kill wait", "delete wait"} {
		t.Run(hang, func(t *testing.T) {
			r := &rig{t: t, containers: map[string]Container{"c": {ID: "c", Process: &specs.Process{}}}}
			tasks := &sick{hangs: map[string]bool{}, refuses: map[string]error{}}
			for _, h := range strings.Fields(hang) {
				tasks.hangs[h] = true
			}
			s := r.service(tasks, 0)
			const timeout = 200 * time.Millisecond
			began := time.Now()
			_, err := s.ExecSync(t.Context(), "c", []string{"x"}, timeout)
			took := time.Since(began)
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "context deadline exceeded") {
				t.Error(err)
			}
			if took < timeout || took > timeout+100*time.Millisecond && !slow() {
				t.Errorf("it took %v", took)
			}
			// What hangs ends with the Service at the latest.
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			s.Close(ctx)
			until(t, "the directory is empty", func() bool {
				left, err := os.ReadDir(s.d.Dir)
				return err == nil && len(left) == 0
			})
		})
	}
	t.Run("refused", func(t *testing.T) {
		refused := fmt.Errorf("no: %w", errdefs.ErrFailedPrecondition)
		for _, call := range []string{"exec", "start"} {
			r := &rig{t: t, containers: map[string]Container{"c": {ID: "c", Process: &specs.Process{}}, "stopped": {ID: "stopped", Running: refused}}}
			tasks := &sick{refuses: map[string]error{call: refused}}
			s := r.service(tasks, 0)
			if _, err := s.ExecSync(t.Context(), "c", []string{"x"}, time.Second); !errdefs.IsFailedPrecondition(err) || errdefs.IsDeadlineExceeded(err) {
				t.Error(call, err)
			}
			if _, err := s.ExecSync(t.Context(), "stopped", []string{"x"}, time.Second); !errdefs.IsFailedPrecondition(err) {
				t.Error(err)
			}
			if left, err := os.ReadDir(s.d.Dir); err != nil || len(left) > 0 {
				t.Error(left, err)
			}
			tasks.mu.Lock()
			if all := strings.Join(tasks.calls, " "); !strings.Contains(all, "kill") || !strings.Contains(all, "delete") {
				t.Error("an exec of which nothing is known was not ended: ", all)
			}
			tasks.mu.Unlock()
		}
	})
}

// Records are passed on to the byte, wherever a read begins and ends.
// contract: 7.1.19
func TestRecords(t *testing.T) {
	const head = "2026-01-02T15:04:05.000000006Z "
	text := head + "stdout F one\n" + head + "stderr P two\n" + head + "stdout P \n" + "no record\n" + head + "stdout F\x20\n" + "\n" + strings.Repeat("x", 3*maxHead) + "\n" +
		head + "stdout P:x part\n" + head + "stdin F nobody's\n" + head + "stderr F -rest\n" + head + "stdout F " + strings.Repeat("y", 100000) + "\n"
	for _, step := range []int{1, 2, 7, 63, 64, 65, 1000, len(text)} {
		var out, errs bytes.Buffer
		var l logTail
		for b := []byte(text); len(b) > 0; b = b[min(step, len(b)):] {
			if err := l.pass(b[:min(step, len(b))], &out, &errs); err != nil {
				t.Fatal(err)
			}
		}
		if want := "one\n\npart" + strings.Repeat("y", 100000) + "\n"; out.String() != want {
			t.Errorf("%d: %.100q", step, out.String())
		}
		if errs.String() != "two-rest\n" {
			t.Errorf("%d: %q", step, errs.String())
		}
	}
}

// From now on, through all that can happen to a log, until the end.
// contract: 7.1.19
func TestFollow(t *testing.T) {
	const head = "2026-01-02T15:04:05.000000006Z stdout F "
	path := filepath.Join(t.TempDir(), "log")
	write := func(path, text string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err == nil {
			_, err = f.WriteString(head + text + "\n")
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write(path, "before")
	l, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	var mu sync.Mutex
	var got bytes.Buffer
	sink := writer(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return got.Write(p)
	})
	gone := make(chan struct{})
	done := make(chan error, 1)
	go func() { done <- l.follow(t.Context(), gone, nil, sink, sink) }()
	has := func(text string) {
		t.Helper()
		until(t, text, func() bool {
			mu.Lock()
			defer mu.Unlock()
			return strings.HasSuffix(got.String(), text+"\n")
		})
	}
	rename := func(to string) {
		t.Helper()
		if err := os.Rename(path, to); err != nil {
			t.Fatal(err)
		}
	}
	write(path, "first")
	has("first")
	rename(path + ".old") // the kubelet; the shim has not noticed
	write(path+".old", "to the old file")
	has("to the old file")
	write(path, "to the new file")
	has("to the new file")
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * lookLate) // a cut can only be seen while the file is shorter
	write(path, "after a cut")
	has("after a cut")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	write(path, "after a removal")
	has("after a removal")
	close(gone)
	write(path, "the last words")
	if err := <-done; err != nil {
		t.Error(err)
	}
	if want := "first\nto the old file\nto the new file\nafter a cut\nafter a removal\nthe last words\n"; got.String() != want {
		t.Errorf("%q", got.String())
	}
	if _, err := openLog(t.TempDir()); err == nil {
		t.Error("a directory is no log")
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

// promise: P17
func TestKin(t *testing.T) {
	for _, c := range []struct {
		group, of string
		want      bool
	}{
		{"1:cpu:/a\n0::/a\n", "1:cpu:/a\n0::/a\n", true}, {"1:cpu:/a/b\n0::/a\n", "1:cpu:/a\n0::/a\n", true}, {"1:cpu:/ab\n0::/a\n", "1:cpu:/a\n0::/a\n", false},
		{"1:cpu:/\n0::/a\n", "1:cpu:/a\n0::/a\n", false}, {"0::/a\n", "1:cpu:/a\n0::/a\n", false},
	} {
		if got := within(c.group, c.of); got != c.want {
			t.Errorf("%q in %q: %v", c.group, c.of, got)
		}
	}
	if k := kinOf(os.Getpid(), ticks()+1); k != nil {
		t.Error("what ran before is taken for the command")
	}
	// As a shim would that knows only the one process: the rest is found.
	since := ticks()
	cmd := exec.Command("/bin/busybox", "sh", "-c", "/bin/busybox sleep 7601 & /bin/busybox setsid /bin/busybox sleep 7602 & /bin/busybox sleep 7603; true")
	other := exec.Command("/bin/busybox", "sleep", "7699")
	for _, c := range []*exec.Cmd{cmd, other} {
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := c.Start(); err != nil {
			t.Skip("busybox-static is needed: ", err)
		}
	}
	until(t, "they run", func() bool {
		return processes("sleep 7601") == 2 && processes("setsid /bin/busybox sleep 7602")+processes("busybox sleep 7602") >= 2 && processes("busybox sleep 7603") == 2
	})
	k := kinOf(cmd.Process.Pid, since)
	if k == nil {
		t.Fatal("the command itself is not found")
	}
	k.kill()
	cmd.Wait()
	until(t, "they have ended", func() bool { return processes("sleep 760") == 0 })
	if processes("sleep 7699") != 1 {
		t.Error("a stranger was killed")
	}
	other.Process.Kill()
	other.Wait()
	if k := kinOf(cmd.Process.Pid, since); k != nil {
		t.Error("it has ended")
	}
	(*kin)(nil).stop()
	(*kin)(nil).kill()
}
