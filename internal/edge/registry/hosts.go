package registry

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Capability is a set of things that a host is trusted with.
type Capability uint8

// The capabilities (contract 6.2.2).
const (
	CanPull Capability = 1 << iota
	CanResolve
	CanPush
	CanReferrers
	canAll = CanPull | CanResolve | CanPush | CanReferrers
)

func (c Capability) String() string {
	var s []string
	for i, name := range []string{"pull", "resolve", "push", "referrers"} {
		if c&(1<<i) != 0 {
			s = append(s, name)
		}
	}
	return strings.Join(s, ",")
}

// Host is one place where a registry's repositories are looked for: a mirror
// or the registry itself.
type Host struct {
	Scheme       string // "https" or "http"
	Address      string // host or host:port
	Path         string // before "/<repository>", normally "/v2"
	Capabilities Capability
	// Header is added to every request to this host.
	Header http.Header
	// Mirror says that the host is not the registry that the reference names:
	// requests carry ?ns=<registry>.
	Mirror bool
	// Fallback to plain http if the host does not speak TLS. Only loopback has it.
	Fallback bool
	// SkipVerify accepts any certificate.
	SkipVerify bool
	// CA, Client are files in PEM form; a Client pair's key may be "" if the
	// certificate's file holds both.
	CA     []string
	Client [][2]string
	// DialTimeout is the time for a connection, 0 for the client's own.
	DialTimeout time.Duration
	// Source is the file and line that the host comes from, "" if implied.
	Source string
}

// URL is the host's base: "https://registry-1.docker.io/v2".
func (h *Host) URL() string { return h.Scheme + "://" + h.Address + h.Path }

// Warning is something in a configuration file that has no effect.
type Warning struct {
	File    string
	Line    int // 0 if the whole file is meant
	Message string
}

func (w Warning) String() string {
	if w.Line == 0 {
		return w.File + ": " + w.Message
	}
	return fmt.Sprintf("%s:%d: %s", w.File, w.Line, w.Message)
}

// maxHostsFile is the most bytes a hosts.toml or certificate file may have.
const maxHostsFile = 1 << 20

// ConfigPath is where hosts.toml directories are looked for when nothing is
// configured (contract 6.2.1).
const ConfigPath = "/etc/containerd/certs.d:/etc/docker/certs.d"

// LookupHosts returns the hosts to try for a registry, in order. configPath
// is a colon-separated list of directories, each with one directory a
// registry; the first that exists is the only one used. Files are read anew
// each time, so edits need no restart. Bad syntax and bad values are
// ErrInvalidArgument with file and line; unknown keys are warnings.
func LookupHosts(configPath, registry, defaultScheme string) ([]Host, []Warning, error) {
	var hosts []Host
	var warnings []Warning
	dir, err := hostDir(configPath, registry)
	if err != nil {
		return nil, nil, err
	}
	if dir != "" {
		file := filepath.Join(dir, "hosts.toml")
		b, err := readLimited(file)
		switch {
		case err == nil:
			hosts, warnings, err = parseHosts(file, b)
		case errors.Is(err, fs.ErrNotExist):
			hosts, warnings, err = dockerCerts(dir)
		}
		if err != nil {
			return nil, warnings, err
		}
	}
	if len(hosts) == 0 {
		hosts = []Host{{Capabilities: canAll}}
	}
	if last := &hosts[len(hosts)-1]; last.Address == "" {
		implied(last, registry, defaultScheme)
	}
	for i := range hosts {
		hosts[i].Mirror = hosts[i].Address != registry && !(registry == "docker.io" && hosts[i].Address == "registry-1.docker.io")
	}
	return hosts, warnings, nil
}

// implied fills in the registry itself, where the file says nothing of it.
func implied(h *Host, registry, defaultScheme string) {
	h.Scheme, h.Address, h.Path = defaultScheme, registry, "/v2"
	if registry == "docker.io" {
		h.Scheme, h.Address = "https", "registry-1.docker.io"
	}
	if h.Scheme != "" {
		return
	}
	h.Scheme = "https"
	if !isLoopback(registry) {
		return
	}
	// Registries for development run on loopback, with any scheme and
	// certificate; what reaches them does not leave the machine.
	if _, port, _ := net.SplitHostPort(registry); port == "80" {
		h.Scheme = "http"
	} else {
		h.Fallback, h.SkipVerify = true, true
	}
}

