package snapshotrpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/snapshot/snapshottest"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/engine/native"
	"github.com/gantryd/gantry/internal/engine/overlay"
	"github.com/gantryd/gantry/internal/lib/host"
)

const name = "sn"

func serve(t *testing.T, s snapshot.Store) *grpc.ClientConn {
	t.Helper()
	return wiretest.Serve(t, func(srv *grpc.Server) {
		snapshotsapi.RegisterSnapshotsServer(srv, NewServer(wiretest.Source{SnapshotStores: map[string]snapshot.Store{name: s}}))
	})
}

func client(t *testing.T, s snapshot.Store) *Client {
	t.Helper()
	return NewClient(serve(t, s), "test", "", name)
}

// contract: 1.3.31, 1.2.6, 1.2.8, 1.2.13, 3.1.1, 3.1.5, 3.2.9, 13.10
func TestConformance(t *testing.T) {
	for what, hops := range map[string]int{"over gRPC": 1, "over gRPC twice": 2} {
		over := func(t *testing.T, s snapshot.Store) snapshot.Store {
			for range hops {
				s = client(t, s)
			}
			return s
		}
		t.Run(what+"/memory", func(t *testing.T) {
			snapshottest.Run(t, func(t *testing.T) snapshot.Store { return over(t, memory.NewSnapshots()) }, snapshottest.Options{Rebase: true})
		})
		t.Run(what+"/overlay", func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("mounts need root")
			}
			snapshottest.Run(t, func(t *testing.T) snapshot.Store {
				s, err := overlay.Open(t.TempDir(), overlay.Config{}, slog.New(slog.DiscardHandler))
				var lacks *host.Lacks
				if errors.As(err, &lacks) {
					t.Skip(lacks)
				}
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					for _, p := range s.Check(context.Background()) {
						if !p.Garbage {
							t.Errorf("check: %s", p)
						}
					}
					s.Close()
				})
				return over(t, s)
			}, snapshottest.Options{RealMounts: true, Rebase: true, Usage: true})
		})
		t.Run(what+"/native", func(t *testing.T) {
			snapshottest.Run(t, func(t *testing.T) snapshot.Store {
				s, err := native.Open(t.TempDir(), native.Config{}, slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { s.Close() })
				return over(t, s)
			}, snapshottest.Options{})
		})
	}
}

// requests is every unary call of the service, and List.
func requests(api snapshotsapi.SnapshotsClient) map[string]func(ctx context.Context, snapshotter string) error {
	list := func(ctx context.Context, r *snapshotsapi.ListSnapshotsRequest) error {
		s, err := api.List(ctx, r)
		if err != nil {
			return err
		}
		for err == nil {
			_, err = s.Recv()
		}
		if err.Error() == "EOF" {
			return nil
		}
		return err
	}
	return map[string]func(context.Context, string) error{
		"Prepare": func(ctx context.Context, s string) error {
			_, err := api.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: s})
			return err
		},
		"View": func(ctx context.Context, s string) error {
			_, err := api.View(ctx, &snapshotsapi.ViewSnapshotRequest{Snapshotter: s})
			return err
		},
		"Mounts": func(ctx context.Context, s string) error {
			_, err := api.Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: s})
			return err
		},
		"Commit": func(ctx context.Context, s string) error {
			_, err := api.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: s})
			return err
		},
		"Remove": func(ctx context.Context, s string) error {
			_, err := api.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: s})
			return err
		},
		"Stat": func(ctx context.Context, s string) error {
			_, err := api.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: s})
			return err
		},
		"Update": func(ctx context.Context, s string) error {
			_, err := api.Update(ctx, &snapshotsapi.UpdateSnapshotRequest{Snapshotter: s})
			return err
		},
		"Update of no name": func(ctx context.Context, s string) error {
			_, err := api.Update(ctx, &snapshotsapi.UpdateSnapshotRequest{Snapshotter: s, Info: &snapshotsapi.Info{}})
			return err
		},
		"Usage": func(ctx context.Context, s string) error {
			_, err := api.Usage(ctx, &snapshotsapi.UsageRequest{Snapshotter: s})
			return err
		},
		"List": func(ctx context.Context, s string) error {
			return list(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: s})
		},
		"Cleanup": func(ctx context.Context, s string) error {
			_, err := api.Cleanup(ctx, &snapshotsapi.CleanupRequest{Snapshotter: s})
			return err
		},
	}
}

