package cripod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

// atOnce is how many pods are looked at together.
const atOnce = 32

// recoverLimit is how long a pod has to say how it is before clients are told
// that it is not ready; Serve goes on with it. Recover itself waits less, so
// that clients are answered (promise P12): for pods that are recovering, and for
// what is left of others to be gone.
const (
	recoverLimit   = 5 * time.Second
	recoverWait    = 300 * time.Millisecond
	recoverCleanup = 2 * time.Second
)

func (s *Service) isHalf(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.half[id] != nil
}

// keepHalf lists what is left of a pod, until it is gone.
func (s *Service) keepHalf(p *cristate.Pod) {
	id := p.ID()
	p.Change(func(_ *cristate.PodMeta, st *cristate.PodStatus) { st.State = cristate.PodUnknown })
	s.mu.Lock()
	s.half[id] = p
	s.mu.Unlock()
	if err := s.Pods.Add(p); err != nil && !errdefs.IsAlreadyExists(err) {
		s.Log.Error("list what is left of a pod", "pod", id, "err", err)
	}
	s.wake()
}

func (s *Service) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// Recover finds the pods there are (contract 7.3.30): what is stored says which,
// their controllers and the kernel say in what state. Those that were being made
// or removed are taken away; a pod whose state cannot be told in time, or that
// cannot be taken away now, is listed as not ready and Serve sees to it. It is
// called once, before any other method.
func (s *Service) Recover(ctx context.Context) error {
	v, err := s.Views.In(cristate.Namespace, "")
	if err != nil {
		return fmt.Errorf("recover pods: %w", err)
	}
	records, err := v.Sandboxes().List(ctx)
	if err != nil {
		return fmt.Errorf("recover pods: %w", err)
	}
	known, alone := map[string]bool{}, map[string]bool{}
	var whole, half []*cristate.Pod
	older, err := s.older(ctx, v, records)
	if err != nil {
		return fmt.Errorf("recover pods: %w", err)
	}
	for _, r := range append(records, older...) {
		known[r.ID] = true
		ext, ok := r.Extensions[cristate.ExtensionMetadata]
		if !ok {
			continue // somebody else's sandbox
		}
		meta, err := cristate.DecodePod(ext)
		if err != nil || meta.ID != r.ID {
			alone[r.ID] = true
			s.Log.Error("a pod's record cannot be read, the pod is left alone", "pod", r.ID, "err", err)
			continue
		}
		p := cristate.NewPod(meta, restored(r))
		if _, ok := r.Extensions[extensionIncomplete]; ok {
			half = append(half, p)
		} else if err := s.Pods.Add(p); err != nil {
			alone[r.ID] = true
			s.Log.Error("a pod's record is left alone", "pod", r.ID, "err", err)
		} else {
			whole = append(whole, p)
		}
	}
	// After the others: a name belongs to the pod that is complete.
	for _, p := range half {
		s.keepHalf(p)
	}
	s.sweep(known)
	asked := s.each(whole, func(p *cristate.Pod) {
		ctx, cancel := context.WithTimeout(s.life, recoverLimit)
		defer cancel()
		unlock, err := s.Pods.Lock(ctx, p.ID())
		if err != nil {
			s.unsure(p, err) // a client was faster, and is still at it
			return
		}
		defer unlock()
		if p.Status().State == cristate.PodRecovering {
			s.adopt(ctx, p, recoverLimit)
		}
	})
	gone := s.each(half, func(p *cristate.Pod) { _ = s.finish(s.life, p, undoLimit) }) // is logged
	for _, w := range []struct {
		done  <-chan struct{}
		limit time.Duration
	}{{asked, recoverWait}, {gone, recoverCleanup}} {
		limit := time.NewTimer(w.limit)
		select {
		case <-w.done:
		case <-limit.C:
		case <-ctx.Done():
		}
		limit.Stop()
	}
	s.Network.Reclaim(func(id string) bool { return alone[id] || s.isKnown(id) })
	return nil
}

// each calls fn for pods, several at once, until the service is closed. What it
// returns is closed when all calls have returned.
func (s *Service) each(pods []*cristate.Pod, fn func(*cristate.Pod)) <-chan struct{} {
	done := make(chan struct{})
	s.wg.Go(func() {
		defer close(done)
		var g errgroup.Group
		g.SetLimit(atOnce)
		for _, p := range pods {
			g.Go(func() error { fn(p); return nil })
		}
		_ = g.Wait() // of calls that have no error
	})
	return done
}

