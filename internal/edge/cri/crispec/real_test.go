package crispec

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/oci"
)

// bench makes real containers of specifications with a runtime's command.
type bench struct {
	t       *testing.T
	dir     string
	rt      []string
	parent  string
	rootfs  string
	podDir  string
	created int
}

func newBench(t *testing.T, name string) *bench {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make containers")
	}
	bin, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		t.Skip("the cgroups of this test are of version 1")
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("busybox is not installed")
	}
	dir, err := os.MkdirTemp("", "gcs") // t.TempDir is closed to the users of user namespaces
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: dir, rt: []string{bin, "--root", dir + "/state"}, parent: "/gantry-crispec-" + filepath.Base(dir), rootfs: dir + "/rootfs", podDir: dir + "/pod"}
	t.Cleanup(func() {
		groups, _ := filepath.Glob("/sys/fs/cgroup/*" + b.parent)
		for _, g := range groups {
			_ = unix.Rmdir(g)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	for _, d := range []string{"bin", "etc", "proc", "sys", "dev", "tmp", "run", "a", "shared"} {
		b.must(os.MkdirAll(filepath.Join(b.rootfs, d), 0o755))
	}
	b.must(os.Chmod(dir, 0o755))
	b.must(os.WriteFile(b.rootfs+"/bin/busybox", busybox, 0o755))
	for _, applet := range []string{"sh", "cat", "ls", "hostname", "sleep", "touch", "mkdir", "ps", "grep", "readlink"} {
		b.must(os.Symlink("busybox", filepath.Join(b.rootfs, "bin", applet)))
	}
	b.must(os.MkdirAll(b.podDir+"/shm", 0o1777))
	for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
		b.must(os.WriteFile(filepath.Join(b.podDir, f), []byte("pod "+f+"\n"), 0o644))
		b.must(os.WriteFile(filepath.Join(b.rootfs, "etc", f), nil, 0o644)) // root of a user namespace could not make it
	}
	return b
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// command runs the runtime in a bundle of the specification.
func (b *bench) command(s *specs.Spec, args ...string) (string, error) {
	b.t.Helper()
	b.created++
	bundle := fmt.Sprintf("%s/bundle%d", b.dir, b.created)
	b.must(os.Mkdir(bundle, 0o755))
	s.Root.Path = b.rootfs
	config, err := json.Marshal(s)
	b.must(err)
	b.must(os.WriteFile(bundle+"/config.json", config, 0o600))
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	args = append(append([]string{}, b.rt[1:]...), args...)
	cmd := exec.CommandContext(ctx, b.rt[0], args...)
	out, err := os.Create(bundle + "/out") // a pipe would be held open by the container
	b.must(err)
	defer out.Close()
	cmd.Dir, cmd.Stdout, cmd.Stderr = bundle, out, out
	err = cmd.Run()
	text, rerr := os.ReadFile(bundle + "/out")
	b.must(rerr)
	return string(text), err
}

// pod starts a sandbox and returns what its containers join.
func (b *bench) pod(in SandboxInput) map[string]string {
	b.t.Helper()
	s, err := Sandbox(in)
	b.must(err)
	b.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if out, err := exec.CommandContext(ctx, b.rt[0], append(b.rt[1:], "delete", "-f", in.ID)...).CombinedOutput(); err != nil {
			b.t.Errorf("%v: %s", err, out)
		}
	})
	if out, err := b.command(s, "run", "-d", "--pid-file", b.dir+"/pid", in.ID); err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
	pid, err := os.ReadFile(b.dir + "/pid")
	b.must(err)
	ns := map[string]string{}
	for name, file := range map[string]string{"network": "net", "ipc": "ipc", "uts": "uts", "pid": "pid", "user": "user"} {
		ns[name] = "/proc/" + string(pid) + "/ns/" + file
	}
	return ns
}

