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
	// Close ends the stream. The id is free afterwards.
	Close() error
}

// Manager knows the open streams of one namespace by id.
type Manager interface {
	// Get takes the stream that a client opened, or returns ErrNotFound.
	Get(ctx context.Context, id string) (Stream, error)
	// Register offers s under id until it ends; ErrAlreadyExists if id is in use.
	Register(ctx context.Context, id string, s Stream) error
}

// Creator is the client's side.
type Creator interface {
	// Create opens a stream under id. It returns when the server knows it.
	Create(ctx context.Context, id string) (Stream, error)
}
