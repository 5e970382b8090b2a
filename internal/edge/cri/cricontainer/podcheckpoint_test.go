package cricontainer

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/engine/walkdiff"
	"github.com/gantryd/gantry/internal/lib/attempt"
)

// podNode is a node whose differences are real, with an image that has a volume.
func podNode(t *testing.T) *node {
	n := newNode(t, ocispec.ImageConfig{Volumes: map[string]struct{}{"/data": {}}}, func(root string) {
		for _, name := range []string{"data/of-image", "app/kept", "app/removed"} {
			if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755), os.WriteFile(filepath.Join(root, name), []byte(name), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
	})
	n.src.DiffService = walkdiff.New(n.src.ContentStore, walkdiff.Options{TempDir: t.TempDir()})
	n.boot()
	return n
}

// rootfs is where a container's files are.
func (n *node) rootfs(id string) string {
	n.t.Helper()
	m, err := n.snaps.Mounts(n.t.Context(), id)
	if err != nil {
		n.t.Fatal(err)
	}
	return m[0].Source
}

func (n *node) volume(id string) string {
	n.t.Helper()
	for _, m := range n.spec(id).Mounts {
		if m.Destination == "/data" {
			return m.Source
		}
	}
	n.t.Fatal("no volume")
	return ""
}

func (n *node) shm(pod string) string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "state/sandboxes", pod, "shm")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		n.t.Fatal(err)
	}
	return dir
}

// another is a second pod, as one that is being made is.
func (n *node) another() *cristate.Pod {
	n.t.Helper()
	id := cristate.NewID()
	_, err := n.src.SandboxStore.Create(n.t.Context(), sandbox.Sandbox{ID: id, Runtime: container.Runtime{Name: "io.containerd.runc.v2"}})
	_, lerr := n.src.LeaseStore.Create(n.t.Context(), lease.Lease{ID: lease.ID(id)})
	if err := errors.Join(err, lerr); err != nil {
		n.t.Fatal(err)
	}
	c := n.podConfig()
	c.Metadata.Uid, c.LogDirectory = "another", filepath.Join(n.dir, "logs2")
	return cristate.NewPod(cristate.PodMeta{ID: id, Name: "another", Config: c}, cristate.PodStatus{State: cristate.PodReady, Namespaces: n.pod.Status().Namespaces})
}

func (n *node) open(dir string) *os.Root {
	n.t.Helper()
	r, err := os.OpenRoot(dir)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { r.Close() })
	return r
}

func (n *node) status(id string) task.Status {
	n.t.Helper()
	p, err := n.src.TaskStore.Get(n.t.Context(), container.ID(id), "")
	if err != nil {
		n.t.Fatal(err)
	}
	return p.Status
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		out = append(out, e.Name())
	}
	return out
}

