// Package crash kills the daemon, at random moments and at named ones, and
// looks at what the next one finds: containers that run on, exits that are
// told once, stores without damage, and in the end nothing left behind.
package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
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
)

// binDir has gantryd and its shim: $GANTRY_BIN, or freshly built.
var binDir string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			fmt.Println("skipped: the tests of crashes need root, they run containers")
			return 0
		}
		binDir = os.Getenv("GANTRY_BIN")
		if binDir == "" {
			dir, err := os.MkdirTemp("", "gantry-bin")
			if err != nil {
				fmt.Println(err)
				return 1
			}
			defer os.RemoveAll(dir)
			binDir = dir
			build := exec.Command("go", "build", "-tags", "seccomp", "-o", dir+"/", "./cmd/gantryd", "./cmd/containerd-shim-runc-v2")
			build.Dir = "../.."
			if out, err := build.CombinedOutput(); err != nil {
				fmt.Printf("%v: %v\n%s", build, err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

// daemon is a gantryd with root, state and sockets of its own, and the
// namespace that the test works in, which no one else on the machine has.
type daemon struct {
	t    *testing.T
	dir  string
	ns   namespace.ID
	cmd  *exec.Cmd
	done chan error
	log  *os.File
	c    *client.Client
	v    view.View
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "gc")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, dir: dir, ns: namespace.ID(fmt.Sprintf("crash-%d-%s", os.Getpid(), filepath.Base(dir)))}
	config := fmt.Sprintf("version = 4\nroot = %q\nstate = %q\n[plugins.'io.containerd.server.v1.grpc']\naddress = %q\n[plugins.'io.containerd.server.v1.ttrpc']\naddress = %q\n[plugins.'io.containerd.shim.v1.manager']\nsocket_dir = %q\n",
		dir+"/root", dir+"/state", d.socket(), d.socket()+".ttrpc", dir+"/shims")
	if err := os.WriteFile(dir+"/config.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if d.log, err = os.Create(dir + "/log"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.stop()
		if t.Failed() {
			if b, err := os.ReadFile(dir + "/log"); err == nil {
				t.Logf("the daemon's log:\n%s", b[max(0, len(b)-30000):])
			}
		}
		d.sweep()
		d.log.Close()
		os.RemoveAll(dir)
	})
	return d
}

func (d *daemon) socket() string { return d.dir + "/s" }

// spawn runs the daemon and does not wait for it.
func (d *daemon) spawn(env ...string) {
	d.t.Helper()
	d.cmd = exec.Command(filepath.Join(binDir, "gantryd"), "--config", d.dir+"/config.toml")
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.Env = append(append(os.Environ(), "GOTRACEBACK=all"), env...)
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.done = make(chan error, 1)
	go func(cmd *exec.Cmd, done chan error) { done <- cmd.Wait() }(d.cmd, d.done)
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
	for deadline := time.Now().Add(20 * time.Second); ; {
		// gRPC waits longer and longer between its attempts; this does not.
		c, err := net.Dial("unix", d.socket())
		if err == nil {
			c.Close()
			break
		}
		select {
		case err := <-d.done:
			d.done <- err
			return fmt.Errorf("the daemon has ended: %w", err)
		case <-time.After(time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the daemon does not serve within 20 s: %w", err)
		}
	}
	if d.c != nil {
		d.c.Close()
	}
	var err error
	if d.c, err = client.Dial(d.socket()); err != nil {
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

// kill is kill -9.
func (d *daemon) kill() {
	d.cmd.Process.Kill()
	<-d.done
	d.cmd = nil
}

// stop ends the daemon with SIGTERM, and with kill -9 if it does not obey.
func (d *daemon) stop() {
	if d.c != nil {
		d.c.Close()
		d.c = nil
	}
	if d.cmd == nil {
		return
	}
	d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
	case <-time.After(15 * time.Second):
		d.t.Error("the daemon did not end within 15 s of SIGTERM")
		d.cmd.Process.Kill()
		<-d.done
	}
	d.cmd = nil
}

// processes are those whose command line names this daemon's directory or
// namespace.
func (d *daemon) processes() map[int]string {
	out := map[int]string{}
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if err != nil || !bytes.Contains(b, []byte(d.dir+"/")) && !bytes.Contains(b, []byte(d.ns)) {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(e, "/")[2])
		if err == nil && pid != os.Getpid() {
			out[pid] = strings.ReplaceAll(string(b), "\x00", " ")
		}
	}
	return out
}

// mounts are those of this daemon.
func (d *daemon) mounts() []string {
	var out []string
	b, _ := os.ReadFile("/proc/self/mountinfo")
	for _, l := range strings.Split(string(b), "\n") {
		if strings.Contains(l, d.dir+"/") {
			out = append(out, l)
		}
	}
	return out
}

// cgroups are those of the test's namespace.
func (d *daemon) cgroups() []string {
	var out []string
	filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && strings.Contains(path, string(d.ns)) {
			out = append(out, path)
		}
		return nil
	})
	return out
}

