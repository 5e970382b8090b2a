//go:build linux

package cri

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/testimage"
)

// census prints what a process has, a line each. The shell has no pipe of its
// own open while it looks.
const census = `ls -l /proc/$$/fd /proc/$$/cwd
tr '\0' '\n' < /proc/$$/environ | sed 's/^/env /'
grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp):' /proc/$$/status | tr -s '\t ' ' ' | sed 's/ $//'
tr -s ' ' < /proc/$$/uid_map | sed 's/^ */uids /'
tr -s ' ' < /proc/$$/gid_map | sed 's/^ */gids /'
sed -E 's/^([^ ]+ ){4}([^ ]+) ([^ ]+).* - ([^ ]+) .*/mount \2 \3 \4/' /proc/$$/mountinfo
sed 's/^[0-9]*:/cgroup /' /proc/$$/cgroup
sed 's/^/limit /' /proc/$$/limits
sed 's/^/key /' /proc/keys 2>/dev/null
ls -A /dev | sed 's/^/dev /'
(exec 3>> /proc/$$/exe) 2>/dev/null && echo exe is writable
echo end`

// seen is what a census has found.
type seen struct {
	FDs, Env, IDs, Maps, Cwd, Mounts, Limits, Devices, Keys, Strange []string
	Cgroups                                                          []string
}

// parse sorts out a census. Numbers of pipes and what file systems happen to be
// mounted with are left away.
func parse(out string) seen {
	var s seen
	link, pipe := regexp.MustCompile(`^l.* (\S+) -> (.*)$`), regexp.MustCompile(`^(pipe|socket):\[\d+\]$`)
	for line := range strings.Lines(out) {
		line = strings.TrimRight(strings.ReplaceAll(line, "\r", ""), "\n")
		if m := link.FindStringSubmatch(line); m != nil && strings.HasSuffix(m[1], "/cwd") {
			s.Cwd = append(s.Cwd, m[2])
			continue
		} else if m != nil {
			s.FDs = append(s.FDs, m[1]+" "+pipe.ReplaceAllString(m[2], "$1"))
			continue
		}
		kind, rest, _ := strings.Cut(line, " ")
		switch kind {
		case "env":
			s.Env = append(s.Env, rest)
		case "Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:", "Seccomp:":
			s.IDs = append(s.IDs, line)
		case "uids", "gids":
			s.Maps = append(s.Maps, line)
		case "mount":
			f := strings.Fields(rest)
			if len(f) != 3 {
				s.Strange = append(s.Strange, line)
				continue
			}
			var flags []string
			for _, o := range strings.Split(f[1], ",") {
				if !strings.HasSuffix(o, "atime") && o != "idmapped" {
					flags = append(flags, o)
				}
			}
			s.Mounts = append(s.Mounts, f[0]+" "+strings.Join(flags, ",")+" "+f[2])
		case "cgroup":
			s.Cgroups = append(s.Cgroups, rest)
		case "limit":
			s.Limits = append(s.Limits, strings.Join(strings.Fields(rest), " "))
		case "key":
			s.Keys = append(s.Keys, rest)
		case "dev":
			s.Devices = append(s.Devices, rest)
		case "end", "total", "":
		default:
			if strings.HasPrefix(line, "/proc/") && strings.HasSuffix(line, ":") {
				continue // ls
			}
			s.Strange = append(s.Strange, line)
		}
	}
	slices.Sort(s.Env)
	slices.Sort(s.Mounts)
	slices.Sort(s.Devices)
	return s
}

