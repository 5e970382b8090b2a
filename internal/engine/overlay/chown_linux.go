package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/engine/snapmeta"
)

const capability = "security.capability"

// chownTree gives everything at root and below the owners that the mapping
// says. What chown(2) takes away, set-id bits and capabilities, is put back;
// capabilities become those of the user namespace whose root is mapped to.
func chownTree(ctx context.Context, root string, ids *mappings) error {
	return snapmeta.WalkTree(ctx, root, func(dir *os.File, name string, st *unix.Stat_t) error {
		uid, gid := ids.toHost(st.Uid, st.Gid)
		if uid == st.Uid && gid == st.Gid {
			return nil
		}
		fail := func(op string, err error) error {
			return &os.PathError{Op: op, Path: filepath.Join(dir.Name(), name), Err: err}
		}
		// Of files that have a link elsewhere the path is not the file.
		at := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name)
		var caps []byte
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			buf := make([]byte, 64)
			n, err := unix.Lgetxattr(at, capability, buf)
			switch {
			case err == nil:
				caps = namespaced(buf[:n], ids)
			case !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP):
				return fail("getxattr", err)
			}
		}
		if err := unix.Fchownat(int(dir.Fd()), name, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fail("chown", err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK && st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
			if err := unix.Fchmodat(int(dir.Fd()), name, st.Mode&0o7777, 0); err != nil {
				return fail("chmod", err)
			}
		}
		if caps != nil {
			if err := unix.Lsetxattr(at, capability, caps, 0); err != nil {
				return fail("setxattr", err)
			}
		}
		return nil
	})
}

// namespaced turns file capabilities of revision 2, which hold on the host,
// into revision 3, which hold in the user namespace with the given root.
func namespaced(caps []byte, ids *mappings) []byte {
	const revision, revision2, revision3 = 0xff000000, 0x02000000, 0x03000000
	if len(caps) != 20 {
		return caps
	}
	magic := binary.LittleEndian.Uint32(caps)
	if magic&revision != revision2 {
		return caps
	}
	root, ok := ids.uids.ToHost(0)
	if !ok {
		return caps
	}
	out := append([]byte(nil), caps...)
	binary.LittleEndian.PutUint32(out, magic&^revision|revision3)
	return binary.LittleEndian.AppendUint32(out, root)
}