func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = strings.Trim(address, "[]")
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// hostDir finds a registry's directory, or "".
func hostDir(configPath, registry string) (string, error) {
	names := []string{registry, "_default"}
	if i := strings.LastIndexByte(registry, ':'); i > 0 && !strings.HasSuffix(registry, "]") {
		names = append([]string{registry[:i] + "_" + registry[i+1:] + "_"}, names...)
	}
	for _, root := range filepath.SplitList(configPath) {
		if root == "" {
			continue
		}
		for _, name := range names {
			dir := filepath.Join(root, name)
			st, err := os.Stat(dir)
			if err == nil && st.IsDir() {
				return dir, nil
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !strings.Contains(err.Error(), "not a directory") {
				return "", fmt.Errorf("registry configuration for %s: %w", registry, err)
			}
		}
	}
	return "", nil
}

func readLimited(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b strings.Builder
	n, err := io.Copy(&b, io.LimitReader(f, maxHostsFile+1))
	if err != nil {
		return nil, err
	}
	if n > maxHostsFile {
		return nil, fmt.Errorf("%s is larger than %d bytes: %w", name, maxHostsFile, errdefs.ErrInvalidArgument)
	}
	return []byte(b.String()), nil
}

// dockerCerts reads the form that has no hosts.toml (contract 6.2.3).
func dockerCerts(dir string) ([]Host, []Warning, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("registry certificates: %w", err)
	}
	h := Host{Capabilities: canAll, Source: dir}
	var warnings []Warning
	for _, e := range entries {
		full := filepath.Join(dir, e.Name())
		switch filepath.Ext(e.Name()) {
		case ".crt":
			h.CA = append(h.CA, full)
		case ".cert":
			key := strings.TrimSuffix(full, ".cert") + ".key"
			if _, err := os.Stat(key); err != nil {
				return nil, nil, fmt.Errorf("client certificate %s: no key %s: %w", full, key, errdefs.ErrInvalidArgument)
			}
			h.Client = append(h.Client, [2]string{full, key})
		case ".key":
			if _, err := os.Stat(strings.TrimSuffix(full, ".key") + ".cert"); err != nil {
				warnings = append(warnings, Warning{File: full, Message: "key without a .cert file beside it, not used"})
			}
		default:
			warnings = append(warnings, Warning{File: full, Message: "neither hosts.toml nor a .crt, .cert or .key file, not used"})
		}
	}
	return []Host{h}, warnings, nil
}

// hostsFile collects what a hosts.toml says.
type hostsFile struct {
	name     string
	server   string
	line     int
	top      Host
	order    []string
	hosts    map[string]*Host
	override map[*Host]bool
	warnings []Warning
}

func parseHosts(name string, b []byte) ([]Host, []Warning, error) {
	// The decoder checks what the parser below does not: duplicate keys.
	var all map[string]any
	if err := toml.Unmarshal(b, &all); err != nil {
		line := 0
		var de *toml.DecodeError
		if errors.As(err, &de) {
			line, _ = de.Position()
		}
		return nil, nil, fmt.Errorf("%s:%d: %v: %w", name, line, err, errdefs.ErrInvalidArgument)
	}
	f := &hostsFile{name: name, hosts: map[string]*Host{}, override: map[*Host]bool{}}
	f.top.Capabilities, f.top.Source = canAll, name
	var p unstable.Parser
	p.Reset(b)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = nil
			line := 0
			for it := e.Key(); it.Next(); {
				table = append(table, string(it.Node().Data))
				if line == 0 {
					line = p.Shape(it.Node().Raw).Start.Line
				}
			}
			if e.Kind == unstable.ArrayTable || !f.known(table, line) {
				f.warn(line, "unknown table %s, not used", strings.Join(table, "."))
			}
		case unstable.KeyValue:
			if err := f.keyValue(&p, table, e, 0); err != nil {
				return nil, f.warnings, err
			}
		}
	}
	if err := p.Error(); err != nil {
		return nil, nil, fmt.Errorf("%s: %v: %w", name, err, errdefs.ErrInvalidArgument)
	}
	var hosts []Host
	for _, u := range f.order {
		h := f.hosts[u]
		if err := setURL(h, u, f.override[h]); err != nil {
			return nil, f.warnings, fmt.Errorf("%s: host %q: %w", h.Source, u, err)
		}
		hosts = append(hosts, *h)
	}
	if f.server != "" {
		if err := setURL(&f.top, f.server, f.override[&f.top]); err != nil {
			return nil, f.warnings, fmt.Errorf("%s:%d: server %q: %w", name, f.line, f.server, err)
		}
		f.top.Source = fmt.Sprintf("%s:%d", name, f.line)
	} else if f.override[&f.top] {
		f.warn(0, "override_path without server has no effect")
	}
	return append(hosts, f.top), f.warnings, nil
}

