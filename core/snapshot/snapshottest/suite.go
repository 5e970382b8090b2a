package snapshottest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
)

// Options say what the store under test can do besides.
type Options struct {
	// RealMounts: its mounts can be mounted here and now, and files seen
	// through them. It needs root.
	RealMounts bool
	// Rebase: Commit may name a parent. Without it that must be ErrUnimplemented.
	Rebase bool
	// Usage: sizes are measured (with RealMounts).
	Usage bool
	// Context is what calls get, for stores that read headers from it; by
	// default the test's.
	Context func(t *testing.T) context.Context
	// Check is called with each store at the end of the test it was opened for.
	Check func(t *testing.T, s snapshot.Store)
}

type suite struct {
	open func(t *testing.T) snapshot.Store
	opts Options
}

// Run runs the suite. open makes an empty store that lasts as long as the test
// it is called with.
func Run(t *testing.T, open func(t *testing.T) snapshot.Store, opts Options) {
	s := suite{open, opts}
	for _, c := range []struct {
		name string
		fn   func(*testing.T, env)
	}{
		{"prepare", testPrepare},
		{"view", testView},
		{"parents", testParents},
		{"mounts", testMounts},
		{"commit", testCommit},
		{"commit of what is not active", testCommitNotActive},
		{"rebase", func(t *testing.T, e env) { testRebase(t, e, opts.Rebase) }},
		{"remove", testRemove},
		{"update", testUpdate},
		{"usage", testUsage},
		{"walk", testWalk},
		{"walk calls the store", testWalkReentrant},
		{"many", testMany},
		{"remote label", testRefLabel},
		{"no key", testNoKey},
		{"concurrency", testConcurrency},
		{"cleanup", testCleanup},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, s.env(t)) })
	}
	if !opts.RealMounts {
		return
	}
	for _, c := range []struct {
		name string
		fn   func(*testing.T, env)
	}{
		{"files", testFiles},
		{"views are read-only", testReadOnly},
		{"siblings", testSiblings},
		{"white-outs", testWhiteouts},
		{"directories replaced", testOpaque},
		{"kinds of files", testKinds},
		{"root directory", testRootDir},
		{"many layers", testChain},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, s.env(t)) })
	}
	if opts.Usage {
		t.Run("sizes", func(t *testing.T) { testSizes(t, s.env(t)) })
	}
	if opts.Rebase {
		t.Run("rebased files", func(t *testing.T) { testRebaseFiles(t, s.env(t)) })
	}
}

// env is one store and the context to call it with.
type env struct {
	snapshot.Store
	ctx context.Context
}

