package shimclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// errShimDead: nobody listens at the shim's address any more.
var errShimDead = fmt.Errorf("the shim has died: %w", errdefs.ErrNotFound)

// errShimLost: the connection broke, and the shim is there.
var errShimLost = fmt.Errorf("the connection to the shim broke during the call: %w", errdefs.ErrUnavailable)

// wireConn is one connection to a shim, of either protocol.
type wireConn interface {
	call(ctx context.Context, ns namespace.ID, service, method string, req, resp proto.Message) error
	// closed is closed when the connection has ended.
	closed() <-chan struct{}
	close()
}

// user is whoever has business with a shim: a task or a sandbox.
type user interface {
	whose() key
	where() bundle
	// bury is called when the shim has died.
	bury(ctx context.Context)
	// purge ends what the shim has made for the user.
	purge(ctx context.Context, l *link) error
}

// link is a shim and the connection to it. Containers of one group share one
// (contract 5.2.9). It survives a connection that breaks; it is dead when
// nobody listens at its address any more.
type link struct {
	m       *Manager
	addr    endpoint
	opened  chan struct{} // closed when the first dial has ended
	openErr error         // of that dial; read after opened
	dead    chan struct{} // closed when the shim has died
	over    chan struct{} // closed when the daemon lets go of the shim

	mu    sync.Mutex // guards what follows; never held over I/O
	users map[user]struct{}
	// foreign: this daemon did not start the shim for one of its users, and
	// must not stop it (contract 5.2.10).
	foreign bool
	conn    wireConn
	change  chan struct{} // closed and replaced when conn changes
	version int
	pid     int // the shim's, 0 if not known
	pidfd   int // -1 if not known
	logs    *shimLog
	isOver  bool
	isDead  bool
}

// join returns the link to a shim, connecting if this is its first user. The
// first dial is repeated while nobody listens yet, within wait.
func (m *Manager) join(ctx context.Context, e endpoint, t user, foreign bool, wait time.Duration) (*link, error) {
	if err := e.known(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable)
	}
	l, shared := m.links[e.Address]
	if !shared {
		l = &link{m: m, addr: e, foreign: foreign, version: e.Version, pidfd: -1,
			opened: make(chan struct{}), dead: make(chan struct{}), over: make(chan struct{}),
			change: make(chan struct{}), users: map[user]struct{}{}}
		m.links[e.Address] = l
	}
	l.mu.Lock()
	l.users[t] = struct{}{}
	l.foreign = l.foreign && foreign
	l.mu.Unlock()
	m.mu.Unlock()

	if !shared {
		l.open(wait)
	}
	select {
	case <-l.opened:
	case <-ctx.Done():
		l.drop(t)
		return nil, fmt.Errorf("connect to shim at %s: %w", e.Address, ctx.Err())
	}
	if l.openErr != nil {
		l.drop(t)
		return nil, l.openErr
	}
	return l, nil
}

// open makes the first connection. Others may be waiting for it, so it does
// not end with the caller's context.
func (l *link) open(wait time.Duration) {
	defer close(l.opened)
	ctx, cancel := context.WithTimeout(l.m.ctx, l.m.limit.Load)
	defer cancel()
	until := time.Now().Add(min(wait, l.m.limit.Load/2))
	for {
		c, err := l.connect(ctx)
		if err == nil {
			l.set(c)
			l.m.spawn(func() { l.keep(c) })
			return
		}
		if !nobodyListens(err) || time.Now().After(until) || ctx.Err() != nil {
			l.openErr = fmt.Errorf("connect to shim at %s: %w: %w", l.addr.Address, err, errdefs.ErrUnavailable)
			return
		}
		pause(ctx, 5*time.Millisecond)
	}
}

func nobodyListens(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNRESET)
}

// pause waits for d, or until ctx is over.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func (l *link) connect(ctx context.Context) (wireConn, error) {
	if l.addr.Protocol == "grpc" {
		return dialGRPC(ctx, l.addr.Address)
	}
	c, err := dial(ctx, l.addr.Address)
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	return &ttrpcConn{ttrpc.NewClient(c, ttrpc.WithOnClose(func() { close(done) })), done}, nil
}

func (l *link) set(c wireConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isOver || l.isDead {
		if c != nil {
			c.close()
		}
		return
	}
	l.conn = c
	close(l.change)
	l.change = make(chan struct{})
}

