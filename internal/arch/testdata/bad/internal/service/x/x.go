// breaks: package comment, apart, layer, init, banned call, error text

package x

import (
	"context"
	"errors"
	"fmt"
	stdio "io"

	_ "github.com/gantryd/gantry/internal/engine/a"
	_ "github.com/gantryd/gantry/internal/service/y"
)

func init() {}

var errX = errors.New("unable to x")

func f(ctx context.Context, r stdio.Reader) error {
	_ = context.WithValue(ctx, "k", 1)
	_, err := stdio.ReadAll(r)
	return fmt.Errorf("failed to %w", err)
}
