// Package event tells what happened: an envelope with a topic, a namespace, a
// time and a payload. Payloads that Gantry knows are the structs of this
// package; all others travel untouched as Raw. The wire form is made at the edge.
package event

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/namespace"
)

// Payload is what happened. It is one of this package's structs, by value, or Raw.
type Payload interface {
	// TypeURL is the name that the payload has on the wire (contract 1.6).
	TypeURL() string
	// Field returns a field by its wire name, for filters: "container_id", or
	// "labels", "key" for an entry of a map.
	Field(path []string) (value string, present bool)
}

// Envelope is one event. Topics start with '/' (contract 1.6).
type Envelope struct {
	Timestamp time.Time    `json:"timestamp"`
	Namespace namespace.ID `json:"namespace"`
	Topic     string       `json:"topic"`
	Event     Payload      `json:"event"`
}

// Check returns ErrInvalidArgument unless the envelope may be published
// (contract 1.3.13).
func (e Envelope) Check() error {
	if err := namespace.Check(e.Namespace); err != nil {
		return err
	}
	rest, ok := strings.CutPrefix(e.Topic, "/")
	if !ok || rest == "" {
		return fmt.Errorf("topic %q must start with '/' and have a name: %w", e.Topic, errdefs.ErrInvalidArgument)
	}
	for _, part := range strings.Split(rest, "/") {
		if err := ident.Check("topic component", part); err != nil {
			return fmt.Errorf("topic %q: %w", e.Topic, err)
		}
	}
	if e.Event == nil {
		return fmt.Errorf("publish %s: event must not be empty: %w", e.Topic, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Field looks up namespace, topic and event.<field> for filters (contract 1.2.8).
func (e Envelope) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "namespace":
		return string(e.Namespace), e.Namespace != ""
	case "topic":
		return e.Topic, e.Topic != ""
	case "event":
		if e.Event != nil {
			return e.Event.Field(path[1:])
		}
	}
	return "", false
}

// Publisher takes events.
type Publisher interface {
	// Publish hands e to every subscriber. It never waits for one. A zero
	// Timestamp is set to now. ErrInvalidArgument as Check says.
	Publish(ctx context.Context, e Envelope) error
}

// Retainer is a Publisher that can also keep an event for a while, for
// subscribers that come back after the daemon was away.
type Retainer interface {
	// PublishFor is Publish that hands e to the subscriptions as well that begin
	// within d, before what they would get otherwise.
	PublishFor(ctx context.Context, e Envelope, d time.Duration) error
}

// Subscription is one reader's queue of events, in the order of publishing.
type Subscription interface {
	// Next returns the next event, waiting until there is one. It returns
	// ctx's error, or ErrUnavailable after the bus has closed.
	Next(ctx context.Context) (Envelope, error)
	// Close ends the subscription. A Next under way returns.
	Close() error
}

// Bus is the place where events meet their readers. It is safe for concurrent use.
type Bus interface {
	Publisher
	// Subscribe begins to queue events of all namespaces that match one of the
	// filters (fields namespace, topic, event.<field>), all if there are none
	// (contract 1.3.15). When it returns, nothing published later is missed.
	// A bad filter is ErrInvalidArgument.
	Subscribe(ctx context.Context, filters ...string) (Subscription, error)
}
