//go:build linux

package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What daemons of every age send, and what they can read.
// contract: 1.4.7, 5.2.1, 5.2.3, 5.2.4, 5.2.5, 5.2.6, 5.2.7, 13.2
func TestStartMatrix(t *testing.T) {
	d := newDaemon(t)
	opts := &options.Options{Root: d.dir + "/runc"}
	other := func(id, ns string) []byte {
		return marshal(t, &bootapi.BootstrapParams{InstanceID: id, Namespace: ns, ContainerdBinary: "/usr/bin/containerd", SocketDir: &d.sockets})
	}
	for name, c := range map[string]struct {
		stdin  []byte
		env    string
		answer string // proto, json, bare, or an error's words
	}{
		"nothing, as 1.6 without options":  {nil, "", "bare"},
		"runtime options, as 1.6 to 2.2":   {marshal(t, any(t, opts)), "", "bare"},
		"with the type's full name":        {marshal(t, &anypb.Any{TypeUrl: "type.googleapis.com/containerd.runc.v1.Options", Value: marshal(t, opts)}), "", "bare"},
		"a daemon that can do more":        {marshal(t, any(t, opts)), "MAX_SHIM_VERSION=3", "json"},
		"parameters, as 2.3":               {nil, "params", "proto"},
		"parameters for another id":        {other("other", namespace), "", "bootstrap parameters are for"},
		"parameters for another namespace": {other("c1", "other"), "", "bootstrap parameters are for"},
		"another runtime's options":        {marshal(t, &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: []byte{10, 1, 'x'}}), "", "not for this runtime"},
		"generic options without content":  {marshal(t, &anypb.Any{TypeUrl: "runtimeoptions.v1.Options"}), "", "bare"},
		"something else":                   {[]byte("\xff\xff\xff"), "", "stdin holds neither"},
	} {
		t.Run(name, func(t *testing.T) {
			k := d.newTask("c1", "sleep", "100")
			k.opts = opts
			k.writeSpec()
			defer os.RemoveAll(k.bundle)
			stdin := c.stdin
			if c.env == "params" {
				stdin = k.params()
			}
			cmd := k.command(stdin, "-debug", "start")
			if strings.Contains(c.env, "=") {
				cmd.Env = append(cmd.Env, c.env)
			}
			out, err := cmd.CombinedOutput()
			var address string
			switch c.answer {
			case "bare":
				address = string(out)
			case "json":
				var r struct {
					Version           int
					Address, Protocol string
				}
				if err := json.Unmarshal(out, &r); err != nil || r.Version != 3 || r.Protocol != "ttrpc" {
					t.Fatalf("%q: %v", out, err)
				}
				address = r.Address
			case "proto":
				var r bootapi.BootstrapResult
				if err := proto.Unmarshal(out, &r); err != nil || r.Version != 3 || r.Protocol != "ttrpc" {
					t.Fatalf("%q: %v", out, err)
				}
				address = r.Address
				if !strings.HasPrefix(address, "unix://"+d.sockets+"/") {
					t.Errorf("address %s", address)
				}
			default:
				if err == nil || !strings.Contains(string(out), c.answer) {
					t.Fatalf("%q: %v", out, err)
				}
				if left, _ := filepath.Glob(d.sockets + "/[0-9a-f]*"); len(left) != 0 {
					t.Errorf("sockets are left: %v", left)
				}
				return
			}
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			path := strings.TrimPrefix(address, "unix:///")
			if path == address {
				t.Fatalf("address %q", address)
			}
			path = "/" + path
			if info, err := os.Stat(path); err != nil || info.Mode()&os.ModeSocket == 0 || info.Mode().Perm() != 0o600 {
				t.Errorf("socket: %v %v", info, err)
			}
			if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("socket directory: %v %v", info, err)
			}
			if b, err := os.ReadFile(k.bundle + "/address"); err != nil || string(b) != address {
				t.Errorf("address file %q: %v", b, err)
			}
			k.connect(address)
			for _, k.service = range []string{"containerd.task.v2.Task", "containerd.task.v3.Task"} {
				k.must("Connect", &taskapi.ConnectRequest{ID: k.id}, &taskapi.ConnectResponse{})
			}
			k.shutdown()
			eventually(t, "end of the shim", func() bool { return !alive(k.shimPid) })
			if _, err := os.Stat(path); err == nil {
				t.Error("the socket is left")
			}
		})
	}
}

// A socket whose shim was killed is taken over; one whose shim lives is joined.
// contract: 5.2.7, 5.2.9
func TestStaleSocket(t *testing.T) {
	d := newDaemon(t)
	k := d.newTask("c1", "sleep", "100").start()
	first := k.shimPid
	again := d.newTask("c1b", "sleep", "100")
	again.id = "c1"
	again.start()
	if again.shimPid != first {
		t.Errorf("a second shim %d beside %d", again.shimPid, first)
	}
	kill(t, first)
	k.client.Close()
	k.start()
	if k.shimPid == first {
		t.Error("the dead shim answers")
	}
	k.finish()
}

func kill(t *testing.T, pid int) {
	t.Helper()
	p, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "end of a killed process", func() bool { return !alive(pid) })
}

