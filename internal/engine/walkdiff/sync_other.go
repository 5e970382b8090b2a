//go:build !linux

package walkdiff

import (
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"
)

func syncFS(dir string) error {
	return fmt.Errorf("sync the file system of %s on %s: %w", dir, runtime.GOOS, errdefs.ErrNotImplemented)
}
