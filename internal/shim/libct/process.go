//go:build linux

package libct

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	selinux "github.com/opencontainers/selinux/go-selinux"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/shim/driver"
)

func invalid(format string, args ...any) error {
	return fmt.Errorf("process: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// newProcess turns a process of a spec into the library's.
func newProcess(spec *specs.Process) (*libcontainer.Process, error) {
	if err := driver.CheckProcess(spec); err != nil {
		return nil, err
	}
	if spec.SelinuxLabel != "" && !selinux.GetEnabled() {
		return nil, invalid("it has an SELinux label, and SELinux is off")
	}
	p := &libcontainer.Process{
		Args: spec.Args, Env: spec.Env, Cwd: spec.Cwd,
		UID: int(spec.User.UID), GID: int(spec.User.GID),
		Label: spec.SelinuxLabel, AppArmorProfile: spec.ApparmorProfile,
		NoNewPrivileges: &spec.NoNewPrivileges,
		Scheduler:       spec.Scheduler, IOPriority: spec.IOPriority,
		LogLevel: strconv.Itoa(int(logrus.GetLevel())),
	}
	for _, g := range spec.User.AdditionalGids {
		p.AdditionalGroups = append(p.AdditionalGroups, int(g))
	}
	if s := spec.ConsoleSize; s != nil {
		p.ConsoleWidth, p.ConsoleHeight = uint16(s.Width), uint16(s.Height)
	}
	if c := spec.Capabilities; c != nil {
		p.Capabilities = &configs.Capabilities{Bounding: c.Bounding, Effective: c.Effective,
			Inheritable: c.Inheritable, Permitted: c.Permitted, Ambient: c.Ambient}
	}
	for _, r := range spec.Rlimits {
		kind, ok := rlimit(r.Type)
		if !ok {
			return nil, invalid("unknown resource limit %q", r.Type)
		}
		p.Rlimits = append(p.Rlimits, configs.Rlimit{Type: kind, Hard: r.Hard, Soft: r.Soft})
	}
	var err error
	if p.CPUAffinity, err = configs.ConvertCPUAffinity(spec.ExecCPUAffinity); err != nil {
		return nil, invalid("%v", err)
	}
	return p, nil
}

// Limits are those that the shim was started with.
type Limits struct {
	memlock *configs.Rlimit // nil is unknown
}

// Inherited are this process's limits. The library lifts that of locked memory
// for good when it loads a cgroup's device program: they are those that the
// process was started with only before its first container.
func Inherited() Limits {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l) != nil {
		return Limits{}
	}
	return Limits{&configs.Rlimit{Type: unix.RLIMIT_MEMLOCK, Hard: l.Max, Soft: l.Cur}}
}

// keepMemlock gives a process the limit that it would inherit, if it is given no
// other.
func keepMemlock(p *libcontainer.Process, l *configs.Rlimit) {
	if l != nil && !slices.ContainsFunc(p.Rlimits, func(r configs.Rlimit) bool { return r.Type == l.Type }) {
		p.Rlimits = append(p.Rlimits, *l)
	}
}

func rlimit(name string) (int, bool) {
	for i, n := range [...]string{
		unix.RLIMIT_CPU: "RLIMIT_CPU", unix.RLIMIT_FSIZE: "RLIMIT_FSIZE", unix.RLIMIT_DATA: "RLIMIT_DATA",
		unix.RLIMIT_STACK: "RLIMIT_STACK", unix.RLIMIT_CORE: "RLIMIT_CORE", unix.RLIMIT_RSS: "RLIMIT_RSS",
		unix.RLIMIT_NPROC: "RLIMIT_NPROC", unix.RLIMIT_NOFILE: "RLIMIT_NOFILE", unix.RLIMIT_MEMLOCK: "RLIMIT_MEMLOCK",
		unix.RLIMIT_AS: "RLIMIT_AS", unix.RLIMIT_LOCKS: "RLIMIT_LOCKS", unix.RLIMIT_SIGPENDING: "RLIMIT_SIGPENDING",
		unix.RLIMIT_MSGQUEUE: "RLIMIT_MSGQUEUE", unix.RLIMIT_NICE: "RLIMIT_NICE", unix.RLIMIT_RTPRIO: "RLIMIT_RTPRIO",
		unix.RLIMIT_RTTIME: "RLIMIT_RTTIME",
	} {
		if n == name {
			return i, true
		}
	}
	return 0, false
}
