package shimclient

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// endpoint is where a shim listens and what it speaks there.
type endpoint struct {
	Version  int    `json:"version"`
	Address  string `json:"address"`
	Protocol string `json:"protocol"`
}

// known says whether the endpoint is one that this package can talk to.
func (e endpoint) known() error {
	switch {
	case e.Address == "":
		return fmt.Errorf("shim gave no address: %w", errdefs.ErrInvalidArgument)
	case e.Version != 2 && e.Version != 3:
		return fmt.Errorf("shim at %s speaks version %d of the task API, 2 and 3 are known: %w", e.Address, e.Version, errdefs.ErrNotImplemented)
	case e.Protocol != "ttrpc" && e.Protocol != "grpc":
		return fmt.Errorf("shim at %s speaks %q, ttrpc and grpc are known: %w", e.Address, e.Protocol, errdefs.ErrNotImplemented)
	}
	_, _, err := splitAddress(e.Address)
	return err
}

// normal fills in what old shims leave out, and takes the protocol from the
// address's internal form, "ttrpc+unix://" (contract 5.2.6).
func (e endpoint) normal() endpoint {
	for _, p := range []string{"ttrpc", "grpc"} {
		if rest, ok := strings.CutPrefix(e.Address, p+"+"); ok {
			e.Address, e.Protocol = rest, p
		}
	}
	e.Protocol = cmp.Or(e.Protocol, "ttrpc")
	if e.Version <= 0 {
		e.Version = 2
	}
	return e
}

// splitAddress returns the network and its address: unix, with a path or an
// abstract name that begins with '@', vsock or hvsock.
func splitAddress(address string) (network, rest string, err error) {
	if scheme, rest, ok := strings.Cut(address, "://"); ok {
		switch scheme {
		case "unix":
			if rest == "" {
				break
			}
			return "unix", abstract(rest), nil
		case "vsock":
			cid, port, ok := strings.Cut(rest, ":")
			if !ok || !isNumber(cid) || !isNumber(port) {
				return "", "", fmt.Errorf("shim address %q: want vsock://cid:port: %w", address, errdefs.ErrInvalidArgument)
			}
			return "vsock", rest, nil
		case "hvsock":
			i := strings.LastIndexByte(rest, ':')
			if i <= 0 || !isNumber(rest[i+1:]) {
				return "", "", fmt.Errorf("shim address %q: want hvsock://path:port: %w", address, errdefs.ErrInvalidArgument)
			}
			return "hvsock", rest, nil
		}
		return "", "", fmt.Errorf("shim address %q: scheme %q is not one of unix, vsock, hvsock: %w", address, scheme, errdefs.ErrInvalidArgument)
	}
	if address == "" {
		return "", "", fmt.Errorf("shim address is empty: %w", errdefs.ErrInvalidArgument)
	}
	if n := abstract(address); n[0] == '@' {
		return "unix", n, nil
	}
	if address[0] == '/' {
		if _, err := os.Lstat(address); err == nil {
			return "unix", address, nil
		}
		// The oldest shims listen at the abstract name that looks like a path.
		return "unix", "@" + address, nil
	}
	return "", "", fmt.Errorf("shim address %q is none: %w", address, errdefs.ErrInvalidArgument)
}

// abstract writes an abstract socket's name the way that package net reads it.
func abstract(name string) string {
	if name[0] == 0 {
		return "@" + name[1:]
	}
	return name
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 32)
	return err == nil
}

// dial connects to a shim once.
func dial(ctx context.Context, address string) (net.Conn, error) {
	network, rest, err := splitAddress(address)
	if err != nil {
		return nil, err
	}
	switch network {
	case "vsock":
		return dialVsock(ctx, rest)
	case "hvsock":
		return dialHvsock(ctx, rest)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, network, rest)
	if err != nil {
		return nil, err
	}
	return boundedConn{c}, nil
}

// writeLimit is how long a shim may refuse to read before it is hung up on.
// Without it, a stopped shim whose socket is full would hold the lock under
// which its connection is written to, whatever deadline a caller has.
const writeLimit = 10 * time.Second

type boundedConn struct{ net.Conn }

func (c boundedConn) Write(b []byte) (int, error) {
	if err := c.Conn.SetWriteDeadline(time.Now().Add(writeLimit)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(b)
	if err != nil {
		// Part of a frame may be out: nothing sensible can follow it.
		c.Conn.Close()
	}
	return n, err
}

func dialHvsock(ctx context.Context, rest string) (net.Conn, error) {
	i := strings.LastIndexByte(rest, ':')
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", rest[:i])
	if err != nil {
		return nil, err
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(writeLimit)
	}
	if err := c.SetDeadline(deadline); err != nil {
		c.Close()
		return nil, err
	}
	if _, err := fmt.Fprintf(c, "CONNECT %s\n", rest[i+1:]); err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to hvsock port %s: %w", rest[i+1:], err)
	}
	// The answer is read byte by byte: what follows it belongs to the shim.
	line, err := bufio.NewReaderSize(oneByte{c}, 16).ReadSlice('\n')
	if err != nil || !strings.HasPrefix(string(line), "OK ") {
		c.Close()
		return nil, fmt.Errorf("connect to hvsock port %s: answer %q: %w", rest[i+1:], line, errdefs.ErrUnavailable)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		c.Close()
		return nil, err
	}
	return boundedConn{c}, nil
}

// oneByte keeps a buffered reader from reading ahead.
type oneByte struct{ net.Conn }

func (o oneByte) Read(b []byte) (int, error) { return o.Conn.Read(b[:1]) }

func dialVsock(ctx context.Context, rest string) (net.Conn, error) {
	cid, port, _ := strings.Cut(rest, ":")
	c64, _ := strconv.ParseUint(cid, 10, 32)  // both were checked by splitAddress
	p64, _ := strconv.ParseUint(port, 10, 32) //
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	wait := 5 * time.Second
	if d, ok := ctx.Deadline(); ok {
		wait = max(time.Millisecond, time.Until(d))
	}
	tv := unix.NsecToTimeval(wait.Nanoseconds())
	// The kernel's own connect timeout; a vsock's connect cannot be polled for here.
	err = unix.SetsockoptTimeval(fd, unix.AF_VSOCK, unix.SO_VM_SOCKETS_CONNECT_TIMEOUT, &tv)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrVM{CID: uint32(c64), Port: uint32(p64)})
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect to vsock %s: %w", rest, err)
	}
	return boundedConn{vsockConn{os.NewFile(uintptr(fd), "vsock"), rest}}, nil
}

// vsockConn is a net.Conn on a socket of a family that package net does not know.
type vsockConn struct {
	*os.File
	name string
}

type vsockAddr string

func (a vsockAddr) Network() string { return "vsock" }
func (a vsockAddr) String() string  { return string(a) }

func (c vsockConn) LocalAddr() net.Addr  { return vsockAddr("local") }
func (c vsockConn) RemoteAddr() net.Addr { return vsockAddr(c.name) }
