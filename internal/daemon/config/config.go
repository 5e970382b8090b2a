// Package config reads containerd's configuration file, versions 1 to 4, and
// promises that nothing in it is silently lost: every key is either used or
// reported with file, line and column. A value keeps its origin through
// migration and imports, so that each effective setting can be traced.
//
// Load reads and merges the files; the daemon's own part is then in the fields
// of Config, and each component gets its block by Decode. Rest reports what no
// component asked for.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// Where things are when nothing says otherwise (contract 2.3.2, 8.2.1).
const (
	DefaultPath    = "/etc/gantry/config.toml"
	DefaultRoot    = "/var/lib/gantry"
	DefaultState   = "/run/gantry"
	DefaultAddress = "/run/gantry/gantry.sock"
)

// maxFile bounds one configuration file, maxFiles what imports may add up to.
const (
	maxFile  = 8 << 20
	maxFiles = 1024
)

// Config is the daemon's part of the merged configuration. It is immutable
// after Load but for its record of what was decoded, and safe for concurrent
// use.
type Config struct {
	// Version is that of the first file as it was written, 4 without a file.
	Version int

	Root            string
	State           string
	Temp            string // "" leaves TMPDIR alone
	DisabledPlugins []string
	RequiredPlugins []string
	OOMScore        int // oom_score_adj of the daemon, 0 leaves it alone
	Debug           Debug
	Cgroup          Cgroup
	// Timeouts by their full names (contract 2.3.10), defaults filled in.
	Timeouts         map[string]time.Duration
	StreamProcessors map[string]StreamProcessor
	ProxyPlugins     map[string]ProxyPlugin
	// Imports are the patterns of the first file as written.
	Imports []string
	// Files are the files that were read, in the order they were merged.
	Files []string

	opt  Options
	read *node // merged, version 4, without defaults

	mu      sync.Mutex
	decoded map[string]bool // plugin blocks somebody asked for; guarded by mu
}

// Debug is the [debug] block.
type Debug struct {
	Level      string `toml:"level"`  // trace to panic, "" is info
	Format     string `toml:"format"` // text or json, "" is text
	LogTraceID bool   `toml:"log_trace_id"`
}

// Cgroup is the [cgroup] block: the group the daemon puts itself into.
type Cgroup struct {
	Path string `toml:"path"`
}

// StreamProcessor is one entry of [stream_processors] (contract 2.3.11).
type StreamProcessor struct {
	Accepts []string `toml:"accepts"`
	Returns string   `toml:"returns"`
	Path    string   `toml:"path"`
	Args    []string `toml:"args"`
	Env     []string `toml:"env"`
}

// ProxyPlugin is one entry of [proxy_plugins] (contract 2.1.6).
type ProxyPlugin struct {
	Type         string            `toml:"type"`
	Address      string            `toml:"address"`
	Platform     string            `toml:"platform"`
	Exports      map[string]string `toml:"exports"`
	Capabilities []string          `toml:"capabilities"`
}

// Options change how Load reads. The zero value is the daemon's default.
type Options struct {
	// Strict makes an error of every unknown or ineffective key, wrong type
	// and impossible value.
	Strict bool
	// Root, State, Address and LogLevel are command line flags; "" is unset.
	Root, State, Address, LogLevel string
	// Optional accepts that the file at path does not exist.
	Optional bool
}

// Default is the configuration without any file. It cannot fail.
func Default() *Config {
	c, _, err := build(nil, nil, Options{}, Current)
	if err != nil {
		panic(err) // compiled-in data: a broken invariant
	}
	return c
}

// Load reads the file at path and what it imports. An empty path means
// DefaultPath, which may be missing; any other missing file is ErrNotFound
// unless opt.Optional is set. A syntax error, an unsupported version and
// impossible directories are ErrInvalidArgument; all other findings are
// warnings, which with opt.Strict are an error. Contract 2.3.1 to 2.3.5.
func Load(path string, opt Options) (*Config, []Warning, error) {
	if path == "" {
		path, opt.Optional = DefaultPath, true
	}
	l := &loader{seen: map[string]bool{}}
	tree, err := l.load(path)
	if err != nil {
		missing := errors.Is(err, fs.ErrNotExist) && len(l.files) == 0
		if missing && !opt.Optional {
			err = fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
		}
		if !missing || !opt.Optional {
			return nil, l.warnings, err
		}
		tree = nil
	}
	c, ws, err := build(tree, l.files, opt, l.version)
	ws = append(l.warnings, ws...)
	if err != nil {
		return nil, ws, err
	}
	c.Imports = l.imports
	if opt.Strict {
		if err := strictError(ws); err != nil {
			return nil, ws, err
		}
	}
	return c, ws, nil
}

