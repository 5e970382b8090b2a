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
	c := p.Run(`i=0; while ! [ -e /end ]; do i=$((i+1)); echo line $i; echo error $i >&2; sleep 0.01; done; exit 7`)
	quiet := p.Run("read line; exit 8", func(c *runtime.ContainerConfig) { c.Stdin = true })
	logHas(t, c, "line 3\n")
	if err := n.Stop(); err != nil {
		t.Fatal(err)
	}
	before := len(c.Log())

	n.Bin, n.Env = gantryd, nil
	if err := n.Configure(); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	listed(t, n)
	critest.Eventually(t, "more of the log", func() bool { return strings.Count(c.Log(), "\n") > strings.Count(c.Log()[:before], "\n")+200 })
	if out := c.Exec("touch /end; echo from exec"); out != "from exec\n" {
		t.Errorf("%q", out)
	}
	if st := c.Wait(); st.ExitCode != 7 {
		t.Errorf("%v", st)
	}
	for stream, word := range map[string]string{"stdout": "line", "stderr": "error"} {
		for i, line := range strings.Split(strings.TrimSpace(text(records(t, c.LogFile()), stream)), "\n") {
			if line != fmt.Sprintf("%s %d", word, i+1) {
				t.Fatalf("%s: line %d is %q", stream, i+1, line)
			}
		}
	}
	isState(t, quiet, runtime.ContainerState_CONTAINER_RUNNING)
	p.Remove()
}