// runcState is where shims keep what they know of the containers of the
// test's namespace.
func (d *daemon) runcState() string { return filepath.Join("/run/containerd/runc", string(d.ns)) }

// leftovers is what a daemon that was emptied and stopped should have removed.
func (d *daemon) leftovers() []string {
	var left []string
	for pid, args := range d.processes() {
		left = append(left, fmt.Sprintf("process %d: %s", pid, args))
	}
	for _, m := range d.mounts() {
		left = append(left, "mount "+m)
	}
	for _, c := range d.cgroups() {
		// The parent that is named after the namespace is shared by its
		// containers, so none of them removes it; containerd leaves it too.
		if filepath.Base(c) != string(d.ns) {
			left = append(left, "cgroup "+c)
		}
	}
	below := func(what, pattern string) {
		found, _ := filepath.Glob(pattern) // names with a dot as well
		for _, f := range found {
			if filepath.Base(f) != ".lock" { // of the shims, for all of the directory
				left = append(left, what+" "+f)
			}
		}
	}
	const tasks = "/io.containerd.runtime.v2.task/*/*"
	below("bundle", d.dir+"/state"+tasks)
	below("work directory", d.dir+"/root"+tasks)
	below("shim socket", d.dir+"/shims/*")
	below("runtime state", d.runcState()+"/*")
	below("ingest", d.dir+"/root/io.containerd.content.v1.content/ingest/*")
	below("blob", d.dir+"/root/io.containerd.content.v1.content/blobs/*/*")
	below("snapshot", d.dir+"/root/io.containerd.snapshotter.v1.*/snapshots/*")
	below("temporary mount", d.dir+"/root/tmpmounts/*")
	filepath.WalkDir(d.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type()&(fs.ModeNamedPipe|fs.ModeSocket) != 0 {
			left = append(left, fmt.Sprintf("%v %s", e.Type(), path))
		}
		return nil
	})
	return left
}

// sweep removes what a failed test left, so that the next one starts clean.
func (d *daemon) sweep() {
	for pid := range d.processes() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, c := range d.cgroups() {
		if b, err := os.ReadFile(c + "/cgroup.procs"); err == nil {
			for _, f := range strings.Fields(string(b)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
					syscall.Kill(pid, syscall.SIGKILL)
				}
			}
		}
	}
	for range 20 {
		mounts := d.mounts()
		if len(mounts) == 0 {
			break
		}
		for _, l := range mounts {
			if f := strings.Fields(l); len(f) > 4 {
				syscall.Unmount(f[4], syscall.MNT_DETACH)
			}
		}
	}
	for range 50 {
		cgroups := d.cgroups()
		if len(cgroups) == 0 {
			break
		}
		for i := len(cgroups) - 1; i >= 0; i-- {
			syscall.Rmdir(cgroups[i])
		}
		time.Sleep(10 * time.Millisecond) // for the processes to end
	}
	os.RemoveAll(d.runcState())
}

// fsck opens a copy of the root directory as the next daemon will, completes
// what was interrupted, and returns what is wrong with it. The daemon must not
// run.
func (d *daemon) fsck() []string {
	d.t.Helper()
	dir, err := os.MkdirTemp(d.dir, "fsck")
	if err != nil {
		d.t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if out, err := exec.Command("cp", "-a", "--reflink=auto", d.dir+"/root/.", dir).CombinedOutput(); err != nil {
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
			c, err := net.Dial("unix", d.socket())
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
	c, err := client.Dial(r.d.socket())
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
