package tarstream

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Diff writes the archive that turns the directory lower, or an empty one if
// it is "", into upper. The same trees give the same bytes, wherever they are.
// Files count as unchanged if type, owner, mode, size, time and extended
// attributes are equal; if the time has no fraction of a second, which an
// archive may have lost, their bytes are compared. The times of directories
// alone are no change. Sockets are left out.
func Diff(ctx context.Context, w io.Writer, lower, upper string, opts DiffOptions) error {
	d := differ{ctx: ctx, opts: opts, linked: map[inode][]string{}}
	up, err := openRoot(upper)
	if err != nil {
		return err
	}
	defer up.Close()
	low := -1
	if lower != "" {
		f, err := openRoot(lower)
		if err != nil {
			return err
		}
		defer f.Close()
		low = int(f.Fd())
	}
	if err := d.compare(low, int(up.Fd()), ""); err != nil {
		return fmt.Errorf("compare %s with %s: %w", lower, upper, err)
	}
	if err := d.write(w, int(up.Fd())); err != nil {
		return fmt.Errorf("archive %s: %w", upper, err)
	}
	return nil
}

// DiffUpper writes the archive of what the upper directory of an overlay
// changes in the layers below. ErrNotImplemented, before anything is written,
// if it refers to them by redirects or has metadata without data.
func DiffUpper(ctx context.Context, w io.Writer, upper string, opts DiffOptions) error {
	d := differ{ctx: ctx, opts: opts, linked: map[inode][]string{}}
	up, err := openRoot(upper)
	if err != nil {
		return err
	}
	defer up.Close()
	if err := d.upper(int(up.Fd()), ""); err != nil {
		return fmt.Errorf("walk %s: %w", upper, err)
	}
	if err := d.write(w, int(up.Fd())); err != nil {
		return fmt.Errorf("archive %s: %w", upper, err)
	}
	return nil
}

func openRoot(dir string) (*os.File, error) {
	return os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

type changeKind uint8

const (
	changed changeKind = iota
	deleted
	opaqued
)

type differ struct {
	ctx     context.Context
	opts    DiffOptions
	changes []change
	// linked are the unchanged names of files with several; if one name of a
	// file is new the others go along, or the link would become a copy.
	linked map[inode][]string
}

type change struct {
	path string
	kind changeKind
	id   inode // of changed files with several names
}

func listDir(fd int) ([]string, error) {
	names, err := (&node{fd: fd}).names()
	slices.Sort(names)
	return names, err
}

func openChild(dir int, name string) (int, error) {
	return openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// compare collects the changes of a directory; lower is -1 if it is new.
func (d *differ) compare(lower, upper int, at string) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	names, err := listDir(upper)
	if err != nil {
		return err
	}
	if lower >= 0 {
		old, err := listDir(lower)
		if err != nil {
			return err
		}
		for _, name := range old {
			if _, still := slices.BinarySearch(names, name); !still {
				d.changes = append(d.changes, change{path: path.Join(at, name), kind: deleted})
			}
		}
	}
	for _, name := range names {
		where := path.Join(at, name)
		var ust, lst unix.Stat_t
		if err := unix.Fstatat(upper, name, &ust, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return pathError("stat", where, err)
		}
		kind := ust.Mode & unix.S_IFMT
		if kind == unix.S_IFSOCK {
			continue
		}
		was := false
		if lower >= 0 {
			err := unix.Fstatat(lower, name, &lst, unix.AT_SYMLINK_NOFOLLOW)
			if err != nil && err != unix.ENOENT {
				return pathError("stat", where, err)
			}
			was = err == nil
		}
		same := false
		if was {
			if same, err = d.same(lower, upper, name, &lst, &ust); err != nil {
				return pathError("compare", where, err)
			}
		}
		if !same {
			d.add(where, &ust)
		} else if kind == unix.S_IFREG && ust.Nlink > 1 {
			id := inode{ust.Dev, ust.Ino}
			d.linked[id] = append(d.linked[id], where)
		}
		if kind != unix.S_IFDIR {
			continue
		}
		if err := d.descend(lower, upper, name, where, was && lst.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
			return err
		}
	}
	return nil
}

func (d *differ) descend(lower, upper int, name, where string, was bool) error {
	low := -1
	if was {
		fd, err := openChild(lower, name)
		if err != nil {
			return pathError("open", where, err)
		}
		defer unix.Close(fd)
		low = fd
	}
	up, err := openChild(upper, name)
	if err != nil {
		return pathError("open", where, err)
	}
	defer unix.Close(up)
	return d.compare(low, up, where)
}

func (d *differ) add(where string, st *unix.Stat_t) {
	c := change{path: where}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
		c.id = inode{st.Dev, st.Ino}
	}
	d.changes = append(d.changes, c)
}

