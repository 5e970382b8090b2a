package cricontainer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/attempt"
)

// cleanup is how long is tried to take back what did not succeed.
const cleanup = 30 * time.Second

// Start starts a container that was created. One that cannot be started has
// exited, with code 128 and reason StartError (contract 7.1.12). One whose start
// the last daemon was killed in, and that runs, is started (promise P5).
// ErrNotFound; ErrFailedPrecondition in another state, or if the pod is not ready.
func (s *Service) Start(ctx context.Context, id string) error {
	c, err := s.Containers.Get(id)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	id = c.ID()
	if done, err := s.resumed(ctx, id); done || err != nil {
		return err
	}
	unlock, err := s.Containers.Lock(ctx, id)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	// What was begun is also ended when the caller's time is up, which takes as
	// long as the sick part of it does.
	var stage attempt.Stage
	ended := make(chan error, 1)
	s.starts.Go(func() {
		defer unlock()
		ended <- s.start(ctx, &stage, c)
	})
	select {
	case err = <-ended:
		return err
	case <-ctx.Done():
	}
	at := stage.String()
	wait := time.NewTimer(settling)
	defer wait.Stop()
	select {
	case err = <-ended: // as a rule, it says more
		return err
	case <-wait.C:
		return fmt.Errorf("start container %s (%s): %w", id, at, ctx.Err())
	}
}

// settling is how long a call whose time is up waits for its own end.
const settling = 20 * time.Millisecond

// start does it. The caller holds the container's lock.
func (s *Service) start(ctx context.Context, stage *attempt.Stage, c *cristate.Container) error {
	id, pod := c.ID(), s.pod(c)
	if pod == nil || pod.Status().State != cristate.PodReady {
		return fmt.Errorf("start container %s: its pod %s is not ready: %w", id, c.Meta().SandboxID, errdefs.ErrFailedPrecondition)
	}
	err := c.Mark(func(st *cristate.Status) error {
		if st.Removing || st.Starting || st.State() != runtime.ContainerState_CONTAINER_CREATED {
			return fmt.Errorf("start container %s: it is %s: %w", id, st.State(), errdefs.ErrFailedPrecondition)
		}
		st.Starting = true
		return nil
	})
	if err != nil {
		return err
	}
	over := make(chan struct{})
	s.mu.Lock()
	s.starting[id] = over
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.starting, id)
		s.mu.Unlock()
		close(over)
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, s.Limits.Start, fmt.Errorf("the limit of %s for a start: %w", s.Limits.Start, context.DeadlineExceeded))
	defer cancel()
	pid, err := s.launch(ctx, stage, pod, c)
	if err == nil {
		if err = c.Change(func(st *cristate.Status) error {
			st.Starting, st.Pid, st.StartedAt = false, pid, time.Now().UnixNano()
			return nil
		}); err == nil {
			s.Faults.Pass("cri.container.task-started")
			s.notify(runtime.ContainerEventType_CONTAINER_STARTED_EVENT, c)
			if s.NRI != nil {
				s.NRI.PostStartContainer(ctx, pod, c)
			}
			return nil
		}
	}
	stage.Enter("remove its task")
	back, stop := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer stop()
	if cerr := s.endTask(back, id); cerr != nil {
		s.Log.Warn("remove the task of a container that did not start", "container", id, "error", cerr)
	}
	s.stopCopy(back, id)
	failed := func(st *cristate.Status) error {
		st.Starting, st.Pid, st.FinishedAt = false, 0, time.Now().UnixNano()
		st.ExitCode, st.Reason, st.Message = cristate.ExitStartError, cristate.ReasonStartError, err.Error()
		return nil
	}
	if cerr := c.Change(failed); cerr != nil {
		err = errors.Join(err, cerr)
		if merr := c.Mark(func(st *cristate.Status) error { st.Starting = false; return nil }); merr != nil {
			err = errors.Join(err, merr)
		}
	} else {
		s.ended(c)
	}
	return fmt.Errorf("start container %s: %w", id, err)
}

// launch makes the task and starts it.
func (s *Service) launch(ctx context.Context, stage *attempt.Stage, pod *cristate.Pod, c *cristate.Container) (uint32, error) {
	id := container.ID(c.ID())
	if s.NRI != nil {
		stage.Enter("ask the NRI plugins")
		if err := s.NRI.StartContainer(ctx, pod, c); err != nil {
			return 0, err
		}
	}
	stage.Enter("prepare its task")
	opts := task.CreateOptions{}
	if s.Endpoint != nil {
		at, err := s.Endpoint(ctx, pod.ID())
		if err != nil {
			return 0, err
		}
		opts.APIAddress, opts.APIVersion = at.Address, at.Version
	}
	_, handler, err := s.Config.Handler(pod.Meta().RuntimeHandler)
	if err != nil {
		return 0, err
	}
	opts.RuntimePath = handler.Path
	rec, err := s.view.Containers().Get(ctx, id)
	if err != nil {
		return 0, err
	}
	if opts.IO, err = s.openIO(ctx, pod, c, rec.Runtime); err != nil {
		return 0, err
	}
	stage.Enter("create its task")
	if _, err := s.tasks().Create(ctx, id, opts); err != nil {
		return 0, err
	}
	stage.Enter("start its task")
	s.Faults.Pass("cri.container.task-created")
	return s.tasks().Start(ctx, id, "")
}

