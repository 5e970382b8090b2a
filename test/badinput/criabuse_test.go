package badinput

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/internal/edge/wire/containerrpc"
	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/testimage"
)

// big is a name of 1 MiB.
var big = strings.Repeat("n", 1<<20)

// many are 100,000 labels.
func many() map[string]string {
	m := map[string]string{}
	for i := range 100_000 {
		m[fmt.Sprintf("label.example/%d", i)] = "x"
	}
	return m
}

type podConfig = runtime.PodSandboxConfig
type ctrConfig = runtime.ContainerConfig

// What a kubelet would never ask of a pod, or not on purpose, is refused with
// the name of the field, before anything has been done.
//
// contract: 7.1.5, 7.3.2, 7.3.18
// promise: P36
func TestHostilePods(t *testing.T) {
	k := startKube(t, "")
	before := k.d.inventory()
	profile := func(kind runtime.SecurityProfile_ProfileType, ref string) *runtime.SecurityProfile {
		return &runtime.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	}
	users := func(id, host, length uint32) func(*podConfig) {
		return func(c *podConfig) {
			m := []*runtime.IDMapping{{ContainerId: id, HostId: host, Length: length}}
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: m, Gids: m}
		}
	}
	sysctl := func(key, value string) func(*podConfig) {
		return func(c *podConfig) { c.Linux.Sysctls = map[string]string{key: value} }
	}
	for name, tc := range map[string]struct {
		words  string
		change func(*podConfig)
	}{
		"name of 1 MiB":             {"name", func(c *podConfig) { c.Metadata.Name = big }},
		"name with a newline":       {"name", func(c *podConfig) { c.Metadata.Name = "a\nb" }},
		"namespace with a slash":    {"namespace", func(c *podConfig) { c.Metadata.Namespace = "../x" }},
		"uid with a zero":           {"uid", func(c *podConfig) { c.Metadata.Uid = "a\x00" }},
		"100,000 labels":            {"labels", func(c *podConfig) { c.Labels = many() }},
		"100,000 annotations":       {"annotations", func(c *podConfig) { c.Annotations = many() }},
		"hostname of 1 MiB":         {"hostname", func(c *podConfig) { c.Hostname = big }},
		"hostname with a newline":   {"hostname", func(c *podConfig) { c.Hostname = "a\n127.0.0.1 bank.example" }},
		"hostname with an escape":   {"hostname", func(c *podConfig) { c.Hostname = "a\x1b[2J" }},
		"relative log directory":    {"log_directory", func(c *podConfig) { c.LogDirectory = "../logs" }},
		"log directory with a zero": {"log_directory", func(c *podConfig) { c.LogDirectory = "/tmp/\x00" }},
		"DNS server with a newline": {"DNS", func(c *podConfig) { c.DnsConfig = &runtime.DNSConfig{Servers: []string{"1.1.1.1\nnameserver 6.6.6.6"}} }},
		"DNS search with a newline": {"DNS", func(c *podConfig) { c.DnsConfig = &runtime.DNSConfig{Searches: []string{"x\nnameserver 6.6.6.6"}} }},
		"DNS option with a newline": {"DNS", func(c *podConfig) { c.DnsConfig = &runtime.DNSConfig{Options: []string{"x\nnameserver 6.6.6.6"}} }},
		"a port too high":           {"port_mappings[0]", func(c *podConfig) { c.PortMappings = []*runtime.PortMapping{{HostPort: 70000, ContainerPort: 80}} }},
		"a negative port":           {"port_mappings[0]", func(c *podConfig) { c.PortMappings = []*runtime.PortMapping{{HostPort: -1, ContainerPort: 80}} }},
		"a protocol unheard of": {"port_mappings[0]", func(c *podConfig) {
			c.PortMappings = []*runtime.PortMapping{{Protocol: 7, HostPort: 1, ContainerPort: 80}}
		}},
		"a host IP that is none": {"host_ip", func(c *podConfig) {
			c.PortMappings = []*runtime.PortMapping{{HostIp: "-j ACCEPT", HostPort: 1, ContainerPort: 80}}
		}},
		"core_pattern":              {"kernel.core_pattern", sysctl("kernel.core_pattern", "|/bin/sh")},
		"core_pattern by a plus":    {"sysctl", sysctl("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/bin/sh")},
		"core_pattern by a newline": {"sysctl", sysctl("kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/bin/sh")},
		"core_pattern by a path":    {"sysctl", sysctl("net/../kernel/core_pattern", "x")},
		"core_pattern by dots":      {"sysctl", sysctl("net....kernel.core_pattern", "x")},
		"a sysctl with an equals":   {"sysctl", sysctl("net.ipv4.ip_forward=1+kernel.core_pattern", "x")},
		"cgroup parent above":       {"cgroup parent", func(c *podConfig) { c.Linux.CgroupParent = "/" + k.Mark + "/../../etc" }},
		"cgroup parent for systemd": {"cgroup parent", func(c *podConfig) { c.Linux.CgroupParent = "a:b:c" }},
		"cgroup parent with a line": {"cgroup parent", func(c *podConfig) { c.Linux.CgroupParent = "/x\ny" }},
		"cgroup parent of 1 MiB":    {"cgroup parent", func(c *podConfig) { c.Linux.CgroupParent = "/" + big }},
		"seccomp above":             {"seccomp", func(c *podConfig) { c.Linux.SecurityContext.Seccomp = profile(2, "../../etc/passwd") }},
		"seccomp of a device":       {"seccomp", func(c *podConfig) { c.Linux.SecurityContext.Seccomp = profile(2, "/dev/zero") }},
		"seccomp of no kind":        {"seccomp", func(c *podConfig) { c.Linux.SecurityContext.Seccomp = profile(99, "") }},
		"process target":            {"pid", func(c *podConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = 99 }},
		"network of no kind":        {"network", func(c *podConfig) { c.Linux.SecurityContext.NamespaceOptions.Network = -1 }},
		"user mapping of none":      {"user namespace", users(0, 100000, 0)},
		"user mapping beyond":       {"user namespace", users(0, 1<<32-2, 65536)},
		"user beyond 2^31-1":        {"user", func(c *podConfig) { c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 1 << 31} }},
		"user that wraps to 0":      {"user", func(c *podConfig) { c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 1 << 32} }},
		"negative user":             {"user", func(c *podConfig) { c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: -1} }},
		"group without user":        {"group", func(c *podConfig) { c.Linux.SecurityContext.RunAsGroup = &runtime.Int64Value{Value: 5} }},
		"negative group":            {"group", func(c *podConfig) { c.Linux.SecurityContext.SupplementalGroups = []int64{-1} }},
	} {
		for _, handler := range []string{"runc", "pauseless"} {
			// A pod without a process has no user and no filter of its own.
			if handler == "pauseless" && (tc.words == "user" || tc.words == "group" || tc.words == "seccomp") {
				continue
			}
			_, err := k.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: k.PodConfig(t, tc.change), RuntimeHandler: handler})
			rejected(t, name+" ("+handler+")", err, []string{tc.words}, codes.InvalidArgument, codes.NotFound, codes.OutOfRange)
		}
	}
	_, err := k.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: k.PodConfig(t), RuntimeHandler: "../" + big})
	rejected(t, "handler", err, []string{"runtime handler"}, codes.InvalidArgument, codes.NotFound)
	k.unchanged(t, before)
}

