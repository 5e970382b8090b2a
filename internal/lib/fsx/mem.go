package fsx

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// ErrCut is what every operation returns after the power was cut.
var ErrCut = errors.New("the power is cut")

// Keep says what of the unsynced changes is still there after a power cut. A
// disk may do any of it.
type Keep int

const (
	KeepNothing Keep = iota // only what was synced
	KeepNames               // all names, but of content only what was synced: empty files
	KeepData                // all content, but only the names that were synced
	KeepAll                 // everything: a killed process
	KeepSome                // each directory and file decides for itself, files also by half
)

// Mem is an FS in memory that knows what is durable. The zero value is not
// usable, see NewMem.
type Mem struct {
	mu   sync.Mutex // guards all below, nodes included
	root *memNode
	ops  int
	cut  int // the operation before which the power goes, 0 for none
	fail int // the operation that fails, 0 for none
	err  error
}

type memNode struct {
	dir    bool
	mode   fs.FileMode
	mtime  time.Time
	links  int
	data   []byte // as a reader sees it
	synced []byte // as it is on disk
	// lost is set by a failed Sync: the system forgot that it had to write
	// these pages, so a later Sync succeeds without writing them.
	lost    bool
	names   map[string]*memNode
	durable map[string]*memNode
}

type memSys struct{ links int }

// NewMem returns an empty tree.
func NewMem() *Mem {
	return &Mem{root: newMemDir()}
}

func newMemDir() *memNode {
	return &memNode{dir: true, mode: 0o755, links: 1, names: map[string]*memNode{}, durable: map[string]*memNode{}}
}

// CutBefore cuts the power before the k-th changing operation from now, k
// counted from 1; 0 is never. The operation and all calls after it return ErrCut.
func (m *Mem) CutBefore(k int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ops, m.cut = 0, k
}

// FailAt lets the k-th changing operation from now return err and do nothing,
// or half of it if it is a write; 0 is never.
func (m *Mem) FailAt(k int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ops, m.fail, m.err = 0, k, err
}

// Ops returns how many changing operations there were since the start or the
// last CutBefore or FailAt.
func (m *Mem) Ops() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ops
}

// Restart returns the tree as it is after a power cut. m is not changed; seed
// matters for KeepSome only.
func (m *Mem) Restart(keep Keep, seed uint64) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := &survivor{keep: keep, rnd: rand.New(rand.NewPCG(seed, 1)), seen: map[*memNode]*memNode{}}
	return &Mem{root: r.node(m.root)}
}

type survivor struct {
	keep Keep
	rnd  *rand.Rand
	seen map[*memNode]*memNode
}

func (r *survivor) node(old *memNode) *memNode {
	if n := r.seen[old]; n != nil {
		n.links++
		return n
	}
	n := &memNode{dir: old.dir, mode: old.mode, mtime: old.mtime, links: 1}
	r.seen[old] = n
	if !old.dir {
		n.data = r.data(old)
		n.synced = slices.Clone(n.data)
		return n
	}
	names := old.durable
	if r.keep == KeepNames || r.keep == KeepAll || r.keep == KeepSome && r.rnd.IntN(2) == 0 {
		names = old.names
	}
	n.names = make(map[string]*memNode, len(names))
	for _, name := range slices.Sorted(maps.Keys(names)) { // in order, for the seed's sake
		n.names[name] = r.node(names[name])
	}
	n.durable = maps.Clone(n.names)
	return n
}

func (r *survivor) data(old *memNode) []byte {
	written := old.data
	if old.lost {
		written = old.synced
	}
	switch r.keep {
	case KeepData, KeepAll:
		return slices.Clone(written)
	case KeepSome:
		switch cut := r.rnd.IntN(len(written) + 1); r.rnd.IntN(4) {
		case 0:
			return slices.Clone(written)
		case 1: // the size grew, the blocks did not arrive
			out := make([]byte, len(written))
			copy(out, old.synced)
			return out
		case 2:
			if cut > len(old.synced) {
				return slices.Clone(written[:cut])
			}
		}
	}
	return slices.Clone(old.synced)
}

// step counts an operation that changes something. m.mu is held.
func (m *Mem) step(op, name string) error {
	if err := m.dead(op, name); err != nil {
		return err
	}
	m.ops++
	if m.cut > 0 && m.ops >= m.cut {
		return &fs.PathError{Op: op, Path: name, Err: ErrCut}
	}
	if m.fail > 0 && m.ops == m.fail {
		return &fs.PathError{Op: op, Path: name, Err: m.err}
	}
	return nil
}