// Every request with every field absent.
//
// contract: 1.3.31
func TestAbsentFields(t *testing.T) {
	calls := requests(snapshotsapi.NewSnapshotsClient(serve(t, memory.NewSnapshots())))
	if methods := len(snapshotsapi.Snapshots_ServiceDesc.Methods) + len(snapshotsapi.Snapshots_ServiceDesc.Streams); len(calls) != methods+1 {
		t.Fatalf("%d calls for %d methods", len(calls), methods)
	}
	ctx := wiretest.Context(t)
	for what, call := range calls {
		for _, unknown := range []string{"", "nosuch"} {
			err := call(ctx, unknown)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "snapshotter not loaded: "+unknown) {
				t.Errorf("%s of snapshotter %q: %v", what, unknown, err)
			}
		}
		err := call(ctx, name)
		if what == "List" || what == "Cleanup" {
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		} else if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s without anything: %v", what, err)
		}
		if err := call(t.Context(), name); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "namespace is required") {
			t.Errorf("%s without a namespace: %v", what, err)
		}
	}
}

// bare is a store that is no Cleaner.
type bare struct{ snapshot.Store }

// contract: 1.3.31
func TestCleanupUnimplemented(t *testing.T) {
	if err := client(t, bare{memory.NewSnapshots()}).Cleanup(t.Context()); !errdefs.IsNotImplemented(err) {
		t.Errorf("cleanup of what is no Cleaner: %v", err)
	}
}

// contract: 1.2.13, 1.3.31
func TestListBatches(t *testing.T) {
	s := memory.NewSnapshots()
	const n = 2*batch + 17
	for i := range n {
		if _, err := s.Prepare(t.Context(), fmt.Sprintf("k%03d", i), "", nil); err != nil {
			t.Fatal(err)
		}
	}
	list, err := snapshotsapi.NewSnapshotsClient(serve(t, s)).List(wiretest.Context(t), &snapshotsapi.ListSnapshotsRequest{Snapshotter: name})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{batch, batch, 17} {
		m, err := list.Recv()
		if err != nil || len(m.Info) != want {
			t.Fatalf("a message of %d, expected %d (%v)", len(m.GetInfo()), want, err)
		}
	}
	if m, err := list.Recv(); err == nil {
		t.Errorf("one more message: %v", m)
	}
}

// remote is a snapshotter with the layer already there (contract 3.1.4).
type remote struct {
	*memory.Snapshots
	has string
}

func (r remote) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	if ref := labels[snapshot.LabelRef]; ref == r.has && ref != "" {
		if _, err := r.Snapshots.Prepare(ctx, key, parent, labels); err != nil {
			return nil, err
		}
		if err := r.Commit(ctx, "remote-"+ref, key, snapshot.CommitOptions{Labels: labels}); err != nil && !errdefs.IsAlreadyExists(err) {
			return nil, err
		}
		return nil, fmt.Errorf("target snapshot %s: %w", ref, errdefs.ErrAlreadyExists)
	}
	return r.Snapshots.Prepare(ctx, key, parent, labels)
}

// A client finds what a remote snapshotter made of its own accord.
//
// contract: 3.1.4, 13.9, 3.2.9
func TestRemoteSnapshotter(t *testing.T) {
	c := client(t, remote{memory.NewSnapshots(), "sha256:11"})
	labels := map[string]string{snapshot.LabelRef: "sha256:11", "containerd.io/snapshot/cri.layer-digest": "sha256:22"}
	if _, err := c.Prepare(t.Context(), "extract-1", "", labels); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("prepare of a layer that is there: %v", err)
	}
	var found []snapshot.Info
	err := c.Walk(t.Context(), func(i snapshot.Info) error {
		found = append(found, i)
		return nil
	}, `labels."`+snapshot.LabelRef+`"==sha256:11,parent!=x`, "name==nothing")
	if err != nil || len(found) != 1 || found[0].Kind != snapshot.KindCommitted || found[0].Labels["containerd.io/snapshot/cri.layer-digest"] != "sha256:22" {
		t.Errorf("found %+v (%v)", found, err)
	}
	if _, err := c.Prepare(t.Context(), "top", found[0].Name, nil); err != nil {
		t.Errorf("prepare on it: %v", err)
	}
}

// old is a snapshotter of before the field "parent".
type old struct{ *memory.Snapshots }

func (o old) Commit(ctx context.Context, name, key string, opts snapshot.CommitOptions) error {
	return o.Snapshots.Commit(ctx, name, key, snapshot.CommitOptions{Labels: opts.Labels})
}

