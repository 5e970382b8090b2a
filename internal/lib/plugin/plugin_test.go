package plugin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

type config struct {
	Path string `toml:"path"`
	N    int    `toml:"n"`
}

type store struct {
	cfg   config
	name  string
	log   *[]string
	hang  chan struct{}
	close error
}

func (s *store) Close() error {
	if s.hang != nil {
		<-s.hang
	}
	*s.log = append(*s.log, "close "+s.name)
	return s.close
}

type decoder map[string]func(into any) error

func (d decoder) Decode(uri string, into any) error {
	if f := d[uri]; f != nil {
		return f(into)
	}
	return nil
}

func opener(name string, log *[]string, err error) func(context.Context, *Env, config) (*store, error) {
	return func(_ context.Context, env *Env, cfg config) (*store, error) {
		*log = append(*log, "open "+name)
		if err != nil {
			return nil, err
		}
		return &store{cfg: cfg, name: name, log: log}, nil
	}
}

const (
	content  = "io.containerd.content.v1"
	metadata = "io.containerd.metadata.v1"
	snapshot = "io.containerd.snapshotter.v1"
)

// contract: 2.1.1, 2.1.2
func TestOpen(t *testing.T) {
	ctx := context.Background()
	var log []string
	h := NewHost(Options{Root: "/r", State: "/s", GRPCAddress: "/g", TTRPCAddress: "/t", Config: decoder{
		snapshot + ".x": func(into any) error { into.(*config).N = 7; return nil },
	}})
	spec := New(snapshot, "x", config{Path: "/default", N: 1}, func(_ context.Context, env *Env, cfg config) (*store, error) {
		want := map[string]string{
			"io.containerd.plugin.root": "/r/" + snapshot + ".x", "io.containerd.plugin.state": "/s/" + snapshot + ".x",
			"io.containerd.plugin.grpc.address": "/g", "io.containerd.plugin.ttrpc.address": "/t",
		}
		if d := cmp.Diff(want, env.Properties()); d != "" {
			t.Error(d)
		}
		if env.Root != want["io.containerd.plugin.root"] || env.URI() != snapshot+".x" {
			t.Errorf("env %+v", env)
		}
		env.Export("root", env.Root)
		env.Capability("remap-ids")
		env.Platform(Platform{OS: "linux", Architecture: "amd64"})
		return &store{cfg: cfg, name: "x", log: &log}, nil
	})
	spec.Exports = map[string]string{"address": "a"}
	spec.Requires = []string{"*"}
	s, err := Open(ctx, h, spec)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(config{Path: "/default", N: 7}, s.cfg); d != "" {
		t.Error(d)
	}
	rows := h.Plugins()
	if len(rows) != 1 {
		t.Fatalf("rows %v", rows)
	}
	rows[0].Duration = 0
	want := Row{Type: snapshot, ID: "x", Requires: []string{"*"}, Platforms: []Platform{{OS: "linux", Architecture: "amd64"}},
		Exports: map[string]string{"address": "a", "root": "/r/" + snapshot + ".x"}, Capabilities: []string{"remap-ids"}}
	if d := cmp.Diff(want, rows[0]); d != "" {
		t.Error(d)
	}
	rows[0].Exports["root"] = "changed"
	if h.Plugins()[0].Exports["root"] == "changed" || len(spec.Exports) != 1 {
		t.Error("a row shares its map")
	}
	if _, err := Open(ctx, h, spec); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second of a name: %v", err)
	}
}

