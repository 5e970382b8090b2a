package oci

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// capabilities are all that Linux has, by number.
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW",
	"CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
	"CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD",
	"CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG",
	"CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// defaultCapabilities are what a container has when nothing is said (contract
// 10.4).
var defaultCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP",
	"CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// AllCapabilities lists the names of all capabilities in the kernel's order:
// number n is at index n.
func AllCapabilities() []string { return slices.Clone(capabilities) }

// capName brings a name to its full form: "net_admin" is CAP_NET_ADMIN.
func capName(name string) (string, error) {
	full := strings.ToUpper(name)
	if full == "ALL" || full == "CAP_ALL" {
		return "ALL", nil
	}
	if !strings.HasPrefix(full, "CAP_") {
		full = "CAP_" + full
	}
	if !slices.Contains(capabilities, full) {
		return "", fmt.Errorf("capability %q is unknown: %w", shorten(name), errdefs.ErrInvalidArgument)
	}
	return full, nil
}

// selectCapabilities computes the set: the base, without drop, with add. ALL
// in drop empties the base, ALL in add is everything but what is dropped by
// name. available bounds the result, nil is no bound; an added capability that
// is not available is ErrFailedPrecondition, others are left out.
func selectCapabilities(base, add, drop, available []string) ([]string, error) {
	adds, err := capSet(add)
	if err != nil {
		return nil, err
	}
	drops, err := capSet(drop)
	if err != nil {
		return nil, err
	}
	have := func(c string) bool { return available == nil || slices.Contains(available, c) }
	from := base
	if drops["ALL"] {
		from = nil
	}
	if adds["ALL"] {
		from = capabilities
	}
	set := []string{}
	for _, c := range from {
		if have(c) && !drops[c] {
			set = append(set, c)
		}
	}
	for _, c := range capabilities { // in a fixed order
		if !adds[c] || slices.Contains(set, c) {
			continue
		}
		if !have(c) {
			return nil, fmt.Errorf("capability %s: the daemon does not have it on this host: %w", c, errdefs.ErrFailedPrecondition)
		}
		set = append(set, c)
	}
	return set, nil
}

func capSet(names []string) (map[string]bool, error) {
	set := make(map[string]bool, len(names))
	for _, n := range names {
		full, err := capName(n)
		if err != nil {
			return nil, err
		}
		set[full] = true
	}
	return set, nil
}
