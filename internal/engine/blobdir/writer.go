package blobdir

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/internal/lib/fsx"
)

// parallelHash is the length in bytes from which a Write hashes beside the
// file system's work instead of after it.
const parallelHash = 128 << 10

// spill is the length in bytes up to which a new ingest is kept in memory. Most
// blobs are small and committed at once: they need one file and no directory.
// It is also what a killed process may lose of an ingest.
const spill = 64 << 10

// staged ends the name of a small blob's file before the rename.
const staged = ".staged"

// Writer implements content.Store. What an earlier Writer left is read and
// hashed again, so the call takes as long as that, or until ctx ends. A total
// other than the one the ingest began with starts it over.
func (s *Store) Writer(ctx context.Context, ref string, opts content.WriterOptions) (content.Writer, error) {
	if ref == "" {
		return nil, fmt.Errorf("open ingest: ref must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	if len(ref) > maxRef {
		return nil, fmt.Errorf("open ingest %s...: ref is longer than %d bytes: %w", ref[:64], maxRef, errdefs.ErrInvalidArgument)
	}
	if opts.Expected != "" {
		if _, err := blobPath(opts.Expected); err != nil {
			return nil, fmt.Errorf("open ingest %s: %w", ref, err)
		}
	}
	release, err := s.hold(ref)
	if err != nil {
		return nil, err
	}
	w, err := s.openIngest(ctx, ref, opts)
	if err != nil {
		release()
		return nil, fmt.Errorf("open ingest %s: %w", ref, err)
	}
	w.release = release
	s.mu.Lock()
	s.writers[ref].w = w
	s.mu.Unlock()
	return w, nil
}

func (s *Store) openIngest(ctx context.Context, ref string, opts content.WriterOptions) (*writer, error) {
	dir := ingestDir(ref)
	if opts.Expected != "" {
		_, err := s.stat(opts.Expected)
		if err == nil { // nobody needs what was ingested of it
			if err := s.removeIngest(dir); err != nil {
				return nil, err
			}
			return nil, fmt.Errorf("content %s: %w", opts.Expected, errdefs.ErrAlreadyExists)
		}
		if !errdefs.IsNotFound(err) {
			return nil, err
		}
	}
	w := &writer{s: s, dir: dir, alg: digest.Canonical}
	if opts.Expected != "" {
		w.alg = opts.Expected.Algorithm()
	}
	w.hash = w.alg.Hash()

	st, err := s.readIngest(dir)
	switch {
	case err == nil && (opts.Total <= 0 || st.Total <= 0 || st.Total == opts.Total):
		w.status = st
		if opts.Total > st.Total {
			if err := fsx.WriteFile(s.fs, dir+"/total", strconv.AppendInt(nil, opts.Total, 10), 0o644); err != nil {
				return nil, classify(err)
			}
		}
		if err := w.resume(ctx); err != nil {
			return nil, err
		}
	case err == nil || errors.Is(err, errGarbage):
		if err := s.removeIngest(dir); err != nil {
			return nil, classify(err)
		}
		now := time.Now().UTC()
		w.status = content.Status{Ref: ref, Total: max(opts.Total, 0), StartedAt: now, UpdatedAt: now}
		w.memory = true
	default:
		return nil, err
	}
	w.status.Total = max(w.status.Total, opts.Total)
	w.status.Expected = opts.Expected
	return w, nil
}

// writer is a content.Writer on an ingest that it holds.
type writer struct {
	s       *Store
	dir     string
	release func()
	closed  bool
	memory  bool     // all bytes are in buf and there is no directory yet
	buf     []byte   // only while memory is set
	file    fsx.File // the data; nil while memory is set and after the end
	alg     digest.Algorithm
	hash    hash.Hash // of the first status.Offset bytes; nil if that must be found out again

	mu     sync.Mutex // guards status, which Store.Status reads
	status content.Status
}

// create makes the ingest's files, the ref last: without it there is no ingest.
func (w *writer) create() error {
	f := w.s.fs
	if err := f.Mkdir(w.dir, 0o755); err != nil {
		return err
	}
	started, err := w.status.StartedAt.MarshalText()
	if err != nil {
		return err
	}
	if err := fsx.WriteFile(f, w.dir+"/startedat", started, 0o644); err != nil {
		return err
	}
	if err := fsx.WriteFile(f, w.dir+"/updatedat", started, 0o644); err != nil {
		return err
	}
	if w.status.Total > 0 {
		if err := fsx.WriteFile(f, w.dir+"/total", strconv.AppendInt(nil, w.status.Total, 10), 0o644); err != nil {
			return err
		}
	}
	if w.file, err = f.OpenFile(w.dir+"/data", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644); err != nil {
		return err
	}
	return fsx.WriteFile(f, w.dir+"/ref", []byte(w.status.Ref), 0o644)
}

// toDisk makes files of an ingest that was kept in memory.
func (w *writer) toDisk() error {
	err := w.create()
	if err == nil && len(w.buf) > 0 {
		_, err = w.file.WriteAt(w.buf, 0)
	}
	if err != nil {
		if w.file != nil {
			err = errors.Join(err, w.file.Close())
			w.file = nil
		}
		return errors.Join(err, w.s.removeIngest(w.dir))
	}
	w.memory, w.buf = false, nil
	return nil
}

// resume opens the data and hashes it.
func (w *writer) resume(ctx context.Context) (err error) {
	f, name := w.s.fs, w.dir+"/data"
	fi, err := f.Stat(name)
	if err != nil {
		return err
	}
	if fsx.Links(fi) > 1 {
		// A crash left the file under the blob's name and this one. It must
		// never be written to again.
		if err := f.Remove(name); err != nil {
			return classify(err)
		}
	}
	w.file, err = f.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if errors.Is(err, fs.ErrPermission) { // a commit that failed had taken the permission
		if err = chmod(f, name, 0o644); err == nil {
			w.file, err = f.OpenFile(name, os.O_RDWR, 0)
		}
		if errors.Is(err, fs.ErrPermission) { // or sealed it for ever
			if err = f.Remove(name); err == nil {
				w.file, err = f.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
			}
		}
	}
	if err != nil {
		return classify(err)
	}
	defer func() {
		if err != nil {
			w.file.Close()
		}
	}()
	if fi, err = w.file.Stat(); err != nil {
		return err
	}
	w.status.Offset = fi.Size()
	return w.rehash(ctx)
}

func chmod(f fsx.FS, name string, mode fs.FileMode) error {
	r, err := f.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(r.Chmod(mode), r.Close())
}

// rehash makes w.hash that of the file.
func (w *writer) rehash(ctx context.Context) error {
	h := w.alg.Hash()
	if err := hashFile(ctx, h, w.file, w.status.Offset); err != nil {
		return fmt.Errorf("hash what is there: %w", err)
	}
	w.hash = h
	return nil
}

// hashFile hashes the first size bytes, which must be there, until ctx ends.
func hashFile(ctx context.Context, h hash.Hash, r io.ReaderAt, size int64) error {
	buf := make([]byte, min(1<<20, max(size, 1)))
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.ReadAt(buf[:min(int64(len(buf)), size-off)], off)
		h.Write(buf[:n])
		off += int64(n)
		if err == io.EOF && off < size {
			return fmt.Errorf("%d bytes of %d: %w", off, size, io.ErrUnexpectedEOF)
		}
		if err != nil && err != io.EOF {
			return err
		}
	}
	return nil
}

