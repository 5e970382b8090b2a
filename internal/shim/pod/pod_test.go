//go:build linux

package pod

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

// call sends the generated messages through the service's own.
func call(t *testing.T, f func(context.Context, *Message) (*Message, error), req, res proto.Message) error {
	t.Helper()
	b, err := proto.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	var m Message
	if err := proto.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	out, err := f(t.Context(), &m)
	if err != nil {
		return err
	}
	if b, err = proto.Marshal(out); err != nil {
		t.Fatal(err)
	}
	if err := (proto.UnmarshalOptions{}).Unmarshal(b, res); err != nil {
		t.Fatal(err)
	}
	if u := res.ProtoReflect().GetUnknown(); len(u) > 0 {
		t.Errorf("fields that the message does not have: %x", u)
	}
	return nil
}

// contract: 1.4.4
func TestLifecycle(t *testing.T) {
	shut, grace, fail := false, time.Duration(-1), errors.New("it does not end")
	s := New(Config{Shutdown: func() { shut = true }, End: func(_ context.Context, g time.Duration) error { grace = g; return fail }})
	const id = "p"
	status := func(want string) *sandboxapi.SandboxStatusResponse {
		t.Helper()
		var r sandboxapi.SandboxStatusResponse
		if err := call(t, s.SandboxStatus, &sandboxapi.SandboxStatusRequest{SandboxID: id, Verbose: true}, &r); err != nil {
			t.Fatal(err)
		}
		if r.State != want || r.SandboxID != id || r.Pid != 0 || time.Since(r.CreatedAt.AsTime()).Abs() > time.Minute || (r.ExitedAt != nil) != (want == stateNotReady && grace >= 0) {
			t.Errorf("%v, want %s", &r, want)
		}
		return &r
	}
	var empty Message
	for name, f := range map[string]func(context.Context, *Message) (*Message, error){
		"start": s.StartSandbox, "platform": s.Platform, "stop": s.StopSandbox, "wait": s.WaitSandbox, "status": s.SandboxStatus,
		"ping": s.PingSandbox, "shutdown": s.ShutdownSandbox, "update": s.Unimplemented,
	} {
		if err := call(t, f, &sandboxapi.PingRequest{SandboxID: id}, &empty); !errdefs.IsNotFound(err) {
			t.Errorf("%s without a sandbox: %v", name, err)
		}
		if err := call(t, f, &sandboxapi.PingRequest{}, &empty); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s without an id: %v", name, err)
		}
	}
	if s.Exists() {
		t.Error("it exists")
	}
	create := &sandboxapi.CreateSandboxRequest{SandboxID: id, BundlePath: "/b", NetnsPath: "/n", Annotations: map[string]string{"a": "b"}}
	if err := call(t, s.CreateSandbox, create, &sandboxapi.CreateSandboxResponse{}); err != nil || !s.Exists() {
		t.Fatal(err)
	}
	if err := call(t, s.CreateSandbox, create, &sandboxapi.CreateSandboxResponse{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create again: %v", err)
	}
	status(stateNotReady)
	var started sandboxapi.StartSandboxResponse
	if err := call(t, s.StartSandbox, &sandboxapi.StartSandboxRequest{SandboxID: id}, &started); err != nil || started.CreatedAt == nil || started.Pid != 0 {
		t.Errorf("%v %v", &started, err)
	}
	if err := call(t, s.StartSandbox, &sandboxapi.StartSandboxRequest{SandboxID: id}, &started); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start again: %v", err)
	}
	status(stateReady)
	var p sandboxapi.PlatformResponse
	if err := call(t, s.Platform, &sandboxapi.PlatformRequest{SandboxID: id}, &p); err != nil || p.Platform.GetOS() != "linux" || p.Platform.GetArchitecture() != runtime.GOARCH {
		t.Errorf("%v %v", &p, err)
	}
	if err := call(t, s.PingSandbox, &sandboxapi.PingRequest{SandboxID: id}, &empty); err != nil {
		t.Error(err)
	}
	if err := call(t, s.Unimplemented, &sandboxapi.SandboxMetricsRequest{SandboxID: id}, &empty); !errdefs.IsNotImplemented(err) {
		t.Error(err)
	}
	if err := call(t, s.StopSandbox, &sandboxapi.StopSandboxRequest{SandboxID: id, TimeoutSecs: 7}, &empty); !errors.Is(err, fail) || grace != 7*time.Second {
		t.Errorf("%v, grace %v", err, grace)
	}
	fail = nil
	waited := make(chan error, 1)
	var w sandboxapi.WaitSandboxResponse
	go func() { waited <- call(t, s.WaitSandbox, &sandboxapi.WaitSandboxRequest{SandboxID: id}, &w) }()
	select {
	case err := <-waited:
		t.Fatal("it did not wait: ", err)
	case <-time.After(50 * time.Millisecond):
	}
	for range 2 {
		if err := call(t, s.StopSandbox, &sandboxapi.StopSandboxRequest{SandboxID: id, TimeoutSecs: 1<<32 - 1}, &empty); err != nil || grace != maxGrace {
			t.Errorf("%v %v", err, grace)
		}
	}
	if err := <-waited; err != nil || w.ExitStatus != 0 || w.ExitedAt == nil {
		t.Errorf("%v %v", &w, err)
	}
	if r := status(stateNotReady); !r.ExitedAt.AsTime().Equal(w.ExitedAt.AsTime()) {
		t.Errorf("%v and %v", r, &w)
	}
	if shut {
		t.Error("stopping shut it down")
	}
	if err := call(t, s.ShutdownSandbox, &sandboxapi.ShutdownSandboxRequest{SandboxID: id}, &empty); err != nil || !shut || s.Exists() {
		t.Errorf("%v", err)
	}
}

func TestMessagesAreHostile(t *testing.T) {
	s := New(Config{})
	for _, b := range []string{"\x0a\xff", "\x0a\x05a", "\x08\x01", "\x0a\x01a\x13", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"} {
		var m Message
		m.ProtoReflect().SetUnknown([]byte(b))
		if _, err := s.CreateSandbox(t.Context(), &m); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", b, err)
		}
	}
}
