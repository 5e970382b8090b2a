//go:build linux

package cri

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/testimage"
)

// secure changes a container's security context.
func secure(f func(*runtime.LinuxContainerSecurityContext)) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) { f(c.Linux.SecurityContext) }
}

// image uses another image than busybox.
func image(ref string) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) { c.Image.Image = ref }
}

func privilegedPod(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }

func int64Of(v int64) *runtime.Int64Value { return &runtime.Int64Value{Value: v} }

// eachHandler runs a test with a pod of every handler, side by side: most of it
// is to wait. It returns when all have ended.
func eachHandler(t *testing.T, f func(t *testing.T, p *critest.Pod), change ...func(*runtime.PodSandboxConfig)) {
	t.Helper()
	n := node(t)
	t.Run("each", func(t *testing.T) {
		for _, handler := range n.Handlers {
			t.Run(handler, func(t *testing.T) {
				t.Parallel()
				f(t, n.Pod(t, handler, change...))
			})
		}
	})
}

// eachCase runs cases one after another in one pod of every handler.
func eachCase[C any](t *testing.T, cases []C, name func(C) string, f func(t *testing.T, p *critest.Pod, tc C)) {
	t.Helper()
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		for _, tc := range cases {
			t.Run(name(tc), func(t *testing.T) { f(t, &critest.Pod{Node: p.Node, T: t, ID: p.ID, Config: p.Config}, tc) })
		}
	})
}

// refused checks that a container is not made, with one of these codes.
func refused(t *testing.T, p *critest.Pod, what string, change func(*runtime.ContainerConfig), want ...codes.Code) {
	t.Helper()
	c, err := p.TryCreate("true", change)
	if err == nil {
		t.Errorf("%s: container %s was made", what, c.ID)
	} else if !slices.Contains(want, status.Code(err)) {
		t.Errorf("%s: %v", what, err)
	}
}

// specOf is the specification that a container has.
func specOf(t *testing.T, c *critest.Container) *specs.Spec {
	t.Helper()
	r, err := c.RT.ContainerStatus(critest.Context(t), &runtime.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		RuntimeSpec *specs.Spec `json:"runtimeSpec"`
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.RuntimeSpec == nil {
		t.Fatalf("no specification in %v: %v", r.Info, err)
	}
	return info.RuntimeSpec
}

const whoAmI = `grep -E "^(Uid|Gid|Groups):" /proc/self/status | tr '\t' ' ' | sed 's/ *$//'`

// identity is what whoAmI prints.
func identity(uid, gid int, groups string) string {
	return strings.TrimSuffix(fmt.Sprintf("Uid: %[1]d %[1]d %[1]d %[1]d\nGid: %[2]d %[2]d %[2]d %[2]d\nGroups: %[3]s", uid, gid, groups), " ") + "\n"
}

// Who a process is, is what the kernel says it is, for the container and for
// what is executed in it.
//
// contract: 7.3.9, 7.1.15
func TestIdentity(t *testing.T) {
	ref := node(t).Put(t, "identity", ocispec.ImageConfig{User: "user"})
	byNumber := node(t).Put(t, "identity-number", ocispec.ImageConfig{User: "1000:3000"})
	type test struct {
		name   string
		ref    string
		change func(*runtime.LinuxContainerSecurityContext)
		want   string
		user   *runtime.LinuxContainerUser
	}
	eachCase(t, []test{
		{"image user", ref, func(*runtime.LinuxContainerSecurityContext) {}, identity(1000, 1000, "1000 2000"), &runtime.LinuxContainerUser{Uid: 1000, Gid: 1000, SupplementalGroups: []int64{1000, 2000}}},
		{"image numbers", byNumber, func(*runtime.LinuxContainerSecurityContext) {}, identity(1000, 3000, "2000 3000"), &runtime.LinuxContainerUser{Uid: 1000, Gid: 3000, SupplementalGroups: []int64{2000, 3000}}},
		{"user", ref, func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = int64Of(1000) }, identity(1000, 1000, "1000 2000"), nil},
		{"root over the image's user", ref, func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = int64Of(0) }, identity(0, 0, "0"), nil},
		{"unknown user", ref, func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = int64Of(4711) }, identity(4711, 0, "0"), nil},
		{"last user", ref, func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = int64Of(1<<31 - 1) }, identity(1<<31-1, 0, "0"), nil},
		{"user name", ref, func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUsername = "root" }, identity(0, 0, "0"), nil},
		{"user and group", ref, func(s *runtime.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = int64Of(1000), int64Of(3000)
		}, identity(1000, 3000, "2000 3000"), nil},
		{"merge", ref, func(s *runtime.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups = int64Of(1000), []int64{5000, 6000}
		}, identity(1000, 1000, "1000 2000 5000 6000"), &runtime.LinuxContainerUser{Uid: 1000, Gid: 1000, SupplementalGroups: []int64{1000, 2000, 5000, 6000}}},
		{"strict", ref, func(s *runtime.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups = int64Of(1000), []int64{5000, 6000}
			s.SupplementalGroupsPolicy = runtime.SupplementalGroupsPolicy_Strict
		}, identity(1000, 1000, "1000 5000 6000"), &runtime.LinuxContainerUser{Uid: 1000, Gid: 1000, SupplementalGroups: []int64{1000, 5000, 6000}}},
	}, func(tc test) string { return tc.name }, func(t *testing.T, p *critest.Pod, tc test) {
		c := p.Run(whoAmI+"; sleep 600", image(tc.ref), secure(tc.change))
		defer c.Remove()
		critest.Eventually(t, "output", func() bool { return strings.Count(c.Log(), "\n") >= 3 })
		if out := c.Log(); out != tc.want {
			t.Errorf("%q, want %q", out, tc.want)
		}
		if out := c.Exec(whoAmI); out != tc.want {
			t.Errorf("exec: %q, want %q", out, tc.want)
		}
		got := c.Status().User.GetLinux()
		if tc.user != nil && (got.GetUid() != tc.user.Uid || got.GetGid() != tc.user.Gid || !slices.Equal(got.GetSupplementalGroups(), tc.user.SupplementalGroups)) {
			t.Errorf("the status says %v", got)
		}
	})
}

