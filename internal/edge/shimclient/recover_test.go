package shimclient

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/task"
)

// A daemon that dies while it creates: after its next start nothing is left,
// whatever the stage was, and the name is free.
//
// contract: 5.4.1
// promise: P6
func TestRecoverUnfinished(t *testing.T) {
	for name, cut := range map[string]func(h *host, b bundle){
		"created, not answered": func(h *host, b bundle) {},
		"endpoint not recorded": func(h *host, b bundle) {
			os.Remove(b.file(fileBootstrap)) // the shim's own note is there, or its socket's name is guessed
			os.Remove(b.file(fileAddress))
		},
		"shim died as well": func(h *host, b bundle) { unix.Kill(h.shims()[0], unix.SIGKILL) },
	} {
		t.Run(name, func(t *testing.T) {
			h := realHost(t)
			h.start()
			pid := h.run("a", "/bin/sleep", "1000")
			b := h.m.bundle(key{"test", "a"})
			h.stop()
			if err := os.WriteFile(b.file(fileCreating), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			cut(h, b)
			h.start()
			h.recover()
			if _, err := h.store.Get(t.Context(), "a", ""); !errdefs.IsNotFound(err) {
				t.Errorf("get: %v", err)
			}
			until(t, "its process ends", func() bool { return dead(int(pid)) })
			h.nothing()
		})
	}
}

// contract: 5.4.1
// promise: P6
func TestRecoverWithoutStore(t *testing.T) {
	h := fakeHost(t, script{})
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	h.stop()
	h.rec.fail = errors.New("the store is ill")
	h.start()
	h.recover()
	h.rec.fail = nil
	if p := mustGet(t, h, "a"); p.Status != task.StatusCreated {
		t.Errorf("a task whose record could not be read is %+v", p)
	}
	h.end("a")
	h.clean()
}

// A task that was made before the scan is not taken for what an earlier daemon left.
//
// contract: 5.4.1
func TestScanSparesTheLiving(t *testing.T) {
	h := fakeHost(t, script{})
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	before := h.m.find(key{"test", "a"})
	h.recover()
	if h.m.find(key{"test", "a"}) != before {
		t.Error("the living task was recovered")
	}
	h.end("a")
	h.clean()
}

// A thousand bundles of which nothing lives do not keep anybody waiting.
//
// promise: P12
func TestRecoverMany(t *testing.T) {
	h := fakeHost(t, script{})
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	h.stop()
	for i := range 1000 {
		b := h.m.bundle(key{"test", container.ID(fmt.Sprintf("dead%d", i))})
		if err := os.MkdirAll(b.path, 0o700); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			if err := b.record(endpoint{3, "unix:///nonexistent/" + fmt.Sprint(i), "ttrpc"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	got := h.collect()
	h.start()
	began := time.Now()
	if err := h.m.Scan(); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("scan took %s", d)
	}
	done := make(chan error, 1)
	go func() { done <- h.m.Recover(t.Context()) }()
	if p := mustGet(t, h, "a"); p.Status != task.StatusCreated {
		t.Errorf("a is %+v", p)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if l, err := h.store.List(t.Context()); err != nil || len(l) != 1 {
		t.Errorf("list: %v %v", l, err)
	}
	if want := []string{"exit dead0 255", "delete 255"}; !slices.Equal(got.of("dead0"), want) {
		t.Errorf("events of a dead one %q, want %q", got.of("dead0"), want)
	}
	h.end("a")
	h.clean()
}

// What comes twice is published once, what comes late not at all, and a
// deletion never before its exit.
//
// contract: 1.6.8, 13.17, 13.18
func TestEventsOnce(t *testing.T) {
	h := fakeHost(t, script{})
	got := h.collect()
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	at := time.Now().UTC()
	send := func(p event.Payload, topic string) {
		t.Helper()
		if err := h.m.Publish(t.Context(), event.Envelope{Namespace: "test", Topic: topic, Event: p}); err != nil {
			t.Fatal(err)
		}
	}
	exec := event.TaskExit{ContainerID: "a", ID: "x", Pid: 5, ExitStatus: 1, ExitedAt: at}
	send(exec, event.TopicTaskExit)
	send(exec, event.TopicTaskExit)
	again := exec
	again.Pid = 6 // another exec of the same name
	send(again, event.TopicTaskExit)
	del := event.TaskDelete{ContainerID: "a", Pid: 4711, ExitStatus: 9, ExitedAt: at}
	send(del, event.TopicTaskDelete) // before its exit
	send(event.TaskExit{ContainerID: "a", ID: "a", Pid: 4711, ExitStatus: 9, ExitedAt: at}, event.TopicTaskExit)
	send(del, event.TopicTaskDelete)
	if err := h.store.Kill(t.Context(), "a", "", 9, true); err != nil {
		t.Fatal(err)
	}
	if x, err := h.store.Delete(t.Context(), "a"); err != nil || x.Status != 9 {
		t.Errorf("delete %+v %v: the recorded exit is 9", x, err)
	}
	send(del, event.TopicTaskDelete) // late
	want := []string{"exit x 1", "exit x 1", "exit a 9", "delete 9"}
	until(t, "the events are there", func() bool { return len(got.of("a")) >= len(want) })
	if !slices.Equal(got.of("a"), want) {
		t.Errorf("events %q, want %q", got.of("a"), want)
	}
	h.clean()
	// A new task of the same name has its own.
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	send(event.TaskExit{ContainerID: "a", ID: "a", Pid: 4711, ExitStatus: 2, ExitedAt: at}, event.TopicTaskExit)
	until(t, "its exit is there", func() bool { return len(got.of("a")) == len(want)+1 })
	h.end("a")
	h.clean()
}

// A daemon that is killed when a task has ended and was deleted, before the shim
// could tell, leaves it to the next one to hear of that.
//
// promise: P11
// contract: 5.4.1
func TestEndHeardAfterRestart(t *testing.T) {
	h := fakeHost(t, script{Forgets: true})
	if _, err := h.store.Create(t.Context(), "a", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	h.stop()
	h.opt.Timeouts.Grace, h.opt.Timeouts.Load = 2*time.Second, 20*time.Second
	h.start()
	if err := h.m.Scan(); err != nil {
		t.Fatal(err)
	}
	got := h.collect()
	told := make(chan error, 1)
	go func() { // as its shim does
		at := time.Now()
		err := h.m.Publish(t.Context(), event.Envelope{Timestamp: at, Namespace: "test", Topic: event.TopicTaskExit, Event: event.TaskExit{ContainerID: "a", ID: "a", Pid: 4711, ExitStatus: 7, ExitedAt: at}})
		if err == nil {
			err = h.m.Publish(t.Context(), event.Envelope{Timestamp: at, Namespace: "test", Topic: event.TopicTaskDelete, Event: event.TaskDelete{ContainerID: "a", Pid: 4711, ExitStatus: 7, ExitedAt: at}})
		}
		told <- err
	}()
	h.recover()
	if err := <-told; err != nil {
		t.Error(err)
	}
	want := []string{"exit a 7", "delete 7"}
	until(t, "the end is told", func() bool { return len(got.of("a")) >= len(want) })
	if !slices.Equal(got.of("a"), want) {
		t.Errorf("%q, want %q", got.of("a"), want)
	}
	h.clean()
}

// contract: 5.1.1, 13.20
func TestBundlePermissions(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give a directory away")
	}
	for name, c := range map[string]struct {
		spec string
		mode os.FileMode
		gid  uint32
	}{
		"host's root": {`{"process":{}}`, 0o700, 0},
		"user namespace": {`{"process":{},"linux":{"namespaces":[{"type":"user"}],"gidMappings":[{"containerID":5,"hostID":7},{"containerID":0,"hostID":1234}]}}`,
			0o710, 1234},
		"mapping without namespace": {`{"process":{},"linux":{"gidMappings":[{"containerID":0,"hostID":1234}]}}`, 0o700, 0},
		"namespace that maps root":  {`{"process":{},"linux":{"namespaces":[{"type":"user"}],"gidMappings":[{"containerID":0,"hostID":0}]}}`, 0o700, 0},
	} {
		dir := t.TempDir()
		b := bundle{path: filepath.Join(dir, "s", "ns", "a"), work: filepath.Join(dir, "r", "ns", "a")}
		s, err := parseSpec([]byte(c.spec))
		if err != nil {
			t.Fatal(err)
		}
		if made, err := b.make([]byte(c.spec), s); !made || err != nil {
			t.Fatal(made, err)
		}
		var st unix.Stat_t
		if err := unix.Lstat(b.path, &st); err != nil {
			t.Fatal(err)
		}
		if os.FileMode(st.Mode&0o777) != c.mode || st.Gid != c.gid {
			t.Errorf("%s: mode %o group %d, want %o %d", name, st.Mode&0o777, st.Gid, c.mode, c.gid)
		}
		if made, err := b.make([]byte(c.spec), s); made || !errdefs.IsAlreadyExists(err) {
			t.Errorf("made twice: %v %v", made, err)
		}
		if err := b.remove(); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{b.path, b.work, filepath.Join(filepath.Dir(b.path), ".a")} {
			if _, err := os.Lstat(p); !os.IsNotExist(err) {
				t.Errorf("%s is left: %v", p, err)
			}
		}
	}
}

// contract: 5.2.6
func TestAddresses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		"unix:///run/s":           "unix /run/s",
		"unix://\x00/old/shim":    "unix @/old/shim",
		"unix://@/old/shim":       "unix @/old/shim",
		"\x00/containerd-shim/x":  "unix @/containerd-shim/x",
		"@x":                      "unix @x",
		path:                      "unix " + path,
		"/no/such/file":           "unix @/no/such/file",
		"vsock://3:1024":          "vsock 3:1024",
		"hvsock:///run/vm.s:1024": "hvsock /run/vm.s:1024",
	} {
		network, rest, err := splitAddress(in)
		if got := network + " " + rest; err != nil || got != want {
			t.Errorf("%q is %q (%v), want %q", in, got, err, want)
		}
	}
	for _, bad := range []string{"", "x", "tcp://1.2.3.4:5", "unix://", "vsock://3", "vsock://a:b", "hvsock://:1", "hvsock:///x"} {
		if _, _, err := splitAddress(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if e := (endpoint{Address: "grpc+vsock://3:5", Version: 3}).normal(); e.Protocol != "grpc" || e.Address != "vsock://3:5" {
		t.Errorf("normal form %+v", e)
	}
}
