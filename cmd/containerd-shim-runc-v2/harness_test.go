//go:build linux

package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/internal/lib/reaper"
)

const namespace = "gantry-shim-test"

var shim struct {
	once sync.Once
	path string
	err  error
}

// binary builds the shim once for all tests.
func binary(t testing.TB) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("containers need root")
	}
	if _, err := os.Stat("/bin/busybox"); err != nil {
		t.Skip("the containers' program is missing: ", err)
	}
	shim.once.Do(func() {
		dir, err := os.MkdirTemp("", "gshim")
		if err != nil {
			shim.err = err
			return
		}
		shim.path = filepath.Join(dir, "containerd-shim-runc-v2")
		args := []string{"build", "-tags", "seccomp", "-o", shim.path}
		if os.Getenv("GANTRY_SHIM_RACE") != "" {
			args = append(args, "-race") // then its log tells of races
		}
		out, err := exec.Command("go", append(args, ".")...).CombinedOutput()
		if err != nil {
			shim.err = fmt.Errorf("%w: %s", err, out)
			return
		}
		shim.err = busybox(filepath.Join(dir, "rootfs"))
	})
	if shim.err != nil {
		t.Fatal(shim.err)
	}
	return shim.path
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shim.path != "" {
		os.RemoveAll(filepath.Dir(shim.path))
	}
	os.Exit(code)
}

// busybox makes a root file system of one program.
func busybox(root string) error {
	for _, d := range []string{"bin", "dev", "proc", "sys", "tmp", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"sh", "sleep", "cat", "echo", "true", "false", "stty", "tail", "dd", "id", "head", "kill"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			return err
		}
	}
	return nil
}

// daemon is what a shim needs of containerd: a place for its events.
type daemon struct {
	t       testing.TB
	dir     string
	sockets string
	address string
	got     chan struct{}

	mu     sync.Mutex
	events []event
}

type event struct {
	topic string
	msg   proto.Message
}

func newDaemon(t testing.TB) *daemon {
	t.Helper()
	d := newDaemonAway(t)
	d.serve()
	return d
}

// newDaemonAway does not take events before serve is called.
func newDaemonAway(t testing.TB) *daemon {
	t.Helper()
	binary(t)
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, dir: dir, sockets: filepath.Join(dir, "s"), address: filepath.Join(dir, "ttrpc"), got: make(chan struct{}, 1)}
	t.Cleanup(func() {
		if m, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir)); err != nil || len(m) != 0 {
			t.Errorf("mounts are left: %v %v", m, err)
			for i := len(m) - 1; i >= 0; i-- {
				_ = unix.Unmount(m[i].Mountpoint, unix.MNT_DETACH)
			}
		}
		os.RemoveAll(dir)
	})
	return d
}

// serve listens for events until the test ends or stop is called, which lets
// the calls under way be answered: a shim repeats what was not.
func (d *daemon) serve() (stop func()) {
	d.t.Helper()
	server, err := ttrpc.NewServer()
	if err != nil {
		d.t.Fatal(err)
	}
	eventsapi.RegisterTTRPCEventsService(server, d)
	l, err := net.Listen("unix", d.address)
	if err != nil {
		d.t.Fatal(err)
	}
	go server.Serve(context.Background(), l)
	stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			d.t.Errorf("stop to listen for events: %v", err)
		}
	})
	d.t.Cleanup(stop)
	return stop
}

