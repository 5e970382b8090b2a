package transferrpc

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	typesapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/streamrpc"
)

// Client is a transfer.Service at the other end of a connection.
type Client struct {
	api     transferapi.TransferClient
	streams stream.Creator
	ns      namespace.ID
	under   lease.ID
}

// NewClient makes a client.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID, under lease.ID) *Client {
	return &Client{transferapi.NewTransferClient(conn), streamrpc.NewClient(conn, ns, under), ns, under}
}

// Transfer implements transfer.Service. It opens the streams that the
// endpoints need, and returns when the transfer and all of them have ended.
func (c *Client) Transfer(ctx context.Context, src, dst transfer.Endpoint, opts transfer.Options) error {
	if src == nil || dst == nil {
		return wire.Missing("source and destination")
	}
	sctx, cancel := context.WithCancel(ctx)
	o := &outgoing{c: c, ctx: sctx}
	// The pumps end with their streams; nothing of them is left on return.
	defer o.running.Wait()
	defer cancel()
	req := &transferapi.TransferRequest{Options: &transferapi.TransferOptions{}}
	var err error
	if opts.Progress != nil {
		if req.Options.ProgressStream, err = o.progress(opts.Progress); err != nil {
			return fmt.Errorf("transfer: %w", err)
		}
	}
	if req.Source, err = o.endpoint(src); err != nil {
		return fmt.Errorf("transfer: source: %w", err)
	}
	if req.Destination, err = o.endpoint(dst); err != nil {
		return fmt.Errorf("transfer: destination: %w", err)
	}
	call := ctx
	if c.ns != "" {
		call = wire.Outgoing(ctx, c.ns, c.under)
	}
	if _, err := c.api.Transfer(call, req); err != nil {
		if in := o.failure(); in != nil {
			return fmt.Errorf("%w (%w)", err, in)
		}
		return err
	}
	// The server has ended what it sends to: read the rest.
	for _, done := range o.last {
		select {
		case <-done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if err := o.failure(); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.broken
}

// outgoing is one request's streams, on this side.
type outgoing struct {
	c       *Client
	ctx     context.Context
	running sync.WaitGroup
	last    []<-chan struct{} // of what the server sends

	mu     sync.Mutex
	err    error // of this side's own reader or writer
	broken error // of a stream
}

func (o *outgoing) failure() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

func (o *outgoing) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = err
	}
}

// stream opens a stream and lets run use it until its end.
func (o *outgoing) stream(what string, wait bool, run func(stream.Stream)) (string, error) {
	id := what + "-" + rand.Text()
	st, err := o.c.streams.Create(o.ctx, id)
	if err != nil {
		return "", err
	}
	done := make(chan struct{})
	if wait {
		o.last = append(o.last, done)
	}
	if what == "import" {
		// It may be in a Read of the caller's, which nobody can interrupt: it
		// ends when that returns.
		go run(st)
		return id, nil
	}
	o.running.Go(func() {
		defer close(done)
		run(st)
	})
	return id, nil
}

func (o *outgoing) progress(tell func(transfer.Progress)) (string, error) {
	return o.stream("progress", true, func(st stream.Stream) {
		for {
			v, err := st.Receive()
			if err != nil {
				return
			}
			var p typesapi.Progress
			if unpack(v, &p) == nil {
				tell(progressFrom(&p))
			}
		}
	})
}

func (o *outgoing) endpoint(e transfer.Endpoint) (*anypb.Any, error) {
	m, err := o.message(e)
	if err != nil {
		return nil, err
	}
	v, err := pack(m)
	if err != nil {
		return nil, err
	}
	return wire.AnyToProto(v), nil
}

func (o *outgoing) message(e transfer.Endpoint) (proto.Message, error) {
	switch e := e.(type) {
	case transfer.ImageStore:
		return imageStoreTo(e), nil
	case transfer.Registry:
		m := &typesapi.OCIRegistry{Reference: e.Reference, Resolver: &typesapi.RegistryResolver{HostDir: e.Options.HostDir, DefaultScheme: e.Options.DefaultScheme}}
		for k, v := range e.Options.Headers {
			if m.Resolver.Headers == nil {
				m.Resolver.Headers = map[string]string{}
			}
			m.Resolver.Headers[http.CanonicalHeaderKey(k)] = strings.Join(v, ", ")
		}
		if e.Options.Credentials != nil {
			id, err := o.stream("auth", false, func(st stream.Stream) { o.answer(st, e) })
			if err != nil {
				return nil, err
			}
			m.Resolver.AuthStream = id
		}
		return m, nil
	case transfer.Import:
		id, err := o.stream("import", false, func(st stream.Stream) {
			w := newByteWriter(st)
			// The server says itself why it takes no more; localReader keeps why
			// there is no more.
			_, _ = io.Copy(struct{ io.Writer }{w}, &localReader{e.Reader, o})
			if o.failure() != nil {
				// Half an archive must not look like a whole one.
				st.(stream.Aborter).Abort(nil)
				return
			}
			_ = w.Close()
			<-w.done
		})
		return &typesapi.ImageImportStream{Stream: id, MediaType: e.MediaType, ForceCompress: e.ForceCompress}, err
	case transfer.Export:
		id, err := o.stream("export", true, func(st stream.Stream) {
			_, err := io.Copy(&localWriter{e.Writer, o}, struct{ io.Reader }{&byteReader{st: st}})
			if o.failure() != nil {
				st.(stream.Aborter).Abort(nil)
			} else if err != nil {
				o.mu.Lock()
				o.broken = fmt.Errorf("export: %w", err)
				o.mu.Unlock()
			} else if err := e.Writer.Close(); err != nil {
				o.fail(fmt.Errorf("close the archive: %w", err))
			}
		})
		return &typesapi.ImageExportStream{Stream: id, MediaType: e.MediaType, Platforms: platformsTo(e.Platforms), AllPlatforms: e.AllPlatforms,
			SkipCompatibilityManifest: e.SkipCompatibilityManifest, SkipNonDistributable: e.SkipNonDistributable}, err
	}
	return nil, fmt.Errorf("endpoint %s: %w", e.TypeURL(), errdefs.ErrNotImplemented)
}

// localWriter keeps the error of the archive's own writer.
type localWriter struct {
	w io.Writer
	o *outgoing
}

func (l *localWriter) Write(b []byte) (int, error) {
	n, err := l.w.Write(b)
	if err != nil {
		l.o.fail(fmt.Errorf("write the archive: %w", err))
	}
	return n, err
}

// localReader keeps the error of the archive's own reader.
type localReader struct {
	r io.Reader
	o *outgoing
}

func (l *localReader) Read(b []byte) (int, error) {
	n, err := l.r.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		l.o.fail(fmt.Errorf("read the archive: %w", err))
	}
	return n, err
}

// answer answers what registries ask for, as far as the caller can.
func (o *outgoing) answer(st stream.Stream, e transfer.Registry) {
	for {
		v, err := st.Receive()
		if err != nil {
			return
		}
		var q typesapi.AuthRequest
		if unpack(v, &q) != nil {
			return
		}
		cred, err := e.Options.Credentials(o.ctx, authRequest(&q))
		if err != nil {
			o.fail(fmt.Errorf("credentials for %s: %w", q.Host, err))
			st.(stream.Aborter).Abort(nil)
			return
		}
		if send(st, credentialTo(cred)) != nil {
			return
		}
	}
}
