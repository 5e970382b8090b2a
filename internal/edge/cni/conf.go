package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/containerd/errdefs"
	gocni "github.com/containerd/go-cni"
	"github.com/containernetworking/cni/libcni"
	"github.com/fsnotify/fsnotify"

	"github.com/gantryd/gantry/internal/lib/atomicfile"
)

const (
	// settle is how long a burst of changes is waited for.
	settle = 20 * time.Millisecond
	// again is when the configuration is read without having been told to, and
	// poll is that when the kernel tells nothing.
	again, poll = 10 * time.Second, 200 * time.Millisecond
	// statusLimit is how long plugins may take to tell their status.
	statusLimit = 5 * time.Second
	// generated is the file that is made of the template.
	generated = "10-containerd-net.conflist"
)

// conf is a directory of configurations; Network.mu guards what was loaded.
type conf struct {
	dir string // as the kernel's events spell it
	max int

	networks []attachment
	info     Info
	err      error // why there are none
}

// conf returns that of a runtime handler.
func (n *Network) conf(handler string) *conf {
	if c, ok := n.confs[handler]; ok { // the map never changes
		return c
	}
	return n.confs[""]
}

// reload reads all directories.
func (n *Network) reload() {
	n.loading.Lock() // what was read later is not replaced by what was read before
	defer n.loading.Unlock()
	for name, c := range n.confs {
		networks, info, err := n.load(c)
		n.mu.Lock()
		was := c.info.LoadStatus
		c.networks, c.info, c.err = networks, info, err
		n.mu.Unlock()
		switch {
		case was == info.LoadStatus:
		case err != nil:
			n.o.Log.Warn("cni: no network for pods", "dir", c.dir, "handler", name, "err", err)
		default:
			n.o.Log.Info("cni: networks are configured", "dir", c.dir, "handler", name)
		}
	}
}

func (n *Network) load(c *conf) ([]attachment, Info, error) {
	opts := []gocni.Opt{gocni.WithDefaultConf}
	if !n.o.Config.UseInternalLoopback {
		opts = slices.Insert(opts, 0, gocni.WithLoNetwork)
	}
	lib, err := gocni.New(gocni.WithMinNetworkCount(len(opts)), gocni.WithPluginConfDir(c.dir),
		gocni.WithPluginMaxConfNum(c.max), gocni.WithPluginDir(n.o.Config.BinDirs))
	if err != nil {
		return nil, Info{LoadStatus: err.Error()}, err
	}
	err = lib.Load(opts...)
	info := Info{Config: lib.GetConfig(), LoadStatus: "OK"}
	var networks []attachment
	if err == nil {
		networks, err = attachments(info.Config)
	}
	if err != nil {
		info.LoadStatus = err.Error()
		return nil, info, fmt.Errorf("%w: %v: %w", gocni.ErrCNINotInitialized, err, errdefs.ErrUnavailable)
	}
	return networks, info, nil
}

// attachments makes each network one list that holds all of its plugins, those
// that stood in files of their own too.
func attachments(c *gocni.ConfigResult) ([]attachment, error) {
	var all []attachment
	for _, nw := range c.Networks {
		list := map[string]any{}
		if err := json.Unmarshal([]byte(nw.Config.Source), &list); err != nil {
			return nil, fmt.Errorf("network %q: %w", nw.Config.Name, err)
		}
		var plugins []json.RawMessage
		for _, p := range nw.Config.Plugins {
			plugins = append(plugins, json.RawMessage(p.Source))
		}
		list["plugins"] = plugins
		data, err := json.Marshal(list)
		if err != nil {
			return nil, fmt.Errorf("network %q: %w", nw.Config.Name, err)
		}
		all = append(all, attachment{IfName: nw.IFName, Conf: data})
	}
	return all, nil
}

// Status returns nil if pods of the runtime handler can have networks.
// ErrUnavailable: there is no configuration; or what a plugin says that knows
// the command STATUS. It takes five seconds at most. Contract 7.1.2.
func (n *Network) Status(ctx context.Context, handler string) error {
	networks, err := n.networks(handler)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, statusLimit)
	defer cancel()
	for _, a := range networks {
		list, err := libcni.ConfListFromBytes(a.Conf)
		if err == nil {
			err = n.lib.GetStatusNetworkList(ctx, list)
		}
		if err != nil {
			return fmt.Errorf("network for %s: %w", a.IfName, err)
		}
	}
	return nil
}

// Info tells what is loaded, by runtime handler; that of all which have none
// of their own is "default". Contract 7.1.2.
func (n *Network) Info() map[string]Info {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := map[string]Info{}
	for name, c := range n.confs {
		if name == "" {
			name = "default"
		}
		all[name] = c.info
	}
	return all
}

