package oci

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "write the golden files")

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\n# comment\n\nbroken\nweb:x:1000:1001:Web:/srv:/bin/sh\nother:x:1002:1002::/:\n"
	group  = "root:x:0:\nwheel:x:10:root,web\nweb:x:1001:\naudio:x:63:other,web\nempty:x:77:\n"
)

var image = ocispec.ImageConfig{
	User: "web", Env: []string{"PATH=/bin", "A=1", "novalue", "B=2"}, Entrypoint: []string{"/entry"}, Cmd: []string{"a", "b"},
	WorkingDir: "srv/./www", StopSignal: "sigquit",
	Labels:  map[string]string{"app": "x", "containerd.io/restart.loguri": "binary:///bin/sh", "IO.containerd.x": "y", "io.cri-containerd.kind": "sandbox"},
	Volumes: map[string]struct{}{"/data/../data": {}, "../../etc": {}, "/proc/x": {}, "/": {}},
}

// facts that do not depend on where the test runs.
var facts = HostFacts{Arch: "amd64", Kernel: [2]int{6, 1}}

func users() Option {
	return WithUserDatabase(strings.NewReader(passwd), strings.NewReader(group))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// contract: 10.4
func TestGolden(t *testing.T) {
	fuse := specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}
	withFuse := facts
	withFuse.Devices = []specs.LinuxDevice{fuse}
	v2 := facts
	v2.CgroupV2, v2.SystemdCgroup, v2.Controllers = true, true, []string{"cpu", "cpuset", "memory", "pids"}
	rootless := facts
	rootless.CgroupV2, rootless.UserNS, rootless.Capabilities = true, true, []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_ADMIN"}
	network := facts
	network.Hosts, network.ResolvConf, network.AppArmor = "/etc/hosts", "/run/resolv.conf", "gantry-default"
	plain := ocispec.ImageConfig{Cmd: []string{"/bin/sh"}}
	for _, tc := range []struct {
		name  string
		facts HostFacts
		img   ocispec.ImageConfig
		opts  []Option
	}{
		{"default", facts, plain, nil},
		{"image", facts, image, []Option{users()}},
		{"process", facts, image, []Option{users(), WithEntrypoint("/bin/other"), WithArgs("x"), WithEnv("A=changed", "B", "C=3=4"), WithCwd("/tmp"),
			WithUser("1000:audio"), WithAdditionalGroups(5, 63), WithHostname("box"), WithTerminal(80, 24), WithOOMScoreAdj(500),
			WithRlimit("nofile", 10, 20), WithRlimit("RLIMIT_CORE", 0, 0), WithAnnotations(map[string]string{"k": "v"}), WithSysctl("net.ipv4.ip_forward", "1")}},
		{"mounts", facts, plain, []Option{WithReadonlyRoot(), WithRootfs("/abs"), WithMounts(
			must(ParseVolume("/a:/x/y/z:ro,rslave")), must(ParseVolume("/b:/x")), must(ParseTmpfs("/run:exec,size=1m")),
			must(ParseMount("type=tmpfs,dst=/scratch,tmpfs-size=1g,tmpfs-mode=1770")), must(ParseMount(`type=bind,"src=/with,comma",target=/c,readonly,bind-nonrecursive`)))}},
		{"capabilities", facts, plain, []Option{WithCapabilities([]string{"net_admin", "CAP_SYS_PTRACE"}, []string{"MKNOD"}), WithNewPrivileges(), WithSeccomp(nil)}},
		{"drop-all", facts, plain, []Option{WithCapabilities([]string{"chown"}, []string{"all"})}},
		{"privileged", withFuse, plain, []Option{WithPrivileged()}},
		{"host-network", network, plain, []Option{WithHostNetwork(), WithMounts(must(ParseVolume("/my/hosts:/etc/hosts")))}},
		{"limits-v2", v2, plain, []Option{WithMemoryLimit(64<<20, 128<<20), WithCPUs(1.5), WithCPUShares(512), WithCPUSet("0-1", "0"), WithPidsLimit(100), WithCgroupMount()}},
		{"device", withFuse, plain, []Option{WithDevice(fuse, "rw")}},
		{"rootless", rootless, plain, []Option{WithHostNetwork()}},
		{"namespaces", facts, plain, []Option{WithNamespace(specs.NetworkNamespace, "/run/netns/a"), WithHostNamespace(specs.PIDNamespace),
			WithIDMappings([]specs.LinuxIDMapping{{HostID: 1000, Size: 10}}, []specs.LinuxIDMapping{{HostID: 2000, Size: 10}}), WithCgroupsPath("/pod/c"),
			WithSELinux("p", "m"), WithSpec(func(s *specs.Spec) error { s.Domainname = "d"; return nil })}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := Generate(tc.facts, "box", "default", tc.img, tc.opts...)
			if err != nil {
				t.Fatal(err)
			}
			if got := s.Linux.Seccomp; got != nil {
				if d := cmp.Diff(DefaultSeccomp(tc.facts, s.Process.Capabilities.Bounding), got); d != "" {
					t.Error(d)
				}
				s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: "see seccomp.json"}
			}
			golden(t, tc.name, s)
		})
	}
}