// older are records made of the containers of pods that have none: those of
// containerd before it kept sandboxes.
func (s *Service) older(ctx context.Context, v view.View, records []sandbox.Sandbox) (out []sandbox.Sandbox, err error) {
	err = v.Containers().Walk(ctx, func(c container.Container) error {
		ext, ok := c.Extensions[cristate.ExtensionPod]
		if ok && !slices.ContainsFunc(records, func(r sandbox.Sandbox) bool { return r.ID == string(c.ID) }) {
			out = append(out, sandbox.Sandbox{ID: string(c.ID), Sandboxer: cristate.SandboxerPodSandbox, Runtime: c.Runtime, CreatedAt: c.CreatedAt,
				Extensions: map[string]typed.Any{cristate.ExtensionMetadata: ext}})
		}
		return nil
	}, fmt.Sprintf("labels.%q==%s", cristate.LabelKind, cristate.KindSandbox))
	return out, err
}

// isKnown says whether there is still something of a pod.
func (s *Service) isKnown(id string) bool {
	p, err := s.Pods.Get(id)
	return err == nil && p.ID() == id || s.isHalf(id)
}

// restored is the status that a record tells; the rest is asked for.
func restored(r sandbox.Sandbox) cristate.PodStatus {
	st := cristate.PodStatus{State: cristate.PodRecovering, Sandboxer: r.Sandboxer, CreatedAt: r.CreatedAt}
	if st.Sandboxer == "" {
		st.Sandboxer = cristate.SandboxerPodSandbox
	}
	var u updated
	if x, ok := r.Extensions[ExtensionResources]; ok && json.Unmarshal(x.Value, &u) == nil {
		st.Overhead, st.Resources = u.Overhead, u.Resources
	}
	return st
}

// adopt finds out what state a pod is in, and has its end watched.
func (s *Service) adopt(ctx context.Context, p *cristate.Pod, limit time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	m := p.Meta()
	if s.Labels != nil && m.ProcessLabel != "" {
		s.Labels.Reserve(m.ProcessLabel)
	}
	st, err := s.ask(ctx, p)
	if err != nil {
		s.unsure(p, err)
		return
	}
	s.mu.Lock()
	delete(s.unknown, m.ID)
	s.mu.Unlock()
	ready := st.State == sandbox.StateReady
	if m.NetNSPath != "" && (ready || nspin.Pinned(m.NetNSPath)) { // one that has ended may not be disconnected yet
		if err := s.Network.Adopt(ctx, NetworkOf(m)); err != nil {
			s.Log.Warn("network of a pod", "pod", m.ID, "err", err)
		}
	}
	disconnected := m.NetNSPath != "" && !nspin.Pinned(m.NetNSPath)
	p.Change(func(m *cristate.PodMeta, now *cristate.PodStatus) {
		now.State, now.ExitedAt, now.Disconnected = cristate.PodNotReady, st.ExitedAt, disconnected
		if ready {
			now.State, now.Pid, now.Namespaces = cristate.PodReady, st.Pid, s.Dirs.joined(*m, st.Pid)
		}
		if !st.CreatedAt.IsZero() {
			now.CreatedAt = st.CreatedAt
		}
	})
	if ready {
		s.watch(m.ID)
	}
}

// unsure has Serve find out what state a pod is in, unless that is known now.
func (s *Service) unsure(p *cristate.Pod, why error) {
	m, st := p.Change(func(_ *cristate.PodMeta, st *cristate.PodStatus) {
		if st.State == cristate.PodRecovering {
			st.State = cristate.PodUnknown
		}
	})
	s.Log.Warn("state of a pod is not known", "pod", m.ID, "err", why)
	if st.State != cristate.PodUnknown {
		return
	}
	s.mu.Lock()
	s.unknown[m.ID] = p
	s.mu.Unlock()
	s.wake()
}

// ask asks the controller; a pod that it does not know has ended.
func (s *Service) ask(ctx context.Context, p *cristate.Pod) (sandbox.Status, error) {
	ctrl, err := s.controller(p.Status().Sandboxer)
	if err != nil {
		return sandbox.Status{}, err
	}
	st, err := ctrl.Status(ctx, p.ID(), false)
	if errdefs.IsNotFound(err) {
		return sandbox.Status{State: sandbox.StateNotReady}, nil
	}
	return st, err
}

// finish takes away what is left of a pod.
func (s *Service) finish(ctx context.Context, p *cristate.Pod, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	unlock, err := s.Pods.Lock(ctx, p.ID())
	if err == nil {
		defer unlock()
		if !s.isHalf(p.ID()) {
			return nil // the kubelet was faster
		}
		err = s.takeBack(ctx, p)
	}
	if err != nil {
		s.Log.Warn("take away a pod that did not come up", "pod", p.ID(), "err", err)
	}
	return err
}

