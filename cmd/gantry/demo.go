package main

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/namespace"
)

// demoTimeout bounds the whole demonstration, demoCleanup the end of it.
const (
	demoTimeout = 3 * time.Minute
	demoCleanup = time.Minute
	demoStop    = 15 * time.Second // for the daemon, after SIGTERM
)

func (a *app) demoCommand() *cobra.Command {
	return &cobra.Command{
		Use: "demo", Short: "Show all of it work, on this machine and without a network", GroupID: "daemon", Args: cobra.NoArgs,
		Long: "Starts a private daemon and a registry on loopback with a generated image, pulls the image, runs containers from it,\nstops everything, and verifies that no process, mount, cgroup or file is left. It touches nothing else on this machine.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return &hinted{fmt.Errorf("demo: containers, mounts and cgroups need root: %w", errdefs.ErrPermissionDenied), "sudo gantry demo"}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), demoTimeout)
			defer cancel()
			d := &demo{app: a, began: time.Now()}
			err := d.run(ctx)
			clean, stop := context.WithTimeout(context.WithoutCancel(ctx), demoCleanup)
			defer stop()
			if cerr := d.end(clean, err != nil); cerr != nil || err != nil {
				return errors.Join(err, cerr)
			}
			fmt.Fprintf(d.out, "\nAll of it worked, in %.1f s.\n", time.Since(d.began).Seconds())
			return nil
		},
	}
}

// demo is one demonstration: what it has started and must end.
type demo struct {
	*app
	began    time.Time
	step     int
	dir      string // has everything
	ns       string // of its own, so that its cgroups are nobody else's
	daemon   *exec.Cmd
	exited   chan error // the daemon's exit
	registry *demoRegistry
	shared   []string // directories that were not there before
}

func (d *demo) say(format string, args ...any) {
	d.step++
	fmt.Fprintf(d.out, "\n%d. "+format+"\n", append([]any{d.step}, args...)...)
}

// gantry runs a command line as a user would type it, on the private daemon.
func (d *demo) gantry(ctx context.Context, args ...string) error {
	shown := make([]string, len(args))
	for i, s := range args {
		if shown[i] = s; strings.ContainsAny(s, " $&;'\"") {
			shown[i] = "'" + s + "'"
		}
	}
	fmt.Fprintf(d.out, "$ gantry %s\n", strings.Join(shown, " "))
	return d.quiet(ctx, d.out, args...)
}

// quiet runs a command line without a word about it, with its output to out.
func (d *demo) quiet(ctx context.Context, out *os.File, args ...string) error {
	sub := newApp(d.in, out, d.err)
	defer sub.close()
	root := sub.command()
	root.SetArgs(append([]string{"--address", d.address, "--namespace", d.ns}, args...))
	err := root.ExecuteContext(ctx)
	var code exitCode
	switch {
	case errors.As(err, &code):
		return fmt.Errorf("gantry %s: %w", args[0], err)
	case err == nil && ctx.Err() != nil:
		return ctx.Err() // a command that is left by an interrupt
	}
	return err
}

func (d *demo) run(ctx context.Context) (err error) {
	self, err := program()
	if err != nil {
		return err
	}
	gantryd, err := findDaemon(self)
	if err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "gantry-demo"); err != nil {
		return err
	}
	d.ns = filepath.Base(d.dir)
	d.address = filepath.Join(d.dir, "gantry.sock")
	for _, p := range []string{"/run/containerd", "/run/containerd/runc", "/run/containerd/s"} {
		if _, err := os.Stat(p); errors.Is(err, os.ErrNotExist) {
			d.shared = append([]string{p}, d.shared...) // the innermost first
		}
	}

	d.say("start a private daemon: %s, everything below %s", gantryd, d.dir)
	if err := d.startDaemon(ctx, gantryd); err != nil {
		return err
	}
	if err := d.gantry(ctx, "info"); err != nil {
		return err
	}

	d.say("serve a registry on loopback, with an image made of %s", self)
	img, err := demoImage(self)
	if err != nil {
		return err
	}
	if d.registry, err = serveDemoRegistry(img); err != nil {
		return err
	}
	ref := d.registry.host + "/demo/hello:latest"
	for _, l := range img.layers {
		fmt.Fprintf(d.out, "   layer %s  %-9s  %s\n", l.Digest.Encoded()[:12], size(l.Size), l.MediaType)
	}

	d.say("pull it: resolve, fetch, verify, unpack")
	if err := d.gantry(ctx, "pull", ref); err != nil {
		return err
	}
	if err := d.gantry(ctx, "images"); err != nil {
		return err
	}

	d.say("run a container from it and show what it prints")
	if err := d.gantry(ctx, "run", "--rm", "--memory", "256m", ref); err != nil {
		return err
	}

	d.say("run another one in the background, and look at it")
	if err := d.gantry(ctx, "run", "-d", "--name", "ticker", ref, "tick"); err != nil {
		return err
	}
	if err := d.gantry(ctx, "ps"); err != nil {
		return err
	}
	if err := d.gantry(ctx, "exec", "ticker", "/bin/gantry", "demo-work", "look"); err != nil {
		return err
	}
	if err := d.gantry(ctx, "stats", "--no-stream", "ticker"); err != nil {
		return err
	}

	d.say("stop it, read what it printed, remove it")
	if err := d.gantry(ctx, "stop", "ticker"); err != nil {
		return err
	}
	if err := d.gantry(ctx, "logs", "ticker"); err != nil {
		return err
	}
	if err := d.gantry(ctx, "ps", "-a"); err != nil {
		return err
	}
	if err := d.gantry(ctx, "rm", "ticker"); err != nil {
		return err
	}
	return d.gantry(ctx, "rmi", ref)
}

