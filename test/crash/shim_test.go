package crash

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/task"
)

// shimOf returns the pid of a container's shim.
func (d *daemon) shimOf(id container.ID) int {
	d.t.Helper()
	for pid, args := range d.Processes() {
		if strings.Contains(args, "containerd-shim-runc-v2") && strings.Contains(args, "-id "+string(id)+" ") {
			return pid
		}
	}
	d.t.Fatalf("container %s has no shim", id)
	return 0
}

// TestShimAndDaemonDie kills the daemon and then a shim, of whose container
// the next daemon ends what is left and tells the exit, once. So does a daemon
// that runs. The container beside it does not notice.
//
// promise: P6, P11
// contract: 5.4.1, 5.4.3, 5.4.4, 13.18
func TestShimAndDaemonDie(t *testing.T) {
	d := newDaemon(t)
	b := newBench(d, rand.New(rand.NewPCG(1, 2)))
	events := d.record()
	d.start()
	ctx, cancel := d.context()
	defer cancel()
	if err := b.pullBase(ctx); err != nil {
		t.Fatal(err)
	}
	beside, err := b.resident(ctx, "beside", 1)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct{ daemon, process bool }{{false, false}, {true, false}, {true, true}} {
		victim, err := b.resident(ctx, container.ID("victim-"+strconv.Itoa(i)), 2)
		if err != nil {
			t.Fatal(err)
		}
		shim := d.shimOf(victim.id)
		if c.daemon {
			d.Kill()
		}
		if c.process { // its exit status dies with the shim
			syscall.Kill(int(victim.pid), syscall.SIGKILL)
		}
		syscall.Kill(shim, syscall.SIGKILL)
		if c.daemon {
			d.eventually("the shim has ended", func() bool { return !alive(uint32(shim)) })
			d.start()
		}
		p := process{string(victim.id), string(victim.id), victim.pid}
		d.eventually(fmt.Sprintf("the exit of %v is delivered", p), func() bool { return len(events.of(p)) > 0 })
		if got := events.of(p)[0].ExitStatus; got != 137 && got != 255 {
			t.Errorf("%v: the exit status is %d, want 137 or 255", c, got)
		}
		d.eventually("the task is gone", func() bool {
			_, err := d.v.Tasks().Get(ctx, victim.id, "")
			return errdefs.IsNotFound(err)
		})
		if alive(victim.pid) {
			t.Errorf("%v: the container outlives its shim", c)
		}
		if got, err := d.v.Tasks().Get(ctx, beside.id, ""); err != nil || got.Pid != beside.pid || got.Status != task.StatusRunning {
			t.Errorf("%v: the container beside is %v, %v", c, got, err)
		}
		// The name is free again.
		again, err := b.revive(ctx, victim.id)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.v.Tasks().Kill(ctx, again.id, "", 9, true); err != nil {
			t.Error(err)
		}
		events.told(process{string(again.id), string(again.id), again.pid}, 137)
		if err := b.end(ctx, &journal{map[string]bool{}, map[string]bool{}}, again.id); err != nil {
			t.Error(err)
		}
	}
	syscall.Kill(int(beside.pid), syscall.SIGTERM)
	events.told(process{string(beside.id), string(beside.id), beside.pid}, 1)
	if err := b.end(ctx, &journal{map[string]bool{}, map[string]bool{}}, beside.id); err != nil {
		t.Error(err)
	}
	if err := d.v.Images().Delete(ctx, b.base, image.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	d.vanish()
	events.once(nil)
}
