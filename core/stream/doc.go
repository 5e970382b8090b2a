// Package stream is a channel between a client and one of its own requests:
// import and export bytes, progress, credentials (contract 1.3.32).
package stream

import (
	"context"

	"github.com/gantryd/gantry/core/typed"
)

// Stream carries values in both directions. Send and Receive may be called
// concurrently with each other, each from one goroutine.
type Stream interface {
	// Send blocks until the peer takes the value or the stream ends.
	Send(v typed.Any) error
	// Receive blocks until a value comes; io.EOF after the peer has closed.
	Receive() (typed.Any, error)
	// Close ends this side. On the side that serves, it ends the stream, and
	// its id becomes free; the peer receives what was sent, then io.EOF.
	Close() error
}

// Aborter is a Stream that can end with an error, which the peer receives
// instead of io.EOF.
type Aborter interface {
	Stream
	Abort(err error)
}

// Manager knows the open streams of one namespace by id. It is safe for
// concurrent use.
type Manager interface {
	// Get takes the stream that a client opened, or returns ErrNotFound.
	Get(ctx context.Context, id string) (Stream, error)
	// Register offers s under id until free is called, which whoever serves s
	// does when it ends. ErrAlreadyExists if id is in use, ErrInvalidArgument
	// if it is empty or longer than MaxID.
	Register(ctx context.Context, id string, s Stream) (free func(), err error)
}

// MaxID is the most bytes an id may have.
const MaxID = 1024

// Creator is the client's side.
type Creator interface {
	// Create opens a stream under id. It returns when the server knows it;
	// ErrAlreadyExists if id is in use. The stream ends with ctx at the latest.
	Create(ctx context.Context, id string) (Stream, error)
}
