package event

import (
	"encoding/json"
	"strconv"
	"time"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/typed"
)

// Topics (contract 1.6).
const (
	TopicContainerCreate  = "/containers/create"
	TopicContainerUpdate  = "/containers/update"
	TopicContainerDelete  = "/containers/delete"
	TopicContentCreate    = "/content/create"
	TopicContentDelete    = "/content/delete"
	TopicImageCreate      = "/images/create"
	TopicImageUpdate      = "/images/update"
	TopicImageDelete      = "/images/delete"
	TopicNamespaceCreate  = "/namespaces/create"
	TopicNamespaceUpdate  = "/namespaces/update"
	TopicNamespaceDelete  = "/namespaces/delete"
	TopicSnapshotPrepare  = "/snapshot/prepare"
	TopicSnapshotCommit   = "/snapshot/commit"
	TopicSnapshotRemove   = "/snapshot/remove"
	TopicSandboxCreate    = "/sandboxes/create"
	TopicSandboxStart     = "/sandboxes/start"
	TopicSandboxExit      = "/sandboxes/exit"
	TopicTaskCreate       = "/tasks/create"
	TopicTaskStart        = "/tasks/start"
	TopicTaskDelete       = "/tasks/delete"
	TopicTaskExit         = "/tasks/exit"
	TopicTaskOOM          = "/tasks/oom"
	TopicTaskExecAdded    = "/tasks/exec-added"
	TopicTaskExecStarted  = "/tasks/exec-started"
	TopicTaskPaused       = "/tasks/paused"
	TopicTaskResumed      = "/tasks/resumed"
	TopicTaskCheckpointed = "/tasks/checkpointed"
)

