package tarstream

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"
)

// smallFiles is a layer of n files of about a kilobyte, a hundred a directory.
func smallFiles(tb testing.TB, n int) []byte {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	rnd := rand.New(rand.NewPCG(1, 2))
	body := make([]byte, 2048)
	for i := range body {
		body[i] = byte(rnd.IntN(64)) + ' '
	}
	mod := time.Unix(1700000000, 123456789)
	for i := range n {
		if i%100 == 0 {
			if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("d%04d/", i/100), Typeflag: tar.TypeDir, Mode: 0o755, ModTime: mod}); err != nil {
				tb.Fatal(err)
			}
		}
		size := 256 + rnd.IntN(1700)
		err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("d%04d/f%02d", i/100, i%100), Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(size), ModTime: mod})
		if err != nil {
			tb.Fatal(err)
		}
		if _, err := tw.Write(body[:size]); err != nil {
			tb.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

func BenchmarkApply100kSmallFiles(b *testing.B) {
	layer := smallFiles(b, 100_000)
	for b.Loop() {
		b.StopTimer()
		dir := b.TempDir()
		b.StartTimer()
		if _, err := Apply(context.Background(), dir, bytes.NewReader(layer), ApplyOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

func gzipped(tb testing.TB, data []byte) []byte {
	var buf bytes.Buffer
	w, err := NewCompressor(&buf, Gzip)
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

func BenchmarkInflate(b *testing.B) {
	data := smallFiles(b, 50_000)
	packed := gzipped(b, data)
	run := func(name string, open func() (io.Reader, error)) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				r, err := open()
				if err != nil {
					b.Fatal(err)
				}
				if n, err := io.Copy(io.Discard, r); err != nil || n != int64(len(data)) {
					b.Fatal(n, err)
				}
			}
		})
	}
	run("std", func() (io.Reader, error) { return stdgzip.NewReader(bytes.NewReader(packed)) })
	run("tarstream", func() (io.Reader, error) {
		r, _, err := NewDecompressor(context.Background(), bytes.NewReader(packed), nil)
		return r, err
	})
	run("tarstream+pump", func() (io.Reader, error) {
		r, _, err := NewDecompressor(context.Background(), bytes.NewReader(packed), nil)
		if err != nil {
			return nil, err
		}
		return NewPump(context.Background(), r, nil), nil
	})
}
