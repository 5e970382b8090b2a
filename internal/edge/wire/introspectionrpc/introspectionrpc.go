// Package introspectionrpc is containerd.services.introspection.v1 on both
// sides: what the daemon is made of, as its clients read it (contract 2.2).
package introspectionrpc

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/lib/filter"
)

// Plugin is one component of the daemon. InitErr says why it is not there, ""
// if it is.
type Plugin struct {
	Type         string             `json:"type"`
	ID           string             `json:"id"`
	Requires     []string           `json:"requires,omitempty"`
	Platforms    []ocispec.Platform `json:"platforms,omitempty"`
	Exports      map[string]string  `json:"exports,omitempty"`
	Capabilities []string           `json:"capabilities,omitempty"`
	InitErr      string             `json:"init_err,omitempty"`
}

// Skipped says that the plugin is not meant to be there on this host, which is
// no failure (contract 2.1.3).
func (p Plugin) Skipped() bool { return strings.HasSuffix(p.InitErr, skipSuffix) }

const skipSuffix = "skip plugin"

// Field is for filters: type and id (contract 1.2.8).
func (p Plugin) Field(path []string) (string, bool) {
	if len(path) == 1 {
		switch path[0] {
		case "type":
			return p.Type, p.Type != ""
		case "id":
			return p.ID, p.ID != ""
		}
	}
	return "", false
}

// Deprecation is a use of something that will go away (contract 2.4.1).
type Deprecation struct {
	ID      string    `json:"id"`
	Message string    `json:"message"`
	Last    time.Time `json:"last_occurrence"`
}

// ServerInfo is who the daemon is (contract 1.3.21). PidNS is the inode of its
// pid namespace.
type ServerInfo struct {
	UUID         string        `json:"uuid"`
	Pid          uint64        `json:"pid"`
	PidNS        uint64        `json:"pidns"`
	Deprecations []Deprecation `json:"deprecations,omitempty"`
}

