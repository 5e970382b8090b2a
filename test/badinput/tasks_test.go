package badinput

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/wire/taskrpc"
	"github.com/gantryd/gantry/test/testimage"
)

const (
	runc        = "io.containerd.runc.v2"
	typeSpec    = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
	typeProcess = "types.containerd.io/opencontainers/runtime-spec/1/Process"
)

// chainID is the name that unpacking gives the top layer (contract 6.4).
func chainID(diffs []digest.Digest) string {
	chain := diffs[0]
	for _, d := range diffs[1:] {
		chain = digest.FromString(chain.String() + " " + d.String())
	}
	return chain.String()
}

// pullBusybox makes the image that runs.
func (d *daemon) pullBusybox() {
	d.t.Helper()
	img := testimage.Busybox(d.t)
	reg := testimage.Serve(d.t)
	ref := reg.Put("library/busybox", "latest", img)
	err := d.transfers().Transfer(d.timeout(), transfer.Registry{Reference: ref},
		transfer.ImageStore{Name: "busybox", Unpacks: []transfer.Unpack{{Snapshotter: "overlayfs"}}}, transfer.Options{})
	if err != nil {
		d.t.Fatal(err)
	}
	d.top = chainID(img.DiffIDs)
}

// spec is a small container that sleeps, changed by f.
func (d *daemon) spec(id string, f func(*specs.Spec)) *specs.Spec {
	s := &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: []string{"/bin/sleep", "1000"}, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/dev", Type: "tmpfs", Source: "tmpfs"}},
		Linux: &specs.Linux{CgroupsPath: d.cgroups() + "/" + id,
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace}}},
	}
	if f != nil {
		f(s)
	}
	return s
}

func pack(t testing.TB, url string, v any) typed.Any {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return typed.Any{URL: url, Value: b}
}

// record makes a container of that name and its snapshot, with a spec changed by f.
func (d *daemon) record(id string, f func(*specs.Spec)) {
	d.t.Helper()
	ctx := d.timeout()
	if _, err := d.snapshots("overlayfs").Prepare(ctx, id, d.top, nil); err != nil {
		d.t.Fatal(err)
	}
	_, err := d.containers().Create(ctx, container.Container{ID: container.ID(id), Runtime: container.Runtime{Name: runc},
		Spec: pack(d.t, typeSpec, d.spec(id, f)), Snapshotter: "overlayfs", SnapshotKey: id})
	if err != nil {
		d.t.Fatal(err)
	}
}

// run starts a container that sleeps, and returns its pid.
func (d *daemon) run(id string) uint32 {
	d.t.Helper()
	ctx := d.timeout()
	d.record(id, nil)
	if _, err := d.tasks().Create(ctx, container.ID(id), task.CreateOptions{}); err != nil {
		d.t.Fatal(err)
	}
	pid, err := d.tasks().Start(ctx, container.ID(id), "")
	if err != nil {
		d.t.Fatal(err)
	}
	return pid
}

// kill ends a task and deletes it.
func (d *daemon) kill(id namespace.ID, c container.ID) {
	d.t.Helper()
	ctx := d.timeout()
	ts := taskrpc.NewClient(d.conn, id, "")
	p, err := ts.Get(ctx, c, "")
	if err != nil {
		d.t.Fatalf("kill %s: %v", c, err)
	}
	if p.Status != task.StatusStopped {
		if err := ts.Kill(ctx, c, "", uint32(syscall.SIGKILL), true); err != nil && !errdefs.IsNotFound(err) {
			d.t.Errorf("kill %s: %v", c, err)
		}
		if p.Status == task.StatusPaused {
			ts.Resume(ctx, c)
		}
		if _, err := ts.Wait(ctx, c, ""); err != nil {
			d.t.Errorf("kill %s: %v", c, err)
		}
	}
	if _, err := ts.Delete(ctx, c); err != nil {
		d.t.Errorf("delete task %s: %v", c, err)
	}
}

// remove deletes the records of a container that run has made.
func (d *daemon) remove(id string) {
	d.t.Helper()
	ctx := d.timeout()
	if err := d.containers().Delete(ctx, container.ID(id)); err != nil && !errdefs.IsNotFound(err) {
		d.t.Errorf("remove %s: %v", id, err)
	}
	if err := d.snapshots("overlayfs").Remove(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		d.t.Errorf("remove %s: %v", id, err)
	}
}

