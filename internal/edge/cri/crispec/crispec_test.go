package crispec

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/oci"
)

var update = flag.Bool("update", false, "write the golden files")

// testHost depends on nothing of the machine that the test runs on.
func testHost() Host {
	return Host{
		HostFacts: oci.HostFacts{Arch: "amd64", Kernel: [2]int{6, 8}, CgroupV2: true, AppArmor: AppArmorDefault,
			Devices: []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, {Path: "/dev/sda", Type: "b", Major: 8}}},
		Hostname: "node1", Swap: true, HugeTLB: true, OOMScoreAdj: -999, OOMScoreLowerable: true,
		RecursiveReadOnly: true, IDMapMounts: true, UserNamespaces: true,
		AppArmorLoaded: func(p string) bool { return p == AppArmorDefault || p == "mine" },
	}
}

func sandboxInput() SandboxInput {
	return SandboxInput{
		ID: "pod1", Host: testHost(), RuntimeConfig: cristate.DefaultRuntimeConfig(), ImageName: "registry.k8s.io/pause:3.10.2",
		Image: ocispec.ImageConfig{Entrypoint: []string{"/pause"}, Env: []string{"PATH=/bin"}}, NetNSPath: "/run/netns/cni-1", Dir: "/run/pod1",
		Config: &runtime.PodSandboxConfig{
			Metadata: &runtime.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u-1", Attempt: 2}, Hostname: "web", LogDirectory: "/var/log/pods/web",
			Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: "/kubepods/burstable/podu-1", SecurityContext: &runtime.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER},
				Seccomp:          &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault},
			}},
		},
	}
}

// testMasked and testReadonly are what a kubelet asks for, shortened.
var testMasked, testReadonly = []string{"/proc/kcore"}, []string{"/proc/sys"}

func containerInput() ContainerInput {
	pod := sandboxInput()
	return ContainerInput{
		ID: "ctr1", PodID: "pod1", Pod: pod.Config, Host: pod.Host, RuntimeConfig: pod.RuntimeConfig, PodDir: "/run/pod1", ImageName: "docker.io/library/app:1",
		Image:      ocispec.ImageConfig{Entrypoint: []string{"/app"}, Cmd: []string{"serve"}, Env: []string{"PATH=/bin", "A=image"}, WorkingDir: "/srv", User: "web"},
		Namespaces: map[string]string{"network": "/run/netns/cni-1", "ipc": "/proc/77/ns/ipc", "uts": "/proc/77/ns/uts"},
		User:       specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{1001, 10}},
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: "app"}, Image: &runtime.ImageSpec{Image: "docker.io/library/app:1"},
			Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}, MaskedPaths: testMasked, ReadonlyPaths: testReadonly,
			}},
		},
	}
}

func userns(l uint32) *runtime.UserNamespace {
	m := []*runtime.IDMapping{{HostId: 65536, ContainerId: 0, Length: l}}
	return &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: m, Gids: m}
}

func (in *ContainerInput) sc() *runtime.LinuxContainerSecurityContext {
	return in.Config.Linux.SecurityContext
}

func (in *ContainerInput) podSC() *runtime.LinuxSandboxSecurityContext {
	return in.Pod.Linux.SecurityContext
}

func (in *ContainerInput) privileged() {
	in.sc().Privileged, in.podSC().Privileged = true, true
}

// The table of pods whose specifications are golden.
var sandboxCases = map[string]func(*SandboxInput){
	"default": func(*SandboxInput) {},
	"host-namespaces": func(in *SandboxInput) {
		in.Config.Hostname = ""
		o := in.Config.Linux.SecurityContext.NamespaceOptions
		o.Network, o.Pid, o.Ipc = runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE
	},
	"userns": func(in *SandboxInput) {
		in.Config.Linux.SecurityContext.NamespaceOptions.UsernsOptions = userns(65536)
		in.UserNSPath = "/run/userns/pod1"
	},
	"userns-host-network": func(in *SandboxInput) {
		o := in.Config.Linux.SecurityContext.NamespaceOptions
		o.UsernsOptions, o.Network = userns(4), runtime.NamespaceMode_NODE
	},
	"systemd-resources": func(in *SandboxInput) {
		in.Host.SystemdCgroup = true
		in.Config.Linux.CgroupParent = "/kubepods.slice/kubepods-podu_1.slice"
		in.Config.Linux.Resources = &runtime.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 1 << 30}
		in.Config.Linux.Sysctls = map[string]string{"net.core.somaxconn": "1024", "kernel.shm_rmid_forced": "1", "net/ipv4/ip_unprivileged_port_start": "80"}
		in.Config.Annotations = map[string]string{"io.kata.x": "1", "other": "2", cristate.AnnotationUntrustedWorkload: "true", cristate.AnnotationSandboxID: "forged"}
		in.Runtime.PodAnnotations = []string{"io.kata.*", cristate.AnnotationSandboxID, "["}
	},
	"privileged": func(in *SandboxInput) {
		sc := in.Config.Linux.SecurityContext
		sc.Privileged = true
		in.ProcessLabel, in.MountLabel = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"
	},
	"v1-old-kernel": func(in *SandboxInput) {
		in.Host = Host{HostFacts: oci.HostFacts{Arch: "arm64", Kernel: [2]int{4, 4}}, OOMScoreAdj: 0}
		in.Config.Linux.SecurityContext.Seccomp = nil
		in.RuntimeConfig.EnableUnprivilegedPorts, in.RuntimeConfig.EnableUnprivilegedICMP = false, false
		in.Config.Linux.CgroupParent = ""
		in.User = specs.User{UID: 65535, GID: 65535}
	},
}

