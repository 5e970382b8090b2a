package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/cri/criserver"
	"github.com/gantryd/gantry/internal/edge/cri/crispec"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/shimclient"
	"github.com/gantryd/gantry/internal/shim/stdio"
)

// criHost looks at the host and its runtimes for pods and containers.
type criHost struct {
	config cristate.RuntimeConfig
	ask    func(ctx context.Context, runtime string, options typed.Any) (shimclient.RuntimeInfo, error)
	armor  appArmor
	// attributes says that the kernel can change those of mounts, which
	// recursively read-only and id-mapped ones need (contract 10.10).
	attributes bool
	log        *slog.Logger

	mu       sync.Mutex // guards runtimes; nothing is asked under it
	runtimes map[string]answer
}

// answer is what a runtime said of itself, or that it did not, until then.
type answer struct {
	info  shimclient.RuntimeInfo
	err   error
	until time.Time // of err
}

// askAgain is after how long a runtime is asked again that did not answer: the
// kubelet wants to know every few seconds, and a program that hangs, or that
// cannot tell, is not to be started each time. One that is not there is looked
// for always.
const askAgain = 10 * time.Second

// facts are those of now: devices come and go.
func (h *criHost) facts(ctx context.Context, rt cristate.Runtime) crispec.Host {
	base, err := client.HostFacts(false)
	if err != nil {
		h.log.Warn("some facts of the host are not known", "error", err)
	}
	out := crispec.Host{HostFacts: base, SELinux: h.config.EnableSELinux && selinux.GetEnabled()}
	out.AllDevices = func() ([]specs.LinuxDevice, error) {
		f, err := client.HostFacts(true)
		return f.Devices, err
	}
	out.SystemdCgroup = rt.SystemdCgroup()
	out.Controllers = cgroupControllers(base.CgroupV2)
	out.Swap = swapController(base.CgroupV2)
	out.HugeTLB = slices.Contains(out.Controllers, "hugetlb")
	out.Hostname, _ = os.Hostname() // unknown is ""
	if !h.config.DisableAppArmor {
		usable, err := h.armor.ready(ctx, h.log)
		if usable {
			out.AppArmor, out.AppArmorLoaded, out.AppArmorMissing = crispec.AppArmorDefault, appArmorLoaded, err
		}
	}
	out.OOMScoreAdj, out.OOMScoreLowerable = oomScore(base.UserNS)
	f := h.features(ctx, rt)
	out.RecursiveReadOnly, out.IDMapMounts, out.UserNamespaces = f.RecursiveReadOnly, f.UserNamespaces, f.UserNamespaces
	return out
}

// features says what kernel and runtime can do together (contract 10.10, 13.30).
func (h *criHost) features(ctx context.Context, rt cristate.Runtime) criserver.Features {
	info, err := h.info(ctx, rt)
	if err != nil {
		h.log.Debug("features of a runtime", "runtime", rt.Type, "error", err)
		return criserver.Features{}
	}
	var f features.Features
	if err := json.Unmarshal(info.Features.Value, &f); err != nil || !h.attributes {
		return criserver.Features{}
	}
	out := criserver.Features{RecursiveReadOnly: slices.Contains(f.MountOptions, "rro")}
	if l := f.Linux; l != nil {
		idmap := l.MountExtensions != nil && l.MountExtensions.IDMap != nil && l.MountExtensions.IDMap.Enabled != nil && *l.MountExtensions.IDMap.Enabled
		_, err := os.Stat("/proc/self/ns/user")
		out.UserNamespaces = idmap && slices.Contains(l.Namespaces, "user") && err == nil
	}
	return out
}

// info asks a runtime once what it is; one that did not answer is asked again later.
func (h *criHost) info(ctx context.Context, rt cristate.Runtime) (shimclient.RuntimeInfo, error) {
	rec, err := rt.Record()
	if err != nil {
		return shimclient.RuntimeInfo{}, err
	}
	return h.infoOf(ctx, rec)
}

func (h *criHost) infoOf(ctx context.Context, rec container.Runtime) (shimclient.RuntimeInfo, error) {
	key := rec.Name + "\x00" + string(rec.Options.Value)
	h.mu.Lock()
	a, ok := h.runtimes[key]
	h.mu.Unlock()
	if ok && (a.err == nil || time.Now().Before(a.until)) {
		return a.info, a.err
	}
	a.info, a.err = h.ask(ctx, rec.Name, rec.Options)
	if errdefs.IsNotFound(a.err) || ctx.Err() != nil {
		return a.info, a.err
	}
	a.until = time.Now().Add(askAgain)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.runtimes[key] = a
	return a.info, a.err
}

// writesLogs says that a runtime's shim keeps logs in Kubernetes' form itself.
func (h *criHost) writesLogs(ctx context.Context, rec container.Runtime) bool {
	info, err := h.infoOf(ctx, rec)
	return err == nil && info.Annotations[stdio.Annotation] == stdio.FormatCRI
}

// mountAttributes asks the kernel, of which Linux 5.12 is the first that can.
func mountAttributes() bool {
	return unix.MountSetattr(-1, "", 0, &unix.MountAttr{}) != unix.ENOSYS
}

func cgroupControllers(v2 bool) []string {
	if v2 {
		b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		if err != nil {
			return nil
		}
		return strings.Fields(string(b))
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	var all []string
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 && f[1] != "" && !strings.HasPrefix(f[1], "name=") {
			all = append(all, strings.Split(f[1], ",")...)
		}
	}
	return all
}

// swapController says that swap can be limited.
func swapController(v2 bool) bool {
	if !v2 {
		_, err := os.Stat("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")
		return err == nil
	}
	// The root group has no such file; any other has it or none does.
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return false
	}
	own, _ := strings.CutPrefix(strings.TrimSpace(string(b)), "0::")
	for dir := filepath.Join("/sys/fs/cgroup", own); strings.HasPrefix(dir, "/sys/fs/cgroup/"); dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "memory.swap.max")); err == nil {
			return true
		}
	}
	found, err := filepath.Glob("/sys/fs/cgroup/*/memory.swap.max")
	return err == nil && len(found) > 0
}

// oomScore is the daemon's own, and whether it may give lower ones: a capability
// of a user namespace does not count.
func oomScore(userNS bool) (score int, lowerable bool) {
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0, false
	}
	score, err = strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, false
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return score, false
	}
	return score, !userNS && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
