// Package tasktest is what a task.Store has to do, as a test. Each outcome
// that the comments of task.Store promise is asked for here, of the fake
// runtime, of real shims, and of the wire.
package tasktest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
)

// Program is what a process is asked to do.
type Program struct {
	// Exit makes it end by itself with this status; nil lets it run until it
	// gets a signal.
	Exit *uint32
}

// Exits is a Program that ends with status.
func Exits(status uint32) Program { return Program{Exit: &status} }

// Runs is a Program that runs until it is killed.
func Runs() Program { return Program{} }

// Env is a store to be tested and what it needs.
type Env struct {
	Store     task.Store
	Namespace namespace.ID
	// Container makes a container's record; the test env removes it again.
	Container func(t *testing.T, id container.ID, p Program)
	// Broken makes the record of a container with a defect: "no spec", "bad
	// spec" or "unknown runtime".
	Broken func(t *testing.T, id container.ID, defect string)
	// ExecSpec is a process to be executed.
	ExecSpec func(p Program) typed.Any
	// Resources are harmless ones, for Update.
	Resources typed.Any
	// Events is the bus on which the store's events appear.
	Events event.Bus
}

// Open makes an Env for one test.
type Open func(t *testing.T) Env

// limit is the most that any single wait of the suite takes.
const limit = 20 * time.Second

// Run tests the stores that open makes.
func Run(t *testing.T, open Open) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *env)
	}{
		{"lifecycle", lifecycle},
		{"create refused", createRefused},
		{"not found", notFound},
		{"delete while running", deleteRunning},
		{"kill ended", killEnded},
		{"wait", wait},
		{"exec", execs},
		{"exec refused", execRefused},
		{"pause", pause},
		{"list", list},
		{"pids", pids},
		{"update", update},
		{"metrics", metrics},
		{"checkpoint", checkpoint},
		{"events", events},
		{"races", races},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*limit)
			t.Cleanup(cancel)
			e := &env{Env: open(t), ctx: ctx}
			c.test(t, e)
		})
	}
}

type env struct {
	Env
	ctx context.Context
}

// task makes a container and its task, which the test removes again.
func (e *env) task(t *testing.T, id container.ID, p Program) uint32 {
	t.Helper()
	e.Container(t, id, p)
	pid, err := e.Store.Create(e.ctx, id, task.CreateOptions{})
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	t.Cleanup(func() { e.remove(t, id) })
	return pid
}

func (e *env) started(t *testing.T, id container.ID, p Program) uint32 {
	t.Helper()
	e.task(t, id, p)
	pid, err := e.Store.Start(e.ctx, id, "")
	if err != nil {
		t.Fatalf("start: %v", err)
	}
	return pid
}

// remove ends a task whatever its state, if it is still there.
func (e *env) remove(t *testing.T, id container.ID) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	p, err := e.Store.Get(ctx, id, "")
	if errdefs.IsNotFound(err) {
		return
	}
	if p.Status != task.StatusStopped {
		if p.Status == task.StatusPaused {
			if err := e.Store.Resume(ctx, id); err != nil {
				t.Errorf("resume %s: %v", id, err)
			}
		}
		if err := e.Store.Kill(ctx, id, "", 9, true); err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("kill %s: %v", id, err)
		}
		if _, err := e.Store.Wait(ctx, id, ""); err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("wait %s: %v", id, err)
		}
	}
	if _, err := e.Store.Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		t.Errorf("delete %s: %v", id, err)
	}
}

func (e *env) status(t *testing.T, id container.ID, exec task.ExecID, want task.Status) task.Process {
	t.Helper()
	p, err := e.Store.Get(e.ctx, id, exec)
	if err != nil {
		t.Fatalf("get: %v", err)
	}
	if p.Status != want {
		t.Fatalf("status %v, want %v", p.Status, want)
	}
	return p
}

// is fails unless err has the class that check tests.
func is(t *testing.T, what string, err error, check func(error) bool, class string) {
	t.Helper()
	if err == nil || !check(err) {
		t.Errorf("%s: error %v, want %s", what, err, class)
	}
}

