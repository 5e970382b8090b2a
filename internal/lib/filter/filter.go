// Package filter is the little language in which clients ask for some of many
// objects (contract 1.2.7): selectors joined by commas must all match, and of
// several filters one must. A selector is a field path, which must be present,
// or a path, an operator (==, !=, ~=) and a value.
//
//	name==redis,labels."a.b/c"!=x      namespace==moby,topic~=|^/tasks/|
package filter

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// Adaptor lets a filter look at an object.
type Adaptor interface {
	// Field returns the field at path, and whether the object has it.
	Field(path []string) (value string, present bool)
}

// Func is an Adaptor made of a function.
type Func func(path []string) (string, bool)

// Field calls f.
func (f Func) Field(path []string) (string, bool) { return f(path) }

// Filter decides about objects. It is safe for concurrent use.
type Filter interface {
	Match(Adaptor) bool
}

// Parse returns a filter that matches what one of the filters matches, or
// everything if there are none. A filter that cannot be read, its regular
// expressions included, is ErrInvalidArgument naming the position.
func Parse(filters ...string) (Filter, error) {
	var out anyOf
	for _, f := range filters {
		all, err := parse(f)
		if err != nil {
			return nil, err
		}
		out = append(out, all)
	}
	return out, nil
}

// maxLength bounds the length of one filter in bytes: it comes from a client
// and a regular expression grows when it is compiled.
const maxLength = 16 << 10

type anyOf []allOf

func (o anyOf) Match(a Adaptor) bool {
	if len(o) == 0 {
		return true
	}
	for _, f := range o {
		if f.Match(a) {
			return true
		}
	}
	return false
}

type allOf []selector

func (o allOf) Match(a Adaptor) bool {
	for _, s := range o {
		if !s.match(a) {
			return false
		}
	}
	return true
}

type operator int

const (
	present operator = iota
	equal
	notEqual
	matches
)

type selector struct {
	path  []string
	op    operator
	value string
	re    *regexp.Regexp
}

func (s selector) match(a Adaptor) bool {
	value, ok := a.Field(s.path)
	switch s.op {
	case equal:
		return ok && value == s.value
	case notEqual:
		return value != s.value
	case matches:
		return s.re.MatchString(value)
	default:
		return ok
	}
}

// parser reads one filter from left to right. pos counts bytes.
type parser struct {
	text string
	pos  int
}

func (p *parser) fail(format string, args ...any) error {
	return fmt.Errorf("filter %s at character %d: %s: %w", abbreviate(p.text), p.pos+1, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

func abbreviate(s string) string {
	if len(s) > 80 {
		return strconv.Quote(s[:80]) + "..."
	}
	return strconv.Quote(s)
}

func parse(text string) (allOf, error) {
	p := &parser{text: text}
	if len(text) > maxLength {
		return nil, p.fail("%d bytes are more than %d", len(text), maxLength)
	}
	if !utf8.ValidString(text) {
		return nil, p.fail("not valid UTF-8")
	}
	var all allOf
	if text == "" {
		return all, nil
	}
	for {
		p.space()
		s, err := p.selector()
		if err != nil {
			return nil, err
		}
		all = append(all, s)
		p.space()
		if p.pos == len(p.text) {
			return all, nil
		}
		if p.text[p.pos] != ',' {
			return nil, p.fail("expected ',' or the end")
		}
		p.pos++
	}
}

func (p *parser) selector() (selector, error) {
	path, err := p.path()
	if err != nil {
		return selector{}, err
	}
	s := selector{path: path}
	p.space()
	rest := p.text[p.pos:]
	switch {
	case strings.HasPrefix(rest, "=="):
		s.op = equal
	case strings.HasPrefix(rest, "!="):
		s.op = notEqual
	case strings.HasPrefix(rest, "~="):
		s.op = matches
	case rest == "", rest[0] == ',':
		return s, nil
	default:
		return selector{}, p.fail("expected an operator (==, !=, ~=), ',' or the end")
	}
	p.pos += 2
	p.space()
	at := p.pos
	if s.value, err = p.value(s.op == matches); err != nil {
		return selector{}, err
	}
	if s.op == matches {
		if s.re, err = regexp.Compile(s.value); err != nil {
			p.pos = at
			return selector{}, p.fail("%s", strings.TrimPrefix(err.Error(), "error parsing regexp: "))
		}
	}
	return s, nil
}

// space passes over blanks between two tokens: clients write them after commas.
func (p *parser) space() {
	for p.pos < len(p.text) && strings.IndexByte(" \t\n", p.text[p.pos]) >= 0 {
		p.pos++
	}
}

func (p *parser) path() ([]string, error) {
	var path []string
	for {
		var part string
		var err error
		if p.pos < len(p.text) && p.text[p.pos] == '"' {
			part, err = p.quoted()
		} else {
			part, err = p.word(isFieldRune, "a field")
		}
		if err != nil {
			return nil, err
		}
		path = append(path, part)
		if p.pos == len(p.text) || p.text[p.pos] != '.' {
			return path, nil
		}
		p.pos++
	}
}

func (p *parser) value(re bool) (string, error) {
	if p.pos < len(p.text) {
		switch c := p.text[p.pos]; {
		case c == '"':
			return p.quoted()
		case re && (c == '/' || c == '|'):
			return p.delimited(c)
		}
	}
	return p.word(isValueRune, "a value")
}

func isFieldRune(r rune) bool {
	return r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= utf8.RuneSelf
}

// isValueRune accepts what can stand in a bare value. Gantry takes more than
// the letters and digits that the grammar asks for: everything that cannot be
// mistaken for the end of the value.
func isValueRune(r rune) bool {
	return r != ',' && r != '"' && r != ' ' && r != '\t' && r != '\n'
}

func (p *parser) word(ok func(rune) bool, what string) (string, error) {
	start := p.pos
	for p.pos < len(p.text) {
		r, n := utf8.DecodeRuneInString(p.text[p.pos:])
		if !ok(r) {
			break
		}
		p.pos += n
	}
	if p.pos == start {
		return "", p.fail("expected %s", what)
	}
	return p.text[start:p.pos], nil
}

// quoted reads a Go string in double quotes.
func (p *parser) quoted() (string, error) {
	prefix, err := strconv.QuotedPrefix(p.text[p.pos:])
	if err != nil {
		return "", p.fail("the quoted string does not end, or has a bad escape")
	}
	s, err := strconv.Unquote(prefix)
	if err != nil {
		return "", p.fail("bad escape in a quoted string")
	}
	p.pos += len(prefix)
	return s, nil
}

// delimited reads a regular expression between two slashes or bars. A
// backslash before the delimiter makes it part of the expression; every other
// backslash belongs to the expression.
func (p *parser) delimited(delim byte) (string, error) {
	var b strings.Builder
	for i := p.pos + 1; i < len(p.text); i++ {
		switch c := p.text[i]; {
		case c == delim:
			p.pos = i + 1
			return b.String(), nil
		case c == '\\' && i+1 < len(p.text) && p.text[i+1] == delim:
			b.WriteByte(delim)
			i++
		case c == '\\' && i+1 < len(p.text):
			b.WriteByte(c)
			b.WriteByte(p.text[i+1])
			i++
		default:
			b.WriteByte(c)
		}
	}
	return "", p.fail("the expression does not end in %q", delim)
}
