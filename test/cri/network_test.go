//go:build linux

package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/lib/ownthread"
	"github.com/gantryd/gantry/test/critest"
)

// serveText is a script that answers each connection to a port with a text.
func serveText(port int, text string) string {
	return fmt.Sprintf("mkdir -p /tmp/www; echo -n %s > /tmp/www/index.html; exec httpd -f -p [::]:%d -h /tmp/www", text, port)
}

// get reads a page from the network that the test is in.
func get(addr string) (string, error) {
	c, err := net.DialTimeout("tcp", addr, critest.Slow(time.Second))
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(critest.Slow(3 * time.Second)))
	if _, err := io.WriteString(c, "GET /index.html HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(c, 1<<16))
	_, body, _ := strings.Cut(string(b), "\r\n\r\n")
	return body, err
}

// eventuallyGet waits for the page.
func eventuallyGet(t *testing.T, addr, want string) {
	t.Helper()
	var got string
	var err error
	deadline := time.Now().Add(critest.Slow(20 * time.Second))
	for {
		if got, err = get(addr); err == nil && got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s answers %q %v, want %q", addr, got, err, want)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func ipsOf(p *critest.Pod) (v4, v6 string) {
	s := p.Status().Status.Network
	return s.Ip, s.GetAdditionalIps()[0].GetIp()
}

// Pods have addresses of both families, and reach each other and the node.
//
// contract: 7.1.5, 7.1.8, 7.3.21
func TestPodNetwork(t *testing.T) {
	n := node(t)
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			server, other := n.Pod(t, handler), n.Pod(t, "pauseless")
			v4, v6 := ipsOf(server)
			for ip, subnet := range map[string]string{v4: critest.Subnet4, v6: critest.Subnet6} {
				a, err := netip.ParseAddr(ip)
				if err != nil || !netip.MustParsePrefix(subnet).Contains(a) || !slices.Contains(n.Addresses(), ip) {
					t.Errorf("address %q is not of %s, given away are %v", ip, subnet, n.Addresses())
				}
			}
			web := server.Run(serveText(80, "page"))
			out := web.Exec("ip addr; ip route; ip -6 route")
			for _, want := range []string{v4 + "/16", v6 + "/64", "127.0.0.1/8", "::1/128", "default via 10.88.0.1 dev eth0"} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in:\n%s", want, out)
				}
			}
			eventuallyGet(t, v4+":80", "page")
			eventuallyGet(t, "["+v6+"]:80", "page")
			if out := other.Output("wget -q -O - http://" + v4 + "/index.html; wget -q -O - http://[" + v6 + "]/index.html"); out != "pagepage" && out != "pagepage\n" {
				t.Errorf("from the other pod: %q", out)
			}
			// Each container of a pod is at the same place.
			if out := server.Output("wget -q -O - http://127.0.0.1/index.html"); !strings.HasPrefix(out, "page") {
				t.Errorf("from the same pod: %q", out)
			}
			server.Stop()
			if now := n.Addresses(); slices.Contains(now, v4) || slices.Contains(now, v6) {
				t.Errorf("%s and %s are not given back: %v", v4, v6, now)
			}
		})
	}
}

// echoUDP answers in a network namespace until the test ends: busybox cannot.
func echoUDP(t *testing.T, netns string, port int) {
	t.Helper()
	var c *net.UDPConn
	err := ownthread.Do(func() error {
		f, err := os.Open(netns)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		c, err = net.ListenUDP("udp", &net.UDPAddr{Port: port})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 100)
		for {
			k, from, err := c.ReadFromUDP(b)
			if err != nil {
				return // the test is over
			}
			_, _ = c.WriteToUDP(b[:k], from)
		}
	}()
}