// Each way in which a part is not there, what is recorded of it, and what the
// parts that require it say.
//
// contract: 2.1.3, 2.1.4
func TestFailures(t *testing.T) {
	ctx := context.Background()
	var log []string
	boom := errors.New("boom")
	h := NewHost(Options{
		Disabled: []string{content + ".off"},
		Required: []string{snapshot + ".skipped", metadata + ".bolt", content + ".off", "a.b", content + ".ok"},
		Config:   decoder{content + ".strict": func(any) error { return boom }},
	})
	open := func(typ, id string, err error, requires ...string) error {
		t.Helper()
		s := New(typ, id, config{}, opener(id, &log, err))
		s.Requires = requires
		v, got := Open(ctx, h, s)
		if (got != nil) != (v == nil) {
			t.Errorf("%s: value %v with error %v", id, v, got)
		}
		return got
	}
	if err := open(content, "off", nil); !errors.Is(err, ErrDisabled) {
		t.Errorf("disabled: %v", err)
	}
	if err := open(content, "strict", nil); !errors.Is(err, boom) {
		t.Errorf("bad configuration: %v", err)
	}
	if err := open(content, "broken", boom); !errors.Is(err, boom) || err.Error() != "open "+content+".broken: boom" {
		t.Errorf("broken: %v", err)
	}
	if err := open(metadata, "bolt", nil, content); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), content+".broken: boom") {
		t.Errorf("requirement failed: %v", err)
	}
	if err := open(content, "ok", nil); err != nil {
		t.Errorf("ok: %v", err)
	}
	if err := open(content, "second", nil, content); err != nil {
		t.Errorf("requirement met by one of three: %v", err)
	}
	if err := open(snapshot, "early", nil, "io.containerd.gc.v1"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "none is opened before it") {
		t.Errorf("requirement not there: %v", err)
	}
	if err := open(snapshot, "skipped", Skip("no %s here", "btrfs")); !errors.Is(err, ErrSkip) || !strings.Contains(err.Error(), "no btrfs here: skip plugin") {
		t.Errorf("skip: %v", err)
	}
	if _, err := Open(ctx, h, New(snapshot, "panics", config{}, func(context.Context, *Env, config) (int, error) { panic("oh") })); !errdefs.IsInternal(err) || !strings.Contains(err.Error(), "oh") {
		t.Errorf("panic: %v", err)
	}
	if d := cmp.Diff([]string{"open broken", "open ok", "open second", "open skipped"}, log); d != "" {
		t.Errorf("what ran: %s", d)
	}
	var rows []string
	for _, r := range h.Plugins() {
		rows = append(rows, r.ID+" "+r.Status())
	}
	want := []string{"strict error", "broken error", "bolt error", "ok ok", "second ok", "early error", "skipped skip", "panics error"}
	if d := cmp.Diff(want, rows); d != "" {
		t.Error(d)
	}
	err := h.CheckRequired()
	if !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("required: %v", err)
	}
	for _, part := range []string{"skipped: no btrfs here", "bolt: it requires", "off: it is also in disabled_plugins", "a.b: there is no plugin of that name"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("no %q in %v", part, err)
		}
	}
	if strings.Contains(err.Error(), ".ok") {
		t.Errorf("names one that is fine: %v", err)
	}
	if err := NewHost(Options{}).CheckRequired(); err != nil {
		t.Error(err)
	}
}

func TestCloseOrder(t *testing.T) {
	ctx := context.Background()
	var log []string
	h := NewHost(Options{CloseTimeout: 50 * time.Millisecond})
	release := make(chan struct{})
	defer close(release)
	for _, id := range []string{"a", "b", "c", "d"} {
		s := New(content, id, config{}, opener(id, &log, nil))
		open := s.Open
		s.Open = func(ctx context.Context, e *Env, c config) (*store, error) {
			v, err := open(ctx, e, c)
			switch id {
			case "b":
				v.close = errors.New("dirty")
			case "c":
				v.hang, v.log = release, new([]string)
			}
			return v, err
		}
		if id == "d" {
			s.Close = func(v *store) error { log = append(log, "own close d"); return nil }
		}
		if _, err := Open(ctx, h, s); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(ctx, h, New(content, "func", config{}, func(context.Context, *Env, config) (func(), error) { return nil, nil })); err != nil {
		t.Error(err)
	}
	log = nil
	err := h.Close()
	if err == nil || !strings.Contains(err.Error(), ".b: dirty") || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), ".c: no answer") {
		t.Errorf("close: %v", err)
	}
	if d := cmp.Diff([]string{"own close d", "close b", "close a"}, log); d != "" {
		t.Error(d)
	}
	if err := h.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if _, err := Open(ctx, h, New(content, "late", config{}, opener("late", &log, nil))); !errdefs.IsUnavailable(err) {
		t.Errorf("open after close: %v", err)
	}
}

// contract: 2.1.5
func TestReadiness(t *testing.T) {
	ctx := context.Background()
	h := NewHost(Options{})
	if err := h.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	var ready []func()
	for i := range 3 {
		_, err := Open(ctx, h, New(content, fmt.Sprint(i), config{}, func(_ context.Context, e *Env, _ config) (int, error) {
			ready = append(ready, e.RegisterReadiness())
			if i == 2 {
				return 0, errors.New("failed parts hold nobody up")
			}
			return i, nil
		}))
		if (err != nil) != (i == 2) {
			t.Fatal(err)
		}
	}
	ready[0]()
	ready[0]()
	ready[2]()
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := h.WaitReady(short); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), content+".1") || strings.Contains(err.Error(), content+".0") {
		t.Errorf("wait: %v", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		long, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		if err := h.WaitReady(long); err != nil {
			t.Error(err)
		}
	})
	ready[1]()
	wg.Wait()
}

// contract: 2.1.6
func TestProxyType(t *testing.T) {
	for in, want := range map[string]string{
		"snapshot": snapshot, snapshot: snapshot, "content": content, "sandbox": "io.containerd.sandbox.controller.v1",
		"diff": "io.containerd.differ.v1", "io.containerd.differ.v1": "io.containerd.differ.v1",
	} {
		if got, err := ProxyType(in); err != nil || got != want {
			t.Errorf("%s: %s %v", in, got, err)
		}
	}
	if _, err := ProxyType("network"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown: %v", err)
	}
}
