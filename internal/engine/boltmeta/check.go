package boltmeta

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/snapshot"
)

// Problem is one thing that is wrong in the store.
type Problem struct {
	// Object is where, as "<kind> <namespace>/<name>".
	Object string `json:"object"`
	// Message is what.
	Message string `json:"message"`
}

func (p Problem) String() string { return p.Object + ": " + p.Message }

// Check compares the metadata with itself and with the backends, and returns
// what is wrong. Leftovers in a backend are not: they are reclaimed. While
// the store is in use, objects that come and go may be reported; a quiet store
// gives an exact answer.
func (db *DB) Check(ctx context.Context) []Problem {
	c := checker{db: db}
	c.backends(ctx)
	if err := db.view(func(t *txn) error {
		for _, ns := range t.namespaces() {
			c.namespace(string(ns), t.find(string(ns)))
		}
		return nil
	}); err != nil {
		c.add("metadata", "%v", err)
	}
	return c.found
}

type checker struct {
	db     *DB
	blobs  map[digest.Digest]content.Info // nil: there is no backend, or it did not answer
	snaps  map[string]map[string]snapshot.Info
	owners map[string]string // backend keys, by snapshotter and key, and who names them
	found  []Problem
}

func (c *checker) add(object, format string, args ...any) {
	c.found = append(c.found, Problem{object, fmt.Sprintf(format, args...)})
}

// backends asks them for all they have.
func (c *checker) backends(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	if back := c.db.o.Content; back != nil {
		blobs := map[digest.Digest]content.Info{}
		if err := back.Walk(ctx, func(i content.Info) error {
			blobs[i.Digest] = i
			return nil
		}); err != nil {
			c.add("content", "cannot be listed: %v", err)
		} else {
			c.blobs = blobs
		}
	}
	c.snaps, c.owners = map[string]map[string]snapshot.Info{}, map[string]string{}
	for name, back := range c.db.o.Snapshotters {
		snaps := map[string]snapshot.Info{}
		if err := back.Walk(ctx, func(i snapshot.Info) error {
			snaps[i.Name] = i
			return nil
		}); err != nil {
			c.add("snapshotter "+name, "cannot be listed: %v", err)
		} else {
			c.snaps[name] = snaps
		}
	}
}

func (c *checker) namespace(ns string, b *bolt.Bucket) {
	each := func(kind string, fn func(object, name string, b *bolt.Bucket), path ...string) {
		p := b
		for _, s := range path {
			if p = p.Bucket([]byte(s)); p == nil {
				return
			}
		}
		for _, name := range bucketNames(p) {
			fn(kind+" "+ns+"/"+name, name, p.Bucket([]byte(name)))
		}
	}
	times := func(object string, b *bolt.Bucket, keys ...string) {
		for _, k := range keys {
			if readTime(b, k).IsZero() {
				c.add(object, "%s is missing or damaged", k)
			}
		}
	}
	each("image", func(object, name string, b *bolt.Bucket) {
		i, err := readImage(name, b)
		if err == nil {
			err = i.Check()
		}
		if err != nil {
			c.add(object, "%v", err)
		}
		times(object, b, kCreated, kUpdated)
	}, kImages)
	each("container", func(object, name string, b *bolt.Bucket) {
		if _, err := readContainer(name, b); err != nil {
			c.add(object, "%v", err)
		}
		times(object, b, kCreated, kUpdated)
	}, kContainers)
	each("sandbox", func(object, name string, b *bolt.Bucket) {
		if _, err := readSandbox(name, b); err != nil {
			c.add(object, "%v", err)
		}
	}, kSandboxes)
	each("content", func(object, name string, b *bolt.Bucket) {
		i, err := readBlob(name, b)
		if err == nil {
			err = i.Digest.Validate()
		}
		if err != nil {
			c.add(object, "%v", err)
		}
		times(object, b, kCreated, kUpdated)
		if c.blobs == nil {
			return
		}
		if back, ok := c.blobs[i.Digest]; !ok {
			c.add(object, "the blob is missing")
		} else if back.Size != i.Size {
			c.add(object, "the record says %d bytes, the blob has %d", i.Size, back.Size)
		}
	}, kContent, kBlob)
	each("ingest", func(object, name string, b *bolt.Bucket) {
		e, err := readEntry(name, b)
		if err == nil && e.backend == "" {
			c.add(object, "it has no ref in the content store")
		}
		if _, ok := c.blobs[e.expected]; e.expected != "" && c.blobs != nil && !ok {
			c.add(object, "the blob %s that it waits for is missing", e.expected)
		}
	}, kContent, kIngests)
	each("lease", func(object, _ string, b *bolt.Bucket) {
		times(object, b, kCreated)
		if err := eachResource(b, func(r lease.Resource) error {
			if err := r.Check(); err != nil && !errdefs.IsNotImplemented(err) {
				c.add(object, "%v", err)
			}
			return nil
		}); err != nil {
			c.add(object, "%v", err)
		}
	}, kLeases)
	if all := b.Bucket([]byte(kSnapshots)); all != nil {
		for _, sn := range bucketNames(all) {
			each("snapshot", func(object, name string, r *bolt.Bucket) {
				times(object, r, kCreated, kUpdated)
				c.snapshot(sn, object, name, r, all.Bucket([]byte(sn)))
			}, kSnapshots, sn)
		}
	}
}

func (c *checker) snapshot(sn, object, name string, b, all *bolt.Bucket) {
	object = strings.Replace(object, "/", "/"+sn+"/", 1)
	n, err := readNode(name, b)
	if err != nil {
		c.add(object, "%v", err)
	}
	if other := c.owners[sn+"/"+n.backend]; other != "" {
		c.add(object, "%s has the same data %s", other, n.backend)
	}
	c.owners[sn+"/"+n.backend] = object
	parentKey := ""
	if n.info.Parent != "" {
		p := all.Bucket([]byte(n.info.Parent))
		if p == nil {
			c.add(object, "its parent %q is missing", n.info.Parent)
			return
		}
		parentKey = readString(p, kName)
		if ch := p.Bucket([]byte(kChildren)); ch == nil || ch.Get([]byte(name)) == nil {
			c.add(object, "its parent %q does not list it as a child", n.info.Parent)
		}
	}
	if ch := b.Bucket([]byte(kChildren)); ch != nil {
		if err := ch.ForEach(func(k, _ []byte) error {
			if r := all.Bucket(k); r == nil || readString(r, kParent) != name {
				c.add(object, "%q is listed as a child and is none", k)
			}
			return nil
		}); err != nil {
			c.add(object, "%v", err)
		}
	}
	snaps := c.snaps[sn]
	if snaps == nil {
		return
	}
	if i, ok := snaps[n.backend]; !ok {
		c.add(object, "its data %s is missing in the snapshotter", n.backend)
	} else if i.Parent != parentKey {
		c.add(object, "its data is on top of %q, not of its parent's %q", i.Parent, parentKey)
	}
}
