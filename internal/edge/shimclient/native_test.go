package shimclient

import (
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

// A shim that wraps a cause and a class sends both: the text is told once.
func TestNative(t *testing.T) {
	err := native(errgrpc.ToGRPC(fmt.Errorf("create container: %w: %w", errors.New("no mapping for uid 0"), errdefs.ErrInvalidArgument)))
	if want := "create container: no mapping for uid 0: invalid argument"; err.Error() != want || !errdefs.IsInvalidArgument(err) {
		t.Errorf("%q", err)
	}
	if err := native(errors.New("task x: not found")); !errdefs.IsNotFound(err) {
		t.Errorf("%q has no class", err)
	}
}
