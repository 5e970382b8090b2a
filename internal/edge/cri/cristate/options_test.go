package cristate

import (
	"strings"
	"testing"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

// contract: 7.3.1
func TestRuntimeRecord(t *testing.T) {
	rec, err := Runtime{Type: "io.containerd.runc.v2", Options: map[string]any{"BinaryName": "crun", "SystemdCgroup": true, "IoUid": int64(5)}}.Record()
	var o runcoptions.Options
	if err != nil || rec.Name != "io.containerd.runc.v2" || rec.Options.URL != "containerd.runc.v1.Options" || proto.Unmarshal(rec.Options.Value, &o) != nil ||
		o.BinaryName != "crun" || !o.SystemdCgroup || o.IoUid != 5 {
		t.Errorf("%v %v %v", rec, &o, err)
	}
	var g runtimeoptions.Options
	rec, err = Runtime{Type: "io.containerd.runsc.v1", Path: "/opt/shim", Options: map[string]any{"TypeUrl": "io.containerd.runsc.v1.options", "ConfigPath": "/etc/runsc.toml"}}.Record()
	if err != nil || rec.Name != "/opt/shim" || proto.Unmarshal(rec.Options.Value, &g) != nil || g.TypeUrl != "io.containerd.runsc.v1.options" || g.ConfigPath != "/etc/runsc.toml" || g.ConfigBody != nil {
		t.Errorf("%v %v %v", rec, &g, err)
	}
	rec, err = Runtime{Type: "io.containerd.kata.v2", Options: map[string]any{"sandbox_cgroup_only": true}}.Record()
	g.Reset()
	if err != nil || proto.Unmarshal(rec.Options.Value, &g) != nil || strings.TrimSpace(string(g.ConfigBody)) != "sandbox_cgroup_only = true" {
		t.Errorf("%v %v %v", rec, &g, err)
	}
	if rec, err = (Runtime{Type: "io.containerd.runc.v2"}).Record(); err != nil || !rec.Options.IsZero() {
		t.Errorf("%v %v", rec, err)
	}
	for name, opts := range map[string]map[string]any{"NoSuch": {"NoSuch": 1}, "IoUid": {"IoUid": int64(-1)}, "BinaryName": {"BinaryName": true}} {
		if _, err := (Runtime{Type: "io.containerd.runc.v2", Options: opts}).Record(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
