//go:build linux

package cri

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/gantryd/gantry/test/critest"
)

// The streams of a session, as WebSocket numbers them.
const (
	stdin = iota
	stdout
	stderr
	failure
	resize
)

var streamNames = []string{"stdin", "stdout", "stderr", "error", "resize"}

// session is a client's end of exec or attach.
type session struct {
	t   *testing.T
	in  [5]io.WriteCloser
	mu  sync.Mutex // guards out
	out [5]bytes.Buffer
	// done is closed when all streams from the other side have ended.
	done chan struct{}
	// leave ends the connection.
	leave func()
}

// protocol is a way to be a client: it opens some streams.
type protocol struct {
	name string
	open func(t *testing.T, url string, streams ...int) *session
}

var protocols = []protocol{
	{"SPDY", openSPDY},
	{"WebSocket v5", func(t *testing.T, url string, _ ...int) *session { return openWebSocket(t, url, "v5.channel.k8s.io") }},
	{"WebSocket v4", func(t *testing.T, url string, _ ...int) *session { return openWebSocket(t, url, "v4.channel.k8s.io") }},
}

// upgrade makes a SPDY connection.
func upgrade(address, version string) (httpstream.Connection, net.Conn, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, nil, err
	}
	c, err := net.Dial("tcp", u.Host)
	if err != nil {
		return nil, nil, err
	}
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: node\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: %s\r\nContent-Length: 0\r\n\r\n", u.RequestURI(), version)
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err == nil && (resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("X-Stream-Protocol-Version") != version) {
		err = fmt.Errorf("%s %v", resp.Status, resp.Header)
	}
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	conn, err := spdy.NewClientConnection(buffered{c, r})
	return conn, c, err
}

// buffered reads first what came with the answer.
type buffered struct {
	net.Conn
	r io.Reader
}

func (b buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

func openSPDY(t *testing.T, url string, streams ...int) *session {
	t.Helper()
	conn, raw, err := upgrade(url, "v4.channel.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	s := &session{t: t, done: make(chan struct{}), leave: func() { raw.Close(); conn.Close() }}
	var all sync.WaitGroup
	for _, n := range append([]int{failure}, streams...) {
		st, err := conn.CreateStream(http.Header{"Streamtype": {streamNames[n]}})
		if err != nil {
			t.Fatal(err)
		}
		if s.in[n] = st; n == stdin || n == resize {
			continue
		}
		all.Go(func() {
			b := make([]byte, 4096)
			for {
				k, err := st.Read(b)
				s.add(n, b[:k])
				if err != nil {
					return
				}
			}
		})
	}
	go func() { all.Wait(); close(s.done) }()
	t.Cleanup(s.leave)
	return s
}

// wsStream is one of those of a WebSocket.
type wsStream struct {
	ws *websocket.Conn
	n  byte
}

func (c wsStream) Write(b []byte) (int, error) {
	return len(b), websocket.Message.Send(c.ws, append([]byte{c.n}, b...))
}

// Close is understood since v5.
func (c wsStream) Close() error { return websocket.Message.Send(c.ws, []byte{255, c.n}) }

func dialWS(address, version string) (*websocket.Conn, error) {
	config, err := websocket.NewConfig(strings.Replace(address, "http", "ws", 1), "http://node")
	if err != nil {
		return nil, err
	}
	config.Protocol = []string{version}
	return websocket.DialConfig(config)
}

func openWebSocket(t *testing.T, url, version string) *session {
	t.Helper()
	ws, err := dialWS(url, version)
	if err != nil {
		t.Fatal(err)
	}
	s := &session{t: t, done: make(chan struct{}), leave: func() { ws.Close() }}
	for _, n := range []int{stdin, resize} {
		s.in[n] = wsStream{ws, byte(n)}
	}
	go func() {
		defer close(s.done)
		for {
			var b []byte
			if websocket.Message.Receive(ws, &b) != nil {
				return
			}
			if len(b) > 0 && int(b[0]) < len(s.out) {
				s.add(int(b[0]), b[1:])
			}
		}
	}()
	t.Cleanup(s.leave)
	return s
}

func (s *session) add(n int, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out[n].Write(b)
}

func (s *session) got(n int) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out[n].String()
}

func (s *session) send(n int, text string) {
	s.t.Helper()
	if _, err := io.WriteString(s.in[n], text); err != nil {
		s.t.Errorf("%s: %v", streamNames[n], err)
	}
}

// expect waits for a text in a stream.
func (s *session) expect(n int, text string) {
	s.t.Helper()
	critest.Eventually(s.t, fmt.Sprintf("%q in %s", text, streamNames[n]), func() bool { return strings.Contains(s.got(n), text) })
}

// end waits for the end, and checks how it was: "" is a success, else a part of
// the status.
func (s *session) end(want string) {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(critest.Slow(20 * time.Second)):
		s.t.Fatalf("no end after %q, %q, %q", s.got(stdout), s.got(stderr), s.got(failure))
	}
	if want == "" {
		want = `"status":"Success"`
	}
	if got := s.got(failure); !strings.Contains(got, want) {
		s.t.Errorf("status %q, want %s", got, want)
	}
}