// contract: 8.3.1
func TestFlags(t *testing.T) {
	out, err := exec.Command(binary(t), "-v").Output()
	if err != nil || !strings.Contains(string(out), "containerd-shim-runc-v2:") || !strings.Contains(string(out), "Version:") {
		t.Errorf("-v: %q %v", out, err)
	}
	for _, args := range [][]string{{"-nope"}, {"start"}, {"-namespace", "x", "start"}, {"-namespace", "x", "dance"}, {"-namespace", "x", "-id", "../y", "delete"}, {"-namespace", "x"}} {
		cmd := exec.Command(binary(t), args...)
		cmd.Dir = t.TempDir()
		if out, err := cmd.CombinedOutput(); err == nil || len(out) == 0 {
			t.Errorf("%q: %q %v", args, out, err)
		}
	}
}

// contract: 5.2.14, 8.3.1, 13.30
func TestInfo(t *testing.T) {
	for _, name := range []string{"", "runc"} {
		cmd := exec.Command(binary(t), "-info")
		cmd.Stdin = bytes.NewReader(marshal(t, any(t, &options.Options{BinaryName: name})))
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		var info types.RuntimeInfo
		if err := proto.Unmarshal(out, &info); err != nil || info.Name != "io.containerd.runc.v2" || info.Version.GetVersion() == "" {
			t.Errorf("%q: %v %v", name, &info, err)
		}
		if info.Annotations["io.gantry.shim.log"] != "cri" {
			t.Errorf("annotations %v", info.Annotations)
		}
		if name != "" {
			continue // runc 1.1 tells less
		}
		if info.Features.GetTypeUrl() != "types.containerd.io/opencontainers/runtime-spec/1/features/Features" {
			t.Errorf("type %q", info.Features.GetTypeUrl())
		}
		var f struct {
			MountOptions []string
			Linux        struct {
				MountExtensions struct{ Idmap struct{ Enabled bool } }
				Seccomp         struct{ Enabled bool }
			}
		}
		if err := json.Unmarshal(info.Features.GetValue(), &f); err != nil || !f.Linux.MountExtensions.Idmap.Enabled || !f.Linux.Seccomp.Enabled {
			t.Errorf("%+v %v", f, err)
		}
	}
}

// The daemon reads the shim's log from a FIFO, or is not there to do so.
// contract: 5.2.8, 13.19
func TestLogFIFO(t *testing.T) {
	d := newDaemon(t)
	k := d.newTask("c1", "sleep", "100")
	if err := os.Remove(k.bundle + "/log"); err != nil {
		t.Fatal(err)
	}
	log := read(t, fifo(t, k.bundle+"/log"))
	k.writeSpec()
	out, err := k.command(k.params(), "-debug", "start").CombinedOutput()
	if err != nil {
		t.Fatalf("%v %s", err, out)
	}
	var r bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	log.await(t, "serving")
	k.connect(r.Address)
	log.f.Close() // the daemon dies, and the FIFO fills up
	for i := range 2000 {
		_ = k.call("State", &taskapi.StateRequest{ID: strings.Repeat("x", 200) + fmt.Sprint(i)}, nil)
	}
	k.must("Connect", &taskapi.ConnectRequest{ID: k.id}, &taskapi.ConnectResponse{})
	k.finish()
}

// contract: 5.3.9
func TestRuntimeOptions(t *testing.T) {
	d := newDaemon(t)
	group := "/" + filepath.Base(d.dir) + "-shim"
	for _, c := range []string{"cpu", "memory"} {
		dir := "/sys/fs/cgroup/" + c + group
		if _, err := os.Stat(filepath.Dir(dir)); err != nil {
			dir = "/sys/fs/cgroup" + group
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Skip("no cgroup can be made: ", err)
		}
		t.Cleanup(func() {
			eventually(t, "end of the shim's cgroup", func() bool { return unix.Rmdir(dir) != unix.EBUSY })
		})
	}
	k := d.newTask("c1", "sh", "-c", "cat; echo done >&2").fifos()
	k.opts.ShimCgroup = group
	k.opts.IoUid, k.opts.IoGid = 1234, 2345
	k.opts.NoPivotRoot, k.opts.NoNewKeyring = true, true
	k.run()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", k.shimPid))
	if err != nil || !strings.Contains(string(b), group) {
		t.Errorf("the shim is in %s: %v", b, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/fd/1", k.state("").Pid), &st); err != nil || st.Gid != 2345 {
		t.Errorf("stdout belongs to %d:%d: %v", st.Uid, st.Gid, err) // the runtime sets the user
	}
	if m, _ := filepath.Glob(k.opts.Root + "/" + namespace + "/c1/state.json"); len(m) != 1 {
		t.Errorf("no state below %s", k.opts.Root)
	}
	k.must("CloseIO", &taskapi.CloseIORequest{ID: k.id, Stdin: true}, nil)
	k.wait("")
	k.errs.await(t, "done")
	k.delete("")
	k.finish()

	missing := d.newTask("c2", "true")
	missing.opts.ShimCgroup = "/no/such/cgroup"
	missing.writeSpec()
	if out, err := missing.command(missing.params(), "start").CombinedOutput(); err == nil || !strings.Contains(string(out), "/no/such/cgroup") {
		t.Errorf("%s %v", out, err)
	}
	if left, _ := filepath.Glob(d.sockets + "/[0-9a-f]*"); len(left) != 0 {
		t.Errorf("sockets are left: %v", left)
	}
}
