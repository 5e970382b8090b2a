package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

var rounds = flag.Int("cni.rounds", 40, "rounds of the fault test; promise P22 asks for 1000")

const (
	realPlugins = "/usr/lib/cni"
	insideEnv   = "GANTRY_CNI_TEST" // this process has its own network and mounts
	crashEnv    = "GANTRY_CNI_CRASH"
)

// TestMain runs the tests as a child that has a network and mounts of its own:
// plugins make bridges, addresses and packet filters where they are started.
func TestMain(m *testing.M) {
	if os.Getenv(insideEnv) == "" && os.Geteuid() == 0 {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), insideEnv+"=1")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
		err := cmd.Run()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			os.Exit(exit.ExitCode())
		} else if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Geteuid() == 0 {
		if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), loopback("/proc/self/ns/net")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if spec := os.Getenv(crashEnv); spec != "" {
		crash(spec)
	}
	os.Exit(m.Run())
}

// script is a plugin that notes each call in NAME.log, and fails or hangs when
// NAME.COMMAND says so.
const script = `#!/bin/sh
conf=$(cat)
printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_IFNAME" "$CNI_NETNS" "$CNI_ARGS" "$conf" >>"$0.log"
mode=$(cat "$0.$CNI_COMMAND" 2>/dev/null)
case "$mode" in
fail) echo '{"cniVersion":"1.0.0","code":99,"msg":"told to fail","details":"by a test"}'; exit 1 ;;
absent) echo '{"cniVersion":"1.0.0","code":99,"msg":"link veth7 not found"}'; exit 1 ;;
missing) echo 'iptables: command not found' >&2; exit 1 ;;
hang) trap '' TERM; sleep 1000 & setsid sleep 1000 & wait ;;
esac
[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.9.9/24"},{"address":"fd09::9/64"}]}'
exit 0
`

// lab is a place for one test: plugins, configuration, and a Network.
type lab struct {
	*testing.T
	root, bin, conf string
	o               Options
	n               *Network
	metrics         *prometheus.Registry // of n
	stop            func()
}

func newLab(t *testing.T, change func(*Options)) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("networks are made by root")
	}
	if _, err := os.Stat(realPlugins + "/bridge"); err != nil {
		t.Skipf("no plugins: %v (scripts/deps test)", err)
	}
	root := t.TempDir()
	l := &lab{T: t, root: root, bin: root + "/bin", conf: root + "/etc/cni/net.d"}
	l.must(os.MkdirAll(l.bin, 0o755), os.MkdirAll(l.conf, 0o755), os.MkdirAll(root+"/ns", 0o755))
	l.o = Options{Dir: root + "/intents", CacheDir: root + "/cache", Retry: 20 * time.Millisecond, Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
		Config: Config{BinDirs: []string{l.bin, realPlugins}, ConfDir: l.conf, MaxConfNum: 1}}
	if change != nil {
		change(&l.o)
	}
	t.Cleanup(func() {
		if l.stop != nil {
			l.stop()
		}
		l.empty()
	})
	return l
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	if testing.Verbose() {
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

func (l *lab) must(errs ...error) {
	l.Helper()
	if err := errors.Join(errs...); err != nil {
		l.Fatal(err)
	}
}

// open makes the Network anew, as a restart does, and runs it.
func (l *lab) open() {
	l.Helper()
	if l.stop != nil {
		l.stop()
	}
	l.metrics = prometheus.NewRegistry()
	l.o.Metrics = l.metrics
	n, err := Open(l.o)
	l.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	l.n = n
	l.stop = func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				l.Error(err)
			}
		case <-time.After(20 * time.Second):
			l.Error("Run does not end")
		}
		l.stop = nil
	}
}

// plugin installs the script under some names.
func (l *lab) plugin(names ...string) {
	l.Helper()
	for _, name := range names {
		l.must(os.WriteFile(filepath.Join(l.bin, name), []byte(script), 0o755))
	}
}

// mode says what a script does at a command: "fail", "hang", ... or "".
func (l *lab) mode(name, command, mode string) {
	l.Helper()
	l.must(os.WriteFile(filepath.Join(l.bin, name+"."+command), []byte(mode), 0o644))
}

// call is one line of a script's log.
type call struct {
	command, id, ifName, netns, args string
	conf                             map[string]any
}

func (l *lab) calls(name string) []call {
	l.Helper()
	data, err := os.ReadFile(filepath.Join(l.bin, name+".log"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	l.must(err)
	var all []call
	for line := range strings.Lines(string(data)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), "\t", 6)
		c := call{command: f[0], id: f[1], ifName: f[2], netns: f[3], args: f[4]}
		l.must(json.Unmarshal([]byte(f[5]), &c.conf))
		all = append(all, c)
	}
	return all
}

