//go:build linux

package cristream

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// Times and numbers that bound what a client can hold.
const (
	tokenFor     = time.Minute // a URL is good for one use within it
	tokensMax    = 1000
	createWithin = 30 * time.Second // in which a client opens all its streams
	goneGrace    = time.Second      // after a client has gone, for what it sent to arrive
	closeWithin  = 5 * time.Second  // in which a client takes some of what was sent to it in the end
)

// errStopped is why requests end when the Server does.
var errStopped = errors.New("the server of streams is stopped")

// Server serves the URLs that it gives out: one use each, within a minute.
type Server struct {
	s    *Service
	ln   net.Listener
	base string
	idle time.Duration
	http *http.Server

	mu     sync.Mutex // guards tokens
	tokens map[string]grant
}

// grant is what a token allows. Exactly one of the requests is set.
type grant struct {
	until   time.Time
	exec    *runtime.ExecRequest
	attach  *runtime.AttachRequest
	forward *runtime.PortForwardRequest
}

// Listen opens the port for streams (contract 7.4.1). ErrInvalidArgument
// names the key of a setting that cannot be. Run serves it.
func Listen(s *Service, c cristate.ServerConfig) (*Server, error) {
	x := &Server{s: s, tokens: map[string]grant{}}
	var err error
	if x.idle, err = time.ParseDuration(cmp.Or(c.StreamIdleTimeout, "4h")); err != nil || x.idle < 0 {
		return nil, fmt.Errorf("stream_idle_timeout %q is no duration: %w", c.StreamIdleTimeout, errdefs.ErrInvalidArgument)
	}
	host := c.StreamServerAddress
	if host == "" {
		host = outgoing()
	}
	config, err := tlsConfig(c, host)
	if err != nil {
		return nil, err
	}
	if x.ln, err = net.Listen("tcp", net.JoinHostPort(host, cmp.Or(c.StreamServerPort, "0"))); err != nil {
		return nil, fmt.Errorf("stream_server_address, stream_server_port: %w", err)
	}
	x.base = "http://" + x.ln.Addr().String()
	if config != nil {
		x.base = "https://" + x.ln.Addr().String()
		x.ln = tls.NewListener(x.ln, config)
	}
	mux := http.NewServeMux()
	for _, method := range []string{"GET ", "POST "} {
		mux.HandleFunc(method+"/exec/{token}", x.serve)
		mux.HandleFunc(method+"/attach/{token}", x.serve)
		mux.HandleFunc(method+"/portforward/{token}", x.serve)
	}
	// The times are for connections that are not taken over.
	x.http = &http.Server{Handler: mux, ReadTimeout: createWithin, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10}
	return x, nil
}

// URL is where the server is reached, without a path.
func (x *Server) URL() string { return x.base }

// Run serves until ctx ends, and closes all connections then.
func (x *Server) Run(ctx context.Context) error {
	base, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	var busy sync.WaitGroup // connections that are no longer net/http's
	x.http.BaseContext = func(net.Listener) context.Context { return base }
	handler := x.http.Handler
	x.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		busy.Add(1)
		defer busy.Done()
		watched(w, r, handler)
	})
	stop := context.AfterFunc(ctx, func() {
		cancel(errStopped)
		x.http.Close()
	})
	defer stop()
	err := x.http.Serve(x.ln)
	cancel(errStopped)
	busy.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve streams: %w", err)
}

// Exec gives out a URL at which the command is executed (contract 7.1.19).
// ErrInvalidArgument; ErrFailedPrecondition if the container does not run.
func (x *Server) Exec(ctx context.Context, r *runtime.ExecRequest) (*runtime.ExecResponse, error) {
	if len(r.GetCmd()) == 0 {
		return nil, fmt.Errorf("exec in container %s: the command is empty: %w", r.GetContainerId(), errdefs.ErrInvalidArgument)
	}
	if err := checkStreams(r.GetTty(), r.GetStdin(), r.GetStdout(), r.GetStderr()); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", r.GetContainerId(), err)
	}
	if _, err := x.s.running(ctx, r.GetContainerId()); err != nil {
		return nil, err
	}
	url, err := x.grant("/exec/", grant{exec: r})
	return &runtime.ExecResponse{Url: url}, err
}

