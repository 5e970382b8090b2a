//go:build linux

// Package pod is the shim's Sandbox service, for pods that have no process of
// their own: a shim that has made one stays for it, with or without containers,
// until it is told to shut down (contract 1.4.4).
//
// The messages are read and written field by field: the generated ones would
// link gRPC into every shim.
package pod

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Message is any message: its fields are the unknown ones of an empty message.
type Message = emptypb.Empty

const (
	stateReady    = "SANDBOX_READY"
	stateNotReady = "SANDBOX_NOTREADY"
	// stopTimeout bounds the end of containers that are killed.
	stopTimeout = 20 * time.Second
	maxGrace    = 24 * time.Hour
)

// Config is what the service stands on.
type Config struct {
	// End ends all containers, by force after grace.
	End func(ctx context.Context, grace time.Duration) error
	// Shutdown ends the shim. It must not wait.
	Shutdown func()
}

// Service is the Sandbox service. Its methods are safe for concurrent use and
// are those of containerd.runtime.sandbox.v1.Sandbox.
type Service struct {
	Config

	mu       sync.Mutex // guards what follows
	id       string     // "" if there is none
	created  time.Time
	started  time.Time
	exited   time.Time
	status   uint32
	stopping bool
	done     chan struct{} // closed when it has ended
}

// New returns a service without a sandbox.
func New(c Config) *Service { return &Service{Config: c} }

// Exists says whether there is a sandbox for which the shim has to stay.
func (s *Service) Exists() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.id != ""
}

// read returns the id of the sandbox, which is the first field of every
// request, and its second one if that is a number.
func read(m *Message) (id string, second uint64, err error) {
	bad := func() error { return fmt.Errorf("message cannot be read: %w", errdefs.ErrInvalidArgument) }
	for b := []byte(m.ProtoReflect().GetUnknown()); len(b) > 0; {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return "", 0, bad()
		}
		b = b[n:]
		if num == 1 && typ == protowire.BytesType {
			v, vn := protowire.ConsumeString(b)
			if vn < 0 {
				return "", 0, bad()
			}
			id, n = v, vn
		} else if num == 2 && typ == protowire.VarintType {
			v, vn := protowire.ConsumeVarint(b)
			if vn < 0 {
				return "", 0, bad()
			}
			second, n = v, vn
		} else if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return "", 0, bad()
		}
		b = b[n:]
	}
	if id == "" || len(id) > 255 {
		return "", 0, fmt.Errorf("sandbox id %.80q: %w", id, errdefs.ErrInvalidArgument)
	}
	return id, second, nil
}

// answer is a message under construction.
type answer []byte

func (a answer) number(field protowire.Number, v uint64) answer {
	if v == 0 {
		return a
	}
	return protowire.AppendVarint(protowire.AppendTag(a, field, protowire.VarintType), v)
}

func (a answer) text(field protowire.Number, v string) answer {
	return protowire.AppendString(protowire.AppendTag(a, field, protowire.BytesType), v)
}

func (a answer) message(field protowire.Number, m proto.Message) answer {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err) // a message of our own making
	}
	return protowire.AppendBytes(protowire.AppendTag(a, field, protowire.BytesType), b)
}

func (a answer) time(field protowire.Number, t time.Time) answer {
	if t.IsZero() {
		return a
	}
	return a.message(field, timestamppb.New(t))
}

func (a answer) done() *Message {
	m := &Message{}
	m.ProtoReflect().SetUnknown([]byte(a))
	return m
}

// find checks that the request is about the sandbox that there is. The caller
// holds mu.
func (s *Service) find(m *Message) (second uint64, err error) {
	id, second, err := read(m)
	if err != nil {
		return 0, err
	}
	if s.id != id {
		return 0, fmt.Errorf("sandbox %q: %w", id, errdefs.ErrNotFound)
	}
	return second, nil
}

// CreateSandbox makes the sandbox. A shim has one at most.
func (s *Service) CreateSandbox(_ context.Context, m *Message) (*Message, error) {
	id, _, err := read(m)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id != "" {
		return nil, fmt.Errorf("create sandbox %s: the shim has sandbox %s: %w", id, s.id, errdefs.ErrAlreadyExists)
	}
	s.id, s.created, s.done = id, time.Now().UTC(), make(chan struct{})
	s.started, s.exited, s.status, s.stopping = time.Time{}, time.Time{}, 0, false
	return answer{}.done(), nil
}

// StartSandbox makes it ready.
func (s *Service) StartSandbox(_ context.Context, m *Message) (*Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.find(m); err != nil {
		return nil, err
	}
	if !s.started.IsZero() || s.stopping {
		return nil, fmt.Errorf("start sandbox %s: it was started or stopped before: %w", s.id, errdefs.ErrFailedPrecondition)
	}
	s.started = time.Now().UTC()
	return answer{}.time(2, s.created).done(), nil
}

// Platform is the host's: that is where the containers run.
func (s *Service) Platform(_ context.Context, m *Message) (*Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.find(m); err != nil {
		return nil, err
	}
	p := &types.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH}
	switch runtime.GOARCH {
	case "arm64":
		p.Variant = "v8"
	case "arm":
		p.Variant = "v7"
	}
	return answer{}.message(1, p).done(), nil
}

// StopSandbox ends the containers that are left, and with them the sandbox.
func (s *Service) StopSandbox(ctx context.Context, m *Message) (*Message, error) {
	s.mu.Lock()
	seconds, err := s.find(m)
	done := s.done
	s.stopping = s.stopping || err == nil
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	grace := min(time.Duration(min(seconds, uint64(maxGrace/time.Second)))*time.Second, maxGrace)
	ctx, cancel := context.WithTimeout(ctx, grace+stopTimeout)
	defer cancel()
	if err := s.End(ctx, grace); err != nil {
		return nil, fmt.Errorf("stop sandbox: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done == done && s.exited.IsZero() {
		s.exited = time.Now().UTC()
		close(s.done)
	}
	return answer{}.done(), nil
}

// WaitSandbox returns when it has ended.
func (s *Service) WaitSandbox(ctx context.Context, m *Message) (*Message, error) {
	s.mu.Lock()
	_, err := s.find(m)
	done := s.done
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case <-done:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for sandbox: %w", context.Cause(ctx))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return answer{}.number(1, uint64(s.status)).time(2, s.exited).done(), nil
}

// SandboxStatus tells whether it is ready.
func (s *Service) SandboxStatus(_ context.Context, m *Message) (*Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.find(m); err != nil {
		return nil, err
	}
	state := stateNotReady
	if !s.started.IsZero() && s.exited.IsZero() {
		state = stateReady
	}
	return answer{}.text(1, s.id).text(3, state).time(5, s.created).time(6, s.exited).done(), nil
}

// PingSandbox shows that the shim answers.
func (s *Service) PingSandbox(_ context.Context, m *Message) (*Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.find(m)
	return answer{}.done(), err
}

// ShutdownSandbox ends the sandbox, if it has not ended, and the shim.
func (s *Service) ShutdownSandbox(ctx context.Context, m *Message) (*Message, error) {
	if _, err := s.StopSandbox(ctx, m); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.id = ""
	s.mu.Unlock()
	s.Shutdown()
	return answer{}.done(), nil
}

// Unimplemented answers SandboxMetrics and UpdateSandbox: there is nothing
// that could be measured or changed besides the containers.
func (s *Service) Unimplemented(_ context.Context, m *Message) (*Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.find(m); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("sandbox %s has no process: %w", s.id, errdefs.ErrNotImplemented)
}