type loader struct {
	seen     map[string]bool
	files    []string
	imports  []string
	version  int
	warnings []Warning
}

// load reads the first file and everything it leads to, breadth first, and
// merges in that order: a later file wins over an earlier one.
func (l *loader) load(path string) (*node, error) {
	type file struct {
		path string
		from Pos // the import that led here, zero for the first file
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("load configuration %s: %w", path, err)
	}
	var merged *node
	for queue := []file{{path: abs}}; len(queue) > 0; queue = queue[1:] {
		f := queue[0]
		first := f.from == Pos{}
		if l.seen[identity(f.path)] {
			continue
		}
		if len(l.seen) >= maxFiles {
			return nil, fmt.Errorf("load configuration %s: more than %d files are imported: %w", path, maxFiles, errdefs.ErrInvalidArgument)
		}
		l.seen[identity(f.path)] = true
		tree, v, err := l.file(f.path)
		if err != nil {
			var pe *fs.PathError
			if !first && errors.As(err, &pe) {
				// A drop-in that is gone or unreadable never stops the start.
				l.warnings = append(l.warnings, Warning{Pos: f.from, Key: "imports", Kind: Import,
					Msg: fmt.Sprintf("import %s is left out: %s", f.path, pe.Err)})
				continue
			}
			return nil, err
		}
		l.files = append(l.files, f.path)
		imports := tree.take("imports")
		if first {
			l.version, merged = v, tree
		} else {
			l.warnings = append(l.warnings, merge(merged, tree)...)
		}
		if imports == nil {
			continue
		}
		if imports.list == nil {
			l.warnings = append(l.warnings, wrongType(imports, "a list of strings", []string{"imports"}))
			continue
		}
		for _, e := range imports.list {
			pattern, ok := e.scalar.(string)
			if !ok || pattern == "" {
				l.warnings = append(l.warnings, wrongType(e, "a path", []string{"imports"}))
				continue
			}
			if first {
				l.imports = append(l.imports, pattern)
			}
			for _, p := range l.expand(pattern, f.path, e.pos) {
				queue = append(queue, file{p, e.pos})
			}
		}
	}
	return merged, nil
}

// identity is the same for two names of one file.
func identity(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}

// expand turns an import into files, sorted by name.
func (l *loader) expand(pattern, importer string, pos Pos) []string {
	if !filepath.IsAbs(pattern) {
		pattern = filepath.Join(filepath.Dir(importer), pattern)
	}
	if !strings.ContainsAny(pattern, "*?[") {
		return []string{filepath.Clean(pattern)}
	}
	found, err := filepath.Glob(pattern)
	if err != nil {
		l.warnings = append(l.warnings, Warning{Pos: pos, Key: "imports", Kind: Import,
			Msg: fmt.Sprintf("import %s is left out: %s", pattern, err)})
	}
	slices.Sort(found)
	return found
}

// file reads one file and brings it to the current version.
func (l *loader) file(path string) (*node, int, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, 0, fmt.Errorf("load configuration %s: %w", path, err)
	}
	tree, v, ws, err := migrateFile(path, data)
	l.warnings = append(l.warnings, ws...)
	return tree, v, err
}

// readFile reads a bounded regular file, so that a FIFO or a device named in
// imports cannot hang the start.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var data bytes.Buffer
	if _, err := data.ReadFrom(io.LimitReader(f, maxFile+1)); err != nil {
		return nil, err
	}
	if data.Len() > maxFile {
		return nil, fmt.Errorf("larger than %d bytes: %w", maxFile, errdefs.ErrInvalidArgument)
	}
	return data.Bytes(), nil
}

