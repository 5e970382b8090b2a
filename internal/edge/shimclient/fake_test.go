package shimclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
)

// fakeEnv makes the test binary a shim; its value is a script as JSON.
const fakeEnv = "GANTRY_FAKE_SHIM"

// script says how the fake shim behaves.
type script struct {
	Dir      string // where it notes how it was called, and listens
	Answer   string // proto, json, json-multiline, bare, internal, none, or text that is written as it is
	Version  int    // of the task API that it serves and tells; 0 is 3
	Serve    int    // the version that it serves, if not what it tells
	Protocol string // grpc, or "" for ttrpc
	Noise    bool   // around the answer, on both streams
	Fail     string // written to stderr before exiting with 1
	Hang     bool   // start does not end
	HangRPC  string // this method does not answer
	DieRPC   string // this method kills the shim
	FailRPC  string // this method fails
	Forgets  bool   // it knows no task that was created
	HangUp   string // this method ends the connection, once in all shims' lives
	Delete   int    // the exit status that its delete command tells; -1 fails
}

// called is how the fake shim was called.
type called struct {
	Args, Env []string
	Dir       string
	Stdin     []byte
}

func fakeShim() {
	var sc script
	if err := json.Unmarshal([]byte(os.Getenv(fakeEnv)), &sc); err != nil {
		panic(err)
	}
	action := os.Args[len(os.Args)-1]
	if action == "serve" {
		fakeServe(sc)
		return
	}
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		panic(err)
	}
	cwd, _ := os.Getwd() // noted for a test
	raw, err := json.Marshal(called{os.Args[1:], os.Environ(), cwd, in})
	if err != nil {
		panic(err)
	}
	if err := os.WriteFile(filepath.Join(sc.Dir, strings.TrimPrefix(action, "-")+".called"), raw, 0o600); err != nil {
		panic(err)
	}
	switch action {
	case "start":
		fakeStart(sc)
	case "delete":
		if sc.Delete < 0 {
			fmt.Fprintln(os.Stderr, "cannot delete")
			os.Exit(1)
		}
		out, err := proto.Marshal(&taskapi.DeleteResponse{Pid: 4711, ExitStatus: uint32(sc.Delete), ExitedAt: timestamppb.Now()})
		if err != nil {
			panic(err)
		}
		fmt.Fprintln(os.Stderr, "level=info msg=noise")
		os.Stdout.Write(out)
	case "-info":
		if sc.Fail != "" {
			fmt.Fprintln(os.Stderr, sc.Fail)
			os.Exit(2)
		}
		out, err := proto.Marshal(&types.RuntimeInfo{Name: "fake", Version: &types.RuntimeVersion{Version: "1", Revision: "r"},
			Features: &anypb.Any{TypeUrl: "f", Value: []byte("{}")}, Annotations: map[string]string{"a": "b"}})
		if err != nil {
			panic(err)
		}
		os.Stdout.Write(out)
	}
}

func fakeStart(sc script) {
	if sc.Hang {
		time.Sleep(time.Minute) // it is killed long before
	}
	if sc.Fail != "" {
		fmt.Fprintln(os.Stdout, "to stdout")
		fmt.Fprintln(os.Stderr, sc.Fail)
		os.Exit(1)
	}
	sock := filepath.Join(sc.Dir, "shim.sock")
	os.Remove(sock) // of an earlier start
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		panic(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		panic(err)
	}
	cmd := exec.Command(os.Args[0], append(os.Args[1:len(os.Args)-1:len(os.Args)-1], "serve")...)
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		panic(err)
	}
	v := sc.Version
	if v == 0 {
		v = 3
	}
	protocol := sc.Protocol
	if protocol == "" {
		protocol = "ttrpc"
	}
	if sc.Noise {
		fmt.Fprintln(os.Stdout, "level=info msg=\"starting {up}\" unix:/x")
		fmt.Fprintln(os.Stderr, "warning: something")
	}
	switch sc.Answer {
	case "", "proto":
		out, err := proto.Marshal(&bootapi.BootstrapResult{Version: int32(v), Address: "unix://" + sock, Protocol: protocol})
		if err != nil {
			panic(err)
		}
		os.Stdout.Write(out)
	case "json":
		json.NewEncoder(os.Stdout).Encode(endpoint{v, "unix://" + sock, protocol})
	case "json-multiline":
		out, _ := json.MarshalIndent(endpoint{v, "unix://" + sock, protocol}, "", "  ") // of plain fields
		os.Stdout.Write(out)
	case "bare":
		fmt.Print("unix://" + sock)
	case "internal":
		fmt.Print(protocol + "+unix://" + sock)
	case "stderr":
		fmt.Fprint(os.Stderr, "unix://"+sock)
	default:
		cmd.Process.Kill()
		fmt.Print(sc.Answer)
	}
	if sc.Noise {
		fmt.Fprintln(os.Stdout, "\nlevel=info msg=done")
	}
}

