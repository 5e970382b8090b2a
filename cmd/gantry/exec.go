package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
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

func (a *app) execCommand() *cobra.Command {
	var interactive, tty, detach, privileged bool
	var env, envFiles []string
	var workdir, user string
	cmd := &cobra.Command{
		Use: "exec [FLAG...] CONTAINER COMMAND [ARG...]", DisableFlagsInUseLine: true, Short: "Run a command in a running container", GroupID: "run", Args: cobra.MinimumNArgs(2),
		Example: "  gantry exec -it web sh\n  gantry exec -u nobody -w /tmp web ls -l",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if detach && interactive {
				return errors.New("--detach and --interactive exclude each other")
			}
			if err := a.needsTerminal(interactive, tty); err != nil {
				return err
			}
			v, err := a.view(ctx)
			if err != nil {
				return err
			}
			c, err := a.find(ctx, v, args[0])
			if err != nil {
				return err
			}
			p, err := v.Tasks().Get(ctx, c.ID, "")
			if err != nil {
				return a.notRunning(c, "exec in", err)
			}
			switch p.Status {
			case task.StatusPaused:
				return &hinted{fmt.Errorf("exec in container %s: it is paused: %w", c.ID, errdefs.ErrFailedPrecondition), "use " + a.us() + " unpause " + string(c.ID)}
			case task.StatusStopped, task.StatusCreated:
				return a.notRunning(c, "exec in", errdefs.ErrNotFound)
			}
			spec, err := client.Spec(c)
			if err != nil {
				return err
			}
			if spec.Process == nil {
				return fmt.Errorf("exec in container %s: its spec has no process: %w", c.ID, errdefs.ErrFailedPrecondition)
			}
			proc := *spec.Process
			proc.Args, proc.CommandLine, proc.Terminal, proc.ConsoleSize = args[1:], "", tty, nil
			vars, err := environment(envFiles, env)
			if err != nil {
				return err
			}
			proc.Env = oci.MergeEnv(proc.Env, vars)
			if tty && !slices.ContainsFunc(proc.Env, func(e string) bool { return strings.HasPrefix(e, "TERM=") }) {
				proc.Env = append(slices.Clone(proc.Env), "TERM=xterm")
			}
			if workdir != "" {
				proc.Cwd = workdir
			}
			if user != "" {
				if proc.User, err = client.ResolveUser(fmt.Sprintf("/proc/%d/root", p.Pid), user); err != nil {
					return fmt.Errorf("exec in container %s: %w", c.ID, err)
				}
			}
			if privileged {
				facts, err := client.HostFacts(false)
				if err != nil {
					return err
				}
				all := facts.Capabilities
				proc.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
			}
			body, err := client.Encode(client.ProcessURL, proc)
			if err != nil {
				return err
			}
			name, err := newID()
			if err != nil {
				return err
			}
			exec := task.ExecID("exec-" + name)
			create := func(io task.IO) error {
				return v.Tasks().Exec(ctx, c.ID, exec, task.ExecOptions{IO: io, Spec: body})
			}
			if detach {
				if err := create(task.IO{Terminal: tty}); err != nil {
					return err
				}
				if _, err := v.Tasks().Start(ctx, c.ID, exec); err != nil {
					clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
					defer cancel()
					_, derr := v.Tasks().DeleteExec(clean, c.ID, exec)
					return errors.Join(err, ignoreNotFound(derr))
				}
				fmt.Fprintln(a.out, exec)
				return nil
			}
			code, err := a.attached(ctx, v, c.ID, exec, interactive, tty, create, func(ctx context.Context) (task.Exit, error) {
				return v.Tasks().DeleteExec(ctx, c.ID, exec)
			})
			return exitError(code, err)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the container is the command's
	f.BoolVarP(&interactive, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&tty, "tty", "t", false, "give it a terminal")
	f.BoolVarP(&detach, "detach", "d", false, "run it in the background and print its exec id")
	f.StringArrayVarP(&env, "env", "e", nil, "set `NAME=VALUE`, or pass NAME on")
	f.StringArrayVar(&envFiles, "env-file", nil, "read variables from a `file`")
	f.StringVarP(&workdir, "workdir", "w", "", "`directory` to start in")
	f.StringVarP(&user, "user", "u", "", "`user[:group]` to run as")
	f.BoolVar(&privileged, "privileged", false, "give it all capabilities")
	return cmd
}

// environment reads the flags --env-file and --env.
func environment(files, list []string) ([]string, error) {
	var vars []string
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
		some, err := oci.ParseEnvFile(f, os.LookupEnv)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("--env-file %s: %w", path, err)
		}
		vars = append(vars, some...)
	}
	for _, e := range list {
		name, _, given := strings.Cut(e, "=")
		if name == "" {
			return nil, fmt.Errorf("--env %q: it has no name: %w", e, errdefs.ErrInvalidArgument)
		}
		if !given {
			v, ok := os.LookupEnv(e)
			if !ok {
				continue
			}
			e += "=" + v
		}
		vars = append(vars, e)
	}
	return vars, nil
}

