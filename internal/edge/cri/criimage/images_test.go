package criimage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/containerd/platforms"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/metrics/metricstest"
	"github.com/gantryd/gantry/internal/edge/registry/registrytest"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
)

var arch = platforms.DefaultSpec().Architecture

// withUser is a small image whose config names a user.
func withUser(user string) *registrytest.Image {
	img := registrytest.Build(arch, 1000, registrytest.Gzip)
	var config ocispec.Image
	_ = json.Unmarshal(img.Blobs[1], &config)
	config.Config.User = user
	img.Blobs[1], _ = json.Marshal(config)
	var m ocispec.Manifest
	_ = json.Unmarshal(img.Top, &m)
	m.Config.Digest, m.Config.Size = digest.FromBytes(img.Blobs[1]), int64(len(img.Blobs[1]))
	img.Top, _ = json.Marshal(m)
	img.Config = m.Config
	img.Target.Digest, img.Target.Size = digest.FromBytes(img.Top), int64(len(img.Top))
	return img
}

func size(img *registrytest.Image, more ...ocispec.Descriptor) uint64 {
	n := img.Target.Size + img.Config.Size
	for _, d := range append(slices.Clone(img.Layers), more...) {
		n += d.Size
	}
	return uint64(n)
}

// From pull to removal, with an index and two tags of one image.
//
// contract: 7.2.1, 7.2.2, 7.2.7, 9.1.9, 13.24
func TestLife(t *testing.T) {
	h := newHouse(t)
	s := h.run()
	reg := registrytest.New(t)
	img, other := registrytest.Build(arch, 50_000, registrytest.Gzip, registrytest.Zstd), registrytest.Build("s390x", 50_000, registrytest.Gzip)
	both := registrytest.Index(other, img)
	reg.AddImage("app", "1", both)
	reg.AddImage("app", "2", both)
	repo := reg.Host() + "/app"

	id := pullOf(t, s, repo+":1", nil)
	if id != img.Config.Digest.String() {
		t.Errorf("id %s, want the config's digest %s", id, img.Config.Digest)
	}
	byDigest := repo + "@" + both.Target.Digest.String()
	got := h.records()
	for _, name := range []string{id, repo + ":1", byDigest} {
		if got[name]["io.cri-containerd.image"] != "managed" {
			t.Errorf("record %s has labels %v", name, got[name])
		}
	}
	if len(got) != 3 {
		t.Errorf("records %v", got)
	}
	if reg.Count(http.MethodGet, other.Layers[0].Digest.String()) != 0 {
		t.Error("another platform's layer was fetched")
	}
	if pullOf(t, s, repo+":2", nil) != id {
		t.Error("the second tag has another id")
	}
	for _, ref := range []string{repo + ":1", repo + ":2", byDigest, id, strings.TrimPrefix(id, "sha256:"), id[len("sha256:"):][:12], repo + ":7@" + both.Target.Digest.String()} {
		r := status(t, s, &runtime.ImageSpec{Image: ref}, false)
		if r.Image.GetId() != id || !slices.Equal(r.Image.RepoTags, []string{repo + ":1", repo + ":2"}) || !slices.Equal(r.Image.RepoDigests, []string{byDigest}) || len(r.Info) != 0 {
			t.Errorf("status of %s: %v", ref, r)
		}
		if r.Image.GetSize() != size(img, both.Target) || r.Image.GetPinned() {
			t.Errorf("size %d, want %d", r.Image.GetSize(), size(img, both.Target))
		}
	}
	chain := identity.ChainID(slices.Clone(img.DiffIDs)).String()
	var info struct {
		ChainID   string
		ImageSpec ocispec.Image
	}
	if err := json.Unmarshal([]byte(status(t, s, &runtime.ImageSpec{Image: id}, true).Info["info"]), &info); err != nil || info.ChainID != chain || info.ImageSpec.Config.Cmd[0] != "/bin/true" {
		t.Errorf("verbose %+v, %v", info, err)
	}
	got1, err := s.Resolve(t.Context(), repo+":1", "")
	if err != nil || got1.ID != id || got1.ChainID != chain || got1.Snapshotter != "native" || got1.Manifest.Digest != img.Target.Digest || got1.Spec.Architecture != arch {
		t.Errorf("resolved %+v, %v", got1, err)
	}
	if n := s.Names(id); n.Ref() != byDigest || n.Tag != repo+":1" {
		t.Errorf("names %+v", n)
	}
	for _, filter := range []string{"", repo + ":2", repo, "absent", repo[:len(repo)-1]} {
		l, err := s.ListImages(t.Context(), &runtime.ListImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: filter}}})
		if err != nil || len(l.Images) != map[bool]int{true: 0, false: 1}[filter == "absent" || filter == repo[:len(repo)-1]] {
			t.Errorf("list %q: %v, %v", filter, l, err)
		}
	}
	if _, err := s.PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: repo + ":absent"}}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), repo+":absent") {
		t.Errorf("pull of what is not there: %v", err)
	}
	const metric = "containerd_cri_sandboxed_"
	if m := metricstest.Read(t, h.metrics); m[metric+"image_pulls_total success"] != 2 || m[metric+"image_pulls_total failure"] != 1 || m[metric+"in_progress_image_pulls_total"] != 0 ||
		m[metric+"image_pulling_throughput"] != 2 || m[metric+"image_pulling_throughput_mibps"] != 2 {
		t.Errorf("metrics %v", m)
	}

	remove(t, s, repo+":1")
	if r := status(t, s, &runtime.ImageSpec{Image: repo + ":2"}, false); r.Image != nil {
		t.Errorf("it is still there: %v", r)
	}
	if got := h.records(); len(got) != 0 {
		t.Errorf("records %v are left", got)
	}
	// The last removal waited for collection.
	if _, err := h.view.Content().Info(t.Context(), img.Layers[0].Digest); !errdefs.IsNotFound(err) {
		t.Errorf("layer: %v", err)
	}
	sn, _ := h.view.Snapshots("native")
	if _, err := sn.Stat(t.Context(), chain); !errdefs.IsNotFound(err) {
		t.Errorf("snapshot: %v", err)
	}
	remove(t, s, repo+":1")
}

