package criimage

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// maxUser is how much of the user that an image names is shown. It comes from
// the image and could be of any length.
const maxUser = 256

// facts is what is known of a target for one platform. It never changes.
type facts struct {
	target, manifest, config ocispec.Descriptor
	platform                 ocispec.Platform
	chainID                  string
	size                     int64
	user                     string
}

// ref is a name of an image.
type ref struct {
	target digest.Digest
	pinned bool
}

// entry is an image. It is replaced, never changed, once it is in the index.
type entry struct {
	id    string
	facts facts
	refs  map[string]ref

	once          sync.Once // sets the rest: every list of containers asks for it
	tags, digests []string
}

// split sorts an image's names. Its id is neither. The caller has slices of
// its own.
func (e *entry) split() (tags, digests []string) {
	e.once.Do(func() { e.tags, e.digests = e.sorted() })
	return slices.Clone(e.tags), slices.Clone(e.digests)
}

func (e *entry) sorted() (tags, digests []string) {
	for _, name := range slices.Sorted(maps.Keys(e.refs)) {
		named, err := reference.ParseAnyReference(name)
		if err != nil {
			continue
		}
		if _, ok := named.(reference.Canonical); ok {
			digests = append(digests, named.String())
		} else if _, ok := named.(reference.Tagged); ok {
			tags = append(tags, named.String())
		}
	}
	return tags, digests
}

func (e *entry) pinned() bool {
	for _, r := range e.refs {
		if r.pinned {
			return true
		}
	}
	return false
}

// index is all images by id and by name.
type index struct {
	mu     sync.RWMutex
	byID   map[string]*entry
	byName map[string]string // to id
}

func newIndex() index { return index{byID: map[string]*entry{}, byName: map[string]string{}} }

func (x *index) get(id string) (*entry, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	e, ok := x.byID[id]
	return e, ok
}

// list returns all images in the order of their ids.
func (x *index) list() []*entry {
	x.mu.RLock()
	defer x.mu.RUnlock()
	all := make([]*entry, 0, len(x.byID))
	for _, id := range slices.Sorted(maps.Keys(x.byID)) {
		all = append(all, x.byID[id])
	}
	return all
}

func (x *index) all() []string {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return slices.Collect(maps.Keys(x.byName))
}

// find looks for a name as it is, in its normal form, as an id, and as the
// beginning of an id.
func (x *index) find(s string) (*entry, error) {
	if s == "" {
		return nil, fmt.Errorf("image reference must not be empty: %w", errdefs.ErrInvalidArgument)
	}
	x.mu.RLock()
	defer x.mu.RUnlock()
	if id, ok := x.byName[s]; ok {
		return x.byID[id], nil
	}
	if e, ok := x.byID[s]; ok {
		return e, nil
	}
	if named, err := reference.ParseDockerRef(s); err == nil {
		if id, ok := x.byName[named.String()]; ok {
			return x.byID[id], nil
		}
	}
	var found *entry
	if hex := strings.TrimPrefix(s, "sha256:"); hex != "" && strings.Trim(hex, "0123456789abcdef") == "" {
		for id, e := range x.byID {
			if strings.HasPrefix(id, "sha256:"+hex) {
				if found != nil {
					return nil, fmt.Errorf("image %.256q: several ids begin so: %w", s, errdefs.ErrInvalidArgument)
				}
				found = e
			}
		}
	}
	if found == nil {
		return nil, fmt.Errorf("image %.256q: %w", s, errdefs.ErrNotFound)
	}
	return found, nil
}

// put makes name one of the image's, and no other's.
func (x *index) put(name string, r ref, f facts) {
	id := f.config.Digest.String()
	x.mu.Lock()
	defer x.mu.Unlock()
	if old, ok := x.byName[name]; ok && old != id {
		x.dropLocked(name)
	}
	e := &entry{id: id, facts: f, refs: map[string]ref{}}
	if old := x.byID[id]; old != nil {
		maps.Copy(e.refs, old.refs)
	}
	e.refs[name] = r
	x.byID[id], x.byName[name] = e, id
}

