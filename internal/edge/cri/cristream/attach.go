//go:build linux

package cristream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Attach connects a client with a container's first process: it gets what is
// printed from now on, and its input goes to the process. It returns when the
// container or the client's input has ended; with stdin_once and no terminal
// the end of the input is passed on instead, and the output goes on. Reads of
// st.Stdin may go on until it is closed. ErrNotFound; ErrFailedPrecondition if
// the container does not run.
func (s *Service) Attach(ctx context.Context, id string, st Streams) error {
	c, err := s.running(ctx, id)
	if err != nil {
		return err
	}
	if err := s.attach(ctx, c, st); err != nil {
		return fmt.Errorf("attach to container %s: %w", c.ID, err)
	}
	return nil
}

func (s *Service) attach(ctx context.Context, c Container, st Streams) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var err error
	var out gate
	defer out.shut()
	stdout, stderr := io.Discard, io.Discard
	if st.Stdout != nil {
		stdout = out.writer(st.Stdout)
	}
	if st.Stderr != nil && !c.TTY {
		stderr = out.writer(st.Stderr)
	}
	follow := c.Follow
	wake := make(chan struct{}, 1)
	if follow == nil {
		// Where "from now on" begins is settled before any input gets through.
		l, err := openLog(c.LogPath)
		if err != nil {
			return err
		}
		defer l.close()
		follow = func(ctx context.Context, stdout, stderr io.Writer) error {
			return l.follow(ctx, c.Gone, wake, stdout, stderr)
		}
	}
	typed := make(chan error, 1)
	if st.Stdin != nil && c.StdinPath != "" {
		in, err := os.OpenFile(c.StdinPath, unix.O_WRONLY|unix.O_NONBLOCK, 0)
		if errors.Is(err, unix.ENXIO) {
			return fmt.Errorf("nobody reads its input: %w", errdefs.ErrFailedPrecondition)
		}
		if err != nil {
			return fmt.Errorf("open its input: %w", err)
		}
		defer in.Close()
		go func() {
			_, err := io.Copy(waking{in, wake}, st.Stdin)
			in.Close()
			if errors.Is(context.Cause(ctx), errStopped) {
				return // the client did not end it, and may come again
			}
			if c.StdinOnce && !c.TTY {
				if c.InputEnds != nil {
					c.InputEnds()
				}
				call, done := context.WithTimeout(context.WithoutCancel(ctx), cleanWithin)
				defer done()
				if err := s.d.Tasks.CloseStdin(call, c.ID, ""); ignoreGone(err) != nil {
					s.d.Log.Warn("close the input of a container", "container", c.ID, "error", err)
				}
				return
			}
			if errors.Is(err, unix.EPIPE) || errors.Is(err, os.ErrClosed) {
				return // the process takes no more; it may still print
			}
			typed <- err
		}()
	}
	if st.Resize != nil { // without a terminal too: they are in the way of the input
		go s.resize(ctx, c.ID, "", st.Resize)
	}
	printed := make(chan error, 1)
	go func() { printed <- follow(ctx, stdout, stderr) }()
	select {
	case err = <-printed:
	case err = <-typed:
		cancel()
		<-printed
	case <-ctx.Done():
		<-printed
		return ctx.Err()
	}
	return err
}

// waking tells the follower of the output that an answer may come.
type waking struct {
	w    io.Writer
	wake chan<- struct{}
}

func (w waking) Write(p []byte) (int, error) {
	n, err := w.w.Write(p)
	select {
	case w.wake <- struct{}{}:
	default:
	}
	return n, err
}
