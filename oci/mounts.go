package oci

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"path"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// defaultMounts are the file systems of every container (contract 10.4).
func defaultMounts(facts HostFacts) []specs.Mount {
	pts := []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}
	if facts.UserNS {
		pts = pts[:len(pts)-1] // group 5 is not mapped
	}
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: pts},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/run", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
	}
}

// target checks where a mount goes: an absolute path that is not the root.
func target(dst string) (string, error) {
	if !strings.HasPrefix(dst, "/") || strings.ContainsRune(dst, 0) {
		return "", fmt.Errorf("target %q: want an absolute path: %w", shorten(dst), errdefs.ErrInvalidArgument)
	}
	clean := path.Clean(dst)
	if clean == "/" {
		return "", fmt.Errorf("target %q: the root file system cannot be mounted over: %w", shorten(dst), errdefs.ErrInvalidArgument)
	}
	return clean, nil
}

func source(src string) (string, error) {
	if !strings.HasPrefix(src, "/") || strings.ContainsRune(src, 0) {
		return "", fmt.Errorf("source %q: want an absolute path: %w", shorten(src), errdefs.ErrInvalidArgument)
	}
	return path.Clean(src), nil
}

var propagations = []string{"private", "rprivate", "shared", "rshared", "slave", "rslave"}

var mountFlags = []string{"nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "nodiratime", "relatime", "strictatime", "nosymfollow"}

// bindOptions checks the options of a bind mount and fills in the default:
// rbind, rprivate.
func bindOptions(opts []string) ([]string, error) {
	var flags []string
	bind, propagation, mode := "", "", ""
	for _, o := range opts {
		switch {
		case o == "":
		case o == "bind" || o == "rbind":
			bind = o
		case slices.Contains(propagations, o):
			if propagation != "" && propagation != o {
				return nil, fmt.Errorf("propagation is both %s and %s: %w", propagation, o, errdefs.ErrInvalidArgument)
			}
			propagation = o
		case o == "ro" || o == "rw" || o == "rro":
			if mode != "" && mode != o {
				return nil, fmt.Errorf("mode is both %s and %s: %w", mode, o, errdefs.ErrInvalidArgument)
			}
			mode = o
		case slices.Contains(mountFlags, o):
			flags = append(flags, o)
		default:
			return nil, fmt.Errorf("option %q is unknown: %w", shorten(o), errdefs.ErrInvalidArgument)
		}
	}
	bind = cmp.Or(bind, "rbind")
	propagation = cmp.Or(propagation, "rprivate")
	out := []string{bind, propagation}
	if mode != "" {
		out = append(out, mode)
	}
	return append(out, flags...), nil
}

// ParseVolume reads SOURCE:TARGET[:OPTIONS], options separated by commas: ro,
// rw, rro (recursively read-only), bind, rbind, a propagation, nosuid, nodev,
// noexec and their like. Both paths are absolute: a relative source is the
// caller's to resolve. All errors are ErrInvalidArgument.
func ParseVolume(s string) (specs.Mount, error) {
	m, err := parseVolume(s)
	if err != nil {
		return specs.Mount{}, fmt.Errorf("parse volume %q: %w", shorten(s), err)
	}
	return m, nil
}

func parseVolume(s string) (m specs.Mount, err error) {
	parts := strings.Split(s, ":")
	if len(parts) < 2 || len(parts) > 3 {
		return m, fmt.Errorf("want SOURCE:TARGET[:OPTIONS]: %w", errdefs.ErrInvalidArgument)
	}
	m.Type = "bind"
	if m.Source, err = source(parts[0]); err != nil {
		return m, err
	}
	if m.Destination, err = target(parts[1]); err != nil {
		return m, err
	}
	var opts []string
	if len(parts) == 3 {
		opts = strings.Split(parts[2], ",")
	}
	m.Options, err = bindOptions(opts)
	return m, err
}

var tmpfsKeys = append([]string{"ro", "rw", "size", "mode", "uid", "gid", "nr_inodes", "nr_blocks"}, mountFlags...)

// ParseTmpfs reads TARGET[:OPTIONS], options as mount(8) knows them for tmpfs.
// All errors are ErrInvalidArgument.
func ParseTmpfs(s string) (specs.Mount, error) {
	dst, opts, _ := strings.Cut(s, ":")
	dst, err := target(dst)
	if err != nil {
		return specs.Mount{}, fmt.Errorf("parse tmpfs %q: %w", shorten(s), err)
	}
	m := specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: dst, Options: []string{"noexec", "nosuid", "nodev"}}
	if opts == "" {
		return m, nil
	}
	for _, o := range strings.Split(opts, ",") {
		key, _, _ := strings.Cut(o, "=")
		if !slices.Contains(tmpfsKeys, key) {
			return specs.Mount{}, fmt.Errorf("parse tmpfs %q: option %q is unknown: %w", shorten(s), shorten(o), errdefs.ErrInvalidArgument)
		}
		if opposite := map[string]string{"exec": "noexec", "suid": "nosuid", "dev": "nodev"}[key]; opposite != "" {
			m.Options = slices.DeleteFunc(m.Options, func(e string) bool { return e == opposite })
		}
		if !slices.Contains(m.Options, o) {
			m.Options = append(m.Options, o)
		}
	}
	return m, nil
}

// ParseMount reads key=value pairs separated by commas, with CSV quoting:
// type (bind or tmpfs, bind when there is a source), source or src, target,
// destination or dst, readonly or ro, bind-propagation, bind-nonrecursive,
// tmpfs-size, tmpfs-mode, and options, which are separated by colons as in
// ctr. All errors are ErrInvalidArgument.
func ParseMount(s string) (specs.Mount, error) {
	m, err := parseMount(s)
	if err != nil {
		return specs.Mount{}, fmt.Errorf("parse mount %q: %w", shorten(s), err)
	}
	return m, nil
}

