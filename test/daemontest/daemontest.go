// Package daemontest runs gantryd, or a containerd to compare it with, for
// tests and benchmarks: with a directory, a configuration and a socket of its
// own, stopped within a deadline, and with a list of all that it has left on
// the host. It needs root.
package daemontest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/gantryd/gantry/client"
)

// Slow is how long something may take that takes at most d on usual machines:
// GANTRY_SLOW times that, 1 by default. It is for deadlines and for bounds that
// only forgive a busy machine, not for times that a test is about.
func Slow[T ~int64](d T) T {
	n, err := strconv.Atoi(os.Getenv("GANTRY_SLOW"))
	if err != nil {
		return d
	}
	return T(max(n, 1)) * d
}

// Deadlines of a daemon: until it listens and serves, and until it has ended
// after a SIGTERM.
var (
	startWithin = Slow(20 * time.Second)
	stopWithin  = Slow(15 * time.Second)
)

// Main runs the tests of a suite with *bin set to the directory that has
// gantryd and its shim: $GANTRY_BIN, or freshly built from the module at root.
// It is what TestMain exits with.
func Main(m interface{ Run() int }, root string, bin *string) int {
	if os.Geteuid() != 0 {
		fmt.Println("root is needed: these tests run containers")
		return 1
	}
	if *bin = os.Getenv("GANTRY_BIN"); *bin != "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "gantry-bin")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-tags", "seccomp", "-o", dir+"/", "./cmd/gantryd", "./cmd/containerd-shim-runc-v2")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Printf("%v: %v\n%s", build, err, out)
		return 1
	}
	*bin = dir
	return m.Run()
}

// Debian is the path of one of the programs of Debian's containerd, below
// $GANTRY_DEBIAN_CONTAINERD or /opt/deb/usr/bin, or an error that says how to
// get it.
func Debian(name string) (string, error) {
	dir := os.Getenv("GANTRY_DEBIAN_CONTAINERD")
	if dir == "" {
		dir = "/opt/deb/usr/bin"
	}
	p := filepath.Join(dir, name)
	if _, err := os.Stat(p); err != nil {
		return "", fmt.Errorf("Debian's %s is needed (scripts/deps test fetches it): %w", name, err)
	}
	return p, nil
}

// Daemon is a daemon with files of its own, running or not. One that has no
// more than a Dir, or a Dir and a Mark, cannot run, but lists and sweeps. It is
// for one goroutine.
type Daemon struct {
	Bin  string   // what Spawn runs
	Env  []string // more environment of each start
	Wrap []string // a command that executes its arguments, the daemon
	CRI  bool     // Configure leaves Kubernetes' part enabled

	// Dir has the subdirectories root, state and shims, config.toml and log.
	Dir string
	// Mark is a name that no one else on this machine has, for the namespace
	// or the parent cgroup of its containers: what is named so is the daemon's.
	Mark string

	log *os.File
	run *process // nil if it is stopped
}

// process is one life of a daemon.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended, err is set then
	err  error
}

// Prepare makes a daemon that runs bin and is not started. Configure has been
// called with version and more. Whoever prepares calls Stop, Sweep and Remove.
func Prepare(bin string, version int, more string) (*Daemon, error) {
	dir, err := os.MkdirTemp("", "gd") // a socket's path is at most 107 bytes long
	if err != nil {
		return nil, err
	}
	// With something behind the number, no mark is a part of another.
	d := &Daemon{Bin: bin, Dir: dir, Mark: filepath.Base(dir) + "-daemontest"}
	if d.log, err = os.Create(dir + "/log"); err == nil {
		err = d.Configure(version, more)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return d, nil
}

// New prepares a daemon for a test. In the end it is stopped, which is an error
// of the test if it is not alive or does not obey, its log is shown if the test
// has failed, and all that it left is removed. To complain of what it left is
// the test's: Stop, then Leftovers.
func New(t testing.TB, bin string, version int, more string) *Daemon {
	t.Helper()
	d, err := Prepare(bin, version, more)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the end of the log of %s:\n%s", filepath.Base(d.Bin), d.Log(30000))
		}
		d.Sweep()
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Configure writes the configuration file, whose format is that of a version:
// 4 for gantryd, 2 for Debian's containerd. More of the same format is put
// behind it.
func (d *Daemon) Configure(version int, more string) error {
	config := fmt.Sprintf("version = %d\nroot = %q\nstate = %q\n", version, d.Dir+"/root", d.Dir+"/state")
	if version >= 4 {
		if !d.CRI {
			config += "disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.nri.v1.nri']\n"
		}
		config += fmt.Sprintf("[plugins.'io.containerd.server.v1.grpc']\naddress = %q\n[plugins.'io.containerd.server.v1.ttrpc']\naddress = %q\n[plugins.'io.containerd.shim.v1.manager']\nsocket_dir = %q\n",
			d.Address(), d.Address()+".ttrpc", d.Dir+"/shims")
	} else {
		if !d.CRI {
			config += "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n"
		}
		config += fmt.Sprintf("[grpc]\naddress = %q\n", d.Address())
	}
	return os.WriteFile(d.Dir+"/config.toml", []byte(config+more+"\n"), 0o600)
}

// Address is the path of the daemon's socket.
func (d *Daemon) Address() string { return d.Dir + "/s.sock" }

// Pid is that of the running daemon, 0 if it is stopped.
func (d *Daemon) Pid() int {
	if d.run == nil {
		return 0
	}
	return d.run.cmd.Process.Pid
}

// Log returns at most the last n bytes of what the daemon has printed in all
// its lives, and the error in their place if they cannot be read.
func (d *Daemon) Log(n int) string {
	b, err := os.ReadFile(d.Dir + "/log")
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-n):])
}

