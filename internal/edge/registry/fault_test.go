package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	core "github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/internal/edge/registry/registrytest"
)

// quick makes every deadline short; bound is what any request may take then:
// five attempts of a second and a half, and as much again for a busy machine.
var quick = Config{DialTimeout: time.Second, HeaderTimeout: 500 * time.Millisecond, StallTimeout: 300 * time.Millisecond, MinRate: 1000,
	BackOff: time.Millisecond, MaxRetryAfter: 2 * time.Second}

const bound = 16 * time.Second

func blobOf(n int) ([]byte, ocispec.Descriptor) {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
	}
	return b, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(b), Size: int64(n)}
}

func open(t *testing.T, c *Client, ref string, opts core.Options) core.Remote {
	t.Helper()
	r, err := c.Open(ref, opts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func client(t *testing.T, cfg Config) *Client {
	c := New(cfg)
	t.Cleanup(func() { c.Close() })
	return c
}

func read(ctx context.Context, r core.Remote, desc ocispec.Descriptor, offset int64) ([]byte, error) {
	rc, err := r.Fetch(ctx, desc, offset)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	var b bytes.Buffer
	_, err = io.Copy(&b, io.LimitReader(rc, 64<<20))
	return b.Bytes(), err
}

// certsDir writes a hosts.toml for a registry and returns its directory's parent.
func certsDir(t *testing.T, registry, text string) string {
	root := t.TempDir()
	dir := filepath.Join(root, registry)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return root
}

// breakAfter sends a part of a body and cuts the connection.
func breakAfter(w http.ResponseWriter, whole []byte, n int, reset bool) {
	w.Header().Set("Content-Length", fmt.Sprint(len(whole)))
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write(whole[:n])
	_ = http.NewResponseController(w).Flush()
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	if reset {
		_ = conn.(*net.TCPConn).SetLinger(0)
	}
	conn.Close()
}

func hang(q *http.Request) { <-q.Context().Done() }

// TestBodyFaults: each way in which a body can go wrong once or always ends
// within the bound, with all bytes or with an error that says which host, what
// and how far.
//
// contract: 6.1.3, 6.1.5
// promise: P7, P32, P36
func TestBodyFaults(t *testing.T) {
	body, desc := blobOf(400_000)
	for _, c := range []struct {
		name   string
		always bool
		serve  func(w http.ResponseWriter, q *http.Request)
		err    string // "" if the fetch succeeds
	}{
		{name: "reset", serve: func(w http.ResponseWriter, _ *http.Request) { breakAfter(w, body, 150_000, true) }},
		{name: "half close", serve: func(w http.ResponseWriter, _ *http.Request) { breakAfter(w, body, 150_000, false) }},
		{name: "blackhole", serve: func(w http.ResponseWriter, q *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			_, _ = w.Write(body[:150_000])
			_ = http.NewResponseController(w).Flush()
			hang(q)
		}},
		{name: "blackhole always", always: true, err: "stalled", serve: func(w http.ResponseWriter, q *http.Request) {
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			hang(q)
		}},
		{name: "no header", always: true, err: "no answer within", serve: func(_ http.ResponseWriter, q *http.Request) { hang(q) }},
		{name: "one byte a time", always: true, err: "bytes/s", serve: func(w http.ResponseWriter, q *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for i := range body {
				_, _ = w.Write(body[i : i+1])
				_ = http.NewResponseController(w).Flush()
				select {
				case <-tick.C:
				case <-q.Context().Done():
					return
				}
			}
		}},
		{name: "truncated without length", serve: func(w http.ResponseWriter, _ *http.Request) {
			_ = http.NewResponseController(w).Flush()
			_, _ = w.Write(body[:1000])
		}},
		{name: "truncated with length", err: "1000 bytes from offset 0, but the blob has 400000", always: true, serve: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write(body[:1000])
		}},
		{name: "reset always", always: true, err: "after ", serve: func(w http.ResponseWriter, _ *http.Request) { breakAfter(w, body, 0, true) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := registrytest.New(t)
			reg.AddBlob(body)
			var faults atomic.Int32
			reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
				if !strings.Contains(q.URL.Path, "/blobs/") || (!c.always && faults.Load() > 0) {
					return false
				}
				faults.Add(1)
				c.serve(w, q)
				return true
			}
			began := time.Now()
			got, err := read(t.Context(), open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{}), desc, 0)
			if d := time.Since(began); d > bound {
				t.Errorf("took %s", d)
			}
			if c.err == "" {
				if err != nil || !bytes.Equal(got, body) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), reg.Host()) || !strings.Contains(err.Error(), desc.Digest.String()) {
				t.Errorf("error %v does not say %q, host and digest", err, c.err)
			}
			if !errdefs.IsUnavailable(err) && !errdefs.IsFailedPrecondition(err) && !strings.Contains(c.err, "after") {
				t.Errorf("class of %v", err)
			}
		})
	}
}

