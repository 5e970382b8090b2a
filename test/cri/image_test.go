//go:build linux

package cri

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	chain "github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	images "github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/testimage"
)

// madeImage is an image that no other test has, which says so in a file.
func madeImage(t *testing.T, config ocispec.ImageConfig, mark string) *testimage.Image {
	t.Helper()
	config.Env = []string{"PATH=/bin"}
	img, err := testimage.New(config, testimage.Layer{Files: testimage.BusyboxFiles(t), Compression: "gzip"},
		testimage.Layer{Files: []testimage.File{{Name: "mark", Body: []byte(t.Name() + mark)}}, Compression: "gzip"})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// configOf is the digest of an image's configuration, and the sum of what a
// registry has of it.
func configOf(t *testing.T, img *testimage.Image) (id string, size int64) {
	t.Helper()
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Blobs[img.Target.Digest], &m); err != nil {
		t.Fatal(err)
	}
	size = img.Target.Size + m.Config.Size
	for _, l := range m.Layers {
		size += l.Size
	}
	return m.Config.Digest.String(), size
}

// imageOf is an image's status, nil if it is not there.
func imageOf(t *testing.T, n *critest.Node, ref string) *runtime.Image {
	t.Helper()
	r, err := n.Images.ImageStatus(critest.Context(t), &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("status of image %s: %v", ref, err)
	}
	return r.Image
}

func removeImage(t *testing.T, n *critest.Node, ref string) {
	t.Helper()
	if _, err := n.Images.RemoveImage(critest.Context(t), &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: ref}}); err != nil {
		t.Errorf("remove image %s: %v", ref, err)
	}
}

// An image is pulled by tag and by digest, under several tags, and is one image
// that is found by each of its names; its records are containerd's three.
//
// contract: 7.2.1, 7.2.2, 13.24
func TestImageNames(t *testing.T) {
	n := node(t)
	v := k8s(t, n)
	ctx := critest.Context(t)
	img := madeImage(t, ocispec.ImageConfig{User: "1000:1000"}, "")
	id, size := configOf(t, img)
	one, two, other := n.Registry.Put("names/a", "one", img), n.Registry.Put("names/a", "two", img), n.Registry.Put("names/b", "one", img)
	repo := strings.TrimSuffix(one, ":one")
	byDigest := repo + "@" + img.Target.Digest.String()
	t.Cleanup(func() { removeImage(t, n, id) })

	if got := n.Pull(t, byDigest); got != id {
		t.Errorf("pull by digest: %s, want %s", got, id)
	}
	if i := imageOf(t, n, byDigest); i == nil || len(i.RepoTags) != 0 || !slices.Equal(i.RepoDigests, []string{byDigest}) || i.Id != id {
		t.Errorf("%v", i)
	}
	for _, ref := range []string{one, two, other, one} {
		if got := n.Pull(t, ref); got != id {
			t.Errorf("pull %s: %s, want %s", ref, got, id)
		}
	}
	for _, ref := range []string{id, strings.TrimPrefix(id, "sha256:"), strings.TrimPrefix(id, "sha256:")[:20], one, two, other, byDigest} {
		i := imageOf(t, n, ref)
		if i == nil || i.Id != id || i.Size != uint64(size) || i.Uid.GetValue() != 1000 || i.Username != "" || i.Pinned {
			t.Fatalf("%s: %v, want size %d", ref, i, size)
		}
		tags, digests := slices.Sorted(slices.Values(i.RepoTags)), slices.Sorted(slices.Values(i.RepoDigests))
		if !slices.Equal(tags, []string{one, two, other}) || len(digests) != 2 || digests[0] != byDigest {
			t.Errorf("%s: %q %q", ref, tags, digests)
		}
	}
	for _, name := range []string{id, one, byDigest} {
		rec, err := v.Images().Get(ctx, name)
		if err != nil || rec.Labels["io.cri-containerd.image"] != "managed" || rec.Target.Digest != img.Target.Digest {
			t.Errorf("record %s: %v %v", name, rec, err)
		}
	}
	// Lists and streams have it once.
	for _, f := range []*runtime.ImageFilter{nil, {Image: &runtime.ImageSpec{Image: two}}} {
		l, err := n.Images.ListImages(ctx, &runtime.ListImagesRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		s, err := n.Images.StreamImages(ctx, &runtime.StreamImagesRequest{Filter: f})
		var streamed []*runtime.Image
		for _, r := range received(t, s, err) {
			streamed = append(streamed, r.Images...)
		}
		for _, all := range [][]*runtime.Image{l.Images, streamed} {
			count := 0
			for _, i := range all {
				if i.Id == id {
					count++
				}
			}
			if count != 1 || f != nil && len(all) != 1 {
				t.Errorf("filter %v: %d times in %d", f, count, len(all))
			}
		}
	}
	// A container says which image it is of, also when the image has gone.
	p := n.Pod(t, "pauseless")
	c := p.Run("cat /mark; sleep 1000", func(c *runtime.ContainerConfig) { c.Image.Image = id; c.Image.UserSpecifiedImage = one })
	if st := c.Status(); st.ImageId != id || !strings.HasSuffix(st.ImageRef, "@"+img.Target.Digest.String()) || st.Image.UserSpecifiedImage != one || !slices.Contains([]string{one, two, other}, st.Image.Image) {
		t.Errorf("%v", st)
	}
	removeImage(t, n, two) // all names go
	for _, ref := range []string{id, one, two, other, byDigest} {
		if i := imageOf(t, n, ref); i != nil {
			t.Errorf("%s is there after its removal: %v", ref, i)
		}
		if _, err := v.Images().Get(ctx, ref); !errdefs.IsNotFound(err) {
			t.Errorf("record %s: %v", ref, err)
		}
	}
	removeImage(t, n, two)
	if out := c.Exec("cat /mark"); out != t.Name() {
		t.Errorf("the container of a removed image: %q", out)
	}
	if st := c.Status(); st.ImageId != id || st.State != runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%v", st)
	}
	if _, err := p.TryCreate("true", func(c *runtime.ContainerConfig) { c.Image.Image = id }); err == nil {
		t.Error("a container of a removed image")
	}
}

