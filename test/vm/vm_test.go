//go:build linux

// Package vm runs the suites that need another kernel than the host's in a
// virtual machine: cgroup v2 alone, AppArmor, id-mapped mounts.
package vm

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// chosen are tests of ../cri that show what the host's kernel may not: all of
// them have to pass, a skip is a failure. The handlers are runc, pauseless and crun.
var chosen = []string{"TestHello", "TestAppArmorConfines", "TestUnifiedLimits", "TestCgroupWritable", "TestExecGroups", "TestOOMKilled", "TestUserNamespace",
	"TestResources", "TestPodResources", "TestOOMScore", "TestStats", "TestPodMetrics", "TestCensus"}

// perBoot is how many tests a guest runs when all are run: one that hangs takes
// no more along.
const perBoot = 20

// The conformance suite of Kubernetes' interface in a guest with Debian's
// kernel. GANTRY_VM=1 runs what differs there, in a quarter of an hour of an idle
// machine; GANTRY_VM=all runs the whole suite in several guests one after
// another, GANTRY_VM=TestX,TestY those tests.
//
// contract: 7.3.3, 7.3.5, 7.3.13, 7.3.14, 7.1.18, 7.1.20, 10.6, 10.8
// promise: P17
func TestGuest(t *testing.T) {
	which := os.Getenv("GANTRY_VM")
	if which == "" {
		t.Skip("a guest takes minutes: make vm, or GANTRY_VM=1")
	}
	if out, err := exec.Command("./guest", "check").CombinedOutput(); err != nil {
		t.Skipf("no guest can be run: %s", out)
	}
	bin := t.TempDir()
	command := func(dir string, args ...string) string {
		c := exec.Command(args[0], args[1:]...)
		c.Dir = dir
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", c, err, out)
		}
		return string(out)
	}
	command("../..", "go", "build", "-tags", "seccomp nri_no_wasm", "-o", bin+"/", "./cmd/gantryd", "./cmd/containerd-shim-runc-v2")
	command("../..", "go", "test", "-c", "-tags", "seccomp nri_no_wasm", "-o", bin+"/cri.test", "./test/cri")
	switch which {
	case "1":
		boot(t, bin, chosen, false)
	case "all":
		list := exec.Command(bin+"/cri.test", "-test.list", "^Test")
		list.Env = append(os.Environ(), "GANTRY_BIN="+bin)
		out, err := list.Output()
		if err != nil {
			t.Fatalf("%v: %v", list, err)
		}
		for names := range slices.Chunk(strings.Fields(string(out)), perBoot) {
			t.Run(names[0]+" to "+names[len(names)-1], func(t *testing.T) { boot(t, bin, names, true) })
		}
	default:
		boot(t, bin, strings.Split(which, ","), false)
	}
}

// boot runs tests of ../cri, whose programs are in bin, in a guest of their own.
func boot(t *testing.T, bin string, names []string, maySkip bool) {
	within := time.Duration(10+2*len(names)) * time.Minute // most take less than a minute
	if deadline, ok := t.Deadline(); ok {
		within = min(within, time.Until(deadline)-30*time.Second)
	}
	dir := t.TempDir()
	if out, err := exec.Command("cp", "-r", "--reflink=auto", bin, dir+"/bin").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// The suite ends by itself, so that its end is shown; what runs at the same
	// time would only be slower, up to the daemon's own deadlines. Ten kills take
	// as long here as a hundred do on the host.
	job := fmt.Sprintf("export GANTRY_BIN=/data/bin GANTRY_SLOW=10 GANTRY_KILLS=10\ncd /data/t && /data/bin/cri.test -test.v -test.parallel 1 -test.timeout %v -test.run '^(%s)$' 2>&1 | tee /data/out/log\nexit ${PIPESTATUS[0]}\n",
		within-time.Minute, strings.Join(names, "|"))
	if err := os.WriteFile(dir+"/job", []byte(job), 0o755); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), within+20*time.Second)
	defer cancel()
	begin := time.Now()
	guest := exec.CommandContext(ctx, "./guest", "run", dir, fmt.Sprint(int(within.Seconds())))
	guest.Cancel = func() error { return guest.Process.Signal(os.Interrupt) }
	guest.WaitDelay = 10 * time.Second
	console, err := os.Create(filepath.Join(dir, "console"))
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	guest.Stdout, guest.Stderr = console, console
	runErr := guest.Run()
	log, err := os.ReadFile(dir + "/out/log")
	if err != nil || len(log) == 0 {
		log, _ = os.ReadFile(console.Name()) // the guest has not come to its end
	}
	t.Logf("the guest ran for %v", time.Since(begin).Round(time.Second))

	results := parse(string(log))
	for _, name := range names {
		result, ok := results[name]
		if !ok {
			t.Errorf("%s was not run to its end", name)
			continue
		}
		t.Run(name, func(t *testing.T) {
			switch {
			case result == "FAIL", result == "SKIP" && !maySkip:
				t.Error(result)
			case result == "SKIP":
				t.Skip("in the guest too")
			}
		})
	}
	if runErr != nil || t.Failed() {
		t.Errorf("the guest: %v\n%s", runErr, tail(string(log), 60<<10))
	}
}

var resultLine = regexp.MustCompile(`^--- (PASS|FAIL|SKIP): (\S+) \(`)

// parse reads the results of tests, those of subtests not among them.
func parse(log string) map[string]string {
	out := map[string]string{}
	lines := bufio.NewScanner(strings.NewReader(log))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if m := resultLine.FindStringSubmatch(strings.TrimRight(lines.Text(), "\r")); m != nil {
			out[m[2]] = m[1]
		}
	}
	return out
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// A guest that is not there is not taken for one that has passed.
func TestParse(t *testing.T) {
	got := parse("=== RUN   TestA\n    x_test.go:1: no\n--- FAIL: TestA (0.1s)\n    --- PASS: TestA/b (0.1s)\r\n--- PASS: TestB (2.00s)\r\n--- SKIP: TestC (0.00s)\n")
	if len(got) != 3 || got["TestA"] != "FAIL" || got["TestB"] != "PASS" || got["TestC"] != "SKIP" {
		t.Errorf("%v", got)
	}
}
