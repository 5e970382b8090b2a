package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
)

func (a *app) logsCommand() *cobra.Command {
	var flags logFlags
	cmd := &cobra.Command{
		Use: "logs CONTAINER", Short: "Show what a container has printed", GroupID: "run", Args: cobra.ExactArgs(1),
		Long: "Shows the kept output of a container that was run with --detach, or made by create and start:\nwhat it printed to standard output and error, on the same streams here.",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			l, err := flags.reader(a)
			if err != nil {
				return err
			}
			v, err := a.view(ctx)
			if err != nil {
				return err
			}
			c, err := a.find(ctx, v, args[0])
			if err != nil {
				return err
			}
			p, err := v.Tasks().Get(ctx, c.ID, "")
			running := err == nil && p.Status != task.StatusStopped
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			var kept bool
			if l.files, kept = logFiles(c, p.IO.Stdout); !kept {
				hint := "only containers run with --detach (-d) keep their output"
				if _, nerdctl := c.Labels["nerdctl/namespace"]; nerdctl {
					hint = fmt.Sprintf("it was made by nerdctl: use nerdctl -n %s logs %s", a.namespace, c.ID)
				}
				return &hinted{fmt.Errorf("logs of container %s: its output is not kept: %w", c.ID, errdefs.ErrFailedPrecondition), hint}
			}
			l.kubelet = kubernetesLog(c) != ""
			ended := make(chan struct{})
			if running {
				ended = a.ended(ctx, v, c.ID)
			} else {
				close(ended)
			}
			return l.run(ctx, ended)
		},
	}
	flags.add(cmd)
	return cmd
}

// logFlags say what of kept output is wanted.
type logFlags struct {
	follow, stamps bool
	tail, since    string
}

func (l *logFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVarP(&l.follow, "follow", "f", false, "go on until the container ends")
	f.StringVar(&l.tail, "tail", "all", "begin with the last `n` lines")
	f.BoolVarP(&l.stamps, "timestamps", "t", false, "show when each line was printed")
	f.StringVar(&l.since, "since", "", "begin at a `time`: RFC 3339, or a duration before now such as 10m")
}

// reader is for the files that are still to be set.
func (l *logFlags) reader(a *app) (*logReader, error) {
	r := &logReader{out: a.out, err: a.err, follow: l.follow, stamps: l.stamps, tail: -1, json: a.format == "json"}
	if l.tail != "all" && l.tail != "" {
		n, err := strconv.Atoi(l.tail)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("--tail %q: use a number of lines, or all", l.tail)
		}
		r.tail = n
	}
	var err error
	r.since, err = parseSince(l.since, time.Now())
	return r, err
}

// parseSince reads a time, or how long ago it was.
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return time.Unix(n, 0), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("--since %q: use a time such as 2026-01-02T15:04:05Z, or a duration such as 10m", s)
}

// logFiles finds where a container's output is kept: a note says it, or its
// task's output goes to a file.
func logFiles(c container.Container, stdout string) (path string, ok bool) {
	if path := kubernetesLog(c); path != "" {
		return path, true
	}
	for _, s := range []string{c.Note(noteLog), stdout} {
		if u, err := url.Parse(s); err == nil && u.Scheme == "file" && u.Path != "" {
			return u.Path, true
		}
	}
	return "", false
}

