package contentrpc

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/content/contenttest"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/memory"
)

func dial(t *testing.T, st content.Store) *grpc.ClientConn {
	return wiretest.Serve(t, func(s *grpc.Server) {
		api.RegisterContentServer(s, NewServer(wiretest.Source{ContentStore: st}))
	})
}

func over(t *testing.T, st content.Store) content.Store {
	return NewClient(dial(t, st), "test", "")
}

func openDir(t *testing.T) content.Store {
	s, err := blobdir.Open(t.TempDir(), blobdir.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		problems, err := s.Check(context.WithoutCancel(t.Context()))
		if err != nil || len(problems) > 0 {
			t.Errorf("check: %v, %v", problems, err)
		}
	})
	return s
}

// contract: 1.3.6, 1.3.8, 1.3.10, 4.1.4, 4.1.11, 4.1.12, 1.2.6, 1.2.8
func TestConformance(t *testing.T) {
	for name, c := range map[string]struct {
		open func(t *testing.T) content.Store
		o    contenttest.Options
	}{
		"memory":  {func(*testing.T) content.Store { return memory.NewContent() }, contenttest.Options{Remote: true}},
		"blobdir": {openDir, contenttest.Options{Remote: true, NoLabels: true}},
	} {
		t.Run(name, func(t *testing.T) {
			contenttest.Run(t, func(t *testing.T) content.Store { return over(t, c.open(t)) }, c.o)
		})
		t.Run(name+" twice", func(t *testing.T) {
			contenttest.Run(t, func(t *testing.T) content.Store { return over(t, over(t, c.open(t))) }, c.o)
		})
	}
}

func put(t *testing.T, st content.Store, data []byte, labels map[string]string) digest.Digest {
	t.Helper()
	w, err := st.Writer(t.Context(), "put", content.WriterOptions{})
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Commit(t.Context(), 0, "", labels)
	}
	if err != nil {
		t.Fatal(err)
	}
	return digest.FromBytes(data)
}

const (
	stat   = api.WriteAction_STAT
	write  = api.WriteAction_WRITE
	commit = api.WriteAction_COMMIT
)

