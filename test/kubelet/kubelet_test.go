//go:build linux

// Package kubelet runs the kubelet of Kubernetes on a gantryd, without an API
// server: its pods are files in a directory. It is built from its Go module
// first, which takes minutes, so this is done only if GANTRY_KUBELET is set: to
// 1, or to a kubelet's path.
package kubelet

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"github.com/gantryd/gantry/test/critest"
)

// release is that of Kubernetes; that of the modules it consists of is 0.37.0.
const release = "1.37.0"

var binDir string

func TestMain(m *testing.M) {
	switch os.Getenv("GANTRY_KUBELET") {
	case "":
		os.Exit(m.Run())
	case "1": // here, because the tests' namespaces have no way to modules
		dir, err := os.MkdirTemp("", "gantry-kubelet")
		if err == nil {
			err = build(dir)
		}
		if err != nil {
			fmt.Println("build a kubelet:", err)
			os.Exit(1)
		}
		os.Setenv("GANTRY_KUBELET", dir+"/kubelet")
		code := critest.Main(m, "../..", &binDir)
		os.RemoveAll(dir)
		os.Exit(code)
	}
	os.Exit(critest.Main(m, "../..", &binDir))
}

// build makes dir/kubelet.
func build(dir string) error {
	run := func(args ...string) ([]byte, error) {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOFLAGS=-mod=mod", "GOWORK=off", "CGO_ENABLED=0")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, stderr.Bytes())
		}
		return out, err
	}
	out, err := run("go", "mod", "download", "-json", "k8s.io/kubernetes@v"+release)
	if err != nil {
		return err
	}
	var module struct{ GoMod, Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		return err
	}
	mod, err := os.ReadFile(module.GoMod)
	if err != nil {
		return err
	}
	sums, err := os.ReadFile(module.Dir + "/go.sum")
	if err != nil {
		return err
	}
	// A module's replacements hold only in itself: its parts' releases take their place.
	own := "module kubelet\ngo 1.26.0\nrequire k8s.io/kubernetes v" + release + "\n"
	for line := range strings.Lines(string(mod)) {
		if part, _, ok := strings.Cut(strings.TrimSpace(line), " => ./staging/"); ok {
			own += fmt.Sprintf("replace %s => %[1]s v0.%s\n", part, strings.TrimPrefix(release, "1."))
		}
	}
	if err := errors.Join(os.WriteFile(dir+"/go.mod", []byte(own), 0o600), os.WriteFile(dir+"/go.sum", sums, 0o600)); err != nil {
		return err
	}
	_, err = run("nice", "go", "build", "-p", "2", "-trimpath", "-ldflags", "-s -w -X k8s.io/component-base/version.gitVersion=v"+release,
		"-o", dir+"/kubelet", "k8s.io/kubernetes/cmd/kubelet")
	return err
}

// node is a gantryd with a kubelet, whose files are in a directory of the daemon's.
type node struct {
	*critest.Node
	t   *testing.T
	bin string // the kubelet
	dir string // of its files
	cmd *exec.Cmd
	log *os.File
}

