// Package debughttp answers what operators ask a daemon over HTTP: whether it
// is ready, and if not, which part fails, and its metrics. It shows no secret
// and changes nothing.
package debughttp

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/gantryd/gantry/internal/service/canary"
)

// Handler serves /v1/metrics (contract 9.1) and /readyz (promise P34): 200 if
// every part works, else 503; a line each part, or JSON if the request accepts it.
func Handler(results func() []canary.Result, metrics prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /v1/metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		all := results()
		code := http.StatusOK
		for _, part := range all {
			if part.Error != "" {
				code = http.StatusServiceUnavailable
			}
		}
		if r.Header.Get("Accept") == "application/json" {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			_ = json.NewEncoder(w).Encode(all)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(code)
		for _, part := range all {
			text := part.Name + ": ok\n"
			if part.Error != "" {
				text = part.Name + ": " + part.Error + "\n"
			}
			_, _ = w.Write([]byte(text))
		}
	})
	return mux
}

// Readiness tells the parts as metrics: gantry_ready of a part is 1 if it works.
type Readiness func() []canary.Result

// Describe implements prometheus.Collector.
func (r Readiness) Describe(to chan<- *prometheus.Desc) { to <- r.desc() }

func (Readiness) desc() *prometheus.Desc {
	return prometheus.NewDesc("gantry_ready", "whether a part of the daemon works", []string{"part"}, nil)
}

// Collect implements prometheus.Collector.
func (r Readiness) Collect(to chan<- prometheus.Metric) {
	for _, part := range r() {
		works := 0.0
		if part.Error == "" {
			works = 1
		}
		to <- prometheus.MustNewConstMetric(r.desc(), prometheus.GaugeValue, works, part.Name)
	}
}
