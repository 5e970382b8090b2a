package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/gantryd/gantry/core/transfer"
)

// progress shows a transfer: bars that are redrawn on a terminal, a line for
// each step elsewhere, one JSON object a step with -o json.
type progress struct {
	out   io.Writer
	tty   bool
	json  bool
	quiet bool
	width func() int

	mu    sync.Mutex // guards what follows
	start time.Time
	steps []*step
	index map[string]*step
	drawn int // lines on the screen
	stop  chan struct{}
	wg    sync.WaitGroup
}

// step is one thing that is being moved.
type step struct {
	name      string
	event     string
	at, total int64
	began     time.Time
	done      bool
}

// progress makes a display on standard error; done must be called.
func (a *app) progress(quiet bool) *progress {
	p := &progress{out: a.err, tty: term.IsTerminal(int(a.err.Fd())), json: a.format == "json", quiet: quiet,
		width: func() int { return terminalWidth(a.err) }, start: time.Now(), index: map[string]*step{}, stop: make(chan struct{})}
	if p.tty && !p.json && !quiet {
		p.wg.Add(1)
		go p.run()
	}
	return p
}

func terminalWidth(f *os.File) int {
	if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
		return w
	}
	return 80
}

func (p *progress) run() {
	defer p.wg.Done()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			p.mu.Lock()
			p.draw()
			p.mu.Unlock()
		case <-p.stop:
			return
		}
	}
}

// update is the transfer's callback.
func (p *progress) update(e transfer.Progress) {
	if p.quiet {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.json {
		if b, err := json.Marshal(e); err == nil {
			fmt.Fprintf(p.out, "%s\n", b)
		}
		return
	}
	if e.Name == "" {
		if !p.tty {
			fmt.Fprintln(p.out, e.Event)
		}
		return
	}
	s := p.index[e.Name]
	if s == nil {
		s = &step{name: e.Name, began: time.Now()}
		p.index[e.Name] = s
		p.steps = append(p.steps, s)
	}
	changed := s.event != e.Event
	s.event, s.at = e.Event, e.Progress
	if e.Total > 0 {
		s.total = e.Total
	}
	s.done = slices.Contains([]string{"complete", "already exists", "extracted", "saved", "done", "pushed content"}, e.Event)
	if s.done && s.total > 0 {
		s.at = s.total
	}
	if changed && !p.tty && s.done {
		line := shortName(e.Name) + " " + e.Event
		if s.total > 0 {
			line += " " + size(s.total)
		}
		fmt.Fprintln(p.out, line)
	}
}

// draw puts the bars in the place of those drawn before.
func (p *progress) draw() {
	var b strings.Builder
	if p.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", p.drawn)
	}
	width := p.width()
	for _, s := range p.steps {
		b.WriteString("\r\x1b[2K" + s.line(width) + "\n")
	}
	p.drawn = len(p.steps)
	io.WriteString(p.out, b.String())
}

// line is one step, no wider than width.
func (s *step) line(width int) string {
	const nameWidth, eventWidth = 22, 14
	name := fmt.Sprintf("%-*s", nameWidth, cut(shortName(s.name), nameWidth))
	event := fmt.Sprintf("%-*s", eventWidth, cut(s.event, eventWidth))
	tail, rate := "", ""
	if s.total > 0 {
		tail = fmt.Sprintf("%10s / %-10s", size(s.at), size(s.total))
		if took := time.Since(s.began).Seconds(); !s.done && took > 0.5 && s.at > 0 {
			rate = fmt.Sprintf(" %s/s", size(int64(float64(s.at)/took)))
		}
	}
	const least = 8
	bar := width - nameWidth - eventWidth - len(tail) - 6
	if bar-len(rate) >= least {
		tail += rate
		bar -= len(rate)
	}
	if bar < least || s.total == 0 {
		return strings.TrimRight(cut(name+" "+event+" "+tail, width-1), " ")
	}
	filled := int(int64(bar) * min(s.at, s.total) / s.total)
	return strings.TrimRight(fmt.Sprintf("%s %s [%s%s] %s", name, event, strings.Repeat("=", filled), strings.Repeat(" ", bar-filled), tail), " ")
}

// shortName makes "layer-sha256:0123..." legible.
func shortName(name string) string {
	kind, dgst, ok := strings.Cut(name, "-sha256:")
	if !ok || len(dgst) < 12 {
		return name
	}
	return kind + " " + dgst[:12]
}

// done ends the display, with a last line if the transfer succeeded.
func (p *progress) done(err error, what string) {
	close(p.stop)
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.quiet || p.json {
		return
	}
	if p.tty {
		p.draw()
	}
	if err == nil {
		var total int64
		for _, s := range p.steps {
			total += s.total
		}
		fmt.Fprintf(p.out, "%s in %.1f s, %s\n", what, time.Since(p.start).Seconds(), size(total))
	}
}
