package badinput

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gantryd/gantry/test/daemontest"
)

// A configuration that a daemon cannot keep ends its start at once, with the
// file, the place in it where there is one, and what is wrong; one with keys
// that mean nothing is refused by --strict. Nothing is served, mounted or left.
//
// contract: 2.3.5, 8.2.1
// promise: P36, P37
func TestBadConfigurations(t *testing.T) {
	for _, tc := range []struct {
		name   string
		config string // DIR is the test's directory; what it does not say of root, state and address is added
		strict bool
		words  []string
	}{
		{"a line that ends early", "root =\n", false, []string{"config.toml:1"}},
		{"no TOML", "\x00\xff\xfe{", false, []string{"config.toml"}},
		{"a key twice", "root = 'DIR/root'\nroot = 'DIR/root'\n", false, []string{"config.toml:2", "root"}},
		{"a version to come", "version = 99\n", false, []string{"config.toml", "99"}},
		{"a version in words", "version = 'four'\n", false, []string{"config.toml:1", "version"}},
		{"a root that is a number", "version = 4\nroot = 5\n", false, []string{"config.toml:2", "root is an integer"}},
		{"a number that is a word, strictly", "version = 4\noom_score = 'high'\n", true, []string{"config.toml:2", "oom_score"}},
		{"a list that is none, strictly", "version = 4\ndisabled_plugins = 'x'\n", true, []string{"config.toml:2", "disabled_plugins"}},
		{"an unknown key, strictly", "version = 4\nsurprise = 1\n", true, []string{"config.toml:2", "surprise"}},
		{"an unknown key of a plugin, strictly", "version = 4\n[plugins.'io.containerd.gc.v1.scheduler']\nsurprise = 1\n", true, []string{"config.toml:3", "surprise"}},
		{"a wrong type in a plugin, strictly", "version = 4\n[plugins.'io.containerd.gc.v1.scheduler']\nmutation_threshold = 'many'\n", true, []string{"config.toml:3", "mutation_threshold"}},
		{"a plugin that is required and is not there", "version = 4\nrequired_plugins = ['io.containerd.nosuch.v1']\n", false, []string{"io.containerd.nosuch.v1"}},
		{"a root that is a file", "version = 4\nroot = 'DIR/file'\n", false, []string{"/file"}},
		{"a root below a file", "version = 4\nroot = 'DIR/file/root'\n", false, []string{"/file"}},
		{"an address that is a file", "version = 4\n[plugins.'io.containerd.server.v1.grpc']\naddress = 'DIR/file'\n", false, []string{"/file", "socket"}},
		{"an address that is too long", "version = 4\n[plugins.'io.containerd.server.v1.grpc']\naddress = 'DIR/" + strings.Repeat("a", 120) + "'\n", false, []string{"aaaa", "longer"}},
		{"a certificate that is not there", "version = 4\n[plugins.'io.containerd.server.v1.grpc-tcp']\naddress = '127.0.0.1:0'\ntls_cert = 'DIR/none.crt'\ntls_key = 'DIR/none.key'\n", false, []string{"none.crt"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "gb")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			if err := os.WriteFile(dir+"/file", []byte("mine"), 0o600); err != nil {
				t.Fatal(err)
			}
			path := dir + "/config.toml"
			if err := os.WriteFile(path, []byte(strings.ReplaceAll(tc.config, "DIR", dir)), 0o600); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			args := []string{"--config", path}
			for flag, key := range map[string]string{"--root": "root = ", "--state": "state = 'DIR", "--address": "address = 'DIR"} {
				if !strings.Contains(tc.config, key) {
					args = append(args, flag, filepath.Join(dir, strings.TrimLeft(flag, "-")))
				}
			}
			if tc.strict {
				args = append(args, "--strict")
			}
			cmd := exec.CommandContext(ctx, filepath.Join(binDir, "gantryd"), args...)
			cmd.Env = append(os.Environ(), "TMPDIR="+dir)
			out, err := cmd.CombinedOutput()
			if err == nil || ctx.Err() != nil {
				t.Fatalf("it ran: %v\n%s", err, out)
			}
			for _, w := range tc.words {
				if !strings.Contains(string(out), w) {
					t.Errorf("it does not say %q:\n%s", w, out)
				}
			}
			for _, w := range []string{"panic", "goroutine ", "successfully booted"} {
				if strings.Contains(string(out), w) {
					t.Errorf("it says %q:\n%s", w, out)
				}
			}
			if b, err := os.ReadFile(dir + "/file"); err != nil || string(b) != "mine" {
				t.Errorf("the file that was in the way: %q, %v", b, err)
			}
			for _, l := range (&daemontest.Daemon{Dir: dir}).Leftovers() {
				t.Errorf("left behind: %s", l)
			}
			err = filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
				if err == nil && e.Type()&os.ModeSocket != 0 {
					return fmt.Errorf("a socket is left: %s", p)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}
