//go:build linux

// Package cgroup reads what a container's control group knows: its processes,
// its statistics in containerd's message types and its out-of-memory kills, for
// both versions of cgroups. It never creates or removes a group: that is the
// runtime's business.
package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/internal/lib/reaper"
)

const (
	unifiedRoot = "/sys/fs/cgroup"
	loadTries   = 6
	loadPause   = 2 * time.Millisecond
)

// Group is the control group of one container.
type Group struct {
	v1      cgroup1.Cgroup
	own     []cgroup1.Name // controllers in which it is not the root
	memory1 string         // directory of the v1 memory group
	v2      *cgroup2.Manager
	dir2    string // directory of the v2 group
}

// Load finds the group that the process pid is in.
func Load(pid int) (*Group, error) {
	if cgroups.Mode() == cgroups.Unified {
		group, err := cgroup2.PidGroupPath(pid)
		if err != nil {
			return nil, fmt.Errorf("cgroup of process %d: %w", pid, err)
		}
		if group == "/" || group == "" {
			return nil, fmt.Errorf("process %d is in no cgroup of its own: %w", pid, errdefs.ErrNotFound)
		}
		return loadUnified(unifiedRoot, group)
	}
	cg, path, err := loadLegacy(pid)
	if err != nil {
		return nil, fmt.Errorf("cgroup of process %d: %w", pid, err)
	}
	g := &Group{v1: cg}
	for _, s := range cg.Subsystems() {
		p, err := path(s.Name())
		if err != nil || p == "/" || p == "" {
			continue
		}
		g.own = append(g.own, s.Name())
		if d, ok := s.(interface{ Path(string) string }); ok && s.Name() == cgroup1.Memory {
			g.memory1 = d.Path(p)
		}
	}
	if len(g.own) == 0 {
		return nil, fmt.Errorf("process %d is in no cgroup of its own: %w", pid, errdefs.ErrNotFound)
	}
	return g, nil
}

// loadLegacy finds the v1 group. The usual places are tried first, without a
// look at the mount table: lines of it can be missed for as long as others
// mount and unmount.
func loadLegacy(pid int) (cgroup1.Cgroup, cgroup1.Path, error) {
	paths, err := cgroup1.ParseCgroupFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return nil, nil, err
	}
	path := func(name cgroup1.Name) (string, error) {
		for _, key := range []string{string(name), "name=" + string(name)} {
			if p, ok := paths[key]; ok {
				return p, nil
			}
		}
		return "", cgroup1.ErrControllerNotActive
	}
	if cg, err := cgroup1.Load(path, cgroup1.WithHierarchy(usualHierarchy)); err == nil {
		return cg, path, nil
	}
	var cg cgroup1.Cgroup
	for range loadTries {
		path := cgroup1.PidPath(pid)
		if cg, err = cgroup1.Load(path); err == nil {
			return cg, path, nil
		}
		time.Sleep(loadPause)
	}
	return nil, nil, err
}

// usualHierarchy lists the v1 controllers that are mounted below
// /sys/fs/cgroup, each in the directory of its name.
func usualHierarchy() ([]cgroup1.Subsystem, error) {
	known := []cgroup1.Subsystem{
		cgroup1.NewNamed(unifiedRoot, "systemd"), cgroup1.NewFreezer(unifiedRoot), cgroup1.NewPids(unifiedRoot),
		cgroup1.NewCpuset(unifiedRoot), cgroup1.NewCpu(unifiedRoot), cgroup1.NewCpuacct(unifiedRoot),
		cgroup1.NewMemory(unifiedRoot), cgroup1.NewBlkio(unifiedRoot), cgroup1.NewRdma(unifiedRoot),
		cgroup1.NewNetCls(unifiedRoot), cgroup1.NewNetPrio(unifiedRoot), cgroup1.NewPerfEvent(unifiedRoot),
		cgroup1.NewDevices(unifiedRoot),
	}
	if h, err := cgroup1.NewHugetlb(unifiedRoot); err == nil { // it fails where huge pages are unknown
		known = append(known, h)
	}
	var found []cgroup1.Subsystem
	for _, s := range known {
		var st unix.Statfs_t
		if err := unix.Statfs(filepath.Join(unifiedRoot, string(s.Name())), &st); err == nil && st.Type == unix.CGROUP_SUPER_MAGIC {
			found = append(found, s)
		}
	}
	if len(found) == 0 {
		return nil, cgroup1.ErrMountPointNotExist
	}
	return found, nil
}

func loadUnified(root, group string) (*Group, error) {
	m, err := cgroup2.Load(group, cgroup2.WithMountpoint(root))
	if err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", group, err)
	}
	return &Group{v2: m, dir2: filepath.Join(root, group)}, nil
}

// Metrics returns io.containerd.cgroups.v1.Metrics or v2.Metrics, under its
// bare name as type URL (contract 5.3.6).
func (g *Group) Metrics() (*anypb.Any, error) {
	var m proto.Message
	var err error
	if g.v1 != nil {
		m, err = g.v1.Stat(cgroup1.IgnoreNotExist)
	} else {
		m, err = g.v2.Stat()
	}
	if err != nil {
		return nil, fmt.Errorf("read cgroup statistics: %w", err)
	}
	data, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: data}, nil
}

