package badinput

import (
	"bytes"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/test/critest"
)

// The files that kubeadm's, kind's and k3s' users have, with drop-ins and the
// handlers of crun, gVisor, Kata and NVIDIA, and with every key at once, are
// accepted: gantryd starts with each and has its handlers, default first, that
// of the built-in runc always among them. What has no effect is said with file
// and line, before the start and in the log of it. GANTRY_UPDATE=1 writes the
// expected findings anew.
//
// contract: 2.3.1, 2.3.3, 2.3.4, 2.3.5, 2.3.12, 2.3.13, 7.3.1, 7.4.1, 7.4.2, 7.4.3, 13.12, 13.37, 13.43
// promise: P37
func TestConfigsInTheField(t *testing.T) {
	for name, handlers := range map[string]string{
		"kubeadm": "runc", "kind": "runc test-handler", "k3s-v2": "crun runc spin", "k3s-v3": "crun runc runhcs-wcow-process", "nvidia": "nvidia nvidia-cdi runc",
		"gvisor": "crun kata runc runsc", "registry": "runc", "everything": "all odd runc", "dockerd": "", "parts": "",
	} {
		t.Run(name, func(t *testing.T) {
			n, err := critest.NewNode(binDir, "")
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := n.Close(); err != nil {
					t.Error(err)
				}
			}()
			dir := filepath.Join(n.Dir, "configs")
			if err := filepath.WalkDir("testdata/config", func(path string, e fs.DirEntry, err error) error {
				if err != nil || e.IsDir() {
					return err
				}
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				to := filepath.Join(dir, strings.TrimPrefix(path, "testdata/config/"))
				if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
					return err
				}
				return os.WriteFile(to, bytes.ReplaceAll(data, []byte("@DIR@"), []byte(dir)), 0o644)
			}); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dir+"/cri-base.json", []byte(`{"ociVersion":"1.1.0","process":{"rlimits":[{"type":"RLIMIT_NOFILE","hard":1048576,"soft":1048576}]}}`), 0o644); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, name+".toml")
			out, err := exec.Command(n.Bin, "--config", file, "config", "check").Output()
			findings := strings.ReplaceAll(string(out), dir+"/", "")
			if (err == nil) != (len(findings) == 0) {
				t.Errorf("config check: %v, and it prints %q", err, findings)
			}
			golden := filepath.Join("testdata", "config", name+".check")
			if os.Getenv("GANTRY_UPDATE") != "" {
				if err := os.WriteFile(golden, []byte(findings), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), findings); d != "" {
				t.Errorf("config check (-want +got):\n%s", d)
			}

			// The directories and sockets are given by flags, the rest is the file's.
			n.Wrap = []string{"/bin/sh", "-c", fmt.Sprintf(`exec "$0" --config %q --root %q --state %q --address %q`, file, n.Dir+"/root", n.Dir+"/state", n.Address())}
			if err := n.Start(); err != nil && !(handlers == "" && status.Code(err) == codes.Unimplemented) {
				t.Fatalf("start: %v\n%s", err, n.Log(4<<10))
			}
			log := strings.ReplaceAll(n.Log(1<<20), dir+"/", "")
			for finding := range strings.Lines(findings) {
				quoted := strings.ReplaceAll(strings.TrimSpace(finding), `"`, `\"`)
				if !strings.Contains(log, quoted) {
					t.Errorf("the daemon does not log %q", quoted)
				}
			}
			st, err := n.RT.Status(critest.Context(t), &runtime.StatusRequest{Verbose: true})
			if handlers == "" {
				if status.Code(err) != codes.Unimplemented {
					t.Errorf("with the CRI disabled: %v", err)
				}
				for _, left := range []string{"/root/io.gantry.cni", "/state/io.containerd.grpc.v1.cri"} {
					if _, err := os.Stat(n.Dir + left); err == nil {
						t.Errorf("with the CRI disabled there is %s", left)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var have []string
			for _, h := range st.RuntimeHandlers {
				have = append(have, h.Name)
			}
			if w := append([]string{""}, strings.Fields(handlers)...); !slices.Equal(have, w) {
				t.Errorf("handlers %q, want %q", have, w)
			}
			if !strings.HasPrefix(st.Info["config"], "{") {
				t.Errorf("verbose: %q", st.Info)
			}
		})
	}
}

// What gantryd prints as its default configuration has nothing to complain of,
// which is what people begin with who write one.
//
// contract: 2.3.14
// promise: P37
func TestDefaultConfigIsFine(t *testing.T) {
	bin := filepath.Join(binDir, "gantryd")
	def, err := exec.Command(bin, "config", "default").Output()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, def, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(bin, "--config", file, "config", "check").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// Over TCP there is the CRI only if the file says so.
//
// contract: 1.1.3, 7.4.1
func TestCRIOverTCP(t *testing.T) {
	for _, disable := range []bool{true, false} {
		l, err := net.Listen("tcp", "127.0.0.1:0") // in a network of the test's own
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		critest.Run(t, binDir, fmt.Sprintf("[plugins.'io.containerd.grpc.v1.cri']\ndisable_tcp_service = %v\n[plugins.'io.containerd.server.v1.grpc-tcp']\naddress = %q\n", disable, l.Addr()))
		conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = runtime.NewRuntimeServiceClient(conn).Version(critest.Context(t), &runtime.VersionRequest{})
		if want := map[bool]codes.Code{true: codes.Unimplemented, false: codes.OK}[disable]; status.Code(err) != want {
			t.Errorf("disable_tcp_service = %v: %v", disable, err)
		}
	}
}