// A broken body is resumed where it broke, and bytes are not fetched twice.
//
// contract: 6.1.3
// promise: P32
func TestResume(t *testing.T) {
	body, desc := blobOf(400_000)
	for _, c := range []struct {
		name  string
		serve func(w http.ResponseWriter, q *http.Request) bool // of the second request
		ok    bool
	}{
		{"range", func(http.ResponseWriter, *http.Request) bool { return false }, true},
		{"range ignored", func(w http.ResponseWriter, q *http.Request) bool { _, _ = w.Write(body); return true }, true},
		{"range not satisfiable", func(w http.ResponseWriter, q *http.Request) bool {
			if q.Header.Get("Range") == "" {
				return false
			}
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return true
		}, true},
		{"wrong range", func(w http.ResponseWriter, q *http.Request) bool {
			w.Header().Set("Content-Range", "bytes 5-399999/400000")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(body[5:])
			return true
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := registrytest.New(t)
			reg.AddBlob(body)
			first := true
			reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
				if !strings.Contains(q.URL.Path, "/blobs/") {
					return false
				}
				if first {
					first = false
					breakAfter(w, body, 100_000, false)
					return true
				}
				return c.serve(w, q)
			}
			got, err := read(t.Context(), open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{}), desc, 0)
			if c.ok && (err != nil || !bytes.Equal(got, body)) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if !c.ok && (err == nil || !strings.Contains(err.Error(), "asked for bytes from")) {
				t.Errorf("error %v", err)
			}
			for _, q := range reg.Requests()[1:] {
				if strings.Contains(q.Path, "/blobs/") && q.Header.Get("Range") != "" && (q.Header.Get("Accept-Encoding") != "identity" || !strings.HasSuffix(q.Header.Get("Range"), "-")) {
					t.Errorf("resume asks %v", q.Header)
				}
			}
		})
	}
	reg := registrytest.New(t)
	reg.AddBlob(body)
	r := open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{})
	got, err := read(t.Context(), r, desc, 399_990)
	if err != nil || !bytes.Equal(got, body[399_990:]) {
		t.Errorf("from an offset: %d bytes, %v", len(got), err)
	}
	if got, err := read(t.Context(), r, desc, 400_000); err != nil || len(got) != 0 {
		t.Errorf("from the end: %d bytes, %v", len(got), err)
	}
	if _, err := r.Fetch(t.Context(), desc, 400_001); !errdefs.IsOutOfRange(err) {
		t.Errorf("after the end: %v", err)
	}
}

// contract: 6.1.3
func TestContentEncoding(t *testing.T) {
	body, desc := blobOf(50_000)
	for _, enc := range []string{"gzip", "zstd"} {
		reg := registrytest.New(t)
		reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
			if q.Header.Get("Accept-Encoding") != "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5" {
				t.Errorf("Accept-Encoding %q", q.Header.Get("Accept-Encoding"))
			}
			w.Header().Set("Content-Encoding", enc)
			if enc == "gzip" {
				z := gzip.NewWriter(w)
				_, _ = z.Write(body)
				z.Close()
				return true
			}
			z, _ := zstd.NewWriter(w)
			_, _ = z.Write(body)
			z.Close()
			return true
		}
		got, err := read(t.Context(), open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{}), desc, 0)
		if err != nil || !bytes.Equal(got, body) {
			t.Errorf("%s: %d bytes, %v", enc, len(got), err)
		}
	}
}

// Cancelling returns at once, wherever the request is, and leaves no goroutine.
//
// promise: P7
func TestCancel(t *testing.T) {
	body, desc := blobOf(100_000)
	before := runtime.NumGoroutine()
	for _, stage := range []string{"header", "body", "retry-after"} {
		t.Run(stage, func(t *testing.T) {
			reg := registrytest.New(t)
			reached := make(chan struct{}, 100)
			reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
				reached <- struct{}{}
				switch stage {
				case "body":
					w.Header().Set("Content-Length", fmt.Sprint(len(body)))
					_, _ = w.Write(body[:10])
					_ = http.NewResponseController(w).Flush()
				case "retry-after":
					w.Header().Set("Retry-After", "50")
					w.WriteHeader(http.StatusTooManyRequests)
					return true
				}
				hang(q)
				return true
			}
			c := client(t, Config{}) // with the long deadlines of every day
			r := open(t, c, reg.Host()+"/a/b:1", core.Options{DefaultScheme: "http"})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { _, err := read(ctx, r, desc, 0); done <- err }()
			<-reached
			cancel()
			select {
			case err := <-done:
				if !errors.Is(err, context.Canceled) {
					t.Errorf("error %v", err)
				}
			case <-time.After(5 * time.Second):
				t.Error("cancel takes more than five seconds")
			}
		})
	}
	for deadline := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > before+2; {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<16)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// contract: 6.1.2, 13.32