// A user that looks like a number is never a name of the image, however it is
// written, and one out of range is an error (class C3).
//
// contract: 7.3.9
func TestIdentityStrings(t *testing.T) {
	n := node(t)
	// These names exist, with the user whom a mistake would make of them.
	var passwd strings.Builder
	passwd.WriteString("root:x:0:0:root:/:/bin/sh\n")
	numeric := []string{"2147483648", "4294967295", "4294967296", "4294967297", "18446744073709551616", "-1", "+5", "00000000000000000000000004294967296"}
	for _, name := range numeric {
		fmt.Fprintf(&passwd, "%s:x:0:0::/:/bin/sh\n", name)
	}
	files := []testimage.File{{Name: "etc/passwd", Body: []byte(passwd.String())}}
	p := n.Pod(t, "pauseless")
	ref := n.Put(t, "c3", ocispec.ImageConfig{}, files...)
	for _, name := range numeric {
		refused(t, p, "user name "+name, func(c *runtime.ContainerConfig) {
			c.Image.Image, c.Linux.SecurityContext.RunAsUsername = ref, name
		}, codes.InvalidArgument, codes.OutOfRange, codes.NotFound)
		imgRef := n.Put(t, "c3-image", ocispec.ImageConfig{User: name}, files...)
		refused(t, p, "image user "+name, image(imgRef), codes.InvalidArgument, codes.OutOfRange, codes.NotFound)
	}
	for _, id := range []int64{-1, -1 << 63, 1 << 31, 1<<32 - 1, 1 << 32, 1<<63 - 1} {
		refused(t, p, fmt.Sprint("user ", id), secure(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = int64Of(id) }), codes.InvalidArgument, codes.OutOfRange)
		refused(t, p, fmt.Sprint("group ", id), secure(func(s *runtime.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = int64Of(1), int64Of(id)
		}), codes.InvalidArgument, codes.OutOfRange)
		refused(t, p, fmt.Sprint("supplemental group ", id), secure(func(s *runtime.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{id} }), codes.InvalidArgument, codes.OutOfRange)
		cfg := n.PodConfig(t, func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.RunAsUser = int64Of(id) })
		r, err := n.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: cfg, RuntimeHandler: "runc"})
		if c := status.Code(err); c != codes.InvalidArgument && c != codes.OutOfRange {
			t.Errorf("pod of user %d: %v", id, err)
		}
		if err == nil {
			(&critest.Pod{Node: n, T: t, ID: r.PodSandboxId, Config: cfg}).Remove()
		}
	}
	refused(t, p, "group without a user", secure(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsGroup = int64Of(1) }), codes.InvalidArgument)
	// Nothing of all this is left.
	r, err := n.RT.ListContainers(critest.Context(t), &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{PodSandboxId: p.ID}})
	if err != nil || len(r.Containers) != 0 {
		t.Errorf("%v %v", r, err)
	}
}

