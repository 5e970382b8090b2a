package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/spdystream"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/container"
)

func (a *app) podLogsCommand() *cobra.Command {
	var name string
	var flags logFlags
	cmd := &cobra.Command{
		Use: "logs POD", Short: "Show what a container of a pod has printed", Args: cobra.ExactArgs(1),
		Long:    "Reads the log files on this machine, also those that the kubelet has rotated: nothing passes through the daemon.",
		Example: "  gantry pod logs web\n  gantry pod logs -f --tail 20 -c sidecar default/web",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			l, err := flags.reader(a)
			if err != nil {
				return err
			}
			p, x, c, err := a.chosen(cmd, args[0], name)
			if err != nil {
				return err
			}
			st, err := p.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.Id})
			if err != nil {
				return err
			}
			if l.files = st.GetStatus().GetLogPath(); l.files == "" {
				return fmt.Errorf("logs of container %s of pod %s: its output is not kept: %w", c.GetMetadata().GetName(), podTitle(x.GetMetadata()), errdefs.ErrFailedPrecondition)
			}
			l.kubelet = true
			ended := make(chan struct{})
			if st.GetStatus().GetState() == runtime.ContainerState_CONTAINER_RUNNING {
				v, err := a.client.In(kubernetesNamespace, "")
				if err != nil {
					return err
				}
				ended = a.ended(ctx, v, container.ID(c.Id))
			} else {
				close(ended)
			}
			return l.run(ctx, ended)
		},
	}
	flags.add(cmd)
	addContainerFlag(cmd, &name)
	return cmd
}

func addContainerFlag(cmd *cobra.Command, name *string) {
	cmd.Flags().StringVarP(name, "container", "c", "", "`name` of the container, if the pod has several")
}

func (a *app) podExecCommand() *cobra.Command {
	var interactive, tty bool
	var name string
	cmd := &cobra.Command{
		Use: "exec [FLAG...] POD [-c CONTAINER] -- COMMAND [ARG...]", DisableFlagsInUseLine: true, Short: "Run a command in a container of a pod", Args: cobra.MinimumNArgs(1),
		Example: "  gantry pod exec -it web -- sh\n  gantry pod exec kube-system/dns -c sidecar -- ls -l /",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if len(args) < 2 {
				return &hinted{fmt.Errorf("exec in pod %s: no command is given: %w", args[0], errdefs.ErrInvalidArgument), fmt.Sprintf("for example: gantry pod exec -it %s -- sh", args[0])}
			}
			if at := cmd.ArgsLenAtDash(); at > 1 {
				return &hinted{fmt.Errorf("exec: %d names before the command: %w", at, errdefs.ErrInvalidArgument), "use: gantry pod exec POD [-c CONTAINER] -- COMMAND [ARG...]"}
			}
			if err := a.needsTerminal(interactive, tty); err != nil {
				return err
			}
			p, x, c, err := a.chosen(cmd, args[0], name)
			if err == nil {
				err = mustRun("exec in", x, c)
			}
			if err != nil {
				return err
			}
			r, err := p.Exec(ctx, &runtime.ExecRequest{ContainerId: c.Id, Cmd: args[1:], Tty: tty, Stdin: interactive, Stdout: true, Stderr: !tty})
			if err != nil {
				return err
			}
			code, err := a.remote(ctx, r.Url, interactive, tty)
			return exitError(code, err)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return &hinted{err, "flags of the command go behind --: gantry pod exec POD -- COMMAND -FLAG"}
	})
	f := cmd.Flags()
	f.BoolVarP(&interactive, "interactive", "i", false, "connect standard input")
	f.BoolVarP(&tty, "tty", "t", false, "give it a terminal")
	addContainerFlag(cmd, &name)
	return cmd
}

