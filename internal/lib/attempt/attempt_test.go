package attempt

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// promise: P5
func TestJoin(t *testing.T) {
	g := New[int](time.Minute, time.Hour, nil)
	var begun atomic.Int32
	entered, release := make(chan struct{}), make(chan struct{})
	fn := func(_ context.Context, s *Stage) (int, error) {
		begun.Add(1)
		s.Enter("mount %s", "/x")
		close(entered)
		<-release
		return 7, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() { _, err := g.Do(ctx, "a", fn); failed <- err }()
	<-entered
	cancel()
	err := <-failed
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "a (mount /x, ") {
		t.Errorf("%v", err)
	}
	if st := g.Stages()["a"]; !strings.Contains(st, "mount /x") {
		t.Errorf("stage %q", st)
	}
	late, stop := context.WithTimeout(t.Context(), time.Millisecond)
	defer stop()
	if _, err := g.Do(late, "a", fn); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	go func() {
		for joined := false; !joined; runtime.Gosched() {
			g.mu.Lock()
			joined = g.all["a"].waiting > 0
			g.mu.Unlock()
		}
		close(release)
	}()
	if n, err := g.Do(t.Context(), "a", fn); n != 7 || err != nil {
		t.Error(n, err)
	}
	if begun.Load() != 1 {
		t.Errorf("%d attempts", begun.Load())
	}
	if len(g.Stages()) != 0 {
		t.Errorf("stages %v", g.Stages())
	}
}

// An attempt that its caller gave up ends, and the next one begins anew.
func TestAbandoned(t *testing.T) {
	g := New[int](time.Minute, time.Millisecond, nil)
	entered := make(chan struct{})
	ended := make(chan error, 1)
	back := make(chan error, 1)
	fn := func(ctx context.Context, _ *Stage) (int, error) {
		close(entered)
		<-ctx.Done()
		ended <- context.Cause(ctx)
		// Somebody asks again while it is being taken back, by code that knows of no causes.
		go func() {
			_, err := g.Do(t.Context(), "a", func(context.Context, *Stage) (int, error) { return 0, nil })
			back <- err
		}()
		for joined := false; !joined; {
			g.mu.Lock()
			joined = g.all["a"].waiting > 0
			g.mu.Unlock()
		}
		return 0, ctx.Err()
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-entered; cancel() }()
	if _, err := g.Do(ctx, "a", fn); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, ErrAbandoned) {
			t.Errorf("%v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it goes on")
	}
	if err := <-back; err != nil {
		t.Errorf("who came back got %v", err)
	}
	if err := g.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if n, err := g.Do(t.Context(), "a", func(context.Context, *Stage) (int, error) { return 3, nil }); n != 3 || err != nil {
		t.Error(n, err)
	}
}

// What was made for a caller that went away is given back, unless it returns
// in time.
// promise: P5
func TestUnwanted(t *testing.T) {
	discarded := make(chan int, 2)
	for _, back := range []bool{false, true} {
		linger := time.Millisecond
		if back {
			linger = time.Hour
		}
		g := New(time.Minute, linger, func(n int) { discarded <- n })
		entered, release := make(chan struct{}), make(chan struct{})
		fn := func(context.Context, *Stage) (int, error) { close(entered); <-release; return 5, nil }
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-entered; cancel() }()
		if _, err := g.Do(ctx, "a", fn); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		close(release)
		if back {
			if n, err := g.Do(t.Context(), "a", fn); n != 5 || err != nil {
				t.Error(n, err)
			}
		}
		if err := g.Wait(t.Context()); err != nil {
			t.Error(err)
		}
		if n := len(discarded); n != 1 {
			t.Errorf("back %v: %d discarded", back, n)
		}
	}
}

// Who left last is waited for as long as who left first was.
// promise: P5
func TestLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(time.Hour, 10*time.Second, func(int) {})
		begin, ended, attempts := time.Now(), time.Duration(0), 0
		fn := func(ctx context.Context, _ *Stage) (int, error) {
			attempts++
			<-ctx.Done()
			ended = time.Since(begin)
			return 0, ctx.Err()
		}
		for range 3 {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(4*time.Second, cancel)
			if _, err := g.Do(ctx, "a", fn); !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
			time.Sleep(4 * time.Second)
		}
		if err := g.Wait(t.Context()); err != nil || attempts != 1 || ended != 30*time.Second {
			t.Errorf("%d attempts, the last ended after %s: %v", attempts, ended, err)
		}
	})
}

// No attempt is without an end.
func TestLimit(t *testing.T) {
	g := New[int](time.Millisecond, time.Hour, nil)
	_, err := g.Do(t.Context(), "a", func(ctx context.Context, _ *Stage) (int, error) { <-ctx.Done(); return 0, context.Cause(ctx) })
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "limit of 1ms") {
		t.Errorf("%v", err)
	}
}
