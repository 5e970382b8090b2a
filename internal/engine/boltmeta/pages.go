package boltmeta

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// The page format of bolt 2: little-endian on every machine we build for.
const (
	boltMagic     = 0xED0CDAED
	boltVersion   = 2
	pageHeader    = 16
	elementSize   = 16
	bucketHeader  = 16
	flagBranch    = 0x01
	flagLeaf      = 0x02
	flagMeta      = 0x04
	flagBucket    = 0x01
	metaSize      = 64
	metaSumOffset = 56
)

// checkPages reads every page that bolt's newest valid meta page leads to and
// returns an error that names the first wrong one. bolt itself panics, also in
// goroutines of its own, on what it does not expect; after this it only meets
// what it expects. An empty file is right: bolt will fill it.
func checkPages(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() == 0 {
		return nil
	}
	c := pageChecker{f: f, size: fi.Size(), seen: map[uint64]bool{0: true, 1: true}}
	if err := c.meta(); err != nil {
		return err
	}
	return c.tree(c.root, 0)
}

type pageChecker struct {
	f        io.ReaderAt
	size     int64
	pageSize int64
	root     uint64
	high     uint64 // all pages are below it
	seen     map[uint64]bool
}

// meta reads the two meta pages and takes the newer valid one.
func (c *pageChecker) meta() error {
	var best uint64
	var firstErr error
	try := func(off int64) bool {
		b := make([]byte, pageHeader+metaSize)
		if _, err := c.f.ReadAt(b, off); err != nil {
			firstErr = errors.Join(firstErr, fmt.Errorf("meta page at %d: %w", off, err))
			return false
		}
		m := b[pageHeader:]
		le := binary.LittleEndian
		sum := fnv.New64a()
		sum.Write(m[:metaSumOffset])
		if le.Uint32(m) != boltMagic || le.Uint32(m[4:]) != boltVersion || le.Uint64(m[metaSumOffset:]) != sum.Sum64() {
			firstErr = errors.Join(firstErr, fmt.Errorf("meta page at %d is not valid", off))
			return false
		}
		c.pageSize = int64(le.Uint32(m[8:]))
		if tx := le.Uint64(m[48:]); c.root == 0 || tx > best {
			best, c.root, c.high = tx, le.Uint64(m[16:]), le.Uint64(m[40:])
		}
		return true
	}
	if try(0) {
		if c.pageSize < 512 || c.pageSize > 1<<20 {
			return fmt.Errorf("page size %d is not possible", c.pageSize)
		}
		try(c.pageSize)
	} else {
		for size := int64(1 << 10); size <= 1<<16; size <<= 1 { // page 0 is gone: page 1 is somewhere here
			if try(size) {
				break
			}
		}
	}
	if c.root == 0 {
		return firstErr
	}
	if c.high > uint64(c.size/c.pageSize) { // bolt grows the file before it writes
		return fmt.Errorf("the file is cut off: it has %d bytes, its pages need %d", c.size, c.high*uint64(c.pageSize))
	}
	return nil
}

// page reads a page with its overflow.
func (c *pageChecker) page(id uint64) ([]byte, error) {
	if id < 2 || id >= c.high {
		return nil, fmt.Errorf("page %d is out of bounds, there are %d", id, c.high)
	}
	if c.seen[id] {
		return nil, fmt.Errorf("page %d is used twice", id)
	}
	head := make([]byte, pageHeader)
	if _, err := c.f.ReadAt(head, int64(id)*c.pageSize); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	le := binary.LittleEndian
	over := uint64(le.Uint32(head[12:]))
	if got := le.Uint64(head); got != id {
		return nil, fmt.Errorf("page %d says that it is page %d", id, got)
	}
	if id+over >= c.high {
		return nil, fmt.Errorf("page %d runs to page %d, there are %d", id, id+over, c.high)
	}
	for i := id; i <= id+over; i++ {
		if c.seen[i] {
			return nil, fmt.Errorf("page %d is used twice", i)
		}
		c.seen[i] = true
	}
	b := make([]byte, int64(over+1)*c.pageSize)
	if _, err := c.f.ReadAt(b, int64(id)*c.pageSize); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	return b, nil
}

// tree checks the pages of a bucket and of those within it.
func (c *pageChecker) tree(id uint64, depth int) error {
	if depth > 64 {
		return fmt.Errorf("page %d is nested too deep", id)
	}
	b, err := c.page(id)
	if err != nil {
		return err
	}
	if err := c.elements(b, depth); err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// elements checks a page's entries: in bounds, in order, and what they lead to.
func (c *pageChecker) elements(b []byte, depth int) error {
	le := binary.LittleEndian
	flags, count := le.Uint16(b[8:]), int(le.Uint16(b[10:]))
	if flags != flagBranch && flags != flagLeaf {
		return fmt.Errorf("type %#x is not that of a branch or a leaf", flags)
	}
	if pageHeader+count*elementSize > len(b) {
		return fmt.Errorf("%d entries do not fit", count)
	}
	if flags == flagBranch && count == 0 {
		return errors.New("branch without entries")
	}
	var last []byte
	for i := range count {
		at := pageHeader + i*elementSize
		e := b[at:]
		part := func(pos, n uint64) ([]byte, bool) {
			lo := uint64(at) + pos
			if hi := lo + n; hi <= uint64(len(b)) {
				return b[lo:hi], true
			}
			return nil, false
		}
		if flags == flagBranch {
			key, ok := part(uint64(le.Uint32(e)), uint64(le.Uint32(e[4:])))
			if !ok {
				return fmt.Errorf("entry %d is out of bounds", i)
			}
			if i > 0 && bytes.Compare(last, key) >= 0 {
				return fmt.Errorf("entry %d is out of order", i)
			}
			last = key
			if err := c.tree(le.Uint64(e[8:]), depth+1); err != nil {
				return err
			}
			continue
		}
		pos, ks, vs := uint64(le.Uint32(e[4:])), uint64(le.Uint32(e[8:])), uint64(le.Uint32(e[12:]))
		kv, ok := part(pos, ks+vs)
		if !ok {
			return fmt.Errorf("entry %d is out of bounds", i)
		}
		if i > 0 && bytes.Compare(last, kv[:ks]) >= 0 {
			return fmt.Errorf("entry %d is out of order", i)
		}
		last = kv[:ks]
		if le.Uint32(e)&flagBucket == 0 {
			continue
		}
		v := kv[ks:]
		if len(v) < bucketHeader {
			return fmt.Errorf("bucket %q is too short", kv[:ks])
		}
		if root := le.Uint64(v); root != 0 {
			if err := c.tree(root, depth+1); err != nil {
				return err
			}
		} else if inline := v[bucketHeader:]; len(inline) < pageHeader {
			return fmt.Errorf("bucket %q is too short", kv[:ks])
		} else if le.Uint16(inline[8:]) != flagLeaf {
			return fmt.Errorf("bucket %q is not a leaf", kv[:ks])
		} else if err := c.elements(inline, depth+1); err != nil {
			return fmt.Errorf("bucket %q: %w", kv[:ks], err)
		}
	}
	return nil
}
