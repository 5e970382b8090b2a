// Package e is right: an edge may use another edge grpc, and read with a limit.
package e

import (
	"io"

	_ "google.golang.org/grpc"

	_ "github.com/gantryd/gantry/internal/edge/f"
)

type T struct{}

func (T) init() {}

func bounded(r io.Reader) ([]byte, error) { return io.ReadAll(io.LimitReader(r, 10)) }
