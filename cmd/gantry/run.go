package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/oci"
)

// What the command line notes of its containers (container.Notes).
const (
	noteLog = "io.gantry.log"   // where the output of a detached container is kept
	noteRm  = "io.gantry.rm"    // "true": removed when it ends
	noteIn  = "io.gantry.stdin" // "true": a FIFO is kept for its standard input
)

// logFolder is where kept output is, in the daemon's root directory: one
// folder a namespace and container.
const logFolder = "io.gantry.logs"

// createFlags are those of run and create.
type createFlags struct {
	pull                                pullFlags
	name                                string
	interactive, tty                    bool
	env, envFile                        []string
	volumes, mounts, tmpfs              []string
	workdir, user, hostname, entrypoint string
	groups                              []string
	memory, cpus                        string
	pids                                int64
	capAdd, capDrop                     []string
	privileged, readOnly                bool
	newPrivileges                       bool
	network                             string
	runtime                             string
	labels                              []string
	devices                             []string
	logSize                             string
	logFiles                            int
}

func (c *createFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the image is the container's
	f.StringVar(&c.name, "name", "", "`id` of the container (generated)")
	f.BoolVarP(&c.interactive, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&c.tty, "tty", "t", false, "give it a terminal")
	f.StringArrayVarP(&c.env, "env", "e", nil, "set `NAME=VALUE`, or pass NAME on")
	f.StringArrayVar(&c.envFile, "env-file", nil, "read variables from a `file`")
	f.StringArrayVarP(&c.volumes, "volume", "v", nil, "mount `SOURCE:TARGET[:ro]`")
	f.StringArrayVar(&c.mounts, "mount", nil, "mount `type=bind,source=...,target=...[,readonly]`")
	f.StringArrayVar(&c.tmpfs, "tmpfs", nil, "mount a tmpfs at `TARGET[:options]`")
	f.StringVarP(&c.workdir, "workdir", "w", "", "`directory` to start in")
	f.StringVarP(&c.user, "user", "u", "", "`user[:group]` to run as")
	f.StringArrayVar(&c.groups, "group-add", nil, "further `group`")
	f.StringVar(&c.hostname, "hostname", "", "host `name` inside (the id)")
	f.StringVar(&c.entrypoint, "entrypoint", "", "`program` to run instead of the image's entrypoint")
	f.StringVarP(&c.memory, "memory", "m", "", "memory limit, such as 512m or 2g")
	f.StringVar(&c.cpus, "cpus", "", "`number` of CPUs, such as 1.5")
	f.Int64Var(&c.pids, "pids-limit", 0, "most `processes` at a time")
	f.StringSliceVar(&c.capAdd, "cap-add", nil, "add a `capability`, or ALL")
	f.StringSliceVar(&c.capDrop, "cap-drop", nil, "take a `capability` away, or ALL")
	f.BoolVar(&c.privileged, "privileged", false, "all capabilities and devices, no filters")
	f.BoolVar(&c.newPrivileges, "allow-new-privileges", false, "let setuid programs work")
	f.BoolVar(&c.readOnly, "read-only", false, "make the root file system read-only")
	f.StringVar(&c.network, "net", "none", "network: host or none")
	f.StringVar(&c.runtime, "runtime", "", "runtime `name`, or path of a shim; runc or crun for an external OCI runtime")
	f.StringArrayVarP(&c.labels, "label", "l", nil, "set a label `KEY=VALUE` on the container")
	f.StringArrayVar(&c.devices, "device", nil, "give it a host `device[:path[:rwm]]`")
	f.StringVar(&c.logSize, "log-size", "10m", "size at which the kept output is rotated")
	f.IntVar(&c.logFiles, "log-files", 3, "`number` of files of kept output")
	f.StringVar(&c.pull.platform, "platform", "", "`os/arch` to take of an image that has several (the host's)")
	f.StringVar(&c.pull.snapshotter, "snapshotter", "", "`name` of the snapshotter")
	f.BoolVar(&c.pull.remote.plainHTTP, "plain-http", false, "speak HTTP without TLS to the registry")
	f.StringVar(&c.pull.remote.hostsDir, "hosts-dir", "", "`directory` of hosts.toml files, as the daemon sees it")
	f.BoolVarP(&c.pull.quiet, "quiet", "q", false, "show no progress of a pull")
}

