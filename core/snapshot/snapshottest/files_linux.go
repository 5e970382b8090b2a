package snapshottest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/lib/mountx"
)

// in runs fn with the mounts at a temporary directory.
func (e env) in(t *testing.T, mounts []mount.Mount, fn func(root string)) {
	t.Helper()
	must(t, mountx.WithTemp(e.ctx, t.TempDir(), mounts, func(root string) error {
		fn(root)
		return nil
	}))
}

// build makes the committed snapshot name of what fn changes on parent.
func (e env) build(t *testing.T, name, parent string, fn func(root string)) {
	t.Helper()
	e.in(t, e.prepare(t, name+"-active", parent), fn)
	e.commit(t, name, name+"-active")
}

// look runs fn with a view of parent.
func (e env) look(t *testing.T, parent string, fn func(root string)) {
	t.Helper()
	key := "look-" + parent
	e.in(t, e.view(t, key, parent), fn)
	must(t, e.Remove(e.ctx, key))
}

func write(t *testing.T, root, name, data string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755))
	must(t, os.WriteFile(filepath.Join(root, name), []byte(data), 0o644))
}

func reads(t *testing.T, root, name, want string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil || string(b) != want {
		t.Errorf("%s holds %q, expected %q (%v)", name, b, want, err)
	}
}

func absent(t *testing.T, root, name string) {
	t.Helper()
	if _, err := os.Lstat(filepath.Join(root, name)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is there (%v)", name, err)
	}
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	must(t, err)
	out := []string{}
	for _, e := range list {
		if e.Name() != "lost+found" {
			out = append(out, e.Name())
		}
	}
	return out
}

func testFiles(t *testing.T, e env) {
	e.build(t, "A", "", func(root string) {
		if got := entries(t, root); len(got) != 0 {
			t.Errorf("a snapshot on nothing has %q", got)
		}
		write(t, root, "etc/a", "one")
		write(t, root, "both", "from A")
	})
	e.build(t, "B", "A", func(root string) {
		reads(t, root, "etc/a", "one")
		write(t, root, "etc/b", "two")
		write(t, root, "both", "from B, longer")
	})
	e.look(t, "A", func(root string) {
		reads(t, root, "both", "from A")
		absent(t, root, "etc/b")
	})
	e.look(t, "B", func(root string) {
		reads(t, root, "etc/a", "one")
		reads(t, root, "etc/b", "two")
		reads(t, root, "both", "from B, longer")
	})
	// What is written stays between mounts.
	m := e.prepare(t, "c", "B")
	e.in(t, m, func(root string) { write(t, root, "c", "three") })
	again, err := e.Mounts(e.ctx, "c")
	must(t, err)
	e.in(t, again, func(root string) { reads(t, root, "c", "three") })
}

func testReadOnly(t *testing.T, e env) {
	e.layer(t, "A", "")
	e.build(t, "B", "A", func(root string) { write(t, root, "f", "x") })
	e.build(t, "C", "B", func(root string) { write(t, root, "g", "y") })
	for _, parent := range []string{"", "A", "B", "C"} {
		e.in(t, e.view(t, "v"+parent, parent), func(root string) {
			if err := os.WriteFile(filepath.Join(root, "new"), nil, 0o644); !errors.Is(err, syscall.EROFS) {
				t.Errorf("write to a view of %q: %v", parent, err)
			}
		})
	}
	e.look(t, "C", func(root string) {
		reads(t, root, "f", "x")
		reads(t, root, "g", "y")
		absent(t, root, "new")
	})
}

func testSiblings(t *testing.T, e env) {
	e.build(t, "base", "", func(root string) { write(t, root, "f", "base") })
	a, b := e.prepare(t, "a", "base"), e.prepare(t, "b", "base")
	e.in(t, a, func(ra string) {
		e.in(t, b, func(rb string) {
			write(t, ra, "f", "A's")
			write(t, ra, "only", "a")
			reads(t, rb, "f", "base")
			absent(t, rb, "only")
			write(t, rb, "f", "B's")
			reads(t, ra, "f", "A's")
		})
	})
	e.look(t, "base", func(root string) {
		reads(t, root, "f", "base")
		absent(t, root, "only")
	})
}

