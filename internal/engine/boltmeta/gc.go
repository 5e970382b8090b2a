package boltmeta

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/graph"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
)

var _ graph.Store = (*DB)(nil)

// removeTimeout bounds each deletion in a backend, listTimeout each listing
// and each Cleanup: a backend that does not answer stays due, and its deadline
// is the longest that a collection can take.
const (
	removeTimeout = 30 * time.Second
	listTimeout   = time.Minute
	// sickTime is how long a backend that did not answer is left alone.
	sickTime = 5 * time.Minute
)

// Objects implements graph.Store.
func (db *DB) Objects(_ context.Context, fn func(graph.Object) error) error {
	busy, now := db.writing(), db.now()
	return db.view(func(t *txn) error { return t.objects(busy, now, fn) })
}

// writing returns the ingests that have a writer.
func (db *DB) writing() map[ingest]bool {
	db.mu.Lock()
	defer db.mu.Unlock()
	out := make(map[ingest]bool, len(db.busy))
	for i := range db.busy {
		out[i] = true
	}
	return out
}

// gcLabels reads the labels that collection looks at.
func gcLabels(b *bolt.Bucket) map[string]string {
	s := b.Bucket([]byte(kLabels))
	if s == nil {
		return nil
	}
	var m map[string]string
	c := s.Cursor()
	for k, v := c.Seek([]byte(graph.LabelPrefix)); k != nil && strings.HasPrefix(string(k), graph.LabelPrefix); k, v = c.Next() {
		if m == nil {
			m = map[string]string{}
		}
		m[string(k)] = string(v)
	}
	return m
}

