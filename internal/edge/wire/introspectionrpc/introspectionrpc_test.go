package introspectionrpc

import (
	"context"
	"errors"
	"testing"
	"time"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/wire/versionrpc"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
)

func plugins() []Plugin {
	return []Plugin{
		{Type: "io.containerd.snapshotter.v1", ID: "overlayfs", Platforms: []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}, Exports: map[string]string{"root": "/r"}, Capabilities: []string{"rebase"}},
		{Type: "io.containerd.snapshotter.v1", ID: "btrfs", InitErr: "not a btrfs file system: skip plugin"},
		{Type: "io.containerd.runtime.v2", ID: "task", Requires: []string{"io.containerd.shim.v1"}},
		{Type: "io.containerd.gc.v1", ID: "scheduler", InitErr: "broken"},
	}
}

func serve(t *testing.T) *grpc.ClientConn {
	src := Source{
		Plugins: plugins,
		Info: func() ServerInfo {
			return ServerInfo{UUID: "u", Pid: 7, PidNS: 8, Deprecations: []Deprecation{{ID: "d", Message: "m", Last: time.Unix(5, 0).UTC()}}}
		},
		Runtime: func(ctx context.Context, path string, options typed.Any) (RuntimeInfo, error) {
			return RuntimeInfo{Name: path, Version: "v", Revision: "r", Options: options, Features: typed.Any{URL: "f", Value: []byte("{}")}, Annotations: map[string]string{"a": "b"}}, nil
		},
	}
	return wiretest.Serve(t, func(s *grpc.Server) {
		introspectionapi.RegisterIntrospectionServer(s, NewServer(src))
		versionapi.RegisterVersionServer(s, versionrpc.NewServer("1.2", "abc"))
	})
}

// contract: 1.3.20, 1.3.21, 1.3.22, 13.11, 1.1.9
func TestRoundTrip(t *testing.T) {
	conn := serve(t)
	c := NewClient(conn)
	all, err := c.Plugins(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(plugins(), all); diff != "" {
		t.Errorf("plugins changed on their way:\n%s", diff)
	}
	if !all[1].Skipped() || all[3].Skipped() {
		t.Error("skipped and failed plugins are mixed up")
	}
	some, err := c.Plugins(t.Context(), "type==io.containerd.snapshotter.v1,id==overlayfs", "id==task")
	if err != nil || len(some) != 2 {
		t.Errorf("filtered: %v, %v", some, err)
	}
	if _, err := c.Plugins(t.Context(), "type=="); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("bad filter: %v", err)
	}
	info, err := c.Server(t.Context())
	if err != nil || info.UUID != "u" || info.Pid != 7 || info.PidNS != 8 || len(info.Deprecations) != 1 {
		t.Errorf("server: %+v, %v", info, err)
	}
	opts := typed.Any{URL: "o", Value: []byte("x")}
	rt, err := c.Runtime(t.Context(), "/shim", opts)
	if err != nil || rt.Name != "/shim" || rt.Version != "v" || !cmp.Equal(rt.Options, opts) || rt.Features.URL != "f" || rt.Annotations["a"] != "b" {
		t.Errorf("runtime: %+v, %v", rt, err)
	}
	v, r, err := versionrpc.Get(t.Context(), conn)
	if err != nil || v != "1.2" || r != "abc" {
		t.Errorf("version: %q %q, %v", v, r, err)
	}
}

// contract: 1.3.22
func TestPluginInfoErrors(t *testing.T) {
	api := introspectionapi.NewIntrospectionClient(serve(t))
	for _, tc := range []struct {
		req  *introspectionapi.PluginInfoRequest
		want error
	}{
		{&introspectionapi.PluginInfoRequest{}, errdefs.ErrNotFound},
		{&introspectionapi.PluginInfoRequest{Type: "io.containerd.runtime.v2", ID: "other"}, errdefs.ErrNotFound},
		{&introspectionapi.PluginInfoRequest{Type: "io.containerd.snapshotter.v1", ID: "btrfs"}, errdefs.ErrFailedPrecondition},
		{&introspectionapi.PluginInfoRequest{Type: "io.containerd.snapshotter.v1", ID: "overlayfs"}, errdefs.ErrNotImplemented},
		{&introspectionapi.PluginInfoRequest{Type: "io.containerd.runtime.v2", ID: "task", Options: &anypb.Any{TypeUrl: "x"}}, errdefs.ErrInvalidArgument},
		{&introspectionapi.PluginInfoRequest{Type: "io.containerd.runtime.v2", ID: "task", Options: &anypb.Any{TypeUrl: runtimeRequest, Value: []byte{0xff}}}, errdefs.ErrInvalidArgument},
	} {
		if _, err := api.PluginInfo(t.Context(), tc.req); !errors.Is(err, tc.want) {
			t.Errorf("PluginInfo(%v) = %v, want %v", tc.req, err, tc.want)
		}
	}
}
