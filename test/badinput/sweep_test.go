package badinput

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	_ "github.com/containerd/containerd/api/services/containers/v1"
	_ "github.com/containerd/containerd/api/services/content/v1"
	_ "github.com/containerd/containerd/api/services/diff/v1"
	_ "github.com/containerd/containerd/api/services/events/v1"
	_ "github.com/containerd/containerd/api/services/images/v1"
	_ "github.com/containerd/containerd/api/services/introspection/v1"
	_ "github.com/containerd/containerd/api/services/leases/v1"
	_ "github.com/containerd/containerd/api/services/mounts/v1"
	_ "github.com/containerd/containerd/api/services/namespaces/v1"
	_ "github.com/containerd/containerd/api/services/sandbox/v1"
	_ "github.com/containerd/containerd/api/services/snapshots/v1"
	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	_ "github.com/containerd/containerd/api/services/tasks/v1"
	_ "github.com/containerd/containerd/api/services/transfer/v1"
	_ "github.com/containerd/containerd/api/services/version/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	transfertypes "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/internal/edge/shimclient"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/containerrpc"
	"github.com/gantryd/gantry/internal/edge/wire/contentrpc"
	"github.com/gantryd/gantry/internal/edge/wire/imagerpc"
	"github.com/gantryd/gantry/internal/edge/wire/leaserpc"
	"github.com/gantryd/gantry/internal/edge/wire/sandboxrpc"
	"github.com/gantryd/gantry/internal/edge/wire/snapshotrpc"
	"github.com/gantryd/gantry/internal/edge/wire/taskrpc"
	"github.com/gantryd/gantry/test/testimage"
)

// served are the services that there are; of the rest of containerd's API the
// daemon says that it has not got it.
var served = []string{
	"containerd.services.containers.v1.Containers", "containerd.services.content.v1.Content", "containerd.services.diff.v1.Diff",
	"containerd.services.events.v1.Events", "containerd.services.images.v1.Images", "containerd.services.introspection.v1.Introspection",
	"containerd.services.leases.v1.Leases", "containerd.services.namespaces.v1.Namespaces", "containerd.services.sandbox.v1.Controller", "containerd.services.sandbox.v1.Store",
	"containerd.services.snapshots.v1.Snapshots", "containerd.services.streaming.v1.Streaming", "containerd.services.tasks.v1.Tasks",
	"containerd.services.transfer.v1.Transfer", "containerd.services.version.v1.Version", "grpc.health.v1.Health",
}

// methods are those of containerd's API, and health, by reflection.
func methods() []protoreflect.MethodDescriptor {
	var out []protoreflect.MethodDescriptor
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if p := string(f.Package()); strings.HasPrefix(p, "containerd.services.") && !strings.Contains(p, ".ttrpc.") || p == "grpc.health.v1" {
			for i := range f.Services().Len() {
				s := f.Services().Get(i)
				for j := range s.Methods().Len() {
					out = append(out, s.Methods().Get(j))
				}
			}
		}
		return true
	})
	slices.SortFunc(out, func(a, b protoreflect.MethodDescriptor) int {
		return strings.Compare(string(a.FullName()), string(b.FullName()))
	})
	return out
}

// endless methods have no answer until something happens.
func endless(m protoreflect.MethodDescriptor) bool {
	switch m.FullName() {
	case "containerd.services.events.v1.Events.Subscribe", "containerd.services.streaming.v1.Streaming.Stream", "grpc.health.v1.Health.Watch", "runtime.v1.RuntimeService.GetContainerEvents":
		return true
	}
	return false
}

// namespaced says whether a method works within a namespace (contract 1.2.1, 15).
func namespaced(m protoreflect.MethodDescriptor) bool {
	switch m.Parent().FullName() {
	case "containerd.services.namespaces.v1.Namespaces", "containerd.services.version.v1.Version", "containerd.services.introspection.v1.Introspection",
		"grpc.health.v1.Health", "containerd.services.streaming.v1.Streaming", "containerd.services.transfer.v1.Transfer":
		return false
	}
	switch m.FullName() {
	case "containerd.services.events.v1.Events.Subscribe", "containerd.services.events.v1.Events.Forward":
		return false
	}
	return true
}

