//go:build linux

// Command containerd-shim-runc-v2 stays beside a container, or beside the
// containers of a pod, so that they live on when the daemon does not. It keeps
// containerd's shim protocol and serves either daemon.
package main

import (
	"os"

	"github.com/gantryd/gantry/internal/shim/bootstrap"
	_ "github.com/gantryd/gantry/internal/shim/libct/reexec" // is main in a container's first process
)

// Set by the linker.
var version, revision = "dev", "unknown"

func main() {
	os.Exit(bootstrap.Main(bootstrap.Build{Version: version, Revision: revision}, os.Args[1:]))
}