// sweep removes directories of pods that have no record: they are made after
// it and removed before, so these are of pods that were removed without us.
func (s *Service) sweep(known map[string]bool) {
	for _, dir := range []string{s.Dirs.Root, s.Dirs.State} {
		entries, err := os.ReadDir(filepath.Join(dir, "sandboxes"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			s.Log.Warn("look for what is left of pods", "err", err)
		}
		for _, e := range entries {
			if known[e.Name()] {
				continue
			}
			if err := s.Dirs.remove(e.Name()); err != nil {
				s.Log.Warn("remove what is left of a pod", "pod", e.Name(), "err", err)
			}
		}
	}
}

// Serve sees to pods that could not be taken away, and to those whose state is
// not known, until both are settled, and waits for more. It returns when ctx is
// done.
func (s *Service) Serve(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	type try struct {
		at    time.Time
		pause time.Duration
		busy  bool
	}
	tries := map[string]*try{} // of this goroutine
	done := make(chan string)
	for {
		work, now, next := s.pending(), time.Now(), time.Hour
		maps.DeleteFunc(tries, func(id string, t *try) bool { return work[id] == nil && !t.busy })
		for id, do := range work {
			t := tries[id]
			if t == nil {
				t = &try{at: now.Add(firstPause), pause: firstPause}
				tries[id] = t
			}
			if t.busy {
				continue
			}
			if wait := t.at.Sub(now); wait > 0 {
				next = min(next, wait)
				continue
			}
			t.busy = true
			wg.Go(func() {
				do(ctx)
				select {
				case done <- id:
				case <-ctx.Done():
				}
			})
		}
		var after <-chan time.Time
		if len(work) > 0 {
			after = time.After(next)
		}
		select {
		case <-ctx.Done():
			return nil
		case id := <-done:
			t := tries[id]
			t.busy, t.pause = false, min(2*t.pause, mostPause)
			t.at = time.Now().Add(t.pause)
		case <-s.kick:
		case <-after:
		}
	}
}

// A pod is tried again after a pause, which grows.
const firstPause, mostPause = time.Second, time.Minute

// pending is what there is to do for pods, by their ids.
func (s *Service) pending() map[string]func(context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]func(context.Context){}
	for id, p := range s.unknown {
		out[id] = func(ctx context.Context) {
			if unlock, err := s.Pods.Lock(ctx, id); err == nil {
				defer unlock()
				if p.Status().State == cristate.PodUnknown {
					s.adopt(ctx, p, askLimit)
				}
			}
		}
	}
	for id, p := range s.half {
		out[id] = func(ctx context.Context) { _ = s.finish(ctx, p, undoLimit) } // is logged, and tried again
	}
	return out
}

// watch waits for a pod to end by itself.
func (s *Service) watch(id string) {
	p, err := s.Pods.Get(id)
	if err != nil {
		return
	}
	ctrl, err := s.controller(p.Status().Sandboxer)
	if err != nil {
		return
	}
	s.wg.Go(func() {
		exit, err := ctrl.Wait(s.life, id)
		if s.life.Err() != nil {
			return
		}
		if err != nil && !errdefs.IsNotFound(err) {
			// Nothing is known of it now: Serve finds out.
			s.Log.Warn("wait for the end of a pod", "pod", id, "err", err)
			_, st := p.Change(func(_ *cristate.PodMeta, st *cristate.PodStatus) {
				if st.State == cristate.PodReady {
					st.State = cristate.PodUnknown
				}
			})
			if st.State == cristate.PodUnknown {
				s.mu.Lock()
				s.unknown[id] = p
				s.mu.Unlock()
				s.wake()
			}
			return
		}
		if exit.At.IsZero() {
			exit.At = time.Now()
		}
		s.OnExit(id, exit)
		// What is left of its process is of no use any more.
		ctx, cancel := context.WithTimeout(s.life, endLimit)
		defer cancel()
		if err := ctrl.Stop(ctx, id, 0); err != nil {
			s.Log.Warn("clean up after the end of a pod", "pod", id, "err", err)
		}
	})
}

// OnExit notes that a pod's own process has ended. Its containers go on, until
// the kubelet stops the pod. It may be told more than once, and of pods that
// are not known.
func (s *Service) OnExit(id string, exit sandbox.Exit) {
	p, err := s.Pods.Get(id)
	if err != nil || p.ID() != id {
		return
	}
	s.ended(p, exit)
}
