// Package gc deletes what nothing leads to any more. Deciding is a pure
// function over the objects (Plan); doing is the metadata's, which removes the
// records in one transaction and reclaims the data behind them afterwards,
// when nobody waits. What a lease holds, and what is reachable from it, is
// never touched.
package gc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/graph"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
)

// Stats says what a collection did.
type Stats struct {
	graph.Freed
	// Started is when, Paused how long writers had to wait for it, and Took
	// how long all of it was.
	Started      time.Time
	Paused, Took time.Duration
}

// Config says when to collect by itself (contract 4.3.4).
type Config struct {
	// PauseThreshold is the part of the time that collecting may take, at most
	// 0.5: after a collection of 20 ms the next waits a second at 0.02.
	PauseThreshold float64
	// DeletionThreshold is the number of deletions after which to collect
	// without that wait; 0 for none.
	DeletionThreshold int
	// MutationThreshold is the number of changes, deletions included, after
	// which to collect though nothing was deleted; 0 for none.
	MutationThreshold int
	// ScheduleDelay is how long to wait for more after a threshold was reached,
	// StartupDelay how long after the start to collect what the last run left.
	ScheduleDelay, StartupDelay time.Duration
}

// Defaults returns the configuration of contract 4.3.4.
func Defaults() Config {
	return Config{PauseThreshold: 0.02, MutationThreshold: 100, StartupDelay: 100 * time.Millisecond}
}

// minPause is the shortest time that a collection counts for in the schedule,
// retryDelay what is added after one that failed.
const (
	minPause   = 5 * time.Millisecond
	retryDelay = time.Second
)

// runTimeout bounds a collection. It is longer than what the metadata gives to
// a backend that does not answer.
const runTimeout = 10 * time.Minute

// Store is what a Collector collects.
type Store interface {
	graph.Store
	// Observe has fn called after every change; deleted says whether the
	// change may have left something to collect.
	Observe(fn func(deleted bool))
}

// Collector runs collections, one at a time. It is safe for concurrent use.
type Collector struct {
	store Store
	cfg   Config
	log   *slog.Logger
	now   func() time.Time

	ctx    context.Context // of the collections, until Close
	cancel context.CancelFunc
	owned  sync.WaitGroup // work

	mu        sync.Mutex // guards what follows
	closed    bool
	running   bool
	next      *run // what callers that come now wait for
	deletions int  // since the last collection began
	mutations int
	last      Stats
	lastErr   error
	average   time.Duration // of Paused

	wake chan struct{} // has one element if counts have changed
	done chan struct{} // has one element if a collection has ended
}

// run is a collection that has not begun yet.
type run struct {
	done  chan struct{}
	stats Stats
	err   error
}

// New returns a collector of store. It does nothing by itself until Run.
func New(store Store, cfg Config, log *slog.Logger) *Collector {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := &Collector{store: store, cfg: cfg, log: log, now: time.Now, wake: make(chan struct{}, 1), done: make(chan struct{}, 1)}
	if c.cfg.PauseThreshold <= 0 {
		c.cfg.PauseThreshold = Defaults().PauseThreshold
	}
	c.cfg.PauseThreshold = min(c.cfg.PauseThreshold, 0.5)
	c.ctx, c.cancel = context.WithCancel(context.Background())
	store.Observe(c.changed)
	return c
}

// changed counts a change. It does not wait.
func (c *Collector) changed(deleted bool) {
	c.mu.Lock()
	c.mutations++
	if deleted {
		c.deletions++
	}
	c.mu.Unlock()
	signal(c.wake)
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// Collect deletes what was unreachable when it was called, data included
// (contract 4.3.5, 13.15), and returns what that was. Callers that wait at the
// same time share a collection. ctx ends the wait, not the collection.
func (c *Collector) Collect(ctx context.Context) (Stats, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return Stats{}, fmt.Errorf("garbage collection: the collector is closed: %w", errdefs.ErrUnavailable)
	}
	if c.next == nil {
		c.next = &run{done: make(chan struct{})}
	}
	r := c.next
	if !c.running {
		c.running = true
		c.owned.Go(c.work)
	}
	c.mu.Unlock()
	select {
	case <-r.done:
		return r.stats, r.err
	case <-ctx.Done():
		return Stats{}, fmt.Errorf("wait for garbage collection: %w", ctx.Err())
	}
}

// ScheduleAndWait is Collect for those who deleted something and have to wait
// until it is gone. That a store did not reclaim is not their error: it may be
// about anybody's data, is logged, and is tried again.
func (c *Collector) ScheduleAndWait(ctx context.Context) error {
	_, err := c.Collect(ctx)
	if e := (*ReclaimError)(nil); errors.As(err, &e) {
		return nil
	}
	return err
}

// Close ends the collection under way, with what it has done so far, and
// returns when it has ended. There are none after it.
func (c *Collector) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.store.Observe(nil)
	c.cancel()
	c.owned.Wait()
	return nil
}

