package cricontainer

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/mount"
)

func find(t *testing.T, spec *specs.Spec, at string) specs.Mount {
	t.Helper()
	i := slices.IndexFunc(spec.Mounts, func(m specs.Mount) bool { return m.Destination == at })
	if i < 0 {
		t.Fatalf("no mount at %s: %+v", at, spec.Mounts)
	}
	return spec.Mounts[i]
}

// contract: 7.3.10
func TestMounts(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	if err := os.Symlink("target", n.dir+"/link"); err != nil {
		t.Fatal(err)
	}
	n.write(n.dir+"/target/file", "x")
	c := app("a")
	c.Mounts = []*runtime.Mount{{ContainerPath: "/absent", HostPath: n.dir + "/absent/dir"}, {ContainerPath: "/link", HostPath: n.dir + "/link", Readonly: true}}
	spec := n.spec(n.create(c))
	if m := find(t, spec, "/absent"); m.Source != n.dir+"/absent/dir" {
		t.Errorf("%+v", m)
	}
	if info, err := os.Stat(n.dir + "/absent/dir"); err != nil || !info.IsDir() || info.Mode().Perm() != 0o755 {
		t.Errorf("%v %v", info, err)
	}
	if m := find(t, spec, "/link"); m.Source != n.dir+"/target" || !slices.Contains(m.Options, "ro") {
		t.Errorf("%+v", m)
	}
}

