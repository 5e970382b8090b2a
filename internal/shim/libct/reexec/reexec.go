//go:build linux

// Package reexec is what runs instead of main when libcontainer starts this
// program again as the first process of a container. Importing it is all that
// a program has to do.
//
// It is the one place where a package acts from init: nsenter joins the
// container's namespaces before the Go runtime starts, and what follows has to
// come before the program's other packages are even initialised. Few are:
// packages initialise in the order of their paths once what they import is
// ready, and this one comes before protobuf and all that needs it.
package reexec

import (
	"os"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // runs before the Go runtime
)

func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init() // never returns
	}
}
