package oci

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestBase: what is in the administrator's specification stays, and the value
// that was given is not changed.
func TestBase(t *testing.T) {
	base := &specs.Spec{Hooks: &specs.Hooks{Poststop: []specs.Hook{{Path: "/h"}}}, Root: &specs.Root{Path: "/elsewhere", Readonly: true},
		Process: &specs.Process{Env: []string{"A=base", "B=base"}, Cwd: "/base"}, Mounts: []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/x/y", Type: "tmpfs"}},
		Linux: &specs.Linux{Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActLog}, CgroupsPath: "/elsewhere"}}
	img := ocispec.ImageConfig{Cmd: []string{"/a"}, Env: []string{"A=image"}}
	s := must(Generate(facts, "id", "ns", img, WithBase(base), WithoutMounts("/x/y"), WithMounts(must(ParseTmpfs("/t")))))
	if s.Hooks == nil || s.Process.Cwd != "/base" || s.Root.Path != "rootfs" || !s.Root.Readonly || s.Linux.CgroupsPath != "/ns/id" || s.Linux.Seccomp.DefaultAction != specs.ActLog {
		t.Errorf("got %+v %+v", s, s.Linux)
	}
	if want := []string{defaultPath, "A=image", "B=base"}; !slices.Equal(s.Process.Env, want) {
		t.Errorf("environment %q", s.Process.Env)
	}
	if len(s.Mounts) != 2 || s.Mounts[0].Destination != "/proc" || s.Mounts[1].Destination != "/t" {
		t.Errorf("mounts %v", s.Mounts)
	}
	if len(base.Mounts) != 2 || base.Process.Args != nil || base.Linux.Resources != nil {
		t.Errorf("the base changed: %+v", base)
	}
	s = must(Generate(facts, "id", "ns", img, WithBase(base), WithDefaultSeccomp()))
	if s.Linux.Seccomp.DefaultAction != specs.ActErrno {
		t.Errorf("the default filter is %v", s.Linux.Seccomp.DefaultAction)
	}
	base.Mounts = append(base.Mounts, specs.Mount{Destination: "/sys", Type: "sysfs"}, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Options: []string{"ro", "nosuid"}})
	s = must(Generate(facts, "id", "ns", img, WithBase(base), WithPrivileged()))
	if o := s.Mounts[len(s.Mounts)-1].Options; !slices.Equal(o, []string{"rw", "nosuid"}) {
		t.Errorf("cgroups of a privileged container: %q", o)
	}
	if s = must(Generate(facts, "id", "ns", img, WithBase(&specs.Spec{}))); s.Version == "" || len(s.Linux.Namespaces) == 0 {
		t.Errorf("of nothing: %+v", s)
	}
}

func TestMemberships(t *testing.T) {
	for _, tc := range []struct {
		user string
		want []uint32
		err  func(error) bool
	}{
		{"web", []uint32{10, 63}, nil}, {"1000", []uint32{10, 63}, nil}, {"0", []uint32{10}, nil}, {"", []uint32{10}, nil}, {"nobody", nil, nil}, {"4711", nil, nil},
		{"2147483648", nil, errdefs.IsOutOfRange}, {"-1", nil, errdefs.IsInvalidArgument},
	} {
		got, err := Memberships(strings.NewReader(passwd), strings.NewReader(group), tc.user)
		if !slices.Equal(got, tc.want) || (err != nil) != (tc.err != nil) || err != nil && !tc.err(err) {
			t.Errorf("Memberships(%q) = %d, %v", tc.user, got, err)
		}
	}
}