// keep watches a connection and makes the next one when it breaks, until the
// shim is dead or let go of.
func (l *link) keep(c wireConn) {
	for {
		select {
		case <-c.closed():
		case <-l.over:
			c.close()
			return
		}
		l.set(nil)
		next := l.again()
		if next == nil {
			return
		}
		c = next
		l.set(c)
	}
}

// again dials until it succeeds or the shim is known to be dead. A socket
// whose owner has ended refuses at once; other errors are given Load.
func (l *link) again() wireConn {
	until := time.Now().Add(l.m.limit.Load)
	for {
		select {
		case <-l.over:
			return nil
		default:
		}
		ctx, cancel := context.WithTimeout(l.m.ctx, time.Second)
		c, err := l.connect(ctx)
		if err == nil {
			// The socket of a process that is being killed may still take
			// connections: an answer counts, of whatever kind, and so does
			// silence, which is not death.
			if err = l.once(ctx, c, "default", "Connect", &taskapi.ConnectRequest{}, &taskapi.ConnectResponse{}); !isClosed(c, err) {
				cancel()
				return c
			}
			c.close()
		}
		cancel()
		if l.m.ctx.Err() != nil {
			return nil
		}
		if nobodyListens(err) || time.Now().After(until) {
			l.die(err)
			return nil
		}
		pause(l.m.ctx, 20*time.Millisecond)
	}
}

// die marks the shim as dead and has its containers buried.
func (l *link) die(cause error) {
	l.mu.Lock()
	if l.isOver || l.isDead {
		l.mu.Unlock()
		return
	}
	l.isDead = true
	users := make([]user, 0, len(l.users))
	for t := range l.users {
		users = append(users, t)
	}
	close(l.dead)
	l.mu.Unlock()
	l.m.mu.Lock()
	if l.m.links[l.addr.Address] == l {
		delete(l.m.links, l.addr.Address)
	}
	l.m.mu.Unlock()
	for _, t := range users {
		l.m.log.Warn("shim has died", "namespace", t.whose().ns, "id", t.whose().id, "address", l.addr.Address, "pid", l.shimPid(), "cause", cause)
		l.m.spawn(func() { t.bury(l.m.ctx) })
	}
}

// leave takes a user off the link and reports whether it was the last one, in
// which case the link is out of the table: whoever was told so stops the shim
// or closes the link.
func (l *link) leave(t user) (last bool) {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.users[t]; !ok {
		return false
	}
	delete(l.users, t)
	if len(l.users) > 0 {
		return false
	}
	if l.m.links[l.addr.Address] == l {
		delete(l.m.links, l.addr.Address)
	}
	return true
}

// drop is leave for one who does not mean to stop the shim.
func (l *link) drop(t user) {
	if l.leave(t) {
		l.close()
	}
}

// close lets go of the shim, which keeps running.
func (l *link) close() {
	l.mu.Lock()
	if l.isOver {
		l.mu.Unlock()
		return
	}
	l.isOver = true
	close(l.over)
	conn, fd, logs := l.conn, l.pidfd, l.logs
	l.conn, l.pidfd, l.logs = nil, -1, nil
	l.mu.Unlock()
	if conn != nil {
		conn.close()
	}
	if fd >= 0 {
		unix.Close(fd)
	}
	if logs != nil {
		logs.close()
	}
}

