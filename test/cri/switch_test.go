//go:build linux

package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/daemontest"
)

// A host is switched from containerd while pods run: they are managed from then
// on, and what they print goes on where containerd has stopped.
//
// contract: 7.3.29
// promise: P20
func TestSwitchFromContainerd(t *testing.T) {
	old, err := daemontest.Debian("containerd")
	if err != nil {
		t.Skip(err)
	}
	n, err := critest.NewNode(binDir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the daemons' log:\n%s", n.Log(8<<10))
		}
		n.Clear(t)
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	gantryd := n.Bin
	n.Bin, n.Env = old, []string{"PATH=" + filepath.Dir(old) + ":" + os.Getenv("PATH")}
	if err := n.Daemon.Configure(2, fmt.Sprintf(`
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = %q
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = %q
`, n.Pause, n.CNI, n.Dir+"/certs.d")); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	p := n.Pod(t, "")
	switches := n.Dir + "/switches"
	if err := os.Mkdir(switches, 0o755); err != nil {
		t.Fatal(err)
	}
	hold := filepath.Join(switches, "hold")
	c := p.Run(`i=0; while ! [ -e /s/end ]; do
i=$((i+1)); echo line $i; echo error $i >&2; sleep 0.01
if [ -e /s/hold ]; then i=$((i+1)); echo error $i >&2; echo line $i; echo held; echo held >&2; while [ -e /s/hold ]; do sleep 0.01; done; fi
done; exit 7`, func(c *runtime.ContainerConfig) {
		c.Mounts = []*runtime.Mount{{HostPath: switches, ContainerPath: "/s"}}
	})
	quiet := p.Run("sleep 1000")
	logHas(t, c, "line 3\n")
	// What containerd has read and not written when it ends is lost, so there is none.
	if err := os.WriteFile(hold, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	critest.Eventually(t, "the end of both streams", func() bool { return strings.Count(c.Log(), "held\n") == 2 })
	if err := n.Stop(); err != nil {
		t.Fatal(err)
	}
	before := strings.Count(c.Log(), "\n")
	if err := os.Remove(hold); err != nil { // while nobody reads
		t.Fatal(err)
	}

	n.Bin, n.Env = gantryd, nil
	if err := n.Configure(); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	listed(t, n)
	critest.Eventually(t, "more of the log", func() bool { return strings.Count(c.Log(), "\n") > before+200 })
	if out := c.Exec("echo from exec"); out != "from exec\n" {
		t.Errorf("%q", out)
	}
	if err := os.WriteFile(filepath.Join(switches, "end"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if st := c.Wait(); st.ExitCode != 7 {
		t.Errorf("%v", st)
	}
	for stream, word := range map[string]string{"stdout": "line", "stderr": "error"} {
		for i, line := range strings.Split(strings.TrimSpace(strings.Replace(text(records(t, c.LogFile()), stream), "held\n", "", 1)), "\n") {
			if line != fmt.Sprintf("%s %d", word, i+1) {
				t.Fatalf("%s: line %d is %q", stream, i+1, line)
			}
		}
	}
	isState(t, quiet, runtime.ContainerState_CONTAINER_RUNNING)
	p.Remove()
}
