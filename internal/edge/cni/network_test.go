package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/edge/metrics/metricstest"
	"github.com/gantryd/gantry/internal/lib/idmap"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

// listen accepts connections inside a pod, and greets them.
func (l *lab) listen(netns, addr string) {
	l.Helper()
	var ln net.Listener
	l.must(nspin.Enter(map[nspin.Kind]string{nspin.Net: netns}, func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}))
	l.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "hello")
			c.Close()
		}
	}()
}

// dial connects from a namespace, "" is the test's, and wants the greeting.
func dial(netns, addr string) error {
	from := func() error {
		c, err := net.DialTimeout("tcp", addr, 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		b := make([]byte, 5)
		if _, err := c.Read(b); err != nil || string(b) != "hello" {
			return fmt.Errorf("read %q: %v", b, err)
		}
		return nil
	}
	if netns == "" {
		return from()
	}
	return nspin.Enter(map[nspin.Kind]string{nspin.Net: netns}, from)
}

// links lists the interfaces of the test's network.
func links(t *testing.T) []string {
	t.Helper()
	all, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range all {
		names = append(names, l.Attrs().Name)
	}
	slices.Sort(names)
	return names
}

func bridge(l *lab, name string, subnets ...string) string {
	l.Cleanup(func() {
		if link, err := netlink.LinkByName(name); err == nil {
			l.must(netlink.LinkDel(link))
		}
	})
	return fmt.Sprintf(`{"type":"bridge","bridge":%q,"isGateway":true,"hairpinMode":true,%s}`, name, l.ipam(subnets...))
}

// contract: 7.3.21, 7.3.22, 9.1.8
func TestRealPlugins(t *testing.T) {
	for _, pref := range []string{"", "ipv6"} {
		t.Run("ip_pref="+pref, func(t *testing.T) {
			l := newLab(t, func(o *Options) { o.Config.IPPref = pref })
			l.list(l.conf, "10-net.conflist", "realnet", bridge(l, "cnitest0", "10.77.0.0/24", "fd77::/64"), `{"type":"portmap","capabilities":{"portMappings":true}}`)
			l.open()
			before := links(t)
			a, b := l.pod("aaaa"), l.pod("bbbb")
			a.Ports = []PortMapping{{HostPort: 18080, ContainerPort: 80, Protocol: "TCP"}, {ContainerPort: 81, Protocol: "tcp"}}
			ra, rb := l.setup(a), l.setup(b)
			if len(ra.AdditionalIPs) != 1 || len(rb.AdditionalIPs) != 1 {
				t.Fatalf("addresses %+v", ra)
			}
			ip4, ip6 := ra.IP, ra.AdditionalIPs[0]
			if pref == "ipv6" {
				ip4, ip6 = ip6, ip4
			}
			if net.ParseIP(ip4).To4() == nil || net.ParseIP(ip6).To16() == nil || net.ParseIP(ip6).To4() != nil {
				t.Fatalf("addresses %+v", ra)
			}
			var raw gocni.Result
			l.must(json.Unmarshal(ra.Raw, &raw))
			if c := raw.Interfaces["eth0"]; c == nil || c.Sandbox != a.NetNS || len(c.IPConfigs) != 2 || raw.Interfaces["lo"] == nil {
				t.Errorf("result %s", ra.Raw)
			}

			l.listen(a.NetNS, ":80")
			var errs []error
			errs = append(errs, dial(a.NetNS, "127.0.0.1:80"), // the loopback plugin
				dial("", net.JoinHostPort(ip4, "80")), dial(b.NetNS, net.JoinHostPort(ip4, "80")),
				dial(b.NetNS, "10.77.0.1:18080"), dial("", "10.77.0.1:18080"))
			l.until(10*time.Second, "IPv6 between the pods", func() bool { return dial(b.NetNS, net.JoinHostPort(ip6, "80")) == nil }) // duplicate address detection
			if err := errors.Join(errs...); err != nil {
				t.Error(err)
			}
			if got := len(l.reserved()); got != 4 {
				t.Errorf("%d addresses are reserved: %v", got, l.reserved())
			}

			l.teardown(a.ID)
			if err := dial("", "10.77.0.1:18080"); err == nil {
				t.Error("the port is still mapped")
			}
			if out, err := exec.Command("iptables-save").CombinedOutput(); err != nil || strings.Contains(string(out), "18080") {
				t.Errorf("%v\n%s", err, out)
			}
			l.teardown(b.ID)
			l.teardown(b.ID)
			l.teardown("never-heard-of")
			before = append(before, "cnitest0")
			slices.Sort(before)
			if after := links(t); !slices.Equal(after, before) {
				t.Errorf("interfaces %v, want %v", after, before)
			}
			const metric = "containerd_cri_network_plugin_operations_"
			got := metricstest.Read(t, l.metrics)
			for _, op := range []string{" set_up_pod", " tear_down_pod"} {
				if got[metric+"total_total"+op] != 2 || got[metric+"duration_seconds_seconds"+op] != 2 || got[metric+"errors_total_total"+op] != 0 {
					t.Errorf("%s: %v", op, got)
				}
			}
		})
	}
}

// contract: 7.3.21, 7.3.22
func TestWhatPluginsAreTold(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Config.UseInternalLoopback = true })
	l.plugin("told", "untold")
	caps := `"capabilities":{"portMappings":true,"bandwidth":true,"dns":true,"ips":true,"mac":true,"cgroupPath":true,"io.kubernetes.cri.pod-annotations":true}`
	l.list(l.conf, "10-net.conflist", "net", `{"type":"told",`+caps+`}`, `{"type":"untold","capabilities":{"portMappings":false}}`)
	l.open()
	p := l.pod("cafe")
	p.Ports = []PortMapping{{HostPort: 8080, ContainerPort: 80, Protocol: "UDP", HostIP: "127.0.0.1"}, {HostPort: 0, ContainerPort: 9}}
	p.CgroupParent = "/kubepods/x"
	p.DNS = &DNS{Servers: []string{"10.0.0.10"}, Searches: []string{"svc"}, Options: []string{"ndots:5"}}
	p.Annotations = map[string]string{AnnotationIngress: "10M", AnnotationEgress: "1.5Mi", AnnotationIPs: "10.9.9.9/24, fd09::9/64", AnnotationMAC: "02:00:00:00:00:07", "x": "y"}
	if res := l.setup(p); res.IP != "10.9.9.9" || !slices.Equal(res.AdditionalIPs, []string{"fd09::9"}) {
		t.Errorf("result %+v", res)
	}
	var want map[string]any
	l.must(json.Unmarshal([]byte(`{"portMappings":[{"HostPort":8080,"ContainerPort":80,"Protocol":"udp","HostIP":"127.0.0.1"}],
		"bandwidth":{"IngressRate":10000000,"IngressBurst":4294967295,"EgressRate":1572864,"EgressBurst":4294967295},
		"dns":{"Servers":["10.0.0.10"],"Searches":["svc"],"Options":["ndots:5"]},"ips":["10.9.9.9/24","fd09::9/64"],"mac":"02:00:00:00:00:07","cgroupPath":"/kubepods/x",
		"io.kubernetes.cri.pod-annotations":{"kubernetes.io/ingress-bandwidth":"10M","kubernetes.io/egress-bandwidth":"1.5Mi","io.gantry.cni.ips":"10.9.9.9/24, fd09::9/64","io.gantry.cni.mac":"02:00:00:00:00:07","x":"y"}}`), &want))
	args := "IgnoreUnknown=1;K8S_POD_NAMESPACE=test;K8S_POD_NAME=name-cafe;K8S_POD_INFRA_CONTAINER_ID=cafe;K8S_POD_UID=uid-cafe"
	l.teardown(p.ID)
	for _, name := range []string{"told", "untold"} {
		calls := l.calls(name)
		if len(calls) != 2 || calls[0].command != "ADD" || calls[1].command != "DEL" {
			t.Fatalf("%s: %+v", name, calls)
		}
		for _, c := range calls {
			if c.id != "cafe" || c.ifName != "eth0" || c.netns != p.NetNS || c.args != args {
				t.Errorf("%s: %+v", name, c)
			}
			got, has := c.conf["runtimeConfig"]
			if has != (name == "told") || has && !reflect.DeepEqual(got, any(want)) {
				t.Errorf("%s %s: runtimeConfig %v", name, c.command, got)
			}
		}
		if name == "untold" && calls[0].conf["prevResult"] == nil || calls[1].conf["prevResult"] == nil {
			t.Errorf("%s: no prevResult: %+v", name, calls)
		}
	}

	for what, change := range map[string]func(*Pod){
		"bandwidth of no number":   func(p *Pod) { p.Annotations = map[string]string{AnnotationEgress: "fast"} },
		"bandwidth too small":      func(p *Pod) { p.Annotations = map[string]string{AnnotationEgress: "999"} },
		"bandwidth too large":      func(p *Pod) { p.Annotations = map[string]string{AnnotationIngress: "1001T"} },
		"address":                  func(p *Pod) { p.Annotations = map[string]string{AnnotationIPs: "10.0.0.1,x"} },
		"hardware address":         func(p *Pod) { p.Annotations = map[string]string{AnnotationMAC: "x"} },
		"port":                     func(p *Pod) { p.Ports = []PortMapping{{HostPort: 70000, ContainerPort: 1}} },
		"address of a port":        func(p *Pod) { p.Ports = []PortMapping{{HostPort: 1, ContainerPort: 1, HostIP: "$(x)"}} },
		"argument inside the name": func(p *Pod) { p.Name = "x;IgnoreUnknown=0" },
		"id":                       func(p *Pod) { p.ID = "../x" },
	} {
		q := Pod{ID: "bad", Name: "n", Namespace: "ns", UID: "u", NetNS: p.NetNS}
		change(&q)
		if _, err := l.n.Setup(t.Context(), q); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := len(l.calls("told")); n != 2 {
		t.Errorf("a plugin ran for a bad pod: %d calls", n)
	}
}

