//go:build linux

package task

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

const maxOptions = 1 << 20

// Options reads runtime options (contract 5.3.9). None at all are the
// defaults, and so are generic options without content.
func Options(a *anypb.Any) (*options.Options, error) {
	o := &options.Options{}
	if a == nil || a.TypeUrl == "" && len(a.Value) == 0 {
		return o, nil
	}
	switch name := a.TypeUrl[strings.LastIndexByte(a.TypeUrl, '/')+1:]; name {
	case "containerd.runc.v1.Options":
		if err := proto.Unmarshal(a.Value, o); err != nil {
			return nil, fmt.Errorf("runtime options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return o, nil
	case "runtimeoptions.v1.Options":
		if len(a.Value) == 0 {
			return o, nil
		}
		fallthrough
	default:
		return nil, fmt.Errorf("runtime options %q are not for this runtime: %w", a.TypeUrl, errdefs.ErrInvalidArgument)
	}
}

// SaveOptions leaves in the bundle what a later "delete" has to know: the
// files runtime and options.json of contract 5.1.1.
func SaveOptions(bundle string, o *options.Options) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bundle, "options.json"), b, 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bundle, "runtime"), []byte(o.BinaryName), 0o600)
}

// LoadOptions reads what SaveOptions, or another shim, left in a bundle.
func LoadOptions(bundle string) (*options.Options, error) {
	o := &options.Options{}
	f, err := os.Open(filepath.Join(bundle, "options.json"))
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	default:
		defer f.Close()
		if err := json.NewDecoder(io.LimitReader(f, maxOptions)).Decode(o); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(bundle, "runtime")); err == nil && len(b) < maxOptions {
		o.BinaryName = strings.TrimSpace(string(b))
	}
	return o, nil
}

// UnmountRootfs takes off what is mounted at a bundle's root file system, for
// a shim that is no more.
func UnmountRootfs(bundle string) error { return unmountRootfs(bundle) }
