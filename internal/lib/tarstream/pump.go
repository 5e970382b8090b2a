package tarstream

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
)

const (
	chunkSize = 256 << 10
	chunkMax  = 12
)

type chunk struct {
	buf  []byte
	n    int
	refs atomic.Int32
}

// Pump reads ahead of its reader in a goroutine of its own and hands the same
// bytes to a second consumer, a hash, in another one: a byte is read once and
// the stages of a pipeline run on different cores. It holds three megabytes at
// most.
type Pump struct {
	ctx  context.Context
	free chan *chunk
	out  chan *chunk
	stop chan struct{}
	once sync.Once
	wg   sync.WaitGroup
	err  error // of the source; written before out is closed

	cur  *chunk
	rest []byte
	n    atomic.Int64
}

// NewPump starts to read r. tee may be nil; else it is written every byte that
// was read, by one goroutine, and has seen all of them when Finish returns. A
// cancelled ctx ends it as soon as the current Read of r returns.
func NewPump(ctx context.Context, r io.Reader, tee io.Writer) *Pump {
	p := &Pump{ctx: ctx, free: make(chan *chunk, chunkMax), out: make(chan *chunk, chunkMax), stop: make(chan struct{})}
	var teed chan *chunk
	if tee != nil {
		teed = make(chan *chunk, chunkMax)
		p.wg.Go(func() {
			for c := range teed {
				_, _ = tee.Write(c.buf[:c.n]) // a hash has no errors
				p.release(c)
			}
		})
	}
	p.wg.Go(func() {
		defer close(p.out)
		if teed != nil {
			defer close(teed)
		}
		p.err = p.fill(r, teed)
	})
	return p
}

func (p *Pump) fill(r io.Reader, teed chan<- *chunk) error {
	made := 0
	for {
		var c *chunk
		select {
		case c = <-p.free:
		default:
			if made < chunkMax {
				made++
				c = &chunk{buf: make([]byte, chunkSize)}
				break
			}
			select {
			case c = <-p.free:
			case <-p.stop:
				return io.ErrClosedPipe
			case <-p.ctx.Done():
				return p.ctx.Err()
			}
		}
		if err := p.ctx.Err(); err != nil {
			return err
		}
		select {
		case <-p.stop:
			return io.ErrClosedPipe
		default:
		}
		// Not ReadFull, which would turn an error after some bytes into another one.
		var err error
		c.n = 0
		for c.n < len(c.buf) && err == nil {
			var n int
			n, err = r.Read(c.buf[c.n:])
			c.n += n
		}
		if c.n > 0 {
			p.n.Add(int64(c.n))
			c.refs.Store(1)
			if teed != nil {
				c.refs.Store(2)
				teed <- c
			}
			p.out <- c // there is room for all chunks there are
		}
		if err != nil {
			return err
		}
	}
}

func (p *Pump) release(c *chunk) {
	if c.refs.Add(-1) == 0 {
		p.free <- c
	}
}

// Read reads what was read ahead. It is not safe for concurrent use.
func (p *Pump) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		if p.cur != nil {
			p.release(p.cur)
			p.cur = nil
		}
		if err := p.ctx.Err(); err != nil {
			return 0, err
		}
		select {
		case c, ok := <-p.out:
			if !ok {
				return 0, p.err
			}
			p.cur, p.rest = c, c.buf[:c.n]
		case <-p.ctx.Done():
			return 0, p.ctx.Err()
		}
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

// Count is how many bytes have been read ahead so far. It is safe for
// concurrent use.
func (p *Pump) Count() int64 { return p.n.Load() }

// Finish reads to the end of the stream, waits until the second consumer has
// seen all of it and returns the source's error, if it had one.
func (p *Pump) Finish() error {
	for {
		p.rest = nil
		if _, err := p.Read(nil); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
	}
	p.wg.Wait()
	return nil
}

// Close stops reading ahead and waits until the goroutines have ended, which
// is when the current Read of the source returns.
func (p *Pump) Close() error {
	p.once.Do(func() { close(p.stop) })
	p.wg.Wait()
	return nil
}
