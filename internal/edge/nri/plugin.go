package nri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	nrinet "github.com/containerd/nri/pkg/net"
	"github.com/containerd/nri/pkg/net/multiplex"
	nriversion "github.com/containerd/nri/pkg/version"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

var _ api.RuntimeService = (*plug)(nil)

// identity is the name of a plugin that is known before it says so.
type identity struct{ index, base, config string }

// plug is a plugin that is connected.
type plug struct {
	host *Host
	identity
	fixed  bool // its name is that of its file
	mux    multiplex.Mux
	client api.PluginService
	events api.EventMask
	policy *api.FailurePolicy

	registered chan struct{}
	once       sync.Once
	turn       chan struct{} // held by whoever asks it
	gone       chan struct{} // closed with the connection
	why        error         // set before gone is closed

	mu    sync.Mutex
	alarm chan struct{} // closed, and replaced, when a call exceeded its time
	slow  time.Time     // until then it is not waited for long
	old   bool          // it knows only StateChange
}

func (p *plug) name() string { return p.index + "-" + p.base }

func (p *plug) close(why error) {
	p.once.Do(func() {
		p.why = why
		close(p.gone)
		p.mux.Close()
	})
}

// RegisterPlugin implements the service that plugins call (contract 1.4.9).
func (p *plug) RegisterPlugin(_ context.Context, req *api.RegisterPluginRequest) (*api.Empty, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.isRegistered() {
		return nil, fmt.Errorf("register plugin %s: it is registered: %w", p.name(), errdefs.ErrAlreadyExists)
	}
	if !p.fixed {
		if err := errors.Join(api.CheckPluginName(req.GetPluginName()), api.CheckPluginIndex(req.GetPluginIdx())); err != nil || len(req.GetPluginName()) > 128 {
			p.close(fmt.Errorf("it registers as %.200q with index %.20q", req.GetPluginName(), req.GetPluginIdx()))
			return nil, fmt.Errorf("register plugin %.200q: %v: %w", req.GetPluginName(), err, errdefs.ErrInvalidArgument)
		}
		p.base, p.index = req.GetPluginName(), req.GetPluginIdx()
	}
	close(p.registered)
	return &api.Empty{}, nil
}

func (p *plug) isRegistered() bool {
	select {
	case <-p.registered:
		return true
	default:
		return false
	}
}

