package unixsock

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func listen(t *testing.T, path string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	t.Cleanup(func() { l.Close() })
	return l
}

func dir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func there(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// A process that was killed may still listen for a moment; one that lives, what
// is no socket, and what nobody has made stays.
func TestRemoveDead(t *testing.T) {
	path := filepath.Join(dir(t), "s")
	RemoveDead(path, 0)

	l := listen(t, path)
	RemoveDead(path, 20*time.Millisecond)
	if !there(path) {
		t.Error("the socket of one who lives is gone")
	}
	time.AfterFunc(20*time.Millisecond, func() { l.Close() })
	if RemoveDead(path, time.Minute); there(path) {
		t.Error("the socket of one who was dying is there")
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if RemoveDead(path, 0); !there(path) {
		t.Error("what is no socket was removed")
	}
}

// Who finds a dead socket may be slower than another one who takes its name.
func TestTakenMeanwhile(t *testing.T) {
	d := dir(t)
	path := filepath.Join(d, "s")
	listen(t, path).Close()
	unlock, err := Lock(d, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { RemoveDead(path, 0); close(done) }()
	time.Sleep(20 * time.Millisecond) // it waits for the lock by now, or will see what follows
	select {
	case <-done:
		t.Error("a socket was removed under the lock of another")
	default:
	}
	_ = os.Remove(path)
	listen(t, path)
	unlock()
	if <-done; !there(path) {
		t.Error("the socket of one who lives is gone")
	}
	if unlock, err := Lock(d, 0); err != nil {
		t.Errorf("the lock is still held: %v", err)
	} else {
		unlock()
	}
}
