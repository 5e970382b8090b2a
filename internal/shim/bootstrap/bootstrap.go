//go:build linux

// Package bootstrap is the shim's life around its service: how a daemon of any
// age starts it and is told where it listens (contract 5.2), how it serves, and
// how what a dead shim left is removed.
package bootstrap

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantryd/gantry/internal/lib/reaper"
	"github.com/gantryd/gantry/internal/lib/unixsock"
	"github.com/gantryd/gantry/internal/shim/command"
	"github.com/gantryd/gantry/internal/shim/driver"
	"github.com/gantryd/gantry/internal/shim/libct"
	"github.com/gantryd/gantry/internal/shim/stdio"
	"github.com/gantryd/gantry/internal/shim/task"
)

const (
	// Name is what the program and the runtime are called.
	Name        = "containerd-shim-runc-v2"
	runtimeName = "io.containerd.runc.v2"

	defaultRoot   = "/run/containerd/runc"
	maxStdin      = 4 << 20
	stdinTimeout  = 10 * time.Second
	lockTimeout   = 10 * time.Second
	dialTimeout   = 5 * time.Second
	deleteTimeout = 30 * time.Second
	dyingTime     = 200 * time.Millisecond // how long a killed process may keep its files
	maxSocketPath = 106                    // sun_path, its final zero and one to spare
	maxConfig     = 32 << 20

	featuresType = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
)

// Build says which build this is.
type Build struct {
	Version, Revision string
}

// Args is a command line (contract 5.2.1, 8.3.1).
type Args struct {
	Address, Bundle, DebugSocket, ID, Namespace, PublishBinary, Socket string
	Debug, Info, Version                                               bool
	// Action is start, delete, or empty to serve.
	Action string
}

// Parse reads a command line without the program's name.
func Parse(args []string, output io.Writer) (Args, error) {
	var a Args
	f := flag.NewFlagSet(Name, flag.ContinueOnError)
	f.SetOutput(output)
	f.StringVar(&a.Address, "address", "", "grpc address of the daemon")
	f.StringVar(&a.Bundle, "bundle", "", "path of the bundle, if not the working directory")
	f.BoolVar(&a.Debug, "debug", false, "log more")
	f.StringVar(&a.DebugSocket, "debug-socket", "", "accepted and ignored")
	f.StringVar(&a.ID, "id", "", "id of the task")
	f.BoolVar(&a.Info, "info", false, "describe the runtime whose options are on stdin")
	f.StringVar(&a.Namespace, "namespace", "", "namespace that owns the shim")
	f.StringVar(&a.PublishBinary, "publish-binary", "", "accepted; events go to TTRPC_ADDRESS")
	f.StringVar(&a.Socket, "socket", "", "path of the socket to serve")
	f.BoolVar(&a.Version, "v", false, "show the version and exit")
	f.BoolVar(&a.Version, "version", false, "show the version and exit")
	if err := f.Parse(args); err != nil {
		return a, err
	}
	a.Action = f.Arg(0)
	return a, nil
}

// Main runs the program and returns its exit code.
func Main(b Build, args []string) int {
	a, err := Parse(args, os.Stderr)
	if err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if err := run(b, a); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", Name, err)
		return 1
	}
	return 0
}

func run(b Build, a Args) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if a.Version {
		fmt.Printf("%s:\n  Version:  %s\n  Revision: %s\n  Go version: %s\n", Name, b.Version, b.Revision, runtime.Version())
		return nil
	}
	if a.Info {
		return info(b, os.Stdin, os.Stdout, log)
	}
	if a.Namespace == "" {
		return fmt.Errorf("-namespace is missing: %w", errdefs.ErrInvalidArgument)
	}
	switch a.Action {
	case "start":
		return start(a, os.Stdin, os.Stdout)
	case "delete":
		return remove(a, os.Stdout, log)
	case "":
		return serve(b, a)
	}
	return fmt.Errorf("action %q: want start, delete, or none to serve: %w", a.Action, errdefs.ErrInvalidArgument)
}

// newDriver chooses the driver for runtime options: the library, unless a
// program is named.
func newDriver(namespace string, o *options.Options, limits libct.Limits, log *slog.Logger) (driver.Driver, error) {
	if namespace != filepath.Base(namespace) {
		return nil, fmt.Errorf("namespace %q: %w", namespace, errdefs.ErrInvalidArgument)
	}
	root := cmp.Or(o.Root, defaultRoot)
	root = filepath.Join(root, namespace)
	if o.BinaryName == "" {
		return libct.New(root, limits, log), nil
	}
	return command.New(command.Config{Binary: o.BinaryName, Root: root, Systemd: o.SystemdCgroup}, log), nil
}

