package gc

import (
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
)

// SyncDelete returns src, in whose views deletions of images and leases that
// ask for it wait for c.
func SyncDelete(src view.RecordSource, c *Collector) view.RecordSource { return syncSource{src, c} }

type syncSource struct {
	src view.RecordSource
	c   *Collector
}

func (s syncSource) In(ns namespace.ID, under lease.ID) (view.Records, error) {
	r, err := s.src.In(ns, under)
	if err != nil {
		return nil, err
	}
	return syncRecords{r, s.c}, nil
}

type syncRecords struct {
	view.Records
	c *Collector
}

func (r syncRecords) Images() image.Store { return SyncDeleteImages(r.Records.Images(), r.c) }
func (r syncRecords) Leases() lease.Store { return SyncDeleteLeases(r.Records.Leases(), r.c) }
