package eventttrpc

import (
	"context"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/engine/memory"
)

const strangerEnv = "GANTRY_STRANGER"

func TestMain(m *testing.M) {
	if sock := os.Getenv(strangerEnv); sock != "" {
		// Another user: connects, sends, and says what came of it.
		c, err := net.Dial("unix", sock)
		if err != nil {
			os.Stdout.WriteString("no connection: " + err.Error())
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err = eventsapi.NewTTRPCEventsClient(ttrpc.NewClient(c)).Forward(ctx, forward("/x", &events.TaskOOM{ContainerID: "c"}))
		if err != nil {
			os.Stdout.WriteString("refused: " + err.Error())
			return
		}
		os.Stdout.WriteString("taken")
		return
	}
	os.Exit(m.Run())
}

func serve(t *testing.T, out event.Publisher) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	srv, err := NewServer(out, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(context.Background(), l) // until Close
	}()
	t.Cleanup(func() { srv.Close(); <-done })
	return sock
}

func dial(t *testing.T, sock string) eventsapi.TTRPCEventsService {
	t.Helper()
	c, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	cl := ttrpc.NewClient(c)
	t.Cleanup(func() { cl.Close() })
	return eventsapi.NewTTRPCEventsClient(cl)
}

func forward(topic string, m proto.Message) *eventsapi.ForwardRequest {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	return &eventsapi.ForwardRequest{Envelope: &types.Envelope{Timestamp: timestamppb.New(time.Unix(5, 0)), Namespace: "ns", Topic: topic,
		Event: &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: b}}}
}

// contract: 1.1.2, 1.4.1, 13.45, 13.1
func TestForward(t *testing.T) {
	bus := memory.NewBus()
	sub, err := bus.Subscribe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, serve(t, bus))
	at := timestamppb.New(time.Unix(4, 0))
	strange := forward("/strange", &events.TaskOOM{})
	strange.Envelope.Event.TypeUrl = "com.example.Unheard"
	for _, r := range []*eventsapi.ForwardRequest{
		forward("/tasks/exit", &events.TaskExit{ContainerID: "c", ID: "x", Pid: 7, ExitStatus: 3, ExitedAt: at}),
		forward("/tasks/oom", &events.TaskOOM{ContainerID: "c"}),
		strange,
	} {
		if _, err := c.Forward(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []event.Envelope{
		{Topic: "/tasks/exit", Event: event.TaskExit{ContainerID: "c", ID: "x", Pid: 7, ExitStatus: 3, ExitedAt: time.Unix(4, 0).UTC()}},
		{Topic: "/tasks/oom", Event: event.TaskOOM{ContainerID: "c"}},
		{Topic: "/strange", Event: event.Raw{Any: typed.Any{URL: "com.example.Unheard"}}},
	} {
		want.Namespace, want.Timestamp = "ns", time.Unix(5, 0).UTC()
		got, err := sub.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if raw, ok := got.Event.(event.Raw); ok && len(raw.Any.Value) == 0 {
			raw.Any.Value = nil
			got.Event = raw
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
}

// Requests without what they must have are refused, and harm nobody.
//
// contract: 1.4.1
func TestAbsentFields(t *testing.T) {
	c := dial(t, serve(t, memory.NewBus()))
	for name, change := range map[string]func(*eventsapi.ForwardRequest){
		"envelope":  func(r *eventsapi.ForwardRequest) { r.Envelope = nil },
		"event":     func(r *eventsapi.ForwardRequest) { r.Envelope.Event = nil },
		"topic":     func(r *eventsapi.ForwardRequest) { r.Envelope.Topic = "" },
		"slash":     func(r *eventsapi.ForwardRequest) { r.Envelope.Topic = "x" },
		"namespace": func(r *eventsapi.ForwardRequest) { r.Envelope.Namespace = "" },
	} {
		r := forward("/x", &events.TaskOOM{ContainerID: "c"})
		change(r)
		if _, err := c.Forward(t.Context(), r); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			t.Errorf("without %s: %v", name, err)
		}
	}
	r := forward("/x", &events.TaskOOM{ContainerID: "c"})
	r.Envelope.Timestamp = nil
	if _, err := c.Forward(t.Context(), r); err != nil {
		t.Errorf("without a time: %v", err)
	}
}

// contract: 1.1.2
func TestOtherUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	bus := memory.NewBus()
	sub, err := bus.Subscribe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sock := serve(t, bus)
	if err := os.Chmod(sock, 0o777); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The test binary is in a directory that the other user cannot enter.
	raw, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(filepath.Dir(sock), "stranger")
	if err := os.WriteFile(bin, raw, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), strangerEnv+"="+sock)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !strings.HasPrefix(string(out), "refused: ") {
		t.Errorf("the other user's event was not refused: %s", out)
	}
	// One of the own user's is the first that arrives.
	if _, err := dial(t, sock).Forward(t.Context(), forward("/mine", &events.TaskOOM{ContainerID: "c"})); err != nil {
		t.Fatal(err)
	}
	if e, err := sub.Next(t.Context()); err != nil || e.Topic != "/mine" {
		t.Errorf("first event %+v %v", e, err)
	}
}
