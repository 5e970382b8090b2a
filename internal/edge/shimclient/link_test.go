package shimclient

import (
	"context"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/namespace"
)

// mortal is a connection to a shim that ends when it is asked to.
type mortal struct {
	called []string
	done   chan struct{}
}

func (c *mortal) call(_ context.Context, _ namespace.ID, _, method string, _, _ proto.Message) error {
	if c.called = append(c.called, method); method == "Shutdown" {
		close(c.done)
	}
	return nil
}

func (c *mortal) closed() <-chan struct{} { return c.done }
func (c *mortal) close()                  {}

// A shim whose connection is just being made again is stopped all the same.
// contract: 5.2.9, 13.22
func TestStopWhileReconnecting(t *testing.T) {
	m, k, _, _ := bundled(t)
	l := &link{m: m, addr: endpoint{Address: "unix:///none"}, pidfd: -1, version: 3, users: map[user]struct{}{},
		dead: make(chan struct{}), over: make(chan struct{}), change: make(chan struct{})}
	stopped := make(chan struct{})
	go func() { defer close(stopped); l.stop(t.Context(), k) }()
	c := &mortal{done: make(chan struct{})}
	l.set(c)
	<-stopped
	if len(c.called) != 1 || c.called[0] != "Shutdown" {
		t.Errorf("the shim was asked for %q", c.called)
	}
}
