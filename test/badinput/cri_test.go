package badinput

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
	"github.com/gantryd/gantry/test/testimage"
)

// kube is the daemon as a kubelet sees it, with a canary: a pod that has to
// live and to answer in the end.
type kube struct {
	*critest.Node
	d     *daemon
	alive *critest.Container
}

// startKube runs a node for the length of a test. In the end it must be the
// same process still, without a panic, and clean.
func startKube(t *testing.T, extra string) *kube {
	t.Helper()
	k := &kube{Node: critest.Run(t, binDir, extra)}
	if err := os.MkdirAll(filepath.Join(k.Dir, "canary"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(k.Dir+"/canary/alive", []byte("tweet"), 0o600); err != nil {
		t.Fatal(err)
	}
	k.d = &daemon{Daemon: k.Daemon, t: t}
	k.d.conn = k.d.dial()
	pid := k.Pid()
	p := k.Pod(t, "runc")
	k.alive = p.Run("sleep 100000")
	t.Cleanup(func() {
		if k.Pid() != pid {
			t.Errorf("the daemon was process %d and is %d", pid, k.Pid())
		}
		if out := k.alive.Exec("echo tweet"); out != "tweet\n" {
			t.Errorf("the canary says %q", out)
		}
		k.alive.Output("true") // and its pod gets another container
		for l := range strings.SplitSeq(k.Log(64<<20), "\n") {
			if strings.Contains(l, "request panicked") || strings.HasPrefix(l, "panic: ") {
				t.Errorf("a panic: %.3000s", l)
			}
		}
		k.d.canary(t)
	})
	return k
}

// unchanged compares what there is with what there was.
func (k *kube) unchanged(t testing.TB, before []string) {
	t.Helper()
	if diff := k.d.difference(before); diff != "" {
		t.Errorf("left behind:\n%s", diff)
	}
}

// criMethods are those of both services, by reflection.
func criMethods() []protoreflect.MethodDescriptor {
	var out []protoreflect.MethodDescriptor
	services := runtime.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			out = append(out, services.Get(i).Methods().Get(j))
		}
	}
	return out
}

// richPod is a pod's configuration with every field that can be set at once.
func (k *kube) richPod(t testing.TB, name string) *runtime.PodSandboxConfig {
	c := k.PodConfig(t)
	c.Metadata = &runtime.PodSandboxMetadata{Name: name, Namespace: "sweep", Uid: "uid-" + name, Attempt: 1}
	c.LogDirectory = k.Dir + "/logs/" + name
	c.DnsConfig = &runtime.DNSConfig{Servers: []string{"192.0.2.1"}, Searches: []string{"x.example"}, Options: []string{"ndots:5"}}
	c.PortMappings = []*runtime.PortMapping{{Protocol: runtime.Protocol_UDP, ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"}}
	c.Annotations = map[string]string{"pod.example/x": "y"}
	c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "0"}
	c.Linux.Overhead = &runtime.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, MemoryLimitInBytes: 64 << 20}
	c.Linux.Resources = &runtime.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 100, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 10}
	sc := c.Linux.SecurityContext
	sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups, sc.ReadonlyRootfs = &runtime.Int64Value{Value: 1}, &runtime.Int64Value{Value: 1}, []int64{2}, true
	sc.Seccomp, sc.Apparmor = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}, &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
	sc.SupplementalGroupsPolicy = runtime.SupplementalGroupsPolicy_Strict
	sc.SelinuxOptions = &runtime.SELinuxOption{User: "u", Role: "r", Type: "t", Level: "s0"}
	return c
}

