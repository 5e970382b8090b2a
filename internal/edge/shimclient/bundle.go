package shimclient

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/mountx"
)

// The files of a bundle (contract 5.1.1). The last three are Gantry's own.
const (
	fileConfig    = "config.json"
	fileRootfs    = "rootfs"
	fileWork      = "work"
	fileLog       = "log"
	fileShim      = "shim-binary-path"
	fileBootstrap = "bootstrap.json"
	fileAddress   = "address"
	fileSandbox   = "sandbox"

	// fileCreating is there from a bundle's first moment until the create
	// that made it is about to be answered.
	fileCreating = "creating"
	// fileExit says that the exit of the first process was published.
	fileExit = "exit.delivered"
	// dirExits has a file for each exec; it says whether its exit was published.
	dirExits = "exits"
)

// bundle is a container's directory for its shim.
type bundle struct {
	path string
	work string
}

func (m *Manager) bundle(k key) bundle {
	return bundle{
		path: filepath.Join(m.state, string(k.ns), string(k.id)),
		work: filepath.Join(m.root, string(k.ns), string(k.id)),
	}
}

func (b bundle) file(name string) string { return filepath.Join(b.path, name) }

// ociSpec is the little of a runtime spec that matters here.
type ociSpec struct {
	Process *struct {
		Args []string `json:"args"`
	} `json:"process"`
	Annotations map[string]string `json:"annotations"`
	Linux       *struct {
		Namespaces []struct {
			Type string `json:"type"`
		} `json:"namespaces"`
		GIDMappings []struct {
			ContainerID uint32 `json:"containerID"`
			HostID      uint32 `json:"hostID"`
		} `json:"gidMappings"`
	} `json:"linux"`
}

func parseSpec(b []byte) (ociSpec, error) {
	var s ociSpec
	if len(b) == 0 {
		return s, fmt.Errorf("container has no spec: %w", errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("container's spec is not an OCI runtime spec: %w (%w)", err, errdefs.ErrInvalidArgument)
	}
	if s.Process == nil {
		return s, fmt.Errorf("container's spec has no process: %w", errdefs.ErrInvalidArgument)
	}
	return s, nil
}

// rootGID is the host's group that is root's in the container, 0 if they are the same.
func (s ociSpec) rootGID() uint32 {
	if s.Linux == nil {
		return 0
	}
	for _, ns := range s.Linux.Namespaces {
		if ns.Type != "user" {
			continue
		}
		for _, g := range s.Linux.GIDMappings {
			if g.ContainerID == 0 {
				return g.HostID
			}
		}
	}
	return 0
}

// make creates the directories and files of a bundle that exist before its
// shim. ErrAlreadyExists if the bundle does. The caller removes what a make
// that failed has made.
func (b bundle) make(config []byte, s ociSpec) (made bool, err error) {
	for _, dir := range []string{filepath.Dir(b.path), filepath.Dir(b.work)} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return false, fmt.Errorf("make bundle: %w", err)
		}
	}
	if err := os.Mkdir(b.path, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return false, fmt.Errorf("bundle %s is there already, of a task that could not be removed: %w", b.path, errdefs.ErrAlreadyExists)
		}
		return false, fmt.Errorf("make bundle: %w", err)
	}
	if err := os.WriteFile(b.file(fileCreating), nil, 0o600); err != nil {
		return true, fmt.Errorf("make bundle: %w", err)
	}
	if gid := s.rootGID(); gid != 0 {
		// The container's root has to reach its root file system.
		if err := os.Chown(b.path, -1, int(gid)); err != nil {
			return true, fmt.Errorf("make bundle: %w", err)
		}
		if err := os.Chmod(b.path, 0o710); err != nil {
			return true, fmt.Errorf("make bundle: %w", err)
		}
	}
	// A work directory without a bundle is an orphan of an earlier task.
	if err := os.RemoveAll(b.work); err != nil {
		return true, fmt.Errorf("make bundle: remove old work directory: %w", err)
	}
	for _, step := range []func() error{
		func() error { return os.Mkdir(b.work, 0o711) },
		func() error { return os.Mkdir(b.file(fileRootfs), 0o711) },
		func() error { return os.Symlink(b.work, b.file(fileWork)) },
		func() error { return os.WriteFile(b.file(fileConfig), config, 0o644) },
		func() error { return unix.Mkfifo(b.file(fileLog), 0o700) },
	} {
		if err := step(); err != nil {
			return true, fmt.Errorf("make bundle %s: %w", b.path, err)
		}
	}
	return true, nil
}