var baseSpec = &specs.Spec{
	Version: "1.1.0", Hooks: &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/opt/hook"}}}, Annotations: map[string]string{"admin": "yes"},
	Process: &specs.Process{Env: []string{"ADMIN=1"}, Cwd: "/admin", ApparmorProfile: "mine", Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 4096, Soft: 4096}},
		Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN", "CAP_KILL"}}},
	Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/dev/shm", Type: "tmpfs", Source: "shm"}, {Destination: "/run", Type: "tmpfs"}},
	Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}},
		Seccomp:   &specs.LinuxSeccomp{DefaultAction: specs.ActLog},
		Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}}},
}

// The table of containers whose specifications are golden.
var containerCases = map[string]func(*ContainerInput){
	"default": func(*ContainerInput) {},
	"process": func(in *ContainerInput) {
		c := in.Config
		c.Command, c.Args, c.WorkingDir, c.Tty = []string{"/bin/sh"}, []string{"-c", "true"}, "/tmp", true
		c.Envs = []*runtime.KeyValue{{Key: "A", Value: []byte("config")}, {Key: "B", Value: []byte("x=y")}}
	},
	"security": func(in *ContainerInput) {
		sc := in.sc()
		sc.ReadonlyRootfs, sc.NoNewPrivs = true, true
		sc.Capabilities = &runtime.Capability{AddCapabilities: []string{"net_admin", "CAP_SYS_TIME"}, DropCapabilities: []string{"ALL", "SYS_TIME"}, AddAmbientCapabilities: []string{"KILL"}}
		sc.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "/profiles/mine.json"}
		in.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActKill}
		sc.Apparmor = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "mine"}
		in.ProcessLabel, in.MountLabel = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"
	},
	"seccomp-default": func(in *ContainerInput) {
		in.sc().Seccomp = &runtime.SecurityProfile{}
		in.sc().Capabilities = &runtime.Capability{AddCapabilities: []string{"ALL"}, DropCapabilities: []string{"SYS_ADMIN"}}
	},
	"privileged": func(in *ContainerInput) {
		in.privileged()
		in.sc().Seccomp, in.sc().Apparmor = &runtime.SecurityProfile{}, &runtime.SecurityProfile{}
		in.ProcessLabel, in.MountLabel = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"
	},
	"privileged-without-host-devices": func(in *ContainerInput) {
		in.privileged()
		in.Runtime.PrivilegedWithoutHostDevices = true
	},
	"privileged-any-device": func(in *ContainerInput) {
		in.privileged()
		in.Runtime.PrivilegedWithoutHostDevices, in.Runtime.PrivilegedWithoutHostDevicesAllDevicesAllowed = true, true
	},
	"userns": func(in *ContainerInput) {
		in.podSC().NamespaceOptions.UsernsOptions, in.sc().NamespaceOptions.UsernsOptions = userns(65536), userns(65536)
		in.Namespaces["user"] = "/run/userns/pod1"
		m := []*runtime.IDMapping{{HostId: 65536, Length: 65536}}
		in.Mounts = []Mount{{Mount: &runtime.Mount{ContainerPath: "/data", HostPath: "/srv/data", UidMappings: m, GidMappings: m}}}
	},
	"userns-host-network": func(in *ContainerInput) {
		in.podSC().NamespaceOptions.UsernsOptions, in.podSC().NamespaceOptions.Network = userns(4), runtime.NamespaceMode_NODE
		in.Namespaces = map[string]string{"user": "/proc/77/ns/user", "ipc": "/proc/77/ns/ipc"}
	},
	"host-namespaces": func(in *ContainerInput) {
		for _, o := range []*runtime.NamespaceOption{in.podSC().NamespaceOptions, in.sc().NamespaceOptions} {
			o.Network, o.Pid, o.Ipc = runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE
		}
		in.Pod.Hostname, in.Namespaces = "", nil
	},
	"pod-pid": func(in *ContainerInput) {
		in.sc().NamespaceOptions.Pid, in.podSC().NamespaceOptions.Pid = runtime.NamespaceMode_POD, runtime.NamespaceMode_POD
		in.Namespaces["pid"] = "/proc/77/ns/pid"
	},
	"target-pid": func(in *ContainerInput) {
		in.sc().NamespaceOptions.Pid, in.TargetPid = runtime.NamespaceMode_TARGET, 99
	},
	"mounts": func(in *ContainerInput) {
		in.sc().ReadonlyRootfs = true
		in.Mounts = []Mount{
			{Mount: &runtime.Mount{ContainerPath: "/a/b/c/", HostPath: "/hidden"}},
			{Mount: &runtime.Mount{ContainerPath: "/a/b/c", HostPath: "/link"}, Source: "/real"},
			{Mount: &runtime.Mount{ContainerPath: "/a", HostPath: "/x", Readonly: true, Propagation: runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}},
			{Mount: &runtime.Mount{ContainerPath: "/shared", HostPath: "/x", Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL}},
			{Mount: &runtime.Mount{ContainerPath: "/rro", HostPath: "/x", Readonly: true, RecursiveReadOnly: true, MountOptions: []string{"noexec", "nosuid"}}},
			{Mount: &runtime.Mount{ContainerPath: "/img", Image: &runtime.ImageSpec{Image: "sha256:1"}}, Source: "/run/images/0"},
			{Mount: &runtime.Mount{ContainerPath: "/etc/hosts", HostPath: "/var/lib/kubelet/pods/1/etc-hosts"}},
			{Mount: &runtime.Mount{ContainerPath: "/dev/termination-log", HostPath: "/var/lib/kubelet/pods/1/term"}},
		}
		in.Volumes = []Mount{{Mount: &runtime.Mount{ContainerPath: "/a", HostPath: "/no"}}, {Mount: &runtime.Mount{ContainerPath: "/vol", HostPath: "/var/vol"}}}
	},
	"resources": func(in *ContainerInput) {
		in.Runtime.CgroupWritable, in.RuntimeConfig.DisableHugetlbController = true, false
		in.Host.RDT = true
		in.Host.BlockIO = func(class string) (*specs.LinuxBlockIO, error) {
			w := uint16(len(class))
			return &specs.LinuxBlockIO{Weight: &w}, nil
		}
		in.Pod.Annotations = map[string]string{"rdt.resources.beta.kubernetes.io/pod": "gold", "blockio.resources.beta.kubernetes.io/pod": "no", "blockio.resources.beta.kubernetes.io/container.app": "slow"}
		in.Config.Linux.Resources = &runtime.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 25000, CpuShares: 256, CpusetCpus: "0-1", CpusetMems: "0", OomScoreAdj: 900,
			MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 96 << 20, Unified: map[string]string{"pids.max": "100", "memory.oom.group": "1"},
			HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}}
	},
	"devices": func(in *ContainerInput) {
		in.RuntimeConfig.DeviceOwnershipFromSecurityContext = true
		in.sc().RunAsUser, in.sc().RunAsGroup = &runtime.Int64Value{Value: 1000}, &runtime.Int64Value{Value: 1001}
		in.Devices = []Device{{specs.LinuxDevice{Path: "/dev/gpu", Type: "c", Major: 195}, "rw"}}
		in.Config.CDIDevices = []*runtime.CDIDevice{{Name: "vendor.com/gpu=1"}, {Name: "vendor.com/gpu=1"}}
		in.Config.Annotations = map[string]string{"cdi.k8s.io/x": "vendor.com/gpu=2,vendor.com/gpu=1"}
		in.CDI = func(s *specs.Spec, devices []string) error {
			s.Process.Env = append(s.Process.Env, "CDI="+strings.Join(devices, "+"))
			return nil
		}
	},
	"annotations": func(in *ContainerInput) {
		in.Config.Annotations = map[string]string{"ok.io/a": "1", "no.io/a": "1", "both.io/a": "container's", cristate.AnnotationImageName: "forged", cristate.AnnotationSandboxMemory: "1"}
		in.Pod.Annotations = map[string]string{"pod.io/a": "1", "pod.io/b/c": "no", "both.io/a": "pod's"}
		in.Runtime.ContainerAnnotations, in.Runtime.PodAnnotations = []string{"ok.io/*", "both.io/*", "io.kubernetes.cri.*"}, []string{"pod.io/*", "both.io/*"}
	},
	"base": func(in *ContainerInput) { in.Base = baseSpec },
	"base-default-profiles": func(in *ContainerInput) {
		in.Base = baseSpec
		in.sc().Seccomp, in.sc().Apparmor = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, &runtime.SecurityProfile{}
	},
}

