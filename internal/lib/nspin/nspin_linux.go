package nspin

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/idmap"
	"github.com/gantryd/gantry/internal/lib/mountx"
	"github.com/gantryd/gantry/internal/lib/ownthread"
)

// order is that in which namespaces are entered: what belongs to a user
// namespace can be joined from outside of it, but not the other way round.
var order = []struct {
	kind Kind
	flag int
}{{Net, unix.CLONE_NEWNET}, {UTS, unix.CLONE_NEWUTS}, {IPC, unix.CLONE_NEWIPC}, {User, unix.CLONE_NEWUSER}}

// Make makes the namespaces of s, all or none. ErrInvalidArgument (unknown
// kind, mappings), ErrAlreadyExists (a file is there).
func Make(s Spec) (err error) {
	flags := 0
	for _, o := range order {
		if _, ok := s.Paths[o.kind]; ok {
			flags |= o.flag
		}
	}
	_, user := s.Paths[User]
	switch {
	case flags == 0 || len(s.Paths) > len(order):
		return fmt.Errorf("make namespaces %q: %w", slices.Sorted(maps.Keys(s.Paths)), errdefs.ErrInvalidArgument)
	case user:
		if err := cmp.Or(s.UIDs.Check(), s.GIDs.Check()); err != nil {
			return fmt.Errorf("make user namespace: %w", err)
		}
	}
	var done []string
	defer func() {
		if err != nil {
			for _, path := range done {
				err = errors.Join(err, Remove(path))
			}
		}
	}()
	pin := func(dir string) error {
		for kind, path := range s.Paths {
			if err := Pin(dir+"/"+string(kind), path); err != nil {
				return err
			}
			done = append(done, path)
		}
		return nil
	}
	if user {
		err = inChild(flags, s.UIDs, s.GIDs, pin)
	} else {
		err = ownthread.Do(func() error {
			if err := unix.Unshare(flags); err != nil {
				return fmt.Errorf("make namespaces: %w", err)
			}
			return pin("/proc/thread-self/ns")
		})
	}
	if err == nil && s.Hostname != "" && flags&unix.CLONE_NEWUTS != 0 {
		err = Enter(map[Kind]string{UTS: s.Paths[UTS]}, func() error {
			if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
				return fmt.Errorf("set host name %q: %w", s.Hostname, err)
			}
			return nil
		})
	}
	return err
}

// inChild calls fn with the directory of a child's namespaces. The child never
// runs an instruction of its program: a namespace of users is made for it
// because no process of several threads can enter one.
func inChild(flags int, uids, gids idmap.Map, fn func(dir string) error) error {
	runtime.LockOSThread() // the tracer is the thread that starts the child
	defer runtime.UnlockOSThread()
	child, err := os.StartProcess("/proc/self/exe", []string{"namespaces"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags: uintptr(flags), UidMappings: sysMap(uids), GidMappings: sysMap(gids), GidMappingsEnableSetgroups: true,
		Ptrace: true, Pdeathsig: unix.SIGKILL,
	}})
	if err != nil {
		return fmt.Errorf("make user namespace %s %s: %w", uids, gids, err)
	}
	err = fn(fmt.Sprintf("/proc/%d/ns", child.Pid))
	_ = child.Kill()
	if _, werr := child.Wait(); werr != nil && !errors.Is(werr, unix.ECHILD) {
		err = errors.Join(err, werr)
	}
	return err
}

func sysMap(m idmap.Map) []syscall.SysProcIDMap {
	out := make([]syscall.SysProcIDMap, len(m))
	for i, r := range m {
		out[i] = syscall.SysProcIDMap{ContainerID: int(r.Container), HostID: int(r.Host), Size: int(r.Size)}
	}
	return out
}

// Pin binds the namespace that source names, such as /proc/1/ns/net, to a new
// file at path. ErrAlreadyExists, ErrNotFound (source), ErrInvalidArgument (source is none).
func Pin(source, path string) (err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("pin namespace %s at %s: %w", source, path, errdefs.ErrAlreadyExists)
		}
		return fmt.Errorf("pin namespace %s: %w", source, err)
	}
	f.Close()
	defer func() {
		if err != nil {
			err = errors.Join(err, Remove(path))
		}
	}()
	// Opened first: what is bound is what was looked at.
	ns, err := os.Open(source)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("pin namespace %s at %s: %w", source, path, errdefs.ErrNotFound)
		}
		return fmt.Errorf("pin namespace at %s: %w", path, err)
	}
	defer ns.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(ns.Fd()), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		return fmt.Errorf("pin namespace %s at %s: it is none (%v): %w", source, path, err, errdefs.ErrInvalidArgument)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("pin namespace %s at %s: %w", source, path, err)
	}
	return nil
}

// Pinned says whether there is a namespace at path.
func Pinned(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// Remove lets go of the namespace at path, and removes the file. It is no
// error if either is gone; a process in the namespace keeps it.
func Remove(path string) error {
	if err := mountx.UnmountAll(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("let go of namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("let go of namespace: %w", err)
	}
	return nil
}

// Enter runs fn on a thread of its own inside the namespaces at paths, which
// may be those of a process. What fn starts as goroutines is outside; User
// cannot be entered (ErrInvalidArgument). It returns fn's error.
func Enter(paths map[Kind]string, fn func() error) error {
	if _, ok := paths[User]; ok {
		return fmt.Errorf("enter user namespace %s: %w", paths[User], errdefs.ErrInvalidArgument)
	}
	return ownthread.Do(func() error {
		for _, o := range order {
			path, ok := paths[o.kind]
			if !ok {
				continue
			}
			ns, err := os.Open(path)
			if err != nil {
				return fmt.Errorf("enter namespace: %w", err)
			}
			err = unix.Setns(int(ns.Fd()), o.flag)
			ns.Close()
			if err != nil {
				return fmt.Errorf("enter %s namespace %s: %w", o.kind, path, err)
			}
		}
		return fn()
	})
}
