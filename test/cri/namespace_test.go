//go:build linux

package cri

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/testimage"
)

// nsOf is the namespace of a running container's first process, as the kernel
// names it.
func nsOf(t *testing.T, c *critest.Container, kind string) string {
	t.Helper()
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", containerPid(t, c), kind))
	if err != nil {
		t.Fatal(err)
	}
	return link
}

func hostNS(t *testing.T, kind string) string {
	t.Helper()
	link, err := os.Readlink("/proc/self/ns/" + kind)
	if err != nil {
		t.Fatal(err)
	}
	return link
}

func containerPid(t *testing.T, c *critest.Container) int {
	t.Helper()
	r, err := c.RT.ContainerStatus(critest.Context(t), &runtime.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		Pid int `json:"pid"`
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.Pid == 0 {
		t.Fatalf("no pid in %v: %v", r.Info, err)
	}
	return info.Pid
}

// modes sets the namespaces of a pod.
func modes(network, pid, ipc runtime.NamespaceMode) func(*runtime.PodSandboxConfig) {
	return func(c *runtime.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &runtime.NamespaceOption{Network: network, Pid: pid, Ipc: ipc}
		if network == runtime.NamespaceMode_NODE {
			c.Hostname = ""
		}
	}
}

// Two containers of a pod share what the pod has, and have the host's or their
// own where that is asked for.
//
// contract: 7.3.2
func TestNamespaces(t *testing.T) {
	n := node(t)
	const pod, own, host = runtime.NamespaceMode_POD, runtime.NamespaceMode_CONTAINER, runtime.NamespaceMode_NODE
	for _, tc := range []struct{ network, pid, ipc runtime.NamespaceMode }{{pod, own, pod}, {pod, pod, pod}, {host, own, pod}, {pod, host, pod}, {pod, own, host}, {host, host, host}, {host, pod, host}} {
		t.Run(fmt.Sprintf("net %s pid %s ipc %s", tc.network, tc.pid, tc.ipc), func(t *testing.T) {
			eachHandler(t, func(t *testing.T, p *critest.Pod) {
				a, b := p.Run("sleep 600"), p.Run("sleep 600")
				for kind, mode := range map[string]runtime.NamespaceMode{"net": tc.network, "uts": tc.network, "ipc": tc.ipc, "pid": tc.pid, "user": host, "mnt": own} {
					x, y, z := nsOf(t, a, kind), nsOf(t, b, kind), hostNS(t, kind)
					switch {
					case mode == pod && (x != y || x == z), mode == host && (x != z || y != z), mode == own && (x == y || x == z || y == z):
						t.Errorf("%s of mode %s: %s, %s, the host's %s", kind, mode, x, y, z)
					}
				}
				want := map[runtime.NamespaceMode]string{pod: "pause\n", own: "sleep\n"}[tc.pid]
				if out := a.Exec("cat /proc/1/comm"); tc.pid != host && out != want && !(tc.pid == own && out == "sh\n") {
					t.Errorf("process 1 is %q", out)
				}
				hostname, err := os.Hostname()
				if err != nil {
					t.Fatal(err)
				}
				if tc.network == pod {
					hostname = "host-of-pod"
				}
				if out := a.Exec("hostname; cat /etc/hostname; echo $HOSTNAME"); out != strings.Repeat(hostname+"\n", 3) {
					t.Errorf("host name %q", out)
				}
				if o := p.Status().Status.Linux.Namespaces.Options; o.Network != tc.network || o.Pid != tc.pid || o.Ipc != tc.ipc {
					t.Errorf("the status says %v", o)
				}
			}, modes(tc.network, tc.pid, tc.ipc))
		})
	}
	p := n.Pod(t, "pauseless")
	refused(t, p, "the host's processes in a pod without them", secure(func(s *runtime.LinuxContainerSecurityContext) {
		s.NamespaceOptions = &runtime.NamespaceOption{Pid: runtime.NamespaceMode_NODE}
	}), codes.InvalidArgument)
}

// A container for debugging sees another one's processes.
//
// contract: 7.3.2
func TestTargetNamespace(t *testing.T) {
	target := func(id string) func(*runtime.ContainerConfig) {
		return secure(func(s *runtime.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &runtime.NamespaceOption{Pid: runtime.NamespaceMode_TARGET, TargetId: id}
		})
	}
	other := node(t).Pod(t, "pauseless").Run("sleep 600")
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		a, ended := p.Run("exec sleep 612"), p.Run("true")
		b := p.Run("sleep 600", target(a.ID))
		if x, y := nsOf(t, a, "pid"), nsOf(t, b, "pid"); x != y {
			t.Errorf("%s, want %s", y, x)
		}
		if out := b.Exec("tr '\\0' ' ' < /proc/1/cmdline"); out != "sleep 612 " {
			t.Errorf("process 1 is %q", out)
		}
		ended.Wait()
		refused(t, p, "unknown target", target("none"), codes.NotFound)
		refused(t, p, "target that has ended", target(ended.ID), codes.FailedPrecondition)
		refused(t, p, "target of another pod", target(other.ID), codes.InvalidArgument)
	})
}

