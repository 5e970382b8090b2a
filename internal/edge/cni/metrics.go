package cni

import (
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gantryd/gantry/internal/edge/metrics"
)

// The kinds of calls.
const (
	opSetup    = "set_up_pod"
	opTeardown = "tear_down_pod"
	opStatus   = "get_pod_network_status"
)

// counters are the metrics of calls by kind (contract 9.1.8).
type counters struct {
	total, errors *prometheus.CounterVec
	took          *prometheus.HistogramVec
}

func newCounters(r prometheus.Registerer) counters {
	const name, kind = "network_plugin_operations_", "operation_type"
	return counters{metrics.Counter(r, name+"total", "calls of network plugins by type", kind), metrics.Counter(r, name+"errors_total", "calls of network plugins that failed, by type", kind),
		metrics.Timer(r, name+"duration_seconds", "what calls of network plugins took, by type", kind)}
}

func (c counters) done(op string, start time.Time, err error) {
	c.total.WithLabelValues(op).Inc()
	c.took.WithLabelValues(op).Observe(time.Since(start).Seconds())
	if err != nil {
		c.errors.WithLabelValues(op).Inc()
	}
}

// after is the pause after a number of failures.
func after(first time.Duration, tries int) time.Duration {
	return time.Duration(math.Min(float64(first)*math.Pow(2, float64(min(tries, 30))), float64(time.Minute)))
}