// The state machine of Write, message by message: what is sent, and the
// answer's offset and total, or the class of the error.
//
// contract: 1.3.9, 13.6
func TestWrite(t *testing.T) {
	abc, there := digest.FromString("abc").String(), digest.FromString("there already").String()
	type msg = api.WriteContentRequest
	type step struct {
		send   *msg
		offset int64
		total  int64
		fails  func(error) bool
	}
	for _, c := range []struct {
		name   string
		steps  []step
		ingest int64 // what is left of the ingest, -1 if nothing
		blob   string
	}{
		{"no ref", []step{{send: &msg{Action: stat}, fails: errdefs.IsInvalidArgument}}, -1, ""},
		{"no ref but data", []step{{send: &msg{Action: write, Data: []byte("abc")}, fails: errdefs.IsInvalidArgument}}, -1, ""},
		{"stat keeps an empty ingest", []step{{send: &msg{Ref: "r"}}}, 0, ""},
		{"all in one message", []step{{send: &msg{Ref: "r", Action: commit, Data: []byte("abc"), Total: 3, Expected: abc}, offset: 3, total: 3}}, -1, abc},
		{"piece by piece", []step{
			{send: &msg{Ref: "r", Total: 3}, total: 3},
			{send: &msg{Action: write, Data: []byte("ab")}, offset: 2, total: 3},
			{send: &msg{Action: stat}, offset: 2, total: 3},
			{send: &msg{Action: write, Ref: "r", Offset: 2, Data: []byte("c")}, offset: 3, total: 3},
			{send: &msg{Action: commit, Offset: 3}, offset: 3, total: 3},
		}, -1, abc},
		{"closed without a commit", []step{{send: &msg{Ref: "r", Action: write, Data: []byte("ab")}, offset: 2}}, 2, ""},
		{"stat ignores the offset", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("ab")}, offset: 2},
			{send: &msg{Action: stat, Offset: 7}, offset: 2},
		}, 2, ""},
		{"write without data tells the state", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("ab")}, offset: 2},
			{send: &msg{Action: write, Offset: 2}, offset: 2},
		}, 2, ""},
		{"offset 0 truncates", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("wrong")}, offset: 5},
			{send: &msg{Action: write, Data: []byte("abc")}, offset: 3},
			{send: &msg{Action: commit, Offset: 3, Expected: abc, Total: 3}, offset: 3, total: 3},
		}, -1, abc},
		{"offset 0 without data truncates", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("wrong")}, offset: 5},
			{send: &msg{Action: write}, offset: 0},
		}, 0, ""},
		{"offset too small", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("abc")}, offset: 3},
			{send: &msg{Action: write, Offset: 2, Data: []byte("d")}, fails: errdefs.IsOutOfRange},
		}, 3, ""},
		{"offset too large", []step{{send: &msg{Ref: "r", Action: write, Offset: 4, Data: []byte("d")}, fails: errdefs.IsOutOfRange}}, 0, ""},
		{"offset too large at commit", []step{{send: &msg{Ref: "r", Action: commit, Offset: 4}, fails: errdefs.IsOutOfRange}}, 0, ""},
		{"negative offset", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("abc")}, offset: 3},
			{send: &msg{Action: write, Offset: -1, Data: []byte("d")}, fails: errdefs.IsOutOfRange},
		}, 3, ""},
		{"negative offset at first", []step{{send: &msg{Ref: "r", Offset: -1}, fails: errdefs.IsOutOfRange}}, -1, ""},
		{"total said late", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("abc")}, offset: 3},
			{send: &msg{Action: stat, Total: 3}, offset: 3, total: 3},
			{send: &msg{Action: commit, Offset: 3, Total: 3, Expected: abc}, offset: 3, total: 3},
		}, -1, abc},
		{"total changed", []step{
			{send: &msg{Ref: "r", Action: write, Total: 3, Data: []byte("abc")}, offset: 3, total: 3},
			{send: &msg{Action: stat, Total: 4}, fails: errdefs.IsFailedPrecondition},
		}, 3, ""},
		{"total changed at commit", []step{
			{send: &msg{Ref: "r", Action: write, Total: 5, Data: []byte("abc")}, offset: 3, total: 5},
			{send: &msg{Action: commit, Offset: 3, Total: 3}, fails: errdefs.IsFailedPrecondition},
		}, 3, ""},
		{"expected changed", []step{
			{send: &msg{Ref: "r", Expected: abc}},
			{send: &msg{Action: write, Expected: digest.FromString("x").String()}, fails: errdefs.IsFailedPrecondition},
		}, 0, ""},
		{"expected malformed", []step{{send: &msg{Ref: "r", Expected: "sha256:abc"}, fails: errdefs.IsInvalidArgument}}, -1, ""},
		{"expected malformed late", []step{
			{send: &msg{Ref: "r"}},
			{send: &msg{Expected: "../x"}, fails: errdefs.IsInvalidArgument},
		}, 0, ""},
		{"expected is there", []step{{send: &msg{Ref: "r", Expected: there}, fails: errdefs.IsAlreadyExists}}, -1, there},
		{"expected is there, said late", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("th")}, offset: 2},
			{send: &msg{Action: write, Offset: 2, Data: []byte("ere"), Expected: there}, fails: errdefs.IsAlreadyExists},
		}, -1, there},
		{"expected is there, said at commit", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("there already")}, offset: 13},
			{send: &msg{Action: commit, Offset: 13, Expected: there}, fails: errdefs.IsAlreadyExists},
		}, -1, there},
		{"blob is there", []step{
			{send: &msg{Ref: "r", Action: commit, Data: []byte("there already")}, fails: errdefs.IsAlreadyExists},
		}, -1, there},
		{"wrong size", []step{{send: &msg{Ref: "r", Action: commit, Data: []byte("abc"), Total: 4}, fails: errdefs.IsFailedPrecondition}}, 3, ""},
		{"wrong digest", []step{{send: &msg{Ref: "r", Action: commit, Data: []byte("abd"), Expected: abc}, fails: errdefs.IsFailedPrecondition}}, 3, ""},
		{"another ref", []step{
			{send: &msg{Ref: "r"}},
			{send: &msg{Ref: "q"}, fails: errdefs.IsInvalidArgument},
		}, 0, ""},
		{"unknown action", []step{{send: &msg{Ref: "r", Action: 7}, fails: errdefs.IsInvalidArgument}}, 0, ""},
		{"ref held by another", []step{{send: &msg{Ref: "held"}, fails: errdefs.IsUnavailable}}, -1, ""},
	} {
		for name, st := range map[string]content.Store{"memory": memory.NewContent(), "blobdir": openDir(t)} {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				put(t, st, []byte("there already"), nil)
				held, err := st.Writer(t.Context(), "held", content.WriterOptions{})
				if err != nil {
					t.Fatal(err)
				}
				defer held.Close()
				ctx := wiretest.Context(t)
				stream, err := api.NewContentClient(dial(t, st)).Write(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for i, s := range c.steps {
					if err := stream.Send(s.send); err != nil {
						t.Fatalf("message %d: %v", i, err)
					}
					resp, err := stream.Recv()
					if s.fails != nil {
						if !s.fails(err) {
							t.Fatalf("message %d is answered by %v, %v", i, resp, err)
						}
						continue
					}
					if err != nil {
						t.Fatalf("message %d: %v", i, err)
					}
					if resp.Action != s.send.Action || resp.Offset != s.offset || resp.Total != s.total || resp.StartedAt == nil || resp.UpdatedAt == nil {
						t.Fatalf("message %d is answered by %v, want offset %d, total %d", i, resp, s.offset, s.total)
					}
					if s.send.Action == commit && resp.Digest != c.blob {
						t.Fatalf("committed digest is %s", resp.Digest)
					}
				}
				if err := stream.CloseSend(); err != nil {
					t.Fatal(err)
				}
				if last := c.steps[len(c.steps)-1]; last.fails == nil {
					if _, err := stream.Recv(); err != io.EOF {
						t.Fatalf("the stream ends with %v", err)
					}
				}
				left, err := st.Status(ctx, "r")
				if c.ingest < 0 && !errdefs.IsNotFound(err) || c.ingest >= 0 && (err != nil || left.Offset != c.ingest) {
					t.Fatalf("the ingest is %+v, %v, want offset %d", left, err, c.ingest)
				}
				if c.ingest >= 0 { // and nobody holds it
					if err := st.Abort(ctx, "r"); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := st.Info(ctx, digest.FromString("abc")); (err == nil) != (c.blob == abc) {
					t.Fatalf("the blob: %v", err)
				}
			})
		}
	}
}