// fakeServe is the shim that stays. Its one task is imagined.
func fakeServe(sc script) {
	os.WriteFile(filepath.Join(sc.Dir, "pid"), []byte(fmt.Sprint(os.Getpid())), 0o600)
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		panic(err)
	}
	f := &fake{sc: sc, ended: make(chan struct{})}
	v := sc.Serve
	if v == 0 {
		v = sc.Version
	}
	if sc.Protocol == "grpc" {
		srv := grpc.NewServer()
		taskapi.RegisterTaskServer(srv, struct {
			taskapi.TTRPCTaskService
			taskapi.UnsafeTaskServer
		}{TTRPCTaskService: f})
		srv.Serve(l)
		return
	}
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(f.intercept))
	if err != nil {
		panic(err)
	}
	if v == 2 {
		taskv2.RegisterTTRPCTaskService(srv, fakeV2{f: f})
	} else {
		taskapi.RegisterTTRPCTaskService(srv, f)
	}
	srv.Serve(context.Background(), lastConn{l, f})
}

// lastConn keeps the connection that was made last, for HangUp.
type lastConn struct {
	net.Listener
	f *fake
}

func (l lastConn) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	l.f.conn = c
	return c, err
}

type fake struct {
	taskapi.TTRPCTaskService
	sc     script
	mu     sync.Mutex
	status tasktypes.Status
	exit   uint32
	conn   net.Conn
	once   sync.Once
	ended  chan struct{}
}

func (f *fake) intercept(ctx context.Context, in ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, next ttrpc.Method) (any, error) {
	ns, _ := ttrpc.GetMetadataValue(ctx, "containerd-namespace-ttrpc")
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	log, err := os.OpenFile(filepath.Join(f.sc.Dir, "calls"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	fmt.Fprintln(log, info.FullMethod, ns)
	log.Close()
	switch method {
	case f.sc.HangRPC:
		<-ctx.Done()
		<-f.ended
	case f.sc.DieRPC:
		unix.Kill(os.Getpid(), unix.SIGKILL)
	case f.sc.FailRPC:
		return nil, fmt.Errorf("no %s today", method)
	case "State", "Kill", "Delete":
		if f.sc.Forgets {
			return nil, status.Error(codes.NotFound, "no such task")
		}
	}
	switch method {
	case f.sc.HangUp:
		if os.Mkdir(filepath.Join(f.sc.Dir, "hung-up"), 0o700) == nil {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.conn.Close()
			return nil, errors.New("nobody hears this")
		}
	}
	return next(ctx, in)
}

func (f *fake) set(s tasktypes.Status) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status = s
}

func (f *fake) Connect(context.Context, *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	return &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid())}, nil
}

func (f *fake) Create(_ context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	raw, err := proto.Marshal(r)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(f.sc.Dir, "create"), raw, 0o600); err != nil {
		return nil, err
	}
	f.set(tasktypes.Status_CREATED)
	return &taskapi.CreateTaskResponse{Pid: 4711}, nil
}

func (f *fake) Start(context.Context, *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	f.set(tasktypes.Status_RUNNING)
	return &taskapi.StartResponse{Pid: 4711}, nil
}

func (f *fake) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &taskapi.StateResponse{ID: r.ID, Pid: 4711, Status: f.status, ExitStatus: f.exit}, nil
}

func (f *fake) Kill(context.Context, *taskapi.KillRequest) (*emptypb.Empty, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status, f.exit = tasktypes.Status_STOPPED, 137
	f.once.Do(func() { close(f.ended) })
	return &emptypb.Empty{}, nil
}

