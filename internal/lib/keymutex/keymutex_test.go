package keymutex

import (
	"context"
	"errors"
	"sync"
	"testing"
)

func TestLockExcludesAndForgets(t *testing.T) {
	var m Map
	var wg sync.WaitGroup
	n := 0
	for range 50 {
		wg.Go(func() {
			unlock, err := m.Lock(t.Context(), "a")
			if err != nil {
				t.Error(err)
				return
			}
			n++
			unlock()
			unlock() // a second time does nothing
		})
	}
	wg.Wait()
	if n != 50 || len(m.held) != 0 {
		t.Fatalf("n = %d, %d names are left", n, len(m.held))
	}
}

func TestLockGivesUpWithItsContext(t *testing.T) {
	var m Map
	unlock, err := m.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Fatalf("err = %v, want canceled", err)
	}
	other, err := m.Lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	other()
	unlock()
	if len(m.held) != 0 {
		t.Fatalf("%d names are left", len(m.held))
	}
}
