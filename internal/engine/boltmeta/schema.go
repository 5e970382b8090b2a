package boltmeta

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/containerd/errdefs"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/typed"
)

// The names of contract 4.4.
var keyVersion1 = []byte("v1")

const (
	kVersion     = "version"
	kLabels      = "labels"
	kImages      = "images"
	kContainers  = "containers"
	kSnapshots   = "snapshots"
	kContent     = "content"
	kBlob        = "blob"
	kIngests     = "ingests"
	kLeases      = "leases"
	kSandboxes   = "sandboxes"
	kCreated     = "createdat"
	kUpdated     = "updatedat"
	kAnnotations = "annotations"
	kTarget      = "target"
	kDigest      = "digest"
	kMediaType   = "mediatype"
	kSize        = "size"
	kSpec        = "spec"
	kImage       = "image"
	kSnapshotter = "snapshotter"
	kSnapshotKey = "snapshotKey"
	kSandboxID   = "sandboxid"
	kSandboxer   = "sandboxer"
	kRuntime     = "runtime"
	kOptions     = "options"
	kExtensions  = "extensions"
	kName        = "name"
	kParent      = "parent"
	kChildren    = "children"
	kRef         = "ref"
	kExpireAt    = "expireat"
	kExpected    = "expected"
)

// schemaVersion is containerd's; a newer one is accepted (contract 4.4.2).
const schemaVersion = 4

// varint is how sizes and the version are written: zig-zag.
func varint(n int64) []byte {
	return binary.AppendVarint(make([]byte, 0, binary.MaxVarintLen64), n)
}

func readVarint(b []byte) int64 {
	n, _ := binary.Varint(b)
	return n
}

// putTime writes a time as time.MarshalBinary does.
func (t *txn) putTime(b *bolt.Bucket, key string, v time.Time) error {
	enc, err := v.UTC().MarshalBinary()
	if err != nil {
		return fmt.Errorf("%s: %v: %w", key, err, errdefs.ErrInvalidArgument)
	}
	return t.put(b, key, enc)
}

// readTime reads a time; one that cannot be read is zero.
func readTime(b *bolt.Bucket, key string) time.Time {
	var v time.Time
	if enc := b.Get([]byte(key)); enc != nil {
		if err := v.UnmarshalBinary(enc); err != nil {
			return time.Time{}
		}
	}
	return v.UTC()
}

// putTimes writes both times.
func (t *txn) putTimes(b *bolt.Bucket, created, updated time.Time) error {
	if err := t.putTime(b, kCreated, created); err != nil {
		return err
	}
	return t.putTime(b, kUpdated, updated)
}

// putMap replaces the bucket name in b by m, without the empty values.
func (t *txn) putMap(b *bolt.Bucket, name string, m map[string]string) error {
	if err := t.remove(b, name); err != nil {
		return err
	}
	var s *bolt.Bucket
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if m[k] == "" {
			continue
		}
		if s == nil {
			var err error
			if s, err = t.sub(b, name); err != nil {
				return err
			}
		}
		if err := t.put(s, k, []byte(m[k])); err != nil {
			return err
		}
	}
	return nil
}

// readMap reads the bucket name in b; nil if there is none.
func readMap(b *bolt.Bucket, name string) map[string]string {
	s := b.Bucket([]byte(name))
	if s == nil {
		return nil
	}
	var m map[string]string
	s.ForEach(func(k, v []byte) error {
		if v != nil {
			if m == nil {
				m = map[string]string{}
			}
			m[string(k)] = string(v)
		}
		return nil
	})
	return m
}

// nonEmpty returns m as putMap and readMap would.
func nonEmpty(m map[string]string) map[string]string {
	m = maps.Clone(m)
	maps.DeleteFunc(m, func(_, v string) bool { return v == "" })
	if len(m) == 0 {
		return nil
	}
	return m
}

// readString reads a value, "" if there is none.
func readString(b *bolt.Bucket, key string) string { return string(b.Get([]byte(key))) }

// encodeAny marshals google.protobuf.Any: field 1 the URL, field 2 the value.
func encodeAny(a typed.Any) []byte {
	b := make([]byte, 0, len(a.URL)+len(a.Value)+12)
	if a.URL != "" {
		b = append(binary.AppendUvarint(append(b, 1<<3|2), uint64(len(a.URL))), a.URL...)
	}
	if len(a.Value) > 0 {
		b = append(binary.AppendUvarint(append(b, 2<<3|2), uint64(len(a.Value))), a.Value...)
	}
	return b
}

// decodeAny reads what encodeAny and any other encoder of the message write.
func decodeAny(b []byte) (typed.Any, error) {
	var a typed.Any
	broken := fmt.Errorf("an encoded value is damaged: %w", errdefs.ErrDataLoss)
	for len(b) > 0 {
		tag, n := binary.Uvarint(b)
		if n <= 0 {
			return a, broken
		}
		b = b[n:]
		size := uint64(0)
		switch tag & 7 {
		case 0:
			if _, n = binary.Uvarint(b); n <= 0 {
				return a, broken
			}
			b = b[n:]
			continue
		case 1:
			size = 8
		case 5:
			size = 4
		case 2:
			if size, n = binary.Uvarint(b); n <= 0 {
				return a, broken
			}
			b = b[n:]
		default:
			return a, broken
		}
		if size > uint64(len(b)) {
			return a, broken
		}
		switch tag {
		case 1<<3 | 2:
			a.URL = string(b[:size])
		case 2<<3 | 2:
			a.Value = slices.Clone(b[:size])
		}
		b = b[size:]
	}
	return a, nil
}