func (m *Mem) dead(op, name string) error {
	if m.cut > 0 && m.ops >= m.cut {
		return &fs.PathError{Op: op, Path: name, Err: ErrCut}
	}
	return nil
}

// find returns a node, or nil and the error.
func (m *Mem) find(op, name string) (*memNode, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	n := m.root
	if name == "." {
		return n, nil
	}
	for rest := name; rest != ""; {
		var elem string
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			elem, rest = rest[:i], rest[i+1:]
		} else {
			elem, rest = rest, ""
		}
		if !n.dir {
			return nil, &fs.PathError{Op: op, Path: name, Err: syscall.ENOTDIR}
		}
		if n = n.names[elem]; n == nil {
			return nil, &fs.PathError{Op: op, Path: name, Err: syscall.ENOENT}
		}
	}
	return n, nil
}

// parent returns the directory in which name is or would be.
func (m *Mem) parent(op, name string) (*memNode, string, error) {
	if name == "." {
		return nil, "", &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	p, err := m.find(op, path.Dir(name))
	if err != nil {
		return nil, "", err
	}
	if !p.dir {
		return nil, "", &fs.PathError{Op: op, Path: name, Err: syscall.ENOTDIR}
	}
	return p, path.Base(name), nil
}

// OpenFile implements FS.
func (m *Mem) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.dead("open", name); err != nil {
		return nil, err
	}
	n, err := m.find("open", name)
	switch {
	case err == nil && flag&os.O_CREATE != 0 && flag&os.O_EXCL != 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EEXIST}
	case err == nil && n.dir:
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EISDIR}
	case err == nil && flag&os.O_TRUNC != 0:
		if err := m.step("open", name); err != nil {
			return nil, err
		}
		n.truncate(0)
	case errors.Is(err, fs.ErrNotExist) && flag&os.O_CREATE != 0:
		p, base, err := m.parent("open", name)
		if err != nil {
			return nil, err
		}
		if err := m.step("open", name); err != nil {
			return nil, err
		}
		n = &memNode{mode: perm, links: 1, mtime: time.Now()}
		p.names[base] = n
	case err != nil:
		return nil, err
	}
	return &memFile{m: m, n: n, name: name, write: flag&(os.O_WRONLY|os.O_RDWR) != 0}, nil
}

// Rename implements FS.
func (m *Mem) Rename(oldname, newname string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step("rename", oldname); err != nil {
		return err
	}
	n, err := m.find("rename", oldname)
	if err != nil {
		return err
	}
	from, oldbase, err := m.parent("rename", oldname)
	if err != nil {
		return err
	}
	to, newbase, err := m.parent("rename", newname)
	if err != nil {
		return err
	}
	if there := to.names[newbase]; there != nil {
		if there.dir != n.dir || there.dir && len(there.names) > 0 {
			return &fs.PathError{Op: "rename", Path: newname, Err: syscall.EEXIST}
		}
		there.links--
	}
	delete(from.names, oldbase)
	to.names[newbase] = n
	return nil
}

// Remove implements FS.
func (m *Mem) Remove(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, err := m.find("remove", name)
	if err == nil && n.dir && len(n.names) > 0 {
		err = &fs.PathError{Op: "remove", Path: name, Err: syscall.ENOTEMPTY}
	}
	if err != nil {
		return errors.Join(m.dead("remove", name), err)
	}
	if err := m.step("remove", name); err != nil {
		return err
	}
	p, base, err := m.parent("remove", name)
	if err != nil {
		return err
	}
	n.links--
	delete(p.names, base)
	return nil
}

// Mkdir implements FS.
func (m *Mem) Mkdir(name string, perm fs.FileMode) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step("mkdir", name); err != nil {
		return err
	}
	p, base, err := m.parent("mkdir", name)
	if err != nil {
		return err
	}
	if p.names[base] != nil {
		return &fs.PathError{Op: "mkdir", Path: name, Err: syscall.EEXIST}
	}
	n := newMemDir()
	n.mode, n.mtime = perm, time.Now()
	p.names[base] = n
	return nil
}

