package cricontainer

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// Stop ends a container: with its stop signal, and after grace with SIGKILL
// (contract 7.1.13). A container that does not run, or that is not there, is no
// error (13.26). Others may act on the container while it waits, among them a
// Stop with less grace.
func (s *Service) Stop(ctx context.Context, id string, grace time.Duration) error {
	c, err := s.Containers.Get(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	if _, err := s.settled(ctx, "stop", c.ID()); err != nil {
		return err
	}
	unlock, err := s.Containers.Lock(ctx, c.ID())
	if err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	if !running(c) {
		unlock()
		return nil
	}
	if grace > 0 {
		err = s.signal(ctx, c)
	}
	unlock()
	if err != nil {
		return fmt.Errorf("stop container %s: %w", c.ID(), err)
	}
	if grace > 0 {
		wait := time.NewTimer(grace)
		defer wait.Stop()
		select {
		case <-c.Gone():
		case <-wait.C:
		case <-ctx.Done():
			return fmt.Errorf("stop container %s: wait %s for its end after the stop signal: %w", c.ID(), grace, ctx.Err())
		}
	}
	if err := s.kill(ctx, c); err != nil {
		return fmt.Errorf("stop container %s: %w", c.ID(), err)
	}
	if pod := s.pod(c); s.NRI != nil && pod != nil {
		if err := s.NRI.StopContainer(ctx, pod, c); err != nil {
			s.Log.Warn("NRI: stop container", "container", c.ID(), "error", err)
		}
	}
	s.Faults.Pass("cri.container.stopped")
	return nil
}

func running(c *cristate.Container) bool {
	switch c.Status().State() {
	case runtime.ContainerState_CONTAINER_RUNNING, runtime.ContainerState_CONTAINER_UNKNOWN:
		return true
	}
	return false
}

// signal sends the stop signal, once in a container's life.
func (s *Service) signal(ctx context.Context, c *cristate.Container) error {
	s.mu.Lock()
	_, sent := s.signalled[c.ID()]
	s.mu.Unlock()
	if sent {
		return nil
	}
	m := c.Meta()
	sig, err := parseSignal(m.StopSignal)
	if name := m.Config.GetStopSignal(); name != runtime.Signal_SIGNAL_RUNTIME_DEFAULT {
		sig, err = parseSignal(strings.TrimPrefix(name.String(), "SIGNAL_"))
	}
	if err != nil {
		// An image may say anything; its container still has to stop.
		s.Log.Warn("stop signal", "container", c.ID(), "error", err)
		sig = unix.SIGTERM
	}
	if err := s.send(ctx, c.ID(), sig); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.signalled[c.ID()] = struct{}{}
	return nil
}

// parseSignal reads a name with or without SIG, or a number; "" is SIGTERM.
func parseSignal(name string) (unix.Signal, error) {
	if name == "" {
		return unix.SIGTERM, nil
	}
	if n, err := strconv.Atoi(name); err == nil {
		if n < 1 || n > 64 {
			return 0, fmt.Errorf("signal number %d: %w", n, errdefs.ErrInvalidArgument)
		}
		return unix.Signal(n), nil
	}
	full := strings.ToUpper(name)
	if !strings.HasPrefix(full, "SIG") {
		full = "SIG" + full
	}
	if n := unix.SignalNum(full); n != 0 {
		return n, nil
	}
	// The real-time ones: RTMIN, RTMIN+n, RTMAX-n, and the kubelet's RTMINPLUSn, RTMAXMINUSn.
	full = strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(full)
	for base, first := range map[string]int{"SIGRTMIN": 34, "SIGRTMAX": 64} {
		rest, ok := strings.CutPrefix(full, base)
		if !ok {
			continue
		}
		n := 0
		if rest != "" {
			var err error
			if n, err = strconv.Atoi(rest); err != nil || rest[0] != '+' && rest[0] != '-' {
				continue
			}
		}
		if first+n >= 34 && first+n <= 64 {
			return unix.Signal(first + n), nil
		}
	}
	return 0, fmt.Errorf("unknown signal %.40q: %w", name, errdefs.ErrInvalidArgument)
}

// send sends a signal to the first process. That it has ended already is no
// error. A shim's connection that broke is tried again (contract 7.1.13).
func (s *Service) send(ctx context.Context, id string, sig unix.Signal) error {
	var err error
	for try := range 4 {
		if try > 0 {
			if err := sleep(ctx, time.Duration(try)*50*time.Millisecond); err != nil {
				return err
			}
		}
		err = s.tasks().Kill(ctx, container.ID(id), "", uint32(sig), false)
		if err == nil || errdefs.IsNotFound(err) {
			return nil
		}
		if !errdefs.IsUnavailable(err) && !strings.Contains(err.Error(), "ttrpc: closed") {
			break
		}
	}
	return fmt.Errorf("send %s: %w", unix.SignalName(sig), err)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// kill sends SIGKILL until the container has ended, and learns of the end by
// asking if no event tells it.
func (s *Service) kill(ctx context.Context, c *cristate.Container) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.Limits.Kill, fmt.Errorf("the limit of %s for the end after SIGKILL: %w", s.Limits.Kill, context.DeadlineExceeded))
	defer cancel()
	var last error
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		select {
		case <-c.Gone():
			return nil
		default:
		}
		last = s.killOnce(ctx, c, pause)
		select {
		case <-c.Gone():
			return nil
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("wait for its end after SIGKILL: %w", context.Cause(ctx)), last)
		default:
		}
	}
}