func (d *daemon) Forward(_ context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	var m proto.Message
	switch r.Envelope.Event.TypeUrl {
	case "containerd.events.TaskCreate":
		m = &events.TaskCreate{}
	case "containerd.events.TaskStart":
		m = &events.TaskStart{}
	case "containerd.events.TaskExit":
		m = &events.TaskExit{}
	case "containerd.events.TaskDelete":
		m = &events.TaskDelete{}
	case "containerd.events.TaskOOM":
		m = &events.TaskOOM{}
	case "containerd.events.TaskExecAdded":
		m = &events.TaskExecAdded{}
	case "containerd.events.TaskExecStarted":
		m = &events.TaskExecStarted{}
	case "containerd.events.TaskPaused":
		m = &events.TaskPaused{}
	case "containerd.events.TaskResumed":
		m = &events.TaskResumed{}
	case "containerd.events.TaskCheckpointed":
		m = &events.TaskCheckpointed{}
	default:
		d.t.Errorf("event of type %q", r.Envelope.Event.TypeUrl)
		return &emptypb.Empty{}, nil
	}
	if err := proto.Unmarshal(r.Envelope.Event.Value, m); err != nil {
		d.t.Error(err)
	}
	if r.Envelope.Namespace != namespace || r.Envelope.Timestamp == nil {
		d.t.Errorf("envelope %v", r.Envelope)
	}
	d.mu.Lock()
	d.events = append(d.events, event{r.Envelope.Topic, m})
	d.mu.Unlock()
	select {
	case d.got <- struct{}{}:
	default:
	}
	return &emptypb.Empty{}, nil
}

// topics returns what was published about a container, with the id of the
// process where an event has one.
func (d *daemon) topics(id string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []string
	for _, e := range d.events {
		if e.msg.(interface{ GetContainerID() string }).GetContainerID() != id {
			continue
		}
		line := e.topic
		switch m := e.msg.(type) {
		case *events.TaskExit:
			line += fmt.Sprintf(" %s %d", m.ID, m.ExitStatus)
		case *events.TaskExecStarted:
			line += " " + m.ExecID
		case *events.TaskExecAdded:
			line += " " + m.ExecID
		}
		out = append(out, line)
	}
	return out
}

// await waits until an event of the container has this topic line.
func (d *daemon) await(id, line string) {
	d.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		for _, l := range d.topics(id) {
			if l == line {
				return
			}
		}
		select {
		case <-d.got:
		case <-deadline:
			d.t.Fatalf("no %q among %q", line, d.topics(id))
		}
	}
}

// task is a container, its bundle and the connection to its shim.
type task struct {
	*daemon
	id, bundle string
	spec       *specs.Spec
	opts       *options.Options
	client     *ttrpc.Client
	service    string // containerd.task.v2.Task or v3
	in         *os.File
	stdin      string
	stdout     string
	stderr     string
	out, errs  *output
	terminal   bool
	shimPid    int
}

// output collects what comes out of a FIFO.
type output struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
	f    *os.File
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func (o *output) await(t testing.TB, want string) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for !strings.Contains(o.String(), want) {
		select {
		case <-o.more:
		case <-deadline:
			t.Fatalf("no %q in %q", want, o.String())
		}
	}
}

func fifo(t testing.TB, path string) string {
	t.Helper()
	if err := unix.Mkfifo(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t testing.TB, path string) *output {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	o := &output{more: make(chan struct{}, 1), f: f}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := f.Read(buf)
			o.mu.Lock()
			o.buf.Write(buf[:n])
			o.mu.Unlock()
			select {
			case o.more <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { f.Close() })
	return o
}

// newTask writes a bundle for a command; nothing is started yet.
func (d *daemon) newTask(id string, args ...string) *task {
	d.t.Helper()
	k := &task{daemon: d, id: id, bundle: filepath.Join(d.dir, "b", id), opts: &options.Options{}, service: "containerd.task.v3.Task"}
	// The state of a container must not meet that of another run.
	k.opts.Root = filepath.Join(d.dir, "runc")
	for _, p := range []string{"rootfs", "upper", "work"} {
		if err := os.MkdirAll(filepath.Join(k.bundle, p), 0o711); err != nil {
			d.t.Fatal(err)
		}
	}
	caps := []string{"CAP_KILL", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN"}
	k.spec = &specs.Spec{
		Version:  "1.0.2",
		Hostname: "box",
		Root:     &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/bin", "TERM=xterm"},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=64k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/" + filepath.Base(d.dir) + "/" + id,
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace}},
		},
	}
	log := read(d.t, fifo(d.t, k.bundle+"/log"))
	d.t.Cleanup(func() {
		k.cleanup()
		if strings.Contains(log.String(), "panic") {
			d.t.Error("the shim panicked")
		}
		if d.t.Failed() {
			d.t.Logf("log of %s: %s", id, log)
		}
	})
	return k
}