func lifecycle(t *testing.T, e *env) {
	created := time.Now()
	pid := e.task(t, "life", Exits(3))
	p := e.status(t, "life", "", task.StatusCreated)
	if pid == 0 || p.Pid != pid || p.ID != "life" || p.ContainerID != "life" {
		t.Fatalf("created as %d, is %+v", pid, p)
	}
	started, err := e.Store.Start(e.ctx, "life", "")
	if err != nil {
		t.Fatal(err)
	}
	if started != pid {
		t.Errorf("created as pid %d, started as %d", pid, started)
	}
	x, err := e.Store.Wait(e.ctx, "life", "")
	if err != nil {
		t.Fatal(err)
	}
	if x.Status != 3 || x.At.Before(created.Add(-time.Second)) || x.At.After(time.Now().Add(time.Second)) {
		t.Errorf("exit %+v, want status 3, now", x)
	}
	p = e.status(t, "life", "", task.StatusStopped)
	if p.ExitStatus != 3 || p.Pid != pid || !p.ExitedAt.Equal(x.At) {
		t.Errorf("stopped as %+v, waited %+v", p, x)
	}
	d, err := e.Store.Delete(e.ctx, "life")
	if err != nil {
		t.Fatal(err)
	}
	if d.Status != 3 || d.Pid != pid || d.ID != "life" || !d.At.Equal(x.At) {
		t.Errorf("deleted as %+v, waited %+v", d, x)
	}
	_, err = e.Store.Get(e.ctx, "life", "")
	is(t, "get deleted", err, errdefs.IsNotFound, "not found")

	// The name is free again; one that never ran can be deleted.
	if _, err := e.Store.Create(e.ctx, "life", task.CreateOptions{}); err != nil {
		t.Fatalf("create again: %v", err)
	}
	if _, err := e.Store.Delete(e.ctx, "life"); err != nil {
		t.Fatalf("delete created: %v", err)
	}
}

func createRefused(t *testing.T, e *env) {
	for _, id := range []container.ID{"", "../up", "a/b", container.ID(strings.Repeat("a", 77))} {
		_, err := e.Store.Create(e.ctx, id, task.CreateOptions{})
		is(t, fmt.Sprintf("create %q", id), err, func(err error) bool {
			return errdefs.IsInvalidArgument(err) || errdefs.IsNotFound(err)
		}, "invalid argument or not found")
	}
	_, err := e.Store.Create(e.ctx, "nobody", task.CreateOptions{})
	is(t, "create without container", err, errdefs.IsNotFound, "not found")
	for defect, check := range map[string]func(error) bool{
		"no spec": errdefs.IsInvalidArgument, "bad spec": errdefs.IsInvalidArgument, "unknown runtime": errdefs.IsNotFound,
	} {
		id := container.ID(strings.ReplaceAll(defect, " ", "-"))
		e.Broken(t, id, defect)
		_, err := e.Store.Create(e.ctx, id, task.CreateOptions{})
		is(t, "create with "+defect, err, check, "its class")
		_, err = e.Store.Get(e.ctx, id, "")
		is(t, "get after failed create", err, errdefs.IsNotFound, "not found")
	}
	e.task(t, "twice", Runs())
	_, err = e.Store.Create(e.ctx, "twice", task.CreateOptions{})
	is(t, "create twice", err, errdefs.IsAlreadyExists, "already exists")
	e.status(t, "twice", "", task.StatusCreated)
	if l, err := e.Store.List(e.ctx); err != nil || len(l) != 1 {
		t.Errorf("list after failed creates: %v %v", l, err)
	}
}