func TestPick(t *testing.T) {
	var ips []*gocni.IPConfig
	for _, s := range []string{"fd00::1", "10.0.0.1", "fd00::2", "10.0.0.2"} {
		ips = append(ips, &gocni.IPConfig{IP: net.ParseIP(s)})
	}
	for pref, want := range map[string]string{"": "10.0.0.1 [fd00::1 fd00::2 10.0.0.2]", "ipv4": "10.0.0.1 [fd00::1 fd00::2 10.0.0.2]",
		"ipv6": "fd00::1 [10.0.0.1 fd00::2 10.0.0.2]", "cni": "fd00::1 [10.0.0.1 fd00::2 10.0.0.2]"} {
		if ip, rest := pick(ips, pref); fmt.Sprint(ip, " ", rest) != want {
			t.Errorf("%q: %s %s, want %s", pref, ip, rest, want)
		}
	}
	if ip, rest := pick(ips[:1], "ipv4"); ip != "fd00::1" || rest != nil {
		t.Errorf("only one: %s %s", ip, rest)
	}
}

// A pod's network namespace inside of its user namespace is as good.
//
// contract: 7.3.21
func TestUserNamespaceAndInternalLoopback(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Config.UseInternalLoopback = true })
	l.list(l.conf, "10-net.conflist", "realnet", bridge(l, "cnitest1", "10.78.0.0/24"))
	l.open()
	path, err := NetNSName(l.root + "/ns")
	l.must(err)
	if name := filepath.Base(path); len(name) != len("cni-01234567-89ab-cdef-0123-456789abcdef") || !strings.HasPrefix(name, "cni-") {
		t.Errorf("name %s", name)
	}
	m := idmap.Map{{Host: 700000, Size: 65536}}
	l.must(nspin.Make(nspin.Spec{Paths: map[nspin.Kind]string{nspin.Net: path, nspin.User: path + "-user"}, UIDs: m, GIDs: m}))
	defer func() { l.must(RemoveNetNS(path), RemoveNetNS(path+"-user")) }()
	res := l.setup(Pod{ID: "user", Name: "n", Namespace: "ns", NetNS: path})
	l.listen(path, ":80")
	l.must(dial("", res.IP+":80"), dial(path, "127.0.0.1:80"))
	second, err := NewNetNS(l.root+"/ns", path) // as of a pause process
	l.must(err, dial(second, "127.0.0.1:80"), RemoveNetNS(second))
	l.must(RemoveNetNS(path)) // the namespace goes first
	l.teardown("user")
}