// attempt is a container that cannot be, or a process of it.
type attempt struct {
	name string
	// spec changes the specification; raw replaces it.
	spec func(*specs.Spec)
	raw  *typed.Any
	// record changes the container's record, opts how its task is made.
	record func(*container.Container)
	opts   func(d *daemon, o *task.CreateOptions)
	words  []string
	class  []error
	// may says that the container may as well work.
	may bool
}

// try makes a container, its task, and starts it; the first error is returned
// after all that was made has been removed.
func (d *daemon) try(t *testing.T, a attempt) error {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	defer d.remove("bad")
	c := container.Container{ID: "bad", Runtime: container.Runtime{Name: runc}, Spec: pack(t, typeSpec, d.spec("bad", a.spec)), Snapshotter: "overlayfs", SnapshotKey: "bad"}
	if a.raw != nil {
		c.Spec = *a.raw
	}
	if a.record != nil {
		a.record(&c)
	}
	if _, err := d.containers().Create(ctx, c); err != nil {
		return err
	}
	// The record keeps the snapshot alive, so it has to be there first.
	mounts, err := d.snapshots("overlayfs").Prepare(ctx, "bad", d.top, nil)
	if err != nil {
		t.Fatal(err)
	}
	o := task.CreateOptions{Rootfs: mounts}
	if a.opts != nil {
		a.opts(d, &o)
	}
	if _, err = d.tasks().Create(ctx, c.ID, o); err != nil {
		return err
	}
	_, err = d.tasks().Start(ctx, c.ID, "")
	d.kill(ns, c.ID)
	return err
}

