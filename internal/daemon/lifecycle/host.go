package lifecycle

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Dirs are the directories that the daemon owns.
type Dirs struct {
	Root  string // made 0700: images and snapshots are nobody else's to read
	State string // made 0711: shims' sockets and FIFOs are reached through it
	Temp  string // made 0700 and exported as TMPDIR, TEMP and TMP; "" leaves them alone
}

// Prepare makes the directories and forces their modes, also of existing ones
// (contract 2.3.2).
func (d Dirs) Prepare() error {
	for _, dir := range []struct {
		name, path string
		mode       fs.FileMode
	}{{"root", d.Root, 0o700}, {"state", d.State, 0o711}, {"temp", d.Temp, 0o700}} {
		if dir.path == "" && dir.name == "temp" {
			continue
		}
		if err := os.MkdirAll(dir.path, dir.mode); err != nil {
			return fmt.Errorf("make %s directory: %w", dir.name, err)
		}
		if err := os.Chmod(dir.path, dir.mode); err != nil {
			return fmt.Errorf("make %s directory: %w", dir.name, err)
		}
	}
	if d.Temp != "" {
		for _, name := range []string{"TMPDIR", "TEMP", "TMP"} {
			if err := os.Setenv(name, d.Temp); err != nil {
				return fmt.Errorf("set %s: %w", name, err)
			}
		}
	}
	return nil
}

// LockName is the file in the root directory that says who uses it.
const LockName = "gantry.lock"

// Lock is a root directory that belongs to this process. The kernel gives it
// back when the process ends, however it ends.
type Lock struct{ f *os.File }

// orphaned is how long a lock is waited for whose owner is dead: a process that
// it was just starting when it was killed has the file until its exec.
const orphaned = 5 * time.Second

// LockRoot takes the root directory. If another process has it the error is
// ErrUnavailable and names that process and the directory; it is not waited for.
// The file holds the owner's pid and stays when the lock is released.
func LockRoot(root string) (*Lock, error) {
	path := filepath.Join(root, LockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock root %s: %w", root, err)
	}
	for deadline := time.Now().Add(orphaned); ; time.Sleep(2 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock root %s: %w", root, err)
		}
		owner := "another process"
		text := make([]byte, 32)
		n, _ := f.ReadAt(text, 0)
		if pid, err := strconv.Atoi(strings.TrimSpace(string(text[:n]))); err == nil && pid > 0 {
			if unix.Kill(pid, 0) == unix.ESRCH && time.Now().Before(deadline) {
				continue
			}
			owner = fmt.Sprintf("process %d", pid)
		}
		f.Close()
		return nil, fmt.Errorf("lock root %s: it is in use by %s; stop that daemon or choose another --root: %w", root, owner, errdefs.ErrUnavailable)
	}
	if err := f.Truncate(0); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock root %s: %w", root, err)
	}
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock root %s: %w", root, err)
	}
	return &Lock{f}, nil
}

// Close gives the root directory back.
func (l *Lock) Close() error { return l.f.Close() }

// OOMScoreFile is the daemon's own.
const OOMScoreFile = "/proc/self/oom_score_adj"

// SetOOMScore sets oom_score_adj, 0 leaves it alone, and tells what it is now.
// Where the process may not go as low as adj the current value stays and the
// error is nil: the daemon runs without the protection rather than not at all
// (contract 2.3.8).
func SetOOMScore(file string, adj int) (now int, err error) {
	data, err := readSmall(file)
	if err != nil {
		return 0, fmt.Errorf("set oom score: %w", err)
	}
	now, err = strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0, fmt.Errorf("set oom score: read %s: %w", file, err)
	}
	adj = max(-1000, min(1000, adj))
	if adj == 0 || adj == now {
		return now, nil
	}
	err = os.WriteFile(file, []byte(strconv.Itoa(adj)), 0o644)
	switch {
	case err == nil:
		return adj, nil
	case adj < now && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)):
		return now, nil
	}
	return now, fmt.Errorf("set oom score to %d: %w", adj, err)
}

