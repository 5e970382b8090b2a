package cripod

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/lib/mountx"
	"github.com/gantryd/gantry/internal/lib/nspin"
)

// The files that a pod's containers see as /etc/hostname, /etc/hosts and
// /etc/resolv.conf, in Dirs.Of.
const (
	FileHostname = "hostname"
	FileHosts    = "hosts"
	FileResolv   = "resolv.conf"
)

// hostFileLimit is the most that is copied of a file of the host.
const hostFileLimit = 1 << 20

// Hostname is the pod's: as configured, or the host's.
func Hostname(cfg *runtime.PodSandboxConfig) (string, error) {
	if h := cfg.GetHostname(); h != "" {
		return h, nil
	}
	return os.Hostname()
}

// make makes a pod's directories, its files and its /dev/shm.
func (d Dirs) make(id string, cfg *runtime.PodSandboxConfig, mountLabel string) error {
	hostname, err := Hostname(cfg)
	if err != nil {
		return err
	}
	resolv, err := resolvConf(cfg.GetDnsConfig())
	if err != nil {
		return err
	}
	for _, dir := range []string{d.Of(id), d.StateOf(id), d.ns(id, "")} {
		// Containers in a user namespace reach their files through here.
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	if modes(cfg).GetNetwork() != runtime.NamespaceMode_NODE {
		if err := os.MkdirAll(d.NetNS, 0o755); err != nil {
			return err
		}
	}
	dir := d.Of(id)
	hosts, err := hostFile("/etc/hosts")
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{FileHostname: []byte(hostname + "\n"), FileHosts: hosts, FileResolv: resolv} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	if modes(cfg).GetIpc() == runtime.NamespaceMode_NODE {
		return nil // the host's is used
	}
	shm := d.Shm(id)
	if err := os.Mkdir(shm, 0o700); err != nil {
		return err
	}
	options := []string{"nosuid", "nodev", "noexec", "mode=1777", "size=" + strconv.Itoa(shmSize)}
	if mountLabel != "" {
		options = append(options, fmt.Sprintf("context=%q", mountLabel))
	}
	if u := modes(cfg).GetUsernsOptions(); u.GetMode() == runtime.NamespaceMode_POD {
		options = append(options, fmt.Sprintf("uid=%d", rootOf(u.GetUids())), fmt.Sprintf("gid=%d", rootOf(u.GetGids())))
	}
	return mountx.All([]mountx.Mount{{Type: "tmpfs", Source: "shm", Options: options}}, shm)
}

// shmSize is that of a pod's /dev/shm in bytes (contract 7.3.10).
const shmSize = 64 << 20

// rootOf is the host's id of a user namespace's root.
func rootOf(ids []*runtime.IDMapping) uint32 {
	for _, m := range ids {
		if m.GetContainerId() == 0 {
			return m.GetHostId()
		}
	}
	return 0
}

// resolvConf is the pod's, or the host's if none is configured.
func resolvConf(dns *runtime.DNSConfig) ([]byte, error) {
	var b strings.Builder
	lines := func(keyword string, each bool, values []string) error {
		for _, v := range values {
			if v == "" || strings.ContainsAny(v, "\r\n\x00") {
				return fmt.Errorf("DNS configuration: %s %q: %w", keyword, v, errdefs.ErrInvalidArgument)
			}
			if each {
				fmt.Fprintf(&b, "%s %s\n", keyword, v)
			}
		}
		if !each && len(values) > 0 {
			fmt.Fprintf(&b, "%s %s\n", keyword, strings.Join(values, " "))
		}
		return nil
	}
	err := errors.Join(lines("search", false, dns.GetSearches()), lines("nameserver", true, dns.GetServers()), lines("options", false, dns.GetOptions()))
	if err != nil || b.Len() > 0 {
		return []byte(b.String()), err
	}
	return hostFile("/etc/resolv.conf")
}

// hostFile reads a file of the host; one that is not there is empty.
func hostFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, hostFileLimit+1))
	if err == nil && len(data) > hostFileLimit {
		err = fmt.Errorf("%s is larger than %d bytes", path, hostFileLimit)
	}
	return data, err
}

// unpin removes all of a pod's namespaces.
func (d Dirs) unpin(m cristate.PodMeta) error {
	var errs []error
	if m.NetNSPath != "" {
		errs = append(errs, nspin.Remove(m.NetNSPath))
	}
	for _, kind := range []nspin.Kind{nspin.UTS, nspin.IPC, nspin.User} {
		errs = append(errs, nspin.Remove(d.ns(m.ID, kind)))
	}
	return errors.Join(errs...)
}

// unmount takes a pod's /dev/shm away.
func (d Dirs) unmount(id string) error {
	return mountx.UnmountAll(d.Shm(id), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
}

// remove removes a pod's directories with what is mounted there.
func (d Dirs) remove(id string) error {
	// Removal must never go through a mount.
	if err := mountx.UnmountRecursive(d.StateOf(id), unix.MNT_DETACH); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(d.StateOf(id)), os.RemoveAll(d.Of(id)))
}

// own adds the paths of the namespaces that a pod without a process has pinned
// beside its network.
func (d Dirs) own(meta cristate.PodMeta, paths map[nspin.Kind]string) {
	m := modes(meta.Config)
	if m.GetNetwork() != runtime.NamespaceMode_NODE {
		paths[nspin.UTS] = d.ns(meta.ID, nspin.UTS)
	}
	if m.GetIpc() != runtime.NamespaceMode_NODE {
		paths[nspin.IPC] = d.ns(meta.ID, nspin.IPC)
	}
}

// joined are the paths of the namespaces that a pod's containers join: those
// of its process, or what is pinned.
func (d Dirs) joined(meta cristate.PodMeta, pid uint32) map[string]string {
	m, out := modes(meta.Config), map[string]string{}
	add := func(name string, mode runtime.NamespaceMode, kind nspin.Kind) {
		if mode == runtime.NamespaceMode_NODE {
			return
		}
		if pid != 0 {
			out[name] = fmt.Sprintf("/proc/%d/ns/%s", pid, kind)
		} else if path := d.ns(meta.ID, kind); nspin.Pinned(path) {
			out[name] = path
		}
	}
	add("uts", m.GetNetwork(), nspin.UTS)
	add("ipc", m.GetIpc(), nspin.IPC)
	if u := m.GetUsernsOptions(); u != nil {
		add("user", u.GetMode(), nspin.User)
	}
	if m.GetPid() == runtime.NamespaceMode_POD && pid != 0 {
		out["pid"] = fmt.Sprintf("/proc/%d/ns/pid", pid)
	}
	if meta.NetNSPath != "" {
		out["network"] = meta.NetNSPath
	}
	return out
}
