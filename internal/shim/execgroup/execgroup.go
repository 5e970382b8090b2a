//go:build linux

// Package execgroup keeps each exec in a cgroup of its own below the container's,
// so that all that it starts can be found and killed (promise P17). With cgroup
// v1 that is only in the freezer's hierarchy: limits and accounting stay the
// container's. With v2 the group has no controllers, to the same effect.
package execgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/reaper"
)

// Freezer is the hierarchy of v1 that is used.
const Freezer = "freezer"

// Groups are those of the execs of one container. It is safe for concurrent
// use, and implements driver.ExecSignaller.
type Groups struct {
	// Find returns the container's directory, "" if there is none to use, and
	// the hierarchy that it is in; "" is v2's. It is called once.
	Find func() (dir, controller string)

	once             sync.Once
	base, controller string

	mu   sync.Mutex // guards left
	left map[string]bool
}

// killWithin bounds the repetition of a kill.
const killWithin = time.Second

// found says whether execs have groups; what dir needs is known then.
func (g *Groups) found() bool {
	g.once.Do(func() { g.base, g.controller = g.Find() })
	return g.base != ""
}

func (g *Groups) dir(id string) string { return filepath.Join(g.base, "exec-"+id) }

// Open makes the group of an exec: its name below the container's, and the
// hierarchy. "" if there is none; the exec is then to run in the container's.
func (g *Groups) Open(id string) (name, controller string) {
	if !g.found() || os.Mkdir(g.dir(id), 0o755) != nil {
		return "", ""
	}
	if g.controller == "" {
		// In a threaded group it could not hold a process.
		kind, err := os.ReadFile(filepath.Join(g.dir(id), "cgroup.type"))
		if err != nil || string(bytes.TrimSpace(kind)) != "domain" {
			os.Remove(g.dir(id))
			return "", ""
		}
	}
	return filepath.Base(g.dir(id)), g.controller
}

// SignalExec signals all processes of an exec. ErrNotFound if there are none.
func (g *Groups) SignalExec(id string, sig unix.Signal) error {
	if !g.found() {
		return fmt.Errorf("exec %s has no cgroup: %w", id, errdefs.ErrNotFound)
	}
	dir := g.dir(id)
	pids, err := cgroups.GetPids(dir)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(pids) == 0 {
		return fmt.Errorf("cgroup of exec %s is empty: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("processes of exec %s: %w", id, err)
	}
	write := func(file, text string) error { return os.WriteFile(filepath.Join(dir, file), []byte(text), 0) }
	if sig == unix.SIGKILL && g.controller == "" && write("cgroup.kill", "1") == nil {
		return nil
	}
	for deadline := time.Now().Add(killWithin); ; time.Sleep(time.Millisecond) {
		if sig == unix.SIGKILL && g.controller == Freezer {
			// What is frozen starts no other; a kill is obeyed at the thaw.
			_ = write("freezer.state", "FROZEN")
			pids, err = cgroups.GetPids(dir)
		}
		for _, pid := range pids {
			_ = reaper.Kill(pid, sig)
		}
		if sig == unix.SIGKILL && g.controller == Freezer {
			_ = write("freezer.state", "THAWED")
		}
		if sig != unix.SIGKILL {
			return nil
		}
		if pids, err = cgroups.GetPids(dir); err != nil || alive(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes of exec %s survive a kill: %w", len(pids), id, errdefs.ErrUnavailable)
		}
	}
}

// alive counts those that are more than an entry for their parent.
func alive(pids []int) int {
	n := 0
	for _, pid := range pids {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if i := bytes.LastIndexByte(stat, ')'); err == nil && i >= 0 && i+2 < len(stat) && stat[i+2] != 'Z' && stat[i+2] != 'X' {
			n++
		}
	}
	return n
}

// ForgetExec removes the group of an exec, and those before it in which something
// ran on. What never ends is removed with the container.
func (g *Groups) ForgetExec(id string) {
	if !g.found() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.left == nil {
		g.left = map[string]bool{}
	}
	g.left[id] = true
	for id := range g.left {
		if err := unix.Rmdir(g.dir(id)); err == nil || errors.Is(err, unix.ENOENT) {
			delete(g.left, id)
		}
	}
}
