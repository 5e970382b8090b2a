package interop

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/gantryd/gantry/test/daemontest"
	"github.com/gantryd/gantry/test/testimage"
)

// binDir has gantryd and its shim.
var binDir string

func TestMain(m *testing.M) { os.Exit(daemontest.Main(m, "../..", &binDir)) }

// daemon is a gantryd, or Debian's containerd.
type daemon struct {
	*daemontest.Daemon
	t testing.TB
}

// newGantry prepares a gantryd. What is left when the test ends is a failure.
func newGantry(t testing.TB) *daemon {
	return newDaemon(t, filepath.Join(binDir, "gantryd"), 4)
}

func newDaemon(t testing.TB, bin string, version int) *daemon {
	t.Helper()
	d := &daemon{daemontest.New(t, bin, version, ""), t}
	t.Cleanup(func() {
		d.stop()
		for _, l := range d.Leftovers() {
			t.Errorf("left behind: %s", l)
		}
	})
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	if err := d.Start(); err != nil {
		d.t.Fatal(err)
	}
}

func (d *daemon) stop() {
	d.t.Helper()
	if err := d.Stop(); err != nil {
		d.t.Error(err)
	}
}

// connect is containerd's v2 client on a daemon, in namespace "default".
func (d *daemon) connect() *containerd.Client {
	d.t.Helper()
	c, err := containerd.New(d.Address(), containerd.WithDefaultNamespace("default"), containerd.WithTimeout(20*time.Second))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { c.Close() })
	return c
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	t.Cleanup(cancel)
	return namespaces.WithNamespace(ctx, "default")
}

// served is a registry with busybox in it, and its reference.
func served(t testing.TB) (*testimage.Registry, *testimage.Image, string) {
	img := testimage.Busybox(t)
	reg := testimage.Serve(t)
	return reg, img, reg.Put("library/busybox", "latest", img)
}

// debian is the path of one of Debian's containerd programs; the test is
// skipped where they are not.
func debian(t testing.TB, name string) string {
	t.Helper()
	p, err := daemontest.Debian(name)
	if err != nil {
		t.Skip(err)
	}
	return p
}

// eventually waits for a condition, at most 20 s.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("20 s have passed and still not: %s", what)
}

// testArchive writes busybox as an archive into dir, named
// example.org/busybox:latest.
func testArchive(t testing.TB, dir string) string {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "busybox.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := testimage.Busybox(t).Archive(f, "example.org/busybox:latest"); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}
