// Package transferrpc is containerd.services.transfer.v1 on both sides, with
// the streams that transfers use: bytes of archives, progress, credentials
// (contract 1.3.41, 6.3).
package transferrpc

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	typesapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/streamrpc"
	echo "github.com/gantryd/gantry/internal/service/transfer"
)

// flushTimeout is how long the end of a transfer waits for a client that does
// not read its progress.
const flushTimeout = 2 * time.Second

// Server transfers in views.
type Server struct {
	transferapi.UnimplementedTransferServer
	views   view.Source
	streams streamrpc.Managers
}

// NewServer makes a server. streams is what streamrpc registers streams with.
func NewServer(views view.Source, streams streamrpc.Managers) *Server {
	return &Server{views: views, streams: streams}
}

// call is one request's streams.
type call struct {
	ctx     context.Context
	streams stream.Manager

	mu    sync.Mutex
	open  []stream.Stream
	bytes []stream.Stream // those of open that carry archives
	ended error           // why take gives no more
}

// take gets a stream, which the call then owns.
func (c *call) take(id, what string) (stream.Stream, error) {
	if id == "" {
		return nil, fmt.Errorf("the %s stream's id is required: %w", what, errdefs.ErrInvalidArgument)
	}
	st, err := c.streams.Get(c.ctx, id)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended != nil {
		return nil, c.ended
	}
	c.open = append(c.open, st)
	if what == "import" || what == "export" {
		c.bytes = append(c.bytes, st)
	}
	return st, nil
}

// end closes all streams; those of archives with an error if there is one, so
// that half an archive does not look like a whole one.
func (c *call) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = err
	for _, st := range c.bytes {
		if a, ok := st.(stream.Aborter); ok && err != nil {
			a.Abort(err)
		}
	}
	for _, st := range c.open {
		_ = st.Close()
	}
}

// Transfer implements the RPC. A namespace is not needed to copy a stream to
// another (contract 15, 1.2.1).
func (s *Server) Transfer(ctx context.Context, r *transferapi.TransferRequest) (_ *emptypb.Empty, err error) {
	ns, err := wire.OptionalNamespace(ctx)
	if err != nil {
		return nil, err
	}
	if r.Source == nil || r.Destination == nil {
		return nil, wire.Missing("source and destination")
	}
	c := &call{ctx: ctx, streams: s.streams.In(ns)}
	defer func() { c.end(err) }()
	// What blocks on a stream cannot see ctx: closing the stream wakes it.
	stop := context.AfterFunc(ctx, func() { c.end(context.Cause(ctx)) })
	defer stop()
	src, err := c.endpoint(r.Source, r)
	if err != nil {
		return nil, fmt.Errorf("transfer: source: %w", err)
	}
	dst, err := c.endpoint(r.Destination, r)
	if err != nil {
		return nil, fmt.Errorf("transfer: destination: %w", err)
	}
	in, okIn := src.(transfer.Import)
	out, okOut := dst.(transfer.Export)
	if okIn && okOut {
		return &emptypb.Empty{}, echo.Echo(ctx, in, out)
	}
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	var opts transfer.Options
	finish := func() {}
	if id := r.Options.GetProgressStream(); id != "" {
		st, err := c.take(id, "progress")
		if err != nil {
			return nil, err
		}
		t := newTeller(st)
		opts.Progress = t.tell
		finish = func() {
			timer := time.NewTimer(flushTimeout)
			defer timer.Stop()
			select {
			case <-t.finish():
			case <-timer.C:
			case <-ctx.Done():
			}
		}
	}
	err = v.Transfer().Transfer(ctx, src, dst, opts)
	finish()
	if err != nil {
		if errors.Is(err, context.Canceled) && ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// endpoint reads a source or destination. Streams are taken here, so an
// unknown one fails before anything is done.
func (c *call) endpoint(a *anypb.Any, r *transferapi.TransferRequest) (transfer.Endpoint, error) {
	v := wire.AnyFromProto(a)
	read := func(m proto.Message) error {
		if err := proto.Unmarshal(v.Value, m); err != nil {
			return fmt.Errorf("%s: %v: %w", v.URL, err, errdefs.ErrInvalidArgument)
		}
		return nil
	}
	switch v.URL {
	case transfer.Registry{}.TypeURL():
		var m typesapi.OCIRegistry
		if err := read(&m); err != nil {
			return nil, err
		}
		var auth stream.Stream
		if id := m.Resolver.GetAuthStream(); id != "" {
			var err error
			if auth, err = c.take(id, "auth"); err != nil {
				return nil, err
			}
		}
		return registryFrom(&m, auth), nil
	case transfer.ImageStore{}.TypeURL():
		var m typesapi.ImageStore
		if err := read(&m); err != nil {
			return nil, err
		}
		return imageStoreFrom(&m), nil
	case transfer.Import{}.TypeURL():
		var m typesapi.ImageImportStream
		if err := read(&m); err != nil {
			return nil, err
		}
		st, err := c.take(m.Stream, "import")
		if err != nil {
			return nil, err
		}
		return transfer.Import{Reader: &byteReader{st: st}, MediaType: m.MediaType, ForceCompress: m.ForceCompress}, nil
	case transfer.Export{}.TypeURL():
		var m typesapi.ImageExportStream
		if err := read(&m); err != nil {
			return nil, err
		}
		st, err := c.take(m.Stream, "export")
		if err != nil {
			return nil, err
		}
		return exportFrom(&m, newByteWriter(st)), nil
	}
	return nil, fmt.Errorf("transfer from %.100q to %.100q: %w", wire.AnyFromProto(r.Source).URL, wire.AnyFromProto(r.Destination).URL, errdefs.ErrNotImplemented)
}
