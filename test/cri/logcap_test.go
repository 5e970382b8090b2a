//go:build linux

package cri

import (
	"os"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// A node whose operator does not trust rotation to others bounds what a
// container can write, by size and by rate.
// promise: P21
func TestLogBounds(t *testing.T) {
	n := critest.Run(t, binDir, "max_container_log_size = 65536\nmax_container_log_files = 2\nmax_container_log_rate = 400000\n")
	p := n.Pod(t, "pauseless", critest.HostNetwork)
	c := p.Run("dd if=/dev/zero bs=1000 count=3000 2>/dev/null | tr '\\0' 'x' | fold -w 99; echo end")
	if st := c.Wait(); st.State != runtime.ContainerState_CONTAINER_EXITED || st.ExitCode != 0 {
		t.Fatalf("%v", st)
	}
	var total int64
	for _, name := range []string{c.LogFile(), c.LogFile() + ".1"} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		total += info.Size()
	}
	if total > 2*65536+16384 {
		t.Errorf("%d bytes are kept", total)
	}
	if _, err := os.Stat(c.LogFile() + ".2"); err == nil {
		t.Error("three files are kept")
	}
	kept := c.Log()
	if older, err := os.ReadFile(c.LogFile() + ".1"); err == nil {
		kept += string(older)
	}
	if !strings.Contains(kept, "bytes dropped") {
		t.Errorf("nothing says that output was dropped: %.300q", kept)
	}
}
