//go:build linux

package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/testimage"
)

// mounts adds mounts to a container.
func mounts(m ...*runtime.Mount) func(*runtime.ContainerConfig) {
	return func(c *runtime.ContainerConfig) { c.Mounts = append(c.Mounts, m...) }
}

// hostDir makes a directory of the host for a test, with files by path.
func hostDir(t *testing.T, n *critest.Node, files ...string) string {
	t.Helper()
	dir, err := os.MkdirTemp(n.Dir, "host")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		writeFile(t, filepath.Join(dir, f), f+"\n")
	}
	return dir
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// tmpfs mounts one on the host, until the test ends, and makes its propagation
// what the flag says.
func tmpfs(t *testing.T, dir string, flag uintptr) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	if err := unix.Mount("", dir, "", flag, ""); err != nil {
		t.Fatal(err)
	}
}

// Mounts are made while a container runs, by the host and by the container, and
// are seen by the other side or not.
//
// contract: 7.3.10
func TestMountPropagation(t *testing.T) {
	n := node(t)
	for _, tc := range []struct {
		mode                 runtime.MountPropagation
		toContainer, outward bool
	}{
		{runtime.MountPropagation_PROPAGATION_PRIVATE, false, false},
		{runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, true, false},
		{runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL, true, true},
	} {
		t.Run(tc.mode.String(), func(t *testing.T) {
			eachHandler(t, func(t *testing.T, p *critest.Pod) {
				dir := hostDir(t, n)
				tmpfs(t, dir, unix.MS_SHARED)
				for _, sub := range []string{"host", "container"} {
					if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
						t.Fatal(err)
					}
				}
				c := p.Run("sleep 600", mounts(&runtime.Mount{ContainerPath: "/v", HostPath: dir, Propagation: tc.mode}), secure(func(s *runtime.LinuxContainerSecurityContext) { s.Privileged = true }))
				tmpfs(t, dir+"/host", unix.MS_SHARED)
				writeFile(t, dir+"/host/file", "x")
				if out := c.Exec("mount -t tmpfs inner /v/container && echo y > /v/container/file; test -e /v/host/file && echo seen; true"); (out == "seen\n") != tc.toContainer {
					t.Errorf("the host's mount in the container: %q", out)
				}
				if _, err := os.Stat(dir + "/container/file"); (err == nil) != tc.outward {
					t.Errorf("the container's mount on the host: %v", err)
				}
				c.Exec("umount /v/container")
				if _, err := os.Stat(dir + "/container/file"); err == nil {
					t.Error("unmounted in the container, still there on the host")
				}
				c.Stop(0)
			}, privilegedPod)
		})
	}
	// What cannot propagate is refused.
	p := n.Pod(t, "pauseless")
	private, slave := hostDir(t, n), hostDir(t, n)
	tmpfs(t, private, unix.MS_PRIVATE)
	tmpfs(t, slave, unix.MS_SHARED)
	if err := unix.Mount("", slave, "", unix.MS_SLAVE, ""); err != nil {
		t.Fatal(err)
	}
	for what, m := range map[string]*runtime.Mount{
		"host to container of a private mount": {HostPath: private, Propagation: runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
		"bidirectional of a private mount":     {HostPath: private, Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL},
		"bidirectional of a slave mount":       {HostPath: slave, Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL},
	} {
		m.ContainerPath = "/v"
		refused(t, p, what, mounts(m), codes.FailedPrecondition)
	}
	refused(t, p, "unknown propagation", mounts(&runtime.Mount{ContainerPath: "/v", HostPath: private, Propagation: 9}), codes.InvalidArgument)
}

