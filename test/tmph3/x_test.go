package tmph3

import (
	"os"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

var bin string

func TestMain(m *testing.M) { os.Exit(critest.Main(m, "../..", &bin)) }

func TestX(t *testing.T) {
	n := critest.Run(t, bin, "")
	os.Chmod(n.Dir, 0o711)
	for _, h := range []string{"runc","pauseless"} {
		for _, kind := range []string{"plain", "pid", "userns", "host", "sysctl"} {
			t.Run(h+kind, func(t *testing.T) {
				begin := time.Now()
				p := n.Pod(t, h, func(c *runtime.PodSandboxConfig) {
					o := c.Linux.SecurityContext.NamespaceOptions
					switch kind {
					case "pid":
						o.Pid = runtime.NamespaceMode_POD
					case "host":
						critest.HostNetwork(c)
						o.Ipc = runtime.NamespaceMode_NODE
					case "userns":
						one := []*runtime.IDMapping{{HostId: 200000, Length: 65536}}
						o.UsernsOptions = &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: one, Gids: one}
					case "sysctl":
						c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_forward": "1"}
					}
				})
				t.Log(h, kind, "run", time.Since(begin))
				t.Log(p.Status())
				out := p.Output("id -u; hostname; cat /etc/resolv.conf | head -2; ip addr | grep inet; df -k /dev/shm; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/ip_unprivileged_port_start; readlink /proc/self/ns/user; ps | head -5; cat /proc/self/uid_map")
				t.Log(out)
				begin = time.Now()
				p.Stop()
				t.Log("stop", time.Since(begin))
				begin = time.Now()
				p.Remove()
				t.Log("remove", time.Since(begin))
			})
		}
	}
}