// Host ports reach the pod, from elsewhere and over both protocols, and are
// gone when it has stopped.
//
// contract: 7.3.22, 7.1.5, 7.1.6
func TestHostPorts(t *testing.T) {
	n := node(t)
	const port, udp, bound = 18080, 18081, 18082
	p := n.Pod(t, "runc", func(c *runtime.PodSandboxConfig) {
		c.PortMappings = []*runtime.PortMapping{
			{Protocol: runtime.Protocol_TCP, ContainerPort: 80, HostPort: port},
			{Protocol: runtime.Protocol_UDP, ContainerPort: 53, HostPort: udp},
			{Protocol: runtime.Protocol_TCP, ContainerPort: 80, HostPort: bound, HostIp: "10.88.0.1"},
			{Protocol: runtime.Protocol_TCP, ContainerPort: 81}, // exposed only
		}
	})
	p.Run(serveText(80, "ported"))
	echoUDP(t, infoOf(t, p).SandboxMetadata.NetNSPath, 53)
	gateways := []string{"10.88.0.1", "fd00:88::1"}
	for _, gw := range gateways {
		eventuallyGet(t, net.JoinHostPort(gw, strconv.Itoa(port)), "ported")
	}
	eventuallyGet(t, net.JoinHostPort("10.88.0.1", strconv.Itoa(bound)), "ported")
	if got, err := get(net.JoinHostPort("fd00:88::1", strconv.Itoa(bound))); err == nil {
		t.Errorf("a port of another address answers %q", got)
	}
	critest.Eventually(t, "UDP", func() bool {
		c, err := net.Dial("udp", net.JoinHostPort("10.88.0.1", strconv.Itoa(udp)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(critest.Slow(200 * time.Millisecond)))
		if _, err := c.Write([]byte("ping")); err != nil {
			return false
		}
		b := make([]byte, 10)
		k, err := c.Read(b)
		return err == nil && string(b[:k]) == "ping"
	})
	// Another pod comes in through the node's port too.
	other := n.Pod(t, "pauseless")
	if out := other.Output(fmt.Sprintf("wget -q -O - http://10.88.0.1:%d/index.html", port)); !strings.HasPrefix(out, "ported") {
		t.Errorf("from another pod: %q", out)
	}
	p.Stop()
	for _, gw := range gateways {
		if got, err := get(net.JoinHostPort(gw, strconv.Itoa(port))); err == nil {
			t.Errorf("the port of a stopped pod answers %q", got)
		}
	}
	for _, tool := range []string{"iptables-save", "ip6tables-save"} {
		out, err := exec.Command(tool, "-t", "nat").CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", tool, err, out)
		}
		if strings.Contains(string(out), strconv.Itoa(port)) {
			t.Errorf("rules of a stopped pod:\n%s", out)
		}
	}
	// The next pod gets the port.
	next := n.Pod(t, "runc", func(c *runtime.PodSandboxConfig) {
		c.PortMappings = []*runtime.PortMapping{{Protocol: runtime.Protocol_TCP, ContainerPort: 80, HostPort: port}}
	})
	next.Run(serveText(80, "next"))
	eventuallyGet(t, net.JoinHostPort("10.88.0.1", strconv.Itoa(port)), "next")
	for _, bad := range []*runtime.PortMapping{{ContainerPort: 80, HostPort: 70000}, {ContainerPort: 0, HostPort: 80}, {ContainerPort: 80, HostPort: 80, HostIp: "here"}} {
		_, err := n.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: n.PodConfig(t, func(c *runtime.PodSandboxConfig) { c.PortMappings = []*runtime.PortMapping{bad} })})
		if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// A pod of the node's network has the node's interfaces, name and ports, and no
// address of its own.
//
// contract: 7.1.5, 7.1.8
func TestHostNetwork(t *testing.T) {
	n := node(t)
	n.Pod(t, "pauseless") // the bridge is there
	node, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	var self syscall.Stat_t
	if err := syscall.Stat("/proc/self/ns/net", &self); err != nil {
		t.Fatal(err)
	}
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			p := n.Pod(t, handler, critest.HostNetwork)
			if s := p.Status().Status; s.Network.GetIp() != "" || len(s.Network.GetAdditionalIps()) != 0 || s.Linux.Namespaces.Options.Network != runtime.NamespaceMode_NODE {
				t.Errorf("%v", s)
			}
			out := p.Output("hostname; cat /etc/hostname; readlink /proc/self/ns/net; ip link")
			want := fmt.Sprintf("%s\n%s\nnet:[%d]\n", node, node, self.Ino)
			if !strings.HasPrefix(out, want) || !strings.Contains(out, n.Bridge) {
				t.Errorf("%q, want %q and %s", out, want, n.Bridge)
			}
		})
	}
}

