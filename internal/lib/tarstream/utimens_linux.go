package tarstream

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// utimensat with no path is futimens, which the unix package does not have.
func utimensat(fd int, ts *[2]unix.Timespec) error {
	if _, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(ts)), 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
