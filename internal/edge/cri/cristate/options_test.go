package cristate

import (
	"slices"
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
	for name, opts := range map[string]map[string]any{"IoUid": {"IoUid": int64(-1)}, "BinaryName": {"BinaryName": true}} {
		if _, err := (Runtime{Type: "io.containerd.runc.v2", Options: opts}).Record(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every setting that does nothing is told by its path, and nothing of the
// defaults is; older files' options of runc do not keep a handler from working.
//
// contract: 13.37
// promise: P37
func TestIneffective(t *testing.T) {
	images, runtimes := DefaultImagesConfig(), DefaultRuntimeConfig()
	var got []string
	report := func(why string, key ...string) {
		if why == "" {
			t.Errorf("%q: no reason", key)
		}
		got = append(got, strings.Join(key, " "))
	}
	server := DefaultServerConfig()
	images.Ineffective(report)
	runtimes.Ineffective(report)
	server.Ineffective(report)
	if len(got) > 0 {
		t.Errorf("of the defaults: %q", got)
	}
	images.MaxConcurrentDownloads, images.ConcurrentLayerFetchBuffer, images.ImagePullWithSyncFS, images.UseLocalImagePull = 10, 1, true, true
	images.ImageDecryption.KeyModel = "x"
	old := Runtime{Type: "io.containerd.runc.v2", IOType: "streaming", Sandboxer: "x", Options: map[string]any{"CriuPath": "", "BinaryName": "crun"}}
	runtimes.Containerd.Runtimes = map[string]Runtime{"a.b": old, "other": {Type: "io.containerd.kata.v2", Options: map[string]any{"CriuPath": ""}}}
	images.Ineffective(report)
	runtimes.Ineffective(report)
	want := []string{"max_concurrent_downloads", "concurrent_layer_fetch_buffer", "image_pull_with_sync_fs", "use_local_image_pull", "image_decryption key_model",
		"containerd default_runtime_name", "containerd runtimes a.b io_type", "containerd runtimes a.b sandboxer", "containerd runtimes a.b options CriuPath"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	// Settings with which nothing starts.
	got, images, runtimes = nil, DefaultImagesConfig(), DefaultRuntimeConfig()
	images.Registry = RegistryConfig{ConfigPath: "/certs.d", Mirrors: map[string]RegistryMirror{"a": {}}, Configs: map[string]RegistryHost{"b": {Auth: &RegistryAuth{}}}}
	runtimes.StatsCollectPeriod, runtimes.StatsRetentionPeriod, runtimes.DrainExecSyncIOTimeout = "10", "-1s", "x"
	runtimes.Containerd.Runtimes = map[string]Runtime{"runc": {Type: "io.containerd.runc.v2", Options: map[string]any{"SystemdCgroup": "true"}}, "x": {}}
	server.StreamIdleTimeout, server.StreamServerPort, server.X509KeyPair.CertFile = "4", "http", "/c"
	images.Ineffective(report)
	runtimes.Ineffective(report)
	server.Ineffective(report)
	want = []string{"registry mirrors", "stats_collect_period", "stats_retention_period", "drain_exec_sync_io_timeout", "containerd runtimes runc options", "containerd runtimes x",
		"stream_idle_timeout", "stream_server_port", "x509_key_pair_streaming"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	rec, err := old.Record()
	var o runcoptions.Options
	if err != nil || proto.Unmarshal(rec.Options.Value, &o) != nil || o.BinaryName != "crun" {
		t.Errorf("%v %v", &o, err)
	}
}

// contract: 10.7
func TestVM(t *testing.T) {
	for name, want := range map[string]bool{"io.containerd.kata.v2": true, "io.containerd.kata.qemu.v2": true, "io.containerd.runc.v2": false, "io.containerd.katana.v1": false} {
		if got := (Runtime{Type: name}).VM(); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