func golden(t *testing.T, name string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	path := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got):\n%s", path, d)
	}
}

// The list of the contract, not that of the code.
//
// contract: 10.4
func TestDefaultsByTheContract(t *testing.T) {
	s, err := Generate(facts, "c1", "ns1", ocispec.ImageConfig{Cmd: []string{"x"}})
	if err != nil {
		t.Fatal(err)
	}
	caps := strings.Fields("CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE")
	for i := range caps {
		caps[i] = "CAP_" + caps[i]
	}
	p := s.Process
	for name, got := range map[string][]string{"bounding": p.Capabilities.Bounding, "effective": p.Capabilities.Effective, "permitted": p.Capabilities.Permitted} {
		if d := cmp.Diff(caps, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
	if len(p.Capabilities.Inheritable)+len(p.Capabilities.Ambient) != 0 {
		t.Errorf("inheritable %v ambient %v", p.Capabilities.Inheritable, p.Capabilities.Ambient)
	}
	if !p.NoNewPrivileges || len(p.Rlimits) != 1 || p.Rlimits[0] != (specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 1024}) {
		t.Errorf("no_new_privs %v, limits %v", p.NoNewPrivileges, p.Rlimits)
	}
	var mounts, spaces []string
	for _, m := range s.Mounts {
		mounts = append(mounts, m.Destination)
	}
	for _, n := range s.Linux.Namespaces {
		spaces = append(spaces, string(n.Type))
	}
	if d := cmp.Diff(strings.Fields("/proc /dev /dev/pts /dev/shm /dev/mqueue /sys /run"), mounts); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(strings.Fields("pid ipc uts mount network"), spaces); d != "" {
		t.Error(d)
	}
	masked := strings.Fields("acpi asound kcore keys latency_stats timer_list timer_stats sched_debug scsi")
	for i := range masked {
		masked[i] = "/proc/" + masked[i]
	}
	if d := cmp.Diff(append(masked, "/sys/firmware", "/sys/devices/virtual/powercap"), s.Linux.MaskedPaths); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(strings.Fields("/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger"), s.Linux.ReadonlyPaths); d != "" {
		t.Error(d)
	}
	if s.Linux.CgroupsPath != "/ns1/c1" {
		t.Errorf("cgroup %s", s.Linux.CgroupsPath)
	}
}

// contract: 10.5
func TestSeccomp(t *testing.T) {
	golden(t, "seccomp", DefaultSeccomp(facts, defaultCapabilities))
	allows := func(p *specs.LinuxSeccomp, name string) (allowed, listed bool) {
		for _, r := range p.Syscalls {
			if slices.Contains(r.Names, name) {
				listed = true
				allowed = allowed || r.Action == specs.ActAllow && len(r.Args) == 0
			}
		}
		return allowed, listed
	}
	p := DefaultSeccomp(facts, defaultCapabilities)
	if p.DefaultAction != specs.ActErrno || p.DefaultErrnoRet == nil || *p.DefaultErrnoRet != 1 {
		t.Errorf("default %v %v", p.DefaultAction, p.DefaultErrnoRet)
	}
	for _, name := range []string{"read", "openat2", "chroot", "ptrace", "arch_prctl", "fchmodat2"} {
		if ok, _ := allows(p, name); !ok {
			t.Errorf("%s is not allowed", name)
		}
	}
	for _, name := range []string{"io_uring_setup", "io_uring_enter", "io_uring_register", "mount", "bpf", "unshare", "kexec_load", "add_key", "keyctl", "userfaultfd", "riscv_hwprobe", "vhangup", "reboot"} {
		if _, listed := allows(p, name); listed {
			t.Errorf("%s is listed", name)
		}
	}
	i := slices.IndexFunc(p.Syscalls, func(r specs.LinuxSyscall) bool { return slices.Contains(r.Names, "clone3") })
	if i < 0 || p.Syscalls[i].Action != specs.ActErrno || *p.Syscalls[i].ErrnoRet != 38 {
		t.Error("clone3 does not answer ENOSYS")
	}
	admin := DefaultSeccomp(facts, []string{"CAP_SYS_ADMIN"})
	for _, name := range []string{"mount", "clone", "clone3", "unshare"} {
		if ok, _ := allows(admin, name); !ok {
			t.Errorf("%s is not allowed with CAP_SYS_ADMIN", name)
		}
	}
	if ok, _ := allows(admin, "chroot"); ok {
		t.Error("chroot without CAP_SYS_CHROOT")
	}
	old := facts
	old.Kernel = [2]int{4, 4}
	if ok, _ := allows(DefaultSeccomp(old, nil), "ptrace"); ok {
		t.Error("ptrace before Linux 4.8")
	}
	for arch, want := range map[string]specs.Arch{"amd64": specs.ArchX32, "arm64": specs.ArchARM, "s390x": specs.ArchS390, "riscv64": specs.ArchRISCV64} {
		f := facts
		f.Arch = arch
		if !slices.Contains(DefaultSeccomp(f, nil).Architectures, want) {
			t.Errorf("%s does not filter %s", arch, want)
		}
	}
	none := facts
	none.NoSeccomp = true
	if DefaultSeccomp(none, nil) != nil {
		t.Error("a profile where there is no seccomp")
	}
}

func TestArgs(t *testing.T) {
	img := ocispec.ImageConfig{Entrypoint: []string{"e"}, Cmd: []string{"c"}}
	for _, tc := range []struct {
		name string
		img  ocispec.ImageConfig
		opts []Option
		want []string
	}{
		{"image", img, nil, []string{"e", "c"}},
		{"args replace cmd", img, []Option{WithArgs("x", "y")}, []string{"e", "x", "y"}},
		{"entrypoint drops cmd", img, []Option{WithEntrypoint("n")}, []string{"n"}},
		{"both", img, []Option{WithArgs("x"), WithEntrypoint("n", "m")}, []string{"n", "m", "x"}},
		{"empty entrypoint of the image", ocispec.ImageConfig{Entrypoint: []string{""}, Cmd: []string{"c"}}, nil, []string{"c"}},
		{"empty entrypoint", img, []Option{WithEntrypoint(""), WithArgs("x")}, []string{"x"}},
		{"only cmd", ocispec.ImageConfig{Cmd: []string{"c"}}, nil, []string{"c"}},
	} {
		s, err := Generate(facts, "a", "b", tc.img, tc.opts...)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if d := cmp.Diff(tc.want, s.Process.Args); d != "" {
			t.Errorf("%s: %s", tc.name, d)
		}
	}
}

// TestHostFolders: a folder of the host has no default mounts in it, a file
// system of the container's own has.
func TestHostFolders(t *testing.T) {
	for _, tc := range []struct {
		mount specs.Mount
		want  string
	}{
		{must(ParseVolume("/sys:/sys:ro")), "/proc /dev /dev/pts /dev/shm /dev/mqueue /sys /run"},
		{must(ParseVolume("/dev:/dev")), "/proc /dev /sys /run /sys/fs/cgroup"},
		{must(ParseTmpfs("/dev")), "/proc /dev /dev/pts /dev/shm /dev/mqueue /sys /run /sys/fs/cgroup"},
		{must(ParseVolume("/x:/sys/fsx")), "/proc /dev /dev/pts /dev/shm /dev/mqueue /sys /run /sys/fs/cgroup /sys/fsx"},
	} {
		var got []string
		for _, m := range must(Generate(facts, "a", "b", ocispec.ImageConfig{Cmd: []string{"x"}}, WithCgroupMount(), WithMounts(tc.mount))).Mounts {
			got = append(got, m.Destination)
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%s: %q, want %s", tc.mount.Destination, got, tc.want)
		}
	}
}

func TestRefused(t *testing.T) {
	plain := ocispec.ImageConfig{Cmd: []string{"x"}}
	limited := facts
	limited.Controllers, limited.Capabilities = []string{"cpu"}, []string{"CAP_CHOWN"}
	for _, tc := range []struct {
		name  string
		img   ocispec.ImageConfig
		opt   Option
		class func(error) bool
		part  string
	}{
		{"nothing to run", ocispec.ImageConfig{}, nil, errdefs.IsInvalidArgument, "what to run"},
		{"empty command", ocispec.ImageConfig{Cmd: []string{""}}, nil, errdefs.IsInvalidArgument, "empty"},
		{"nul", ocispec.ImageConfig{Cmd: []string{"a\x00b"}}, nil, errdefs.IsInvalidArgument, "NUL"},
		{"unknown user", plain, WithUser("nobody"), errdefs.IsNotFound, `resolve user "nobody"`},
		{"leaked cwd", ocispec.ImageConfig{Cmd: []string{"x"}, WorkingDir: "/proc/self/fd/8"}, nil, errdefs.IsInvalidArgument, "working directory"},
		{"leaked cwd in thread", ocispec.ImageConfig{Cmd: []string{"x"}, WorkingDir: "/proc/self/task/1/fd/8/../8"}, nil, errdefs.IsInvalidArgument, "working directory"},
		{"newline cwd", ocispec.ImageConfig{Cmd: []string{"x"}, WorkingDir: "/a\nb"}, nil, errdefs.IsInvalidArgument, "working directory"},
		{"relative cwd", plain, WithCwd("a"), errdefs.IsInvalidArgument, "absolute"},
		{"bad env", plain, WithEnv("=x"), errdefs.IsInvalidArgument, "environment"},
		{"bad capability", plain, WithCapabilities([]string{"FLY"}, nil), errdefs.IsInvalidArgument, "FLY"},
		{"missing capability", plain, WithCapabilities([]string{"SYS_ADMIN"}, nil), errdefs.IsFailedPrecondition, "CAP_SYS_ADMIN"},
		{"missing controller", plain, WithPidsLimit(5), errdefs.IsFailedPrecondition, "pids"},
		{"memory", plain, WithMemoryLimit(1000, 0), errdefs.IsInvalidArgument, "least"},
		{"swap", plain, WithMemoryLimit(1<<20, 1), errdefs.IsInvalidArgument, "swap"},
		{"pids", plain, WithPidsLimit(0), errdefs.IsInvalidArgument, "processes"},
		{"cpus", plain, WithCPUs(0), errdefs.IsInvalidArgument, "CPUs"},
		{"cpuset", plain, WithCPUSet("0;1", ""), errdefs.IsInvalidArgument, "CPU set"},
		{"host mount namespace", plain, WithHostNamespace(specs.MountNamespace), errdefs.IsInvalidArgument, "mount namespace"},
		{"mount on root", plain, WithMounts(specs.Mount{Destination: "/a/.."}), errdefs.IsInvalidArgument, "root file system"},
		{"mount twice", plain, WithMounts(specs.Mount{Destination: "/a"}, specs.Mount{Destination: "/a/"}), errdefs.IsInvalidArgument, "twice"},
		{"hostname", plain, WithHostname("a\nb"), errdefs.IsInvalidArgument, "host name"},
		{"sysctl of the host", plain, WithSysctl("kernel.core_pattern", "|/x"), errdefs.IsInvalidArgument, "sysctl"},
		{"sysctl smuggled", plain, WithSysctl("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/x"), errdefs.IsInvalidArgument, "sysctl"},
		{"rlimit", plain, WithRlimit("nofile", 2, 1), errdefs.IsInvalidArgument, "resource limit"},
		{"oom", plain, WithOOMScoreAdj(1001), errdefs.IsInvalidArgument, "oom"},
		{"device", plain, WithDevice(specs.LinuxDevice{Path: "x", Type: "c"}, "r"), errdefs.IsInvalidArgument, "device"},
	} {
		var opts []Option
		if tc.opt != nil {
			opts = append(opts, tc.opt)
		}
		s, err := Generate(limited, "box", "default", tc.img, opts...)
		if s != nil || err == nil || !tc.class(err) || !strings.Contains(err.Error(), tc.part) || !strings.Contains(err.Error(), "box") {
			t.Errorf("%s: %v, want the right class and %q", tc.name, err, tc.part)
		}
	}
	if _, err := Generate(facts, "../x", "default", plain); !errdefs.IsInvalidArgument(err) {
		t.Errorf("id: %v", err)
	}
	if _, err := Generate(facts, "x", "", plain); err == nil {
		t.Error("no namespace")
	}
}

func TestMountSyntax(t *testing.T) {
	for in, want := range map[string]string{
		"v /a:/b":                              "bind /a /b rbind,rprivate",
		"v /a/../c:/b/:rw,bind,shared,noexec":  "bind /c /b bind,shared,rw,noexec",
		"v /a:/b:rro":                          "bind /a /b rbind,rprivate,rro",
		"v /a":                                 "",
		"v a:/b":                               "",
		"v /a:b":                               "",
		"v /a:/":                               "",
		"v /a:/b:ro,rw":                        "",
		"v /a:/b:shared,slave":                 "",
		"v /a:/b:suid,upperdir=/x":             "",
		"v /a:/b:ro:x":                         "",
		"v /a\x00:/b":                          "",
		"m type=bind,src=/a,dst=/b":            "bind /a /b rbind,rprivate",
		"m source=/a,target=/b,ro=false":       "bind /a /b rbind,rprivate",
		"m src=/a,dst=/b,options=rbind:ro":     "bind /a /b rbind,rprivate,ro",
		"m type=tmpfs,dst=/t":                  "tmpfs tmpfs /t noexec,nosuid,nodev",
		"m type=tmpfs,dst=/t,ro,tmpfs-size=1k": "tmpfs tmpfs /t noexec,nosuid,nodev,ro,size=1024",
		"m type=tmpfs,dst=/t,src=/x":           "",
		"m type=bind,src=/a,dst=/b,tmpfs-mode=1777":       "",
		"m type=volume,src=v,dst=/b":                      "",
		"m type=bind,src=/a,dst=/b,bind-propagation=warp": "",
		"m type=bind,src=/a,dst=/b,ro=maybe":              "",
		"m type=bind,src=/a,dst=/b,upper=1":               "",
		"m type=bind,src=/a,dst=/b\ntype=bind":            "",
		"m dst=/t":                                        "",
		"m type=tmpfs,dst=/t,tmpfs-mode=99":               "",
		"t /t:size=1m,mode=700,suid":                      "tmpfs tmpfs /t noexec,nodev,size=1m,mode=700,suid",
		"t /t:size=1m,source=/dev/sda":                    "",
		"t t":                                             "",
	} {
		kind, text, _ := strings.Cut(in, " ")
		parse := map[string]func(string) (specs.Mount, error){"v": ParseVolume, "m": ParseMount, "t": ParseTmpfs}[kind]
		m, err := parse(text)
		got := fmt.Sprintf("%s %s %s %s", m.Type, m.Source, m.Destination, strings.Join(m.Options, ","))
		switch {
		case want == "" && (err == nil || !errdefs.IsInvalidArgument(err)):
			t.Errorf("%q: %s %v, want an invalid argument", in, got, err)
		case want != "" && (err != nil || got != want):
			t.Errorf("%q: %s %v, want %s", in, got, err, want)
		}
	}
}

func TestParseNumbers(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "1": 1, "10b": 10, "1k": 1024, "1.5K": 1536, "2MiB": 2 << 20, "3 gb": 3 << 30, "1t": 1 << 40,
		"": -1, "x": -1, "-1": -1, "1kk": -1, "1e3": -1, "0x10": -1, "9999999p": -1, "b": -1, "1.2.3": -1, "inf": -1} {
		got, err := ParseBytes(in)
		if want < 0 && err == nil || want >= 0 && (err != nil || got != want) {
			t.Errorf("%q: %d %v, want %d", in, got, err, want)
		}
	}
	for in, want := range map[string]float64{"1": 1, "0.5": 0.5, "0": -1, "": -1, "1e2": -1, "-1": -1, "nan": -1} {
		got, err := ParseCPUs(in)
		if want < 0 && err == nil || want >= 0 && (err != nil || got != want) {
			t.Errorf("%q: %g %v, want %g", in, got, err, want)
		}
	}
}

