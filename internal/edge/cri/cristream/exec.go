//go:build linux

package cristream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/oci"
)

// processURL is the type of an OCI process as JSON (contract 1.2.10).
const processURL = "types.containerd.io/opencontainers/runtime-spec/1/Process"

// ExecSync executes a command and returns what it printed, of each stream at
// most MaxOutput bytes, and how it ended (contract 7.1.18). After timeout, 0 is
// none, everything that the command has started is killed, and the error is
// context.DeadlineExceeded (contract 13.27), with what was printed until then
// in the result and the end of it in the text. ErrNotFound, ErrInvalidArgument;
// ErrFailedPrecondition if the container does not run.
func (s *Service) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (Result, error) {
	if timeout < 0 {
		return Result{}, fmt.Errorf("exec in container %s: timeout %v: %w", id, timeout, errdefs.ErrInvalidArgument)
	}
	limited := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		limited, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	var out, errs capped
	code, err := s.Exec(limited, id, cmd, Streams{Stdout: &out, Stderr: &errs})
	r := Result{Stdout: out.take(), Stderr: errs.take(), ExitCode: int32(code)}
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return r, fmt.Errorf("exec in container %s: timeout %v exceeded (stdout %s, stderr %s): %w", id, timeout, tail(r.Stdout), tail(r.Stderr), context.DeadlineExceeded)
	}
	return r, err
}

// tail quotes the end of what was printed.
func tail(b []byte) string {
	const most = 256
	if len(b) > most {
		return fmt.Sprintf("...%q", b[len(b)-most:])
	}
	return fmt.Sprintf("%q", b)
}

// Exec executes a command with a client's streams and returns its exit status.
// When ctx ends first, everything that the command has started is killed. Reads
// of st.Stdin may go on after Exec has returned, until st.Stdin is closed; no
// other stream is used then. Errors are ExecSync's.
func (s *Service) Exec(ctx context.Context, id string, cmd []string, st Streams) (uint32, error) {
	c, err := s.running(ctx, id)
	if err != nil {
		return 0, err
	}
	x, err := s.start(ctx, c, cmd, st)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", c.ID, err)
	}
	code, err := x.finish(ctx)
	if err != nil {
		return code, fmt.Errorf("exec in container %s: %w", c.ID, err)
	}
	return code, nil
}

// command is a process executed in a container.
type command struct {
	s    *Service
	id   container.ID
	exec task.ExecID
	dir  string
	kin  *kin

	in     *os.File
	out    [2]*os.File
	ended  chan struct{} // closed when the process has ended, exit and lost are set then
	exit   task.Exit
	lost   error
	copied chan struct{} // closed when all output has been copied
	wait   context.CancelFunc
	gate   gate // between the output and the client's writers
}

