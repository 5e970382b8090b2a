// Package plugin keeps what the contract wants to know of the parts of the
// daemon: full names, directories, requirements, platforms, exports,
// capabilities, and how their opening went. A part is described by a value,
// its Spec, and opened explicitly with a typed configuration; nothing is
// registered anywhere. A part that cannot be opened is recorded, and the
// others go on without it unless the user requires it.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// ErrSkip says that a part does not work on this host, which is no fault: its
// status is "skip" and not "error". The text is what clients look for.
var ErrSkip = errors.New("skip plugin")

// ErrDisabled is what Open returns for a part that the user switched off.
var ErrDisabled = errors.New("disabled by configuration")

// Skip makes an ErrSkip with a reason.
func Skip(format string, args ...any) error {
	return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), ErrSkip)
}

// The names of the properties of a part (contract 2.1.2).
const (
	PropertyRoot         = "io.containerd.plugin.root"
	PropertyState        = "io.containerd.plugin.state"
	PropertyGRPCAddress  = "io.containerd.plugin.grpc.address"
	PropertyTTRPCAddress = "io.containerd.plugin.ttrpc.address"
)

// Platform is what a part can serve.
type Platform struct{ OS, Architecture, Variant, OSVersion string }

// Spec describes a part that gives a T and is configured by a C. C is a struct
// with toml tags; Default holds its defaults.
type Spec[T, C any] struct {
	Type string // "io.containerd.snapshotter.v1"
	ID   string // "overlayfs"
	// Requires are the types that must be there before: at least one part of
	// each has to be open. "*" stands for all and is not checked.
	Requires     []string
	Platforms    []Platform
	Exports      map[string]string
	Capabilities []string
	Default      C
	Open         func(ctx context.Context, env *Env, cfg C) (T, error)
	// Close, if set, ends what Open gave. Without it a T that is an io.Closer
	// is closed.
	Close func(T) error
}

// New is a Spec whose types are inferred.
func New[T, C any](typ, id string, def C, open func(ctx context.Context, env *Env, cfg C) (T, error)) Spec[T, C] {
	return Spec[T, C]{Type: typ, ID: id, Default: def, Open: open}
}

// URI is the full name of a part, which the lists of disabled and required
// parts use.
func URI(typ, id string) string { return typ + "." + id }

// Decoder fills the struct that into points to with a part's configuration;
// what the user did not set stays as it is.
type Decoder interface {
	Decode(uri string, into any) error
}

// Options say what a Host works with.
type Options struct {
	Root, State               string // of the daemon; each part has a folder in both
	GRPCAddress, TTRPCAddress string
	Disabled, Required        []string // URIs
	Config                    Decoder  // nil leaves every default
	Log                       *slog.Logger
	// CloseTimeout bounds the close of one part, 0 is ten seconds.
	CloseTimeout time.Duration
}

// Host is the table of parts. It is safe for concurrent use.
type Host struct {
	opt Options

	mu      sync.Mutex // guards what follows; never held while a part works
	rows    []*row
	waiting map[string]int // readiness still to come, by URI
	change  chan struct{}  // closed when waiting changes
	closed  bool
}

type row struct {
	Row
	done  bool // Open has returned
	close func() error
}

// Status of a part, as clients print it.
const (
	StatusOK    = "ok"
	StatusSkip  = "skip"
	StatusError = "error"
)

// Row is what is known of one part. It is a copy; a caller may keep it.
type Row struct {
	Type, ID     string
	Requires     []string
	Platforms    []Platform
	Exports      map[string]string
	Capabilities []string
	Err          error // why it is not open, nil if it is
	Duration     time.Duration
}

// URI is the full name.
func (r Row) URI() string { return URI(r.Type, r.ID) }

// Status is ok, skip or error.
func (r Row) Status() string {
	switch {
	case r.Err == nil:
		return StatusOK
	case errors.Is(r.Err, ErrSkip):
		return StatusSkip
	}
	return StatusError
}

// Env is what a part is opened with. It must not be used after Open returned,
// but for the function that RegisterReadiness gave.
type Env struct {
	Type, ID                  string
	Root, State               string // the part's own; it makes them when it needs them
	GRPCAddress, TTRPCAddress string
	Log                       *slog.Logger

	host *Host
	row  *row
}

// URI is the full name of the part.
func (e *Env) URI() string { return URI(e.Type, e.ID) }

// Properties is the same under the names of the contract.
func (e *Env) Properties() map[string]string {
	return map[string]string{
		PropertyRoot: e.Root, PropertyState: e.State,
		PropertyGRPCAddress: e.GRPCAddress, PropertyTTRPCAddress: e.TTRPCAddress,
	}
}

