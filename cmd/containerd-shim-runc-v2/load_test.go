//go:build linux

package main_test

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

func openFiles(t *testing.T, pid int) int {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// Many processes at once, of many containers, and nothing of them stays.
// contract: 1.6.8, 5.3.3
func TestParallel(t *testing.T) {
	d := newDaemon(t)
	anchor := d.newTask("anchor", "sleep", "1000").run()
	round := func(round int) {
		var wg sync.WaitGroup
		for i := range 4 {
			id := fmt.Sprintf("c%d-%d", round, i)
			k := d.newTask(id, "sleep", "1000")
			k.spec.Annotations = map[string]string{"io.containerd.runc.v2.group": "anchor"}
			k.stdout = fifo(t, k.bundle+"/out")
			k.run()
			for e := range 5 {
				wg.Add(1)
				go func() {
					defer wg.Done()
					exec := fmt.Sprint("e", e)
					p := *k.spec.Process
					p.Args = []string{"sh", "-c", fmt.Sprintf("echo %s; exit %d", exec, 10+e)}
					var w taskapi.WaitResponse
					for _, c := range []struct {
						method   string
						req, res proto.Message
					}{
						{"Exec", &taskapi.ExecProcessRequest{ID: id, ExecID: exec, Stdout: k.stdout, Spec: asJSON(t, "Process", p)}, &emptypb.Empty{}},
						{"Start", &taskapi.StartRequest{ID: id, ExecID: exec}, &taskapi.StartResponse{}},
						{"Wait", &taskapi.WaitRequest{ID: id, ExecID: exec}, &w},
						{"Delete", &taskapi.DeleteRequest{ID: id, ExecID: exec}, &taskapi.DeleteResponse{}},
					} {
						if err := k.call(c.method, c.req, c.res); err != nil {
							t.Errorf("%s %s %s: %v", c.method, id, exec, err)
						}
					}
					if w.ExitStatus != uint32(10+e) {
						t.Errorf("%s %s: status %d", id, exec, w.ExitStatus)
					}
				}()
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				for range 20 {
					if err := k.call("State", &taskapi.StateRequest{ID: id}, &taskapi.StateResponse{}); err != nil {
						t.Error(err)
					}
				}
			}()
			t.Cleanup(func() { k.client.Close() })
			defer func() {
				k.kill("", unix.SIGKILL)
				k.wait("")
				k.delete("")
				k.client.Close()
				d.await(id, "/tasks/delete")
				started := map[string]bool{}
				for _, l := range d.topics(id) {
					if e, ok := strings.CutPrefix(l, "/tasks/exec-started "); ok {
						started[e] = true
					} else if f := strings.Fields(l); f[0] == "/tasks/exit" && f[1] != id && !started[f[1]] {
						t.Errorf("%s: %s exited before it was started", id, f[1])
					}
				}
			}()
		}
		wg.Wait()
	}
	round(0)
	before := openFiles(t, anchor.shimPid)
	round(1)
	round(2)
	// Connections of the test are closed by the shim a moment later.
	eventually(t, fmt.Sprintf("%d open files or fewer", before), func() bool { return openFiles(t, anchor.shimPid) <= before })
	anchor.kill("", unix.SIGKILL)
	anchor.wait("")
	anchor.delete("")
	anchor.finish()
}

// A container whose root is nobody on the host, on id mapped layers.
// contract: 5.3.1
func TestUserNamespace(t *testing.T) {
	d := newDaemon(t)
	// The mapped root has to reach its root file system (contract 5.1.1).
	if err := os.Chmod(d.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	k := d.newTask("c1", "sh", "-c", "id -u; echo x > /tmp/file; cat /proc/self/uid_map").fifos()
	k.opts = &options.Options{Root: k.opts.Root, IoUid: 100000, IoGid: 100000}
	k.spec.Linux.Namespaces = append(k.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	k.spec.Linux.UIDMappings, k.spec.Linux.GIDMappings = ids, ids
	for _, dir := range []string{"upper", "work"} {
		if err := os.Chown(k.bundle+"/"+dir, 100000, 100000); err != nil {
			t.Fatal(err)
		}
	}
	k.start()
	mounts := k.rootfs()
	mounts[0].Options = append(mounts[0].Options, "uidmap=0:100000:65536", "gidmap=0:100000:65536")
	if err := k.call("Create", &taskapi.CreateTaskRequest{ID: k.id, Bundle: k.bundle, Rootfs: mounts, Options: any(t, k.opts),
		Stdin: k.stdin, Stdout: k.stdout, Stderr: k.stderr}, &taskapi.CreateTaskResponse{}); err != nil {
		if strings.Contains(err.Error(), "id mapped") {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	k.must("Start", &taskapi.StartRequest{ID: k.id}, &taskapi.StartResponse{})
	if w := k.wait(""); w.ExitStatus != 0 {
		t.Errorf("%v: %s", w, k.errs)
	}
	k.out.await(t, "100000")
	if !strings.HasPrefix(k.out.String(), "0\n") {
		t.Errorf("inside: %q", k.out)
	}
	var st unix.Stat_t
	if err := unix.Stat(k.bundle+"/upper/tmp/file", &st); err != nil || st.Uid != 100000 {
		t.Errorf("the file belongs to %d: %v", st.Uid, err)
	}
	k.delete("")
	k.finish()
}
