package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	typesapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/registry"
	core "github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/typed"
	edge "github.com/gantryd/gantry/internal/edge/registry"
	"github.com/gantryd/gantry/internal/edge/registry/registrytest"
	"github.com/gantryd/gantry/internal/edge/wire/streamrpc"
	"github.com/gantryd/gantry/internal/edge/wire/transferrpc"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
)

func serveWire(t *testing.T, w *world) *grpc.ClientConn {
	return wiretest.Serve(t, func(s *grpc.Server) {
		streamingapi.RegisterStreamingServer(s, streamrpc.NewServer(w.streams))
		transferapi.RegisterTransferServer(s, transferrpc.NewServer(views{w}, w.streams))
	})
}

// within waits for something that takes a moment.
func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("not within 20 s: " + what)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestTransferOverGRPC does every pair through the wire, with all streams.
//
// contract: 1.3.32, 1.3.41, 6.3.1, 6.3.2, 6.3.4, 6.3.6, 6.3.7, 6.3.8, 6.3.11, 6.5.1, 6.5.2, 13.34
func TestTransferOverGRPC(t *testing.T) {
	host := registrytest.Debian(t, true)
	src := registrytest.New(t)
	img := registrytest.Build("amd64", 200_000, registrytest.Gzip, registrytest.Zstd)
	src.AddImage("app", "1", img)
	w := newWorld(t, edge.Config{})
	c := transferrpc.NewClient(serveWire(t, w), "test", "")

	var mu sync.Mutex
	var events []string
	opts := core.Options{Progress: func(p core.Progress) { mu.Lock(); events = append(events, p.Event); mu.Unlock() }}
	has := func(last string, all ...string) {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if len(events) == 0 || events[len(events)-1] != last {
			t.Errorf("the last event is not %q: %q", last, events)
		}
		for _, e := range all {
			found := false
			for _, got := range events {
				found = found || got == e
			}
			if !found {
				t.Errorf("no event %q in %q", e, events)
			}
		}
		events = nil
	}
	name := src.Host() + "/app:1"
	if err := c.Transfer(t.Context(), core.Registry{Reference: name}, core.ImageStore{Name: name, Labels: map[string]string{"a": "b"}, Unpacks: unpackMemory()}, opts); err != nil {
		t.Fatal(err)
	}
	has("Completed pull from OCI Registry ("+name+")", "Resolving from OCI Registry ("+name+")", "saved", "extracted", "complete")

	if err := c.Transfer(t.Context(), core.ImageStore{Name: name}, core.ImageStore{Name: "other:2", References: []core.Reference{{Name: "third", AddDigest: true}}}, core.Options{}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{name, "other:2", "third@" + img.Target.Digest.String()} {
		if got, err := w.space("test").images.Get(t.Context(), n); err != nil || got.Target.Digest != img.Target.Digest {
			t.Errorf("image %s: %v, %v", n, got.Target, err)
		}
	}

	asked := 0
	auth := registry.Options{Credentials: func(_ context.Context, q registry.AuthRequest) (registry.Credential, error) {
		asked++
		if q.Host != host || len(q.Authenticate) == 0 || !strings.HasPrefix(q.Authenticate[0], "Basic") || !strings.Contains(q.Reference, "copy/app") {
			t.Errorf("asked %+v", q)
		}
		return registry.Credential{Username: registrytest.User, Secret: registrytest.Password}, nil
	}}
	remote := host + "/copy/app:2"
	if err := c.Transfer(t.Context(), core.ImageStore{Name: "other:2"}, core.Registry{Reference: remote, Options: auth}, opts); err != nil {
		t.Fatal(err)
	}
	has("Completed push to OCI Registry ("+remote+")", "pushing content", "complete")
	if asked != 1 {
		t.Errorf("asked %d times for credentials", asked)
	}

	var out buffer
	if err := c.Transfer(t.Context(), core.ImageStore{Name: name}, core.Export{Writer: &out}, opts); err != nil {
		t.Fatal(err)
	}
	has("Completed export", "Exporting")
	if !out.closed {
		t.Error("the export's writer is not closed")
	}
	var again buffer
	if err := c.Transfer(t.Context(), core.ImageStore{Name: name}, core.Export{Writer: &again}, core.Options{}); err != nil || !bytes.Equal(out.Bytes(), again.Bytes()) {
		t.Errorf("a second export differs, %v", err)
	}

	w2 := newWorld(t, edge.Config{})
	c2 := transferrpc.NewClient(serveWire(t, w2), "test", "")
	store := core.ImageStore{References: []core.Reference{{Name: "new", IsPrefix: true, AllowOverwrite: true}}, Unpacks: unpackMemory()}
	if err := c2.Transfer(t.Context(), core.Import{Reader: bytes.NewReader(out.Bytes())}, store, opts); err != nil {
		t.Fatal(err)
	}
	has("Completed import", "Importing", "saved")
	if got, err := w2.space("test").images.Get(t.Context(), name); err != nil || got.Target.Digest != img.Target.Digest {
		t.Errorf("imported %v, %v", got.Target, err)
	}

	// Echo needs no namespace; 300 kB are several windows.
	data := bytes.Repeat([]byte("0123456789"), 30_000)
	var echo buffer
	conn := serveWire(t, w)
	if err := transferrpc.NewClient(conn, "", "").Transfer(t.Context(), core.Import{Reader: bytes.NewReader(data)}, core.Export{Writer: &echo}, core.Options{}); err != nil || !bytes.Equal(echo.Bytes(), data) {
		t.Errorf("echo of %d bytes gives %d, %v", len(data), echo.Len(), err)
	}
	err := transferrpc.NewClient(conn, "", "").Transfer(t.Context(), core.ImageStore{Name: "a"}, core.ImageStore{Name: "b"}, core.Options{})
	wantError(t, err, errdefs.IsFailedPrecondition, "namespace is required")

	within(t, "all streams are free", func() bool { return w.streams.Len() == 0 && w2.streams.Len() == 0 })
	w.clean(3)
	w2.clean(1)
}

// contract: 6.3.1, 1.3.41
func TestTransferRefusals(t *testing.T) {
	w := newWorld(t, edge.Config{})
	conn := serveWire(t, w)
	c := transferrpc.NewClient(conn, "test", "")
	err := c.Transfer(t.Context(), core.Registry{Reference: "a/b"}, core.Registry{Reference: "c/d"}, core.Options{})
	wantError(t, err, errdefs.IsNotImplemented, "containerd.types.transfer.OCIRegistry to containerd.types.transfer.OCIRegistry")
	api := transferapi.NewTransferClient(conn)
	ctx := wiretest.Context(t)
	_, err = api.Transfer(ctx, &transferapi.TransferRequest{})
	wantError(t, err, errdefs.IsInvalidArgument, "source")
	_, err = api.Transfer(ctx, &transferapi.TransferRequest{Source: &anypb.Any{}, Destination: &anypb.Any{TypeUrl: "x"}})
	wantError(t, err, errdefs.IsNotImplemented, `"x"`)
	a, _ := anypb.New(&typesapi.ImageImportStream{Stream: "nobody"})
	_, err = api.Transfer(ctx, &transferapi.TransferRequest{Source: a, Destination: a})
	wantError(t, err, errdefs.IsNotFound, `import: stream "nobody"`)
	bad := &anypb.Any{TypeUrl: a.TypeUrl, Value: []byte{0xff}}
	_, err = api.Transfer(ctx, &transferapi.TransferRequest{Source: bad, Destination: a})
	wantError(t, err, errdefs.IsInvalidArgument, "ImageImportStream")
	for _, url := range []string{"containerd.types.transfer.OCIRegistry", "containerd.types.transfer.ImageStore", "containerd.types.transfer.ImageImportStream", "containerd.types.transfer.ImageExportStream"} {
		if _, err := api.Transfer(ctx, &transferapi.TransferRequest{Source: &anypb.Any{TypeUrl: url}, Destination: &anypb.Any{TypeUrl: url}}); err == nil {
			t.Errorf("empty %s to itself: no error", url)
		}
	}
	w.clean(0)
}

// contract: 1.3.32
func TestStreams(t *testing.T) {
	w := newWorld(t, edge.Config{})
	conn := serveWire(t, w)
	c := streamrpc.NewClient(conn, "test", "")
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := c.Create(ctx, "one"); err != nil {
		t.Fatal(err)
	}
	_, err := c.Create(t.Context(), "one")
	wantError(t, err, errdefs.IsAlreadyExists, `"one"`)
	if _, err := streamrpc.NewClient(conn, "other", "").Create(ctx, "one"); err != nil {
		t.Errorf("the id is taken in another namespace: %v", err)
	}
	if _, err := streamrpc.NewClient(conn, "", "").Create(ctx, "one"); err != nil {
		t.Errorf("a stream without a namespace: %v", err)
	}
	_, err = c.Create(t.Context(), "")
	wantError(t, err, errdefs.IsInvalidArgument)
	cancel()
	within(t, "ids are free after cancel", func() bool { return w.streams.Len() == 0 })
	st, err := c.Create(t.Context(), "one")
	if err != nil {
		t.Fatalf("the id is not free: %v", err)
	}
	server, err := w.streams.In("test").Get(t.Context(), "one")
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after the server closed, Receive gives %v", err)
	}
	raw, err := streamingapi.NewStreamingClient(conn).Stream(wiretest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Send(&anypb.Any{TypeUrl: "google.protobuf.Empty"})
	_, err = raw.Recv()
	wantError(t, err, errdefs.IsInvalidArgument, "StreamInit")
	within(t, "nothing is left", func() bool { return w.streams.Len() == 0 })
}

// A client that goes away in the middle of an import leaves nothing.
//
// contract: 6.3.11
// promise: P7
func TestImportClientGone(t *testing.T) {
	w := newWorld(t, edge.Config{})
	c := transferrpc.NewClient(serveWire(t, w), "test", "")
	ctx, cancel := context.WithCancel(t.Context())
	pr, pw := io.Pipe()
	defer pw.Close()
	done := make(chan error, 1)
	go func() {
		done <- c.Transfer(ctx, core.Import{Reader: pr}, core.ImageStore{Name: "x", Platforms: []ocispec.Platform{}}, core.Options{})
	}()
	if _, err := pw.Write(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	within(t, "the import runs", func() bool { return w.streams.Len() == 1 })
	cancel()
	select {
	case err := <-done:
		wantError(t, err, errdefs.IsCanceled)
	case <-time.After(10 * time.Second):
		t.Fatal("cancel takes more than ten seconds")
	}
	within(t, "the stream is free and the lease gone", func() bool {
		l, _ := w.space("test").leases.List(t.Context())
		return w.streams.Len() == 0 && len(l) == 0
	})
}

// A reader that fails is not taken for the end of the archive.
func TestImportReaderFails(t *testing.T) {
	w := newWorld(t, edge.Config{})
	c := transferrpc.NewClient(serveWire(t, w), "test", "")
	err := c.Transfer(t.Context(), core.Import{Reader: io.MultiReader(bytes.NewReader(make([]byte, 10)), failing{})}, core.ImageStore{Name: "x"}, core.Options{})
	wantError(t, err, func(error) bool { return true }, "disk on fire")
	within(t, "nothing is left", func() bool { return w.streams.Len() == 0 })
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("disk on fire") }

// A stream that was opened at one daemon is offered at another.
//
// contract: 1.3.32
func TestStreamsTwice(t *testing.T) {
	far := newWorld(t, edge.Config{})
	c := streamrpc.NewClient(serveWire(t, far), "test", "")
	mine, offered := memory.StreamPair()
	free, err := c.Register(t.Context(), "x", offered)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Register(t.Context(), "x", offered)
	wantError(t, err, errdefs.IsAlreadyExists)
	st, err := far.streams.In("test").Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		v := typed.Any{URL: "a.B", Value: []byte{byte(i)}}
		if err := mine.Send(v); err != nil {
			t.Fatal(err)
		}
		if got, err := st.Receive(); err != nil || got.Value[0] != byte(i) {
			t.Fatal(got, err)
		}
		if err := st.Send(v); err != nil {
			t.Fatal(err)
		}
		if got, err := mine.Receive(); err != nil || got.Value[0] != byte(i) {
			t.Fatal(got, err)
		}
	}
	free()
	if _, err := mine.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after free: %v", err)
	}
	within(t, "the id is free", func() bool { return far.streams.Len() == 0 })
}

