package interop

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	apievents "github.com/containerd/containerd/api/events"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/transfer"
	tarchive "github.com/containerd/containerd/v2/core/transfer/archive"
	timage "github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func pull(t *testing.T, c *containerd.Client, ref string) containerd.Image {
	t.Helper()
	resolver := docker.NewResolver(docker.ResolverOptions{PlainHTTP: true})
	img, err := c.Pull(testContext(t), ref, containerd.WithPullUnpack, containerd.WithResolver(resolver))
	if err != nil {
		t.Fatalf("pull %s: %v", ref, err)
	}
	return img
}

// buffer is a bytes.Buffer for several goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) { b.mu.Lock(); defer b.mu.Unlock(); return b.b.Write(p) }
func (b *buffer) String() string              { b.mu.Lock(); defer b.mu.Unlock(); return b.b.String() }

// container makes one with a snapshot; both are removed with the test.
func container(t *testing.T, c *containerd.Client, id string, img containerd.Image, opts ...oci.SpecOpts) containerd.Container {
	t.Helper()
	opts = append([]oci.SpecOpts{oci.WithImageConfig(img)}, opts...)
	ctr, err := c.NewContainer(testContext(t), id, containerd.WithImage(img), containerd.WithNewSnapshot(id, img), containerd.WithNewSpec(opts...))
	if err != nil {
		t.Fatalf("new container: %v", err)
	}
	t.Cleanup(func() {
		if err := ctr.Delete(testContext(t), containerd.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("delete container %s: %v", id, err)
		}
	})
	return ctr
}

func start(t *testing.T, ctr containerd.Container, creator cio.Creator) (containerd.Task, <-chan containerd.ExitStatus) {
	t.Helper()
	ctx := testContext(t)
	task, err := ctr.NewTask(ctx, creator)
	if err != nil {
		t.Fatalf("new task: %v", err)
	}
	t.Cleanup(func() {
		if _, err := task.Delete(testContext(t), containerd.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("delete task: %v", err)
		}
	})
	wait, err := task.Wait(ctx)
	if err != nil {
		t.Fatalf("wait: %v", err)
	}
	if err := task.Start(ctx); err != nil {
		t.Fatalf("start: %v", err)
	}
	return task, wait
}

func exit(t *testing.T, wait <-chan containerd.ExitStatus) uint32 {
	t.Helper()
	select {
	case s := <-wait:
		code, _, err := s.Result()
		if err != nil {
			t.Fatalf("exit: %v", err)
		}
		return code
	case <-time.After(30 * time.Second):
		t.Fatal("no exit within 30 s")
	}
	return 0
}

// contract: 1.1.1, 1.1.7, 1.1.8, 1.1.9, 8.3.6, 13.13
func TestClientBasics(t *testing.T) {
	d := newGantry(t)
	d.start()
	c := d.connect()
	ctx := testContext(t)
	v, err := c.Version(ctx)
	if err != nil || v.Version == "" {
		t.Errorf("version: %+v, %v", v, err)
	}
	s, err := c.Server(ctx)
	if err != nil || s.UUID == "" {
		t.Errorf("server: %+v, %v", s, err)
	}
	if err := c.NamespaceService().Create(ctx, "extra", map[string]string{"containerd.io/defaults/snapshotter": "native"}); err != nil {
		t.Errorf("namespace: %v", err)
	}
	names, err := c.NamespaceService().List(ctx)
	if err != nil || !slices.Contains(names, "extra") {
		t.Errorf("namespaces: %v, %v", names, err)
	}
	if err := c.NamespaceService().Delete(ctx, "extra"); err != nil {
		t.Errorf("delete namespace: %v", err)
	}
	if _, err := c.GetImage(ctx, "absent"); !errdefs.IsNotFound(err) {
		t.Errorf("absent image: %v", err)
	}
}

