package crispec

import (
	"errors"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

func imageFiles(files map[string]string) Files {
	return func(name string) (io.ReadCloser, error) {
		s, ok := files[name]
		if !ok {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		return io.NopCloser(strings.NewReader(s)), nil
	}
}

// TestUsers: who a container runs as, by request and image (class C3). The
// image's files try to make numbers into root.
//
// contract: 7.3.9
func TestUsers(t *testing.T) {
	files := imageFiles(map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/:/bin/sh\n2147483648:x:0:0::/:/bin/sh\n-1:x:0:0::/:/bin/sh\n1000x:x:7:7::/:/bin/sh\n",
		"etc/group":  "root:x:0:\nwheel:x:10:root,web\nweb:x:1001:web\naudio:x:63:web\n50:x:0:\n",
	})
	n := func(v int64) *runtime.Int64Value { return &runtime.Int64Value{Value: v} }
	const merge, strict = runtime.SupplementalGroupsPolicy_Merge, runtime.SupplementalGroupsPolicy_Strict
	for _, tc := range []struct {
		name string
		id   Identity
		uid  uint32
		gids []uint32 // the first is the primary one
		err  error
	}{
		{name: "nothing is root", gids: []uint32{0, 10}},
		{name: "nothing, strict", id: Identity{Policy: strict}, gids: []uint32{0}},
		{name: "the image's", id: Identity{ImageUser: "web"}, uid: 1000, gids: []uint32{1001, 10, 63}},
		{name: "the image's, strict", id: Identity{ImageUser: "web", Policy: strict}, uid: 1000, gids: []uint32{1001}},
		{name: "the image's with a group", id: Identity{ImageUser: "web:audio"}, uid: 1000, gids: []uint32{63, 10, 1001}},
		{name: "number of the image's", id: Identity{User: n(1000), ImageUser: "root"}, uid: 1000, gids: []uint32{1001, 10, 63}},
		{name: "unknown number", id: Identity{User: n(4711), ImageUser: "root"}, uid: 4711, gids: []uint32{0}},
		{name: "name", id: Identity{Username: "web", ImageUser: "root"}, uid: 1000, gids: []uint32{1001, 10, 63}},
		{name: "number and group", id: Identity{User: n(1000), Group: n(5)}, uid: 1000, gids: []uint32{5, 10, 1001, 63}},
		{name: "number and group, strict", id: Identity{User: n(1000), Group: n(5), Groups: []int64{7, 5}, Policy: strict}, uid: 1000, gids: []uint32{5, 7}},
		{name: "supplemental", id: Identity{Username: "web", Groups: []int64{20, 10}}, uid: 1000, gids: []uint32{1001, 10, 63, 20}},
		{name: "largest", id: Identity{User: n(math.MaxInt32)}, uid: math.MaxInt32, gids: []uint32{0}},
		{name: "too large", id: Identity{User: n(math.MaxInt32 + 1)}, err: errdefs.ErrOutOfRange},
		{name: "wraps to root", id: Identity{User: n(1 << 32)}, err: errdefs.ErrOutOfRange},
		{name: "negative", id: Identity{User: n(-1)}, err: errdefs.ErrOutOfRange},
		{name: "group too large", id: Identity{User: n(1), Group: n(1 << 31)}, err: errdefs.ErrOutOfRange},
		{name: "supplemental too large", id: Identity{Groups: []int64{1 << 31}}, err: errdefs.ErrOutOfRange},
		{name: "supplemental negative", id: Identity{Groups: []int64{-1}}, err: errdefs.ErrOutOfRange},
		{name: "group alone", id: Identity{Group: n(5), ImageUser: "web"}, err: errdefs.ErrInvalidArgument},
		{name: "name that is a number too large", id: Identity{Username: "2147483648"}, err: errdefs.ErrOutOfRange},
		{name: "name that is a negative number", id: Identity{Username: "-1"}, err: errdefs.ErrInvalidArgument},
		{name: "name with a group", id: Identity{Username: "web:0"}, err: errdefs.ErrInvalidArgument},
		{name: "image's number too large", id: Identity{ImageUser: "2147483648"}, err: errdefs.ErrOutOfRange},
		{name: "image's group too large", id: Identity{ImageUser: "web:4294967296"}, err: errdefs.ErrOutOfRange},
		{name: "unknown name", id: Identity{Username: "nobody"}, err: errdefs.ErrNotFound},
		{name: "unknown policy", id: Identity{Policy: 5}, err: errdefs.ErrInvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			u, err := ResolveUser(tc.id, files)
			if !errors.Is(err, tc.err) {
				t.Fatalf("got %v, want %v", err, tc.err)
			}
			if err != nil {
				return
			}
			if u.UID != tc.uid || u.GID != tc.gids[0] || !slices.Equal(u.AdditionalGids, slices.Sorted(slices.Values(tc.gids))) {
				t.Errorf("got %d:%d %d, want %d %d", u.UID, u.GID, u.AdditionalGids, tc.uid, tc.gids)
			}
		})
	}
	if u, err := ResolveUser(Identity{User: n(5), Policy: merge}, nil); err != nil || u.UID != 5 {
		t.Errorf("without files: %v, %v", u, err)
	}
	broken := errors.New("broken")
	if _, err := ResolveUser(Identity{}, func(string) (io.ReadCloser, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("broken files: %v", err)
	}
	if _, err := ResolveUser(Identity{}, imageFiles(map[string]string{"etc/group": strings.Repeat("g", 2<<20)})); !errdefs.IsOutOfRange(err) {
		t.Errorf("a huge line: %v", err)
	}
	c := &runtime.ContainerConfig{Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{RunAsUser: n(0), SupplementalGroups: []int64{3}}}}
	if u, err := ResolveUser(ContainerIdentity(c, "web"), files); err != nil || u.UID != 0 || !slices.Contains(u.AdditionalGids, 3) {
		t.Errorf("run_as_user 0 is not unset: %v, %v", u, err)
	}
	p := &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{RunAsGroup: n(4), RunAsUser: n(3)}}}
	if u, err := ResolveUser(SandboxIdentity(p, ""), nil); err != nil || u.UID != 3 || u.GID != 4 {
		t.Errorf("pod's user: %v, %v", u, err)
	}
}