// contract: 7.3.1, 7.3.2, 7.3.3, 7.3.4, 7.3.5, 7.3.7, 7.3.8, 7.3.10, 7.3.12, 7.3.13, 7.3.15, 7.3.18, 7.3.28
func TestGolden(t *testing.T) {
	seen := map[string]bool{}
	check := func(t *testing.T, name string, s *specs.Spec, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		// The default filter is oci's own golden file.
		if s.Linux.Seccomp != nil && len(s.Linux.Seccomp.Syscalls) > 5 {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: "the default profile"}
		}
		got, err := json.MarshalIndent(s, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, '\n')
		file := filepath.Join("testdata", name+".json")
		seen[filepath.Base(file)] = true
		if *update {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), string(got)); d != "" {
			t.Errorf("%s (-want +got), -update if that is meant:\n%s", file, d)
		}
	}
	for name, change := range sandboxCases {
		t.Run("sandbox-"+name, func(t *testing.T) {
			in := sandboxInput()
			change(&in)
			s, err := Sandbox(in)
			check(t, "sandbox-"+name, s, err)
		})
	}
	for name, change := range containerCases {
		t.Run("container-"+name, func(t *testing.T) {
			in := containerInput()
			change(&in)
			s, err := Container(in)
			check(t, "container-"+name, s, err)
		})
	}
	files, err := os.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !f.IsDir() && !seen[f.Name()] && !t.Failed() && flag.Lookup("test.run").Value.String() == "" {
			t.Errorf("testdata/%s belongs to no case", f.Name())
		}
	}
}

