// Package blobdir stores blobs as files named by their digest, in the layout
// that containerd's tools read (contract 4.1.1). A name in blobs/ is a promise
// that the whole blob is on disk; the rest is in ingest/, where anything may lie.
package blobdir

import (
	"cmp"
	"context"
	_ "crypto/sha256" // the digests a blob may be named by
	_ "crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/filter"
	"github.com/gantryd/gantry/internal/lib/fsx"
)

const (
	blobs  = "blobs"
	ingest = "ingest"
	// maxRef bounds what is read of an ingest's small files, in bytes.
	maxRef = 64 << 10
)

// Options are the choices an administrator has.
type Options struct {
	// NoSync leaves it to the system when data gets to the disk: a power cut
	// may then damage blobs. For stores that can be thrown away.
	NoSync bool
	// Logger gets what is survived but worth knowing; nil is none.
	Logger *slog.Logger
	// Faults are the points blobdir.commit.synced, .renamed and .done, where a
	// test may kill the process.
	Faults *fault.Points
}

// Store is a content.Store that keeps no labels: Update is ErrNotImplemented,
// and those of a commit are for who wraps it. It expects to be the only user
// of its directory, readers aside.
type Store struct {
	fs     fsx.FS
	opts   Options
	log    *slog.Logger
	verity fsx.VerityFS // nil where it is not supported
	spill  int          // the constant, but for tests
	names  groupSync    // makes the names in blobs/ durable

	mu        sync.Mutex // guards the maps; never held over I/O
	writers   map[string]*hold
	unsettled map[digest.Digest]*settling
	// algorithms are the directories in blobs/ that are there for good.
	algorithms map[string]bool
}

// hold is the lock on a ref.
type hold struct {
	since time.Time
	w     *writer // nil until the Writer is open
}

// settling is a commit between its check and its durable name.
type settling struct {
	done chan struct{}
	// hides is set while the name may be there without being durable: for
	// everybody else there is no such blob yet. It stays set if the name could
	// neither be synced nor taken back.
	hides bool
}

// Open opens the store in a directory, which is made if it is missing. What
// interrupted commits left in ingest/ and no one can resume is removed.
func Open(dir string, o Options) (*Store, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open blob directory %s: %w", dir, err)
	}
	if err := fsx.MkdirAll(fsx.Dir("/"), strings.TrimPrefix(abs, "/"), 0o755); err != nil {
		return nil, fmt.Errorf("open blob directory: %w", err)
	}
	s, err := OpenFS(fsx.Dir(abs), o)
	if err != nil {
		return nil, fmt.Errorf("open blob directory %s: %w", dir, err)
	}
	return s, nil
}

