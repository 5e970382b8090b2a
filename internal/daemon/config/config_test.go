package config

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got):\n%s", name, d)
	}
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t *testing.T, text string, opt Options) (*Config, []Warning) {
	t.Helper()
	c, ws, err := Load(write(t, filepath.Join(t.TempDir(), "config.toml"), text), opt)
	if err != nil {
		t.Fatal(err)
	}
	return c, ws
}

func has(ws []Warning, kind Kind, part string) bool {
	for _, w := range ws {
		if w.Kind == kind && strings.Contains(w.String(), part) {
			return true
		}
	}
	return false
}

// Files as they are found in the field are migrated to the golden text, and
// that text reads back as the same configuration.
//
// contract: 2.3.1, 2.3.7, 2.3.13, 2.3.14, 13.12
func TestMigrateGolden(t *testing.T) {
	for _, name := range []string{"dockerd", "kubeadm", "kind", "k3s", "v1"} {
		t.Run(name, func(t *testing.T) {
			src := filepath.Join("testdata", name+".toml")
			var out bytes.Buffer
			ws, err := WriteMigrated(&out, src)
			if err != nil {
				t.Fatal(err)
			}
			if len(ws) == 0 || ws[0].Kind != Migrated || !strings.Contains(ws[0].Msg, "config migrate") {
				t.Errorf("warnings %v, want first the advice to migrate", ws)
			}
			golden(t, name+".migrated", out.Bytes())

			c1, _, err := Load(src, Options{})
			if err != nil {
				t.Fatal(err)
			}
			c2, ws, err := Load(write(t, filepath.Join(t.TempDir(), "c.toml"), out.String()), Options{})
			if err != nil {
				t.Fatal(err)
			}
			if has(ws, Migrated, "") {
				t.Errorf("the migrated file wants to be migrated: %v", ws)
			}
			if d := cmp.Diff(string(c1.Marshal(false)), string(c2.Marshal(false))); d != "" {
				t.Errorf("the migrated file means something else:\n%s", d)
			}
		})
	}
}

// Every finding names file, line and column; none stops the load.
//
// contract: 2.3.5
// promise: P37
func TestCheckGolden(t *testing.T) {
	for _, name := range []string{"bad", "kubeadm", "v1", "dockerd"} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			n, err := Check(&out, filepath.Join("testdata", name+".toml"), CheckOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if lines := strings.Count(out.String(), "\n"); n != lines {
				t.Errorf("%d findings, %d lines", n, lines)
			}
			wd, _ := os.Getwd()
			text := strings.ReplaceAll(out.String(), wd+"/", "")
			for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
				if !strings.HasPrefix(line, "testdata/"+name+".toml:") {
					t.Errorf("no position in %q", line)
				}
			}
			golden(t, name+".check", []byte(text))

			_, err = Check(&out, filepath.Join("testdata", name+".toml"), CheckOptions{Options: Options{Strict: true}})
			strict := name != "dockerd" // nothing in dockerd's file is wrong
			if (err != nil) != strict || err != nil && !errdefs.IsInvalidArgument(err) {
				t.Errorf("strict check: %v", err)
			}
		})
	}
}

// contract: 2.3.1, 2.3.5
func TestRefused(t *testing.T) {
	for _, tc := range []struct{ name, text, part string }{
		{"version", "version = 5\n", ":1:1: version 5 is not supported, the newest is 4"},
		{"version type", "version = '2'\n", ":1:1: version is a string"},
		{"syntax", "version = 2\n[grpc\n", ":2:"},
		{"duplicate", "version = 2\nroot = '/a'\nroot = '/b'\n", ":3:1"},
		{"empty root", "version = 2\nroot = ''\n", ":2:1: root must not be empty"},
		{"same", "version = 2\nroot = '/a/'\nstate = '/a'\n", "root and state must be different"},
		{"relative", "version = 2\nstate = 'run'\n", "absolute"},
		{"short plugin", "version = 2\ndisabled_plugins = ['cri']\n", ":2:1: disabled_plugins: \"cri\""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, err := Load(write(t, filepath.Join(t.TempDir(), "c.toml"), tc.text), Options{})
			if err == nil || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.part) || !strings.Contains(err.Error(), "c.toml") {
				t.Errorf("error %v, want an invalid argument naming the file and %q", err, tc.part)
			}
		})
	}
}

