package registry

import (
	"bytes"
	"cmp"
	"compress/zlib"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MaxManifest is the most bytes a manifest may have (contract 6.1.2).
const MaxManifest = 4 << 20

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerSchema1  = "application/vnd.docker.distribution.manifest.v1+json"
	dockerSigned1  = "application/vnd.docker.distribution.manifest.v1+prettyjws"
)

// accept is the Accept header for manifests.
const accept = dockerManifest + ", " + dockerIndex + ", " + ocispec.MediaTypeImageManifest + ", " + ocispec.MediaTypeImageIndex + ", */*"

// remote is a reference at its hosts. It implements core/registry.Remote.
type remote struct {
	c     *Client
	ref   Reference
	log   *slog.Logger
	peers []*peer
}

func (m *remote) Source() (string, string) { return m.ref.Host, m.ref.Repository }

// able returns the hosts that may be asked.
func (m *remote) able(c Capability) ([]*peer, error) {
	var s []*peer
	for _, p := range m.peers {
		if p.Capabilities&c == c {
			s = append(s, p)
		}
	}
	if len(s) == 0 {
		return nil, fmt.Errorf("%s: no host is configured with the capability %s: %w", m.ref.Host, c, errdefs.ErrNotFound)
	}
	return s, nil
}

// Resolve asks the hosts in order what the reference points at.
func (m *remote) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	need := CanPull
	if m.ref.Digest == "" {
		need |= CanResolve
	}
	peers, err := m.able(need)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("resolve %s: %w", m.ref, err)
	}
	var failed Error
	for i, p := range peers {
		desc, err := m.resolveAt(ctx, p, i == len(peers)-1)
		if err == nil {
			return desc, nil
		}
		if ctx.Err() != nil {
			return ocispec.Descriptor{}, fmt.Errorf("resolve %s: %w", m.ref, err)
		}
		m.log.Debug("resolve", "host", p.Address, "err", err)
		failed.add(p.Address, denied(err))
	}
	return ocispec.Descriptor{}, fmt.Errorf("resolve %s: %w", m.ref, &failed)
}

// denied words a 401 or 403 as clients expect it.
func denied(err error) error {
	if s, ok := errorAs[*StatusError](err); ok && (s.Code == http.StatusUnauthorized || s.Code == http.StatusForbidden) {
		if _, done := errorAs[*deniedError](err); !done {
			return &deniedError{err}
		}
	}
	return err
}

func (m *remote) resolveAt(ctx context.Context, p *peer, last bool) (ocispec.Descriptor, error) {
	req := request{
		method: http.MethodHead,
		path:   "/" + m.ref.Repository + "/manifests/" + m.ref.object(),
		header: http.Header{"Accept": {accept}},
		scope:  "pull",
		last:   last,
	}
	resp, err := p.do(ctx, req)
	if err == nil {
		resp.Body.Close()
		desc, ok, err := m.described(resp)
		if ok || err != nil {
			return desc, err
		}
	} else if s, ok := errorAs[*StatusError](err); !ok || (s.Code != http.StatusMethodNotAllowed && s.Code != http.StatusNotFound && s.Code != http.StatusForbidden) {
		return ocispec.Descriptor{}, err
	}
	// HEAD says too little, or why not only in a body it cannot have.
	req.method = http.MethodGet
	resp, err = p.do(ctx, req)
	if err != nil {
		if s, ok := errorAs[*StatusError](err); ok && s.Code == http.StatusNotFound && m.ref.Digest != "" {
			if desc, berr := m.resolveBlob(ctx, p, last); berr == nil {
				return desc, nil
			}
		}
		return ocispec.Descriptor{}, err
	}
	defer resp.Body.Close()
	return m.describedBody(resp)
}

