//go:build linux

package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/reaper"
	"github.com/gantryd/gantry/internal/shim/driver"
	"github.com/gantryd/gantry/internal/shim/libct"
	"github.com/gantryd/gantry/internal/shim/pod"
	"github.com/gantryd/gantry/internal/shim/publish"
	"github.com/gantryd/gantry/internal/shim/stdio"
	"github.com/gantryd/gantry/internal/shim/task"
)

const (
	// quiet is how long after a call memory goes back to the system, if the heap
	// has more than enough bytes: the first collections have the Go runtime
	// take more for itself than one container's making leaves to collect.
	quiet  = 2 * time.Second
	enough = 3 << 20
	// abandoned is how long a shim stays that has neither a container nor a
	// daemon that is connected.
	abandoned = time.Minute
	// goodbye bounds the end: answers being sent, events being delivered.
	goodbye = 5 * time.Second
	// lastAnswer bounds the wait for the answer to Shutdown being written.
	lastAnswer = 100 * time.Millisecond
	answerRead = 2 * time.Millisecond
	listenerFD = 3
)

// serve is the shim that stays.
func serve(b Build, a Args) error {
	out := openLog("log")
	level := slog.LevelInfo
	if a.Debug {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level})).With("shim", a.ID, "namespace", a.Namespace)
	libct.LogTo(out, a.Debug)
	limits := libct.Inherited()
	if a.DebugSocket != "" {
		log.Warn("-debug-socket has no effect")
	}
	l, err := listener(a.Socket)
	if err != nil {
		return err
	}
	// The bundle may be removed while other containers of the pod live on.
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := reaper.Subreaper(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r := reaper.New()
	go func() { _ = r.Run(ctx) }()
	events := publish.New(os.Getenv("TTRPC_ADDRESS"), a.Namespace, log)
	delivered := make(chan struct{})
	go func() {
		defer close(delivered)
		_ = events.Run(ctx)
	}()

	end := make(chan struct{})
	watched := &watchedListener{Listener: l, after: abandoned, wrote: make(chan struct{})}
	var answered <-chan struct{}
	stop := sync.OnceFunc(func() {
		answered = watched.nextWrite() // the answer to the call that we are in
		close(end)
	})
	var sandbox *pod.Service
	service := task.New(task.Config{
		Namespace: a.Namespace, Version: b.Version, Reaper: r, Events: events, Streams: stdio.NewOpener(r, log),
		Driver:   func(o *options.Options) (driver.Driver, error) { return newDriver(a.Namespace, o, limits, log) },
		Shutdown: stop, Needed: func() bool { return sandbox.Exists() }, Log: log,
	})
	sandbox = pod.New(pod.Config{End: service.End, Shutdown: stop})
	calm := time.AfterFunc(quiet, func() {
		for range 2 { // pools give up what they keep at the second collection only
			if heap() < enough {
				return
			}
			debug.FreeOSMemory()
		}
	})
	server, err := newServer(service, sandbox, log, func() { calm.Reset(quiet) })
	if err != nil {
		return err
	}
	watched.idle = func() {
		if service.Unused() {
			log.Info("nobody needs this shim any more")
			stop()
		}
	}
	watched.arm()

	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	// Caught, not ignored: what is ignored stays so in containers.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGPIPE)
	go func() {
		for range signals {
			// Containers outlive whoever stops the daemon's service group.
			if service.Unused() {
				stop()
			}
		}
	}()
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, watched) }()
	log.Debug("serving", "pid", os.Getpid(), "socket", a.Socket)
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", a.Socket, err)
	case <-end:
	}
	// The name goes first: who comes now starts another shim.
	os.Remove(a.Socket)
	select {
	case <-answered:
		// Clients pick at random between an answer and the connection's end
		// when they see both.
		time.Sleep(answerRead)
	case <-time.After(lastAnswer):
	}
	bye, cancelBye := context.WithTimeout(ctx, goodbye)
	defer cancelBye()
	if err := server.Shutdown(bye); err != nil {
		log.Debug("shut the server down", "error", err)
	}
	events.Close()
	select {
	case <-delivered:
	case <-bye.Done():
		log.Warn("events were not delivered before the end")
	}
	return nil
}

// heap returns how much memory it takes, in bytes, used or not.
func heap() (sum uint64) {
	// runtime.ReadMemStats would itself cost half a megabyte.
	samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}, {Name: "/memory/classes/heap/free:bytes"}}
	metrics.Read(samples)
	for _, s := range samples {
		sum += s.Value.Uint64()
	}
	return sum
}

// listener takes the socket that start has opened, or opens one.
func listener(path string) (net.Listener, error) {
	var st unix.Stat_t
	if err := unix.Fstat(listenerFD, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		f := os.NewFile(listenerFD, "listener")
		defer f.Close()
		return net.FileListener(f)
	}
	if path == "" {
		return nil, fmt.Errorf("-socket is missing: %w", errdefs.ErrInvalidArgument)
	}
	l, err := listen(path)
	if err == nil && l == nil {
		err = fmt.Errorf("socket %s: %w", path, unix.EADDRINUSE)
	}
	if err != nil {
		return nil, err
	}
	return l, nil
}