// contract: 7.3.8
func TestReadonlyRoot(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		script := "if touch /x 2>/dev/null; then echo written; else echo refused; fi; touch /dev/shm/x && echo shm; grep -E ' / / ' /proc/self/mountinfo | cut -d' ' -f6 | cut -c1-2"
		if out := p.Output(script, secure(func(s *runtime.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true })); !strings.HasPrefix(out, "refused\nshm\n") {
			t.Errorf("read-only: %q", out)
		}
		if out := p.Output(script); !strings.HasPrefix(out, "written\nshm\n") {
			t.Errorf("%q", out)
		}
	})
}

// capSets prints the five sets.
const capSets = `grep ^Cap /proc/self/status | tr '\t' ' '`

// defaultCaps are the 14 of the default specification.
const defaultCaps = 0xa80425fb

// contract: 7.3.7, 10.4
func TestCapabilities(t *testing.T) {
	caps := func(add, drop []string) func(*runtime.ContainerConfig) {
		return secure(func(s *runtime.LinuxContainerSecurityContext) {
			s.Capabilities = &runtime.Capability{AddCapabilities: add, DropCapabilities: drop}
		})
	}
	const netAdmin, chown, bind = 1 << 12, 1, 1 << 10
	all := uint64(ownCaps(t))
	type test struct {
		name      string
		add, drop []string
		want      uint64
	}
	eachCase(t, []test{
		{"default", nil, nil, defaultCaps},
		{"add", []string{"NET_ADMIN"}, nil, defaultCaps | netAdmin},
		{"drop", nil, []string{"CHOWN"}, defaultCaps &^ chown},
		{"add and drop one", []string{"NET_ADMIN"}, []string{"CAP_NET_ADMIN", "CHOWN"}, defaultCaps &^ chown},
		{"drop all", nil, []string{"ALL"}, 0},
		{"drop all, add one", []string{"CAP_NET_BIND_SERVICE"}, []string{"ALL"}, bind},
		{"add all", []string{"ALL"}, nil, all},
		{"add all, drop one", []string{"ALL"}, []string{"CHOWN"}, all &^ chown},
	}, func(tc test) string { return tc.name }, func(t *testing.T, p *critest.Pod, tc test) {
		c := p.Run(capSets+"; sleep 600", caps(tc.add, tc.drop))
		defer c.Remove()
		critest.Eventually(t, "output", func() bool { return strings.Count(c.Log(), "\n") >= 5 })
		want := fmt.Sprintf("CapInh: %016x\nCapPrm: %016[2]x\nCapEff: %016[2]x\nCapBnd: %016[2]x\nCapAmb: %016[1]x\n", 0, tc.want)
		if out := c.Log(); out != want {
			t.Errorf("%q, want %q", out, want)
		}
		if out := c.Exec(capSets); out != want {
			t.Errorf("exec: %q, want %q", out, want)
		}
	})
	// A user without rights has none of them, whatever is in the bounding set.
	out := node(t).Pod(t, "runc").Output(capSets, secure(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = int64Of(1000) }))
	if want := fmt.Sprintf("CapInh: %016x\nCapPrm: %016[1]x\nCapEff: %016[1]x\nCapBnd: %016x\nCapAmb: %016[1]x\n", 0, defaultCaps); out != want {
		t.Errorf("%q, want %q", out, want)
	}
	refused(t, node(t).Pod(t, "pauseless"), "unknown capability", caps([]string{"NO_SUCH"}, nil), codes.InvalidArgument)
}

// ownCaps is the set that the daemon has, the most that it can give.
func ownCaps(t *testing.T) uint64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "CapBnd:\t")
	var set uint64
	if _, err := fmt.Sscanf(after, "%x", &set); err != nil {
		t.Fatal(err)
	}
	return set
}

