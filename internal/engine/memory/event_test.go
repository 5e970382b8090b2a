package memory

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/event/eventtest"
)

func TestBus(t *testing.T) {
	eventtest.Run(t, func(*testing.T) event.Bus { return NewBus() })
}

// TestPublishFor: who subscribes in time gets what was kept, once, in order
// and before everything else; who was there before got it already.
func TestPublishFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		b := NewBus()
		exit := func(id string) event.Envelope {
			return event.Envelope{Namespace: "a", Topic: event.TopicTaskExit, Event: event.TaskExit{ContainerID: id, ID: id}}
		}
		subscribe := func(filters ...string) event.Subscription {
			s, err := b.Subscribe(ctx, filters...)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		got := func(s event.Subscription) (ids string) {
			for {
				e, ok := s.(*subscription).pop()
				if !ok {
					return ids
				}
				ids += e.Event.(event.TaskExit).ID
			}
		}
		early := subscribe()
		if err := b.PublishFor(ctx, exit("1"), 10*time.Second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := b.PublishFor(ctx, exit("2"), 10*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := b.PublishFor(ctx, event.Envelope{Namespace: "a", Topic: "bad"}, time.Hour); err == nil {
			t.Error("an event that may not be published was kept")
		}
		inTime, other := subscribe(), subscribe(`event.container_id==2`)
		if err := b.Publish(ctx, exit("3")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(9 * time.Second) // the first has been kept long enough
		later := subscribe()
		time.Sleep(time.Second)
		late := subscribe()
		for _, c := range []struct {
			who  string
			s    event.Subscription
			want string
		}{{"early", early, "123"}, {"in time", inTime, "123"}, {"with a filter", other, "2"}, {"later", later, "2"}, {"too late", late, ""}} {
			if got := got(c.s); got != c.want {
				t.Errorf("the subscriber who came %s got %q, want %q", c.who, got, c.want)
			}
		}
	})
}
