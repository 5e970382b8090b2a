package criimage

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
)

// Sum is the disk space of a snapshotter's snapshots, or of one of them.
type Sum struct {
	snapshot.Usage
	At time.Time // when it was measured
}

// sampler measures snapshots again and again, each snapshotter by itself: one
// that hangs keeps its last numbers and disturbs no other.
type sampler struct {
	view view.Records
	log  *slog.Logger

	mu   sync.Mutex
	each map[string]map[string]Sum // by snapshotter and key
	all  map[string]Sum            // by snapshotter
}

func newSampler(v view.Records, log *slog.Logger) *sampler {
	return &sampler{view: v, log: log, each: map[string]map[string]Sum{}, all: map[string]Sum{}}
}

// run measures one snapshotter every period until ctx ends.
func (p *sampler) run(ctx context.Context, name string, period time.Duration) {
	tick := time.NewTicker(period)
	defer tick.Stop()
	said := ""
	for {
		err := p.measure(ctx, name)
		if ctx.Err() != nil {
			return
		}
		if text := errorText(err); text != said {
			said = text
			if err != nil {
				p.log.Warn("disk usage of snapshots is not up to date", "snapshotter", name, "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// measure walks the snapshots once. Committed ones never change and are
// measured once only.
func (p *sampler) measure(ctx context.Context, name string) error {
	store, err := p.view.Snapshots(name)
	if err != nil {
		return err
	}
	p.mu.Lock()
	old := p.each[name]
	p.mu.Unlock()
	now := map[string]Sum{}
	var infos []snapshot.Info
	if err := store.Walk(ctx, func(i snapshot.Info) error { infos = append(infos, i); return nil }); err != nil {
		return err
	}
	total := Sum{At: time.Now()}
	for _, i := range infos {
		u, ok := old[i.Name]
		if !ok || i.Kind != snapshot.KindCommitted {
			got, err := store.Usage(ctx, i.Name)
			if errdefs.IsNotFound(err) {
				continue
			}
			if err != nil {
				return err
			}
			u = Sum{got, time.Now()}
		}
		now[i.Name] = u
		total.Size += u.Size
		total.Inodes += u.Inodes
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.each[name], p.all[name] = now, total
	return nil
}

func (p *sampler) sums() map[string]Sum {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make(map[string]Sum, len(p.all)+1)
	for k, v := range p.all {
		all[k] = v
	}
	return all
}

// SnapshotUsage is the last measurement of one snapshot; false if there is none yet.
func (s *Service) SnapshotUsage(snapshotter, key string) (Sum, bool) {
	s.usage.mu.Lock()
	defer s.usage.mu.Unlock()
	u, ok := s.usage.each[snapshotter][key]
	return u, ok
}