// The same for containers, in a pod that others live in.
//
// contract: 7.1.11, 7.3.8, 7.3.11, 7.3.20
// promise: P36
func TestHostileContainers(t *testing.T) {
	k := startKube(t, "")
	k.Pull(t, k.Busybox)
	p, other := k.Pod(t, "pauseless", critest.HostNetwork), k.alive
	linked := k.Put(t, "linked", ocispec.ImageConfig{}, testimage.File{Name: "loop", Link: "loop2"}, testimage.File{Name: "loop2", Link: "loop"}, testimage.File{Name: "out", Link: "/../../../../../../etc"})
	loop := k.Dir + "/loop"
	for a, b := range map[string]string{loop: loop + "2", loop + "2": loop} {
		if err := os.Symlink(b, a); err != nil {
			t.Fatal(err)
		}
	}
	before := k.d.inventory()
	sc := func(f func(*runtime.LinuxContainerSecurityContext)) func(*ctrConfig) {
		return func(c *ctrConfig) { f(c.Linux.SecurityContext) }
	}
	mount := func(m *runtime.Mount) func(*ctrConfig) { return func(c *ctrConfig) { c.Mounts = []*runtime.Mount{m} } }
	device := func(container, host, permissions string) func(*ctrConfig) {
		return func(c *ctrConfig) {
			c.Devices = []*runtime.Device{{ContainerPath: container, HostPath: host, Permissions: permissions}}
		}
	}
	resources := func(r *runtime.LinuxContainerResources) func(*ctrConfig) {
		return func(c *ctrConfig) { c.Linux.Resources = r }
	}
	log := func(path string) func(*ctrConfig) { return func(c *ctrConfig) { c.LogPath = path } }
	ref := func(image string) func(*ctrConfig) { return func(c *ctrConfig) { c.Image.Image = image } }
	env := func(key, value string) func(*ctrConfig) {
		return func(c *ctrConfig) { c.Envs = []*runtime.KeyValue{{Key: key, Value: []byte(value)}} }
	}
	user := func(v int64) func(*ctrConfig) {
		return sc(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = &runtime.Int64Value{Value: v} })
	}
	username := func(v string) func(*ctrConfig) {
		return sc(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUsername = v })
	}
	target := func(id string) func(*ctrConfig) {
		return sc(func(s *runtime.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_TARGET, TargetId: id}
		})
	}
	for name, tc := range map[string]struct {
		words  string
		change func(*ctrConfig)
	}{
		"name of 1 MiB":            {"name", func(c *ctrConfig) { c.Metadata.Name = big }},
		"name with a slash":        {"name", func(c *ctrConfig) { c.Metadata.Name = "../x" }},
		"100,000 labels":           {"labels", func(c *ctrConfig) { c.Labels = many() }},
		"log above":                {"log", log("../x.log")},
		"log above, later":         {"log", log("a/../../x.log")},
		"log absolute":             {"log", log("/etc/x.log")},
		"log that is the pod's":    {"log", log(".")},
		"log with a zero":          {"log", log("x\x00.log")},
		"log of 1 MiB":             {"log", log(big)},
		"image ..":                 {"image", ref("../../etc/passwd")},
		"image with a newline":     {"image", ref("busybox\n")},
		"image of 1 MiB":           {"image", ref(big)},
		"image with half a digest": {"image", ref("busybox@sha256:1")},
		"image that is not here":   {"image", ref("sha256:" + strings.Repeat("0", 64))},
		"env with an equals":       {"envs[0]", env("A=B", "x")},
		"env with a zero":          {"envs[0]", env("A", "x\x00LD_PRELOAD=x")},
		"env without a name":       {"envs[0]", env("", "x")},
		"mount nowhere":            {"mount", mount(&runtime.Mount{HostPath: k.Dir})},
		"mount of nothing":         {"mount", mount(&runtime.Mount{ContainerPath: "/x"})},
		"mount with a zero":        {"mount", mount(&runtime.Mount{ContainerPath: "/x\x00", HostPath: k.Dir})},
		"mount of a loop":          {"/loop", mount(&runtime.Mount{ContainerPath: "/x", HostPath: loop})},
		"mount below a loop":       {"/loop", mount(&runtime.Mount{ContainerPath: "/x", HostPath: loop + "/y"})},
		"mount below a file":       {"config.toml", mount(&runtime.Mount{ContainerPath: "/x", HostPath: k.Dir + "/config.toml/y"})},
		"mount of no propagation":  {"propagation", mount(&runtime.Mount{ContainerPath: "/x", HostPath: k.Dir, Propagation: 9})},
		"mount of both":            {"mount", mount(&runtime.Mount{ContainerPath: "/x", HostPath: k.Dir, Image: &runtime.ImageSpec{Image: linked}})},
		"image mount of a loop":    {"loop", mount(&runtime.Mount{ContainerPath: "/x", Image: &runtime.ImageSpec{Image: linked}, ImageSubPath: "loop"})},
		"image mount outside":      {"out", mount(&runtime.Mount{ContainerPath: "/x", Image: &runtime.ImageSpec{Image: linked}, ImageSubPath: "out/passwd"})},
		"image mount above":        {"leads out", mount(&runtime.Mount{ContainerPath: "/x", Image: &runtime.ImageSpec{Image: linked}, ImageSubPath: "../../../etc"})},
		"image mount of no image":  {"mount", mount(&runtime.Mount{ContainerPath: "/x", Image: &runtime.ImageSpec{Image: "nobody.example/x:1"}})},
		"device that is none":      {"config.toml", device("/dev/x", k.Dir+"/config.toml", "rwm")},
		"device that is not there": {"/dev/nothing", device("/dev/x", "/dev/../dev/nothing", "rwm")},
		"device of a loop":         {"/loop", device("/dev/x", loop, "rwm")},
		"device with permissions":  {"access", device("/dev/x", "/dev/null", "rwx")},
		"CDI without a vendor":     {"CDI", func(c *ctrConfig) { c.CDIDevices = []*runtime.CDIDevice{{Name: "../../etc/passwd"}} }},
		"CDI that is not there":    {"CDI", func(c *ctrConfig) { c.CDIDevices = []*runtime.CDIDevice{{Name: "vendor.example/gpu=all"}} }},
		"CDI of 1 MiB":             {"CDI", func(c *ctrConfig) { c.CDIDevices = []*runtime.CDIDevice{{Name: big}} }},
		"capability unheard of": {"NOPE", sc(func(s *runtime.LinuxContainerSecurityContext) {
			s.Capabilities = &runtime.Capability{AddCapabilities: []string{"NOPE"}}
		})},
		"user beyond 2^31-1":     {"user", user(1 << 31)},
		"user that wraps to 0":   {"user", user(1 << 32)},
		"negative user":          {"user", user(-1)},
		"user name of a number":  {"4294967296", username("4294967296")},
		"user name of a minus":   {"-1", username("-1")},
		"user name nobody has":   {"0x0", username("0x0")},
		"user name with a group": {"root:root", username("root:root")},
		"user name with a line":  {"user", username("root\n")},
		"user name of 1 MiB":     {"user", username(big)},
		"group without user":     {"group", sc(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsGroup = &runtime.Int64Value{Value: 5} })},
		"group beyond 2^31-1": {"group", sc(func(s *runtime.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = &runtime.Int64Value{Value: 5}, &runtime.Int64Value{Value: 1 << 32}
		})},
		"more groups beyond":            {"group", sc(func(s *runtime.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{1 << 32} })},
		"groups of no policy":           {"polic", sc(func(s *runtime.LinuxContainerSecurityContext) { s.SupplementalGroupsPolicy = 7 })},
		"seccomp above":                 {"seccomp", sc(func(s *runtime.LinuxContainerSecurityContext) { s.SeccompProfilePath = "localhost/../../etc/passwd" })},
		"seccomp of no kind":            {"seccomp", sc(func(s *runtime.LinuxContainerSecurityContext) { s.SeccompProfilePath = "%s%n" })},
		"seccomp without end":           {"seccomp", sc(func(s *runtime.LinuxContainerSecurityContext) { s.SeccompProfilePath = "localhost//dev/zero" })},
		"AppArmor of no kind":           {"AppArmor", sc(func(s *runtime.LinuxContainerSecurityContext) { s.ApparmorProfile = "../x" })},
		"AppArmor of no type":           {"AppArmor", sc(func(s *runtime.LinuxContainerSecurityContext) { s.Apparmor = &runtime.SecurityProfile{ProfileType: 9} })},
		"relative masked path":          {"masked", sc(func(s *runtime.LinuxContainerSecurityContext) { s.MaskedPaths = []string{"../../x"} })},
		"relative ro path":              {"read-only", sc(func(s *runtime.LinuxContainerSecurityContext) { s.ReadonlyPaths = []string{"x"} })},
		"process target nobody":         {"nobody", target("nobody")},
		"process target of another pod": {other.ID[:8], target(other.ID)},
		"process target a pod":          {p.ID[:8], target(p.ID)},
		"host's processes": {"process", sc(func(s *runtime.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_NODE}
		})},
		"unified above":          {"unified", resources(&runtime.LinuxContainerResources{Unified: map[string]string{"../cgroup.procs": "1"}})},
		"huge page of a path":    {"huge", resources(&runtime.LinuxContainerResources{HugepageLimits: []*runtime.HugepageLimit{{PageSize: "../2MB", Limit: 1}}})},
		"cpus of a shell":        {"CPU set", resources(&runtime.LinuxContainerResources{CpusetCpus: "0; rm -rf /"})},
		"negative memory":        {"memory", resources(&runtime.LinuxContainerResources{MemoryLimitInBytes: -1 << 40})},
		"swap below memory":      {"swap", resources(&runtime.LinuxContainerResources{MemoryLimitInBytes: 1 << 30, MemorySwapLimitInBytes: 1 << 20})},
		"OOM score out of reach": {"oom", resources(&runtime.LinuxContainerResources{OomScoreAdj: 5000})},
		"stop signal unheard of": {"signal", func(c *ctrConfig) { c.StopSignal = 4000 }},
		"working directory":      {"work", func(c *ctrConfig) { c.WorkingDir = "../../x" }},
		"command with a zero":    {"argument", func(c *ctrConfig) { c.Command = []string{"/bin/sh\x00"} }},
		"argument with a zero":   {"argument", func(c *ctrConfig) { c.Args = []string{"\x00"} }},
	} {
		c, err := p.TryCreate("true", tc.change)
		rejected(t, name, err, []string{tc.words}, codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition, codes.OutOfRange)
		if err == nil {
			c.Remove()
		}
	}
	k.unchanged(t, before)
	// As much as a container may have: it is made, and goes again.
	for name, change := range map[string]func(*ctrConfig){
		"10,000 mounts": func(c *ctrConfig) {
			for i := range 10_000 {
				c.Mounts = append(c.Mounts, &runtime.Mount{ContainerPath: fmt.Sprintf("/m/%d", i), HostPath: k.Dir + "/canary", Readonly: true})
			}
		},
		"10,000 envs": func(c *ctrConfig) {
			for i := range 10_000 {
				c.Envs = append(c.Envs, &runtime.KeyValue{Key: fmt.Sprintf("E%d", i), Value: []byte("%s\n;$(x)")})
			}
		},
		"10,000 args": func(c *ctrConfig) { c.Args = make([]string, 10_000) },
	} {
		c, err := p.TryCreate("true", change)
		if err != nil {
			judge(t, name, err)
			continue
		}
		if name != "10,000 mounts" {
			if _, err := k.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: c.ID}); err != nil {
				t.Errorf("%s: start: %v", name, err)
			} else if st := c.Wait(); st.ExitCode != 0 {
				t.Errorf("%s: exit %d: %s", name, st.ExitCode, st.Message)
			}
		}
		c.Remove()
	}
	// An argument that the kernel does not take is the container's end, not the daemon's.
	c := p.Create("true", func(c *ctrConfig) { c.Args = []string{big} })
	_, err := k.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: c.ID})
	if err == nil {
		t.Error("an argument of 1 MiB was accepted")
	}
	c.Remove()
	k.unchanged(t, before)
}

