package snapmeta

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/filter"
)

const (
	dbName  = "metadata.db"
	dirName = "snapshots"
	// trashPrefix names what lost its record. Like all that has none, containerd
	// removes it when it cleans up.
	trashPrefix = "rm-"
	// foreignPrefix is of directories that containerd was just making.
	foreignPrefix = "new-"
	// syncOneByOne is up to how many files a commit syncs each by itself, which
	// spares it to wait for the writes of others.
	syncOneByOne = 64
)

// Options say how a Store treats its directories.
type Options struct {
	// Data is what of snapshots/<id> holds the snapshot's own files: "fs", or
	// "" for all of it.
	Data string
	// BareViews says that a view of a parent has no directory.
	BareViews bool
	// Rebase allows commits of snapshots on nothing to name a parent.
	Rebase bool
	// SyncRemove removes directories before Remove returns instead of in Cleanup.
	SyncRemove bool
	// Show changes what clients see of a record, which is not stored. It gets
	// labels of its own. May be nil.
	Show func(Record, *snapshot.Info)
	// Log takes what could not be removed.
	Log *slog.Logger
	// Fault is where tests end the process; nil otherwise.
	Fault *fault.Points
}

// Store is the part of a snapshotter that does not depend on how its mounts
// look: all of snapshot.Store but Mounts, Prepare and View, which are made of
// Make and Get, and snapshot.Cleaner. It is safe for concurrent use.
type Store struct {
	opts Options
	root string
	db   *DB
	dir  *os.File // snapshots/

	entries group // syncs the entries of dir
	all     group // syncs the file system

	mu   sync.Mutex      // guards next and made
	next uint64          // the ID given away last
	made map[uint64]bool // IDs whose directory may be there before the record
}

