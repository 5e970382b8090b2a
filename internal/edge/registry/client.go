package registry

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	core "github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/internal/lib/keymutex"
)

// Config is how the client behaves. Zero values mean the defaults.
type Config struct {
	// ConfigPath is a colon-separated list of hosts.toml directories.
	ConfigPath string
	// UserAgent is "containerd/<version>": registries make statistics of it.
	UserAgent string
	// DialTimeout limits connecting and the TLS handshake (30 s each).
	DialTimeout time.Duration
	// HeaderTimeout limits the time from a request to its answer's header (60 s).
	HeaderTimeout time.Duration
	// StallTimeout is the time within which MinRate*StallTimeout bytes must
	// move while a body is being read or sent (60 s).
	StallTimeout time.Duration
	// MinRate is in bytes a second (64).
	MinRate int64
	// Attempts is how often one request is tried (5).
	Attempts int
	// BackOff is the first pause between attempts (50 ms); it doubles, with jitter.
	BackOff time.Duration
	// MaxRetryAfter is the longest Retry-After that is waited for (60 s).
	MaxRetryAfter time.Duration
	// Log gets warnings of registries and configuration files.
	Log *slog.Logger
}

// Client reaches registries. It is safe for concurrent use.
type Client struct {
	cfg Config

	mu         sync.Mutex
	transports map[string]*http.Transport // by what makes them different
	gates      map[string]time.Time       // host -> not before, after a 429
	warned     map[string]bool            // configuration warnings already logged
}

// New makes a client; it touches neither network nor disk.
func New(cfg Config) *Client {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&cfg.DialTimeout, 30*time.Second)
	def(&cfg.HeaderTimeout, time.Minute)
	def(&cfg.StallTimeout, time.Minute)
	def(&cfg.BackOff, 50*time.Millisecond)
	def(&cfg.MaxRetryAfter, time.Minute)
	if cfg.MinRate <= 0 {
		cfg.MinRate = 64
	}
	if cfg.Attempts <= 0 {
		cfg.Attempts = 5
	}
	cfg.UserAgent = cmp.Or(cfg.UserAgent, "containerd/2.4.0")
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Client{cfg: cfg, transports: map[string]*http.Transport{}, gates: map[string]time.Time{}, warned: map[string]bool{}}
}

// Close drops idle connections. Requests under way are not disturbed.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.transports {
		t.CloseIdleConnections()
	}
	return nil
}

// Hosts returns the hosts that a reference's requests go to, in order, and
// what its configuration says in vain.
func (c *Client) Hosts(ref Reference, opts core.Options) ([]Host, []Warning, error) {
	dirs := cmp.Or(opts.HostDir, c.cfg.ConfigPath)
	switch opts.DefaultScheme {
	case "", "http", "https":
	default:
		return nil, nil, fmt.Errorf("default scheme %q: want http or https: %w", clip(opts.DefaultScheme, 32), errdefs.ErrInvalidArgument)
	}
	return LookupHosts(dirs, ref.Host, opts.DefaultScheme)
}

// Open makes a Remote (core/registry.Opener). It reads configuration files.
func (c *Client) Open(ref string, opts core.Options) (core.Remote, error) {
	r, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	hosts, warnings, err := c.Hosts(r, opts)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", r, err)
	}
	for _, w := range warnings {
		c.mu.Lock()
		seen := c.warned[w.String()]
		if len(c.warned) < 4096 {
			c.warned[w.String()] = true
		}
		c.mu.Unlock()
		if !seen {
			c.cfg.Log.Warn("registry configuration", "warning", w.String())
		}
	}
	m := &remote{c: c, ref: r, log: c.cfg.Log.With("ref", r.String())}
	for i := range hosts {
		p := &peer{Host: hosts[i], r: m, asked: map[string]*asking{}, tokens: map[string]token{}}
		if !p.Mirror {
			p.extra = http.Header(opts.Headers)
		}
		p.credentials = opts.Credentials
		m.peers = append(m.peers, p)
	}
	return m, nil
}

