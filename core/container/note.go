package container

import "github.com/gantryd/gantry/core/typed"

// noteURL is the type of a note's value: plain text.
const noteURL = "io.gantry.note"

// Notes makes extensions of what Gantry's own programs remember of a container:
// where its output is kept, that it is to be removed when it ends. They are no
// labels, because clients copy an image's labels to its containers, and an
// image must not decide where a file is written or what is removed.
func Notes(notes map[string]string) map[string]typed.Any {
	if len(notes) == 0 {
		return nil
	}
	out := make(map[string]typed.Any, len(notes))
	for name, text := range notes {
		out[name] = typed.Any{URL: noteURL, Value: []byte(text)}
	}
	return out
}

// Note returns a note, "" if there is none of that name.
func (c Container) Note(name string) string {
	if x := c.Extensions[name]; x.URL == noteURL {
		return string(x.Value)
	}
	return ""
}
