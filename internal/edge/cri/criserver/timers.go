package criserver

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/metrics"
)

// timers are the metrics of calls by name: the first have no labels, the others
// that of the runtime (contract 9.1.8).
type timers map[string]*prometheus.HistogramVec

func newTimers(r prometheus.Registerer, events *cristate.Events) timers {
	promauto.With(r).NewCounterFunc(prometheus.CounterOpts{Namespace: "containerd", Subsystem: "cri", Name: "container_events_dropped_total", Help: "events that some watcher of containers did not get"},
		func() float64 { return float64(events.Dropped()) })
	t := timers{}
	for name, help := range map[string]string{"sandbox_list": "time to list pods", "stream_sandbox_list": "time to stream pods", "container_list": "time to list containers", "stream_container_list": "time to stream containers"} {
		t[name] = metrics.Timer(r, name, help)
	}
	for name, help := range map[string]string{"sandbox_remove": "time to remove a pod", "container_create": "time to make a container", "container_start": "time to start a container",
		"container_stop": "time to stop a container", "container_remove": "time to remove a container", "container_checkpoint": "time to checkpoint a container"} {
		t[name] = metrics.Timer(r, name, help, "runtime")
	}
	return t
}

// done notes a call that succeeded, and returns its error.
func (t timers) done(name string, begin time.Time, err error, runtime ...string) error {
	if err == nil {
		t[name].WithLabelValues(runtime...).Observe(time.Since(begin).Seconds())
	}
	return err
}

// runtimeOf is the type of a pod's runtime, "" if it is not there any more.
func (s *Server) runtimeOf(podID string) string {
	p, err := s.pods.Get(podID)
	if err != nil {
		return ""
	}
	_, rt, _ := s.d.Runtime.Handler(p.Meta().RuntimeHandler)
	return rt.Type
}
