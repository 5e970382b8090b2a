//go:build linux

package cristream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/ownthread"
)

const (
	dialWithin = 10 * time.Second
	// closeGrace is how long more data of a client is waited for after the
	// program in the pod has closed its side.
	closeGrace = time.Second
)

// PortForward connects stream with a port of a pod, at 127.0.0.1 or else at
// [::1] in its network namespace, and closes stream in the end (contract
// 7.1.19). It returns when the program has closed the connection, the client
// has gone, or ctx ends. If stream has a CloseWrite, it is used when the
// program has no more to say. ErrNotFound, ErrInvalidArgument;
// ErrFailedPrecondition if the pod is not ready, ErrUnavailable if nobody
// listens.
func (s *Service) PortForward(ctx context.Context, podID string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	if port < 1 || port > 65535 {
		return fmt.Errorf("forward port %d of pod sandbox %s: %w", port, podID, errdefs.ErrInvalidArgument)
	}
	p, err := s.d.Pod(ctx, podID)
	if err != nil {
		return err
	}
	if p.Ready != nil {
		return p.Ready
	}
	conn, err := dial(ctx, p.NetNSPath, strconv.Itoa(int(port)))
	if err != nil {
		return fmt.Errorf("forward port %d of pod sandbox %s: %w", port, p.ID, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() {
		conn.Close()
		stream.Close()
	})
	defer stop()
	up := make(chan error, 1)
	sent := &tally{w: conn}
	go func() {
		_, err := io.Copy(sent, stream)
		conn.CloseWrite()
		up <- err
	}()
	_, err = io.Copy(stream, conn)
	if w, ok := stream.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
	}
	var upErr error
	for before := int64(-1); before != sent.n.Load(); {
		before = sent.n.Load()
		select {
		case upErr = <-up:
		case <-ctx.Done():
		case <-time.After(closeGrace):
			continue
		}
		break
	}
	if ctx.Err() != nil {
		return nil // the client has gone, nobody wants to know
	}
	if err == nil && upErr != nil && !errors.Is(upErr, unix.EPIPE) && !errors.Is(upErr, unix.ECONNRESET) {
		err = upErr
	}
	if err != nil {
		return fmt.Errorf("forward port %d of pod sandbox %s: %w", port, p.ID, err)
	}
	return nil
}

// tally counts what is written.
type tally struct {
	w io.Writer
	n atomic.Int64
}

func (t *tally) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	t.n.Add(int64(n))
	return n, err
}

// dial connects from inside a network namespace, the own one if path is "".
func dial(ctx context.Context, path, port string) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialWithin)
	defer cancel()
	var all []error
	for _, to := range [][2]string{{"tcp4", "127.0.0.1"}, {"tcp6", "::1"}} {
		var conn net.Conn
		err := inNetNS(path, func() (err error) {
			// The socket is made on this thread, and stays in its namespace.
			conn, err = (&net.Dialer{}).DialContext(ctx, to[0], net.JoinHostPort(to[1], port))
			return err
		})
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		if enter := new(ownthread.EnterError); errors.As(err, &enter) {
			return nil, err
		}
		all = append(all, err)
	}
	return nil, fmt.Errorf("%w: %w", errors.Join(all...), errdefs.ErrUnavailable)
}

// inNetNS runs fn on a thread that is in the network namespace at path, "" for
// the daemon's.
func inNetNS(path string, fn func() error) error {
	if path == "" {
		return fn()
	}
	return ownthread.Inside(path, unix.CLONE_NEWNET, fn)
}