// putAny writes a value, or removes it if it is absent.
func (t *txn) putAny(b *bolt.Bucket, key string, a typed.Any) error {
	if a.IsZero() {
		return t.drop(b, key)
	}
	return t.put(b, key, encodeAny(a))
}

func readAny(b *bolt.Bucket, key string) (typed.Any, error) {
	return decodeAny(b.Get([]byte(key)))
}

// putAnys replaces the bucket name in b by m.
func (t *txn) putAnys(b *bolt.Bucket, name string, m map[string]typed.Any) error {
	if err := t.remove(b, name); err != nil {
		return err
	}
	if len(m) == 0 {
		return nil
	}
	s, err := t.sub(b, name)
	if err != nil {
		return err
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if err := t.put(s, k, encodeAny(m[k])); err != nil {
			return err
		}
	}
	return nil
}

func readAnys(b *bolt.Bucket, name string) (m map[string]typed.Any, err error) {
	s := b.Bucket([]byte(name))
	if s == nil {
		return nil, nil
	}
	err = s.ForEach(func(k, v []byte) error {
		a, err := decodeAny(v)
		if m == nil {
			m = map[string]typed.Any{}
		}
		m[string(k)] = a
		return err
	})
	return m, err
}

// namespaces returns the names of all namespaces, in order.
func (t *txn) namespaces() []namespace.ID {
	var out []namespace.ID
	root := t.find()
	if root == nil {
		return nil
	}
	root.ForEachBucket(func(k []byte) error {
		out = append(out, namespace.ID(k))
		return nil
	})
	return out
}

// migrate brings the schema to schemaVersion (contract 4.4.2). A file that has
// it, or a newer one, is not written to.
func (db *DB) migrate() error {
	version := int64(-1) // a new file
	if err := db.view(func(t *txn) error {
		if root := t.find(); root != nil {
			version = readVarint(root.Get([]byte(kVersion)))
		}
		return nil
	}); err != nil {
		return err
	}
	if version >= schemaVersion {
		return nil
	}
	return db.bolt.Update(func(tx *bolt.Tx) error {
		t := &txn{tx: tx}
		root, err := t.make()
		if err != nil {
			return err
		}
		if version >= 0 {
			for from, step := range []func(*txn) error{linkChildren, splitIngests, func(*txn) error { return nil }, moveSandboxes} {
				if version <= int64(from) {
					if err := step(t); err != nil {
						return fmt.Errorf("migrate the schema from version %d: %w", from, err)
					}
				}
			}
		}
		return t.put(root, kVersion, varint(schemaVersion))
	})
}

// linkChildren adds each snapshot to the children of its parent (version 1).
func linkChildren(t *txn) error {
	for _, ns := range t.namespaces() {
		all := t.find(string(ns), kSnapshots)
		if all == nil {
			continue
		}
		for _, sn := range bucketNames(all) {
			b := all.Bucket([]byte(sn))
			for _, key := range bucketNames(b) {
				parent := readString(b.Bucket([]byte(key)), kParent)
				if parent == "" {
					continue
				}
				p := b.Bucket([]byte(parent))
				if p == nil {
					continue // collection could have removed it
				}
				c, err := t.sub(p, kChildren)
				if err == nil {
					err = t.put(c, key, nil)
				}
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// splitIngests makes a bucket of each ingest, which was a key and the
// backend's ref (version 2).
func splitIngests(t *txn) error {
	for _, ns := range t.namespaces() {
		b := t.find(string(ns), kContent)
		if b == nil {
			continue
		}
		old := b.Bucket([]byte("ingest"))
		if old == nil {
			continue
		}
		refs := map[string]string{}
		old.ForEach(func(k, v []byte) error {
			refs[string(k)] = string(v)
			return nil
		})
		for _, ref := range slices.Sorted(maps.Keys(refs)) {
			n, err := t.make(string(ns), kContent, kIngests, ref)
			if err == nil {
				err = t.put(n, kRef, []byte(refs[ref]))
			}
			if err != nil {
				return err
			}
		}
		if err := t.remove(b, "ingest"); err != nil {
			return err
		}
	}
	return nil
}

// moveSandboxes takes sandboxes from buckets beside v1 into it (version 4).
func moveSandboxes(t *txn) error {
	var names []string
	t.tx.ForEach(func(k []byte, b *bolt.Bucket) error {
		if string(k) != string(keyVersion1) && b.Bucket([]byte(kSandboxes)) != nil {
			names = append(names, string(k))
		}
		return nil
	})
	for _, ns := range names {
		from := t.tx.Bucket([]byte(ns)).Bucket([]byte(kSandboxes))
		to, err := t.make(ns, kSandboxes)
		if err == nil {
			err = copyBucket(t, to, from)
		}
		if err == nil {
			err = t.tx.DeleteBucket([]byte(ns))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func copyBucket(t *txn, to, from *bolt.Bucket) error {
	return from.ForEach(func(k, v []byte) error {
		if v != nil {
			return t.put(to, string(k), slices.Clone(v))
		}
		s, err := t.sub(to, string(k))
		if err != nil {
			return err
		}
		return copyBucket(t, s, from.Bucket(k))
	})
}

// bucketNames lists the buckets in b.
func bucketNames(b *bolt.Bucket) []string {
	var out []string
	b.ForEachBucket(func(k []byte) error {
		out = append(out, string(k))
		return nil
	})
	return out
}