func testWhiteouts(t *testing.T, e env) {
	e.build(t, "A", "", func(root string) {
		write(t, root, "gone", "x")
		write(t, root, "dir/gone", "x")
		write(t, root, "dir/kept", "x")
		write(t, root, "tree/a/b/c", "x")
		write(t, root, "old", "moved")
	})
	e.build(t, "B", "A", func(root string) {
		must(t, os.Remove(filepath.Join(root, "gone")))
		must(t, os.Remove(filepath.Join(root, "dir/gone")))
		must(t, os.RemoveAll(filepath.Join(root, "tree")))
		must(t, os.Rename(filepath.Join(root, "old"), filepath.Join(root, "new")))
	})
	e.build(t, "C", "B", func(root string) {
		if got := entries(t, root); !slices.Equal(got, []string{"dir", "new"}) {
			t.Errorf("after the removal there are %q", got)
		}
		write(t, root, "gone", "again")
	})
	e.look(t, "C", func(root string) {
		reads(t, root, "gone", "again")
		reads(t, root, "new", "moved")
		absent(t, root, "old")
		if got := entries(t, filepath.Join(root, "dir")); !slices.Equal(got, []string{"kept"}) {
			t.Errorf("dir has %q", got)
		}
	})
	e.look(t, "A", func(root string) { reads(t, root, "tree/a/b/c", "x") })
}

func testOpaque(t *testing.T, e env) {
	e.build(t, "A", "", func(root string) {
		write(t, root, "dir/old", "x")
		write(t, root, "file", "x")
		must(t, os.Mkdir(filepath.Join(root, "was-dir"), 0o755))
	})
	e.build(t, "B", "A", func(root string) {
		must(t, os.RemoveAll(filepath.Join(root, "dir")))
		write(t, root, "dir/new", "y")
		must(t, os.Remove(filepath.Join(root, "file")))
		write(t, root, "file/now-a-directory", "y")
		must(t, os.Remove(filepath.Join(root, "was-dir")))
		must(t, os.Symlink("dir", filepath.Join(root, "was-dir")))
	})
	e.build(t, "C", "B", func(string) {})
	e.look(t, "C", func(root string) {
		if got := entries(t, filepath.Join(root, "dir")); !slices.Equal(got, []string{"new"}) {
			t.Errorf("the directory made anew has %q", got)
		}
		reads(t, root, "file/now-a-directory", "y")
		reads(t, root, "was-dir/new", "y")
	})
}

