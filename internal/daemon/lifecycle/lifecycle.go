// Package lifecycle starts and stops the parts of the daemon in order, turns
// signals into actions, and prepares the process itself: directories, lock,
// temporary directory, OOM score, cgroup. Every stop has a deadline, so that
// one part that hangs cannot keep the daemon from ending.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// DefaultStop is how long a component may take to stop when it does not say.
const DefaultStop = 10 * time.Second

// Component is a part of the daemon that runs.
type Component struct {
	Name string
	// Start, if set, is called in order and returns when the component can be
	// used: a socket is bound, a file is open. The next one starts after it.
	Start func(ctx context.Context) error
	// Run, if set, works until ctx is done. Its return before that is the end
	// of the component; with an error it is the end of all.
	Run func(ctx context.Context) error
	// Stop, if set, is called when Run has returned, with Timeout's deadline.
	Stop func(ctx context.Context) error
	// Timeout bounds Run's way out and Stop together, 0 is DefaultStop.
	Timeout time.Duration
}

// ErrStuck is what a component that did not stop in time gets.
var ErrStuck = errors.New("did not stop in time")

type running struct {
	c      Component
	cancel context.CancelFunc
	done   chan error // nil without Run
}

// Run starts the components in order, calls ready, and waits until ctx is done
// or a component ends with an error. Then it stops all of them in reverse
// order, each within its deadline. The result is nil after an orderly stop;
// else it joins the first error and those of the stops, each with the
// component's name. A component whose Start fails is not stopped.
func Run(ctx context.Context, log *slog.Logger, ready func(), components ...Component) error {
	failed := make(chan error, len(components))
	var started []*running
	var errs []error
	for _, c := range components {
		if ctx.Err() != nil {
			break
		}
		// A component's context outlives ctx until its turn to stop comes.
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		if c.Start != nil {
			begin := time.Now()
			stop := context.AfterFunc(ctx, cancel) // a start may be interrupted
			err := c.Start(own)
			if err == nil && !stop() {
				// The end came while it started: it is stopped below.
				log.Debug("interrupted while starting", "component", c.Name)
			}
			if err != nil {
				cancel()
				if ctx.Err() != nil && errors.Is(err, context.Canceled) {
					break
				}
				errs = append(errs, fmt.Errorf("start %s: %w", c.Name, err))
				break
			}
			log.Debug("component started", "component", c.Name, "duration", time.Since(begin))
		}
		r := &running{c: c, cancel: cancel}
		if c.Run != nil {
			r.done = make(chan error, 1)
			go func() {
				err := c.Run(own)
				if err != nil && own.Err() == nil {
					failed <- fmt.Errorf("run %s: %w", c.Name, err)
				}
				r.done <- err
			}()
		}
		started = append(started, r)
		select {
		case err := <-failed:
			errs = append(errs, err)
		default:
		}
		if len(errs) > 0 {
			break
		}
	}
	if len(errs) == 0 && ctx.Err() == nil {
		if ready != nil {
			ready()
		}
		select {
		case <-ctx.Done():
		case err := <-failed:
			errs = append(errs, err)
		}
	}
	for i := len(started) - 1; i >= 0; i-- {
		if err := started[i].stop(log); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (r *running) stop(log *slog.Logger) error {
	limit := r.c.Timeout
	if limit <= 0 {
		limit = DefaultStop
	}
	begin := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	r.cancel()
	if r.done != nil {
		select {
		case <-r.done: // an error that ended Run early was reported when it happened
		case <-ctx.Done():
			return fmt.Errorf("stop %s: %w (%s)", r.c.Name, ErrStuck, limit)
		}
	}
	if r.c.Stop != nil {
		done := make(chan error, 1)
		go func() { done <- r.c.Stop(ctx) }()
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("stop %s: %w", r.c.Name, err)
			}
		case <-ctx.Done():
			return fmt.Errorf("stop %s: %w (%s)", r.c.Name, ErrStuck, limit)
		}
	}
	log.Debug("component stopped", "component", r.c.Name, "duration", time.Since(begin))
	return nil
}