func (f *hostsFile) warn(line int, format string, args ...any) {
	f.warnings = append(f.warnings, Warning{File: f.name, Line: line, Message: fmt.Sprintf(format, args...)})
}

// known reports whether a table may be in the file, and notes a host's place.
func (f *hostsFile) known(t []string, line int) bool {
	switch {
	case len(t) == 1:
		return t[0] == "host" || t[0] == "header"
	case len(t) == 2 && t[0] == "host":
		f.host(t[1], line)
		return true
	case len(t) == 3 && t[0] == "host":
		f.host(t[1], line)
		return t[2] == "header"
	}
	return false
}

func (f *hostsFile) host(u string, line int) *Host {
	h := f.hosts[u]
	if h == nil {
		h = &Host{Capabilities: canAll, Source: fmt.Sprintf("%s:%d", f.name, line)}
		f.hosts[u] = h
		f.order = append(f.order, u)
	}
	return h
}

func (f *hostsFile) keyValue(p *unstable.Parser, table []string, e *unstable.Node, line int) error {
	full := append([]string(nil), table...)
	for it := e.Key(); it.Next(); {
		full = append(full, string(it.Node().Data))
		if l := p.Shape(it.Node().Raw).Start.Line; l > 0 {
			line = l
		}
	}
	v := e.Value()
	if v.Kind == unstable.InlineTable {
		if !f.known(full, line) {
			f.warn(line, "unknown table %s, not used", strings.Join(full, "."))
			return nil
		}
		for it := v.Children(); it.Next(); {
			if err := f.keyValue(p, full, it.Node(), line); err != nil {
				return err
			}
		}
		return nil
	}
	h, key := &f.top, full
	if len(full) > 2 && full[0] == "host" {
		h, key = f.host(full[1], line), full[2:]
	}
	bad := func(want string) error {
		return fmt.Errorf("%s:%d: %s must be %s: %w", f.name, line, strings.Join(key, "."), want, errdefs.ErrInvalidArgument)
	}
	if len(key) == 2 && key[0] == "header" {
		values, ok := stringList(v)
		if !ok {
			return bad("a string or a list of strings")
		}
		if h.Header == nil {
			h.Header = http.Header{}
		}
		for _, s := range values {
			h.Header.Add(key[1], s)
		}
		return nil
	}
	if len(key) != 1 {
		f.warn(line, "unknown key %s, not used", strings.Join(full, "."))
		return nil
	}
	switch key[0] {
	case "server":
		if h != &f.top {
			f.warn(line, "server belongs at the top of the file, not in a host: not used")
			return nil
		}
		if v.Kind != unstable.String {
			return bad("a string")
		}
		f.server, f.line = string(v.Data), line
	case "capabilities":
		values, ok := stringList(v)
		if !ok {
			return bad("a list of strings")
		}
		h.Capabilities = 0
		for _, s := range values {
			switch strings.ToLower(s) {
			case "pull":
				h.Capabilities |= CanPull
			case "resolve":
				h.Capabilities |= CanResolve
			case "push":
				h.Capabilities |= CanPush
			case "referrers":
				h.Capabilities |= CanReferrers
			default:
				return fmt.Errorf("%s:%d: unknown capability %q: %w", f.name, line, s, errdefs.ErrInvalidArgument)
			}
		}
	case "ca":
		values, ok := stringList(v)
		if !ok {
			return bad("a string or a list of strings")
		}
		for _, s := range values {
			h.CA = append(h.CA, f.path(s))
		}
	case "client":
		pairs, ok := clientPairs(v)
		if !ok {
			return bad(`a string, a list of strings or a list of ["cert", "key"] pairs`)
		}
		for _, c := range pairs {
			c[0] = f.path(c[0])
			if c[1] != "" {
				c[1] = f.path(c[1])
			}
			h.Client = append(h.Client, c)
		}
	case "skip_verify":
		if v.Kind != unstable.Bool {
			return bad("true or false")
		}
		h.SkipVerify = string(v.Data) == "true"
	case "override_path":
		if v.Kind != unstable.Bool {
			return bad("true or false")
		}
		f.override[h] = string(v.Data) == "true"
	case "dial_timeout":
		d, err := time.ParseDuration(string(v.Data))
		if v.Kind != unstable.String || err != nil || d <= 0 {
			return bad(`a positive duration such as "10s"`)
		}
		h.DialTimeout = d
	default:
		f.warn(line, "unknown key %s, not used", strings.Join(full, "."))
	}
	return nil
}

