package eventrpc

import (
	"fmt"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// EnvelopeToProto converts an event with all that is around it.
func EnvelopeToProto(e event.Envelope) (*types.Envelope, error) {
	payload, err := PayloadToProto(e.Event)
	if err != nil {
		return nil, err
	}
	return &types.Envelope{Timestamp: wire.TimeToProto(e.Timestamp), Namespace: string(e.Namespace), Topic: e.Topic, Event: payload}, nil
}

// EnvelopeFromProto converts an event with all that is around it. A missing
// envelope or event is ErrInvalidArgument.
func EnvelopeFromProto(e *types.Envelope) (event.Envelope, error) {
	if e == nil {
		return event.Envelope{}, wire.Missing("envelope")
	}
	payload, err := PayloadFromProto(e.Event)
	if err != nil {
		return event.Envelope{}, err
	}
	return event.Envelope{Timestamp: wire.TimeFromProto(e.Timestamp), Namespace: namespace.ID(e.Namespace), Topic: e.Topic, Event: payload}, nil
}

// PayloadToProto encodes a payload under its type URL.
func PayloadToProto(p event.Payload) (*anypb.Any, error) {
	if raw, ok := p.(event.Raw); ok {
		return &anypb.Any{TypeUrl: raw.Any.URL, Value: raw.Any.Value}, nil
	}
	m := message(p)
	if m == nil {
		return nil, fmt.Errorf("encode event: no wire form for %T", p)
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", p.TypeURL(), err)
	}
	return &anypb.Any{TypeUrl: p.TypeURL(), Value: b}, nil
}

// PayloadFromProto decodes a payload that Gantry knows, and keeps any other,
// or one that cannot be decoded, as event.Raw. nil is ErrInvalidArgument.
func PayloadFromProto(a *anypb.Any) (event.Payload, error) {
	if a == nil {
		return nil, wire.Missing("event")
	}
	raw := event.Raw{Any: wire.AnyFromProto(a)}
	m := blank(raw.Any.URL)
	if m == nil || proto.Unmarshal(a.Value, m) != nil || len(m.ProtoReflect().GetUnknown()) > 0 {
		return raw, nil
	}
	return payload(m), nil
}

func message(p event.Payload) proto.Message {
	switch p := p.(type) {
	case event.ContainerCreate:
		return &events.ContainerCreate{ID: p.ID, Image: p.Image, Runtime: &events.ContainerCreate_Runtime{Name: p.Runtime.Name, Options: wire.AnyToProto(p.Runtime.Options)}}
	case event.ContainerUpdate:
		return &events.ContainerUpdate{ID: p.ID, Image: p.Image, Labels: p.Labels, SnapshotKey: p.SnapshotKey}
	case event.ContainerDelete:
		return &events.ContainerDelete{ID: p.ID}
	case event.ContentCreate:
		return &events.ContentCreate{Digest: p.Digest, Size: p.Size, MediaType: p.MediaType}
	case event.ContentDelete:
		return &events.ContentDelete{Digest: p.Digest}
	case event.ImageCreate:
		return &events.ImageCreate{Name: p.Name, Labels: p.Labels}
	case event.ImageUpdate:
		return &events.ImageUpdate{Name: p.Name, Labels: p.Labels}
	case event.ImageDelete:
		return &events.ImageDelete{Name: p.Name}
	case event.NamespaceCreate:
		return &events.NamespaceCreate{Name: p.Name, Labels: p.Labels}
	case event.NamespaceUpdate:
		return &events.NamespaceUpdate{Name: p.Name, Labels: p.Labels}
	case event.NamespaceDelete:
		return &events.NamespaceDelete{Name: p.Name}
	case event.SandboxCreate:
		return &events.SandboxCreate{SandboxID: p.SandboxID}
	case event.SandboxStart:
		return &events.SandboxStart{SandboxID: p.SandboxID}
	case event.SandboxExit:
		return &events.SandboxExit{SandboxID: p.SandboxID, ExitStatus: p.ExitStatus, ExitedAt: wire.TimeToProto(p.ExitedAt)}
	case event.SnapshotPrepare:
		return &events.SnapshotPrepare{Key: p.Key, Parent: p.Parent, Snapshotter: p.Snapshotter}
	case event.SnapshotCommit:
		return &events.SnapshotCommit{Key: p.Key, Name: p.Name, Snapshotter: p.Snapshotter}
	case event.SnapshotRemove:
		return &events.SnapshotRemove{Key: p.Key, Snapshotter: p.Snapshotter}
	case event.TaskCreate:
		return &events.TaskCreate{ContainerID: p.ContainerID, Bundle: p.Bundle, Rootfs: wire.MountsToProto(p.Rootfs), Checkpoint: p.Checkpoint, Pid: p.Pid,
			IO: &events.TaskIO{Stdin: p.IO.Stdin, Stdout: p.IO.Stdout, Stderr: p.IO.Stderr, Terminal: p.IO.Terminal}}
	case event.TaskStart:
		return &events.TaskStart{ContainerID: p.ContainerID, Pid: p.Pid}
	case event.TaskDelete:
		return &events.TaskDelete{ContainerID: p.ContainerID, Pid: p.Pid, ExitStatus: p.ExitStatus, ExitedAt: wire.TimeToProto(p.ExitedAt), ID: p.ID}
	case event.TaskExit:
		return &events.TaskExit{ContainerID: p.ContainerID, ID: p.ID, Pid: p.Pid, ExitStatus: p.ExitStatus, ExitedAt: wire.TimeToProto(p.ExitedAt)}
	case event.TaskOOM:
		return &events.TaskOOM{ContainerID: p.ContainerID}
	case event.TaskExecAdded:
		return &events.TaskExecAdded{ContainerID: p.ContainerID, ExecID: p.ExecID}
	case event.TaskExecStarted:
		return &events.TaskExecStarted{ContainerID: p.ContainerID, ExecID: p.ExecID, Pid: p.Pid}
	case event.TaskPaused:
		return &events.TaskPaused{ContainerID: p.ContainerID}
	case event.TaskResumed:
		return &events.TaskResumed{ContainerID: p.ContainerID}
	case event.TaskCheckpointed:
		return &events.TaskCheckpointed{ContainerID: p.ContainerID, Checkpoint: p.Checkpoint}
	}
	return nil
}

// blank makes an empty message for a type URL, nil for one that is not known.
func blank(url string) proto.Message {
	for _, p := range known {
		if p.TypeURL() == url {
			return message(p).ProtoReflect().New().Interface()
		}
	}
	return nil
}

// known has one payload of each type.
var known = [...]event.Payload{
	event.ContainerCreate{}, event.ContainerUpdate{}, event.ContainerDelete{}, event.ContentCreate{}, event.ContentDelete{},
	event.ImageCreate{}, event.ImageUpdate{}, event.ImageDelete{}, event.NamespaceCreate{}, event.NamespaceUpdate{}, event.NamespaceDelete{},
	event.SandboxCreate{}, event.SandboxStart{}, event.SandboxExit{}, event.SnapshotPrepare{}, event.SnapshotCommit{}, event.SnapshotRemove{},
	event.TaskCreate{}, event.TaskStart{}, event.TaskDelete{}, event.TaskExit{}, event.TaskOOM{}, event.TaskExecAdded{}, event.TaskExecStarted{},
	event.TaskPaused{}, event.TaskResumed{}, event.TaskCheckpointed{},
}

func payload(m proto.Message) event.Payload {
	switch m := m.(type) {
	case *events.ContainerCreate:
		return event.ContainerCreate{ID: m.ID, Image: m.Image, Runtime: event.ContainerRuntime{Name: m.GetRuntime().GetName(), Options: wire.AnyFromProto(m.GetRuntime().GetOptions())}}
	case *events.ContainerUpdate:
		return event.ContainerUpdate{ID: m.ID, Image: m.Image, Labels: m.Labels, SnapshotKey: m.SnapshotKey}
	case *events.ContainerDelete:
		return event.ContainerDelete{ID: m.ID}
	case *events.ContentCreate:
		return event.ContentCreate{Digest: m.Digest, Size: m.Size, MediaType: m.MediaType}
	case *events.ContentDelete:
		return event.ContentDelete{Digest: m.Digest}
	case *events.ImageCreate:
		return event.ImageCreate{Name: m.Name, Labels: m.Labels}
	case *events.ImageUpdate:
		return event.ImageUpdate{Name: m.Name, Labels: m.Labels}
	case *events.ImageDelete:
		return event.ImageDelete{Name: m.Name}
	case *events.NamespaceCreate:
		return event.NamespaceCreate{Name: m.Name, Labels: m.Labels}
	case *events.NamespaceUpdate:
		return event.NamespaceUpdate{Name: m.Name, Labels: m.Labels}
	case *events.NamespaceDelete:
		return event.NamespaceDelete{Name: m.Name}
	case *events.SandboxCreate:
		return event.SandboxCreate{SandboxID: m.SandboxID}
	case *events.SandboxStart:
		return event.SandboxStart{SandboxID: m.SandboxID}
	case *events.SandboxExit:
		return event.SandboxExit{SandboxID: m.SandboxID, ExitStatus: m.ExitStatus, ExitedAt: wire.TimeFromProto(m.ExitedAt)}
	case *events.SnapshotPrepare:
		return event.SnapshotPrepare{Key: m.Key, Parent: m.Parent, Snapshotter: m.Snapshotter}
	case *events.SnapshotCommit:
		return event.SnapshotCommit{Key: m.Key, Name: m.Name, Snapshotter: m.Snapshotter}
	case *events.SnapshotRemove:
		return event.SnapshotRemove{Key: m.Key, Snapshotter: m.Snapshotter}
	case *events.TaskCreate:
		return event.TaskCreate{ContainerID: m.ContainerID, Bundle: m.Bundle, Rootfs: wire.MountsFromProto(m.Rootfs), Checkpoint: m.Checkpoint, Pid: m.Pid,
			IO: event.TaskIO{Stdin: m.GetIO().GetStdin(), Stdout: m.GetIO().GetStdout(), Stderr: m.GetIO().GetStderr(), Terminal: m.GetIO().GetTerminal()}}
	case *events.TaskStart:
		return event.TaskStart{ContainerID: m.ContainerID, Pid: m.Pid}
	case *events.TaskDelete:
		return event.TaskDelete{ContainerID: m.ContainerID, Pid: m.Pid, ExitStatus: m.ExitStatus, ExitedAt: wire.TimeFromProto(m.ExitedAt), ID: m.ID}
	case *events.TaskExit:
		return event.TaskExit{ContainerID: m.ContainerID, ID: m.ID, Pid: m.Pid, ExitStatus: m.ExitStatus, ExitedAt: wire.TimeFromProto(m.ExitedAt)}
	case *events.TaskOOM:
		return event.TaskOOM{ContainerID: m.ContainerID}
	case *events.TaskExecAdded:
		return event.TaskExecAdded{ContainerID: m.ContainerID, ExecID: m.ExecID}
	case *events.TaskExecStarted:
		return event.TaskExecStarted{ContainerID: m.ContainerID, ExecID: m.ExecID, Pid: m.Pid}
	case *events.TaskPaused:
		return event.TaskPaused{ContainerID: m.ContainerID}
	case *events.TaskResumed:
		return event.TaskResumed{ContainerID: m.ContainerID}
	case *events.TaskCheckpointed:
		return event.TaskCheckpointed{ContainerID: m.ContainerID, Checkpoint: m.Checkpoint}
	}
	return nil
}