// tryPod expects that a pod is refused with one of these codes.
func tryPod(t *testing.T, what, handler string, change func(*runtime.PodSandboxConfig), want ...codes.Code) {
	t.Helper()
	n := node(t)
	cfg := n.PodConfig(t, change)
	r, err := n.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
	if err == nil {
		t.Errorf("%s: the pod was made", what)
		(&critest.Pod{Node: n, T: t, ID: r.PodSandboxId, Config: cfg}).Remove()
		return
	}
	for _, c := range want {
		if status.Code(err) == c {
			return
		}
	}
	t.Errorf("%s: %v", what, err)
}

// contract: 7.3.18
func TestSysctls(t *testing.T) {
	set := func(kv ...string) func(*runtime.PodSandboxConfig) {
		return func(c *runtime.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{}
			for i := 0; i < len(kv); i += 2 {
				c.Linux.Sysctls[kv[i]] = kv[i+1]
			}
		}
	}
	read := "cd /proc/sys; cat kernel/shm_rmid_forced kernel/msgmax fs/mqueue/msg_max net/ipv4/ip_forward net/ipv4/ip_unprivileged_port_start; tr '\\t' ' ' < net/ipv4/ping_group_range"
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		if out := p.Output(read); out != "1\n9000\n21\n1\n0\n0 2147483647\n" {
			t.Errorf("%q", out)
		}
	}, set("kernel.shm_rmid_forced", "1", "kernel/msgmax", "9000", "fs.mqueue.msg_max", "21", "net.ipv4.ip_forward", "1"))
	before, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	for _, handler := range []string{"runc", "pauseless"} {
		for _, key := range []string{"kernel.core_pattern", "vm.overcommit_memory", "kernel.pid_max", "net/../kernel/core_pattern", "net.ipv4/../../kernel/core_pattern", "kernel.shm_rmid_forced/../core_pattern", "", "fs.file-max"} {
			tryPod(t, "sysctl "+key, handler, set(key, "1"), codes.InvalidArgument)
		}
		tryPod(t, "sysctl of the host's network", handler, func(c *runtime.PodSandboxConfig) { critest.HostNetwork(c); set("net.ipv4.ip_forward", "1")(c) }, codes.InvalidArgument)
		tryPod(t, "sysctl of the host's IPC", handler, func(c *runtime.PodSandboxConfig) {
			modes(0, runtime.NamespaceMode_CONTAINER, runtime.NamespaceMode_NODE)(c)
			set("kernel.msgmax", "9000")(c)
		}, codes.InvalidArgument)
		tryPod(t, "value of two lines", handler, set("net.ipv4.ip_forward", "1\n+kernel.core_pattern=|/x"), codes.InvalidArgument)
	}
	if after, err := os.ReadFile("/proc/sys/kernel/core_pattern"); err != nil || string(after) != string(before) {
		t.Errorf("core_pattern is %q", after)
	}
}

// The user namespace of the tests.
const firstID, lengthIDs = 300000, 65536

func mapping() []*runtime.IDMapping {
	return []*runtime.IDMapping{{HostId: firstID, Length: lengthIDs}}
}

// userNS puts a pod into a user namespace.
func userNS(c *runtime.PodSandboxConfig) {
	o := c.Linux.SecurityContext.NamespaceOptions
	o.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: mapping(), Gids: mapping()}
}

