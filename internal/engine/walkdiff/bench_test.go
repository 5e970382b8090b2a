package walkdiff

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/diff/difftest"
	"github.com/gantryd/gantry/internal/engine/memory"
	"github.com/gantryd/gantry/internal/lib/tarstream"
)

// benchLayer has n files of size bytes that compress about three to one.
func benchLayer(b *testing.B, n, size int) []byte {
	b.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	rnd := rand.New(rand.NewPCG(3, 4))
	body := make([]byte, size)
	for i := range n {
		for j := 0; j+8 <= len(body); j += 8 {
			binary.LittleEndian.PutUint64(body[j:], rnd.Uint64()&0x0f0f00000f0f)
		}
		if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("d%04d/f%d", i/100, i), Mode: 0o644, Size: int64(size)}); err != nil {
			b.Fatal(err)
		}
		if _, err := tw.Write(body); err != nil {
			b.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		b.Fatal(err)
	}
	return buf.Bytes()
}

func BenchmarkApply(b *testing.B) {
	for name, shape := range map[string][2]int{"100k small files": {100_000, 1024}, "256 MiB in large files": {16, 16 << 20}} {
		data := benchLayer(b, shape[0], shape[1])
		for _, c := range []struct {
			mediaType   string
			compression tarstream.Compression
		}{{ocispec.MediaTypeImageLayerGzip, tarstream.Gzip}, {ocispec.MediaTypeImageLayerZstd, tarstream.Zstd}} {
			b.Run(fmt.Sprintf("%s, %s", name, c.compression), func(b *testing.B) {
				var packed bytes.Buffer
				w, err := tarstream.NewCompressor(&packed, c.compression)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := w.Write(data); err != nil {
					b.Fatal(err)
				}
				if err := w.Close(); err != nil {
					b.Fatal(err)
				}
				store := memory.NewContent()
				desc := difftest.Put(b, store, c.mediaType, packed.Bytes())
				b.SetBytes(int64(len(data)))
				for b.Loop() {
					b.StopTimer()
					dir := b.TempDir()
					b.StartTimer()
					if _, err := New(store, Options{}).Apply(b.Context(), desc, difftest.Bind(dir), diff.ApplyOptions{}); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