// options makes the specification's part of the flags.
func (c *createFlags) options(args []string, facts oci.HostFacts) ([]oci.Option, error) {
	opts := []oci.Option{oci.WithCapabilities(c.capAdd, c.capDrop), oci.WithCgroupMount()}
	add := func(o oci.Option) { opts = append(opts, o) }
	if c.entrypoint != "" {
		add(oci.WithEntrypoint(c.entrypoint))
	}
	if len(args) > 0 {
		add(oci.WithArgs(args...))
	}
	vars, err := environment(c.envFile, c.env)
	if err != nil {
		return nil, err
	}
	add(oci.WithEnv(vars...))
	for _, kind := range []struct {
		flag  string
		list  []string
		parse func(string) (specs.Mount, error)
	}{{"--volume", c.volumes, oci.ParseVolume}, {"--mount", c.mounts, oci.ParseMount}, {"--tmpfs", c.tmpfs, oci.ParseTmpfs}} {
		for _, s := range kind.list {
			m, err := kind.parse(s)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", kind.flag, err)
			}
			if m.Type == "bind" {
				if _, err := os.Stat(m.Source); err != nil {
					return nil, fmt.Errorf("%s %s: %w", kind.flag, s, err)
				}
			}
			add(oci.WithMounts(m))
		}
	}
	for _, s := range c.devices {
		d, access, err := oci.ParseDevice(facts, s)
		if err != nil {
			return nil, fmt.Errorf("--device: %w", err)
		}
		add(oci.WithDevice(d, access))
	}
	if c.workdir != "" {
		add(oci.WithCwd(c.workdir))
	}
	switch {
	case c.hostname != "":
		add(oci.WithHostname(c.hostname))
	case c.network != "host":
		add(oci.WithHostname(c.name))
	}
	if c.memory != "" {
		n, err := oci.ParseBytes(c.memory)
		if err != nil {
			return nil, fmt.Errorf("--memory: %w", err)
		}
		add(oci.WithMemoryLimit(n, 0))
	}
	if c.cpus != "" {
		n, err := oci.ParseCPUs(c.cpus)
		if err != nil {
			return nil, fmt.Errorf("--cpus: %w", err)
		}
		add(oci.WithCPUs(n))
	}
	if c.pids != 0 {
		add(oci.WithPidsLimit(c.pids))
	}
	if c.privileged {
		add(oci.WithPrivileged())
	}
	if c.newPrivileges {
		add(oci.WithNewPrivileges())
	}
	if c.readOnly {
		add(oci.WithReadonlyRoot())
	}
	switch c.network {
	case "none":
	case "host":
		add(oci.WithHostNetwork())
	default:
		return nil, fmt.Errorf("--net %s: use host or none", c.network)
	}
	if c.tty {
		add(oci.WithTerminal(0, 0))
	}
	return opts, nil
}

// newID makes an id that nobody chose.
func newID() (string, error) {
	b := make([]byte, 6)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	return hex.EncodeToString(b), nil
}

// create makes a container, and pulls its image first if it is not there.
// keepLog says that its output is to be kept.
func (a *app) create(ctx context.Context, c *createFlags, args []string, keepLog bool, notes map[string]string) (container.Container, error) {
	var none container.Container
	v, err := a.view(ctx)
	if err != nil {
		return none, err
	}
	platform, err := parsePlatform(c.pull.platform)
	if err != nil {
		return none, err
	}
	sn, err := a.snapshotter(ctx, c.pull.snapshotter)
	if err != nil {
		return none, err
	}
	own, _, err := parseLabels(c.labels)
	if err != nil {
		return none, err
	}
	facts, err := client.HostFacts(c.privileged || len(c.devices) > 0)
	if err != nil {
		return none, err
	}
	if c.name == "" {
		if c.name, err = newID(); err != nil {
			return none, err
		}
	}
	if err := container.Check(container.ID(c.name)); err != nil {
		return none, err
	}
	opts, err := c.options(args[1:], facts)
	if err != nil {
		return none, err
	}
	rt, err := a.runtime(c.runtime)
	if err != nil {
		return none, err
	}
	name, err := a.ensureImage(ctx, v, args[0], c, platform, sn)
	if err != nil {
		return none, err
	}
	if keepLog {
		limit, err := oci.ParseBytes(c.logSize)
		if err != nil {
			return none, fmt.Errorf("--log-size: %w", err)
		}
		dir, err := a.logDir(ctx, c.name)
		if err != nil {
			return none, err
		}
		u := url.URL{Scheme: "file", Path: filepath.Join(dir, "log"), RawQuery: url.Values{"format": {"cri"}, "max-size": {strconv.FormatInt(limit, 10)}, "max-files": {strconv.Itoa(c.logFiles)}}.Encode()}
		notes[noteLog] = u.String()
		if c.interactive {
			notes[noteIn] = "true"
		}
	}
	return client.CreateContainer(ctx, a.client, v.Namespace(), client.ContainerOptions{
		ID: container.ID(c.name), Image: name, Platform: platform, Snapshotter: sn, Runtime: rt,
		Labels: own, Extensions: container.Notes(notes), User: c.user, Groups: c.groups, Facts: facts, Spec: opts,
	})
}

