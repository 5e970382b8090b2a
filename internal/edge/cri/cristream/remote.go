//go:build linux

package cristream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// serve does what a token was given out for.
func (x *Server) serve(w http.ResponseWriter, r *http.Request) {
	g, ok := x.redeem(r.PathValue("token"))
	kind, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch {
	case ok && kind == "exec" && g.exec != nil:
		q := g.exec
		x.remote(w, r, q.GetTty(), q.GetStdin(), q.GetStdout(), q.GetStderr(), func(ctx context.Context, st Streams) (uint32, error) {
			return x.s.Exec(ctx, q.GetContainerId(), q.GetCmd(), st)
		})
	case ok && kind == "attach" && g.attach != nil:
		q := g.attach
		x.remote(w, r, q.GetTty(), q.GetStdin(), q.GetStdout(), q.GetStderr(), func(ctx context.Context, st Streams) (uint32, error) {
			return 0, x.s.Attach(ctx, q.GetContainerId(), st)
		})
	case ok && kind == "portforward" && g.forward != nil:
		x.forward(w, r, g.forward)
	default:
		http.NotFound(w, r)
	}
}

// ends are a client's ends of the streams of a process.
type ends struct {
	streams map[string]io.ReadWriteCloser // by type; those that the client wants, and the one for errors
	exact   bool                          // the client understands a status in JSON
	close   func()
}

// remote serves a process: it opens the client's ends, runs it, and tells how
// it ended.
func (x *Server) remote(w http.ResponseWriter, r *http.Request, tty, stdin, stdout, stderr bool, run func(context.Context, Streams) (uint32, error)) {
	want := map[string]bool{remotecommand.StreamTypeError: true, remotecommand.StreamTypeStdin: stdin, remotecommand.StreamTypeStdout: stdout,
		remotecommand.StreamTypeStderr: stderr, remotecommand.StreamTypeResize: tty}
	var e *ends
	var err error
	if wsstream.IsWebSocketRequest(r) {
		e, err = x.webSocket(w, r, want)
	} else {
		e, err = x.spdy(w, r, want)
	}
	if err != nil {
		x.s.d.Log.Debug("a client did not open its streams", "path", r.URL.Path[:strings.LastIndexByte(r.URL.Path, '/')], "error", err)
		return
	}
	defer e.close()
	st := Streams{TTY: tty}
	if stdin {
		st.Stdin = e.streams[remotecommand.StreamTypeStdin]
	}
	if stdout {
		st.Stdout = e.streams[remotecommand.StreamTypeStdout]
	}
	if stderr {
		st.Stderr = e.streams[remotecommand.StreamTypeStderr]
	}
	if s := e.streams[remotecommand.StreamTypeResize]; s != nil {
		sizes := make(chan Size)
		st.Resize = sizes
		go readSizes(r.Context(), s, sizes)
	}
	code, err := run(r.Context(), st)
	e.tell(code, err)
}

// metered allows so many more bytes to be read.
type metered struct {
	r    io.Reader
	left int
}

func (m *metered) Read(p []byte) (int, error) {
	if m.left <= 0 {
		return 0, errors.New("a terminal size is too long")
	}
	n, err := m.r.Read(p[:min(len(p), m.left)])
	m.left -= n
	return n, err
}

// readSizes decodes sizes until the stream or ctx ends, or one is no size.
func readSizes(ctx context.Context, r io.Reader, sizes chan<- Size) {
	defer close(sizes)
	const most = 4096 // of one size, in bytes
	m := &metered{r: r, left: most}
	d := json.NewDecoder(m)
	for {
		var size Size
		if d.Decode(&size) != nil {
			return
		}
		m.left = most
		select {
		case sizes <- size:
		case <-ctx.Done():
			return
		}
	}
}

// status is what the client is told, in the form of a Kubernetes Status.
type status struct {
	Metadata struct{} `json:"metadata"`
	Status   string   `json:"status"`
	Message  string   `json:"message,omitempty"`
	Reason   string   `json:"reason,omitempty"`
	Details  *details `json:"details,omitempty"`
	Code     int      `json:"code,omitempty"`
}

type details struct {
	Causes []cause `json:"causes"`
}

type cause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// tell writes how it ended to the stream for errors.
func (e *ends) tell(code uint32, err error) {
	st := status{Status: "Success"}
	switch {
	case err != nil:
		st = status{Status: "Failure", Reason: "InternalError", Code: http.StatusInternalServerError, Message: "Internal error occurred: " + err.Error()}
	case code != 0:
		n := strconv.FormatUint(uint64(code), 10)
		st = status{Status: "Failure", Reason: remotecommand.NonZeroExitCodeReason, Message: "command terminated with non-zero exit code: exit code " + n,
			Details: &details{[]cause{{remotecommand.ExitCodeCauseType, n}}}}
	}
	w := e.streams[remotecommand.StreamTypeError]
	switch {
	case e.exact:
		b, merr := json.Marshal(st)
		if merr != nil {
			return // there is nothing in it that cannot be encoded
		}
		w.Write(b)
	case st.Message != "":
		io.WriteString(w, st.Message)
	}
}