// watch reloads the configuration when it changes, however its directories
// come and go, until ctx is done.
func (n *Network) watch(ctx context.Context) {
	w, err := fsnotify.NewWatcher()
	every := again
	if err != nil {
		n.o.Log.Warn("cni: configuration cannot be watched, it is polled", "every", poll, "err", err)
		w, every = &fsnotify.Watcher{}, poll
	} else {
		defer w.Close()
	}
	var dirs []string
	for {
		if err == nil {
			dirs = n.arm(w)
		}
		n.reload() // after arming: nothing falls in between
		if !changed(ctx, w, dirs, time.After(every)) {
			return
		}
	}
}

// changed waits for a change in dirs or on the way to them, and for the burst of
// changes to end. It returns false when ctx is done.
func changed(ctx context.Context, w *fsnotify.Watcher, dirs []string, tick <-chan time.Time) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick:
			return true
		case <-w.Errors: // some events are lost
			return true
		case e := <-w.Events:
			concerns := func(dir string) bool {
				return strings.HasPrefix(e.Name, dir+"/") || strings.HasPrefix(dir+"/", e.Name+"/")
			}
			if !slices.ContainsFunc(dirs, concerns) {
				continue // somebody else's file beside a directory
			}
		}
		break
	}
	over := time.After(settle)
	for {
		select {
		case <-ctx.Done():
			return false
		case <-w.Events:
		case <-over:
			return true
		}
	}
}

// arm watches the directories and all on the way to them, and returns them. A
// watch goes along with a directory that is moved away, so all are made anew.
func (n *Network) arm(w *fsnotify.Watcher) (dirs []string) {
	for _, dir := range w.WatchList() {
		_ = w.Remove(dir) // it may be gone, and its watch with it
	}
	for _, c := range n.confs {
		dirs = append(dirs, ways(c.dir)...)
	}
	for _, dir := range dirs {
		for last := ""; dir != last; last, dir = dir, filepath.Dir(dir) {
			if err := w.Add(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				n.o.Log.Warn("cni: watch configuration", "dir", dir, "err", err)
			}
		}
	}
	return dirs
}

// ways are the paths that lead to dir, or would if all of it were there: its
// own and, for each link on it, that which the link stands for.
func ways(dir string) []string {
	all := []string{dir}
	for at := 1; at < len(dir) && len(all) < 40; {
		at++
		if at < len(dir) && dir[at] != '/' {
			continue
		}
		to, err := os.Readlink(dir[:at])
		if err != nil {
			continue
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(dir[:at]), to)
		}
		dir, at = filepath.Join(to, dir[at:]), 1
		all = append(all, dir)
	}
	return all
}

// UpdatePodCIDR writes the configuration from the template for the ranges of
// addresses that the node's pods have, separated by commas; unless there is no
// template, or a configuration already. ErrInvalidArgument. Contract 7.1.4.
func (n *Network) UpdatePodCIDR(ctx context.Context, cidrs string) (err error) {
	if cidrs == "" {
		return nil
	}
	data := struct {
		PodCIDR       string
		PodCIDRRanges []string
		Routes        []string
	}{}
	routes := map[string]bool{}
	for s := range strings.SplitSeq(cidrs, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(s))
		if err != nil {
			return fmt.Errorf("range of pods %.80q is no network such as 10.0.0.0/16: %w", s, errdefs.ErrInvalidArgument)
		}
		data.PodCIDRRanges = append(data.PodCIDRRanges, p.String())
		if p.Addr().Unmap().Is4() {
			routes["0.0.0.0/0"] = true
		} else {
			routes["::/0"] = true
		}
	}
	data.PodCIDR, data.Routes = data.PodCIDRRanges[0], slices.Sorted(maps.Keys(routes))
	from := n.o.Config.ConfTemplate
	if from == "" {
		n.o.Log.Info("cni: no conf_template is configured, somebody else writes the configuration")
		return nil
	}
	start := time.Now()
	err = n.Status(ctx, "")
	n.counters.done(opStatus, start, err)
	if err != nil {
		n.reload()
		err = n.Status(ctx, "")
	}
	if err == nil {
		n.o.Log.Info("cni: there is a configuration, conf_template is not used", "template", from)
		return nil
	}
	tmpl, err := template.ParseFiles(from)
	if err != nil {
		return fmt.Errorf("conf_template: %v: %w", err, errdefs.ErrFailedPrecondition)
	}
	var text bytes.Buffer
	if err := tmpl.Execute(&text, data); err != nil {
		return fmt.Errorf("conf_template %s: %v: %w", from, err, errdefs.ErrFailedPrecondition)
	}
	if _, err := libcni.ConfListFromBytes(text.Bytes()); err != nil {
		return fmt.Errorf("conf_template %s: what it makes is no list of plugins: %v: %w", from, err, errdefs.ErrFailedPrecondition)
	}
	dir := n.o.Config.ConfDir
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("configuration from %s: %w", from, err)
	}
	n.generate.Lock()
	err = atomicfile.Write(filepath.Join(dir, generated), text.Bytes(), 0o644)
	n.generate.Unlock()
	if err != nil {
		return fmt.Errorf("configuration from %s: %w", from, err)
	}
	n.reload()
	return nil
}
