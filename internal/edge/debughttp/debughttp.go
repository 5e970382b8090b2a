// Package debughttp answers what operators ask a daemon over HTTP: whether it
// is ready, and if not, which part fails. It shows no secret and changes nothing.
package debughttp

import (
	"encoding/json"
	"net/http"

	"github.com/gantryd/gantry/internal/service/canary"
)

// Handler serves /readyz (promise P34): 200 if every part works, else 503; a
// line each part, or JSON if the request accepts it.
func Handler(results func() []canary.Result) http.Handler {
	mux := http.NewServeMux()
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
