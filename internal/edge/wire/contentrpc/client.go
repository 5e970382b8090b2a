package contentrpc

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"time"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// closeTimeout is how long Close of a Writer waits for the server to let go of
// the ref.
const closeTimeout = 10 * time.Second

type client struct {
	c     api.ContentClient
	ns    namespace.ID
	under lease.ID
}

// NewClient returns the content of a namespace of the server at the other end,
// written under a lease unless that is "". Its ReaderAts and Writers end with
// the context of the call that made them. A ReaderAt asks for each range anew:
// after a delete it is ErrNotFound. A Writer is at its end after any error.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID, under lease.ID) content.Store {
	return &client{c: api.NewContentClient(conn), ns: ns, under: under}
}

func (c *client) out(ctx context.Context) context.Context {
	return wire.Outgoing(ctx, c.ns, c.under)
}

// Info implements content.Store.
func (c *client) Info(ctx context.Context, dgst digest.Digest) (content.Info, error) {
	resp, err := c.c.Info(c.out(ctx), &api.InfoRequest{Digest: dgst.String()})
	return infoFromProto(resp.GetInfo()), err
}

// Walk implements content.Store.
func (c *client) Walk(ctx context.Context, fn func(content.Info) error, filters ...string) error {
	ctx, cancel := context.WithCancel(c.out(ctx))
	defer cancel()
	stream, err := c.c.List(ctx, &api.ListContentRequest{Filters: filters})
	if err != nil {
		return err
	}
	return wire.Receive(stream, func(m *api.ListContentResponse) error {
		for _, i := range m.Info {
			if err := fn(infoFromProto(i)); err != nil {
				return err
			}
		}
		return nil
	})
}

// Update implements content.Store.
func (c *client) Update(ctx context.Context, info content.Info, fields ...string) (content.Info, error) {
	resp, err := c.c.Update(c.out(ctx), &api.UpdateRequest{Info: infoToProto(info), UpdateMask: wire.Mask(fields)})
	return infoFromProto(resp.GetInfo()), err
}

// Delete implements content.Store.
func (c *client) Delete(ctx context.Context, dgst digest.Digest) error {
	_, err := c.c.Delete(c.out(ctx), &api.DeleteContentRequest{Digest: dgst.String()})
	return err
}

// Open implements content.Store.
func (c *client) Open(ctx context.Context, dgst digest.Digest) (content.ReaderAt, error) {
	info, err := c.Info(ctx, dgst)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(c.out(ctx))
	return &readerAt{c: c.c, ctx: ctx, cancel: cancel, dgst: dgst, size: info.Size}, nil
}

type readerAt struct {
	c      api.ContentClient
	ctx    context.Context
	cancel func()
	dgst   digest.Digest
	size   int64

	mu      sync.Mutex // guards what follows; not held over calls
	next    int64      // where a reader in sequence would go on
	ahead   []byte     // what was read ahead for it; never written to
	aheadAt int64
}

func (r *readerAt) Size() int64 { return r.size }

func (r *readerAt) Close() error {
	r.cancel()
	return nil
}

func (r *readerAt) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, &fs.PathError{Op: "read", Path: r.dgst.String(), Err: fs.ErrInvalid}
	}
	if off >= r.size {
		return 0, io.EOF
	}
	whole := len(p)
	p = p[:min(int64(len(p)), r.size-off)]
	for n < len(p) && err == nil {
		var m int
		m, err = r.readSome(p[n:], off+int64(n))
		n += m
	}
	if err == nil && n < whole {
		err = io.EOF
	}
	return n, err
}

// readSome reads at least a byte. A small read where the last one ended gets a
// whole chunk, which serves those that follow: copying goes in small steps,
// and a call for each would be slow.
func (r *readerAt) readSome(p []byte, off int64) (int, error) {
	r.mu.Lock()
	sequential := off == r.next
	if i := off - r.aheadAt; i >= 0 && i < int64(len(r.ahead)) {
		n := copy(p, r.ahead[i:])
		r.next = off + int64(n)
		r.mu.Unlock()
		return n, nil
	}
	r.next = off + int64(len(p))
	r.mu.Unlock()
	if !sequential || len(p) >= chunk {
		return r.fetch(p, off)
	}
	block := make([]byte, min(chunk, r.size-off))
	n, err := r.fetch(block, off)
	r.mu.Lock()
	r.ahead, r.aheadAt = block[:n], off
	r.mu.Unlock()
	return copy(p, block[:n]), err
}

// fetch fills p from the server.
func (r *readerAt) fetch(p []byte, off int64) (n int, err error) {
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	stream, err := r.c.Read(ctx, &api.ReadContentRequest{Digest: r.dgst.String(), Offset: off, Size: int64(len(p))})
	if err != nil {
		return 0, err
	}
	for n < len(p) {
		resp, err := stream.Recv()
		if err == io.EOF {
			return n, fmt.Errorf("read content %s at %d: %w", r.dgst, off+int64(n), io.ErrUnexpectedEOF)
		}
		if err != nil {
			return n, err
		}
		if len(resp.Data) > len(p)-n {
			return n, fmt.Errorf("read content %s at %d: the server sent more than was asked for: %w", r.dgst, off, errdefs.ErrOutOfRange)
		}
		n += copy(p[n:], resp.Data)
	}
	return n, nil
}

// Status implements content.Store.
func (c *client) Status(ctx context.Context, ref string) (content.Status, error) {
	resp, err := c.c.Status(c.out(ctx), &api.StatusRequest{Ref: ref})
	return statusFromProto(resp.GetStatus()), err
}