// described reads the answer to a HEAD; ok if it says all there is to know.
func (m *remote) described(resp *http.Response) (desc ocispec.Descriptor, ok bool, err error) {
	mt := mediaType(resp.Header)
	d := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	if m.ref.Digest != "" {
		if d != "" && d != m.ref.Digest && d.Algorithm() == m.ref.Digest.Algorithm() {
			return desc, false, fmt.Errorf("%s answers %s for %s: %w", redact(resp.Request.URL), clip(string(d), 100), m.ref.Digest, errdefs.ErrFailedPrecondition)
		}
		d = m.ref.Digest
	}
	if !isManifest(mt) || d.Validate() != nil || resp.ContentLength <= 0 || resp.Header.Get("Content-Encoding") != "" {
		return desc, false, nil
	}
	if resp.ContentLength > MaxManifest {
		return desc, false, &oversizeError{"manifest " + m.ref.String(), MaxManifest}
	}
	return ocispec.Descriptor{MediaType: mt, Digest: d, Size: resp.ContentLength}, true, nil
}

// describedBody reads a manifest and hashes it.
func (m *remote) describedBody(resp *http.Response) (ocispec.Descriptor, error) {
	r, err := decoded(resp)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var b bytes.Buffer
	if _, err := io.Copy(&b, io.LimitReader(r, MaxManifest+1)); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("GET %s: %w: %w", redact(resp.Request.URL), err, errdefs.ErrUnavailable)
	}
	if b.Len() > MaxManifest {
		return ocispec.Descriptor{}, &oversizeError{"manifest " + m.ref.String(), MaxManifest}
	}
	d := digest.FromBytes(b.Bytes())
	want := m.ref.Digest
	if want == "" {
		want = digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	}
	if want != "" && want.Validate() == nil {
		if want.Algorithm().Available() {
			d = want.Algorithm().FromBytes(b.Bytes())
		}
		if d != want {
			return ocispec.Descriptor{}, fmt.Errorf("GET %s: the manifest's digest is %s, not %s: %w", redact(resp.Request.URL), d, want, errdefs.ErrFailedPrecondition)
		}
	}
	mt := mediaType(resp.Header)
	var doc struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Layers    json.RawMessage `json:"layers"`
		FSLayers  json.RawMessage `json:"fsLayers"`
	}
	if !isManifest(mt) && json.Unmarshal(b.Bytes(), &doc) == nil {
		switch {
		case doc.FSLayers != nil:
			mt = dockerSchema1
		case doc.MediaType != "":
			mt = clip(doc.MediaType, 256)
		case doc.Manifests != nil:
			mt = ocispec.MediaTypeImageIndex
		case doc.Layers != nil:
			mt = ocispec.MediaTypeImageManifest
		}
	}
	mt = cmp.Or(mt, "application/octet-stream")
	return ocispec.Descriptor{MediaType: mt, Digest: d, Size: int64(b.Len())}, nil
}

// resolveBlob finds a digest among the blobs (contract 6.1.2).
func (m *remote) resolveBlob(ctx context.Context, p *peer, last bool) (ocispec.Descriptor, error) {
	resp, err := p.do(ctx, request{method: http.MethodHead, path: "/" + m.ref.Repository + "/blobs/" + m.ref.Digest.String(),
		scope: "pull", last: last, verified: true})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	resp.Body.Close()
	if resp.ContentLength < 0 {
		return ocispec.Descriptor{}, fmt.Errorf("%s: no length: %w", redact(resp.Request.URL), errdefs.ErrUnavailable)
	}
	return ocispec.Descriptor{MediaType: "application/octet-stream", Digest: m.ref.Digest, Size: resp.ContentLength}, nil
}

func mediaType(h http.Header) string {
	mt, _, _ := strings.Cut(h.Get("Content-Type"), ";")
	return clip(strings.TrimSpace(mt), 256)
}

func isManifest(mt string) bool {
	switch mt {
	case dockerManifest, dockerIndex, dockerSchema1, dockerSigned1, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex,
		"application/vnd.oci.artifact.manifest.v1+json":
		return true
	}
	return false
}