// objects calls fn for every object of every namespace.
func (t *txn) objects(busy map[ingest]bool, now time.Time, fn func(graph.Object) error) error {
	for _, ns := range t.namespaces() {
		each := func(kind graph.Kind, b *bolt.Bucket, snapshotter string, more func(*graph.Object, *bolt.Bucket) error) error {
			if b == nil {
				return nil
			}
			return b.ForEachBucket(func(k []byte) error {
				r := b.Bucket(k)
				o := graph.Object{Node: graph.Node{Kind: kind, Namespace: ns, Snapshotter: snapshotter, ID: string(k)}, Labels: gcLabels(r)}
				if more != nil {
					if err := more(&o, r); err != nil {
						return err
					}
				}
				return fn(o)
			})
		}
		holds := func(o *graph.Object, kind graph.Kind, snapshotter, id string) {
			if id != "" {
				o.Holds = append(o.Holds, graph.Node{Kind: kind, Namespace: ns, Snapshotter: snapshotter, ID: id})
			}
		}
		at := func(path ...string) *bolt.Bucket { return t.find(append([]string{string(ns)}, path...)...) }
		err := each(graph.KindLease, at(kLeases), "", func(o *graph.Object, b *bolt.Bucket) error {
			return eachResource(b, func(r lease.Resource) error {
				switch sn, ok := strings.CutPrefix(r.Type, lease.SnapshotPrefix); {
				case ok:
					holds(o, graph.KindSnapshot, sn, r.ID)
				case r.Type == lease.TypeContent:
					holds(o, graph.KindContent, "", r.ID)
				case r.Type == lease.TypeIngest:
					holds(o, graph.KindIngest, "", r.ID)
				case r.Type == lease.TypeImage:
					holds(o, graph.KindImage, "", r.ID)
				}
				return nil
			})
		})
		if err != nil {
			return err
		}
		if err := each(graph.KindImage, at(kImages), "", func(o *graph.Object, b *bolt.Bucket) error {
			if target := b.Bucket([]byte(kTarget)); target != nil {
				holds(o, graph.KindContent, "", readString(target, kDigest))
			}
			return nil
		}); err != nil {
			return err
		}
		if err := each(graph.KindContainer, at(kContainers), "", func(o *graph.Object, b *bolt.Bucket) error {
			if sn := readString(b, kSnapshotter); sn != "" {
				holds(o, graph.KindSnapshot, sn, readString(b, kSnapshotKey))
			}
			return nil
		}); err != nil {
			return err
		}
		if err := each(graph.KindSandbox, at(kSandboxes), "", nil); err != nil {
			return err
		}
		if err := each(graph.KindContent, at(kContent, kBlob), "", nil); err != nil {
			return err
		}
		if err := each(graph.KindIngest, at(kContent, kIngests), "", func(o *graph.Object, b *bolt.Bucket) error {
			// One under a lease has no time of expiry: its lease keeps it.
			o.Live = busy[ingest{ns, o.ID}] || b.Get([]byte(kExpireAt)) != nil && now.Before(readTime(b, kExpireAt))
			return nil
		}); err != nil {
			return err
		}
		all := at(kSnapshots)
		if all == nil {
			continue
		}
		for _, sn := range bucketNames(all) {
			if err := each(graph.KindSnapshot, all.Bucket([]byte(sn)), sn, func(o *graph.Object, b *bolt.Bucket) error {
				holds(o, graph.KindSnapshot, sn, readString(b, kParent))
				return nil
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// Sweep implements graph.Store. An ingest whose writer opens at this moment is
// safe: it is in busy before its writer's transaction, which is before or
// after this one as a whole.
func (db *DB) Sweep(ctx context.Context, plan func([]graph.Object) []graph.Node) (graph.Freed, error) {
	var gone []graph.Node
	err := db.update(ctx, func(t *txn) error {
		gone = nil
		var all []graph.Object
		if err := t.objects(db.writing(), db.now(), func(o graph.Object) error {
			all = append(all, o)
			return nil
		}); err != nil {
			return err
		}
		for _, n := range plan(all) {
			ok, err := t.sweep(n)
			if err != nil {
				return fmt.Errorf("collect %s: %w", n, err)
			}
			if ok {
				gone = append(gone, n)
			}
		}
		t.deleted = false // what this deleted is reclaimed next
		return nil
	})
	if err != nil {
		return graph.Freed{}, err
	}
	for _, n := range gone {
		db.swept(ctx, n)
	}
	return graph.Freed{Records: len(gone)}, nil
}

// sweep removes a record and reports whether there was one.
func (t *txn) sweep(n graph.Node) (bool, error) {
	var path []string
	switch n.Kind {
	case graph.KindContent:
		path = []string{kContent, kBlob}
	case graph.KindIngest:
		path = []string{kContent, kIngests}
	case graph.KindImage:
		path = []string{kImages}
	case graph.KindLease:
		path = []string{kLeases}
	case graph.KindSnapshot:
		path = []string{kSnapshots, n.Snapshotter}
	default:
		return false, nil
	}
	b := t.find(append([]string{string(n.Namespace)}, path...)...)
	if b == nil || b.Bucket([]byte(n.ID)) == nil {
		return false, nil
	}
	if n.Kind == graph.KindSnapshot {
		return true, t.unlink(b, n.ID)
	}
	return true, t.remove(b, n.ID)
}

// swept marks what is to be reclaimed and tells of it, as best it can
// (contract 1.2.12, 4.3.1).
func (db *DB) swept(ctx context.Context, n graph.Node) {
	var err error
	switch n.Kind {
	case graph.KindContent:
		db.due("")
		err = db.publish(ctx, n.Namespace, event.TopicContentDelete, event.ContentDelete{Digest: n.ID})
	case graph.KindIngest:
		db.due("")
	case graph.KindImage:
		err = db.publish(ctx, n.Namespace, event.TopicImageDelete, event.ImageDelete{Name: n.ID})
	case graph.KindSnapshot:
		db.due(n.Snapshotter)
		err = db.publish(ctx, n.Namespace, event.TopicSnapshotRemove, event.SnapshotRemove{Key: n.ID, Snapshotter: n.Snapshotter})
	}
	if err != nil {
		db.o.Logger.Warn("an event of collection is lost", "object", n.String(), "error", err)
	}
}

// Reclaim implements graph.Store. The backends are worked on side by side: one
// that does not answer delays nobody but those who wait for this Reclaim.
func (db *DB) Reclaim(ctx context.Context) (graph.Freed, error) {
	db.mu.Lock()
	var dirty []string
	for name := range db.soil {
		if name == "" && db.o.Content == nil || name != "" && db.o.Snapshotters[name] == nil {
			continue // not loaded this time
		}
		if db.now().Before(db.sick[name]) {
			continue // it would only keep the others waiting
		}
		dirty = append(dirty, name)
		delete(db.soil, name)
	}
	db.mu.Unlock()
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex // guards freed and errs
		freed graph.Freed
		errs  []error
	)
	for _, name := range dirty {
		wg.Go(func() {
			var f graph.Freed
			var err error
			if name == "" {
				if f, err = db.reclaimContent(ctx); err != nil {
					err = fmt.Errorf("reclaim content: %w", err)
				}
			} else if f, err = db.reclaimSnapshots(ctx, name); err != nil {
				err = fmt.Errorf("reclaim snapshots of %s: %w", name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			freed.Blobs += f.Blobs
			freed.Bytes += f.Bytes
			freed.Ingests += f.Ingests
			freed.Snapshots += f.Snapshots
			if err != nil {
				errs = append(errs, err)
				db.due(name)
				if errors.Is(err, context.DeadlineExceeded) {
					db.mu.Lock()
					db.sick[name] = db.now().Add(sickTime)
					db.mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return freed, errors.Join(errs...)
}

// named are the names in the backends that records know.
type named struct {
	blobs   map[string]bool // and those that ingests expect
	ingests map[string]bool
	keys    map[string]map[string]bool // of each snapshotter
}

// named reads all of them.
func (t *txn) named() named {
	n := named{map[string]bool{}, map[string]bool{}, map[string]map[string]bool{}}
	for _, ns := range t.namespaces() {
		if b := t.find(string(ns), kContent, kBlob); b != nil {
			for _, d := range bucketNames(b) {
				n.blobs[d] = true
			}
		}
		if b := t.find(string(ns), kContent, kIngests); b != nil {
			for _, ref := range bucketNames(b) {
				i := b.Bucket([]byte(ref))
				n.ingests[readString(i, kRef)] = true
				if e := readString(i, kExpected); e != "" {
					n.blobs[e] = true
				}
			}
		}
		all := t.find(string(ns), kSnapshots)
		if all == nil {
			continue
		}
		for _, sn := range bucketNames(all) {
			if n.keys[sn] == nil {
				n.keys[sn] = map[string]bool{}
			}
			b := all.Bucket([]byte(sn))
			for _, key := range bucketNames(b) {
				n.keys[sn][readString(b.Bucket([]byte(key)), kName)] = true
			}
		}
	}
	return n
}

// names reads what records name now.
func (db *DB) names() (n named, err error) {
	err = db.view(func(t *txn) error {
		n = t.named()
		return nil
	})
	return n, err
}

// blobNamed reports whether a blob is named in any namespace.
func (t *txn) blobNamed(dgst string) bool {
	for _, ns := range t.namespaces() {
		if t.find(string(ns), kContent, kBlob, dgst) != nil {
			return true
		}
		if b := t.find(string(ns), kContent, kIngests); b != nil {
			for _, ref := range bucketNames(b) {
				if readString(b.Bucket([]byte(ref)), kExpected) == dgst {
					return true
				}
			}
		}
	}
	return false
}

// reclaimContent deletes blobs and ingests that no record names.
func (db *DB) reclaimContent(ctx context.Context) (freed graph.Freed, err error) {
	back := db.o.Content
	list, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	var blobs []content.Info
	if err := back.Walk(list, func(i content.Info) error {
		blobs = append(blobs, i)
		return nil
	}); err != nil {
		return freed, err
	}
	ingests, err := back.Statuses(list)
	if err != nil {
		return freed, err
	}
	known, err := db.names()
	if err != nil {
		return freed, err
	}
	var errs []error
	for _, i := range blobs {
		if known.blobs[i.Digest.String()] {
			continue
		}
		ok, err := db.reclaimBlob(ctx, i.Digest)
		if err != nil {
			errs = append(errs, err)
		} else if ok {
			freed.Blobs++
			freed.Bytes += i.Size
		}
	}
	for _, st := range ingests {
		// The record of an ingest is made before the backend hears of it, and
		// no two have the same ref there: unknown now is unknown for ever.
		if known.ingests[st.Ref] {
			continue
		}
		one, cancel := context.WithTimeout(ctx, removeTimeout)
		err := back.Abort(one, st.Ref)
		cancel()
		switch {
		case err == nil:
			freed.Ingests++
		case errdefs.IsUnavailable(err):
			db.due("") // its writer is about to notice
		case !errdefs.IsNotFound(err):
			errs = append(errs, fmt.Errorf("ingest %q: %w", st.Ref, err))
		}
	}
	return freed, errors.Join(errs...)
}

// reclaimBlob deletes a blob unless somebody names it or is about to.
func (db *DB) reclaimBlob(ctx context.Context, dgst digest.Digest) (bool, error) {
	if db.blobs.held()[""] {
		db.due("") // a commit is under way whose digest nobody knows yet
		return false, nil
	}
	done, ok := db.blobs.claim(dgst.String())
	if !ok {
		db.due("")
		return false, nil
	}
	defer done()
	var keep bool
	if err := db.view(func(t *txn) error {
		keep = t.blobNamed(dgst.String())
		return nil
	}); err != nil || keep {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	if err := db.o.Content.Delete(ctx, dgst); err != nil && !errdefs.IsNotFound(err) {
		return false, fmt.Errorf("content %s: %w", dgst, err)
	}
	return true, nil
}

// reclaimSnapshots removes a snapshotter's snapshots that no record names,
// children before parents, then lets it clean up.
func (db *DB) reclaimSnapshots(ctx context.Context, name string) (freed graph.Freed, err error) {
	back := db.o.Snapshotters[name]
	list, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	infos := map[string]snapshot.Info{}
	if err := back.Walk(list, func(i snapshot.Info) error {
		infos[i.Name] = i
		return nil
	}); err != nil {
		return freed, err
	}
	if err := db.recoverCommits(ctx, name, infos); err != nil {
		return freed, err
	}
	db.mu.Lock()
	for key := range db.adopted { // what was adopted until here is in the records
		if strings.HasPrefix(key, name+"/") {
			delete(db.adopted, key)
		}
	}
	db.mu.Unlock()
	known, err := db.names()
	if err != nil {
		return freed, err
	}
	children := map[string]int{}
	for _, i := range infos {
		if i.Parent != "" {
			children[i.Parent]++
		}
	}
	// Leaves first; a parent's turn comes when its last child is gone.
	var ready []string
	for key := range infos {
		if children[key] == 0 {
			ready = append(ready, key)
		}
	}
	slices.Sort(ready)
	var errs []error
	for len(ready) > 0 {
		key := ready[0]
		ready = ready[1:]
		if known.keys[name][key] {
			continue
		}
		if _, _, _, ours := splitBackend(key); !ours {
			continue // somebody else uses this snapshotter too
		}
		ok, err := db.reclaimSnapshot(ctx, name, back, key)
		if err != nil {
			errs = append(errs, err)
			if errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
				return freed, errors.Join(errs...) // it would be the same with the others
			}
			continue
		}
		if !ok {
			continue
		}
		freed.Snapshots++
		if p := infos[key].Parent; p != "" {
			if children[p]--; children[p] == 0 {
				ready = append(ready, p)
			}
		}
	}
	if c, ok := back.(snapshot.Cleaner); ok {
		clean, cancel := context.WithTimeout(ctx, listTimeout)
		defer cancel()
		if err := c.Cleanup(clean); err != nil && !errdefs.IsNotImplemented(err) {
			errs = append(errs, fmt.Errorf("cleanup: %w", err))
		}
	}
	return freed, errors.Join(errs...)
}

// reclaimSnapshot removes a backend snapshot unless somebody names it or is
// about to.
func (db *DB) reclaimSnapshot(ctx context.Context, name string, back snapshot.Store, key string) (bool, error) {
	done, ok := db.keys[name].claim(key)
	if !ok {
		db.due(name)
		return false, nil
	}
	defer done()
	// The records were read before. Since then one can have begun to name the
	// key that was made for it, or adopted it; both pin the key until they have.
	db.mu.Lock()
	keep := db.adopted[name+"/"+key]
	db.mu.Unlock()
	if err := db.view(func(t *txn) error {
		keep = keep || t.owns(name, key)
		return nil
	}); err != nil || keep {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	switch err := back.Remove(ctx, key); {
	case err == nil, errdefs.IsNotFound(err):
		return true, nil
	case errdefs.IsFailedPrecondition(err): // it has got a child since
		db.due(name)
		return false, nil
	default:
		return false, fmt.Errorf("snapshot %s: %w", key, err)
	}
}

// recoverCommits finishes what a crash interrupted between the two halves of
// Commit: the backend has a committed snapshot that no record names, and a
// record names an active one that is no longer there. The client was not answered; its record is removed, and the data,
// which has no name, is reclaimed with the rest. Nothing else that is missing
// from a backend loses its record: a snapshotter that answers with nothing
// may only be starting.
func (db *DB) recoverCommits(ctx context.Context, name string, infos map[string]snapshot.Info) error {
	db.mu.Lock()
	first := db.first[name]
	db.mu.Unlock()
	if !first {
		return nil
	}
	// The number itself tells nothing: another commit may have written a higher one.
	named := map[string]bool{}
	if err := db.view(func(t *txn) error {
		for key := range infos {
			if ns, _, _, ok := splitBackend(key); ok && !named["\x00"+string(ns)] {
				named["\x00"+string(ns)] = true
				if all := t.find(string(ns), kSnapshots, name); all != nil {
					for _, k := range bucketNames(all) {
						named[readString(all.Bucket([]byte(k)), kName)] = true
					}
				}
			}
		}
		return nil
	}); err != nil {
		return err
	}
	interrupted := map[namespace.ID]bool{}
	for key, i := range infos {
		if ns, _, _, ok := splitBackend(key); ok && i.Kind == snapshot.KindCommitted && !named[key] {
			interrupted[ns] = true
		}
	}
	held := db.keys[name].held()
	for ns := range interrupted {
		err := db.update(ctx, func(t *txn) error {
			all := t.find(string(ns), kSnapshots, name)
			if all == nil {
				return nil
			}
			for _, key := range bucketNames(all) {
				b := all.Bucket([]byte(key))
				backKey := readString(b, kName)
				_, seq, _, ok := splitBackend(backKey)
				if _, there := infos[backKey]; there || !ok || held[backKey] || hasChildren(b) || seq > db.seqs.saved[seqKey{ns, name}] {
					continue
				}
				db.o.Logger.Warn("a commit was interrupted: its snapshot is removed", "namespace", ns, "snapshotter", name, "key", key)
				if err := t.unlink(all, key); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	db.mu.Lock()
	delete(db.first, name)
	db.mu.Unlock()
	return nil
}
