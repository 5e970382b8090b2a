package testimage

import "testing"

func TestPause(t *testing.T) {
	img, err := NewPause()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, b := range img.Blobs {
		n += len(b)
	}
	if n == 0 || n > 1<<20 {
		t.Errorf("an image of %d bytes", n)
	}
}