// contract: 3.1.5, 13.10
func TestRebaseIsNotSilentlyIgnored(t *testing.T) {
	s := memory.NewSnapshots()
	c := client(t, old{s})
	for key, committed := range map[string]string{"a": "A", "b": ""} {
		if _, err := c.Prepare(t.Context(), key, "", nil); err != nil {
			t.Fatal(err)
		}
		if committed != "" {
			if err := c.Commit(t.Context(), committed, key, snapshot.CommitOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := c.Commit(t.Context(), "B", "b", snapshot.CommitOptions{Parent: "A"}); !errdefs.IsNotImplemented(err) {
		t.Errorf("commit on a parent that the peer ignores: %v", err)
	}
	if _, err := s.Stat(t.Context(), "B"); !errdefs.IsNotFound(err) {
		t.Errorf("the snapshot on nothing: %v", err)
	}
}

// odd is a snapshotter with mounts that the daemon has no idea of.
type odd struct{ *memory.Snapshots }

var oddMounts = []mount.Mount{
	{Type: "erofs", Source: "/dev/loop0", Options: []string{"ro", "X-vendor.key=a,b:c"}},
	{Type: "format/mkdir/overlay", Source: "overlay", Target: "sub/dir", Options: []string{"lowerdir={{ overlay 0 1 }}", ""}},
}

func (odd) Mounts(context.Context, string) ([]mount.Mount, error) { return oddMounts, nil }

func (o odd) View(ctx context.Context, _, _ string, _ map[string]string) ([]mount.Mount, error) {
	return o.Mounts(ctx, "")
}

// Types, targets and options come through as they are.
//
// contract: 3.1.7
func TestMountsPassThrough(t *testing.T) {
	var s snapshot.Store = odd{memory.NewSnapshots()}
	for hops := range 3 {
		for what, get := range map[string]func() ([]mount.Mount, error){
			"Mounts": func() ([]mount.Mount, error) { return s.Mounts(t.Context(), "a") },
			"View":   func() ([]mount.Mount, error) { return s.View(t.Context(), "a", "", nil) },
		} {
			if m, err := get(); err != nil || !reflect.DeepEqual(m, oddMounts) {
				t.Errorf("after %d hops %s answers %v (%v)", hops, what, m, err)
			}
		}
		s = client(t, s)
	}
}

// headers remembers what a request came with.
type headers struct {
	snapshotsapi.UnimplementedSnapshotsServer
	ns    namespace.ID
	lease lease.ID
}

func (h *headers) Remove(ctx context.Context, _ *snapshotsapi.RemoveSnapshotRequest) (_ *emptypb.Empty, err error) {
	h.lease = wire.Lease(ctx)
	h.ns, err = wire.Namespace(ctx)
	return &emptypb.Empty{}, err
}

// contract: 1.2.1, 1.2.4, 3.2.9
func TestHeaders(t *testing.T) {
	h := &headers{}
	conn := wiretest.Serve(t, func(s *grpc.Server) { snapshotsapi.RegisterSnapshotsServer(s, h) })
	for _, c := range []struct {
		ns    namespace.ID
		under lease.ID
		key   string
		want  namespace.ID
	}{
		{"test", "l", "x", "test"},
		{"test", "", "moby/3/x", "test"},
		{"", "", "moby/3/x/y", "moby"}, // a proxy's
		{"", "", "moby/x/y", "default"},
		{"", "", "x", "default"},
		{"", "", "!/3/x", "default"},
	} {
		if err := NewClient(conn, c.ns, c.under, name).Remove(t.Context(), c.key); err != nil {
			t.Fatal(err)
		}
		if h.ns != c.want || h.lease != c.under {
			t.Errorf("%+v: the request came with namespace %q and lease %q", c, h.ns, h.lease)
		}
	}
}

// The leased view of the request is the one that is asked.
//
// contract: 1.2.4
func TestLeasedView(t *testing.T) {
	var seen []string
	src := viewFunc(func(ns namespace.ID, under lease.ID) (view.View, error) {
		seen = append(seen, string(ns)+"/"+string(under))
		return wiretest.Source{SnapshotStores: map[string]snapshot.Store{name: memory.NewSnapshots()}}.In(ns, under)
	})
	conn := wiretest.Serve(t, func(s *grpc.Server) { snapshotsapi.RegisterSnapshotsServer(s, NewServer(src)) })
	if _, err := NewClient(conn, "ns1", "lease1", name).Prepare(t.Context(), "a", "", nil); err != nil {
		t.Fatal(err)
	}
	if len(seen) != 1 || seen[0] != "ns1/lease1" {
		t.Errorf("views were opened for %q", seen)
	}
}

type viewFunc func(namespace.ID, lease.ID) (view.View, error)

func (f viewFunc) In(ns namespace.ID, under lease.ID) (view.View, error) { return f(ns, under) }

func TestInfo(t *testing.T) {
	if i := fromProto(nil); i.Name != "" {
		t.Errorf("no info is %+v", i)
	}
	if i := fromProto(&snapshotsapi.Info{Kind: 77}); i.Kind != snapshot.KindUnknown {
		t.Errorf("kind 77 is %s", i.Kind)
	}
	in := &snapshotsapi.Info{Name: "a", Parent: "b", Kind: snapshotsapi.Kind_COMMITTED, Labels: map[string]string{"x": "y"}}
	if out := toProto(fromProto(in)); !proto.Equal(in, out) {
		t.Errorf("%v came back as %v", in, out)
	}
}