// container makes a specification of a changed input.
func container(t *testing.T, change func(*ContainerInput)) *specs.Spec {
	t.Helper()
	in := containerInput()
	change(&in)
	s, err := Container(in)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestRights says what matters of capabilities and privileges, whatever is
// asked for (class C2).
//
// contract: 7.3.7, 7.3.8
func TestRights(t *testing.T) {
	for name, change := range containerCases {
		s := container(t, change)
		in := containerInput()
		change(&in)
		p, privileged := s.Process, in.sc().GetPrivileged()
		if len(p.Capabilities.Ambient)+len(p.Capabilities.Inheritable) > 0 {
			t.Errorf("%s: ambient %q, inheritable %q", name, p.Capabilities.Ambient, p.Capabilities.Inheritable)
		}
		if !slices.Equal(p.Capabilities.Bounding, p.Capabilities.Effective) || !slices.Equal(p.Capabilities.Bounding, p.Capabilities.Permitted) {
			t.Errorf("%s: capabilities differ between their sets", name)
		}
		if slices.Contains(p.Capabilities.Bounding, "CAP_SYS_ADMIN") != privileged {
			t.Errorf("%s: SYS_ADMIN is %v", name, !privileged)
		}
		if !slices.Contains(p.User.AdditionalGids, p.User.GID) {
			t.Errorf("%s: the primary group %d is not among %d", name, p.User.GID, p.User.AdditionalGids)
		}
		if masked := len(s.Linux.MaskedPaths) > 0 && len(s.Linux.ReadonlyPaths) > 0; masked == privileged {
			t.Errorf("%s: masked %q, read-only %q", name, s.Linux.MaskedPaths, s.Linux.ReadonlyPaths)
		}
		if p.NoNewPrivileges != in.sc().NoNewPrivs || s.Root.Readonly != in.sc().ReadonlyRootfs {
			t.Errorf("%s: no new privileges %v, read-only root %v", name, p.NoNewPrivileges, s.Root.Readonly)
		}
		hasCgroupNS := slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace })
		if hasCgroupNS == privileged {
			t.Errorf("%s: a cgroup namespace of its own is %v", name, hasCgroupNS)
		}
		for _, m := range s.Mounts {
			kernel := m.Type == "sysfs" || m.Type == "cgroup"
			writable := slices.Contains(m.Options, "rw")
			if kernel && writable != (privileged || m.Type == "cgroup" && in.Runtime.CgroupWritable) {
				t.Errorf("%s: %s is writable: %v", name, m.Destination, writable)
			}
		}
	}
	s := container(t, func(in *ContainerInput) { in.sc().Capabilities = &runtime.Capability{AddCapabilities: []string{"all"}} })
	if want := oci.AllCapabilities(); !slices.Equal(s.Process.Capabilities.Bounding, want) {
		t.Errorf("ALL is %q", s.Process.Capabilities.Bounding)
	}
	s = container(t, func(in *ContainerInput) {
		in.sc().Capabilities = &runtime.Capability{AddCapabilities: []string{"SYS_TIME"}, DropCapabilities: []string{"ALL"}}
	})
	if got := s.Process.Capabilities.Bounding; !slices.Equal(got, []string{"CAP_SYS_TIME"}) {
		t.Errorf("ALL dropped and one added are %q", got)
	}
	s = container(t, func(in *ContainerInput) { in.sc().MaskedPaths, in.sc().ReadonlyPaths = nil, nil })
	if len(s.Linux.MaskedPaths)+len(s.Linux.ReadonlyPaths) > 0 {
		t.Error("an unmasked proc is masked")
	}
	s = container(t, func(in *ContainerInput) { in.RuntimeConfig.DisableProcMount = true })
	if slices.Equal(s.Linux.MaskedPaths, testMasked) || len(s.Linux.MaskedPaths) == 0 {
		t.Error("disable_proc_mount does not keep the defaults")
	}
}

// TestHostDirectories: with a directory of the host comes what is mounted below
// it there, and not what would be by default.
//
// contract: 7.3.10
func TestHostDirectories(t *testing.T) {
	for dst, want := range map[string]string{
		"/data":    "/proc /dev /dev/pts /dev/mqueue /sys /sys/fs/cgroup /data /dev/shm",
		"/sys":     "/proc /dev /dev/pts /dev/mqueue /sys /dev/shm",
		"/sys/fs/": "/proc /dev /dev/pts /dev/mqueue /sys /sys/fs /dev/shm",
		"/dev":     "/proc /dev /sys /sys/fs/cgroup /dev/shm",
		"/proc":    "/proc /dev /dev/pts /dev/mqueue /sys /sys/fs/cgroup /dev/shm",
	} {
		s := container(t, func(in *ContainerInput) {
			in.Mounts = []Mount{{Mount: &runtime.Mount{ContainerPath: dst, HostPath: "/host"}}}
		})
		var got []string
		for _, m := range s.Mounts {
			if !strings.HasPrefix(m.Destination, "/etc/") {
				got = append(got, m.Destination)
			}
			if m.Destination == path.Clean(dst) && m.Source != "/host" {
				t.Errorf("%s is %v", dst, m)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %q, want %s", dst, got, want)
		}
	}
}

// TestCgroupWritable: not for version 1.
//
// contract: 7.3.14
func TestCgroupWritable(t *testing.T) {
	for _, v2 := range []bool{false, true} {
		s := container(t, func(in *ContainerInput) { in.Runtime.CgroupWritable, in.Host.CgroupV2 = true, v2 })
		i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == cgroupDir })
		if i < 0 || slices.Contains(s.Mounts[i].Options, "rw") != v2 {
			t.Errorf("cgroup version 2 %v: mount %v", v2, s.Mounts)
		}
	}
}

