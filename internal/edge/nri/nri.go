// Package nri lets plugins of the node take part in the life of pods and
// containers (contract 1.4.8 to 1.4.14, 7.3.23).
//
// It promises that a plugin which sleeps, dies or is not there costs others at
// most its own time limit: one that is required refuses creations, by its name,
// and one that is not is left out of that call and kept (promise P41). Nothing
// is locked while a plugin is asked, but the plugin itself: it is asked one
// thing at a time. What plugins wish for together is merged, checked for
// conflicts and validated by NRI's own code.
package nri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	validator "github.com/containerd/nri/plugins/default-validator"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/prometheus/client_golang/prometheus"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/keymutex"
)

// Config is the block io.containerd.nri.v1.nri (Appendix B of the contract).
type Config struct {
	Disable             bool                             `toml:"disable"`
	SocketPath          string                           `toml:"socket_path"`
	PluginPath          string                           `toml:"plugin_path"`
	PluginConfigPath    string                           `toml:"plugin_config_path"`
	RegistrationTimeout time.Duration                    `toml:"plugin_registration_timeout"`
	RequestTimeout      time.Duration                    `toml:"plugin_request_timeout"`
	DisableConnections  bool                             `toml:"disable_connections"`
	DefaultValidator    validator.DefaultValidatorConfig `toml:"default_validator"`
}

// DefaultConfig is containerd's.
func DefaultConfig() Config {
	return Config{SocketPath: adaptation.DefaultSocketPath, PluginPath: adaptation.DefaultPluginPath, PluginConfigPath: adaptation.DefaultPluginConfigPath,
		RegistrationTimeout: adaptation.DefaultPluginRegistrationTimeout, RequestTimeout: adaptation.DefaultPluginRequestTimeout}
}

// Ineffective reports the settings that do nothing.
func (c *Config) Ineffective(report func(why string, key ...string)) {
	if v := c.DefaultValidator; !v.Enable {
		for key, set := range map[string]bool{"required_plugins": len(v.RequiredPlugins) > 0, "tolerate_missing_plugins_annotation": v.TolerateMissingAnnotation != "",
			"reject_oci_hook_adjustment": v.RejectOCIHookAdjustment, "reject_runtime_default_seccomp_adjustment": v.RejectRuntimeDefaultSeccompAdjustment,
			"reject_unconfined_seccomp_adjustment": v.RejectUnconfinedSeccompAdjustment, "reject_custom_seccomp_adjustment": v.RejectCustomSeccompAdjustment,
			"reject_namespace_adjustment": v.RejectNamespaceAdjustment, "reject_sysctl_adjustment": v.RejectSysctlAdjustment} {
			if set {
				report("nothing is validated unless enable is true", "default_validator", key)
			}
		}
	}
	if c.RequestTimeout <= 0 {
		report("the time limits are the defaults unless both are more than 0", "plugin_request_timeout")
	}
	if c.RegistrationTimeout <= 0 {
		report("the time limits are the defaults unless both are more than 0", "plugin_registration_timeout")
	}
}

// Deps is what a Host works with. The functions may be called as soon as Start is.
type Deps struct {
	Config     Config
	Pods       *cristate.Index[*cristate.Pod]
	Containers *cristate.Index[*cristate.Container]
	// Spec is a container's specification.
	Spec func(ctx context.Context, id string) (*specs.Spec, error)
	// Adjust changes the resources of a container that plugins are not asked
	// about again, and Evict stops one. ErrNotFound.
	Adjust func(ctx context.Context, id string, res *runtime.LinuxContainerResources) error
	Evict  func(ctx context.Context, id string) error
	// CDI adds devices named vendor/class=name to a specification; nil refuses them.
	CDI     func(s *specs.Spec, devices []string) error
	Version string                // of the daemon, told to plugins
	Metrics prometheus.Registerer // may be nil
	Log     *slog.Logger
}

// Host runs the plugins and asks them. It implements the interfaces of the same
// name of cripod and cricontainer. It is safe for concurrent use.
type Host struct {
	Deps
	check   *validator.DefaultValidator // nil if it is not enabled
	metrics metrics

	ends keymutex.Map // held by who tells the end of a pod or container
	wg   sync.WaitGroup
	life context.Context // until Close
	end  context.CancelFunc

	mu       sync.Mutex // guards what follows; never held over I/O
	now      *generation
	listener *net.UnixListener
	socket   os.FileInfo // as it was made
	closed   bool
	ended    map[string]bool // pods and containers whose stop was told
	seen     map[string]bool // names of plugins in metrics
}

