//go:build linux

package cri

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/daemontest"
)

// record is a line of a log.
type record struct {
	at           time.Time
	stream, text string
	full         bool
}

var recordForm = regexp.MustCompile(`^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)) (stdout|stderr) (P|F) ((?s).*)$`)

// records reads logs, one after the other, all of whose lines must be records.
func records(t *testing.T, files ...string) (all []record) {
	t.Helper()
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if len(data) > 0 && !bytes.HasSuffix(data, []byte("\n")) {
			t.Errorf("%s ends within a record", f)
		}
		for line := range strings.Lines(string(data)) {
			m := recordForm.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
			if m == nil {
				t.Fatalf("%s: no record: %.200q", f, line)
			}
			at, err := time.Parse(time.RFC3339Nano, m[1])
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, record{at, m[2], m[4], m[3] == "F"})
		}
	}
	return all
}

// text is what was printed to a stream.
func text(all []record, stream string) string {
	var b strings.Builder
	for _, r := range all {
		if r.stream == stream {
			b.WriteString(r.text)
			if r.full {
				b.WriteByte('\n')
			}
		}
	}
	return b.String()
}

// counted checks that a log has the numbers from 1 to n, or if n is 0 to some
// number, each as a line of its own, and returns the last.
func counted(t *testing.T, n int, files ...string) int {
	t.Helper()
	last := 0
	for line := range strings.Lines(text(records(t, files...), "stdout")) {
		line = strings.TrimSpace(line)
		if line != strconv.Itoa(last+1) {
			t.Fatalf("%d is followed by %.100q", last, line)
		}
		last++
	}
	if last != n && n != 0 {
		t.Errorf("the last of %d numbers is %d", n, last)
	}
	return last
}

// Each line is a record of its own; a long one is several, of 16 KiB at most. A
// part may be shorter: nothing waits for the end of its line.
//
// contract: 13.29, 7.3.20, 5.3.5
func TestLogFormat(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		begin := time.Now()
		const long = 2*16384 + 100
		script := fmt.Sprintf(`echo one; echo; head -c %d /dev/zero | tr '\0' x; echo; echo error >&2; head -c 16384 /dev/zero | tr '\0' y; echo; printf 'no end'`, long)
		c := p.Run(script)
		if st := c.Wait(); st.ExitCode != 0 {
			t.Fatal(st)
		}
		all := records(t, c.LogFile())
		parts := 0
		for i, r := range all {
			if r.at.Before(begin.Add(-time.Second)) || r.at.After(time.Now().Add(time.Second)) || i > 0 && r.stream == all[i-1].stream && r.at.Before(all[i-1].at) {
				t.Errorf("record %d of %v", i, r.at)
			}
			if n := len(r.text); n > 16384 {
				t.Errorf("%d bytes", n)
			}
			if strings.HasPrefix(r.text, "x") {
				parts++
			}
		}
		if parts < 3 {
			t.Errorf("the long line has %d parts", parts)
		}
		if got, want := text(all, "stdout"), "one\n\n"+strings.Repeat("x", long)+"\n"+strings.Repeat("y", 16384)+"\nno end"; strings.TrimSuffix(got, "\n") != want {
			t.Errorf("%d bytes, want %d", len(got), len(want))
		}
		if got := text(all, "stderr"); got != "error\n" {
			t.Errorf("%q", got)
		}
	})
}

// contract: 7.3.20, 5.3.5
func TestLogOfTerminal(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run(`test -t 0 && test -t 1 && test -t 2 && echo terminal; echo error >&2`, func(c *runtime.ContainerConfig) { c.Tty = true })
		c.Wait()
		all := records(t, c.LogFile())
		if out := text(all, "stdout"); out != "terminal\r\nerror\r\n" {
			t.Errorf("%q", out)
		}
		if out := text(all, "stderr"); out != "" {
			t.Errorf("stderr has %q", out)
		}
	})
}

