//go:build !unix

package boltmeta

import (
	"os"
	"time"
)

// lockFile leaves locking to bolt: the lock of these systems is not one that
// can be taken twice.
func lockFile(*os.File, time.Time) error { return nil }

func holder(string) string { return "another process" }
