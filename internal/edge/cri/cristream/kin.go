//go:build linux

package cristream

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// kin is how the processes that a command has started are told from others: by
// descent, by session and by the streams that are the command's own, and only
// within the command's cgroup, so that a number which is used again harms nobody.
type kin struct {
	cgroup   string
	known    map[int]uint64 // that belong to it, with the times they started
	sessions map[int]bool   // theirs; nil if the command has none of its own
	streams  map[stream]bool
}

// ticks is now as processes' start times are told.
func ticks() uint64 {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &t) != nil {
		return 0
	}
	return uint64(t.Nano()) / 1e7
}

// kinOf is called when the process has just been started; nil if it has ended,
// or is older than since: a runtime whose containers are virtual machines gives
// the number of the machine.
func kinOf(pid int, since uint64) *kin {
	group, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil || pid <= 1 {
		return nil
	}
	k := &kin{cgroup: string(group), known: map[int]uint64{}}
	p, ok := k.look(pid)
	if !ok || p.start < since {
		return nil
	}
	k.known[pid] = p.start
	if p.session == pid {
		k.sessions = map[int]bool{pid: true}
	}
	k.streams = streamsOf(pid)
	return k
}

// stream is a pipe or a terminal.
type stream struct{ dev, ino uint64 }

// streamsOf are the pipes and terminals that are a process's standard streams.
func streamsOf(pid int) map[stream]bool {
	all := map[stream]bool{}
	for _, fd := range []string{"0", "1", "2"} {
		var st unix.Stat_t
		if unix.Stat("/proc/"+strconv.Itoa(pid)+"/fd/"+fd, &st) != nil {
			continue
		}
		// 136 and those that follow are the numbers of pseudo terminals.
		if major := unix.Major(st.Rdev); st.Mode&unix.S_IFMT == unix.S_IFIFO || st.Mode&unix.S_IFMT == unix.S_IFCHR && major >= 136 && major <= 143 {
			all[stream{st.Dev, st.Ino}] = true
		}
	}
	return all
}

// holds reports whether a process has one of the command's streams.
func (k *kin) holds(pid int) bool {
	if len(k.streams) == 0 {
		return false
	}
	for s := range streamsOf(pid) {
		if k.streams[s] {
			return true
		}
	}
	return false
}

// passes bounds how often the processes are looked at: each pass stops those
// it finds, so only what was started during a pass is left to the next.
const passes = 10

// stop finds and stops all of them.
func (k *kin) stop() {
	if k == nil {
		return
	}
	for range passes {
		if k.grow() == 0 {
			return
		}
	}
}

// kill finds what is new and kills all of them.
func (k *kin) kill() {
	if k == nil {
		return
	}
	k.stop()
	for pid, start := range k.known {
		k.signal(pid, start, unix.SIGKILL)
	}
}

// process is what is looked at of one.
type process struct {
	parent, session int
	start           uint64 // in clock ticks since the system's start
}

// grow adds the processes that belong to those known, stopped, and returns
// how many there were.
func (k *kin) grow() int {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	all := map[int]process{}
	for _, d := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
			if p, ok := k.look(pid); ok {
				all[pid] = p
			}
		}
	}
	added := 0
	for more := true; more; {
		more = false
		for pid, p := range all {
			_, child := k.known[p.parent]
			if _, known := k.known[pid]; known || !child && !k.sessions[p.session] && !k.holds(pid) {
				continue
			}
			k.known[pid] = p.start
			if k.sessions != nil {
				k.sessions[p.session] = true
			}
			k.signal(pid, p.start, unix.SIGSTOP)
			added, more = added+1, true
		}
	}
	return added
}

// look reads a process of the same cgroup, or of one below it.
func (k *kin) look(pid int) (process, bool) {
	dir := "/proc/" + strconv.Itoa(pid)
	group, err := os.ReadFile(dir + "/cgroup")
	if err != nil || !within(string(group), k.cgroup) {
		return process{}, false
	}
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return process{}, false
	}
	// The name in brackets may contain anything. Of one that has ended, the
	// kernel does not tell the cgroup any more.
	f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(f) < 20 || f[0][0] == 'Z' || f[0][0] == 'X' {
		return process{}, false
	}
	var p process
	var e [3]error
	p.parent, e[0] = strconv.Atoi(string(f[1]))
	p.session, e[1] = strconv.Atoi(string(f[3]))
	p.start, e[2] = strconv.ParseUint(string(f[19]), 10, 64)
	return p, e[0] == nil && e[1] == nil && e[2] == nil
}

// within reports whether each hierarchy's path is that of group or below it.
func within(group, of string) bool {
	a, b := strings.Split(group, "\n"), strings.Split(of, "\n")
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] && !strings.HasPrefix(a[i], strings.TrimSuffix(b[i], "/")+"/") {
			return false
		}
	}
	return true
}

// signal signals a process if it is still the one that started at start.
func (k *kin) signal(pid int, start uint64, sig unix.Signal) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if p, ok := k.look(pid); ok && p.start == start {
		unix.PidfdSendSignal(fd, sig, nil, 0)
	}
}