func (a *app) podAttachCommand() *cobra.Command {
	var noStdin bool
	var name string
	cmd := &cobra.Command{
		Use: "attach POD", Short: "Connect to a running container's streams", Args: cobra.ExactArgs(1),
		Long: "Connects this terminal with the first process of a container of a pod: shows what is printed from now on, and passes on what is typed\nif the container was made to be typed to. Returns the container's exit code. An interrupt ends this command, not the container,\nunless it has a terminal.",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			p, x, c, err := a.chosen(cmd, args[0], name)
			if err == nil {
				err = mustRun("attach to", x, c)
			}
			if err != nil {
				return err
			}
			st, err := p.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.Id, Verbose: true})
			if err != nil {
				return err
			}
			var made struct {
				Config struct {
					TTY   bool `json:"tty"`
					Stdin bool `json:"stdin"`
				} `json:"config"`
			}
			if err := json.Unmarshal([]byte(st.GetInfo()["info"]), &made); err != nil {
				return fmt.Errorf("attach to container %s: read its configuration: %w", c.Id, err)
			}
			stdin, tty := made.Config.Stdin && !noStdin, made.Config.TTY
			r, err := p.Attach(ctx, &runtime.AttachRequest{ContainerId: c.Id, Stdin: stdin, Stdout: true, Stderr: !tty, Tty: tty})
			if err != nil {
				return err
			}
			if _, err := a.remote(ctx, r.Url, stdin, tty); err != nil {
				if errors.Is(err, context.Canceled) && ctx.Err() != nil {
					return nil // that is how one leaves it
				}
				return err
			}
			st, err = p.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.Id})
			if err != nil || st.GetStatus().GetState() != runtime.ContainerState_CONTAINER_EXITED {
				return ignoreNotFound(err)
			}
			return exitError(uint32(st.GetStatus().GetExitCode()), nil)
		},
	}
	cmd.Flags().BoolVar(&noStdin, "no-stdin", false, "do not connect standard input")
	addContainerFlag(cmd, &name)
	return cmd
}

// Names of the streams' protocols and headers, as kubelet's clients have them.
const (
	protocolRemote  = "v4.channel.k8s.io"
	protocolForward = "portforward.k8s.io"
	headerProtocol  = "X-Stream-Protocol-Version"
	headerStream    = "streamType"
	headerPort      = "port"
	headerRequest   = "requestID"
)

// streamTimeout bounds what it takes to open streams.
const streamTimeout = 10 * time.Second

// streams is a connection with the daemon's streaming server.
type streams struct {
	*spdystream.Connection
	raw net.Conn
}

// openStreams connects with the address that a call of the CRI has answered.
func openStreams(ctx context.Context, address, protocol string) (*streams, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("open streams: %w", err)
	}
	dial, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	var d net.Dialer
	raw, err := d.DialContext(dial, "tcp", u.Host)
	if err != nil {
		return nil, fmt.Errorf("open streams: %w", err)
	}
	s, err := upgrade(raw, u, protocol)
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("open streams at %s: %w", u.Host, err)
	}
	return s, nil
}

// upgrade asks the server to speak SPDY on a connection.
func upgrade(raw net.Conn, u *url.URL, protocol string) (*streams, error) {
	if err := raw.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
		return nil, err
	}
	conn := raw
	if u.Scheme == "https" {
		// Its certificate is made for the API server, and often by itself. The
		// address, with the secret in it, came through the daemon's own socket.
		conn = tls.Client(raw, &tls.Config{InsecureSkipVerify: true}) //nolint:gosec
	}
	q := &http.Request{Method: http.MethodPost, URL: u, Host: u.Host, Header: http.Header{"Connection": {"Upgrade"}, "Upgrade": {"SPDY/3.1"}, headerProtocol: {protocol}}}
	if err := q.Write(conn); err != nil {
		return nil, err
	}
	br := bufio.NewReader(conn)
	r, err := http.ReadResponse(br, q)
	if err != nil {
		return nil, err
	}
	if r.StatusCode != http.StatusSwitchingProtocols || r.Header.Get(headerProtocol) != protocol {
		text, _ := io.ReadAll(io.LimitReader(r.Body, 1024)) // it only explains
		return nil, fmt.Errorf("the server answers %s %s", r.Status, text)
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	c, err := spdystream.NewConnection(buffered{conn, br}, false)
	if err != nil {
		return nil, err
	}
	go c.Serve(func(s *spdystream.Stream) { s.Reset() }) // until the connection is closed
	return &streams{c, raw}, nil
}

// buffered is a connection of which some has been read.
type buffered struct {
	net.Conn
	r *bufio.Reader
}