// What the pod says of names is in its containers' files; without it they have
// the node's.
//
// contract: 7.1.5, 7.1.11
func TestDNSAndHostname(t *testing.T) {
	n := node(t)
	node, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil {
		t.Fatal(err)
	}
	dns := &runtime.DNSConfig{Servers: []string{"10.10.10.10", "fd00::53"}, Searches: []string{"svc.cluster.local", "cluster.local"}, Options: []string{"ndots:5", "edns0"}}
	const text = "search svc.cluster.local cluster.local\nnameserver 10.10.10.10\nnameserver fd00::53\noptions ndots:5 edns0\n"
	for _, handler := range n.Handlers {
		for name, tt := range map[string]struct {
			change       func(*runtime.PodSandboxConfig)
			resolv, host string
		}{
			"own":  {func(c *runtime.PodSandboxConfig) { c.DnsConfig = dns }, text, "host-of-pod"},
			"node": {func(*runtime.PodSandboxConfig) {}, string(node), "host-of-pod"},
			"host network": {func(c *runtime.PodSandboxConfig) {
				critest.HostNetwork(c)
				c.DnsConfig = dns
			}, text, ""},
		} {
			t.Run(handler+" "+name, func(t *testing.T) {
				p := n.Pod(t, handler, tt.change)
				c := p.Run("sleep 1000")
				if got := c.Exec("cat /etc/resolv.conf"); got != tt.resolv {
					t.Errorf("resolv.conf %q, want %q", got, tt.resolv)
				}
				if got := c.Exec("cat /etc/hosts"); got != string(hosts) {
					t.Errorf("hosts %q", got)
				}
				if got := c.Exec("hostname; cat /etc/hostname"); tt.host != "" && got != tt.host+"\n"+tt.host+"\n" {
					t.Errorf("%q", got)
				}
				// The files are the pod's: what one container writes, the next reads.
				c.Exec("echo '# mine' >> /etc/hosts")
				if got := p.Output("cat /etc/hosts"); !strings.HasSuffix(got, "# mine\n") {
					t.Errorf("hosts of the next container: %q", got)
				}
			})
		}
	}
	for _, bad := range []*runtime.DNSConfig{{Servers: []string{"1.1.1.1\nnameserver 6.6.6.6"}}, {Searches: []string{""}}, {Options: []string{"a\x00"}}} {
		_, err := n.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: n.PodConfig(t, func(c *runtime.PodSandboxConfig) { c.DnsConfig = bad })})
		if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// contract: 7.3.18
func TestPodSysctls(t *testing.T) {
	n := node(t)
	const read = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range"
	nodes, err := exec.Command("sh", "-c", read).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			p := n.Pod(t, handler, func(c *runtime.PodSandboxConfig) {
				c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 3000"}
			})
			if out := p.Output(read); out != "0\n0\t2147483647\n1\n2000\t3000\n" {
				t.Errorf("%q", out)
			}
			if out := n.Pod(t, handler).Output(read); !strings.HasPrefix(out, "0\n0\t2147483647\n0\n32768") {
				t.Errorf("without: %q", out)
			}
			own := n.Pod(t, handler, func(c *runtime.PodSandboxConfig) {
				c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "1000"}
			})
			if out := own.Output(read); !strings.HasPrefix(out, "1000\n") {
				t.Errorf("the pod's own is not heeded: %q", out)
			}
			n.Pod(t, handler, critest.HostNetwork)
		})
	}
	if now, err := exec.Command("sh", "-c", read).Output(); err != nil || string(now) != string(nodes) {
		t.Errorf("the node has %q, before %q: %v", now, nodes, err)
	}
}

