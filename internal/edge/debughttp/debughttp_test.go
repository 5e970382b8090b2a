package debughttp

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gantryd/gantry/internal/service/canary"
)

// promise: P34
func TestReadyz(t *testing.T) {
	parts := []canary.Result{{Name: "store"}, {Name: "network"}}
	results := func() []canary.Result { return parts }
	registry := prometheus.NewRegistry()
	registry.MustRegister(Readiness(results))
	h := Handler(results, registry)
	get := func(path, accept string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		r.Header.Set("Accept", accept)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	if w := get("/readyz", ""); w.Code != 200 || w.Body.String() != "store: ok\nnetwork: ok\n" {
		t.Errorf("%d %q", w.Code, w.Body)
	}
	parts[1].Error = "no plugin"
	if w := get("/readyz", ""); w.Code != 503 || w.Body.String() != "store: ok\nnetwork: no plugin\n" {
		t.Errorf("%d %q", w.Code, w.Body)
	}
	var got []canary.Result
	if w := get("/readyz", "application/json"); w.Code != 503 || json.Unmarshal(w.Body.Bytes(), &got) != nil || got[1].Error != "no plugin" {
		t.Errorf("%d %q", w.Code, w.Body)
	}
	if w := get("/v1/metrics", ""); w.Code != 200 || !strings.Contains(w.Body.String(), "gantry_ready{part=\"network\"} 0\n") || !strings.Contains(w.Body.String(), "gantry_ready{part=\"store\"} 1\n") {
		t.Errorf("%d %q", w.Code, w.Body)
	}
	if w := get("/", ""); w.Code != 404 {
		t.Errorf("%d", w.Code)
	}
}
