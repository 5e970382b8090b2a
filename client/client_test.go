package client

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
)

// Both forms of the kernel's statistics mean the same.
func TestDecodeMetric(t *testing.T) {
	at := time.Now()
	v1 := &cgroup1.Metrics{
		CPU:    &cgroup1.CPUStat{Usage: &cgroup1.CPUUsage{Total: 2e9}, Throttling: &cgroup1.Throttle{ThrottledTime: 1e6}},
		Memory: &cgroup1.MemoryStat{Usage: &cgroup1.MemoryEntry{Usage: 5000, Limit: 9000}, TotalInactiveFile: 1000},
		Pids:   &cgroup1.PidsStat{Current: 3, Limit: 10},
		Blkio:  &cgroup1.BlkIOStat{IoServiceBytesRecursive: []*cgroup1.BlkIOEntry{{Op: "Read", Value: 7}, {Op: "Write", Value: 8}, {Op: "Total", Value: 15}}},
	}
	v2 := &cgroup2.Metrics{
		CPU:    &cgroup2.CPUStat{UsageUsec: 2e6, ThrottledUsec: 1e3},
		Memory: &cgroup2.MemoryStat{Usage: 5000, UsageLimit: 9000, InactiveFile: 1000},
		Pids:   &cgroup2.PidsStat{Current: 3, Limit: 10},
		Io:     &cgroup2.IOStat{Usage: []*cgroup2.IOEntry{{Rbytes: 7, Wbytes: 8}}},
	}
	want := Usage{ID: "x", At: at, CPU: 2 * time.Second, Memory: 4000, MemoryLimit: 9000, Pids: 3, PidsLimit: 10, ReadBytes: 7, WriteBytes: 8, Throttled: time.Millisecond}
	for url, m := range map[string]proto.Message{"io.containerd.cgroups.v1.Metrics": v1, "io.containerd.cgroups.v2.Metrics": v2} {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeMetric(task.Metric{ID: "x", At: at, Data: typed.Any{URL: url, Value: b}})
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", url, got, err)
		}
		if _, err := DecodeMetric(task.Metric{Data: typed.Any{URL: url, Value: []byte{0xff}}}); err == nil {
			t.Errorf("%s: nonsense was taken", url)
		}
	}
	if _, err := DecodeMetric(task.Metric{Data: typed.Any{URL: "other"}}); !errdefs.IsNotImplemented(err) {
		t.Errorf("%v", err)
	}
	if limit(1<<63-4096) != 0 || limit(1<<64-1) != 0 {
		t.Error("the kernel's way to say none is a limit")
	}
}

func TestCommandRuntime(t *testing.T) {
	r, err := CommandRuntime("/usr/bin/crun")
	if err != nil {
		t.Fatal(err)
	}
	if o := DecodeRuncOptions(r.Options); r.Name != DefaultRuntime || o == nil || o.BinaryName != "/usr/bin/crun" {
		t.Errorf("%+v, %v", r, o)
	}
	if DecodeRuncOptions(typed.Any{URL: "other"}) != nil {
		t.Error("options of another kind were decoded")
	}
}

// Users are looked up in the image: no link of it leads to the host's files,
// and no FIFO in the place of a file makes anybody wait.
func TestResolveUserStaysInside(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(outside, "passwd"), []byte("evil:x:0:0::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	passwd := filepath.Join(root, "etc/passwd")
	if err := os.Symlink(filepath.Join(outside, "passwd"), passwd); err != nil {
		t.Fatal(err)
	}
	if u, err := ResolveUser(root, "evil"); err == nil {
		t.Errorf("a link led out: %+v", u)
	}
	if u, err := ResolveUser(root, "7:8"); err != nil || u.UID != 7 || u.GID != 8 {
		t.Errorf("numbers need no file: %+v, %v", u, err)
	}
	os.Remove(passwd)
	if err := os.WriteFile(filepath.Join(root, "real"), []byte("app:x:70:80::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/real", passwd); err != nil { // as if root were "/"
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "etc/group"), []byte("more:x:90:app\nextra:x:91:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	u, err := ResolveUser(root, "app", "extra", "92")
	if err != nil || u.UID != 70 || u.GID != 80 || !slices.Equal(u.AdditionalGids[len(u.AdditionalGids)-3:], []uint32{90, 91, 92}) {
		t.Errorf("%+v, %v", u, err)
	}
}

// FIFOs carry everything, end when the other side closes them, and are gone
// after Close.
func TestStdio(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	closed := make(chan struct{})
	s, err := NewStdio(dir, Streams{Stdin: strings.NewReader("input"), Stdout: &out, StdinClosed: func() { close(closed) }})
	if err != nil {
		t.Fatal(err)
	}
	if s.IO().Stderr != "" || s.IO().Terminal {
		t.Errorf("%+v", s.IO())
	}
	// The other side, as a shim has it.
	in, err := os.OpenFile(s.IO().Stdin, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	w, err := os.OpenFile(s.IO().Stdout, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(io.LimitReader(in, 100)); err != nil || string(b) != "input" {
		t.Errorf("%q, %v", b, err)
	}
	big := bytes.Repeat([]byte("0123456789"), 100_000)
	if _, err := w.Write(big); err != nil {
		t.Fatal(err)
	}
	early, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	if err := s.Wait(early); err == nil {
		t.Error("the output has ended before it did")
	}
	cancel()
	w.Close()
	late, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := s.Wait(late); err != nil || !bytes.Equal(out.Bytes(), big) {
		t.Errorf("%d bytes, %v", out.Len(), err)
	}
	select {
	case <-closed:
	case <-late.Done():
		t.Error("nobody was told that the input has ended")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 0 {
		t.Errorf("left: %v, %v", list, err)
	}
	if _, err := AttachStdio(task.IO{Stdout: "binary:///x"}, Streams{Stdout: &out}); err == nil {
		t.Error("attached to a logging program")
	}
}