func (k *task) rootfs() []*types.Mount {
	lower := filepath.Join(filepath.Dir(shim.path), "rootfs")
	return []*types.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"lowerdir=" + lower, "upperdir=" + k.bundle + "/upper", "workdir=" + k.bundle + "/work"}}}
}

// fifos gives the first process three FIFOs, with readers on two.
func (k *task) fifos() *task {
	k.t.Helper()
	k.stdin, k.stdout, k.stderr = fifo(k.t, k.bundle+"/in"), fifo(k.t, k.bundle+"/out"), fifo(k.t, k.bundle+"/err")
	k.out, k.errs = read(k.t, k.stdout), read(k.t, k.stderr)
	return k
}

func (k *task) writeSpec() {
	k.t.Helper()
	b, err := json.Marshal(k.spec)
	if err != nil {
		k.t.Fatal(err)
	}
	if err := os.WriteFile(k.bundle+"/config.json", b, 0o600); err != nil {
		k.t.Fatal(err)
	}
}

func any(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: b}
}

func asJSON(t testing.TB, name string, v interface{}) *anypb.Any {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/" + name, Value: b}
}

// command is one run of the shim's binary as the daemon does it.
func (k *task) command(stdin []byte, args ...string) *exec.Cmd {
	cmd := exec.Command(binary(k.t), append([]string{"-namespace", namespace, "-address", k.dir + "/grpc", "-publish-binary", "/bin/false", "-id", k.id}, args...)...)
	cmd.Dir = k.bundle
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2", "MAX_SHIM_VERSION=2", "TTRPC_ADDRESS="+k.address, "GRPC_ADDRESS="+k.dir+"/grpc", "NAMESPACE="+namespace)
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	return cmd
}

func (k *task) params() []byte {
	k.t.Helper()
	p := &bootapi.BootstrapParams{InstanceID: k.id, Namespace: namespace, ContainerdTtrpcAddress: k.address, SocketDir: &k.sockets,
		Extensions: []*bootapi.Extension{{Value: any(k.t, k.opts)}}}
	b, err := proto.Marshal(p)
	if err != nil {
		k.t.Fatal(err)
	}
	return b
}

// start starts or joins a shim and connects to it.
func (k *task) start() *task {
	k.t.Helper()
	k.writeSpec()
	cmd := k.command(k.params(), "start")
	out, err := cmd.CombinedOutput()
	if err != nil {
		k.t.Fatalf("start: %v: %s", err, out)
	}
	var r bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &r); err != nil {
		k.t.Fatalf("answer %q: %v", out, err)
	}
	k.connect(r.Address)
	return k
}

func (k *task) connect(address string) {
	k.t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		k.t.Fatal(err)
	}
	k.client = ttrpc.NewClient(conn)
	var c taskapi.ConnectResponse
	if err := k.call("Connect", &taskapi.ConnectRequest{ID: k.id}, &c); err != nil {
		k.t.Fatal(err)
	}
	k.shimPid = int(c.ShimPid)
}

// call calls a method; errors have their class.
func (k *task) call(method string, req, res proto.Message) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if res == nil {
		res = &emptypb.Empty{}
	}
	return errgrpc.ToNative(k.client.Call(ctx, k.service, method, req, res))
}

func (k *task) must(method string, req, res proto.Message) {
	k.t.Helper()
	if err := k.call(method, req, res); err != nil {
		k.t.Fatalf("%s: %v", method, err)
	}
}

func (k *task) tryCreate() (uint32, error) {
	var r taskapi.CreateTaskResponse
	err := k.call("Create", &taskapi.CreateTaskRequest{ID: k.id, Bundle: k.bundle, Rootfs: k.rootfs(), Terminal: k.terminal,
		Stdin: k.stdin, Stdout: k.stdout, Stderr: k.stderr, Options: any(k.t, k.opts)}, &r)
	return r.Pid, err
}

func (k *task) create() uint32 {
	k.t.Helper()
	pid, err := k.tryCreate()
	if err != nil {
		k.t.Fatalf("create: %v", err)
	}
	return pid
}

// run starts a shim, creates the container and starts it.
func (k *task) run() *task {
	k.t.Helper()
	k.start()
	k.create()
	k.must("Start", &taskapi.StartRequest{ID: k.id}, &taskapi.StartResponse{})
	return k
}

