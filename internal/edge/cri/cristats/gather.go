package cristats

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// gather calls fn for the items, a few at a time, and returns the answers in
// their order. An item that takes longer than patience is left behind: its
// answer is nil, its flag is raised until fn returns, and meanwhile it is not
// tried again. So a thing that hangs costs one goroutine and one wait.
func gather[I, T any](ctx context.Context, places int, patience time.Duration, items []I, flag func(I) *atomic.Int32, fn func(I) *T) ([]*T, error) {
	answers := make([]atomic.Pointer[T], len(items))
	slots := make(chan struct{}, places)
	take := func() error {
		select {
		case slots <- struct{}{}:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for i, item := range items {
		late := flag(item)
		if late.Load() > 0 {
			continue
		}
		if err := take(); err != nil {
			return nil, err
		}
		go func() {
			var over atomic.Bool
			t := time.AfterFunc(patience, func() {
				if over.CompareAndSwap(false, true) {
					late.Add(1)
					<-slots
				}
			})
			answers[i].Store(fn(item))
			if t.Stop(); over.CompareAndSwap(false, true) {
				<-slots
			} else {
				late.Add(-1)
			}
		}()
	}
	for range places {
		if err := take(); err != nil {
			return nil, err
		}
	}
	out := make([]*T, len(items))
	for i := range answers {
		out[i] = answers[i].Load()
	}
	return out, nil
}

// limiter lets ten requests a second through, ten at once; more wait a little.
type limiter struct {
	mu   sync.Mutex
	next time.Time // when the bucket is full again
}

const (
	perRequest = time.Second / 10
	burst      = 10
	maxWait    = time.Second
)

// wait returns when it is the caller's turn. ErrResourceExhausted if that is
// too far away; ctx's error.
func (l *limiter) wait(ctx context.Context) error {
	now := time.Now()
	l.mu.Lock()
	if l.next.Before(now) {
		l.next = now
	}
	d := l.next.Sub(now) - (burst-1)*perRequest
	if d > maxWait {
		l.mu.Unlock()
		return fmt.Errorf("pod sandbox metrics: more than %d requests a second: %w", burst, errdefs.ErrResourceExhausted)
	}
	l.next = l.next.Add(perRequest)
	l.mu.Unlock()
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