// CgroupMount is where cgroup file systems are mounted.
const CgroupMount = "/sys/fs/cgroup"

// JoinCgroup makes the group at path if it is missing and moves this process
// into it: in the unified hierarchy, or in each controller's of version 1. An
// empty path does nothing (contract 2.3.9). The path cannot lead out of mount.
func JoinCgroup(mount, path string) error {
	if path == "" {
		return nil
	}
	rel := filepath.Join("/", path)
	if rel == "/" {
		return fmt.Errorf("join cgroup %q: the root group is no group of its own: %w", path, errdefs.ErrInvalidArgument)
	}
	pid := []byte(strconv.Itoa(os.Getpid()))
	join := func(hierarchy string) error {
		dir := filepath.Join(hierarchy, rel)
		if err := makeGroup(hierarchy, rel); err != nil {
			return fmt.Errorf("join cgroup %s: %w", path, err)
		}
		f, err := os.OpenFile(filepath.Join(dir, "cgroup.procs"), os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("join cgroup %s: %w", path, err)
		}
		_, err = f.Write(pid)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fmt.Errorf("join cgroup %s: %w", path, err)
		}
		return nil
	}
	if _, err := os.Stat(filepath.Join(mount, "cgroup.controllers")); err == nil {
		return join(mount)
	}
	entries, err := os.ReadDir(mount)
	if err != nil {
		return fmt.Errorf("join cgroup %s: %w", path, err)
	}
	joined := 0
	for _, e := range entries {
		// Links such as cpu to cpu,cpuacct name a hierarchy a second time.
		if !e.IsDir() {
			continue
		}
		h := filepath.Join(mount, e.Name())
		if _, err := os.Stat(filepath.Join(h, "cgroup.procs")); err != nil {
			continue
		}
		if err := join(h); err != nil {
			return err
		}
		joined++
	}
	if joined == 0 {
		return fmt.Errorf("join cgroup %s: no cgroup file system at %s: %w", path, mount, errdefs.ErrNotFound)
	}
	return nil
}

// makeGroup makes the folders of rel one by one. In the cpuset hierarchy of
// version 1 a new group has no CPU and takes no process before it gets some.
func makeGroup(hierarchy, rel string) error {
	dir := hierarchy
	for _, step := range strings.Split(strings.Trim(rel, "/"), "/") {
		parent := dir
		dir = filepath.Join(dir, step)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
			have, err := readSmall(filepath.Join(dir, name))
			if err != nil || len(bytes.TrimSpace(have)) > 0 {
				continue // another hierarchy, or already set
			}
			if _, err := os.Stat(filepath.Join(dir, "cgroup.controllers")); err == nil {
				continue // version 2 inherits by itself
			}
			from, err := readSmall(filepath.Join(parent, name))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, name), bytes.TrimSpace(from), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// readSmall reads a file of the kernel's, at most 64 KiB.
func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 64<<10))
}

// CleanTempMounts unmounts what a daemon that was killed left mounted below
// dir, and removes the empty folders (contract 13.40). Nothing that is not
// empty is deleted: it may be somebody's data. A missing dir is fine.
func CleanTempMounts(dir string) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("clean %s: %w", dir, err)
	}
	defer f.Close()
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	} else if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var mounts []string
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) < 5 {
			continue
		}
		if p := unescape(fields[4]); strings.HasPrefix(p, dir+"/") {
			mounts = append(mounts, p)
		}
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("clean %s: read mounts: %w", dir, err)
	}
	var errs []error
	for i := len(mounts) - 1; i >= 0; i-- { // later mounts lie on top of earlier ones
		if err := unix.Unmount(mounts[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", mounts[i], err))
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("clean %s: %w", dir, errors.Join(append(errs, err)...))
	}
	for _, e := range slices.Backward(entries) {
		if err := unix.Rmdir(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove %s: %w", filepath.Join(dir, e.Name()), err))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("clean %s: %w", dir, errors.Join(errs...))
	}
	return nil
}

// unescape undoes mountinfo's octal escapes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