func notFound(t *testing.T, e *env) {
	const id = "nobody"
	calls := func(exec task.ExecID) map[string]error {
		out := map[string]error{}
		_, out["start"] = e.Store.Start(e.ctx, id, exec)
		_, out["get"] = e.Store.Get(e.ctx, id, exec)
		out["kill"] = e.Store.Kill(e.ctx, id, exec, 9, false)
		out["resize"] = e.Store.Resize(e.ctx, id, exec, 80, 24)
		out["close stdin"] = e.Store.CloseStdin(e.ctx, id, exec)
		_, out["wait"] = e.Store.Wait(e.ctx, id, exec)
		return out
	}
	all := calls("")
	for what, err := range calls("x") {
		all["exec "+what] = err
	}
	_, all["delete"] = e.Store.Delete(e.ctx, id)
	_, all["delete exec"] = e.Store.DeleteExec(e.ctx, id, "x")
	all["exec"] = e.Store.Exec(e.ctx, id, "x", task.ExecOptions{Spec: e.ExecSpec(Runs())})
	all["pause"] = e.Store.Pause(e.ctx, id)
	all["resume"] = e.Store.Resume(e.ctx, id)
	_, all["pids"] = e.Store.Pids(e.ctx, id)
	all["update"] = e.Store.Update(e.ctx, id, e.Resources, nil)
	_, all["checkpoint"] = e.Store.Checkpoint(e.ctx, id, "", typed.Any{})
	for what, err := range all {
		is(t, what+" without task", err, errdefs.IsNotFound, "not found")
	}
	e.started(t, "some", Runs())
	exec := map[string]error{}
	_, exec["start"] = e.Store.Start(e.ctx, "some", "x")
	_, exec["get"] = e.Store.Get(e.ctx, "some", "x")
	_, exec["wait"] = e.Store.Wait(e.ctx, "some", "x")
	_, exec["delete"] = e.Store.DeleteExec(e.ctx, "some", "x")
	exec["kill"] = e.Store.Kill(e.ctx, "some", "x", 9, false)
	exec["resize"] = e.Store.Resize(e.ctx, "some", "x", 80, 24)
	exec["close stdin"] = e.Store.CloseStdin(e.ctx, "some", "x")
	for what, err := range exec {
		is(t, what+" of an unknown exec", err, errdefs.IsNotFound, "not found")
	}
}

func deleteRunning(t *testing.T, e *env) {
	e.started(t, "busy", Runs())
	_, err := e.Store.Delete(e.ctx, "busy")
	is(t, "delete running", err, errdefs.IsFailedPrecondition, "failed precondition")
	e.status(t, "busy", "", task.StatusRunning)
	if err := e.Store.Kill(e.ctx, "busy", "", 9, false); err != nil {
		t.Fatal(err)
	}
	x, err := e.Store.Wait(e.ctx, "busy", "")
	if err != nil || x.Status != 137 {
		t.Fatalf("killed: %+v %v, want status 137", x, err)
	}
	x, err = e.Store.Delete(e.ctx, "busy")
	if err != nil || x.Status != 137 {
		t.Fatalf("deleted: %+v %v, want status 137", x, err)
	}
}

func killEnded(t *testing.T, e *env) {
	e.started(t, "ended", Exits(0))
	if _, err := e.Store.Wait(e.ctx, "ended", ""); err != nil {
		t.Fatal(err)
	}
	is(t, "kill ended", e.Store.Kill(e.ctx, "ended", "", 9, false), errdefs.IsNotFound, "not found")
	if err := e.Store.Kill(e.ctx, "ended", "", 9, true); err != nil {
		t.Errorf("kill all of an ended task: %v", err)
	}
	e.status(t, "ended", "", task.StatusStopped)
}

func wait(t *testing.T, e *env) {
	e.started(t, "w", Runs())
	short, cancel := context.WithTimeout(e.ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := e.Store.Wait(short, "w", ""); !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("wait with a deadline: %v", err)
	}
	var wg sync.WaitGroup
	for range 5 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			x, err := e.Store.Wait(e.ctx, "w", "")
			if err != nil || x.Status != 137 {
				t.Errorf("wait: %+v %v", x, err)
			}
		}()
	}
	if err := e.Store.Kill(e.ctx, "w", "", 9, true); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	// One that has ended already.
	if x, err := e.Store.Wait(e.ctx, "w", ""); err != nil || x.Status != 137 {
		t.Errorf("wait for ended: %+v %v", x, err)
	}
}

