//go:build linux

package driver

import (
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ReceiveConsole takes the master of a terminal from the socket on which an
// OCI runtime sends it. It waits for at most the given time.
func ReceiveConsole(socket *os.File, timeout time.Duration) (*os.File, error) {
	fd := int(socket.Fd())
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	name := make([]byte, 4096)
	oob := make([]byte, unix.CmsgSpace(4*4))
	var oobn int
	for {
		var err error
		_, oobn, _, _, err = unix.Recvmsg(fd, name, oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("receive terminal from the runtime: %w", os.NewSyscallError("recvmsg", err))
		}
		break
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, fmt.Errorf("receive terminal from the runtime: %w", err)
	}
	var fds []int
	for i := range messages {
		got, err := unix.ParseUnixRights(&messages[i])
		if err == nil {
			fds = append(fds, got...)
		}
	}
	if len(fds) != 1 {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("receive terminal from the runtime: %d descriptors: %w", len(fds), errdefs.ErrInternal)
	}
	return os.NewFile(uintptr(fds[0]), "console"), nil
}