// request is what the daemon said on stdin.
type request struct {
	params  *bootapi.BootstrapParams // nil from a daemon before 2.3
	options *options.Options
}

// decode understands what any daemon sends (contract 5.2.4): parameters for
// this instance, the bare runtime options of older daemons, or nothing.
func decode(a Args, in []byte) (request, error) {
	if len(in) == 0 {
		return request{options: &options.Options{}}, nil
	}
	var params bootapi.BootstrapParams
	perr := proto.Unmarshal(in, &params)
	if perr == nil && params.InstanceID == a.ID && params.Namespace == a.Namespace {
		r := request{params: &params, options: &options.Options{}}
		for _, e := range params.Extensions {
			// Extensions of a kind that we do not know are for others.
			if o, err := task.Options(e.GetValue()); err == nil {
				r.options = o
			} else if strings.HasSuffix(e.GetValue().GetTypeUrl(), "containerd.runc.v1.Options") {
				return r, err
			}
		}
		return r, nil
	}
	var legacy anypb.Any
	if err := proto.Unmarshal(in, &legacy); err != nil {
		return request{}, fmt.Errorf("stdin holds neither bootstrap parameters nor runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if perr == nil && len(legacy.ProtoReflect().GetUnknown()) > 0 {
		return request{}, fmt.Errorf("bootstrap parameters are for %s/%s, and the flags for %s/%s: %w",
			params.Namespace, params.InstanceID, a.Namespace, a.ID, errdefs.ErrInvalidArgument)
	}
	o, err := task.Options(&legacy)
	return request{options: o}, err
}

// answer says where the shim listens, in words that the daemon understands:
// a message for one that sent parameters, JSON for one that can do version 3,
// and else the bare address, which is all that containerd 1.6 reads and which
// means version 2 to every other.
func answer(r request, maxVersion, address string) ([]byte, error) {
	if r.params != nil {
		return proto.Marshal(&bootapi.BootstrapResult{Version: 3, Address: address, Protocol: "ttrpc"})
	}
	if v, err := strconv.Atoi(maxVersion); err == nil && v >= 3 {
		return json.Marshal(struct {
			Version  int    `json:"version"`
			Address  string `json:"address"`
			Protocol string `json:"protocol"`
		}{3, address, "ttrpc"})
	}
	return []byte(address), nil
}

// group returns under which id the container's shim is found: that of its pod
// if its spec says so (contract 5.2.9).
func group(bundle, id string) (string, error) {
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if errors.Is(err, os.ErrNotExist) {
		return id, nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.NewDecoder(io.LimitReader(f, maxConfig)).Decode(&spec); err != nil {
		return "", fmt.Errorf("%s: %w: %w", f.Name(), err, errdefs.ErrInvalidArgument)
	}
	for _, name := range []string{"io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"} {
		if g := spec.Annotations[name]; g != "" {
			return g, nil
		}
	}
	return id, nil
}

// socketDir returns the directory for sockets (contract 5.2.7).
func socketDir(r request, uid int, getenv func(string) string) string {
	if d := r.params.GetSocketDir(); d != "" {
		return d
	}
	if uid == 0 {
		return "/run/containerd/s"
	}
	if d := getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "containerd", "s")
	}
	if d := filepath.Join("/run", strconv.Itoa(uid)); exists(d) {
		return filepath.Join(d, "containerd", "s")
	}
	return "/tmp/containerd-s-" + strconv.Itoa(uid)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// socketPath names a socket after the daemon, the namespace and the id, so
// that every start for one pod finds the same. A name that does not fit the
// kernel's limit is cut, to no less than 16 digits.
func socketPath(dir, daemon, namespace, id string) (string, error) {
	sum := sha256.Sum256([]byte(filepath.Join(daemon, namespace, id)))
	name := hex.EncodeToString(sum[:])
	room := maxSocketPath - len(dir) - 1
	if room < 16 {
		return "", fmt.Errorf("socket directory %s is too long for a socket: %w", dir, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(dir, name[:min(room, len(name))]), nil
}

// makeSocketDir makes the directory, which only its owner may enter.
func makeSocketDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("socket directory %s is not ours: %w", dir, errdefs.ErrPermissionDenied)
	}
	if st.Mode&0o777 != 0o700 {
		return os.Chmod(dir, 0o700)
	}
	return nil
}

// listen returns a new socket, or none if a shim listens there already. A
// socket that nobody listens on is replaced.
func listen(path string) (*net.UnixListener, error) {
	unlock, err := unixsock.Lock(filepath.Dir(path), lockTimeout)
	if err != nil {
		return nil, err
	}
	defer unlock()
	for range 10 { // shims that end remove theirs at any time
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err == nil {
			l.SetUnlinkOnClose(false)
			return l, os.Chmod(path, 0o600)
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, err
		}
		conn, derr := net.DialTimeout("unix", path, dialTimeout)
		switch {
		case derr == nil:
			conn.Close()
			return nil, nil
		case errors.Is(derr, unix.EAGAIN): // it listens, and many have come at once
			return nil, nil
		case errors.Is(derr, unix.ENOENT):
			continue
		case !errors.Is(derr, unix.ECONNREFUSED):
			return nil, derr
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("socket %s: %w", path, unix.EADDRINUSE)
}

// start makes sure that a shim serves the container and says where.
func start(a Args, stdin *os.File, stdout io.Writer) (err error) {
	if a.ID == "" {
		return fmt.Errorf("-id is missing: %w", errdefs.ErrInvalidArgument)
	}
	_ = stdin.SetReadDeadline(time.Now().Add(stdinTimeout)) // not every kind of file has one
	in, err := io.ReadAll(io.LimitReader(stdin, maxStdin+1))
	if err != nil {
		return fmt.Errorf("read stdin: %w", err)
	}
	if len(in) > maxStdin {
		return fmt.Errorf("stdin has more than %d bytes: %w", maxStdin, errdefs.ErrInvalidArgument)
	}
	r, err := decode(a, in)
	if err != nil {
		return err
	}
	bundle, err := os.Getwd()
	if err != nil {
		return err
	}
	if a.Bundle != "" {
		bundle = a.Bundle
	}
	g, err := group(bundle, a.ID)
	if err != nil {
		return err
	}
	dir := socketDir(r, os.Geteuid(), os.Getenv)
	if err := makeSocketDir(dir); err != nil {
		return err
	}
	path, err := socketPath(dir, a.Address, a.Namespace, g)
	if err != nil {
		return err
	}
	l, err := listen(path)
	if err != nil {
		return err
	}
	address := "unix://" + path
	if l != nil {
		defer l.Close()
		pid, err := spawn(a, r, bundle, path, l)
		if err != nil {
			os.Remove(path)
			return err
		}
		defer func() {
			if err != nil {
				_ = reaper.Kill(pid, unix.SIGKILL)
				os.Remove(path)
			}
		}()
		if err = adjustOOM(pid); err != nil {
			return err
		}
		if c := r.options.ShimCgroup; c != "" {
			if err = joinCgroup(c, pid); err != nil {
				return err
			}
		}
	}
	// The daemon of old reads it again after its restart.
	if err = writeAddress(bundle, address); err != nil {
		return err
	}
	out, err := answer(r, os.Getenv("MAX_SHIM_VERSION"), address)
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}

func writeAddress(bundle, address string) error {
	temp := filepath.Join(bundle, ".address")
	if err := os.WriteFile(temp, []byte(address), 0o600); err != nil {
		return err
	}
	return os.Rename(temp, filepath.Join(bundle, "address"))
}

// spawn starts this program again, to serve.
func spawn(a Args, r request, bundle, path string, l *net.UnixListener) (pid int, err error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	f, err := l.File()
	if err != nil {
		return 0, err
	}
	defer f.Close()
	args := []string{"-namespace", a.Namespace, "-id", a.ID, "-address", a.Address, "-socket", path}
	if a.Debug || r.params.GetLogLevel() == bootapi.LogLevel_LOG_LEVEL_DEBUG || r.params.GetLogLevel() == bootapi.LogLevel_LOG_LEVEL_TRACE {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, args...)
	cmd.Dir = bundle
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = os.Environ()
	if os.Getenv("GOMAXPROCS") == "" {
		cmd.Env = append(cmd.Env, "GOMAXPROCS=2")
	}
	if t := r.params.GetContainerdTtrpcAddress(); t != "" {
		cmd.Env = append(cmd.Env, "TTRPC_ADDRESS="+t)
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	pid = cmd.Process.Pid // Release forgets it
	return pid, cmd.Process.Release()
}

// adjustOOM makes the shim a little likelier to be killed for lack of memory
// than the daemon that started it, and never likelier than the kernel allows.
func adjustOOM(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", os.Getppid()))
	if err != nil {
		return nil // the daemon is gone
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return err
	}
	err = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(oomScore(score))), 0)
	if errors.Is(err, os.ErrPermission) {
		return nil // lowering needs a capability; what was inherited stays
	}
	return err
}

func oomScore(daemon int) int { return max(-1000, min(daemon+1, 1000)) }

// joinCgroup moves a process to an existing cgroup, in every hierarchy.
func joinCgroup(path string, pid int) error {
	dirs := []string{"/sys/fs/cgroup"}
	if !exists("/sys/fs/cgroup/cgroup.controllers") {
		var err error
		if dirs, err = filepath.Glob("/sys/fs/cgroup/*"); err != nil {
			return err
		}
	}
	joined := false
	for _, d := range dirs {
		procs := filepath.Join(d, path, "cgroup.procs")
		if !exists(procs) {
			continue
		}
		if err := os.WriteFile(procs, []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
		joined = true
	}
	if !joined {
		return fmt.Errorf("shim cgroup %s: %w", path, errdefs.ErrNotFound)
	}
	return nil
}

// remove kills and cleans up what a shim that is gone left of a container.
func remove(a Args, stdout io.Writer, log *slog.Logger) error {
	bundle := a.Bundle
	if bundle == "" {
		var err error
		if bundle, err = os.Getwd(); err != nil {
			return err
		}
	}
	id := a.ID
	if id == "" || id != filepath.Base(id) || strings.HasPrefix(id, ".") {
		return fmt.Errorf("-id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	o, err := task.LoadOptions(bundle)
	if err != nil {
		return err
	}
	d, err := newDriver(a.Namespace, o, libct.Inherited(), log)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
	defer cancel()
	pid, derr := d.Destroy(ctx, id)
	if derr != nil {
		derr = fmt.Errorf("delete container %s: %w", id, derr)
	}
	if pid <= 0 {
		if b, err := os.ReadFile(filepath.Join(bundle, "init.pid")); err == nil {
			if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
				pid = n
			}
		}
	}
	if err := errors.Join(derr, task.UnmountRootfs(bundle)); err != nil {
		return err
	}
	removeSocket(bundle)
	out, err := proto.Marshal(&taskapi.DeleteResponse{Pid: uint32(max(pid, 0)), ExitStatus: 128 + uint32(unix.SIGKILL), ExitedAt: timestamppb.Now()})
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}

// removeSocket removes the socket of the shim that served the bundle, if it does
// not any more.
func removeSocket(bundle string) {
	b, err := os.ReadFile(filepath.Join(bundle, "address"))
	if err != nil {
		return
	}
	if path, ok := strings.CutPrefix(string(b), "unix://"); ok && filepath.IsAbs(path) {
		unixsock.RemoveDead(path, dyingTime)
	}
}

// info describes the runtime that the options on stdin choose.
func info(b Build, stdin io.Reader, stdout io.Writer, log *slog.Logger) error {
	in, err := io.ReadAll(io.LimitReader(stdin, maxStdin))
	if err != nil {
		return err
	}
	var a anypb.Any
	if err := proto.Unmarshal(in, &a); err != nil {
		return fmt.Errorf("stdin holds no runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	o, err := task.Options(&a)
	if err != nil {
		return err
	}
	d, err := newDriver("default", o, libct.Inherited(), log)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
	defer cancel()
	res := &types.RuntimeInfo{Name: runtimeName, Version: &types.RuntimeVersion{Version: b.Version, Revision: b.Revision},
		Annotations: map[string]string{stdio.Annotation: stdio.FormatCRI}}
	if a.TypeUrl != "" {
		res.Options = &a
	}
	f, err := d.Features(ctx)
	if err != nil {
		// A runtime that cannot describe itself can still run containers.
		log.Warn("runtime tells no features", "error", err)
	} else {
		res.Features = &anypb.Any{TypeUrl: featuresType, Value: f}
	}
	out, err := proto.Marshal(res)
	if err != nil {
		return err
	}
	_, err = stdout.Write(out)
	return err
}