// contract: 4.1.6, 4.2.1, 4.2.3, 6.4.1, 1.3.16, 1.2.8
func TestClientPull(t *testing.T) {
	_, made, ref := served(t)
	d := newGantry(t)
	d.start()
	c := d.connect()
	ctx := testContext(t)
	img := pull(t, c, ref)
	if img.Target().Digest != made.Target.Digest {
		t.Errorf("target is %v", img.Target())
	}
	if ok, err := img.IsUnpacked(ctx, "overlayfs"); err != nil || !ok {
		t.Errorf("unpacked: %v, %v", ok, err)
	}
	if size, err := img.Size(ctx); err != nil || size < 1<<20 {
		t.Errorf("size: %d, %v", size, err)
	}
	for _, f := range []string{"name==" + ref, `name~="busybox"`, "target.digest==" + made.Target.Digest.String(), "target.mediatype~=manifest"} {
		if found, err := c.ListImages(ctx, f); err != nil || len(found) != 1 {
			t.Errorf("images %q: %v, %v", f, found, err)
		}
	}
	if found, err := c.ListImages(ctx, "name==other"); err != nil || len(found) != 0 {
		t.Errorf("images of another name: %v, %v", found, err)
	}
	if diffs, err := img.RootFS(ctx); err != nil || !slices.Equal(diffs, made.DiffIDs) {
		t.Errorf("root file system: %v, %v", diffs, err)
	}
	if spec, err := img.Spec(ctx); err != nil || spec.Config.WorkingDir != "/data" {
		t.Errorf("config: %+v, %v", spec, err)
	}
	if usage, err := img.Usage(ctx, containerd.WithSnapshotUsage()); err != nil || usage < 1<<20 {
		t.Errorf("usage: %d, %v", usage, err)
	}
	committed := 0
	if err := c.SnapshotService("overlayfs").Walk(ctx, func(ctx context.Context, i snapshots.Info) error {
		committed++
		return nil
	}, "kind==committed"); err != nil || committed != len(made.DiffIDs) {
		t.Errorf("committed snapshots: %d, %v", committed, err)
	}
}