// richContainer is a container's configuration with every field that can be set at once.
func (k *kube) richContainer(t testing.TB, name string) *runtime.ContainerConfig {
	host := k.Dir + "/host"
	if err := os.MkdirAll(host, 0o755); err != nil {
		t.Fatal(err)
	}
	c := &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: name, Attempt: 1}, Image: &runtime.ImageSpec{Image: k.Busybox, Annotations: map[string]string{"a": "b"}, UserSpecifiedImage: k.Busybox},
		Command: []string{"/bin/sh"}, Args: []string{"-c", "sleep 1000"}, WorkingDir: "/", Envs: []*runtime.KeyValue{{Key: "A", Value: []byte("b")}},
		Mounts: []*runtime.Mount{{ContainerPath: "/mnt", HostPath: host, Readonly: true},
			{ContainerPath: "/img", Image: &runtime.ImageSpec{Image: k.Busybox}, ImageSubPath: "bin"}},
		Devices: []*runtime.Device{{ContainerPath: "/dev/mine", HostPath: "/dev/null", Permissions: "rwm"}},
		Labels:  map[string]string{"l": "m"}, Annotations: map[string]string{"container.example/x": "y"}, LogPath: name + ".log", Stdin: true, StdinOnce: true, StopSignal: runtime.Signal_SIGNAL_SIGTERM,
		Linux: &runtime.LinuxContainerConfig{
			Resources: &runtime.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 100, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 10, CpusetCpus: "0", CpusetMems: "0",
				HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 1 << 21}}, Unified: map[string]string{"memory.high": "1000000"}},
			SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER},
				Capabilities: &runtime.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"CHOWN"}, AddAmbientCapabilities: []string{"NET_RAW"}},
				RunAsUser:    &runtime.Int64Value{Value: 1}, RunAsGroup: &runtime.Int64Value{Value: 1}, SupplementalGroups: []int64{2}, NoNewPrivs: true, ReadonlyRootfs: true,
				MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"}, SupplementalGroupsPolicy: runtime.SupplementalGroupsPolicy_Strict,
				Seccomp: &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}, Apparmor: &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined},
				SelinuxOptions: &runtime.SELinuxOption{User: "u", Role: "r", Type: "t", Level: "s0"}}}}
	if !cgroup2() {
		c.Linux.Resources.Unified = nil
	}
	return c
}

func cgroup2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// sweepPod and sweepContainer are the objects that requests of the sweep are about.
const sweepPod, sweepContainer = "sweep-pod", "sweep-container"

// fine are the methods whose base is accepted.
var fine = map[protoreflect.Name]bool{"RunPodSandbox": true, "CreateContainer": true, "UpdateContainerResources": true, "UpdateRuntimeConfig": true, "ExecSync": true, "Exec": true,
	"Attach": true, "PortForward": true, "StopContainer": true, "PullImage": true, "ImageStatus": true}

// base is a request that is fine.
func (k *kube) base(t testing.TB, m protoreflect.MethodDescriptor, mt protoreflect.MessageType, pod, ctr, removable string) proto.Message {
	switch m.Name() {
	case "RunPodSandbox":
		return &runtime.RunPodSandboxRequest{Config: k.richPod(t, "swept"), RuntimeHandler: "pauseless"}
	case "CreateContainer":
		return &runtime.CreateContainerRequest{PodSandboxId: pod, Config: k.richContainer(t, "swept"), SandboxConfig: &runtime.PodSandboxConfig{LogDirectory: "/x"}}
	case "UpdateContainerResources":
		return &runtime.UpdateContainerResourcesRequest{ContainerId: ctr, Linux: k.richContainer(t, "").Linux.Resources, Annotations: map[string]string{"a": "b"}}
	case "UpdateRuntimeConfig":
		return &runtime.UpdateRuntimeConfigRequest{RuntimeConfig: &runtime.RuntimeConfig{NetworkConfig: &runtime.NetworkConfig{PodCidr: "10.88.0.0/16"}}}
	}
	f := filler{dir: k.Dir, registry: k.Registry.Host(), target: ctr}
	full := f.full(mt)
	fill(full.ProtoReflect(), func(fd protoreflect.FieldDescriptor) (string, bool) {
		switch {
		case fd.Name() == "pod_sandbox_id" || fd.FullName() == "runtime.v1.PodSandboxFilter.id" || fd.FullName() == "runtime.v1.PodSandboxStatsFilter.id":
			return pod, true
		case fd.Name() == "container_id" || fd.FullName() == "runtime.v1.ContainerFilter.id" || fd.FullName() == "runtime.v1.ContainerStatsFilter.id":
			return ctr, true
		case fd.FullName() == "runtime.v1.ImageSpec.image" && m.Name() == "RemoveImage":
			return removable, true
		case fd.FullName() == "runtime.v1.ImageSpec.image":
			return k.Busybox, true
		case fd.Name() == "runtime_handler":
			return "runc", true
		case fd.Name() == "location" || fd.Name() == "path":
			return k.Dir + "/nothing/checkpoint", true
		case fd.Name() == "server_address":
			return k.Registry.Host(), true
		case fd.Name() == "cmd":
			return "/bin/true", true
		}
		return "", false
	})
	switch full := full.(type) {
	case *runtime.ExecRequest:
		full.Stderr = false // which a terminal has not got
	case *runtime.AttachRequest:
		full.Stderr = false
	}
	return full
}

