package filter

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

type object map[string]string

func (o object) Field(path []string) (string, bool) {
	v, ok := o[strings.Join(path, "|")]
	return v, ok
}

// contract: 1.2.7, 13.3
func TestMatch(t *testing.T) {
	o := object{"name": "redis", "namespace": "moby", "topic": "/tasks/exit", "labels|a.b/c": "x y", "empty": "", "labels|plain": "v1.2"}
	for _, tc := range []struct {
		filters []string
		want    bool
	}{
		{nil, true},
		{[]string{""}, true},
		{[]string{"name"}, true},
		{[]string{"absent"}, false},
		{[]string{"empty"}, true},
		{[]string{"name==redis"}, true},
		{[]string{"name==redi"}, false},
		{[]string{"name!=redis"}, false},
		{[]string{"absent!=x"}, true},
		{[]string{"absent==x"}, false},
		{[]string{"name==redis,namespace==moby"}, true},
		{[]string{"name==redis,namespace==k8s.io"}, false},
		{[]string{"name==x", "namespace==moby"}, true},
		{[]string{"name==x", "namespace==y"}, false},
		{[]string{`name=="redis"`}, true},
		{[]string{`labels."a.b/c"=="x y"`}, true},
		{[]string{`labels."a.b/c"`}, true},
		{[]string{`labels.plain==v1.2`}, true},
		{[]string{`namespace==moby,topic~=|^/tasks/|`}, true},
		{[]string{`topic~=/^\/tasks\/exit$/`}, true},
		{[]string{`topic~=/exi./`}, true},
		{[]string{`labels.plain~=/v\d\.\d/`}, true},
		{[]string{`labels.plain~=|v1\.3|`}, false},
		{[]string{`topic~="^/tasks"`}, true},
		{[]string{`topic~=^/tasks`}, true},
		{[]string{`name~=re.*s,namespace~=mo`}, true},
		{[]string{`name==redis, namespace == moby ,topic ~= |exit|`}, true},
		{[]string{`name==redis, namespace==other`}, false},
		{[]string{`topic=="/tasks/exit"`}, true},
		{[]string{`topic==/tasks/exit`}, true},
		{[]string{`topic~=|^x\|exit$|`}, true},
	} {
		f, err := Parse(tc.filters...)
		if err != nil {
			t.Errorf("Parse(%q): %v", tc.filters, err)
			continue
		}
		if got := f.Match(o); got != tc.want {
			t.Errorf("Parse(%q).Match = %v, want %v", tc.filters, got, tc.want)
		}
	}
}

// contract: 1.2.7
func TestBadFilterNamesPosition(t *testing.T) {
	for _, tc := range []struct{ filter, at string }{
		{"name~=(", "character 7"},
		{"name=", "character 5"},
		{"name==", "character 7"},
		{"name=x", "character 5"},
		{"==x", "character 1"},
		{"name,", "character 6"},
		{"name==a b", "character 9"},
		{`name=="a`, "character 7"},
		{`topic~=/x`, "character 8"},
		{`labels."a`, "character 8"},
		{"name.", "character 6"},
		{"a\xff", "UTF-8"},
		{"a==" + strings.Repeat("x", maxLength), "more than"},
	} {
		_, err := Parse(tc.filter)
		if !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Parse(%.40q) = %v, want ErrInvalidArgument", tc.filter, err)
		} else if !strings.Contains(err.Error(), tc.at) {
			t.Errorf("Parse(%.40q) = %v, want it to name %q", tc.filter, err, tc.at)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{`name==a`, `labels."x"~=|a|`, `a.b.c!=/x/,d`, `topic~="\x41"`, `~`, `a~=/\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if flt, err := Parse(s); err == nil {
			flt.Match(object{"name": "a"})
		} else if !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Fatal(err)
		}
	})
}