// contract: 7.3.20
func TestLogPath(t *testing.T) {
	n := node(t)
	p := n.Pod(t, "runc")
	path := func(s string) func(*runtime.ContainerConfig) {
		return func(c *runtime.ContainerConfig) { c.LogPath = s }
	}
	if c := p.Run("echo hello", path("deep/er/c.log")); c.Wait().LogPath != filepath.Join(p.Config.LogDirectory, "deep/er/c.log") || c.Log() != "hello\n" {
		t.Errorf("%q in %s", c.Log(), c.Status().LogPath)
	}
	silent := p.Run("echo hello", path(""))
	if st := silent.Wait(); st.ExitCode != 0 || st.LogPath != "" {
		t.Errorf("%v", st)
	}
	for _, escape := range []string{"../x.log", "a/../../x.log", "/../x.log", ".."} {
		refused(t, p, escape, path(escape), codes.InvalidArgument)
	}
	// A link that a pod could have put there leads nowhere.
	outside := t.TempDir()
	if err := os.Symlink(outside, p.Config.LogDirectory+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside+"/file", p.Config.LogDirectory+"/file.log"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link/c.log", "file.log"} {
		c, err := p.TryCreate("echo hello", path(name))
		if err == nil {
			err = startOf(c)
		}
		if err == nil {
			t.Errorf("%s: followed", name)
		}
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) != 0 {
		t.Errorf("outside there is %v, %v", left, err)
	}

	// A pod without a directory has containers without logs.
	bare := n.Pod(t, "pauseless", func(c *runtime.PodSandboxConfig) { c.LogDirectory = "" })
	if st := bare.Run("echo hello").Wait(); st.ExitCode != 0 || st.LogPath != "" {
		t.Errorf("%v", st)
	}
}

