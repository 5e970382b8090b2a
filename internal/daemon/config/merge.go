package config

import "fmt"

// replacedPerKey are the tables whose entries are taken as a whole.
var replacedPerKey = map[string]bool{"proxy_plugins": true, "stream_processors": true, "timeouts": true}

// merge puts a later file over an earlier one (contract 2.3.4): scalars win
// when they are not zero, lists are united, plugin blocks are merged in depth,
// and proxies, processors and timeouts are replaced entry by entry. In a
// plugin block every value that is written down wins, zero or not.
func merge(to, from *node) []Warning {
	var ws []Warning
	for _, k := range from.keys() {
		a, b := to.table[k], from.table[k]
		switch {
		case a == nil:
			to.table[k] = b
		case replacedPerKey[k] && a.table != nil && b.table != nil:
			for _, e := range b.keys() {
				a.table[e] = b.table[e]
			}
		case k == "plugins" && a.table != nil && b.table != nil:
			mergeDeep(a, b)
		default:
			ws = append(ws, mergeTop(to, k, b, []string{k})...)
		}
	}
	return ws
}

func mergeTop(to *node, k string, b *node, path []string) []Warning {
	a := to.table[k]
	switch {
	case a == nil:
		to.table[k] = b
	case a.table != nil && b.table != nil:
		var ws []Warning
		for _, e := range b.keys() {
			ws = append(ws, mergeTop(a, e, b.table[e], join(path, e))...)
		}
		return ws
	case a.list != nil && b.list != nil:
		unite(a, b)
	case b.zero():
		if !a.equal(b) {
			return []Warning{{Pos: b.pos, Key: keyPath(path), Kind: Ineffective,
				Msg: fmt.Sprintf("%s: an imported file cannot set this back to zero, the value of %s stays", keyPath(path), a.pos)}}
		}
	default:
		to.table[k] = b
	}
	return nil
}

func mergeDeep(to, from *node) {
	for _, k := range from.keys() {
		a, b := to.table[k], from.table[k]
		switch {
		case a == nil:
			to.table[k] = b
		case a.table != nil && b.table != nil:
			mergeDeep(a, b)
		case a.list != nil && b.list != nil:
			unite(a, b)
		case b.derived && !a.derived:
			// a was written by someone, b was only concluded
		default:
			to.table[k] = b
		}
	}
}

// unite appends what is new and keeps the order.
func unite(a, b *node) {
next:
	for _, e := range b.list {
		for _, have := range a.list {
			if have.equal(e) {
				continue next
			}
		}
		a.list = append(a.list, e)
	}
}

// overlay puts what was read over the defaults: a value replaces a default
// whole, only tables are merged. Entries of the tables named in whole are
// replaced as one.
func overlay(to, from *node, whole map[string]bool) {
	for k, b := range from.table {
		a := to.table[k]
		if a == nil || a.table == nil || b.table == nil {
			to.table[k] = b.clone()
			continue
		}
		if whole[k] {
			for e, v := range b.table {
				a.table[e] = v.clone()
			}
			continue
		}
		overlay(a, b, nil)
	}
}