func (f *fake) Wait(ctx context.Context, _ *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	select {
	case <-f.ended:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return &taskapi.WaitResponse{ExitStatus: 137, ExitedAt: timestamppb.Now()}, nil
}

func (f *fake) Checkpoint(_ context.Context, r *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, os.WriteFile(filepath.Join(f.sc.Dir, "checkpoint"), []byte(r.Path+" "+r.Options.GetTypeUrl()), 0o600)
}

func (f *fake) Delete(context.Context, *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &taskapi.DeleteResponse{Pid: 4711, ExitStatus: f.exit, ExitedAt: timestamppb.Now()}, nil
}

func (f *fake) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	time.AfterFunc(10*time.Millisecond, func() { os.Exit(0) })
	return &emptypb.Empty{}, nil
}

// fakeV2 is the same under the older name; the messages are identical on the wire.
type fakeV2 struct {
	taskv2.TTRPCTaskService
	f *fake
}

func convert[To, From proto.Message](from From, to To) To {
	b, err := proto.Marshal(from)
	if err != nil {
		panic(err)
	}
	if err := proto.Unmarshal(b, to); err != nil {
		panic(err)
	}
	return to
}

func (v fakeV2) Connect(ctx context.Context, _ *taskv2.ConnectRequest) (*taskv2.ConnectResponse, error) {
	r, err := v.f.Connect(ctx, nil)
	return convert(r, &taskv2.ConnectResponse{}), err
}
func (v fakeV2) Create(ctx context.Context, r *taskv2.CreateTaskRequest) (*taskv2.CreateTaskResponse, error) {
	a, err := v.f.Create(ctx, convert(r, &taskapi.CreateTaskRequest{}))
	return convert(a, &taskv2.CreateTaskResponse{}), err
}
func (v fakeV2) Start(ctx context.Context, _ *taskv2.StartRequest) (*taskv2.StartResponse, error) {
	r, err := v.f.Start(ctx, nil)
	return convert(r, &taskv2.StartResponse{}), err
}
func (v fakeV2) State(ctx context.Context, r *taskv2.StateRequest) (*taskv2.StateResponse, error) {
	a, err := v.f.State(ctx, &taskapi.StateRequest{ID: r.ID})
	return convert(a, &taskv2.StateResponse{}), err
}
func (v fakeV2) Kill(ctx context.Context, _ *taskv2.KillRequest) (*emptypb.Empty, error) {
	return v.f.Kill(ctx, nil)
}
func (v fakeV2) Wait(ctx context.Context, _ *taskv2.WaitRequest) (*taskv2.WaitResponse, error) {
	r, err := v.f.Wait(ctx, nil)
	if err != nil {
		return nil, err
	}
	return convert(r, &taskv2.WaitResponse{}), nil
}
func (v fakeV2) Delete(ctx context.Context, _ *taskv2.DeleteRequest) (*taskv2.DeleteResponse, error) {
	r, err := v.f.Delete(ctx, nil)
	return convert(r, &taskv2.DeleteResponse{}), err
}
func (v fakeV2) Shutdown(ctx context.Context, _ *taskv2.ShutdownRequest) (*emptypb.Empty, error) {
	return v.f.Shutdown(ctx, nil)
}

