package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// podCount is how many pods of one container each a daemon has at once.
const podCount = 200

func podRows(with string) []row {
	return []row{{"pod and container up, 4 at once, " + with, "ms"}, {"ListPodSandbox and ListContainers", "ms"}, {"ListPodSandboxStats", "ms"}, {"ListContainerStats", "ms"},
		{"ListPodSandboxMetrics (containerd 1.6: as above)", "ms"}, {"daemon's RSS, 200 pods", "MiB"}, {"PSS of shims and pause, a pod", "MiB"}, {"CPU in a second, nobody asks", "ms"},
		{"kill -9 to an open socket", "ms"}, {"kill -9 to a list of all pods", "ms"}, {"pod stopped and removed, 4 at once", "ms"}}
}

// kubelet is the client of one daemon.
type kubelet struct {
	*daemon
	handler string
	conn    *grpc.ClientConn
	rt      cri.RuntimeServiceClient
}

// connect asks the daemon until it lists pods: before, it is still recovering.
func (k *kubelet) connect(ctx context.Context) error {
	if k.conn != nil {
		k.conn.Close()
	}
	var err error
	if k.conn, err = grpc.NewClient("unix://"+k.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20))); err != nil {
		return err
	}
	k.rt = cri.NewRuntimeServiceClient(k.conn)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		if _, err = k.rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}); err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// newKubelet starts a daemon of its own with the interface of Kubernetes, and
// has it pull both images.
func newKubelet(ctx context.Context, b *bench, shared *daemon, handler string) (*kubelet, error) {
	d, err := newDaemon(shared.kind)
	if err != nil {
		return nil, err
	}
	k := &kubelet{daemon: d, handler: handler}
	certs := filepath.Join(d.Dir, "certs.d", b.reg.Host())
	for _, dir := range []string{certs, d.Dir + "/cni", d.Dir + "/logs"} {
		err = errors.Join(err, os.MkdirAll(dir, 0o755))
	}
	err = errors.Join(err, os.WriteFile(certs+"/hosts.toml", fmt.Appendf(nil, "server = %q\n", "http://"+b.reg.Host()), 0o644))
	d.CRI = true
	if d.version < 3 {
		err = errors.Join(err, d.Configure(d.version, fmt.Sprintf(`
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = %q
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = %q
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
`, b.pause, d.Dir+"/certs.d", d.Dir+"/cni")))
	} else {
		err = errors.Join(err, d.Configure(d.version, fmt.Sprintf(`
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = %q
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = %q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    conf_dir = %q
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.pauseless]
    runtime_type = 'io.containerd.runc.v2'
    sandboxer = 'pauseless'
`, b.pause, d.Dir+"/certs.d", d.Dir+"/cni")))
	}
	if err == nil {
		_, err = d.start(ctx)
	}
	if err == nil {
		err = k.connect(ctx)
	}
	for _, ref := range []string{b.small, b.pause} {
		if err == nil {
			_, err = cri.NewImageServiceClient(k.conn).PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
		}
	}
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, d.tail())
		d.remove()
		return nil, err
	}
	return k, nil
}

// up runs a pod of the host's network with a container that sleeps.
func (k *kubelet) up(ctx context.Context, image string, i int) (string, error) {
	name := fmt.Sprintf("pod-%d", i)
	options := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER}
	pod := &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name}, LogDirectory: filepath.Join(k.Dir, "logs", name),
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: "/" + k.Mark + "/" + name, SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: options}}}
	r, err := k.rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod, RuntimeHandler: k.handler})
	if err != nil {
		return "", err
	}
	c, err := k.rt.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: r.PodSandboxId, SandboxConfig: pod, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "main"}, Image: &cri.ImageSpec{Image: image}, Command: []string{"/bin/sleep", "1000000"}, LogPath: "main.log",
		Linux: &cri.LinuxContainerConfig{Resources: &cri.LinuxContainerResources{}, SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: options}}}})
	if err == nil {
		_, err = k.rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId})
	}
	return r.PodSandboxId, err
}

