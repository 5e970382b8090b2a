package shimclient

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/gantryd/gantry/core/task"
)

// ownShimUsed says that there is something to remove at the end.
var ownShimUsed bool

// ownShim builds the project's own shim, once.
var ownShim = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "gshim")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "build", "-o", filepath.Join(dir, "containerd-shim-runc-v2"), "github.com/gantryd/gantry/cmd/containerd-shim-runc-v2").CombinedOutput()
	if err != nil {
		os.Stderr.Write(out)
	}
	return dir, err
})

func ownHost(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ownShimUsed = true
	dir, err := ownShim()
	if err != nil {
		t.Fatal("build the shim: ", err)
	}
	return realHostWith(t, dir)
}

// contract: 1.3.33, 1.3.34, 1.3.35, 1.3.36, 1.3.37, 1.3.39, 1.3.40, 1.4.2, 1.6.8
func TestConformanceOwnShim(t *testing.T) { conformance(t, ownHost) }

// contract: 5.4.1, 5.4.4, 1.6.7
// promise: P11
func TestRestartOwnShim(t *testing.T) { restartKeepsRunning(t, ownHost(t)) }

// contract: 5.4.3, 13.18
func TestOwnShimKilled(t *testing.T) { shimKilled(t, ownHost(t)) }

// contract: 5.2.7, 1.4.7
func TestOwnShimEndpoint(t *testing.T) {
	h := ownHost(t)
	h.opt.SocketDir = filepath.Join(h.dir, "s")
	h.start()
	h.run("a", "/bin/sleep", "1000")
	h.m.mu.Lock()
	var addr endpoint
	for _, l := range h.m.links {
		addr = l.addr
	}
	h.m.mu.Unlock()
	if addr.Version != 3 || addr.Protocol != "ttrpc" || filepath.Dir(addr.Address) != "unix://"+h.opt.SocketDir && filepath.Dir(addr.Address) != "unix:"+h.opt.SocketDir {
		t.Errorf("our shim listens at %+v, want version 3 below %s", addr, h.opt.SocketDir)
	}
	if p := mustGet(t, h, "a"); p.Status != task.StatusRunning {
		t.Errorf("a is %+v", p)
	}
	// The address is the one that would be looked for after a crash.
	found := false
	k := key{"test", "a"}
	for _, g := range h.m.guesses(k, bundle{path: "/nonexistent"}) {
		found = found || g == addr.Address
	}
	if !found {
		t.Errorf("%s is not among the guesses %q", addr.Address, h.m.guesses(k, bundle{path: "/nonexistent"}))
	}
	h.end("a")
	h.nothing()
}