// The payloads. JSON names are those of the wire.
type (
	// ContainerRuntime is the runtime of a created container.
	ContainerRuntime struct {
		Name    string    `json:"name"`
		Options typed.Any `json:"options"`
	}
	// ContainerCreate says that a container record was made.
	ContainerCreate struct {
		ID      string           `json:"id"`
		Image   string           `json:"image,omitempty"`
		Runtime ContainerRuntime `json:"runtime"`
	}
	// ContainerUpdate says that a container record was changed.
	ContainerUpdate struct {
		ID          string            `json:"id"`
		Image       string            `json:"image,omitempty"`
		Labels      map[string]string `json:"labels,omitempty"`
		SnapshotKey string            `json:"snapshot_key,omitempty"`
	}
	// ContainerDelete says that a container record was removed.
	ContainerDelete struct {
		ID string `json:"id"`
	}
	// ContentCreate says that a blob was committed.
	ContentCreate struct {
		Digest    string `json:"digest"`
		Size      int64  `json:"size"`
		MediaType string `json:"media_type,omitempty"`
	}
	// ContentDelete says that a blob was removed.
	ContentDelete struct {
		Digest string `json:"digest"`
	}
	// ImageCreate says that an image record was made.
	ImageCreate struct {
		Name   string            `json:"name"`
		Labels map[string]string `json:"labels,omitempty"`
	}
	// ImageUpdate says that an image record was changed.
	ImageUpdate struct {
		Name   string            `json:"name"`
		Labels map[string]string `json:"labels,omitempty"`
	}
	// ImageDelete says that an image record was removed.
	ImageDelete struct {
		Name string `json:"name"`
	}
	// NamespaceCreate says that a namespace was made by a call.
	NamespaceCreate struct {
		Name   string            `json:"name"`
		Labels map[string]string `json:"labels,omitempty"`
	}
	// NamespaceUpdate says that a namespace's labels were changed.
	NamespaceUpdate struct {
		Name   string            `json:"name"`
		Labels map[string]string `json:"labels,omitempty"`
	}
	// NamespaceDelete says that a namespace was removed.
	NamespaceDelete struct {
		Name string `json:"name"`
	}
	// SandboxCreate says that a sandbox was made.
	SandboxCreate struct {
		SandboxID string `json:"sandbox_id"`
	}
	// SandboxStart says that a sandbox runs.
	SandboxStart struct {
		SandboxID string `json:"sandbox_id"`
	}
	// SandboxExit says that a sandbox ended.
	SandboxExit struct {
		SandboxID  string    `json:"sandbox_id"`
		ExitStatus uint32    `json:"exit_status,omitempty"`
		ExitedAt   time.Time `json:"exited_at"`
	}
	// SnapshotPrepare says that an active snapshot was made.
	SnapshotPrepare struct {
		Key         string `json:"key"`
		Parent      string `json:"parent,omitempty"`
		Snapshotter string `json:"snapshotter,omitempty"`
	}
	// SnapshotCommit says that a snapshot was committed.
	SnapshotCommit struct {
		Key         string `json:"key"`
		Name        string `json:"name"`
		Snapshotter string `json:"snapshotter,omitempty"`
	}
	// SnapshotRemove says that a snapshot was removed.
	SnapshotRemove struct {
		Key         string `json:"key"`
		Snapshotter string `json:"snapshotter,omitempty"`
	}
	// TaskIO is where a task's streams go.
	TaskIO struct {
		Stdin    string `json:"stdin,omitempty"`
		Stdout   string `json:"stdout,omitempty"`
		Stderr   string `json:"stderr,omitempty"`
		Terminal bool   `json:"terminal,omitempty"`
	}
	// TaskCreate says that a task was made.
	TaskCreate struct {
		ContainerID string        `json:"container_id"`
		Bundle      string        `json:"bundle,omitempty"`
		Rootfs      []mount.Mount `json:"rootfs,omitempty"`
		IO          TaskIO        `json:"io"`
		Checkpoint  string        `json:"checkpoint,omitempty"`
		Pid         uint32        `json:"pid,omitempty"`
	}
	// TaskStart says that a task's process runs.
	TaskStart struct {
		ContainerID string `json:"container_id"`
		Pid         uint32 `json:"pid,omitempty"`
	}
	// TaskDelete says that a task or, with ID, an exec was deleted.
	TaskDelete struct {
		ContainerID string    `json:"container_id"`
		Pid         uint32    `json:"pid,omitempty"`
		ExitStatus  uint32    `json:"exit_status,omitempty"`
		ExitedAt    time.Time `json:"exited_at"`
		ID          string    `json:"id,omitempty"`
	}
	// TaskExit says that a process ended. ID is the container's for its first
	// process, else the exec's.
	TaskExit struct {
		ContainerID string    `json:"container_id"`
		ID          string    `json:"id"`
		Pid         uint32    `json:"pid,omitempty"`
		ExitStatus  uint32    `json:"exit_status,omitempty"`
		ExitedAt    time.Time `json:"exited_at"`
	}
	// TaskOOM says that the kernel killed for lack of memory.
	TaskOOM struct {
		ContainerID string `json:"container_id"`
	}
	// TaskExecAdded says that an exec was made.
	TaskExecAdded struct {
		ContainerID string `json:"container_id"`
		ExecID      string `json:"exec_id"`
	}
	// TaskExecStarted says that an exec's process runs.
	TaskExecStarted struct {
		ContainerID string `json:"container_id"`
		ExecID      string `json:"exec_id"`
		Pid         uint32 `json:"pid,omitempty"`
	}
	// TaskPaused says that a task was frozen.
	TaskPaused struct {
		ContainerID string `json:"container_id"`
	}
	// TaskResumed says that a task was thawed.
	TaskResumed struct {
		ContainerID string `json:"container_id"`
	}
	// TaskCheckpointed says that a task was checkpointed.
	TaskCheckpointed struct {
		ContainerID string `json:"container_id"`
		Checkpoint  string `json:"checkpoint,omitempty"`
	}
	// Raw is a payload that Gantry does not know.
	Raw struct {
		Any typed.Any
	}
)

// The names on the wire. Those of images live in the images service (contract 1.6.3).

