package overlay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/lib/fault"
)

// recorded unpacks the root directory of a stopped containerd 2.4 and returns
// its overlayfs directory.
func recorded(t *testing.T) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	out, err := exec.Command("tar", "-xzf", "../testdata/containerd-2.4-root.tgz", "-C", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	return filepath.Join(dir, "root", "io.containerd.snapshotter.v1.overlayfs")
}

// listing is everything at root: modes, owners, times, contents.
func listing(t *testing.T, root string) string {
	t.Helper()
	var lines []string
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		line := fmt.Sprintf("%s %s %d:%d", path, info.Mode(), st.Uid, st.Gid)
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %x", sha256.Sum256(b))
		}
		lines = append(lines, line)
		return nil
	}))
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

const (
	base = "default/2/sha256:b9aa00e6948d4ab1a76541dd9f9b2c1b8bcae35300d0d087de6c783cda46b615"
	mid  = "default/4/sha256:d78ca9e1c151a185f6f24b47a5f5b9f7eb51627b7d7fc8211ffa24e6473b0fcc"
	top  = "default/6/sha256:f957df36e1bdbe564a2b59cf1ea0ec66cfbad4014d5ba320d392f73989a862d1"
	box  = "default/7/box"
)

// A root of containerd's opens, works, and is left as it was by reading.
//
// contract: 3.1.2, 3.2.1
func TestRecordedRoot(t *testing.T) {
	root := recorded(t)
	before := listing(t, root)
	s, err := Open(root, Config{}, slog.New(slog.DiscardHandler))
	must(t, err)
	var keys []string
	must(t, s.Walk(t.Context(), func(i snapshot.Info) error {
		keys = append(keys, i.Name)
		return nil
	}))
	if want := []string{base, mid, top, box, "default/8/scratch"}; !slices.Equal(keys, want) {
		t.Errorf("it has %q", keys)
	}
	i, err := s.Stat(t.Context(), mid)
	must(t, err)
	if i.Kind != snapshot.KindCommitted || i.Parent != base ||
		i.Labels[snapshot.LabelRef] != strings.TrimPrefix(mid, "default/4/") ||
		i.Labels[snapshot.LabelParentChainID] != strings.TrimPrefix(base, "default/2/") ||
		i.CreatedAt.Format(time.DateOnly) != "2026-11-21" || !i.UpdatedAt.Equal(i.CreatedAt) {
		t.Errorf("the middle layer is %+v", i)
	}
	for key, want := range map[string]snapshot.Usage{base: {Inodes: 6, Size: 20480}, mid: {Inodes: 3, Size: 12288}, top: {Inodes: 3, Size: 8192}} {
		if u, err := s.Usage(t.Context(), key); err != nil || u != want {
			t.Errorf("usage of %s is %+v (%v), expected %+v", key, u, err, want)
		}
	}
	m, err := s.Mounts(t.Context(), box)
	must(t, err)
	if p := s.Check(t.Context()); len(p) != 0 {
		t.Errorf("check: %v", p)
	}
	must(t, s.Cleanup(t.Context()))
	must(t, s.Close())
	if after := listing(t, root); after != before {
		t.Errorf("opened and read, it went from\n%s\nto\n%s", before, after)
	}

	s = open(t, root, Config{})
	in(t, m, func(root string) {
		for name, want := range map[string]string{"data/hello.txt": "hello\n", "data/second.txt": "second\n"} {
			b, err := os.ReadFile(filepath.Join(root, name))
			if err != nil || string(b) != want {
				t.Errorf("%s holds %q (%v)", name, b, err)
			}
		}
		if _, err := os.Lstat(filepath.Join(root, "data/link")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the white-out does not hide the link (%v)", err)
		}
		touch(t, root, "written")
	})
	must(t, s.Commit(t.Context(), "default/9/mine", box, snapshot.CommitOptions{}))
	_, err = s.Prepare(t.Context(), "default/10/next", "default/9/mine", nil)
	must(t, err)
	if id := mustGet(t, s, "default/10/next"); id != 6 {
		t.Errorf("the next directory is %d", id)
	}
	if err := s.Remove(t.Context(), top); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("remove of a parent: %v", err)
	}
}