// contract: 7.3.10, 10.10
func TestReadonlyMounts(t *testing.T) {
	n := node(t)
	st, err := n.RT.Status(critest.Context(t), &runtime.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	able := map[string]bool{}
	for _, h := range st.RuntimeHandlers {
		able[h.Name] = h.GetFeatures().GetRecursiveReadOnlyMounts()
	}
	if !able["runc"] {
		t.Error("the own runtime cannot make recursive read-only mounts")
	}
	dir := hostDir(t, n, "file")
	tmpfs(t, dir+"/sub", unix.MS_PRIVATE)
	for _, handler := range n.Handlers {
		t.Run(handler, func(t *testing.T) {
			p := n.Pod(t, handler)
			probe := "touch /v/x 2>/dev/null && echo outer; touch /v/sub/x 2>/dev/null && echo inner; cat /v/file"
			if out := p.Output(probe, mounts(&runtime.Mount{ContainerPath: "/v", HostPath: dir})); out != "outer\ninner\nfile\n" {
				t.Errorf("writable: %q", out)
			}
			if out := p.Output(probe, mounts(&runtime.Mount{ContainerPath: "/v", HostPath: dir, Readonly: true})); out != "inner\nfile\n" {
				t.Errorf("read-only: %q", out)
			}
			rro := &runtime.Mount{ContainerPath: "/v", HostPath: dir, Readonly: true, RecursiveReadOnly: true}
			if !able[handler] {
				refused(t, p, "recursive read-only by a runtime that cannot", mounts(rro), codes.FailedPrecondition)
			} else if out := p.Output(probe, mounts(rro)); out != "file\n" {
				t.Errorf("recursive read-only: %q", out)
			}
			refused(t, p, "recursive without read-only", mounts(&runtime.Mount{ContainerPath: "/v", HostPath: dir, RecursiveReadOnly: true}), codes.InvalidArgument)
			refused(t, p, "recursive with propagation", mounts(&runtime.Mount{ContainerPath: "/v", HostPath: dir, Readonly: true, RecursiveReadOnly: true,
				Propagation: runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}), codes.InvalidArgument)
		})
	}
}

// Sources that are absent, links, files; mounts inside of mounts in any order,
// and options of single mounts.
//
// contract: 7.3.10
func TestMountSources(t *testing.T) {
	n := node(t)
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		dir := hostDir(t, n, "a/one", "b/two", "file")
		for link, target := range map[string]string{"link": "a", "chain": "link", "flink": "file"} {
			if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
				t.Fatal(err)
			}
		}
		out := p.Output("cat /m/one /m/deep/two /f /l/one; ls -A /absent | wc -l; touch /absent/made; test -w /dev/termination-log && echo why > /dev/termination-log; grep ' /n ' /proc/self/mountinfo | grep -c noexec", mounts(
			&runtime.Mount{ContainerPath: "/m/deep", HostPath: dir + "/b"}, // before that which it is in
			&runtime.Mount{ContainerPath: "/m", HostPath: dir + "/a"},
			&runtime.Mount{ContainerPath: "/f", HostPath: dir + "/flink", Readonly: true},
			&runtime.Mount{ContainerPath: "/l", HostPath: dir + "/chain"},
			&runtime.Mount{ContainerPath: "/absent", HostPath: dir + "/not/there"},
			&runtime.Mount{ContainerPath: "/n", HostPath: dir, MountOptions: []string{"noexec", "nosuid"}},
			&runtime.Mount{ContainerPath: "/dev/termination-log", HostPath: termination(t, dir)},
		))
		if out != "a/one\nb/two\nfile\na/one\n0\n1\n" {
			t.Errorf("%q", out)
		}
		if info, err := os.Stat(dir + "/not/there"); err != nil || info.Mode() != os.ModeDir|0o755 {
			t.Errorf("%v %v", info, err)
		}
		if _, err := os.Stat(dir + "/not/there/made"); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile(dir + "/why"); err != nil || string(b) != "why\n" {
			t.Errorf("termination message %q %v", b, err)
		}
		for what, m := range map[string]*runtime.Mount{
			"relative source": {ContainerPath: "/v", HostPath: "tmp"}, "no source": {ContainerPath: "/v"}, "no target": {HostPath: dir}, "root as target": {ContainerPath: "/..", HostPath: dir},
			"NUL": {ContainerPath: "/v\x00", HostPath: dir}, "option": {ContainerPath: "/v", HostPath: dir, MountOptions: []string{"lowerdir=/"}},
			"half a mapping": {ContainerPath: "/v", HostPath: dir, UidMappings: []*runtime.IDMapping{{Length: 1}}},
		} {
			refused(t, p, what, mounts(m), codes.InvalidArgument)
		}
	})
}

func termination(t *testing.T, dir string) string {
	t.Helper()
	writeFile(t, dir+"/why", "")
	return dir + "/why"
}

