package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/gantryd/gantry/test/daemontest"
)

// kind is a program to be measured.
type kind struct {
	name, bin string
	version   int // of its configuration file
}

// daemon is a running one, with root, state and sockets of its own, in a
// cgroup that its children inherit, so that their CPU time can be read.
type daemon struct {
	*daemontest.Daemon
	kind
	client *containerd.Client
	image  containerd.Image // that containers are made of
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
	p, err := daemontest.Prepare(k.bin, k.version, "")
	if err != nil {
		return nil, err
	}
	d := &daemon{Daemon: p, kind: k}
	d.Env = []string{"PATH=" + filepath.Dir(k.bin) + ":" + os.Getenv("PATH")}
	if root, _ := cpuRoot(); root != "" {
		own := filepath.Join(root, d.Mark, "daemon")
		if err := os.MkdirAll(own, 0o755); err != nil {
			return nil, errors.Join(err, d.Remove())
		}
		// A shell joins the group before the daemon exists: not even its start is missed.
		d.Wrap = []string{"/bin/sh", "-c", "echo $$ > " + own + `/cgroup.procs; exec "$@"`, "sh"}
	}
	return d, nil
}

// start runs the daemon until it has answered one request, and returns how
// long that took from the start of the process.
func (d *daemon) start(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	err := d.Spawn()
	if err == nil {
		err = d.Listening() // gRPC's own retry is too coarse for this
	}
	if err == nil {
		d.client, err = containerd.New(d.Address(), containerd.WithDefaultNamespace("default"), containerd.WithTimeout(20*time.Second))
	}
	if err == nil {
		_, err = d.client.NamespaceService().List(ctx)
	}
	if err != nil {
		return 0, fmt.Errorf("start %s: %w\n%s", d.bin, err, d.tail())
	}
	return time.Since(begin), nil
}

func (d *daemon) tail() string { return d.Log(4000) }

// kill ends the process as a crash does.
func (d *daemon) kill() {
	d.disconnect()
	d.Kill()
}

func (d *daemon) disconnect() {
	if d.client != nil {
		d.client.Close()
		d.client = nil
	}
}

// remove stops the daemon and takes away all it left: processes, mounts,
// cgroups, files. What is left at the end of a good run is reported.
func (d *daemon) remove() (left []string) {
	d.disconnect()
	if err := d.Stop(); err != nil {
		left = append(left, err.Error())
	}
	if root, _ := cpuRoot(); root != "" {
		// Not the daemon's doing, and busy until the last of its shims has ended.
		own := filepath.Join(root, d.Mark, "daemon")
		for deadline := time.Now().Add(2 * time.Second); exists(own) && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			os.Remove(own)
		}
	}
	left = append(left, d.Leftovers()...)
	d.Sweep()
	if err := d.Remove(); err != nil {
		left = append(left, err.Error())
	}
	return left
}

func exists(p string) bool {
	_, err := os.Stat(p)
	return err == nil
}

// cpuTime is what the daemon, its shims, runtimes and containers have used so
// far; ok is false where no cgroup counts it.
func (d *daemon) cpuTime() (t time.Duration, ok bool) {
	root, file := cpuRoot()
	if root == "" {
		return 0, false
	}
	b, err := os.ReadFile(filepath.Join(root, d.Mark, file))
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