// A request's own directory of hosts.toml files, headers and scheme are used
// for it, and for it alone.
//
// contract: 6.2.4
func TestResolverOptions(t *testing.T) {
	reg := registrytest.New(t)
	reg.AddImage("app", "1", registrytest.Build("amd64", 10, registrytest.Gzip))
	w := newWorld(t, edge.Config{})
	c := transferrpc.NewClient(serveWire(t, w), "test", "")
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "example.invalid"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "example.invalid", "hosts.toml"), []byte("server = \"http://"+reg.Host()+"\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	err := c.Transfer(t.Context(), core.Registry{Reference: "example.invalid/app:1", Options: registry.Options{HostDir: root}}, core.ImageStore{Name: "a"}, core.Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = c.Transfer(t.Context(), core.Registry{Reference: reg.Host() + "/app:1", Options: registry.Options{DefaultScheme: "http", Headers: http.Header{"X-Mine": {"1"}}}}, core.ImageStore{Name: "b"}, core.Options{})
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, q := range reg.Requests() {
		if q.Header.Get("X-Mine") == "1" {
			seen++
		}
	}
	if seen == 0 || seen == len(reg.Requests()) {
		t.Errorf("%d of %d requests have the header", seen, len(reg.Requests()))
	}
	err = c.Transfer(t.Context(), core.Registry{Reference: reg.Host() + "/app:1", Options: registry.Options{DefaultScheme: "ftp"}}, core.ImageStore{Name: "c"}, core.Options{})
	wantError(t, err, errdefs.IsInvalidArgument, "ftp")
	w.clean(2)
}
