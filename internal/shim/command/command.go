//go:build linux

// Package command makes containers with the command line of an OCI runtime:
// runc, crun, or whatever understands the same commands. Every call has an
// end, and an error carries what the runtime wrote to its log.
package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/reaper"
	"github.com/gantryd/gantry/internal/shim/driver"
	"github.com/gantryd/gantry/internal/shim/execgroup"
)

const (
	consoleTimeout = 10 * time.Second
	killTimeout    = 10 * time.Second
	// waitDelay bounds how long a killed runtime's children may keep its
	// output open.
	waitDelay = time.Second
	maxLog    = 64 << 10
)

// Config says which runtime to run and how.
type Config struct {
	// Binary is the name or path of the program.
	Binary string
	// Root is where it keeps the state of its containers.
	Root string
	// Systemd has it make cgroups through systemd.
	Systemd bool
	// LogDir takes its log; in a container's bundle if empty.
	LogDir string
}

type runtime struct {
	Config
	log *slog.Logger

	once sync.Once
	help string // of its command exec
}

// New returns a driver for the runtime.
func New(c Config, log *slog.Logger) driver.Driver {
	return &runtime{Config: c, log: log}
}

type container struct {
	r          *runtime
	id, bundle string
	pid        int // of its first process
	execgroup.Groups
}

// helpTimeout bounds a runtime that is asked what it can do.
const helpTimeout = 5 * time.Second

// cgroup is where the container's execs have theirs. Most runtimes can put an
// exec into a group below the container's; with cgroup v1 that has to be of one
// hierarchy, or the exec would have no limits.
func (c *container) cgroup() (dir, controller string) {
	c.r.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), helpTimeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, c.r.Binary, "exec", "--help")
		cmd.WaitDelay = waitDelay
		out := &limited{max: maxLog}
		cmd.Stdout, cmd.Stderr = out, out
		if cmd.Run() == nil {
			c.r.help = out.buf.String()
		}
	})
	mount, option := "/sys/fs/cgroup", "--cgroup"
	if !cgroups.IsCgroup2UnifiedMode() {
		controller, option = execgroup.Freezer, "[<controller>:]<cgroup>"
		mount = filepath.Join(mount, controller)
	}
	all, err := cgroups.ParseCgroupFile("/proc/" + strconv.Itoa(c.pid) + "/cgroup")
	if err != nil || !strings.Contains(c.r.help, option) || len(all[controller]) < 2 || strings.Contains(all[controller], "..") {
		return "", ""
	}
	return mount + all[controller], controller
}

// call is one run of the runtime.
type call struct {
	args   []string
	logDir string
	stdin  io.Reader
	stdio  *driver.Stdio // for a process that stays; nil: output is caught
}

// run runs the runtime to its end and returns its output.
func (r *runtime) run(ctx context.Context, c call) ([]byte, error) {
	logFile := filepath.Join(c.logDir, "log.json")
	if c.logDir == "" {
		logFile = "/dev/null"
	}
	var before int64
	if info, err := os.Stat(logFile); err == nil {
		before = info.Size()
	}
	args := []string{"--root", r.Root, "--log", logFile, "--log-format", "json"}
	if r.Systemd {
		args = append(args, "--systemd-cgroup")
	}
	cmd := exec.CommandContext(ctx, r.Binary, append(args, c.args...)...)
	cmd.WaitDelay = waitDelay
	cmd.Dir = "/"
	cmd.Stdin = c.stdin
	out := &limited{max: maxLog}
	if c.stdio != nil {
		// An interface that holds a nil file is not nil.
		if c.stdio.In != nil {
			cmd.Stdin = c.stdio.In
		}
		if c.stdio.Out != nil {
			cmd.Stdout = c.stdio.Out
		}
		if c.stdio.Err != nil {
			cmd.Stderr = c.stdio.Err
		}
	} else {
		cmd.Stdout, cmd.Stderr = out, out
	}
	err := cmd.Run()
	if err == nil {
		return out.buf.Bytes(), nil
	}
	verb := r.Binary + " " + c.args[0]
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %w", verb, context.Cause(ctx))
	}
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("OCI runtime: %w: %w", err, errdefs.ErrNotFound)
	}
	said := lastError(logFile, before)
	if said == "" {
		said = strings.TrimSpace(out.buf.String())
	}
	if said == "" {
		return nil, fmt.Errorf("%s: %w", verb, err)
	}
	return nil, fmt.Errorf("%s: %w", verb, classify(said))
}

