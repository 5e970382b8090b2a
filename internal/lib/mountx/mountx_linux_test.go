package mountx

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
}

// tree makes a directory whose mounts are gone after the test.
func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := UnmountRecursive(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func mkdir(t *testing.T, parts ...string) string {
	t.Helper()
	dir := filepath.Join(parts...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func mountsBelow(t *testing.T, dir string) int {
	t.Helper()
	m, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		t.Fatal(err)
	}
	return len(m)
}

// contract: 3.4.1
func TestParseOptions(t *testing.T) {
	p := parseOptions([]string{"rbind", "ro", "nosuid", "suid", "rslave", "X-containerd.mkdir.path=/x", "x-systemd.foo", "loop", "uidmap=0:1:2", "gidmap=0:3:4", "size=1m", "volatile", "relatime"})
	if p.flags != unix.MS_BIND|unix.MS_REC|unix.MS_RDONLY|unix.MS_RELATIME {
		t.Errorf("flags %#x", p.flags)
	}
	if !p.loop || p.uidMap != "0:1:2" || p.gidMap != "0:3:4" || len(p.propagation) != 1 {
		t.Errorf("%+v", p)
	}
	if diff := cmp.Diff([]string{"size=1m", "volatile"}, p.data); diff != "" {
		t.Error(diff)
	}
	if p := parseOptions([]string{"rro"}); !p.recursiveRO || p.flags&unix.MS_RDONLY == 0 {
		t.Errorf("rro: %+v", p)
	}
}

// contract: 3.4.1
func TestBindReadOnly(t *testing.T) {
	needRoot(t)
	dir := tree(t)
	src, dst := mkdir(t, dir, "src"), mkdir(t, dir, "dst")
	mkdir(t, src, "sub")
	if err := unix.Mount("tmpfs", filepath.Join(src, "sub"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	canWrite := func(path string) error {
		err := os.WriteFile(path, nil, 0o600)
		if err != nil && !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", path, err)
		}
		return err
	}
	for _, c := range []struct {
		options  []string
		top, sub bool
	}{
		{[]string{"rbind", "rw"}, true, true},
		{[]string{"rbind", "ro"}, false, true},
		{[]string{"rbind", "rro"}, false, false},
	} {
		m := Mount{Type: "bind", Source: src, Options: c.options}
		if err := m.Mount(dst); err != nil {
			t.Fatal(err)
		}
		if got := canWrite(dst+"/f") == nil; got != c.top {
			t.Errorf("%v: top writable is %v", c.options, got)
		}
		if got := canWrite(dst+"/sub/f") == nil; got != c.sub {
			t.Errorf("%v: submount writable is %v", c.options, got)
		}
		if err := UnmountRecursive(dst, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := canWrite(filepath.Join(src, "sub", "g")); err != nil {
		t.Errorf("the source became read-only: %v", err)
	}
}

// contract: 3.4.1
func TestPropagation(t *testing.T) {
	needRoot(t)
	dir := tree(t)
	m := Mount{Type: "tmpfs", Source: "tmpfs", Options: []string{"size=1m", "shared"}}
	if err := m.Mount(dir); err != nil {
		t.Fatal(err)
	}
	info, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil || len(info) != 1 {
		t.Fatal(info, err)
	}
	if !strings.Contains(info[0].Optional, "shared:") || !strings.Contains(info[0].VFSOptions, "size=1024k") {
		t.Errorf("%+v", info[0])
	}
}

// contract: 3.4.1
func TestTargetStaysUnderRoot(t *testing.T) {
	needRoot(t)
	dir := tree(t)
	root, outside := mkdir(t, dir, "root"), mkdir(t, dir, "outside")
	mkdir(t, root, "outside")
	mkdir(t, root, "a/b")
	for link, to := range map[string]string{"abs": outside, "up": "../../../../outside", "in": "a"} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	tmpfs := func(target string) Mount { return Mount{Type: "tmpfs", Source: "tmpfs", Target: target} }
	for target, want := range map[string]string{"up": "outside", "../outside": "outside", "/in/b": "a/b", "in/../outside": "outside"} {
		if err := tmpfs(target).Mount(root); err != nil {
			t.Errorf("%s: %v", target, err)
			continue
		}
		if ok, _ := mountinfo.Mounted(filepath.Join(root, want)); !ok {
			t.Errorf("%s is not mounted at %s", target, want)
		}
		if err := UnmountAll(filepath.Join(root, want), 0); err != nil {
			t.Error(err)
		}
	}
	if err := tmpfs("abs").Mount(root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absolute link: %v", err) // it names a path that root does not have
	}
	if ok, _ := mountinfo.Mounted(outside); ok {
		t.Error("a link led out of the root")
	}
}

// contract: 3.4.1
func TestAllUndoes(t *testing.T) {
	needRoot(t)
	dir := tree(t)
	mkdir(t, dir, "src/sub")
	dst := mkdir(t, dir, "dst")
	err := All([]Mount{
		{Type: "bind", Source: dir + "/src", Options: []string{"rbind"}},
		{Type: "tmpfs", Source: "tmpfs", Target: "sub"},
		{Type: "nosuchfs", Source: "x"},
	}, dst)
	if err == nil || !strings.Contains(err.Error(), "nosuchfs") || !errors.Is(err, unix.ENODEV) {
		t.Errorf("got %v", err)
	}
	if n := mountsBelow(t, dir); n != 0 {
		t.Errorf("%d mounts left", n)
	}
}

// contract: 3.4.1
func TestUnmount(t *testing.T) {
	needRoot(t)
	dir := tree(t)
	for _, p := range []string{dir, dir + "/missing"} {
		if err := errors.Join(Unmount(p, 0), UnmountAll(p, 0), UnmountRecursive(p, 0)); err != nil {
			t.Errorf("not mounted: %v", err)
		}
	}
	tmpfs := Mount{Type: "tmpfs", Source: "tmpfs"}
	for range 3 {
		if err := tmpfs.Mount(dir); err != nil {
			t.Fatal(err)
		}
	}
	mkdir(t, dir, "a/b")
	if err := (Mount{Type: "tmpfs", Source: "tmpfs", Target: "a/b"}).Mount(dir); err != nil {
		t.Fatal(err)
	}
	// Somebody is inside: no success, and an end.
	f, err := os.Create(dir + "/a/b/open")
	if err != nil {
		t.Fatal(err)
	}
	if err := Unmount(dir+"/a/b", 0); !errors.Is(err, unix.EBUSY) {
		t.Errorf("busy: %v", err)
	}
	f.Close()
	if err := UnmountRecursive(dir, 0); err != nil {
		t.Error(err)
	}
	if n := mountsBelow(t, dir); n != 0 {
		t.Errorf("%d mounts left", n)
	}
}

// contract: 3.4.1
func TestOverlayOfManyLayers(t *testing.T) {
	needRoot(t)
	for _, name := range []string{"ab", strings.Repeat("long", 30)} {
		dir := tree(t)
		var lower []string
		for i := range 120 {
			d := mkdir(t, dir, fmt.Sprint(i), name)
			write(t, filepath.Join(d, fmt.Sprint("f", i)), fmt.Sprint(i))
			lower = append(lower, d)
		}
		m := Mount{Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + strings.Join(lower, ":"), "upperdir=" + mkdir(t, dir, "upper"), "workdir=" + mkdir(t, dir, "work")}}
		if n := len(strings.Join(m.Options, ",")); n < os.Getpagesize() {
			t.Fatalf("%d bytes fit a page", n)
		}
		before, _ := os.Getwd()
		dst := mkdir(t, dir, "dst")
		if err := m.Mount(dst); err != nil {
			t.Fatal(err)
		}
		for _, i := range []int{0, 60, 119} {
			if b, err := os.ReadFile(fmt.Sprintf("%s/f%d", dst, i)); err != nil || string(b) != fmt.Sprint(i) {
				t.Errorf("layer %d: %q, %v", i, b, err)
			}
		}
		write(t, dst+"/new", "x")
		if _, err := os.Stat(dir + "/upper/new"); err != nil {
			t.Error(err)
		}
		if after, _ := os.Getwd(); after != before {
			t.Errorf("working directory moved to %s", after)
		}
	}
}

func TestCompactOverlay(t *testing.T) {
	dir, opts := compactOverlay([]string{"index=off", "lowerdir=/r/s/1/fs:/r/s/22/fs", "upperdir=/r/s/3/fs", "workdir=/r/s/3/work"})
	if dir != "/r/s" {
		t.Errorf("dir %s", dir)
	}
	if diff := cmp.Diff([]string{"index=off", "lowerdir=1/fs:22/fs", "upperdir=3/fs", "workdir=3/work"}, opts); diff != "" {
		t.Error(diff)
	}
	for _, o := range []string{"lowerdir=/a:/b", "lowerdir=a:/b/c", `lowerdir=/x/a\:b:/x/c`} {
		if dir, same := compactOverlay([]string{o}); dir != "/" || same[0] != o {
			t.Errorf("%s: %s %v", o, dir, same)
		}
	}
	if diff := cmp.Diff([]string{`/a\:b`, "/c"}, splitLower(`/a\:b:/c`)); diff != "" {
		t.Error(diff)
	}
}

func owner(t *testing.T, path string) (uid, gid uint32) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	return st.Uid, st.Gid
}

// contract: 3.4.1
func TestIDMapped(t *testing.T) {
	needRoot(t)
	dir := tree(t)
	lower := mkdir(t, dir, "lower")
	write(t, lower+"/root", "x")
	write(t, lower+"/user", "x")
	if err := os.Chown(lower+"/user", 5, 6); err != nil {
		t.Fatal(err)
	}
	ids := []string{"uidmap=0:10000:100", "gidmap=0:20000:100"}
	for _, m := range []Mount{
		{Type: "bind", Source: lower, Options: append([]string{"rbind"}, ids...)},
		{Type: "overlay", Source: "overlay", Options: append([]string{"lowerdir=" + lower, "upperdir=" + mkdir(t, dir, "u"), "workdir=" + mkdir(t, dir, "w")}, ids...)},
	} {
		dst := mkdir(t, dir, m.Type)
		if err := m.Mount(dst); errdefs.IsNotImplemented(err) {
			t.Skip(err)
		} else if err != nil {
			t.Fatal(err)
		}
		if u, g := owner(t, dst+"/root"); u != 10000 || g != 20000 {
			t.Errorf("%s: root became %d:%d", m.Type, u, g)
		}
		if u, g := owner(t, dst+"/user"); u != 10005 || g != 20006 {
			t.Errorf("%s: 5:6 became %d:%d", m.Type, u, g)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "ovl-idmapped*")); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
	m := Mount{Type: "bind", Source: lower, Options: []string{"bind", "uidmap=0:1:1"}}
	if err := m.Mount(mkdir(t, dir, "x")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("uidmap without gidmap: %v", err)
	}
}

// contract: 3.4.1
func TestLoop(t *testing.T) {
	needRoot(t)
	dir := tree(t)
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no loop devices: ", err)
	}
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("no mkfs.ext4")
	}
	image, dst := dir+"/image", mkdir(t, dir, "dst")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 8<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", "-F", image).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m := Mount{Type: "ext4", Source: image, Options: []string{"loop"}}
	if err := m.Mount(dst); err != nil {
		t.Fatal(err)
	}
	info, _ := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dst))
	if len(info) != 1 || !strings.HasPrefix(info[0].Source, "/dev/loop") {
		t.Fatalf("%+v", info)
	}
	write(t, dst+"/f", "x")
	if err := UnmountAll(dst, 0); err != nil {
		t.Fatal(err)
	}
	name := filepath.Base(info[0].Source)
	if b, err := os.ReadFile("/sys/block/" + name + "/loop/backing_file"); err == nil && strings.TrimSpace(string(b)) == image {
		t.Errorf("%s is still attached", name)
	}
}

