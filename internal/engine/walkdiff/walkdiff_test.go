package walkdiff

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/diff/difftest"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/lib/tarstream"
)

// contract: 1.3.11, 1.3.12, 1.5.10, 3.3.2, 3.3.3, 6.5.5
func TestConformance(t *testing.T) {
	for name, opts := range map[string]Options{"plain": {}, "verified": {VerifyBlobs: true}} {
		t.Run(name, func(t *testing.T) {
			difftest.Run(t, func(t *testing.T) difftest.Env {
				store := memory.NewContent()
				opts.TempDir = t.TempDir()
				return difftest.Env{Service: Chain{refuser{}, New(store, opts)}, Content: store}
			})
		})
	}
}

// refuser is a differ that does nothing.
type refuser struct{ diff.Service }

func (refuser) Apply(context.Context, ocispec.Descriptor, []mount.Mount, diff.ApplyOptions) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, errdefs.ErrNotImplemented
}

func (refuser) Compare(context.Context, []mount.Mount, []mount.Mount, diff.CompareOptions) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, errdefs.ErrNotImplemented
}

// contract: 3.3.1
func TestChainOrder(t *testing.T) {
	if _, err := (Chain{}).Apply(t.Context(), ocispec.Descriptor{}, nil, diff.ApplyOptions{}); !errdefs.IsNotImplemented(err) {
		t.Errorf("no differ: %v", err)
	}
	store := memory.NewContent()
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("x")}
	// The first that does not refuse decides, also with an error.
	if _, err := (Chain{refuser{}, New(store, Options{}), refuser{}}).Apply(t.Context(), desc, difftest.Bind(t.TempDir()), diff.ApplyOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

func tarOf(tb testing.TB, entries ...*tar.Header) []byte {
	tb.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range entries {
		body := h.Name
		if h.Typeflag == 0 {
			h.Typeflag, h.Size = tar.TypeReg, int64(len(body))
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := tw.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(tw, body); err != nil {
				tb.Fatal(err)
			}
		}
	}
	if err := tw.Close(); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func gz(tb testing.TB, data []byte) []byte {
	tb.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(data); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func zst(tb testing.TB, data []byte, opts ...zstd.EOption) []byte {
	tb.Helper()
	var buf bytes.Buffer
	w, err := zstd.NewWriter(&buf, opts...)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func tree(tb testing.TB, root string) string {
	tb.Helper()
	var out []string
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		line := fmt.Sprintf("%s %o %d:%d", rel, st.Mode, st.Uid, st.Gid)
		switch {
		case e.IsDir():
		case e.Type().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			v := make([]byte, 64)
			n, _ := unix.Lgetxattr(p, "user.x", v)
			line += fmt.Sprintf(" links=%d %s user.x=%q %v", st.Nlink, digest.FromBytes(b), v[:max(n, 0)], st.Mtim)
		case e.Type() == fs.ModeSymlink:
			target, _ := os.Readlink(p)
			line += fmt.Sprintf(" -> %s %v", target, st.Mtim)
		default:
			line += fmt.Sprintf(" %d %v", st.Rdev, st.Mtim)
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return strings.Join(out, "\n")
}

// contract: 3.3.2
func TestApplyStreams(t *testing.T) {
	store := memory.NewContent()
	e := New(store, Options{})
	data := tarOf(t, &tar.Header{Name: "a"}, &tar.Header{Name: "d", Typeflag: tar.TypeDir}, &tar.Header{Name: "d/b"})
	skippable := []byte{0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'x', 'y', 'z'}
	half := len(data) / 2
	for name, c := range map[string]struct {
		mediaType string
		blob      []byte
	}{
		"gzip of many members":     {ocispec.MediaTypeImageLayerGzip, append(gz(t, data[:half]), gz(t, data[half:])...)},
		"zstd":                     {ocispec.MediaTypeImageLayerZstd, zst(t, data)},
		"zstd after a skippable":   {ocispec.MediaTypeImageLayerZstd, append(bytes.Clone(skippable), zst(t, data)...)},
		"zstd before a skippable":  {ocispec.MediaTypeImageLayerZstd, append(zst(t, data), skippable...)},
		"zstd of many frames":      {ocispec.MediaTypeImageLayerZstd, append(append(zst(t, data[:half]), skippable...), zst(t, data[half:])...)},
		"zstd that docker named":   {"application/vnd.docker.image.rootfs.diff.tar.zstd", zst(t, data)},
		"gzip that is called zstd": {ocispec.MediaTypeImageLayerZstd, gz(t, data)},
		"plain that docker named":  {"application/vnd.docker.image.rootfs.foreign.diff.tar", data},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			var last int64
			got, err := e.Apply(t.Context(), difftest.Put(t, store, c.mediaType, c.blob), difftest.Bind(root),
				diff.ApplyOptions{Progress: func(n int64) { last = n }})
			if err != nil {
				t.Fatal(err)
			}
			if got.Digest != digest.FromBytes(data) || got.Size != int64(len(data)) {
				t.Errorf("got %+v", got)
			}
			if last != int64(len(c.blob)) {
				t.Errorf("progress ended at %d of %d", last, len(c.blob))
			}
			if b, err := os.ReadFile(filepath.Join(root, "d/b")); string(b) != "d/b" {
				t.Error(string(b), err)
			}
		})
	}
}

// promise: C4
func TestBombs(t *testing.T) {
	store := memory.NewContent()
	// A quarter of a gigabyte of zeros in as many kilobytes, as a file.
	const size = 1 << 28
	bomb := func(w io.Writer) {
		tw := tar.NewWriter(w)
		if err := tw.WriteHeader(&tar.Header{Name: "zeros", Mode: 0o644, Size: size}); err != nil {
			t.Fatal(err)
		}
		zeros := make([]byte, 1<<20)
		for range size / len(zeros) {
			if _, err := tw.Write(zeros); err != nil {
				t.Fatal(err)
			}
		}
		if err := tw.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var gzBomb, zstBomb bytes.Buffer
	gw, _ := gzip.NewWriterLevel(&gzBomb, gzip.BestSpeed)
	bomb(gw)
	gw.Close()
	zw, err := zstd.NewWriter(&zstBomb, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	bomb(zw)
	zw.Close()
	e := New(store, Options{Limits: tarstream.Limits{Bytes: 16 << 20}})
	for mediaType, blob := range map[string][]byte{ocispec.MediaTypeImageLayerGzip: gzBomb.Bytes(), ocispec.MediaTypeImageLayerZstd: zstBomb.Bytes()} {
		desc := difftest.Put(t, store, mediaType, blob)
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		_, err := e.Apply(t.Context(), desc, difftest.Bind(t.TempDir()), diff.ApplyOptions{})
		runtime.ReadMemStats(&after)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "more than 16777216 bytes") || !strings.Contains(err.Error(), `"zeros"`) {
			t.Errorf("%s: %v", mediaType, err)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 32<<20 {
			t.Errorf("%s: %d bytes of memory were used", mediaType, used)
		}
	}
	// A frame that asks for a window of a gigabyte is refused, not allocated.
	wide := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 20 << 3}
	wide = append(wide, make([]byte, 64)...)
	_, err = e.Apply(t.Context(), difftest.Put(t, store, ocispec.MediaTypeImageLayerZstd, wide), difftest.Bind(t.TempDir()), diff.ApplyOptions{})
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "window") {
		t.Errorf("wide window: %v", err)
	}
}

func TestDamageNamesTheByte(t *testing.T) {
	store := memory.NewContent()
	rnd := rand.New(rand.NewPCG(1, 2))
	var headers []*tar.Header
	for range 1500 {
		headers = append(headers, &tar.Header{Name: fmt.Sprintf("%x", rnd.Uint64())})
	}
	whole := tarOf(t, headers...)
	for mediaType, blob := range map[string][]byte{ocispec.MediaTypeImageLayerGzip: gz(t, whole), ocispec.MediaTypeImageLayerZstd: zst(t, whole)} {
		for name, data := range map[string][]byte{"cut": blob[:len(blob)*2/3], "overwritten": overwrite(blob)} {
			desc := difftest.Put(t, store, mediaType, data)
			for _, verify := range []bool{false, true} {
				_, err := New(store, Options{VerifyBlobs: verify}).Apply(t.Context(), desc, difftest.Bind(t.TempDir()), diff.ApplyOptions{})
				if !errdefs.IsDataLoss(err) && !errdefs.IsInvalidArgument(err) || !strings.Contains(fmt.Sprint(err), desc.Digest.String()) {
					t.Errorf("%s %s: %v", mediaType, name, err)
				}
				if errdefs.IsDataLoss(err) && !strings.Contains(err.Error(), fmt.Sprintf("of %d", len(data))) {
					t.Errorf("%s %s does not say where: %v", mediaType, name, err)
				}
			}
		}
	}
}

func overwrite(b []byte) []byte {
	b = bytes.Clone(b)
	for i := range 64 {
		b[len(b)/2+i] ^= 0xa5
	}
	return b
}

// redirect is a content store that gives one blob for every name.
type redirect struct {
	*memory.Content
	to digest.Digest
}

func (r redirect) Open(ctx context.Context, _ digest.Digest) (content.ReaderAt, error) {
	return r.Content.Open(ctx, r.to)
}

func TestVerifiesBlobs(t *testing.T) {
	store := memory.NewContent()
	good, other := tarOf(t, &tar.Header{Name: "good"}), tarOf(t, &tar.Header{Name: "evil"})
	for _, c := range []struct {
		mediaType    string
		pack         func([]byte) []byte
		verify, fail bool
	}{
		{ocispec.MediaTypeImageLayer, bytes.Clone, false, true},
		{ocispec.MediaTypeImageLayerGzip, func(b []byte) []byte { return gz(t, b) }, true, true},
		{ocispec.MediaTypeImageLayerGzip, func(b []byte) []byte { return gz(t, b) }, false, false},
	} {
		stored := difftest.Put(t, store, c.mediaType, c.pack(other))
		asked := stored
		asked.Digest = digest.FromBytes(c.pack(good))
		e := New(redirect{store, stored.Digest}, Options{VerifyBlobs: c.verify})
		_, err := e.Apply(t.Context(), asked, difftest.Bind(t.TempDir()), diff.ApplyOptions{})
		if errdefs.IsFailedPrecondition(err) != c.fail {
			t.Errorf("%s verify=%v: %v", c.mediaType, c.verify, err)
		}
	}
}

// contract: 3.3.2, 3.3.3, 3.3.7
func TestOverlayRoundTrip(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts overlays")
	}
	base := t.TempDir()
	lower, upper, work := filepath.Join(base, "lower"), filepath.Join(base, "upper"), filepath.Join(base, "work")
	for _, d := range []string{lower, upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script(t, lower, `mkdir -p d/keep d/gone tofile opaque/x perm; echo 1 >same; echo 2 >changed; echo 3 >gone; echo 4 >d/gone/x
		echo 5 >d/keep/x; echo 6 >todir; echo 7 >tofile/x; echo 8 >opaque/x/y; echo 9 >h1; ln h1 h2; ln -s same l; echo 10 >perm/x`)
	merged := overlay(t, lower, upper, work)
	script(t, merged, `echo new >changed; rm gone; rm -r d/gone; rm todir; mkdir todir; echo in >todir/in; rm -r tofile; echo f >tofile
		rm -r opaque; mkdir opaque; echo z >opaque/z; echo n >n1; ln n1 n2; ln n1 deep-n3; mknod null c 1 3; mkfifo fifo; chmod 1711 perm; chown 5:6 perm/x; chmod 4755 perm/x
		ln -sf changed l; touch -d '2001-02-03 04:05:06.789' changed; mkdir -p deep/er/est; echo u >deep/er/est/f`)
	if err := unix.Setxattr(filepath.Join(merged, "tofile"), "user.x", []byte("value"), 0); err != nil {
		t.Fatal(err)
	}
	want := tree(t, merged)
	store := memory.NewContent()
	e := New(store, Options{TempDir: t.TempDir()})
	active := []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"index=off", "workdir=" + work, "upperdir=" + upper, "lowerdir=" + lower}}}
	parent := []mount.Mount{{Type: "bind", Source: lower, Options: []string{"ro", "rbind"}}}
	for name, mounts := range map[string][2][]mount.Mount{
		"upper directory": {parent, active},
		"double walk":     {difftest.Bind(lower), {{Type: "bind", Source: merged, Options: []string{"rbind", "ro"}}}},
		// An option that is not understood: it is mounted.
		"mounted": {parent, {{Type: "overlay", Source: "overlay", Options: append([]string{"noatime"}, active[0].Options...)}}},
	} {
		t.Run(name, func(t *testing.T) {
			made, err := e.Compare(t.Context(), mounts[0], mounts[1], diff.CompareOptions{})
			if err != nil {
				t.Fatal(err)
			}
			again, err := e.Compare(t.Context(), mounts[0], mounts[1], diff.CompareOptions{})
			if err != nil || again.Digest != made.Digest {
				t.Errorf("made twice: %s and %s, %v", made.Digest, again.Digest, err)
			}
			// Applied as a snapshotter would have it: natively to an overlay, ...
			stack := t.TempDir()
			up, wk := filepath.Join(stack, "fs"), filepath.Join(stack, "work")
			if err := os.Mkdir(up, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(wk, 0o755); err != nil {
				t.Fatal(err)
			}
			target := []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"workdir=" + wk, "upperdir=" + up, "lowerdir=" + lower}}}
			if _, err := e.Apply(t.Context(), made, target, diff.ApplyOptions{}); err != nil {
				t.Fatal(err)
			}
			same(t, "overlay", tree(t, overlay(t, lower, up, wk)), want)
			// ... on a full copy, ...
			clone := t.TempDir()
			script(t, clone, "cp -a '"+lower+"/.' .")
			if _, err := e.Apply(t.Context(), made, difftest.Bind(clone), diff.ApplyOptions{}); err != nil {
				t.Fatal(err)
			}
			same(t, "copy", tree(t, clone), want)
			// ... and on a layer that gets its parent later.
			rebase := t.TempDir()
			script(t, rebase, "mkdir fs work")
			if _, err := e.Apply(t.Context(), made, difftest.Bind(filepath.Join(rebase, "fs")), diff.ApplyOptions{}); err != nil {
				t.Fatal(err)
			}
			same(t, "rebased", tree(t, overlay(t, lower, filepath.Join(rebase, "fs"), filepath.Join(rebase, "work"))), want)
		})
	}
}