func migrateFile(path string, data []byte) (*node, int, []Warning, error) {
	tree, err := parseTree(path, data)
	if err != nil {
		return nil, 0, nil, err
	}
	v, err := version(tree, path)
	if err != nil {
		return nil, 0, nil, err
	}
	m := &migration{file: path}
	if v < Current {
		pos := Pos{File: path, Line: 1, Col: 1}
		if n := tree.at("version"); n != nil {
			pos = n.pos
		}
		m.warnings = append(m.warnings, Warning{Pos: pos, Key: "version", Kind: Migrated,
			Msg: fmt.Sprintf("this file has version %d, the current one is %d: run `gantryd config migrate` and keep what it prints", v, Current)})
	}
	m.up(tree, v)
	return tree, v, m.warnings, nil
}

// top is the part of the file that belongs to the daemon.
type top struct {
	Version          int                        `toml:"version"`
	Root             string                     `toml:"root"`
	State            string                     `toml:"state"`
	Temp             string                     `toml:"temp"`
	DisabledPlugins  []string                   `toml:"disabled_plugins"`
	RequiredPlugins  []string                   `toml:"required_plugins"`
	OOMScore         int                        `toml:"oom_score"`
	Debug            Debug                      `toml:"debug"`
	Cgroup           Cgroup                     `toml:"cgroup"`
	Timeouts         map[string]time.Duration   `toml:"timeouts"`
	StreamProcessors map[string]StreamProcessor `toml:"stream_processors"`
	ProxyPlugins     map[string]ProxyPlugin     `toml:"proxy_plugins"`
	Plugins          map[string]any             `toml:"plugins"`
	Imports          []string                   `toml:"imports"`
}

// build makes a Config of a merged tree, which may be nil.
func build(tree *node, files []string, opt Options, version int) (*Config, []Warning, error) {
	if tree == nil {
		tree, version = newTable(Pos{}), Current
		tree.table["version"] = newScalar(int64(Current), Pos{})
	}
	c := &Config{Version: version, Files: files, opt: opt, read: tree, decoded: map[string]bool{}}
	c.flags()
	var ws []Warning

	var t top
	def := defaultTree()
	delete(def.table, "plugins")
	delete(def.table, "imports") // only a generated file lists them
	(&decoder{}).table(def, reflect.ValueOf(&t).Elem(), known(), nil, nil)
	d := &decoder{}
	d.table(tree, reflect.ValueOf(&t).Elem(), known(), def, nil)
	ws = append(ws, d.warnings...)
	c.Root, c.State, c.Temp = t.Root, t.State, t.Temp
	c.DisabledPlugins, c.RequiredPlugins = t.DisabledPlugins, t.RequiredPlugins
	c.OOMScore, c.Debug, c.Cgroup = t.OOMScore, t.Debug, t.Cgroup
	c.Timeouts, c.StreamProcessors, c.ProxyPlugins = t.Timeouts, t.StreamProcessors, t.ProxyPlugins
	more, err := c.validate()
	ws = append(ws, more...)
	return c, ws, err
}

// flags puts the command line over the files (contract 2.3.15).
func (c *Config) flags() {
	if c.opt.Root != "" {
		c.read.table["root"] = newScalar(c.opt.Root, Pos{File: "--root"})
	}
	if c.opt.State != "" {
		c.read.table["state"] = newScalar(c.opt.State, Pos{File: "--state"})
	}
	if c.opt.LogLevel != "" {
		if t := c.read.ensure(Pos{File: "--log-level"}, "debug"); t != nil {
			t.table["level"] = newScalar(c.opt.LogLevel, Pos{File: "--log-level"})
		}
	}
	if c.opt.Address != "" {
		pos := Pos{File: "--address"}
		if t := c.read.ensure(pos, "plugins", serverType+"grpc"); t != nil {
			t.table["address"] = newScalar(c.opt.Address, pos)
		}
		if t := c.read.ensure(pos, "plugins", serverType+"ttrpc"); t != nil {
			if have := t.at("address"); have == nil || have.derived || have.zero() {
				t.table["address"] = newScalar(c.opt.Address+".ttrpc", pos)
			}
		}
	}
}