// ended is closed when a task has ended, or when nobody can tell any more.
func (a *app) ended(ctx context.Context, v view.View, id container.ID) chan struct{} {
	ch := make(chan struct{})
	go func() {
		defer close(ch)
		for {
			// The daemon may be restarted meanwhile; the container goes on.
			_, err := v.Tasks().Wait(ctx, id, "")
			if !errdefs.IsUnavailable(err) {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
		}
	}()
	return ch
}

// logLine is one line of a file of kept output: what a process wrote at once,
// or a part of it. A raw one is of a shim that knows no such lines.
type logLine struct {
	at      time.Time
	stream  string
	partial bool
	raw     bool
	text    []byte
}

// parseLogLine reads "2026-01-02T15:04:05.6Z stdout F text" without its newline.
func parseLogLine(b []byte) (logLine, bool) {
	stamp, rest, _ := bytes.Cut(b, []byte(" "))
	stream, rest, _ := bytes.Cut(rest, []byte(" "))
	tag, text, ok := bytes.Cut(rest, []byte(" "))
	tag, _, _ = bytes.Cut(tag, []byte(":")) // further tags may follow
	if !ok || string(stream) != "stdout" && string(stream) != "stderr" || string(tag) != "F" && string(tag) != "P" {
		return logLine{}, false
	}
	at, err := time.Parse(time.RFC3339Nano, string(stamp))
	return logLine{at: at, stream: string(stream), partial: tag[0] == 'P', text: text}, err == nil
}

// logReader shows the files PATH.N ... PATH.1, PATH in which output is kept,
// and what is added to them, through rotation.
type logReader struct {
	files  string
	out    io.Writer
	err    io.Writer
	follow bool
	stamps bool
	json   bool
	// kubelet, if set, says that older files are named as the kubelet does:
	// PATH.20060102-150405, and compressed ones with .gz behind it.
	kubelet bool
	tail    int // lines to begin with, -1 for all
	since   time.Time
	// fresh, if not zero, is when the reader began to be of interest: what was
	// written from then on is shown, though tail leaves out what was before.
	fresh time.Time

	held    []logLine // the last lines, until tail is known
	lines   int       // complete ones in held
	holding bool
	inside  map[string]bool // streams whose last line is not complete
}

// poll is how often a followed file is looked at.
const poll = 100 * time.Millisecond

// settle is how long after the end of a container its last output may come.
const settle = 300 * time.Millisecond

// run shows the output until it ends: at once, or, if it is followed, a moment
// after ended is closed.
func (l *logReader) run(ctx context.Context, ended <-chan struct{}) error {
	l.inside = map[string]bool{}
	l.holding = l.tail >= 0
	f, err := l.oldest()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	defer func() {
		if f != nil {
			f.Close()
		}
	}()
	if err := l.past(f); err != nil {
		return err
	}
	var rest []byte // of a line that is not complete
	var over time.Time
	r := bufio.NewReaderSize(nil, 64<<10)
	if f != nil {
		r.Reset(f)
	}
	for {
		moved := false
		for f != nil {
			b, err := r.ReadSlice('\n')
			if len(b) > 0 {
				moved = true
				rest = append(rest, b...)
			}
			if err == nil || errors.Is(err, bufio.ErrBufferFull) || len(rest) > 128<<10 {
				if err := l.line(rest); err != nil {
					return err
				}
				rest = rest[:0]
				continue
			}
			if !errors.Is(err, io.EOF) {
				return fmt.Errorf("read kept output: %w", err)
			}
			next, err := l.after(f)
			if err != nil {
				return err
			}
			if next == nil {
				break
			}
			// It was rotated after the end was read: there may be more.
			if b, _ := r.Peek(1); len(b) > 0 {
				next.Close()
				continue
			}
			f.Close()
			f = next
			r.Reset(f)
		}
		if f == nil {
			if f, err = l.oldest(); err == nil {
				r.Reset(f)
				continue
			} else if !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		if l.holding && !moved || !l.follow {
			if err := l.release(); err != nil {
				return err
			}
		}
		switch {
		case !l.follow, !over.IsZero() && !moved && time.Now().After(over):
			return l.line(rest)
		case over.IsZero():
			select {
			case <-ended:
				over = time.Now().Add(settle)
				continue
			default:
			}
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil // that is how one leaves it
			}
			return ctx.Err()
		case <-time.After(poll):
		}
	}
}

// past reads what the kubelet has put aside, oldest first, but not what it put
// aside since now was opened.
func (l *logReader) past(now *os.File) error {
	if !l.kubelet {
		return nil
	}
	dir, base := filepath.Split(l.files)
	names, err := os.ReadDir(dir) // sorted, and so are the times in the names
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read kept output: %w", err)
	}
	for _, e := range names {
		stamp, ok := strings.CutPrefix(e.Name(), base+".")
		stamp, packed := strings.CutSuffix(stamp, ".gz")
		if _, err := time.Parse("20060102-150405", stamp); !ok || err != nil {
			continue
		}
		if now != nil {
			mine, err := now.Stat()
			if err != nil {
				return err
			}
			if info, err := e.Info(); err == nil && os.SameFile(info, mine) {
				continue
			}
		}
		if err := l.read(filepath.Join(dir, e.Name()), packed); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("read kept output: %w", err)
		}
	}
	return nil
}

