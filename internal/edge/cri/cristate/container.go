package cristate

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/typed"
)

// ContainerMeta is what is stored of a container; its JSON is containerd's.
type ContainerMeta struct {
	ID        string
	Name      string
	SandboxID string
	// Config is the request; of a container that has ended, what clients are
	// still told of it.
	Config *runtime.ContainerConfig
	// ImageRef is the id of the image: the digest of its configuration.
	ImageRef string
	// LogPath is absolute, "" if the output is not kept.
	LogPath      string
	StopSignal   string
	ProcessLabel string
}

// Reasons of a container's end (contract 7.1.15).
const (
	ReasonCompleted  = "Completed"
	ReasonError      = "Error"
	ReasonOOMKilled  = "OOMKilled"
	ReasonStartError = "StartError"
	ReasonUnknown    = "Unknown"
	ExitUnknown      = 255
	ExitStartError   = 128
)

// Status is what changes of a container. Times are nanoseconds since 1970, 0
// is never; its JSON is containerd's.
type Status struct {
	Pid        uint32
	CreatedAt  int64
	StartedAt  int64
	FinishedAt int64
	ExitCode   int32
	Reason     string
	Message    string
	// Starting and Removing keep two such operations from meeting; Unknown is
	// a container of which nothing is known. They are not stored.
	Starting  bool `json:"-"`
	Removing  bool `json:"-"`
	Unknown   bool `json:"-"`
	Resources *runtime.ContainerResources
}

// State is what the CRI calls it.
func (s Status) State() runtime.ContainerState {
	switch {
	case s.Unknown:
		return runtime.ContainerState_CONTAINER_UNKNOWN
	case s.FinishedAt != 0:
		return runtime.ContainerState_CONTAINER_EXITED
	case s.StartedAt != 0:
		return runtime.ContainerState_CONTAINER_RUNNING
	case s.CreatedAt != 0:
		return runtime.ContainerState_CONTAINER_CREATED
	}
	return runtime.ContainerState_CONTAINER_UNKNOWN
}

// Facts are read from a container's specification and its record, when it is
// made and again at every start of the daemon.
type Facts struct {
	// User is who its first process runs as.
	User                     *runtime.ContainerUser
	Snapshotter, SnapshotKey string
}

// Container is a container of a pod. Its values may be read at any time;
// configurations in them are shared and must not be changed.
type Container struct {
	dir string // of the status file

	save sync.Mutex // serialises writes of the status file
	mu   sync.Mutex // guards the rest; taken after save, never held over I/O
	meta ContainerMeta
	kept []byte // in the place of meta.Config when it has ended
	st   Status
	fact Facts
	gone chan struct{} // closed when the process ends; nil if nobody waits
}

// NewContainer makes a container whose status is kept in dir.
func NewContainer(meta ContainerMeta, st Status, dir string) *Container {
	c := &Container{dir: dir, meta: meta}
	c.set(st)
	return c
}

// set replaces the status; the caller holds the lock, if anybody else knows c.
func (c *Container) set(st Status) {
	if st.FinishedAt != 0 && c.st.FinishedAt == 0 {
		if c.gone != nil {
			close(c.gone)
			c.gone = nil
		}
		// As a message it is a third of what it is as values.
		if kept, err := proto.Marshal(remembered(c.meta.Config)); err == nil { // else it stays
			c.kept, c.meta.Config = kept, nil
		}
	}
	c.st = st
}

// remembered is what is still told of a container that has ended: a node may
// have tens of thousands, and how they were to run is in their records (promise P23).
func remembered(c *runtime.ContainerConfig) *runtime.ContainerConfig {
	out := &runtime.ContainerConfig{Metadata: c.GetMetadata(), Image: c.GetImage(), Labels: c.GetLabels(), Annotations: c.GetAnnotations(), Mounts: c.GetMounts(), LogPath: c.GetLogPath(),
		Stdin: c.GetStdin(), StdinOnce: c.GetStdinOnce(), Tty: c.GetTty(), CDIDevices: c.GetCDIDevices(), StopSignal: c.GetStopSignal()}
	if p := c.GetLinux().GetSecurityContext().GetSeccomp(); p != nil {
		out.Linux = &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{Seccomp: p}}
	}
	return out
}

func (c *Container) key() (string, string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.meta.ID, c.meta.Name
}

// ID is the container's id.
func (c *Container) ID() string {
	id, _ := c.key()
	return id
}

// PodID is the id of its pod.
func (c *Container) PodID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.meta.SandboxID
}

