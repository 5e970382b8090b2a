//go:build linux

package cristream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/websocket"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/ownthread"
)

// podNet makes a network namespace with its loopback up and an echo server
// that answers at the end of its input, at each of the addresses. It lives
// with a thread until the test ends.
func podNet(t *testing.T, addresses ...string) (path string, ports []int32) {
	t.Helper()
	ready := make(chan error, 1)
	end := make(chan struct{})
	ended := make(chan struct{})
	var listeners []net.Listener
	go func() {
		defer close(ended)
		_ = ownthread.Do(func() error {
			err := unix.Unshare(unix.CLONE_NEWNET)
			if err == nil {
				err = loopbackUp()
			}
			for _, a := range addresses {
				if err == nil {
					var l net.Listener
					if l, err = net.Listen("tcp", a); err == nil {
						listeners = append(listeners, l)
					}
				}
			}
			path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
			ready <- err
			<-end
			return nil
		})
	}()
	t.Cleanup(func() { close(end); <-ended })
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	for _, l := range listeners {
		ports = append(ports, int32(l.Addr().(*net.TCPAddr).Port))
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					b, err := io.ReadAll(io.LimitReader(c, 1<<20))
					if err == nil {
						fmt.Fprintf(c, "%s: %s", l.Addr(), b)
					}
				}()
			}
		}()
		t.Cleanup(func() { l.Close() })
	}
	return path, ports
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// bare is a rig without a daemon.
func bare(t *testing.T, config cristate.ServerConfig) *rig {
	r := &rig{t: t, containers: map[string]Container{}, pods: map[string]Pod{}}
	r.s = r.service(nil, 0)
	r.srv = r.serve(r.s, config)
	return r
}

