package cni

import (
	"math"
	"sync/atomic"
	"time"
)

// bounds are the buckets' upper ones in seconds, those that Prometheus' clients use.
var bounds = [...]float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// The kinds of calls.
const (
	opSetup = iota
	opTeardown
	opStatus
	opCount
)

type counter struct {
	total, errors atomic.Uint64
	nanos         atomic.Int64
	buckets       [len(bounds)]atomic.Uint64 // not cumulative
}

func (c *counter) done(start time.Time, err error) {
	d := time.Since(start)
	c.total.Add(1)
	c.nanos.Add(int64(d))
	if err != nil {
		c.errors.Add(1)
	}
	for i, b := range bounds {
		if d.Seconds() <= b {
			c.buckets[i].Add(1)
			return
		}
	}
}

// Ops returns the counters; it never waits.
func (n *Network) Ops() []Op {
	names := [opCount]string{"set_up_pod", "tear_down_pod", "get_pod_network_status"}
	ops := make([]Op, opCount)
	for i := range ops {
		c := &n.counters[i]
		op := Op{Type: names[i], Total: c.total.Load(), Errors: c.errors.Load(), Seconds: time.Duration(c.nanos.Load()).Seconds(), Buckets: map[float64]uint64{}}
		var below uint64
		for j, b := range bounds {
			below += c.buckets[j].Load()
			op.Buckets[b] = below
		}
		op.Total = max(op.Total, below) // one was counted meanwhile
		ops[i] = op
	}
	return ops
}

// after is the pause after a number of failures.
func after(first time.Duration, tries int) time.Duration {
	return time.Duration(math.Min(float64(first)*math.Pow(2, float64(min(tries, 30))), float64(time.Minute)))
}
