package cricontainer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/mountx"
)

// exitFile has a container's exit from when it was learnt until it is stored:
// in between the shim forgets it.
const (
	exitFile = "exit"
	maxExit  = 4096
)

type exitNote struct {
	Status uint32
	At     time.Time
}

// keepExit notes how a container ended, and returns what is noted: the first
// who knew is right, whoever asks a shim that forgot it only makes up an end.
func keepExit(dir string, x task.Exit) (task.Exit, error) {
	if known, err := readExit(dir); err == nil {
		return known, nil
	}
	b, err := json.Marshal(exitNote{x.Status, x.At})
	if err != nil {
		return x, err
	}
	next := filepath.Join(dir, exitFile+".new")
	if err := os.WriteFile(next, b, 0o600); err != nil {
		return x, err
	}
	return x, os.Rename(next, filepath.Join(dir, exitFile))
}

func readExit(dir string) (task.Exit, error) {
	f, err := os.Open(filepath.Join(dir, exitFile))
	if err != nil {
		return task.Exit{}, err
	}
	defer f.Close()
	b := make([]byte, maxExit)
	n, err := f.Read(b)
	if err != nil {
		return task.Exit{}, err
	}
	var note exitNote
	err = json.Unmarshal(b[:n], &note)
	return task.Exit{Status: note.Status, At: note.At}, err
}

// late is how long the news of an exit is waited for when the task is gone.
const late = 2 * time.Second

// lost settles the end of a container whose task is gone: as was noted, or as
// an event on its way says, or else in a way that nobody knows.
func (s *Service) lost(ctx context.Context, c *cristate.Container) {
	x, err := readExit(s.dir(c.ID()))
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			s.Log.Warn("the note of a container's exit cannot be read", "container", c.ID(), "error", err)
		}
		x = task.Exit{Status: cristate.ExitUnknown}
		wait := time.NewTimer(late)
		defer wait.Stop()
		select {
		case <-c.Gone():
		case <-wait.C:
		case <-ctx.Done():
			return
		}
	}
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	s.stopCopy(back, c.ID())
	s.settle(c, x)
}

// Recover makes the containers known that are stored, as they were stored, and
// begins to listen to what happens to them. It asks no shim: Run does that. It
// is called once, before requests are served (contract 7.3.30).
func (s *Service) Recover(ctx context.Context) error {
	if err := os.MkdirAll(s.tmpDir(), 0o700); err != nil {
		return fmt.Errorf("recover containers: %w", err)
	}
	if err := mountx.CleanupTemp(s.tmpDir(), unix.MNT_DETACH); err != nil {
		s.Log.Warn("remove temporary mounts", "error", err)
	}
	var err error
	s.sub, err = s.Events.Subscribe(ctx, fmt.Sprintf(`namespace==%q,topic==%q`, cristate.Namespace, event.TopicTaskExit), fmt.Sprintf(`namespace==%q,topic==%q`, cristate.Namespace, event.TopicTaskOOM))
	if err != nil {
		return fmt.Errorf("recover containers: %w", err)
	}
	err = s.view.Containers().Walk(ctx, func(rec container.Container) error {
		ext, ok := rec.Extensions[cristate.ExtensionContainer]
		if !ok {
			s.half = append(s.half, rec)
			return nil
		}
		if err := s.adopt(rec, ext); err != nil {
			// It is not removed: who can repair it still has it.
			s.Log.Error("container cannot be recovered", "container", rec.ID, "error", err)
		}
		return nil
	}, fmt.Sprintf("labels.%q==%s", cristate.LabelKind, cristate.KindContainer))
	if err != nil {
		return fmt.Errorf("recover containers: %w", err)
	}
	return nil
}

