// Package mount names what it takes to make a file system visible: the value
// that snapshotters answer with, that differs work on, and that shims mount.
// Performing one is the work of internal/lib/mountx.
package mount

import "github.com/gantryd/gantry/internal/lib/mountx"

// Mount is one mount(2) call to be: Type, Source, Target relative to the root
// it is used under, and Options (contract 3.1.7, 3.4.1).
type Mount = mountx.Mount