// fill changes the strings of a message, at any depth.
func fill(m protoreflect.Message, text func(protoreflect.FieldDescriptor) (string, bool)) {
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
		case fd.IsList() && fd.Kind() == protoreflect.StringKind:
			if s, ok := text(fd); ok {
				v.List().Set(0, protoreflect.ValueOfString(s))
			}
		case fd.IsList() && fd.Kind() == protoreflect.MessageKind:
			for i := range v.List().Len() {
				fill(v.List().Get(i).Message(), text)
			}
		case fd.IsList():
		case fd.Kind() == protoreflect.MessageKind:
			fill(v.Message(), text)
		case fd.Kind() == protoreflect.StringKind:
			if s, ok := text(fd); ok {
				m.Set(fd, protoreflect.ValueOfString(s))
			}
		}
		return true
	})
}

// Every request of both of the CRI's services with each of its fields absent or
// hostile in turn gets an answer in time and of a class; what was refused has
// had no effect, and what was not can be taken away without a trace.
//
// contract: 1.3.42, 7.1.5, 7.1.11, 7.1.12, 7.1.16, 7.1.18
// promise: P36
func TestWholeCRI(t *testing.T) {
	k := startKube(t, "[plugins.'io.containerd.metadata.v1.bolt']\nno_sync = true")
	conn := k.d.rawDial()
	k.Pull(t, k.Busybox)
	removable := k.Put(t, "removable", ocispec.ImageConfig{}, testimage.File{Name: "removable", Body: []byte("x")})
	var pod, ctr string
	ensure := func() {
		t.Helper()
		ctx := critest.Context(t)
		if p, err := k.RT.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: cmpOr(pod)}); err != nil || p.Status.State != runtime.PodSandboxState_SANDBOX_READY {
			k.remove(t, pod)
			c := k.PodConfig(t, critest.HostNetwork)
			c.Metadata.Name, c.Metadata.Uid, c.LogDirectory = sweepPod, sweepPod, k.Dir+"/logs/"+sweepPod
			r, err := k.RT.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: c, RuntimeHandler: "pauseless"})
			if err != nil {
				t.Fatal(err)
			}
			pod, ctr = r.PodSandboxId, ""
		}
		if c, err := k.RT.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: cmpOr(ctr)}); err == nil && c.Status.State == runtime.ContainerState_CONTAINER_RUNNING {
			return
		}
		if ctr != "" {
			if _, err := k.RT.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: ctr}); err != nil {
				t.Fatal(err)
			}
		}
		c, err := k.RT.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: pod, Config: &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: sweepContainer},
			Image: &runtime.ImageSpec{Image: k.Busybox}, Command: []string{"/bin/sh", "-c", "sleep 100000"}, LogPath: "c.log",
			Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}}}}})
		if err == nil {
			ctr = c.ContainerId
			_, err = k.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: ctr})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	known := func() (names map[string]bool) { // of pods and containers
		t.Helper()
		names = map[string]bool{}
		ctx := critest.Context(t)
		pods, err := k.RT.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range pods.Items {
			names["pod "+p.Id] = true
		}
		ctrs, err := k.RT.ListContainers(ctx, &runtime.ListContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range ctrs.Containers {
			names["container "+c.Id] = true
		}
		return names
	}
	ensure()
	k.remove(t, pod)
	pod = ""
	before := k.d.inventory()
	requests := 0
	for _, m := range criMethods() {
		begin := time.Now()
		mt, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
		if err != nil {
			t.Fatal(err)
		}
		ensure()
		mutates := !slices.ContainsFunc([]string{"List", "Stream", "Version", "Status", "ImageStatus", "ImageFsInfo", "GetContainerEvents", "RuntimeConfig"}, func(p string) bool { return strings.HasPrefix(string(m.Name()), p) }) &&
			!strings.HasSuffix(string(m.Name()), "Status") && !strings.HasSuffix(string(m.Name()), "Stats")
		generic := filler{dir: k.Dir, registry: k.Registry.Host(), target: ctr}.full(mt)
		all := append([]variant{{"empty", mt.New().Interface()}, {"generic", generic}, {"full", k.base(t, m, mt, pod, ctr, removable)}}, variants(k.base(t, m, mt, pod, ctr, removable))...)
		oldPod, oldCtr := pod, ctr
		for _, v := range all {
			if mutates {
				ensure()
			}
			if pod != oldPod || ctr != oldCtr {
				renew(v.msg.ProtoReflect(), map[string]string{oldPod: pod, oldCtr: ctr})
			}
			there := known()
			what := fmt.Sprintf("%s %s", m.Name(), v.name)
			err := call(t, conn, m, v.msg, headers{})
			judge(t, what, err)
			if v.name == "full" && err != nil && fine[m.Name()] {
				t.Errorf("%s is refused: %v", what, err)
			}
			requests++
			if !mutates {
				continue
			}
			for name := range known() {
				if there[name] {
					continue
				}
				if err != nil {
					t.Errorf("%s: an error, and yet there is %s: %v", what, name, err)
				}
				kind, id, _ := strings.Cut(name, " ")
				if kind == "pod" {
					k.remove(t, id)
					continue
				}
				ctx := critest.Context(t)
				_, err := k.RT.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id})
				judge(t, what+": start", err)
				if _, err := k.RT.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id}); err != nil {
					t.Errorf("%s: remove: %v", what, err)
				}
			}
		}
		if k.Pid() == 0 {
			t.Fatalf("%s: the daemon has ended", m.Name())
		}
		ensure()
		k.remove(t, pod)
		pod = ""
		k.Pull(t, removable)
		if m.Name() == "RemoveImage" { // what was unpacked again has another number
			before = slices.DeleteFunc(before, numbered)
			if now := slices.DeleteFunc(k.d.inventory(), numbered); !slices.Equal(before, now) {
				t.Errorf("%s: there was %q, there is %q", m.Name(), before, now)
			}
			before = k.d.inventory()
		} else if diff := k.d.difference(before); diff != "" {
			t.Errorf("%s leaves behind:\n%s", m.Name(), diff)
			before = k.d.inventory()
		}
		t.Logf("%s: %d requests in %v", m.Name(), len(all), time.Since(begin))
	}
	if requests < 800 {
		t.Errorf("only %d requests were made", requests)
	}
}