// contract: 2.3.2
func TestDefaults(t *testing.T) {
	c := Default()
	if c.Root != "/var/lib/gantry" || c.State != "/run/gantry" || c.Address() != "/run/gantry/gantry.sock" || c.TTRPCAddress() != "/run/gantry/gantry.sock.ttrpc" {
		t.Errorf("defaults %q %q %q %q", c.Root, c.State, c.Address(), c.TTRPCAddress())
	}
	missing := filepath.Join(t.TempDir(), "none.toml")
	if _, _, err := Load(missing, Options{}); !errdefs.IsNotFound(err) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an explicit missing file: %v, want not found", err)
	}
	if _, err := WriteMigrated(&bytes.Buffer{}, missing); !errdefs.IsNotFound(err) {
		t.Errorf("migrate a missing file: %v, want not found", err)
	}
	o, ws, err := Load(missing, Options{Optional: true})
	if err != nil || len(ws) != 0 {
		t.Fatalf("an optional missing file: %v %v", ws, err)
	}
	if d := cmp.Diff(string(c.Marshal(false)), string(o.Marshal(false))); d != "" {
		t.Error(d)
	}
}

// contract: 2.3.10, 2.3.11, 2.3.12
func TestDefaultText(t *testing.T) {
	var out bytes.Buffer
	if err := WriteDefault(&out); err != nil {
		t.Fatal(err)
	}
	golden(t, "default.golden", out.Bytes())
	text := out.String()
	for _, want := range []string{"imports = ['/etc/gantry/conf.d/*.toml']", "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in the default configuration", want)
		}
	}
	n, err := Check(&out, write(t, filepath.Join(t.TempDir(), "c.toml"), text), CheckOptions{Options: Options{Strict: true}})
	if err != nil || n != 0 {
		t.Errorf("the default configuration has %d findings: %v\n%s", n, err, out.String())
	}
	c := Default()
	want := map[string]time.Duration{
		"io.containerd.timeout.bolt.open": 0, "io.containerd.timeout.cri.defercleanup": time.Minute,
		"io.containerd.timeout.metrics.shimstats": 2 * time.Second, "io.containerd.timeout.shim.cleanup": 5 * time.Second,
		"io.containerd.timeout.shim.load": 5 * time.Second, "io.containerd.timeout.shim.shutdown": 3 * time.Second,
		"io.containerd.timeout.task.state": 2 * time.Second,
	}
	if d := cmp.Diff(want, c.Timeouts); d != "" {
		t.Error(d)
	}
	p := c.StreamProcessors["io.containerd.ocicrypt.decoder.v1.tar.gzip"]
	if p.Path != "ctd-decoder" || len(p.Accepts) != 1 || p.Returns != "application/vnd.oci.image.layer.v1.tar+gzip" {
		t.Errorf("decoder %+v", p)
	}
}