// peer is a host as one Remote sees it: with what it has learnt of it.
type peer struct {
	Host
	r           *remote
	extra       http.Header
	credentials core.Credentials
	foreign     bool // named by an image, not by the reference: gets nothing but the question

	asking keymutex.Map // held while credentials are asked for

	mu        sync.Mutex
	plain     bool               // does not speak TLS, see Fallback
	scheme    authScheme         // what it asked for last
	challenge challenge          // of schemeBearer
	header    string             // of schemeFixed
	cred      *core.Credential   // once asked
	tokens    map[string]token   // by scope
	asked     map[string]*asking // token requests under way, by scope
}

// request is one question to a host.
type request struct {
	method string
	// path below the host's base, or a whole URL.
	path   string
	url    *url.URL
	query  url.Values
	header http.Header
	// body is called for each attempt; nil means none.
	body func() io.Reader
	size int64
	// scope is the access that is needed: "pull" or "pull,push"; mount adds a repository to pull from.
	scope string
	mount string
	// last says that no other host will be asked: transient errors are tried again.
	last bool
	// verified says that the answer will be compared with a digest, so that a
	// redirect may leave TLS.
	verified bool
	// sent is told the bytes of the body that went out.
	sent func(int64)
}

// timeoutError says whose deadline ran out.
type timeoutError struct{ msg string }

func (e *timeoutError) Error() string        { return e.msg }
func (e *timeoutError) Is(target error) bool { return target == errdefs.ErrUnavailable }

// transport returns the connections for a host, or for the hosts that it redirects to.
func (c *Client) transport(h *Host, own bool) (*http.Transport, error) {
	conf, key, err := h.tlsConfig(own)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.transports[key]; t != nil {
		return t, nil
	}
	dial := c.cfg.DialTimeout
	if h.DialTimeout > 0 {
		dial = h.DialTimeout
	}
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: dial, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       conf,
		TLSHandshakeTimeout:   dial,
		TLSNextProto:          map[string]func(string, *tls.Conn) http.RoundTripper{},
		MaxIdleConnsPerHost:   4,
		IdleConnTimeout:       30 * time.Second,
		ExpectContinueTimeout: time.Second,
		DisableCompression:    true,
		ReadBufferSize:        64 << 10,
		WriteBufferSize:       64 << 10,
	}
	c.transports[key] = t
	return t, nil
}

// do sends a request, with retries, redirects and authorization. An answer
// below 400 is returned with its body open; any other is a *StatusError, but
// for the codes in accept.
func (p *peer) do(ctx context.Context, req request, accept ...int) (*http.Response, error) {
	cfg := &p.r.c.cfg
	var authRounds, serverErrors int
	for attempt := 1; ; attempt++ {
		if err := p.r.c.waitGate(ctx, p.Address); err != nil {
			return nil, fmt.Errorf("%s %s: waiting as the registry asked: %w", req.method, p.Address, err)
		}
		resp, err := p.once(ctx, req)
		if err != nil {
			if ctx.Err() != nil || !req.last || attempt >= cfg.Attempts || !transient(err) {
				return nil, err
			}
			if err := p.r.c.pause(ctx, attempt); err != nil {
				return nil, err
			}
			continue
		}
		for _, w := range resp.Header.Values("Warning") {
			if strings.HasPrefix(w, "299 ") {
				p.r.log.Warn("registry warning", "host", p.Address, "warning", clip(printable(w), 512))
			}
		}
		if resp.StatusCode < 400 {
			return resp, nil
		}
		for _, code := range accept {
			if resp.StatusCode == code {
				return resp, nil
			}
		}
		status := newStatusError(resp)
		retryAfter, asked := parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
		challenges := resp.Header.Values("WWW-Authenticate")
		shown := resp.Request.Header.Get("Authorization")
		resp.Body.Close()
		foreign := !p.own(resp.Request.URL)
		switch code := resp.StatusCode; {
		case code == http.StatusUnauthorized && !foreign && authRounds < 2:
			// A redirect's target never gets to ask for credentials.
			authRounds++
			again, err := p.authenticate(ctx, challenges, req, shown)
			if err != nil {
				return nil, &deniedError{fmt.Errorf("%w (%w)", err, status)}
			}
			if !again {
				return nil, status
			}
			attempt--
		case code == http.StatusTooManyRequests || code == http.StatusRequestTimeout || (code == http.StatusServiceUnavailable && asked):
			if attempt >= cfg.Attempts {
				return nil, status
			}
			if retryAfter > cfg.MaxRetryAfter {
				return nil, fmt.Errorf("%w (asks to wait %s, more than %s)", status, retryAfter, cfg.MaxRetryAfter)
			}
			if asked {
				// All requests to the host wait, not only this one.
				p.r.c.closeGate(p.Address, retryAfter)
			} else if err := p.r.c.pause(ctx, attempt); err != nil {
				return nil, err
			}
		case (code == 500 || code == 503 || code == 504) && req.last && serverErrors == 0:
			serverErrors++
			if err := p.r.c.pause(ctx, attempt); err != nil {
				return nil, err
			}
		default:
			return nil, status
		}
	}
}