// masked and readonly are what a kubelet asks for.
var (
	masked   = []string{"/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"}
	readonly = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// person is a case of the census: what is asked for and who comes of it.
type person struct {
	name      string
	pod       func(*runtime.PodSandboxConfig)
	change    func(*runtime.ContainerConfig)
	uid, gid  int
	groups    string
	eff, bnd  uint64
	nnp       int
	seccomp   int
	env       []string // beside those of the image
	maps      string
	cwd       string
	tty       bool
	userns    bool
	priv      bool
	readonly  bool
	protected bool // masked and read-only paths
	hostNet   bool
	hostIPC   bool
}

const noMap = "0 0 4294967295"

// The census: each combination is run for real with every handler, the first
// process and one that is executed, and all that they have is on a list of what
// they may have (classes C2 and C7).
//
// contract: 7.3.2, 7.3.3, 7.3.4, 7.3.7, 7.3.8, 7.3.9, 7.3.10, 7.3.12, 10.4
func TestCensus(t *testing.T) {
	n := node(t)
	ref := n.Put(t, "census", ocispec.ImageConfig{Env: []string{"PATH=/bin", "FROM_IMAGE=yes"}, WorkingDir: "/tmp"})
	profile := &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}
	protect := func(s *runtime.LinuxContainerSecurityContext) { s.MaskedPaths, s.ReadonlyPaths = masked, readonly }
	all := ownCaps(t)
	for _, who := range []person{
		{name: "plain", change: secure(protect), groups: "0", eff: defaultCaps, bnd: defaultCaps, protected: true},
		{name: "restricted", change: secure(func(s *runtime.LinuxContainerSecurityContext) {
			protect(s)
			s.RunAsUser, s.RunAsGroup, s.NoNewPrivs, s.ReadonlyRootfs, s.Seccomp = int64Of(1000), int64Of(3000), true, true, profile
			s.Capabilities = &runtime.Capability{DropCapabilities: []string{"ALL"}}
		}), uid: 1000, gid: 3000, groups: "2000 3000", nnp: 1, seccomp: 2, readonly: true, protected: true},
		{name: "user with groups and environment", change: func(c *runtime.ContainerConfig) {
			s := c.Linux.SecurityContext
			protect(s)
			s.RunAsUser, s.SupplementalGroups, s.SupplementalGroupsPolicy = int64Of(1000), []int64{4000, 5000}, runtime.SupplementalGroupsPolicy_Strict
			s.Capabilities = &runtime.Capability{AddCapabilities: []string{"NET_ADMIN"}, AddAmbientCapabilities: []string{"NET_ADMIN"}}
			c.Envs, c.WorkingDir = []*runtime.KeyValue{{Key: "X", Value: []byte("a b")}, {Key: "FROM_IMAGE", Value: []byte("no")}}, "/etc"
		}, uid: 1000, gid: 1000, groups: "1000 4000 5000", bnd: defaultCaps | 1<<12, env: []string{"X=a b", "FROM_IMAGE=no", "HOME=/home/user"}, cwd: "/etc", protected: true},
		{name: "privileged", pod: privilegedPod, change: secure(func(s *runtime.LinuxContainerSecurityContext) { protect(s); s.Privileged = true }), groups: "0", eff: all, bnd: all, priv: true},
		{name: "terminal", change: func(c *runtime.ContainerConfig) { protect(c.Linux.SecurityContext); c.Tty = true }, groups: "0", eff: defaultCaps, bnd: defaultCaps, env: []string{"TERM=xterm"}, tty: true, protected: true},
		{name: "user namespace", change: secure(protect), groups: "0", eff: defaultCaps, bnd: defaultCaps, maps: "0 300000 65536", userns: true, protected: true},
		{name: "user of a user namespace", change: secure(func(s *runtime.LinuxContainerSecurityContext) {
			protect(s)
			s.RunAsUser = int64Of(1000)
			s.NoNewPrivs = true
		}), uid: 1000, gid: 1000, groups: "1000 2000",
			bnd: defaultCaps, nnp: 1, maps: "0 300000 65536", userns: true, protected: true},
		{name: "host namespaces", pod: modes(runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE), change: secure(protect), groups: "0", eff: defaultCaps, bnd: defaultCaps, hostNet: true, hostIPC: true, protected: true},
	} {
		t.Run(who.name, func(t *testing.T) {
			run := func(t *testing.T, p *critest.Pod) {
				c := p.Run(census+"; sleep 600", image(ref), who.change)
				critest.Eventually(t, "a census", func() bool { return strings.HasSuffix(strings.ReplaceAll(c.Log(), "\r", ""), "\nend\n") })
				who.check(t, p, c, parse(c.Log()), false)
				who.check(t, p, c, parse(c.Exec(census)), true)
			}
			pod := who.pod
			if pod == nil {
				pod = func(*runtime.PodSandboxConfig) {}
			}
			if who.userns {
				eachUserNS(t, run) // puts the pod there
			} else {
				eachHandler(t, run, pod)
			}
		})
	}
}

