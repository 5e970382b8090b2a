//go:build linux

package cri

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/gantryd/gantry/test/critest"
)

// TestValidation runs Kubernetes' own validation suite of the CRI against a
// node: $GANTRY_CRITEST is its program, which scripts/critest builds, and
// $GANTRY_CRITEST_ARGS are more arguments.
func TestValidation(t *testing.T) {
	program := os.Getenv("GANTRY_CRITEST")
	if program == "" {
		t.Skip("GANTRY_CRITEST is not set: scripts/critest builds and runs Kubernetes' validation suite, which takes minutes")
	}
	n := critest.Run(t, binDir, "")
	digest, err := n.Registry.PutValidation()
	if err != nil {
		t.Fatal(err)
	}
	mirror, tmp := n.Dir+"/certs.d/_default", n.Dir+"/tmp"
	for _, dir := range []string{mirror, tmp} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(mirror+"/hosts.toml", fmt.Appendf(nil, "[host.%q]\ncapabilities = ['pull', 'resolve']\n", n.Registry.URL), 0o644); err != nil {
		t.Fatal(err)
	}
	// The suite asks for host ports at 127.0.0.1, which need what is the plugin's default.
	if err := os.WriteFile(n.CNI+"/10-test.conflist", bytes.Replace(n.Conflist(), []byte(`"snat":false`), []byte(`"snat":true`), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, append([]string{"-runtime-endpoint", "unix://" + n.Address(), "-ginkgo.no-color"}, strings.Fields(os.Getenv("GANTRY_CRITEST_ARGS"))...)...)
	cmd.Dir, cmd.Env = tmp, append(os.Environ(), "TMPDIR="+tmp, "CRITEST_DIGEST="+digest.String())
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		t.Errorf("%s: %v", program, err)
	}
}
