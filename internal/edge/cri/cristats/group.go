package cristats

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxFile is how much of a kernel file is read: the longest, a list of 100,000
// processes, fits.
const maxFile = 1 << 20

// reader reads small files into one buffer that it keeps.
type reader struct {
	buf []byte
}

// read returns the content until the next call. A file that is too long is cut.
func (r *reader) read(path string) ([]byte, error) {
	if r.buf == nil {
		r.buf = make([]byte, 8<<10)
	}
	fd, err := retry(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	n := 0
	for {
		if n == len(r.buf) {
			if n >= maxFile {
				return r.buf[:n], nil
			}
			r.buf = append(r.buf, make([]byte, n)...)
		}
		m, err := retry(func() (int, error) { return unix.Read(fd, r.buf[n:]) })
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		}
		if m == 0 {
			return r.buf[:n], nil
		}
		n += m
	}
}

func retry(fn func() (int, error)) (int, error) {
	for {
		if n, err := fn(); err != unix.EINTR {
			return n, err
		}
	}
}

// value is a number that the kernel may not tell.
type value struct {
	n  uint64
	ok bool
}

func some(n uint64) value { return value{n, true} }

// of is nil if there is no value.
func (v value) of() *runtime.UInt64Value {
	if !v.ok {
		return nil
	}
	return &runtime.UInt64Value{Value: v.n}
}

func (v value) times(n uint64) value { return value{v.n * n, v.ok} }

// less is v-w, at least 0; none if either is none.
func (v value) less(w value) value {
	if !v.ok || !w.ok {
		return value{}
	}
	return some(v.n - min(v.n, w.n))
}

// limited is none if v says that there is no limit.
func (v value) limited() value {
	if v.n >= 1<<62 {
		return value{}
	}
	return v
}

// or is the first that is there.
func (v value) or(w value) value {
	if v.ok {
		return v
	}
	return w
}

// number reads a decimal number; "max" is the greatest one.
func number(b []byte) value {
	b = bytes.TrimSpace(b)
	if string(b) == "max" {
		return some(math.MaxUint64)
	}
	if len(b) == 0 {
		return value{}
	}
	var n uint64
	for _, c := range b {
		if c < '0' || c > '9' || n > (math.MaxUint64-9)/10 {
			return value{}
		}
		n = n*10 + uint64(c-'0')
	}
	return some(n)
}

// value reads a file of one number.
func (r *reader) value(dir, name string) value {
	b, err := r.file(dir, name)
	if err != nil {
		return value{}
	}
	return number(b)
}

func (r *reader) file(dir, name string) ([]byte, error) {
	if dir == "" {
		return nil, errdefs.ErrNotFound
	}
	return r.read(dir + "/" + name)
}

// pairs calls fn for the lines "key number" of a file.
func (r *reader) pairs(dir, name string, fn func(key string, v value)) error {
	b, err := r.file(dir, name)
	if err != nil {
		return err
	}
	for line := range bytes.Lines(b) {
		if key, num, ok := bytes.Cut(line, []byte{' '}); ok {
			fn(string(key), number(num))
		}
	}
	return nil
}

// pressure reads a PSI file; nil if the kernel does not account it. Its
// microseconds become nanoseconds (contract 7.3.16).
func (r *reader) pressure(dir, name string) *runtime.PsiStats {
	b, err := r.file(dir, name)
	if err != nil || len(b) == 0 {
		return nil
	}
	p := &runtime.PsiStats{Full: &runtime.PsiData{}, Some: &runtime.PsiData{}}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		d := p.Some
		if f[0] == "full" {
			d = p.Full
		}
		for _, kv := range f[1:] {
			k, v, _ := strings.Cut(kv, "=")
			switch k {
			case "total":
				d.Total = number([]byte(v)).n * 1000
			case "avg10":
				d.Avg10, _ = strconv.ParseFloat(v, 64)
			case "avg60":
				d.Avg60, _ = strconv.ParseFloat(v, 64)
			case "avg300":
				d.Avg300, _ = strconv.ParseFloat(v, 64)
			}
		}
	}
	return p
}

// tree is where the kernel shows control groups and processes.
type tree struct{ cgroup, proc string }

