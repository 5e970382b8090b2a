package memory

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
)

// SandboxController is a sandbox.Controller whose sandboxes are nothing but
// their state.
type SandboxController struct {
	mu  sync.Mutex
	all map[string]*instance
}

type instance struct {
	record  sandbox.Sandbox
	created time.Time
	started bool
	exit    sandbox.Exit
	exited  chan struct{}
	gone    chan struct{}
}

// NewSandboxController returns one without instances.
func NewSandboxController() *SandboxController {
	return &SandboxController{all: map[string]*instance{}}
}

// get returns an instance; mu is held.
func (c *SandboxController) get(id string) (*instance, error) {
	if i := c.all[id]; i != nil {
		return i, nil
	}
	return nil, fmt.Errorf("sandbox %q: %w", id, errdefs.ErrNotFound)
}

func (i *instance) end() {
	if i.exit.At.IsZero() {
		i.exit.At = time.Now().UTC()
		close(i.exited)
	}
}

// address is made up, so that the wire has something to carry.
func (i *instance) address() string { return "ttrpc+unix:///memory/" + i.record.ID }

// Create implements sandbox.Controller.
func (c *SandboxController) Create(_ context.Context, s sandbox.Sandbox, _ sandbox.CreateOptions) error {
	if err := s.Check(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all[s.ID] != nil {
		return fmt.Errorf("sandbox %s: %w", s.ID, errdefs.ErrAlreadyExists)
	}
	c.all[s.ID] = &instance{record: cloneSandbox(s), created: time.Now().UTC(), exited: make(chan struct{}), gone: make(chan struct{})}
	return nil
}

// Start implements sandbox.Controller.
func (c *SandboxController) Start(_ context.Context, id string) (sandbox.Instance, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, err := c.get(id)
	if err != nil {
		return sandbox.Instance{}, err
	}
	if i.started || !i.exit.At.IsZero() {
		return sandbox.Instance{}, fmt.Errorf("sandbox %s was started or stopped before: %w", id, errdefs.ErrFailedPrecondition)
	}
	i.started = true
	return sandbox.Instance{ID: id, Pid: 1, CreatedAt: i.created, Labels: maps.Clone(i.record.Labels), Address: i.address(), Version: 3, Spec: i.record.Spec}, nil
}

// Platform implements sandbox.Controller.
func (c *SandboxController) Platform(_ context.Context, id string) (ocispec.Platform, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.get(id)
	return ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}, err
}

// Stop implements sandbox.Controller.
func (c *SandboxController) Stop(_ context.Context, id string, _ time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := c.all[id]; i != nil {
		i.end()
	}
	return nil
}

// Wait implements sandbox.Controller.
func (c *SandboxController) Wait(ctx context.Context, id string) (sandbox.Exit, error) {
	c.mu.Lock()
	i, err := c.get(id)
	c.mu.Unlock()
	if err != nil {
		return sandbox.Exit{}, err
	}
	select {
	case <-i.exited:
		return i.exit, nil
	case <-i.gone:
		return sandbox.Exit{}, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	case <-ctx.Done():
		return sandbox.Exit{}, fmt.Errorf("wait for sandbox %s: %w", id, ctx.Err())
	}
}

// Status implements sandbox.Controller.
func (c *SandboxController) Status(_ context.Context, id string, verbose bool) (sandbox.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, err := c.get(id)
	if err != nil {
		return sandbox.Status{}, err
	}
	st := sandbox.Status{ID: id, Pid: 1, State: sandbox.StateNotReady, CreatedAt: i.created, ExitedAt: i.exit.At, Address: i.address(), Version: 3,
		Extra: typed.Any{URL: "extra", Value: []byte("{}")}}
	if i.started && i.exit.At.IsZero() {
		st.State = sandbox.StateReady
	}
	if verbose {
		st.Info = map[string]string{"kind": "memory"}
	}
	return st, nil
}

// Shutdown implements sandbox.Controller.
func (c *SandboxController) Shutdown(_ context.Context, id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := c.all[id]; i != nil {
		delete(c.all, id)
		if i.started {
			i.end()
		}
		close(i.gone)
	}
	return nil
}

// Metrics implements sandbox.Controller.
func (c *SandboxController) Metrics(_ context.Context, id string) (task.Metric, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.get(id)
	return task.Metric{ID: id, At: time.Now().UTC(), Data: typed.Any{URL: "metric", Value: []byte("1")}}, err
}

// Update implements sandbox.Controller.
func (c *SandboxController) Update(_ context.Context, s sandbox.Sandbox, fields ...string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, err := c.get(s.ID)
	if err == nil {
		i.record, err = i.record.Merge(s, fields...)
	}
	return err
}