func (s suite) env(t *testing.T) env {
	e := env{s.open(t), t.Context()}
	if s.opts.Context != nil {
		e.ctx = s.opts.Context(t)
	}
	if s.opts.Check != nil {
		t.Cleanup(func() { s.opts.Check(t, e.Store) })
	}
	return e
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// is fails the test unless the class of err is the one that test tells.
func is(t *testing.T, what string, test func(error) bool, err error) {
	t.Helper()
	if err == nil || !test(err) {
		t.Errorf("%s: wrong error %v", what, err)
	}
}

func (e env) prepare(t *testing.T, key, parent string) []mount.Mount {
	t.Helper()
	m, err := e.Prepare(e.ctx, key, parent, nil)
	must(t, err)
	return m
}

func (e env) view(t *testing.T, key, parent string) []mount.Mount {
	t.Helper()
	m, err := e.View(e.ctx, key, parent, nil)
	must(t, err)
	return m
}

func (e env) commit(t *testing.T, name, key string) {
	t.Helper()
	must(t, e.Commit(e.ctx, name, key, snapshot.CommitOptions{}))
}

func (e env) stat(t *testing.T, key string) snapshot.Info {
	t.Helper()
	info, err := e.Stat(e.ctx, key)
	must(t, err)
	return info
}

// layer makes the committed snapshot name.
func (e env) layer(t *testing.T, name, parent string) {
	t.Helper()
	e.prepare(t, name+"-active", parent)
	e.commit(t, name, name+"-active")
}

// names are the keys that Walk shows, sorted.
func (e env) names(t *testing.T, filters ...string) []string {
	t.Helper()
	out := []string{}
	must(t, e.Walk(e.ctx, func(i snapshot.Info) error {
		out = append(out, i.Name)
		return nil
	}, filters...))
	slices.Sort(out)
	return out
}

func (e env) expect(t *testing.T, names ...string) {
	t.Helper()
	slices.Sort(names)
	if got := e.names(t); !slices.Equal(got, names) {
		t.Errorf("the store has %q, expected %q", got, names)
	}
}

func testPrepare(t *testing.T, e env) {
	before := time.Now().Add(-time.Second)
	labels := map[string]string{"containerd.io/snapshot/x": "1"}
	m, err := e.Prepare(e.ctx, "a", "", labels)
	must(t, err)
	if len(m) == 0 {
		t.Error("no mounts")
	}
	labels["containerd.io/snapshot/x"] = "changed by the caller"
	i := e.stat(t, "a")
	if i.Name != "a" || i.Parent != "" || i.Kind != snapshot.KindActive || i.Labels["containerd.io/snapshot/x"] != "1" {
		t.Errorf("prepared snapshot is %+v", i)
	}
	if i.CreatedAt.Before(before) || i.CreatedAt.After(time.Now().Add(time.Second)) || !i.UpdatedAt.Equal(i.CreatedAt) {
		t.Errorf("created at %s, updated at %s", i.CreatedAt, i.UpdatedAt)
	}
	_, err = e.Prepare(e.ctx, "a", "", map[string]string{"containerd.io/snapshot/x": "2"})
	is(t, "prepare again", errdefs.IsAlreadyExists, err)
	_, err = e.View(e.ctx, "a", "", nil)
	is(t, "view of the same key", errdefs.IsAlreadyExists, err)
	if again := e.stat(t, "a"); !again.UpdatedAt.Equal(i.UpdatedAt) || !maps.Equal(again.Labels, i.Labels) {
		t.Errorf("a refused prepare changed %+v to %+v", i, again)
	}
	_, err = e.Stat(e.ctx, "b")
	is(t, "stat of nothing", errdefs.IsNotFound, err)
	e.expect(t, "a")
}

func testView(t *testing.T, e env) {
	e.layer(t, "base", "")
	e.view(t, "v", "base")
	if i := e.stat(t, "v"); i.Kind != snapshot.KindView || i.Parent != "base" {
		t.Errorf("view is %+v", i)
	}
	e.view(t, "empty", "")
	_, err := e.View(e.ctx, "v", "base", nil)
	is(t, "view again", errdefs.IsAlreadyExists, err)
	_, err = e.View(e.ctx, "w", "nothing", nil)
	is(t, "view of nothing", errdefs.IsNotFound, err)
	_, err = e.View(e.ctx, "w", "v", nil)
	is(t, "view of a view", errdefs.IsInvalidArgument, err)
	must(t, e.Remove(e.ctx, "v"))
	must(t, e.Remove(e.ctx, "empty"))
	e.expect(t, "base")
}

func testParents(t *testing.T, e env) {
	_, err := e.Prepare(e.ctx, "a", "nothing", nil)
	is(t, "parent that does not exist", errdefs.IsNotFound, err)
	e.prepare(t, "active", "")
	_, err = e.Prepare(e.ctx, "a", "active", nil)
	is(t, "active parent", errdefs.IsInvalidArgument, err)
	e.view(t, "view", "")
	_, err = e.Prepare(e.ctx, "a", "view", nil)
	is(t, "view as parent", errdefs.IsInvalidArgument, err)
	_, err = e.Prepare(e.ctx, "a", "a", nil)
	is(t, "itself as parent", errdefs.IsNotFound, err)
	e.expect(t, "active", "view")
}

func testMounts(t *testing.T, e env) {
	same := func(a, b mount.Mount) bool {
		return a.Type == b.Type && a.Source == b.Source && a.Target == b.Target && slices.Equal(a.Options, b.Options)
	}
	e.layer(t, "base", "")
	for key, want := range map[string][]mount.Mount{"a": e.prepare(t, "a", "base"), "v": e.view(t, "v", "base"), "n": e.prepare(t, "n", "")} {
		got, err := e.Mounts(e.ctx, key)
		must(t, err)
		if !slices.EqualFunc(got, want, same) {
			t.Errorf("mounts of %s are %v, and were %v when it was made", key, got, want)
		}
	}
	_, err := e.Mounts(e.ctx, "base")
	is(t, "mounts of a committed snapshot", errdefs.IsFailedPrecondition, err)
	_, err = e.Mounts(e.ctx, "nothing")
	is(t, "mounts of nothing", errdefs.IsNotFound, err)
}

func testCommit(t *testing.T, e env) {
	_, err := e.Prepare(e.ctx, "a", "", map[string]string{"containerd.io/snapshot/old": "1"})
	must(t, err)
	labels := map[string]string{"containerd.io/snapshot/new": "2"}
	must(t, e.Commit(e.ctx, "A", "a", snapshot.CommitOptions{Labels: labels}))
	i := e.stat(t, "A")
	if i.Name != "A" || i.Kind != snapshot.KindCommitted || i.Parent != "" || !maps.Equal(i.Labels, labels) {
		t.Errorf("committed snapshot is %+v", i)
	}
	_, err = e.Stat(e.ctx, "a")
	is(t, "stat of the active key", errdefs.IsNotFound, err)
	is(t, "commit again", errdefs.IsNotFound, e.Commit(e.ctx, "B", "a", snapshot.CommitOptions{}))

	e.prepare(t, "b", "A")
	is(t, "commit to a name that exists", errdefs.IsAlreadyExists, e.Commit(e.ctx, "A", "b", snapshot.CommitOptions{}))
	if i := e.stat(t, "b"); i.Kind != snapshot.KindActive {
		t.Errorf("after a refused commit it is %s", i.Kind)
	}
	// The parent that it has anyway may be named.
	must(t, e.Commit(e.ctx, "B", "b", snapshot.CommitOptions{Parent: "A"}))
	if i := e.stat(t, "B"); i.Parent != "A" {
		t.Errorf("its parent is %q", i.Parent)
	}
	// The key is free again, and the name can be a parent.
	e.prepare(t, "a", "B")
	e.expect(t, "A", "B", "a")
}

func testCommitNotActive(t *testing.T, e env) {
	e.layer(t, "base", "")
	e.view(t, "v", "base")
	e.view(t, "empty", "")
	for _, key := range []string{"v", "empty", "base"} {
		is(t, "commit of "+key, errdefs.IsFailedPrecondition, e.Commit(e.ctx, "x", key, snapshot.CommitOptions{}))
	}
	is(t, "commit of nothing", errdefs.IsNotFound, e.Commit(e.ctx, "x", "nothing", snapshot.CommitOptions{}))
	e.expect(t, "base", "v", "empty")
}

func testRebase(t *testing.T, e env, can bool) {
	e.layer(t, "base", "")
	e.layer(t, "other", "")
	e.prepare(t, "a", "")
	err := e.Commit(e.ctx, "A", "a", snapshot.CommitOptions{Parent: "base"})
	if !can {
		is(t, "rebase", errdefs.IsNotImplemented, err)
		e.expect(t, "a", "base", "other")
		return
	}
	must(t, err)
	if i := e.stat(t, "A"); i.Parent != "base" || i.Kind != snapshot.KindCommitted {
		t.Errorf("rebased snapshot is %+v", i)
	}
	is(t, "remove of what is a parent now", errdefs.IsFailedPrecondition, e.Remove(e.ctx, "base"))
	e.prepare(t, "b", "base")
	is(t, "rebase away from a parent", errdefs.IsInvalidArgument, e.Commit(e.ctx, "B", "b", snapshot.CommitOptions{Parent: "other"}))
	e.prepare(t, "c", "")
	is(t, "rebase on nothing", errdefs.IsNotFound, e.Commit(e.ctx, "C", "c", snapshot.CommitOptions{Parent: "nothing"}))
	is(t, "rebase on an active one", errdefs.IsInvalidArgument, e.Commit(e.ctx, "C", "c", snapshot.CommitOptions{Parent: "b"}))
	is(t, "rebase on itself", errdefs.IsInvalidArgument, e.Commit(e.ctx, "C", "c", snapshot.CommitOptions{Parent: "c"}))
	e.expect(t, "base", "other", "A", "b", "c")
}

func testRemove(t *testing.T, e env) {
	is(t, "remove of nothing", errdefs.IsNotFound, e.Remove(e.ctx, "nothing"))
	e.layer(t, "A", "")
	e.layer(t, "B", "A")
	e.prepare(t, "c", "B")
	e.view(t, "v", "A")
	is(t, "remove of a grandparent", errdefs.IsFailedPrecondition, e.Remove(e.ctx, "A"))
	is(t, "remove of a parent", errdefs.IsFailedPrecondition, e.Remove(e.ctx, "B"))
	must(t, e.Remove(e.ctx, "c"))
	is(t, "remove again", errdefs.IsNotFound, e.Remove(e.ctx, "c"))
	must(t, e.Remove(e.ctx, "B"))
	is(t, "remove of a view's parent", errdefs.IsFailedPrecondition, e.Remove(e.ctx, "A"))
	must(t, e.Remove(e.ctx, "v"))
	must(t, e.Remove(e.ctx, "A"))
	e.expect(t)
	// All keys can be had again.
	e.layer(t, "A", "")
	e.prepare(t, "c", "A")
	e.expect(t, "A", "c")
}

func testUpdate(t *testing.T, e env) {
	const p = snapshot.LabelPrefix
	_, err := e.Prepare(e.ctx, "a", "", map[string]string{p + "x": "1", p + "y": "1"})
	must(t, err)
	old := e.stat(t, "a")
	for _, c := range []struct {
		update map[string]string
		fields []string
		want   map[string]string
	}{
		{map[string]string{p + "x": "2", p + "z": "2"}, []string{"labels." + p + "x"}, map[string]string{p + "x": "2", p + "y": "1"}},
		{map[string]string{p + "y": ""}, []string{"labels." + p + "y"}, map[string]string{p + "x": "2"}},
		{map[string]string{p + "z": "3"}, nil, map[string]string{p + "z": "3"}},
		{map[string]string{p + "w": "4"}, []string{"labels"}, map[string]string{p + "w": "4"}},
		{nil, []string{"labels"}, nil},
	} {
		got, err := e.Update(e.ctx, snapshot.Info{Name: "a", Parent: "ignored", Kind: snapshot.KindCommitted, Labels: c.update}, c.fields...)
		must(t, err)
		for _, i := range []snapshot.Info{got, e.stat(t, "a")} {
			if !maps.Equal(i.Labels, c.want) {
				t.Errorf("update %v of %v made the labels %v, expected %v", c.fields, c.update, i.Labels, c.want)
			}
			if i.Name != "a" || i.Kind != snapshot.KindActive || i.Parent != "" || !i.CreatedAt.Equal(old.CreatedAt) || i.UpdatedAt.Before(old.UpdatedAt) {
				t.Errorf("update made it %+v, it was %+v", i, old)
			}
		}
	}
	for _, f := range []string{"name", "parent", "kind", "created_at", "nonsense", "labelsx"} {
		_, err := e.Update(e.ctx, snapshot.Info{Name: "a"}, f)
		is(t, "update of "+f, errdefs.IsInvalidArgument, err)
	}
	_, err = e.Update(e.ctx, snapshot.Info{Name: "nothing"})
	is(t, "update of nothing", errdefs.IsNotFound, err)

	e.commit(t, "A", "a")
	e.prepare(t, "child", "A")
	_, err = e.Update(e.ctx, snapshot.Info{Name: "A", Labels: map[string]string{p + "q": "5"}})
	must(t, err)
	if i := e.stat(t, "A"); i.Labels[p+"q"] != "5" || i.Kind != snapshot.KindCommitted {
		t.Errorf("updated committed snapshot is %+v", i)
	}
	is(t, "remove after update", errdefs.IsFailedPrecondition, e.Remove(e.ctx, "A"))
}

func testUsage(t *testing.T, e env) {
	e.layer(t, "A", "")
	e.prepare(t, "a", "A")
	e.view(t, "v", "A")
	for _, key := range []string{"A", "a", "v"} {
		if u, err := e.Usage(e.ctx, key); err != nil || u.Inodes < 0 || u.Size < 0 {
			t.Errorf("usage of %s: %+v, %v", key, u, err)
		}
	}
	_, err := e.Usage(e.ctx, "nothing")
	is(t, "usage of nothing", errdefs.IsNotFound, err)
}

func testWalk(t *testing.T, e env) {
	const l = snapshot.LabelPrefix + "team"
	e.expect(t)
	e.layer(t, "A", "")
	e.layer(t, "B", "A")
	_, err := e.Prepare(e.ctx, "a", "B", map[string]string{l: "red"})
	must(t, err)
	_, err = e.View(e.ctx, "v", "A", map[string]string{l: "blue"})
	must(t, err)
	for _, c := range []struct {
		filters []string
		want    []string
	}{
		{nil, []string{"A", "B", "a", "v"}},
		{[]string{"kind==committed"}, []string{"A", "B"}},
		{[]string{"kind==active"}, []string{"a"}},
		{[]string{"kind==view"}, []string{"v"}},
		{[]string{"name==B"}, []string{"B"}},
		{[]string{"name~=|^[aA]$|"}, []string{"A", "a"}},
		{[]string{"parent==A"}, []string{"B", "v"}},
		{[]string{"parent"}, []string{"B", "a", "v"}},
		{[]string{"parent==A,kind==view"}, []string{"v"}},
		{[]string{"name==A", "kind==view"}, []string{"A", "v"}},
		{[]string{`labels."` + l + `"==red`}, []string{"a"}},
		{[]string{`labels."` + l + `"`}, []string{"a", "v"}},
		{[]string{"name==nothing"}, []string{}},
	} {
		if got := e.names(t, c.filters...); !slices.Equal(got, c.want) {
			t.Errorf("filters %q show %q, expected %q", c.filters, got, c.want)
		}
	}
	is(t, "bad filter", errdefs.IsInvalidArgument, e.Walk(e.ctx, func(snapshot.Info) error { return nil }, "name~=("))
	must(t, e.Walk(e.ctx, func(i snapshot.Info) error {
		want := e.stat(t, i.Name)
		if i.Parent != want.Parent || i.Kind != want.Kind || !i.CreatedAt.Equal(want.CreatedAt) || !i.UpdatedAt.Equal(want.UpdatedAt) || !maps.Equal(i.Labels, want.Labels) {
			t.Errorf("walk shows %+v, stat %+v", i, want)
		}
		return nil
	}))
}

func testWalkReentrant(t *testing.T, e env) {
	for i := range 5 {
		e.prepare(t, fmt.Sprint("k", i), "")
	}
	stop := errors.New("stop")
	n := 0
	err := e.Walk(e.ctx, func(snapshot.Info) error {
		if n++; n == 2 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || n != 2 {
		t.Errorf("walk went on to %d snapshots and returned %v", n, err)
	}
	must(t, e.Walk(e.ctx, func(i snapshot.Info) error { return e.Remove(e.ctx, i.Name) }))
	e.expect(t)
}

// testMany makes more snapshots than a message of a list has (contract 1.2.13).
func testMany(t *testing.T, e env) {
	e.layer(t, "base", "")
	want := []string{"base"}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 32 {
				if _, err := e.Prepare(e.ctx, fmt.Sprintf("k%d-%d", g, i), "base", nil); err != nil {
					t.Error(err)
				}
			}
		}()
		for i := range 32 {
			want = append(want, fmt.Sprintf("k%d-%d", g, i))
		}
	}
	wg.Wait()
	e.expect(t, want...)
}

// testRefLabel checks what the remote protocol needs of any store: the label
// can be found.
func testRefLabel(t *testing.T, e env) {
	labels := map[string]string{snapshot.LabelRef: "sha256:1234", snapshot.LabelPrefix + "cri.layer-digest": "sha256:5678"}
	_, err := e.Prepare(e.ctx, "extract", "", labels)
	if errdefs.IsAlreadyExists(err) {
		t.Skip("it had sha256:1234 already")
	}
	must(t, err)
	if got := e.names(t, `labels."`+snapshot.LabelRef+`"=="sha256:1234"`); !slices.Equal(got, []string{"extract"}) {
		t.Errorf("found %q by its reference", got)
	}
	must(t, e.Commit(e.ctx, "sha256:1234", "extract", snapshot.CommitOptions{Labels: labels}))
	if i := e.stat(t, "sha256:1234"); !maps.Equal(i.Labels, labels) {
		t.Errorf("labels of the layer are %v", i.Labels)
	}
	if got := e.names(t, `labels."`+snapshot.LabelRef+`"=="sha256:1234",kind==committed`); !slices.Equal(got, []string{"sha256:1234"}) {
		t.Errorf("found %q by its reference", got)
	}
}

func testNoKey(t *testing.T, e env) {
	for what, call := range map[string]func() error{
		"stat":    func() error { _, err := e.Stat(e.ctx, ""); return err },
		"update":  func() error { _, err := e.Update(e.ctx, snapshot.Info{}); return err },
		"usage":   func() error { _, err := e.Usage(e.ctx, ""); return err },
		"mounts":  func() error { _, err := e.Mounts(e.ctx, ""); return err },
		"prepare": func() error { _, err := e.Prepare(e.ctx, "", "", nil); return err },
		"view":    func() error { _, err := e.View(e.ctx, "", "", nil); return err },
		"commit":  func() error { return e.Commit(e.ctx, "x", "", snapshot.CommitOptions{}) },
		"remove":  func() error { return e.Remove(e.ctx, "") },
	} {
		if err := call(); !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
			t.Errorf("%s without a key: %v", what, err)
		}
	}
	e.prepare(t, "a", "")
	is(t, "commit without a name", errdefs.IsInvalidArgument, e.Commit(e.ctx, "", "a", snapshot.CommitOptions{}))
	e.expect(t, "a")
}

