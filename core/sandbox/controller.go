package sandbox

import (
	"context"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
)

// States that Status.State has for a sandbox that runs, and for one that was
// not started yet or has ended.
const (
	StateReady    = "SANDBOX_READY"
	StateNotReady = "SANDBOX_NOTREADY"
)

// CreateOptions says how to make an instance.
type CreateOptions struct {
	// Rootfs is what the sandbox's own process runs on, if it has one.
	Rootfs []mount.Mount
	// Options are the controller's own: for Kubernetes the pod's configuration.
	Options typed.Any
	// NetNSPath is the network namespace that is there already, "" if none is.
	NetNSPath   string
	Annotations map[string]string
}

// Instance is a sandbox that was started.
type Instance struct {
	ID string
	// Pid is that of the sandbox's own process; 0 if it has none.
	Pid       uint32
	CreatedAt time.Time
	Labels    map[string]string
	// Address is where its tasks are served, as ttrpc+unix://path or
	// grpc+vsock://cid:port, and Version the task API's there; "" and 0 if each
	// container is to have a shim of its own.
	Address string
	Version uint32
	// Spec is what the instance was made of, if the controller tells.
	Spec typed.Any
}

// Status is what an instance does.
type Status struct {
	ID    string
	Pid   uint32
	State string // StateReady, StateNotReady
	// Info is for people, and empty unless it was asked for.
	Info      map[string]string
	CreatedAt time.Time
	ExitedAt  time.Time // zero while it runs
	Extra     typed.Any
	Address   string // as Instance has it
	Version   uint32
}

// Exit is how a sandbox ended.
type Exit struct {
	Status uint32
	At     time.Time
}

// Controller runs the instances of one namespace's sandboxes (contract
// 1.3.30). It is safe for concurrent use. Each call concerns one instance and
// never waits for another's. All but Wait end at ctx's deadline or a limit of
// the controller's own, whichever is first, with ErrDeadlineExceeded. Where
// nothing else is said they return ErrNotFound for an id that was not created
// or was shut down.
type Controller interface {
	// Create makes an instance of the record s, which need not be stored.
	// ErrAlreadyExists if there is one; ErrInvalidArgument; ErrNotFound
	// (runtime). Nothing is left behind by a Create that fails.
	Create(ctx context.Context, s Sandbox, opts CreateOptions) error
	// Start starts it. ErrFailedPrecondition if it was started before.
	Start(ctx context.Context, id string) (Instance, error)
	// Platform is where its containers run: what their specification is for.
	Platform(ctx context.Context, id string) (ocispec.Platform, error)
	// Stop ends it, by force when timeout has passed. One that has ended or
	// does not exist is stopped: no error. Its Status and Exit can still be read.
	Stop(ctx context.Context, id string, timeout time.Duration) error
	// Wait returns when it has ended; at once if it has already. Its only
	// deadline is ctx's. ErrNotFound if it is shut down without having ended.
	Wait(ctx context.Context, id string) (Exit, error)
	// Status tells its state; with Info if verbose is set.
	Status(ctx context.Context, id string, verbose bool) (Status, error)
	// Shutdown ends it if it runs, and removes all that there is of it. One
	// that does not exist is no error.
	Shutdown(ctx context.Context, id string) error
	// Metrics returns its statistics. ErrNotImplemented if it keeps none.
	Metrics(ctx context.Context, id string) (task.Metric, error)
	// Update tells a running instance that fields of its record changed, all
	// if none is named. ErrNotImplemented if it cannot follow.
	Update(ctx context.Context, s Sandbox, fields ...string) error
}

// Controllers opens them by a sandboxer's name: ErrInvalidArgument if it is
// "" or the namespace's name is bad, ErrNotFound if there is no such sandboxer
// (contract 1.3.30).
type Controllers interface {
	Controller(ns namespace.ID, sandboxer string) (Controller, error)
}