// state is what the callers know: keys and the file that each holds.
type state map[string]string

// scenario does one of everything and calls done after each step with what
// must be there from now on.
func scenario(t *testing.T, s *Store, done func(state)) {
	t.Helper()
	ctx := t.Context()
	now := state{}
	step := func(err error, change func()) {
		t.Helper()
		must(t, err)
		change()
		c := state{}
		for k, v := range now {
			c[k] = v
		}
		done(c)
	}
	file := func(key, name string) {
		must(t, os.WriteFile(filepath.Join(s.Data(mustGet(t, s, key)), name), bytes.Repeat([]byte(name), 1000), 0o644))
	}
	_, err := s.Prepare(ctx, "a", "", nil)
	step(err, func() { now["a"] = "" })
	file("a", "fa")
	step(s.Commit(ctx, "A", "a", snapshot.CommitOptions{}), func() { delete(now, "a"); now["A"] = "fa" })
	_, err = s.Prepare(ctx, "b", "A", nil)
	step(err, func() { now["b"] = "" })
	file("b", "fb")
	step(s.Commit(ctx, "B", "b", snapshot.CommitOptions{}), func() { delete(now, "b"); now["B"] = "fb" })
	_, err = s.View(ctx, "v", "B", nil)
	step(err, func() { now["v"] = "" })
	step(s.Remove(ctx, "v"), func() { delete(now, "v") })
	step(s.Remove(ctx, "B"), func() { delete(now, "B") })
}

// The directory as it is at every point of every operation opens again, has
// what was acknowledged, and nothing but garbage besides.
//
// contract: 3.2.1
// promise: P3
func TestCrash(t *testing.T) {
	needRoot(t)
	for _, sync := range []bool{true, false} {
		crashes := 0
		for _, point := range []string{"snapshot-made", "snapshot-filled", "snapshot-recorded", "snapshot-synced", "snapshot-committed", "snapshot-unrecorded", "snapshot-trashed"} {
			for n := 1; n <= 3; n++ {
				if !sync && (n > 1 || point != "snapshot-unrecorded") {
					continue // the same as with sync
				}
				t.Run(fmt.Sprintf("%s %d sync %t", point, n, sync), func(t *testing.T) {
					root, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
					hit := false
					points, err := fault.Parse(fmt.Sprintf("%s:%d", point, n), func(string) {
						hit = true
						if out, err := exec.Command("cp", "-a", root, image).CombinedOutput(); err != nil {
							t.Errorf("cp: %v: %s", err, out)
						}
					})
					must(t, err)
					s := open(t, root, Config{SyncRemove: sync}, WithFault(points))
					// What the image must equal: the state before or after the step under way.
					before, after := state{}, state(nil)
					scenario(t, s, func(now state) {
						switch {
						case !hit:
							before = now
						case after == nil:
							after = now
						}
					})
					if !hit {
						return // the scenario comes there less often
					}
					crashes++
					again := open(t, image, Config{SyncRemove: sync})
					got := state{}
					must(t, again.Walk(t.Context(), func(i snapshot.Info) error {
						got[i.Name] = ""
						if i.Kind != snapshot.KindCommitted {
							return nil
						}
						name := strings.ToLower("f" + i.Name)
						b, err := os.ReadFile(filepath.Join(again.Data(mustGet(t, again, i.Name)), name))
						if err == nil && bytes.Equal(b, bytes.Repeat([]byte(name), 1000)) {
							got[i.Name] = name
						}
						return nil
					}))
					if fmt.Sprint(got) != fmt.Sprint(before) && fmt.Sprint(got) != fmt.Sprint(after) {
						t.Errorf("after the crash it has %v; before the step it had %v, after it %v", got, before, after)
					}
					fsck(t, again) // only garbage, and Cleanup takes it
					// Work goes on, with a fresh directory.
					_, err = again.Prepare(t.Context(), "next", "", nil)
					must(t, err)
				})
			}
		}
		if sync && crashes < 10 {
			t.Errorf("only %d crashes", crashes)
		}
	}
}