// networked starts a node with runtime handlers that have networks of their own.
func networked(t *testing.T) *critest.Node {
	t.Helper()
	n, err := critest.NewNode(binDir, `
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.own]
    runtime_type = 'io.containerd.runc.v2'
    sandboxer = 'pauseless'
    cni_conf_dir = '@DIR@/cni-own'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.hold]
    runtime_type = 'io.containerd.runc.v2'
    sandboxer = 'pauseless'
    cni_conf_dir = '@DIR@/cni-hold'
`)
	if err != nil {
		t.Fatal(err)
	}
	for dir, list := range map[string]string{
		"cni-own": fmt.Sprintf(`{"cniVersion":"1.0.0","name":"own","plugins":[{"type":"bridge","bridge":"%s","isGateway":true,
 "ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.89.0.0/16"}]]}}]}`, n.Bridge+"o", n.Dir+"/ipam"),
		"cni-hold": fmt.Sprintf(`{"cniVersion":"1.0.0","name":"hold","plugins":[{"type":"hold","bridge":"%s","isGateway":true,
 "capabilities":{"portMappings":true,"io.kubernetes.cri.pod-annotations":true,"bandwidth":true,"dns":true,"ips":true,"cgroupPath":true},
 "ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.90.0.0/16"}]]}}]}`, n.Bridge+"h", n.Dir+"/ipam"),
	} {
		write(t, filepath.Join(n.Dir, dir, "10-net.conflist"), list)
	}
	// A plugin that tells what it is told, waits while a file is there, and then
	// does what the bridge plugin does.
	write(t, n.Dir+"/cnibin/hold", fmt.Sprintf(`#!/bin/sh
cat > %[1]s/told.$$
if [ "$CNI_COMMAND" = ADD ]; then
  echo "$CNI_ARGS" > %[1]s/args
  cp %[1]s/told.$$ %[1]s/stdin
  : > %[1]s/holding
  while [ -e %[1]s/hold ]; do sleep 0.02; done
fi
if [ "$CNI_COMMAND" = DEL ] && [ -e %[1]s/refuse ]; then
  rm -f %[1]s/told.$$
  echo '{"cniVersion":"1.0.0","code":11,"msg":"not now"}'
  exit 1
fi
/usr/lib/cni/bridge < %[1]s/told.$$
code=$?
rm -f %[1]s/told.$$
exit $code
`, n.Dir))
	if err := os.Chmod(n.Dir+"/cnibin/hold", 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the daemon's log:\n%s", n.Log(8<<10))
		}
		os.Remove(n.Dir + "/hold")
		os.Remove(n.Dir + "/refuse")
		n.Clear(t)
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		n.CheckClean(t)
		for _, suffix := range []string{"o", "h"} {
			_ = exec.Command("ip", "link", "del", n.Bridge+suffix).Run() // may not have been made
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

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// networkReady is the condition of the network and its message.
func networkReady(t *testing.T, n *critest.Node) (bool, string) {
	t.Helper()
	st, err := n.RT.Status(critest.Context(t), &runtime.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	c := st.Status.Conditions[1]
	if !c.Status && c.Reason != "NetworkPluginNotReady" {
		t.Errorf("%v", c)
	}
	return c.Status, c.Message
}

// A runtime handler with networks of its own, and what plugins are told of a pod.
//
// contract: 7.3.21, 7.1.2
func TestHandlerNetworks(t *testing.T) {
	n := networked(t)
	st, err := n.RT.Status(critest.Context(t), &runtime.StatusRequest{Verbose: true})
	if err != nil || st.Info["lastCNILoadStatus.own"] != "OK" || !strings.Contains(st.Info["cniconfig.hold"], "10.90.0.0") {
		t.Errorf("%v %v", st.GetInfo(), err)
	}
	if ip := n.Pod(t, "own").Status().Status.Network.Ip; !strings.HasPrefix(ip, "10.89.") {
		t.Errorf("address %s of the handler's own network", ip)
	}
	if ip := n.Pod(t, "pauseless").Status().Status.Network.Ip; !strings.HasPrefix(ip, "10.88.") {
		t.Errorf("address %s of the common network", ip)
	}
	p := n.Pod(t, "hold", func(c *runtime.PodSandboxConfig) {
		c.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "1M", "kubernetes.io/egress-bandwidth": "2M", "x": "y"}
		c.DnsConfig = &runtime.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"a.b"}}
		c.PortMappings = []*runtime.PortMapping{{Protocol: runtime.Protocol_TCP, ContainerPort: 80, HostPort: 8000, HostIp: "127.0.0.1"}}
	})
	if ip := p.Status().Status.Network.Ip; !strings.HasPrefix(ip, "10.90.") {
		t.Errorf("address %s", ip)
	}
	args, err := os.ReadFile(n.Dir + "/args")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"IgnoreUnknown=1", "K8S_POD_NAMESPACE=default", "K8S_POD_NAME=" + p.Config.Metadata.Name, "K8S_POD_INFRA_CONTAINER_ID=" + p.ID, "K8S_POD_UID=" + p.Config.Metadata.Uid} {
		if !slices.Contains(strings.Split(strings.TrimSpace(string(args)), ";"), want) {
			t.Errorf("no %s in %s", want, args)
		}
	}
	var told struct {
		RuntimeConfig struct {
			PortMappings []struct {
				HostPort, ContainerPort int
				Protocol, HostIP        string
			}
			Annotations map[string]string `json:"io.kubernetes.cri.pod-annotations"`
			Bandwidth   struct{ IngressRate, EgressRate int }
			DNS         struct{ Servers, Searches []string }
			CgroupPath  string
		}
	}
	b, err := os.ReadFile(n.Dir + "/stdin")
	if err == nil {
		err = json.Unmarshal(b, &told)
	}
	rc := told.RuntimeConfig
	if err != nil || len(rc.PortMappings) != 1 || rc.PortMappings[0].HostPort != 8000 || rc.PortMappings[0].ContainerPort != 80 || rc.PortMappings[0].Protocol != "tcp" || rc.PortMappings[0].HostIP != "127.0.0.1" ||
		rc.Annotations["x"] != "y" || rc.Bandwidth.IngressRate != 1_000_000 || rc.Bandwidth.EgressRate != 2_000_000 || !slices.Equal(rc.DNS.Servers, []string{"10.0.0.10"}) || rc.CgroupPath != p.Config.Linux.CgroupParent {
		t.Errorf("%v: %s", err, b)
	}
}