func (b buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

func (s *streams) close() {
	s.raw.Close()
	s.Connection.Close()
}

func (s *streams) open(kind string, more ...string) (*spdystream.Stream, error) {
	h := http.Header{}
	h.Set(headerStream, kind)
	for i := 0; i+1 < len(more); i += 2 {
		h.Set(more[i], more[i+1])
	}
	st, err := s.CreateStream(h, nil, false)
	if err == nil {
		err = st.WaitTimeout(streamTimeout)
	}
	if err != nil {
		return nil, fmt.Errorf("open stream %s: %w", kind, err)
	}
	return st, nil
}

// remote connects this terminal with a process and returns its exit code.
func (a *app) remote(ctx context.Context, address string, stdin, tty bool) (uint32, error) {
	s, err := openStreams(ctx, address, protocolRemote)
	if err != nil {
		return 0, err
	}
	defer s.close()
	defer context.AfterFunc(ctx, s.close)()
	end, err := s.open("error")
	if err != nil {
		return 0, err
	}
	restore, err := a.raw(stdin && tty)
	if err != nil {
		return 0, err
	}
	defer restore()
	if stdin {
		in, err := s.open("stdin")
		if err != nil {
			return 0, err
		}
		go func() { // ends with the program at the latest: a terminal's read cannot be left
			io.Copy(in, a.in)
			in.Close()
		}()
	}
	var copies sync.WaitGroup
	for kind, to := range map[string]io.Writer{"stdout": a.out, "stderr": a.err} {
		if kind == "stderr" && tty {
			continue
		}
		from, err := s.open(kind)
		if err != nil {
			return 0, err
		}
		copies.Go(func() { io.Copy(to, from) })
	}
	if tty {
		sizes, err := s.open("resize")
		if err != nil {
			return 0, err
		}
		defer a.sizes(json.NewEncoder(sizes))()
	}
	text, err := io.ReadAll(io.LimitReader(end, 64<<10))
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if err != nil || len(text) == 0 {
		return 0, fmt.Errorf("the connection with the process was lost: %w", errors.Join(err, errdefs.ErrUnavailable))
	}
	copies.Wait()
	return remoteStatus(text)
}

// sizes tells the terminal's size, now and whenever it changes, until stop.
func (a *app) sizes(to *json.Encoder) (stop func()) {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, unix.SIGWINCH)
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			if w, h, err := term.GetSize(int(a.out.Fd())); err == nil {
				if to.Encode(struct{ Width, Height int }{w, h}) != nil {
					return
				}
			}
			select {
			case <-ch:
			case <-over:
				return
			}
		}
	}()
	return func() {
		signal.Stop(ch)
		close(over)
		<-done
	}
}

// remoteStatus reads how a process has ended.
func remoteStatus(text []byte) (uint32, error) {
	var st struct {
		Status, Message, Reason string
		Details                 struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.Unmarshal(text, &st); err != nil {
		return 0, errors.New(string(text))
	}
	if st.Status == "Success" {
		return 0, nil
	}
	for _, c := range st.Details.Causes {
		if c.Reason == "ExitCode" {
			n, err := strconv.ParseUint(c.Message, 10, 32)
			if err != nil {
				return 0, fmt.Errorf("exit code %q: %w", c.Message, err)
			}
			return uint32(n), nil
		}
	}
	return 0, errors.New(strings.TrimPrefix(st.Message, "Internal error occurred: ")) // what it says of every error
}

func (a *app) podForwardCommand() *cobra.Command {
	var bind string
	cmd := &cobra.Command{
		Use: "port-forward POD [LOCAL:]PORT...", Short: "Make ports of a pod reachable on this machine", Args: cobra.MinimumNArgs(2),
		Long:    "Listens on this machine's loopback and passes connections on to ports in a pod's network, until it is interrupted.",
		Example: "  gantry pod port-forward web 8080:80\n  gantry pod port-forward default/db 5432 :9187",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithCancel(cmd.Context())
			var ports []forwarded
			for _, s := range args[1:] {
				f, err := parseForward(s)
				if err != nil {
					cancel()
					return err
				}
				ports = append(ports, f)
			}
			var all sync.WaitGroup
			defer all.Wait()
			defer cancel()
			p, err := a.pods(cmd)
			if err != nil {
				return err
			}
			x, err := p.find(ctx, args[0])
			if err != nil {
				return err
			}
			title := podTitle(x.GetMetadata())
			if x.State != runtime.PodSandboxState_SANDBOX_READY {
				return &hinted{fmt.Errorf("port-forward to pod %s: it is stopped: %w", title, errdefs.ErrFailedPrecondition), "list those that are ready: gantry pod ls --state ready"}
			}
			lost := make(chan error, len(ports))
			for _, f := range ports {
				l, err := net.Listen("tcp", net.JoinHostPort(bind, strconv.Itoa(int(f.local))))
				if err != nil {
					return err
				}
				defer l.Close()
				if err := a.forwarding(forwardRow{Address: l.Addr().String(), Pod: title, Port: f.remote}); err != nil {
					return err
				}
				all.Go(func() {
					for {
						c, err := l.Accept()
						if err != nil {
							if ctx.Err() == nil {
								lost <- err
							}
							return
						}
						all.Go(func() {
							defer c.Close()
							if err := p.forward(ctx, x.Id, f.remote, c); err != nil && ctx.Err() == nil {
								fmt.Fprintf(a.err, "gantry: port %d of pod %s: %s\n", f.remote, title, legible(err.Error()))
							}
						})
					}
				})
			}
			select {
			case err := <-lost:
				return err
			case <-ctx.Done():
				cancel()
				return stopOf(cmd.Context())
			}
		},
	}
	cmd.Flags().StringVar(&bind, "bind", "127.0.0.1", "`address` to listen on")
	return cmd
}