func (a *app) attachCommand() *cobra.Command {
	var noStdin, noSignals bool
	cmd := &cobra.Command{
		Use: "attach CONTAINER", Short: "Connect to a running container's streams", GroupID: "run", Args: cobra.ExactArgs(1),
		Long: "Connects this terminal with the first process of a container, and returns its exit code.\nOf a container that keeps its output (run -d), it shows what is printed from now on.",
		RunE: a.inView(func(ctx context.Context, v view.View, args []string) error {
			c, err := a.find(ctx, v, args[0])
			if err != nil {
				return err
			}
			p, err := v.Tasks().Get(ctx, c.ID, "")
			if err != nil || p.Status == task.StatusStopped {
				if err == nil {
					err = errdefs.ErrNotFound
				}
				return a.notRunning(c, "attach to", err)
			}
			code, err := a.attach(ctx, v, c, p, !noStdin, !noSignals)
			return exitError(code, err)
		}),
	}
	cmd.Flags().BoolVar(&noStdin, "no-stdin", false, "do not connect standard input")
	cmd.Flags().BoolVar(&noSignals, "no-signals", false, "do not pass signals on; an interrupt only ends this command")
	return cmd
}

// attach connects with a process that somebody else started.
func (a *app) attach(ctx context.Context, v view.View, c container.Container, p task.Process, stdin, signals bool) (uint32, error) {
	files, kept := logFiles(c, p.IO.Stdout)
	streams := client.Streams{Stdout: a.out, Stderr: a.err, Terminal: p.IO.Terminal}
	paths := p.IO
	if kept {
		paths.Stdout, paths.Stderr = "", ""
	}
	if stdin && p.IO.Stdin != "" {
		streams.Stdin = a.in
	}
	for _, path := range []string{paths.Stdin, paths.Stdout, paths.Stderr} {
		if strings.Contains(path, "://") {
			return 0, &hinted{fmt.Errorf("attach to container %s: its output goes to %s: %w", c.ID, path, errdefs.ErrFailedPrecondition), "a logging program has it: see gantry logs, or the tool that made the container"}
		}
	}
	restore, err := a.raw(streams.Stdin != nil && p.IO.Terminal)
	if err != nil {
		return 0, err
	}
	defer restore()
	began := time.Now() // the answer to what is typed may be kept before it is looked for
	stdio, err := client.AttachStdio(paths, streams)
	if err != nil {
		return 0, err
	}
	defer stdio.Close()
	waiting := ctx
	if signals {
		waiting = context.WithoutCancel(ctx)
		defer a.forward(waiting, v, c.ID, "", p.IO.Terminal)()
	}
	if kept {
		l := &logReader{files: files, out: a.out, err: a.err, follow: true, tail: 0, fresh: began}
		if err := l.run(waiting, a.ended(waiting, v, c.ID)); err != nil {
			return 0, err
		}
	}
	return drained(waiting, v, c.ID, "", stdio)
}

// drained waits for the end of a process and of its output, and returns its exit code.
func drained(ctx context.Context, v view.View, id container.ID, exec task.ExecID, stdio *client.Stdio) (uint32, error) {
	exit, err := v.Tasks().Wait(ctx, id, exec)
	if err != nil {
		return 0, err
	}
	drain, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	if err := stdio.Wait(drain); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return 0, err
	}
	return exit.Status, nil
}

// drainTimeout bounds the wait for output that a descendant of an ended
// process may still hold open.
const drainTimeout = 10 * time.Second

// stdinFIFO makes the FIFO through which attach reaches a detached container
// that was run with --interactive.
func stdinFIFO(c container.Container) (string, error) {
	dir := keptDir(c)
	if dir == "" {
		return "", nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("keep standard input of %s: %w", c.ID, err)
	}
	path := filepath.Join(dir, "stdin")
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return "", fmt.Errorf("keep standard input of %s: make FIFO %s: %w", c.ID, path, err)
	}
	return path, nil
}

// needsTerminal says in time that -t without a terminal is a mistake.
func (a *app) needsTerminal(interactive, tty bool) error {
	if interactive && tty && !term.IsTerminal(int(a.in.Fd())) {
		return &hinted{errors.New("standard input is not a terminal"), "leave --tty (-t) out when input comes from a file or a pipe"}
	}
	return nil
}
