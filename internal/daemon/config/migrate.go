package config

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// Current is the newest version of the file format, the one that is written.
const Current = 4

const (
	criServer   = "io.containerd.grpc.v1.cri"
	criImages   = "io.containerd.cri.v1.images"
	criRuntime  = "io.containerd.cri.v1.runtime"
	shimManager = "io.containerd.shim.v1.manager"
	serverType  = "io.containerd.server.v1."
)

// shortNames are the plugin names of version 1.
var shortNames = map[string]string{
	"content":     "io.containerd.content.v1.content",
	"bolt":        "io.containerd.metadata.v1.bolt",
	"scheduler":   "io.containerd.gc.v1.scheduler",
	"cgroups":     "io.containerd.monitor.v1.cgroups",
	"restart":     "io.containerd.internal.v1.restart",
	"opt":         "io.containerd.internal.v1.opt",
	"tracing":     "io.containerd.internal.v1.tracing",
	"otlp":        "io.containerd.tracing.processor.v1.otlp",
	"task":        "io.containerd.runtime.v2.task",
	"linux":       "io.containerd.runtime.v1.linux",
	"windows":     "io.containerd.runtime.v1.windows",
	"cri":         criServer,
	"walking":     "io.containerd.differ.v1.walking",
	"aufs":        "io.containerd.snapshotter.v1.aufs",
	"blockfile":   "io.containerd.snapshotter.v1.blockfile",
	"btrfs":       "io.containerd.snapshotter.v1.btrfs",
	"devmapper":   "io.containerd.snapshotter.v1.devmapper",
	"native":      "io.containerd.snapshotter.v1.native",
	"overlayfs":   "io.containerd.snapshotter.v1.overlayfs",
	"zfs":         "io.containerd.snapshotter.v1.zfs",
	"containers":  "io.containerd.grpc.v1.containers",
	"diff":        "io.containerd.grpc.v1.diff",
	"events":      "io.containerd.grpc.v1.events",
	"healthcheck": "io.containerd.grpc.v1.healthcheck",
	"images":      "io.containerd.grpc.v1.images",
	"leases":      "io.containerd.grpc.v1.leases",
	"namespaces":  "io.containerd.grpc.v1.namespaces",
	"snapshots":   "io.containerd.grpc.v1.snapshots",
	"tasks":       "io.containerd.grpc.v1.tasks",
	"version":     "io.containerd.grpc.v1.version",

	"introspection":         "io.containerd.grpc.v1.introspection",
	"containers-service":    "io.containerd.service.v1.containers-service",
	"content-service":       "io.containerd.service.v1.content-service",
	"diff-service":          "io.containerd.service.v1.diff-service",
	"images-service":        "io.containerd.service.v1.images-service",
	"introspection-service": "io.containerd.service.v1.introspection-service",
	"namespaces-service":    "io.containerd.service.v1.namespaces-service",
	"snapshots-service":     "io.containerd.service.v1.snapshots-service",
	"tasks-service":         "io.containerd.service.v1.tasks-service",
}

// renamed are plugins that changed their type after version 2.
var renamed = map[string]string{
	"io.containerd.monitor.v1.cgroups":  "io.containerd.monitor.task.v1.cgroups",
	"io.containerd.internal.v1.restart": "io.containerd.monitor.container.v1.restart",
}

// gone are plugins that were removed; a block for one of them is dropped.
var gone = map[string]bool{
	"io.containerd.runtime.v1.linux":    true,
	"io.containerd.runtime.v1.windows":  true,
	"io.containerd.snapshotter.v1.aufs": true,
}

// criServerKeys stay in the CRI server's own block.
var criServerKeys = map[string]bool{
	"disable_tcp_service": true, "stream_server_address": true, "stream_server_port": true,
	"stream_idle_timeout": true, "enable_tls_streaming": true, "x509_key_pair_streaming": true,
}

// criImageKeys went to the image service, with their new path in it.
var criImageKeys = map[string][]string{
	"sandbox_image":                 {"pinned_images", "sandbox"},
	"registry":                      {"registry"},
	"image_decryption":              {"image_decryption"},
	"max_concurrent_downloads":      {"max_concurrent_downloads"},
	"concurrent_layer_fetch_buffer": {"concurrent_layer_fetch_buffer"},
	"image_pull_progress_timeout":   {"image_pull_progress_timeout"},
	"image_pull_with_sync_fs":       {"image_pull_with_sync_fs"},
	"stats_collect_period":          {"stats_collect_period"},
}

// migration carries the findings of one file's way up to the current version.
type migration struct {
	file     string
	warnings []Warning
}

func (m *migration) note(n *node, key string, kind Kind, format string, args ...any) {
	m.warnings = append(m.warnings, Warning{Pos: n.pos, Key: key, Kind: kind, Msg: fmt.Sprintf(format, args...)})
}

