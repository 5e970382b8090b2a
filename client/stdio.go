package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/containerd/fifo"

	"github.com/gantryd/gantry/core/task"
)

// DefaultFIFODir is where the FIFOs of processes are made.
const DefaultFIFODir = "/run/gantry/fifo"

// Streams are what a process's standard streams are connected to. A nil one
// is /dev/null. With Terminal, all output comes on Stdout.
type Streams struct {
	Stdin    io.Reader
	Stdout   io.Writer
	Stderr   io.Writer
	Terminal bool
	// StdinClosed is called when Stdin has ended, so that the process can be
	// told; it may be nil.
	StdinClosed func()
}

// Stdio is the client's end of the standard streams of one process.
type Stdio struct {
	io     task.IO
	dir    string // removed by Close, "" if the FIFOs are somebody else's
	cancel context.CancelFunc
	files  []io.Closer
	output sync.WaitGroup
	mu     sync.Mutex // guards err
	err    error
}

// NewStdio makes FIFOs in a new folder below dir and begins to copy. They are
// opened before the process is, so that nothing it prints is lost.
func NewStdio(dir string, s Streams) (*Stdio, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make FIFOs: %w", err)
	}
	own, err := os.MkdirTemp(dir, "")
	if err != nil {
		return nil, fmt.Errorf("make FIFOs: %w", err)
	}
	paths := task.IO{Terminal: s.Terminal}
	if s.Stdin != nil {
		paths.Stdin = filepath.Join(own, "stdin")
	}
	if s.Stdout != nil {
		paths.Stdout = filepath.Join(own, "stdout")
	}
	if s.Stderr != nil && !s.Terminal {
		paths.Stderr = filepath.Join(own, "stderr")
	}
	st, err := AttachStdio(paths, s)
	if err != nil {
		os.RemoveAll(own)
		return nil, err
	}
	st.dir = own
	return st, nil
}

// AttachStdio opens the FIFOs of a process and begins to copy. Streams that
// are not FIFOs (logging URIs) are refused.
func AttachStdio(paths task.IO, s Streams) (*Stdio, error) {
	ctx, cancel := context.WithCancel(context.Background())
	st := &Stdio{io: paths, cancel: cancel}
	open := func(path string, flag int) (io.ReadWriteCloser, error) {
		if !filepath.IsAbs(path) {
			return nil, fmt.Errorf("attach to %s: it is not a FIFO", path)
		}
		f, err := fifo.OpenFifo(ctx, path, flag|syscall.O_CREAT|syscall.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open FIFO %s: %w", path, err)
		}
		st.files = append(st.files, f)
		return f, nil
	}
	out := func(path string, w io.Writer) error {
		if path == "" || w == nil {
			return nil
		}
		f, err := open(path, syscall.O_RDONLY)
		if err != nil {
			return err
		}
		st.output.Add(1)
		go func() {
			defer st.output.Done()
			if _, err := io.Copy(w, f); err != nil && ctx.Err() == nil {
				st.fail(fmt.Errorf("copy the output of %s: %w", path, err))
			}
			f.Close()
		}()
		return nil
	}
	err := errors.Join(out(paths.Stdout, s.Stdout), out(paths.Stderr, s.Stderr))
	if err == nil && paths.Stdin != "" && s.Stdin != nil {
		var f io.ReadWriteCloser
		if f, err = open(paths.Stdin, syscall.O_WRONLY); err == nil {
			// Reading may block for ever (a terminal), so nobody waits for this one.
			go func() {
				io.Copy(f, s.Stdin)
				f.Close()
				if s.StdinClosed != nil && ctx.Err() == nil {
					s.StdinClosed()
				}
			}()
		}
	}
	if err != nil {
		st.Close()
		return nil, err
	}
	return st, nil
}

func (s *Stdio) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = errors.Join(s.err, err)
}

// IO is what the task is created with.
func (s *Stdio) IO() task.IO { return s.io }

// Wait returns when all output has been copied: the process and whoever
// inherited its streams have closed them. It returns ctx's error if that is
// earlier, or the error of copying.
func (s *Stdio) Wait(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		s.output.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close stops copying and removes the FIFOs that NewStdio made.
func (s *Stdio) Close() error {
	s.cancel()
	for _, f := range s.files {
		f.Close()
	}
	if s.dir != "" {
		return os.RemoveAll(s.dir)
	}
	return nil
}
