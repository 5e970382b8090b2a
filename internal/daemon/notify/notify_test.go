package notify

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// contract: 8.2.3
func TestNotify(t *testing.T) {
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for name, addr := range map[string]string{"path": filepath.Join(dir, "n"), "abstract": fmt.Sprintf("@gantry-test-%d", os.Getpid())} {
		t.Run(name, func(t *testing.T) {
			l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: addr, Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			n, err := New(addr)
			if err != nil || !n.Enabled() {
				t.Fatal(n, err)
			}
			for _, s := range []struct {
				send func() error
				want string
			}{{n.Ready, "READY=1"}, {n.Stopping, "STOPPING=1"}, {func() error { return n.Status("a\nb") }, "STATUS=a b"}} {
				if err := s.send(); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 100)
				if err := l.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
					t.Fatal(err)
				}
				k, err := l.Read(buf)
				if err != nil || string(buf[:k]) != s.want {
					t.Errorf("got %q %v, want %q", buf[:k], err, s.want)
				}
			}
		})
	}
	var none Notifier
	if none.Enabled() || none.Ready() != nil {
		t.Error("without a socket something is sent")
	}
	if _, err := New("relative"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("relative: %v", err)
	}
	gone, _ := New(filepath.Join(dir, "gone"))
	if err := gone.Ready(); err == nil {
		t.Error("no error without a listener")
	}
}