// contract: 1.3.41, 6.3.1, 6.3.2, 6.3.7, 1.3.32, 6.3.6
func TestClientTransfer(t *testing.T) {
	reg, made, ref := served(t)
	d := newGantry(t)
	d.start()
	c := d.connect()
	ctx := testContext(t)
	src, err := registry.NewOCIRegistry(ctx, ref, registry.WithDefaultScheme("http"))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var seen []transfer.Progress
	progress := transfer.WithProgress(func(p transfer.Progress) { mu.Lock(); seen = append(seen, p); mu.Unlock() })
	dst := timage.NewStore(ref, timage.WithUnpack(platforms.DefaultSpec(), "overlayfs"))
	if err := c.Transfer(ctx, src, dst, progress); err != nil {
		t.Fatalf("transfer: %v", err)
	}
	img, err := c.GetImage(ctx, ref)
	if err != nil || img.Target().Digest != made.Target.Digest {
		t.Fatalf("image: %v, %v", img, err)
	}
	if ok, err := img.IsUnpacked(ctx, "overlayfs"); err != nil || !ok {
		t.Errorf("unpacked: %v, %v", ok, err)
	}
	mu.Lock()
	events := map[string]bool{}
	for _, p := range seen {
		events[strings.SplitN(p.Event, " from ", 2)[0]] = true
	}
	mu.Unlock()
	for _, want := range []string{"Resolving", "Pulling", "complete", "saved", "Completed pull"} {
		if !events[want] {
			t.Errorf("no progress event %q in %v", want, events)
		}
	}
	// Export, import under another name, tag, push.
	var tar bytes.Buffer
	if err := c.Transfer(ctx, timage.NewStore(ref), tarchive.NewImageExportStream(nopCloser{&tar}, "")); err != nil {
		t.Fatalf("export: %v", err)
	}
	if err := c.ImageService().Delete(ctx, ref); err != nil {
		t.Fatal(err)
	}
	if err := c.Transfer(ctx, tarchive.NewImageImportStream(&tar, ""), timage.NewStore("", timage.WithNamedPrefix("", true))); err != nil {
		t.Fatalf("import: %v", err)
	}
	if err := c.Transfer(ctx, timage.NewStore(ref), timage.NewStore("example.org/copy:1")); err != nil {
		t.Fatalf("tag: %v", err)
	}
	pushed := reg.Host() + "/library/pushed:1"
	to, err := registry.NewOCIRegistry(ctx, pushed, registry.WithDefaultScheme("http"))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Transfer(ctx, timage.NewStore("example.org/copy:1"), to); err != nil {
		t.Fatalf("push: %v", err)
	}
	if again := pull(t, c, pushed); again.Target().Digest != made.Target.Digest {
		t.Errorf("what was pushed is %v", again.Target())
	}
	if err := c.Transfer(ctx, to, src); !errdefs.IsNotImplemented(err) {
		t.Errorf("registry to registry: %v", err)
	}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// contract: 1.3.33, 1.3.34, 5.3.5, 5.5.1, 1.6.7, 1.6.8, 13.17
func TestClientRun(t *testing.T) {
	_, _, ref := served(t)
	d := newGantry(t)
	d.start()
	c := d.connect()
	ctx := testContext(t)
	img := pull(t, c, ref)
	sub, cancel := context.WithCancel(ctx)
	defer cancel()
	events, errs := c.Subscribe(sub, `namespace==default,topic~=|^/tasks/|`)
	var out, errOut buffer
	ctr := container(t, c, "run", img)
	task, wait := start(t, ctr, cio.NewCreator(cio.WithStreams(nil, &out, &errOut), cio.WithFIFODir(d.Dir)))
	if code := exit(t, wait); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if st, err := task.Delete(ctx); err != nil || st.ExitCode() != 0 {
		t.Errorf("delete: %v, %v", st, err)
	}
	if got, want := out.String(), "hello from yes\ngreetings from the second layer\n"; got != want {
		t.Errorf("output %q (stderr %q), want %q", got, errOut.String(), want)
	}
	for _, want := range []string{"/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"} {
		select {
		case e := <-events:
			if e.Topic != want || e.Namespace != "default" {
				t.Errorf("event %s in %s, want %s", e.Topic, e.Namespace, want)
			}
			v, err := typeurl.UnmarshalAny(e.Event)
			if err != nil {
				t.Error(err)
			}
			if x, ok := v.(*apievents.TaskExit); ok && (x.ID != "run" || x.ContainerID != "run") {
				t.Errorf("exit event %v", x)
			}
		case err := <-errs:
			t.Fatalf("events: %v", err)
		case <-time.After(10 * time.Second):
			t.Fatalf("no event %s", want)
		}
	}
}

// contract: 5.3.5, 1.3.36
func TestClientTerminal(t *testing.T) {
	_, _, ref := served(t)
	d := newGantry(t)
	d.start()
	c := d.connect()
	ctx := testContext(t)
	img := pull(t, c, ref)
	in, typed := io.Pipe()
	var out buffer
	ctr := container(t, c, "term", img, oci.WithTTY, oci.WithProcessArgs("/bin/sh"))
	task, wait := start(t, ctr, cio.NewCreator(cio.WithStreams(in, &out, nil), cio.WithTerminal, cio.WithFIFODir(d.Dir)))
	if err := task.Resize(ctx, 97, 31); err != nil {
		t.Errorf("resize: %v", err)
	}
	io.WriteString(typed, "stty size; test -t 0 && echo is-a-tty; exit 7\n")
	if code := exit(t, wait); code != 7 {
		t.Errorf("exit code %d", code)
	}
	eventually(t, "the terminal's size is shown, and that it is one", func() bool {
		return strings.Contains(out.String(), "31 97\r\nis-a-tty\r\n")
	})
	typed.Close()
}

// contract: 1.3.36, 1.3.37, 1.3.39, 1.3.40, 1.3.35, 13.18, 13.23, 13.39, 5.3.6, 5.3.7
func TestClientTask(t *testing.T) {
	_, _, ref := served(t)
	d := newGantry(t)
	d.start()
	c := d.connect()
	ctx := testContext(t)
	img := pull(t, c, ref)
	ctr := container(t, c, "task", img, oci.WithProcessArgs("/bin/sleep", "600"), oci.WithMemoryLimit(64<<20))
	task, wait := start(t, ctr, cio.NullIO)
	status := func(want containerd.ProcessStatus) {
		t.Helper()
		if s, err := task.Status(ctx); err != nil || s.Status != want {
			t.Errorf("status %v, %v; want %s", s, err, want)
		}
	}
	status(containerd.Running)
	if err := task.Pause(ctx); err != nil {
		t.Errorf("pause: %v", err)
	}
	status(containerd.Paused)
	if err := task.Resume(ctx); err != nil {
		t.Errorf("resume: %v", err)
	}
	status(containerd.Running)

	m, err := task.Metrics(ctx)
	if err != nil {
		t.Fatalf("metrics: %v", err)
	}
	stats, err := typeurl.UnmarshalAny(m.Data)
	if err != nil {
		t.Fatalf("metrics: %v", err)
	}
	switch s := stats.(type) {
	case *v1.Metrics:
		if s.Memory.Usage.Limit != 64<<20 || s.Pids.Current < 1 {
			t.Errorf("metrics: memory %v, pids %v", s.Memory.Usage, s.Pids)
		}
	case *v2.Metrics:
		if s.Memory.UsageLimit != 64<<20 || s.Pids.Current < 1 {
			t.Errorf("metrics: memory %v, pids %v", s.Memory, s.Pids)
		}
	default:
		t.Errorf("metrics are %T", stats)
	}
	limit := int64(96 << 20)
	if err := task.Update(ctx, containerd.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}})); err != nil {
		t.Errorf("update: %v", err)
	}

	spec, err := ctr.Spec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	proc := *spec.Process
	proc.Args = []string{"/bin/sh", "-c", "read line; echo got $line; echo err >&2; exit 5"}
	var out, errOut buffer
	execed, err := task.Exec(ctx, "e1", &proc, cio.NewCreator(cio.WithStreams(strings.NewReader("input\n"), &out, &errOut), cio.WithFIFODir(d.Dir)))
	if err != nil {
		t.Fatalf("exec: %v", err)
	}
	execWait, err := execed.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := execed.Start(ctx); err != nil {
		t.Fatalf("exec start: %v", err)
	}
	if code := exit(t, execWait); code != 5 {
		t.Errorf("exec's exit code %d", code)
	}
	if _, err := execed.Delete(ctx); err != nil {
		t.Errorf("exec delete: %v", err)
	}
	if out.String() != "got input\n" || errOut.String() != "err\n" {
		t.Errorf("exec's output %q, %q", out.String(), errOut.String())
	}
	if _, err := task.Exec(ctx, "", &proc, cio.NullIO); !errdefs.IsInvalidArgument(err) {
		t.Errorf("exec without id: %v", err)
	}
	pids, err := task.Pids(ctx)
	if err != nil || len(pids) != 1 || pids[0].Pid != task.Pid() {
		t.Errorf("pids: %v, %v", pids, err)
	}
	if _, err := task.Delete(ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running task: %v", err)
	}
	if err := task.Kill(ctx, syscall.SIGKILL); err != nil {
		t.Errorf("kill: %v", err)
	}
	if code := exit(t, wait); code != 137 {
		t.Errorf("exit code %d", code)
	}
	status(containerd.Stopped)
	if err := task.Kill(ctx, syscall.SIGTERM); !errdefs.IsNotFound(err) {
		t.Errorf("kill of an exited task: %v", err)
	}
}