func TestParseDevice(t *testing.T) {
	f := HostFacts{Devices: []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}}}
	d, access, err := ParseDevice(f, "/dev/fuse:/dev/x:rw")
	if err != nil || d.Path != "/dev/x" || d.Minor != 229 || access != "rw" {
		t.Errorf("%+v %s %v", d, access, err)
	}
	for in, class := range map[string]func(error) bool{"/dev/none": errdefs.IsNotFound, "/dev/fuse:x": errdefs.IsInvalidArgument, "/dev/fuse:/x:rr": errdefs.IsInvalidArgument,
		"/dev/fuse:/x:": errdefs.IsInvalidArgument, "/dev/fuse:/x:r:w": errdefs.IsInvalidArgument, "/dev/fuse:/x:rwx": errdefs.IsInvalidArgument} {
		if _, _, err := ParseDevice(f, in); !class(err) {
			t.Errorf("%s: %v", in, err)
		}
	}
}

// What an image says does not steer the daemon.
//
// contract: 1.5.19, 1.5.22
func TestImageIsNotTrusted(t *testing.T) {
	want := map[string]string{"app": "x", StopSignalLabel: "SIGQUIT", "containerd.io/mine": "1"}
	if d := cmp.Diff(want, ContainerLabels(image, map[string]string{"containerd.io/mine": "1"})); d != "" {
		t.Error(d)
	}
	for in, out := range map[string]string{"": "SIGTERM", "9": "9", "SIGRTMIN+3": "SIGRTMIN+3", "x; rm": "SIGTERM", "int": "INT"} {
		if got := ContainerLabels(ocispec.ImageConfig{StopSignal: in}, nil)[StopSignalLabel]; got != out {
			t.Errorf("stop signal %q: %q, want %q", in, got, out)
		}
	}
	if d := cmp.Diff([]string{"/data", "/etc"}, ImageVolumes(image)); d != "" {
		t.Error(d)
	}
	s, err := Generate(facts, "a", "b", image, users())
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Annotations) != 0 || s.Hooks != nil {
		t.Errorf("annotations %v hooks %v", s.Annotations, s.Hooks)
	}
}

func TestEnv(t *testing.T) {
	got := MergeEnv([]string{"A=1", "B=2", "A=3"}, []string{"C=4", "B", "A=5", "C", "D="})
	if d := cmp.Diff([]string{"A=5", "D="}, got); d != "" {
		t.Error(d)
	}
	lookup := func(k string) (string, bool) { return "host", k == "FROM_HOST" }
	env, err := ParseEnvFile(strings.NewReader("\ufeffA=1\r\n# no\n\n  B= x y \nFROM_HOST\nMISSING\nQ=\"q\"\n"), lookup)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"A=1", "B= x y ", "FROM_HOST=host", `Q="q"`}, env); d != "" {
		t.Error(d)
	}
	for in, part := range map[string]string{"A=1\n=x": "line 2", "A b=1": "line 1", "A=\x00": "line 1", "A=" + strings.Repeat("x", maxEnvLine): "longer"} {
		if _, err := ParseEnvFile(strings.NewReader(in), nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), part) {
			t.Errorf("%.20q: %v, want %s", in, err, part)
		}
	}
	if _, err := ParseEnvFile(&endless{text: "A=1\n"}, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("endless file: %v", err)
	}
}
