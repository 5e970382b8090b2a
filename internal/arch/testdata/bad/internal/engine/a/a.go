// breaks: package comment, apart, module, owned module
package a

import (
	_ "go.etcd.io/bbolt"
	_ "google.golang.org/grpc/metadata"

	_ "github.com/gantryd/gantry/internal/engine/a/inner"
	_ "github.com/gantryd/gantry/internal/engine/b"
	_ "github.com/gantryd/gantry/internal/engine/snapmeta"
)
