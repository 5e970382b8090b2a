package boltmeta

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/ident"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/internal/lib/fields"
	"github.com/gantryd/gantry/internal/lib/filter"
)

// snapshots is a namespace's part of a snapshotter. Its keys are the
// backend's behind "<ns>/<seq>/" (contract 3.1.3). Names, parents and labels
// are the record's; kind, mounts and usage are the backend's.
type snapshots struct {
	*records
	name string
	back snapshot.Store
	pins *pins
}

var _ snapshot.Cleaner = (*snapshots)(nil)

// node is the record of a snapshot.
type node struct {
	key     string
	backend string
	info    snapshot.Info // without Kind
}

func readNode(key string, b *bolt.Bucket) (node, error) {
	return node{key, readString(b, kName), snapshot.Info{
		Name: key, Parent: readString(b, kParent), Labels: readMap(b, kLabels),
		CreatedAt: readTime(b, kCreated), UpdatedAt: readTime(b, kUpdated),
	}}, nil
}

// over returns what the backend says, overlaid by the record.
func (n node) over(b snapshot.Info) snapshot.Info {
	i := n.info
	i.Kind = b.Kind
	if len(b.Labels) > 0 { // a snapshotter may add labels of its own
		i.Labels = maps.Clone(b.Labels)
		maps.Copy(i.Labels, n.info.Labels)
	}
	return i
}

