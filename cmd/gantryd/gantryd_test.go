package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	eventsttrpc "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/containerrpc"
	"github.com/gantryd/gantry/internal/edge/wire/eventrpc"
	"github.com/gantryd/gantry/internal/edge/wire/imagerpc"
	"github.com/gantryd/gantry/internal/edge/wire/introspectionrpc"
	"github.com/gantryd/gantry/internal/edge/wire/leaserpc"
	"github.com/gantryd/gantry/internal/edge/wire/snapshotrpc"
)

// The test binary is the daemon when this variable is set, so that the tests
// need nothing built.
const asDaemon = "GANTRYD_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asDaemon) != "" {
		main()
		return
	}
	if sock := os.Getenv(asProbe); sock != "" {
		probe(sock)
		return
	}
	os.Exit(m.Run())
}

// server is a gantryd with directories of its own.
type server struct {
	t    *testing.T
	dir  string
	sock string
	cmd  *exec.Cmd
	log  *buffer
	env  []string
	args []string
	done chan error
}

type buffer struct{ f *os.File }

func (b *buffer) String() string {
	out, err := os.ReadFile(b.f.Name())
	if err != nil {
		return err.Error()
	}
	return string(out)
}

func newServer(t *testing.T, extra string) *server {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the daemon needs root: it mounts")
	}
	dir, err := os.MkdirTemp("", "gd")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, dir: dir, sock: dir + "/s"}
	if !strings.Contains(extra, "nri.v1") {
		extra += "\n[plugins.'io.containerd.nri.v1.nri']\ndisable = true\n" // its socket is the host's
	}
	config := fmt.Sprintf("version = 4\nroot = %q\nstate = %q\n%s\n[plugins.'io.containerd.server.v1.grpc']\naddress = %q\n[plugins.'io.containerd.server.v1.ttrpc']\naddress = %q\n",
		dir+"/root", dir+"/state", extra, s.sock, s.sock+".ttrpc")
	if err := os.WriteFile(dir+"/config.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(dir + "/log")
	if err != nil {
		t.Fatal(err)
	}
	s.log = &buffer{f}
	t.Cleanup(func() {
		s.stop()
		f.Close()
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", s.log)
		}
		os.RemoveAll(dir)
	})
	return s
}

func (s *server) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	s.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0], append([]string{"--config", s.dir + "/config.toml"}, args...)...)
	cmd.Env = append(append(os.Environ(), asDaemon+"=1"), s.env...)
	return cmd
}

// start runs the daemon and waits until it says that it has booted.
func (s *server) start() {
	s.t.Helper()
	s.cmd = s.command(s.args...)
	s.cmd.Stderr = s.log.f
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.done = make(chan error, 1)
	go func(cmd *exec.Cmd, done chan error) { done <- cmd.Wait() }(s.cmd, s.done)
	deadline := time.Now().Add(30 * time.Second)
	for !strings.Contains(s.log.String(), "successfully booted") {
		select {
		case err := <-s.done:
			s.done <- err
			s.t.Fatalf("the daemon ended: %v\n%s", err, s.log)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the daemon has not booted within 30 s:\n%s", s.log)
		}
	}
}

// stop sends SIGTERM and waits; the test fails if that takes 15 s.
func (s *server) stop() error {
	if s.cmd == nil {
		return nil
	}
	s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-s.done:
		s.cmd = nil
		return err
	case <-time.After(15 * time.Second):
		s.cmd.Process.Kill()
		<-s.done
		s.cmd = nil
		s.t.Error("the daemon did not end within 15 s of SIGTERM")
		return nil
	}
}