// The process is really killed and the root opened by the next one.
//
// promise: P3
func TestKill(t *testing.T) {
	if spec := os.Getenv("GANTRY_TEST_KILL"); spec != "" {
		points, err := fault.Parse(spec, fault.Kill)
		must(t, err)
		s, err := Open(os.Getenv("GANTRY_TEST_ROOT"), Config{SyncRemove: true}, nil, WithFault(points))
		must(t, err)
		scenario(t, s, func(state) {})
		t.Fatal("not killed")
	}
	needRoot(t)
	for _, spec := range []string{"snapshot-filled:2", "snapshot-synced:2", "snapshot-trashed:1"} {
		t.Run(spec, func(t *testing.T) {
			root := t.TempDir()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestKill$")
			cmd.Env = append(os.Environ(), "GANTRY_TEST_KILL="+spec, "GANTRY_TEST_ROOT="+root)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("the process was not killed: %v\n%s", err, out)
			}
			s := open(t, root, Config{})
			garbage := 0
			for _, p := range s.Check(t.Context()) {
				if !p.Garbage {
					t.Errorf("check: %s", p)
				}
				garbage++
			}
			if garbage == 0 && spec != "snapshot-synced:2" {
				t.Error("it was killed in the middle, and left nothing")
			}
		})
	}
}

// While one request is stuck at its disk, at any point, others go on: no lock
// is held there.
//
// promise: P10
func TestNobodyWaits(t *testing.T) {
	// How often each point is passed before it is our turn.
	for point, passed := range map[string]int{"snapshot-made": 4, "snapshot-filled": 4, "snapshot-synced": 2, "snapshot-trashed": 0, "cleanup": 0} {
		t.Run(point, func(t *testing.T) {
			stuck, release := make(chan struct{}), make(chan struct{})
			points, err := fault.Parse(fmt.Sprintf("%s:%d", point, passed+1), func(string) {
				close(stuck)
				<-release
			})
			must(t, err)
			s := open(t, t.TempDir(), Config{SyncRemove: point == "snapshot-trashed"}, WithFault(points))
			layers(t, s, 2)
			_, err = s.Prepare(t.Context(), "removed", "L1", nil)
			must(t, err)
			_, err = s.Prepare(t.Context(), "committed", "L1", nil)
			must(t, err)
			done := make(chan error, 1)
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			go func() {
				switch point {
				case "snapshot-made", "snapshot-filled":
					_, err := s.Prepare(ctx, "x", "L1", nil)
					done <- err
				case "snapshot-synced":
					done <- s.Commit(ctx, "x", "committed", snapshot.CommitOptions{})
				case "snapshot-trashed":
					done <- s.Remove(ctx, "removed")
				case "cleanup":
					err := s.Remove(ctx, "removed")
					done <- errors.Join(err, s.Cleanup(ctx))
				}
			}()
			<-stuck
			rest := make(chan struct{})
			go func() {
				defer close(rest)
				_, err := s.Prepare(ctx, "y", "L1", nil)
				if err != nil {
					t.Error(err)
				}
				if err := s.Commit(ctx, "Y", "y", snapshot.CommitOptions{}); err != nil {
					t.Error(err)
				}
				if err := s.Walk(ctx, func(snapshot.Info) error { return nil }); err != nil {
					t.Error(err)
				}
				if err := s.Remove(ctx, "Y"); err != nil {
					t.Error(err)
				}
				if point != "cleanup" {
					if err := s.Cleanup(ctx); err != nil {
						t.Error(err)
					}
				}
			}()
			select {
			case <-rest:
			case <-time.After(20 * time.Second):
				t.Error("others wait for the one that is stuck")
			}
			close(release)
			if err := <-done; err != nil {
				t.Errorf("the one that was stuck: %v", err)
			}
			<-rest
			// Cleanup has not taken what was being made.
			for _, p := range s.Check(t.Context()) {
				if !p.Garbage {
					t.Errorf("check: %s", p)
				}
			}
		})
	}
}