// TestProfiles walks through what can be said about seccomp and AppArmor.
//
// contract: 7.3.4, 7.3.5
func TestProfiles(t *testing.T) {
	sp := func(t runtime.SecurityProfile_ProfileType, ref string) *runtime.SecurityProfile {
		return &runtime.SecurityProfile{ProfileType: t, LocalhostRef: ref}
	}
	const def, unconfined, local = runtime.SecurityProfile_RuntimeDefault, runtime.SecurityProfile_Unconfined, runtime.SecurityProfile_Localhost
	mine := &specs.LinuxSeccomp{DefaultAction: specs.ActKill}
	for _, tc := range []struct {
		name  string
		field *runtime.SecurityProfile
		old   string
		unset string
		want  string // of seccomp: none, default, mine, or the class of an error
		armor string // of AppArmor
	}{
		{name: "unset", want: "none", armor: AppArmorDefault},
		{name: "unset is default", unset: "runtime/default", want: "default", armor: AppArmorDefault},
		{name: "unset is a file", unset: "localhost//p.json", want: "mine", armor: AppArmorDefault},
		{name: "bad unset", unset: "x", want: "invalid argument", armor: AppArmorDefault},
		{name: "default", field: sp(def, ""), want: "default", armor: AppArmorDefault},
		{name: "unconfined", field: sp(unconfined, ""), unset: "runtime/default", want: "none", armor: ""},
		{name: "localhost", field: sp(local, "mine"), want: "mine", armor: "mine"},
		{name: "localhost with prefix", field: sp(local, "localhost/mine"), want: "mine", armor: "mine"},
		{name: "no name", field: sp(local, ""), want: "invalid argument", armor: "invalid argument"},
		{name: "unknown type", field: sp(7, ""), want: "invalid argument", armor: "invalid argument"},
		{name: "not loaded", field: sp(local, "other"), want: "mine", armor: "not found"},
		{name: "old default", old: "runtime/default", want: "default", armor: AppArmorDefault},
		{name: "old unconfined", old: "unconfined", want: "none", armor: ""},
		{name: "old localhost", old: "localhost/mine", want: "mine", armor: "mine"},
		{name: "old nonsense", old: "/etc/x", want: "invalid argument", armor: "invalid argument"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, armor := range []bool{false, true} {
				in := containerInput()
				in.Seccomp, in.RuntimeConfig.UnsetSeccompProfile = mine, tc.unset
				want := tc.want
				if armor {
					in.sc().Apparmor, in.sc().ApparmorProfile, in.RuntimeConfig.UnsetSeccompProfile, want = tc.field, tc.old, "", tc.armor
				} else {
					in.sc().Seccomp, in.sc().SeccompProfilePath = tc.field, tc.old
				}
				s, err := Container(in)
				got := ""
				switch {
				case errdefs.IsInvalidArgument(err):
					got = "invalid argument"
				case errdefs.IsNotFound(err):
					got = "not found"
				case err != nil:
					t.Fatal(err)
				case armor:
					got = s.Process.ApparmorProfile
				case s.Linux.Seccomp == nil:
					got = "none"
				case reflect.DeepEqual(s.Linux.Seccomp, mine):
					got = "mine"
				case len(s.Linux.Seccomp.Syscalls) > 5:
					got = "default"
				}
				if got != want {
					t.Errorf("AppArmor %v: got %q (%v), want %q", armor, got, err, want)
				}
				// Privileged ones ignore the filter, and the default of AppArmor.
				in.privileged()
				s, err = Container(in)
				if armor && want == AppArmorDefault {
					want = ""
				}
				switch {
				case err != nil && !(armor && strings.Contains("invalid argument, not found", want) && want != ""):
					t.Error(err)
				case err == nil && !armor && s.Linux.Seccomp != nil, err == nil && armor && s.Process.ApparmorProfile != want:
					t.Errorf("privileged: %v, %q", s.Linux.Seccomp, s.Process.ApparmorProfile)
				}
			}
		})
	}
	// A host without them: loudly, unless nothing was asked for.
	for _, tc := range []struct {
		p   *runtime.SecurityProfile
		bad bool
	}{{nil, false}, {sp(unconfined, ""), false}, {sp(def, ""), true}, {sp(local, "/mine"), true}} {
		in := containerInput()
		in.Host.NoSeccomp, in.Host.AppArmor = true, ""
		in.sc().Seccomp = tc.p
		if _, err := Container(in); errdefs.IsFailedPrecondition(err) != tc.bad {
			t.Errorf("seccomp %v: %v", tc.p, err)
		}
		in.sc().Seccomp, in.sc().Apparmor = nil, tc.p
		if _, err := Container(in); errdefs.IsFailedPrecondition(err) != tc.bad {
			t.Errorf("AppArmor %v: %v", tc.p, err)
		}
	}
	for _, tc := range []struct {
		field *runtime.SecurityProfile
		old   string
		unset string
		want  string
		err   error
	}{
		{sp(local, "/p/a.json"), "", "", "/p/a.json", nil}, {nil, "localhost//p/a.json", "", "/p/a.json", nil}, {nil, "", "localhost//p", "/p", nil},
		{sp(def, ""), "localhost//p", "", "", nil}, {nil, "", "", "", nil}, {sp(local, "a.json"), "", "", "", errdefs.ErrInvalidArgument},
	} {
		cfg := cristate.RuntimeConfig{UnsetSeccompProfile: tc.unset}
		if got, err := SeccompRef(tc.field, tc.old, false, cfg); got != tc.want || !errors.Is(err, tc.err) {
			t.Errorf("SeccompRef(%v, %q, %q) = %q, %v", tc.field, tc.old, tc.unset, got, err)
		}
		if got, err := SeccompRef(tc.field, tc.old, true, cfg); got != "" || err != nil {
			t.Errorf("privileged: %q, %v", got, err)
		}
	}
	if p, err := ParseSeccomp([]byte(`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`)); err != nil || len(p.Syscalls) != 1 {
		t.Errorf("profile %v, %v", p, err)
	}
	for _, bad := range []string{"", "{}", "[]", `{"defaultAction":"ALLOW"}`, `{"defaultAction":"SCMP_ACT_ALLOW"` + strings.Repeat(" ", MaxSeccomp) + "}"} {
		if _, err := ParseSeccomp([]byte(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.30q: %v", bad, err)
		}
	}
}