// forwardRow says where a port of a pod is reached.
type forwardRow struct {
	Address string `json:"address"`
	Pod     string `json:"pod"`
	Port    uint16 `json:"port"`
}

// forwarding prints one that has begun, on a line of its own also as JSON.
func (a *app) forwarding(r forwardRow) error {
	line := fmt.Appendf(nil, "%s -> %s:%d\n", r.Address, r.Pod, r.Port)
	if a.format == "json" {
		var err error
		if line, err = marshalLine(r); err != nil {
			return err
		}
	}
	_, err := a.out.Write(line)
	return err
}

// forward passes one connection on. Each has streams of its own, so that a
// daemon which is restarted costs only those that are open.
func (p *pods) forward(ctx context.Context, pod string, port uint16, c net.Conn) error {
	asking, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	r, err := p.PortForward(asking, &runtime.PortForwardRequest{PodSandboxId: pod, Port: []int32{int32(port)}})
	if err != nil {
		return err
	}
	s, err := openStreams(ctx, r.Url, protocolForward)
	if err != nil {
		return err
	}
	defer s.close()
	defer context.AfterFunc(ctx, func() {
		s.close()
		c.Close()
	})()
	about := []string{headerPort, strconv.Itoa(int(port)), headerRequest, "0"}
	trouble, err := s.open("error", about...)
	if err != nil {
		return err
	}
	trouble.Close() // this side
	data, err := s.open("data", about...)
	if err != nil {
		return err
	}
	go func() { // ends when either side is closed, which happens below
		io.Copy(data, c)
		data.Close()
	}()
	if _, err := io.Copy(c, data); err != nil {
		return nil // who asked has gone
	}
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
	text, _ := io.ReadAll(io.LimitReader(trouble, 4096))
	if len(text) > 0 {
		return errors.New(string(text))
	}
	return nil
}

// forwarded is a port of this machine and the one of the pod that it leads to.
type forwarded struct{ local, remote uint16 }

// parseForward reads "8080:80", "80" (the same here), or ":80" (any here).
func parseForward(s string) (forwarded, error) {
	local, remote, two := strings.Cut(s, ":")
	if !two {
		remote = local
	}
	bad := &hinted{fmt.Errorf("port %q: %w", s, errdefs.ErrInvalidArgument), "use LOCAL:REMOTE such as 8080:80, or 80 for the same on both sides, or :80 for any that is free here"}
	var f forwarded
	for _, side := range []struct {
		text string
		to   *uint16
	}{{local, &f.local}, {remote, &f.remote}} {
		if side.text == "" && two && side.to == &f.local {
			continue
		}
		n, err := strconv.ParseUint(side.text, 10, 16)
		if err != nil || n == 0 && side.to == &f.remote {
			return f, bad
		}
		*side.to = uint16(n)
	}
	return f, nil
}