// A tag that moves takes its name along, and the old image stays by its digest.
//
// contract: 7.2.1, 7.2.2
func TestMovedTag(t *testing.T) {
	h := newHouse(t)
	s := h.open()
	reg := registrytest.New(t)
	one, two := withUser("1"), withUser("2")
	repo := reg.Host() + "/app"
	reg.AddImage("app", "1", one)
	first := pullOf(t, s, repo+":1", nil)
	reg.AddImage("app", "1", two)
	second := pullOf(t, s, repo+":1", nil)
	if r := status(t, s, &runtime.ImageSpec{Image: first}, false).Image; len(r.GetRepoTags()) != 0 || len(r.GetRepoDigests()) != 1 {
		t.Errorf("old %v", r)
	}
	if r := status(t, s, &runtime.ImageSpec{Image: repo + ":1"}, false).Image; r.GetId() != second {
		t.Errorf("new %v", r)
	}
	remove(t, s, first)
	if r := status(t, s, &runtime.ImageSpec{Image: repo + ":1"}, false).Image; r.GetId() != second || len(h.records()) != 3 {
		t.Errorf("new %v, %v", r, h.records())
	}
	// By digest alone, there is no tag.
	remove(t, s, second)
	if id := pullOf(t, s, repo+"@"+one.Target.Digest.String(), nil); id != first || len(h.records()) != 2 {
		t.Errorf("%s, %v", id, h.records())
	}
}

// contract: 7.2.2
func TestUser(t *testing.T) {
	for user, want := range map[string]*runtime.Image{
		"": {}, "0": {Uid: &runtime.Int64Value{}}, "1000:50": {Uid: &runtime.Int64Value{Value: 1000}}, "www:x": {Username: "www"},
		"4294967296": {Uid: &runtime.Int64Value{Value: 1 << 32}}, "18446744073709551616": {Username: "18446744073709551616"},
		strings.Repeat("u", 300): {Username: strings.Repeat("u", 256)},
	} {
		e := entry{id: "x", facts: facts{user: user[:min(len(user), maxUser)]}}
		if got := e.answer(); got.Username != want.Username || got.Uid.String() != want.Uid.String() {
			t.Errorf("%.20q: %v", user, got)
		}
	}
	// The same through a store.
	h := newHouse(t)
	s := h.open()
	reg := registrytest.New(t)
	reg.AddImage("app", "1", withUser(strings.Repeat("u", 1<<20)))
	pullOf(t, s, reg.Host()+"/app:1", nil)
	if r := status(t, s, &runtime.ImageSpec{Image: reg.Host() + "/app:1"}, false).Image; len(r.GetUsername()) != maxUser {
		t.Errorf("user name of %d bytes", len(r.GetUsername()))
	}
}

