package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Pos says where a value comes from. Line and Col start at 1; they are 0 for a
// value that no file set, and File then names the source ("default",
// "--root"). The zero Pos is a built-in default.
type Pos struct {
	File      string
	Line, Col int
}

// String is file:line:col, or the name of the source.
func (p Pos) String() string {
	switch {
	case p.File == "" && p.Line == 0:
		return "default"
	case p.Line == 0:
		return p.File
	}
	return p.File + ":" + strconv.Itoa(p.Line) + ":" + strconv.Itoa(p.Col)
}

// node is one value of a configuration with its origin. It is a table when
// table is not nil, a list when list is not nil, else a scalar.
type node struct {
	pos     Pos
	table   map[string]*node
	list    []*node
	scalar  any  // string, int64, float64, bool or a TOML date type
	derived bool // computed by a migration; an explicit value always wins
}

func newTable(pos Pos) *node { return &node{pos: pos, table: map[string]*node{}} }

func newScalar(v any, pos Pos) *node { return &node{scalar: v, pos: pos} }

func newStrings(pos Pos, items ...string) *node {
	n := &node{pos: pos, list: []*node{}}
	for _, s := range items {
		n.list = append(n.list, newScalar(s, pos))
	}
	return n
}

// parseTree reads TOML. A syntax error (a duplicate key is one) carries file,
// row and column.
func parseTree(file string, data []byte) (*node, error) {
	var raw map[string]any
	if err := toml.Unmarshal(data, &raw); err != nil {
		var de *toml.DecodeError
		if errors.As(err, &de) {
			row, col := de.Position()
			return nil, fmt.Errorf("parse %s:%d:%d: %s: %w", file, row, col, de.Error(), errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("parse %s: %s: %w", file, err.Error(), errdefs.ErrInvalidArgument)
	}
	root := fromAny(raw, Pos{File: file, Line: 1, Col: 1})
	if err := locate(root, file, data); err != nil {
		return nil, err
	}
	return root, nil
}

func fromAny(v any, pos Pos) *node {
	switch v := v.(type) {
	case map[string]any:
		n := newTable(pos)
		for k, e := range v {
			n.table[k] = fromAny(e, pos)
		}
		return n
	case []any:
		n := &node{pos: pos, list: make([]*node, 0, len(v))}
		for _, e := range v {
			n.list = append(n.list, fromAny(e, pos))
		}
		return n
	}
	return newScalar(v, pos)
}

// locate writes the position of each key into the tree that was decoded from
// the same bytes.
func locate(root *node, file string, data []byte) error {
	var p unstable.Parser
	p.Reset(data)
	at := func(n *unstable.Node) Pos {
		start := p.Shape(n.Raw).Start
		return Pos{File: file, Line: start.Line, Col: start.Column}
	}
	count := map[string]int{} // array tables seen so far, by path
	// step goes from n down the keys of it, and marks what it passes through
	// for the first time.
	step := func(n *node, prefix string, it unstable.Iterator, arrayTable bool) (*node, string) {
		for n != nil && it.Next() {
			k := it.Node()
			prefix += "\x00" + string(k.Data)
			last := k.Next() == nil || k.Next().Kind != unstable.Key
			n = n.table[string(k.Data)]
			if n == nil {
				return nil, prefix
			}
			if n.pos.Col == 1 && n.pos.Line == 1 || last {
				n.pos = at(k)
			}
			if n.list != nil && (!last || arrayTable) {
				if last {
					count[prefix]++
				}
				i := count[prefix] - 1
				if i < 0 || i >= len(n.list) {
					return nil, prefix
				}
				n = n.list[i]
				if last {
					n.pos = at(k)
				}
				prefix += "\x00" + strconv.Itoa(i)
			}
		}
		return n, prefix
	}
	var value func(n *node, v *unstable.Node)
	value = func(n *node, v *unstable.Node) {
		if n == nil || v == nil {
			return
		}
		switch v.Kind {
		case unstable.InlineTable:
			it := v.Children()
			for it.Next() {
				kv := it.Node()
				if kv.Kind != unstable.KeyValue {
					continue
				}
				sub, _ := step(n, "", kv.Key(), false)
				value(sub, kv.Value())
			}
		case unstable.Array:
			it := v.Children()
			for i := 0; it.Next(); {
				if it.Node().Kind == unstable.Comment {
					continue
				}
				if i < len(n.list) {
					n.list[i].pos = n.pos
					if it.Node().Raw.Length > 0 {
						n.list[i].pos = at(it.Node())
					}
					value(n.list[i], it.Node())
				}
				i++
			}
		}
	}
	current, prefix := root, ""
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table:
			current, prefix = step(root, "", e.Key(), false)
		case unstable.ArrayTable:
			current, prefix = step(root, "", e.Key(), true)
		case unstable.KeyValue:
			if current == nil {
				continue
			}
			n, _ := step(current, prefix, e.Key(), false)
			value(n, e.Value())
		}
	}
	if err := p.Error(); err != nil {
		return fmt.Errorf("parse %s: %s: %w", file, err.Error(), errdefs.ErrInvalidArgument)
	}
	return nil
}