// headers are what a request says beside its message.
type headers struct{ namespace, lease string }

// call makes one request, of whatever kind, and returns how it ended.
func call(t testing.TB, conn *grpc.ClientConn, m protoreflect.MethodDescriptor, req proto.Message, h headers) error {
	limit := 20 * time.Second
	if endless(m) {
		limit = 100 * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if h.namespace != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, wire.HeaderNamespace, h.namespace)
	}
	if h.lease != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, wire.HeaderLease, h.lease)
	}
	out, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
	if !m.IsStreamingClient() && !m.IsStreamingServer() {
		return conn.Invoke(ctx, name, req, out.New().Interface())
	}
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: m.IsStreamingServer(), ClientStreams: m.IsStreamingClient()}, name)
	if err != nil {
		return err
	}
	if err := s.SendMsg(req); err != nil && err != io.EOF {
		return err
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	for {
		if err := s.RecvMsg(out.New().Interface()); err != nil {
			if err == io.EOF || endless(m) && (status.Code(err) == codes.DeadlineExceeded || status.Code(err) == codes.Canceled) {
				return nil
			}
			return err
		}
	}
}

var hello = digest.FromString("hello")

// filler makes the fullest request of a type that there is. Of what a string
// means, only its field's name is known.
type filler struct {
	dir string
	// registry is the host of one that has nothing.
	registry string
	// target is the container that requests about tasks are for.
	target string
}

func (f filler) text(fd protoreflect.FieldDescriptor) string {
	switch fd.FullName() {
	case "containerd.types.Mount.type":
		return "bind"
	case "containerd.services.containers.v1.Container.Runtime.name", "containerd.types.Sandbox.Runtime.name":
		return "io.containerd.runc.v2"
	case "containerd.services.leases.v1.Resource.type":
		return "content"
	case "containerd.types.transfer.OCIRegistry.reference":
		return f.registry + "/nobody/home:latest"
	case "containerd.types.transfer.RegistryResolver.default_scheme":
		return "http"
	}
	switch fd.Name() {
	case "digest", "expected":
		return hello.String()
	case "snapshotter", "default_snapshotter":
		return "overlayfs"
	case "container_id":
		return f.target
	case "media_type":
		return "application/vnd.oci.image.layer.v1.tar"
	case "topic":
		return "/x/y"
	case "parent", "parent_checkpoint":
		return ""
	case "filters", "filter":
		return "id==x"
	case "source", "upperdir", "target", "host_dir", "runtime_path", "task_api_address", "terminal_path", "bundle":
		return f.dir + "/nothing"
	case "stdin", "stdout", "stderr":
		return f.dir + "/nothing/fifo"
	case "paths":
		return "labels"
	case "service":
		return ""
	case "sandboxer":
		return "shim"
	}
	return "x"
}

func (f filler) any(fd protoreflect.FieldDescriptor) *anypb.Any {
	switch fd.Name() {
	case "spec":
		return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: []byte(`{"args":["/bin/true"],"cwd":"/"}`)}
	case "resources":
		return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: []byte(`{"pids":{"limit":100}}`)}
	case "options":
		return f.pack(&runcoptions.Options{BinaryName: f.dir + "/nothing"})
	case "source":
		return f.pack(f.full((&transfertypes.OCIRegistry{}).ProtoReflect().Type()))
	case "destination":
		return f.pack(f.full((&transfertypes.ImageStore{}).ProtoReflect().Type()))
	}
	return f.pack(&transfertypes.Progress{Event: "x"})
}

func (f filler) pack(m proto.Message) *anypb.Any {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: b}
}

