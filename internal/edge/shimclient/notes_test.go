package shimclient

import (
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/engine/memory"
)

// bundled makes a manager with a bundle of which it knows nothing, and listens
// to what it tells.
func bundled(t *testing.T) (*Manager, key, *memory.Bus, event.Subscription) {
	t.Helper()
	bus := memory.NewBus()
	sub, err := bus.Subscribe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(Options{State: t.TempDir(), Root: t.TempDir(), Records: noRecords{}, Events: bus})
	if err != nil {
		t.Fatal(err)
	}
	k := key{"ns", "c"}
	if err := os.MkdirAll(m.bundle(k).path, 0o700); err != nil {
		t.Fatal(err)
	}
	return m, k, bus, sub
}

// TestExecTold walks an exec's exit through all orders in which the recovery,
// the shim and the exec's deletion can come: it is told once, and in the end
// nothing is remembered of it.
//
// promise: P11, P19
func TestExecTold(t *testing.T) {
	for name, steps := range map[string][]string{
		"the usual order":                      {"shim", "delete"},
		"deleted before the shim is heard":     {"delete", "shim"},
		"told by the recovery":                 {"recovery", "shim", "delete"},
		"deleted after the recovery":           {"recovery", "delete", "shim"},
		"a shim that repeats":                  {"shim", "shim", "delete"},
		"killed after the recovery told":       {"recovery", "delete", "restart", "shim"},
		"killed before the deletion":           {"recovery", "restart", "delete", "shim"},
		"deleted, and made again by that name": {"recovery", "delete", "again", "shim", "shim of the second", "delete second"},
	} {
		t.Run(name, func(t *testing.T) {
			m, k, bus, sub := bundled(t)
			e := newEntry(m, k, phaseLive)
			if err := e.expectExec("x"); err != nil {
				t.Fatal(err)
			}
			exit := func(pid uint32) event.Envelope {
				return event.Envelope{Namespace: "ns", Topic: event.TopicTaskExit, Event: event.TaskExit{ContainerID: "c", ID: "x", Pid: pid, ExitStatus: 3}}
			}
			want := 1
			for _, s := range steps {
				var err error
				switch s {
				case "shim":
					err = e.publish(t.Context(), exit(10), true)
				case "recovery":
					err = e.publish(t.Context(), exit(10), false)
				case "delete", "delete second":
					e.forgetExec("x", true)
				case "restart":
					e = newEntry(m, k, phaseRecovering)
					e.notes = e.bundle.recall()
				case "again":
					want = 2
					err = e.expectExec("x")
				case "shim of the second":
					err = e.publish(t.Context(), exit(11), true)
				}
				if err != nil {
					t.Fatalf("%s: %v", s, err)
				}
			}
			end := time.Now().Add(20 * time.Second)
			if err := bus.Publish(t.Context(), event.Envelope{Namespace: "ns", Topic: "/end", Event: event.TaskOOM{ContainerID: "c"}}); err != nil {
				t.Fatal(err)
			}
			got := 0
			for {
				e, err := sub.Next(t.Context())
				if err != nil || time.Now().After(end) {
					t.Fatal(err)
				}
				if e.Topic == "/end" {
					break
				}
				got++
			}
			if got != want {
				t.Errorf("told %d times, want %d", got, want)
			}
			restarted := name == "killed after the recovery told" // nobody knows that it was deleted: until the bundle goes
			if len(e.notes) != 0 && !restarted || len(e.removed) != 0 {
				t.Errorf("remembered: %v %v", e.notes, e.removed)
			}
			if e.bundle.has(noteName("x")) && !restarted {
				t.Error("the note is still there")
			}
		})
	}
}

// A shim that is also others' tells how a task ended that was taken back while
// another one of its name is made, or runs: that one has not ended.
//
// promise: P11, P19
func TestEndOfEarlierTask(t *testing.T) {
	for _, first := range []phase{phaseCreating, phaseLive} {
		m, k, _, sub := bundled(t)
		e := newEntry(m, k, first)
		m.tasks[k] = e
		tell := func(pid, status uint32) error {
			err := m.Publish(t.Context(), event.Envelope{Timestamp: time.Now(), Namespace: "ns", Topic: event.TopicTaskExit, Event: event.TaskExit{ContainerID: "c", ID: "c", Pid: pid, ExitStatus: status}})
			if err == nil {
				err = m.Publish(t.Context(), event.Envelope{Timestamp: time.Now(), Namespace: "ns", Topic: event.TopicTaskDelete, Event: event.TaskDelete{ContainerID: "c", Pid: pid, ExitStatus: status}})
			}
			return err
		}
		known := func() {
			e.mu.Lock()
			e.pid = 11
			e.mu.Unlock()
			e.settle(phaseLive)
		}
		if first == phaseLive {
			known()
		}
		earlier := make(chan error, 1)
		go func() { earlier <- tell(10, 137) }()
		if first == phaseCreating {
			select {
			case err := <-earlier:
				t.Errorf("heard before it is known whose end it is: %v", err)
			case <-time.After(20 * time.Millisecond):
			}
			known()
		}
		if err := <-earlier; err != nil {
			t.Error(err)
		}
		if closed(e.exited) || closed(e.deleted) {
			t.Errorf("it has ended: %v", e.getExit())
		}
		if err := tell(11, 3); err != nil {
			t.Error(err)
		}
		x, err := e.wait(t.Context())
		if err != nil || x.Pid != 11 || x.Status != 3 {
			t.Errorf("%v %v", x, err)
		}
		for _, want := range []string{event.TopicTaskExit, event.TopicTaskDelete} {
			got, err := sub.Next(t.Context())
			if err != nil || got.Topic != want {
				t.Fatalf("%v %v", got, err)
			}
			if p, ok := got.Event.(event.TaskExit); ok && p.Pid != 11 {
				t.Errorf("%v", p)
			}
		}
	}
}

// noRecords is a store that nobody asks.
type noRecords struct{}

func (noRecords) In(namespace.ID, lease.ID) (view.Records, error) { return nil, errdefs.ErrUnavailable }