// OpenFS is Open in an FS whose root exists.
func OpenFS(f fsx.FS, o Options) (*Store, error) {
	s := &Store{fs: f, opts: o, log: o.Logger, spill: spill, writers: map[string]*hold{}, unsettled: map[digest.Digest]*settling{}, algorithms: map[string]bool{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.names.sync = f.SyncDir
	for _, dir := range []string{ingest, blobs + "/" + string(digest.Canonical)} {
		if err := fsx.MkdirAll(f, dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := s.settleAll(); err != nil {
		return nil, err
	}
	if err := s.sweep(); err != nil {
		return nil, err
	}
	s.probeVerity()
	return s, nil
}

// Close ends the store. It holds nothing open; Writers should be closed before.
func (s *Store) Close() error { return nil }

// settleAll makes the names durable that a killed process left in the cache.
func (s *Store) settleAll() error {
	if s.opts.NoSync {
		return nil
	}
	algs, err := s.fs.ReadDir(blobs)
	if err != nil {
		return err
	}
	for _, alg := range algs {
		if alg.IsDir() {
			dir := blobs + "/" + alg.Name()
			if err := s.fs.SyncDir(dir); err != nil {
				return err
			}
			s.algorithms[dir] = true
		}
	}
	return errors.Join(s.fs.SyncDir(blobs), s.fs.SyncDir("."))
}

// sweep removes the ingests that can be resumed by nobody: a crash left them
// without data or without the ref that names them.
func (s *Store) sweep() error {
	entries, err := s.fs.ReadDir(ingest)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, small := strings.CutSuffix(e.Name(), staged)
		if !isIngestName(name) || e.IsDir() == small {
			continue // not ours
		}
		dir := ingest + "/" + e.Name()
		if _, err := s.readIngest(dir); !errors.Is(err, errGarbage) {
			continue
		}
		if err := fsx.RemoveAll(s.fs, dir); err != nil {
			s.log.Warn("cannot remove an unusable ingest", "dir", dir, "error", err)
			continue
		}
		s.log.Info("removed an unusable ingest", "dir", dir)
	}
	return nil
}

// probeVerity finds out whether blobs can be sealed (contract 4.1.5).
func (s *Store) probeVerity() {
	v, ok := s.fs.(fsx.VerityFS)
	if !ok {
		return
	}
	const probe = ingest + "/.verity-probe"
	err := fsx.WriteFile(s.fs, probe, []byte("probe"), 0o444)
	if err == nil {
		err = v.EnableVerity(probe)
	}
	if rerr := s.fs.Remove(probe); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	if err != nil {
		s.log.Debug("blobs are not sealed with fs-verity", "error", err)
		return
	}
	s.verity = v
}

func isIngestName(name string) bool {
	_, err := hex.DecodeString(name)
	return err == nil && len(name) == 64
}

func ingestDir(ref string) string {
	return ingest + "/" + digest.SHA256.FromString(ref).Encoded()
}

// blobPath returns where a blob is, or ErrInvalidArgument.
func blobPath(dgst digest.Digest) (string, error) {
	if err := dgst.Validate(); err != nil {
		return "", fmt.Errorf("digest %q: %w: %w", dgst, err, errdefs.ErrInvalidArgument)
	}
	return blobs + "/" + dgst.Algorithm().String() + "/" + dgst.Encoded(), nil
}

// classify gives errors of the disk the class that clients know them by.
func classify(err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

func notFound(dgst digest.Digest) error {
	return fmt.Errorf("content %s: %w", dgst, errdefs.ErrNotFound)
}

// stat returns a settled blob's file, or ErrNotFound or ErrInvalidArgument.
func (s *Store) stat(dgst digest.Digest) (fs.FileInfo, error) {
	path, err := blobPath(dgst)
	if err != nil {
		return nil, err
	}
	if s.hidden(dgst) {
		return nil, notFound(dgst)
	}
	fi, err := s.fs.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound(dgst)
	}
	if err != nil {
		return nil, fmt.Errorf("content %s: %w", dgst, err)
	}
	// A commit may have begun to name it between the check and the look.
	if s.hidden(dgst) || !fi.Mode().IsRegular() {
		return nil, notFound(dgst)
	}
	return fi, nil
}

func (s *Store) hidden(dgst digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.unsettled[dgst]
	return u != nil && u.hides
}

func blobInfo(dgst digest.Digest, fi fs.FileInfo) content.Info {
	return content.Info{Digest: dgst, Size: fi.Size(), CreatedAt: fi.ModTime().UTC(), UpdatedAt: fi.ModTime().UTC()}
}

// Info implements content.Store. Both times are when the last byte was written.
func (s *Store) Info(_ context.Context, dgst digest.Digest) (content.Info, error) {
	fi, err := s.stat(dgst)
	if err != nil {
		return content.Info{}, err
	}
	return blobInfo(dgst, fi), nil
}

// Walk implements content.Store. Files that are not blobs are passed over.
func (s *Store) Walk(ctx context.Context, fn func(content.Info) error, filters ...string) error {
	match, err := filter.Parse(filters...)
	if err != nil {
		return err
	}
	algs, err := s.fs.ReadDir(blobs)
	if err != nil {
		return fmt.Errorf("walk blobs: %w", err)
	}
	for _, alg := range algs {
		if !alg.IsDir() || !digest.Algorithm(alg.Name()).Available() {
			continue
		}
		names, err := s.fs.ReadDir(blobs + "/" + alg.Name())
		if err != nil {
			return fmt.Errorf("walk blobs: %w", err)
		}
		for _, e := range names {
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("walk blobs: %w", err)
			}
			dgst := digest.Digest(alg.Name() + ":" + e.Name())
			fi, err := s.stat(dgst)
			if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
				continue // deleted meanwhile, not settled yet, or no blob
			}
			if err != nil {
				return err
			}
			if info := blobInfo(dgst, fi); match.Match(info) {
				if err := fn(info); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// Update is ErrNotImplemented for a blob that exists.
func (s *Store) Update(_ context.Context, info content.Info, _ ...string) (content.Info, error) {
	if _, err := s.stat(info.Digest); err != nil {
		return content.Info{}, err
	}
	return content.Info{}, fmt.Errorf("update content %s: a blob directory keeps no labels: %w", info.Digest, errdefs.ErrNotImplemented)
}

// Delete implements content.Store. It is not durable: after a power cut the
// blob may be there again, whole.
func (s *Store) Delete(_ context.Context, dgst digest.Digest) error {
	if _, err := s.stat(dgst); err != nil {
		return err
	}
	path, err := blobPath(dgst)
	if err != nil {
		return err
	}
	if err := s.fs.Remove(path); err != nil {
		return fmt.Errorf("delete content %s: %w", dgst, classify(err))
	}
	return nil
}

// Open implements content.Store.
func (s *Store) Open(_ context.Context, dgst digest.Digest) (content.ReaderAt, error) {
	if _, err := s.stat(dgst); err != nil {
		return nil, err
	}
	path, err := blobPath(dgst)
	if err != nil {
		return nil, err
	}
	f, err := s.fs.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open content %s: %w", dgst, classify(err))
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open content %s: %w", dgst, err), f.Close())
	}
	return &reader{File: f, size: fi.Size()}, nil
}

type reader struct {
	fsx.File
	size int64
}

func (r *reader) Size() int64 { return r.size }

// errGarbage says that a directory in ingest/ is not an ingest.
var errGarbage = errors.New("not an ingest")

// readIngest reads an ingest from its directory. errGarbage if it cannot be
// resumed; other errors are the disk's. Unreadable details are forgiven: the
// ref and the bytes are what counts.
func (s *Store) readIngest(dir string) (content.Status, error) {
	data, err := s.fs.Stat(dir + "/data")
	if err != nil {
		return content.Status{}, garbageIfMissing(err)
	}
	if !data.Mode().IsRegular() {
		return content.Status{}, fmt.Errorf("data is no file: %w", errGarbage)
	}
	ref, err := fsx.ReadFile(s.fs, dir+"/ref", maxRef)
	if err != nil {
		return content.Status{}, garbageIfMissing(err)
	}
	if len(ref) == 0 || ingestDir(string(ref)) != dir {
		return content.Status{}, fmt.Errorf("ref does not belong to the directory: %w", errGarbage)
	}
	st := content.Status{Ref: string(ref), Offset: data.Size()}
	st.StartedAt = s.readTime(dir+"/startedat", data.ModTime())
	st.UpdatedAt = s.readTime(dir+"/updatedat", data.ModTime())
	if data.ModTime().After(st.UpdatedAt) { // the process was killed before it wrote that down
		st.UpdatedAt = data.ModTime().UTC()
	}
	if total, err := fsx.ReadFile(s.fs, dir+"/total", 32); err == nil {
		if n, err := strconv.ParseInt(strings.TrimSpace(string(total)), 10, 64); err == nil && n > 0 {
			st.Total = n
		}
	}
	return st, nil
}

func garbageIfMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.EISDIR) || errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("%w: %w", err, errGarbage)
	}
	return err
}

func (s *Store) readTime(name string, otherwise time.Time) time.Time {
	var t time.Time
	if text, err := fsx.ReadFile(s.fs, name, 64); err != nil || t.UnmarshalText(text) != nil {
		return otherwise.UTC()
	}
	return t.UTC()
}

// Status implements content.Store. Expected is known only while a Writer is open.
func (s *Store) Status(_ context.Context, ref string) (content.Status, error) {
	s.mu.Lock()
	h := s.writers[ref]
	var w *writer
	if h != nil {
		w = h.w
	}
	s.mu.Unlock()
	if w != nil {
		return w.Status()
	}
	st, err := s.readIngest(ingestDir(ref))
	if errors.Is(err, errGarbage) {
		return content.Status{}, fmt.Errorf("ingest %s: %w", ref, errdefs.ErrNotFound)
	}
	if err != nil {
		return content.Status{}, fmt.Errorf("ingest %s: %w", ref, err)
	}
	return st, nil
}

// Statuses implements content.Store. What is not an ingest is passed over.
func (s *Store) Statuses(ctx context.Context, filters ...string) ([]content.Status, error) {
	match, err := filter.Parse(filters...)
	if err != nil {
		return nil, err
	}
	// First those that Writers have: only they know how far they are, and of
	// the small ones nothing is on disk until they are closed.
	var out []content.Status
	written := map[string]bool{}
	for _, w := range s.openWriters() {
		st, err := w.Status()
		if err != nil {
			return nil, fmt.Errorf("list ingests: %w", err)
		}
		written[st.Ref] = true
		if match.Match(st) {
			out = append(out, st)
		}
	}
	entries, err := s.fs.ReadDir(ingest)
	if err != nil {
		return nil, fmt.Errorf("list ingests: %w", err)
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("list ingests: %w", err)
		}
		if !isIngestName(e.Name()) {
			continue
		}
		st, err := s.readIngest(ingest + "/" + e.Name())
		if errors.Is(err, errGarbage) || written[st.Ref] {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list ingests: %s: %w", e.Name(), err)
		}
		if match.Match(st) {
			out = append(out, st)
		}
	}
	slices.SortFunc(out, func(a, b content.Status) int { return cmp.Compare(a.Ref, b.Ref) })
	return out, nil
}