// get returns the connection, waiting while it is being made again.
func (l *link) get(ctx context.Context) (wireConn, error) {
	for {
		l.mu.Lock()
		c, change := l.conn, l.change
		l.mu.Unlock()
		select {
		case <-l.dead:
			return nil, errShimDead
		case <-l.over:
			return nil, errShimDead
		default:
		}
		if c != nil {
			select {
			case <-c.closed(): // and keep has not seen it yet
			default:
				return c, nil
			}
		}
		select {
		case <-change:
		case <-l.dead:
			return nil, errShimDead
		case <-l.over:
			return nil, errShimDead
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// bound is a call's own deadline, and what it is called. Zero is none.
type bound struct {
	d    time.Duration
	name string
}

// repeatable are the calls that may be made again when the connection broke.
func repeatable(method string) bool {
	switch method {
	case "State", "Pids", "Stats", "Wait", "Connect",
		"SandboxStatus", "WaitSandbox", "PingSandbox", "Platform", "SandboxMetrics", "StopSandbox":
		return true
	}
	return false
}

// call makes one call about the container k. Errors have the class that the
// shim gave them; a deadline says whose it was, and what the shim is doing.
func (l *link) call(ctx context.Context, k key, method string, b bound, req, resp proto.Message) error {
	return l.do(ctx, "task "+k.String(), method, b, func(ctx context.Context, c wireConn) error {
		return l.once(ctx, c, k.ns, method, req, resp)
	})
}

// callSandbox is call for a method of the Sandbox API (contract 1.4.4).
func (l *link) callSandbox(ctx context.Context, k key, method string, b bound, req, resp proto.Message) error {
	return l.do(ctx, "sandbox "+k.String(), method, b, func(ctx context.Context, c wireConn) error {
		return c.call(ctx, k.ns, "containerd.runtime.sandbox.v1.Sandbox", method, req, resp)
	})
}

func (l *link) do(ctx context.Context, what, method string, b bound, once func(context.Context, wireConn) error) error {
	parent := ctx
	if b.d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, b.d)
		defer cancel()
	}
	began := time.Now()
	for {
		c, err := l.get(ctx)
		if err == nil {
			err = once(ctx, c)
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errShimDead):
			return fmt.Errorf("%s: %s: %w", what, verb(method), err)
		case parent.Err() != nil:
			return fmt.Errorf("%s: %s: no answer from %s after %s, and the caller's own time is up: %w",
				what, verb(method), l.describe(), since(began), parent.Err())
		case ctx.Err() != nil:
			return fmt.Errorf("%s: %s: no answer from %s within %s (%s): %w",
				what, verb(method), l.describe(), b.d, b.name, context.DeadlineExceeded)
		case isClosed(c, err):
			select {
			case <-c.closed():
			case <-ctx.Done():
				continue
			}
			if _, err := l.get(ctx); errors.Is(err, errShimDead) {
				return fmt.Errorf("%s: %s: %w", what, verb(method), errShimDead)
			}
			if !repeatable(method) {
				return fmt.Errorf("%s: %s: %w", what, verb(method), errShimLost)
			}
		default:
			return fmt.Errorf("%s: %s: %w", what, verb(method), err)
		}
	}
}

func since(t time.Time) time.Duration { return time.Since(t).Round(time.Millisecond) }

// verb is a method's name for a message.
func verb(method string) string {
	switch method {
	case "CloseIO":
		return "close stdin"
	case "ResizePty":
		return "resize terminal"
	}
	return strings.ToLower(strings.Replace(method, "Sandbox", "", 1))
}

// isClosed says whether a call failed because the connection ended.
func isClosed(c wireConn, err error) bool {
	if errors.Is(err, ttrpc.ErrClosed) {
		return true
	}
	if errdefs.IsUnavailable(err) {
		if g, ok := c.(*grpcConn); ok {
			return g.broken()
		}
	}
	return false
}

// once makes a call over one connection, in the version of the task API that
// the shim knows: 3, or 2 if it does not know 3 (contract 1.4.3).
func (l *link) once(ctx context.Context, c wireConn, ns namespace.ID, method string, req, resp proto.Message) error {
	l.mu.Lock()
	v := l.version
	l.mu.Unlock()
	err := c.call(ctx, ns, service(v), method, req, resp)
	if v == 2 || !errdefs.IsNotImplemented(err) {
		return err
	}
	older := c.call(ctx, ns, service(2), method, req, resp)
	if errdefs.IsNotImplemented(older) {
		return err
	}
	l.mu.Lock()
	l.version = 2
	l.mu.Unlock()
	return older
}

func service(version int) string {
	return "containerd.task.v" + strconv.Itoa(version) + ".Task"
}

// probe asks the shim who it is, which shows that it answers.
func (l *link) probe(ctx context.Context, k key) error {
	var r taskapi.ConnectResponse
	err := l.call(ctx, k, "Connect", bound{l.m.limit.Load, "timeout shim.load"}, &taskapi.ConnectRequest{ID: string(k.id)}, &r)
	if err != nil {
		return err
	}
	l.know(int(r.ShimPid), k)
	return nil
}