// Spawn starts the stopped daemon and does not wait for it.
func (d *Daemon) Spawn(env ...string) error {
	args := append(append([]string{}, d.Wrap...), d.Bin, "--config", d.Dir+"/config.toml")
	p := &process{cmd: exec.Command(args[0], args[1:]...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = d.log, d.log
	p.cmd.Env = append(append(append(os.Environ(), "GOTRACEBACK=all"), d.Env...), env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	d.run = p
	return nil
}

// Listening waits, at most 20 s, until the spawned daemon accepts connections.
// It is an error if it ends before.
func (d *Daemon) Listening() error {
	deadline := time.After(startWithin)
	for {
		// gRPC waits longer and longer between its attempts; this does not.
		c, err := net.Dial("unix", d.Address())
		if err == nil {
			return c.Close()
		}
		select {
		case <-d.run.done:
			return fmt.Errorf("%s has ended before it listened: %w", d.Bin, d.run.end())
		case <-deadline:
			return fmt.Errorf("%s does not listen within %v: %w", d.Bin, startWithin, err)
		case <-time.After(Slow(time.Millisecond)):
		}
	}
}

// Start runs the stopped daemon until it says that it serves, 20 s at most
// after it listens.
func (d *Daemon) Start(env ...string) error {
	if err := d.Spawn(env...); err != nil {
		return err
	}
	if err := d.Listening(); err != nil {
		return err
	}
	c, err := client.Dial(d.Address())
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), startWithin)
	defer cancel()
	go func(done chan struct{}) {
		select {
		case <-done:
			cancel() // there is nothing to wait for any more
		case <-ctx.Done():
		}
	}(d.run.done)
	return c.Serving(ctx)
}

// end is how the process has ended; with status 0 that is an error as well, for
// one that should live.
func (p *process) end() error {
	if p.err == nil {
		return errors.New("exit status 0")
	}
	return p.err
}

// Ended waits for a daemon that is to end by itself, and returns how it did, as
// exec.Cmd.Wait does, and whether it has. If so, it is stopped from now on.
func (d *Daemon) Ended(within time.Duration) (end error, ended bool) {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-d.run.done:
	case <-timer.C:
		select {
		case <-d.run.done:
		default:
			return nil, false
		}
	}
	end, d.run = d.run.err, nil
	return end, true
}

// Stop ends the daemon with SIGTERM. It is an error if it was not alive any
// more, if it ends with another status than 0, and if it has to be killed after
// 15 s. A stopped daemon can be stopped again.
func (d *Daemon) Stop() error {
	p := d.run
	if p == nil {
		return nil
	}
	d.run = nil
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended by itself: %w", d.Bin, p.end())
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	timer := time.NewTimer(stopWithin)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
		p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("%s did not end within %v of SIGTERM", d.Bin, stopWithin)
	}
	if p.err != nil {
		return fmt.Errorf("the end of %s after SIGTERM: %w", d.Bin, p.err)
	}
	return nil
}

// Kill is kill -9. A stopped daemon stays so.
func (d *Daemon) Kill() {
	if d.run == nil {
		return
	}
	d.run.cmd.Process.Kill()
	<-d.run.done
	d.run = nil
}

// Remove deletes the stopped daemon's files. It refuses to while something is
// mounted below them.
func (d *Daemon) Remove() error {
	if m := d.mounts(); len(m) > 0 {
		return fmt.Errorf("remove %s: still mounted: %s", d.Dir, m[0])
	}
	return errors.Join(d.log.Close(), os.RemoveAll(d.Dir))
}