// testKinds checks all that a file can be, after a commit and in a child that
// touched it.
func testKinds(t *testing.T, e env) {
	stamp := time.Date(2001, 2, 3, 4, 5, 6, 700, time.UTC)
	long := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	e.build(t, "A", "", func(root string) {
		p := func(name string) string { return filepath.Join(root, name) }
		must(t, os.WriteFile(p("big"), long, 0o600))
		must(t, os.WriteFile(p("suid"), []byte("x"), 0o755))
		must(t, os.Chown(p("suid"), 12, 34))
		must(t, syscall.Chmod(p("suid"), 0o6751))
		must(t, os.Symlink("/nowhere/at/all", p("dangling")))
		must(t, os.Lchown(p("dangling"), 56, 78))
		must(t, os.WriteFile(p("link1"), []byte("linked"), 0o644))
		must(t, os.Link(p("link1"), p("link2")))
		must(t, syscall.Mkfifo(p("fifo"), 0o640))
		must(t, syscall.Mknod(p("null"), syscall.S_IFCHR|0o666, int(device(1, 3))))
		must(t, syscall.Mknod(p("disk"), syscall.S_IFBLK|0o660, int(device(7, 200))))
		must(t, os.Mkdir(p("sticky"), 0o777))
		must(t, syscall.Chmod(p("sticky"), 0o1777))
		must(t, os.WriteFile(p("attr"), nil, 0o644))
		must(t, syscall.Setxattr(p("attr"), "trusted.test", []byte("v\x00w"), 0))
		must(t, os.WriteFile(p("caps"), nil, 0o755))
		must(t, syscall.Setxattr(p("caps"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
		f, err := os.Create(p("sparse"))
		must(t, err)
		must(t, f.Truncate(64<<20))
		_, err = f.WriteAt([]byte("end"), 64<<20-3)
		must(t, err)
		must(t, f.Close())
		must(t, os.Mkdir(p("odd"), 0o755))
		must(t, os.WriteFile(p("odd/\xff\n:,\\ name"), []byte("odd"), 0o644))
		must(t, os.Chtimes(p("suid"), stamp, stamp))
		must(t, os.Chtimes(p("sticky"), stamp, stamp))
	})
	check := func(root string) {
		t.Helper()
		stat := func(name string) syscall.Stat_t {
			var st syscall.Stat_t
			if err := syscall.Lstat(filepath.Join(root, name), &st); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			return st
		}
		reads(t, root, "big", string(long))
		reads(t, root, "odd/\xff\n:,\\ name", "odd")
		if st := stat("suid"); st.Mode != syscall.S_IFREG|0o6751 || st.Uid != 12 || st.Gid != 34 || st.Mtim.Sec != stamp.Unix() || st.Mtim.Nsec != 700 {
			t.Errorf("suid is %o %d:%d of %d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec)
		}
		if st := stat("sticky"); st.Mode != syscall.S_IFDIR|0o1777 || st.Mtim.Sec != stamp.Unix() {
			t.Errorf("sticky is %o of %d", st.Mode, st.Mtim.Sec)
		}
		if st := stat("dangling"); st.Mode&syscall.S_IFMT != syscall.S_IFLNK || st.Uid != 56 || st.Gid != 78 {
			t.Errorf("dangling is %o %d:%d", st.Mode, st.Uid, st.Gid)
		}
		if to, err := os.Readlink(filepath.Join(root, "dangling")); to != "/nowhere/at/all" {
			t.Errorf("dangling links to %q (%v)", to, err)
		}
		if a, b := stat("link1"), stat("link2"); a.Ino != b.Ino || a.Nlink != 2 {
			t.Errorf("the hard links are two files, %d names", a.Nlink)
		}
		if st := stat("fifo"); st.Mode != syscall.S_IFIFO|0o640 {
			t.Errorf("fifo is %o", st.Mode)
		}
		if st := stat("null"); st.Mode != syscall.S_IFCHR|0o666&^umask || st.Rdev != device(1, 3) {
			t.Errorf("null is %o %x", st.Mode, st.Rdev)
		}
		if st := stat("disk"); st.Mode&syscall.S_IFMT != syscall.S_IFBLK || st.Rdev != device(7, 200) {
			t.Errorf("disk is %o %x", st.Mode, st.Rdev)
		}
		if st := stat("sparse"); st.Size != 64<<20 || st.Blocks*512 > 1<<20 {
			t.Errorf("sparse has %d bytes in %d", st.Size, st.Blocks*512)
		}
		for name, want := range map[[2]string]string{
			{"attr", "trusted.test"}:        "v\x00w",
			{"caps", "security.capability"}: "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		} {
			buf := make([]byte, 64)
			n, err := syscall.Getxattr(filepath.Join(root, name[0]), name[1], buf)
			if err != nil || string(buf[:n]) != want {
				t.Errorf("%s of %s is %q (%v)", name[1], name[0], buf[:max(n, 0)], err)
			}
		}
	}
	e.look(t, "A", check)
	e.build(t, "B", "A", check)
	e.look(t, "B", check)
}

// device is a number whose parts are below 256.
func device(major, minor uint64) uint64 { return major<<8 | minor }

// umask is what the test's processes usually have.
const umask = 0o022

// testRootDir checks that the root directory looks the same in a child.
func testRootDir(t *testing.T, e env) {
	e.build(t, "A", "", func(root string) {
		var st syscall.Stat_t
		must(t, syscall.Lstat(root, &st))
		if st.Mode&0o7777 != 0o755 || st.Uid != 0 || st.Gid != 0 {
			t.Errorf("root directory of an empty snapshot is %o %d:%d", st.Mode, st.Uid, st.Gid)
		}
		must(t, os.Chown(root, 1234, 2345))
		must(t, syscall.Chmod(root, 0o1750))
	})
	same := func(root string) {
		t.Helper()
		var st syscall.Stat_t
		must(t, syscall.Lstat(root, &st))
		if st.Mode&0o7777 != 0o1750 || st.Uid != 1234 || st.Gid != 2345 {
			t.Errorf("root directory is %o %d:%d", st.Mode, st.Uid, st.Gid)
		}
	}
	e.look(t, "A", same)
	e.build(t, "B", "A", same)
	e.build(t, "C", "B", same)
	e.look(t, "C", same)
}

func testChain(t *testing.T, e env) {
	const n = 12
	parent := ""
	for i := range n {
		name := fmt.Sprint("L", i)
		e.build(t, name, parent, func(root string) {
			write(t, root, fmt.Sprint("f", i), fmt.Sprint(i))
			write(t, root, "top", fmt.Sprint(i))
			if i > 0 {
				reads(t, root, fmt.Sprint("f", i-1), fmt.Sprint(i-1))
			}
		})
		parent = name
	}
	e.look(t, parent, func(root string) {
		for i := range n {
			reads(t, root, fmt.Sprint("f", i), fmt.Sprint(i))
		}
		reads(t, root, "top", fmt.Sprint(n-1))
	})
}

func testSizes(t *testing.T, e env) {
	const size = 1 << 20
	usage := func(key string) snapshot.Usage {
		t.Helper()
		u, err := e.Usage(e.ctx, key)
		must(t, err)
		return u
	}
	m := e.prepare(t, "a", "")
	empty := usage("a")
	e.in(t, m, func(root string) {
		must(t, os.WriteFile(filepath.Join(root, "f"), bytes.Repeat([]byte{1}, size), 0o644))
		must(t, os.Link(filepath.Join(root, "f"), filepath.Join(root, "g")))
		f, err := os.Open(filepath.Join(root, "f"))
		must(t, err)
		must(t, errors.Join(f.Sync(), f.Close())) // blocks are counted when they are allotted
	})
	live := usage("a")
	if grown := live.Size - empty.Size; grown < size || grown > size+128<<10 || live.Inodes != empty.Inodes+1 {
		t.Errorf("a file of %d bytes with two names made the usage %+v from %+v", size, live, empty)
	}
	e.commit(t, "A", "a")
	if u := usage("A"); u != live {
		t.Errorf("usage after commit is %+v, it was %+v", u, live)
	}
}

// testRebaseFiles makes three layers side by side and stacks them at commit.
func testRebaseFiles(t *testing.T, e env) {
	for _, k := range []string{"a", "b", "c"} {
		e.in(t, e.prepare(t, k, ""), func(root string) {
			write(t, root, "all", k)
			write(t, root, "dir/"+k, k)
		})
	}
	e.commit(t, "A", "a")
	must(t, e.Commit(e.ctx, "B", "b", snapshot.CommitOptions{Parent: "A"}))
	must(t, e.Commit(e.ctx, "C", "c", snapshot.CommitOptions{Parent: "B"}))
	e.look(t, "C", func(root string) {
		reads(t, root, "all", "c")
		for _, k := range []string{"a", "b", "c"} {
			reads(t, root, "dir/"+k, k)
		}
	})
}
