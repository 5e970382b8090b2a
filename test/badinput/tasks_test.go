package badinput

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
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

// pullBusybox makes the image that runs, and returns its top layer's name.
func (d *daemon) pullBusybox() string {
	d.t.Helper()
	img := testimage.Busybox(d.t)
	reg := testimage.Serve(d.t)
	ref := reg.Put("library/busybox", "latest", img)
	err := d.transfers().Transfer(d.timeout(), transfer.Registry{Reference: ref},
		transfer.ImageStore{Name: "busybox", Unpacks: []transfer.Unpack{{Snapshotter: "overlayfs"}}}, transfer.Options{})
	if err != nil {
		d.t.Fatal(err)
	}
	return chainID(img.DiffIDs)
}

// busyboxChain is the top layer of what pullBusybox pulled.
func busyboxChain(t testing.TB) string { return chainID(testimage.Busybox(t).DiffIDs) }

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
	if _, err := d.snapshots("overlayfs").Prepare(ctx, id, busyboxChain(d.t), nil); err != nil {
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

var (
	_ = fmt.Sprint
	_ = os.Getpid
	_ = strings.Contains
	_ = errors.Is
	_ context.Context
	_ = time.Now
	_ mount.Mount
	_ snapshot.Info
)