// memory is the PSS of all processes below the daemon's cgroup with one of the
// names, in MiB, and how many they are.
func (d *daemon) memory(names ...string) (sum float64, n int, err error) {
	root, _ := cpuRoot()
	err = filepath.WalkDir(filepath.Join(root, d.Mark), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() != "cgroup.procs" {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, f := range strings.Fields(string(b)) {
			comm, err := os.ReadFile("/proc/" + f + "/comm")
			if err != nil {
				return err
			}
			for _, name := range names {
				if strings.HasPrefix(string(comm), name) {
					pid, err := strconv.Atoi(f)
					if err != nil {
						return err
					}
					pss, err := status(pid, "smaps_rollup", "Pss")
					if err != nil {
						return err
					}
					sum, n = sum+pss, n+1
				}
			}
		}
		return nil
	})
	return sum, n, err
}

// pods is what a node's daemon does: containerd's with pause containers, and
// gantry's with the handler.
func pods(ctx context.Context, b *bench, shared *daemon, handler string) (_ []sample, err error) {
	if shared.version < 3 {
		handler = "runc"
	}
	k, err := newKubelet(ctx, b, shared, handler)
	if err != nil {
		return nil, err
	}
	defer func() {
		k.conn.Close()
		for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			dirs, _ := filepath.Glob(pattern + k.Mark + "/pod-*")
			for _, dir := range dirs {
				os.Remove(dir) // made and removed by kubelets
			}
		}
		if left := k.remove(); err == nil && len(left) > 0 {
			err = fmt.Errorf("%s left behind: %s", k.name, strings.Join(left, "; "))
		}
	}()
	n := b.scaled(podCount)
	ids := make([]string, n)
	var out []sample
	add := func(ops int, f func() error) error {
		s, err := k.measure(ops, f)
		out = append(out, s)
		return err
	}
	alone := func(v float64) { out = append(out, sample{v, -1}) }
	if err := add(n, func() error {
		return writers(n, func(i int) (err error) { ids[i-1], err = k.up(ctx, b.small, i); return err })
	}); err != nil {
		return nil, err
	}
	time.Sleep(settle)
	const times = 5
	asks := []func() (int, error){
		func() (int, error) {
			if _, err := k.rt.ListContainers(ctx, &cri.ListContainersRequest{}); err != nil {
				return 0, err
			}
			r, err := k.rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
			return len(r.GetItems()), err
		},
		func() (int, error) {
			r, err := k.rt.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{})
			return len(r.GetStats()), err
		},
		func() (int, error) {
			r, err := k.rt.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})
			return len(r.GetStats()), err
		},
		func() (int, error) {
			if k.version < 3 {
				r, err := k.rt.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})
				return len(r.GetStats()), err
			}
			r, err := k.rt.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})
			return len(r.GetPodMetrics()), err
		},
	}
	for i, ask := range asks {
		if err := add(times, func() error {
			for range times {
				if got, err := ask(); err != nil || got != n {
					return fmt.Errorf("question %d: an answer on %d pods of %d: %w", i, got, n, err)
				}
				time.Sleep(100 * time.Millisecond) // more often it is refused
			}
			return nil
		}); err != nil {
			return nil, err
		}
		out[len(out)-1].value -= 100
	}
	time.Sleep(settle)
	rss, err := status(k.Pid(), "status", "VmRSS")
	if err != nil {
		return nil, err
	}
	alone(rss)
	pss, count, err := k.memory("containerd-shim", "pause")
	if err != nil || count < n {
		return nil, fmt.Errorf("%d shims and pauses of %d pods: %w", count, n, err)
	}
	alone(pss / float64(n))
	before, _ := k.cpuTime()
	const idle = 5
	time.Sleep(idle * time.Second)
	after, _ := k.cpuTime()
	alone((after - before).Seconds() * 1000 / idle)

	k.kill()
	begin := time.Now()
	if err := k.Spawn(); err != nil {
		return nil, err
	}
	if err := k.Listening(); err != nil {
		return nil, err
	}
	alone(time.Since(begin).Seconds() * 1000)
	if err := k.connect(ctx); err != nil {
		return nil, err
	}
	if got, err := asks[0](); err != nil || got != n {
		return nil, fmt.Errorf("%s lists %d pods of %d after a crash: %w", k.name, got, n, err)
	}
	alone(time.Since(begin).Seconds() * 1000)
	err = add(n, func() error {
		return writers(n, func(i int) error {
			if _, err := k.rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: ids[i-1]}); err != nil {
				return err
			}
			_, err := k.rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: ids[i-1]})
			return err
		})
	})
	return out, err
}