// Statuses implements content.Store.
func (c *client) Statuses(ctx context.Context, filters ...string) ([]content.Status, error) {
	resp, err := c.c.ListStatuses(c.out(ctx), &api.ListStatusesRequest{Filters: filters})
	if err != nil {
		return nil, err
	}
	var out []content.Status
	for _, st := range resp.Statuses {
		out = append(out, statusFromProto(st))
	}
	slices.SortFunc(out, func(a, b content.Status) int { return cmp.Compare(a.Ref, b.Ref) })
	return out, nil
}

// Abort implements content.Store.
func (c *client) Abort(ctx context.Context, ref string) error {
	_, err := c.c.Abort(c.out(ctx), &api.AbortRequest{Ref: ref})
	return err
}

// Writer implements content.Store.
func (c *client) Writer(ctx context.Context, ref string, opts content.WriterOptions) (content.Writer, error) {
	ctx, cancel := context.WithCancel(c.out(ctx))
	stream, err := c.c.Write(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	w := &writer{stream: stream, cancel: cancel}
	w.status.Ref, w.status.Expected = ref, opts.Expected
	if _, err := w.call(&api.WriteContentRequest{
		Action: api.WriteAction_STAT, Ref: ref, Total: opts.Total, Expected: opts.Expected.String(),
	}); err != nil {
		return nil, err
	}
	return w, nil
}

// writer is one Write stream. It sends a message and waits for its answer.
type writer struct {
	stream api.Content_WriteClient // nil after the end
	cancel func()
	status content.Status // as of the last answer
	digest digest.Digest
}

// call returns the answer to req. After an error the stream is gone.
func (w *writer) call(req *api.WriteContentRequest) (*api.WriteContentResponse, error) {
	if w.stream == nil {
		return nil, fmt.Errorf("write %s: the writer is closed: %w", w.status.Ref, errdefs.ErrFailedPrecondition)
	}
	err := w.stream.Send(req)
	var resp *api.WriteContentResponse
	if err == nil || err == io.EOF { // EOF: the answer says why
		resp, err = w.stream.Recv()
	}
	if err == io.EOF {
		err = fmt.Errorf("write %s: the server ended the stream: %w", w.status.Ref, io.ErrUnexpectedEOF)
	}
	if err == nil && resp.Action != req.Action {
		err = fmt.Errorf("write %s: %s answered by %s: %w", w.status.Ref, req.Action, resp.Action, errdefs.ErrUnknown)
	}
	if err != nil {
		w.end()
		return nil, err
	}
	w.status.Offset, w.status.Total = resp.Offset, resp.Total
	w.status.StartedAt, w.status.UpdatedAt = wire.TimeFromProto(resp.StartedAt), wire.TimeFromProto(resp.UpdatedAt)
	w.digest = digest.Digest(resp.Digest)
	return resp, nil
}

// end waits until the server has let go of the ref.
func (w *writer) end() {
	if w.stream == nil {
		return
	}
	timer := time.AfterFunc(closeTimeout, w.cancel)
	err := w.stream.CloseSend()
	for err == nil {
		_, err = w.stream.Recv() // the end of the stream is an error as well
	}
	timer.Stop()
	w.cancel()
	w.stream = nil
}

// Write implements content.Writer.
func (w *writer) Write(p []byte) (n int, err error) {
	if w.stream == nil {
		_, err := w.call(nil)
		return 0, err
	}
	for n < len(p) {
		data := p[n:min(len(p), n+chunk)]
		offset := w.status.Offset
		resp, err := w.call(&api.WriteContentRequest{Action: api.WriteAction_WRITE, Offset: offset, Data: data})
		if err != nil {
			return n, err
		}
		if resp.Offset != offset+int64(len(data)) {
			w.end()
			return n, fmt.Errorf("write %s: the server is at %d instead of %d: %w", w.status.Ref, resp.Offset, offset+int64(len(data)), io.ErrShortWrite)
		}
		n += len(data)
	}
	return n, nil
}

// Digest implements content.Writer.
func (w *writer) Digest() digest.Digest { return w.digest }

// Status implements content.Writer.
func (w *writer) Status() (content.Status, error) {
	if w.stream == nil {
		return w.status, nil
	}
	_, err := w.call(&api.WriteContentRequest{Action: api.WriteAction_STAT})
	return w.status, err
}

// Truncate implements content.Writer.
func (w *writer) Truncate(size int64) error {
	if size != 0 {
		return fmt.Errorf("truncate %s to %d: only to 0: %w", w.status.Ref, size, errdefs.ErrInvalidArgument)
	}
	resp, err := w.call(&api.WriteContentRequest{Action: api.WriteAction_WRITE})
	if err == nil && resp.Offset != 0 {
		w.end()
		err = fmt.Errorf("truncate %s: the server stays at %d: %w", w.status.Ref, resp.Offset, errdefs.ErrNotImplemented)
	}
	return err
}

// Commit implements content.Writer.
func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error {
	if size < 0 { // which on the wire means unknown
		return fmt.Errorf("commit %s with size %d: %w", w.status.Ref, size, errdefs.ErrFailedPrecondition)
	}
	defer context.AfterFunc(ctx, w.cancel)()
	_, err := w.call(&api.WriteContentRequest{
		Action: api.WriteAction_COMMIT, Offset: w.status.Offset, Total: size, Expected: expected.String(), Labels: labels,
	})
	if err == nil {
		w.end()
	}
	return err
}

// Close implements content.Writer.
func (w *writer) Close() error {
	w.end()
	return nil
}