func (k *task) wait(exec string) *taskapi.WaitResponse {
	k.t.Helper()
	var r taskapi.WaitResponse
	k.must("Wait", &taskapi.WaitRequest{ID: k.id, ExecID: exec}, &r)
	return &r
}

func (k *task) kill(exec string, sig syscall.Signal) {
	k.t.Helper()
	k.must("Kill", &taskapi.KillRequest{ID: k.id, ExecID: exec, Signal: uint32(sig)}, nil)
}

func (k *task) state(exec string) *taskapi.StateResponse {
	k.t.Helper()
	var r taskapi.StateResponse
	k.must("State", &taskapi.StateRequest{ID: k.id, ExecID: exec}, &r)
	return &r
}

func (k *task) delete(exec string) *taskapi.DeleteResponse {
	k.t.Helper()
	var r taskapi.DeleteResponse
	k.must("Delete", &taskapi.DeleteRequest{ID: k.id, ExecID: exec}, &r)
	return &r
}

// exec adds and starts a process.
func (k *task) exec(id string, r *taskapi.ExecProcessRequest, args ...string) uint32 {
	k.t.Helper()
	if r == nil {
		r = &taskapi.ExecProcessRequest{}
	}
	p := *k.spec.Process
	p.Args = args
	r.ID, r.ExecID, r.Spec = k.id, id, asJSON(k.t, "Process", p)
	k.must("Exec", r, nil)
	var s taskapi.StartResponse
	k.must("Start", &taskapi.StartRequest{ID: k.id, ExecID: id}, &s)
	return s.Pid
}

// alive tells whether a process runs; nobody may have reaped it yet.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(b), ") Z")
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// shutdown asks the shim to end; as for every daemon, its end is an answer.
func (k *task) shutdown() {
	k.t.Helper()
	if err := k.call("Shutdown", &taskapi.ShutdownRequest{ID: k.id}, nil); err != nil && !errors.Is(err, ttrpc.ErrClosed) && !strings.Contains(err.Error(), ttrpc.ErrClosed.Error()) {
		k.t.Fatalf("Shutdown: %v", err)
	}
}

// finish ends the shim and checks that nothing is left of it.
func (k *task) finish() {
	k.t.Helper()
	k.shutdown()
	eventually(k.t, "end of the shim", func() bool { return !alive(k.shimPid) })
	if left, _ := filepath.Glob(k.sockets + "/[0-9a-f]*"); len(left) != 0 {
		k.t.Errorf("sockets are left: %v", left)
	}
	if left := cgroups(k.spec.Linux.CgroupsPath); len(left) != 0 {
		k.t.Errorf("cgroups are left: %v", left)
	}
	if left, _ := filepath.Glob(k.opts.Root + "/*/" + k.id); len(left) != 0 {
		k.t.Errorf("the runtime's state is left: %v", left)
	}
	if m, err := mountinfo.Mounted(k.bundle + "/rootfs"); m || err != nil {
		k.t.Errorf("rootfs is mounted: %v %v", m, err)
	}
}

func cgroups(path string) []string {
	a, _ := filepath.Glob("/sys/fs/cgroup/*" + path)
	b, _ := filepath.Glob("/sys/fs/cgroup" + path)
	return append(a, b...)
}

// cleanup ends what a failed test left.
func (k *task) cleanup() {
	if k.client != nil {
		k.client.Close()
	}
	if k.shimPid != 0 && alive(k.shimPid) {
		_ = reaper.Kill(k.shimPid, unix.SIGKILL)
		eventually(k.t, "end of a killed shim", func() bool { return !alive(k.shimPid) })
	}
	if _, err := os.Stat(k.bundle + "/runtime"); err == nil {
		if out, err := k.command(nil, "-bundle", k.bundle, "delete").CombinedOutput(); err != nil {
			k.t.Errorf("delete: %v: %s", err, out)
		}
	}
	// The parent that all groups of one test have.
	for _, dir := range cgroups("/" + filepath.Base(k.dir)) {
		_ = unix.Rmdir(dir)
	}
}