// contract: 3.4.1
func TestWithTemp(t *testing.T) {
	needRoot(t)
	dir := tree(t)
	tmpfs := []Mount{{Type: "tmpfs", Source: "tmpfs"}}
	boom := errors.New("boom")
	var used string
	err := WithTemp(context.Background(), dir, tmpfs, func(root string) error {
		used = root
		write(t, root+"/f", "x")
		return boom
	})
	if err != boom {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(used); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", used, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := WithTemp(ctx, dir, tmpfs, func(string) error { t.Error("called"); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// A process that died in fn.
	stale := mkdir(t, dir, "containerd-mount123")
	if err := All(tmpfs, stale); err != nil {
		t.Fatal(err)
	}
	other := mkdir(t, dir, "other")
	if err := CleanupTemp(dir, 0); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stale mount is left: %v", err)
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("a foreign directory was removed: %v", err)
	}
	if err := CleanupTemp(dir+"/missing", 0); err != nil {
		t.Error(err)
	}
}

// contract: 3.4.1
func TestHelper(t *testing.T) {
	bin := t.TempDir()
	script := "#!/bin/sh\necho \"$@\" > " + bin + "/args\ntest \"$2\" != " + bin + "/bad || { echo broken >&2; exit 3; }\n"
	if err := os.WriteFile(bin+"/mount.fuse3", []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	m := Mount{Type: "fuse3.sshfs", Source: "src", Options: []string{"ro", "a=b"}}
	dst := mkdir(t, bin, "dst")
	if err := m.Mount(dst); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(bin + "/args"); strings.TrimSpace(string(b)) != "src "+dst+" -o ro -o a=b -t sshfs" {
		t.Errorf("args %q", b)
	}
	if err := m.Mount(mkdir(t, bin, "bad")); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("got %v", err)
	}
}