// validate refuses what the daemon cannot start with, and reports and drops
// what it can do without.
func (c *Config) validate() ([]Warning, error) {
	where := func(key string) Pos {
		if n := c.read.at(key); n != nil {
			return n.pos
		}
		return Pos{}
	}
	for key, dir := range map[string]string{"root": c.Root, "state": c.State} {
		// The default in place of what was meant would be somebody else's data.
		if n := c.read.at(key); n != nil {
			if _, ok := n.scalar.(string); !ok {
				return nil, fmt.Errorf("%s: %s is %s, want a path: %w", n.pos, key, n.kind(), errdefs.ErrInvalidArgument)
			}
		}
		if dir == "" {
			return nil, fmt.Errorf("%s: %s must not be empty: %w", where(key), key, errdefs.ErrInvalidArgument)
		}
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("%s: %s %q must be an absolute path: %w", where(key), key, dir, errdefs.ErrInvalidArgument)
		}
	}
	if filepath.Clean(c.Root) == filepath.Clean(c.State) {
		return nil, fmt.Errorf("%s: root and state must be different directories, both are %s: %w", where("root"), c.Root, errdefs.ErrInvalidArgument)
	}
	for key, list := range map[string][]string{"disabled_plugins": c.DisabledPlugins, "required_plugins": c.RequiredPlugins} {
		for _, uri := range list {
			if !strings.Contains(uri, ".") {
				return nil, fmt.Errorf("%s: %s: %q is no full plugin name such as io.containerd.grpc.v1.cri: %w", where(key), key, uri, errdefs.ErrInvalidArgument)
			}
		}
	}
	var ws []Warning
	bad := func(path []string, value any, want string) {
		pos := Pos{}
		if n := c.read.at(path...); n != nil {
			pos = n.pos
		}
		ws = append(ws, Warning{Pos: pos, Key: keyPath(path), Kind: Invalid,
			Msg: fmt.Sprintf("%s is %#v, want %s; the default is used", keyPath(path), value, want)})
	}
	switch c.Debug.Level {
	case "", "trace", "debug", "info", "warn", "warning", "error", "fatal", "panic":
	default:
		bad([]string{"debug", "level"}, c.Debug.Level, "trace, debug, info, warn, error, fatal or panic")
		c.Debug.Level = ""
	}
	switch c.Debug.Format {
	case "", "text", "json":
	default:
		bad([]string{"debug", "format"}, c.Debug.Format, "text or json")
		c.Debug.Format = ""
	}
	if c.OOMScore < -1000 || c.OOMScore > 1000 {
		bad([]string{"oom_score"}, c.OOMScore, "-1000 to 1000")
		c.OOMScore = 0
	}
	if c.Temp != "" && !filepath.IsAbs(c.Temp) {
		bad([]string{"temp"}, c.Temp, "an absolute path")
		c.Temp = ""
	}
	timeouts := known().at("timeouts")
	if t := c.read.at("timeouts"); t.isTable() {
		for _, k := range t.keys() {
			if timeouts.at(k) == nil {
				ws = append(ws, unknownKey(t.table[k], timeouts, []string{"timeouts", k}))
			}
		}
	}
	return append(ws, c.deprecated()...), nil
}

// deprecated reports the keys that still work and are going to be removed
// (contract 2.4.1, 2.4.2).
func (c *Config) deprecated() []Warning {
	var ws []Warning
	add := func(id, instead string, path ...string) {
		n := c.read.at(append([]string{"plugins"}, path...)...)
		if n.zero() {
			return
		}
		key := keyPath(append([]string{"plugins"}, path...))
		ws = append(ws, Warning{Pos: n.pos, Key: key, Kind: Deprecated, ID: "io.containerd.deprecation/" + id,
			Msg: fmt.Sprintf("%s is deprecated; %s", key, instead)})
	}
	hosts := "set config_path and use hosts.toml files"
	add("cri-registry-mirrors", hosts, criImages, "registry", "mirrors")
	add("cri-registry-auths", hosts, criImages, "registry", "auths")
	add("cri-registry-configs", hosts, criImages, "registry", "configs")
	add("cri-cni-bin-dir", "use bin_dirs", criRuntime, "cni", "bin_dir")
	env := "use the OTEL_ environment variables"
	for _, k := range []string{"endpoint", "protocol", "insecure"} {
		add("tracing-processor-config", env, "io.containerd.tracing.processor.v1.otlp", k)
	}
	for _, k := range []string{"service_name", "sampling_ratio"} {
		add("tracing-service-config", env, "io.containerd.internal.v1.tracing", k)
	}
	if n := c.read.at("plugins", criRuntime, "enable_cdi"); n != nil && n.scalar == false {
		key := keyPath([]string{"plugins", criRuntime, "enable_cdi"})
		ws = append(ws, Warning{Pos: n.pos, Key: key, Kind: Deprecated, ID: "io.containerd.deprecation/enable-cdi",
			Msg: key + " is deprecated; CDI is going to be always on"})
	}
	return ws
}

