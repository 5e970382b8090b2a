package gc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/graph"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/internal/engine/memory"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// parse reads objects from lines: "<kind> <id> [live] [holds <kind>:<id> ...]
// [<label>=<value> ...]". Kinds are their first letter, "k" is content, "g" an
// ingest, "x" a container, "b" a sandbox; snapshots have ids "<snapshotter>/<key>".
// Labels are without "containerd.io/gc.".
func parse(t *testing.T, lines string) []graph.Object {
	t.Helper()
	node := func(kind, id string) graph.Node {
		n := graph.Node{Namespace: "default", ID: id}
		n.Kind = map[string]graph.Kind{"k": graph.KindContent, "s": graph.KindSnapshot, "i": graph.KindImage, "x": graph.KindContainer, "b": graph.KindSandbox, "l": graph.KindLease, "g": graph.KindIngest}[kind]
		if n.Kind == 0 {
			t.Fatalf("no kind %q", kind)
		}
		if n.Kind == graph.KindSnapshot {
			n.Snapshotter, n.ID, _ = strings.Cut(id, "/")
		}
		if ns, id, ok := strings.Cut(n.ID, "@"); ok {
			n.ID = ns
			n.Namespace = "other"
			_ = id
		}
		return n
	}
	var all []graph.Object
	for line := range strings.Lines(lines) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		o := graph.Object{Node: node(f[0], f[1])}
		for _, w := range f[2:] {
			if k, v, ok := strings.Cut(w, "="); ok {
				if o.Labels == nil {
					o.Labels = map[string]string{}
				}
				o.Labels[graph.LabelPrefix+k] = v
			} else if k, id, ok := strings.Cut(w, ":"); ok {
				o.Holds = append(o.Holds, node(k, id))
			} else if w == "live" {
				o.Live = true
			} else {
				t.Fatalf("word %q", w)
			}
		}
		all = append(all, o)
	}
	return all
}

