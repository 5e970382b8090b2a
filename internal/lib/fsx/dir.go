package fsx

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	readOnly       = os.O_RDONLY
	createTruncate = os.O_WRONLY | os.O_CREATE | os.O_TRUNC
)

// Dir is the tree below a directory of the host. Links in it are followed: an
// administrator may have put a part of it on another disk.
type Dir string

func (d Dir) path(name string) string { return filepath.Join(string(d), filepath.FromSlash(name)) }

// OpenFile is os.OpenFile.
func (d Dir) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := os.OpenFile(d.path(name), flag, perm)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Rename is os.Rename.
func (d Dir) Rename(oldname, newname string) error {
	return os.Rename(d.path(oldname), d.path(newname))
}

// Remove is os.Remove.
func (d Dir) Remove(name string) error { return os.Remove(d.path(name)) }

// Mkdir is os.Mkdir.
func (d Dir) Mkdir(name string, perm fs.FileMode) error { return os.Mkdir(d.path(name), perm) }

// ReadDir is os.ReadDir.
func (d Dir) ReadDir(name string) ([]fs.DirEntry, error) { return os.ReadDir(d.path(name)) }

// Stat is os.Stat.
func (d Dir) Stat(name string) (fs.FileInfo, error) { return os.Stat(d.path(name)) }

// SyncDir is fsync of the directory.
func (d Dir) SyncDir(name string) error {
	f, err := os.Open(d.path(name))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