// fakeHost is a host whose runtime io.containerd.fake.v1 is the test binary.
func fakeHost(t *testing.T, sc script) *host {
	t.Helper()
	h := newHost(t)
	sc.Dir = filepath.Join(h.dir, "f")
	bin := filepath.Join(h.dir, "bin")
	for _, d := range []string{sc.Dir, bin} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"containerd-shim-fake-v1", "containerd-shim-runc-v1"} {
		if err := os.Symlink(self, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	h.opt.ShimDirs = []string{bin}
	raw, err := json.Marshal(sc)
	if err != nil {
		t.Fatal(err)
	}
	h.opt.Env = []string{fakeEnv + "=" + string(raw), "SCHED_CORE=1", "GOMAXPROCS=3",
		"GORACE=atexit_sleep_ms=0"} // the race detector would sleep at each exit
	h.opt.Timeouts = Timeouts{Start: 2 * time.Second, Load: time.Second, Create: time.Second, Call: time.Second,
		State: 500 * time.Millisecond, Cleanup: 2 * time.Second, Shutdown: 500 * time.Millisecond, Grace: 50 * time.Millisecond}
	t.Cleanup(func() { // also after a failure
		for _, pid := range h.shims() {
			unix.Kill(pid, unix.SIGKILL) // it has this host's directory in its arguments
		}
	})
	h.fake("a", "io.containerd.fake.v1")
	h.start()
	return h
}

func (h *host) fake(id container.ID, runtime string) {
	h.rec.put(container.Container{ID: id, Runtime: container.Runtime{Name: runtime, Options: typed.Any{URL: "some.Options", Value: []byte("opts")}},
		Spec: typed.Any{URL: urlSpec, Value: []byte(`{"process":{"args":["x"]}}`)}})
}

func (h *host) call(action string) called {
	h.t.Helper()
	raw, err := os.ReadFile(filepath.Join(h.dir, "f", action+".called"))
	if err != nil {
		h.t.Fatal(err)
	}
	var c called
	if err := json.Unmarshal(raw, &c); err != nil {
		h.t.Fatal(err)
	}
	return c
}

// contract: 5.2.4, 5.2.5, 5.2.6, 1.4.2, 1.4.3, 1.4.7, 13.2
func TestBootstrapMatrix(t *testing.T) {
	for name, c := range map[string]struct {
		sc      script
		service string
	}{
		"protobuf v3":         {script{Answer: "proto"}, "v3"},
		"protobuf v2":         {script{Answer: "proto", Version: 2}, "v2"},
		"json v3":             {script{Answer: "json"}, "v3"},
		"json v2":             {script{Answer: "json", Version: 2}, "v2"},
		"json over lines":     {script{Answer: "json-multiline"}, "v3"},
		"bare address":        {script{Answer: "bare", Version: 2}, "v2"},
		"internal form":       {script{Answer: "internal", Version: 2}, "v2"},
		"on stderr":           {script{Answer: "stderr", Version: 2}, "v2"},
		"protobuf in noise":   {script{Answer: "proto", Noise: true}, "v3"},
		"json in noise":       {script{Answer: "json", Noise: true}, "v3"},
		"bare in noise":       {script{Answer: "bare", Noise: true, Version: 2}, "v2"},
		"v3 told, v2 served":  {script{Answer: "json", Serve: 2}, "v2"},
		"grpc":                {script{Answer: "json", Protocol: "grpc"}, ""},
		"grpc, internal form": {script{Answer: "proto", Protocol: "grpc"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := fakeHost(t, c.sc)
			got := h.collect()
			if pid, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil || pid != 4711 {
				t.Fatal(pid, err)
			}
			if _, err := h.store.Start(t.Context(), "a", ""); err != nil {
				t.Fatal(err)
			}
			if p := mustGet(t, h, "a"); p.Status != task.StatusRunning {
				t.Errorf("is %+v", p)
			}
			if err := h.store.Kill(t.Context(), "a", "", 9, true); err != nil {
				t.Fatal(err)
			}
			if x, err := h.store.Wait(t.Context(), "a", ""); err != nil || x.Status != 137 {
				t.Errorf("wait %+v %v", x, err)
			}
			if x, err := h.store.Delete(t.Context(), "a"); err != nil || x.Status != 137 {
				t.Errorf("delete %+v %v", x, err)
			}
			// This shim sends no events: the daemon tells them in its place.
			if want := []string{"exit a 137", "delete 137"}; !slices.Equal(got.of("a"), want) {
				t.Errorf("events %q, want %q", got.of("a"), want)
			}
			if c.service != "" {
				raw, err := os.ReadFile(filepath.Join(h.dir, "f", "calls"))
				if err != nil {
					t.Fatal(err)
				}
				for line := range strings.Lines(string(raw)) {
					if want := "/containerd.task." + c.service + ".Task/"; !strings.HasPrefix(line, want) || !strings.HasSuffix(line, " test\n") {
						t.Errorf("call %q, want %s with the namespace", line, want)
					}
				}
			}
			h.clean()
		})
	}
}

// contract: 5.2.1, 5.2.2, 5.2.3, 5.2.4, 5.3.10, 13.45
func TestStartIsCalled(t *testing.T) {
	h := fakeHost(t, script{})
	h.opt.Debug, h.opt.SocketDir = true, "/run/x"
	h.stop()
	h.start()
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.end("a") })
	bundle := filepath.Join(h.opt.State, PluginID, "test", "a")
	c := h.call("start")
	if want := []string{"-namespace", "test", "-address", h.opt.GRPCAddress, "-publish-binary", "/bin/false", "-id", "a", "-debug", "start"}; !slices.Equal(c.Args, want) {
		t.Errorf("arguments %q, want %q", c.Args, want)
	}
	if c.Dir != bundle {
		t.Errorf("in %s, want %s", c.Dir, bundle)
	}
	last := map[string]string{}
	for _, e := range c.Env {
		k, v, _ := strings.Cut(e, "=")
		last[k] = v
	}
	for k, want := range map[string]string{
		"GOMAXPROCS": "3", "MAX_SHIM_VERSION": "2", "TTRPC_ADDRESS": h.opt.TTRPCAddress, "GRPC_ADDRESS": h.opt.GRPCAddress,
		"NAMESPACE": "test", "SCHED_CORE": "1", "PATH": os.Getenv("PATH"),
	} {
		if last[k] != want {
			t.Errorf("%s=%q, want %q", k, last[k], want)
		}
	}
	var p bootapi.BootstrapParams
	if err := proto.Unmarshal(c.Stdin, &p); err != nil {
		t.Fatal(err)
	}
	dir := "/run/x"
	want := &bootapi.BootstrapParams{InstanceID: "a", Namespace: "test", LogLevel: bootapi.LogLevel_LOG_LEVEL_DEBUG, ContainerdVersion: "test",
		ContainerdTtrpcAddress: h.opt.TTRPCAddress, ContainerdGrpcAddress: h.opt.GRPCAddress, ContainerdBinary: "/bin/false",
		Extensions: []*bootapi.Extension{{Value: &anypb.Any{TypeUrl: "some.Options", Value: []byte("opts")}}}, SocketDir: &dir}
	if !proto.Equal(&p, want) {
		t.Errorf("stdin\n%v\nwant\n%v", &p, want)
	}
	raw, err := os.ReadFile(filepath.Join(h.dir, "f", "create"))
	if err != nil {
		t.Fatal(err)
	}
	var r taskapi.CreateTaskRequest
	if err := proto.Unmarshal(raw, &r); err != nil {
		t.Fatal(err)
	}
	if r.ID != "a" || r.Bundle != bundle || r.Options.GetTypeUrl() != "some.Options" || string(r.Options.GetValue()) != "opts" {
		t.Errorf("create request %v", &r)
	}
	// The two shims that know no parameters get the options.
	h.fake("b", "io.containerd.runc.v1")
	if got, err := h.m.bootstrapInput(key{"test", "b"}, legacy(filepath.Join(h.dir, "bin", "containerd-shim-runc-v1")), typed.Any{URL: "some.Options", Value: []byte("opts")}); err != nil {
		t.Fatal(err)
	} else {
		var a anypb.Any
		if err := proto.Unmarshal(got, &a); err != nil || a.TypeUrl != "some.Options" || string(a.Value) != "opts" {
			t.Errorf("legacy stdin %q %v", got, err)
		}
	}
	if !legacy("/x/containerd-shim-runhcs-v1.exe") || legacy("/x/containerd-shim-runc-v2") {
		t.Error("legacy names are wrong")
	}
}

