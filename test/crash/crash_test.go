package crash

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/task"
	"github.com/opencontainers/go-digest"
)

func opts(total int, expected digest.Digest) content.WriterOptions {
	return content.WriterOptions{Total: int64(total), Expected: expected}
}

// number reads a setting of the test from the environment.
func number(t *testing.T, name string, usual uint64) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return usual
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// TestKill kills the daemon at random moments of everything it does, with
// three containers running. $GANTRY_KILLS is how often, $GANTRY_SEED repeats
// a run's choices.
//
// promise: P6, P11
// contract: 5.4.1, 5.4.4
func TestKill(t *testing.T) {
	kills := int(number(t, "GANTRY_KILLS", 20))
	seed := number(t, "GANTRY_SEED", uint64(time.Now().UnixNano()))
	t.Logf("GANTRY_SEED=%d GANTRY_KILLS=%d", seed, kills)
	d := newDaemon(t)
	b := newBench(d, rand.New(rand.NewPCG(seed, 0)))
	events := d.record()
	d.start()
	ctx, cancel := d.context()
	defer cancel()
	if err := b.pullBase(ctx); err != nil {
		t.Fatal(err)
	}
	codes := []uint32{41, 42, 43}
	var residents []box
	for i, code := range codes {
		r, err := b.resident(ctx, container.ID(fmt.Sprintf("resident-%d", i)), code)
		if err != nil {
			t.Fatal(err)
		}
		residents = append(residents, r)
	}
	b.reg.Throttle = 4 * time.Millisecond

	works := map[string]func() (*work, error){
		"pull":   func() (*work, error) { return b.pull(), nil },
		"import": func() (*work, error) { return b.load(), nil },
		"ingest": func() (*work, error) { return b.ingest(), nil },
		"run":    func() (*work, error) { return b.runs(), nil },
		"exec":   func() (*work, error) { return b.execs(residents[0].id), nil },
		"delete": b.deletes,
	}
	kinds := []string{"pull", "run", "exec", "delete", "ingest", "import"}
	// How long each takes when nothing happens.
	took := map[string]time.Duration{}
	var done []*work
	for _, k := range kinds {
		w, err := works[k]()
		if err != nil {
			t.Fatalf("%s: %v", k, err)
		}
		began := time.Now()
		if err := w.run(); err != nil {
			t.Fatalf("%s, undisturbed: %v", k, err)
		}
		took[k] = time.Since(began)
		done = append(done, w)
		for p, x := range w.exits {
			events.told(p, x.Status)
		}
	}
	t.Logf("undisturbed: %v", took)

	var slowest time.Duration
	var moments []time.Time
	for i := range kills {
		kind := kinds[i%len(kinds)]
		w, err := works[kind]()
		if err != nil {
			t.Fatalf("%d: prepare %s: %v", i, kind, err)
		}
		// Sometimes a container ends before the daemon is killed, sometimes
		// while there is none.
		victim := residents[b.rnd.IntN(len(residents))]
		when := []string{"", "before", "down", "down"}[b.rnd.IntN(4)]
		if kind == "exec" && victim.id == residents[0].id {
			when = ""
		}
		status := codes[victim.id[len(victim.id)-1]-'0']
		if when == "before" {
			syscall.Kill(int(victim.pid), syscall.SIGTERM)
			events.told(process{string(victim.id), string(victim.id), victim.pid}, status)
		}
		at := time.Duration(b.rnd.Float64() * float64(took[kind]))
		finished := make(chan error, 1)
		go func() { finished <- w.run() }()
		select {
		case <-time.After(at):
		case err := <-finished:
			finished <- err
		}
		d.Kill()
		killed := time.Now()
		moments = append(moments, killed)
		first := <-finished
		t.Logf("%2d: killed %v into %s (%v); %s ends: %q", i, at, kind, first, victim.id, when)
		if when == "down" {
			syscall.Kill(int(victim.pid), syscall.SIGTERM)
			d.eventually(fmt.Sprintf("%v has ended", victim), func() bool { return !alive(victim.pid) }, func() string { return describe(victim.pid) })
		}
		for _, r := range residents {
			if !alive(r.pid) && (r != victim || when == "") {
				t.Errorf("container %s does not run any more", r.id)
			}
		}
		for _, p := range d.fsck() {
			t.Errorf("after kill %d, of %s: %s", i, kind, p)
		}
		slowest = max(slowest, d.start())

		ctx, cancel := d.context()
		for _, r := range residents {
			p, err := d.v.Tasks().Get(ctx, r.id, "")
			if err != nil {
				t.Fatalf("container %s after the restart: %v", r.id, err)
			}
			want := task.StatusRunning
			if r == victim && when != "" {
				want = task.StatusStopped
			}
			if p.Pid != r.pid || p.Status != want {
				t.Errorf("container %s is %v with pid %d after the restart, want %v with pid %d", r.id, p.Status, p.Pid, want, r.pid)
			}
		}
		if when != "" {
			x, err := d.v.Tasks().Wait(ctx, victim.id, "")
			if err != nil || x.Status != status {
				t.Errorf("wait for %s, which has ended: %v, %v, want status %d", victim.id, x, err, status)
			}
			events.told(process{string(victim.id), string(victim.id), victim.pid}, status)
			if x, err := d.v.Tasks().Delete(ctx, victim.id); err != nil || x.Status != status {
				t.Errorf("delete %s: %v, %v, want status %d", victim.id, x, err, status)
			}
			again, err := b.revive(ctx, victim.id)
			if err != nil {
				t.Fatalf("start %s again: %v", victim.id, err)
			}
			for i := range residents {
				if residents[i].id == again.id {
					residents[i] = again
				}
			}
		}
		if err := w.run(); err != nil {
			t.Errorf("%s, which was interrupted: %v", kind, err)
		}
		for p, x := range w.exits {
			// What is published in the moment of the kill may be lost with the
			// daemon's buffers.
			if x.At.After(killed) || x.At.Before(killed.Add(-100*time.Millisecond)) {
				events.told(p, x.Status)
			}
		}
		cancel()
		done = append(done, w)
		if t.Failed() {
			break
		}
	}
	t.Logf("the slowest of %d starts served after %v", kills, slowest)

	// Everything is deleted.
	ctx, cancel = d.context()
	defer cancel()
	for _, w := range done {
		if w.undo != nil {
			if err := w.undo(ctx); err != nil {
				t.Errorf("remove what %s has made: %v", w.name, err)
			}
		}
	}
	for _, r := range residents {
		if err := d.v.Tasks().Kill(ctx, r.id, "", 9, true); err != nil {
			t.Error(err)
		}
		if _, err := d.v.Tasks().Wait(ctx, r.id, ""); err != nil {
			t.Error(err)
		}
		events.told(process{string(r.id), string(r.id), r.pid}, 137)
		if err := b.end(ctx, &journal{map[string]bool{}, map[string]bool{}}, r.id); err != nil {
			t.Error(err)
		}
	}
	if err := d.v.Images().Delete(ctx, b.base, image.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	d.vanish()
	events.once(moments)
}

// vanish collects garbage, stops the daemon, and checks that there is nothing
// left, in the store or on the host.
func (d *daemon) vanish() {
	d.t.Helper()
	ctx, cancel := d.context()
	defer cancel()
	// A lease's deletion is how a client asks for a collection.
	l, err := d.v.Leases().Create(ctx, lease.Lease{ID: "collect"})
	if err == nil {
		err = d.v.Leases().Delete(ctx, l.ID, true)
	}
	if err != nil {
		d.t.Error(err)
	}
	d.empty(ctx)
	d.stop()
	for _, p := range d.fsck() {
		d.t.Errorf("at the end: %s", p)
	}
	for _, l := range d.leftovers() {
		d.t.Errorf("left behind: %s", l)
	}
}
