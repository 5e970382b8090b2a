//go:build linux

package publish

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

type sink struct {
	mu     sync.Mutex
	got    []string
	refuse map[string]int
}

func (s *sink) Forward(_ context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	var e events.TaskOOM
	if err := proto.Unmarshal(r.Envelope.Event.Value, &e); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refuse[e.ContainerID] > 0 {
		s.refuse[e.ContainerID]--
		return nil, errgrpc.ToGRPC(errdefs.ErrInvalidArgument)
	}
	s.got = append(s.got, e.ContainerID)
	return &emptypb.Empty{}, nil
}

// life is the sink behind one server. ttrpc's Close returns while a connection
// may still take a call whose answer is lost: a life that is over takes none.
type life struct {
	*sink
	over bool // guarded by sink.mu
}

func (l *life) Forward(ctx context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	l.mu.Lock()
	over := l.over
	l.mu.Unlock()
	if over {
		return nil, errgrpc.ToGRPC(errdefs.ErrUnavailable)
	}
	return l.sink.Forward(ctx, r)
}

// serve lets the sink take events at path until stop. An event that was taken
// and not answered before stop comes again in the next life.
func (s *sink) serve(t *testing.T, path string) (stop func()) {
	t.Helper()
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	this := &life{sink: s}
	eventsapi.RegisterTTRPCEventsService(server, this)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(context.Background(), l)
	t.Cleanup(func() { server.Close() })
	return func() {
		s.mu.Lock()
		this.over = true
		s.mu.Unlock()
		server.Close()
		os.Remove(path)
	}
}

func (s *sink) await(t *testing.T, n int) []string {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		s.mu.Lock()
		got := append([]string(nil), s.got...)
		s.mu.Unlock()
		if len(got) >= n {
			return got
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d events", len(got), n)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func socket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "ttrpc")
}

// The daemon goes and comes; events arrive once each and in order, and Close
// lets the rest out.
// contract: 1.4.1, 1.6.8
func TestOrderAcrossRestarts(t *testing.T) {
	path := socket(t)
	p := New("unix://"+path, "ns", slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- p.Run(t.Context()) }()
	publish := func(from, to int) {
		for i := from; i < to; i++ {
			p.Publish("/tasks/oom", &events.TaskOOM{ContainerID: fmt.Sprint(i)})
		}
	}
	publish(0, 10) // nobody is there yet
	s := &sink{refuse: map[string]int{"3": 2, "5": 1000}}
	stop := s.serve(t, path)
	s.await(t, 9)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if e, _ := p.head(); e == nil {
			break // the last answer is here too
		}
		if time.Now().After(deadline) {
			t.Fatal("the answers do not come")
		}
	}
	stop()
	publish(10, 20)
	s.serve(t, path)
	publish(20, 30)
	p.Close()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Run does not end")
	}
	got := s.await(t, 29)
	want := 0
	for _, id := range got {
		if want == 5 {
			want++ // the one that is never accepted
		}
		if id != fmt.Sprint(want) {
			t.Fatalf("%q at the place of %d", id, want)
		}
		want++
	}
}

// attempts is a log with a line for each that failed.
type attempts chan struct{}

func (a attempts) Write(line []byte) (int, error) {
	if strings.Contains(string(line), "event not delivered") {
		a <- struct{}{}
	}
	return len(line), nil
}

// An event waits as long as the daemon is away: that its socket is not there is
// no answer. Retry does not wait for the pause, which has grown to seconds.
//
// contract: 1.4.1
// promise: P19
func TestRetry(t *testing.T) {
	path := socket(t)
	failed := make(attempts, 100)
	p := New(path, "ns", slog.New(slog.NewTextHandler(failed, &slog.HandlerOptions{Level: slog.LevelDebug})))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	p.Publish("/tasks/oom", &events.TaskOOM{ContainerID: "a"})
	for range 7 { // and then there is a pause of 3.2 s
		<-failed
	}
	s := &sink{}
	s.serve(t, path)
	began := time.Now()
	p.Retry()
	s.await(t, 1)
	if took := time.Since(began); took > 2500*time.Millisecond {
		t.Errorf("the event came after %v", took)
	}
}

// contract: 1.4.1
func TestQueueIsBounded(t *testing.T) {
	p := New("/no/such/socket", "ns", slog.New(slog.DiscardHandler))
	for i := range queueSize + 10 {
		p.Publish("/tasks/oom", &events.TaskOOM{ContainerID: fmt.Sprint(i)})
	}
	if len(p.queue) != queueSize {
		t.Errorf("%d are queued", len(p.queue))
	}
	var e events.TaskOOM
	if err := proto.Unmarshal(p.queue[0].Event.Value, &e); err != nil || e.ContainerID != "10" {
		t.Errorf("the first is %v", &e)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := p.Run(ctx); err == nil {
		t.Error("Run ended without error")
	}
}