// contract: 7.3.2, 7.3.7, 7.3.8, 7.3.12
func TestPrivileged(t *testing.T) {
	dev, err := os.ReadDir("/dev")
	if err != nil {
		t.Fatal(err)
	}
	host := ""
	for _, e := range dev { // any block device: containers have none by default
		if e.Type()&os.ModeDevice != 0 && e.Type()&os.ModeCharDevice == 0 {
			host = "/dev/" + e.Name()
		}
	}
	if host == "" {
		t.Skip("no block device on this host")
	}
	group := "/sys/fs/cgroup/pids/x"
	if cgroup2() {
		group = "/sys/fs/cgroup/x"
	}
	privileged := secure(func(s *runtime.LinuxContainerSecurityContext) {
		s.Privileged = true
		s.MaskedPaths, s.ReadonlyPaths = []string{"/proc/cpuinfo"}, []string{"/proc/sys"}
		s.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}
	})
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		out := p.Output(`grep -E "^(CapEff|Seccomp|NoNewPrivs):" /proc/self/status | tr '\t' ' '
			mount -t tmpfs t /tmp && echo mounts; test $(wc -c < /proc/cpuinfo) -gt 0 && echo unmasked
			echo 1 > /proc/sys/net/ipv4/ip_forward && echo sysctl; mkdir `+group+` 2>/dev/null; rmdir `+group+` 2>/dev/null && echo cgroups
			test -b `+host+` && echo device`, privileged)
		want := fmt.Sprintf("CapEff: %016x\nNoNewPrivs: 0\nSeccomp: 0\nmounts\nunmasked\nsysctl\ncgroups\ndevice\n", ownCaps(t))
		if out != want {
			t.Errorf("%q, want %q", out, want)
		}
		// Nothing of it without.
		out = p.Output("mount -t tmpfs t /tmp 2>/dev/null || echo no mount; mkdir " + group + " 2>/dev/null || echo no cgroup; ls " + host + " 2>/dev/null || echo no device")
		if out != "no mount\nno cgroup\nno device\n" {
			t.Errorf("not privileged: %q", out)
		}
	}, privilegedPod)
	refused(t, node(t).Pod(t, "pauseless"), "privileged in a pod that is not", privileged, codes.InvalidArgument)
}

// euid is a static program for x86-64 that exits with its effective user as
// status.
func euid() []byte {
	code := []byte{0xb8, 107, 0, 0, 0, 0x0f, 0x05, 0x89, 0xc7, 0xb8, 60, 0, 0, 0, 0x0f, 0x05} // exit(geteuid())
	const base, head = 0x400000, 64 + 56
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	le := binary.LittleEndian
	b = le.AppendUint16(b, 2)  // executable
	b = le.AppendUint16(b, 62) // x86-64
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, base+head) // entry
	b = le.AppendUint64(b, 64)        // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 1, 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1) // load
	b = le.AppendUint32(b, 5) // read, execute
	for _, v := range []uint64{0, base, base, uint64(head + len(code)), uint64(head + len(code)), 0x1000} {
		b = le.AppendUint64(b, v)
	}
	return append(b, code...)
}

// contract: 7.3.8
func TestNoNewPrivileges(t *testing.T) {
	ref := node(t).Put(t, "setuid", ocispec.ImageConfig{}, testimage.File{Name: "bin/euid", Body: euid(), Mode: 0o4755})
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		for _, nnp := range []bool{false, true} {
			as := secure(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser, s.NoNewPrivs = int64Of(100), nnp })
			want := map[bool]string{false: "0\n", true: "100\n"}[nnp]
			script := "/bin/euid; echo $?"
			c := p.Run(script+"; sleep 600", as, image(ref))
			critest.Eventually(t, "output", func() bool { return c.Log() != "" })
			if out := c.Log(); out != want {
				t.Errorf("no_new_privs %v: effective user %q", nnp, out)
			}
			if out := c.Exec(script); out != want {
				t.Errorf("no_new_privs %v: effective user of exec %q", nnp, out)
			}
		}
	})
}