// base is the URL that a request is first sent to.
func (p *peer) base(req request) *url.URL {
	if req.url != nil {
		return req.url
	}
	scheme := p.Scheme
	p.mu.Lock()
	if p.plain {
		scheme = "http"
	}
	p.mu.Unlock()
	u := &url.URL{Scheme: scheme, Host: p.Address, Path: p.Path + req.path}
	q := url.Values{}
	maps.Copy(q, req.query)
	if p.Mirror {
		q.Set("ns", p.r.ref.Host)
	}
	u.RawQuery = q.Encode()
	return u
}

// once sends a request and follows redirects.
func (p *peer) once(ctx context.Context, req request) (*http.Response, error) {
	origin := p.base(req)
	resp, err := p.send(ctx, req, origin)
	if err != nil && p.Fallback && req.url == nil && origin.Scheme == "https" && notTLS(err) {
		p.mu.Lock()
		p.plain = true
		p.mu.Unlock()
		origin = p.base(req)
		resp, err = p.send(ctx, req, origin)
	}
	at := origin
	for hops := 0; err == nil; hops++ {
		code := resp.StatusCode
		location := resp.Header.Get("Location")
		if (req.method != http.MethodGet && req.method != http.MethodHead) || location == "" ||
			(code != 301 && code != 302 && code != 303 && code != 307 && code != 308) {
			return resp, nil
		}
		resp.Body.Close()
		next, perr := at.Parse(location)
		if perr != nil || next.Host == "" || (next.Scheme != "https" && next.Scheme != "http") {
			return nil, fmt.Errorf("%s %s: redirect to a URL that cannot be used: %w", req.method, redact(at), errdefs.ErrUnavailable)
		}
		if hops >= 10 {
			return nil, fmt.Errorf("%s %s: more than 10 redirects: %w", req.method, redact(origin), errdefs.ErrUnavailable)
		}
		if at.Scheme == "https" && next.Scheme == "http" && !req.verified {
			return nil, fmt.Errorf("%s %s: redirect from https to %s refused: %w", req.method, redact(at), redact(next), errdefs.ErrUnavailable)
		}
		at = next
		resp, err = p.send(ctx, req, at)
	}
	return nil, err
}

func redact(u *url.URL) string {
	c := *u
	c.RawQuery, c.User = "", nil
	return c.String()
}

// own reports whether u is the peer itself, by the same protocol, and not some
// place that it, or an image, points to.
func (p *peer) own(u *url.URL) bool {
	return !p.foreign && u.Host == p.Address && u.Scheme == p.base(request{}).Scheme
}

