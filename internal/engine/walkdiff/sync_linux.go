package walkdiff

import (
	"os"

	"golang.org/x/sys/unix"
)

// syncFS makes everything on dir's file system durable, which for many files
// is one journal commit instead of thousands.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return &os.PathError{Op: "syncfs", Path: dir, Err: err}
	}
	return nil
}
