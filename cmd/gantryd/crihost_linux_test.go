package main

import (
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"

	"github.com/gantryd/gantry/client"
)

// An OOM score that is said to be possible is, also for a root that is one of
// its user namespace only.
//
// contract: 7.3.13, 10.9
func TestOOMScore(t *testing.T) {
	const inside = "GANTRYD_TEST_OOM"
	if os.Getenv(inside) == "" {
		c := exec.Command("/proc/self/exe", "-test.run=^TestOOMScore$", "-test.v")
		c.Env = append(os.Environ(), inside+"=1")
		ids := []syscall.SysProcIDMap{{Size: 1}}
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
		if err := c.Start(); err != nil {
			t.Logf("no user namespace can be made: %v", err)
		} else if err := c.Wait(); err != nil {
			t.Errorf("in a user namespace: %v", err)
		}
	}
	facts, err := client.HostFacts(false)
	if err != nil {
		t.Fatal(err)
	}
	score, lowerable := oomScore(facts.UserNS)
	if score == -1000 {
		t.Skip("there is no lower score")
	}
	err = os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(score-1)), 0)
	if lowerable && err != nil {
		t.Errorf("%d can be lowered: %v", score, err)
	}
	if err == nil {
		_ = os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(score)), 0)
	}
}
