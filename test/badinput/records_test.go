package badinput

import (
	"fmt"
	"strings"
	"testing"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/wire/contentrpc"
	"github.com/gantryd/gantry/internal/edge/wire/eventrpc"
	"github.com/gantryd/gantry/internal/edge/wire/imagerpc"
	"github.com/gantryd/gantry/internal/edge/wire/snapshotrpc"
)

// badIDs break the grammar of identifiers, each in a way of its own.
var badIDs = []string{"", ".", "..", "-a", "a-", "a..b", "a--b", "a b", "a/b", "../a", "a\x00b", "a\nb", "é", "a:b", "a%s", "_", "a_", strings.Repeat("a", 77)}

func picture(name string) image.Image {
	i := image.Image{Name: name}
	i.Target.Digest, i.Target.Size, i.Target.MediaType = hello, 5, "application/vnd.oci.image.manifest.v1+json"
	return i
}

// contract: 1.2.2, 1.3.3, 1.3.17, 1.3.28
// promise: P36
func TestBadIDs(t *testing.T) {
	d := start(t)
	before := d.inventory()
	ctx := d.timeout()
	for _, id := range append(badIDs, strings.Repeat("b", 100000)) {
		short := fmt.Sprintf("%.30q", id)
		for kind, try := range map[string]func() error{
			"container": func() error {
				_, err := d.containers().Create(ctx, container.Container{ID: container.ID(id), Runtime: container.Runtime{Name: runc}})
				return err
			},
			"sandbox": func() error {
				_, err := d.sandboxes().Create(ctx, sandbox.Sandbox{ID: id, Runtime: container.Runtime{Name: runc}})
				return err
			},
			"namespace": func() error {
				_, err := d.namespaces().Create(ctx, namespace.Namespace{ID: namespace.ID(id)})
				return err
			},
			"task": func() error { _, err := d.tasks().Create(ctx, container.ID(id), task.CreateOptions{}); return err },
			"exec of nobody": func() error {
				return d.tasks().Exec(ctx, "nobody", task.ExecID(id), task.ExecOptions{Spec: typed.Any{URL: typeProcess, Value: []byte("{}")}})
			},
		} {
			err := try()
			words := []string{}
			if len(id) > 1 && len(id) < 20 && !strings.ContainsAny(id, "\x00\né") {
				words = append(words, id)
			}
			if kind == "exec of nobody" && errdefs.IsNotFound(err) {
				continue // the container is looked for first
			}
			t.Run(kind+" "+short, func(t *testing.T) { refused(t, err, words, errdefs.ErrInvalidArgument) })
		}
	}
	for _, ns := range []namespace.ID{"version", "a/b", "../x", "-", namespace.ID(strings.Repeat("n", 77))} {
		_, err := imagerpc.NewClient(d.conn, ns, "").Create(ctx, picture("x"))
		t.Run(fmt.Sprintf("in namespace %.20q", ns), func(t *testing.T) { refused(t, err, []string{"namespace"}, errdefs.ErrInvalidArgument) })
	}
	d.unchanged(before)
}