func (w *writer) closedError(op string) error {
	return fmt.Errorf("%s ingest %s: the writer is closed: %w", op, w.status.Ref, errdefs.ErrFailedPrecondition)
}

// Write appends. After an error the bytes that were reported are kept.
func (w *writer) Write(p []byte) (int, error) {
	if w.closed {
		return 0, w.closedError("write")
	}
	if w.memory && len(w.buf)+len(p) <= w.s.spill {
		w.buf = append(w.buf, p...)
		w.hash.Write(p)
		w.advance(len(p))
		return len(p), nil
	}
	if w.memory {
		if err := w.toDisk(); err != nil {
			return 0, fmt.Errorf("write ingest %s: %w", w.status.Ref, classify(err))
		}
	}
	if w.hash == nil {
		if err := w.rehash(context.Background()); err != nil {
			return 0, fmt.Errorf("write ingest %s: %w", w.status.Ref, err)
		}
	}
	offset := w.status.Offset
	var hashed chan struct{}
	if len(p) >= parallelHash {
		hashed = make(chan struct{})
		go func() {
			defer close(hashed)
			w.hash.Write(p)
		}()
	}
	n, err := w.file.WriteAt(p, offset)
	switch {
	case hashed == nil:
		w.hash.Write(p[:n])
	default:
		<-hashed
		if n < len(p) {
			w.hash = nil // it knows more than the file
		}
	}
	w.advance(n)
	if err != nil {
		return n, fmt.Errorf("write ingest %s at %d: %w", w.status.Ref, offset, classify(err))
	}
	return n, nil
}

func (w *writer) advance(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.Offset += int64(n)
	w.status.UpdatedAt = time.Now().UTC()
}