// UpdateContainers implements the service that plugins call: what could not be
// changed is returned (contract 1.4.9). Evictions come after the changes.
func (p *plug) UpdateContainers(ctx context.Context, req *api.UpdateContainersRequest) (*api.UpdateContainersResponse, error) {
	if !p.isRegistered() {
		return nil, fmt.Errorf("update containers: register first: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, unasked)
	defer cancel()
	failed, err := p.host.update(ctx, req.GetUpdate())
	p.host.evict(ctx, req.GetEvict())
	return &api.UpdateContainersResponse{Failed: failed}, err
}

// unasked bounds what is done for plugins while nobody waits for it.
const unasked = time.Minute

// plugin serves a connection until it ends. joined is closed when the plugin
// takes part.
func (h *Host) plugin(ctx context.Context, conn net.Conn, id identity, joined func()) error {
	p := &plug{host: h, identity: id, fixed: id.base != "", registered: make(chan struct{}), turn: make(chan struct{}, 1), gone: make(chan struct{}), alarm: make(chan struct{})}
	p.mux = multiplex.Multiplex(conn, multiplex.WithBlockedRead())
	defer p.close(errors.New("it was left"))
	client, err := p.mux.Open(multiplex.PluginServiceConn)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	rpc := ttrpc.NewClient(client, ttrpc.WithOnClose(func() { p.close(errors.New("its connection is closed")) }))
	defer rpc.Close()
	p.client = api.NewPluginClient(rpc)
	listener, err := p.mux.Listen(multiplex.RuntimeServiceConn)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	api.RegisterRuntimeService(server, p)
	h.wg.Go(func() { _ = server.Serve(ctx, listener) })
	defer server.Close()
	p.mux.Unblock()

	if err := p.configure(ctx); err != nil {
		who := "a plugin that has not registered"
		if p.fixed || p.isRegistered() { // it may be doing so
			who = p.name()
		}
		return fmt.Errorf("%s: %w", who, err)
	}
	defer h.dismiss(p)
	if err := h.join(ctx, p); err != nil {
		p.close(err)
		return fmt.Errorf("%s: synchronize: %w", p.name(), err)
	}
	h.Log.Info("NRI plugin takes part", "plugin", p.name())
	if joined != nil {
		joined()
	}
	select {
	case <-p.gone:
		h.Log.Info("NRI plugin has gone", "plugin", p.name(), "reason", p.why)
	case <-ctx.Done():
	}
	return nil
}

// configure waits until the plugin has said who it is, and asks what it wants
// to be told of.
func (p *plug) configure(ctx context.Context) error {
	c := p.host.Config
	wait := time.NewTimer(c.RegistrationTimeout)
	defer wait.Stop()
	select {
	case <-p.registered:
	case <-p.gone:
		return fmt.Errorf("register: %w", p.why)
	case <-wait.C:
		return fmt.Errorf("register: not within %s: %w", c.RegistrationTimeout, context.DeadlineExceeded)
	case <-ctx.Done():
		return ctx.Err()
	}
	var answer *api.ConfigureResponse
	err := p.call(ctx, "Configure", c.RequestTimeout, func(ctx context.Context) (err error) {
		answer, err = p.client.Configure(ctx, &api.ConfigureRequest{Config: p.config, RuntimeName: "containerd", RuntimeVersion: p.host.Version,
			RegistrationTimeout: c.RegistrationTimeout.Milliseconds(), RequestTimeout: c.RequestTimeout.Milliseconds(), NRIVersion: nriversion.GetFromBuildInfo()})
		return err
	})
	if err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	p.events, p.policy = api.EventMask(answer.GetEvents()), answer.GetFailurePolicy()
	if p.events == 0 {
		p.events = api.ValidEvents
	}
	if more := p.events &^ api.ValidEvents; more != 0 {
		return fmt.Errorf("configure: it subscribes to unknown events %#x: %w", int32(more), errdefs.ErrInvalidArgument)
	}
	return nil
}

// join makes the plugin take part. It has its turn until it is synchronized:
// who asks it meanwhile waits, within the limits that it has as everybody.
func (h *Host) join(ctx context.Context, p *plug) error {
	p.turn <- struct{}{}
	defer func() { <-p.turn }()
	windows, err := h.admit(p)
	if err != nil {
		return err
	}
	// Creations that asked others only; each may take as long as those do.
	patience := time.Now().Add(h.Config.RequestTimeout)
	for _, visible := range windows {
		for !visible() && time.Now().Before(patience) && ctx.Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
	}
	pods, containers := h.state(ctx)
	var updates []*api.ContainerUpdate
	for {
		page, n, m := page(pods, containers)
		pods, containers = pods[n:], containers[m:]
		page.More = len(pods)+len(containers) > 0
		var answer *api.SynchronizeResponse
		err := p.direct(ctx, "Synchronize", h.Config.RequestTimeout, func(ctx context.Context) (err error) {
			answer, err = p.client.Synchronize(ctx, page)
			return err
		})
		if err != nil {
			return err
		}
		if !page.More {
			updates = answer.GetUpdate()
			break
		}
		if !answer.GetMore() || len(answer.GetUpdate()) > 0 {
			return fmt.Errorf("it does not take the state in pages: %w", errdefs.ErrNotImplemented)
		}
	}
	h.wg.Go(func() {
		if failed, err := h.update(ctx, updates); len(failed) > 0 || err != nil {
			h.Log.Warn("NRI: changes that a plugin wants at its start", "plugin", p.name(), "failed", len(failed), "error", err)
		}
	})
	return nil
}

// maxPage is the size of a page of the state; a message may have 4 MiB.
const maxPage = 1 << 20

// page takes what fits into one message, at least one of either.
func page(pods []*api.PodSandbox, containers []*api.Container) (page *api.SynchronizeRequest, n, m int) {
	size := 0
	fits := func(v proto.Message) bool {
		size += proto.Size(v) + 16
		return size <= maxPage || n+m == 0
	}
	for n < len(pods) && fits(pods[n]) {
		n++
	}
	for n == len(pods) && m < len(containers) && fits(containers[m]) {
		m++
	}
	return &api.SynchronizeRequest{Pods: pods[:n], Containers: containers[:m]}, n, m
}

// state is what a plugin is told at its start: all pods, and the containers
// that have not ended.
func (h *Host) state(ctx context.Context) (pods []*api.PodSandbox, containers []*api.Container) {
	for _, p := range h.Pods.List() {
		pods = append(pods, podOf(p))
	}
	for _, c := range h.Containers.List() {
		if c.Status().FinishedAt != 0 {
			continue
		}
		containers = append(containers, h.container(ctx, c))
	}
	return pods, containers
}

func (h *Host) container(ctx context.Context, c *cristate.Container) *api.Container {
	spec, err := h.Spec(ctx, c.ID())
	if err != nil {
		h.Log.Debug("NRI: specification of a container", "container", c.ID(), "error", err)
	}
	return containerOf(c, spec)
}

// noAnswer is a plugin's failure to answer, in contrast to a refusal.
type noAnswer struct {
	reason string
	late   bool // there was none in time
}

func (e noAnswer) Error() string { return e.reason }
func (e noAnswer) Unwrap() error { return errdefs.ErrUnavailable }

// slowFor is for how many time limits a plugin that exceeded one is given only
// a tenth of it, by those who can do without it.
const slowFor = 5

func (p *plug) isSlow() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.slow)
}

