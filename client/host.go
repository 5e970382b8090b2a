package client

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/oci"
)

// HostFacts looks at this host for oci.Generate. devices are read only if
// asked for: a privileged container needs them.
func HostFacts(devices bool) (oci.HostFacts, error) {
	f := oci.HostFacts{Arch: runtime.GOARCH}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err == nil {
		f.CgroupV2 = st.Type == unix.CGROUP2_SUPER_MAGIC
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		var major, minor int
		release := unix.ByteSliceToString(u.Release[:])
		for i, part := range strings.SplitN(release, ".", 3) {
			n := 0
			for _, c := range part {
				if c < '0' || c > '9' {
					break
				}
				n = n*10 + int(c-'0')
			}
			switch i {
			case 0:
				major = n
			case 1:
				minor = n
			}
		}
		f.Kernel = [2]int{major, minor}
	}
	if b, err := os.ReadFile("/proc/self/uid_map"); err == nil {
		f.UserNS = !bytes.Equal(bytes.Join(bytes.Fields(b), []byte(" ")), []byte("0 0 4294967295"))
	}
	f.Capabilities = capabilities()
	for path, into := range map[string]*string{"/etc/hosts": &f.Hosts, "/etc/resolv.conf": &f.ResolvConf} {
		if _, err := os.Stat(path); err == nil {
			*into = path
		}
	}
	if !devices {
		return f, nil
	}
	err := filepath.WalkDir("/dev", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			if os.IsNotExist(err) || os.IsPermission(err) {
				return nil // devices come and go
			}
			return err
		}
		if d.IsDir() {
			switch d.Name() {
			case "pts", "shm", "mqueue", "fd", ".lxc", ".lxd-mounts", ".udev":
				return filepath.SkipDir
			}
			return nil
		}
		if d.Type()&os.ModeDevice == 0 || d.Name() == "console" {
			return nil
		}
		var s unix.Stat_t
		if err := unix.Lstat(path, &s); err != nil {
			return nil
		}
		kind := "b"
		if s.Mode&unix.S_IFMT == unix.S_IFCHR {
			kind = "c"
		}
		mode := os.FileMode(s.Mode &^ unix.S_IFMT)
		f.Devices = append(f.Devices, specs.LinuxDevice{Path: path, Type: kind, Major: int64(unix.Major(s.Rdev)), Minor: int64(unix.Minor(s.Rdev)), FileMode: &mode, UID: &s.Uid, GID: &s.Gid})
		return nil
	})
	return f, err
}

// capabilities are those that a process started here can have, nil if the
// kernel does not say.
func capabilities() []string {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil
	}
	_, rest, _ := bytes.Cut(b, []byte("\nCapBnd:"))
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	set, err := strconv.ParseUint(string(bytes.TrimSpace(line)), 16, 64)
	if err != nil {
		return nil
	}
	have := []string{}
	for n, name := range oci.AllCapabilities() {
		if set&(1<<n) != 0 {
			have = append(have, name)
		}
	}
	return have
}
