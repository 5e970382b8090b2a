package shimclient

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/lib/unixsock"
)

// resolve returns the path of a runtime's shim. name is io.containerd.x.y, for
// the binary containerd-shim-x-y, or an absolute path. ErrNotFound names the
// places where it was looked for, ErrInvalidArgument a name that is neither
// (contract 5.1.2 and section 15).
func (m *Manager) resolve(name string) (string, error) {
	if filepath.IsAbs(name) {
		if err := executable(name); err != nil {
			return "", fmt.Errorf("runtime %q binary not installed: %w (%w)", name, err, errdefs.ErrNotFound)
		}
		return name, nil
	}
	parts := strings.Split(name, ".")
	if len(parts) < 3 || strings.ContainsAny(name, "/\x00") {
		return "", fmt.Errorf("runtime %q is neither an absolute path nor a name like io.containerd.runc.v2: %w", name, errdefs.ErrInvalidArgument)
	}
	x, y := parts[len(parts)-2], parts[len(parts)-1]
	if x == "" || y == "" {
		return "", fmt.Errorf("runtime %q has an empty component: %w", name, errdefs.ErrInvalidArgument)
	}
	binary := "containerd-shim-" + x + "-" + y
	var looked []string
	for _, dir := range append(append([]string(nil), m.opt.ShimDirs...), filepath.SplitList(m.getenv("PATH"))...) {
		if !filepath.IsAbs(dir) {
			continue // what the daemon runs must not depend on where it was started
		}
		path := filepath.Join(dir, binary)
		if executable(path) == nil {
			return path, nil
		}
		looked = append(looked, dir)
	}
	return "", fmt.Errorf("runtime %q binary not installed: %s is in none of %s: %w", name, binary, strings.Join(looked, ", "), errdefs.ErrNotFound)
}

func executable(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("%s is not an executable file", path)
	}
	return nil
}

// getenv is a variable as shims will see it.
func (m *Manager) getenv(name string) string {
	for i := len(m.opt.Env) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(m.opt.Env[i], name+"="); ok {
			return v
		}
	}
	return os.Getenv(name)
}

// env is the environment of a shim (contract 5.2.2).
func (m *Manager) env(k key) []string {
	return append(append(os.Environ(),
		"GOMAXPROCS=2",
		"MAX_SHIM_VERSION=2",
		"TTRPC_ADDRESS="+m.opt.TTRPCAddress,
		"GRPC_ADDRESS="+m.opt.GRPCAddress,
		"NAMESPACE="+string(k.ns),
	), m.opt.Env...)
}

// argv is what shims are called with (contract 5.2.1).
func (m *Manager) argv(k key, more ...string) []string {
	a := []string{"-namespace", string(k.ns), "-address", m.opt.GRPCAddress, "-publish-binary", m.opt.SelfPath, "-id", string(k.id)}
	if m.opt.Debug {
		a = append(a, "-debug")
	}
	return append(a, more...)
}

// command is one run of a shim's binary.
type command struct {
	path, dir string
	args, env []string
	stdin     []byte
	limit     time.Duration
	limitName string
}

// maxOutput is how much of a shim command's output is read.
const maxOutput = 1 << 20

