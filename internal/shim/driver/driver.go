//go:build linux

// Package driver says what the shim needs of something that makes containers
// from OCI bundles. Two packages keep it: libct, runc's library in this
// process, and command, the command line of any OCI runtime.
//
// A driver starts processes and leaves them to the shim: it never waits for
// them. Children that it starts for its own purposes it waits for itself,
// before its methods return; the caller keeps the reaper off them meanwhile.
package driver

import (
	"context"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Stdio is what a process gets as its standard streams: files (nil for
// /dev/null), or a terminal. The driver does not close them.
type Stdio struct {
	In, Out, Err *os.File
	Terminal     bool
}

// Started is a process that was made.
type Started struct {
	Pid int
	// Console is the master of its terminal, if it asked for one; the caller
	// closes it.
	Console *os.File
}

// Create says what container to make.
type Create struct {
	ID string
	// Bundle is the absolute path of the directory with config.json.
	Bundle string
	Spec   *specs.Spec
	Stdio  Stdio
	// Restore, unless empty, is the directory of a checkpoint to continue.
	Restore string
	// WorkPath is where criu keeps its log; empty for its own choice.
	WorkPath     string
	NoPivotRoot  bool
	NoNewKeyring bool
	// SystemdCgroup has the groups made by systemd.
	SystemdCgroup bool
}

// Checkpoint says how to write a container to disk (contract 5.3.8).
type Checkpoint struct {
	ImagePath, WorkPath, ParentPath                      string
	Exit, OpenTCP, ExternalUnixSockets, Shell, FileLocks bool
	EmptyNamespaces                                      []string
	CgroupsMode                                          string
}

// Driver makes containers. All methods may be called concurrently.
type Driver interface {
	// Create makes the container with its first process waiting to be
	// started. After an error nothing is left of it.
	Create(ctx context.Context, c Create) (Container, Started, error)
	// Destroy kills what an unknown caller created under this id and removes
	// its cgroup and the runtime's own state. It returns the process id of
	// the first process if that is known, and no error if there is nothing.
	Destroy(ctx context.Context, id string) (pid int, err error)
	// Features describes the runtime as OCI features, in JSON.
	Features(ctx context.Context) ([]byte, error)
}

// Container is one container. Calls must not overlap, except those of Exec,
// which may come at any time.
type Container interface {
	// Start lets the first process run its program.
	Start(ctx context.Context) error
	// Exec starts another process in the container. Nothing is left of it
	// after an error.
	Exec(ctx context.Context, id string, p *specs.Process, stdio Stdio) (Started, error)
	// Pause freezes all processes.
	Pause(ctx context.Context) error
	// Resume undoes Pause.
	Resume(ctx context.Context) error
	// Update changes the limits that are set in r and leaves the others.
	Update(ctx context.Context, r *specs.LinuxResources) error
	// Checkpoint writes the container's processes to disk.
	Checkpoint(ctx context.Context, c Checkpoint) error
	// Delete removes the cgroup and the runtime's state of a container
	// whose first process has exited. It can be repeated.
	Delete(ctx context.Context) error
}

// ExecSignaller is a Container that knows what an exec has started, also when
// the exec itself has ended.
type ExecSignaller interface {
	// SignalExec signals all processes of an exec. With SIGKILL none of them
	// runs when it returns. ErrNotFound if there are none.
	SignalExec(id string, sig unix.Signal) error
	// ForgetExec gives free what is kept of an exec that has been deleted.
	ForgetExec(id string)
}