func (f filler) value(fd protoreflect.FieldDescriptor) protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(f.text(fd))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte("hello"))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(1)
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(1)
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(1)
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(1)
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(1)
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(1)
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(1)
	}
	if fd.Message().FullName() == "google.protobuf.Any" {
		return protoreflect.ValueOfMessage(f.any(fd).ProtoReflect())
	}
	mt, err := protoregistry.GlobalTypes.FindMessageByName(fd.Message().FullName())
	if err != nil {
		panic(err)
	}
	return protoreflect.ValueOfMessage(f.full(mt).ProtoReflect())
}

func (f filler) full(mt protoreflect.MessageType) proto.Message {
	m := mt.New()
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		switch {
		case fd.IsMap():
			mp := m.Mutable(fd).Map()
			mp.Set(f.value(fd.MapKey()).MapKey(), f.value(fd.MapValue()))
		case fd.IsList():
			m.Mutable(fd).List().Append(f.value(fd))
		default:
			m.Set(fd, f.value(fd))
		}
	}
	return m.Interface()
}

// variant is a request with one thing wrong.
type variant struct {
	name string
	msg  proto.Message
}

// variants are all messages that differ from m in one field, at any depth,
// which is absent or hostile. An Any's message is looked into as well.
func variants(m proto.Message) []variant {
	var out []variant
	change := func(name string, f func(protoreflect.Message)) {
		c := proto.Clone(m)
		f(c.ProtoReflect())
		out = append(out, variant{name, c})
	}
	if a, ok := m.(*anypb.Any); ok {
		if inner, err := a.UnmarshalNew(); err == nil {
			for _, v := range variants(inner) {
				b, err := proto.Marshal(v.msg)
				if err != nil {
					panic(err)
				}
				out = append(out, variant{"(" + v.name + ")", &anypb.Any{TypeUrl: a.TypeUrl, Value: b}})
			}
		}
		out = append(out, variant{"google-prefix", &anypb.Any{TypeUrl: "type.googleapis.com/" + a.TypeUrl, Value: a.Value}},
			variant{"unknown-type", &anypb.Any{TypeUrl: "org.example.Unknown", Value: a.Value}},
			variant{"garbage", &anypb.Any{TypeUrl: a.TypeUrl, Value: []byte("\xff\xff\xff{garbage")}})
	}
	m.ProtoReflect().Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := string(fd.Name())
		change("-"+name, func(c protoreflect.Message) { c.Clear(fd) })
		switch {
		case fd.IsMap():
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				change(name+"[\"\"]", func(c protoreflect.Message) { c.Mutable(fd).Map().Set(protoreflect.ValueOfString("").MapKey(), v) })
				if fd.MapValue().Kind() == protoreflect.MessageKind {
					for _, sub := range variants(v.Message().Interface()) {
						change(name+"[]."+sub.name, func(c protoreflect.Message) {
							c.Mutable(fd).Map().Set(k, protoreflect.ValueOfMessage(sub.msg.ProtoReflect()))
						})
					}
				} else {
					change(name+"[]=hostile", func(c protoreflect.Message) { c.Mutable(fd).Map().Set(k, hostile(fd.MapValue())) })
				}
				return true
			})
		case fd.IsList():
			if fd.Kind() != protoreflect.MessageKind {
				change(name+"[0]=hostile", func(c protoreflect.Message) { c.Mutable(fd).List().Set(0, hostile(fd)) })
				break
			}
			for _, sub := range variants(v.List().Get(0).Message().Interface()) {
				change(name+"[0]."+sub.name, func(c protoreflect.Message) {
					c.Mutable(fd).List().Set(0, protoreflect.ValueOfMessage(sub.msg.ProtoReflect()))
				})
			}
			change(name+"[0]={}", func(c protoreflect.Message) { c.Mutable(fd).List().Set(0, c.Mutable(fd).List().NewElement()) })
		case fd.Kind() == protoreflect.MessageKind:
			for _, sub := range variants(v.Message().Interface()) {
				change(name+"."+sub.name, func(c protoreflect.Message) {
					c.Set(fd, protoreflect.ValueOfMessage(sub.msg.ProtoReflect()))
				})
			}
			change(name+"={}", func(c protoreflect.Message) { c.Set(fd, c.NewField(fd)) })
		default:
			change(name+"=hostile", func(c protoreflect.Message) { c.Set(fd, hostile(fd)) })
		}
		return true
	})
	return out
}

