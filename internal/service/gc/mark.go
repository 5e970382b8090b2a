package gc

import (
	"strings"
	"time"

	"github.com/gantryd/gantry/core/graph"
	"github.com/gantryd/gantry/core/lease"
)

// The labels of contract 1.5 that say what keeps what.
const (
	labelRoot        = "containerd.io/gc.root"
	labelRefContent  = "containerd.io/gc.ref.content"
	labelRefSnapshot = "containerd.io/gc.ref.snapshot."
	labelRefImage    = "containerd.io/gc.ref.image"
	labelBackContent = "containerd.io/gc.bref.content"
	labelBackImage   = "containerd.io/gc.bref.image"
	labelBackCtr     = "containerd.io/gc.bref.container"
	labelBackSnap    = "containerd.io/gc.bref.snapshot."
	labelCondition   = "containerd.io/gc.cond.snapshot"
	labelUsedAt      = "containerd.io/gc.cond.value-usedat"
)

// Plan returns what can be deleted: the content, snapshots, images, leases and
// ingests that no root leads to (contract 4.3.1). It is pure.
//
// Roots are containers, sandboxes, unexpired leases and images, live ingests,
// and content and snapshots with a gc.root label. A lease with a gc.flat label
// keeps its resources and what they are made of, a snapshot its parent, but
// not what labels refer to.
func Plan(objects []graph.Object, now time.Time) []graph.Node {
	m := marker{now: now, objects: make(map[graph.Node]*graph.Object, len(objects)), marks: map[graph.Node]mark{}, backs: map[graph.Node][]graph.Node{}}
	for i := range objects {
		o := &objects[i]
		m.objects[o.Node] = o
		for k, v := range o.Labels {
			if of, ok := backRef(o, k, v); ok {
				m.backs[of] = append(m.backs[of], o.Node)
			}
		}
	}
	for i := range objects {
		if o := &objects[i]; m.root(o) {
			m.mark(o.Node, full)
		}
	}
	m.run()
	var gone []graph.Node
	for i := range objects {
		n := objects[i].Node
		if n.Kind != graph.KindContainer && n.Kind != graph.KindSandbox && m.marks[n] == none {
			gone = append(gone, n)
		}
	}
	return gone
}

// mark is how an object is kept.
type mark uint8

const (
	none mark = iota
	flat      // with what it is made of
	full      // and with what its labels refer to
)

type marker struct {
	now     time.Time
	objects map[graph.Node]*graph.Object
	marks   map[graph.Node]mark
	// backs are the objects that live as long as the node does.
	backs map[graph.Node][]graph.Node
	todo  []graph.Node
}

// expired reports whether the object's time is over. A time that cannot be
// read is no reason to delete something.
func (m *marker) expired(o *graph.Object) bool {
	v, ok := o.Labels[lease.LabelExpire]
	if !ok {
		return false
	}
	t, err := time.Parse(time.RFC3339, v)
	return err == nil && !m.now.Before(t)
}

func (m *marker) root(o *graph.Object) bool {
	switch o.Kind {
	case graph.KindContainer, graph.KindSandbox:
		return true
	case graph.KindLease, graph.KindImage:
		return !m.expired(o)
	case graph.KindIngest:
		return o.Live
	case graph.KindContent, graph.KindSnapshot:
		_, ok := o.Labels[labelRoot]
		return ok
	}
	return false
}

// mark keeps n, if it exists, and has it looked at if that is news.
func (m *marker) mark(n graph.Node, how mark) {
	if m.marks[n] < how && m.objects[n] != nil {
		m.marks[n] = how
		m.todo = append(m.todo, n)
	}
}

func (m *marker) run() {
	for len(m.todo) > 0 {
		n := m.todo[len(m.todo)-1]
		m.todo = m.todo[:len(m.todo)-1]
		o, how := m.objects[n], m.marks[n]
		if o.Kind == graph.KindLease {
			if _, ok := o.Labels[lease.LabelFlat]; ok {
				how = flat
			}
		}
		for _, h := range o.Holds {
			m.mark(h, how)
		}
		for _, b := range m.backs[n] {
			m.mark(b, full)
		}
		if how == flat {
			continue
		}
		for k, v := range o.Labels {
			if r, ok := ref(o, k, v); ok {
				m.mark(r, full)
			} else if r, ok := condition(o, k, v); ok && m.holds(r, v) {
				m.mark(r, full)
			}
		}
	}
}