// A link of the image at a mount's target leads nowhere but to the image (class C1).
//
// contract: 7.3.10
func TestMountTargets(t *testing.T) {
	n := node(t)
	dir, outside := hostDir(t, n, "in"), hostDir(t, n)
	ref := n.Put(t, "links", ocispec.ImageConfig{}, testimage.File{Name: "absolute", Link: outside}, testimage.File{Name: "up", Link: "../../../../../../../.." + outside})
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Create("cat /absolute/a/in /up/b/in", image(ref), mounts(&runtime.Mount{ContainerPath: "/absolute/a", HostPath: dir}, &runtime.Mount{ContainerPath: "/up/b", HostPath: dir}))
		if _, err := p.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: c.ID}); err != nil {
			if handlerOf(p) != "crun" { // which refuses links to what is not there
				t.Error(err)
			}
		} else if c.Wait(); c.Log() != "in\nin\n" {
			t.Errorf("%q", c.Log())
		}
		if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
			t.Errorf("made outside of the container: %v %v", left, err)
		}
	})
}

func handlerOf(p *critest.Pod) string { return p.Status().Status.RuntimeHandler }

// contract: 7.3.10
func TestPodFiles(t *testing.T) {
	n := node(t)
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		mode := "for f in hosts hostname resolv.conf; do (echo '# more' >> /etc/$f) 2>/dev/null && echo $f is writable; done; cat /etc/hostname /etc/resolv.conf; grep -c localhost /etc/hosts"
		want := "host-of-pod\nsearch a.example b.example\nnameserver 192.0.2.1\noptions ndots:5\n1\n"
		if out := p.Output(mode, secure(func(s *runtime.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true })); !strings.HasPrefix(out, strings.TrimSuffix(want, "1\n")) {
			t.Errorf("%q, want %q", out, want)
		}
		if out := p.Output(mode); !strings.HasPrefix(out, "hosts is writable\nhostname is writable\nresolv.conf is writable\n") {
			t.Errorf("%q", out)
		}
		dir := hostDir(t, n, "hosts")
		if out := p.Output("cat /etc/hosts", mounts(&runtime.Mount{ContainerPath: "/etc/hosts", HostPath: dir + "/hosts"})); out != "hosts\n" {
			t.Errorf("a mount of the request at /etc/hosts: %q", out)
		}
		// /dev/shm is the pod's, and no other's.
		c := p.Run("echo shared > /dev/shm/f; sleep 600")
		critest.Eventually(t, "a file in /dev/shm", func() bool { return strings.Contains(c.Exec("ls /dev/shm"), "f") })
		if out := p.Output("cat /dev/shm/f; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2; grep ' /dev/shm ' /proc/self/mountinfo | cut -d' ' -f6 | tr ',' ' '"); !strings.HasPrefix(out, "shared\n65536\n") ||
			!strings.Contains(out, "nosuid") || !strings.Contains(out, "noexec") || !strings.Contains(out, "nodev") {
			t.Errorf("/dev/shm: %q", out)
		}
		if out := n.Pod(t, "pauseless").Output("ls -A /dev/shm"); out != "" {
			t.Errorf("another pod's /dev/shm: %q", out)
		}
	}, func(c *runtime.PodSandboxConfig) {
		c.DnsConfig = &runtime.DNSConfig{Servers: []string{"192.0.2.1"}, Searches: []string{"a.example", "b.example"}, Options: []string{"ndots:5"}}
	})
}

// contract: 7.3.11
func TestImageVolumes(t *testing.T) {
	n := node(t)
	secret := hostDir(t, n, "secret")
	volume, err := testimage.New(ocispec.ImageConfig{}, testimage.Layer{Files: []testimage.File{{Name: "data", Dir: true}, {Name: "data/a", Body: []byte("a\n")}, {Name: "data/sub", Dir: true},
		{Name: "data/sub/b", Body: []byte("b\n")}, {Name: "inside", Link: "/data/sub"}, {Name: "outside", Link: "../../../../../../../.." + secret}}})
	if err != nil {
		t.Fatal(err)
	}
	ref := n.Registry.Put("volume", "1", volume)
	n.Pull(t, ref)
	of := func(sub string) *runtime.Mount {
		return &runtime.Mount{ContainerPath: "/v" + fmt.Sprint(len(sub)), Image: &runtime.ImageSpec{Image: ref}, ImageSubPath: sub, Readonly: true}
	}
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		c := p.Run("cat /v0/data/a /v0/data/sub/b /v4/a /v8/b /v6/b; for v in 0 4 8 6; do touch /v$v/x 2>/dev/null && echo written; done; sleep 600", mounts(of(""), of("data"), of("data/sub"), of("inside")))
		critest.Eventually(t, "output", func() bool { return strings.Count(c.Log(), "\n") >= 5 })
		if out := c.Exec("for v in 0 4 8 6; do touch /v$v/x 2>/dev/null && echo written; done; true"); c.Log() != "a\nb\na\nb\nb\n" || out != "" {
			t.Errorf("%q %q", c.Log(), out)
		}
		for what, want := range map[string]codes.Code{"outside": codes.NotFound, "none": codes.NotFound, "data/a": codes.InvalidArgument, "../data": codes.InvalidArgument, "/data": codes.InvalidArgument} {
			refused(t, p, "sub-path "+what, mounts(of(what)), want)
		}
		refused(t, p, "absent image", mounts(&runtime.Mount{ContainerPath: "/v", Image: &runtime.ImageSpec{Image: n.Registry.Host() + "/none:1"}}), codes.NotFound)
		refused(t, p, "image and path", mounts(&runtime.Mount{ContainerPath: "/v", HostPath: secret, Image: &runtime.ImageSpec{Image: ref}}), codes.InvalidArgument)
	})
}

