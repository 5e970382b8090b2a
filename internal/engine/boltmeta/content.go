package boltmeta

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/internal/lib/fields"
	"github.com/gantryd/gantry/internal/lib/filter"
)

// labelShareable on a namespace lets others use its content under the
// isolated policy (contract 1.5.12).
const labelShareable = "containerd.io/namespace.shareable"

// ingestLife is how long an ingest that no lease holds lives after its last
// opening (contract 4.1.8).
const ingestLife = 24 * time.Hour

// contents is a namespace's part of the content backend: a blob is there if
// this namespace has a record of it (contract 4.1.6, 4.1.9).
type contents struct{ *records }

func readBlob(name string, b *bolt.Bucket) (content.Info, error) {
	return content.Info{
		Digest: digest.Digest(name), Size: readVarint(b.Get([]byte(kSize))), Labels: readMap(b, kLabels),
		CreatedAt: readTime(b, kCreated), UpdatedAt: readTime(b, kUpdated),
	}, nil
}

func (s *contents) write(t *txn, i content.Info) error {
	b, err := s.make(t, kContent, kBlob, i.Digest.String())
	if err != nil {
		return err
	}
	if err := t.putTimes(b, i.CreatedAt, i.UpdatedAt); err != nil {
		return err
	}
	if err := t.put(b, kSize, varint(i.Size)); err != nil {
		return err
	}
	return t.putMap(b, kLabels, i.Labels)
}

func (s *contents) backend() (content.Store, error) {
	if s.db.o.Content == nil {
		return nil, fmt.Errorf("no content store is loaded: %w", errdefs.ErrUnavailable)
	}
	return s.db.o.Content, nil
}

func (s *contents) Info(_ context.Context, dgst digest.Digest) (i content.Info, err error) {
	err = s.db.view(func(t *txn) error {
		b := s.find(t, kContent, kBlob, dgst.String())
		if b == nil {
			return notFound("content", dgst.String())
		}
		i, err = readBlob(dgst.String(), b)
		return err
	})
	return i, err
}

func (s *contents) Walk(_ context.Context, fn func(content.Info) error, filters ...string) error {
	return scan(s.records, readBlob, content.Info.Field, fn, filters, kContent, kBlob)
}

func (s *contents) Update(ctx context.Context, i content.Info, paths ...string) (out content.Info, err error) {
	err = s.db.update(ctx, func(t *txn) error {
		b := s.find(t, kContent, kBlob, i.Digest.String())
		if b == nil {
			return notFound("content", i.Digest.String())
		}
		cur, err := readBlob(i.Digest.String(), b)
		if err != nil {
			return err
		}
		out = cur
		if out.Labels, err = fields.Labels(cur.Labels, i.Labels, paths); err == nil {
			err = ident.CheckLabels(out.Labels)
		}
		if err != nil {
			return fmt.Errorf("update content %s: %w", i.Digest, err)
		}
		out.Labels = nonEmpty(out.Labels)
		out.UpdatedAt = s.db.after(cur.UpdatedAt)
		t.deleted = !maps.Equal(cur.Labels, out.Labels)
		if err := t.putTime(b, kUpdated, out.UpdatedAt); err != nil {
			return err
		}
		return t.putMap(b, kLabels, out.Labels)
	})
	return out, err
}

func (s *contents) Delete(ctx context.Context, dgst digest.Digest) error {
	err := s.db.update(ctx, func(t *txn) error {
		if s.find(t, kContent, kBlob, dgst.String()) == nil {
			return notFound("content", dgst.String())
		}
		if err := s.release(t, kContent, dgst.String()); err != nil {
			return err
		}
		t.deleted = true
		return t.remove(s.find(t, kContent, kBlob), dgst.String())
	})
	if err != nil {
		return err
	}
	s.db.due("")
	return s.db.publish(ctx, s.ns, event.TopicContentDelete, event.ContentDelete{Digest: dgst.String()})
}

func (s *contents) Open(ctx context.Context, dgst digest.Digest) (content.ReaderAt, error) {
	back, err := s.backend()
	if err != nil {
		return nil, err
	}
	if _, err := s.Info(ctx, dgst); err != nil {
		return nil, err
	}
	return back.Open(ctx, dgst)
}

// entry is the record of an ingest. Expected is set if the blob is there
// already and needs no bytes.
type entry struct {
	ref, backend string
	expected     digest.Digest
}

func readEntry(ref string, b *bolt.Bucket) (entry, error) {
	return entry{ref, readString(b, kRef), digest.Digest(readString(b, kExpected))}, nil
}

// entry finds an ingest's record.
func (s *contents) entry(ref string) (e entry, err error) {
	err = s.db.view(func(t *txn) error {
		b := s.find(t, kContent, kIngests, ref)
		if b == nil {
			return notFound("ingest", ref)
		}
		e, err = readEntry(ref, b)
		return err
	})
	return e, err
}

