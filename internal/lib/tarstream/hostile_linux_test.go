package tarstream

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// yard is a directory with a target in it and things around the target that
// hostile archives aim at.
type yard struct{ top, target string }

func newYard(tb testing.TB) yard {
	tb.Helper()
	top := tb.TempDir()
	y := yard{top, filepath.Join(top, "a", "target")}
	write(tb, top, "secret", "a/secret", "a/dir/secret", "b/c/secret", "a/target/")
	if err := os.Symlink("secret", filepath.Join(top, "a", "link")); err != nil {
		tb.Fatal(err)
	}
	return y
}

// outside describes all but the target: names, contents, attributes, also the
// change times, which nobody can put back.
func (y yard) outside(tb testing.TB) string {
	tb.Helper()
	h := sha256.New()
	err := filepath.WalkDir(y.top, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if p == y.target {
			return filepath.SkipDir
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		fmt.Fprintln(h, p, st.Mode, st.Uid, st.Gid, st.Ino, st.Nlink, st.Size, st.Mtim, st.Ctim)
		if e.Type().IsRegular() {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			h.Write(b)
		}
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// contract: 10.14, 3.3.7
// promise: C1
func TestApplyRefuses(t *testing.T) {
	for _, c := range []struct {
		entries []entry
		name    string // what the error names
	}{
		{[]entry{file("../secret", "x")}, "../secret"},
		{[]entry{file("x/../../secret", "x")}, "x/../../secret"},
		{[]entry{file("/../secret", "x")}, "/../secret"},
		{[]entry{dir("../dir")}, "../dir"},
		{[]entry{dir("..")}, ".."},
		{[]entry{file(".", "x")}, "."},
		{[]entry{symlink("../l", "x")}, "../l"},
		{[]entry{hardlink("h", "../secret")}, "h"},
		{[]entry{hardlink("h", "../../secret")}, "h"},
		{[]entry{symlink("s", "../secret"), hardlink("h", "s/x")}, "h"},
		{[]entry{file("../.wh.secret", "")}, "../.wh.secret"},
		{[]entry{file("../dir/.wh..wh..opq", "")}, "../dir/.wh..wh..opq"},
		{[]entry{file(".wh...", "")}, ".wh..."},
		{[]entry{file("x/.wh...", "")}, "x/.wh..."},
		{[]entry{file(".wh..", "")}, ".wh.."},
		{[]entry{file(".wh.", "")}, ".wh."},
		{[]entry{symlink("loop", "loop"), file("loop/x", "")}, "loop/x"},
		{[]entry{file("f", ""), file("f/x", "")}, "f/x"},
		{[]entry{dir("d"), hardlink("h", "d")}, "h"},
	} {
		for _, mode := range []Whiteouts{Remove, Overlay} {
			y := newYard(t)
			before := y.outside(t)
			err := apply(t, y.target, ApplyOptions{Whiteouts: mode}, c.entries...)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), fmt.Sprintf("tar entry %q", c.name)) {
				t.Errorf("%s (%d): got %v", c.name, mode, err)
			}
			if y.outside(t) != before {
				t.Fatalf("%s changed something outside", c.name)
			}
		}
	}
}

// Links may point anywhere; what is written through them stays inside.
//
// contract: 10.14
// promise: C1
func TestApplyLinksStayInside(t *testing.T) {
	y := newYard(t)
	before := y.outside(t)
	mustApply(t, y.target, ApplyOptions{},
		file("/abs/file", "1"),
		symlink("up", ".."), file("up/from-up", "2"),
		symlink("far", "../../../../../../b/c"), file("far/secret", "3"),
		symlink("root", "/"), file("root/from-root", "4"),
		symlink("a1", "/abs"), symlink("a2", "a1/../up"), file("a2/from-a2", "5"),
		symlink("prc", "/proc/self/cwd"), file("prc/x", "6"),
		hardlink("hard", "far/secret"),
		symlink("hl", "../secret"), hardlink("hl2", "hl"),
		entry{Header: tar.Header{Name: "hl2", Typeflag: tar.TypeReg, Mode: 0o4777}},
		dir("up"), dir("up/in"),
	)
	if y.outside(t) != before {
		t.Fatal("something outside changed")
	}
	for name, want := range map[string]string{
		"abs/file": "1", "from-up": "2", "b/c/secret": "3", "from-root": "4", "from-a2": "5", "proc/self/cwd/x": "6", "hard": "3",
	} {
		if b, err := os.ReadFile(filepath.Join(y.target, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q %v", name, b, err)
		}
	}
}

// random makes an archive of a grammar that has all that has ever been abused.
func random(tb testing.TB, rnd *rand.Rand) []byte {
	part := func() string {
		return []string{"a", "b", "c", "..", ".", "dir", "secret", "link", "target", "A", ".wh.a", ".wh..wh..opq", ".wh.secret", ".wh...", strings.Repeat("n", 120)}[rnd.IntN(15)]
	}
	name := func() string {
		n := make([]string, 1+rnd.IntN(4))
		for i := range n {
			n[i] = part()
		}
		s := strings.Join(n, "/")
		if rnd.IntN(8) == 0 {
			s = "/" + s
		}
		return s
	}
	var entries []entry
	for range 4 + rnd.IntN(24) {
		// An entry that is refused would end the rest: most names are harmless.
		nm := name()
		if strings.Contains(nm, "..") && rnd.IntN(6) > 0 {
			nm = strings.ReplaceAll(strings.ReplaceAll(nm, "...", "b"), "..", "a")
			nm = strings.ReplaceAll(nm, ".wh.awh.aopq", ".wh..wh..opq")
		}
		target := []string{"../secret", "..", "/", "../..", "a", "b/c", "../../b/c", "/proc/self/root", "target", "../dir", "a/../../dir", name()}[rnd.IntN(12)]
		h := tar.Header{Name: nm, Mode: []int64{0o644, 0o4777, 0o1777, 0o700}[rnd.IntN(4)], Uid: rnd.IntN(3) * 1000}
		switch rnd.IntN(9) {
		case 0, 1:
			entries = append(entries, entry{h, strings.Repeat("evil", rnd.IntN(40))})
			continue
		case 2:
			h.Typeflag = tar.TypeDir
		case 3, 4:
			h.Typeflag, h.Linkname = tar.TypeSymlink, target
		case 5, 6:
			h.Typeflag, h.Linkname = tar.TypeLink, target
		case 7:
			h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, 1, 3
			if rnd.IntN(2) == 0 {
				h.Typeflag = tar.TypeFifo
			}
		case 8:
			h.Typeflag = tar.TypeDir
			h.PAXRecords = map[string]string{"SCHILY.xattr.user.x": "y"}
		}
		if h.Typeflag != tar.TypeDir {
			h.Name = strings.TrimRight(h.Name, "/")
		}
		entries = append(entries, entry{Header: h})
	}
	return archive(tb, entries...)
}

// contract: 10.14
// promise: C1
func TestApplyHostileGrammar(t *testing.T) {
	needRoot(t)
	y := newYard(t)
	lower := filepath.Join(y.top, "lower")
	write(t, lower, "a/b/x", "c/secret", "dir/y")
	if err := os.Symlink("../../secret", filepath.Join(lower, "link")); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(20, 26))
	before := y.outside(t)
	applied := 0
	for i := range 1000 {
		layer := random(t, rnd)
		opts := ApplyOptions{}
		if i%2 == 1 {
			opts.Whiteouts, opts.Lowers = Overlay, []string{lower}
		}
		_, err := Apply(context.Background(), y.target, bytes.NewReader(layer), opts)
		if err == nil {
			applied++
		} else if !errdefs.IsInvalidArgument(err) {
			t.Errorf("round %d: %v", i, err)
		}
		if i%25 == 24 { // the target collects what earlier layers left in it
			if y.outside(t) != before {
				t.Fatalf("round %d: something outside changed", i)
			}
			entries, _ := os.ReadDir(y.target)
			for _, e := range entries {
				if err := os.RemoveAll(filepath.Join(y.target, e.Name())); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if applied < 30 {
		t.Errorf("only %d layers were applied to their end: the grammar tests little", applied)
	}
}

// Somebody exchanges directories with links that lead out while layers are
// applied.
//
// contract: 10.14
// promise: C1
func TestApplySwapper(t *testing.T) {
	y := newYard(t)
	write(t, y.target, "d/e/f")
	aside := filepath.Join(y.target, "aside")
	if err := os.Symlink("../../../..", aside); err != nil {
		t.Fatal(err)
	}
	for _, l := range []string{"s1", "s2"} {
		if err := os.Symlink(y.top+"/a/dir", filepath.Join(y.target, l)); err != nil {
			t.Fatal(err)
		}
	}
	before := y.outside(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	swap := func(a, b string) {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = unix.Renameat2(unix.AT_FDCWD, filepath.Join(y.target, a), unix.AT_FDCWD, filepath.Join(y.target, b), unix.RENAME_EXCHANGE)
				}
			}
		})
	}
	swap("d/e", "s1")
	swap("d", "s2")
	layer := archive(t,
		dir("d/"), dir("d/e/"), file("d/e/secret", "evil"), entry{tar.Header{Name: "d/e/secret", Mode: 0o4777, Uid: 1}, "evil"},
		symlink("d/e/l", "x"), hardlink("d/e/h", "d/e/secret"), file("d/e/.wh.secret", ""), file("d/e/.wh..wh..opq", ""),
		entry{Header: tar.Header{Name: "d/e/secret", Typeflag: tar.TypeFifo, Mode: 0o777, Uid: 5}},
		dir("d/e/sub/"), file("d/e/sub/x", "evil"), file("d/secret", "evil"), file("d/.wh.secret", ""))
	ok := 0
	for range 500 {
		// Errors are expected: the tree changes under our feet.
		if _, err := Apply(context.Background(), y.target, bytes.NewReader(layer), ApplyOptions{}); err == nil {
			ok++
		}
	}
	close(stop)
	wg.Wait()
	if y.outside(t) != before {
		t.Fatal("something outside changed")
	}
	t.Logf("%d of 500 layers were applied", ok)
}

// promise: C1, C4
func FuzzApply(f *testing.F) {
	f.Add(archive(f, dir("d/"), file("d/f", "x"), symlink("d/l", ".."), hardlink("d/h", "d/f"), file("d/.wh.f", "")))
	f.Add(archive(f, file("../x", "")))
	f.Add(archive(f, entry{tar.Header{Name: "x", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}}, "x"}))
	rnd := rand.New(rand.NewPCG(1, 1))
	for range 8 {
		f.Add(random(f, rnd))
	}
	f.Fuzz(func(t *testing.T, layer []byte) {
		if len(layer) > 1<<20 {
			return
		}
		y := newYard(t)
		before := y.outside(t)
		limits := Limits{Entries: 1000, Holes: 1 << 24, Bytes: 1 << 24}
		for _, mode := range []Whiteouts{Remove, Overlay} {
			_, _ = Apply(context.Background(), y.target, bytes.NewReader(layer), ApplyOptions{Whiteouts: mode, SkipDevices: true, Limits: limits})
		}
		if y.outside(t) != before {
			t.Fatal("something outside changed")
		}
	})
}
