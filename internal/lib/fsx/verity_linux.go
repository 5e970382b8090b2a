package fsx

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// EnableVerity is FS_IOC_ENABLE_VERITY with sha256 and blocks of 4 KiB.
func (d Dir) EnableVerity(name string) error {
	f, err := os.Open(d.path(name))
	if err != nil {
		return err
	}
	defer f.Close()
	arg := unix.FsverityEnableArg{Version: 1, Hash_algorithm: unix.FS_VERITY_HASH_ALG_SHA256, Block_size: 4096}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_ENABLE_VERITY, uintptr(unsafe.Pointer(&arg)))
	runtime.KeepAlive(&arg)
	switch errno {
	case 0:
		return nil
	case unix.EOPNOTSUPP, unix.ENOTTY, unix.ENOSYS, unix.EINVAL:
		return &fs.PathError{Op: "enable fs-verity", Path: f.Name(), Err: fmt.Errorf("%w: %w", errno, errors.ErrUnsupported)}
	}
	return &fs.PathError{Op: "enable fs-verity", Path: f.Name(), Err: errno}
}
