package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

// kind is a program to be measured.
type kind struct {
	name, bin string
	version   int // of its configuration file
}

// daemon is a running one, with root, state and sockets of its own, in a
// cgroup that its children inherit, so that their CPU time can be read.
type daemon struct {
	kind
	dir, address, group string
	cmd                 *exec.Cmd
	client              *containerd.Client
	log                 *os.File
	image               containerd.Image // that containers are made of
}

// cpuRoot is the hierarchy whose groups count CPU time: v1's cpuacct or v2.
func cpuRoot() (root, file string) {
	if _, err := os.Stat("/sys/fs/cgroup/cpuacct/cgroup.procs"); err == nil {
		return "/sys/fs/cgroup/cpuacct", "cpuacct.usage"
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return "/sys/fs/cgroup", "cpu.stat"
	}
	return "", ""
}

// newDaemon prepares one without starting it. Its directory is beside the
// benchmark's temporary files: both daemons are on the same file system.
func newDaemon(k kind) (*daemon, error) {
	dir, err := os.MkdirTemp("", "gb")
	if err != nil {
		return nil, err
	}
	d := &daemon{kind: k, dir: dir, address: filepath.Join(dir, "s.sock"), group: "gantry-bench-" + filepath.Base(dir)}
	config := fmt.Sprintf("version = %d\nroot = %q\nstate = %q\n", k.version, dir+"/root", dir+"/state")
	if k.version >= 4 {
		config += fmt.Sprintf("[plugins.'io.containerd.server.v1.grpc']\naddress = %q\n[plugins.'io.containerd.server.v1.ttrpc']\naddress = %q\n[plugins.'io.containerd.shim.v1.manager']\nsocket_dir = %q\n", d.address, d.address+".ttrpc", dir+"/shims")
	} else {
		config += fmt.Sprintf("disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = %q\n", d.address)
	}
	if err := os.WriteFile(dir+"/config.toml", []byte(config), 0o600); err != nil {
		return nil, err
	}
	if d.log, err = os.Create(dir + "/log"); err != nil {
		return nil, err
	}
	if root, _ := cpuRoot(); root != "" {
		err = os.MkdirAll(filepath.Join(root, d.group, "daemon"), 0o755)
	}
	return d, err
}

// start runs the daemon until it has answered one request, and returns how
// long that took from the start of the process.
func (d *daemon) start(ctx context.Context) (time.Duration, error) {
	// A shell joins the group before the daemon exists: not even its start is missed.
	script := `exec "$@"`
	if root, _ := cpuRoot(); root != "" {
		script = fmt.Sprintf("echo $$ > %s/%s/daemon/cgroup.procs; ", root, d.group) + script
	}
	d.cmd = exec.Command("/bin/sh", "-c", script, "sh", d.bin, "--config", d.dir+"/config.toml")
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(d.bin)+":"+os.Getenv("PATH"))
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	begin := time.Now()
	if err := d.cmd.Start(); err != nil {
		return 0, err
	}
	// gRPC's own retry is too coarse for this: wait for the socket first.
	for deadline := begin.Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		conn, err := net.Dial("unix", d.address)
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("%s does not listen: %w\n%s", d.bin, err, d.tail())
		}
	}
	var err error
	if d.client, err = containerd.New(d.address, containerd.WithDefaultNamespace("default"), containerd.WithTimeout(20*time.Second)); err != nil {
		return 0, err
	}
	if _, err := d.client.NamespaceService().List(ctx); err != nil {
		return 0, fmt.Errorf("first request to %s: %w\n%s", d.bin, err, d.tail())
	}
	return time.Since(begin), nil
}

func (d *daemon) tail() []byte {
	b, _ := os.ReadFile(d.dir + "/log")
	return b[max(0, len(b)-4000):]
}

// stop ends the process: with SIGTERM, or SIGKILL when it is to crash.
func (d *daemon) stop(sig syscall.Signal) {
	if d.cmd == nil {
		return
	}
	if d.client != nil {
		d.client.Close()
		d.client = nil
	}
	d.cmd.Process.Signal(sig)
	timer := time.AfterFunc(15*time.Second, func() { d.cmd.Process.Kill() })
	d.cmd.Wait()
	timer.Stop()
	d.cmd = nil
}

// remove stops the daemon and takes away all it left: processes, mounts,
// cgroups, files. What is left at the end of a good run is reported.
func (d *daemon) remove() (left []string) {
	d.stop(syscall.SIGTERM)
	for pid, args := range d.processes() {
		left = append(left, fmt.Sprintf("process %d: %s", pid, args))
		syscall.Kill(pid, syscall.SIGKILL)
	}
	for range 20 {
		mounts, _ := os.ReadFile("/proc/self/mountinfo")
		again := false
		for _, l := range strings.Split(string(mounts), "\n") {
			if f := strings.Fields(l); len(f) > 4 && strings.HasPrefix(f[4], d.dir+"/") {
				left = append(left, "mount "+f[4])
				syscall.Unmount(f[4], syscall.MNT_DETACH)
				again = true
			}
		}
		if !again {
			break
		}
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + d.group)
	for _, g := range append(groups, "/sys/fs/cgroup/"+d.group) {
		for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			children, _ := filepath.Glob(g + "/*/cgroup.procs")
			for _, c := range children {
				os.Remove(filepath.Dir(c))
			}
			if os.Remove(g); !exists(g) || time.Now().After(deadline) {
				break
			}
		}
		if exists(g) {
			left = append(left, "cgroup "+g)
		}
	}
	d.log.Close()
	os.RemoveAll(d.dir)
	return left
}

func exists(p string) bool {
	_, err := os.Stat(p)
	return err == nil
}

// processes are those whose command line names this daemon's directory.
func (d *daemon) processes() map[int]string {
	out := map[int]string{}
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if err != nil || !bytes.Contains(b, []byte(d.dir+"/")) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(e))); err == nil && pid != os.Getpid() {
			out[pid] = strings.ReplaceAll(string(b), "\x00", " ")
		}
	}
	return out
}

// cpuTime is what the daemon, its shims, runtimes and containers have used so
// far; ok is false where no cgroup counts it.
func (d *daemon) cpuTime() (t time.Duration, ok bool) {
	root, file := cpuRoot()
	if root == "" {
		return 0, false
	}
	b, err := os.ReadFile(filepath.Join(root, d.group, file))
	if err != nil {
		return 0, false
	}
	if rest, found := strings.CutPrefix(string(b), "usage_usec "); found {
		n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		return time.Duration(n) * time.Microsecond, err == nil
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return time.Duration(n), err == nil
}

// measure runs f, which does n operations, and returns time and CPU of one.
func (d *daemon) measure(n int, f func() error) (sample, error) {
	before, counted := d.cpuTime()
	begin := time.Now()
	if err := f(); err != nil {
		return sample{}, err
	}
	s := sample{value: time.Since(begin).Seconds() * 1000 / float64(n), cpu: -1}
	if after, ok := d.cpuTime(); ok && counted {
		s.cpu = (after - before) / time.Duration(n)
	}
	return s, nil
}

// status reads a "Name:  123 kB" line of a file in /proc, in MiB.
func status(pid int, file, name string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return 0, err
	}
	for _, l := range strings.Split(string(b), "\n") {
		if f := strings.Fields(l); len(f) >= 2 && f[0] == name+":" {
			kib, err := strconv.ParseFloat(f[1], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("no %s in %s of process %d", name, file, pid)
}

func withNamespace(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, "default")
}