// A pod's containers are captured while all of them are paused, with what they
// changed in their root file systems, volumes and /dev/shm; containers that are
// made of that have it again, and their tasks are started from criu's files.
//
// contract: 7.1.23, 7.3.24
func TestPodCheckpoint(t *testing.T) {
	n := podNode(t)
	ids := []string{n.run(app("a")), n.run(app("b"))}
	for _, id := range ids {
		root := n.rootfs(id)
		n.write(root+"/app/new", "new of "+id)
		n.write(n.volume(id)+"/mine", "data of "+id)
		if err := errors.Join(os.Remove(root+"/app/removed"), os.Remove(n.volume(id)+"/of-image")); err != nil {
			t.Fatal(err)
		}
	}
	n.write(n.shm(n.podID)+"/shared", "memory")
	n.tasks.checkpoint = func(o *options.CheckpointOptions) error {
		for _, id := range ids {
			if st := n.status(id); st != task.StatusPaused {
				t.Errorf("a container is captured while %s is %s", id, st)
			}
		}
		n.write(o.ImagePath+"/pages-1.img", "memory of "+filepath.Base(filepath.Dir(filepath.Dir(o.ImagePath))))
		n.write(o.WorkPath+"/dump.log", "criu's")
		return nil
	}
	dir := t.TempDir()
	at := n.open(dir)
	if err := n.s.CheckpointPod(t.Context(), n.podID, ids, at, cristate.PodCheckpoint{Pod: n.podConfig(), Runtime: "r"}); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); !slices.Equal(got, []string{"container-0.tar", "container-1.tar", "pod.json", "shm.tar"}) {
		t.Errorf("%q", got)
	}
	for _, id := range ids {
		if st := n.status(id); st != task.StatusRunning || len(read(t, n.s.dir(id)+"/paused")) > 0 || isDir(n.s.dir(id)+"/checkpoint") {
			t.Errorf("afterwards it is %s", st)
		}
	}
	p, err := cristate.ReadPodCheckpoint(at)
	if err != nil || len(p.Containers) != 2 || p.Pod.GetMetadata().GetUid() != "uid" || p.Runtime != "r" {
		t.Fatalf("%+v %v", p, err)
	}

	pod := n.another()
	shm := n.shm(pod.ID())
	configs := []*runtime.ContainerConfig{app("b"), app("a")}
	configs[0].Labels = map[string]string{"restored": "yes"}
	var stage attempt.Stage
	if err := n.s.RestorePod(t.Context(), &stage, pod, at, p, configs); err != nil {
		t.Fatal(err)
	}
	if got := read(t, shm+"/shared"); got != "memory" {
		t.Errorf("/dev/shm: %q", got)
	}
	all, err := n.s.Restored(pod.ID(), p.ID, configs)
	if err != nil || len(all) != 2 {
		t.Fatalf("%v %v", all, err)
	}
	if err := n.s.Pods.Add(pod); err != nil {
		t.Fatal(err)
	}
	n.tasks.hook(func() {
		n.tasks.create = func(_ context.Context, id container.ID, o task.CreateOptions) error {
			old := ids[0]
			if n.get(string(id)).Meta().Config.Metadata.Name == "b" {
				old = ids[1]
			}
			if o.Checkpoint == nil {
				return errors.New("it is not restored")
			}
			if got := read(t, o.Checkpoint.Annotations["RestoreFromPath"]+"/pages-1.img"); got != "memory of "+old {
				return errors.New("it is restored from " + got)
			}
			return nil
		}
	})
	for _, r := range all {
		old := ids[0]
		if r.Name == "b" {
			old = ids[1]
		}
		id := r.ContainerId
		root := n.rootfs(id)
		for path, want := range map[string]string{root + "/app/new": "new of " + old, root + "/app/kept": "app/kept", root + "/app/removed": "",
			n.volume(id) + "/mine": "data of " + old, n.volume(id) + "/of-image": ""} {
			if got := read(t, path); got != want {
				t.Errorf("%s of %s: %q", path, r.Name, got)
			}
		}
		if st := n.get(id).Status(); st.State() != runtime.ContainerState_CONTAINER_CREATED {
			t.Errorf("%+v", st)
		}
		if err := n.s.Start(t.Context(), id); err != nil {
			t.Error(err)
		}
		if st := n.get(id).Status(); st.State() != runtime.ContainerState_CONTAINER_RUNNING || isDir(n.s.dir(id)+"/restore") {
			t.Errorf("%+v", st)
		}
	}
	if _, err := n.s.Restored(pod.ID(), p.ID, configs); !errdefs.IsAlreadyExists(err) {
		t.Error(err)
	}
	if err := errors.Join(n.s.RemoveAll(t.Context(), pod.ID()), n.s.RemoveAll(t.Context(), n.podID)); err != nil {
		t.Error(err)
	}
	n.nothingLeft()
}

