package transfer

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
)

// Labels of the leases of transfers. A lease of another life of the daemon
// belongs to a transfer that was interrupted by its end.
const (
	// labelLife is different each time the daemon starts.
	labelLife = "io.gantry.transfer.life"
	// labelSource is what is pulled. The next pull of the same finds what has
	// been downloaded, and then nobody needs the lease any more.
	labelSource = "io.gantry.transfer.source"
	maxSource   = 1024 // bytes of it that count
)

// Keep is how long after the start of the daemon what interrupted pulls have
// downloaded waits for the next pull of the same.
const Keep = 15 * time.Minute

func newLife() string { return rand.Text() }

func leaseLabels(life, source string) map[string]string {
	l := map[string]string{labelLife: life, lease.LabelExpire: time.Now().Add(LeaseTime).UTC().Format(time.RFC3339)}
	if source != "" {
		l[labelSource] = source[:min(len(source), maxSource)]
	}
	return l
}

// Run ends the leases of transfers that an earlier life of the daemon did not
// live to end: those of pulls after Keep, all others at once. It returns when
// that is done, or ctx is. It may run beside transfers.
func (s *Service) Run(ctx context.Context, namespaces namespace.Store) error {
	pass := func(pulls bool) {
		all, err := namespaces.List(ctx)
		if err != nil {
			s.d.Log.Warn("leases of interrupted transfers are left to expire", "err", err)
			return
		}
		for _, ns := range all {
			rec, err := s.d.Records.In(ns.ID, "")
			if err == nil {
				err = s.release(ctx, rec, func(source string) bool { return pulls || source == "" })
			}
			if err != nil && ctx.Err() == nil {
				s.d.Log.Warn("leases of interrupted transfers are left to expire", "namespace", ns.ID, "err", err)
			}
		}
	}
	pass(false)
	timer := time.NewTimer(Keep)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
		pass(true)
	}
	return nil
}

// release ends the leases of a namespace's interrupted transfers from certain
// sources.
func (s *Service) release(ctx context.Context, rec view.Records, from func(source string) bool) error {
	all, err := rec.Leases().List(ctx, `labels."`+labelLife+`"`)
	if err != nil {
		return fmt.Errorf("look for interrupted transfers: %w", err)
	}
	for _, l := range all {
		if l.Labels[labelLife] == s.life || !from(l.Labels[labelSource]) {
			continue
		}
		if err := rec.Leases().Delete(ctx, l.ID, false); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("end lease %s of an interrupted transfer: %w", l.ID, err)
		}
	}
	return nil
}