// group is the directories of a control group. In version 2 they are one; in
// version 1 a controller that does not know the group has none.
type group struct {
	unified                           bool
	cpu, cpuacct, memory, blkio, pids string
}

func (t tree) unified() bool {
	_, err := os.Stat(filepath.Join(t.cgroup, "cgroup.controllers"))
	return err == nil
}

// set notes a directory of a version 1 controller.
func (g *group) set(controller, dir string) bool {
	switch controller {
	case "cpu":
		g.cpu = dir
	case "cpuacct":
		g.cpuacct = dir
	case "memory":
		g.memory = dir
	case "blkio":
		g.blkio = dir
	case "pids":
		g.pids = dir
	default:
		return false
	}
	return true
}

func unifiedGroup(dir string) *group {
	return &group{unified: true, cpu: dir, cpuacct: dir, memory: dir, blkio: dir, pids: dir}
}

// ofProcess finds the group of a container by its first process. A process
// that went into a group below (an init that makes groups of its own) does not
// mislead it: the group is the one with the container's id in its name. The
// root group is nobody's: ErrNotFound.
func (t tree) ofProcess(r *reader, pid uint32, id string) (*group, error) {
	b, err := r.read(t.proc + "/" + strconv.FormatUint(uint64(pid), 10) + "/cgroup")
	if err != nil {
		return nil, fmt.Errorf("control group of process %d: %w", pid, err)
	}
	unified := t.unified()
	g := &group{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 || f[2] == "/" || !strings.HasPrefix(f[2], "/") || strings.HasPrefix(f[2], "/..") {
			continue
		}
		where := f[2]
		if i := strings.Index(where, id); id != "" && i >= 0 {
			if j := strings.IndexByte(where[i:], '/'); j >= 0 {
				where = where[:i+j]
			}
		}
		if unified {
			if f[1] == "" {
				return unifiedGroup(t.cgroup + where), nil
			}
			continue
		}
		for _, controller := range strings.Split(f[1], ",") {
			g.set(controller, t.hierarchy(controller, f[1])+where)
		}
	}
	if *g == (group{}) {
		return nil, fmt.Errorf("process %d is in no control group of its own: %w", pid, errdefs.ErrNotFound)
	}
	return g, nil
}

// hierarchy is where a version 1 controller is mounted: below its own name, or
// below the names of all that are mounted together.
func (t tree) hierarchy(controller, together string) string {
	dir := filepath.Join(t.cgroup, controller)
	if controller != together {
		if _, err := os.Stat(dir); err != nil {
			return filepath.Join(t.cgroup, together)
		}
	}
	return dir
}

// ofParent finds a pod's group by its name: a path, or a slice of systemd.
// ErrNotFound.
func (t tree) ofParent(parent string) (*group, error) {
	where := path.Clean("/" + parent)
	if !strings.Contains(parent, "/") && strings.HasSuffix(parent, ".slice") {
		where = slicePath(parent)
	}
	if where == "/" {
		return nil, fmt.Errorf("control group %q: %w", parent, errdefs.ErrNotFound)
	}
	isDir := func(dir string) bool {
		fi, err := os.Stat(dir)
		return err == nil && fi.IsDir()
	}
	if t.unified() {
		if dir := t.cgroup + where; isDir(dir) {
			return unifiedGroup(dir), nil
		}
		return nil, fmt.Errorf("control group %s: %w", where, errdefs.ErrNotFound)
	}
	g := &group{}
	for _, controller := range []string{"cpu", "cpuacct", "memory", "blkio", "pids"} {
		if dir := filepath.Join(t.cgroup, controller, where); isDir(dir) {
			g.set(controller, dir)
		}
	}
	if *g == (group{}) {
		return nil, fmt.Errorf("control group %s: %w", where, errdefs.ErrNotFound)
	}
	return g, nil
}

// slicePath is where systemd keeps a slice: a-b.slice is in a.slice.
func slicePath(name string) string {
	var where strings.Builder
	base := strings.TrimSuffix(name, ".slice")
	for i := range len(base) {
		if base[i] == '-' && i > 0 {
			where.WriteString("/" + base[:i] + ".slice")
		}
	}
	where.WriteString("/" + name)
	return path.Clean(where.String())
}

