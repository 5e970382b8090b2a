// Package attempt lets several callers wait for one attempt at something that
// is named. A caller that repeats itself joins the attempt under way and gets
// its result; one that cannot wait any longer is told how far it is.
package attempt

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Stage is how far an attempt is. It is safe for concurrent use; a nil Stage
// ignores what it is told.
type Stage struct {
	mu    sync.Mutex
	name  string
	since time.Time
}

// Enter says what is done next.
func (s *Stage) Enter(format string, args ...any) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.name, s.since = fmt.Sprintf(format, args...), time.Now()
}

// String is the stage and for how long it has lasted.
func (s *Stage) String() string {
	if s == nil {
		return "unknown"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.name == "" {
		return "begin"
	}
	return fmt.Sprintf("%s, %s", s.name, time.Since(s.since).Round(time.Millisecond))
}

// Group keeps the attempts of one kind, by name. Make it with New.
type Group[R any] struct {
	limit, linger time.Duration
	discard       func(R)

	mu  sync.Mutex
	all map[string]*try[R]
	wg  sync.WaitGroup
}

type try[R any] struct {
	stage  Stage
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when res and err are set
	back   chan struct{} // receives when a caller joins
	res    R
	err    error

	// Guarded by Group.mu.
	waiting int
	left    bool        // the last caller cancelled
	linger  *time.Timer // runs since then
}

// ErrAbandoned is the cause of an attempt's end that nobody waits for.
var ErrAbandoned = errors.New("the caller went away")

// New makes a Group whose attempts last limit at most. One whose last caller
// cancelled goes on for linger, in case the caller comes back, and what it made
// is given to discard if none does; one whose callers' deadlines passed goes on
// to its end and stays, because they will come back.
func New[R any](limit, linger time.Duration, discard func(R)) *Group[R] {
	return &Group[R]{limit: limit, linger: linger, discard: discard, all: map[string]*try[R]{}}
}

// Do makes an attempt at name by fn, or joins the one under way, and waits for
// it. fn gets a context of its own: with the values of the first caller's, but
// not with its end. It must undo what it did when it returns an error. An error
// of ctx names the stage of the attempt.
func (g *Group[R]) Do(ctx context.Context, name string, fn func(context.Context, *Stage) (R, error)) (R, error) {
	for {
		t := g.join(ctx, name, fn)
		select {
		case <-t.done:
			if errors.Is(t.err, ErrAbandoned) && ctx.Err() == nil {
				continue // it was being undone already
			}
			return t.res, t.err
		case <-ctx.Done():
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if t.waiting--; t.waiting == 0 && errors.Is(ctx.Err(), context.Canceled) {
			t.left = true
			t.linger = time.AfterFunc(g.linger, func() {
				g.mu.Lock()
				defer g.mu.Unlock()
				if t.left {
					t.cancel(ErrAbandoned)
				}
			})
		}
		var zero R
		return zero, fmt.Errorf("%s (%s): %w", name, t.stage.String(), ctx.Err())
	}
}

func (g *Group[R]) join(ctx context.Context, name string, fn func(context.Context, *Stage) (R, error)) *try[R] {
	g.mu.Lock()
	defer g.mu.Unlock()
	if t := g.all[name]; t != nil {
		t.waiting++
		if t.left {
			t.left = false
			t.linger.Stop()
			select {
			case t.back <- struct{}{}:
			default:
			}
		}
		return t
	}
	own, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	own, stop := context.WithTimeoutCause(own, g.limit, fmt.Errorf("the attempt's limit of %s is over: %w", g.limit, context.DeadlineExceeded))
	t := &try[R]{cancel: cancel, done: make(chan struct{}), back: make(chan struct{}, 1), waiting: 1}
	g.all[name] = t
	g.wg.Go(func() {
		defer stop()
		defer cancel(nil)
		t.res, t.err = fn(own, &t.stage)
		if t.err != nil && errors.Is(context.Cause(own), ErrAbandoned) {
			// What ended it says only that its context did: who joined meanwhile begins anew.
			t.err = fmt.Errorf("%w: %w", ErrAbandoned, t.err)
		}
		if t.err == nil && g.unwanted(own, t) {
			g.discard(t.res)
			var zero R
			t.res, t.err = zero, ErrAbandoned
		}
		g.mu.Lock()
		delete(g.all, name)
		g.mu.Unlock()
		close(t.done)
	})
	return t
}

// unwanted waits, when the callers have cancelled, for one to come back.
func (g *Group[R]) unwanted(ctx context.Context, t *try[R]) bool {
	for {
		g.mu.Lock()
		left := t.left
		g.mu.Unlock()
		if !left {
			return false
		}
		select {
		case <-ctx.Done():
			g.mu.Lock()
			defer g.mu.Unlock()
			return t.left
		case <-t.back:
		}
	}
}

// Stages are the attempts under way, by name.
func (g *Group[R]) Stages() map[string]string {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make(map[string]string, len(g.all))
	for name, t := range g.all {
		out[name] = t.stage.String()
	}
	return out
}

// Wait returns when no attempt is under way, or ctx ends. No new one may begin.
func (g *Group[R]) Wait(ctx context.Context) error {
	done := make(chan struct{})
	go func() { g.wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
