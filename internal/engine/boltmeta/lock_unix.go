//go:build unix

package boltmeta

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// lockFile takes the lock that bolt takes, on the same open file: taking it
// again is a no-op. It returns bolt's ErrTimeout after the deadline, unless
// that is zero.
func lockFile(f *os.File, deadline time.Time) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		if !deadline.IsZero() && !time.Now().Before(deadline) {
			return berrors.ErrTimeout
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// holder says who has the file locked, as far as the kernel tells.
func holder(path string) string {
	const unknown = "another process"
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return unknown
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return unknown
	}
	defer f.Close()
	want := fmt.Sprintf("%02x:%02x:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// 1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
		l := strings.Fields(lines.Text())
		if len(l) < 6 || l[1] != "FLOCK" || l[5] != want {
			continue
		}
		name, err := os.ReadFile("/proc/" + l[4] + "/comm")
		if err != nil {
			return "process " + l[4]
		}
		return fmt.Sprintf("process %s (%s)", l[4], strings.TrimSpace(string(name)))
	}
	return unknown
}