// Whatever goes wrong while a task is made, the error says where and why, and
// nothing is left.
//
// contract: 5.2.5, 13.2, 2.3.10
// promise: P6, P36
func TestCreateUndone(t *testing.T) {
	for name, c := range map[string]struct {
		sc   script
		want []string
		dl   bool
	}{
		"exits with 1":          {script{Fail: "cannot: because"}, []string{"start shim", "cannot: because", "to stdout", "exit status 1"}, false},
		"hangs":                 {script{Hang: true}, []string{"start shim", "did not end within 2s", "limit for shim start"}, true},
		"says nothing":          {script{Answer: " "}, []string{"start shim", "no address"}, false},
		"says nonsense":         {script{Answer: "{\"version\":3}"}, []string{"no address", "version"}, false},
		"unknown version":       {script{Answer: `{"version":9,"address":"unix:///x"}`}, []string{"version 9"}, false},
		"unknown protocol":      {script{Answer: `{"version":3,"address":"unix:///x","protocol":"smtp"}`}, []string{"smtp"}, false},
		"unknown scheme":        {script{Answer: `{"version":3,"address":"tcp://1.2.3.4:5"}`}, []string{"tcp://1.2.3.4:5", "scheme"}, false},
		"nobody listens":        {script{Answer: "unix:///nonexistent/sock"}, []string{"connect to shim at unix:///nonexistent/sock", "no such file"}, false},
		"does not answer":       {script{HangRPC: "Connect"}, []string{"test/a", "connect", "no answer", "within 1s", "shim.load"}, true},
		"dies at the question":  {script{DieRPC: "Connect"}, []string{"test/a", "connect", "died"}, false},
		"create hangs":          {script{HangRPC: "Create"}, []string{"test/a", "create", "no answer from shim pid", "within 1s"}, true},
		"create dies":           {script{DieRPC: "Create"}, []string{"test/a", "create", "died"}, false},
		"create fails":          {script{FailRPC: "Create"}, []string{"test/a", "no Create today"}, false},
		"create and all hangs":  {script{HangRPC: "Create", Delete: -1}, []string{"no answer"}, true},
		"fails, delete as well": {script{FailRPC: "Create", Delete: -1}, []string{"no Create today"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := fakeHost(t, c.sc)
			began := time.Now()
			_, err := h.store.Create(t.Context(), "a", task.CreateOptions{})
			if err == nil {
				t.Fatal("created")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not say %q", err, w)
				}
			}
			if errdefs.IsDeadlineExceeded(err) != c.dl {
				t.Errorf("error %q: deadline exceeded is %v", err, !c.dl)
			}
			if d := time.Since(began); d > 12*time.Second {
				t.Errorf("took %s", d)
			}
			h.clean()
			if _, err := h.store.Get(t.Context(), "a", ""); !errdefs.IsNotFound(err) {
				t.Errorf("get: %v", err)
			}
			h.m.mu.Lock()
			defer h.m.mu.Unlock()
			if len(h.m.tasks)+len(h.m.links) > 0 {
				t.Errorf("left in the tables: %v %v", h.m.tasks, h.m.links)
			}
		})
	}
}

