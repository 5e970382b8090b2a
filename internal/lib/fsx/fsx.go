// Package fsx is the small file system that durable engines write through, so
// that a test can cut the power before any operation. Dir is the real one;
// Mem keeps apart what was written and what would survive.
package fsx

import (
	"errors"
	"io"
	"io/fs"
	"path"
	"syscall"
)

// FS is a tree of files. Names are slash-separated and relative to its root,
// "." being the root itself; they are the program's own, not a user's. It is
// safe for concurrent use.
//
// What a call changed survives a power cut only after the Sync of the file
// (content and mode) or the SyncDir of the directory (names in it). Rename is
// atomic. Errors are *fs.PathError or *os.LinkError around an errno.
type FS interface {
	// OpenFile opens or creates a file; flags are those of package os.
	OpenFile(name string, flag int, perm fs.FileMode) (File, error)
	// Rename gives a file or a directory another name, replacing a file there.
	Rename(oldname, newname string) error
	// Remove removes a file or an empty directory.
	Remove(name string) error
	// Mkdir makes one directory.
	Mkdir(name string, perm fs.FileMode) error
	// ReadDir lists a directory in the order of names.
	ReadDir(name string) ([]fs.DirEntry, error)
	// Stat describes a file or a directory.
	Stat(name string) (fs.FileInfo, error)
	// SyncDir makes the names in a directory durable.
	SyncDir(name string) error
}

// File is an open file of an FS. Reads and writes at offsets may be concurrent.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Truncate cuts or extends the file to size bytes.
	Truncate(size int64) error
	// Chmod changes the permission bits.
	Chmod(mode fs.FileMode) error
	// Sync makes the content and the mode durable. After an error nothing is
	// known of what was written since the last Sync, whatever a later one says.
	Sync() error
	Stat() (fs.FileInfo, error)
}

// VerityFS is an FS that may seal a file with fs-verity.
type VerityFS interface {
	// EnableVerity seals the file, which nobody may have open for writing. It
	// returns an error that wraps errors.ErrUnsupported where there is no such thing.
	EnableVerity(name string) error
}

// Links returns how many names a file has, 1 if that is not known.
func Links(fi fs.FileInfo) uint64 {
	switch s := fi.Sys().(type) {
	case *syscall.Stat_t:
		return uint64(s.Nlink)
	case memSys:
		return uint64(s.links)
	}
	return 1
}

// MkdirAll makes a directory and those above it, and makes their names
// durable. It does nothing, also no sync, for what exists.
func MkdirAll(f FS, name string, perm fs.FileMode) error {
	if name == "." {
		return nil
	}
	if _, err := f.Stat(name); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := path.Dir(name)
	if err := MkdirAll(f, parent, perm); err != nil {
		return err
	}
	if err := f.Mkdir(name, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return f.SyncDir(parent)
}

// RemoveAll removes a file, or a directory and all below it. Links are not
// followed. What does not exist is no error.
func RemoveAll(f FS, name string) error {
	err := f.Remove(name)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	entries, rerr := f.ReadDir(name)
	if rerr != nil {
		return err
	}
	for _, e := range entries {
		if err := RemoveAll(f, path.Join(name, e.Name())); err != nil {
			return err
		}
	}
	if err := f.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// ReadFile reads a whole file of at most limit bytes; a longer one is an error.
func ReadFile(f FS, name string, limit int64) ([]byte, error) {
	r, err := f.OpenFile(name, readOnly, 0)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.NewSectionReader(r, 0, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, &fs.PathError{Op: "read", Path: name, Err: syscall.EFBIG}
	}
	return data, nil
}

// WriteFile writes a whole file, without making it durable.
func WriteFile(f FS, name string, data []byte, perm fs.FileMode) error {
	w, err := f.OpenFile(name, createTruncate, perm)
	if err != nil {
		return err
	}
	if len(data) > 0 {
		if _, err := w.WriteAt(data, 0); err != nil {
			w.Close()
			return err
		}
	}
	return w.Close()
}