func TestResolve(t *testing.T) {
	img := registrytest.Build("amd64", 100, registrytest.Gzip)
	type hook = func(w http.ResponseWriter, q *http.Request) bool
	strip := func(method string, header ...string) hook {
		return func(w http.ResponseWriter, q *http.Request) bool {
			if q.Method != method {
				return false
			}
			w.Header().Set("Content-Type", img.Target.MediaType)
			w.Header().Set("Docker-Content-Digest", img.Target.Digest.String())
			for _, h := range header {
				w.Header()[h] = nil
			}
			if method == http.MethodGet {
				_, _ = w.Write(img.Top)
			} else if len(header) == 0 {
				w.Header().Set("Content-Length", fmt.Sprint(len(img.Top)))
			}
			return true
		}
	}
	for _, c := range []struct {
		name string
		hook hook
		gets int
	}{
		{"plain", nil, 0},
		{"HEAD without digest", strip(http.MethodHead, "Docker-Content-Digest"), 1},
		{"HEAD without type", strip(http.MethodHead, "Content-Type"), 1},
		{"HEAD not allowed", func(w http.ResponseWriter, q *http.Request) bool {
			if q.Method == http.MethodHead {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return true
			}
			return false
		}, 1},
		{"no digest anywhere", func(w http.ResponseWriter, q *http.Request) bool {
			w.Header().Set("Content-Type", img.Target.MediaType)
			if q.Method == http.MethodGet {
				_, _ = w.Write(img.Top)
			}
			return true
		}, 1},
		{"generic type", func(w http.ResponseWriter, q *http.Request) bool {
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			if q.Method == http.MethodGet {
				_, _ = w.Write(img.Top)
			}
			return true
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := registrytest.New(t)
			reg.AddImage("a/b", "1", img)
			reg.Hook = c.hook
			cl := client(t, quick)
			for _, ref := range []string{":1", "@" + img.Target.Digest.String(), ":1@" + img.Target.Digest.String()} {
				d, err := open(t, cl, reg.Host()+"/a/b"+ref, core.Options{}).Resolve(t.Context())
				if err != nil || d.Digest != img.Target.Digest || d.Size != img.Target.Size || d.MediaType != img.Target.MediaType {
					t.Errorf("%s: %+v, %v", ref, d, err)
				}
			}
			if n := reg.Count("GET", "/manifests/1"); n != c.gets {
				t.Errorf("%d GETs, want %d", n, c.gets)
			}
		})
	}

	reg := registrytest.New(t)
	body, desc := blobOf(100)
	reg.AddBlob(body)
	d, err := open(t, client(t, quick), reg.Host()+"/a/b@"+desc.Digest.String(), core.Options{}).Resolve(t.Context())
	if err != nil || d.Digest != desc.Digest || d.Size != 100 {
		t.Errorf("a digest among the blobs: %+v, %v", d, err)
	}
	if reg.Count("HEAD", "/blobs/") != 1 {
		t.Error("the blobs were not asked")
	}
	reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		w.Header().Set("Content-Type", img.Target.MediaType)
		if q.Method == http.MethodGet {
			_, _ = w.Write(bytes.Repeat([]byte(" "), MaxManifest+1))
		}
		return true
	}
	_, err = open(t, client(t, quick), reg.Host()+"/a/b:big", core.Options{}).Resolve(t.Context())
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "larger than 4194304 bytes") {
		t.Errorf("oversize: %v", err)
	}
	reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		w.Header().Set("Docker-Content-Digest", desc.Digest.String())
		_, _ = w.Write([]byte(`{"layers":[]}`))
		return true
	}
	_, err = open(t, client(t, quick), reg.Host()+"/a/b:lie", core.Options{}).Resolve(t.Context())
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a digest that is not the body's: %v", err)
	}
}

