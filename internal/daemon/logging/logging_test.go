package logging

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

type stringer struct{ s string }

func (s *stringer) String() string { return s.s } // panics on nil

// contract: 9.3.2
func TestText(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(New(&b, Options{Level: LevelTrace}))
	at := time.Date(2026, 11, 21, 22, 58, 1, 5000, time.UTC)
	for _, tc := range []struct {
		level slog.Level
		msg   string
		args  []any
		want  string
	}{
		{slog.LevelInfo, "started", nil, `level=info msg=started`},
		{slog.LevelInfo, "containerd successfully booted in 0.1s", []any{"pid", 7, "a", "x y"}, `level=info msg="containerd successfully booted in 0.1s" a="x y" pid=7`},
		{slog.LevelWarn, "w", []any{"error", errors.New(`open "x": no`)}, `level=warning msg=w error="open \"x\": no"`},
		{slog.LevelError, "line\nbreak", []any{"k", "a=b", "d", time.Second, "n", nil}, `level=error msg="line\nbreak" d=1s k="a=b" n="<nil>"`},
		{slog.LevelDebug, "g", []any{slog.Group("io", "uid", 1, slog.Group("x", "y", true))}, `level=debug msg=g io.uid=1 io.x.y=true`},
		{LevelTrace, "", []any{"msg", "other", "path", "/a/b-c_d@e", "empty", ""}, `level=trace msg= empty= fields.msg=other path=/a/b-c_d@e`},
		{LevelFatal, "f", []any{"ns", "k8s.io", "ns", "last"}, `level=fatal msg=f ns=last`},
		{LevelPanic, "p", []any{"s", (*stringer)(nil), "b", []byte("raw")}, `level=panic msg=p b=raw s=`},
		{slog.LevelInfo, "forged\ntime=\"x\" level=info", []any{"bad key=", 1}, `level=info msg="forged\ntime=\"x\" level=info" "bad key="=1`},
	} {
		b.Reset()
		r := slog.NewRecord(at, tc.level, tc.msg, 0)
		r.Add(tc.args...)
		if err := log.Handler().Handle(context.Background(), r); err != nil {
			t.Fatal(err)
		}
		want := `time="2026-11-21T22:58:01.000005000Z" ` + tc.want
		if got := strings.TrimSuffix(b.String(), "\n"); got != want && !strings.HasPrefix(got, want+`"!panic`) {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		if strings.Count(b.String(), "\n") != 1 {
			t.Errorf("%q is not one line", b.String())
		}
	}
}

// contract: 9.3.2
func TestJSON(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(New(&b, Options{JSON: true, FromContext: func(context.Context) []slog.Attr {
		return []slog.Attr{slog.String("trace_id", "abc")}
	}}))
	log.With("namespace", "default").WithGroup("g").Info("hello <b>", "error", errors.New("boom"), "n", 3, "d", time.Second, "bad", func() {})
	var m map[string]any
	if err := json.Unmarshal(b.Bytes(), &m); err != nil {
		t.Fatalf("%v in %s", err, b.String())
	}
	for k, want := range map[string]any{"level": "info", "msg": "hello <b>", "namespace": "default", "g.error": "boom", "g.d": "1s", "trace_id": "abc"} {
		if m[k] != want {
			t.Errorf("%s is %v, want %v", k, m[k], want)
		}
	}
	if s, _ := m["time"].(string); !regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(Z|[+-]\d\d:\d\d)$`).MatchString(s) {
		t.Errorf("time %q", s)
	}
}

// contract: 2.3.6
func TestLevels(t *testing.T) {
	names := []string{"trace", "debug", "info", "warn", "error", "fatal", "panic"}
	last := slog.Level(-100)
	for _, n := range names {
		l, err := ParseLevel(strings.ToUpper(n))
		if err != nil || l <= last {
			t.Errorf("%s is %d (%v), want more than %d", n, l, err, last)
		}
		last = l
		if got := levelName(l); got != n && n+"ing" != got {
			t.Errorf("%s prints as %s", n, got)
		}
	}
	if _, err := ParseLevel("loud"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("loud: %v", err)
	}
	var lv slog.LevelVar
	lv.Set(slog.LevelError)
	h := New(&bytes.Buffer{}, Options{Level: &lv})
	if h.Enabled(context.Background(), slog.LevelWarn) {
		t.Error("warnings pass level error")
	}
	lv.Set(LevelTrace)
	if !h.Enabled(context.Background(), LevelTrace) {
		t.Error("the level cannot be changed")
	}
}

// Lines of many goroutines do not mix, and a derived logger shares the writer.
func TestConcurrent(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(New(&b, Options{}))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			l := log.With("i", i)
			for range 50 {
				l.Info("x")
			}
		})
	}
	wg.Wait()
	line := regexp.MustCompile(`^time="[^"]+" level=info msg=x i=\d$`)
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if len(lines) != 400 {
		t.Errorf("%d lines", len(lines))
	}
	for _, l := range lines {
		if !line.MatchString(l) {
			t.Fatalf("line %q", l)
		}
	}
}