// named reports whether key is name, or name with more behind '.' or '/':
// "gc.ref.contentX" is not a reference (contract 13.16).
func named(key, name string) bool {
	rest, ok := strings.CutPrefix(key, name)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '/')
}

// snapshotter takes the snapshotter's name out of a key behind prefix: it ends
// at the next '/'.
func snapshotter(key, prefix string) (string, bool) {
	rest, ok := strings.CutPrefix(key, prefix)
	sn, _, _ := strings.Cut(rest, "/")
	return sn, ok && sn != ""
}

func node(o *graph.Object, kind graph.Kind, sn, id string) (graph.Node, bool) {
	return graph.Node{Kind: kind, Namespace: o.Namespace, Snapshotter: sn, ID: id}, id != ""
}

// ref returns what a label of o keeps (contract 1.5.2 to 1.5.4).
func ref(o *graph.Object, key, value string) (graph.Node, bool) {
	if sn, ok := snapshotter(key, labelRefSnapshot); ok {
		return node(o, graph.KindSnapshot, sn, value)
	}
	switch {
	case named(key, labelRefContent):
		return node(o, graph.KindContent, "", value)
	case named(key, labelRefImage):
		return node(o, graph.KindImage, "", value)
	}
	return graph.Node{}, false
}

// backRef returns what has to live for a label to keep o itself (contract 1.5.6).
func backRef(o *graph.Object, key, value string) (graph.Node, bool) {
	switch o.Kind {
	case graph.KindContent, graph.KindSnapshot, graph.KindImage:
	default:
		return graph.Node{}, false
	}
	if sn, ok := snapshotter(key, labelBackSnap); ok {
		return node(o, graph.KindSnapshot, sn, value)
	}
	switch {
	case named(key, labelBackContent):
		return node(o, graph.KindContent, "", value)
	case named(key, labelBackImage):
		return node(o, graph.KindImage, "", value)
	case named(key, labelBackCtr):
		return node(o, graph.KindContainer, "", value)
	}
	return graph.Node{}, false
}

// condition returns the snapshot that a label of content or an image keeps
// under a condition: "<conditions>|<key>" (contract 1.5.7).
func condition(o *graph.Object, key, value string) (graph.Node, bool) {
	if o.Kind != graph.KindContent && o.Kind != graph.KindImage {
		return graph.Node{}, false
	}
	rest, ok := strings.CutPrefix(key, labelCondition)
	if !ok || rest == "" || rest[0] != '.' && rest[0] != '/' {
		return graph.Node{}, false
	}
	sn, _, _ := strings.Cut(rest[1:], "/")
	_, id, ok := strings.Cut(value, "|")
	if !ok || sn == "" {
		return graph.Node{}, false
	}
	return node(o, graph.KindSnapshot, sn, id)
}

// holds reports whether one of a label's conditions is met by the snapshot.
// Those that nobody knows are ignored; a snapshot that does not say when it
// was used meets none.
func (m *marker) holds(n graph.Node, value string) bool {
	s := m.objects[n]
	if s == nil {
		return false
	}
	used, err := time.Parse(time.RFC3339, s.Labels[labelUsedAt])
	if err != nil {
		return false
	}
	conditions, _, _ := strings.Cut(value, "|")
	for c := range strings.SplitSeq(conditions, ",") {
		rest, ok := strings.CutPrefix(strings.TrimSpace(c), "usedat")
		if !ok || len(rest) < 2 {
			continue
		}
		d, err := time.ParseDuration(strings.TrimSpace(rest[1:]))
		if err != nil {
			continue
		}
		switch age := m.now.Sub(used); {
		case rest[0] == '<' && age < d, rest[0] == '>' && age > d:
			return true
		}
	}
	return false
}
