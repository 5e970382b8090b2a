package cri

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// imagined is runc whose checkpoints hold how all containers are, and whose
// restored processes are new ones: no criu works on the kernels of test machines.
const imagined = `#!/bin/bash
pre=() cmd= post=()
for a; do
	if [ -n "$cmd" ]; then post+=("$a"); continue; fi
	case $a in checkpoint|restore) cmd=$a;; *) pre+=("$a");; esac
done
[ -z "$cmd" ] && exec runc "$@"
echo "$cmd ${post[*]}" >> @DIR@/calls
if [ -e @DIR@/slow ]; then rm @DIR@/slow; sleep 3; fi
if [ -e @DIR@/fail-$cmd ]; then
	for ((i = 0; i < ${#pre[@]}; i++)); do [ "${pre[i]}" = --log ] && echo '{"level":"error","msg":"criu failed: type NOTIFY errno 52"}' >> "${pre[i+1]}"; done
	exit 1
fi
args=() id=${post[-1]}
for ((i = 0; i < ${#post[@]}; i++)); do
	case ${post[i]} in
	--image-path) image=${post[++i]};;
	--work-path) work=${post[++i]};;
	--detach) ;;
	*) args+=("${post[i]}");;
	esac
done
if [ $cmd = checkpoint ]; then
	echo "of criu" > "$work/dump.log"
	: > "$image/all.img"
	for one in $(cat @DIR@/ids); do
		runc "${pre[@]}" state $one >> "$image/all.img" || exit 1
	done
	exit 0
fi
[ -e "$image/all.img" ] || { echo "no image in $image" >&2; exit 1; }
runc "${pre[@]}" create "${args[@]}" && runc "${pre[@]}" start "$id"
`

// checkpoints runs a node whose handlers imagined and imagined-pauseless
// pretend; files of dir tell them what to do.
func checkpoints(t *testing.T) (n *critest.Node, dir string) {
	dir = t.TempDir()
	for name, body := range map[string]string{"runc-imagined": strings.ReplaceAll(imagined, "@DIR@", dir), "criu": "#!/bin/sh\nexit 1\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH")) // for the shims, which look for criu
	extra := ""
	for _, name := range []string{"imagined", "imagined-pauseless"} {
		extra += "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes." + name + "]\nruntime_type = 'io.containerd.runc.v2'\n"
		if strings.HasSuffix(name, "pauseless") {
			extra += "sandboxer = 'pauseless'\n"
		}
		extra += "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes." + name + ".options]\nBinaryName = '" + dir + "/runc-imagined'\n"
	}
	return critest.Run(t, binDir, extra), dir
}

// counts says how often it ran.
const counts = `echo x >> /runs; [ -d /data ] && echo y >> /data/runs; echo z >> /dev/shm/runs; wc -l < /runs; rm -f /bin/wc; exec sleep 100000`

// pair is a pod with two containers that count.
func pair(t *testing.T, n *critest.Node, handler string) (*critest.Pod, []*critest.Container) {
	t.Helper()
	p := n.Pod(t, handler)
	all := []*critest.Container{p.Run(counts), p.Run(counts)}
	for _, c := range all {
		critest.Eventually(t, "it counts", func() bool { return c.Log() == "1\n" })
	}
	return p, all
}

func ids(all []*critest.Container) (out []string) {
	for _, c := range all {
		out = append(out, c.ID)
	}
	return out
}

// empty makes a directory, and returns how many files are in it.
func empty(t *testing.T, n *critest.Node, name string) (string, func() int) {
	t.Helper()
	dir := n.Dir + "/" + name
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir, func() int {
		all, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
}

// inArchive is an entry of a tar file.
func inArchive(t *testing.T, path, name string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("%s in %s: %v", name, path, err)
		}
		if h.Name == name {
			b, err := io.ReadAll(io.LimitReader(r, 1<<20))
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
	}
}