// ensureImage returns the full name of an image that is there and unpacked.
func (a *app) ensureImage(ctx context.Context, v view.View, ref string, c *createFlags, platform ocispec.Platform, sn string) (string, error) {
	img, err := a.findImage(ctx, v, ref)
	if err == nil {
		info, err := client.InspectImage(ctx, v, img.Name, platform)
		if err == nil {
			st, err := v.Snapshots(sn)
			if err != nil {
				return "", err
			}
			if _, err := st.Stat(ctx, info.ChainID.String()); err == nil {
				return img.Name, nil
			} else if !errdefs.IsNotFound(err) {
				return "", err
			}
		} else if !errdefs.IsNotFound(err) {
			return "", err
		}
		ref = img.Name
	} else if !errdefs.IsNotFound(err) {
		return "", err
	}
	p := c.pull
	p.snapshotter = sn
	return a.pull(ctx, ref, &p)
}

// logDir is where the output of a container is kept: beside the daemon's data.
func (a *app) logDir(ctx context.Context, id string) (string, error) {
	plugins, err := a.client.Introspection().Plugins(ctx, "type==io.containerd.content.v1,id==content")
	if err != nil {
		return "", err
	}
	for _, p := range plugins {
		if root := p.Exports["root"]; root != "" {
			return filepath.Join(filepath.Dir(root), logFolder, a.namespace, id), nil
		}
	}
	return "", fmt.Errorf("keep the output of %s: the daemon does not say where its data is: %w", id, errdefs.ErrNotImplemented)
}

func (a *app) createCommand() *cobra.Command {
	var c createFlags
	cmd := &cobra.Command{
		Use: "create [FLAG...] IMAGE [COMMAND [ARG...]]", DisableFlagsInUseLine: true, Short: "Make a container without starting it", GroupID: "run", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctr, err := a.create(cmd.Context(), &c, args, true, map[string]string{})
			if err != nil {
				return err
			}
			return a.names(string(ctr.ID))
		},
	}
	c.add(cmd)
	return cmd
}

func (a *app) runCommand() *cobra.Command {
	var c createFlags
	var detach, rm bool
	cmd := &cobra.Command{
		Use: "run [FLAG...] IMAGE [COMMAND [ARG...]]", DisableFlagsInUseLine: true, Short: "Make a container and start it", GroupID: "run", Args: cobra.MinimumNArgs(1),
		Example: "  gantry run -it alpine\n  gantry run -d --name web --memory 256m --net host nginx\n  gantry run --rm -v /data:/data:ro alpine ls /data",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if !detach {
				if err := a.needsTerminal(c.interactive, c.tty); err != nil {
					return err
				}
			}
			notes := map[string]string{}
			if rm && detach {
				notes[noteRm] = "true" // nobody stays here to do it: the daemon does
			}
			ctr, err := a.create(ctx, &c, args, detach, notes)
			if err != nil {
				return err
			}
			v, err := a.view(ctx)
			if err != nil {
				return err
			}
			if detach {
				if err := a.startDetached(ctx, v, ctr); err != nil {
					return errors.Join(err, a.discard(ctx, v, ctr))
				}
				return a.names(string(ctr.ID))
			}
			code, err := a.runAttached(ctx, v, ctr, c.interactive, c.tty)
			if err != nil || rm {
				// A container that did not start is of no use to anyone.
				err = errors.Join(err, a.discard(ctx, v, ctr))
			}
			return exitError(code, err)
		},
	}
	c.add(cmd)
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "run in the background and print the id")
	cmd.Flags().BoolVar(&rm, "rm", false, "remove the container when it has ended")
	return cmd
}

func exitError(code uint32, err error) error {
	if err == nil && code != 0 {
		return exitCode(code)
	}
	return err
}

// discard removes a container with its task and its kept output.
func (a *app) discard(ctx context.Context, v view.View, c container.Container) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	return a.remove(ctx, v, c, true)
}

// startDetached makes and starts a task whose output is kept.
func (a *app) startDetached(ctx context.Context, v view.View, c container.Container) error {
	spec, err := client.Spec(c)
	if err != nil {
		return err
	}
	log := c.Note(noteLog)
	tio := task.IO{Stdout: log, Stderr: log, Terminal: spec.Process != nil && spec.Process.Terminal}
	if tio.Terminal {
		tio.Stderr = ""
	}
	if c.Note(noteIn) == "true" {
		if tio.Stdin, err = stdinFIFO(c); err != nil {
			return err
		}
	}
	if _, err := v.Tasks().Create(ctx, c.ID, task.CreateOptions{IO: tio}); err != nil {
		return err
	}
	if _, err := v.Tasks().Start(ctx, c.ID, ""); err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
		defer cancel()
		_, derr := v.Tasks().Delete(clean, c.ID)
		return errors.Join(err, ignoreNotFound(derr))
	}
	return nil
}