// check compares a census with what a person may have.
func (who person) check(t *testing.T, p *critest.Pod, c *critest.Container, got seen, executed bool) {
	t.Helper()
	hostname := "host-of-pod"
	if who.hostNet {
		hostname, _ = os.Hostname()
	}
	env := map[string]string{"PATH": "/bin", "FROM_IMAGE": "yes", "HOSTNAME": hostname, "HOME": "/root"}
	if who.uid != 0 {
		env["HOME"] = "/home/user"
	}
	for _, kv := range who.env {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	maps, cwd := who.maps, who.cwd
	if maps == "" {
		maps = noMap
	}
	if cwd == "" {
		cwd = "/tmp"
	}
	want := seen{
		FDs: []string{"0 /dev/null", "1 pipe", "2 pipe"}, Cwd: []string{cwd}, Maps: []string{"uids " + maps, "gids " + maps},
		IDs: []string{fmt.Sprintf("Uid: %[1]d %[1]d %[1]d %[1]d", who.uid), fmt.Sprintf("Gid: %[1]d %[1]d %[1]d %[1]d", who.gid), "Groups: " + who.groups, "CapInh: 0000000000000000",
			fmt.Sprintf("CapPrm: %016x", who.eff), fmt.Sprintf("CapEff: %016x", who.eff), fmt.Sprintf("CapBnd: %016x", who.bnd), "CapAmb: 0000000000000000",
			fmt.Sprintf("NoNewPrivs: %d", who.nnp), fmt.Sprintf("Seccomp: %d", who.seccomp)},
	}
	if who.tty && !executed {
		want.FDs = []string{"0 /dev/pts/0", "1 /dev/pts/0", "2 /dev/pts/0"}
	}
	for k, v := range env {
		want.Env = append(want.Env, k+"="+v)
	}
	slices.Sort(want.Env)
	// Limits are those that the daemon was started with.
	own, err := exec.Command("cat", "/proc/self/limits").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(own)) {
		want.Limits = append(want.Limits, strings.Join(strings.Fields(line), " "))
	}
	what := "first process"
	if executed {
		what = "executed"
	}
	mounts, devices, cgroups, keys := got.Mounts, got.Devices, got.Cgroups, got.Keys
	got.Mounts, got.Devices, got.Cgroups, got.Keys = nil, nil, nil, nil
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
	who.checkMounts(t, what, handlerOf(p), mounts)
	for _, d := range devices {
		if !who.priv && !slices.Contains(strings.Fields("console core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"), d) {
			t.Errorf("%s: device %s", what, d)
		}
	}
	for _, g := range cgroups {
		_, path, _ := strings.Cut(g, ":")
		in := strings.HasSuffix(path, "/"+p.Mark+"/"+c.ID) || executed && strings.Contains(path, "/"+p.Mark+"/"+c.ID+"/")
		if !in && !(strings.HasPrefix(g, ":") && (path == "/" || executed && strings.HasPrefix(path, "/exec-"))) { // a hybrid host's version 2 limits nothing; on others it is a namespace's root
			t.Errorf("%s: cgroup %s", what, g)
		}
	}
	for _, k := range keys { // masked, or those of the container alone
		if !who.priv && who.protected {
			t.Errorf("%s: key %s", what, k)
		}
	}
}

// checkMounts compares the table of mounts with the list of those that may be.
func (who person) checkMounts(t *testing.T, what, handler string, got []string) {
	t.Helper()
	rw := "rw"
	if who.readonly {
		rw = "ro"
	}
	const safe = ",nosuid,nodev,noexec"
	want := map[string][]string{ // where, and what it may be
		"/": {rw + " overlay"}, "/proc": {"rw" + safe + " proc"}, "/dev": {"rw,nosuid tmpfs"}, "/dev/pts": {"rw,nosuid,noexec devpts"}, "/dev/mqueue": {"rw" + safe + " mqueue"},
		"/sys": {"ro" + safe + " sysfs"}, "/sys/fs/cgroup": {"rw" + safe + " tmpfs", "ro" + safe + " tmpfs", "ro" + safe + " cgroup2"}, "/dev/shm": {"rw" + safe + " tmpfs"},
	}
	if who.priv {
		want["/sys"], want["/sys/fs/cgroup"] = []string{"rw" + safe + " sysfs"}, []string{"rw" + safe + " tmpfs", "rw" + safe + " cgroup2"}
	}
	if who.hostIPC {
		want["/dev/shm"] = nil // as the host has it
	}
	if who.tty {
		want["/dev/console"] = []string{"rw,nosuid,noexec devpts"}
		if handler == "crun" {
			want["/dev/console"] = []string{"rw devpts"}
		}
	}
	if who.userns { // which cannot make devices
		for _, d := range []string{"full", "null", "random", "tty", "urandom", "zero"} {
			want["/dev/"+d] = nil
		}
	}
	for _, f := range []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"} {
		want[f] = nil // a file of the host's file system
	}
	if who.protected {
		for _, f := range masked {
			want[f] = []string{"ro tmpfs", "rw,nosuid tmpfs", "rw devtmpfs", "ro devtmpfs"} // an empty directory, or /dev/null
		}
		for _, f := range readonly {
			want[f] = []string{"ro" + safe + " proc"}
			if handler == "crun" {
				want[f] = []string{"ro proc"}
			}
		}
	}
	at := map[string]bool{}
	for _, m := range got {
		where, is, _ := strings.Cut(m, " ")
		at[where] = true
		may, known := want[where]
		if dir, _ := filepath.Split(where); dir == "/sys/fs/cgroup/" { // the hierarchies of version 1
			known, may = true, []string{map[bool]string{false: "ro", true: "rw"}[who.priv] + safe + " cgroup"}
		}
		if strings.HasPrefix(where, "/etc/") && who.readonly && !strings.HasPrefix(is, "ro") || !known || may != nil && !slices.Contains(may, is) {
			t.Errorf("%s: mount %s, want %q", what, m, may)
		}
	}
	for _, where := range []string{"/", "/proc", "/dev", "/sys", "/sys/fs/cgroup", "/dev/shm", "/etc/hosts"} {
		if !at[where] {
			t.Errorf("%s: nothing is mounted at %s", what, where)
		}
	}
	if who.protected {
		for _, f := range slices.Concat(masked, readonly) {
			if _, err := os.Lstat(f); err == nil && !at[f] {
				t.Errorf("%s: %s is not protected", what, f)
			}
		}
	}
}

