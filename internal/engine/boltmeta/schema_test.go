package boltmeta

import (
	"bytes"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/image/imagetest"
	"github.com/gantryd/gantry/core/typed"
)

// FuzzAny compares the encoding of google.protobuf.Any with the real one's, and
// reads whatever there is.
//
// contract: 4.4.1
func FuzzAny(f *testing.F) {
	f.Add("", []byte{})
	f.Add("containerd.runc.v1.Options", []byte{})
	f.Add("u", bytes.Repeat([]byte{0xff}, 300))
	f.Add("\x0a\x05hello\x12\x01x", []byte("\x0a\x03a/b\x1a\x02\x08\x01\x12\x01v"))
	f.Fuzz(func(t *testing.T, url string, value []byte) {
		enc := encodeAny(typed.Any{URL: url, Value: value})
		if want, err := (proto.MarshalOptions{Deterministic: true}).Marshal(&anypb.Any{TypeUrl: url, Value: value}); err == nil && !bytes.Equal(enc, want) {
			t.Errorf("encoded %q, want %q", enc, want)
		}
		if a, err := decodeAny(enc); err != nil || a.URL != url || !bytes.Equal(a.Value, value) {
			t.Errorf("decoded %+v, %v", a, err)
		}
		for _, b := range [][]byte{value, []byte(url)} {
			a, err := decodeAny(b)
			var want anypb.Any
			if proto.Unmarshal(b, &want) == nil && err == nil { // groups, which nobody writes, are refused
				if a.URL != want.TypeUrl || !bytes.Equal(a.Value, want.Value) {
					t.Errorf("decoded %q as %+v, %v; want %v", b, a, err, &want)
				}
			} else if err != nil && !errdefs.IsDataLoss(err) {
				t.Errorf("decode %q: %v", b, err)
			}
		}
	})
}

// contract: 4.4.1
func TestEncodings(t *testing.T) {
	for n, want := range map[int64]string{0: "\x00", 4: "\x08", 652: "\x98\n", -1: "\x01"} {
		if got := string(varint(n)); got != want || readVarint([]byte(got)) != n {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
	f := newFixture(t)
	at := time.Date(2026, 11, 21, 22, 5, 37, 123456789, time.FixedZone("there", 7200))
	img := image.Image{Name: "x", Target: imagetest.Target("x"), CreatedAt: at}
	must(f.in("n").Images().Create(t.Context(), img))(t)
	if err := f.view(func(tx *txn) error {
		enc := tx.find("n", kImages, "x").Get([]byte(kCreated))
		if want, _ := at.UTC().MarshalBinary(); !bytes.Equal(enc, want) || len(enc) != 15 {
			t.Errorf("time is %q, want %q", enc, want)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestClosed(t *testing.T) {
	f := newFixture(t)
	v := f.in("n")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := v.Images().Get(t.Context(), "x")
	is(t, "read", err, errdefs.ErrUnavailable)
	_, err = v.Images().Create(t.Context(), image.Image{Name: "x", Target: imagetest.Target("x")})
	is(t, "write", err, errdefs.ErrUnavailable)
	f.open()
}