// contract: 7.3.10
func TestPropagation(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	private, shared, slave := n.dir+"/private", n.dir+"/shared", n.dir+"/slave"
	for _, dir := range []string{private, shared, slave} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mnt := func(src, at, kind string, flags uintptr) {
		if err := unix.Mount(src, at, kind, flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{private, shared} {
		mnt("tmpfs", dir, "tmpfs", 0)
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	mnt("", private, "", unix.MS_PRIVATE)
	mnt("", shared, "", unix.MS_SHARED)
	mnt(shared, slave, "", unix.MS_BIND)
	t.Cleanup(func() { unix.Unmount(slave, unix.MNT_DETACH) })
	mnt("", slave, "", unix.MS_SLAVE)
	for _, c := range []struct {
		at   string
		how  runtime.MountPropagation
		fine bool
	}{
		{private, 0, true}, {private, runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, false}, {private, runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL, false},
		{slave, 0, true}, {slave, runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, true}, {slave, runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL, false},
		{shared, 0, true}, {shared, runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, true}, {shared, runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL, true},
	} {
		config := app("a")
		config.Mounts = []*runtime.Mount{{ContainerPath: "/m", HostPath: c.at + "/below", Propagation: c.how}}
		id, err := n.s.Create(t.Context(), n.podID, config, nil)
		if (err == nil) != c.fine || err != nil && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%+v: %v", c, err)
		}
		if err := n.s.Remove(t.Context(), id); id != "" && err != nil {
			t.Error(err)
		}
	}
}

// What the image has at a volume is in it, and nothing of the host.
// contract: 7.3.10
func TestImageVolumes(t *testing.T) {
	host := t.TempDir()
	if err := os.WriteFile(host+"/secret", []byte("of the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	n := newNode(t, ocispec.ImageConfig{Volumes: map[string]struct{}{"/data": {}, "/evil": {}, "/deep/evil": {}, "/none": {}, "/file": {}, "/covered": {}}}, func(root string) {
		for path, text := range map[string]string{"data/a": "text", "data/sub/b": "more", "file": "f", "covered/x": "x"} {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o750); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o640); err != nil {
				t.Fatal(err)
			}
		}
		err := errors.Join(os.Symlink(host, root+"/evil"), os.Mkdir(root+"/deep", 0o755), os.Symlink("../../../../../../.."+host, root+"/deep/evil"),
			os.Symlink(host+"/secret", root+"/data/link"), unix.Mkfifo(root+"/data/fifo", 0o600), os.Chown(root+"/data/a", 1000, 1001), os.Chmod(root+"/data", 0o2770|os.ModeSetgid))
		if err != nil {
			t.Fatal(err)
		}
	})
	c := app("a")
	c.Mounts = []*runtime.Mount{{ContainerPath: "/covered/", HostPath: host}}
	id := n.create(c)
	spec := n.spec(id)
	data := find(t, spec, "/data").Source
	if !strings.HasPrefix(data, n.dir+"/root/containers/"+id+"/volumes/") {
		t.Errorf("%s", data)
	}
	for path, want := range map[string]string{"a": "text", "sub/b": "more"} {
		if b, err := os.ReadFile(filepath.Join(data, path)); err != nil || string(b) != want {
			t.Errorf("%s: %q %v", path, b, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(data+"/a", &st); err != nil || st.Uid != 1000 || st.Gid != 1001 || st.Mode&0o777 != 0o640 {
		t.Errorf("%+v %v", st, err)
	}
	if info, err := os.Stat(data); err != nil || info.Mode().Perm() != 0o770 || info.Mode()&os.ModeSetgid == 0 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	if to, err := os.Readlink(data + "/link"); err != nil || to != host+"/secret" {
		t.Errorf("a link is copied as one: %s %v", to, err)
	}
	for _, at := range []string{"/evil", "/deep/evil", "/none", "/file"} {
		if entries, err := os.ReadDir(find(t, spec, at).Source); err != nil || len(entries) != 0 {
			t.Errorf("volume %s: %v %v", at, entries, err)
		}
	}
	if m := find(t, spec, "/covered"); m.Source != host {
		t.Errorf("%+v", m)
	}
	n.config.IgnoreImageDefinedVolumes = true
	n.boot()
	if err := n.s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	for _, m := range n.spec(n.create(app("b"))).Mounts {
		if m.Destination == "/data" {
			t.Error("a volume, though they are ignored")
		}
	}
}

// contract: 7.3.11
func TestImageMounts(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, func(root string) {
		if err := errors.Join(os.MkdirAll(root+"/models/v1", 0o755), os.WriteFile(root+"/models/v1/w", []byte("weights"), 0o644), os.Symlink("/models/v1", root+"/latest")); err != nil {
			t.Fatal(err)
		}
	})
	c := app("a")
	c.Mounts = []*runtime.Mount{{ContainerPath: "/all", Image: &runtime.ImageSpec{Image: "i"}}, {ContainerPath: "/sub", Image: &runtime.ImageSpec{Image: "i"}, ImageSubPath: "latest"}}
	id := n.create(c)
	spec := n.spec(id)
	for at, file := range map[string]string{"/all": "models/v1/w", "/sub": "w"} {
		m := find(t, spec, at)
		if b, err := os.ReadFile(filepath.Join(m.Source, file)); err != nil || string(b) != "weights" || !slices.Contains(m.Options, "ro") {
			t.Errorf("%+v: %q %v", m, b, err)
		}
		if err := os.WriteFile(filepath.Join(m.Source, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("%s can be written: %v", at, err)
		}
	}
	if err := n.s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// contract: 7.3.12
func TestDevices(t *testing.T) {
	got, err := devices([]*runtime.Device{{HostPath: "/dev/null", ContainerPath: "/dev/nothing", Permissions: "r"}})
	if err != nil || len(got) != 1 {
		t.Fatalf("%v %v", got, err)
	}
	if d := got[0]; d.Path != "/dev/nothing" || d.Type != "c" || d.Major != 1 || d.Minor != 3 || d.Access != "r" {
		t.Errorf("%+v", d)
	}
}

func TestRecords(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("x", 3600))
	const stamp = "2026-01-02T02:04:05.000000006Z stdout "
	for _, c := range []struct {
		text string
		max  int
		want string
	}{
		{"a\n", 10, stamp + "F a\n"},
		{"a\nb", 10, stamp + "F a\n" + stamp + "P b\n"},
		{"\n", 10, stamp + "F \n"},
		{"abcd\n", 4, stamp + "F abcd\n"},
		{"abcde\n", 4, stamp + "P abcd\n" + stamp + "F e\n"},
		{"abcdefghi", 4, stamp + "P abcd\n" + stamp + "P efgh\n" + stamp + "P i\n"},
		{strings.Repeat("x", 70000) + "\n", -1, stamp + "F " + strings.Repeat("x", 70000) + "\n"},
		{"", 4, ""},
	} {
		if got := string(appendRecords(nil, at, "stdout", []byte(c.text), c.max)); got != c.want {
			t.Errorf("%.20q: %.200q", c.text, got)
		}
	}
}

// texts are the texts of a log's records, by stream; a line is whole.
func texts(t *testing.T, path string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 {
			t.Fatalf("record %q", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			t.Error(err)
		}
		out[f[1]] += f[3]
		if f[2] == "F" {
			out[f[1]] += "\n"
		}
	}
	return out
}

// A shim that writes no logs is copied from, across renames and restarts.
// contract: 7.1.17, 7.3.17, 7.3.20, 13.29
func TestForeignShim(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	n.change = func(d *Deps) { d.WritesLogs = func(context.Context, container.Runtime) bool { return false } }
	n.boot()
	c := app("a")
	c.Stdin = true
	id := n.run(c)
	p, err := n.tasks.Get(t.Context(), container.ID(id), "")
	if err != nil {
		t.Fatal(err)
	}
	if p.IO.Stdin == "" || p.IO.Stderr == "" || p.IO.Stdout == p.IO.Stderr {
		t.Fatalf("%+v", p.IO)
	}
	// The shim has both ends open, as they have.
	out, err := os.OpenFile(p.IO.Stdout, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	errs, err := os.OpenFile(p.IO.Stderr, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer errs.Close()
	log := n.dir + "/logs/a/0.log"
	print := func(f *os.File, text string) {
		if _, err := io.WriteString(f, text); err != nil {
			t.Fatal(err)
		}
	}
	print(out, "one\n")
	print(errs, "bad\n")
	n.until("both are logged", func() bool { l := texts(t, log); return l["stdout"] == "one\n" && l["stderr"] == "bad\n" })
	if err := os.Rename(log, log+".1"); err != nil {
		t.Fatal(err)
	}
	if err := n.s.ReopenLog(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	print(out, "two")
	n.until("the new file has it", func() bool { return texts(t, log)["stdout"] == "two" })
	// The daemon goes away and another comes; what is printed meanwhile waits.
	n.s.mu.Lock()
	old := n.s.copies[id]
	delete(n.s.copies, id)
	n.s.mu.Unlock()
	old.end()
	print(out, " and more\nlast words")
	n.boot()
	n.until("nothing is lost", func() bool { return texts(t, log)["stdout"] == "two and more\nlast words" })
	print(errs, "end")
	if err := n.tasks.End(container.ID(id), "", 0); err != nil {
		t.Fatal(err)
	}
	out.Close()
	errs.Close()
	n.ended(id)
	if l := texts(t, log); l["stderr"] != "end" || strings.Contains(l["stdout"], "\x00") {
		t.Errorf("%q", l)
	}
	if err := n.s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// contract: 7.3.20, 7.1.17
func TestLogPlaces(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	c := app("quiet")
	c.LogPath, c.Stdin, c.Tty = "", true, true
	id := n.run(c)
	p, err := n.tasks.Get(t.Context(), container.ID(id), "")
	st, serr := n.s.Streams(id)
	if err != nil || serr != nil || !p.IO.Terminal || p.IO.Stderr != "" || p.IO.Stdin != st.Stdin || !strings.HasPrefix(p.IO.Stdout, "file://"+st.Log+"?") || !strings.HasPrefix(st.Log, n.dir+"/state/") {
		t.Errorf("%+v %+v %v %v", p.IO, st, err, serr)
	}
	if err := n.s.ReopenLog(t.Context(), id); err != nil {
		t.Errorf("a log that is not wanted: %v", err)
	}
	// A link in the log directory is not followed, wherever it leads.
	if err := errors.Join(os.MkdirAll(n.dir+"/logs", 0o755), os.Symlink("/etc", n.dir+"/logs/evil"), os.MkdirAll(n.dir+"/logs/b", 0o755), os.Symlink("/etc/gantry-test-none", n.dir+"/logs/b/0.log")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"evil/gantry-test-none", "b/0.log"} {
		c := app("b" + path[:1])
		c.LogPath = path
		id := n.create(c)
		if err := n.s.Start(t.Context(), id); err == nil {
			t.Errorf("%s was followed", path)
		}
	}
	if _, err := os.Lstat("/etc/gantry-test-none"); !errors.Is(err, os.ErrNotExist) {
		os.Remove("/etc/gantry-test-none")
		t.Error("a file of the host was made")
	}
}

// contract: 7.1.23
func TestCheckpointRefused(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	id := n.create(app("a"))
	if err := n.s.Checkpoint(t.Context(), id, "relative", 0); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if err := n.s.Checkpoint(t.Context(), id, n.dir+"/c.tar", 0); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	n.config.EnableCRIU = false
	n.boot()
	if err := n.s.Checkpoint(t.Context(), id, n.dir+"/c.tar", 0); !errdefs.IsNotImplemented(err) {
		t.Error(err)
	}
}

// layers answers any comparison with one blob.
type layers struct {
	diff.Service
	to content.Store
}

func (l layers) Compare(ctx context.Context, lower, upper []mount.Mount, o diff.CompareOptions) (ocispec.Descriptor, error) {
	const text = "the changes"
	if len(lower) == 0 || len(upper) == 0 || o.MediaType != ocispec.MediaTypeImageLayer {
		return ocispec.Descriptor{}, errdefs.ErrInvalidArgument
	}
	w, err := l.to.Writer(ctx, "layer", content.WriterOptions{})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer w.Close()
	if _, err := io.WriteString(w, text); err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{Digest: digest.FromString(text), Size: int64(len(text))}
	return d, w.Commit(ctx, d.Size, d.Digest, nil)
}

// contract: 7.1.23
func TestCheckpointArchive(t *testing.T) {
	n := newNode(t, ocispec.ImageConfig{}, nil)
	n.src.DiffService = layers{to: n.src.ContentStore}
	n.boot()
	id := n.run(app("a"))
	n.write(n.dir+"/logs/a/0.log", "what it said\n")
	n.tasks.checkpoint = func(o *options.CheckpointOptions) error {
		if o.Exit {
			t.Error("the container is to go on")
		}
		n.write(o.ImagePath+"/pages-1.img", "memory")
		n.write(o.WorkPath+"/dump.log", "criu's")
		return nil
	}
	at := n.dir + "/checkpoint.tar"
	if err := n.s.Checkpoint(t.Context(), id, at, time.Minute); err != nil {
		t.Fatal(err)
	}
	e := entries(t, at)
	for name, want := range map[string]string{"checkpoint/pages-1.img": "memory", "dump.log": "criu's", "container.log": "what it said\n", "rootfs-diff.tar": "the changes"} {
		if e[name] != want {
			t.Errorf("%s: %q", name, e[name])
		}
	}
	var config struct{ ID, Name, RootfsImageRef string }
	var spec specs.Spec
	var st runtime.ContainerStatus
	if err := errors.Join(json.Unmarshal([]byte(e["config.dump"]), &config), json.Unmarshal([]byte(e["spec.dump"]), &spec), json.Unmarshal([]byte(e["status.dump"]), &st)); err != nil {
		t.Fatal(err)
	}
	if config.ID != id || config.Name != "a" || config.RootfsImageRef != "sha256:config" || spec.Process == nil || st.GetId() != id {
		t.Errorf("%+v %+v %+v", config, spec.Process, &st)
	}
	if info, err := os.Stat(at); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	n.tasks.checkpoint = func(*options.CheckpointOptions) error { return errors.New("criu: no") }
	if err := n.s.Checkpoint(t.Context(), id, at+"2", time.Minute); err == nil || !strings.Contains(err.Error(), "criu: no") {
		t.Error(err)
	}
	if _, err := os.Stat(at + "2"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if st := n.get(id).Status(); st.State() != runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%+v", st)
	}
	if err := n.s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
	if l, err := n.src.LeaseStore.List(t.Context()); err != nil || len(l) != 1 {
		t.Errorf("leases %v %v", l, err)
	}
}

// entries are the names and contents of a tar archive.
func entries(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := map[string]string{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		if _, err := io.CopyN(&b, r, h.Size); err != nil {
			t.Fatal(err)
		}
		out[h.Name] = b.String()
	}
}