func numbered(line string) bool { return strings.Contains(line, "/snapshots/") }

// cmpOr makes an id that nobody has of none.
func cmpOr(id string) string {
	if id == "" {
		return "nobody"
	}
	return id
}

// renew puts new ids for old ones.
func renew(m protoreflect.Message, ids map[string]string) {
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if fd.Kind() == protoreflect.MessageKind && !fd.IsList() && !fd.IsMap() {
			renew(v.Message(), ids)
		} else if fd.Kind() == protoreflect.StringKind && !fd.IsList() && !fd.IsMap() {
			if id := ids[v.String()]; id != "" {
				m.Set(fd, protoreflect.ValueOfString(id))
			}
		}
		return true
	})
}

// remove takes a pod away; none is fine.
func (k *kube) remove(t testing.TB, id string) {
	t.Helper()
	if id == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := k.RT.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Errorf("stop pod: %v", err)
	}
	if _, err := k.RT.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Errorf("remove pod: %v", err)
	}
}

// rejected checks a refusal on the wire: one of the codes, and the words.
func rejected(t testing.TB, what string, err error, words []string, want ...codes.Code) {
	t.Helper()
	if err == nil {
		t.Errorf("%s was accepted", what)
		return
	}
	judge(t, what, err)
	if !slices.Contains(want, status.Code(err)) {
		t.Errorf("%s: the code is none of %v: %.1000v", what, want, err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: the error does not say %q: %.1000v", what, w, err)
		}
	}
}