func ids(nodes []graph.Node) string {
	out := []string{}
	for _, n := range nodes {
		out = append(out, n.ID)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// contract: 4.3.1, 1.5.1, 1.5.2, 1.5.3, 1.5.4, 1.5.6, 1.5.7, 1.5.8, 1.5.9, 4.2.4, 4.1.8, 13.16
func TestPlan(t *testing.T) {
	past, future := now.Add(-time.Second).Format(time.RFC3339), now.Add(time.Hour).Format(time.RFC3339)
	recent, old := now.Add(-time.Hour).Format(time.RFC3339), now.Add(-48*time.Hour).Format(time.RFC3339)
	for _, c := range []struct{ name, objects, gone string }{
		{"nothing", "", ""},
		{"nothing leads to it", "k a\n s o/b\n g c", "a b c"},
		{"roots", "x c\n b p\n i img\n l lease\n k a root=1\n s o/b root=\n g live live", ""},
		{"image and its manifests", "i img k:m\n k m ref.content.config=c ref.content.l.0=l ref.content.m.1=n\n k c\n k l\n k n\n k z", "z"},
		{"separators", "k a root=1 ref.content=b ref.content.x=c ref.content/y=d ref.contentx=e ref.contents.0=f\n k b\n k c\n k d\n k e\n k f", "e f"},
		{"content to snapshot", "k a root=1 ref.snapshot.o=p ref.snapshot.o/1=q ref.snapshot.n=p\n s o/p\n s o/q\n s n/r\n s o/r\n s n/p", "r r"},
		{"snapshot and its parents", "x c s:o/b\n s o/b s:o/p\n s o/p s:o/pp\n s o/pp\n s n/pp", "pp"},
		{"labels of a container and a sandbox", "x c ref.content.a=k1 ref.snapshot.o=s1 ref.image=i1\n b p ref.content=k2\n k k1\n k k2\n k k3\n s o/s1\n i i1 expire=" + past, "k3"},
		{"reference to an image", "k a root=1 ref.image.x=i\n i i k:b expire=" + past + "\n i j k:d expire=" + past + "\n k b\n k d", "d j"},
		{"cycle", "k a ref.content=b\n k b ref.content=a\n k c root= ref.content=d\n k d ref.content=c", "a b"},
		{"expired lease", "l l k:a k:b expire=" + past + "\n k a\n k b root=1", "a l"},
		{"lease that will expire", "l l k:a expire=" + future + "\n k a", ""},
		{"lease with an unreadable expiry", "l l k:a expire=soon\n k a", ""},
		{"lease holds all kinds", "l l k:a s:o/b i:c g:d k:none\n k a\n s o/b\n i c k:e expire=" + past + "\n g d\n k e", ""},
		{"lease follows labels", "l l k:a s:o/s\n k a ref.content.l.0=b\n k b\n s o/s s:o/p ref.content=c\n s o/p\n k c", ""},
		{"flat lease does not", "l l k:a s:o/s flat=\n k a ref.content.l.0=b\n k b\n s o/s s:o/p ref.content=c\n s o/p\n k c", "b c"},
		{"flat and full", "l l k:a flat=1\n l m k:a\n k a ref.content.l.0=b\n k b", ""},
		{"flat reached again", "l l k:b flat=1\n k a root= ref.content=b\n k b ref.content=c\n k c", ""},
		{"expired image", "i i k:a expire=" + past + "\n k a", "a i"},
		{"image that will expire", "i i k:a expire=" + future + "\n k a", ""},
		{"ingest", "g a live\n g b\n g c\n l l g:c", "b"},
		{"back reference", "k a bref.container=c bref.container.x=none\n k b bref.container=none\n x c\n k d ref.content=e bref.content/1=a\n k e", "b"},
		{"back reference to a snapshot and an image", "x c s:o/b\n s o/b\n k d bref.snapshot.o=b\n k e bref.snapshot.n=b\n i i k:d\n s o/s bref.image=i\n s o/u bref.image.z=j", "e u"},
		{"condition", "i i k:a\n k a cond.snapshot.o=usedat<24h|new cond.snapshot.o/1=usedat<24h|old cond.snapshot.o/2=usedat>24h|older cond.snapshot.o/3=usedat<1m,usedat>40h|either\n" +
			"s o/new cond.value-usedat=" + recent + "\n s o/old cond.value-usedat=" + old + "\n s o/older cond.value-usedat=" + old + "\n s o/either cond.value-usedat=" + old, "old"},
		{"condition of nothing", "k a cond.snapshot.o=usedat<24h|s\n s o/s cond.value-usedat=" + recent, "a s"},
		{"conditions that nobody knows", "i i k:a\n k a cond.snapshot.o=phase==full|s cond.snapshot.o/1=usedat<24h|unused cond.snapshot.o/2=usedat<much|s\n s o/s cond.value-usedat=" + recent + "\n s o/unused", "s unused"},
		{"namespaces do not see each other", "k a@ root=1 ref.content=b\n k b\n k b@", "b"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := ids(Plan(parse(t, c.objects), now)); got != c.gone {
				t.Errorf("gone %q, want %q", got, c.gone)
			}
		})
	}
}

// TestPlanAgainstModel compares with a model that is too slow but obvious: from
// each object, walk backwards until there is a root.
//
// contract: 4.3.1
// promise: P9
func TestPlanAgainstModel(t *testing.T) {
	kinds := []string{"k", "k", "k", "s", "s", "i", "x", "l"}
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		n := 2 + r.IntN(14)
		names := make([]string, n)
		for i := range names {
			names[i] = kinds[r.IntN(len(kinds))]
			if id := fmt.Sprintf("n%d", i); names[i] == "s" {
				names[i] += ":o/" + id
			} else {
				names[i] += ":" + id
			}
		}
		var lines []string
		type edge struct{ from, to int }
		edges := map[edge]bool{} // to lives if from lives
		root := make([]bool, n)
		for i, name := range names {
			kind, id, _ := strings.Cut(name, ":")
			line := kind + " " + id
			expired := r.IntN(2) == 0 && (kind == "i" || kind == "l")
			if expired {
				line += " expire=" + now.Add(-time.Hour).Format(time.RFC3339)
			}
			root[i] = !expired && strings.Contains("i l x", kind)
			if strings.Contains("k s", kind) && r.IntN(6) == 0 {
				line += " root=1"
				root[i] = true
			}
			for e := range r.IntN(3) {
				to := r.IntN(n)
				tk, tid, _ := strings.Cut(names[to], ":")
				label := map[string]string{"k": "content", "i": "image", "s": "snapshot.o", "x": "container"}[tk]
				switch {
				case kind == "l" && tk != "l" && tk != "x":
					line += " " + names[to]
					edges[edge{i, to}] = true
				case label == "" || kind == "l":
				case kind != "x" && r.IntN(3) == 0:
					line += fmt.Sprintf(" bref.%s/%d=%s", label, e, strings.TrimPrefix(tid, "o/"))
					edges[edge{to, i}] = true
				case tk != "x":
					line += fmt.Sprintf(" ref.%s/%d=%s", label, e, strings.TrimPrefix(tid, "o/"))
					edges[edge{i, to}] = true
				}
			}
			lines = append(lines, line)
		}
		live := slices.Clone(root)
		for range n {
			for e := range edges {
				live[e.to] = live[e.to] || live[e.from]
			}
		}
		var want []string
		for i, name := range names {
			if !live[i] && name[0] != 'x' {
				want = append(want, name[strings.LastIndexAny(name, ":/")+1:])
			}
		}
		slices.Sort(want)
		if got := ids(Plan(parse(t, strings.Join(lines, "\n")), now)); got != strings.Join(want, " ") {
			t.Fatalf("seed %d: gone %q, want %q:\n%s", seed, got, want, strings.Join(lines, "\n"))
		}
	}
}

