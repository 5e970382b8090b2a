package nspin

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/internal/lib/idmap"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("namespaces are made by root")
	}
}

// dir is a directory in which nothing may be pinned at the end.
func dir(t *testing.T) string {
	d := t.TempDir()
	t.Cleanup(func() {
		left, _ := os.ReadDir(d)
		for _, e := range left {
			t.Errorf("%s is left", e.Name())
			if err := Remove(filepath.Join(d, e.Name())); err != nil {
				t.Error(err)
			}
		}
	})
	return d
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// owner is the inode of the user namespace that owns the one at path.
func owner(t *testing.T, path string) uint64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	return inode(t, fmt.Sprintf("/proc/self/fd/%d", fd))
}

func remove(t *testing.T, paths map[Kind]string) {
	t.Helper()
	for _, path := range paths {
		for range 2 { // the second time it is gone
			if err := Remove(path); err != nil {
				t.Error(err)
			}
		}
		if Pinned(path) {
			t.Errorf("%s is still pinned", path)
		}
	}
}

func TestMakeAndEnter(t *testing.T) {
	needRoot(t)
	d := dir(t)
	paths := map[Kind]string{Net: d + "/net", UTS: d + "/uts", IPC: d + "/ipc"}
	if err := Make(Spec{Paths: paths, Hostname: "made-here"}); err != nil {
		t.Fatal(err)
	}
	defer remove(t, paths)
	for kind, path := range paths {
		if !Pinned(path) || inode(t, path) == inode(t, "/proc/self/ns/"+string(kind)) {
			t.Errorf("%s is no namespace of its own", path)
		}
		if owner(t, path) != inode(t, "/proc/self/ns/user") {
			t.Errorf("%s belongs to another user namespace", path)
		}
	}
	before, _ := os.Hostname()
	err := Enter(paths, func() error {
		if name, err := os.Hostname(); name != "made-here" {
			return fmt.Errorf("host name %q, %v", name, err)
		}
		devs, err := os.ReadFile("/proc/thread-self/net/dev")
		if n := strings.Count(string(devs), ":"); err != nil || n != 1 {
			return fmt.Errorf("%d interfaces, want lo: %v\n%s", n, err, devs)
		}
		return os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("77"), 0) // as a pod's sysctls are set
	})
	if err != nil {
		t.Error(err)
	}
	if after, _ := os.Hostname(); after != before {
		t.Errorf("the host is called %q now, was %q", after, before)
	}
	if v, _ := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); strings.TrimSpace(string(v)) == "77" {
		t.Error("the host's sysctl was changed")
	}
	want := errors.New("fn's")
	if err := Enter(paths, func() error { return want }); err != want {
		t.Errorf("error %v", err)
	}
	if err := Enter(map[Kind]string{User: "/proc/self/ns/user"}, func() error { return nil }); !errdefs.IsInvalidArgument(err) {
		t.Errorf("user namespace: %v", err)
	}
}

func TestMakeInUserNamespace(t *testing.T) {
	needRoot(t)
	d := dir(t)
	paths := map[Kind]string{Net: d + "/net", UTS: d + "/uts", IPC: d + "/ipc", User: d + "/user"}
	m := idmap.Map{{Container: 0, Host: 700000, Size: 65536}}
	if err := Make(Spec{Paths: paths, UIDs: m, GIDs: m, Hostname: "inside"}); err != nil {
		t.Fatal(err)
	}
	defer remove(t, paths)
	user := inode(t, paths[User])
	if user == inode(t, "/proc/self/ns/user") {
		t.Fatal("no user namespace of its own")
	}
	for _, kind := range []Kind{Net, UTS, IPC} {
		if owner(t, paths[kind]) != user {
			t.Errorf("%s does not belong to the new user namespace", kind)
		}
	}
	err := Enter(map[Kind]string{UTS: paths[UTS], Net: paths[Net]}, func() error {
		if name, _ := os.Hostname(); name != "inside" {
			return fmt.Errorf("host name %q", name)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestPin(t *testing.T) {
	needRoot(t)
	d := dir(t)
	if err := Make(Spec{Paths: map[Kind]string{Net: d + "/a"}}); err != nil {
		t.Fatal(err)
	}
	if err := Pin(d+"/a", d+"/b"); err != nil {
		t.Fatal(err)
	}
	if inode(t, d+"/a") != inode(t, d+"/b") {
		t.Error("another namespace")
	}
	if err := Pin(d+"/a", d+"/b"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("pin twice: %v", err)
	}
	if err := Pin(d+"/none", d+"/c"); !errdefs.IsNotFound(err) {
		t.Errorf("pin nothing: %v", err)
	}
	if err := Pin("/etc/passwd", d+"/c"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pin a file: %v", err)
	}
	remove(t, map[Kind]string{Net: d + "/a"})
	if !Pinned(d + "/b") {
		t.Error("one went with the other")
	}
	remove(t, map[Kind]string{Net: d + "/b"})
}

func TestMakeAllOrNone(t *testing.T) {
	needRoot(t)
	d := dir(t)
	file := filepath.Join(t.TempDir(), "there")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 4 { // maps are walked in any order
		if err := Make(Spec{Paths: map[Kind]string{Net: d + "/net", IPC: d + "/ipc", UTS: file}}); !errdefs.IsAlreadyExists(err) {
			t.Errorf("file is there: %v", err)
		}
		if left, _ := os.ReadDir(d); len(left) > 0 {
			t.Fatalf("left: %v", left)
		}
	}
	if _, err := os.Stat(file); err != nil {
		t.Error("somebody else's file is gone")
	}
	for name, s := range map[string]Spec{
		"nothing":     {},
		"unknown":     {Paths: map[Kind]string{"mnt": d + "/mnt"}},
		"no mappings": {Paths: map[Kind]string{User: d + "/user"}},
		"unsound":     {Paths: map[Kind]string{User: d + "/user"}, UIDs: idmap.Map{{Size: 0}}, GIDs: idmap.Map{{Size: 1}}},
	} {
		if err := Make(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