// inherited are the labels that reach the backend (contract 1.5.16).
func inherited(labels map[string]string) map[string]string {
	var out map[string]string
	for k, v := range labels {
		if v != "" && (k == snapshot.LabelRef || strings.HasPrefix(k, snapshot.LabelPrefix)) {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}

func (s *snapshots) bucket(t *txn, path ...string) *bolt.Bucket {
	return s.find(t, append([]string{kSnapshots, s.name}, path...)...)
}

// record finds a snapshot's record.
func (s *snapshots) record(key string) (n node, err error) {
	err = s.db.view(func(t *txn) error {
		n, err = s.read(t, key)
		return err
	})
	return n, err
}

func (s *snapshots) read(t *txn, key string) (node, error) {
	b := s.bucket(t, key)
	if b == nil {
		return node{}, notFound("snapshot", key)
	}
	return readNode(key, b)
}

func (s *snapshots) Stat(ctx context.Context, key string) (snapshot.Info, error) {
	n, err := s.record(key)
	if err != nil {
		return snapshot.Info{}, err
	}
	return s.stat(ctx, n)
}

func (s *snapshots) stat(ctx context.Context, n node) (snapshot.Info, error) {
	i, err := s.back.Stat(ctx, n.backend)
	if err != nil {
		return snapshot.Info{}, fmt.Errorf("snapshot %q: %w", n.key, err)
	}
	return n.over(i), nil
}

func (s *snapshots) Usage(ctx context.Context, key string) (snapshot.Usage, error) {
	n, err := s.record(key)
	if err != nil {
		return snapshot.Usage{}, err
	}
	return s.back.Usage(ctx, n.backend)
}

func (s *snapshots) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	n, err := s.record(key)
	if err != nil {
		return nil, err
	}
	return s.back.Mounts(ctx, n.backend)
}

// Update changes the backend first: what reaches it is a part of what the
// record will say.
func (s *snapshots) Update(ctx context.Context, in snapshot.Info, paths ...string) (snapshot.Info, error) {
	n, err := s.record(in.Name)
	if err != nil {
		return snapshot.Info{}, err
	}
	change := func(n node) (map[string]string, error) {
		labels, err := fields.Labels(n.info.Labels, in.Labels, paths)
		if err == nil {
			err = ident.CheckLabels(labels)
		}
		if err != nil {
			return nil, fmt.Errorf("update snapshot %q: %w", in.Name, err)
		}
		return nonEmpty(labels), nil
	}
	labels, err := change(n)
	if err != nil {
		return snapshot.Info{}, err
	}
	if !maps.Equal(inherited(labels), inherited(n.info.Labels)) {
		if _, err := s.back.Update(ctx, snapshot.Info{Name: n.backend, Labels: inherited(labels)}, "labels"); err != nil {
			return snapshot.Info{}, fmt.Errorf("update snapshot %q: %w", in.Name, err)
		}
	}
	err = s.db.update(ctx, func(t *txn) error {
		cur, err := s.read(t, in.Name)
		if err != nil {
			return err
		}
		labels, err := change(cur)
		if err != nil {
			return err
		}
		t.deleted = !maps.Equal(labels, cur.info.Labels)
		cur.info.Labels, cur.info.UpdatedAt = labels, s.db.after(cur.info.UpdatedAt)
		n = cur
		b := s.bucket(t, in.Name)
		if err := t.putTime(b, kUpdated, cur.info.UpdatedAt); err != nil {
			return err
		}
		return t.putMap(b, kLabels, labels)
	})
	if err != nil {
		return snapshot.Info{}, err
	}
	return s.stat(ctx, n)
}

func (s *snapshots) Prepare(ctx context.Context, key, parent string, labels map[string]string) (m []mount.Mount, err error) {
	err = again(func() error {
		m, err = s.create(ctx, key, parent, labels, s.back.Prepare, true)
		return err
	})
	return m, err
}

func (s *snapshots) View(ctx context.Context, key, parent string, labels map[string]string) (m []mount.Mount, err error) {
	err = again(func() error {
		m, err = s.create(ctx, key, parent, labels, s.back.View, false)
		return err
	})
	return m, err
}

// create makes a snapshot in the backend, then its record. If there is no
// record in the end, the backend's is removed, now or by collection.
func (s *snapshots) create(ctx context.Context, key, parent string, labels map[string]string,
	do func(context.Context, string, string, map[string]string) ([]mount.Mount, error), active bool,
) ([]mount.Mount, error) {
	if key == "" {
		return nil, fmt.Errorf("snapshot key must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := ident.CheckLabels(labels); err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", key, err)
	}
	labels = nonEmpty(labels)
	target := labels[snapshot.LabelRef]
	if !active {
		target = ""
	}
	var backParent string
	var there string // the name that exists already
	err := s.db.view(func(t *txn) error {
		if err := s.leaseExists(t); err != nil {
			return err
		}
		if s.bucket(t, key) != nil {
			there = key
			return nil
		}
		if target != "" {
			if b := s.bucket(t, target); b != nil && readString(b, kParent) == parent {
				there = target
				return nil
			}
		}
		if parent == "" {
			return nil
		}
		p, err := s.read(t, parent)
		if err != nil {
			return fmt.Errorf("parent of %q: %w", key, err)
		}
		backParent = p.backend
		return nil
	})
	if err != nil {
		return nil, err
	}
	if there != "" {
		return nil, s.holdExisting(ctx, there)
	}

	mounts, backKey, release, err := s.inBackend(ctx, key, func(backKey string) ([]mount.Mount, error) {
		mounts, err := do(ctx, backKey, backParent, inherited(labels))
		if errdefs.IsAlreadyExists(err) && target != "" {
			if found, err := s.adopt(ctx, target, parent, backParent, labels); err != nil || found {
				return nil, stop{firstOf(err, exists("target snapshot", target))}
			}
		}
		return mounts, err
	})
	if err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", key, err)
	}
	defer release()

	n := node{key: key, backend: backKey, info: snapshot.Info{Name: key, Parent: parent, Labels: labels}}
	n.info.CreatedAt = s.db.now()
	n.info.UpdatedAt = n.info.CreatedAt
	var taken bool
	err = s.db.update(ctx, func(t *txn) error {
		taken = false
		if err := s.leaseExists(t); err != nil {
			return err
		}
		if s.bucket(t, key) != nil {
			taken = true
			return s.hold(t, kSnapshots, s.name, key)
		}
		if err := s.parentIs(t, parent, backParent); err != nil {
			return fmt.Errorf("parent of %q: %w", key, err)
		}
		return s.write(t, n)
	})
	if err == nil && taken {
		err = exists("snapshot", key)
	}
	if err != nil {
		s.discard(ctx, backKey)
		return nil, err
	}
	if active {
		err = s.db.publish(ctx, s.ns, event.TopicSnapshotPrepare, event.SnapshotPrepare{Key: key, Parent: parent, Snapshotter: s.name})
	}
	return mounts, err
}

// stop is an error that ends the search for a free key in the backend.
type stop struct{ error }

func (s stop) Unwrap() error { return s.error }

