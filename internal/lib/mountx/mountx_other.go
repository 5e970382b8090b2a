//go:build !linux

package mountx

import (
	"context"
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"
)

func unsupported() error {
	return fmt.Errorf("mounting on %s: %w", runtime.GOOS, errdefs.ErrNotImplemented)
}

// Mount is not possible on this system.
func (m Mount) Mount(root string) error { return unsupported() }

// All is not possible on this system, unless there is nothing to mount.
func All(mounts []Mount, root string) error {
	if len(mounts) == 0 {
		return nil
	}
	return unsupported()
}

// Unmount has nothing to do on this system.
func Unmount(path string, flags int) error { return nil }

// UnmountAll has nothing to do on this system.
func UnmountAll(path string, flags int) error { return nil }

// UnmountRecursive has nothing to do on this system.
func UnmountRecursive(path string, flags int) error { return nil }

// WithTemp is not possible on this system.
func WithTemp(ctx context.Context, parentDir string, mounts []Mount, fn func(root string) error) error {
	return unsupported()
}

// CleanupTemp has nothing to do on this system.
func CleanupTemp(dir string, flags int) error { return nil }
