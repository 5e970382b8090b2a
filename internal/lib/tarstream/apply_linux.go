package tarstream

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// smallFile is the size up to which a file's data is handed to a writer
	// goroutine as a whole.
	smallFile  = 64 << 10
	writers    = 2
	writeAhead = 32

	copyBuffer = 1 << 20
)

// Apply unpacks the tar stream r onto the directory root, which exists. Names
// are taken relative to root, with or without a leading slash; one that leaves
// it by "..", an impossible whiteout and a malformed header are
// ErrInvalidArgument and name the entry, as is an exceeded limit. A stream
// that ends inside an entry is ErrDataLoss. What was unpacked before an error
// stays; it is the caller's to drop. r is read up to the end of the archive,
// not further. Nothing is synced.
func Apply(ctx context.Context, root string, r io.Reader, opts ApplyOptions) (Stats, error) {
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Stats{}, &os.PathError{Op: "open", Path: root, Err: err}
	}
	u := &unpacker{
		ctx: ctx, opts: opts, limits: opts.Limits.withDefaults(),
		uid: uint32(os.Geteuid()), gid: uint32(os.Getegid()),
		jobs: make(chan job, writeAhead), buffers: make(chan []byte, writeAhead+writers+1),
	}
	u.tree.init(fd)
	defer u.tree.close()
	if err := u.start(); err != nil {
		return u.stats, err
	}
	err = u.run(r)
	close(u.jobs)
	u.wg.Wait()
	if werr := u.failed.Load(); werr != nil && err == nil {
		err = *werr
	}
	u.tree.forget()
	ferr := u.tree.settle()
	if ferr == nil {
		ferr = u.tree.root.restore()
	}
	if err == nil {
		err = ferr
	}
	return u.stats, err
}

// unpacker is one Apply. All names are made and removed by the goroutine that
// reads the archive, in the archive's order; data and attributes are written
// through descriptors by others.
type unpacker struct {
	ctx      context.Context
	opts     ApplyOptions
	limits   Limits
	tree     tree
	uid, gid uint32
	stats    Stats
	holes    int64
	copyBuf  []byte

	// made is what this archive brought, by parent and name. It is nil if the
	// target was empty at the start: then everything is.
	made map[member]struct{}

	lowers []int // descriptors, opened by the first use

	jobs    chan job
	buffers chan []byte
	wg      sync.WaitGroup
	failed  atomic.Pointer[error]
}

type member struct {
	dir  inode
	name string
}

// job is a file that has its name and wants its data and attributes.
type job struct {
	fd   int
	data []byte
	buf  []byte
	hdr  *tar.Header
}

func (u *unpacker) start() error {
	names, err := u.tree.root.names()
	if err != nil {
		return err
	}
	if len(names) > 0 {
		u.made = make(map[member]struct{})
	}
	for range writers {
		u.wg.Go(func() {
			for j := range u.jobs {
				if err := u.write(j); err != nil {
					err = fmt.Errorf("tar entry %q: %w", j.hdr.Name, err)
					u.failed.CompareAndSwap(nil, &err)
				}
				u.recycle(j.buf)
			}
		})
	}
	return nil
}

func (u *unpacker) run(r io.Reader) error {
	src := &remember{r: r}
	tr := tar.NewReader(src)
	defer func() {
		for _, fd := range u.lowers {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
	}()
	last := "the first entry"
	for {
		if err := u.ctx.Err(); err != nil {
			return err
		}
		if err := u.failed.Load(); err != nil {
			return *err
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return u.streamError(src, "after "+last, err)
		}
		last = fmt.Sprintf("%q", short(hdr.Name))
		u.stats.Entries++
		if u.stats.Entries > u.limits.Entries {
			return fmt.Errorf("tar entry %s: more than %d entries: %w", last, u.limits.Entries, errdefs.ErrInvalidArgument)
		}
		u.tree.settle()
		if err := u.entry(hdr, tr); err != nil {
			var se streamErr
			if errors.As(err, &se) {
				return u.streamError(src, "inside "+last, se.error)
			}
			switch {
			case errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.EILSEQ):
				err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
			}
			return fmt.Errorf("tar entry %s: %w", last, err)
		}
	}
}

func short(s string) string {
	if len(s) > 256 {
		return s[:256] + "..."
	}
	return s
}

// streamErr marks an error of the archive, not of the target.
type streamErr struct{ error }