// contract: 7.3.13
func TestCgroupPath(t *testing.T) {
	for _, tc := range []struct {
		parent  string
		systemd bool
		want    string
		bad     bool
	}{
		{"/kubepods/podx", false, "/kubepods/podx/id", false},
		{"kubepods/../../..", false, "/id", false},
		{"", false, "/k8s.io/id", false},
		{"", true, "system.slice:cri-containerd:id", false},
		{"/kubepods.slice/kubepods-podx.slice/", true, "kubepods-podx.slice:cri-containerd:id", false},
		{"kubepods-podx.slice", true, "kubepods-podx.slice:cri-containerd:id", false},
		{"/kubepods/podx", true, "", true},
		{"/a:b.slice", true, "", true},
	} {
		got, err := CgroupPath(tc.parent, "id", tc.systemd)
		if got != tc.want || errdefs.IsInvalidArgument(err) != tc.bad {
			t.Errorf("CgroupPath(%q, %v) = %q, %v", tc.parent, tc.systemd, got, err)
		}
	}
	// runsc and kata have no option SystemdCgroup: they go by the path.
	for _, tc := range []struct{ kind, parent, want string }{
		{"io.containerd.runsc.v1", "/kubepods.slice/kubepods-podx.slice", "kubepods-podx.slice:cri-containerd:pod1"},
		{"io.containerd.kata.v2", "/kubepods/podx", "/kubepods/podx/pod1"},
		{"io.containerd.runsc.v1", "", "/k8s.io/pod1"},
		{"io.containerd.runc.v2", "/kubepods.slice/kubepods-podx.slice", "/kubepods.slice/kubepods-podx.slice/pod1"},
	} {
		in := sandboxInput()
		in.Runtime.Type, in.Config.Linux.CgroupParent = tc.kind, tc.parent
		if s, err := Sandbox(in); err != nil || s.Linux.CgroupsPath != tc.want {
			t.Errorf("%s below %q: %v", tc.kind, tc.parent, err)
		}
	}
}

// contract: 7.3.13
func TestOOMScore(t *testing.T) {
	for _, tc := range []struct {
		adj, own             int
		restrict, cap_, want bool
	}{
		{adj: -998, own: 0, want: true}, {adj: -998, own: 0, cap_: true}, {adj: -998, own: 0, cap_: true, restrict: true, want: true},
		{adj: 500, own: 0}, {adj: -998, own: -999}, {adj: -998, own: -999, restrict: true},
	} {
		want := tc.adj
		if tc.want {
			want = tc.own
		}
		got := clampOOM(tc.adj, cristate.RuntimeConfig{RestrictOOMScoreAdj: tc.restrict}, Host{OOMScoreAdj: tc.own, OOMScoreLowerable: tc.cap_})
		if got != want {
			t.Errorf("%+v: %d", tc, got)
		}
	}
}