func testConcurrency(t *testing.T, e env) {
	e.layer(t, "base", "")
	const n = 16
	// exactly runs fn n times at once: one succeeds, the others get a class.
	exactly := func(what string, class func(error) bool, fn func(i int) error) {
		t.Helper()
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			wg.Add(1)
			go func() {
				defer wg.Done()
				errs[i] = fn(i)
			}()
		}
		wg.Wait()
		done := 0
		for _, err := range errs {
			if err == nil {
				done++
			} else if !class(err) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if done != 1 {
			t.Errorf("%s: %d of %d succeeded", what, done, n)
		}
	}
	exactly("prepare", errdefs.IsAlreadyExists, func(int) error {
		_, err := e.Prepare(e.ctx, "a", "base", nil)
		return err
	})
	exactly("commit", func(err error) bool { return errdefs.IsNotFound(err) || errdefs.IsAlreadyExists(err) }, func(int) error {
		return e.Commit(e.ctx, "A", "a", snapshot.CommitOptions{})
	})
	for i := range n {
		e.prepare(t, fmt.Sprint("b", i), "A")
	}
	exactly("commit to one name", errdefs.IsAlreadyExists, func(i int) error {
		return e.Commit(e.ctx, "B", fmt.Sprint("b", i), snapshot.CommitOptions{})
	})
	exactly("remove", errdefs.IsNotFound, func(int) error { return e.Remove(e.ctx, "B") })
	// A parent is removed while children come: either the child or nothing stands on it.
	e.layer(t, "P", "")
	var wg sync.WaitGroup
	var removed, prepared error
	wg.Add(2)
	go func() { defer wg.Done(); removed = e.Remove(e.ctx, "P") }()
	go func() { defer wg.Done(); _, prepared = e.Prepare(e.ctx, "p", "P", nil) }()
	wg.Wait()
	if (removed == nil) == (prepared == nil) {
		t.Errorf("remove of a parent: %v, prepare on it: %v", removed, prepared)
	}
}

func testCleanup(t *testing.T, e env) {
	c, ok := e.Store.(snapshot.Cleaner)
	if !ok {
		t.Skip("not a Cleaner")
	}
	e.layer(t, "A", "")
	e.prepare(t, "a", "A")
	must(t, e.Remove(e.ctx, "a"))
	if err := c.Cleanup(e.ctx); errdefs.IsNotImplemented(err) {
		t.Skip("not a Cleaner behind the wire")
	} else {
		must(t, err)
	}
	must(t, c.Cleanup(e.ctx))
	e.expect(t, "A")
	e.prepare(t, "a", "A")
}
