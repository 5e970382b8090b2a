package cristate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/typed"
)

func podMeta(id string) PodMeta {
	m := &runtime.PodSandboxMetadata{Name: "p", Namespace: "n", Uid: "u-" + id, Attempt: 2}
	return PodMeta{ID: id, Name: PodName(m), Config: &runtime.PodSandboxConfig{Metadata: m, Labels: map[string]string{"a": "b"}}, NetNSPath: "/run/netns/x", IP: "10.0.0.2",
		AdditionalIPs: []string{"fd00::2"}, RuntimeHandler: "runc", CNIResult: json.RawMessage(`{"Interfaces":{}}`)}
}

// The stored form is containerd's: a host can be switched.
// contract: 13.25, 1.5.21, 7.3.29
func TestStoredForm(t *testing.T) {
	pod := podMeta("p1")
	a, err := EncodePod(pod)
	if err != nil {
		t.Fatal(err)
	}
	var raw struct {
		Version  string
		Metadata struct {
			ID, Name, NetNSPath, IP string
			Config                  struct {
				Metadata struct{ Name, Uid string } `json:"metadata"`
			}
		}
	}
	if err := json.Unmarshal(a.Value, &raw); err != nil || raw.Version != "v1" || raw.Metadata.ID != "p1" || raw.Metadata.Config.Metadata.Uid != "u-p1" || raw.Metadata.Name != "p_n_u-p1_2" {
		t.Errorf("%s: %v", a.Value, err)
	}
	if a.URL != "github.com/containerd/cri/pkg/store/sandbox/Metadata" {
		t.Error(a.URL)
	}
	back, err := DecodePod(a)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(pod, back, protocmp.Transform()); d != "" {
		t.Error(d)
	}
	c := ContainerMeta{ID: "c1", Name: "x", SandboxID: "p1", Config: &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "c"}}, ImageRef: "sha256:1", LogPath: "/l", StopSignal: "SIGINT"}
	ca, err := EncodeContainer(c)
	if err != nil {
		t.Fatal(err)
	}
	cback, err := DecodeContainer(ca)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(c, cback, protocmp.Transform()); d != "" {
		t.Error(d)
	}
	for name, bad := range map[string]typed.Any{
		"other type": ca, "no JSON": {URL: a.URL, Value: []byte("{")}, "version": {URL: a.URL, Value: []byte(`{"Version":"v9","Metadata":{}}`)},
		"no configuration": {URL: a.URL, Value: []byte(`{"Version":"v1","Metadata":{"ID":"x"}}`)}, "null": {URL: a.URL, Value: []byte(`{"Version":"v1","Metadata":null}`)},
	} {
		if _, err := DecodePod(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// contract: 7.1.9, 13.26
func TestIndex(t *testing.T) {
	x := NewPods()
	for _, id := range []string{"aa1", "aa2", "b"} {
		if err := x.Add(NewPod(podMeta(id), PodStatus{})); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.Add(NewPod(podMeta("b"), PodStatus{})); !errdefs.IsAlreadyExists(err) {
		t.Errorf("%v", err)
	}
	other := podMeta("c")
	other.Name = podMeta("b").Name
	if err := x.Add(NewPod(other, PodStatus{})); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "is b") {
		t.Errorf("%v", err)
	}
	for id, want := range map[string]string{"aa1": "aa1", "b": "b", "aa2": "aa2"} {
		if p, err := x.Get(id); err != nil || p.ID() != want {
			t.Errorf("%s: %v", id, err)
		}
	}
	if _, err := x.Get("aa"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	if _, err := x.Get(""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	if _, err := x.Get(strings.Repeat("z", 1<<20)); !errdefs.IsNotFound(err) || len(err.Error()) > 200 {
		t.Errorf("%.300v", err)
	}
	unlock, err := x.Lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := x.Lock(ctx, "b"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "pod sandbox b") {
		t.Errorf("%v", err)
	}
	unlock()
	x.Remove("b")
	x.Remove("b")
	if _, ok := x.ByName(podMeta("b").Name); ok || len(x.List()) != 2 {
		t.Error("it is still there")
	}
}

// Tens of thousands of containers that have ended fit into a daemon's memory:
// what nobody is told of any more is not kept of them.
//
// promise: P23
func TestEndedContainersAreSmall(t *testing.T) {
	const n, most = 2000, 2500 // bytes; whole requests are 8 KB
	request := func(i int) *runtime.ContainerConfig {
		uid, id := fmt.Sprintf("%036d", i), fmt.Sprint(i)
		c := &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "container", Attempt: uint32(i)}, LogPath: "container/" + id + ".log",
			Image: &runtime.ImageSpec{Image: "sha256:" + strings.Repeat("a", 64), UserSpecifiedImage: "registry.example/image:v1"}, Command: []string{"/bin/server"}, Args: []string{"--listen=0.0.0.0:8080"},
			Labels: map[string]string{"io.kubernetes.container.name": "container", "io.kubernetes.pod.name": "pod-" + id, "io.kubernetes.pod.namespace": "default", "io.kubernetes.pod.uid": uid},
			Annotations: map[string]string{"io.kubernetes.container.hash": "8f3b2a1c", "io.kubernetes.container.restartCount": id, "io.kubernetes.container.terminationMessagePath": "/dev/termination-log",
				"io.kubernetes.container.terminationMessagePolicy": "File", "io.kubernetes.pod.terminationGracePeriod": "30"},
			Linux: &runtime.LinuxContainerConfig{Resources: &runtime.LinuxContainerResources{CpuShares: 100}, SecurityContext: &runtime.LinuxContainerSecurityContext{Seccomp: &runtime.SecurityProfile{},
				MaskedPaths: []string{"/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"}}}}
		for j := range 14 {
			c.Envs = append(c.Envs, &runtime.KeyValue{Key: fmt.Sprint("SERVICE_", j), Value: []byte("tcp://10.96.0.1:443")})
		}
		for j := range 5 {
			c.Mounts = append(c.Mounts, &runtime.Mount{ContainerPath: fmt.Sprint("/secrets/", j), HostPath: fmt.Sprint("/var/lib/kubelet/pods/", uid, "/volumes/", j)})
		}
		return c
	}
	heap := func() uint64 {
		goruntime.GC()
		var m goruntime.MemStats
		goruntime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	all, before, dir := NewContainers(), heap(), t.TempDir()
	for i := range n {
		stored, err := EncodeContainer(ContainerMeta{ID: fmt.Sprintf("%064d", i), Name: fmt.Sprint("container_pod_", i), SandboxID: fmt.Sprintf("%064d", i), Config: request(i), LogPath: fmt.Sprint("/var/log/pods/", i)})
		if err != nil {
			t.Fatal(err)
		}
		m, err := DecodeContainer(stored)
		if err != nil {
			t.Fatal(err)
		}
		c := NewContainer(m, Status{CreatedAt: 1, StartedAt: 2}, dir)
		if i%2 == 0 { // as after a restart of the daemon
			c = NewContainer(m, Status{CreatedAt: 1, StartedAt: 2, FinishedAt: 3}, dir)
		} else if err := c.Change(func(st *Status) error { st.FinishedAt = 3; return nil }); err != nil {
			t.Fatal(err)
		}
		if err := all.Add(c); err != nil {
			t.Fatal(err)
		}
	}
	if each := (heap() - before) / n; each > most {
		t.Errorf("each takes %d bytes", each)
	} else {
		t.Logf("each takes %d bytes", each)
	}
	c := all.List()[n/2]
	want := request(int(c.Meta().Config.Metadata.Attempt))
	got := c.Answer(ImageNames{})
	if len(got.Mounts) != 5 || len(got.Labels) != 4 || len(got.Annotations) != 5 || got.Mounts[1].HostPath != want.Mounts[1].HostPath || c.Meta().Config.Linux.SecurityContext.Seccomp == nil || c.Meta().Config.Envs != nil {
		t.Errorf("%v", got)
	}
	select {
	case <-c.Gone():
	default:
		t.Error("who asks later does not hear that it has ended")
	}
}

// contract: 7.3.29, 7.1.15
func TestStatus(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadStatus(dir); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	c := NewContainer(ContainerMeta{ID: "c", Config: &runtime.ContainerConfig{}}, Status{}, dir)
	if s := c.Status().State(); s != runtime.ContainerState_CONTAINER_UNKNOWN {
		t.Error(s)
	}
	for i, step := range []struct {
		change func(*Status)
		want   runtime.ContainerState
	}{
		{func(s *Status) { s.CreatedAt = 1 }, runtime.ContainerState_CONTAINER_CREATED},
		{func(s *Status) { s.StartedAt, s.Pid = 2, 7 }, runtime.ContainerState_CONTAINER_RUNNING},
		{func(s *Status) { s.FinishedAt, s.ExitCode = 3, 137 }, runtime.ContainerState_CONTAINER_EXITED},
	} {
		if err := c.Change(func(s *Status) error { step.change(s); return nil }); err != nil {
			t.Fatal(err)
		}
		kept, err := ReadStatus(dir)
		if err != nil || kept.State() != step.want || kept != c.Status() {
			t.Errorf("%d: %+v %v", i, kept, err)
		}
	}
	select {
	case <-c.Gone():
	default:
		t.Error("it is not gone")
	}
	if a := c.Answer(ImageNames{ID: "sha256:1", Digest: "r@sha256:2"}); a.Reason != ReasonError || a.ImageRef != "r@sha256:2" || a.StopSignal != runtime.Signal_SIGNAL_SIGTERM {
		t.Errorf("%v", a)
	}
	refuse := errors.New("no")
	if err := c.Change(func(s *Status) error { s.Reason = "x"; return refuse }); err != refuse || c.Status().Reason != "" {
		t.Errorf("%v", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := c.Change(func(s *Status) error { s.Reason = "x"; return nil }); err == nil || c.Status().Reason != "" {
		t.Errorf("what could not be stored is visible: %v", err)
	}
	dir = t.TempDir()
	for name, data := range map[string]string{"empty": "", "cut": `{"Version":"v1","Pi`, "version": `{"Version":"v2"}`} {
		if err := os.WriteFile(filepath.Join(dir, "status"), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadStatus(dir); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A subscriber that does not read is told so; it holds up nobody.
// contract: 7.1.22
func TestEvents(t *testing.T) {
	x := NewEvents()
	now := time.Unix(1000, 0)
	x.now = func() time.Time { return now }
	x.Publish(&runtime.ContainerEventResponse{ContainerId: "old"})
	now = now.Add(eventsFor + time.Second)
	x.Publish(&runtime.ContainerEventResponse{ContainerId: "early"})
	if n := x.Dropped(); n != 1 {
		t.Errorf("%d dropped", n)
	}
	slow, quick := x.Subscribe(), x.Subscribe()
	defer slow.Close()
	defer quick.Close()
	if e, err := slow.Next(t.Context()); err != nil || e.ContainerId != "early" {
		t.Errorf("%v %v", e, err)
	}
	for i := range eventsKept + 1 {
		x.Publish(&runtime.ContainerEventResponse{CreatedAt: int64(i)})
		if e, err := quick.Next(t.Context()); err != nil || e.CreatedAt != int64(i) {
			t.Fatal(e, err)
		}
	}
	for i := range eventsKept {
		if e, err := slow.Next(t.Context()); err != nil || e.CreatedAt != int64(i) {
			t.Fatal(i, e, err)
		}
	}
	if _, err := slow.Next(t.Context()); !errdefs.IsResourceExhausted(err) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := quick.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
