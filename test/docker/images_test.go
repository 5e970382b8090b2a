//go:build linux

package docker

import (
	"os"
	"strings"
	"testing"
)

// The Dockerfile uses what builders have in common.
const dockerfile = `FROM @ AS one
RUN echo built >/built && mkdir /big && head -c 1000000 /dev/zero >/big/zeros
FROM @
COPY --from=one /built /big /
COPY file /file
RUN rm /data/greeting && ls -la / >/list
USER 1000
CMD cat /built /file && wc -c </zeros && id -u && ls /data
`

// What people do with images: they come from a registry, an archive, a container
// and a build, go to a registry and an archive, and leave nothing behind.
func TestImages(t *testing.T) { // contract: 1.5.9, 13.15, 14.3, 14.4
	stores(t, func(t *testing.T, h *host) {
		host := h.reg.Host()
		h.docker("tag", h.image, host+"/pushed:one")
		h.docker("push", host+"/pushed:one")
		h.docker("rmi", host+"/pushed:one")
		h.docker("pull", host+"/pushed:one")
		h.eq("pushed", h.run(host+"/pushed:one"), "hello from yes\ngreetings")
		h.has("inspect", h.docker("inspect", "-f", "{{.RepoDigests}}", h.image), "busybox@sha256:")
		if out, code := h.try("pull", host+"/busybox:none"); code == 0 || !strings.Contains(out, "not found") && !strings.Contains(out, "unknown") {
			t.Errorf("an image that does not exist: %d: %s", code, out)
		}

		h.start("source", h.image, "sh", "-c", "echo new >/data/new; rm /data/greeting; exec sleep 1000")
		h.eventually("its files", func() bool { _, code := h.try("exec", "source", "cat", "/data/new"); return code == 0 })
		h.docker("commit", "-c", `CMD ["sh", "-c", "ls /data"]`, "source", "committed:1")
		h.has("history", h.docker("history", "--no-trunc", "committed:1"), "echo new >/data/new")
		h.docker("save", "-o", h.dir+"/saved.tar", "committed:1", h.image)
		h.docker("export", "-o", h.dir+"/exported.tar", "source")
		h.docker("rm", "-f", "source")
		h.docker("rmi", "committed:1")
		h.has("load", h.docker("load", "-i", h.dir+"/saved.tar"), "committed:1")
		h.eq("loaded", h.run("committed:1"), "new")
		h.docker("tag", "committed:1", host+"/pushed:two")
		h.docker("push", host+"/pushed:two")
		h.docker("rmi", "committed:1", host+"/pushed:two")
		h.docker("pull", host+"/pushed:two")
		h.eq("pushed", h.run(host+"/pushed:two"), "new")
		h.docker("import", h.dir+"/exported.tar", "imported:1")
		h.eq("imported", h.run("imported:1", "/bin/ls", "/data"), "new")

		context := h.dir + "/context"
		if err := os.Mkdir(context, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(context+"/Dockerfile", []byte(strings.ReplaceAll(dockerfile, "@", h.image)), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, kit := range []string{"0", "1"} {
			t.Setenv("DOCKER_BUILDKIT", kit)
			for _, content := range []string{"first", "second"} { // the second uses what it can of the first
				if err := os.WriteFile(context+"/file", []byte(content+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
				tag := "built:" + kit + content
				out, code := h.try("build", "--network", "none", "-t", tag, context)
				if code != 0 && strings.Contains(out, "buildx component is missing") {
					t.Log("this docker cannot build with BuildKit without buildx")
					break
				}
				if code != 0 {
					t.Fatalf("build %s: %d: %s", tag, code, out)
				}
				h.eq(tag, h.run(tag), "built\n"+content+"\n1000000\n1000")
			}
		}

		h.has("system df", h.docker("system", "df"), "Images")
		h.docker("run", "--name", "ended", "--network", "none", h.image, "true")
		h.docker("container", "prune", "-f")
		h.docker("image", "prune", "-af")
		h.docker("builder", "prune", "-af")
		h.eq("images", h.docker("images", "-aq"), "")
		if h.store {
			h.eventually("no snapshot is left", h.bare)
		}
	})
}