// contract: 7.3.21
func TestConfigurationOfRuntimeHandler(t *testing.T) {
	l := newLab(t, nil)
	l.o.Config.MaxConfNum = 2
	own := l.root + "/own"
	l.o.PerRuntime = map[string]HandlerConfig{"kata": {ConfDir: own, MaxConfNum: 1}, "plain": {}}
	l.plugin("common", "second", "third", "katas")
	l.list(l.conf, "10-a.conflist", "a", "common")
	l.must(os.WriteFile(l.conf+"/20-b.conf", []byte(`{"cniVersion":"1.0.0","name":"b","type":"second"}`), 0o644))
	l.list(l.conf, "30-c.conflist", "c", "third")
	l.list(own, "10-own.conflist", "own", "katas")
	l.list(own, "20-own.conflist", "more", "third")
	l.open()
	for _, handler := range []string{"", "plain", "kata", "unknown"} {
		p := l.pod("p" + handler)
		p.Handler = handler
		l.setup(p)
		l.teardown(p.ID)
	}
	count := func(name string) int { return len(l.calls(name)) / 2 }
	if got := []int{count("common"), count("second"), count("third"), count("katas")}; !slices.Equal(got, []int{3, 3, 0, 1}) {
		t.Errorf("calls of common, second, third, katas: %v", got)
	}
	if c := l.calls("second")[0]; c.ifName != "eth1" {
		t.Errorf("second network: %+v", c)
	}
	info := l.n.Info()
	if len(info) != 2 || info["default"].LoadStatus != "OK" || len(info["default"].Config.Networks) != 3 || len(info["kata"].Config.Networks) != 2 {
		t.Errorf("%+v", info)
	}
	if err := l.n.Status(t.Context(), "kata"); err != nil {
		t.Error(err)
	}
}

