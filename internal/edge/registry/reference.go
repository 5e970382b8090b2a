package registry

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Reference is a parsed image reference (contract 6.1.1).
type Reference struct {
	Host       string // as written or implied: "docker.io", "localhost:5000"
	Repository string // "library/busybox"
	Tag        string // "" if there is only a digest
	Digest     digest.Digest
}

// ParseReference reads host/repository[:tag][@digest]. A name without host is
// one of docker.io; without tag and digest it means "latest".
// ErrInvalidArgument says what is wrong.
func ParseReference(s string) (Reference, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return Reference{}, fmt.Errorf("reference %q: %v: %w", clip(s, 256), err, errdefs.ErrInvalidArgument)
	}
	named = reference.TagNameOnly(named)
	r := Reference{Host: reference.Domain(named), Repository: reference.Path(named)}
	if _, port, ok := strings.Cut(r.Host[strings.LastIndex(r.Host, "]")+1:], ":"); ok {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return Reference{}, fmt.Errorf("reference %q: port %s is none: %w", clip(s, 256), clip(port, 20), errdefs.ErrInvalidArgument)
		}
	}
	if t, ok := named.(reference.Tagged); ok {
		r.Tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		r.Digest = d.Digest()
	}
	return r, nil
}

// String is the normal form of the reference.
func (r Reference) String() string {
	s := r.Host + "/" + r.Repository
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest.String()
	}
	return s
}

// object is what is asked of the manifests endpoint: the digest if there is one.
func (r Reference) object() string {
	if r.Digest != "" {
		return r.Digest.String()
	}
	return r.Tag
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}