// contract: 7.1.19
func TestPortForward(t *testing.T) {
	r := bare(t, cristate.DefaultServerConfig())
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	path, ports := podNet(t, "127.0.0.1:0", "[::1]:0")
	r.pods["pod"] = Pod{ID: "pod", NetNSPath: path}
	r.pods["gone"] = Pod{ID: "gone", NetNSPath: path + "-gone"}
	r.pods["stopped"] = Pod{ID: "stopped", Ready: fmt.Errorf("pod sandbox stopped: %w", errdefs.ErrFailedPrecondition)}
	host, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	go func() {
		for {
			c, err := host.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "the host")
			c.(*net.TCPConn).CloseWrite()
			go func() {
				io.Copy(io.Discard, c)
				c.Close()
			}()
		}
	}()
	r.pods["host"] = Pod{ID: "host"}
	hostPort := int32(host.Addr().(*net.TCPAddr).Port)
	for _, q := range []*cri.PortForwardRequest{{PodSandboxId: "pod", Port: []int32{0}}, {PodSandboxId: "pod", Port: []int32{65536}}} {
		if _, err := r.srv.PortForward(t.Context(), q); !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}
	}
	if _, err := r.srv.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: "stopped"}); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	spdyPair := func(conn httpstream.Connection, id int, port int32) (data, errs httpstream.Stream) {
		t.Helper()
		h := http.Header{"Port": {fmt.Sprint(port)}, "Requestid": {fmt.Sprint(id)}, "Streamtype": {"error"}}
		errs, err := conn.CreateStream(h)
		if err != nil {
			t.Fatal(err)
		}
		h.Set("streamType", "data")
		if data, err = conn.CreateStream(h); err != nil {
			t.Fatal(err)
		}
		return data, errs
	}
	for name, dial := range map[string]func(string) (httpstream.Connection, error){
		"SPDY": func(url string) (httpstream.Connection, error) {
			conn, _, err := dialSPDY(url, "portforward.k8s.io")
			return conn, err
		},
		"SPDY over WebSocket": func(url string) (httpstream.Connection, error) { // what crictl and kubectl do
			ws, err := dialWebSocket(url, "SPDY/3.1+portforward.k8s.io")
			if err != nil {
				return nil, err
			}
			ws.PayloadType = websocket.BinaryFrame
			return spdy.NewClientConnection(ws)
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, p := range []struct {
				pod  string
				port int32
				want string
			}{{"pod", ports[0], "127.0.0.1:%d: hello"}, {"pod", ports[1], "[::1]:%d: hello"}, {"host", hostPort, "the host"}, {"pod", hostPort, ""}, {"gone", 1, ""}} {
				got, err := r.srv.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: p.pod})
				if err != nil {
					t.Fatal(err)
				}
				conn, err := dial(got.Url)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				for id := range 3 { // several of them over one connection
					data, errs := spdyPair(conn, id, p.port)
					io.WriteString(data, "hello")
					data.Close()
					b, _ := io.ReadAll(io.LimitReader(data, 1000))
					e, _ := io.ReadAll(io.LimitReader(errs, 1000))
					want := p.want
					if strings.Contains(want, "%d") {
						want = fmt.Sprintf(want, p.port)
					}
					if string(b) != want || (len(e) > 0) != (want == "") {
						t.Errorf("%v: %q, errors %q", p, b, e)
					}
				}
			}
		})
	}
	t.Run("WebSocket", func(t *testing.T) {
		got, err := r.srv.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: "host", Port: []int32{hostPort, 1}})
		if err != nil {
			t.Fatal(err)
		}
		ws, err := dialWebSocket(got.Url, "v4.channel.k8s.io")
		if err != nil {
			t.Fatal(err)
		}
		defer ws.Close()
		var texts [4]string
		for {
			var b []byte
			if websocket.Message.Receive(ws, &b) != nil {
				break
			}
			texts[b[0]] += string(b[1:])
		}
		for i, p := range []int32{hostPort, hostPort, 1, 1} {
			number := string(binary.LittleEndian.AppendUint16(nil, uint16(p)))
			if !strings.HasPrefix(texts[i], number) {
				t.Errorf("channel %d: %q", i, texts[i])
			}
			texts[i] = strings.TrimPrefix(texts[i], number)
		}
		if texts[0] != "the host" || texts[1] != "" || texts[2] != "" || !strings.Contains(texts[3], "refused") {
			t.Errorf("%q", texts)
		}
	})
	t.Run("both tried", func(t *testing.T) {
		a, b := net.Pipe()
		defer a.Close()
		err := r.s.PortForward(t.Context(), "pod", 1, b)
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "127.0.0.1:1") || !strings.Contains(err.Error(), "[::1]:1") {
			t.Error(err)
		}
	})
	inside, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the only thread in the pod's namespace is the test's, and none is in another", func() bool {
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, th := range threads {
			// A thread that has ended since has none.
			switch ns, err := os.Readlink("/proc/self/task/" + th.Name() + "/ns/net"); {
			case err == nil && ns == inside:
				n++
			case err == nil && ns != own:
				return false
			}
		}
		return n == 1
	})
}

