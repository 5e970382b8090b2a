package config

import (
	"cmp"
	"encoding"
	"fmt"
	"maps"
	"math"
	"reflect"
	"strings"
	"time"
)

var durationType = reflect.TypeFor[time.Duration]()

// decoder fills Go values from nodes and collects what does not fit. A value
// that does not fit leaves the Go value as it was, which is its default.
type decoder struct{ warnings []Warning }

// table fills a struct. Keys without a field are checked against the schema:
// known ones are ineffective, others unknown.
func (d *decoder) table(n *node, v reflect.Value, schema, def *node, path []string) {
	fields := fieldsOf(v)
	for _, k := range n.keys() {
		sub := join(path, k)
		f, ok := fields[k]
		if !ok {
			for name, c := range fields {
				if strings.EqualFold(name, k) {
					f, ok = c, true
				}
			}
		}
		if ok {
			d.value(n.table[k], f, child(schema, k), def.at(k), sub)
			continue
		}
		if s := child(schema, k); s != nil {
			d.warnings = append(d.warnings, checkTypes(n.table[k], s, sub)...)
			d.warnings = append(d.warnings, ineffective(n.table[k], s, def.at(k), sub)...)
			continue
		}
		w := unknownKey(n.table[k], nil, sub)
		if !strings.Contains(w.Msg, "(") {
			keys := make([]string, 0, len(fields))
			for name := range fields {
				keys = append(keys, name)
			}
			if near := nearest(k, keys); near != "" {
				w.Msg += fmt.Sprintf(" (did you mean %q?)", near)
			}
		}
		d.warnings = append(d.warnings, w)
	}
}

// fieldsOf lists the settable fields of a struct by their toml name, embedded
// structs flattened.
func fieldsOf(v reflect.Value) map[string]reflect.Value {
	fields := map[string]reflect.Value{}
	t := v.Type()
	for i := range t.NumField() {
		sf := t.Field(i)
		if !sf.IsExported() {
			continue
		}
		name, _, _ := strings.Cut(sf.Tag.Get("toml"), ",")
		if name == "-" {
			continue
		}
		if sf.Anonymous && name == "" && sf.Type.Kind() == reflect.Struct {
			maps.Copy(fields, fieldsOf(v.Field(i)))
			continue
		}
		fields[cmp.Or(name, sf.Name)] = v.Field(i)
	}
	return fields
}

func (d *decoder) wrong(n *node, want string, path []string) {
	d.warnings = append(d.warnings, wrongType(n, want, path))
}

func (d *decoder) value(n *node, v reflect.Value, schema, def *node, path []string) {
	if v.Type() == durationType {
		s, ok := n.scalar.(string)
		if !ok {
			d.wrong(n, "a duration such as 10s", path)
			return
		}
		if s == "" {
			v.SetInt(0)
			return
		}
		dur, err := time.ParseDuration(s)
		if err != nil {
			d.warnings = append(d.warnings, badDuration(n, s, path))
			return
		}
		v.SetInt(int64(dur))
		return
	}
	if v.CanAddr() {
		if _, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
			s, ok := n.scalar.(string)
			if !ok {
				d.wrong(n, "a string", path)
				return
			}
			fresh := reflect.New(v.Type())
			if err := fresh.Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(s)); err != nil {
				d.warnings = append(d.warnings, Warning{Pos: n.pos, Key: keyPath(path), Kind: WrongType,
					Msg: fmt.Sprintf("%s is %q: %s; the default is used", keyPath(path), s, err)})
				return
			}
			v.Set(fresh.Elem())
			return
		}
	}
	switch v.Kind() {
	case reflect.String:
		s, ok := n.scalar.(string)
		if !ok {
			d.wrong(n, "a string", path)
			return
		}
		v.SetString(s)
	case reflect.Bool:
		b, ok := n.scalar.(bool)
		if !ok {
			d.wrong(n, "a boolean", path)
			return
		}
		v.SetBool(b)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		i, ok := n.scalar.(int64)
		if !ok || v.OverflowInt(i) {
			d.wrong(n, "an integer"+rangeOf(ok, v), path)
			return
		}
		v.SetInt(i)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		i, ok := n.scalar.(int64)
		if !ok || i < 0 || v.OverflowUint(uint64(i)) {
			d.wrong(n, "a positive integer"+rangeOf(ok, v), path)
			return
		}
		v.SetUint(uint64(i))
	case reflect.Float32, reflect.Float64:
		switch f := n.scalar.(type) {
		case float64:
			if math.IsNaN(f) || math.IsInf(f, 0) {
				d.wrong(n, "a finite number", path)
				return
			}
			v.SetFloat(f)
		case int64:
			v.SetFloat(float64(f))
		default:
			d.wrong(n, "a number", path)
		}
	case reflect.Slice:
		if n.list == nil {
			d.wrong(n, "a list", path)
			return
		}
		before := len(d.warnings)
		s := reflect.MakeSlice(v.Type(), len(n.list), len(n.list))
		for i, e := range n.list {
			d.value(e, s.Index(i), nil, nil, join(path, fmt.Sprint(i)))
		}
		if len(d.warnings) == before { // half a list is no default
			v.Set(s)
		}
	case reflect.Map:
		if n.table == nil || v.Type().Key().Kind() != reflect.String {
			d.wrong(n, "a table", path)
			return
		}
		if v.IsNil() {
			v.Set(reflect.MakeMap(v.Type()))
		} else { // never write into the map of a shared default
			fresh := reflect.MakeMap(v.Type())
			for it := v.MapRange(); it.Next(); {
				fresh.SetMapIndex(it.Key(), it.Value())
			}
			v.Set(fresh)
		}
		for _, k := range n.keys() {
			key := reflect.ValueOf(k).Convert(v.Type().Key())
			elem := reflect.New(v.Type().Elem()).Elem()
			if have := v.MapIndex(key); have.IsValid() && elem.Kind() == reflect.Struct && !replacedPerKey[path[0]] {
				elem.Set(have)
			}
			before := len(d.warnings)
			d.value(n.table[k], elem, child(schema, k), def.at(k), join(path, k))
			if len(d.warnings) == before || elem.Kind() == reflect.Struct {
				v.SetMapIndex(key, elem)
			}
		}
	case reflect.Struct:
		if n.table == nil {
			d.wrong(n, "a table", path)
			return
		}
		d.table(n, v, schema, def, path)
	case reflect.Pointer:
		fresh := reflect.New(v.Type().Elem())
		if !v.IsNil() {
			fresh.Elem().Set(v.Elem())
		}
		before := len(d.warnings)
		d.value(n, fresh.Elem(), schema, def, path)
		if len(d.warnings) == before || fresh.Elem().Kind() == reflect.Struct {
			v.Set(fresh)
		}
	case reflect.Interface:
		if v.NumMethod() != 0 {
			d.wrong(n, "nothing: the key has no type", path)
			return
		}
		v.Set(reflect.ValueOf(n.plain()))
	default:
		d.wrong(n, "nothing: the key has no type", path)
	}
}

func rangeOf(isInt bool, v reflect.Value) string {
	if !isInt {
		return ""
	}
	return " that fits into " + v.Kind().String()
}

// plain is the value without origins.
func (n *node) plain() any {
	switch {
	case n.table != nil:
		m := make(map[string]any, len(n.table))
		for k, v := range n.table {
			m[k] = v.plain()
		}
		return m
	case n.list != nil:
		l := make([]any, len(n.list))
		for i, v := range n.list {
			l[i] = v.plain()
		}
		return l
	}
	return n.scalar
}
