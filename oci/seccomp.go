package oci

import (
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Numbers of errno that a filter returns.
const (
	eperm  = 1
	enosys = 38
)

// namespaceFlags are the CLONE_NEW flags a clone without CAP_SYS_ADMIN must
// not have: NS, CGROUP, UTS, IPC, USER, PID, NET.
const namespaceFlags = 0x7e020000

// seccompRule allows system calls under conditions; all that are set hold.
type seccompRule struct {
	names     string
	args      []specs.LinuxSeccompArg
	errno     uint     // fail with it instead of allowing
	anyCap    []string // the container has one of them
	noCap     string   // the container does not have it
	arches    string   // the host's GOARCH is one of them
	notArches string
	kernel    [2]int // at least
}

func arg(index uint, op specs.LinuxSeccompOperator, value, two uint64) []specs.LinuxSeccompArg {
	return []specs.LinuxSeccompArg{{Index: index, Op: op, Value: value, ValueTwo: two}}
}

// seccompRules is the default profile as a table (contract 10.5): what Docker
// allows, by name. io_uring is not in it. Everything else fails with EPERM, but
// the runtime answers ENOSYS to calls that are newer than any that is listed,
// and so does clone3 here, so that a C library falls back instead of giving up.
var seccompRules = []seccompRule{
	{names: `
		accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 clock_adjtime
		clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
		clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
		epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
		exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2
		fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat
		fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait
		futex_waitv futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid
		getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid
		getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname
		getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1
		inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl
		ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32
		lgetxattr link linkat listen listxattr listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64
		madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2
		mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
		mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
		name_to_handle_at nanosleep newfstatat _newselect open openat openat2 pause pidfd_open pidfd_send_signal pipe
		pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64
		process_mrelease pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv
		recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2
		restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
		rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
		sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
		sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp
		select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto
		set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups
		setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid
		setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown
		sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64
		statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
		timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime
		timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink
		unlinkat uretprobe utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev`},
	{names: "process_vm_readv process_vm_writev ptrace", kernel: [2]int{4, 8}}, // seccomp could be left through ptrace before
	{names: "socket", args: arg(0, specs.OpNotEqual, 40, 0)},                   // AF_VSOCK knows no network namespace
	{names: "personality", args: arg(0, specs.OpEqualTo, 0x0, 0)},
	{names: "personality", args: arg(0, specs.OpEqualTo, 0x8, 0)},
	{names: "personality", args: arg(0, specs.OpEqualTo, 0x20000, 0)},
	{names: "personality", args: arg(0, specs.OpEqualTo, 0x20008, 0)},
	{names: "personality", args: arg(0, specs.OpEqualTo, 0xffffffff, 0)},
	{names: "sync_file_range2 swapcontext", arches: "ppc64le"},
	{names: "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls", arches: "arm arm64"},
	{names: "arch_prctl", arches: "amd64"},
	{names: "modify_ldt", arches: "amd64 386"},
	{names: "s390_pci_mmio_read s390_pci_mmio_write s390_runtime_instr", arches: "s390x"},
	{names: "riscv_flush_icache riscv_hwprobe", arches: "riscv64"},
	{names: "open_by_handle_at", anyCap: []string{"CAP_DAC_READ_SEARCH"}},
	{names: `bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick listmount lookup_dcookie lsm_get_self_attr
		lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree open_tree_attr perf_event_open quotactl
		quotactl_fd setdomainname sethostname setns statmount syslog umount umount2 unshare`, anyCap: []string{"CAP_SYS_ADMIN"}},
	{names: "clone", args: arg(0, specs.OpMaskedEqual, namespaceFlags, 0), noCap: "CAP_SYS_ADMIN", notArches: "s390x"},
	{names: "clone", args: arg(1, specs.OpMaskedEqual, namespaceFlags, 0), noCap: "CAP_SYS_ADMIN", arches: "s390x"}, // other order of arguments
	{names: "clone3", errno: enosys, noCap: "CAP_SYS_ADMIN"},                                                        // its flags are behind a pointer
	{names: "reboot", anyCap: []string{"CAP_SYS_BOOT"}},
	{names: "chroot", anyCap: []string{"CAP_SYS_CHROOT"}},
	{names: "delete_module init_module finit_module", anyCap: []string{"CAP_SYS_MODULE"}},
	{names: "acct", anyCap: []string{"CAP_SYS_PACCT"}},
	{names: "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace", anyCap: []string{"CAP_SYS_PTRACE"}},
	{names: "iopl ioperm", anyCap: []string{"CAP_SYS_RAWIO"}},
	{names: "settimeofday stime clock_settime clock_settime64", anyCap: []string{"CAP_SYS_TIME"}},
	{names: "vhangup", anyCap: []string{"CAP_SYS_TTY_CONFIG"}},
	{names: "get_mempolicy mbind set_mempolicy set_mempolicy_home_node", anyCap: []string{"CAP_SYS_NICE"}},
	{names: "syslog", anyCap: []string{"CAP_SYSLOG"}},
	{names: "bpf", anyCap: []string{"CAP_BPF"}},
	{names: "perf_event_open", anyCap: []string{"CAP_PERFMON"}},
}

// seccompArches are the machine codes that a host runs, by GOARCH.
var seccompArches = map[string][]specs.Arch{
	"amd64":    {specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
	"386":      {specs.ArchX86},
	"arm64":    {specs.ArchARM, specs.ArchAARCH64},
	"arm":      {specs.ArchARM},
	"mips64":   {specs.ArchMIPS, specs.ArchMIPS64, specs.ArchMIPS64N32},
	"mips64le": {specs.ArchMIPSEL, specs.ArchMIPSEL64, specs.ArchMIPSEL64N32},
	"ppc64le":  {specs.ArchPPC64LE},
	"s390x":    {specs.ArchS390, specs.ArchS390X},
	"riscv64":  {specs.ArchRISCV64},
	"loong64":  {specs.ArchLOONGARCH64},
}

// DefaultSeccomp is the profile that containers get: Docker's, for a host and
// a container with these capabilities. It is nil when the host has no seccomp
// (contract 10.5).
func DefaultSeccomp(facts HostFacts, caps []string) *specs.LinuxSeccomp {
	if facts.NoSeccomp {
		return nil
	}
	def, arch := uint(eperm), facts.arch()
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: &def, Architectures: slices.Clone(seccompArches[arch])}
	for _, r := range seccompRules {
		if r.anyCap != nil && !slices.ContainsFunc(r.anyCap, func(c string) bool { return slices.Contains(caps, c) }) {
			continue
		}
		if r.noCap != "" && slices.Contains(caps, r.noCap) {
			continue
		}
		if r.arches != "" && !slices.Contains(strings.Fields(r.arches), arch) || slices.Contains(strings.Fields(r.notArches), arch) {
			continue
		}
		if !facts.kernelAtLeast(r.kernel) {
			continue
		}
		c := specs.LinuxSyscall{Names: strings.Fields(r.names), Action: specs.ActAllow, Args: slices.Clone(r.args)}
		if r.errno != 0 {
			errno := r.errno
			c.Action, c.ErrnoRet = specs.ActErrno, &errno
		}
		p.Syscalls = append(p.Syscalls, c)
	}
	return p
}
