package cricontainer

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// A daemon killed anywhere in a creation leaves a whole container or nothing,
// and the same request works after it.
// contract: 7.3.30
// promise: P5
func TestKilledInCreate(t *testing.T) {
	for _, point := range []string{"record", "snapshot", "status", "complete"} {
		t.Run(point, func(t *testing.T) {
			n := newNode(t, ocispec.ImageConfig{Volumes: map[string]struct{}{"/etc": {}}}, nil)
			faults, reached := crashAt(t, "cri.container."+point)
			n.change = func(d *Deps) { d.Faults = faults }
			n.boot()
			c := app("a")
			c.Mounts = []*runtime.Mount{{ContainerPath: "/img", Image: &runtime.ImageSpec{Image: "i"}}}
			ctx, cancel := context.WithCancel(t.Context())
			go n.s.Create(ctx, n.podID, c, nil) // never returns
			<-reached
			cancel()
			n.change = nil
			n.boot()
			if point == "complete" {
				all := n.s.Containers.List()
				if len(all) != 1 || all[0].Status().State() != runtime.ContainerState_CONTAINER_CREATED || all[0].Facts().SnapshotKey != all[0].ID() {
					t.Fatalf("%v", all)
				}
				if id := n.create(c); id != all[0].ID() {
					t.Error("the retry got another container")
				}
			} else {
				n.until("everything is gone", func() bool { return len(n.left()) == 0 })
			}
			id := n.run(c)
			if err := n.s.Remove(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			n.nothingLeft()
		})
	}
}

// contract: 7.3.30
func TestKilledInStart(t *testing.T) {
	for point, want := range map[string]runtime.ContainerState{"task-created": runtime.ContainerState_CONTAINER_CREATED, "task-started": runtime.ContainerState_CONTAINER_RUNNING} {
		t.Run(point, func(t *testing.T) {
			n := newNode(t, ocispec.ImageConfig{}, nil)
			faults, reached := crashAt(t, "cri.container."+point)
			n.change = func(d *Deps) { d.Faults = faults }
			n.boot()
			id := n.create(app("a"))
			go n.s.Start(t.Context(), id) // never returns
			<-reached
			n.change = nil
			n.boot()
			n.until("it is as it was", func() bool {
				all, _ := n.tasks.List(t.Context())
				return n.get(id).Status().State() == want && (len(all) == 0) == (want == runtime.ContainerState_CONTAINER_CREATED)
			})
			if want == runtime.ContainerState_CONTAINER_CREATED {
				if err := n.s.Start(t.Context(), id); err != nil {
					t.Error(err)
				}
			}
			if err := n.s.Remove(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			n.nothingLeft()
		})
	}
}

// Who starts a container again while its shim is still being asked what the
// last daemon had done gets the result of that, and its task is not taken for
// lost.
// contract: 7.3.30
// promise: P5, P11
func TestStartBeforeRecovered(t *testing.T) {
	for _, point := range []string{"nothing", "created", "runs"} {
		t.Run(point, func(t *testing.T) {
			n := newNode(t, ocispec.ImageConfig{}, nil)
			reached := make(chan struct{})
			switch point {
			case "created":
				n.change = func(d *Deps) { d.Faults, reached = crashAt(t, "cri.container.task-created") }
			case "runs":
				n.tasks.started = func() { close(reached); select {} }
			}
			n.boot()
			id := n.create(app("a"))
			if point != "nothing" {
				go n.s.Start(t.Context(), id) // never returns
				<-reached
			}
			asked, answer := make(chan struct{}), make(chan struct{})
			n.tasks.hook(func() {
				n.tasks.started = nil
				n.tasks.get = func(context.Context, container.ID) error {
					close(asked)
					<-answer
					return nil
				}
			})
			n.change = nil
			n.boot()
			<-asked
			n.tasks.hook(func() { n.tasks.get = nil })
			before, err := n.tasks.List(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			few, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if err := n.s.Start(few, id); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "last daemon") {
				t.Errorf("%v", err)
			}
			if all, err := n.tasks.List(t.Context()); err != nil || !slices.Equal(all, before) {
				t.Errorf("%v %v, was %v", all, err, before)
			}
			close(answer)
			if err := n.s.Start(t.Context(), id); err != nil {
				t.Error(err)
			}
			if st := n.get(id).Status(); st.State() != runtime.ContainerState_CONTAINER_RUNNING || st.Pid == 0 {
				t.Errorf("%+v", st)
			}
			if err := n.s.Start(t.Context(), id); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("started twice: %v", err)
			}
			if err := n.s.Remove(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			n.nothingLeft()
		})
	}
}

// contract: 7.3.30
func TestKilledInRemove(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	faults, reached := crashAt(t, "cri.container.record-deleted")
	n.change = func(d *Deps) { d.Faults = faults }
	n.boot()
	id := n.run(app("a"))
	go n.s.Remove(t.Context(), id) // never returns
	<-reached
	n.change = nil
	n.boot()
	if _, err := n.s.Containers.Get(id); err == nil {
		t.Error("it is known again")
	}
	n.until("the directories are gone", func() bool {
		_, err := os.Stat(filepath.Join(n.dir, "root/containers", id))
		_, err2 := os.Stat(filepath.Join(n.dir, "state/containers", id))
		return errors.Is(err, os.ErrNotExist) && errors.Is(err2, os.ErrNotExist)
	})
	// The snapshot is left to collection: no record names it.
	if err := n.snaps.Remove(t.Context(), id); err != nil {
		t.Error(err)
	}
	n.nothingLeft()
}

// Nobody's end is missed, however the daemon was away.
// contract: 7.3.30, 7.1.15
// promise: P18
func TestEndedMeanwhile(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	stopped, deleted, lost, oom, alive := n.run(app("stopped")), n.run(app("deleted")), n.run(app("lost")), n.run(app("oom")), n.run(app("alive"))
	n.s.outOfMemory(n.get(oom), time.Now())
	// The shim was asked to forget it, and the daemon killed before it had stored the end.
	faults, reached := crashAt(t, "cri.container.task-deleted")
	n.s.Faults = faults
	if err := n.tasks.End(container.ID(deleted), "", 9); err != nil {
		t.Fatal(err)
	}
	<-reached
	n.kill()
	// The shim manager knows only that the shim forgot the task, and says so first.
	n.change = func(d *Deps) { d.Events = overtaken{d.Events, deleted} }
	for id, code := range map[string]uint32{stopped: 5, oom: 137} {
		if err := n.tasks.End(container.ID(id), "", code); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.tasks.End(container.ID(lost), "", 1); err != nil {
		t.Fatal(err)
	}
	if _, err := n.tasks.Delete(t.Context(), container.ID(lost)); err != nil {
		t.Fatal(err)
	}
	n.boot()
	for id, want := range map[string]cristate.Status{stopped: {ExitCode: 5, Reason: "Error"}, deleted: {ExitCode: 9, Reason: "Error"}, lost: {ExitCode: 255, Reason: "Unknown"}, oom: {ExitCode: 137, Reason: "OOMKilled"}} {
		if st := n.ended(id); st.ExitCode != want.ExitCode || st.Reason != want.Reason {
			t.Errorf("%+v, want %+v", st, want)
		}
	}
	if st := n.get(alive).Status(); st.State() != runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%+v", st)
	}
	if err := n.tasks.End(container.ID(alive), "", 0); err != nil {
		t.Fatal(err)
	}
	if st := n.ended(alive); st.Reason != "Completed" {
		t.Errorf("%+v", st)
	}
}

// overtaken brings a made-up end of a container before anything else.
type overtaken struct {
	event.Bus
	id string
}

func (o overtaken) Subscribe(ctx context.Context, filters ...string) (event.Subscription, error) {
	sub, err := o.Bus.Subscribe(ctx, filters...)
	if err == nil {
		err = o.Publish(ctx, event.Envelope{Timestamp: time.Now(), Namespace: cristate.Namespace, Topic: event.TopicTaskExit,
			Event: event.TaskExit{ContainerID: o.id, ID: o.id, ExitStatus: 255, ExitedAt: time.Now()}})
	}
	return sub, err
}

// A container whose shim does not answer is unknown until it does.
// contract: 7.3.30, 7.1.15
func TestRecoverHungShim(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	id, well := n.run(app("a")), n.run(app("b"))
	n.tasks.hook(func() {
		n.tasks.get = func(_ context.Context, c container.ID) error {
			if c == container.ID(id) {
				return context.DeadlineExceeded
			}
			return nil
		}
	})
	n.boot()
	n.until("it is unknown", func() bool { return n.get(id).Answer(cristate.ImageNames{}).Reason == "Unknown" })
	if st := n.get(well).Status(); st.State() != runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%+v", st)
	}
	n.tasks.hook(func() { n.tasks.get = nil })
	n.until("it runs again", func() bool { return n.get(id).Status().State() == runtime.ContainerState_CONTAINER_RUNNING })
}

// A status file that a power cut took does not take the container.
// contract: 7.3.29, 7.3.30
func TestRecoverWithoutStatus(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	id := n.create(app("a"))
	if err := os.Truncate(filepath.Join(n.dir, "root/containers", id, "status"), 0); err != nil {
		t.Fatal(err)
	}
	n.boot()
	if st := n.ended(id); st.ExitCode != 255 || st.Reason != "Unknown" {
		t.Errorf("%+v", st)
	}
	if err := n.s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// cutOff is a node whose daemon was killed when it had started a container and
// before it noted that, and whose next one is asking the shim how it is: it gets
// its answer, which is of now, when answer is closed.
func cutOff(t *testing.T) (n *node, id string, answer chan struct{}) {
	n = newNode(t, ocispec.ImageConfig{}, nil)
	reached, asked := make(chan struct{}), make(chan struct{})
	n.tasks.started = func() { close(reached); select {} }
	n.boot()
	id = n.create(app("a"))
	go n.s.Start(t.Context(), id) // never returns
	<-reached
	n.tasks.hook(func() { n.tasks.started = nil })
	answer = make(chan struct{})
	n.src.TaskStore = &slowShim{tasks: n.tasks, asked: asked, answer: answer}
	n.boot()
	<-asked
	return n, id, answer
}

// slowShim is a shim whose first answer takes time.
type slowShim struct {
	*tasks
	once          sync.Once
	asked, answer chan struct{}
}

func (l *slowShim) Get(ctx context.Context, id container.ID, exec task.ExecID) (task.Process, error) {
	p, err := l.tasks.Get(ctx, id, exec)
	l.once.Do(func() { close(l.asked); <-l.answer })
	return p, err
}

// A container that may have been started by the last daemon is not said to be
// stopped before that is known: it would run on.
// contract: 7.3.30, 7.1.13
// promise: P11
func TestStopBeforeRecovered(t *testing.T) {
	n, id, answer := cutOff(t)
	few, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := n.s.Stop(few, id, 0); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "last daemon") {
		t.Errorf("%v", err)
	}
	close(answer)
	if err := n.s.Stop(t.Context(), id, 0); err != nil {
		t.Error(err)
	}
	if st := n.get(id).Status(); st.State() != runtime.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 {
		t.Errorf("%+v", st)
	}
}

// The end of such a container is not lost when it is told before it is known
// that it was started, and by a shim that is no more when it is asked again.
// contract: 7.3.30, 7.1.15
func TestEndBeforeRecovered(t *testing.T) {
	n, id, answer := cutOff(t)
	other := n.run(app("b"))
	if err := n.tasks.End(container.ID(id), "", 9); err != nil {
		t.Fatal(err)
	}
	if _, err := n.tasks.Delete(t.Context(), container.ID(id)); err != nil {
		t.Fatal(err)
	}
	if err := n.tasks.End(container.ID(other), "", 1); err != nil {
		t.Fatal(err)
	}
	n.ended(other) // as it is told later, both were heard
	close(answer)
	if st := n.ended(id); st.ExitCode != 9 || st.Reason != "Error" {
		t.Errorf("%+v", st)
	}
}

// What is removed meanwhile stays so, and nobody hears that it has started.
// contract: 7.3.30, 7.1.22
func TestRemoveBeforeRecovered(t *testing.T) {
	n, id, answer := cutOff(t)
	if err := n.s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	n.s.mu.Lock()
	cut := n.s.cut[id]
	n.s.mu.Unlock()
	close(answer)
	<-cut.known
	n.s.Notifier.Notify(runtime.ContainerEventType_CONTAINER_DELETED_EVENT, "end", n.podID)
	sub := n.events.Subscribe()
	defer sub.Close()
	for _, want := range []string{id, "end"} {
		if e, err := sub.Next(t.Context()); err != nil || e.ContainerId != want || e.ContainerEventType != runtime.ContainerEventType_CONTAINER_DELETED_EVENT {
			t.Errorf("%v %v, want the removal of %s", e, err, want)
		}
	}
	n.nothingLeft()
}

// The task of a container whose end was stored goes, though the last daemon was
// killed before it had deleted it.
// contract: 7.3.30
func TestKilledBeforeTaskDeleted(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	id := n.run(app("a"))
	n.kill()
	if err := n.get(id).Change(func(st *cristate.Status) error { st.FinishedAt = st.StartedAt + 1; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := n.tasks.End(container.ID(id), "", 0); err != nil {
		t.Fatal(err)
	}
	n.boot()
	n.until("its task is gone", func() bool { all, err := n.tasks.List(t.Context()); return err == nil && len(all) == 0 })
}