func (u *unpacker) streamError(src *remember, where string, err error) error {
	switch {
	case u.ctx.Err() != nil:
		return u.ctx.Err()
	case src.err() != nil:
		return fmt.Errorf("tar %s: %w", where, src.err())
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("tar stream ends %s: %w: %w", where, err, errdefs.ErrDataLoss)
	}
	return fmt.Errorf("tar header %s: %w: %w", where, err, errdefs.ErrInvalidArgument)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// inside returns name relative to the root, "." for the root itself.
func (u *unpacker) inside(name, what string) (string, error) {
	if name == "" {
		return "", invalid("%s is empty", what)
	}
	if len(name) > u.limits.Path {
		return "", invalid("%s is longer than %d bytes", what, u.limits.Path)
	}
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", invalid("%s %q leaves the root", what, name)
	}
	return clean, nil
}

func split(clean string) (dir, base string) {
	if i := strings.LastIndexByte(clean, '/'); i >= 0 {
		return clean[:i], clean[i+1:]
	}
	return ".", clean
}

func (u *unpacker) entry(hdr *tar.Header, tr io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	clean, err := u.inside(hdr.Name, "name")
	if err != nil {
		return err
	}
	if err := u.check(hdr); err != nil {
		return err
	}
	if clean == "." {
		if hdr.Typeflag != tar.TypeDir {
			return invalid("the root can only be a directory")
		}
		return u.dirAttributes(u.tree.root, hdr)
	}
	dir, base := split(clean)
	switch {
	case base == whOpaque:
		return u.opaque(dir)
	case strings.HasPrefix(base, whMeta) || strings.HasPrefix(clean, whMeta) || strings.Contains(clean, "/"+whMeta):
		u.report(hdr, "metadata of aufs, left out")
		return nil
	case strings.HasPrefix(base, whPrefix):
		hidden := base[len(whPrefix):]
		if hidden == "" || hidden == "." || hidden == ".." {
			return invalid("whiteout of %q", hidden)
		}
		return u.whiteout(dir, hidden)
	}

	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeRegA, tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeFifo, tar.TypeCont, tar.TypeGNUSparse: //nolint:staticcheck // TypeRegA is what old archives have
	case tar.TypeChar, tar.TypeBlock:
		if u.opts.SkipDevices {
			u.report(hdr, "device node, left out: not possible in a user namespace")
			return nil
		}
	default:
		return invalid("unknown type %q", hdr.Typeflag)
	}
	parent, err := u.parent(dir)
	if err != nil {
		return err
	}
	parent.dirty = true
	switch hdr.Typeflag {
	case tar.TypeDir:
		err = u.directory(parent, clean, base, hdr)
	case tar.TypeSymlink:
		err = u.symlink(parent, base, hdr)
	case tar.TypeLink:
		err = u.hardlink(parent, base, hdr)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		err = u.special(parent, base, hdr)
	default:
		err = u.file(parent, base, hdr, tr)
	}
	if err == nil && u.made != nil {
		u.made[member{parent.id, base}] = struct{}{}
	}
	return err
}

func (u *unpacker) check(hdr *tar.Header) error {
	const maxID = 1<<32 - 2 // the largest number means "no change" to chown
	if hdr.Uid < 0 || hdr.Uid > maxID || hdr.Gid < 0 || hdr.Gid > maxID {
		return invalid("owner %d:%d is out of range", hdr.Uid, hdr.Gid)
	}
	if hdr.Size < 0 {
		return invalid("negative size")
	}
	if len(hdr.Linkname) > u.limits.Path {
		return invalid("link target is longer than %d bytes", u.limits.Path)
	}
	sum := 0
	for k, v := range hdr.PAXRecords {
		if strings.HasPrefix(k, paxXattr) {
			sum += len(k) - len(paxXattr) + len(v)
		}
	}
	if sum > u.limits.Xattrs {
		return invalid("extended attributes are longer than %d bytes", u.limits.Xattrs)
	}
	return nil
}

func (u *unpacker) report(hdr *tar.Header, what string) {
	if u.opts.Report != nil {
		u.opts.Report(short(hdr.Name), what)
	}
}

// mine reports whether this archive brought the name, as far as that matters.
func (u *unpacker) mine(dir *node, name string) bool {
	if u.made == nil {
		return true
	}
	_, ok := u.made[member{dir.id, name}]
	return ok
}