// What cannot be run says why, and nothing of it stays.
//
// contract: 1.3.33, 5.1.2
// promise: P36
func TestBadContainers(t *testing.T) {
	d := start(t)
	d.pullBusybox()
	before := d.inventory()
	invalid, notFound := []error{errdefs.ErrInvalidArgument}, []error{errdefs.ErrNotFound}
	missing := []error{errdefs.ErrNotFound, errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition}
	binary := func(path string) func(*container.Container) {
		return func(c *container.Container) {
			b, err := proto.Marshal(&runcoptions.Options{BinaryName: path})
			if err != nil {
				t.Fatal(err)
			}
			c.Runtime.Options = typed.Any{URL: "containerd.runc.v1.Options", Value: b}
		}
	}
	runtime := func(name string) func(*container.Container) {
		return func(c *container.Container) { c.Runtime.Name = name }
	}
	stdout := func(uri string) func(*daemon, *task.CreateOptions) {
		return func(d *daemon, o *task.CreateOptions) { o.IO.Stdout = strings.ReplaceAll(uri, "DIR", d.Dir) }
	}
	for _, a := range []attempt{
		{name: "unknown runtime", record: runtime("io.containerd.nosuch.v9"), words: []string{"io.containerd.nosuch.v9", "containerd-shim-nosuch-v9"}, class: notFound},
		{name: "runtime of no form", record: runtime("nosuch"), words: []string{"nosuch"}, class: missing},
		{name: "runtime with dots", record: runtime("../../bin/sh"), words: []string{"../../bin/sh"}, class: missing},
		{name: "runtime by a path to nothing", record: runtime("/nonexistent/shim"), words: []string{"/nonexistent/shim"}, class: missing},
		{name: "runtime path to nothing", opts: func(_ *daemon, o *task.CreateOptions) { o.RuntimePath = "/nonexistent/shim" }, words: []string{"/nonexistent/shim"}, class: missing},
		{name: "runtime path to a directory", opts: func(_ *daemon, o *task.CreateOptions) { o.RuntimePath = "/etc" }, words: []string{"/etc"}, class: append(missing, errdefs.ErrPermissionDenied)},
		{name: "runtime path to something else", opts: func(_ *daemon, o *task.CreateOptions) { o.RuntimePath = "/bin/true" }, words: []string{"/bin/true"}, class: missing},
		{name: "unknown OCI runtime", record: binary("/nonexistent/runc"), words: []string{"/nonexistent/runc"}, class: missing},
		{name: "OCI runtime that only fails", record: binary("/bin/false"), words: []string{"/bin/false"}, class: append(missing, errdefs.ErrUnknown, errdefs.ErrUnavailable, errdefs.ErrInternal)},
		{name: "runtime options that are garbage", record: func(c *container.Container) {
			c.Runtime.Options = typed.Any{URL: "containerd.runc.v1.Options", Value: []byte("{garbage")}
		}, words: []string{"options"}, class: invalid},
		{name: "no spec", raw: &typed.Any{}, words: []string{"spec"}, class: invalid},
		{name: "empty spec", raw: &typed.Any{URL: typeSpec, Value: []byte("{}")}, class: invalid},
		{name: "null as spec", raw: &typed.Any{URL: typeSpec, Value: []byte("null")}, class: invalid},
		{name: "garbage as spec", raw: &typed.Any{URL: typeSpec, Value: []byte("{garbage")}, words: []string{"spec"}, class: invalid},
		{name: "spec of wrong types", raw: &typed.Any{URL: typeSpec, Value: []byte(`{"ociVersion":"1.0.2","process":{"args":"sh"}}`)}, words: []string{"args"}, class: invalid},
		{name: "spec of an unknown type", raw: &typed.Any{URL: "org.example.Spec", Value: []byte("{}")}, class: invalid},
		{name: "spec without process", spec: func(s *specs.Spec) { s.Process = nil }, words: []string{"process"}, class: invalid},
		{name: "no arguments", spec: func(s *specs.Spec) { s.Process.Args = nil }, words: []string{"args"}, class: invalid},
		{name: "empty argument", spec: func(s *specs.Spec) { s.Process.Args = []string{""} }, class: missing},
		{name: "no root", spec: func(s *specs.Spec) { s.Root = nil }, words: []string{"root"}, class: invalid},
		{name: "command not found", spec: func(s *specs.Spec) { s.Process.Args = []string{"no-such-command"} }, words: []string{"no-such-command", "not found"}, class: missing},
		{name: "command path not found", spec: func(s *specs.Spec) { s.Process.Args = []string{"/no/such/command"} }, words: []string{"/no/such/command", "no such file"}, class: missing},
		{name: "command is a directory", spec: func(s *specs.Spec) { s.Process.Args = []string{"/etc"} }, words: []string{"/etc"}, class: append(missing, errdefs.ErrPermissionDenied)},
		{name: "command is a text", spec: func(s *specs.Spec) { s.Process.Args = []string{"/etc/passwd"} }, words: []string{"/etc/passwd"}, class: append(missing, errdefs.ErrPermissionDenied)},
		{name: "command with a zero byte", spec: func(s *specs.Spec) { s.Process.Args = []string{"/bin/echo", "a\x00b"} }, class: invalid},
		{name: "working directory is a file", spec: func(s *specs.Spec) { s.Process.Cwd = "/etc/passwd" }, words: []string{"/etc/passwd"}, class: missing},
		{name: "working directory is relative", spec: func(s *specs.Spec) { s.Process.Cwd = "etc" }, words: []string{"etc"}, class: invalid},
		{name: "user out of range", spec: func(s *specs.Spec) { s.Process.User.UID = 1<<32 - 1 }, words: []string{"4294967295"}, class: invalid},
		{name: "user beyond 32 bits", raw: &typed.Any{URL: typeSpec, Value: []byte(`{"ociVersion":"1.0.2","root":{"path":"rootfs"},"process":{"args":["/bin/true"],"cwd":"/","user":{"uid":4294967296}}}`)}, words: []string{"uid"}, class: invalid},
		{name: "group out of range", spec: func(s *specs.Spec) { s.Process.User.AdditionalGids = []uint32{1<<32 - 1} }, words: []string{"4294967295"}, class: invalid},
		{name: "unknown capability", spec: func(s *specs.Spec) { s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_FLY"}} }, may: true, class: missing},
		{name: "unknown limit", spec: func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_FUN", Hard: 1, Soft: 1}} }, words: []string{"RLIMIT_FUN"}, class: invalid},
		{name: "unknown namespace", spec: func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: "astral"})
		}, words: []string{"astral"}, class: invalid},
		{name: "namespace of nobody", spec: func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/nonexistent/netns" }, words: []string{"/nonexistent/netns"}, class: missing},
		{name: "namespace twice", spec: func(s *specs.Spec) { s.Linux.Namespaces = append(s.Linux.Namespaces, s.Linux.Namespaces[0]) }, words: []string{"pid"}, class: invalid},
		{name: "mount of nothing", spec: func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "bind", Source: "/nonexistent/source", Options: []string{"bind"}})
		}, words: []string{"/nonexistent/source"}, class: missing},
		{name: "mount of an unknown type", spec: func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Type: "nosuchfs", Source: "x"})
		}, words: []string{"/x", "no such device"}, class: missing},
		{name: "mount with dots", spec: func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/../../../../../../../canary", Type: "tmpfs", Source: "tmpfs"})
		}, may: true, class: missing},
		{name: "mount of no file system", opts: func(_ *daemon, o *task.CreateOptions) { o.Rootfs = []mount.Mount{{Type: "nosuchfs", Source: "x"}} }, words: []string{"nosuchfs"}, class: missing},
		{name: "root file system of nothing", opts: func(d *daemon, o *task.CreateOptions) {
			o.Rootfs = []mount.Mount{{Type: "bind", Source: d.Dir + "/none", Options: []string{"rbind"}}}
		}, words: []string{"/none"}, class: missing},
		{name: "hook of nobody", spec: func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/nonexistent/hook"}}} }, words: []string{"/nonexistent/hook"}, class: missing},
		{name: "hook that fails", spec: func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/false"}}} }, words: []string{"hook"}, class: append(missing, errdefs.ErrUnknown, errdefs.ErrAborted, errdefs.ErrInternal)},
		{name: "cgroup with dots", spec: func(s *specs.Spec) { s.Linux.CgroupsPath = "/../../../../bad" }, may: true, class: missing},
		{name: "impossible memory", spec: func(s *specs.Spec) {
			n := int64(1)
			s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &n}}
		}, class: append(missing, errdefs.ErrResourceExhausted, errdefs.ErrUnknown, errdefs.ErrUnavailable)},
		{name: "impossible processors", spec: func(s *specs.Spec) {
			s.Linux.Resources = &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "4000-5000"}}
		}, words: []string{"4000-5000"}, class: missing},
		{name: "unknown sysctl", spec: func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.nosuch": "1"} }, words: []string{"kernel.nosuch"}, class: missing},
		{name: "huge environment", spec: func(s *specs.Spec) { s.Process.Env = append(s.Process.Env, "X="+strings.Repeat("x", 200<<10)) }, words: []string{"argument list too long"}, class: append(missing, errdefs.ErrResourceExhausted)},
		{name: "output to a FIFO that is not there", opts: stdout("DIR/none/fifo"), words: []string{"/none/fifo"}, class: missing},
		{name: "output to a directory", opts: stdout("DIR/canary"), words: []string{"/canary"}, class: missing},
		{name: "input from nowhere", opts: func(d *daemon, o *task.CreateOptions) { o.IO.Stdin = d.Dir + "/none/in" }, words: []string{"/none/in"}, class: missing},
		{name: "output to an unknown scheme", opts: stdout("gopher://x/y"), words: []string{"gopher"}, class: append(missing, errdefs.ErrNotImplemented)},
		{name: "output to a relative file", opts: stdout("file://relative"), words: []string{"relative"}, class: invalid},
		{name: "output to a file that cannot be", opts: stdout("file:///proc/nothing/log"), words: []string{"/proc/nothing"}, class: append(missing, errdefs.ErrPermissionDenied)},
		{name: "output to a program that is not there", opts: stdout("binary:///nonexistent/logger"), words: []string{"/nonexistent/logger"}, class: missing},
		{name: "output to a program that ends", opts: stdout("binary:///bin/false"), may: true, class: append(missing, errdefs.ErrUnavailable, errdefs.ErrUnknown)},
		{name: "restore of nothing", opts: func(_ *daemon, o *task.CreateOptions) {
			o.Checkpoint = &ocispec.Descriptor{MediaType: "application/vnd.containerd.container.criu.checkpoint.criu.tar", Digest: hello, Size: 5}
		}, class: append(missing, errdefs.ErrNotImplemented)},
		{name: "a shim that is not there", opts: func(d *daemon, o *task.CreateOptions) { o.APIAddress, o.APIVersion = "unix://"+d.Dir+"/none.sock", 3 }, words: []string{"/none.sock"}, class: append(missing, errdefs.ErrUnavailable)},
	} {
		t.Run(a.name, func(t *testing.T) {
			began := time.Now()
			err := d.try(t, a)
			if err != nil || !a.may {
				refused(t, err, a.words, a.class...)
				if err != nil && !strings.Contains(err.Error(), "bad") {
					t.Errorf("the error does not name the container: %v", err)
				}
			}
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("it took %s", took)
			}
			if diff := d.difference(before); diff != "" {
				t.Errorf("left behind:\n%s", diff)
				before = d.inventory()
			}
			d.canary(t)
		})
	}
}