// list writes a configuration. Plugins that are no JSON are names.
func (l *lab) list(dir, file, name string, plugins ...string) {
	l.Helper()
	l.must(os.MkdirAll(dir, 0o755))
	for i, p := range plugins {
		if !strings.HasPrefix(p, "{") {
			plugins[i] = fmt.Sprintf(`{"type":%q}`, p)
		}
	}
	l.must(os.WriteFile(filepath.Join(dir, file), fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":%q,"plugins":[%s]}`, name, strings.Join(plugins, ",")), 0o644))
}

// ipam is the configuration of host-local's store in this lab.
func (l *lab) ipam(subnets ...string) string {
	var ranges []string
	for _, s := range subnets {
		ranges = append(ranges, fmt.Sprintf(`[{"subnet":%q}]`, s))
	}
	return fmt.Sprintf(`"ipam":{"type":"host-local","dataDir":%q,"ranges":[%s]}`, l.root+"/ipam", strings.Join(ranges, ","))
}

// reserved lists the addresses that host-local holds.
func (l *lab) reserved() []string {
	var held []string
	files, _ := filepath.Glob(l.root + "/ipam/*/*")
	for _, f := range files {
		if name := filepath.Base(f); name != "lock" && !strings.HasPrefix(name, "last_reserved_ip") {
			held = append(held, name)
		}
	}
	return held
}

// pod makes a pod with a namespace.
func (l *lab) pod(id string) Pod {
	l.Helper()
	path := filepath.Join(l.root, "ns", id)
	l.must(nspin.Make(nspin.Spec{Paths: map[nspin.Kind]string{nspin.Net: path}}))
	l.Cleanup(func() {
		if err := RemoveNetNS(path); err != nil {
			l.Error(err)
		}
	})
	return Pod{ID: id, Name: "name-" + id, Namespace: "test", UID: "uid-" + id, NetNS: path}
}

func (l *lab) setup(p Pod) Result {
	l.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	res, err := l.n.Setup(ctx, p)
	l.must(err)
	return res
}

func (l *lab) teardown(id string) {
	l.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	l.must(l.n.Teardown(ctx, id))
}

// empty checks that nothing is left of any pod.
func (l *lab) empty() {
	l.Helper()
	if held := l.reserved(); len(held) > 0 {
		l.Errorf("addresses are still reserved: %v", held)
	}
	if files, _ := filepath.Glob(l.o.Dir + "/*"); len(files) > 0 {
		l.Errorf("intents are left: %v", files)
	}
	if files, _ := filepath.Glob(l.o.CacheDir + "/results/*"); len(files) > 0 {
		l.Errorf("results are left: %v", files)
	}
	if l.n != nil {
		if left := l.n.Intents(); len(left) > 0 {
			l.Errorf("intents are left: %+v", left)
		}
	}
	if ps := l.running(""); len(ps) > 0 {
		l.Errorf("plugins are left: %v", ps)
	}
}

// running lists the processes of plugins of a pod, or of all pods of this lab.
func (l *lab) running(id string) []string {
	var all []string
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		data, err := os.ReadFile(dir + "/environ")
		if err != nil || !bytes.Contains(data, []byte("CNI_PATH="+l.bin)) || !bytes.Contains(data, []byte("CNI_CONTAINERID="+id)) {
			continue
		}
		cmd, _ := os.ReadFile(dir + "/cmdline")
		all = append(all, filepath.Base(dir)+" "+string(bytes.ReplaceAll(cmd, []byte{0}, []byte{' '})))
	}
	return all
}

// until waits for a condition, and fails if it does not come in time.
func (l *lab) until(limit time.Duration, what string, ok func() bool) time.Duration {
	l.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			l.Fatalf("%s: not within %s", what, limit)
		}
		time.Sleep(2 * time.Millisecond) // the pace of looking, not a wait for luck
	}
	return time.Since(start)
}

func (l *lab) gone(id string) func() bool {
	return func() bool {
		return !slices.ContainsFunc(l.n.Intents(), func(i Intent) bool { return i.ID == id })
	}
}

// crash is the life of a program that is killed: it sets up the network of a
// pod, and deletes it.
func crash(spec string) {
	var c struct {
		Options Options
		Pod     Pod
		Faults  string
	}
	if err := json.Unmarshal([]byte(spec), &c); err != nil {
		panic(err)
	}
	c.Options.Log = slog.New(slog.DiscardHandler)
	var err error
	if c.Options.Faults, err = fault.Parse(c.Faults, fault.Kill); err != nil {
		panic(err)
	}
	n, err := Open(c.Options)
	if err == nil {
		_, err = n.Setup(context.Background(), c.Pod)
	}
	if err == nil {
		err = n.Teardown(context.Background(), c.Pod.ID)
	}
	fmt.Println("survived:", err)
	os.Exit(0)
}

// start runs crash in a child, which shares the test's network.
func (l *lab) start(p Pod, faults string) *exec.Cmd {
	l.Helper()
	o := l.o
	o.Log, o.Faults, o.Metrics = nil, nil, nil
	spec, err := json.Marshal(map[string]any{"Options": o, "Pod": p, "Faults": faults})
	l.must(err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), crashEnv+"="+string(spec))
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	l.must(cmd.Start())
	l.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}
