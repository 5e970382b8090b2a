package registry

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/content"
	core "github.com/gantryd/gantry/core/registry"
)

// Push sends a blob or manifest to the first host that takes pushes
// (contract 6.1.8).
func (m *remote) Push(ctx context.Context, desc ocispec.Descriptor, r content.ReaderAt, opts core.PushOptions) (bool, error) {
	peers, err := m.able(CanPush)
	if err != nil {
		return false, fmt.Errorf("push %s to %s: %w", desc.Digest, m.ref, err)
	}
	p := peers[0]
	var existed bool
	if isManifest(desc.MediaType) {
		existed, err = m.pushManifest(ctx, p, desc, r, opts)
	} else {
		existed, err = m.pushBlob(ctx, p, desc, r, opts)
	}
	if err != nil {
		return false, fmt.Errorf("push %s to %s: %w", desc.Digest, m.ref, err)
	}
	return existed, nil
}

func (m *remote) pushManifest(ctx context.Context, p *peer, desc ocispec.Descriptor, r content.ReaderAt, opts core.PushOptions) (bool, error) {
	name := opts.Tag
	if name == "" {
		name = desc.Digest.String()
	}
	path := "/" + m.ref.Repository + "/manifests/" + name
	resp, err := p.do(ctx, request{method: http.MethodHead, path: path, header: http.Header{"Accept": {desc.MediaType + ", */*"}}, scope: "pull,push", last: true},
		http.StatusNotFound, http.StatusMethodNotAllowed)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusOK && digest.Digest(resp.Header.Get("Docker-Content-Digest")) == desc.Digest {
		return true, nil
	}
	resp, err = p.do(ctx, request{
		method: http.MethodPut, path: path, header: http.Header{"Content-Type": {desc.MediaType}}, scope: "pull,push", last: true,
		body: func() io.Reader { return io.NewSectionReader(r, 0, r.Size()) }, size: r.Size(), sent: opts.Progress,
	})
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	return false, checkStored(resp, desc)
}

func checkStored(resp *http.Response, desc ocispec.Descriptor) error {
	if resp.StatusCode/100 != 2 {
		return newStatusError(resp)
	}
	if d := resp.Header.Get("Docker-Content-Digest"); d != "" && d != desc.Digest.String() && digest.Digest(d).Algorithm() == desc.Digest.Algorithm() {
		return fmt.Errorf("%s %s: the registry stored %s: %w", resp.Request.Method, redact(resp.Request.URL), clip(printable(d), 100), errdefs.ErrDataLoss)
	}
	return nil
}

func (m *remote) pushBlob(ctx context.Context, p *peer, desc ocispec.Descriptor, r content.ReaderAt, opts core.PushOptions) (bool, error) {
	resp, err := p.do(ctx, request{method: http.MethodHead, path: "/" + m.ref.Repository + "/blobs/" + desc.Digest.String(), scope: "pull,push", last: true, verified: true},
		http.StatusNotFound, http.StatusMethodNotAllowed)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return true, nil
	}
	from := ""
	for _, f := range opts.From {
		if f != m.ref.Repository {
			from = f
			break
		}
	}
	// An upload that is refused half-way is begun anew, with a new location.
	for attempt := 1; ; attempt++ {
		mounted, err := m.upload(ctx, p, desc, r, from, opts.Progress)
		if err == nil {
			return mounted, nil
		}
		s, ok := errorAs[*StatusError](err)
		again := !ok && transient(err) || ok && (s.Code == http.StatusConflict || s.Code == http.StatusNotFound || s.Code >= 500) || from != ""
		if ctx.Err() != nil || !again || attempt >= m.c.cfg.Attempts {
			return false, err
		}
		from = ""
		if err := m.c.pause(ctx, attempt); err != nil {
			return false, err
		}
	}
}

// upload asks for a place, or a mount from another repository, and sends the
// blob there in one piece.
func (m *remote) upload(ctx context.Context, p *peer, desc ocispec.Descriptor, r content.ReaderAt, from string, sent func(int64)) (mounted bool, err error) {
	post := request{method: http.MethodPost, path: "/" + m.ref.Repository + "/blobs/uploads/", scope: "pull,push", last: true}
	if from != "" {
		post.query = url.Values{"mount": {desc.Digest.String()}, "from": {from}}
		post.mount = from
	}
	resp, err := p.do(ctx, post)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusCreated:
		if from == "" {
			return false, newStatusError(resp)
		}
		return true, nil
	case http.StatusOK, http.StatusAccepted, http.StatusNoContent:
	default:
		return false, newStatusError(resp)
	}
	location := resp.Header.Get("Location")
	u, err := resp.Request.URL.Parse(location)
	if err != nil || location == "" || (u.Scheme != "https" && u.Scheme != "http") {
		return false, fmt.Errorf("POST %s: answer without a usable Location: %w", redact(resp.Request.URL), errdefs.ErrUnavailable)
	}
	if resp.Request.URL.Scheme == "https" && u.Scheme == "http" {
		if u.Host != resp.Request.URL.Host {
			return false, fmt.Errorf("POST %s: upload to %s without TLS refused: %w", redact(resp.Request.URL), redact(u), errdefs.ErrUnavailable)
		}
		u.Scheme = "https" // a registry behind a proxy that ends TLS
	}
	q := u.Query()
	q.Set("digest", desc.Digest.String())
	u.RawQuery = q.Encode()
	resp, err = p.do(ctx, request{
		method: http.MethodPut, url: u, header: http.Header{"Content-Type": {"application/octet-stream"}}, scope: "pull,push", last: true,
		body: func() io.Reader { return io.NewSectionReader(r, 0, r.Size()) }, size: r.Size(), sent: sent,
	})
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	return false, checkStored(resp, desc)
}