// Redirects are something that only the kernel understands.
func TestCompareRedirect(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts overlays")
	}
	base := t.TempDir()
	script(t, base, "mkdir lower upper work m; mkdir lower/dir; echo 1 >lower/dir/f")
	options := fmt.Sprintf("redirect_dir=on,lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", base)
	m := filepath.Join(base, "m")
	if err := unix.Mount("overlay", m, "overlay", 0, options); err != nil {
		t.Skipf("overlay with redirects: %v", err)
	}
	err := os.Rename(filepath.Join(m, "dir"), filepath.Join(m, "moved"))
	if uerr := unix.Unmount(m, 0); err != nil || uerr != nil {
		t.Fatal(err, uerr)
	}
	store := memory.NewContent()
	e := New(store, Options{TempDir: t.TempDir()})
	active := []mount.Mount{{Type: "overlay", Source: "overlay", Options: strings.Split(strings.TrimPrefix(options, "redirect_dir=on,"), ",")}}
	active[0].Options = append(active[0].Options, "redirect_dir=follow")
	made, err := e.Compare(t.Context(), difftest.Bind(filepath.Join(base, "lower")), active, diff.CompareOptions{MediaType: ocispec.MediaTypeImageLayer})
	if err != nil {
		t.Fatal(err)
	}
	tr := tar.NewReader(bytes.NewReader(difftest.Get(t, store, made.Digest)))
	var names []string
	for {
		h, err := tr.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
	}
	if got := strings.Join(names, " "); got != ".wh.dir moved/ moved/f" {
		t.Errorf("got %q", got)
	}
}

