//go:build linux

package main_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	"golang.org/x/sys/unix"
)

// BenchmarkShim measures what a container and a process in it cost, from the
// start of the shim to its end, by driver.
func BenchmarkShim(b *testing.B) {
	for _, name := range []string{"", "runc"} {
		b.Run("driver="+name, func(b *testing.B) {
			d := newDaemon(b)
			var times [5]time.Duration
			n := 0
			for b.Loop() {
				k := d.newTask(fmt.Sprint("b", n), "true")
				k.opts = &options.Options{BinaryName: name, Root: k.opts.Root}
				n++
				t := time.Now()
				step := func(i int) {
					now := time.Now()
					times[i] += now.Sub(t)
					t = now
				}
				k.start()
				step(0)
				k.create()
				step(1)
				k.must("Start", &taskapi.StartRequest{ID: k.id}, &taskapi.StartResponse{})
				step(2)
				k.wait("")
				step(3)
				k.delete("")
				step(4)
				k.shutdown()
			}
			for i, what := range []string{"bootstrap", "create", "start", "wait", "delete"} {
				b.ReportMetric(float64(times[i].Microseconds())/1000/float64(n), "ms-"+what)
			}
		})
		b.Run("exec/driver="+name, func(b *testing.B) {
			k := newDaemon(b).newTask("c1", "sleep", "1000")
			k.opts.BinaryName = name
			k.run()
			n := 0
			for b.Loop() {
				id := fmt.Sprint("e", n)
				n++
				k.exec(id, nil, "true")
				k.wait(id)
				k.delete(id)
			}
			k.kill("", unix.SIGKILL)
			k.wait("")
			k.delete("")
			k.shutdown()
		})
	}
	b.Run("idle", func(b *testing.B) {
		k := newDaemon(b).newTask("c1", "sleep", "1000").fifos().run()
		time.Sleep(3 * time.Second) // memory goes back after two
		smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", k.shimPid))
		if err != nil {
			b.Fatal(err)
		}
		for _, line := range strings.Split(string(smaps), "\n") {
			var kb int
			var name string
			if _, err := fmt.Sscanf(line, "%s %d kB", &name, &kb); err == nil && (name == "Pss:" || name == "Pss_Anon:" || name == "Rss:") {
				b.ReportMetric(float64(kb), "KiB-"+strings.TrimSuffix(name, ":"))
			}
		}
		k.kill("", unix.SIGKILL)
		k.wait("")
		k.delete("")
		k.shutdown()
	})
}