// execURL asks for a command.
func execURL(t *testing.T, c *critest.Container, tty bool, script string) string {
	t.Helper()
	r, err := c.RT.Exec(critest.Context(t), &runtime.ExecRequest{ContainerId: c.ID, Cmd: []string{"/bin/sh", "-c", script}, Tty: tty, Stdin: true, Stdout: true, Stderr: !tty})
	if err != nil {
		t.Fatal(err)
	}
	return r.Url
}

// attachURL asks for a container's streams.
func attachURL(t *testing.T, c *critest.Container) string {
	t.Helper()
	r, err := c.RT.Attach(critest.Context(t), &runtime.AttachRequest{ContainerId: c.ID, Tty: c.Config.Tty, Stdin: true, Stdout: true, Stderr: !c.Config.Tty})
	if err != nil {
		t.Fatal(err)
	}
	return r.Url
}

// contract: 7.1.19, 5.3.5
func TestExecStream(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run("sleep 1000")
		for _, over := range protocols {
			t.Run(over.name, func(t *testing.T) {
				s := over.open(t, execURL(t, c, false, "echo err >&2; read a; echo got $a; exit 7"), stdin, stdout, stderr)
				s.expect(stderr, "err\n")
				s.send(stdin, "typed\n")
				s.end(`"causes":[{"reason":"ExitCode","message":"7"}]`)
				if s.got(stdout) != "got typed\n" || s.got(stderr) != "err\n" {
					t.Errorf("%q, %q", s.got(stdout), s.got(stderr))
				}

				if over.name != "WebSocket v4" { // which cannot say that the input ends
					s = over.open(t, execURL(t, c, false, "wc -c"), stdin, stdout, stderr)
					for range 64 {
						s.send(stdin, strings.Repeat("x", 4096))
					}
					s.in[stdin].Close()
					s.end("")
					if s.got(stdout) != "262144\n" {
						t.Errorf("%q", s.got(stdout))
					}
				}
				s = over.open(t, execURL(t, c, false, "seq 1 200000"), stdin, stdout, stderr)
				s.end("")
				if n := len(s.got(stdout)); n != 1288895 {
					t.Errorf("%d bytes", n)
				}

				s = over.open(t, execURL(t, c, true, `while :; do stty size; sleep 0.1; done`), stdin, stdout, resize)
				s.send(resize, `{"Width":91,"Height":37}`)
				s.expect(stdout, "37 91\r\n")
				s.send(resize, `{"Width":120,"Height":40}`)
				s.expect(stdout, "40 120\r\n")
				s.send(stdin, "\x03")
				s.end(`"message":"130"`)

				s = over.open(t, execURL(t, c, true, "echo $TERM; echo err >&2; read a; echo got $a"), stdin, stdout, resize)
				s.expect(stdout, "err\r\n")
				s.send(stdin, "typed\r")
				s.end("")
				if s.got(stdout) != "xterm\r\nerr\r\ntyped\r\ngot typed\r\n" {
					t.Errorf("%q", s.got(stdout))
				}

				// Whoever goes away takes the command along.
				mark := fmt.Sprintf("4%09d", time.Now().UnixNano()%1e9)
				s = over.open(t, execURL(t, c, false, fmt.Sprintf("sleep %s & echo begun; sleep %[1]s", mark)), stdin, stdout, stderr)
				s.expect(stdout, "begun\n")
				s.leave()
				critest.Eventually(t, "the end of the command", func() bool { return running("sleep "+mark) == 0 })
			})
		}
	})
}

