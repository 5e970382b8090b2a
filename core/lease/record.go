package lease

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/ident"
)

// Check returns ErrInvalidArgument unless the lease has an id and fitting labels.
func (l Lease) Check() error {
	if l.ID == "" {
		return fmt.Errorf("lease id must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := ident.CheckLabels(l.Labels); err != nil {
		return fmt.Errorf("lease %q: %w", l.ID, err)
	}
	return nil
}

// Generate returns a new id: nanoseconds of now and random base64, as clients
// of containerd know it (contract 1.3.23).
func Generate(now time.Time) ID {
	b := make([]byte, 3)
	rand.Read(b) // never fails
	return ID(fmt.Sprintf("%d-%s", now.Nanosecond(), base64.URLEncoding.EncodeToString(b)))
}

// Field looks up id and labels.<key> for filters (contract 1.2.8).
func (l Lease) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "id":
		return string(l.ID), len(path) == 1 && l.ID != ""
	case "labels":
		v, ok := l.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Check returns ErrNotImplemented for an unknown type, ErrInvalidArgument for an
// id that cannot be one of its type's.
func (r Resource) Check() error {
	switch sn, ok := strings.CutPrefix(r.Type, SnapshotPrefix); {
	case ok && (sn == "" || strings.Contains(sn, "/")), r.Type == strings.TrimSuffix(SnapshotPrefix, "/"):
		return fmt.Errorf("lease resource %q: type must be %s and a snapshotter's name: %w", r.Type, SnapshotPrefix, errdefs.ErrInvalidArgument)
	case ok:
	case r.Type == TypeContent:
		if err := digest.Digest(r.ID).Validate(); err != nil {
			return fmt.Errorf("lease resource %q: digest %q: %v: %w", r.Type, r.ID, err, errdefs.ErrInvalidArgument)
		}
	case r.Type == TypeIngest, r.Type == TypeImage, r.Type == TypeStream, r.Type == TypeMount:
	default:
		return fmt.Errorf("lease resource %q: no such type: %w", r.Type, errdefs.ErrNotImplemented)
	}
	if r.ID == "" {
		return fmt.Errorf("lease resource %q: id must not be empty: %w", r.Type, errdefs.ErrInvalidArgument)
	}
	return nil
}