func (ContainerCreate) TypeURL() string  { return "containerd.events.ContainerCreate" }
func (ContainerUpdate) TypeURL() string  { return "containerd.events.ContainerUpdate" }
func (ContainerDelete) TypeURL() string  { return "containerd.events.ContainerDelete" }
func (ContentCreate) TypeURL() string    { return "containerd.events.ContentCreate" }
func (ContentDelete) TypeURL() string    { return "containerd.events.ContentDelete" }
func (ImageCreate) TypeURL() string      { return "containerd.services.images.v1.ImageCreate" }
func (ImageUpdate) TypeURL() string      { return "containerd.services.images.v1.ImageUpdate" }
func (ImageDelete) TypeURL() string      { return "containerd.services.images.v1.ImageDelete" }
func (NamespaceCreate) TypeURL() string  { return "containerd.events.NamespaceCreate" }
func (NamespaceUpdate) TypeURL() string  { return "containerd.events.NamespaceUpdate" }
func (NamespaceDelete) TypeURL() string  { return "containerd.events.NamespaceDelete" }
func (SandboxCreate) TypeURL() string    { return "containerd.events.SandboxCreate" }
func (SandboxStart) TypeURL() string     { return "containerd.events.SandboxStart" }
func (SandboxExit) TypeURL() string      { return "containerd.events.SandboxExit" }
func (SnapshotPrepare) TypeURL() string  { return "containerd.events.SnapshotPrepare" }
func (SnapshotCommit) TypeURL() string   { return "containerd.events.SnapshotCommit" }
func (SnapshotRemove) TypeURL() string   { return "containerd.events.SnapshotRemove" }
func (TaskCreate) TypeURL() string       { return "containerd.events.TaskCreate" }
func (TaskStart) TypeURL() string        { return "containerd.events.TaskStart" }
func (TaskDelete) TypeURL() string       { return "containerd.events.TaskDelete" }
func (TaskExit) TypeURL() string         { return "containerd.events.TaskExit" }
func (TaskOOM) TypeURL() string          { return "containerd.events.TaskOOM" }
func (TaskExecAdded) TypeURL() string    { return "containerd.events.TaskExecAdded" }
func (TaskExecStarted) TypeURL() string  { return "containerd.events.TaskExecStarted" }
func (TaskPaused) TypeURL() string       { return "containerd.events.TaskPaused" }
func (TaskResumed) TypeURL() string      { return "containerd.events.TaskResumed" }
func (TaskCheckpointed) TypeURL() string { return "containerd.events.TaskCheckpointed" }
func (r Raw) TypeURL() string            { return r.Any.URL }