// runAttached runs a task on the streams of this program and returns its exit code.
func (a *app) runAttached(ctx context.Context, v view.View, c container.Container, interactive, tty bool) (uint32, error) {
	id := c.ID
	return a.attached(ctx, v, id, "", interactive, tty, func(io task.IO) error {
		_, err := v.Tasks().Create(ctx, id, task.CreateOptions{IO: io})
		return err
	}, func(ctx context.Context) (task.Exit, error) { return v.Tasks().Delete(ctx, id) })
}

// attached connects a process with the streams of this program: create makes
// it, destroy deletes it. Signals are passed on to it.
func (a *app) attached(ctx context.Context, v view.View, id container.ID, exec task.ExecID, interactive, tty bool,
	create func(task.IO) error, destroy func(context.Context) (task.Exit, error)) (uint32, error) {
	streams := client.Streams{Stdout: a.out, Stderr: a.err, Terminal: tty}
	started, over := make(chan struct{}), make(chan struct{})
	defer close(over)
	if interactive {
		streams.Stdin = a.in
		streams.StdinClosed = func() {
			// Short input ends before there is a process to tell it to.
			select {
			case <-started:
			case <-over:
				return
			}
			closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			if err := v.Tasks().CloseStdin(closing, id, exec); err != nil && !errdefs.IsNotFound(err) {
				fmt.Fprintln(a.err, "gantry: close standard input:", err)
			}
		}
	}
	restore, err := a.raw(interactive && tty)
	if err != nil {
		return 0, err
	}
	defer restore()
	stdio, err := client.NewStdio(a.fifoDir(), streams)
	if err != nil {
		return 0, err
	}
	defer stdio.Close()
	if err := create(stdio.IO()); err != nil {
		return 0, err
	}
	// The process must not outlive this call, whatever happens to it.
	always := context.WithoutCancel(ctx)
	defer func() {
		clean, cancel := context.WithTimeout(always, 30*time.Second)
		defer cancel()
		if _, err := destroy(clean); errdefs.IsFailedPrecondition(err) {
			if v.Tasks().Kill(clean, id, exec, uint32(unix.SIGKILL), exec == "") == nil {
				v.Tasks().Wait(clean, id, exec)
			}
			if _, err := destroy(clean); err != nil && !errdefs.IsNotFound(err) {
				fmt.Fprintln(a.err, "gantry: clean up:", err)
			}
		}
	}()
	if _, err := v.Tasks().Start(ctx, id, exec); err != nil {
		return 0, err
	}
	close(started)
	stop := a.forward(always, v, id, exec, tty)
	defer stop()
	return drained(always, v, id, exec, stdio)
}

// fifoDir is where this program makes FIFOs: beside the daemon's socket, if it may.
func (a *app) fifoDir() string { return filepath.Join(filepath.Dir(a.address), "fifo") }

// raw makes the terminal pass everything on, if wanted and possible.
func (a *app) raw(wanted bool) (restore func(), err error) {
	fd := int(a.in.Fd())
	if !wanted || !term.IsTerminal(fd) {
		return func() {}, nil
	}
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("prepare the terminal: %w", err)
	}
	return func() { term.Restore(fd, old) }, nil
}

// forward passes signals and the size of the terminal on to a process until
// stop is called.
func (a *app) forward(ctx context.Context, v view.View, id container.ID, exec task.ExecID, tty bool) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ch := make(chan os.Signal, 32)
	signal.Notify(ch, unix.SIGWINCH, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
	resize := func() {
		if w, h, err := term.GetSize(int(a.out.Fd())); err == nil && tty {
			v.Tasks().Resize(ctx, id, exec, uint32(w), uint32(h))
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		resize()
		for {
			select {
			case sig := <-ch:
				if sig == unix.SIGWINCH {
					resize()
				} else if err := v.Tasks().Kill(ctx, id, exec, uint32(sig.(syscall.Signal)), false); err != nil && !errdefs.IsNotFound(err) && ctx.Err() == nil {
					fmt.Fprintln(a.err, "gantry: pass signal on:", err)
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		signal.Stop(ch)
		cancel()
		<-done
	}
}

// runtime reads the --runtime flag.
func (a *app) runtime(flag string) (container.Runtime, error) {
	switch flag {
	case "":
		return container.Runtime{Name: client.DefaultRuntime}, nil
	case "runc", "crun", "youki":
		return client.CommandRuntime(flag)
	}
	return container.Runtime{Name: flag}, nil
}
