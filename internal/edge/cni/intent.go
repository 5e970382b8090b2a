package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/gantryd/gantry/internal/lib/atomicfile"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

// The states of an intent are the endings of its file's name, so that one
// rename changes them. Only the making of the file is synced: when power is
// lost, so are the namespaces, and a deletion in an earlier state is as good.
const (
	stateAdding   = ".add" // a plugin may be running
	stateAdded    = ".up"
	stateDeleting = ".del"
)

const maxIntent = 4 << 20

// intent is what is stored before the first plugin runs: all that is needed
// to delete it again. Its values do not change.
type intent struct {
	ID        string                     `json:"id"`
	Name      string                     `json:"name"`
	Namespace string                     `json:"namespace"`
	Handler   string                     `json:"handler,omitempty"`
	NetNS     string                     `json:"netns"`
	Args      [][2]string                `json:"args"`
	Caps      map[string]json.RawMessage `json:"capabilities"`
	Networks  []attachment               `json:"networks"` // none: those of then
}

// attachment is one interface and the list of plugins that make it.
type attachment struct {
	IfName string          `json:"ifName"`
	Conf   json.RawMessage `json:"conf"`
}

func (i *intent) String() string { return fmt.Sprintf("pod %s/%s (%s)", i.Namespace, i.Name, i.ID) }

// runtimeConf is what the plugins are told besides their configuration. The
// namespace is left out when it is gone, which tells them to do without.
func (i *intent) runtimeConf(ifName string, del bool) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{ContainerID: i.ID, NetNS: i.NetNS, IfName: ifName, Args: i.Args, CapabilityArgs: map[string]any{}}
	if del && !nspin.Pinned(i.NetNS) {
		rt.NetNS = ""
	}
	for name, v := range i.Caps {
		rt.CapabilityArgs[name] = v
	}
	return rt
}

// held is an intent and what became of it; Network.mu guards the rest.
type held struct {
	intent
	state string
	tries int
	last  error
	next  time.Time // of the next deletion, when nobody asks for it before
	busy  bool      // Run is deleting it
	// reclaim is a deletion that is not written down yet.
	reclaim bool
}

// store keeps the files of intents. Calls for one id are kept apart by their caller.
type store struct{ dir string }

func (s store) path(id, state string) string { return filepath.Join(s.dir, id+state) }

func (s store) create(i *intent) error {
	if len(i.ID) > 128 || utils.ValidateContainerID(i.ID) != nil {
		return fmt.Errorf("%s: the id cannot name a network: %w", i, errdefs.ErrInvalidArgument)
	}
	data, err := json.Marshal(i)
	if err == nil && len(data) > maxIntent {
		err = fmt.Errorf("%d bytes: %w", len(data), errdefs.ErrInvalidArgument)
	}
	if err == nil {
		err = atomicfile.Write(s.path(i.ID, stateAdding), data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("%s: keep its network's intent: %w", i, err)
	}
	return nil
}

func (s store) move(id, from, to string) error {
	if err := os.Rename(s.path(id, from), s.path(id, to)); err != nil {
		return fmt.Errorf("network of pod %s: %w", id, err)
	}
	return nil
}

func (s store) remove(id, state string) error {
	if err := os.Remove(s.path(id, state)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network of pod %s: %w", id, err)
	}
	return nil
}

// load reads all. A file that cannot be read is reported and left. No plugin
// has run for one that a crash left unfinished.
func (s store) load(report func(error)) (map[string]*held, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	all := map[string]*held{}
	for _, e := range entries {
		if atomicfile.Unfinished(e.Name()) {
			if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil {
				report(err)
			}
			continue
		}
		state := filepath.Ext(e.Name())
		if state != stateAdding && state != stateAdded && state != stateDeleting {
			continue
		}
		h := &held{state: state}
		if err := s.read(e.Name(), &h.intent); err != nil {
			report(err)
			continue
		}
		all[h.ID] = h
	}
	return all, nil
}

func (s store) read(name string, into *intent) error {
	path := filepath.Join(s.dir, name)
	if fi, err := os.Lstat(path); err != nil || !fi.Mode().IsRegular() || fi.Size() > maxIntent {
		return fmt.Errorf("network intent %s is no file of a usual size: %w", path, errors.Join(err, errdefs.ErrDataLoss))
	}
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, into)
	}
	if err == nil && into.ID != strings.TrimSuffix(name, filepath.Ext(name)) {
		err = fmt.Errorf("it is of pod %q: %w", into.ID, errdefs.ErrDataLoss)
	}
	if err != nil {
		return fmt.Errorf("network intent %s: %w", path, err)
	}
	return nil
}