// Both containers of a pod are frozen while each is captured, and go on. The
// pod made of that has its files, a network of its own, and containers whose
// processes the runtime restores when they are started.
//
// contract: 7.1.23, 7.3.24
// promise: P5
func TestPodCheckpointRestore(t *testing.T) {
	n, dir := checkpoints(t)
	image := n.Put(t, "counting", ocispec.ImageConfig{Volumes: map[string]struct{}{"/data": {}}})
	for _, handler := range []string{"imagined", "imagined-pauseless"} {
		t.Run(handler, func(t *testing.T) {
			p := n.Pod(t, handler)
			var all []*critest.Container
			for range 2 {
				all = append(all, p.Run(counts, func(c *runtime.ContainerConfig) { c.Image.Image = image }))
			}
			for _, c := range all {
				critest.Eventually(t, "it counts", func() bool { return c.Log() == "1\n" })
			}
			at, files := empty(t, n, "checkpoint-of-"+handler)
			if err := os.WriteFile(dir+"/ids", []byte(strings.Join(ids(all), "\n")), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := n.RT.CheckpointPod(critest.Context(t), &runtime.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: at, ContainerIds: ids(all)}); err != nil {
				t.Fatal(err)
			}
			if files() != 4 {
				t.Errorf("%d files", files())
			}
			for i := range all {
				states := inArchive(t, fmt.Sprintf("%s/container-%d.tar", at, i), "checkpoint/all.img")
				if strings.Count(states, `"status": "paused"`) != 2 {
					t.Errorf("while one was captured: %s", states)
				}
				if out := all[i].Exec("cat /runs"); out != "x\n" {
					t.Errorf("afterwards: %q", out)
				}
			}

			config := n.PodConfig(t)
			request := &runtime.RestorePodRequest{CheckpointPath: at, Config: config, RuntimeHandler: handler}
			for _, c := range all {
				request.ContainerConfigs = append(request.ContainerConfigs, c.Config)
			}
			r, err := n.RT.RestorePod(critest.Context(t), request)
			if err != nil {
				t.Fatal(err)
			}
			q := &critest.Pod{Node: n, T: t, ID: r.PodSandboxId, Config: config}
			t.Cleanup(q.Remove)
			again, err := n.RT.RestorePod(critest.Context(t), request)
			if err != nil || again.PodSandboxId != r.PodSandboxId || len(again.RestoredContainers) != 2 {
				t.Errorf("once more: %v %v", again, err)
			}
			if a, b := p.Status().Status.Network.GetIp(), q.Status().Status.Network.GetIp(); a == b || b == "" {
				t.Errorf("addresses %q and %q", a, b)
			}
			for i, c := range all {
				k := slices.IndexFunc(r.RestoredContainers, func(x *runtime.RestoredContainer) bool { return x.Name == c.Config.Metadata.Name })
				if k < 0 {
					t.Fatalf("%v", r.RestoredContainers)
				}
				made := &critest.Container{Pod: q, ID: r.RestoredContainers[k].ContainerId, Config: c.Config}
				isState(t, made, runtime.ContainerState_CONTAINER_CREATED)
				if _, err := n.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: made.ID}); err != nil {
					t.Fatal(err)
				}
				isState(t, made, runtime.ContainerState_CONTAINER_RUNNING)
				critest.Eventually(t, "it goes on", func() bool { return made.Exec("cat /runs /data/runs") == "x\nx\ny\ny\n" })
				// Both wrote to the old /dev/shm, then the first, then the second.
				if out := made.Exec("cat /dev/shm/runs"); out != strings.Repeat("z\n", 3+i) {
					t.Errorf("/dev/shm: %q", out)
				}
				if out := made.Exec("ls /bin/wc 2>&1 || true"); out == "/bin/wc\n" {
					t.Error("what was removed is there")
				}
				calls, err := os.ReadFile(dir + "/calls")
				want := "--image-path " + n.Dir + "/root/io.containerd.grpc.v1.cri/containers/" + made.ID + "/restore/checkpoint"
				if err != nil || !strings.Contains(string(calls), want) || !strings.Contains(string(calls), "restore --detach --bundle ") {
					t.Errorf("%q is not in %s: %v", want, calls, err)
				}
				if _, err := os.Stat(n.Dir + "/root/io.containerd.grpc.v1.cri/containers/" + made.ID + "/restore"); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("criu's files are kept: %v", err)
				}
			}
			if _, err := n.RT.RestorePod(critest.Context(t), request); status.Code(err) != codes.AlreadyExists {
				t.Errorf("after the start: %v", err)
			}
		})
	}
}