// contract: 6.1.2, 6.1.13
// promise: P31, P36
func TestErrorChain(t *testing.T) {
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	deadHost := dead.Addr().String()
	dead.Close()
	denying, missing := registrytest.New(t), registrytest.New(t)
	denying.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		registrytest.Fail(w, http.StatusForbidden, "DENIED", "no \x1b[31mway")
		return true
	}
	root := certsDir(t, "example.com", fmt.Sprintf("server = %q\n[host.%q]\n[host.%q]\n", "http://"+deadHost, "http://"+denying.Host(), "http://"+missing.Host()))
	_, err = open(t, client(t, quick), "example.com/a/b:1", core.Options{HostDir: root}).Resolve(t.Context())
	if !errdefs.IsNotFound(err) || errdefs.IsUnavailable(err) || errdefs.IsPermissionDenied(err) {
		t.Errorf("class of %v", err)
	}
	text := err.Error()
	for _, s := range []string{"resolve example.com/a/b:1: GET http://" + missing.Host(), "manifest unknown: manifest unknown", "also tried " + denying.Host(), "denied: no  [31mway",
		"pull access denied, repository does not exist or may require authorization", "also tried " + deadHost, "connection refused"} {
		if !strings.Contains(text, s) {
			t.Errorf("%q is not in %s", s, text)
		}
	}
	var chain *Error
	if !errors.As(err, &chain) || len(chain.Hosts) != 3 {
		t.Errorf("chain %+v", chain)
	}
	var status *StatusError
	if !errors.As(err, &status) || status.Code != 404 {
		t.Errorf("status %+v", status)
	}

	root = certsDir(t, "example.com", fmt.Sprintf("server = %q\n", "http://"+deadHost))
	_, err = open(t, client(t, quick), "example.com/a/b:1", core.Options{HostDir: root}).Resolve(t.Context())
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), deadHost) {
		t.Errorf("unreachable: %v", err)
	}
	root = certsDir(t, "example.com", fmt.Sprintf("server = %q\n", "http://"+denying.Host()))
	_, err = open(t, client(t, quick), "example.com/a/b:1", core.Options{HostDir: root}).Resolve(t.Context())
	if !errdefs.IsPermissionDenied(err) {
		t.Errorf("denied: %v", err)
	}
}

// contract: 6.1.5
// promise: P31
func TestRetries(t *testing.T) {
	img := registrytest.Build("amd64", 10, registrytest.Gzip)
	for _, c := range []struct {
		name   string
		code   int
		header string
		times  int // how often it is answered so
		ok     bool
		wait   time.Duration
		seen   int // requests to the manifest, 0 for any number
	}{
		{"429 with Retry-After", 429, "1", 1, true, 900 * time.Millisecond, 2},
		{"429 without", 429, "", 3, true, 0, 4},
		{"429 always", 429, "", 100, false, 0, 5},
		{"429 for an hour", 429, "3600", 100, false, 0, 1},
		{"408", 408, "", 2, true, 0, 3},
		{"503 once", 503, "", 1, true, 0, 2},
		{"500 always", 500, "", 100, false, 0, 2},
		{"502", 502, "", 1, false, 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			reg := registrytest.New(t)
			reg.AddImage("a/b", "1", img)
			var n atomic.Int32
			reg.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
				if int(n.Add(1)) > c.times {
					return false
				}
				if c.header != "" {
					w.Header().Set("Retry-After", c.header)
				}
				w.WriteHeader(c.code)
				return true
			}
			began := time.Now()
			_, err := open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{DefaultScheme: "http"}).Resolve(t.Context())
			if d := time.Since(began); d < c.wait || d > bound {
				t.Errorf("took %s", d)
			}
			if (err == nil) != c.ok {
				t.Errorf("error %v", err)
			}
			if err != nil && !strings.Contains(err.Error(), fmt.Sprint(c.code)) {
				t.Errorf("the error does not name the status: %v", err)
			}
			if got := len(reg.Requests()); c.seen > 0 && got != c.seen {
				t.Errorf("%d requests, want %d", got, c.seen)
			}
		})
	}
}

