// Package canary does, again and again, a little of what every container needs
// and says which part fails, so that readiness is what was seen to work and not
// what ought to.
package canary

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// Check is one part. Run ends when its context does; one that does not is left
// alone and not started again before it ends.
type Check struct {
	Name string
	Run  func(context.Context) error
}

// Result is the last word on one part.
type Result struct {
	Name string `json:"name"`
	// Error is "" if it works, else one line.
	Error string        `json:"error,omitempty"`
	Since time.Time     `json:"since"` // of this state
	Took  time.Duration `json:"took"`  // nanoseconds

	known bool // it was checked
}

// Canary runs checks. It is safe for concurrent use.
type Canary struct {
	period, limit time.Duration
	log           *slog.Logger

	mu    sync.Mutex
	parts []part
}

type part struct {
	Check
	Result
	began time.Time // zero if it does not run
}

// New makes a Canary that runs all checks every period; none may take longer
// than limit. Zero is ten seconds for the one and five for the other (promise P34).
func New(checks []Check, period, limit time.Duration, log *slog.Logger) *Canary {
	if period <= 0 {
		period = 10 * time.Second
	}
	if limit <= 0 {
		limit = 5 * time.Second
	}
	c := &Canary{period: period, limit: limit, log: log}
	for _, check := range checks {
		c.Add(check)
	}
	return c
}

// Add adds a check; it is called before Run.
func (c *Canary) Add(check Check) {
	c.parts = append(c.parts, part{Check: check, Result: Result{Name: check.Name, Since: time.Now()}})
}

// Run checks until ctx is done, and leaves nothing running that heeds its context.
func (c *Canary) Run(ctx context.Context) error {
	tick := time.NewTicker(c.period)
	defer tick.Stop()
	var wg sync.WaitGroup
	for {
		for i := range c.parts {
			c.mu.Lock()
			free := c.parts[i].began.IsZero()
			if free {
				c.parts[i].began = time.Now()
			}
			c.mu.Unlock()
			if free {
				wg.Go(func() { c.check(ctx, i) })
			}
		}
		select {
		case <-ctx.Done():
			done := make(chan struct{})
			go func() { wg.Wait(); close(done) }()
			select {
			case <-done:
			case <-time.After(c.limit):
			}
			return nil
		case <-tick.C:
		}
	}
}

func (c *Canary) check(ctx context.Context, i int) {
	own, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	began := time.Now()
	err := c.parts[i].Check.Run(own)
	if ctx.Err() != nil {
		return // the daemon stops
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := &c.parts[i]
	text := ""
	if err != nil {
		text = strings.ReplaceAll(err.Error(), "\n", "; ") // of errors that were joined
	}
	if (text == "") != (p.Error == "") {
		p.Since = time.Now()
		if err != nil {
			c.log.Error("readiness lost", "part", p.Check.Name, "error", err)
		} else {
			c.log.Info("readiness regained", "part", p.Check.Name)
		}
	}
	p.Error, p.Took, p.began, p.known = text, time.Since(began), time.Time{}, true
}

// Results are the last words on all parts. A part that has not come back after
// its limit has failed, and one that was never checked is not known to work.
func (c *Canary) Results() []Result {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Result, len(c.parts))
	for i, p := range c.parts {
		out[i] = p.Result
		if over := time.Since(p.began); !p.began.IsZero() && over > c.limit+c.limit/2 {
			out[i].Since, out[i].Took = p.began, over
			out[i].Error, out[i].known = fmt.Sprintf("no answer for %s", over.Round(time.Second)), true
		} else if !p.known {
			out[i].Error = "not checked yet"
		}
	}
	return out
}

// Err names the parts that fail, but for some, nil if there are none. What was
// never checked does not count.
func (c *Canary) Err(but ...string) error {
	var failed []string
	for _, r := range c.Results() {
		if r.known && r.Error != "" && !slices.Contains(but, r.Name) {
			failed = append(failed, r.Name+": "+r.Error)
		}
	}
	if failed == nil {
		return nil
	}
	return errors.New(strings.Join(failed, "; "))
}
