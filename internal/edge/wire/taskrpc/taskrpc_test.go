package taskrpc

import (
	"context"
	"strconv"
	"testing"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/task/tasktest"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
)

func serve(t *testing.T, st task.Store) *grpc.ClientConn {
	return wiretest.Serve(t, func(s *grpc.Server) {
		tasksapi.RegisterTasksServer(s, NewServer(wiretest.Source{TaskStore: st}))
	})
}

func over(t *testing.T, st task.Store) task.Store { return NewClient(serve(t, st), "test", "") }

func env(t *testing.T, wrap func(task.Store) task.Store) tasktest.Env {
	bus, containers := memory.NewBus(), memory.NewContainers()
	t.Cleanup(func() { bus.Close() })
	process := func(p tasktest.Program) []byte {
		if p.Exit != nil {
			return []byte(`{"args":["exit","` + strconv.Itoa(int(*p.Exit)) + `"]}`)
		}
		return []byte(`{"args":["run"]}`)
	}
	put := func(t *testing.T, id container.ID, runtime string, spec []byte) {
		t.Helper()
		c := container.Container{ID: id, Runtime: container.Runtime{Name: runtime}}
		if spec != nil {
			c.Spec = typed.Any{URL: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: spec}
		}
		if _, err := containers.Create(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	return tasktest.Env{
		Store: wrap(memory.NewTasks("test", containers, bus)), Namespace: "test", Events: bus,
		Container: func(t *testing.T, id container.ID, p tasktest.Program) {
			put(t, id, "io.containerd.runc.v2", append(append([]byte(`{"process":`), process(p)...), '}'))
		},
		Broken: func(t *testing.T, id container.ID, defect string) {
			switch defect {
			case "no spec":
				put(t, id, "io.containerd.runc.v2", nil)
			case "bad spec":
				put(t, id, "io.containerd.runc.v2", []byte("{"))
			default:
				put(t, id, "io.containerd.nosuch.v9", []byte(`{"process":{"args":["x"]}}`))
			}
		},
		ExecSpec:  func(p tasktest.Program) typed.Any { return typed.Any{URL: "x", Value: process(p)} },
		Resources: typed.Any{URL: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: []byte("{}")},
	}
}

// contract: 1.3.34, 1.3.35, 1.3.36, 1.3.37, 1.3.39, 1.3.40, 1.2.9, 13.39
func TestStore(t *testing.T) {
	t.Run("gRPC", func(t *testing.T) {
		tasktest.Run(t, func(t *testing.T) tasktest.Env {
			return env(t, func(s task.Store) task.Store { return over(t, s) })
		})
	})
	t.Run("gRPC twice", func(t *testing.T) {
		tasktest.Run(t, func(t *testing.T) tasktest.Env {
			return env(t, func(s task.Store) task.Store { return over(t, over(t, s)) })
		})
	})
}

// recorder notes what Create and Checkpoint are given.
type recorder struct {
	task.Store
	got  task.CreateOptions
	desc []ocispec.Descriptor
}

func (r *recorder) Create(_ context.Context, _ container.ID, o task.CreateOptions) (uint32, error) {
	r.got = o
	return 42, nil
}

func (r *recorder) Checkpoint(context.Context, container.ID, string, typed.Any) ([]ocispec.Descriptor, error) {
	return r.desc, nil
}

// Nothing of a request or an answer is lost on the way, over two servers.
//
// contract: 1.3.33, 13.1
func TestFields(t *testing.T) {
	r := &recorder{desc: []ocispec.Descriptor{{MediaType: "m", Digest: "sha256:aa", Size: 3}}}
	st := over(t, over(t, r))
	want := task.CreateOptions{
		Rootfs:      []mount.Mount{{Type: "overlay", Source: "overlay", Target: "x", Options: []string{"a", "b"}}},
		IO:          task.IO{Stdin: "/i", Stdout: "/o", Stderr: "file:///e", Terminal: true},
		Checkpoint:  &ocispec.Descriptor{MediaType: "t", Digest: "sha256:bb", Size: 1, Annotations: map[string]string{"RestoreFromPath": "/p"}},
		Options:     typed.Any{URL: "containerd.runc.v1.Options", Value: []byte{1, 2}},
		RuntimePath: "/shim", APIAddress: "ttrpc+unix:///s", APIVersion: 3,
	}
	pid, err := st.Create(t.Context(), "c", want)
	if err != nil || pid != 42 {
		t.Fatal(pid, err)
	}
	if d := cmp.Diff(want, r.got); d != "" {
		t.Errorf("create options changed:\n%s", d)
	}
	got, err := st.Checkpoint(t.Context(), "c", "", typed.Any{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(r.desc, got); d != "" {
		t.Errorf("descriptors changed:\n%s", d)
	}
}

// Every request with no field set, and with each field alone left out, is
// answered with a class, never a panic (which would be Internal).
//
// contract: 1.3.33
func TestAbsentFields(t *testing.T) {
	e := env(t, func(s task.Store) task.Store { return s })
	e.Container(t, "c", tasktest.Runs())
	conn := serve(t, e.Store)
	ctx := wiretest.Context(t)
	spec := &anypb.Any{TypeUrl: "x", Value: []byte("{}")}
	full := map[string]proto.Message{
		"Create": &tasksapi.CreateTaskRequest{ContainerID: "c", Rootfs: []*types.Mount{{Type: "bind", Source: "/", Options: []string{"bind"}}},
			Stdin: "/i", Stdout: "/o", Stderr: "/e", Terminal: true, Checkpoint: &types.Descriptor{Annotations: map[string]string{}}, Options: spec, RuntimePath: "/x", TaskApiAddress: "a", TaskApiVersion: 3},
		"Start":         &tasksapi.StartRequest{ContainerID: "c", ExecID: "x"},
		"Delete":        &tasksapi.DeleteTaskRequest{ContainerID: "c"},
		"DeleteProcess": &tasksapi.DeleteProcessRequest{ContainerID: "c", ExecID: "x"},
		"Get":           &tasksapi.GetRequest{ContainerID: "c", ExecID: "x"},
		"List":          &tasksapi.ListTasksRequest{Filter: "is ignored ==="},
		"Kill":          &tasksapi.KillRequest{ContainerID: "c", ExecID: "x", Signal: 9, All: true},
		"Exec":          &tasksapi.ExecProcessRequest{ContainerID: "c", ExecID: "x", Spec: spec, Stdin: "/i", Stdout: "/o", Stderr: "/e", Terminal: true},
		"ResizePty":     &tasksapi.ResizePtyRequest{ContainerID: "c", ExecID: "x", Width: 1, Height: 1},
		"CloseIO":       &tasksapi.CloseIORequest{ContainerID: "c", ExecID: "x", Stdin: true},
		"Pause":         &tasksapi.PauseTaskRequest{ContainerID: "c"},
		"Resume":        &tasksapi.ResumeTaskRequest{ContainerID: "c"},
		"ListPids":      &tasksapi.ListPidsRequest{ContainerID: "c"},
		"Checkpoint":    &tasksapi.CheckpointTaskRequest{ContainerID: "c", ParentCheckpoint: "p", Options: spec},
		"Update":        &tasksapi.UpdateTaskRequest{ContainerID: "c", Resources: spec, Annotations: map[string]string{"a": "b"}},
		"Metrics":       &tasksapi.MetricsRequest{Filters: []string{"id==c"}},
		"Wait":          &tasksapi.WaitRequest{ContainerID: "nobody", ExecID: "x"},
	}
	methods := tasksapi.File_services_tasks_v1_tasks_proto.Services().Get(0).Methods()
	if methods.Len() != len(full) {
		t.Fatalf("the service has %d methods, the table %d", methods.Len(), len(full))
	}
	for i := range methods.Len() {
		name := string(methods.Get(i).Name())
		req, ok := full[name]
		if !ok {
			t.Errorf("%s is not in the table", name)
			continue
		}
		requests := map[string]proto.Message{"none": req.ProtoReflect().New().Interface(), "all": req}
		fields := req.ProtoReflect().Descriptor().Fields()
		for j := range fields.Len() {
			r := proto.Clone(req)
			r.ProtoReflect().Clear(fields.Get(j))
			requests["without "+string(fields.Get(j).Name())] = r
		}
		for what, r := range requests {
			err := conn.Invoke(ctx, "/containerd.services.tasks.v1.Tasks/"+name, r, &emptypb.Empty{})
			if errdefs.IsInternal(err) || errdefs.IsUnknown(err) {
				t.Errorf("%s with fields %s: %v", name, what, err)
			}
		}
	}
}

// contract: 1.2.1
func TestNamespaceRequired(t *testing.T) {
	conn := serve(t, memory.NewTasks("test", memory.NewContainers(), memory.NewBus()))
	_, err := tasksapi.NewTasksClient(conn).List(t.Context(), &tasksapi.ListTasksRequest{})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("list without namespace: %v", err)
	}
}