// RuntimeInfo is what a shim says of itself (contract 1.3.22, 5.2.14).
type RuntimeInfo struct {
	Name        string            `json:"name"`
	Version     string            `json:"version"`
	Revision    string            `json:"revision,omitempty"`
	Options     typed.Any         `json:"options"`
	Features    typed.Any         `json:"features"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Source is what the server shows.
type Source struct {
	// Plugins lists the components.
	Plugins func() []Plugin
	// Info describes the daemon.
	Info func() ServerInfo
	// Runtime asks the shim at path, or the default one for "", with options.
	Runtime func(ctx context.Context, path string, options typed.Any) (RuntimeInfo, error)
}

// Server answers from a source.
type Server struct {
	introspectionapi.UnimplementedIntrospectionServer
	src Source
}

// NewServer makes a server.
func NewServer(src Source) *Server { return &Server{src: src} }

// Plugins implements the RPC.
func (s *Server) Plugins(ctx context.Context, r *introspectionapi.PluginsRequest) (*introspectionapi.PluginsResponse, error) {
	f, err := filter.Parse(r.Filters...)
	if err != nil {
		return nil, err
	}
	resp := &introspectionapi.PluginsResponse{}
	for _, p := range s.src.Plugins() {
		if f.Match(p) {
			resp.Plugins = append(resp.Plugins, toProto(p))
		}
	}
	return resp, nil
}

// Server implements the RPC.
func (s *Server) Server(context.Context, *emptypb.Empty) (*introspectionapi.ServerResponse, error) {
	info := s.src.Info()
	resp := &introspectionapi.ServerResponse{UUID: info.UUID, Pid: info.Pid, Pidns: info.PidNS}
	for _, d := range info.Deprecations {
		resp.Deprecations = append(resp.Deprecations, &introspectionapi.DeprecationWarning{ID: d.ID, Message: d.Message, LastOccurrence: wire.TimeToProto(d.Last)})
	}
	return resp, nil
}

// The only plugin that answers PluginInfo, and the type of its question.
const (
	runtimeType    = "io.containerd.runtime.v2"
	runtimeID      = "task"
	runtimeRequest = "containerd.types.RuntimeRequest"
)

// PluginInfo implements the RPC for the runtime: it runs the shim's -info.
func (s *Server) PluginInfo(ctx context.Context, r *introspectionapi.PluginInfoRequest) (*introspectionapi.PluginInfoResponse, error) {
	all := s.src.Plugins()
	i := slices.IndexFunc(all, func(p Plugin) bool { return p.Type == r.Type && p.ID == r.ID })
	if i < 0 {
		return nil, fmt.Errorf("plugin %s.%s: %w", r.Type, r.ID, errdefs.ErrNotFound)
	}
	if all[i].InitErr != "" {
		return nil, fmt.Errorf("plugin %s.%s is not loaded: %s: %w", r.Type, r.ID, all[i].InitErr, errdefs.ErrFailedPrecondition)
	}
	if r.Type != runtimeType || r.ID != runtimeID {
		return nil, fmt.Errorf("plugin %s.%s has no further information: %w", r.Type, r.ID, errdefs.ErrNotImplemented)
	}
	var req types.RuntimeRequest
	if r.Options != nil {
		if got := wire.AnyFromProto(r.Options).URL; got != runtimeRequest {
			return nil, fmt.Errorf("options of type %q, want %q: %w", got, runtimeRequest, errdefs.ErrInvalidArgument)
		}
		if err := proto.Unmarshal(r.Options.Value, &req); err != nil {
			return nil, fmt.Errorf("options: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	info, err := s.src.Runtime(ctx, req.RuntimePath, wire.AnyFromProto(req.Options))
	if err != nil {
		return nil, err
	}
	b, err := proto.Marshal(&types.RuntimeInfo{Name: info.Name, Version: &types.RuntimeVersion{Version: info.Version, Revision: info.Revision},
		Options: wire.AnyToProto(info.Options), Features: wire.AnyToProto(info.Features), Annotations: info.Annotations})
	if err != nil {
		return nil, fmt.Errorf("encode runtime info: %w", err)
	}
	return &introspectionapi.PluginInfoResponse{Plugin: toProto(all[i]), Extra: &anypb.Any{TypeUrl: "containerd.types.RuntimeInfo", Value: b}}, nil
}

// Client asks the daemon at the other end of a connection.
type Client struct {
	api introspectionapi.IntrospectionClient
}

// NewClient makes a client. It does not own the connection.
func NewClient(conn grpc.ClientConnInterface) *Client {
	return &Client{introspectionapi.NewIntrospectionClient(conn)}
}

// Plugins lists the components that match one of the filters.
func (c *Client) Plugins(ctx context.Context, filters ...string) ([]Plugin, error) {
	r, err := c.api.Plugins(ctx, &introspectionapi.PluginsRequest{Filters: filters})
	if err != nil {
		return nil, err
	}
	out := make([]Plugin, len(r.Plugins))
	for i, p := range r.Plugins {
		out[i] = Plugin{Type: p.Type, ID: p.ID, Requires: p.Requires, Exports: p.Exports, Capabilities: p.Capabilities, InitErr: p.GetInitErr().GetMessage()}
		for _, pl := range p.Platforms {
			out[i].Platforms = append(out[i].Platforms, wire.PlatformFromProto(pl))
		}
	}
	return out, nil
}

// Server describes the daemon.
func (c *Client) Server(ctx context.Context) (ServerInfo, error) {
	r, err := c.api.Server(ctx, &emptypb.Empty{})
	if err != nil {
		return ServerInfo{}, err
	}
	info := ServerInfo{UUID: r.UUID, Pid: r.Pid, PidNS: r.Pidns}
	for _, d := range r.Deprecations {
		info.Deprecations = append(info.Deprecations, Deprecation{ID: d.ID, Message: d.Message, Last: wire.TimeFromProto(d.LastOccurrence)})
	}
	return info, nil
}

// Runtime asks the shim at path, or the default one for "".
func (c *Client) Runtime(ctx context.Context, path string, options typed.Any) (RuntimeInfo, error) {
	b, err := proto.Marshal(&types.RuntimeRequest{RuntimePath: path, Options: wire.AnyToProto(options)})
	if err != nil {
		return RuntimeInfo{}, fmt.Errorf("encode runtime request: %w", err)
	}
	r, err := c.api.PluginInfo(ctx, &introspectionapi.PluginInfoRequest{Type: runtimeType, ID: runtimeID, Options: &anypb.Any{TypeUrl: runtimeRequest, Value: b}})
	if err != nil {
		return RuntimeInfo{}, err
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(r.GetExtra().GetValue(), &info); err != nil {
		return RuntimeInfo{}, fmt.Errorf("decode runtime info: %w", err)
	}
	return RuntimeInfo{Name: info.Name, Version: info.GetVersion().GetVersion(), Revision: info.GetVersion().GetRevision(),
		Options: wire.AnyFromProto(info.Options), Features: wire.AnyFromProto(info.Features), Annotations: info.Annotations}, nil
}

func toProto(p Plugin) *introspectionapi.Plugin {
	out := &introspectionapi.Plugin{Type: p.Type, ID: p.ID, Requires: p.Requires, Exports: p.Exports, Capabilities: p.Capabilities}
	for _, pl := range p.Platforms {
		out.Platforms = append(out.Platforms, wire.PlatformToProto(pl))
	}
	if p.InitErr != "" {
		out.InitErr = &spb.Status{Code: int32(codes.Unknown), Message: p.InitErr}
	}
	return out
}
