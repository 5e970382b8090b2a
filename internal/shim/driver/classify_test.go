//go:build linux

package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// promise: P36
func TestClassify(t *testing.T) {
	for text, want := range map[string]error{
		`exec: "x": executable file not found in $PATH`:         errdefs.ErrInvalidArgument,
		"open /a: no such file or directory":                    errdefs.ErrFailedPrecondition,
		"no such file or directory: then: permission denied":    errdefs.ErrPermissionDenied,
		"permission denied: then: no such file or directory\n!": errdefs.ErrFailedPrecondition,
		"something else": errdefs.ErrUnknown,
	} {
		err := Classify(errors.New(text))
		if got := errdefs.Resolve(err); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
		if !strings.HasPrefix(err.Error(), text) {
			t.Errorf("the text %q has become %q", text, err)
		}
	}
	if err := Classify(&fs.PathError{Op: "open", Path: "/x", Err: unix.ENOSPC}); !errdefs.IsResourceExhausted(err) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("ENOSPC: %v", err)
	}
	for _, own := range []error{nil, fmt.Errorf("invalid argument: %w", errdefs.ErrNotFound), fmt.Errorf("no such process: %w", context.DeadlineExceeded)} {
		if err := Classify(own); err != own {
			t.Errorf("%v has become %v", own, err)
		}
	}
}

// promise: P36
func TestCheckProcess(t *testing.T) {
	fine := func() *specs.Process {
		return &specs.Process{Args: []string{"/bin/true"}, Cwd: "/", Env: []string{"A=b"}}
	}
	if err := CheckProcess(fine()); err != nil {
		t.Error(err)
	}
	many := make([]string, 100)
	for i := range many {
		many[i] = strings.Repeat("x", 100<<10)
	}
	for word, spoil := range map[string]func(p *specs.Process){
		"args":              func(p *specs.Process) { p.Args = nil },
		"not absolute":      func(p *specs.Process) { p.Cwd = "etc" },
		"zero byte":         func(p *specs.Process) { p.Env = append(p.Env, "X=a\x00b") },
		"has 131072 bytes":  func(p *specs.Process) { p.Args = append(p.Args, strings.Repeat("y", 128<<10)) },
		"arguments and env": func(p *specs.Process) { p.Args = append(p.Args, many...) },
		"4294967295":        func(p *specs.Process) { p.User.AdditionalGids = []uint32{0, 1<<32 - 1} },
	} {
		p := fine()
		spoil(p)
		if err := CheckProcess(p); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), word) || len(err.Error()) > 300 {
			t.Errorf("%s: %.400v", word, err)
		}
	}
	if err := CheckProcess(nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no process: %v", err)
	}
}
