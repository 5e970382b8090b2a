// Package interop runs gantryd under clients and shims that no one here wrote.
package interop

import _ "github.com/containerd/containerd/v2/client"
