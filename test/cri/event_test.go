//go:build linux

package cri

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// events receives all events into a channel until the test ends.
func events(t *testing.T, n *critest.Node) <-chan *runtime.ContainerEventResponse {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s, err := n.RT.GetContainerEvents(ctx, &runtime.GetEventsRequest{})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	out, done := make(chan *runtime.ContainerEventResponse, 10_000), make(chan struct{})
	go func() {
		defer close(done)
		for {
			e, err := s.Recv()
			if err != nil {
				return // cancelled
			}
			out <- e
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return out
}

// next is the next event of a pod or one of its containers.
func next(t *testing.T, from <-chan *runtime.ContainerEventResponse, ids ...string) *runtime.ContainerEventResponse {
	t.Helper()
	late := time.After(critest.Slow(20 * time.Second))
	for {
		select {
		case e := <-from:
			if slices.Contains(ids, e.ContainerId) {
				return e
			}
		case <-late:
			t.Fatal("no event in time")
		}
	}
}

// Everything that happens to a pod and its containers is told to all
// subscribers, in order, with the state of both; one that never reads holds up
// nobody.
//
// contract: 7.1.22, 7.1.7, 1.6.9
func TestEvents(t *testing.T) {
	n := node(t)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	if _, err := n.RT.GetContainerEvents(ctx, &runtime.GetEventsRequest{}); err != nil { // never read
		t.Fatal(err)
	}
	subs := []<-chan *runtime.ContainerEventResponse{events(t, n), events(t, n), events(t, n)}
	// They are subscribed when each has seen something.
	for _, s := range subs {
		for seen := false; !seen; {
			p := n.Pod(t, "pauseless", critest.HostNetwork)
			p.Remove()
			select {
			case <-s:
				seen = true
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	for _, handler := range n.Handlers {
		p := n.Pod(t, handler)
		c := p.Run("exit 3")
		c.Wait()
		c.Remove()
		killed := p.Run("sleep 1000")
		p.Stop()
		p.Remove()
		names := map[string]string{p.ID: "pod", c.ID: "first", killed.ID: "second"}
		want := []string{"CREATED pod READY ", "STARTED pod READY ", "CREATED first READY CREATED", "STARTED first READY RUNNING", "STOPPED first READY EXITED 3", "DELETED first READY ",
			"CREATED second READY CREATED", "STARTED second READY RUNNING", "STOPPED second READY EXITED 137", "STOPPED pod NOTREADY EXITED 137", "DELETED second", "DELETED pod"}
		for i, s := range subs {
			var last int64
			for _, w := range want {
				e := next(t, s, p.ID, c.ID, killed.ID)
				got := strings.TrimSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_EVENT") + " " + names[e.ContainerId]
				if strings.Contains(w, "READY") { // of what is removed, the pod's state need not be known
					got += " " + strings.TrimPrefix(e.PodSandboxStatus.GetState().String(), "SANDBOX_") + " "
					if len(e.ContainersStatuses) == 1 {
						st := e.ContainersStatuses[0]
						got += strings.TrimPrefix(st.State.String(), "CONTAINER_")
						if st.State == runtime.ContainerState_CONTAINER_EXITED {
							got += fmt.Sprintf(" %d", st.ExitCode)
						}
					}
					if e.PodSandboxStatus.GetId() != p.ID || e.PodSandboxStatus.GetMetadata().GetName() != p.Config.Metadata.Name {
						t.Errorf("%s, subscriber %d, %q: of pod %v", handler, i, got, e.PodSandboxStatus)
					}
				}
				if got != w || e.CreatedAt < last {
					t.Errorf("%s, subscriber %d: %q, want %q", handler, i, got, w)
				}
				last = e.CreatedAt
			}
		}
	}
}

// A pod whose own process dies is not ready any more, and that is told without
// anybody asking.
//
// contract: 1.6.9, 7.1.22, 7.1.8
func TestPodDies(t *testing.T) {
	n := node(t)
	sub := events(t, n)
	for _, handler := range []string{"runc", "crun"} {
		if !slices.Contains(n.Handlers, handler) {
			continue
		}
		p := n.Pod(t, handler)
		c := p.Run("sleep 1000")
		if err := syscall.Kill(int(infoOf(t, p).Pid), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for {
			e := next(t, sub, p.ID)
			if e.ContainerEventType == runtime.ContainerEventType_CONTAINER_STOPPED_EVENT {
				if e.PodSandboxStatus.State != runtime.PodSandboxState_SANDBOX_NOTREADY {
					t.Errorf("%v", e)
				}
				break
			}
		}
		if st := p.Status().Status; st.State != runtime.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("%v", st)
		}
		// Its container has a PID namespace of its own and goes on until it is stopped.
		if st := c.Status(); st.State != runtime.ContainerState_CONTAINER_RUNNING {
			t.Errorf("%v", st)
		}
		p.Stop()
		if st := c.Wait(); st.ExitCode != 137 {
			t.Errorf("%v", st)
		}
	}
}