// Digest implements content.Writer.
func (w *writer) Digest() digest.Digest {
	if w.hash == nil {
		return ""
	}
	return digest.NewDigest(w.alg, w.hash)
}

// Status implements content.Writer.
func (w *writer) Status() (content.Status, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.status, nil
}

// Truncate implements content.Writer.
func (w *writer) Truncate(size int64) error {
	if w.closed {
		return w.closedError("truncate")
	}
	if size != 0 {
		return fmt.Errorf("truncate ingest %s to %d: only to 0: %w", w.status.Ref, size, errdefs.ErrInvalidArgument)
	}
	w.buf = w.buf[:0]
	if !w.memory {
		if err := w.file.Truncate(0); err != nil {
			return fmt.Errorf("truncate ingest %s: %w", w.status.Ref, classify(err))
		}
	}
	w.hash = w.alg.Hash()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status.Offset = 0
	w.status.UpdatedAt = time.Now().UTC()
	return nil
}

// Close implements content.Writer.
func (w *writer) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	defer w.release()
	if w.memory {
		if err := w.toDisk(); err != nil {
			return fmt.Errorf("close ingest %s: %w", w.status.Ref, classify(err))
		}
	}
	err := w.file.Close()
	text, terr := w.status.UpdatedAt.MarshalText()
	if terr == nil {
		terr = fsx.WriteFile(w.s.fs, w.dir+"/updatedat", text, 0o644)
	}
	if err := errors.Join(err, terr); err != nil {
		return fmt.Errorf("close ingest %s: %w", w.status.Ref, classify(err))
	}
	return nil
}

// Commit implements content.Writer. The Writer stays open if it fails for
// another reason than ErrAlreadyExists. If the data cannot be synced the bytes
// are dropped: nobody knows what is on the disk, and a second try would say yes.
func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, _ map[string]string) error {
	if w.closed {
		return w.closedError("commit")
	}
	err := w.commit(ctx, size, expected)
	if err == nil || errdefs.IsAlreadyExists(err) {
		// The blob is there; what remains of the ingest is litter.
		w.closed = true
		if w.file != nil {
			if cerr := w.file.Close(); cerr != nil {
				w.s.log.Warn("cannot close a committed ingest", "ref", w.status.Ref, "error", cerr)
			}
		}
		if !w.memory {
			if rerr := w.s.removeIngest(w.dir); rerr != nil {
				w.s.log.Warn("cannot remove a committed ingest", "ref", w.status.Ref, "error", rerr)
			}
		}
		w.s.opts.Faults.Pass("blobdir.commit.done")
		w.release()
	}
	if err != nil {
		return fmt.Errorf("commit ingest %s: %w", w.status.Ref, classify(err))
	}
	return nil
}

func (w *writer) commit(ctx context.Context, size int64, expected digest.Digest) error {
	expected = cmp.Or(expected, w.status.Expected)
	alg := w.alg
	if expected != "" {
		if _, err := blobPath(expected); err != nil {
			return err
		}
		alg = expected.Algorithm()
	}
	var bytesOf io.ReaderAt = bytes.NewReader(w.buf)
	if !w.memory {
		bytesOf = w.file
		fi, err := w.file.Stat()
		if err != nil {
			return err
		}
		if fi.Size() != w.status.Offset { // a write that failed half-way
			if err := w.file.Truncate(w.status.Offset); err != nil {
				return err
			}
		}
	}
	if size != 0 && size != w.status.Offset {
		return fmt.Errorf("%d bytes instead of %d: %w", w.status.Offset, size, errdefs.ErrFailedPrecondition)
	}
	if w.hash == nil {
		if err := w.rehash(ctx); err != nil {
			return err
		}
	}
	h := w.hash
	if alg != w.alg {
		h = alg.Hash()
		if err := hashFile(ctx, h, bytesOf, w.status.Offset); err != nil {
			return fmt.Errorf("hash with %s: %w", alg, err)
		}
	}
	dgst := digest.NewDigest(alg, h)
	if expected != "" && dgst != expected {
		return fmt.Errorf("digest is %s instead of %s: %w", dgst, expected, errdefs.ErrFailedPrecondition)
	}
	turn, err := w.s.begin(ctx, dgst)
	if err != nil {
		return err
	}
	defer w.s.end(dgst, turn)
	return w.publish(dgst, turn)
}

// begin waits until no other commit makes the same blob.
func (s *Store) begin(ctx context.Context, dgst digest.Digest) (*settling, error) {
	mine := &settling{done: make(chan struct{})}
	for {
		s.mu.Lock()
		other := s.unsettled[dgst]
		if other == nil || closed(other.done) {
			if other != nil {
				mine.hides = other.hides
			}
			s.unsettled[dgst] = mine
			s.mu.Unlock()
			return mine, nil
		}
		s.mu.Unlock()
		select {
		case <-other.done:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another commit of %s: %w", dgst, ctx.Err())
		}
	}
}