// ReadDir implements FS.
func (m *Mem) ReadDir(name string) ([]fs.DirEntry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.dead("readdir", name); err != nil {
		return nil, err
	}
	n, err := m.find("readdir", name)
	if err != nil {
		return nil, err
	}
	if !n.dir {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: syscall.ENOTDIR}
	}
	var out []fs.DirEntry
	for _, base := range slices.Sorted(maps.Keys(n.names)) {
		out = append(out, fs.FileInfoToDirEntry(n.names[base].info(base)))
	}
	return out, nil
}

// Stat implements FS.
func (m *Mem) Stat(name string) (fs.FileInfo, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.dead("stat", name); err != nil {
		return nil, err
	}
	n, err := m.find("stat", name)
	if err != nil {
		return nil, err
	}
	return n.info(path.Base(name)), nil
}

// SyncDir implements FS.
func (m *Mem) SyncDir(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step("sync", name); err != nil {
		return err
	}
	n, err := m.find("sync", name)
	if err != nil {
		return err
	}
	n.durable = maps.Clone(n.names)
	return nil
}

func (n *memNode) info(name string) memInfo {
	return memInfo{name: name, size: int64(len(n.data)), mode: n.mode, mtime: n.mtime, dir: n.dir, links: n.links}
}

func (n *memNode) truncate(size int64) {
	n.mtime = time.Now()
	if size == 0 {
		n.lost = false // nothing is left to be lost
	}
	if size <= int64(len(n.data)) {
		n.data = n.data[:size:size]
		return
	}
	n.data = append(n.data, make([]byte, size-int64(len(n.data)))...)
}

type memFile struct {
	m      *Mem
	n      *memNode
	name   string
	write  bool
	closed bool
}

// begin checks the state of the file; m.mu is held.
func (f *memFile) begin(op string, write bool) error {
	if f.closed {
		return &fs.PathError{Op: op, Path: f.name, Err: fs.ErrClosed}
	}
	if write && !f.write {
		return &fs.PathError{Op: op, Path: f.name, Err: syscall.EBADF}
	}
	return f.m.dead(op, f.name)
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.begin("read", false); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, &fs.PathError{Op: "read", Path: f.name, Err: fs.ErrInvalid}
	}
	if off >= int64(len(f.n.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.n.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.begin("write", true); err != nil {
		return 0, err
	}
	err := f.m.step("write", f.name)
	if errors.Is(err, ErrCut) {
		return 0, err
	}
	if err != nil {
		p = p[:len(p)/2]
	}
	if end := off + int64(len(p)); end > int64(len(f.n.data)) {
		f.n.data = append(f.n.data, make([]byte, end-int64(len(f.n.data)))...)
	}
	f.n.mtime = time.Now()
	return copy(f.n.data[off:], p), err
}

func (f *memFile) Truncate(size int64) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.begin("truncate", true); err != nil {
		return err
	}
	if err := f.m.step("truncate", f.name); err != nil {
		return err
	}
	f.n.truncate(size)
	return nil
}

func (f *memFile) Chmod(mode fs.FileMode) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.begin("chmod", false); err != nil {
		return err
	}
	if err := f.m.step("chmod", f.name); err != nil {
		return err
	}
	f.n.mode = mode
	return nil
}

func (f *memFile) Sync() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.begin("sync", false); err != nil {
		return err
	}
	if err := f.m.step("sync", f.name); err != nil {
		f.n.lost = true
		return err
	}
	if !f.n.lost {
		f.n.synced = slices.Clone(f.n.data)
	}
	return nil
}

func (f *memFile) Stat() (fs.FileInfo, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err := f.begin("stat", false); err != nil {
		return nil, err
	}
	return f.n.info(path.Base(f.name)), nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return &fs.PathError{Op: "close", Path: f.name, Err: fs.ErrClosed}
	}
	f.closed = true
	return nil
}

type memInfo struct {
	name  string
	size  int64
	mode  fs.FileMode
	mtime time.Time
	dir   bool
	links int
}

func (i memInfo) Name() string       { return i.name }
func (i memInfo) Size() int64        { return i.size }
func (i memInfo) ModTime() time.Time { return i.mtime }
func (i memInfo) IsDir() bool        { return i.dir }
func (i memInfo) Sys() any           { return memSys{i.links} }
func (i memInfo) Mode() fs.FileMode {
	if i.dir {
		return i.mode | fs.ModeDir
	}
	return i.mode
}