// findDaemon looks for gantryd beside this program, then on PATH.
func findDaemon(self string) (string, error) {
	p := filepath.Join(filepath.Dir(self), "gantryd")
	if _, err := os.Stat(p); err == nil {
		return p, nil
	}
	if p, err := exec.LookPath("gantryd"); err == nil {
		return p, nil
	}
	return "", &hinted{fmt.Errorf("no gantryd beside %s, nor on PATH: %w", self, errdefs.ErrNotFound), "build it with: make"}
}

func (d *demo) startDaemon(ctx context.Context, bin string) error {
	config := fmt.Sprintf("version = 4\nroot = %q\nstate = %q\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n[plugins.'io.containerd.server.v1.grpc']\naddress = %q\n[plugins.'io.containerd.server.v1.ttrpc']\naddress = %q\n[plugins.'io.containerd.shim.v1.manager']\nsocket_dir = %q\n",
		d.dir+"/root", d.dir+"/state", d.address, d.address+".ttrpc", d.dir+"/shims")
	path := filepath.Join(d.dir, "config.toml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(d.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	d.daemon = exec.Command(bin, "--config", path)
	d.daemon.Stdout, d.daemon.Stderr = log, log
	// An interrupt at the terminal is for this program, which then ends the
	// daemon after the containers.
	d.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.daemon.Start(); err != nil {
		d.daemon = nil
		return fmt.Errorf("start %s: %w", bin, err)
	}
	d.exited = make(chan error, 1)
	go func(c *exec.Cmd) { d.exited <- c.Wait() }(d.daemon)
	for deadline := time.Now().Add(connectTimeout); ; {
		c, err := client.Dial(d.address)
		if err == nil {
			once, cancel := context.WithTimeout(ctx, time.Second)
			err = c.Serving(once)
			cancel()
			if cerr := c.Close(); err == nil {
				return cerr
			}
		}
		select {
		case werr := <-d.exited:
			d.daemon = nil
			return fmt.Errorf("the daemon ended while it started: %v", werr)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
			if time.Now().After(deadline) {
				return fmt.Errorf("the daemon does not answer within %v: %w", connectTimeout, err)
			}
		}
	}
}

// end stops and removes everything, and verifies that nothing is left.
func (d *demo) end(ctx context.Context, failed bool) error {
	if d.dir == "" {
		return nil
	}
	if failed && d.daemon != nil {
		if b, err := os.ReadFile(filepath.Join(d.dir, "log")); err == nil {
			fmt.Fprintf(d.err, "the last words of the daemon:\n%s", b[max(0, len(b)-4096):])
		}
	}
	d.say("stop the daemon and the registry, and look for what is left")
	var all error
	if d.daemon != nil {
		all = errors.Join(all, d.removeContainers(ctx))
		d.daemon.Process.Signal(unix.SIGTERM)
		select {
		case err := <-d.exited:
			if err != nil {
				all = errors.Join(all, fmt.Errorf("the daemon ended with: %w", err))
			}
		case <-time.After(demoStop):
			d.daemon.Process.Kill()
			<-d.exited
			all = errors.Join(all, fmt.Errorf("the daemon did not end within %v of SIGTERM", demoStop))
		}
	}
	if d.registry != nil {
		all = errors.Join(all, d.registry.Close())
	}
	// The parents of what the runtime made are nobody's else: their name is ours.
	for _, g := range d.cgroups() {
		os.Remove(g)
	}
	os.Remove(filepath.Join("/run/containerd/runc", d.ns))
	left := []struct {
		what string
		list []string
	}{{"processes", d.processes()}, {"mounts", d.mounts()}, {"cgroups", d.cgroups()}, {"runtime state", existing(filepath.Join("/run/containerd/runc", d.ns))}}
	for _, l := range left {
		if len(l.list) > 0 {
			all = errors.Join(all, fmt.Errorf("left behind: %d %s: %s", len(l.list), l.what, strings.Join(l.list, "; ")))
		}
	}
	d.sweep()
	if err := os.RemoveAll(d.dir); err != nil {
		all = errors.Join(all, err)
	}
	for _, p := range d.shared {
		os.Remove(p) // if they are empty
	}
	if files := existing(d.dir); len(files) > 0 {
		all = errors.Join(all, fmt.Errorf("left behind: %s", files[0]))
	}
	if all == nil {
		fmt.Fprintf(d.out, "   no process, no mount, no cgroup, no file is left\n")
	}
	return all
}

// removeContainers kills and removes what an interrupted run has left.
func (d *demo) removeContainers(ctx context.Context) error {
	c, err := client.Dial(d.address)
	if err != nil {
		return err
	}
	defer c.Close()
	v, err := c.In(namespace.ID(d.ns), "")
	if err != nil {
		return err
	}
	var list []container.Container
	if err := v.Containers().Walk(ctx, func(c container.Container) error { list = append(list, c); return nil }); err != nil {
		return err
	}
	for _, c := range list {
		if err := d.remove(ctx, v, c, true); err != nil {
			return err
		}
	}
	return nil
}

func existing(path string) []string {
	if _, err := os.Lstat(path); err != nil {
		return nil
	}
	return []string{path}
}

// processes are those whose command line names the demonstration's directory.
func (d *demo) processes() []string {
	var out []string
	for _, pid := range d.pids() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		out = append(out, fmt.Sprintf("%d %s", pid, bytes.ReplaceAll(bytes.TrimRight(b, "\x00"), []byte{0}, []byte(" "))))
	}
	return out
}

