//go:build linux

package kubelet

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/gantryd/gantry/test/critest"
)

// What a kubelet does with pods of many kinds, with what it learns of them by
// asking and by events, and with statistics of cAdvisor and of the CRI.
func TestPods(t *testing.T) {
	for name, features := range map[string]map[string]bool{"plain": nil, "events and statistics of the CRI": {"EventedPLEG": true, "PodAndContainerStatsFromCRI": true}} {
		t.Run(name, func(t *testing.T) { testPods(t, newNode(t, features)) })
	}
}

func testPods(t *testing.T, n *node) {
	names := []string{"web", "hostnet", "crash", "oom", "job", "images", "chatty", "live", "imagevol", "userns"}
	n.put(names...)
	ready := []string{"web", "hostnet", "chatty", "imagevol", "userns"}
	for _, name := range ready {
		n.eventually("ready: "+name, func() bool { return n.pods()[name].ready() })
	}

	// The network, volumes and hooks of a pod.
	if r, err := http.Get("http://" + n.pods()["web"].Status.PodIP + ":8080/"); err != nil || r.StatusCode != http.StatusOK {
		t.Errorf("web: %v %v", r, err)
	} else {
		r.Body.Close()
	}
	for _, version := range []string{"v4.channel.k8s.io", "v5.channel.k8s.io"} {
		out, status := n.exec("web", "httpd", version, "", "/bin/sh", "-c", "cat /work/file /sub/x /work/ps; id -u; id -G")
		if out != "made by init\nsub\npoststart\n1000\n1000 2000 3000\n" || !strings.Contains(status, "Success") {
			t.Errorf("exec: %q, %s", out, status)
		}
		if _, status = n.exec("web", "httpd", version, "", "/bin/sh", "-c", "exit 5"); !strings.Contains(status, `"message":"5"`) {
			t.Errorf("exec: %s", status)
		}
	}
	if log := n.get("/containerLogs/default/web-node/httpd"); log != "started\n" {
		t.Errorf("log of httpd: %q", log)
	}

	// Ends of all kinds.
	n.eventually("crashes", func() bool {
		return n.c("web", "shell").Ready && n.c("crash", "crash").RestartCount >= 2 && n.c("crash", "fallback").RestartCount >= 2
	})
	for name, want := range map[string]string{"crash": "last words\n", "fallback": "from the log\n"} {
		if last := n.c("crash", name).LastState["terminated"]; last.Message != want || last.Reason != "Error" {
			t.Errorf("%s: %+v", name, last)
		}
	}
	n.eventually("out of memory", func() bool { return n.c("oom", "oom").State["terminated"].Reason == "OOMKilled" })
	n.eventually("a job", func() bool {
		return n.c("job", "ok").State["terminated"].Reason == "Completed" && n.c("job", "fail").State["terminated"].ExitCode == 9
	})
	n.eventually("a failed liveness", func() bool { return n.c("live", "hangs").RestartCount > 0 })
	for name, reason := range map[string]string{"absent": "^(ErrImagePull|ImagePullBackOff)$", "never": "^ErrImageNeverPull$", "invalid": "^InvalidImageName$", "nocommand": "^(RunContainerError|CrashLoopBackOff)$"} {
		n.eventually("image "+name, func() bool {
			return regexp.MustCompile(reason).MatchString(n.c("images", name).State["waiting"].Reason)
		})
	}
	n.eventually("rotated logs", func() bool {
		logs, _ := filepath.Glob(n.dir + "/logs/default_chatty-node_*/chatty/*")
		return len(logs) == 3
	})

	// Statistics.
	n.eventually("statistics", func() bool {
		summary, cadvisor, resource := n.get("/stats/summary"), n.get("/metrics/cadvisor"), n.get("/metrics/resource")
		for _, name := range ready {
			for text, pattern := range map[string]string{summary: `"name": "%s-node"`, cadvisor: `container_memory_working_set_bytes\{container="[a-z]+".*pod="%s-node"`, resource: `container_cpu_usage_seconds_total.*pod="%s-node"`} {
				if !regexp.MustCompile(fmt.Sprintf(pattern, name)).MatchString(text) {
					return false
				}
			}
		}
		return regexp.MustCompile(`container_network_receive_bytes_total\{.*pod="web-node"`).MatchString(cadvisor)
	})

	// Ends of the daemon and of the kubelet, which containers do not notice.
	before := n.ids(ready)
	n.Kill()
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	n.stopKubelet()
	n.startKubelet()
	for _, name := range ready {
		n.eventually("ready again: "+name, func() bool { return n.pods()[name].ready() })
	}
	if after := n.ids(ready); after != before {
		t.Errorf("containers before:\n%s\nafter:\n%s", before, after)
	}

	// Without their files, the pods end.
	for _, name := range names {
		if err := os.Remove(n.dir + "/pods/" + name + ".yaml"); err != nil {
			t.Fatal(err)
		}
	}
	n.eventually("no pods", func() bool {
		left, _ := filepath.Glob(n.dir + "/root/pods/*")
		return len(n.pods()) == 0 && len(left) == 0
	})
	if b, _ := os.ReadFile(n.dir + "/host/prestop"); string(b) != "prestop\n" {
		t.Errorf("prestop: %q", b)
	}
	log, err := os.ReadFile(n.log.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range regexp.MustCompile(`(?m)^E.*rpc error: code = (Unknown|Internal|Unimplemented|ResourceExhausted).*`).FindAllString(string(log), 5) {
		t.Error(line)
	}
}

// eventually waits some times longer than is usual for a test.
func (n *node) eventually(what string, cond func() bool) {
	n.t.Helper()
	critest.Eventually(n.t, what, cond)
}

// ids are the containers of pods and how often they were restarted.
func (n *node) ids(pods []string) string {
	var out strings.Builder
	for _, name := range pods {
		for _, c := range n.pods()[name].Status.ContainerStatuses {
			fmt.Fprintln(&out, name, c.Name, c.ContainerID, c.RestartCount)
		}
	}
	return out.String()
}

// ready tells whether all of a pod's containers are.
func (p pod) ready() bool {
	for _, c := range p.Status.ContainerStatuses {
		if !c.Ready {
			return false
		}
	}
	return len(p.Status.ContainerStatuses) > 0
}
