// Package metrics makes the metrics of Kubernetes' part under the names that
// containerd gave them, doubled units included: dashboards know no others
// (contract 9.1.8).
package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Timer makes the histogram containerd_cri_<name>_seconds of the calls that
// succeeded. With a nil registerer nobody sees it.
func Timer(r prometheus.Registerer, name, help string, labels ...string) *prometheus.HistogramVec {
	t := promauto.With(r).NewHistogramVec(prometheus.HistogramOpts{Namespace: "containerd", Subsystem: "cri", Name: name + "_seconds", Help: help}, labels)
	if len(labels) == 0 {
		t.WithLabelValues() // so that it is there before the first call
	}
	return t
}

// Counter makes the counter containerd_cri_<name>_total.
func Counter(r prometheus.Registerer, name, help string, labels ...string) *prometheus.CounterVec {
	return promauto.With(r).NewCounterVec(prometheus.CounterOpts{Namespace: "containerd", Subsystem: "cri", Name: name + "_total", Help: help}, labels)
}
