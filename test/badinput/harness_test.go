package badinput

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/containerrpc"
	"github.com/gantryd/gantry/internal/edge/wire/contentrpc"
	"github.com/gantryd/gantry/internal/edge/wire/imagerpc"
	"github.com/gantryd/gantry/internal/edge/wire/leaserpc"
	"github.com/gantryd/gantry/internal/edge/wire/namespacerpc"
	"github.com/gantryd/gantry/internal/edge/wire/sandboxrpc"
	"github.com/gantryd/gantry/internal/edge/wire/snapshotrpc"
	"github.com/gantryd/gantry/internal/edge/wire/taskrpc"
	"github.com/gantryd/gantry/internal/edge/wire/transferrpc"
	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/daemontest"
)

// binDir has gantryd and its shim.
var binDir string

func TestMain(m *testing.M) { os.Exit(critest.Main(m, "../..", &binDir)) }

// snapshotters are those that every test host has.
var snapshotters = []string{"overlayfs", "native"}

// daemon is a gantryd with directories of its own, and a connection to it.
type daemon struct {
	*daemontest.Daemon
	t    *testing.T
	conn *grpc.ClientConn
	top  string // the snapshot that pullBusybox has made
}

// start runs a daemon for the length of a test. In the end it must still be
// the same process, must not have caught a panic, and all that is left of it
// are its files.
func start(t *testing.T, extra ...string) *daemon {
	t.Helper()
	d := &daemon{Daemon: daemontest.New(t, filepath.Join(binDir, "gantryd"), 4, strings.Join(extra, "\n")), t: t}
	d.Env = []string{"TMPDIR=" + d.Dir + "/tmp"}
	for _, sub := range []string{"tmp", "canary"} {
		if err := os.Mkdir(filepath.Join(d.Dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(d.Dir+"/canary/alive", []byte("tweet"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.end)
	d.conn = d.dial()
	return d
}

// dial connects for the length of the test.
func (d *daemon) dial() *grpc.ClientConn {
	d.t.Helper()
	conn, err := grpc.NewClient("unix://"+d.Address(), wire.DialOptions()...)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	return conn
}

// end stops the daemon and complains about what should not be.
func (d *daemon) end() {
	if err := d.Stop(); err != nil {
		d.t.Error(err)
	}
	b, err := os.ReadFile(d.Dir + "/log")
	if err != nil {
		d.t.Error(err)
	}
	for _, l := range strings.Split(string(b), "\n") {
		if strings.Contains(l, "request panicked") || strings.HasPrefix(l, "panic: ") {
			d.t.Errorf("a panic: %.3000s", l)
		}
	}
	for _, l := range d.Leftovers() {
		d.t.Errorf("left behind: %s", l)
	}
	d.canary(d.t)
}

// canary checks that what is beside the daemon's directories is as it was.
func (d *daemon) canary(t testing.TB) {
	t.Helper()
	if b, err := os.ReadFile(d.Dir + "/canary/alive"); err != nil || string(b) != "tweet" {
		t.Errorf("the canary: %q, %v", b, err)
	}
	if e, err := os.ReadDir(d.Dir + "/canary"); err != nil || len(e) != 1 {
		t.Errorf("the canary's cage: %v, %v", e, err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(d.Dir+"/canary/alive", &st); err != nil || st.Nlink != 1 || st.Mode&0o777 != 0o600 {
		t.Errorf("the canary has %d links and mode %o: %v", st.Nlink, st.Mode, err)
	}
	if info, err := os.Stat(d.Dir + "/canary"); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the canary's cage has mode %v: %v", info.Mode(), err)
	}
}

// cgroups is the parent of the cgroups that this daemon's containers get.
func (d *daemon) cgroups() string { return "/" + d.Mark }

// timeout bounds one operation of a test.
func (d *daemon) timeout() context.Context {
	ctx, cancel := context.WithTimeout(d.t.Context(), 30*time.Second)
	d.t.Cleanup(cancel)
	return ctx
}

const ns namespace.ID = "default"

func (d *daemon) images() image.Store         { return imagerpc.NewClient(d.conn, ns, "") }
func (d *daemon) content() content.Store      { return contentrpc.NewClient(d.conn, ns, "") }
func (d *daemon) containers() container.Store { return containerrpc.NewClient(d.conn, ns, "") }
func (d *daemon) sandboxes() sandbox.Store    { return sandboxrpc.NewClient(d.conn, ns, "") }
func (d *daemon) leases() lease.Store         { return leaserpc.NewClient(d.conn, ns) }
func (d *daemon) tasks() task.Store           { return taskrpc.NewClient(d.conn, ns, "") }
func (d *daemon) namespaces() namespace.Store { return namespacerpc.NewClient(d.conn) }
func (d *daemon) snapshots(name string) snapshot.Store {
	return snapshotrpc.NewClient(d.conn, ns, "", name)
}
func (d *daemon) transfers() *transferrpc.Client { return transferrpc.NewClient(d.conn, ns, "") }

// collect runs the garbage collector to its end.
func (d *daemon) collect() {
	d.t.Helper()
	ctx := d.timeout()
	l, err := d.leases().Create(ctx, lease.Lease{})
	if err == nil {
		err = d.leases().Delete(ctx, l.ID, true)
	}
	if err != nil {
		d.t.Fatalf("collect: %v", err)
	}
}

// inventory is all that the daemon keeps, after a collection: every record of
// every namespace, every file below root and state, mounts, processes and cgroups.
func (d *daemon) inventory() []string {
	d.t.Helper()
	d.collect()
	ctx := d.timeout()
	var out []string
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	check := func(err error) {
		d.t.Helper()
		if err != nil {
			d.t.Fatalf("inventory: %v", err)
		}
	}
	spaces, err := d.namespaces().List(ctx)
	check(err)
	for _, space := range spaces {
		id := space.ID
		leases, err := leaserpc.NewClient(d.conn, id).List(ctx)
		check(err)
		for _, l := range leases {
			add("%s: lease %s", id, l.ID)
		}
		images, err := imagerpc.NewClient(d.conn, id, "").List(ctx)
		check(err)
		for _, i := range images {
			add("%s: image %s %s", id, i.Name, i.Target.Digest)
		}
		check(containerrpc.NewClient(d.conn, id, "").Walk(ctx, func(c container.Container) error { add("%s: container %s", id, c.ID); return nil }))
		sandboxes, err := sandboxrpc.NewClient(d.conn, id, "").List(ctx)
		check(err)
		for _, s := range sandboxes {
			add("%s: sandbox %s", id, s.ID)
		}
		for _, name := range snapshotters {
			check(snapshotrpc.NewClient(d.conn, id, "", name).Walk(ctx, func(i snapshot.Info) error { add("%s: %s snapshot %s %s", id, name, i.Name, i.Kind); return nil }))
		}
		check(contentrpc.NewClient(d.conn, id, "").Walk(ctx, func(i content.Info) error { add("%s: blob %s", id, i.Digest); return nil }))
		ingests, err := contentrpc.NewClient(d.conn, id, "").Statuses(ctx)
		check(err)
		for _, i := range ingests {
			add("%s: ingest %s", id, i.Ref)
		}
		tasks, err := taskrpc.NewClient(d.conn, id, "").List(ctx)
		check(err)
		for _, p := range tasks {
			add("%s: task %s %s", id, p.ContainerID, p.Status)
		}
	}
	for _, sub := range []string{"root", "state", "shims", "tmp", "canary", "ipam"} {
		err := filepath.WalkDir(filepath.Join(d.Dir, sub), func(p string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			// The files of snapshots are counted by their records.
			if err == nil && e.IsDir() && (filepath.Base(p) == "fs" || filepath.Base(p) == "work" || filepath.Base(p) == "rootfs" || filepath.Base(filepath.Dir(p)) == "snapshots") {
				add("directory %s", strings.TrimPrefix(p, d.Dir))
				return fs.SkipDir
			}
			if err == nil && !e.IsDir() && e.Name() != ".lock" { // locks are never removed
				add("file %s", strings.TrimPrefix(p, d.Dir))
			}
			return err
		})
		check(err)
	}
	out = append(out, d.Leftovers()...)
	slices.Sort(out)
	return out
}

// unchanged compares the inventory with an earlier one. What a failed
// operation gives up may be taken apart in the background for a moment.
func (d *daemon) unchanged(before []string) {
	d.t.Helper()
	if diff := d.difference(before); diff != "" {
		d.t.Errorf("left behind:\n%s", diff)
	}
}

func (d *daemon) difference(before []string) string {
	var b strings.Builder
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		b.Reset()
		now := d.inventory()
		for _, x := range now {
			if !slices.Contains(before, x) {
				fmt.Fprintf(&b, "  + %s\n", x)
			}
		}
		for _, x := range before {
			if !slices.Contains(now, x) {
				fmt.Fprintf(&b, "  - %s\n", x)
			}
		}
		if b.Len() == 0 || time.Now().After(deadline) {
			return b.String()
		}
	}
}

// refused checks an error: its class (one of several), the words that it must
// have, and that it does not end in nothing but a deadline.
func refused(t testing.TB, err error, words []string, classes ...error) {
	t.Helper()
	if err == nil {
		t.Error("it was accepted")
		return
	}
	if !slices.ContainsFunc(classes, func(c error) bool { return errors.Is(err, c) }) {
		t.Errorf("the class of the error is none of %v: %v", classes, err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not say %q: %v", w, err)
		}
	}
	for _, w := range []string{"failed to", "error while", "<nil>", "%!"} {
		// What runc's library says is its own, and looked for by clients.
		if own, _, _ := strings.Cut(err.Error(), "unable to start container process"); strings.Contains(own, w) {
			t.Errorf("the error has %q in it: %v", w, err)
		}
	}
	if len(err.Error()) > 6000 {
		t.Errorf("the error is %d bytes long: %.300s", len(err.Error()), err)
	}
}

// outgoing is timeout with the namespace's header.
func (d *daemon) outgoing() context.Context { return wire.Outgoing(d.timeout(), ns, "") }
