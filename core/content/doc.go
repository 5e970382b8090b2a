// Package content is storage addressed by digest: blobs that never change
// once they have a name, and ingests that may become blobs.
package content

import (
	"context"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
)

// Info describes a blob.
type Info struct {
	Digest    digest.Digest     `json:"digest"`
	Size      int64             `json:"size"`
	CreatedAt time.Time         `json:"created_at"`
	UpdatedAt time.Time         `json:"updated_at"`
	Labels    map[string]string `json:"labels,omitempty"`
}

// Status describes an ingest. Offset is how many bytes have arrived; Total is
// how many will, 0 if unknown.
type Status struct {
	Ref       string        `json:"ref"`
	Offset    int64         `json:"offset"`
	Total     int64         `json:"total,omitempty"`
	Expected  digest.Digest `json:"expected,omitempty"`
	StartedAt time.Time     `json:"started_at"`
	UpdatedAt time.Time     `json:"updated_at"`
}

// ReaderAt reads a blob. It is safe for concurrent use until closed, also when
// the blob is deleted meanwhile.
type ReaderAt interface {
	io.ReaderAt
	io.Closer
	// Size is the blob's length in bytes.
	Size() int64
}

// WriterOptions says what is known of an ingest before it is written.
type WriterOptions struct {
	// Total is the length in bytes, 0 if unknown.
	Total int64
	// Expected is the digest, "" if unknown.
	Expected digest.Digest
}

// Writer writes one ingest. Closing it without a commit keeps what has been
// written, to be resumed by a Writer on the same ref. It is not safe for
// concurrent use.
type Writer interface {
	io.WriteCloser
	// Digest is that of the bytes so far; "" if the algorithm asks for a hash at commit.
	Digest() digest.Digest
	// Status is the ingest's.
	Status() (Status, error)
	// Truncate drops all bytes. Any size but 0 is ErrInvalidArgument or ErrNotImplemented.
	Truncate(size int64) error
	// Commit makes the bytes a blob with labels, durable when it returns, and
	// ends the ingest. A size other than 0 or a digest other than "" that is
	// not the bytes' own is ErrFailedPrecondition and keeps the ingest. If the
	// blob is there already, ErrAlreadyExists, and the ingest ends as well.
	// The Writer is closed by a successful commit; Close after it does nothing.
	Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error
}

// Store keeps blobs and ingests. It is safe for concurrent use.
type Store interface {
	// Info returns what is known of a blob, or ErrNotFound.
	Info(ctx context.Context, dgst digest.Digest) (Info, error)
	// Walk calls fn for each blob that matches one of the filters (fields
	// digest, size, labels), in the order of their digests, all if there are
	// none. fn's error ends the walk and is returned. fn may call the store.
	Walk(ctx context.Context, fn func(Info) error, filters ...string) error
	// Update changes labels: the fields named (labels, labels.<key>), or all
	// labels if none is. ErrNotFound; other fields are ErrInvalidArgument.
	Update(ctx context.Context, info Info, fields ...string) (Info, error)
	// Delete removes the name of a blob, or returns ErrNotFound.
	Delete(ctx context.Context, dgst digest.Digest) error
	// Open reads a blob, or returns ErrNotFound.
	Open(ctx context.Context, dgst digest.Digest) (ReaderAt, error)
	// Writer starts or resumes the ingest named ref; its Status says where.
	// ErrUnavailable if another Writer has it (and for no other reason,
	// contract 4.1.4), ErrAlreadyExists if the expected blob is there already,
	// ErrInvalidArgument without a ref.
	Writer(ctx context.Context, ref string, opts WriterOptions) (Writer, error)
	// Status returns an ingest's status or ErrNotFound.
	Status(ctx context.Context, ref string) (Status, error)
	// Statuses returns those of all ingests that match one of the filters
	// (field ref), in the order of their refs.
	Statuses(ctx context.Context, filters ...string) ([]Status, error)
	// Abort drops an ingest, or returns ErrNotFound; ErrUnavailable if a Writer has it.
	Abort(ctx context.Context, ref string) error
}
