//go:build linux

package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/reaper"
)

// logger is a logging program that reads the output of a process.
type logger struct {
	o    *Opener
	path string
	pid  int
	done chan struct{} // closed when it has exited
}

// startLogger runs the program of a binary:// or binary-v2:// address with the
// two outputs as descriptors 3 and 4, and waits until it says on descriptor 5
// that it is ready (contract 5.5.2, 5.5.3).
func (o *Opener) startLogger(ctx context.Context, c Config, uri string, stdout, stderr *os.File) (*logger, error) {
	scheme, path, err := split(uri)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(uri)
	if err != nil {
		return nil, err
	}
	args, err := queryArgs(u.RawQuery)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	ready, told, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()

	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "CONTAINER_ID="+c.ID, "CONTAINER_NAMESPACE="+c.Namespace)
	cmd.ExtraFiles = []*os.File{stdout, stderr, told}
	release := o.reaper.Hold()
	err = cmd.Start()
	told.Close()
	if err != nil {
		release()
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("logging program: %w", err)
	}
	l := &logger{o: o, path: path, pid: cmd.Process.Pid, done: make(chan struct{})}
	o.reaper.Watch(l.pid, func(e reaper.Exit) {
		if e.Status != 0 && e.Status != 128+uint32(unix.SIGTERM) {
			o.log.Warn("logging program ended", "path", path, "pid", e.Pid, "status", e.Status)
		}
		close(l.done)
	})
	release()

	deadline := time.Now().Add(o.readyTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := ready.SetReadDeadline(deadline); err != nil {
		_ = l.stop()
		return nil, err
	}
	var one [1]byte
	_, err = ready.Read(one[:])
	switch {
	case errors.Is(err, io.EOF) && scheme == "binary-v2":
		err = fmt.Errorf("it ended its start without saying that it is ready: %w", errdefs.ErrUnavailable)
	case errors.Is(err, io.EOF):
		err = nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("it was not ready in time: %w", context.DeadlineExceeded)
	}
	if err != nil {
		_ = l.stop()
		return nil, fmt.Errorf("logging program %s: %w", path, err)
	}
	return l, nil
}

// queryArgs turns k=v&k2=v2 into k v k2 v2, in the order in which they are
// written.
func queryArgs(query string) (args []string, err error) {
	for query != "" {
		var pair string
		pair, query, _ = strings.Cut(query, "&")
		if pair == "" {
			continue
		}
		k, v, _ := strings.Cut(pair, "=")
		if k, err = url.QueryUnescape(k); err != nil {
			return nil, err
		}
		if v, err = url.QueryUnescape(v); err != nil {
			return nil, err
		}
		args = append(args, k, v)
	}
	return args, nil
}

// stop waits for the program to end by itself, then asks, then kills it.
func (l *logger) stop() error {
	if l.ended(l.o.exitGrace) {
		return nil
	}
	_ = l.o.reaper.Signal(l.pid, unix.SIGTERM)
	if l.ended(l.o.termTimeout) {
		return nil
	}
	_ = l.o.reaper.Signal(l.pid, unix.SIGKILL)
	if l.ended(l.o.termTimeout) {
		return nil
	}
	return fmt.Errorf("logging program %s (pid %d) survives a kill: %w", l.path, l.pid, errdefs.ErrUnavailable)
}

func (l *logger) ended(within time.Duration) bool {
	select {
	case <-l.done:
		return true
	case <-time.After(within):
		return false
	}
}
