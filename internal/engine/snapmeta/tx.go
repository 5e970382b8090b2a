package snapmeta

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/lib/fields"
)

// The names in the file (contract 3.1.2).
var (
	keyVersion   = []byte("v1")
	keySnapshots = []byte("snapshots")
	keyParents   = []byte("parents")

	keyID      = []byte("id")
	keyParent  = []byte("parent")
	keyKind    = []byte("kind")
	keyInodes  = []byte("inodes")
	keySize    = []byte("size")
	keyLabels  = []byte("labels")
	keyCreated = []byte("createdat")
	keyUpdated = []byte("updatedat")
)

// maxDepth ends the search for ancestors in a damaged file. Overlay stacks at
// most 500 layers.
const maxDepth = 10000

// Record is a snapshot as it is stored.
type Record struct {
	snapshot.Info
	// ID is the name of its directory. It stays when the snapshot is committed.
	ID uint64
	// Usage is zero until the snapshot is committed.
	Usage snapshot.Usage
	// ParentIDs are those of its ancestors, the parent first. Walk leaves it empty.
	ParentIDs []uint64
}

// Tx is a transaction. Methods that change something need one of DB.Update;
// they return their errors before they changed anything.
type Tx struct {
	b         *bolt.Tx
	snapshots *bolt.Bucket // nil in an empty file
	parents   *bolt.Bucket
	dirty     bool
}

func newTx(b *bolt.Tx) *Tx {
	tx := &Tx{b: b}
	if v := b.Bucket(keyVersion); v != nil {
		tx.snapshots, tx.parents = v.Bucket(keySnapshots), v.Bucket(keyParents)
	}
	return tx
}

// writable makes the buckets that a change needs.
func (tx *Tx) writable() (err error) {
	tx.dirty = true
	v, err := tx.b.CreateBucketIfNotExists(keyVersion)
	if err != nil {
		return err
	}
	if tx.snapshots, err = v.CreateBucketIfNotExists(keySnapshots); err != nil {
		return err
	}
	tx.parents, err = v.CreateBucketIfNotExists(keyParents)
	return err
}

func (tx *Tx) bucket(key string) *bolt.Bucket {
	if tx.snapshots == nil || key == "" {
		return nil
	}
	return tx.snapshots.Bucket([]byte(key))
}

