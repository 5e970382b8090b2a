// Package notify tells the service manager when the daemon is ready and when
// it stops: READY=1 and STOPPING=1 over NOTIFY_SOCKET, never WATCHDOG=1
// (contract 8.2.3). Without that variable it does nothing.
package notify

import (
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Env is the variable that names the socket.
const Env = "NOTIFY_SOCKET"

// timeout bounds a message: the manager's queue may be full.
const timeout = 5 * time.Second

// Notifier sends states. The zero value sends nothing.
type Notifier struct{ addr string }

// New makes a Notifier for the value of NOTIFY_SOCKET: an absolute path, an
// abstract name that begins with @, or "" for none.
func New(addr string) (Notifier, error) {
	if addr != "" && addr[0] != '/' && addr[0] != '@' {
		return Notifier{}, fmt.Errorf("%s=%q is neither a path nor an abstract name: %w", Env, addr, errdefs.ErrInvalidArgument)
	}
	return Notifier{addr}, nil
}

// Enabled tells whether a manager listens.
func (n Notifier) Enabled() bool { return n.addr != "" }

// Ready says that the daemon serves.
func (n Notifier) Ready() error { return n.send("READY=1") }

// Stopping says that the daemon is on its way out.
func (n Notifier) Stopping() error { return n.send("STOPPING=1") }

// Status shows one line about what the daemon does.
func (n Notifier) Status(line string) error {
	return n.send("STATUS=" + strings.ReplaceAll(line, "\n", " "))
}

func (n Notifier) send(state string) error {
	if n.addr == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.addr, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify %s of %s: %w", n.addr, state, err)
	}
	defer conn.Close()
	if err := conn.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return fmt.Errorf("notify %s of %s: %w", n.addr, state, err)
	}
	if _, err := conn.Write([]byte(state)); err != nil {
		return fmt.Errorf("notify %s of %s: %w", n.addr, state, err)
	}
	return nil
}