// Volumes that an image declares are directories of their own, with what the
// image has there, however it names them (class C1, CVE-2022-23648).
//
// contract: 7.3.10
func TestImageDefinedVolumes(t *testing.T) {
	n := node(t)
	secret := hostDir(t, n, "secret")
	up := "../../../../../../../.." + secret
	files := []testimage.File{{Name: "data", Dir: true, Mode: 0o1777}, {Name: "data/f", Body: []byte("f\n"), Mode: 0o640}, {Name: "data/d", Dir: true}, {Name: "data/d/g", Body: []byte("g\n")},
		{Name: "data/out", Link: secret + "/secret"}, {Name: "link", Link: secret}, {Name: "rlink", Link: up}, {Name: "covered", Dir: true}, {Name: "covered/image", Body: []byte("x")}}
	volumes := map[string]struct{}{"/data": {}, "new": {}, "/up/" + up: {}, "/covered": {}}
	plain := n.Put(t, "volumes", ocispec.ImageConfig{Volumes: volumes}, files...)
	volumes["/link"], volumes["/rlink"] = struct{}{}, struct{}{}
	linked := n.Put(t, "volumes-links", ocispec.ImageConfig{Volumes: volumes}, files...)
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		ref := linked
		if handlerOf(p) == "crun" { // refuses links to what is not there as targets
			ref = plain
		}
		probe := `cat /data/f /data/d/g; stat -c '%a %n' /data /data/f; readlink /data/out; touch /data/written /new/written && echo writable
			for d in ` + secret + ` /link/ /rlink/; do ls -A $d 2>/dev/null; done; cat /covered/*; for d in /data /new /covered; do grep -q " $d " /proc/self/mountinfo && echo mounted $d; done`
		want := "f\ng\n1777 /data\n640 /data/f\n" + secret + "/secret\nwritable\nsecret\nmounted /data\nmounted /new\nmounted /covered\n"
		for range 2 { // each container has its own
			out := p.Output(probe, image(ref), mounts(&runtime.Mount{ContainerPath: "/covered", HostPath: secret}))
			if out != want {
				t.Errorf("%q, want %q", out, want)
			}
		}
		if left, err := os.ReadDir(secret); err != nil || len(left) != 1 {
			t.Errorf("the host's directory: %v %v", left, err)
		}
	})
}

// Who mounts the host's /sys, as programs that watch a node do, sees the host's
// cgroups below it.
//
// contract: 7.3.10
func TestHostSys(t *testing.T) {
	eachHandler(t, func(t *testing.T, p *critest.Pod) {
		look := "ls -d /sys/fs/cgroup/" + p.Mark + " /sys/fs/cgroup/memory/" + p.Mark + " 2>/dev/null | head -1"
		if out := p.Output(look); out != "" {
			t.Errorf("a container sees the host's cgroups: %q", out)
		}
		if out := p.Output(look+"; touch /sys/x 2>/dev/null || echo closed", mounts(&runtime.Mount{ContainerPath: "/sys", HostPath: "/sys", Readonly: true})); !strings.HasSuffix(out, "/"+p.Mark+"\nclosed\n") {
			t.Errorf("with the host's /sys: %q", out)
		}
	})
}