// call waits for the plugin's turn and asks. When somebody before exceeds the
// limit, those who wait have waited as long as well, and give up with it.
func (p *plug) call(ctx context.Context, op string, limit time.Duration, fn func(context.Context) error) error {
	p.mu.Lock()
	alarm := p.alarm
	p.mu.Unlock()
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-alarm:
		return noAnswer{reason: "it does not answer another call"}
	case <-p.gone:
		return noAnswer{reason: p.why.Error()}
	}
	defer func() { <-p.turn }()
	return p.direct(ctx, op, limit, fn)
}

// direct asks. A nil error, or one that is not noAnswer, is the plugin's.
func (p *plug) direct(ctx context.Context, op string, limit time.Duration, fn func(context.Context) error) error {
	begin := time.Now()
	within, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	answer := make(chan error, 1)
	go func() { answer <- fn(within) }() // ends with the context or the connection
	var err error
	select {
	case err = <-answer:
	case <-p.gone:
		err = noAnswer{reason: p.why.Error()}
	case <-within.Done():
		// The call ends with its context, unless nobody reads the connection.
		grace := time.NewTimer(max(limit, p.host.Config.RequestTimeout) / 4)
		defer grace.Stop()
		select {
		case err = <-answer:
		case <-grace.C:
			err = context.DeadlineExceeded
			p.close(errors.New("it does not read its connection"))
		}
	}
	switch {
	case err == nil:
	case ctx.Err() != nil:
		err = ctx.Err()
	case within.Err() != nil:
		err = noAnswer{fmt.Sprintf("no answer within %s", limit), true}
	case errors.Is(err, ttrpc.ErrClosed), errors.Is(err, ttrpc.ErrServerClosed), errors.Is(err, ttrpc.ErrProtocol), errors.Is(err, net.ErrClosed):
		err = noAnswer{reason: fmt.Sprintf("its connection broke: %v", err)}
		p.close(err)
	}
	p.mu.Lock()
	if errors.As(err, &noAnswer{}) {
		if !time.Now().Before(p.slow) {
			p.slow = time.Now().Add(slowFor * p.host.Config.RequestTimeout)
		}
		close(p.alarm)
		p.alarm = make(chan struct{})
	} else {
		p.slow = time.Time{}
	}
	p.mu.Unlock()
	p.host.called(p, op, time.Since(begin), err)
	return err
}