// Meta returns the metadata. The configuration of a container that has ended is
// decoded at each call: who asks all containers for less asks for less.
func (c *Container) Meta() ContainerMeta {
	c.mu.Lock()
	m, kept := c.meta, c.kept
	c.mu.Unlock()
	if kept != nil {
		m.Config = &runtime.ContainerConfig{}
		if err := proto.Unmarshal(kept, m.Config); err != nil {
			panic(fmt.Sprintf("configuration of container %s, as it was encoded: %v", m.ID, err))
		}
	}
	return m
}

// Facts returns what was set by SetFacts.
func (c *Container) Facts() Facts {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fact
}

// SetFacts replaces the facts.
func (c *Container) SetFacts(f Facts) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fact = f
}

// Status returns the status.
func (c *Container) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.st
}

// Gone is closed when the container has finished.
func (c *Container) Gone() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.st.FinishedAt != 0 {
		ended := make(chan struct{})
		close(ended)
		return ended
	}
	if c.gone == nil {
		c.gone = make(chan struct{})
	}
	return c.gone
}

// Change changes the status and stores it before anybody sees the new one. fn
// gets a copy, does no I/O, and keeps the status as it is by an error, which is
// returned. If the status cannot be stored, it stays as it was.
func (c *Container) Change(fn func(*Status) error) error {
	c.save.Lock()
	defer c.save.Unlock()
	st := c.Status()
	if err := fn(&st); err != nil {
		return err
	}
	if err := writeStatus(c.dir, st); err != nil {
		return fmt.Errorf("container %s: %w", c.ID(), err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.set(st)
	return nil
}

// Mark is Change for what is not stored: Starting, Removing, Unknown.
func (c *Container) Mark(fn func(*Status) error) error {
	c.save.Lock()
	defer c.save.Unlock()
	st := c.Status()
	if err := fn(&st); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.st = st
	return nil
}

// InPod is true of the containers of a pod.
func InPod(id string) func(*Container) bool {
	return func(c *Container) bool { return c.PodID() == id }
}

// NewContainers makes an empty index.
func NewContainers() *Index[*Container] { return newIndex[*Container]("container") }

// EncodeContainer returns the extension's value.
func EncodeContainer(m ContainerMeta) (typed.Any, error) {
	return encode(urlContainer, "container "+m.ID, m)
}

// DecodeContainer reads it. ErrInvalidArgument.
func DecodeContainer(a typed.Any) (ContainerMeta, error) {
	var m ContainerMeta
	if err := decode(a, urlContainer, &m); err != nil {
		return ContainerMeta{}, err
	}
	if m.ID == "" || m.Config.GetMetadata() == nil {
		return ContainerMeta{}, fmt.Errorf("metadata of a container without id or configuration: %w", errdefs.ErrInvalidArgument)
	}
	return m, nil
}

const (
	statusFile = "status"
	maxStatus  = 1 << 20
)

type versionedStatus struct {
	Version string
	Status
}

// writeStatus replaces the file without a sync: what it says is about
// processes, and none of them survives what would lose it.
func writeStatus(dir string, st Status) error {
	data, err := json.Marshal(versionedStatus{metadataVersion, st})
	if err != nil {
		return fmt.Errorf("encode status: %w", err)
	}
	next := filepath.Join(dir, statusFile+".new")
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return fmt.Errorf("store status: %w", err)
	}
	if err := os.Rename(next, filepath.Join(dir, statusFile)); err != nil {
		return fmt.Errorf("store status: %w", err)
	}
	return nil
}

// ReadStatus reads what is kept in dir. ErrNotFound if there is none,
// ErrInvalidArgument if it cannot be read, as after a power cut.
func ReadStatus(dir string) (Status, error) {
	path := filepath.Join(dir, statusFile)
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return Status{}, fmt.Errorf("status file %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return Status{}, fmt.Errorf("status file: %w", err)
	}
	if info.Size() > maxStatus {
		return Status{}, fmt.Errorf("status file %s of %d bytes: %w", path, info.Size(), errdefs.ErrInvalidArgument)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return Status{}, fmt.Errorf("status file: %w", err)
	}
	var v versionedStatus
	if err := json.Unmarshal(data, &v); err != nil {
		return Status{}, fmt.Errorf("status file %s: %v: %w", path, err, errdefs.ErrInvalidArgument)
	}
	if v.Version != metadataVersion {
		return Status{}, fmt.Errorf("status file %s of version %q: %w", path, v.Version, errdefs.ErrInvalidArgument)
	}
	return v.Status, nil
}

// Time makes a time of a status's nanoseconds; 0 is the zero time.
func Time(nanoseconds int64) time.Time {
	if nanoseconds == 0 {
		return time.Time{}
	}
	return time.Unix(0, nanoseconds)
}