func (p ContainerCreate) Field(f []string) (string, bool) {
	if len(f) == 2 && f[0] == "runtime" && f[1] == "name" {
		return p.Runtime.Name, p.Runtime.Name != ""
	}
	return lookup(f, nil, "id", p.ID, "image", p.Image)
}
func (p ContainerUpdate) Field(f []string) (string, bool) {
	return lookup(f, p.Labels, "id", p.ID, "image", p.Image, "snapshot_key", p.SnapshotKey)
}
func (p ContainerDelete) Field(f []string) (string, bool) { return lookup(f, nil, "id", p.ID) }
func (p ContentCreate) Field(f []string) (string, bool)   { return lookup(f, nil, "digest", p.Digest) }
func (p ContentDelete) Field(f []string) (string, bool)   { return lookup(f, nil, "digest", p.Digest) }
func (p ImageCreate) Field(f []string) (string, bool)     { return lookup(f, p.Labels, "name", p.Name) }
func (p ImageUpdate) Field(f []string) (string, bool)     { return lookup(f, p.Labels, "name", p.Name) }
func (p ImageDelete) Field(f []string) (string, bool)     { return lookup(f, nil, "name", p.Name) }
func (p NamespaceCreate) Field(f []string) (string, bool) { return lookup(f, p.Labels, "name", p.Name) }
func (p NamespaceUpdate) Field(f []string) (string, bool) { return lookup(f, p.Labels, "name", p.Name) }
func (p NamespaceDelete) Field(f []string) (string, bool) { return lookup(f, nil, "name", p.Name) }
func (p SandboxCreate) Field(f []string) (string, bool) {
	return lookup(f, nil, "sandbox_id", p.SandboxID)
}
func (p SandboxStart) Field(f []string) (string, bool) {
	return lookup(f, nil, "sandbox_id", p.SandboxID)
}
func (p SandboxExit) Field(f []string) (string, bool) {
	return lookup(f, nil, "sandbox_id", p.SandboxID, "exit_status", number(p.ExitStatus))
}
func (p SnapshotPrepare) Field(f []string) (string, bool) {
	return lookup(f, nil, "key", p.Key, "parent", p.Parent, "snapshotter", p.Snapshotter)
}
func (p SnapshotCommit) Field(f []string) (string, bool) {
	return lookup(f, nil, "key", p.Key, "name", p.Name, "snapshotter", p.Snapshotter)
}
func (p SnapshotRemove) Field(f []string) (string, bool) {
	return lookup(f, nil, "key", p.Key, "snapshotter", p.Snapshotter)
}
func (p TaskCreate) Field(f []string) (string, bool) {
	if len(f) == 2 && f[0] == "io" {
		return lookup(f[1:], nil, "stdin", p.IO.Stdin, "stdout", p.IO.Stdout, "stderr", p.IO.Stderr)
	}
	return lookup(f, nil, "container_id", p.ContainerID, "bundle", p.Bundle, "checkpoint", p.Checkpoint, "pid", number(p.Pid))
}
func (p TaskStart) Field(f []string) (string, bool) {
	return lookup(f, nil, "container_id", p.ContainerID, "pid", number(p.Pid))
}
func (p TaskDelete) Field(f []string) (string, bool) {
	return lookup(f, nil, "container_id", p.ContainerID, "id", p.ID, "pid", number(p.Pid), "exit_status", number(p.ExitStatus))
}
func (p TaskExit) Field(f []string) (string, bool) {
	return lookup(f, nil, "container_id", p.ContainerID, "id", p.ID, "pid", number(p.Pid), "exit_status", number(p.ExitStatus))
}
func (p TaskOOM) Field(f []string) (string, bool) {
	return lookup(f, nil, "container_id", p.ContainerID)
}
func (p TaskExecAdded) Field(f []string) (string, bool) {
	return lookup(f, nil, "container_id", p.ContainerID, "exec_id", p.ExecID)
}
func (p TaskExecStarted) Field(f []string) (string, bool) {
	return lookup(f, nil, "container_id", p.ContainerID, "exec_id", p.ExecID, "pid", number(p.Pid))
}
func (p TaskPaused) Field(f []string) (string, bool) {
	return lookup(f, nil, "container_id", p.ContainerID)
}
func (p TaskResumed) Field(f []string) (string, bool) {
	return lookup(f, nil, "container_id", p.ContainerID)
}
func (p TaskCheckpointed) Field(f []string) (string, bool) {
	return lookup(f, nil, "container_id", p.ContainerID, "checkpoint", p.Checkpoint)
}

// Field finds nothing: the encoding of a Raw payload is not known.
func (r Raw) Field([]string) (string, bool) { return "", false }

// MarshalJSON shows the encoded value.
func (r Raw) MarshalJSON() ([]byte, error) { return json.Marshal(r.Any) }

// lookup finds a field among name, value pairs, or below "labels".
func lookup(path []string, labels map[string]string, pairs ...string) (string, bool) {
	if len(path) == 2 && path[0] == "labels" {
		v, ok := labels[path[1]]
		return v, ok
	}
	if len(path) != 1 {
		return "", false
	}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i] == path[0] {
			return pairs[i+1], pairs[i+1] != ""
		}
	}
	return "", false
}

// number formats n, and zero as absent: that is what its wire form is.
func number(n uint32) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(n), 10)
}
