package daemontest

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Leftovers lists what exists of the daemon on the host beside its files:
// processes, the running daemon itself not among them, mounts, bundles of tasks
// and cgroups. Sorted, a line each.
func (d *Daemon) Leftovers() []string {
	var left []string
	for pid, args := range d.Processes() {
		left = append(left, fmt.Sprintf("process %d: %s", pid, args))
	}
	for _, m := range d.mounts() {
		left = append(left, "mount "+m)
	}
	bundles, _ := filepath.Glob(d.Dir + "/state/io.containerd.runtime.v2.task/*/*")
	pods, _ := filepath.Glob(d.Dir + "/state/io.containerd.sandbox.controller.v1.shim/*/*")
	for _, b := range append(bundles, pods...) {
		left = append(left, "bundle "+b)
	}
	for _, c := range d.cgroups() {
		// The parent with the mark is shared by the containers in it, so none
		// of them removes it; containerd leaves it too.
		if filepath.Base(c) != d.Mark {
			left = append(left, "cgroup "+c)
		}
	}
	slices.Sort(left)
	return left
}

// Processes are the command lines, by pid, that name the daemon's directory or
// mark: its shims, and what they run. The running daemon is not among them.
func (d *Daemon) Processes() map[int]string {
	out := map[int]string{}
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if err != nil || !bytes.Contains(b, []byte(d.Dir+"/")) && !(d.Mark != "" && bytes.Contains(b, []byte(d.Mark))) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(e)))
		if err == nil && pid != os.Getpid() && pid != d.Pid() {
			out[pid] = strings.ReplaceAll(string(b), "\x00", " ")
		}
	}
	return out
}

// mounts are the lines of mountinfo that name the daemon's directory.
func (d *Daemon) mounts() []string {
	var out []string
	b, _ := os.ReadFile("/proc/self/mountinfo")
	for _, l := range strings.Split(string(b), "\n") {
		if strings.Contains(l, d.Dir+"/") {
			out = append(out, l)
		}
	}
	return out
}

// cgroups are those that have the mark in their path, in all hierarchies,
// parents first.
func (d *Daemon) cgroups() []string {
	var out []string
	if d.Mark == "" {
		return nil
	}
	filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		// A tmpfs may be in place of a hierarchy, to hide it from a runtime.
		var st unix.Statfs_t
		if path == "/sys/fs/cgroup/unified" && unix.Statfs(path, &st) == nil && st.Type != unix.CGROUP2_SUPER_MAGIC {
			return fs.SkipDir
		}
		if err == nil && e.IsDir() && strings.Contains(path, d.Mark) {
			out = append(out, path)
		}
		return nil
	})
	return out
}

// Sweep removes all of the stopped daemon that Leftovers lists, but for its
// files, and the cgroups with the mark themselves.
func (d *Daemon) Sweep() {
	for pid := range d.Processes() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, c := range d.cgroups() {
		b, _ := os.ReadFile(c + "/cgroup.procs")
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 && pid != os.Getpid() {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
	for range 20 { // one mount may be on top of another
		mounts := d.mounts()
		if len(mounts) == 0 {
			break
		}
		for _, l := range mounts {
			if f := strings.Fields(l); len(f) > 4 {
				syscall.Unmount(f[4], syscall.MNT_DETACH)
			}
		}
	}
	for range 100 {
		cgroups := d.cgroups()
		if len(cgroups) == 0 {
			break
		}
		for _, c := range slices.Backward(cgroups) {
			syscall.Rmdir(c)
		}
		time.Sleep(10 * time.Millisecond) // for the processes to end
	}
}