// run starts the command and waits for its end. The process is killed, with
// all of its group, at the deadline, and by the kernel if the daemon dies.
func (c command) run(ctx context.Context) (stdout, stderr []byte, err error) {
	parent := ctx
	ctx, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	var out, errOut limited
	done := make(chan error, 1)
	go func() {
		// The kernel's death signal is tied to the thread that forked.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		cmd := exec.CommandContext(ctx, c.path, c.args...)
		cmd.Dir, cmd.Env = c.dir, c.env
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(c.stdin), &out, &errOut
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
		// A shim that hands its output on to the process it leaves behind
		// must not hold us.
		cmd.WaitDelay = 250 * time.Millisecond
		done <- cmd.Run()
	}()
	err = <-done // ends soon after ctx does
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if err == nil {
		return out.b.Bytes(), errOut.b.Bytes(), nil
	}
	text := excerpt(out.b.Bytes(), errOut.b.Bytes())
	switch {
	case parent.Err() != nil:
		err = fmt.Errorf("ended by the caller: %w", context.Cause(parent))
	case ctx.Err() != nil:
		err = fmt.Errorf("did not end within %s (%s): %w", c.limit, c.limitName, ctx.Err())
	}
	if text == "" {
		return nil, nil, fmt.Errorf("%s: %w", c.path, err)
	}
	// A shim's message ends in its class, as all of them do on the wire.
	for _, class := range []error{errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrFailedPrecondition,
		errdefs.ErrPermissionDenied, errdefs.ErrResourceExhausted, errdefs.ErrNotImplemented, errdefs.ErrUnavailable} {
		if strings.HasSuffix(text, ": "+class.Error()) {
			return nil, nil, fmt.Errorf("%s: %s: %w: %w", c.path, text, err, class)
		}
	}
	return nil, nil, fmt.Errorf("%s: %s: %w", c.path, text, err)
}