// read takes a whole file that nobody writes any more.
func (l *logReader) read(path string, packed bool) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 64<<10)
	if packed {
		z, err := gzip.NewReader(f)
		if err != nil {
			return err
		}
		defer z.Close()
		r.Reset(z)
	}
	var rest []byte
	for {
		b, err := r.ReadSlice('\n')
		if rest = append(rest, b...); len(rest) > 128<<10 || err == nil || errors.Is(err, io.EOF) {
			if err := l.line(rest); err != nil {
				return err
			}
			rest = rest[:0]
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return err
		}
	}
}

// oldest opens the first file.
func (l *logReader) oldest() (*os.File, error) {
	n := 0
	for {
		if _, err := os.Stat(l.name(n + 1)); err != nil {
			break
		}
		n++
	}
	for ; n >= 0; n-- {
		f, err := os.Open(l.name(n))
		if err == nil || !errors.Is(err, os.ErrNotExist) || n == 0 {
			return f, err
		}
	}
	return nil, os.ErrNotExist
}

func (l *logReader) name(n int) string {
	if n == 0 {
		return l.files
	}
	return l.files + "." + strconv.Itoa(n)
}

// after opens the file that follows f, nil if f is the last one.
func (l *logReader) after(f *os.File) (*os.File, error) {
	mine, err := f.Stat()
	if err != nil {
		return nil, err
	}
	for n := 0; ; n++ {
		info, err := os.Stat(l.name(n))
		switch {
		case errors.Is(err, os.ErrNotExist) && n == 0:
			return nil, nil // between two steps of a rotation, or removed
		case errors.Is(err, os.ErrNotExist):
			// It is gone already: go on with what is left.
			next, err := l.oldest()
			if errors.Is(err, os.ErrNotExist) {
				return nil, nil
			}
			return next, err
		case err != nil:
			return nil, err
		case os.SameFile(info, mine) && n == 0:
			return nil, nil
		case os.SameFile(info, mine):
			next, err := os.Open(l.name(n - 1))
			if errors.Is(err, os.ErrNotExist) {
				return nil, nil
			}
			if err != nil {
				return nil, err
			}
			// Another rotation in between would have renamed both.
			if again, err := os.Stat(l.name(n)); err != nil || !os.SameFile(again, mine) {
				next.Close()
				return l.after(f)
			}
			return next, nil
		}
	}
}

// line takes a line with its newline, if it has one.
func (l *logReader) line(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	p, ok := parseLogLine(bytes.TrimSuffix(b, []byte("\n")))
	if !ok || b[len(b)-1] != '\n' {
		p = logLine{stream: "stdout", raw: true, text: b}
	}
	if !p.raw && p.at.Before(l.since) {
		return nil
	}
	if !l.holding || l.tail == 0 && !l.fresh.IsZero() && !p.raw && !p.at.Before(l.fresh) {
		return l.show(p)
	}
	if l.tail == 0 {
		return nil
	}
	p.text = bytes.Clone(p.text)
	l.held = append(l.held, p)
	if !p.partial {
		l.lines++
	}
	for l.lines > l.tail {
		if !l.held[0].partial {
			l.lines--
		}
		l.held = l.held[1:]
	}
	return nil
}

// release shows the lines that were held back for tail.
func (l *logReader) release() error {
	l.holding = false
	for _, p := range l.held {
		if err := l.show(p); err != nil {
			return err
		}
	}
	l.held = nil
	return nil
}

func (l *logReader) show(p logLine) error {
	w := l.out
	if p.stream == "stderr" {
		w = l.err
	}
	if l.json {
		b, err := jsonLine(p)
		if err == nil {
			_, err = l.out.Write(b)
		}
		return err
	}
	var b []byte
	if l.stamps && !p.raw && !l.inside[p.stream] {
		b = append(p.at.Local().AppendFormat(b, "2006-01-02T15:04:05.000000000Z07:00"), ' ')
	}
	b = append(b, p.text...)
	if !p.raw && !p.partial {
		b = append(b, '\n')
	}
	l.inside[p.stream] = p.partial
	_, err := w.Write(b)
	return err
}

// jsonLine is a line as an object of its own.
func jsonLine(p logLine) ([]byte, error) {
	o := struct {
		At      *time.Time `json:"time,omitempty"`
		Stream  string     `json:"stream"`
		Text    string     `json:"text"`
		Partial bool       `json:"partial,omitempty"`
	}{Stream: p.stream, Text: strings.TrimSuffix(string(p.text), "\n"), Partial: p.partial}
	if !p.at.IsZero() {
		o.At = &p.at
	}
	return marshalLine(o)
}
