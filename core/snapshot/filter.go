package snapshot

import "strings"

// Field makes an Info what filters work on: kind (in lower case), name, parent
// and labels (contract 1.2.8).
func (i Info) Field(path []string) (value string, present bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "kind":
		return strings.ToLower(i.Kind.String()), i.Kind != KindUnknown
	case "name":
		return i.Name, i.Name != ""
	case "parent":
		return i.Parent, i.Parent != ""
	case "labels":
		v, ok := i.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}
