package cristats

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

const (
	// idleNanoCores is the CPU usage below which a thing is looked at less often.
	idleNanoCores = 1_000_000
	// maxSkip is how many periods lie at most between two samples of an idle thing.
	maxSkip = 8
	// layerShare keeps the measurement of a layer below 1/50 of the time.
	layerShare = 50
	// maxLayerWait is the longest time between two measurements of a layer.
	maxLayerWait = 10 * time.Minute
	// sweepEvery is how many periods lie between two searches for what is gone.
	sweepEvery = 30
)

// sample is the CPU time that a group had used at a time.
type sample struct {
	at    time.Time
	total uint64 // nanoseconds
}

// layer is a measured writable layer.
type layer struct {
	snapshot.Usage
	at time.Time // zero: never
}

// entry is what is kept of a container or a pod between two looks at it. No
// file is kept open.
type entry struct {
	late, layerLate atomic.Int32 // reads that hang; see gather

	mu         sync.Mutex // guards the rest; never held over I/O
	key        string     // what group was found by
	group      *group
	last, prev sample
	due        time.Time
	skip       int64 // periods
	layer      layer
	layerDue   time.Time
	layerBad   bool // it was said that it cannot be measured
}

func (e *entry) flag() *atomic.Int32 { return &e.late }

func (s *Service) entry(id string) *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil {
		e = &entry{}
		s.entries[id] = e
	}
	return e
}

// locate returns the group that key stands for, found once. Another key is
// another life of the thing: its samples begin anew.
func (e *entry) locate(key string, find func() (*group, error)) (*group, error) {
	e.mu.Lock()
	if e.key == key && e.group != nil {
		defer e.mu.Unlock()
		return e.group, nil
	}
	e.mu.Unlock()
	g, err := find()
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.key != key {
		e.last, e.prev, e.skip = sample{}, sample{}, 0
	}
	e.key, e.group = key, g
	return g, nil
}

// lost forgets a group that could not be read, so that it is looked for again.
func (e *entry) lost(g *group) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.group == g {
		e.group = nil
	}
}

// record keeps a sample, unless the last one is younger than the period.
func (e *entry) record(now sample, period, retention time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.last.at.IsZero() {
		e.last, e.skip = now, 1
	} else if d := now.at.Sub(e.last.at); d >= period*9/10 {
		if rate(e.last, now) > idleNanoCores {
			e.skip = 1
		} else {
			e.skip = max(1, min(2*e.skip, maxSkip, int64(retention/2/period)))
		}
		e.prev, e.last = e.last, now
	}
	e.due = now.at.Add(time.Duration(e.skip)*period - period/10)
}

// rate is the CPU usage between two samples in nanoseconds a second.
func rate(from, to sample) uint64 {
	d := to.at.Sub(from.at)
	if d <= 0 || to.total < from.total {
		return 0
	}
	return uint64(float64(to.total-from.total) / d.Seconds())
}

// nanoCores is the CPU usage over the last period or a little more. Without a
// sample it is the average since the start, and so it is for a thing that did
// nothing: clients take 0 for "not known" (contract 13.28).
func (e *entry) nanoCores(now sample, started time.Time, period, retention time.Duration) uint64 {
	e.mu.Lock()
	last, prev := e.last, e.prev
	e.mu.Unlock()
	base := last
	if now.at.Sub(last.at) < period && !prev.at.IsZero() {
		base = prev
	}
	// Over a few milliseconds the number would say nothing.
	if d := now.at.Sub(base.at); !base.at.IsZero() && d >= period/10 && d <= retention {
		if n := rate(base, now); n > 0 {
			return n
		}
	}
	return max(1, rate(sample{at: started}, now))
}

// Run takes samples until ctx ends. What cannot be read now is tried again
// next time.
func (s *Service) Run(ctx context.Context) error {
	var layers sync.WaitGroup
	defer layers.Wait()
	if s.o.Usage != nil {
		layers.Go(func() { s.every(ctx, s.measureLayers) })
	}
	n := 0
	s.every(ctx, func(ctx context.Context) {
		if n++; n%sweepEvery == 0 {
			s.sweep()
		}
		s.sample(ctx)
	})
	return nil
}

