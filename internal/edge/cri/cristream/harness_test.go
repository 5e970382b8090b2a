//go:build linux

package cristream

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/websocket"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/oci"
	"github.com/gantryd/gantry/test/daemontest"
)

// binDir has gantryd and its shim.
var binDir string

func TestMain(m *testing.M) { os.Exit(daemontest.Main(m, "../../../..", &binDir)) }

// rig is a daemon with containers, a Service on its tasks, and a Server.
type rig struct {
	t   *testing.T
	d   *daemontest.Daemon
	v   view.View
	s   *Service
	srv *Server

	mu         sync.Mutex
	containers map[string]Container
	pods       map[string]Pod
	drain      time.Duration
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, containers: map[string]Container{}, pods: map[string]Pod{}}
	r.d = daemontest.New(t, filepath.Join(binDir, "gantryd"), 4, "")
	t.Cleanup(func() { os.RemoveAll("/run/containerd/runc/" + r.d.Mark) })
	if err := r.d.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := client.Dial(r.d.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if r.v, err = c.In(namespace.ID(r.d.Mark), ""); err != nil {
		t.Fatal(err)
	}
	r.s = r.service(r.v.Tasks(), 0)
	r.srv = r.serve(r.s, cristate.DefaultServerConfig())
	return r
}

// service makes a Service that must leave nothing behind.
func (r *rig) service(tasks Tasks, drain time.Duration) *Service {
	r.t.Helper()
	dir := filepath.Join(r.t.TempDir(), "streams")
	s, err := Open(r.t.Context(), Deps{Tasks: tasks, Dir: dir, Drain: drain, Log: slog.New(slog.NewTextHandler(r.t.Output(), nil)),
		Container: func(_ context.Context, id string) (Container, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			c, ok := r.containers[id]
			if !ok {
				return Container{}, errNoContainer
			}
			return c, nil
		},
		Pod: func(_ context.Context, id string) (Pod, error) {
			p, ok := r.pods[id]
			if !ok {
				return Pod{}, errNoContainer
			}
			return p, nil
		}})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			r.t.Error(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			r.t.Errorf("left in the directory of FIFOs: %v %v", left, err)
		}
	})
	return s
}

func (r *rig) serve(s *Service, c cristate.ServerConfig) *Server {
	r.t.Helper()
	srv, err := Listen(s, c)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	r.t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				r.t.Error(err)
			}
		case <-time.After(20 * time.Second):
			r.t.Error("the server does not end")
		}
	})
	return srv
}

// run starts a container of busybox whose output goes to a log.
func (r *rig) run(id string, tty, once bool, script string) Container {
	t := r.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	root := filepath.Join(r.d.Dir, "rootfs")
	box, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("busybox-static is needed: ", err)
	}
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "run"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(root, "bin/busybox")); err != nil {
		if err := os.WriteFile(filepath.Join(root, "bin/busybox"), box, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []string{"sh", "cat", "sleep", "setsid", "head", "yes", "stty", "env", "true", "dd", "id"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", a)); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
	}
	facts, err := client.HostFacts(false)
	if err != nil {
		t.Fatal(err)
	}
	opts := []oci.Option{oci.WithResolvedUser(specs.User{}), oci.WithArgs("/bin/sh", "-c", script), oci.WithRootfs(root)}
	if tty {
		opts = append(opts, oci.WithTerminal(80, 24))
	}
	spec, err := oci.Generate(facts, id, r.d.Mark, ocispec.ImageConfig{Env: []string{"PATH=/bin", "MARK=of-the-spec"}}, opts...)
	if err != nil {
		t.Fatal(err)
	}
	rec := container.Container{ID: container.ID(id), Runtime: container.Runtime{Name: client.DefaultRuntime}}
	if rec.Spec, err = client.Encode(client.SpecURL, spec); err != nil {
		t.Fatal(err)
	}
	if _, err := r.v.Containers().Create(ctx, rec); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := Container{ID: rec.ID, Process: spec.Process, TTY: tty, Stdin: true, StdinOnce: once, StdinPath: filepath.Join(dir, "stdin"), LogPath: filepath.Join(dir, "log")}
	if err := syscall.Mkfifo(c.StdinPath, 0o600); err != nil {
		t.Fatal(err)
	}
	log := "file://" + c.LogPath + "?format=cri"
	if _, err := r.v.Tasks().Create(ctx, rec.ID, task.CreateOptions{IO: task.IO{Stdin: c.StdinPath, Stdout: log, Stderr: log, Terminal: tty}}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.v.Tasks().Start(ctx, rec.ID, ""); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	c.Gone = gone
	go func() {
		defer close(gone)
		r.v.Tasks().Wait(context.Background(), rec.ID, "")
	}()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		r.v.Tasks().Kill(ctx, rec.ID, "", uint32(syscall.SIGKILL), true)
		<-gone
		if _, err := r.v.Tasks().Delete(ctx, rec.ID); err != nil {
			t.Error(err)
		}
		if err := r.v.Containers().Delete(ctx, rec.ID); err != nil {
			t.Error(err)
		}
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.containers[id] = c
	return c
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain: ", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// processes counts those whose command line contains a text.
func processes(text string) int {
	n := 0
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(bytes.ReplaceAll(b, []byte{0}, []byte{' '}), []byte(text)) {
			n++
		}
	}
	return n
}

// peer is a client's end of the streams of a process, over either protocol.
type peer struct {
	stdin, resize          io.WriteCloser
	stdout, stderr, status io.Reader
	close                  func()
}

// dialSPDY upgrades a connection; bytes that came with the answer are kept.
func dialSPDY(rawURL, protocol string) (httpstream.Connection, net.Conn, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, nil, err
	}
	var c net.Conn
	if u.Scheme == "https" {
		c, err = tls.Dial("tcp", u.Host, &tls.Config{InsecureSkipVerify: true})
	} else {
		c, err = net.Dial("tcp", u.Host)
	}
	if err != nil {
		return nil, nil, err
	}
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: %s\r\nContent-Length: 0\r\n\r\n", u.Path, protocol)
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		err = errors.New(resp.Status)
	}
	if err == nil && resp.Header.Get("X-Stream-Protocol-Version") != protocol {
		err = fmt.Errorf("protocol %q", resp.Header.Get("X-Stream-Protocol-Version"))
	}
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	conn, err := spdy.NewClientConnection(readFirst{c, br})
	return conn, c, err
}