func (f *hostsFile) path(s string) string {
	if filepath.IsAbs(s) {
		return s
	}
	return filepath.Join(filepath.Dir(f.name), s)
}

func stringList(v *unstable.Node) ([]string, bool) {
	switch v.Kind {
	case unstable.String:
		return []string{string(v.Data)}, true
	case unstable.Array:
		var s []string
		for it := v.Children(); it.Next(); {
			if it.Node().Kind == unstable.Comment {
				continue
			}
			if it.Node().Kind != unstable.String {
				return nil, false
			}
			s = append(s, string(it.Node().Data))
		}
		return s, true
	}
	return nil, false
}

func clientPairs(v *unstable.Node) ([][2]string, bool) {
	if v.Kind == unstable.String {
		return [][2]string{{string(v.Data)}}, true
	}
	if v.Kind != unstable.Array {
		return nil, false
	}
	var pairs [][2]string
	for it := v.Children(); it.Next(); {
		if it.Node().Kind == unstable.Comment {
			continue
		}
		s, ok := stringList(it.Node())
		if !ok || len(s) == 0 || len(s) > 2 {
			return nil, false
		}
		var pair [2]string
		copy(pair[:], s)
		pairs = append(pairs, pair)
	}
	return pairs, true
}

// setURL reads a host as it is written in a file: a URL, or host[:port] for https.
func setURL(h *Host, s string, override bool) error {
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || (u.Scheme != "https" && u.Scheme != "http") || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return fmt.Errorf("want http(s)://host[:port][/path]: %w", errdefs.ErrInvalidArgument)
	}
	h.Scheme, h.Address = u.Scheme, u.Host
	if u.Path != "" && u.Path != "/" {
		h.Path = path.Clean(u.Path)
	}
	if !override && !strings.HasSuffix(h.Path, "/v2") {
		h.Path += "/v2"
	}
	return nil
}

// tlsConfig reads the host's certificates. Client certificates are for the
// host alone: redirects to other hosts go without (own is false).
func (h *Host) tlsConfig(own bool) (*tls.Config, string, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: h.SkipVerify}
	key := sha256.New()
	fmt.Fprintf(key, "%v %v %v", h.SkipVerify, h.DialTimeout, own)
	if len(h.CA) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		for _, name := range h.CA {
			b, err := readLimited(name)
			if err != nil {
				return nil, "", fmt.Errorf("certificate authority of %s: %w", h.Address, err)
			}
			if !pool.AppendCertsFromPEM(b) {
				return nil, "", fmt.Errorf("certificate authority of %s: %s holds no PEM certificate: %w", h.Address, name, errdefs.ErrInvalidArgument)
			}
			key.Write(b)
		}
		c.RootCAs = pool
	}
	if own {
		for _, pair := range h.Client {
			cert, err := readLimited(pair[0])
			if err != nil {
				return nil, "", fmt.Errorf("client certificate for %s: %w", h.Address, err)
			}
			priv := cert
			if pair[1] != "" {
				if priv, err = readLimited(pair[1]); err != nil {
					return nil, "", fmt.Errorf("client key for %s: %w", h.Address, err)
				}
			}
			k, err := tls.X509KeyPair(cert, priv)
			if err != nil {
				return nil, "", fmt.Errorf("client certificate %s for %s: %v: %w", pair[0], h.Address, err, errdefs.ErrInvalidArgument)
			}
			c.Certificates = append(c.Certificates, k)
			key.Write(cert)
			key.Write(priv)
		}
		if len(h.Client) > 0 {
			fmt.Fprintf(key, " %s", h.Address)
		}
	}
	return c, hex.EncodeToString(key.Sum(nil)), nil
}
