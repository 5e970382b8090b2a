package config

import (
	_ "embed"
	"fmt"
	"strings"
	"sync"
	"time"
)

// defaultsTOML is the configuration that `config default` prints: every key
// with its default value. It is data, and the type of each value is the type
// of the key.
//
//go:embed defaults.toml
var defaultsTOML []byte

// acceptedTOML lists what is read besides.
//
//go:embed accepted.toml
var acceptedTOML []byte

const anyValue = "<any>"

// tables are parsed once; callers get clones or only read.
var schemaTrees = sync.OnceValue(func() (t struct{ defaults, known *node }) {
	d, err := parseTree("defaults.toml", defaultsTOML)
	if err != nil {
		panic(err) // compiled in: a broken invariant
	}
	a, err := parseTree("accepted.toml", acceptedTOML)
	if err != nil {
		panic(err)
	}
	unplace(d)
	t.defaults = d
	t.known = d.clone()
	overlay(t.known, a, nil)
	return t
})

// unplace forgets positions: a default has none.
func unplace(n *node) {
	n.pos = Pos{}
	for _, c := range n.table {
		unplace(c)
	}
	for _, c := range n.list {
		unplace(c)
	}
}

func defaultTree() *node { return schemaTrees().defaults.clone() }

// known is the schema. It must not be changed.
func known() *node { return schemaTrees().known }

// child finds the schema of a key in a table's schema: by name or by '*'.
func child(schema *node, key string) *node {
	if schema == nil || schema.table == nil {
		return nil
	}
	if c, ok := schema.table[key]; ok {
		return c
	}
	for k, c := range schema.table {
		if strings.EqualFold(k, key) {
			return c
		}
	}
	return schema.table["*"]
}

func isAny(schema *node) bool { return schema != nil && schema.scalar == anyValue }

func isDuration(schema *node) bool {
	s, ok := schema.scalar.(string)
	if !ok || !strings.HasSuffix(s, "s") {
		return false
	}
	_, err := time.ParseDuration(s)
	return err == nil
}

// movedHints tells where a key went that is no longer read where it stands.
func movedHint(path []string) string {
	switch path[0] {
	case "grpc", "ttrpc", "metrics":
		return fmt.Sprintf("since version 4 it is [plugins.'io.containerd.server.v1.%s']", path[0])
	case "plugin_dir":
		return "plugins in shared objects do not exist any more"
	case "subreaper", "no_subreaper", "v":
		return "it has been removed"
	case "debug":
		if len(path) > 1 && (path[1] == "address" || path[1] == "uid" || path[1] == "gid") {
			return "since version 4 it is in [plugins.'io.containerd.server.v1.debug']"
		}
	case "plugins":
		if len(path) == 3 && path[1] == criServer {
			if criServerKeys[path[2]] {
				break
			}
			if _, ok := criImageKeys[path[2]]; ok {
				return "since version 3 it is in [plugins.'" + criImages + "']"
			}
			if known().at("plugins", criRuntime, path[2]) != nil {
				return "since version 3 it is in [plugins.'" + criRuntime + "']"
			}
		}
	}
	return ""
}

func unknownKey(n *node, schema *node, path []string) Warning {
	msg := fmt.Sprintf("unknown key %s is ignored", keyPath(path))
	if hint := movedHint(path); hint != "" {
		msg += " (" + hint + ")"
	} else if schema != nil {
		if near := nearest(path[len(path)-1], schema.keys()); near != "" {
			msg += fmt.Sprintf(" (did you mean %q?)", near)
		}
	}
	return Warning{Pos: n.pos, Key: keyPath(path), Kind: Unknown, Msg: msg}
}

func wrongType(n *node, want string, path []string) Warning {
	return Warning{Pos: n.pos, Key: keyPath(path), Kind: WrongType,
		Msg: fmt.Sprintf("%s is %s, want %s; the default is used", keyPath(path), n.kind(), want)}
}

// checkTypes compares a value with its schema: unknown keys, wrong types.
func checkTypes(n, schema *node, path []string) []Warning {
	if isAny(schema) {
		return nil
	}
	switch {
	case schema.table != nil:
		if n.table == nil {
			return []Warning{wrongType(n, "a table", path)}
		}
		var ws []Warning
		for _, k := range n.keys() {
			sub, subPath := child(schema, k), join(path, k)
			if sub == nil {
				ws = append(ws, unknownKey(n.table[k], schema, subPath))
				continue
			}
			ws = append(ws, checkTypes(n.table[k], sub, subPath)...)
		}
		return ws
	case schema.list != nil:
		if n.list == nil {
			return []Warning{wrongType(n, "a list of strings", path)}
		}
		for _, e := range n.list {
			if _, ok := e.scalar.(string); !ok {
				return []Warning{wrongType(e, "a string in a list", path)}
			}
		}
		return nil
	}
	ok := false
	switch schema.scalar.(type) {
	case string:
		var s string
		s, ok = n.scalar.(string)
		if ok && isDuration(schema) {
			if _, err := time.ParseDuration(s); err != nil {
				return []Warning{badDuration(n, s, path)}
			}
		}
	case int64:
		_, ok = n.scalar.(int64)
	case float64:
		_, ok = n.scalar.(float64)
		if !ok {
			_, ok = n.scalar.(int64)
		}
	case bool:
		_, ok = n.scalar.(bool)
	}
	if !ok {
		return []Warning{wrongType(n, schema.kind(), path)}
	}
	return nil
}

func badDuration(n *node, s string, path []string) Warning {
	return Warning{Pos: n.pos, Key: keyPath(path), Kind: WrongType,
		Msg: fmt.Sprintf("%s is %q, want a duration such as 10s or 1m30s; the default is used", keyPath(path), s)}
}

// ineffective reports the keys that are set to something else than their
// default although no one reads them.
func ineffective(n, schema, def *node, path []string) []Warning {
	if schema == nil || isAny(schema) && n.zero() {
		return nil
	}
	if n.table != nil && schema.table != nil {
		var ws []Warning
		for _, k := range n.keys() {
			ws = append(ws, ineffective(n.table[k], child(schema, k), def.at(k), join(path, k))...)
		}
		return ws
	}
	if def == nil && n.zero() || def != nil && n.equal(def) || len(checkTypes(n, schema, path)) > 0 {
		return nil // as the default, or already reported
	}
	return []Warning{{Pos: n.pos, Key: keyPath(path), Kind: Ineffective,
		Msg: fmt.Sprintf("%s is accepted, not yet effective", keyPath(path))}}
}

func join(path []string, k string) []string {
	return append(path[:len(path):len(path)], k)
}
