//go:build linux

package cristream

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// watched serves a request whose context ends when its client has gone, also
// after the connection was taken over, and closes the connection in the end.
func watched(w http.ResponseWriter, r *http.Request, next http.Handler) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	next.ServeHTTP(&taken{ResponseWriter: w, ctx: ctx, cancel: cancel}, r.WithContext(ctx))
}

// taken hands the connection out and watches it from then on.
type taken struct {
	http.ResponseWriter
	ctx    context.Context
	cancel context.CancelFunc
}

func (t *taken) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(t.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	context.AfterFunc(t.ctx, func() { c.Close() })
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
	return c, rw, nil
}

// alive reports whether the peer still has its end open. Reading tells that
// only to whoever reads; what the client sends may be wanted by nobody.
func alive(c net.Conn) bool {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = t.NetConn()
	}
	sc, ok := c.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	established := false
	err = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		established = err == nil && info.State == unix.BPF_TCP_ESTABLISHED
	})
	return err == nil && established
}