// contract: 7.1.19
func TestStreamRefused(t *testing.T) {
	p := node(t).Pod(t, "pauseless")
	ended, c := p.Run("true"), p.Run("sleep 1000")
	ended.Wait()
	for what, id := range map[codes.Code]string{codes.FailedPrecondition: ended.ID, codes.NotFound: "unknown"} {
		_, err := p.RT.Attach(critest.Context(t), &runtime.AttachRequest{ContainerId: id, Stdout: true})
		wantCode(t, "attach", err, what)
		_, err = p.RT.Exec(critest.Context(t), &runtime.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true})
		wantCode(t, "exec", err, what)
	}
	for _, q := range []*runtime.ExecRequest{{Cmd: []string{"true"}}, {Stdout: true}, {Cmd: []string{"true"}, Tty: true, Stdout: true, Stderr: true}} {
		q.ContainerId = c.ID
		_, err := p.RT.Exec(critest.Context(t), q)
		wantCode(t, q.String(), err, codes.InvalidArgument)
	}
	_, err := p.RT.PortForward(critest.Context(t), &runtime.PortForwardRequest{PodSandboxId: "unknown"})
	wantCode(t, "forward", err, codes.NotFound)
	address := execURL(t, c, false, "true")
	openSPDY(t, address, stdin, stdout, stderr).end("")
	if _, _, err := upgrade(address, "v4.channel.k8s.io"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("a URL was good for two: %v", err)
	}
	openSPDY(t, execURL(t, c, false, "/no/such/program"), stdin, stdout, stderr).end(`"message":"127"`)
	r, err := c.RT.Exec(critest.Context(t), &runtime.ExecRequest{ContainerId: c.ID, Cmd: []string{"/no/such/program"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	openSPDY(t, r.Url, stdout).end("/no/such/program")
	p.Stop()
	_, err = p.RT.PortForward(critest.Context(t), &runtime.PortForwardRequest{PodSandboxId: p.ID})
	wantCode(t, "forward to a stopped pod", err, codes.FailedPrecondition)
}

// attached checks attachments to containers of a pod.
func attached(t *testing.T, p *critest.Pod) {
	plain := func(c *runtime.ContainerConfig) { c.Stdin = true }
	for _, over := range protocols {
		t.Run(over.name, func(t *testing.T) {
			c := p.Run("echo before; while read a; do echo out $a; echo err $a >&2; done", plain)
			logHas(t, c, "before\n")
			one, two := over.open(t, attachURL(t, c), stdin, stdout, stderr), over.open(t, attachURL(t, c), stdin, stdout, stderr)
			// What is attached is told by an answer: each waits for its own first.
			one.send(stdin, "1\n")
			one.expect(stdout, "out 1\n")
			two.send(stdin, "2\n")
			for _, s := range []*session{one, two} {
				s.expect(stdout, "out 2\n")
				s.expect(stderr, "err 2\n")
				if strings.Contains(s.got(stdout), "before") {
					t.Errorf("%q was printed before", s.got(stdout))
				}
			}
			// One that leaves is missed by nobody.
			one.leave()
			two.send(stdin, "3\n")
			two.expect(stdout, "out 3\n")
			logHas(t, c, "err 3\n")
			isState(t, c, runtime.ContainerState_CONTAINER_RUNNING)
			c.Stop(0)
			select {
			case <-two.done:
			case <-time.After(critest.Slow(20 * time.Second)):
				t.Errorf("the end of the container did not end the stream")
			}
			_, err := c.RT.Attach(critest.Context(t), &runtime.AttachRequest{ContainerId: c.ID, Stdout: true})
			wantCode(t, "attach to one that has ended", err, codes.FailedPrecondition)

			c = p.Run("while read a; do echo $(stty size) $a; done", func(c *runtime.ContainerConfig) { c.Stdin, c.Tty = true, true })
			s := over.open(t, attachURL(t, c), stdin, stdout, resize)
			s.send(resize, `{"Width":93,"Height":31}`)
			critest.Eventually(t, "the size", func() bool {
				s.send(stdin, "x\n")
				return strings.Contains(s.got(stdout), "31 93 x\r\n")
			})
			c.Remove()

			if over.name == "WebSocket v4" {
				return
			}
			c = p.Run("wc -c; echo over; exit 3", plain, func(c *runtime.ContainerConfig) { c.StdinOnce = true })
			s = over.open(t, attachURL(t, c), stdin, stdout, stderr)
			s.send(stdin, strings.Repeat("x", 1000))
			s.in[stdin].Close()
			s.expect(stdout, "1000\nover\n")
			s.end("")
			if st := c.Wait(); st.ExitCode != 3 {
				t.Errorf("%v", st)
			}
		})
	}
}

// contract: 7.1.19, 5.3.5
func TestAttach(t *testing.T) { eachHandler(t, attached) }

// A shim that writes no logs is attached to through the daemon, also to what
// was started by an earlier one.
//
// contract: 7.1.19, 7.3.1
func TestAttachForeign(t *testing.T) {
	n := critest.Run(t, binDir, foreign(t))
	p := n.Pod(t, "foreign")
	attached(t, p)
	c := p.Run("while read a; do echo out $a; done", func(c *runtime.ContainerConfig) { c.Stdin = true })
	n.Kill()
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	listed(t, n)
	s := openSPDY(t, attachURL(t, c), stdin, stdout, stderr)
	s.send(stdin, "after the restart\n")
	s.expect(stdout, "out after the restart\n")
}

// forwarded opens a connection to a port of a pod over SPDY.
func forwarded(t *testing.T, conn httpstream.Connection, id int, port int32) (data, errs httpstream.Stream) {
	t.Helper()
	h := http.Header{"Port": {fmt.Sprint(port)}, "Requestid": {fmt.Sprint(id)}, "Streamtype": {"error"}}
	errs, err := conn.CreateStream(h)
	if err == nil {
		h.Set("Streamtype", "data")
		data, err = conn.CreateStream(h)
	}
	if err != nil {
		t.Fatal(err)
	}
	return data, errs
}

func forwardURL(t *testing.T, p *critest.Pod, ports ...int32) string {
	t.Helper()
	r, err := p.RT.PortForward(critest.Context(t), &runtime.PortForwardRequest{PodSandboxId: p.ID, Port: ports})
	if err != nil {
		t.Fatal(err)
	}
	return r.Url
}

// said is an answer without its header, which has the time.
func said(answer string) string {
	if _, body, ok := strings.Cut(answer, "\r\n\r\n"); ok {
		return body
	}
	return answer
}

// overSPDY says something to a port and returns what is answered to its end.
func overSPDY(t *testing.T, p *critest.Pod, port int32, say string) (answer, failure string) {
	t.Helper()
	conn, _, err := upgrade(forwardURL(t, p, port), "portforward.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for id := range 2 { // one after another over the same connection
		data, errs := forwarded(t, conn, id, port)
		if _, err := io.WriteString(data, say); err != nil {
			t.Error(err)
		}
		data.Close()
		a, _ := io.ReadAll(io.LimitReader(data, 1<<20))
		e, _ := io.ReadAll(io.LimitReader(errs, 1<<20))
		if id > 0 && said(string(a)) != said(answer) {
			t.Errorf("%q, then %q", answer, a)
		}
		answer, failure = string(a), string(e)
	}
	return answer, failure
}

// overWS does so over a WebSocket.
func overWS(t *testing.T, p *critest.Pod, port int32, say string) (answer, failure string) {
	t.Helper()
	ws, err := dialWS(forwardURL(t, p, port), "v4.channel.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	if _, err := (wsStream{ws, 0}).Write([]byte(say)); err != nil {
		t.Error(err)
	}
	var out [2]string
	if err := ws.SetReadDeadline(time.Now().Add(critest.Slow(20 * time.Second))); err != nil {
		t.Fatal(err)
	}
	for {
		var b []byte
		if err := websocket.Message.Receive(ws, &b); err != nil {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				t.Error(err)
			}
			break
		}
		if len(b) > 0 && b[0] < 2 {
			out[b[0]] += string(b[1:])
		}
	}
	number := string(binary.LittleEndian.AppendUint16(nil, uint16(port)))
	for i := range out {
		if !strings.HasPrefix(out[i], number) {
			t.Errorf("channel %d begins with %.10q", i, out[i])
		}
		out[i] = strings.TrimPrefix(out[i], number)
	}
	return out[0], out[1]
}

// contract: 7.1.19
func TestPortForward(t *testing.T) {
	const get = "GET /f HTTP/1.0\r\n\r\n"
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
			go func() {
				defer c.Close()
				b := make([]byte, len(get))
				if _, err := io.ReadFull(c, b); err == nil {
					_, _ = io.WriteString(c, "content of the host")
				}
			}()
		}
	}()
	hostPort := int32(host.Addr().(*net.TCPAddr).Port)
	ways := map[string]func(*testing.T, *critest.Pod, int32, string) (string, string){"SPDY": overSPDY, "WebSocket": overWS}
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run("echo content of 4 >/tmp/f; mkdir /tmp/6; echo content of 6 >/tmp/6/f; httpd -p 127.0.0.1:84 -h /tmp; httpd -p '[::1]:86' -h /tmp/6; echo ready; sleep 1000")
		logHas(t, c, "ready\n")
		inHost := p.Node.Pod(t, p.Status().Status.RuntimeHandler, critest.HostNetwork)
		for name, over := range ways {
			for port, want := range map[int32]string{84: "content of 4\n", 86: "content of 6\n"} {
				if answer, failure := over(t, p, port, get); !strings.HasSuffix(answer, want) || failure != "" {
					t.Errorf("%s, port %d: %q, %q", name, port, answer, failure)
				}
			}
			if answer, failure := over(t, p, 87, get); answer != "" || !strings.Contains(failure, "refused") || !strings.Contains(failure, "87") {
				t.Errorf("%s, where nobody listens: %q, %q", name, answer, failure)
			}
			if answer, failure := over(t, p, hostPort, get); answer != "" || failure == "" {
				t.Errorf("%s, the host's port in a pod: %q, %q", name, answer, failure)
			}
			if answer, failure := over(t, inHost, hostPort, get); answer != "content of the host" || failure != "" {
				t.Errorf("%s, host network: %q, %q", name, answer, failure)
			}
		}
	})
}

// Several connections at a time do not wait for each other, and one that is
// given up ends in the pod as well.
//
// contract: 7.1.19
func TestPortForwardConcurrent(t *testing.T) {
	p := node(t).Pod(t, "runc")
	logHas(t, p.Run("nc -ll -p 80 -e /bin/cat & until nc -w 1 127.0.0.1 80 </dev/null; do sleep 0.05; done; echo ready; wait"), "ready\n")
	conn, raw, err := upgrade(forwardURL(t, p), "portforward.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	var all [8]httpstream.Stream
	for i := range all {
		all[i], _ = forwarded(t, conn, i, 80)
	}
	for i := len(all) - 1; i >= 0; i-- {
		text := fmt.Sprintf("number %d", i)
		if _, err := io.WriteString(all[i], text); err != nil {
			t.Error(err)
		}
		b := make([]byte, len(text))
		if _, err := io.ReadFull(all[i], b); err != nil || string(b) != text {
			t.Errorf("%q %v", b, err)
		}
	}
	raw.Close()
	c := p.Run("while [ $(grep -c ' 01 ' /proc/net/tcp) != 0 ]; do sleep 0.05; done; echo none is left")
	if st := c.Wait(); st.ExitCode != 0 {
		t.Error(st)
	}
}
