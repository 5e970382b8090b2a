package tarstream

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// openDirs is how many directories are kept open.
const openDirs = 64

type inode struct{ dev, ino uint64 }

// node is an open directory. Its times are put back when it is closed, if
// something was done in it.
type node struct {
	fd           int
	id           inode
	gid          uint32
	atime, mtime unix.Timespec
	dirty        bool
	users        int // paths in the cache
}

func (n *node) proc() string { return procPath(n.fd) }

func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// names lists the directory.
func (n *node) names() ([]string, error) {
	fd, err := openat(n.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathError("open", ".", err)
	}
	f := os.NewFile(uintptr(fd), ".")
	defer f.Close()
	return f.Readdirnames(-1)
}

// removeAll removes a tree and follows no link.
func (n *node) removeAll(name string) error {
	return os.RemoveAll(n.proc() + "/" + name)
}

// tree is a directory with a cache of open directories below it, by path. All
// paths are resolved by the kernel below the root.
type tree struct {
	root  *node
	paths map[string]*use
	nodes map[inode]*node
	stale []*node // not found by path any more, to be closed between two entries
	tick  int64
	err   error
}

type use struct {
	n    *node
	last int64
}

func (t *tree) init(fd int) {
	t.paths, t.nodes = make(map[string]*use), make(map[inode]*node)
	t.root = &node{fd: fd}
	t.err = t.root.stat()
	t.nodes[t.root.id] = t.root
}

func (n *node) stat() error {
	var st unix.Stat_t
	if err := unix.Fstat(n.fd, &st); err != nil {
		return pathError("stat", "directory", err)
	}
	n.id, n.gid, n.atime, n.mtime = inode{st.Dev, st.Ino}, st.Gid, st.Atim, st.Mtim
	return nil
}

// get returns the cached directory or nil.
func (t *tree) get(path string) *node {
	if path == "." || path == "" {
		return t.root
	}
	if u := t.paths[path]; u != nil {
		t.tick++
		u.last = t.tick
		return u.n
	}
	return nil
}

// adopt takes over fd, an open directory that path leads to.
func (t *tree) adopt(fd int, path string) (*node, error) {
	n := &node{fd: fd}
	if err := n.stat(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	if same := t.nodes[n.id]; same != nil {
		unix.Close(fd)
		n = same
	} else {
		t.nodes[n.id] = n
	}
	if n == t.root {
		return n, nil
	}
	if old := t.paths[path]; old != nil {
		t.drop(path, old)
	}
	if len(t.paths) >= openDirs {
		var oldest string
		var least *use
		for p, u := range t.paths {
			if least == nil || u.last < least.last {
				oldest, least = p, u
			}
		}
		t.drop(oldest, least)
	}
	t.tick++
	n.users++
	t.paths[path] = &use{n, t.tick}
	return n, nil
}

func (t *tree) drop(path string, u *use) {
	delete(t.paths, path)
	if u.n.users--; u.n.users == 0 {
		t.stale = append(t.stale, u.n)
	}
}

// forget drops what is known of paths, when one may lead elsewhere now. Nodes
// in use stay open until settle.
func (t *tree) forget() {
	for p, u := range t.paths {
		t.drop(p, u)
	}
}

// settle closes nodes that were dropped; their times are put back.
func (t *tree) settle() error {
	for _, n := range t.stale {
		if n.users > 0 {
			continue // found again
		}
		if t.nodes[n.id] != n {
			continue // twice in the list
		}
		delete(t.nodes, n.id)
		if err := n.restore(); err != nil && t.err == nil {
			t.err = err
		}
		unix.Close(n.fd)
	}
	t.stale = t.stale[:0]
	return t.err
}

func (n *node) restore() error {
	if !n.dirty {
		return nil
	}
	n.dirty = false
	if err := futimens(n.fd, n.atime, n.mtime); err != nil {
		return pathError("set times of", "directory", err)
	}
	return nil
}

func (t *tree) close() {
	t.forget()
	_ = t.settle()
	unix.Close(t.root.fd)
}

// child opens the directory base in dir.
func (t *tree) child(dir *node, base, path string) (*node, error) {
	fd, err := openat(dir.fd, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathError("open", path, err)
	}
	return t.adopt(fd, path)
}

// lookup opens an existing directory; links are followed within the root. The
// error is the bare errno.
func (t *tree) lookup(path string) (*node, error) {
	if n := t.get(path); n != nil {
		return n, nil
	}
	fd, err := openIn(t.root.fd, path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return t.adopt(fd, path)
}

// openIn resolves path as if root were the root of the file system.
func openIn(root int, path string, flags, resolve uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | resolve}
	for range 128 {
		fd, err := unix.Openat2(root, path, &how)
		switch {
		case err == nil:
			return fd, nil
		case err == unix.EAGAIN, err == unix.EINTR:
			continue // somebody renames within the tree
		case err == unix.ENOSYS:
			return -1, fmt.Errorf("openat2 needs Linux 5.6: %w", errdefs.ErrNotImplemented)
		}
		return -1, err
	}
	return -1, unix.EAGAIN
}

func openat(dir int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

func futimens(fd int, atime, mtime unix.Timespec) error {
	ts := [2]unix.Timespec{atime, mtime}
	return utimensat(fd, &ts)
}

func timespec(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

func pathError(op, path string, err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) || err == io.EOF {
		return err
	}
	return &os.PathError{Op: op, Path: short(path), Err: err}
}