// webSocket opens the channels of a WebSocket: 0 to 2 are those of the
// process, 3 is for errors, 4 for sizes.
func (x *Server) webSocket(w http.ResponseWriter, r *http.Request, want map[string]bool) (*ends, error) {
	order := []string{remotecommand.StreamTypeStdin, remotecommand.StreamTypeStdout, remotecommand.StreamTypeStderr, remotecommand.StreamTypeError, remotecommand.StreamTypeResize}
	channels := make([]wsstream.ChannelType, len(order))
	for i, t := range order {
		switch {
		case !want[t]:
			channels[i] = wsstream.IgnoreChannel
		case t == remotecommand.StreamTypeStdin || t == remotecommand.StreamTypeResize:
			channels[i] = wsstream.ReadChannel
		default:
			channels[i] = wsstream.WriteChannel
		}
	}
	protocols := wsstream.NewDefaultChannelProtocols(channels)
	for _, name := range []string{"v4." + wsstream.ChannelWebSocketProtocol, remotecommand.StreamProtocolV5Name} {
		protocols[name] = wsstream.ChannelProtocolConfig{Binary: true, Channels: channels}
	}
	protocols["v4."+wsstream.Base64ChannelWebSocketProtocol] = wsstream.ChannelProtocolConfig{Channels: channels}
	conn := wsstream.NewConn(protocols)
	conn.SetIdleTimeout(x.idle)
	protocol, opened, err := conn.Open(w, r)
	if err != nil {
		return nil, err
	}
	e := &ends{streams: map[string]io.ReadWriteCloser{}, exact: strings.HasPrefix(protocol, "v4.") || strings.HasPrefix(protocol, "v5."), close: func() { conn.Close() }}
	first := true
	for i, t := range order {
		if !want[t] {
			continue
		}
		e.streams[t] = opened[i]
		if channels[i] == wsstream.WriteChannel && first {
			first = false
			opened[i].Write(nil) // an empty message: the connection is there
		}
	}
	return e, nil
}

// spdy waits for the client to open the streams that it wants, and no other.
func (x *Server) spdy(w http.ResponseWriter, r *http.Request, want map[string]bool) (*ends, error) {
	protocol, err := httpstream.Handshake(r, w, remotecommand.SupportedStreamingProtocols)
	if err != nil {
		return nil, err // the client was told
	}
	left := 0
	for t, wanted := range want {
		if t == remotecommand.StreamTypeResize && protocol != remotecommand.StreamProtocolV4Name && protocol != remotecommand.StreamProtocolV3Name {
			continue
		}
		if wanted {
			left++
		}
	}
	e := &ends{streams: map[string]io.ReadWriteCloser{}, exact: protocol == remotecommand.StreamProtocolV4Name}
	var mu sync.Mutex // guards left, replies and e.streams until all is closed
	var replies []<-chan struct{}
	all := make(chan struct{})
	// What is called for a new stream never waits: the library has a goroutine
	// in it that nobody else can end.
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(s httpstream.Stream, reply <-chan struct{}) error {
		t := s.Headers().Get(remotecommand.StreamType)
		mu.Lock()
		defer mu.Unlock()
		if left == 0 || !want[t] || e.streams[t] != nil {
			return fmt.Errorf("unexpected stream of type %.20q", t)
		}
		e.streams[t], replies = s, append(replies, reply)
		if left--; left == 0 {
			close(all)
		}
		return nil
	})
	if conn == nil {
		return nil, errors.New("the connection was not upgraded")
	}
	conn.SetIdleTimeout(x.idle)
	e.close = func() { conn.Close() }
	timer := time.NewTimer(createWithin)
	defer timer.Stop()
	if err := await(r.Context(), conn, timer, all); err != nil {
		conn.Close()
		return nil, err
	}
	for _, reply := range replies {
		if err := await(r.Context(), conn, timer, reply); err != nil {
			conn.Close()
			return nil, err
		}
	}
	return e, nil
}

func await(ctx context.Context, conn httpstream.Connection, timer *time.Timer, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-timer.C:
		return fmt.Errorf("it did not open all streams within %v", createWithin)
	case <-conn.CloseChan():
		return errors.New("it has gone")
	case <-ctx.Done():
		return ctx.Err()
	}
}