// know remembers the shim's process. A file descriptor keeps its number from
// being taken for another process's later. A number from a shim that is in
// another pid namespace, or a virtual machine, names some other process here:
// the command line tells.
func (l *link) know(pid int, k key) {
	l.mu.Lock()
	known := l.pid == pid || l.foreign
	l.mu.Unlock()
	if known || pid <= 1 {
		return
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		fd = -1
	}
	if fd >= 0 && !looksLikeShim(pid, k) {
		unix.Close(fd)
		fd = -1
	}
	l.mu.Lock()
	old := l.pidfd
	l.pid, l.pidfd = pid, fd
	over := l.isOver
	if over {
		l.pidfd = -1
	}
	l.mu.Unlock()
	if old >= 0 {
		unix.Close(old)
	}
	if over && fd >= 0 {
		unix.Close(fd)
	}
}

// search finds the process of a shim that never said which one it is: it works
// in the bundle that it was started in.
func (l *link) search(k key) {
	dir := l.m.bundle(k).path
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		if cwd, err := os.Readlink("/proc/" + p.Name() + "/cwd"); err == nil && cwd == dir {
			l.know(pid, k)
		}
	}
}

// looksLikeShim says whether a process was called the way shims are.
func looksLikeShim(pid int, k key) bool {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil {
		return false
	}
	args := bytes.Split(raw, []byte{0})
	for i := range args {
		if string(args[i]) == "-namespace" && i+1 < len(args) && string(args[i+1]) == string(k.ns) {
			return true
		}
	}
	return false
}

func (l *link) shimPid() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pid
}

// describe names the shim for a message, and says what the kernel knows of it.
func (l *link) describe() string {
	pid := l.shimPid()
	if pid == 0 {
		return "the shim at " + l.addr.Address
	}
	s := "shim pid " + strconv.Itoa(pid)
	if doing := doing(pid); doing != "" {
		s += " (" + doing + ")"
	}
	return s
}

// doing is a process's state and what it waits for in the kernel.
func doing(pid int) string {
	dir := "/proc/" + strconv.Itoa(pid)
	raw, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return "gone"
	}
	i := bytes.LastIndexByte(raw, ')')
	if i < 0 || i+2 >= len(raw) {
		return ""
	}
	names := map[byte]string{'R': "running", 'S': "sleeping", 'D': "in uninterruptible sleep", 'T': "stopped", 't': "traced", 'Z': "dead"}
	s := names[raw[i+2]]
	if w, err := os.ReadFile(dir + "/wchan"); err == nil && len(w) > 1 {
		s += " in " + string(w)
	}
	return s
}

// kill ends a shim that does not end by itself.
func (l *link) kill() bool {
	l.mu.Lock()
	fd := l.pidfd
	l.mu.Unlock()
	if fd < 0 {
		return false
	}
	return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil
}

// stop ends the shim, of which this was the last container: it is asked first,
// and killed if it does not go (contract 5.2.9, 13.22).
func (l *link) stop(ctx context.Context, k key) {
	defer l.close()
	l.mu.Lock()
	foreign := l.foreign
	l.mu.Unlock()
	if foreign {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.m.limit.Shutdown)
	defer cancel()
	c, err := l.get(ctx) // a connection that broke is being made again
	if errors.Is(err, errShimDead) {
		return
	}
	if err == nil {
		err = l.once(ctx, c, k.ns, "Shutdown", &taskapi.ShutdownRequest{ID: string(k.id)}, empty())
		if err == nil || isClosed(c, err) {
			select {
			case <-c.closed():
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
	}
	if !l.awaitEnd(ctx) {
		if l.shimPid() == 0 {
			l.search(k)
		}
		l.m.log.Warn("shim does not stop", "namespace", k.ns, "id", k.id, "pid", l.shimPid(), "error", err)
		if l.kill() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			l.awaitEnd(ctx)
		}
	}
	removeSocket(l.addr.Address)
}

// purge kills and deletes a task that nobody is to have, and returns its exit:
// nil if the shim does not know it.
func (l *link) purge(ctx context.Context, k key) (*task.Exit, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*l.m.limit.Cleanup)
	defer cancel()
	b, id := bound{l.m.limit.Cleanup, "timeout shim.cleanup"}, string(k.id)
	err := l.call(ctx, k, "Kill", b, &taskapi.KillRequest{ID: id, Signal: uint32(unix.SIGKILL), All: true}, empty())
	if err == nil {
		// An error shows in Delete, which is refused while it runs.
		_ = l.call(ctx, k, "Wait", b, &taskapi.WaitRequest{ID: id}, &taskapi.WaitResponse{})
	}
	var r taskapi.DeleteResponse
	err = l.call(ctx, k, "Delete", b, &taskapi.DeleteRequest{ID: id}, &r)
	switch {
	case err == nil:
		return &task.Exit{Pid: r.Pid, Status: r.ExitStatus, At: wire.TimeFromProto(r.ExitedAt)}, nil
	case errdefs.IsNotFound(err) && !errors.Is(err, errShimDead):
		return nil, nil
	}
	return nil, err
}

