package tarstream

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxLinks is how many links one path may lead through.
const maxLinks = 255

func (u *unpacker) opaqueName() string {
	if u.opts.UserXattr {
		return "user.overlay.opaque"
	}
	return "trusted.overlay.opaque"
}

func (u *unpacker) setOpaque(n *node) error {
	if err := unix.Fsetxattr(n.fd, u.opaqueName(), []byte("y"), 0); err != nil {
		return pathError("set "+u.opaqueName()+" on", "directory", err)
	}
	return nil
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// existing opens a directory that is there, or returns a bare ENOENT.
func (u *unpacker) existing(dir string) (*node, error) {
	n, err := u.tree.lookup(dir)
	if err == nil || err == unix.ENOENT {
		return n, err
	}
	return nil, pathError("open", dir, err)
}

// parent opens the directory that a member goes to, and makes what is missing.
func (u *unpacker) parent(dir string) (*node, error) {
	n := u.tree.get(dir)
	if n != nil {
		return n, nil
	}
	n, err := u.tree.lookup(dir)
	if err == unix.ENOENT || err == unix.ENOTDIR && u.opts.Whiteouts == Overlay {
		n, err = u.makeParents(dir)
	}
	if err != nil {
		return nil, pathError("open", dir, err)
	}
	if u.made != nil {
		// A directory that the archive has something in is not removed by
		// its whiteouts.
		up, base := split(dir)
		above, err := u.parent(up)
		if err != nil {
			return nil, err
		}
		u.made[member{above.id, base}] = struct{}{}
	}
	return n, nil
}

// makeParents walks to dir one name after another as the overlay would, from
// the root and with links followed within it, and makes directories that are
// missing: as in the lower layers if they have them, 0755 if not.
func (u *unpacker) makeParents(dir string) (*node, error) {
	rest := strings.Split(dir, "/")
	var at []string // where cur is; no links in it
	cur := u.tree.root
	here := func() string { return strings.Join(at, "/") }
	links := 0
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(at) > 0 {
				at = at[:len(at)-1]
			}
			n, err := u.tree.lookup(path.Join(".", here()))
			if err != nil {
				return nil, err
			}
			cur = n
			continue
		}
		where := path.Join(here(), name)
		var st unix.Stat_t
		err := unix.Fstatat(cur.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		target := ""
		switch {
		case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
		case err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK:
			if target, err = readlinkat(cur.fd, name); err != nil {
				return nil, pathError("readlink", where, err)
			}
		case err == nil && isWhiteout(&st) && u.opts.Whiteouts == Overlay:
			cur.dirty = true
			if err := unix.Unlinkat(cur.fd, name, 0); err != nil {
				return nil, pathError("unlink", where, err)
			}
			if err := u.makeDir(cur, name, nil, true); err != nil {
				return nil, err
			}
		case err == nil:
			return nil, pathError("make directory", where, unix.ENOTDIR)
		case err == unix.ENOENT:
			var lower *lowerEntry
			if !u.hidesLower(cur) {
				if lower, err = u.lower(where); err != nil {
					return nil, err
				}
			}
			if lower != nil && lower.link != "" {
				target = lower.link
				break
			}
			cur.dirty = true
			err := u.makeDir(cur, name, lower, false)
			if lower != nil {
				unix.Close(lower.fd)
			}
			if err != nil {
				return nil, err
			}
		default:
			return nil, pathError("stat", where, err)
		}
		if target == "" {
			if cur, err = u.tree.child(cur, name, where); err != nil {
				return nil, err
			}
			at = append(at, name)
			continue
		}
		if links++; links > maxLinks {
			return nil, pathError("make directory", dir, unix.ELOOP)
		}
		if strings.HasPrefix(target, "/") {
			at, cur = nil, u.tree.root
		}
		rest = append(strings.Split(target, "/"), rest...)
		if len(rest) > 1<<14 {
			return nil, pathError("make directory", dir, unix.ENAMETOOLONG)
		}
	}
	return cur, nil
}

func readlinkat(dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, name, buf)
	if err != nil {
		return "", err
	}
	if n == 0 || n == len(buf) {
		return "", unix.ENAMETOOLONG
	}
	return string(buf[:n]), nil
}

// makeDir makes a directory that no member describes.
func (u *unpacker) makeDir(dir *node, name string, like *lowerEntry, opaque bool) error {
	err := unix.Mkdirat(dir.fd, name, 0o755)
	if err == unix.EEXIST {
		return nil // somebody else's; opening it says if it is one
	}
	if err != nil {
		return pathError("mkdir", name, err)
	}
	hdr := &tar.Header{Name: name, Mode: 0o755, Uid: int(u.uid), Gid: int(u.gid), Typeflag: tar.TypeDir}
	fd, err := openat(dir.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return pathError("open", name, err)
	}
	defer unix.Close(fd)
	if like != nil {
		if hdr, err = like.header(name); err != nil {
			return err
		}
	}
	if opaque {
		if err := unix.Fsetxattr(fd, u.opaqueName(), []byte("y"), 0); err != nil {
			return pathError("set "+u.opaqueName()+" on", name, err)
		}
	}
	if err := u.ownerModeXattrs(fd, hdr); err != nil {
		return err
	}
	if like != nil {
		a, m := times(hdr)
		return futimens(fd, a, m)
	}
	return nil
}