// store is a graph of content that nothing keeps unless it is in keep.
type store struct {
	mu       sync.Mutex // guards all below
	objects  map[string]bool
	keep     map[string]bool
	data     map[string]bool
	sweeps   int
	runs     int
	took     time.Duration
	fail     error
	block    chan struct{}
	observer func(bool)
}

func newStore() *store {
	return &store{objects: map[string]bool{}, keep: map[string]bool{}, data: map[string]bool{}}
}

func (s *store) Observe(fn func(bool)) { s.observer = fn }

func (s *store) add(id string) {
	s.mu.Lock()
	s.objects[id], s.data[id] = true, true
	s.mu.Unlock()
	s.observer(false)
}

func (s *store) deleted() { s.observer(true) }

func (s *store) left() (records, data int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.objects), len(s.data)
}

func (s *store) collections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.runs
}

func (s *store) list() []graph.Object {
	var all []graph.Object
	for id := range s.objects {
		o := graph.Object{Node: graph.Node{Kind: graph.KindContent, ID: id}}
		if s.keep[id] {
			o.Labels = map[string]string{labelRoot: "1"}
		}
		all = append(all, o)
	}
	return all
}

func (s *store) Objects(_ context.Context, fn func(graph.Object) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.runs++
	for _, o := range s.list() {
		if err := fn(o); err != nil {
			return err
		}
	}
	return nil
}

func (s *store) Sweep(_ context.Context, plan func([]graph.Object) []graph.Node) (graph.Freed, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweeps++
	gone := plan(s.list())
	for _, n := range gone {
		delete(s.objects, n.ID)
	}
	time.Sleep(s.took) // only under synctest, where it is the clock
	return graph.Freed{Records: len(gone)}, nil
}

func (s *store) Reclaim(context.Context) (f graph.Freed, err error) {
	if s.block != nil {
		<-s.block
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return f, s.fail
	}
	for id := range maps.Keys(s.data) {
		if !s.objects[id] {
			delete(s.data, id)
			f.Blobs++
		}
	}
	return f, nil
}

// contract: 4.3.5, 1.3.19, 1.3.24, 13.15, 4.2.5
func TestSyncDelete(t *testing.T) {
	s := newStore()
	c := New(s, Defaults(), nil)
	ctx := t.Context()
	images := SyncDeleteImages(memory.NewImages(), c)
	leases := SyncDeleteLeases(memory.NewLeases(), c)
	img := image.Image{Name: "x"}
	img.Target.Digest, img.Target.Size, img.Target.MediaType = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", 1, "m"
	for _, sync := range []bool{false, true} {
		for name, del := range map[string]func() error{
			"image": func() error {
				if _, err := images.Create(ctx, img); err != nil {
					return err
				}
				return images.Delete(ctx, "x", image.DeleteOptions{Sync: sync})
			},
			"lease": func() error {
				if _, err := leases.Create(ctx, lease.Lease{ID: "l"}); err != nil {
					return err
				}
				return leases.Delete(ctx, "l", sync)
			},
		} {
			s.add("garbage")
			if err := del(); err != nil {
				t.Fatal(err)
			}
			if records, data := s.left(); (records == 0) != sync || (data == 0) != sync {
				t.Errorf("%s, sync %t: %d records, %d data left", name, sync, records, data)
			}
		}
	}
	// Nothing is collected for a deletion that failed.
	before := s.collections()
	if err := images.Delete(ctx, "none", image.DeleteOptions{Sync: true}); err == nil || s.collections() != before {
		t.Errorf("delete of nothing: %v, %d collections", err, s.collections()-before)
	}
	// Another store's trouble is not the caller's.
	s.fail = errors.New("sick")
	if err := c.ScheduleAndWait(ctx); err != nil {
		t.Errorf("ScheduleAndWait: %v", err)
	}
	if _, err := c.Collect(ctx); !errors.Is(err, s.fail) {
		t.Errorf("Collect: %v", err)
	}
}