// hostile is a value that nobody means well with.
func hostile(fd protoreflect.FieldDescriptor) protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("../\x00\n%s%n\"" + strings.Repeat("/../é", 1000))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{0, 0xff})
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(false)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(-7)
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(-1 << 31)
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(-1 << 63)
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(1<<32 - 1)
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(1<<64 - 1)
	}
	return fd.Default()
}

// rawDial connects without the interceptors of Gantry's clients, so that the
// statuses are seen as they are on the wire.
func (d *daemon) rawDial() *grpc.ClientConn {
	d.t.Helper()
	conn, err := grpc.NewClient("unix://"+d.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(wire.MaxMessage)))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	return conn
}

// judge complains about an answer that no request may get.
func judge(t testing.TB, what string, err error) {
	t.Helper()
	st := status.Convert(err)
	switch st.Code() {
	case codes.OK:
		return
	case codes.Internal, codes.Unknown, codes.DeadlineExceeded, codes.DataLoss:
		t.Errorf("%s: %s: %.2000s", what, st.Code(), st.Message())
	}
	if m := st.Message(); len(m) < 8 || strings.Contains(m, "broken invariant") || strings.Contains(m, "nil pointer") || len(m) > 20000 {
		t.Errorf("%s: %s with the message %.1000q", what, st.Code(), m)
	}
}

// gone makes "it is not there" a success.
func gone(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// clear deletes all records of a namespace. What garbage collection takes first
// is no error.
func (d *daemon) clear(id namespace.ID) {
	t := d.t
	ctx := d.timeout()
	check := func(err error) {
		t.Helper()
		if err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("clear %s: %v", id, err)
		}
	}
	tasks, err := taskrpc.NewClient(d.conn, id, "").List(ctx)
	check(err)
	for _, p := range tasks {
		d.kill(id, p.ContainerID)
	}
	leases, err := leaserpc.NewClient(d.conn, id).List(ctx)
	check(err)
	for _, l := range leases {
		check(leaserpc.NewClient(d.conn, id).Delete(ctx, l.ID, false))
	}
	images, err := imagerpc.NewClient(d.conn, id, "").List(ctx)
	check(err)
	for _, i := range images {
		check(imagerpc.NewClient(d.conn, id, "").Delete(ctx, i.Name, image.DeleteOptions{}))
	}
	ctrs := containerrpc.NewClient(d.conn, id, "")
	check(ctrs.Walk(ctx, func(c container.Container) error { return gone(ctrs.Delete(ctx, c.ID)) }))
	pods, err := filepath.Glob(filepath.Join(d.Dir, "state", shimclient.SandboxPluginID, string(id), "*"))
	check(err)
	for _, p := range pods {
		check(sandboxrpc.NewControllerClient(d.conn, id, "shim").Shutdown(ctx, filepath.Base(p)))
	}
	sandboxes, err := sandboxrpc.NewClient(d.conn, id, "").List(ctx)
	check(err)
	for _, s := range sandboxes {
		check(sandboxrpc.NewClient(d.conn, id, "").Delete(ctx, s.ID))
	}
	for _, name := range snapshotters {
		st := snapshotrpc.NewClient(d.conn, id, "", name)
		var keys []string
		check(st.Walk(ctx, func(i snapshot.Info) error { keys = append(keys, i.Name); return nil }))
		for len(keys) > 0 {
			left := slices.DeleteFunc(slices.Clone(keys), func(k string) bool { return gone(st.Remove(ctx, k)) == nil })
			if len(left) == len(keys) {
				t.Errorf("clear %s: snapshots %q cannot be removed", id, keys)
				break
			}
			keys = left
		}
	}
	cs := contentrpc.NewClient(d.conn, id, "")
	check(cs.Walk(ctx, func(i content.Info) error { return gone(cs.Delete(ctx, i.Digest)) }))
	ingests, err := cs.Statuses(ctx)
	check(err)
	for _, i := range ingests {
		check(cs.Abort(ctx, i.Ref))
	}
	if err := d.namespaces().Delete(ctx, id); !errdefs.IsNotFound(err) {
		check(err)
	}
}

