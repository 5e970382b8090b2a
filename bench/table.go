package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"
)

// row is one line of the table: what is measured and in which unit. Less is
// better in every row.
type row struct{ name, unit string }

// sample is what one round of one daemon gave for a row. CPU is that of the
// daemon and all its children per operation, negative where it was not measured.
type sample struct {
	value float64
	cpu   time.Duration
}

// result is a row with the samples of both daemons; the same index is the same
// round, and the two of a round ran one right after the other.
type result struct {
	row
	key                string
	containerd, gantry []sample
}

// median of at least one value.
func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

func values(s []sample) (v []float64) {
	for _, x := range s {
		v = append(v, x.value)
	}
	return v
}

// ratios are gantry's values over containerd's, round by round: what slows the
// whole machine for a while slows both of a round.
func (r result) ratios() (v []float64) {
	for i := range min(len(r.containerd), len(r.gantry)) {
		v = append(v, r.gantry[i].value/r.containerd[i].value)
	}
	return v
}

// slower tells whether gantry lost beyond the noise: in the median and in
// more than half of the rounds by more than a tenth.
func (r result) slower() bool {
	v := r.ratios()
	lost := 0
	for _, x := range v {
		if x > 1.1 {
			lost++
		}
	}
	return median(v) > 1.1 && 2*lost > len(v)
}

// number prints three significant digits.
func number(x float64) string {
	switch {
	case math.IsNaN(x):
		return "-"
	case x >= 100:
		return fmt.Sprintf("%.0f", x)
	case x >= 10:
		return fmt.Sprintf("%.1f", x)
	default:
		return fmt.Sprintf("%.2f", x)
	}
}

// spread is "median (min..max)".
func spread(v []float64) string {
	if len(v) == 0 {
		return "-"
	}
	return fmt.Sprintf("%s (%s..%s)", number(median(v)), number(slices.Min(v)), number(slices.Max(v)))
}

// cpu is the median CPU time in milliseconds, "-" if it was not measured.
func cpu(s []sample) string {
	var v []float64
	for _, x := range s {
		if x.cpu >= 0 {
			v = append(v, x.cpu.Seconds()*1000)
		}
	}
	return number(median(v))
}

// table writes the results as a table that is both readable in a terminal and
// Markdown.
func table(w io.Writer, results []result) error {
	lines := [][]string{{"work", "unit", "containerd", "gantry", "ratio", "CPU ms: containerd", "gantry", "`-only`"}}
	for _, r := range results {
		lines = append(lines, []string{r.name, r.unit, spread(values(r.containerd)), spread(values(r.gantry)), spread(r.ratios()), cpu(r.containerd), cpu(r.gantry), r.key})
	}
	width := make([]int, len(lines[0]))
	for _, l := range lines {
		for i, c := range l {
			width[i] = max(width[i], len([]rune(c)))
		}
	}
	var b strings.Builder
	for n, l := range lines {
		for i, c := range l {
			b.WriteString("| " + c + strings.Repeat(" ", width[i]-len([]rune(c))+1))
		}
		b.WriteString("|\n")
		if n == 0 {
			for _, w := range width {
				b.WriteString("|" + strings.Repeat("-", w+2))
			}
			b.WriteString("|\n")
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