// contract: 7.3.21
func TestManyNetworks(t *testing.T) {
	for _, serially := range []bool{false, true} {
		t.Run(fmt.Sprintf("setup_serially=%t", serially), func(t *testing.T) {
			l := newLab(t, func(o *Options) { o.Config.MaxConfNum, o.Config.SetupSerially = 0, serially })
			l.plugin("first", "second", "third")
			for _, name := range []string{"third", "first", "second"} {
				l.list(l.conf, map[string]string{"first": "10", "second": "20", "third": "30"}[name]+".conflist", name, name)
			}
			l.open()
			p := l.pod("many")
			l.setup(p)
			for i, name := range []string{"first", "second", "third"} {
				if c := l.calls(name); len(c) != 1 || c[0].ifName != fmt.Sprintf("eth%d", i) {
					t.Errorf("%s: %+v", name, c)
				}
			}
			l.teardown(p.ID)
			// In parallel the others have begun when the first fails; all are deleted.
			l.mode("first", "ADD", "fail")
			p.ID = "fails"
			if _, err := l.n.Setup(t.Context(), p); err == nil || !strings.Contains(err.Error(), "add eth0") {
				t.Errorf("setup %v", err)
			}
			if added := len(l.calls("third")) > 2; added == serially {
				t.Errorf("third was added: %t", added)
			}
			l.until(10*time.Second, "deletion by itself", l.gone(p.ID))
			if c := l.calls("second"); c[len(c)-1].command != "DEL" || c[len(c)-1].id != "fails" {
				t.Errorf("%+v", c)
			}
		})
	}
}

// promise: P22
// contract: 7.3.21
func TestConfigurationComesAndGoes(t *testing.T) {
	l := newLab(t, nil)
	l.must(os.RemoveAll(l.root + "/etc"))
	l.plugin("p")
	l.open()
	ready := func() bool { return l.n.Status(context.Background(), "") == nil }
	notReady := func() bool { return !ready() }
	if err := l.n.Status(t.Context(), ""); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "cni plugin not initialized") {
		t.Errorf("status %v", err)
	}
	p := l.pod("early")
	if _, err := l.n.Setup(t.Context(), p); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "test/name-early") {
		t.Errorf("setup %v", err)
	}
	write := func() { l.list(l.conf, "10-net.conflist", "net", "p") }
	for i := range 5 {
		write()
		l.until(time.Second, "configuration is seen", ready)
		switch i {
		case 0:
			l.must(os.RemoveAll(l.conf))
		case 1:
			l.must(os.RemoveAll(l.root + "/etc"))
		case 2:
			l.must(os.Rename(l.conf, l.conf+".old"))
		case 3:
			l.must(os.Rename(l.root+"/etc/cni", l.root+"/etc/gone"))
		case 4:
			l.must(os.WriteFile(l.conf+"/00-broken.conf", []byte("{"), 0o644))
		}
		l.until(time.Second, "loss of the configuration is seen", notReady)
		if info := l.n.Info()["default"]; info.LoadStatus == "OK" || info.LoadStatus == "" {
			t.Errorf("load status %q", info.LoadStatus)
		}
	}
	l.must(os.Remove(l.conf + "/00-broken.conf"))
	l.until(time.Second, "repair is seen", ready)
	// All at once, again and again.
	for range 20 {
		l.must(os.RemoveAll(l.root + "/etc"))
		write()
	}
	l.until(time.Second, "configuration is seen", ready)
	l.setup(p)
	l.teardown(p.ID)
}

// contract: 7.3.21
func TestStatusOfPlugins(t *testing.T) {
	l := newLab(t, nil)
	l.plugin("p")
	l.must(os.WriteFile(l.conf+"/10.conflist", []byte(`{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"p"}]}`), 0o644))
	l.open()
	l.must(l.n.Status(t.Context(), ""))
	l.mode("p", "STATUS", "fail")
	if err := l.n.Status(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "told to fail") {
		t.Errorf("status %v", err)
	}
	l.mode("p", "STATUS", "hang")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := l.n.Status(ctx, ""); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "STATUS by plugin p") {
		t.Errorf("status %v", err)
	}
}