// While a pod's network takes its time, a retry joins it, a deadline names the
// stage, no other pod waits, and who cancels leaves nothing.
//
// contract: 7.1.5
// promise: P5, P22
func TestSlowNetwork(t *testing.T) {
	t.Parallel() // it mostly waits
	n := networked(t)
	hold := n.Dir + "/hold"
	write(t, hold, "")
	c := n.PodConfig(t)
	run := func(within time.Duration) (string, error) {
		ctx, cancel := context.WithTimeout(critest.Context(t), within)
		defer cancel()
		r, err := n.RT.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: "hold"})
		return r.GetPodSandboxId(), err
	}
	if _, err := run(critest.Slow(300 * time.Millisecond)); !errors.Is(errgrpc.ToNative(err), context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	critest.Eventually(t, "the plugin", func() bool { return exists(n.Dir + "/holding") })
	os.Remove(n.Dir + "/holding")
	// Another pod of the same handler would hang as well; those of others do not.
	begin := time.Now()
	n.Pod(t, "pauseless")
	if d := time.Since(begin); d > critest.Slow(10*time.Second) {
		t.Errorf("another pod took %v", d)
	}
	if l, err := n.RT.ListPodSandbox(critest.Context(t), &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{LabelSelector: c.Labels}}); err != nil || len(l.Items) != 0 {
		t.Errorf("a pod on its way is listed: %v %v", l, err)
	}
	type answer struct {
		id  string
		err error
	}
	answers := make(chan answer, 2)
	for range 2 {
		go func() {
			id, err := run(critest.Slow(time.Minute))
			answers <- answer{id, err}
		}()
	}
	// The server knows the deadline too, and says how far the pod is.
	if _, err := run(critest.Slow(500 * time.Millisecond)); err == nil {
		t.Error("it is up")
	}
	if exists(n.Dir + "/holding") {
		t.Error("a retry began anew: its plugin was called again")
	}
	os.Remove(hold)
	a, b := <-answers, <-answers
	if a.err != nil || b.err != nil || a.id != b.id {
		t.Fatalf("%v, %v", a, b)
	}
	if l, err := n.RT.ListPodSandbox(critest.Context(t), &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{LabelSelector: c.Labels}}); err != nil || len(l.Items) != 1 {
		t.Errorf("%v %v", l, err)
	}
	p := &critest.Pod{Node: n, T: t, ID: a.id, Config: c}
	p.Remove()

	// Cancelled for good: in the end there is no pod and no address.
	write(t, hold, "")
	c = n.PodConfig(t)
	ctx, cancel := context.WithCancel(critest.Context(t))
	done := make(chan error, 1)
	os.Remove(n.Dir + "/holding")
	go func() {
		_, err := n.RT.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: "hold"})
		done <- err
	}()
	critest.Eventually(t, "the plugin", func() bool { return exists(n.Dir + "/holding") })
	cancel()
	if err := <-done; !errors.Is(errgrpc.ToNative(err), context.Canceled) {
		t.Errorf("%v", err)
	}
	os.Remove(hold)
	v := k8s(t, n)
	critest.Eventually(t, "no trace of the cancelled pod", func() bool {
		all, err := v.Sandboxes().List(critest.Context(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, ip := range n.Addresses() {
			if strings.HasPrefix(ip, "10.90.") {
				return false
			}
		}
		return len(all) == 1 // the one of the other handler
	})
	if id, err := run(critest.Slow(time.Minute)); err != nil {
		t.Errorf("a retry after all: %v", err)
	} else {
		(&critest.Pod{Node: n, T: t, ID: id, Config: c}).Remove()
	}
}

// A network that cannot be taken away now is not forgotten: the kubelet is told
// which plugin says no, and when it gives in, also after a restart with another
// configuration, the addresses are free.
//
// contract: 7.1.6, 7.1.7, 7.3.30
// promise: P22
func TestStubbornNetwork(t *testing.T) {
	n := networked(t)
	p := n.Pod(t, "hold")
	ip := p.Status().Status.Network.Ip
	write(t, n.Dir+"/refuse", "")
	refused := func() {
		t.Helper()
		_, stop := n.RT.StopPodSandbox(critest.Context(t), &runtime.StopPodSandboxRequest{PodSandboxId: p.ID})
		_, remove := n.RT.RemovePodSandbox(critest.Context(t), &runtime.RemovePodSandboxRequest{PodSandboxId: p.ID})
		for _, err := range []error{stop, remove} {
			if err == nil || !strings.Contains(err.Error(), "not now") || !strings.Contains(err.Error(), `"hold"`) {
				t.Errorf("%v", err)
			}
		}
		if st := p.Status().Status; st.State != runtime.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("%v", st)
		}
		if !slices.Contains(n.Addresses(), ip) {
			t.Errorf("%s is not given away any more", ip)
		}
	}
	refused()
	// The plugin's list is another one now; the pod's is that which it was made with.
	write(t, n.Dir+"/cni-hold/10-net.conflist", `{"cniVersion":"1.0.0","name":"later","plugins":[{"type":"loopback"}]}`)
	n.Kill()
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	refused()
	os.Remove(n.Dir + "/refuse")
	p.Remove()
	if slices.Contains(n.Addresses(), ip) {
		t.Errorf("%s is not given back", ip)
	}
}

