//go:build linux

package cristream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/websocket"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// pairsMax is how many connections of one client to a pod's ports may be open
// at a time.
const pairsMax = 1000

// forward serves connections to a pod's ports.
func (x *Server) forward(w http.ResponseWriter, r *http.Request, q *runtime.PortForwardRequest) {
	switch {
	case wsstream.IsWebSocketRequestWithTunnelingProtocol(r):
		websocket.Server{Handshake: func(c *websocket.Config, _ *http.Request) error {
			if !slices.Contains(c.Protocol, portforward.WebsocketsSPDYTunnelingPortForwardV1) {
				return websocket.ErrBadWebSocketProtocol
			}
			c.Protocol = []string{portforward.WebsocketsSPDYTunnelingPortForwardV1}
			return nil
		}, Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			x.forwardSPDY(r.Context(), q.GetPodSandboxId(), func(created httpstream.NewStreamHandler) httpstream.Connection {
				conn, err := spdy.NewServerConnection(ws, created)
				if err != nil {
					x.s.d.Log.Debug("no SPDY over a WebSocket", "path", "/portforward", "error", err)
				}
				return conn
			})
		}}.ServeHTTP(w, r)
	case wsstream.IsWebSocketRequest(r):
		x.forwardWebSocket(w, r, q)
	default:
		if _, err := httpstream.Handshake(r, w, portforward.SupportedProtocols); err != nil {
			return // the client was told
		}
		x.forwardSPDY(r.Context(), q.GetPodSandboxId(), func(created httpstream.NewStreamHandler) httpstream.Connection {
			return spdy.NewResponseUpgrader().UpgradeResponse(w, r, created)
		})
	}
}

// forwardWebSocket has two channels for each port of the request, for data and
// errors; each begins with the port's number.
func (x *Server) forwardWebSocket(w http.ResponseWriter, r *http.Request, q *runtime.PortForwardRequest) {
	if n := len(q.GetPort()); n == 0 || n > 127 {
		http.Error(w, "from 1 to 127 ports are needed over WebSocket", http.StatusBadRequest)
		return
	}
	var channels []wsstream.ChannelType
	for range q.GetPort() {
		channels = append(channels, wsstream.ReadWriteChannel, wsstream.WriteChannel)
	}
	conn := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{
		"": {Binary: true, Channels: channels},
		"v4." + wsstream.ChannelWebSocketProtocol:       {Binary: true, Channels: channels},
		"v4." + wsstream.Base64ChannelWebSocketProtocol: {Channels: channels},
	})
	conn.SetIdleTimeout(x.idle)
	_, streams, err := conn.Open(w, r)
	if err != nil {
		x.s.d.Log.Debug("a client did not open its streams", "path", "/portforward", "error", err)
		return
	}
	defer conn.Close()
	var all sync.WaitGroup
	for i, port := range q.GetPort() {
		data, errs := streams[2*i], streams[2*i+1]
		number := binary.LittleEndian.AppendUint16(nil, uint16(port))
		data.Write(number)
		errs.Write(number)
		all.Go(func() {
			if err := x.s.PortForward(r.Context(), q.GetPodSandboxId(), port, data); err != nil {
				io.WriteString(errs, err.Error())
			}
		})
	}
	all.Wait()
}

// pair is the two streams of one connection to a port.
type pair struct {
	port       int32
	data, errs httpstream.Stream
	replies    []<-chan struct{}
	expire     *time.Timer
}

// halves is a stream that is closed one way, or altogether.
type halves struct{ httpstream.Stream }

func (h halves) CloseWrite() error { return h.Stream.Close() }
func (h halves) Close() error      { return h.Stream.Reset() }

// forwardSPDY serves pairs of streams of the connection that upgrade makes, or
// nil, for as long as the client is there.
func (x *Server) forwardSPDY(ctx context.Context, pod string, upgrade func(httpstream.NewStreamHandler) httpstream.Connection) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex // guards pairs, open and over
	pairs := map[string]*pair{}
	open, over := 0, false
	var running sync.WaitGroup
	upgraded := make(chan struct{})
	var conn httpstream.Connection
	conn = upgrade(func(s httpstream.Stream, reply <-chan struct{}) error {
		port, err := strconv.ParseUint(s.Headers().Get(portforward.PortHeader), 10, 16)
		if err != nil || port < 1 {
			return fmt.Errorf("header %s is no port", portforward.PortHeader)
		}
		t := s.Headers().Get(portforward.StreamType)
		id := s.Headers().Get(portforward.PortForwardRequestIDHeader)
		if id == "" { // old clients open the stream for errors, then the one for data
			n := s.Identifier()
			if t == portforward.StreamTypeData {
				n -= 2
			}
			id = "stream " + strconv.FormatUint(uint64(n), 10)
		}
		mu.Lock()
		defer mu.Unlock()
		p := pairs[id]
		if p == nil {
			if over || open >= pairsMax {
				return errors.New("too many connections")
			}
			p = &pair{port: int32(port)}
			p.expire = time.AfterFunc(createWithin, func() {
				mu.Lock()
				defer mu.Unlock()
				if pairs[id] == p {
					delete(pairs, id)
					open--
					p.reset()
				}
			})
			pairs[id] = p
			open++
		}
		switch {
		case t == portforward.StreamTypeData && p.data == nil:
			p.data = s
		case t == portforward.StreamTypeError && p.errs == nil:
			p.errs = s
		default:
			return fmt.Errorf("unexpected stream of type %.20q", t)
		}
		p.replies = append(p.replies, reply)
		if p.data == nil || p.errs == nil || over {
			return nil
		}
		delete(pairs, id)
		p.expire.Stop()
		running.Go(func() {
			<-upgraded
			x.forwardPair(ctx, pod, p)
			conn.RemoveStreams(p.data, p.errs)
			mu.Lock()
			defer mu.Unlock()
			open--
		})
		return nil
	})
	if conn == nil {
		return
	}
	conn.SetIdleTimeout(x.idle)
	close(upgraded)
	select {
	case <-conn.CloseChan():
	case <-ctx.Done():
	}
	mu.Lock()
	over = true
	for _, p := range pairs {
		p.expire.Stop()
	}
	mu.Unlock()
	cancel()
	conn.Close()
	running.Wait()
}

func (p *pair) reset() {
	if p.data != nil {
		p.data.Reset()
	}
	if p.errs != nil {
		p.errs.Reset()
	}
}

// forwardPair serves one connection.
func (x *Server) forwardPair(ctx context.Context, pod string, p *pair) {
	for _, reply := range p.replies {
		select {
		case <-reply:
		case <-ctx.Done():
			p.reset()
			return
		}
	}
	if err := x.s.PortForward(ctx, pod, p.port, halves{p.data}); err != nil {
		io.WriteString(p.errs, err.Error())
	}
	p.errs.Close()
}