// limited is a buffer that forgets what is too much.
type limited struct{ b bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := maxOutput - l.b.Len(); room > 0 {
		l.b.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// startShim runs the shim's start and returns where the shim listens.
//
// Shims of containerd 1.6 and older read the bootstrap parameters as options,
// take the instance's id for a type they do not know, and give up. That is
// what their message says, so they are started again in the old way, and at
// once next time (contract 5.2.4).
func (m *Manager) startShim(ctx context.Context, k key, b bundle, shim string, options typed.Any) (endpoint, error) {
	old := legacy(shim) || m.knownOld(shim)
	e, err := m.startOnce(ctx, k, b, shim, options, old)
	if err != nil && !old && ctx.Err() == nil && strings.Contains(err.Error(), "type with url "+string(k.id)+": not found") {
		m.learnOld(shim)
		e, err = m.startOnce(ctx, k, b, shim, options, true)
	}
	return e, err
}

func (m *Manager) startOnce(ctx context.Context, k key, b bundle, shim string, options typed.Any, old bool) (endpoint, error) {
	in, err := m.bootstrapInput(k, old, options)
	if err != nil {
		return endpoint{}, fmt.Errorf("start shim: %w", err)
	}
	out, errOut, err := command{
		path: shim, dir: b.path, args: m.argv(k, "start"), env: m.env(k), stdin: in,
		limit: m.limit.Start, limitName: "the daemon's limit for shim start",
	}.run(ctx)
	if err != nil {
		return endpoint{}, fmt.Errorf("start shim: %w", err)
	}
	e, err := parseBootstrap(out, errOut)
	if err != nil {
		return e, fmt.Errorf("start shim %s: %w", shim, err)
	}
	return e, nil
}

// binaryID tells a shim's binary from the one that replaces it.
type binaryID struct {
	path string
	mod  time.Time
	size int64
}

func identify(path string) (binaryID, bool) {
	info, err := os.Stat(path)
	if err != nil {
		return binaryID{}, false
	}
	return binaryID{path, info.ModTime(), info.Size()}, true
}

func (m *Manager) knownOld(shim string) bool {
	id, ok := identify(shim)
	m.mu.Lock()
	defer m.mu.Unlock()
	return ok && m.old[id]
}

func (m *Manager) learnOld(shim string) {
	if id, ok := identify(shim); ok {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.old[id] = true
	}
}

// deleteShim runs the shim's delete, which ends and cleans up what is left of
// a container whose shim is dead (contract 5.4.3).
func (m *Manager) deleteShim(ctx context.Context, k key, b bundle, shim string) (task.Exit, error) {
	out, _, err := command{
		path: shim, dir: b.path, args: m.argv(k, "-bundle", b.path, "delete"), env: m.env(k),
		limit: m.limit.Cleanup, limitName: "timeout shim.cleanup",
	}.run(ctx)
	if err != nil {
		return task.Exit{}, fmt.Errorf("clean up by shim delete: %w", err)
	}
	var r taskapi.DeleteResponse
	if err := proto.Unmarshal(out, &r); err != nil {
		return task.Exit{}, fmt.Errorf("clean up by shim delete: %s: answer %q: %w", shim, excerpt(out), err)
	}
	return task.Exit{ID: string(k.id), Pid: r.Pid, Status: r.ExitStatus, At: wire.TimeFromProto(r.ExitedAt)}, nil
}

// RuntimeInfo is what a runtime says of itself (contract 1.3.22).
type RuntimeInfo struct {
	Name              string
	Version, Revision string
	Options, Features typed.Any
	Annotations       map[string]string
}

// Info asks a runtime, by name or path, what it is and can do. ErrNotFound if
// it is not installed, ErrUnimplemented if it cannot say.
func (m *Manager) Info(ctx context.Context, name string, options typed.Any) (RuntimeInfo, error) {
	path, err := m.resolve(name)
	if err != nil {
		return RuntimeInfo{}, err
	}
	var in []byte
	if !options.IsZero() {
		if in, err = proto.Marshal(wire.AnyToProto(options)); err != nil {
			return RuntimeInfo{}, err
		}
	}
	out, _, err := command{
		path: path, dir: "/", args: []string{"-info"}, env: m.env(key{}), stdin: in,
		limit: m.limit.Load, limitName: "timeout shim.load",
	}.run(ctx)
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Exited() {
			return RuntimeInfo{}, fmt.Errorf("info of runtime %q: %w (%w)", name, err, errdefs.ErrNotImplemented)
		}
		return RuntimeInfo{}, fmt.Errorf("info of runtime %q: %w", name, err)
	}
	var r types.RuntimeInfo
	if err := proto.Unmarshal(out, &r); err != nil {
		return RuntimeInfo{}, fmt.Errorf("info of runtime %q: answer is no RuntimeInfo: %w (%w)", name, err, errdefs.ErrNotImplemented)
	}
	return RuntimeInfo{
		Name: r.Name, Version: r.GetVersion().GetVersion(), Revision: r.GetVersion().GetRevision(),
		Options: wire.AnyFromProto(r.Options), Features: wire.AnyFromProto(r.Features), Annotations: r.Annotations,
	}, nil
}

// The annotations by which the runc shim puts containers into one process
// (contract 5.2.9).
var groupAnnotations = [...]string{"io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"}

// guesses are the addresses at which a shim could listen whose start did not
// live to tell: sockets are named by a hash of whom they are for (contract 5.2.7).
func (m *Manager) guesses(k key, b bundle) []string {
	var out []string
	if e, ok, err := b.endpoint(); ok && err == nil {
		out = append(out, e.Address)
	}
	if raw, err := b.read(fileAddress); err == nil {
		if a := strings.TrimSpace(string(raw)); isAddress(a) {
			out = append(out, a)
		}
	}
	ids := []string{string(k.id)}
	if raw, err := os.ReadFile(b.file(fileConfig)); err == nil {
		if s, err := parseSpec(raw); err == nil {
			for _, a := range groupAnnotations {
				if g := s.Annotations[a]; g != "" {
					ids = append(ids, g)
				}
			}
		}
	}
	for _, dir := range m.socketDirs() {
		for _, id := range ids {
			sum := sha256.Sum256([]byte(filepath.Join(m.opt.GRPCAddress, string(k.ns), id)))
			out = append(out, fmt.Sprintf("unix://%s", filepath.Join(dir, fmt.Sprintf("%x", sum))))
		}
	}
	return out
}

func (m *Manager) socketDirs() []string {
	dirs := []string{"/run/containerd/s"}
	if m.opt.SocketDir != "" && m.opt.SocketDir != dirs[0] {
		dirs = append(dirs, m.opt.SocketDir)
	}
	return dirs
}

// removeSocket removes a shim's socket that nobody listens at any more. One that
// stays is untidy, not wrong.
func removeSocket(address string) {
	if network, path, err := splitAddress(address); err == nil && network == "unix" && path[0] == '/' {
		unixsock.RemoveDead(path, 0)
	}
}
