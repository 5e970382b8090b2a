package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// run makes a container with a real runtime and returns what it printed. Its
// command is a script for busybox's shell.
func run(t *testing.T, rt, script string, opts ...Option) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make a container")
	}
	bin, err := exec.LookPath(rt)
	if err != nil {
		t.Skipf("%s is not installed", rt)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox is not installed")
	}
	dir := t.TempDir()
	rootfs := filepath.Join(dir, "rootfs")
	for _, d := range []string{"bin", "etc", "proc", "sys", "dev", "tmp", "run"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(rootfs, "bin/busybox"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, applet := range []string{"sh", "cat", "id", "mkdir", "touch", "hostname", "grep", "ls", "mknod", "unshare"} {
		if err := os.Symlink("busybox", filepath.Join(rootfs, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	id := fmt.Sprintf("gantry-oci-%d-%s", os.Getpid(), rt)
	img := ocispec.ImageConfig{User: "web", Env: []string{"FROM=image"}, Cmd: []string{"/bin/sh", "-c", script}, WorkingDir: "/tmp"}
	opts = append([]Option{users(), WithCgroupsPath("/" + id)}, opts...)
	s, err := Generate(HostFacts{}, id, "default", img, opts...)
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	flags := []string{"--root", filepath.Join(dir, "state")}
	t.Cleanup(func() {
		_ = exec.Command(bin, append(flags, "delete", "-f", id)...).Run()
		groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + id)
		for _, g := range groups {
			_ = unix.Rmdir(g)
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, bin, append(flags, "run", "--bundle", dir, id)...).CombinedOutput()
	if strings.Contains(string(out), "hybrid mode not supported") {
		t.Skipf("%s cannot work with this host's cgroups: %s", rt, out)
	}
	if err != nil {
		t.Fatalf("%s run: %v\n%s", rt, err, out)
	}
	return string(out)
}

// What the kernel says of a process counts, not what the specification says.
//
// contract: 10.4, 10.5
func TestObservedInTheKernel(t *testing.T) {
	for _, rt := range []string{"runc", "crun"} {
		t.Run(rt, func(t *testing.T) {
			out := run(t, rt, `cat /proc/self/status; id; hostname; echo FROM=$FROM NEW=$NEW; pwd
				touch /readonly 2>&1; ls -d /proc/kcore /mine; cat /proc/sys/net/ipv4/ip_forward; cat /proc/self/limits | grep "open files"
				unshare -U true 2>&1 || echo no unshare`,
				WithHostname("inside"), WithEnv("NEW=1"), WithReadonlyRoot(), WithMounts(must(ParseTmpfs("/mine"))), WithPidsLimit(50),
				WithMemoryLimit(64<<20, 0), WithCPUs(0.5))
			for _, want := range []string{
				"Uid:\t1000\t1000\t1000\t1000", "Gid:\t1001\t1001\t1001\t1001", "Groups:\t10 63 1001", "uid=1000", "NoNewPrivs:\t1", "Seccomp:\t2",
				"CapBnd:\t00000000a80425fb", "CapInh:\t0000000000000000", "CapEff:\t0000000000000000", "CapAmb:\t0000000000000000",
				"\ninside\n", "FROM=image NEW=1", "\n/tmp\n", "Read-only file system", "/mine", "1024", "no unshare",
			} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
		})
	}
}

func TestObservedRootAndPrivileged(t *testing.T) {
	for _, rt := range []string{"runc", "crun"} {
		t.Run(rt, func(t *testing.T) {
			out := run(t, rt, `cat /proc/self/status; mkdir /new && echo made; unshare -m true && echo unshared`, WithUser("0:0"), WithPrivileged(),
				WithCapabilities(nil, []string{"SYS_RESOURCE"}))
			for _, want := range []string{"Uid:\t0\t0\t0\t0", "NoNewPrivs:\t0", "Seccomp:\t0", "made", "unshared"} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
		})
	}
}
