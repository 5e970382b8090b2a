package mountx

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// contract: 3.4.1
func TestReadOnly(t *testing.T) {
	in := []Mount{
		{Type: "overlay", Source: "overlay", Options: []string{"index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"}},
		{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b"}},
		{Type: "bind", Source: "/x", Options: []string{"rbind", "rw"}},
		{Type: "ext4", Source: "/dev/x", Options: []string{"ro", "noatime"}},
	}
	want := []Mount{
		{Type: "overlay", Source: "overlay", Options: []string{"index=off", "lowerdir=/u:/a:/b"}},
		{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b"}},
		{Type: "bind", Source: "/x", Options: []string{"rbind", "ro"}},
		{Type: "ext4", Source: "/dev/x", Options: []string{"noatime", "ro"}},
	}
	if diff := cmp.Diff(want, ReadOnly(in)); diff != "" {
		t.Error(diff)
	}
	if in[2].Options[1] != "rw" {
		t.Error("the argument was changed")
	}
}

func TestParseIDMap(t *testing.T) {
	got, err := ParseIDMap("0:100000:1000,1000:0:1")
	if err != nil || len(got) != 2 || got[0] != (IDMap{0, 100000, 1000}) || got[1] != (IDMap{1000, 0, 1}) {
		t.Errorf("got %v, %v", got, err)
	}
	for _, bad := range []string{"", "0", "0:1", "0:1:0", "-1:0:1", "0:x:1", "0:0:1,", "0:0:99999999999"} {
		if _, err := ParseIDMap(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		} else if !strings.Contains(err.Error(), "id mapping") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