// classify gives the runtime's words a class where programs depend on one.
func classify(said string) error {
	err := errors.New(said)
	switch {
	case strings.Contains(said, "does not exist") && strings.Contains(said, "container"):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case strings.Contains(said, "already exists"):
		return fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
	}
	return err
}

// limited keeps the first max bytes and drops the rest.
type limited struct {
	buf bytes.Buffer
	max int
}

func (l *limited) Write(p []byte) (int, error) {
	if room := l.max - l.buf.Len(); room > 0 {
		l.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// lastError returns the last message of level error that was logged after the
// first before bytes.
func lastError(path string, before int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return ""
	}
	if _, err := f.Seek(max(before, info.Size()-maxLog), io.SeekStart); err != nil {
		return ""
	}
	b, _ := io.ReadAll(io.LimitReader(f, maxLog))
	var last string
	for line := range bytes.Lines(b) {
		var entry struct{ Level, Msg string }
		if json.Unmarshal(line, &entry) == nil && (entry.Level == "error" || entry.Level == "fatal") {
			last = entry.Msg
		}
	}
	return last
}

// withProcess runs a command that leaves a process behind, with a terminal if
// it wants one, and returns its id.
func (r *runtime) withProcess(ctx context.Context, c call, stdio driver.Stdio, args ...string) (s driver.Started, err error) {
	dir, err := os.MkdirTemp("", "gantry-run")
	if err != nil {
		return s, err
	}
	defer os.RemoveAll(dir)
	pidFile := filepath.Join(dir, "pid")
	c.args = append(c.args, "--pid-file", pidFile)
	c.stdio = &stdio
	var master chan result
	if stdio.Terminal {
		socket := filepath.Join(dir, "tty")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
		if err != nil {
			return s, err
		}
		defer l.Close()
		master = make(chan result, 1)
		go func() { master <- accept(l) }()
		c.args = append(c.args, "--console-socket", socket)
	}
	c.args = append(c.args, args...)
	if _, err = r.run(ctx, c); err != nil {
		return s, err
	}
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return s, err
	}
	if s.Pid, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		return s, fmt.Errorf("%s wrote no process id: %w", r.Binary, err)
	}
	if s.Pid <= 1 {
		return s, fmt.Errorf("%s wrote %d as process id: %w", r.Binary, s.Pid, errdefs.ErrInternal)
	}
	if master != nil {
		var got result
		select {
		case got = <-master:
		case <-time.After(consoleTimeout):
			got.err = fmt.Errorf("%s sent no terminal: %w", r.Binary, context.DeadlineExceeded)
		}
		if got.err != nil {
			_ = reaper.Kill(s.Pid, unix.SIGKILL)
			return s, got.err
		}
		s.Console = got.file
	}
	return s, nil
}

type result struct {
	file *os.File
	err  error
}

func accept(l *net.UnixListener) result {
	conn, err := l.AcceptUnix()
	if err != nil {
		return result{err: err}
	}
	defer conn.Close()
	socket, err := conn.File()
	if err != nil {
		return result{err: err}
	}
	defer socket.Close()
	f, err := driver.ReceiveConsole(socket, consoleTimeout)
	return result{f, err}
}

func (r *runtime) Create(ctx context.Context, req driver.Create) (driver.Container, driver.Started, error) {
	p := req.Spec.Process
	if err := driver.CheckProcess(p); err != nil {
		return nil, driver.Started{}, err
	}
	c := &container{r: r, id: req.ID, bundle: req.Bundle}
	c.Find = c.cgroup
	what := call{args: []string{"create", "--bundle", req.Bundle}, logDir: req.Bundle}
	if req.Restore != "" {
		what.args = []string{"restore", "--detach", "--bundle", req.Bundle, "--image-path", req.Restore}
		if req.WorkPath != "" {
			what.args = append(what.args, "--work-path", req.WorkPath)
		}
	}
	if req.NoPivotRoot {
		what.args = append(what.args, "--no-pivot")
	}
	if req.NoNewKeyring {
		what.args = append(what.args, "--no-new-keyring")
	}
	s, err := r.withProcess(ctx, what, req.Stdio, req.ID)
	if err != nil {
		if !errdefs.IsAlreadyExists(err) {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
			defer cancel()
			if _, derr := r.run(clean, call{args: []string{"delete", "--force", req.ID}}); derr != nil && !errdefs.IsNotFound(derr) {
				r.log.Debug("remove what is left of a container that could not be created", "id", req.ID, "error", derr)
			}
		}
		return nil, driver.Started{}, err
	}
	c.pid = s.Pid
	return c, s, nil
}