func (s *server) dial() *grpc.ClientConn {
	s.t.Helper()
	conn, err := grpc.NewClient("unix://"+s.sock, wire.DialOptions()...)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

// contract: 1.1.1, 8.2.3, 8.2.4, 8.2.5, 2.3.2, 10.1
func TestLife(t *testing.T) {
	s := newServer(t, "")
	notifications, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notifications.Close()
	notified := func() string {
		notifications.SetReadDeadline(time.Now().Add(10 * time.Second))
		b := make([]byte, 100)
		n, err := notifications.Read(b)
		if err != nil {
			t.Errorf("no notification: %v", err)
		}
		return string(b[:n])
	}
	s.env = []string{"NOTIFY_SOCKET=" + s.dir + "/notify", "TMPDIR=" + s.dir}
	if err := os.MkdirAll(filepath.Dir(s.sock), 0o711); err != nil {
		t.Fatal(err)
	}
	stale, err := net.Listen("unix", s.sock) // what a killed daemon leaves
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()
	s.start()
	if got := notified(); got != "READY=1" {
		t.Errorf("notified %q", got)
	}
	for path, want := range map[string]os.FileMode{s.sock: 0o660 | os.ModeSocket, s.sock + ".ttrpc": 0o660 | os.ModeSocket, s.dir + "/root": 0o700 | os.ModeDir, s.dir + "/state": 0o711 | os.ModeDir} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s: mode %v, %v; want %v", path, info.Mode(), err, want)
		}
	}
	if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Process.Signal(syscall.SIGPIPE); err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	dump := fmt.Sprintf("%s/gantry.%d.stacks.log", s.dir, s.cmd.Process.Pid)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if b, err := os.ReadFile(dump); err == nil && bytes.Contains(b, []byte("goroutine")) && strings.Contains(s.log.String(), "END goroutine") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no goroutine dump after SIGUSR1: a signal before it has killed the daemon, or the dump is missing")
		}
	}
	conn := s.dial()
	if _, err := introspectionrpc.NewClient(conn).Server(t.Context()); err != nil {
		t.Errorf("after SIGHUP: %v", err)
	}
	sub, err := eventrpc.NewClient(conn).Subscribe(t.Context()) // an open stream does not keep it from ending
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	if err := s.stop(); err != nil {
		t.Errorf("exit: %v", err)
	}
	if got := notified(); got != "STOPPING=1" {
		t.Errorf("notified %q", got)
	}
}

// contract: 4.4.4, 13.41
func TestSecondDaemon(t *testing.T) {
	s := newServer(t, "")
	s.start()
	first := s.cmd.Process.Pid
	out, err := s.command("--address", s.dir+"/other").CombinedOutput()
	if err == nil {
		t.Fatal("a second daemon started on the same root")
	}
	for _, want := range []string{s.dir + "/root", fmt.Sprint(first)} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the error does not name %s: %s", want, out)
		}
	}
	if _, err := introspectionrpc.NewClient(s.dial()).Server(t.Context()); err != nil {
		t.Errorf("the first daemon is disturbed: %v", err)
	}
}

// contract: 2.3.5, 2.3.14, 8.2.1, 8.2.2
func TestConfigurations(t *testing.T) {
	s := newServer(t, "surprise = 1\n[plugins.'io.containerd.gc.v1.scheduler']\nmutation_threshold = 'many'\n")
	path := s.dir + "/config.toml"
	for _, tc := range []struct {
		args []string
		ok   bool
		want []string
	}{
		{[]string{"config", "check"}, false, []string{path + ":4:", "surprise", path + ":6:", "mutation_threshold"}},
		{[]string{"config", "check", path}, false, []string{"one file is checked at a time"}}, // the other is that of --config
		{[]string{"config", "chek"}, false, []string{`unknown command "chek"`}},
		{[]string{"config"}, true, []string{"check", "effective", "migrate"}},
		{[]string{"--strict"}, false, []string{path + ":4:", "surprise"}},
		{[]string{"config", "dump"}, true, []string{"version = 4", s.sock}},
		{[]string{"config", "effective"}, true, []string{path + ":"}},
		{[]string{"config", "default"}, true, []string{"version = 4", "/run/gantry/gantry.sock"}},
		{[]string{"config", "migrate"}, true, []string{"version = 4"}},
		{[]string{"--version"}, true, []string{"gantryd github.com/gantryd/gantry unknown unknown"}},
		{[]string{"--nonsense"}, false, []string{"unknown flag: --nonsense"}},
		{[]string{"extra"}, false, []string{"extra"}},
		{[]string{"--log-level", "loud"}, false, []string{"loud"}},
		{[]string{"--config", s.dir + "/absent.toml"}, false, []string{"absent.toml"}},
	} {
		cmd := s.command(tc.args...)
		out, err := cmd.CombinedOutput()
		if (err == nil) != tc.ok {
			t.Errorf("gantryd %v: %v\n%s", tc.args, err, out)
		}
		for _, w := range tc.want {
			if !strings.Contains(string(out), w) {
				t.Errorf("gantryd %v does not say %q:\n%s", tc.args, w, out)
			}
		}
	}
	alone := exec.CommandContext(t.Context(), os.Args[0], "config", "check", path)
	alone.Env = append(os.Environ(), asDaemon+"=1")
	if out, err := alone.CombinedOutput(); err == nil || !strings.Contains(string(out), path+":6:") {
		t.Errorf("config check FILE: %v\n%s", err, out)
	}
	// Warnings do not keep it from starting.
	s.start()
	if log := s.log.String(); !strings.Contains(log, path+":4:1") || !strings.Contains(log, "surprise") {
		t.Errorf("no warning in the log:\n%s", log)
	}
}

