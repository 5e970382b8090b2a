package mountx

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/ownthread"
)

const (
	// tempPrefix is containerd's, so that either daemon cleans up what the
	// other one left.
	tempPrefix = "containerd-mount"

	// busyWait bounds how long an unmount waits for a user that is just
	// leaving; busyStep is the pause between two attempts.
	busyWait = 2 * time.Second
	busyStep = 20 * time.Millisecond

	helperTimeout = 30 * time.Second
)

// Mount mounts m at its Target below root. The target has to exist; links in
// it are followed as if root were the root of the file system.
func (m Mount) Mount(root string) error {
	_, err := m.mount(root)
	return err
}

// All mounts one after another below root, and unmounts those that it mounted
// if one cannot be.
func All(mounts []Mount, root string) error {
	var done []string
	for _, m := range mounts {
		path, err := m.mount(root)
		if err == nil {
			done = append(done, path)
			continue
		}
		for i := len(done) - 1; i >= 0; i-- {
			if uerr := Unmount(done[i], unix.MNT_DETACH); uerr != nil {
				err = errors.Join(err, uerr)
			}
		}
		return err
	}
	return nil
}

// mount does the work of Mount and tells where the mount ended up.
func (m Mount) mount(root string) (path string, err error) {
	wrap := func(err error) error {
		where := root
		if m.Target != "" {
			where = filepath.Join(root, m.Target)
		}
		return classify(fmt.Errorf("mount %s %q at %s: %w", m.Type, m.Source, where, err))
	}
	target, err := openTarget(root, m.Target)
	if err != nil {
		return "", wrap(err)
	}
	defer target.Close()
	path, err = os.Readlink(procPath(target))
	if err != nil {
		return "", wrap(err)
	}
	mounted, err := m.mountAt(target, root, path)
	if err != nil {
		if mounted {
			if uerr := Unmount(path, unix.MNT_DETACH); uerr != nil {
				err = errors.Join(err, uerr)
			}
		}
		return "", wrap(err)
	}
	return path, nil
}

// classify adds what the kernel's refusal means to whoever asked for a mount:
// ErrInvalidArgument for a mount that can never be, ErrFailedPrecondition for
// one whose source or target is not there or busy. The errno stays in the chain.
func classify(err error) error {
	if errdefs.IsInvalidArgument(err) || errdefs.IsNotImplemented(err) || errdefs.IsFailedPrecondition(err) {
		return err
	}
	var class error
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOTBLK), errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.ELOOP):
		class = errdefs.ErrInvalidArgument
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EBUSY), errors.Is(err, unix.EXDEV):
		class = errdefs.ErrFailedPrecondition
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		class = errdefs.ErrPermissionDenied
	default:
		return err
	}
	return fmt.Errorf("%w: %w", err, class)
}

// openTarget opens the place where to mount. The descriptor, not the name, is
// what is mounted on: a link put in place later changes nothing.
func openTarget(root, target string) (*os.File, error) {
	dir, err := os.OpenFile(root, unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	if target == "" {
		return dir, nil
	}
	defer dir.Close()
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for range 64 {
		fd, err := unix.Openat2(int(dir.Fd()), target, how)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue // something above was renamed while the kernel walked
		}
		if err != nil {
			return nil, &os.PathError{Op: "openat2", Path: target, Err: err}
		}
		return os.NewFile(uintptr(fd), filepath.Join(root, target)), nil
	}
	return nil, &os.PathError{Op: "openat2", Path: target, Err: unix.EAGAIN}
}