// clear removes whatever has the name. It tells if that was something other
// than a directory.
func (u *unpacker) clear(dir *node, name string) (other bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			return false, nil
		}
		return false, pathError("stat", name, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		u.tree.forget()
		return false, dir.removeAll(name)
	case unix.S_IFLNK:
		u.tree.forget()
	}
	if err := unix.Unlinkat(dir.fd, name, 0); err != nil && err != unix.ENOENT {
		return true, pathError("unlink", name, err)
	}
	return true, nil
}

// create calls make until it does not find the name taken. Whoever else works
// in the tree may make it fail, but not for ever.
func (u *unpacker) create(dir *node, name string, make func() error) error {
	for range 8 {
		err := make()
		if err != unix.EEXIST {
			return err
		}
		if _, err := u.clear(dir, name); err != nil {
			return err
		}
	}
	return unix.EEXIST
}

func (u *unpacker) file(dir *node, base string, hdr *tar.Header, tr io.Reader) error {
	fd := -1
	err := u.create(dir, base, func() (err error) {
		fd, err = openat(dir.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, uint32(hdr.Mode)&0o777)
		return err
	})
	if err != nil {
		return pathError("create", base, err)
	}
	sparse := isSparse(hdr)
	if sparse {
		u.holes += hdr.Size
		if u.holes > u.limits.Holes {
			unix.Close(fd)
			return invalid("sparse files claim more than %d bytes", u.limits.Holes)
		}
	} else if u.stats.Bytes += hdr.Size; u.limits.Bytes > 0 && u.stats.Bytes > u.limits.Bytes {
		unix.Close(fd)
		return invalid("files have more than %d bytes", u.limits.Bytes)
	}
	if hdr.Size <= smallFile && !sparse {
		j := job{fd: fd, hdr: hdr}
		if hdr.Size > 0 {
			j.buf = u.buffer()
			j.data = j.buf[:hdr.Size]
			if _, err := io.ReadFull(tr, j.data); err != nil {
				unix.Close(fd)
				u.recycle(j.buf)
				return streamErr{unexpected(err)}
			}
		}
		u.jobs <- j
		return nil
	}
	err = u.stream(fd, hdr, tr, sparse)
	if err == nil {
		err = u.attributes(fd, hdr)
	}
	if cerr := unix.Close(fd); err == nil && cerr != nil {
		err = pathError("close", base, cerr)
	}
	return err
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (u *unpacker) recycle(b []byte) {
	if b == nil {
		return
	}
	select {
	case u.buffers <- b:
	default:
	}
}

func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func (u *unpacker) buffer() []byte {
	select {
	case b := <-u.buffers:
		return b
	default:
		// No more than there are jobs under way, which the channel bounds.
		return make([]byte, smallFile)
	}
}

// stream writes a file that is too large for one buffer. Zero blocks of a
// sparse file are left out.
func (u *unpacker) stream(fd int, hdr *tar.Header, tr io.Reader, sparse bool) error {
	if u.copyBuf == nil {
		u.copyBuf = make([]byte, copyBuffer)
	}
	block := u.copyBuf
	if sparse {
		block = u.copyBuf[:smallFile]
	}
	for left := hdr.Size; left > 0; {
		if err := u.ctx.Err(); err != nil {
			return err
		}
		b := block[:min(left, int64(len(block)))]
		if _, err := io.ReadFull(tr, b); err != nil {
			return streamErr{unexpected(err)}
		}
		left -= int64(len(b))
		if sparse && isZero(b) {
			if _, err := unix.Seek(fd, int64(len(b)), io.SeekCurrent); err != nil {
				return pathError("seek", hdr.Name, err)
			}
			continue
		}
		if sparse {
			if u.stats.Bytes += int64(len(b)); u.limits.Bytes > 0 && u.stats.Bytes > u.limits.Bytes {
				return invalid("files have more than %d bytes", u.limits.Bytes)
			}
		}
		if err := writeAll(fd, b); err != nil {
			return pathError("write", hdr.Name, err)
		}
	}
	if sparse {
		if err := unix.Ftruncate(fd, hdr.Size); err != nil {
			return pathError("truncate", hdr.Name, err)
		}
	}
	return nil
}

// isZero compares the block with itself, one byte on.
func isZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// write finishes a small file. It runs in a writer goroutine.
func (u *unpacker) write(j job) error {
	err := writeAll(j.fd, j.data)
	if err != nil {
		err = pathError("write", j.hdr.Name, err)
	} else {
		err = u.attributes(j.fd, j.hdr)
	}
	if cerr := unix.Close(j.fd); err == nil && cerr != nil {
		err = pathError("close", j.hdr.Name, cerr)
	}
	return err
}

func (u *unpacker) directory(dir *node, clean, base string, hdr *tar.Header) error {
	fresh, replaced := false, false
	for range 8 {
		err := unix.Mkdirat(dir.fd, base, uint32(hdr.Mode)&0o777|0o700)
		if err == nil {
			fresh = true
			break
		}
		if err != unix.EEXIST {
			return pathError("mkdir", base, err)
		}
		var st unix.Stat_t
		if err := unix.Fstatat(dir.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			break
		}
		other, err := u.clear(dir, base)
		if err != nil {
			return err
		}
		replaced = replaced || other
	}
	if fresh && len(u.opts.Lowers) > 0 {
		// It may hide a link of a lower layer that names were resolved by.
		u.tree.forget()
	}
	n, err := u.tree.child(dir, base, clean)
	if err != nil {
		return err
	}
	if fresh && replaced && u.opts.Whiteouts == Overlay {
		// What was in the way hid the lower layers, so does the directory.
		if err := u.setOpaque(n); err != nil {
			return err
		}
	}
	return u.dirAttributes(n, hdr)
}

// dirAttributes sets everything but the times, which are set when the
// directory does not change any more.
func (u *unpacker) dirAttributes(n *node, hdr *tar.Header) error {
	if err := u.ownerModeXattrs(n.fd, hdr); err != nil {
		return err
	}
	n.atime, n.mtime = times(hdr)
	n.dirty = true
	return nil
}

func times(hdr *tar.Header) (atime, mtime unix.Timespec) {
	m := clampTime(hdr.ModTime)
	a := m
	if t := clampTime(hdr.AccessTime); t.After(a) {
		a = t
	}
	return timespec(a), timespec(m)
}

// attributes sets all of an open file's.
func (u *unpacker) attributes(fd int, hdr *tar.Header) error {
	if err := u.ownerModeXattrs(fd, hdr); err != nil {
		return err
	}
	atime, mtime := times(hdr)
	if err := futimens(fd, atime, mtime); err != nil {
		return pathError("set times of", hdr.Name, err)
	}
	return nil
}

// ownerModeXattrs asks first: most files have the right owner and mode from
// their creation on, and reading them is cheaper than a change that is none.
// The order matters: chown drops set-user-id bits and capabilities.
func (u *unpacker) ownerModeXattrs(fd int, hdr *tar.Header) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return pathError("stat", hdr.Name, err)
	}
	owned := st.Uid == uint32(hdr.Uid) && st.Gid == uint32(hdr.Gid)
	if !owned {
		if err := unix.Fchown(fd, hdr.Uid, hdr.Gid); err != nil {
			return pathError("chown", hdr.Name, err)
		}
	}
	if err := u.xattrs(hdr, func(name string, value []byte) error { return unix.Fsetxattr(fd, name, value, 0) }); err != nil {
		return err
	}
	if mode := uint32(hdr.Mode) & 0o7777; st.Mode&0o7777 != mode || !owned && mode&0o6000 != 0 {
		if err := unix.Fchmod(fd, mode); err != nil {
			return pathError("chmod", hdr.Name, err)
		}
	}
	return nil
}