// Export publishes a value about the part, such as the root it really uses.
func (e *Env) Export(key, value string) {
	e.host.mu.Lock()
	defer e.host.mu.Unlock()
	if e.row.Exports == nil {
		e.row.Exports = map[string]string{}
	}
	e.row.Exports[key] = value
}

// Capability publishes what the part can do.
func (e *Env) Capability(names ...string) {
	e.host.mu.Lock()
	defer e.host.mu.Unlock()
	e.row.Capabilities = append(e.row.Capabilities, names...)
}

// Platform publishes what the part can serve.
func (e *Env) Platform(ps ...Platform) {
	e.host.mu.Lock()
	defer e.host.mu.Unlock()
	e.row.Platforms = append(e.row.Platforms, ps...)
}

// RegisterReadiness makes Host.WaitReady wait until the returned function is
// called, which may be long after Open (contract 2.1.5). Calling it again does
// nothing.
func (e *Env) RegisterReadiness() (ready func()) {
	uri, h := e.URI(), e.host
	h.mu.Lock()
	h.waiting[uri]++
	h.mu.Unlock()
	return sync.OnceFunc(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.waiting[uri] <= 1 {
			delete(h.waiting, uri) // also that of a part that has failed since
		} else {
			h.waiting[uri]--
		}
		close(h.change)
		h.change = make(chan struct{})
	})
}

// NewHost makes an empty table.
func NewHost(opt Options) *Host {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if opt.CloseTimeout <= 0 {
		opt.CloseTimeout = 10 * time.Second
	}
	return &Host{opt: opt, waiting: map[string]int{}, change: make(chan struct{})}
}