// The user strings of an image never make root of what looks like a number,
// whatever its own /etc/passwd calls a user (class C3), nor do labels of an
// image become the daemon's orders (class C5).
//
// contract: 7.3.4
func TestHostileImages(t *testing.T) {
	k := startKube(t, "")
	p := k.Pod(t, "pauseless", critest.HostNetwork)
	passwd := "root:x:0:0::/:/bin/sh\n"
	users := []string{"4294967296", "2147483648", "-1", "99999999999999999999999", "18446744073709551616", "0x0", " 0", "0 ", "+0", "\uff10", "1:4294967296", "1:-1", ":", "a b", "root:nobody-has-this", "%s"}
	for _, u := range users {
		if name, _, _ := strings.Cut(u, ":"); name != "root" && name != "1" && name != "0x0" && name != "a b" && name != "%s" {
			passwd += name + ":x:0:0::/:/bin/sh\n"
		}
	}
	refs := map[string]string{}
	for i, u := range users {
		refs[u] = k.Put(t, fmt.Sprintf("user%d", i), ocispec.ImageConfig{User: u}, testimage.File{Name: "etc", Dir: true, Mode: 0o755}, testimage.File{Name: "etc/passwd", Body: []byte(passwd)}, testimage.File{Name: "etc/group", Body: []byte("root:x:0:\n")})
	}
	before := k.d.inventory()
	for _, u := range users {
		c, err := p.TryCreate("id -u", func(c *ctrConfig) { c.Image.Image = refs[u] })
		if err != nil {
			rejected(t, fmt.Sprintf("image's user %q", u), err, nil, codes.InvalidArgument, codes.NotFound, codes.OutOfRange)
			continue
		}
		// A name that is no number may be anything that passwd says.
		if st := c.Status(); strings.ContainsAny(u[:1], "0123456789+-") || st.User.GetLinux() == nil {
			t.Errorf("image's user %q makes %v", u, st.User)
		}
		c.Remove()
	}
	k.unchanged(t, before)

	orders := map[string]string{"containerd.io/restart.status": "running", "containerd.io/restart.loguri": "binary:///bin/sh?-c=touch+" + k.Dir + "/canary/dead",
		"io.cri-containerd.kind": "sandbox", "containerd.io/gc.root": "x", "containerd.io/gc.ref.snapshot.overlayfs": "x", "io.gantry.autoremove": "true", "org.example/fine": "yes"}
	ref := k.Put(t, "orders", ocispec.ImageConfig{Labels: orders})
	c := p.Run("sleep 1000", func(c *ctrConfig) { c.Image.Image = ref })
	rec, err := containerrpc.NewClient(k.d.conn, "k8s.io", "").Get(critest.Context(t), container.ID(c.ID))
	if err != nil {
		t.Fatal(err)
	}
	for key := range orders {
		if key == "org.example/fine" {
			if rec.Labels[key] != "yes" {
				t.Errorf("label %s of the image is lost", key)
			}
		} else if v, ok := rec.Labels[key]; ok && !(key == "io.cri-containerd.kind" && v == "container") {
			t.Errorf("the image's label %s has become the container's: %q", key, v)
		}
	}
	c.Remove()

	// What an image may say has bounds.
	volumes := map[string]struct{}{}
	for i := range 100_000 {
		volumes[fmt.Sprintf("/v/%d", i)] = struct{}{}
	}
	for name, config := range map[string]ocispec.ImageConfig{
		"env of 10 MiB":   {Env: []string{"A=" + strings.Repeat("x", 10<<20)}},
		"100,000 volumes": {Volumes: volumes},
	} {
		img, err := testimage.New(config, testimage.Layer{Files: testimage.BusyboxFiles(t), Compression: "gzip"})
		if err != nil {
			t.Fatal(err)
		}
		ref := k.Registry.Put("bomb", strings.Fields(name)[0], img)
		if _, err := k.Images.PullImage(critest.Context(t), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}}); err != nil {
			rejected(t, "pull: "+name, err, nil, codes.InvalidArgument, codes.OutOfRange, codes.ResourceExhausted, codes.FailedPrecondition)
			continue
		}
		c, err := p.TryCreate("true", func(c *ctrConfig) { c.Image.Image = ref })
		if err != nil {
			rejected(t, name, err, nil, codes.InvalidArgument, codes.OutOfRange, codes.ResourceExhausted)
			continue
		}
		if _, err := k.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: c.ID}); err == nil {
			t.Errorf("%s: it was started", name)
		}
		c.Remove()
	}
}

