package badinput

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// tarred is an archive; a header's size need not be that of the text.
func tarred(t testing.TB, all ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	for i := 0; i < len(all); i += 2 {
		h, text := all[i].(tar.Header), all[i+1].(string)
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Size == 0 {
			h.Size = int64(len(text))
		}
		h.Mode = 0o600
		if err := tar.NewWriter(&b).WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		b.WriteString(text)
		b.Write(make([]byte, (512-len(text)%512)%512))
	}
	return append(b.Bytes(), make([]byte, 1024)...)
}

// A pod's checkpoint is refused for what it is to be of and where it is to go,
// with the field or the reason, and the pod goes on.
//
// contract: 7.1.23
// promise: P36
func TestHostilePodCheckpoints(t *testing.T) {
	k := startKube(t, "")
	k.Pull(t, k.Busybox)
	p := k.Pod(t, "pauseless", critest.HostNetwork)
	running, created, other := p.Run("sleep 1000"), p.Create("sleep 1000"), k.alive
	users := k.Dir + "/users"
	for _, dir := range []string{users, users + "/full/x", users + "/empty"} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(users+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx := critest.Context(t)
	before := k.d.inventory()
	for what, tc := range map[string]struct {
		words  string
		want   codes.Code
		change func(*runtime.CheckpointPodRequest)
	}{
		"no pod":                {"id", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.PodSandboxId = "" }},
		"an unknown pod":        {"nobody", codes.NotFound, func(r *runtime.CheckpointPodRequest) { r.PodSandboxId = "nobody" }},
		"a container":           {running.ID, codes.NotFound, func(r *runtime.CheckpointPodRequest) { r.PodSandboxId = running.ID }},
		"options":               {"leave-running", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.Options = map[string]string{"leave-running": "true"} }},
		"no directory":          {"absolute", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.OutputPath = "" }},
		"a relative directory":  {"absolute", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.OutputPath = "../x" }},
		"a directory of 1 MiB":  {"too long", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.OutputPath = "/" + big }},
		"a zero byte":           {"invalid", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.OutputPath = users + "/empty\x00" }},
		"no such directory":     {"no such", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.OutputPath = users + "/nothing" }},
		"a file":                {"not a directory", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.OutputPath = users + "/file" }},
		"a directory with more": {"not empty", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.OutputPath = users + "/full" }},
		"no containers":         {"no containers", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.ContainerIds = nil }},
		"one container twice":   {"twice", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.ContainerIds = []string{running.ID, running.ID[:30]} }},
		"an empty id":           {"id", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.ContainerIds = []string{running.ID, ""} }},
		"one of another pod":    {"another pod", codes.InvalidArgument, func(r *runtime.CheckpointPodRequest) { r.ContainerIds = []string{running.ID, other.ID} }},
		"one that did not run":  {"CREATED", codes.FailedPrecondition, func(r *runtime.CheckpointPodRequest) { r.ContainerIds = []string{running.ID, created.ID} }},
	} {
		r := &runtime.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: users + "/empty", ContainerIds: []string{running.ID}}
		tc.change(r)
		rejected(t, what, second(k.RT.CheckpointPod(ctx, r)), []string{tc.words}, tc.want)
	}
	k.unchanged(t, before)
	if left, err := os.ReadDir(users + "/empty"); err != nil || len(left) > 0 {
		t.Errorf("%v %v", left, err)
	}
	if out := running.Exec("echo alive"); out != "alive\n" {
		t.Errorf("%q", out)
	}
}

