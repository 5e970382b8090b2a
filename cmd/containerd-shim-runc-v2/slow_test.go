//go:build linux

package main_test

import (
	le "encoding/binary"
	"fmt"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// An exec whose program lies on a file system that does not answer can be
// killed in its start, and holds up nothing else of its container: not others,
// no change of limits, no end.
//
// contract: 5.3.3, 5.3.6, 5.3.7
// promise: P17
func TestSlowExec(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sleep", "1000").with(opts).run()
		fuse := k.silentMount("/tmp")
		started := make(chan error, 1)
		slow := func(id string) {
			k.must("Exec", &taskapi.ExecProcessRequest{ID: k.id, ExecID: id, Spec: asJSON(t, "Process", &specs.Process{
				Args: []string{"/tmp/program"}, Cwd: "/", Env: k.spec.Process.Env})}, nil)
			go func() {
				started <- k.call("Start", &taskapi.StartRequest{ID: k.id, ExecID: id}, &taskapi.StartResponse{})
			}()
			asked := []unix.PollFd{{Fd: int32(fuse), Events: unix.POLLIN}}
			for end := time.Now().Add(20 * time.Second); ; {
				n, err := unix.Poll(asked, 100)
				if n == 1 {
					return // it asks for its program, and is not told
				}
				if err != nil && err != unix.EINTR || time.Now().After(end) {
					t.Fatalf("the exec has not asked for its program: %v", err)
				}
				select {
				case err := <-started:
					t.Fatalf("the exec has ended: %v", err)
				default:
				}
			}
		}
		slow("killed")
		k.must("Kill", &taskapi.KillRequest{ID: k.id, ExecID: "killed", Signal: uint32(unix.SIGKILL), All: true}, nil)
		if err := <-started; err == nil && k.wait("killed").ExitStatus != 137 {
			t.Errorf("it was not killed in its start: %v", k.state("killed"))
		}
		k.delete("killed")
		if !hybrid() || filepath.Base(opts.BinaryName) != "crun" { // it puts an exec into a group of its own with cgroup v2 only
			eventually(t, "the end of what was started", func() bool {
				var pids taskapi.PidsResponse
				k.must("Pids", &taskapi.PidsRequest{ID: k.id}, &pids)
				return len(pids.Processes) == 1
			})
		}
		slow("slow")
		for i := range 2 { // also after a change, and after one another
			id := fmt.Sprint("e", i)
			k.exec(id, nil, "sh", "-c", "exit 5")
			if w := k.wait(id); w.ExitStatus != 5 {
				t.Errorf("another exec: %v", w)
			}
			k.delete(id)
			limit := int64(40 + i)
			k.must("Update", &taskapi.UpdateTaskRequest{ID: k.id, Resources: asJSON(t, "LinuxResources", specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}})}, nil)
		}
		select {
		case err := <-started:
			t.Fatalf("the exec has ended: %v", err)
		default:
		}
		k.kill("", unix.SIGKILL)
		if w := k.wait(""); w.ExitStatus != 137 {
			t.Errorf("%v", w)
		}
		if err := <-started; err == nil && k.wait("slow").ExitStatus == 0 { // runc may have told its start
			t.Error("an exec has ended well without a program")
		}
		k.delete("")
		k.finish()
	})
}

// silentMount mounts a FUSE file system in the container that answers nothing
// but that it is there. The descriptor can be read when it is asked something;
// who asks can be killed as long as it is not.
func (k *task) silentMount(path string) (fd int) {
	k.t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		k.t.Skip("/dev/fuse: ", err)
	}
	k.t.Cleanup(func() { unix.Close(fd) })
	ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", k.state("").Pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		k.t.Fatal(err)
	}
	defer unix.Close(ns)
	mounted := make(chan error)
	go func() {
		runtime.LockOSThread() // and never undone: the thread ends in the container
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(ns, unix.CLONE_NEWNS)
		}
		if err == nil {
			err = unix.Mount("silent", path, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd))
		}
		mounted <- err
	}()
	if err := <-mounted; err != nil {
		k.t.Skip("mount FUSE: ", err)
	}
	in, out := make([]byte, 1<<17), make([]byte, 16+64)
	if n, err := unix.Read(fd, in); err != nil || n < 48 || le.LittleEndian.Uint32(in[4:]) != 26 {
		k.t.Fatalf("FUSE_INIT: %d bytes, %v", n, err)
	}
	le.LittleEndian.PutUint32(out, uint32(len(out)))
	copy(out[8:16], in[8:16])                                                            // the request's number
	for at, value := range map[int]uint32{16: 7, 20: 31, 24: 4096, 36: 1 << 16, 40: 1} { // version, read ahead, write at most, granularity of times
		le.LittleEndian.PutUint32(out[at:], value)
	}
	if _, err := unix.Write(fd, out); err != nil {
		k.t.Fatal("answer FUSE_INIT: ", err)
	}
	return fd
}

// Whenever in its start an exec is killed, it has ended then.
//
// contract: 5.3.3
// promise: P17
func TestKillInStart(t *testing.T) {
	drivers(t, func(t *testing.T, d *daemon, opts *options.Options) {
		k := d.newTask("c1", "sleep", "1000").with(opts).run()
		p := *k.spec.Process
		p.Args = []string{"sleep", "1000"}
		for i := range 12 {
			id := fmt.Sprint("e", i)
			k.must("Exec", &taskapi.ExecProcessRequest{ID: k.id, ExecID: id, Spec: asJSON(t, "Process", p)}, nil)
			started := make(chan error, 1)
			go func() {
				started <- k.call("Start", &taskapi.StartRequest{ID: k.id, ExecID: id}, &taskapi.StartResponse{})
			}()
			time.Sleep(time.Duration(i) * time.Millisecond) // any moment will do
			eventually(t, "the kill", func() bool {         // before the start it is refused
				err := k.call("Kill", &taskapi.KillRequest{ID: k.id, ExecID: id, Signal: uint32(unix.SIGKILL), All: true}, nil)
				return err == nil || errdefs.IsNotFound(err)
			})
			if err := <-started; err != nil && !errdefs.IsAborted(err) {
				t.Errorf("%s: %v", id, err)
			}
			if w := k.wait(id); w.ExitStatus != 137 && w.ExitStatus != 255 {
				t.Errorf("%s: %v", id, w)
			}
			k.delete(id)
		}
		if filepath.Base(opts.BinaryName) != "crun" { // it may be killed before what it starts is in a group
			eventually(t, "the end of all that was started", func() bool {
				var pids taskapi.PidsResponse
				k.must("Pids", &taskapi.PidsRequest{ID: k.id}, &pids)
				return len(pids.Processes) == 1
			})
		}
		k.kill("", unix.SIGKILL)
		k.wait("")
		k.delete("")
		k.finish()
	})
}