// contract: 2.3.3, 2.3.4, 13.12
// promise: P37
func TestImports(t *testing.T) {
	dir := t.TempDir()
	main := write(t, filepath.Join(dir, "config.toml"), `
version = 3
imports = ["conf.d/*.toml", "`+dir+`/abs.toml", "gone.toml"]
oom_score = -5
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "/run/a.sock"
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ["/a"]
  setup_serially = true
  conf_dir = "/conf"
[proxy_plugins.p]
  type = "snapshot"
  address = "/one"
[timeouts]
  'io.containerd.timeout.shim.load' = '9s'
`)
	write(t, filepath.Join(dir, "conf.d/10-a.toml"), `
version = 2
oom_score = 0
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.restart"]
imports = ["../config.toml", "10-a.toml"]
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/b"
  setup_serially = false
[proxy_plugins.p]
  type = "content"
[timeouts]
  'io.containerd.timeout.task.state' = '8s'
`)
	write(t, filepath.Join(dir, "conf.d/20-b.toml"), "version = 3\noom_score = -7\n[plugins.'io.containerd.cri.v1.runtime'.cni]\n conf_dir = '/late'\n")
	write(t, filepath.Join(dir, "conf.d/not-toml.conf"), "nonsense [")
	if err := os.Symlink("nowhere", filepath.Join(dir, "conf.d/30-dangling.toml")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "abs.toml"), "version = 4\n[debug]\n level = 'debug'\n[plugins.'io.containerd.server.v1.grpc']\n gid = 7\n")

	c, ws, err := Load(main, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var cni struct {
		CNI struct {
			BinDirs       []string `toml:"bin_dirs"`
			SetupSerially bool     `toml:"setup_serially"`
			ConfDir       string   `toml:"conf_dir"`
		} `toml:"cni"`
	}
	cni.CNI.BinDirs = []string{"/default"}
	if _, err := c.Decode(criRuntime, &cni); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"/a", "/b"}, cni.CNI.BinDirs); d != "" || cni.CNI.SetupSerially || cni.CNI.ConfDir != "/late" {
		t.Errorf("cni %+v %s", cni.CNI, d)
	}
	if c.OOMScore != -7 || c.Debug.Level != "debug" {
		t.Errorf("oom_score %d, level %q", c.OOMScore, c.Debug.Level)
	}
	if d := cmp.Diff([]string{"io.containerd.grpc.v1.cri", "io.containerd.monitor.container.v1.restart"}, c.DisabledPlugins); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(map[string]ProxyPlugin{"p": {Type: "content"}}, c.ProxyPlugins); d != "" {
		t.Errorf("a proxy is replaced whole: %s", d)
	}
	if c.Timeouts["io.containerd.timeout.shim.load"] != 9*time.Second || c.Timeouts["io.containerd.timeout.task.state"] != 8*time.Second {
		t.Errorf("timeouts %v", c.Timeouts)
	}
	s, _, err := c.Servers()
	if err != nil || s.GRPC.Address != "/run/a.sock" || s.GRPC.GID != 7 || s.TTRPC.Address != "/run/a.sock.ttrpc" {
		t.Errorf("servers %+v %v", s, err)
	}
	var files []string
	for _, f := range c.Files {
		files = append(files, filepath.Base(f))
	}
	if d := cmp.Diff([]string{"config.toml", "10-a.toml", "20-b.toml", "abs.toml"}, files); d != "" {
		t.Errorf("order of files: %s", d)
	}
	for _, part := range []string{"30-dangling.toml is left out", "gone.toml is left out"} {
		if !has(ws, Import, part) || !has(ws, Import, "config.toml:3:") {
			t.Errorf("no warning with position about %s in %v", part, ws)
		}
	}
	if !has(ws, Ineffective, "oom_score: an imported file cannot set this back to zero") {
		t.Errorf("the ignored zero is silent: %v", ws)
	}
	for path, want := range map[string]string{"oom_score": "20-b.toml:2:1", "root": ""} {
		pos, ok := c.Origin(path)
		if ok != (want != "") || !strings.HasSuffix(pos.String(), want) {
			t.Errorf("origin of %s: %s", path, pos)
		}
	}
	var out bytes.Buffer
	if err := WriteEffective(&out, c); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"root = '/var/lib/gantry' # default", "conf_dir = '/late' # " + dir + "/conf.d/20-b.toml:4:2"} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("no %q in\n%s", line, out.String())
		}
	}
	// What dump prints needs no imports any more and reads as the same.
	out.Reset()
	if err := WriteDump(&out, c); err != nil {
		t.Fatal(err)
	}
	d, _, err := Load(write(t, filepath.Join(t.TempDir(), "d.toml"), out.String()), Options{})
	if err != nil {
		t.Fatal(err)
	}
	var again bytes.Buffer
	if err := WriteDump(&again, d); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(out.String(), again.String()); d != "" {
		t.Errorf("dump does not round trip: %s", d)
	}
}

// Keys that are going to be removed are read, each with its warning's id.
//
// contract: 2.4.2
func TestDeprecated(t *testing.T) {
	_, ws := load(t, `version = 2
[plugins.'io.containerd.grpc.v1.cri']
  enable_cdi = false
[plugins.'io.containerd.grpc.v1.cri'.registry.mirrors.'a.b']
  endpoint = ['https://c']
[plugins.'io.containerd.grpc.v1.cri'.registry.configs.'a.b'.tls]
  insecure_skip_verify = true
[plugins.'io.containerd.grpc.v1.cri'.registry.auths.'a.b']
  username = 'u'
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dir = '/b'
[plugins.'io.containerd.tracing.processor.v1.otlp']
  endpoint = 'http://e'
  protocol = 'grpc'
  insecure = true
[plugins.'io.containerd.internal.v1.tracing']
  service_name = 's'
  sampling_ratio = 0.5
`, Options{})
	var got []string
	for _, w := range ws {
		if w.Kind == Unknown || w.Kind == WrongType {
			t.Errorf("not accepted: %s", w)
		}
		if w.Kind == Deprecated {
			got = append(got, strings.TrimPrefix(w.ID, "io.containerd.deprecation/"))
		}
	}
	want := strings.Fields("cri-registry-mirrors cri-registry-auths cri-registry-configs cri-cni-bin-dir " +
		"tracing-processor-config tracing-processor-config tracing-processor-config tracing-service-config tracing-service-config enable-cdi")
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// Drop-ins load only when the file itself lists them.
//
// contract: 2.3.3, 13.12
func TestDropInsMustBeListed(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "conf.d/a.toml"), "version = 3\noom_score = 9\n")
	c, _, err := Load(write(t, filepath.Join(dir, "config.toml"), "version = 3\n"), Options{})
	if err != nil || c.OOMScore != 0 || len(c.Files) != 1 {
		t.Errorf("oom_score %d of %v: %v", c.OOMScore, c.Files, err)
	}
}