func ownCapabilities(t *testing.T) []string {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, mask, _ := strings.Cut(string(status), "CapEff:\t")
	mask, _, _ = strings.Cut(mask, "\n")
	set, err := strconv.ParseUint(mask, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	var caps []string
	for n, c := range oci.AllCapabilities() {
		if set&(1<<n) != 0 {
			caps = append(caps, c)
		}
	}
	return caps
}

const census = `cat /proc/self/status /proc/self/uid_map; echo fds $(ls /proc/self/fd); hostname; cat /etc/hosts /proc/self/oom_score_adj
	grep -E " (/a|/sys|/sys/fs/cgroup|/proc/sys|/proc/cpuinfo|/dev/shm|/) " /proc/self/mountinfo
	cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced; cat /proc/1/comm; cat /proc/self/cgroup
	touch /x 2>/dev/null && echo root is writable; mkdir /sys/fs/cgroup/pids/x 2>/dev/null && echo cgroups are writable; ls /dev`

// TestCensus looks at specifications from inside: what the kernel says counts
// (classes C2, C7).
//
// contract: 7.3.2, 7.3.7, 7.3.8, 7.3.9, 7.3.18
func TestCensus(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*SandboxInput, *ContainerInput)
		want   []string // expressions, each matches a line
		not    []string
	}{
		{"default", func(_ *SandboxInput, in *ContainerInput) {
			in.sc().Seccomp = &runtime.SecurityProfile{}
			in.sc().NoNewPrivs, in.sc().ReadonlyRootfs = true, true
			in.Config.Linux.Resources = &runtime.LinuxContainerResources{OomScoreAdj: 700}
			in.Mounts = []Mount{{Mount: &runtime.Mount{ContainerPath: "/a", HostPath: in.PodDir, Readonly: true}}}
		}, []string{
			"Uid:\t1000\t1000\t1000\t1000", "Gid:\t1001\t.*", "Groups:\t10 1001 ?", "NoNewPrivs:\t1", "Seccomp:\t2", "CapBnd:\t00000000a80425fb",
			"CapEff:\t0000000000000000", "CapInh:\t0000000000000000", "CapAmb:\t0000000000000000", "fds 0 1 2 3", "web", "pod hosts", "700", "0", "1", "sh",
			`.* /sys ro,.*`, `.* /proc/sys ro,.*`, `.* /proc/cpuinfo .*`, `.* /dev/shm rw.*`, `.* /a ro,.*`,
		}, []string{"root is writable", ".*shared:.*"}},
		{"privileged", func(pod *SandboxInput, in *ContainerInput) {
			in.privileged()
			in.User = specs.User{}
		}, []string{
			"Uid:\t0\t0\t0\t0", "NoNewPrivs:\t0", "Seccomp:\t0", `.* /sys rw,.*`, "root is writable",
		}, []string{`.* /proc/sys .*`, `.* /proc/cpuinfo .*`, "CapBnd:\t00000000a80425fb"}},
		{"drop all", func(_ *SandboxInput, in *ContainerInput) {
			in.User = specs.User{}
			in.sc().Capabilities = &runtime.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_BIND_SERVICE"}}
			in.sc().MaskedPaths, in.sc().ReadonlyPaths = nil, nil
		}, []string{"CapBnd:\t0000000000000400", "CapEff:\t0000000000000400", "Seccomp:\t0"}, []string{"cgroups are writable", `.* /proc/sys .*`, `.* /proc/cpuinfo .*`}},
		{"user namespace", func(pod *SandboxInput, in *ContainerInput) {
			in.podSC().NamespaceOptions.UsernsOptions = userns(65536)
			in.User = specs.User{}
		}, []string{"Uid:\t0\t0\t0\t0", ` +0 +65536 +65536`, "web"}, nil},
		{"shared processes", func(pod *SandboxInput, in *ContainerInput) {
			in.podSC().NamespaceOptions.Pid, in.sc().NamespaceOptions.Pid = 0, 0
		}, []string{"sleep"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t, "runc")
			pod, in := sandboxInput(), containerInput()
			suffix := "-" + filepath.Base(b.dir)
			pod.ID, in.ID, in.PodID = "pod"+suffix, "ctr"+suffix, "pod"+suffix
			pod.Config.Linux.CgroupParent, pod.NetNSPath, pod.Dir = b.parent, "", b.podDir
			pod.Config.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1"}
			pod.Image.Entrypoint, pod.Image.Env = []string{"/bin/sleep", "600"}, nil
			pod.Host = Host{HostFacts: oci.HostFacts{Capabilities: ownCapabilities(t)}, UserNamespaces: true}
			in.Pod, in.Host, in.PodDir = pod.Config, pod.Host, b.podDir
			in.sc().MaskedPaths = []string{"/proc/cpuinfo"}
			in.Config.Command, in.Config.WorkingDir = []string{"/bin/sh", "-c", census}, "/tmp"
			tc.change(&pod, &in)
			in.Namespaces = b.pod(pod)
			s, err := Container(in)
			b.must(err)
			out, err := b.command(s, "run", in.ID)
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			match := func(e string) bool { return regexp.MustCompile(`(?m)^` + e + `$`).MatchString(out) }
			for _, e := range tc.want {
				if !match(e) {
					t.Errorf("no %q", e)
				}
			}
			for _, e := range tc.not {
				if match(e) {
					t.Errorf("there is %q", e)
				}
			}
			// Whatever else, it is in its pod's cgroup.
			if !strings.Contains(out, b.parent+"/"+in.ID) {
				t.Errorf("not in %s", b.parent)
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}