func (u *unpacker) xattrs(hdr *tar.Header, set func(name string, value []byte) error) error {
	for k, v := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok {
			continue
		}
		if private(name) {
			u.report(hdr, "extended attribute "+short(name)+", left out: it is overlay's own")
			continue
		}
		err := set(name, []byte(v))
		switch {
		case err == nil:
		case err == unix.ENOTSUP && name != "security.capability",
			err == unix.EPERM && (u.opts.SkipDevices || strings.HasPrefix(name, "user.")):
			u.report(hdr, fmt.Sprintf("extended attribute %s, left out: %v", short(name), err))
		case err == unix.EINVAL || err == unix.ERANGE || err == unix.E2BIG || err == unix.ENOTSUP:
			return fmt.Errorf("extended attribute %s: %w: %w", short(name), err, errdefs.ErrInvalidArgument)
		default:
			return fmt.Errorf("extended attribute %s: %w", short(name), err)
		}
	}
	return nil
}

func (u *unpacker) symlink(dir *node, base string, hdr *tar.Header) error {
	if hdr.Linkname == "" {
		return invalid("link without a target")
	}
	err := u.create(dir, base, func() error { return unix.Symlinkat(hdr.Linkname, dir.fd, base) })
	if err != nil {
		return pathError("symlink", base, err)
	}
	if len(u.opts.Lowers) > 0 {
		u.tree.forget()
	}
	if uint32(hdr.Uid) != u.uid || uint32(hdr.Gid) != u.gid || dir.gid != u.gid {
		if err := unix.Fchownat(dir.fd, base, hdr.Uid, hdr.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return pathError("lchown", base, err)
		}
	}
	// The descriptor is ours, and the last component of the path is not followed.
	err = u.xattrs(hdr, func(name string, value []byte) error {
		return unix.Lsetxattr(dir.proc()+"/"+base, name, value, 0)
	})
	if err != nil {
		return err
	}
	atime, mtime := times(hdr)
	if err := unix.UtimesNanoAt(dir.fd, base, []unix.Timespec{atime, mtime}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return pathError("set times of", base, err)
	}
	return nil
}