// A chain of which any plugin may fail at any command never keeps an address,
// also when the program ends and starts again in between.
//
// promise: P22
func TestFaultsInChain(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Config.UseInternalLoopback = true; o.Retry = 5 * time.Millisecond })
	names := []string{"f1", "f2", "f3"}
	l.plugin(names...)
	l.list(l.conf, "10.conflist", "chain", "f1", fmt.Sprintf(`{"type":"host-local",%s}`, l.ipam("10.79.0.0/16")), "f2", "f3")
	l.open()
	p := l.pod("template")
	failed := 0
	undeletable := map[string]bool{}
	for i := range *rounds {
		sick, on := names[rand.IntN(3)], rand.IntN(3)
		if on != 1 {
			l.mode(sick, "ADD", "fail")
		}
		if on != 0 {
			l.mode(sick, "DEL", "fail")
			undeletable[sick] = true
		}
		p.ID = fmt.Sprintf("pod%d", i)
		_, err := l.n.Setup(t.Context(), p)
		if (err != nil) != (on != 1) {
			t.Fatalf("round %d, %s, %d: setup %v", i, sick, on, err)
		}
		if err != nil && (!strings.Contains(err.Error(), fmt.Sprintf("test/name-template (%s): add eth0: plugin type=%q", p.ID, sick)) || !strings.Contains(err.Error(), "told to fail; by a test")) {
			t.Fatalf("error %v", err)
		}
		if i%3 > 0 || err == nil {
			if err := l.n.Teardown(t.Context(), p.ID); (err != nil) != (len(undeletable) > 0) {
				t.Fatalf("round %d, %v: teardown %v", i, undeletable, err)
			} else if err != nil {
				failed++
			}
		}
		if i%10 == 9 {
			l.must(os.RemoveAll(l.conf)) // it is not needed to delete
			l.open()
			l.list(l.conf, "10.conflist", "chain", "f1", fmt.Sprintf(`{"type":"host-local",%s}`, l.ipam("10.79.0.0/16")), "f2", "f3")
			l.until(time.Second, "configuration", func() bool { return l.n.Status(t.Context(), "") == nil })
		}
		l.mode(sick, "ADD", "")
		if i%4 == 3 {
			for name := range undeletable {
				l.mode(name, "DEL", "")
			}
			clear(undeletable)
		}
	}
	if *rounds >= 40 && failed == 0 {
		t.Error("no deletion failed: nothing was tested")
	}
	for _, name := range names {
		l.mode(name, "DEL", "")
	}
	l.until(30*time.Second, "all is deleted", func() bool { return len(l.n.Intents()) == 0 })
	l.empty()
	if got := metricstest.Read(t, l.metrics); got["containerd_cri_network_plugin_operations_total_total tear_down_pod"] == 0 {
		t.Errorf("%v", got)
	}
}

// promise: P22
func TestDeletionOutlivesRestart(t *testing.T) {
	l := newLab(t, nil)
	l.plugin("f")
	l.list(l.conf, "10.conflist", "n", fmt.Sprintf(`{"type":"host-local",%s}`, l.ipam("10.80.0.0/24")), "f")
	l.open()
	p, kept, lost := l.pod("stuck"), l.pod("kept"), l.pod("lost")
	l.setup(p)
	l.setup(kept)
	l.setup(lost)
	if _, err := l.n.Setup(t.Context(), p); !errdefs.IsAlreadyExists(err) {
		t.Errorf("again: %v", err)
	}
	l.mode("f", "DEL", "missing") // "not found" of a program that the plugin needs is a failure
	if err := l.n.Teardown(t.Context(), p.ID); err == nil || !strings.Contains(err.Error(), "iptables") {
		t.Fatalf("teardown %v", err)
	}
	l.must(RemoveNetNS(p.NetNS), os.RemoveAll(l.conf))
	l.open()
	n := len(l.calls("f"))
	l.until(5*time.Second, "deletion is tried again", func() bool { return len(l.calls("f")) > n+1 })
	if i := l.n.Intents(); len(i) != 3 || i[2].ID != "stuck" || !i[2].Deleting || !strings.Contains(i[2].Last, "iptables") || i[0].Deleting {
		t.Errorf("%+v", i)
	}
	l.n.Reclaim(func(id string) bool { return id == "kept" || id == "stuck" })
	l.mode("f", "DEL", "absent") // what it would delete is not there: the rest of the list goes on
	l.until(10*time.Second, "deletion", func() bool { return l.gone("stuck")() && l.gone("lost")() })
	if held := l.reserved(); len(held) != 1 {
		t.Errorf("reserved %v", held)
	}
	if last := l.calls("f"); last[len(last)-1].netns == "" && last[len(last)-2].netns == "" {
		t.Errorf("a namespace that is there was not told: %+v", last)
	}
	l.teardown("kept")
	if err := l.n.Forget(t.Context(), "kept"); !errdefs.IsNotFound(err) {
		t.Errorf("forget: %v", err)
	}
}

// An operator drops what cannot be deleted, and a pod that another program has
// set up is deleted like ours.
//
// promise: P22
func TestForgetAndAdopt(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Config.UseInternalLoopback = true })
	l.plugin("f")
	l.list(l.conf, "10.conflist", "n", "f")
	l.mode("f", "DEL", "fail")
	l.open()
	p := l.pod("adopted")
	l.must(l.n.Adopt(t.Context(), p), l.n.Adopt(t.Context(), p))
	if err := l.n.Teardown(t.Context(), p.ID); err == nil {
		t.Fatal("deleted")
	}
	l.must(l.n.Forget(t.Context(), p.ID))
	n := len(l.calls("f"))
	l.open()
	l.must(l.n.Adopt(t.Context(), p))
	l.mode("f", "DEL", "")
	l.teardown(p.ID)
	if calls := l.calls("f"); len(calls) != n+1 || calls[n].command != "DEL" || calls[n].id != p.ID {
		t.Errorf("%+v", calls[n:])
	}
}

