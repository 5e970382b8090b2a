// Package contentrpc is containerd.services.content.v1, server and client
// (contract 1.3.6 to 1.3.10). Messages stay far below the limit of 16 MiB
// whatever is stored or written: data goes in pieces, lists in batches.
package contentrpc

import (
	"cmp"
	"context"
	"fmt"
	"io"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
)

const (
	// chunk is how many bytes of data a message carries at most. Servers of
	// other people take 4 MiB unless told otherwise.
	chunk = 1 << 20
	// A message of a list ends with this many items or bytes.
	batchItems = 100
	batchBytes = 2 << 20
)

// Server serves the content stores of a source's views.
type Server struct {
	api.UnimplementedContentServer
	src view.Source
}

// NewServer returns the service.
func NewServer(src view.Source) *Server { return &Server{src: src} }

func (s *Server) store(ctx context.Context) (content.Store, error) {
	v, err := wire.View(ctx, s.src)
	if err != nil {
		return nil, err
	}
	return v.Content(), nil
}

// parseDigest returns the digest, or ErrInvalidArgument.
func parseDigest(text string) (digest.Digest, error) {
	dgst, err := digest.Parse(text)
	if err != nil {
		return "", fmt.Errorf("digest %q: %w: %w", text, err, errdefs.ErrInvalidArgument)
	}
	return dgst, nil
}

// Info implements the call of that name.
func (s *Server) Info(ctx context.Context, req *api.InfoRequest) (*api.InfoResponse, error) {
	store, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	dgst, err := parseDigest(req.Digest)
	if err != nil {
		return nil, err
	}
	info, err := store.Info(ctx, dgst)
	return &api.InfoResponse{Info: infoToProto(info)}, err
}

// Update implements the call of that name.
func (s *Server) Update(ctx context.Context, req *api.UpdateRequest) (*api.UpdateResponse, error) {
	store, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	if req.Info == nil {
		return nil, wire.Missing("info")
	}
	if _, err := parseDigest(req.Info.Digest); err != nil {
		return nil, err
	}
	info, err := store.Update(ctx, infoFromProto(req.Info), req.UpdateMask.GetPaths()...)
	return &api.UpdateResponse{Info: infoToProto(info)}, err
}

// List implements the call of that name.
func (s *Server) List(req *api.ListContentRequest, stream api.Content_ListServer) error {
	store, err := s.store(stream.Context())
	if err != nil {
		return err
	}
	var batch []*api.Info
	size := 0
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := stream.Send(&api.ListContentResponse{Info: batch})
		batch, size = nil, 0
		return err
	}
	err = store.Walk(stream.Context(), func(i content.Info) error {
		p := infoToProto(i)
		n := proto.Size(p)
		if len(batch) == batchItems || size+n > batchBytes {
			if err := flush(); err != nil {
				return err
			}
		}
		batch, size = append(batch, p), size+n
		return nil
	}, req.Filters...)
	if err != nil {
		return err
	}
	return flush()
}

// Delete implements the call of that name.
func (s *Server) Delete(ctx context.Context, req *api.DeleteContentRequest) (*emptypb.Empty, error) {
	store, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	dgst, err := parseDigest(req.Digest)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, store.Delete(ctx, dgst)
}

// Read implements the call of that name. The offsets of its messages count
// from where the read began (contract 15, 1.3.7).
func (s *Server) Read(req *api.ReadContentRequest, stream api.Content_ReadServer) error {
	store, err := s.store(stream.Context())
	if err != nil {
		return err
	}
	dgst, err := parseDigest(req.Digest)
	if err != nil {
		return err
	}
	r, err := store.Open(stream.Context(), dgst)
	if err != nil {
		return err
	}
	defer r.Close()
	if req.Offset < 0 || req.Size < 0 || req.Offset > r.Size() {
		return fmt.Errorf("read %d bytes at %d of content %s, which has %d: %w", req.Size, req.Offset, dgst, r.Size(), errdefs.ErrOutOfRange)
	}
	length := r.Size() - req.Offset
	if req.Size > 0 {
		length = min(length, req.Size)
	}
	buf := make([]byte, min(length, chunk))
	for sent := int64(0); sent < length; {
		p := buf[:min(int64(len(buf)), length-sent)]
		n, err := r.ReadAt(p, req.Offset+sent)
		if n < len(p) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read content %s at %d: %w", dgst, req.Offset+sent+int64(n), err)
		}
		if err := stream.Send(&api.ReadContentResponse{Offset: sent, Data: p}); err != nil {
			return err
		}
		sent += int64(n)
	}
	return nil
}