func same(t *testing.T, what, got, want string) {
	t.Helper()
	a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
	for _, l := range a {
		if !slices.Contains(b, l) {
			t.Errorf("%s: got  %s", what, l)
		}
	}
	for _, l := range b {
		if !slices.Contains(a, l) {
			t.Errorf("%s: want %s", what, l)
		}
	}
}

// A new name of a file that did not change otherwise is a link in the layer.
func TestCompareKeepsLinks(t *testing.T) {
	lower, upper := t.TempDir(), t.TempDir()
	script(t, lower, "echo 1 >z1; ln z1 z2; echo 2 >other")
	script(t, upper, "cp -a '"+lower+"/.' .; ln z1 a; mkdir d; ln z2 d/b")
	store := memory.NewContent()
	e := New(store, Options{})
	made, err := e.Compare(t.Context(), difftest.Bind(lower), difftest.Bind(upper), diff.CompareOptions{})
	if err != nil {
		t.Fatal(err)
	}
	again := t.TempDir()
	script(t, again, "cp -a '"+lower+"/.' .")
	if _, err := e.Apply(t.Context(), made, difftest.Bind(again), diff.ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
	same(t, "links", tree(t, again), tree(t, upper))
}

func overlay(t *testing.T, lower, upper, work string) string {
	t.Helper()
	m := t.TempDir()
	if err := unix.Mount("overlay", m, "overlay", 0, "index=off,lowerdir="+lower+",upperdir="+upper+",workdir="+work); err != nil {
		t.Skipf("no overlay here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return m
}

func script(t *testing.T, dir, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-ec", text)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", text, err, out)
	}
}

// What GNU tar makes, in all its formats, is what we unpack.
//
// contract: 3.3.2, 3.3.7
func TestForeignTar(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil || os.Geteuid() != 0 {
		t.Skip("needs tar and root")
	}
	from := t.TempDir()
	long := strings.Repeat("x", 90)
	script(t, from, fmt.Sprintf(`mkdir -p %[1]s/%[1]s/%[1]s; echo deep >%[1]s/%[1]s/%[1]s/file; ln -s %[1]s/%[1]s l; echo a >a; ln a b; chmod 2755 a; chown 70000:80000 a
		mkfifo p; mknod n c 5 1; truncate -s 20M sparse; echo end >>sparse; mkdir -m 1777 t; touch -d '1999-01-01 00:00:00' t/old`, long))
	store := memory.NewContent()
	for _, format := range []string{"gnu --sparse", "gnu", "posix", "posix --sparse", "oldgnu --sparse"} {
		file := filepath.Join(t.TempDir(), "layer.tar")
		script(t, from, "tar -cf '"+file+"' --numeric-owner --format="+format+" .")
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		root := t.TempDir()
		if _, err := New(store, Options{}).Apply(t.Context(), difftest.Put(t, store, ocispec.MediaTypeImageLayerGzip, gz(t, data)), difftest.Bind(root), diff.ApplyOptions{}); err != nil {
			t.Errorf("%s: %v", format, err)
			continue
		}
		got, want := tree(t, root), tree(t, from)
		if strings.Contains(format, "gnu") { // has whole seconds only
			got, want = wholeSeconds(got), wholeSeconds(want)
		}
		same(t, format, got, want)
	}
}

// wholeSeconds cuts the fractions that tree prints.
func wholeSeconds(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		if open := strings.LastIndexByte(l, '{'); open >= 0 {
			sec, _, _ := strings.Cut(l[open:], " ")
			lines[i] = l[:open] + sec
		}
	}
	return strings.Join(lines, "\n")
}

