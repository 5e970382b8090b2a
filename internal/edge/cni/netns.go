package cni

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"

	"github.com/gantryd/gantry/internal/lib/nspin"
)

// NetNSDir is where network namespaces are pinned unless they are to be in the
// state directory (netns_mounts_under_state_dir: <state>/netns).
const NetNSDir = "/var/run/netns"

// NetNSName makes the path of a new namespace in dir, which it makes too:
// cni-UUID, the form that other programs look for.
func NetNSName(dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("network namespace: %w", err)
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return filepath.Join(dir, fmt.Sprintf("cni-%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])), nil
}

// NewNetNS makes a network namespace and returns its path in dir. With a
// source, such as /proc/PID/ns/net, it pins that one instead: so it is with a
// pod whose network namespace was made inside of its user namespace. To make
// both at once, take NetNSName and nspin.Make.
func NewNetNS(dir, source string) (string, error) {
	path, err := NetNSName(dir)
	if err != nil {
		return "", err
	}
	if source != "" {
		return path, nspin.Pin(source, path)
	}
	return path, nspin.Make(nspin.Spec{Paths: map[nspin.Kind]string{nspin.Net: path}})
}

// RemoveNetNS lets go of it. It is no error if it is gone.
func RemoveNetNS(path string) error { return nspin.Remove(path) }