// start makes and starts the process. Nothing is left of it after an error.
func (s *Service) start(ctx context.Context, c Container, cmd []string, st Streams) (_ *command, err error) {
	if len(cmd) == 0 {
		return nil, fmt.Errorf("the command is empty: %w", errdefs.ErrInvalidArgument)
	}
	if c.Process == nil {
		return nil, fmt.Errorf("its spec has no process: %w", errdefs.ErrFailedPrecondition)
	}
	proc := *c.Process
	proc.Args, proc.CommandLine, proc.Terminal, proc.ConsoleSize = cmd, "", st.TTY, nil
	if st.TTY {
		proc.Env = oci.MergeEnv(proc.Env, []string{"TERM=xterm"})
	}
	spec, err := json.Marshal(proc)
	if err != nil {
		return nil, fmt.Errorf("encode the process: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	exec := task.ExecID(cristate.NewID())
	x := &command{s: s, id: c.ID, exec: exec, dir: filepath.Join(s.d.Dir, string(c.ID)+"_"+string(exec)),
		ended: make(chan struct{}), copied: make(chan struct{}), wait: func() {}}
	if err := os.Mkdir(x.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make FIFOs: %w", err)
	}
	made := false
	defer func() {
		if err == nil {
			return
		}
		x.closeFiles()
		if !made {
			err = errors.Join(err, os.RemoveAll(x.dir))
			return
		}
		given := ctx.Err()
		x.after(func(ctx context.Context) {
			err := s.end(ctx, x.id, exec, x.kin)
			if given != nil {
				// A call that was given up may still have its effect.
				select {
				case <-time.After(time.Second):
				case <-ctx.Done():
				}
				err = s.end(ctx, x.id, exec, x.kin)
			}
			x.remove(err)
		})
	}()
	io := task.IO{Terminal: st.TTY}
	var keep [3]*os.File // the other ends, until the shim has them
	defer func() { closeAll(keep[:]...) }()
	if st.Stdin != nil {
		if io.Stdin, keep[0], x.in, err = fifo(x.dir, "stdin"); err != nil {
			return nil, err
		}
	}
	if st.Stdout != nil {
		if io.Stdout, x.out[0], keep[1], err = fifo(x.dir, "stdout"); err != nil {
			return nil, err
		}
	}
	if st.Stderr != nil && !st.TTY {
		if io.Stderr, x.out[1], keep[2], err = fifo(x.dir, "stderr"); err != nil {
			return nil, err
		}
	}
	since := ticks()
	made = true // an answer that did not come is no proof of the contrary
	if err := s.d.Tasks.Exec(ctx, c.ID, exec, task.ExecOptions{IO: io, Spec: typed.Any{URL: processURL, Value: spec}}); err != nil {
		return nil, err
	}
	pid, err := s.d.Tasks.Start(ctx, c.ID, exec)
	if err != nil {
		return nil, err
	}
	x.kin = kinOf(int(pid), since)
	x.follow(st)
	return x, nil
}

// follow copies the streams and waits for the end.
func (x *command) follow(st Streams) {
	var copying sync.WaitGroup
	for i, w := range []io.Writer{st.Stdout, st.Stderr} {
		f := x.out[i]
		if f == nil {
			continue
		}
		copying.Go(func() {
			if _, err := io.Copy(x.gate.writer(w), f); err != nil {
				// The process must not block because its client has gone.
				io.Copy(io.Discard, f)
			}
		})
	}
	go func() {
		copying.Wait()
		close(x.copied)
	}()
	ctx, cancel := context.WithCancel(x.s.ctx)
	x.wait = cancel
	go func() {
		x.exit, x.lost = x.s.d.Tasks.Wait(ctx, x.id, x.exec)
		close(x.ended)
	}()
	if x.in != nil {
		go func() {
			io.Copy(x.in, st.Stdin)
			x.in.Close()
			ctx, cancel := context.WithTimeout(ctx, cleanWithin)
			defer cancel()
			x.s.d.Tasks.CloseStdin(ctx, x.id, x.exec) // it may have ended
		}()
	}
	if st.TTY && st.Resize != nil {
		go x.s.resize(ctx, x.id, x.exec, st.Resize)
	}
}

// resize passes sizes on until ctx ends or there are no more.
func (s *Service) resize(ctx context.Context, id container.ID, exec task.ExecID, sizes <-chan Size) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-sizes:
			if !ok {
				return
			}
			call, cancel := context.WithTimeout(ctx, cleanWithin)
			if err := s.d.Tasks.Resize(call, id, exec, uint32(size.Width), uint32(size.Height)); err != nil && ctx.Err() == nil {
				s.d.Log.Debug("resize a terminal", "container", id, "exec", exec, "error", err)
			}
			cancel()
		}
	}
}

// finish waits for the end of the process and of its output, and leaves
// nothing behind.
func (x *command) finish(ctx context.Context) (uint32, error) {
	select {
	case <-ctx.Done():
		return 0, x.kill(ctx.Err())
	case <-x.ended:
	}
	if x.lost != nil {
		return 0, x.kill(x.lost)
	}
	var drain <-chan time.Time
	if x.s.d.Drain > 0 {
		t := time.NewTimer(x.s.d.Drain)
		defer t.Stop()
		drain = t.C
	}
	select {
	case <-x.copied:
	case <-ctx.Done():
		return x.exit.Status, x.kill(ctx.Err())
	case <-drain:
		x.after(x.forget)
		return x.exit.Status, fmt.Errorf("it has ended with status %d, and %v later its output is still held open by other processes", x.exit.Status, x.s.d.Drain)
	}
	x.after(x.forget)
	return x.exit.Status, nil
}