// contract: 3.3.6
func TestStreamProcessors(t *testing.T) {
	store := memory.NewContent()
	data := tarOf(t, &tar.Header{Name: "f"})
	const first, second = "application/x-first", "application/x-second"
	seen := filepath.Join(t.TempDir(), "seen")
	rot := "tr '\\000-\\377' '\\001-\\377\\000'"
	encoded := bytes.Clone(gz(t, data))
	for i := range encoded {
		encoded[i] -= 2
	}
	e := New(store, Options{Processors: []Processor{
		&Command{ID: "two", Accept: []string{second}, Returns: ocispec.MediaTypeImageLayerGzip, Path: "/bin/sh",
			Args: []string{"-c", `printf '%s %s ' "$STREAM_PROCESSOR_MEDIATYPE" "$EXTRA" >>` + seen + `; LC_ALL=C exec ` + rot}, Env: []string{"EXTRA=extra"}},
		&Command{ID: "one", Accept: []string{first}, Returns: second, Path: "/bin/sh",
			Args: []string{"-c", `cat <&3 >` + seen + `.any; LC_ALL=C exec ` + rot}},
		&Command{ID: "broken", Accept: []string{"application/x-broken"}, Returns: ocispec.MediaTypeImageLayer, Path: "/bin/sh", Args: []string{"-c", "echo no key >&2; exit 3"}},
		&Command{ID: "late", Accept: []string{"application/x-late"}, Returns: ocispec.MediaTypeImageLayer, Path: "/bin/sh", Args: []string{"-c", "cat; echo bad seal >&2; exit 4"}},
		&Command{ID: "absent", Accept: []string{"application/x-absent"}, Returns: ocispec.MediaTypeImageLayer, Path: "/absent"},
		&Command{ID: "a", Accept: []string{"application/x-a"}, Returns: "application/x-b", Path: "/bin/cat"},
		&Command{ID: "b", Accept: []string{"application/x-b"}, Returns: "application/x-a", Path: "/bin/cat"},
	}})
	got, err := e.Apply(t.Context(), difftest.Put(t, store, first, encoded), difftest.Bind(t.TempDir()), diff.ApplyOptions{
		Payloads: map[string]typed.Any{first: {URL: "u", Value: []byte("v")}}})
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest != digest.FromBytes(data) {
		t.Errorf("got %+v", got)
	}
	if b, err := os.ReadFile(seen); err != nil || string(b) != second+" extra " {
		t.Errorf("the second program saw %q, %v", b, err)
	}
	if b, err := os.ReadFile(seen + ".any"); err != nil || string(b) != "\n\x01u\x12\x01v" {
		t.Errorf("the first program saw %q, %v", b, err)
	}
	for mediaType, want := range map[string]string{
		"application/x-broken": "stream processor broken: exit status 3: no key",
		"application/x-late":   "stream processor late: exit status 4: bad seal",
		"application/x-absent": "stream processor absent: ",
		"application/x-a":      "circle",
	} {
		_, err := e.Apply(t.Context(), difftest.Put(t, store, mediaType, data), difftest.Bind(t.TempDir()), diff.ApplyOptions{})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", mediaType, err, want)
		}
	}
	// One that never ends is ended with its request.
	stuck := New(store, Options{Processors: []Processor{&Command{ID: "stuck", Accept: []string{first}, Returns: ocispec.MediaTypeImageLayer, Path: "/bin/sleep", Args: []string{"600"}}}})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := stuck.Apply(ctx, difftest.Put(t, store, first, encoded), difftest.Bind(t.TempDir()), diff.ApplyOptions{}); err == nil || time.Since(start) > 30*time.Second {
		t.Errorf("after %v: %v", time.Since(start), err)
	}
}