// generation is the set of plugins between two changes of it. Creations that
// asked this set and are not visible yet are its windows.
type generation struct {
	plugins []*plug // in the order in which they are asked
	windows map[string]func() bool
}

// New makes a Host. Start makes it live.
func New(d Deps) *Host {
	// The library's own time limits would drop a plugin that exceeds them; ours
	// are within these. Its log is about every single step.
	adaptation.SetPluginRequestTimeout(time.Hour)
	if std := DefaultConfig(); d.Config.RequestTimeout <= 0 || d.Config.RegistrationTimeout <= 0 {
		d.Config.RequestTimeout, d.Config.RegistrationTimeout = std.RequestTimeout, std.RegistrationTimeout
	}
	nrilog.Set(library{d.Log})
	h := &Host{Deps: d, now: &generation{windows: map[string]func() bool{}}, ended: map[string]bool{}, seen: map[string]bool{}}
	h.life, h.end = context.WithCancel(context.Background())
	h.metrics = newMetrics(h)
	if c := d.Config.DefaultValidator; c.Enable {
		h.check = validator.NewDefaultValidator(&c)
	}
	return h
}

// library is the log of NRI's own code.
type library struct{ *slog.Logger }

func (l library) say(ctx context.Context, level slog.Level, format string, args []any) {
	if l.Enabled(ctx, level) {
		l.Log(ctx, level, fmt.Sprintf(format, args...))
	}
}
func (l library) Debugf(ctx context.Context, f string, a ...any) { l.say(ctx, slog.LevelDebug-4, f, a) }
func (l library) Infof(ctx context.Context, f string, a ...any)  { l.say(ctx, slog.LevelDebug-4, f, a) }
func (l library) Warnf(ctx context.Context, f string, a ...any)  { l.say(ctx, slog.LevelDebug, f, a) }
func (l library) Errorf(ctx context.Context, f string, a ...any) { l.say(ctx, slog.LevelDebug, f, a) }

// Start starts the plugins that are installed, waits until each has joined or
// used up its time, or ctx ends, and then lets others connect. What does not
// work is logged: plugins never keep the daemon from starting. They run until Close.
func (h *Host) Start(ctx context.Context) {
	h.mu.Lock()
	for _, c := range h.Containers.List() {
		if c.Status().FinishedAt != 0 {
			h.ended[c.ID()] = true // nobody who joins will have heard of it
		}
	}
	h.mu.Unlock()
	joined := h.launch(h.life)
	wait := time.NewTimer(h.Config.RegistrationTimeout + 2*h.Config.RequestTimeout)
	defer wait.Stop()
	for _, j := range joined {
		select {
		case <-j:
			continue
		case <-wait.C:
			h.Log.Warn("some NRI plugins have not joined in time; they may yet")
		case <-ctx.Done():
		}
		break
	}
	if !h.Config.DisableConnections {
		h.wg.Go(func() { h.serve(h.life) })
	}
}

// Close ends the plugins that were started here and disconnects the others.
func (h *Host) Close() {
	h.mu.Lock()
	h.closed = true
	all, l := h.now.plugins, h.listener
	h.mu.Unlock()
	h.end()
	if l != nil {
		l.Close()
		if info, err := os.Lstat(h.Config.SocketPath); err == nil && os.SameFile(info, h.socket) {
			_ = os.Remove(h.Config.SocketPath)
		}
	}
	for _, p := range all {
		p.close(errors.New("the daemon stops"))
	}
	h.wg.Wait()
}

// retry is how long is waited before the socket is tried again, or a plugin started again.
const retry = 10 * time.Second

// serve accepts plugins. A socket that another daemon serves is left to it, and
// tried again: containerd may run beside Gantry while a host is switched.
func (h *Host) serve(ctx context.Context) {
	for said := ""; ; {
		l, err := h.listen()
		if err == nil {
			h.accept(ctx, l)
		} else if said != err.Error() {
			said = err.Error()
			h.Log.Warn("NRI plugins cannot connect", "socket", h.Config.SocketPath, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retry):
		}
	}
}