func parseMount(s string) (m specs.Mount, err error) {
	bad := func(format string, args ...any) (specs.Mount, error) {
		return m, fmt.Errorf("%w: %w", fmt.Errorf(format, args...), errdefs.ErrInvalidArgument)
	}
	r := csv.NewReader(strings.NewReader(s))
	fields, err := r.Read()
	if err != nil {
		return bad("no list of key=value: %s", err)
	}
	if r.InputOffset() < int64(len(s)) {
		return bad("it has more than one line")
	}
	var typ, src, dst string
	var opts, tmpfs []string
	for _, f := range fields {
		key, value, hasValue := strings.Cut(f, "=")
		key = strings.ToLower(key)
		flag := func(option string) error {
			on := true
			if hasValue {
				if on, err = strconv.ParseBool(value); err != nil {
					return fmt.Errorf("%s=%s: want true or false: %w", key, value, errdefs.ErrInvalidArgument)
				}
			}
			if on {
				opts = append(opts, option)
			}
			return nil
		}
		switch key {
		case "type":
			typ = strings.ToLower(value)
		case "source", "src":
			src = value
		case "target", "destination", "dst":
			dst = value
		case "readonly", "ro":
			err = flag("ro")
		case "bind-nonrecursive":
			err = flag("bind")
		case "bind-propagation":
			if !slices.Contains(propagations, value) {
				return bad("propagation %q: want one of %s", value, strings.Join(propagations, ", "))
			}
			opts = append(opts, value)
		case "tmpfs-size":
			var n int64
			n, err = ParseBytes(value)
			tmpfs = append(tmpfs, "size="+strconv.FormatInt(n, 10))
		case "tmpfs-mode":
			if _, err := strconv.ParseUint(value, 8, 12); err != nil {
				return bad("mode %q: want an octal number", value)
			}
			tmpfs = append(tmpfs, "mode="+value)
		case "options":
			opts = append(opts, strings.Split(value, ":")...)
		default:
			return bad("key %q is unknown", key)
		}
		if err != nil {
			return m, err
		}
	}
	if typ == "" && src != "" {
		typ = "bind"
	}
	switch typ {
	case "bind":
		if len(tmpfs) > 0 {
			return bad("tmpfs options on a bind mount")
		}
		m.Type = "bind"
		if m.Source, err = source(src); err != nil {
			return m, err
		}
		if m.Destination, err = target(dst); err != nil {
			return m, err
		}
		m.Options, err = bindOptions(opts)
		return m, err
	case "tmpfs":
		if src != "" && src != "tmpfs" {
			return bad("a tmpfs has no source")
		}
		if dst, err = target(dst); err != nil {
			return m, err
		}
		if strings.Contains(dst, ":") {
			return bad("target %q holds a colon", dst)
		}
		return ParseTmpfs(dst + ":" + strings.Join(append(opts, tmpfs...), ","))
	}
	return bad("type %q: want bind or tmpfs", typ)
}

// ParseBytes reads a number of bytes with an optional unit b, k, m, g, t or p,
// powers of 1024, also written kb or KiB, in any case. It is ErrInvalidArgument
// for anything else and for what does not fit into an int64.
func ParseBytes(s string) (int64, error) {
	t := strings.ToLower(strings.TrimSpace(s))
	num := strings.TrimRight(t, "bikmgtp")
	unit := strings.TrimSuffix(strings.TrimSuffix(t[len(num):], "b"), "i")
	num = strings.TrimSpace(num)
	shift, ok := map[string]uint{"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}[unit]
	if !ok || num == "" || strings.Trim(num, "0123456789.") != "" {
		return 0, fmt.Errorf("size %q: want a number with an optional unit such as 512m: %w", shorten(s), errdefs.ErrInvalidArgument)
	}
	f, err := strconv.ParseFloat(num, 64)
	if err != nil {
		return 0, fmt.Errorf("size %q: want a number with an optional unit such as 512m: %w", shorten(s), errdefs.ErrInvalidArgument)
	}
	n := f * float64(uint64(1)<<shift)
	if n >= 1<<63 {
		return 0, fmt.Errorf("size %q is too large: %w", shorten(s), errdefs.ErrInvalidArgument)
	}
	return int64(n), nil
}

// placeMounts puts the user's mounts over the defaults: one for the same
// target replaces it, the others follow, those of a folder before those in it.
// A default one in a folder of the host's is left out, as it would hide a part:
// with the host's /sys come the host's cgroups.
func placeMounts(defaults, user []specs.Mount) ([]specs.Mount, error) {
	out := slices.DeleteFunc(slices.Clone(defaults), func(d specs.Mount) bool {
		return slices.ContainsFunc(user, func(m specs.Mount) bool {
			return m.Type == "bind" && strings.HasPrefix(path.Clean(d.Destination), path.Clean(m.Destination)+"/")
		})
	})
	seen := map[string]bool{}
	var extra []specs.Mount
	for _, m := range user {
		dst, err := target(m.Destination)
		if err != nil {
			return nil, err
		}
		m.Destination = dst
		if seen[dst] {
			return nil, fmt.Errorf("target %s is mounted twice: %w", dst, errdefs.ErrInvalidArgument)
		}
		seen[dst] = true
		if i := slices.IndexFunc(out, func(d specs.Mount) bool { return d.Destination == dst }); i >= 0 {
			out[i] = m
			continue
		}
		extra = append(extra, m)
	}
	sort.SliceStable(extra, func(i, j int) bool {
		return strings.Count(extra[i].Destination, "/") < strings.Count(extra[j].Destination, "/")
	})
	return append(out, extra...), nil
}