// promise: P22
func TestPluginThatNeverReturns(t *testing.T) {
	l := newLab(t, nil)
	l.o.Limit = 1500 * time.Millisecond
	l.plugin("sick", "well")
	store := fmt.Sprintf(`{"type":"host-local",%s}`, l.ipam("10.81.0.0/24"))
	l.list(l.conf, "10.conflist", "n", store, "sick")
	l.list(l.root+"/other", "10.conflist", "o", store, "well")
	l.o.PerRuntime = map[string]HandlerConfig{"other": {ConfDir: l.root + "/other"}}
	l.open()
	p := l.pod("hung")
	l.mode("sick", "ADD", "hang")
	l.mode("sick", "DEL", "hang")

	check := func(stage string, limit time.Duration, err error, start time.Time) {
		t.Helper()
		if took := time.Since(start); took < limit || took > limit+10*time.Second {
			t.Errorf("%s took %s, the limit is %s", stage, took, limit)
		}
		for _, want := range []string{"test/name-hung", stage + " by plugin sick", "killed after", "context deadline exceeded"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q is not in %v", want, err)
			}
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("class of %v", err)
		}
	}
	// The caller's deadline.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := l.n.Setup(ctx, p)
	check("ADD", 200*time.Millisecond, err, start)
	// The limit of its own; other pods do not notice.
	start = time.Now()
	done := make(chan error, 1)
	go func() { done <- l.n.Teardown(context.Background(), p.ID) }()
	for i := range 3 {
		other := l.pod(fmt.Sprintf("other%d", i))
		other.Handler = "other"
		l.setup(other)
		l.teardown(other.ID)
	}
	if l.gone(p.ID)() {
		t.Error("the sick pod is deleted")
	}
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := l.n.Teardown(ctx, p.ID); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "ADD by plugin sick") {
		t.Errorf("meanwhile: %v", err)
	}
	check("DEL", l.o.Limit, <-done, start)
	// The block clears: no restart and no call is needed.
	l.mode("sick", "DEL", "")
	l.until(10*time.Second, "deletion", l.gone(p.ID))
	// A caller that goes away takes its plugin along.
	ctx, cancel = context.WithCancel(t.Context())
	q := l.pod("cancelled")
	go func() {
		l.until(10*time.Second, "plugin runs", func() bool { return len(l.running("cancelled")) >= 3 })
		cancel()
	}()
	if _, err := l.n.Setup(ctx, q); !errors.Is(err, context.Canceled) {
		t.Errorf("setup %v", err)
	}
	if ps := l.running("cancelled"); len(ps) > 0 && !slices.ContainsFunc(ps, func(s string) bool { return strings.Contains(s, "DEL") }) {
		t.Errorf("still running: %v", ps)
	}
	l.until(10*time.Second, "deletion", l.gone(q.ID))
}

// The program is killed at every step of a pod's network; the next start frees
// all, whatever a plugin was doing.
//
// promise: P22
func TestKilledAnywhere(t *testing.T) {
	l := newLab(t, nil)
	l.plugin("slow")
	l.list(l.conf, "10.conflist", "n", fmt.Sprintf(`{"type":"host-local",%s}`, l.ipam("10.82.0.0/24")), "slow")
	for i, point := range []string{"cni.intent:1", "cni.added:1", "cni.deleted:1", "ADD", "DEL"} {
		p := l.pod(fmt.Sprintf("killed%d", i))
		if strings.Contains(point, ":") {
			if err := l.start(p, point).Wait(); err == nil {
				t.Fatalf("%s: it survived", point)
			}
		} else { // in the midst of a plugin, which goes on without its parent
			l.mode("slow", point, "hang")
			cmd := l.start(p, "")
			l.until(10*time.Second, "plugin runs", func() bool {
				return slices.ContainsFunc(l.calls("slow"), func(c call) bool { return c.id == p.ID && c.command == point })
			})
			l.must(cmd.Process.Kill())
			_ = cmd.Wait()
			if len(l.running(p.ID)) == 0 {
				t.Fatalf("%s: the plugin is not there, nothing is tested", point)
			}
			l.mode("slow", point, "")
		}
		if files, _ := filepath.Glob(l.o.Dir + "/" + p.ID + ".*"); len(files) != 1 {
			t.Fatalf("%s: intents %v", point, files)
		}
		l.open()
		if ps := fmt.Sprint(l.running(p.ID)); strings.Contains(ps, "sleep") {
			t.Errorf("%s: still running: %s", point, ps)
		}
		l.n.Reclaim(func(string) bool { return false })
		l.until(10*time.Second, point, l.gone(p.ID))
		l.empty()
	}
}