// contract: 1.3.9
func TestWriteLabels(t *testing.T) {
	st := memory.NewContent()
	stream, err := api.NewContentClient(dial(t, st)).Write(wiretest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&api.WriteContentRequest{Ref: "r", Action: commit, Data: []byte("x"), Labels: map[string]string{"a": "b"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if i, err := st.Info(t.Context(), digest.FromString("x")); err != nil || i.Labels["a"] != "b" {
		t.Fatalf("%+v, %v", i, err)
	}
}

// A client that goes away lets go of the ref and loses nothing.
//
// contract: 1.3.9
func TestWriteCancelled(t *testing.T) {
	st := openDir(t)
	conn := dial(t, st)
	ctx, cancel := context.WithCancel(t.Context())
	w, err := NewClient(conn, "test", "").Writer(ctx, "r", content.WriterOptions{Total: 10})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("12345")); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w, err = st.Writer(t.Context(), "r", content.WriterOptions{})
	for errdefs.IsUnavailable(err) && t.Context().Err() == nil { // until the server has noticed
		w, err = st.Writer(t.Context(), "r", content.WriterOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if s, err := w.Status(); err != nil || s.Offset != 5 || s.Total != 10 {
		t.Fatalf("resumed at %+v, %v", s, err)
	}
}

// contract: 1.3.7
func TestRead(t *testing.T) {
	st := memory.NewContent()
	data := bytes.Repeat([]byte("0123456789"), 300_000)
	size := int64(len(data))
	dgst := put(t, st, data, nil)
	c := api.NewContentClient(dial(t, st))
	for _, r := range []struct {
		offset, size int64
		want         []byte
		fails        func(error) bool
	}{
		{0, 0, data, nil},
		{0, size, data, nil},
		{0, size + 100, data, nil},
		{7, 0, data[7:], nil},
		{7, 5, data[7:12], nil},
		{size - 1, 100, data[size-1:], nil},
		{1 << 20, 1<<20 + 1, data[1<<20 : 2<<20+1], nil},
		{1, 1<<63 - 1, data[1:], nil},
		{size, 0, nil, nil},
		{size, 10, nil, nil},
		{size + 1, 0, nil, errdefs.IsOutOfRange},
		{-1, 0, nil, errdefs.IsOutOfRange},
		{0, -1, nil, errdefs.IsOutOfRange},
	} {
		stream, err := c.Read(wiretest.Context(t), &api.ReadContentRequest{Digest: dgst.String(), Offset: r.offset, Size: r.size})
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		for {
			var resp *api.ReadContentResponse
			if resp, err = stream.Recv(); err != nil {
				break
			}
			if resp.Offset != int64(len(got)) {
				t.Fatalf("read at %d: message has offset %d after %d bytes", r.offset, resp.Offset, len(got))
			}
			if len(resp.Data) > 1<<20 || len(resp.Data) == 0 {
				t.Fatalf("a message has %d bytes", len(resp.Data))
			}
			got = append(got, resp.Data...)
		}
		if r.fails != nil {
			if !r.fails(err) {
				t.Fatalf("read %d at %d: %v", r.size, r.offset, err)
			}
			continue
		}
		if err != io.EOF || !bytes.Equal(got, r.want) {
			t.Fatalf("read %d at %d: %d bytes of %d, %v", r.size, r.offset, len(got), len(r.want), err)
		}
	}
}

// counted counts the Read calls on their way to the server.
type counted struct {
	grpc.ClientConnInterface
	reads atomic.Int32
}

func (c *counted) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	if method == "/containerd.services.content.v1.Content/Read" {
		c.reads.Add(1)
	}
	return c.ClientConnInterface.NewStream(ctx, desc, method, opts...)
}

// Copying in small steps does not cost a call a step; reading here and there
// costs one each, for no more than is asked.
func TestReadAhead(t *testing.T) {
	st := memory.NewContent()
	data := bytes.Repeat([]byte("0123456789abc"), 250_000)
	dgst := put(t, st, data, nil)
	conn := &counted{ClientConnInterface: dial(t, st)}
	r, err := NewClient(conn, "test", "").Open(t.Context(), dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	section := io.NewSectionReader(r, 0, r.Size())
	var got []byte
	p := make([]byte, 10_007)
	for err == nil {
		var n int
		n, err = section.Read(p)
		got = append(got, p[:n]...)
	}
	if err != io.EOF || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes of %d, %v", len(got), len(data), err)
	}
	if n := conn.reads.Load(); n > 5 {
		t.Errorf("%d calls for %d bytes in sequence", n, len(data))
	}
	conn.reads.Store(0)
	for _, off := range []int64{2_000_000, 5, 1_000_000} {
		if _, err := r.ReadAt(p[:100], off); err != nil || !bytes.Equal(p[:100], data[off:off+100]) {
			t.Fatalf("ReadAt(%d): %v", off, err)
		}
	}
	if n := conn.reads.Load(); n != 3 {
		t.Errorf("%d calls for three places", n)
	}
}

// Lists come in messages that nobody finds too large.
//
// contract: 1.3.6, 13.42
func TestListBatches(t *testing.T) {
	st := memory.NewContent()
	labels := map[string]string{}
	for i := range 64 {
		labels[fmt.Sprint("label ", i)] = strings.Repeat("x", 4000)
	}
	for i := range 230 {
		l := map[string]string(nil)
		if i >= 150 {
			l = labels // 80 of 256 KB: more than a message may have
		}
		put(t, st, fmt.Append(nil, i), l)
	}
	stream, err := api.NewContentClient(dial(t, st)).List(wiretest.Context(t), &api.ListContentRequest{})
	if err != nil {
		t.Fatal(err)
	}
	messages, items := 0, 0
	for {
		resp, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Info) == 0 || len(resp.Info) > 100 || proto.Size(resp) > 4<<20 {
			t.Fatalf("a message has %d items in %d bytes", len(resp.Info), proto.Size(resp))
		}
		messages, items = messages+1, items+len(resp.Info)
	}
	if items != 230 || messages < 3 {
		t.Fatalf("%d items in %d messages", items, messages)
	}
}

// No call panics or succeeds when what it needs is missing, nor without a namespace.
//
// contract: 1.2.1
func TestEmptyRequests(t *testing.T) {
	st := memory.NewContent()
	c := api.NewContentClient(dial(t, st))
	first := func(err error, recv func() error) error {
		if err != nil {
			return err
		}
		return recv()
	}
	calls := map[string]func(ctx context.Context) error{
		"Info": func(ctx context.Context) error { _, err := c.Info(ctx, &api.InfoRequest{}); return err },
		"Update": func(ctx context.Context) error {
			_, err := c.Update(ctx, &api.UpdateRequest{})
			return err
		},
		"Update of nothing": func(ctx context.Context) error {
			_, err := c.Update(ctx, &api.UpdateRequest{Info: &api.Info{}})
			return err
		},
		"Delete": func(ctx context.Context) error { _, err := c.Delete(ctx, &api.DeleteContentRequest{}); return err },
		"Read": func(ctx context.Context) error {
			s, err := c.Read(ctx, &api.ReadContentRequest{})
			return first(err, func() error { _, err := s.Recv(); return err })
		},
		"Status": func(ctx context.Context) error { _, err := c.Status(ctx, &api.StatusRequest{}); return err },
		"Abort":  func(ctx context.Context) error { _, err := c.Abort(ctx, &api.AbortRequest{}); return err },
		"Write": func(ctx context.Context) error {
			s, err := c.Write(ctx)
			return first(err, func() error {
				// EOF says that the server has ended the call: Recv tells why.
				if err := s.Send(&api.WriteContentRequest{}); err != nil && err != io.EOF {
					return err
				}
				_, err := s.Recv()
				return err
			})
		},
		"Write without a message": func(ctx context.Context) error {
			s, err := c.Write(ctx)
			return first(err, func() error {
				if err := s.CloseSend(); err != nil {
					return err
				}
				_, err := s.Recv()
				return err
			})
		},
	}
	for name, call := range calls {
		if err := call(wiretest.Context(t)); !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// These have nothing that could be missing.
	calls["List"] = func(ctx context.Context) error {
		s, err := c.List(ctx, &api.ListContentRequest{})
		return first(err, func() error { _, err := s.Recv(); return err })
	}
	calls["ListStatuses"] = func(ctx context.Context) error {
		_, err := c.ListStatuses(ctx, &api.ListStatusesRequest{})
		return err
	}
	if err := calls["List"](wiretest.Context(t)); err != io.EOF {
		t.Errorf("List: %v", err)
	}
	if err := calls["ListStatuses"](wiretest.Context(t)); err != nil {
		t.Errorf("ListStatuses: %v", err)
	}
	for name, call := range calls {
		if err := call(t.Context()); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s without a namespace: %v", name, err)
		}
		if err := call(wire.Outgoing(t.Context(), "no/such", "")); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s with a bad namespace: %v", name, err)
		}
	}
}