// version reads the version of a file; a missing one is 1.
func version(root *node, file string) (int, error) {
	n := root.at("version")
	if n == nil {
		return 1, nil
	}
	v, ok := n.scalar.(int64)
	if !ok {
		return 0, fmt.Errorf("read %s: version is %s, want an integer from 1 to %d: %w", n.pos, n.kind(), Current, errdefs.ErrInvalidArgument)
	}
	switch {
	case v < 0 || v > Current:
		return 0, fmt.Errorf("read %s: version %d is not supported, the newest is %d: %w", n.pos, v, Current, errdefs.ErrInvalidArgument)
	case v == 0:
		v = 1
	}
	return int(v), nil
}

// up brings a file of version v to the current one, in place.
func (m *migration) up(root *node, v int) {
	plugins := root.at("plugins")
	if plugins != nil && plugins.table == nil {
		plugins = nil // reported as a wrong type later
	}
	if plugins == nil && v < Current {
		if root.at("plugins") == nil {
			root.table["plugins"] = newTable(Pos{File: m.file, Line: 1, Col: 1})
			plugins = root.table["plugins"]
		}
	}
	if v < 2 {
		m.to2(root, plugins)
	}
	if v < 3 {
		m.to3(root, plugins)
	}
	if v < 4 {
		m.to4(root, plugins)
	}
	if plugins != nil && len(plugins.table) == 0 {
		delete(root.table, "plugins")
	}
	pos := Pos{File: m.file, Line: 1, Col: 1}
	if n := root.at("version"); n != nil {
		pos = n.pos
	}
	root.table["version"] = newScalar(int64(Current), pos)
}

// to2 gives plugins their full names.
func (m *migration) to2(root, plugins *node) {
	if plugins != nil {
		for _, short := range plugins.keys() {
			if full, ok := shortNames[short]; ok {
				m.put(plugins, plugins.take(short), full)
			}
		}
	}
	for _, list := range []string{"disabled_plugins", "required_plugins"} {
		if n := root.at(list); n != nil {
			for _, e := range n.list {
				if s, ok := e.scalar.(string); ok && shortNames[s] != "" {
					e.scalar = shortNames[s]
				}
			}
		}
	}
}

// to3 moves plugins whose type or shape changed.
func (m *migration) to3(root, plugins *node) {
	if plugins != nil {
		for _, name := range plugins.keys() {
			switch {
			case gone[name]:
				m.note(plugins.table[name], keyPath([]string{"plugins", name}), Unknown,
					"plugin %s has been removed; its block is ignored", name)
				delete(plugins.table, name)
			case renamed[name] != "":
				m.put(plugins, plugins.take(name), renamed[name])
			}
		}
		m.cri(plugins)
		task := plugins.at("io.containerd.runtime.v2.task")
		if sc := task.take("sched_core"); sc != nil {
			if on, ok := sc.scalar.(bool); ok {
				if on {
					if mgr := plugins.ensure(sc.pos, shimManager); mgr != nil {
						env := mgr.at("env")
						if env == nil {
							env = newStrings(sc.pos)
							mgr.table["env"] = env
						}
						if env.list != nil {
							env.list = append(env.list, newScalar("SCHED_CORE=1", sc.pos))
						}
					}
				}
			} else {
				task.table["sched_core"] = sc // stays, to be reported
			}
		}
	}
	for _, list := range []string{"disabled_plugins", "required_plugins"} {
		if n := root.at(list); n != nil {
			for _, e := range n.list {
				if s, ok := e.scalar.(string); ok && renamed[s] != "" {
					e.scalar = renamed[s]
				}
			}
		}
	}
}

// cri splits the one block of version 2 into server, images and runtime.
func (m *migration) cri(plugins *node) {
	old := plugins.at(criServer)
	if !old.isTable() {
		return
	}
	for _, key := range old.keys() {
		if criServerKeys[key] {
			continue
		}
		if to, ok := criImageKeys[key]; ok {
			m.put(plugins, old.take(key), append([]string{criImages}, to...)...)
			continue
		}
		if key == "containerd" && old.table[key].isTable() {
			m.criContainerd(plugins, old.table[key])
			if len(old.table[key].table) == 0 {
				delete(old.table, key)
				continue
			}
		}
		if key == "cni" && old.table[key].isTable() {
			cni := old.table[key]
			if dir := cni.take("bin_dir"); dir != nil {
				if cni.at("bin_dirs") == nil && dir.list == nil && dir.table == nil && !dir.zero() {
					cni.table["bin_dirs"] = &node{pos: dir.pos, list: []*node{dir}}
				} else if !dir.zero() {
					cni.table["bin_dir"] = dir
				}
			}
		}
		m.put(plugins, old.take(key), criRuntime, key)
	}
	if len(old.table) == 0 {
		delete(plugins.table, criServer)
	}
}

