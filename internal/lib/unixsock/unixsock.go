// Package unixsock keeps apart the processes that make and remove sockets in
// one directory: a name that somebody has just taken is not removed as that of
// a process that died.
package unixsock

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	lockName    = ".lock"
	dialTimeout = time.Second
)

// Lock keeps others from making and removing sockets in dir, until unlock is
// called. It waits for them for at most the time given.
func Lock(dir string, within time.Duration) (unlock func(), err error) {
	return lock(dir, os.O_CREATE, within)
}

func lock(dir string, create int, within time.Duration) (unlock func(), err error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|create, 0o600)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(within)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(deadline) {
			f.Close()
			return nil, &fs.PathError{Op: "flock", Path: path, Err: err}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// RemoveDead removes the socket at path if nobody listens to it. Some threads of
// a process that was killed may keep it open for a moment, after the first of
// them is gone: then a connection ends, which that of a process that lives does
// not, and the next is tried. A process that lives is told from it after the
// time given, at most; 0 does not wait. What is no socket, or in doubt, stays.
func RemoveDead(path string, dying time.Duration) {
	if info, err := os.Lstat(path); err != nil || info.Mode().Type() != fs.ModeSocket {
		return
	}
	for end := time.Now().Add(dying); listens(path, time.Until(end)); {
		if !time.Now().Before(end) {
			return
		}
	}
	// Where there is no lock, nobody who takes it has made a socket.
	unlock, err := lock(filepath.Dir(path), 0, dialTimeout)
	if err == nil {
		defer unlock()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return
	}
	if !listens(path, 0) { // nor has another taken the name meanwhile
		os.Remove(path)
	}
}

// listens says whether somebody may listen, and waits for the end of the
// connection, for at most the time given.
func listens(path string, wait time.Duration) bool {
	conn, err := net.DialTimeout("unix", path, dialTimeout)
	if err != nil {
		return !errors.Is(err, unix.ECONNREFUSED)
	}
	defer conn.Close()
	if wait > 0 && conn.SetReadDeadline(time.Now().Add(wait)) == nil {
		_, _ = conn.Read(make([]byte, 1))
	}
	return true
}
