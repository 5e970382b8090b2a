package interop

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cio"
)

// A root directory that containerd 2.4 recorded works, and afterwards Debian's
// containerd still reads it.
//
// contract: 4.4.3, 3.1.2, 4.1.1, 4.1.8, 3.1.3
func TestRecordedRoot(t *testing.T) {
	d := newGantry(t)
	if out, err := exec.Command("tar", "-C", d.Dir, "-xzf", "../../internal/engine/testdata/containerd-2.4-root.tgz").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d.start()
	c := d.connect()
	ctx := testContext(t)

	images, err := c.ListImages(ctx)
	if err != nil || len(images) != 1 {
		t.Fatalf("images: %v, %v", images, err)
	}
	if ok, err := images[0].IsUnpacked(ctx, "overlayfs"); err != nil || !ok {
		t.Errorf("unpacked: %v, %v", ok, err)
	}
	statuses, err := c.ContentStore().ListStatuses(ctx)
	if err != nil || len(statuses) != 1 || statuses[0].Offset != 4 {
		t.Errorf("unfinished ingest: %v, %v", statuses, err)
	}
	leases, err := c.LeasesService().List(ctx)
	if err != nil || len(leases) != 1 {
		t.Errorf("leases: %v, %v", leases, err)
	}
	namespaces, err := c.NamespaceService().List(ctx)
	if err != nil || len(namespaces) != 2 {
		t.Errorf("namespaces: %v, %v", namespaces, err)
	}
	containers, err := c.Containers(ctx)
	if err != nil || len(containers) != 1 {
		t.Fatalf("containers: %v, %v", containers, err)
	}
	box := containers[0]

	// The image has no program: put one into the container's snapshot.
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skipf("busybox-static is needed: %v", err)
	}
	info, err := box.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := c.SnapshotService(info.Snapshotter).Mounts(ctx, info.SnapshotKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(ctx, mounts, func(root string) error {
		if b, err := os.ReadFile(filepath.Join(root, "data/hello.txt")); err != nil {
			t.Errorf("a file of the image: %q, %v", b, err)
		}
		if err := os.MkdirAll(filepath.Join(root, "bin"), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(root, "bin/busybox"), bin, 0o755); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(root, "bin/none"), []byte("#!/bin/busybox sh\necho $A; exit 7\n"), 0o755)
	}); err != nil {
		t.Fatal(err)
	}
	var out buffer
	task, wait := start(t, box, cio.NewCreator(cio.WithStreams(nil, &out, &out), cio.WithFIFODir(d.Dir)))
	if code := exit(t, wait); code != 7 {
		t.Errorf("exit code %d", code)
	}
	if _, err := task.Delete(ctx); err != nil {
		t.Error(err)
	}
	if out.String() != "b\n" {
		t.Errorf("output %q", out.String())
	}
	d.stop()

	d.Bin = debian(t, "containerd")
	if err := d.Configure(2, ""); err != nil {
		t.Fatal(err)
	}
	d.start()
	old := ctr{d, debian(t, "ctr")}
	old.has(old.run("images", "ls", "-q"), images[0].Name())
	old.has(old.run("containers", "ls", "-q"), box.ID())
	old.has(old.run("snapshots", "ls"), info.SnapshotKey, "Committed")
	old.has(old.run("leases", "ls", "-q"), leases[0].ID)
	old.has(old.run("content", "active"), statuses[0].Ref)
	old.has(old.run("content", "get", images[0].Target().Digest.String()), "schemaVersion")
}