// contract: 7.2.2
func TestImageStatus(t *testing.T) {
	n := node(t)
	for name, tt := range map[string]struct {
		user, username string
		uid            *runtime.Int64Value
	}{
		"none":      {"", "", nil},
		"name":      {"daemon", "daemon", nil},
		"name:name": {"daemon:bin", "daemon", nil},
		"number":    {"0", "", &runtime.Int64Value{}},
		"numbers":   {"12:34", "", &runtime.Int64Value{Value: 12}},
	} {
		img := madeImage(t, ocispec.ImageConfig{User: tt.user, Entrypoint: []string{"/bin/sh"}}, name)
		ref := n.Registry.Put("status", strings.ReplaceAll(name, ":", "-"), img)
		n.Pull(t, ref)
		t.Cleanup(func() { removeImage(t, n, ref) })
		r, err := n.Images.ImageStatus(critest.Context(t), &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: ref}, Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		if r.Image.Username != tt.username || (r.Image.Uid == nil) != (tt.uid == nil) || r.Image.Uid.GetValue() != tt.uid.GetValue() {
			t.Errorf("user %q: %v", tt.user, r.Image)
		}
		var info struct {
			ChainID   string
			ImageSpec ocispec.Image
		}
		if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.ChainID != chain.ChainID(img.DiffIDs).String() || info.ImageSpec.Config.User != tt.user || !slices.Equal(info.ImageSpec.Config.Entrypoint, []string{"/bin/sh"}) {
			t.Errorf("%v: %s", err, r.Info["info"])
		}
	}
	if i := imageOf(t, n, n.Registry.Host()+"/none:1"); i != nil {
		t.Errorf("%v", i)
	}
	for ref, is := range map[string]func(error) bool{
		n.Registry.Host() + "/none:1":    errdefs.IsNotFound,
		n.Registry.Host() + "/UPPER:1":   errdefs.IsInvalidArgument,
		"":                               errdefs.IsInvalidArgument,
		n.Registry.Host() + "/x@sha256:": errdefs.IsInvalidArgument,
	} {
		if _, err := n.Images.PullImage(critest.Context(t), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}}); !is(errgrpc.ToNative(err)) {
			t.Errorf("pull %q: %v", ref, err)
		}
	}
}