func checkKey(key string) error {
	if key == "" {
		return fmt.Errorf("snapshot without a key: %w", errdefs.ErrInvalidArgument)
	}
	if len(key) > bolt.MaxKeySize {
		return fmt.Errorf("snapshot key of %d bytes, %d are possible: %w", len(key), bolt.MaxKeySize, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkLabels(key string, labels map[string]string) error {
	for k := range labels {
		if k == "" || len(k) > bolt.MaxKeySize {
			return fmt.Errorf("snapshot %s: label with a key of %d bytes: %w", key, len(k), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func notFound(key string) error { return fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound) }

func exists(key string) error { return fmt.Errorf("snapshot %s: %w", key, errdefs.ErrAlreadyExists) }

// Get reads a snapshot: ErrNotFound, ErrInvalidArgument without a key,
// ErrDataLoss if its record cannot be read.
func (tx *Tx) Get(key string) (Record, error) {
	if err := checkKey(key); err != nil {
		return Record{}, err
	}
	b := tx.bucket(key)
	if b == nil {
		return Record{}, notFound(key)
	}
	r, err := read(key, b)
	if err != nil {
		return Record{}, err
	}
	r.ParentIDs, err = tx.ancestors(r.Parent)
	return r, err
}

func (tx *Tx) ancestors(key string) ([]uint64, error) {
	var ids []uint64
	for key != "" {
		b := tx.bucket(key)
		if b == nil {
			return nil, fmt.Errorf("ancestor %s has no record: %w", key, errdefs.ErrDataLoss)
		}
		id, n := binary.Uvarint(b.Get(keyID))
		if n <= 0 || len(ids) == maxDepth {
			return nil, fmt.Errorf("ancestor %s: damaged record: %w", key, errdefs.ErrDataLoss)
		}
		ids = append(ids, id)
		key = string(b.Get(keyParent))
	}
	return ids, nil
}

// parent checks that a snapshot can stand on key and returns its ancestry
// with itself first.
func (tx *Tx) parent(key string) ([]uint64, error) {
	if key == "" {
		return nil, nil
	}
	b := tx.bucket(key)
	if b == nil {
		return nil, fmt.Errorf("parent: %w", notFound(key))
	}
	r, err := read(key, b)
	if err != nil {
		return nil, err
	}
	if r.Kind != snapshot.KindCommitted {
		return nil, fmt.Errorf("parent %s is not committed: %w", key, errdefs.ErrInvalidArgument)
	}
	return tx.ancestors(key)
}

// Plan returns what Create would store, without an ID, or Create's error.
func (tx *Tx) Plan(kind snapshot.Kind, key, parent string, labels map[string]string) (Record, error) {
	if err := checkKey(key); err != nil {
		return Record{}, err
	}
	if err := checkLabels(key, labels); err != nil {
		return Record{}, err
	}
	if tx.bucket(key) != nil {
		return Record{}, exists(key)
	}
	ids, err := tx.parent(parent)
	if err != nil {
		return Record{}, fmt.Errorf("snapshot %s: %w", key, err)
	}
	now := time.Now().UTC()
	return Record{
		Info:      snapshot.Info{Name: key, Parent: parent, Kind: kind, CreatedAt: now, UpdatedAt: now, Labels: labels},
		ParentIDs: ids,
	}, nil
}

// Create stores an active snapshot or a view with an id from IDs.
// ErrAlreadyExists; ErrNotFound for the parent, ErrInvalidArgument if that is
// not committed.
func (tx *Tx) Create(id uint64, kind snapshot.Kind, key, parent string, labels map[string]string) (Record, error) {
	r, err := tx.Plan(kind, key, parent, labels)
	if err != nil {
		return Record{}, err
	}
	r.ID = id
	if err := tx.writable(); err != nil {
		return Record{}, err
	}
	if tx.snapshots.Sequence() < id {
		if err := tx.snapshots.SetSequence(id); err != nil {
			return Record{}, err
		}
	}
	return r, tx.put(r)
}

// PlanCommit checks a commit and returns what Commit would store. rebase says
// whether a snapshot on nothing may get a parent.
func (tx *Tx) PlanCommit(name, key string, opts snapshot.CommitOptions, rebase bool) (Record, error) {
	if err := checkKey(name); err != nil {
		return Record{}, err
	}
	if err := checkLabels(name, opts.Labels); err != nil {
		return Record{}, err
	}
	r, err := tx.Get(key)
	if err != nil {
		return Record{}, err
	}
	if tx.bucket(name) != nil {
		return Record{}, exists(name)
	}
	if r.Kind != snapshot.KindActive {
		return Record{}, fmt.Errorf("snapshot %s is not active: %w", key, errdefs.ErrFailedPrecondition)
	}
	if opts.Parent != "" && opts.Parent != r.Parent {
		if r.Parent != "" {
			return Record{}, fmt.Errorf("snapshot %s stands on %s, not on %s: %w", key, r.Parent, opts.Parent, errdefs.ErrInvalidArgument)
		}
		if !rebase {
			return Record{}, fmt.Errorf("put snapshot %s on top of %s: %w", key, opts.Parent, errdefs.ErrNotImplemented)
		}
		if r.ParentIDs, err = tx.parent(opts.Parent); err != nil {
			return Record{}, fmt.Errorf("snapshot %s: %w", key, err)
		}
		r.Parent = opts.Parent
	}
	r.Name, r.Kind, r.Labels = name, snapshot.KindCommitted, opts.Labels
	r.CreatedAt = time.Now().UTC()
	r.UpdatedAt = r.CreatedAt
	return r, nil
}

// Commit renames the active snapshot key to the committed snapshot name and
// stores its usage. Its labels are those of opts alone.
func (tx *Tx) Commit(name, key string, usage snapshot.Usage, opts snapshot.CommitOptions, rebase bool) (Record, error) {
	r, err := tx.PlanCommit(name, key, opts, rebase)
	if err != nil {
		return Record{}, err
	}
	r.Usage = usage
	if err := tx.writable(); err != nil {
		return Record{}, err
	}
	if err := tx.snapshots.DeleteBucket([]byte(key)); err != nil {
		return Record{}, err
	}
	return r, tx.put(r)
}

// Remove drops a record: ErrNotFound, ErrFailedPrecondition if it has children.
func (tx *Tx) Remove(key string) (Record, error) {
	r, err := tx.Get(key)
	if err != nil && (r.ID == 0 || !errdefs.IsDataLoss(err)) { // a lost ancestor is no reason to keep it
		return Record{}, err
	}
	if child, ok := tx.child(r.ID); ok {
		return Record{}, fmt.Errorf("snapshot %s has children, one is %s: %w", key, child, errdefs.ErrFailedPrecondition)
	}
	var parent uint64
	if r.Parent != "" {
		if b := tx.bucket(r.Parent); b != nil {
			parent, _ = binary.Uvarint(b.Get(keyID))
		}
	}
	if err := tx.writable(); err != nil {
		return Record{}, err
	}
	if parent != 0 {
		if err := tx.parents.Delete(childKey(parent, r.ID)); err != nil {
			return Record{}, err
		}
	}
	return r, tx.snapshots.DeleteBucket([]byte(key))
}

func (tx *Tx) child(id uint64) (key string, ok bool) {
	if tx.parents == nil {
		return "", false
	}
	prefix := append(binary.AppendUvarint(nil, id), 0)
	k, v := tx.parents.Cursor().Seek(prefix)
	if !bytes.HasPrefix(k, prefix) {
		return "", false
	}
	return string(v), true
}

// Update changes labels as fields say: ErrNotFound, ErrInvalidArgument.
func (tx *Tx) Update(info snapshot.Info, paths ...string) (Record, error) {
	r, err := tx.Get(info.Name)
	if err != nil {
		return Record{}, err
	}
	labels, err := fields.Labels(r.Labels, info.Labels, paths)
	if err != nil {
		return Record{}, fmt.Errorf("snapshot %s: %w", info.Name, err)
	}
	if err := checkLabels(info.Name, labels); err != nil {
		return Record{}, err
	}
	r.Labels, r.UpdatedAt = labels, time.Now().UTC()
	if err := tx.writable(); err != nil {
		return Record{}, err
	}
	return r, tx.put(r)
}

// Walk calls fn for every record in the order of their keys.
func (tx *Tx) Walk(fn func(Record) error) error {
	if tx.snapshots == nil {
		return nil
	}
	return tx.snapshots.ForEachBucket(func(k []byte) error {
		r, err := read(string(k), tx.snapshots.Bucket(k))
		if err != nil {
			return err
		}
		return fn(r)
	})
}

// Sequence is the highest ID that was ever given away.
func (tx *Tx) Sequence() uint64 {
	if tx.snapshots == nil {
		return 0
	}
	return tx.snapshots.Sequence()
}

// childKey is uvarint(parent) 0x00 uvarint(id).
func childKey(parent, id uint64) []byte {
	return binary.AppendUvarint(append(binary.AppendUvarint(nil, parent), 0), id)
}

func read(key string, b *bolt.Bucket) (Record, error) {
	damaged := func(field []byte) (Record, error) {
		return Record{}, fmt.Errorf("snapshot %s: field %s is damaged: %w", key, field, errdefs.ErrDataLoss)
	}
	r := Record{Info: snapshot.Info{Name: key, Parent: string(b.Get(keyParent))}}
	id, n := binary.Uvarint(b.Get(keyID))
	if n <= 0 {
		return damaged(keyID)
	}
	r.ID = id
	kind := b.Get(keyKind)
	if len(kind) != 1 || kind[0] > byte(snapshot.KindCommitted) {
		return damaged(keyKind)
	}
	r.Kind = snapshot.Kind(kind[0])
	for _, f := range []struct {
		key []byte
		to  *int64
	}{{keyInodes, &r.Usage.Inodes}, {keySize, &r.Usage.Size}} {
		if v := b.Get(f.key); v != nil {
			if *f.to, n = binary.Varint(v); n <= 0 {
				return damaged(f.key)
			}
		}
	}
	for _, f := range []struct {
		key []byte
		to  *time.Time
	}{{keyCreated, &r.CreatedAt}, {keyUpdated, &r.UpdatedAt}} {
		if v := b.Get(f.key); v != nil {
			if err := f.to.UnmarshalBinary(v); err != nil {
				return damaged(f.key)
			}
		}
	}
	if l := b.Bucket(keyLabels); l != nil {
		err := l.ForEach(func(k, v []byte) error {
			if r.Labels == nil {
				r.Labels = map[string]string{}
			}
			r.Labels[string(k)] = string(v)
			return nil
		})
		if err != nil {
			return Record{}, err
		}
	}
	return r, nil
}

// put writes a record and its entry among its parent's children.
func (tx *Tx) put(r Record) error {
	b, err := tx.snapshots.CreateBucketIfNotExists([]byte(r.Name))
	if err != nil {
		return err
	}
	created, err := r.CreatedAt.UTC().MarshalBinary()
	if err != nil {
		return err
	}
	updated, err := r.UpdatedAt.UTC().MarshalBinary()
	if err != nil {
		return err
	}
	values := []struct{ k, v []byte }{
		{keyID, binary.AppendUvarint(nil, r.ID)},
		{keyKind, []byte{byte(r.Kind)}},
		{keyCreated, created},
		{keyUpdated, updated},
	}
	if r.Parent != "" {
		values = append(values, struct{ k, v []byte }{keyParent, []byte(r.Parent)})
	}
	if r.Kind == snapshot.KindCommitted {
		values = append(values,
			struct{ k, v []byte }{keyInodes, binary.AppendVarint(nil, r.Usage.Inodes)},
			struct{ k, v []byte }{keySize, binary.AppendVarint(nil, r.Usage.Size)})
	}
	for _, e := range values {
		if err := b.Put(e.k, e.v); err != nil {
			return err
		}
	}
	if b.Bucket(keyLabels) != nil {
		if err := b.DeleteBucket(keyLabels); err != nil {
			return err
		}
	}
	for k, v := range r.Labels {
		l, err := b.CreateBucketIfNotExists(keyLabels)
		if err != nil {
			return err
		}
		if err := l.Put([]byte(k), []byte(v)); err != nil {
			return fmt.Errorf("label %q: %w", k, err)
		}
	}
	if len(r.ParentIDs) > 0 {
		return tx.parents.Put(childKey(r.ParentIDs[0], r.ID), []byte(r.Name))
	}
	return nil
}