// contract: 3.2.1, 1.3.31
func TestRemoval(t *testing.T) {
	for _, sync := range []bool{true, false} {
		t.Run(fmt.Sprint("sync ", sync), func(t *testing.T) {
			root := t.TempDir()
			s := open(t, root, Config{SyncRemove: sync})
			layers(t, s, 1)
			must(t, s.Remove(t.Context(), "L0"))
			left, err := os.ReadDir(filepath.Join(root, "snapshots"))
			must(t, err)
			if sync != (len(left) == 0) {
				t.Errorf("after Remove there are %v", left)
			}
			// What crashes and another daemon leave.
			for _, d := range []string{"17", "new-12345", "rm-9/fs/deep"} {
				must(t, os.MkdirAll(filepath.Join(root, "snapshots", d), 0o700))
			}
			must(t, os.MkdirAll(filepath.Join(root, "snapshots", "notes"), 0o700))
			must(t, s.Cleanup(t.Context()))
			if left, err = os.ReadDir(filepath.Join(root, "snapshots")); err != nil || len(left) != 1 || left[0].Name() != "notes" {
				t.Errorf("after Cleanup there are %v (%v)", left, err)
			}
			if p := s.Check(t.Context()); len(p) != 1 || p[0].Garbage || !strings.HasSuffix(p[0].Object, "notes") {
				t.Errorf("check: %v", p)
			}
			must(t, os.Remove(filepath.Join(root, "snapshots", "notes")))
		})
	}
}

// An id whose directory a crash left is not used for a new snapshot.
func TestLeftoverDirectory(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, Config{})
	must(t, os.MkdirAll(filepath.Join(root, "snapshots/1/fs"), 0o700))
	touch(t, filepath.Join(root, "snapshots/1/fs"), "stale")
	_, err := s.Prepare(t.Context(), "a", "", nil)
	must(t, err)
	if id := mustGet(t, s, "a"); id != 2 {
		t.Errorf("the snapshot got directory %d", id)
	}
}

func TestCheckFindsLoss(t *testing.T) {
	needRoot(t)
	s, err := Open(t.TempDir(), Config{}, nil)
	must(t, err)
	defer s.Close()
	layers(t, s, 2)
	must(t, os.RemoveAll(s.Dir(mustGet(t, s, "L0"))))
	p := s.Check(t.Context())
	if len(p) != 1 || p[0].Object != "L0" || p[0].Garbage {
		t.Errorf("check: %v", p)
	}
}

// What an image or a container makes of a directory, Cleanup takes away, and
// nothing outside of it.
func TestHostileTrees(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, Config{})
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.Mkdir(outside, 0o755))
	touch(t, outside, "precious")
	_, err := s.Prepare(t.Context(), "a", "", nil)
	must(t, err)
	data := s.Data(mustGet(t, s, "a"))
	must(t, os.Symlink(outside, filepath.Join(data, "link")))
	must(t, os.Symlink("link", filepath.Join(data, "link2")))
	must(t, unix.Mkfifo(filepath.Join(data, "fifo"), 0o600))
	must(t, os.MkdirAll(filepath.Join(data, "closed"), 0o000))
	// Deeper than a path can be written.
	const depth = 1500
	fd, err := unix.Open(data, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	must(t, err)
	for range depth {
		must(t, unix.Mkdirat(fd, "dddd", 0o755))
		next, err := unix.Openat(fd, "dddd", unix.O_DIRECTORY|unix.O_RDONLY, 0)
		unix.Close(fd)
		must(t, err)
		fd = next
	}
	unix.Close(fd)
	u, err := s.Usage(t.Context(), "a")
	if err != nil || u.Inodes != depth+5 {
		t.Errorf("usage is %+v (%v)", u, err)
	}
	must(t, s.Commit(t.Context(), "A", "a", snapshot.CommitOptions{}))
	must(t, s.Remove(t.Context(), "A"))
	must(t, s.Cleanup(t.Context()))
	if left, err := os.ReadDir(filepath.Join(root, "snapshots")); err != nil || len(left) != 0 {
		t.Errorf("after Cleanup there are %v (%v)", left, err)
	}
	exists(t, outside, "precious")
}