// A registry that wants to know who asks gets the credentials of the request,
// in each of their forms, and only if they are for it.
//
// contract: 7.2.1
func TestImageCredentials(t *testing.T) {
	n := node(t)
	var strangers atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		user, secret, ok := q.BasicAuth()
		if ok && user != "bob" {
			strangers.Add(1)
		}
		if !ok || user != "bob" || secret != "se:cret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		n.Registry.ServeHTTP(w, q)
	}))
	t.Cleanup(srv.Close)
	host := strings.TrimPrefix(srv.URL, "http://")
	write(t, n.Dir+"/certs.d/"+host+"/hosts.toml", fmt.Sprintf("server = %q\n", srv.URL))
	img := madeImage(t, ocispec.ImageConfig{}, "")
	id, _ := configOf(t, img)
	n.Registry.Put("private", "1", img)
	ref := host + "/private:1"
	pull := func(auth *runtime.AuthConfig) error {
		r, err := n.Images.PullImage(critest.Context(t), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}, Auth: auth})
		if err == nil && r.ImageRef != id {
			t.Errorf("%v", r)
		}
		return err
	}
	encoded := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for name, auth := range map[string]*runtime.AuthConfig{
		"none":           nil,
		"wrong":          {Username: "bob", Password: "guess"},
		"for another":    {Username: "alice", Password: "x", ServerAddress: "https://elsewhere.example.com"},
		"wrong, encoded": {Auth: encoded("bob:guess")},
	} {
		err := pull(auth)
		if err == nil || !strings.Contains(err.Error(), "401") && !strings.Contains(strings.ToLower(err.Error()), "unauthorized") {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && (strings.Contains(err.Error(), "guess") || strings.Contains(err.Error(), encoded("bob:guess"))) {
			t.Errorf("%s: the secret is in the error: %v", name, err)
		}
		if i := imageOf(t, n, ref); i != nil {
			t.Errorf("%s: %v", name, i)
		}
	}
	if strangers.Load() != 0 {
		t.Error("credentials for another host were sent")
	}
	if err := pull(&runtime.AuthConfig{Auth: "not base64!"}); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("%v", err)
	}
	for name, auth := range map[string]*runtime.AuthConfig{
		"plain":      {Username: "bob", Password: "se:cret"},
		"encoded":    {Auth: encoded("bob:se:cret")},
		"for it":     {Username: "bob", Password: "se:cret", ServerAddress: "http://" + host},
		"for it too": {Username: "bob", Password: "se:cret", ServerAddress: host + "/v2/"},
	} {
		if err := pull(auth); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		removeImage(t, n, ref)
	}
	if log := n.Log(1 << 20); strings.Contains(log, "se:cret") || strings.Contains(log, encoded("bob:se:cret")) {
		t.Error("the secret is in the log")
	}
}

// The image of pause containers is pinned; others become so by a label that
// any client may set.
//
// contract: 7.2.4, 7.2.5
func TestPinnedImages(t *testing.T) {
	n := node(t)
	n.Pull(t, n.Pause)
	n.Pull(t, n.Busybox)
	if i := imageOf(t, n, n.Pause); i == nil || !i.Pinned {
		t.Errorf("%v", i)
	}
	if i := imageOf(t, n, n.Busybox); i == nil || i.Pinned {
		t.Errorf("%v", i)
	}
	v := k8s(t, n)
	ref := n.Registry.Put("pinned", "1", madeImage(t, ocispec.ImageConfig{}, ""))
	n.Pull(t, ref)
	t.Cleanup(func() { removeImage(t, n, ref) })
	rec, err := v.Images().Get(critest.Context(t), ref)
	if err != nil {
		t.Fatal(err)
	}
	rec.Labels["io.cri-containerd.pinned"] = "pinned"
	if _, err := v.Images().Update(critest.Context(t), rec, "labels.io.cri-containerd.pinned"); err != nil {
		t.Fatal(err)
	}
	critest.Eventually(t, "the pin", func() bool { i := imageOf(t, n, ref); return i != nil && i.Pinned })
}