// every calls fn now and at each period.
func (s *Service) every(ctx context.Context, fn func(context.Context)) {
	t := time.NewTicker(s.o.Period)
	defer t.Stop()
	for {
		fn(ctx)
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// target is something whose CPU usage is sampled.
type target struct {
	*entry
	total func() (sample, error)
}

// sample looks at what is due.
func (s *Service) sample(ctx context.Context) {
	now := time.Now()
	var due []target
	add := func(id string, total func(e *entry) (sample, error)) {
		e := s.entry(id)
		e.mu.Lock()
		ready := !now.Before(e.due)
		e.mu.Unlock()
		if ready {
			due = append(due, target{e, func() (sample, error) { return total(e) }})
		}
	}
	for _, c := range s.o.Containers.List() {
		if isRunning(c.Status()) {
			add(c.ID(), func(e *entry) (sample, error) { _, now, err := s.ofContainer(e, c); return now, err })
		}
	}
	for _, p := range s.ready() {
		if p.Meta().Config.GetLinux().GetCgroupParent() != "" {
			add(p.ID(), func(e *entry) (sample, error) { _, now, err := s.ofPod(e, p); return now, err })
		}
	}
	_, _ = gather(ctx, 1, patience, due, target.flag, func(t target) *struct{} {
		if now, err := t.total(); err == nil {
			t.record(now, s.o.Period, s.o.Retention)
		}
		return nil
	})
}

// sweep forgets what is gone.
func (s *Service) sweep() {
	known := map[string]bool{}
	for _, c := range s.o.Containers.List() {
		known[c.ID()] = true
	}
	for _, p := range s.o.Pods.List() {
		known[p.ID()] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.entries {
		if !known[id] {
			delete(s.entries, id)
		}
	}
}

// measured is a layer that is due.
type measured struct {
	*entry
	c *cristate.Container
}

func (m measured) flag() *atomic.Int32 { return &m.layerLate }

// measureLayers measures the writable layers that are due, two at a time.
func (s *Service) measureLayers(ctx context.Context) {
	now := time.Now()
	var due []measured
	for _, c := range s.o.Containers.List() {
		if c.Facts().SnapshotKey == "" {
			continue
		}
		e := s.entry(c.ID())
		e.mu.Lock()
		ready := !now.Before(e.layerDue)
		e.mu.Unlock()
		if ready {
			due = append(due, measured{e, c})
		}
	}
	_, _ = gather(ctx, 2, 2*patience, due, measured.flag, func(m measured) *struct{} {
		f := m.c.Facts()
		limited, cancel := context.WithTimeout(ctx, layerLimit)
		defer cancel()
		begin := time.Now()
		u, err := s.o.Usage(limited, f.Snapshotter, f.SnapshotKey)
		end := time.Now()
		// One that is new changes most: it is looked at sooner.
		age := end.Sub(time.Unix(0, m.c.Status().CreatedAt))
		wait := max(s.o.Period, min(s.o.LayerPeriod, age), min(maxLayerWait, layerShare*end.Sub(begin)))
		if m.c.Status().FinishedAt != 0 { // one that was only created is about to write
			wait = max(wait, maxSkip*s.o.LayerPeriod)
		}
		bad := err != nil && ctx.Err() == nil && !errdefs.IsNotFound(err)
		m.mu.Lock()
		news := bad && !m.layerBad
		m.layerDue, m.layerBad = end.Add(wait), bad
		if err == nil {
			m.layer = layer{u, end}
		}
		m.mu.Unlock()
		if news {
			s.o.Log.Warn("writable layer is not measured", "container", m.c.ID(), "snapshotter", f.Snapshotter, "error", err)
		}
		return nil
	})
}