// Attach gives out a URL for a container's streams. Errors are Exec's.
func (x *Server) Attach(ctx context.Context, r *runtime.AttachRequest) (*runtime.AttachResponse, error) {
	if err := checkStreams(r.GetTty(), r.GetStdin(), r.GetStdout(), r.GetStderr()); err != nil {
		return nil, fmt.Errorf("attach to container %s: %w", r.GetContainerId(), err)
	}
	if _, err := x.s.running(ctx, r.GetContainerId()); err != nil {
		return nil, err
	}
	url, err := x.grant("/attach/", grant{attach: r})
	return &runtime.AttachResponse{Url: url}, err
}

// PortForward gives out a URL for ports of a pod. ErrInvalidArgument;
// ErrFailedPrecondition if the pod is not ready.
func (x *Server) PortForward(ctx context.Context, r *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	for _, p := range r.GetPort() {
		if p < 1 || p > 65535 {
			return nil, fmt.Errorf("forward port %d of pod sandbox %s: %w", p, r.GetPodSandboxId(), errdefs.ErrInvalidArgument)
		}
	}
	p, err := x.s.d.Pod(ctx, r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if p.Ready != nil {
		return nil, p.Ready
	}
	url, err := x.grant("/portforward/", grant{forward: r})
	return &runtime.PortForwardResponse{Url: url}, err
}

func checkStreams(tty, stdin, stdout, stderr bool) error {
	if tty && stderr {
		return fmt.Errorf("tty and stderr cannot both be true: %w", errdefs.ErrInvalidArgument)
	}
	if !stdin && !stdout && !stderr {
		return fmt.Errorf("one of stdin, stdout and stderr must be set: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func (x *Server) grant(path string, g grant) (string, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := time.Now()
	if len(x.tokens) >= tokensMax {
		for t, old := range x.tokens {
			if now.After(old.until) {
				delete(x.tokens, t)
			}
		}
	}
	if len(x.tokens) >= tokensMax {
		return "", fmt.Errorf("%d streams were asked for and not opened: %w", tokensMax, errdefs.ErrResourceExhausted)
	}
	token := rand.Text()
	g.until = now.Add(tokenFor)
	x.tokens[token] = g
	return x.base + path + token, nil
}

func (x *Server) redeem(token string) (grant, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	g, ok := x.tokens[token]
	delete(x.tokens, token)
	return g, ok && !time.Now().After(g.until)
}

// outgoing is the address that this host is known by, the one it would use to
// reach others; nothing is sent.
func outgoing() string {
	c, err := net.Dial("udp", "192.0.2.1:9")
	if err != nil {
		return "127.0.0.1"
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).IP.String()
}

// tlsConfig is nil for plain connections.
func tlsConfig(c cristate.ServerConfig, host string) (*tls.Config, error) {
	cert, key := c.X509KeyPair.CertFile, c.X509KeyPair.KeyFile
	switch {
	case !c.EnableTLSStreaming && (cert != "" || key != ""):
		return nil, fmt.Errorf("x509_key_pair_streaming is set, enable_tls_streaming is not: %w", errdefs.ErrInvalidArgument)
	case !c.EnableTLSStreaming:
		return nil, nil
	case (cert == "") != (key == ""):
		return nil, fmt.Errorf("x509_key_pair_streaming needs tls_cert_file and tls_key_file: %w", errdefs.ErrInvalidArgument)
	}
	var pair tls.Certificate
	var err error
	if cert != "" {
		if pair, err = tls.LoadX509KeyPair(cert, key); err != nil {
			return nil, fmt.Errorf("x509_key_pair_streaming: %v: %w", err, errdefs.ErrInvalidArgument)
		}
	} else if pair, err = selfSigned(host); err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}, nil
}

// selfSigned makes a certificate for host.
func selfSigned(host string) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("key for streams: %w", err)
	}
	now := time.Now()
	t := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "gantry streaming"}, NotBefore: now.Add(-time.Hour),
		NotAfter: now.AddDate(10, 0, 0), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}}
	if ip := net.ParseIP(host); ip != nil {
		t.IPAddresses = append(t.IPAddresses, ip)
	} else {
		t.DNSNames = append(t.DNSNames, host)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate for streams: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