func (s *Service) adopt(rec container.Container, ext typed.Any) error {
	meta, err := cristate.DecodeContainer(ext)
	if err != nil {
		return err
	}
	if meta.ID != string(rec.ID) {
		return fmt.Errorf("its metadata is that of %.80q: %w", meta.ID, errdefs.ErrInvalidArgument)
	}
	var spec struct { // what is wanted of it: a node may have tens of thousands
		Process *struct{ User specs.User }
	}
	if err := json.Unmarshal(rec.Spec.Value, &spec); err != nil {
		return fmt.Errorf("its specification: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	dir := s.dir(meta.ID)
	st, err := cristate.ReadStatus(dir)
	if err != nil {
		spec, serr := decodeSpec(rec)
		if serr != nil {
			return serr
		}
		// The file is not synced: it is lost with all processes of the host.
		s.Log.Warn("status of a container", "container", meta.ID, "error", err)
		st = cristate.Status{CreatedAt: rec.CreatedAt.UnixNano(), StartedAt: rec.CreatedAt.UnixNano(),
			Resources: crispec.Resources(spec)}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	c := cristate.NewContainer(meta, st, dir)
	f := cristate.Facts{Snapshotter: rec.Snapshotter, SnapshotKey: rec.SnapshotKey}
	if p := spec.Process; p != nil {
		f.User = s.userOf(p.User)
	}
	c.SetFacts(f)
	if err := s.Containers.Add(c); err != nil {
		return err
	}
	s.found = append(s.found, c)
	if st.StartedAt == 0 && st.FinishedAt == 0 {
		s.cut[meta.ID] = &cutStart{known: make(chan struct{})}
	}
	return nil
}

// cutStart is a start that the last daemon may have been killed in. Its caller
// was told nothing, so who asks again gets its result.
type cutStart struct {
	known     chan struct{} // closed when its shim was asked
	succeeded bool          // valid once known
}

// settled waits until it is known whether the last daemon started a container,
// whose task must neither be made a second time nor be left running meanwhile.
// It returns nil if that was never in doubt.
func (s *Service) settled(ctx context.Context, what, id string) (*cutStart, error) {
	s.mu.Lock()
	cut := s.cut[id]
	s.mu.Unlock()
	if cut == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.Limits.Start)
	defer cancel()
	select {
	case <-cut.known:
		return cut, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%s container %s (learn whether the last daemon started it): %w", what, id, ctx.Err())
	}
}

// resumed says to the first who starts a container whether the last daemon has.
func (s *Service) resumed(ctx context.Context, id string) (bool, error) {
	cut, err := s.settled(ctx, "start", id)
	if cut == nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	first := s.cut[id] == cut
	delete(s.cut, id)
	return first && cut.succeeded, nil
}

// askers is how many shims are asked at a time after a start.
const askers = 32

// Run puts containers together with their tasks, removes what interrupted
// operations left, and then handles what happens until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	if s.sub == nil {
		return fmt.Errorf("containers were not recovered: %w", errdefs.ErrFailedPrecondition)
	}
	defer s.sub.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer s.letGo()
	wg.Go(func() { s.sweep(ctx) })
	wg.Go(func() { s.thaw(ctx) })
	turns := make(chan struct{}, askers)
	var ended []*cristate.Container
	for _, c := range s.found {
		if c.Status().FinishedAt != 0 {
			ended = append(ended, c)
		} else {
			wg.Go(func() { s.reconcile(ctx, c, turns) })
		}
	}
	s.found = nil
	wg.Go(func() { s.tidy(ctx, ended) })
	for {
		e, err := s.sub.Next(ctx)
		if err != nil {
			if ctx.Err() != nil {
				err = nil
			}
			return err
		}
		s.handle(ctx, e, func(fn func()) { wg.Go(fn) })
	}
}

// Close waits for creations and starts under way, but not longer than ctx. None
// may begin.
func (s *Service) Close(ctx context.Context) error {
	if err := s.creating.Wait(ctx); err != nil {
		return fmt.Errorf("creations of containers go on: %v: %w", s.creating.Stages(), err)
	}
	done := make(chan struct{})
	go func() { s.starts.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("starts of containers go on: %w", ctx.Err())
	}
}

// letGo ends all copiers; those of the next daemon go on where they stopped.
func (s *Service) letGo() {
	s.mu.Lock()
	all := s.copies
	s.copies = map[string]*copier{}
	s.mu.Unlock()
	for _, cp := range all {
		cp.end()
	}
}

// tidy deletes the tasks of containers that have ended, of which there may be
// tens of thousands: the last daemon may not have come to it.
func (s *Service) tidy(ctx context.Context, ended []*cristate.Container) {
	var g errgroup.Group
	g.SetLimit(askers)
	for _, c := range ended {
		g.Go(func() error {
			if err := s.deleteTask(ctx, c.ID()); err != nil && ctx.Err() == nil {
				s.Log.Warn("delete the task of a container that has ended", "container", c.ID(), "error", err)
			}
			return nil
		})
	}
	_ = g.Wait() // of calls that have no error
}