func closed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// end lets others see what became of the blob.
func (s *Store) end(dgst digest.Digest, turn *settling) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(turn.done)
	if !turn.hides {
		delete(s.unsettled, dgst)
	}
}

func (s *Store) hide(turn *settling, hides bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	turn.hides = hides
}

// makeAlgorithm makes a directory in blobs/ whose own name is durable.
func (s *Store) makeAlgorithm(dir string) error {
	s.mu.Lock()
	known := s.algorithms[dir]
	s.mu.Unlock()
	if known {
		return nil
	}
	if err := s.fs.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if !s.opts.NoSync {
		if err := s.names.Sync(blobs); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.algorithms[dir] = true
	return nil
}

// publish makes the data a blob: durable, then named, then durably named.
func (w *writer) publish(dgst digest.Digest, turn *settling) (err error) {
	s, data := w.s, w.dir+"/data"
	path, err := blobPath(dgst)
	if err != nil {
		return err
	}
	doubtful := turn.hides
	if !doubtful { // else it is there, perhaps, and will be replaced
		if _, err := s.stat(dgst); err == nil {
			return fmt.Errorf("content %s: %w", dgst, errdefs.ErrAlreadyExists)
		} else if !errdefs.IsNotFound(err) {
			return err
		}
	}
	parent := blobs + "/" + dgst.Algorithm().String()
	if err := s.makeAlgorithm(parent); err != nil {
		return err
	}
	if w.memory {
		data = w.dir + staged
		if err := w.stage(data); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				w.unstage(data)
			}
		}()
	}
	if err := w.file.Chmod(0o444); err != nil {
		return err
	}
	if err := w.sync(); err != nil {
		return err
	}
	s.opts.Faults.Pass("blobdir.commit.synced")
	w.seal(data)

	s.hide(turn, true)
	if err := s.fs.Rename(data, path); err != nil {
		s.hide(turn, doubtful)
		return err
	}
	s.opts.Faults.Pass("blobdir.commit.renamed")
	if !s.opts.NoSync {
		if err := s.names.Sync(parent); err != nil {
			// Not acknowledged: take the name back, so that the ingest is whole again.
			if rerr := s.fs.Rename(path, data); rerr != nil {
				return errors.Join(err, rerr) // stays hidden
			}
			s.hide(turn, false)
			return err
		}
	}
	s.hide(turn, false)
	return nil
}

// stage writes what is in memory to a file, which becomes w.file.
func (w *writer) stage(name string) (err error) {
	f := w.s.fs
	if err := f.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) { // left by a crash
		return err
	}
	if w.file, err = f.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644); err != nil {
		w.file = nil
		return err
	}
	if len(w.buf) > 0 {
		if _, err := w.file.WriteAt(w.buf, 0); err != nil {
			w.unstage(name)
			return err
		}
	}
	return nil
}

// unstage takes stage back: the bytes are still in memory.
func (w *writer) unstage(name string) {
	err := w.file.Close()
	w.file = nil
	if rerr := w.s.fs.Remove(name); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	if err != nil {
		w.s.log.Warn("cannot remove a staged blob", "file", name, "error", err)
	}
}

func (w *writer) sync() error {
	if w.s.opts.NoSync {
		return nil
	}
	err := w.file.Sync()
	if err == nil || w.memory { // in memory nothing is lost
		return err
	}
	if terr := w.Truncate(0); terr != nil {
		// The bytes must not be resumed: without the file there is no ingest.
		return errors.Join(err, terr, w.s.fs.Remove(w.dir+"/data"))
	}
	return err
}

// seal gives the file fs-verity where there is such a thing (contract 4.1.5).
// It is best effort: the blob is verified without it as well.
func (w *writer) seal(data string) {
	if w.s.verity == nil {
		return
	}
	// Only a file that nobody has open for writing can be sealed.
	if err := w.reopen(data); err != nil {
		w.s.log.Warn("cannot reopen an ingest to seal it", "ref", w.status.Ref, "error", err)
		return
	}
	if err := w.s.verity.EnableVerity(data); err != nil {
		w.s.log.Warn("cannot seal a blob with fs-verity", "ref", w.status.Ref, "error", err)
	}
}

func (w *writer) reopen(data string) error {
	f, err := w.s.fs.OpenFile(data, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	err = w.file.Close()
	w.file = f
	return err
}
