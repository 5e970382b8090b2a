//go:build linux

// Package reaper collects the exits of a program's children, and, in a
// subreaper, of the orphans that it inherits. Exits are waited for by process
// id and never by "any child": a process that exits before anybody watches it
// stays a zombie until it is watched, so no exit is lost, and children that
// other code starts and waits for itself are left to it (see Hold).
package reaper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrGone is returned by Signal for a process that is not watched, because
// it has exited or was never watched.
var ErrGone = errors.New("process already finished")

// Exit tells how a process ended.
type Exit struct {
	Pid int
	// Status is the exit code, 128 and the signal for a process that was
	// killed, and 255 if somebody else took the status away.
	Status uint32
	// At is when it was noticed, in UTC.
	At time.Time
}

// Reaper is safe for concurrent use.
type Reaper struct {
	kick chan struct{}

	mu    sync.Mutex // guards the rest; never held while a callback runs
	watch map[int]func(Exit)
	held  int
}

// New returns a reaper that does nothing before Run.
func New() *Reaper {
	return &Reaper{kick: make(chan struct{}, 1), watch: map[int]func(Exit){}}
}

// Subreaper makes the calling program the parent of all its orphaned
// descendants.
func Subreaper() error {
	return os.NewSyscallError("prctl", unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
}

// Run collects exits until the context ends. Callbacks run on its goroutine,
// one at a time, those of one sweep in the order of their process ids.
func (r *Reaper) Run(ctx context.Context) error {
	children := make(chan os.Signal, 32)
	signal.Notify(children, unix.SIGCHLD)
	defer signal.Stop(children)
	for {
		r.sweep()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-children:
		case <-r.kick:
		}
	}
}

// Watch has fn called once with the exit of pid, which must be a child or, in
// a subreaper, about to become one.
func (r *Reaper) Watch(pid int, fn func(Exit)) {
	r.mu.Lock()
	r.watch[pid] = fn
	r.mu.Unlock()
	r.wake()
}

// Hold keeps unwatched children from being reaped until release is called.
// Code that starts children and waits for them itself, or that will watch
// them, runs between the two.
func (r *Reaper) Hold() (release func()) {
	r.mu.Lock()
	r.held++
	r.mu.Unlock()
	return sync.OnceFunc(func() {
		r.mu.Lock()
		r.held--
		r.mu.Unlock()
		r.wake()
	})
}

// Signal sends a signal to a watched process. It never reaches another
// process that got the same id: an id is free again only after its exit was
// collected here.
func (r *Reaper) Signal(pid int, sig unix.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.watch[pid]; !ok {
		return ErrGone
	}
	return Kill(pid, sig)
}

// Kill sends a signal to one process, whether it is watched or not. It refuses
// the numbers that mean more than one process to kill(2), and init.
func Kill(pid int, sig unix.Signal) error {
	if pid <= 1 {
		return fmt.Errorf("signal %d to process %d: %w", sig, pid, unix.EINVAL)
	}
	err := unix.Kill(pid, sig)
	if errors.Is(err, unix.ESRCH) {
		return ErrGone
	}
	return os.NewSyscallError("kill", err)
}

func (r *Reaper) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

type collected struct {
	exit Exit
	fn   func(Exit)
}

func (r *Reaper) sweep() {
	for {
		done := r.collect()
		for _, c := range done {
			c.fn(c.exit)
		}
		if len(done) == 0 {
			return
		}
	}
}

// collect reaps every watched process that has exited and, if nobody holds
// them, all other zombies.
func (r *Reaper) collect() (done []collected) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now().UTC()
	for pid, fn := range r.watch {
		var status unix.WaitStatus
		got, err := wait4(pid, &status)
		exit := Exit{Pid: pid, At: now}
		switch {
		case err != nil: // ECHILD: no child, or taken by somebody else
			if Kill(pid, 0) == nil {
				continue // on its way to us
			}
			exit.Status = 255
		case got == pid && status.Exited():
			exit.Status = uint32(status.ExitStatus())
		case got == pid && status.Signaled():
			exit.Status = 128 + uint32(status.Signal())
		default:
			continue
		}
		delete(r.watch, pid)
		// Sorted as inserted: the younger process has mostly the higher id.
		i := len(done)
		for i > 0 && done[i-1].exit.Pid > pid {
			i--
		}
		done = append(done, collected{})
		copy(done[i+1:], done[i:])
		done[i] = collected{exit, fn}
	}
	for r.held == 0 {
		pid := zombie()
		if pid == 0 {
			break
		}
		if _, watched := r.watch[pid]; watched {
			break // it exited just now: a signal is on its way
		}
		if _, err := wait4(pid, nil); err != nil {
			break
		}
	}
	return done
}

func wait4(pid int, status *unix.WaitStatus) (int, error) {
	for {
		got, err := unix.Wait4(pid, status, unix.WNOHANG, nil)
		if !errors.Is(err, unix.EINTR) {
			return got, err
		}
	}
}

// zombie returns the id of some child that has exited, without reaping it.
func zombie() int {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0
		}
		// The union that begins with si_pid follows three ints, aligned to
		// a pointer.
		offset := (3*unsafe.Sizeof(int32(0)) + unsafe.Sizeof(uintptr(0)) - 1) &^ (unsafe.Sizeof(uintptr(0)) - 1)
		return int(*(*int32)(unsafe.Add(unsafe.Pointer(&info), offset)))
	}
}