// whiteout hides the name in dir from the layers below.
func (u *unpacker) whiteout(dir, name string) error {
	if u.opts.Whiteouts == Remove {
		if u.made == nil {
			return nil // nothing is below
		}
		n, err := u.existing(dir)
		if err == unix.ENOENT || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		if err != nil {
			return err
		}
		if u.mine(n, name) {
			// The name is this archive's; what is in it and is not goes.
			return u.sweepChild(n, name)
		}
		n.dirty = true
		_, err = u.clear(n, name)
		return err
	}
	n, err := u.parent(dir)
	if err != nil {
		return err
	}
	n.dirty = true
	var st unix.Stat_t
	err = unix.Fstatat(n.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == unix.ENOENT:
	case err != nil:
		return pathError("stat", name, err)
	case isWhiteout(&st):
		return nil
	case u.mine(n, name):
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil // it hides what is below as it is
		}
		child, err := u.tree.child(n, name, path.Join(dir, name))
		if err != nil {
			return err
		}
		if err := u.sweep(child, 0); err != nil {
			return err
		}
		return u.setOpaque(child)
	}
	err = u.create(n, name, func() error { return unix.Mknodat(n.fd, name, unix.S_IFCHR, 0) })
	if err != nil {
		return pathError("make the whiteout of", name, err)
	}
	return nil
}

// opaque hides everything in dir from the layers below.
func (u *unpacker) opaque(dir string) error {
	if u.opts.Whiteouts == Remove {
		if u.made == nil {
			return nil
		}
		n, err := u.existing(dir)
		if err == unix.ENOENT || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		if err != nil {
			return err
		}
		return u.sweep(n, 0)
	}
	n, err := u.parent(dir)
	if err != nil {
		return err
	}
	if err := u.sweep(n, 0); err != nil {
		return err
	}
	if n != u.tree.root {
		return u.setOpaque(n)
	}
	return u.opaqueRoot()
}