// After a failure nothing is left of a checkpoint, and containers run.
//
// contract: 7.1.23
func TestPodCheckpointFails(t *testing.T) {
	n := podNode(t)
	a, b, created := n.run(app("a")), n.run(app("b")), n.create(app("c"))
	dir := t.TempDir()
	at := n.open(dir)
	calls := 0
	dump := func(*options.CheckpointOptions) error { calls++; return nil }
	ctx := t.Context()
	for name, tt := range map[string]struct {
		pod   string
		ids   []string
		dump  func(*options.CheckpointOptions) error
		limit time.Duration
		want  func(error) bool
		say   string
	}{
		"no containers":    {n.podID, nil, dump, 0, errdefs.IsInvalidArgument, "no containers"},
		"twice":            {n.podID, []string{a, a[:20]}, dump, 0, errdefs.IsInvalidArgument, "twice"},
		"of another pod":   {cristate.NewID(), []string{a}, dump, 0, errdefs.IsInvalidArgument, "another pod"},
		"unknown":          {n.podID, []string{a, "nobody"}, dump, 0, errdefs.IsNotFound, "nobody"},
		"one does not run": {n.podID, []string{a, created}, dump, 0, errdefs.IsFailedPrecondition, "CREATED"},
		"criu fails":       {n.podID, []string{a, b}, func(*options.CheckpointOptions) error { return errors.New("criu: no") }, 0, func(error) bool { return true }, "capture container"},
		"criu fails at once": {n.podID, []string{a, b}, func(*options.CheckpointOptions) error {
			if calls++; calls%2 == 0 {
				return errors.New("criu: no")
			}
			return nil
		}, 0, func(error) bool { return true }, "criu: no"},
		"time is up": {n.podID, []string{a, b}, func(*options.CheckpointOptions) error { <-ctx.Done(); return ctx.Err() }, 50 * time.Millisecond,
			func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }, "capture container"},
		"time is up later": {n.podID, []string{a, b}, func(*options.CheckpointOptions) error { <-ctx.Done(); return nil }, 50 * time.Millisecond,
			func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }, "capture container"},
	} {
		n.tasks.checkpoint = tt.dump
		calls = 0
		cancel := func() {}
		if ctx = t.Context(); tt.limit > 0 {
			ctx, cancel = context.WithTimeout(ctx, tt.limit)
		}
		err := n.s.CheckpointPod(ctx, tt.pod, tt.ids, at, cristate.PodCheckpoint{})
		cancel()
		if err == nil || !tt.want(err) || !strings.Contains(err.Error(), tt.say) {
			t.Errorf("%s: %v", name, err)
		}
		if left := names(t, dir); len(left) > 0 {
			t.Errorf("%s leaves %q", name, left)
		}
		for _, id := range []string{a, b} {
			if st := n.status(id); st != task.StatusRunning {
				t.Errorf("%s: a container is %s", name, st)
			}
			if isDir(n.s.dir(id) + "/checkpoint") {
				t.Errorf("%s leaves its work", name)
			}
		}
	}
}

// A daemon that is killed in a checkpoint leaves no frozen containers for long.
//
// contract: 7.1.23
// promise: P5
func TestPodCheckpointKilled(t *testing.T) {
	n := podNode(t)
	ids := []string{n.run(app("a")), n.run(app("b"))}
	points, reached := crashAt(t, "cri.container.paused")
	n.change = func(d *Deps) { d.Faults = points }
	n.boot()
	at := n.open(t.TempDir())
	go n.s.CheckpointPod(context.Background(), n.podID, ids, at, cristate.PodCheckpoint{}) //nolint:errcheck // it is killed
	<-reached
	for _, id := range ids {
		if st := n.status(id); st != task.StatusPaused {
			t.Fatalf("%s", st)
		}
	}
	n.change = nil
	n.boot()
	for _, id := range ids {
		n.until("it runs, and nothing says that it was paused", func() bool {
			_, err := os.Lstat(n.s.dir(id) + "/paused")
			return n.status(id) == task.StatusRunning && errors.Is(err, fs.ErrNotExist)
		})
	}
}

// entry is one of an archive.
type entry struct {
	tar.Header
	body string
}

func file(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(body))}, body}
}