func (s *Store) openWriters() []*writer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*writer
	for _, h := range s.writers {
		if h.w != nil {
			out = append(out, h.w)
		}
	}
	return out
}

// Abort implements content.Store. Garbage under the ref's name goes as well.
func (s *Store) Abort(_ context.Context, ref string) error {
	release, err := s.hold(ref)
	if err != nil {
		return err
	}
	defer release()
	dir := ingestDir(ref)
	_, err = s.readIngest(dir)
	if err != nil && !errors.Is(err, errGarbage) {
		return fmt.Errorf("abort ingest %s: %w", ref, err)
	}
	missing := err != nil
	if err := s.removeIngest(dir); err != nil {
		return fmt.Errorf("abort ingest %s: %w", ref, classify(err))
	}
	if missing {
		return fmt.Errorf("abort ingest %s: %w", ref, errdefs.ErrNotFound)
	}
	return nil
}

// removeIngest takes the data first: without it the rest means nothing.
func (s *Store) removeIngest(dir string) error {
	if err := s.fs.Remove(dir + "/data"); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) && !errors.Is(err, syscall.ENOTDIR) {
		return err
	}
	return fsx.RemoveAll(s.fs, dir)
}

// hold locks a ref, or returns ErrUnavailable (contract 4.1.4).
func (s *Store) hold(ref string) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.writers[ref]; h != nil {
		return nil, fmt.Errorf("ref %s locked for %s: %w", ref, time.Since(h.since).Round(time.Millisecond), errdefs.ErrUnavailable)
	}
	s.writers[ref] = &hold{since: time.Now()}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.writers, ref)
	}, nil
}