// What is asked of tasks and execs in a state in which it cannot be done.
//
// contract: 1.3.34, 1.3.35, 1.3.36, 1.3.38, 1.3.39, 13.39
// promise: P36
func TestBadTaskRequests(t *testing.T) {
	d := start(t)
	d.pullBusybox()
	before := d.inventory()
	ts, ctx := d.tasks(), d.timeout()
	notFound, state := []error{errdefs.ErrNotFound}, []error{errdefs.ErrFailedPrecondition}
	check := func(name string, err error, words []string, class ...error) {
		t.Helper()
		t.Run(name, func(t *testing.T) { refused(t, err, append(words, "live"), class...) })
	}
	process := func(f func(*specs.Process)) task.ExecOptions {
		p := &specs.Process{Args: []string{"/bin/true"}, Cwd: "/", Env: []string{"PATH=/bin"}}
		if f != nil {
			f(p)
		}
		return task.ExecOptions{Spec: pack(t, typeProcess, p)}
	}
	for name, err := range map[string]error{
		"start": second(ts.Start(ctx, "nobody", "")), "delete": second(ts.Delete(ctx, "nobody")), "get": second(ts.Get(ctx, "nobody", "")), "kill": ts.Kill(ctx, "nobody", "", 9, false),
		"exec": ts.Exec(ctx, "nobody", "e", process(nil)), "resize": ts.Resize(ctx, "nobody", "", 80, 24), "close": ts.CloseStdin(ctx, "nobody", ""), "pause": ts.Pause(ctx, "nobody"), "resume": ts.Resume(ctx, "nobody"),
		"pids": second(ts.Pids(ctx, "nobody")), "update": ts.Update(ctx, "nobody", pack(t, "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", specs.LinuxResources{}), nil), "wait": second(ts.Wait(ctx, "nobody", "")),
		"checkpoint": second(ts.Checkpoint(ctx, "nobody", "", typed.Any{})), "create": second(ts.Create(ctx, "nobody", task.CreateOptions{})), "delete exec": second(ts.DeleteExec(ctx, "nobody", "e")),
	} {
		t.Run(name+" of nobody", func(t *testing.T) { refused(t, err, []string{"nobody"}, errdefs.ErrNotFound) })
	}
	pid := d.run("live")
	check("create twice", second(ts.Create(ctx, "live", task.CreateOptions{})), nil, errdefs.ErrAlreadyExists)
	check("start twice", second(ts.Start(ctx, "live", "")), nil, state...)
	check("delete of a running one", second(ts.Delete(ctx, "live")), []string{"running"}, state...)
	check("resume of a running one", ts.Resume(ctx, "live"), nil, state...)
	for _, signal := range []uint32{65, 1000, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
		check(fmt.Sprintf("signal %d", signal), ts.Kill(ctx, "live", "", signal, false), []string{fmt.Sprint(signal)}, errdefs.ErrInvalidArgument)
	}
	check("kill of an unknown exec", ts.Kill(ctx, "live", "none", 9, false), []string{"none"}, notFound...)
	check("wait for an unknown exec", second(ts.Wait(ctx, "live", "none")), []string{"none"}, notFound...)
	check("start of an unknown exec", second(ts.Start(ctx, "live", "none")), []string{"none"}, notFound...)
	check("exec without spec", ts.Exec(ctx, "live", "e", task.ExecOptions{}), []string{"spec"}, errdefs.ErrInvalidArgument)
	check("exec of garbage", ts.Exec(ctx, "live", "e", task.ExecOptions{Spec: typed.Any{URL: typeProcess, Value: []byte("{")}}), nil, errdefs.ErrInvalidArgument)
	check("update without resources", ts.Update(ctx, "live", typed.Any{}, nil), []string{"resources"}, errdefs.ErrInvalidArgument)
	check("update of garbage", ts.Update(ctx, "live", typed.Any{URL: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: []byte("[]")}, nil), nil, errdefs.ErrInvalidArgument)
	check("resize beyond a terminal's size", ts.Resize(ctx, "live", "", 1<<20, 1), nil, errdefs.ErrInvalidArgument)
	criu := []error{errdefs.ErrNotImplemented, errdefs.ErrFailedPrecondition, errdefs.ErrNotFound, errdefs.ErrInvalidArgument}
	check("checkpoint into the content store", second(ts.Checkpoint(ctx, "live", "", typed.Any{})), []string{"checkpoint"}, criu...)
	if _, err := exec.LookPath("criu"); err != nil {
		b, err := proto.Marshal(&runcoptions.CheckpointOptions{ImagePath: d.Dir + "/tmp/image"})
		if err != nil {
			t.Fatal(err)
		}
		check("checkpoint without criu", second(ts.Checkpoint(ctx, "live", "", typed.Any{URL: "containerd.runc.v1.CheckpointOptions", Value: b})), []string{"criu"}, criu...)
		if err := os.RemoveAll(d.Dir + "/tmp/image"); err != nil { // its maker is who asked for it
			t.Error(err)
		}
	}
	missing := []error{errdefs.ErrNotFound, errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition, errdefs.ErrPermissionDenied, errdefs.ErrResourceExhausted}
	for _, e := range []struct {
		name string
		opts task.ExecOptions
		word string
	}{
		{"command not found", process(func(p *specs.Process) { p.Args = []string{"no-such-command"} }), "no-such-command"},
		{"a directory", process(func(p *specs.Process) { p.Args = []string{"/etc"} }), "/etc"},
		{"no arguments", process(func(p *specs.Process) { p.Args = nil }), "args"},
		{"a file to work in", process(func(p *specs.Process) { p.Cwd = "/etc/passwd" }), "/etc/passwd"},
		{"a directory that is not there", process(func(p *specs.Process) { p.Cwd = "/none" }), "/none"},
		{"an argument of 200 KiB", process(func(p *specs.Process) { p.Args = append(p.Args, strings.Repeat("x", 200<<10)) }), "argument list too long"},
		{"4 MiB of arguments", process(func(p *specs.Process) {
			for range 64 {
				p.Args = append(p.Args, strings.Repeat("x", 64<<10))
			}
		}), "message"},
		{"a user out of range", process(func(p *specs.Process) { p.User.UID = 1<<32 - 1 }), "4294967295"},
		{"a FIFO that is not there", func() task.ExecOptions { o := process(nil); o.IO.Stdout = d.Dir + "/none/fifo"; return o }(), "/none/fifo"},
		{"an unknown scheme", func() task.ExecOptions { o := process(nil); o.IO.Stdout = "gopher://x"; return o }(), "gopher"},
	} {
		err := ts.Exec(ctx, "live", "e", e.opts)
		if err == nil {
			check("delete of a created exec is fine, of "+e.name+" twice not", second(ts.DeleteExec(ctx, "live", "none")), nil, notFound...)
			check("exec twice, "+e.name, ts.Exec(ctx, "live", "e", e.opts), nil, errdefs.ErrAlreadyExists)
			_, err = ts.Start(ctx, "live", "e")
			if _, err := ts.DeleteExec(ctx, "live", "e"); err != nil {
				t.Errorf("%s: delete: %v", e.name, err)
			}
		}
		check("exec of "+e.name, err, []string{e.word}, missing...)
		p, err := ts.Get(ctx, "live", "")
		if err != nil || p.Pid != pid || p.Status != task.StatusRunning {
			t.Errorf("after exec of %s: %+v, %v", e.name, p, err)
		}
	}
	if err := ts.Pause(ctx, "live"); err != nil {
		t.Fatal(err)
	}
	check("pause twice", ts.Pause(ctx, "live"), nil, state...)
	check("exec in a paused one", func() error {
		err := ts.Exec(ctx, "live", "e", process(nil))
		if err == nil {
			_, err = ts.Start(ctx, "live", "e")
			ts.DeleteExec(ctx, "live", "e")
		}
		return err
	}(), nil, state...)
	if err := ts.Resume(ctx, "live"); err != nil {
		t.Fatal(err)
	}
	if err := ts.Kill(ctx, "live", "", 9, false); err != nil {
		t.Fatal(err)
	}
	if _, err := ts.Wait(ctx, "live", ""); err != nil {
		t.Fatal(err)
	}
	check("exec in a stopped one", ts.Exec(ctx, "live", "e", process(nil)), nil, state...)
	check("start of a stopped one", second(ts.Start(ctx, "live", "")), nil, state...)
	check("kill of a stopped one", ts.Kill(ctx, "live", "", 9, false), nil, notFound...)
	check("pause of a stopped one", ts.Pause(ctx, "live"), nil, state...)
	d.kill(ns, "live")
	check("delete twice", second(ts.Delete(ctx, "live")), nil, notFound...)
	check("wait after delete", second(ts.Wait(ctx, "live", "")), nil, notFound...)
	d.remove("live")
	d.unchanged(before)
}
