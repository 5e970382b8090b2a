package criserver

import (
	"context"
	"testing"
	"time"
)

// promise: P1
func TestEarly(t *testing.T) {
	for _, tt := range []struct{ has, before time.Duration }{
		{time.Minute, earlyMost}, {250 * time.Millisecond, 50 * time.Millisecond}, {-time.Second, 0},
	} {
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), tt.has)
		own, stop := early(ctx)
		end, _ := ctx.Deadline()
		at, _ := own.Deadline()
		// The clock goes on between the two.
		if d := end.Sub(at); d > tt.before || d < tt.before-time.Since(begin) {
			t.Errorf("%s: %s before", tt.has, d)
		}
		stop()
		cancel()
	}
	ctx, stop := early(t.Context())
	defer stop()
	if _, ok := ctx.Deadline(); ok {
		t.Error("a deadline that nobody gave")
	}
}
