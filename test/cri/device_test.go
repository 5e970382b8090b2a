//go:build linux

package cri

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/oci"
	"github.com/gantryd/gantry/test/critest"
)

// hostDevice is a device that containers do not have by themselves and whose
// opening does nothing.
func hostDevice(t *testing.T) string {
	t.Helper()
	for _, d := range []string{"/dev/fuse", "/dev/loop-control", "/dev/net/tun", "/dev/cpu_dma_latency"} {
		if _, err := os.Stat(d); err == nil {
			return d
		}
	}
	t.Skip("no harmless device on this host")
	return ""
}

// likeDevice makes a device node of the kind of another one.
func likeDevice(t *testing.T, path, like string) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(like, &st); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(path, st.Mode&unix.S_IFMT|0o666, int(st.Rdev)); err != nil {
		t.Fatal(err)
	}
}

func devices(d ...*runtime.Device) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) { c.Devices = d }
}

// opens tries to open a device for reading and for writing.
func opens(path string) string {
	return fmt.Sprintf("(: < %[1]s) 2>/dev/null && echo read; (: > %[1]s) 2>/dev/null && echo write; true", path)
}

// What a device may be used for is what the kernel allows, also to what is
// executed.
//
// contract: 7.3.12
func TestDevices(t *testing.T) {
	n := node(t)
	host := hostDevice(t)
	dir := hostDir(t, n, "file")
	if err := os.MkdirAll(dir+"/nodes/deep", 0o755); err != nil {
		t.Fatal(err)
	}
	likeDevice(t, dir+"/nodes/a", host)
	likeDevice(t, dir+"/nodes/deep/b", host)
	if err := os.Symlink(host, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		for access, want := range map[string]string{"r": "read\n", "w": "write\n", "rw": "read\nwrite\n", "rwm": "read\nwrite\n", "": "read\nwrite\n"} {
			c := p.Run(opens("/dev/mine")+"; echo done; sleep 600", devices(&runtime.Device{HostPath: host, ContainerPath: "/dev/mine", Permissions: access}))
			critest.Eventually(t, "output", func() bool { return strings.HasSuffix(c.Log(), "done\n") })
			if out := c.Log(); out != want+"done\n" {
				t.Errorf("access %q: %q", access, out)
			}
			if out := c.Exec(opens("/dev/mine")); out != want {
				t.Errorf("access %q, exec: %q", access, out)
			}
			c.Remove()
		}
		if out := p.Output("ls /dev/dir/a /dev/dir/deep/b /dev/link && test -c /dev/link && echo device; ls "+host+" 2>/dev/null || echo not the host\\'s path",
			devices(&runtime.Device{HostPath: dir + "/nodes", ContainerPath: "/dev/dir"}, &runtime.Device{HostPath: dir + "/link", ContainerPath: "/dev/link"})); out != "/dev/dir/a\n/dev/dir/deep/b\n/dev/link\ndevice\nnot the host's path\n" {
			t.Errorf("%q", out)
		}
		// A node that a container makes for itself is of no use to it.
		var st unix.Stat_t
		if err := unix.Stat(host, &st); err != nil {
			t.Fatal(err)
		}
		if out := p.Output(fmt.Sprintf("mknod /tmp/d c %d %d; ", unix.Major(st.Rdev), unix.Minor(st.Rdev)) + opens("/tmp/d")); out != "" {
			t.Errorf("a device of its own: %q", out)
		}
		for what, tc := range map[string]struct {
			d    *runtime.Device
			want codes.Code
		}{
			"file":     {&runtime.Device{HostPath: dir + "/file"}, codes.InvalidArgument},
			"nothing":  {&runtime.Device{HostPath: dir + "/none"}, codes.NotFound},
			"relative": {&runtime.Device{HostPath: "dev/null"}, codes.InvalidArgument},
			"access":   {&runtime.Device{HostPath: host, Permissions: "rwx"}, codes.InvalidArgument},
		} {
			refused(t, p, what, devices(tc.d), tc.want)
		}
	})
}