// contract: 1.1.2, 1.4.1, 10.2
func TestTTRPC(t *testing.T) {
	s := newServer(t, "")
	s.start()
	sub, err := eventrpc.NewClient(s.dial()).Subscribe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	c, err := net.Dial("unix", s.sock+".ttrpc")
	if err != nil {
		t.Fatal(err)
	}
	cl := ttrpc.NewClient(c)
	defer cl.Close()
	payload := &anypb.Any{TypeUrl: "org.example.Thing", Value: []byte{1}}
	if _, err := eventsttrpc.NewTTRPCEventsClient(cl).Forward(t.Context(), &eventsttrpc.ForwardRequest{Envelope: &types.Envelope{Namespace: "n", Topic: "/a/b", Event: payload}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	e, err := sub.Next(ctx)
	if err != nil || e.Namespace != "n" || e.Topic != "/a/b" || e.Event.TypeURL() != payload.TypeUrl {
		t.Errorf("forwarded: %+v, %v", e, err)
	}
	// Another user's connection is not served.
	if err := errors.Join(os.Chmod(s.dir, 0o755), os.Chmod(s.sock+".ttrpc", 0o666)); err != nil {
		t.Fatal(err)
	}
	self := s.dir + "/probe" // where another user can execute it
	b, err := os.ReadFile(os.Args[0])
	if err == nil {
		err = os.WriteFile(self, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	probe := exec.Command(self)
	probe.Env = []string{asProbe + "=" + s.sock + ".ttrpc"}
	probe.Dir = "/"
	probe.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := probe.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != "closed" {
		t.Errorf("a connection of another user was not closed: %v %s", err, out)
	}
}

// asProbe names the socket that a probe connects to.
const asProbe = "GANTRYD_TEST_PROBE"

// probe says whether the other side closes a connection without a word.
func probe(sock string) {
	c, err := net.DialTimeout("unix", sock, 10*time.Second)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n == 0 && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) {
		fmt.Println("closed")
	} else {
		fmt.Println(n, err)
	}
}

// contract: 1.1.6, 13.42
func TestMessageLimits(t *testing.T) {
	s := newServer(t, "")
	s.start()
	conn := s.dial()
	images := imagerpc.NewClient(conn, "default", "")
	long := strings.Repeat("x", 4000)
	create := func(i, labels int) error {
		img := image.Image{Name: fmt.Sprintf("i%d", i), Labels: map[string]string{}}
		img.Target.Digest, img.Target.MediaType, img.Target.Size = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "m", 1
		for n := range labels {
			img.Labels[fmt.Sprint(n)] = long
		}
		_, err := images.Create(t.Context(), img)
		return err
	}
	if err := create(0, 3500); err != nil { // 14 MB
		t.Errorf("a message of 14 MB: %v", err)
	}
	if err := create(1, 5000); err == nil { // 20 MB
		t.Error("a message of 20 MB was taken")
	}
	if img, err := images.Get(t.Context(), "i0"); err != nil || len(img.Labels) != 3500 {
		t.Errorf("the answer of 14 MB: %d labels, %v", len(img.Labels), err)
	}
}

// contract: 3.1.9, 13.40
func TestTempMountsAreCleaned(t *testing.T) {
	s := newServer(t, "")
	left := s.dir + "/root/tmpmounts/left"
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", left, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(left, syscall.MNT_DETACH) })
	s.start()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte(left)) {
		t.Error("a mount that a killed daemon left is still there")
	}
}

// contract: 7.3.29, 4.4.3, 3.1.2, 4.1.8, 1.3.21
func TestRecordedRoot(t *testing.T) {
	s := newServer(t, "")
	if out, err := exec.Command("tar", "-C", s.dir, "-xzf", "../../internal/engine/testdata/containerd-2.4-root.tgz").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	uuid, err := os.ReadFile(s.dir + "/root/io.containerd.grpc.v1.introspection/uuid")
	if err != nil {
		t.Fatal(err)
	}
	s.start()
	conn := s.dial()
	ctx := t.Context()
	if info, err := introspectionrpc.NewClient(conn).Server(ctx); err != nil || info.UUID != string(uuid) {
		t.Errorf("uuid %q, %v; want %s", info.UUID, err, uuid)
	}
	images, err := imagerpc.NewClient(conn, "default", "").List(ctx)
	if err != nil || len(images) != 1 {
		t.Fatalf("images: %v, %v", images, err)
	}
	var ctrs []container.Container
	if err := containerrpc.NewClient(conn, "default", "").Walk(ctx, func(c container.Container) error { ctrs = append(ctrs, c); return nil }); err != nil || len(ctrs) != 1 {
		t.Fatalf("containers: %v, %v", ctrs, err)
	}
	if leases, err := leaserpc.NewClient(conn, "default").List(ctx); err != nil || len(leases) != 1 {
		t.Errorf("leases: %v, %v", leases, err)
	}
	st := snapshotrpc.NewClient(conn, "default", "", "overlayfs")
	mounts, err := st.Mounts(ctx, ctrs[0].SnapshotKey)
	if err != nil || len(mounts) == 0 {
		t.Errorf("the container's snapshot: %v, %v", mounts, err)
	}
}

// contract: 2.2.1, 2.2.2, 2.2.3, 2.2.4, 2.2.5, 2.2.6, 2.2.7, 2.2.8, 2.2.9, 2.2.10, 2.2.11, 2.2.12, 2.2.15, 2.2.16, 2.2.18, 2.2.21, 2.2.22, 2.2.25, 2.2.26, 2.2.28, 2.1.2, 2.1.3, 13.11, 5.5.6
func TestPlugins(t *testing.T) {
	s := newServer(t, "")
	s.start()
	list, err := introspectionrpc.NewClient(s.dial()).Plugins(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]introspectionrpc.Plugin{}
	for _, p := range list {
		have[p.Type+"."+p.ID] = p
		if p.InitErr != "" && !p.Skipped() {
			t.Errorf("%s.%s has failed: %s", p.Type, p.ID, p.InitErr)
		}
	}
	root := s.dir + "/root/"
	for uri, exports := range map[string]map[string]string{
		"io.containerd.content.v1.content":         {"root": root + "io.containerd.content.v1.content"},
		"io.containerd.metadata.v1.bolt":           {"policy": "shared", "path": root + "io.containerd.metadata.v1.bolt/meta.db"},
		"io.containerd.snapshotter.v1.overlayfs":   {"root": root + "io.containerd.snapshotter.v1.overlayfs"},
		"io.containerd.snapshotter.v1.native":      {"root": root + "io.containerd.snapshotter.v1.native"},
		"io.containerd.differ.v1.walking":          nil,
		"io.containerd.gc.v1.scheduler":            {"PauseThreshold": "0.02", "MutationThreshold": "100", "DeletionThreshold": "0", "ScheduleDelay": "0s"},
		"io.containerd.lease.v1.manager":           nil,
		"io.containerd.event.v1.exchange":          nil,
		"io.containerd.runtime.v2.task":            {"log-uri-schemes": "fifo,binary,binary-v2,file"},
		"io.containerd.shim.v1.manager":            nil,
		"io.containerd.sandbox.store.v1.local":     nil,
		"io.containerd.sandbox.controller.v1.shim": nil, "io.containerd.podsandbox.controller.v1.podsandbox": nil,
		"io.containerd.cri.v1.images": nil, "io.containerd.cri.v1.runtime": nil, "io.containerd.grpc.v1.cri": nil, "io.containerd.nri.v1.nri": nil,
		"io.containerd.streaming.v1.manager":    nil,
		"io.containerd.transfer.v1.local":       nil,
		"io.containerd.warning.v1.deprecations": nil,
		"io.containerd.server.v1.grpc":          nil,
		"io.containerd.server.v1.ttrpc":         nil,
	} {
		p, ok := have[uri]
		if !ok {
			t.Errorf("%s is not listed", uri)
		}
		for k, want := range exports {
			if p.Exports[k] != want {
				t.Errorf("%s exports %s=%q, want %q", uri, k, p.Exports[k], want)
			}
		}
	}
	for _, id := range []string{"containers", "content", "diff", "events", "healthcheck", "images", "introspection", "leases", "namespaces", "sandboxes", "snapshots", "streaming", "tasks", "transfer", "version"} {
		if _, ok := have["io.containerd.grpc.v1."+id]; !ok {
			t.Errorf("io.containerd.grpc.v1.%s is not listed", id)
		}
	}
	for _, id := range []string{"containers", "content", "diff", "images", "introspection", "namespaces", "snapshots", "tasks"} {
		if _, ok := have["io.containerd.service.v1."+id+"-service"]; !ok {
			t.Errorf("io.containerd.service.v1.%s-service is not listed", id)
		}
	}
	caps := have["io.containerd.snapshotter.v1.overlayfs"].Capabilities
	if !slices.Contains(caps, "rebase") {
		t.Errorf("overlayfs has the capabilities %v, want rebase among them", caps)
	}
	for _, uri := range []string{"io.containerd.runtime.v2.task", "io.containerd.snapshotter.v1.overlayfs"} {
		if p := have[uri].Platforms; len(p) != 1 || p[0].OS != "linux" {
			t.Errorf("%s has the platforms %v", uri, p)
		}
	}
}

// The file that dockerd writes for a containerd of its own.
//
// contract: 8.2.6, 13.12, 2.3.1, 2.3.7, 13.43
func TestManagedByDockerd(t *testing.T) {
	s := newServer(t, "")
	config := fmt.Sprintf("disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\nimports = []\noom_score = 0\nroot = %q\nstate = %q\ntemp = \"\"\nversion = 2\n\n[cgroup]\n  path = \"\"\n\n"+
		"[debug]\n  address = %q\n  format = \"\"\n  gid = 0\n  level = \"\"\n  uid = 0\n\n[grpc]\n  address = %q\n  gid = 0\n  max_recv_message_size = 16777216\n  max_send_message_size = 16777216\n  uid = 0\n\n[plugins]\n",
		s.dir+"/root", s.dir+"/state", s.dir+"/debug.sock", s.sock)
	if err := os.WriteFile(s.dir+"/config.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start()
	conn := s.dial()
	if _, err := introspectionrpc.NewClient(conn).Server(t.Context()); err != nil {
		t.Error(err)
	}
	if r, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || r.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", r, err)
	}
	if _, err := os.Stat(s.sock + ".ttrpc"); err != nil {
		t.Errorf("the ttrpc address is not derived from a file of version 2: %v", err)
	}
	if err := s.stop(); err != nil {
		t.Errorf("exit: %v", err)
	}
}