// contract: 3.3.4
func TestGzipHelper(t *testing.T) {
	bin := t.TempDir()
	for name, text := range map[string]string{"igzip": "exec gzip \"$@\"", "unpigz": "exec gzip \"$@\"", "bad": "echo broken >&2; exit 2"} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	env := map[string]string{}
	find := func() string {
		h := tarstream.GzipHelper(func(k string) string { return env[k] })
		if h == nil {
			return ""
		}
		return filepath.Base(h[0])
	}
	if got := find(); got != "igzip" {
		t.Errorf("got %q", got)
	}
	env["CONTAINERD_DISABLE_IGZIP"] = "1"
	if got := find(); got != "unpigz" {
		t.Errorf("got %q", got)
	}
	env["CONTAINERD_DISABLE_PIGZ"] = "true"
	if got := find(); got != "" {
		t.Errorf("got %q", got)
	}
	store := memory.NewContent()
	data := tarOf(t, &tar.Header{Name: "f"})
	blob := gz(t, data)
	e := New(store, Options{GzipHelper: []string{filepath.Join(bin, "igzip"), "-d", "-c"}})
	got, err := e.Apply(t.Context(), difftest.Put(t, store, ocispec.MediaTypeImageLayerGzip, blob), difftest.Bind(t.TempDir()), diff.ApplyOptions{})
	if err != nil || got.Digest != digest.FromBytes(data) {
		t.Errorf("%+v %v", got, err)
	}
	_, err = e.Apply(t.Context(), difftest.Put(t, store, ocispec.MediaTypeImageLayerGzip, blob[:len(blob)-3]), difftest.Bind(t.TempDir()), diff.ApplyOptions{})
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "gzip") {
		t.Errorf("truncated: %v", err)
	}
	_, err = New(store, Options{GzipHelper: []string{filepath.Join(bin, "bad")}}).Apply(t.Context(), difftest.Put(t, store, ocispec.MediaTypeImageLayerGzip, blob), difftest.Bind(t.TempDir()), diff.ApplyOptions{})
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "broken") {
		t.Errorf("broken helper: %v", err)
	}
}

// contract: 6.5.5
func TestEpochFromEnv(t *testing.T) {
	for v, want := range map[string]int64{"": -1, "0": 0, "1700000000": 1700000000} {
		got, err := EpochFromEnv(func(string) string { return v })
		if err != nil || (got == nil) != (want < 0) || got != nil && got.Unix() != want {
			t.Errorf("%q: %v %v", v, got, err)
		}
	}
	for _, v := range []string{"x", "1x", "1 2", "1.5"} {
		if _, err := EpochFromEnv(func(string) string { return v }); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", v, err)
		}
	}
	at := time.Unix(99, 0)
	store, dir := memory.NewContent(), t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := New(store, Options{SourceDateEpoch: &at}).Compare(t.Context(), nil, difftest.Bind(dir), diff.CompareOptions{MediaType: ocispec.MediaTypeImageLayer})
	if err != nil {
		t.Fatal(err)
	}
	h, err := tar.NewReader(bytes.NewReader(difftest.Get(t, store, d.Digest))).Next()
	if err != nil || !h.ModTime.Equal(at) {
		t.Errorf("%v %v", h, err)
	}
}