func (s *contents) Status(ctx context.Context, ref string) (content.Status, error) {
	e, err := s.entry(ref)
	if err != nil {
		return content.Status{}, err
	}
	return s.status(ctx, e)
}

// status asks the backend about an ingest.
func (s *contents) status(ctx context.Context, e entry) (content.Status, error) {
	back, err := s.backend()
	if err != nil {
		return content.Status{}, err
	}
	if e.expected != "" {
		i, err := back.Info(ctx, e.expected)
		if err != nil {
			return content.Status{}, fmt.Errorf("ingest %q: %w", e.ref, err)
		}
		return content.Status{Ref: e.ref, Offset: i.Size, Total: i.Size, Expected: e.expected, StartedAt: i.CreatedAt, UpdatedAt: i.UpdatedAt}, nil
	}
	st, err := back.Status(ctx, e.backend)
	if err != nil {
		return content.Status{}, fmt.Errorf("ingest %q: %w", e.ref, err)
	}
	st.Ref = e.ref
	return st, nil
}

func (s *contents) Statuses(ctx context.Context, filters ...string) (all []content.Status, err error) {
	f, err := filter.Parse(filters...)
	if err != nil {
		return nil, err
	}
	err = scan(s.records, readEntry, nil, func(e entry) error {
		st, err := s.status(ctx, e)
		if errdefs.IsNotFound(err) {
			return nil // it ended meanwhile, or a crash left only the record
		}
		if err == nil && f.Match(st) {
			all = append(all, st)
		}
		return err
	}, nil, kContent, kIngests)
	return all, err
}

func (s *contents) Abort(ctx context.Context, ref string) error {
	back, err := s.backend()
	if err != nil {
		return err
	}
	unlock, ok := s.db.take(ingest{s.ns, ref})
	if !ok {
		return s.locked(ref)
	}
	defer unlock()
	var e entry
	err = s.db.update(ctx, func(t *txn) error {
		b := s.find(t, kContent, kIngests, ref)
		if b == nil {
			return notFound("ingest", ref)
		}
		if e, err = readEntry(ref, b); err != nil {
			return err
		}
		return s.endIngest(t, ref)
	})
	if err != nil {
		return err
	}
	return s.abortBackend(ctx, back, e)
}

// abortBackend drops what the backend has of an ingest whose record is gone.
func (s *contents) abortBackend(ctx context.Context, back content.Store, e entry) error {
	if err := back.Abort(ctx, e.backend); err != nil && !errdefs.IsNotFound(err) {
		s.db.due("")
		return fmt.Errorf("abort ingest %q: %w", e.ref, err)
	}
	return nil
}

// endIngest removes an ingest's record, if it is there.
func (s *contents) endIngest(t *txn, ref string) error {
	if b := s.find(t, kContent, kIngests); b != nil {
		if err := t.remove(b, ref); err != nil {
			return err
		}
	}
	return s.release(t, kIngests, ref)
}

// locked is the error for an ingest that another writer has.
func (s *contents) locked(ref string) error {
	s.db.mu.Lock()
	since, ok := s.db.busy[ingest{s.ns, ref}]
	s.db.mu.Unlock()
	if !ok {
		since = time.Now() // it has just been freed
	}
	return fmt.Errorf("ref %s locked for %s: %w", ref, time.Since(since).Round(time.Millisecond), errdefs.ErrUnavailable)
}

// take makes the caller the only writer of an ingest until unlock.
func (db *DB) take(i ingest) (unlock func(), ok bool) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if _, ok := db.busy[i]; ok {
		return func() {}, false
	}
	db.busy[i] = time.Now()
	return sync.OnceFunc(func() {
		db.mu.Lock()
		delete(db.busy, i)
		db.mu.Unlock()
	}), true
}

// shared says whether this namespace may have a blob without sending its
// bytes: it is in another one, which lets it (contract 4.1.7).
func (s *contents) shared(t *txn, dgst digest.Digest) bool {
	for _, ns := range t.namespaces() {
		if t.find(string(ns), kContent, kBlob, dgst.String()) == nil {
			continue
		}
		if !s.db.isolated || readMap(t.find(string(ns)), kLabels)[labelShareable] == "true" {
			return true
		}
	}
	return false
}