// newServer offers the service under both of its names: their messages are
// the same, byte by byte (contract 1.4.2, 1.4.3).
func newServer(service taskapi.TTRPCTaskService, sandbox *pod.Service, log *slog.Logger, called func()) (*ttrpc.Server, error) {
	server, err := ttrpc.NewServer(
		ttrpc.WithServerHandshaker(sameUser{}),
		ttrpc.WithUnaryServerInterceptor(func(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (_ any, err error) {
			defer called()
			defer func() {
				if p := recover(); p != nil {
					log.Error("panic", "method", info.FullMethod, "cause", p, "stack", string(debug.Stack()))
					err = errgrpc.ToGRPC(fmt.Errorf("%s: panic: %v: %w", info.FullMethod, p, errdefs.ErrInternal))
				}
			}()
			res, err := method(ctx, unmarshal)
			if err != nil {
				log.Debug("call", "method", info.FullMethod, "error", err)
				return nil, errgrpc.ToGRPC(err)
			}
			return res, nil
		}))
	if err != nil {
		return nil, err
	}
	desc := &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"State":      method(service.State),
		"Create":     method(service.Create),
		"Start":      method(service.Start),
		"Delete":     method(service.Delete),
		"Pids":       method(service.Pids),
		"Pause":      method(service.Pause),
		"Resume":     method(service.Resume),
		"Checkpoint": method(service.Checkpoint),
		"Kill":       method(service.Kill),
		"Exec":       method(service.Exec),
		"ResizePty":  method(service.ResizePty),
		"CloseIO":    method(service.CloseIO),
		"Update":     method(service.Update),
		"Wait":       method(service.Wait),
		"Stats":      method(service.Stats),
		"Connect":    method(service.Connect),
		"Shutdown":   method(service.Shutdown),
	}}
	server.RegisterService("containerd.task.v2.Task", desc)
	server.RegisterService("containerd.task.v3.Task", desc)
	server.RegisterService("containerd.runtime.sandbox.v1.Sandbox", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"CreateSandbox":   method(sandbox.CreateSandbox),
		"StartSandbox":    method(sandbox.StartSandbox),
		"Platform":        method(sandbox.Platform),
		"StopSandbox":     method(sandbox.StopSandbox),
		"WaitSandbox":     method(sandbox.WaitSandbox),
		"SandboxStatus":   method(sandbox.SandboxStatus),
		"PingSandbox":     method(sandbox.PingSandbox),
		"ShutdownSandbox": method(sandbox.ShutdownSandbox),
		"SandboxMetrics":  method(sandbox.Unimplemented),
		"UpdateSandbox":   method(sandbox.Unimplemented),
	}})
	return server, nil
}

func method[Req, Res any](fn func(context.Context, *Req) (*Res, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		req := new(Req)
		if err := unmarshal(req); err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		return fn(ctx, req)
	}
}

// sameUser refuses clients of other users.
type sameUser struct{}

func (sameUser) Handshake(ctx context.Context, conn net.Conn) (net.Conn, any, error) {
	plain := conn
	if w, ok := conn.(*watchedConn); ok {
		plain = w.UnixConn
	}
	_, creds, err := ttrpc.UnixSocketRequireSameUser().Handshake(ctx, plain)
	return conn, creds, err
}

// watchedListener notices when the last connection is closed, and calls idle
// if none has come for a while.
type watchedListener struct {
	net.Listener
	after time.Duration
	idle  func()

	mu    sync.Mutex
	conns int
	timer *time.Timer
	wrote chan struct{} // closed by the next write on any connection
}

func (l *watchedListener) nextWrite() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.wrote
}

func (l *watchedListener) written() {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.wrote)
	l.wrote = make(chan struct{})
}

func (l *watchedListener) arm() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer != nil {
		l.timer.Stop()
	}
	l.timer = time.AfterFunc(l.after, func() {
		l.mu.Lock()
		n := l.conns
		l.mu.Unlock()
		if n == 0 {
			l.idle()
		}
	})
}

func (l *watchedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, errors.New("not a unix socket")
	}
	l.mu.Lock()
	l.conns++
	l.mu.Unlock()
	return &watchedConn{UnixConn: u, written: l.written, closed: sync.OnceFunc(func() {
		l.mu.Lock()
		l.conns--
		last := l.conns == 0
		l.mu.Unlock()
		if last {
			l.arm()
		}
	})}, nil
}

type watchedConn struct {
	*net.UnixConn
	written, closed func()
}

func (c *watchedConn) Write(p []byte) (int, error) {
	n, err := c.UnixConn.Write(p)
	c.written()
	return n, err
}

func (c *watchedConn) Close() error {
	c.closed()
	return c.UnixConn.Close()
}

// openLog opens the FIFO that the daemon reads the shim's log from. Writing
// never blocks: with nobody reading, the log is lost and the shim is not.
func openLog(path string) io.Writer {
	info, err := os.Stat(path)
	if err != nil || info.Mode()&os.ModeNamedPipe == 0 {
		return os.Stderr
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return os.Stderr
	}
	return logFIFO(fd)
}

type logFIFO int

func (f logFIFO) Write(p []byte) (int, error) {
	_, _ = unix.Write(int(f), p)
	return len(p), nil
}
