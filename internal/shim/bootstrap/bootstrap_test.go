//go:build linux

package bootstrap

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"google.golang.org/protobuf/proto"
)

// contract: 5.2.7
func TestSocketDir(t *testing.T) {
	env := func(kv string) func(string) string {
		return func(k string) string {
			v, _ := strings.CutPrefix(kv, k+"=")
			if v == kv {
				return ""
			}
			return v
		}
	}
	given := "/given"
	for _, c := range []struct {
		r    request
		uid  int
		env  string
		want string
	}{
		{request{}, 0, "", "/run/containerd/s"},
		{request{params: &bootapi.BootstrapParams{SocketDir: &given}}, 0, "", "/given"},
		{request{params: &bootapi.BootstrapParams{}}, 0, "XDG_RUNTIME_DIR=/x", "/run/containerd/s"},
		{request{}, 987654, "XDG_RUNTIME_DIR=/x", "/x/containerd/s"},
		{request{}, 987654, "", "/tmp/containerd-s-987654"},
	} {
		if got := socketDir(c.r, c.uid, env(c.env)); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

// contract: 5.2.7
func TestSocketPath(t *testing.T) {
	a, err := socketPath("/run/containerd/s", "/run/containerd/containerd.sock", "default", "c1")
	if err != nil || len(filepath.Base(a)) != 64 {
		t.Errorf("%s %v", a, err)
	}
	for _, other := range [][3]string{{"/x", "default", "c1"}, {"/run/containerd/containerd.sock", "other", "c1"}, {"/run/containerd/containerd.sock", "default", "c2"}} {
		if b, _ := socketPath("/run/containerd/s", other[0], other[1], other[2]); b == a {
			t.Errorf("%v has the same socket", other)
		}
	}
	long := "/" + strings.Repeat("d", 70)
	if p, err := socketPath(long, "a", "b", "c"); err != nil || len(p) > maxSocketPath {
		t.Errorf("%d bytes: %v", len(p), err)
	}
	if _, err := socketPath("/"+strings.Repeat("d", 100), "a", "b", "c"); err == nil {
		t.Error("a directory that is too long is accepted")
	}
}

// contract: 5.2.7, 10.14
func TestMakeSocketDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "s")
	for _, mode := range []os.FileMode{0, 0o777, 0o600, 0o711} {
		if mode != 0 {
			if err := os.Chmod(dir, mode); err != nil {
				t.Fatal(err)
			}
		}
		if err := makeSocketDir(dir); err != nil {
			t.Fatal(err)
		}
		if info, _ := os.Stat(dir); info.Mode().Perm() != 0o700 {
			t.Errorf("from %o: %o", mode, info.Mode().Perm())
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if err := makeSocketDir(link); err == nil {
		t.Error("a link is accepted")
	}
}

// contract: 5.2.11
func TestOOMScore(t *testing.T) {
	for daemon, want := range map[int]int{-1000: -999, -999: -998, 0: 1, 999: 1000, 1000: 1000} {
		if got := oomScore(daemon); got != want {
			t.Errorf("%d: %d", daemon, got)
		}
	}
}

// contract: 5.2.9
func TestGroup(t *testing.T) {
	for config, want := range map[string]string{
		`{}`: "c1",
		`{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}`:                                   "pod",
		`{"annotations":{"io.containerd.runc.v2.group":"g","io.kubernetes.cri.sandbox-id":"pod"}}`: "g",
	} {
		dir := t.TempDir()
		if err := os.WriteFile(dir+"/config.json", []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := group(dir, "c1"); err != nil || got != want {
			t.Errorf("%s: %q %v", config, got, err)
		}
	}
	if got, err := group(t.TempDir(), "c1"); err != nil || got != "c1" {
		t.Errorf("no spec: %q %v", got, err)
	}
}

// contract: 8.3.1
func TestParse(t *testing.T) {
	a, err := Parse([]string{"-namespace", "ns", "-address", "/a", "-publish-binary", "/b", "-id", "c1", "-debug", "-debug-socket", "x", "-socket", "/s", "-bundle", "/bundle", "start"}, io.Discard)
	want := Args{Namespace: "ns", Address: "/a", PublishBinary: "/b", ID: "c1", Debug: true, DebugSocket: "x", Socket: "/s", Bundle: "/bundle", Action: "start"}
	if err != nil || a != want {
		t.Errorf("%+v %v", a, err)
	}
	for _, f := range []string{"-v", "-version", "-info"} {
		if a, err := Parse([]string{f}, io.Discard); err != nil || !a.Version && !a.Info {
			t.Errorf("%s: %+v %v", f, a, err)
		}
	}
}

// A shim that nobody is connected to is told so, and only then.
// promise: P6
func TestAbandoned(t *testing.T) {
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	inner, err := listen(dir + "/s")
	if err != nil {
		t.Fatal(err)
	}
	idle := make(chan struct{}, 10)
	l := &watchedListener{Listener: inner, after: 100 * time.Millisecond, idle: func() { idle <- struct{}{} }, wrote: make(chan struct{})}
	defer l.Close()
	l.arm()
	client, err := net.Dial("unix", dir+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-idle:
		t.Fatal("idle with a connection")
	case <-time.After(300 * time.Millisecond):
	}
	wrote := l.nextWrite()
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-wrote:
	default:
		t.Error("a write is not noticed")
	}
	conn.Close()
	conn.Close()
	select {
	case <-idle:
	case <-time.After(10 * time.Second):
		t.Fatal("not idle without a connection")
	}
}

// Whatever is on stdin, the answer is options or an error.
func FuzzDecode(f *testing.F) {
	params, err := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "c1", Namespace: "ns", ContainerdBinary: "x", Extensions: []*bootapi.Extension{{}, nil}})
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range [][]byte{nil, params, {10, 0}, {0xff}, []byte("\n\x1bcontainerd.runc.v1.Options\x12\x02\x08\x01"), []byte("{}")} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r, err := decode(Args{ID: "c1", Namespace: "ns"}, in)
		if err == nil && r.options == nil {
			t.Errorf("%q: neither options nor an error", in)
		}
		if err == nil {
			if out, err := answer(r, "2", "unix:///x"); err != nil || len(out) == 0 {
				t.Errorf("%q: answer %q %v", in, out, err)
			}
		}
	})
}

// A shim that was killed may still listen for a moment, when the first of its
// threads is gone and others are not; one that lives keeps its socket.
// contract: 5.2.1
func TestRemoveSocket(t *testing.T) {
	for _, dying := range []bool{false, true} {
		bundle, err := os.MkdirTemp("", "g")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(bundle) })
		path := filepath.Join(bundle, "s")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		t.Cleanup(func() { l.Close() })
		if err := os.WriteFile(filepath.Join(bundle, "address"), []byte("unix://"+path), 0o600); err != nil {
			t.Fatal(err)
		}
		accepted := make(chan net.Conn, 1)
		go func() {
			if conn, err := l.Accept(); err == nil {
				if dying {
					l.Close()
					conn.Close()
				}
				accepted <- conn
			}
		}()
		removeSocket(bundle)
		if exists(path) == dying {
			t.Errorf("dying %v, socket there %v", dying, !dying)
		}
		(<-accepted).Close()
	}
}