// contract: 7.3.8
func TestMaskedPaths(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		out := p.Output(`wc -c < /proc/cpuinfo; ls -A /proc/tty | wc -l; echo 1 > /proc/sys/kernel/shm_rmid_forced && echo written; touch /proc/fs/x 2>/dev/null || echo closed`,
			secure(func(s *runtime.LinuxContainerSecurityContext) {
				s.MaskedPaths, s.ReadonlyPaths = []string{"/proc/cpuinfo", "/proc/tty", "/proc/none"}, []string{"/proc/fs"}
			}))
		if out != "0\n0\nwritten\nclosed\n" {
			t.Errorf("%q", out)
		}
		out = p.Output(`{ echo 1 > /proc/sys/kernel/shm_rmid_forced; } 2>/dev/null || echo closed; test $(wc -c < /proc/cpuinfo) -gt 0 && echo readable`,
			secure(func(s *runtime.LinuxContainerSecurityContext) { s.ReadonlyPaths = []string{"/proc/sys"} }))
		if out != "closed\nreadable\n" {
			t.Errorf("%q", out)
		}
		refused(t, p, "relative masked path", secure(func(s *runtime.LinuxContainerSecurityContext) { s.MaskedPaths = []string{"proc/kcore"} }), codes.InvalidArgument)
	})
}

// seccompFile is a profile that refuses one system call of mkdir.
func seccompFile(t *testing.T, n *critest.Node) string {
	t.Helper()
	path := filepath.Join(n.Dir, "no-mkdir.json")
	profile := `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":95}]}`
	if err := os.WriteFile(path, []byte(profile), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Each kind of profile for containers and for what is executed in them, seen by
// what the kernel refuses.
//
// contract: 7.3.4, 10.5
func TestSeccomp(t *testing.T) {
	n := node(t)
	path := seccompFile(t, n)
	probe := `grep ^Seccomp: /proc/self/status | tr '\t' ' '; mkdir /tmp/d.$$ 2>/dev/null && echo mkdir; unshare -U true 2>/dev/null && echo unshare; true`
	type test struct {
		name    string
		profile *runtime.SecurityProfile
		old     string
		want    string
	}
	eachCase(t, []test{
		{"unset", nil, "", "Seccomp: 0\nmkdir\nunshare\n"},
		{"unconfined", &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, "", "Seccomp: 0\nmkdir\nunshare\n"},
		{"default", &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}, "", "Seccomp: 2\nmkdir\n"},
		{"localhost", &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: path}, "", "Seccomp: 2\nunshare\n"},
		{"old default", nil, "runtime/default", "Seccomp: 2\nmkdir\n"},
		{"old localhost", nil, "localhost/" + path, "Seccomp: 2\nunshare\n"},
		{"field over old", &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, "runtime/default", "Seccomp: 0\nmkdir\nunshare\n"},
	}, func(tc test) string { return tc.name }, func(t *testing.T, p *critest.Pod, tc test) {
		c := p.Run(probe+"; echo done; sleep 600", secure(func(s *runtime.LinuxContainerSecurityContext) { s.Seccomp, s.SeccompProfilePath = tc.profile, tc.old }))
		defer c.Remove()
		critest.Eventually(t, "output", func() bool { return strings.HasSuffix(c.Log(), "done\n") })
		if out := c.Log(); out != tc.want+"done\n" {
			t.Errorf("%q, want %q", out, tc.want)
		}
		if out := c.Exec(probe); out != tc.want {
			t.Errorf("exec: %q, want %q", out, tc.want)
		}
	})
	p := n.Pod(t, "pauseless")
	for what, profile := range map[string]*runtime.SecurityProfile{
		"missing profile":  {ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: path + ".none"},
		"relative profile": {ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "no-mkdir.json"},
		"directory":        {ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: n.Dir},
		"unknown type":     {ProfileType: 17},
	} {
		refused(t, p, what, secure(func(s *runtime.LinuxContainerSecurityContext) { s.Seccomp = profile }), codes.NotFound, codes.InvalidArgument)
	}
}

// statusOf reads a line of the status of a pod's own process.
func statusOf(t *testing.T, p *critest.Pod, key string) string {
	t.Helper()
	var info struct {
		Pid int `json:"pid"`
	}
	r := p.Status()
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.Pid == 0 {
		t.Fatalf("no pid in %v: %v", r.Info, err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", info.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.Join(strings.Fields(v), " ")
		}
	}
	t.Fatalf("no %s", key)
	return ""
}

