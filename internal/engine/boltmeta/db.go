// Package boltmeta keeps the metadata of everything in one bolt file, in
// containerd's schema (contract 4.4): which names exist in which namespace and
// what labels they carry. The bytes behind the names are in a content store
// and in snapshotters, its backends. Two rules hold at every instruction:
// data is durable in a backend before a record names it, and a record is gone
// before its data is deleted. What a crash leaves is therefore data without a
// name, and Reclaim deletes it.
package boltmeta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/lib/fault"
)

// Sharing policies (contract 4.1.7).
const (
	SharingShared   = "shared"
	SharingIsolated = "isolated"
)

// Options says what is behind the metadata and how to keep it.
type Options struct {
	// Content holds the blobs. Without it Records.Content answers ErrUnavailable.
	Content content.Store
	// Snapshotters hold the snapshots, by name.
	Snapshotters map[string]snapshot.Store
	// Events is told of every change after it was committed; nil for nobody.
	Events event.Publisher
	// SharingPolicy is SharingShared (also "") or SharingIsolated.
	SharingPolicy string
	// NoSync leaves it to the kernel when to write (contract 4.1.10).
	NoSync bool
	// OpenTimeout is how long to wait for another process's lock; 0 waits for ever.
	OpenTimeout time.Duration
	// Logger is told of waits and of leftovers; nil for nobody.
	Logger *slog.Logger
	// Faults are the points of a test of crashes: meta.commit before each
	// transaction is written, meta.committed after it; nil for none.
	Faults *fault.Points
	// Clock is time.Now unless a test needs another.
	Clock func() time.Time
}

// DB is the open metadata. It is safe for concurrent use. It implements
// view.RecordSource and graph.Store.
type DB struct {
	path     string
	bolt     *bolt.DB
	o        Options
	isolated bool
	commits  committer
	observer atomic.Pointer[func(deleted bool)]

	// blobs and the snapshotters' keys that an operation under way relies on.
	blobs pins
	keys  map[string]*pins // by snapshotter, not changed after Open
	// seqs hands out the sequence numbers of backend keys.
	seqs sequences

	mu      sync.Mutex           // guards what follows
	busy    map[ingest]time.Time // ingests with an open writer, and since when
	soil    map[string]bool      // what to reclaim: snapshotters by name, and content as ""
	sick    map[string]time.Time // backends that did not answer, and until when they are left alone
	adopted map[string]bool      // "<snapshotter>/<backend key>" that got a record of another name since the last reclaim
	first   map[string]bool      // snapshotters not reclaimed since Open
}

// ingest names one.
type ingest struct {
	ns  namespace.ID
	ref string
}

// Open opens the file at path, or makes it with its directory. One process
// can have it open (contract 4.4.4): while another has, Open waits, at most
// OpenTimeout, then returns ErrUnavailable naming path and holder. A file that
// is damaged is ErrDataLoss and is not touched.
func Open(path string, o Options) (*DB, error) {
	if o.Clock == nil {
		o.Clock = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	switch o.SharingPolicy {
	case "", SharingShared, SharingIsolated:
	default:
		return nil, fmt.Errorf("open metadata %s: unknown sharing policy %q: %w", path, o.SharingPolicy, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("open metadata %s: %w", path, err)
	}
	db := &DB{path: path, o: o, isolated: o.SharingPolicy == SharingIsolated,
		keys: map[string]*pins{}, busy: map[ingest]time.Time{}, soil: map[string]bool{"": true}, first: map[string]bool{}, sick: map[string]time.Time{}, adopted: map[string]bool{}}
	for name := range o.Snapshotters {
		db.keys[name] = &pins{}
		db.soil[name] = true
		db.first[name] = true
	}
	var err error
	if db.bolt, err = db.open(); err != nil {
		return nil, fmt.Errorf("open metadata %s: %w", path, err)
	}
	if err := db.migrate(); err != nil {
		return nil, errors.Join(fmt.Errorf("open metadata %s: %w", path, err), db.bolt.Close())
	}
	if err := db.loadSequences(); err != nil {
		return nil, errors.Join(fmt.Errorf("open metadata %s: %w", path, err), db.bolt.Close())
	}
	return db, nil
}

// open waits for the lock, then looks at every page before bolt relies on it.
func (db *DB) open() (b *bolt.DB, err error) {
	waiting := time.AfterFunc(10*time.Second, func() {
		db.o.Logger.Warn("waiting for bolt lock", "path", db.path, "holder", holder(db.path))
	})
	defer waiting.Stop()
	defer func() {
		if r := recover(); r != nil {
			b, err = nil, damage(r)
		}
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	b, err = bolt.Open(db.path, 0o644, &bolt.Options{
		Timeout:         db.o.OpenTimeout,
		NoFreelistSync:  true,
		FreelistType:    bolt.FreelistMapType,
		NoSync:          db.o.NoSync,
		InitialMmapSize: 64 << 20, // address space, not memory: growing it stops all readers
		OpenFile:        db.openFile,
	})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("locked by %s: %w", holder(db.path), errdefs.ErrUnavailable)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return nil, fmt.Errorf("%v: %w", err, errdefs.ErrDataLoss)
	case err != nil:
		return nil, err
	}
	return b, nil
}

// openFile opens the file for bolt. bolt asks for it before it locks, so the
// lock is taken here first: pages are only looked at when nobody writes them.
func (db *DB) openFile(path string, flag int, mode os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, flag, mode)
	if err != nil {
		return nil, err
	}
	var deadline time.Time
	if db.o.OpenTimeout > 0 {
		deadline = time.Now().Add(db.o.OpenTimeout)
	}
	if err := lockFile(f, deadline); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := checkPages(f); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss), f.Close())
	}
	return f, nil
}

// damage is the error for a panic that bolt raised over what it found in the file.
func damage(r any) error {
	return fmt.Errorf("the file is damaged: %v: %w", r, errdefs.ErrDataLoss)
}

// Close waits for transactions under way and releases the lock.
func (db *DB) Close() error { return db.bolt.Close() }

// Observe has fn called after every transaction that changed something;
// deleted says whether it may have left something to collect. fn must not
// wait. One function at a time; nil for none.
func (db *DB) Observe(fn func(deleted bool)) {
	if fn == nil {
		db.observer.Store(nil)
		return
	}
	db.observer.Store(&fn)
}

func (db *DB) now() time.Time { return db.o.Clock().UTC() }

// view runs fn in a read transaction. fn must not do I/O or call the store.
func (db *DB) view(fn func(t *txn) error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("metadata %s: %w", db.path, damage(r))
		}
	}()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	err = db.bolt.View(func(tx *bolt.Tx) error { return fn(&txn{tx: tx}) })
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return db.failure(err)
	}
	return err
}

// WriteTo writes a copy of the file as of one moment: a backup.
func (db *DB) WriteTo(w io.Writer) (n int64, err error) {
	err = db.bolt.View(func(tx *bolt.Tx) error {
		n, err = tx.WriteTo(w)
		return err
	})
	return n, err
}

// publish tells of a change that was committed (contract 1.2.12).
func (db *DB) publish(ctx context.Context, ns namespace.ID, topic string, p event.Payload) error {
	if db.o.Events == nil {
		return nil
	}
	return db.o.Events.Publish(context.WithoutCancel(ctx), event.Envelope{Timestamp: db.now(), Namespace: ns, Topic: topic, Event: p})
}

// due marks a backend to be reclaimed; "" is content.
func (db *DB) due(backend string) {
	db.mu.Lock()
	db.soil[backend] = true
	db.mu.Unlock()
}
