package memory

import (
	"strconv"
	"strings"
	"testing"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/task/tasktest"
	"github.com/gantryd/gantry/core/typed"
)

// contract: 13.17
func TestTasks(t *testing.T) { tasktest.Run(t, taskEnv) }

func taskEnv(t *testing.T) tasktest.Env {
	bus, containers := NewBus(), NewContainers()
	t.Cleanup(func() { bus.Close() })
	process := func(p tasktest.Program) string {
		if p.Exit != nil {
			return `{"args":["exit","` + strconv.Itoa(int(*p.Exit)) + `"]}`
		}
		return `{"args":["run"]}`
	}
	put := func(t *testing.T, id container.ID, runtime, spec string) {
		t.Helper()
		c := container.Container{ID: id, Runtime: container.Runtime{Name: runtime}}
		if spec != "" {
			c.Spec = typed.Any{URL: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte(spec)}
		}
		if _, err := containers.Create(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	return tasktest.Env{
		Store: NewTasks("test", containers, bus), Namespace: "test", Events: bus,
		Container: func(t *testing.T, id container.ID, p tasktest.Program) {
			put(t, id, "io.containerd.runc.v2", `{"process":`+process(p)+`}`)
		},
		Broken: func(t *testing.T, id container.ID, defect string) {
			spec := map[string]string{"no spec": "", "bad spec": "{", "unknown runtime": `{"process":{"args":["x"]}}`}[defect]
			runtime := "io.containerd.runc.v2"
			if strings.Contains(defect, "runtime") {
				runtime = "io.containerd.nosuch.v9"
			}
			put(t, id, runtime, spec)
		},
		ExecSpec:  func(p tasktest.Program) typed.Any { return typed.Any{URL: "x", Value: []byte(process(p))} },
		Resources: typed.Any{URL: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: []byte("{}")},
	}
}
