//go:build linux

package docker

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/test/daemontest"
)

// buildkit is a gantryd with a buildkitd.
type buildkit struct {
	*host
	cmd *exec.Cmd
}

func (b *buildkit) start() {
	b.t.Helper()
	b.cmd = exec.Command(b.bin+"/buildkitd", "--config", b.dir+"/buildkitd.toml", "--addr", "unix://"+b.dir+"/bk", "--root", b.dir+"/buildkit",
		"--oci-worker=false", "--containerd-worker=true", "--containerd-worker-addr", b.Address())
	b.cmd.Stdout, b.cmd.Stderr = b.log, b.log
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := b.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.eventually("a worker", func() bool { _, err := b.ctl("debug", "workers"); return err == nil })
}

func (b *buildkit) stop() {
	if b.cmd == nil {
		return
	}
	b.cmd.Process.Signal(syscall.SIGTERM)
	killer := time.AfterFunc(daemontest.Slow(time.Minute), func() { b.cmd.Process.Kill() })
	defer killer.Stop()
	b.cmd.Wait()
	b.cmd = nil
}

func (b *buildkit) ctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), daemontest.Slow(2*time.Minute))
	defer cancel()
	out, err := exec.CommandContext(ctx, b.bin+"/buildctl", append([]string{"--addr", "unix://" + b.dir + "/bk"}, args...)...).CombinedOutput()
	return string(out), err
}

