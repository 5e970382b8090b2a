//go:build linux

// Package cristream lets clients talk to what runs in a pod: commands executed
// in a container, its standard streams, and its ports; at once, or over SPDY
// and WebSocket. Whatever a client does or fails to do, in the end nothing of
// its request is left: no process, FIFO, directory, goroutine or connection.
package cristream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/task"
)

// Tasks is what is used of task.Store.
type Tasks interface {
	Exec(ctx context.Context, id container.ID, exec task.ExecID, opts task.ExecOptions) error
	Start(ctx context.Context, id container.ID, exec task.ExecID) (pid uint32, err error)
	Wait(ctx context.Context, id container.ID, exec task.ExecID) (task.Exit, error)
	Kill(ctx context.Context, id container.ID, exec task.ExecID, signal uint32, all bool) error
	DeleteExec(ctx context.Context, id container.ID, exec task.ExecID) (task.Exit, error)
	Resize(ctx context.Context, id container.ID, exec task.ExecID, width, height uint32) error
	CloseStdin(ctx context.Context, id container.ID, exec task.ExecID) error
}

// Container is what has to be known of a container when a client wants to
// talk to it.
type Container struct {
	ID container.ID // the whole one
	// Running is nil if it runs, else why it cannot be talked to:
	// ErrFailedPrecondition that names the state.
	Running error
	// Process is the first process of its specification: a command executed
	// gets its environment, user and limits. It is not changed.
	Process *specs.Process
	// TTY, Stdin and StdinOnce are its configuration's.
	TTY, Stdin, StdinOnce bool
	// StdinPath is the FIFO of its input, "" if it has none.
	StdinPath string
	// InputEnds, unless nil, is called before a container with StdinOnce is told
	// that its input has ended.
	InputEnds func()
	// LogPath is the file that its shim writes in Kubernetes' format, "" if
	// there is none. Follow, unless nil, is asked for the output instead, for
	// a shim that writes no such file: it copies what comes from now on until
	// ctx ends or the output does.
	LogPath string
	Follow  func(ctx context.Context, stdout, stderr io.Writer) error
	// Gone is closed when the container has ended.
	Gone <-chan struct{}
}

// Pod is what has to be known of a pod to reach its ports.
type Pod struct {
	ID string
	// Ready is nil, or why it cannot be reached.
	Ready error
	// NetNSPath is "" for a pod in the host's network.
	NetNSPath string
}

// Deps is what a Service works on.
type Deps struct {
	Tasks Tasks
	// Container and Pod find by id, or by the beginning of one, as
	// cristate.Index does. ErrNotFound, ErrInvalidArgument.
	Container func(ctx context.Context, id string) (Container, error)
	Pod       func(ctx context.Context, id string) (Pod, error)
	// Dir is where FIFOs are made: a directory of the state directory that
	// nobody else uses.
	Dir string
	// Drain is how long output is waited for that something holds open after
	// the command has ended (drain_exec_sync_io_timeout); 0 is for ever, which
	// ends with the caller's deadline.
	Drain time.Duration
	Log   *slog.Logger
}

// Service executes, attaches and forwards. It is safe for concurrent use.
type Service struct {
	d     Deps
	stop  context.CancelFunc
	ctx   context.Context // ends with the Service
	tails sync.WaitGroup  // what is still cleaned up after its caller has gone
}

// Size is a terminal's, in cells.
type Size struct{ Width, Height uint16 }

// Streams are the client's ends. A nil one is not wanted.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// TTY makes a terminal, whose output all goes to Stdout.
	TTY bool
	// Resize tells the terminal's size; nil if it never changes.
	Resize <-chan Size
}

// Result is what ExecSync has to tell.
type Result struct {
	Stdout, Stderr []byte
	ExitCode       int32
}

// Limits.
const (
	// MaxOutput is how much of each stream ExecSync keeps, in bytes (contract
	// 7.1.18). The rest is read and forgotten.
	MaxOutput = 16 << 20
	// cleanWithin bounds what has to be undone after the caller has gone.
	cleanWithin = 30 * time.Second
	// answerWithin is how long the end of a killed command is waited for
	// before the caller gets its answer (promise P17).
	answerWithin = 50 * time.Millisecond
)

// Open makes a Service and removes what an earlier one, which was killed, has
// left: directories, and the commands whose output nobody reads any more, as
// far as the tasks answer within ctx.
func Open(ctx context.Context, d Deps) (*Service, error) {
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory for streams: %w", err)
	}
	old, err := os.ReadDir(d.Dir)
	if err != nil {
		return nil, fmt.Errorf("directory for streams: %w", err)
	}
	s := &Service{d: d}
	s.ctx, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	for _, e := range old {
		s.tails.Go(func() {
			ctx, cancel := context.WithTimeout(s.ctx, cleanWithin)
			defer cancel()
			if i := strings.LastIndexByte(e.Name(), '_'); i > 0 {
				id, exec := e.Name()[:i], e.Name()[i+1:]
				if err := s.end(ctx, container.ID(id), task.ExecID(exec), nil); err != nil {
					d.Log.Warn("a command of the time before the restart is left", "container", id, "exec", exec, "error", err)
				}
			}
			if err := os.RemoveAll(filepath.Join(d.Dir, e.Name())); err != nil {
				d.Log.Warn("a directory of a command is left", "error", err)
			}
		})
	}
	return s, nil
}

// Close ends what is still being cleaned up, and returns when it has ended or
// ctx has.
func (s *Service) Close(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		s.tails.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	s.stop()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("end the streams: %w", ctx.Err())
	}
}

// running looks a container up that can be talked to.
func (s *Service) running(ctx context.Context, id string) (Container, error) {
	c, err := s.d.Container(ctx, id)
	if err != nil {
		return Container{}, err
	}
	return c, c.Running
}

// ignoreGone drops the error of a process that has ended by itself.
func ignoreGone(err error) error {
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	return err
}