// A shim of a group ends for want of containers, and another one listens at its
// address, when the next container comes: it is made there.
//
// contract: 5.2.9
func TestCreateOnLeavingShim(t *testing.T) {
	h := fakeHost(t, script{HangUp: "Create"})
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.store.Get(t.Context(), "a", ""); err != nil {
		t.Error(err)
	}
}

// contract: 5.4.3, 1.6.7, 1.3.34
func TestDeadShimExit(t *testing.T) {
	for _, c := range []struct {
		delete int
		want   string
	}{{137, "137"}, {42, "42"}, {-1, "255"}} {
		t.Run(c.want, func(t *testing.T) {
			h := fakeHost(t, script{Delete: c.delete})
			got := h.collect()
			if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			unix.Kill(h.shims()[0], unix.SIGKILL)
			x, err := h.store.Wait(t.Context(), "a", "")
			if err != nil || fmt.Sprint(x.Status) != c.want {
				t.Errorf("wait %+v %v", x, err)
			}
			until(t, "all is published", func() bool { return len(got.of("a")) == 2 })
			if want := []string{"exit a " + c.want, "delete " + c.want}; !slices.Equal(got.of("a"), want) {
				t.Errorf("events %q, want %q", got.of("a"), want)
			}
			bundle := filepath.Join(h.opt.State, PluginID, "test", "a")
			if a := h.call("delete"); !slices.Equal(a.Args[len(a.Args)-5:], []string{"-id", "a", "-bundle", bundle, "delete"}) || a.Dir != bundle || len(a.Stdin) > 0 {
				t.Errorf("delete was called as %q in %s", a.Args, a.Dir)
			}
			until(t, "it is gone", func() bool {
				h.m.mu.Lock()
				defer h.m.mu.Unlock()
				return len(h.m.tasks) == 0
			})
			h.clean()
		})
	}
}

