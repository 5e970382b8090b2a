package cni

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/gantryd/gantry/internal/lib/keymutex"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

const (
	defaultInterface = "eth0"
	loopbackName     = "lo"
	// atOnce is how many deletions Run has under way.
	atOnce = 32
)

// Network gives pods their networks. It is safe for concurrent use; calls for
// one pod follow one another, those for two never meet.
type Network struct {
	o        Options
	store    store
	lib      *libcni.CNIConfig
	ops      keymutex.Map
	kick     chan struct{} // something is due sooner than Run knows
	counters counters
	loading  sync.Mutex // one reads the configuration at a time
	generate sync.Mutex // one writes it from the template at a time

	mu      sync.Mutex // guards the maps and what they hold; no I/O under it
	confs   map[string]*conf
	intents map[string]*held
}

// Open reads the intents and the configuration, and ends plugins that a
// predecessor left running: nobody waits for them, and what they were adding
// is yet to be deleted.
func Open(o Options) (*Network, error) {
	if o.Limit <= 0 {
		o.Limit = 2 * time.Minute
	}
	if o.Retry <= 0 {
		o.Retry = time.Second
	}
	if o.CacheDir == "" {
		o.CacheDir = libcni.CacheDir
	}
	if !slices.Contains([]string{"", "ipv4", "ipv6", "cni"}, o.Config.IPPref) {
		o.Log.Warn("cni: ip_pref is unknown, ipv4 is preferred", "ip_pref", o.Config.IPPref)
	}
	n := &Network{o: o, counters: newCounters(o.Metrics), store: store{o.Dir}, kick: make(chan struct{}, 1), confs: map[string]*conf{}}
	n.lib = libcni.NewCNIConfigWithCacheDir(o.Config.BinDirs, o.CacheDir, &plugins{log: o.Log})
	var err error
	n.intents, err = n.store.load(func(err error) { o.Log.Error("cni: intent is ignored", "err", err) })
	if err != nil {
		return nil, fmt.Errorf("open networks of pods: %w", err)
	}
	interrupted := map[string]bool{}
	for id, h := range n.intents {
		if h.state != stateAdded {
			interrupted[id] = true
		}
	}
	if len(interrupted) > 0 {
		kill(func(environ []string) bool {
			return lookup(environ, callEnv) != "" && interrupted[lookup(environ, "CNI_CONTAINERID")]
		})
	}
	n.confs[""] = &conf{dir: clean(o.Config.ConfDir), max: o.Config.MaxConfNum}
	for name, h := range o.PerRuntime {
		if h.ConfDir == "" {
			continue
		}
		c := &conf{dir: clean(h.ConfDir), max: o.Config.MaxConfNum}
		if h.MaxConfNum != 0 {
			c.max = h.MaxConfNum
		}
		n.confs[name] = c
	}
	n.reload()
	return n, nil
}

// clean is filepath.Clean, which would make the working directory of none.
func clean(dir string) string {
	if dir == "" {
		return ""
	}
	return filepath.Clean(dir)
}

// Setup adds p to its networks. After an error p is in none, or will be
// deleted from all as Teardown does it, which the caller may wait for by
// calling that. ErrUnavailable (no configuration), ErrInvalidArgument,
// ErrAlreadyExists; ErrDeadlineExceeded names plugin, pod and stage. Contract
// 7.3.21, 7.3.22.
func (n *Network) Setup(ctx context.Context, p Pod) (res Result, err error) {
	defer func(start time.Time) { n.counters.done(opSetup, start, err) }(time.Now())
	networks, err := n.networks(p.Handler)
	in, ierr := intentOf(p, networks)
	if ierr != nil {
		return Result{}, ierr
	}
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", in, err)
	}
	unlock, err := n.lock(ctx, in)
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	ctx, cancel := n.limit(ctx)
	defer cancel()
	if err := n.keep(in); err != nil {
		return Result{}, err
	}
	n.o.Faults.Pass("cni.intent")
	defer func() {
		if err != nil {
			n.mu.Lock()
			h := n.intents[in.ID]
			h.next, h.last = time.Now().Add(n.o.Retry), err // the caller comes first
			n.mu.Unlock()
			n.mark(h)
		}
	}()
	if n.o.Config.UseInternalLoopback {
		if err := loopback(in.NetNS); err != nil {
			return Result{}, fmt.Errorf("%s: bring up the loopback interface: %w", in, err)
		}
	}
	answers, err := n.add(ctx, in)
	if err != nil {
		return Result{}, err
	}
	if res, err = resultOf(in, answers, n.o.Config.IPPref); err != nil {
		return Result{}, err
	}
	n.o.Faults.Pass("cni.added")
	return res, n.move(n.held(in.ID), stateAdded)
}