// cpuTotal is the CPU time that a group has used, in nanoseconds.
func (g *group) cpuTotal(r *reader) (uint64, error) {
	if !g.unified {
		b, err := r.file(g.cpuacct, "cpuacct.usage")
		if err != nil {
			return 0, err
		}
		return number(b).n, nil
	}
	b, err := r.file(g.cpu, "cpu.stat")
	if err != nil {
		return 0, err
	}
	_, b, ok := bytes.Cut(b, []byte("usage_usec ")) // it is the first line
	if !ok {
		return 0, fmt.Errorf("%s/cpu.stat without usage_usec: %w", g.cpu, errdefs.ErrUnavailable)
	}
	b, _, _ = bytes.Cut(b, []byte{'\n'})
	return number(b).n * 1000, nil
}

// memory is what a group uses and may use; bytes, and counts of events.
type memory struct {
	usage, peak, limit, low                          value // limits are none if there is none
	inactiveFile, activeFile, rss, cache, mapped     value
	kernel, faults, majorFaults, ownFaults, ownMajor value
	swap, swapLimit, failures, kills                 value
	// memswLimit is the limit of memory and swap together.
	memswLimit value
	psi        *runtime.PsiStats
}

func (m memory) workingSet() value { return m.usage.less(some(m.inactiveFile.n)) }

// readMemory reads what statistics need, and more for metrics.
func (g *group) readMemory(r *reader, more bool) memory {
	var m memory
	d := g.memory
	if g.unified {
		m.usage, m.limit = r.value(d, "memory.current"), r.value(d, "memory.max").limited()
		m.swap, m.swapLimit = r.value(d, "memory.swap.current"), r.value(d, "memory.swap.max").limited()
		m.psi = r.pressure(d, "memory.pressure")
		var kernel, parts value
		_ = r.pairs(d, "memory.stat", func(key string, v value) {
			switch key {
			case "anon":
				m.rss = v
			case "file":
				m.cache = v
			case "file_mapped":
				m.mapped = v
			case "kernel":
				kernel = v
			case "kernel_stack", "pagetables", "percpu", "sock", "slab":
				parts = some(parts.n + v.n)
			case "inactive_file":
				m.inactiveFile = v
			case "active_file":
				m.activeFile = v
			case "pgfault":
				m.faults, m.ownFaults = v, v
			case "pgmajfault":
				m.majorFaults, m.ownMajor = v, v
			}
		})
		m.kernel = kernel.or(parts) // before Linux 5.18 there is no sum
		if !more {
			return m
		}
		m.peak, m.low = r.value(d, "memory.peak"), r.value(d, "memory.low").limited()
		_ = r.pairs(d, "memory.events", func(key string, v value) {
			switch key {
			case "max":
				m.failures = v
			case "oom_kill":
				m.kills = v
			}
		})
		if m.limit.ok && m.swapLimit.ok {
			m.memswLimit = some(m.limit.n + m.swapLimit.n)
		}
		return m
	}
	m.usage, m.limit = r.value(d, "memory.usage_in_bytes"), r.value(d, "memory.limit_in_bytes").limited()
	m.swap = r.value(d, "memory.memsw.usage_in_bytes").less(m.usage)
	if m.swap.ok {
		m.memswLimit = r.value(d, "memory.memsw.limit_in_bytes").limited()
		m.swapLimit = m.memswLimit.less(m.limit)
	}
	_ = r.pairs(d, "memory.stat", func(key string, v value) {
		switch key {
		case "total_rss":
			m.rss = v
		case "total_cache":
			m.cache = v
		case "total_mapped_file":
			m.mapped = v
		case "total_inactive_file":
			m.inactiveFile = v
		case "total_active_file":
			m.activeFile = v
		case "pgfault":
			m.ownFaults = v
		case "pgmajfault":
			m.ownMajor = v
		case "total_pgfault":
			m.faults = v
		case "total_pgmajfault":
			m.majorFaults = v
		}
	})
	if !more {
		return m
	}
	m.peak, m.low = r.value(d, "memory.max_usage_in_bytes"), r.value(d, "memory.soft_limit_in_bytes").limited()
	m.kernel, m.failures = r.value(d, "memory.kmem.usage_in_bytes"), r.value(d, "memory.failcnt")
	_ = r.pairs(d, "memory.oom_control", func(key string, v value) {
		if key == "oom_kill" {
			m.kills = v
		}
	})
	return m
}

