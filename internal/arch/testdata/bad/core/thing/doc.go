// Package thing is a noun that touches the disk.
// breaks: layer, module
package thing

import (
	_ "os"

	_ "github.com/gantryd/gantry/core/other"
	_ "github.com/gantryd/gantry/internal/engine/a"
	_ "golang.org/x/sys/unix"
)
