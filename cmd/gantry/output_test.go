package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gantryd/gantry/core/transfer"
)

// A table fits the terminal, aligned, and loses as little as it can.
func TestWriteTable(t *testing.T) {
	header := []string{"ID", "IMAGE", "COMMAND", "STATUS"}
	rows := [][]string{
		{"web", "registry.example.org:5000/some/long/repository/name:v1.2.3", "/bin/sh -c while true; do sleep 1; done", "running"},
		{"0123456789ab", "docker.io/library/größe:latest", "", "exited (137) 2 minutes ago"},
	}
	for _, c := range []struct {
		width int
		want  string
	}{
		{80, ""},
		{200, `ID            IMAGE                                                       COMMAND                                  STATUS
web           registry.example.org:5000/some/long/repository/name:v1.2.3  /bin/sh -c while true; do sleep 1; done  running
0123456789ab  docker.io/library/größe:latest                                                                       exited (137) 2 minutes ago
`},
	} {
		var b bytes.Buffer
		if err := writeTable(&b, c.width, header, rows); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
		if len(lines) != 3 {
			t.Fatalf("%d lines", len(lines))
		}
		for _, l := range lines {
			if n := len([]rune(l)); n > c.width {
				t.Errorf("width %d: %d cells: %q", c.width, n, l)
			}
		}
		if c.want != "" && b.String() != c.want {
			t.Errorf("width %d:\n%s\nwant:\n%s", c.width, b.String(), c.want)
		}
		// Every column begins where its header does.
		for i, name := range header {
			at := strings.Index(lines[0], name)
			for j, l := range lines[1:] {
				r := []rune(l)
				want := []rune(rows[j][i])
				if len(want) == 0 {
					continue
				}
				if at >= len(r) || r[at] != want[0] || at > 0 && r[at-1] != ' ' {
					t.Errorf("width %d: column %s is not aligned:\n%s", c.width, name, b.String())
				}
			}
		}
		if !strings.Contains(b.String(), "0123456789ab") {
			t.Errorf("width %d: a short column was cut:\n%s", c.width, b.String())
		}
	}
	var b bytes.Buffer
	if err := writeTable(&b, 10, header, rows); err != nil || strings.Contains(b.String(), "\n\n") {
		t.Errorf("a terminal that is too small: %v\n%s", err, b.String())
	}
}