// kill ends everything that the command has started, and returns why.
func (x *command) kill(why error) error {
	x.after(func(ctx context.Context) {
		err := x.s.end(ctx, x.id, x.exec, x.kin)
		select {
		case <-x.copied: // what it printed in the end
		case <-time.After(answerWithin / 2):
		}
		x.remove(err)
	})
	return why
}

// after runs what undoes the command, and returns when that is done, or soon,
// while it goes on. Then the client's writers are no longer used.
func (x *command) after(fn func(context.Context)) {
	done := make(chan struct{})
	x.s.tails.Go(func() {
		defer close(done)
		ctx, cancel := context.WithTimeout(x.s.ctx, cleanWithin)
		defer cancel()
		fn(ctx)
	})
	select {
	case <-done:
	case <-time.After(answerWithin):
	}
	x.gate.shut()
}

// forget makes the runtime forget the process, which has ended by itself.
func (x *command) forget(ctx context.Context) {
	_, err := x.s.d.Tasks.DeleteExec(ctx, x.id, x.exec)
	x.remove(err)
}

// remove removes the FIFOs, and reports what went wrong before.
func (x *command) remove(err error) {
	x.wait()
	x.closeFiles()
	if err = errors.Join(ignoreGone(err), os.RemoveAll(x.dir)); err != nil {
		x.s.d.Log.Warn("a command is not removed", "container", x.id, "exec", x.exec, "error", err)
	}
}

func (x *command) closeFiles() { closeAll(x.in, x.out[0], x.out[1]) }

// end kills an exec with all that it started, and makes the runtime forget it.
// It tries for as long as ctx lets it: an exec may be in the middle of its
// start.
func (s *Service) end(ctx context.Context, id container.ID, exec task.ExecID, k *kin) error {
	// With all set, Gantry's shim kills the exec's own cgroup. Another shim
	// kills the one process; its relations are looked for.
	k.stop()
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := s.d.Tasks.Kill(ctx, id, exec, uint32(unix.SIGKILL), true)
		k.kill()
		if err == nil {
			// What is not found is not waited for: it may have been made after that.
			short, cancel := context.WithTimeout(ctx, time.Second)
			_, err = s.d.Tasks.Wait(short, id, exec)
			cancel()
		}
		_, derr := s.d.Tasks.DeleteExec(ctx, id, exec)
		if ignoreGone(derr) == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, derr)
		case <-time.After(pause):
		}
	}
}

// fifo makes a FIFO and opens both of its ends, so that neither end of file
// nor a refusal comes before the shim has opened its own.
func fifo(dir, name string) (path string, r, w *os.File, err error) {
	path = filepath.Join(dir, name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return "", nil, nil, fmt.Errorf("make FIFO %s: %w", path, err)
	}
	if r, err = os.OpenFile(path, unix.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
		w, err = os.OpenFile(path, unix.O_WRONLY|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		closeAll(r)
		return "", nil, nil, fmt.Errorf("open FIFO: %w", err)
	}
	return path, r, w, nil
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// gate lets output through until it is shut. Shutting waits for no write: one
// that is under way ends with the client's connection.
type gate struct {
	mu   sync.Mutex
	done bool
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.done = true
}

func (g *gate) writer(w io.Writer) io.Writer { return gated{g, w} }

type gated struct {
	g *gate
	w io.Writer
}

func (g gated) Write(p []byte) (int, error) {
	g.g.mu.Lock()
	done := g.g.done
	g.g.mu.Unlock()
	if done {
		return 0, io.ErrClosedPipe
	}
	return g.w.Write(p)
}

// capped keeps the beginning of what is written, and never fails.
type capped struct {
	mu    sync.Mutex
	b     []byte
	taken bool
}

func (c *capped) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if room := MaxOutput - len(c.b); room > 0 && !c.taken {
		c.b = append(c.b, p[:min(room, len(p))]...)
	}
	return len(p), nil
}

// take returns what was written; nothing is kept after that.
func (c *capped) take() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.b
	c.b, c.taken = nil, true
	return b
}