// builder are the arguments that build a Dockerfile, without a network.
func (b *buildkit) builder(name, dockerfile string) []string {
	b.t.Helper()
	dir := b.dir + "/" + name
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	for file, content := range map[string]string{"Dockerfile": strings.ReplaceAll(dockerfile, "@", b.image), "file": "file\n"} {
		if err := os.WriteFile(dir+"/"+file, []byte(content), 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
	return []string{"build", "--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir, "--progress", "plain", "--opt", "force-network-mode=none"}
}

// build builds one that must succeed.
func (b *buildkit) build(name, dockerfile string, more ...string) string {
	b.t.Helper()
	out, err := b.ctl(append(b.builder(name, dockerfile), more...)...)
	if err != nil {
		b.t.Fatalf("build %s %q: %v: %s", name, more, err, out)
	}
	return out
}

// empties prunes all, after which Gantry has nothing.
func (b *buildkit) empties() {
	b.t.Helper()
	c, err := client.Dial(b.Address())
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), daemontest.Slow(time.Minute))
	defer cancel()
	v, err := c.In("buildkit", "")
	if err != nil {
		b.t.Fatal(err)
	}
	images, err := v.Images().List(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, i := range images {
		if err := v.Images().Delete(ctx, i.Name, image.DeleteOptions{}); err != nil {
			b.t.Error(err)
		}
	}
	b.eventually("nothing in use", func() bool {
		if out, err := b.ctl("prune", "--all"); err != nil {
			b.t.Fatalf("prune: %v: %s", err, out)
		}
		return b.bare() // it has waited for what it has removed
	})
	leases, err := v.Leases().List(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, l := range leases {
		b.t.Errorf("left: lease %s", l.ID)
	}
	if tasks, _ := filepath.Glob(b.Dir + "/state/io.containerd.runtime.v2.task/buildkit/*"); len(tasks) > 0 {
		b.t.Errorf("left: %q", tasks)
	}
}

const stages = `FROM @ AS one
RUN echo built >/built && mkdir /big && head -c 1000000 /dev/zero >/big/zeros
RUN --mount=type=cache,target=/cache echo x >>/cache/x && wc -l /cache/x
FROM @
COPY --from=one /built /built
COPY file /file
WORKDIR /
RUN --mount=type=tmpfs,target=/t --mount=type=bind,from=one,source=/big,target=/b wc -c </b/zeros >/size && rm -r /data && mkdir /data && ln -s /size /data/link
RUN --mount=type=secret,id=s test "$(cat /run/secrets/s)" = hush && ip -o link | grep -c . >/links
USER user
RUN test "$(id -u)" = 1000 && ! touch /x
`

// BuildKit's own daemon with Gantry as its worker, if GANTRY_DOCKER has
// buildkitd and buildctl too: what it makes of a Dockerfile, what it finds again
// here and elsewhere, and that all of it goes.
func TestBuildKit(t *testing.T) { // contract: 1.3.21, 1.3.24, 1.5.9, 13.15, 13.33, 14.4
	bin := programs(t)
	if _, err := os.Stat(bin + "/buildkitd"); err != nil {
		t.Skip("GANTRY_DOCKER has no buildkitd")
	}
	b := &buildkit{host: newDaemon(t, bin)}
	t.Cleanup(b.stop)
	host := b.reg.Host()
	err := os.WriteFile(b.dir+"/buildkitd.toml", fmt.Appendf(nil, "[worker.containerd]\ndefaultCgroupParent = %q\ncniConfigPath = %q\n[registry.%q]\nhttp = true\n", "/"+b.Mark, b.dir+"/none", host), 0o600)
	if err == nil {
		err = os.WriteFile(b.dir+"/secret", []byte("hush"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.start()
	uuid, err := os.ReadFile(b.Dir + "/root/io.containerd.grpc.v1.introspection/uuid")
	if err != nil {
		t.Fatal(err)
	}
	workers, _ := b.ctl("debug", "workers", "-v")
	b.has("workers", workers, strings.TrimSpace(string(uuid)))
	b.has("workers", workers, "linux/amd64")

	secret := []string{"--secret", "id=s,src=" + b.dir + "/secret"}
	build := func(more ...string) string { return b.build("stages", stages, append(secret, more...)...) }
	files := func(more ...string) {
		t.Helper()
		tar := b.dir + "/files.tar"
		build(append(more, "--output", "type=tar,dest="+tar)...)
		for name, want := range map[string]string{"built": "built\n", "file": "file\n", "size": "1000000\n", "links": "1\n"} {
			if got, err := exec.Command("tar", "-xOf", tar, name).Output(); err != nil || string(got) != want {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		if list, err := exec.Command("tar", "-tf", tar, "data").Output(); err != nil || string(list) != "data/\ndata/link\n" {
			t.Errorf("data: %s, %v", list, err)
		}
	}
	files()
	for _, compression := range []string{"gzip", "zstd", "uncompressed", "estargz"} {
		out := build("--output", "type=image,name="+host+"/built:"+compression+",push=true,unpack=true,oci-mediatypes=true,force-compression=true,compression="+compression)
		b.has(compression, out, "CACHED")
	}
	for kind, file := range map[string]string{"oci": "index.json", "docker": "manifest.json"} {
		archive := b.dir + "/" + kind + ".tar"
		build("--output", "type="+kind+",name=x/y:1,dest="+archive)
		if err := exec.Command("tar", "-tf", archive, file).Run(); err != nil {
			t.Errorf("an archive %s: %v", kind, err)
		}
	}
	if usage, err := b.ctl("du", "-v"); err != nil || !strings.Contains(usage, "exec.cachemount") {
		t.Errorf("du: %v: %s", err, usage)
	}
	build("--export-cache", "type=registry,ref="+host+"/cache:1,mode=max")
	build("--export-cache", "type=local,dest="+b.dir+"/cache,mode=max")
	for _, from := range []string{"type=registry,ref=" + host + "/cache:1", "type=local,src=" + b.dir + "/cache"} {
		b.empties()
		b.has("cached elsewhere", build("--import-cache", from), "CACHED")
		files("--import-cache", from)
	}

	// Builds that fail and that are left.
	if out, err := b.ctl(b.builder("fails", "FROM @\nRUN exit 42\n")...); err == nil || !strings.Contains(out, "exit code: 42") {
		t.Errorf("a build that fails: %v: %s", err, out)
	}
	ctx, cancel := context.WithCancel(context.Background())
	left := exec.CommandContext(ctx, b.bin+"/buildctl", append([]string{"--addr", "unix://" + b.dir + "/bk"}, b.builder("left", "FROM @\nRUN sleep 4321\n")...)...)
	left.Cancel = func() error { return left.Process.Signal(syscall.SIGINT) }
	if err := left.Start(); err != nil {
		t.Fatal(err)
	}
	tasks := func() int {
		m, _ := filepath.Glob(b.Dir + "/state/io.containerd.runtime.v2.task/buildkit/*")
		return len(m)
	}
	b.eventually("a container that builds", func() bool { return tasks() > 0 })
	cancel()
	left.Wait()
	b.eventually("the end of its container", func() bool { return tasks() == 0 })

	// Builds side by side, while all is pruned that they do not use.
	var wg sync.WaitGroup
	for i := range 4 {
		name := fmt.Sprint("side", i)
		args := append(b.builder(name, fmt.Sprintf("FROM @\nRUN head -c 3000000 /dev/urandom >/%d\nRUN sleep 0.3\nRUN wc -c /%[1]d\n", i)), "--output", "type=image,name="+host+"/"+name+",push=true")
		wg.Go(func() {
			if out, err := b.ctl(args...); err != nil {
				t.Errorf("%s: %v: %s", name, err, out)
			}
		})
	}
	for range 5 {
		if out, err := b.ctl("prune", "--all"); err != nil {
			t.Errorf("prune: %v: %s", err, out)
		}
	}
	wg.Wait()

	// gantryd ends, also within a build: that one fails, the next does not. What
	// the first had in use is freed by a buildkitd that does not use it.
	b.Kill()
	if err := b.Daemon.Start(); err != nil {
		t.Fatal(err)
	}
	b.eventually("a build after gantryd's end", func() bool { _, err := b.ctl(b.builder("after", "FROM @\nRUN echo through\n")...); return err == nil })
	b.stop()
	b.start()
	b.empties()
}