// TestHostileImage gives an image every string that could steer something
// (class C5): nothing of it is anywhere but in the process and its environment.
func TestHostileImage(t *testing.T) {
	const evil = "evil-payload"
	hostile := ocispec.ImageConfig{
		User: evil, Env: []string{"X=" + evil, evil, "LD_PRELOAD=" + evil}, Entrypoint: []string{evil}, Cmd: []string{evil}, WorkingDir: "/" + evil, StopSignal: evil,
		Volumes: map[string]struct{}{"/" + evil: {}}, ExposedPorts: map[string]struct{}{evil: {}},
		Labels: map[string]string{evil: evil, "cdi.k8s.io/" + evil: "vendor.com/gpu=1", "io.kubernetes.cri." + evil: evil, "org.systemd.property." + evil: evil},
	}
	in, pod := containerInput(), sandboxInput()
	in.Image, pod.Image = hostile, hostile
	in.Runtime = cristate.Runtime{ContainerAnnotations: []string{"*", "*/*"}, PodAnnotations: []string{"*", "*/*"}}
	in.CDI = func(*specs.Spec, []string) error { return fmt.Errorf("devices from an image") }
	pod.Runtime = in.Runtime
	c, err := Container(in)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Sandbox(pod)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*specs.Spec{c, p} {
		s.Process.Args, s.Process.Env, s.Process.Cwd = nil, nil, ""
		out, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if i := bytes.Index(out, []byte(evil)); i >= 0 {
			t.Errorf("...%s...", out[max(0, i-60):min(len(out), i+60)])
		}
		if s.Hooks != nil || len(s.Linux.Devices) > 0 {
			t.Errorf("hooks %v, devices %v", s.Hooks, s.Linux.Devices)
		}
	}
	// A working directory that is an open file of the host's (class C2).
	for _, dir := range []string{"/proc/self/fd/7", "/proc/1/cwd", "/dev/fd/8", "/x/../proc/self/fd/3"} {
		in := containerInput()
		in.Image.WorkingDir = dir
		if _, err := Container(in); !errdefs.IsInvalidArgument(err) {
			t.Errorf("working directory %s: %v", dir, err)
		}
	}
}