func TestBadIntents(t *testing.T) {
	l := newLab(t, nil)
	l.must(os.MkdirAll(l.o.Dir+"/dir.up", 0o755))
	for name, text := range map[string]string{"cut.up": `{"id":"cut"`, "other.del": `{"id":"x"}`, "readme.txt": "hello"} {
		l.must(os.WriteFile(filepath.Join(l.o.Dir, name), []byte(text), 0o600))
	}
	l.open()
	if all := l.n.Intents(); len(all) > 0 {
		t.Errorf("%+v", all)
	}
	l.stop()
	l.must(os.RemoveAll(l.o.Dir))
}

// contract: 7.1.4
func TestConfTemplate(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Config.UseInternalLoopback = true })
	l.must(os.RemoveAll(l.conf))
	l.plugin("p")
	file := l.conf + "/10-containerd-net.conflist"
	l.open()
	l.must(l.n.UpdatePodCIDR(t.Context(), "10.1.0.0/24")) // no template
	if _, err := os.Stat(file); err == nil {
		t.Fatal("a configuration was made of nothing")
	}
	l.o.Config.ConfTemplate = l.root + "/template"
	l.must(os.WriteFile(l.o.Config.ConfTemplate, []byte(`{"cniVersion":"1.0.0","name":"made","plugins":[{"type":"p","cidr":"{{.PodCIDR}}",
		"ranges":[{{range $i, $r := .PodCIDRRanges}}{{if $i}},{{end}}"{{$r}}"{{end}}],"routes":[{{range $i, $r := .Routes}}{{if $i}},{{end}}"{{$r}}"{{end}}]}]}`), 0o644))
	l.open()
	for _, bad := range []string{"10.1.0.0", "10.1.0.0/24,", `10.1.0.0/24","x":"`} {
		if err := l.n.UpdatePodCIDR(t.Context(), bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	l.must(l.n.UpdatePodCIDR(t.Context(), "")) // kubelet knows none yet
	l.must(l.n.UpdatePodCIDR(t.Context(), "10.1.0.0/24, fd01::/64"))
	l.setup(l.pod("templated")) // at once
	l.teardown("templated")
	conf := l.calls("p")[0].conf
	if conf["cidr"] != "10.1.0.0/24" || fmt.Sprint(conf["ranges"]) != "[10.1.0.0/24 fd01::/64]" || fmt.Sprint(conf["routes"]) != "[0.0.0.0/0 ::/0]" {
		t.Errorf("%v", conf)
	}
	before, err := os.ReadFile(file)
	l.must(err, l.n.UpdatePodCIDR(t.Context(), "10.2.0.0/24"))
	if after, _ := os.ReadFile(file); string(after) != string(before) {
		t.Error("a configuration that is there was replaced")
	}
	const metric, op = "containerd_cri_network_plugin_operations_", " get_pod_network_status"
	if got := metricstest.Read(t, l.metrics); got[metric+"total_total"+op] != 2 || got[metric+"errors_total_total"+op] != 1 {
		t.Errorf("%v", got)
	}
	l.must(os.Remove(file), os.WriteFile(l.o.Config.ConfTemplate, []byte(`{{.Nothing}}`), 0o644))
	l.until(time.Second, "loss", func() bool { return l.n.Status(t.Context(), "") != nil })
	if err := l.n.UpdatePodCIDR(t.Context(), "10.2.0.0/24"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("broken template: %v", err)
	}
}

// The test's own network is not the host's.
func TestInside(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("networks are made by root")
	}
	var own, host unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/self/ns/net", &own), unix.Stat(fmt.Sprintf("/proc/%d/ns/net", os.Getppid()), &host)); err != nil {
		t.Fatal(err)
	}
	if own.Ino == host.Ino {
		t.Error("tests run in the network of the host")
	}
}