// Status implements the call of that name.
func (s *Server) Status(ctx context.Context, req *api.StatusRequest) (*api.StatusResponse, error) {
	store, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	st, err := store.Status(ctx, req.Ref)
	return &api.StatusResponse{Status: statusToProto(st)}, err
}

// ListStatuses implements the call of that name.
func (s *Server) ListStatuses(ctx context.Context, req *api.ListStatusesRequest) (*api.ListStatusesResponse, error) {
	store, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	all, err := store.Statuses(ctx, req.Filters...)
	if err != nil {
		return nil, err
	}
	resp := &api.ListStatusesResponse{}
	for _, st := range all {
		resp.Statuses = append(resp.Statuses, statusToProto(st))
	}
	return resp, nil
}

// Abort implements the call of that name.
func (s *Server) Abort(ctx context.Context, req *api.AbortRequest) (*emptypb.Empty, error) {
	store, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	if err := store.Abort(ctx, req.Ref); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// Write implements the call of that name. The stream holds the ref until it
// ends; without a commit the ingest stays, to be resumed.
func (s *Server) Write(stream api.Content_WriteServer) (err error) {
	ctx := stream.Context()
	store, err := s.store(ctx)
	if err != nil {
		return err
	}
	req, err := stream.Recv()
	if err == io.EOF {
		return fmt.Errorf("write content: the stream ended before a message: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return err
	}
	if req.Ref == "" {
		return fmt.Errorf("write content: the first message must have a ref: %w", errdefs.ErrInvalidArgument)
	}
	ses := &session{ctx: ctx, store: store, ref: req.Ref}
	if err := ses.announce(req); err != nil {
		return err
	}
	if ses.w, err = store.Writer(ctx, ses.ref, content.WriterOptions{Total: ses.total, Expected: ses.expected}); err != nil {
		return err
	}
	defer func() {
		if cerr := ses.w.Close(); err == nil {
			err = cerr
		}
	}()
	for {
		resp, err := ses.step(req)
		if err != nil {
			return err
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
		if req.Action == api.WriteAction_COMMIT {
			return nil
		}
		req, err = stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := ses.announce(req); err != nil {
			return err
		}
	}
}

// session is one Write stream.
type session struct {
	ctx      context.Context
	store    content.Store
	ref      string
	total    int64         // 0 until a message says it
	expected digest.Digest // "" until a message says it
	w        content.Writer
}

// announce takes from a message what it says of the whole: that may be said
// late, but not be changed.
func (s *session) announce(req *api.WriteContentRequest) error {
	if req.Ref != "" && req.Ref != s.ref {
		return fmt.Errorf("write %s: a stream has one ref, not %s as well: %w", s.ref, req.Ref, errdefs.ErrInvalidArgument)
	}
	if req.Offset < 0 {
		return fmt.Errorf("write %s: offset %d: %w", s.ref, req.Offset, errdefs.ErrOutOfRange)
	}
	if req.Total > 0 {
		if s.total > 0 && s.total != req.Total {
			return fmt.Errorf("write %s: total was %d and cannot become %d: %w", s.ref, s.total, req.Total, errdefs.ErrFailedPrecondition)
		}
		s.total = req.Total
	}
	if req.Expected == "" || req.Expected == s.expected.String() {
		return nil
	}
	dgst, err := parseDigest(req.Expected)
	if err != nil {
		return fmt.Errorf("write %s: %w", s.ref, err)
	}
	if s.expected != "" {
		return fmt.Errorf("write %s: expected digest was %s and cannot become %s: %w", s.ref, s.expected, dgst, errdefs.ErrFailedPrecondition)
	}
	s.expected = dgst
	if s.w == nil || req.Action == api.WriteAction_COMMIT {
		return nil // Writer and Commit look whether it is there
	}
	return s.expectedExists()
}

// expectedExists ends the ingest with ErrAlreadyExists if the client said only
// now what it writes and it is there. The store does that, and what else is
// due, such as the lease's reference, when a Writer is opened.
func (s *session) expectedExists() error {
	if _, err := s.store.Info(s.ctx, s.expected); err != nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	if err := s.w.Close(); err != nil {
		return err
	}
	w, err := s.store.Writer(s.ctx, s.ref, content.WriterOptions{Total: s.total, Expected: s.expected})
	if err != nil {
		return err
	}
	s.w = w // it has been deleted meanwhile: go on
	return nil
}

// step does what a message asks for.
func (s *session) step(req *api.WriteContentRequest) (*api.WriteContentResponse, error) {
	switch req.Action {
	case api.WriteAction_STAT:
		return s.answer(req.Action)
	case api.WriteAction_WRITE, api.WriteAction_COMMIT:
	default:
		return nil, fmt.Errorf("write %s: unknown action %d: %w", s.ref, req.Action, errdefs.ErrInvalidArgument)
	}
	st, err := s.w.Status()
	if err != nil {
		return nil, err
	}
	if req.Offset != st.Offset {
		if req.Offset != 0 {
			return nil, fmt.Errorf("write %s at %d: the next byte is at %d: %w", s.ref, req.Offset, st.Offset, errdefs.ErrOutOfRange)
		}
		if err := s.w.Truncate(0); err != nil {
			return nil, err
		}
	}
	if len(req.Data) > 0 {
		n, err := s.w.Write(req.Data)
		if err != nil {
			return nil, err
		}
		if n < len(req.Data) {
			return nil, fmt.Errorf("write %s at %d: %d bytes of %d: %w", s.ref, req.Offset, n, len(req.Data), io.ErrShortWrite)
		}
	}
	resp, err := s.answer(req.Action) // before a commit: there is an ingest to ask
	if err != nil || req.Action == api.WriteAction_WRITE {
		return resp, err
	}
	if err := s.w.Commit(s.ctx, s.total, s.expected, req.Labels); err != nil {
		return nil, err
	}
	if s.expected != "" {
		resp.Digest = s.expected.String()
	}
	return resp, nil
}

func (s *session) answer(action api.WriteAction) (*api.WriteContentResponse, error) {
	st, err := s.w.Status()
	if err != nil {
		return nil, err
	}
	total := cmp.Or(s.total, st.Total)
	return &api.WriteContentResponse{
		Action:    action,
		Offset:    st.Offset,
		Total:     total,
		Digest:    s.w.Digest().String(),
		StartedAt: wire.TimeToProto(st.StartedAt),
		UpdatedAt: wire.TimeToProto(st.UpdatedAt),
	}, nil
}

func infoToProto(i content.Info) *api.Info {
	return &api.Info{
		Digest:    i.Digest.String(),
		Size:      i.Size,
		CreatedAt: wire.TimeToProto(i.CreatedAt),
		UpdatedAt: wire.TimeToProto(i.UpdatedAt),
		Labels:    i.Labels,
	}
}

func infoFromProto(p *api.Info) content.Info {
	return content.Info{
		Digest:    digest.Digest(p.GetDigest()),
		Size:      p.GetSize(),
		CreatedAt: wire.TimeFromProto(p.GetCreatedAt()),
		UpdatedAt: wire.TimeFromProto(p.GetUpdatedAt()),
		Labels:    p.GetLabels(),
	}
}

func statusToProto(st content.Status) *api.Status {
	return &api.Status{
		Ref:       st.Ref,
		Offset:    st.Offset,
		Total:     st.Total,
		Expected:  st.Expected.String(),
		StartedAt: wire.TimeToProto(st.StartedAt),
		UpdatedAt: wire.TimeToProto(st.UpdatedAt),
	}
}

func statusFromProto(p *api.Status) content.Status {
	return content.Status{
		Ref:       p.GetRef(),
		Offset:    p.GetOffset(),
		Total:     p.GetTotal(),
		Expected:  digest.Digest(p.GetExpected()),
		StartedAt: wire.TimeFromProto(p.GetStartedAt()),
		UpdatedAt: wire.TimeFromProto(p.GetUpdatedAt()),
	}
}