// The directory of configurations may go and come back: that is seen within a
// second, without a restart; pods that are up keep what they have and are taken
// down with what they were set up with.
//
// contract: 7.3.21, 7.1.2, 7.1.6
// promise: P22, P34
func TestNetworkConfiguration(t *testing.T) {
	n := critest.Run(t, binDir, "")
	// Not the shared node's addresses: there is traffic.
	other := func(suffix, v4, v6 string) string {
		t.Cleanup(func() { _ = exec.Command("ip", "link", "del", n.Bridge+suffix).Run() }) // may not have been made
		return strings.NewReplacer(`"bridge":"`+n.Bridge, `"bridge":"`+n.Bridge+suffix, critest.Subnet4, v4, critest.Subnet6, v6).Replace(string(n.Conflist()))
	}
	conflist, third := other("n", "10.91.0.0/16", "fd00:91::/64"), other("o", "10.99.0.0/16", "fd00:99::/64")
	write(t, n.CNI+"/10-test.conflist", conflist)
	var p *critest.Pod
	critest.Eventually(t, "the network", func() bool {
		p = n.Pod(t, "pauseless")
		if strings.HasPrefix(p.Status().Status.Network.Ip, "10.91.") {
			return true
		}
		p.Remove()
		return false
	})
	v4, _ := ipsOf(p)
	for range 3 {
		if err := os.RemoveAll(n.CNI); err != nil {
			t.Fatal(err)
		}
		within(t, "the network's end", func() bool { ok, _ := networkReady(t, n); return !ok })
		if _, msg := networkReady(t, n); !strings.Contains(msg, "cni plugin not initialized") {
			t.Errorf("%q", msg)
		}
		_, err := n.RT.RunPodSandbox(critest.Context(t), &runtime.RunPodSandboxRequest{Config: n.PodConfig(t)})
		if err == nil || !strings.Contains(err.Error(), "cni") {
			t.Errorf("a pod without a network: %v", err)
		}
		n.Pod(t, "pauseless", critest.HostNetwork) // needs none
		write(t, n.CNI+"/10-test.conflist", conflist)
		within(t, "the network's return", func() bool { ok, _ := networkReady(t, n); return ok })
	}
	if p.Run(serveText(80, "still")); p.Status().Status.Network.Ip != v4 {
		t.Errorf("%v", p.Status())
	}
	eventuallyGet(t, v4+":80", "still")
	// One that cannot be read is named; then another is the first by its name.
	write(t, n.CNI+"/00-broken.conflist", "{")
	within(t, "the network's end", func() bool {
		ok, msg := networkReady(t, n)
		return !ok && strings.Contains(msg, "00-broken.conflist")
	})
	os.Remove(n.CNI + "/00-broken.conflist")
	within(t, "the network's return", func() bool { ok, _ := networkReady(t, n); return ok })
	write(t, n.CNI+"/05-other.conflist", third)
	critest.Eventually(t, "the other network", func() bool {
		q := n.Pod(t, "pauseless")
		defer q.Remove()
		return strings.HasPrefix(q.Status().Status.Network.Ip, "10.99.")
	})
	if err := os.RemoveAll(n.CNI); err != nil {
		t.Fatal(err)
	}
	p.Remove()
	if slices.Contains(n.Addresses(), v4) {
		t.Errorf("%s is not given back", v4)
	}
}

