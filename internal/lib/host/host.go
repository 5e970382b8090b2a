// Package host names what a machine cannot do. That something is not possible
// here is a value: programs leave it out and say so, tests skip with it, and
// it tells what would make it possible.
package host

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Lacks says that this host lacks a feature. It is an ErrNotImplemented.
type Lacks struct {
	// Feature is what was asked for: "overlay", "id mapped layers".
	Feature string
	// Help is what would make it possible, as a noun phrase: "Linux 5.19",
	// "slow_chown = true in the snapshotter's configuration".
	Help string
	// Cause is how it was found out; it may be nil.
	Cause error
}

func (l *Lacks) Error() string {
	s := l.Feature + " is not possible on this host"
	if l.Cause != nil {
		s = fmt.Sprintf("%s: %v", s, l.Cause)
	}
	if l.Help != "" {
		s += " (it needs " + l.Help + ")"
	}
	return s
}

// Unwrap makes it an ErrNotImplemented that has its cause.
func (l *Lacks) Unwrap() []error {
	if l.Cause == nil {
		return []error{errdefs.ErrNotImplemented}
	}
	return []error{errdefs.ErrNotImplemented, l.Cause}
}