// A mirror that is down is passed over without delay, and the next one used.
//
// contract: 6.1.2, 13.31
func TestMirrors(t *testing.T) {
	body, desc := blobOf(10_000)
	img := registrytest.Build("amd64", 10, registrytest.Gzip)
	bad, mirror, origin := registrytest.New(t), registrytest.New(t), registrytest.New(t)
	bad.Hook = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true }
	mirror.AddImage("a/b", "1", img)
	origin.AddImage("a/b", "1", img)
	origin.AddBlob(body)
	root := certsDir(t, "docker.io", fmt.Sprintf("server = %q\n[host.%q]\n[host.%q.header]\nX-Mirror=\"yes\"\n", "http://"+origin.Host(), "http://"+bad.Host(), "http://"+mirror.Host()+"/sub"))
	mirror.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		q.URL.Path = strings.TrimPrefix(q.URL.Path, "/sub")
		return false
	}
	r := open(t, client(t, quick), "docker.io/a/b:1", core.Options{HostDir: root, Headers: http.Header{"X-Own": {"1"}}})
	if d, err := r.Resolve(t.Context()); err != nil || d.Digest != img.Target.Digest {
		t.Fatal(d, err)
	}
	if got, err := read(t.Context(), r, desc, 0); err != nil || !bytes.Equal(got, body) {
		t.Fatal(len(got), err)
	}
	for _, q := range mirror.Requests() {
		if q.Query != "ns=docker.io" || q.Header.Get("X-Mirror") != "yes" || q.Header.Get("X-Own") != "" {
			t.Errorf("the mirror got %+v", q)
		}
	}
	// The origin is named in the file: it is another host than docker.io's own.
	if len(origin.Requests()) == 0 || len(bad.Requests()) == 0 {
		t.Error("not all hosts were asked")
	}
	for _, q := range origin.Requests() {
		if q.Header.Get("X-Mirror") != "" {
			t.Errorf("the origin got a mirror's header: %+v", q)
		}
		if !strings.HasPrefix(q.Header.Get("User-Agent"), "containerd/") {
			t.Errorf("User-Agent %q", q.Header.Get("User-Agent"))
		}
	}
}

// TestCredentials records every header that any host gets: over mirrors,
// redirects, foreign layer URLs and token servers, no credential reaches a host
// that it was not issued for.
//
// contract: 6.1.7
// promise: P14, C6
func TestCredentials(t *testing.T) {
	body, desc := blobOf(5_000)
	foreign, fdesc := blobOf(6_000)
	img := registrytest.Build("amd64", 10, registrytest.Gzip)
	origin, mirror, storage, tokens := registrytest.New(t), registrytest.New(t), registrytest.New(t), registrytest.New(t)
	origin.AddImage("a/b", "1", img)
	storage.AddBlob(body)
	storage.AddBlob(foreign)

	var mu sync.Mutex
	issued := map[string]string{} // token -> host it is for
	tokens.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		host, want := origin.Host(), "origin-user:origin-secret"
		if q.Method == http.MethodPost {
			w.WriteHeader(http.StatusMethodNotAllowed) // GET is the fallback
			return true
		}
		if strings.HasPrefix(q.URL.Query().Get("service"), "mirror") {
			host, want = mirror.Host(), "mirror-user:mirror-secret"
		}
		if q.Header.Get("Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte(want)) {
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if q.URL.Query().Get("scope") != "repository:a/b:pull" || q.URL.Query().Get("account") == "" {
			t.Errorf("token asked with %s", q.URL.RawQuery)
		}
		mu.Lock()
		tok := fmt.Sprintf("token-%d", len(issued))
		issued[tok] = host
		mu.Unlock()
		fmt.Fprintf(w, `{"token":%q,"expires_in":300}`, tok)
		return true
	}
	protect := func(reg *registrytest.Registry, service string, then func(w http.ResponseWriter, q *http.Request) bool) {
		reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
			tok := strings.TrimPrefix(q.Header.Get("Authorization"), "Bearer ")
			mu.Lock()
			ok := issued[tok] == reg.Host()
			mu.Unlock()
			if !ok {
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service=%q,scope="repository:a/b:pull"`, tokens.Host(), service))
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			return then(w, q)
		}
	}
	protect(mirror, "mirror", func(w http.ResponseWriter, q *http.Request) bool { http.NotFound(w, q); return true })
	protect(origin, "origin", func(w http.ResponseWriter, q *http.Request) bool {
		if strings.Contains(q.URL.Path, "/blobs/") {
			http.Redirect(w, q, "http://"+storage.Host()+"/v2/a/b/blobs/"+desc.Digest.String()+"?signature=x", http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	storage.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		if strings.Contains(q.URL.Path, "/deny/") {
			// A foreign URL that asks for credentials gets none.
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/steal",service="origin"`, storage.Host()))
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		return false
	}
	root := certsDir(t, origin.Host(), fmt.Sprintf("server = %q\n[host.%q]\n[host.%q.header]\nX-Origin-Key=\"k\"\n", "http://"+origin.Host(), "http://"+mirror.Host(), "http://"+origin.Host()))
	asked := map[string]int{}
	opts := core.Options{HostDir: root, Credentials: func(_ context.Context, q core.AuthRequest) (core.Credential, error) {
		mu.Lock()
		defer mu.Unlock()
		asked[q.Host]++
		switch q.Host {
		case origin.Host():
			return core.Credential{Username: "origin-user", Secret: "origin-secret"}, nil
		case mirror.Host():
			return core.Credential{Username: "mirror-user", Secret: "mirror-secret"}, nil
		}
		t.Errorf("asked for credentials of %s", q.Host)
		return core.Credential{Username: "thief", Secret: "thief"}, nil
	}}
	r := open(t, client(t, quick), origin.Host()+"/a/b:1", opts)
	if _, err := r.Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := read(t.Context(), r, desc, 0); err != nil || !bytes.Equal(got, body) {
		t.Fatal(len(got), err)
	}
	fdesc.MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	fdesc.URLs = []string{"http://" + storage.Host() + "/deny/x", "file:///etc/passwd", "http://" + storage.Host() + "/v2/x/blobs/" + fdesc.Digest.String()}
	if got, err := read(t.Context(), r, fdesc, 0); err != nil || !bytes.Equal(got, foreign) {
		// The first URL refuses and its host is passed over; then the registry redirects to desc's bytes.
		if sha256.Sum256(got) == sha256.Sum256(body) || err == nil {
			t.Error(len(got), err)
		}
	}
	for _, q := range storage.Requests() {
		if q.Header.Get("Authorization") != "" || q.Header.Get("X-Origin-Key") != "" || q.Header.Get("Cookie") != "" {
			t.Errorf("the storage host got %v", q.Header)
		}
		if strings.Contains(q.Path, "steal") {
			t.Error("the token server of a foreign URL was asked")
		}
	}
	for _, reg := range []*registrytest.Registry{origin, mirror} {
		for _, q := range reg.Requests() {
			a := q.Header.Get("Authorization")
			if a != "" && issued[strings.TrimPrefix(a, "Bearer ")] != reg.Host() {
				t.Errorf("%s got %s", reg.Host(), a)
			}
			if reg == mirror && q.Header.Get("X-Origin-Key") != "" {
				t.Error("the mirror got the origin's header")
			}
		}
	}
	if asked[origin.Host()] != 1 || asked[mirror.Host()] != 1 || len(asked) != 2 {
		t.Errorf("asked %v", asked)
	}
	if len(issued) != 3 && len(issued) != 2 {
		t.Errorf("%d tokens were fetched: the cache does not work", len(issued))
	}
}

