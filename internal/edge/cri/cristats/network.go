package cristats

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/ownthread"
)

const (
	// defaultInterface is a pod's first interface.
	defaultInterface = "eth0"
	// maxInterfaces bounds what a pod that makes interfaces adds to an answer.
	maxInterfaces = 32
)

// iface is what went through a network interface.
type iface struct {
	name                                    string
	rxBytes, rxPackets, rxErrors, rxDropped uint64
	txBytes, txPackets, txErrors, txDropped uint64
}

func (i iface) usage() *runtime.NetworkInterfaceUsage {
	return &runtime.NetworkInterfaceUsage{Name: i.name, RxBytes: some(i.rxBytes).of(), RxErrors: some(i.rxErrors).of(), TxBytes: some(i.txBytes).of(), TxErrors: some(i.txErrors).of()}
}

// interfaces are those of a pod's network without the loopback, the default
// one first. A pod in the host's network has none.
func (s *Service) interfaces(p *cristate.Pod, running []*cristate.Container) []iface {
	netns := p.Meta().NetNSPath
	if netns == "" {
		return nil
	}
	var want, got unix.Stat_t
	if err := unix.Stat(netns, &want); err != nil {
		return nil
	}
	r, done := s.reader()
	defer done()
	pids := []uint32{p.Status().Pid}
	for _, c := range running {
		pids = append(pids, c.Status().Pid)
	}
	for _, pid := range pids {
		if pid == 0 {
			continue
		}
		dir := s.tree.proc + "/" + strconv.FormatUint(uint64(pid), 10)
		// A process may have left for a network of its own, or be another's by now.
		if err := unix.Stat(dir+"/ns/net", &got); err != nil || got.Ino != want.Ino || got.Dev != want.Dev {
			continue
		}
		if b, err := r.read(dir + "/net/dev"); err == nil {
			return parseInterfaces(string(b))
		}
	}
	text, err := s.tree.inside(netns)
	if err != nil {
		s.o.Log.Debug("network of pod is not measured", "pod", p.ID(), "error", err)
		return nil
	}
	return parseInterfaces(text)
}

// inside reads the interfaces of a network namespace in which no process is.
func (t tree) inside(netns string) (text string, err error) {
	err = ownthread.Inside(netns, unix.CLONE_NEWNET, func() error {
		b, err := (&reader{}).read(t.proc + "/thread-self/net/dev")
		text = string(b)
		return err
	})
	return text, err
}

// parseInterfaces reads /proc/net/dev.
func parseInterfaces(text string) []iface {
	var all []iface
	for line := range strings.Lines(text) {
		i := strings.LastIndexByte(line, ':') // an alias has one in its name
		if i < 0 || len(all) >= maxInterfaces {
			continue
		}
		name, f := strings.TrimSpace(line[:i]), strings.Fields(line[i+1:])
		if len(f) < 16 || name == "lo" {
			continue
		}
		n := func(i int) uint64 { return number([]byte(f[i])).n }
		v := iface{name: name, rxBytes: n(0), rxPackets: n(1), rxErrors: n(2), rxDropped: n(3), txBytes: n(8), txPackets: n(9), txErrors: n(10), txDropped: n(11)}
		if all = append(all, v); name == defaultInterface {
			all[0], all[len(all)-1] = all[len(all)-1], all[0]
		}
	}
	return all
}