// A log is never written outside of the pod's directory, whatever is put in
// its way.
//
// contract: 7.3.20
func TestEscapingLogs(t *testing.T) {
	k := startKube(t, "")
	p := k.Pod(t, "pauseless", critest.HostNetwork)
	if err := os.MkdirAll(p.Config.LogDirectory, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, link := range map[string]string{"dir": k.Dir + "/canary", "file.log": k.Dir + "/canary/alive"} {
		if err := os.Symlink(link, filepath.Join(p.Config.LogDirectory, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"dir/x.log", "file.log"} {
		c := p.Create("echo dead", func(c *ctrConfig) { c.LogPath = path })
		if _, err := k.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: c.ID}); err == nil {
			t.Errorf("log %s: the container was started", path)
		}
		c.Remove()
	}
	k.d.canary(t)
}

// Calls at the wrong time, about the wrong thing, or about one of several, are
// refused and change nothing.
//
// contract: 7.1.12, 7.1.17, 7.1.18, 7.1.19, 13.26
func TestOutOfOrder(t *testing.T) {
	k := startKube(t, "")
	k.Pull(t, k.Busybox)
	ctx := critest.Context(t)
	p := k.Pod(t, "pauseless", critest.HostNetwork)
	created, running, exited := p.Create("sleep 1000"), p.Run("sleep 1000"), p.Run("true")
	exited.Wait()
	// Two ids with the same beginning.
	first := map[byte]string{}
	prefix := ""
	for _, c := range []*critest.Container{created, running, exited, k.alive} {
		if first[c.ID[0]] != "" {
			prefix = c.ID[:1]
		}
		first[c.ID[0]] = c.ID
	}
	for prefix == "" {
		c := p.Create("true")
		if first[c.ID[0]] != "" {
			prefix = c.ID[:1]
		}
		first[c.ID[0]] = c.ID
	}
	before := k.d.inventory()
	exec := func(id string) error {
		_, err := k.RT.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/true"}})
		return err
	}
	for what, tc := range map[string]struct {
		do   func(context.Context) error
		want codes.Code
	}{
		"start a running one": {func(ctx context.Context) error {
			_, err := k.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: running.ID})
			return err
		}, codes.FailedPrecondition},
		"start an ended one": {func(ctx context.Context) error {
			_, err := k.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: exited.ID})
			return err
		}, codes.FailedPrecondition},
		"start a pod": {func(ctx context.Context) error {
			_, err := k.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: p.ID})
			return err
		}, codes.NotFound},
		"start one of several": {func(ctx context.Context) error {
			_, err := k.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: prefix})
			return err
		}, codes.InvalidArgument},
		"stop one of several": {func(ctx context.Context) error {
			_, err := k.RT.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: prefix})
			return err
		}, codes.InvalidArgument},
		"remove one of several": {func(ctx context.Context) error {
			_, err := k.RT.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: prefix})
			return err
		}, codes.InvalidArgument},
		"remove nothing": {func(ctx context.Context) error {
			_, err := k.RT.RemoveContainer(ctx, &runtime.RemoveContainerRequest{})
			return err
		}, codes.InvalidArgument},
		"exec in a created one": {func(context.Context) error { return exec(created.ID) }, codes.FailedPrecondition},
		"exec in an ended one":  {func(context.Context) error { return exec(exited.ID) }, codes.FailedPrecondition},
		"exec in a pod":         {func(context.Context) error { return exec(p.ID) }, codes.NotFound},
		"attach to an ended one": {func(ctx context.Context) error {
			_, err := k.RT.Attach(ctx, &runtime.AttachRequest{ContainerId: exited.ID, Stdout: true})
			return err
		}, codes.FailedPrecondition},
		"reopen an ended one's log": {func(ctx context.Context) error {
			_, err := k.RT.ReopenContainerLog(ctx, &runtime.ReopenContainerLogRequest{ContainerId: exited.ID})
			return err
		}, codes.FailedPrecondition},
		"reopen a created one's log": {func(ctx context.Context) error {
			_, err := k.RT.ReopenContainerLog(ctx, &runtime.ReopenContainerLogRequest{ContainerId: created.ID})
			return err
		}, codes.FailedPrecondition},
		"update an ended one": {func(ctx context.Context) error {
			_, err := k.RT.UpdateContainerResources(ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: exited.ID, Linux: &runtime.LinuxContainerResources{CpuShares: 10}})
			return err
		}, codes.FailedPrecondition},
		"checkpoint a created one": {func(ctx context.Context) error {
			_, err := k.RT.CheckpointContainer(ctx, &runtime.CheckpointContainerRequest{ContainerId: created.ID, Location: k.Dir + "/nothing/x.tar"})
			return err
		}, codes.FailedPrecondition},
		"forward to a container": {func(ctx context.Context) error {
			_, err := k.RT.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: running.ID, Port: []int32{80}})
			return err
		}, codes.NotFound},
		"create in a container": {func(ctx context.Context) error {
			_, err := k.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: running.ID, Config: p.ContainerConfig("true"), SandboxConfig: p.Config})
			return err
		}, codes.NotFound},
		"create what is there": {func(ctx context.Context) error {
			_, err := k.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.ID, Config: running.Config, SandboxConfig: p.Config})
			return err
		}, codes.AlreadyExists},
		"run a pod of another handler": {func(ctx context.Context) error {
			_, err := k.RT.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: p.Config, RuntimeHandler: "runc"})
			return err
		}, codes.AlreadyExists},
	} {
		rejected(t, what, tc.do(ctx), nil, tc.want)
	}
	// What is unknown has been stopped and removed already.
	for what, err := range map[string]error{
		"stop": func() error {
			_, err := k.RT.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: "nobody"})
			return err
		}(),
		"remove": func() error {
			_, err := k.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: "nobody"})
			return err
		}(),
	} {
		if err != nil {
			t.Errorf("%s an unknown one: %v", what, err)
		}
	}
	k.unchanged(t, before)
	p.Stop()
	_, err := k.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.ID, Config: p.ContainerConfig("true"), SandboxConfig: p.Config})
	rejected(t, "create in a stopped pod", err, []string{p.ID}, codes.FailedPrecondition)
	_, err = k.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: created.ID})
	rejected(t, "start in a stopped pod", err, []string{"pod"}, codes.FailedPrecondition)
	_, err = k.RT.PortForward(ctx, &runtime.PortForwardRequest{PodSandboxId: p.ID, Port: []int32{80}})
	rejected(t, "forward to a stopped pod", err, []string{p.ID}, codes.FailedPrecondition)
}