// criContainerd moves what concerns images out of the [containerd] part and
// renames keys of runtimes.
func (m *migration) criContainerd(plugins, ctd *node) {
	for _, key := range []string{"snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers"} {
		if v := ctd.take(key); v != nil {
			m.put(plugins, v, criImages, key)
		}
	}
	runtimes := ctd.at("runtimes")
	if !runtimes.isTable() {
		return
	}
	for _, handler := range runtimes.keys() {
		rt := runtimes.table[handler]
		if mode := rt.take("sandbox_mode"); mode != nil && rt.at("sandboxer") == nil {
			rt.table["sandboxer"] = mode
		}
		if sn := rt.at("snapshotter"); sn != nil && !sn.zero() {
			// Images of this handler are unpacked for it, so the image
			// service has to know as well.
			m.put(plugins, sn.clone(), criImages, "runtime_platforms", handler, "snapshotter")
		}
	}
}

// to4 turns the listeners into server plugins.
func (m *migration) to4(root, plugins *node) {
	if plugins == nil {
		return
	}
	grpc, ttrpc, metrics := root.take("grpc"), root.take("ttrpc"), root.take("metrics")
	for name, n := range map[string]*node{"grpc": grpc, "ttrpc": ttrpc, "metrics": metrics} {
		if n != nil && n.table == nil {
			root.table[name] = n // reported as an unknown key
		}
	}
	tcp := map[string]string{
		"tcp_address": "address", "tcp_tls_ca": "tls_ca", "tcp_tls_cert": "tls_cert",
		"tcp_tls_key": "tls_key", "tcp_tls_common_name": "tls_common_name",
	}
	if grpc.isTable() {
		hasTCP := grpc.at("tcp_address") != nil && !grpc.at("tcp_address").zero()
		for _, key := range grpc.keys() {
			v := grpc.table[key]
			if to := tcp[key]; to != "" {
				m.put(plugins, v, serverType+"grpc-tcp", to)
				continue
			}
			if hasTCP && (key == "max_recv_message_size" || key == "max_send_message_size") {
				m.put(plugins, v.clone(), serverType+"grpc-tcp", key)
			}
			m.put(plugins, v, serverType+"grpc", key)
		}
	}
	if ttrpc.isTable() {
		for _, key := range ttrpc.keys() {
			m.put(plugins, ttrpc.table[key], serverType+"ttrpc", key)
		}
	}
	// The ttrpc socket stands beside the gRPC one unless it is named.
	if addr := grpc.at("address"); addr != nil && ttrpc.at("address").zero() {
		if s, ok := addr.scalar.(string); ok && s != "" {
			t := plugins.ensure(addr.pos, serverType+"ttrpc")
			if t != nil {
				t.table["address"] = &node{pos: addr.pos, scalar: s + ".ttrpc", derived: true}
				for _, id := range []string{"uid", "gid"} {
					if v := grpc.at(id); v != nil && t.at(id).zero() {
						c := v.clone()
						c.derived = true
						t.table[id] = c
					}
				}
			}
		}
	}
	if metrics.isTable() {
		for _, key := range metrics.keys() {
			if key == "grpc_histogram" {
				m.put(plugins, metrics.table[key], "io.containerd.metrics.v1.grpc-prometheus", key)
				continue
			}
			m.put(plugins, metrics.table[key], serverType+"metrics", key)
		}
	}
	if debug := root.at("debug"); debug.isTable() {
		for _, key := range []string{"address", "uid", "gid"} {
			if v := debug.take(key); v != nil {
				m.put(plugins, v, serverType+"debug", key)
			}
		}
		if len(debug.table) == 0 {
			delete(root.table, "debug")
		}
	}
}

// put stores v at path below plugins. What stands there already was written by
// the user under its new name and wins, key by key.
func (m *migration) put(plugins, v *node, path ...string) {
	last := len(path) - 1
	parent := plugins.ensure(v.pos, path[:last]...)
	full := keyPath(append([]string{"plugins"}, path...))
	if parent == nil {
		m.note(v, full, Ineffective, "%s cannot be moved to its new place %s: something that is no table is there", strings.TrimSpace(v.kind()), full)
		return
	}
	have := parent.table[path[last]]
	switch {
	case have == nil:
		parent.table[path[last]] = v
	case have.table != nil && v.table != nil:
		for _, k := range v.keys() {
			m.put(plugins, v.table[k], append(path[:len(path):len(path)], k)...)
		}
	case !have.equal(v):
		m.note(v, full, Ineffective, "the value here has no effect: %s is also set under its new name at %s", full, have.pos)
	}
}