func (n *node) isTable() bool { return n != nil && n.table != nil }

// at walks down tables; nil when a step is missing.
func (n *node) at(path ...string) *node {
	for _, k := range path {
		if n == nil {
			return nil
		}
		n = n.table[k]
	}
	return n
}

// ensure returns the table at path and makes what is missing of it. It is nil
// when something that is no table is in the way.
func (n *node) ensure(pos Pos, path ...string) *node {
	for _, k := range path {
		next := n.table[k]
		if next == nil {
			next = newTable(pos)
			n.table[k] = next
		}
		if next.table == nil {
			return nil
		}
		n = next
	}
	return n
}

func (n *node) take(key string) *node {
	if n == nil || n.table == nil {
		return nil
	}
	v := n.table[key]
	delete(n.table, key)
	return v
}

func (n *node) clone() *node {
	if n == nil {
		return nil
	}
	c := *n
	if n.table != nil {
		c.table = make(map[string]*node, len(n.table))
		for k, v := range n.table {
			c.table[k] = v.clone()
		}
	}
	if n.list != nil {
		c.list = make([]*node, len(n.list))
		for i, v := range n.list {
			c.list[i] = v.clone()
		}
	}
	return &c
}

// keys in the order of the file, then by name.
func (n *node) keys() []string {
	return slices.SortedFunc(maps.Keys(n.table), func(x, y string) int {
		a, b := n.table[x].pos, n.table[y].pos
		return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col), strings.Compare(x, y))
	})
}

// zero tells whether the value is what Go calls zero: "", 0, false, empty.
func (n *node) zero() bool {
	switch {
	case n == nil:
		return true
	case n.table != nil:
		return len(n.table) == 0
	case n.list != nil:
		return len(n.list) == 0
	}
	switch v := n.scalar.(type) {
	case string:
		return v == ""
	case int64:
		return v == 0
	case float64:
		return v == 0
	case bool:
		return !v
	}
	return false
}

// equal compares values, not origins. A duration is compared as a duration, so
// that 60s equals 1m0s.
func (n *node) equal(m *node) bool {
	if n == nil || m == nil {
		return n == m
	}
	switch {
	case n.table != nil:
		if m.table == nil || len(n.table) != len(m.table) {
			return false
		}
		for k, v := range n.table {
			if !v.equal(m.table[k]) {
				return false
			}
		}
		return true
	case n.list != nil:
		if m.list == nil || len(n.list) != len(m.list) {
			return false
		}
		for i := range n.list {
			if !n.list[i].equal(m.list[i]) {
				return false
			}
		}
		return true
	}
	a, aok := n.scalar.(string)
	b, bok := m.scalar.(string)
	if aok && bok && a != b {
		d1, err1 := time.ParseDuration(a)
		d2, err2 := time.ParseDuration(b)
		return err1 == nil && err2 == nil && d1 == d2
	}
	if i, ok := n.scalar.(int64); ok {
		if f, ok := m.scalar.(float64); ok {
			return float64(i) == f
		}
	}
	return n.scalar == m.scalar
}

// kind names the type of a value in messages.
func (n *node) kind() string {
	switch {
	case n.table != nil:
		return "a table"
	case n.list != nil:
		return "a list"
	}
	switch n.scalar.(type) {
	case string:
		return "a string"
	case int64:
		return "an integer"
	case float64:
		return "a float"
	case bool:
		return "a boolean"
	}
	return "a date"
}

// keyPath writes a path the way TOML does.
func keyPath(path []string) string {
	parts := make([]string, len(path))
	for i, k := range path {
		parts[i] = quoteKey(k)
	}
	return strings.Join(parts, ".")
}
