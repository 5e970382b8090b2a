package transferrpc

import (
	"errors"
	"fmt"
	"io"
	"sync"

	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/typed"
)

// The flow control of byte streams, in bytes (contract 6.3.6): the reader
// grants window after window, the writer sends frames within them.
const (
	windowSize = 64 << 10
	frameSize  = 32 << 10
)

func pack(m proto.Message) (typed.Any, error) {
	b, err := proto.Marshal(m)
	return typed.Any{URL: string(m.ProtoReflect().Descriptor().FullName()), Value: b}, err
}

func unpack(v typed.Any, m proto.Message) error {
	if want := string(m.ProtoReflect().Descriptor().FullName()); v.URL != want {
		return fmt.Errorf("message of type %.100q on a stream, want %s: %w", v.URL, want, errdefs.ErrInvalidArgument)
	}
	if err := proto.Unmarshal(v.Value, m); err != nil {
		return fmt.Errorf("message of type %s: %v: %w", v.URL, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func send(st stream.Stream, m proto.Message) error {
	v, err := pack(m)
	if err != nil {
		return err
	}
	return st.Send(v)
}

// byteReader reads the bytes that the peer sends. One goroutine uses it.
type byteReader struct {
	st      stream.Stream
	granted int
	rest    []byte
	err     error
}

func (r *byteReader) Read(b []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		r.err = r.fill()
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *byteReader) fill() error {
	if r.granted < windowSize {
		// The peer may have sent all and closed; then what it sent is still to come.
		if err := send(r.st, &transferapi.WindowUpdate{Update: windowSize}); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrClosedPipe) {
			return fmt.Errorf("byte stream: %w", err)
		}
		r.granted += windowSize
	}
	v, err := r.st.Receive()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return io.EOF
		}
		return fmt.Errorf("byte stream: %w", err)
	}
	var d transferapi.Data
	if err := unpack(v, &d); err != nil {
		return err
	}
	if len(d.Data) > r.granted {
		return fmt.Errorf("byte stream: %d bytes where %d were granted: %w", len(d.Data), r.granted, errdefs.ErrInvalidArgument)
	}
	r.granted -= len(d.Data)
	r.rest = d.Data
	return nil
}

// byteWriter sends bytes to the peer, as much as it has granted.
type byteWriter struct {
	st stream.Stream

	mu     sync.Mutex
	window int
	err    error
	more   chan struct{} // has room for one; filled when window or err change
	done   chan struct{} // closed when the receiving goroutine has ended
}

// newByteWriter starts to receive grants; that ends with the stream.
func newByteWriter(st stream.Stream) *byteWriter {
	w := &byteWriter{st: st, more: make(chan struct{}, 1), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for {
			var u transferapi.WindowUpdate
			v, err := st.Receive()
			if err == nil {
				err = unpack(v, &u)
			}
			w.mu.Lock()
			if err != nil {
				w.err = err
			} else if u.Update > 0 && w.window < 1<<30 {
				w.window += int(u.Update)
			}
			w.mu.Unlock()
			select {
			case w.more <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	return w
}

func (w *byteWriter) Write(b []byte) (int, error) {
	sent := 0
	for sent < len(b) {
		w.mu.Lock()
		n, err := min(w.window, frameSize, len(b)-sent), w.err
		w.window -= n
		w.mu.Unlock()
		if n == 0 {
			if err != nil {
				if errors.Is(err, io.EOF) {
					err = io.ErrClosedPipe
				}
				return sent, fmt.Errorf("byte stream: the peer takes no more: %w", err)
			}
			<-w.more // filled at the latest when the stream ends
			continue
		}
		if err := send(w.st, &transferapi.Data{Data: b[sent : sent+n]}); err != nil {
			return sent, fmt.Errorf("byte stream: %w", err)
		}
		sent += n
	}
	return sent, nil
}

// Close ends the stream.
func (w *byteWriter) Close() error { return w.st.Close() }
