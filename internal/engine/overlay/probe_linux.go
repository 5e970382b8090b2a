package overlay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/internal/lib/host"
	"github.com/gantryd/gantry/internal/lib/mountx"
)

// probeDir is where mounts are tried, and made for a moment.
const probeDir = "probe"

const probeTime = 10 * time.Second

// facts are what was found out about kernel and file system.
type facts struct {
	index     bool // the option index exists
	userxattr bool // needed
	remap     bool // overlays of id mapped layers work
	userns    bool // we are in a user namespace
	noRemap   bool // tests: do as if remap were false
}

// probe tries overlays on the file system of root. It returns a *host.Lacks
// if there are none.
func probe(root string, inUserNS bool) (f facts, err error) {
	f.userns = inUserNS
	place := filepath.Join(root, probeDir)
	// What a process that died here left behind.
	if err := mountx.CleanupTemp(place, unix.MNT_DETACH); err != nil {
		return f, err
	}
	if err := os.RemoveAll(place); err != nil {
		return f, err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return f, err
	}
	if err := os.MkdirAll(filepath.Join(place, "a", "file"), 0o700); err != nil {
		return f, err
	}
	defer func() {
		if rerr := os.RemoveAll(place); rerr != nil && err == nil {
			err = rerr
		}
	}()
	for _, d := range []string{"b", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(place, d), 0o700); err != nil {
			return f, err
		}
	}
	types, err := knowsTypes(filepath.Join(place, "a"))
	if err != nil {
		return f, err
	}
	if !types {
		return f, &host.Lacks{
			Feature: "overlay",
			Help:    "a file system whose directories tell the types of files (d_type): ext4, btrfs, or xfs made with ftype=1",
			Cause:   fmt.Errorf("the file system of %s does not", root),
		}
	}
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		f.index = true
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeTime)
	defer cancel()
	try := func(check func(string) error, options ...string) error {
		p := escape(place)
		options = append(options, "lowerdir="+p+"/b:"+p+"/a", "upperdir="+p+"/upper", "workdir="+p+"/work")
		return mountx.WithTemp(ctx, place, []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}, check)
	}
	nothing := func(string) error { return nil }
	if f.userns {
		f.userxattr = try(nothing, "userxattr") == nil
	}
	var options []string
	if f.userxattr {
		options = []string{"userxattr"}
	}
	if err := try(nothing, options...); err != nil {
		return f, &host.Lacks{Feature: "overlay", Help: overlayHelp(err, f.userns), Cause: err}
	}
	// Loading the module may have brought the parameter.
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		f.index = true
	}
	const shift = 100000
	ids := fmt.Sprintf("map=0:%d:65536", shift)
	f.remap = try(func(root string) error {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, "file"), &st); err != nil {
			return err
		}
		if st.Uid != shift {
			return errors.New("ids are not mapped")
		}
		return nil
	}, append(options, "uid"+ids, "gid"+ids)...) == nil
	return f, nil
}

func overlayHelp(err error, inUserNS bool) string {
	switch {
	case errors.Is(err, unix.ENODEV):
		return "the kernel module overlay"
	case errors.Is(err, unix.EPERM) && inUserNS:
		return "Linux 5.11 for overlays in a user namespace"
	case errors.Is(err, unix.EPERM):
		return "root's capability CAP_SYS_ADMIN"
	}
	return "a file system that overlays can have their upper directory on; another overlay is none"
}

// knowsTypes tells whether reading a directory, which must not be empty, gives
// the types of its entries.
func knowsTypes(path string) (bool, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	n, err := unix.Getdents(fd, buf)
	if err != nil {
		return false, &os.PathError{Op: "getdents", Path: path, Err: err}
	}
	// struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name.
	for buf = buf[:n]; len(buf) > 19; {
		length := int(binary.NativeEndian.Uint16(buf[16:]))
		if length < 20 || length > len(buf) {
			break
		}
		name, _, _ := strings.Cut(string(buf[19:length]), "\x00")
		if name != "." && name != ".." && buf[18] == unix.DT_UNKNOWN {
			return false, nil
		}
		buf = buf[length:]
	}
	return true, nil
}