func (d *differ) same(lower, upper int, name string, l, u *unix.Stat_t) (bool, error) {
	if l.Dev == u.Dev && l.Ino == u.Ino {
		return true, nil
	}
	if l.Mode != u.Mode || l.Uid != u.Uid || l.Gid != u.Gid || l.Rdev != u.Rdev {
		return false, nil
	}
	kind := u.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && (l.Size != u.Size || l.Mtim != u.Mtim) {
		return false, nil
	}
	if kind == unix.S_IFLNK {
		a, err := readlinkat(lower, name)
		if err != nil {
			return false, err
		}
		b, err := readlinkat(upper, name)
		return a == b, err
	}
	a, err := xattrsAt(lower, name)
	if err != nil {
		return false, err
	}
	b, err := xattrsAt(upper, name)
	if err != nil || !maps.Equal(a, b) {
		return false, err
	}
	if kind == unix.S_IFREG && u.Mtim.Nsec == 0 && u.Size > 0 {
		return d.sameBytes(lower, upper, name)
	}
	return true, nil
}

func (d *differ) sameBytes(lower, upper int, name string) (bool, error) {
	a, err := openFile(lower, name)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := openFile(upper, name)
	if err != nil {
		return false, err
	}
	defer b.Close()
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		if err := d.ctx.Err(); err != nil {
			return false, err
		}
		n, err := io.ReadFull(a, x)
		m, err2 := io.ReadFull(b, y)
		if n != m || !bytes.Equal(x[:n], y[:m]) {
			return false, nil
		}
		if end(err) || end(err2) {
			return true, nil
		}
		if err := errors.Join(err, err2); err != nil {
			return false, err
		}
	}
}

func end(err error) bool { return err == io.EOF || err == io.ErrUnexpectedEOF }

func openFile(dir int, name string) (*os.File, error) {
	fd, err := openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// kept reports whether an extended attribute belongs into an archive: what
// users and capabilities are made of, not what this host's policy added.
func kept(name string) bool {
	switch {
	case private(name):
		return false
	case name == "security.capability":
		return true
	}
	return strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "trusted.")
}

func xattrsAt(dir int, name string) (map[string]string, error) {
	fd, err := openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	defer unix.Close(fd)
	return readXattrs(procPath(fd), kept)
}

// upper collects the changes of a directory of an overlay's upper one.
func (d *differ) upper(dir int, at string) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	names, err := listDir(dir)
	if err != nil {
		return err
	}
	prefix := "trusted.overlay."
	if d.opts.UserXattr {
		prefix = "user.overlay."
	}
	for _, name := range names {
		where := path.Join(at, name)
		var st unix.Stat_t
		if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return pathError("stat", where, err)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFSOCK:
		case unix.S_IFREG:
			p := procPath(dir) + "/" + name
			for _, x := range []string{"metacopy", "redirect", "whiteout"} {
				if _, err := unix.Lgetxattr(p, prefix+x, nil); err == nil {
					return fmt.Errorf("%s has %s%s: %w", where, prefix, x, errdefs.ErrNotImplemented)
				}
			}
			d.add(where, &st)
		case unix.S_IFCHR:
			if st.Rdev == 0 {
				d.changes = append(d.changes, change{path: where, kind: deleted})
				continue
			}
			d.add(where, &st)
		case unix.S_IFDIR:
			if err := d.upperDir(dir, name, where, prefix, &st); err != nil {
				return err
			}
		default:
			d.add(where, &st)
		}
	}
	return nil
}

