// Command bench runs the same work against gantryd and Debian's containerd in
// turn, by the same client code (containerd's own Go client), and prints both
// with their ratio. It needs root, busybox-static and runc, and touches nothing
// but directories, sockets and cgroups of its own.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	apitasks "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"

	"github.com/gantryd/gantry/test/daemontest"
	"github.com/gantryd/gantry/test/testimage"
)

// bench is what the works share.
type bench struct {
	reg          *testimage.Registry
	small, large string // references
	pause        string
	many         []string // by round
	round        int      // that is under way
	quick        int      // divides the number of operations
	unique       atomic.Uint64
}

func (b *bench) scaled(n int) int { return max(1, n/b.quick) }

func main() {
	rounds := flag.Int("rounds", 5, "how often each work is done by each daemon")
	only := flag.String("only", "", "comma-separated `works` to do (default all)")
	write := flag.Bool("write", false, "write RESULTS.md; its notes are kept")
	quick := flag.Int("quick", 1, "divide the operations of a round by this")
	list := flag.Bool("list", false, "list the works and end")
	flag.Parse()
	chosen, err := choose(*only)
	if err == nil && *list {
		for _, w := range chosen {
			fmt.Printf("%s\t%s\n", w.key, w.rows[0].name)
		}
		return
	}
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		ctx, cancel := context.WithTimeout(withNamespace(ctx), 20*time.Minute)
		defer cancel()
		err = run(ctx, chosen, max(1, *rounds), max(1, *quick), *write)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// kinds finds both programs.
func kinds() ([2]kind, error) {
	deb, err := daemontest.Debian("containerd")
	if err != nil {
		return [2]kind{}, err
	}
	own := cmp.Or(os.Getenv("GANTRY_BIN"), "../bin")
	own, err = filepath.Abs(own)
	if err != nil {
		return [2]kind{}, err
	}
	out := [2]kind{{"containerd", deb, 2}, {"gantry", filepath.Join(own, "gantryd"), 4}}
	for _, k := range out {
		if _, err := os.Stat(k.bin); err != nil {
			return out, fmt.Errorf("%s is needed (make, scripts/deps test): %w", k.name, err)
		}
	}
	return out, nil
}

func run(ctx context.Context, chosen []work, rounds, quick int, write bool) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("root is needed: containers are run")
	}
	ks, err := kinds()
	if err != nil {
		return err
	}
	begin := time.Now()
	reg := testimage.NewRegistry()
	defer reg.Close()
	b := &bench{quick: quick, reg: reg}
	for _, i := range []struct {
		ref  *string
		name string
		make func() (*testimage.Image, error)
	}{{&b.small, "small", small}, {&b.large, "large", large}, {&b.pause, "pause", testimage.NewPause}} {
		img, err := i.make()
		if err != nil {
			return err
		}
		*i.ref = reg.Put("bench/"+i.name, "latest", img)
	}
	var ds [2]*daemon
	for i, k := range ks {
		d, err2 := newDaemon(k)
		if err2 != nil {
			return err2
		}
		ds[i] = d
		defer func() {
			left := d.remove()
			if err == nil && len(left) > 0 {
				err = fmt.Errorf("%s left behind: %s", k.name, strings.Join(left, "; "))
			}
		}()
		if _, err := d.start(ctx); err != nil {
			return err
		}
		if err := d.prepare(ctx, b.small); err != nil {
			return fmt.Errorf("%s: %w\n%s", k.name, err, d.tail())
		}
	}
	machine := machineLine(ctx, ds)
	fmt.Println(machine)
	var results []result
	for _, w := range chosen {
		part := make([]result, len(w.rows))
		for i, r := range w.rows {
			part[i] = result{row: r, key: w.key}
		}
		n := rounds
		if w.rounds > 0 {
			n = min(n, w.rounds)
		}
		for round := range n {
			b.round = round
			for turn := range ds {
				// Who goes first changes, so that neither profits from it.
				which := (turn + round) % 2
				s, err := w.run(ctx, b, ds[which])
				if err != nil {
					return fmt.Errorf("%s, %s: %w\n%s", ks[which].name, w.key, err, ds[which].tail())
				}
				for i := range s {
					if which == 0 {
						part[i].containerd = append(part[i].containerd, s[i])
					} else {
						part[i].gantry = append(part[i].gantry, s[i])
					}
				}
			}
		}
		for _, r := range part {
			fmt.Printf("%-50s %s\n", r.name, spread(r.ratios()))
		}
		results = append(results, part...)
	}
	fmt.Println()
	var out bytes.Buffer
	if err := table(&out, results); err != nil {
		return err
	}
	fmt.Print(out.String())
	for _, r := range results {
		if r.slower() {
			fmt.Printf("slower than containerd: %s, %s times\n", r.name, spread(r.ratios()))
		}
	}
	fmt.Printf("%.0f s\n", time.Since(begin).Seconds())
	if !write {
		return nil
	}
	old, err := os.ReadFile("RESULTS.md")
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.WriteFile("RESULTS.md", report(machine, rounds, out.String(), string(old)), 0o644)
}

