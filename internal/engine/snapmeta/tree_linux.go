package snapmeta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/snapshot"
)

const (
	// maxTreeDepth bounds the open directories of a walk. Names of four kilobytes,
	// the longest that a system call takes, are not deeper.
	maxTreeDepth = 2100
	// removeDepth is where a removal moves what is below to the top, so that no
	// tree is too deep for it.
	removeDepth = 64
)

// Visit is called for an entry of a tree: its directory, open, and its name
// there. Entries may vanish or change at any time.
type Visit func(dir *os.File, name string, st *unix.Stat_t) error

// WalkTree calls fn for path and all below it on the same file system. It follows
// no link, whatever somebody puts in place meanwhile.
func WalkTree(ctx context.Context, path string, fn Visit) error {
	parent, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer parent.Close()
	var top unix.Stat_t
	name := filepath.Base(path)
	if err := unix.Fstatat(int(parent.Fd()), name, &top, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if err := fn(parent, name, &top); err != nil {
		return err
	}
	dir, err := openDirAt(parent, name, path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return walkDir(ctx, dir, top.Dev, 0, fn)
}

func openDirAt(parent *os.File, name, path string) (*os.File, error) {
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func walkDir(ctx context.Context, dir *os.File, dev uint64, depth int, fn Visit) error {
	if depth > maxTreeDepth {
		return fmt.Errorf("%s: more than %d levels deep", dir.Name(), maxTreeDepth)
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		names, err := dir.Readdirnames(512)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				if gone(err) {
					continue
				}
				return &os.PathError{Op: "stat", Path: filepath.Join(dir.Name(), name), Err: err}
			}
			if st.Dev != dev {
				continue // somebody's mount
			}
			if err := fn(dir, name, &st); err != nil {
				return err
			}
			if st.Mode&unix.S_IFMT != unix.S_IFDIR {
				continue
			}
			sub, err := openDirAt(dir, name, filepath.Join(dir.Name(), name))
			if err != nil {
				if gone(err) {
					continue
				}
				return err
			}
			err = walkDir(ctx, sub, dev, depth+1, fn)
			sub.Close()
			if err != nil {
				return err
			}
		}
	}
}

// gone tells that an entry is not what it was a moment ago.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// usage counts inodes and their blocks below path, itself included, hard links
// once (contract 3.1.6).
func usage(ctx context.Context, path string) (snapshot.Usage, error) {
	var u snapshot.Usage
	seen := map[uint64]struct{}{}
	err := WalkTree(ctx, path, func(_ *os.File, _ string, st *unix.Stat_t) error {
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if _, ok := seen[st.Ino]; ok {
				return nil
			}
			seen[st.Ino] = struct{}{}
		}
		u.Inodes++
		u.Size += st.Blocks * 512
		return nil
	})
	return u, err
}

var errMany = errors.New("too many files to sync one by one")

// syncTree makes a tree of at most limit entries durable, each by itself, so
// that nothing else on the file system has to be written. It returns false,
// quickly, if there are more.
func syncTree(ctx context.Context, path string, limit int) (bool, error) {
	n := 0
	err := WalkTree(ctx, path, func(*os.File, string, *unix.Stat_t) error {
		if n++; n > limit {
			return errMany
		}
		return nil
	})
	if errors.Is(err, errMany) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	err = WalkTree(ctx, path, func(dir *os.File, name string, st *unix.Stat_t) error {
		flags := unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			flags |= unix.O_DIRECTORY
		case unix.S_IFREG:
		default:
			return nil // nothing but its name, which its directory has
		}
		fd, err := unix.Openat(int(dir.Fd()), name, flags, 0)
		if err != nil {
			if gone(err) {
				return nil
			}
			return &os.PathError{Op: "open", Path: filepath.Join(dir.Name(), name), Err: err}
		}
		defer unix.Close(fd)
		if err := unix.Fsync(fd); err != nil {
			return &os.PathError{Op: "fsync", Path: filepath.Join(dir.Name(), name), Err: err}
		}
		return nil
	})
	return err == nil, err
}

// syncFS writes back all of the file system that dir is on.
func syncFS(dir *os.File) error {
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return &os.PathError{Op: "syncfs", Path: dir.Name(), Err: err}
	}
	return nil
}

// removeAll removes the entry name of top and everything below it on the same
// file system. It follows no link, and ends early when ctx does.
func removeAll(ctx context.Context, top *os.File, name string) error {
	pending := []string{name}
	for n := 0; len(pending) > 0; {
		name := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		err := removeEntry(ctx, top, name, 0, func(dir *os.File, deep string) error {
			n++
			moved := deepName(name, n)
			if err := unix.Renameat(int(dir.Fd()), deep, int(top.Fd()), moved); errors.Is(err, unix.ENOENT) {
				return nil
			} else if err != nil {
				return &os.PathError{Op: "rename", Path: filepath.Join(dir.Name(), deep), Err: err}
			}
			pending = append(pending, moved)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func deepName(name string, n int) string {
	if len(name) > 100 {
		name = name[:100]
	}
	return trashPrefix + name + "-" + strconv.Itoa(n)
}

func removeEntry(ctx context.Context, parent *os.File, name string, depth int, tooDeep func(*os.File, string) error) error {
	path := filepath.Join(parent.Name(), name)
	err := unix.Unlinkat(int(parent.Fd()), name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return &os.PathError{Op: "remove", Path: path, Err: err}
	}
	if depth > removeDepth {
		return tooDeep(parent, name)
	}
	fd, oerr := unix.Openat2(int(parent.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS,
	})
	switch {
	case errors.Is(oerr, unix.ENOENT):
		return nil
	case errors.Is(oerr, unix.ENOTDIR): // unlink's EPERM was about a file
		return &os.PathError{Op: "remove", Path: path, Err: err}
	case errors.Is(oerr, unix.EXDEV):
		return &os.PathError{Op: "remove", Path: path, Err: fmt.Errorf("a file system is mounted there: %w", unix.EBUSY)}
	case errors.Is(oerr, unix.ENOSYS): // before Linux 5.6
		fd, oerr = unix.Openat(int(parent.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	}
	if oerr != nil {
		return &os.PathError{Op: "open", Path: path, Err: oerr}
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(512)
		for _, n := range names {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := removeEntry(ctx, dir, n, depth+1, tooDeep); err != nil {
				return err
			}
		}
		// Of a directory that another cleanup has removed meanwhile nothing is left.
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return err
		}
	}
	err = unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "rmdir", Path: path, Err: err}
	}
	return nil
}
