//go:build linux

package cristream

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// watched serves a request whose context ends when its client has gone, also
// after the connection was taken over, and closes the connection in the end.
func watched(w http.ResponseWriter, r *http.Request, next http.Handler) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	t := &taken{ResponseWriter: w, server: r.Context(), ctx: ctx, cancel: cancel}
	next.ServeHTTP(t, r.WithContext(ctx))
	if t.conn != nil {
		t.conn.Close()
		cancel()
		<-t.conn.closed
	}
}

// taken hands the connection out and watches it from then on.
type taken struct {
	http.ResponseWriter
	server context.Context // ends with the server
	ctx    context.Context // ends with the request
	cancel context.CancelFunc
	conn   *patient
}

func (t *taken) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(t.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	t.conn = &patient{Conn: c, server: t.server, closed: make(chan struct{})}
	context.AfterFunc(t.ctx, func() { t.conn.Close() })
	go func() {
		for alive(c) {
			select {
			case <-t.ctx.Done():
				return
			case <-time.After(goneGrace / 4):
			}
		}
		select {
		case <-t.ctx.Done():
		case <-time.After(goneGrace):
			t.cancel()
		}
	}()
	return t.conn, rw, nil
}

// patient is a connection whose Close lets the client have all that was
// written: the kernel throws away what it has not sent yet if the connection is
// closed while there is input that nobody has read. So that is read, until the
// client closes its side, or takes nothing any more, or the server ends.
type patient struct {
	net.Conn
	server context.Context
	once   sync.Once
	closed chan struct{}
}

func (p *patient) Close() error {
	p.once.Do(func() {
		go func() {
			defer close(p.closed)
			defer p.Conn.Close()
			stop := context.AfterFunc(p.server, func() { p.Conn.Close() })
			defer stop()
			ended := make(chan struct{})
			defer close(ended)
			go func() {
				for left := math.MaxInt; ; {
					select {
					case <-ended:
						return
					case <-time.After(closeWithin):
					}
					if n := unsent(p.Conn); n == 0 || n >= left {
						p.Conn.Close()
						return
					} else {
						left = n
					}
				}
			}()
			for c := p.Conn; c != nil; c = below(c) {
				if w, ok := c.(interface{ CloseWrite() error }); ok {
					w.CloseWrite()
				}
			}
			io.Copy(io.Discard, p.Conn)
		}()
	})
	return nil
}

// below is the connection that carries c, nil if none does.
func below(c net.Conn) net.Conn {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn()
	}
	return nil
}

// alive reports whether the peer still has its end open. Reading tells that
// only to whoever reads; what the client sends may be wanted by nobody.
func alive(c net.Conn) bool {
	established := false
	err := control(c, func(fd int) {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		established = err == nil && info.State == unix.BPF_TCP_ESTABLISHED
	})
	return err == nil && established
}

// unsent is how many bytes the peer has not received yet, 0 if c is closed.
func unsent(c net.Conn) (n int) {
	control(c, func(fd int) { n, _ = unix.IoctlGetInt(fd, unix.SIOCOUTQ) })
	return n
}

// control calls fn with the socket of a connection.
func control(c net.Conn, fn func(fd int)) error {
	for b := below(c); b != nil; b = below(b) {
		c = b
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return fmt.Errorf("%T is no socket", c)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { fn(int(fd)) })
}