// What another client pulls, names or removes in Kubernetes' namespace is seen.
//
// contract: 7.2.5, 1.6.9
func TestOtherClientsImages(t *testing.T) {
	n := node(t)
	v := k8s(t, n)
	ctx := critest.Context(t)
	img := madeImage(t, ocispec.ImageConfig{}, "")
	id, _ := configOf(t, img)
	ref := n.Registry.Put("foreign", "1", img)
	if err := v.Transfer().Transfer(ctx, transfer.Registry{Reference: ref}, transfer.ImageStore{Name: ref}, transfer.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeImage(t, n, id) })
	critest.Eventually(t, "the image of another client", func() bool { i := imageOf(t, n, ref); return i != nil && i.Id == id && imageOf(t, n, id) != nil })
	critest.Eventually(t, "its label", func() bool {
		rec, err := v.Images().Get(ctx, ref)
		return err == nil && rec.Labels["io.cri-containerd.image"] == "managed"
	})
	// It was not unpacked: a container of it can be made all the same.
	if out := n.Pod(t, "pauseless").Output("cat /mark", func(c *runtime.ContainerConfig) { c.Image.Image = ref }); out != t.Name()+"\n" && out != t.Name() {
		t.Errorf("%q", out)
	}
	const alias = "example.com/alias:2"
	if _, err := v.Images().Create(ctx, images.Image{Name: alias, Target: img.Target}); err != nil {
		t.Fatal(err)
	}
	critest.Eventually(t, "the alias", func() bool { i := imageOf(t, n, id); return i != nil && slices.Contains(i.RepoTags, alias) })
	if err := v.Images().Delete(ctx, alias, images.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	critest.Eventually(t, "the alias's end", func() bool { i := imageOf(t, n, id); return i != nil && !slices.Contains(i.RepoTags, alias) })
	for _, name := range []string{ref, id} {
		if err := v.Images().Delete(ctx, name, images.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	critest.Eventually(t, "the image's end", func() bool { return imageOf(t, n, id) == nil && imageOf(t, n, ref) == nil })
}

// contract: 7.2.3
func TestImageFsInfo(t *testing.T) {
	n := node(t)
	n.Pull(t, n.Busybox)
	critest.Eventually(t, "a measurement", func() bool {
		r, err := n.Images.ImageFsInfo(critest.Context(t), &runtime.ImageFsInfoRequest{})
		if err != nil || len(r.ImageFilesystems) == 0 || len(r.ContainerFilesystems) == 0 {
			t.Fatalf("%v %v", r, err)
		}
		fs := r.ImageFilesystems[0]
		if fs.FsId.Mountpoint != n.Dir+"/root/io.containerd.snapshotter.v1.overlayfs" || time.Since(time.Unix(0, fs.Timestamp)) > time.Minute {
			t.Fatalf("%v", fs)
		}
		return fs.UsedBytes.Value > 1<<20 && fs.InodesUsed.Value > 10
	})
}

// A runtime handler may have a snapshotter of its own: images are unpacked for
// it and containers are made on it.
//
// contract: 7.2.6, 7.2.1
func TestHandlerSnapshotter(t *testing.T) {
	n := critest.Run(t, binDir, `
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.copied]
    runtime_type = 'io.containerd.runc.v2'
    sandboxer = 'pauseless'
    snapshotter = 'native'
`)
	v := k8s(t, n)
	status := func(handler string) *runtime.Image {
		t.Helper()
		r, err := n.Images.ImageStatus(critest.Context(t), &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: n.Busybox, RuntimeHandler: handler}})
		if err != nil {
			t.Fatal(err)
		}
		return r.Image
	}
	pull := func(handler string) {
		t.Helper()
		if _, err := n.Images.PullImage(critest.Context(t), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: n.Busybox, RuntimeHandler: handler}}); err != nil {
			t.Fatal(err)
		}
	}
	pull("copied")
	if status("copied") == nil || status("runc") != nil {
		t.Errorf("it is here for one handler, not for the other: %v %v", status("copied"), status("runc"))
	}
	pull("runc")
	if status("runc") == nil {
		t.Error("it is here for both")
	}
	c := n.Pod(t, "copied").Run("sleep 1000")
	r, err := n.RT.ContainerStatus(critest.Context(t), &runtime.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	var info struct{ Snapshotter, SnapshotKey string }
	if err != nil || json.Unmarshal([]byte(r.Info["info"]), &info) != nil || info.Snapshotter != "native" {
		t.Errorf("%v %v", r, err)
	}
	native, err := v.Snapshots("native")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := native.Stat(critest.Context(t), info.SnapshotKey); err != nil {
		t.Error(err)
	}
	img := imageOf(t, n, n.Busybox)
	if config, err := v.Content().Info(critest.Context(t), digest.Digest(img.Id)); err != nil || config.Labels[manifest.LabelSnapshot+"native"] == "" || config.Labels[manifest.LabelSnapshot+"overlayfs"] == "" {
		t.Errorf("%v %v", config, err)
	}
	if _, err := n.Images.PullImage(critest.Context(t), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: n.Busybox, RuntimeHandler: "none"}}); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("%v", err)
	}
}