// A broken file that the main file imports fails with its own position.
//
// contract: 2.3.5
func TestBrokenImport(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "b.toml"), "x = [1,\n")
	_, _, err := Load(write(t, filepath.Join(dir, "a.toml"), "version = 3\nimports = ['b.toml']\n"), Options{})
	if err == nil || !strings.Contains(err.Error(), "b.toml:") {
		t.Errorf("error %v, want one that names b.toml and the row", err)
	}
}

// The .ttrpc address follows the gRPC one for files before version 4 and for
// the flag, and only when nobody named it.
//
// contract: 2.3.7, 2.3.15, 13.12
func TestTTRPCAddress(t *testing.T) {
	for _, tc := range []struct {
		name, text, flag, grpc, ttrpc string
	}{
		{"v2", "version = 2\n[grpc]\naddress='/g'\n", "", "/g", "/g.ttrpc"},
		{"v3 named", "version = 3\n[grpc]\naddress='/g'\n[ttrpc]\naddress='/t'\n", "", "/g", "/t"},
		{"v4", "version = 4\n[plugins.'io.containerd.server.v1.grpc']\naddress='/g'\n", "", "/g", DefaultAddress + ".ttrpc"},
		{"flag", "version = 4\n", "/f", "/f", "/f.ttrpc"},
		{"flag over derived", "version = 2\n[grpc]\naddress='/g'\n", "/f", "/f", "/f.ttrpc"},
		{"flag and named", "version = 2\n[ttrpc]\naddress='/t'\n", "/f", "/f", "/t"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, _ := load(t, tc.text, Options{Address: tc.flag})
			if c.Address() != tc.grpc || c.TTRPCAddress() != tc.ttrpc {
				t.Errorf("%s and %s, want %s and %s", c.Address(), c.TTRPCAddress(), tc.grpc, tc.ttrpc)
			}
		})
	}
}

// contract: 2.3.15
func TestFlags(t *testing.T) {
	c, _ := load(t, "version = 2\nroot='/r'\nstate='/s'\n[debug]\nlevel='warn'\n", Options{Root: "/R", State: "/S", LogLevel: "trace"})
	if c.Root != "/R" || c.State != "/S" || c.Debug.Level != "trace" {
		t.Errorf("%q %q %q", c.Root, c.State, c.Debug.Level)
	}
	if pos, _ := c.Origin("root"); pos.String() != "--root" {
		t.Errorf("origin %s", pos)
	}
}

type component struct {
	RootPath string            `toml:"root_path"`
	Delay    time.Duration     `toml:"delay"`
	Count    uint16            `toml:"count"`
	Ratio    float64           `toml:"ratio"`
	Options  []string          `toml:"mount_options"`
	Labels   map[string]string `toml:"labels"`
	Nested   *struct {
		On bool `toml:"on"`
	} `toml:"nested"`
	Any map[string]any `toml:"any"`
}

