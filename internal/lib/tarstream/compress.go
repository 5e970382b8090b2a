package tarstream

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Compression is how a stream is packed.
type Compression uint8

// The compressions.
const (
	Plain Compression = iota
	Gzip
	Zstd
)

func (c Compression) String() string {
	switch c {
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	}
	return "plain"
}

const (
	// maxWindow is what zstd --long=27 and --ultra -22 need; a frame that asks
	// for more is refused, it would be allocated.
	maxWindow = 128 << 20

	// helperGrace is how long a decompressor may take to die.
	helperGrace = 5 * time.Second
)

// Detect tells the compression from the first bytes of a stream; four are
// enough.
func Detect(head []byte) Compression {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 0x08}):
		return Gzip
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return Zstd
	case len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18}):
		return Zstd // a skippable frame comes first
	}
	return Plain
}

// GzipHelper returns the command line of a program on PATH that inflates
// faster than Go does, igzip or unpigz, or nil. CONTAINERD_DISABLE_IGZIP and
// CONTAINERD_DISABLE_PIGZ switch them off (contract 3.3.4).
func GzipHelper(getenv func(string) string) []string {
	for _, h := range []struct{ env, name string }{
		{"CONTAINERD_DISABLE_IGZIP", "igzip"},
		{"CONTAINERD_DISABLE_PIGZ", "unpigz"},
	} {
		if v := getenv(h.env); v != "" {
			if off, err := strconv.ParseBool(v); err != nil || off {
				continue
			}
		}
		if path, err := exec.LookPath(h.name); err == nil {
			return []string{path, "-d", "-c"}
		}
	}
	return nil
}

// NewDecompressor looks at the first bytes of r and returns its uncompressed
// content. gzipHelper is the command line that inflates standard input to
// standard output, or nil for Go's own. Close ends the helper and waits for
// it. A corrupt or truncated stream is ErrDataLoss.
func NewDecompressor(ctx context.Context, r io.Reader, gzipHelper []string) (io.ReadCloser, Compression, error) {
	br := bufio.NewReaderSize(r, 128<<10)
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, Plain, err
	}
	switch c := Detect(head); c {
	case Gzip:
		if gzipHelper != nil {
			rc, err := runHelper(ctx, br, gzipHelper)
			return rc, c, err
		}
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, c, lost(c, err)
		}
		return &decompressor{r: zr, c: c}, c, nil
	case Zstd:
		zr, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true), zstd.WithDecoderConcurrency(2))
		if err != nil {
			return nil, c, lost(c, err)
		}
		return &decompressor{r: zr, c: c, close: zr.Close}, c, nil
	default:
		return io.NopCloser(br), c, nil
	}
}

func lost(c Compression, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%s stream: %w: %w", c, err, errdefs.ErrDataLoss)
}

type decompressor struct {
	r     io.Reader
	c     Compression
	close func()
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if err != nil && err != io.EOF {
		err = lost(d.c, err)
	}
	return n, err
}

func (d *decompressor) Close() error {
	if d.close != nil {
		d.close()
	}
	return nil
}

// helper is a process that reads a stream and writes another one.
type helper struct {
	out    *os.File
	cancel context.CancelFunc
	wait   func() error
	src    *remember
}

// remember keeps the error of the reader it wraps.
type remember struct {
	r  io.Reader
	mu sync.Mutex
	e  error
}

func (r *remember) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil && err != io.EOF {
		r.mu.Lock()
		r.e = err
		r.mu.Unlock()
	}
	return n, err
}

func (r *remember) err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.e
}

func runHelper(ctx context.Context, r io.Reader, args []string) (*helper, error) {
	ctx, cancel := context.WithCancel(ctx)
	pr, pw, err := os.Pipe()
	if err != nil {
		cancel()
		return nil, err
	}
	h := &helper{out: pr, cancel: cancel, src: &remember{r: r}}
	stderr := &Tail{}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = h.src, pw, stderr, helperGrace
	err = cmd.Start()
	pw.Close()
	if err != nil {
		cancel()
		pr.Close()
		return nil, fmt.Errorf("run %s: %w", args[0], err)
	}
	h.wait = sync.OnceValue(func() error {
		err := cmd.Wait()
		cancel()
		switch {
		case h.src.err() != nil:
			return h.src.err()
		case err == nil:
			return nil
		case ctx.Err() != nil && stderr.String() == "":
			return ctx.Err()
		}
		return fmt.Errorf("gzip stream: %s: %w: %s: %w", args[0], err, stderr, errdefs.ErrDataLoss)
	})
	return h, nil
}

func (h *helper) Read(p []byte) (int, error) {
	n, err := h.out.Read(p)
	if err == io.EOF {
		if werr := h.wait(); werr != nil {
			err = werr
		}
	}
	return n, err
}

func (h *helper) Close() error {
	h.cancel()
	h.out.Close()
	_ = h.wait() // what it says was said by Read, or nobody wants it
	return nil
}

// Tail keeps the last kilobytes written to it, for the error output of
// programs. It is safe for concurrent use.
type Tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailSize = 4 << 10

func (t *Tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p[max(0, len(p)-tailSize):]...)
	if extra := len(t.buf) - tailSize; extra > 0 {
		t.buf = append(t.buf[:0], t.buf[extra:]...)
	}
	return len(p), nil
}

func (t *Tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.buf))
}

// NewCompressor packs what is written to it. The same input gives the same
// output. Close writes the end of the stream and does not close w.
func NewCompressor(w io.Writer, c Compression) (io.WriteCloser, error) {
	switch c {
	case Plain:
		return nopWriteCloser{w}, nil
	case Gzip:
		return gzip.NewWriterLevel(w, gzip.DefaultCompression)
	case Zstd:
		return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1))
	}
	return nil, fmt.Errorf("compression %d: %w", c, errdefs.ErrNotImplemented)
}

type nopWriteCloser struct{ io.Writer }

func (nopWriteCloser) Close() error { return nil }