// networks are those that the configuration of a runtime handler has now.
func (n *Network) networks(handler string) ([]attachment, error) {
	c := n.conf(handler)
	n.mu.Lock()
	defer n.mu.Unlock()
	return c.networks, c.err
}

// keep stores a new intent.
func (n *Network) keep(in *intent) error {
	if n.held(in.ID) != nil {
		return fmt.Errorf("%s: its network: %w", in, errdefs.ErrAlreadyExists)
	}
	if err := n.store.create(in); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.intents[in.ID] = &held{intent: *in, state: stateAdding}
	return nil
}

// Adopt remembers the network of a pod that somebody else has set up, so that
// Teardown deletes it, by the configuration that there is, or will be. It is no
// error if it is known.
func (n *Network) Adopt(ctx context.Context, p Pod) error {
	if n.held(p.ID) != nil {
		return nil
	}
	networks, _ := n.networks(p.Handler) // without, Teardown looks again
	in, err := intentOf(p, networks)
	if err != nil {
		return err
	}
	unlock, err := n.lock(ctx, in)
	if err != nil {
		return err
	}
	defer unlock()
	if err := n.keep(in); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	return n.move(n.held(in.ID), stateAdded)
}

func (n *Network) held(id string) *held {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.intents[id]
}

func (n *Network) lock(ctx context.Context, in *intent) (func(), error) {
	unlock, err := n.ops.Lock(ctx, in.ID)
	if err == nil {
		return unlock, nil
	}
	before := "adds it or deletes it"
	n.mu.Lock()
	if h := n.intents[in.ID]; h != nil && h.last != nil {
		before = fmt.Sprintf("tries again after: %v", h.last)
	}
	n.mu.Unlock()
	return nil, fmt.Errorf("%s: wait for its network, another operation %s: %w", in, before, err)
}

func (n *Network) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, n.o.Limit, fmt.Errorf("the limit of %s for plugins is over: %w", n.o.Limit, context.DeadlineExceeded))
}

// move changes the state. The pod's lock is held.
func (n *Network) move(h *held, to string) error {
	if h.state == to {
		return nil
	}
	if err := n.store.move(h.ID, h.state, to); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h.state = to
	return nil
}

// mark has h deleted, now or after a restart. If that cannot be written the
// deletion happens all the same.
func (n *Network) mark(h *held) {
	if err := n.move(h, stateDeleting); err != nil {
		n.o.Log.Warn("cni: keep that a network is to be deleted", "pod", h.ID, "err", err)
		n.mu.Lock()
		defer n.mu.Unlock()
		h.state = stateDeleting
	}
	n.wake()
}

