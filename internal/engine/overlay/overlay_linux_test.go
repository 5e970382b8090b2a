package overlay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/snapshot/snapshottest"
	"github.com/gantryd/gantry/internal/lib/host"
	"github.com/gantryd/gantry/internal/lib/mountx"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
}

// open opens a store and checks it when the test ends.
func open(t *testing.T, root string, cfg Config, opts ...Option) *Store {
	t.Helper()
	needRoot(t)
	s, err := Open(root, cfg, slog.New(slog.DiscardHandler), opts...)
	var lacks *host.Lacks
	if errors.As(err, &lacks) {
		t.Skip(lacks)
	}
	must(t, err)
	t.Cleanup(func() {
		fsck(t, s)
		s.Close()
	})
	return s
}

// fsck fails the test for anything that Check finds but garbage, and for
// garbage that Cleanup leaves.
func fsck(t *testing.T, s *Store) {
	t.Helper()
	ctx := context.Background()
	for _, p := range s.Check(ctx) {
		if !p.Garbage {
			t.Errorf("check: %s", p)
		}
	}
	must(t, s.Cleanup(ctx))
	for _, p := range s.Check(ctx) {
		t.Errorf("check after cleanup: %s", p)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// contract: 3.1.1, 3.1.5, 3.1.6, 3.2.1, 13.10
func TestConformance(t *testing.T) {
	needRoot(t)
	for name, cfg := range map[string]Config{
		"default":       {},
		"sync_remove":   {SyncRemove: true},
		"mount_options": {MountOptions: []string{"redirect_dir=off"}},
	} {
		t.Run(name, func(t *testing.T) {
			snapshottest.Run(t, func(t *testing.T) snapshot.Store { return open(t, t.TempDir(), cfg) },
				snapshottest.Options{RealMounts: true, Rebase: !userns.RunningInUserNS(), Usage: true})
		})
	}
	t.Run("odd path", func(t *testing.T) {
		s := open(t, filepath.Join(t.TempDir(), `a:b,c\d e`), Config{})
		s.remap = false // labels are tested elsewhere
		layers(t, s, 3)
		in(t, view(t, s, "v", "L2"), func(root string) { exists(t, root, "f0", "f1", "f2") })
		m, err := s.Prepare(t.Context(), "a", "L2", nil)
		must(t, err)
		in(t, m, func(root string) { touch(t, root, "new") })
		exists(t, s.Data(mustGet(t, s, "a")), "new")
	})
}

func mustGet(t *testing.T, s *Store, key string) uint64 {
	t.Helper()
	r, err := s.Get(key)
	must(t, err)
	return r.ID
}

func in(t *testing.T, mounts []mount.Mount, fn func(root string)) {
	t.Helper()
	must(t, mountx.WithTemp(t.Context(), t.TempDir(), mounts, func(root string) error {
		fn(root)
		return nil
	}))
}

func touch(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, n := range names {
		must(t, os.WriteFile(filepath.Join(dir, n), []byte(n), 0o644))
	}
}

func exists(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := os.Lstat(filepath.Join(dir, n)); err != nil {
			t.Error(err)
		}
	}
}

// layers commits L0, L1 ... on each other, each with a file f0, f1 ...
func layers(t *testing.T, s *Store, n int) {
	t.Helper()
	parent := ""
	for i := range n {
		key, name := fmt.Sprint("a", i), fmt.Sprint("L", i)
		_, err := s.Prepare(t.Context(), key, parent, nil)
		must(t, err)
		touch(t, s.Data(mustGet(t, s, key)), fmt.Sprint("f", i))
		must(t, s.Commit(t.Context(), name, key, snapshot.CommitOptions{}))
		parent = name
	}
}

func view(t *testing.T, s snapshot.Store, key, parent string) []mount.Mount {
	t.Helper()
	m, err := s.View(t.Context(), key, parent, nil)
	must(t, err)
	return m
}

// contract: 3.2.1, 13.44
func TestMounts(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, Config{MountOptions: []string{"metacopy=off"}})
	s.options = []string{"metacopy=off", "index=off"}
	layers(t, s, 2)
	p := func(s string) string { return filepath.Join(root, "snapshots", s) }
	for _, c := range []struct {
		key, parent string
		view        bool
		want        mount.Mount
	}{
		{"active on nothing", "", false, mount.Mount{Type: "bind", Source: p("3/fs"), Options: []string{"rw", "rbind"}}},
		{"view of nothing", "", true, mount.Mount{Type: "bind", Source: p("4/fs"), Options: []string{"ro", "rbind"}}},
		{"view of one", "L0", true, mount.Mount{Type: "bind", Source: p("1/fs"), Options: []string{"ro", "rbind"}}},
		{"active on one", "L0", false, mount.Mount{Type: "overlay", Source: "overlay", Options: []string{
			"metacopy=off", "index=off", "workdir=" + p("6/work"), "upperdir=" + p("6/fs"), "lowerdir=" + p("1/fs")}}},
		{"view of two", "L1", true, mount.Mount{Type: "overlay", Source: "overlay", Options: []string{
			"metacopy=off", "index=off", "lowerdir=" + p("2/fs") + ":" + p("1/fs")}}},
		{"active on two", "L1", false, mount.Mount{Type: "overlay", Source: "overlay", Options: []string{
			"metacopy=off", "index=off", "workdir=" + p("8/work"), "upperdir=" + p("8/fs"), "lowerdir=" + p("2/fs") + ":" + p("1/fs")}}},
	} {
		make := s.Prepare
		if c.view {
			make = s.View
		}
		got, err := make(t.Context(), c.key, c.parent, nil)
		must(t, err)
		if len(got) != 1 || got[0].Type != c.want.Type || got[0].Source != c.want.Source || !slices.Equal(got[0].Options, c.want.Options) {
			t.Errorf("%s: mounts are %v, expected %v", c.key, got, c.want)
		}
	}
	for dir, want := range map[string]uint32{"3": 0o700, "3/fs": 0o755, "3/work": 0o711, "8/work": 0o711} {
		var st unix.Stat_t
		must(t, unix.Lstat(p(dir), &st))
		if st.Mode&0o7777 != want {
			t.Errorf("%s has mode %o, expected %o", dir, st.Mode&0o7777, want)
		}
	}
	if _, err := os.Lstat(p("4/work")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a view has a work directory (%v)", err)
	}
}

