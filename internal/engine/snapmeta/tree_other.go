//go:build !linux

package snapmeta

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/gantryd/gantry/core/snapshot"
)

// usage sums up the lengths of the files below path.
func usage(ctx context.Context, path string) (snapshot.Usage, error) {
	var u snapshot.Usage
	err := filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		u.Inodes++
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			u.Size += info.Size()
		}
		return ctx.Err()
	})
	return u, err
}

// syncTree makes a tree durable file by file, whatever its size: there is no
// syncfs here.
func syncTree(ctx context.Context, path string, _ int) (bool, error) {
	err := filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		return errors.Join(f.Sync(), ctx.Err())
	})
	return err == nil, err
}

func syncFS(dir *os.File) error { return dir.Sync() }

func removeAll(ctx context.Context, top *os.File, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(top.Name(), name))
}