func firstOf(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// inBackend calls do with a new backend key for key, which stays pinned until
// release. A key that a crash left in the backend is passed over.
func (s *snapshots) inBackend(ctx context.Context, key string, do func(backKey string) ([]mount.Mount, error)) (mounts []mount.Mount, backKey string, release func(), err error) {
	for range 8 {
		backKey = fmt.Sprintf("%s/%d/%s", s.ns, s.db.seqs.take(seqKey{s.ns, s.name}), key)
		if release, err = s.pins.hold(ctx, backKey); err != nil {
			return nil, "", nil, err
		}
		if mounts, err = do(backKey); err == nil {
			return mounts, backKey, release, nil
		}
		release()
		if _, last := err.(stop); last || !errdefs.IsAlreadyExists(err) {
			return nil, "", nil, err
		}
		s.db.due(s.name)
	}
	return nil, "", nil, err
}

// errGone says that a snapshot which existed was removed before the lease had it.
var errGone = fmt.Errorf("the snapshot keeps coming and going: %w", errdefs.ErrAborted)

// again does what was overtaken by a removal once more.
func again(do func() error) error {
	err := errGone
	for n := 0; n < 8 && err == errGone; n++ {
		err = do()
	}
	return err
}

// holdExisting is the answer for a snapshot that exists: AlreadyExists, after
// the lease has been added (contract 1.2.4).
func (s *snapshots) holdExisting(ctx context.Context, key string) error {
	if s.lease != "" {
		var gone bool
		err := s.db.update(ctx, func(t *txn) error {
			if gone = s.bucket(t, key) == nil; gone {
				return nil
			}
			return s.hold(t, kSnapshots, s.name, key)
		})
		if err != nil {
			return err
		}
		if gone {
			return errGone
		}
	}
	return exists("snapshot", key)
}

// adopt looks for a committed snapshot that the backend has made for target by
// itself, and records it (contract 3.1.4).
func (s *snapshots) adopt(ctx context.Context, target, parent, backParent string, labels map[string]string) (bool, error) {
	var found string
	err := s.back.Walk(ctx, func(i snapshot.Info) error {
		if i.Kind == snapshot.KindCommitted && i.Parent == backParent && i.Labels[snapshot.LabelRef] == target {
			found = i.Name
		}
		return nil
	}, fmt.Sprintf("labels.%q==%q", snapshot.LabelRef, target))
	if err != nil || found == "" {
		return false, err
	}
	release, err := s.pins.hold(ctx, found)
	if err != nil {
		return false, err
	}
	defer release()
	if _, err := s.back.Stat(ctx, found); err != nil {
		if errdefs.IsNotFound(err) {
			return false, nil // reclaimed while we looked
		}
		return false, err
	}
	n := node{key: target, backend: found, info: snapshot.Info{Name: target, Parent: parent, Labels: labels}}
	n.info.CreatedAt = s.db.now()
	n.info.UpdatedAt = n.info.CreatedAt
	err = s.db.update(ctx, func(t *txn) error {
		if err := s.leaseExists(t); err != nil {
			return err
		}
		if s.bucket(t, target) != nil {
			return s.hold(t, kSnapshots, s.name, target)
		}
		if owner := t.owner(s.name, found); owner != "" {
			return fmt.Errorf("target snapshot %q is %s's in the backend: %w", target, owner, errdefs.ErrFailedPrecondition)
		}
		if err := s.parentIs(t, parent, backParent); err != nil {
			return fmt.Errorf("parent of %q: %w", target, err)
		}
		return s.write(t, n)
	})
	if err == nil {
		// While it is still pinned: see reclaimSnapshot.
		s.db.mu.Lock()
		s.db.adopted[s.name+"/"+found] = true
		s.db.mu.Unlock()
	}
	return true, err
}

// owns reports whether the record that a backend key was made for names it.
func (t *txn) owns(snapshotter, backend string) bool {
	ns, _, key, ok := splitBackend(backend)
	if !ok {
		return false
	}
	b := t.find(string(ns), kSnapshots, snapshotter, key)
	return b != nil && readString(b, kName) == backend
}

// owner returns the namespace and key of the record that names a backend key,
// whatever it was made for, or "".
func (t *txn) owner(snapshotter, backend string) string {
	for _, ns := range t.namespaces() {
		b := t.find(string(ns), kSnapshots, snapshotter)
		if b == nil {
			continue
		}
		for _, key := range bucketNames(b) {
			if readString(b.Bucket([]byte(key)), kName) == backend {
				return fmt.Sprintf("%s/%s", ns, key)
			}
		}
	}
	return ""
}

// parentIs returns ErrNotFound unless the parent is still the one that the
// backend was told of.
func (s *snapshots) parentIs(t *txn, parent, backend string) error {
	if parent == "" {
		return nil
	}
	p, err := s.read(t, parent)
	if err == nil && p.backend != backend {
		err = fmt.Errorf("snapshot %q was replaced at this moment: %w", parent, errdefs.ErrNotFound)
	}
	return err
}

// write makes a record, links it to its parent and holds it.
func (s *snapshots) write(t *txn, n node) error {
	all, err := s.make(t, kSnapshots, s.name)
	if err != nil {
		return err
	}
	if _, seq, _, ok := splitBackend(n.backend); ok && seq > all.Sequence() && seq <= s.db.seqs.current(seqKey{s.ns, s.name}) {
		if err := all.SetSequence(seq); err != nil {
			return err
		}
	}
	b, err := t.sub(all, n.key)
	if err != nil {
		return err
	}
	if err := t.put(b, kName, []byte(n.backend)); err != nil {
		return err
	}
	if err := t.putTimes(b, n.info.CreatedAt, n.info.UpdatedAt); err != nil {
		return err
	}
	if err := t.putMap(b, kLabels, n.info.Labels); err != nil {
		return err
	}
	if n.info.Parent != "" {
		if err := t.put(b, kParent, []byte(n.info.Parent)); err != nil {
			return err
		}
		c, err := t.sub(all.Bucket([]byte(n.info.Parent)), kChildren)
		if err != nil {
			return err
		}
		if err := t.put(c, n.key, nil); err != nil {
			return err
		}
	}
	return s.hold(t, kSnapshots, s.name, n.key)
}

// unlink removes a record, and its name from its parent's children.
func (t *txn) unlink(all *bolt.Bucket, key string) error {
	b := all.Bucket([]byte(key))
	if b == nil {
		return nil
	}
	if parent := readString(b, kParent); parent != "" {
		if p := all.Bucket([]byte(parent)); p != nil {
			if c := p.Bucket([]byte(kChildren)); c != nil {
				if err := t.drop(c, key); err != nil {
					return err
				}
			}
		}
	}
	t.deleted = true
	return t.remove(all, key)
}

func hasChildren(b *bolt.Bucket) bool {
	c := b.Bucket([]byte(kChildren))
	if c == nil {
		return false
	}
	k, _ := c.Cursor().First()
	return k != nil
}

// discard removes a backend snapshot that got no record.
func (s *snapshots) discard(ctx context.Context, backKey string) {
	if err := s.back.Remove(context.WithoutCancel(ctx), backKey); err != nil && !errdefs.IsNotFound(err) {
		s.db.o.Logger.Warn("a snapshot without a record stays until it is collected", "snapshotter", s.name, "key", backKey, "error", err)
		s.db.due(s.name)
	}
}

// Commit commits in the backend, where the data becomes durable, then replaces
// the record. A crash in between leaves a record without data and data without
// a record; see recoverCommits.
func (s *snapshots) Commit(ctx context.Context, name, key string, opts snapshot.CommitOptions) error {
	return again(func() error { return s.commit(ctx, name, key, opts) })
}

// commit is Commit, once.
func (s *snapshots) commit(ctx context.Context, name, key string, opts snapshot.CommitOptions) error {
	if name == "" || key == "" {
		return fmt.Errorf("snapshot name and key must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := ident.CheckLabels(opts.Labels); err != nil {
		return fmt.Errorf("snapshot %q: %w", name, err)
	}
	labels := nonEmpty(opts.Labels)
	var from, to node // to is the parent that opts name
	var there bool
	err := s.db.view(func(t *txn) (err error) {
		if err := s.leaseExists(t); err != nil {
			return err
		}
		if from, err = s.read(t, key); err != nil {
			return err
		}
		if there = s.bucket(t, name) != nil; there {
			return nil
		}
		if opts.Parent == "" {
			return nil
		}
		if from.info.Parent != "" && from.info.Parent != opts.Parent {
			return fmt.Errorf("commit snapshot %q: it is on top of %q, not %q: %w", key, from.info.Parent, opts.Parent, errdefs.ErrInvalidArgument)
		}
		if to, err = s.read(t, opts.Parent); err != nil {
			return fmt.Errorf("parent of %q: %w", name, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if there {
		return s.holdExisting(ctx, name)
	}
	if opts.Parent == from.info.Parent {
		to = node{} // nothing to rebase
	}
	_, backName, release, err := s.inBackend(ctx, name, func(backName string) ([]mount.Mount, error) {
		return nil, s.back.Commit(ctx, backName, from.backend, snapshot.CommitOptions{Labels: inherited(labels), Parent: to.backend})
	})
	if err != nil {
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	defer release()

	n := node{key: name, backend: backName, info: snapshot.Info{Name: name, Parent: from.info.Parent, Labels: labels}}
	if to.key != "" {
		n.info.Parent = to.key
	}
	n.info.CreatedAt = s.db.now()
	n.info.UpdatedAt = n.info.CreatedAt
	// The backend has committed: this must not be given up because the caller
	// does not wait any more.
	ctx = context.WithoutCancel(ctx)
	err = s.db.update(ctx, func(t *txn) error {
		there = false
		if err := s.leaseExists(t); err != nil {
			return err
		}
		cur, err := s.read(t, key)
		if err != nil {
			return err
		}
		if cur.backend != from.backend {
			return notFound("snapshot", key)
		}
		if to.key != "" {
			if err := s.parentIs(t, to.key, to.backend); err != nil {
				return fmt.Errorf("parent of %q: %w", name, err)
			}
		}
		if err := t.unlink(s.bucket(t), key); err != nil {
			return err
		}
		if err := s.release(t, kSnapshots, s.name, key); err != nil {
			return err
		}
		if there = s.bucket(t, name) != nil; there {
			return s.hold(t, kSnapshots, s.name, name)
		}
		return s.write(t, n)
	})
	if err == nil && there {
		err = exists("snapshot", name)
	}
	if err != nil {
		s.discard(ctx, backName)
		s.forget(ctx, from)
		return err
	}
	return s.db.publish(ctx, s.ns, event.TopicSnapshotCommit, event.SnapshotCommit{Key: key, Name: name, Snapshotter: s.name})
}

// forget removes the record of a snapshot that its backend no longer has.
func (s *snapshots) forget(ctx context.Context, n node) {
	err := s.db.update(ctx, func(t *txn) error {
		if b := s.bucket(t, n.key); b == nil || readString(b, kName) != n.backend || hasChildren(b) {
			return nil
		}
		return t.unlink(s.bucket(t), n.key)
	})
	if err != nil {
		s.db.o.Logger.Error("a record of a lost snapshot stays", "namespace", s.ns, "snapshotter", s.name, "key", n.key, "error", err)
	}
}

// Remove removes the record. The backend's snapshot is collected later
// (contract 3.1.8).
func (s *snapshots) Remove(ctx context.Context, key string) error {
	err := s.db.update(ctx, func(t *txn) error {
		b := s.bucket(t, key)
		if b == nil {
			return notFound("snapshot", key)
		}
		if hasChildren(b) {
			return fmt.Errorf("snapshot %q has children: %w", key, errdefs.ErrFailedPrecondition)
		}
		if err := s.release(t, kSnapshots, s.name, key); err != nil {
			return err
		}
		return t.unlink(s.bucket(t), key)
	})
	if err != nil {
		return err
	}
	s.db.due(s.name)
	return s.db.publish(ctx, s.ns, event.TopicSnapshotRemove, event.SnapshotRemove{Key: key, Snapshotter: s.name})
}

// Walk asks the backend once for all, and again for what was made since.
func (s *snapshots) Walk(ctx context.Context, fn func(snapshot.Info) error, filters ...string) error {
	f, err := filter.Parse(filters...)
	if err != nil {
		return err
	}
	back := map[string]snapshot.Info{}
	err = s.back.Walk(ctx, func(i snapshot.Info) error {
		back[i.Name] = i
		return nil
	})
	if err != nil {
		return err
	}
	return scan(s.records, readNode, nil, func(n node) error {
		b, ok := back[n.backend]
		if !ok {
			if b, err = s.back.Stat(ctx, n.backend); errdefs.IsNotFound(err) {
				return nil // removed meanwhile; Check reports those that are lost
			} else if err != nil {
				return err
			}
		}
		if i := n.over(b); f.Match(i) {
			return fn(i)
		}
		return nil
	}, nil, kSnapshots, s.name)
}

// Cleanup implements snapshot.Cleaner; ErrNotImplemented if the backend does not.
func (s *snapshots) Cleanup(ctx context.Context) error {
	c, ok := s.back.(snapshot.Cleaner)
	if !ok {
		return fmt.Errorf("snapshotter %s: cleanup: %w", s.name, errdefs.ErrNotImplemented)
	}
	return c.Cleanup(ctx)
}