// prepare pulls the image that containers are made of.
func (d *daemon) prepare(ctx context.Context, ref string) error {
	if err := pull(ctx, d, ref); err != nil {
		return err
	}
	img, err := d.client.GetImage(ctx, ref)
	d.image = img
	return err
}

// listed is how many running tasks the daemon lists.
func listed(ctx context.Context, d *daemon) (int, error) {
	r, err := d.client.TaskService().List(ctx, &apitasks.ListTasksRequest{})
	if err != nil {
		return 0, err
	}
	n := 0
	for _, t := range r.Tasks {
		if t.Status == tasktypes.Status_RUNNING {
			n++
		}
	}
	return n, nil
}

func typeurlAny(v any) (typeurl.Any, error) { return typeurl.MarshalAny(v) }

func machineLine(ctx context.Context, ds [2]*daemon) string {
	var uts syscall.Utsname
	syscall.Uname(&uts)
	kernel := ""
	for _, c := range uts.Release {
		if c == 0 {
			break
		}
		kernel += string(rune(c))
	}
	var fs syscall.Statfs_t
	syscall.Statfs(os.TempDir(), &fs)
	types := map[int64]string{0xef53: "ext4", 0x58465342: "xfs", 0x9123683e: "btrfs", 0x01021994: "tmpfs"}
	fsName := types[int64(fs.Type)]
	if fsName == "" {
		fsName = fmt.Sprintf("file system %#x", fs.Type)
	}
	runc := "no runc"
	if out, err := exec.Command("runc", "--version").Output(); err == nil {
		runc = strings.Replace(strings.SplitN(string(out), "\n", 2)[0], " version ", " ", 1)
	}
	line := fmt.Sprintf("%d cores, Linux %s, %s, %s, %s, %s", runtime.NumCPU(), kernel, platforms.DefaultString(), fsName, runtime.Version(), runc)
	for _, d := range ds {
		if v, err := d.client.Version(ctx); err == nil {
			line += fmt.Sprintf("; %s %s", d.name, v.Version)
		}
	}
	return line
}

// report is the text of RESULTS.md. What stands under "## Notes" is by hand
// and stays.
func report(machine string, rounds int, table, old string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "# Gantry beside Debian's containerd\n\nWritten by `scripts/bench -rounds %d -write` on %s.\n\n%s.\n\n", rounds, time.Now().UTC().Format("2006-01-02"), machine)
	b.WriteString("One run, both daemons, the same client code; each cell is the median of the rounds with the smallest and the largest in brackets. The ratio is gantry's over containerd's,\nround by round: below 1 gantry needs less. CPU is that of the daemon, its shims, runtimes and containers per operation. A row again: `scripts/bench -only KEY`, KEY from the last column.\n\n")
	b.WriteString(table)
	if n := notes(old); n != "" {
		b.WriteString("\n" + n)
	}
	return []byte(b.String())
}

func notes(old string) string {
	if i := strings.Index(old, "## Notes\n"); i >= 0 {
		return old[i:]
	}
	return ""
}