func archiveOf(t *testing.T, all ...entry) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range all {
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Archives are hostile: what is wrong with one is told with its entry, and has
// had no effect, least of all outside of the container.
//
// contract: 7.3.24
// promise: P36
func TestHostilePodCheckpoint(t *testing.T) {
	n := podNode(t)
	id := n.run(app("a"))
	n.tasks.checkpoint = func(o *options.CheckpointOptions) error { n.write(o.ImagePath+"/pages-1.img", "m"); return nil }
	dir := t.TempDir()
	if err := n.s.CheckpointPod(t.Context(), n.podID, []string{id}, n.open(dir), cristate.PodCheckpoint{}); err != nil {
		t.Fatal(err)
	}
	good := read(t, dir+"/container-0.tar")
	parts := entries(t, dir+"/container-0.tar")
	if err := n.s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	base := func(without string, more ...entry) string {
		var all []entry
		for _, name := range []string{"config.dump", "spec.dump", "checkpoint/pages-1.img", "rootfs-diff.tar"} {
			if name != without {
				all = append(all, file(name, parts[name]))
			}
		}
		return archiveOf(t, append(all, more...)...)
	}
	link := func(name, to string) entry {
		return entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}, ""}
	}
	var huge bytes.Buffer // an entry of which only the header is there
	if err := tar.NewWriter(&huge).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "checkpoint/huge", Size: 1 << 40}); err != nil {
		t.Fatal(err)
	}
	malformed, incompatible := errdefs.IsInvalidArgument, errdefs.IsFailedPrecondition
	for name, tt := range map[string]struct {
		archive string
		want    func(error) bool
		change  func(*runtime.ContainerConfig)
	}{
		"empty":                {"", malformed, nil},
		"garbage":              {strings.Repeat("x", 5000), malformed, nil},
		"truncated":            {good[:len(good)/3], malformed, nil},
		"truncated at its end": {good[:len(good)-1024-600], malformed, nil},
		"no config":            {base("config.dump"), malformed, nil},
		"no spec":              {base("spec.dump"), malformed, nil},
		"no images":            {base("checkpoint/pages-1.img"), malformed, nil},
		"no root":              {base("rootfs-diff.tar"), malformed, nil},
		"traversal":            {base("", file("checkpoint/../../../escape", "x")), malformed, nil},
		"absolute":             {base("", file("/escape", "x")), malformed, nil},
		"dots":                 {base("", file("checkpoint/..", "x")), malformed, nil},
		"below an image":       {base("", file("checkpoint/a/b", "x")), malformed, nil},
		"our own file":         {base("", file("from", "x")), malformed, nil},
		"long name":            {base("", file("checkpoint/"+strings.Repeat("n", 300), "x")), malformed, nil},
		"twice":                {base("", file("checkpoint/pages-1.img", "x")), malformed, nil},
		"link":                 {base("", link("checkpoint/l", "/etc")), malformed, nil},
		"device":               {base("", entry{tar.Header{Typeflag: tar.TypeChar, Name: "checkpoint/d", Devmajor: 1, Devminor: 3}, ""}), malformed, nil},
		"huge":                 {huge.String(), malformed, nil},
		"unknown":              {base("", file("surprise", "x")), malformed, nil},
		"huge document":        {base("config.dump", file("config.dump", strings.Repeat(" ", maxDump+1))), malformed, nil},
		"document of a list":   {base("config.dump", file("config.dump", "[]")), malformed, nil},
		"spec without process": {base("spec.dump", file("spec.dump", "{}")), malformed, nil},
		"null spec":            {base("spec.dump", file("spec.dump", "null")), malformed, nil},
		"of another container": {base("config.dump", file("config.dump", strings.Replace(parts["config.dump"], `"name":"a"`, `"name":"b"`, 1))), malformed, nil},
		"of another image":     {base("config.dump", file("config.dump", strings.Replace(parts["config.dump"], "sha256:config", "sha256:other", 1))), incompatible, nil},
		"root out of itself":   {base("rootfs-diff.tar", file("rootfs-diff.tar", archiveOf(t, file("../../../escape", "x")))), malformed, nil},
		"root through a link":  {base("rootfs-diff.tar", file("rootfs-diff.tar", archiveOf(t, link("l", n.dir), file("l/../../../escape", "x")))), malformed, nil},
		"truncated root":       {base("rootfs-diff.tar", file("rootfs-diff.tar", archiveOf(t, file("f", strings.Repeat("x", 9000)))[:3000])), func(err error) bool { return errdefs.IsDataLoss(err) || malformed(err) }, nil},
		"volume that is not":   {base("", file(volumeEntry("/other"), archiveOf(t))), incompatible, nil},
		"volume out of itself": {base("", file(volumeEntry("/data"), archiveOf(t, file("../escape", "x")))), malformed, nil},
		"another command":      {good, incompatible, func(c *runtime.ContainerConfig) { c.Command = []string{"other"} }},
		"another environment":  {good, incompatible, func(c *runtime.ContainerConfig) { c.Envs = []*runtime.KeyValue{{Key: "A", Value: []byte("b")}} }},
		"another directory":    {good, incompatible, func(c *runtime.ContainerConfig) { c.WorkingDir = "/app" }},
		"another user": {good, incompatible, func(c *runtime.ContainerConfig) {
			c.Linux.SecurityContext = &runtime.LinuxContainerSecurityContext{RunAsUsername: "app"}
		}},
		"other capabilities": {good, incompatible, func(c *runtime.ContainerConfig) {
			c.Linux.SecurityContext = &runtime.LinuxContainerSecurityContext{Capabilities: &runtime.Capability{DropCapabilities: []string{"ALL"}}}
		}},
		"a mount on the volume": {base("", file(volumeEntry("/data"), archiveOf(t))), incompatible, func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{ContainerPath: "/data", HostPath: n.dir}}
		}},
		"image that is missing": {good, errdefs.IsNotFound, func(c *runtime.ContainerConfig) { c.Image.Image = "missing" }},
		"mount that is wrong":   {good, malformed, func(c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{{}} }},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			if err := os.WriteFile(dir+"/container-0.tar", []byte(tt.archive), 0o600); err != nil {
				t.Fatal(err)
			}
			pod := n.another()
			config := app("a")
			if tt.change != nil {
				tt.change(config)
			}
			var stage attempt.Stage
			at := n.open(dir)
			p, err := cristate.ReadPodCheckpoint(at)
			if err != nil {
				t.Fatal(err)
			}
			err = n.s.RestorePod(t.Context(), &stage, pod, at, p, []*runtime.ContainerConfig{config})
			if err == nil || !tt.want(err) {
				t.Errorf("%v", err)
			}
			t.Log(err)
			n.t = t
			n.nothingLeft()
			for _, at := range []string{"escape", "root/escape", "root/containers/escape", "state/escape", "state/tmpmounts/escape"} {
				if read(t, filepath.Join(n.dir, at)) != "" {
					t.Error("it escaped")
				}
			}
		})
	}
	n.t = t
	// What is fine is still taken.
	if err := os.WriteFile(dir+"/container-0.tar", []byte(base("")), 0o600); err != nil {
		t.Fatal(err)
	}
	at := n.open(dir)
	p, err := cristate.ReadPodCheckpoint(at)
	if err != nil {
		t.Fatal(err)
	}
	pod := n.another()
	var stage attempt.Stage
	if err := n.s.RestorePod(t.Context(), &stage, pod, at, p, []*runtime.ContainerConfig{app("a")}); err != nil {
		t.Fatal(err)
	}
	if err := n.s.RemoveAll(t.Context(), pod.ID()); err != nil {
		t.Fatal(err)
	}
	n.nothingLeft()
}

