//go:build linux

// Package critest runs gantryd as a kubelet does: a node with networks of real
// CNI plugins, images from a registry on loopback, and the CRI's own client.
// Everything happens in network, mount and IPC namespaces of the test's own.
package critest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/daemontest"
	"github.com/gantryd/gantry/test/testimage"
)

// inside is set in the environment of the process that runs in namespaces of its own.
const inside = "GANTRY_CRITEST_INSIDE"

// Main runs the tests of a suite, as daemontest.Main does, in a network, an IPC and a
// mount namespace of their own, with only loopback up.
func Main(m interface{ Run() int }, root string, bin *string) int {
	if os.Geteuid() == 0 && os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Run(); err != nil {
			if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() > 0 {
				return cmd.ProcessState.ExitCode()
			}
			fmt.Println("run the tests in namespaces of their own:", err)
			return 1
		}
		return 0
	}
	if os.Geteuid() == 0 {
		for _, args := range [][]string{
			{"mount", "--make-rprivate", "/"},
			{"ip", "link", "set", "lo", "up"},
			{"mkdir", "-p", "/var/lib/cni"},
			{"mount", "-t", "tmpfs", "cni", "/var/lib/cni"}, // libcni's cache
			{"sh", "-c", "if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified && mount -t tmpfs t /sys/fs/cgroup/unified; fi"}, // crun refuses a hybrid host
		} {
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				fmt.Printf("%s: %v: %s\n", strings.Join(args, " "), err, out)
				return 1
			}
		}
	}
	return daemontest.Main(m, root, bin)
}

// Node is a gantryd with a network, a registry and clients of the CRI. It may be
// used by several tests one after another.
type Node struct {
	*daemontest.Daemon
	RT       runtime.RuntimeServiceClient
	Images   runtime.ImageServiceClient
	Conn     *grpc.ClientConn
	Registry *testimage.Registry
	// Busybox and Pause are references of images that the registry has.
	Busybox, Pause string
	// Handlers has crun if it is installed; runc and pauseless always.
	Handlers []string
	// Extra is put behind the configuration by Configure, with the node's
	// directory for @DIR@; what comes before its first table is of the runtime's.
	Extra string
	// CNI is the directory of network configurations, Bridge the interface
	// that they make.
	CNI, Bridge string

	serial atomic.Int64
}

// Subnets of the bridge.
const (
	Subnet4 = "10.88.0.0/16"
	Subnet6 = "fd00:88::/64"
)

// The images of all nodes are made once.
var (
	madeBusybox = sync.OnceValues(testimage.NewBusybox)
	madePause   = sync.OnceValues(testimage.NewPause)
)

// NewNode makes a node that is not started. Close ends it.
func NewNode(bin, extra string) (*Node, error) {
	d, err := daemontest.Prepare(filepath.Join(bin, "gantryd"), 4, "")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(d.Dir, 0o711); err != nil { // as /run and /var/lib are: user namespaces go through it
		return nil, err
	}
	d.CRI = true
	n := &Node{Daemon: d, Extra: extra, CNI: d.Dir + "/cni", Bridge: fmt.Sprintf("gt%08x", uint32(time.Now().UnixNano()))}
	n.Registry = testimage.NewRegistry()
	busybox, err := madeBusybox()
	if err != nil {
		return nil, err
	}
	pause, err := madePause()
	if err != nil {
		return nil, err
	}
	n.Busybox, n.Pause = n.Registry.Put("busybox", "1", busybox), n.Registry.Put("pause", "1", pause)
	n.Handlers = []string{"runc", "pauseless"}
	if _, err := exec.LookPath("crun"); err == nil {
		n.Handlers = append(n.Handlers, "crun")
	}
	return n, n.Configure()
}