// decoded undoes the transfer's own compression, which dumb proxies add.
func decoded(resp *http.Response) (io.Reader, error) {
	r := io.Reader(resp.Body)
	encodings := strings.Split(resp.Header.Get("Content-Encoding"), ",")
	for i := len(encodings) - 1; i >= 0; i-- {
		var err error
		switch e := strings.ToLower(strings.TrimSpace(encodings[i])); e {
		case "", "identity":
		case "gzip", "x-gzip":
			r, err = gzip.NewReader(r)
		case "deflate":
			r, err = zlib.NewReader(r)
		case "zstd":
			var d *zstd.Decoder
			if d, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(64<<20)); err == nil {
				r = &zstdReader{d}
			}
		default:
			err = fmt.Errorf("unknown content encoding %q", clip(e, 32))
		}
		if err != nil {
			return nil, fmt.Errorf("GET %s: %w: %w", redact(resp.Request.URL), err, errdefs.ErrUnavailable)
		}
	}
	return r, nil
}

// zstdReader frees the decoder at the end of the stream; with one goroutine's
// work it holds nothing but memory.
type zstdReader struct{ d *zstd.Decoder }

func (z *zstdReader) Read(b []byte) (int, error) {
	if z.d == nil {
		return 0, io.EOF
	}
	n, err := z.d.Read(b)
	if err != nil {
		z.d.Close()
		z.d = nil
	}
	return n, err
}

// Fetch reads a blob or manifest from offset on. The reader resumes by itself
// after a broken connection, at the same host or the next.
func (m *remote) Fetch(ctx context.Context, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("fetch %q: %v: %w", clip(string(desc.Digest), 100), err, errdefs.ErrInvalidArgument)
	}
	if offset < 0 || (desc.Size > 0 && offset > desc.Size) {
		return nil, fmt.Errorf("fetch %s: offset %d of %d: %w", desc.Digest, offset, desc.Size, errdefs.ErrOutOfRange)
	}
	sources, err := m.sources(desc)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", desc.Digest, err)
	}
	f := &fetch{ctx: ctx, m: m, desc: desc, off: offset, sources: sources}
	if desc.Size > 0 && offset == desc.Size {
		return f, nil
	}
	if err := f.open(); err != nil {
		return nil, fmt.Errorf("fetch %s of %s: %w", desc.Digest, m.ref, err)
	}
	return f, nil
}

// source is one URL that may have a blob.
type source struct {
	p   *peer
	req request
}

// sources lists them: the hosts, each with the path that the media type asks
// for and then the other, and the URLs in the descriptor, which come first for
// layers that registries may not have. Nothing of the peer goes to those.
func (m *remote) sources(desc ocispec.Descriptor) ([]source, error) {
	peers, err := m.able(CanPull)
	if err != nil && len(desc.URLs) == 0 {
		return nil, err
	}
	var s []source
	add := func(kind string) {
		for _, p := range peers {
			s = append(s, source{p, request{method: http.MethodGet, path: "/" + m.ref.Repository + "/" + kind + "/" + desc.Digest.String(),
				scope: "pull", verified: true}})
		}
	}
	if isManifest(desc.MediaType) {
		add("manifests")
		add("blobs")
	} else {
		add("blobs")
		add("manifests")
	}
	var foreign []source
	for _, raw := range desc.URLs {
		u, err := url.Parse(raw)
		if err != nil || u.Host == "" || u.User != nil || (u.Scheme != "https" && u.Scheme != "http") {
			continue
		}
		p := &peer{Host: Host{Scheme: u.Scheme, Address: u.Host, Capabilities: CanPull}, r: m, foreign: true, asked: map[string]*asking{}, tokens: map[string]token{}}
		foreign = append(foreign, source{p, request{method: http.MethodGet, url: u, verified: true}})
	}
	if strings.Contains(desc.MediaType, "nondistributable") || strings.Contains(desc.MediaType, ".foreign.") {
		s = append(foreign, s...)
	} else {
		s = append(s, foreign...)
	}
	if len(s) == 0 {
		return nil, fmt.Errorf("nowhere to fetch from: %w", errdefs.ErrNotFound)
	}
	// A transient error is worth another try only where no other host follows.
	distinct := map[string]bool{}
	for _, src := range s {
		distinct[src.p.Address] = true
	}
	for i := range s {
		s[i].req.last = len(distinct) == 1 || s[i].p.Address == s[len(s)-1].p.Address
	}
	return s, nil
}