// cpu is a group's CPU time in nanoseconds, and its share.
type cpu struct {
	user, system, throttledTime value
	periods, throttled          value
	period, shares              value // microseconds; relative to 1024
}

// readCPU reads what metrics need.
func (g *group) readCPU(r *reader) cpu {
	var c cpu
	_ = r.pairs(g.cpu, "cpu.stat", func(key string, v value) {
		switch key {
		case "user_usec":
			c.user = v.times(1000)
		case "system_usec":
			c.system = v.times(1000)
		case "nr_periods":
			c.periods = v
		case "nr_throttled":
			c.throttled = v
		case "throttled_usec":
			c.throttledTime = v.times(1000)
		case "throttled_time":
			c.throttledTime = v
		}
	})
	if g.unified {
		if b, err := r.file(g.cpu, "cpu.max"); err == nil {
			if _, p, ok := bytes.Cut(b, []byte{' '}); ok {
				c.period = number(p)
			}
		}
		if w := r.value(g.cpu, "cpu.weight"); w.ok && w.n > 0 {
			c.shares = some(2 + (w.n-1)*262142/9999) // as Kubernetes converts weights back
		}
		return c
	}
	c.period, c.shares = r.value(g.cpu, "cpu.cfs_period_us"), r.value(g.cpu, "cpu.shares")
	c.user, c.system = r.value(g.cpuacct, "cpuacct.usage_user"), r.value(g.cpuacct, "cpuacct.usage_sys")
	if !c.user.ok || !c.system.ok { // before Linux 4.7
		const tick = 1e9 / 100
		_ = r.pairs(g.cpuacct, "cpuacct.stat", func(key string, v value) {
			switch key {
			case "user":
				c.user = v.times(tick)
			case "system":
				c.system = v.times(tick)
			}
		})
	}
	return c
}

// transfer is what a group read from and wrote to one block device.
type transfer struct {
	device string // major:minor
	op     string // "Read", "Write" or "Discard"
	bytes  uint64
	count  uint64
}

// readIO reads what metrics need, in the order of the kernel.
func (g *group) readIO(r *reader) []transfer {
	var all []transfer
	at := func(device, op string) *transfer {
		for i := range all {
			if all[i].device == device && all[i].op == op {
				return &all[i]
			}
		}
		all = append(all, transfer{device: device, op: op})
		return &all[len(all)-1]
	}
	if g.unified {
		b, err := r.file(g.blkio, "io.stat")
		if err != nil {
			return nil
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 2 || !strings.Contains(f[0], ":") {
				continue
			}
			for _, kv := range f[1:] {
				k, v, _ := strings.Cut(kv, "=")
				n := number([]byte(v)).n
				switch k {
				case "rbytes":
					at(f[0], "Read").bytes = n
				case "wbytes":
					at(f[0], "Write").bytes = n
				case "dbytes":
					at(f[0], "Discard").bytes = n
				case "rios":
					at(f[0], "Read").count = n
				case "wios":
					at(f[0], "Write").count = n
				case "dios":
					at(f[0], "Discard").count = n
				}
			}
		}
		return all
	}
	// The scheduler in use decides which file counts; the first that has a device.
	for _, prefix := range []string{"blkio.throttle.", "blkio.bfq.", "blkio."} {
		for _, what := range []string{"io_service_bytes", "io_serviced"} {
			b, err := r.file(g.blkio, prefix+what+"_recursive")
			if err != nil {
				continue
			}
			for line := range strings.Lines(string(b)) {
				f := strings.Fields(line)
				if len(f) != 3 || f[1] != "Read" && f[1] != "Write" && f[1] != "Discard" {
					continue
				}
				t := at(f[0], f[1])
				if what == "io_serviced" {
					t.count = number([]byte(f[2])).n
				} else {
					t.bytes = number([]byte(f[2])).n
				}
			}
		}
		if len(all) > 0 {
			break
		}
	}
	return all
}