// seed makes one object of every kind, of the name that filler uses, unless it is there.
func (d *daemon) seed(id namespace.ID) {
	ctx := d.timeout()
	check := func(err error) {
		d.t.Helper()
		if err != nil && !errdefs.IsAlreadyExists(err) {
			d.t.Fatalf("seed: %v", err)
		}
	}
	// Owners come first: what nobody owns may be collected at any time.
	img := image.Image{Name: "x"}
	img.Target.Digest, img.Target.Size, img.Target.MediaType = hello, 5, "m"
	_, err := imagerpc.NewClient(d.conn, id, "").Create(ctx, img)
	check(err)
	w, err := contentrpc.NewClient(d.conn, id, "").Writer(ctx, "seed", content.WriterOptions{Expected: hello})
	if check(err); err == nil {
		_, err := w.Write([]byte("hello"))
		check(err)
		check(w.Commit(ctx, 5, hello, nil))
		w.Close()
	}
	w, err = contentrpc.NewClient(d.conn, id, "").Writer(ctx, "x", content.WriterOptions{})
	if check(err); err == nil {
		w.Close()
	}
	_, err = containerrpc.NewClient(d.conn, id, "").Create(ctx, container.Container{ID: "x", Runtime: container.Runtime{Name: runc}, Snapshotter: "overlayfs", SnapshotKey: "x"})
	check(err)
	_, err = snapshotrpc.NewClient(d.conn, id, "", "overlayfs").Prepare(ctx, "x", "", nil)
	check(err)
	_, err = sandboxrpc.NewClient(d.conn, id, "").Create(ctx, sandbox.Sandbox{ID: "x"})
	check(err)
	_, err = leaserpc.NewClient(d.conn, id).Create(ctx, lease.Lease{ID: "x"})
	check(err)
	_, err = d.namespaces().Create(ctx, namespace.Namespace{ID: "x"})
	check(err)
}

// seedPod makes a sandbox that has ended, so that nobody waits for its end.
func (d *daemon) seedPod(id namespace.ID) {
	d.t.Helper()
	ctx, c := d.timeout(), sandboxrpc.NewControllerClient(d.conn, id, "shim")
	err := c.Create(ctx, sandbox.Sandbox{ID: "x", Runtime: container.Runtime{Name: runc}}, sandbox.CreateOptions{})
	if err == nil || errdefs.IsAlreadyExists(err) {
		err = c.Stop(ctx, "x", 0)
	}
	if err != nil {
		d.t.Fatalf("seed a sandbox: %v", err)
	}
}

