package canary

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The part that fails is named, one that hangs too, and it recovers by itself.
// promise: P34, P1
func TestCanary(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var broken atomic.Bool
		hang := make(chan struct{})
		c := New([]Check{
			{"store", func(context.Context) error { return nil }},
			{"mount", func(context.Context) error {
				if broken.Load() {
					return errors.Join(errors.New("mount it"), errors.New("read-only file system"))
				}
				return nil
			}},
			{"shim", func(context.Context) error { <-hang; return nil }}, // heeds nothing
		}, 0, 0, slog.New(slog.DiscardHandler))
		check := func(want ...string) {
			t.Helper()
			var got []string
			for _, r := range c.Results() {
				got = append(got, r.Error)
			}
			if !slices.Equal(got, want) {
				t.Errorf("%q, want %q", got, want)
			}
		}
		check("not checked yet", "not checked yet", "not checked yet")
		if err := c.Err(); err != nil {
			t.Errorf("%v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Run(ctx) }()
		time.Sleep(time.Second)
		if err := c.Err(); err != nil {
			t.Errorf("%v", err)
		}
		check("", "", "not checked yet")
		broken.Store(true)
		time.Sleep(10 * time.Second)
		if err := c.Err(); err == nil || !strings.Contains(err.Error(), "mount: mount it; read-only file system") || !strings.Contains(err.Error(), "shim: no answer for 11s") || strings.Contains(err.Error(), "store") {
			t.Errorf("%v", err)
		}
		if err := c.Err("mount", "shim"); err != nil {
			t.Errorf("%v", err)
		}
		if err := c.Err("shim"); err == nil || !strings.Contains(err.Error(), "mount") || strings.Contains(err.Error(), "shim") {
			t.Errorf("%v", err)
		}
		check("", "mount it; read-only file system", "no answer for 11s")
		broken.Store(false)
		close(hang)
		time.Sleep(10 * time.Second)
		if err := c.Err(); err != nil {
			t.Errorf("%v", err)
		}
		check("", "", "")
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
