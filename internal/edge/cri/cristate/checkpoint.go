package cristate

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PodCheckpoint says what a directory with a pod's checkpoint holds. It is
// written last: without it the directory is no checkpoint.
type PodCheckpoint struct {
	Version int
	// ID tells checkpoints apart; it follows from the rest.
	ID  string `json:"-"`
	Pod *runtime.PodSandboxConfig
	// Runtime and Binary are what made the checkpoint: the type of the runtime
	// handler, and the program that it names.
	Runtime, Binary string
	CreatedAt       time.Time
	// Containers are the names of archives by those of containers.
	Containers map[string]string
}

const (
	podCheckpointFile    = "pod.json"
	podCheckpointVersion = 1
	maxPodCheckpoint     = 4 << 20
)

// RuntimeOf is what a handler's checkpoints are of: its type, and its program.
func RuntimeOf(rt Runtime) (name, binary string) {
	binary, _ = rt.Options["BinaryName"].(string)
	return rt.Type, binary
}

// Write writes it to a directory that has none, for good. Nothing is left after
// an error.
func (p PodCheckpoint) Write(to *os.Root) error {
	p.Version = podCheckpointVersion
	data, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("encode %s: %w", podCheckpointFile, err)
	}
	f, err := to.OpenFile(podCheckpointFile, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		var dir *os.File
		if dir, err = to.Open("."); err == nil {
			err = errors.Join(dir.Sync(), dir.Close())
		}
	}
	if err != nil {
		return errors.Join(err, to.Remove(podCheckpointFile))
	}
	return nil
}

// ReadPodCheckpoint reads what Write wrote; nothing that it says is believed.
// ErrInvalidArgument if the directory holds no such checkpoint.
func ReadPodCheckpoint(from *os.Root) (PodCheckpoint, error) {
	var p PodCheckpoint
	f, size, err := OpenRegular(from, podCheckpointFile)
	if err != nil {
		return p, err
	}
	defer f.Close()
	data := make([]byte, min(size, maxPodCheckpoint+1))
	if _, err := io.ReadFull(f, data); err != nil {
		return p, fmt.Errorf("read %s: %w", podCheckpointFile, err)
	}
	if err = json.Unmarshal(data, &p); len(data) > maxPodCheckpoint {
		err = fmt.Errorf("it has more than %d bytes", maxPodCheckpoint)
	}
	switch {
	case err != nil:
	case p.Version != podCheckpointVersion:
		err = fmt.Errorf("version %d is not known", p.Version)
	case len(p.Containers) == 0:
		err = errors.New("it names no containers")
	}
	for name, archive := range p.Containers {
		if !filepath.IsLocal(archive) || strings.ContainsAny(archive, "/\x00") {
			err = fmt.Errorf("archive %.80q of container %.80q is no name of a file", archive, name)
		}
	}
	if err != nil {
		return p, fmt.Errorf("%s of the checkpoint: %v: %w", podCheckpointFile, err, errdefs.ErrInvalidArgument)
	}
	p.ID = digest.FromBytes(data).Encoded()
	return p, nil
}

// OpenRegular opens a file in a directory that is not trusted. ErrInvalidArgument
// if it is not there, or is something else.
func OpenRegular(from *os.Root, name string) (_ *os.File, size int64, err error) {
	f, err := from.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("checkpoint: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%.80q of the checkpoint is not a file: %w", name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}
