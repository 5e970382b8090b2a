package tarstream

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// contract: 3.3.7
func TestApplyAttributes(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	mod := time.Unix(1600000000, 123456789)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	long := strings.Repeat("long/", 60) + "name"
	mustApply(t, root, ApplyOptions{},
		entry{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}},
		entry{Header: tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o751, Uid: 7, ModTime: mod}},
		entry{Header: tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o2750, Uid: 5, Gid: 6, ModTime: mod}},
		entry{tar.Header{Name: "d/suid", Mode: 0o4755, Uid: 1000, Gid: 1001, ModTime: mod, PAXRecords: map[string]string{
			"SCHILY.xattr.user.k": "v\x00w", "SCHILY.xattr.security.capability": capability,
		}}, "body"},
		entry{Header: tar.Header{Name: "d/fifo", Typeflag: tar.TypeFifo, Mode: 0o622, Uid: 3, ModTime: mod}},
		entry{Header: tar.Header{Name: "d/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: mod}},
		entry{Header: tar.Header{Name: "d/loop", Typeflag: tar.TypeBlock, Mode: 0o660, Devmajor: 7, Devminor: 300, ModTime: mod}},
		entry{Header: tar.Header{Name: "d/link", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd", Uid: 9, Gid: 9, ModTime: mod}},
		hardlink("d/hard", "d/suid"),
		hardlink("d/hardsym", "d/link"),
		entry{tar.Header{Name: long, ModTime: mod}, strings.Repeat("x", 200_000)},
	)
	check := func(name string, mode, uid, gid uint32, rdev uint64) {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Fatal(err)
		}
		if st.Mode != mode || st.Uid != uid || st.Gid != gid || st.Rdev != rdev {
			t.Errorf("%s: mode %o owner %d:%d rdev %x", name, st.Mode, st.Uid, st.Gid, st.Rdev)
		}
		if got := time.Unix(st.Mtim.Unix()); !got.Equal(mod) {
			t.Errorf("%s: mtime %v", name, got)
		}
	}
	check(".", unix.S_IFDIR|0o751, 7, 0, 0)
	check("d", unix.S_IFDIR|0o2750, 5, 6, 0)
	check("d/suid", unix.S_IFREG|0o4755, 1000, 1001, 0)
	check("d/hard", unix.S_IFREG|0o4755, 1000, 1001, 0)
	check("d/fifo", unix.S_IFIFO|0o622, 3, 0, 0)
	check("d/null", unix.S_IFCHR|0o666, 0, 0, unix.Mkdev(1, 3))
	check("d/loop", unix.S_IFBLK|0o660, 0, 0, unix.Mkdev(7, 300))
	check("d/link", unix.S_IFLNK|0o777, 9, 9, 0)
	check("d/hardsym", unix.S_IFLNK|0o777, 9, 9, 0)
	check(long, unix.S_IFREG|0o644, 0, 0, 0)
	v := make([]byte, 64)
	if n, err := unix.Getxattr(filepath.Join(root, "d/suid"), "user.k", v); err != nil || string(v[:n]) != "v\x00w" {
		t.Errorf("user.k: %q %v", v[:max(n, 0)], err)
	}
	if n, err := unix.Getxattr(filepath.Join(root, "d/suid"), "security.capability", v); err != nil || string(v[:n]) != capability {
		t.Errorf("capability: %q %v", v[:max(n, 0)], err)
	}
	if fi, err := os.Stat(filepath.Join(root, "long")); err != nil || fi.Mode().Perm() != 0o755 {
		t.Errorf("missing parent: %v %v", fi, err)
	}
}

func TestApplyReplaces(t *testing.T) {
	root := t.TempDir()
	write(t, root, "file", "dir/x", "keep/x", "tofile/a/b")
	mustApply(t, root, ApplyOptions{},
		dir("file/"), file("file/in", "1"),
		symlink("dir", "keep"), file("dir/through", "2"),
		dir("keep/"), file("tofile", "3"),
		file("twice", "a"), file("twice", "b"),
		hardlink("self", "twice"), hardlink("self", "self"), hardlink("twice", "self"),
	)
	if got, want := names(t, root), "dir file file/in keep keep/through keep/x self tofile twice"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if b, _ := os.ReadFile(filepath.Join(root, "twice")); string(b) != "b" {
		t.Errorf("the last entry of a name counts, got %q", b)
	}
}

// contract: 3.3.2
func TestApplyWhiteoutsRemove(t *testing.T) {
	root := t.TempDir()
	write(t, root, "gone", "stay", "d/old", "d/sub/old", "e/old", "dir/a", "link/to")
	mustApply(t, root, ApplyOptions{},
		file(".wh.gone", ""), file(".wh.absent", ""), file("nodir/.wh.absent", ""), file("stay/.wh.below", ""),
		file("d/new", ""), file("d/sub/new", ""), file("d/.wh..wh..opq", ""),
		file("e/new", ""), file(".wh.e", ""), // what comes along stays, whatever the order
		file(".wh.dir", ""),
		file(".wh..wh.plnk/1.2", "aufs"),
	)
	if got, want := names(t, root), "d d/new d/sub d/sub/new e e/new link link/to stay"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// mountOverlay shows layers, the topmost first.
func mountOverlay(t *testing.T, layers ...string) string {
	t.Helper()
	needRoot(t)
	m := t.TempDir()
	if len(layers) == 1 {
		layers = append(layers, t.TempDir())
	}
	if err := unix.Mount("overlay", m, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(layers, ":")); err != nil {
		t.Skipf("no overlay here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(m, 0); err != nil {
			t.Error(err)
		}
	})
	return m
}

// contract: 3.3.2
func TestApplyWhiteoutsOverlay(t *testing.T) {
	needRoot(t)
	lower, upper := t.TempDir(), t.TempDir()
	write(t, lower, "gone", "stay", "d/old", "e/old", "f/old/x", "g/old", "usr/lib/x", "h/old", "i/j/old", "k")
	if err := os.Symlink("usr/lib", filepath.Join(lower, "lib")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Chmod(filepath.Join(lower, "i/j"), 0o1711); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(filepath.Join(lower, "i/j"), 12, 13); err != nil {
		t.Fatal(err)
	}
	old := time.Unix(1500000000, 42)
	if err := os.Chtimes(filepath.Join(lower, "i/j"), old, old); err != nil {
		t.Fatal(err)
	}
	mustApply(t, upper, ApplyOptions{Whiteouts: Overlay, Lowers: []string{lower}},
		file(".wh.gone", ""),
		dir("d/"), file("d/.wh..wh..opq", ""), file("d/new", ""),
		file(".wh.e", ""), dir("e/"), file("e/new", ""), // hides what was there
		dir("f/"), file("f/new", ""), file(".wh.f", ""),
		file(".wh.g", ""), file("g/new", ""),
		file("lib/y", "through the link of the lower layer"),
		file("i/j/new", ""),
		hardlink("l", "k"),
	)
	m := mountOverlay(t, upper, lower)
	want := "d d/new e e/new f f/new g g/new h h/old i i/j i/j/new i/j/old k l lib stay usr usr/lib usr/lib/x usr/lib/y"
	if got := names(t, m); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(upper, "i/j"), &st); err != nil || st.Mode != unix.S_IFDIR|0o1711 || st.Uid != 12 || st.Gid != 13 || st.Mtim.Sec != old.Unix() {
		t.Errorf("parent made unlike the lower one's: %o %d:%d %v %v", st.Mode, st.Uid, st.Gid, st.Mtim, err)
	}
	var k, l unix.Stat_t
	if unix.Lstat(filepath.Join(m, "k"), &k) != nil || unix.Lstat(filepath.Join(m, "l"), &l) != nil || k.Ino != l.Ino {
		t.Errorf("hard link to a lower file: inodes %d and %d", k.Ino, l.Ino)
	}
}

func TestApplyOpaqueRootOverlay(t *testing.T) {
	needRoot(t)
	lower, upper := t.TempDir(), t.TempDir()
	write(t, lower, "a", "b/c")
	mustApply(t, upper, ApplyOptions{Whiteouts: Overlay, Lowers: []string{lower}},
		dir("b/"), file("b/new", ""), file(".wh..wh..opq", ""))
	if got := names(t, mountOverlay(t, upper, lower)); got != "b b/new" {
		t.Errorf("got %s", got)
	}
}

// Two layers applied to one active snapshot, which builders do.
func TestApplyOverlayTwice(t *testing.T) {
	needRoot(t)
	lower, upper := t.TempDir(), t.TempDir()
	write(t, lower, "low", "d/low")
	opts := ApplyOptions{Whiteouts: Overlay, Lowers: []string{lower}}
	mustApply(t, upper, opts, file("first", ""), dir("d/"), file("d/first", ""), file("e/first", ""))
	mustApply(t, upper, opts, file(".wh.first", ""), file("d/.wh..wh..opq", ""), file("d/second", ""), file("e/second", ""))
	if got, want := names(t, mountOverlay(t, upper, lower)), "d d/second e e/first e/second low"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// contract: 3.3.7
func TestApplySkipsDevicesAndReports(t *testing.T) {
	root := t.TempDir()
	var n atomic.Int32
	opts := ApplyOptions{SkipDevices: true, Report: func(entry, what string) { n.Add(1) }}
	mustApply(t, root, opts,
		entry{Header: tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		entry{tar.Header{Name: "f", PAXRecords: map[string]string{
			"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.user.overlay.opaque": "y"}}, "x"})
	if got := names(t, root); got != "f" || n.Load() != 3 {
		t.Errorf("got %q and %d reports", got, n.Load())
	}
	if _, err := unix.Getxattr(filepath.Join(root, "f"), "user.overlay.opaque", nil); !errors.Is(err, unix.ENODATA) {
		t.Errorf("an image set overlay's own attribute: %v", err)
	}
}

func TestApplySparse(t *testing.T) {
	root := t.TempDir()
	// A sparse file of the 1.0 kind: 256 MiB with ten bytes at its end.
	const size = 1 << 28
	sparseMap := fmt.Sprintf("1\n%d\n10\n", size-10)
	sparse := func() []byte {
		var buf bytes.Buffer
		pax := ""
		for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=hole", fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
			n := len(kv) + 4
			if n >= 100 {
				n++
			}
			rec := fmt.Sprintf("%d %s\n", n, kv)
			if len(rec) != n {
				t.Fatalf("record %q", rec)
			}
			pax += rec
		}
		raw := func(name string, kind byte, body []byte) {
			var one bytes.Buffer
			tw := tar.NewWriter(&one)
			if err := tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(len(body)), Mode: 0o644}); err != nil {
				t.Fatal(err)
			}
			tw.Write(body)
			tw.Flush()
			b := one.Bytes()
			b[156] = kind
			copy(b[148:156], "        ")
			sum := 0
			for _, c := range b[:512] {
				sum += int(c)
			}
			copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
			buf.Write(b)
		}
		raw("PaxHeader", 'x', []byte(pax))
		block := make([]byte, 512)
		copy(block, sparseMap)
		raw("hole", '0', append(block, "0123456789"...))
		buf.Write(make([]byte, 1024))
		return buf.Bytes()
	}()
	if _, err := Apply(context.Background(), root, bytes.NewReader(sparse), ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, "hole"), &st); err != nil || st.Size != size || st.Blocks > 1024 {
		t.Errorf("size %d blocks %d: %v", st.Size, st.Blocks, err)
	}
	_, err := Apply(context.Background(), t.TempDir(), bytes.NewReader(sparse), ApplyOptions{Limits: Limits{Holes: size - 1}})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "sparse") {
		t.Errorf("over the limit: %v", err)
	}
}