// contract: 1.2.4, 1.3.23, 1.3.24, 1.3.25, 13.14, 13.15
func TestClientLeases(t *testing.T) {
	_, _, ref := served(t)
	d := newGantry(t)
	d.start()
	c := d.connect()
	ctx := testContext(t)
	lm := c.LeasesService()
	l, err := lm.Create(ctx, leases.WithID("mine"), leases.WithExpiration(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	leased := leases.WithLease(ctx, l.ID)
	resolver := docker.NewResolver(docker.ResolverOptions{PlainHTTP: true})
	img, err := c.Fetch(leased, ref, containerd.WithResolver(resolver))
	if err != nil {
		t.Fatalf("fetch: %v", err)
	}
	res, err := lm.ListResources(ctx, l)
	if err != nil || len(res) < 3 {
		t.Errorf("resources: %v, %v", res, err)
	}
	if err := c.ImageService().Delete(ctx, ref); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ContentStore().Info(ctx, img.Target.Digest); err != nil {
		t.Errorf("leased content is gone: %v", err)
	}
	if err := lm.Delete(ctx, l, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ContentStore().Info(ctx, img.Target.Digest); !errdefs.IsNotFound(err) {
		t.Errorf("content after a synchronous delete of its lease: %v", err)
	}
}

// contract: 6.5.1, 6.5.2
func TestClientArchives(t *testing.T) {
	_, made, ref := served(t)
	d := newGantry(t)
	d.start()
	c := d.connect()
	ctx := testContext(t)
	pull(t, c, ref)
	var tar bytes.Buffer
	if err := c.Export(ctx, &tar, archive.WithImage(c.ImageService(), ref)); err != nil {
		t.Fatalf("export: %v", err)
	}
	imported, err := c.Import(ctx, &tar, containerd.WithImageRefTranslator(archive.AddRefPrefix("imported.example/x")))
	if err != nil {
		t.Fatalf("import: %v", err)
	}
	if len(imported) == 0 {
		t.Fatal("nothing was imported")
	}
	manifest, err := json.Marshal(imported)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(manifest, []byte(made.Target.Digest)) {
		t.Errorf("imported %s, want %s in it", manifest, made.Target.Digest)
	}
}

// What BuildKit asks of the daemon: an identity that stays, the platforms of
// the runtime, flat leases, and a synchronous delete of a lease to collect.
//
// contract: 13.33, 1.5.9, 14.4, 1.3.21
func TestBuildKitWays(t *testing.T) {
	d := newGantry(t)
	d.start()
	c := d.connect()
	ctx := testContext(t)
	first, err := c.Server(ctx)
	if err != nil {
		t.Fatal(err)
	}
	plugins, err := c.IntrospectionService().Plugins(ctx, "type==io.containerd.runtime.v2")
	if err != nil || len(plugins.Plugins) != 1 || len(plugins.Plugins[0].Platforms) == 0 {
		t.Errorf("runtime: %v, %v", plugins, err)
	}
	// A flat lease keeps a blob, but not what the blob's labels refer to.
	lm := c.LeasesService()
	flat, err := lm.Create(ctx, leases.WithRandomID(), leases.WithLabel("containerd.io/gc.flat", "true"))
	if err != nil {
		t.Fatal(err)
	}
	write := func(ctx context.Context, body string, labels map[string]string) digest.Digest {
		t.Helper()
		dgst := digest.FromString(body)
		if err := content.WriteBlob(ctx, c.ContentStore(), body, strings.NewReader(body), ocispec.Descriptor{Digest: dgst, Size: int64(len(body))}, content.WithLabels(labels)); err != nil {
			t.Fatal(err)
		}
		return dgst
	}
	other, err := lm.Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	child := write(leases.WithLease(ctx, other.ID), "child", nil)
	parent := write(leases.WithLease(ctx, flat.ID), "parent", map[string]string{"containerd.io/gc.ref.content.0": child.String()})
	if err := lm.Delete(ctx, other, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ContentStore().Info(ctx, parent); err != nil {
		t.Errorf("the blob of a flat lease: %v", err)
	}
	if _, err := c.ContentStore().Info(ctx, child); !errdefs.IsNotFound(err) {
		t.Errorf("what only its label refers to: %v", err)
	}
	if err := lm.Delete(ctx, flat, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
	d.stop()
	d.start()
	if again, err := c.Server(ctx); err != nil || again.UUID != first.UUID {
		t.Errorf("after a restart the uuid is %v, %v; it was %v", again, err, first)
	}
}