// drop forgets a name, and the image with its last one.
func (x *index) drop(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.dropLocked(name)
}

func (x *index) dropLocked(name string) {
	id, ok := x.byName[name]
	if !ok {
		return
	}
	delete(x.byName, name)
	old := x.byID[id]
	e := &entry{id: id, facts: old.facts, refs: maps.Clone(old.refs)}
	delete(e.refs, name)
	if len(e.refs) == 0 {
		delete(x.byID, id)
		return
	}
	x.byID[id] = e
}

// refresh makes the index say of a name what the store says. An image that
// another client made is adopted: it gets the label and a record of its id,
// so that it lives and dies like all others (contract 7.2.5). The error says
// why an image whose record is there is not in the index.
func (s *Service) refresh(ctx context.Context, name string) (facts, error) {
	unlock, err := s.names.Lock(ctx, name)
	if err != nil {
		return facts{}, fmt.Errorf("image %s: %w", name, err)
	}
	img, err := s.view.Images().Get(ctx, name)
	if err != nil {
		if errdefs.IsNotFound(err) {
			s.index.drop(name)
			err = nil
		}
		unlock()
		return facts{}, err
	}
	f, err := s.inspect(ctx, img.Target, name, s.targets)
	if err != nil {
		if ctx.Err() == nil {
			s.index.drop(name)
		}
		unlock()
		return facts{}, fmt.Errorf("image %s: %w", name, err)
	}
	s.index.put(name, ref{img.Target.Digest, img.Labels[cristate.LabelPinned] == cristate.ImagePinned}, f)
	unlock()
	if want := s.labels(img); !carries(img.Labels, want) {
		// The id first: what has the label has an id.
		if id := f.config.Digest.String(); id != name {
			if err := s.record(ctx, id, want, img.Target); err != nil {
				return f, err
			}
		}
		_, err := s.view.Images().Update(ctx, image.Image{Name: name, Labels: want}, fieldsOf(want)...)
		if err != nil && !errdefs.IsNotFound(err) {
			return f, fmt.Errorf("label image %s: %w", name, err)
		}
	}
	return f, nil
}

