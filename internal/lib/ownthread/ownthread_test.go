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

func TestInside(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	path := t.TempDir() + "/ns"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	id := func() string {
		s, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Error(err)
		}
		return s
	}
	home, want := id(), errors.New("x")
	for range 50 {
		var inside string
		if err := Inside(path, unix.CLONE_NEWNET, func() error { inside = id(); return want }); err != want || inside == home || inside == "" {
			t.Fatal(err, inside)
		}
		if now := id(); now != home {
			t.Fatalf("a thread was left in %s", now)
		}
	}
	var enter *EnterError
	for _, bad := range []string{"/nonexistent", "/proc/self/ns/uts"} {
		if err := Inside(bad, unix.CLONE_NEWNET, func() error { t.Error("it ran"); return nil }); !errors.As(err, &enter) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