// within is Eventually for what has to be seen in less than a second; an
// overloaded machine gets two more.
func within(t *testing.T, what string, cond func() bool) {
	t.Helper()
	begin := time.Now()
	critest.Eventually(t, what, cond)
	if d := time.Since(begin); d > critest.Slow(10*time.Second) {
		t.Errorf("%s took %v", what, d)
	}
}

// contract: 7.1.4
func TestUpdateRuntimeConfig(t *testing.T) {
	n, err := critest.NewNode(binDir, `
  [plugins.'io.containerd.cri.v1.runtime'.cni]
`)
	if err != nil {
		t.Fatal(err)
	}
	// The block is there already: the key is put into it.
	text, err := os.ReadFile(n.Dir + "/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	config := strings.Replace(string(text), "\n  [plugins.'io.containerd.cri.v1.runtime'.cni]\n\n", "\n", 1)
	config = strings.Replace(config, "conf_dir = ", "conf_template = '"+n.Dir+"/template'\n    conf_dir = ", 1)
	write(t, n.Dir+"/config.toml", config)
	write(t, n.Dir+"/template", fmt.Sprintf(`{"cniVersion":"1.0.0","name":"made","plugins":[{"type":"bridge","bridge":%q,"isGateway":true,"ipam":{"type":"host-local","dataDir":%q,
 "ranges":[{{range $i, $r := .PodCIDRRanges}}{{if $i}},{{end}}[{"subnet":"{{$r}}"}]{{end}}],"routes":[{{range $i, $r := .Routes}}{{if $i}},{{end}}{"dst":"{{$r}}"}{{end}}]}}]}`, n.Bridge, n.Dir+"/ipam"))
	if err := os.RemoveAll(n.CNI); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.Clear(t)
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		n.CheckClean(t)
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	update := func(cidr string) error {
		_, err := n.RT.UpdateRuntimeConfig(critest.Context(t), &runtime.UpdateRuntimeConfigRequest{RuntimeConfig: &runtime.RuntimeConfig{NetworkConfig: &runtime.NetworkConfig{PodCidr: cidr}}})
		return err
	}
	critest.Eventually(t, "an answer", func() bool { return update("") == nil })
	if ok, _ := networkReady(t, n); ok {
		t.Error("there is a network without a configuration")
	}
	if err := update("10.77.0.0"); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("%v", err)
	}
	if err := update("10.77.0.0/16,fd00:77::/64"); err != nil {
		t.Fatal(err)
	}
	critest.Eventually(t, "the network", func() bool { ok, _ := networkReady(t, n); return ok })
	made, err := os.ReadFile(n.CNI + "/10-containerd-net.conflist")
	if err != nil || !strings.Contains(string(made), `"10.77.0.0/16"`) || !strings.Contains(string(made), `"::/0"`) {
		t.Errorf("%s %v", made, err)
	}
	v4, v6 := ipsOf(n.Pod(t, "pauseless"))
	if !strings.HasPrefix(v4, "10.77.") || !strings.HasPrefix(v6, "fd00:77::") {
		t.Errorf("%s %s", v4, v6)
	}
	// A network that works is not replaced.
	if err := update("10.66.0.0/16"); err != nil {
		t.Error(err)
	}
	if now, err := os.ReadFile(n.CNI + "/10-containerd-net.conflist"); err != nil || string(now) != string(made) {
		t.Errorf("%s %v", now, err)
	}
}
