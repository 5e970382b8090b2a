package canary

import (
	"context"
	"errors"
	"log/slog"
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
					return errors.New("read-only file system")
				}
				return nil
			}},
			{"shim", func(context.Context) error { <-hang; return nil }}, // heeds nothing
		}, 0, 0, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Run(ctx) }()
		time.Sleep(time.Second)
		if err := c.Err(); err != nil {
			t.Errorf("%v", err)
		}
		broken.Store(true)
		time.Sleep(10 * time.Second)
		if err := c.Err(); err == nil || !strings.Contains(err.Error(), "mount: read-only file system") || !strings.Contains(err.Error(), "shim: no answer for 11s") || strings.Contains(err.Error(), "store") {
			t.Errorf("%v", err)
		}
		if err := c.Err("mount", "shim"); err != nil {
			t.Errorf("%v", err)
		}
		if err := c.Err("shim"); err == nil || !strings.Contains(err.Error(), "mount") || strings.Contains(err.Error(), "shim") {
			t.Errorf("%v", err)
		}
		broken.Store(false)
		close(hang)
		time.Sleep(10 * time.Second)
		if err := c.Err(); err != nil {
			t.Errorf("%v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