// A component's own struct is the schema of its block; what does not fit
// leaves the default.
//
// contract: 2.3.5
// promise: P37
func TestDecode(t *testing.T) {
	text := `version = 4
[plugins.'io.containerd.snapshotter.v1.overlayfs']
root_path = '/x'
delay = '1m'
ratio = 2
mount_options = ['a', 'b']
labels = {a = 'b'}
nested.on = true
any = {n = 1, l = ['x']}
sync_remove = true
slow_chown = false
Root_path_ = 1
[plugins.'third.party.v1.x']
count = 70000
delay = 5
mount_options = ['a', 2]
root_path = ['/']
`
	c, _ := load(t, text, Options{})
	def := component{RootPath: "/def", Count: 3, Delay: time.Second, Options: []string{"d"}}
	got := def
	ws, err := c.Decode("io.containerd.snapshotter.v1.overlayfs", &got)
	if err != nil {
		t.Fatal(err)
	}
	want := component{RootPath: "/x", Delay: time.Minute, Count: 3, Ratio: 2, Options: []string{"a", "b"}, Labels: map[string]string{"a": "b"},
		Any: map[string]any{"n": int64(1), "l": []any{"x"}}}
	want.Nested = &struct {
		On bool `toml:"on"`
	}{true}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if len(ws) != 2 || !has(ws, Ineffective, "config.toml:10:1") || !has(ws, Unknown, `config.toml:12:1: unknown key`) || !has(ws, Unknown, `did you mean "root_path"`) {
		t.Errorf("warnings %v", ws)
	}

	got = def
	ws, err = c.Decode("third.party.v1.x", &got)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(def, got); d != "" {
		t.Errorf("wrong types changed the defaults: %s", d)
	}
	for _, part := range []string{":14:1: ", ":15:1: ", ":16:23: ", ":17:1: "} {
		if !has(ws, WrongType, part) {
			t.Errorf("no wrong type at %s in %v", part, ws)
		}
	}
	if rest, err := c.Rest(); err != nil || len(rest) != 0 {
		t.Errorf("the rest after all was decoded: %v %v", rest, err)
	}
	if _, err := c.Decode("x", got); !errdefs.IsInvalidArgument(err) {
		t.Errorf("decode into a value: %v", err)
	}
	s, _ := load(t, text, Options{Strict: true})
	if _, err := s.Decode("third.party.v1.x", &got); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "config.toml:14:1") {
		t.Errorf("strict: %v", err)
	}
	if _, err := s.Rest(); err == nil || !strings.Contains(err.Error(), "sync_remove") {
		t.Errorf("strict rest: %v", err)
	}
}

// promise: P37
func TestProxiesAreReported(t *testing.T) {
	for _, text := range []string{"version = 4\n[proxy_plugins.stargz]\ntype = 'snapshot'\n", "version = 2\n[proxy_plugins]\n[proxy_plugins.stargz]\ntype = 'snapshot'\n[plugins]\n"} {
		c, _ := load(t, text, Options{})
		if rest, err := c.Rest(); err != nil || !has(rest, Ineffective, "proxy_plugins.stargz is accepted, not yet effective") {
			t.Errorf("%v %v", rest, err)
		}
		s, _ := load(t, text, Options{Strict: true})
		if _, err := s.Rest(); err == nil || !strings.Contains(err.Error(), "proxy_plugins.stargz") {
			t.Errorf("strict: %v", err)
		}
	}
}

// promise: P37
func TestForVersion(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "c.toml"), "version = 4\n")
	var out bytes.Buffer
	if _, err := Check(&out, path, CheckOptions{ForVersion: 3}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("version 4 for a reader of 3: %v", err)
	}
	if n, err := Check(&out, path, CheckOptions{ForVersion: 4}); err != nil || n != 0 {
		t.Errorf("version 4 for a reader of 4: %d %v", n, err)
	}
}

// A configuration names files that may be anything: a FIFO must not hang the
// start, a huge file must not be read whole.
func TestHostileFiles(t *testing.T) {
	dir := t.TempDir()
	big := filepath.Join(dir, "big.toml")
	if err := os.WriteFile(big, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(big, maxFile+1); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Load(big, Options{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("big file: %v", err)
	}
	_, ws := load(t, "version=2\nimports=['/dev/zero']\n", Options{})
	if !has(ws, Import, "/dev/zero is left out") {
		t.Errorf("warnings %v", ws)
	}
}

func FuzzLoad(f *testing.F) {
	for _, name := range []string{"dockerd", "kubeadm", "kind", "k3s", "v1", "bad"} {
		data, err := os.ReadFile(filepath.Join("testdata", name+".toml"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add(defaultsTOML)
	f.Add([]byte("version=2\nplugins=3\ngrpc=[1]\n[[a.b]]\nc.d=1\n[[a.b]]\n[a.b.e]\nf=2020-01-01\n"))
	f.Add([]byte("version=2\n[plugins.'io.containerd.grpc.v1.cri']\ncontainerd=1\ncni=[]\nregistry=''\n[plugins.'io.containerd.cri.v1.images']\nregistry=3\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		out, _, err := Migrate("f", data)
		if err != nil {
			return
		}
		again, _, err := Migrate("f", out)
		if err != nil {
			t.Fatalf("what migrate wrote cannot be read: %v\n%s", err, out)
		}
		if !bytes.Equal(out, again) {
			t.Fatalf("migrate is not stable:\n%s\n---\n%s", out, again)
		}
		tree, v, _, err := migrateFile("f", data)
		if err != nil {
			t.Fatal(err)
		}
		tree.take("imports")
		c, _, err := build(tree, []string{"f"}, Options{}, v)
		if err != nil {
			return
		}
		if _, _, err := c.Servers(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Rest(); err != nil {
			t.Fatal(err)
		}
		c.Marshal(true)
	})
}
