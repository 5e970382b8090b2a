// Package autoremove removes the containers that are to go when they end, so
// that nobody need stay connected for it: those that carry the note below.
// Nothing that runs is ever touched, nor a container without the note.
package autoremove

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
)

// Note asks for it, with the text "true" (container.Notes).
const Note = "io.gantry.rm"

// timeout bounds the removal of one container.
const timeout = time.Minute

// Namespaces lists what there is.
type Namespaces interface {
	List(ctx context.Context) ([]namespace.Namespace, error)
}

// Subscriber is the half of the bus that is listened to.
type Subscriber interface {
	Subscribe(ctx context.Context, filters ...string) (event.Subscription, error)
}

// Service removes containers while Run runs.
type Service struct {
	views      view.Source
	namespaces Namespaces
	bus        Subscriber
	logs       string
	log        *slog.Logger
}

// New makes a Service. logs is the folder with the kept output of containers,
// as NAMESPACE/ID, which goes with them.
func New(views view.Source, namespaces Namespaces, bus Subscriber, logs string, log *slog.Logger) *Service {
	return &Service{views: views, namespaces: namespaces, bus: bus, logs: logs, log: log}
}

// Run removes what has ended already, then each container when it ends. It
// returns nil when ctx is done. A container that cannot be removed is logged
// and stays; removing it by hand works as for any other.
func (s *Service) Run(ctx context.Context) error {
	sub, err := s.bus.Subscribe(ctx, "topic=="+event.TopicTaskExit)
	if err != nil {
		return fmt.Errorf("autoremove: %w", err)
	}
	defer sub.Close()
	if err := s.sweep(ctx); err != nil && ctx.Err() == nil {
		s.log.Warn("autoremove", "error", err)
	}
	for {
		e, err := sub.Next(ctx)
		if ctx.Err() != nil || errdefs.IsUnavailable(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("autoremove: %w", err)
		}
		exit, ok := exitOf(e.Event)
		if !ok || exit.ID != exit.ContainerID {
			continue
		}
		if err := s.ended(ctx, e.Namespace, container.ID(exit.ContainerID)); err != nil && ctx.Err() == nil {
			s.log.Warn("autoremove", "namespace", e.Namespace, "container", exit.ContainerID, "error", err)
		}
	}
}

func exitOf(p event.Payload) (event.TaskExit, bool) {
	switch e := p.(type) {
	case event.TaskExit:
		return e, true
	case *event.TaskExit:
		return *e, true
	}
	return event.TaskExit{}, false
}

// sweep removes the containers that ended while nobody listened.
func (s *Service) sweep(ctx context.Context) error {
	all, err := s.namespaces.List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, ns := range all {
		v, err := s.views.In(ns.ID, "")
		if err != nil {
			return err
		}
		var ids []container.ID
		if err := v.Containers().Walk(ctx, func(c container.Container) error {
			if c.Note(Note) == "true" {
				ids = append(ids, c.ID)
			}
			return nil
		}); err != nil {
			return err
		}
		for _, id := range ids {
			// One that has no task may be about to get it.
			if p, err := v.Tasks().Get(ctx, id, ""); err == nil && p.Status == task.StatusStopped {
				errs = append(errs, s.ended(ctx, ns.ID, id))
			}
		}
	}
	return errors.Join(errs...)
}

// ended removes a container whose first process has ended, if its note says so.
func (s *Service) ended(ctx context.Context, ns namespace.ID, id container.ID) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := container.Check(id); err != nil {
		return err
	}
	v, err := s.views.In(ns, "")
	if err != nil {
		return err
	}
	c, err := v.Containers().Get(ctx, id)
	if errdefs.IsNotFound(err) || err == nil && c.Note(Note) != "true" {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := v.Tasks().Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		if errdefs.IsFailedPrecondition(err) {
			return nil // it was started again
		}
		return err
	}
	// While the id is taken, nobody else's output can be in that folder.
	if err := os.RemoveAll(filepath.Join(s.logs, string(ns), string(id))); err != nil {
		return err
	}
	if c.SnapshotKey != "" {
		snapshots, err := v.Snapshots(c.Snapshotter)
		if err != nil {
			return err
		}
		if err := snapshots.Remove(ctx, c.SnapshotKey); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	if err := v.Containers().Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}
