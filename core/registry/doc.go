// Package registry is the other side of pull and push: something that turns a
// reference into a descriptor and hands out, or takes, the bytes.
package registry

import (
	"context"
	"io"
	"time"

	"github.com/gantryd/gantry/core/content"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LabelSource and the registry's host, on a blob, is a comma-separated list of
// the repositories it came from (contract 1.5.11).
const LabelSource = "containerd.io/distribution.source."

// Remote is one image reference at a registry and its mirrors. It is safe for
// concurrent use. Errors keep the chain of all hosts tried, the one that got
// furthest first (contract 6.1.2).
type Remote interface {
	// Resolve returns what the reference points at. ErrNotFound;
	// ErrInvalidArgument for a bad reference; ErrUnauthenticated and
	// ErrPermissionDenied; ErrUnavailable if no host could be reached.
	Resolve(ctx context.Context) (ocispec.Descriptor, error)
	// Fetch reads a blob or manifest from offset on. What it reads is not
	// verified: whoever writes it down does that.
	Fetch(ctx context.Context, desc ocispec.Descriptor, offset int64) (io.ReadCloser, error)
	// Push sends a blob or manifest, unless the registry has it, which
	// existed tells. progress may be nil; it is told the bytes sent so far.
	Push(ctx context.Context, desc ocispec.Descriptor, r content.ReaderAt, opts PushOptions) (existed bool, err error)
	// Source is the registry's host and the repository, for LabelSource.
	Source() (host, repository string)
}

// PushOptions says more about a push.
type PushOptions struct {
	// Tag gives a manifest its name; by digest if "".
	Tag string
	// From are repositories of the same registry which may have the blob, for a cross-repository mount.
	From []string
	// Progress, if not nil, is told the bytes sent so far. It must return quickly.
	Progress func(sent int64)
}

// AuthRequest is what a registry asks of its client (contract 6.3.4).
type AuthRequest struct {
	Host         string
	Reference    string
	Authenticate []string // the WWW-Authenticate headers
}

// Credential answers an AuthRequest: a user name and password (Secret), an
// identity token (only Secret, Refresh set), or a whole Authorization header.
// The zero Credential is anonymous.
type Credential struct {
	Username string
	Secret   string
	Refresh  bool
	Header   string
	Expires  time.Time
}

// Credentials is asked for every host that is really contacted, and only for it.
type Credentials func(ctx context.Context, req AuthRequest) (Credential, error)

// Options says how to reach registries.
type Options struct {
	// Headers are added to every request to the registry's own hosts.
	Headers map[string][]string
	// HostDir is where hosts.toml files are (contract 6.2.1); the daemon's if "".
	HostDir string
	// DefaultScheme is "https", "http", or "" for http on loopback only.
	DefaultScheme string
	// Credentials may be nil: anonymous.
	Credentials Credentials
}

// Opener makes a Remote for a reference. ErrInvalidArgument for a bad one. It
// does not touch the network.
type Opener interface {
	Open(ref string, opts Options) (Remote, error)
}
