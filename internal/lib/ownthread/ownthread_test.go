//go:build linux

package ownthread

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// The program's first thread is never used, however often it would be chosen.
func TestDo(t *testing.T) {
	before, err := os.Readlink("/proc/self/cwd")
	if err != nil {
		t.Fatal(err)
	}
	want := errors.New("x")
	for range 200 {
		err := Do(func() error {
			if unix.Gettid() == unix.Getpid() {
				t.Error("it runs on the first thread")
			}
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return err
			}
			if err := unix.Chdir("/"); err != nil {
				return err
			}
			return want
		})
		if err != want {
			t.Fatal(err)
		}
	}
	if after, err := os.Readlink("/proc/self/cwd"); err != nil || after != before {
		t.Errorf("the program is in %s now: %v", after, err)
	}
}