// A plugin that talks without end costs a bounded amount of memory, and one
// whose answer has holes costs no more than its pod.
func TestBadAnswers(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Config.UseInternalLoopback = true })
	l.must(os.WriteFile(l.bin+"/p", []byte("#!/bin/sh\n[ $CNI_COMMAND = DEL ] && exit 0\n. \"$0.says\"\n"), 0o755))
	l.list(l.conf, "10.conflist", "n", "p")
	l.open()
	p := l.pod("pod")
	says := func(text string) error {
		l.must(os.WriteFile(l.bin+"/p.says", []byte(text), 0o644))
		_, err := l.n.Setup(t.Context(), p)
		l.teardown(p.ID)
		return err
	}
	if err := says("head -c 6000000 /dev/zero >&2; head -c 6000000 /dev/zero"); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "ADD by plugin p: the answer is longer than 4194304 bytes") {
		t.Errorf("long: %.300v", err)
	}
	for _, long := range []string{"head -c 6000000 /dev/zero >&2; exit 1", `printf '{"code":99,"msg":"'; head -c 1000000 /dev/zero | tr '\0' x; echo '"}'; exit 1`} {
		if err := says(long); err == nil || len(err.Error()) > 8*maxStderr {
			t.Errorf("%s: %.300v", long, err)
		}
	}
	for _, answer := range []string{"", "null", "{}", "[]", `{"cniVersion":"1.0.0","ips":[null]}`, `{"cniVersion":"0.4.0","IPs":[null]}`, `{"cniVersion":"1.0.0","interfaces":[null],"ips":[{"address":"10.0.0.1/24"}]}`,
		`{"cniVersion":"0.4.0","routes":[null]}`, `{"cniVersion":"0.2.0","ip4":null}`, `{"cniVersion":"1.0.0","ips":[{"address":null}]}`,
		`{"cniVersion":"1.0.0","interfaces":[{}],"ips":[{"address":"10.0.0.1/24","interface":-1}]}`} {
		if err := says("echo '" + answer + "'"); err == nil || !strings.Contains(err.Error(), "test/name-pod") {
			t.Errorf("%s: %v", answer, err)
		}
	}
}

// The directory may be written in any form, and lie behind links.
//
// promise: P22
func TestConfigurationAnywhere(t *testing.T) {
	l := newLab(t, nil)
	l.plugin("p")
	real, etc := l.root+"/real", l.root+"/etc"
	swap := func(to string) {
		l.must(os.Symlink(to, l.root+"/new"), os.Rename(l.root+"/new", etc+"/cni"))
	}
	for form, dir := range map[string]string{"slash": etc + "/cni/net.d/", "dots": etc + "//cni/../cni/net.d"} {
		t.Run(form, func(t *testing.T) {
			l := &lab{T: t, root: l.root, bin: l.bin, conf: l.conf, o: l.o}
			l.o.Config.ConfDir = dir
			defer func() { l.stop() }()
			l.must(os.RemoveAll(etc), os.RemoveAll(real), os.MkdirAll(etc, 0o755))
			l.open()
			seen := func(want bool, what string) {
				t.Helper()
				l.until(time.Second, what, func() bool { return (l.n.Status(context.Background(), "") == nil) == want })
			}
			write := func(in string) { l.list(in, "10-net.conflist", "net", "p") }
			write(l.conf)
			seen(true, "a directory that was made")
			l.must(os.Rename(etc, etc+".old"))
			seen(false, "its grandparent was moved away")
			l.must(os.Rename(etc+".old", etc))
			seen(true, "its grandparent is back")
			l.must(os.RemoveAll(etc + "/cni"))
			seen(false, "loss")
			write(real + "/a/net.d")
			swap(real + "/a")
			seen(true, "a link to a directory")
			l.must(os.MkdirAll(real+"/b/net.d", 0o755))
			swap(real + "/b")
			seen(false, "a link to an empty one")
			write(real + "/b/net.d")
			seen(true, "a file behind the link")
			l.must(os.RemoveAll(real + "/b"))
			seen(false, "loss behind the link")
			write(real + "/b/net.d")
			seen(true, "the target of the link, made anew")
		})
	}
}

// A pod of another program is not forgotten because there is no configuration
// when it is found: its network is deleted by that which comes.
//
// promise: P22
func TestAdoptWithoutConfiguration(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Config.UseInternalLoopback = true })
	own := l.root + "/own"
	l.o.PerRuntime = map[string]HandlerConfig{"kata": {ConfDir: own}}
	l.plugin("f", "g")
	l.open()
	p, q := l.pod("common"), l.pod("katas")
	q.Handler = "kata"
	l.must(l.n.Adopt(t.Context(), p), l.n.Adopt(t.Context(), q))
	for range 2 {
		for _, id := range []string{p.ID, q.ID} {
			if err := l.n.Teardown(t.Context(), id); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "test/name-"+id) {
				t.Errorf("%s: %v", id, err)
			}
		}
		l.open()
	}
	l.list(l.conf, "10.conflist", "n", "f")
	l.list(own, "10.conflist", "n", "g")
	l.until(10*time.Second, "deletion", func() bool { return l.gone(p.ID)() && l.gone(q.ID)() })
	for name, id := range map[string]string{"f": p.ID, "g": q.ID} {
		if calls := l.calls(name); len(calls) != 1 || calls[0].command != "DEL" || calls[0].id != id {
			t.Errorf("%s: %+v", name, calls)
		}
	}
	// Arguments that no plugin can be given are still refused.
	p.Name = "x;y"
	if err := l.n.Adopt(t.Context(), p); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
}