func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// mountAt mounts on an open directory or file; mounted tells whether there is
// something to undo when it returns an error.
func (m Mount) mountAt(target *os.File, root, path string) (mounted bool, err error) {
	for _, helper := range []string{"fuse", "fuse3"} {
		if fstype, ok := strings.CutPrefix(m.Type, helper+"."); ok {
			return false, m.runHelper("mount."+helper, fstype, path)
		}
	}
	opts := parseOptions(m.Options)
	if m.Type == "bind" || m.Type == "rbind" {
		opts.flags |= unix.MS_BIND
		if m.Type == "rbind" {
			opts.flags |= unix.MS_REC
		}
	}
	idmapped := opts.uidMap != "" || opts.gidMap != ""
	var userns *os.File
	if idmapped {
		if userns, err = userNamespace(opts.uidMap, opts.gidMap); err != nil {
			return false, err
		}
		defer userns.Close()
	}

	switch {
	case idmapped && opts.bind():
		err = bindIDMapped(m.Source, target, opts.flags&unix.MS_REC != 0, userns)
	case m.Type == "overlay":
		err = mountOverlay(m.Source, target, opts, userns)
	case idmapped:
		return false, fmt.Errorf("file system %q has no id mapped mounts here: %w", m.Type, errdefs.ErrNotImplemented)
	case opts.loop:
		var device *os.File
		if device, err = attachLoop(m.Source, opts.flags&unix.MS_RDONLY != 0); err == nil {
			// The device detaches itself when the mount, its last user, ends.
			defer device.Close()
			err = unix.Mount(device.Name(), procPath(target), m.Type, opts.flags, strings.Join(opts.data, ","))
		}
	default:
		data := strings.Join(opts.data, ",")
		if len(data) >= os.Getpagesize() {
			return false, fmt.Errorf("%d bytes of options are more than a page: %w", len(data), errdefs.ErrInvalidArgument)
		}
		err = unix.Mount(m.Source, procPath(target), m.Type, opts.flags, data)
	}
	if err != nil {
		return false, err
	}
	if opts.flags&unix.MS_REMOUNT != 0 {
		return false, nil
	}
	restrict := opts.bind() && opts.flags&perMount != 0
	if !restrict && !opts.recursiveRO && len(opts.propagation) == 0 {
		return true, nil
	}
	// target is the directory below the new mount, so it is opened again.
	top, err := openTarget(root, m.Target)
	if err != nil {
		return true, err
	}
	defer top.Close()
	if restrict {
		if err := remountBind(top, opts.flags); err != nil {
			return true, err
		}
	}
	if opts.recursiveRO {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(int(top.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
			return true, fmt.Errorf("make read-only recursively: %w", err)
		}
	}
	for _, p := range opts.propagation {
		if err := unix.Mount("", procPath(top), "", p, ""); err != nil {
			return true, fmt.Errorf("set propagation: %w", err)
		}
	}
	return true, nil
}

func remountBind(top *os.File, flags uintptr) error {
	flags = flags&perMount | unix.MS_BIND | unix.MS_REMOUNT
	err := unix.Mount("", procPath(top), "", flags, "")
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	// In a user namespace the flags of the source are locked: keep them.
	var st unix.Statfs_t
	if serr := unix.Fstatfs(int(top.Fd()), &st); serr != nil {
		return err
	}
	keep := uintptr(st.Flags) & (unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME)
	if st.Flags&unix.ST_RELATIME != 0 {
		keep |= unix.MS_RELATIME
	}
	return unix.Mount("", procPath(top), "", flags|keep, "")
}

func (m Mount) runHelper(helper, fstype, target string) error {
	ctx, cancel := context.WithTimeout(context.Background(), helperTimeout)
	defer cancel()
	args := []string{m.Source, target}
	for _, o := range m.Options {
		args = append(args, "-o", o)
	}
	args = append(args, "-t", fstype)
	out, err := exec.CommandContext(ctx, helper, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", helper, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// mountOverlay mounts an overlay. Options that do not fit the page that
// mount(2) takes are shortened by mounting from the directory that the layers
// share, on a thread with a working directory of its own.
func mountOverlay(source string, target *os.File, opts parsed, userns *os.File) error {
	data := opts.data
	if userns != nil {
		mapped, release, err := mapLowerDirs(data, userns)
		if err != nil {
			return err
		}
		defer release()
		data = mapped
	}
	if joined := strings.Join(data, ","); len(joined) < os.Getpagesize() {
		return unix.Mount(source, procPath(target), "overlay", opts.flags, joined)
	}
	dir, short := compactOverlay(data)
	joined := strings.Join(short, ",")
	return onOwnThread(dir, func() error {
		if len(joined) < os.Getpagesize() {
			return unix.Mount(source, procPath(target), "overlay", opts.flags, joined)
		}
		return overlayByConfig(source, target, opts.flags, short)
	})
}

// onOwnThread runs fn on a thread whose working directory is dir. The thread
// shares it with no other one, and ends afterwards.
func onOwnThread(dir string, fn func() error) error {
	return ownthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare working directory: %w", err)
		}
		if err := unix.Chdir(dir); err != nil {
			return &os.PathError{Op: "chdir", Path: dir, Err: err}
		}
		return fn()
	})
}

