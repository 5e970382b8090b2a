package main

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 2, 9}, 3}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median of %v is %v, want %v", c.in, got, c.want)
		}
	}
	if !math.IsNaN(median(nil)) {
		t.Error("the median of nothing is a number")
	}
	in := []float64{2, 1}
	median(in)
	if in[0] != 2 {
		t.Error("median sorted its argument")
	}
}

func samples(v ...float64) (s []sample) {
	for _, x := range v {
		s = append(s, sample{x, -1})
	}
	return s
}

func TestRatios(t *testing.T) {
	// The second round ran while the machine was busy: the ratio does not see it.
	r := result{containerd: samples(10, 100, 10), gantry: samples(5, 50, 5, 7)}
	if got := r.ratios(); len(got) != 3 || median(got) != 0.5 {
		t.Errorf("ratios %v", got)
	}
	for _, c := range []struct {
		gantry []sample
		want   bool
	}{{samples(12, 120, 12), true}, {samples(12, 100, 10), false}, {samples(10.5, 105, 10.5), false}, {samples(5, 900, 5), false}} {
		r.gantry = c.gantry
		if r.slower() != c.want {
			t.Errorf("slower with ratios %v is %v", r.ratios(), !c.want)
		}
	}
}

func TestNumber(t *testing.T) {
	for in, want := range map[float64]string{0.5: "0.50", 9.99: "9.99", 12.34: "12.3", 1234.5: "1234", math.NaN(): "-"} {
		if got := number(in); got != want {
			t.Errorf("number(%v) is %q, want %q", in, got, want)
		}
	}
}

func TestTable(t *testing.T) {
	r := result{row: row{"pull", "ms"}, key: "pull", containerd: []sample{{100, 20 * time.Millisecond}, {200, 40 * time.Millisecond}}, gantry: samples(50, 60)}
	var b strings.Builder
	if err := table(&b, []result{r}); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if len(lines) != 3 {
		t.Fatalf("%d lines:\n%s", len(lines), b.String())
	}
	for _, l := range lines {
		if len(l) != len(lines[0]) || strings.Count(l, "|") != 9 {
			t.Errorf("the columns do not line up:\n%s", b.String())
		}
	}
	for _, want := range []string{"150 (100..200)", "55.0 (50.0..60.0)", "0.40 (0.30..0.50)", " 30.0 ", " - "} {
		if !strings.Contains(lines[2], want) {
			t.Errorf("no %q in %s", want, lines[2])
		}
	}
}

func TestNotesAreKept(t *testing.T) {
	old := "# old\n\n| x |\n\n## Notes\n\nby hand\n"
	if got := notes(old); got != "## Notes\n\nby hand\n" {
		t.Errorf("kept %q", got)
	}
	if got := notes("# nothing\n"); got != "" {
		t.Errorf("kept %q", got)
	}
}

func TestSelection(t *testing.T) {
	if _, err := choose("pull,nonsense"); err == nil {
		t.Error("an unknown name is accepted")
	}
	if w, err := choose("exec,loop"); err != nil || len(w) != 2 {
		t.Errorf("two works: %v, %v", w, err)
	}
	all, err := choose("")
	if err != nil || len(all) != len(works()) {
		t.Errorf("all: %v, %v", all, err)
	}
	seen := map[string]bool{}
	for _, w := range all {
		if seen[w.key] || len(w.rows) == 0 {
			t.Errorf("work %q is there twice or has no rows", w.key)
		}
		seen[w.key] = true
	}
}
