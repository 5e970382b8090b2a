package container

import "testing"

// A note is what Gantry wrote as one; labels and extensions of others are none.
func TestNotes(t *testing.T) {
	c := Container{Labels: map[string]string{"io.gantry.rm": "true"}, Extensions: Notes(map[string]string{"io.gantry.log": "file:///x"})}
	if got := c.Note("io.gantry.rm"); got != "" {
		t.Errorf("a label was taken for a note: %q", got)
	}
	if got := c.Note("io.gantry.log"); got != "file:///x" {
		t.Errorf("note %q", got)
	}
	x := c.Extensions["io.gantry.log"]
	x.URL = "org.example.Other"
	c.Extensions["io.gantry.log"] = x
	if got := c.Note("io.gantry.log"); got != "" {
		t.Errorf("somebody else's extension was taken for a note: %q", got)
	}
	if Notes(nil) != nil {
		t.Error("no notes make extensions")
	}
}