// A file system that is mounted in a removed snapshot is not emptied.
func TestCleanupStopsAtMounts(t *testing.T) {
	s := open(t, t.TempDir(), Config{})
	_, err := s.Prepare(t.Context(), "a", "", nil)
	must(t, err)
	place := filepath.Join(s.Data(mustGet(t, s, "a")), "mnt")
	must(t, os.Mkdir(place, 0o755))
	must(t, unix.Mount("tmpfs", place, "tmpfs", 0, "size=1m"))
	mounted := place
	defer func() { unix.Unmount(mounted, unix.MNT_DETACH) }()
	touch(t, place, "precious")
	must(t, s.Remove(t.Context(), "a"))
	mounted = filepath.Join(s.Root(), "snapshots/rm-1/fs/mnt")
	if err := s.Cleanup(t.Context()); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), mounted) {
		t.Errorf("cleanup under a mount: %v", err)
	}
	exists(t, mounted, "precious")
	must(t, unix.Unmount(mounted, 0))
	must(t, s.Cleanup(t.Context()))
}

// A full disk: nothing half made is shown, and what was there stays.
func TestDiskFull(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, 8<<20))
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", image).CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext4: %v: %s", err, out)
	}
	in(t, []mount.Mount{{Type: "ext4", Source: image, Options: []string{"loop"}}}, func(fsroot string) {
		s, err := Open(filepath.Join(fsroot, "store"), Config{}, nil)
		must(t, err)
		defer s.Close()
		layers(t, s, 1)
		_, err = s.Prepare(t.Context(), "a", "L0", nil)
		must(t, err)
		full := filepath.Join(s.Data(mustGet(t, s, "a")), "full")
		f, err := os.Create(full)
		must(t, err)
		for block := make([]byte, 4096); err == nil; {
			_, err = f.Write(block)
		}
		f.Close()
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		var failed error
		made := 0
		for i := range 5000 {
			if _, failed = s.Prepare(t.Context(), fmt.Sprintf("k%d", i), "L0", nil); failed != nil {
				break
			}
			made++
		}
		if !errors.Is(failed, unix.ENOSPC) {
			t.Errorf("prepare on a full disk: %v after %d", failed, made)
		}
		for _, p := range s.Check(t.Context()) {
			t.Errorf("check: %s", p)
		}
		exists(t, s.Data(mustGet(t, s, "L0")), "f0")
		must(t, os.Remove(full))
		_, err = s.Prepare(t.Context(), "again", "L0", nil)
		must(t, err)
		must(t, s.Commit(t.Context(), "AGAIN", "again", snapshot.CommitOptions{}))
	})
}

// A cancelled request leaves nothing.
func TestCancelled(t *testing.T) {
	s := open(t, t.TempDir(), Config{})
	layers(t, s, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Prepare(ctx, "a", "L0", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("prepare: %v", err)
	}
	_, err := s.Prepare(t.Context(), "a", "L0", nil)
	must(t, err)
	if err := s.Commit(ctx, "A", "a", snapshot.CommitOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("commit: %v", err)
	}
	if _, err := s.Usage(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("usage: %v", err)
	}
	if p := s.Check(t.Context()); len(p) != 0 {
		t.Errorf("check: %v", p)
	}
	must(t, s.Commit(t.Context(), "A", "a", snapshot.CommitOptions{}))
}

// One life of a container's snapshot, without its mounts.
func BenchmarkPrepareRemove(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("mounts need root")
	}
	for _, writers := range []int{1, 4, 16} {
		b.Run(fmt.Sprint("writers ", writers), func(b *testing.B) {
			s, err := Open(b.TempDir(), Config{}, nil)
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			ctx := b.Context()
			if _, err := s.Prepare(ctx, "a", "", nil); err != nil {
				b.Fatal(err)
			}
			if err := s.Commit(ctx, "A", "a", snapshot.CommitOptions{}); err != nil {
				b.Fatal(err)
			}
			b.ResetTimer()
			var wg sync.WaitGroup
			for w := range writers {
				wg.Add(1)
				go func() {
					defer wg.Done()
					for i := w; i < b.N; i += writers {
						key := fmt.Sprint("k", i)
						_, err := s.Prepare(ctx, key, "A", nil)
						if err == nil {
							err = s.Remove(ctx, key)
						}
						if err != nil {
							b.Error(err)
							return
						}
					}
				}()
			}
			wg.Wait()
		})
	}
}
