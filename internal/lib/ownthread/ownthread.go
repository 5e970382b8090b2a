//go:build linux

// Package ownthread runs functions that change what belongs to a thread: its
// namespaces, its working directory. Nobody else ever sees the change.
package ownthread

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Do runs fn on a thread of its own, which is thrown away afterwards.
func Do(fn func() error) error {
	return do(func() (bool, error) { return false, fn() })
}

// Inside runs fn on a thread that is in the namespace at path, whose kind is a
// CLONE_NEW constant, and brings the thread back; if that is not possible it is
// thrown away. What fn returns is returned as it is; an *EnterError says that fn
// did not run.
func Inside(path string, kind int, fn func() error) error {
	return do(func() (same bool, err error) {
		there, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return true, &EnterError{path, err}
		}
		defer there.Close()
		own, ok := map[int]string{unix.CLONE_NEWNET: "net", unix.CLONE_NEWUTS: "uts", unix.CLONE_NEWIPC: "ipc"}[kind]
		if !ok {
			return true, &EnterError{path, fmt.Errorf("kind %#x cannot be left again: %w", kind, unix.EINVAL)}
		}
		home, err := os.Open("/proc/thread-self/ns/" + own)
		if err != nil {
			return true, &EnterError{path, err}
		}
		defer home.Close()
		if err := unix.Setns(int(there.Fd()), kind); err != nil {
			return true, &EnterError{path, err}
		}
		err = fn()
		return unix.Setns(int(home.Fd()), kind) == nil, err
	})
}

// EnterError is why a namespace could not be entered.
type EnterError struct {
	Path string
	Err  error
}

func (e *EnterError) Error() string { return "enter the namespace " + e.Path + ": " + e.Err.Error() }
func (e *EnterError) Unwrap() error { return e.Err }

// do runs fn on a thread that others get back only if it is the same as before.
func do(fn func() (same bool, err error)) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine unless it is unlocked
		if unix.Gettid() == unix.Getpid() {
			// The first thread never ends, and /proc shows it as the program. While
			// it is held here, fn gets another one.
			defer runtime.UnlockOSThread()
			result <- do(fn)
			return
		}
		same, err := fn()
		if same {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}
