package transferrpc

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"sync"

	"github.com/containerd/containerd/api/types"
	transferapi "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/wire"
)

func platformsFrom(ps []*types.Platform) []ocispec.Platform {
	var s []ocispec.Platform
	for _, p := range ps {
		if p != nil {
			s = append(s, wire.PlatformFromProto(p))
		}
	}
	return s
}

func platformsTo(ps []ocispec.Platform) []*types.Platform {
	var s []*types.Platform
	for _, p := range ps {
		s = append(s, wire.PlatformToProto(p))
	}
	return s
}

func imageStoreFrom(m *transferapi.ImageStore) transfer.ImageStore {
	s := transfer.ImageStore{Name: m.Name, Labels: maps.Clone(m.Labels), Platforms: platformsFrom(m.Platforms), AllMetadata: m.AllMetadata, ManifestLimit: m.ManifestLimit}
	for _, r := range m.ExtraReferences {
		if r != nil {
			s.References = append(s.References, transfer.Reference{Name: r.Name, IsPrefix: r.IsPrefix, AllowOverwrite: r.AllowOverwrite,
				AddDigest: r.AddDigest, SkipNamedDigest: r.SkipNamedDigest})
		}
	}
	for _, u := range m.Unpacks {
		if u == nil {
			continue
		}
		un := transfer.Unpack{Snapshotter: u.Snapshotter}
		if u.Platform != nil {
			p := wire.PlatformFromProto(u.Platform)
			un.Platform = &p
		}
		s.Unpacks = append(s.Unpacks, un)
	}
	return s
}

func imageStoreTo(s transfer.ImageStore) *transferapi.ImageStore {
	m := &transferapi.ImageStore{Name: s.Name, Labels: s.Labels, Platforms: platformsTo(s.Platforms), AllMetadata: s.AllMetadata, ManifestLimit: s.ManifestLimit}
	for _, r := range s.References {
		m.ExtraReferences = append(m.ExtraReferences, &transferapi.ImageReference{Name: r.Name, IsPrefix: r.IsPrefix, AllowOverwrite: r.AllowOverwrite,
			AddDigest: r.AddDigest, SkipNamedDigest: r.SkipNamedDigest})
	}
	for _, u := range s.Unpacks {
		c := &transferapi.UnpackConfiguration{Snapshotter: u.Snapshotter}
		if u.Platform != nil {
			c.Platform = wire.PlatformToProto(*u.Platform)
		}
		m.Unpacks = append(m.Unpacks, c)
	}
	return m
}

func registryFrom(m *transferapi.OCIRegistry, auth stream.Stream) transfer.Registry {
	r := transfer.Registry{Reference: m.Reference}
	if res := m.Resolver; res != nil {
		r.Options.HostDir, r.Options.DefaultScheme = res.HostDir, res.DefaultScheme
		if len(res.Headers) > 0 {
			h := http.Header{}
			for k, v := range res.Headers {
				h.Set(k, v)
			}
			r.Options.Headers = h
		}
	}
	if auth != nil {
		r.Options.Credentials = (&asker{st: auth, turn: make(chan struct{}, 1)}).ask
	}
	return r
}

// asker puts the questions of registries to the client (contract 6.3.4).
type asker struct {
	st   stream.Stream
	turn chan struct{} // holds a value while a question is open
}

func (a *asker) ask(ctx context.Context, q registry.AuthRequest) (registry.Credential, error) {
	select {
	case a.turn <- struct{}{}:
	case <-ctx.Done():
		return registry.Credential{}, context.Cause(ctx)
	}
	type answer struct {
		r   transferapi.AuthResponse
		err error
	}
	got := make(chan *answer, 1)
	go func() { // ends with the stream at the latest
		defer func() { <-a.turn }()
		var r answer
		r.err = send(a.st, &transferapi.AuthRequest{Host: q.Host, Reference: q.Reference, Wwwauthenticate: q.Authenticate})
		if r.err == nil {
			var v typed.Any
			if v, r.err = a.st.Receive(); r.err == nil {
				r.err = unpack(v, &r.r)
			}
		}
		got <- &r
	}()
	select {
	case r := <-got:
		if r.err != nil {
			return registry.Credential{}, fmt.Errorf("ask the client: %w", r.err)
		}
		return credentialFrom(&r.r)
	case <-ctx.Done():
		// The answer to this question must not be taken for one to the next.
		_ = a.st.Close()
		return registry.Credential{}, fmt.Errorf("the client did not answer: %w", context.Cause(ctx))
	}
}