// eachUserNS runs a test with a pod in a user namespace for each handler that can
// make one; the others have to refuse it.
func eachUserNS(t *testing.T, f func(t *testing.T, p *critest.Pod), change ...func(*runtime.PodSandboxConfig)) {
	t.Helper()
	n := node(t)
	st, err := n.RT.Status(critest.Context(t), &runtime.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	able := map[string]bool{}
	for _, h := range st.RuntimeHandlers {
		able[h.Name] = h.GetFeatures().GetUserNamespaces()
	}
	if !able["runc"] || !able["pauseless"] {
		t.Error("the own runtime has no user namespaces")
	}
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			if !able[handler] {
				tryPod(t, "user namespace by a runtime that has none", handler, userNS, codes.FailedPrecondition)
				return
			}
			f(t, n.Pod(t, handler, append([]func(*runtime.PodSandboxConfig){userNS}, change...)...))
		})
	}
}

// owner is the user namespace that a namespace belongs to.
func owner(t *testing.T, path string) uint64 {
	t.Helper()
	const nsGetUserNS = 0xb701
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.IoctlRetInt(int(f.Fd()), nsGetUserNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// A pod in a user namespace: its users are others on the host, its files and
// volumes are its own all the same, and so are its other namespaces.
//
// contract: 7.3.3, 10.8
// promise: P45
func TestUserNamespace(t *testing.T) {
	n := node(t)
	files, err := testimage.New(ocispec.ImageConfig{}, testimage.Layer{Files: []testimage.File{{Name: "f", Body: []byte("f\n")}}})
	if err != nil {
		t.Fatal(err)
	}
	ref := n.Registry.Put("userns-volume", "1", files)
	n.Pull(t, ref)
	declared := n.Put(t, "userns-declared", ocispec.ImageConfig{Volumes: map[string]struct{}{"/data": {}}}, testimage.File{Name: "data", Dir: true}, testimage.File{Name: "data/f", Body: []byte("x")})
	eachUserNS(t, func(t *testing.T, p *critest.Pod) {
		dir := hostDir(t, n, "mapped/f", "plain/f")
		probe := `tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map; id -u; stat -c '%u:%g %n' /bin/busybox /mapped/f /plain/f /image/f /data/f /data /etc/hosts /etc/resolv.conf /etc/hostname /dev/shm
			touch /new /mapped/new /dev/shm/new /data/new /etc/hosts && echo written; touch /plain/f 2>/dev/null || echo foreign; { echo x > /proc/sys/kernel/msgmax; } 2>/dev/null || echo closed; ip link set lo down && ip link set lo up && echo network`
		want := "0 300000 65536\n0 300000 65536\n0\n0:0 /bin/busybox\n0:0 /mapped/f\n65534:65534 /plain/f\n0:0 /image/f\n0:0 /data/f\n0:0 /data\n0:0 /etc/hosts\n0:0 /etc/resolv.conf\n0:0 /etc/hostname\n0:0 /dev/shm\nwritten\nforeign\nclosed\nnetwork\n"
		c := p.Run(probe+"; sleep 600", image(declared), mounts(&runtime.Mount{ContainerPath: "/mapped", HostPath: dir + "/mapped", UidMappings: mapping(), GidMappings: mapping()},
			&runtime.Mount{ContainerPath: "/plain", HostPath: dir + "/plain"}, &runtime.Mount{ContainerPath: "/image", Image: &runtime.ImageSpec{Image: ref}}),
			secure(func(s *runtime.LinuxContainerSecurityContext) {
				s.Capabilities = &runtime.Capability{AddCapabilities: []string{"NET_ADMIN"}}
				s.ReadonlyPaths = []string{"/proc/sys"}
			}))
		critest.Eventually(t, "output", func() bool { return strings.Count(c.Log(), "\n") >= strings.Count(want, "\n") })
		if out := strings.ReplaceAll(c.Log(), " 0 3", "0 3"); out != want { // the kernel's columns
			t.Errorf("%q, want %q", out, want)
		}
		pid := containerPid(t, c)
		var st syscall.Stat_t
		if err := syscall.Stat(fmt.Sprintf("/proc/%d/ns/user", pid), &st); err != nil {
			t.Fatal(err)
		}
		for _, kind := range []string{"net", "ipc", "uts", "pid", "mnt"} {
			if got := owner(t, fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); got != st.Ino {
				t.Errorf("the %s namespace belongs to user namespace %d, not %d", kind, got, st.Ino)
			}
		}
		if nsOf(t, c, "user") == hostNS(t, "user") {
			t.Error("the container is in the host's user namespace")
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil || !strings.Contains(string(b), "Uid:\t300000\t300000\t300000\t300000") {
			t.Errorf("on the host: %s %v", b, err)
		}
		for path, uid := range map[string]uint32{"mapped/new": 0, "mapped/f": 0, "plain/f": 0} {
			if err := syscall.Stat(dir+"/"+path, &st); err != nil || st.Uid != uid {
				t.Errorf("%s belongs to %d on the host: %v", path, st.Uid, err)
			}
		}
		if out := c.Exec("cat /proc/self/uid_map | tr -s ' '; id -u"); strings.TrimSpace(out) != "0 300000 65536\n0" {
			t.Errorf("exec: %q", out)
		}
		if o := p.Status().Status.Linux.Namespaces.Options.UsernsOptions; o.GetMode() != runtime.NamespaceMode_POD || len(o.Uids) != 1 || o.Uids[0].HostId != firstID {
			t.Errorf("the status says %v", o)
		}
		// A second container is in the same one, as another user of it; it has no copy of the image.
		d := p.Run("cat /proc/self/uid_map; sleep 600", secure(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = int64Of(1000) }))
		if x, y := nsOf(t, c, "user"), nsOf(t, d, "user"); x != y {
			t.Errorf("user namespaces %s and %s in one pod", x, y)
		}
		b, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", containerPid(t, d)))
		if err != nil || !strings.Contains(string(b), "Uid:\t301000\t301000\t301000\t301000") {
			t.Errorf("on the host: %s %v", b, err)
		}
		critest.Eventually(t, "the size of the writable layer", func() bool {
			s, err := n.RT.ContainerStats(critest.Context(t), &runtime.ContainerStatsRequest{ContainerId: d.ID})
			if err != nil || s.Stats.GetWritableLayer() == nil {
				return false
			}
			if used := s.Stats.WritableLayer.UsedBytes.GetValue(); used > 256<<10 {
				t.Errorf("the writable layer has %d bytes", used)
			}
			return true
		})
		refused(t, p, "a user namespace of its own", secure(func(s *runtime.LinuxContainerSecurityContext) {
			m := []*runtime.IDMapping{{HostId: 500000, Length: 10}}
			s.NamespaceOptions = &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER, UsernsOptions: &runtime.UserNamespace{Uids: m, Gids: m}}
		}), codes.InvalidArgument)
	})
	for what, u := range map[string]*runtime.UserNamespace{
		"no mapping":    {Mode: runtime.NamespaceMode_POD},
		"two mappings":  {Mode: runtime.NamespaceMode_POD, Uids: append(mapping(), &runtime.IDMapping{ContainerId: 70000, HostId: 1, Length: 1}), Gids: mapping()},
		"length 0":      {Mode: runtime.NamespaceMode_POD, Uids: []*runtime.IDMapping{{HostId: 1}}, Gids: mapping()},
		"overflow":      {Mode: runtime.NamespaceMode_POD, Uids: []*runtime.IDMapping{{HostId: 1<<32 - 1, Length: 2}}, Gids: mapping()},
		"own":           {Mode: runtime.NamespaceMode_CONTAINER},
		"node and maps": {Mode: runtime.NamespaceMode_NODE, Uids: mapping(), Gids: mapping()},
	} {
		for _, handler := range []string{"runc", "pauseless"} {
			tryPod(t, what, handler, func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u }, codes.InvalidArgument)
		}
	}
}