// Whatever a directory says that a pod is to be restored from, nothing is
// waited for, read or written outside of it, and no pod is left.
//
// contract: 7.3.24
// promise: P36
func TestHostilePodRestores(t *testing.T) {
	k := startKube(t, "")
	k.Pull(t, k.Busybox)
	ctx := critest.Context(t)
	pod := &critest.Pod{Node: k.Node, T: t, Config: k.PodConfig(t, critest.HostNetwork)}
	config := pod.ContainerConfig("sleep 1000")
	name := config.Metadata.Name
	whole := fmt.Sprintf(`{"Version":1,"Runtime":"io.containerd.runc.v2","Containers":{%q:"a.tar"}}`, name)
	documents := []any{tar.Header{Name: "config.dump"}, `{"name":"` + name + `"}`, tar.Header{Name: "spec.dump"}, `{"process":{}}`, tar.Header{Name: "checkpoint/pages-1.img"}, "x"}
	archive := func(all ...any) func(dir string) error {
		return func(dir string) error {
			return os.WriteFile(dir+"/a.tar", tarred(t, slices.Concat(documents, all)...), 0o600)
		}
	}
	json := func(text string) func(dir string) error {
		return func(dir string) error { return os.WriteFile(dir+"/pod.json", []byte(text), 0o600) }
	}
	rootfs := func(all ...any) func(dir string) error {
		return archive(tar.Header{Name: "rootfs-diff.tar"}, string(tarred(t, all...)))
	}
	fine := func(string) error { return nil }
	shm := tarred(t)
	none := func(*runtime.RestorePodRequest) {}
	before := k.d.inventory()
	for what, tc := range map[string]struct {
		words  string
		want   codes.Code
		make   func(dir string) error
		change func(*runtime.RestorePodRequest)
	}{
		"options":                   {"a", codes.InvalidArgument, fine, func(r *runtime.RestorePodRequest) { r.Options = map[string]string{"a": ""} }},
		"no path":                   {"absolute", codes.InvalidArgument, fine, func(r *runtime.RestorePodRequest) { r.CheckpointPath = "" }},
		"a file":                    {"not a directory", codes.InvalidArgument, fine, func(r *runtime.RestorePodRequest) { r.CheckpointPath = "/etc/passwd" }},
		"no pod":                    {"config", codes.InvalidArgument, fine, func(r *runtime.RestorePodRequest) { r.Config = nil }},
		"no containers":             {"container_configs", codes.InvalidArgument, fine, func(r *runtime.RestorePodRequest) { r.ContainerConfigs = nil }},
		"an empty container":        {"container_configs[1]", codes.InvalidArgument, fine, func(r *runtime.RestorePodRequest) { r.ContainerConfigs = append(r.ContainerConfigs, &ctrConfig{}) }},
		"a container twice":         {"twice", codes.InvalidArgument, fine, func(r *runtime.RestorePodRequest) { r.ContainerConfigs = append(r.ContainerConfigs, config) }},
		"an unknown handler":        {"nobody", codes.NotFound, fine, func(r *runtime.RestorePodRequest) { r.RuntimeHandler = "nobody" }},
		"another runtime's":         {"crun", codes.FailedPrecondition, fine, func(r *runtime.RestorePodRequest) { r.RuntimeHandler = "crun" }},
		"no pod.json":               {"pod.json", codes.InvalidArgument, func(dir string) error { return os.Remove(dir + "/pod.json") }, none},
		"garbage in pod.json":       {"pod.json", codes.InvalidArgument, json("\x00\xff"), none},
		"a list in pod.json":        {"pod.json", codes.InvalidArgument, json("[]"), none},
		"5 MiB of pod.json":         {"pod.json", codes.InvalidArgument, json(strings.Repeat(" ", 5<<20) + whole), none},
		"a version to come":         {"version 7", codes.InvalidArgument, json(`{"Version":7}`), none},
		"an archive out of it":      {"archive", codes.InvalidArgument, json(strings.Replace(whole, "a.tar", "../../a.tar", 1)), none},
		"an archive by link":        {"a.tar", codes.InvalidArgument, func(dir string) error { return os.Symlink("/etc/shadow", dir+"/a.tar") }, none},
		"an archive that is a FIFO": {"a.tar", codes.InvalidArgument, func(dir string) error { return syscall.Mkfifo(dir+"/a.tar", 0o600) }, none},
		"pod.json that is a FIFO": {"pod.json", codes.InvalidArgument, func(dir string) error {
			if err := os.Remove(dir + "/pod.json"); err != nil {
				return err
			}
			return syscall.Mkfifo(dir+"/pod.json", 0o600)
		}, none},
		"/dev/shm by link": {"shm.tar", codes.InvalidArgument, func(dir string) error {
			if err := os.Remove(dir + "/shm.tar"); err != nil {
				return err
			}
			return os.Symlink("/dev/zero", dir+"/shm.tar")
		}, none},
		"/dev/shm out of itself": {"shm.tar", codes.InvalidArgument, func(dir string) error {
			return os.WriteFile(dir+"/shm.tar", tarred(t, tar.Header{Name: "../../escape"}, "x"), 0o600)
		}, none},
		"an empty archive":        {"missing", codes.InvalidArgument, func(dir string) error { return os.WriteFile(dir+"/a.tar", nil, 0o600) }, none},
		"an archive of 1 TiB":     {"checkpoint/x", codes.InvalidArgument, archive(tar.Header{Name: "checkpoint/x", Size: 1 << 40}, ""), none},
		"an image out of it":      {"escape", codes.InvalidArgument, archive(tar.Header{Name: "checkpoint/../../../escape"}, "x"), none},
		"an image that is a link": {"checkpoint/l", codes.InvalidArgument, archive(tar.Header{Name: "checkpoint/l", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, ""), none},
		"no root file system":     {"rootfs-diff.tar", codes.InvalidArgument, archive(), none},
		"a root out of itself":    {"escape", codes.InvalidArgument, rootfs(tar.Header{Name: "../../../escape"}, "x"), none},
		"a root through a link":   {"escape", codes.InvalidArgument, rootfs(tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: k.Dir}, "", tar.Header{Name: "l/../../escape"}, "x"), none},
		"of no image":             {"image", codes.FailedPrecondition, rootfs(tar.Header{Name: "f"}, "x"), none},
	} {
		dir, err := os.MkdirTemp(k.Dir, "from")
		if err != nil {
			t.Fatal(err)
		}
		for name, body := range map[string][]byte{"pod.json": []byte(whole), "shm.tar": shm} {
			if err := os.WriteFile(filepath.Join(dir, name), body, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := tc.make(dir); err != nil {
			t.Fatal(err)
		}
		r := &runtime.RestorePodRequest{CheckpointPath: dir, Config: pod.Config, RuntimeHandler: "pauseless", ContainerConfigs: []*ctrConfig{config}}
		tc.change(r)
		rejected(t, what, second(k.RT.RestorePod(ctx, r)), []string{tc.words}, tc.want)
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		for _, at := range []string{"escape", "root/escape", "state/escape", "root/io.containerd.grpc.v1.cri/escape", "root/io.containerd.grpc.v1.cri/containers/escape"} {
			if _, err := os.Lstat(filepath.Join(k.Dir, at)); err == nil {
				t.Errorf("%s: it escaped to %s", what, at)
			}
		}
	}
	k.unchanged(t, before)
}
