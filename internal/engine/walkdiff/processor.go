package walkdiff

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/lib/tarstream"
)

// Processor turns one media type into another (contract 3.3.6).
type Processor interface {
	// Accepts tells what a stream of mediaType becomes; false if it is not for
	// this processor.
	Accepts(mediaType string) (returns string, ok bool)
	// Process starts to convert r. Reading ends with the processor's error if
	// it had one. Close ends the processor and waits for it.
	Process(ctx context.Context, mediaType string, r io.Reader, payload typed.Any) (io.ReadCloser, error)
}

// Command is a Processor that runs a program: the stream comes on its standard
// input and goes to its standard output, the payload is an encoded
// google.protobuf.Any on descriptor 3, STREAM_PROCESSOR_MEDIATYPE names what
// comes in. What it writes to standard error is part of the error if it fails.
type Command struct {
	ID      string   // its name in the configuration, for errors
	Accept  []string // media types
	Returns string
	Path    string
	Args    []string // without the program's name
	Env     []string // besides the daemon's own
}

// processorGrace is how long a program may take to die.
const processorGrace = 5 * time.Second

// Accepts implements Processor.
func (c *Command) Accepts(mediaType string) (string, bool) {
	for _, a := range c.Accept {
		if a == mediaType {
			return c.Returns, true
		}
	}
	return "", false
}

// Process implements Processor.
func (c *Command) Process(ctx context.Context, mediaType string, r io.Reader, payload typed.Any) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	out, w, err := os.Pipe()
	if err != nil {
		cancel()
		return nil, err
	}
	p := &process{name: c.ID, out: out, cancel: cancel}
	cmd := exec.CommandContext(ctx, c.Path, c.Args...)
	cmd.Env = append(append(os.Environ(), c.Env...), "STREAM_PROCESSOR_MEDIATYPE="+mediaType)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = r, w, &p.stderr, processorGrace
	if !payload.IsZero() {
		pr, pw, err := os.Pipe()
		if err != nil {
			w.Close()
			p.Close()
			return nil, err
		}
		defer pr.Close()
		cmd.ExtraFiles = []*os.File{pr}
		p.payload.Go(func() {
			defer pw.Close()
			// A program that does not read it breaks the pipe, which is its choice.
			_, _ = pw.Write(encodeAny(payload))
		})
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("stream processor %s: %w", c.ID, err)
	}
	p.wait = sync.OnceValue(func() error {
		err := cmd.Wait()
		if err != nil {
			if text := p.stderr.String(); text != "" {
				return fmt.Errorf("stream processor %s: %w: %s", c.ID, err, text)
			}
			return fmt.Errorf("stream processor %s: %w", c.ID, err)
		}
		return nil
	})
	return p, nil
}

type process struct {
	name    string
	out     *os.File
	cancel  context.CancelFunc
	stderr  tarstream.Tail
	payload sync.WaitGroup
	wait    func() error
}

func (p *process) Read(b []byte) (int, error) {
	n, err := p.out.Read(b)
	if err == io.EOF {
		if werr := p.wait(); werr != nil {
			err = werr
		}
	}
	return n, err
}

func (p *process) Close() error {
	p.cancel()
	p.out.Close()
	if p.wait != nil {
		_ = p.wait() // Read has told, or nobody wants to know
		p.payload.Wait()
	}
	return nil
}

// encodeAny is google.protobuf.Any: field 1 the type's URL, field 2 the value.
func encodeAny(a typed.Any) []byte {
	var b []byte
	field := func(tag byte, v string) {
		if v != "" {
			b = binary.AppendUvarint(append(b, tag), uint64(len(v)))
			b = append(b, v...)
		}
	}
	field(1<<3|2, a.URL)
	field(2<<3|2, string(a.Value))
	return b
}
