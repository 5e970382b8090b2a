package transfer_test

import (
	"sync"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/registry"
	core "github.com/gantryd/gantry/core/transfer"
	edge "github.com/gantryd/gantry/internal/edge/registry"
	"github.com/gantryd/gantry/internal/edge/registry/registrytest"
)

func unpackMemory() []core.Unpack {
	return []core.Unpack{{Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"}, Snapshotter: "memory"}}
}

// TestDebianRegistry pushes an image to a real registry and pulls it back, with
// and without authentication.
//
// contract: 6.1.1, 6.1.2, 6.1.3, 6.1.8, 6.3.1, 6.3.7, 6.4.1, 1.5.3, 1.5.11
func TestDebianRegistry(t *testing.T) {
	for _, auth := range []bool{false, true} {
		host := registrytest.Debian(t, auth)
		w := newWorld(t, edge.Config{})
		opts := registry.Options{}
		if auth {
			opts.Credentials = func(_ contextT, q registry.AuthRequest) (registry.Credential, error) {
				if q.Host != host {
					t.Errorf("asked for credentials of %s", q.Host)
				}
				return registry.Credential{Username: registrytest.User, Secret: registrytest.Password}, nil
			}
		}
		src := registrytest.New(t)
		img := registrytest.Build("amd64", 300_000, registrytest.Gzip, registrytest.Zstd, registrytest.None)
		src.AddImage("lib/app", "1", img)

		var mu sync.Mutex
		seen := map[string]int{}
		progress := core.Options{Progress: func(p core.Progress) { mu.Lock(); seen[p.Event]++; mu.Unlock() }}
		name := src.Host() + "/lib/app:1"
		store := core.ImageStore{Name: name, Unpacks: unpackMemory()}
		if err := w.transfer(core.Registry{Reference: name}, store, progress); err != nil {
			t.Fatal(err)
		}
		remote := host + "/copy/app:v2"
		if err := w.transfer(core.ImageStore{Name: name}, core.Registry{Reference: remote, Options: opts}, progress); err != nil {
			t.Fatal(err)
		}
		w.clean(1)
		other := newWorld(t, edge.Config{})
		if err := other.transfer(core.Registry{Reference: remote, Options: opts}, core.ImageStore{Name: remote, Unpacks: unpackMemory()}, progress); err != nil {
			t.Fatal(err)
		}
		other.clean(1)
		got, err := other.space("test").images.Get(t.Context(), remote)
		if err != nil || got.Target.Digest != img.Target.Digest {
			t.Fatalf("pulled %v, %v", got.Target, err)
		}
		info, err := other.space("test").content.Info(t.Context(), img.Config.Digest)
		if err != nil || info.Labels[manifest.LabelSnapshot+"memory"] == "" {
			t.Errorf("config's labels %v, %v", info.Labels, err)
		}
		if v := info.Labels[registry.LabelSource+host]; v != "copy/app" {
			t.Errorf("source label is %q", v)
		}
		for _, e := range []string{"Resolving from OCI Registry (" + name + ")", "Pulling from OCI Registry (" + name + ")", "fetching image content",
			"waiting", "downloading", "complete", "extracting", "extracted", "saved", "Completed pull from OCI Registry (" + name + ")",
			"Pushing to OCI Registry (" + remote + ")", "pushing content", "pushed content", "uploading", "Completed push to OCI Registry (" + remote + ")"} {
			if seen[e] == 0 {
				t.Errorf("no progress event %q", e)
			}
		}
		if auth {
			err := other.transfer(core.Registry{Reference: remote}, core.ImageStore{Name: "x"}, core.Options{})
			wantError(t, err, isUnauthenticated, "pull access denied, repository does not exist or may require authorization")
			other.clean(1)
		}
	}
}