// Open opens the snapshotter's directory root, or makes it. Nothing is
// written to one that exists. ErrUnavailable if another process has it open.
// Directories without a record are left to Cleanup.
func Open(root string, opts Options) (*Store, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	for _, d := range []string{root, filepath.Join(root, dirName)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	dir, err := os.Open(filepath.Join(root, dirName))
	if err != nil {
		return nil, err
	}
	db, err := OpenDB(filepath.Join(root, dbName))
	if err != nil {
		dir.Close()
		return nil, err
	}
	s := &Store{opts: opts, root: root, db: db, dir: dir, made: map[uint64]bool{}}
	s.entries.do = dir.Sync
	s.all.do = func() error { return syncFS(dir) }
	err = db.View(func(tx *Tx) error { s.next = tx.Sequence(); return nil })
	if err == nil {
		// The names of metadata.db and snapshots/ are as durable as what they hold.
		err = syncDir(root)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Close waits for the syncs that run and closes the metastore.
func (s *Store) Close() error {
	s.entries.close()
	s.all.close()
	return errors.Join(s.db.Close(), s.dir.Close())
}

// Root is the snapshotter's directory.
func (s *Store) Root() string { return s.root }

// Dir is the directory of a snapshot.
func (s *Store) Dir(id uint64) string {
	return filepath.Join(s.root, dirName, strconv.FormatUint(id, 10))
}

// Data is the directory that holds a snapshot's own files.
func (s *Store) Data(id uint64) string { return filepath.Join(s.Dir(id), s.opts.Data) }

// Get reads a record: ErrNotFound.
func (s *Store) Get(key string) (r Record, err error) {
	err = s.db.View(func(tx *Tx) error {
		r, err = tx.Get(key)
		return err
	})
	return r, err
}

// Build fills the directory of a new snapshot, which is empty and has mode
// 0700. plan is the record to be, without its ID. copied says that there is
// more in it than empty directories, of which the last made comes after the
// last change of another one's mode or owner.
type Build func(ctx context.Context, dir string, plan Record) (copied bool, err error)

// Make makes a snapshot: build fills its directory, and the record follows
// when that is durable. A nil build makes no directory. Whatever fails, nothing
// but garbage is left. Errors are those of snapshot.Store.Prepare.
func (s *Store) Make(ctx context.Context, kind snapshot.Kind, key, parent string, labels map[string]string, build Build) (Record, error) {
	labels = maps.Clone(labels)
	var plan Record
	err := s.db.View(func(tx *Tx) (err error) {
		plan, err = tx.Plan(kind, key, parent, labels)
		return err
	})
	if err != nil {
		return Record{}, err
	}
	id, err := s.reserve(build != nil)
	if err != nil {
		return Record{}, fmt.Errorf("snapshot %s: %w", key, err)
	}
	defer s.settle(id)
	if build != nil {
		s.opts.Fault.Pass("snapshot-made")
		if err := s.fill(ctx, id, plan, build); err != nil {
			s.discard(id)
			return Record{}, fmt.Errorf("snapshot %s: %w", key, err)
		}
	}
	s.opts.Fault.Pass("snapshot-filled")
	var r Record
	err = s.db.Update(ctx, func(tx *Tx) (err error) {
		if r, err = tx.Plan(kind, key, parent, labels); err != nil {
			return err
		}
		if len(r.ParentIDs) > 0 && r.ParentIDs[0] != plan.ParentIDs[0] {
			return fmt.Errorf("snapshot %s: parent %s was replaced meanwhile: %w", key, parent, errdefs.ErrNotFound)
		}
		r, err = tx.Create(id, kind, key, parent, labels)
		return err
	})
	if err != nil {
		// A commit whose sync failed may be there all the same.
		if found, gerr := s.Get(key); build != nil && (gerr != nil && errdefs.IsNotFound(gerr) || gerr == nil && found.ID != id) {
			s.discard(id)
		}
		return Record{}, err
	}
	s.opts.Fault.Pass("snapshot-recorded")
	return r, nil
}

// reserve takes the next ID, and with mkdir one whose directory it could make.
// Nobody else gets it, in this life of the process.
func (s *Store) reserve(mkdir bool) (uint64, error) {
	for {
		s.mu.Lock()
		s.next++
		id := s.next
		s.made[id] = true
		s.mu.Unlock()
		if !mkdir {
			return id, nil
		}
		err := os.Mkdir(s.Dir(id), 0o700)
		if err == nil {
			return id, nil
		}
		s.settle(id)
		if !errors.Is(err, fs.ErrExist) { // else it was left by a crash
			return 0, err
		}
	}
}

// settle says that a directory either has its record by now or is garbage.
func (s *Store) settle(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.made, id)
}

func (s *Store) fill(ctx context.Context, id uint64, plan Record, build Build) error {
	copied, err := build(ctx, s.Dir(id), plan)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return err
	}
	if copied {
		err = s.persist(ctx, s.Dir(id))
	} else {
		// The journal or log that has the last entry of a directory has all that
		// came before, and the inodes of new entries: one sync is enough.
		err = syncDir(s.Dir(id))
	}
	if err != nil {
		return err
	}
	return s.entries.wait(ctx)
}

// discard removes a directory that has no record, or leaves it to Cleanup.
func (s *Store) discard(id uint64) {
	name := strconv.FormatUint(id, 10)
	if err := removeAll(context.Background(), s.dir, name); err != nil {
		s.opts.Log.Warn("directory of a snapshot that was not made is left for cleanup", "path", s.Dir(id), "error", err)
	}
}

// Commit is snapshot.Store's. The files are made durable before the record: a
// few by themselves, many by a sync of their file system that all commits of
// the moment share.
func (s *Store) Commit(ctx context.Context, name, key string, opts snapshot.CommitOptions) error {
	opts.Labels = maps.Clone(opts.Labels)
	var plan Record
	err := s.db.View(func(tx *Tx) (err error) {
		plan, err = tx.PlanCommit(name, key, opts, s.opts.Rebase)
		return err
	})
	if err != nil {
		return fmt.Errorf("commit %s as %s: %w", key, name, err)
	}
	u, err := usage(ctx, s.Data(plan.ID))
	if err == nil && !opts.Synced {
		err = s.persist(ctx, s.Data(plan.ID))
	}
	if err != nil {
		return fmt.Errorf("commit %s as %s: %w", key, name, err)
	}
	s.opts.Fault.Pass("snapshot-synced")
	err = s.db.Update(ctx, func(tx *Tx) error {
		now, err := tx.PlanCommit(name, key, opts, s.opts.Rebase)
		if err != nil {
			return err
		}
		if now.ID != plan.ID {
			return fmt.Errorf("snapshot %s was replaced meanwhile: %w", key, errdefs.ErrNotFound)
		}
		_, err = tx.Commit(name, key, u, opts, s.opts.Rebase)
		return err
	})
	if err != nil {
		return fmt.Errorf("commit %s as %s: %w", key, name, err)
	}
	s.opts.Fault.Pass("snapshot-committed")
	return nil
}

// persist makes what is at path and below durable.
func (s *Store) persist(ctx context.Context, path string) error {
	done, err := syncTree(ctx, path, syncOneByOne)
	if err != nil {
		return err
	}
	if !done {
		return s.all.wait(ctx)
	}
	return nil
}

// Remove is snapshot.Store's. The record goes first. What cannot be removed
// of the directory is logged and left to Cleanup.
func (s *Store) Remove(ctx context.Context, key string) error {
	var r Record
	err := s.db.Update(ctx, func(tx *Tx) (err error) {
		r, err = tx.Remove(key)
		return err
	})
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	s.opts.Fault.Pass("snapshot-unrecorded")
	trash := trashPrefix + strconv.FormatUint(r.ID, 10)
	err = os.Rename(s.Dir(r.ID), filepath.Join(s.dir.Name(), trash))
	if err == nil && s.opts.SyncRemove {
		s.opts.Fault.Pass("snapshot-trashed")
		err = removeAll(ctx, s.dir, trash)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.opts.Log.Warn("directory of a removed snapshot is left for cleanup", "snapshot", key, "path", s.Dir(r.ID), "error", err)
	}
	return nil
}

// Stat is snapshot.Store's.
func (s *Store) Stat(_ context.Context, key string) (snapshot.Info, error) {
	r, err := s.Get(key)
	if err != nil {
		return snapshot.Info{}, err
	}
	return s.show(r), nil
}

func (s *Store) show(r Record) snapshot.Info {
	if s.opts.Show != nil {
		s.opts.Show(r, &r.Info)
	}
	return r.Info
}

// Update is snapshot.Store's.
func (s *Store) Update(ctx context.Context, info snapshot.Info, paths ...string) (snapshot.Info, error) {
	var r Record
	err := s.db.Update(ctx, func(tx *Tx) (err error) {
		r, err = tx.Update(info, paths...)
		return err
	})
	if err != nil {
		return snapshot.Info{}, fmt.Errorf("update: %w", err)
	}
	return s.show(r), nil
}

// Usage is snapshot.Store's: counted for an active snapshot, remembered for a
// committed one, zero for a view (contract 3.1.6).
func (s *Store) Usage(ctx context.Context, key string) (snapshot.Usage, error) {
	r, err := s.Get(key)
	if err != nil || r.Kind != snapshot.KindActive {
		return r.Usage, err
	}
	u, err := usage(ctx, s.Data(r.ID))
	if err == nil {
		return u, nil
	}
	// It may have been removed meanwhile.
	if _, gerr := s.Get(key); gerr != nil {
		return snapshot.Usage{}, gerr
	}
	return snapshot.Usage{}, fmt.Errorf("usage of snapshot %s: %w", key, err)
}

// Walk is snapshot.Store's. What it shows is of one moment.
func (s *Store) Walk(ctx context.Context, fn func(snapshot.Info) error, filters ...string) error {
	f, err := filter.Parse(filters...)
	if err != nil {
		return err
	}
	var found []snapshot.Info
	err = s.db.View(func(tx *Tx) error {
		return tx.Walk(func(r Record) error {
			if info := s.show(r); f.Match(info) {
				found = append(found, info)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	for _, info := range found {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

// Cleanup is snapshot.Cleaner's: it removes the directories without a record,
// those that a crash left included. It goes on after an error and returns the
// first. Other requests do not wait for it.
func (s *Store) Cleanup(ctx context.Context) error {
	found, err := s.survey()
	if err != nil {
		return fmt.Errorf("clean up %s: %w", s.dir.Name(), err)
	}
	var first error
	for _, name := range found.garbage {
		if err := ctx.Err(); err != nil {
			return err
		}
		s.opts.Fault.Pass("cleanup")
		if err := removeAll(ctx, s.dir, name); err != nil && first == nil {
			first = fmt.Errorf("clean up %s: %w", s.dir.Name(), err)
		}
	}
	return first
}

type survey struct {
	garbage []string          // names in snapshots/ without a record
	strange []string          // names that neither daemon gives
	dirs    map[uint64]bool   // IDs that have a directory
	records map[uint64]Record // all there are
}

// survey compares directories and records. The order matters: a directory that
// is seen is either still being made, or its record can be seen, or it is garbage.
func (s *Store) survey() (survey, error) {
	v := survey{dirs: map[uint64]bool{}, records: map[uint64]Record{}}
	entries, err := os.ReadDir(s.dir.Name())
	if err != nil {
		return v, err
	}
	s.mu.Lock()
	made := maps.Clone(s.made)
	s.mu.Unlock()
	err = s.db.View(func(tx *Tx) error {
		return tx.Walk(func(r Record) error {
			v.records[r.ID] = r
			return nil
		})
	})
	if err != nil {
		return v, err
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, trashPrefix) || strings.HasPrefix(name, foreignPrefix) {
			v.garbage = append(v.garbage, name)
			continue
		}
		id, err := strconv.ParseUint(name, 10, 64)
		if err != nil || strconv.FormatUint(id, 10) != name {
			if name != "lost+found" {
				v.strange = append(v.strange, name)
			}
			continue
		}
		v.dirs[id] = true
		if _, ok := v.records[id]; !ok && !made[id] {
			v.garbage = append(v.garbage, name)
		}
	}
	return v, nil
}

// Problem is something that Check found.
type Problem struct {
	// Object is a snapshot's key or a path.
	Object string `json:"object"`
	// What is wrong with it.
	What string `json:"what"`
	// Garbage says that Cleanup removes it; anything else means lost data.
	Garbage bool `json:"garbage,omitempty"`
}

func (p Problem) String() string { return p.Object + ": " + p.What }

// Check compares the metastore with itself and with the directories. It
// changes nothing. On a store in use it may name what is being changed.
func (s *Store) Check(ctx context.Context) []Problem {
	var out []Problem
	report := func(object, format string, args ...any) {
		out = append(out, Problem{Object: object, What: fmt.Sprintf(format, args...)})
	}
	found, err := s.survey()
	if err != nil {
		report(s.root, "%v", err)
		return out
	}
	for _, name := range found.garbage {
		out = append(out, Problem{Object: filepath.Join(s.dir.Name(), name), What: "directory without a record", Garbage: true})
	}
	for _, name := range found.strange {
		report(filepath.Join(s.dir.Name(), name), "not a name of a snapshot's directory")
	}
	for id, r := range found.records {
		if ctx.Err() != nil {
			report(s.root, "%v", ctx.Err())
			return out
		}
		if r.Kind == snapshot.KindView && r.Parent != "" && s.opts.BareViews {
			continue
		}
		if !found.dirs[id] {
			report(r.Name, "record of a directory %s that does not exist", s.Dir(id))
		} else if st, err := os.Lstat(s.Data(id)); err != nil {
			report(r.Name, "%v", err)
		} else if !st.IsDir() {
			report(r.Name, "%s is not a directory", s.Data(id))
		}
	}
	err = s.db.View(func(tx *Tx) error {
		for _, p := range tx.check() {
			report(p.Object, "%s", p.What)
		}
		return nil
	})
	if err != nil {
		report(s.root, "%v", err)
	}
	return out
}