// newNode starts a gantryd and a kubelet with some features on or off.
func newNode(t *testing.T, features map[string]bool) *node {
	t.Helper()
	bin := os.Getenv("GANTRY_KUBELET")
	if bin == "" {
		t.Skip("GANTRY_KUBELET is not set: 1 builds a kubelet, which takes minutes")
	}
	c, err := critest.NewNode(binDir, "restrict_oom_score_adj = true")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Node: c, t: t, bin: bin, dir: c.Dir + "/kubelet"}
	t.Cleanup(n.close)
	for _, dir := range []string{"root", "pods", "logs", "plugins", "sys"} {
		if err := os.MkdirAll(n.dir+"/"+dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if n.log, err = os.Create(n.dir + "/log"); err != nil {
		t.Fatal(err)
	}
	hierarchies, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	for _, h := range append(hierarchies, "/sys/fs/cgroup/cgroup.procs") {
		if _, err := os.Stat(h); err == nil {
			if err := os.Mkdir(filepath.Dir(h)+"/"+n.Mark, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	config, err := json.Marshal(map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "featureGates": features,
		"address": "127.0.0.1", "authentication": map[string]any{"anonymous": map[string]any{"enabled": true}, "webhook": map[string]any{"enabled": false}},
		"authorization": map[string]any{"mode": "AlwaysAllow"}, "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"staticPodPath": n.dir + "/pods", "podLogsDir": n.dir + "/logs", "volumePluginDir": n.dir + "/plugins", "fileCheckFrequency": "1s", "syncFrequency": "5s",
		"cgroupDriver": "cgroupfs", "cgroupRoot": "/" + n.Mark, "failCgroupV1": false, "failSwapOn": false, "enforceNodeAllocatable": []string{"none"}, "maxOpenFiles": 20000, "imageGCHighThresholdPercent": 100, "oomScoreAdj": 0,
		"evictionHard":        map[string]string{"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%", "imagefs.inodesFree": "0%"},
		"containerLogMaxSize": "64Ki", "containerLogMaxFiles": 3, "containerLogMonitorInterval": "3s", "makeIPTablesUtilChains": false, "crashLoopBackOff": map[string]any{"maxContainerRestartPeriod": "2s"},
		"logging": map[string]any{"verbosity": 4},
	})
	if err == nil {
		err = os.WriteFile(n.dir+"/config.json", config, 0o600)
	}
	if err == nil {
		// What the kubelet mounts for volumes is seen by the daemon.
		err = errors.Join(syscall.Mount(n.dir, n.dir, "", syscall.MS_BIND, ""), syscall.Mount("", n.dir, "", syscall.MS_SHARED, ""))
	}
	if err == nil {
		err = n.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	n.startKubelet()
	return n
}

// The kubelet has /run, /var/lib and /var/log to itself, and finds the
// kernel's parameters set as it wants them.
const namespace = `
for p in vm/overcommit_memory:1 kernel/panic:10 kernel/panic_on_oops:1; do
	echo ${p#*:} >"$1/sys/value${p#*:}"
	mount --bind "$1/sys/value${p#*:}" /proc/sys/${p%:*}
done
ip address replace 10.87.0.1/32 dev lo
for d in /run /var/lib /var/log; do mount -t tmpfs kubelet $d; done
mkdir /run/containerd
ln -s "$2" /run/containerd/containerd.sock
exec "$3" --config "$1/config.json" --root-dir "$1/root" --hostname-override node --node-ip 10.87.0.1`

func (n *node) startKubelet() {
	n.t.Helper()
	n.cmd = exec.Command("unshare", "-m", "--propagation", "unchanged", "sh", "-ec", namespace, "sh", n.dir, n.Address(), n.bin)
	n.cmd.Stdout, n.cmd.Stderr = n.log, n.log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	critest.Eventually(n.t, "a healthy kubelet", func() bool {
		_, err := n.ask("/healthz")
		return err == nil
	})
}

func (n *node) stopKubelet() {
	if n.cmd != nil {
		n.cmd.Process.Kill()
		n.cmd.Wait()
		n.cmd = nil
	}
}

// insecure because the kubelet has made its certificate itself.
var insecure = &tls.Config{InsecureSkipVerify: true}

// ask gets a page of the kubelet's.
func (n *node) ask(path string) (string, error) {
	client := http.Client{Transport: &http.Transport{TLSClientConfig: insecure, DisableKeepAlives: true}, Timeout: 30 * time.Second}
	r, err := client.Get("https://127.0.0.1:10250" + path)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(io.LimitReader(r.Body, 64<<20))
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, r.Status, b)
	}
	return string(b), err
}

func (n *node) get(path string) string {
	n.t.Helper()
	page, err := n.ask(path)
	if err != nil {
		n.t.Fatal(err)
	}
	return page
}

func (n *node) close() {
	n.stopKubelet()
	if n.t.Failed() {
		b, _ := os.ReadFile(n.log.Name())
		n.t.Logf("the end of the kubelet's log:\n%s", b[max(0, len(b)-8<<10):])
		n.t.Logf("the end of the daemon's log:\n%s", n.Log(8<<10))
	}
	n.Clear(n.t)
	if err := n.Stop(); err != nil {
		n.t.Error(err)
	}
	// The kubelet's own cgroups and mounts.
	for range 5 {
		dirs, _ := filepath.Glob("/sys/fs/cgroup/*/" + n.Mark + "/kubepods")
		for _, d := range dirs {
			exec.Command("find", d, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";").Run()
		}
	}
	syscall.Unmount(n.dir, syscall.MNT_DETACH)
	n.CheckClean(n.t)
	if err := n.Close(); err != nil {
		n.t.Error(err)
	}
	n.log.Close()
}

// pod is what the kubelet tells of one.
type pod struct {
	Metadata struct{ Name, UID string }
	Status   struct {
		Phase, PodIP                             string
		InitContainerStatuses, ContainerStatuses []container
	}
}

type container struct {
	Name, ContainerID string
	Ready             bool
	RestartCount      int
	State, LastState  map[string]struct {
		Reason, Message string
		ExitCode        int
	}
}

// pods are those that the kubelet knows, without the node's name in theirs.
func (n *node) pods() map[string]pod {
	n.t.Helper()
	var list struct{ Items []pod }
	if err := json.Unmarshal([]byte(n.get("/pods")), &list); err != nil {
		n.t.Fatal(err)
	}
	out := map[string]pod{}
	for _, p := range list.Items {
		out[strings.TrimSuffix(p.Metadata.Name, "-node")] = p
	}
	return out
}

// c is a container of a pod; one without a name if it is not known yet.
func (n *node) c(podName, name string) container {
	n.t.Helper()
	p := n.pods()[podName]
	for _, c := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if c.Name == name {
			return c
		}
	}
	return container{}
}

// put makes the kubelet run pods of testdata.
func (n *node) put(names ...string) {
	n.t.Helper()
	for _, name := range names {
		b, err := os.ReadFile("testdata/" + name + ".yaml")
		if err != nil {
			n.t.Fatal(err)
		}
		// The name is set last: a file that grows would be read half.
		text := strings.NewReplacer("@B@", n.Busybox, "@D@", n.Dir, "@R@", n.Registry.Host()).Replace(string(b))
		if err = os.WriteFile(n.dir+"/"+name, []byte(text), 0o600); err == nil {
			err = os.Rename(n.dir+"/"+name, n.dir+"/pods/"+name+".yaml")
		}
		if err != nil {
			n.t.Fatal(err)
		}
	}
}

// exec runs a command through the kubelet, which forwards the streams.
func (n *node) exec(podName, name, version, input string, command ...string) (out, status string) {
	n.t.Helper()
	q := url.Values{"command": command, "input": {"1"}, "output": {"1"}, "error": {"1"}}
	config, err := websocket.NewConfig("wss://127.0.0.1:10250/exec/default/"+podName+"-node/"+name+"?"+q.Encode(), "https://127.0.0.1")
	if err != nil {
		n.t.Fatal(err)
	}
	config.Protocol, config.TlsConfig = []string{version}, insecure
	ws, err := websocket.DialConfig(config)
	if err != nil {
		n.t.Fatal(err)
	}
	defer ws.Close()
	if input != "" {
		if err := websocket.Message.Send(ws, append([]byte{0}, input...)); err != nil {
			n.t.Fatal(err)
		}
	}
	ws.SetReadDeadline(time.Now().Add(20 * time.Second))
	for {
		var b []byte
		if err := websocket.Message.Receive(ws, &b); err != nil {
			if !errors.Is(err, io.EOF) {
				n.t.Errorf("exec %q: %v", command, err)
			}
			return out, status
		}
		switch {
		case len(b) > 0 && b[0] == 3:
			status += string(b[1:])
		case len(b) > 0:
			out += string(b[1:])
		}
	}
}
