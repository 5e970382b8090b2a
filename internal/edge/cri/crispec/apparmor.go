package crispec

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
)

// AppArmorFacts are what the text of a profile depends on.
type AppArmorFacts struct {
	// Peers are profiles whose processes may send signals: those of the daemon
	// and its shims. Unconfined ones always may, and so may runc and crun, which
	// distributions give profiles of their own.
	Peers []string
	// ABI is the version that the host's policy is written for, such as 4.0, ""
	// if it has none.
	ABI string
	// Tunables and Base say that /etc/apparmor.d has tunables/global and
	// abstractions/base.
	Tunables, Base bool
}

var appArmorName = regexp.MustCompile(`^[a-zA-Z0-9_./-]+$`)

// appArmorRules bound what a container may do to the kernel. Everything that is
// not of the kernel is bounded by mounts and capabilities already.
const appArmorRules = `  network,
  capability,
  file,
  umount,
  deny mount,

  # Files of the kernel as a whole; those of processes are in directories.
  deny @{PROC}/* wl,
  deny @{PROC}/{kcore,kmem,mem,sysrq-trigger} rwklx,
  deny @{PROC}/{acpi,bus,driver,fs,irq,scsi,tty}/** wl,
  # Of the parameters, those of System V IPC are the container's own.
  deny @{PROC}/sys/[^k]** wl,
  deny @{PROC}/sys/kernel/{[^ms],m[^s],s[^eh],se[^m],sh[^m]}** wl,

  # Of sysfs only cgroups may be written.
  deny /sys/[^f]** wklx,
  deny /sys/f[^s]** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/fs/c[^g]** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
`

// AppArmorProfile is the text of the default profile, for apparmor_parser
// (contract 10.6). ErrInvalidArgument for names that are none.
func AppArmorProfile(name string, f AppArmorFacts) (string, error) {
	for _, n := range append([]string{name}, f.Peers...) {
		if !appArmorName.MatchString(n) {
			return "", fmt.Errorf("AppArmor profile name %q: %w", short(n), errdefs.ErrInvalidArgument)
		}
	}
	var b strings.Builder
	if f.ABI != "" {
		if !regexp.MustCompile(`^[0-9]+\.[0-9]+$`).MatchString(f.ABI) {
			return "", fmt.Errorf("AppArmor ABI %q: %w", short(f.ABI), errdefs.ErrInvalidArgument)
		}
		fmt.Fprintf(&b, "abi <abi/%s>,\n", f.ABI)
	}
	if f.Tunables {
		b.WriteString("#include <tunables/global>\n")
	} else {
		b.WriteString("@{PROC}=/proc/\n")
	}
	fmt.Fprintf(&b, "\nprofile %s flags=(attach_disconnected,mediate_deleted) {\n", name)
	if f.Base {
		b.WriteString("  #include <abstractions/base>\n")
	}
	b.WriteString(appArmorRules)
	fmt.Fprintf(&b, "\n  signal (send,receive) peer=%s,\n  signal (receive) peer=unconfined,\n", name)
	for _, p := range append([]string{"runc", "crun"}, f.Peers...) {
		fmt.Fprintf(&b, "  signal (receive) peer=%s,\n", p)
	}
	fmt.Fprintf(&b, "  ptrace (trace,read,tracedby,readby) peer=%s,\n}\n", name)
	return b.String(), nil
}