func execs(t *testing.T, e *env) {
	e.started(t, "c", Runs())
	if err := e.Store.Exec(e.ctx, "c", "quick", task.ExecOptions{Spec: e.ExecSpec(Exits(7))}); err != nil {
		t.Fatal(err)
	}
	e.status(t, "c", "quick", task.StatusCreated)
	is(t, "exec twice", e.Store.Exec(e.ctx, "c", "quick", task.ExecOptions{Spec: e.ExecSpec(Runs())}), errdefs.IsAlreadyExists, "already exists")
	pid, err := e.Store.Start(e.ctx, "c", "quick")
	if err != nil || pid == 0 {
		t.Fatalf("start exec: %d %v", pid, err)
	}
	x, err := e.Store.Wait(e.ctx, "c", "quick")
	if err != nil || x.Status != 7 {
		t.Fatalf("wait for exec: %+v %v", x, err)
	}
	p := e.status(t, "c", "quick", task.StatusStopped)
	if p.ID != "quick" || p.ContainerID != "c" || p.ExitStatus != 7 {
		t.Errorf("exec is %+v", p)
	}
	d, err := e.Store.DeleteExec(e.ctx, "c", "quick")
	if err != nil || d.Status != 7 || d.Pid != pid || d.ID != "quick" {
		t.Errorf("delete exec: %+v %v", d, err)
	}
	_, err = e.Store.Get(e.ctx, "c", "quick")
	is(t, "get deleted exec", err, errdefs.IsNotFound, "not found")

	if err := e.Store.Exec(e.ctx, "c", "long", task.ExecOptions{Spec: e.ExecSpec(Runs())}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Store.Start(e.ctx, "c", "long"); err != nil {
		t.Fatal(err)
	}
	_, err = e.Store.DeleteExec(e.ctx, "c", "long")
	is(t, "delete running exec", err, errdefs.IsFailedPrecondition, "failed precondition")
	if err := e.Store.Kill(e.ctx, "c", "long", 9, false); err != nil {
		t.Fatal(err)
	}
	if x, err := e.Store.Wait(e.ctx, "c", "long"); err != nil || x.Status != 137 {
		t.Errorf("killed exec: %+v %v", x, err)
	}
	is(t, "kill ended exec", e.Store.Kill(e.ctx, "c", "long", 9, false), errdefs.IsNotFound, "not found")
	e.status(t, "c", "", task.StatusRunning)
}

func execRefused(t *testing.T, e *env) {
	e.started(t, "c", Exits(0))
	if _, err := e.Store.Wait(e.ctx, "c", ""); err != nil {
		t.Fatal(err)
	}
	spec := task.ExecOptions{Spec: e.ExecSpec(Runs())}
	is(t, "exec in ended", e.Store.Exec(e.ctx, "c", "x", spec), errdefs.IsFailedPrecondition, "failed precondition")
	is(t, "exec without id", e.Store.Exec(e.ctx, "c", "", spec), errdefs.IsInvalidArgument, "invalid argument")
	is(t, "exec with bad id", e.Store.Exec(e.ctx, "c", "a/b", spec), errdefs.IsInvalidArgument, "invalid argument")
	is(t, "exec without spec", e.Store.Exec(e.ctx, "c", "x", task.ExecOptions{}), errdefs.IsInvalidArgument, "invalid argument")
	_, err := e.Store.DeleteExec(e.ctx, "c", "")
	is(t, "delete exec without id", err, errdefs.IsInvalidArgument, "invalid argument")
}

func pause(t *testing.T, e *env) {
	e.started(t, "p", Runs())
	if err := e.Store.Pause(e.ctx, "p"); err != nil {
		t.Fatal(err)
	}
	e.status(t, "p", "", task.StatusPaused)
	_, err := e.Store.Delete(e.ctx, "p")
	is(t, "delete paused", err, errdefs.IsFailedPrecondition, "failed precondition")
	if err := e.Store.Resume(e.ctx, "p"); err != nil {
		t.Fatal(err)
	}
	e.status(t, "p", "", task.StatusRunning)
}

func list(t *testing.T, e *env) {
	if l, err := e.Store.List(e.ctx); err != nil || len(l) != 0 {
		t.Fatalf("list nothing: %v %v", l, err)
	}
	e.started(t, "b", Runs())
	e.task(t, "a", Runs())
	l, err := e.Store.List(e.ctx)
	if err != nil {
		t.Fatal(err)
	}
	got := map[container.ID]task.Status{}
	for _, p := range l {
		got[p.ContainerID] = p.Status
		if p.ID != string(p.ContainerID) || p.Pid == 0 {
			t.Errorf("listed %+v", p)
		}
	}
	if len(l) != 2 || got["a"] != task.StatusCreated || got["b"] != task.StatusRunning {
		t.Errorf("listed %v", got)
	}
}

func pids(t *testing.T, e *env) {
	pid := e.started(t, "c", Runs())
	if err := e.Store.Exec(e.ctx, "c", "x", task.ExecOptions{Spec: e.ExecSpec(Runs())}); err != nil {
		t.Fatal(err)
	}
	xpid, err := e.Store.Start(e.ctx, "c", "x")
	if err != nil {
		t.Fatal(err)
	}
	l, err := e.Store.Pids(e.ctx, "c")
	if err != nil {
		t.Fatal(err)
	}
	var first, exec bool
	for _, p := range l {
		first = first || p.Pid == pid && p.Info.IsZero()
		exec = exec || p.Pid == xpid && p.Info.URL == "containerd.runc.v1.ProcessDetails" && string(p.Info.Value) == "\n\x01x"
	}
	if !first || !exec {
		t.Errorf("pids %+v: want %d alone and %d as exec x", l, pid, xpid)
	}
}

func update(t *testing.T, e *env) {
	e.started(t, "c", Runs())
	is(t, "update with nothing", e.Store.Update(e.ctx, "c", typed.Any{}, nil), errdefs.IsInvalidArgument, "invalid argument")
	if err := e.Store.Update(e.ctx, "c", e.Resources, nil); err != nil {
		t.Error(err)
	}
}

func metrics(t *testing.T, e *env) {
	e.started(t, "m1", Runs())
	e.started(t, "m2", Runs())
	for _, c := range []struct {
		filters []string
		want    []string
	}{
		{nil, []string{"m1", "m2"}},
		{[]string{"id==m2"}, []string{"m2"}},
		{[]string{"id==m1", "id==m2"}, []string{"m1", "m2"}},
		{[]string{"id==m1,namespace==" + string(e.Namespace)}, []string{"m1"}},
		{[]string{"namespace==elsewhere"}, nil},
		{[]string{"id==none"}, nil},
	} {
		l, err := e.Store.Metrics(e.ctx, c.filters...)
		if err != nil {
			t.Fatalf("metrics %q: %v", c.filters, err)
		}
		var got []string
		for _, m := range l {
			got = append(got, m.ID)
			if m.At.IsZero() || m.Data.URL == "" || strings.HasPrefix(m.Data.URL, "type.googleapis.com/") {
				t.Errorf("metric %+v", m)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("metrics %q are of %q, want %q", c.filters, got, c.want)
		}
	}
	_, err := e.Store.Metrics(e.ctx, "id==")
	is(t, "bad filter", err, errdefs.IsInvalidArgument, "invalid argument")
}

func checkpoint(t *testing.T, e *env) {
	e.started(t, "c", Runs())
	_, err := e.Store.Checkpoint(e.ctx, "c", "", typed.Any{})
	is(t, "checkpoint", err, errdefs.IsNotImplemented, "not implemented")
	e.status(t, "c", "", task.StatusRunning)
}

// events: each once, in the order of contract 1.6.8.
func events(t *testing.T, e *env) {
	sub, err := e.Events.Subscribe(e.ctx, `topic~="^/tasks/"`)
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	pid := e.started(t, "ev", Runs())
	if err := e.Store.Exec(e.ctx, "ev", "x", task.ExecOptions{Spec: e.ExecSpec(Exits(4))}); err != nil {
		t.Fatal(err)
	}
	xpid, err := e.Store.Start(e.ctx, "ev", "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Store.Wait(e.ctx, "ev", "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Store.DeleteExec(e.ctx, "ev", "x"); err != nil {
		t.Fatal(err)
	}
	if err := e.Store.Pause(e.ctx, "ev"); err != nil {
		t.Fatal(err)
	}
	if err := e.Store.Resume(e.ctx, "ev"); err != nil {
		t.Fatal(err)
	}
	if err := e.Store.Kill(e.ctx, "ev", "", 9, false); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Store.Wait(e.ctx, "ev", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Store.Delete(e.ctx, "ev"); err != nil {
		t.Fatal(err)
	}
	// A second task of the same name: what comes after its first event
	// cannot be the first one's.
	if _, err := e.Store.Create(e.ctx, "ev", task.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for {
		ctx, cancel := context.WithTimeout(e.ctx, limit)
		env, err := sub.Next(ctx)
		cancel()
		if err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
		if env.Namespace != e.Namespace {
			t.Errorf("event %s of namespace %q", env.Topic, env.Namespace)
		}
		if c, ok := env.Event.(event.TaskCreate); ok && len(got) > 0 && c.ContainerID == "ev" {
			break
		}
		got = append(got, describe(env, pid, xpid))
	}
	want := []string{
		"/tasks/create ev", "/tasks/start ev", "/tasks/exec-added ev x", "/tasks/exec-started ev x",
		"/tasks/exit ev x 4", "/tasks/paused ev", "/tasks/resumed ev", "/tasks/exit ev ev 137", "/tasks/delete ev 137",
	}
	if !slices.Equal(got, want) {
		t.Errorf("events\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func describe(e event.Envelope, pid, xpid uint32) string {
	wrong := func(got, want uint32) string {
		if got != want {
			return fmt.Sprintf(" (pid %d, want %d)", got, want)
		}
		return ""
	}
	switch p := e.Event.(type) {
	case event.TaskCreate:
		return e.Topic + " " + p.ContainerID + wrong(p.Pid, pid)
	case event.TaskStart:
		return e.Topic + " " + p.ContainerID + wrong(p.Pid, pid)
	case event.TaskExecAdded:
		return e.Topic + " " + p.ContainerID + " " + p.ExecID
	case event.TaskExecStarted:
		return e.Topic + " " + p.ContainerID + " " + p.ExecID + wrong(p.Pid, xpid)
	case event.TaskExit:
		want := pid
		if p.ID != p.ContainerID {
			want = xpid
		}
		return fmt.Sprintf("%s %s %s %d%s", e.Topic, p.ContainerID, p.ID, p.ExitStatus, wrong(p.Pid, want))
	case event.TaskDelete:
		return fmt.Sprintf("%s %s %d%s", e.Topic, p.ContainerID, p.ExitStatus, wrong(p.Pid, pid))
	case event.TaskPaused:
		return e.Topic + " " + p.ContainerID
	case event.TaskResumed:
		return e.Topic + " " + p.ContainerID
	}
	return fmt.Sprintf("%s %T", e.Topic, e.Event)
}

// races: several that delete and kill at once. One deletes; all others find
// nothing, or the process ended.
func races(t *testing.T, e *env) {
	e.started(t, "r", Runs())
	if err := e.Store.Kill(e.ctx, "r", "", 9, true); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Store.Wait(e.ctx, "r", ""); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var deleted int
	for range 4 {
		wg.Add(2)
		go func() {
			defer wg.Done()
			_, err := e.Store.Delete(e.ctx, "r")
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				deleted++
			} else if !errdefs.IsNotFound(err) {
				t.Errorf("delete: %v", err)
			}
		}()
		go func() {
			defer wg.Done()
			if err := e.Store.Kill(e.ctx, "r", "", 9, false); !errdefs.IsNotFound(err) {
				t.Errorf("kill of an ended task: %v", err)
			}
		}()
	}
	wg.Wait()
	if deleted != 1 {
		t.Errorf("deleted %d times", deleted)
	}
	_, err := e.Store.Wait(e.ctx, "r", "")
	if !errdefs.IsNotFound(err) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait for deleted: %v", err)
	}
}