// fetch is a body that is resumed. One goroutine uses it.
type fetch struct {
	ctx     context.Context
	m       *remote
	desc    ocispec.Descriptor
	sources []source
	good    int // source that answered last

	body     io.ReadCloser
	r        io.Reader // body, decoded
	off      int64
	failures int   // in a row, without much progress
	total    int   // in all
	stalls   int   // of them for want of progress
	mark     int64 // offset at the last failure
}

// Limits of a fetch that breaks again and again. resumeProgress is what makes
// a failure the first of a row again.
const (
	maxResumes     = 64
	resumeProgress = 256 << 10
)

// open asks the sources in order, the one that worked before first.
func (f *fetch) open() error {
	var failed Error
	dead := map[string]bool{}
	for i := range f.sources {
		n := (f.good + i) % len(f.sources)
		src := f.sources[n]
		if dead[src.p.Address] {
			continue
		}
		body, r, err := f.openAt(src)
		if err == nil {
			f.body, f.r, f.good = body, r, n
			return nil
		}
		if f.ctx.Err() != nil {
			return err
		}
		f.m.log.Debug("fetch", "host", src.p.Address, "digest", f.desc.Digest, "err", err)
		failed.add(src.p.Address, denied(err))
		// Only of what is not found may the same host's other path know more.
		if s, ok := errorAs[*StatusError](err); !ok || s.Code != http.StatusNotFound {
			dead[src.p.Address] = true
		}
	}
	return failed.condensed()
}

// condensed drops what a host says twice: of a missing blob, that it is not
// among the manifests either.
func (e *Error) condensed() error {
	best := map[string]int{}
	var kept []HostError
	for _, h := range e.Hosts {
		if i, ok := best[h.Host]; ok {
			if h.rank > kept[i].rank && h.rank != rankNotFound {
				kept[i] = h
			}
			continue
		}
		best[h.Host] = len(kept)
		kept = append(kept, h)
	}
	return &Error{Hosts: kept}
}

func (f *fetch) openAt(src source) (io.ReadCloser, io.Reader, error) {
	req := src.req
	req.header = http.Header{"Accept": {f.desc.MediaType + ", */*"}}
	if f.off > 0 {
		// A range is one of the blob itself, not of a compressed form of it.
		req.header.Set("Range", fmt.Sprintf("bytes=%d-", f.off))
		req.header.Set("Accept-Encoding", "identity")
	} else {
		req.header.Set("Accept-Encoding", "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5")
	}
	resp, err := src.p.do(f.ctx, req, http.StatusRequestedRangeNotSatisfiable)
	if err != nil {
		return nil, nil, err
	}
	skip := int64(0)
	switch {
	case resp.StatusCode == http.StatusPartialContent:
		if start, ok := rangeStart(resp.Header.Get("Content-Range")); f.off == 0 && !ok || ok && start != f.off {
			resp.Body.Close()
			return nil, nil, fmt.Errorf("GET %s: asked for bytes from %d, got range %q: %w", redact(resp.Request.URL), f.off,
				clip(resp.Header.Get("Content-Range"), 64), errdefs.ErrUnavailable)
		}
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable || resp.StatusCode != http.StatusOK:
		defer resp.Body.Close()
		if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable && req.header.Get("Range") != "" {
			// This host does not do ranges, or not this one: read from the start.
			req.header.Del("Range")
			if resp, err = src.p.do(f.ctx, req); err != nil {
				return nil, nil, err
			}
			if resp.StatusCode == http.StatusOK {
				skip = f.off
				break
			}
			defer resp.Body.Close()
		}
		return nil, nil, newStatusError(resp)
	default:
		skip = f.off
	}
	encoded := resp.Header.Get("Content-Encoding") != "" && !strings.EqualFold(resp.Header.Get("Content-Encoding"), "identity")
	if !encoded && f.desc.Size > 0 && resp.ContentLength >= 0 && resp.ContentLength+f.off-skip != f.desc.Size {
		resp.Body.Close()
		return nil, nil, fmt.Errorf("GET %s: %d bytes from offset %d, but the blob has %d: %w", redact(resp.Request.URL), resp.ContentLength,
			f.off-skip, f.desc.Size, errdefs.ErrFailedPrecondition)
	}
	r, err := decoded(resp)
	if err == nil && skip > 0 {
		if _, err = io.CopyN(io.Discard, r, skip); err != nil {
			err = fmt.Errorf("GET %s: skipping the first %d bytes: %w: %w", redact(resp.Request.URL), skip, err, errdefs.ErrUnavailable)
		}
	}
	if err != nil {
		resp.Body.Close()
		return nil, nil, err
	}
	return resp.Body, r, nil
}

