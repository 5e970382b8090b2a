package crash

import (
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/image"
)

// points are where the daemon passes in the course of everything, with the
// passages at which it is killed.
func points() []string {
	out := []string{
		"task.bundled:1", "task.shim-started:1", "task.shim-recorded:1", "task.created:1", "task.acknowledged:1", "task.started:1", "task.started:2",
		"task.exec-added:1", "task.exit-published:1", "task.exit-published:2", "task.deleted:1", "task.told:1", "task.stopped:1",
		"blobdir.commit.synced:1", "blobdir.commit.renamed:2", "blobdir.commit.done:3",
		"snapshot-made:1", "snapshot-filled:2", "snapshot-recorded:1", "snapshot-synced:2", "snapshot-committed:1", "snapshot-unrecorded:1", "cleanup:1",
	}
	for k := 1; k <= 25; k += 6 {
		out = append(out, "meta.commit:"+strconv.Itoa(k), "meta.committed:"+strconv.Itoa(k+3))
	}
	return out
}

// TestPoints kills the daemon at named points of its work, each once: on both
// sides of what it makes durable, and of what it has shims do. What was
// interrupted is completed by the next daemon, in the same root directory.
//
// promise: P6, P11
// contract: 5.4.1
func TestPoints(t *testing.T) {
	seed := number(t, "GANTRY_SEED", uint64(time.Now().UnixNano()))
	d := newDaemon(t)
	b := newBench(d, rand.New(rand.NewPCG(seed, 1)))
	events := d.record()
	d.start()
	ctx, cancel := d.context()
	defer cancel()
	if err := b.pullBase(ctx); err != nil {
		t.Fatal(err)
	}
	resident, err := b.resident(ctx, "resident-0", 41)
	if err != nil {
		t.Fatal(err)
	}
	d.stop()
	for _, point := range points() {
		b.point(events, resident, point)
		if t.Failed() {
			break
		}
	}
	d.start()
	ctx, cancel = d.context()
	defer cancel()
	if err := d.v.Tasks().Kill(ctx, resident.id, "", 9, true); err != nil {
		t.Error(err)
	}
	events.told(process{string(resident.id), string(resident.id), resident.pid}, 137)
	if err := b.end(ctx, &journal{map[string]bool{}, map[string]bool{}}, resident.id); err != nil {
		t.Error(err)
	}
	if err := d.v.Images().Delete(ctx, b.base, image.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	d.vanish()
}

// point does some of everything with a daemon that dies at a point.
func (b *bench) point(events *recorder, resident box, point string) {
	d := b.daemon
	d.t.Helper()
	pulled := b.pull()
	all := []*work{pulled, b.ingest(), b.runs(), b.execs(resident.id)}
	d.spawn("GANTRY_FAULT=" + point)
	err := d.connect()
	failed := -1
	for i := 0; err == nil && i < len(all); i++ {
		if err = all[i].run(); err != nil {
			failed = i
		}
	}
	removing := err == nil
	if removing {
		ctx, cancel := d.context()
		err = pulled.undo(ctx)
		cancel()
	}
	if end, ended := d.Ended(3 * time.Second); !ended {
		d.t.Errorf("the daemon was not killed at %s: it did not pass there (%v)", point, err)
		d.stop()
	} else if end == nil || !strings.Contains(end.Error(), "killed") {
		d.t.Errorf("at %s the daemon ended with %v", point, end)
	}
	if !alive(resident.pid) {
		d.t.Errorf("a container has ended with the daemon at %s", point)
	}
	for _, p := range d.fsck() {
		d.t.Errorf("after the kill at %s: %s", point, p)
	}
	d.start()
	ctx, cancel := d.context()
	defer cancel()
	if p, err := d.v.Tasks().Get(ctx, resident.id, ""); err != nil || p.Pid != resident.pid {
		d.t.Errorf("after the kill at %s container %s is %v, %v, want pid %d", point, resident.id, p, err, resident.pid)
	}
	for i, w := range all {
		if removing && w == pulled {
			continue
		}
		if err := w.run(); err != nil {
			d.t.Errorf("%s after the kill at %s (it had failed: %v): %v", w.name, point, i == failed, err)
		}
		for p, x := range w.exits {
			events.told(p, x.Status)
			if len(events.of(p)) > 1 && !strings.HasPrefix(point, "task.exit-published") {
				d.t.Errorf("the exit of %v was delivered %d times around the kill at %s", p, len(events.of(p)), point)
			}
		}
	}
	if err := pulled.undo(ctx); err != nil && !(removing && errdefs.IsNotFound(err)) {
		d.t.Errorf("remove the image after the kill at %s: %v", point, err)
	}
	d.stop()
}