// unimplemented says that an old plugin does not know a call, and tells the
// operator once.
func (p *plug) unimplemented(err error) bool {
	if status.Code(err) != codes.Unimplemented {
		return false
	}
	p.mu.Lock()
	said := p.old
	p.old = true
	p.mu.Unlock()
	if !said {
		p.host.Log.Warn("NRI plugin uses the deprecated call StateChange; it needs an update", "plugin", p.name())
	}
	return true
}

// launch starts the plugins that are installed and keeps them running. Each
// channel is closed when its plugin has joined.
func (h *Host) launch(ctx context.Context) []chan struct{} {
	files, err := os.ReadDir(h.Config.PluginPath)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.Log.Warn("installed NRI plugins", "error", err)
	}
	var all []chan struct{}
	for _, f := range files {
		info, err := f.Info()
		if err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
			continue
		}
		path := filepath.Join(h.Config.PluginPath, f.Name())
		index, base, err := api.ParsePluginName(f.Name())
		if err == nil {
			err = api.CheckPluginName(base)
		}
		if err != nil || filepath.Ext(base) == ".wasm" {
			h.Log.Warn("file is not used as an NRI plugin: it must be a program named NN-name", "path", path)
			continue
		}
		joined := make(chan struct{})
		all = append(all, joined)
		h.wg.Go(func() { h.keep(ctx, path, index, base, sync.OnceFunc(func() { close(joined) })) })
	}
	return all
}

// keep runs an installed plugin, again and again.
func (h *Host) keep(ctx context.Context, path, index, base string, joined func()) {
	for ctx.Err() == nil {
		begin := time.Now()
		err := h.run(ctx, path, index, base, joined)
		if ctx.Err() != nil {
			return
		}
		h.Log.Warn("installed NRI plugin ended, it will be started again", "plugin", filepath.Base(path), "error", err)
		pause := retry
		if time.Since(begin) > time.Minute {
			pause = retry / 10
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// maxConfig bounds a plugin's configuration file.
const maxConfig = 1 << 20

// pluginConfig reads NN-name.conf, or name.conf.
func (h *Host) pluginConfig(index, base string) (string, error) {
	for _, name := range []string{index + "-" + base + ".conf", base + ".conf"} {
		path := filepath.Join(h.Config.PluginConfigPath, name)
		info, err := os.Stat(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		if !info.Mode().IsRegular() || info.Size() > maxConfig {
			return "", fmt.Errorf("%s is no file of at most %d bytes: %w", path, maxConfig, errdefs.ErrInvalidArgument)
		}
		data, err := os.ReadFile(path)
		return string(data), err
	}
	return "", nil
}

// run starts a plugin with its connection as file 3, and serves it to its end.
func (h *Host) run(ctx context.Context, path, index, base string, joined func()) error {
	config, err := h.pluginConfig(index, base)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	pair, err := nrinet.NewSocketPair()
	if err != nil {
		return err
	}
	defer pair.Close()
	conn, err := pair.LocalConn()
	if err != nil {
		return err
	}
	defer conn.Close()
	peer := pair.PeerFile()
	cmd := exec.Command(path)
	cmd.ExtraFiles = []*os.File{peer}
	cmd.Env = []string{api.PluginNameEnvVar + "=" + base, api.PluginIdxEnvVar + "=" + index, api.PluginSocketEnvVar + "=3"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	peer.Close()
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	h.wg.Go(func() { ended <- cmd.Wait() })
	err = h.plugin(ctx, conn, identity{index: index, base: base, config: config}, joined)
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // with all that it started
	return errors.Join(err, <-ended)
}