// contract: 3.2.1
func TestOptionsOfThisKernel(t *testing.T) {
	s := open(t, t.TempDir(), Config{})
	_, err := os.Stat("/sys/module/overlay/parameters/index")
	if has := slices.Contains(s.options, "index=off"); has != (err == nil) {
		t.Errorf("options are %q, the kernel's parameter: %v", s.options, err)
	}
	own := open(t, t.TempDir(), Config{MountOptions: []string{"index=on"}})
	if !slices.Equal(own.options, []string{"index=on"}) {
		t.Errorf("with an option of the administrator's they are %q", own.options)
	}
}

// A chain whose options are longer than the page that mount(2) takes.
//
// contract: 3.2.1, 13.44
func TestManyLayers(t *testing.T) {
	const n = 130
	s := open(t, t.TempDir(), Config{})
	layers(t, s, n)
	m, err := s.Prepare(t.Context(), "top", fmt.Sprint("L", n-1), nil)
	must(t, err)
	if l := len(strings.Join(m[0].Options, ",")); l <= os.Getpagesize() {
		t.Fatalf("options of %d bytes prove nothing", l)
	}
	in(t, m, func(root string) {
		for i := range n {
			exists(t, root, fmt.Sprint("f", i))
		}
		touch(t, root, "new")
	})
	exists(t, s.Data(mustGet(t, s, "top")), "new")
}