// contract: 1.3.3, 1.3.8, 1.3.9, 1.3.10, 1.3.16, 1.3.17, 1.3.25, 1.3.31, 13.8
// promise: P36
func TestBadObjects(t *testing.T) {
	d := start(t)
	before := d.inventory()
	ctx := d.timeout()
	target := func(f func(*image.Image)) error {
		i := picture("bad")
		f(&i)
		_, err := d.images().Create(ctx, i)
		return err
	}
	invalid, notFound := []error{errdefs.ErrInvalidArgument}, []error{errdefs.ErrNotFound}
	type row struct {
		name    string
		err     error
		words   []string
		classes []error
	}
	rows := []row{
		{"image without name", target(func(i *image.Image) { i.Name = "" }), nil, invalid},
		{"image without digest", target(func(i *image.Image) { i.Target.Digest = "" }), []string{"bad"}, invalid},
		{"image with a bad digest", target(func(i *image.Image) { i.Target.Digest = "sha256:../x" }), []string{"bad"}, invalid},
		{"image with an unknown algorithm", target(func(i *image.Image) { i.Target.Digest = "md5:d41d8cd98f00b204e9800998ecf8427e" }), []string{"bad"}, invalid},
		{"image without size", target(func(i *image.Image) { i.Target.Size = 0 }), []string{"bad", "size"}, invalid},
		{"image of negative size", target(func(i *image.Image) { i.Target.Size = -1 }), []string{"bad", "size"}, invalid},
		{"image without media type", target(func(i *image.Image) { i.Target.MediaType = "" }), []string{"bad"}, invalid},
		{"update of an unknown image", second(d.images().Update(ctx, picture("nobody"))), []string{"nobody"}, notFound},
		{"delete of an unknown image", d.images().Delete(ctx, "nobody", image.DeleteOptions{}), []string{"nobody"}, notFound},
		{"container without runtime", second(d.containers().Create(ctx, container.Container{ID: "bad"})), []string{"bad", "runtime"}, invalid},
		{"container with a snapshot of nobody", second(d.containers().Create(ctx, container.Container{ID: "bad", Runtime: container.Runtime{Name: runc}, SnapshotKey: "x"})), []string{"bad", "snapshotter"}, invalid},
		{"unknown container", second(d.containers().Get(ctx, "nobody")), []string{"nobody"}, notFound},
		{"unknown blob", second(d.content().Info(ctx, hello)), []string{hello.String()}, notFound},
		{"bad digest", second(d.content().Info(ctx, "sha256:../../x")), []string{"sha256:../../x"}, append(notFound, errdefs.ErrInvalidArgument)},
		{"read of an unknown blob", second(d.content().Open(ctx, hello)), []string{hello.String()}, notFound},
		{"delete of an unknown blob", d.content().Delete(ctx, hello), []string{hello.String()}, notFound},
		{"unknown ingest", second(d.content().Status(ctx, "nobody")), []string{"nobody"}, notFound},
		{"abort of an unknown ingest", d.content().Abort(ctx, "nobody"), []string{"nobody"}, notFound},
		{"ingest without ref", second(d.content().Writer(ctx, "", content.WriterOptions{})), []string{"ref"}, invalid},
		{"ingest with a bad digest", second(d.content().Writer(ctx, "r", content.WriterOptions{Expected: "sha256:12"})), []string{"sha256:12"}, invalid},
		{"lease of nobody", d.leases().AddResource(ctx, "nobody", lease.Resource{ID: hello.String(), Type: "content"}), []string{"nobody"}, notFound},
	}
	if l, err := d.leases().Create(ctx, lease.Lease{ID: "mine"}); err != nil {
		t.Fatal(err)
	} else {
		for typ, classes := range map[string][]error{"": {errdefs.ErrInvalidArgument, errdefs.ErrNotImplemented}, "nothing": {errdefs.ErrNotImplemented}, "snapshots": {errdefs.ErrInvalidArgument, errdefs.ErrNotImplemented},
			"snapshots/": {errdefs.ErrInvalidArgument, errdefs.ErrNotImplemented}, "snapshots/nosuch": {errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrNotImplemented}} {
			rows = append(rows, row{"lease of a " + typ, d.leases().AddResource(ctx, l.ID, lease.Resource{ID: "x", Type: typ}), nil, classes})
		}
		rows = append(rows, row{"lease of a bad digest", d.leases().AddResource(ctx, l.ID, lease.Resource{ID: "../x", Type: "content"}), []string{"../x"}, invalid},
			row{"lease of nothing", d.leases().AddResource(ctx, l.ID, lease.Resource{Type: "content"}), nil, invalid},
			row{"a lease that is there", second(d.leases().Create(ctx, lease.Lease{ID: "mine"})), []string{"mine"}, []error{errdefs.ErrAlreadyExists}})
		if err := d.leases().Delete(ctx, l.ID, false); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"", "nosuch", "../overlayfs", "OVERLAYFS"} {
		st := d.snapshots(name)
		for what, err := range map[string]error{"prepare": second(st.Prepare(ctx, "k", "", nil)), "view": second(st.View(ctx, "k", "", nil)), "stat": second(st.Stat(ctx, "k")), "mounts": second(st.Mounts(ctx, "k")),
			"commit": st.Commit(ctx, "n", "k", snapshot.CommitOptions{}), "remove": st.Remove(ctx, "k"), "usage": second(st.Usage(ctx, "k")), "walk": st.Walk(ctx, func(snapshot.Info) error { return nil })} {
			rows = append(rows, row{fmt.Sprintf("%s with snapshotter %q", what, name), err, []string{"snapshotter not loaded: " + name}, invalid})
		}
	}
	held, err := d.leases().Create(ctx, lease.Lease{}) // or they were collected
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range snapshotters {
		st := snapshotrpc.NewClient(d.conn, ns, held.ID, name)
		if _, err := st.Prepare(ctx, "active", "", nil); err != nil {
			t.Fatal(err)
		}
		if _, err := st.View(ctx, "viewed", "", nil); err != nil {
			t.Fatal(err)
		}
		rows = append(rows,
			row{name + ": missing parent", second(st.Prepare(ctx, "k", "nobody", nil)), []string{"nobody"}, notFound},
			row{name + ": view of a missing parent", second(st.View(ctx, "k", "nobody", nil)), []string{"nobody"}, notFound},
			row{name + ": active parent", second(st.Prepare(ctx, "k", "active", nil)), []string{"active"}, []error{errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition}},
			row{name + ": a key that is there", second(st.Prepare(ctx, "active", "", nil)), []string{"active"}, []error{errdefs.ErrAlreadyExists}},
			row{name + ": no key", second(st.Prepare(ctx, "", "", nil)), []string{"key"}, invalid},
			row{name + ": commit of nothing", st.Commit(ctx, "n", "nobody", snapshot.CommitOptions{}), []string{"nobody"}, notFound},
			row{name + ": commit of a view", st.Commit(ctx, "n", "viewed", snapshot.CommitOptions{}), []string{"viewed"}, []error{errdefs.ErrFailedPrecondition}},
			row{name + ": commit over a name", st.Commit(ctx, "viewed", "active", snapshot.CommitOptions{}), []string{"viewed"}, []error{errdefs.ErrAlreadyExists}},
			row{name + ": rebase on nobody", st.Commit(ctx, "n", "active", snapshot.CommitOptions{Parent: "nobody"}), nil, []error{errdefs.ErrNotFound, errdefs.ErrNotImplemented}},
			row{name + ": remove nobody", st.Remove(ctx, "nobody"), []string{"nobody"}, notFound},
			row{name + ": mounts of nobody", second(st.Mounts(ctx, "nobody")), []string{"nobody"}, notFound},
			row{name + ": usage of nobody", second(st.Usage(ctx, "nobody")), []string{"nobody"}, notFound},
			row{name + ": stat of nobody", second(st.Stat(ctx, "nobody")), []string{"nobody"}, notFound},
		)
		for _, k := range []string{"active", "viewed"} {
			if err := st.Remove(ctx, k); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := d.leases().Delete(ctx, held.ID, false); err != nil {
		t.Fatal(err)
	}
	w, err := d.content().Writer(ctx, "r", content.WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	rows = append(rows, row{"a ref that is taken", second(contentrpc.NewClient(d.conn, ns, "").Writer(ctx, "r", content.WriterOptions{})), []string{"r"}, []error{errdefs.ErrUnavailable}},
		row{"commit with a wrong digest", w.Commit(ctx, 5, digest.FromString("bye"), nil), []string{hello.String(), digest.FromString("bye").String()}, []error{errdefs.ErrFailedPrecondition}})
	w.Close()
	if w, err = d.content().Writer(ctx, "r", content.WriterOptions{}); err != nil {
		t.Fatal(err)
	}
	rows = append(rows, row{"commit with a wrong size", w.Commit(ctx, 6, hello, nil), []string{"5", "6"}, []error{errdefs.ErrFailedPrecondition}})
	w.Close()
	if err := d.content().Abort(ctx, "r"); err != nil {
		t.Fatal(err)
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) { refused(t, r.err, r.words, r.classes...) })
	}
	d.unchanged(before)
}

func second[T any](_ T, err error) error { return err }

// Labels that are too long, or without a key, are refused on every kind of
// object, when it is made and when it is changed.
//
// contract: 1.2.5
func TestOversizedLabels(t *testing.T) {
	d := start(t)
	before := d.inventory()
	ctx := d.timeout()
	d.seed(ns)
	over := map[string]string{"big": strings.Repeat("x", 4094)}
	fits := map[string]string{"big": strings.Repeat("x", 4093)}
	label := func(l map[string]string) map[string]error {
		img := picture("x2")
		img.Labels = l
		out := map[string]error{
			"image": second(d.images().Create(ctx, img)), "container": second(d.containers().Create(ctx, container.Container{ID: "x2", Runtime: container.Runtime{Name: runc}, Labels: l})),
			"sandbox": second(d.sandboxes().Create(ctx, sandbox.Sandbox{ID: "x2", Runtime: container.Runtime{Name: runc}, Labels: l})), "lease": second(d.leases().Create(ctx, lease.Lease{ID: "x2", Labels: l})),
			"namespace": second(d.namespaces().Create(ctx, namespace.Namespace{ID: "x2", Labels: l})), "snapshot": second(d.snapshots("overlayfs").Prepare(ctx, "x2", "", l)), "view": second(d.snapshots("native").View(ctx, "x2", "", l)),
			"committed":         d.snapshots("overlayfs").Commit(ctx, "x3", "x", snapshot.CommitOptions{Labels: l}),
			"updated container": second(d.containers().Update(ctx, container.Container{ID: "x", Labels: l}, "labels.big")), "updated sandbox": second(d.sandboxes().Update(ctx, sandbox.Sandbox{ID: "x", Labels: l}, "labels")),
			"updated blob": second(d.content().Update(ctx, content.Info{Digest: hello, Labels: l}, "labels")), "updated namespace": second(d.namespaces().Update(ctx, namespace.Namespace{ID: "x", Labels: l}, "labels")),
			"updated snapshot": second(d.snapshots("overlayfs").Update(ctx, snapshot.Info{Name: "x", Labels: l}, "labels.big")),
		}
		img = picture("x")
		img.Labels = l
		out["updated image"] = second(d.images().Update(ctx, img, "labels"))
		w, err := d.content().Writer(ctx, "labelled", content.WriterOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("bye")); err != nil {
			t.Fatal(err)
		}
		out["blob"] = w.Commit(ctx, 3, "", l)
		w.Close()
		if out["blob"] != nil {
			if err := d.content().Abort(ctx, "labelled"); err != nil {
				t.Errorf("abort: %v", err)
			}
		}
		return out
	}
	for kind, err := range label(over) {
		t.Run(kind, func(t *testing.T) { refused(t, err, []string{"big", "4096"}, errdefs.ErrInvalidArgument) })
	}
	for kind, err := range label(map[string]string{"": "x"}) {
		if !strings.HasPrefix(kind, "updated") {
			t.Run(kind+" without key", func(t *testing.T) { refused(t, err, []string{"label"}, errdefs.ErrInvalidArgument) })
		}
	}
	for kind, err := range label(fits) {
		if kind == "updated snapshot" {
			continue // it has been committed before
		}
		if err != nil {
			t.Errorf("%s with a label that just fits: %v", kind, err)
		}
	}
	for _, id := range []namespace.ID{"x", "x2"} {
		if err := d.namespaces().Delete(ctx, id); err != nil {
			t.Error(err)
		}
	}
	d.clear(ns)
	d.unchanged(before)
}

// A filter that cannot be read is refused by every call that takes filters, with
// the position of what is wrong. The calls are found by their request's fields.
//
// contract: 1.2.7, 13.3
func TestBadFilters(t *testing.T) {
	d := start(t)
	conn := d.rawDial()
	calls := 0
	for _, m := range methods() {
		fd := m.Input().Fields().ByName("filters")
		if fd == nil || m.Parent().FullName() == "containerd.services.mounts.v1.Mounts" {
			continue
		}
		calls++
		for _, filter := range []string{"name==", "name~=(", "==x", "name=x", "name==x,", "name==\"x", "name~=/x", "labels.\"a==b", "name==x y", "name!x", "..", "name~=|[|"} {
			mt, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
			if err != nil {
				t.Fatal(err)
			}
			req := mt.New()
			if s := m.Input().Fields().ByName("snapshotter"); s != nil {
				req.Set(s, protoreflect.ValueOfString("overlayfs"))
			}
			req.Mutable(fd).List().Append(protoreflect.ValueOfString("name==fine"))
			req.Mutable(fd).List().Append(protoreflect.ValueOfString(filter))
			err = call(t, conn, m, req.Interface().(proto.Message), headers{namespace: string(ns)})
			judge(t, string(m.FullName())+" "+filter, err)
			if err == nil || !strings.Contains(err.Error(), "InvalidArgument") || !strings.Contains(err.Error(), "character") {
				t.Errorf("%s with filter %s: %v", m.FullName(), filter, err)
			}
		}
	}
	if calls < 10 {
		t.Errorf("only %d calls take filters", calls)
	}
	// Of tasks, containerd ignores the filter.
	if _, err := tasksapi.NewTasksClient(conn).List(d.outgoing(), &tasksapi.ListTasksRequest{Filter: "=="}); err != nil {
		t.Errorf("tasks.List: %v", err)
	}
}

// contract: 1.2.6, 1.3.4, 1.3.18, 1.3.28
func TestBadFieldMasks(t *testing.T) {
	d := start(t)
	before := d.inventory()
	ctx := d.timeout()
	d.seed(ns)
	for _, path := range []string{"nothing", "Labels", "label", "id", "name", "labels.", ".labels", " ", "*", "labels/x", "created_at", strings.Repeat("p", 5000)} {
		short := fmt.Sprintf("%.20s", path)
		for kind, err := range map[string]error{
			"image": second(d.images().Update(ctx, picture("x"), path)), "container": second(d.containers().Update(ctx, container.Container{ID: "x"}, path)),
			"sandbox": second(d.sandboxes().Update(ctx, sandbox.Sandbox{ID: "x"}, path)), "blob": second(d.content().Update(ctx, content.Info{Digest: hello}, path)),
			"namespace": second(d.namespaces().Update(ctx, namespace.Namespace{ID: "x"}, path)), "snapshot": second(d.snapshots("overlayfs").Update(ctx, snapshot.Info{Name: "x"}, path)),
		} {
			t.Run(kind+" "+short, func(t *testing.T) {
				refused(t, err, []string{strings.TrimRight(short, ".")}, errdefs.ErrInvalidArgument)
			})
		}
	}
	for field, c := range map[string]container.Container{"snapshotter": {ID: "x", Snapshotter: "native"}, "runtime": {ID: "x", Runtime: container.Runtime{Name: "other"}}} {
		_, err := d.containers().Update(ctx, c, field)
		t.Run("immutable "+field, func(t *testing.T) { refused(t, err, []string{field}, errdefs.ErrInvalidArgument) })
	}
	if err := d.namespaces().Delete(ctx, "x"); err != nil {
		t.Error(err)
	}
	d.clear(ns)
	d.unchanged(before)
}

// contract: 1.3.13, 1.3.14, 1.3.15
func TestBadEvents(t *testing.T) {
	d := start(t)
	ctx := d.timeout()
	events := eventrpc.NewClient(d.conn)
	sub, err := events.Subscribe(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	payload := event.Raw{Any: typed.Any{URL: "org.example.X", Value: []byte{1}}}
	for _, topic := range []string{"", "/", "x", "x/y", "//", "/x/", "/x//y", "/x y", "/../x", "/x/\x00", "/" + strings.Repeat("t", 77)} {
		err := events.Publish(ctx, event.Envelope{Namespace: ns, Topic: topic, Event: payload})
		t.Run(fmt.Sprintf("topic %.20q", topic), func(t *testing.T) { refused(t, err, []string{"topic"}, errdefs.ErrInvalidArgument) })
	}
	t.Run("no event", func(t *testing.T) {
		refused(t, events.Publish(ctx, event.Envelope{Namespace: ns, Topic: "/x/y"}), []string{"event"}, errdefs.ErrInvalidArgument)
	})
	// A topic that nobody knows is somebody's own, and is the first that arrives.
	if err := events.Publish(ctx, event.Envelope{Namespace: ns, Topic: "/unknown/topic", Event: payload}); err != nil {
		t.Error(err)
	}
	if e, err := sub.Next(ctx); err != nil || e.Topic != "/unknown/topic" {
		t.Errorf("%+v, %v", e, err)
	}
}
