// Package atomicfile replaces a file so that a reader, and a host after a
// power cut, sees all of the old one or all of the new one.
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/gantryd/gantry/internal/lib/fsx"
)

// suffix marks the file that has not got its name yet. One is left over by a
// crash at most and the next Write of that name replaces it.
const suffix = ".gantry-new"

// Unfinished says whether a file of this name is what a crash left of a Write.
// Where names are not used again its owner has to remove it.
func Unfinished(name string) bool { return strings.HasSuffix(name, suffix) }

// Write replaces the file at path with data, durably. Concurrent calls for one
// path must be kept apart by the caller.
func Write(path string, data []byte, perm fs.FileMode) error {
	return WriteFS(fsx.Dir(filepath.Dir(path)), filepath.Base(path), data, perm)
}

// WriteFS is Write in an FS.
func WriteFS(f fsx.FS, name string, data []byte, perm fs.FileMode) error {
	if err := write(f, name, data, perm); err != nil {
		return fmt.Errorf("replace %s: %w", name, err)
	}
	return nil
}

func write(f fsx.FS, name string, data []byte, perm fs.FileMode) (err error) {
	temp := name + suffix
	// A file left by a crash may be open or linked elsewhere: never reuse it.
	if err := f.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w, err := f.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Remove(temp) // the next Write does it otherwise
		}
	}()
	if err := fill(w, data, perm); err != nil {
		return errors.Join(err, w.Close())
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := f.Rename(temp, name); err != nil {
		return err
	}
	dir := "."
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		dir = name[:i]
	}
	return f.SyncDir(dir)
}

func fill(w fsx.File, data []byte, perm fs.FileMode) error {
	if len(data) > 0 {
		if _, err := w.WriteAt(data, 0); err != nil {
			return err
		}
	}
	if err := w.Chmod(perm); err != nil { // whatever the umask was
		return err
	}
	return w.Sync()
}
