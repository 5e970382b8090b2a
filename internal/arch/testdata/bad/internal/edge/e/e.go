// Package e is right: an edge may use another edge and grpc.
package e

import (
	_ "google.golang.org/grpc"

	_ "github.com/gantryd/gantry/internal/edge/f"
)

type T struct{}

func (T) init() {}