func (d *differ) upperDir(dir int, name, where, prefix string, st *unix.Stat_t) error {
	d.add(where, st)
	fd, err := openChild(dir, name)
	if err != nil {
		return pathError("open", where, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Fgetxattr(fd, prefix+"redirect", nil); err == nil {
		return fmt.Errorf("%s has %sredirect: %w", where, prefix, errdefs.ErrNotImplemented)
	}
	var v [8]byte
	if n, err := unix.Fgetxattr(fd, prefix+"opaque", v[:]); err == nil {
		if string(v[:n]) != "y" {
			return fmt.Errorf("%s has %sopaque=%q: %w", where, prefix, v[:n], errdefs.ErrNotImplemented)
		}
		d.changes = append(d.changes, change{path: where, kind: opaqued})
	}
	return d.upper(fd, where)
}

// order sorts a tree depth first, a directory before what is in it.
func order(a, b change) int {
	x, y := a.path, b.path
	for i := 0; i < len(x) && i < len(y); i++ {
		if x[i] != y[i] {
			switch {
			case x[i] == '/':
				return -1
			case y[i] == '/':
				return 1
			}
			return int(x[i]) - int(y[i])
		}
	}
	if len(x) != len(y) {
		return len(x) - len(y)
	}
	return int(a.kind) - int(b.kind)
}

// write archives the changes with the directories that lead to them.
func (d *differ) write(w io.Writer, root int) error {
	for _, c := range slices.Clone(d.changes) {
		for _, p := range d.linked[c.id] {
			d.changes = append(d.changes, change{path: p, id: c.id})
		}
		delete(d.linked, c.id)
	}
	slices.SortFunc(d.changes, order)
	a := archiver{tw: tar.NewWriter(w), root: root, opts: d.opts, links: map[inode]string{}}
	var open []string // the directories written that lead to the last change
	for _, c := range d.changes {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		for len(open) > 0 && !strings.HasPrefix(c.path, open[len(open)-1]+"/") && c.path != open[len(open)-1] {
			open = open[:len(open)-1]
		}
		above := c.path
		if c.kind != opaqued {
			above, _ = split(c.path)
		}
		if err := a.parents(d.ctx, above, &open); err != nil {
			return err
		}
		var err error
		switch c.kind {
		case deleted:
			dir, base := split(c.path)
			err = a.whiteout(path.Join(dir, whPrefix+base))
		case opaqued:
			err = a.whiteout(path.Join(c.path, whOpaque))
		default:
			if len(open) > 0 && open[len(open)-1] == c.path {
				break
			}
			var isDir bool
			if isDir, err = a.add(d.ctx, c.path); isDir {
				open = append(open, c.path)
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.path, err)
		}
	}
	return a.tw.Close()
}

type archiver struct {
	tw    *tar.Writer
	root  int
	opts  DiffOptions
	links map[inode]string // the first name of files with several
	buf   []byte
}

// parents writes the directories down to dir that are not open yet.
func (a *archiver) parents(ctx context.Context, dir string, open *[]string) error {
	if dir == "." {
		return nil
	}
	for i := 0; i <= len(dir); i++ {
		if i < len(dir) && dir[i] != '/' {
			continue
		}
		p := dir[:i]
		if slices.Contains(*open, p) {
			continue
		}
		if _, err := a.add(ctx, p); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		*open = append(*open, p)
	}
	return nil
}

func (a *archiver) whiteout(name string) error {
	return a.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
}

func (a *archiver) time(ts unix.Timespec) time.Time {
	t := time.Unix(ts.Unix())
	if e := a.opts.Epoch; e != nil && t.After(*e) {
		return *e
	}
	return t
}

// add writes one member and tells if it is a directory.
func (a *archiver) add(ctx context.Context, p string) (bool, error) {
	fd, err := openIn(a.root, p, unix.O_PATH|unix.O_NOFOLLOW, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return false, pathError("open", p, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, pathError("stat", p, err)
	}
	hdr := &tar.Header{
		Name: p, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: a.time(st.Mtim), Format: tar.FormatPAX,
	}
	id := inode{st.Dev, st.Ino}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		if first, ok := a.links[id]; ok {
			hdr.Typeflag, hdr.Linkname = tar.TypeLink, first
			return false, a.tw.WriteHeader(hdr)
		}
		a.links[id] = p
	}
	switch kind {
	case unix.S_IFREG:
		hdr.Typeflag, hdr.Size = tar.TypeReg, st.Size
	case unix.S_IFDIR:
		hdr.Typeflag = tar.TypeDir
		hdr.Name += "/"
	case unix.S_IFLNK:
		hdr.Typeflag = tar.TypeSymlink
		if hdr.Linkname, err = readlinkat(fd, ""); err != nil {
			return false, pathError("readlink", p, err)
		}
	case unix.S_IFIFO:
		hdr.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		hdr.Typeflag = tar.TypeChar
		if kind == unix.S_IFBLK {
			hdr.Typeflag = tar.TypeBlock
		}
		hdr.Devmajor, hdr.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default:
		return false, fmt.Errorf("mode %o: %w", st.Mode, errdefs.ErrNotImplemented)
	}
	if kind != unix.S_IFLNK {
		xattrs, err := readXattrs(procPath(fd), kept)
		if err != nil {
			return false, err
		}
		for k, v := range xattrs {
			if hdr.PAXRecords == nil {
				hdr.PAXRecords = make(map[string]string)
			}
			hdr.PAXRecords[paxXattr+k] = v
		}
	}
	if err := a.tw.WriteHeader(hdr); err != nil {
		return false, err
	}
	if kind != unix.S_IFREG || st.Size == 0 {
		return kind == unix.S_IFDIR, nil
	}
	f, err := os.OpenFile(procPath(fd), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if a.buf == nil {
		a.buf = make([]byte, 256<<10)
	}
	for left := st.Size; left > 0; {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n, err := f.Read(a.buf[:min(left, int64(len(a.buf)))])
		if n > 0 {
			left -= int64(n)
			if _, err := a.tw.Write(a.buf[:n]); err != nil {
				return false, err
			}
		}
		if err == io.EOF {
			return false, fmt.Errorf("became shorter while it was read: %w", errdefs.ErrFailedPrecondition)
		}
		if err != nil {
			return false, err
		}
	}
	return false, nil
}
