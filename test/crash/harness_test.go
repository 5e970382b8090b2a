// Package crash kills the daemon, at random moments and at named ones, and
// looks at what the next one finds: containers that run on, exits that are
// told once, stores without damage, and in the end nothing left behind.
package crash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/boltmeta"
	"github.com/gantryd/gantry/internal/engine/native"
	"github.com/gantryd/gantry/internal/engine/overlay"
	"github.com/gantryd/gantry/test/daemontest"
)

// binDir has gantryd and its shim.
var binDir string

func TestMain(m *testing.M) { os.Exit(daemontest.Main(m, "../..", &binDir)) }

// daemon is a gantryd, its clients, and the namespace that the test works in,
// which no one else on the machine has.
type daemon struct {
	*daemontest.Daemon
	t  *testing.T
	ns namespace.ID
	c  *client.Client
	v  view.View
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	d := &daemon{t: t}
	t.Cleanup(func() { // after all processes have been swept
		if d.ns != "" {
			os.RemoveAll(d.runcState())
		}
	})
	d.Daemon = daemontest.New(t, filepath.Join(binDir, "gantryd"), 4, "")
	d.ns = namespace.ID(d.Mark)
	t.Cleanup(d.stop)
	return d
}

// spawn runs the daemon and does not wait for it.
func (d *daemon) spawn(env ...string) {
	d.t.Helper()
	if err := d.Spawn(env...); err != nil {
		d.t.Fatal(err)
	}
}

// start runs the daemon until it serves, and returns how long that took.
func (d *daemon) start(env ...string) time.Duration {
	d.t.Helper()
	began := time.Now()
	d.spawn(env...)
	if err := d.connect(); err != nil {
		d.t.Fatal(err)
	}
	return time.Since(began)
}

// connect makes the client of a daemon that has just been started. It is an
// error if it has ended, by a signal or by itself.
func (d *daemon) connect() error {
	if err := d.Listening(); err != nil {
		return err
	}
	if d.c != nil {
		d.c.Close()
	}
	var err error
	if d.c, err = client.Dial(d.Address()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := d.c.Serving(ctx); err != nil {
		return err
	}
	d.v, err = d.c.In(d.ns, "")
	return err
}

// stop ends the daemon with SIGTERM, and with kill -9 if it does not obey.
func (d *daemon) stop() {
	d.t.Helper()
	if d.c != nil {
		d.c.Close()
		d.c = nil
	}
	if err := d.Stop(); err != nil {
		d.t.Error(err)
	}
}

// runcState is where shims keep what they know of the containers of the
// test's namespace.
func (d *daemon) runcState() string { return filepath.Join("/run/containerd/runc", string(d.ns)) }

// leftovers is what a daemon that was emptied and stopped should have removed.
func (d *daemon) leftovers() []string {
	left := d.Leftovers()
	below := func(what, pattern string) {
		found, _ := filepath.Glob(pattern) // names with a dot as well
		for _, f := range found {
			if filepath.Base(f) != ".lock" { // of the shims, for all of the directory
				left = append(left, what+" "+f)
			}
		}
	}
	below("work directory", d.Dir+"/root/io.containerd.runtime.v2.task/*/*")
	below("shim socket", d.Dir+"/shims/*")
	below("runtime state", d.runcState()+"/*")
	below("ingest", d.Dir+"/root/io.containerd.content.v1.content/ingest/*")
	below("blob", d.Dir+"/root/io.containerd.content.v1.content/blobs/*/*")
	below("snapshot", d.Dir+"/root/io.containerd.snapshotter.v1.*/snapshots/*")
	below("temporary mount", d.Dir+"/root/tmpmounts/*")
	filepath.WalkDir(d.Dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type()&(fs.ModeNamedPipe|fs.ModeSocket) != 0 {
			left = append(left, fmt.Sprintf("%v %s", e.Type(), path))
		}
		return nil
	})
	return left
}

// fsck opens a copy of the root directory as the next daemon will, completes
// what was interrupted, and returns what is wrong with it. The daemon must not
// run.
func (d *daemon) fsck() []string {
	d.t.Helper()
	dir, err := os.MkdirTemp(d.Dir, "fsck")
	if err != nil {
		d.t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if out, err := exec.Command("cp", "-a", "--reflink=auto", d.Dir+"/root/.", dir).CombinedOutput(); err != nil {
		d.t.Fatalf("copy the root directory: %v: %s", err, out)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	problems, err := fsck(ctx, dir)
	if err != nil {
		problems = append(problems, err.Error())
	}
	return problems
}

func fsck(ctx context.Context, dir string) (problems []string, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	blobs, err := blobdir.Open(dir+"/io.containerd.content.v1.content", blobdir.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, blobs.Close()) }()
	over, err := overlay.Open(dir+"/io.containerd.snapshotter.v1.overlayfs", overlay.Config{}, nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, over.Close()) }()
	plain, err := native.Open(dir+"/io.containerd.snapshotter.v1.native", native.Config{}, nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, plain.Close()) }()
	db, err := boltmeta.Open(dir+"/io.containerd.metadata.v1.bolt/meta.db", boltmeta.Options{Content: blobs,
		Snapshotters: map[string]snapshot.Store{overlay.Name: over, native.Name: plain}, OpenTimeout: 5 * time.Second})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if _, err := db.Reclaim(ctx); err != nil {
		return nil, err
	}
	bad, err := blobs.Check(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range bad {
		problems = append(problems, "content "+p.String())
	}
	for _, p := range append(over.Check(ctx), plain.Check(ctx)...) {
		problems = append(problems, "snapshotter "+p.String())
	}
	for _, p := range db.Check(ctx) {
		problems = append(problems, "metadata "+p.String())
	}
	return problems, nil
}