func (c *container) simple(ctx context.Context, args ...string) error {
	_, err := c.r.run(ctx, call{args: args, logDir: c.bundle})
	return err
}

func (c *container) Start(ctx context.Context) error  { return c.simple(ctx, "start", c.id) }
func (c *container) Pause(ctx context.Context) error  { return c.simple(ctx, "pause", c.id) }
func (c *container) Resume(ctx context.Context) error { return c.simple(ctx, "resume", c.id) }

func (c *container) Exec(ctx context.Context, id string, p *specs.Process, stdio driver.Stdio) (driver.Started, error) {
	f, err := os.CreateTemp("", "gantry-process")
	if err != nil {
		return driver.Started{}, err
	}
	defer os.Remove(f.Name())
	err = json.NewEncoder(f).Encode(p)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return driver.Started{}, err
	}
	what := call{args: []string{"exec", "--process", f.Name(), "--detach"}, logDir: c.bundle}
	if name, controller := c.Open(id); controller != "" {
		what.args = append(what.args, "--cgroup", controller+":"+name)
	} else if name != "" {
		what.args = append(what.args, "--cgroup", name)
	}
	s, err := c.r.withProcess(ctx, what, stdio, c.id)
	if err != nil {
		// The runtime may have been killed when the process was there already.
		_ = c.SignalExec(id, unix.SIGKILL)
		c.ForgetExec(id)
	}
	return s, err
}

func (c *container) Update(ctx context.Context, r *specs.LinuxResources) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = c.r.run(ctx, call{args: []string{"update", "--resources", "-", c.id}, logDir: c.bundle, stdin: bytes.NewReader(b)})
	return err
}

func (c *container) Checkpoint(ctx context.Context, k driver.Checkpoint) error {
	if _, err := exec.LookPath("criu"); err != nil {
		return fmt.Errorf("the program criu is not installed: %w: %w", err, errdefs.ErrNotImplemented)
	}
	args := []string{"checkpoint", "--image-path", k.ImagePath}
	for flag, value := range map[string]string{"--work-path": k.WorkPath, "--parent-path": k.ParentPath, "--manage-cgroups-mode": k.CgroupsMode} {
		if value != "" {
			args = append(args, flag, value)
		}
	}
	for flag, on := range map[string]bool{"--leave-running": !k.Exit, "--tcp-established": k.OpenTCP, "--ext-unix-sk": k.ExternalUnixSockets,
		"--shell-job": k.Shell, "--file-locks": k.FileLocks} {
		if on {
			args = append(args, flag)
		}
	}
	for _, ns := range k.EmptyNamespaces {
		args = append(args, "--empty-ns", ns)
	}
	return c.simple(ctx, append(args, c.id)...)
}

func (c *container) Delete(ctx context.Context) error {
	err := c.simple(ctx, "delete", c.id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func (r *runtime) Destroy(ctx context.Context, id string) (int, error) {
	var state struct {
		Pid int `json:"pid"`
	}
	if out, err := r.run(ctx, call{args: []string{"state", id}, logDir: r.LogDir}); err == nil {
		_ = json.Unmarshal(out, &state) // no pid is no reason to keep it
	}
	_, err := r.run(ctx, call{args: []string{"delete", "--force", id}, logDir: r.LogDir})
	if errdefs.IsNotFound(err) {
		err = nil
	}
	return state.Pid, err
}

func (r *runtime) Features(ctx context.Context) ([]byte, error) {
	out, err := exec.CommandContext(ctx, r.Binary, "features").Output()
	if err != nil {
		return nil, fmt.Errorf("%s features: %w", r.Binary, err)
	}
	if !json.Valid(out) {
		return nil, fmt.Errorf("%s features: answer is not JSON: %w", r.Binary, errdefs.ErrInternal)
	}
	return out, nil
}
