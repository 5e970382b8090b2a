package oci

import (
	"fmt"
	"io"
	"math"
	"math/big"
	"strconv"
	"strings"
	"testing"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// endless repeats its text for ever.
type endless struct {
	text string
	off  int
}

func (e *endless) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		k := copy(p[n:], e.text[e.off:])
		n, e.off = n+k, (e.off+k)%len(e.text)
	}
	return n, nil
}

func TestResolveUser(t *testing.T) {
	u := func(uid, gid uint32, more ...uint32) specs.User {
		return specs.User{UID: uid, GID: gid, AdditionalGids: append([]uint32{gid}, more...)}
	}
	for in, want := range map[string]any{
		"":                           u(0, 0, 10),
		"root":                       u(0, 0, 10),
		"0":                          u(0, 0, 10),
		"000":                        u(0, 0, 10),
		"web":                        u(1000, 1001, 10, 63),
		"1000":                       u(1000, 1001, 10, 63),
		"01000":                      u(1000, 1001, 10, 63),
		"web:audio":                  u(1000, 63),
		"1000:7":                     u(1000, 7),
		"4242":                       u(4242, 0),
		"4242:audio":                 u(4242, 63),
		"2147483647":                 u(math.MaxInt32, 0),
		"1:2147483647":               u(1, math.MaxInt32),
		"2147483648":                 errdefs.IsOutOfRange,
		"4294967296":                 errdefs.IsOutOfRange,
		"4294967296:0":               errdefs.IsOutOfRange,
		"1:4294967296":               errdefs.IsOutOfRange,
		"99999999999999999999999999": errdefs.IsOutOfRange,
		"-1":                         errdefs.IsInvalidArgument,
		"-0":                         errdefs.IsInvalidArgument,
		"+0":                         errdefs.IsInvalidArgument,
		"+1000":                      errdefs.IsInvalidArgument,
		" 0":                         errdefs.IsInvalidArgument,
		"0 ":                         errdefs.IsInvalidArgument,
		"0\n":                        errdefs.IsInvalidArgument,
		"0x0":                        errdefs.IsInvalidArgument,
		"0b1":                        errdefs.IsInvalidArgument,
		"0o7":                        errdefs.IsInvalidArgument,
		"1_000":                      errdefs.IsInvalidArgument,
		"1e3":                        errdefs.IsInvalidArgument,
		"1.0":                        errdefs.IsInvalidArgument,
		"\u0660":                     errdefs.IsInvalidArgument, // ARABIC-INDIC DIGIT ZERO
		"\uff10":                     errdefs.IsInvalidArgument, // FULLWIDTH DIGIT ZERO
		"\u2212":                     errdefs.IsInvalidArgument,
		"-":                          errdefs.IsInvalidArgument,
		":":                          errdefs.IsInvalidArgument,
		":0":                         errdefs.IsInvalidArgument,
		"0:":                         errdefs.IsInvalidArgument,
		"0:0:0":                      errdefs.IsInvalidArgument,
		"a b":                        errdefs.IsInvalidArgument,
		"a/b":                        errdefs.IsInvalidArgument,
		"nobody":                     errdefs.IsNotFound,
		"Root":                       errdefs.IsNotFound,
		"inf":                        errdefs.IsNotFound,
		"0:none":                     errdefs.IsNotFound,
	} {
		got, err := ResolveUser(strings.NewReader(passwd), strings.NewReader(group), in)
		switch want := want.(type) {
		case specs.User:
			if d := cmp.Diff(want, got); err != nil || d != "" {
				t.Errorf("%q: %v %s", in, err, d)
			}
		case func(error) bool:
			if !want(err) || !cmp.Equal(got, specs.User{}) {
				t.Errorf("%q: %+v %v", in, got, err)
			}
		}
	}
}