// TestRefused: what cannot be, with its class, never a panic.
func TestRefused(t *testing.T) {
	mount := func(m *runtime.Mount) func(*ContainerInput) {
		return func(in *ContainerInput) { in.Mounts = []Mount{{Mount: m}} }
	}
	res := func(r *runtime.LinuxContainerResources) func(*ContainerInput) {
		return func(in *ContainerInput) { in.Config.Linux.Resources = r }
	}
	invalid, failed := errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition
	m := []*runtime.IDMapping{{HostId: 1, Length: 1}}
	for name, tc := range map[string]struct {
		want   error
		change func(*ContainerInput)
	}{
		"privileged in a pod that is not": {invalid, func(in *ContainerInput) { in.sc().Privileged = true }},
		"unknown capability":              {invalid, func(in *ContainerInput) { in.sc().Capabilities = &runtime.Capability{AddCapabilities: []string{"FLY"}} }},
		"relative masked path":            {invalid, func(in *ContainerInput) { in.sc().MaskedPaths = []string{"../x"} }},
		"relative mount":                  {invalid, mount(&runtime.Mount{ContainerPath: "/a", HostPath: "b"})},
		"mount over the root":             {invalid, mount(&runtime.Mount{ContainerPath: "/a/..", HostPath: "/b"})},
		"mount nowhere":                   {invalid, mount(&runtime.Mount{HostPath: "/b"})},
		"nil mount":                       {invalid, mount(nil)},
		"NUL in a mount":                  {invalid, mount(&runtime.Mount{ContainerPath: "/a\x00", HostPath: "/b"})},
		"rro and writable":                {invalid, mount(&runtime.Mount{ContainerPath: "/a", HostPath: "/b", RecursiveReadOnly: true})},
		"rro and propagated":              {invalid, mount(&runtime.Mount{ContainerPath: "/a", HostPath: "/b", Readonly: true, RecursiveReadOnly: true, Propagation: 1})},
		"unknown propagation":             {invalid, mount(&runtime.Mount{ContainerPath: "/a", HostPath: "/b", Propagation: 9})},
		"unknown option":                  {invalid, mount(&runtime.Mount{ContainerPath: "/a", HostPath: "/b", MountOptions: []string{"upperdir=/"}})},
		"half an id mapping":              {invalid, mount(&runtime.Mount{ContainerPath: "/a", HostPath: "/b", UidMappings: m})},
		"empty id mapping":                {invalid, mount(&runtime.Mount{ContainerPath: "/a", HostPath: "/b", GidMappings: m, UidMappings: []*runtime.IDMapping{{}}})},
		"rro on a host without": {failed, func(in *ContainerInput) {
			mount(&runtime.Mount{ContainerPath: "/a", HostPath: "/b", Readonly: true, RecursiveReadOnly: true})(in)
			in.Host.RecursiveReadOnly = false
		}},
		"id mapping on a host without": {failed, func(in *ContainerInput) {
			mount(&runtime.Mount{ContainerPath: "/a", HostPath: "/b", UidMappings: m, GidMappings: m})(in)
			in.Host.IDMapMounts = false
		}},
		"network of another":            {invalid, func(in *ContainerInput) { in.sc().NamespaceOptions.Network = runtime.NamespaceMode_TARGET }},
		"pid namespace of mode 9":       {invalid, func(in *ContainerInput) { in.sc().NamespaceOptions.Pid = 9 }},
		"target that is gone":           {failed, func(in *ContainerInput) { in.sc().NamespaceOptions.Pid = runtime.NamespaceMode_TARGET }},
		"shared pid namespace without":  {failed, func(in *ContainerInput) { in.sc().NamespaceOptions.Pid, in.podSC().NamespaceOptions.Pid = 0, 0 }},
		"host's pids in a pod without":  {invalid, func(in *ContainerInput) { in.sc().NamespaceOptions.Pid = runtime.NamespaceMode_NODE }},
		"pod without network":           {failed, func(in *ContainerInput) { delete(in.Namespaces, "network") }},
		"other user namespace than pod": {invalid, func(in *ContainerInput) { in.sc().NamespaceOptions.UsernsOptions = userns(9) }},
		"two mappings": {invalid, func(in *ContainerInput) {
			u := userns(9)
			u.Uids = slices.Repeat(u.Uids, 2)
			in.podSC().NamespaceOptions.UsernsOptions = u
		}},
		"mapping that overflows": {invalid, func(in *ContainerInput) { in.podSC().NamespaceOptions.UsernsOptions = userns(1<<32 - 1) }},
		"mappings of the host's": {invalid, func(in *ContainerInput) {
			u := userns(9)
			u.Mode = runtime.NamespaceMode_NODE
			in.podSC().NamespaceOptions.UsernsOptions = u
		}},
		"user namespace of a target": {invalid, func(in *ContainerInput) {
			u := userns(9)
			u.Mode = runtime.NamespaceMode_TARGET
			in.podSC().NamespaceOptions.UsernsOptions = u
		}},
		"user namespace on a host without": {failed, func(in *ContainerInput) {
			in.podSC().NamespaceOptions.UsernsOptions = userns(9)
			in.Host.UserNamespaces = false
		}},
		"user namespace that is not there": {failed, func(in *ContainerInput) { in.podSC().NamespaceOptions.UsernsOptions = userns(9) }},
		"negative shares":                  {invalid, res(&runtime.LinuxContainerResources{CpuShares: -1})},
		"negative memory":                  {invalid, res(&runtime.LinuxContainerResources{MemoryLimitInBytes: -2})},
		"swap below memory":                {invalid, res(&runtime.LinuxContainerResources{MemoryLimitInBytes: 2, MemorySwapLimitInBytes: 1})},
		"cpu set":                          {invalid, res(&runtime.LinuxContainerResources{CpusetCpus: "0\n1"})},
		"oom score":                        {invalid, res(&runtime.LinuxContainerResources{OomScoreAdj: 1 << 40})},
		"huge page size":                   {invalid, res(&runtime.LinuxContainerResources{HugepageLimits: []*runtime.HugepageLimit{{PageSize: "../2MB"}}})},
		"unified path":                     {invalid, res(&runtime.LinuxContainerResources{Unified: map[string]string{"../cgroup.procs": "1"}})},
		"unified on version 1": {failed, func(in *ContainerInput) {
			res(&runtime.LinuxContainerResources{Unified: map[string]string{"pids.max": "1"}})(in)
			in.Host.CgroupV2 = false
		}},
		"huge pages without controller": {failed, func(in *ContainerInput) {
			res(&runtime.LinuxContainerResources{HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB"}}})(in)
			in.Host.HugeTLB = false
			in.RuntimeConfig.DisableHugetlbController, in.RuntimeConfig.TolerateMissingHugetlbController = false, false
		}},
		"block I/O class on host without": {failed, func(in *ContainerInput) {
			in.Config.Annotations = map[string]string{"io.kubernetes.cri.blockio-class": "x"}
		}},
		"RDT class on a host without": {failed, func(in *ContainerInput) {
			in.Config.Annotations = map[string]string{"io.kubernetes.cri.rdt-class": "x"}
		}},
		"RDT class that is a path": {invalid, func(in *ContainerInput) {
			in.Host.RDT = true
			in.Config.Annotations = map[string]string{"io.kubernetes.cri.rdt-class": "../x"}
		}},
		"CDI device without vendor":  {invalid, func(in *ContainerInput) { in.Config.CDIDevices = []*runtime.CDIDevice{{Name: "gpu"}} }},
		"CDI in an annotation":       {invalid, func(in *ContainerInput) { in.Config.Annotations = map[string]string{"cdi.k8s.io/x": ""} }},
		"CDI that is not there":      {failed, func(in *ContainerInput) { in.Config.CDIDevices = []*runtime.CDIDevice{{Name: "v.com/gpu=1"}} }},
		"access of a device":         {invalid, func(in *ContainerInput) { in.Devices = []Device{{specs.LinuxDevice{Path: "/dev/x", Type: "c"}, "rwx"}} }},
		"no command":                 {invalid, func(in *ContainerInput) { in.Image.Entrypoint, in.Image.Cmd = nil, nil }},
		"relative working directory": {invalid, func(in *ContainerInput) { in.Config.WorkingDir = "x" }},
		"variable without a name":    {invalid, func(in *ContainerInput) { in.Config.Envs = []*runtime.KeyValue{{Value: []byte("x")}} }},
		"cgroup parent with a colon": {invalid, func(in *ContainerInput) { in.Pod.Linux.CgroupParent = "/a:b" }},
		"no slice for systemd":       {invalid, func(in *ContainerInput) { in.Host.SystemdCgroup = true }},
	} {
		t.Run(name, func(t *testing.T) {
			in := containerInput()
			tc.change(&in)
			s, err := Container(in)
			if !errors.Is(err, tc.want) || s != nil {
				t.Fatalf("got %v, %v", s != nil, err)
			}
			if !strings.Contains(err.Error(), "specification of") {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := Container(ContainerInput{ID: "x"}); err == nil {
		t.Error("a container of nothing")
	}
	if _, err := Sandbox(SandboxInput{ID: "x"}); err == nil {
		t.Error("a pod of nothing")
	}
}

// TestWarnings: what is ignored is said.
func TestWarnings(t *testing.T) {
	for want, change := range map[string]func(*ContainerInput){
		"ambient": func(in *ContainerInput) {
			in.sc().Capabilities = &runtime.Capability{AddAmbientCapabilities: []string{"KILL"}}
		},
		"swap": func(in *ContainerInput) { in.Host.Swap = false },
		"huge": func(in *ContainerInput) { in.Host.HugeTLB, in.RuntimeConfig.DisableHugetlbController = false, false },
		"OOM":  func(in *ContainerInput) { in.Host.OOMScoreAdj, in.Host.OOMScoreLowerable = 0, false },
		"block I/O": func(in *ContainerInput) {
			in.Config.Annotations, in.RuntimeConfig.Containerd.IgnoreBlockIONotEnabledErrors = map[string]string{"io.kubernetes.cri.blockio-class": "x"}, true
		},
		"RDT": func(in *ContainerInput) {
			in.Config.Annotations, in.RuntimeConfig.Containerd.IgnoreRdtNotEnabledErrors = map[string]string{"io.kubernetes.cri.rdt-class": "x"}, true
		},
		"enable_cdi": func(in *ContainerInput) {
			in.Config.CDIDevices, in.RuntimeConfig.EnableCDI = []*runtime.CDIDevice{{Name: "v.com/gpu=1"}}, false
		},
	} {
		var out bytes.Buffer
		s := container(t, func(in *ContainerInput) {
			in.Log = slog.New(slog.NewTextHandler(&out, nil))
			in.Config.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: 2 << 20, OomScoreAdj: -900,
				HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 1}}}
			change(in)
		})
		if strings.Count(out.String(), "\n") != 1 || !strings.Contains(out.String(), want) {
			t.Errorf("%s: logged %q", want, out.String())
		}
		if r := s.Linux.Resources; want == "swap" && r.Memory.Swap != nil || want == "huge" && r.HugepageLimits != nil || want == "RDT" && s.Linux.IntelRdt != nil {
			t.Errorf("%s: %v", want, r)
		}
	}
}