func (h *Host) listen() (*net.UnixListener, error) {
	path := h.Config.SocketPath
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("it is not a socket: %w", errdefs.ErrAlreadyExists)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("another daemon serves it: %w", errdefs.ErrAlreadyExists)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // it may be another's by then
	info, err := os.Lstat(path)
	if err = errors.Join(err, os.Chmod(path, 0o600)); err != nil {
		l.Close()
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		l.Close()
		return nil, net.ErrClosed
	}
	h.listener, h.socket = l, info
	return l, nil
}

func (h *Host) accept(ctx context.Context, l *net.UnixListener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil {
				h.Log.Warn("accept NRI plugins", "error", err)
				l.Close()
			}
			return
		}
		h.wg.Go(func() {
			if err := h.plugin(ctx, conn, identity{}, nil); err != nil && ctx.Err() == nil {
				h.Log.Warn("NRI plugin", "error", err)
			}
		})
	}
}

// plugins are those that are to be asked now.
func (h *Host) plugins() []*plug {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now.plugins
}

// enter opens the window of a creation: until it is visible, or leave is
// called, plugins that join wait for it, so that each hears of it either by
// being asked or by the synchronisation (contract 1.4.14). Those that join
// later are not asked about it.
func (h *Host) enter(id string, visible func() bool) []*plug {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, seen := range h.now.windows {
		if seen() {
			delete(h.now.windows, id)
		}
	}
	h.now.windows[id] = visible
	return h.now.plugins
}

func (h *Host) leave(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.now.windows, id)
}

// admit adds a plugin; whoever enters now will ask it. It returns what is not
// visible yet of those that did not.
func (h *Host) admit(p *plug) (map[string]func() bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, fmt.Errorf("the daemon stops: %w", errdefs.ErrUnavailable)
	}
	old := h.now.windows
	all := append(slices.Clone(h.now.plugins), p)
	slices.SortStableFunc(all, func(a, b *plug) int { return strings.Compare(a.index, b.index) })
	h.now = &generation{plugins: all, windows: map[string]func() bool{}}
	return old, nil
}

func (h *Host) dismiss(p *plug) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = &generation{plugins: slices.DeleteFunc(slices.Clone(h.now.plugins), func(o *plug) bool { return o == p }), windows: h.now.windows}
}

// Names are the plugins that are there, in the order in which they are asked.
func (h *Host) Names() []string {
	var names []string
	for _, p := range h.plugins() {
		names = append(names, p.name())
	}
	return names
}

// needs says whether a pod, or a container of it, must not go on without a plugin:
// because of the configuration, of an annotation, or of the plugin itself.
func (h *Host) needs(ctx context.Context, p *plug, pod *api.PodSandbox, container string) bool {
	if p.policy.GetFailRequest() {
		return true
	}
	with := []*api.PluginInstance{{Name: p.base, Index: p.index}}
	return fmt.Sprint(h.required(ctx, pod, container, with)) != fmt.Sprint(h.required(ctx, pod, container, nil))
}

func (h *Host) required(ctx context.Context, pod *api.PodSandbox, container string, there []*api.PluginInstance) error {
	return h.validate(ctx, &api.ValidateContainerAdjustmentRequest{Pod: pod, Container: &api.Container{Name: container}, Plugins: there})
}

// oldRequired is the annotation's name in earlier versions of NRI (contract 1.4.13).
const oldRequired = "required-plugins.nri.io"

// validate is NRI's default validator.
func (h *Host) validate(ctx context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	if h.check == nil {
		return nil
	}
	for k, v := range req.Pod.GetAnnotations() {
		rest, ok := strings.CutPrefix(k, oldRequired)
		if !ok {
			continue
		}
		if now := validator.RequiredPlugins + rest; req.Pod.Annotations[now] == "" {
			pod := &api.PodSandbox{Id: req.Pod.Id, Name: req.Pod.Name, Namespace: req.Pod.Namespace, Annotations: map[string]string{now: v}}
			for k, v := range req.Pod.Annotations {
				pod.Annotations[k] = v
			}
			req.Pod = pod
		}
	}
	return h.check.ValidateContainerAdjustment(ctx, req)
}