// Decode fills into, a pointer to a struct that holds the defaults, with the
// block of a plugin. Field names are toml tags; time.Duration is written "5s".
// It reports unknown keys, known ones that into has no field for, and values
// of a wrong type, which leave the default. The error is ErrInvalidArgument:
// in strict mode, and when into is no pointer to a struct.
func (c *Config) Decode(uri string, into any) ([]Warning, error) {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		return nil, fmt.Errorf("decode configuration of %s: %T is no pointer to a struct: %w", uri, into, errdefs.ErrInvalidArgument)
	}
	c.mu.Lock()
	c.decoded[uri] = true
	c.mu.Unlock()
	n := c.read.at("plugins", uri)
	if n == nil {
		return nil, nil
	}
	path := []string{"plugins", uri}
	d := &decoder{}
	if n.table == nil {
		d.wrong(n, "a table", path)
	} else {
		d.table(n, v.Elem(), known().at(path...), schemaTrees().defaults.at(path...), path)
		if x, ok := into.(Reporter); ok {
			x.Ineffective(func(why string, key ...string) {
				if at := n.at(key...); at != nil { // else it is a default's
					full := keyPath(append(path[:len(path):len(path)], key...))
					d.warnings = append(d.warnings, Warning{Pos: at.pos, Key: full, Kind: NoEffect, Msg: full + " has no effect: " + why})
				}
			})
		}
	}
	if c.opt.Strict {
		if err := strictError(d.warnings); err != nil {
			return d.warnings, err
		}
	}
	return d.warnings, nil
}

// Reporter is what a component's block implements of which some values do
// nothing, or less than their names say: it reports the path of each, in the
// block, and why.
type Reporter interface {
	Ineffective(report func(why string, key ...string))
}

// Decoder hands out blocks and passes the warnings on. It is what
// internal/lib/plugin wants.
type Decoder struct {
	cfg  *Config
	warn func(Warning)
}

// Decoder makes a Decoder; warn may be nil.
func (c *Config) Decoder(warn func(Warning)) Decoder {
	if warn == nil {
		warn = func(Warning) {}
	}
	return Decoder{c, warn}
}

// Decode is Config.Decode with the warnings given to warn.
func (d Decoder) Decode(uri string, into any) error {
	ws, err := d.cfg.Decode(uri, into)
	for _, w := range ws {
		d.warn(w)
	}
	return err
}

// Rest reports proxy plugins, which are not there yet, and the plugin blocks that
// no one decoded: unknown plugins, unknown keys, wrong types, and settings that are accepted but not yet effective
// because they differ from the default. Blocks of disabled plugins are only
// checked for unknown keys and types. Call it when all components are open.
// The error is as for Decode.
func (c *Config) Rest() ([]Warning, error) {
	var ws []Warning
	if proxies := c.read.at("proxy_plugins"); proxies.isTable() {
		for _, name := range proxies.keys() {
			key := keyPath([]string{"proxy_plugins", name})
			ws = append(ws, Warning{Pos: proxies.table[name].pos, Key: key, Kind: Ineffective, Msg: key + " is accepted, not yet effective"})
		}
	}
	plugins := c.read.at("plugins")
	if !plugins.isTable() {
		plugins = &node{}
	}
	disabled := map[string]bool{}
	for _, uri := range c.DisabledPlugins {
		disabled[uri] = true
		if uri == criServer { // the one switch of all of CRI
			disabled[criImages], disabled[criRuntime] = true, true
		}
	}
	schemas := known().at("plugins")
	for _, uri := range plugins.keys() {
		c.mu.Lock()
		done := c.decoded[uri]
		c.mu.Unlock()
		if done {
			continue
		}
		n, path := plugins.table[uri], []string{"plugins", uri}
		schema := schemas.table[uri]
		if schema == nil {
			msg := fmt.Sprintf("unknown plugin %s: its block is ignored", uri)
			if near := nearest(uri, schemas.keys()); near != "" {
				msg += fmt.Sprintf(" (did you mean %q?)", near)
			}
			ws = append(ws, Warning{Pos: n.pos, Key: keyPath(path), Kind: Unknown, Msg: msg})
			continue
		}
		ws = append(ws, checkTypes(n, schema, path)...)
		if !disabled[uri] {
			ws = append(ws, ineffective(n, schema, schemaTrees().defaults.at(path...), path)...)
		}
	}
	if c.opt.Strict {
		return ws, strictError(ws)
	}
	return ws, nil
}

