package cristats

import (
	"bytes"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

const (
	// maxGroups and maxDepth bound how far groups below a container's are followed.
	maxGroups, maxDepth = 1000, 8
	// maxLinks is how many open files of a container are looked at.
	maxLinks = 10_000
)

// pids are the processes of a group and of those below it.
func (g *group) members(r *reader) []uint32 {
	dir := g.pids
	for _, d := range []string{g.memory, g.cpuacct} {
		if dir == "" {
			dir = d
		}
	}
	if dir == "" {
		return nil
	}
	var all []uint32
	left := maxGroups
	var walk func(dir string, depth int)
	walk = func(dir string, depth int) {
		if left--; left < 0 {
			return
		}
		b, err := r.read(dir + "/cgroup.procs")
		if err != nil {
			return
		}
		for line := range bytes.Lines(b) {
			if v := number(line); v.ok {
				all = append(all, uint32(v.n))
			}
		}
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil || st.Nlink == 2 || depth == 0 {
			return // two links: no group below
		}
		below, err := os.ReadDir(dir)
		if err != nil {
			return
		}
		for _, d := range below {
			if d.IsDir() {
				walk(dir+"/"+d.Name(), depth-1)
			}
		}
	}
	walk(dir, maxDepth)
	return all
}

// processes counts the processes of a pod: those of its group, or of its pause
// process and its containers.
func (s *Service) processes(p *cristate.Pod, running []*cristate.Container) uint64 {
	r, done := s.reader()
	defer done()
	if parent := p.Meta().Config.GetLinux().GetCgroupParent(); parent != "" {
		if g, err := s.tree.ofParent(parent); err == nil {
			return uint64(len(g.members(r)))
		}
	}
	n := 0
	add := func(pid uint32, id string) {
		if g, err := s.tree.ofProcess(r, pid, id); err == nil {
			n += len(g.members(r))
		}
	}
	if pid := p.Status().Pid; pid != 0 {
		add(pid, p.ID())
	}
	for _, c := range running {
		add(c.Status().Pid, c.ID())
	}
	return uint64(n)
}

// descriptors counts open files, and the sockets among them. Of a container
// with very many it counts the first.
func (t tree) descriptors(pids []uint32) (files, sockets uint64) {
	var buf [64]byte
	left := maxLinks
	for _, pid := range pids {
		dir := t.proc + "/" + strconv.FormatUint(uint64(pid), 10) + "/fd"
		d, err := os.Open(dir)
		if err != nil {
			continue // it ended
		}
		for left > 0 {
			names, err := d.Readdirnames(min(left, 256))
			files += uint64(len(names))
			left -= len(names)
			for _, name := range names {
				if n, err := unix.Readlink(dir+"/"+name, buf[:]); err == nil && bytes.HasPrefix(buf[:n], []byte("socket:")) {
					sockets++
				}
			}
			if err != nil || len(names) == 0 {
				break
			}
		}
		d.Close()
	}
	return files, sockets
}

// ulimit is a resource limit of a process.
type ulimit struct {
	name string // RLIMIT_NOFILE
	soft uint64 // RLIM_INFINITY is all ones
}

// limitNames are the names of limits as /proc shows them.
func limitNames() map[string]string {
	return map[string]string{
		"Max cpu time": "RLIMIT_CPU", "Max file size": "RLIMIT_FSIZE", "Max data size": "RLIMIT_DATA", "Max stack size": "RLIMIT_STACK",
		"Max core file size": "RLIMIT_CORE", "Max resident set": "RLIMIT_RSS", "Max processes": "RLIMIT_NPROC", "Max open files": "RLIMIT_NOFILE",
		"Max locked memory": "RLIMIT_MEMLOCK", "Max address space": "RLIMIT_AS", "Max file locks": "RLIMIT_LOCKS",
		"Max pending signals": "RLIMIT_SIGPENDING", "Max msgqueue size": "RLIMIT_MSGQUEUE", "Max nice priority": "RLIMIT_NICE",
		"Max realtime priority": "RLIMIT_RTPRIO", "Max realtime timeout": "RLIMIT_RTTIME",
	}
}

// ulimits reads the soft limits of a process.
func (t tree) ulimits(r *reader, pid uint32) []ulimit {
	b, err := r.read(t.proc + "/" + strconv.FormatUint(uint64(pid), 10) + "/limits")
	if err != nil {
		return nil
	}
	names := limitNames()
	const column = 26 // where the numbers begin
	var all []ulimit
	for line := range strings.Lines(string(b)) {
		if len(line) <= column {
			continue
		}
		f := strings.Fields(line[column:])
		name, ok := names[strings.TrimSpace(line[:column])]
		if !ok || len(f) == 0 {
			continue
		}
		soft := number([]byte(strings.ReplaceAll(f[0], "unlimited", "max")))
		if soft.ok {
			all = append(all, ulimit{name, soft.n})
		}
	}
	return all
}
