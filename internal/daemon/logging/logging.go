// Package logging writes log/slog records in the shapes that containerd's
// logs have, which is what tools that read them expect: a text line
// `time="..." level=info msg="..." key=val`, or one JSON object a line
// (contract 9.3.2). A record is one Write, whatever goroutine it comes from.
package logging

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// The levels of containerd that slog has no name for (contract 2.3.6).
const (
	LevelTrace = slog.Level(-8)
	LevelFatal = slog.Level(12)
	LevelPanic = slog.Level(16)
)

// timeFormat is RFC 3339 with all nine digits, so that lines align.
const timeFormat = "2006-01-02T15:04:05.000000000Z07:00"

// ParseLevel reads trace, debug, info, warn, warning, error, fatal or panic in
// any case; "" is info. Anything else is ErrInvalidArgument.
func ParseLevel(s string) (slog.Level, error) {
	switch strings.ToLower(s) {
	case "trace":
		return LevelTrace, nil
	case "debug":
		return slog.LevelDebug, nil
	case "", "info":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	case "fatal":
		return LevelFatal, nil
	case "panic":
		return LevelPanic, nil
	}
	return 0, fmt.Errorf("log level %q: want trace, debug, info, warn, error, fatal or panic: %w", s, errdefs.ErrInvalidArgument)
}

// levelName is the word in the line.
func levelName(l slog.Level) string {
	switch {
	case l < slog.LevelDebug:
		return "trace"
	case l < slog.LevelInfo:
		return "debug"
	case l < slog.LevelWarn:
		return "info"
	case l < slog.LevelError:
		return "warning"
	case l < LevelFatal:
		return "error"
	case l < LevelPanic:
		return "fatal"
	}
	return "panic"
}

// Options say how a Handler writes.
type Options struct {
	// Level is the least level that is written, nil is info. A *slog.LevelVar
	// can be changed while the daemon runs.
	Level slog.Leveler
	// JSON writes objects instead of text.
	JSON bool
	// FromContext, if set, adds what the context of a record knows, such as
	// the trace id (contract 2.3.6 log_trace_id).
	FromContext func(context.Context) []slog.Attr
}

// Handler is a slog.Handler. It is safe for concurrent use.
type Handler struct {
	out    *output
	opt    Options
	prefix string  // of open groups, "a.b."
	fields []field // of WithAttrs
}

type output struct {
	mu sync.Mutex // one line at a time
	w  io.Writer
}

type field struct {
	key   string
	value any
}

// New makes a handler that writes to w.
func New(w io.Writer, opt Options) *Handler {
	if opt.Level == nil {
		opt.Level = slog.LevelInfo
	}
	return &Handler{out: &output{w: w}, opt: opt}
}

// Enabled implements slog.Handler.
func (h *Handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.opt.Level.Level() }

// WithAttrs implements slog.Handler.
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.fields = append([]field(nil), h.fields...)
	for _, a := range attrs {
		c.fields = appendAttr(c.fields, h.prefix, a)
	}
	return &c
}

// WithGroup implements slog.Handler: a group is a dotted prefix.
func (h *Handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.prefix += name + "."
	return &c
}

// Handle implements slog.Handler.
func (h *Handler) Handle(ctx context.Context, r slog.Record) error {
	fields := append([]field(nil), h.fields...)
	if h.opt.FromContext != nil && ctx != nil {
		for _, a := range h.opt.FromContext(ctx) {
			fields = appendAttr(fields, "", a)
		}
	}
	r.Attrs(func(a slog.Attr) bool {
		fields = appendAttr(fields, h.prefix, a)
		return true
	})
	// The last value of a key counts, and keys are sorted.
	sort.SliceStable(fields, func(i, j int) bool { return fields[i].key < fields[j].key })
	kept := fields[:0]
	for i, f := range fields {
		if i+1 < len(fields) && fields[i+1].key == f.key {
			continue
		}
		kept = append(kept, f)
	}
	at := r.Time
	if at.IsZero() {
		at = time.Now()
	}
	var b bytes.Buffer
	if h.opt.JSON {
		writeJSON(&b, at, r, kept)
	} else {
		writeText(&b, at, r, kept)
	}
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	_, err := h.out.w.Write(b.Bytes())
	return err
}

// appendAttr flattens groups. A key that would hide the line's own gets the
// prefix "fields.", as containerd does.
func appendAttr(fields []field, prefix string, a slog.Attr) []field {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, g := range v.Group() {
			fields = appendAttr(fields, prefix, g)
		}
		return fields
	}
	if a.Key == "" {
		return fields
	}
	key := prefix + a.Key
	switch key {
	case "time", "level", "msg":
		key = "fields." + key
	}
	return append(fields, field{key, v.Any()})
}

func writeText(b *bytes.Buffer, at time.Time, r slog.Record, fields []field) {
	b.WriteString(`time="`)
	b.WriteString(at.Format(timeFormat))
	b.WriteString(`" level=`)
	b.WriteString(levelName(r.Level))
	b.WriteString(" msg=")
	writeValue(b, r.Message)
	for _, f := range fields {
		b.WriteByte(' ')
		if plain(f.key) {
			b.WriteString(f.key)
		} else {
			b.WriteString(strconv.Quote(f.key))
		}
		b.WriteByte('=')
		writeValue(b, text(f.value))
	}
	b.WriteByte('\n')
}

func text(v any) string {
	switch v := v.(type) {
	case nil:
		return "<nil>"
	case string:
		return v
	case error:
		return safe(v.Error)
	case time.Time:
		return v.Format(timeFormat)
	case []byte:
		return string(v)
	case fmt.Stringer:
		return safe(v.String)
	}
	return fmt.Sprint(v)
}

// safe calls a method that may be nil's: a log line is no reason to crash.
func safe(f func() string) (s string) {
	defer func() {
		if p := recover(); p != nil {
			s = fmt.Sprintf("!panic: %v", p)
		}
	}()
	return f()
}

func writeValue(b *bytes.Buffer, s string) {
	if plain(s) {
		b.WriteString(s)
		return
	}
	b.WriteString(strconv.Quote(s))
}

// plain tells whether a value may stand without quotes.
func plain(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._/@^+", c) >= 0) {
			return false
		}
	}
	return true
}

func writeJSON(b *bytes.Buffer, at time.Time, r slog.Record, fields []field) {
	m := make(map[string]any, len(fields)+3)
	for _, f := range fields {
		m[f.key] = jsonValue(f.value)
	}
	m["time"], m["level"], m["msg"] = at.Format(timeFormat), levelName(r.Level), r.Message
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(m); err != nil { // some value cannot be JSON
		b.Reset()
		for _, f := range fields {
			m[f.key] = text(f.value)
		}
		_ = enc.Encode(m) // strings always can
	}
}

func jsonValue(v any) any {
	switch v := v.(type) {
	case error:
		return safe(v.Error)
	case time.Duration:
		return v.String()
	case time.Time:
		return v.Format(timeFormat)
	case []byte:
		return string(v)
	case json.Marshaler:
		return v
	case fmt.Stringer:
		return safe(v.String)
	}
	return v
}