// The pause process has the profile and the user that the pod asks for, and no
// more rights than it needs.
//
// contract: 7.3.4, 7.3.9
func TestPodSecurity(t *testing.T) {
	n := node(t)
	path := seccompFile(t, n)
	for _, handler := range n.Handlers {
		if handler == "pauseless" {
			continue // has no process
		}
		t.Run(handler, func(t *testing.T) {
			for _, tc := range []struct {
				profile *runtime.SecurityProfile
				want    string
			}{
				{&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}, "2"},
				{&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: path}, "2"},
				{&runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, "0"},
			} {
				p := n.Pod(t, handler, func(c *runtime.PodSandboxConfig) {
					c.Linux.SecurityContext.Seccomp, c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsGroup = tc.profile, int64Of(1234), int64Of(2345)
					c.Linux.SecurityContext.SupplementalGroups = []int64{77}
				})
				critest.Eventually(t, "the pause program", func() bool { return statusOf(t, p, "Name") == "pause" }) // it is started, and may not be executed yet
				for key, want := range map[string]string{"Seccomp": tc.want, "Uid": "1234 1234 1234 1234", "Gid": "2345 2345 2345 2345", "Groups": "77 2345", "NoNewPrivs": "1",
					"CapEff": "0000000000000000", "CapInh": "0000000000000000", "CapAmb": "0000000000000000"} {
					if got := statusOf(t, p, key); got != want {
						t.Errorf("%v: %s is %q, want %q", tc.profile.ProfileType, key, got, want)
					}
				}
			}
		})
	}
}

// Without AppArmor in the kernel, a profile that is asked for is an error, and
// none is fine.
//
// contract: 7.3.5
func TestAppArmor(t *testing.T) {
	if b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err == nil && strings.HasPrefix(string(b), "Y") {
		t.Skip("this host has AppArmor")
	}
	p := node(t).Pod(t, "pauseless")
	for _, field := range []*runtime.SecurityProfile{{ProfileType: runtime.SecurityProfile_RuntimeDefault}, {ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "some"}} {
		refused(t, p, field.String(), secure(func(s *runtime.LinuxContainerSecurityContext) { s.Apparmor = field }), codes.FailedPrecondition)
	}
	refused(t, p, "old form", secure(func(s *runtime.LinuxContainerSecurityContext) { s.ApparmorProfile = "localhost/some" }), codes.FailedPrecondition)
	if out := p.Output("echo ran", secure(func(s *runtime.LinuxContainerSecurityContext) {
		s.Apparmor = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
	})); out != "ran\n" {
		t.Errorf("%q", out)
	}
}

// Options of SELinux do no harm where it is not used, and nothing is relabelled.
//
// contract: 7.3.6, 10.7
func TestSELinuxOff(t *testing.T) {
	n := node(t)
	options := &runtime.SELinuxOption{User: "system_u", Role: "system_r", Type: "container_t", Level: "s0:c4,c5"}
	dir := filepath.Join(n.Dir, "host-relabel")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			p := n.Pod(t, handler, func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.SelinuxOptions = options })
			c := p.Run("echo in > /v/f && cat /v/f", func(c *runtime.ContainerConfig) {
				c.Linux.SecurityContext.SelinuxOptions = options
				c.Mounts = []*runtime.Mount{{ContainerPath: "/v", HostPath: dir, SelinuxRelabel: true}}
			})
			if st := c.Wait(); st.ExitCode != 0 || c.Log() != "in\n" {
				t.Errorf("%v %q", st, c.Log())
			}
			if s := specOf(t, c); s.Process.SelinuxLabel != "" || s.Linux.MountLabel != "" {
				t.Errorf("labels %q %q", s.Process.SelinuxLabel, s.Linux.MountLabel)
			}
		})
	}
}

