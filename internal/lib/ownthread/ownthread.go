//go:build linux

// Package ownthread runs functions that change what belongs to a thread: its
// namespaces, its working directory. Nobody else ever sees the change.
package ownthread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Do runs fn on a thread of its own, which is thrown away afterwards.
func Do(fn func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The first thread never ends, and /proc shows it as the program. While
			// it is held here, fn gets another one.
			defer runtime.UnlockOSThread()
			result <- Do(fn)
			return
		}
		result <- fn()
	}()
	return <-result
}