// Every request of the whole API with each of its fields absent or hostile in
// turn, and with no, a bad and a foreign header, is answered in time, and by a
// daemon that goes on (contract 15, row 13).
//
// contract: 1.2.1, 1.2.2, 1.2.9, 1.2.10, 1.3.30, 13.1, 13.8
// promise: P36
func TestWholeAPI(t *testing.T) {
	// Nothing here is about durability, and disks are slow.
	d := start(t, "[plugins.'io.containerd.metadata.v1.bolt']\nno_sync = true")
	conn := d.rawDial()
	before := d.inventory()
	f := filler{dir: d.Dir, registry: testimage.Serve(t).Host(), target: "nobody"}
	serves := map[string]bool{}
	requests := 0
	for _, m := range methods() {
		service := string(m.Parent().FullName())
		mt, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
		if err != nil {
			t.Fatal(err)
		}
		empty, full := mt.New().Interface(), f.full(mt)
		if m.FullName() == "containerd.services.streaming.v1.Streaming.Stream" {
			full = f.pack(&streamingapi.StreamInit{ID: "x"})
		}
		if err := call(t, conn, m, empty, headers{namespace: "sweep"}); status.Code(err) == codes.Unimplemented && strings.Contains(err.Error(), "unknown service") {
			continue
		}
		serves[service] = true
		all := append([]variant{{"empty", empty}, {"full", full}}, variants(full)...)
		if m.FullName() == "containerd.services.transfer.v1.Transfer.Transfer" {
			for _, more := range f.transfers(t) {
				all = append(all, variant{"full", more})
				all = append(all, variants(more)...)
			}
		}
		if endless(m) {
			all = all[:min(len(all), 12)]
		}
		// What creates something meets nothing of its name; all else meets all
		// that it could be about.
		creates := slices.Contains([]protoreflect.Name{"Create", "Prepare", "View", "Write", "Transfer", "Stream"}, m.Name())
		fresh := false
		for _, v := range all {
			if !creates && !fresh {
				d.seed("sweep")
				if service == "containerd.services.sandbox.v1.Controller" {
					d.seedPod("sweep")
				}
				fresh = true
			}
			what := fmt.Sprintf("%s %s", m.FullName(), v.name)
			err := call(t, conn, m, v.msg, headers{namespace: "sweep"})
			judge(t, what, err)
			if err == nil && creates && !endless(m) {
				d.clear("sweep")
				d.clear("x")
			}
			fresh = fresh && (err != nil || !strings.HasPrefix(string(m.Name()), "Delete") && m.Name() != "Remove" && m.Name() != "Shutdown" && m.Name() != "Commit" && m.Name() != "Abort")
			requests++
		}
		d.clear("sweep")
		for _, v := range all[:2] {
			what := fmt.Sprintf("%s %s", m.FullName(), v.name)
			err := call(t, conn, m, v.msg, headers{})
			judge(t, what+" without namespace", err)
			if namespaced(m) && (status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "namespace is required")) {
				t.Errorf("%s without namespace: %v", what, err)
			}
			err = call(t, conn, m, v.msg, headers{namespace: "no/name"})
			judge(t, what+" in a bad namespace", err)
			if namespaced(m) && (status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "no/name")) {
				t.Errorf("%s in a bad namespace: %v", what, err)
			}
			err = call(t, conn, m, v.msg, headers{namespace: "sweep", lease: "unheard-of"})
			judge(t, what+" under an unknown lease", err)
			requests += 3
		}
		for _, n := range []namespace.ID{"sweep", "x"} { // "x" is what namespaces.Create was asked for
			d.clear(n)
		}
		if diff := d.difference(before); diff != "" {
			t.Errorf("%s leaves behind:\n%s", m.FullName(), diff)
			before = d.inventory()
		}
		if end, ended := d.Ended(0); ended {
			t.Fatalf("%s: the daemon has ended: %v", m.FullName(), end)
		}
	}
	for _, s := range served {
		if !serves[s] {
			t.Errorf("service %s is not served", s)
		}
		delete(serves, s)
	}
	for s := range serves {
		t.Errorf("service %s is served and not in the list of this test", s)
	}
	if requests < 1000 {
		t.Errorf("only %d requests were made", requests)
	}
}