// contract: 3.2.1, 1.5.16
func TestUpperdirLabel(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, Config{UpperdirLabel: true})
	const l = snapshot.LabelPrefix + "x"
	_, err := s.Prepare(t.Context(), "a", "", map[string]string{l: "1"})
	must(t, err)
	want := filepath.Join(root, "snapshots/1/fs")
	check := func(i snapshot.Info, err error) {
		t.Helper()
		must(t, err)
		if i.Labels[LabelUpperDir] != want {
			t.Errorf("labels are %v", i.Labels)
		}
	}
	i, err := s.Stat(t.Context(), "a")
	check(i, err)
	check(s.Update(t.Context(), i)) // as clients do: with all that they saw
	must(t, s.Walk(t.Context(), func(i snapshot.Info) error { check(i, nil); return nil }, `labels."`+LabelUpperDir+`"==`+quote(want)))
	must(t, s.Commit(t.Context(), "A", "a", snapshot.CommitOptions{Labels: i.Labels}))
	check(s.Stat(t.Context(), "A"))
	if r, err := s.Get("A"); err != nil || len(r.Labels) != 1 || r.Labels[l] != "1" {
		t.Errorf("what is stored is %v (%v)", r.Labels, err)
	}
}

func quote(s string) string { return `"` + s + `"` }

// contract: 3.2.1, 10.8
func TestCapabilities(t *testing.T) {
	a, b := open(t, t.TempDir(), Config{}), open(t, t.TempDir(), Config{SlowChown: true}, WithoutRemap())
	if got := b.Capabilities(); !slices.Equal(got, []string{"rebase"}) {
		t.Errorf("with slow_chown and without mapped mounts it is capable of %q", got)
	}
	if !a.remap {
		t.Skip("no id mapped layers on this host")
	}
	if got := a.Capabilities(); !slices.Equal(got, []string{"remap-ids", "only-remap-ids", "rebase"}) {
		t.Errorf("by default it is capable of %q", got)
	}
}

const shift = 200000

func mapped() map[string]string {
	m := fmt.Sprintf("0:%d:65536", shift)
	return map[string]string{snapshot.LabelUIDMapping: m, snapshot.LabelGIDMapping: m}
}

// imageLayers commits a layer with several owners.
func imageLayers(t *testing.T, s *Store) {
	t.Helper()
	m, err := s.Prepare(t.Context(), "a", "", nil)
	must(t, err)
	in(t, m, func(root string) {
		touch(t, root, "root", "user", "suid", "caps")
		must(t, os.Chown(filepath.Join(root, "user"), 1000, 1001))
		must(t, os.Chown(filepath.Join(root, "suid"), 5, 6))
		must(t, unix.Chmod(filepath.Join(root, "suid"), 0o6755))
		must(t, unix.Setxattr(filepath.Join(root, "caps"), capability,
			[]byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
		must(t, os.Symlink("/etc/shadow", filepath.Join(root, "link")))
		must(t, os.Mkdir(filepath.Join(root, "dir"), 0o750))
		must(t, os.Chown(filepath.Join(root, "dir"), 7, 8))
	})
	must(t, s.Commit(t.Context(), "A", "a", snapshot.CommitOptions{}))
	_, err = s.Prepare(t.Context(), "b", "A", nil)
	must(t, err)
	must(t, s.Commit(t.Context(), "B", "b", snapshot.CommitOptions{}))
}

func checkShifted(t *testing.T, root string) {
	t.Helper()
	for name, want := range map[string][2]uint32{".": {0, 0}, "root": {0, 0}, "user": {1000, 1001}, "suid": {5, 6}, "link": {0, 0}, "dir": {7, 8}} {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(root, name), &st))
		if st.Uid != shift+want[0] || st.Gid != shift+want[1] {
			t.Errorf("%s belongs to %d:%d, expected %d:%d", name, st.Uid, st.Gid, shift+want[0], shift+want[1])
		}
		if name == "suid" && st.Mode&0o7777 != 0o6755 {
			t.Errorf("suid has mode %o", st.Mode&0o7777)
		}
	}
}

