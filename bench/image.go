package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/test/testimage"
)

// small is what containers are made of: busybox in one layer of gzip.
// containerd 1.6 knows no zstd in its client's configuration of unpacking, so
// that all layers that are compared are gzip.
func small() (*testimage.Image, error) {
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, fmt.Errorf("busybox-static is needed: %w", err)
	}
	files := []testimage.File{{Name: "bin", Dir: true}, {Name: "bin/busybox", Body: bin, Mode: 0o755}, {Name: "bin/true", Link: "busybox"}, {Name: "bin/sleep", Link: "busybox"},
		{Name: "etc", Dir: true}, {Name: "etc/passwd", Body: []byte("root:x:0:0:root:/root:/bin/sh\n")}, {Name: "etc/group", Body: []byte("root:x:0:\n")},
		{Name: "proc", Dir: true}, {Name: "sys", Dir: true}, {Name: "dev", Dir: true}, {Name: "tmp", Dir: true, Mode: 0o1777}}
	return testimage.New(ocispec.ImageConfig{Env: []string{"PATH=/bin"}, Cmd: []string{"/bin/true"}}, testimage.Layer{Files: files, Compression: "gzip"})
}

// large is 64 MiB in six layers: half of it does not compress, as programs
// and archives hardly do, half is like text.
func large() (*testimage.Image, error) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var layers []testimage.Layer
	for l := range 6 {
		var files []testimage.File
		size := 8 << 20
		if l < 2 {
			size = 16 << 20
		}
		for f := range size >> 20 {
			body := noise(rnd, 1<<20)
			if l%2 == 1 {
				body = text(rnd, 1<<20)
			}
			files = append(files, testimage.File{Name: fmt.Sprintf("data%d-%d", l, f), Body: body})
		}
		layers = append(layers, testimage.Layer{Files: files, Compression: "gzip"})
	}
	return testimage.New(ocispec.ImageConfig{}, layers...)
}

// many is 20,000 files of 100 to 4,000 bytes in 200 directories, one layer.
func many(seed uint64) (*testimage.Image, error) {
	rnd := rand.New(rand.NewPCG(3, seed))
	var files []testimage.File
	for dir := range 200 {
		name := fmt.Sprintf("usr/lib/node_modules/d%03d", dir)
		if dir == 0 {
			files = append(files, testimage.File{Name: "usr", Dir: true}, testimage.File{Name: "usr/lib", Dir: true}, testimage.File{Name: "usr/lib/node_modules", Dir: true})
		}
		files = append(files, testimage.File{Name: name, Dir: true})
		for f := range 100 {
			files = append(files, testimage.File{Name: fmt.Sprintf("%s/file%03d.js", name, f), Body: text(rnd, 100+rnd.IntN(3900))})
		}
	}
	return testimage.New(ocispec.ImageConfig{}, testimage.Layer{Files: files, Compression: "gzip"})
}

func noise(rnd *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	return b
}

// text is made of a few thousand words of uneven frequency: gzip makes about
// a third of it.
func text(rnd *rand.Rand, n int) []byte {
	var b strings.Builder
	b.Grow(n + 16)
	for b.Len() < n {
		w := rnd.IntN(1 + rnd.IntN(4000))
		for {
			b.WriteByte("etaoinshrdlucmfw"[w%16])
			if w /= 11; w == 0 {
				break
			}
		}
		b.WriteByte(" \n    "[rnd.IntN(6)])
	}
	return []byte(b.String()[:n])
}
