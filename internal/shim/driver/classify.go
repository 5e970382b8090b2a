//go:build linux

package driver

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// What the kernel takes of a program's arguments and environment in bytes: of
// one string (MAX_ARG_STRLEN), and of all of them whatever the stack's limit is.
const (
	maxString  = 128 << 10
	maxStrings = 6 << 20
)

// CheckProcess returns ErrInvalidArgument for a process that no runtime can
// start. The kernel would refuse some of them only when the runtime is past
// reporting it, and all that a client saw were an exit.
func CheckProcess(p *specs.Process) error {
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("process: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	switch {
	case p == nil:
		return invalid("there is none in the spec")
	case len(p.Args) == 0:
		return invalid("it has no arguments (args)")
	case !filepath.IsAbs(p.Cwd):
		return invalid("working directory %q is not absolute", clip(p.Cwd))
	}
	total := 0
	for _, list := range []struct {
		name    string
		strings []string
	}{{"argument", p.Args}, {"environment variable", p.Env}} {
		for i, s := range list.strings {
			if strings.IndexByte(s, 0) >= 0 {
				return invalid("%s %d, %q, has a zero byte in it", list.name, i, clip(s))
			}
			if len(s) >= maxString {
				return invalid("%s %d, %q, has %d bytes: argument list too long", list.name, i, clip(s), len(s))
			}
			total += len(s) + 9 // with its end and the pointer to it
		}
	}
	if total > maxStrings {
		return invalid("arguments and environment have %d bytes: argument list too long", total)
	}
	for _, id := range append([]uint32{p.User.UID, p.User.GID}, p.User.AdditionalGids...) {
		if id == 1<<32-1 {
			return invalid("user or group id %d is none", id)
		}
	}
	return nil
}

func clip(s string) string {
	if len(s) > 60 {
		return s[:60] + "..."
	}
	return s
}

// causes are how runtimes end their messages, and what class that is. Their
// errors cross a process boundary as text.
var causes = [...]struct {
	text  string
	class error
}{
	{"executable file not found in $PATH", errdefs.ErrInvalidArgument},
	{"is a directory", errdefs.ErrInvalidArgument},
	{"not a directory", errdefs.ErrInvalidArgument},
	{"exec format error", errdefs.ErrInvalidArgument},
	{"argument list too long", errdefs.ErrInvalidArgument},
	{"file name too long", errdefs.ErrInvalidArgument},
	{"numerical result out of range", errdefs.ErrInvalidArgument},
	{"invalid argument", errdefs.ErrInvalidArgument},
	{"no such device", errdefs.ErrInvalidArgument},
	{"to unmapped", errdefs.ErrInvalidArgument},
	{"is not in a separate kernel namespace", errdefs.ErrInvalidArgument},
	{"no such file or directory", errdefs.ErrFailedPrecondition},
	{"device or resource busy", errdefs.ErrFailedPrecondition},
	{"no such process", errdefs.ErrFailedPrecondition},
	{"permission denied", errdefs.ErrPermissionDenied},
	{"operation not permitted", errdefs.ErrPermissionDenied},
	{"no space left on device", errdefs.ErrResourceExhausted},
	{"cannot allocate memory", errdefs.ErrResourceExhausted},
	{"too many open files", errdefs.ErrResourceExhausted},
	{"resource temporarily unavailable", errdefs.ErrResourceExhausted},
}

// Classify adds a class to an error that a runtime, or the kernel, has given
// none: by the last cause in its text. The text stays as it is, clients look
// for words in it.
func Classify(err error) error {
	if err == nil || !errors.Is(errdefs.Resolve(err), errdefs.ErrUnknown) {
		return err
	}
	var class error
	last := -1
	for _, c := range causes {
		if i := strings.LastIndex(err.Error(), c.text); i > last {
			last, class = i, c.class
		}
	}
	if class == nil {
		return err
	}
	return fmt.Errorf("%w: %w", err, class)
}