// contract: 6.1.7
func TestTokenForms(t *testing.T) {
	img := registrytest.Build("amd64", 10, registrytest.Gzip)
	for _, c := range []struct {
		name string
		cred core.Credential
		form string // of the POST, "" for a GET
	}{
		{"anonymous", core.Credential{}, ""},
		{"password", core.Credential{Username: "u", Secret: "p"}, "access_type=offline&client_id=containerd-client&grant_type=password&password=p&scope=repository%3Aa%2Fb%3Apull&service=s&username=u"},
		{"refresh", core.Credential{Secret: "r", Refresh: true}, "client_id=containerd-client&grant_type=refresh_token&refresh_token=r&scope=repository%3Aa%2Fb%3Apull&service=s"},
		{"header", core.Credential{Header: "Custom abc"}, "none"},
	} {
		t.Run(c.name, func(t *testing.T) {
			reg := registrytest.New(t)
			reg.AddImage("a/b", "1", img)
			form := "none"
			refused := false
			reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
				if q.URL.Path == "/token" {
					form = ""
					if q.Method == http.MethodPost {
						_ = q.ParseForm()
						form = q.PostForm.Encode()
					} else if q.Header.Get("Authorization") != "" {
						t.Error("anonymous has an Authorization header")
					}
					fmt.Fprint(w, `{"access_token":"good"}`)
					return true
				}
				switch a := q.Header.Get("Authorization"); {
				case a == "Custom abc":
					return false
				case a == "Bearer good" && !refused:
					refused = true // a token may be refused once; a new one is asked for
					w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+reg.Host()+`/token",service="s",error="insufficient_scope"`)
					w.WriteHeader(http.StatusUnauthorized)
					return true
				case a == "Bearer good":
					return false
				}
				w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+reg.Host()+`/token",service="s"`)
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			r := open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{Credentials: func(context.Context, core.AuthRequest) (core.Credential, error) { return c.cred, nil }})
			if _, err := r.Resolve(t.Context()); err != nil {
				t.Fatal(err)
			}
			if form != c.form {
				t.Errorf("form %q, want %q", form, c.form)
			}
		})
	}
}