// write makes a small file of the bundle, whole or not at all.
func (b bundle) write(name string, content []byte) error {
	tmp := b.file("." + filepath.Base(name) + ".tmp")
	if err := os.WriteFile(tmp, content, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", b.file(name), err)
	}
	if err := os.Rename(tmp, b.file(name)); err != nil {
		return fmt.Errorf("write %s: %w", b.file(name), err)
	}
	return nil
}

// read returns a small file of the bundle; a shim may have written it.
func (b bundle) read(name string) ([]byte, error) {
	// Not to wait for a writer, should there be a FIFO in its place.
	f, err := os.OpenFile(b.file(name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 64<<10))
}

func (b bundle) has(name string) bool {
	_, err := os.Lstat(b.file(name))
	return err == nil
}

// endpoint reads where the shim listens: what the daemon has recorded, or else
// what an old shim wrote itself, which is recorded then (contract 5.4.1, 13.21).
// ok is false if there is neither.
func (b bundle) endpoint() (e endpoint, ok bool, err error) {
	raw, err := b.read(fileBootstrap)
	if err == nil {
		if err := json.Unmarshal(raw, &e); err != nil {
			return e, true, fmt.Errorf("read %s: %w", b.file(fileBootstrap), err)
		}
		e = e.normal()
		return e, true, e.known()
	}
	if !errors.Is(err, os.ErrNotExist) {
		return e, false, fmt.Errorf("read %s: %w", b.file(fileBootstrap), err)
	}
	raw, err = b.read(fileAddress)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return e, false, nil
		}
		return e, false, fmt.Errorf("read %s: %w", b.file(fileAddress), err)
	}
	e = endpoint{Address: strings.TrimSpace(string(raw))}.normal()
	if err := e.known(); err != nil {
		return e, true, err
	}
	return e, true, b.record(e)
}

func (b bundle) record(e endpoint) error {
	raw, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return b.write(fileBootstrap, raw)
}

// shim returns the binary that the bundle's shim was started from, "" if it
// was not started for this container.
func (b bundle) shim() string {
	raw, err := b.read(fileShim)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

// remove takes the bundle away: renamed first, so that nobody takes a half
// removed one for whole (contract 13.20). Whatever is mounted in it is
// unmounted; if that cannot be done nothing below it is removed.
func (b bundle) remove() error {
	gone := filepath.Join(filepath.Dir(b.path), "."+filepath.Base(b.path))
	if _, err := os.Lstat(b.path); err == nil {
		if err := unmountBelow(b.path); err != nil {
			return err
		}
		if _, err := os.Lstat(gone); err == nil {
			if err := sweep(gone); err != nil {
				return err
			}
		}
		if err := os.Rename(b.path, gone); err != nil {
			return fmt.Errorf("remove bundle: %w", err)
		}
	}
	if err := sweep(gone); err != nil {
		return err
	}
	if err := os.RemoveAll(b.work); err != nil {
		return fmt.Errorf("remove work directory: %w", err)
	}
	return nil
}

// sweep removes a directory in which nothing may be mounted any more.
func sweep(dir string) error {
	if err := unmountBelow(dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove bundle: %w", err)
	}
	return nil
}

func unmountBelow(dir string) error {
	if err := mountx.UnmountRecursive(dir, 0); err == nil {
		return nil
	}
	// Somebody still looks at it: it goes out of sight now, and away with them.
	if err := mountx.UnmountRecursive(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("remove bundle: unmount what is in it: %w", err)
	}
	return nil
}

// note is what is remembered of a process's exit.
type note struct {
	Pid       uint32 `json:"pid"`
	Status    uint32 `json:"status"`
	At        int64  `json:"at"` // nanoseconds since 1970
	Delivered bool   `json:"delivered"`
	heard     bool   // the shim has told it, and will not again
}

func noteName(exec string) string {
	if exec == "" {
		return fileExit
	}
	return filepath.Join(dirExits, exec)
}

// remember writes a note; exec is "" for the first process.
func (b bundle) remember(exec string, n note) error {
	raw, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if exec != "" {
		if err := os.Mkdir(b.file(dirExits), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("note exit: %w", err)
		}
	}
	return b.write(noteName(exec), raw)
}

func (b bundle) forget(exec string) error {
	err := os.Remove(b.file(noteName(exec)))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// recall reads the notes: the first process's under "", the execs' under their ids.
func (b bundle) recall() map[string]note {
	notes := map[string]note{}
	get := func(exec string) {
		raw, err := b.read(noteName(exec))
		if err != nil {
			return
		}
		var n note
		if json.Unmarshal(raw, &n) != nil {
			n = note{} // cut short: as if not delivered
		}
		notes[exec] = n
	}
	get("")
	files, _ := os.ReadDir(b.file(dirExits)) // absent if there were no execs
	for _, f := range files {
		get(f.Name())
	}
	return notes
}
