//go:build !linux

package tarstream

import (
	"context"
	"fmt"
	"io"
	"runtime"

	"github.com/containerd/errdefs"
)

// Apply is not possible here.
func Apply(context.Context, string, io.Reader, ApplyOptions) (Stats, error) {
	return Stats{}, fmt.Errorf("apply a layer on %s: %w", runtime.GOOS, errdefs.ErrNotImplemented)
}

// Diff is not possible here.
func Diff(context.Context, io.Writer, string, string, DiffOptions) error {
	return fmt.Errorf("compare directories on %s: %w", runtime.GOOS, errdefs.ErrNotImplemented)
}

// DiffUpper is not possible here.
func DiffUpper(context.Context, io.Writer, string, DiffOptions) error {
	return fmt.Errorf("compare directories on %s: %w", runtime.GOOS, errdefs.ErrNotImplemented)
}
