//go:build !linux

package fsx

import (
	"errors"
	"io/fs"
)

// EnableVerity is not possible on this system.
func (d Dir) EnableVerity(name string) error {
	return &fs.PathError{Op: "enable fs-verity", Path: d.path(name), Err: errors.ErrUnsupported}
}
