// Package task is the running side of a container: its first process and the
// processes executed beside it.
package task

import (
	"context"
	"time"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/typed"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ExecID names a process executed in a task; "" is the task's first process.
type ExecID string

// Check returns ErrInvalidArgument unless id follows contract 1.2.2.
func Check(id ExecID) error { return ident.Check("exec id", string(id)) }

// Status is what a process does. The values are the wire's (contract 1.3.35).
type Status uint8

// The statuses.
const (
	StatusUnknown Status = 0
	StatusCreated Status = 1
	StatusRunning Status = 2
	StatusStopped Status = 3
	StatusPaused  Status = 4
	StatusPausing Status = 5
)

func (s Status) String() string {
	switch s {
	case StatusCreated:
		return "CREATED"
	case StatusRunning:
		return "RUNNING"
	case StatusStopped:
		return "STOPPED"
	case StatusPaused:
		return "PAUSED"
	case StatusPausing:
		return "PAUSING"
	}
	return "UNKNOWN"
}

// MarshalText makes JSON show the name.
func (s Status) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// IO is where a process's streams come from and go to: FIFO paths, or URIs
// (contract 5.5). An empty one is /dev/null.
type IO struct {
	Stdin    string `json:"stdin,omitempty"`
	Stdout   string `json:"stdout,omitempty"`
	Stderr   string `json:"stderr,omitempty"`
	Terminal bool   `json:"terminal,omitempty"`
}

// Process is the state of one process. ID is the container's for the first
// process, else the exec's (contract 1.3.35).
type Process struct {
	ContainerID container.ID `json:"container_id"`
	ID          string       `json:"id"`
	Pid         uint32       `json:"pid"`
	Status      Status       `json:"status"`
	IO          IO           `json:"io"`
	ExitStatus  uint32       `json:"exit_status"`
	ExitedAt    time.Time    `json:"exited_at"`
}

// Exit is how a process ended.
type Exit struct {
	ID     string    `json:"id"`
	Pid    uint32    `json:"pid"`
	Status uint32    `json:"exit_status"`
	At     time.Time `json:"exited_at"`
}

// CreateOptions says how to make a task.
type CreateOptions struct {
	// Rootfs is mounted by the shim; the container's snapshot if empty.
	Rootfs []mount.Mount
	IO     IO
	// Checkpoint to restore from, nil for a fresh start.
	Checkpoint *ocispec.Descriptor
	// Options for the runtime, instead of the container record's.
	Options typed.Any
	// RuntimePath is the shim's binary, instead of looking it up by name.
	RuntimePath string
	// APIAddress and APIVersion name a shim that runs already (contract 5.2.10).
	APIAddress string
	APIVersion uint32
}

// ExecOptions says what to execute. Spec is an OCI process as JSON under its type URL.
type ExecOptions struct {
	IO   IO
	Spec typed.Any
}

// ProcessInfo is a process of a task as the kernel knows it. Info is the
// runtime's, and says which exec it is (contract 1.3.37).
type ProcessInfo struct {
	Pid  uint32    `json:"pid"`
	Info typed.Any `json:"info"`
}

// Metric is a task's statistics at a time, in the runtime's form (contract 1.3.40).
type Metric struct {
	ID   string    `json:"id"`
	At   time.Time `json:"timestamp"`
	Data typed.Any `json:"data"`
}

// Store runs the tasks of one namespace. It is safe for concurrent use. Each
// call talks to one container's shim only, and ends at ctx's deadline or the
// store's own, whichever is first, with ErrDeadlineExceeded naming the stage.
// All return ErrNotFound if there is no such task or process.
type Store interface {
	// Create makes the task of an existing container, without starting its
	// process, and returns its pid. ErrNotFound (container, runtime),
	// ErrAlreadyExists, ErrInvalidArgument (no or bad spec). Nothing is left
	// behind by a Create that fails.
	Create(ctx context.Context, id container.ID, opts CreateOptions) (pid uint32, err error)
	// Start starts the first process or an exec and returns its pid.
	Start(ctx context.Context, id container.ID, exec ExecID) (pid uint32, err error)
	// Delete removes a task that has stopped and returns its exit;
	// ErrFailedPrecondition if it runs. One whose shim died is cleaned up
	// (contract 5.4.3).
	Delete(ctx context.Context, id container.ID) (Exit, error)
	// DeleteExec removes an exec that has stopped and returns its exit.
	DeleteExec(ctx context.Context, id container.ID, exec ExecID) (Exit, error)
	// Get returns the state of the first process or an exec.
	Get(ctx context.Context, id container.ID, exec ExecID) (Process, error)
	// List returns the first processes of all tasks. One that does not answer
	// in time is StatusUnknown (contract 1.3.35).
	List(ctx context.Context) ([]Process, error)
	// Kill sends a signal to a process, or to all of the task. A process that
	// has ended is ErrNotFound, unless all is set.
	Kill(ctx context.Context, id container.ID, exec ExecID, signal uint32, all bool) error
	// Exec makes a process in the task, to be started by Start.
	// ErrInvalidArgument (bad id, no spec), ErrAlreadyExists, ErrFailedPrecondition (not running).
	Exec(ctx context.Context, id container.ID, exec ExecID, opts ExecOptions) error
	// Resize sets a terminal's size in cells.
	Resize(ctx context.Context, id container.ID, exec ExecID, width, height uint32) error
	// CloseStdin closes a process's standard input.
	CloseStdin(ctx context.Context, id container.ID, exec ExecID) error
	// Pause freezes all processes; Resume thaws them.
	Pause(ctx context.Context, id container.ID) error
	Resume(ctx context.Context, id container.ID) error
	// Pids returns the task's processes.
	Pids(ctx context.Context, id container.ID) ([]ProcessInfo, error)
	// Update changes resources (an OCI LinuxResources as JSON under its type URL).
	Update(ctx context.Context, id container.ID, resources typed.Any, annotations map[string]string) error
	// Metrics returns statistics of the tasks that match one of the filters
	// (fields id, namespace), all if there are none. Those that fail are left out.
	Metrics(ctx context.Context, filters ...string) ([]Metric, error)
	// Wait returns when the process has ended; at once if it has already. Its
	// only deadline is ctx's. When the shim dies, the exit is that of contract 5.4.3.
	Wait(ctx context.Context, id container.ID, exec ExecID) (Exit, error)
	// Checkpoint writes the state of a task into the content store, or where
	// the options say (contract 1.3.38).
	Checkpoint(ctx context.Context, id container.ID, parent string, opts typed.Any) ([]ocispec.Descriptor, error)
}