func (s *contents) Writer(ctx context.Context, ref string, opts content.WriterOptions) (content.Writer, error) {
	back, err := s.backend()
	if err != nil {
		return nil, err
	}
	if ref == "" {
		return nil, fmt.Errorf("ref must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	if opts.Expected != "" {
		if err := opts.Expected.Validate(); err != nil {
			return nil, fmt.Errorf("ingest %q: digest %q: %v: %w", ref, opts.Expected, err, errdefs.ErrInvalidArgument)
		}
	}
	for range 3 { // again only if the expected blob comes or goes at this moment
		w, err := s.open(ctx, back, ref, opts)
		if !errors.Is(err, errChanged) {
			return w, err
		}
	}
	return nil, fmt.Errorf("ingest %q: content %s keeps coming and going: %w", ref, opts.Expected, errdefs.ErrAborted)
}

// errChanged says that the backend is no longer as it was when it was asked.
var errChanged = errors.New("the content store changed")

// open is Writer, once.
func (s *contents) open(ctx context.Context, back content.Store, ref string, opts content.WriterOptions) (_ content.Writer, err error) {
	unlock, free := s.db.take(ingest{s.ns, ref})
	defer func() {
		if err != nil && free {
			unlock()
		}
	}()
	var have *content.Info
	if opts.Expected != "" {
		// From here until the transaction has named it, the blob must not be
		// reclaimed.
		release, err := s.db.blobs.hold(ctx, opts.Expected.String())
		if err != nil {
			return nil, err
		}
		defer release()
		switch i, err := back.Info(ctx, opts.Expected); {
		case err == nil:
			have = &i
		case !errdefs.IsNotFound(err):
			return nil, fmt.Errorf("ingest %q: %w", ref, err)
		}
	}
	var (
		there bool  // in this namespace
		old   entry // the ingest that ends because of that
		e     entry
	)
	err = s.db.update(ctx, func(t *txn) error {
		there, old, e = false, entry{}, entry{ref: ref}
		if err := s.leaseExists(t); err != nil {
			return err
		}
		cur := s.find(t, kContent, kIngests, ref)
		if have != nil && s.find(t, kContent, kBlob, opts.Expected.String()) != nil {
			there = true
			if err := s.hold(t, kContent, opts.Expected.String()); err != nil {
				return err
			}
			if cur == nil || !free {
				return nil
			}
			if old, err = readEntry(ref, cur); err != nil {
				return err
			}
			return s.endIngest(t, ref)
		}
		if !free {
			return s.locked(ref)
		}
		if cur != nil {
			e.backend = readString(cur, kRef)
		}
		if have != nil && s.shared(t, opts.Expected) {
			e.expected = opts.Expected
		}
		return s.writeEntry(t, &e)
	})
	if err != nil {
		return nil, err
	}
	if there {
		if old.backend != "" {
			if err := s.abortBackend(ctx, back, old); err != nil {
				s.db.o.Logger.Warn("an ingest stays until it is collected", "ref", ref, "error", err)
			}
		}
		return nil, exists("content", opts.Expected.String())
	}
	w := &writer{s: s, back: back, entry: e, expected: opts.Expected, total: opts.Total, unlock: unlock}
	if e.expected != "" {
		w.size, w.started = have.Size, s.db.now()
		return w, nil
	}
	bo := content.WriterOptions{Total: opts.Total}
	if have == nil { // else the backend would say that it has it, which this namespace is not to know
		bo.Expected = opts.Expected
	}
	if w.w, err = back.Writer(ctx, e.backend, bo); err != nil {
		if errdefs.IsAlreadyExists(err) {
			err = errChanged
		}
		return nil, fmt.Errorf("ingest %q: %w", ref, err)
	}
	return w, nil
}

// writeEntry writes an ingest's record: held by the lease, or else expiring.
func (s *contents) writeEntry(t *txn, e *entry) error {
	all, err := s.make(t, kContent, kIngests)
	if err != nil {
		return err
	}
	if e.backend == "" {
		n, err := all.NextSequence()
		if err != nil {
			return err
		}
		e.backend = fmt.Sprintf("%s/%d/%s", s.ns, n, e.ref)
	}
	b, err := t.sub(all, e.ref)
	if err != nil {
		return err
	}
	if err := t.put(b, kRef, []byte(e.backend)); err != nil {
		return err
	}
	if e.expected != "" {
		err = t.put(b, kExpected, []byte(e.expected))
	} else {
		err = t.drop(b, kExpected)
	}
	if err != nil {
		return err
	}
	if s.lease != "" {
		if err := t.drop(b, kExpireAt); err != nil {
			return err
		}
		return s.hold(t, kIngests, e.ref)
	}
	return t.putTime(b, kExpireAt, s.db.now().Add(ingestLife))
}

// writer writes an ingest of one namespace. w is nil if the blob is in the
// backend already: then all bytes are there and only the commit is missing.
type writer struct {
	s        *contents
	back     content.Store
	w        content.Writer
	entry    entry
	expected digest.Digest
	total    int64
	size     int64
	started  time.Time
	unlock   func()
	closed   bool
}

func (w *writer) Digest() digest.Digest {
	if w.w == nil {
		return w.entry.expected
	}
	return w.w.Digest()
}

func (w *writer) Status() (content.Status, error) {
	if w.w == nil {
		return content.Status{Ref: w.entry.ref, Offset: w.size, Total: w.size, Expected: w.entry.expected, StartedAt: w.started, UpdatedAt: w.started}, nil
	}
	st, err := w.w.Status()
	st.Ref, st.Expected = w.entry.ref, w.expected
	return st, err
}

func (w *writer) Write(p []byte) (int, error) {
	if w.closed {
		return 0, io.ErrClosedPipe
	}
	if w.w == nil {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, fmt.Errorf("write ingest %q: all %d bytes are there: %w", w.entry.ref, w.size, errdefs.ErrFailedPrecondition)
	}
	return w.w.Write(p)
}

func (w *writer) Truncate(size int64) error {
	if w.w != nil {
		return w.w.Truncate(size)
	}
	if size != 0 {
		return fmt.Errorf("truncate ingest %q to %d: only 0 is possible: %w", w.entry.ref, size, errdefs.ErrInvalidArgument)
	}
	// The client wants to send the bytes after all.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	e := w.entry
	e.expected = ""
	if err := w.s.db.update(ctx, func(t *txn) error { return w.s.writeEntry(t, &e) }); err != nil {
		return err
	}
	bw, err := w.back.Writer(ctx, e.backend, content.WriterOptions{Total: w.total})
	if err != nil {
		return fmt.Errorf("ingest %q: %w", e.ref, err)
	}
	w.w, w.entry = bw, e
	return nil
}

func (w *writer) Close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	defer w.unlock()
	if w.w != nil {
		return w.w.Close()
	}
	return nil
}