// transfers are the pairs of endpoints that filler does not choose by itself.
func (f filler) transfers(t *testing.T) []proto.Message {
	m := methods()[slices.IndexFunc(methods(), func(m protoreflect.MethodDescriptor) bool { return m.Name() == "Transfer" })]
	mt, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
	if err != nil {
		t.Fatal(err)
	}
	typ := func(m proto.Message) *anypb.Any { return f.pack(f.full(m.ProtoReflect().Type())) }
	pairs := [][2]*anypb.Any{
		{typ(&transfertypes.ImageImportStream{}), typ(&transfertypes.ImageStore{})},
		{typ(&transfertypes.ImageStore{}), typ(&transfertypes.ImageExportStream{})},
		{typ(&transfertypes.ImageStore{}), typ(&transfertypes.OCIRegistry{})},
		{typ(&transfertypes.ImageStore{}), typ(&transfertypes.ImageStore{})},
		{f.pack(&transfertypes.OCIRegistry{Reference: f.registry + "/nobody/home:latest", Resolver: &transfertypes.RegistryResolver{HostDir: f.dir + "/nothing", DefaultScheme: "http", Headers: map[string]string{"x": "y"}}}), typ(&transfertypes.ImageStore{})},
	}
	var out []proto.Message
	for _, p := range pairs {
		full := f.full(mt)
		r := full.ProtoReflect()
		for i, name := range []protoreflect.Name{"source", "destination"} {
			r.Set(r.Descriptor().Fields().ByName(name), protoreflect.ValueOfMessage(p[i].ProtoReflect()))
		}
		if p[0].TypeUrl == p[1].TypeUrl || p[1].TypeUrl == "containerd.types.transfer.ImageStore" {
			r.Clear(r.Descriptor().Fields().ByName("options"))
		}
		out = append(out, full)
	}
	return out
}

// Every request about tasks, with each field absent or hostile in turn, while
// the container runs: what the daemon lets through, the shim has to bear.
//
// contract: 13.39
// promise: P36
func TestTasksOfALiveContainer(t *testing.T) {
	d := start(t)
	d.pullBusybox()
	before := d.inventory()
	conn := d.rawDial()
	f := filler{dir: d.Dir, registry: testimage.Serve(t).Host(), target: "live"}
	var pid uint32
	ensure := func() {
		t.Helper()
		ctx := d.timeout()
		p, err := d.tasks().Get(ctx, "live", "")
		switch {
		case err == nil && p.Status == task.StatusPaused:
			if err := d.tasks().Resume(ctx, "live"); err != nil {
				t.Fatal(err)
			}
			fallthrough
		case err == nil && p.Status == task.StatusRunning && p.Pid == pid:
			return
		case err == nil:
			d.kill(ns, "live")
		}
		d.remove("live")
		pid = d.run("live")
	}
	requests := 0
	var living []string
	for _, m := range methods() {
		if m.Parent().FullName() != "containerd.services.tasks.v1.Tasks" {
			continue
		}
		mt, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
		if err != nil {
			t.Fatal(err)
		}
		full := f.full(mt)
		r := full.ProtoReflect()
		if m.Name() == "Wait" { // the task lives for ever
			r.Set(r.Descriptor().Fields().ByName("exec_id"), protoreflect.ValueOfString("none"))
		}
		all := append([]variant{{"full", full}}, variants(full)...)
		if fd := r.Descriptor().Fields().ByName("exec_id"); fd != nil && m.Name() != "Wait" && m.Name() != "Exec" {
			first := proto.Clone(full)
			first.ProtoReflect().Clear(fd)
			all = append(all, variants(first)...)
		}
		if m.Name() == "Exec" { // with streams that are there, the process is made
			fine := proto.Clone(full)
			for _, name := range []protoreflect.Name{"stdin", "stdout", "stderr"} {
				fine.ProtoReflect().Clear(r.Descriptor().Fields().ByName(name))
			}
			fine.ProtoReflect().Clear(r.Descriptor().Fields().ByName("terminal"))
			all = append(all, variant{"fine", fine})
			all = append(all, variants(fine)...)
		}
		if m.Name() == "Create" { // of a container that has no task, in two ways that get further
			for _, drop := range [][]protoreflect.Name{{"checkpoint", "runtime_path", "task_api_address", "task_api_version"},
				{"checkpoint", "runtime_path", "task_api_address", "task_api_version", "options", "rootfs", "stdin", "stdout", "stderr", "terminal"}} {
				more := proto.Clone(full)
				for _, name := range drop {
					more.ProtoReflect().Clear(r.Descriptor().Fields().ByName(name))
				}
				all = append(append(all, variant{"further", more}), variants(more)...)
			}
			for _, v := range all {
				if fd := r.Descriptor().Fields().ByName("container_id"); v.msg.ProtoReflect().Get(fd).String() == "live" {
					v.msg.ProtoReflect().Set(fd, protoreflect.ValueOfString("spare"))
				}
			}
			ensure()
			living = d.inventory()
			d.record("spare", nil)
		}
		for _, v := range all {
			if m.Name() == "Wait" && v.name == "-exec_id" {
				continue
			}
			ensure()
			err := call(t, conn, m, v.msg, headers{namespace: string(ns)})
			judge(t, fmt.Sprintf("%s %s", m.FullName(), v.name), err)
			if m.Name() == "Create" && err == nil {
				d.kill(ns, "spare")
			}
			if m.Name() == "Exec" && err == nil {
				ctx := d.timeout()
				id := v.msg.ProtoReflect().Get(r.Descriptor().Fields().ByName("exec_id")).String()
				if _, err := d.tasks().Start(ctx, "live", task.ExecID(id)); err == nil {
					if _, err := d.tasks().Wait(ctx, "live", task.ExecID(id)); err != nil {
						t.Errorf("%s %s: wait: %v", m.FullName(), v.name, err)
					}
				}
				if _, err := d.tasks().DeleteExec(ctx, "live", task.ExecID(id)); err != nil {
					t.Errorf("%s %s: delete the exec: %v", m.FullName(), v.name, err)
				}
			}
			requests++
		}
		if m.Name() == "Create" {
			d.remove("spare")
			d.unchanged(living)
		}
	}
	ensure()
	d.kill(ns, "live")
	d.remove("live")
	d.unchanged(before)
	if requests < 150 {
		t.Errorf("only %d requests were made", requests)
	}
}

