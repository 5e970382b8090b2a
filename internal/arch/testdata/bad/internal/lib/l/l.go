// Package l knows a noun.
// breaks: layer, owned module, module
package l

import (
	_ "github.com/containerd/containerd/api/types"
	_ "github.com/containerd/containerd/v2/client"

	_ "github.com/gantryd/gantry/core/thing"
)