func (n *Network) wake() {
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

// add runs the networks' plugins, each network on its own unless it is
// configured otherwise. All of them have ended when it returns.
func (n *Network) add(ctx context.Context, in *intent) ([]types.Result, error) {
	answers, errs := make([]types.Result, len(in.Networks)), make([]error, len(in.Networks))
	one := func(i int) {
		list, err := libcni.ConfListFromBytes(in.Networks[i].Conf)
		if err == nil {
			answers[i], err = n.lib.AddNetworkList(ctx, list, in.runtimeConf(in.Networks[i].IfName, false))
		}
		if err != nil {
			errs[i] = fmt.Errorf("%s: add %s: %w", in, in.Networks[i].IfName, err)
		}
	}
	var wg sync.WaitGroup
	for i := range in.Networks {
		if !n.o.Config.SetupSerially {
			wg.Go(func() { one(i) })
		} else if one(i); errs[i] != nil {
			break
		}
	}
	wg.Wait()
	return answers, errors.Join(errs...)
}

// Teardown deletes the pod's networks, by the configuration they were added
// with, and forgets them. An id without any is no error. After an error it is
// tried again, by Run and by whoever calls, until it succeeds; nothing else of
// the pod has to be kept for that, its network namespace neither.
func (n *Network) Teardown(ctx context.Context, id string) error {
	h := n.held(id)
	if h == nil {
		return nil
	}
	return n.teardown(ctx, h)
}

func (n *Network) teardown(ctx context.Context, h *held) (err error) {
	unlock, err := n.lock(ctx, &h.intent)
	if err != nil {
		return err
	}
	defer unlock()
	if n.held(h.ID) != h {
		return nil // another call was first
	}
	defer func(start time.Time) { n.counters.done(opTeardown, start, err) }(time.Now())
	n.mark(h)
	ctx, cancel := n.limit(ctx)
	defer cancel()
	var errs []error
	networks := h.Networks
	if len(networks) == 0 { // it was adopted
		if networks, err = n.networks(h.Handler); err != nil {
			errs = append(errs, fmt.Errorf("%s: delete its network: %w", &h.intent, err))
		}
	}
	for _, a := range slices.Backward(networks) { // one that fails does not keep the others
		list, err := libcni.ConfListFromBytes(a.Conf)
		if err == nil {
			err = n.lib.DelNetworkList(ctx, list, h.runtimeConf(a.IfName, true))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: delete %s: %w", &h.intent, a.IfName, err))
		}
	}
	err = errors.Join(errs...)
	if err == nil {
		n.o.Faults.Pass("cni.deleted")
		err = n.store.remove(h.ID, stateDeleting)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err != nil {
		h.next, h.last = time.Now().Add(after(n.o.Retry, h.tries)), err
		h.tries++
		n.wake()
		return err
	}
	delete(n.intents, h.ID)
	return nil
}

// Forget gives up a network that cannot be deleted: what its plugins hold
// stays. It is for the operator who knows better.
func (n *Network) Forget(ctx context.Context, id string) error {
	h := n.held(id)
	if h == nil {
		return fmt.Errorf("network of pod %s: %w", id, errdefs.ErrNotFound)
	}
	unlock, err := n.lock(ctx, &h.intent)
	if err != nil {
		return err
	}
	defer unlock()
	n.mu.Lock()
	state := h.state
	n.mu.Unlock()
	if err := n.store.remove(id, state); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.intents, id)
	return nil
}

// Reclaim has Run delete the networks of all pods that are not to be kept. It
// does not wait.
func (n *Network) Reclaim(keep func(id string) bool) {
	n.mu.Lock()
	ids := slices.Collect(maps.Keys(n.intents))
	n.mu.Unlock()
	for _, id := range ids {
		if keep(id) {
			continue
		}
		n.mu.Lock()
		if h := n.intents[id]; h != nil && h.state != stateDeleting {
			h.next = time.Now()
			h.last = fmt.Errorf("its pod is not there: %w", errdefs.ErrNotFound)
			h.reclaim = true
		}
		n.mu.Unlock()
	}
	n.wake()
}

// Intents lists what was added and not deleted yet, in the order of ids.
func (n *Network) Intents() []Intent {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []Intent
	for _, h := range n.intents {
		i := Intent{ID: h.ID, Name: h.Name, Namespace: h.Namespace, NetNS: h.NetNS, Deleting: h.state == stateDeleting || h.reclaim, Tries: h.tries}
		if h.last != nil {
			i.Last = h.last.Error()
		}
		all = append(all, i)
	}
	slices.SortFunc(all, func(a, b Intent) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// Run watches the configuration and deletes what is to be deleted. It returns
// when ctx is done and the plugins that it runs have ended.
func (n *Network) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { n.watch(ctx) })
	slots := make(chan struct{}, atOnce)
	for {
		due, wait := n.due()
		for _, h := range due {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
			wg.Go(func() {
				defer func() { <-slots }()
				err := n.teardown(ctx, h)
				n.mu.Lock()
				h.busy = false
				tries := h.tries
				n.mu.Unlock()
				n.wake()
				switch {
				case ctx.Err() != nil:
				case err != nil:
					n.o.Log.Warn("cni: delete network, will try again", "tries", tries, "err", err)
				default:
					n.o.Log.Info("cni: network is deleted", "pod", h.ID, "name", h.Name, "namespace", h.Namespace)
				}
			})
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-n.kick:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// due returns what is to be deleted now, and when to look again.
func (n *Network) due() (due []*held, wait time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	wait = time.Hour
	for _, h := range n.intents {
		if h.busy || h.state != stateDeleting && !h.reclaim {
			continue
		}
		if left := time.Until(h.next); left > 0 {
			wait = min(wait, left)
			continue
		}
		h.busy = true
		due = append(due, h)
	}
	return due, wait
}

// loopback brings up the interface of a namespace.
func loopback(netns string) error {
	return nspin.Enter(map[nspin.Kind]string{nspin.Net: netns}, func() error {
		lo, err := netlink.LinkByName(loopbackName)
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
}