// Origin tells where the value at a path comes from; ok is false when neither
// a file nor a flag sets it.
func (c *Config) Origin(path ...string) (pos Pos, ok bool) {
	n := c.read.at(path...)
	if n == nil {
		return Pos{}, false
	}
	return n.pos, true
}

// Address is the path of the gRPC socket, TTRPCAddress of the ttrpc one.
func (c *Config) Address() string { return c.serverAddress("grpc", DefaultAddress) }

// TTRPCAddress is the path of the socket that shims publish events to.
func (c *Config) TTRPCAddress() string { return c.serverAddress("ttrpc", DefaultAddress+".ttrpc") }

func (c *Config) serverAddress(id, def string) string {
	if n := c.read.at("plugins", serverType+id, "address"); n != nil {
		if s, ok := n.scalar.(string); ok {
			return s
		}
	}
	return def
}

// effective is everything: what was read over the defaults.
func (c *Config) effective() *node {
	t := defaultTree()
	delete(t.table, "imports")
	overlay(t, c.read, replacedPerKey)
	if len(c.Imports) > 0 {
		t.table["imports"] = newStrings(Pos{File: c.Files[0]}, c.Imports...)
	}
	return t
}

// Marshal writes the effective configuration as version 4. The output depends
// only on the values, and reading it gives the same configuration. With
// origins, each line ends in a comment that names the file and line.
func (c *Config) Marshal(origins bool) []byte { return marshal(c.effective(), origins) }

// ServerGRPC is the block io.containerd.server.v1.grpc.
type ServerGRPC struct {
	Address        string `toml:"address"`
	UID            int    `toml:"uid"`
	GID            int    `toml:"gid"`
	MaxRecvMsgSize int    `toml:"max_recv_message_size"`
	MaxSendMsgSize int    `toml:"max_send_message_size"`
}

// ServerTCP is the block io.containerd.server.v1.grpc-tcp.
type ServerTCP struct {
	Address        string `toml:"address"` // "" does not listen
	TLSCA          string `toml:"tls_ca"`
	TLSCert        string `toml:"tls_cert"`
	TLSKey         string `toml:"tls_key"`
	TLSCommonName  string `toml:"tls_common_name"`
	MaxRecvMsgSize int    `toml:"max_recv_message_size"`
	MaxSendMsgSize int    `toml:"max_send_message_size"`
}

// ServerSocket is the block of the servers ttrpc and debug.
type ServerSocket struct {
	Address string `toml:"address"`
	UID     int    `toml:"uid"`
	GID     int    `toml:"gid"`
}

// ServerMetrics is the block io.containerd.server.v1.metrics.
type ServerMetrics struct {
	Address string `toml:"address"`
}

// Servers are all listeners with their defaults filled in.
type Servers struct {
	GRPC    ServerGRPC
	TCP     ServerTCP
	TTRPC   ServerSocket
	Debug   ServerSocket
	Metrics ServerMetrics
}

// Servers decodes the server blocks; the results are as for Decode.
func (c *Config) Servers() (Servers, []Warning, error) {
	const msgSize = 16 << 20 // contract 13.42
	s := Servers{
		GRPC:  ServerGRPC{Address: DefaultAddress, MaxRecvMsgSize: msgSize, MaxSendMsgSize: msgSize},
		TCP:   ServerTCP{MaxRecvMsgSize: msgSize, MaxSendMsgSize: msgSize},
		TTRPC: ServerSocket{Address: DefaultAddress + ".ttrpc"},
	}
	var all []Warning
	for _, b := range []struct {
		id   string
		into any
	}{{"grpc", &s.GRPC}, {"grpc-tcp", &s.TCP}, {"ttrpc", &s.TTRPC}, {"debug", &s.Debug}, {"metrics", &s.Metrics}} {
		ws, err := c.Decode(serverType+b.id, b.into)
		all = append(all, ws...)
		if err != nil {
			return s, all, err
		}
	}
	return s, all, nil
}