// A token that ends in the middle of a layer is renewed.
//
// contract: 6.1.7
// promise: P7, P14
func TestUnauthorizedMidLayer(t *testing.T) {
	body, desc := blobOf(300_000)
	reg := registrytest.New(t)
	reg.AddBlob(body)
	var n atomic.Int32
	reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		if _, pass, _ := q.BasicAuth(); pass != "p" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		switch n.Add(1) {
		case 1:
			breakAfter(w, body, 100_000, true)
			return true
		}
		return false
	}
	var asked atomic.Int32
	opts := core.Options{Credentials: func(context.Context, core.AuthRequest) (core.Credential, error) {
		asked.Add(1)
		return core.Credential{Username: "u", Secret: "p", Expires: time.Now().Add(-time.Second)}, nil
	}}
	got, err := read(t.Context(), open(t, client(t, quick), reg.Host()+"/a/b:1", opts), desc, 0)
	if err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	wrong := core.Options{Credentials: func(context.Context, core.AuthRequest) (core.Credential, error) {
		return core.Credential{Username: "u", Secret: "wrong"}, nil
	}}
	began := len(reg.Requests())
	_, err = read(t.Context(), open(t, client(t, quick), reg.Host()+"/a/b:1", wrong), desc, 0)
	if !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), "pull access denied") {
		t.Errorf("wrong password: %v", err)
	}
	if n := len(reg.Requests()) - began; n > 4 {
		t.Errorf("%d requests with a wrong password", n)
	}
	_, err = read(t.Context(), open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{Credentials: func(ctx context.Context, _ core.AuthRequest) (core.Credential, error) {
		<-ctx.Done() // a credential helper that hangs
		return core.Credential{}, ctx.Err()
	}}), desc, 0)
	if err == nil || !strings.Contains(err.Error(), "credentials for "+reg.Host()+": no answer within") {
		t.Errorf("hung credentials: %v", err)
	}
}

// contract: 6.1.5, 6.1.6
// promise: P7
func TestRedirects(t *testing.T) {
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	deadHost := dead.Addr().String()
	dead.Close()
	_, desc := blobOf(10)
	reg := registrytest.New(t)
	to := ""
	reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		http.Redirect(w, q, to, http.StatusFound)
		return true
	}
	r := open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{DefaultScheme: "http"})
	for target, want := range map[string]string{"http://" + deadHost + "/x": "connection refused", "/loop": "more than 10 redirects", "gopher://x": "cannot be used"} {
		to = target
		if _, err := read(t.Context(), r, desc, 0); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("to %s: %v", target, err)
		}
	}
	secure := registrytest.NewTLS(t)
	secure.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		http.Redirect(w, q, "http://"+reg.Host()+"/v2/a/b/manifests/1", http.StatusFound)
		return true
	}
	_, err = open(t, client(t, quick), secure.Host()+"/a/b:1", core.Options{}).Resolve(t.Context())
	if err == nil || !strings.Contains(err.Error(), "redirect from https") {
		t.Errorf("a tag over a redirect out of TLS: %v", err)
	}
}

