// Package nspin makes namespaces that no process keeps alive: each is bound
// to a file of its own, by whose path a process joins it, until the file is
// removed. What is bound survives the program; the host's next start loses it.
package nspin

import "github.com/gantryd/gantry/internal/lib/idmap"

// Kind is what a namespace separates. The value is its name in /proc/PID/ns.
type Kind string

// The kinds that can be pinned.
const (
	Net  Kind = "net"
	UTS  Kind = "uts"
	IPC  Kind = "ipc"
	User Kind = "user"
)

// Spec says what to make.
type Spec struct {
	// Paths are the files to make, by kind; their directories must be there.
	// With User among them the others belong to the new user namespace.
	Paths map[Kind]string
	// UIDs and GIDs map the ids of the user namespace, and are needed for one.
	UIDs, GIDs idmap.Map
	// Hostname is that of a new UTS namespace; it keeps the caller's if "".
	Hostname string
}