// endTask kills and deletes a task, if there is one.
func (s *Service) endTask(ctx context.Context, id string) error {
	if err := s.tasks().Kill(ctx, container.ID(id), "", uint32(unix.SIGKILL), true); err != nil && !errdefs.IsNotFound(err) {
		s.Log.Debug("kill", "container", id, "error", err)
	} else if err == nil {
		few, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		if _, err := s.tasks().Wait(few, container.ID(id), ""); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return s.deleteTask(ctx, id)
}

// deleteTask removes a task that has ended, if there is one.
func (s *Service) deleteTask(ctx context.Context, id string) error {
	_, err := s.tasks().Delete(ctx, container.ID(id))
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// flush bounds how long an exit is held back until the shim has written all
// output, so that who sees the exit finds the last line in the log.
const flush = time.Second

// exited settles a container's end, once. It does not take the container's
// lock: a Stop that waits for the end may come before and after it.
func (s *Service) exited(ctx context.Context, c *cristate.Container, x task.Exit) {
	s.mu.Lock()
	over := s.starting[c.ID()]
	if cut := s.cut[c.ID()]; cut != nil {
		over = cut.known // what was begun by the last daemon
	}
	s.mu.Unlock()
	if over != nil {
		select {
		case <-over:
		case <-ctx.Done():
			return
		}
	}
	s.end(ctx, c, x)
}

// end is exited when no start is under way.
func (s *Service) end(ctx context.Context, c *cristate.Container, x task.Exit) {
	id := c.ID()
	st := c.Status()
	if st.FinishedAt != 0 || st.StartedAt == 0 {
		return // known, or that of a task that was taken back
	}
	if st.Pid != 0 && x.Pid != st.Pid {
		// Of a task that an interrupted start left, and which was taken back
		// while the next start was under way, unless nobody knows the pid.
		few, cancel := context.WithTimeout(ctx, s.Limits.Kill)
		p, err := s.tasks().Get(few, container.ID(id), "")
		cancel()
		if err == nil && p.Status == task.StatusStopped && p.Pid == st.Pid {
			x.Pid, x.Status, x.At = p.Pid, p.ExitStatus, p.ExitedAt // it knows how it ended
		} else if err == nil && p.Status != task.StatusStopped || x.Pid != 0 && !errdefs.IsNotFound(err) {
			return
		}
	}
	x, err := keepExit(s.dir(id), x)
	if err != nil {
		s.Log.Error("keep the exit of a container", "container", id, "error", err)
	}
	deleted := make(chan error, 1)
	go func() {
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.Limits.Remove)
		defer cancel()
		s.stopCopy(back, id)
		deleted <- s.deleteTask(back, id)
	}()
	wait := time.NewTimer(flush)
	defer wait.Stop()
	select {
	case err := <-deleted:
		if err != nil {
			s.Log.Warn("delete the task of a container that has ended", "container", id, "error", err)
		}
		s.Faults.Pass("cri.container.task-deleted")
	case <-wait.C:
	}
	s.settle(c, x)
}

// settle stores how a container ended, and tells it.
func (s *Service) settle(c *cristate.Container, x task.Exit) {
	known := errors.New("it has ended before")
	at := x.At
	if at.IsZero() {
		at = time.Now()
	}
	err := c.Change(func(st *cristate.Status) error {
		if st.FinishedAt != 0 {
			return known
		}
		st.Pid, st.FinishedAt, st.ExitCode, st.Unknown = 0, max(at.UnixNano(), st.StartedAt), int32(x.Status), false
		switch {
		case st.Reason == cristate.ReasonOOMKilled && x.Status != 0:
		case x.Status == cristate.ExitUnknown && x.At.IsZero():
			st.Reason = cristate.ReasonUnknown
		case x.Status == 0:
			st.Reason = cristate.ReasonCompleted
		default:
			st.Reason = cristate.ReasonError
		}
		return nil
	})
	switch {
	case errors.Is(err, known):
		return
	case err != nil:
		s.Log.Error("store the exit of a container", "container", c.ID(), "error", err)
		return
	}
	s.ended(c)
}

// ended tells that a container has ended. It does not wait.
func (s *Service) ended(c *cristate.Container) {
	s.notify(runtime.ContainerEventType_CONTAINER_STOPPED_EVENT, c)
	if pod := s.pod(c); s.NRI != nil && pod != nil {
		s.NRI.ContainerExited(pod, c)
	}
}

// outOfMemory remembers that the kernel killed something in the container for
// lack of memory. The shim says so before it tells an exit; an event that was
// kept while the daemon was away may come after it (promise P18).
func (s *Service) outOfMemory(c *cristate.Container, at time.Time) {
	err := c.Change(func(st *cristate.Status) error {
		if st.FinishedAt != 0 && (st.ExitCode == 0 || st.Reason == cristate.ReasonStartError || at.After(cristate.Time(st.FinishedAt).Add(time.Second))) {
			return errdefs.ErrFailedPrecondition
		}
		st.Reason = cristate.ReasonOOMKilled
		return nil
	})
	if err != nil && !errors.Is(err, errdefs.ErrFailedPrecondition) {
		s.Log.Error("store that memory ran out", "container", c.ID(), "error", err)
	}
}

// handle takes one event. It does not wait.
func (s *Service) handle(ctx context.Context, e event.Envelope, start func(func())) {
	switch p := e.Event.(type) {
	case event.TaskOOM:
		if c, err := s.Containers.Get(p.ContainerID); err == nil && c.ID() == p.ContainerID {
			s.outOfMemory(c, e.Timestamp)
		}
	case event.TaskExit:
		if p.ID != p.ContainerID {
			return // of an exec
		}
		if c, err := s.Containers.Get(p.ContainerID); err == nil && c.ID() == p.ContainerID {
			start(func() { s.exited(ctx, c, task.Exit{ID: p.ID, Pid: p.Pid, Status: p.ExitStatus, At: p.ExitedAt}) })
		}
	}
}