// A process that may see only its own keys has no one else's session keyring.
func TestCensusKeys(t *testing.T) {
	if _, err := os.Stat("/proc/keys"); err != nil {
		t.Skip("this kernel does not list keys")
	}
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run("sleep 600", secure(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = int64Of(1000) }))
		for line := range strings.Lines(c.Exec("cat /proc/keys")) {
			f := strings.Fields(line)
			if len(f) < 9 {
				t.Fatalf("%q", line)
			}
			if name := strings.TrimSuffix(f[8], ":"); name != "_ses."+c.ID && name != "_uid.1000" && name != "_uid_ses.1000" && !strings.HasPrefix(name, ".") {
				t.Errorf("key %s", line)
			}
		}
	})
}

// Nothing of the host can be reached through what a runtime has open while it
// makes a process (CVE-2024-21626), and its own program cannot be written from
// inside (CVE-2019-5736).
//
// contract: 7.1.12, 7.1.18
func TestRuntimeStaysOutside(t *testing.T) {
	n := node(t)
	programs := []string{filepath.Join(binDir, "containerd-shim-runc-v2"), filepath.Join(binDir, "gantryd")}
	for _, name := range []string{"runc", "crun"} {
		if path, err := exec.LookPath(name); err == nil {
			programs = append(programs, path)
		}
	}
	sums := func() (all []string) {
		for _, f := range programs {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, fmt.Sprintf("%s %x", f, sha256.Sum256(b)))
		}
		return all
	}
	before := sums()
	marker := "marker-" + filepath.Base(n.Dir)
	if err := os.WriteFile(filepath.Join(n.Dir, marker), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	files := []testimage.File{{Name: "bin/self", Body: []byte("#!/proc/self/exe\n"), Mode: 0o755}}
	for fd := 3; fd < 10; fd++ {
		files = append(files, testimage.File{Name: fmt.Sprint("fd", fd), Link: fmt.Sprintf("/proc/self/fd/%d", fd)})
	}
	ref := n.Put(t, "outside", ocispec.ImageConfig{}, files...)
	bad := n.Put(t, "outside-bad", ocispec.ImageConfig{WorkingDir: "/proc/self/fd/7"}, files...)
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		look := "for d in . .. ../.. ../../.. ../../../..; do ls $d; done 2>/dev/null; cat " + filepath.Join(n.Dir, marker) + " ../../../../.." + filepath.Join(n.Dir, marker) + " 2>/dev/null && echo found; true"
		refused(t, p, "working directory in /proc", func(c *runtime.ContainerConfig) { c.Image.Image, c.WorkingDir = ref, "/proc/self/fd/7" }, codes.InvalidArgument)
		refused(t, p, "the image's working directory in /proc", image(bad), codes.InvalidArgument)
		for fd := 3; fd < 10; fd++ {
			c := p.Create(look, image(ref), func(c *runtime.ContainerConfig) { c.WorkingDir = fmt.Sprint("/fd", fd) })
			if _, err := p.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: c.ID}); err == nil {
				if c.Wait(); strings.Contains(c.Log(), marker) || strings.Contains(c.Log(), "found") || strings.Contains(c.Log(), "gantry") {
					t.Errorf("working directory of descriptor %d: %s", fd, c.Log())
				}
			}
			c.Remove()
		}
		// One process waits for those of the runtime, and writes to what they run.
		c := p.Run(`while :; do for x in /proc/[2-9]*/exe /proc/[1-9][0-9]*/exe; do (echo evil >> $x) 2>/dev/null && readlink $x; done; done`, image(ref))
		for range 5 {
			for _, cmd := range []string{"/bin/self", "/proc/self/exe"} {
				// Whether it fails, and how, is the runtime's.
				_, _ = c.RT.ExecSync(critest.Context(t), &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{cmd}, Timeout: 5})
			}
		}
		if out := c.Log(); out != "" {
			t.Errorf("written: %s", out)
		}
		c.Remove()
	})
	if after := sums(); !slices.Equal(before, after) {
		t.Errorf("programs were changed:\n%q\n%q", before, after)
	}
}
