package sandboxtest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/typed"
)

// ControllerOptions say what a controller under test is like.
type ControllerOptions struct {
	// Open returns a controller without instances.
	Open func(t *testing.T) sandbox.Controller
	// Runtime is what its sandboxes run in.
	Runtime container.Runtime
}

// RunController runs the suite for controllers (contract 1.3.30).
func RunController(t *testing.T, o ControllerOptions) {
	record := func(id string) sandbox.Sandbox {
		return sandbox.Sandbox{ID: id, Runtime: o.Runtime, Labels: map[string]string{"a": "1"}, Spec: typed.Any{URL: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte(`{"annotations":{"x":"y"}}`)}}
	}
	open := func(t *testing.T) (sandbox.Controller, context.Context) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		t.Cleanup(cancel)
		return o.Open(t), ctx
	}
	create := func(t *testing.T, c sandbox.Controller, ctx context.Context, id string) {
		t.Helper()
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := c.Shutdown(ctx, id); err != nil {
				t.Errorf("shut down %s: %v", id, err)
			}
		})
		if err := c.Create(ctx, record(id), sandbox.CreateOptions{NetNSPath: "/proc/self/ns/net", Annotations: map[string]string{"k": "v"}}); err != nil {
			t.Fatal(err)
		}
	}
	status := func(t *testing.T, c sandbox.Controller, ctx context.Context, id, want string) sandbox.Status {
		t.Helper()
		st, err := c.Status(ctx, id, true)
		if err != nil {
			t.Fatal(err)
		}
		if st.ID != id || st.State != want || time.Since(st.CreatedAt).Abs() > time.Minute {
			t.Errorf("status %+v, want %s", st, want)
		}
		return st
	}

	t.Run("life", func(t *testing.T) {
		c, ctx := open(t)
		create(t, c, ctx, "p1")
		is(t, "create again", c.Create(ctx, record("p1"), sandbox.CreateOptions{}), errdefs.ErrAlreadyExists)
		if st := status(t, c, ctx, "p1", sandbox.StateNotReady); !st.ExitedAt.IsZero() {
			t.Errorf("it has ended before it began: %+v", st)
		}
		i, err := c.Start(ctx, "p1")
		if err != nil {
			t.Fatal(err)
		}
		if i.ID != "p1" || time.Since(i.CreatedAt).Abs() > time.Minute || (i.Address == "") != (i.Version == 0) {
			t.Errorf("started %+v", i)
		}
		_, err = c.Start(ctx, "p1")
		is(t, "start again", err, errdefs.ErrFailedPrecondition)
		st := status(t, c, ctx, "p1", sandbox.StateReady)
		if st.Address != i.Address || st.Version != i.Version || st.Pid != i.Pid || !st.CreatedAt.Equal(i.CreatedAt) || !st.ExitedAt.IsZero() {
			t.Errorf("status %+v, started %+v", st, i)
		}
		if p, err := c.Platform(ctx, "p1"); err != nil || p.OS == "" || p.Architecture == "" {
			t.Errorf("platform %+v, %v", p, err)
		}
		if m, err := c.Metrics(ctx, "p1"); !errdefs.IsNotImplemented(err) && (err != nil || m.ID != "p1") {
			t.Errorf("metrics %+v, %v", m, err)
		}
		if err := c.Update(ctx, record("p1"), "labels"); err != nil && !errdefs.IsNotImplemented(err) {
			t.Errorf("update: %v", err)
		}
		short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		defer cancel()
		if _, err := c.Wait(short, "p1"); !errdefs.IsDeadlineExceeded(err) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("wait with a deadline: %v", err)
		}
		waited := make(chan sandbox.Exit, 1)
		go func() {
			x, err := c.Wait(ctx, "p1")
			if err != nil {
				t.Errorf("wait: %v", err)
			}
			waited <- x
		}()
		for range 2 {
			if err := c.Stop(ctx, "p1", time.Second); err != nil {
				t.Errorf("stop: %v", err)
			}
		}
		x := <-waited
		if time.Since(x.At).Abs() > time.Minute {
			t.Errorf("exit %+v", x)
		}
		if again, err := c.Wait(ctx, "p1"); err != nil || again.Status != x.Status || !again.At.Equal(x.At) {
			t.Errorf("wait again: %+v, %v; want %+v", again, err, x)
		}
		if st := status(t, c, ctx, "p1", sandbox.StateNotReady); !st.ExitedAt.Equal(x.At) {
			t.Errorf("status %+v, exit %+v", st, x)
		}
		for range 2 {
			if err := c.Shutdown(ctx, "p1"); err != nil {
				t.Errorf("shut down: %v", err)
			}
		}
		_, err = c.Status(ctx, "p1", false)
		is(t, "status after shutdown", err, errdefs.ErrNotFound)
		create(t, c, ctx, "p1")
		if _, err := c.Start(ctx, "p1"); err != nil {
			t.Errorf("start one of the same name: %v", err)
		}
		if err := c.Shutdown(ctx, "p1"); err != nil {
			t.Errorf("shut down one that runs: %v", err)
		}
	})
	t.Run("never started", func(t *testing.T) {
		c, ctx := open(t)
		create(t, c, ctx, "p2")
		if err := c.Stop(ctx, "p2", 0); err != nil {
			t.Errorf("stop: %v", err)
		}
		if x, err := c.Wait(ctx, "p2"); err != nil || x.At.IsZero() {
			t.Errorf("wait: %+v, %v", x, err)
		}
	})
	t.Run("wait until shut down", func(t *testing.T) {
		c, ctx := open(t)
		create(t, c, ctx, "p3")
		waited := make(chan error, 1)
		go func() {
			_, err := c.Wait(ctx, "p3")
			waited <- err
		}()
		if err := c.Shutdown(ctx, "p3"); err != nil {
			t.Errorf("shut down: %v", err)
		}
		if err := <-waited; err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("wait: %v", err)
		}
	})
	t.Run("missing", func(t *testing.T) {
		c, ctx := open(t)
		for name, call := range map[string]func() error{
			"start":    func() error { _, err := c.Start(ctx, "none"); return err },
			"platform": func() error { _, err := c.Platform(ctx, "none"); return err },
			"wait":     func() error { _, err := c.Wait(ctx, "none"); return err },
			"status":   func() error { _, err := c.Status(ctx, "none", true); return err },
			"metrics":  func() error { _, err := c.Metrics(ctx, "none"); return err },
			"update":   func() error { return c.Update(ctx, record("none")) },
		} {
			is(t, name, call(), errdefs.ErrNotFound)
		}
		if err := errors.Join(c.Stop(ctx, "none", time.Second), c.Shutdown(ctx, "none")); err != nil {
			t.Errorf("stop and shut down what is not there: %v", err)
		}
	})
	t.Run("invalid", func(t *testing.T) {
		c, ctx := open(t)
		for _, id := range []string{"", "../x", "a b"} {
			is(t, "create "+id, c.Create(ctx, record(id), sandbox.CreateOptions{}), errdefs.ErrInvalidArgument)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		c, ctx := open(t)
		ids := []string{"a", "b", "c", "d"}
		var wg sync.WaitGroup
		for _, id := range ids {
			create(t, c, ctx, id)
			wg.Go(func() {
				_, err := c.Start(ctx, id)
				if err == nil {
					err = c.Stop(ctx, id, time.Second)
				}
				if err != nil {
					t.Errorf("%s: %v", id, err)
				}
			})
		}
		wg.Wait()
		for _, id := range ids {
			status(t, c, ctx, id, sandbox.StateNotReady)
		}
	})
	t.Run("one of several creates", func(t *testing.T) {
		c, ctx := open(t)
		t.Cleanup(func() { c.Shutdown(context.Background(), "one") })
		results := make(chan error, 8)
		for range cap(results) {
			go func() { results <- c.Create(ctx, record("one"), sandbox.CreateOptions{}) }()
		}
		made := 0
		for range cap(results) {
			switch err := <-results; {
			case err == nil:
				made++
			case !errdefs.IsAlreadyExists(err):
				t.Errorf("create: %v", err)
			}
		}
		if made != 1 {
			t.Errorf("%d creates of one sandbox succeeded", made)
		}
	})
}