// A request under a lease that does not exist creates nothing: it is the one
// protection against collection that its client asked for.
//
// contract: 1.2.4
func TestUnknownLease(t *testing.T) {
	d := start(t)
	before := d.inventory()
	ctx := d.timeout()
	const gone lease.ID = "gone"
	img := image.Image{Name: "x"}
	img.Target.Digest, img.Target.Size, img.Target.MediaType = hello, 5, "m"
	for name, try := range map[string]func() error{
		"images.Create": func() error { _, err := imagerpc.NewClient(d.conn, ns, gone).Create(ctx, img); return err },
		"snapshots.Prepare": func() error {
			_, err := snapshotrpc.NewClient(d.conn, ns, gone, "overlayfs").Prepare(ctx, "k", "", nil)
			return err
		},
		"snapshots.View": func() error {
			_, err := snapshotrpc.NewClient(d.conn, ns, gone, "native").View(ctx, "k", "", nil)
			return err
		},
		"content.Write": func() error {
			w, err := contentrpc.NewClient(d.conn, ns, gone).Writer(ctx, "r", content.WriterOptions{})
			if err == nil {
				_, err = w.Write([]byte("hello"))
				err = errors.Join(err, w.Commit(ctx, 5, hello, nil))
				w.Close()
			}
			return err
		},
		"leases.AddResource": func() error {
			return d.leases().AddResource(ctx, gone, lease.Resource{ID: hello.String(), Type: "content"})
		},
		"leases.Delete":    func() error { return d.leases().Delete(ctx, gone, true) },
		"leases.Resources": func() error { _, err := d.leases().Resources(ctx, gone); return err },
	} {
		err := try()
		if err == nil || !strings.Contains(err.Error(), "gone") || !strings.Contains(err.Error(), "not found") {
			t.Errorf("%s: %v", name, err)
		}
	}
	d.unchanged(before)
}