// promise: C4
func TestApplyLimits(t *testing.T) {
	for name, c := range map[string]struct {
		limits  Limits
		entries []entry
		want    string
	}{
		"entries": {Limits{Entries: 2}, []entry{file("a", ""), file("b", ""), file("c", "")}, "more than 2 entries"},
		"path":    {Limits{Path: 10}, []entry{file(strings.Repeat("a/", 10)+"b", "")}, "longer than 10 bytes"},
		"target":  {Limits{Path: 10}, []entry{symlink("a", strings.Repeat("b", 11))}, "longer than 10 bytes"},
		"name":    {Limits{}, []entry{file(strings.Repeat("a", 256), "")}, "name too long"},
		"bytes":   {Limits{Bytes: 5}, []entry{file("a", "123"), file("b", "456")}, "more than 5 bytes"},
		"xattrs": {Limits{Xattrs: 10}, []entry{{tar.Header{Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "12345"}}, ""}},
			"extended attributes are longer than 10"},
		"owner":  {Limits{}, []entry{{tar.Header{Name: "a", Uid: 1<<32 - 1}, ""}}, "out of range"},
		"owner2": {Limits{}, []entry{{tar.Header{Name: "a", Gid: 1 << 32}, ""}}, "out of range"},
	} {
		t.Run(name, func(t *testing.T) {
			err := apply(t, t.TempDir(), ApplyOptions{Limits: c.limits}, c.entries...)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestApplyTruncated(t *testing.T) {
	whole := archive(t, dir("d/"), file("d/a", strings.Repeat("x", 1000)), file("d/b", strings.Repeat("y", 100_000)))
	for _, cut := range []int{700, 1600, 3000, 60_000} {
		_, err := Apply(context.Background(), t.TempDir(), bytes.NewReader(whole[:cut]), ApplyOptions{})
		if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), `"d/`) {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
	bad := bytes.Clone(whole)
	bad[512+3] ^= 1
	if _, err := Apply(context.Background(), t.TempDir(), bytes.NewReader(bad), ApplyOptions{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("broken header: %v", err)
	}
	boom := errors.New("boom")
	_, err := Apply(context.Background(), t.TempDir(), io.MultiReader(bytes.NewReader(whole[:3000]), iotestErr{boom}), ApplyOptions{})
	if !errors.Is(err, boom) {
		t.Errorf("the source's error: %v", err)
	}
}

type iotestErr struct{ error }

func (e iotestErr) Read([]byte) (int, error) { return 0, e.error }

func TestApplyCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	defer w.Close()
	done := make(chan error, 1)
	p := NewPump(ctx, r, nil)
	root := t.TempDir()
	go func() {
		_, err := Apply(ctx, root, p, ApplyOptions{})
		done <- err
	}()
	if _, err := w.Write(archive(t, file("a", "b"))[:1024]); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Apply does not end")
	}
	w.Close()
	p.Close()
}
