package typo

import "testing"

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"web", "web", 0}, {"wob", "web", 1}, {"websrver", "webserver", 1}, {"abc", "xyz", 3}} {
		if got := Distance(c.a, c.b, 3); got != c.want {
			t.Errorf("%s, %s: %d", c.a, c.b, got)
		}
	}
	if got := Distance("a", "abcdef", 2); got <= 2 {
		t.Errorf("too far apart: %d", got)
	}
}

func TestClosest(t *testing.T) {
	known := []string{"webs", "web", "wob", "database"}
	for written, want := range map[string]string{"web": "web", "wab": "web", "webss": "webs", "datbase": "database", "mail": "", "": ""} {
		if got := Closest(written, known, 1); got != want {
			t.Errorf("%q: %q, want %q", written, got, want)
		}
	}
}