func (d *demo) pids() []int {
	var out []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline"); err == nil && bytes.Contains(b, []byte(d.dir+"/")) {
			out = append(out, pid)
		}
	}
	return out
}

func (d *demo) mounts() []string {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	var out []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], d.dir+"/") {
			out = append(out, f[4])
		}
	}
	return out
}

// cgroups are the directories that have the demonstration's name, those below
// them first.
func (d *demo) cgroups() []string {
	var out []string
	filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil // cgroups of others come and go
		}
		if e.IsDir() && strings.Contains(path, "/"+d.ns) {
			out = append([]string{path}, out...)
		}
		return nil
	})
	return out
}

// sweep ends by force what should have ended by itself, after that was reported.
func (d *demo) sweep() {
	for _, pid := range d.pids() {
		unix.Kill(pid, unix.SIGKILL)
	}
	for _, m := range d.mounts() {
		unix.Unmount(m, unix.MNT_DETACH)
	}
}

// isStatic says whether a program runs without any library, as it must in an
// image that has nothing else.
func isStatic(r io.ReaderAt) bool {
	f, err := elf.NewFile(r)
	if err != nil {
		return false
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}

// demoWorkCommand is what runs in the demonstration's containers: this program
// is all that its image has.
func demoWorkCommand() *cobra.Command {
	return &cobra.Command{Use: "demo-work", Hidden: true, Args: cobra.MaximumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		switch strings.Join(args, "") {
		case "", "hello":
			greeting, err := os.ReadFile("/data/greeting")
			if err != nil {
				return err
			}
			host, err := os.Hostname()
			if err != nil {
				return err
			}
			fmt.Printf("%sI am process %d on host %s, user %d, and $DEMO is %q.\n", greeting, os.Getpid(), host, os.Getuid(), os.Getenv("DEMO"))
			if _, err := os.Stat("/data/secret"); errors.Is(err, os.ErrNotExist) {
				fmt.Println("What a later layer deleted is not there.")
			} else {
				return errors.New("the image has a file that a later layer deleted")
			}
		case "look":
			entries, err := os.ReadDir("/proc")
			if err != nil {
				return err
			}
			n := 0
			for _, e := range entries {
				if _, err := strconv.Atoi(e.Name()); err == nil {
					n++
				}
			}
			fmt.Printf("I am process %d, one of %d in this container\n", os.Getpid(), n)
		case "tick":
			stop := make(chan os.Signal, 1)
			signal.Notify(stop, unix.SIGTERM)
			for n := 1; ; n++ {
				fmt.Println("tick", n)
				select {
				case <-stop:
					fmt.Println("asked to stop, and so I do")
					return nil
				case <-time.After(250 * time.Millisecond):
				}
			}
		}
		return nil
	}}
}