// contract: 6.1.6, 6.2.2
func TestTLS(t *testing.T) {
	img := registrytest.Build("amd64", 10, registrytest.Gzip)
	reg := registrytest.NewTLS(t)
	reg.AddImage("a/b", "1", img)
	plain := registrytest.New(t)
	plain.AddImage("a/b", "1", img)
	for _, h := range []string{reg.Host(), plain.Host()} { // loopback: TLS with any certificate, or none
		if _, err := open(t, client(t, quick), h+"/a/b:1", core.Options{}).Resolve(t.Context()); err != nil {
			t.Errorf("%s: %v", h, err)
		}
	}
	root := certsDir(t, reg.Host(), fmt.Sprintf("server = %q\n", "https://"+reg.Host()))
	_, err := open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{HostDir: root}).Resolve(t.Context())
	if err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown authority: %v", err)
	}
	if n := len(reg.Requests()); n != 1 {
		t.Errorf("%d requests", n)
	}
	ca := filepath.Join(root, reg.Host(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: reg.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, conf := range []string{"ca = \"ca.pem\"\n", "skip_verify = true\n"} {
		// An edit applies without a restart.
		if err := os.WriteFile(filepath.Join(root, reg.Host(), "hosts.toml"), fmt.Appendf(nil, "server = %q\n%s", "https://"+reg.Host(), conf), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{HostDir: root}).Resolve(t.Context()); err != nil {
			t.Errorf("%s: %v", conf, err)
		}
	}
}

// reader is a blob to push.
type reader struct{ *bytes.Reader }

func (reader) Close() error { return nil }

// contract: 6.1.8
func TestPush(t *testing.T) {
	body, desc := blobOf(100_000)
	img := registrytest.Build("amd64", 10, registrytest.Gzip)
	reg := registrytest.New(t)
	var fail atomic.Int32
	reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		if q.Method == http.MethodPut && strings.Contains(q.URL.Path, "/uploads/") && fail.Add(1) == 1 {
			w.WriteHeader(http.StatusServiceUnavailable) // once; the upload is sent again
			return true
		}
		return false
	}
	r := open(t, client(t, quick), reg.Host()+"/a/b:1", core.Options{})
	var sent int64
	push := func(d ocispec.Descriptor, b []byte, opts core.PushOptions) (bool, error) {
		opts.Progress = func(n int64) { sent = n }
		return r.Push(t.Context(), d, reader{bytes.NewReader(b)}, opts)
	}
	if existed, err := push(desc, body, core.PushOptions{}); err != nil || existed || sent != 100_000 {
		t.Errorf("blob: existed %v, sent %d, %v", existed, sent, err)
	}
	if existed, err := push(desc, body, core.PushOptions{}); err != nil || !existed {
		t.Errorf("blob again: existed %v, %v", existed, err)
	}
	if _, err := push(img.Target, img.Top, core.PushOptions{Tag: "1"}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "manifest blob unknown: a child is missing") {
		t.Errorf("a manifest before its children: %v", err)
	}
	for _, b := range img.Blobs {
		if _, err := push(ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(b), Size: int64(len(b))}, b, core.PushOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if existed, err := push(img.Target, img.Top, core.PushOptions{Tag: "1"}); err != nil || existed {
		t.Errorf("manifest: existed %v, %v", existed, err)
	}
	if existed, err := push(img.Target, img.Top, core.PushOptions{Tag: "1"}); err != nil || !existed {
		t.Errorf("manifest again: existed %v, %v", existed, err)
	}
	if d, err := r.Resolve(t.Context()); err != nil || d.Digest != img.Target.Digest {
		t.Errorf("resolve %v, %v", d, err)
	}
	other := open(t, client(t, quick), reg.Host()+"/c/d:1", core.Options{})
	reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		if q.Method == http.MethodHead {
			http.NotFound(w, q)
			return true
		}
		return false
	}
	if existed, err := other.Push(t.Context(), desc, reader{bytes.NewReader(body)}, core.PushOptions{From: []string{"c/d", "a/b"}}); err != nil || !existed {
		t.Errorf("mount: existed %v, %v", existed, err)
	}
	for _, q := range reg.Requests() {
		if q.Method == http.MethodPost && strings.Contains(q.Path, "/c/d/") && q.Query != "from=a%2Fb&mount="+strings.ReplaceAll(desc.Digest.String(), ":", "%3A") {
			t.Errorf("mount asked with %s", q.Query)
		}
	}
	stop := make(chan struct{})
	defer close(stop)
	reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		switch {
		case q.Method == http.MethodHead:
			http.NotFound(w, q)
			return true
		case q.Method == http.MethodPut:
			// Takes nothing. A server sees that its client has gone only when it reads.
			select {
			case <-stop:
			case <-q.Context().Done():
			}
			return true
		}
		return false
	}
	began := time.Now()
	big, bigDesc := blobOf(30 << 20)
	cfg := quick
	cfg.Attempts = 2
	_, err := open(t, client(t, cfg), reg.Host()+"/a/b:1", core.Options{}).Push(t.Context(), bigDesc, reader{bytes.NewReader(big)}, core.PushOptions{})
	if err == nil || !strings.Contains(err.Error(), "stalled") || time.Since(began) > bound {
		t.Errorf("a registry that takes nothing: %v after %s", err, time.Since(began))
	}
}

// What a registry warns of is logged, and requests say who asks.
//
// contract: 6.1.10
func TestWarnings(t *testing.T) {
	img := registrytest.Build("amd64", 10, registrytest.Gzip)
	reg := registrytest.New(t)
	reg.AddImage("a/b", "1", img)
	reg.Hook = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Add("Warning", `299 - "this image is old"`)
		return false
	}
	var log bytes.Buffer
	cfg := quick
	cfg.UserAgent, cfg.Log = "containerd/test", slog.New(slog.NewTextHandler(&log, nil))
	if _, err := open(t, client(t, cfg), reg.Host()+"/a/b:1", core.Options{}).Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "this image is old") || !strings.Contains(log.String(), reg.Host()) {
		t.Errorf("log: %s", log.String())
	}
	for _, q := range reg.Requests() {
		if q.Header.Get("User-Agent") != "containerd/test" {
			t.Errorf("User-Agent %q", q.Header.Get("User-Agent"))
		}
	}
}
