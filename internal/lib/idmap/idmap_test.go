package idmap

import (
	"math"
	"testing"

	"github.com/containerd/errdefs"
)

// contract: 10.8
func TestParse(t *testing.T) {
	for _, s := range []string{"0:100000:65536", "0:1000:1,1:100000:65535", "5:5:1", "0:0:4294967295"} {
		m, err := Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		if m.String() != s {
			t.Errorf("%q came back as %q", s, m)
		}
	}
	for _, s := range []string{
		"", "0", "0:1", "0:1:2:3", "a:1:2", "0:-1:2", "0:1:0", "0:1:2,", "0:4294967295:1", "4294967290:0:10", "0:0:4294967296",
		"0:1000:10,5:2000:10", "0:1000:10,10:1005:10", " 0:1:2",
	} {
		if m, err := Parse(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Parse(%q) = %v, %v", s, m, err)
		}
	}
}

func TestMap(t *testing.T) {
	m, err := Parse("0:1000:1,1:100000:65535")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		container, host uint32
		ok              bool
	}{{0, 1000, true}, {1, 100000, true}, {65535, 165534, true}, {65536, 0, false}, {math.MaxUint32, 0, false}} {
		host, ok := m.ToHost(tc.container)
		if ok != tc.ok || host != tc.host {
			t.Errorf("ToHost(%d) = %d, %t", tc.container, host, ok)
		}
		if !tc.ok {
			continue
		}
		if back, ok := m.ToContainer(host); !ok || back != tc.container {
			t.Errorf("ToContainer(%d) = %d, %t", host, back, ok)
		}
	}
	if id, ok := m.ToContainer(0); ok {
		t.Errorf("host id 0 is %d in the container", id)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("0:100000:65536")
	f.Add("0:1000:1,1:100000:65535")
	f.Fuzz(func(t *testing.T, s string) {
		m, err := Parse(s)
		if err != nil {
			return
		}
		for _, r := range m {
			last := r.Container + (r.Size - 1)
			host, ok := m.ToHost(last)
			if back, ok2 := m.ToContainer(host); !ok || !ok2 || back != last {
				t.Fatalf("%q: %d does not come back", s, last)
			}
		}
		if again, err := Parse(m.String()); err != nil || again.String() != m.String() {
			t.Fatalf("%q: %v, %v", s, again, err)
		}
	})
}