// send makes one exchange with the server at u. Only if u is the peer itself
// does it carry headers and credentials of the peer.
func (p *peer) send(ctx context.Context, req request, u *url.URL) (*http.Response, error) {
	cfg := &p.r.c.cfg
	own := p.own(u)
	h := http.Header{}
	for _, k := range []string{"Accept", "Accept-Encoding", "Range", "Content-Type", "Content-Range"} {
		if v := req.header.Values(k); len(v) > 0 {
			h[k] = v
		}
	}
	h.Set("User-Agent", cfg.UserAgent)
	if own {
		for k, v := range p.extra {
			h[http.CanonicalHeaderKey(k)] = v
		}
		for k, v := range p.Header {
			h[http.CanonicalHeaderKey(k)] = v
		}
		if h.Get("Authorization") == "" {
			a, err := p.authorization(ctx, req)
			if err != nil {
				return nil, err
			}
			if a != "" {
				h.Set("Authorization", a)
			}
		}
	}
	t, err := p.r.c.transport(&p.Host, own)
	if err != nil {
		return nil, err
	}
	return exchange(ctx, cfg, t, req, u, h)
}

// exchange sends one request over t and returns when the answer's header is
// here. The body fails when it stalls.
func exchange(ctx context.Context, cfg *Config, t http.RoundTripper, req request, u *url.URL, h http.Header) (*http.Response, error) {
	hctx, cancel := context.WithCancelCause(ctx)
	w := newWatch(cfg, cancel)
	var body io.Reader
	if req.body != nil {
		body = &sending{r: req.body(), size: req.size, w: w, sent: req.sent}
	}
	hr, err := http.NewRequestWithContext(hctx, req.method, u.String(), body)
	if err != nil {
		cancel(nil)
		return nil, fmt.Errorf("%s %s: %v: %w", req.method, redact(u), err, errdefs.ErrInvalidArgument)
	}
	hr.Header = h
	if req.body != nil {
		hr.ContentLength = req.size
		if req.size == 0 {
			hr.Body = http.NoBody
		}
	}
	timeout := cfg.DialTimeout + cfg.HeaderTimeout
	if req.body != nil && req.size > 0 {
		// The server answers when it has it all; sending has its own deadline.
		w.start()
		timeout = 0
	} else {
		w.timer = time.AfterFunc(timeout, func() {
			cancel(&timeoutError{fmt.Sprintf("no answer within %s", timeout)})
		})
	}
	resp, err := t.RoundTrip(hr)
	w.stop()
	if err != nil {
		if c := context.Cause(hctx); c != nil && ctx.Err() == nil {
			err = c
		}
		cancel(nil)
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%s %s: %w", req.method, redact(u), context.Cause(ctx))
		}
		if _, ok := errorAs[*timeoutError](err); ok {
			return nil, fmt.Errorf("%s %s: %w", req.method, redact(u), err)
		}
		return nil, fmt.Errorf("%s %s: %w: %w", req.method, redact(u), err, errdefs.ErrUnavailable)
	}
	resp.Body = &receiving{ReadCloser: resp.Body, w: newWatch(cfg, cancel), cancel: cancel, ctx: hctx, outer: ctx}
	return resp, nil
}

// watch is a progress deadline: unless min bytes move within the time that is
// spent waiting for them, the request is cancelled.
type watch struct {
	limit  time.Duration
	min    int64
	cancel context.CancelCauseFunc

	timer  *time.Timer
	began  time.Time
	waited time.Duration
	window int64
	total  atomic.Int64
	since  time.Time
}

func newWatch(cfg *Config, cancel context.CancelCauseFunc) *watch {
	return &watch{limit: cfg.StallTimeout, min: max(1, int64(cfg.StallTimeout.Seconds()*float64(cfg.MinRate))), cancel: cancel, since: time.Now()}
}

// start begins to wait. It and stop are called by one goroutine at a time.
func (w *watch) start() {
	w.began = time.Now()
	fire := func() {
		total, elapsed := w.total.Load(), time.Since(w.since)
		w.cancel(&timeoutError{fmt.Sprintf("stalled: %d bytes in %s (%.0f bytes/s), less than %d within %s",
			total, elapsed.Round(time.Millisecond), float64(total)/elapsed.Seconds(), w.min, w.limit)})
	}
	w.timer = time.AfterFunc(w.limit-w.waited, fire)
}

func (w *watch) stop() {
	if w.timer != nil {
		w.timer.Stop()
	}
	if !w.began.IsZero() {
		w.waited += time.Since(w.began)
	}
}

