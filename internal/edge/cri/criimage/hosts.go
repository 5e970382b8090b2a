package criimage

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/registry"
	"github.com/gantryd/gantry/internal/lib/atomicfile"
)

// hostsTable is what a hosts.toml says of one host (contract 6.2.2).
type hostsTable struct {
	Server       string      `toml:"server,omitempty"`
	Capabilities []string    `toml:"capabilities,omitempty"`
	CA           string      `toml:"ca,omitempty"`
	Client       [][2]string `toml:"client,omitempty"`
	SkipVerify   bool        `toml:"skip_verify,omitempty"`
	OverridePath bool        `toml:"override_path,omitempty"`
}

// writeHosts turns the deprecated tables into a directory of hosts.toml files
// and returns it; without any, it is the one configured. dir is emptied first:
// what is in it is all from here.
func writeHosts(c cristate.RegistryConfig, dir string) (string, error) {
	tls := func(h string) hostsTable {
		t := c.Configs[h].TLS
		if t == nil {
			return hostsTable{}
		}
		f := hostsTable{CA: t.CAFile, SkipVerify: t.InsecureSkipVerify}
		if t.CertFile != "" {
			f.Client = [][2]string{{t.CertFile, t.KeyFile}}
		}
		return f
	}
	names := map[string]bool{}
	for h := range c.Mirrors {
		names[h] = true
	}
	for h, hc := range c.Configs {
		if hc.TLS != nil {
			names[h] = true
		}
	}
	switch {
	case len(names) == 0 && c.ConfigPath == "":
		return registry.ConfigPath, nil
	case len(names) == 0:
		return c.ConfigPath, nil
	case c.ConfigPath != "":
		return "", fmt.Errorf("registry.mirrors and registry.configs.*.tls cannot be set together with registry.config_path: %w", errdefs.ErrInvalidArgument)
	case dir == "":
		return "", fmt.Errorf("registry.mirrors and registry.configs: no directory to write them to: %w", errdefs.ErrInvalidArgument)
	}
	if err := os.RemoveAll(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("registry.mirrors: %w", err)
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		sub := name
		if name == "*" {
			sub = "_default"
		}
		if sub == "." || sub == ".." || strings.ContainsAny(sub, "/\x00") || hostOf(sub) == "" {
			return "", fmt.Errorf("registry.mirrors and registry.configs: %q is not a host: %w", name, errdefs.ErrInvalidArgument)
		}
		endpoints := c.Mirrors[name].Endpoints
		if len(endpoints) == 0 {
			endpoints = c.Mirrors["*"].Endpoints // also for a host that only has a certificate
		}
		text, err := hostsText(endpoints, name, tls)
		if err != nil {
			return "", fmt.Errorf("registry.mirrors.%q: %w", name, err)
		}
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return "", fmt.Errorf("registry.mirrors.%q: %w", name, err)
		}
		if err := atomicfile.Write(filepath.Join(dir, sub, "hosts.toml"), text, 0o600); err != nil {
			return "", fmt.Errorf("registry.mirrors.%q: %w", name, err)
		}
	}
	return dir, nil
}

// hostsText is the hosts.toml of a registry with these mirrors, which are asked
// in their order. The registry itself comes last, by its own endpoint if it is
// among them.
func hostsText(endpoints []string, name string, tls func(host string) hostsTable) ([]byte, error) {
	top, text := tls(name), ""
	for i, e := range endpoints {
		u, err := url.Parse(e)
		if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return nil, fmt.Errorf("endpoint %.256q: want http(s)://host[:port][/path]: %w", redacted(e), errdefs.ErrInvalidArgument)
		}
		path := strings.Trim(u.Path, "/") != ""
		switch {
		case strings.EqualFold(u.Host, name):
			top.Server, top.OverridePath = e, path
		case !slices.Contains(endpoints[:i], e):
			t := tls(u.Host)
			t.Capabilities, t.OverridePath = []string{"pull", "resolve"}, path
			b, err := toml.Marshal(map[string]map[string]hostsTable{"host": {e: t}})
			if err != nil {
				return nil, err
			}
			text += strings.Replace(string(b), "[host]\n", "", 1)
		}
	}
	b, err := toml.Marshal(top)
	return append(b, text...), err
}