// overlayDirs are the options of an overlay that hold directories.
var overlayDirs = []string{"lowerdir=", "upperdir=", "workdir="}

// compactOverlay returns the deepest directory that all absolute layers share
// and the options with the layers relative to it. Without one it returns "/"
// and the options as they are.
func compactOverlay(options []string) (dir string, short []string) {
	var dirs []string
	for _, o := range options {
		for _, prefix := range overlayDirs {
			if v, ok := strings.CutPrefix(o, prefix); ok {
				dirs = append(dirs, splitLower(v)...)
			}
		}
	}
	dir = commonDir(dirs)
	if dir == "" || dir == "/" {
		return "/", options
	}
	short = make([]string, len(options))
	for i, o := range options {
		short[i] = o
		for _, prefix := range overlayDirs {
			v, ok := strings.CutPrefix(o, prefix)
			if !ok {
				continue
			}
			parts := splitLower(v)
			for j := range parts {
				parts[j] = strings.TrimPrefix(parts[j], dir+"/")
			}
			short[i] = prefix + strings.Join(parts, ":")
		}
	}
	return dir, short
}

// splitLower splits a list of layers at its colons; a colon in a name is
// escaped by a backslash.
func splitLower(s string) []string {
	var parts []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case ':':
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// commonDir returns the deepest directory strictly above all paths, or "" if
// one of them is not absolute or is written with an escape.
func commonDir(paths []string) string {
	if len(paths) == 0 {
		return ""
	}
	common := filepath.Dir(paths[0])
	for _, p := range paths {
		if !filepath.IsAbs(p) || strings.Contains(p, `\`) {
			return ""
		}
		for common != "/" && !strings.HasPrefix(p, common+"/") {
			common = filepath.Dir(common)
		}
	}
	return common
}

// overlayByConfig mounts an overlay option by option, layer by layer, which
// has no limit of a page. It needs Linux 6.8 and runs where relative
// layers are meant to be found.
func overlayByConfig(source string, target *os.File, flags uintptr, options []string) error {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("options are longer than a page, and fsopen: %w", err)
	}
	defer unix.Close(fs)
	set := func(key, value string) error {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return fmt.Errorf("overlay option %s=%s: %w", key, value, err)
		}
		return nil
	}
	if err := set("source", source); err != nil {
		return err
	}
	for _, o := range options {
		key, value, hasValue := strings.Cut(o, "=")
		switch {
		case key == "lowerdir":
			for _, dir := range splitLower(value) {
				if err := set("lowerdir+", dir); err != nil {
					return err
				}
			}
		case hasValue:
			if err := set(key, value); err != nil {
				return err
			}
		default:
			if err := unix.FsconfigSetFlag(fs, key); err != nil {
				return fmt.Errorf("overlay option %s: %w", key, err)
			}
		}
	}
	if flags&unix.MS_RDONLY != 0 {
		if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
			return fmt.Errorf("overlay option ro: %w", err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("create overlay: %w", err)
	}
	attrs := 0
	for flag, attr := range map[uintptr]int{
		unix.MS_RDONLY: unix.MOUNT_ATTR_RDONLY, unix.MS_NOSUID: unix.MOUNT_ATTR_NOSUID, unix.MS_NODEV: unix.MOUNT_ATTR_NODEV,
		unix.MS_NOEXEC: unix.MOUNT_ATTR_NOEXEC, unix.MS_NOATIME: unix.MOUNT_ATTR_NOATIME, unix.MS_NODIRATIME: unix.MOUNT_ATTR_NODIRATIME,
	} {
		if flags&flag != 0 {
			attrs |= attr
		}
	}
	tree, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return fmt.Errorf("fsmount overlay: %w", err)
	}
	defer unix.Close(tree)
	return moveMount(tree, target)
}

func moveMount(tree int, target *os.File) error {
	err := unix.MoveMount(tree, "", int(target.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// bindIDMapped binds source at target with the ids mapped as in userns.
func bindIDMapped(source string, target *os.File, recursive bool, userns *os.File) error {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	setFlags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
		setFlags |= unix.AT_RECURSIVE
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, flags)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: source, Err: err}
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())}
	if err := unix.MountSetattr(tree, "", setFlags, &attr); err != nil {
		if errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("the file system of %s has no id mapped mounts: %w", source, errdefs.ErrNotImplemented)
		}
		return fmt.Errorf("map ids of %s: %w", source, err)
	}
	return moveMount(tree, target)
}

// mapLowerDirs binds every lower layer with its ids mapped to a temporary
// place and returns the options that name those. The overlay keeps clones of
// them, so release may be called as soon as it is mounted.
func mapLowerDirs(options []string, userns *os.File) (mapped []string, release func(), err error) {
	temp, err := os.MkdirTemp("", "ovl-idmapped")
	if err != nil {
		return nil, nil, err
	}
	var places []string
	release = func() {
		for _, p := range places {
			if Unmount(p, unix.MNT_DETACH) == nil {
				os.Remove(p)
			}
		}
		os.Remove(temp)
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	mapped = append(mapped, options...)
	for i, o := range mapped {
		v, ok := strings.CutPrefix(o, "lowerdir=")
		if !ok {
			continue
		}
		layers := splitLower(v)
		for j, layer := range layers {
			place := filepath.Join(temp, fmt.Sprint(j))
			if err := os.Mkdir(place, 0o700); err != nil {
				return nil, nil, err
			}
			places = append(places, place)
			dir, err := os.OpenFile(place, unix.O_PATH, 0)
			if err != nil {
				return nil, nil, err
			}
			err = bindIDMapped(unescapeLower(layer), dir, false, userns)
			dir.Close()
			if err != nil {
				return nil, nil, err
			}
			layers[j] = place
		}
		mapped[i] = "lowerdir=" + strings.Join(layers, ":")
	}
	return mapped, release, nil
}

func unescapeLower(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// userNamespace makes a user namespace with the given mappings. It lives as
// long as the file that is returned: the child that was needed to make it
// never runs an instruction of its program.
func userNamespace(uidMap, gidMap string) (*os.File, error) {
	uids, err := sysProcIDMap(uidMap)
	if err != nil {
		return nil, err
	}
	gids, err := sysProcIDMap(gidMap)
	if err != nil {
		return nil, err
	}
	// The tracer is the thread that starts the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	child, err := os.StartProcess("/proc/self/exe", []string{"userns"}, &os.ProcAttr{
		Sys: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWUSER, UidMappings: uids, GidMappings: gids,
			Ptrace: true, Pdeathsig: unix.SIGKILL,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("user namespace %s %s: %w", uidMap, gidMap, err)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", child.Pid))
	_ = child.Kill()
	// A process that reaps all its children may have been faster.
	if _, werr := child.Wait(); werr != nil && !errors.Is(werr, unix.ECHILD) && err == nil {
		ns.Close()
		return nil, fmt.Errorf("user namespace %s %s: %w", uidMap, gidMap, werr)
	}
	return ns, err
}

func sysProcIDMap(s string) ([]syscall.SysProcIDMap, error) {
	if s == "" {
		return nil, fmt.Errorf("id mapped mount: uidmap and gidmap belong together: %w", errdefs.ErrInvalidArgument)
	}
	maps, err := ParseIDMap(s)
	if err != nil {
		return nil, err
	}
	out := make([]syscall.SysProcIDMap, len(maps))
	for i, m := range maps {
		out[i] = syscall.SysProcIDMap{ContainerID: m.Container, HostID: m.Host, Size: m.Size}
	}
	return out, nil
}

// attachLoop gives the file a loop device that detaches itself after its last
// user.
func attachLoop(backing string, readOnly bool) (*os.File, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	file, err := os.OpenFile(backing, mode, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range 64 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		device, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), mode, 0)
		if err != nil {
			return nil, err
		}
		flags := uint32(unix.LO_FLAGS_AUTOCLEAR)
		if readOnly {
			flags |= unix.LO_FLAGS_READ_ONLY
		}
		config := unix.LoopConfig{Fd: uint32(file.Fd()), Info: unix.LoopInfo64{Flags: flags}}
		copy(config.Info.File_name[:len(config.Info.File_name)-1], backing)
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		if err == nil {
			return device, nil
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) { // before Linux 5.8
			if err = unix.IoctlSetInt(int(device.Fd()), unix.LOOP_SET_FD, int(file.Fd())); err == nil {
				if err = unix.IoctlLoopSetStatus64(int(device.Fd()), &config.Info); err == nil {
					return device, nil
				}
				_ = unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0)
			}
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attach loop device: %w", err)
		}
		// Somebody else took it between the two calls.
	}
	return nil, fmt.Errorf("attach loop device: %w", unix.EBUSY)
}

// Unmount takes the topmost mount off path. It waits two seconds at most for
// one that is busy, and is content with a path that is missing or not a mount
// point. Flags are those of umount2(2); links are never followed.
func Unmount(path string, flags int) error {
	_, err := unmount(path, flags)
	return err
}

func unmount(path string, flags int) (was bool, err error) {
	deadline := time.Now().Add(busyWait)
	for {
		err := unix.Unmount(path, flags|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR):
			return false, nil
		case !errors.Is(err, unix.EBUSY) || flags&(unix.MNT_DETACH|unix.MNT_EXPIRE) != 0 || time.Now().After(deadline):
			return false, &os.PathError{Op: "unmount", Path: path, Err: err}
		}
		time.Sleep(busyStep)
	}
}

// UnmountAll unmounts until nothing is mounted at path any more.
func UnmountAll(path string, flags int) error {
	for {
		was, err := unmount(path, flags)
		if err != nil || !was {
			return err
		}
	}
}

// UnmountRecursive unmounts all that is mounted at or below path, the deepest
// first. It goes on after an error and returns the first.
func UnmountRecursive(path string, flags int) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if real, err := filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
		abs = filepath.Join(real, filepath.Base(abs))
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(abs))
	if err != nil {
		return fmt.Errorf("unmount below %s: %w", path, err)
	}
	// Later mounts stand below or on top of earlier ones.
	var first error
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := Unmount(mounts[i].Mountpoint, flags); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// WithTemp mounts everything at a fresh directory below parentDir (the
// system's temporary directory if empty), calls fn and unmounts and removes it
// again, whatever fn returned. If somebody still uses the mount it is detached.
// A cancelled context stops it before fn is called.
func WithTemp(ctx context.Context, parentDir string, mounts []Mount, fn func(root string) error) (err error) {
	root, err := os.MkdirTemp(parentDir, tempPrefix)
	if err != nil {
		return err
	}
	defer func() {
		uerr := UnmountAll(root, 0)
		if uerr != nil {
			uerr = UnmountAll(root, unix.MNT_DETACH)
		}
		if uerr == nil {
			// Remove, not RemoveAll: nothing that was mounted can be hit.
			uerr = os.Remove(root)
		}
		if uerr != nil && err == nil {
			err = uerr
		}
	}()
	if err := All(mounts, root); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return fn(root)
}

// CleanupTemp unmounts and removes what calls of WithTemp below dir left when
// their process died. It goes on after an error and returns them joined.
func CleanupTemp(dir string, flags int) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	var errs []error
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if err := UnmountRecursive(path, flags); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := os.Remove(path); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