// However a checkpoint fails, the pod runs and the directory is empty; a process
// that cannot be restored is told by its container's start.
//
// contract: 7.1.23, 7.3.24
// promise: P5
func TestPodCheckpointFails(t *testing.T) {
	n, dir := checkpoints(t)
	p, all := pair(t, n, "imagined")
	at, files := empty(t, n, "checkpoint")
	touch := func(name string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	request := &runtime.CheckpointPodRequest{PodSandboxId: p.ID, OutputPath: at, ContainerIds: ids(all)}
	runs := func() {
		t.Helper()
		for _, c := range all {
			if out := c.Exec("echo alive"); out != "alive\n" {
				t.Errorf("it says %q", out)
			}
		}
		if files() > 0 {
			t.Errorf("%d files are left", files())
		}
	}
	goOn := func() {
		t.Helper()
		critest.Eventually(t, "the containers go on", func() bool {
			return !slices.ContainsFunc(all, func(c *critest.Container) bool {
				_, err := n.RT.ExecSync(critest.Context(t), &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"/bin/true"}, Timeout: 10})
				return err != nil
			})
		})
	}

	touch("ids")
	touch("fail-checkpoint")
	if _, err := n.RT.CheckpointPod(critest.Context(t), request); err == nil || !strings.Contains(err.Error(), "capture container") || !strings.Contains(err.Error(), "criu failed") {
		t.Errorf("%v", err)
	}
	runs()
	if err := os.Remove(dir + "/fail-checkpoint"); err != nil {
		t.Fatal(err)
	}

	touch("slow")
	ctx, cancel := context.WithTimeout(critest.Context(t), time.Second)
	defer cancel()
	if _, err := n.RT.CheckpointPod(ctx, request); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("%v", err)
	}
	goOn() // the call is answered when its time is up, whatever is still in hand
	critest.Eventually(t, "the directory is empty", func() bool { return files() == 0 })
	runs()

	// A daemon that is killed leaves what it wrote, which is no checkpoint.
	touch("slow")
	failed := make(chan error, 1)
	go func() {
		_, err := n.RT.CheckpointPod(critest.Context(t), request)
		failed <- err
	}()
	critest.Eventually(t, "it is under way", func() bool { _, err := os.Stat(dir + "/slow"); return err != nil })
	n.Kill()
	if err := <-failed; err == nil {
		t.Error("no error of a daemon that was killed")
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	_, err := n.RT.RestorePod(critest.Context(t), &runtime.RestorePodRequest{CheckpointPath: at, Config: n.PodConfig(t), RuntimeHandler: "imagined", ContainerConfigs: []*runtime.ContainerConfig{all[0].Config}})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("%v", err)
	}
	if err := os.RemoveAll(at); err != nil {
		t.Fatal(err)
	}
	at, files = empty(t, n, "checkpoint")
	goOn()
	runs()

	request.ContainerIds = ids(all)[:1]
	if _, err := n.RT.CheckpointPod(critest.Context(t), request); err != nil {
		t.Fatal(err)
	}
	// A daemon that is killed when the containers are there takes them away.
	n.Kill()
	if err := n.Start("GANTRY_FAULT=pod after restore its containers:1"); err != nil {
		t.Fatal(err)
	}
	config := n.PodConfig(t)
	if _, err := n.RT.RestorePod(critest.Context(t), &runtime.RestorePodRequest{CheckpointPath: at, Config: config, RuntimeHandler: "imagined", ContainerConfigs: []*runtime.ContainerConfig{all[0].Config}}); err == nil {
		t.Error("it was not killed")
	}
	n.Kill()
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	critest.Eventually(t, "what was half made is gone", func() bool {
		c, err := n.RT.ListContainers(critest.Context(t), &runtime.ListContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return len(listed(t, n)) == 1 && len(c.Containers) == 2
	})

	touch("fail-restore")
	r, err := n.RT.RestorePod(critest.Context(t), &runtime.RestorePodRequest{CheckpointPath: at, Config: config, RuntimeHandler: "imagined", ContainerConfigs: []*runtime.ContainerConfig{all[0].Config}})
	if err != nil {
		t.Fatal(err)
	}
	q := &critest.Pod{Node: n, T: t, ID: r.PodSandboxId, Config: config}
	t.Cleanup(q.Remove)
	c := &critest.Container{Pod: q, ID: r.RestoredContainers[0].ContainerId, Config: all[0].Config}
	if _, err := n.RT.StartContainer(critest.Context(t), &runtime.StartContainerRequest{ContainerId: c.ID}); err == nil || !strings.Contains(err.Error(), "criu failed") {
		t.Errorf("%v", err)
	}
	if st := c.Status(); st.State != runtime.ContainerState_CONTAINER_EXITED || st.Reason != "StartError" || st.ExitCode != 128 {
		t.Errorf("%v", st)
	}
}
