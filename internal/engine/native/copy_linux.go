package native

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxAttr is the largest value and the longest list of extended attributes.
const maxAttr = 64 << 10

// copyTree makes dst, an empty directory, equal to the directory src: owners,
// modes, times, extended attributes, devices and holes too. Hard links within
// the tree stay links. Nothing else may write to either.
func copyTree(ctx context.Context, dst, src string) error {
	c := copier{ctx: ctx, links: map[uint64]string{}, buf: make([]byte, maxAttr)}
	var st unix.Stat_t
	if err := unix.Lstat(src, &st); err != nil {
		return &os.PathError{Op: "stat", Path: src, Err: err}
	}
	c.dev = st.Dev
	if err := c.dir(dst, src); err != nil {
		return err
	}
	return c.attributes(dst, src, &st)
}

type copier struct {
	ctx   context.Context
	dev   uint64
	links map[uint64]string // inodes with several names to the first copy
	buf   []byte
}

// dir copies what is in src.
func (c *copier) dir(dst, src string) error {
	d, err := os.Open(src)
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		names, err := d.Readdirnames(512)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := c.entry(filepath.Join(dst, name), filepath.Join(src, name)); err != nil {
				return err
			}
		}
	}
}

func (c *copier) entry(dst, src string) error {
	var st unix.Stat_t
	if err := unix.Lstat(src, &st); err != nil {
		return &os.PathError{Op: "stat", Path: src, Err: err}
	}
	if st.Dev != c.dev {
		return &os.PathError{Op: "copy", Path: src, Err: errors.New("another file system is mounted there")}
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		if first, ok := c.links[st.Ino]; ok {
			return os.Link(first, dst)
		}
		c.links[st.Ino] = dst
	}
	var err error
	switch kind {
	case unix.S_IFDIR:
		if err = os.Mkdir(dst, 0o700); err == nil {
			err = c.dir(dst, src)
		}
	case unix.S_IFREG:
		err = c.file(dst, src, st.Size)
	case unix.S_IFLNK:
		var to string
		if to, err = os.Readlink(src); err == nil {
			err = os.Symlink(to, dst)
		}
	default:
		if err = unix.Mknod(dst, kind|0o600, int(st.Rdev)); err != nil {
			err = &os.PathError{Op: "mknod", Path: dst, Err: err}
		}
	}
	if err != nil {
		return err
	}
	return c.attributes(dst, src, &st)
}

// attributes come last: writing changes times, and a new owner takes away
// set-id bits and capabilities.
func (c *copier) attributes(dst, src string, st *unix.Stat_t) error {
	if err := os.Lchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Chmod(dst, st.Mode&0o7777); err != nil {
			return &os.PathError{Op: "chmod", Path: dst, Err: err}
		}
	}
	if err := c.xattrs(dst, src); err != nil {
		return err
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, dst, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: dst, Err: err}
	}
	return nil
}

func (c *copier) xattrs(dst, src string) error {
	n, err := unix.Llistxattr(src, c.buf)
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && n == 0 {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "listxattr", Path: src, Err: err}
	}
	end := []byte{0}
	names := bytes.Clone(bytes.TrimSuffix(c.buf[:n], end))
	for _, name := range bytes.Split(names, end) {
		attr := string(name)
		n, err := unix.Lgetxattr(src, attr, c.buf)
		if err == nil {
			err = unix.Lsetxattr(dst, attr, c.buf[:n], 0)
		}
		if err != nil {
			return &os.PathError{Op: "copy xattr " + attr, Path: src, Err: err}
		}
	}
	return nil
}

func (c *copier) file(dst, src string, size int64) (err error) {
	in, err := os.OpenFile(src, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}()
	if size == 0 {
		return nil
	}
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return nil // they share blocks now
	}
	if err := out.Truncate(size); err != nil {
		return err
	}
	for end := int64(0); end < size; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		start, err := unix.Seek(int(in.Fd()), end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // the rest is a hole
		}
		if err != nil { // no such thing here: all is data
			start, end = end, size
		} else if end, err = unix.Seek(int(in.Fd()), start, unix.SEEK_HOLE); err != nil {
			end = size
		}
		if err := c.data(out, in, start, min(end, size)); err != nil {
			return fmt.Errorf("copy %s: %w", src, err)
		}
	}
	return nil
}

// data copies a range, inside the kernel where it can.
func (c *copier) data(out, in *os.File, start, end int64) error {
	const step = 64 << 20 // between two looks at the context
	for start < end {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		from, to := start, start
		n, err := unix.CopyFileRange(int(in.Fd()), &from, int(out.Fd()), &to, int(min(end-start, step)), 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err == nil && n > 0:
			start += int64(n)
		case err == nil, errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
			n, err := io.Copy(io.NewOffsetWriter(out, start), io.NewSectionReader(in, start, min(end-start, step)))
			if err == nil && n == 0 {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				return err
			}
			start += n
		default:
			return err
		}
	}
	return nil
}