// contract: 7.3.18
func TestSysctls(t *testing.T) {
	conf := func(o *runtime.NamespaceOption, s map[string]string) *runtime.PodSandboxConfig {
		return &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{Sysctls: s, SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: o}}}
	}
	const node = runtime.NamespaceMode_NODE
	for _, tc := range []struct {
		o    *runtime.NamespaceOption
		s    map[string]string
		want map[string]string
		bad  bool
	}{
		{want: map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}},
		{o: &runtime.NamespaceOption{UsernsOptions: userns(100)}, want: map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}},
		{o: &runtime.NamespaceOption{Network: node}, want: map[string]string{}},
		{o: &runtime.NamespaceOption{Network: node}, s: map[string]string{"kernel.sem": "1 2 3 4"}, want: map[string]string{"kernel.sem": "1 2 3 4"}},
		{s: map[string]string{"net.ipv4.ping_group_range": "5 6", "net/ipv4/ip_unprivileged_port_start": "9"},
			want: map[string]string{"net.ipv4.ip_unprivileged_port_start": "9", "net.ipv4.ping_group_range": "5 6"}},
		{o: &runtime.NamespaceOption{Network: node}, s: map[string]string{"net.core.somaxconn": "1"}, bad: true},
		{o: &runtime.NamespaceOption{Network: node}, s: map[string]string{"kernel.domainname": "x"}, bad: true},
		{o: &runtime.NamespaceOption{Ipc: node}, s: map[string]string{"kernel.shmmax": "1"}, bad: true},
		{o: &runtime.NamespaceOption{Ipc: node}, s: map[string]string{"fs.mqueue.msg_max": "1"}, bad: true},
		{s: map[string]string{"kernel.core_pattern": "|/bin/sh"}, bad: true},
		{s: map[string]string{"vm.overcommit_memory": "1"}, bad: true},
		{s: map[string]string{"net.core.somaxconn": "1+kernel.core_pattern=|/x"}, bad: true},
		{s: map[string]string{"net.core.somaxconn": "1\nkernel.x"}, bad: true},
		{s: map[string]string{"net.../../kernel/core_pattern": "1"}, bad: true},
	} {
		got, err := Sysctls(conf(tc.o, tc.s), cristate.DefaultRuntimeConfig(), testHost())
		if errdefs.IsInvalidArgument(err) != tc.bad || !tc.bad && (err != nil || !mapsEqual(got, tc.want)) {
			t.Errorf("%v %q: %q, %v", tc.o, tc.s, got, err)
		}
	}
}

func mapsEqual(a, b map[string]string) bool {
	return slices.Equal(sortedKeys(a), sortedKeys(b)) && !slices.ContainsFunc(sortedKeys(a), func(k string) bool { return a[k] != b[k] })
}