// contract: 7.3.24
// promise: P36
func TestHostilePodJSON(t *testing.T) {
	dir := t.TempDir()
	at, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	whole, err := json.Marshal(cristate.PodCheckpoint{Version: 1, Containers: map[string]string{"a": "a.tar"}})
	if err != nil {
		t.Fatal(err)
	}
	path := dir + "/pod.json"
	for name, make := range map[string]func() error{
		"none":          func() error { return nil },
		"directory":     func() error { return os.Mkdir(path, 0o700) },
		"link":          func() error { return os.Symlink("/etc/passwd", path) },
		"empty":         func() error { return os.WriteFile(path, nil, 0o600) },
		"list":          func() error { return os.WriteFile(path, []byte("[1]"), 0o600) },
		"huge":          func() error { return os.WriteFile(path, append(bytes.Repeat([]byte(" "), 4<<20), whole...), 0o600) },
		"version":       func() error { return os.WriteFile(path, bytes.Replace(whole, []byte("1"), []byte("2"), 1), 0o600) },
		"no containers": func() error { return os.WriteFile(path, []byte(`{"Version":1}`), 0o600) },
		"archive elsewhere": func() error {
			return os.WriteFile(path, bytes.Replace(whole, []byte("a.tar"), []byte("../a.tar"), 1), 0o600)
		},
	} {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if _, err := cristate.ReadPodCheckpoint(at); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := cristate.ReadPodCheckpoint(at); err != nil || p.ID == "" {
		t.Errorf("%+v %v", p, err)
	}
}