// Pids returns all processes of the group and the groups below it, in no
// particular order, and none if the group is gone.
func (g *Group) Pids() ([]int, error) {
	var pids []int
	if g.v1 != nil {
		// Every hierarchy holds the same processes.
		var procs []cgroup1.Process
		var err error
		for _, name := range g.own {
			if procs, err = g.v1.Processes(name, true); err == nil {
				break
			}
		}
		if err != nil && !gone(err) {
			return nil, err
		}
		for _, p := range procs {
			pids = append(pids, p.Pid)
		}
		return pids, nil
	}
	procs, err := g.v2.Procs(true)
	if err != nil && !gone(err) {
		return nil, err
	}
	for _, p := range procs {
		pids = append(pids, int(p))
	}
	return pids, nil
}

func gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, cgroup1.ErrCgroupDeleted)
}

// SignalAll sends sig to every process of the group. A kill is repeated until
// none is left, for one second at most; it then reports how many there are. A
// group that the caller is in itself is not signalled: it is no container's.
func (g *Group) SignalAll(sig unix.Signal) error {
	pids, err := g.Pids()
	if err != nil {
		return fmt.Errorf("signal all processes: %w", err)
	}
	if slices.Contains(pids, os.Getpid()) {
		return fmt.Errorf("signal all processes: the group is the shim's own: %w", errdefs.ErrFailedPrecondition)
	}
	if sig == unix.SIGKILL && g.dir2 != "" {
		if err := os.WriteFile(filepath.Join(g.dir2, "cgroup.kill"), []byte("1"), 0); err == nil {
			return nil
		}
	}
	deadline := time.Now().Add(time.Second)
	for {
		pids, err := g.Pids()
		if err != nil {
			return fmt.Errorf("signal all processes: %w", err)
		}
		left := 0
		for _, pid := range pids {
			if err := reaper.Kill(pid, sig); err == nil && !zombie(pid) {
				left++
			}
		}
		if sig != unix.SIGKILL || left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes survive a kill: %w", left, errdefs.ErrUnavailable)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func zombie(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return true
	}
	i := bytes.LastIndexByte(b, ')')
	return i >= 0 && i+2 < len(b) && (b[i+2] == 'Z' || b[i+2] == 'X')
}

// OOMWatch reports kills by the out-of-memory killer.
type OOMWatch struct {
	file  *os.File
	conn  syscall.RawConn
	check func(buf []byte) bool
	fn    func()
	mu    sync.Mutex // serialises reading, check and fn
	done  chan struct{}
}

// WatchOOM calls fn whenever the kernel killed a process of the group for lack
// of memory, until the watch is closed. It costs no wake-up while nothing
// happens.
func (g *Group) WatchOOM(fn func()) (*OOMWatch, error) {
	w := &OOMWatch{fn: fn, done: make(chan struct{})}
	var fd int
	if g.v1 != nil {
		if g.memory1 == "" {
			return nil, fmt.Errorf("watch for lack of memory: no memory controller: %w", errdefs.ErrNotImplemented)
		}
		efd, err := g.v1.OOMEventFD()
		if err != nil {
			return nil, fmt.Errorf("watch for lack of memory: %w", err)
		}
		fd = int(efd)
		// The event is also raised when the group is removed.
		w.check = func(buf []byte) bool {
			if len(buf) < 8 {
				return false
			}
			_, err := os.Stat(g.memory1)
			return err == nil
		}
	} else {
		events := filepath.Join(g.dir2, "memory.events")
		last, err := oomKills(events)
		if err != nil {
			return nil, fmt.Errorf("watch for lack of memory: %w", err)
		}
		if fd, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK); err != nil {
			return nil, os.NewSyscallError("inotify_init1", err)
		}
		if _, err := unix.InotifyAddWatch(fd, events, unix.IN_MODIFY); err != nil {
			unix.Close(fd)
			return nil, &os.PathError{Op: "inotify_add_watch", Path: events, Err: err}
		}
		w.check = func([]byte) bool {
			n, err := oomKills(events)
			if err != nil || n <= last {
				return false
			}
			last = n
			return true
		}
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	w.file = os.NewFile(uintptr(fd), "oom")
	conn, err := w.file.SyscallConn()
	if err != nil {
		w.file.Close()
		return nil, err
	}
	w.conn = conn
	go w.run()
	return w, nil
}

func (w *OOMWatch) run() {
	defer close(w.done)
	for {
		var rerr error
		err := w.conn.Read(func(fd uintptr) bool {
			rerr = w.take(int(fd))
			return !errors.Is(rerr, unix.EAGAIN)
		})
		if err != nil || rerr != nil && !errors.Is(rerr, unix.EINTR) {
			return
		}
	}
}

// take reads a notification and reports it. Nobody can see it read and not yet
// reported.
func (w *OOMWatch) take(fd int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var buf [512]byte
	n, err := unix.Read(fd, buf[:])
	if w.check(buf[:max(n, 0)]) {
		w.fn()
	}
	return err
}

// Check reports a kill that has happened already but was not noticed yet. It
// is called before an exit is published, so that the cause comes before it.
func (w *OOMWatch) Check() {
	_ = w.conn.Control(func(fd uintptr) { _ = w.take(int(fd)) })
}

// Close ends the watch; fn is not called any more when it returns.
func (w *OOMWatch) Close() error {
	err := w.file.Close()
	<-w.done
	return err
}

// oomKills reads how often the killer struck from a memory.events file.
func oomKills(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		if v, ok := strings.CutPrefix(s.Text(), "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 10, 64)
		}
	}
	return 0, s.Err()
}