func TestAgoAndSize(t *testing.T) {
	for d, want := range map[time.Duration]string{0: "just now", time.Minute: "1 minute ago", 49 * time.Hour: "2 days ago", 800 * 24 * time.Hour: "2 years ago"} {
		if got := ago(time.Now().Add(-d)); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 5 << 30: "5.0 GiB", 1<<63 - 1: "8192.0 PiB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

// A line of a progress display is never wider than the terminal.
func TestProgressLine(t *testing.T) {
	for _, width := range []int{20, 40, 80, 200} {
		for _, s := range []*step{
			{name: "layer-sha256:0123456789abcdef0123456789abcdef", event: "downloading", at: 5 << 20, total: 10 << 20, began: time.Now().Add(-2 * time.Second)},
			{name: "docker.io/library/alpine:latest", event: "saved", done: true},
			{name: "layer-sha256:0123456789abcdef0123456789abcdef", event: "complete", at: 1 << 40, total: 1 << 40, done: true},
		} {
			if l := s.line(width); len([]rune(l)) > width-1 {
				t.Errorf("width %d: %d cells: %q", width, len([]rune(l)), l)
			}
		}
	}
	s := &step{name: "layer-sha256:0123456789abcdef", event: "downloading", at: 5 << 20, total: 10 << 20, began: time.Now()}
	l := s.line(80)
	bar := l[strings.Index(l, "[")+1 : strings.Index(l, "]")]
	if full := strings.Count(bar, "="); full != len(bar)/2 {
		t.Errorf("half of it is %d of %d: %q", full, len(bar), l)
	}
}

// Without a terminal there is one line for what is complete, and no escapes.
func TestProgressWithoutTerminal(t *testing.T) {
	var b bytes.Buffer
	p := &progress{out: &b, start: time.Now(), index: map[string]*step{}, stop: make(chan struct{}), width: func() int { return 80 }}
	for _, e := range []transfer.Progress{{Event: "Resolving"}, {Event: "downloading", Name: "layer-sha256:0123456789abcdef", Progress: 1, Total: 10},
		{Event: "downloading", Name: "layer-sha256:0123456789abcdef", Progress: 9, Total: 10}, {Event: "complete", Name: "layer-sha256:0123456789abcdef", Progress: 10, Total: 10}} {
		p.update(e)
	}
	p.done(nil, "Pulled x")
	if got := b.String(); got != "Resolving\nlayer 0123456789ab complete 10 B\nPulled x in 0.0 s, 10 B\n" {
		t.Errorf("%q", got)
	}
}

func TestParseSignal(t *testing.T) {
	for s, want := range map[string]uint32{"TERM": 15, "sigkill": 9, "1": 1, "RTMIN+3": 37, "SIGRTMAX-1": 63, "SIGRTMIN": 34} {
		if got, err := parseSignal(s); err != nil || got != want {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "0", "65", "NOPE", "RTMIN+99", "-1"} {
		if n, err := parseSignal(s); err == nil {
			t.Errorf("%q is %d", s, n)
		}
	}
}

func TestParsePsFilters(t *testing.T) {
	statuses, match, err := parsePsFilters([]string{"status=exited", "id=we.b", "label=a=b", "label=c", "image=alpine", `labels."x"==y`})
	if err != nil || !slices.Equal(statuses, []string{"exited"}) ||
		!slices.Equal(match, []string{`id~=|we\.b|,labels."a"=="b",labels."c",image=="docker.io/library/alpine:latest",labels."x"==y`}) {
		t.Errorf("%v, %v, %v", statuses, match, err)
	}
	for _, s := range []string{"status=sleeping", "color=red", "what"} {
		if _, _, err := parsePsFilters([]string{s}); err == nil {
			t.Errorf("%s was taken", s)
		}
	}
}

// logDir writes files of kept output: the newest last.
func logDir(t *testing.T, files ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	for i, body := range files {
		name := path
		if n := len(files) - 1 - i; n > 0 {
			name = fmt.Sprintf("%s.%d", path, n)
		}
		if err := os.WriteFile(name, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

const stamp = "2026-01-02T03:04:05.000000006Z "

// What a container printed is shown to the byte, across rotated files; lines
// of a shim that writes none of ours are shown as they are.
//
// promise: P20
func TestLogReader(t *testing.T) {
	closed := make(chan struct{})
	close(closed)
	for _, c := range []struct {
		name     string
		files    []string
		tail     int
		out, err string
	}{
		{"rotated", []string{stamp + "stdout F one\n", stamp + "stderr F two\n" + stamp + "stdout P thr\n", stamp + "stdout F ee\n" + stamp + "stdout P end"}, -1, "one\nthree\n" + stamp + "stdout P end", "two\n"},
		{"parts", []string{stamp + "stdout P a\n" + stamp + "stderr P x\n" + stamp + "stdout F b\n" + stamp + "stderr P y\n"}, -1, "ab\n", "xy"},
		{"tail", []string{stamp + "stdout F one\n" + stamp + "stdout P tw\n", stamp + "stdout F o\n" + stamp + "stdout F three\n"}, 2, "two\nthree\n", ""},
		{"tail of nothing", []string{""}, 5, "", ""},
		{"plain", []string{"a line\nno newline"}, -1, "a line\nno newline", ""},
		{"long", []string{strings.Repeat("x", 300<<10) + "\n"}, -1, strings.Repeat("x", 300<<10) + "\n", ""},
		{"absent", nil, -1, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			l := &logReader{files: logDir(t, c.files...), out: &out, err: &errs, tail: c.tail}
			if err := l.run(t.Context(), closed); err != nil {
				t.Fatal(err)
			}
			if out.String() != c.out || errs.String() != c.err {
				t.Errorf("out %.100q, err %.100q", out.String(), errs.String())
			}
		})
	}
}

func TestLogReaderStampsAndSince(t *testing.T) {
	closed := make(chan struct{})
	close(closed)
	var out bytes.Buffer
	path := logDir(t, "2025-01-01T00:00:00Z stdout F old\n"+stamp+"stdout P ne\n"+stamp+"stdout F w\n")
	since, err := parseSince("2026-01-01", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	l := &logReader{files: path, out: &out, err: &out, tail: -1, stamps: true, since: since}
	if err := l.run(t.Context(), closed); err != nil {
		t.Fatal(err)
	}
	want, _ := time.Parse(time.RFC3339Nano, strings.TrimSpace(stamp))
	if got := out.String(); got != want.Local().Format("2006-01-02T15:04:05.000000000Z07:00")+" new\n" {
		t.Errorf("%q", got)
	}
}

// Following goes on through any number of rotations, and ends with the task.
//
// promise: P20
func TestLogReaderFollows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	var want strings.Builder
	ended := make(chan struct{})
	written := make(chan error, 1)
	go func() {
		defer close(ended)
		written <- func() error {
			f, err := os.Create(path)
			if err != nil {
				return err
			}
			defer func() { f.Close() }()
			for i := range 3000 {
				if i%200 == 199 { // no file is kept longer than three rotations
					f.Close()
					for n := 2; n >= 0; n-- {
						from := path
						if n > 0 {
							from = fmt.Sprintf("%s.%d", path, n)
						}
						os.Rename(from, fmt.Sprintf("%s.%d", path, n+1))
					}
					if f, err = os.Create(path); err != nil {
						return err
					}
					time.Sleep(60 * time.Millisecond) // a real log does not rotate faster than it is read
				}
				line := fmt.Sprintf("line %d", i)
				want.WriteString(line + "\n")
				if _, err := f.WriteString(stamp + "stdout F " + line + "\n"); err != nil {
					return err
				}
			}
			return nil
		}()
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var out bytes.Buffer
	l := &logReader{files: path, out: &out, err: &out, follow: true, tail: -1}
	if err := l.run(ctx, ended); err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if out.String() != want.String() {
		t.Errorf("%d bytes of %d", out.Len(), want.Len())
	}
}

func TestLegible(t *testing.T) {
	if got := legible("pull x: no such host: unavailable\nunavailable\nunavailable"); got != "pull x: no such host: unavailable" {
		t.Errorf("%q", got)
	}
	if got := legible("a: not found\nb: not found"); got != "a: not found\nb: not found" {
		t.Errorf("%q", got)
	}
}

// What a container answers to what is typed is shown, also when it was kept
// before the reader looked; what was kept before is not.
//
// promise: P20
func TestAttachMissesNothing(t *testing.T) {
	began := time.Now()
	path := filepath.Join(t.TempDir(), "log")
	text := began.Add(-time.Second).Format(time.RFC3339Nano) + " stdout F before\n" + began.Add(time.Millisecond).Format(time.RFC3339Nano) + " stdout F after\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	close(ended)
	var out bytes.Buffer
	l := &logReader{files: path, out: &out, err: &out, follow: true, tail: 0, fresh: began}
	if err := l.run(t.Context(), ended); err != nil {
		t.Fatal(err)
	}
	if out.String() != "after\n" {
		t.Errorf("shown: %q", out.String())
	}
}