// contract: 10.8, 3.2.1
// promise: P45
func TestMappedIDs(t *testing.T) {
	s := open(t, t.TempDir(), Config{})
	if !s.remap {
		t.Skip("no id mapped layers on this host")
	}
	imageLayers(t, s)
	m, err := s.Prepare(t.Context(), "c", "B", mapped())
	must(t, err)
	before, err := s.Usage(t.Context(), "c")
	must(t, err)
	in(t, m, func(root string) {
		checkShifted(t, root)
		// What the container's root writes belongs to it.
		touch(t, root, "new")
		must(t, os.Lchown(filepath.Join(root, "new"), shift, shift))
		must(t, os.Lchown(filepath.Join(root, "user"), shift+1, shift+1)) // copied up
	})
	// No copies were made.
	if before.Inodes != 1 {
		t.Errorf("a snapshot for a user namespace has %d inodes of its own", before.Inodes)
	}
	// The view of the same layers, of two and of one, and without mapping.
	for key, parent := range map[string]string{"v2": "B", "v1": "A"} {
		m, err := s.View(t.Context(), key, parent, mapped())
		must(t, err)
		in(t, m, func(root string) { checkShifted(t, root) })
	}
	in(t, view(t, s, "plain", "B"), func(root string) {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(root, "user"), &st))
		if st.Uid != 1000 {
			t.Errorf("without mapping the file belongs to %d", st.Uid)
		}
	})
	// On nothing: the directory itself is mapped, its files stay unmapped on disk.
	m, err = s.Prepare(t.Context(), "n", "", mapped())
	must(t, err)
	in(t, m, func(root string) {
		var st unix.Stat_t
		must(t, unix.Lstat(root, &st))
		if st.Uid != shift {
			t.Errorf("root directory belongs to %d", st.Uid)
		}
	})
}

// contract: 10.8, 3.2.1
func TestSlowChown(t *testing.T) {
	s := open(t, t.TempDir(), Config{SlowChown: true}, WithoutRemap())
	imageLayers(t, s)
	m, err := s.Prepare(t.Context(), "c", "B", mapped())
	must(t, err)
	for _, o := range m[0].Options {
		if strings.Contains(o, "uidmap") {
			t.Errorf("mount option %s", o)
		}
	}
	in(t, m, func(root string) {
		checkShifted(t, root)
		buf := make([]byte, 64)
		n, err := unix.Lgetxattr(filepath.Join(root, "caps"), capability, buf)
		// Revision 3 with the namespace's root, which is how init's namespace sees it.
		want := "\x01\x00\x00\x03\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x40\x0d\x03\x00"
		if err != nil || string(buf[:n]) != want {
			t.Errorf("capabilities are % x (%v)", buf[:max(n, 0)], err)
		}
	})
	// A client that changed the owners itself passes the labels too: nothing
	// is changed twice.
	must(t, s.Commit(t.Context(), "C", "c", snapshot.CommitOptions{}))
	m, err = s.Prepare(t.Context(), "d", "C", mapped())
	must(t, err)
	in(t, m, func(root string) { checkShifted(t, root) })
	if u, err := s.Usage(t.Context(), "d"); err != nil || u.Inodes != 1 {
		t.Errorf("it was copied again: %+v, %v", u, err)
	}
	_, err = s.View(t.Context(), "v", "B", mapped())
	var lacks *host.Lacks
	if !errors.As(err, &lacks) {
		t.Errorf("a view with other owners: %v", err)
	}
	// The parent is as it was.
	in(t, view(t, s, "plain", "B"), func(root string) {
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(root, "user"), &st))
		if st.Uid != 1000 {
			t.Errorf("the file belongs to %d", st.Uid)
		}
	})
}

