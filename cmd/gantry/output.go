package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"
)

// table prints rows under a header, cut to the terminal's width, or v as JSON
// if that was asked for. The header's columns are separated by bars.
func (a *app) table(v any, header string, rows [][]string) error {
	if a.format == "json" {
		return a.json(v)
	}
	return writeTable(a.out, a.width(), strings.Split(header, "|"), rows)
}

// tableOf prints a list, a row for each.
func tableOf[T any](a *app, list []T, header string, row func(T) []string) error {
	var rows [][]string
	for _, o := range list {
		rows = append(rows, row(o))
	}
	return a.table(list, header, rows)
}

// squeeze leaves out the columns named, one after another, until the rest fits
// the terminal.
func (a *app) squeeze(header string, rows [][]string, drop ...string) (string, [][]string) {
	names, width := strings.Split(header, "|"), a.width()
	for _, name := range drop {
		total := 0
		for i, n := range names {
			widest := len([]rune(n))
			for _, r := range rows {
				widest = max(widest, len([]rune(r[i])))
			}
			total += widest + 2
		}
		i := slices.Index(names, name)
		if width == 0 || total-2 <= width || i < 0 {
			break
		}
		names = slices.Delete(names, i, i+1)
		for j := range rows {
			rows[j] = slices.Delete(rows[j], i, i+1)
		}
	}
	return strings.Join(names, "|"), rows
}

// json prints v as a document. No list is "[]", never null.
func (a *app) json(v any) error {
	if r := reflect.ValueOf(v); r.Kind() == reflect.Slice && r.IsNil() {
		v = []struct{}{}
	}
	e := json.NewEncoder(a.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// names prints what a command has done something with: a line each, or a list if
// JSON was asked for.
func (a *app) names(list ...string) error {
	if a.format == "json" {
		return a.json(list)
	}
	for _, n := range list {
		if _, err := fmt.Fprintln(a.out, n); err != nil {
			return err
		}
	}
	return nil
}

// width is the terminal's in cells, 0 if out is none or nothing is to be cut.
func (a *app) width() int {
	if a.wide {
		return 0
	}
	if w, _, err := term.GetSize(int(a.out.Fd())); err == nil {
		return w
	}
	return 0
}

// writeTable aligns columns. If they are together wider than width, the
// widest is cut until they fit; 0 cuts nothing.
func writeTable(w io.Writer, width int, header []string, rows [][]string) error {
	const gap, least = 2, 8
	all := append([][]string{header}, rows...)
	widths := make([]int, len(header))
	for _, row := range all {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	if width > 0 {
		total := gap * (len(widths) - 1)
		for _, n := range widths {
			total += n
		}
		for ; total > width; total-- {
			widest := 0
			for i, n := range widths {
				if n > widths[widest] {
					widest = i
				}
			}
			if widths[widest] <= least {
				break
			}
			widths[widest]--
		}
	}
	var b strings.Builder
	for _, row := range all {
		line := ""
		for i, cell := range row {
			cell = cut(cell, widths[i])
			line += cell + strings.Repeat(" ", widths[i]-len([]rune(cell))+gap)
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// cut shortens s to n cells, with "..." where something is missing.
func cut(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	if n <= 3 {
		return string(r[:n])
	}
	return string(r[:n-3]) + "..."
}

// ago says how long ago t was.
func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	d := time.Since(t)
	day := 24 * time.Hour
	for _, u := range []struct {
		d    time.Duration
		name string
	}{{365 * day, "year"}, {30 * day, "month"}, {7 * day, "week"}, {day, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"}, {time.Second, "second"}} {
		if n := int(d / u.d); n >= 1 {
			if n > 1 {
				u.name += "s"
			}
			return fmt.Sprintf("%d %s ago", n, u.name)
		}
	}
	return "just now"
}

// size says a number of bytes in binary units.
func size(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n), ""
	for _, unit = range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		if f /= 1024; f < 1024 {
			break
		}
	}
	return fmt.Sprintf("%.1f %s", f, unit)
}

// program is the path of this executable.
func program() (string, error) {
	p, err := os.Executable()
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(p)
}

// marshalLine is JSON on one line.
func marshalLine(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	return append(b, '\n'), err
}