// Open reads the part's configuration and opens it. Whatever happens is kept
// in the table, but for a part that is disabled, which returns ErrDisabled and
// is not listed. Other errors are those of the part (ErrSkip among them), of
// its configuration, ErrFailedPrecondition when something it requires is not
// open, and ErrAlreadyExists for a second part of the same name. A part that
// panics has failed. With an error T is its zero value.
func Open[T, C any](ctx context.Context, h *Host, s Spec[T, C]) (T, error) {
	var zero T
	uri := URI(s.Type, s.ID)
	if slices.Contains(h.opt.Disabled, uri) {
		h.opt.Log.Info("plugin is disabled", "id", s.ID, "type", s.Type)
		return zero, fmt.Errorf("open %s: %w", uri, ErrDisabled)
	}
	r := &row{Row: Row{Type: s.Type, ID: s.ID, Requires: slices.Clone(s.Requires), Platforms: slices.Clone(s.Platforms),
		Exports: maps.Clone(s.Exports), Capabilities: slices.Clone(s.Capabilities)}}
	if err := h.add(r); err != nil {
		return zero, err
	}
	begin := time.Now()
	cfg := s.Default
	var value T
	err := h.missing(s.Requires)
	if err == nil && h.opt.Config != nil {
		err = h.opt.Config.Decode(uri, &cfg)
	}
	if err == nil {
		env := &Env{Type: s.Type, ID: s.ID, Root: filepath.Join(h.opt.Root, uri), State: filepath.Join(h.opt.State, uri),
			GRPCAddress: h.opt.GRPCAddress, TTRPCAddress: h.opt.TTRPCAddress, Log: h.opt.Log.With("plugin", uri), host: h, row: r}
		value, err = guarded(ctx, env, cfg, s.Open)
	}
	took := time.Since(begin)
	log := h.opt.Log.With("id", s.ID, "type", s.Type, "duration", took)
	switch {
	case err == nil:
		log.Debug("plugin is open")
	case errors.Is(err, ErrSkip):
		log.Info("plugin is skipped", "error", err)
	default:
		log.Warn("plugin cannot be opened", "error", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	r.Err, r.Duration, r.done = err, took, true
	if err != nil {
		// It will not get ready any more, and nobody shall wait for it.
		delete(h.waiting, uri)
		close(h.change)
		h.change = make(chan struct{})
		return zero, fmt.Errorf("open %s: %w", uri, err)
	}
	switch c := any(value).(type) {
	case nil:
	case io.Closer:
		r.close = c.Close
	}
	if s.Close != nil {
		r.close = func() error { return s.Close(value) }
	}
	return value, nil
}

func guarded[T, C any](ctx context.Context, env *Env, cfg C, open func(context.Context, *Env, C) (T, error)) (value T, err error) {
	defer func() {
		if p := recover(); p != nil {
			env.Log.Error("plugin panicked", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v: %w", p, errdefs.ErrInternal)
		}
	}()
	return open(ctx, env, cfg)
}

func (h *Host) add(r *row) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	uri := r.URI()
	if h.closed {
		return fmt.Errorf("open %s: the daemon is stopping: %w", uri, errdefs.ErrUnavailable)
	}
	for _, have := range h.rows {
		if have.URI() == uri {
			return fmt.Errorf("open %s: there is one of that name: %w", uri, errdefs.ErrAlreadyExists)
		}
	}
	h.rows = append(h.rows, r)
	return nil
}

// missing tells which of the required types have no open part.
func (h *Host) missing(types []string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range types {
		if t == "*" {
			continue
		}
		found, why := false, "none is opened before it"
		for _, r := range h.rows {
			if r.Type != t || !r.done {
				continue
			}
			if r.Err == nil {
				found = true
				break
			}
			why = fmt.Sprintf("%s: %s", r.URI(), r.Err)
		}
		if !found {
			return fmt.Errorf("it requires %s: %s: %w", t, why, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// Plugins lists the parts in the order in which they were opened.
func (h *Host) Plugins() []Row {
	h.mu.Lock()
	defer h.mu.Unlock()
	rows := make([]Row, 0, len(h.rows))
	for _, r := range h.rows {
		if !r.done {
			continue
		}
		c := r.Row
		c.Requires, c.Platforms, c.Capabilities = slices.Clone(r.Requires), slices.Clone(r.Platforms), slices.Clone(r.Capabilities)
		c.Exports = maps.Clone(r.Exports)
		rows = append(rows, c)
	}
	return rows
}

// CheckRequired fails if a part that the user requires is missing or not open:
// ErrFailedPrecondition, naming each with its cause (contract 2.1.4). Call it
// when all parts are opened.
func (h *Host) CheckRequired() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
next:
	for _, uri := range h.opt.Required {
		for _, r := range h.rows {
			if r.URI() != uri || !r.done {
				continue
			}
			if r.Err != nil {
				errs = append(errs, fmt.Errorf("required plugin %s: %w", uri, r.Err))
			}
			continue next
		}
		why := "there is no plugin of that name"
		if slices.Contains(h.opt.Disabled, uri) {
			why = "it is also in disabled_plugins"
		}
		errs = append(errs, fmt.Errorf("required plugin %s: %s", uri, why))
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w: %w", errors.Join(errs...), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// WaitReady returns when every part that asked for it has said it is ready, or
// with ctx's error and the names of those that have not.
func (h *Host) WaitReady(ctx context.Context) error {
	for {
		h.mu.Lock()
		names := slices.Sorted(maps.Keys(h.waiting))
		change := h.change
		h.mu.Unlock()
		if len(names) == 0 {
			return nil
		}
		select {
		case <-change:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s to be ready: %w", strings.Join(names, ", "), ctx.Err())
		}
	}
}

// Close closes the parts in reverse order, each within the timeout; one that
// hangs is named and left behind. Further parts cannot be opened. A second
// call does nothing.
func (h *Host) Close() error {
	h.mu.Lock()
	h.closed = true
	rows := slices.Clone(h.rows)
	closers := make([]func() error, len(rows))
	for i, r := range rows {
		closers[i], r.close = r.close, nil
	}
	h.mu.Unlock()
	var errs []error
	for i := len(rows) - 1; i >= 0; i-- {
		if closers[i] == nil {
			continue
		}
		done := make(chan error, 1)
		go func() { done <- closers[i]() }()
		timer := time.NewTimer(h.opt.CloseTimeout)
		select {
		case err := <-done:
			if err != nil {
				errs = append(errs, fmt.Errorf("close %s: %w", rows[i].URI(), err))
			}
		case <-timer.C:
			errs = append(errs, fmt.Errorf("close %s: no answer within %s: %w", rows[i].URI(), h.opt.CloseTimeout, context.DeadlineExceeded))
		}
		timer.Stop()
	}
	return errors.Join(errs...)
}

// ProxyType is the full type of a proxy plugin's configured one; an unknown
// one is ErrInvalidArgument (contract 2.1.6).
func ProxyType(short string) (string, error) {
	switch short {
	case "snapshot", "io.containerd.snapshotter.v1":
		return "io.containerd.snapshotter.v1", nil
	case "content", "io.containerd.content.v1":
		return "io.containerd.content.v1", nil
	case "sandbox", "io.containerd.sandbox.controller.v1":
		return "io.containerd.sandbox.controller.v1", nil
	case "diff", "io.containerd.differ.v1":
		return "io.containerd.differ.v1", nil
	}
	return "", fmt.Errorf("proxy plugin type %q: want snapshot, content, sandbox, diff or a full type: %w", short, errdefs.ErrInvalidArgument)
}