// recorder subscribes to the daemon's events, again and again as it restarts.
type recorder struct {
	d      *daemon
	cancel context.CancelFunc
	ended  chan struct{}

	mu    sync.Mutex // guards what follows
	exits map[process][]delivery
	life  int // of the daemon, as far as subscriptions were made
}

// delivery is an exit, when it came, and on which subscription.
type delivery struct {
	event.TaskExit
	at   time.Time
	life int
}

func (d delivery) String() string {
	return fmt.Sprintf("status %d at %s, heard at %s by subscription %d", d.ExitStatus, d.ExitedAt.Local().Format(time.StampMicro), d.at.Format(time.StampMicro), d.life)
}

// process is one that ran in a container. Its pid tells it from an earlier
// one of the same name.
type process struct {
	id   string // of the container
	exec string // the container's id for its first process
	pid  uint32
}

func (d *daemon) record() *recorder {
	ctx, cancel := context.WithCancel(context.Background())
	r := &recorder{d: d, cancel: cancel, ended: make(chan struct{}), exits: map[process][]delivery{}}
	go func() {
		defer close(r.ended)
		for ctx.Err() == nil {
			c, err := net.Dial("unix", d.Address())
			if err != nil {
				select {
				case <-ctx.Done():
				case <-time.After(time.Millisecond):
				}
				continue
			}
			c.Close()
			r.listen(ctx)
		}
	}()
	d.t.Cleanup(r.stop)
	return r
}

func (r *recorder) stop() {
	r.cancel()
	<-r.ended
}

// listen takes events from one life of the daemon.
func (r *recorder) listen(ctx context.Context) {
	c, err := client.Dial(r.d.Address())
	if err != nil {
		return
	}
	defer c.Close()
	sub, err := c.Events().Subscribe(ctx, `topic=="/tasks/exit"`)
	if err != nil {
		return
	}
	defer sub.Close()
	r.mu.Lock()
	r.life++
	life := r.life
	r.mu.Unlock()
	for {
		e, err := sub.Next(ctx)
		if err != nil {
			return
		}
		x, ok := e.Event.(event.TaskExit)
		if !ok || e.Namespace != r.d.ns {
			continue
		}
		r.mu.Lock()
		p := process{x.ContainerID, x.ID, x.Pid}
		r.exits[p] = append(r.exits[p], delivery{x, time.Now(), life})
		r.mu.Unlock()
	}
}

func (r *recorder) of(p process) []delivery {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.exits[p]
}

// told waits until the exit of a process was delivered, with its status.
func (r *recorder) told(p process, status uint32) {
	r.d.t.Helper()
	r.d.eventually(fmt.Sprintf("the exit of %v is delivered", p), func() bool { return len(r.of(p)) > 0 })
	if x := r.of(p)[0]; x.ExitStatus != status {
		r.d.t.Errorf("the exit of %v was delivered with status %d, want %d", p, x.ExitStatus, status)
	}
}

// once checks that no exit was delivered twice. The daemon notes an exit after
// it has told it, so that none is lost; one that was killed in between, which
// are microseconds, tells it again.
func (r *recorder) once(kills []time.Time) {
	r.d.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for p, xs := range r.exits {
		if len(xs) == 2 && slices.ContainsFunc(kills, func(k time.Time) bool { return k.After(xs[0].at) && k.Sub(xs[0].at) < 5*time.Millisecond }) {
			r.d.t.Logf("the exit of %v was delivered in the moment of a kill, and again: %v", p, xs)
		} else if len(xs) > 1 {
			r.d.t.Errorf("the exit of %v was delivered %d times: %v", p, len(xs), xs)
		}
	}
}

// eventually waits for a condition, at most 10 s. why says more if it does not
// come.
func (d *daemon) eventually(what string, ok func() bool, why ...func() string) {
	d.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			for _, f := range why {
				what += "\n" + f()
			}
			d.t.Fatalf("10 s have passed and still not: %s", what)
		}
	}
}

// context bounds one operation.
func (d *daemon) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 30*time.Second)
}

// empty checks that the namespace has nothing any more, over the API.
func (d *daemon) empty(ctx context.Context) {
	d.t.Helper()
	fail := func(what string, v any) { d.t.Helper(); d.t.Errorf("left in the store: %s %v", what, v) }
	tasks, err := d.v.Tasks().List(ctx)
	if err != nil || len(tasks) > 0 {
		fail("tasks", fmt.Sprint(tasks, err))
	}
	leases, err := d.v.Leases().List(ctx)
	if err != nil || len(leases) > 0 {
		fail("leases", fmt.Sprint(leases, err))
	}
	images, err := d.v.Images().List(ctx)
	if err != nil || len(images) > 0 {
		fail("images", fmt.Sprint(images, err))
	}
	ingests, err := d.v.Content().Statuses(ctx)
	if err != nil || len(ingests) > 0 {
		fail("ingests", fmt.Sprint(ingests, err))
	}
	if err := d.v.Content().Walk(ctx, func(i content.Info) error { fail("content", i); return nil }); err != nil {
		d.t.Error(err)
	}
	for _, name := range []string{overlay.Name, native.Name} {
		s, err := d.v.Snapshots(name)
		if err == nil {
			err = s.Walk(ctx, func(i snapshot.Info) error { fail("snapshot", i); return nil })
		}
		if err != nil {
			d.t.Error(err)
		}
	}
}