// The end of a container is told when its log has all that it printed, however
// short its life was and however much that is.
//
// contract: 7.3.20
// promise: P20
func TestLogComplete(t *testing.T) {
	n := node(t)
	n.Pull(t, n.Busybox)
	var all sync.WaitGroup
	p := n.Pod(t, "pauseless", critest.HostNetwork)
	for range 4 {
		var some []*critest.Container
		for range 8 {
			some = append(some, p.Create(`printf 'out %s\nlast words' $HOSTNAME; printf 'error' >&2`))
		}
		for _, c := range some {
			all.Go(func() {
				if err := startOf(c); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		for _, c := range some {
			c.Wait()
			rs := records(t, c.LogFile())
			if out, errs := text(rs, "stdout"), text(rs, "stderr"); !strings.HasSuffix(strings.TrimSuffix(out, "\n"), "\nlast words") || strings.TrimSuffix(errs, "\n") != "error" {
				t.Errorf("%q, %q", out, errs)
			}
		}
	}
	const lines = 40000
	c := p.Run(fmt.Sprintf("seq 1 %d & seq 1 %[1]d | sed 's/$/ %s/' >&2; wait", lines, strings.Repeat("x", 500)))
	c.Wait()
	counted(t, lines, c.LogFile())
	if got := len(text(records(t, c.LogFile()), "stderr")); got != lines*(len(" ")+500+len("\n"))+9+2*90+3*900+4*9000+5*(lines-9999) {
		t.Errorf("%d bytes of errors", got)
	}
}

// rotate does what a kubelet does, and returns the file that was renamed.
func rotate(t *testing.T, c *critest.Container, n int) string {
	t.Helper()
	old := fmt.Sprintf("%s.%03d", c.LogFile(), n)
	if err := os.Rename(c.LogFile(), old); err != nil {
		t.Fatal(err)
	}
	if _, err := c.RT.ReopenContainerLog(critest.Context(t), &runtime.ReopenContainerLogRequest{ContainerId: c.ID}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.LogFile()); err != nil {
		t.Errorf("after the call: %v", err)
	}
	return old
}

// chatter prints numbers, one a line, until /end exists, and then the last.
const chatter = `i=0; while [ $i -lt 1000 ] || ! [ -e /end ]; do i=$((i+1)); echo $i; done; echo $((i+1))`

// finish makes /end. The container may end before the command does.
func finish(t *testing.T, c *critest.Container) {
	t.Helper()
	if _, err := execSync(c, 30, "touch /end"); err != nil {
		t.Error(err)
	}
}

// rotated checks that rotations in the middle of heavy output lose and repeat
// nothing.
func rotated(t *testing.T, c *critest.Container) {
	t.Helper()
	var files []string
	for n := range 20 {
		critest.Eventually(t, "output", func() bool {
			info, err := os.Stat(c.LogFile())
			return err == nil && info.Size() > 4096
		})
		files = append(files, rotate(t, c, n))
	}
	finish(t, c)
	if st := c.Wait(); st.ExitCode != 0 {
		t.Error(st)
	}
	_, err := c.RT.ReopenContainerLog(critest.Context(t), &runtime.ReopenContainerLogRequest{ContainerId: c.ID})
	wantCode(t, "reopen the log of one that has ended", err, codes.FailedPrecondition)
	files = append(files, c.LogFile())
	last := counted(t, 0, files...)
	for i, f := range files {
		if info, err := os.Stat(f); err != nil || info.Size() == 0 {
			t.Errorf("file %d of %d, with %d numbers in all: %v %v", i, len(files), last, info, err)
		}
	}
}

// contract: 7.1.17, 7.3.17, 13.29
// promise: P20
func TestReopenLog(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) { rotated(t, p.Run(chatter)) })
}

// The daemon may be killed: containers go on to print, and to end, and nothing
// of it is lost.
//
// contract: 7.3.20, 7.3.30, 7.3.17
// promise: P20
func TestLogsAfterKill(t *testing.T) {
	n := critest.Run(t, binDir, "")
	p := n.Pod(t, "runc")
	talking, ending, quiet := p.Run(chatter), p.Run(`echo 1; while ! [ -e /end ]; do sleep 0.02; done; echo 2; printf 3; exit 5`), p.Run("sleep 1000", func(c *runtime.ContainerConfig) { c.Stdin = true })
	logHas(t, ending, "1\n")
	pid := hostPid(t, ending)
	for range 3 {
		n.Kill()
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/end", pid), nil, 0o600); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		critest.Eventually(t, "last words", func() bool { return strings.HasSuffix(strings.TrimSpace(ending.Log()), "3") })
		size := func() int64 {
			info, err := os.Stat(talking.LogFile())
			if err != nil {
				t.Fatal(err)
			}
			return info.Size()
		}
		before := size()
		critest.Eventually(t, "output without a daemon", func() bool { return size() > before })
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		listed(t, n)
	}
	if st := ending.Wait(); st.ExitCode != 5 || st.Reason != "Error" {
		t.Errorf("%v", st)
	}
	counted(t, 3, ending.LogFile())
	isState(t, quiet, runtime.ContainerState_CONTAINER_RUNNING)
	rotated(t, talking)
}

// foreign is a handler whose shim is Debian's, which writes no logs.
func foreign(t *testing.T) (extra string) {
	shim, err := daemontest.Debian("containerd-shim-runc-v2")
	if err != nil {
		t.Skip(err)
	}
	return fmt.Sprintf(`
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.foreign]
    runtime_type = 'io.containerd.runc.v2'
    runtime_path = %q
`, shim)
}

// The logs of a shim that writes none itself go through the daemon. When that
// is killed, the shim waits with what it has, and the next goes on.
//
// contract: 7.3.1, 7.3.20, 7.1.17, 5.3.5, 5.1.2
// promise: P20
func TestForeignShim(t *testing.T) {
	n := critest.Run(t, binDir, foreign(t))
	p := n.Pod(t, "foreign")
	t.Run("life", func(t *testing.T) {
		if out := p.Output("echo hello"); out != "hello\n" {
			t.Errorf("%q", out)
		}
		for range 5 {
			c := p.Run(`printf 'last words'; exit 3`)
			if st := c.Wait(); st.ExitCode != 3 || strings.TrimSuffix(c.Log(), "\n") != "last words" {
				t.Errorf("%v: %q", st, c.Log())
			}
		}
		long := p.Run(`head -c 40000 /dev/zero | tr '\0' x; echo error >&2`)
		long.Wait()
		if out := text(records(t, long.LogFile()), "stdout"); strings.TrimSuffix(out, "\n") != strings.Repeat("x", 40000) {
			t.Errorf("%d bytes", len(out))
		}
		c := p.Run("sleep 1000")
		if out := c.Exec("echo from exec"); out != "from exec\n" {
			t.Errorf("%q", out)
		}
		c.Stop(0)
	})
	t.Run("rotation", func(t *testing.T) { rotated(t, p.Run(chatter)) })
	t.Run("kill", func(t *testing.T) {
		c := p.Run(`i=0; while [ $i -lt 100 ] || ! [ -e /end ]; do i=$((i+1)); echo $i; sleep 0.01; done; echo $((i+1)); exit 9`)
		for range 3 {
			logHas(t, c, "1\n")
			n.Kill()
			if err := n.Start(); err != nil {
				t.Fatal(err)
			}
			listed(t, n)
			before := len(c.Log())
			critest.Eventually(t, "output", func() bool { return len(c.Log()) > before })
		}
		finish(t, c)
		if st := c.Wait(); st.ExitCode != 9 {
			t.Errorf("%v", st)
		}
		counted(t, 0, c.LogFile())
	})
}