// work collects until nobody waits for a collection.
func (c *Collector) work() {
	for {
		c.mu.Lock()
		r := c.next
		c.next = nil
		if c.running = r != nil; !c.running {
			c.mu.Unlock()
			return
		}
		deletions, mutations := c.deletions, c.mutations
		c.deletions, c.mutations = 0, 0
		c.mu.Unlock()

		r.stats, r.err = c.once(c.ctx)
		if r.err != nil && c.ctx.Err() == nil {
			c.log.Error("collection is incomplete and will be tried again", "error", r.err)
		}

		c.mu.Lock()
		if r.err != nil { // it is still to be done
			c.deletions += deletions
			c.mutations += mutations
		}
		c.last, c.lastErr = r.stats, r.err
		if pause := max(r.stats.Paused, minPause); c.average == 0 {
			c.average = pause
		} else {
			c.average = (3*c.average + pause) / 4
		}
		c.mu.Unlock()
		close(r.done)
		signal(c.done)
	}
}

// once is one collection.
func (c *Collector) once(ctx context.Context) (s Stats, err error) {
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	s.Started = c.now()
	defer func() { s.Took = c.now().Sub(s.Started) }()
	// Most collections find nothing: look before writers have to wait.
	var all []graph.Object
	if err := c.store.Objects(ctx, func(o graph.Object) error {
		all = append(all, o)
		return nil
	}); err != nil {
		return s, fmt.Errorf("garbage collection: mark: %w", err)
	}
	if len(Plan(all, c.now())) > 0 {
		began := c.now()
		s.Freed, err = c.store.Sweep(ctx, func(all []graph.Object) []graph.Node { return Plan(all, c.now()) })
		s.Paused = c.now().Sub(began)
		if err != nil {
			return s, fmt.Errorf("garbage collection: sweep: %w", err)
		}
	}
	f, err := c.store.Reclaim(ctx)
	s.Blobs, s.Bytes, s.Snapshots, s.Ingests = f.Blobs, f.Bytes, f.Snapshots, f.Ingests
	if err != nil {
		return s, fmt.Errorf("garbage collection: %w", &ReclaimError{err})
	}
	return s, nil
}

// ReclaimError says that the records are gone but a store behind them did not
// delete the data. It is tried again.
type ReclaimError struct{ err error }

func (e *ReclaimError) Error() string { return e.err.Error() }

// Unwrap returns what the stores said.
func (e *ReclaimError) Unwrap() error { return e.err }

// Last returns what the last collection did, and its error.
func (c *Collector) Last() (Stats, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last, c.lastErr
}

// due returns how long to wait for the next collection; ok is false if there
// is no reason for one (contract 4.3.4).
func (c *Collector) due(now time.Time) (wait time.Duration, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cfg := c.cfg
	many := cfg.DeletionThreshold > 0 && c.deletions >= cfg.DeletionThreshold
	if !many && c.deletions == 0 && (cfg.MutationThreshold <= 0 || c.mutations < cfg.MutationThreshold) {
		return 0, false
	}
	wait = cfg.ScheduleDelay
	if !many && c.average > 0 {
		ended := c.last.Started.Add(c.last.Took)
		rest := ended.Add(time.Duration(float64(c.average)/cfg.PauseThreshold) - c.average).Sub(now)
		wait = max(wait, rest)
	}
	if c.lastErr != nil {
		wait = max(wait, c.last.Started.Add(c.last.Took+retryDelay).Sub(now))
	}
	return max(wait, 0), true
}

// Run collects after StartupDelay, then as the configuration says, until ctx
// ends. What expires is found at the latest an hour later.
func (c *Collector) Run(ctx context.Context) error {
	const always = time.Hour
	timer := time.NewTimer(c.cfg.StartupDelay)
	defer timer.Stop()
	idle := false // whether timer waits for nothing but expiry
	at := c.now().Add(c.cfg.StartupDelay)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			s, err := c.Collect(ctx)
			switch {
			case ctx.Err() != nil:
				return nil
			case err == nil && s.Freed != graph.Freed{}:
				c.log.Debug("garbage collected", "records", s.Records, "blobs", s.Blobs, "snapshots", s.Snapshots, "ingests", s.Ingests, "bytes", s.Bytes, "paused", s.Paused, "took", s.Took)
			}
			idle, at = true, c.now().Add(always)
			timer.Reset(always)
		case <-c.wake:
		case <-c.done:
		}
		if wait, ok := c.due(c.now()); ok {
			if t := c.now().Add(wait); idle || t.Before(at) {
				idle, at = false, t
				timer.Reset(wait)
			}
		}
	}
}

// SyncDeleteImages returns store, whose Delete with Sync then waits until what
// the image alone kept alive is gone (contract 1.3.19).
func SyncDeleteImages(store image.Store, c *Collector) image.Store { return syncImages{store, c} }

type syncImages struct {
	image.Store
	c *Collector
}

func (s syncImages) Delete(ctx context.Context, name string, opts image.DeleteOptions) error {
	if err := s.Store.Delete(ctx, name, opts); err != nil || !opts.Sync {
		return err
	}
	return s.c.ScheduleAndWait(ctx)
}

// SyncDeleteLeases returns store, whose Delete with sync then waits until what
// the lease alone kept alive is gone (contract 1.3.24).
func SyncDeleteLeases(store lease.Store, c *Collector) lease.Store { return syncLeases{store, c} }

type syncLeases struct {
	lease.Store
	c *Collector
}

func (s syncLeases) Delete(ctx context.Context, id lease.ID, sync bool) error {
	if err := s.Store.Delete(ctx, id, sync); err != nil || !sync {
		return err
	}
	return s.c.ScheduleAndWait(ctx)
}