// Labels of an image that only Gantry and its clients may set do not get on
// containers, whose labels other parts obey (class C5).
//
// contract: 1.5.22
func TestImageLabels(t *testing.T) {
	n := node(t)
	ref := n.Put(t, "labelled", ocispec.ImageConfig{Labels: map[string]string{"containerd.io/restart.status": "running", "containerd.io/restart.loguri": "binary:///bin/sh",
		"io.cri-containerd.kind": "sandbox", "io.cri-containerd.image": "managed", "io.gantry.x": "y", "plain": "kept"}})
	p := n.Pod(t, "pauseless")
	c := p.Create("true", image(ref))
	labels := recordLabels(t, n, c.ID)
	for k, v := range labels {
		if strings.HasPrefix(k, "containerd.io/") || strings.HasPrefix(k, "io.gantry.") || strings.HasPrefix(k, "io.cri-containerd") && (k != "io.cri-containerd.kind" || v != "container") {
			t.Errorf("label %s=%s", k, v)
		}
	}
	if labels["plain"] != "kept" || labels["io.cri-containerd.kind"] != "container" {
		t.Errorf("labels %v", labels)
	}
	if len(c.Status().Labels) != 0 {
		t.Errorf("the kubelet is shown %v", c.Status().Labels)
	}
}

// recordLabels are the labels of a container's record.
func recordLabels(t *testing.T, n *critest.Node, id string) map[string]string {
	t.Helper()
	c, err := client.Dial(n.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	v, err := c.In("k8s.io", "")
	if err != nil {
		t.Fatal(err)
	}
	rec, err := v.Containers().Get(critest.Context(t), container.ID(id))
	if err != nil {
		t.Fatal(err)
	}
	return rec.Labels
}

// While pods run, other users of the host can read, write and execute nothing of
// theirs that is at rest (class C7), and what is the containers' own is open to
// them, whatever mask of rights the daemon was started with.
func TestRightsAtRest(t *testing.T) {
	for _, mask := range []string{"0000", "0777"} {
		t.Run(mask, func(t *testing.T) {
			n, err := critest.NewNode(binDir, "")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				n.Clear(t)
				if err := n.Close(); err != nil {
					t.Error(err)
				}
			})
			n.Wrap = []string{"/bin/sh", "-c", "umask " + mask + `; exec "$0" "$@"`}
			if err := n.Start(); err != nil {
				t.Fatal(err)
			}
			rightsAtRest(t, n)
		})
	}
}

func rightsAtRest(t *testing.T, n *critest.Node) {
	ref := n.Put(t, "rest", ocispec.ImageConfig{Volumes: map[string]struct{}{"/data": {}}}, testimage.File{Name: "data", Dir: true}, testimage.File{Name: "data/f", Body: []byte("x")},
		testimage.File{Name: "bin/euid", Body: euid(), Mode: 0o4755})
	for _, handler := range n.Handlers {
		c := n.Pod(t, handler).Run("sleep 600", image(ref), func(c *runtime.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = int64Of(1000)
		})
		if out := c.Exec("cat /data/f /etc/resolv.conf /etc/hosts >/dev/null; cd /dev/shm && touch x && stat -c %a /dev/shm; umask"); out != "1777\n0022\n" {
			t.Errorf("%s: %q", handler, out)
		}
	}
	n.Pod(t, "runc", userNS).Run("sleep 600", image(ref), mounts(&runtime.Mount{ContainerPath: "/image", Image: &runtime.ImageSpec{Image: ref}}))
	var all strings.Builder
	err := filepath.WalkDir(n.Dir, func(path string, e os.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // something has ended meanwhile
		}
		if err == nil && e.Type()&os.ModeSymlink == 0 && path != n.Dir {
			_, err = fmt.Fprintln(&all, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `while read f; do { [ -r "$f" ] || [ -w "$f" ] || [ -f "$f" ] && [ -x "$f" ]; } && echo "$f"; done; true`)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.Dir, cmd.Stdin = "/", strings.NewReader(all.String())
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "/logs\n") {
		t.Fatalf("%v: %s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		rel, err := filepath.Rel(n.Dir, strings.TrimSpace(line))
		if err != nil {
			t.Fatal(err)
		}
		// The test's own, the network plugins', and what /var/log/pods and
		// /run/netns let all users see.
		top, _, _ := strings.Cut(rel, "/")
		info, err := os.Stat(filepath.Join(n.Dir, rel))
		dir := err == nil && info.IsDir()
		if top != "certs.d" && top != "cni" && top != "cdi" && top != "ipam" && !(top == "logs" && dir) && !strings.HasPrefix(rel, "state/netns") && !strings.HasPrefix(rel, "host") {
			t.Errorf("%s is open to all users", rel)
		}
	}
}