// reconcile asks a container's task, as often as it takes to get an answer.
// Until then the container is as it was when the last daemon ended.
func (s *Service) reconcile(ctx context.Context, c *cristate.Container, turns chan struct{}) {
	s.mu.Lock()
	cut := s.cut[c.ID()]
	s.mu.Unlock()
	if cut != nil {
		defer func() {
			cut.succeeded = c.Status().StartedAt != 0
			close(cut.known)
		}()
	}
	if c.Status().FinishedAt != 0 {
		return // an event was faster
	}
	if pod := s.pod(c); pod != nil {
		if _, left := s.fifos(c.ID()); left {
			if err := s.startCopy(pod, c); err != nil {
				s.Log.Error("copy the output of a container", "container", c.ID(), "error", err)
			}
		}
	}
	for pause := time.Second; ; pause = min(2*pause, 30*time.Second) {
		select {
		case turns <- struct{}{}:
		case <-ctx.Done():
			return
		}
		p, err := s.tasks().Get(ctx, container.ID(c.ID()), "")
		<-turns
		if err == nil || errdefs.IsNotFound(err) {
			s.compare(ctx, c, p, err == nil)
			return
		}
		if ctx.Err() != nil || c.Status().FinishedAt != 0 {
			return
		}
		s.Log.Warn("a container's shim does not say how it is", "container", c.ID(), "error", err)
		if merr := c.Mark(func(st *cristate.Status) error { st.Unknown = st.FinishedAt == 0; return nil }); merr != nil {
			s.Log.Error("mark a container", "container", c.ID(), "error", merr)
		}
		if sleep(ctx, pause) != nil {
			return
		}
	}
}

// compare settles what is stored of a container with what its shim says.
func (s *Service) compare(ctx context.Context, c *cristate.Container, p task.Process, exists bool) {
	unlock, err := s.Containers.Lock(ctx, c.ID())
	if err != nil {
		return
	}
	defer unlock()
	st := c.Status()
	if now, err := s.Containers.Get(c.ID()); err != nil || now != c || st.FinishedAt != 0 || st.Starting {
		return // a client was faster
	}
	created := st.StartedAt == 0
	switch {
	case !exists && created:
		return // it was never started
	case !exists:
		s.lost(ctx, c)
		return
	case p.Status == task.StatusCreated:
		// The start was interrupted, its caller has been told nothing.
		if err := s.endTask(ctx, c.ID()); err != nil {
			s.Log.Warn("remove the task of a container that was not started", "container", c.ID(), "error", err)
		}
		s.stopCopy(ctx, c.ID())
		return
	}
	err = c.Change(func(st *cristate.Status) error {
		if st.FinishedAt != 0 {
			return nil
		}
		if st.Pid, st.Unknown = p.Pid, false; created {
			st.StartedAt = time.Now().UnixNano()
		}
		return nil
	})
	if err != nil {
		s.Log.Error("store that a container runs", "container", c.ID(), "error", err)
	} else if created {
		s.notify(runtime.ContainerEventType_CONTAINER_STARTED_EVENT, c)
	}
	if p.Status == task.StatusStopped {
		s.end(ctx, c, task.Exit{ID: p.ID, Pid: p.Pid, Status: p.ExitStatus, At: p.ExitedAt})
	}
}

// sweep removes what belongs to no container: records of creations that were
// interrupted, with all they name, and directories without a record.
func (s *Service) sweep(ctx context.Context) {
	for _, rec := range s.half {
		if err := s.removeParts(ctx, string(rec.ID), rec.Snapshotter, rec.SandboxID); err != nil {
			s.Log.Warn("remove a container that was not complete", "container", rec.ID, "error", err)
		}
	}
	s.half = nil
	dirs := map[string]struct{}{}
	for _, parent := range []string{s.dir(""), s.stateDir("")} {
		entries, err := os.ReadDir(parent)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			s.Log.Warn("directories of containers", "error", err)
		}
		for _, e := range entries {
			dirs[e.Name()] = struct{}{}
		}
	}
	// A record is made before its directories: whose record is not there now
	// was removed.
	for id := range dirs {
		if _, err := s.Containers.Get(id); err == nil {
			continue // there may be very many: that is quick
		}
		if _, err := s.view.Containers().Get(ctx, container.ID(id)); !errdefs.IsNotFound(err) {
			continue
		}
		if err := s.removeParts(ctx, id, "", ""); err != nil {
			s.Log.Warn("remove what is left of a container", "container", id, "error", err)
		}
	}
}
