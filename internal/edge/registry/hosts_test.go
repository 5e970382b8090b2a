package registry

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

var update = flag.Bool("update", false, "write the golden files")

// TestHostsGolden reads the certs.d trees in testdata/hosts: each case is a
// folder, the registry's name is in "registry", and golden.txt is the ordered
// list of hosts and the warnings.
//
// contract: 6.2.1, 6.2.2, 13.31
// promise: P13
func TestHostsGolden(t *testing.T) {
	cases, err := filepath.Glob("testdata/hosts/*")
	if err != nil || len(cases) == 0 {
		t.Fatal("no cases", err)
	}
	for _, dir := range cases {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			name, err := os.ReadFile(filepath.Join(dir, "registry"))
			if err != nil {
				t.Fatal(err)
			}
			root := filepath.Join(dir, "certs.d")
			hosts, warnings, err := LookupHosts(root, strings.TrimSpace(string(name)), "")
			var b strings.Builder
			if err != nil {
				if !errors.Is(err, errdefs.ErrInvalidArgument) {
					t.Errorf("class of %v", err)
				}
				fmt.Fprintf(&b, "error: %v\n", err)
			}
			for _, h := range hosts {
				fmt.Fprintf(&b, "%s can %s", h.URL(), h.Capabilities)
				for what, on := range map[string]bool{" mirror": h.Mirror} {
					if on {
						b.WriteString(what)
					}
				}
				if h.Fallback {
					b.WriteString(" fallback")
				}
				if h.SkipVerify {
					b.WriteString(" skip_verify")
				}
				if h.DialTimeout > 0 {
					fmt.Fprintf(&b, " dial %s", h.DialTimeout)
				}
				if len(h.CA) > 0 {
					fmt.Fprintf(&b, " ca %v", h.CA)
				}
				if len(h.Client) > 0 {
					fmt.Fprintf(&b, " client %q", h.Client)
				}
				for _, k := range slices.Sorted(maps.Keys(h.Header)) {
					fmt.Fprintf(&b, " header %q", k+": "+strings.Join(h.Header[k], ", "))
				}
				fmt.Fprintf(&b, " from %q\n", h.Source)
			}
			for _, w := range warnings {
				fmt.Fprintf(&b, "warning: %s\n", w)
			}
			golden := filepath.Join(dir, "golden.txt")
			if *update {
				if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if b.String() != string(want) {
				t.Errorf("got\n%s\nwant\n%s", b.String(), want)
			}
		})
	}
}

// contract: 6.1.6, 6.2.1
func TestImpliedHosts(t *testing.T) {
	for _, c := range []struct {
		registry, scheme, want string
		fallback, skip         bool
	}{
		{"docker.io", "", "https://registry-1.docker.io/v2", false, false},
		{"ghcr.io", "", "https://ghcr.io/v2", false, false},
		{"ghcr.io", "http", "http://ghcr.io/v2", false, false},
		{"localhost:5000", "", "https://localhost:5000/v2", true, true},
		{"127.0.0.1:80", "", "http://127.0.0.1:80/v2", false, false},
		{"[::1]:5000", "", "https://[::1]:5000/v2", true, true},
		{"127.0.0.1:5000", "https", "https://127.0.0.1:5000/v2", false, false},
		{"10.0.0.1:5000", "", "https://10.0.0.1:5000/v2", false, false},
		{"localhost.example.com", "", "https://localhost.example.com/v2", false, false},
	} {
		hosts, _, err := LookupHosts("", c.registry, c.scheme)
		if err != nil || len(hosts) != 1 {
			t.Errorf("%s: %v, %v", c.registry, hosts, err)
			continue
		}
		h := hosts[0]
		if h.URL() != c.want || h.Fallback != c.fallback || h.SkipVerify != c.skip || h.Mirror {
			t.Errorf("%s: %s fallback %v skip %v mirror %v", c.registry, h.URL(), h.Fallback, h.SkipVerify, h.Mirror)
		}
	}
}

// contract: 6.2.3
func TestDockerCertificateDirectory(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "example.com:5000")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"ca.crt", "client.cert", "client.key", "lone.key", "README"} {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	hosts, warnings, err := LookupHosts(root, "example.com:5000", "")
	if err != nil || len(hosts) != 1 {
		t.Fatal(hosts, err)
	}
	h := hosts[0]
	if len(h.CA) != 1 || len(h.Client) != 1 || h.Client[0][1] != filepath.Join(dir, "client.key") || h.URL() != "https://example.com:5000/v2" {
		t.Errorf("%+v", h)
	}
	if len(warnings) != 2 || !strings.Contains(warnings[0].String()+warnings[1].String(), "lone.key") {
		t.Errorf("warnings %v", warnings)
	}
	if err := os.Remove(filepath.Join(dir, "client.key")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := LookupHosts(root, "example.com:5000", ""); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("a certificate without key: %v", err)
	}
}

// contract: 6.1.1
func TestParseReference(t *testing.T) {
	const d = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for in, want := range map[string]string{
		"busybox":                        "docker.io/library/busybox:latest",
		"docker.io/library/busybox:1":    "docker.io/library/busybox:1",
		"localhost:5000/a/b/c":           "localhost:5000/a/b/c:latest",
		"ghcr.io/x/y:1@" + d:             "ghcr.io/x/y:1@" + d,
		"ghcr.io/x/y@" + d:               "ghcr.io/x/y@" + d,
		"127.0.0.1:5000/x:Tag_with-all.": "127.0.0.1:5000/x:Tag_with-all.",
	} {
		got, err := ParseReference(in)
		if err != nil || got.String() != want {
			t.Errorf("%s: %s, %v, want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"", "a b", "x/Upper/case", "x:", "x@sha256:12", "-", "http://x/y", "x/../y", "x:" + strings.Repeat("t", 200), strings.Repeat("a/", 200) + "x"} {
		if got, err := ParseReference(in); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
}

func FuzzHosts(f *testing.F) {
	files, _ := filepath.Glob("testdata/hosts/*/certs.d/*/hosts.toml")
	for _, name := range files {
		b, _ := os.ReadFile(name)
		f.Add(b)
	}
	f.Add([]byte("[host]\nx=1\n[[host.a]]\n[host.\"https://x\".header.y]\n"))
	f.Add([]byte("host.\"a\".header={b=[1]}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		hosts, _, err := parseHosts("hosts.toml", b)
		if err == nil && len(hosts) == 0 {
			t.Error("neither hosts nor an error")
		}
	})
}

func FuzzChallenges(f *testing.F) {
	f.Add(`Bearer realm="https://auth.example.com/token",service="x",scope="repository:a/b:pull,push",error="insufficient_scope", Basic realm=y`)
	f.Add(`Basic`)
	f.Add(`Bearer realm="\"`)
	f.Fuzz(func(t *testing.T, s string) {
		for _, c := range parseChallenges(s) {
			if c.scheme != strings.ToLower(c.scheme) || c.params == nil {
				t.Errorf("%+v", c)
			}
		}
	})
}

// contract: 6.1.7
func TestParseChallenges(t *testing.T) {
	got := parseChallenges(`Bearer realm="https://a/t?x=\"1\"",service=reg, scope="repository:a/b:pull,push" , Basic realm="r"`)
	if len(got) != 2 || got[0].scheme != "bearer" || got[0].params["realm"] != `https://a/t?x="1"` || got[0].params["service"] != "reg" ||
		got[0].params["scope"] != "repository:a/b:pull,push" || got[1].scheme != "basic" || got[1].params["realm"] != "r" {
		t.Errorf("%+v", got)
	}
}