// Commit makes the blob durable in the backend, then names it and ends the
// ingest in one transaction.
func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error {
	s := w.s
	if w.closed {
		return fmt.Errorf("commit ingest %q: the writer is closed: %w", w.entry.ref, errdefs.ErrFailedPrecondition)
	}
	if err := ident.CheckLabels(labels); err != nil {
		return fmt.Errorf("commit ingest %q: %w", w.entry.ref, err)
	}
	expected = cmp.Or(expected, w.expected)
	i := content.Info{Digest: expected, Labels: nonEmpty(labels)}
	if i.Digest == "" {
		i.Digest = w.Digest()
	}
	release, err := s.db.blobs.hold(ctx, i.Digest.String())
	if err != nil {
		return err
	}
	defer release()
	named := false // there is a record already
	if err := s.db.view(func(t *txn) error {
		named = s.find(t, kContent, kBlob, i.Digest.String()) != nil
		return s.leaseExists(t)
	}); err != nil {
		return err
	}
	lost := false // though the backend did not have the blob
	if w.w == nil {
		if i.Digest != w.entry.expected || (size != 0 && size != w.size) {
			return fmt.Errorf("commit ingest %q: it has %s of %d bytes, expected %s of %d: %w", w.entry.ref, w.entry.expected, w.size, i.Digest, size, errdefs.ErrFailedPrecondition)
		}
		if _, err := w.back.Info(ctx, i.Digest); err != nil {
			return fmt.Errorf("commit ingest %q: %w", w.entry.ref, err)
		}
		i.Size = w.size
	} else {
		st, err := w.w.Status()
		if err != nil {
			return fmt.Errorf("commit ingest %q: %w", w.entry.ref, err)
		}
		i.Size = st.Offset
		switch err := w.w.Commit(ctx, size, expected, nil); {
		case err == nil:
			lost = named
		case !errdefs.IsAlreadyExists(err):
			return fmt.Errorf("commit ingest %q: %w", w.entry.ref, err)
		}
		if i.Digest == "" {
			i.Digest = w.w.Digest()
		}
	}
	i.CreatedAt = s.db.now()
	i.UpdatedAt = i.CreatedAt
	var there bool
	err = s.db.update(ctx, func(t *txn) error {
		there = false
		if err := s.leaseExists(t); err != nil {
			return err
		}
		if err := s.endIngest(t, w.entry.ref); err != nil {
			return err
		}
		if err := s.hold(t, kContent, i.Digest.String()); err != nil {
			return err
		}
		// A record whose blob was lost gets it back.
		if there = !lost && s.find(t, kContent, kBlob, i.Digest.String()) != nil; there {
			return nil
		}
		return s.write(t, i)
	})
	if err != nil {
		s.db.due("") // the blob has no name
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if there {
		return exists("content", i.Digest.String())
	}
	return s.db.publish(ctx, s.ns, event.TopicContentCreate, event.ContentCreate{Digest: i.Digest.String(), Size: i.Size})
}