// Devices that vendors describe in files, named in the field, in an annotation,
// or in both.
//
// contract: 7.3.12
func TestCDI(t *testing.T) {
	n := node(t)
	host := hostDevice(t)
	dir := hostDir(t, n, "library")
	edits := func(name string) map[string]any {
		return map[string]any{"name": name, "containerEdits": map[string]any{"env": []string{"CDI_" + strings.ToUpper(name) + "=1"},
			"deviceNodes": []map[string]any{{"path": "/dev/cdi-" + name, "hostPath": host, "permissions": "rw"}}}}
	}
	spec, err := json.Marshal(map[string]any{"cdiVersion": "0.6.0", "kind": "vendor.example/device", "devices": []any{edits("a"), edits("b")},
		"containerEdits": map[string]any{"mounts": []map[string]any{{"hostPath": dir, "containerPath": "/cdi", "options": []string{"ro", "bind"}}}}})
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, n.Dir+"/cdi/vendor.json", string(spec))
	field := func(names ...string) func(*runtime.ContainerConfig) {
		return func(c *runtime.ContainerConfig) {
			for _, name := range names {
				c.CDIDevices = append(c.CDIDevices, &runtime.CDIDevice{Name: name})
			}
		}
	}
	annotation := func(value string) func(*runtime.ContainerConfig) {
		return func(c *runtime.ContainerConfig) { c.Annotations = map[string]string{"cdi.k8s.io/test": value} }
	}
	probe := "env | grep CDI_ | sort; " + opens("/dev/cdi-a") + "; cat /cdi/library 2>/dev/null; ls /dev | grep cdi"
	const a, both = "CDI_A=1\nread\nwrite\nlibrary\ncdi-a\n", "CDI_A=1\nCDI_B=1\nread\nwrite\nlibrary\ncdi-a\ncdi-b\n"
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		for _, tc := range []struct {
			what   string
			change []func(*runtime.ContainerConfig)
			want   string
		}{
			{"field", []func(*runtime.ContainerConfig){field("vendor.example/device=a")}, a},
			{"annotation", []func(*runtime.ContainerConfig){annotation("vendor.example/device=a,vendor.example/device=b")}, both},
			{"both", []func(*runtime.ContainerConfig){field("vendor.example/device=a", "vendor.example/device=b"), annotation("vendor.example/device=a")}, both},
		} {
			if out := p.Output(probe, tc.change...); out != tc.want {
				t.Errorf("%s: %q", tc.what, out)
			}
		}
		if out := p.Output("env | grep CDI_; ls /dev | grep cdi; ls /cdi 2>/dev/null; true"); out != "" {
			t.Errorf("without a device: %q", out)
		}
		refused(t, p, "unknown device", field("vendor.example/device=c"), codes.NotFound)
		refused(t, p, "unknown vendor", annotation("other.example/device=a"), codes.NotFound)
		refused(t, p, "no name of a device", field("/dev/null"), codes.InvalidArgument)
		refused(t, p, "no name of a device in an annotation", annotation("../../etc"), codes.InvalidArgument)
	})
}

// What an administrator has changed of the defaults.
//
// contract: 7.3.1, 7.3.4, 7.3.12, 7.3.13, 7.3.15
func TestRuntimeOptions(t *testing.T) {
	// A specification as `ctr oci spec` prints it, changed: it is for
	// containers, whose own settings are put over it, and not for pods.
	facts, err := client.HostFacts(false)
	if err != nil {
		t.Fatal(err)
	}
	base, err := oci.Generate(facts, "x", "x", ocispec.ImageConfig{Cmd: []string{"none"}, Env: []string{"ADMIN=1", "BOTH=admin"}},
		oci.WithRlimit("NOFILE", 777, 888), oci.WithCapabilities(nil, []string{"MKNOD"}), oci.WithReadonlyRoot(), oci.WithAnnotations(map[string]string{"admin": "yes"}))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	base.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat >> " + dir + "/hooked; echo >> " + dir + "/hooked"}}}}
	data, err := json.Marshal(base)
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/base.json", string(data))
	n := critest.Run(t, binDir, `
  device_ownership_from_security_context = true
  restrict_oom_score_adj = true
  unset_seccomp_profile = 'runtime/default'
  disable_hugetlb_controller = false
  tolerate_missing_hugetlb_controller = false
  enable_unprivileged_ports = false
  enable_unprivileged_icmp = false
  disable_proc_mount = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.based]
    runtime_type = 'io.containerd.runc.v2'
    base_runtime_spec = '`+dir+`/base.json'
`)
	t.Run("based", func(t *testing.T) {
		p := n.Pod(t, "based")
		c := p.Run("echo $ADMIN $BOTH; ulimit -n; touch /x 2>/dev/null || echo closed; sleep 600", func(c *runtime.ContainerConfig) {
			c.Envs = []*runtime.KeyValue{{Key: "BOTH", Value: []byte("mine")}}
		})
		critest.Eventually(t, "output", func() bool { return strings.Count(c.Log(), "\n") >= 3 })
		if out := c.Log(); out != "1 mine\n777\nclosed\n" {
			t.Errorf("%q", out)
		}
		s := specOf(t, c)
		if s.Annotations["admin"] != "yes" || slices.Contains(s.Process.Capabilities.Bounding, "CAP_MKNOD") || s.Process.NoNewPrivileges {
			t.Errorf("%v %v", s.Annotations, s.Process)
		}
		hooked, err := os.ReadFile(dir + "/hooked")
		if err != nil || strings.Count(string(hooked), "\n") != 1 || !strings.Contains(string(hooked), c.ID) {
			t.Errorf("the hook was run for %s: %v", hooked, err)
		}
	})
	host := hostDevice(t)
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			p := n.Pod(t, handler)
			out := p.Output("stat -c %u:%g /dev/mine; grep ^Seccomp: /proc/self/status | tr '\\t' ' '; cat /proc/self/oom_score_adj /proc/sys/net/ipv4/ip_unprivileged_port_start; "+
				"test $(wc -c < /proc/keys) = 0 && echo masked",
				devices(&runtime.Device{HostPath: host, ContainerPath: "/dev/mine", Permissions: "rw"}), func(c *runtime.ContainerConfig) {
					c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsGroup = int64Of(1000), int64Of(1001)
					c.Linux.Resources = &runtime.LinuxContainerResources{OomScoreAdj: -900}
				})
			if want := fmt.Sprintf("1000:1001\nSeccomp: 2\n%d\n1024\nmasked\n", clamped(t, n, handler)); out != want {
				t.Errorf("%q, want %q", out, want)
			}
			huge := func(c *runtime.ContainerConfig) {
				c.Linux.Resources = &runtime.LinuxContainerResources{HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 2 << 20}}}
			}
			if hasController(t, "hugetlb") {
				p.Output("true", huge)
			} else {
				refused(t, p, "huge pages without their controller", huge, codes.FailedPrecondition)
			}
		})
	}
}
