package cristate

import (
	"encoding/json"
	"fmt"
	"maps"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/typed"
)

// The extensions of records that hold metadata, and the type of their values
// (contract 1.5.21, 13.25). A sandbox record has it as ExtensionMetadata.
const (
	ExtensionMetadata  = "metadata"
	ExtensionPod       = "io.cri-containerd.sandbox.metadata"
	ExtensionContainer = "io.cri-containerd.container.metadata"
	urlPod             = "github.com/containerd/cri/pkg/store/sandbox/Metadata"
	urlContainer       = "github.com/containerd/cri/pkg/store/container/Metadata"
	metadataVersion    = "v1"
)

// PodMeta is what is stored of a pod; its JSON is containerd's.
type PodMeta struct {
	ID     string
	Name   string
	Config *runtime.PodSandboxConfig
	// NetNSPath is "" for a pod in the host's network.
	NetNSPath      string
	IP             string
	AdditionalIPs  []string
	RuntimeHandler string
	// CNIResult is the network's answer as it came.
	CNIResult    json.RawMessage `json:",omitempty"`
	ProcessLabel string
}

// PodState is what a pod is.
type PodState uint8

// The states. A pod that is being made is unknown to clients.
const (
	PodUnknown PodState = iota
	PodReady
	PodNotReady
	// PodRecovering is a pod that is being asked how it is, after a start of the
	// daemon. Clients see it as it was: the kubelet replaces one that is not ready.
	PodRecovering
)

// PodStatus is what changes of a pod and is found again at start.
type PodStatus struct {
	State     PodState
	Pid       uint32 // of the pause process, 0 if there is none
	CreatedAt time.Time
	ExitedAt  time.Time
	Exit      uint32
	// Overhead and Resources were last set by UpdatePodSandboxResources.
	Overhead, Resources *runtime.LinuxContainerResources
	// Sandboxer is the controller that runs it, Namespaces the paths of the
	// namespaces that its containers join: "network", "ipc", "uts", "pid", "user".
	Sandboxer  string
	Namespaces map[string]string
	// Disconnected says that its network namespace is gone, and its addresses
	// may be another pod's.
	Disconnected bool
}

// Pod is a sandbox. Its values may be read at any time; configurations in
// them are shared and must not be changed.
type Pod struct {
	mu     sync.Mutex
	meta   PodMeta
	status PodStatus
}

// NewPod makes a pod of its parts.
func NewPod(meta PodMeta, status PodStatus) *Pod { return &Pod{meta: meta, status: status} }

func (p *Pod) key() (string, string) {
	m := p.Meta()
	return m.ID, m.Name
}

// ID is the pod's id.
func (p *Pod) ID() string { return p.Meta().ID }

// Meta returns the metadata.
func (p *Pod) Meta() PodMeta {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.meta
}

// Status returns the status.
func (p *Pod) Status() PodStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.status
	s.Namespaces = maps.Clone(s.Namespaces)
	return s
}

// Change changes both under the pod's lock and returns the new values. fn does
// no I/O, and never changes the id or the name.
func (p *Pod) Change(fn func(*PodMeta, *PodStatus)) (PodMeta, PodStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fn(&p.meta, &p.status)
	return p.meta, p.status
}

// NewPods makes an empty index.
func NewPods() *Index[*Pod] { return newIndex[*Pod]("pod sandbox") }

// EncodePod returns the extension's value.
func EncodePod(m PodMeta) (typed.Any, error) { return encode(urlPod, "pod sandbox "+m.ID, m) }

// DecodePod reads it. ErrInvalidArgument.
func DecodePod(a typed.Any) (PodMeta, error) {
	var m PodMeta
	if err := decode(a, urlPod, &m); err != nil {
		return PodMeta{}, err
	}
	if m.ID == "" || m.Config.GetMetadata() == nil {
		return PodMeta{}, fmt.Errorf("metadata of a pod without id or configuration: %w", errdefs.ErrInvalidArgument)
	}
	return m, nil
}

type versioned struct {
	Version  string
	Metadata json.RawMessage
}

func encode(url, what string, v any) (typed.Any, error) {
	inner, err := json.Marshal(v)
	if err == nil {
		inner, err = json.Marshal(versioned{metadataVersion, inner})
	}
	if err != nil {
		return typed.Any{}, fmt.Errorf("encode metadata of %s: %v: %w", what, err, errdefs.ErrInvalidArgument)
	}
	return typed.Any{URL: url, Value: inner}, nil
}

func decode(a typed.Any, url string, into any) error {
	if a.URL != url {
		return fmt.Errorf("metadata of type %q, want %q: %w", a.URL, url, errdefs.ErrInvalidArgument)
	}
	v := struct {
		Version  string
		Metadata any
	}{Metadata: into}
	err := json.Unmarshal(a.Value, &v)
	switch {
	case err == nil && v.Version == metadataVersion:
		return nil
	case err != nil && (v.Version == "" || v.Version == metadataVersion):
		return fmt.Errorf("metadata %s: %v: %w", url, err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("metadata %s of version %q: %w", url, v.Version, errdefs.ErrInvalidArgument)
}