// A passwd that has numbers as names must not turn them into root.
func TestNumbersAreNotNames(t *testing.T) {
	var evil strings.Builder
	names := []string{"2147483648", "4294967296", "-1", "+0", "0x0", "1_0", "\u0660", "1000", "1e3", "99999999999999999999"}
	for _, n := range names {
		fmt.Fprintf(&evil, "%s:x:0:0::/:/bin/sh\n", n)
	}
	for _, n := range names {
		got, err := ResolveUser(strings.NewReader(evil.String()), strings.NewReader(strings.ReplaceAll(evil.String(), "0:0::/:", "0:")), n)
		if n == "1000" {
			if err != nil || got.UID != 1000 {
				t.Errorf("%q: %+v %v, want 1000", n, got, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%q became %+v", n, got)
		}
		if _, err := ResolveGroups(func() (io.Reader, error) { return strings.NewReader(n + ":x:0:\n"), nil }, n); err == nil {
			t.Errorf("group %q was found", n)
		}
	}
	for _, line := range []string{"evil:x:4294967296:0::/:\n", "evil:x:-1:0::/:\n", "evil:x:0:4294967296::/:\n", "evil:x:x:0::/:\n"} {
		if got, err := ResolveUser(strings.NewReader(line), nil, "evil"); err == nil {
			t.Errorf("%q became %+v", line, got)
		}
	}
	if got, err := ResolveUser(nil, strings.NewReader("g:x:4294967296:root\n"), ""); err == nil {
		t.Errorf("a group id that wraps: %+v", got)
	}
}

// The image's files may be of any size: only a bounded part is read, a line at
// a time.
func TestHugeDatabases(t *testing.T) {
	if _, err := ResolveUser(&endless{text: "a:x:1:1::/:\n"}, nil, "nobody"); !errdefs.IsOutOfRange(err) || !strings.Contains(err.Error(), "passwd") {
		t.Errorf("endless passwd: %v", err)
	}
	if _, err := ResolveUser(&endless{text: "aaaaaaaa"}, nil, "nobody"); !errdefs.IsOutOfRange(err) || !strings.Contains(err.Error(), "line") {
		t.Errorf("endless line: %v", err)
	}
	if _, err := ResolveUser(nil, &endless{text: "a:x:1:root\n"}, ""); !errdefs.IsOutOfRange(err) || !strings.Contains(err.Error(), "group") {
		t.Errorf("endless group: %v", err)
	}
	var many strings.Builder
	for i := range maxGroups + 10 {
		fmt.Fprintf(&many, "g%d:x:%d:root\n", i, i)
	}
	if _, err := ResolveUser(nil, strings.NewReader(many.String()), ""); !errdefs.IsOutOfRange(err) || !strings.Contains(err.Error(), "65536") {
		t.Errorf("too many groups: %v", err)
	}
	// A user that is found early costs only the bytes up to it.
	if u, err := ResolveUser(&endless{text: "a:x:5:6::/:\n"}, nil, "a"); err != nil || u.UID != 5 {
		t.Errorf("%+v %v", u, err)
	}
}

func TestResolveGroups(t *testing.T) {
	open := func() (io.Reader, error) { return strings.NewReader(group), nil }
	gids, err := ResolveGroups(open, "audio", "5", "wheel", "63")
	if err != nil || !cmp.Equal(gids, []uint32{63, 5, 10}) {
		t.Errorf("%v %v", gids, err)
	}
	if _, err := ResolveGroups(open, "none"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := ResolveGroups(nil, "audio"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// checkUser compares a result with a specification written in other words.
func checkUser(t *testing.T, in string) {
	t.Helper()
	u, err := ResolveUser(strings.NewReader(passwd+"0x0:x:0:0::/:\n-5:x:0:0::/:\n2147483648:x:0:0::/:\n\u0661:x:0:0::/:\n"), strings.NewReader(group), in)
	if err != nil {
		return
	}
	name, _, _ := strings.Cut(in, ":")
	allDigits := name != "" && strings.Trim(name, "0123456789") == ""
	if u.UID > math.MaxInt32 || u.GID > math.MaxInt32 {
		t.Fatalf("%q: ids out of range: %+v", in, u)
	}
	if allDigits {
		n, _ := new(big.Int).SetString(name, 10)
		if !n.IsUint64() || n.Uint64() != uint64(u.UID) {
			t.Fatalf("%q became user %d", in, u.UID)
		}
		return
	}
	// Whatever any parser of numbers accepts must have been refused.
	if _, err := strconv.ParseInt(name, 0, 64); err == nil {
		t.Fatalf("%q became %+v", in, u)
	}
	if _, err := strconv.Atoi(strings.TrimSpace(name)); err == nil {
		t.Fatalf("%q became %+v", in, u)
	}
	if name != "" && strings.IndexFunc(name, func(r rune) bool { return !unicode.IsDigit(r) }) < 0 {
		t.Fatalf("%q became %+v", in, u)
	}
	if u.UID == 0 && in != "" && name != "root" {
		t.Fatalf("%q became root", in)
	}
}

func TestUserEdges(t *testing.T) {
	for _, n := range []int64{0, 1, math.MaxInt8, math.MaxInt16, math.MaxUint16, math.MaxInt32, math.MaxUint32, math.MaxInt64} {
		for _, d := range []int64{-2, -1, 0, 1, 2} {
			v := new(big.Int).Add(big.NewInt(n), big.NewInt(d))
			for _, format := range []string{"%s", "+%s", "-%s", " %s", "%s ", "0%s", "0x%s", "%s:%[1]s", "%s:0", "0:%s", "\t%s", "%s\n", "%s_0", "%s.0", "\u2212%s"} {
				checkUser(t, fmt.Sprintf(format, v.String()))
			}
		}
	}
}

func FuzzResolveUser(f *testing.F) {
	for _, s := range []string{"", "root", "web:audio", "0x0", "-1", "4294967296:1", "\u0661", "1e3", "0\x00", "a:b:c", "\xff0", "٠١", "½"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) { checkUser(t, in) })
}