// opaqueRoot hides the lower layers' names one by one: overlay merges the
// roots of all layers whatever they say.
func (u *unpacker) opaqueRoot() error {
	for i := range u.opts.Lowers {
		fd, err := u.lowerRoot(i)
		if err != nil {
			return err
		}
		names, err := (&node{fd: fd}).names()
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := u.whiteout(".", name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (u *unpacker) sweepChild(n *node, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(n.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	fd, err := openat(n.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return pathError("open", name, err)
	}
	child := &node{fd: fd}
	defer unix.Close(fd)
	if err := child.stat(); err != nil {
		return err
	}
	if open := u.tree.nodes[child.id]; open != nil {
		return u.sweep(open, 0)
	}
	if err := u.sweep(child, 0); err != nil {
		return err
	}
	return child.restore()
}

// sweep removes what this archive did not bring from a directory that it did.
func (u *unpacker) sweep(n *node, depth int) error {
	if u.made == nil {
		return nil
	}
	if depth > 1024 {
		return pathError("sweep", "directory", unix.ELOOP)
	}
	names, err := n.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if u.mine(n, name) {
			if err := u.sweepChild(n, name); err != nil {
				return err
			}
			continue
		}
		n.dirty = true
		if _, err := u.clear(n, name); err != nil {
			return err
		}
	}
	return nil
}

// lowerEntry is what the layers below have at a path: a directory that is
// open, or a link, or an open file.
type lowerEntry struct {
	fd   int // O_PATH, or -1 for a link
	st   unix.Stat_t
	link string
}

func (u *unpacker) lowerRoot(i int) (int, error) {
	if u.lowers == nil {
		u.lowers = make([]int, len(u.opts.Lowers))
		for j := range u.lowers {
			u.lowers[j] = -1
		}
	}
	if u.lowers[i] < 0 {
		fd, err := unix.Open(u.opts.Lowers[i], unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, pathError("open the lower layer", u.opts.Lowers[i], err)
		}
		u.lowers[i] = fd
	}
	return u.lowers[i], nil
}

func (u *unpacker) hidesLower(n *node) bool {
	if len(u.opts.Lowers) == 0 {
		return true
	}
	return isOpaque(n.fd, u.opaqueName())
}

func isOpaque(fd int, name string) bool {
	var b [2]byte
	n, err := unix.Fgetxattr(fd, name, b[:])
	return err == nil && n == 1 && b[0] == 'y'
}

// lower finds what the topmost lower layer that has p, a path without links,
// has there; nil if none has or it is hidden.
func (u *unpacker) lower(p string) (*lowerEntry, error) {
	for i := range u.opts.Lowers {
		root, err := u.lowerRoot(i)
		if err != nil {
			return nil, err
		}
		fd, err := openIn(root, p, unix.O_PATH|unix.O_NOFOLLOW, unix.RESOLVE_NO_SYMLINKS)
		switch err {
		case nil:
		case unix.ENOENT:
			if u.lowerHides(root, p) {
				return nil, nil
			}
			continue
		case unix.ENOTDIR, unix.ELOOP:
			return nil, nil
		default:
			return nil, pathError("open in "+u.opts.Lowers[i]+":", p, err)
		}
		e := &lowerEntry{fd: fd}
		if err := unix.Fstat(fd, &e.st); err != nil {
			unix.Close(fd)
			return nil, pathError("stat", p, err)
		}
		switch e.st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			e.link, err = readlinkat(fd, "")
			unix.Close(fd)
			e.fd = -1
			if err != nil {
				return nil, pathError("readlink", p, err)
			}
			return e, nil
		case unix.S_IFDIR, unix.S_IFREG:
			return e, nil
		}
		unix.Close(fd)
		return nil, nil
	}
	return nil, nil
}

// lowerHides reports whether a directory on the way to p, which this layer
// does not have, hides the layers below it.
func (u *unpacker) lowerHides(root int, p string) bool {
	for dir, _ := split(p); dir != "."; dir, _ = split(dir) {
		fd, err := openIn(root, dir, unix.O_RDONLY|unix.O_DIRECTORY, unix.RESOLVE_NO_SYMLINKS)
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			return true
		}
		opaque := isOpaque(fd, u.opaqueName())
		unix.Close(fd)
		if opaque {
			return true
		}
	}
	return false
}

// header describes what the lower layer has as if it were a member.
func (e *lowerEntry) header(name string) (*tar.Header, error) {
	hdr := &tar.Header{
		Name: name, Mode: int64(e.st.Mode & 0o7777), Uid: int(e.st.Uid), Gid: int(e.st.Gid), Size: e.st.Size,
		ModTime: time.Unix(e.st.Mtim.Unix()), PAXRecords: map[string]string{},
	}
	xattrs, err := readXattrs(procPath(e.fd), func(name string) bool { return !private(name) && name != "security.selinux" })
	if err != nil {
		return nil, pathError("read attributes of", name, err)
	}
	for k, v := range xattrs {
		hdr.PAXRecords[paxXattr+k] = v
	}
	return hdr, nil
}

// copyUp brings a file of a lower layer that a hard link refers to.
func (u *unpacker) copyUp(target string) (*node, error) {
	dir, base := split(target)
	n, err := u.parent(dir)
	if err != nil {
		return nil, err
	}
	missing := invalid("hard link to %q, which does not exist", target)
	if u.hidesLower(n) {
		return nil, missing
	}
	e, err := u.lower(target)
	if err != nil {
		return nil, err
	}
	if e == nil || e.fd < 0 {
		return nil, missing
	}
	defer unix.Close(e.fd)
	if e.st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, missing
	}
	hdr, err := e.header(base)
	if err != nil {
		return nil, err
	}
	from, err := os.Open(procPath(e.fd))
	if err != nil {
		return nil, err
	}
	defer from.Close()
	n.dirty = true
	fd, err := openat(n.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, pathError("create", target, err)
	}
	to := os.NewFile(uintptr(fd), target)
	defer to.Close()
	if _, err := io.Copy(to, from); err != nil {
		return nil, fmt.Errorf("copy %s up: %w", target, err)
	}
	return n, u.attributes(fd, hdr)
}

// readXattrs returns the extended attributes of a path that keep likes. Links
// in the last component are followed: path is one of procPath.
func readXattrs(path string, keep func(string) bool) (map[string]string, error) {
	buf := make([]byte, 1<<10)
	n, err := unix.Listxattr(path, buf)
	if err == unix.ERANGE {
		buf = make([]byte, 64<<10) // the kernel's limit
		n, err = unix.Listxattr(path, buf)
	}
	if err == unix.ENOTSUP || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out map[string]string
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if !keep(name) {
			continue
		}
		value := make([]byte, 256)
		m, err := unix.Getxattr(path, name, value)
		if err == unix.ERANGE {
			value = make([]byte, 64<<10)
			m, err = unix.Getxattr(path, name, value)
		}
		if err == unix.ENODATA {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", name, err)
		}
		if out == nil {
			out = make(map[string]string)
		}
		out[name] = string(value[:m])
	}
	return out, nil
}