// A user namespace in the host's network has no sysfs of its own: the host's is
// bound.
//
// contract: 7.3.2, 7.3.3
func TestUserNamespaceHostNetwork(t *testing.T) {
	eachUserNS(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run("ls /sys/class/net | head -1; touch /sys/x 2>/dev/null || echo closed; ip link set lo down 2>/dev/null || echo foreign; sleep 600")
		critest.Eventually(t, "output", func() bool { return strings.Count(c.Log(), "\n") >= 3 })
		if out := c.Log(); !strings.HasSuffix(out, "closed\nforeign\n") {
			t.Errorf("%q", out)
		}
		if got, want := nsOf(t, c, "net"), hostNS(t, "net"); got != want {
			t.Errorf("network %s, want %s", got, want)
		}
		if out := c.Exec("tr -s ' ' < /proc/self/uid_map"); strings.TrimSpace(out) != "0 300000 65536" {
			t.Errorf("%q", out)
		}
		// What is mounted below the host's comes with it, but for the runtime's
		// own directory of cgroups.
		if out := c.Exec(`awk '$5 ~ "^/sys(/|$)" && $6 !~ "^ro" && !/ - tmpfs tmpfs /' /proc/self/mountinfo`); out != "" {
			t.Errorf("writable below /sys:\n%s", out)
		}
	}, critest.HostNetwork)
}