func (u *unpacker) hardlink(dir *node, base string, hdr *tar.Header) error {
	target, err := u.inside(hdr.Linkname, "link target")
	if err != nil {
		return err
	}
	tdir, tbase := split(target)
	if target == "." {
		return invalid("hard link to the root")
	}
	from, err := u.existing(tdir)
	if err != nil && !(len(u.opts.Lowers) > 0 && err == unix.ENOENT) {
		if err == unix.ENOENT {
			return invalid("hard link to %q, which does not exist", hdr.Linkname)
		}
		return err
	}
	missing := err != nil
	var old unix.Stat_t
	if !missing {
		err := unix.Fstatat(from.fd, tbase, &old, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil && err != unix.ENOENT {
			return pathError("stat", target, err)
		}
		missing = err != nil
	}
	if missing && len(u.opts.Lowers) > 0 {
		if from, err = u.copyUp(target); err != nil {
			return err
		}
		missing = false
		if err := unix.Fstatat(from.fd, tbase, &old, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return pathError("stat", target, err)
		}
	}
	if missing {
		return invalid("hard link to %q, which does not exist", hdr.Linkname)
	}
	if old.Mode&unix.S_IFMT == unix.S_IFDIR {
		return invalid("hard link to the directory %q", hdr.Linkname)
	}
	var here unix.Stat_t
	if err := unix.Fstatat(dir.fd, base, &here, unix.AT_SYMLINK_NOFOLLOW); err == nil && here.Dev == old.Dev && here.Ino == old.Ino {
		return nil // linked already; clearing the name could drop the file
	}
	if err := u.create(dir, base, func() error { return unix.Linkat(from.fd, tbase, dir.fd, base, 0) }); err != nil {
		return pathError("link to "+target+" from", base, err)
	}
	return nil
}

func (u *unpacker) special(dir *node, base string, hdr *tar.Header) error {
	var kind uint32
	dev := 0
	switch hdr.Typeflag {
	case tar.TypeFifo:
		kind = unix.S_IFIFO
	case tar.TypeChar, tar.TypeBlock:
		kind = unix.S_IFCHR
		if hdr.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
			return invalid("device %d:%d is out of range", hdr.Devmajor, hdr.Devminor)
		}
		dev = int(unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor)))
	}
	if err := u.create(dir, base, func() error { return unix.Mknodat(dir.fd, base, kind|uint32(hdr.Mode)&0o777, dev) }); err != nil {
		return pathError("mknod", base, err)
	}
	// Not opened for reading or writing: that would act on the device.
	fd, err := openat(dir.fd, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return pathError("open", base, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return pathError("stat", base, err)
	}
	if st.Mode&unix.S_IFMT != kind || kind != unix.S_IFIFO && st.Rdev != uint64(dev) {
		return fmt.Errorf("%s was replaced while it was made: %w", base, errdefs.ErrFailedPrecondition)
	}
	if st.Uid != uint32(hdr.Uid) || st.Gid != uint32(hdr.Gid) {
		if err := unix.Fchownat(fd, "", hdr.Uid, hdr.Gid, unix.AT_EMPTY_PATH); err != nil {
			return pathError("chown", base, err)
		}
	}
	proc := procPath(fd)
	if err := u.xattrs(hdr, func(name string, value []byte) error { return unix.Setxattr(proc, name, value, 0) }); err != nil {
		return err
	}
	if err := unix.Chmod(proc, uint32(hdr.Mode)&0o7777); err != nil {
		return pathError("chmod", base, err)
	}
	atime, mtime := times(hdr)
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, proc, []unix.Timespec{atime, mtime}, 0); err != nil {
		return pathError("set times of", base, err)
	}
	return nil
}