// contract: 7.4.1
func TestTLS(t *testing.T) {
	config := cristate.DefaultServerConfig()
	config.EnableTLSStreaming = true
	r := bare(t, config)
	path, ports := podNet(t, "127.0.0.1:0")
	r.pods["pod"] = Pod{ID: "pod", NetNSPath: path}
	got, err := r.srv.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: "pod", Port: ports})
	if err != nil || !strings.HasPrefix(got.Url, "https://127.0.0.1:") {
		t.Fatal(got, err)
	}
	ws, err := dialWebSocket(got.Url, "")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	if err := websocket.Message.Send(ws, []byte("\x00hello")); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*cristate.ServerConfig){
		"x509_key_pair_streaming": func(c *cristate.ServerConfig) { c.X509KeyPair.CertFile = "/cert" },
		"tls_key_file":            func(c *cristate.ServerConfig) { c.EnableTLSStreaming, c.X509KeyPair.CertFile = true, "/cert" },
		"/no/cert": func(c *cristate.ServerConfig) {
			c.EnableTLSStreaming, c.X509KeyPair.CertFile, c.X509KeyPair.KeyFile = true, "/no/cert", "/no/key"
		},
		"stream_idle_timeout": func(c *cristate.ServerConfig) { c.StreamIdleTimeout = "soon" },
	} {
		c := cristate.DefaultServerConfig()
		change(&c)
		if _, err := Listen(r.s, c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := cristate.DefaultServerConfig()
	c.StreamServerPort = "70000"
	if _, err := Listen(r.s, c); err == nil {
		t.Error("port 70000")
	}
}

// Tokens are bounded, good once, and not for ever.
// promise: C4
func TestTokens(t *testing.T) {
	x := &Server{tokens: map[string]grant{}, base: "http://x"}
	for range tokensMax {
		if _, err := x.grant("/exec/", grant{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := x.grant("/exec/", grant{}); !errdefs.IsResourceExhausted(err) {
		t.Error(err)
	}
	for token, g := range x.tokens {
		g.until = time.Now().Add(-time.Second)
		x.tokens[token] = g
		if _, ok := x.redeem(token); ok {
			t.Error("a token of yesterday is good")
		}
		break
	}
	url, err := x.grant("/exec/", grant{})
	if err != nil {
		t.Fatal(err)
	}
	token := url[strings.LastIndexByte(url, '/')+1:]
	if _, ok := x.redeem(token); !ok {
		t.Error("it is not good")
	}
	if _, ok := x.redeem(token); ok {
		t.Error("it is good twice")
	}
}

// caller is a client's stream: what it sends comes from a pipe.
type caller struct {
	io.Reader
	io.Writer
	io.Closer
}

// A program that has nothing more to say may still listen.
//
// contract: 7.1.19
func TestForwardHalfClosed(t *testing.T) {
	r := bare(t, cristate.DefaultServerConfig())
	r.pods["pod"] = Pod{ID: "pod"}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	heard := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			heard <- err.Error()
			return
		}
		defer c.Close()
		c.(*net.TCPConn).CloseWrite()
		b, _ := io.ReadAll(io.LimitReader(c, 1<<20))
		heard <- string(b)
	}()
	const pieces = 25
	pr, pw := io.Pipe()
	go func() {
		defer pw.Close()
		for range pieces { // longer than the grace in all, each in time
			if _, err := io.WriteString(pw, "piece "); err != nil {
				return
			}
			time.Sleep(closeGrace / 10)
		}
	}()
	if err := r.s.PortForward(t.Context(), "pod", int32(l.Addr().(*net.TCPAddr).Port), caller{pr, io.Discard, pr}); err != nil {
		t.Error(err)
	}
	if got, want := <-heard, strings.Repeat("piece ", pieces); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// A client that does not send the body it announced is not waited for.
// promise: C4
func TestSlowBody(t *testing.T) {
	s := bare(t, cristate.DefaultServerConfig()).s
	x, err := Listen(s, cristate.DefaultServerConfig())
	if err != nil {
		t.Fatal(err)
	}
	if d := x.http.ReadTimeout; d <= 0 || d > createWithin {
		t.Fatal("it may take ", d)
	}
	x.http.ReadTimeout /= 100 // nobody wants to wait so long
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- x.Run(ctx) }()
	c, err := net.Dial("tcp", strings.TrimPrefix(x.URL(), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "POST /exec/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nsome")
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if answer, err := io.ReadAll(c); err != nil || !strings.Contains(string(answer), "404") {
		t.Errorf("%q, %v", answer, err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A client may go at each step; it leaves nothing.
// promise: C4
// contract: 7.1.19
func TestAborts(t *testing.T) {
	r := newRig(t)
	r.run("c1", false, false, forever)
	r.run("tty", true, false, "stty raw -echo; cat")
	path, ports := podNet(t, "127.0.0.1:0")
	r.pods["pod"] = Pod{ID: "pod", NetNSPath: path}
	// What a new connection has done so far when its client goes.
	exec := func(cmd ...string) string {
		got, err := r.srv.Exec(t.Context(), &cri.ExecRequest{ContainerId: "c1", Cmd: cmd, Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		return got.Url
	}
	attach := func() string {
		got, err := r.srv.Attach(t.Context(), &cri.AttachRequest{ContainerId: "tty", Stdin: true, Stdout: true, Tty: true})
		if err != nil {
			t.Fatal(err)
		}
		return got.Url
	}
	forward := func() string {
		got, err := r.srv.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: "pod", Port: ports})
		if err != nil {
			t.Fatal(err)
		}
		return got.Url
	}
	spdyWith := func(url, protocol string, headers ...http.Header) {
		conn, raw, err := dialSPDY(url, protocol)
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range headers {
			if _, err := conn.CreateStream(h); err != nil && !errors.Is(err, net.ErrClosed) {
				t.Log(err)
			}
		}
		raw.Close()
		conn.Close()
	}
	kind := func(k string) http.Header { return http.Header{"Streamtype": {k}} }
	const v4 = "v4.channel.k8s.io"
	steps := map[string]func(){
		"connect": func() {
			c, err := net.Dial("tcp", strings.TrimPrefix(r.srv.URL(), "http://"))
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, "POST /exec/")
			c.Close()
		},
		"upgrade":        func() { spdyWith(exec("sleep", "7501"), v4) },
		"one stream":     func() { spdyWith(exec("sleep", "7501"), v4, kind("error")) },
		"all but one":    func() { spdyWith(attach(), v4, kind("error"), kind("stdin"), kind("stdout")) },
		"exec":           func() { spdyWith(exec("sleep", "7501"), v4, kind("error"), kind("stdin"), kind("stdout")) },
		"attach":         func() { spdyWith(attach(), v4, kind("error"), kind("stdin"), kind("stdout"), kind("resize")) },
		"other protocol": func() { dialSPDY(exec("true"), "v9.channel.k8s.io") },
		"port upgrade":   func() { spdyWith(forward(), "portforward.k8s.io") },
		"half a port": func() {
			spdyWith(forward(), "portforward.k8s.io", http.Header{"Streamtype": {"error"}, "Port": {fmt.Sprint(ports[0])}})
		},
		"port": func() {
			spdyWith(forward(), "portforward.k8s.io", http.Header{"Streamtype": {"error"}, "Port": {fmt.Sprint(ports[0])}}, http.Header{"Streamtype": {"data"}, "Port": {fmt.Sprint(ports[0])}})
		},
		"WebSocket exec":    func() { ws, err := dialWebSocket(exec("sleep", "7501"), v4); closeWS(t, ws, err) },
		"WebSocket attach":  func() { ws, err := dialWebSocket(attach(), v4); closeWS(t, ws, err) },
		"WebSocket port":    func() { ws, err := dialWebSocket(forward(), v4); closeWS(t, ws, err) },
		"WebSocket refused": func() { dialWebSocket(exec("true"), "v9.channel.k8s.io") },
		"input that nobody reads": func() {
			url := exec("sleep", "7501")
			c, err := net.Dial("tcp", strings.TrimPrefix(r.srv.URL(), "http://"))
			if err != nil {
				t.Fatal(err)
			}
			// What waits to be sent would keep the end of the connection back.
			c.(*net.TCPConn).SetLinger(0)
			config, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), "http://x")
			if err != nil {
				t.Fatal(err)
			}
			ws, err := websocket.NewClient(config, c)
			if err != nil {
				t.Fatal(err)
			}
			ws.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			for b := make([]byte, 64<<10); ; {
				if err := websocket.Message.Send(ws, b); err != nil {
					break
				}
			}
			ws.Close()
		},
	}
	for _, step := range steps { // what is made once is not a leak
		step()
	}
	settled := func() (int, int) {
		var g, f int
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline) && (g != goruntime.NumGoroutine() || f != countFDs(t)); {
			g, f = goruntime.NumGoroutine(), countFDs(t)
			time.Sleep(300 * time.Millisecond)
		}
		return g, f
	}
	until(t, "the commands have ended", func() bool { return processes("sleep 7501") == 0 })
	time.Sleep(2 * goneGrace)
	goroutines, fds := settled()
	for name, step := range steps {
		t.Run(name, func(t *testing.T) {
			for range 5 {
				step()
			}
		})
	}
	until(t, "the commands have ended", func() bool { return processes("sleep 7501") == 0 })
	defer func() {
		if t.Failed() {
			b := make([]byte, 1<<20)
			t.Logf("goroutines before: %d, files: %d\nfiles now: %d, goroutines now: %d\n%s", goroutines, fds, countFDs(t), goruntime.NumGoroutine(), b[:goruntime.Stack(b, true)])
		}
	}()
	until(t, "goroutines and files are back", func() bool {
		return goruntime.NumGoroutine() <= goroutines && countFDs(t) <= fds || t.Context().Err() != nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := r.s.ExecSync(ctx, "c1", []string{"true"}, 0); err != nil {
		t.Error(err)
	}
}

func closeWS(t *testing.T, ws *websocket.Conn, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	ws.Close()
}