// awaitEnd waits until the shim's process is gone.
func (l *link) awaitEnd(ctx context.Context) bool {
	l.mu.Lock()
	fd := l.pidfd
	c := l.conn
	l.mu.Unlock()
	if fd < 0 {
		if c == nil {
			return true
		}
		select {
		case <-c.closed():
			return true
		case <-ctx.Done():
			return false
		}
	}
	for {
		ms := 1000
		if d, ok := ctx.Deadline(); ok {
			ms = int(max(0, time.Until(d).Milliseconds()))
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, ms)
		if n > 0 {
			return true
		}
		if err != nil && err != unix.EINTR || ctx.Err() != nil {
			return false
		}
	}
}

// ttrpcConn speaks ttrpc.
type ttrpcConn struct {
	c    *ttrpc.Client
	done chan struct{}
}

func (t *ttrpcConn) call(ctx context.Context, ns namespace.ID, service, method string, req, resp proto.Message) error {
	md := ttrpc.MD{}
	md.Set(wire.HeaderNamespaceTTRPC, string(ns))
	err := t.c.Call(ttrpc.WithMetadata(ctx, md), service, method, req, resp)
	if err == nil || errors.Is(err, ttrpc.ErrClosed) || ctx.Err() != nil {
		return err
	}
	select {
	case <-t.done: // whatever the words for it are
		return ttrpc.ErrClosed
	default:
	}
	return native(err)
}

// native gives a shim's error its class. Some shims answer without one, but
// with its words at the end; others tell their errors twice.
func native(err error) error {
	err = errgrpc.ToNative(wire.Once(err))
	if err == nil || !errdefs.IsUnknown(err) {
		return err
	}
	for _, class := range []error{errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition, errdefs.ErrNotImplemented} {
		if text, ok := strings.CutSuffix(err.Error(), ": "+class.Error()); ok {
			return fmt.Errorf("%s: %w", text, class)
		}
	}
	return err
}

func (t *ttrpcConn) closed() <-chan struct{} { return t.done }
func (t *ttrpcConn) close()                  { t.c.Close() }

// grpcConn speaks gRPC, over one transport that is not made again in secret.
type grpcConn struct {
	cc   *grpc.ClientConn
	done chan struct{}
	once sync.Once
}

func dialGRPC(ctx context.Context, address string) (wireConn, error) {
	first, err := dial(ctx, address)
	if err != nil {
		return nil, err
	}
	g := &grpcConn{done: make(chan struct{})}
	taken := make(chan net.Conn, 1)
	taken <- &tellClose{Conn: first, tell: g.end}
	g.cc, err = grpc.NewClient("passthrough:///shim",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(wire.MaxMessage)),
		grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-taken:
				return c, nil
			default:
				return nil, net.ErrClosed
			}
		}))
	if err != nil {
		first.Close()
		return nil, err
	}
	g.cc.Connect()
	return g, nil
}

func (g *grpcConn) end() { g.once.Do(func() { close(g.done) }) }

func (g *grpcConn) broken() bool {
	select {
	case <-g.done:
		return true
	default:
		return g.cc.GetState() == connectivity.TransientFailure
	}
}

// tellClose says when the transport closes the connection.
type tellClose struct {
	net.Conn
	tell func()
}

func (c *tellClose) Close() error {
	c.tell()
	return c.Conn.Close()
}

func (g *grpcConn) call(ctx context.Context, ns namespace.ID, service, method string, req, resp proto.Message) error {
	ctx = metadata.AppendToOutgoingContext(ctx, wire.HeaderNamespace, string(ns), wire.HeaderNamespaceTTRPC, string(ns))
	return native(g.cc.Invoke(ctx, "/"+service+"/"+method, req, resp))
}

func (g *grpcConn) closed() <-chan struct{} { return g.done }
func (g *grpcConn) close()                  { g.cc.Close(); g.end() }
