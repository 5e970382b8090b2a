package config

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// topOrder is the order of the first lines of a file; other keys follow by name.
var topOrder = []string{"version", "root", "state", "temp", "disabled_plugins", "required_plugins", "oom_score", "imports",
	"debug", "plugins", "cgroup", "timeouts", "stream_processors", "proxy_plugins"}

// marshal writes a tree as TOML. The output depends only on the values; with
// origins each line tells where its value comes from.
func marshal(root *node, origins bool) []byte {
	var b bytes.Buffer
	writeTable(&b, root, nil, origins)
	return b.Bytes()
}

func writeTable(b *bytes.Buffer, t *node, path []string, origins bool) {
	rank := func(k string) int {
		if i := slices.Index(topOrder, k); i >= 0 && len(path) == 0 {
			return i
		}
		return len(topOrder)
	}
	ks := slices.SortedFunc(maps.Keys(t.table), func(a, b string) int { return cmp.Or(cmp.Compare(rank(a), rank(b)), strings.Compare(a, b)) })
	inner := strings.Repeat("  ", len(path))
	for _, k := range ks {
		v := t.table[k]
		if v.table != nil {
			continue
		}
		fmt.Fprintf(b, "%s%s = %s", inner, quoteKey(k), inline(v))
		if origins {
			fmt.Fprintf(b, " # %s", v.pos)
		}
		b.WriteByte('\n')
	}
	for _, k := range ks {
		v := t.table[k]
		if v.table == nil {
			continue
		}
		sub := join(path, k)
		scalars := len(v.table) == 0
		for _, c := range v.table {
			if c.table == nil {
				scalars = true
			}
		}
		if scalars || len(path) == 0 {
			if b.Len() > 0 {
				b.WriteByte('\n')
			}
			fmt.Fprintf(b, "%s[%s]\n", inner, keyPath(sub))
		}
		writeTable(b, v, sub, origins)
	}
}

func inline(n *node) string {
	switch {
	case n.table != nil:
		var parts []string
		for _, k := range slices.Sorted(maps.Keys(n.table)) {
			parts = append(parts, quoteKey(k)+" = "+inline(n.table[k]))
		}
		return "{" + strings.Join(parts, ", ") + "}"
	case n.list != nil:
		parts := make([]string, len(n.list))
		for i, e := range n.list {
			parts[i] = inline(e)
		}
		return "[" + strings.Join(parts, ", ") + "]"
	}
	switch v := n.scalar.(type) {
	case string:
		return quote(v)
	case int64:
		return strconv.FormatInt(v, 10)
	case float64:
		switch {
		case math.IsNaN(v):
			return "nan"
		case math.IsInf(v, 1):
			return "inf"
		case math.IsInf(v, -1):
			return "-inf"
		}
		s := strconv.FormatFloat(v, 'g', -1, 64)
		if !strings.ContainsAny(s, ".e") {
			s += ".0"
		}
		return s
	case interface{ MarshalText() ([]byte, error) }: // dates and times
		text, err := v.MarshalText()
		if err != nil {
			return quote(fmt.Sprint(v))
		}
		return string(text)
	}
	return fmt.Sprint(n.scalar)
}

// quote uses a literal string where it can: paths stay readable.
func quote(s string) string {
	literal := true
	for _, r := range s {
		if r < 0x20 || r == 0x7f || r == '\'' || r == 0xfffd {
			literal = false
		}
	}
	if literal {
		return "'" + s + "'"
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x20 || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

func quoteKey(k string) string {
	bare := k != ""
	for _, r := range k {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '-') {
			bare = false
		}
	}
	if bare {
		return k
	}
	return quote(k)
}