type readFirst struct {
	net.Conn
	r io.Reader
}

func (r readFirst) Read(p []byte) (int, error) { return r.r.Read(p) }

func create(conn httpstream.Connection, kind string) (httpstream.Stream, error) {
	return conn.CreateStream(http.Header{"Streamtype": {kind}})
}

// overSPDY opens the streams that are wanted, named by their letters: i, o, e
// and t for a terminal.
func overSPDY(t *testing.T, url, want string) *peer {
	t.Helper()
	conn, raw, err := dialSPDY(url, "v4.channel.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{close: func() { conn.Close(); raw.Close() }}
	open := func(kind string) httpstream.Stream {
		s, err := create(conn, kind)
		if err != nil {
			t.Fatal(kind, err)
		}
		return s
	}
	p.status = open("error")
	for _, k := range want {
		switch k {
		case 'i':
			p.stdin = open("stdin")
		case 'o':
			p.stdout = open("stdout")
		case 'e':
			p.stderr = open("stderr")
		case 't':
			p.resize = open("resize")
		}
	}
	t.Cleanup(p.close)
	return p
}

// channel writes messages of one channel.
type channel struct {
	ws *websocket.Conn
	n  byte
}

func (c channel) Write(b []byte) (int, error) {
	return len(b), websocket.Message.Send(c.ws, append([]byte{c.n}, b...))
}

// Close says that the channel ends, as v5 has it.
func (c channel) Close() error { return websocket.Message.Send(c.ws, []byte{255, c.n}) }

func dialWebSocket(rawURL, protocol string) (*websocket.Conn, error) {
	config, err := websocket.NewConfig(strings.Replace(rawURL, "http", "ws", 1), "http://x")
	if err != nil {
		return nil, err
	}
	if protocol != "" {
		config.Protocol = []string{protocol}
	}
	config.TlsConfig = &tls.Config{InsecureSkipVerify: true}
	return websocket.DialConfig(config)
}

// overWebSocket is overSPDY with v5.channel.k8s.io.
func overWebSocket(t *testing.T, url, _ string) *peer {
	t.Helper()
	ws, err := dialWebSocket(url, "v5.channel.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	var r, w [4]*os.File
	for i := 1; i < 4; i++ {
		if r[i], w[i], err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r[i].Close() })
	}
	go func() {
		for {
			var b []byte
			if websocket.Message.Receive(ws, &b) != nil {
				break
			}
			if len(b) > 0 && b[0] < 4 && b[0] > 0 {
				w[b[0]].Write(b[1:])
			}
		}
		closeAll(w[1:]...)
	}()
	p := &peer{stdin: channel{ws, 0}, resize: channel{ws, 4}, stdout: r[1], stderr: r[2], status: r[3], close: func() { ws.Close() }}
	t.Cleanup(p.close)
	return p
}