func (s *Service) killOnce(ctx context.Context, c *cristate.Container, pause time.Duration) error {
	id := container.ID(c.ID())
	err := s.send(ctx, c.ID(), unix.SIGKILL)
	wait := time.NewTimer(pause)
	defer wait.Stop()
	select {
	case <-c.Gone():
		return nil
	case <-ctx.Done():
		return err
	case <-wait.C:
	}
	p, gerr := s.tasks().Get(ctx, id, "")
	switch {
	case errdefs.IsNotFound(gerr):
		s.lost(ctx, c)
	case gerr != nil:
		return errors.Join(err, gerr)
	case p.Status == task.StatusStopped:
		s.exited(ctx, c, task.Exit{ID: p.ID, Pid: p.Pid, Status: p.ExitStatus, At: p.ExitedAt})
	case p.Status == task.StatusPaused:
		return errors.Join(err, s.tasks().Resume(ctx, id)) // a frozen process does not die
	}
	return err
}

// Remove removes a container, and ends it before if it runs (contract 7.1.14).
// One that is not there is no error.
func (s *Service) Remove(ctx context.Context, id string) (err error) {
	c, err := s.Containers.Get(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	id = c.ID()
	unlock, err := s.Containers.Lock(ctx, id)
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	defer unlock()
	if now, gerr := s.Containers.Get(id); gerr != nil || now != c {
		return nil // somebody else did it
	}
	mark := func(on bool) error {
		return c.Mark(func(st *cristate.Status) error { st.Removing = on; return nil })
	}
	if err := mark(true); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("remove container %s: %w", id, err), mark(false))
		}
	}()
	if running(c) {
		if err := s.kill(ctx, c); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.Limits.Remove, fmt.Errorf("the limit of %s for a removal: %w", s.Limits.Remove, context.DeadlineExceeded))
	defer cancel()
	pod := s.pod(c)
	if s.NRI != nil && pod != nil {
		if err := s.NRI.RemoveContainer(ctx, pod, c); err != nil {
			s.Log.Warn("NRI: remove container", "container", id, "error", err)
		}
	}
	s.stopCopy(ctx, id)
	if err := s.endTask(ctx, id); err != nil {
		return err
	}
	if err := s.removeParts(ctx, id, c.Facts().Snapshotter, c.PodID()); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.signalled, id)
	s.mu.Unlock()
	s.Containers.Remove(id)
	s.notify(runtime.ContainerEventType_CONTAINER_DELETED_EVENT, c)
	return nil
}

// StopAll kills the containers of a pod, all at once.
func (s *Service) StopAll(ctx context.Context, podID string) error {
	return s.each(podID, func(id string) error { return s.Stop(ctx, id, 0) })
}

// RemoveAll removes the containers of a pod, all at once.
func (s *Service) RemoveAll(ctx context.Context, podID string) error {
	return s.each(podID, func(id string) error { return s.Remove(ctx, id) })
}

func (s *Service) each(podID string, fn func(id string) error) error {
	var wg sync.WaitGroup
	all := s.Containers.Where(cristate.InPod(podID))
	errs := make([]error, len(all))
	for i, c := range all {
		wg.Go(func() { errs[i] = fn(c.ID()) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// removeParts removes what a container consists of, or what is left of it. The
// record goes before what it names: a crash in between leaves only what the
// next start, or collection, finds ownerless.
func (s *Service) removeParts(ctx context.Context, id, snapshotter, podID string) error {
	if err := s.unmountImages(ctx, id, podID); err != nil {
		return err
	}
	if err := s.view.Containers().Delete(ctx, container.ID(id)); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	s.Faults.Pass("cri.container.record-deleted")
	if snapshotter != "" {
		store, err := s.view.Snapshots(snapshotter)
		if err == nil {
			err = store.Remove(ctx, id)
		}
		if err != nil && !errdefs.IsNotFound(err) {
			s.Log.Warn("remove the snapshot of a container: collection will do it", "container", id, "error", err)
		}
	}
	return s.removeDirs(id)
}
