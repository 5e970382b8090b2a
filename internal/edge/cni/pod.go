package cni

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// capPodAnnotations is the capability by which plugins get all annotations.
const capPodAnnotations = "io.kubernetes.cri.pod-annotations"

// intentOf makes of a pod what its plugins will be told. ErrInvalidArgument.
func intentOf(p Pod, networks []attachment) (*intent, error) {
	in := &intent{ID: p.ID, Name: p.Name, Namespace: p.Namespace, Handler: p.Handler, NetNS: p.NetNS, Networks: networks, Caps: map[string]json.RawMessage{},
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", p.Namespace}, {"K8S_POD_NAME", p.Name}, {"K8S_POD_INFRA_CONTAINER_ID", p.ID}, {"K8S_POD_UID", p.UID}}}
	for _, kv := range in.Args {
		if strings.ContainsAny(kv[1], ";\n\x00") {
			return nil, fmt.Errorf("%s: %s %q cannot be given to plugins: %w", in, kv[0], kv[1], errdefs.ErrInvalidArgument)
		}
	}
	annotations := p.Annotations
	if annotations == nil {
		annotations = map[string]string{}
	}
	caps := map[string]any{capPodAnnotations: annotations}
	if ports, err := portMappings(p.Ports); err != nil {
		return nil, fmt.Errorf("%s: %w", in, err)
	} else if len(ports) > 0 {
		caps["portMappings"] = ports
	}
	if bw, err := bandwidth(p.Annotations); err != nil {
		return nil, fmt.Errorf("%s: %w", in, err)
	} else if bw != nil {
		caps["bandwidth"] = bw
	}
	if p.DNS != nil {
		caps["dns"] = gocni.DNS(*p.DNS)
	}
	if p.CgroupParent != "" {
		caps["cgroupPath"] = p.CgroupParent
	}
	if v := p.Annotations[AnnotationIPs]; v != "" {
		var ips []string
		for s := range strings.SplitSeq(v, ",") {
			s = strings.TrimSpace(s)
			if _, _, err := net.ParseCIDR(s); err != nil && net.ParseIP(s) == nil {
				return nil, fmt.Errorf("%s: annotation %s: %q is no address: %w", in, AnnotationIPs, s, errdefs.ErrInvalidArgument)
			}
			ips = append(ips, s)
		}
		caps["ips"] = ips
	}
	if v := p.Annotations[AnnotationMAC]; v != "" {
		if _, err := net.ParseMAC(v); err != nil {
			return nil, fmt.Errorf("%s: annotation %s: %v: %w", in, AnnotationMAC, err, errdefs.ErrInvalidArgument)
		}
		caps["mac"] = v
	}
	for name, v := range caps {
		data, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("%s: capability %s: %v: %w", in, name, err, errdefs.ErrInvalidArgument)
		}
		in.Caps[name] = data
	}
	return in, nil
}

func portMappings(ports []PortMapping) ([]gocni.PortMapping, error) {
	var out []gocni.PortMapping
	for _, m := range ports {
		if m.HostPort <= 0 {
			continue
		}
		if m.HostPort > math.MaxUint16 || m.ContainerPort < 1 || m.ContainerPort > math.MaxUint16 {
			return nil, fmt.Errorf("host port %d to port %d: %w", m.HostPort, m.ContainerPort, errdefs.ErrInvalidArgument)
		}
		if m.HostIP != "" && net.ParseIP(m.HostIP) == nil {
			return nil, fmt.Errorf("host port %d: %q is no address: %w", m.HostPort, m.HostIP, errdefs.ErrInvalidArgument)
		}
		m.Protocol = strings.ToLower(m.Protocol)
		out = append(out, gocni.PortMapping{HostPort: m.HostPort, ContainerPort: m.ContainerPort, Protocol: m.Protocol, HostIP: m.HostIP})
	}
	return out, nil
}

// bandwidth reads the annotations; nil without them.
func bandwidth(annotations map[string]string) (*gocni.BandWidth, error) {
	var bw gocni.BandWidth
	for _, a := range []struct {
		name        string
		rate, burst *uint64
	}{{AnnotationIngress, &bw.IngressRate, &bw.IngressBurst}, {AnnotationEgress, &bw.EgressRate, &bw.EgressBurst}} {
		v, ok := annotations[a.name]
		if !ok {
			continue
		}
		bits, err := quantity(v)
		if err == nil && (bits < 1e3 || bits > 1e15) {
			err = fmt.Errorf("%s is not between 1k and 1P", v)
		}
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %v: %w", a.name, err, errdefs.ErrInvalidArgument)
		}
		*a.rate, *a.burst = uint64(math.Ceil(bits)), math.MaxUint32
	}
	if bw == (gocni.BandWidth{}) {
		return nil, nil
	}
	return &bw, nil
}

// quantity reads a number as Kubernetes writes it: 10M, 1.5Gi, 1e6, 500m.
func quantity(s string) (float64, error) {
	units := map[string]float64{"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
		"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60}
	number := strings.TrimRight(s, "mkMGTPEi")
	unit, ok := units[s[len(number):]]
	if !ok || strings.Trim(number, "0123456789.eE+-") != "" {
		return 0, fmt.Errorf("%q is no quantity", s)
	}
	v, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is no quantity", s)
	}
	return v * unit, nil
}

// resultOf puts the networks' answers together.
func resultOf(in *intent, answers []types.Result, pref string) (Result, error) {
	all := gocni.Result{Interfaces: map[string]*gocni.Config{defaultInterface: {}}}
	for i, a := range answers {
		r, err := types100.NewResultFromResult(a)
		if err != nil {
			return Result{}, fmt.Errorf("%s: answer for %s: %w", in, in.Networks[i].IfName, err)
		}
		for _, f := range r.Interfaces {
			all.Interfaces[f.Name] = &gocni.Config{Mac: f.Mac, Sandbox: f.Sandbox, SocketPath: f.SocketPath, PciID: f.PciID}
		}
		for _, ip := range r.IPs {
			name := defaultInterface
			if n := ip.Interface; n != nil {
				if *n < 0 || *n >= len(r.Interfaces) {
					return Result{}, fmt.Errorf("%s: answer for %s: address %s is of interface %d, there are %d", in, in.Networks[i].IfName, ip.Address.IP, *n, len(r.Interfaces))
				}
				name = r.Interfaces[*n].Name
			}
			all.Interfaces[name].IPConfigs = append(all.Interfaces[name].IPConfigs, &gocni.IPConfig{IP: ip.Address.IP, Gateway: ip.Gateway})
		}
		all.DNS = append(all.DNS, r.DNS)
		all.Routes = append(all.Routes, r.Routes...)
	}
	ips := all.Interfaces[defaultInterface].IPConfigs
	if len(ips) == 0 {
		return Result{}, fmt.Errorf("%s: the plugins gave %s no address", in, defaultInterface)
	}
	raw, err := json.Marshal(&all)
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", in, err)
	}
	res := Result{Raw: raw}
	res.IP, res.AdditionalIPs = pick(ips, pref)
	return res, nil
}

// pick chooses the pod's first address: that of the preferred family which
// came first. The others keep their order.
func pick(ips []*gocni.IPConfig, pref string) (string, []string) {
	first := 0
	for i, ip := range ips {
		if v4 := ip.IP.To4() != nil; pref != "cni" && v4 != (pref == "ipv6") {
			first = i
			break
		}
	}
	var rest []string
	for i, ip := range ips {
		if i != first {
			rest = append(rest, ip.IP.String())
		}
	}
	return ips[first].IP.String(), rest
}