// contract: 10.8
func TestMappingRefused(t *testing.T) {
	s := open(t, t.TempDir(), Config{}, WithoutRemap())
	_, err := s.Prepare(t.Context(), "a", "", mapped())
	var lacks *host.Lacks
	if !errors.As(err, &lacks) || !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "slow_chown") {
		t.Errorf("mapping where it is not possible: %v", err)
	}
	for _, labels := range []map[string]string{
		{snapshot.LabelUIDMapping: "0:1:2"},
		{snapshot.LabelGIDMapping: "0:1:2"},
		{snapshot.LabelUIDMapping: "0:1:2", snapshot.LabelGIDMapping: "x"},
		{snapshot.LabelUIDMapping: "0:4294967295:2", snapshot.LabelGIDMapping: "0:1:2"},
		{snapshot.LabelUIDMapping: "0:1:2,1:5:1", snapshot.LabelGIDMapping: "0:1:2"},
	} {
		if _, err := s.Prepare(t.Context(), "a", "", labels); !errdefs.IsInvalidArgument(err) {
			t.Errorf("labels %v: %v", labels, err)
		}
	}
	if got := s.Check(t.Context()); len(got) != 0 {
		t.Errorf("what was refused left %v", got)
	}
}

// contract: 3.2.1, 11.8
func TestLacks(t *testing.T) {
	needRoot(t)
	// An upper directory cannot be on procfs, nor can anything else.
	in(t, []mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"size=1m"}}}, func(fs string) {
		lower := filepath.Join(fs, "l")
		must(t, os.MkdirAll(lower, 0o755))
		for _, d := range []string{"u", "w"} {
			must(t, os.Mkdir(filepath.Join(fs, d), 0o755))
		}
		// An overlay with white-outs of its own is no place for another one's upper directory.
		m := mount.Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + lower, "upperdir=" + fs + "/u", "workdir=" + fs + "/w"}}
		in(t, []mount.Mount{m}, func(root string) {
			s, err := Open(filepath.Join(root, "store"), Config{}, nil)
			if err == nil {
				s.Close()
				t.Skip("this kernel stacks overlays")
			}
			var lacks *host.Lacks
			if !errors.As(err, &lacks) || lacks.Help == "" || !errdefs.IsNotImplemented(err) {
				t.Errorf("overlay on overlay: %v", err)
			}
		})
	})
}

// The suite again, by a root who is root in a user namespace only.
//
// contract: 3.2.1, 13.44
func TestInUserNamespace(t *testing.T) {
	needRoot(t)
	if userns.RunningInUserNS() {
		t.Skip("it is what it tests")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// All but what needs device nodes.
	for run, pass := range map[string]string{
		"^TestConformance$/^default$/^(prepare|commit|rebase|remove|cleanup|files|siblings|white-outs|directories_replaced|root_directory|many_layers|sizes)$": "TestConformance/default/white-outs",
		"^TestUserNamespaceOptions$": "TestUserNamespaceOptions",
	} {
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.v", "-test.run="+run)
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 65536}}
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("in a user namespace: %v\n%s", err, out)
		} else if !strings.Contains(string(out), "--- PASS: "+pass+" ") {
			t.Errorf("in a user namespace nothing was tested:\n%s", out)
		}
	}
}

// It runs as a part of TestInUserNamespace.
func TestUserNamespaceOptions(t *testing.T) {
	if !userns.RunningInUserNS() {
		t.Skip("not in a user namespace")
	}
	s := open(t, t.TempDir(), Config{SlowChown: true})
	if !slices.Contains(s.options, "userxattr") {
		t.Errorf("options are %q", s.options)
	}
	if slices.Contains(s.Capabilities(), "rebase") {
		t.Errorf("it is capable of %q", s.Capabilities())
	}
}

func TestSecondOpen(t *testing.T) {
	root := t.TempDir()
	open(t, root, Config{})
	s, err := Open(root, Config{}, nil)
	if err == nil {
		s.Close()
	}
	if !errdefs.IsUnavailable(err) {
		t.Errorf("opened twice: %v", err)
	}
}
