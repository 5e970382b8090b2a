package boltmeta

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/engine/blobdir"
	"github.com/gantryd/gantry/internal/engine/overlay"
)

// TestDebianContainerdReads makes a root, has Debian's containerd list and
// change it, and opens it again: a host can be switched back and forth.
//
// contract: 4.4.1, 4.4.3, 3.1.3
func TestDebianContainerdReads(t *testing.T) {
	bin := os.Getenv("GANTRY_DEBIAN_CONTAINERD")
	if bin == "" {
		bin = "/opt/deb/usr/bin"
	}
	daemon, ctr := filepath.Join(bin, "containerd"), filepath.Join(bin, "ctr")
	if _, err := os.Stat(daemon); err != nil {
		t.Skipf("Debian's containerd is not there: %v", err)
	}
	if os.Geteuid() != 0 {
		t.Skip("containerd needs root")
	}
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	root := filepath.Join(dir, "root")
	ctx := t.Context()
	open := func() (db *DB, done func()) {
		t.Helper()
		blobs, err := blobdir.Open(filepath.Join(root, "io.containerd.content.v1.content"), blobdir.Options{})
		if err != nil {
			t.Fatal(err)
		}
		sn, err := overlay.Open(filepath.Join(root, "io.containerd.snapshotter.v1.overlayfs"), overlay.Config{}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Skipf("no overlay here: %v", err)
		}
		db, err = Open(filepath.Join(root, "io.containerd.metadata.v1.bolt/meta.db"), Options{Content: blobs, Snapshotters: map[string]snapshot.Store{"overlayfs": sn}, OpenTimeout: 5 * time.Second})
		if err != nil {
			sn.Close()
			t.Fatal(err)
		}
		return db, func() {
			t.Helper()
			for _, p := range db.Check(ctx) {
				t.Errorf("check: %s", p)
			}
			if err := db.Close(); err != nil {
				t.Error(err)
			}
			if err := sn.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	db, done := open()
	v := must(db.In("default", ""))(t)
	sn := must(v.Snapshots("overlayfs"))(t)
	layer := put(t, v.Content(), "a layer", nil)
	chain := layer.String() // that of a single layer
	config := put(t, v.Content(), `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["`+layer.String()+`"]}}`, map[string]string{"containerd.io/gc.ref.snapshot.overlayfs": chain})
	manifest, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": map[string]any{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": must(v.Content().Info(ctx, config))(t).Size},
		"layers": []any{map[string]any{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": 7}}})
	if err != nil {
		t.Fatal(err)
	}
	mdgst := put(t, v.Content(), string(manifest), map[string]string{"containerd.io/gc.ref.content.config": config.String(), "containerd.io/gc.ref.content.l.0": layer.String()})
	img := image.Image{Name: "example.test/made:1", Labels: map[string]string{"made": "here"}}
	img.Target.MediaType, img.Target.Digest, img.Target.Size = "application/vnd.oci.image.manifest.v1+json", mdgst, int64(len(manifest))
	must(v.Images().Create(ctx, img))(t)
	must(sn.Prepare(ctx, "extract", "", nil))(t)
	if err := sn.Commit(ctx, chain, "extract", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	must(sn.Prepare(ctx, "box", chain, nil))(t)
	must(v.Containers().Create(ctx, container.Container{ID: "box", Image: img.Name, Snapshotter: "overlayfs", SnapshotKey: "box", Labels: map[string]string{"made": "here"},
		Runtime: container.Runtime{Name: "io.containerd.runc.v2"}, Spec: typed.Any{URL: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: []byte(`{"ociVersion":"1.0.2","hostname":"from-gantry"}`)}}))(t)
	must(v.Leases().Create(ctx, lease.Lease{ID: "kept", Labels: map[string]string{"made": "here"}}))(t)
	w := must(must(db.In("default", "kept"))(t).Content().Writer(ctx, "half", content.WriterOptions{Total: 10}))(t)
	io.WriteString(w, "half")
	w.Close()
	must(db.Namespaces().Create(ctx, namespace.Namespace{ID: "second", Labels: map[string]string{"a": "b"}}))(t)
	done()

	// Theirs.
	conf := filepath.Join(dir, "config.toml")
	sock := filepath.Join(dir, "c.sock")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "version = 2\nroot = %q\nstate = %q\ndisabled_plugins = ['io.containerd.grpc.v1.cri','io.containerd.snapshotter.v1.btrfs','io.containerd.snapshotter.v1.zfs','io.containerd.snapshotter.v1.devmapper','io.containerd.snapshotter.v1.aufs']\n[grpc]\naddress = %q\n[debug]\naddress = ''\n", root, filepath.Join(dir, "state"), sock), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	theirs := exec.Command(daemon, "-c", conf)
	theirs.Stderr, theirs.Stdout = &log, &log
	theirs.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := theirs.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop := func() {
		if !stopped {
			stopped = true
			theirs.Process.Signal(syscall.SIGTERM)
			theirs.Wait()
		}
	}
	t.Cleanup(stop)
	run := func(args ...string) string {
		t.Helper()
		c, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		out, err := exec.CommandContext(c, ctr, append([]string{"-a", sock}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("ctr %q: %v: %s\n%s", args, err, out, log.String())
		}
		return string(out)
	}
	for end := time.Now().Add(20 * time.Second); ; {
		if exec.Command(ctr, "-a", sock, "--connect-timeout", "1s", "version").Run() == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("containerd does not answer: %s", log.String())
		}
		time.Sleep(50 * time.Millisecond)
	}
	for _, c := range []struct {
		cmd  string
		want []string
	}{
		{"images ls", []string{img.Name, mdgst.String(), "made=here"}},
		{"images check", []string{img.Name, "complete (2/2)", "true"}},
		{"content ls", []string{layer.String(), config.String(), mdgst.String(), "containerd.io/gc.ref.content.l.0=" + layer.String()}},
		{"content get " + layer.String(), []string{"a layer"}},
		{"content active", []string{"half"}},
		{"snapshots ls", []string{chain, "box", "Active", "Committed"}},
		{"snapshots mounts /x box", []string{"lowerdir=" + root}},
		{"containers info box", []string{"from-gantry", `"SnapshotKey": "box"`, `"made": "here"`}},
		{"leases ls", []string{"kept", "made=here"}},
		{"namespaces ls", []string{"second", "a=b"}},
	} {
		out := run(strings.Fields(c.cmd)...)
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("ctr %s: no %q in\n%s", c.cmd, want, out)
			}
		}
	}
	// They change something: remove, add, and collect.
	run("snapshots", "prepare", "theirs", chain)
	run("images", "label", img.Name, "made=there")
	run("leases", "create", "--id", "new", "x=y")
	run("containers", "rm", "box")
	run("images", "tag", img.Name, "example.test/made:2")
	run("images", "rm", "--sync", "example.test/made:2")
	stop()

	db, done = open()
	defer done()
	v = must(db.In("default", ""))(t)
	if i := must(v.Images().Get(ctx, img.Name))(t); i.Labels["made"] != "there" {
		t.Errorf("image %+v", i)
	}
	if got := names(t, must(v.Snapshots("overlayfs"))(t)); !strings.Contains(got, chain) || strings.Contains(got, "box") {
		t.Errorf("snapshots %q", got)
	}
	r := must(v.Content().Open(ctx, digest.Digest(layer)))(t)
	r.Close()
	if l := must(v.Leases().List(ctx))(t); len(l) != 2 {
		t.Errorf("leases %v", l)
	}
}