func (w *watch) moved(n int) {
	w.total.Add(int64(n))
	w.window += int64(n)
	if w.window >= w.min {
		w.window, w.waited = 0, 0
	}
}

// receiving is an answer's body. The deadline runs only while a Read waits for
// the network, so a slow disk is not the registry's fault.
type receiving struct {
	io.ReadCloser
	w      *watch
	cancel context.CancelCauseFunc
	ctx    context.Context // the exchange's
	outer  context.Context // the caller's
}

func (r *receiving) Read(b []byte) (int, error) {
	r.w.start()
	n, err := r.ReadCloser.Read(b)
	r.w.stop()
	r.w.moved(n)
	if err != nil && err != io.EOF {
		if r.outer.Err() != nil {
			err = context.Cause(r.outer)
		} else if c := context.Cause(r.ctx); c != nil {
			err = c
		}
	}
	return n, err
}

func (r *receiving) Close() error {
	r.cancel(nil)
	return r.ReadCloser.Close()
}

// sending is a request's body. That the transport asks for more is progress,
// and a fresh deadline starts with each piece. When all is sent the server has
// commitFactor times as long to answer: it may have to move a large blob.
type sending struct {
	r    io.Reader
	size int64
	w    *watch
	sent func(int64)
	mu   sync.Mutex
	n    int64
}

func (s *sending) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n > 0 {
		s.n += int64(n)
		s.w.total.Store(s.n)
		limit := s.w.limit
		if s.n >= s.size {
			limit *= commitFactor
		}
		if s.w.timer != nil && s.w.timer.Stop() {
			s.w.timer.Reset(limit)
		}
		if s.sent != nil {
			s.sent(s.n)
		}
	}
	return n, err
}

const commitFactor = 5

// transient reports whether an error of the transport may not come again.
func transient(err error) bool {
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns.IsTemporary || dns.IsTimeout
	}
	var certificate *tls.CertificateVerificationError
	if errors.As(err, &certificate) || notTLS(err) {
		return false
	}
	return errdefs.IsUnavailable(err)
}

// notTLS reports that the other side does not speak TLS, or nobody listens on
// a port that was implied.
func notTLS(err error) bool {
	var record tls.RecordHeaderError
	return errors.As(err, &record) || errors.Is(err, http.ErrSchemeMismatch) ||
		strings.Contains(err.Error(), "server gave HTTP response to HTTPS client")
}

// pause waits before the next attempt.
func (c *Client) pause(ctx context.Context, attempt int) error {
	d := c.cfg.BackOff << min(attempt-1, 8)
	return sleep(ctx, d/2+rand.N(d))
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// closeGate keeps all requests from a host for a while.
func (c *Client) closeGate(host string, d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if until := time.Now().Add(d); until.After(c.gates[host]) {
		c.gates[host] = until
	}
}

func (c *Client) waitGate(ctx context.Context, host string) error {
	for {
		c.mu.Lock()
		until, closed := c.gates[host]
		if closed && !time.Now().Before(until) {
			delete(c.gates, host)
			closed = false
		}
		c.mu.Unlock()
		if !closed {
			return ctx.Err()
		}
		// Jitter: not everybody comes back at the same instant.
		if err := sleep(ctx, time.Until(until)+rand.N(c.cfg.BackOff)); err != nil {
			return err
		}
	}
}

// parseRetryAfter reads seconds or a date.
func parseRetryAfter(s string, now time.Time) (time.Duration, bool) {
	if s == "" {
		return 0, false
	}
	if n, err := strconv.Atoi(strings.TrimSpace(s)); err == nil && n >= 0 {
		if n > 1<<30 {
			n = 1 << 30
		}
		return time.Duration(n) * time.Second, true
	}
	if t, err := http.ParseTime(s); err == nil {
		return max(0, t.Sub(now)), true
	}
	return 0, false
}

func errorAs[T error](err error) (T, bool) {
	var t T
	ok := errors.As(err, &t)
	return t, ok
}