// contract: 5.1.2
func TestResolve(t *testing.T) {
	h := newHost(t)
	first, second, path := filepath.Join(h.dir, "1"), filepath.Join(h.dir, "2"), filepath.Join(h.dir, "p")
	for _, f := range []string{first + "/containerd-shim-x-v1", second + "/containerd-shim-x-v1", second + "/containerd-shim-y-v1", path + "/containerd-shim-z-v1", path + "/containerd-shim-y-v1"} {
		os.MkdirAll(filepath.Dir(f), 0o755) // or WriteFile fails
		if err := os.WriteFile(f, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(first+"/containerd-shim-y-v1", nil, 0o644); err != nil { // not executable
		t.Fatal(err)
	}
	h.opt.ShimDirs, h.opt.Env = []string{first, second}, []string{"PATH=" + path + ":relative"}
	m, err := New(h.opt)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"io.containerd.x.v1": first + "/containerd-shim-x-v1", "io.containerd.y.v1": second + "/containerd-shim-y-v1",
		"io.containerd.z.v1": path + "/containerd-shim-z-v1", "com.example.deep.er.z.v1": path + "/containerd-shim-z-v1",
		path + "/containerd-shim-z-v1": path + "/containerd-shim-z-v1",
	} {
		if got, err := m.resolve(name); err != nil || got != want {
			t.Errorf("%s is %s (%v), want %s", name, got, err, want)
		}
	}
	_, err = m.resolve("io.containerd.nosuch.v9")
	if !errdefs.IsNotFound(err) {
		t.Errorf("unknown runtime: %v", err)
	}
	for _, part := range []string{"io.containerd.nosuch.v9", "containerd-shim-nosuch-v9", first, second, path} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
	if _, err = m.resolve(first + "/containerd-shim-y-v1"); !errdefs.IsNotFound(err) {
		t.Errorf("not executable: %v", err)
	}
	for _, bad := range []string{"", "runc", "a.b", "relative/path/x.y", "io.containerd..v1", "io.containerd.../x.v1"} {
		if _, err := m.resolve(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// contract: 5.1.2, 1.3.33, 5.2.10
func TestCreateOptions(t *testing.T) {
	h := fakeHost(t, script{})
	request := func() *taskapi.CreateTaskRequest {
		raw, err := os.ReadFile(filepath.Join(h.dir, "f", "create"))
		if err != nil {
			t.Fatal(err)
		}
		var r taskapi.CreateTaskRequest
		if err := proto.Unmarshal(raw, &r); err != nil {
			t.Fatal(err)
		}
		return &r
	}
	h.rec.snapshots = map[string]snapshot.Store{"sn": oneSnapshot{}}
	h.rec.put(container.Container{ID: "a", Runtime: container.Runtime{Name: "io.containerd.nosuch.v1"}, Snapshotter: "sn", SnapshotKey: "key",
		Spec: typed.Any{URL: urlSpec, Value: []byte(`{"process":{"args":["x"]}}`)}})
	// runtime_path instead of the record's, the options of the request, the
	// mounts of the container's snapshot.
	_, err := h.store.Create(t.Context(), "a", task.CreateOptions{RuntimePath: filepath.Join(h.dir, "bin", "containerd-shim-fake-v1"),
		Options: typed.Any{URL: "other"}, IO: task.IO{Stdin: "/i", Stdout: "/o", Stderr: "/e", Terminal: true},
		Checkpoint: nil})
	if err != nil {
		t.Fatal(err)
	}
	r := request()
	if r.Options.GetTypeUrl() != "other" || r.Stdin != "/i" || r.Stdout != "/o" || r.Stderr != "/e" || !r.Terminal {
		t.Errorf("request %v", r)
	}
	if len(r.Rootfs) != 1 || r.Rootfs[0].Source != "/the/key" {
		t.Errorf("rootfs %v", r.Rootfs)
	}
	// A second one joins the first one's shim by its address: nothing is started.
	if err := os.Remove(filepath.Join(h.dir, "f", "start.called")); err != nil {
		t.Fatal(err)
	}
	h.rec.put(container.Container{ID: "b", SandboxID: "pod", Runtime: container.Runtime{Name: "io.containerd.nosuch.v1"}, Spec: typed.Any{URL: urlSpec, Value: []byte(`{"process":{"args":["x"]}}`)}})
	given := []mount.Mount{{Type: "bind", Source: "/given"}}
	if _, err := h.store.Create(t.Context(), "b", task.CreateOptions{APIAddress: "ttrpc+unix://" + filepath.Join(h.dir, "f", "shim.sock"), APIVersion: 3, Rootfs: given}); err != nil {
		t.Fatal(err)
	}
	if r := request(); r.ID != "b" || len(r.Rootfs) != 1 || r.Rootfs[0].Source != "/given" {
		t.Errorf("request %v", r)
	}
	// And one joins its sandbox's.
	h.rec.put(container.Container{ID: "c", SandboxID: "a", Runtime: container.Runtime{Name: "io.containerd.nosuch.v1"}, Spec: typed.Any{URL: urlSpec, Value: []byte(`{"process":{"args":["x"]}}`)}})
	if _, err := h.store.Create(t.Context(), "c", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if raw, err := os.ReadFile(filepath.Join(h.opt.State, PluginID, "test", "c", "sandbox")); err != nil || string(raw) != "a" {
		t.Errorf("sandbox file %q %v", raw, err)
	}
	if _, err := os.Stat(filepath.Join(h.dir, "f", "start.called")); err == nil {
		t.Error("a shim was started for a container that joins one")
	}
	if len(h.shims()) != 1 {
		t.Errorf("shims %v", h.shims())
	}
	if err := h.store.Kill(t.Context(), "a", "", 9, true); err != nil {
		t.Fatal(err)
	}
	for _, id := range []container.ID{"b", "c"} {
		if _, err := h.store.Delete(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if len(h.shims()) != 1 {
			t.Errorf("the shim was stopped with %s, which only joined it", id)
		}
	}
	if _, err := h.store.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	h.clean()
}

// oneSnapshot has a snapshot of any name.
type oneSnapshot struct{ snapshot.Store }

func (oneSnapshot) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	return []mount.Mount{{Type: "bind", Source: "/the/" + key}}, nil
}

// A checkpoint goes into the directory that the options name, and comes from
// one that the descriptor names; any other is refused with a class.
//
// contract: 1.3.38
func TestCheckpoint(t *testing.T) {
	h := fakeHost(t, script{})
	restore := &ocispec.Descriptor{Digest: "sha256:x"}
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{Checkpoint: restore}); !errdefs.IsNotImplemented(err) {
		t.Errorf("restore from content: %v", err)
	}
	h.clean()
	restore.Annotations = map[string]string{"RestoreFromPath": "/from/here"}
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{Checkpoint: restore}); err != nil {
		t.Fatal(err)
	}
	var r taskapi.CreateTaskRequest
	if raw, err := os.ReadFile(filepath.Join(h.dir, "f", "create")); err != nil || proto.Unmarshal(raw, &r) != nil || r.Checkpoint != "/from/here" {
		t.Errorf("create request %v %v", &r, err)
	}
	opts, err := proto.Marshal(&runcoptions.CheckpointOptions{ImagePath: "/to/there"})
	if err != nil {
		t.Fatal(err)
	}
	const url = "containerd.runc.v1.CheckpointOptions"
	ds, err := h.store.Checkpoint(t.Context(), "a", "", typed.Any{URL: url, Value: opts})
	if err != nil || len(ds) != 0 {
		t.Errorf("checkpoint: %v %v", ds, err)
	}
	if raw, err := os.ReadFile(filepath.Join(h.dir, "f", "checkpoint")); err != nil || string(raw) != "/to/there "+url {
		t.Errorf("the shim was told %q (%v)", raw, err)
	}
	if _, err := h.store.Checkpoint(t.Context(), "a", "", typed.Any{URL: url, Value: []byte{0xff}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad options: %v", err)
	}
	h.end("a")
	h.clean()
}

// contract: 1.3.22
func TestInfo(t *testing.T) {
	h := fakeHost(t, script{})
	got, err := h.m.Info(t.Context(), "io.containerd.fake.v1", typed.Any{URL: "o", Value: []byte("v")})
	if err != nil {
		t.Fatal(err)
	}
	if got.Name != "fake" || got.Version != "1" || got.Revision != "r" || got.Features.URL != "f" || got.Annotations["a"] != "b" {
		t.Errorf("info %+v", got)
	}
	var a anypb.Any
	if err := proto.Unmarshal(h.call("info").Stdin, &a); err != nil || a.TypeUrl != "o" || string(a.Value) != "v" {
		t.Errorf("options %v %v", &a, err)
	}
	if _, err := h.m.Info(t.Context(), "io.containerd.nosuch.v1", typed.Any{}); !errdefs.IsNotFound(err) {
		t.Errorf("unknown runtime: %v", err)
	}
	old := fakeHost(t, script{Fail: "flag provided but not defined: -info"})
	if _, err := old.m.Info(t.Context(), "io.containerd.fake.v1", typed.Any{}); !errdefs.IsNotImplemented(err) {
		t.Errorf("a shim that cannot say: %v", err)
	}
}