// Images of other clients are adopted, follow what those clients do, and are
// unpacked when a container needs them.
//
// contract: 7.2.4, 7.2.5
func TestForeignClient(t *testing.T) {
	h := newHouse(t)
	reg := registrytest.New(t)
	img := registrytest.Build(arch, 10_000, registrytest.Gzip)
	reg.AddImage("app", "1", img)
	reg.AddImage("app", "2", registrytest.Build(arch, 20_000, registrytest.Gzip))
	reg.AddImage("wrong", "1", registrytest.Build("s390x", 10_000, registrytest.Gzip))
	before, after, wrong := reg.Host()+"/app:1", reg.Host()+"/app:2", reg.Host()+"/wrong:1"
	h.foreign(before)
	s := h.run()
	id := img.Config.Digest.String()
	eventually(t, "what was there is adopted", func() bool {
		return h.records()[before]["io.cri-containerd.image"] == "managed" && h.records()[id]["io.cri-containerd.image"] == "managed"
	})
	h.foreign(wrong)
	h.foreign(after)
	eventually(t, "what comes is adopted", func() bool {
		return len(h.records()) == 5 && status(t, s, &runtime.ImageSpec{Image: after}, false).Image != nil
	})
	if status(t, s, &runtime.ImageSpec{Image: wrong}, false).Image != nil {
		t.Error("another platform's image is shown")
	}

	got, err := s.Resolve(t.Context(), before, "")
	if err != nil {
		t.Fatal(err)
	}
	sn, _ := h.view.Snapshots("native")
	if _, err := sn.Stat(t.Context(), got.ChainID); !errdefs.IsNotFound(err) {
		t.Fatalf("unpacked already? %v", err)
	}
	l, err := h.view.Leases().Create(t.Context(), lease.Lease{})
	if err != nil {
		t.Fatal(err)
	}
	leased, err := h.deps.Source.In(cristate.Namespace, l.ID)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.EnsureUnpacked(t.Context(), leased, got); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := sn.Stat(t.Context(), got.ChainID); err != nil {
		t.Error(err)
	}

	pin := image.Image{Name: before, Labels: map[string]string{"io.cri-containerd.pinned": "pinned"}}
	if _, err := h.view.Images().Update(t.Context(), pin, "labels.io.cri-containerd.pinned"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is pinned", func() bool { return status(t, s, &runtime.ImageSpec{Image: id}, false).Image.GetPinned() })
	for _, name := range []string{before, id} {
		if err := h.view.Images().Delete(t.Context(), name, image.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "it is gone", func() bool { return status(t, s, &runtime.ImageSpec{Image: id}, false).Image == nil })
}

// What an interrupted pull left is completed or not shown.
//
// contract: 7.2.5
func TestRecover(t *testing.T) {
	h := newHouse(t)
	reg := registrytest.New(t)
	img, broken := registrytest.Build(arch, 10_000, registrytest.Gzip), registrytest.Build(arch, 20_000, registrytest.Gzip)
	reg.AddImage("app", "1", img)
	reg.AddImage("app", "2", broken)
	s := h.open()
	id := pullOf(t, s, reg.Host()+"/app:1", nil)
	if err := h.view.Images().Delete(t.Context(), id, image.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	h.foreign(reg.Host() + "/app:2")
	if err := h.view.Content().Delete(t.Context(), broken.Layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	again := h.open()
	if h.records()[id]["io.cri-containerd.image"] != "managed" || status(t, again, &runtime.ImageSpec{Image: id}, false).Image.GetId() != id {
		t.Errorf("records %v", h.records())
	}
	if status(t, again, &runtime.ImageSpec{Image: reg.Host() + "/app:2"}, false).Image != nil {
		t.Error("an image without its layer is shown")
	}
	// The kubelet pulls it anew, which mends it.
	pullOf(t, again, reg.Host()+"/app:2", nil)
	if status(t, again, &runtime.ImageSpec{Image: reg.Host() + "/app:2"}, false).Image == nil {
		t.Error("it is not mended")
	}
	// Deleted while nobody looked.
	tag := reg.Host() + "/app:1"
	if err := h.view.Images().Delete(t.Context(), tag, image.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := again.Recover(t.Context()); err != nil || again.Names(id).Tag != "" || again.Names(id).Digest == "" {
		t.Errorf("%v, %+v", err, again.Names(id))
	}
}

// contract: 7.2.6
func TestHandlers(t *testing.T) {
	h := newHouse(t)
	h.deps.Config.RuntimePlatforms = map[string]cristate.RuntimePlatform{"ibm": {Platform: "linux/s390x", Snapshotter: "second"}}
	h.deps.Runtime.Containerd.Runtimes["ibm"] = cristate.Runtime{Type: "x"}
	s := h.open()
	reg := registrytest.New(t)
	own, ibm := registrytest.Build(arch, 10_000, registrytest.Gzip), registrytest.Build("s390x", 10_000, registrytest.Gzip)
	reg.AddImage("app", "1", registrytest.Index(own, ibm))
	ref := reg.Host() + "/app:1"
	pull := func(spec *runtime.ImageSpec) string {
		t.Helper()
		r, err := s.PullImage(t.Context(), &runtime.PullImageRequest{Image: spec})
		if err != nil {
			t.Fatal(err)
		}
		return r.ImageRef
	}
	there := func(snapshotter string, img *registrytest.Image) bool {
		sn, err := h.view.Snapshots(snapshotter)
		if err != nil {
			t.Fatal(err)
		}
		_, err = sn.Stat(t.Context(), identity.ChainID(slices.Clone(img.DiffIDs)).String())
		return err == nil
	}
	pull(&runtime.ImageSpec{Image: ref})
	kata := &runtime.ImageSpec{Image: ref, RuntimeHandler: "kata"}
	if status(t, s, kata, false).Image != nil || there("second", own) {
		t.Error("it is here for kata before it is pulled")
	}
	if id := pull(&runtime.ImageSpec{Image: ref, Annotations: map[string]string{"io.containerd.cri.runtime-handler": "kata"}}); id != own.Config.Digest.String() || !there("second", own) {
		t.Error("not unpacked for kata")
	}
	if status(t, s, kata, false).Image == nil {
		t.Error("it is not here for kata")
	}
	id := pull(&runtime.ImageSpec{Image: ref, RuntimeHandler: "ibm"})
	if id != ibm.Config.Digest.String() || !there("second", ibm) {
		t.Errorf("id %s for another platform", id)
	}
	for _, name := range []string{ref, id} {
		if got, err := s.Resolve(t.Context(), name, "ibm"); err != nil || got.ID != id || got.Spec.Architecture != "s390x" || got.Snapshotter != "second" {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if got, err := s.Resolve(t.Context(), ref, ""); err != nil || got.ID != own.Config.Digest.String() {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := s.PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref, RuntimeHandler: "nope"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown handler: %v", err)
	}
}

// contract: 7.2.4, 7.3.26
func TestSandboxImage(t *testing.T) {
	h := newHouse(t)
	if s := h.open(); s.SandboxImage() != "registry.k8s.io/pause:3.10.2" {
		t.Errorf("sandbox image %s", s.SandboxImage())
	}
	reg := registrytest.New(t)
	img := registrytest.Build(arch, 1000, registrytest.Gzip)
	reg.AddImage("pause", "1", img)
	h.deps.Config.PinnedImages = map[string]string{"sandbox": reg.Host() + "/pause:1"}
	s := h.open()
	if _, err := s.EnsureSandboxImage(t.Context(), "kata"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "disable_pause_image_pull") {
		t.Errorf("%v", err)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if got, err := s.EnsureSandboxImage(t.Context(), ""); err != nil || got.ID != img.Config.Digest.String() {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
	wg.Wait()
	if n := metricstest.Read(t, h.metrics)["containerd_cri_sandboxed_image_pulls_total success"]; n != 1 {
		t.Errorf("pulled %v times", n)
	}
	for name, labels := range h.records() {
		if labels["io.cri-containerd.pinned"] != "pinned" {
			t.Errorf("%s has %v", name, labels)
		}
	}
	if !status(t, s, &runtime.ImageSpec{Image: reg.Host() + "/pause:1"}, false).Image.GetPinned() {
		t.Error("not pinned")
	}
	// It is here now, so that it need not be pulled for another snapshotter.
	asked := len(reg.Requests())
	got, err := s.EnsureSandboxImage(t.Context(), "kata")
	if err != nil || got.Snapshotter != "second" || len(reg.Requests()) != asked {
		t.Errorf("%+v, %v", got, err)
	}
	if sn, _ := h.view.Snapshots("second"); sn != nil {
		if _, err := sn.Stat(t.Context(), got.ChainID); err != nil {
			t.Error(err)
		}
	}
	if l, err := h.view.Leases().List(t.Context()); err != nil || len(l) != 0 {
		t.Errorf("leases %v, %v", l, err)
	}
}

// contract: 7.2.3
func TestFsInfo(t *testing.T) {
	h := newHouse(t)
	s := h.open()
	info := func() *runtime.ImageFsInfoResponse {
		r, err := s.ImageFsInfo(t.Context(), &runtime.ImageFsInfoRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := info(); len(r.ImageFilesystems) != 1 || r.ImageFilesystems[0].FsId.GetMountpoint() != h.deps.Roots["native"] || r.ImageFilesystems[0].UsedBytes.GetValue() != 0 {
		t.Errorf("empty: %v", r)
	}
	reg := registrytest.New(t)
	reg.AddImage("app", "1", registrytest.Build(arch, 100_000, registrytest.Gzip, registrytest.Gzip))
	ref := reg.Host() + "/app:1"
	pullOf(t, s, ref, nil)
	if _, err := s.Pull(t.Context(), ref, "kata", nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"native", "second"} {
		for range 2 {
			if err := s.usage.measure(t.Context(), name); err != nil {
				t.Fatal(err)
			}
		}
	}
	r := info()
	if len(r.ImageFilesystems) != 2 || r.ImageFilesystems[0].FsId.GetMountpoint() != h.deps.Roots["native"] || len(r.ContainerFilesystems) == 0 {
		t.Fatalf("%v", r)
	}
	sn, _ := h.view.Snapshots("native")
	var want snapshot.Usage
	if err := sn.Walk(t.Context(), func(i snapshot.Info) error {
		u, err := sn.Usage(t.Context(), i.Name)
		want.Size, want.Inodes = want.Size+u.Size, want.Inodes+u.Inodes
		if got, ok := s.SnapshotUsage("native", i.Name); !ok || got.Usage != u {
			t.Errorf("%s: %+v, want %+v", i.Name, got, u)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if f := r.ImageFilesystems[0]; f.UsedBytes.GetValue() != uint64(want.Size) || f.InodesUsed.GetValue() != uint64(want.Inodes) || want.Size < 200_000 || time.Since(time.Unix(0, f.Timestamp)) > time.Minute {
		t.Errorf("%v, want %+v", f, want)
	}
	remove(t, s, ref)
	if err := s.usage.measure(t.Context(), "native"); err != nil {
		t.Fatal(err)
	}
	if f := info().ImageFilesystems[0]; f.UsedBytes.GetValue() != 0 {
		t.Errorf("after removal %v", f)
	}
}

// contract: 7.2.1, 7.2.2
func TestBadInput(t *testing.T) {
	h := newHouse(t)
	s := h.open()
	for _, ref := range []string{"", "localhost:1/Upper", "a b", strings.Repeat("x", 100_000), "localhost:5000/x@sha256:12", "../../etc/passwd"} {
		for _, r := range []*runtime.PullImageRequest{nil, {}, {Image: &runtime.ImageSpec{Image: ref}}} {
			if _, err := s.PullImage(t.Context(), r); !errdefs.IsInvalidArgument(err) || len(err.Error()) > 1000 {
				t.Errorf("pull %.20q: %.200v", ref, err)
			}
		}
		_, serr := s.ImageStatus(t.Context(), &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: ref}})
		_, rerr := s.RemoveImage(t.Context(), &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: ref}})
		for _, err := range []error{serr, rerr} {
			if (ref == "") != errdefs.IsInvalidArgument(err) || ref != "" && err != nil {
				t.Errorf("%.20q: %v", ref, err)
			}
		}
		if _, err := s.Resolve(t.Context(), ref, ""); ref != "" && !errdefs.IsNotFound(err) || len(err.Error()) > 1000 {
			t.Errorf("resolve %.20q: %.200v", ref, err)
		}
	}
	if _, err := s.ImageStatus(t.Context(), nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	if got := h.records(); len(got) != 0 {
		t.Errorf("records %v", got)
	}
	// Two ids that begin alike.
	for i := range 2 {
		s.index.put(fmt.Sprint(i), ref{}, facts{config: ocispec.Descriptor{Digest: digest.Digest("sha256:" + strings.Repeat("a", 63) + fmt.Sprint(i))}})
	}
	if _, err := s.Resolve(t.Context(), "aaa", ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
}

// Layers that are unpacked go when the configuration says so, the image stays.
//
// contract: 7.2.1
func TestDiscardLayers(t *testing.T) {
	h := newHouse(t)
	h.deps.Config.DiscardUnpackedLayers = true
	s := h.open()
	reg := registrytest.New(t)
	img := registrytest.Build(arch, 10_000, registrytest.Gzip, registrytest.Gzip)
	reg.AddImage("app", "1", img)
	id := pullOf(t, s, reg.Host()+"/app:1", nil)
	l, err := h.view.Leases().Create(t.Context(), lease.Lease{})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.view.Leases().Delete(t.Context(), l.ID, true); err != nil { // collects
		t.Fatal(err)
	}
	if _, err := h.view.Content().Info(t.Context(), img.Layers[1].Digest); !errdefs.IsNotFound(err) {
		t.Errorf("layer: %v", err)
	}
	again := h.open()
	if got, err := again.Resolve(t.Context(), id, ""); err != nil || again.EnsureUnpacked(t.Context(), h.view, got) != nil {
		t.Errorf("%+v, %v", got, err)
	}
}

// Remote snapshotters are told which image a layer is from, if they shall be;
// an image cannot tell them something else.
//
// contract: 7.2.1, 1.5.16
func TestSnapshotAnnotations(t *testing.T) {
	for _, described := range []bool{false, true} {
		h := newHouse(t)
		h.deps.Config.DisableSnapshotAnnotations = !described
		s := h.open()
		reg := registrytest.New(t)
		img := registrytest.Build(arch, 10_000, registrytest.Gzip, registrytest.Gzip)
		reg.AddImage("app", "1", img)
		pullOf(t, s, reg.Host()+"/app:1", nil)
		sn, _ := h.view.Snapshots("native")
		for i, chain := range identity.ChainIDs(slices.Clone(img.DiffIDs)) {
			info, err := sn.Stat(t.Context(), chain.String())
			if err != nil {
				t.Fatal(err)
			}
			both := img.Layers[i].Digest.String()
			if i == 0 {
				both += "," + img.Layers[1].Digest.String()
			}
			for k, want := range map[string]string{"image-ref": reg.Host() + "/app:1", "manifest-digest": img.Target.Digest.String(),
				"layer-digest": img.Layers[i].Digest.String(), "image-layers": both} {
				if !described {
					want = ""
				}
				if got := info.Labels["containerd.io/snapshot/cri."+k]; got != want {
					t.Errorf("described %v, layer %d: %s is %q, want %q", described, i, k, got, want)
				}
			}
		}
	}
}

// Each image is sent once, in more than one message.
//
// contract: 7.2.2
func TestStream(t *testing.T) {
	h := newHouse(t)
	s := h.open()
	<-s.Ready()
	var want []string
	for i := range 250 {
		id := digest.FromString(fmt.Sprint(i))
		want = append(want, id.String())
		s.index.put(id.String(), ref{}, facts{config: ocispec.Descriptor{Digest: id}})
	}
	slices.Sort(want)
	client := runtime.NewImageServiceClient(wiretest.Serve(t, func(g *grpc.Server) { runtime.RegisterImageServiceServer(g, s) }))
	stream, err := client.StreamImages(t.Context(), &runtime.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	messages := 0
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		messages++
		for _, i := range r.Images {
			got = append(got, i.Id)
		}
	}
	if !slices.Equal(got, want) || messages < 2 {
		t.Errorf("%d images in %d messages", len(got), messages)
	}
	if _, err := client.ImageStatus(t.Context(), &runtime.ImageStatusRequest{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
}

// hung is a view whose snapshotter "second" never answers.
type hung struct {
	view.View
	asked chan struct{}
	over  chan struct{}
}

func (v hung) Snapshots(name string) (snapshot.Store, error) {
	if name != "second" {
		return v.View.Snapshots(name)
	}
	close(v.asked)
	<-v.over
	return nil, errdefs.ErrUnavailable
}

// A snapshotter that hangs disturbs neither the others nor the end.
//
// contract: 7.2.3
func TestHungSnapshotter(t *testing.T) {
	h := newHouse(t)
	s := h.open()
	s.patience = 50 * time.Millisecond
	v := hung{s.view, make(chan struct{}), make(chan struct{})}
	defer close(v.over)
	s.usage = newSampler(v, s.d.Log)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); _ = s.Run(ctx) }()
	<-v.asked
	eventually(t, "the other is measured", func() bool { return len(s.usage.sums()) == 1 })
	stop()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("it does not end")
	}
}