// contract: 7.1.16, 7.3.16
func TestUpdate(t *testing.T) {
	s := container(t, containerCases["resources"])
	cfg := cristate.DefaultRuntimeConfig()
	before := Resources(s).String()
	got, err := Update(s, &runtime.LinuxContainerResources{CpuShares: 2, MemoryLimitInBytes: 1 << 20, Unified: map[string]string{"pids.max": "7"}}, cfg, testHost(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if after := Resources(s).String(); after != before {
		t.Errorf("the original changed: %s", after)
	}
	l := Resources(got).Linux
	if l.CpuShares != 2 || l.CpuQuota != 25000 || l.CpusetCpus != "0-1" || l.MemoryLimitInBytes != 1<<20 || l.MemorySwapLimitInBytes != 1<<20 ||
		l.Unified["pids.max"] != "7" || l.Unified["memory.oom.group"] != "1" || l.OomScoreAdj != 900 || l.HugepageLimits[0].PageSize != "2MB" {
		t.Errorf("got %v", l)
	}
	noSwap := testHost()
	noSwap.Swap = false
	if got, err = Update(&specs.Spec{}, &runtime.LinuxContainerResources{MemoryLimitInBytes: 5}, cfg, noSwap, nil); err != nil || got.Linux.Resources.Memory.Swap != nil {
		t.Errorf("without a controller for swap: %v, %v", got, err)
	}
	if _, err := Update(s, &runtime.LinuxContainerResources{CpuQuota: -7}, cfg, testHost(), nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("negative quota: %v", err)
	}
	if got := Resources(&specs.Spec{}); got.Linux == nil {
		t.Error("no resources of an empty specification")
	}
}

// TestSELinux: options are checked on every host; labels need one with SELinux.
//
// contract: 7.3.6
func TestSELinux(t *testing.T) {
	for _, o := range []*runtime.SELinuxOption{{Level: "s0:c1,c2,"}, {Level: "x"}, {Level: "s0:c1 "}, {Type: "a:b"}, {User: "u\n"}, {Role: "r,level:s0"}} {
		if _, _, err := Labels(o, "", false); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", o, err)
		}
	}
	for _, level := range []string{"s0", "s0-s15", "s0:c1", "s0:c1,c2", "s0-s0:c0.c1023", "s0:c1.c3,c7"} {
		if !selinuxLevel.MatchString(level) {
			t.Errorf("level %s is refused", level)
		}
	}
	const pod = "system_u:system_r:spc_t:s0:c1,c2"
	for _, tc := range []struct {
		o    *runtime.SELinuxOption
		pod  string
		want string
	}{
		{nil, "", ""}, {nil, pod, "user:system_u role:system_r type:spc_t level:s0:c1,c2"}, {&runtime.SELinuxOption{}, pod, "user:system_u role:system_r type:spc_t level:s0:c1,c2"},
		{&runtime.SELinuxOption{Type: "my_t"}, pod, "type:my_t level:s0:c1,c2"}, {&runtime.SELinuxOption{Level: "s0"}, pod, "level:s0"}, {&runtime.SELinuxOption{User: "me"}, "", "user:me"},
	} {
		if got, err := labelOptions(tc.o, tc.pod); err != nil || strings.Join(got, " ") != tc.want {
			t.Errorf("%v in a pod of %q: %q, %v", tc.o, tc.pod, got, err)
		}
	}
	if _, err := labelOptions(nil, "x"); err == nil {
		t.Error("the label of a pod may be anything")
	}
	in := containerInput()
	in.privileged()
	in.ProcessLabel, in.MountLabel = "p", "m"
	if s, err := Container(in); err != nil || s.Process.SelinuxLabel != "" || s.Linux.MountLabel != "m" {
		t.Errorf("privileged: %v", err)
	}
	in.sc().SelinuxOptions = &runtime.SELinuxOption{Type: "x"}
	if s, err := Container(in); err != nil || s.Process.SelinuxLabel != "p" {
		t.Errorf("privileged with a label that was asked for: %v", err)
	}
}

// TestAppArmorText compares the profile with its golden file, and has the
// parser of the host compile it, if there is one.
//
// contract: 10.6
func TestAppArmorText(t *testing.T) {
	full := AppArmorFacts{Peers: []string{"gantryd", "/usr/sbin/runc"}, ABI: "3.0", Tunables: true, Base: true}
	text, err := AppArmorProfile(AppArmorDefault, full)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join("testdata", "apparmor", "default.txt")
	if *update {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if text != string(want) {
		t.Errorf("%s differs:\n%s", file, text)
	}
	for _, bad := range []string{"", "a b", "x\n  file,", "a{b}"} {
		if _, err := AppArmorProfile(bad, full); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", bad, err)
		}
	}
	if _, err := AppArmorProfile("x", AppArmorFacts{ABI: "3.0>"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad ABI: %v", err)
	}
	parser, err := exec.LookPath("apparmor_parser")
	if err != nil {
		t.Skip("apparmor_parser is not installed: the profile is not compiled")
	}
	text, err = AppArmorProfile(AppArmorDefault, AppArmorFacts{})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), parser, "--skip-kernel-load", "--skip-cache")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestSandboxRefused: what a pod cannot have.
func TestSandboxRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		want   error
		change func(*SandboxInput)
	}{
		"host name":     {errdefs.ErrInvalidArgument, func(in *SandboxInput) { in.Config.Hostname = "a\nb" }},
		"sysctl":        {errdefs.ErrInvalidArgument, func(in *SandboxInput) { in.Config.Linux.Sysctls = map[string]string{"vm.x": "1"} }},
		"cgroup driver": {errdefs.ErrInvalidArgument, func(in *SandboxInput) { in.Host.SystemdCgroup = true }},
		"seccomp that was not read": {errdefs.ErrFailedPrecondition, func(in *SandboxInput) {
			in.Config.Linux.SecurityContext.Seccomp.ProfileType = 2
			in.Config.Linux.SecurityContext.Seccomp.LocalhostRef = "/x"
		}},
		"AppArmor on a host without": {errdefs.ErrFailedPrecondition, func(in *SandboxInput) {
			in.Host.AppArmor = ""
			in.Config.Linux.SecurityContext.Apparmor = &runtime.SecurityProfile{}
		}},
		"mode":                    {errdefs.ErrInvalidArgument, func(in *SandboxInput) { in.Config.Linux.SecurityContext.NamespaceOptions.Ipc = 8 }},
		"pause without a command": {errdefs.ErrInvalidArgument, func(in *SandboxInput) { in.Image.Entrypoint = nil }},
	} {
		in := sandboxInput()
		tc.change(&in)
		if _, err := Sandbox(in); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	in := sandboxInput()
	in.Config.Linux.SecurityContext.Apparmor = &runtime.SecurityProfile{}
	if s, err := Sandbox(in); err != nil || s.Process.ApparmorProfile != AppArmorDefault {
		t.Errorf("AppArmor of a pod: %v", err)
	}
}