// A caller that comes while a collection runs gets one that begins later, and
// those that wait share it.
//
// contract: 4.3.5
func TestCollectIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore()
		s.block = make(chan struct{})
		c := New(s, Defaults(), nil)
		var wg sync.WaitGroup
		wg.Go(func() { c.Collect(t.Context()) })
		synctest.Wait()
		s.add("late")
		for range 5 {
			wg.Go(func() {
				if err := c.ScheduleAndWait(t.Context()); err != nil {
					t.Error(err)
				}
				if _, data := s.left(); data != 0 {
					t.Error("returned before the data was gone")
				}
			})
		}
		synctest.Wait()
		canceled, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.ScheduleAndWait(canceled); !errors.Is(err, context.Canceled) {
			t.Errorf("wait that was given up: %v", err)
		}
		close(s.block)
		wg.Wait()
		if n := s.collections(); n != 2 {
			t.Errorf("%d collections, want 2", n)
		}
		// Close waits for the one under way.
		s.block = make(chan struct{})
		wg.Go(func() { c.Collect(t.Context()) })
		synctest.Wait()
		closed := false
		wg.Go(func() { c.Close(); closed = true })
		synctest.Wait()
		if closed {
			t.Error("Close did not wait")
		}
		close(s.block)
		wg.Wait()
		if _, err := c.Collect(t.Context()); !errdefs.IsUnavailable(err) {
			t.Errorf("collect after Close: %v", err)
		}
	})
}

// contract: 4.3.4
func TestSchedule(t *testing.T) {
	run := func(t *testing.T, cfg Config, fn func(s *store, c *Collector)) {
		synctest.Test(t, func(t *testing.T) {
			s := newStore()
			c := New(s, cfg, nil)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- c.Run(ctx) }()
			fn(s, c)
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	pass := func(d time.Duration) {
		time.Sleep(d)
		synctest.Wait()
	}
	want := func(t *testing.T, what string, s *store, n int) {
		t.Helper()
		if got := s.collections(); got != n {
			t.Errorf("%s: %d collections, want %d", what, got, n)
		}
	}
	t.Run("startup, pause threshold", func(t *testing.T) {
		run(t, Defaults(), func(s *store, c *Collector) {
			s.took = 20 * time.Millisecond
			pass(99 * time.Millisecond)
			want(t, "before the delay", s, 0)
			s.add("x")
			pass(30 * time.Millisecond)
			want(t, "after the delay", s, 1)
			pass(30 * time.Second)
			want(t, "nothing happened", s, 1)
			s.deleted()
			pass(time.Millisecond)
			want(t, "deleted after a long time", s, 2)
			// The average pause is (3*20+5)/4 ms, of which 1 - 1/0.02 is to wait.
			s.deleted()
			pass(700 * time.Millisecond)
			want(t, "deleted soon after", s, 2)
			pass(200 * time.Millisecond)
			want(t, "when the pause is a fiftieth", s, 3)
		})
	})
	t.Run("mutations", func(t *testing.T) {
		run(t, Defaults(), func(s *store, c *Collector) {
			pass(time.Second)
			for i := range 99 {
				s.observer(false)
				_ = i
			}
			pass(time.Minute)
			want(t, "99 changes", s, 1)
			s.observer(false)
			pass(time.Minute)
			want(t, "100 changes", s, 2)
		})
	})
	t.Run("deletion threshold and delay", func(t *testing.T) {
		cfg := Config{PauseThreshold: 0.0001, DeletionThreshold: 3, ScheduleDelay: 10 * time.Second, StartupDelay: time.Millisecond}
		run(t, cfg, func(s *store, c *Collector) {
			pass(time.Second)
			want(t, "startup", s, 1)
			s.deleted()
			s.deleted()
			pass(20 * time.Second)
			want(t, "two deletions", s, 1)
			s.deleted()
			pass(9 * time.Second)
			want(t, "three deletions, within the delay", s, 1)
			pass(2 * time.Second)
			want(t, "three deletions, after the delay", s, 2)
		})
	})
	t.Run("failure", func(t *testing.T) {
		run(t, Defaults(), func(s *store, c *Collector) {
			pass(10 * time.Second)
			s.mu.Lock()
			s.fail = errors.New("sick")
			s.mu.Unlock()
			s.deleted()
			pass(500 * time.Millisecond)
			want(t, "the failing one", s, 2)
			if _, err := c.Last(); err == nil {
				t.Error("the failure is not remembered")
			}
			pass(time.Second)
			want(t, "again a second later", s, 3)
			s.mu.Lock()
			s.fail = nil
			s.mu.Unlock()
			pass(time.Second)
			want(t, "and again", s, 4)
			pass(10 * time.Second)
			want(t, "until it succeeds", s, 4)
			if _, err := c.Last(); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("expiry", func(t *testing.T) {
		run(t, Defaults(), func(s *store, c *Collector) {
			pass(time.Second)
			pass(time.Hour)
			want(t, "an hour later", s, 2)
		})
	})
}
