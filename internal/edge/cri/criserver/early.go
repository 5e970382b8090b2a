package criserver

import (
	"context"
	"time"
)

// Who waits until a deadline does not read an answer that comes with it. So that
// the client learns what its call has waited for, and a call whose time is up is
// not taken for one that was cancelled, the time ends a little before.
const (
	earlyPart = 5 // of what is left
	earlyMost = 100 * time.Millisecond
)

// early is ctx with a deadline that leaves time to answer.
func early(ctx context.Context) (context.Context, context.CancelFunc) {
	end, ok := ctx.Deadline()
	if !ok {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, end.Add(-min(time.Until(end)/earlyPart, earlyMost)))
}