// Configure writes the daemon's configuration and that of the network.
func (n *Node) Configure() error {
	hosts := n.Dir + "/certs.d/" + n.Registry.Host()
	for _, dir := range []string{n.CNI, hosts, n.Dir + "/logs"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(hosts+"/hosts.toml", fmt.Appendf(nil, "server = %q\n", "http://"+n.Registry.Host()), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(n.CNI+"/10-test.conflist", n.Conflist(), 0o644); err != nil {
		return err
	}
	extra := strings.ReplaceAll(n.Extra, "@DIR@", n.Dir)
	tables := len(extra)
	if first := regexp.MustCompile(`(?m)^\s*\[`).FindStringIndex(extra); first != nil {
		tables = first[0]
	}
	return n.Daemon.Configure(4, fmt.Sprintf(`
[plugins.'io.containerd.nri.v1.nri']
  socket_path = %[1]q
  plugin_path = %[2]q
  plugin_config_path = %[3]q
[plugins.'io.containerd.cri.v1.images']
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = %[4]q
  [plugins.'io.containerd.cri.v1.images'.registry]
    config_path = %[5]q
[plugins.'io.containerd.cri.v1.runtime']
  netns_mounts_under_state_dir = true
  cdi_spec_dirs = [%[6]q]
%[10]s
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['/usr/lib/cni', %[7]q]
    conf_dir = %[8]q
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    pod_annotations = ['pod.example/*']
    container_annotations = ['container.example/*']
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.pauseless]
    runtime_type = 'io.containerd.runc.v2'
    sandboxer = 'pauseless'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun.options]
      BinaryName = 'crun'
%[9]s
`, n.Dir+"/nri.sock", n.Dir+"/nri", n.Dir+"/nri.d", n.Pause, n.Dir+"/certs.d", n.Dir+"/cdi", n.Dir+"/cnibin", n.CNI, extra[tables:], extra[:tables]))
}

// Conflist is the network: a bridge with addresses of both families, and port
// mappings.
func (n *Node) Conflist() []byte {
	return fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":%q,"plugins":[
{"type":"bridge","bridge":%q,"isGateway":true,"ipMasq":false,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":%q,
 "ranges":[[{"subnet":%q}],[{"subnet":%q}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
{"type":"portmap","capabilities":{"portMappings":true},"snat":false}]}`, n.Bridge, n.Bridge, n.Dir+"/ipam", Subnet4, Subnet6)
}

// Addresses are those that the network's IPAM has given away, all networks.
func (n *Node) Addresses() []string {
	var all []string
	files, _ := filepath.Glob(n.Dir + "/ipam/*/*")
	for _, f := range files {
		if base := filepath.Base(f); base != "lock" && !strings.HasPrefix(base, "last_reserved") {
			all = append(all, base)
		}
	}
	return all
}

// Start starts the daemon, connects to it and waits until it knows its pods.
func (n *Node) Start(env ...string) error {
	err := n.Daemon.Start(env...)
	if err == nil {
		err = n.Connect()
	}
	ctx, cancel := context.WithTimeout(context.Background(), Slow(20*time.Second))
	defer cancel()
	for err == nil {
		if _, err = n.RT.Version(ctx, &runtime.VersionRequest{}); status.Code(err) != codes.Unavailable {
			return err
		}
		select {
		case <-time.After(Slow(5 * time.Millisecond)):
			err = nil
		case <-ctx.Done():
		}
	}
	return err
}

// Connect opens the CRI's clients, which reconnect by themselves.
func (n *Node) Connect() error {
	if n.Conn != nil {
		n.Conn.Close()
	}
	var err error
	n.Conn, err = grpc.NewClient("unix://"+n.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20), grpc.MaxCallSendMsgSize(16<<20)))
	if err != nil {
		return err
	}
	n.RT, n.Images = runtime.NewRuntimeServiceClient(n.Conn), runtime.NewImageServiceClient(n.Conn)
	return nil
}

// Close stops the daemon and removes what it left, its files included.
func (n *Node) Close() error {
	if n.Conn != nil {
		n.Conn.Close()
	}
	err := n.Stop()
	n.Sweep()
	n.Registry.Close()
	_ = exec.Command("ip", "link", "del", n.Bridge).Run()
	if rerr := n.Remove(); err == nil {
		err = rerr
	}
	return err
}

// Run makes a started node for one test and checks at its end that nothing is
// left of it.
func Run(t testing.TB, bin, extra string) *Node {
	t.Helper()
	n, err := NewNode(bin, extra)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the daemon's log:\n%s", n.Log(8<<10))
		}
		said := t.Failed()
		n.Clear(t)
		if err := n.Stop(); err != nil {
			t.Errorf("%v\n%s", err, n.Log(2<<10))
		}
		n.CheckClean(t)
		if t.Failed() && !said {
			t.Logf("the daemon's log:\n%s", n.Log(1<<20))
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	return n
}

// Clear removes all pods.
func (n *Node) Clear(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Slow(time.Minute))
	defer cancel()
	pods, err := n.RT.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		t.Errorf("list pods: %v", err)
		return
	}
	for _, p := range pods.Items {
		if _, err := n.RT.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			t.Errorf("stop %s: %v", p.Metadata.Name, err)
		}
		if _, err := n.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
			t.Errorf("remove %s: %v", p.Metadata.Name, err)
		}
	}
}

// CheckClean fails the test for all that Left lists.
func (n *Node) CheckClean(t testing.TB) {
	t.Helper()
	for _, left := range n.Left() {
		t.Errorf("left behind: %s", left)
	}
}

// Left lists what is there after all pods were removed and the daemon was
// stopped: processes, mounts, cgroups, addresses, network namespaces, directories.
func (n *Node) Left() []string {
	left := n.Leftovers()
	for _, a := range n.Addresses() {
		left = append(left, "address "+a)
	}
	for _, pattern := range []string{"/root/io.containerd.grpc.v1.cri/*/*", "/state/io.containerd.grpc.v1.cri/*/*", "/state/netns/*", "/root/io.gantry.cni/*"} {
		found, err := filepath.Glob(n.Dir + pattern)
		if err != nil {
			left = append(left, err.Error())
		}
		left = append(left, found...)
	}
	return left
}

// Slow is daemontest.Slow.
func Slow[T ~int64](d T) T { return daemontest.Slow(d) }

// Context ends with the test and after a minute.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Slow(time.Minute))
	t.Cleanup(cancel)
	return ctx
}

// PodConfig is that of a pod with a name of its own, whose logs and cgroups are
// the node's.
func (n *Node) PodConfig(t testing.TB, change ...func(*runtime.PodSandboxConfig)) *runtime.PodSandboxConfig {
	name := fmt.Sprintf("%s-%d", strings.ToLower(strings.NewReplacer("/", "-", "_", "-", " ", "-").Replace(t.Name())), n.serial.Add(1))
	if len(name) > 60 {
		name = name[len(name)-60:]
	}
	c := &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name}, Hostname: "host-of-pod", LogDirectory: n.Dir + "/logs/" + name,
		Labels: map[string]string{"name": name}, Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: "/" + n.Mark,
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}}},
	}
	for _, f := range change {
		f(c)
	}
	return c
}

// HostNetwork puts a pod into the node's network.
func HostNetwork(c *runtime.PodSandboxConfig) {
	c.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	c.Hostname = ""
}

// Pod is a pod of a test.
type Pod struct {
	*Node
	T      testing.TB
	ID     string
	Config *runtime.PodSandboxConfig
}

// Pod runs a pod, which is removed when the test ends.
func (n *Node) Pod(t testing.TB, handler string, change ...func(*runtime.PodSandboxConfig)) *Pod {
	t.Helper()
	c := n.PodConfig(t, change...)
	r, err := n.RT.RunPodSandbox(Context(t), &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: handler})
	if err != nil {
		t.Fatalf("run pod: %v", err)
	}
	p := &Pod{Node: n, T: t, ID: r.PodSandboxId, Config: c}
	t.Cleanup(p.Remove)
	return p
}

// Stop stops the pod.
func (p *Pod) Stop() {
	p.T.Helper()
	if _, err := p.RT.StopPodSandbox(Context(p.T), &runtime.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		p.T.Errorf("stop pod: %v", err)
	}
}

// Remove stops and removes the pod.
func (p *Pod) Remove() {
	p.T.Helper()
	p.Stop()
	if _, err := p.RT.RemovePodSandbox(Context(p.T), &runtime.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		p.T.Errorf("remove pod: %v", err)
	}
}

// Status is the pod's.
func (p *Pod) Status() *runtime.PodSandboxStatusResponse {
	p.T.Helper()
	r, err := p.RT.PodSandboxStatus(Context(p.T), &runtime.PodSandboxStatusRequest{PodSandboxId: p.ID, Verbose: true})
	if err != nil {
		p.T.Fatalf("pod status: %v", err)
	}
	return r
}

// Container is a container of a test.
type Container struct {
	*Pod
	ID     string
	Config *runtime.ContainerConfig
}

// Pull pulls an image and returns its id.
func (n *Node) Pull(t testing.TB, ref string) string {
	t.Helper()
	r, err := n.Images.PullImage(Context(t), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("pull %s: %v", ref, err)
	}
	return r.ImageRef
}

// Put makes an image of busybox with further files and another configuration,
// and pulls it.
func (n *Node) Put(t testing.TB, name string, config ocispec.ImageConfig, files ...testimage.File) string {
	t.Helper()
	layers := []testimage.Layer{{Files: testimage.BusyboxFiles(t)}} // not compressed: that would take most of the time
	if len(files) > 0 {
		layers = append(layers, testimage.Layer{Files: files, Compression: "gzip"})
	}
	if config.Env == nil {
		config.Env = []string{"PATH=/bin"}
	}
	img, err := testimage.New(config, layers...)
	if err != nil {
		t.Fatal(err)
	}
	ref := n.Registry.Put(name, "1", img)
	n.Pull(t, ref)
	return ref
}

// ContainerConfig is that of a busybox container that runs a shell script.
func (p *Pod) ContainerConfig(script string, change ...func(*runtime.ContainerConfig)) *runtime.ContainerConfig {
	name := fmt.Sprintf("c%d", p.serial.Add(1))
	c := &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: name}, Image: &runtime.ImageSpec{Image: p.Busybox},
		Command: []string{"/bin/sh", "-c", script}, LogPath: name + ".log", Linux: &runtime.LinuxContainerConfig{
			SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: p.Config.Linux.SecurityContext.NamespaceOptions}}}
	for _, f := range change {
		f(c)
	}
	return c
}

// TryCreate makes a container and returns the error.
func (p *Pod) TryCreate(script string, change ...func(*runtime.ContainerConfig)) (*Container, error) {
	p.T.Helper()
	c := p.ContainerConfig(script, change...)
	if c.Image.Image == p.Busybox {
		p.Pull(p.T, p.Busybox)
	}
	r, err := p.RT.CreateContainer(Context(p.T), &runtime.CreateContainerRequest{PodSandboxId: p.ID, Config: c, SandboxConfig: p.Config})
	if err != nil {
		return nil, err
	}
	return &Container{Pod: p, ID: r.ContainerId, Config: c}, nil
}

// Create makes a container that is not started.
func (p *Pod) Create(script string, change ...func(*runtime.ContainerConfig)) *Container {
	p.T.Helper()
	c, err := p.TryCreate(script, change...)
	if err != nil {
		p.T.Fatalf("create container: %v", err)
	}
	return c
}

// Run makes and starts a container.
func (p *Pod) Run(script string, change ...func(*runtime.ContainerConfig)) *Container {
	p.T.Helper()
	c := p.Create(script, change...)
	if _, err := p.RT.StartContainer(Context(p.T), &runtime.StartContainerRequest{ContainerId: c.ID}); err != nil {
		p.T.Fatalf("start container: %v", err)
	}
	return c
}

// Output runs a script to its end and returns what its log has, without the
// stamps; another exit code than 0 is a failure.
func (p *Pod) Output(script string, change ...func(*runtime.ContainerConfig)) string {
	p.T.Helper()
	c := p.Run(script, change...)
	if st := c.Wait(); st.ExitCode != 0 {
		p.T.Errorf("%q: exit %d (%s %s): %s", script, st.ExitCode, st.Reason, st.Message, c.Log())
	}
	return c.Log()
}

// Status is the container's.
func (c *Container) Status() *runtime.ContainerStatus {
	c.T.Helper()
	r, err := c.RT.ContainerStatus(Context(c.T), &runtime.ContainerStatusRequest{ContainerId: c.ID})
	if err != nil {
		c.T.Fatalf("container status: %v", err)
	}
	return r.Status
}

// Wait waits until the container has ended.
func (c *Container) Wait() *runtime.ContainerStatus {
	c.T.Helper()
	var st *runtime.ContainerStatus
	Eventually(c.T, "the end of container "+c.Config.Metadata.Name, func() bool {
		st = c.Status()
		return st.State == runtime.ContainerState_CONTAINER_EXITED
	})
	return st
}

// LogFile is where the container's output is.
func (c *Container) LogFile() string {
	return filepath.Join(c.Pod.Config.LogDirectory, c.Config.LogPath)
}

// Log is the container's output so far, both streams, without the stamps.
func (c *Container) Log() string {
	c.T.Helper()
	data, err := os.ReadFile(c.LogFile())
	if err != nil && !os.IsNotExist(err) {
		c.T.Fatal(err)
	}
	var out strings.Builder
	for _, line := range bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n")) {
		if f := bytes.SplitN(line, []byte(" "), 4); len(f) == 4 {
			out.Write(f[3])
			if string(f[2]) == "F" {
				out.WriteByte('\n')
			}
		}
	}
	return out.String()
}

// Exec runs a script in the container and returns its standard output; another
// exit code than 0 is a failure.
func (c *Container) Exec(script string) string {
	c.T.Helper()
	r, err := c.RT.ExecSync(Context(c.T), &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"/bin/sh", "-c", script}, Timeout: Slow(int64(30))})
	if err != nil {
		c.T.Fatalf("exec %q: %v", script, err)
	}
	if r.ExitCode != 0 {
		c.T.Errorf("exec %q: exit %d: %s%s", script, r.ExitCode, r.Stdout, r.Stderr)
	}
	return string(r.Stdout)
}

// Stop stops the container with a grace period in seconds.
func (c *Container) Stop(grace int64) {
	c.T.Helper()
	if _, err := c.RT.StopContainer(Context(c.T), &runtime.StopContainerRequest{ContainerId: c.ID, Timeout: grace}); err != nil {
		c.T.Errorf("stop container: %v", err)
	}
}

// Remove removes the container.
func (c *Container) Remove() {
	c.T.Helper()
	if _, err := c.RT.RemoveContainer(Context(c.T), &runtime.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
		c.T.Errorf("remove container: %v", err)
	}
}

// Eventually waits at most 20 s for cond.
func Eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	within := Slow(20 * time.Second)
	deadline := time.Now().Add(within)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, within)
		}
		time.Sleep(Slow(20 * time.Millisecond))
	}
}
