package nri

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// metrics are those of plugins (contract 9.1.7, promise P41).
type metrics struct {
	calls, adjustments *prometheus.CounterVec
	latency            *prometheus.HistogramVec
}

func newMetrics(h *Host) metrics {
	made := promauto.With(h.Deps.Metrics)
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return made.NewCounterVec(prometheus.CounterOpts{Namespace: "containerd", Subsystem: "nri", Name: name + "_total", Help: help}, append([]string{"plugin", "operation"}, labels...))
	}
	made.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "containerd", Subsystem: "nri", Name: "active_plugins_total", Help: "plugins that take part"},
		func() float64 { return float64(len(h.plugins())) })
	return metrics{counter("plugin_invocations", "what plugins were asked, and how that ended", "status", "error"), counter("plugin_adjustments", "what plugins changed", "type"),
		made.NewHistogramVec(prometheus.HistogramOpts{Namespace: "containerd", Subsystem: "nri", Name: "plugin_latency_seconds", Help: "how long plugins took to answer"}, []string{"plugin", "operation"})}
}

// maxSeen bounds the metrics: names of plugins are their own choice.
const maxSeen = 256

func (h *Host) label(p *plug) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.seen[p.name()] && len(h.seen) >= maxSeen {
		return "other"
	}
	h.seen[p.name()] = true
	return p.name()
}

// called counts a call that took so long.
func (h *Host) called(p *plug, op string, took time.Duration, err error) {
	name, outcome, kind := h.label(p), "error", "other"
	var none noAnswer
	switch {
	case err == nil:
		outcome, kind = "success", ""
	case errors.Is(err, context.Canceled):
		kind = "canceled"
	case errors.As(err, &none) && !none.late:
		kind = "unavailable"
	case none.late, errors.Is(err, context.DeadlineExceeded):
		kind = "deadline_exceeded"
	}
	h.metrics.calls.WithLabelValues(name, op, outcome, kind).Inc()
	h.metrics.latency.WithLabelValues(name, op).Observe(took.Seconds())
}

// adjusted counts what a plugin wants.
func (h *Host) adjusted(p *plug, s subject, a *api.ContainerAdjustment, updates, evictions int) {
	l := a.GetLinux()
	name := h.label(p)
	for kind, n := range map[string]int{"update": updates, "evict": evictions, "annotations": len(a.GetAnnotations()), "mounts": len(a.GetMounts()), "env": len(a.GetEnv()),
		"args": len(a.GetArgs()), "rlimits": len(a.GetRlimits()), "cdi_devices": len(a.GetCDIDevices()),
		"devices": len(l.GetDevices()), "namespaces": len(l.GetNamespaces()), "sysctl": len(l.GetSysctl()), "net_devices": len(l.GetNetDevices())} {
		if n > 0 {
			h.metrics.adjustments.WithLabelValues(name, s.String(), kind).Add(float64(n))
		}
	}
	for kind, set := range map[string]bool{"hooks": a.GetHooks() != nil, "resources": l.GetResources() != nil, "cgroups_path": l.GetCgroupsPath() != "", "oom_score_adj": l.GetOomScoreAdj() != nil,
		"io_priority": l.GetIoPriority() != nil, "seccomp_policy": l.GetSeccompPolicy() != nil, "scheduler": l.GetScheduler() != nil, "rdt": l.GetRdt() != nil, "memory_policy": l.GetMemoryPolicy() != nil} {
		if set {
			h.metrics.adjustments.WithLabelValues(name, s.String(), kind).Inc()
		}
	}
}
