package crash

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/internal/engine/overlay"
)

// TestNameIsFree kills the daemon after each transaction of the creation of a
// container by package client, whose own undoing then fails, too. The name can
// be used at once, unless the container was made.
//
// promise: P6
func TestNameIsFree(t *testing.T) {
	d := newDaemon(t)
	b := newBench(d, rand.New(rand.NewPCG(3, 4)))
	d.start()
	ctx, cancel := d.context()
	defer cancel()
	if err := b.pullBase(ctx); err != nil {
		t.Fatal(err)
	}
	d.stop()
	if err := os.Mkdir(d.Dir+"/tmp", 0o700); err != nil {
		t.Fatal(err)
	}
	killed := 0
	for k := 1; ; k++ {
		create := client.ContainerOptions{ID: container.ID(fmt.Sprintf("c%d", k)), Image: b.base, Snapshotter: overlay.Name, Facts: b.facts, TempDir: d.Dir + "/tmp"}
		d.start(fmt.Sprintf("GANTRY_FAULT=meta.committed:%d", k))
		_, err := client.CreateContainer(ctx, d.c, d.ns, create)
		if err == nil {
			d.stop()
			break
		}
		if _, ended := d.Ended(5 * time.Second); !ended {
			t.Fatalf("at transaction %d: %v, and the daemon lives", k, err)
		}
		killed++
		d.start()
		_, found := d.v.Containers().Get(ctx, create.ID)
		if _, err := client.CreateContainer(ctx, d.c, d.ns, create); err != nil && !(found == nil && errdefs.IsAlreadyExists(err)) {
			t.Errorf("created again after a kill at transaction %d: %v", k, err)
		}
		if err := client.DeleteContainer(ctx, d.v, create.ID); err != nil {
			t.Errorf("deleted after a kill at transaction %d: %v", k, err)
		}
		d.stop()
	}
	if killed < 3 {
		t.Errorf("the daemon was killed %d times, the creation has more transactions", killed)
	}
	// The client's leases of the creations that failed would end in an hour.
	d.start()
	leases, err := d.v.Leases().List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range leases {
		if err := d.v.Leases().Delete(ctx, l.ID, false); err != nil {
			t.Error(err)
		}
	}
	if err := d.v.Containers().Walk(ctx, func(c container.Container) error { return client.DeleteContainer(ctx, d.v, c.ID) }); err != nil {
		t.Error(err)
	}
	if err := d.v.Images().Delete(ctx, b.base, image.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	d.vanish()
}
