// Package eventtest is the conformance suite of event.Bus.
package eventtest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/typed"
)

// Run tests the bus that open makes, a fresh one each time.
func Run(t *testing.T, open func(t *testing.T) event.Bus) {
	for name, test := range map[string]func(*testing.T, event.Bus){
		"every payload arrives as it was":              testPayloads,
		"subscriptions cross namespaces":               testNamespaces,
		"filters choose, and are ORed":                 testFilters,
		"a bad filter is refused":                      testBadFilter,
		"an envelope that is not one is refused":       testBadEnvelope,
		"a reader that does not read delays nobody":    testSlow,
		"order is kept":                                testOrder,
		"closing ends Next, and context leaves it":     testClose,
		"time is assigned unless the envelope has one": testTime,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

func subscribe(t *testing.T, b event.Bus, filters ...string) event.Subscription {
	t.Helper()
	s, err := b.Subscribe(t.Context(), filters...)
	if err != nil {
		t.Fatalf("Subscribe(%q): %v", filters, err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func publish(t *testing.T, b event.Bus, e event.Envelope) {
	t.Helper()
	if err := b.Publish(t.Context(), e); err != nil {
		t.Fatalf("Publish(%v): %v", e, err)
	}
}

func next(t *testing.T, s event.Subscription) event.Envelope {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	e, err := s.Next(ctx)
	if err != nil {
		t.Fatalf("Next: %v", err)
	}
	return e
}

func testPayloads(t *testing.T, b event.Bus) {
	at := time.Date(2026, 11, 21, 22, 0, 0, 5, time.UTC)
	labels := map[string]string{"a.b/c": "d"}
	s := subscribe(t, b)
	for i, p := range []event.Payload{
		event.ContainerCreate{ID: "c", Image: "i", Runtime: event.ContainerRuntime{Name: "r", Options: typed.Any{URL: "x.Y", Value: []byte{1}}}},
		event.ContainerUpdate{ID: "c", Image: "i", Labels: labels, SnapshotKey: "k"},
		event.ContainerDelete{ID: "c"},
		event.ContentCreate{Digest: "sha256:1", Size: 7, MediaType: "m"},
		event.ContentDelete{Digest: "sha256:1"},
		event.ImageCreate{Name: "n", Labels: labels}, event.ImageUpdate{Name: "n", Labels: labels}, event.ImageDelete{Name: "n"},
		event.NamespaceCreate{Name: "n", Labels: labels}, event.NamespaceUpdate{Name: "n", Labels: labels}, event.NamespaceDelete{Name: "n"},
		event.SandboxCreate{SandboxID: "s"}, event.SandboxStart{SandboxID: "s"}, event.SandboxExit{SandboxID: "s", ExitStatus: 1, ExitedAt: at},
		event.SnapshotPrepare{Key: "k", Parent: "p", Snapshotter: "o"}, event.SnapshotCommit{Key: "k", Name: "n", Snapshotter: "o"}, event.SnapshotRemove{Key: "k", Snapshotter: "o"},
		event.TaskCreate{ContainerID: "c", Bundle: "/b", Rootfs: []mount.Mount{{Type: "bind", Source: "/s", Target: "t", Options: []string{"ro"}}}, IO: event.TaskIO{Stdin: "i", Stdout: "o", Stderr: "e", Terminal: true}, Checkpoint: "x", Pid: 9},
		event.TaskStart{ContainerID: "c", Pid: 9},
		event.TaskDelete{ContainerID: "c", Pid: 9, ExitStatus: 3, ExitedAt: at, ID: "e"},
		event.TaskExit{ContainerID: "c", ID: "c", Pid: 9, ExitStatus: 137, ExitedAt: at},
		event.TaskOOM{ContainerID: "c"}, event.TaskExecAdded{ContainerID: "c", ExecID: "e"}, event.TaskExecStarted{ContainerID: "c", ExecID: "e", Pid: 4},
		event.TaskPaused{ContainerID: "c"}, event.TaskResumed{ContainerID: "c"}, event.TaskCheckpointed{ContainerID: "c", Checkpoint: "x"},
		event.Raw{Any: typed.Any{URL: "org.example.Unknown", Value: []byte("opaque")}},
	} {
		want := event.Envelope{Namespace: "ns", Topic: fmt.Sprintf("/t/%d", i), Timestamp: at, Event: p}
		publish(t, b, want)
		if diff := cmp.Diff(want, next(t, s)); diff != "" {
			t.Errorf("%T changed on its way (-want +got):\n%s", p, diff)
		}
	}
}

func testNamespaces(t *testing.T, b event.Bus) {
	s := subscribe(t, b)
	for _, name := range []string{"a", "b"} {
		publish(t, b, event.Envelope{Namespace: "x", Topic: "/images/delete", Event: event.ImageDelete{Name: name}})
	}
	publish(t, b, event.Envelope{Namespace: "other", Topic: "/images/delete", Event: event.ImageDelete{Name: "c"}})
	next(t, s)
	next(t, s)
	if e := next(t, s); e.Namespace != "other" {
		t.Errorf("the third event is of namespace %q", e.Namespace)
	}
}

func testFilters(t *testing.T, b event.Bus) {
	one := subscribe(t, b, `namespace==moby,topic~=|^/tasks/|`)
	two := subscribe(t, b, `topic=="/images/delete"`, `event.container_id==c2`)
	publish(t, b, event.Envelope{Namespace: "other", Topic: "/tasks/oom", Event: event.TaskOOM{ContainerID: "c1"}})
	publish(t, b, event.Envelope{Namespace: "moby", Topic: "/images/delete", Event: event.ImageDelete{Name: "i"}})
	publish(t, b, event.Envelope{Namespace: "moby", Topic: "/tasks/oom", Event: event.TaskOOM{ContainerID: "c2"}})
	if e := next(t, one); e.Topic != "/tasks/oom" || e.Namespace != "moby" {
		t.Errorf("the first filter passed %v", e)
	}
	if e := next(t, two); e.Topic != "/images/delete" {
		t.Errorf("the second pair of filters passed %v first", e)
	}
	if e := next(t, two); e.Topic != "/tasks/oom" || e.Namespace != "moby" {
		t.Errorf("the second pair of filters passed %v second", e)
	}
}

func testBadFilter(t *testing.T, b event.Bus) {
	for _, f := range []string{"topic~=(", "=="} {
		if s, err := b.Subscribe(t.Context(), f); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Subscribe(%q) = %v, want ErrInvalidArgument", f, err)
			if err == nil {
				s.Close()
			}
		}
	}
}

func testBadEnvelope(t *testing.T, b event.Bus) {
	ok := event.TaskOOM{ContainerID: "c"}
	for name, e := range map[string]event.Envelope{
		"no slash":       {Namespace: "ns", Topic: "tasks/oom", Event: ok},
		"empty topic":    {Namespace: "ns", Topic: "", Event: ok},
		"only slash":     {Namespace: "ns", Topic: "/", Event: ok},
		"empty part":     {Namespace: "ns", Topic: "/a//b", Event: ok},
		"bad part":       {Namespace: "ns", Topic: "/a/b c", Event: ok},
		"no event":       {Namespace: "ns", Topic: "/a"},
		"bad namespace":  {Namespace: "n/s", Topic: "/a", Event: ok},
		"trailing slash": {Namespace: "ns", Topic: "/a/", Event: ok},
	} {
		if err := b.Publish(t.Context(), e); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: Publish = %v, want ErrInvalidArgument", name, err)
		}
	}
}

func testSlow(t *testing.T, b event.Bus) {
	subscribe(t, b) // never read
	quick := subscribe(t, b)
	const n = 2000
	for i := range n {
		publish(t, b, event.Envelope{Namespace: "ns", Topic: "/tasks/start", Event: event.TaskStart{ContainerID: "c", Pid: uint32(i + 1)}})
	}
	for range n {
		next(t, quick)
	}
}

func testOrder(t *testing.T, b event.Bus) {
	s := subscribe(t, b)
	const n = 200
	for i := range n {
		publish(t, b, event.Envelope{Namespace: "ns", Topic: "/tasks/start", Event: event.TaskStart{ContainerID: "c", Pid: uint32(i + 1)}})
	}
	for i := range n {
		if e := next(t, s); e.Event.(event.TaskStart).Pid != uint32(i+1) {
			t.Fatalf("event %d is %v", i, e.Event)
		}
	}
}

func testClose(t *testing.T, b event.Bus) {
	s := subscribe(t, b)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Next with a deadline = %v", err)
	}
	publish(t, b, event.Envelope{Namespace: "ns", Topic: "/tasks/oom", Event: event.TaskOOM{ContainerID: "c"}})
	if e := next(t, s); e.Topic != "/tasks/oom" {
		t.Errorf("after a Next that was left, the next event is %v", e)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := s.Next(context.Background())
		ended <- err
	}()
	if err := s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("Next on a closed subscription returned an event")
		}
	case <-time.After(10 * time.Second):
		t.Error("Next did not return when the subscription was closed")
	}
}

func testTime(t *testing.T, b event.Bus) {
	s := subscribe(t, b)
	before := time.Now().Add(-time.Second)
	publish(t, b, event.Envelope{Namespace: "ns", Topic: "/tasks/oom", Event: event.TaskOOM{ContainerID: "c"}})
	if at := next(t, s).Timestamp; at.Before(before) || at.After(time.Now().Add(time.Second)) {
		t.Errorf("the time assigned is %v", at)
	}
}