func carries(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

func fieldsOf(labels map[string]string) []string {
	var fields []string
	for k := range labels {
		fields = append(fields, "labels."+k)
	}
	return fields
}

// labels are those that a record is to have: an image is pinned if one of
// pinned_images is its name (contract 7.2.4).
func (s *Service) labels(img image.Image) map[string]string {
	l := map[string]string{cristate.LabelImage: cristate.ImageManaged}
	pinned := img.Labels[cristate.LabelPinned] == cristate.ImagePinned
	for _, p := range s.d.Config.PinnedImages {
		named, err := reference.ParseDockerRef(p)
		pinned = pinned || p == img.Name || err == nil && named.String() == img.Name
	}
	if pinned {
		l[cristate.LabelPinned] = cristate.ImagePinned
	}
	return l
}

// record makes an image record, or makes one that is there point at target,
// and puts it into the index.
func (s *Service) record(ctx context.Context, name string, labels map[string]string, target ocispec.Descriptor) error {
	for attempt := 1; ; attempt++ {
		img := image.Image{Name: name, Labels: labels, Target: target}
		_, err := s.view.Images().Create(ctx, img)
		if errdefs.IsAlreadyExists(err) {
			var old image.Image
			if old, err = s.view.Images().Get(ctx, name); err == nil && (old.Target.Digest != target.Digest || !carries(old.Labels, labels)) {
				_, err = s.view.Images().Update(ctx, img, append(fieldsOf(labels), "target")...)
			}
			if errdefs.IsNotFound(err) && attempt < 5 {
				continue // somebody else deleted it meanwhile
			}
		}
		if err != nil {
			return fmt.Errorf("save image %s: %w", name, err)
		}
		_, err = s.refresh(ctx, name)
		return err
	}
}

// inspect reads what a target is for the first of the platforms that
// everything is here for. A name that is an image's id decides which of an
// index's images is meant. ErrNotFound says what is missing.
func (s *Service) inspect(ctx context.Context, desc ocispec.Descriptor, name string, wants []target) (facts, error) {
	var all []facts
	var missing error
	seen := map[string]bool{} // an index may name another as often as it likes
	var visit func(d ocispec.Descriptor, depth int) error
	visit = func(d ocispec.Descriptor, depth int) error {
		switch {
		case manifest.IsIndex(d.MediaType) && depth < manifest.MaxDepth:
			children, err := manifest.Children(ctx, s.view.Content(), d)
			if err != nil {
				return err
			}
			for _, c := range children {
				if seen[manifest.RefKey(c)] || c.Platform != nil && !slices.ContainsFunc(wants, func(t target) bool { return t.match.Match(*c.Platform) }) {
					continue
				}
				seen[manifest.RefKey(c)] = true
				if err := visit(c, depth+1); err != nil {
					if !errdefs.IsNotFound(err) {
						return err
					}
					missing = err
				}
			}
		case manifest.IsManifest(d.MediaType):
			f, err := s.facts(ctx, desc, d)
			if err != nil {
				return err
			}
			all = append(all, f)
		}
		return nil
	}
	if err := visit(desc, 0); err != nil {
		return facts{}, err
	}
	for _, f := range all {
		if f.config.Digest.String() == name {
			return f, nil
		}
	}
	for _, t := range wants {
		var best *facts
		for i, f := range all {
			if t.match.Match(f.platform) && (best == nil || t.match.Less(f.platform, best.platform)) {
				best = &all[i]
			}
		}
		if best != nil {
			return *best, nil
		}
	}
	if missing == nil {
		var has []string
		for _, f := range all {
			has = append(has, platforms.Format(f.platform))
		}
		missing = fmt.Errorf("%s has nothing for %s, but for %q: %w", desc.Digest, platforms.Format(wants[0].platform), has, errdefs.ErrNotFound)
	}
	return facts{}, missing
}

// facts reads a manifest and its config. ErrNotFound if a blob is missing, of
// a layer only if the image is not unpacked either.
func (s *Service) facts(ctx context.Context, target, desc ocispec.Descriptor) (facts, error) {
	store := s.view.Content()
	m, err := manifest.ReadManifest(ctx, store, desc)
	if err != nil {
		return facts{}, err
	}
	if !manifest.IsConfig(m.Config.MediaType) {
		return facts{}, fmt.Errorf("manifest %s: a config of type %.100q is no image's: %w", desc.Digest, m.Config.MediaType, errdefs.ErrNotFound)
	}
	config, err := manifest.ReadConfig(ctx, store, m.Config)
	if err != nil {
		return facts{}, err
	}
	f := facts{target: target, manifest: desc, config: m.Config, platform: platforms.Normalize(config.Platform), size: desc.Size + m.Config.Size, user: config.Config.User}
	if desc.Digest != target.Digest {
		f.size += target.Size
	}
	if len(f.user) > maxUser {
		f.user = f.user[:maxUser]
	}
	for _, d := range config.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return facts{}, fmt.Errorf("config %s: diff id %.100q: %v: %w", m.Config.Digest, d, err, errdefs.ErrInvalidArgument)
		}
	}
	if len(config.RootFS.DiffIDs) > 0 {
		f.chainID = identity.ChainID(config.RootFS.DiffIDs).String()
	}
	var absent error
	for _, l := range m.Layers {
		f.size += l.Size
		if absent == nil {
			_, absent = store.Info(ctx, l.Digest)
		}
	}
	if absent != nil {
		info, err := store.Info(ctx, m.Config.Digest)
		if err != nil {
			return facts{}, err
		}
		for k := range info.Labels {
			if strings.HasPrefix(k, manifest.LabelSnapshot) {
				return f, nil
			}
		}
		return facts{}, fmt.Errorf("manifest %s: layer: %w", desc.Digest, absent)
	}
	return f, nil
}