func credentialFrom(r *transferapi.AuthResponse) (registry.Credential, error) {
	c := registry.Credential{Expires: wire.TimeFromProto(r.ExpireAt)}
	switch r.AuthType {
	case transferapi.AuthType_NONE:
	case transferapi.AuthType_CREDENTIALS:
		c.Username, c.Secret = r.Username, r.Secret
	case transferapi.AuthType_REFRESH:
		c.Secret, c.Refresh = r.Secret, true
	case transferapi.AuthType_HEADER:
		c.Header = r.Secret
	default:
		return c, fmt.Errorf("the client's answer is of unknown type %d: %w", r.AuthType, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

func credentialTo(c registry.Credential) *transferapi.AuthResponse {
	r := &transferapi.AuthResponse{}
	if !c.Expires.IsZero() {
		r.ExpireAt = wire.TimeToProto(c.Expires)
	}
	switch {
	case c.Header != "":
		r.AuthType, r.Secret = transferapi.AuthType_HEADER, c.Header
	case c.Refresh:
		r.AuthType, r.Secret = transferapi.AuthType_REFRESH, c.Secret
	case c.Secret != "" || c.Username != "":
		r.AuthType, r.Username, r.Secret = transferapi.AuthType_CREDENTIALS, c.Username, c.Secret
	}
	return r
}

func exportFrom(m *transferapi.ImageExportStream, w io.WriteCloser) transfer.Export {
	return transfer.Export{Writer: w, MediaType: m.MediaType, Platforms: platformsFrom(m.Platforms), AllPlatforms: m.AllPlatforms,
		SkipCompatibilityManifest: m.SkipCompatibilityManifest, SkipNonDistributable: m.SkipNonDistributable}
}

func progressTo(p transfer.Progress) *transferapi.Progress {
	m := &transferapi.Progress{Event: p.Event, Name: p.Name, Parents: p.Parents, Progress: p.Progress, Total: p.Total}
	if p.Desc != nil {
		m.Desc = wire.DescToProto(*p.Desc)
	}
	return m
}

func progressFrom(m *transferapi.Progress) transfer.Progress {
	p := transfer.Progress{Event: m.Event, Name: m.Name, Parents: m.Parents, Progress: m.Progress, Total: m.Total}
	if m.Desc != nil {
		d := wire.DescFromProto(m.Desc)
		p.Desc = &d
	}
	return p
}

// teller sends progress without making the transfer wait for the client:
// steps that were overtaken while the client did not read are left out.
type teller struct {
	st   stream.Stream
	mu   sync.Mutex
	todo []transfer.Progress
	at   map[string]int // place in todo of a step that can be overtaken
	wake chan struct{}
	end  bool
	done chan struct{}
}

func newTeller(st stream.Stream) *teller {
	t := &teller{st: st, at: map[string]int{}, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go t.run()
	return t
}

func (t *teller) tell(p transfer.Progress) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.end {
		return
	}
	switch p.Event {
	case "downloading", "extracting", "uploading":
		key := p.Event + " " + p.Name
		if i, ok := t.at[key]; ok {
			t.todo[i] = p
			return
		}
		t.at[key] = len(t.todo)
	}
	t.todo = append(t.todo, p)
	t.poke()
}

func (t *teller) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *teller) run() {
	defer close(t.done)
	for range t.wake {
		t.mu.Lock()
		todo, end := t.todo, t.end
		t.todo, t.at = nil, map[string]int{}
		t.mu.Unlock()
		for _, p := range todo {
			if send(t.st, progressTo(p)) != nil {
				t.mu.Lock()
				t.end = true
				t.todo = nil
				t.mu.Unlock()
				return
			}
		}
		if end {
			return
		}
	}
}

// finish sends what is left.
func (t *teller) finish() <-chan struct{} {
	t.mu.Lock()
	t.end = true
	t.poke()
	t.mu.Unlock()
	return t.done
}

func authRequest(q *transferapi.AuthRequest) registry.AuthRequest {
	return registry.AuthRequest{Host: q.Host, Reference: q.Reference, Authenticate: q.Wwwauthenticate}
}