// rangeStart reads "bytes 100-199/200".
func rangeStart(s string) (int64, bool) {
	s, ok := strings.CutPrefix(s, "bytes ")
	if !ok {
		return 0, false
	}
	s, _, ok = strings.Cut(s, "-")
	n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 64)
	return n, ok && err == nil
}

func (f *fetch) Read(b []byte) (int, error) {
	if f.desc.Size > 0 {
		if f.off >= f.desc.Size {
			return 0, io.EOF
		}
		if int64(len(b)) > f.desc.Size-f.off {
			b = b[:f.desc.Size-f.off]
		}
	}
	for {
		if f.body == nil {
			if err := f.open(); err != nil {
				return 0, fmt.Errorf("fetch %s of %s, from byte %d: %w", f.desc.Digest, f.m.ref, f.off, err)
			}
		}
		n, err := f.r.Read(b)
		f.off += int64(n)
		if err == nil {
			return n, nil
		}
		if err == io.EOF {
			if f.desc.Size <= 0 || f.off >= f.desc.Size {
				return n, io.EOF
			}
			err = io.ErrUnexpectedEOF
		}
		_ = f.body.Close()
		f.body, f.r = nil, nil
		if err := f.failed(err); err != nil {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
	}
}

// failed decides whether to go on after a broken body, and waits a little.
func (f *fetch) failed(err error) error {
	host := f.sources[f.good].p.Address
	wrap := func() error {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("fetch %s of %s from %s: the connection ended after %d of %d bytes, %d times: %w: %w",
				f.desc.Digest, f.m.ref, host, f.off, f.desc.Size, f.total, err, errdefs.ErrUnavailable)
		}
		return fmt.Errorf("fetch %s of %s from %s: after %d of %d bytes: %w: %w", f.desc.Digest, f.m.ref, host, f.off, f.desc.Size, err, errdefs.ErrUnavailable)
	}
	if f.ctx.Err() != nil {
		return fmt.Errorf("fetch %s of %s from %s: after %d of %d bytes: %w", f.desc.Digest, f.m.ref, host, f.off, f.desc.Size, context.Cause(f.ctx))
	}
	if f.off-f.mark >= resumeProgress {
		f.failures = 0
	}
	f.mark = f.off
	f.failures++
	f.total++
	_, stalled := errorAs[*timeoutError](err)
	if stalled {
		f.stalls++
	}
	if f.failures >= f.m.c.cfg.Attempts || f.total >= maxResumes || f.stalls > len(f.m.peers) {
		return wrap()
	}
	f.m.log.Info("fetch resumes", "host", host, "digest", f.desc.Digest, "offset", f.off, "err", err)
	if stalled || f.failures > 1 {
		// Another host may do better.
		f.good = f.next(f.good)
	}
	return f.m.c.pause(f.ctx, f.failures)
}

// next is the next source at another host, or the same one again.
func (f *fetch) next(i int) int {
	for k := 1; k < len(f.sources); k++ {
		n := (i + k) % len(f.sources)
		if f.sources[n].p.Address != f.sources[i].p.Address {
			return n
		}
	}
	return i
}

func (f *fetch) Close() error {
	if f.body == nil {
		return nil
	}
	err := f.body.Close()
	f.body, f.r = nil, nil
	return err
}
